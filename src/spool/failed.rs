//! Failed messages leave the log for files of their own, so that an operator can read them with any tool, and a few of
//! them do not keep whole segments.
//!
//! `failed/ID.eml` is the message as it would have been sent (`prepend` and content), `failed/ID.json` envelope,
//! progress, and what is needed to put it back. One thread, the *filer*, alone changes the folder. It writes the
//! `.eml`, syncs file and folder, then the `.json` in the same way, and then asks the writer for a `Filed` record, which
//! takes the message out of the log. So the `.json` is what makes it count, and nothing of this is in a hurry:
//!
//! - Until the `Filed` record is there, the message lies in the log. Whatever lies in `failed/` beside it is removed at
//!   the next start, and it is filed again. A disk that fails or is full only means that it stays in the log for now.
//! - `Done` of a filed message is a record in the log like any other. The files go once it is synced, and until they
//!   are gone for good its segment stays: so they never come back as a message.
//! - When anything happens to a message while it is being filed, the filing comes to nothing, and its files go too.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::mem;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::{error, info, warn};

use super::disk::{self, Disk};
use super::log::{Log, OpenError, Paths, Report, Shared};
use super::record::{Place, Record};
use super::side_file::LogStage;
use super::writer::Request;
use super::{Failure, Op, SpoolError, Stage as _, Staged, Stored, lock, wait_until, wire};
use crate::clock;
use crate::envelope::{Body, BodyFile, Envelope, Head, Progress, QueueState, SpoolId, UnixMillis};

/// How long after a trouble it is tried again, unless something else happens before.
const RETRY: Duration = Duration::from_secs(60);
/// How often it is looked whether something is to go.
const CHECK: Duration = Duration::from_secs(60 * 60);
/// Of the `.json` files.
const FORMAT: u32 = 1;
/// No `.json` is longer, in octets: not with a million recipients.
const SHEET: usize = 512 * 1024 * 1024;
/// What comes before the checksum of a `.json`, which is over all before this.
const SUM: &str = ",\"sum\":";

/// What memory keeps of `failed/`. Part of the index.
#[derive(Debug, Default)]
pub(super) struct Cabinet {
    /// Messages that lie there, and not in the log. Only during a start there may be some in both.
    filed: BTreeMap<SpoolId, Filed>,
    /// Failed messages in the log that is not synced yet. Their files must not be on disk before them: a power cut
    /// would leave a message of a batch, and nothing else of it.
    unsynced: BTreeSet<SpoolId>,
    /// Failed messages in the log: the filer's work.
    waiting: BTreeSet<SpoolId>,
    /// The one that is being filed, as long as nothing happens to it.
    filing: Option<SpoolId>,
    /// Those that are not to be filed now, each as often as that is asked for.
    asked_for: BTreeMap<SpoolId, u32>,
    /// Messages whose files are to go.
    ending: BTreeMap<SpoolId, Ending>,
}

/// A message that lies in files of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filed {
    pub(super) head: Head,
    /// When it was put there, which is soon after it failed. Unknown where its `.json` could not be read at the start:
    /// it never is too old then, for the next start may read it.
    at: Option<UnixMillis>,
    /// Of the `.eml`, in octets.
    len: u64,
}

#[derive(Debug)]
struct Ending {
    /// The done-mark that must not go before the files.
    mark: Option<Place>,
    is_synced: bool,
}

impl Cabinet {
    pub(super) fn get(&self, id: SpoolId) -> Option<&Filed> {
        self.filed.get(&id)
    }

    pub(super) fn contains(&self, id: SpoolId) -> bool {
        self.filed.contains_key(&id)
    }

    /// Messages in files.
    pub(super) fn len(&self) -> usize {
        self.filed.len()
    }

    /// Failed messages, in files and in the log.
    pub(super) fn count(&self) -> usize {
        self.filed.len() + self.unsynced.len() + self.waiting.len()
    }

    /// Octets of the messages in files.
    pub(super) fn octets(&self) -> u64 {
        // As their files have it, so the sum can be too long.
        self.filed.values().map(|filed| filed.len).fold(0, u64::saturating_add)
    }

    /// Octets of their contents.
    pub(super) fn contents(&self) -> u64 {
        self.filed.values().map(|filed| filed.head.size).fold(0, u64::saturating_add)
    }

    pub(super) fn heads(&self, after: Bound<SpoolId>) -> impl Iterator<Item = Head> {
        self.filed.range((after, Bound::Unbounded)).map(|(_, filed)| filed.head)
    }

    pub(super) fn is_filing(&self, id: SpoolId) -> bool {
        self.filing == Some(id)
    }

    /// A message in the log has changed: it was put, or it has a new progress. What is in the log counts there, so the
    /// mark of its earlier end, which is returned, is needed no more.
    pub(super) fn changed(&mut self, id: SpoolId, state: QueueState) -> Option<Place> {
        self.spoil(id);
        self.is_not_waiting(id);
        match state {
            QueueState::Failed => drop(self.unsynced.insert(id)),
            QueueState::Queued | QueueState::Held => {}
        }
        self.ending.get_mut(&id).and_then(|ending| ending.mark.take())
    }

    /// Some of the done-marks in `segment` whose files are not gone yet, at most `n`.
    pub(super) fn marks_in_segment(&self, segment: u64, n: usize) -> Vec<(SpoolId, Place)> {
        let marks = self.ending.iter().filter_map(|(id, ending)| Some((*id, ending.mark?)));
        marks.filter(|(_, mark)| mark.segment == segment).take(n).collect()
    }

    fn is_not_waiting(&mut self, id: SpoolId) {
        self.unsynced.remove(&id);
        self.waiting.remove(&id);
    }

    /// The message is done, as `mark` says. Whether it has files, so that the mark is needed, and the mark that is
    /// needed no more.
    pub(super) fn done(&mut self, id: SpoolId, mark: Place) -> (bool, Option<Place>) {
        self.spoil(id);
        self.is_not_waiting(id);
        let had_files = self.filed.remove(&id).is_some() || self.ending.contains_key(&id);
        if !had_files {
            return (false, None);
        }
        let old = self.ending.insert(id, Ending { mark: Some(mark), is_synced: false });
        (true, old.and_then(|ending| ending.mark))
    }

    /// The message lies in files from now on; `head` is what the log knows of it. Returns the mark of an earlier end.
    pub(super) fn file(
        &mut self,
        id: SpoolId,
        head: Option<Head>,
        at: UnixMillis,
        len: u64,
    ) -> Option<Place> {
        self.filing.take_if(|filing| *filing == id);
        self.is_not_waiting(id);
        let head = head.unwrap_or(Filed::unread(id).head);
        self.filed.insert(id, Filed { head, at: Some(at), len });
        self.ending.remove(&id).and_then(|ending| ending.mark)
    }

    /// The done-mark of `id` was written again. Whether it is one that is needed.
    pub(super) fn moved(&mut self, id: SpoolId, from: Place, to: Place) -> bool {
        let mark = self.ending.get_mut(&id).and_then(|ending| ending.mark.as_mut());
        mark.filter(|mark| **mark == from).map(|mark| *mark = to).is_some()
    }

    /// All that was written is synced, and what was refused is void. Whether that is work for the filer.
    pub(super) fn settle(&mut self) -> bool {
        let mut is_new = !self.unsynced.is_empty();
        self.waiting.extend(mem::take(&mut self.unsynced));
        for ending in self.ending.values_mut() {
            is_new |= !ending.is_synced;
            ending.is_synced = true;
        }
        is_new
    }

    /// What the filer may have written of it does not count, and is to go.
    fn spoil(&mut self, id: SpoolId) {
        if self.filing.take_if(|filing| *filing == id).is_some() {
            self.ending.entry(id).or_insert(Ending { mark: None, is_synced: true });
        }
    }

    /// The record could not be written. A crash may bring it to life until the writer goes on in another segment, so
    /// the files stay until then.
    pub(super) fn refused(&mut self, id: SpoolId) {
        self.filing.take_if(|filing| *filing == id);
        self.ending.entry(id).or_insert(Ending { mark: None, is_synced: false }).is_synced = false;
    }

    /// The next one that can be filed. From here on what happens to it is noticed.
    fn begin(&mut self, after: Option<SpoolId>, unreadable: &BTreeSet<SpoolId>) -> Option<SpoolId> {
        let after = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut waiting = self.waiting.range((after, Bound::Unbounded));
        // Their old files go first.
        let can_be = |id: &&SpoolId| {
            let is_busy = self.ending.contains_key(id) || self.asked_for.contains_key(id);
            !is_busy && !unreadable.contains(id)
        };
        let id = waiting.find(can_be).copied()?;
        self.filing = Some(id);
        Some(id)
    }

    fn ended(&self) -> Vec<SpoolId> {
        let ended = self.ending.iter().filter(|(_, ending)| ending.is_synced);
        ended.map(|(id, _)| *id).collect()
    }

    /// The files are gone. Returns the mark that is needed no more.
    pub(super) fn forget(&mut self, id: SpoolId) -> Option<Place> {
        self.ending.remove(&id).and_then(|ending| ending.mark)
    }

    pub(super) fn failed_before(&self, time: UnixMillis) -> Vec<SpoolId> {
        let is_old = |id: &SpoolId, at: Option<UnixMillis>| {
            at.is_some_and(|at| at < time) && !self.asked_for.contains_key(id)
        };
        let old = self.filed.iter().filter(|(id, filed)| is_old(id, filed.at));
        old.map(|(id, _)| *id).collect()
    }
}

impl Filed {
    /// Before its `.json` was read.
    fn unread(id: SpoolId) -> Self {
        let state = QueueState::Failed;
        let head = Head {
            id,
            state,
            due: UnixMillis(0),
            size: 0,
            pending: 0,
            attempts: 0,
            in_doubt: false,
        };
        Self { head, at: None, len: 0 }
    }
}

/// As long as this is there, the message stays where it is: in the log, or in files.
pub(super) struct AskedFor {
    shared: Arc<Shared>,
    id: SpoolId,
    /// It lay in files and is put again.
    is_put_again: bool,
}

impl AskedFor {
    fn new(shared: &Arc<Shared>, id: SpoolId) -> Self {
        let mut index = lock(&shared.index);
        index.failed.spoil(id);
        *index.failed.asked_for.entry(id).or_default() += 1;
        Self { shared: Arc::clone(shared), id, is_put_again: false }
    }
}

impl Drop for AskedFor {
    fn drop(&mut self) {
        let asked_for = &mut lock(&self.shared.index).failed.asked_for;
        if let Some(times) = asked_for.get_mut(&self.id) {
            *times -= 1;
        }
        asked_for.retain(|_, times| *times > 0);
        self.shared.filer.ring();
    }
}

/// Wakes the filer.
#[derive(Default)]
pub(super) struct Bell {
    state: Mutex<Rung>,
    changed: Condvar,
}

#[derive(Default)]
struct Rung {
    is_rung: bool,
    is_closed: bool,
    is_idle: bool,
    /// A sync of the folder has failed.
    is_distrusted: bool,
}

impl Bell {
    pub(super) fn ring(&self) {
        lock(&self.state).is_rung = true;
        self.changed.notify_all();
    }

    /// The filer ends after what it is at.
    pub(super) fn close(&self) {
        lock(&self.state).is_closed = true;
        self.changed.notify_all();
    }

    fn is_closed(&self) -> bool {
        lock(&self.state).is_closed
    }

    /// Waits until it is rung, at most until `deadline`. `None` at the end.
    fn wait(&self, deadline: Option<Instant>) -> Option<()> {
        let mut state = lock(&self.state);
        state.is_idle = true;
        self.changed.notify_all();
        let is_called = |state: &Rung| state.is_rung || state.is_closed;
        let mut state = wait_until(&self.changed, state, deadline, is_called);
        (state.is_rung, state.is_idle) = (false, false);
        (!state.is_closed).then_some(())
    }
}

/// The filer's thread.
pub(super) struct Filer {
    shared: Arc<Shared>,
    expiry: Expiry,
    /// Messages that cannot be read: they stay in the log. A start reads them again.
    unreadable: BTreeSet<SpoolId>,
    retry_at: Option<Instant>,
    is_in_trouble: bool,
}

/// However the thread ends. Without it failed messages stay in the log, which is no harm but for their space.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            error!("failed messages stay in the log until the next start: their thread has ended");
            self.0.filer.close();
        }
    }
}

/// Why a message could not be filed now.
enum Unfiled {
    /// Something happened to it, or the spool is being closed.
    Spoiled,
    Unreadable(String),
    /// It cannot be read now.
    Unread(Failure),
    Trouble(Failure),
}

impl From<Failure> for Unfiled {
    fn from(failure: Failure) -> Self {
        Self::Trouble(failure)
    }
}

impl Filer {
    pub(super) fn new(shared: Arc<Shared>, keep: Duration) -> Self {
        shared.filer.ring();
        let expiry = Expiry::new(keep, clock::now(), clock::wall());
        Self { shared, expiry, unreadable: BTreeSet::new(), retry_at: None, is_in_trouble: false }
    }

    pub(super) fn run(mut self) {
        let _end = End(Arc::clone(&self.shared));
        let mut deadline = None;
        while self.shared.filer.wait(deadline).is_some() {
            if let Some(before) = self.expiry.check(clock::now(), clock::wall()) {
                expire(&self.shared, before);
            }
            let removed = remove_ended(&self.shared);
            let filed = self.file_all();
            self.tell(removed.and(filed).err());
            deadline = [self.retry_at, self.expiry.next()].into_iter().flatten().min();
        }
    }

    /// All that wait, until the disk refuses.
    fn file_all(&mut self) -> Result<(), Failure> {
        let mut last = None;
        let mut unread = None;
        loop {
            let next = lock(&self.shared.index).failed.begin(last, &self.unreadable);
            let Some(id) = next else { return unread.map_or(Ok(()), Err) };
            last = Some(id);
            let filed = file(&self.shared, id);
            lock(&self.shared.index).failed.spoil(id);
            match filed {
                Ok(()) | Err(Unfiled::Spoiled) => {}
                Err(Unfiled::Unreadable(what)) => {
                    error!(%id, "message {id} failed and stays in the log: {what}");
                    self.unreadable.insert(id);
                }
                // No reason for the others to stay.
                Err(Unfiled::Unread(failure)) => drop(unread.get_or_insert(failure)),
                Err(Unfiled::Trouble(failure)) => return Err(failure),
            }
            if self.shared.filer.is_closed() {
                return Ok(());
            }
        }
    }

    fn tell(&mut self, failure: Option<Failure>) {
        let Some(failure) = failure else {
            (self.retry_at, self.is_in_trouble) = (None, false);
            return;
        };
        self.retry_at = clock::now().checked_add(RETRY);
        if !self.is_in_trouble {
            warn!("failed messages stay in the log for now: {failure}");
        }
        self.is_in_trouble = true;
    }
}

/// When failed messages go.
///
/// A clock that steps forward must not make them go all at once (R73). So the time that counts here does not step: it
/// goes on from the time at the start, and is never later than the clock. And since the clock may be wrong at a start,
/// a message goes only when it was too old at two checks, at least an hour of running time apart. A clock that steps
/// forward to the right time makes messages stay until the next start: rather too long than too short.
struct Expiry {
    keep: Duration,
    started: (Instant, UnixMillis),
    last: Option<(Instant, UnixMillis)>,
}

impl Expiry {
    fn new(keep: Duration, now: Instant, wall: UnixMillis) -> Self {
        Self { keep, started: (now, wall), last: None }
    }

    /// What failed before the returned time is to go. `None` when it is not the time to look.
    fn check(&mut self, now: Instant, wall: UnixMillis) -> Option<UnixMillis> {
        if self.next().is_some_and(|at| at > now) {
            return None;
        }
        let (started, then) = self.started;
        let time = then.plus(now.saturating_duration_since(started)).min(wall);
        let (_, last) = self.last.replace((now, time))?;
        let keep = u64::try_from(self.keep.as_millis()).unwrap_or(u64::MAX);
        last.min(time).0.checked_sub(keep).map(UnixMillis)
    }

    fn next(&self) -> Option<Instant> {
        self.last.and_then(|(at, _)| at.checked_add(CHECK))
    }
}

/// Ends the messages that failed before `time`.
pub(super) fn expire(shared: &Shared, time: UnixMillis) {
    let old = lock(&shared.index).failed.failed_before(time);
    end_all(shared, old);
}

pub(super) fn end_all(shared: &Shared, old: Vec<SpoolId>) {
    // Marks whose files cannot go are of no use.
    if lock(&shared.filer.state).is_distrusted {
        return;
    }
    for (id, nth) in old.into_iter().zip(1_usize..) {
        // Each has a mark until its files are gone, and the writer looks at all those each time.
        if nth.is_multiple_of(1_000) {
            let removed = remove_ended(shared);
            if lock(&shared.filer.state).is_distrusted {
                let why = removed.err().map(|failure| failure.to_string()).unwrap_or_default();
                return warn!("old failed messages stay for now: {why}");
            }
        }
        // It may have been queued again since.
        match ask(shared, Record::done_in_files(id)) {
            Ok(()) => info!(%id, "message {id} failed longer ago than spool.keep_failed: removed"),
            Err(SpoolError::Unknown(_) | SpoolError::Refused(..)) => {}
            // The next check comes.
            Err(error) => return warn!(%error, "old failed messages stay for now: {error}"),
        }
    }
}

/// Has the writer write a record.
fn ask(shared: &Shared, record: Record) -> Result<(), SpoolError> {
    let (request, answer) = Request::new(shared, vec![record]);
    shared.queue.push(request)?;
    answer.blocking_recv().unwrap_or(Err(SpoolError::Closed))
}

/// Removes the files of messages that are done, and lets go of their done-marks.
fn remove_ended(shared: &Shared) -> Result<(), Failure> {
    let ended = lock(&shared.index).failed.ended();
    if ended.is_empty() {
        return Ok(());
    }
    let mut first_failure = None;
    let mut removed = Vec::with_capacity(ended.len());
    for id in ended {
        match remove_files(shared, id) {
            Ok(()) => removed.push(id),
            Err(failure) => drop(first_failure.get_or_insert(failure)),
        }
    }
    sync_folder(shared)?;
    let mut index = lock(&shared.index);
    removed.into_iter().for_each(|id| index.forget_files(id));
    first_failure.map_or(Ok(()), Err)
}

fn remove_files(shared: &Shared, id: SpoolId) -> Result<(), Failure> {
    for path in [shared.paths.eml(id), shared.paths.json(id)] {
        match shared.disk.remove(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed.map_err(Failure::at(format!("removing {}", path.display())))?,
        }
    }
    Ok(())
}

/// Writes the files of a message in the log, and takes it out of the log.
fn file(shared: &Shared, id: SpoolId) -> Result<(), Unfiled> {
    let stored = match shared.read(id) {
        Ok(stored) => stored,
        Err(SpoolError::Unknown(_) | SpoolError::Closed) => return Err(Unfiled::Spoiled),
        Err(error @ SpoolError::Damaged(..)) => return Err(Unfiled::Unreadable(error.to_string())),
        Err(
            error @ (SpoolError::Io(..)
            | SpoolError::Full
            | SpoolError::Refused(..)
            | SpoolError::Unfit(..)),
        ) => {
            let error = io::Error::other(error);
            return Err(Unfiled::Unread(Failure::at(format!("reading message {id}"))(error)));
        }
    };
    let eml = write_eml(shared, &stored)?;
    let at = clock::wall();
    let json = write_sheet(&stored.envelope, &stored.progress, at, &eml);
    write_file(shared, &shared.paths.json(id), |file| file.write(&json).map_err(Into::into))?;
    match ask(shared, Record::filed(id, at, eml.len)) {
        Ok(()) => Ok(()),
        Err(SpoolError::Unknown(_)) => Err(Unfiled::Spoiled),
        Err(SpoolError::Closed) => {
            // Or the writer has ended in the middle of it: a start sees what is there.
            lock(&shared.index).failed.refused(id);
            Err(Unfiled::Spoiled)
        }
        Err(error) => {
            Err(Failure::at(format!("filing message {id}"))(io::Error::other(error)).into())
        }
    }
}

fn write_eml(shared: &Shared, stored: &Stored) -> Result<Eml, Unfiled> {
    let (envelope, body) = (&stored.envelope, &stored.body);
    let mut content_crc = 0;
    let path = shared.paths.eml(envelope.id);
    let written = write_file(shared, &path, |file| {
        file.write(&envelope.prepend)?;
        let mut reader = body.reader();
        loop {
            if shared.filer.is_closed() {
                return Err(Unfiled::Spoiled);
            }
            match reader.chunk_blocking() {
                Ok(Some(chunk)) => {
                    content_crc = crc32c::crc32c_append(content_crc, &chunk);
                    file.write(&chunk)?;
                }
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return Err(Unfiled::Unreadable(error.to_string()));
                }
                Err(error) => {
                    return Err(Unfiled::Unread(Failure::at("reading a side file")(error)));
                }
            }
        }
    })?;
    let (len, crc) = written;
    Ok(Eml { len, crc, prepend: envelope.prepend.len() as u64, content_crc })
}

/// A file in `tmp/`.
struct Writing<'a> {
    shared: &'a Shared,
    file: Arc<dyn disk::DiskFile>,
    path: PathBuf,
    len: u64,
    crc: u32,
}

impl Writing<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if bytes.is_empty() {
            return Ok(());
        }
        let doing = || format!("writing {}", self.path.display());
        // A spool that may take no mail does not use its last space up for this.
        if !self.shared.space.has_room_for(bytes.len() as u64) {
            return Err(Failure::at(doing())(io::ErrorKind::StorageFull.into()));
        }
        self.file.write_at(bytes, self.len).map_err(Failure::at(doing()))?;
        self.len += bytes.len() as u64;
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        Ok(())
    }
}

/// Content, then name, both synced. What was there is replaced. Length and CRC-32C.
fn write_file(
    shared: &Shared,
    to: &Path,
    write: impl FnOnce(&mut Writing<'_>) -> Result<(), Unfiled>,
) -> Result<(u64, u32), Unfiled> {
    let path = shared.paths.tmp.join(SpoolId::new(clock::wall()).to_string());
    let create = shared.disk.create(&path);
    let file = create.map_err(Failure::at(format!("creating {}", path.display())))?;
    let mut writing = Writing { shared, file, path: path.clone(), len: 0, crc: 0 };
    let moved = write(&mut writing).and_then(|()| {
        let sync = writing.file.sync();
        sync.map_err(Failure::at(format!("syncing {}", path.display())))?;
        let rename = shared.disk.rename(&path, to);
        Ok(rename.map_err(Failure::at(format!("moving a file to {}", to.display())))?)
    });
    if let Err(unfiled) = moved {
        // Where it fails the next start does it.
        drop(shared.disk.remove(&path));
        return Err(unfiled);
    }
    sync_folder(shared)?;
    Ok((writing.len, writing.crc))
}

/// A sync that failed once proves nothing when it succeeds later, so nothing is built on it before the next start.
fn sync_folder(shared: &Shared) -> Result<(), Failure> {
    let doing = "syncing the folder of failed messages";
    if lock(&shared.filer.state).is_distrusted {
        return Err(Failure::at(doing)(io::Error::other("it failed before; a restart may help")));
    }
    let sync = shared.disk.sync_dir(&shared.paths.failed);
    // Without a descriptor nothing was tried.
    let is_untried = |error: &io::Error| {
        use rustix::io::Errno;
        [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::ACCESS, Errno::NOENT]
            .into_iter()
            .any(|errno| Errno::from_io_error(error) == Some(errno))
    };
    let has_failed = sync.as_ref().is_err_and(|error| !is_untried(error));
    lock(&shared.filer.state).is_distrusted = has_failed;
    sync.map_err(Failure::at(doing))
}

/// What a `.json` says of its `.eml`.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Eml {
    len: u64,
    crc: u32,
    /// So many octets before the content are not part of it.
    prepend: u64,
    content_crc: u32,
}

/// What a `.json` of any format has.
#[derive(Deserialize)]
struct AnySheet {
    format: u32,
}

/// A `.json`.
#[derive(Serialize, Deserialize)]
struct Sheet {
    id: String,
    /// When it was put here, in milliseconds since 1970.
    failed: u64,
    eml: Eml,
    envelope: Value,
    progress: Value,
}

fn write_sheet(envelope: &Envelope, progress: &Progress, at: UnixMillis, eml: &Eml) -> Vec<u8> {
    let eml = serde_json::to_vec(eml).expect("numbers can always be written");
    // Put together by hand, so that envelope and progress are to the letter what the log has.
    let mut json = format!("{{\"format\":{FORMAT},\"id\":\"{}\"", envelope.id).into_bytes();
    json.extend_from_slice(format!(",\"failed\":{},\"eml\":", at.0).as_bytes());
    json.extend_from_slice(&eml);
    json.extend_from_slice(b",\"envelope\":");
    json.extend_from_slice(&wire::write_envelope(envelope, None));
    json.extend_from_slice(b",\"progress\":");
    json.extend_from_slice(&wire::write_progress(progress));
    let sum = crc32c::crc32c(&json);
    json.extend_from_slice(format!("{SUM}{sum}}}\n").as_bytes());
    json
}

/// A `.json` as it was read.
struct Read {
    envelope: Envelope,
    progress: Progress,
    at: UnixMillis,
    eml: Eml,
}

impl Read {
    fn filed(&self) -> Filed {
        let head = Head {
            id: self.envelope.id,
            state: QueueState::Failed,
            due: self.progress.due,
            size: self.envelope.size,
            pending: u32::try_from(self.progress.pending().count()).unwrap_or(u32::MAX),
            attempts: self.progress.attempts,
            in_doubt: false,
        };
        Filed { head, at: Some(self.at), len: self.eml.len }
    }
}

/// Why a `.json` tells nothing.
#[derive(Debug)]
enum Unreadable {
    OtherFormat(u32),
    Damaged(String),
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherFormat(format) => {
                write!(f, "its format {format} is that of another version of the program")
            }
            Self::Damaged(what) => f.write_str(what),
        }
    }
}

impl From<String> for Unreadable {
    fn from(what: String) -> Self {
        Self::Damaged(what)
    }
}

impl From<&str> for Unreadable {
    fn from(what: &str) -> Self {
        what.to_owned().into()
    }
}

fn read_sheet(id: SpoolId, json: &[u8]) -> Result<Read, Unreadable> {
    let at = json.windows(SUM.len()).rposition(|words| words == SUM.as_bytes());
    let (summed, sum) = json.split_at(at.ok_or("it has no checksum")?);
    let sum = std::str::from_utf8(&sum[SUM.len()..]).ok();
    let sum = sum.and_then(|sum| sum.trim_end().strip_suffix('}')?.parse().ok());
    if sum != Some(crc32c::crc32c(summed)) {
        return Err("it is not what was written (checksum)".into());
    }
    let AnySheet { format } = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    if format != FORMAT {
        return Err(Unreadable::OtherFormat(format));
    }
    let sheet: Sheet = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    if sheet.id != id.to_string() {
        return Err(format!("it is of message {}", sheet.id).into());
    }
    let (envelope, _) = wire::read_envelope(id, sheet.envelope.to_string().as_bytes())?;
    let progress = wire::read_progress(sheet.progress.to_string().as_bytes())?;
    if progress.rcpts.len() != envelope.rcpts.len() {
        return Err("its progress does not fit its envelope".into());
    }
    if sheet.eml.prepend > sheet.eml.len || sheet.eml.prepend != envelope.prepend.len() as u64 {
        return Err("its lengths do not fit".into());
    }
    Ok(Read { envelope, progress, at: UnixMillis(sheet.failed), eml: sheet.eml })
}

/// Makes the checksum of a `.json` right.
#[cfg(any(test, fuzzing))]
pub(super) fn mend_sum(json: &mut Vec<u8>) {
    if let Some(at) = json.windows(SUM.len()).rposition(|words| words == SUM.as_bytes()) {
        json.truncate(at);
        let sum = crc32c::crc32c(json);
        json.extend_from_slice(format!("{SUM}{sum}}}\n").as_bytes());
    }
}

/// Reads a message that lies in files.
pub(super) fn read_filed(
    disk: &dyn Disk,
    paths: &Paths,
    id: SpoolId,
) -> Result<Stored, SpoolError> {
    let missing = |path: &Path| SpoolError::Damaged(id, format!("{} is missing", path.display()));
    let path = paths.json(id);
    let json = disk::read(disk, &path, SHEET).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => missing(&path),
        io::ErrorKind::InvalidData => {
            SpoolError::Damaged(id, format!("{}: {error}", path.display()))
        }
        _ => SpoolError::Io(format!("reading {}", path.display()), error),
    })?;
    let read = read_sheet(id, &json);
    let read =
        read.map_err(|what| SpoolError::Damaged(id, format!("{}: {what}", path.display())))?;
    let path = paths.eml(id);
    let opened = disk.open_body(&path).and_then(|open| Ok((open.metadata()?.len(), open)));
    let (len, open) = opened.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => missing(&path),
        _ => SpoolError::Io(format!("opening {}", path.display()), error),
    })?;
    let eml = read.eml;
    if len != eml.len {
        let what = format!("{} has {len} octets instead of {}", path.display(), eml.len);
        return Err(SpoolError::Damaged(id, what));
    }
    let body = BodyFile {
        file: Arc::new(open),
        start: eml.prepend,
        len: eml.len - eml.prepend,
        crc32c: eml.content_crc,
    };
    Ok(Stored { envelope: read.envelope, progress: read.progress, body: Body::File(body) })
}

#[cfg(any(test, fuzzing))]
impl Shared {
    /// Waits until what was written is synced, and the filer has done what it can.
    pub(super) fn wait_until_filed(&self) {
        for round in 0.. {
            assert!(round < 5_000, "the filer does not come to rest");
            // While nothing can be written, nothing more is filed.
            let is_stuck = lock(&self.trouble).is_some();
            let is_synced = is_stuck || lock(&self.index).failed.unsynced.is_empty();
            let state = lock(&self.filer.state);
            assert!(!state.is_closed, "the filer has ended");
            if is_synced && !state.is_rung && state.is_idle {
                return;
            }
            drop(self.filer.changed.wait_timeout(state, Duration::from_millis(2)));
        }
    }
}

impl Log {
    /// `ops`, but what lies in files and is to be queued again is put into the log again. The messages stay where they
    /// are until what is returned beside goes.
    pub(super) async fn with_what_lies_in_files(
        &self,
        ops: Vec<Op>,
    ) -> Result<(Vec<Op>, Vec<AskedFor>), SpoolError> {
        let mut all = Vec::with_capacity(ops.len());
        let mut asked_for = Vec::new();
        for op in ops {
            let Op::Requeue { id, progress } = op else {
                all.push(op);
                continue;
            };
            let mut asked = AskedFor::new(&self.shared, id);
            // The writer may be about to say that it is filed.
            let (request, answer) = Request::new(&self.shared, Vec::new());
            self.shared.queue.push(request)?;
            answer.await.unwrap_or(Err(SpoolError::Closed))?;
            asked.is_put_again = lock(&self.shared.index).failed.contains(id);
            if asked.is_put_again {
                let (envelope, body) = self.restore(id).await?;
                let put = Op::Put { envelope, body };
                all.extend([Op::Done { id }, put, Op::Update { id, progress }]);
            } else {
                all.push(Op::Requeue { id, progress });
            }
            asked_for.push(asked);
        }
        Ok((all, asked_for))
    }

    /// Whether the `Done` of `id` is one that [`Self::with_what_lies_in_files`] has put before its `Put`.
    pub(super) fn is_put_again(asked_for: &[AskedFor], id: SpoolId) -> bool {
        asked_for.iter().any(|asked| asked.is_put_again && asked.id == id)
    }

    async fn restore(&self, id: SpoolId) -> Result<(Envelope, Staged), SpoolError> {
        let shared = Arc::clone(&self.shared);
        let read =
            tokio::task::spawn_blocking(move || read_filed(&*shared.disk, &shared.paths, id)).await;
        let doing = || format!("restoring message {id}");
        let Stored { envelope, progress: _, body } =
            read.map_err(|ended| SpoolError::Io(doing(), io::Error::other(ended)))??;
        let mut stage = LogStage::new(Arc::clone(&self.shared));
        let mut reader = body.reader();
        loop {
            match reader.chunk().await {
                Ok(Some(chunk)) => stage.write(&chunk).await?,
                Ok(None) => break,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return Err(SpoolError::Damaged(id, error.to_string()));
                }
                Err(error) => return Err(SpoolError::Io(doing(), error)),
            }
        }
        Ok((envelope, stage.finish().await?))
    }
}

impl Paths {
    pub(super) fn eml(&self, id: SpoolId) -> PathBuf {
        self.failed.join(format!("{id}.eml"))
    }

    pub(super) fn json(&self, id: SpoolId) -> PathBuf {
        self.failed.join(format!("{id}.json"))
    }
}

/// What a start finds in the folder.
#[derive(Default)]
pub(super) struct Found {
    eml: BTreeSet<SpoolId>,
    json: BTreeSet<SpoolId>,
}

impl Found {
    /// Other names are none of ours.
    pub(super) fn new(names: Vec<String>) -> Self {
        let mut found = Self::default();
        for name in names {
            let Some((stem, ending)) = name.rsplit_once('.') else { continue };
            let id = SpoolId::parse(stem).filter(|id| id.to_string() == stem);
            match (id, ending) {
                (Some(id), "eml") => found.eml.insert(id),
                (Some(id), "json") => found.json.insert(id),
                _ => continue,
            };
        }
        found
    }

    /// Before the log is read: as if all were filed that can be, and the others to go.
    pub(super) fn cabinet(&self) -> Cabinet {
        let filed = self.json.iter().map(|id| (*id, Filed::unread(*id))).collect();
        let lone = self.eml.difference(&self.json);
        let ending = lone.map(|id| (*id, Ending { mark: None, is_synced: true })).collect();
        Cabinet { filed, ending, ..Cabinet::default() }
    }

    fn contains(&self, id: SpoolId) -> bool {
        self.eml.contains(&id) || self.json.contains(&id)
    }
}

impl Cabinet {
    /// After the log is read: what is in the log counts there, and what its files say counts for the rest. Returns the
    /// contents that belong to nothing, and the done-marks that are needed no more. What the log says to be done has a
    /// mark as long as it has files, so a content without either has lost its `.json`.
    pub(super) fn sort_out(
        &mut self,
        found: &Found,
        is_in_log: impl Fn(SpoolId) -> bool,
        disk: &dyn Disk,
        paths: &Paths,
        report: &mut Report,
    ) -> Result<(Vec<PathBuf>, Vec<Place>), OpenError> {
        self.filed.retain(|id, _| !is_in_log(*id));
        for id in found.json.union(&found.eml).filter(|id| is_in_log(**id)) {
            self.ending.entry(*id).or_insert(Ending { mark: None, is_synced: true });
        }
        self.settle();
        let gone: Vec<_> = self.ending.keys().filter(|id| !found.contains(**id)).copied().collect();
        let marks = gone.into_iter().filter_map(|id| self.forget(id)).collect();

        let mut lone: BTreeSet<SpoolId> = found.eml.difference(&found.json).copied().collect();
        lone.retain(|id| {
            let has_mark = self.ending.get(id).is_some_and(|ending| ending.mark.is_some());
            !self.filed.contains_key(id) && !has_mark && !is_in_log(*id)
        });
        for id in &lone {
            self.ending.remove(id);
            report.damaged.push(format!(
                "message {id}: failed/{id}.json is missing; failed/{id}.eml is put aside"
            ));
        }
        for id in self.filed.keys().copied().collect::<Vec<_>>() {
            let sheet = match disk::read(disk, &paths.json(id), SHEET) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Err("it is missing".into())
                }
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    Err(error.to_string().into())
                }
                // It may be there all the same, so it stays in the list.
                Err(error) => {
                    let what = format!("message {id}: failed/{id}.json cannot be read: {error}");
                    report.damaged.push(what);
                    if let Some(filed) = self.filed.get_mut(&id) {
                        filed.at = None;
                    }
                    continue;
                }
                Ok(json) => read_sheet(id, &json),
            };
            match sheet {
                Ok(read) => {
                    let filed = read.filed();
                    let len = disk.open_to_read(&paths.eml(id)).and_then(|file| file.len());
                    if !len.as_ref().is_ok_and(|len| *len == filed.len) {
                        let what = match len {
                            Ok(len) => format!("has {len} octets instead of {}", filed.len),
                            Err(error) => format!("cannot be read: {error}"),
                        };
                        report.damaged.push(format!("message {id}: failed/{id}.eml {what}"));
                    }
                    self.filed.insert(id, filed);
                }
                Err(Unreadable::OtherFormat(version)) => {
                    let file = paths.json(id);
                    return Err(OpenError::OtherFormat { file, version, ours: FORMAT });
                }
                Err(Unreadable::Damaged(what)) => {
                    report.damaged.push(format!("message {id}: failed/{id}.json: {what}"));
                    self.filed.remove(&id);
                }
            }
        }
        Ok((lone.into_iter().map(|id| paths.eml(id)).collect(), marks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(60 * 60);
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    /// Checks every hour with the clock `ahead` of the time that passes; what is returned is that of the last check,
    /// in hours after the start less `keep`.
    fn check(keep: Duration, ahead: &[Duration]) -> Option<u64> {
        let start = clock::now();
        let then = UnixMillis(1_000_000_000_000);
        let mut expiry = Expiry::new(keep, start, then);
        let mut last = None;
        for (ahead, hours) in ahead.iter().zip(0..) {
            let passed = HOUR * hours;
            last = expiry.check(start + passed, then.plus(passed + *ahead));
            assert_eq!(expiry.check(start + passed + HOUR / 2, then.plus(passed)), None);
        }
        last.map(|time| time.plus(keep).since(then).as_secs() / 3600)
    }

    #[test]
    fn what_is_too_old_at_two_checks_goes() {
        let steady = [Duration::ZERO; 4];
        assert_eq!(check(DAY, &steady[..1]), None);
        assert_eq!(check(DAY, &steady[..2]), Some(0));
        assert_eq!(check(DAY, &steady), Some(2));
        assert_eq!(check(Duration::ZERO, &steady), Some(2));
        assert_eq!(check(DAY * 365 * 100, &steady), None);
    }

    #[test]
    fn a_clock_that_steps_forward_makes_nothing_older() {
        let zero = Duration::ZERO;
        assert_eq!(check(DAY, &[zero, DAY, DAY, DAY]), Some(2));
        assert_eq!(check(DAY, &[zero, DAY * 20_000, zero, zero]), Some(2));
    }

    #[test]
    fn a_clock_that_steps_back_makes_everything_younger() {
        let start = clock::now();
        let then = UnixMillis(1_000_000_000_000);
        let mut expiry = Expiry::new(DAY, start, then);
        expiry.check(start, then);
        let back = UnixMillis(then.0 - 90_000_000);
        let before = expiry.check(start + HOUR, back).unwrap();
        assert_eq!(before.plus(DAY), back);
    }

    #[test]
    fn a_sheet_comes_back_or_is_refused() {
        let id = SpoolId::from_u128(7);
        let json = br#"{"at":7,"from":"","to":[{"p":"a@b"}],"size":3,"peer":"u","helo":"h","add":"X: \",\"sum\":1\r\n"}"#;
        let (envelope, _) = wire::read_envelope(id, json).unwrap();
        let progress = Progress::new(UnixMillis(u64::MAX), 1);
        let eml =
            Eml { len: 20, crc: u32::MAX, prepend: envelope.prepend.len() as u64, content_crc: 9 };
        let sheet = write_sheet(&envelope, &progress, UnixMillis(55), &eml);
        let read = read_sheet(id, &sheet).unwrap();
        assert_eq!((read.envelope, read.progress, read.at.0), (envelope, progress, 55));
        assert!(read_sheet(SpoolId::from_u128(8), &sheet).is_err());
        for at in 0..sheet.len() {
            assert!(read_sheet(id, &sheet[..at]).is_err() || at >= sheet.len() - 1);
            let mut changed = sheet.clone();
            changed[at] ^= 1;
            let is_end = at + 1 == sheet.len();
            assert!(read_sheet(id, &changed).is_err() || is_end, "{at}");
        }
    }
}
