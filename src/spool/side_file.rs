//! Contents on their way in: small ones stay in memory, large ones go to a file of their own.

use std::fmt;
use std::io;
use std::mem;
use std::path::PathBuf;
use std::sync::Arc;

use super::disk::DiskFile;
use super::log::{Counted, Shared};
use super::{Failure, SpoolError, Stage, Staged};
use crate::clock;
use crate::envelope::SpoolId;

/// Longest content that goes into the log.
const IN_MEMORY: usize = 1024 * 1024;
/// Longest content that stays in memory when there are [`CROWDED`] octets in memory already.
const IN_MEMORY_CROWDED: usize = 64 * 1024;
const CROWDED: u64 = 32 * 1024 * 1024;
/// Octets that are written to a file at once.
const PIECE: usize = 256 * 1024;

/// A side file as a record names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileRef {
    /// Of the file in `bodies/`.
    pub(super) name: Box<str>,
    pub(super) len: u64,
    pub(super) crc32c: u32,
}

impl FileRef {
    /// The name can lead nowhere but into the folder.
    pub(super) fn parse(name: &str, len: u64, crc32c: u32) -> Result<Self, String> {
        match !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            true => Ok(Self { name: name.into(), len, crc32c }),
            false => Err(format!("{name:?} is not the name of a side file")),
        }
    }
}

/// A content in a file of its own, synced, its folder too. Removed when dropped unless it was put.
pub struct StagedFile {
    pub(super) guard: Guard,
    pub(super) file: FileRef,
}

impl StagedFile {
    /// In octets.
    pub(super) fn len(&self) -> u64 {
        self.file.len
    }
}

impl fmt::Debug for StagedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(f)
    }
}

/// Removes its file when dropped; by the writer's thread, for removing a large file takes a while.
pub(super) struct Guard {
    shared: Arc<Shared>,
    path: Option<PathBuf>,
}

impl Guard {
    /// The file is needed.
    pub(super) fn disarm(mut self) {
        self.path = None;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            self.shared.queue.discard(path);
        }
    }
}

/// A content that is being received.
pub struct LogStage {
    shared: Arc<Shared>,
    held: Counted,
    content: Content,
}

enum Content {
    Memory(Vec<u8>),
    File(Writing),
    /// A write failed or was not waited for.
    Broken,
}

/// A file in `tmp/`.
struct Writing {
    guard: Guard,
    name: String,
    file: Arc<dyn DiskFile>,
    /// Not yet in the file.
    buffer: Vec<u8>,
    written: u64,
    crc32c: u32,
}

impl LogStage {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let held = Counted::new(Arc::clone(&shared.space), 0);
        Self { shared, held, content: Content::Memory(Vec::new()) }
    }

    fn broken() -> SpoolError {
        SpoolError::Io("receiving a content".to_owned(), io::Error::other("it failed before"))
    }
}

impl Stage for LogStage {
    async fn write(&mut self, chunk: &[u8]) -> Result<(), SpoolError> {
        // While this runs the content counts as broken: a future that is dropped half-way leaves it so.
        let content = mem::replace(&mut self.content, Content::Broken);
        if !self.shared.space.has_room_for(chunk.len() as u64) {
            return Err(SpoolError::Full);
        }
        self.content = match content {
            Content::Memory(mut bytes) => {
                bytes.extend_from_slice(chunk);
                self.held.set(bytes.len() as u64);
                let limit = match self.shared.space.in_memory() > CROWDED {
                    true => IN_MEMORY_CROWDED,
                    false => IN_MEMORY,
                };
                match bytes.len() > limit {
                    true => {
                        Content::File(Writing::create(&self.shared, bytes).await?.flush().await?)
                    }
                    false => Content::Memory(bytes),
                }
            }
            Content::File(mut writing) => {
                writing.buffer.extend_from_slice(chunk);
                match writing.buffer.len() >= PIECE {
                    true => Content::File(writing.flush().await?),
                    false => Content::File(writing),
                }
            }
            Content::Broken => return Err(Self::broken()),
        };
        if let Content::File(writing) = &self.content {
            self.held.set(writing.buffer.len() as u64);
        }
        Ok(())
    }

    async fn finish(self) -> Result<Staged, SpoolError> {
        match self.content {
            Content::Memory(bytes) => Ok(Staged::Memory(bytes)),
            Content::File(writing) => writing.flush().await?.finish().await.map(Staged::File),
            Content::Broken => Err(Self::broken()),
        }
    }
}

impl Writing {
    /// `guard` is made where the file is: whoever no longer waits for it drops both.
    async fn create(shared: &Arc<Shared>, buffer: Vec<u8>) -> Result<Self, SpoolError> {
        let shared = Arc::clone(shared);
        blocking(move || {
            let name = SpoolId::new(clock::wall()).to_string();
            let path = shared.paths.tmp.join(&name);
            let create = shared.disk.create(&path);
            let file = create.map_err(Failure::at(format!("creating {}", path.display())))?;
            let guard = Guard { shared, path: Some(path) };
            Ok(Self { guard, name, file, buffer, written: 0, crc32c: 0 })
        })
        .await
    }

    /// Writes what waits, in pieces.
    async fn flush(mut self) -> Result<Self, SpoolError> {
        blocking(move || {
            for piece in self.buffer.chunks(PIECE) {
                let write = self.file.write_at(piece, self.written);
                write.map_err(Failure::at("writing a side file"))?;
                self.written += piece.len() as u64;
                self.crc32c = crc32c::crc32c_append(self.crc32c, piece);
            }
            self.buffer.clear();
            self.buffer.shrink_to(2 * PIECE);
            Ok(self)
        })
        .await
    }

    /// Content, then name: a file in `bodies/` is always whole.
    async fn finish(mut self) -> Result<StagedFile, SpoolError> {
        blocking(move || {
            let shared = Arc::clone(&self.guard.shared);
            let sync = self.file.sync();
            sync.map_err(Failure::at("syncing a side file"))?;
            let from = shared.paths.tmp.join(&self.name);
            let to = shared.paths.bodies.join(&self.name);
            let rename = shared.disk.rename(&from, &to);
            rename.map_err(Failure::at("moving a side file to its place"))?;
            self.guard.path = Some(to);
            let sync = shared.disk.sync_dir(&shared.paths.bodies);
            sync.map_err(Failure::at("syncing the folder of side files"))?;
            let file = FileRef { name: self.name.into(), len: self.written, crc32c: self.crc32c };
            Ok(StagedFile { guard: self.guard, file })
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, SpoolError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|failure| failure.to_error()),
        Err(ended) => {
            Err(SpoolError::Io("writing a side file".to_owned(), io::Error::other(ended)))
        }
    }
}
