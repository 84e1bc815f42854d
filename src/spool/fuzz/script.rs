//! What lies on disk, put down so that any octets are one, and most of them are a spool.
//!
//! The first octet is `0`; what follows any other is one segment as it is. The second are the [`Switches`]. Then come the
//! pieces: a tag (1), some small fields, and octets with their length (2) in front. Whatever is cut short ends there.

use std::collections::BTreeMap;
#[cfg(test)]
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;

use crate::spool::failed;
use crate::spool::record::{self, ALIGN, Kind, NUMBERS};
use crate::spool::segment::{self, Header, Sealed};

const SCRIPT: u8 = 0;
/// Of the spool that is laid out, and of another.
const KEY: u64 = 0x0123_4567_89ab_cdef;
const FOREIGN: u64 = 77;
/// The number of a segment of which nothing says it.
const FIRST: u64 = 1 << 32;
pub(super) const FOLDERS: [&str; 5] = ["log", "bodies", "failed", "tmp", "damaged"];
/// Octets of a `Put` before its JSON; the last 4 are the length of that.
const PUT_JSON: Range<usize> = 36..40;

/// What is done beside, one bit each.
pub(super) struct Switches(u8);

impl Switches {
    /// Something happens to the messages after the start.
    pub(super) fn changes(&self) -> bool {
        self.0 & 1 != 0
    }

    /// Segments are short, so that some are freed, and records written again.
    pub(super) fn is_small(&self) -> bool {
        self.0 & 2 != 0
    }

    /// Which change is made first.
    pub(super) fn first_change(&self) -> usize {
        usize::from(self.0 >> 4)
    }
}

/// A step of laying out what lies on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::spool) enum Piece {
    /// What comes next is in a segment whose number is so much higher; the batches of its header, counted from the one
    /// that is to come.
    Segment {
        step: u8,
        flags: u8,
        first: i8,
        void: i8,
    },
    /// `step` goes to another batch; 0 is one more record of the same.
    Record {
        kind: u8,
        flags: u8,
        step: i8,
        unsynced: u8,
        payload: Vec<u8>,
    },
    /// In the segment, but no record.
    Octets(Vec<u8>),
    Zeros(u16),
    /// The segment is so much shorter.
    Cut(u8),
    /// A file beside the segments.
    File {
        folder: u8,
        flags: u8,
        name: Vec<u8>,
        octets: Vec<u8>,
    },
}

// Of a segment.
pub(in crate::spool) const NO_HEADER: u8 = 1;
pub(in crate::spool) const OF_ANOTHER: u8 = 2;
pub(in crate::spool) const LATER_VERSION: u8 = 4;
pub(in crate::spool) const LAST_BATCHES: u8 = 8;
pub(in crate::spool) const LAST_NUMBERS: u8 = 16;
// Of a record, beside the two that are on disk.
const ON_DISK: u8 = 3;
const SPOILED: u8 = 4;
const INDEX_OFF: u8 = 8;
/// The length of a JSON is as the payload has it, right or not.
const LENGTH_AS_IS: u8 = 16;
// Of a file.
const SUM_AS_IS: u8 = 1;

impl Piece {
    fn parse(from: &mut &[u8]) -> Option<Self> {
        let [tag] = take(from)?;
        Some(match tag % 6 {
            0 => {
                let [step, flags, first, void] = take(from)?;
                Self::Segment { step, flags, first: first.cast_signed(), void: void.cast_signed() }
            }
            1 => {
                let [kind, flags, step, unsynced] = take(from)?;
                let (step, payload) = (step.cast_signed(), counted(from)?);
                Self::Record { kind, flags, step, unsynced, payload }
            }
            2 => Self::Octets(counted(from)?),
            3 => Self::Zeros(u16::from_le_bytes(take(from)?)),
            4 => {
                let [octets] = take(from)?;
                Self::Cut(octets)
            }
            _ => {
                let [folder, flags] = take(from)?;
                Self::File { folder, flags, name: counted(from)?, octets: counted(from)? }
            }
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        let mut counted = |head: &[u8], octets: &[&[u8]]| {
            out.extend_from_slice(head);
            for octets in octets {
                let len = u16::try_from(octets.len()).unwrap_or(u16::MAX);
                out.extend_from_slice(&len.to_le_bytes());
                out.extend_from_slice(&octets[..len.into()]);
            }
        };
        match self {
            Self::Segment { step, flags, first, void } => {
                counted(&[0, *step, *flags, first.cast_unsigned(), void.cast_unsigned()], &[]);
            }
            Self::Record { kind, flags, step, unsynced, payload } => {
                counted(&[1, *kind, *flags, step.cast_unsigned(), *unsynced], &[payload]);
            }
            Self::Octets(octets) => counted(&[2], &[octets]),
            Self::Zeros(n) => {
                let [low, high] = n.to_le_bytes();
                counted(&[3, low, high], &[]);
            }
            Self::Cut(n) => counted(&[4, *n], &[]),
            Self::File { folder, flags, name, octets } => {
                counted(&[5, *folder, *flags], &[name, octets]);
            }
        }
    }
}

fn take<const N: usize>(from: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = from.split_first_chunk()?;
    *from = rest;
    Some(*first)
}

fn counted(from: &mut &[u8]) -> Option<Vec<u8>> {
    let len = u16::from_le_bytes(take(from)?);
    let (octets, rest) = from.split_at(from.len().min(len.into()));
    *from = rest;
    Some(octets.to_vec())
}

pub(in crate::spool) fn pieces(mut script: &[u8]) -> Vec<Piece> {
    std::iter::from_fn(|| Piece::parse(&mut script)).collect()
}

pub(in crate::spool) fn script(switches: u8, pieces: &[Piece]) -> Vec<u8> {
    let mut octets = vec![SCRIPT, switches];
    pieces.iter().for_each(|piece| piece.write(&mut octets));
    octets
}

/// The files of the spool, by their paths in it.
pub(super) fn lay_out(octets: &[u8]) -> (Switches, BTreeMap<PathBuf, Vec<u8>>) {
    match *octets {
        [SCRIPT, switches, ref script @ ..] => (Switches(switches), Layout::of(script)),
        [_, ref segment @ ..] => {
            let number = Header::decode(segment).map_or(FIRST, |header| header.number);
            let path = Path::new("log").join(segment::name(number));
            (Switches(0), BTreeMap::from([(path, segment.to_vec())]))
        }
        [] => (Switches(0), BTreeMap::new()),
    }
}

#[derive(Default)]
struct Layout {
    files: BTreeMap<PathBuf, Vec<u8>>,
    segment: Vec<u8>,
    number: u64,
    key: u64,
    /// The number of the last batch, and the index in it that comes next.
    batch: u64,
    index: u32,
    /// No batch of this segment has a lower number. Numbers may go back within a segment; from one to the next they
    /// rise, for what an earlier one says of a later one goes when that is freed.
    floor: u64,
    highest: u64,
    /// The segment, if its last record is an index.
    sealed: Option<Sealed>,
}

impl Layout {
    fn of(script: &[u8]) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut layout = Self { number: FIRST, key: KEY, ..Self::default() };
        for piece in pieces(script) {
            layout.piece(piece);
        }
        layout.close();
        layout.files
    }

    fn close(&mut self) {
        let segment = std::mem::take(&mut self.segment);
        if !segment.is_empty() {
            self.files.insert(Path::new("log").join(segment::name(self.number)), segment);
        }
    }

    fn piece(&mut self, piece: Piece) {
        match piece {
            Piece::Segment { step, flags, first, void } => {
                self.close();
                if flags & LAST_NUMBERS != 0 {
                    self.number = u64::MAX << 33;
                }
                if flags & LAST_BATCHES != 0 {
                    self.batch = u64::MAX - 4;
                }
                // A segment that is made later has no lower number.
                let number = self.number.checked_add(u64::from(step) << 32);
                self.number = number.unwrap_or(self.number);
                self.key = if flags & OF_ANOTHER == 0 { KEY } else { FOREIGN };
                let next = self.batch.wrapping_add(1);
                let first_batch = next.wrapping_add_signed(first.into());
                let sealed = self.sealed.take();
                // The index was a batch too.
                let least = sealed.map_or(self.floor, |_| self.floor.max(self.highest + 1));
                let header = Header {
                    version: segment::VERSION + u32::from(flags & LATER_VERSION != 0),
                    number: self.number,
                    key: self.key,
                    first_batch: first_batch.max(least),
                    void_from: next.wrapping_add_signed(void.into()),
                    sealed,
                };
                self.segment = header.encode().to_vec();
                if flags & NO_HEADER != 0 {
                    self.segment[40] ^= 1;
                }
                let counts = Header::decode(&self.segment).filter(|_| flags & OF_ANOTHER == 0);
                self.floor = match counts {
                    Some(header) => self.floor.max(header.first_batch),
                    None => self.floor.max(self.highest + 1),
                };
            }
            Piece::Record { kind, flags, step, unsynced, payload } => {
                self.record(kind, flags, step, unsynced, payload);
            }
            Piece::Octets(octets) => {
                self.segment.extend_from_slice(&octets);
                self.pad();
            }
            Piece::Zeros(n) => {
                self.segment.resize(self.segment.len() + usize::from(n), 0);
                self.pad();
            }
            Piece::Cut(n) => {
                self.segment.truncate(self.segment.len().saturating_sub(n.into()));
            }
            Piece::File { folder, flags, name, octets } => self.file(folder, flags, &name, octets),
        }
    }

    fn pad(&mut self) {
        self.segment.resize(self.segment.len().next_multiple_of(ALIGN), 0);
    }

    fn record(&mut self, kind: u8, flags: u8, step: i8, unsynced: u8, mut payload: Vec<u8>) {
        self.pad();
        if kind == Kind::Put as u8 && flags & LENGTH_AS_IS == 0 && payload.len() > PUT_JSON.end {
            let json = &payload[PUT_JSON.end..];
            let mut values = serde_json::Deserializer::from_slice(json).into_iter::<IgnoredAny>();
            if let Some(Ok(_)) = values.next() {
                let len = u32::try_from(values.byte_offset()).unwrap();
                payload[PUT_JSON].copy_from_slice(&len.to_le_bytes());
            }
        }
        match step {
            0 => self.index = self.index.wrapping_add(1 + u32::from(flags & INDEX_OFF != 0)),
            _ => {
                self.batch = self.batch.wrapping_add_signed(step.into());
                self.index = u32::from(flags & INDEX_OFF != 0);
            }
        }
        self.batch = self.batch.max(self.floor);
        if self.batch <= NUMBERS {
            self.highest = self.highest.max(self.batch);
        }
        let start = self.segment.len();
        let sealed = Sealed { segment: self.number, offset: start as u64 };
        self.sealed = Some(sealed).filter(|_| kind == Kind::Index as u8);
        let out = &mut self.segment;
        out.extend_from_slice(&record::MAGIC);
        out.extend_from_slice(&[0; 4]);
        for field in [self.key, self.number, self.batch] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        out.extend_from_slice(&self.index.to_le_bytes());
        out.extend_from_slice(&[kind, flags & ON_DISK, 0, 0]);
        out.extend_from_slice(&u32::from(unsynced).to_le_bytes());
        let crc = record::checksum(start as u64, &out[start + 8..], crc32c::crc32c(&payload));
        out.extend_from_slice(&payload);
        let crc = crc ^ u32::from(flags & SPOILED != 0);
        out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
        self.pad();
    }

    /// What stands in a folder has a name without a slash, so whatever else the name has is made so.
    fn file(&mut self, folder: u8, flags: u8, name: &[u8], mut octets: Vec<u8>) {
        let plain = |octet: &u8| match octet {
            b'.' | b'-' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => char::from(*octet),
            _ => 'x',
        };
        let name: String = name.iter().take(60).map(plain).collect();
        if matches!(name.as_str(), "" | "." | "..") {
            return;
        }
        let folder = FOLDERS[usize::from(folder) % FOLDERS.len()];
        if folder == "failed" && flags & SUM_AS_IS == 0 {
            failed::mend_sum(&mut octets);
        }
        self.files.insert(Path::new(folder).join(name), octets);
    }
}

/// The script of the spool in `root`, whose segments are all of the same key.
#[cfg(test)]
pub(in crate::spool) fn describe(root: &Path, switches: u8) -> Vec<u8> {
    let mut out = Vec::new();
    let (mut number, mut batch) = (FIRST, 0);
    for folder in FOLDERS {
        let entries = fs::read_dir(root.join(folder)).into_iter().flatten();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        for path in paths {
            let octets = fs::read(&path).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            match segment::parse_name(name).filter(|_| folder == "log") {
                Some(own) => {
                    let step = u8::try_from((own >> 32) - (number >> 32)).unwrap();
                    number = own;
                    describe_segment(&octets, step, &mut batch, &mut out);
                }
                None => out.push(Piece::File {
                    folder: u8::try_from(FOLDERS.iter().position(|it| *it == folder).unwrap())
                        .unwrap(),
                    flags: 0,
                    name: name.as_bytes().to_vec(),
                    octets,
                }),
            }
        }
    }
    script(switches, &out)
}

#[cfg(test)]
fn describe_segment(octets: &[u8], step: u8, batch: &mut u64, out: &mut Vec<Piece>) {
    let ahead =
        |number: u64, batch: u64| i8::try_from(number.cast_signed() - batch.cast_signed()).unwrap();
    let header = Header::decode(octets);
    out.push(Piece::Segment {
        step,
        flags: if header.is_some() { 0 } else { NO_HEADER },
        first: header.map_or(0, |header| ahead(header.first_batch, *batch + 1)),
        void: header.map_or(0, |header| ahead(header.void_from, *batch + 1)),
    });
    let number = header.map_or(FIRST, |header| header.number);
    let mut at = segment::HEADER;
    while at < octets.len() {
        let rest = &octets[at..];
        let zeros = rest.iter().take_while(|octet| **octet == 0).count();
        if let Some(found) = record::decode(rest, at as u64, number, None) {
            let end = record::HEADER + found.place.len as usize;
            out.push(Piece::Record {
                kind: rest[40],
                flags: rest[41],
                step: ahead(found.stamp.batch, *batch),
                unsynced: u8::try_from(found.stamp.unsynced).unwrap(),
                payload: rest[record::HEADER..end].to_vec(),
            });
            *batch = found.stamp.batch;
            at += end.next_multiple_of(ALIGN);
        } else if zeros >= ALIGN {
            let zeros = u16::try_from(zeros / ALIGN * ALIGN).unwrap();
            out.push(Piece::Zeros(zeros));
            at += usize::from(zeros);
        } else {
            let end = rest.len().min(ALIGN);
            match out.last_mut() {
                Some(Piece::Octets(before)) => before.extend_from_slice(&rest[..end]),
                _ => out.push(Piece::Octets(rest[..end].to_vec())),
            }
            at += end;
        }
    }
}
