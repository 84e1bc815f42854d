//! Sockets out: the one active provider.
//!
//! A provider gets one part of one message and says one outcome per recipient. It knows neither spool nor schedule nor
//! throttle, and turning what the remote answered into an outcome is a pure function (`answer.rs`).

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot};

use crate::envelope::Envelope;
use crate::message::outgoing::Message;
use crate::outcome::{Cause, Outcome, Scope, Stage};
use crate::smtp::address::ReversePath;

pub mod graph;
pub mod http;
pub mod smtp;
pub mod tls;
pub mod token;

/// A boxed future: one allocation an attempt buys `Arc<dyn Provider>`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What takes mail off our hands.
pub trait Provider: Send + Sync {
    /// What one part may carry.
    fn limits(&self) -> Limits;

    /// Sends one part. [`Outcomes::content_leaves`] comes before any of the content is handed over. Each recipient's
    /// outcome is settled as soon as it is final; one that no outcome names counts as deferred, and as maybe sent once
    /// the content was leaving. Dropping the future then leaves the part in doubt.
    fn deliver<'a>(
        &'a self,
        submission: &'a Submission,
        outcomes: &'a Outcomes,
    ) -> BoxFuture<'a, ()>;

    /// Takes leave of the remote, in bounded time. Deliveries may still run.
    fn close(&self) -> BoxFuture<'_, ()>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Recipients per part, at least 1.
    pub recipients: usize,
}

/// What a provider is handed: an envelope, the part of its recipients, and the message as the sender policy made it.
#[derive(Clone, Debug)]
pub struct Submission {
    pub envelope: Arc<Envelope>,
    /// Where reports go: the envelope's, unless the sender policy put another in its place.
    pub reverse_path: ReversePath,
    /// Positions in `envelope.rcpts`, at most `limits().recipients` of them, at least one.
    pub part: Vec<usize>,
    /// Those of all recipients that a former attempt may have reached.
    pub doubtful: Vec<usize>,
    pub message: Message,
}

/// The outcomes of one part, one for each recipient of it.
#[derive(Debug)]
pub struct Outcomes {
    /// None for a recipient that is left for another part.
    settled: Mutex<Vec<(usize, Option<Outcome>)>>,
    leaving: Option<mpsc::Sender<oneshot::Sender<()>>>,
    has_left: AtomicBool,
}

/// Hears of it before the content leaves, and lets it go. Who drops what it heard must drop the delivery too.
pub type Leaving = mpsc::Receiver<oneshot::Sender<()>>;

impl Outcomes {
    pub fn new() -> Self {
        Self { settled: Mutex::default(), leaving: None, has_left: AtomicBool::new(false) }
    }

    /// With someone who wants to know before the content leaves.
    pub fn watched() -> (Self, Leaving) {
        let (tell, leaving) = mpsc::channel(1);
        (Self { leaving: Some(tell), ..Self::new() }, leaving)
    }

    /// Returns when the content may leave: whoever keeps the message has marked it, so that an end without any outcome
    /// is known to be a doubt.
    pub async fn content_leaves(&self) {
        if let Some(leaving) = &self.leaving {
            let (tell, may_leave) = oneshot::channel();
            let asked = leaving.send(tell).await.is_ok();
            // Where nobody answers any more, this delivery is about to be dropped, and nothing of it may leave.
            if !asked || may_leave.await.is_err() {
                return std::future::pending().await;
            }
        }
        self.has_left.store(true, Ordering::SeqCst);
    }

    /// Says what became of the recipient at `rcpt` (a position in the envelope). The first word counts.
    pub fn settle(&self, rcpt: usize, outcome: Outcome) {
        self.say(rcpt, Some(outcome));
    }

    /// Says that the recipient was not sent to, because the remote took enough others: it is for another part, at once.
    /// At least one recipient of the part must have an outcome then.
    pub fn leave(&self, rcpt: usize) {
        self.say(rcpt, None);
    }

    fn say(&self, rcpt: usize, outcome: Option<Outcome>) {
        let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        if !settled.iter().any(|(at, _)| *at == rcpt) {
            settled.push((rcpt, outcome));
        }
    }

    /// Those of `part` of which nothing was said.
    pub fn unsaid(&self, part: &[usize]) -> Vec<usize> {
        let settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        let is_unsaid = |rcpt: &usize| !settled.iter().any(|(at, _)| at == rcpt);
        part.iter().copied().filter(is_unsaid).collect()
    }

    /// Those that are left for another part, in the order in which that was said.
    pub fn left(&self) -> Vec<usize> {
        let settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        settled.iter().filter(|(_, outcome)| outcome.is_none()).map(|(rcpt, _)| *rcpt).collect()
    }

    /// One outcome for each recipient of `part` that is not left for another one, in its order.
    pub fn take(&self, part: &[usize]) -> Vec<(usize, Outcome)> {
        let mut settled =
            std::mem::take(&mut *self.settled.lock().unwrap_or_else(PoisonError::into_inner));
        let unsaid = || {
            let cause =
                Cause::new(Scope::Message, Stage::Local, "the attempt ended without an answer");
            Outcome::Deferred(Cause { maybe_sent: self.has_left.load(Ordering::SeqCst), ..cause })
        };
        let mut find = |rcpt: usize| match settled.iter().position(|(at, _)| *at == rcpt) {
            Some(at) => settled.swap_remove(at).1,
            None => Some(unsaid()),
        };
        part.iter().filter_map(|rcpt| Some((*rcpt, find(*rcpt)?))).collect()
    }
}
