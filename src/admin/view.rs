//! What is told of messages, as JSON. Pure.

use serde::Serialize;

use crate::admin::filter::State;
use crate::clock::Time;
use crate::delivery::operator::{self, Answer, Look};
use crate::envelope::{Head, Progress, Rcpt, RcptStatus, SpoolId, UnixMillis};
use crate::outcome::Cause;
use crate::spool::{SpoolError, Stored};

/// Recipients that a listing shows of a message.
const SHOWN: usize = 3;

/// A message in a listing.
#[derive(Debug, Serialize)]
pub(super) struct Item {
    pub id: String,
    pub state: State,
    pub in_doubt: bool,
    pub accepted: String,
    pub due: String,
    pub age_seconds: u64,
    pub size_bytes: u64,
    pub attempts: u16,
    pub lane: String,
    /// How many are still to be delivered to.
    pub pending: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipients: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The first of them: those still pending, then those that failed, then the others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<String>,
    /// What was last said of one of these.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<String>,
    /// Why the message cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What is known of all messages alike.
#[derive(Clone, Copy, Debug)]
pub(super) struct Surroundings<'a> {
    pub look: &'a Look,
    pub lane: &'a str,
    pub now: UnixMillis,
}

impl Item {
    pub(super) fn new(
        head: &Head,
        read: Result<&Stored, &SpoolError>,
        around: Surroundings<'_>,
    ) -> Self {
        let stored = read.ok();
        let accepted = stored.map_or(head.id.accepted(), |stored| stored.envelope.accepted);
        let mut rcpts: Vec<_> = stored
            .map(|stored| stored.envelope.rcpts.iter().zip(&stored.progress.rcpts).collect())
            .unwrap_or_default();
        rcpts.sort_by_key(|(_, status)| match status {
            RcptStatus::Pending { .. } => 0,
            RcptStatus::Failed(_) => 1,
            RcptStatus::Delivered(_) => 2,
        });
        let cause = rcpts.iter().find_map(|(_, status)| cause(status));
        Self {
            id: head.id.to_string(),
            state: State::of(head, around.look, around.now),
            in_doubt: stored
                .map_or(head.in_doubt, |stored| is_in_doubt(head, &stored.progress, around.look)),
            accepted: Time(accepted).to_string(),
            due: Time(head.due).to_string(),
            age_seconds: around.now.since(accepted).as_secs(),
            size_bytes: head.size,
            attempts: head.attempts,
            lane: around.lane.to_owned(),
            pending: head.pending,
            recipients: stored.map(|stored| stored.envelope.rcpts.len()),
            from: stored.map(|stored| stored.envelope.reverse_path.as_str().to_owned()),
            to: rcpts.iter().take(SHOWN).map(|(rcpt, _)| rcpt.path.as_str().to_owned()).collect(),
            last: cause.map(ToString::to_string),
            error: read.err().map(ToString::to_string),
        }
    }
}

/// All that is known of a message.
#[derive(Debug, Serialize)]
pub(super) struct Story {
    #[serde(flatten)]
    pub item: Item,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub helo: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub envid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_deferral: Option<String>,
    pub rcpts: Vec<Recipient>,
    /// What comes next, when and why: a sentence.
    pub next: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Recipient {
    pub to: String,
    /// `pending`, `delivered` or `failed`.
    pub state: &'static str,
    /// What the remote said last, escaped as in the log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub words: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scope: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<&'static str>,
    /// An attempt may have reached it without a word about it.
    pub in_doubt: bool,
}

impl Story {
    pub(super) fn new(head: &Head, stored: &Stored, around: Surroundings<'_>) -> Self {
        let item = Item::new(head, Ok(stored), around);
        let Stored { envelope, progress, .. } = stored;
        let next = next(head, progress, item.state, around);
        let rcpts = envelope.rcpts.iter().zip(&progress.rcpts).zip(0..);
        Self {
            client: Some(envelope.client.address.to_string()),
            helo: Some(envelope.client.helo.to_string()),
            author: envelope.author.as_ref().map(|author| author.as_str().to_owned()),
            envid: envelope.envid.as_deref().map(str::to_owned),
            first_deferral: progress.first_deferral.map(|at| Time(at).to_string()),
            rcpts: rcpts
                .map(|((rcpt, status), at)| {
                    Recipient::new(rcpt, status, progress.doubtful.contains(&at))
                })
                .collect(),
            next,
            item,
        }
    }

    /// Of a message that cannot be read back: what is known without.
    pub(super) fn damaged(head: &Head, error: &SpoolError, around: Surroundings<'_>) -> Self {
        Self {
            item: Item::new(head, Err(error), around),
            client: None,
            helo: None,
            author: None,
            envid: None,
            first_deferral: None,
            rcpts: Vec::new(),
            next: format!("nothing: {}", operator::damaged(error)),
        }
    }
}

impl Recipient {
    fn new(rcpt: &Rcpt, status: &RcptStatus, in_doubt: bool) -> Self {
        let (state, words) = match status {
            RcptStatus::Pending { last } => ("pending", last.as_ref().map(|cause| &cause.words)),
            RcptStatus::Delivered(receipt) => ("delivered", Some(&receipt.words)),
            RcptStatus::Failed(cause) => ("failed", Some(&cause.words)),
        };
        let cause = cause(status);
        Self {
            to: rcpt.path.as_str().to_owned(),
            state,
            words: words.map(ToString::to_string),
            scope: cause.map(|cause| cause.scope.label()),
            stage: cause.map(|cause| cause.stage.label()),
            in_doubt,
        }
    }
}

fn cause(status: &RcptStatus) -> Option<&Cause> {
    match status {
        RcptStatus::Pending { last } => last.as_ref(),
        RcptStatus::Delivered(_) => None,
        RcptStatus::Failed(cause) => Some(cause),
    }
}

/// [`operator::is_in_doubt`], as it looks now.
pub(super) fn is_in_doubt(head: &Head, progress: &Progress, look: &Look) -> bool {
    operator::is_in_doubt(head, progress, look.in_flight.binary_search(&head.id).is_ok())
}

fn next(head: &Head, progress: &Progress, state: State, around: Surroundings<'_>) -> String {
    let due = Time(head.due);
    match (state, &around.look.obstacle) {
        (State::InFlight, _) => "it is being sent now".to_owned(),
        (State::Failed, _) => {
            "nothing: it has failed, and is kept for a while; `queue retry` queues it again"
                .to_owned()
        }
        (State::Held, _) => {
            let doubt = match is_in_doubt(head, progress, around.look) {
                true => ", and may have been taken already",
                false => "",
            };
            // Why it waits is not what a recipient has failed for.
            let mut pending =
                progress.rcpts.iter().filter(|it| matches!(it, RcptStatus::Pending { .. }));
            let last = pending.find_map(cause);
            let last = last.map(|cause| format!("; last was said: {cause}")).unwrap_or_default();
            format!("nothing until `queue release`: it is held{doubt}{last}")
        }
        (State::Deferred, None) => {
            format!("it is tried again at {due}, after {} deferrals", head.attempts)
        }
        (State::Deferred, Some(obstacle)) => format!("it is due at {due}, but {obstacle}"),
        (State::Due | State::Queued | State::InDoubt, None) => {
            "it is due, and sent when its turn comes".to_owned()
        }
        (State::Due | State::Queued | State::InDoubt, Some(obstacle)) => {
            format!("it is due, but {obstacle}")
        }
    }
}

const DOUBT: &str = "it may have been taken already, and was left alone: look at `queue show`, then name it by its id, or \
                     all of them by the state in_doubt";

/// What a verb came to for one message.
#[derive(Debug, Serialize)]
pub(super) struct Changed {
    pub id: String,
    /// `done`, `not_found`, `busy`, `not_now`, `in_doubt`, `damaged` or `error`.
    pub result: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Changed {
    pub(super) fn new(id: SpoolId, answer: Answer) -> Self {
        let (result, why) = match answer {
            Answer::Done => ("done", None),
            Answer::NotFound => ("not_found", Some("no such message".to_owned())),
            Answer::Busy(why) => ("busy", Some(why.to_owned())),
            Answer::NotNow(why) => ("not_now", Some(why.to_owned())),
            Answer::InDoubt => ("in_doubt", Some(DOUBT.to_owned())),
            Answer::Damaged(why) => ("damaged", Some(why)),
            Answer::Error(why) => ("error", Some(why)),
        };
        Self { id: id.to_string(), result, why }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::QueueState;
    use crate::outcome::{Receipt, Scope, Stage};

    fn said(words: &str) -> Cause {
        Cause::new(Scope::Recipient, Stage::Rcpt, words)
    }

    fn told(state: State, progress: &Progress) -> String {
        let (id, due) = (SpoolId::from_u128(1), UnixMillis(0));
        let head = Head {
            id,
            state: QueueState::Held,
            due,
            size: 1,
            pending: 1,
            attempts: 2,
            in_doubt: false,
        };
        let look = Look::default();
        next(&head, progress, state, Surroundings { look: &look, lane: "", now: due })
    }

    /// A recipient that had failed long ago was given as the reason.
    #[test]
    fn why_a_message_is_held_is_what_was_said_of_a_pending_recipient() {
        let failed = RcptStatus::Failed(said("550 5.1.1 no such user"));
        let pending = RcptStatus::Pending { last: Some(said("550 5.7.60 not as this sender")) };
        let delivered = RcptStatus::Delivered(Receipt::new("250 ok"));
        let with = |rcpts| Progress { rcpts, ..Progress::new(UnixMillis(0), 0) };
        let next = told(State::Held, &with(vec![delivered, failed.clone(), pending.clone()]));
        assert!(next.contains("5.7.60") && !next.contains("5.1.1"), "{next}");
        let next = told(State::Held, &with(vec![failed, RcptStatus::Pending { last: None }]));
        assert_eq!(next, "nothing until `queue release`: it is held");
        let doubtful = Progress { doubtful: vec![0], ..with(vec![pending]) };
        let next = told(State::Held, &doubtful);
        assert!(next.contains("held, and may have been taken already; last was said"), "{next}");
    }
}
