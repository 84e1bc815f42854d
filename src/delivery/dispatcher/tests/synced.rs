//! What is synced of what an operator asks for.

use super::*;
use crate::delivery::operator::{Doubts, Verb};
use crate::spool::Health;
use crate::spool::log::Log;

/// A spool, and how durable each of its changes was to be.
struct Noted {
    log: Arc<Log>,
    asked: Mutex<Vec<Durability>>,
}

impl Spool for Noted {
    type Stage = <Log as Spool>::Stage;

    fn stage(&self) -> Self::Stage {
        self.log.stage()
    }

    async fn apply(&self, ops: Vec<Op>, durability: Durability) -> Result<(), SpoolError> {
        self.log.apply(ops, durability).await?;
        self.asked.lock().unwrap().push(durability);
        Ok(())
    }

    fn heads(&self, after: Option<SpoolId>, n: usize) -> Vec<Head> {
        self.log.heads(after, n)
    }

    fn head(&self, id: SpoolId) -> Option<Head> {
        self.log.head(id)
    }

    fn note(&self, key: &str) -> Option<Vec<u8>> {
        self.log.note(key)
    }

    async fn open(&self, id: SpoolId) -> Result<Stored, SpoolError> {
        self.log.open(id).await
    }

    fn health(&self) -> Health {
        self.log.health()
    }

    fn has_room_for(&self, size: u64) -> bool {
        self.log.has_room_for(size)
    }

    fn trouble(&self) -> Option<SpoolError> {
        self.log.trouble()
    }
}

/// They were answered as done, and a loss of power could undo them.
#[tokio::test]
async fn many_that_are_done_are_durable_whatever_becomes_of_the_last() {
    use Durability::{Durable, Lazy};
    let stand = Stand::new().await;
    let other = SpoolId::from_u128(2);
    let put = Envelope { id: other, ..envelope() };
    stand.apply(Op::Put { envelope: put, body: Staged::Memory(b"hi".to_vec()) }).await;
    let check = async |verb, ids: &[SpoolId], expected: &[Durability]| {
        let noted = Noted { log: Arc::clone(&stand.spool), asked: Mutex::default() };
        let spool = Arc::new(noted);
        let work = Work {
            spool: Arc::clone(&spool),
            metrics: Arc::clone(&stand.metrics),
            log: stand.log.clone(),
            verb,
            doubts: Doubts::Take,
            obstacle: None,
        };
        let place = |id: &SpoolId| match stand.spool.head(*id).map(|head| head.state) {
            Some(QueueState::Held) => Place::Held,
            _ => Place::Due(clock::now()),
        };
        let subject = |id: &SpoolId| Subject { id: *id, was: place(id), judged: None };
        work.carry_out(ids.iter().map(subject).collect()).await;
        assert_eq!(*spool.asked.lock().unwrap(), expected, "{verb:?}");
    };
    check(Verb::Hold, &[other], &[Durable]).await;
    check(Verb::Hold, &[ID, other], &[Lazy, Durable]).await;
    check(Verb::Hold, &[ID, other], &[]).await;
    check(Verb::Release, &[ID, other], &[Lazy, Durable]).await;
    check(Verb::Delete, &[other, ID, SpoolId::from_u128(3)], &[Lazy, Lazy, Durable]).await;
}
