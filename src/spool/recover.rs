//! The start: reads the log once and says what is in it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem;
use std::path::{Path, PathBuf};

use tracing::warn;

use super::Failure;
use super::disk::{self, Disk, DiskFile};
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
    found.keep_what_was_put_aside(disk, paths)?;
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
    // Of one before it, that is: so the word lasts as long as what it is about.
    let sealed = |header: &Header| header.sealed.filter(|sealed| sealed.segment < header.number);
    let sealed = headers.iter().filter_map(sealed);
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
            match file.read_at(&mut start, 0) {
                Err(error) if disk::is_of_medium(&error) => start.clear(),
                read => read?,
            }
            Ok((len, start))
        };
        let (len, start) = read().map_err(Failure::at(format!("reading {}", path.display())))?;
        let header = Header::decode(&start);
        if let Some(Header { version, .. }) = header
            && version != segment::VERSION
        {
            return Err(OpenError::OtherFormat { file: path, version, ours: segment::VERSION });
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
    let mut bytes = Vec::new();
    let mut strangers = BTreeSet::new();
    for listed in segments.iter_mut().filter(|segment| segment.header.is_none()) {
        octets_into(disk, paths, listed.number, &mut bytes)?;
        let scan = segment::scan(&bytes, listed.number, key);
        listed.proven = scan.proven;
        if listed.number > segment::LIKELY && scan.highest == 0 {
            strangers.insert(listed.number);
        }
    }
    segments.retain(|segment| !strangers.contains(&segment.number));
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
        let unread = octets_into(self.disk, self.paths, number, bytes)?;
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
        // What is missing before a batch that is there was lost with the medium, and is no torn tail.
        let proven = match unread.octets.is_empty() {
            true => proven,
            false => proven.max(scan.highest.min(limit).saturating_sub(1)),
        };
        if let Some(what) = unread.to_text() {
            self.report.damaged.push(format!("{}: {what}", name(number)));
            self.damaged.insert(number);
        }

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
        // There the lengths in it may be anything.
        if listed.len > segment::LONGEST {
            return Ok(false);
        }
        let path = self.paths.segment(number);
        let reading = || Failure::at(format!("reading {}", path.display()));
        let file = self.disk.open_to_read(&path).map_err(reading())?;
        // What the medium does not give back is missing, and no reason not to start.
        let read = |offset, len, bytes: &mut Vec<u8>| match record_at(
            &*file, listed.len, offset, len, bytes,
        ) {
            Err(error) if disk::is_of_medium(&error) => Ok(Err(error)),
            read => read.map(Ok).map_err(reading()),
        };
        if read(*offset, None, bytes)?.is_err() {
            return Ok(false);
        }
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
                    match read(place.offset, Some(place.len), &mut bytes)? {
                        Ok(()) => record::decode(&bytes, place.offset, number, self.key)
                            .ok_or("the record cannot be read".to_owned())
                            .and_then(|found| found.change()),
                        Err(error) => Err(format!("the record cannot be read: {error}")),
                    }
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
        make_damaged(disk, paths)?;
        for number in &self.damaged {
            let kept = link_damaged(disk, paths, *number);
            if let Err(error) = &kept {
                // It keeps all of the log that comes after it.
                warn!("{} stays for its damage: copying it failed: {error}", name(*number));
            }
            let segment = self.index.segments.entry(*number).or_default();
            (segment.is_last_use, segment.keep) = (true, kept.is_err());
        }
        sync(disk, &paths.damaged)
    }

    /// A link is another name of the same octets: what a former run put aside is not to be written over either.
    fn keep_what_was_put_aside(&mut self, disk: &dyn Disk, paths: &Paths) -> Result<(), OpenError> {
        let aside = match disk.names(&paths.damaged) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            names => names.map_err(Failure::at(format!("reading {}", paths.damaged.display())))?,
        };
        for number in aside.iter().filter_map(|name| segment::parse_name(name)) {
            if let Some(segment) = self.index.segments.get_mut(&number) {
                segment.is_last_use = true;
            }
        }
        Ok(())
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

/// The folder is there, and on stable storage, before anything is moved to it.
fn make_damaged(disk: &dyn Disk, paths: &Paths) -> Result<(), OpenError> {
    let folder = &paths.damaged;
    let create = disk.create_dir(folder);
    create.map_err(Failure::at(format!("making the folder {}", folder.display())))?;
    sync(disk, &paths.root)
}

/// Gives a segment a second name; where the file system has no links, makes a copy.
fn link_damaged(disk: &dyn Disk, paths: &Paths, number: u64) -> io::Result<()> {
    let to = paths.damaged.join(segment::name(number));
    match disk.link(&paths.segment(number), &to) {
        // A segment that is not there cannot be kept.
        Err(error)
            if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) =>
        {
            Ok(())
        }
        // Copied before.
        Err(_) if disk.open_to_read(&to).is_ok() => Ok(()),
        Err(_) => copy(disk, paths, number, &to),
        linked => linked,
    }
}

/// The same for the side file of a message that is damaged. Without links it is moved: the message is lost either way.
pub(super) fn keep_body(disk: &dyn Disk, paths: &Paths, name: &str) -> Result<(), OpenError> {
    make_damaged(disk, paths)?;
    let (path, to) = (paths.bodies.join(name), paths.damaged.join(name));
    let kept = match disk.link(&path, &to) {
        Err(error)
            if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) =>
        {
            Ok(())
        }
        Err(_) => disk.rename(&path, &to),
        linked => linked,
    };
    kept.map_err(Failure::at(format!("putting aside {}", path.display())))?;
    sync(disk, &paths.damaged)
}

/// Keeps a segment in which damage was found under a second name, on stable storage.
pub(super) fn keep_segment(disk: &dyn Disk, paths: &Paths, number: u64) -> Result<(), OpenError> {
    make_damaged(disk, paths)?;
    let path = paths.segment(number);
    let link = link_damaged(disk, paths, number);
    link.map_err(Failure::at(format!("copying {} into damaged/", path.display())))?;
    sync(disk, &paths.damaged)
}

/// Copies a segment. What the medium does not give back is zeros.
fn copy(disk: &dyn Disk, paths: &Paths, number: u64, to: &Path) -> io::Result<()> {
    let from = disk.open_to_read(&paths.segment(number))?;
    let len = from.len()?;
    if len > segment::LONGEST {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let path = paths.tmp.join(segment::name(number));
    // Of an earlier start.
    drop(disk.remove(&path));
    let copied = disk.create(&path).and_then(|file| {
        let mut bytes = Vec::new();
        let mut at = 0;
        while at < len {
            let end = len.min(at + PIECE);
            bytes.resize(usize::try_from(end - at).map_err(io::Error::other)?, 0);
            match from.read_at(&mut bytes, at) {
                Err(error) if disk::is_of_medium(&error) => {
                    Unread::default().read_blocks(&*from, &mut bytes, at)?;
                }
                read => read?,
            }
            file.write_at(&bytes, at)?;
            at = end;
        }
        file.sync()?;
        disk.rename(&path, to)
    });
    if copied.is_err() {
        // Where it fails the next start does it.
        drop(disk.remove(&path));
    }
    copied
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
                Ok(len @ 1..=segment::LONGEST) => blanks.spares.push(Spare { path, len }),
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

/// What of a segment was not read.
#[derive(Default)]
struct Unread {
    /// What the medium does not give back, first octet and one past the last, and why. Zeros stand in for it.
    octets: Vec<(u64, u64)>,
    why: Option<io::Error>,
    /// Its length, and where the reading ended, when that is no length of a segment.
    cut: Option<(u64, u64)>,
}

impl Unread {
    fn to_text(&self) -> Option<String> {
        let mut all = Vec::new();
        for (start, end) in &self.octets {
            all.push(format!("octets {start} to {end} cannot be read"));
        }
        if let (Some(last), Some(why)) = (all.last_mut(), &self.why) {
            last.push_str(&format!(" ({why})"));
        }
        if let Some((len, end)) = self.cut {
            all.push(format!(
                "it has {len} octets, more than a segment has, and is read up to {end}"
            ));
        }
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Reads what can be read of `bytes`, which lie at `offset`; the rest is zeros.
    fn read_blocks(
        &mut self,
        file: &dyn DiskFile,
        bytes: &mut [u8],
        mut offset: u64,
    ) -> io::Result<()> {
        for block in bytes.chunks_mut(BLOCK) {
            let end = offset + block.len() as u64;
            match file.read_at(block, offset) {
                Err(error) if disk::is_of_medium(&error) => {
                    block.fill(0);
                    match self.octets.last_mut().filter(|last| last.1 == offset) {
                        Some(last) => last.1 = end,
                        None => self.octets.push((offset, end)),
                    }
                    self.why.get_or_insert(error);
                }
                read => read?,
            }
            offset = end;
        }
        Ok(())
    }
}

/// Octets that are read at once.
const PIECE: u64 = 1024 * 1024;
/// And after an error of the medium.
const BLOCK: usize = 4096;
/// So much room is made at once. Hardly a segment is longer.
const ROOM: usize = 128 * 1024 * 1024;

/// Reads all of a segment that can be read.
fn octets_into(
    disk: &dyn Disk,
    paths: &Paths,
    number: u64,
    bytes: &mut Vec<u8>,
) -> Result<Unread, OpenError> {
    let path = paths.segment(number);
    let read = disk.open_to_read(&path).and_then(|file| file_into(&*file, bytes));
    Ok(read.map_err(Failure::at(format!("reading {}", path.display())))?)
}

/// A length is nothing to go by: room is made as there is something to read.
fn file_into(file: &dyn DiskFile, bytes: &mut Vec<u8>) -> io::Result<Unread> {
    let len = file.len()?;
    let limit = len.min(segment::LONGEST);
    let room = usize::try_from(limit).map_or(ROOM, |limit| limit.min(ROOM));
    // What is no segment may be all hole. File systems were wrong about holes before, so no segment depends on it.
    let skip = |at| if len > ROOM as u64 { file.end_of_hole(at).min(limit) } else { at };
    let mut unread = Unread::default();
    bytes.clear();
    // Where there is not so much, less may do.
    drop(bytes.try_reserve_exact(room));
    let mut at = skip(0);
    while at < limit {
        let end = limit.min(at + PIECE);
        let (Ok(from), Ok(to)) = (usize::try_from(at), usize::try_from(end)) else { break };
        bytes.try_reserve(to - bytes.len()).map_err(|_no_room| io::ErrorKind::OutOfMemory)?;
        bytes.resize(to, 0);
        match file.read_at(&mut bytes[from..], at) {
            Err(error) if disk::is_of_medium(&error) => {
                unread.read_blocks(file, &mut bytes[from..], at)?;
            }
            read => read?,
        }
        at = skip(end);
    }
    unread.cut = (at < len).then_some((len, at));
    Ok(unread)
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
