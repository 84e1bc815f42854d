//! Disk: the spool keeps every accepted message until a provider has taken it.
//!
//! [`Spool`] is the trait, [`log::Log`] the engine: one log of segments, appended to by one thread, which takes all that
//! waits as one *batch*, writes it at one go, syncs once and answers everyone. [`inspect`] looks at a spool that no daemon
//! has.
//!
//! # What lies on disk
//!
//! ```text
//! lock               held (flock) by the daemon that owns the spool; its process id
//! log/N.seg          segments, N in 16 hexadecimal digits, the last 8 of them random; about 64 MiB each
//! log/spare-N        files that were segments, or the reserve, to be overwritten
//! log/new-N          a file that is to become a segment or the reserve
//! bodies/NAME        contents over 1 MiB, each in a file of its own
//! failed/ID.eml      failed messages with prepend and content, and what is known of each in failed/ID.json
//! tmp/NAME           files that are being written
//! damaged/           segments with damage (hard links; copies where there are none), and contents that may belong to it
//! ```
//!
//! A segment is a header and then records at 16-octet boundaries ([`record`] has the layout). Its header says which
//! batch comes first in it (`first_batch`) and from which batch on the earlier segments do not count (`void_from`).
//! Batch numbers rise by one over all segments, so what is missing is known by number.
//!
//! A segment that is full ends with an index, which says again what its records say of the messages that are not done
//! later in it. Where it stands is in the header of the next one. So a start reads the indexes, and the last segment of
//! each run, and not the mail.
//!
//! A message is one `Put` record with envelope and content (or the name of its side file). Each later change writes the
//! whole progress, without the content. `Done` ends it. Small named values stand there as `Note`s, the last of a name
//! counts.
//!
//! A content leaves memory when it is durable; an attempt, the first one too, reads it back, then as a rule from the page
//! cache. So there is one way to read a message, and no memory that grows with what waits.
//!
//! A segment is freed when nothing that lives is in it and it is the oldest: so a done-mark never disappears before the
//! record it ends. For the same reason the folder is synced before the next one is freed. A message that stays must not
//! keep all that came after it: when the oldest segment is less than half live, or the log is longer than twice what
//! lives, the live records of the oldest are written again at the end of the log, each progress behind its message in
//! the same batch, a little at a time and off the way of those that wait: 128 KiB, or as much as came in, between two
//! batches, so the log may reach three times what lives before it is short again. An end whose files in `failed/` are
//! not gone yet is written again in the same way. What cannot be read for that is **damage**: its segments are linked
//! into `damaged/`, and the message is done with, or held in doubt where its envelope and content are sound and only its
//! progress is not.
//!
//! There is one log, and no second one for what is old. A second one needs done-marks that outlive the first; and what it
//! would save, old messages that are written again once in a while, is never more than what comes in. So the price is
//! that with a long queue, as much again as comes in is written for a time, where otherwise it is a twentieth.
//!
//! A freed segment becomes a spare, and a spare the next segment: to overwrite allocates nothing and changes no length,
//! so a sync is one flush of the disk instead of two. What stands in it of its former life never counts, for a record
//! names its segment, and a segment's number has a random half. The last spare is the reserve: it is used when the disk
//! is full, so that what leaves the spool can still be marked; nothing is written again then. Where there is none, it
//! is written in a quiet moment. On a file system that copies on write (btrfs, zfs) an overwrite takes space all the same:
//! there `min_free` counts twice instead. A segment that was put aside for its damage is never overwritten, nor, by the
//! same process, one of which a write or a sync failed.
//!
//! # What a start makes of it
//!
//! - The `lock` is taken first; it is made where it is missing. Who holds it is told.
//! - A segment or a `.json` of another format, of an earlier or a later version: the start ends before it changes anything.
//! - Other names in these folders are nobody's: they stay and are not looked at.
//! - A batch counts whole or not at all, and in order.
//! - Each record says how many batches before its own were not yet synced when it was written. A batch that is missing
//!   although a later record or segment proves that it had been synced is **damage**: it is reported, the segment is
//!   linked into `damaged/`, and every other whole batch counts.
//! - What is missing or cut without such a proof is a **torn tail**: that batch and all behind it are dropped, for
//!   nobody was told 250 on their account.
//! - A file is named a segment when its header is synced, so a header that cannot be read is damage. So is a segment with
//!   another key than most have: it is of another spool, and nothing in it counts.
//! - A segment that is missing is missing batches, so it is damage; but for the oldest ones. Nothing tells these from
//!   segments that were freed: nor do the last batches of all leave a proof of themselves. Who removes files from `log/`,
//!   or puts an old copy of the folder back, is not told of it.
//! - What the medium does not give back (EIO) is damage, and what was in it is missing: with it no batch that is whole
//!   goes as a torn tail. Any other error may be none the next time, so it ends the start.
//! - A length is nothing to go by: a segment is read as far as one can be long, and one that is longer is damage. Nor is
//!   a name alone, from which the next number would leave none to give.
//! - Behind its last record a segment may hold anything, that of a former life too.
//! - A segment with an index was synced whole, so the index counts for it: damage in a content there is noticed when the
//!   message is read ([`SpoolError::Damaged`]), or by `mailsluice spool verify`, which reads everything. Where the index
//!   cannot be read, or the header that names it, the segment is read like any other.
//! - An `Attempt` after which nothing of the message was written leaves it in doubt.
//! - A message whose side file is missing or has another length is reported and stays queued, to be held when it is read.
//! - After a start a new segment is opened; its header voids what was dropped, so that it never comes to life later.
//! - Side files without a record, all in `tmp/`, `log/new-N` and spares without length are removed; with damage about, the former go to `damaged/`.
//! - A message that is in the log counts there, and what `failed/` has of it is removed: its filing came to nothing, or
//!   it is queued again.
//! - A `.json` in `failed/` of which the log knows nothing is a failed message. The log forgets a `Done` only when the
//!   files are gone for good: so with a `Done` in the log the files are removed, and none comes back. The folder is
//!   synced before anything is taken for gone.
//! - A `.json` of another format ends the start, as a segment of another does, before anything is changed.
//! - A `.json` that cannot be read now stays in the list and does not get too old until the next start.
//! - A `.json` that cannot be read or is not what was written, and a `.eml` that is missing or has another length, are
//!   reported and left where they are.
//! - A `.eml` without `.json`, of which the log knows nothing, is reported and goes to `damaged/`.
//!
//! # When the disk fails
//!
//! After a failed write or sync nobody knows what is on disk, and a second sync may say yes to what was lost. So the
//! segment is abandoned: cut back to before the batch as far as that works, never written or synced again. Those that
//! wait get the error. A new segment is opened *before* they are told, whose header voids the failed batch; what was
//! written lazily and not yet synced is written again behind that header, in the same write. So an id that was
//! refused cannot come to life later, short of a crash while not even the new segment could be written. If that fails
//! too, [`Health::trouble`] says so, everything is refused, and the writer tries again each second by itself.

use std::fmt;
use std::future::Future;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::envelope::{Body, Envelope, Head, Progress, SpoolId};

pub mod inspect;
pub mod log;
pub mod record;

mod disk;
mod failed;
mod fresh;
mod index;
mod recover;
mod segment;
mod side_file;
mod teller;
mod wire;
mod writer;

#[cfg(any(test, fuzzing))]
#[allow(clippy::unwrap_used, clippy::panic, reason = "what goes wrong here is what it looks for")]
pub mod fuzz;

#[cfg(test)]
mod tests;

pub use disk::is_copy_on_write;

/// A durable queue of messages. [`Spool::apply`] is the only way to change its state.
pub trait Spool: Send + Sync + 'static {
    /// A content that is being received.
    type Stage: Stage;

    /// Begins to take in a content. What is staged and never put is discarded.
    fn stage(&self) -> Self::Stage;

    /// All of `ops` or none, in order. With [`Durability::Durable`] they are on stable storage at `Ok`. After an error
    /// the messages of a `Put` are not in the spool, and the client may be told so.
    ///
    /// If the future is dropped before its end, the operations may or may not take place.
    fn apply(
        &self,
        ops: Vec<Op>,
        durability: Durability,
    ) -> impl Future<Output = Result<(), SpoolError>> + Send;

    /// At most `n` heads in the order of their ids, from the first id after `after`.
    fn heads(&self, after: Option<SpoolId>, n: usize) -> Vec<Head>;

    /// The head of one message.
    fn head(&self, id: SpoolId) -> Option<Head>;

    /// The last value that was noted under `key`.
    fn note(&self, key: &str) -> Option<Vec<u8>>;

    /// Reads a message back.
    fn open(&self, id: SpoolId) -> impl Future<Output = Result<Stored, SpoolError>> + Send;

    fn health(&self) -> Health;

    /// Whether a message of `size` octets can be taken without going under the free-space floor.
    fn has_room_for(&self, size: u64) -> bool;

    /// What is answered to whoever wants to put a message now, where [`Health::trouble`] says that nothing is accepted.
    /// Asked at every MAIL: without a trouble it takes no lock.
    fn trouble(&self) -> Option<SpoolError>;
}

/// A content that is being received: chunks come in, [`Staged`] comes out.
pub trait Stage: Send {
    /// After an error, or when the future was dropped before its end, the content cannot be finished any more.
    fn write(&mut self, chunk: &[u8]) -> impl Future<Output = Result<(), SpoolError>> + Send;

    /// The content is whole. It is durable as soon as the `Put` that names it is.
    fn finish(self) -> impl Future<Output = Result<Staged, SpoolError>> + Send;
}

/// A content that was taken in whole.
#[derive(Debug)]
pub enum Staged {
    /// It goes into the log with its record.
    Memory(Vec<u8>),
    /// It lies in a file of its own, synced. The file is removed when this is dropped without having been put.
    File(side_file::StagedFile),
}

impl Staged {
    /// In octets.
    pub fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File(file) => file.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One change of state.
#[derive(Debug)]
pub enum Op {
    /// A new message.
    Put { envelope: Envelope, body: Staged },
    /// A part of it is about to be sent, that of the recipients in `progress.sending`. Whatever is written next of the
    /// message ends the attempt; one that is still open at a start is in doubt ([`Head::in_doubt`]).
    Attempt { id: SpoolId, progress: Progress },
    /// It was tried, and is to be tried again.
    Update { id: SpoolId, progress: Progress },
    /// It waits for an operator.
    Hold { id: SpoolId, progress: Progress },
    /// Nothing is left to try, and at least one recipient failed: kept with its content.
    Fail { id: SpoolId, progress: Progress },
    /// Every recipient was delivered to, or nobody wants it any more: it leaves the spool.
    Done { id: SpoolId },
    /// What was held or has failed is queued again.
    Requeue { id: SpoolId, progress: Progress },
    /// What was held is queued again.
    Release { id: SpoolId, progress: Progress },
    /// An operator removes it, whatever its state: it leaves the spool.
    Delete { id: SpoolId },
    /// A small value is kept under a name until the next of that name; an empty one takes it away. The key is 1 to 64
    /// octets of `a-z 0-9 . _ / @ + -`, the value at most 64 KiB, and there are at most 4,096 of them.
    Note { key: Box<str>, bytes: Vec<u8> },
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
    /// Octets of the contents of the messages, failed ones too.
    pub contents: u64,
    /// Messages, queued or held, that may have been taken without a word about it.
    pub in_doubt: usize,
    /// Messages that failed and are kept.
    pub failed: usize,
}

#[derive(Debug)]
pub enum SpoolError {
    /// No space, or less than the floor.
    Full,
    /// No such message.
    Unknown(SpoolId),
    /// The message is in no state to do this with it; why.
    Refused(SpoolId, &'static str),
    /// The note cannot be kept; its key, and why.
    Unfit(Box<str>, &'static str),
    /// The record or the content of the message is not what was written.
    Damaged(SpoolId, String),
    /// The operating system refused; what was being done.
    Io(String, io::Error),
    /// The spool is shutting down.
    Closed,
}

impl fmt::Display for SpoolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("the spool has no space left"),
            Self::Unknown(id) => write!(f, "no message {id} in the spool"),
            Self::Refused(id, what) => write!(f, "not possible with message {id}: {what}"),
            Self::Unfit(key, what) => {
                write!(f, "the note {} cannot be kept: {what}", key.escape_debug())
            }
            Self::Damaged(id, what) => write!(f, "message {id} is damaged: {what}"),
            Self::Io(doing, error) => write!(f, "{doing}: {error}"),
            Self::Closed => f.write_str("the spool is shut down"),
        }
    }
}

impl std::error::Error for SpoolError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(_, error) => Some(error),
            Self::Full
            | Self::Unknown(_)
            | Self::Refused(..)
            | Self::Unfit(..)
            | Self::Damaged(..)
            | Self::Closed => None,
        }
    }
}

/// An operation of the disk that failed, and what it was.
#[derive(Debug)]
struct Failure {
    doing: String,
    error: io::Error,
}

impl Failure {
    /// For `map_err`: names what was being done.
    fn at(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |error| Self { doing, error }
    }

    fn is_full(&self) -> bool {
        matches!(self.error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }

    /// One error for each of the many that wait.
    fn to_error(&self) -> SpoolError {
        match self.is_full() {
            true => SpoolError::Full,
            false => {
                let Self { doing, error } = self.clone();
                SpoolError::Io(doing, error)
            }
        }
    }
}

impl Clone for Failure {
    fn clone(&self) -> Self {
        let error = match self.error.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::new(self.error.kind(), self.error.to_string()),
        };
        Self { doing: self.doing.clone(), error }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.doing, self.error)
    }
}

/// A panic elsewhere does not make plain data wrong: every change under these locks is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for `changed` until `is_ready`, at most until `deadline`.
fn wait_until<'a, T>(
    changed: &Condvar,
    mut state: MutexGuard<'a, T>,
    deadline: Option<Instant>,
    is_ready: impl Fn(&T) -> bool,
) -> MutexGuard<'a, T> {
    while !is_ready(&state) {
        state = match deadline.map(|at| at.saturating_duration_since(crate::clock::now())) {
            Some(Duration::ZERO) => break,
            Some(left) => {
                let waited = changed.wait_timeout(state, left);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        };
    }
    state
}
