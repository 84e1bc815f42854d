//! What takes days, in moments: time is paused and jumps to the next thing that is waited for.

mod account;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;

use super::*;
use crate::envelope::{Body, Head};
use crate::spool::{Health, Stage};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A spool in memory: the real one works in threads, which paused time does not wait for.
#[derive(Default)]
struct Memory {
    messages: Mutex<BTreeMap<SpoolId, (Stored, QueueState)>>,
    notes: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Nothing new can be put; what is there can be marked.
    full: AtomicBool,
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
        let is_full = self.full.load(SeqCst);
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
                Op::Attempt { id, progress }
                | Op::Update { id, progress }
                | Op::Requeue { id, progress }
                | Op::Release { id, progress } => (id, progress, QueueState::Queued),
                Op::Fail { id, progress } => (id, progress, QueueState::Failed),
                Op::Hold { id, progress } => (id, progress, QueueState::Held),
                other @ Op::Put { .. } => panic!("{other:?} is not of this play"),
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
    mended: AtomicBool,
    /// How long a try takes, but for a moment.
    takes: Mutex<Duration>,
    tried: Mutex<Vec<SpoolId>>,
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
        Box::pin(async move {
            self.tried.lock().unwrap().push(submission.envelope.id);
            let takes = *self.takes.lock().unwrap();
            tokio::time::sleep(takes + Duration::from_millis(50)).await;
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

/// An engine on a spool in memory.
struct Engine {
    spool: Arc<Memory>,
    metrics: Arc<Metrics>,
    retry: Retry,
    concurrency: usize,
    house: House,
}

/// The ways into a running engine.
struct Hands {
    accept: mpsc::UnboundedSender<SpoolId>,
    operator: operator::Operator,
    spool: Arc<Memory>,
}

impl Engine {
    fn new() -> Self {
        let mut house = house();
        house.bounce.postmaster = postmaster();
        let (spool, metrics) = (Arc::new(Memory::default()), Arc::new(Metrics::new()));
        let retry = Retry { first: MINUTE, factor: 2.0, max: HOUR, ..retry_config() };
        Self { spool, metrics, retry, concurrency: 4, house }
    }

    /// Runs from a start to a stop, which is when the play ends.
    async fn run<P: Provider + 'static, T>(
        &self,
        provider: &Arc<P>,
        play: impl AsyncFnOnce(Hands) -> T,
    ) -> T {
        let (accept, accepted) = mpsc::unbounded_channel();
        let (operator, requests) = operator::channel();
        let settings = Settings {
            retry: self.retry.clone(),
            concurrency: self.concurrency,
            policy: preserve(),
            house: self.house.clone(),
        };
        let mut dispatcher = Dispatcher::new(
            Arc::clone(&self.spool),
            Some(Arc::clone(provider) as Arc<dyn Provider>),
            settings,
            accepted,
            requests,
            Arc::clone(&self.metrics),
            watch::Sender::new(None),
            written(),
        );
        dispatcher.load();
        let stop = CancellationToken::new();
        let play = async {
            let spool = Arc::clone(&self.spool);
            let played = play(Hands { accept, operator, spool }).await;
            stop.cancel();
            played
        };
        tokio::join!(play, dispatcher.run(stop.clone(), Duration::from_secs(1))).0
    }

    fn gauge(&self, state: &str) -> i64 {
        self.metrics.queue.with_label_values(&[state]).get()
    }
}

impl Hands {
    async fn accept(&self) -> SpoolId {
        let now = clock::wall();
        let id = SpoolId::new(now);
        let sender = Mailbox::parse("app@example.com", Charset::Ascii).unwrap();
        let reverse_path = ReversePath::Mailbox(sender);
        let envelope = Envelope { id, accepted: now, reverse_path, ..envelope() };
        let put = Op::Put { envelope, body: Staged::Memory(b"hi".to_vec()) };
        self.spool.apply(vec![put], Durability::Durable).await.unwrap();
        self.accept.send(id).unwrap();
        id
    }

    async fn ask(&self, verb: operator::Verb, id: SpoolId) {
        let done = self.operator.change(verb, vec![id]).await.unwrap();
        assert_eq!(done, [(id, Answer::Done)], "{verb:?}");
    }

    /// The one letter of ours that is in the spool.
    fn notice(&self) -> SpoolId {
        let messages = self.spool.messages.lock().unwrap();
        let mut letters =
            messages.values().filter(|(stored, _)| stored.envelope.kind == Kind::Notice);
        let id = letters.next().unwrap().0.envelope.id;
        assert!(letters.next().is_none());
        id
    }

    async fn wait_empty(&self) {
        let began = clock::now();
        while !self.spool.heads(None, 1).is_empty() {
            assert!(clock::now() - began < DAY, "it does not end");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

impl WrongPassword {
    fn mend(&self) {
        self.mended.store(true, SeqCst);
    }

    fn taken(&self, is: fn(Kind) -> bool) -> Vec<(SpoolId, String)> {
        let taken = self.taken.lock().unwrap();
        let taken = taken.iter().filter(|(kind, ..)| is(*kind));
        taken.map(|(_, id, content)| (*id, content.clone())).collect()
    }

    /// The subjects of the letters that were taken, in their order.
    fn subjects(&self) -> Vec<String> {
        let letters = self.taken(|kind| kind == Kind::Notice);
        let subject = |content: &str| {
            let mut lines = content.lines().filter_map(|line| line.strip_prefix("Subject: "));
            lines.next().unwrap().to_owned()
        };
        letters.iter().map(|(_, content)| subject(content)).collect()
    }

    fn tries(&self, id: SpoolId) -> usize {
        self.tried.lock().unwrap().iter().filter(|tried| **tried == id).count()
    }
}

const WAITS: &str = "Mail waits: the provider does not take it";
const FLOWS: &str = "Mail flows again";

#[tokio::test(start_paused = true)]
async fn six_days_of_a_wrong_password_cost_no_message_and_end_with_one_notice() {
    let (engine, provider) = (Engine::new(), Arc::new(WrongPassword::default()));
    let mut accepted = engine
        .run(&provider, async |hands: Hands| {
            let mut accepted = Vec::new();
            for _ in 0..6 * 24 {
                accepted.push(hands.accept().await);
                tokio::time::sleep(HOUR).await;
            }
            let waiting = hands.spool.heads(None, 1_000).len();
            assert_eq!(waiting, accepted.len() + 1, "all of the mail, and one notice");
            assert_eq!(engine.gauge("queued"), 6 * 24 + 1);
            assert_eq!(provider.tries(hands.notice()), 0, "it is no probe");
            provider.mend();
            hands.wait_empty().await;
            accepted
        })
        .await;
    let mut mail: Vec<SpoolId> =
        provider.taken(|kind| kind == Kind::Mail).into_iter().map(|(id, _)| id).collect();
    mail.sort();
    accepted.sort();
    assert_eq!(mail, accepted, "everything once");
    let letters = provider.taken(|kind| kind != Kind::Mail);
    assert_eq!(letters.len(), 1, "nothing bounces: {letters:#?}");
    for part in [FLOWS, "535 5.7.8 bad password", "6 d 0 h"] {
        assert!(letters[0].1.contains(part), "{part} in {letters:#?}");
    }
    let tries = provider.tried.lock().unwrap().len();
    assert!(tries < 4_000, "{tries} tries: a server that refuses logins is not stormed");
    assert_eq!((engine.gauge("queued"), engine.gauge("held")), (0, 0));
}

/// The first notice of an outage is written, and one message waits.
async fn an_hour(hands: &Hands) -> (SpoolId, SpoolId) {
    let mail = hands.accept().await;
    tokio::time::sleep(HOUR).await;
    (mail, hands.notice())
}

/// As long as there is mail, that finds out. Without, nobody would.
#[tokio::test(start_paused = true)]
async fn a_notice_with_nothing_else_in_the_queue_finds_out_itself_whether_the_provider_works() {
    let (engine, provider) = (Engine::new(), Arc::new(WrongPassword::default()));
    let play = async |hands: Hands| {
        let (mail, notice) = an_hour(&hands).await;
        assert_eq!(provider.tries(notice), 0);
        hands.ask(operator::Verb::Delete, mail).await;
        tokio::time::sleep(HOUR).await;
        assert!(provider.tries(notice) > 1, "it is tried as a probe");
        assert_eq!(engine.gauge("queued"), 1);
        provider.mend();
        hands.wait_empty().await;
        hands.accept().await;
        hands.wait_empty().await;
    };
    engine.run(&provider, play).await;
    assert_eq!(provider.subjects(), [WAITS, FLOWS], "the first got through before it was over");
}

/// Two probes in a row open the gate, and the one mail was the first: the notice that said "it waits" was the second.
#[tokio::test(start_paused = true)]
async fn where_one_mail_waited_one_notice_comes_too() {
    let (engine, provider) = (Engine::new(), Arc::new(WrongPassword::default()));
    let play = async |hands: Hands| {
        an_hour(&hands).await;
        provider.mend();
        hands.wait_empty().await;
    };
    engine.run(&provider, play).await;
    assert_eq!(provider.subjects(), [FLOWS]);
    assert_eq!(engine.metrics.provider_open.get(), 1);
}

/// The next was written meanwhile, and could take the place of none.
#[tokio::test(start_paused = true)]
async fn a_notice_on_its_way_is_followed_by_the_next_only_when_that_has_ended() {
    let (engine, provider) = (Engine::new(), Arc::new(WrongPassword::default()));
    let play = async |hands: Hands| {
        let (mail, notice) = an_hour(&hands).await;
        *provider.takes.lock().unwrap() = 2 * DAY;
        hands.ask(operator::Verb::Delete, mail).await;
        tokio::time::sleep(DAY + HOUR).await;
        assert_eq!((provider.tries(notice), hands.notice()), (1, notice), "the daily one is due");
        *provider.takes.lock().unwrap() = Duration::ZERO;
        tokio::time::sleep(DAY).await;
        assert_ne!(hands.notice(), notice, "it could not be sent, and is replaced");
        assert_eq!(engine.gauge("queued"), 1);
        hands.accept().await;
        provider.mend();
        hands.wait_empty().await;
    };
    engine.run(&provider, play).await;
    assert_eq!(provider.subjects(), [FLOWS]);
}

#[tokio::test(start_paused = true)]
async fn a_notice_that_an_operator_holds_is_replaced_and_the_gauge_knows() {
    let (engine, provider) = (Engine::new(), Arc::new(WrongPassword::default()));
    let play = async |hands: Hands| {
        let (_, notice) = an_hour(&hands).await;
        hands.ask(operator::Verb::Hold, notice).await;
        tokio::time::sleep(MINUTE).await;
        assert_eq!((engine.gauge("queued"), engine.gauge("held")), (1, 1));
        provider.mend();
        hands.wait_empty().await;
    };
    engine.run(&provider, play).await;
    assert_eq!(provider.subjects(), [FLOWS]);
    assert_eq!((engine.gauge("queued"), engine.gauge("held")), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_notice_that_an_operator_retries_is_tried_and_kept_again() {
    let (engine, provider) = (Engine::new(), Arc::new(WrongPassword::default()));
    let play = async |hands: Hands| {
        let (_, notice) = an_hour(&hands).await;
        hands.ask(operator::Verb::Retry, notice).await;
        tokio::time::sleep(HOUR).await;
        assert_eq!(provider.tries(notice), 1);
        assert_eq!(engine.gauge("queued"), 2);
        hands.ask(operator::Verb::Retry, notice).await;
        provider.mend();
        hands.wait_empty().await;
    };
    engine.run(&provider, play).await;
    assert_eq!(provider.subjects().last().unwrap(), FLOWS);
    assert_eq!((engine.gauge("queued"), engine.gauge("held")), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_notice_that_an_operator_deletes_is_followed_by_the_next_all_the_same() {
    let (engine, provider) = (Engine::new(), Arc::new(WrongPassword::default()));
    let play = async |hands: Hands| {
        let (_, notice) = an_hour(&hands).await;
        hands.ask(operator::Verb::Delete, notice).await;
        tokio::time::sleep(DAY).await;
        assert_ne!(hands.notice(), notice);
        provider.mend();
        hands.wait_empty().await;
    };
    engine.run(&provider, play).await;
    assert_eq!(provider.subjects(), [FLOWS]);
}

/// One was on its way when the end was to be told, and both came.
#[tokio::test(start_paused = true)]
async fn a_notice_that_waits_is_kept_over_a_restart_and_not_sent_beside_the_last() {
    let (engine, provider) = (Engine::new(), Arc::new(WrongPassword::default()));
    let play = async |hands: Hands| an_hour(&hands).await;
    let (_, notice) = engine.run(&provider, play).await;
    let play = async |hands: Hands| {
        tokio::time::sleep(DAY + HOUR).await;
        assert_ne!(hands.notice(), notice, "the daily one has replaced it");
        assert_eq!(engine.gauge("queued"), 2);
    };
    engine.run(&provider, play).await;
    provider.mend();
    let wait = async |hands: Hands| hands.wait_empty().await;
    engine.run(&provider, wait).await;
    assert_eq!(provider.subjects(), [FLOWS]);
    assert!(engine.spool.note(reports::OUTAGE).is_none());
}

/// The note of it stayed, and the next postmaster was told of an outage of long ago.
#[tokio::test(start_paused = true)]
async fn an_outage_that_ends_without_a_postmaster_leaves_no_note_and_its_notice_is_a_letter() {
    let (mut engine, provider) = (Engine::new(), Arc::new(WrongPassword::default()));
    engine.run(&provider, async |hands: Hands| an_hour(&hands).await).await;
    assert!(engine.spool.note(reports::OUTAGE).is_some());
    let ops = engine.house.bounce.postmaster.take();
    provider.mend();
    let wait = async |hands: Hands| hands.wait_empty().await;
    engine.run(&provider, wait).await;
    assert_eq!(provider.subjects(), [WAITS]);
    assert!(engine.spool.note(reports::OUTAGE).is_none());
    engine.house.bounce.postmaster = ops;
    let play = async |hands: Hands| {
        hands.accept().await;
        hands.wait_empty().await;
        tokio::time::sleep(DAY).await;
    };
    engine.run(&provider, play).await;
    assert_eq!(provider.subjects(), [WAITS]);
}

/// What becomes of application mail; letters of our own are taken.
struct Refuses(Mutex<Play>);

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
            Kind::Mail => *self.0.lock().unwrap(),
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
    engine: &Engine,
    play: Play,
    mails: u128,
) -> [Vec<(QueueState, Progress)>; 2] {
    let put = |id| {
        let envelope = Envelope { id: SpoolId::from_u128(id), ..envelope() };
        Op::Put { envelope, body: Staged::Memory(b"hi".to_vec()) }
    };
    let spool = &engine.spool;
    spool.apply((1..=mails).map(put).collect(), Durability::Durable).await.unwrap();
    spool.full.store(true, SeqCst);
    let states = || -> Vec<(QueueState, Progress)> {
        let messages = spool.messages.lock().unwrap();
        messages.values().map(|(stored, state)| (*state, stored.progress.clone())).collect()
    };
    let play_it = async |_: Hands| {
        tokio::time::sleep(MINUTE).await;
        let full = states();
        spool.full.store(false, SeqCst);
        tokio::time::sleep(MINUTE).await;
        [full, states()]
    };
    engine.run(&Arc::new(Refuses(Mutex::new(play))), play_it).await
}

/// On a full disk deliveries are what makes room, so none may wait for room itself; and no failure may go untold.
#[tokio::test(start_paused = true)]
async fn a_report_that_has_no_room_keeps_its_message_queued_and_no_other_waits_for_it() {
    let engine = Engine { retry: retry_config(), concurrency: 1, ..Engine::new() };
    let [full, after] = on_a_full_disk(&engine, Play::Never, 5).await;
    let metrics = &engine.metrics;
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
    let engine = Engine { retry: retry_config(), concurrency: 1, ..Engine::new() };
    let states = on_a_full_disk(&engine, Play::Each("nh"), 1).await;
    for found in states {
        let [(state, progress)] = &found[..] else { panic!("{found:?}") };
        assert_eq!((*state, &progress.untold[..]), (QueueState::Held, &[0][..]));
        assert_eq!(statuses(progress), "x?");
    }
}

/// Five hours of it were an outage, and the sender was told that his message waits for its own reason.
#[tokio::test(start_paused = true)]
async fn an_outage_does_not_count_towards_the_warning_of_a_delay() {
    let mut engine = Engine::new();
    (engine.retry.max, engine.retry.give_up_after) = (10 * MINUTE, 5 * DAY);
    let provider = Arc::new(Refuses(Mutex::new(Play::Later)));
    let warned = || engine.metrics.reports.with_label_values(&["delay"]).get();
    let play = async |hands: Hands| {
        hands.accept().await;
        tokio::time::sleep(HOUR).await;
        *provider.0.lock().unwrap() = Play::Trouble;
        tokio::time::sleep(5 * HOUR).await;
        *provider.0.lock().unwrap() = Play::Later;
        tokio::time::sleep(HOUR).await;
        assert_eq!(warned(), 0, "it has waited two hours for its own reason");
        tokio::time::sleep(3 * HOUR).await;
        assert_eq!(warned(), 1);
    };
    engine.run(&provider, play).await;
}

/// How often a notice that waits alone is tried in the hour after a restart.
async fn tries_of_a_lone_notice(outcome: Outcome) -> usize {
    let (engine, provider) = (Engine::new(), Arc::new(WrongPassword::default()));
    let play = async |hands: Hands| {
        let (mail, _) = an_hour(&hands).await;
        hands.ask(operator::Verb::Delete, mail).await;
    };
    engine.run(&provider, play).await;
    let same = account::Account::new(move |_| outcome.clone());
    engine.run(&same, async |_: Hands| tokio::time::sleep(HOUR).await).await;
    same.tries()
}

/// It was tried again at once, thousands of times a minute.
#[tokio::test(start_paused = true)]
async fn a_notice_that_is_alone_waits_between_its_tries_like_any_mail() {
    let cause = |scope, stage| Cause::new(scope, stage, "no");
    let blocked = cause(Scope::Provider, crate::outcome::Stage::EndOfData);
    let lost = Cause { lost: true, ..cause(Scope::Message, crate::outcome::Stage::Data) };
    let null_path =
        Cause { null_path: true, ..cause(Scope::Message, crate::outcome::Stage::EndOfData) };
    for outcome in [Outcome::Held(blocked), Outcome::Deferred(lost), Outcome::Deferred(null_path)] {
        let tries = tries_of_a_lone_notice(outcome.clone()).await;
        assert!((2..30).contains(&tries), "{tries} tries in an hour: {outcome:?}");
    }
}
