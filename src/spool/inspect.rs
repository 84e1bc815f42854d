//! Looking at a spool that no daemon has, or whose daemon cannot start: nothing on disk is changed.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::iter;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{FlockOperation, flock};

use super::disk::{self, Disk, DiskFile, Lock, LockError, RealDisk};
use super::failed;
use super::index::Lies;
use super::log::{self, Files, OpenError, Paths, Report};
use super::recover::{self, Depth, Recovered};
use super::{Failure, SpoolError, Stored};
use crate::envelope::{Body, Head, QueueState, SpoolId};

/// A spool as it lies on disk.
pub struct Inspection {
    paths: Paths,
    found: Recovered,
    /// Keeps a daemon from starting meanwhile.
    _lock: Option<File>,
}

impl fmt::Debug for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the spool {}", self.paths.root.display())
    }
}

#[derive(Debug)]
pub enum InspectError {
    /// The folder has no `log/`.
    NotASpool(PathBuf),
    Open(OpenError),
}

impl fmt::Display for InspectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotASpool(path) => {
                write!(
                    f,
                    "{} is not a spool: it has no folder log; name the spool's own folder with --spool",
                    path.display()
                )
            }
            Self::Open(OpenError::Locked { path, holder }) => write!(
                f,
                "the spool {} is in use by {}: while it runs, what is read here would be misleading; \
                 stop it first",
                path.display(),
                log::process(holder)
            ),
            Self::Open(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for InspectError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NotASpool(_) => None,
            Self::Open(error) => Some(error),
        }
    }
}

impl<E: Into<OpenError>> From<E> for InspectError {
    fn from(error: E) -> Self {
        Self::Open(error.into())
    }
}

/// What lies in a spool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub segments: usize,
    /// Octets of the segments.
    pub log: u64,
    pub queued: usize,
    pub held: usize,
    pub failed: usize,
    /// Side files that a message names.
    pub files: usize,
    /// Their octets.
    pub file_octets: u64,
}

impl Inspection {
    /// Reads the whole log of the spool in `folder`.
    pub fn open(folder: &Path) -> Result<Self, InspectError> {
        let paths = Paths::new(folder);
        let log = &paths.log;
        match fs::metadata(log) {
            Ok(log) if log.is_dir() => {}
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Err(Failure::at(format!("opening {}", log.display()))(error).into());
            }
            Ok(_) | Err(_) => return Err(InspectError::NotASpool(folder.to_owned())),
        }
        let lock = lock(&paths.root)?;
        let found = recover::read(&ReadOnly, &paths, Depth::Everything)?;
        Ok(Self { paths, found, _lock: lock })
    }

    /// What a start would say of it.
    pub fn report(&self) -> &Report {
        &self.found.report
    }

    /// All messages, in the order of their ids.
    pub fn heads(&self) -> impl Iterator<Item = Head> {
        self.found.index.heads(None)
    }

    pub fn head(&self, id: SpoolId) -> Option<Head> {
        self.found.index.head(id)
    }

    pub fn read(&self, id: SpoolId) -> Result<Stored, SpoolError> {
        match self.found.index.find(id).ok_or(SpoolError::Unknown(id))? {
            Lies::Log(entry) => Files { disk: &ReadOnly, paths: &self.paths }.message(id, &entry),
            Lies::Files(_) => failed::read_filed(&ReadOnly, &self.paths, id),
        }
    }

    /// Reads the message as it would be sent. What is wrong with it, unless the report says so already.
    pub fn check(&self, id: SpoolId) -> Option<String> {
        let lies = self.found.index.find(id)?;
        if self.found.without_file.contains(&id) {
            return None;
        }
        let error = match self.read(id) {
            Ok(stored) => chunks(id, &stored).find_map(Result::err)?,
            Err(error) => error,
        };
        let what = match error {
            SpoolError::Damaged(_, what) => what,
            other => other.to_string(),
        };
        let place = match (lies, self.found.index.file(id)) {
            (Lies::Files(_), _) => self.paths.eml(id).display().to_string(),
            (Lies::Log(_), Some(file)) => {
                let path = self.paths.bodies.join(&*file.name);
                format!("{}, octets 0 to {}", path.display(), file.len)
            }
            (Lies::Log(entry), None) => {
                let path = self.paths.segment(entry.put.segment);
                format!("{}, octet {}", path.display(), entry.put.offset)
            }
        };
        Some(format!("message {id}: {place}: {what}"))
    }

    /// Names in `bodies/` that no message has.
    pub fn strays(&self) -> &BTreeSet<String> {
        &self.found.stray
    }

    /// Whether a start would put segments aside, and strays with them.
    pub fn has_damaged_segment(&self) -> bool {
        !self.found.damaged.is_empty()
    }

    /// How many contents were being received when the daemon ended.
    pub fn unfinished(&self) -> Result<usize, OpenError> {
        self.count(&self.paths.tmp)
    }

    /// How many files earlier starts have put aside.
    pub fn put_aside(&self) -> Result<usize, OpenError> {
        self.count(&self.paths.damaged)
    }

    fn count(&self, folder: &Path) -> Result<usize, OpenError> {
        let names = ReadOnly.names(folder);
        Ok(names.map_err(Failure::at(format!("reading the folder {}", folder.display())))?.len())
    }

    pub fn totals(&self) -> Totals {
        let segments = &self.found.index.segments;
        let mut totals = Totals {
            segments: segments.len(),
            log: segments.values().map(|segment| segment.len).sum(),
            ..Totals::default()
        };
        for head in self.heads() {
            match head.state {
                QueueState::Queued => totals.queued += 1,
                QueueState::Held => totals.held += 1,
                QueueState::Failed => totals.failed += 1,
            }
        }
        for (_, file) in self.found.index.files() {
            totals.files += 1;
            totals.file_octets = totals.file_octets.saturating_add(file.len);
        }
        totals
    }
}

/// The message as it would be sent, in chunks. The last one of a damaged content is an error instead.
pub fn chunks(
    id: SpoolId,
    stored: &Stored,
) -> impl Iterator<Item = Result<Bytes, SpoolError>> + use<> {
    let mut reader = Some(stored.body.reader());
    let is_file = matches!(stored.body, Body::File(_));
    let rest = iter::from_fn(move || {
        let error = match reader.as_mut()?.chunk_blocking() {
            Ok(chunk) => return chunk.map(Ok),
            Err(error) => error,
        };
        reader = None;
        Some(Err(match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof if is_file => {
                SpoolError::Damaged(id, error.to_string())
            }
            _ => SpoolError::Io(format!("reading message {id}"), error),
        }))
    });
    iter::once(Ok(stored.envelope.prepend.clone())).chain(rest)
}

/// Takes the lock where there is one; shared, for several may look at once. A file system without locks, or a spool that
/// was copied without its lock, can be looked at all the same.
fn lock(root: &Path) -> Result<Option<File>, OpenError> {
    let path = root.join("lock");
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure::at(format!("opening {}", path.display()))(error).into()),
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(OpenError::Locked { path: root.to_owned(), holder: disk::holder(&file) })
        }
        Err(_) => Ok(None),
    }
}

/// A disk on which nothing can be changed, whatever this program's mistakes: files are opened for reading only.
struct ReadOnly;

fn refused() -> io::Error {
    io::ErrorKind::ReadOnlyFilesystem.into()
}

impl Disk for ReadOnly {
    fn create(&self, _path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Err(refused())
    }

    fn open(&self, _path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Err(refused())
    }

    fn open_to_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        RealDisk.open_to_read(path)
    }

    fn open_body(&self, path: &Path) -> io::Result<File> {
        File::open(path)
    }

    fn create_dir(&self, _path: &Path) -> io::Result<bool> {
        Err(refused())
    }

    /// A folder that is not there is empty: a start would make it.
    fn names(&self, folder: &Path) -> io::Result<Vec<String>> {
        match RealDisk.names(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            names => names,
        }
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Err(refused())
    }

    fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        Err(refused())
    }

    fn link(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        Err(refused())
    }

    fn remove(&self, _path: &Path) -> io::Result<()> {
        Err(refused())
    }

    fn free(&self, path: &Path) -> io::Result<u64> {
        RealDisk.free(path)
    }

    fn is_copy_on_write(&self, path: &Path) -> io::Result<bool> {
        RealDisk.is_copy_on_write(path)
    }

    fn lock(&self, _path: &Path) -> Result<Lock, LockError> {
        Err(refused().into())
    }
}
