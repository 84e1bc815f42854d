//! Sockets out: the one active provider.
//!
//! A provider gets one part of one message and says one outcome per recipient. It knows neither spool nor schedule nor
//! throttle, and turning what the remote answered into an outcome is a pure function (`answer.rs`).

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use crate::envelope::{Body, Envelope};
use crate::outcome::{Cause, Outcome, Scope, Stage};

pub mod smtp;

/// A boxed future: one allocation an attempt buys `Arc<dyn Provider>`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What takes mail off our hands.
pub trait Provider: Send + Sync {
    /// What one part may carry.
    fn limits(&self) -> Limits;

    /// Sends one part. Each recipient's outcome is settled as soon as it is final; one that no outcome names counts as
    /// deferred, maybe sent. Dropping the future may leave the part in doubt.
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

/// What a provider is handed: an envelope, the part of its recipients, and the content.
#[derive(Clone, Debug)]
pub struct Submission {
    pub envelope: Arc<Envelope>,
    /// Positions in `envelope.rcpts`, at most `limits().recipients` of them, at least one.
    pub part: Vec<usize>,
    /// The content as stored; `envelope.prepend` goes before it.
    pub body: Body,
}

/// The outcomes of one part, one for each recipient of it.
#[derive(Debug)]
pub struct Outcomes {
    settled: Mutex<Vec<(usize, Outcome)>>,
}

impl Outcomes {
    pub fn new() -> Self {
        Self { settled: Mutex::new(Vec::new()) }
    }

    /// Says what became of the recipient at `rcpt` (a position in the envelope). The first word counts.
    pub fn settle(&self, rcpt: usize, outcome: Outcome) {
        let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        if !settled.iter().any(|(at, _)| *at == rcpt) {
            settled.push((rcpt, outcome));
        }
    }

    /// One outcome for each recipient of `part`, in its order.
    pub fn take(&self, part: &[usize]) -> Vec<(usize, Outcome)> {
        let mut settled =
            std::mem::take(&mut *self.settled.lock().unwrap_or_else(PoisonError::into_inner));
        let unsaid = || {
            let cause =
                Cause::new(Scope::Message, Stage::Local, "the attempt ended without an answer");
            Outcome::Deferred(Cause { maybe_sent: true, ..cause })
        };
        let mut find = |rcpt: usize| match settled.iter().position(|(at, _)| *at == rcpt) {
            Some(at) => settled.swap_remove(at).1,
            None => unsaid(),
        };
        part.iter().map(|rcpt| (*rcpt, find(*rcpt))).collect()
    }
}
