//! The seam to the operating system: everything on disk is done through here, so that tests can make any operation fail,
//! and can cut the power after any.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use rustix::io::ReadWriteFlags;

pub(super) trait Disk: Send + Sync + 'static {
    /// A new file, mode 0600 whatever the umask.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    /// A file that is there, to be written.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    /// A file that is there and is only read: it may be one that we may not write.
    fn open_to_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    /// The same for whoever reads it past the seam: the content of a message on its way out.
    fn open_body(&self, path: &Path) -> io::Result<File>;
    /// A folder, mode 0700 whatever the umask; it may be there already. Whether it is new.
    fn create_dir(&self, path: &Path) -> io::Result<bool>;
    /// The names in a folder that can be ours.
    fn names(&self, folder: &Path) -> io::Result<Vec<String>>;
    /// Names of the folder are on stable storage.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// What was at `to` is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Octets that are free to us on the file system of `path`.
    fn free(&self, path: &Path) -> io::Result<u64>;
    /// Whether the file system of `path` writes what is overwritten elsewhere, and so needs space for it.
    fn is_copy_on_write(&self, path: &Path) -> io::Result<bool>;
    /// Makes sure that no other process has it, for as long as what is returned lives.
    fn lock(&self, path: &Path) -> Result<Lock, LockError>;
}

/// An open file.
pub(super) trait DiskFile: Send + Sync {
    fn len(&self) -> io::Result<u64>;
    /// Fills `bytes`, or fails.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
    /// The same, but only of what is in memory, so that nobody waits for a medium. False: it is not, or that cannot be
    /// told here.
    fn read_from_memory(&self, _bytes: &mut [u8], _offset: u64) -> bool {
        false
    }
    /// From `offset` up to here there is a hole, which reads as zeros. `offset` itself where nothing is known of holes.
    fn end_of_hole(&self, offset: u64) -> u64 {
        offset
    }
    /// All of `bytes`. After an error any part of them may be there.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Content and length are on stable storage.
    fn sync(&self) -> io::Result<()>;
    fn truncate(&self, len: u64) -> io::Result<()>;
}

/// Held until it is dropped.
pub(super) type Lock = Box<dyn Send>;

#[derive(Debug)]
pub(super) enum LockError {
    /// What the holder wrote of itself; empty where that cannot be read.
    Held(String),
    Io(io::Error),
}

impl From<io::Error> for LockError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// What the holder of a lock wrote of itself. A file may have any content: only what can be shown of it.
pub(super) fn holder(lock: &File) -> String {
    let mut bytes = Vec::new();
    // That somebody holds it is known without.
    drop(lock.take(64).read_to_end(&mut bytes));
    let text: String =
        bytes.into_iter().filter(|byte| (b' '..=b'~').contains(byte)).map(char::from).collect();
    text.trim().to_owned()
}

/// All of a file, which has at most `limit` octets: more than it can have is `InvalidData`.
pub(super) fn read(disk: &dyn Disk, path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let file = disk.open_to_read(path)?;
    let len = file.len()?;
    let Some(len_in_memory) = usize::try_from(len).ok().filter(|len| *len <= limit) else {
        let what = format!("it has {len} octets, and never more than {limit} were written");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    };
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len_in_memory)?;
    bytes.resize(len_in_memory, 0);
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The medium does not give back what it holds there. All else on it may be well.
pub(super) fn is_of_medium(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

/// btrfs, zfs and bcachefs, as statfs(2) names them.
const COPY_ON_WRITE: [rustix::fs::FsWord; 3] = [0x9123_683E, 0x2FC1_2FC1, 0xCA45_1A4E];

/// Whether `path`, or where it would be made, lies on a file system that writes what is overwritten elsewhere (btrfs,
/// zfs, bcachefs). There the reserve is none, and `min_free` counts twice.
pub fn is_copy_on_write(path: &Path) -> io::Result<bool> {
    let there = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    RealDisk.is_copy_on_write(there)
}

/// The disk as it is.
#[derive(Debug)]
pub(super) struct RealDisk;

impl Disk for RealDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(path)?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        Ok(Arc::new(file))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(OpenOptions::new().read(true).write(true).open(path)?))
    }

    fn open_to_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(File::open(path)?))
    }

    fn open_body(&self, path: &Path) -> io::Result<File> {
        File::open(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<bool> {
        let is_new = !path.exists();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o700))?;
        Ok(is_new)
    }

    fn names(&self, folder: &Path) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
        Ok(entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn free(&self, path: &Path) -> io::Result<u64> {
        let space = rustix::fs::statvfs(path)?;
        Ok(space.f_bavail.saturating_mul(space.f_frsize))
    }

    fn is_copy_on_write(&self, path: &Path) -> io::Result<bool> {
        Ok(COPY_ON_WRITE.contains(&rustix::fs::statfs(path)?.f_type))
    }

    fn lock(&self, path: &Path) -> Result<Lock, LockError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(LockError::Held(holder(&file)));
            }
            Err(error) => return Err(LockError::Io(error.into())),
        }
        let mut write = || {
            file.set_permissions(Permissions::from_mode(0o600))?;
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(format!("{}\n", std::process::id()).as_bytes())
        };
        // Who holds it is only for the message of another: a full disk must not keep the spool from being opened.
        drop(write());
        Ok(Box::new(file))
    }
}

impl DiskFile for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(bytes, offset)
    }

    fn read_from_memory(&self, bytes: &mut [u8], offset: u64) -> bool {
        let len = bytes.len();
        let mut buffers = [io::IoSliceMut::new(bytes)];
        let read = rustix::io::preadv2(self, &mut buffers, offset, ReadWriteFlags::NOWAIT);
        read.is_ok_and(|read| read == len)
    }

    fn end_of_hole(&self, offset: u64) -> u64 {
        match rustix::fs::seek(self, rustix::fs::SeekFrom::Data(offset)) {
            Ok(data) => data,
            // To its end.
            Err(rustix::io::Errno::NXIO) => self.metadata().map_or(offset, |data| data.len()),
            Err(_) => offset,
        }
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }
}
