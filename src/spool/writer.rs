//! The writer's thread: it alone changes log and index. It takes all that waits as one batch.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::mem;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tracing::{error, info, warn};

use super::disk::{DiskFile, Lock};
use super::index::{Entry, Index, Living};
use super::log::{Counted, Shared};
use super::record::{self, Change, Place, Record, Stamp, Summary};
use super::segment::{self, Header, Sealed};
use super::side_file::{FileRef, Guard};
use super::teller::Teller;
use super::{Failure, SpoolError, Stored, lock, recover, wait_until};
use crate::clock;
use crate::envelope::{QueueState, RcptStatus, SpoolId};
use crate::outcome::{self, Cause, Scope};

/// Octets of one batch; a single request may be longer.
const BATCH: usize = 8 * 1024 * 1024;
/// How long what was written lazily waits for its sync.
const LAZY: Duration = Duration::from_millis(20);
/// Octets that are written again at once, to shorten the log; more only when more comes in.
const COPY: u64 = 128 * 1024;
/// Messages that are looked at for that at once.
const LOOK: usize = 4_096;
/// How long after a trouble the disk is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// The same for a segment that could not be removed, or put aside.
const REMOVE_AGAIN: Duration = Duration::from_secs(60);
/// Marks of failed messages that are written again at once.
const MARKS: usize = 1024;
/// Spares that are kept, the reserve among them. None is made where there is no room for two segments.
const SPARES: usize = 3;
/// Octets of a reserve that are written at once.
const PIECE: usize = 256 * 1024;
/// Requests that wait. The next ones wait for a place, which slows down who sends them.
const WAITING: usize = 1024;
/// Notes that are kept.
const NOTES: usize = 4096;

/// One `apply`.
pub(super) struct Request {
    pub(super) records: Vec<Record>,
    /// Side files of the messages; removed unless the request succeeds.
    pub(super) files: Vec<Guard>,
    pub(super) is_durable: bool,
    pub(super) reply: oneshot::Sender<Result<(), SpoolError>>,
    pub(super) held: Counted,
    pub(super) permit: Option<OwnedSemaphorePermit>,
}

impl Request {
    /// One of the spool's own, written lazily. It has no place among those that wait: there are never many.
    pub(super) fn new(
        shared: &Shared,
        records: Vec<Record>,
    ) -> (Self, oneshot::Receiver<Result<(), SpoolError>>) {
        let (reply, answer) = oneshot::channel();
        let held = Counted::new(Arc::clone(&shared.space), 0);
        let files = Vec::new();
        (Self { records, files, is_durable: false, reply, held, permit: None }, answer)
    }

    fn len_on_disk(&self) -> usize {
        self.records.iter().map(Record::len_on_disk).sum()
    }

    pub(super) fn answer(self, answer: Result<(), SpoolError>) {
        let Self { records: _, files, is_durable: _, reply, held, permit } = self;
        if answer.is_ok() {
            files.into_iter().for_each(Guard::disarm);
        }
        drop((held, permit));
        // Who no longer waits does not want to know.
        drop(reply.send(answer));
    }
}

/// What waits for the writer.
pub(super) struct Queue {
    state: Mutex<Waiting>,
    changed: Condvar,
    places: Arc<Semaphore>,
}

#[derive(Default)]
struct Waiting {
    requests: VecDeque<Request>,
    /// Files to remove.
    discarded: Vec<PathBuf>,
    is_closed: bool,
    /// The writer sleeps, and nobody has woken it yet.
    is_asleep: bool,
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.requests.is_empty() && self.discarded.is_empty() && !self.is_closed
    }
}

/// What the writer is to do next.
struct Work {
    requests: Vec<Request>,
    discarded: Vec<PathBuf>,
    is_last: bool,
}

impl Queue {
    pub(super) fn new() -> Self {
        let places = Arc::new(Semaphore::new(WAITING));
        Self { state: Mutex::default(), changed: Condvar::new(), places }
    }

    /// A place among those that wait.
    pub(super) async fn permit(&self) -> Result<OwnedSemaphorePermit, SpoolError> {
        let permit = Arc::clone(&self.places).acquire_owned().await;
        permit.map_err(|_closed| SpoolError::Closed)
    }

    pub(super) fn push(&self, request: Request) -> Result<(), SpoolError> {
        let mut state = lock(&self.state);
        if state.is_closed {
            return Err(SpoolError::Closed);
        }
        state.requests.push_back(request);
        self.wake(state);
        Ok(())
    }

    /// Not for nothing: to notify takes a system call, whoever waits.
    fn wake(&self, mut state: MutexGuard<'_, Waiting>) {
        let is_asleep = mem::take(&mut state.is_asleep);
        drop(state);
        if is_asleep {
            self.changed.notify_one();
        }
    }

    /// After the end of the writer the next start removes the file.
    pub(super) fn discard(&self, path: PathBuf) {
        let mut state = lock(&self.state);
        if !state.is_closed {
            state.discarded.push(path);
            self.wake(state);
        }
    }

    /// What waits is still done; nothing more comes.
    pub(super) fn close(&self) {
        let mut state = lock(&self.state);
        state.is_closed = true;
        self.places.close();
        self.wake(state);
    }

    fn is_empty(&self) -> bool {
        lock(&self.state).is_empty()
    }

    /// Waits for work, at most until `deadline`.
    fn wait(&self, deadline: Option<Instant>) -> Work {
        let has_work = |state: &Waiting| !state.is_empty();
        let mut state = lock(&self.state);
        state.is_asleep = state.is_empty();
        let mut state = wait_until(&self.changed, state, deadline, has_work);
        state.is_asleep = false;
        let mut requests = Vec::new();
        let mut len = 0;
        while let Some(request) = state.requests.front() {
            len += request.len_on_disk();
            if len > BATCH && !requests.is_empty() {
                break;
            }
            requests.extend(state.requests.pop_front());
        }
        let is_last = state.is_closed && state.requests.is_empty();
        Work { requests, discarded: mem::take(&mut state.discarded), is_last }
    }
}

/// Where the log goes on.
#[derive(Clone, Debug)]
pub(super) struct Next {
    pub(super) key: u64,
    /// The latest segment that there is; 0 for none.
    pub(super) segment: u64,
    /// No batch of this number or a higher one was ever written.
    pub(super) batch: u64,
    /// Batches from here on do not count, whatever is on disk.
    pub(super) void_from: u64,
    pub(super) spares: Vec<Spare>,
    /// The segment before, if it ends with an index.
    pub(super) sealed: Option<Sealed>,
}

/// A file that was a segment and is to become one again: its blocks are there, so that writing needs no space and
/// changes no length.
#[derive(Clone, Debug)]
pub(super) struct Spare {
    pub(super) path: PathBuf,
    pub(super) len: u64,
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    next: Next,
    /// The segment that is appended to; none after a trouble.
    current: Option<Current>,
    /// Written, answered and not yet synced: written again if their segment must be abandoned. They are the batches
    /// from `next.void_from` on.
    unsynced: Vec<(Record, Place)>,
    sync_by: Option<Instant>,
    /// Side files of messages that are gone: removed when that is synced.
    gone: Vec<PathBuf>,
    /// A segment was removed or became a spare, and that is not synced.
    is_removed: bool,
    /// The segment whose live records are being written again.
    copying: Option<Copying>,
    /// Not before, for some of them could not be read.
    copy_again_at: Option<Instant>,
    /// The segment of which that was told.
    told: Option<u64>,
    /// Messages that the medium does not give back, and since when.
    unread: BTreeMap<SpoolId, Instant>,
    /// Segments that are in `damaged/`.
    kept: BTreeSet<u64>,
    /// They could not be brought there: not before that again.
    keep_again_at: Option<Instant>,
    /// A segment could not be removed: not before that again.
    remove_again_at: Option<Instant>,
    /// Octets of the last batch.
    last_len: u64,
    /// When something was written last.
    wrote_at: Instant,
    buffer: Vec<u8>,
    trouble: Option<Trouble>,
    teller: Teller,
    /// Lets go of the spool when the thread ends.
    _lock: Lock,
}

struct Current {
    number: u64,
    file: Arc<dyn DiskFile>,
    /// Octets that are written.
    len: u64,
    /// Octets that the file had when it became this segment.
    recycled: u64,
    /// What its index will say.
    summary: Summary,
}

impl Current {
    fn len_on_disk(&self) -> u64 {
        self.len.max(self.recycled)
    }
}

/// What is written again.
#[derive(Default)]
struct Again {
    /// With where they stand now.
    moved: Vec<(Record, Place)>,
    /// Ends of messages that are damaged.
    settled: Vec<Record>,
}

impl Again {
    fn records(&self) -> impl Iterator<Item = &Record> {
        self.moved.iter().map(|(record, _)| record).chain(&self.settled)
    }

    fn into_records(self) -> impl Iterator<Item = Record> {
        self.moved.into_iter().map(|(record, _)| record).chain(self.settled)
    }
}

/// How far that has come.
struct Copying {
    segment: u64,
    /// The last message that was looked at.
    after: Option<SpoolId>,
}

/// Writing failed.
struct Trouble {
    failure: Failure,
    /// Everything is refused until then; none after a first failure, when a new segment could be opened.
    retry_at: Option<Instant>,
}

impl Writer {
    /// Opens the first segment of this run.
    pub(super) fn start(shared: Arc<Shared>, next: Next, lock: Lock) -> Result<Self, Failure> {
        let mut writer = Self {
            shared,
            next,
            current: None,
            unsynced: Vec::new(),
            sync_by: None,
            gone: Vec::new(),
            is_removed: false,
            copying: None,
            copy_again_at: None,
            told: None,
            unread: BTreeMap::new(),
            kept: BTreeSet::new(),
            keep_again_at: None,
            remove_again_at: None,
            last_len: 0,
            wrote_at: clock::now(),
            buffer: Vec::new(),
            trouble: None,
            teller: Teller::start().map_err(Failure::at("starting spool-teller"))?,
            _lock: lock,
        };
        writer.count_spares();
        writer.open_segment()?;
        writer.tidy();
        Ok(writer)
    }

    pub(super) fn run(mut self) {
        let _end = End(Arc::clone(&self.shared));
        loop {
            let deadlines = [self.sync_by, self.retry_at(), self.reserve_at(), self.copy_at()];
            let deadline = deadlines.into_iter().flatten().min();
            let work = self.shared.queue.wait(deadline);
            if !work.requests.is_empty() {
                self.commit(work.requests);
            }
            for path in work.discarded {
                self.remove_file(path);
            }
            let now = clock::now();
            if self.sync_by.is_some_and(|at| at <= now) || work.is_last {
                self.sync_lazy();
            }
            // At the end once more, whatever the time: something may not be on disk yet.
            let is_left = work.is_last && self.current.is_none();
            if is_left || self.retry_at().is_some_and(|at| at <= now) {
                self.retry();
            }
            self.tidy();
            if work.is_last {
                return;
            }
            self.copy();
            if self.reserve_at().is_some_and(|at| at <= now) {
                self.make_reserve();
            }
        }
    }

    /// All of `requests` as one batch. Those that ask for what cannot be are answered by themselves.
    fn commit(&mut self, requests: Vec<Request>) {
        let mut batch = Vec::with_capacity(requests.len());
        let mut changed = Changed::default();
        changed.messages.reserve(requests.len());
        let mut answers = Vec::new();
        let index = lock(&self.shared.index);
        for mut request in requests {
            match changed.admit(&index, &mut request.records) {
                // It asked for what came before it to be decided.
                Ok(()) if request.records.is_empty() => answers.push((request, Ok(()))),
                Ok(()) => batch.push(request),
                Err(error) => answers.push((request, Err(error))),
            }
        }
        drop(index);
        answers.into_iter().for_each(|(request, answer)| request.answer(answer));
        if batch.is_empty() {
            return;
        }
        if self.retry_at().is_some_and(|at| at > clock::now()) {
            return self.refuse(batch);
        }
        match self.write(&batch) {
            Ok(places) => self.count(batch, places),
            Err(failure) => {
                self.abandon(failure);
                self.refuse(batch);
            }
        }
    }

    /// The batch is on disk, and synced if one of the requests asks for it, when this returns `Ok`.
    fn write(&mut self, batch: &[Request]) -> Result<Vec<Place>, Failure> {
        let records: Vec<&Record> = batch.iter().flat_map(|request| &request.records).collect();
        self.append(&records, batch.iter().any(|request| request.is_durable))
    }

    /// The same for `records`.
    fn append(&mut self, records: &[&Record], is_durable: bool) -> Result<Vec<Place>, Failure> {
        let len: usize = records.iter().map(|record| record.len_on_disk()).sum();
        let size = self.shared.geometry.segment;
        let is_full = |current: &Current| {
            current.len > segment::HEADER as u64 && current.len + len as u64 > size
        };
        if self.current.as_ref().is_some_and(is_full) {
            self.seal()?;
        }
        if self.current.is_none() {
            self.open_segment()?;
        }
        let Some(current) = &mut self.current else {
            return Err(Failure::at("writing")(io::Error::other("no segment is open")));
        };
        let unsynced = self.next.batch - self.next.void_from;
        let stamp = Stamp {
            key: self.next.key,
            segment: current.number,
            batch: self.next.batch,
            unsynced: u32::try_from(unsynced).unwrap_or(u32::MAX),
        };
        self.buffer.clear();
        let places = record::encode_batch(&mut self.buffer, current.len, &stamp, records);
        self.wrote_at = clock::now();
        // Spent even if it fails: no number is used twice.
        self.next.batch += 1;
        let path = self.shared.paths.segment(current.number);
        let write = current.file.write_at(&self.buffer, current.len);
        write.map_err(Failure::at(format!("writing {}", path.display())))?;
        if is_durable {
            let sync = current.file.sync();
            sync.map_err(Failure::at(format!("syncing {}", path.display())))?;
            self.unsynced.clear();
            self.next.void_from = self.next.batch;
        }
        for (record, place) in records.iter().zip(&places) {
            current.summary.add(record, *place);
        }
        current.len += self.buffer.len() as u64;
        self.last_len = self.buffer.len() as u64;
        if self.buffer.capacity() > BATCH {
            self.buffer = Vec::new();
        }
        Ok(places)
    }

    /// The batch counts: it goes into the index, and everyone is told.
    fn count(&mut self, mut batch: Vec<Request>, places: Vec<Place>) {
        let mut index = lock(&self.shared.index);
        if let Some(current) = &self.current {
            index.segments.entry(current.number).or_default().len = current.len_on_disk();
        }
        let records = batch.iter().flat_map(|request| &request.records);
        for (record, place) in records.zip(&places) {
            let file = index.change(record.id, &record.change, *place);
            self.gone.extend(file.map(|file| self.shared.paths.bodies.join(&*file.name)));
        }
        drop(index);
        self.set_trouble(None);
        let is_synced = self.next.void_from == self.next.batch;
        if is_synced {
            self.sync_by = None;
        } else {
            self.sync_by = self.sync_by.or_else(|| clock::now().checked_add(LAZY));
        }
        if !is_synced {
            let records = batch.iter_mut().flat_map(|request| mem::take(&mut request.records));
            self.unsynced.extend(records.zip(places));
        }
        self.teller.tell(batch);
    }

    fn refuse(&self, batch: Vec<Request>) {
        for request in batch {
            let filings = request.records.iter().filter(|record| record.is_filing());
            filings.for_each(|record| lock(&self.shared.index).failed.refused(record.id));
            let error = self.trouble.as_ref().map(|trouble| trouble.failure.to_error());
            request.answer(Err(error.unwrap_or(SpoolError::Closed)));
        }
    }

    /// What was written lazily, if its time has come.
    fn sync_lazy(&mut self) {
        self.sync_by = None;
        if let Err(failure) = self.sync() {
            self.abandon(failure);
        }
    }

    /// Without an open segment there is nothing to sync: what is not synced goes into the next one.
    fn sync(&mut self) -> Result<(), Failure> {
        let Some(current) = self.current.as_ref().filter(|_| !self.unsynced.is_empty()) else {
            return Ok(());
        };
        let path = self.shared.paths.segment(current.number);
        let sync = current.file.sync();
        sync.map_err(Failure::at(format!("syncing {}", path.display())))?;
        self.unsynced.clear();
        self.next.void_from = self.next.batch;
        self.sync_by = None;
        Ok(())
    }

    /// The segment is full: its index goes to its end, so that a start need not read it. All of it is synced then, as the
    /// next segment's header will say.
    fn seal(&mut self) -> Result<(), Failure> {
        if !self.write_index()? {
            self.sync()?;
        }
        self.current = None;
        Ok(())
    }

    /// False where there is no room for it: a segment can do without.
    fn write_index(&mut self) -> Result<bool, Failure> {
        let Some(current) = &mut self.current else { return Ok(false) };
        let unsynced = u32::try_from(self.next.batch - self.next.void_from).unwrap_or(u32::MAX);
        let (segment, offset) = (current.number, current.len);
        let stamp = Stamp { key: self.next.key, segment, batch: self.next.batch, unsynced };
        self.buffer.clear();
        record::encode_batch(&mut self.buffer, offset, &stamp, &[&Record::index(&current.summary)]);
        let path = self.shared.paths.segment(segment);
        let write = current.file.write_at(&self.buffer, offset);
        match write.map_err(Failure::at(format!("writing {}", path.display()))) {
            // The next header voids what there is of it.
            Err(failure) if failure.is_full() => return Ok(false),
            written => written?,
        }
        self.next.batch += 1;
        let sync = current.file.sync();
        sync.map_err(Failure::at(format!("syncing {}", path.display())))?;
        current.len += self.buffer.len() as u64;
        lock(&self.shared.index).segments.entry(segment).or_default().len = current.len_on_disk();
        self.unsynced.clear();
        self.next.void_from = self.next.batch;
        self.next.sealed = Some(Sealed { segment, offset });
        self.sync_by = None;
        Ok(true)
    }

    /// Makes the next segment and goes on in it. Its header voids what was tried and failed since the last sync, and
    /// what was written lazily in that time follows in the same write, so there is no moment at which it is void and
    /// not there. All this is on stable storage before the file gets its name, and the name before anything else is
    /// written.
    fn open_segment(&mut self) -> Result<(), Failure> {
        // With a single spare left, plain append: it is the reserve. On a full disk it is what we have.
        let reserved = usize::from(self.next.spares.len() > 1);
        match self.try_segment(reserved == 1) {
            Err(failure) if failure.is_full() && !self.next.spares.is_empty() => {
                self.try_segment(true)
            }
            made => made,
        }
    }

    fn try_segment(&mut self, on_spare: bool) -> Result<(), Failure> {
        let disk = Arc::clone(&self.shared.disk);
        let log = self.shared.paths.log.clone();
        let number = segment::successor(self.next.segment);
        let path = self.shared.paths.segment(number);
        let making = || Failure::at(format!("making {}", path.display()));
        if self.is_removed {
            // A spare may still have the name of the segment that it was.
            disk.sync_dir(&log).map_err(making())?;
            self.is_removed = false;
        }
        let spare = if on_spare { self.next.spares.pop() } else { None };
        self.count_spares();
        self.next.segment = number;
        let header = Header {
            version: segment::VERSION,
            number,
            key: self.next.key,
            first_batch: self.next.batch,
            void_from: self.next.void_from,
            sealed: self.next.sealed,
        };
        let mut bytes = header.encode().to_vec();
        let stamp =
            Stamp { key: self.next.key, segment: number, batch: self.next.batch, unsynced: 0 };
        let records: Vec<&Record> = self.unsynced.iter().map(|(record, _)| record).collect();
        let places = record::encode_batch(&mut bytes, 0, &stamp, &records);
        if !records.is_empty() {
            self.next.batch += 1;
        }
        let (unnamed, recycled) = match spare {
            Some(Spare { path, len }) => (path, len),
            None => (log.join(segment::unnamed(number)), 0),
        };
        let file = match recycled {
            0 => disk.create(&unnamed),
            _ => disk.open(&unnamed),
        };
        let made = file.and_then(|file| {
            file.write_at(&bytes, 0)?;
            file.sync()?;
            disk.rename(&unnamed, &path)?;
            disk.sync_dir(&log)?;
            Ok(file)
        });
        let file = made.map_err(|error| {
            // It may stay: the next header voids what is in it.
            drop(disk.remove(&unnamed));
            drop(disk.remove(&path));
            making()(error)
        })?;
        let mut summary = Summary::default();
        for ((record, _), place) in self.unsynced.iter().zip(&places) {
            summary.add(record, *place);
        }
        let current = Current { number, file, len: bytes.len() as u64, recycled, summary };
        let mut index = lock(&self.shared.index);
        index.segments.entry(number).or_default().len = current.len_on_disk();
        for ((record, from), to) in self.unsynced.drain(..).zip(places) {
            index.moved_record(&record, from, to);
        }
        drop(index);
        self.next.void_from = self.next.batch;
        // Said once. What is open now has no index yet.
        self.next.sealed = None;
        self.sync_by = None;
        *lock(&self.shared.current) = Some((number, Arc::clone(&current.file)));
        self.current = Some(current);
        Ok(())
    }

    fn count_spares(&self) {
        let octets = self.next.spares.iter().map(|spare| spare.len).sum();
        lock(&self.shared.index).spares = octets;
    }

    /// When a reserve is to be made: when it is missing, in a quiet moment. Never while the disk makes trouble.
    fn reserve_at(&self) -> Option<Instant> {
        let is_missing = self.next.spares.is_empty() && self.trouble.is_none();
        is_missing.then(|| self.wrote_at.checked_add(self.shared.geometry.quiet)).flatten()
    }

    /// A spare to write marks to when the disk is full. Written, not only allocated: then an overwrite needs nothing.
    /// Given up as soon as there is something else to do, and begun again in the next quiet moment.
    fn make_reserve(&mut self) {
        self.wrote_at = clock::now();
        let len = self.shared.geometry.reserve;
        if !self.shared.space.has_room_for(2 * self.shared.geometry.segment) {
            return;
        }
        let disk = &self.shared.disk;
        let number = segment::successor(self.next.segment);
        let path = self.shared.paths.log.join(segment::unnamed(number));
        let zeros = vec![0; PIECE.min(usize::try_from(len).unwrap_or(PIECE))];
        let spare = Spare { path: self.shared.paths.log.join(segment::spare(number)), len };
        let made = disk.create(&path).and_then(|file| {
            let mut at = 0;
            while at < len {
                if !self.shared.queue.is_empty() {
                    return Ok(false);
                }
                file.write_at(&zeros, at)?;
                file.sync()?;
                at += zeros.len() as u64;
            }
            disk.rename(&path, &spare.path)?;
            Ok(true)
        });
        match made {
            Ok(true) => {
                // The number is spent: a name is given once.
                self.next.segment = number;
                self.next.spares.push(spare);
                self.is_removed = true;
                self.count_spares();
            }
            Ok(false) => drop(disk.remove(&path)),
            Err(error) => {
                drop(disk.remove(&path));
                warn!("the reserve for a full disk could not be made: {error}");
            }
        }
    }

    /// Nobody knows what of the segment is on disk: nothing more is written to it, and it is not synced again.
    fn abandon(&mut self, failure: Failure) {
        *lock(&self.shared.current) = None;
        if let Some(current) = self.current.take() {
            let mut index = lock(&self.shared.index);
            index.segments.entry(current.number).or_default().is_last_use = true;
            drop(index);
            // Takes back what is in the page cache of the failed batch, should the process die before the next
            // segment is there. Where it fails, only that is lost.
            if current.file.truncate(current.len).is_ok() {
                let mut index = lock(&self.shared.index);
                index.segments.entry(current.number).or_default().len = current.len;
            }
        }
        let is_first = self.trouble.is_none();
        let reopened = self.open_segment();
        let retry_at = match (is_first, &reopened) {
            (true, Ok(())) => None,
            _ => clock::now().checked_add(RETRY),
        };
        warn!("a write to the spool failed: {failure}");
        self.set_trouble(Some(Trouble { failure: reopened.err().unwrap_or(failure), retry_at }));
    }

    /// After a trouble, also when nothing waits: intake may be closed because of it.
    fn retry(&mut self) {
        let reopened = match self.current {
            Some(_) => Ok(()),
            None => self.open_segment(),
        };
        let Some(trouble) = self.trouble.take() else { return };
        // The next failure is not a first one, until a batch has succeeded.
        self.set_trouble(Some(match reopened {
            Ok(()) => Trouble { retry_at: None, ..trouble },
            Err(failure) => Trouble { failure, retry_at: clock::now().checked_add(RETRY) },
        }));
    }

    fn retry_at(&self) -> Option<Instant> {
        self.trouble.as_ref().and_then(|trouble| trouble.retry_at)
    }

    fn set_trouble(&mut self, trouble: Option<Trouble>) {
        self.trouble = trouble;
        let refusing = self.trouble.as_ref().filter(|trouble| trouble.retry_at.is_some());
        let failure = refusing.map(|trouble| &trouble.failure);
        match (self.shared.show_trouble(failure.cloned()), failure) {
            (None, Some(why)) => error!("the spool cannot write, nothing is accepted: {why}"),
            (Some(_), None) => info!("the spool writes again"),
            (None, None) | (Some(_), Some(_)) => {}
        }
    }

    /// Removes what is not needed any more, once that is on stable storage.
    fn tidy(&mut self) {
        if self.current.is_none() || !self.unsynced.is_empty() {
            return;
        }
        for path in mem::take(&mut self.gone) {
            self.remove_file(path);
        }
        let mut index = lock(&self.shared.index);
        if index.failed.settle() {
            self.shared.filer.ring();
        }
        drop(index);
        // Where space is short, mail needs it more; the reserve stays.
        if self.next.spares.len() > 1
            && !self.shared.space.has_room_for(self.shared.geometry.segment)
        {
            for spare in self.next.spares.split_off(1) {
                self.remove_file(spare.path);
            }
            self.count_spares();
        }
        if self.remove_again_at.is_some_and(|at| at > clock::now()) {
            return;
        }
        loop {
            // A done-mark may go only when what it ends is gone for good.
            if self.is_removed && self.shared.disk.sync_dir(&self.shared.paths.log).is_err() {
                return;
            }
            self.is_removed = false;
            let Some(number) = lock(&self.shared.index).oldest_unneeded() else { return };
            if let Some(current) = self.current.take_if(|current| current.number == number) {
                // What is overwritten takes no space: there is no hurry.
                if current.len < self.shared.geometry.idle.max(current.recycled) {
                    self.current = Some(current);
                    return;
                }
                if let Err(failure) = self.open_segment() {
                    return self.abandon(failure);
                }
            }
            let path = self.shared.paths.segment(number);
            let index = lock(&self.shared.index);
            let segment = index.segments.get(&number).filter(|segment| !segment.is_last_use);
            let len = segment.map_or(0, |segment| segment.len);
            drop(index);
            let geometry = self.shared.geometry;
            let is_spare = self.next.spares.len() < SPARES
                && (geometry.idle..=geometry.segment + BATCH as u64).contains(&len)
                && self.shared.space.has_room_for(2 * geometry.segment);
            let spare = self.shared.paths.log.join(segment::spare(number));
            let is_spare = is_spare && self.shared.disk.rename(&path, &spare).is_ok();
            let removed = match is_spare {
                true => Ok(()),
                false => self.shared.disk.remove(&path),
            };
            match removed {
                Ok(()) => {
                    lock(&self.shared.index).segments.remove(&number);
                    self.kept.remove(&number);
                    self.is_removed = true;
                    self.remove_again_at = None;
                    if is_spare {
                        self.next.spares.push(Spare { path: spare, len });
                        self.count_spares();
                    }
                }
                Err(error) => {
                    let again_at = clock::now().checked_add(REMOVE_AGAIN);
                    if mem::replace(&mut self.remove_again_at, again_at).is_none() {
                        warn!("{} keeps the log from becoming shorter: {error}", path.display());
                    }
                    return;
                }
            }
        }
    }

    fn copy_at(&self) -> Option<Instant> {
        let is_to_come = self.copying.is_some() || self.copy_again_at.is_some();
        let is_possible = self.unsynced.is_empty() && self.trouble.is_none();
        (is_to_come && is_possible).then(|| self.copy_again_at.unwrap_or_else(clock::now))
    }

    /// Writes some of what lives in the oldest segment again, if that is worth it: a message that stays must not keep
    /// the log from becoming shorter. A progress follows its message, so that it is later in the log.
    fn copy(&mut self) {
        if self.trouble.is_some() {
            self.unread.clear();
        }
        if self.current.is_none() || !self.unsynced.is_empty() || self.trouble.is_some() {
            return;
        }
        // The oldest waits for something else.
        if self.remove_again_at.is_some_and(|at| at > clock::now()) {
            self.copying = None;
            return;
        }
        if self.copy_again_at.is_some_and(|at| at > clock::now()) {
            return;
        }
        self.copy_again_at = None;
        let index = lock(&self.shared.index);
        let Some((segment, octets)) = index.oldest_to_copy(self.shared.geometry.few) else {
            self.copying = None;
            return;
        };
        // Nothing comes free before all of it is written, and what is left on a full disk is for marks.
        if !self.shared.space.has_room_for(octets.saturating_add(BATCH as u64)) {
            self.copying = None;
            self.unread.clear();
            return;
        }
        let after = self.copying.as_ref().filter(|copying| copying.segment == segment);
        let after = after.and_then(|copying| copying.after);
        let (found, last) = index.in_segment(segment, after, LOOK, COPY.max(self.last_len));
        // Behind the last message. What does not fit now follows when the segment is gone through again.
        let mut again = Again::default();
        if last.is_none() {
            for (key, place) in index.notes_in_segment(segment, COPY) {
                let bytes = index.note(&key).unwrap_or_default().to_vec();
                if let Ok(record) = Record::note(key, bytes) {
                    again.moved.push((record, place));
                }
            }
            let marks = index.failed.marks_in_segment(segment, MARKS).into_iter();
            again.moved.extend(marks.map(|(id, place)| (Record::done(id), place)));
        }
        drop(index);
        for living in found {
            self.copy_message(segment, &living, &mut again);
        }
        self.copying = last.map(|after| Copying { segment, after: Some(after) });
        let records: Vec<&Record> = again.records().collect();
        if records.is_empty() {
            return;
        }
        let last_len = self.last_len;
        let places = match self.append(&records, false) {
            Ok(places) => places,
            Err(failure) => return self.abandon(failure),
        };
        self.last_len = last_len;
        let mut index = lock(&self.shared.index);
        if let Some(current) = &self.current {
            index.segments.entry(current.number).or_default().len = current.len_on_disk();
        }
        let (moved_to, settled_at) = places.split_at(again.moved.len());
        for ((record, from), to) in again.moved.iter().zip(moved_to) {
            index.moved_record(record, *from, *to);
        }
        for (record, place) in again.settled.iter().zip(settled_at) {
            let file = index.change(record.id, &record.change, *place);
            self.gone.extend(file.map(|file| self.shared.paths.bodies.join(&*file.name)));
        }
        drop(index);
        self.unsynced.extend(again.into_records().zip(places));
        self.sync_by = self.sync_by.or_else(|| clock::now().checked_add(LAZY));
    }

    /// Reads what there is of a message in the segment. What cannot be read keeps the segment for a while; what is
    /// damaged must not, for all later ones would stay with it.
    fn copy_message(&mut self, segment: u64, living: &Living, again: &mut Again) {
        let Living { id, put, progress } = *living;
        let put_here = Some(put).filter(|put| put.segment == segment);
        let read = |place: Place, is_put| self.shared.files().record_again(id, place, is_put);
        // Both or none: a message without its progress would be sent again.
        let put_read = put_here.map(|place| read(place, true)).transpose();
        let progress_read = progress.map(|place| read(place, false)).transpose();
        let (put_read, error) = match (put_read, progress_read) {
            (Ok(put_read), Ok(progress_read)) => {
                self.unread.remove(&id);
                again.moved.extend(put_read.zip(put_here));
                again.moved.extend(progress_read.zip(progress));
                return;
            }
            (Ok(put_read), Err(error)) => (Some(put_read), error),
            (Err(error), _) => (None, error),
        };
        if !self.is_lost(id, &error) {
            return self.copy_later(segment, &error);
        }
        // Of a sound message only how far it had come is lost.
        let held = match put_read.is_some().then(|| self.in_doubt(id, put)) {
            Some(Ok(held)) => Some(held),
            Some(Err(error)) if !self.is_lost(id, &error) => {
                return self.copy_later(segment, &error);
            }
            Some(Err(_)) | None => None,
        };
        let segments = BTreeSet::from([put.segment, progress.unwrap_or(put).segment]);
        let body = lock(&self.shared.index).file(id).filter(|_| held.is_none()).cloned();
        if !self.put_aside(&segments, body.as_ref()) {
            return self.copy_later(segment, &error);
        }
        self.unread.remove(&id);
        let kept: Vec<String> = segments.into_iter().map(segment::name).collect();
        let kept = kept.join(", ");
        match held {
            Some(held) => {
                error!(event = "held", %id, %error, "message {id} waits for you: how far it had come is damaged ({error}), so it may have been sent; damaged/ keeps {kept}");
                again.moved.extend(put_read.flatten().zip(put_here));
                again.settled.push(held);
            }
            None => {
                error!(event = "damaged", %id, %error, "message {id} leaves the queue, for it is damaged: {error}; damaged/ keeps {kept}");
                again.settled.push(Record::done(id));
            }
        }
    }

    /// Whether it will be no better later. Too many open files, say, may pass; and so may a refusal of the disk itself,
    /// but not for ever.
    fn is_lost(&mut self, id: SpoolId, error: &SpoolError) -> bool {
        match error {
            SpoolError::Damaged(..) => true,
            SpoolError::Io(_, error) if Errno::from_io_error(error) == Some(Errno::IO) => {
                let since = *self.unread.entry(id).or_insert_with(clock::now);
                clock::now().saturating_duration_since(since) >= self.shared.geometry.patience
            }
            SpoolError::Io(..)
            | SpoolError::Full
            | SpoolError::Closed
            | SpoolError::Unknown(_)
            | SpoolError::Refused(..)
            | SpoolError::Unfit(..) => false,
        }
    }

    /// Until then the segment stays, because the message does.
    fn copy_later(&mut self, segment: u64, error: &SpoolError) {
        self.copy_again_at = clock::now().checked_add(RETRY);
        if self.told.replace(segment) != Some(segment) {
            let path = self.shared.paths.segment(segment);
            warn!("{} keeps the log from becoming shorter: {error}", path.display());
        }
    }

    /// All that is known of the message is that it may have been sent to anyone it is for.
    fn in_doubt(&self, id: SpoolId, put: Place) -> Result<Record, SpoolError> {
        let entry = Entry { put, progress: None };
        let Stored { mut progress, .. } = self.shared.files().message(id, &entry)?;
        let words = "how far it had come is damaged on disk";
        let cause = Cause::new(Scope::Message, outcome::Stage::Local, words);
        let last = Some(Cause { maybe_sent: true, ..cause });
        progress.rcpts.fill(RcptStatus::Pending { last });
        progress.doubtful = (0..).take(progress.rcpts.len()).collect();
        Ok(Record::hold(id, &progress))
    }

    /// Keeps segments, and a side file, under a second name, and the segments from being written over. False where that
    /// cannot be done now.
    fn put_aside(&mut self, segments: &BTreeSet<u64>, body: Option<&FileRef>) -> bool {
        if self.keep_again_at.is_some_and(|at| at > clock::now()) {
            return false;
        }
        let (disk, paths) = (&*self.shared.disk, &self.shared.paths);
        let mut kept = body.map_or(Ok(()), |body| recover::keep_body(disk, paths, &body.name));
        for number in segments.difference(&self.kept) {
            lock(&self.shared.index).segments.entry(*number).or_default().is_last_use = true;
            kept = kept.and_then(|()| recover::keep_segment(disk, paths, *number));
        }
        match kept {
            Ok(()) => {
                self.keep_again_at = None;
                self.kept.extend(segments);
                true
            }
            Err(failure) => {
                self.keep_again_at = clock::now().checked_add(REMOVE_AGAIN);
                warn!("what is damaged cannot be put aside: {failure}");
                false
            }
        }
    }

    /// What cannot be removed now is removed at the next start.
    fn remove_file(&self, path: PathBuf) {
        if let Err(error) = self.shared.disk.remove(&path) {
            warn!("{} stays until the next start: {error}", path.display());
        }
    }
}

/// However the thread ends: nobody waits for it for ever.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let ended = io::Error::other("the writer of the spool has ended");
            self.0.show_trouble(Some(Failure::at("writing")(ended)));
        }
        self.0.queue.close();
        // Dropped after the lock is let go of: a request may hold a file to discard.
        let requests = mem::take(&mut lock(&self.0.queue.state).requests);
        drop(requests);
    }
}

/// What the requests of a batch do, before the index knows of it.
#[derive(Default)]
struct Changed {
    messages: HashMap<SpoolId, Whereabouts>,
    /// Whether a note is there after them.
    notes: HashMap<Box<str>, bool>,
}

/// What one record replaces: where its message was, or else the name of a note and whether it is there now.
type Before = (Option<(SpoolId, Option<Whereabouts>)>, Option<(Box<str>, bool)>);

/// Where a message is after what comes before in the batch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whereabouts {
    Log(QueueState),
    Files,
    Gone,
}

impl Changed {
    /// Whether `records` can be written after those of the batch so far: then what they do is part of this.
    fn admit(&mut self, index: &Index, records: &mut [Record]) -> Result<(), SpoolError> {
        let mut before = Vec::new();
        let mut notes = HashMap::new();
        let mut admitted = Ok(());
        let is_alone = records.len() == 1;
        for record in records {
            admitted = self.admit_one(index, record).map(|(old, note)| {
                notes.extend(note);
                // One alone leaves nothing to take back.
                if !is_alone {
                    before.extend(old);
                }
            });
            if admitted.is_err() {
                break;
            }
        }
        let admitted = admitted.and_then(|()| self.check_notes(index, &notes));
        match admitted {
            Ok(()) => self.notes.extend(notes),
            Err(_) => {
                for (id, old) in before.into_iter().rev() {
                    match old {
                        Some(old) => self.messages.insert(id, old),
                        None => self.messages.remove(&id),
                    };
                }
            }
        }
        admitted
    }

    /// Returns where the message was before, or the name of a note and whether it is there now.
    fn admit_one(&mut self, index: &Index, record: &mut Record) -> Result<Before, SpoolError> {
        if let Change::Note { key, bytes } = &record.change {
            return Ok((None, Some((key.clone(), !bytes.is_empty()))));
        }
        let known = self.messages.get(&record.id).copied();
        let is = known.unwrap_or_else(|| match index.state(record.id) {
            Some(state) => Whereabouts::Log(state),
            None if index.failed.contains(record.id) => Whereabouts::Files,
            None => Whereabouts::Gone,
        });
        if is == Whereabouts::Log(QueueState::Held) {
            record.keep_held();
        }
        let Record { id, change, .. } = &*record;
        let after = match (change, is) {
            (Change::Put { head, .. }, Whereabouts::Gone) => Whereabouts::Log(head.state),
            (Change::Put { .. }, Whereabouts::Log(_) | Whereabouts::Files) => {
                let error = io::Error::from(io::ErrorKind::AlreadyExists);
                return Err(SpoolError::Io(format!("putting message {id}"), error));
            }
            (Change::Progress { step, .. }, Whereabouts::Log(state)) => {
                if let Some(why) = step.refusal(state) {
                    return Err(SpoolError::Refused(*id, why));
                }
                Whereabouts::Log(step.state())
            }
            // To be queued again, it is put again.
            (Change::Progress { .. }, Whereabouts::Files) => {
                return Err(SpoolError::Refused(*id, "it has failed"));
            }
            // Nothing may have happened to it since its files were begun.
            (Change::Filed { .. }, Whereabouts::Log(_))
                if known.is_none() && index.failed.is_filing(*id) =>
            {
                Whereabouts::Files
            }
            (Change::Done, Whereabouts::Log(_) | Whereabouts::Files)
            | (Change::DoneInFiles, Whereabouts::Files) => Whereabouts::Gone,
            (Change::DoneInFiles, Whereabouts::Log(_)) => {
                return Err(SpoolError::Refused(*id, "it is queued already"));
            }
            (
                Change::Progress { .. }
                | Change::Filed { .. }
                | Change::Done
                | Change::DoneInFiles
                | Change::Note { .. }
                | Change::Index,
                _,
            ) => return Err(SpoolError::Unknown(*id)),
        };
        self.messages.insert(*id, after);
        Ok((Some((*id, known)), None))
    }

    /// Whether there are not too many notes after `own` too.
    fn check_notes(&self, index: &Index, own: &HashMap<Box<str>, bool>) -> Result<(), SpoolError> {
        let Some(key) = own.keys().next() else { return Ok(()) };
        let before = self.notes.iter().filter(|(key, _)| !own.contains_key(*key));
        let (mut more, mut less) = (0, 0);
        for (key, is_there) in before.chain(own) {
            match (index.note(key).is_some(), is_there) {
                (false, true) => more += 1,
                (true, false) => less += 1,
                (true, true) | (false, false) => {}
            }
        }
        match index.notes() + more - less > NOTES {
            true => Err(SpoolError::Unfit(key.clone(), "there are 4,096 already")),
            false => Ok(()),
        }
    }
}
