//! What an operator does to messages. It goes through the dispatcher, which owns their order, so that nothing is being sent
//! while it is changed.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use crate::clock::{self, Time};
use crate::delivery::gate::Gate;
use crate::envelope::{Head, Progress, QueueState, Rcpt, RcptStatus, SpoolId, UnixMillis};
use crate::metrics::Metrics;
use crate::outcome::{Cause, Outcome, Scope, Stage};
use crate::smtp::reply::Escaped;
use crate::spool::{Durability, Op, Spool, SpoolError, Stored};
use crate::telemetry::Written;

/// Requests that wait. As many ask at once as have a connection; more wait for a place here.
const WAITING: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Due now; what was held is released, what has failed is queued again.
    Retry,
    /// It waits until it is released.
    Hold,
    /// What was held is queued again, and due.
    Release,
    /// It leaves the spool, whatever its state.
    Delete,
}

/// What came of a verb for one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    NotFound,
    /// It is being sent, or was accepted this moment. Nothing was changed; the words say what to do.
    Busy(&'static str),
    /// It is not in a state for this; why.
    NotNow(&'static str),
    /// It may have been taken, and nobody has said that it is to be sent all the same.
    InDoubt,
    /// It cannot be read back; why, and what to do.
    Damaged(String),
    /// It could not be read or written.
    Error(String),
}

/// What a verb does to those that a filter finds and that may have been taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubts {
    /// What would send them leaves them alone.
    Spare,
    /// They are meant.
    Take,
}

/// What is said of a message that cannot be read back.
pub fn damaged(error: &SpoolError) -> String {
    format!(
        "{error}; it stays in the spool and is not tried. While the gateway is down, `mailsluice spool verify` says what \
         is damaged; `mailsluice queue delete` takes the message out of the spool"
    )
}

/// Whether some recipient may have been reached without a word about it. A mark of an attempt that goes on says nothing.
pub fn is_in_doubt(head: &Head, progress: &Progress, is_in_flight: bool) -> bool {
    head.in_doubt || progress.is_doubtful() || !(progress.sending.is_empty() || is_in_flight)
}

/// What is under way, for who shows it.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// In the order of their ids.
    pub in_flight: Vec<SpoolId>,
    /// Queued on disk, but they cannot be read back and are not tried; in the order of their ids.
    pub unreadable: Vec<SpoolId>,
    pub obstacle: Option<Obstacle>,
}

/// Why nothing goes to a provider now.
#[derive(Clone, Debug)]
pub enum Obstacle {
    NoProvider,
    Closed(Closed),
}

#[derive(Clone, Debug)]
pub struct Closed {
    pub why: Cause,
    pub since: UnixMillis,
    /// No probe before.
    pub until: UnixMillis,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoProvider => {
                f.write_str("no provider is set, and mail is kept until there is one")
            }
            Self::Closed(Closed { why, since, until }) => {
                let (since, until) = (Time(*since), Time(*until));
                write!(
                    f,
                    "the provider is closed since {since}: {why}; it is probed from {until} on"
                )
            }
        }
    }
}

/// The dispatcher is ending, and changes nothing any more; or it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopping;

impl fmt::Display for Stopping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the gateway is stopping; ask again when it has been started")
    }
}

pub(super) enum Request {
    Look(oneshot::Sender<Look>),
    Change(Change),
}

pub(super) struct Change {
    pub(super) verb: Verb,
    pub(super) doubts: Doubts,
    /// With the head that a filter took it by, where one did.
    pub(super) ids: Vec<(SpoolId, Option<Head>)>,
    pub(super) reply: oneshot::Sender<Vec<(SpoolId, Answer)>>,
}

/// The handle by which others ask the dispatcher.
#[derive(Clone, Debug)]
pub struct Operator(mpsc::Sender<Request>);

/// The dispatcher's end of it.
#[derive(Debug)]
pub struct Requests(mpsc::Receiver<Request>);

pub fn channel() -> (Operator, Requests) {
    let (ask, asked) = mpsc::channel(WAITING);
    (Operator(ask), Requests(asked))
}

impl Requests {
    pub(super) async fn next(&mut self) -> Option<Request> {
        self.0.recv().await
    }
}

impl Operator {
    pub async fn look(&self) -> Result<Look, Stopping> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Look(reply)).await?;
        answer.await.map_err(|_gone| Stopping)
    }

    /// Does the verb to each message, in order. Whoever gives up waiting does not undo it. The schedule is looked through
    /// once for all of `ids`.
    pub async fn change(
        &self,
        verb: Verb,
        ids: Vec<SpoolId>,
    ) -> Result<Vec<(SpoolId, Answer)>, Stopping> {
        let ids = ids.into_iter().map(|id| (id, None)).collect();
        self.change_all(verb, ids, Doubts::Take).await
    }

    /// The same for what a filter has found: a message that has changed since it was looked at is left alone, for the
    /// filter may not mean it any more.
    pub async fn change_found(
        &self,
        verb: Verb,
        found: Vec<Head>,
        doubts: Doubts,
    ) -> Result<Vec<(SpoolId, Answer)>, Stopping> {
        let ids = found.into_iter().map(|head| (head.id, Some(head))).collect();
        self.change_all(verb, ids, doubts).await
    }

    async fn change_all(
        &self,
        verb: Verb,
        ids: Vec<(SpoolId, Option<Head>)>,
        doubts: Doubts,
    ) -> Result<Vec<(SpoolId, Answer)>, Stopping> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Change(Change { verb, doubts, ids, reply })).await?;
        answer.await.map_err(|_gone| Stopping)
    }

    async fn ask(&self, request: Request) -> Result<(), Stopping> {
        self.0.send(request).await.map_err(|_gone| Stopping)
    }
}

/// What is in the way while there is a provider.
pub(super) fn closed(gate: &Gate, now: Instant, wall: UnixMillis) -> Option<Closed> {
    let (why, until) = gate.closed()?;
    let ago = now.saturating_duration_since(gate.closed_since()?);
    let ago = u64::try_from(ago.as_millis()).unwrap_or(u64::MAX);
    Some(Closed {
        why: why.clone(),
        since: UnixMillis(wall.0.saturating_sub(ago)),
        until: wall.plus(until.saturating_duration_since(now)),
    })
}

/// What a message is to the schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Queued, and due then.
    Due(Instant),
    /// Queued, and kept back until an outage ends; not tried before then.
    Kept(Instant),
    Held,
    /// Queued on disk, but it cannot be read back.
    Unreadable,
    /// Failed, or gone.
    Out,
}

impl Place {
    /// The place of a message that the spool says to be in `state` (none: it is gone). A verb that came to a bad end may
    /// have changed it all the same, and what is queued must be in the schedule.
    pub(super) fn agreeing_with(self, state: Option<QueueState>, now: Instant) -> Self {
        match (state, self) {
            (None | Some(QueueState::Failed), _) => Self::Out,
            (Some(QueueState::Held), _) => Self::Held,
            (Some(QueueState::Queued), Self::Due(at)) => Self::Due(at),
            (Some(QueueState::Queued), Self::Kept(at)) => Self::Kept(at),
            (Some(QueueState::Queued), Self::Unreadable) => Self::Unreadable,
            (Some(QueueState::Queued), Self::Held | Self::Out) => Self::Due(now),
        }
    }
}

/// A message that a verb is for. Nobody else changes it meanwhile.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) id: SpoolId,
    pub(super) was: Place,
    /// By which it was chosen.
    pub(super) judged: Option<Head>,
}

/// A verb that is being carried out: everything it needs, and nothing that waits for it.
pub(super) struct Work<S> {
    pub(super) spool: Arc<S>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) log: Written,
    pub(super) verb: Verb,
    pub(super) doubts: Doubts,
    /// What is in the way of whatever is due now.
    pub(super) obstacle: Option<Obstacle>,
}

impl<S: Spool> Work<S> {
    /// All that was done is durable when this returns.
    pub(super) async fn carry_out(self, subjects: Vec<Subject>) -> Vec<(SpoolId, Answer, Place)> {
        let last = subjects.last().map(|subject| subject.id);
        let mut done = Vec::with_capacity(subjects.len());
        let mut is_synced = true;
        for subject in subjects {
            let durability = match Some(subject.id) == last {
                true => Durability::Durable,
                false => Durability::Lazy,
            };
            let (answer, place) = self.one(&subject, durability, &mut is_synced).await;
            done.push((subject.id, answer, place));
        }
        // The last one syncs for those before it, unless there was nothing to write for it.
        if !is_synced {
            self.sync().await;
        }
        done
    }

    async fn sync(&self) {
        // It takes away what is not there.
        let nothing = Op::Note { key: "sync".into(), bytes: Vec::new() };
        if let Err(error) = self.spool.apply(vec![nothing], Durability::Durable).await {
            warn!(%error, "what an operator asked for is done, but a loss of power may undo it: {error}");
        }
    }

    async fn one(
        &self,
        subject: &Subject,
        durability: Durability,
        is_synced: &mut bool,
    ) -> (Answer, Place) {
        let (id, was) = (subject.id, subject.was);
        if subject.judged.is_some_and(|judged| self.spool.head(id) != Some(judged)) {
            let why = "it has changed since the filter looked at it, and was left alone; try again";
            return (Answer::Busy(why), was);
        }
        let Some(head) = self.spool.head(id) else { return (Answer::NotFound, Place::Out) };
        // What cannot be read is shown as held.
        if was != Place::Unreadable
            && let Some(why) = refusal(self.verb, head.state)
        {
            return (Answer::NotNow(why), was);
        }
        let mut unreported = Vec::new();
        let op = match self.verb {
            Verb::Delete => {
                // What has failed is told already; what cannot be read cannot be told of either.
                if head.state != QueueState::Failed
                    && let Ok(stored) = self.spool.open(id).await
                {
                    unreported = untold_failures(&stored.envelope.rcpts, &stored.progress);
                }
                Op::Delete { id }
            }
            Verb::Retry | Verb::Hold | Verb::Release => match self.spool.open(id).await {
                Ok(stored) if self.spares(&head, &stored) => return (Answer::InDoubt, was),
                // An attempt left its mark: the next one sees it, and does as retry.in_doubt says.
                Ok(stored) if self.verb == Verb::Retry && is_left_open(&stored, head.state) => {
                    self.tell(id);
                    return (Answer::Done, Place::Due(clock::now()));
                }
                Ok(stored) => self.change(stored, head.state).await,
                Err(SpoolError::Unknown(_)) => return (Answer::NotFound, Place::Out),
                Err(error @ SpoolError::Damaged(..)) => {
                    return (Answer::Damaged(damaged(&error)), was);
                }
                Err(error) => return (Answer::Error(error.to_string()), was),
            },
        };
        match self.spool.apply(vec![op], durability).await {
            Ok(()) => {
                *is_synced = durability == Durability::Durable;
                self.tell(id);
                for to in unreported {
                    warn!(event = "unreported", %id, kind = "failure", %to, "nobody is told that message {id} failed for <{to}>: an operator deleted it before there was room for a report");
                }
                let place = match self.verb {
                    Verb::Retry | Verb::Release => Place::Due(clock::now()),
                    Verb::Hold => Place::Held,
                    Verb::Delete => Place::Out,
                };
                (Answer::Done, place)
            }
            Err(SpoolError::Unknown(_)) => (Answer::NotFound, Place::Out),
            Err(error) => (Answer::Error(error.to_string()), was),
        }
    }

    fn spares(&self, head: &Head, stored: &Stored) -> bool {
        let sends = match self.verb {
            Verb::Retry | Verb::Release => true,
            Verb::Hold | Verb::Delete => false,
        };
        sends && self.doubts == Doubts::Spare && is_in_doubt(head, &stored.progress, false)
    }

    /// What is written: the progress as it was read, for nobody else writes meanwhile.
    async fn change(&self, stored: Stored, state: QueueState) -> Op {
        let id = stored.envelope.id;
        let mut progress = stored.progress;
        let doubted = fold_doubt(&mut progress);
        for cause in &doubted {
            self.metrics.settle(&Outcome::Deferred(cause.1.clone()));
            self.metrics.in_doubt.inc();
            let to = stored.envelope.rcpts.get(cause.0).map_or("", |rcpt| rcpt.path.as_str());
            let (to, cause) = (Escaped(to.as_bytes()), &cause.1);
            let (scope, stage) = (cause.scope.label(), cause.stage.label());
            warn!(event = "in_doubt", %id, %to, scope, stage, words = %cause.words, "message {id} for <{to}> may have been taken: {cause}");
        }
        if !doubted.is_empty() {
            self.log.wait().await;
        }
        match (self.verb, state) {
            (Verb::Hold, _) => Op::Hold { id, progress },
            (_, QueueState::Failed) => {
                Op::Requeue { id, progress: begun_anew(progress, clock::wall()) }
            }
            (_, QueueState::Held) => {
                progress.due = clock::wall();
                Op::Release { id, progress }
            }
            (_, QueueState::Queued) => {
                progress.due = clock::wall();
                Op::Update { id, progress }
            }
        }
    }

    fn tell(&self, id: SpoolId) {
        let waits =
            self.obstacle.as_ref().map(|it| format!("; it waits: {it}")).unwrap_or_default();
        match self.verb {
            Verb::Retry => {
                info!(event = "retried", %id, "message {id} is due now: an operator asked for it{waits}");
            }
            Verb::Hold => info!(event = "held", %id, "message {id} waits: an operator holds it"),
            Verb::Release => {
                info!(event = "released", %id, "message {id} is queued again and due: an operator released it{waits}");
            }
            Verb::Delete => {
                warn!(event = "deleted", %id, "message {id} is gone from the spool: an operator deleted it");
            }
        }
    }
}

/// Why the verb does not fit the state.
fn refusal(verb: Verb, state: QueueState) -> Option<&'static str> {
    match (verb, state) {
        (Verb::Hold, QueueState::Held) => Some("it is held already"),
        (Verb::Hold, QueueState::Failed) => Some("it has failed, and is not tried anyway"),
        (Verb::Release, QueueState::Queued) => Some("it is not held"),
        (Verb::Release, QueueState::Failed) => Some("it has failed; `retry` queues it again"),
        (Verb::Delete | Verb::Retry, _)
        | (Verb::Hold, QueueState::Queued)
        | (Verb::Release, QueueState::Held) => None,
    }
}

/// The recipients, escaped, whose failure is still to be reported.
fn untold_failures(rcpts: &[Rcpt], progress: &Progress) -> Vec<String> {
    let position = |at: &u32| usize::try_from(*at).ok();
    let failed = |at: &usize| matches!(progress.rcpts.get(*at), Some(RcptStatus::Failed(_)));
    let untold = progress.untold.iter().filter_map(position).filter(failed);
    let untold = untold.filter_map(|at| rcpts.get(at));
    untold.map(|rcpt| Escaped(rcpt.path.as_str().as_bytes()).to_string()).collect()
}

fn is_left_open(stored: &Stored, state: QueueState) -> bool {
    state == QueueState::Queued && !stored.progress.sending.is_empty()
}

/// An attempt left its mark and nothing else: whom it was for may have been reached. Their positions, and what is said of
/// it.
fn fold_doubt(progress: &mut Progress) -> Vec<(usize, Cause)> {
    let sending = std::mem::take(&mut progress.sending);
    let cause = || {
        let words = "the gateway ended while it was sending this";
        Cause { maybe_sent: true, ..Cause::new(Scope::Message, Stage::Local, words) }
    };
    let mut doubted = Vec::new();
    for at in sending {
        let position = usize::try_from(at).unwrap_or(usize::MAX);
        if let Some(status @ RcptStatus::Pending { .. }) = progress.rcpts.get_mut(position) {
            *status = RcptStatus::Pending { last: Some(cause()) };
            if !progress.doubtful.contains(&at) {
                progress.doubtful.push(at);
            }
            doubted.push((position, cause()));
        }
    }
    doubted
}

/// What failed is pending again, as if it had never been tried: an operator wants it sent, whatever was in doubt.
fn begun_anew(mut progress: Progress, now: UnixMillis) -> Progress {
    for (status, at) in progress.rcpts.iter_mut().zip(0..) {
        if let RcptStatus::Failed(cause) = status {
            *status = RcptStatus::Pending { last: Some(cause.clone()) };
            progress.doubtful.retain(|doubtful| *doubtful != at);
        }
    }
    progress.attempts = 0;
    progress.first_deferral = None;
    progress.warned = false;
    progress.due = now;
    progress
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Receipt;
    use crate::smtp::address::{Charset, ForwardPath};
    use crate::smtp::params::Notify;

    fn failed() -> RcptStatus {
        RcptStatus::Failed(Cause::new(Scope::Recipient, Stage::Rcpt, "550 no"))
    }

    fn pending() -> RcptStatus {
        RcptStatus::Pending { last: None }
    }

    #[test]
    fn a_doubt_that_is_settled_counts_no_more() {
        let delivered = RcptStatus::Delivered(Receipt::new("250 ok"));
        let pending = RcptStatus::Pending { last: None };
        let fresh = Progress::new(UnixMillis(0), 2);
        for (first, is_doubtful) in [(pending, true), (delivered, false)] {
            let rcpts = vec![first, RcptStatus::Pending { last: None }];
            let progress = Progress { rcpts, doubtful: vec![0], ..fresh.clone() };
            assert_eq!(progress.is_doubtful(), is_doubtful, "{progress:?}");
        }
    }

    #[test]
    fn what_failed_begins_anew_and_what_was_delivered_stays_so() {
        let delivered = RcptStatus::Delivered(Receipt::new("250 ok"));
        let before = Progress {
            attempts: 7,
            first_deferral: Some(UnixMillis(1)),
            rcpts: vec![delivered.clone(), failed(), pending()],
            doubtful: vec![0, 1],
            ..Progress::new(UnixMillis(0), 3)
        };
        let after = begun_anew(before, UnixMillis(9));
        assert_eq!((after.attempts, after.first_deferral, after.due), (0, None, UnixMillis(9)));
        assert_eq!(after.rcpts[0], delivered);
        assert_eq!(after.pending().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(after.doubtful, [0]);
    }

    #[test]
    fn a_mark_that_an_attempt_left_becomes_a_doubt_and_is_not_lost() {
        let mut progress = Progress {
            rcpts: vec![pending(), failed(), pending()],
            sending: vec![0, 1, 9],
            doubtful: vec![2],
            ..Progress::new(UnixMillis(0), 3)
        };
        let doubted = fold_doubt(&mut progress);
        assert_eq!(doubted.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0]);
        assert_eq!(progress.doubtful, [2, 0]);
        assert!(progress.sending.is_empty() && progress.rcpts[1] == failed());
        assert!(fold_doubt(&mut progress).is_empty());
    }

    /// A `delete` took the message before its report had room, and nobody heard of it.
    #[test]
    fn a_failure_that_was_not_told_is_named_when_its_message_is_deleted() {
        let rcpt = |path| Rcpt {
            path: ForwardPath::parse(path, Charset::Ascii).unwrap(),
            notify: Notify::Unsaid,
            orcpt: None,
        };
        let paths = ["a@example.org", "b@example.org", "c@example.org", "d@example.org"];
        let delivered = RcptStatus::Delivered(Receipt::new("250 ok"));
        let progress = Progress {
            rcpts: vec![failed(), failed(), delivered, failed()],
            untold: vec![1, 2, 3, 9],
            ..Progress::new(UnixMillis(0), 4)
        };
        let expected = ["b@example.org", "d@example.org"];
        assert_eq!(untold_failures(&paths.map(rcpt), &progress), expected);
    }

    #[test]
    fn whatever_a_verb_came_to_what_is_queued_is_in_the_schedule() {
        let now = clock::now();
        let later = Place::Due(now + std::time::Duration::from_secs(9));
        let check = |place: Place, expected: [Place; 4]| {
            let states = [QueueState::Queued, QueueState::Held, QueueState::Failed].map(Some);
            let states = states.into_iter().chain([None]);
            let places: Vec<_> = states.map(|state| place.agreeing_with(state, now)).collect();
            assert_eq!(places, expected, "{place:?}");
        };
        check(later, [later, Place::Held, Place::Out, Place::Out]);
        check(Place::Held, [Place::Due(now), Place::Held, Place::Out, Place::Out]);
        check(Place::Out, [Place::Due(now), Place::Held, Place::Out, Place::Out]);
        check(Place::Kept(now), [Place::Kept(now), Place::Held, Place::Out, Place::Out]);
        check(Place::Unreadable, [Place::Unreadable, Place::Held, Place::Out, Place::Out]);
    }

    #[test]
    fn each_verb_has_its_states() {
        let check = |verb, expected: [bool; 3]| {
            let states = [QueueState::Queued, QueueState::Held, QueueState::Failed];
            assert_eq!(states.map(|state| refusal(verb, state).is_none()), expected, "{verb:?}");
        };
        check(Verb::Retry, [true, true, true]);
        check(Verb::Hold, [true, false, false]);
        check(Verb::Release, [false, true, false]);
        check(Verb::Delete, [true, true, true]);
    }
}
