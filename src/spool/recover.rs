//! The start: reads the log once and says what is in it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem;
use std::path::{Path, PathBuf};

use tracing::warn;

use super::Failure;
use super::disk::{Disk, DiskFile};
use super::failed::Found;
use super::index::Index;
use super::log::{OpenError, Paths, Report};
use super::record::{self, Change, Place, Told};
use super::segment::{self, Header};
use super::writer::{Next, Spare};
use crate::envelope::SpoolId;

pub(super) struct Recovered {
    pub(super) index: Index,
    pub(super) next: Next,
    pub(super) report: Report,
    /// Segments with damage.
    pub(super) damaged: BTreeSet<u64>,
    /// Files in `bodies/` that no message names: left over from a crash, or of a record that is damaged.
    pub(super) stray: BTreeSet<String>,
    /// Files in `failed/` that belong to nothing. There is a sentence in the report for each.
    unclaimed: Vec<PathBuf>,
    /// Files that were to become a segment.
    unnamed: Vec<PathBuf>,
    /// Messages whose side file is missing or has another length. The report has a sentence for each.
    pub(super) without_file: BTreeSet<SpoolId>,
    /// Segments that may be in the page cache only.
    unsynced: Vec<u64>,
}

/// Reads the log, puts aside what is damaged, removes what no message names. Changes no segment.
pub(super) fn replay(disk: &dyn Disk, paths: &Paths) -> Result<Recovered, OpenError> {
    let mut found = read(disk, paths, Depth::Indexes)?;
    // The done-mark of a failed message goes once its files are gone, and they must not come back after that.
    sync(disk, &paths.failed)?;
    // The header that this start writes says that they are synced, so they are.
    for number in &found.unsynced {
        let path = paths.segment(*number);
        let sync = disk.open_to_read(&path).and_then(|file| file.sync());
        sync.map_err(Failure::at(format!("syncing {}", path.display())))?;
    }
    if !found.unsynced.is_empty() {
        sync(disk, &paths.log)?;
    }
    found.put_aside(disk, paths)?;
    found.tidy_files(disk, paths)?;
    Ok(found)
}

/// How thorough a reading of the log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// Where a segment ends with an index, nothing but that. Damage in the mail is noticed when it is read.
    Indexes,
    /// All of it.
    Everything,
}

/// Reads the log and the names of all side files. Changes nothing on disk.
pub(super) fn read(disk: &dyn Disk, paths: &Paths, depth: Depth) -> Result<Recovered, OpenError> {
    let segments = list(disk, paths)?;
    let headers: Vec<_> = segments.iter().filter_map(|segment| segment.header).collect();
    let sealed = headers.iter().filter_map(|header| header.sealed);
    let sealed = sealed.filter(|_| depth == Depth::Indexes);
    // A spool of an earlier version has no such folder until it is started.
    let failed = match disk.names(&paths.failed) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        names => names.map_err(Failure::at(format!("reading {}", paths.failed.display())))?,
    };
    let failed = Found::new(failed);
    let mut replay = Replay {
        disk,
        paths,
        index: Index::new(failed.cabinet()),
        report: Report::default(),
        key: headers.first().map(|header| header.key),
        buffer: Vec::new(),
        indexes: sealed.map(|sealed| (sealed.segment, sealed.offset)).collect(),
        expected: None,
        highest: 0,
        proven: 0,
        last: None,
        damaged: BTreeSet::new(),
    };
    for (at, segment) in segments.iter().enumerate() {
        replay.segment(segment, &segments[at + 1..])?;
    }
    replay.missing_before(replay.proven.saturating_add(1));
    let unclaimed = replay.sort_out_failed(&failed)?;
    let (stray, without_file) = replay.side_files()?;
    replay.report.messages = replay.index.len();
    replay.report.in_doubt = replay.index.doubt_open_attempts();

    let blanks = blanks(disk, paths)?;
    let last_good = segments.iter().rposition(|segment| segment.header.is_some()).unwrap_or(0);
    let void_from = replay.expected.unwrap_or(1);
    let next = Next {
        key: replay.key.unwrap_or_else(segment::fresh),
        segment: segments.last().map_or(0, |segment| segment.number).max(blanks.highest),
        batch: void_from.max(replay.highest.saturating_add(1)),
        void_from,
        spares: blanks.spares,
        sealed: None,
    };
    Ok(Recovered {
        index: replay.index,
        next,
        report: replay.report,
        damaged: replay.damaged,
        stray,
        unclaimed,
        unnamed: blanks.unnamed,
        without_file,
        unsynced: segments.iter().skip(last_good).map(|segment| segment.number).collect(),
    })
}

/// A segment before its records are looked at.
struct Listed {
    number: u64,
    len: u64,
    header: Option<Header>,
    /// Its header is that of another spool.
    is_foreign: bool,
    /// With a header that cannot be read: the latest batch that its records prove to have been synced.
    proven: u64,
}

fn list(disk: &dyn Disk, paths: &Paths) -> Result<Vec<Listed>, OpenError> {
    let numbers =
        names(disk, &paths.log)?.iter().filter_map(|name| segment::parse_name(name)).collect();
    let numbers: BTreeSet<u64> = numbers;
    let mut segments = Vec::with_capacity(numbers.len());
    for number in numbers {
        let path = paths.segment(number);
        let read = || -> io::Result<(u64, Vec<u8>)> {
            let file = disk.open_to_read(&path)?;
            let len = file.len()?;
            let mut start =
                vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(segment::HEADER)];
            file.read_at(&mut start, 0)?;
            Ok((len, start))
        };
        let (len, start) = read().map_err(Failure::at(format!("reading {}", path.display())))?;
        let header = Header::decode(&start);
        if let Some(Header { version, .. }) = header
            && version != segment::VERSION
        {
            return Err(OpenError::OtherFormat { file: path, version });
        }
        let header = header.filter(|header| header.number == number);
        segments.push(Listed { number, len, header, is_foreign: false, proven: 0 });
    }
    // A segment of another spool has no say here.
    let key = common_key(&segments);
    for listed in &mut segments {
        listed.is_foreign = listed.header.is_some_and(|header| Some(header.key) != key);
        listed.header = listed.header.filter(|_| !listed.is_foreign);
    }
    for listed in segments.iter_mut().filter(|segment| segment.header.is_none()) {
        let bytes = octets(disk, paths, listed.number)?;
        listed.proven = segment::scan(&bytes, listed.number, key).proven;
    }
    Ok(segments)
}

/// The key that most headers have; of several such, that of the latest segment.
fn common_key(segments: &[Listed]) -> Option<u64> {
    let keys = || segments.iter().filter_map(|segment| segment.header).map(|header| header.key);
    keys().max_by_key(|key| keys().filter(|other| other == key).count())
}

struct Replay<'a> {
    disk: &'a dyn Disk,
    paths: &'a Paths,
    index: Index,
    report: Report,
    key: Option<u64>,
    buffer: Vec<u8>,
    /// Where segments that are full have their index.
    indexes: BTreeMap<u64, u64>,
    /// The number of the next batch that counts; unknown before the first.
    expected: Option<u64>,
    /// The highest number of a batch of which anything is on disk.
    highest: u64,
    /// The latest batch that was synced once.
    proven: u64,
    /// The segment that was read last, and where it has no records.
    last: Option<(u64, Vec<(usize, usize)>)>,
    /// Segments to put aside.
    damaged: BTreeSet<u64>,
}

impl Replay<'_> {
    fn segment(&mut self, listed: &Listed, later: &[Listed]) -> Result<(), OpenError> {
        // One buffer for all: the allocator would keep the room of many.
        let mut bytes = mem::take(&mut self.buffer);
        let is_known = self.by_index(listed, &mut bytes)?;
        if !is_known {
            self.by_records(listed, later, &mut bytes)?;
        }
        self.buffer = bytes;
        Ok(())
    }

    /// Reads all of the segment into `bytes`, and takes what its records say.
    fn by_records(
        &mut self,
        listed: &Listed,
        later: &[Listed],
        bytes: &mut Vec<u8>,
    ) -> Result<(), OpenError> {
        let number = listed.number;
        octets_into(self.disk, self.paths, number, bytes)?;
        let scan = segment::scan(bytes, number, self.key);
        self.index.segments.entry(number).or_default().len = listed.len;
        self.key = self.key.or(scan.key);
        self.highest = self.highest.max(scan.highest);
        let next_header = later.iter().find_map(|segment| segment.header);
        // From here on nothing in this segment counts.
        let limit = next_header.map_or(u64::MAX, |header| header.void_from);
        // All up to here was synced once.
        let proven = later
            .iter()
            .map(|segment| match segment.header {
                Some(header) => header.void_from.saturating_sub(1),
                None => segment.proven,
            })
            .fold(scan.proven, u64::max);

        match listed.header {
            Some(header) => {
                self.missing_before(header.void_from);
                self.expected = Some(self.expected.unwrap_or(0).max(header.first_batch));
                self.highest = self.highest.max(header.first_batch.saturating_sub(1));
            }
            // A first start that failed may have left one, and the next had a key of its own.
            None if listed.is_foreign && scan.batches.is_empty() && !scan.is_torn => {}
            // It had one before it had its name.
            None => {
                self.report.damaged.push(format!("{}: its header is damaged", name(number)));
                self.damaged.insert(number);
            }
        }
        self.last = Some((number, scan.holes));
        for batch in &scan.batches {
            let expected = self.expected.unwrap_or(batch.number);
            if batch.number < expected || batch.number >= limit {
                continue;
            }
            self.missing_before(batch.number.min(proven.saturating_add(1)));
            if self.expected.is_some_and(|expected| expected < batch.number) {
                // What is not proven to have been synced tears the log, and this is behind it.
                break;
            }
            for record in &batch.records {
                self.take(record.place, record.change());
            }
            self.expected = Some(batch.number + 1);
        }
        self.proven = self.proven.max(proven);
        if next_header.is_none() {
            self.report.torn |=
                scan.is_torn || self.expected.is_some_and(|expected| scan.highest >= expected);
        }
        Ok(())
    }

    /// Takes what the index of the segment tells; false where it has none that can be read. All of the segment was synced
    /// before it got one.
    fn by_index(&mut self, listed: &Listed, bytes: &mut Vec<u8>) -> Result<bool, OpenError> {
        let number = listed.number;
        let (Some(header), Some(offset)) = (listed.header, self.indexes.get(&number)) else {
            return Ok(false);
        };
        let path = self.paths.segment(number);
        let reading = || Failure::at(format!("reading {}", path.display()));
        let file = self.disk.open_to_read(&path).map_err(reading())?;
        let read = |offset, len, bytes: &mut Vec<u8>| {
            record_at(&*file, listed.len, offset, len, bytes).map_err(reading())
        };
        read(*offset, None, bytes)?;
        let Some(found) = record::decode(bytes, *offset, number, self.key) else {
            return Ok(false);
        };
        let Some(summary) = found.summary() else { return Ok(false) };
        self.missing_before(header.void_from);
        self.index.segments.entry(number).or_default().len = listed.len;
        for (place, told) in summary {
            let change = match told {
                Told::Change(id, change) => Ok((id, change)),
                Told::Unread => {
                    let mut bytes = Vec::new();
                    read(place.offset, Some(place.len), &mut bytes)?;
                    let found = record::decode(&bytes, place.offset, number, self.key);
                    found.ok_or("the record cannot be read".to_owned()).and_then(|f| f.change())
                }
            };
            self.take(place, change);
        }
        self.last = Some((number, Vec::new()));
        self.expected = Some(found.stamp.batch + 1);
        self.highest = self.highest.max(found.stamp.batch);
        self.proven = self.proven.max(found.stamp.batch);
        Ok(true)
    }

    /// A record that counts.
    fn take(&mut self, place: Place, change: Result<(SpoolId, Change), String>) {
        match change {
            Ok((id, change)) => drop(self.index.change(id, &change, place)),
            Err(what) => {
                let at = format!("{}, octet {}", name(place.segment), place.offset);
                self.report.damaged.push(format!("{at}: {what}"));
                self.damaged.insert(place.segment);
            }
        }
    }

    /// All batches before `end` were synced once: those that are not there are damage.
    fn missing_before(&mut self, end: u64) {
        let Some(start) = self.expected.filter(|expected| *expected < end) else { return };
        self.expected = Some(end);
        let (number, holes) = self.last.clone().unwrap_or_default();
        let last = end - 1;
        let mut text = match start == last {
            true => format!("{}: batch {start} cannot be read", name(number)),
            false => format!("{}: batches {start} to {last} cannot be read", name(number)),
        };
        for (start, end) in holes {
            text.push_str(&format!("; octets {start} to {end} are no record"));
        }
        self.report.damaged.push(text);
        self.damaged.insert(number);
    }

    /// Says of each failed message where it lies, and returns the files that belong to none.
    fn sort_out_failed(&mut self, found: &Found) -> Result<Vec<PathBuf>, OpenError> {
        let mut failed = mem::take(&mut self.index.failed);
        let is_in_log = |id| self.index.get(id).is_some();
        let report = &mut self.report;
        let (strays, marks) = failed.sort_out(found, is_in_log, self.disk, self.paths, report)?;
        self.index.failed = failed;
        marks.into_iter().for_each(|mark| self.index.release(Some(mark)));
        Ok(strays)
    }

    /// Looks for the side file of each message. Returns the files that no message names, and the messages without.
    fn side_files(&mut self) -> Result<(BTreeSet<String>, BTreeSet<SpoolId>), OpenError> {
        let mut stray: BTreeSet<String> =
            names(self.disk, &self.paths.bodies)?.into_iter().collect();
        let mut without_file = BTreeSet::new();
        for (id, file) in self.index.files() {
            let path = self.paths.bodies.join(&*file.name);
            let is_there = stray.remove(&*file.name);
            let len = if is_there {
                self.disk.open_to_read(&path).and_then(|file| file.len()).unwrap_or(0)
            } else {
                0
            };
            if len != file.len {
                without_file.insert(*id);
                let (path, should) = (path.display(), file.len);
                self.report.damaged.push(match is_there {
                    true => format!("message {id}: {path} has {len} octets instead of {should}"),
                    false => format!("message {id}: {path} is missing"),
                });
            }
        }
        Ok((stray, without_file))
    }
}

impl Recovered {
    /// Keeps damaged segments under a second name: in the log they are removed when all else in them is done.
    fn put_aside(&mut self, disk: &dyn Disk, paths: &Paths) -> Result<(), OpenError> {
        if self.damaged.is_empty() && self.unclaimed.is_empty() {
            return Ok(());
        }
        let folder = &paths.damaged;
        let create = disk.create_dir(folder);
        create.map_err(Failure::at(format!("making the folder {}", folder.display())))?;
        // Before anything is moved there.
        sync(disk, &paths.root)?;
        for number in &self.damaged {
            let to = folder.join(segment::name(*number));
            let linked = match disk.link(&paths.segment(*number), &to) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                linked => linked,
            };
            if linked.is_err() {
                // Not every file system has links.
                self.index.segments.entry(*number).or_default().keep = true;
            }
            self.index.segments.entry(*number).or_default().is_last_use = true;
        }
        sync(disk, folder)
    }

    /// Strays are removed; with damage about they may belong to it, and are put aside, as is what lies in `failed/` and
    /// belongs to nothing.
    fn tidy_files(&mut self, disk: &dyn Disk, paths: &Paths) -> Result<(), OpenError> {
        let put_aside = |path: &Path| {
            let name = path.file_name().unwrap_or_default();
            let moved = disk.rename(path, &paths.damaged.join(name));
            moved.map_err(Failure::at(format!("putting aside {}", path.display())))
        };
        let is_kept = !self.damaged.is_empty();
        for path in self.stray.iter().map(|name| paths.bodies.join(name)) {
            match is_kept {
                true => put_aside(&path)?,
                false => remove_stray(disk, &path, &mut self.report),
            }
        }
        for path in &self.unclaimed {
            put_aside(path)?;
        }
        if !self.unclaimed.is_empty() || is_kept && !self.stray.is_empty() {
            sync(disk, &paths.damaged)?;
        }
        for path in &self.unnamed {
            remove_stray(disk, path, &mut self.report);
        }
        for name in names(disk, &paths.tmp)? {
            remove_stray(disk, &paths.tmp.join(name), &mut self.report);
        }
        Ok(())
    }
}

/// What is in the log's folder and no segment.
#[derive(Default)]
struct Blanks {
    spares: Vec<Spare>,
    /// The highest number that a spare had as a segment.
    highest: u64,
    unnamed: Vec<PathBuf>,
}

fn blanks(disk: &dyn Disk, paths: &Paths) -> Result<Blanks, OpenError> {
    let mut blanks = Blanks::default();
    for name in names(disk, &paths.log)? {
        let path = paths.log.join(&name);
        if let Some(number) = segment::parse_spare(&name) {
            blanks.highest = blanks.highest.max(number);
            match disk.open_to_read(&path).and_then(|file| file.len()) {
                Ok(len) if len > 0 => blanks.spares.push(Spare { path, len }),
                Ok(_) | Err(_) => blanks.unnamed.push(path),
            }
        } else if name.starts_with(segment::UNNAMED) {
            blanks.unnamed.push(path);
        }
    }
    Ok(blanks)
}

/// It only takes space: no reason not to start.
fn remove_stray(disk: &dyn Disk, path: &Path, report: &mut Report) {
    match disk.remove(path) {
        Ok(()) => report.strays += 1,
        Err(error) => warn!("{} stays until the next start: {error}", path.display()),
    }
}

/// Reads the record at `offset` of a file of `end` octets, whose payload has `len`, or as many as it says itself. Nothing
/// where none can be.
fn record_at(
    file: &dyn DiskFile,
    end: u64,
    offset: u64,
    len: Option<u32>,
    bytes: &mut Vec<u8>,
) -> io::Result<()> {
    let mut read = |len: u64| {
        bytes.clear();
        let is_there = offset.checked_add(len).is_some_and(|ends| ends <= end);
        if let Some(len) = usize::try_from(len).ok().filter(|_| is_there) {
            bytes.resize(len, 0);
            file.read_at(bytes, offset)?;
        }
        Ok(record::payload_len(bytes))
    };
    let len = match len {
        Some(len) => Some(len),
        None => read(record::HEADER as u64)?,
    };
    match len {
        Some(len) => read(record::HEADER as u64 + u64::from(len)).map(drop),
        None => Ok(()),
    }
}

fn octets(disk: &dyn Disk, paths: &Paths, number: u64) -> Result<Vec<u8>, OpenError> {
    let mut bytes = Vec::new();
    octets_into(disk, paths, number, &mut bytes)?;
    Ok(bytes)
}

fn octets_into(
    disk: &dyn Disk,
    paths: &Paths,
    number: u64,
    bytes: &mut Vec<u8>,
) -> Result<(), OpenError> {
    let path = paths.segment(number);
    let mut read = || {
        let file = disk.open_to_read(&path)?;
        bytes.clear();
        bytes.resize(usize::try_from(file.len()?).map_err(io::Error::other)?, 0);
        file.read_at(bytes, 0)
    };
    Ok(read().map_err(Failure::at(format!("reading {}", path.display())))?)
}

fn sync(disk: &dyn Disk, folder: &Path) -> Result<(), OpenError> {
    let sync = disk.sync_dir(folder);
    Ok(sync.map_err(Failure::at(format!("syncing the folder {}", folder.display())))?)
}

/// The names in a folder that can be ours.
fn names(disk: &dyn Disk, folder: &Path) -> Result<Vec<String>, OpenError> {
    let names = disk.names(folder);
    Ok(names.map_err(Failure::at(format!("reading the folder {}", folder.display())))?)
}

fn name(number: u64) -> String {
    format!("log/{}", segment::name(number))
}
