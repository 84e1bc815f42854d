//! Records: what one change of state is on disk. Pure: octets in, octets out.
//!
//! Little-endian, at a 16-octet boundary, padded with zeros:
//!
//! ```text
//!  0  magic                 4
//!  4  CRC-32C               4   over the position in the segment, the rest of this header, and the CRC-32C of the
//!                               payload, which is known before the position is
//!  8  key of the spool      8   random: no content can look like a record
//! 16  segment               8
//! 24  batch                 8
//! 32  length of payload     4
//! 36  index in the batch    4
//! 40  kind                  1
//! 41  flags                 1   1: last of its batch; 2: the content lies in a side file
//! 42  zero                  2
//! 44  unsynced              4   batches right before this one that were not yet synced
//! 48  payload
//! ```
//!
//! Every payload starts with the id (16, big-endian). Then a `Put` has time of acceptance (8), size (8), number of
//! recipients (4), length of the envelope (4), the envelope as JSON, and the content as it is, so that `grep -a` finds
//! it. A change of progress (`Attempt`, `Update`, `Hold`, `Fail`, `Requeue`, `Release`) has due (8), pending recipients
//! (4), attempts (2), 1 where a recipient is doubtful (1), zero (1) and the progress as JSON. `Filed` has the time of failing (8) and the length of the
//! `.eml` (8). `Done` and `Delete` have nothing more. A `Note` is of no message: its id is zero, and then come the
//! length of its key (1), zero (3), the key and the value. The fixed fields are what memory keeps: a start parses no
//! JSON for most messages.
//!
//! An `Index` is of no message either, so its id is zero. It is the last record of a segment that is full, alone in its
//! batch, and tells a start what the others say, so that it need not read them. Each of them has kind (1), flags (1),
//! zero (2), length of payload (4), position in multiples of 16 (4), and its fixed fields. Message and progress of what
//! is done later in the same segment are not in it.

use std::collections::HashSet;
use std::iter;

use bytes::Bytes;

use super::side_file::FileRef;
use super::wire;
use crate::envelope::{Envelope, Head, Progress, QueueState, SpoolId, UnixMillis};

/// Octets before the payload.
pub const HEADER: usize = 48;
/// Records start at multiples of this.
pub const ALIGN: usize = 16;
/// No number of a batch or a segment comes near, at any pace. One that is higher was never given, so that there is always
/// a next one.
pub(super) const NUMBERS: u64 = 1 << 62;

pub(super) const MAGIC: [u8; 4] = *b"\xf7msr";
const FLAG_LAST: u8 = 1;
const FLAG_SIDE_FILE: u8 = 2;
/// Octets of a `Put` before its JSON, of a change of progress before its JSON.
const PUT_PREFIX: usize = 40;
const PROGRESS_PREFIX: usize = 32;
/// Octets of an id, which every payload starts with.
const ID: usize = 16;
/// Octets of what an index says of a record, before its fixed fields.
const SUMMARY: usize = 12;
/// Octets of a note's key and of its value, at most.
const NOTE_KEY: u8 = 64;
const NOTE: usize = 64 * 1024;
/// What the payload of a note starts with.
const NO_MESSAGE: SpoolId = SpoolId::from_u128(0);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Put = 1,
    Update = 2,
    Hold = 3,
    Fail = 4,
    Done = 5,
    Attempt = 6,
    Requeue = 7,
    Release = 8,
    Delete = 9,
    Note = 10,
    /// What the other records of the segment say.
    Index = 11,
    /// The message has left the log for files of its own.
    Filed = 16,
}

impl Kind {
    const ALL: [Self; 12] = [
        Self::Put,
        Self::Update,
        Self::Hold,
        Self::Fail,
        Self::Done,
        Self::Attempt,
        Self::Requeue,
        Self::Release,
        Self::Delete,
        Self::Note,
        Self::Index,
        Self::Filed,
    ];

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == code)
    }

    /// Octets of the fixed fields.
    fn fixed(self) -> usize {
        match self {
            Self::Put => PUT_PREFIX,
            Self::Update
            | Self::Hold
            | Self::Fail
            | Self::Attempt
            | Self::Requeue
            | Self::Release
            | Self::Filed => PROGRESS_PREFIX,
            Self::Done | Self::Delete | Self::Note | Self::Index => ID,
        }
    }
}

/// What a record changes in the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Put {
        head: Head,
        file: Option<FileRef>,
    },
    Progress {
        step: Step,
        due: UnixMillis,
        pending: u32,
        attempts: u16,
        /// Some recipient may have been reached without a word about it.
        is_doubtful: bool,
    },
    Filed {
        at: UnixMillis,
        len: u64,
    },
    /// The same of a message that lies in files, and nothing where it is queued again meanwhile. On disk it is a `Done`.
    DoneInFiles,
    /// The message leaves the spool, whoever wanted it so.
    Done,
    /// It says again what others say.
    Index,
    /// A note has a new value; none where `bytes` is empty.
    Note {
        key: Box<str>,
        bytes: Box<[u8]>,
    },
}

/// A change of progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Attempt,
    Update,
    Hold,
    Fail,
    Requeue,
    Release,
}

impl Step {
    fn kind(self) -> Kind {
        match self {
            Self::Attempt => Kind::Attempt,
            Self::Update => Kind::Update,
            Self::Hold => Kind::Hold,
            Self::Fail => Kind::Fail,
            Self::Requeue => Kind::Requeue,
            Self::Release => Kind::Release,
        }
    }

    /// Where the message is after it.
    pub(super) fn state(self) -> QueueState {
        match self {
            Self::Attempt | Self::Update | Self::Requeue | Self::Release => QueueState::Queued,
            Self::Hold => QueueState::Held,
            Self::Fail => QueueState::Failed,
        }
    }

    /// Why it cannot be done to a message in `state`. What became of an attempt is written down though the message was
    /// held meanwhile; but none may begin then. What has failed can only be queued again.
    pub(super) fn refusal(self, state: QueueState) -> Option<&'static str> {
        match (self, state) {
            (Self::Attempt, QueueState::Held) => Some("it is held"),
            (Self::Requeue, QueueState::Queued) => Some("it is queued already"),
            (Self::Release, QueueState::Queued) => Some("it is not held"),
            (
                Self::Attempt | Self::Update | Self::Hold | Self::Fail | Self::Release,
                QueueState::Failed,
            ) => Some("it has failed"),
            (Self::Attempt, QueueState::Queued)
            | (Self::Requeue, QueueState::Held | QueueState::Failed)
            | (Self::Release, QueueState::Held)
            | (Self::Update | Self::Hold | Self::Fail, QueueState::Queued | QueueState::Held) => {
                None
            }
        }
    }
}

/// A change of state, ready to be written anywhere.
#[derive(Debug)]
pub struct Record {
    kind: Kind,
    /// Zero for a note.
    pub(super) id: SpoolId,
    pub(super) change: Change,
    /// The payload but for the content.
    payload: Vec<u8>,
    /// The content of a `Put`, kept apart so that it is copied only once.
    content: Bytes,
    /// CRC-32C of both, worked out by who makes the record: the writer has enough to do.
    crc: u32,
}

impl Record {
    fn new(kind: Kind, id: SpoolId, change: Change, payload: Vec<u8>, content: Bytes) -> Self {
        let crc = crc32c::crc32c_append(crc32c::crc32c(&payload), &content);
        Self { kind, id, change, payload, content, crc }
    }

    /// A message whose content is `content`.
    pub fn put(envelope: &Envelope, content: impl Into<Bytes>) -> Self {
        Self::put_with(envelope, content.into(), None)
    }

    /// A message whose content lies in `file`.
    pub(super) fn put_file(envelope: &Envelope, file: FileRef) -> Self {
        Self::put_with(envelope, Bytes::new(), Some(file))
    }

    fn put_with(envelope: &Envelope, content: Bytes, file: Option<FileRef>) -> Self {
        let json = wire::write_envelope(envelope, file.as_ref());
        let head = Head {
            id: envelope.id,
            state: QueueState::Queued,
            due: envelope.accepted,
            size: envelope.size,
            pending: saturate(envelope.rcpts.len()),
            attempts: 0,
            in_doubt: false,
        };
        let mut payload = Vec::with_capacity(PUT_PREFIX + json.len());
        payload.extend_from_slice(&envelope.id.as_u128().to_be_bytes());
        payload.extend_from_slice(&head.due.0.to_le_bytes());
        payload.extend_from_slice(&head.size.to_le_bytes());
        payload.extend_from_slice(&head.pending.to_le_bytes());
        payload.extend_from_slice(&saturate(json.len()).to_le_bytes());
        payload.extend_from_slice(&json);
        let change = Change::Put { head, file };
        Self::new(Kind::Put, envelope.id, change, payload, content)
    }

    pub fn attempt(id: SpoolId, progress: &Progress) -> Self {
        Self::progress(Step::Attempt, id, progress)
    }

    pub fn update(id: SpoolId, progress: &Progress) -> Self {
        Self::progress(Step::Update, id, progress)
    }

    pub fn hold(id: SpoolId, progress: &Progress) -> Self {
        Self::progress(Step::Hold, id, progress)
    }

    pub fn fail(id: SpoolId, progress: &Progress) -> Self {
        Self::progress(Step::Fail, id, progress)
    }

    pub fn requeue(id: SpoolId, progress: &Progress) -> Self {
        Self::progress(Step::Requeue, id, progress)
    }

    pub fn release(id: SpoolId, progress: &Progress) -> Self {
        Self::progress(Step::Release, id, progress)
    }

    fn progress(step: Step, id: SpoolId, progress: &Progress) -> Self {
        let pending = saturate(progress.pending().count());
        let mut payload = id.as_u128().to_be_bytes().to_vec();
        payload.extend_from_slice(&progress.due.0.to_le_bytes());
        payload.extend_from_slice(&pending.to_le_bytes());
        payload.extend_from_slice(&progress.attempts.to_le_bytes());
        let is_doubtful = progress.is_doubtful();
        payload.extend_from_slice(&[is_doubtful.into(), 0]);
        payload.extend_from_slice(&wire::write_progress(progress));
        let (due, attempts) = (progress.due, progress.attempts);
        let change = Change::Progress { step, due, pending, attempts, is_doubtful };
        Self::new(step.kind(), id, change, payload, Bytes::new())
    }

    pub fn done(id: SpoolId) -> Self {
        Self::gone(Kind::Done, id)
    }

    /// Only if it lies in files.
    pub(super) fn done_in_files(id: SpoolId) -> Self {
        Self { change: Change::DoneInFiles, ..Self::gone(Kind::Done, id) }
    }

    pub fn delete(id: SpoolId) -> Self {
        Self::gone(Kind::Delete, id)
    }

    fn gone(kind: Kind, id: SpoolId) -> Self {
        let payload = id.as_u128().to_be_bytes().to_vec();
        Self::new(kind, id, Change::Done, payload, Bytes::new())
    }

    /// `Err` says why the note cannot be kept.
    pub fn note(key: Box<str>, bytes: Vec<u8>) -> Result<Self, &'static str> {
        let is_known = |octet: u8| {
            octet.is_ascii_lowercase() || octet.is_ascii_digit() || b"._/@+-".contains(&octet)
        };
        let len = match u8::try_from(key.len()) {
            Ok(len @ 1..=NOTE_KEY) if key.bytes().all(is_known) => len,
            Ok(_) | Err(_) => return Err("its key is not 1 to 64 of a-z 0-9 . _ / @ + -"),
        };
        if bytes.len() > NOTE {
            return Err("it is longer than 64 KiB");
        }
        let mut payload = NO_MESSAGE.as_u128().to_be_bytes().to_vec();
        payload.extend_from_slice(&[len, 0, 0, 0]);
        payload.extend_from_slice(key.as_bytes());
        payload.extend_from_slice(&bytes);
        let change = Change::Note { key, bytes: bytes.into() };
        Ok(Self::new(Kind::Note, NO_MESSAGE, change, payload, Bytes::new()))
    }

    /// Of a whole segment.
    pub(super) fn index(summary: &Summary) -> Self {
        let mut payload = NO_MESSAGE.as_u128().to_be_bytes().to_vec();
        summary.write_to(&mut payload);
        Self::new(Kind::Index, NO_MESSAGE, Change::Index, payload, Bytes::new())
    }

    /// The same once more, to be written elsewhere.
    pub(super) fn copy(found: &Found<'_>) -> Result<Self, String> {
        let kind = Kind::from_code(found.kind);
        let kind = kind.ok_or_else(|| format!("a record of kind {}", found.kind))?;
        let (id, change) = found.change()?;
        Ok(Self::new(kind, id, change, found.payload.to_vec(), Bytes::new()))
    }

    /// It lies in files since it failed, at `at`; `len` is that of its `.eml`.
    pub(super) fn filed(id: SpoolId, at: UnixMillis, len: u64) -> Self {
        let mut payload = id.as_u128().to_be_bytes().to_vec();
        payload.extend_from_slice(&at.0.to_le_bytes());
        payload.extend_from_slice(&len.to_le_bytes());
        let change = Change::Filed { at, len };
        Self::new(Kind::Filed, id, change, payload, Bytes::new())
    }

    /// Octets it takes in a segment, padding included.
    pub fn len_on_disk(&self) -> usize {
        len_on_disk(self.payload.len() + self.content.len())
    }

    /// What became of an attempt does not undo a hold that came meanwhile: the record says both, for of the records
    /// with a progress only the last is kept.
    pub(super) fn keep_held(&mut self) {
        if let Change::Progress { step: step @ Step::Update, .. } = &mut self.change {
            *step = Step::Hold;
            self.kind = Kind::Hold;
        }
    }

    pub(super) fn is_filing(&self) -> bool {
        matches!(self.change, Change::Filed { .. })
    }

    /// Whether its length can be written down.
    pub(super) fn fits(&self) -> bool {
        u32::try_from(self.payload.len().saturating_add(self.content.len())).is_ok()
    }

    /// Appends the record to `out`, which lies at `base` in its segment. Returns where it is.
    fn write_to(
        &self,
        out: &mut Vec<u8>,
        base: u64,
        stamp: &Stamp,
        index: u32,
        last: bool,
    ) -> Place {
        let start = out.len();
        let offset = base + start as u64;
        let len = saturate(self.payload.len() + self.content.len());
        let has_file = matches!(self.change, Change::Put { file: Some(_), .. });
        let last = if last { FLAG_LAST } else { 0 };
        let side_file = if has_file { FLAG_SIDE_FILE } else { 0 };
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&stamp.key.to_le_bytes());
        out.extend_from_slice(&stamp.segment.to_le_bytes());
        out.extend_from_slice(&stamp.batch.to_le_bytes());
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&index.to_le_bytes());
        out.extend_from_slice(&[self.kind as u8, last | side_file, 0, 0]);
        out.extend_from_slice(&stamp.unsynced.to_le_bytes());
        let crc = checksum(offset, &out[start + 8..], self.crc);
        out.extend_from_slice(&self.payload);
        out.extend_from_slice(&self.content);
        out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
        out.resize(start + self.len_on_disk(), 0);
        Place { segment: stamp.segment, offset, len }
    }
}

/// What all records of a batch have in common.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    pub key: u64,
    pub segment: u64,
    pub batch: u64,
    /// Batches right before this one that were not yet synced.
    pub unsynced: u32,
}

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub segment: u64,
    pub offset: u64,
    /// Of the payload, in octets.
    pub len: u32,
}

impl Place {
    /// Octets of the whole record.
    pub(super) fn len_on_disk(&self) -> u64 {
        (HEADER as u64 + u64::from(self.len)).next_multiple_of(ALIGN as u64)
    }
}

/// Appends `records` as one batch to `out`, whose first octet (that of what is in it already) lies at `base` in the
/// segment.
pub fn encode_batch(
    out: &mut Vec<u8>,
    base: u64,
    stamp: &Stamp,
    records: &[&Record],
) -> Vec<Place> {
    let mut places = Vec::with_capacity(records.len());
    for (record, index) in records.iter().zip(0..) {
        let last = places.len() + 1 == records.len();
        places.push(record.write_to(out, base, stamp, index, last));
    }
    places
}

/// A record as it was found on disk, its checksum right.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    pub stamp: Stamp,
    pub place: Place,
    pub index: u32,
    pub is_last: bool,
    kind: u8,
    has_file: bool,
    payload: &'a [u8],
}

/// Reads the record at the start of `bytes`, which lie at `offset` in `segment`. `None` if there is none, or it is not
/// whole, or of another spool (where `key` is known) or segment.
pub fn decode(bytes: &[u8], offset: u64, segment: u64, key: Option<u64>) -> Option<Found<'_>> {
    if !bytes.starts_with(&MAGIC) {
        return None;
    }
    let mut fields = Fields(bytes.get(4..HEADER)?);
    let crc = fields.u32()?;
    let stamp_key = fields.u64()?;
    let stamp_segment = fields.u64()?;
    let batch = fields.u64()?;
    let len = fields.u32()?;
    let index = fields.u32()?;
    let [kind, flags, _, _] = fields.take()?;
    let unsynced = fields.u32()?;
    let is_ours = stamp_segment == segment && key.is_none_or(|key| key == stamp_key);
    if !is_ours || !(1..=NUMBERS).contains(&batch) {
        return None;
    }
    let end = HEADER.checked_add(usize::try_from(len).ok()?)?;
    let payload = bytes.get(HEADER..end)?;
    if checksum(offset, bytes.get(8..HEADER)?, crc32c::crc32c(payload)) != crc {
        return None;
    }
    Some(Found {
        stamp: Stamp { key: stamp_key, segment, batch, unsynced },
        place: Place { segment, offset, len },
        index,
        is_last: flags & FLAG_LAST != 0,
        kind,
        has_file: flags & FLAG_SIDE_FILE != 0,
        payload,
    })
}

/// What an index is made of: the fixed fields of all records of a segment, as they come.
#[derive(Debug, Default)]
pub(super) struct Summary(Vec<u8>);

impl Summary {
    pub(super) fn add(&mut self, record: &Record, place: Place) {
        let out = &mut self.0;
        let has_file = matches!(record.change, Change::Put { file: Some(_), .. });
        let position = u32::try_from(place.offset / ALIGN as u64).unwrap_or(u32::MAX);
        out.extend_from_slice(&[
            record.kind as u8,
            if has_file { FLAG_SIDE_FILE } else { 0 },
            0,
            0,
        ]);
        out.extend_from_slice(&place.len.to_le_bytes());
        out.extend_from_slice(&position.to_le_bytes());
        out.extend(record.payload.iter().take(record.kind.fixed()));
    }

    /// Without what is of a message that is done later.
    fn write_to(&self, out: &mut Vec<u8>) {
        let mut summed: Vec<Summed<'_>> = Vec::new();
        let mut rest = Fields(&self.0);
        while let Some(next) = Summed::read(&mut rest) {
            summed.push(next);
        }
        let mut done = HashSet::new();
        let mut keep = Vec::with_capacity(summed.len());
        for one in summed.iter().rev() {
            let id = one.fields.get(..ID);
            match one.kind {
                Kind::Done | Kind::Delete => drop(done.insert(id)),
                // The done-mark of a message with files is needed longer than others.
                Kind::Note | Kind::Filed => {}
                _ if done.contains(&id) => continue,
                _ => {}
            }
            keep.push(one);
        }
        for one in keep.into_iter().rev() {
            out.extend_from_slice(one.octets);
        }
    }
}

/// What an index says of one record.
struct Summed<'a> {
    kind: Kind,
    has_file: bool,
    len: u32,
    offset: u64,
    fields: &'a [u8],
    /// All of this.
    octets: &'a [u8],
}

impl<'a> Summed<'a> {
    fn read(rest: &mut Fields<'a>) -> Option<Self> {
        let all = rest.0;
        let [kind, flags, _, _] = rest.take()?;
        let (kind, has_file) = (Kind::from_code(kind)?, flags & FLAG_SIDE_FILE != 0);
        let (len, position) = (rest.u32()?, rest.u32()?);
        let (fields, left) = rest.0.split_at_checked(kind.fixed())?;
        rest.0 = left;
        let octets = all.get(..SUMMARY + kind.fixed())?;
        Some(Self {
            kind,
            has_file,
            len,
            offset: u64::from(position) * ALIGN as u64,
            fields,
            octets,
        })
    }
}

/// A record of which an index tells.
pub(super) enum Told {
    /// What it changes.
    Change(SpoolId, Change),
    /// It has to be read for that.
    Unread,
}

/// The length of the payload, as the record at the start of `bytes` says it.
pub(super) fn payload_len(bytes: &[u8]) -> Option<u32> {
    Fields(bytes.get(32..)?).u32()
}

/// Whether `bytes` begin like a record of `segment`, whole or not.
pub(super) fn claims(bytes: &[u8], segment: u64) -> bool {
    bytes.starts_with(&MAGIC) && bytes.get(16..24) == Some(&segment.to_le_bytes()[..])
}

/// What a `Put` holds; the content starts at `content_at` of the record.
#[derive(Debug)]
pub struct Put {
    pub envelope: Envelope,
    pub(super) file: Option<FileRef>,
    pub content_at: usize,
}

impl Found<'_> {
    /// Octets it takes in its segment.
    pub(super) fn len_on_disk(&self) -> usize {
        len_on_disk(self.payload.len())
    }

    /// The latest batch that was synced when this was written.
    pub(super) fn proven(&self) -> u64 {
        self.stamp.batch.saturating_sub(1).saturating_sub(self.stamp.unsynced.into())
    }

    /// What it changes in the index.
    pub(super) fn change(&self) -> Result<(SpoolId, Change), String> {
        let kind =
            Kind::from_code(self.kind).ok_or_else(|| format!("a record of kind {}", self.kind))?;
        let mut fields = Fields(self.payload);
        let too_short = || "a record is too short".to_owned();
        let id = fields.id().ok_or_else(too_short)?;
        let step = match kind {
            Kind::Put => {
                let put = self.has_file.then(|| self.put()).transpose()?;
                let state = QueueState::Queued;
                let mut head = || {
                    let (due, size) = (UnixMillis(fields.u64()?), fields.u64()?);
                    let pending = fields.u32()?;
                    Some(Head { id, state, due, size, pending, attempts: 0, in_doubt: false })
                };
                let head = head().ok_or_else(too_short)?;
                return Ok((id, Change::Put { head, file: put.and_then(|put| put.file) }));
            }
            Kind::Done | Kind::Delete => return Ok((id, Change::Done)),
            Kind::Index => return Ok((id, Change::Index)),
            Kind::Filed => {
                let mut change =
                    || Some(Change::Filed { at: UnixMillis(fields.u64()?), len: fields.u64()? });
                return Ok((id, change().ok_or_else(too_short)?));
            }
            Kind::Note => {
                let [len, _, _, _] = fields.take().ok_or_else(too_short)?;
                let split = fields.0.split_at_checked(usize::from(len));
                let (key, bytes) = split.ok_or_else(too_short)?;
                let key = std::str::from_utf8(key)
                    .map_err(|_not_utf8| "the key of a note is not text".to_owned())?;
                return Ok((id, Change::Note { key: key.into(), bytes: bytes.into() }));
            }
            Kind::Attempt => Step::Attempt,
            Kind::Update => Step::Update,
            Kind::Hold => Step::Hold,
            Kind::Fail => Step::Fail,
            Kind::Requeue => Step::Requeue,
            Kind::Release => Step::Release,
        };
        let mut change = || {
            let (due, pending) = (UnixMillis(fields.u64()?), fields.u32()?);
            let attempts = fields.take().map(u16::from_le_bytes)?;
            let is_doubtful = fields.take::<1>()? != [0];
            Some(Change::Progress { step, due, pending, attempts, is_doubtful })
        };
        let change = change().ok_or_else(too_short)?;
        Ok((id, change))
    }

    /// What an `Index` tells, in order, with the places of the records. None if this is no index, or none that was
    /// written so, or if it tells of anything behind itself.
    pub(super) fn summary(&self) -> Option<impl Iterator<Item = (Place, Told)>> {
        if self.kind != Kind::Index as u8 {
            return None;
        }
        let payload = self.payload.get(ID..)?;
        let mut rest = Fields(payload);
        while !rest.0.is_empty() {
            let (place, _) = self.told(&mut rest)?;
            if place.offset + place.len_on_disk() > self.place.offset {
                return None;
            }
        }
        let mut rest = Fields(payload);
        Some(iter::from_fn(move || self.told(&mut rest)))
    }

    /// What the next of an index tells.
    fn told(&self, rest: &mut Fields<'_>) -> Option<(Place, Told)> {
        let Summed { kind, has_file, len, offset, fields, octets: _ } = Summed::read(rest)?;
        let place = Place { offset, len, ..self.place };
        if has_file || kind == Kind::Note {
            return Some((place, Told::Unread));
        }
        let found = Found { kind: kind as u8, has_file, payload: fields, ..*self };
        let (id, change) = found.change().ok()?;
        Some((place, Told::Change(id, change)))
    }

    /// The envelope of a `Put`, and where its content is.
    pub fn put(&self) -> Result<Put, String> {
        if self.kind != Kind::Put as u8 {
            return Err("the record is not of a new message".to_owned());
        }
        let mut fields = Fields(self.payload);
        let mut read = || {
            let id = fields.id()?;
            let _: [u8; 20] = fields.take()?;
            let len = usize::try_from(fields.u32()?).ok()?;
            Some((id, len, fields.0.get(..len)?))
        };
        let (id, len, json) = read().ok_or("the record is too short")?;
        let (envelope, file) = wire::read_envelope(id, json)?;
        Ok(Put { envelope, file, content_at: HEADER + PUT_PREFIX + len })
    }

    /// Id and progress of a change of progress.
    pub fn progress(&self) -> Result<(SpoolId, Progress), String> {
        let (id, Change::Progress { .. }) = self.change()? else {
            return Err("the record has no progress".to_owned());
        };
        let json = self.payload.get(PROGRESS_PREFIX..).ok_or("the record is too short")?;
        Ok((id, wire::read_progress(json)?))
    }
}

fn len_on_disk(payload: usize) -> usize {
    (HEADER + payload).next_multiple_of(ALIGN)
}

/// The position is part of it: a copy of a record, in a content that is a copy of a segment, is not a record.
pub(super) fn checksum(offset: u64, header: &[u8], payload: u32) -> u32 {
    let crc = crc32c::crc32c_append(crc32c::crc32c(&offset.to_le_bytes()), header);
    crc32c::crc32c_append(crc, &payload.to_le_bytes())
}

/// Lengths are checked by [`Record::fits`] before anything is written.
fn saturate(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Numbers from the front of a slice.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn id(&mut self) -> Option<SpoolId> {
        self.take().map(|id| SpoolId::from_u128(u128::from_be_bytes(id)))
    }
}
