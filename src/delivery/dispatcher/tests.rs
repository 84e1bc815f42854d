mod days;
mod synced;

use std::collections::VecDeque;

use bytes::Bytes;
use tempfile::TempDir;

use super::*;
use crate::config;
use crate::envelope::{Client, Envelope, Kind, Priority, Rcpt};
use crate::outcome::Receipt;
use crate::policy::Names;
use crate::provider::Limits;
use crate::smtp::address::{Charset, ForwardPath, Mailbox, ReversePath};
use crate::smtp::params::Notify;
use crate::spool::Staged;
use crate::spool::log::Log;
use crate::telemetry::written;

/// Longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(10);
const FIRST: Duration = Duration::from_millis(200);

/// What the provider does with a part.
#[derive(Clone, Copy, Debug)]
enum Play {
    Take,
    /// Refused for now.
    Later,
    /// Nothing could be connected to.
    Trouble,
    /// The answer to the final dot was lost.
    Lose,
    Panic,
    /// No answer, ever.
    Hang,
    /// No connection, ever.
    Connect,
    /// One letter for each recipient of the message: `d`elivered, `l`ater, `?` for an answer that was lost, `h`eld for
    /// this message alone, the provider in `t`rouble or `b`usy.
    Each(&'static str),
    /// Refused for good before any content left.
    Never,
    /// Before content leaves an operator holds the message, of which he had read that it was never tried.
    Hold,
}

impl Play {
    /// What becomes of the recipient.
    fn outcome(self, rcpt: usize) -> Outcome {
        let letter = match self {
            Self::Take | Self::Hold => 'd',
            Self::Later => 'l',
            Self::Trouble => 't',
            Self::Lose => '?',
            Self::Never => 'n',
            Self::Each(letters) => letters.chars().nth(rcpt).unwrap(),
            Self::Panic | Self::Hang | Self::Connect => panic!("{self:?} comes to no end"),
        };
        match letter {
            'd' => Outcome::Delivered(Receipt::new("250 ok")),
            'l' => Outcome::Deferred(Cause::new(Scope::Recipient, Stage::EndOfData, "450")),
            'n' => Outcome::Failed(Cause::new(Scope::Recipient, Stage::Rcpt, "550 no")),
            'h' => Outcome::Held(Cause::new(Scope::Message, Stage::EndOfData, "550 5.7.60")),
            't' => Outcome::Deferred(Cause::new(Scope::Provider, Stage::Connect, "refused")),
            'b' => {
                let cause =
                    Cause::new(Scope::Sender, Stage::Mail, "432 4.3.2 too many connections");
                let pause = Some(Duration::from_secs(60));
                Outcome::Held(Cause { busy: true, retry_after: pause, ..cause })
            }
            '?' => {
                let cause = Cause::new(Scope::Message, Stage::EndOfData, "lost");
                Outcome::Deferred(Cause { lost: true, maybe_sent: true, ..cause })
            }
            other => panic!("no outcome is called {other}"),
        }
    }
}

/// A part that the provider was handed.
#[derive(Debug)]
struct Call {
    at: Instant,
    id: SpoolId,
    part: Vec<usize>,
    /// What the mark on disk said at that time.
    sending: Vec<u32>,
    attempts: u16,
}

/// Takes what its script does not speak of.
struct Fake {
    spool: Arc<Log>,
    script: Mutex<VecDeque<Play>>,
    calls: Mutex<Vec<Call>>,
    recipients: usize,
}

impl Provider for Fake {
    fn limits(&self) -> Limits {
        Limits { recipients: self.recipients }
    }

    fn deliver<'a>(
        &'a self,
        submission: &'a Submission,
        outcomes: &'a Outcomes,
    ) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let (at, id) = (clock::now(), submission.envelope.id);
            let play = self.script.lock().unwrap().pop_front().unwrap_or(Play::Take);
            if let Play::Connect = play {
                self.calls.lock().unwrap().push(Call {
                    at,
                    id,
                    part: submission.part.clone(),
                    sending: Vec::new(),
                    attempts: 0,
                });
                return std::future::pending().await;
            }
            if let Play::Hold = play {
                let progress = Progress::new(submission.envelope.accepted, 2);
                self.spool.apply(vec![Op::Hold { id, progress }], Durability::Lazy).await.unwrap();
            }
            if !matches!(play, Play::Trouble | Play::Never) {
                outcomes.content_leaves().await;
            }
            let progress = self.spool.open(id).await.unwrap().progress;
            let (part, sending) = (submission.part.clone(), progress.sending);
            let call = Call { at, id, part, sending, attempts: progress.attempts };
            self.calls.lock().unwrap().push(call);
            if let Play::Panic = play {
                panic!("the provider of the test panics on demand");
            }
            if let Play::Hang = play {
                return std::future::pending().await;
            }
            for rcpt in &submission.part {
                outcomes.settle(*rcpt, play.outcome(*rcpt));
            }
        })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

/// A spool with one message for two recipients, and its engine.
struct Stand {
    folder: TempDir,
    spool: Arc<Log>,
    metrics: Arc<Metrics>,
    log: Written,
    concurrency: usize,
    retry: Retry,
    house: House,
}

const ID: SpoolId = SpoolId::from_u128(1);

fn envelope() -> Envelope {
    let rcpt = |path| Rcpt {
        path: ForwardPath::parse(path, Charset::Ascii).unwrap(),
        notify: Notify::Unsaid,
        orcpt: None,
    };
    Envelope {
        kind: Kind::Mail,
        id: ID,
        accepted: clock::wall(),
        reverse_path: ReversePath::Null,
        rcpts: vec![rcpt("a@example.com"), rcpt("b@example.com")],
        smtputf8: false,
        eight_bit: false,
        ret: None,
        envid: None,
        size: 2,
        client: Client { address: "unix".into(), helo: "app".into() },
        priority: Priority::Normal,
        author: None,
        prepend: Bytes::new(),
    }
}

impl Stand {
    async fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let spool = open(&folder).await;
        let put = Op::Put { envelope: envelope(), body: Staged::Memory(b"hi".to_vec()) };
        spool.apply(vec![put], Durability::Durable).await.unwrap();
        let (metrics, log) = (Arc::new(Metrics::new()), written());
        Self { folder, spool, metrics, log, concurrency: 2, retry: retry_config(), house: house() }
    }

    /// As a process that was killed leaves it: `sending` was on its way.
    async fn left(sending: &[u32]) -> Self {
        let stand = Self::new().await;
        stand.mark(sending).await;
        stand.restarted().await
    }

    async fn mark(&self, sending: &[u32]) {
        let mut progress = self.spool.open(ID).await.unwrap().progress;
        progress.sending = sending.to_vec();
        self.apply(Op::Attempt { id: ID, progress }).await;
    }

    async fn apply(&self, op: Op) {
        self.spool.apply(vec![op], Durability::Lazy).await.unwrap();
    }

    async fn restarted(self) -> Self {
        self.spool.close().await;
        let Self { folder, spool, metrics: _, log, concurrency, retry, house } = self;
        drop(spool);
        let spool = open(&folder).await;
        Self { folder, spool, metrics: Arc::new(Metrics::new()), log, concurrency, retry, house }
    }

    fn dispatcher(
        &self,
        provider: Option<Arc<dyn Provider>>,
        accepted: mpsc::UnboundedReceiver<SpoolId>,
        requests: Requests,
    ) -> Dispatcher<Log> {
        Dispatcher::new(
            Arc::clone(&self.spool),
            provider,
            Settings {
                retry: self.retry.clone(),
                concurrency: self.concurrency,
                policy: preserve(),
                house: self.house.clone(),
            },
            accepted,
            requests,
            Arc::clone(&self.metrics),
            watch::Sender::new(None),
            self.log.clone(),
        )
    }

    /// Runs the engine until `over` holds; what the provider was handed.
    async fn run(&self, script: &[Play], over: impl Fn(&Self, &[Call]) -> bool) -> Vec<Call> {
        self.run_parts(2, script, over).await
    }

    async fn run_parts(
        &self,
        recipients: usize,
        script: &[Play],
        over: impl Fn(&Self, &[Call]) -> bool,
    ) -> Vec<Call> {
        let script = Mutex::new(script.iter().copied().collect());
        let spool = Arc::clone(&self.spool);
        let fake = Arc::new(Fake { spool, script, calls: Mutex::default(), recipients });
        let (_accepted, accepted) = mpsc::unbounded_channel();
        let (_operator, requests) = operator::channel();
        let provider = Arc::clone(&fake) as Arc<dyn Provider>;
        let mut dispatcher = self.dispatcher(Some(provider), accepted, requests);
        dispatcher.load();
        let stop = CancellationToken::new();
        let until = async {
            while !over(self, &fake.calls.lock().unwrap()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            stop.cancel();
        };
        let both =
            async { tokio::join!(dispatcher.run(stop.clone(), Duration::from_millis(1)), until) };
        tokio::time::timeout(PATIENCE, both).await.expect("it did not come to be");
        fake.calls.lock().unwrap().drain(..).collect()
    }

    /// One attempt at the message, in parts of so many recipients: how it ended, and what the provider was handed.
    async fn attempt(&self, recipients: usize, script: &[Play]) -> (Ended, Vec<Call>) {
        let script = Mutex::new(script.iter().copied().collect());
        let spool = Arc::clone(&self.spool);
        let fake = Arc::new(Fake { spool, script, calls: Mutex::default(), recipients });
        let shared = Shared {
            spool: Arc::clone(&self.spool),
            provider: None,
            settings: Settings {
                retry: self.retry.clone(),
                concurrency: 1,
                policy: preserve(),
                house: self.house.clone(),
            },
            metrics: Arc::clone(&self.metrics),
            gate: Mutex::new(Gate::new()),
            desk: Mutex::new(Desk::load(|_| None, clock::now(), clock::wall())),
            trouble: watch::Sender::new(None),
            log: self.log.clone(),
        };
        let ended = attempt(Arc::new(shared), fake.clone(), ID, Pass::Free).await;
        let calls = fake.calls.lock().unwrap().drain(..).collect();
        (ended, calls)
    }

    async fn progress(&self) -> Progress {
        self.spool.open(ID).await.unwrap().progress
    }

    fn state(&self) -> Option<QueueState> {
        self.spool.heads(None, 1).first().map(|head| head.state)
    }

    /// Whether the message has left the spool.
    fn is_done(&self, _calls: &[Call]) -> bool {
        self.state().is_none()
    }

    fn in_doubt(&self) -> u64 {
        self.metrics.in_doubt.get()
    }
}

async fn open(folder: &TempDir) -> Arc<Log> {
    let config = config::Spool {
        path: folder.path().join("spool"),
        min_free: 0,
        keep_failed: Duration::from_secs(7 * 24 * 60 * 60),
    };
    Arc::new(Log::open(&config).await.unwrap().0)
}

fn preserve() -> Arc<Policy> {
    let section = config::Sender { policy: config::SenderPolicy::Preserve, allowed: Vec::new() };
    Arc::new(Policy::new(&section, None, None, Names::AsTheyAre))
}

/// Nobody can be told anything.
fn house() -> House {
    House {
        hostname: "relay.test".to_owned(),
        sender: None,
        server: None,
        bounce: config::Bounce {
            to: config::BounceTo::Sender,
            postmaster: None,
            delay_warning_after: Duration::from_secs(4 * 3600),
            max_per_hour: 100,
            full: false,
        },
        give_up_after: Duration::from_secs(5 * 86_400),
    }
}

fn retry_config() -> Retry {
    Retry {
        first: FIRST,
        factor: 1.0,
        max: FIRST,
        jitter: 0.0,
        give_up_after: Duration::from_secs(3600),
        in_doubt: InDoubt::Retry,
        in_doubt_after: Duration::ZERO,
    }
}

/// One letter for each recipient: `d`elivered, `x` for failed, `?` for pending.
fn statuses(progress: &Progress) -> String {
    let letter = |status: &RcptStatus| match status {
        RcptStatus::Pending { .. } => '?',
        RcptStatus::Delivered(_) => 'd',
        RcptStatus::Failed(_) => 'x',
    };
    progress.rcpts.iter().map(letter).collect()
}

fn parts(calls: &[Call]) -> Vec<&[usize]> {
    calls.iter().map(|call| call.part.as_slice()).collect()
}

#[tokio::test]
async fn what_a_former_run_was_sending_is_counted_and_sent_once_more_not_at_once() {
    let stand = Stand::left(&[1]).await;
    let began = clock::now();
    let calls = stand.run(&[], Stand::is_done).await;
    assert_eq!(parts(&calls), [[0, 1]]);
    assert!(calls[0].at >= began + FIRST && calls[0].attempts == 1);
    assert_eq!(stand.in_doubt(), 1, "one recipient was being sent to");
}

#[tokio::test]
async fn a_process_that_is_killed_before_its_log_has_the_doubt_leaves_the_mark() {
    let mut stand = Stand::left(&[0, 1]).await;
    let (log, lines) = Written::by();
    stand.log = log;
    // The kill: nothing is written any more.
    let began = Mutex::new(None);
    let killed = |_: &Stand, _: &[Call]| {
        let mut began = began.lock().unwrap();
        if let Some(tell) = lines.asked().pop() {
            *began = Some((clock::now(), tell));
        }
        began.as_ref().is_some_and(|(at, _)| clock::now() >= *at + Duration::from_millis(50))
    };
    stand.run(&[], killed).await;
    assert_eq!(stand.spool.open(ID).await.unwrap().progress.sending, [0, 1]);
    let mut stand = stand.restarted().await;
    assert!(stand.spool.heads(None, 1)[0].in_doubt);
    stand.log = written();
    let calls = stand.run(&[], Stand::is_done).await;
    assert_eq!(parts(&calls), [[0, 1]]);
    assert_eq!(stand.in_doubt(), 2, "told by the next start, as the first doubt");
}

#[tokio::test]
async fn a_doubt_about_one_part_is_told_before_the_mark_of_the_next_takes_its_place() {
    let mut stand = Stand::new().await;
    let (log, lines) = Written::by();
    stand.log = log;
    let told = Mutex::new(Vec::new());
    let over = |stand: &Stand, calls: &[Call]| {
        if let Some(tell) = lines.asked().pop() {
            told.lock().unwrap().push(calls.len());
            tell.send(()).unwrap();
        }
        stand.state() == Some(QueueState::Queued) && stand.spool.heads(None, 1)[0].attempts == 1
    };
    let calls = stand.run_parts(1, &[Play::Lose, Play::Take], over).await;
    assert_eq!(parts(&calls), [[0], [1]]);
    assert_eq!(told.lock().unwrap()[0], 1, "before the second part went out");
}

#[tokio::test]
async fn a_log_that_nobody_reads_holds_no_mail_up_for_long() {
    let mut stand = Stand::left(&[0, 1]).await;
    let (log, _lines) = Written::by();
    stand.log = log;
    let calls = stand.run(&[], Stand::is_done).await;
    assert_eq!(parts(&calls), [[0, 1]]);
}

#[tokio::test]
async fn a_message_that_was_not_being_sent_is_tried_at_once_after_a_start() {
    let stand = Stand::new().await.restarted().await;
    let calls = stand.run(&[], Stand::is_done).await;
    assert_eq!(parts(&calls), [[0, 1]]);
    assert_eq!((calls[0].attempts, stand.in_doubt()), (0, 0));
}

#[tokio::test]
async fn what_two_runs_were_sending_is_held() {
    let stand = Stand::left(&[0, 1]).await;
    stand.run(&[Play::Hang], |_, calls| !calls.is_empty()).await;
    assert_eq!(stand.in_doubt(), 2);
    let stand = stand.restarted().await;
    let calls = stand.run(&[], |stand, _| stand.state() == Some(QueueState::Held)).await;
    assert_eq!(calls.len(), 0, "not a third time");
    assert_eq!(stand.in_doubt(), 2);
    let progress = stand.spool.open(ID).await.unwrap().progress;
    assert_eq!((progress.pending().count(), progress.sending.len()), (2, 0));
}

#[tokio::test]
async fn a_run_that_ended_before_content_left_leaves_no_doubt() {
    let stand = Stand::new().await;
    stand.run(&[Play::Connect], |_, calls| !calls.is_empty()).await;
    let stand = stand.restarted().await;
    assert!(!stand.spool.heads(None, 1)[0].in_doubt);
    let calls = stand.run(&[], Stand::is_done).await;
    assert_eq!((parts(&calls), stand.in_doubt()), (vec![&[0, 1][..]], 0));
}

#[tokio::test]
async fn a_doubt_of_a_former_run_and_a_lost_answer_make_two() {
    let stand = Stand::left(&[0, 1]).await;
    let held = |stand: &Stand, _: &[Call]| stand.state() == Some(QueueState::Held);
    let calls = stand.run(&[Play::Lose], held).await;
    assert_eq!(parts(&calls), [[0, 1]]);
    assert_eq!(stand.in_doubt(), 4);
}

#[tokio::test]
async fn a_part_is_marked_while_it_is_sent_and_its_outcome_takes_the_mark_away() {
    let stand = Stand::new().await;
    let script = [Play::Take, Play::Later];
    let set_back = |stand: &Stand, _: &[Call]| {
        stand.spool.heads(None, 1).first().is_some_and(|head| head.attempts == 1)
    };
    let calls = stand.run_parts(1, &script, set_back).await;
    let marks: Vec<_> = calls.iter().map(|call| call.sending.as_slice()).collect();
    assert_eq!(marks, [[0], [1]]);
    let stand = stand.restarted().await;
    assert!(!stand.spool.heads(None, 1)[0].in_doubt);
    assert_eq!(stand.spool.open(ID).await.unwrap().progress.sending, [0; 0]);
    let calls = stand.run_parts(1, &[], Stand::is_done).await;
    assert_eq!(parts(&calls), [[1]]);
    assert_eq!(stand.in_doubt(), 0);
}

#[tokio::test]
async fn a_provider_in_trouble_leaves_no_mark_and_settles_no_doubt() {
    let stand = Stand::left(&[0, 1]).await;
    let met = |stand: &Stand, calls: &[Call]| {
        // It is put back when the outcome is on disk.
        calls.len() == 1 && stand.metrics.attempt_seconds.get_sample_count() == 1
    };
    let calls = stand.run(&[Play::Trouble], met).await;
    assert_eq!(calls[0].sending, [0; 0]);
    let stand = stand.restarted().await;
    assert!(!stand.spool.heads(None, 1)[0].in_doubt);
    let held = |stand: &Stand, _: &[Call]| stand.state() == Some(QueueState::Held);
    let calls = stand.run(&[Play::Lose], held).await;
    assert_eq!(parts(&calls), [[0, 1]], "in doubt for the second time");
}

#[tokio::test]
async fn a_message_that_was_held_meanwhile_is_not_sent() {
    let stand = Stand::new().await;
    let (ended, calls) = stand.attempt(2, &[Play::Hold]).await;
    assert!(matches!(ended, Ended::Held) && calls.is_empty());
    stand.apply(Op::Delete { id: ID }).await;
    let (ended, calls) = stand.attempt(2, &[]).await;
    assert!(matches!(ended, Ended::Done) && calls.is_empty());
}

#[tokio::test]
async fn a_message_that_is_held_is_not_offered_so_no_refusal_fails_it() {
    let stand = Stand::new().await;
    let progress = stand.progress().await;
    stand.apply(Op::Hold { id: ID, progress }).await;
    let (ended, calls) = stand.attempt(2, &[Play::Never]).await;
    assert!(matches!(ended, Ended::Held) && calls.is_empty(), "{calls:?}");
    assert_eq!(stand.state(), Some(QueueState::Held));
    let progress = stand.progress().await;
    stand.apply(Op::Release { id: ID, progress }).await;
    let (ended, calls) = stand.attempt(2, &[Play::Never]).await;
    assert!(matches!(ended, Ended::Done) && calls.len() == 1);
    assert_eq!(stand.state(), Some(QueueState::Failed));
}

#[tokio::test]
async fn what_became_of_a_part_outlives_a_hold_before_the_next() {
    // By an operator who knew of nothing. The doubt was in no record, or a later one took its place.
    for (first, kept, doubtful) in
        [("?-", "??", vec![0]), ("d-", "d?", vec![]), ("l-", "??", vec![])]
    {
        let stand = Stand::new().await;
        let (ended, calls) = stand.attempt(1, &[Play::Each(first), Play::Hold]).await;
        assert!(matches!(ended, Ended::Held));
        assert_eq!((parts(&calls), stand.state()), (vec![&[0][..]], Some(QueueState::Held)));
        let progress = stand.progress().await;
        assert_eq!((statuses(&progress), &progress.doubtful), (kept.to_owned(), &doubtful));
        assert_eq!(progress.sending, [0; 0]);
    }
}

#[tokio::test]
async fn a_doubt_before_a_hold_and_one_after_the_release_make_two() {
    let stand = Stand::new().await;
    stand.attempt(1, &[Play::Lose, Play::Hold]).await;
    let progress = stand.progress().await;
    stand.apply(Op::Release { id: ID, progress }).await;
    let (ended, calls) = stand.attempt(1, &[Play::Lose]).await;
    assert!(matches!(ended, Ended::Held));
    assert_eq!((parts(&calls), stand.state()), (vec![&[0][..]], Some(QueueState::Held)));
}

#[tokio::test]
async fn an_attempt_that_panicked_is_in_doubt_like_a_lost_answer() {
    let stand = Stand::new().await;
    let calls = stand.run(&[Play::Panic], Stand::is_done).await;
    assert_eq!(parts(&calls), [[0, 1], [0, 1]]);
    assert_eq!(stand.in_doubt(), 2);
}

#[tokio::test]
async fn two_messages_whose_answers_are_lost_are_sent_twice_at_most() {
    let stand = Stand::new().await;
    let other = Envelope { id: SpoolId::from_u128(2), ..envelope() };
    stand.apply(Op::Put { envelope: other, body: Staged::Memory(b"hi".to_vec()) }).await;
    let calls = stand
        .run(&[Play::Lose; 40], |stand, calls| {
            let all_held = stand.spool.heads(None, 9).iter().all(|h| h.state == QueueState::Held);
            all_held || calls.len() > 6
        })
        .await;
    let n = calls.len();
    let progress = stand.spool.open(ID).await.unwrap().progress;
    let other = stand.spool.open(SpoolId::from_u128(2)).await.unwrap().progress;
    assert!(n <= 4, "{n} copies of two messages; {progress:?} {other:?}");
}

#[tokio::test]
async fn what_is_in_doubt_waits_for_its_time_and_a_restart_makes_it_no_shorter() {
    let after = 3 * FIRST;
    let mut stand = Stand::new().await;
    stand.retry.in_doubt_after = after;
    let began = clock::now();
    // One recipient in doubt, the other deferred.
    let told = |stand: &Stand, _: &[Call]| stand.metrics.attempt_seconds.get_sample_count() == 1;
    stand.run(&[Play::Each("?l")], told).await;
    let stand = stand.restarted().await;
    let calls = stand.run(&[], Stand::is_done).await;
    assert_eq!(parts(&calls), [[0, 1]]);
    let waited = calls[0].at - began;
    assert!(waited >= after && waited < after + PATIENCE / 2, "{waited:?}");
}

#[tokio::test]
async fn trouble_at_another_part_makes_a_doubt_no_earlier() {
    let after = 3 * FIRST;
    let mut stand = Stand::new().await;
    stand.retry.in_doubt_after = after;
    let calls = stand.run_parts(1, &[Play::Lose, Play::Trouble], Stand::is_done).await;
    assert_eq!(parts(&calls), [[0], [1], [0], [1]]);
    let waited = calls[2].at - calls[0].at;
    assert!(waited >= after && waited < after + PATIENCE / 2, "{waited:?}");
}

#[tokio::test]
async fn with_hold_a_doubt_is_held_at_once() {
    let mut stand = Stand::new().await;
    stand.retry.in_doubt = InDoubt::Hold;
    let (ended, calls) = stand.attempt(2, &[Play::Each("d?")]).await;
    assert!(matches!(ended, Ended::Held));
    assert_eq!((parts(&calls), stand.state()), (vec![&[0, 1][..]], Some(QueueState::Held)));
    let progress = stand.progress().await;
    assert_eq!((statuses(&progress).as_str(), progress.doubtful), ("d?", vec![1]));
    assert_eq!(stand.in_doubt(), 1);
}

#[tokio::test]
async fn with_hold_what_a_former_run_was_sending_is_held_and_nothing_is_sent() {
    let mut stand = Stand::left(&[1]).await;
    stand.retry.in_doubt = InDoubt::Hold;
    let calls = stand.run(&[], |stand, _| stand.state() == Some(QueueState::Held)).await;
    assert_eq!((calls.len(), stand.in_doubt()), (0, 1));
    let progress = stand.progress().await;
    assert_eq!((progress.doubtful, progress.sending), (vec![1], vec![]));
}

#[tokio::test]
async fn a_450_settles_no_doubt() {
    let stand = Stand::new().await;
    let script = [Play::Lose, Play::Later, Play::Lose, Play::Later, Play::Lose];
    let over = |stand: &Stand, _: &[Call]| matches!(stand.state(), None | Some(QueueState::Held));
    let calls = stand.run(&script, over).await;
    assert_eq!((stand.state(), calls.len()), (Some(QueueState::Held), 3));
}

#[tokio::test]
async fn trouble_at_another_part_settles_no_doubt() {
    let stand = Stand::left(&[0, 1]).await;
    let script = [Play::Take, Play::Trouble, Play::Lose];
    let over = |stand: &Stand, _: &[Call]| matches!(stand.state(), None | Some(QueueState::Held));
    // Only what one attempt marks is in doubt: both here.
    let calls = stand.run_parts(1, &script, over).await;
    assert_eq!(
        (stand.state(), parts(&calls)),
        (Some(QueueState::Held), vec![&[0][..], &[1], &[1]])
    );
}

#[tokio::test]
async fn a_doubt_is_sent_once_more_however_old() {
    let stand = Stand::new().await;
    let mut progress = stand.spool.open(ID).await.unwrap().progress;
    progress.sending = vec![0, 1];
    progress.first_deferral = Some(UnixMillis(clock::wall().0 - 4_000_000));
    stand.apply(Op::Attempt { id: ID, progress }).await;
    let stand = stand.restarted().await;
    let over = |stand: &Stand, _: &[Call]| matches!(stand.state(), None | Some(QueueState::Failed));
    let calls = stand.run(&[], over).await;
    assert_eq!((stand.state(), calls.len()), (None, 1));
}

/// Waits that fill `give_up_after`, and one that does not.
const MANY: u16 = 18_000;
const ONE: u16 = 1;
const DAY: u64 = 24 * 60 * 60 * 1000;

#[tokio::test]
async fn only_those_that_were_deferred_once_more_are_given_up() {
    use QueueState::{Failed, Held, Queued};
    let whole = |letters| vec![Play::Each(letters)];
    let one_by_one = |letters| vec![Play::Each(letters); 2];
    // Recipients of a part, those in doubt before, what the provider says; what follows.
    let cases = [
        (2, &[][..], whole("ll"), Failed, "xx", "both are old enough"),
        (2, &[], whole("ld"), Failed, "xd", "one is delivered"),
        (2, &[], whole("l?"), Queued, "x?", "a first doubt is sent once more"),
        (2, &[], whole("??"), Queued, "??", "two first doubts"),
        (2, &[1], whole("l?"), Held, "??", "a second doubt holds the message"),
        (2, &[1], whole("ll"), Failed, "xx", "its one more try was refused"),
        (2, &[], whole("lh"), Held, "??", "a message that needs a person"),
        (1, &[], one_by_one("hl"), Held, "??", "the other was not tried"),
        (1, &[], one_by_one("lh"), Held, "??", "one held after the other was deferred"),
        (1, &[0], one_by_one("?l"), Held, "??", "not tried after a second doubt"),
        (1, &[], one_by_one("?l"), Queued, "?x", "a doubt in an earlier part"),
        (1, &[], one_by_one("lt"), Queued, "??", "trouble of the provider counts for nothing"),
        (1, &[], one_by_one("ll"), Failed, "xx", "both parts are tried"),
    ];
    for (recipients, doubtful, plays, state, after, what) in cases {
        let stand = Stand::new().await;
        let mut progress = stand.progress().await;
        progress.attempts = MANY;
        progress.first_deferral = Some(UnixMillis(clock::wall().0 - DAY));
        progress.doubtful = doubtful.to_vec();
        stand.apply(Op::Update { id: ID, progress }).await;
        stand.attempt(recipients, &plays).await;
        assert_eq!(stand.state(), Some(state), "{what}");
        assert_eq!(statuses(&stand.progress().await), after, "{what}");
    }
}

#[tokio::test]
async fn a_clock_that_was_a_day_off_when_it_was_stored_gives_nothing_up() {
    let wall = clock::wall().0;
    // A clock that steps forward makes the first deferral old, one that steps back puts it into the future.
    for (first, attempts) in [(wall - DAY, ONE), (wall - 10 * DAY, ONE), (wall + DAY, MANY)] {
        let stand = Stand::new().await;
        let mut progress = stand.progress().await;
        (progress.first_deferral, progress.attempts) = (Some(UnixMillis(first)), attempts);
        stand.apply(Op::Update { id: ID, progress }).await;
        let (ended, _) = stand.attempt(2, &[Play::Later]).await;
        assert!(matches!(ended, Ended::Again(_)), "{first} of {wall}");
        let progress = stand.progress().await;
        assert_eq!((statuses(&progress).as_str(), progress.attempts), ("??", attempts + 1));
        assert!(progress.first_deferral.unwrap() <= clock::wall(), "the span begins anew");
    }
}

#[tokio::test]
async fn a_due_that_lies_a_day_ahead_after_a_start_is_tried_within_retry_max() {
    let stand = Stand::new().await;
    let mut progress = stand.progress().await;
    (progress.due, progress.attempts) = (UnixMillis(clock::wall().0 + DAY), ONE);
    stand.apply(Op::Update { id: ID, progress }).await;
    let stand = stand.restarted().await;
    let began = clock::now();
    let calls = stand.run(&[], Stand::is_done).await;
    assert_eq!(parts(&calls), [[0, 1]]);
    let waited = calls[0].at - began;
    assert!(waited >= FIRST && waited < FIRST + PATIENCE / 2, "{waited:?}");
}

#[tokio::test]
async fn mail_of_a_day_before_and_a_day_after_is_all_delivered_in_its_order() {
    let wall = clock::wall().0;
    let mut stand = Stand::new().await;
    stand.apply(Op::Delete { id: ID }).await;
    stand.concurrency = 1;
    let mut ids = Vec::new();
    for at in [wall + DAY, wall - DAY, wall, wall + 10 * DAY] {
        for (due, attempts) in [(at, 0), (at, ONE)] {
            let id = SpoolId::new(UnixMillis(at));
            let envelope = Envelope { id, accepted: UnixMillis(at), ..envelope() };
            stand.apply(Op::Put { envelope, body: Staged::Memory(b"hi".to_vec()) }).await;
            if attempts > 0 {
                let mut progress = Progress::new(UnixMillis(due), 2);
                progress.attempts = attempts;
                progress.first_deferral = Some(UnixMillis(at));
                stand.apply(Op::Update { id, progress }).await;
            }
            ids.push((at > wall, attempts, id));
        }
    }
    let stand = stand.restarted().await;
    // The first of those that are due is deferred: it comes again with those whose due lies ahead.
    let script = [Play::Later];
    let calls = stand.run(&script, Stand::is_done).await;
    assert_eq!(calls.len(), ids.len() + 1, "each once, and one twice: nothing is given up");
    // What was never tried comes before what was.
    ids.sort();
    let first: Vec<_> = ids.iter().filter(|(ahead, ..)| !ahead).map(|(.., id)| *id).collect();
    let called: Vec<_> = calls.iter().map(|call| call.id).collect();
    assert_eq!(called[..first.len()], first);
    let ahead: Vec<_> = ids.iter().filter(|(ahead, ..)| *ahead).map(|(.., id)| *id).collect();
    let then = called[first.len()..].iter().copied().filter(|id| *id != first[0]);
    assert_eq!(then.collect::<Vec<_>>(), ahead);
}

/// Four of them are due at once, and the new message a moment later.
#[tokio::test]
async fn retries_that_hang_leave_a_place_to_new_mail() {
    let mut stand = Stand::new().await;
    stand.concurrency = 4;
    for n in 2..6 {
        let (id, mut progress) = (SpoolId::from_u128(n), Progress::new(UnixMillis(0), 2));
        let envelope = Envelope { id, ..envelope() };
        stand.apply(Op::Put { envelope, body: Staged::Memory(b"hi".to_vec()) }).await;
        progress.attempts = ONE;
        stand.apply(Op::Update { id, progress }).await;
    }
    let progress = Progress::new(UnixMillis(clock::wall().0 + DAY), 2);
    stand.apply(Op::Update { id: ID, progress }).await;
    let stand = stand.restarted().await;
    let is_taken = |stand: &Stand, _: &[Call]| stand.spool.head(ID).is_none();
    let calls = stand.run(&[Play::Hang, Play::Hang, Play::Hang], is_taken).await;
    // Those that begin at once reach the provider in any order.
    let mut called: Vec<u128> = calls.iter().map(|call| call.id.as_u128()).collect();
    called.sort_unstable();
    assert_eq!(called, [1, 2, 3, 4]);
}

#[tokio::test]
async fn a_message_that_is_damaged_when_it_is_read_is_counted_and_stops_no_other() {
    let stand = Stand::new().await;
    let other = Envelope { id: SpoolId::from_u128(2), ..envelope() };
    stand.apply(Op::Put { envelope: other, body: Staged::Memory(b"hi".to_vec()) }).await;
    // What memory has of it goes.
    drop(stand.spool.open(ID).await.unwrap());
    let log = stand.folder.path().join("spool/log");
    for entry in std::fs::read_dir(log).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        // The first message's is the first record.
        if let Some(at) = bytes.windows(13).position(|part| part == b"b@example.com") {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            std::fs::write(&path, changed).unwrap();
        }
    }
    let left = |stand: &Stand, _: &[Call]| stand.spool.heads(None, 9).len() == 1;
    let calls = stand.run(&[], left).await;
    assert_eq!(calls.iter().map(|call| call.id.as_u128()).collect::<Vec<_>>(), [2]);
    assert_eq!(stand.metrics.spool_damaged.get(), 1);
    assert_eq!(stand.spool.heads(None, 9)[0].id, ID);
}

/// Runs the engine while an operator asks.
async fn run_asked<T>(
    stand: &Stand,
    provider: Option<Arc<dyn Provider>>,
    ask: impl AsyncFnOnce(operator::Operator) -> T,
) -> T {
    let (_accepted, accepted) = mpsc::unbounded_channel();
    let (operator, requests) = operator::channel();
    let mut dispatcher = stand.dispatcher(provider, accepted, requests);
    dispatcher.load();
    let stop = CancellationToken::new();
    let asked = async {
        let answer = ask(operator).await;
        stop.cancel();
        answer
    };
    let both = async { tokio::join!(dispatcher.run(stop.clone(), PATIENCE), asked) };
    tokio::time::timeout(PATIENCE, both).await.expect("it did not come to be").1
}

/// What a verb comes to while nobody provides, so that nothing is tried.
async fn changed(stand: &Stand, verb: operator::Verb) -> Answer {
    let done = run_asked(stand, None, async |operator| operator.change(verb, vec![ID, ID]).await);
    let mut done = done.await.unwrap();
    assert_eq!(done.len(), 1, "a message that is named twice is changed once");
    done.remove(0).1
}

/// `delete` of what had failed took what had been queued again meanwhile.
#[tokio::test]
async fn a_verb_leaves_alone_what_changed_since_its_filter_looked() {
    use operator::Doubts;
    use operator::Verb::{Delete, Retry};
    let stand = Stand::new().await;
    let mut progress = stand.progress().await;
    progress.rcpts[0] = RcptStatus::Failed(Cause::new(Scope::Recipient, Stage::Rcpt, "550 no"));
    stand.apply(Op::Fail { id: ID, progress }).await;
    let failed = stand.spool.head(ID).unwrap();
    let ask = async |operator: operator::Operator| {
        let retried = operator.change_found(Retry, vec![failed], Doubts::Spare).await.unwrap();
        (retried, operator.change_found(Delete, vec![failed], Doubts::Spare).await.unwrap())
    };
    let (retried, deleted) = run_asked(&stand, None, ask).await;
    assert_eq!(retried, [(ID, Answer::Done)]);
    assert!(matches!(deleted[..], [(ID, Answer::Busy(_))]), "{deleted:?}");
    assert_eq!(stand.state(), Some(QueueState::Queued));
    let queued = stand.spool.head(ID).unwrap();
    let delete = async |operator: operator::Operator| {
        operator.change_found(Delete, vec![queued], Doubts::Spare).await
    };
    assert_eq!(run_asked(&stand, None, delete).await.unwrap(), [(ID, Answer::Done)]);
}

/// It was in the queue on disk, and nobody tried it before the next start.
#[tokio::test]
async fn what_a_verb_that_panicked_has_queued_is_in_the_schedule() {
    let stand = Stand::new().await;
    let progress = stand.progress().await;
    stand.apply(Op::Hold { id: ID, progress: progress.clone() }).await;
    let (_accepted, accepted) = mpsc::unbounded_channel();
    let mut dispatcher = stand.dispatcher(None, accepted, operator::channel().1);
    dispatcher.load();
    let (reply, answer) = oneshot::channel();
    dispatcher.changing = vec![(ID, Place::Held)];
    dispatcher.answering = Some(Answering { reply, answers: Vec::new() });
    stand.apply(Op::Release { id: ID, progress }).await;
    dispatcher.changed(None);
    assert!(matches!(answer.await.unwrap()[..], [(ID, Answer::Error(_))]));
    assert_eq!((dispatcher.schedule.len(), dispatcher.held), (1, 0));
}

#[tokio::test]
async fn what_is_in_doubt_is_counted_and_a_restart_knows_it() {
    let stand = Stand::new().await;
    let mut progress = stand.progress().await;
    progress.doubtful = vec![1];
    stand.apply(Op::Hold { id: ID, progress }).await;
    assert_eq!(stand.spool.health().in_doubt, 1);
    let stand = stand.restarted().await;
    assert_eq!(stand.spool.health().in_doubt, 1);
    stand.apply(Op::Delete { id: ID }).await;
    assert_eq!(stand.spool.health().in_doubt, 0);
    assert_eq!(Stand::left(&[0]).await.spool.health().in_doubt, 1);
}

/// `retry --all` sent what nobody had looked at: it may have been taken.
#[tokio::test]
async fn what_may_have_been_taken_is_not_sent_by_a_filter_that_does_not_mean_it() {
    use operator::Doubts::{Spare, Take};
    use operator::Verb::{Hold, Release, Retry};
    let stand = Stand::new().await;
    let mut progress = stand.progress().await;
    progress.doubtful = vec![1];
    stand.apply(Op::Hold { id: ID, progress }).await;
    let found = async |verb, doubts| {
        let head = stand.spool.head(ID).unwrap();
        let ask = async |operator: operator::Operator| {
            operator.change_found(verb, vec![head], doubts).await
        };
        run_asked(&stand, None, ask).await.unwrap().remove(0).1
    };
    for verb in [Retry, Release] {
        assert_eq!(found(verb, Spare).await, Answer::InDoubt);
        assert_eq!(stand.state(), Some(QueueState::Held));
    }
    assert_eq!(found(Release, Take).await, Answer::Done);
    assert_eq!(stand.state(), Some(QueueState::Queued));
    assert_eq!(found(Hold, Spare).await, Answer::Done, "nothing is sent by it");
    assert_eq!(changed(&stand, Retry).await, Answer::Done, "by its id");
}

#[tokio::test]
async fn an_operator_finds_a_message_where_it_is_and_it_is_counted_there() {
    use operator::Verb::{Delete, Hold, Release, Retry};
    let stand = Stand::new().await;
    let gauge = |state| stand.metrics.queue.with_label_values(&[state]).get();
    let counts = || (stand.state(), gauge("queued"), gauge("held"));
    let (queued, held) = (Some(QueueState::Queued), Some(QueueState::Held));
    for (verb, answer, expected) in [
        (Release, Answer::NotNow("it is not held"), (queued, 1, 0)),
        (Retry, Answer::Done, (queued, 1, 0)),
        (Hold, Answer::Done, (held, 0, 1)),
        (Hold, Answer::NotNow("it is held already"), (held, 0, 1)),
        (Release, Answer::Done, (queued, 1, 0)),
        (Hold, Answer::Done, (held, 0, 1)),
        (Retry, Answer::Done, (queued, 1, 0)),
        (Hold, Answer::Done, (held, 0, 1)),
        (Delete, Answer::Done, (None, 0, 0)),
        (Retry, Answer::NotFound, (None, 0, 0)),
    ] {
        assert_eq!(changed(&stand, verb).await, answer, "{verb:?}");
        assert_eq!(counts(), expected, "{verb:?}");
    }
}

#[tokio::test]
async fn a_hold_of_what_an_attempt_left_open_keeps_its_doubt() {
    let stand = Stand::new().await;
    stand.mark(&[1]).await;
    assert_eq!(changed(&stand, operator::Verb::Hold).await, Answer::Done);
    let progress = stand.progress().await;
    assert_eq!((&progress.doubtful[..], &progress.sending[..]), (&[1][..], &[][..]));
    assert_eq!((stand.state(), stand.in_doubt()), (Some(QueueState::Held), 1));
    assert_eq!(changed(&stand, operator::Verb::Release).await, Answer::Done);
    assert_eq!(stand.progress().await.doubtful, [1], "whoever lets it go knows, and so do we");
}

#[tokio::test]
async fn a_retry_of_what_an_attempt_left_open_leaves_the_doubt_to_the_attempt() {
    let stand = Stand::new().await;
    stand.mark(&[1]).await;
    assert_eq!(changed(&stand, operator::Verb::Retry).await, Answer::Done);
    assert_eq!(stand.progress().await.sending, [1]);
    assert_eq!((stand.state(), stand.in_doubt()), (Some(QueueState::Queued), 0));
}

#[tokio::test]
async fn what_came_this_moment_is_not_changed_before_the_schedule_has_it() {
    let stand = Stand::new().await;
    let other = SpoolId::from_u128(2);
    let answer = run_asked(&stand, None, async |operator| {
        // In the spool, and its id not yet on its way.
        let put = Envelope { id: other, ..envelope() };
        stand.apply(Op::Put { envelope: put, body: Staged::Memory(b"hi".to_vec()) }).await;
        operator.change(operator::Verb::Hold, vec![other]).await.unwrap().remove(0).1
    });
    assert!(matches!(answer.await, Answer::Busy(why) if why.contains("accepted this moment")));
    assert_eq!(stand.spool.head(other).unwrap().state, QueueState::Queued);
}

#[tokio::test]
async fn a_message_that_cannot_be_read_is_held_for_the_operator_who_may_delete_it() {
    let stand = Stand::new().await;
    for entry in std::fs::read_dir(stand.folder.path().join("spool/log")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        if let Some(at) = bytes.windows(13).position(|part| part == b"b@example.com") {
            bytes[at] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
    }
    let fake = Fake {
        spool: Arc::clone(&stand.spool),
        script: Mutex::default(),
        calls: Mutex::default(),
        recipients: 2,
    };
    let held = || stand.metrics.queue.with_label_values(&["held"]).get();
    let damaged = |answers: &[(SpoolId, Answer)]| match answers {
        [(ID, Answer::Damaged(why))] => {
            why.contains("`mailsluice spool verify` says what is damaged")
        }
        _ => false,
    };
    let delete = run_asked(&stand, Some(Arc::new(fake)), async |operator| {
        while operator.look().await.unwrap().unreadable != [ID] {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert_eq!(held(), 1);
        // It was tried again by one verb, and not held to another.
        for verb in [operator::Verb::Hold, operator::Verb::Retry, operator::Verb::Release] {
            let answers = operator.change(verb, vec![ID]).await.unwrap();
            assert!(damaged(&answers), "{verb:?} {answers:?}");
            assert_eq!(operator.look().await.unwrap().unreadable, [ID]);
        }
        operator.change(operator::Verb::Delete, vec![ID]).await.unwrap()
    })
    .await;
    assert_eq!(delete, [(ID, Answer::Done)]);
    assert_eq!((stand.state(), held()), (None, 0));
}

/// It made all mail wait for an hour.
#[tokio::test]
async fn a_mailbox_with_too_many_connections_gets_fewer_while_others_are_answered() {
    let mut stand = Stand::new().await;
    stand.concurrency = 1;
    let other = SpoolId::from_u128(2);
    let put = Envelope { id: other, ..envelope() };
    stand.apply(Op::Put { envelope: put, body: Staged::Memory(b"hi".to_vec()) }).await;
    let open = |stand: &Stand| stand.metrics.provider_open.get();
    let busy = |stand: &Stand, calls: &[Call]| {
        assert!(calls.is_empty() || open(stand) == 1, "nobody else waits");
        stand.state().is_none()
    };
    let calls = stand.run(&[Play::Take, Play::Each("bb")], busy).await;
    let ids: Vec<SpoolId> = calls.iter().map(|call| call.id).collect();
    assert_eq!((ids.len(), ids[1]), (3, ids[2]), "{calls:?}");
    assert_eq!(calls[2].attempts, 0, "it counts nothing");
    assert!(calls[2].at - calls[1].at < Duration::from_secs(5));
}

fn postmaster() -> Option<Mailbox> {
    Mailbox::parse("ops@example.net", Charset::Ascii).ok()
}

/// What was written between two parts of an attempt, of which no report was written yet.
#[tokio::test]
async fn a_failure_that_a_killed_attempt_did_not_tell_is_told_by_the_next() {
    let mut stand = Stand::new().await;
    stand.house.bounce.postmaster = postmaster();
    let hangs = |stand: &Stand, calls: &[Call]| {
        calls.len() == 2 && stand.spool.head(ID).is_some_and(|head| head.pending == 1)
    };
    stand.run_parts(1, &[Play::Never, Play::Hang], hangs).await;
    let progress = stand.progress().await;
    assert_eq!((statuses(&progress).as_str(), &progress.untold[..]), ("x?", &[0][..]));
    let stand = stand.restarted().await;
    let failed = |stand: &Stand, _: &[Call]| {
        stand.spool.health().failed == 1 && stand.spool.heads(None, 9).len() == 1
    };
    let calls = stand.run_parts(1, &[], failed).await;
    let others: Vec<SpoolId> =
        calls.iter().map(|call| call.id).filter(|called| *called != ID).collect();
    assert_eq!(others.len(), 1, "one report: {calls:?}");
    let progress = stand.progress().await;
    assert_eq!((statuses(&progress).as_str(), &progress.untold[..]), ("xd", &[][..]));
}

#[tokio::test]
async fn a_report_is_in_the_spool_as_soon_as_the_failure_is() {
    let mut stand = Stand::new().await;
    stand.house.bounce.postmaster = postmaster();
    let (ended, _) = stand.attempt(2, &[Play::Never]).await;
    assert!(matches!(ended, Ended::Done));
    let stand = stand.restarted().await;
    let heads = stand.spool.heads(None, 9);
    assert_eq!(heads.len(), 2);
    let report = stand.spool.open(heads[1].id).await.unwrap();
    assert_eq!(report.envelope.kind, Kind::Notice);
    assert_eq!(report.envelope.rcpts[0].path.as_str(), "ops@example.net");
}
