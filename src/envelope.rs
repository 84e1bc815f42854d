//! What the rooms share about a message: its envelope, its identity, how far it has come, and its bytes.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use uuid::Uuid;

use crate::outcome::{Cause, Receipt};
use crate::smtp::address::{ForwardPath, Mailbox, ReversePath};
use crate::smtp::params::{Notify, Ret};
use crate::smtp::reply::Reply;

/// A time of day, in milliseconds since 1970-01-01 UTC: what is stored and shown. Waiting is done with `Instant`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    pub fn plus(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)))
    }

    /// Zero where `earlier` is later: clocks step.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// The name of a message from its 250 to its end: a UUIDv7, so it sorts by the time of acceptance.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpoolId(u128);

impl SpoolId {
    /// A new id for a message accepted at `now`; unique by its random part.
    pub fn new(now: UnixMillis) -> Self {
        let nanos = u32::try_from(now.0 % 1000).unwrap_or(0) * 1_000_000;
        let stamp = uuid::Timestamp::from_unix(uuid::NoContext, now.0 / 1000, nanos);
        Self(Uuid::new_v7(stamp).as_u128())
    }

    pub const fn from_u128(value: u128) -> Self {
        Self(value)
    }

    pub const fn as_u128(self) -> u128 {
        self.0
    }

    /// The time that the id was made at: its first 48 bits (RFC 9562 5.7).
    pub fn accepted(self) -> UnixMillis {
        UnixMillis(u64::try_from(self.0 >> 80).unwrap_or(u64::MAX))
    }

    pub fn parse(text: &str) -> Option<Self> {
        Uuid::try_parse(text).ok().map(|uuid| Self(uuid.as_u128()))
    }
}

impl fmt::Display for SpoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Uuid::from_u128(self.0).fmt(f)
    }
}

impl fmt::Debug for SpoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A finished transaction. The envelope is the truth: exactly these recipients get the mail, whatever the header says.
/// Immutable once accepted; how far the message has come is its [`Progress`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    pub id: SpoolId,
    pub kind: Kind,
    pub accepted: UnixMillis,
    pub reverse_path: ReversePath,
    pub rcpts: Vec<Rcpt>,
    /// `SMTPUTF8` was given at MAIL (RFC 6531).
    pub smtputf8: bool,
    /// The content holds octets above 127, whatever `BODY` said.
    pub eight_bit: bool,
    /// `RET` (RFC 3461 4.3).
    pub ret: Option<Ret>,
    /// `ENVID`, still in xtext (RFC 3461 4.4).
    pub envid: Option<Box<str>>,
    /// The stored content, in octets (without `prepend`).
    pub size: u64,
    pub client: Client,
    pub priority: Priority,
    /// The first mailbox of the header field From, where one can be read.
    pub author: Option<Mailbox>,
    /// Header lines that go before the stored content in every attempt: Received, and Message-ID and Date where the
    /// message had none.
    pub prepend: Bytes,
}

/// Where a message comes from, which decides who is told of its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A client.
    Mail,
    /// This gateway, to a sender. Where it fails, the postmaster is told once.
    Report,
    /// This gateway, to the postmaster. Where it fails, nobody is told.
    Notice,
}

/// Who handed the message in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// The address of the peer, or `unix` for a Unix socket.
    pub address: Box<str>,
    /// The argument of HELO or EHLO.
    pub helo: Box<str>,
}

/// One accepted RCPT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rcpt {
    pub path: ForwardPath,
    pub notify: Notify,
    /// `ORCPT`, still as `type;xtext` (RFC 3461 4.2).
    pub orcpt: Option<Box<str>>,
}

/// What goes first within a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    Normal,
    High,
}

/// How far a message has come: all that changes after acceptance. Written whole with each change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Attempts made so far.
    pub attempts: u16,
    /// Not to be tried before.
    pub due: UnixMillis,
    /// When the first deferral of its own (scope message or recipient) happened; giving up counts from here.
    pub first_deferral: Option<UnixMillis>,
    /// One for each recipient of the envelope, in its order.
    pub rcpts: Vec<RcptStatus>,
    /// The positions of the recipients of the part whose content may be leaving now; none but in the mark of an attempt.
    pub sending: Vec<u32>,
    /// The positions of the recipients that an attempt may have reached without a word about it. Whatever is answered to
    /// a later copy says nothing about that one, so a position stays until an operator takes it away.
    pub doubtful: Vec<u32>,
    /// The positions of the recipients that came to an end of which a report is due and not yet in the spool.
    pub untold: Vec<u32>,
    /// The delay of the message was reported.
    pub warned: bool,
    /// The server takes no null reverse path from this account: a letter of ours goes from the provider's sender.
    pub named: bool,
}

impl Progress {
    /// A message just accepted.
    pub fn new(accepted: UnixMillis, rcpts: usize) -> Self {
        let rcpts = vec![RcptStatus::Pending { last: None }; rcpts];
        Self {
            attempts: 0,
            due: accepted,
            first_deferral: None,
            rcpts,
            sending: Vec::new(),
            doubtful: Vec::new(),
            untold: Vec::new(),
            warned: false,
            named: false,
        }
    }

    /// Whether some recipient that is still to be delivered to may have been reached already.
    pub fn is_doubtful(&self) -> bool {
        self.pending().any(|at| self.doubtful.iter().any(|doubtful| *doubtful as usize == at))
    }

    /// The positions of the recipients that are still to be delivered to.
    pub fn pending(&self) -> impl Iterator<Item = usize> + '_ {
        let pending = |status: &RcptStatus| matches!(status, RcptStatus::Pending { .. });
        self.rcpts.iter().enumerate().filter(move |(_, status)| pending(status)).map(|(at, _)| at)
    }
}

/// Where one recipient stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RcptStatus {
    Pending { last: Option<Cause> },
    Delivered(Receipt),
    Failed(Cause),
}

/// Which part of the queue a message is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QueueState {
    /// It is tried when it is due.
    Queued,
    /// It waits for an operator.
    Held,
    /// Nothing is left to try and at least one recipient failed for good; kept with its content.
    Failed,
}

/// What memory keeps of a message that is in the spool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub id: SpoolId,
    pub state: QueueState,
    pub due: UnixMillis,
    pub size: u64,
    pub pending: u32,
    pub attempts: u16,
    /// A former run began an attempt and wrote no outcome of it: what it was sending may have been taken.
    pub in_doubt: bool,
}

/// Whether the gateway takes mail now. Written by `app` from the state of provider and spool; read by the listener at
/// EHLO (SIZE), at MAIL and at the end of data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intake {
    /// What a client is told instead of being served.
    pub refusal: Option<Reply>,
    /// The largest message, in octets.
    pub max_size: u64,
    /// Why it is no larger, where the provider has no way for more.
    pub why: Option<&'static str>,
}

/// A stored content: read as a stream, never held whole when it is large.
#[derive(Clone, Debug)]
pub enum Body {
    Memory(Bytes),
    File(BodyFile),
}

/// A content that lies in a file.
#[derive(Clone, Debug)]
pub struct BodyFile {
    pub file: Arc<File>,
    /// Where it starts in the file.
    pub start: u64,
    pub len: u64,
    /// CRC-32C over all of it.
    pub crc32c: u32,
}

impl Body {
    /// In octets.
    pub fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File(file) => file.len,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn reader(&self) -> BodyReader {
        BodyReader { body: self.clone(), offset: 0, crc32c: 0 }
    }
}

/// Reads a [`Body`] from its start, in chunks. A clone goes on from where this one is.
#[derive(Clone, Debug)]
pub struct BodyReader {
    body: Body,
    offset: u64,
    crc32c: u32,
}

impl BodyReader {
    /// Octets of a file that are read at once.
    const CHUNK: u64 = 256 * 1024;

    /// The next chunk; `None` at the end. The last chunk of a file comes only after the checksum of the whole was
    /// right, so whoever sends what this returns never finishes a damaged content.
    pub async fn chunk(&mut self) -> io::Result<Option<Bytes>> {
        let next = match &self.body {
            Body::Memory(_) => return self.chunk_blocking(),
            Body::File(body) if self.offset == body.len => return Ok(None),
            Body::File(body) => {
                let (body, offset, crc32c) = (body.clone(), self.offset, self.crc32c);
                let read = move || Self::read(&body, offset, crc32c);
                tokio::task::spawn_blocking(read).await.map_err(io::Error::other)??
            }
        };
        Ok(Some(self.pass(next)))
    }

    /// The same for whoever may wait for the disk.
    pub fn chunk_blocking(&mut self) -> io::Result<Option<Bytes>> {
        if self.offset == self.body.len() {
            return Ok(None);
        }
        let next = match &self.body {
            Body::Memory(bytes) => (bytes.clone(), 0),
            Body::File(body) => Self::read(body, self.offset, self.crc32c)?,
        };
        Ok(Some(self.pass(next)))
    }

    fn pass(&mut self, (chunk, crc32c): (Bytes, u32)) -> Bytes {
        self.offset += chunk.len() as u64;
        self.crc32c = crc32c;
        chunk
    }

    /// The chunk at `offset`, and the checksum up to its end.
    fn read(body: &BodyFile, offset: u64, crc32c: u32) -> io::Result<(Bytes, u32)> {
        let size = (body.len - offset).min(Self::CHUNK);
        let mut chunk = vec![0; usize::try_from(size).map_err(io::Error::other)?];
        body.file.read_exact_at(&mut chunk, body.start + offset)?;
        let crc32c = crc32c::crc32c_append(crc32c, &chunk);
        if offset + size == body.len && crc32c != body.crc32c {
            let what = "the stored content is damaged (checksum)";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Ok((chunk.into(), crc32c))
    }
}
