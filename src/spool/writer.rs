//! The writer's thread: it alone changes log and index. It takes all that waits as one batch.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tracing::{error, info, warn};

use super::disk::{DiskFile, Lock};
use super::index::Index;
use super::log::{Counted, Shared};
use super::record::{self, Change, Place, Record, Stamp};
use super::segment::{self, Header};
use super::side_file::Guard;
use super::{Failure, SpoolError, lock};
use crate::clock;
use crate::envelope::{QueueState, SpoolId};

/// Octets of one batch; a single request may be longer.
const BATCH: usize = 8 * 1024 * 1024;
/// How long what was written lazily waits for its sync.
const LAZY: Duration = Duration::from_millis(20);
/// How long after a trouble the disk is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// A segment in which nothing lives is given up from this length on, though it is not full: on a disk that it has
/// filled, nothing more would come that closes it. Not sooner, so that this costs next to nothing.
const IDLE: u64 = segment::SIZE / 16;
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
    pub(super) permit: OwnedSemaphorePermit,
}

impl Request {
    fn len_on_disk(&self) -> usize {
        self.records.iter().map(Record::len_on_disk).sum()
    }

    fn answer(self, answer: Result<(), SpoolError>) {
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
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// After the end of the writer the next start removes the file.
    pub(super) fn discard(&self, path: PathBuf) {
        let mut state = lock(&self.state);
        if !state.is_closed {
            state.discarded.push(path);
            drop(state);
            self.changed.notify_one();
        }
    }

    /// What waits is still done; nothing more comes.
    pub(super) fn close(&self) {
        lock(&self.state).is_closed = true;
        self.places.close();
        self.changed.notify_one();
    }

    /// Waits for work, at most until `deadline`.
    fn wait(&self, deadline: Option<Instant>) -> Work {
        let mut state = lock(&self.state);
        while state.requests.is_empty() && state.discarded.is_empty() && !state.is_closed {
            state = match deadline.map(|at| at.saturating_duration_since(clock::now())) {
                Some(Duration::ZERO) => break,
                Some(left) => {
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
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
#[derive(Clone, Copy, Debug)]
pub(super) struct Next {
    pub(super) key: u64,
    pub(super) segment: u64,
    /// No batch of this number or a higher one was ever written.
    pub(super) batch: u64,
    /// Batches from here on do not count, whatever is on disk.
    pub(super) void_from: u64,
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
    /// A segment was removed, and that is not synced.
    is_removed: bool,
    buffer: Vec<u8>,
    trouble: Option<Trouble>,
    /// Lets go of the spool when the thread ends.
    _lock: Lock,
}

struct Current {
    number: u64,
    file: Arc<dyn DiskFile>,
    len: u64,
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
            buffer: Vec::new(),
            trouble: None,
            _lock: lock,
        };
        writer.open_segment()?;
        writer.tidy();
        Ok(writer)
    }

    pub(super) fn run(mut self) {
        let _end = End(Arc::clone(&self.shared));
        loop {
            let deadline = [self.sync_by, self.retry_at()].into_iter().flatten().min();
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
        }
    }

    /// All of `requests` as one batch. Those that ask for what cannot be are answered by themselves.
    fn commit(&mut self, requests: Vec<Request>) {
        let mut batch = Vec::with_capacity(requests.len());
        let mut changed = Changed::default();
        for request in requests {
            let admitted = admit(&lock(&self.shared.index), &mut changed, &request.records);
            match admitted {
                Ok(()) => batch.push(request),
                Err(error) => request.answer(Err(error)),
            }
        }
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
        let len: usize = batch.iter().map(Request::len_on_disk).sum();
        let is_full = |current: &Current| {
            current.len > segment::HEADER as u64 && current.len + len as u64 > segment::SIZE
        };
        if self.current.as_ref().is_some_and(is_full) {
            // The next segment's header says that all before it is synced.
            self.sync()?;
            self.current = None;
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
        let records: Vec<&Record> = batch.iter().flat_map(|request| &request.records).collect();
        self.buffer.clear();
        let places = record::encode_batch(&mut self.buffer, current.len, &stamp, &records);
        // Spent even if it fails: no number is used twice.
        self.next.batch += 1;
        let path = self.shared.paths.segment(current.number);
        let write = current.file.write_at(&self.buffer, current.len);
        write.map_err(Failure::at(format!("writing {}", path.display())))?;
        if batch.iter().any(|request| request.is_durable) {
            let sync = current.file.sync();
            sync.map_err(Failure::at(format!("syncing {}", path.display())))?;
            self.unsynced.clear();
            self.next.void_from = self.next.batch;
        }
        current.len += self.buffer.len() as u64;
        if self.buffer.capacity() > BATCH {
            self.buffer = Vec::new();
        }
        Ok(places)
    }

    /// The batch counts: it goes into the index, and everyone is told.
    fn count(&mut self, batch: Vec<Request>, places: Vec<Place>) {
        let mut index = lock(&self.shared.index);
        if let Some(current) = &self.current {
            index.segments.entry(current.number).or_default().len = current.len;
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
        let mut places = places.into_iter();
        for mut request in batch {
            let records = mem::take(&mut request.records);
            request.answer(Ok(()));
            if !is_synced {
                self.unsynced.extend(records.into_iter().zip(&mut places));
            }
        }
    }

    fn refuse(&self, batch: Vec<Request>) {
        for request in batch {
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

    /// Makes the next segment and goes on in it. Its header voids what was tried and failed since the last sync, and
    /// what was written lazily in that time follows in the same write, so there is no moment at which it is void and
    /// not there. On stable storage, the name too, before anything else is written to it.
    fn open_segment(&mut self) -> Result<(), Failure> {
        let number = self.next.segment;
        self.next.segment += 1;
        let path = self.shared.paths.segment(number);
        let create = self.shared.disk.create(&path);
        let file = create.map_err(Failure::at(format!("making {}", path.display())))?;
        let header = Header {
            version: segment::VERSION,
            number,
            key: self.next.key,
            first_batch: self.next.batch,
            void_from: self.next.void_from,
        };
        let mut bytes = header.encode().to_vec();
        let stamp =
            Stamp { key: self.next.key, segment: number, batch: self.next.batch, unsynced: 0 };
        let records: Vec<&Record> = self.unsynced.iter().map(|(record, _)| record).collect();
        let places = record::encode_batch(&mut bytes, 0, &stamp, &records);
        if !records.is_empty() {
            self.next.batch += 1;
        }
        let disk = &self.shared.disk;
        let made = file
            .write_at(&bytes, 0)
            .and_then(|()| file.sync())
            .and_then(|()| disk.sync_dir(&self.shared.paths.log));
        if let Err(error) = made {
            // It may stay: the next header voids what is in it.
            drop(disk.remove(&path));
            return Err(Failure::at(format!("making {}", path.display()))(error));
        }
        let len = bytes.len() as u64;
        let mut index = lock(&self.shared.index);
        index.segments.entry(number).or_default().len = len;
        for ((record, from), to) in self.unsynced.drain(..).zip(places) {
            match &record.change {
                Change::Note { key, .. } => index.moved_note(key, from, to),
                Change::Put { .. } | Change::Progress { .. } | Change::Done => {
                    index.moved(record.id, from, to);
                }
            }
        }
        drop(index);
        self.next.void_from = self.next.batch;
        self.sync_by = None;
        self.current = Some(Current { number, file, len });
        Ok(())
    }

    /// Nobody knows what of the segment is on disk: nothing more is written to it, and it is not synced again.
    fn abandon(&mut self, failure: Failure) {
        if let Some(current) = self.current.take() {
            // Takes back what is in the page cache of the failed batch, should the process die before the next
            // segment is there. Where it fails, only that is lost.
            drop(current.file.truncate(current.len));
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
        let says = refusing.map(|trouble| trouble.failure.to_string());
        let mut shown = lock(&self.shared.trouble);
        match (&*shown, &says) {
            (None, Some(why)) => error!("the spool cannot write, nothing is accepted: {why}"),
            (Some(_), None) => info!("the spool writes again"),
            (None, None) | (Some(_), Some(_)) => {}
        }
        *shown = says;
    }

    /// Removes what is not needed any more, once that is on stable storage.
    fn tidy(&mut self) {
        if self.current.is_none() || !self.unsynced.is_empty() {
            return;
        }
        for path in mem::take(&mut self.gone) {
            self.remove_file(path);
        }
        loop {
            // A done-mark may go only when what it ends is gone for good.
            if self.is_removed && self.shared.disk.sync_dir(&self.shared.paths.log).is_err() {
                return;
            }
            self.is_removed = false;
            let Some(number) = lock(&self.shared.index).oldest_unneeded() else { return };
            if let Some(current) = self.current.take_if(|current| current.number == number) {
                if current.len < IDLE {
                    self.current = Some(current);
                    return;
                }
                if let Err(failure) = self.open_segment() {
                    return self.abandon(failure);
                }
            }
            let path = self.shared.paths.segment(number);
            let removed = self.shared.disk.remove(&path);
            let mut index = lock(&self.shared.index);
            match removed {
                Ok(()) => {
                    index.segments.remove(&number);
                    self.is_removed = true;
                }
                Err(error) => {
                    index.segments.entry(number).or_default().keep = true;
                    warn!("{} stays until the next start: {error}", path.display());
                }
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
            *lock(&self.0.trouble) = Some("the writer of the spool has ended".to_owned());
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
    /// Where a message is after them; none when it is gone.
    messages: HashMap<SpoolId, Option<QueueState>>,
    /// Whether a note is there after them.
    notes: HashMap<Box<str>, bool>,
}

impl Changed {
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

/// Whether `records` can be written after those of the batch so far, whose effect is in `changed`.
fn admit(index: &Index, changed: &mut Changed, records: &[Record]) -> Result<(), SpoolError> {
    let mut own = Changed::default();
    for Record { id, change, .. } in records {
        let known = own.messages.get(id).or_else(|| changed.messages.get(id));
        let state = known.copied().unwrap_or_else(|| index.state(*id));
        let next = match (change, state) {
            (Change::Put { .. }, Some(_)) => {
                let error = io::Error::from(io::ErrorKind::AlreadyExists);
                return Err(SpoolError::Io(format!("putting message {id}"), error));
            }
            (Change::Put { head, .. }, None) => Some(head.state),
            (Change::Progress { .. } | Change::Done, None) => {
                return Err(SpoolError::Unknown(*id));
            }
            (Change::Progress { step, .. }, Some(state)) => {
                if let Some(why) = step.refusal(state) {
                    return Err(SpoolError::Refused(*id, why));
                }
                Some(step.state())
            }
            (Change::Done, Some(_)) => None,
            (Change::Note { key, bytes }, _) => {
                own.notes.insert(key.clone(), !bytes.is_empty());
                continue;
            }
        };
        own.messages.insert(*id, next);
    }
    changed.check_notes(index, &own.notes)?;
    changed.messages.extend(own.messages);
    changed.notes.extend(own.notes);
    Ok(())
}
