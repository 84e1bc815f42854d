//! An account that refuses everything for days.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::smtp::reply::Reply;

/// Refuses whatever comes until somebody mends the account.
pub(super) struct Account {
    refuse: Box<dyn Fn(&Submission) -> Outcome + Send + Sync>,
    mended: AtomicBool,
    tries: AtomicUsize,
    /// What was taken: kind, id, and the content.
    taken: Mutex<Vec<(Kind, SpoolId, String)>>,
}

impl Account {
    pub(super) fn new(
        refuse: impl Fn(&Submission) -> Outcome + Send + Sync + 'static,
    ) -> Arc<Self> {
        let (mended, tries, taken) = Default::default();
        Arc::new(Self { refuse: Box::new(refuse), mended, tries, taken })
    }

    /// By the table of verdicts.
    fn refusing(
        stage: crate::outcome::Stage,
        (code, status, text): (u16, (u8, u16, u16), &'static str),
    ) -> Arc<Self> {
        Self::new(move |submission| {
            let case = crate::outcome::Case {
                null_reverse_path: submission.reverse_path == ReversePath::Null,
                from_is_lane: false,
                reverse_path_is_lane: false,
            };
            crate::outcome::verdict(stage, &Reply::new(code, status, text), case)
        })
    }

    fn mend(&self) {
        self.mended.store(true, SeqCst);
    }

    pub(super) fn tries(&self) -> usize {
        self.tries.load(SeqCst)
    }
}

impl Provider for Account {
    fn limits(&self) -> Limits {
        Limits { recipients: 100 }
    }

    fn deliver<'a>(
        &'a self,
        submission: &'a Submission,
        outcomes: &'a Outcomes,
    ) -> BoxFuture<'a, ()> {
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
                    false => (self.refuse)(submission),
                };
                outcomes.settle(*rcpt, outcome);
            }
        })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

/// Accepts a message now, from an application or, as `<>`, a report of someone else's.
async fn accept(
    spool: &Memory,
    accepted: &mpsc::UnboundedSender<SpoolId>,
    reverse_path: ReversePath,
) -> SpoolId {
    let now = clock::wall();
    let id = SpoolId::new(now);
    let envelope = Envelope { id, accepted: now, reverse_path, ..envelope() };
    let put = Op::Put { envelope, body: Staged::Memory(b"hi".to_vec()) };
    spool.apply(vec![put], Durability::Durable).await.unwrap();
    accepted.send(id).unwrap();
    id
}

fn app() -> ReversePath {
    ReversePath::Mailbox(Mailbox::parse("app@example.com", Charset::Ascii).unwrap())
}

/// What a play came to.
#[derive(Debug)]
struct Told {
    /// Submissions until the account was mended.
    tries: usize,
    /// How often the provider was closed or opened until then.
    changes: usize,
    failed: u64,
    /// Whether it was open in the end, and everything taken once.
    open: bool,
    once: bool,
}

/// An account that refuses everything for some days, with a message `every` so often, `null` of four of them with a
/// null reverse path; then it is mended. There is no postmaster.
async fn refused_for(provider: &Arc<Account>, days: u32, every: Duration, null: usize) -> Told {
    let spool = Arc::new(Memory::default());
    let (accepted_is, accepted) = mpsc::unbounded_channel();
    let give_up_after = DAY * 5;
    let retry = Retry {
        first: Duration::from_secs(60),
        factor: 2.0,
        max: HOUR,
        give_up_after,
        ..retry_config()
    };
    let (_operator, requests) = operator::channel();
    let trouble = watch::Sender::new(None);
    let mut watching = trouble.subscribe();
    let metrics = Arc::new(Metrics::new());
    let dispatcher = Dispatcher::new(
        Arc::clone(&spool),
        Some(Arc::clone(provider) as Arc<dyn Provider>),
        Settings { retry, concurrency: 4, policy: preserve(), house: house() },
        accepted,
        requests,
        Arc::clone(&metrics),
        trouble,
        written(),
    );
    let stop = CancellationToken::new();
    let changes = AtomicUsize::new(0);
    let watch = async {
        while watching.changed().await.is_ok() {
            changes.fetch_add(1, SeqCst);
        }
    };
    let play = async {
        let mut all = Vec::new();
        let began = clock::now();
        for n in 0.. {
            if clock::now() - began >= DAY * days {
                break;
            }
            let reverse_path = if n % 4 < null { ReversePath::Null } else { app() };
            all.push(accept(&spool, &accepted_is, reverse_path).await);
            tokio::time::sleep(every).await;
        }
        let (tries, changes) = (provider.tries(), changes.load(SeqCst));
        provider.mend();
        let began = clock::now();
        while !spool.heads(None, 1).is_empty() && clock::now() - began < DAY {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        stop.cancel();
        let mut taken: Vec<_> =
            provider.taken.lock().unwrap().iter().map(|(_, id, _)| *id).collect();
        taken.sort();
        all.sort();
        let failed = metrics.recipients.with_label_values(&["failed"]).get();
        let open = metrics.provider_open.get() == 1;
        Told { tries, changes, failed, open, once: taken == all }
    };
    let run = dispatcher.run(stop.clone(), Duration::from_secs(1));
    tokio::join!(play, run, watch).0
}

/// What speaks of the account comes at any stage; it cost a submission each second for ever.
#[tokio::test(start_paused = true)]
async fn an_account_that_is_blocked_or_used_up_is_asked_ever_more_rarely() {
    use crate::outcome::Stage::{EndOfData, Mail};
    let blocked = (550, (5, 7, 708), "Service unavailable. Access denied, traffic not accepted");
    let used_up = (550, (5, 4, 5), "Daily user sending limit exceeded");
    // Every 5 minutes; every hour.
    for (refusal, most) in [(blocked, 2 * 24 * 12 + 60), (used_up, 2 * 24 + 12)] {
        for stage in [Mail, EndOfData] {
            let provider = Account::refusing(stage, refusal);
            let told = refused_for(&provider, 2, HOUR, 0).await;
            assert!(told.tries < most, "{stage:?} {refusal:?}: {told:?}");
            assert_eq!((told.changes, told.failed), (1, 0), "{stage:?} {refusal:?}: {told:?}");
            assert!(told.open && told.once, "{stage:?} {refusal:?}: {told:?}");
        }
    }
}

/// The same over null reverse paths: it was taken for an answer, which opened the gate and gave the messages up.
#[tokio::test(start_paused = true)]
async fn what_a_blocked_account_says_to_a_null_reverse_path_is_no_answer() {
    let refusal = (550, (5, 1, 8), "Access denied, bad outbound sender");
    for (null, changes) in [(4, 0), (2, 1)] {
        let provider = Account::refusing(crate::outcome::Stage::EndOfData, refusal);
        let told = refused_for(&provider, 6, HOUR * 6, null).await;
        assert_eq!((told.changes, told.failed), (changes, 0), "{null} of 4: {told:?}");
        assert!(told.open && told.once, "{null} of 4: {told:?}");
        // Each message once an hour, for half of the time at the mean, and a little more at first; and the probes.
        let most = 24 * (144 / 2 + 10) + 6 * 24 * 12;
        assert!(told.tries < most, "{null} of 4: {told:?}");
    }
}

/// One probe was all there was to send, and two were waited for.
#[tokio::test(start_paused = true)]
async fn the_last_message_that_waits_opens_the_gate_alone() {
    let spool = Arc::new(Memory::default());
    let refusal = (535, (5, 7, 8), "bad password");
    let provider = Account::refusing(crate::outcome::Stage::Auth, refusal);
    let (accepted_is, accepted) = mpsc::unbounded_channel();
    let (_operator, requests) = operator::channel();
    let metrics = Arc::new(Metrics::new());
    let dispatcher = Dispatcher::new(
        Arc::clone(&spool),
        Some(Arc::clone(&provider) as Arc<dyn Provider>),
        Settings { retry: retry_config(), concurrency: 4, policy: preserve(), house: house() },
        accepted,
        requests,
        Arc::clone(&metrics),
        watch::Sender::new(None),
        written(),
    );
    let stop = CancellationToken::new();
    let play = async {
        accept(&spool, &accepted_is, app()).await;
        tokio::time::sleep(HOUR).await;
        assert_eq!(metrics.provider_open.get(), 0);
        provider.mend();
        tokio::time::sleep(HOUR).await;
        assert!(spool.heads(None, 1).is_empty());
        assert_eq!(metrics.provider_open.get(), 1);
        stop.cancel();
    };
    tokio::join!(play, dispatcher.run(stop.clone(), Duration::from_secs(1)));
}
