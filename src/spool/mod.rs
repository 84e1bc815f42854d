//! Disk: the spool keeps every accepted message until a provider has taken it.

use std::future::Future;
use std::io;

use crate::envelope::{Body, Envelope, Head, Progress, SpoolId};

/// A durable queue of messages. [`Spool::apply`] is the only way to change its state.
pub trait Spool: Send + Sync + 'static {
    /// A content that is being received.
    type Stage: Stage;

    /// Begins to take in a content. What is staged and never put is discarded.
    fn stage(&self) -> Self::Stage;

    /// All of `ops` or none, in order. With [`Durability::Durable`] they are on stable storage at `Ok`. After an error
    /// the messages of a `Put` are not in the spool, and the client may be told so.
    fn apply(
        &self,
        ops: Vec<Op>,
        durability: Durability,
    ) -> impl Future<Output = Result<(), SpoolError>> + Send;

    /// At most `n` heads in the order of their ids, from the first id after `after`.
    fn heads(&self, after: Option<SpoolId>, n: usize) -> Vec<Head>;

    /// Reads a message back.
    fn open(&self, id: SpoolId) -> impl Future<Output = Result<Stored, SpoolError>> + Send;

    fn health(&self) -> Health;

    /// Whether a message of `size` octets can be taken without going under the free-space floor.
    fn has_room_for(&self, size: u64) -> bool;
}

/// A content that is being received: chunks come in, [`Staged`] comes out.
pub trait Stage: Send {
    fn write(&mut self, chunk: &[u8]) -> impl Future<Output = Result<(), SpoolError>> + Send;

    /// The content is whole. It is durable as soon as the `Put` that names it is.
    fn finish(self) -> impl Future<Output = Result<Staged, SpoolError>> + Send;
}

/// A content that was taken in whole.
#[derive(Debug)]
pub enum Staged {
    /// It goes into the log with its record.
    Memory(Vec<u8>),
}

/// One change of state.
#[derive(Debug)]
pub enum Op {
    /// A new message.
    Put { envelope: Envelope, body: Staged },
    /// It was tried, and is to be tried again.
    Update { id: SpoolId, progress: Progress },
    /// It waits for an operator.
    Hold { id: SpoolId, progress: Progress },
    /// Nothing is left to try, and at least one recipient failed: kept with its content.
    Fail { id: SpoolId, progress: Progress },
    /// Every recipient was delivered to: it leaves the spool.
    Done { id: SpoolId },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Synced before `apply` returns.
    Durable,
    /// Written at once, synced with the next batch, at the latest after 20 ms. A power cut may undo it.
    Lazy,
}

/// A message read back.
#[derive(Clone, Debug)]
pub struct Stored {
    pub envelope: Envelope,
    pub progress: Progress,
    pub body: Body,
}

/// The state of the disk side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Why nothing is accepted now, where it is so.
    pub trouble: Option<String>,
    /// Space left on the file system, in octets.
    pub free: u64,
    /// Octets the spool takes on disk.
    pub used: u64,
}

#[derive(Debug)]
pub enum SpoolError {
    /// No space, or less than the floor.
    Full,
    /// No such message.
    Unknown(SpoolId),
    /// The record or the content of the message is not what was written.
    Damaged(SpoolId, String),
    /// The operating system refused; what was being done.
    Io(String, io::Error),
    /// The spool is shutting down.
    Closed,
}

impl std::fmt::Display for SpoolError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full => f.write_str("the disk is full"),
            Self::Unknown(id) => write!(f, "{id} is not in the spool"),
            Self::Damaged(id, what) => write!(f, "{id} is damaged: {what}"),
            Self::Io(doing, error) => write!(f, "{doing}: {error}"),
            Self::Closed => f.write_str("the spool is closed"),
        }
    }
}
