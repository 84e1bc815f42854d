//! What takes days, in moments: time is paused and jumps to the next thing that is waited for.

use std::collections::BTreeMap;

use super::*;
use crate::envelope::{Body, Head};
use crate::spool::{Health, Stage};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A spool in memory: the real one works in threads, which paused time does not wait for.
#[derive(Default)]
struct Memory {
    messages: Mutex<BTreeMap<SpoolId, (Stored, QueueState)>>,
    notes: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Nothing new can be put; what is there can be marked.
    full: std::sync::atomic::AtomicBool,
}

struct MemoryStage(Vec<u8>);

impl Stage for MemoryStage {
    async fn write(&mut self, chunk: &[u8]) -> Result<(), SpoolError> {
        self.0.extend_from_slice(chunk);
        Ok(())
    }

    async fn finish(self) -> Result<Staged, SpoolError> {
        Ok(Staged::Memory(self.0))
    }
}

impl Spool for Memory {
    type Stage = MemoryStage;

    fn stage(&self) -> MemoryStage {
        MemoryStage(Vec::new())
    }

    async fn apply(&self, ops: Vec<Op>, _durability: Durability) -> Result<(), SpoolError> {
        let mut messages = self.messages.lock().unwrap();
        let is_full = self.full.load(std::sync::atomic::Ordering::SeqCst);
        for op in &ops {
            if is_full && matches!(op, Op::Put { .. }) {
                return Err(SpoolError::Full);
            }
            if let Op::Delete { id } = op
                && !messages.contains_key(id)
            {
                return Err(SpoolError::Unknown(*id));
            }
        }
        for op in ops {
            let (id, progress, state) = match op {
                Op::Put { envelope, body: Staged::Memory(body) } => {
                    let progress = Progress::new(envelope.accepted, envelope.rcpts.len());
                    let id = envelope.id;
                    let stored = Stored { envelope, progress, body: Body::Memory(body.into()) };
                    assert!(messages.insert(id, (stored, QueueState::Queued)).is_none());
                    continue;
                }
                Op::Note { key, bytes } => {
                    self.notes.lock().unwrap().insert(key.into(), bytes);
                    continue;
                }
                Op::Done { id } | Op::Delete { id } => {
                    messages.remove(&id);
                    continue;
                }
                Op::Attempt { id, progress } | Op::Update { id, progress } => {
                    (id, progress, QueueState::Queued)
                }
                Op::Fail { id, progress } => (id, progress, QueueState::Failed),
                Op::Hold { id, progress } => (id, progress, QueueState::Held),
                other @ (Op::Put { .. } | Op::Requeue { .. } | Op::Release { .. }) => {
                    panic!("{other:?} is not of this play")
                }
            };
            let slot = messages.get_mut(&id).unwrap();
            slot.0.progress = progress;
            slot.1 = state;
        }
        Ok(())
    }

    fn heads(&self, after: Option<SpoolId>, n: usize) -> Vec<Head> {
        let messages = self.messages.lock().unwrap();
        let ids = messages.keys().filter(|id| after.is_none_or(|after| **id > after));
        let ids: Vec<SpoolId> = ids.take(n).copied().collect();
        drop(messages);
        ids.into_iter().filter_map(|id| self.head(id)).collect()
    }

    fn head(&self, id: SpoolId) -> Option<Head> {
        let messages = self.messages.lock().unwrap();
        messages.get(&id).map(|(stored, state)| Head {
            id,
            state: *state,
            due: stored.progress.due,
            size: stored.envelope.size,
            pending: 1,
            attempts: stored.progress.attempts,
            in_doubt: false,
        })
    }

    fn note(&self, key: &str) -> Option<Vec<u8>> {
        let notes = self.notes.lock().unwrap();
        notes.get(key).filter(|bytes| !bytes.is_empty()).cloned()
    }

    async fn open(&self, id: SpoolId) -> Result<Stored, SpoolError> {
        let messages = self.messages.lock().unwrap();
        messages.get(&id).map(|(stored, _)| stored.clone()).ok_or(SpoolError::Unknown(id))
    }

    fn health(&self) -> Health {
        Health { trouble: None, free: 1, used: 0, contents: 0, in_doubt: 0, failed: 0 }
    }

    fn has_room_for(&self, _size: u64) -> bool {
        true
    }

    fn trouble(&self) -> Option<SpoolError> {
        None
    }
}

/// Refuses every login until somebody mends the password.
#[derive(Default)]
struct WrongPassword {
    mended: std::sync::atomic::AtomicBool,
    tries: std::sync::atomic::AtomicUsize,
    /// What was taken: kind, id, and the content.
    taken: Mutex<Vec<(Kind, SpoolId, String)>>,
}

impl Provider for WrongPassword {
    fn limits(&self) -> Limits {
        Limits { recipients: 100 }
    }

    fn deliver<'a>(
        &'a self,
        submission: &'a Submission,
        outcomes: &'a Outcomes,
    ) -> BoxFuture<'a, ()> {
        use std::sync::atomic::Ordering::SeqCst;
        Box::pin(async move {
            self.tries.fetch_add(1, SeqCst);
            tokio::time::sleep(Duration::from_millis(50)).await;
            let mended = self.mended.load(SeqCst);
            if mended {
                outcomes.content_leaves().await;
                let content = read_all(submission).await;
                let envelope = &submission.envelope;
                self.taken.lock().unwrap().push((envelope.kind, envelope.id, content));
            }
            for rcpt in &submission.part {
                let outcome = match mended {
                    true => Outcome::Delivered(Receipt::new("250 ok")),
                    false => {
                        let words = "535 5.7.8 bad password";
                        Outcome::Held(Cause::new(
                            Scope::Provider,
                            crate::outcome::Stage::Auth,
                            words,
                        ))
                    }
                };
                outcomes.settle(*rcpt, outcome);
            }
        })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

async fn read_all(submission: &Submission) -> String {
    let (mut reader, mut content) = (submission.message.reader(), Vec::new());
    while let Some(chunk) = reader.chunk().await.unwrap() {
        content.extend_from_slice(&chunk);
    }
    String::from_utf8(content).unwrap()
}

#[tokio::test(start_paused = true)]
async fn six_days_of_a_wrong_password_cost_no_message_and_end_with_one_notice() {
    let spool = Arc::new(Memory::default());
    let provider = Arc::new(WrongPassword::default());
    let (accept, accepted) = mpsc::unbounded_channel();
    let mut house = house();
    house.bounce.postmaster = Some(Mailbox::parse("ops@example.net", Charset::Ascii).unwrap());
    let retry = Retry { first: Duration::from_secs(60), factor: 2.0, max: HOUR, ..retry_config() };
    let (_operator, requests) = operator::channel();
    let mut dispatcher = Dispatcher::new(
        Arc::clone(&spool),
        Some(Arc::clone(&provider) as Arc<dyn Provider>),
        Settings { retry, concurrency: 4, policy: preserve(), house },
        accepted,
        requests,
        Arc::new(Metrics::new()),
        watch::Sender::new(None),
        written(),
    );
    dispatcher.load();
    let stop = CancellationToken::new();
    let play = async {
        let mut accepted = Vec::new();
        for _ in 0..6 {
            for _ in 0..24 {
                let now = clock::wall();
                let id = SpoolId::new(now);
                let sender = Mailbox::parse("app@example.com", Charset::Ascii).unwrap();
                let reverse_path = ReversePath::Mailbox(sender);
                let envelope = Envelope { id, accepted: now, reverse_path, ..envelope() };
                let put = Op::Put { envelope, body: Staged::Memory(b"hi".to_vec()) };
                spool.apply(vec![put], Durability::Durable).await.unwrap();
                accept.send(id).unwrap();
                accepted.push(id);
                tokio::time::sleep(HOUR).await;
            }
        }
        let waiting = spool.heads(None, 1_000).len();
        assert_eq!(waiting, accepted.len() + 1, "all of the mail, and one notice");
        provider.mended.store(true, std::sync::atomic::Ordering::SeqCst);
        let began = clock::now();
        while !spool.heads(None, 1).is_empty() {
            assert!(clock::now() - began < DAY, "it does not end");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        stop.cancel();
        accepted
    };
    let (accepted, ()) = tokio::join!(play, dispatcher.run(stop.clone(), Duration::from_secs(1)));
    let taken = provider.taken.lock().unwrap();
    let mut mail: Vec<SpoolId> =
        taken.iter().filter(|(kind, ..)| *kind == Kind::Mail).map(|(_, id, _)| *id).collect();
    mail.sort();
    let mut expected = accepted;
    expected.sort();
    assert_eq!(mail, expected, "everything once");
    let letters: Vec<_> = taken.iter().filter(|(kind, ..)| *kind != Kind::Mail).collect();
    assert!(letters.iter().all(|(kind, ..)| *kind == Kind::Notice), "nothing bounces");
    // One that waited may have been the probe that got through first.
    assert!((1..=2).contains(&letters.len()), "{letters:#?}");
    let (_, _, last) = letters.last().unwrap();
    for part in ["Mail flows again", "535 5.7.8 bad password", "6 d 0 h"] {
        assert!(last.contains(part), "{part} in {last}");
    }
    let tries = provider.tries.load(std::sync::atomic::Ordering::SeqCst);
    assert!(tries < 4_000, "{tries} tries: a server that refuses logins is not stormed");
}

/// What becomes of application mail; letters of our own are taken.
struct Refuses(Play);

impl Provider for Refuses {
    fn limits(&self) -> Limits {
        Limits { recipients: 100 }
    }

    fn deliver<'a>(
        &'a self,
        submission: &'a Submission,
        outcomes: &'a Outcomes,
    ) -> BoxFuture<'a, ()> {
        let play = match submission.envelope.kind {
            Kind::Mail => self.0,
            Kind::Report | Kind::Notice => Play::Take,
        };
        for rcpt in &submission.part {
            outcomes.settle(*rcpt, play.outcome(*rcpt));
        }
        Box::pin(async {})
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

/// Runs the engine for a minute on a full disk, and for another with room again; what there was after each.
async fn on_a_full_disk(
    spool: &Arc<Memory>,
    metrics: &Arc<Metrics>,
    play: Play,
    mails: u128,
) -> [Vec<(QueueState, Progress)>; 2] {
    let put = |id| {
        let envelope = Envelope { id: SpoolId::from_u128(id), ..envelope() };
        Op::Put { envelope, body: Staged::Memory(b"hi".to_vec()) }
    };
    spool.apply((1..=mails).map(put).collect(), Durability::Durable).await.unwrap();
    spool.full.store(true, std::sync::atomic::Ordering::SeqCst);
    let (_accept, accepted) = mpsc::unbounded_channel();
    let mut house = house();
    house.bounce.postmaster = postmaster();
    let (_operator, requests) = operator::channel();
    let mut dispatcher = Dispatcher::new(
        Arc::clone(spool),
        Some(Arc::new(Refuses(play)) as Arc<dyn Provider>),
        Settings { retry: retry_config(), concurrency: 1, policy: preserve(), house },
        accepted,
        requests,
        Arc::clone(metrics),
        watch::Sender::new(None),
        written(),
    );
    dispatcher.load();
    let stop = CancellationToken::new();
    let states = || -> Vec<(QueueState, Progress)> {
        let messages = spool.messages.lock().unwrap();
        messages.values().map(|(stored, state)| (*state, stored.progress.clone())).collect()
    };
    let play = async {
        tokio::time::sleep(Duration::from_secs(60)).await;
        let full = states();
        spool.full.store(false, std::sync::atomic::Ordering::SeqCst);
        tokio::time::sleep(Duration::from_secs(60)).await;
        stop.cancel();
        [full, states()]
    };
    tokio::join!(play, dispatcher.run(stop.clone(), Duration::from_secs(1))).0
}

/// On a full disk deliveries are what makes room, so none may wait for room itself; and no failure may go untold.
#[tokio::test(start_paused = true)]
async fn a_report_that_has_no_room_keeps_its_message_queued_and_no_other_waits_for_it() {
    let (spool, metrics) = (Arc::new(Memory::default()), Arc::new(Metrics::new()));
    let [full, after] = on_a_full_disk(&spool, &metrics, Play::Never, 5).await;
    assert_eq!(full.len(), 5);
    for (state, progress) in full {
        assert_eq!((state, &progress.untold[..]), (QueueState::Queued, &[0, 1][..]));
        assert_eq!(statuses(&progress), "xx", "each was tried, once");
    }
    let failed = metrics.recipients.with_label_values(&["failed"]).get();
    assert_eq!((failed, after.len()), (10, 5));
    for (state, progress) in after {
        assert_eq!((state, &progress.untold[..]), (QueueState::Failed, &[][..]));
    }
    assert_eq!(metrics.reports.with_label_values(&["failure"]).get(), 5);
}

#[tokio::test(start_paused = true)]
async fn what_is_held_stays_held_though_its_report_has_no_room() {
    let (spool, metrics) = (Arc::new(Memory::default()), Arc::new(Metrics::new()));
    let states = on_a_full_disk(&spool, &metrics, Play::Each("nh"), 1).await;
    for found in states {
        let [(state, progress)] = &found[..] else { panic!("{found:?}") };
        assert_eq!((*state, &progress.untold[..]), (QueueState::Held, &[0][..]));
        assert_eq!(statuses(progress), "x?");
    }
}
