//! What is told of messages, as JSON. Pure.

use serde::Serialize;

use crate::admin::filter::State;
use crate::clock::Time;
use crate::delivery::operator::{Answer, Closed, Look};
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
    /// The first of them, those still pending or failed before the others.
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
        rcpts.sort_by_key(|(_, status)| matches!(status, RcptStatus::Delivered(_)));
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
    pub client: String,
    pub helo: String,
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
            client: envelope.client.address.to_string(),
            helo: envelope.client.helo.to_string(),
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

/// Whether some recipient may have been reached without a word about it. A mark of an attempt that goes on says nothing.
pub(super) fn is_in_doubt(head: &Head, progress: &Progress, look: &Look) -> bool {
    let is_in_flight = look.in_flight.binary_search(&head.id).is_ok();
    head.in_doubt || !progress.doubtful.is_empty() || !(progress.sending.is_empty() || is_in_flight)
}

fn next(head: &Head, progress: &Progress, state: State, around: Surroundings<'_>) -> String {
    let closed = around.look.closed.as_ref();
    let wait = |closed: &Closed| {
        format!(
            "the provider is closed since {}: {}; it is probed from {} on",
            Time(closed.since),
            closed.why,
            Time(closed.until)
        )
    };
    match (state, closed) {
        (State::InFlight, _) => "it is being sent now".to_owned(),
        (State::Failed, _) => {
            "nothing: it has failed, and is kept for a while; `queue retry` queues it again"
                .to_owned()
        }
        (State::Held, _) => match progress.rcpts.iter().find_map(cause) {
            Some(cause) => {
                format!("nothing until `queue release`: it is held; last was said: {cause}")
            }
            None => "nothing until `queue release`: it is held".to_owned(),
        },
        (State::Deferred, None) => {
            format!("it is tried again at {}, after {} deferrals", Time(head.due), head.attempts)
        }
        (State::Deferred, Some(closed)) => {
            format!("it is due at {}, but {}", Time(head.due), wait(closed))
        }
        (State::Due | State::Queued | State::InDoubt, None) => {
            "it is due, and sent when its turn comes".to_owned()
        }
        (State::Due | State::Queued | State::InDoubt, Some(closed)) => {
            format!("it is due, but {}", wait(closed))
        }
    }
}

/// What a verb came to for one message.
#[derive(Debug, Serialize)]
pub(super) struct Changed {
    pub id: String,
    /// `done`, `not_found`, `busy`, `not_now` or `error`.
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
            Answer::Error(why) => ("error", Some(why)),
        };
        Self { id: id.to_string(), result, why }
    }
}
