//! What a start makes of any octets at all, for the fuzz target `replay` in `tests/fuzz` and its seeded twin.
//!
//! Damage at random hardly ever gets past the checksum of a record. So most inputs are a [`script`] of what lies on disk:
//! checksums, positions, numbers of segments and keys are made right when it is laid out, and what records say is as the
//! script has it.
//!
//! It is compiled for tests and, as `pub`, under `cfg(fuzzing)`, which cargo-fuzz sets: so a target in a crate of its own
//! reaches what is private here, and nothing of it is in the program or its library.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;

use super::disk::{Disk, DiskFile, Lock, LockError, RealDisk};
use super::inspect::{self, InspectError, Inspection};
use super::log::{Log, OpenError, Report};
use super::segment::{Geometry, Header};
use super::{Durability, Op, Spool as _, SpoolError, Staged};
use crate::config;
use crate::envelope::{
    Client, Envelope, Head, Kind, Priority, Progress, QueueState, RcptStatus, SpoolId, UnixMillis,
};
use crate::outcome::{Cause, Scope, Stage};
use crate::smtp::address::ReversePath;

pub mod mutate;

pub(super) mod script;

/// Longer ones only take time.
const INPUT: usize = 128 * 1024;
const CONTENT: &[u8] = b"put after whatever was there\r\n";

/// The disk as it is, without waiting for it, for nothing but what is in one folder.
struct Confined {
    root: PathBuf,
    /// Octets read and written: what a start allocates is never more.
    moved: Arc<AtomicU64>,
}

struct ConfinedFile {
    file: Arc<dyn DiskFile>,
    moved: Arc<AtomicU64>,
}

impl Confined {
    fn within<'a>(&self, path: &'a Path) -> &'a Path {
        let inner = path.strip_prefix(&self.root);
        let mut inner = inner.unwrap_or_else(|_| panic!("{} is outside", path.display()));
        if path == self.root {
            inner = Path::new("root");
        }
        let is_plain = inner.components().all(|part| matches!(part, Component::Normal(_)));
        assert!(is_plain && inner.components().count() <= 2, "{} leads out", path.display());
        path
    }

    fn file(&self, file: Arc<dyn DiskFile>) -> Arc<dyn DiskFile> {
        Arc::new(ConfinedFile { file, moved: Arc::clone(&self.moved) })
    }
}

impl Disk for Confined {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        RealDisk.create(self.within(path)).map(|file| self.file(file))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        RealDisk.open(self.within(path)).map(|file| self.file(file))
    }

    fn open_to_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        RealDisk.open_to_read(self.within(path)).map(|file| self.file(file))
    }

    fn open_body(&self, path: &Path) -> io::Result<File> {
        RealDisk.open_body(self.within(path))
    }

    fn create_dir(&self, path: &Path) -> io::Result<bool> {
        RealDisk.create_dir(self.within(path))
    }

    fn names(&self, folder: &Path) -> io::Result<Vec<String>> {
        RealDisk.names(self.within(folder))
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(self.within(from), self.within(to))
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.link(self.within(from), self.within(to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(self.within(path))
    }

    fn free(&self, _path: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn is_copy_on_write(&self, _path: &Path) -> io::Result<bool> {
        Ok(false)
    }

    fn lock(&self, path: &Path) -> Result<Lock, LockError> {
        RealDisk.lock(self.within(path))
    }
}

impl DiskFile for ConfinedFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.moved.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.file.read_at(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.moved.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.file.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.file.truncate(len)
    }
}

/// Lays out in `folder`, which is all ours, what `octets` say; looks at it, starts, reads, changes and adds, and starts
/// again. Panics where something is not as it must be, and leaves the spool as it was then. The ids after the first
/// start.
pub fn replay(folder: &Path, octets: &[u8]) -> Vec<SpoolId> {
    let octets = &octets[..octets.len().min(INPUT)];
    let root = folder.join("spool");
    if root.exists() {
        fs::remove_dir_all(&root).unwrap();
    }
    let (switches, files) = script::lay_out(octets);
    for folder in script::FOLDERS {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    for (path, octets) in &files {
        fs::write(root.join(path), octets).unwrap();
    }

    let sealed = |octets: &Vec<u8>| Header::decode(octets)?.sealed;
    let is_sealed = files.values().any(|octets| sealed(octets).is_some());
    let told = look(&root);
    let moved = Arc::new(AtomicU64::new(0));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let start = || {
        let disk = Arc::new(Confined { root: root.clone(), moved: Arc::clone(&moved) });
        let week = Duration::from_secs(7 * 24 * 60 * 60);
        let config = config::Spool { path: root.clone(), min_free: 0, keep_failed: week };
        let geometry = match switches.is_small() {
            true => Geometry { segment: 4096, idle: 256, few: 1, fresh: 0, ..Geometry::default() },
            false => Geometry::default(),
        };
        runtime.block_on(Log::open_on(disk, &config, geometry))
    };
    let (log, first) = match (start(), told) {
        (Ok((log, report)), Some((told, heads))) => {
            let said = Report { strays: told.strays, ..report.clone() };
            // An index may say that all is well where a look, which reads everything, sees damage.
            if !is_sealed {
                let sound: BTreeSet<SpoolId> = heads.sound.iter().map(|(id, _)| *id).collect();
                let (here, rest): (Vec<_>, Vec<_>) =
                    summary(&log).into_iter().partition(|(id, _)| sound.contains(id));
                assert_eq!((said, here), (told, heads.sound), "a start sees what a look sees");
                assert!(rest.iter().all(|(id, _)| heads.unreadable.contains(id)), "{rest:?}");
            }
            (log, report)
        }
        (Err(OpenError::OtherFormat { .. }), None) => return Vec::new(),
        (Err(error), _) => panic!("no start: {error}"),
        (Ok(_), None) => panic!("a start takes what is of a later version"),
    };
    let ids: Vec<SpoolId> = log.heads(None, usize::MAX).iter().map(|head| head.id).collect();
    log.health();
    // These may leave the queue or be held at any time.
    let unreadable = runtime.block_on(read_all(&log));
    if switches.changes() {
        runtime.block_on(change(&log, switches.first_change()));
        drop(runtime.block_on(read_all(&log)));
    }
    let id = (1..).map(SpoolId::from_u128).find(|id| !ids.contains(id)).unwrap();
    let put = Op::Put { envelope: envelope(id), body: Staged::Memory(CONTENT.to_vec()) };
    runtime.block_on(log.apply(vec![put], Durability::Durable)).unwrap();
    let before = end(log);
    assert!(before.contains(&(id, QueueState::Queued)), "what was put is there");

    let (log, second) = start().unwrap_or_else(|error| panic!("no second start: {error}"));
    let readable = |mut summary: Vec<(SpoolId, QueueState)>| {
        summary.retain(|(id, _)| !unreadable.contains(id));
        summary
    };
    let after = summary(&log);
    assert_eq!(readable(after), readable(before), "a second start has what the first left");
    // The same may be told of another segment, when that before it is gone.
    let known: BTreeSet<&str> = first.damaged.iter().map(|what| gist(what)).collect();
    let news: Vec<_> = second.damaged.iter().filter(|what| !known.contains(gist(what))).collect();
    assert!(news.is_empty() && !second.torn, "{news:?} after {first:?}");
    let stored = runtime.block_on(log.open(id)).unwrap();
    let content: Vec<Bytes> = inspect::chunks(id, &stored).map(Result::unwrap).collect();
    assert_eq!(content.concat(), CONTENT);
    end(log);

    let moved = moved.load(Ordering::Relaxed);
    assert!(moved < 100 * (INPUT + octets.len()) as u64, "{moved} octets for {}", octets.len());
    let names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["spool"], "nothing is made outside");
    ids
}

/// What is damaged; of batches without where, for that may be told of another segment.
fn gist(what: &str) -> &str {
    match what.split_once(": batch") {
        Some((_, text)) => text.split_once(';').map_or(text, |(text, _)| text),
        None => what,
    }
}

/// The messages that there are.
#[derive(Default)]
struct Heads {
    sound: Vec<(SpoolId, QueueState)>,
    /// Their records are not what they must be.
    unreadable: BTreeSet<SpoolId>,
}

/// What `inspect` says; `None` where a later version is at work.
fn look(root: &Path) -> Option<(Report, Heads)> {
    let inspection = match Inspection::open(root) {
        Ok(inspection) => inspection,
        Err(InspectError::Open(OpenError::OtherFormat { .. })) => return None,
        Err(error) => panic!("it cannot be looked at: {error}"),
    };
    inspection.totals();
    inspection.strays();
    for head in inspection.heads() {
        inspection.check(head.id);
    }
    let mut heads = Heads::default();
    for Head { id, state, .. } in inspection.heads() {
        match inspection.read(id) {
            Ok(_) => heads.sound.push((id, state)),
            Err(_) => drop(heads.unreadable.insert(id)),
        }
    }
    Some((inspection.report().clone(), heads))
}

fn summary(log: &Log) -> Vec<(SpoolId, QueueState)> {
    log.heads(None, usize::MAX).iter().map(|head| (head.id, head.state)).collect()
}

/// Reads every message whole. What is damaged may say so, and leave. Returns what has no sound records.
async fn read_all(log: &Log) -> BTreeSet<SpoolId> {
    let mut unreadable = BTreeSet::new();
    for head in log.heads(None, usize::MAX) {
        let id = head.id;
        match log.open(id).await {
            Ok(stored) => {
                let read = |chunk| match chunk {
                    Ok(_) | Err(SpoolError::Damaged(..)) => {}
                    Err(error) => panic!("{error}"),
                };
                inspect::chunks(id, &stored).for_each(read);
            }
            Err(SpoolError::Damaged(..) | SpoolError::Unknown(_)) => drop(unreadable.insert(id)),
            Err(error) => panic!("{error}"),
        }
    }
    unreadable
}

/// Something happens to each of a few messages.
async fn change(log: &Log, first: usize) {
    for (head, which) in log.heads(None, 8).into_iter().zip(first..) {
        let Head { id, state, .. } = head;
        let stored = log.open(id).await;
        let is_sound = stored.is_ok();
        let rcpts = stored.map_or(1, |stored| stored.envelope.rcpts.len());
        let mut progress = Progress::new(UnixMillis(9_000), rcpts);
        let op = match (state, which % 5) {
            (_, 0) => Op::Done { id },
            (QueueState::Failed, _) => Op::Requeue { id, progress },
            (QueueState::Held, 1) => Op::Delete { id },
            (QueueState::Held, _) => Op::Release { id, progress },
            (QueueState::Queued, 1) => Op::Attempt { id, progress },
            (QueueState::Queued, 2) => Op::Hold { id, progress },
            (QueueState::Queued, 3) => Op::Update { id, progress },
            (QueueState::Queued, _) => {
                let cause = Cause::new(Scope::Recipient, Stage::Rcpt, "550 no such user");
                progress.rcpts.fill(RcptStatus::Failed(cause));
                Op::Fail { id, progress }
            }
        };
        match log.apply(vec![op], Durability::Lazy).await {
            Ok(()) | Err(SpoolError::Damaged(..)) => {}
            // It left, or is held, meanwhile.
            Err(SpoolError::Unknown(_) | SpoolError::Refused(..))
                if !is_sound || log.head(id).is_none_or(|now| now.state != state) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Ends the spool when all is quiet; what was in it. A panic of one of its threads is one here.
fn end(log: Log) -> Vec<(SpoolId, QueueState)> {
    log.shared.wait_until_filed();
    let summary = summary(&log);
    for thread in log.end() {
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }
    summary
}

fn envelope(id: SpoolId) -> Envelope {
    Envelope {
        kind: Kind::Mail,
        id,
        accepted: UnixMillis(1_000),
        reverse_path: ReversePath::Null,
        rcpts: Vec::new(),
        smtputf8: false,
        eight_bit: false,
        ret: None,
        envid: None,
        size: CONTENT.len() as u64,
        client: Client { address: "unix".into(), helo: "fuzz".into() },
        priority: Priority::Normal,
        author: None,
        prepend: Bytes::new(),
    }
}
