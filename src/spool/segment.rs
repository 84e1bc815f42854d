//! Segments: their names, their headers, and finding the records in one.

use std::time::Duration;

use super::record::{self, ALIGN, Fields, Found, NUMBERS};
use crate::clock;
use crate::envelope::SpoolId;

/// Octets of the header; the first record follows.
pub(super) const HEADER: usize = 64;
/// What this program reads and writes. Others are refused.
pub(super) const VERSION: u32 = 4;

/// No segment is longer, in octets: not with the longest record there can be. What a file has beyond is not read.
pub(super) const LONGEST: u64 = (4 << 30) + (64 << 20);
/// Numbers above this are given only after one that is close to it, and none is at any pace: so a name with one makes no
/// segment of a file, unless header or records say the same. Else a file with any name at all could use up the numbers
/// from which the next is chosen.
pub(super) const LIKELY: u64 = NUMBERS / 2;

/// How the names of files begin that are to become a segment, and of spares.
pub(super) const UNNAMED: &str = "new-";
const SPARE: &str = "spare-";
const MAGIC: [u8; 8] = *b"sluicelg";

/// How long things are, in octets. Tests take smaller ones.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    /// A segment is closed when the next batch would make it longer. A batch that is longer by itself gets one of its
    /// own.
    pub(super) segment: u64,
    /// A segment in which nothing lives is given up from this length on, though it is not full: on a disk that it has
    /// filled, nothing more would come that closes it. Not sooner, so that this costs next to nothing.
    pub(super) idle: u64,
    /// A reserve that has to be made, because there is no spare: some 60,000 done-marks.
    pub(super) reserve: u64,
    /// As long as the log has no more segments than this, nothing is written again to shorten it.
    pub(super) few: usize,
    /// How long nothing must have happened before a reserve is made.
    pub(super) quiet: Duration,
    /// How long the disk may refuse to read a record that is to be written again (EIO) before it counts as damaged.
    pub(super) patience: Duration,
    /// Of new messages so much is kept in memory until they are opened.
    pub(super) fresh: usize,
}

impl Default for Geometry {
    fn default() -> Self {
        const MIB: u64 = 1024 * 1024;
        Self {
            segment: 64 * MIB,
            idle: 4 * MIB,
            reserve: 4 * MIB,
            few: 2,
            quiet: Duration::from_secs(1),
            patience: Duration::from_secs(5 * 60),
            fresh: 8 * 1024 * 1024,
        }
    }
}

/// The first 64 octets of a segment, in every version: magic (8), version (4), CRC-32C (4) over the rest, number,
/// key, `first_batch`, `void_from`, segment and offset of `sealed` (8 each, zeros for none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) number: u64,
    /// Random, the same in all segments of a spool.
    pub(super) key: u64,
    /// The number of the first batch that is written here.
    pub(super) first_batch: u64,
    /// In the segments before, batches from this one on do not count. All before it had been synced.
    pub(super) void_from: u64,
    /// A segment before that was full: where its index stands in it.
    pub(super) sealed: Option<Sealed>,
}

/// A segment that ends with an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sealed {
    pub(super) segment: u64,
    pub(super) offset: u64,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER] {
        let mut out = Vec::with_capacity(HEADER);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        let (sealed, offset) = self.sealed.map_or((0, 0), |sealed| (sealed.segment, sealed.offset));
        for field in [self.number, self.key, self.first_batch, self.void_from, sealed, offset] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        let mut header = [0; HEADER];
        header[..out.len()].copy_from_slice(&out);
        let crc = Self::checksum(&header);
        header[12..16].copy_from_slice(&crc.to_le_bytes());
        header
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let header: &[u8; HEADER] = bytes.first_chunk()?;
        let mut fields = Fields(header);
        let magic: [u8; 8] = fields.take()?;
        let (version, crc) = (fields.u32()?, fields.u32()?);
        if magic != MAGIC || crc != Self::checksum(header) {
            return None;
        }
        let mut next = || fields.u64();
        let (number, key, first_batch, void_from) = (next()?, next()?, next()?, next()?);
        let sealed = Sealed { segment: next()?, offset: next()? };
        let sealed = Some(sealed).filter(|sealed| sealed.offset > 0);
        // No start writes another.
        let is_possible = 1 <= void_from && void_from <= first_batch && first_batch <= NUMBERS;
        let header = Self { version, number, key, first_batch, void_from, sealed };
        is_possible.then_some(header)
    }

    fn checksum(header: &[u8; HEADER]) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&header[8..12]), &header[16..])
    }
}

/// A segment's number: what comes later is higher. The lower half is random, so that no record of a segment that a power
/// cut undid is ever taken for one of its successor, though that be written over the same blocks.
pub(super) fn successor(number: u64) -> u64 {
    let random = u32::try_from(fresh() >> 32).unwrap_or(0);
    (number >> 32).saturating_add(1) << 32 | u64::from(random)
}

/// From the random parts of two ids.
pub(super) fn fresh() -> u64 {
    let [low, high] = [0; 2].map(|_: u8| SpoolId::new(clock::wall()).as_u128().to_le_bytes());
    let mut random = [0; 8];
    random[..4].copy_from_slice(&low[..4]);
    random[4..].copy_from_slice(&high[..4]);
    u64::from_le_bytes(random)
}

/// Of a file that is to become a segment, or a spare.
pub(super) fn unnamed(number: u64) -> String {
    format!("{UNNAMED}{number:016x}")
}

pub(super) fn spare(number: u64) -> String {
    format!("{SPARE}{number:016x}")
}

/// The number in a name that [`spare`] made.
pub(super) fn parse_spare(text: &str) -> Option<u64> {
    // Nothing in it says so too.
    parse_number(text.strip_prefix(SPARE)?).filter(|number| *number <= LIKELY)
}

pub(super) fn name(number: u64) -> String {
    format!("{number:016x}.seg")
}

/// The number in a name that [`name`] made.
pub(super) fn parse_name(text: &str) -> Option<u64> {
    let number = parse_number(text.strip_suffix(".seg")?)?;
    (name(number) == text).then_some(number)
}

fn parse_number(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok().filter(|number| *number <= NUMBERS)
}

/// A whole batch of a segment.
pub(super) struct Batch<'a> {
    pub(super) number: u64,
    pub(super) records: Vec<Found<'a>>,
}

/// What was found in a segment.
#[derive(Default)]
pub(super) struct Scan<'a> {
    /// The batches that are whole, in the order of their places.
    pub(super) batches: Vec<Batch<'a>>,
    /// The latest batch that a record proves to have been synced; 0 for none.
    pub(super) proven: u64,
    /// The highest number of a batch of which anything was found.
    pub(super) highest: u64,
    /// Behind the last record something is there that was to be one and is not whole.
    pub(super) is_torn: bool,
    /// Where something stands that is no record, first octet and one past the last.
    pub(super) holes: Vec<(usize, usize)>,
    /// The key of the records.
    pub(super) key: Option<u64>,
}

/// Finds all that is whole in the octets of a segment, past whatever is not.
pub(super) fn scan(bytes: &[u8], number: u64, mut key: Option<u64>) -> Scan<'_> {
    let mut scan = Scan::default();
    let mut open: Vec<Found<'_>> = Vec::new();
    let mut hole = None;
    let mut at = HEADER;
    while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
        let Some(found) = record::decode(rest, at as u64, number, key) else {
            if hole.is_none() && rest.iter().all(|octet| *octet == 0) {
                break;
            }
            scan.is_torn |= record::claims(rest, number);
            hole.get_or_insert(at);
            at += ALIGN;
            continue;
        };
        if let Some(start) = hole.take() {
            scan.holes.push((start, at));
            scan.is_torn = false;
        }
        at += found.len_on_disk();
        key = key.or(Some(found.stamp.key));
        scan.proven = scan.proven.max(found.proven());
        scan.highest = scan.highest.max(found.stamp.batch);
        let follows = open.last().is_some_and(|last| {
            last.stamp.batch == found.stamp.batch && last.index + 1 == found.index
        });
        if !follows {
            open.clear();
        }
        if !follows && found.index != 0 {
            continue;
        }
        open.push(found);
        if found.is_last {
            let records = std::mem::take(&mut open);
            scan.batches.push(Batch { number: found.stamp.batch, records });
        }
    }
    if let Some(start) = hole {
        scan.holes.push((start, bytes.len()));
    }
    scan.key = key;
    scan
}
