//! Takes what is due, hands it to the provider, and makes durable what came of it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::poll_fn;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::clock;
use crate::config::{InDoubt, Retry};
use crate::delivery::gate::{self, Admit, Change, Gate, Pass};
use crate::delivery::operator::{
    self, Answer, Look, Obstacle, Place, Request, Requests, Subject, Work,
};
use crate::delivery::reports::{self, Desk, House};
use crate::delivery::retry;
use crate::delivery::schedule::{Schedule, Turn};
use crate::envelope::{Head, Kind, Progress, QueueState, RcptStatus, SpoolId, UnixMillis};
use crate::metrics::Metrics;
use crate::outcome::{Cause, Outcome, Scope, Stage, unreadable};
use crate::policy::Policy;
use crate::provider::{BoxFuture, Outcomes, Provider, Submission};
use crate::smtp::reply::Escaped;
use crate::spool::{Durability, Op, Spool, SpoolError, Stored};
use crate::telemetry::Written;

mod telling;

use telling::Enclosed;

/// Heads that are read from the spool at once at start.
const HEADS: usize = 1_000;
/// Between two tries to write an outcome that the disk did not take.
const DISK_RETRY: Duration = Duration::from_secs(1);
/// Before a message is tried again that met a provider with no connection to spare.
const BUSY_PAUSE: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct Settings {
    pub retry: Retry,
    /// Messages in flight at once.
    pub concurrency: usize,
    pub policy: Arc<Policy>,
    pub house: House,
}

/// What the delivery side says of itself: `None` while mail flows, else why not.
pub type Trouble = Option<Cause>;

/// The engine. Owns order and ownership of every queued message.
pub struct Dispatcher<S> {
    shared: Arc<Shared<S>>,
    accepted: mpsc::UnboundedReceiver<SpoolId>,
    schedule: Schedule,
    attempts: JoinSet<Ended>,
    in_flight: HashMap<Id, (SpoolId, Pass)>,
    /// Those in flight that were deferred before.
    retrying: HashSet<Id>,
    /// What a former run was sending when it ended.
    in_doubt: Vec<SpoolId>,
    held: usize,
    /// One letter to the postmaster at a time.
    errand: JoinSet<()>,
    /// The notice that it takes the place of, and what that was to the schedule.
    replaced: Option<(SpoolId, Place)>,
    /// The notice of an outage that lasts: it waits for the end of it, and so for the one that tells the whole.
    /// Like any other, it is not tried before its time.
    kept: Option<(SpoolId, Instant)>,
    /// Queued on disk, but they cannot be read back.
    unreadable: HashSet<SpoolId>,
    requests: Requests,
    /// What operators asked for and has not begun; each of them waits for its answer.
    asked: VecDeque<operator::Change>,
    /// The change that is being carried out, one at a time, and the messages that it is about.
    change: JoinSet<Vec<(SpoolId, Answer, Place)>>,
    changing: Vec<(SpoolId, Place)>,
    answering: Option<Answering>,
}

/// Who waits for a change, and the answers that are known already.
struct Answering {
    reply: oneshot::Sender<Vec<(SpoolId, Answer)>>,
    answers: Vec<(SpoolId, Answer)>,
}

/// What every attempt needs.
struct Shared<S> {
    spool: Arc<S>,
    /// None: mail is kept until there is one.
    provider: Option<Arc<dyn Provider>>,
    settings: Settings,
    metrics: Arc<Metrics>,
    gate: Mutex<Gate>,
    desk: Mutex<Desk>,
    trouble: watch::Sender<Trouble>,
    log: Written,
}

/// How an attempt ended, for the schedule.
enum Ended {
    /// It is tried again not before the instant.
    Again(Instant),
    /// It waits for an operator.
    Held,
    /// It cannot be read back, and waits for an operator.
    Unreadable,
    /// Delivered, or failed: nothing is left to try. Or someone else has taken it out of the queue.
    Done,
}

impl<S: Spool> Dispatcher<S> {
    /// `accepted` brings the ids of new messages: the one wake-up between acceptance and delivery. It is unbounded
    /// because what it holds is in the queue, and so in memory, either way.
    pub fn new(
        spool: Arc<S>,
        provider: Option<Arc<dyn Provider>>,
        settings: Settings,
        accepted: mpsc::UnboundedReceiver<SpoolId>,
        requests: Requests,
        metrics: Arc<Metrics>,
        trouble: watch::Sender<Trouble>,
        log: Written,
    ) -> Self {
        let gate = Mutex::new(Gate::new());
        let desk = Desk::load(|key| spool.note(key), clock::now(), clock::wall());
        let desk = Mutex::new(desk);
        let shared = Shared { spool, provider, settings, metrics, gate, desk, trouble, log };
        Self {
            shared: Arc::new(shared),
            accepted,
            schedule: Schedule::new(clock::now()),
            attempts: JoinSet::new(),
            in_flight: HashMap::new(),
            retrying: HashSet::new(),
            in_doubt: Vec::new(),
            held: 0,
            errand: JoinSet::new(),
            replaced: None,
            kept: None,
            unreadable: HashSet::new(),
            requests,
            asked: VecDeque::new(),
            change: JoinSet::new(),
            changing: Vec::new(),
            answering: None,
        }
    }

    /// Runs until `stop` fires; then nothing new begins, and what is under way gets `grace` to end.
    pub async fn run(mut self, stop: CancellationToken, grace: Duration) {
        self.shared.metrics.provider_open.set(i64::from(self.shared.provider.is_some()));
        // No more than were in flight at once then. They ask nothing of the provider, so the gate has no say.
        for id in mem::take(&mut self.in_doubt) {
            let task = self.attempts.spawn(doubt(Arc::clone(&self.shared), id));
            self.in_flight.insert(task.id(), (id, Pass::Free));
        }
        loop {
            self.begin_change();
            let wake_at = self.begin_what_is_due();
            let wake_at = self.begin_errand().into_iter().chain(wake_at).min();
            self.count();
            // Each branch may be dropped mid-way: joining, receiving and sleeping take nothing unless they are ready.
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(ended) = self.attempts.join_next_with_id() => self.ended(ended),
                Some(_) = self.errand.join_next() => self.errand_ended(),
                Some(id) = self.accepted.recv() => self.take(id),
                Some(changed) = self.change.join_next() => self.changed(changed.ok()),
                Some(request) = self.requests.next() => self.asked(request),
                () = sleep_until(wake_at) => {}
            }
        }
        self.finish(grace).await;
    }

    /// Puts everything that the spool holds into the schedule. To be done before anything is accepted: a message that
    /// came both ways would be sent twice.
    pub fn load(&mut self) {
        let (now, wall) = (clock::now(), clock::wall());
        let retry = &self.shared.settings.retry;
        let notice = self.outage_notice();
        let mut after = None;
        loop {
            let heads = self.shared.spool.heads(after, HEADS);
            let Some(last) = heads.last() else { return };
            after = Some(last.id);
            for head in heads {
                match head.state {
                    QueueState::Queued if head.in_doubt => self.in_doubt.push(head.id),
                    QueueState::Queued => {
                        // A clock that stepped does not make mail wait longer than the schedule ever would (R73).
                        let at = now + head.due.since(wall).min(retry::longest(retry));
                        match notice == Some(head.id) {
                            true => self.kept = Some((head.id, at)),
                            false => self.schedule.push(head.id, turn(&head), at),
                        }
                    }
                    QueueState::Held => self.held += 1,
                    QueueState::Failed => {}
                }
            }
        }
    }

    fn take(&mut self, id: SpoolId) {
        let now = clock::now();
        self.schedule.push(id, Turn::First, now);
        while let Ok(id) = self.accepted.try_recv() {
            self.schedule.push(id, Turn::First, now);
        }
    }

    /// Begins what may begin now, and says when to look again.
    fn begin_what_is_due(&mut self) -> Option<Instant> {
        let provider = self.shared.provider.clone()?;
        let now = clock::now();
        loop {
            let allowance = self.shared.gate().allowance(self.shared.settings.concurrency);
            if self.attempts.len() >= allowance {
                return None;
            }
            let again = self.retrying.len() < most_retries(allowance);
            let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
            if !is_due(self.schedule.next_at(true)) {
                let change = self.shared.gate().idle(now);
                self.shared.tell(change, None);
            }
            let alone = || self.probes_by_notice();
            let next_at = self.schedule.next_at(again).or_else(alone)?;
            if next_at > now {
                return Some(next_at);
            }
            let pass = match self.shared.gate().admit(now) {
                Admit::Freely => Pass::Free,
                Admit::Probe => Pass::Probe,
                Admit::Wait(until) => return until,
            };
            let kept = || self.kept.take().map(|(id, _)| (id, Turn::Again));
            let (id, turn) = self.schedule.pop(now, again).or_else(kept)?;
            let attempt = attempt(Arc::clone(&self.shared), Arc::clone(&provider), id, pass);
            let task = self.attempts.spawn(attempt);
            self.in_flight.insert(task.id(), (id, pass));
            if turn == Turn::Again {
                self.retrying.insert(task.id());
            }
        }
    }

    /// Puts a message back that was tried.
    fn put_back(&mut self, id: SpoolId, at: Instant) {
        match self.outage_notice() == Some(id) {
            true => self.kept = Some((id, at)),
            false => self.put_in_turn(id, at),
        }
    }

    fn put_in_turn(&mut self, id: SpoolId, at: Instant) {
        let turn = self.shared.spool.head(id).map_or(Turn::Again, |head| turn(&head));
        self.schedule.push(id, turn, at);
    }

    /// Puts a message where it is to be, which was taken from where it was.
    fn put(&mut self, id: SpoolId, place: Place) {
        match place {
            Place::Due(at) => self.put_in_turn(id, at),
            Place::Kept(at) => self.put_back(id, at),
            Place::Held => self.held += 1,
            Place::Unreadable => {
                self.unreadable.insert(id);
            }
            Place::Out => {}
        }
    }

    fn ended(&mut self, ended: Result<(Id, Ended), JoinError>) {
        let (task, ended) = match ended {
            Ok((task, ended)) => (task, Some(ended)),
            Err(gone) => (gone.id(), None),
        };
        let Some((id, pass)) = self.in_flight.remove(&task) else { return };
        self.retrying.remove(&task);
        self.schedule_letters();
        match ended {
            Some(Ended::Again(at)) => self.put_back(id, at),
            Some(Ended::Held) => self.held += 1,
            Some(Ended::Unreadable) => {
                self.unreadable.insert(id);
            }
            Some(Ended::Done) => {}
            // The attempt panicked: the message is put back, a while later, whatever it was.
            None => {
                self.shared.gate().unclear(pass, clock::now());
                self.put_back(id, clock::now() + self.shared.settings.retry.first);
            }
        }
    }

    fn asked(&mut self, request: Request) {
        match request {
            Request::Change(change) => self.asked.push_back(change),
            Request::Look(reply) => {
                let mut in_flight: Vec<_> = self.in_flight.values().map(|(id, _)| *id).collect();
                in_flight.sort_unstable();
                let mut unreadable: Vec<_> = self.unreadable.iter().copied().collect();
                unreadable.sort_unstable();
                let obstacle = self.shared.obstacle();
                // Who asked may have gone.
                reply.send(Look { in_flight, unreadable, obstacle }).unwrap_or_default();
            }
        }
    }

    /// Takes the messages that the next change is about out of the schedule, so that no attempt begins at them, and has
    /// it carried out.
    fn begin_change(&mut self) {
        if self.answering.is_some() {
            return;
        }
        let Some(operator::Change { verb, doubts, ids, reply }) = self.asked.pop_front() else {
            return;
        };
        let in_flight: HashSet<_> = self.in_flight.values().map(|(id, _)| *id).collect();
        let heads: Vec<_> = ids.iter().map(|(id, _)| (*id, self.shared.spool.head(*id))).collect();
        let judged: HashMap<_, _> = ids.into_iter().collect();
        let is_queued =
            |head: &Option<Head>| head.is_some_and(|head| head.state == QueueState::Queued);
        let queued: HashSet<_> =
            heads.iter().filter(|(_, head)| is_queued(head)).map(|(id, _)| *id).collect();
        let mut waited = match queued.is_empty() {
            true => HashMap::new(),
            false => self.schedule.remove_all(&queued),
        };
        let mut answering = Answering { reply, answers: Vec::new() };
        let mut seen = HashSet::new();
        for (id, head) in heads {
            if !seen.insert(id) {
                continue;
            }
            let was = match head.map(|head| head.state) {
                None => Err(Answer::NotFound),
                Some(_) if in_flight.contains(&id) => {
                    Err(Answer::Busy("it is being sent now; try again when that has ended"))
                }
                Some(_) if self.replaced.is_some_and(|(replaced, _)| replaced == id) => {
                    Err(Answer::Busy("the postmaster is being written to; try again"))
                }
                Some(QueueState::Held) => Ok(Place::Held),
                Some(QueueState::Failed) => Ok(Place::Out),
                Some(QueueState::Queued) => match waited.remove(&id) {
                    Some(at) => Ok(Place::Due(at)),
                    None if self.unreadable.contains(&id) => Ok(Place::Unreadable),
                    None => match self.kept.filter(|(kept, _)| *kept == id) {
                        Some((_, at)) => Ok(Place::Kept(at)),
                        None => Err(Answer::Busy("it was accepted this moment; try again")),
                    },
                },
            };
            match was {
                Ok(was) => {
                    self.kept = self.kept.filter(|(kept, _)| *kept != id);
                    self.changing.push((id, was));
                }
                Err(answer) => answering.answers.push((id, answer)),
            }
        }
        let subject = |(id, was): &(SpoolId, Place)| {
            let judged = judged.get(id).copied().flatten();
            Subject { id: *id, was: *was, judged }
        };
        let subjects = self.changing.iter().map(subject);
        let shared = &self.shared;
        let work = Work {
            spool: Arc::clone(&shared.spool),
            metrics: Arc::clone(&shared.metrics),
            log: shared.log.clone(),
            verb,
            doubts,
            obstacle: shared.obstacle(),
        };
        self.change.spawn(work.carry_out(subjects.collect()));
        self.answering = Some(answering);
    }

    /// A change has ended, or panicked. What each message is by now the spool knows best.
    fn changed(&mut self, done: Option<Vec<(SpoolId, Answer, Place)>>) {
        let changing = mem::take(&mut self.changing);
        let lost = || Answer::Error("the change ended before its end; the log says why".to_owned());
        let done =
            done.unwrap_or_else(|| changing.iter().map(|(id, was)| (*id, lost(), *was)).collect());
        let was: HashMap<_, _> = changing.into_iter().collect();
        let Some(Answering { reply, mut answers }) = self.answering.take() else { return };
        for (id, answer, place) in done {
            match was.get(&id) {
                Some(Place::Held) => self.held = self.held.saturating_sub(1),
                Some(Place::Unreadable) => {
                    self.unreadable.remove(&id);
                }
                Some(Place::Due(_) | Place::Kept(_) | Place::Out) | None => {}
            }
            let state = self.shared.spool.head(id).map(|head| head.state);
            self.put(id, place.agreeing_with(state, clock::now()));
            answers.push((id, answer));
        }
        // Before he who asked looks.
        self.count();
        // He may have gone.
        reply.send(answers).unwrap_or_default();
    }

    /// The gauges follow the queue. Failed messages are the spool's to count.
    fn count(&self) {
        let metrics = &self.shared.metrics;
        let in_flight = self.attempts.len();
        let count = |state, n: usize| {
            metrics.queue.with_label_values(&[state]).set(i64::try_from(n).unwrap_or(i64::MAX));
        };
        count("queued", self.queued());
        count("held", self.held + self.unreadable.len());
        metrics.in_flight.set(i64::try_from(in_flight).unwrap_or(i64::MAX));
    }

    fn queued(&self) -> usize {
        let is_queued =
            |(_, was): &&(SpoolId, Place)| matches!(was, Place::Due(_) | Place::Kept(_));
        let changing = self.changing.iter().chain(&self.replaced).filter(is_queued).count();
        self.schedule.len() + self.attempts.len() + changing + usize::from(self.kept.is_some())
    }

    /// Lets what is under way end within `grace`; what does not is in doubt where its content was given away. Operators
    /// may look on meanwhile, and nothing more is changed for them.
    async fn finish(&mut self, grace: Duration) {
        // Who asked learns it by the end of his channel.
        self.asked.clear();
        let all = async {
            while !(self.attempts.is_empty() && self.change.is_empty()) {
                self.count();
                // As in `run`.
                tokio::select! {
                    Some(ended) = self.attempts.join_next_with_id() => self.ended(ended),
                    Some(changed) = self.change.join_next() => self.changed(changed.ok()),
                    Some(request) = self.requests.next() => {
                        self.asked(request);
                        self.asked.clear();
                    }
                }
            }
        };
        if tokio::time::timeout(grace, all).await.is_err() {
            let n = self.attempts.len();
            warn!(
                event = "stopped",
                unfinished = n,
                "{n} attempts did not end within shutdown_grace and are tried again after the next start"
            );
            self.attempts.shutdown().await;
        }
    }
}

impl<S: Spool> Shared<S> {
    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is in the way of whatever is due now.
    fn obstacle(&self) -> Option<Obstacle> {
        match self.provider {
            None => Some(Obstacle::NoProvider),
            Some(_) => {
                let closed = operator::closed(&self.gate(), clock::now(), clock::wall());
                closed.map(Obstacle::Closed)
            }
        }
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells log, metric and `/readyz` what the gate became.
    fn tell(&self, change: Change, cause: Option<&Cause>) {
        self.note_outage(change, cause);
        match (change, cause) {
            (Change::Closed, Some(cause)) => {
                self.metrics.provider_open.set(0);
                self.trouble.send_replace(Some(cause.clone()));
                let (scope, stage) = (cause.scope.label(), cause.stage.label());
                error!(event = "closed", scope, stage, words = %cause.words, "deliveries wait: {}; the provider is probed until it works, nothing is lost or bounced meanwhile", cause.with_cure());
            }
            (Change::Opened(after), _) => {
                self.metrics.provider_open.set(1);
                self.trouble.send_replace(None);
                info!(
                    event = "opened",
                    seconds = after.as_secs(),
                    "the provider takes mail again after {} s",
                    after.as_secs()
                );
            }
            (Change::Closed | Change::Unchanged, _) => {}
        }
    }
}

/// What has been deferred for a reason of its own is not new mail any more.
fn turn(head: &Head) -> Turn {
    if head.attempts == 0 { Turn::First } else { Turn::Again }
}

/// How many of `allowance` attempts may be such as were deferred before: a quarter is left to new mail, which would
/// otherwise wait for the slowest of them.
fn most_retries(allowance: usize) -> usize {
    allowance - (allowance / 4).max(usize::from(allowance > 1))
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// One attempt: every part of the message that is still pending, each made durable before the next.
async fn attempt<S: Spool>(
    shared: Arc<Shared<S>>,
    provider: Arc<dyn Provider>,
    id: SpoolId,
    pass: Pass,
) -> Ended {
    let began = clock::now();
    let stored = match read_back(&shared, id).await.and_then(|stored| still_queued(&shared, stored))
    {
        Ok(stored) => stored,
        Err(ended) => {
            shared.gate().unclear(pass, clock::now());
            return ended;
        }
    };
    let mut round = Round::new(&shared, stored, pass, began);
    if round.message.progress.sending.is_empty() {
        round.deliver(provider.as_ref()).await;
    } else {
        round.doubt();
    }
    // A probe that came to no part (nothing was pending any more) must not keep the gate waiting.
    shared.gate().unclear(round.pass, clock::now());
    let ended = round.conclude().await;
    shared
        .metrics
        .attempt_seconds
        .observe(clock::now().saturating_duration_since(began).as_secs_f64());
    ended
}

/// Puts down what a former run was sending as maybe sent.
async fn doubt<S: Spool>(shared: Arc<Shared<S>>, id: SpoolId) -> Ended {
    let stored = match read_back(&shared, id).await {
        Ok(stored) => stored,
        // The next attempt sees the mark too.
        Err(ended) => return ended,
    };
    let mut round = Round::new(&shared, stored, Pass::Free, clock::now());
    round.doubt();
    round.conclude().await
}

/// The message; or what follows from its not being there.
async fn read_back<S: Spool>(shared: &Shared<S>, id: SpoolId) -> Result<Stored, Ended> {
    match shared.spool.open(id).await {
        Ok(stored) => Ok(stored),
        Err(SpoolError::Unknown(_)) => Err(Ended::Done),
        Err(error @ SpoolError::Damaged(..)) => {
            error!(event = "held", %id, %error, "message {id} cannot be read back and waits: {error}; it stays in the spool");
            shared.metrics.spool_damaged.inc();
            Err(Ended::Unreadable)
        }
        // No descriptor, no memory, a disk that is away: nothing that the message could help, and it may pass.
        Err(
            error @ (SpoolError::Io(..)
            | SpoolError::Full
            | SpoolError::Closed
            | SpoolError::Refused(..)
            | SpoolError::Unfit(..)),
        ) => {
            error!(event = "deferred", %id, %error, "message {id} cannot be read back now: {error}; trying again");
            Err(Ended::Again(clock::now() + shared.settings.retry.first))
        }
    }
}

/// The message, unless an operator was quicker: what he holds or takes away is not offered to the provider at all, whose
/// refusal would be its end.
fn still_queued<S: Spool>(shared: &Shared<S>, message: Stored) -> Result<Stored, Ended> {
    match shared.spool.head(message.envelope.id).map(|head| head.state) {
        Some(QueueState::Queued) => Ok(message),
        Some(QueueState::Held) => Err(Ended::Held),
        Some(QueueState::Failed) | None => Err(Ended::Done),
    }
}

/// The state of one attempt at one message.
struct Round<'a, S> {
    shared: &'a Shared<S>,
    message: Stored,
    /// As it was found on disk.
    before: Progress,
    pass: Pass,
    began: Instant,
    /// The mark of an attempt was written, and nothing that ends it.
    marked: bool,
    /// The message is not ours to change any more, and this is what it is to the schedule.
    gone: Option<Ended>,
    /// Some recipient came to an end in this attempt, so the state on disk is old.
    changed: bool,
    /// The recipients that were deferred for a reason of their own or their message's.
    deferred: Vec<usize>,
    /// The message is to wait for an operator.
    held: bool,
    /// The log was told of a doubt.
    doubted: bool,
    /// The trouble is not the message's: the rest of it waits, and nothing counts against it.
    stopped: Option<Stop>,
}

/// Why an attempt was given up for a reason that is not the message's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// The provider is in trouble: everyone waits.
    Trouble,
    /// It may be the provider, or this message after all.
    Suspicion,
    /// The account was refused over a null reverse path.
    NullPath,
    /// The provider serves others and had no connection to spare for this one.
    Busy,
    /// The spool cannot take a mark, so nothing may leave.
    Disk,
}

impl<'a, S: Spool> Round<'a, S> {
    fn new(shared: &'a Shared<S>, message: Stored, pass: Pass, began: Instant) -> Self {
        let before = message.progress.clone();
        Self {
            shared,
            message,
            before,
            pass,
            began,
            marked: false,
            gone: None,
            changed: false,
            deferred: Vec::new(),
            held: false,
            doubted: false,
            stopped: None,
        }
    }

    fn id(&self) -> SpoolId {
        self.message.envelope.id
    }

    async fn deliver(&mut self, provider: &dyn Provider) {
        let envelope = Arc::new(self.message.envelope.clone());
        let mut pending: VecDeque<usize> = self.message.progress.pending().collect();
        let applied = self.shared.settings.policy.apply(&envelope, &self.message.body).await;
        let (message, reverse_path) = match applied {
            Ok((message, reverse_path)) => (message, self.named(reverse_path)),
            Err(error) => {
                for rcpt in pending {
                    self.settle(rcpt, unreadable(&error));
                }
                return;
            }
        };
        while !pending.is_empty() {
            let most = provider.limits().recipients.clamp(1, pending.len());
            let part = pending.drain(..most).collect();
            let submission = Submission {
                envelope: Arc::clone(&envelope),
                reverse_path: reverse_path.clone(),
                part,
                doubtful: self.doubtful(),
                message: message.clone(),
            };
            self.shared.metrics.attempts.inc();
            let Some((outcomes, left)) = self.send(provider, &submission).await else { return };
            // Each round settles a recipient at least, so there is a last one.
            if outcomes.is_empty() {
                return;
            }
            left.into_iter().rev().for_each(|rcpt| pending.push_front(rcpt));
            self.judge(&outcomes);
            for (rcpt, outcome) in outcomes {
                self.settle(rcpt, outcome);
            }
            if self.stopped.is_some() || self.held {
                return;
            }
            if !pending.is_empty() && self.changed {
                let (id, progress) = (self.id(), &self.message.progress);
                self.write(|| Op::Update { id, progress: progress.clone() }, Durability::Durable)
                    .await;
            }
        }
    }

    /// Has the provider send a part: the outcomes, and who is left for another part. None when it turns out that it must
    /// not be sent.
    async fn send(
        &mut self,
        provider: &dyn Provider,
        submission: &Submission,
    ) -> Option<(Vec<(usize, Outcome)>, Vec<usize>)> {
        let (outcomes, mut leaving) = Outcomes::watched();
        let mut delivery = pin!(caught(provider.deliver(submission, &outcomes)));
        loop {
            let may_leave = tokio::select! {
                biased;
                () = &mut delivery => break,
                Some(may_leave) = leaving.recv() => may_leave,
            };
            if !self.mark(&outcomes.unsaid(&submission.part)).await {
                return None;
            }
            // The provider may have panicked meanwhile: then there is an end, without a word.
            may_leave.send(()).unwrap_or_default();
        }
        let left = outcomes.left();
        Some((outcomes.take(&submission.part), left))
    }

    /// Marks on disk that the content of `part` is about to leave, so that the next start knows what may have been taken
    /// should there be no outcome. False: the message is not to be sent.
    async fn mark(&mut self, part: &[usize]) -> bool {
        let id = self.id();
        let mut progress = self.message.progress.clone();
        progress.sending = part.iter().filter_map(|rcpt| u32::try_from(*rcpt).ok()).collect();
        // It takes the place of the mark before.
        self.doubt_is_told().await;
        let in_doubt = self.shared.settings.retry.in_doubt;
        let durability = match in_doubt {
            InDoubt::Retry => Durability::Lazy,
            // A loss of power must not take the mark and leave the copy.
            InDoubt::Hold => Durability::Durable,
        };
        match self.shared.spool.apply(vec![Op::Attempt { id, progress }], durability).await {
            Ok(()) => {
                self.marked = true;
                true
            }
            // An operator was quicker; or the daemon is ending.
            Err(SpoolError::Unknown(_) | SpoolError::Closed) => {
                self.gone = Some(Ended::Done);
                false
            }
            Err(SpoolError::Refused(..)) => {
                self.gone = Some(Ended::Held);
                false
            }
            // Sent all the same: on a full disk nothing else makes room.
            Err(error @ SpoolError::Full) if in_doubt == InDoubt::Retry => {
                warn!(%id, %error, "message {id} is sent without a mark on disk: {error}");
                true
            }
            // Its outcome could not be written either, and it would be sent again in silence.
            Err(
                error @ (SpoolError::Full
                | SpoolError::Io(..)
                | SpoolError::Damaged(..)
                | SpoolError::Unfit(..)),
            ) => {
                warn!(%id, %error, "message {id} is not sent now: it cannot be marked on disk: {error}");
                self.stopped = Some(Stop::Disk);
                false
            }
        }
    }

    /// An attempt of a former run, or one that panicked, left its mark and nothing else.
    fn doubt(&mut self) {
        let sending = mem::take(&mut self.message.progress.sending);
        let pending: Vec<usize> = self.message.progress.pending().collect();
        self.changed = true;
        for rcpt in
            pending.into_iter().filter(|rcpt| sending.iter().any(|it| *it as usize == *rcpt))
        {
            let words = "the gateway ended while it was sending this";
            let cause = Cause::new(Scope::Message, Stage::Local, words);
            self.settle(rcpt, Outcome::Deferred(Cause { maybe_sent: true, ..cause }));
        }
    }

    /// What the part's outcomes say about the provider.
    fn judge(&mut self, outcomes: &[(usize, Outcome)]) {
        let (now, random) = (clock::now(), fastrand::f64());
        let causes = || outcomes.iter().filter_map(|(_, outcome)| outcome.cause());
        let wide = causes().find(|cause| cause.scope >= Scope::Sender);
        let certain = wide.filter(|cause| cause.is_certain());
        let suspect = wide.or_else(|| causes().find(|cause| cause.lost));
        let passed = outcomes.iter().any(|(_, outcome)| outcome.cause().is_none());
        let null_path = !passed && causes().any(|cause| cause.null_path);
        let local =
            causes().count() == outcomes.len() && causes().all(|cause| cause.stage == Stage::Local);
        // Refused a connection for now while others are served: the provider has no more to spare.
        let is_refusal = |outcome: &Outcome| match outcome {
            Outcome::Deferred(cause) => cause.stage < Stage::Mail && cause.retry_after.is_none(),
            Outcome::Held(cause) => cause.busy,
            Outcome::Delivered(_) | Outcome::Failed(_) => false,
        };
        let refused = outcomes.iter().any(|(_, outcome)| is_refusal(outcome));
        let most = self.shared.settings.concurrency;
        let mut gate = self.shared.gate();
        let (change, cause) = match (certain, suspect) {
            (_, Some(_)) if refused && gate.busy(self.pass, most, self.began, now) => {
                self.stopped = Some(Stop::Busy);
                (Change::Unchanged, None)
            }
            (Some(cause), _) => {
                self.stopped = Some(Stop::Trouble);
                (gate.trouble(self.pass, cause, now, random), Some(cause))
            }
            (None, Some(cause)) => {
                let change = gate.suspect(self.pass, self.id(), cause, now, random);
                // One message that breaks its connections while others pass does it on its own account.
                if wide.is_some() || gate.closed().is_some() {
                    self.stopped = Some(Stop::Suspicion);
                }
                (change, Some(cause))
            }
            // What is said over a null reverse path speaks neither against the account nor for it.
            (None, None) if null_path => {
                if outcomes.iter().any(|(_, outcome)| matches!(outcome, Outcome::Deferred(_))) {
                    self.stopped = Some(Stop::NullPath);
                }
                gate.says_nothing(self.pass, now, random);
                (Change::Unchanged, None)
            }
            (None, None) if local => {
                gate.unclear(self.pass, now);
                (Change::Unchanged, None)
            }
            (None, None) => {
                let answer = if passed { gate::Answer::Taken } else { gate::Answer::Spoken };
                let change = gate.answered(self.pass, answer, now);
                // Of a trouble of a former run this one knows by its notice alone.
                if gate.closed().is_none() {
                    self.shared.desk().answered(answer, now, clock::wall());
                }
                (change, None)
            }
        };
        drop(gate);
        self.shared.tell(change, cause);
        // Only the first part of an attempt is the probe.
        self.pass = Pass::Free;
    }

    fn settle(&mut self, rcpt: usize, outcome: Outcome) {
        let was_in_doubt = self.was_in_doubt(rcpt);
        let outcome = match outcome {
            Outcome::Deferred(cause) if cause.maybe_sent && self.holds_doubt(rcpt) => {
                Outcome::Held(cause)
            }
            Outcome::Failed(cause) if self.may_be_named(&cause) => {
                self.message.progress.named = true;
                Outcome::Deferred(cause)
            }
            Outcome::Delivered(_)
            | Outcome::Deferred(_)
            | Outcome::Failed(_)
            | Outcome::Held(_) => outcome,
        };
        let metrics = &self.shared.metrics;
        metrics.settle(&outcome);
        if outcome.cause().is_some_and(|cause| cause.maybe_sent) {
            metrics.in_doubt.inc();
            self.doubted = true;
            if !was_in_doubt {
                self.message.progress.doubtful.extend(u32::try_from(rcpt));
            }
        }
        self.tell(rcpt, &outcome, was_in_doubt);
        let envelope = &self.message.envelope;
        let notify = envelope.rcpts.get(rcpt).map(|rcpt| rcpt.notify);
        if notify.is_some_and(|notify| reports::is_due(envelope.kind, notify, &outcome)) {
            self.message.progress.untold.extend(u32::try_from(rcpt));
        }
        let status = match outcome {
            Outcome::Delivered(receipt) => {
                metrics.last_success.set(seconds(clock::wall()));
                metrics.recipients.with_label_values(&["delivered"]).inc();
                self.changed = true;
                RcptStatus::Delivered(receipt)
            }
            Outcome::Failed(cause) => {
                metrics.recipients.with_label_values(&["failed"]).inc();
                self.changed = true;
                RcptStatus::Failed(cause)
            }
            Outcome::Deferred(cause) => {
                if cause.scope <= Scope::Message {
                    self.deferred.push(rcpt);
                }
                RcptStatus::Pending { last: Some(cause) }
            }
            Outcome::Held(cause) => {
                self.held |= cause.scope <= Scope::Message;
                RcptStatus::Pending { last: Some(cause) }
            }
        };
        if let Some(slot) = self.message.progress.rcpts.get_mut(rcpt) {
            *slot = status;
        }
    }

    fn doubtful(&self) -> Vec<usize> {
        self.message.progress.doubtful.iter().filter_map(|it| usize::try_from(*it).ok()).collect()
    }

    /// Whether an attempt for the recipient may have reached it.
    fn was_in_doubt(&self, rcpt: usize) -> bool {
        self.message.progress.doubtful.iter().any(|it| *it as usize == rcpt)
    }

    /// Whether a doubt about the recipient now is for an operator. After a second one, a third try would make a habit of
    /// it.
    fn holds_doubt(&self, rcpt: usize) -> bool {
        match self.shared.settings.retry.in_doubt {
            InDoubt::Hold => true,
            InDoubt::Retry => self.was_in_doubt(rcpt),
        }
    }

    /// One event per recipient and outcome.
    fn tell(&self, rcpt: usize, outcome: &Outcome, was_in_doubt: bool) {
        let id = self.id();
        let Some(rcpt) = self.message.envelope.rcpts.get(rcpt) else { return };
        let to = Escaped(rcpt.path.as_str().as_bytes());
        match outcome {
            Outcome::Delivered(receipt) => {
                let words = &receipt.words;
                info!(event = "delivered", %id, %to, %words, "message {id} delivered to <{to}>: {words}");
            }
            Outcome::Deferred(cause) if cause.maybe_sent => {
                let (scope, stage) = (cause.scope.label(), cause.stage.label());
                warn!(event = "in_doubt", %id, %to, scope, stage, words = %cause.words, "message {id} for <{to}> may have been taken: {cause}; it is sent once more, after retry.in_doubt_after");
            }
            Outcome::Deferred(cause) => {
                let (scope, stage) = (cause.scope.label(), cause.stage.label());
                info!(event = "deferred", %id, %to, scope, stage, words = %cause.words, "message {id} deferred for <{to}>: {cause}");
            }
            Outcome::Failed(cause) => {
                let (scope, stage) = (cause.scope.label(), cause.stage.label());
                let rest = match self.message.envelope.kind {
                    Kind::Mail => "its content stays in the spool",
                    Kind::Report | Kind::Notice => "it was a letter of the gateway's own",
                };
                error!(event = "failed", %id, %to, scope, stage, words = %cause.words, "message {id} failed for <{to}>: {cause}; {rest}");
            }
            Outcome::Held(cause) if cause.maybe_sent => {
                let (scope, stage) = (cause.scope.label(), cause.stage.label());
                match was_in_doubt {
                    true => {
                        error!(event = "held", %id, %to, scope, stage, words = %cause.words, "message {id} for <{to}> may have been taken twice: {cause}; it is not sent a third time and stays in the spool");
                    }
                    false => {
                        error!(event = "held", %id, %to, scope, stage, words = %cause.words, "message {id} for <{to}> may have been taken: {cause}; by retry.in_doubt it is not sent again and stays in the spool");
                    }
                }
            }
            Outcome::Held(cause) => {
                let (scope, stage) = (cause.scope.label(), cause.stage.label());
                warn!(event = "held", %id, %to, scope, stage, words = %cause.words, "message {id} for <{to}> waits: {cause}");
            }
        }
    }

    /// Writes what became of the message and says when it is tried again.
    async fn conclude(mut self) -> Ended {
        if let Some(ended) = self.gone.take() {
            // Who held it may not have known of the parts before. It stays held.
            if let Ended::Held = ended {
                self.put_down().await;
            }
            return ended;
        }
        let (now, wall) = (clock::now(), clock::wall());
        let retry = &self.shared.settings.retry;
        let own = !self.deferred.is_empty() && self.stopped.is_none();
        if own {
            let progress = &mut self.message.progress;
            // Where the clock has stepped back behind it, the span begins anew.
            let first = progress.first_deferral.map_or(wall, |first| first.min(wall));
            progress.first_deferral = Some(first);
            if !self.held && retry::gives_up(retry, progress.attempts, first, wall) {
                self.give_up(wall.since(first));
            }
        }
        let id = self.id();
        let enclosed = self.enclose(own && !self.held, wall).await;
        if self.message.progress.pending().next().is_none() {
            return self.end(wall, enclosed).await;
        }
        if self.held {
            let progress = &self.message.progress;
            let hold = || Op::Hold { id, progress: progress.clone() };
            return self.write_with(hold, enclosed).await.unwrap_or(Ended::Held);
        }
        let closed_until = self.shared.gate().closed().map(|(_, until)| until);
        let at = match (self.stopped, closed_until) {
            (Some(Stop::Busy), _) => now + BUSY_PAUSE,
            (Some(Stop::Disk), _) => now + retry.first,
            // Not before the next probe, so that whatever came or fell due meanwhile is the probe: a different message
            // each time, and a new one before those that have failed.
            (Some(Stop::Trouble), until) => until.unwrap_or(now).max(now),
            (Some(Stop::Suspicion), Some(until)) => until.max(now + retry.first),
            // Its own deferral; or the account was refused over this message alone, while others pass: then it comes
            // back ever more rarely, and is never given up for it.
            (None | Some(Stop::NullPath), _) | (Some(Stop::Suspicion), None) => {
                let progress = &mut self.message.progress;
                progress.attempts = progress.attempts.saturating_add(1);
                let delay = retry::delay(retry, progress.attempts, fastrand::f64());
                progress.due = wall.plus(delay);
                self.changed = true;
                now + delay
            }
        };
        // The remote may still be at it. The message has one due, so all that is left of it waits.
        let at = match self.doubted {
            true => {
                let progress = &mut self.message.progress;
                progress.due = progress.due.max(wall.plus(retry.in_doubt_after));
                at.max(now + retry.in_doubt_after)
            }
            false => at,
        };
        match enclosed {
            Some(enclosed) => {
                let progress = &self.message.progress;
                let update = || Op::Update { id, progress: progress.clone() };
                self.write_with(update, Some(enclosed)).await.unwrap_or(Ended::Again(at))
            }
            None => {
                self.put_down().await;
                Ended::Again(at)
            }
        }
    }

    /// Writes how far the message has come. Where nothing counts, nothing changes but that the mark goes, and what is in
    /// doubt.
    async fn put_down(&self) {
        if !(self.changed || self.marked || self.doubted) {
            return;
        }
        let id = self.id();
        let progress = match self.changed {
            true => self.message.progress.clone(),
            false => {
                let Progress { due, doubtful, .. } = &self.message.progress;
                Progress { due: *due, doubtful: doubtful.clone(), ..self.before.clone() }
            }
        };
        self.write(|| Op::Update { id, progress: progress.clone() }, Durability::Lazy).await;
    }

    /// Nothing is pending any more.
    async fn end(&self, wall: UnixMillis, enclosed: Option<Enclosed>) -> Ended {
        let (id, progress) = (self.id(), &self.message.progress);
        let in_queue = wall.since(self.message.envelope.accepted);
        self.shared.metrics.time_in_queue.observe(in_queue.as_secs_f64());
        let has_failed = progress.rcpts.iter().any(|it| matches!(it, RcptStatus::Failed(_)));
        let fail = || Op::Fail { id, progress: progress.clone() };
        let done = || Op::Done { id };
        // Of our own letters nothing is kept.
        let postponed = match has_failed && self.message.envelope.kind == Kind::Mail {
            true => self.write_with(fail, enclosed).await,
            false => self.write_with(done, enclosed).await,
        };
        postponed.unwrap_or(Ended::Done)
    }

    /// Its own deferrals span more than `give_up_after`: the recipients that were deferred once more have failed, with
    /// the last words they got. One that was not tried for another's sake has its turn first, and what may have been taken
    /// is sent once more, however long it has waited.
    fn give_up(&mut self, span: Duration) {
        for rcpt in mem::take(&mut self.deferred) {
            let last = match self.message.progress.rcpts.get(rcpt) {
                Some(RcptStatus::Pending { last: Some(cause) }) if !cause.maybe_sent => {
                    cause.clone()
                }
                _ => continue,
            };
            let hours = span.as_secs() / 3600;
            let words = format!("given up after {hours} h of deferrals; last: {}", last.words);
            let outcome = Outcome::Failed(Cause { words: words.into(), ..last });
            self.settle(rcpt, outcome);
        }
    }

    /// A mark stays on disk until the log has its doubt: a process that is killed in between tells it once more at its
    /// next start. The other way round, a second copy could go out of which nobody ever heard.
    async fn doubt_is_told(&self) {
        if self.doubted {
            self.shared.log.wait().await;
        }
    }

    /// Writes one op, and tries until the disk takes it: an outcome that is not on disk would be sent again after a
    /// restart, so the attempt keeps its place until it is.
    async fn write(&self, op: impl Fn() -> Op + Send + Sync, durability: Durability) {
        self.doubt_is_told().await;
        loop {
            match self.shared.spool.apply(vec![op()], durability).await {
                Ok(())
                | Err(SpoolError::Closed | SpoolError::Unknown(_) | SpoolError::Refused(..)) => {
                    return;
                }
                Err(error) => {
                    let id = self.id();
                    error!(%id, %error, "the outcome of message {id} cannot be written: {error}; trying again");
                }
            }
            tokio::time::sleep(DISK_RETRY).await;
        }
    }
}

fn seconds(at: UnixMillis) -> f64 {
    Duration::from_millis(at.0).as_secs_f64()
}

/// Runs a provider's future to its end, or to its panic: what it settled before counts, the rest is maybe sent.
async fn caught(mut future: BoxFuture<'_, ()>) {
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
        Ok(poll) => poll,
        Err(_panic) => Poll::Ready(()),
    })
    .await;
}

#[cfg(test)]
mod tests;
