//! The engine: a segmented log behind the trait.

use std::fmt;
use std::io;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use super::disk::{Disk, DiskFile, LockError, RealDisk};
use super::failed::{self, Bell, Filer};
use super::fresh::Fresh;
use super::index::{Entry, Index, Lies};
use super::record::{self, Change, Place, Record};
use super::recover;
use super::segment::Geometry;
use super::side_file::LogStage;
use super::writer::{Queue, Request, Writer};
use super::{Durability, Failure, Health, Op, Spool, SpoolError, Staged, Stored, lock, segment};
use crate::clock;
use crate::config;
use crate::envelope::{Body, BodyFile, Head, Progress, SpoolId};
use bytes::Bytes;

/// The spool of one daemon.
#[derive(Debug)]
pub struct Log {
    pub(super) shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What a start found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Messages in the spool.
    pub messages: usize,
    /// Of these, messages of which an attempt had begun and no outcome was written.
    pub in_doubt: usize,
    /// What is damaged, one sentence each. Nothing of it was deleted.
    pub damaged: Vec<String>,
    /// The log ended in a batch that was not whole: normal after a crash, nobody was told 250.
    pub torn: bool,
    /// Contents that no message named, and that were removed: normal after a crash.
    pub strays: usize,
    /// The file system copies on write: `min_free` counts twice.
    pub is_copy_on_write: bool,
}

/// Why a spool cannot be opened.
#[derive(Debug)]
pub enum OpenError {
    /// Another process has it; what it wrote of itself, empty for nothing.
    Locked { path: PathBuf, holder: String },
    /// Another version of the program has written to it; the format of such files that this one reads.
    OtherFormat { file: PathBuf, version: u32, ours: u32 },
    /// The operating system refused; what was being done.
    Io(String, io::Error),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Locked { path, holder } => write!(
                f,
                "the spool {} is in use by {}: stop it, or give this one another spool.path",
                path.display(),
                process(holder)
            ),
            Self::OtherFormat { file, version, ours } => {
                let file = file.display();
                let other = if version > ours { "a later" } else { "an earlier" };
                write!(
                    f,
                    "{file} was written by {other} version of the program: its format is \
                     {version}, this program reads {ours}; start that version again, or let it \
                     deliver what is in the spool"
                )
            }
            Self::Io(doing, error) if error.kind() == io::ErrorKind::PermissionDenied => write!(
                f,
                "{doing}: {error}; start it as the user who owns the spool, or give that user a \
                 folder (install -d -m 0700 -o USER FOLDER)"
            ),
            Self::Io(doing, error) => write!(f, "{doing}: {error}"),
        }
    }
}

/// Who has a lock.
pub(super) fn process(holder: &str) -> String {
    match holder {
        "" => "another process".to_owned(),
        id => format!("process {id}"),
    }
}

impl std::error::Error for OpenError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(_, error) => Some(error),
            Self::Locked { .. } | Self::OtherFormat { .. } => None,
        }
    }
}

impl From<Failure> for OpenError {
    fn from(failure: Failure) -> Self {
        Self::Io(failure.doing, failure.error)
    }
}

impl Log {
    /// Takes possession of the spool, which is made if it is not there, and reads what is in it.
    pub async fn open(config: &config::Spool) -> Result<(Self, Report), OpenError> {
        Self::open_on(Arc::new(RealDisk), config, Geometry::default()).await
    }

    pub(super) async fn open_on(
        disk: Arc<dyn Disk>,
        config: &config::Spool,
        geometry: Geometry,
    ) -> Result<(Self, Report), OpenError> {
        let config = config.clone();
        let open = move || Self::open_blocking(disk, &config, geometry);
        match tokio::task::spawn_blocking(open).await {
            Ok(opened) => opened,
            Err(ended) => Err(OpenError::Io("opening".to_owned(), io::Error::other(ended))),
        }
    }

    fn open_blocking(
        disk: Arc<dyn Disk>,
        config: &config::Spool,
        geometry: Geometry,
    ) -> Result<(Self, Report), OpenError> {
        let paths = Paths::new(&config.path);
        let mut is_new = false;
        for path in [&paths.root, &paths.log, &paths.bodies, &paths.failed, &paths.tmp] {
            let create = disk.create_dir(path);
            let created =
                create.map_err(Failure::at(format!("making the folder {}", path.display())))?;
            is_new |= created && *path == paths.root;
        }
        let lock_path = paths.root.join("lock");
        let lock = disk.lock(&lock_path).map_err(|error| match error {
            LockError::Held(holder) => OpenError::Locked { path: paths.root.clone(), holder },
            LockError::Io(error) => {
                OpenError::Io(format!("locking {}", lock_path.display()), error)
            }
        })?;
        // The folder above may be one that we may not read: it is asked only when it has a new name in it, which may be
        // from an earlier start that came no further.
        let names = disk.names(&paths.log);
        let names = names.map_err(Failure::at(format!("reading {}", paths.log.display())))?;
        let is_unused = names.is_empty();
        let above = paths.root.parent().filter(|_| is_new || is_unused);
        for path in above.into_iter().chain([&*paths.root]) {
            // A relative path of one word has the empty path as its parent.
            let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
            let sync = match disk.sync_dir(path) {
                // Then it was not us who made the name.
                Err(error)
                    if error.kind() == io::ErrorKind::PermissionDenied
                        && !is_new
                        && *path != paths.root =>
                {
                    Ok(())
                }
                sync => sync,
            };
            sync.map_err(Failure::at(format!("syncing the folder {}", path.display())))?;
        }
        let free = disk.free(&paths.root);
        let free = free.map_err(Failure::at("asking for free space"))?;
        let is_copy_on_write = disk.is_copy_on_write(&paths.root);
        let is_copy_on_write =
            is_copy_on_write.map_err(Failure::at("asking for the kind of the file system"))?;
        let found = recover::replay(&*disk, &paths)?;
        let report = Report { is_copy_on_write, ..found.report.clone() };
        let space = Space {
            disk: Arc::clone(&disk),
            root: paths.root.clone(),
            min_free: floor(config.min_free, is_copy_on_write),
            since: clock::now(),
            asked: AtomicU64::new(0),
            free: AtomicU64::new(free),
            in_memory: AtomicU64::new(0),
        };
        let shared = Arc::new(Shared {
            disk,
            geometry,
            paths,
            index: Mutex::new(found.index),
            queue: Queue::new(),
            space: Arc::new(space),
            trouble: Mutex::new(None),
            is_in_trouble: AtomicBool::new(false),
            filer: Bell::default(),
            fresh: Fresh::new(geometry.fresh),
            current: Mutex::default(),
        });
        let writer = Writer::start(Arc::clone(&shared), found.next, lock)?;
        let filer = Filer::new(Arc::clone(&shared), config.keep_failed);
        let log = Self { shared, threads: Mutex::default() };
        log.spawn("spool-writer", move || writer.run())?;
        log.spawn("spool-filer", move || filer.run())?;
        Ok((log, report))
    }

    fn spawn(&self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
        lock(&self.threads).push(thread.map_err(Failure::at(format!("starting {name}")))?);
        Ok(())
    }

    /// Lets the threads end.
    pub(super) fn end(&self) -> Vec<JoinHandle<()>> {
        self.shared.filer.close();
        self.shared.queue.close();
        mem::take(&mut *lock(&self.threads))
    }

    /// Writes and syncs what waits, then lets go of the spool. What comes later is answered [`SpoolError::Closed`].
    pub async fn close(&self) {
        for thread in self.end() {
            // A panic of the thread was told to those that waited for it.
            drop(tokio::task::spawn_blocking(move || thread.join()).await);
        }
    }
}

/// Without [`Log::close`]: waits for what is under way, so that the spool is free for the next one.
impl Drop for Log {
    fn drop(&mut self) {
        for thread in self.end() {
            drop(thread.join());
        }
    }
}

impl Spool for Log {
    type Stage = LogStage;

    fn stage(&self) -> LogStage {
        LogStage::new(Arc::clone(&self.shared))
    }

    async fn apply(&self, ops: Vec<Op>, durability: Durability) -> Result<(), SpoolError> {
        if ops.is_empty() {
            return Ok(());
        }
        let (ops, asked_for) = self.with_what_lies_in_files(ops).await?;
        let mut held = Counted::new(Arc::clone(&self.shared.space), 0);
        let mut records = Vec::with_capacity(ops.len());
        let mut files = Vec::new();
        let mut new = Vec::new();
        let mut in_memory = 0;
        let mut is_put = false;
        for op in ops {
            let record = match op {
                Op::Put { envelope, body } => {
                    is_put = true;
                    match body {
                        Staged::Memory(bytes) => {
                            in_memory += bytes.len() as u64;
                            let content = Bytes::from(bytes);
                            let record = Record::put(&envelope, content.clone());
                            new.push((envelope, content));
                            record
                        }
                        Staged::File(staged) => {
                            files.push(staged.guard);
                            Record::put_file(&envelope, staged.file)
                        }
                    }
                }
                Op::Update { id, progress } => Record::update(id, &progress),
                Op::Hold { id, progress } => {
                    self.shared.fresh.forget(id);
                    Record::hold(id, &progress)
                }
                Op::Fail { id, progress } => Record::fail(id, &progress),
                Op::Done { id } if Self::is_put_again(&asked_for, id) => Record::done_in_files(id),
                Op::Done { id } => Record::done(id),
                Op::Attempt { id, progress } => Record::attempt(id, &progress),
                Op::Requeue { id, progress } => Record::requeue(id, &progress),
                Op::Release { id, progress } => Record::release(id, &progress),
                Op::Delete { id } => {
                    self.shared.fresh.forget(id);
                    Record::delete(id)
                }
                Op::Note { key, bytes } => {
                    Record::note(key.clone(), bytes).map_err(|what| SpoolError::Unfit(key, what))?
                }
            };
            if !record.fits() {
                let error = io::Error::from(io::ErrorKind::FileTooLarge);
                return Err(SpoolError::Io(format!("writing message {}", record.id), error));
            }
            records.push(record);
        }
        if is_put && !self.shared.space.has_room_for(in_memory) {
            return Err(SpoolError::Full);
        }
        held.set(in_memory);
        let (reply, answer) = tokio::sync::oneshot::channel();
        let is_durable = durability == Durability::Durable;
        let permit = Some(self.shared.queue.permit().await?);
        self.shared.queue.push(Request { records, files, is_durable, reply, held, permit })?;
        // The writer's thread drops the other end only when it panics.
        let answered = answer.await.unwrap_or(Err(SpoolError::Closed));
        drop(asked_for);
        if answered.is_ok() {
            for (envelope, content) in new {
                self.shared.fresh.keep(envelope, content);
            }
        }
        answered
    }

    fn heads(&self, after: Option<SpoolId>, n: usize) -> Vec<Head> {
        lock(&self.shared.index).heads(after).take(n).collect()
    }

    fn head(&self, id: SpoolId) -> Option<Head> {
        lock(&self.shared.index).head(id)
    }

    fn note(&self, key: &str) -> Option<Vec<u8>> {
        lock(&self.shared.index).note(key).map(<[u8]>::to_vec)
    }

    async fn open(&self, id: SpoolId) -> Result<Stored, SpoolError> {
        if let Some(stored) = self.shared.fresh(id).or_else(|| self.shared.read_from_memory(id)) {
            return Ok(stored);
        }
        let shared = Arc::clone(&self.shared);
        match tokio::task::spawn_blocking(move || shared.read(id)).await {
            Ok(stored) => stored,
            Err(ended) => {
                Err(SpoolError::Io(format!("reading message {id}"), io::Error::other(ended)))
            }
        }
    }

    fn health(&self) -> Health {
        let trouble = lock(&self.shared.trouble).as_ref().map(ToString::to_string);
        let free = self.shared.space.free();
        let index = lock(&self.shared.index);
        Health {
            trouble,
            free,
            used: index.used(),
            contents: index.contents(),
            in_doubt: index.in_doubt(),
            failed: index.failed.count(),
        }
    }

    fn has_room_for(&self, size: u64) -> bool {
        self.shared.space.has_room_for(size)
    }

    fn trouble(&self) -> Option<SpoolError> {
        if !self.shared.is_in_trouble.load(Ordering::Relaxed) {
            return None;
        }
        lock(&self.shared.trouble).as_ref().map(Failure::to_error)
    }
}

/// What the writer's thread and those that ask have in common.
pub(super) struct Shared {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) geometry: Geometry,
    pub(super) paths: Paths,
    /// Changed by the writer's thread only; never held across disk work.
    pub(super) index: Mutex<Index>,
    pub(super) queue: Queue,
    pub(super) space: Arc<Space>,
    /// Why nothing is accepted now, where it is so.
    pub(super) trouble: Mutex<Option<Failure>>,
    /// Whether there is one, for who asks often.
    is_in_trouble: AtomicBool,
    pub(super) filer: Bell,
    pub(super) fresh: Fresh,
    /// The segment that is appended to, for who reads what has just been written.
    pub(super) current: Mutex<Option<(u64, Arc<dyn DiskFile>)>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the spool {}", self.paths.root.display())
    }
}

impl Shared {
    /// From now on this is why nothing is accepted. Returns what was so far.
    pub(super) fn show_trouble(&self, trouble: Option<Failure>) -> Option<Failure> {
        let mut shown = lock(&self.trouble);
        self.is_in_trouble.store(trouble.is_some(), Ordering::Relaxed);
        mem::replace(&mut *shown, trouble)
    }

    pub(super) fn files(&self) -> Files<'_> {
        Files { disk: &*self.disk, paths: &self.paths }
    }

    /// A message that is as it came, if memory still has it.
    fn fresh(&self, id: SpoolId) -> Option<Stored> {
        let (envelope, content) = self.fresh.take(id)?;
        let is_untouched = match lock(&self.index).find(id)? {
            Lies::Log(entry) => entry.progress.is_none(),
            Lies::Files(_) => false,
        };
        is_untouched.then(|| Stored {
            progress: Progress::new(envelope.accepted, envelope.rcpts.len()),
            envelope,
            body: Body::Memory(content),
        })
    }

    /// A message whose records are all in the segment that is appended to, where the operating system has them in its
    /// memory: to read it keeps nobody waiting. Whatever is wrong with it is for who reads it from disk to find.
    fn read_from_memory(&self, id: SpoolId) -> Option<Stored> {
        let Lies::Log(entry) = lock(&self.index).find(id)? else { return None };
        let (segment, file) = lock(&self.current).clone()?;
        let read = |place: Place| {
            let mut bytes = vec![0; len_of(place)];
            let is_read =
                place.segment == segment && file.read_from_memory(&mut bytes, place.offset);
            is_read.then_some(bytes).ok_or(SpoolError::Unknown(id))
        };
        let found = Records::read(id, &entry, read).ok()?;
        found.put.file.is_none().then(|| found.with_its_own_content(&entry))
    }

    /// Reads a message. If its entry changed meanwhile (it was done, or written elsewhere), what was read may be no
    /// more, so only an error about an entry that still stands is one.
    pub(super) fn read(&self, id: SpoolId) -> Result<Stored, SpoolError> {
        let mut place = lock(&self.index).find(id).ok_or(SpoolError::Unknown(id))?;
        loop {
            let read = match &place {
                Lies::Log(entry) => self.files().message(id, entry),
                Lies::Files(_) => failed::read_filed(&*self.disk, &self.paths, id),
            };
            let error = match read {
                Ok(stored) => return Ok(stored),
                Err(error) => error,
            };
            let now = lock(&self.index).find(id).ok_or(SpoolError::Unknown(id))?;
            if now == place {
                return Err(error);
            }
            place = now;
        }
    }
}

/// What messages are read back from.
pub(super) struct Files<'a> {
    pub(super) disk: &'a dyn Disk,
    pub(super) paths: &'a Paths,
}

impl Files<'_> {
    pub(super) fn message(&self, id: SpoolId, entry: &Entry) -> Result<Stored, SpoolError> {
        let found = Records::read(id, entry, |place| self.record(id, place))?;
        let Some(file) = &found.put.file else { return Ok(found.with_its_own_content(entry)) };
        let damaged = |what: String| SpoolError::Damaged(id, what);
        let path = self.paths.bodies.join(&*file.name);
        let open = self.disk.open_body(&path).and_then(|open| Ok((open.metadata()?.len(), open)));
        let body = match open {
            Ok((len, open)) if len == file.len => {
                let (file, crc32c) = (Arc::new(open), file.crc32c);
                Body::File(BodyFile { file, start: 0, len, crc32c })
            }
            Ok((len, _)) => {
                let (path, should) = (path.display(), file.len);
                return Err(damaged(format!("{path} has {len} octets instead of {should}")));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(damaged(format!("{} is missing", path.display())));
            }
            Err(error) => {
                return Err(SpoolError::Io(format!("opening {}", path.display()), error));
            }
        };
        Ok(Stored { envelope: found.put.envelope, progress: found.progress, body })
    }

    /// The record of `id` at `place`, to be written elsewhere: a `Put`, or else one with its progress.
    pub(super) fn record_again(
        &self,
        id: SpoolId,
        place: Place,
        is_put: bool,
    ) -> Result<Record, SpoolError> {
        let bytes = self.record(id, place)?;
        let record = decode(&bytes, place).and_then(|found| Record::copy(&found));
        let record = record.and_then(|record| match &record.change {
            _ if record.id != id => Err("its record is of another message".to_owned()),
            Change::Put { .. } if is_put => Ok(record),
            Change::Progress { .. } if !is_put => Ok(record),
            _ => Err("its record is of another kind".to_owned()),
        });
        record.map_err(|what| SpoolError::Damaged(id, what))
    }

    fn record(&self, id: SpoolId, place: Place) -> Result<Vec<u8>, SpoolError> {
        let path = self.paths.segment(place.segment);
        let read = || {
            let mut bytes = vec![0; len_of(place)];
            self.disk.open_to_read(&path)?.read_at(&mut bytes, place.offset)?;
            Ok(bytes)
        };
        read().map_err(|error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::NotFound => {
                SpoolError::Damaged(id, format!("{} is cut short or missing", path.display()))
            }
            _ => SpoolError::Io(format!("reading {}", path.display()), error),
        })
    }
}

/// What the records of a message say.
struct Records {
    put: record::Put,
    progress: Progress,
    /// The record of the `Put`, which may have the content in it.
    bytes: Vec<u8>,
}

impl Records {
    fn read(
        id: SpoolId,
        entry: &Entry,
        read: impl Fn(Place) -> Result<Vec<u8>, SpoolError>,
    ) -> Result<Self, SpoolError> {
        let damaged = |what: String| SpoolError::Damaged(id, what);
        let bytes = read(entry.put)?;
        let put = decode(&bytes, entry.put)
            .and_then(|found| found.put())
            .and_then(|put| match put.envelope.id == id {
                true => Ok(put),
                false => Err("its record is of another message".to_owned()),
            })
            .map_err(damaged)?;
        let progress = match entry.progress {
            None => Progress::new(put.envelope.accepted, put.envelope.rcpts.len()),
            Some(place) => {
                let bytes = read(place)?;
                let (of, progress) =
                    decode(&bytes, place).and_then(|found| found.progress()).map_err(damaged)?;
                if of != id || progress.rcpts.len() != put.envelope.rcpts.len() {
                    return Err(damaged("its progress does not fit its envelope".to_owned()));
                }
                progress
            }
        };
        Ok(Self { put, progress, bytes })
    }

    fn with_its_own_content(self, entry: &Entry) -> Stored {
        let content = Bytes::from(self.bytes).slice(self.put.content_at..len_of(entry.put));
        let body = Body::Memory(content);
        Stored { envelope: self.put.envelope, progress: self.progress, body }
    }
}

/// Of a record, in octets.
fn len_of(place: Place) -> usize {
    record::HEADER + usize::try_from(place.len).unwrap_or(usize::MAX)
}

fn decode(bytes: &[u8], place: Place) -> Result<record::Found<'_>, String> {
    let found = record::decode(bytes, place.offset, place.segment, None);
    found.ok_or_else(|| "its record is not what was written (checksum)".to_owned())
}

/// The folders of a spool.
pub(super) struct Paths {
    pub(super) root: PathBuf,
    pub(super) log: PathBuf,
    pub(super) bodies: PathBuf,
    pub(super) failed: PathBuf,
    pub(super) tmp: PathBuf,
    /// Made when it is needed.
    pub(super) damaged: PathBuf,
}

impl Paths {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            log: root.join("log"),
            bodies: root.join("bodies"),
            failed: root.join("failed"),
            tmp: root.join("tmp"),
            damaged: root.join("damaged"),
        }
    }

    pub(super) fn segment(&self, number: u64) -> PathBuf {
        self.log.join(segment::name(number))
    }
}

/// Room on the file system, and what is on its way there.
pub(super) struct Space {
    disk: Arc<dyn Disk>,
    root: PathBuf,
    min_free: u64,
    since: Instant,
    /// When the file system was asked last, in milliseconds after `since`.
    asked: AtomicU64,
    free: AtomicU64,
    /// Octets of contents in memory that are not yet on disk.
    in_memory: AtomicU64,
}

/// Below so many free octets nothing is accepted. Where an overwrite takes space, the reserve is of no use: what it would
/// give is kept free.
fn floor(min_free: u64, is_copy_on_write: bool) -> u64 {
    min_free.saturating_mul(if is_copy_on_write { 2 } else { 1 })
}

impl Space {
    /// How old an answer of the file system may be, in milliseconds.
    const FRESH: u64 = 200;

    pub(super) fn has_room_for(&self, size: u64) -> bool {
        let free = self.free().saturating_sub(self.in_memory());
        free >= self.min_free.saturating_add(size)
    }

    pub(super) fn in_memory(&self) -> u64 {
        self.in_memory.load(Ordering::Relaxed)
    }

    fn free(&self) -> u64 {
        let now = clock::now().saturating_duration_since(self.since).as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        let asked = self.asked.load(Ordering::Relaxed);
        let is_ours = || {
            let exchange =
                self.asked.compare_exchange(asked, now, Ordering::Relaxed, Ordering::Relaxed);
            exchange.is_ok()
        };
        if now.saturating_sub(asked) >= Self::FRESH
            && is_ours()
            && let Ok(free) = self.disk.free(&self.root)
        {
            self.free.store(free, Ordering::Relaxed);
        }
        self.free.load(Ordering::Relaxed)
    }
}

/// A share of the octets in memory.
pub(super) struct Counted {
    space: Arc<Space>,
    octets: u64,
}

impl Counted {
    pub(super) fn new(space: Arc<Space>, octets: u64) -> Self {
        space.in_memory.fetch_add(octets, Ordering::Relaxed);
        Self { space, octets }
    }

    pub(super) fn set(&mut self, octets: u64) {
        self.space.in_memory.fetch_add(octets, Ordering::Relaxed);
        self.space.in_memory.fetch_sub(self.octets, Ordering::Relaxed);
        self.octets = octets;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.set(0);
    }
}
