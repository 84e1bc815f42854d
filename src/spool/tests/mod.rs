use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;

use super::disk::{Disk, DiskFile, Lock, LockError, RealDisk};
use super::log::{Log, OpenError, Report};
use super::record::Record;
use super::segment::Geometry;
use super::*;
use crate::config;
use crate::envelope::{Client, Kind, Priority, QueueState, Rcpt, RcptStatus, UnixMillis};
use crate::outcome::{self, Cause, Receipt, Scope};
use crate::smtp::address::{Charset, ForwardPath, Mailbox, ReversePath};
use crate::smtp::params::{Notify, Ret};
use crate::smtp::reply::EnhancedStatus;

mod failed;
mod fuzz;
mod media;
mod power;
mod sim_disk;

const WEEK: Duration = Duration::from_secs(7 * 24 * 60 * 60);
const EIO: i32 = 5;
const EMFILE: i32 = 24;
const ENOSPC: i32 = 28;

/// The real disk without waiting for it, and with faults on demand.
#[derive(Clone)]
struct TestDisk(Arc<Faults>);

impl std::ops::Deref for TestDisk {
    type Target = Faults;

    fn deref(&self) -> &Faults {
        &self.0
    }
}

struct Faults {
    /// Operations so far.
    count: AtomicU64,
    /// Operations from this one on fail, so many of them, with this error.
    fail_from: AtomicU64,
    fail_times: AtomicU64,
    errno: AtomicI32,
    /// Only syncs are counted and fail.
    only_syncs: AtomicBool,
    syncs: AtomicU64,
    free: AtomicU64,
    /// What makes a file longer fails; what is overwritten does not.
    is_full: AtomicBool,
    /// So many files cannot be opened.
    bad_opens: AtomicU64,
    /// Files with this ending cannot be opened.
    bad_ending: Mutex<Option<&'static str>>,
    /// Octets that cannot be read: of which file, from where to where.
    bad_octets: Mutex<Vec<(PathBuf, Range<u64>)>>,
    has_no_links: AtomicBool,
    /// What was written is in the operating system's memory.
    remembers: AtomicBool,
    /// It writes what is overwritten elsewhere.
    copies: AtomicBool,
    dies: AtomicBool,
    /// Syncs wait while it is closed.
    gate: Mutex<bool>,
    gate_opened: Condvar,
}

/// A file of a [`TestDisk`].
struct TestFile {
    disk: TestDisk,
    path: PathBuf,
    file: Arc<dyn DiskFile>,
}

impl TestDisk {
    fn new() -> Arc<Self> {
        Arc::new(Self(Arc::new(Faults {
            count: AtomicU64::new(0),
            fail_from: AtomicU64::new(u64::MAX),
            fail_times: AtomicU64::new(0),
            errno: AtomicI32::new(EIO),
            only_syncs: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
            free: AtomicU64::new(u64::MAX),
            is_full: AtomicBool::new(false),
            bad_opens: AtomicU64::new(0),
            bad_ending: Mutex::default(),
            bad_octets: Mutex::default(),
            has_no_links: AtomicBool::new(false),
            remembers: AtomicBool::new(false),
            copies: AtomicBool::new(false),
            dies: AtomicBool::new(false),
            gate: Mutex::new(false),
            gate_opened: Condvar::new(),
        })))
    }

    fn fail(&self, from: u64, times: u64, errno: i32) {
        self.errno.store(errno, Ordering::SeqCst);
        self.fail_times.store(times, Ordering::SeqCst);
        self.fail_from.store(from, Ordering::SeqCst);
    }

    fn fail_next(&self, times: u64, errno: i32) {
        self.fail(self.count.load(Ordering::SeqCst), times, errno);
    }

    fn fail_next_syncs(&self, times: u64, errno: i32) {
        self.only_syncs.store(true, Ordering::SeqCst);
        self.fail_next(times, errno);
    }

    fn heal(&self) {
        self.fail(u64::MAX, 0, EIO);
    }

    fn set_gate(&self, closed: bool) {
        *lock(&self.gate) = closed;
        self.gate_opened.notify_all();
    }

    fn step(&self, is_sync: bool) -> io::Result<()> {
        assert!(!self.dies.load(Ordering::SeqCst), "the disk of the test dies on demand");
        if self.only_syncs.load(Ordering::SeqCst) && !is_sync {
            return Ok(());
        }
        let n = self.count.fetch_add(1, Ordering::SeqCst);
        let from = self.fail_from.load(Ordering::SeqCst);
        match n >= from && n - from < self.fail_times.load(Ordering::SeqCst) {
            true => Err(io::Error::from_raw_os_error(self.errno.load(Ordering::SeqCst))),
            false => Ok(()),
        }
    }
}

impl TestDisk {
    fn file(&self, path: &Path, file: Arc<dyn DiskFile>) -> Arc<dyn DiskFile> {
        Arc::new(TestFile { disk: self.clone(), path: path.to_owned(), file })
    }

    fn step_open(&self, path: &Path) -> io::Result<()> {
        let less = |left: u64| left.checked_sub(1);
        let is_bad = self.bad_opens.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok();
        let ending = lock(&self.bad_ending);
        match is_bad || ending.is_some_and(|ending| path.to_string_lossy().ends_with(ending)) {
            true => Err(io::Error::from_raw_os_error(EMFILE)),
            false => Ok(()),
        }
    }
}

impl Disk for TestDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.step(false)?;
        Ok(self.file(path, RealDisk.create(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.step_open(path)?;
        // Root may write what nobody may.
        if fs::metadata(path)?.permissions().readonly() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(self.file(path, RealDisk.open(path)?))
    }

    fn open_to_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.step_open(path)?;
        Ok(self.file(path, RealDisk.open_to_read(path)?))
    }

    fn open_body(&self, path: &Path) -> io::Result<File> {
        RealDisk.open_body(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<bool> {
        self.step(false)?;
        RealDisk.create_dir(path)
    }

    fn names(&self, folder: &Path) -> io::Result<Vec<String>> {
        RealDisk.names(folder)
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        self.step(true)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step(false)?;
        RealDisk.rename(from, to)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step(false)?;
        if self.has_no_links.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        RealDisk.link(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step(false)?;
        RealDisk.remove(path)
    }

    fn free(&self, _path: &Path) -> io::Result<u64> {
        Ok(self.free.load(Ordering::SeqCst))
    }

    fn is_copy_on_write(&self, _path: &Path) -> io::Result<bool> {
        Ok(self.copies.load(Ordering::SeqCst))
    }

    fn lock(&self, path: &Path) -> Result<Lock, LockError> {
        RealDisk.lock(path)
    }
}

impl DiskFile for TestFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        let is_bad = |(path, octets): &(PathBuf, Range<u64>)| {
            *path == self.path && octets.start < end && offset < octets.end
        };
        if lock(&self.disk.bad_octets).iter().any(is_bad) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        self.file.read_at(bytes, offset)
    }

    fn read_from_memory(&self, bytes: &mut [u8], offset: u64) -> bool {
        self.disk.remembers.load(Ordering::SeqCst) && self.read_at(bytes, offset).is_ok()
    }

    fn end_of_hole(&self, offset: u64) -> u64 {
        self.file.end_of_hole(offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        if self.disk.is_full.load(Ordering::SeqCst) && end > self.file.len()? {
            return Err(io::Error::from_raw_os_error(ENOSPC));
        }
        if let Err(error) = self.disk.step(false) {
            self.file.write_at(&bytes[..bytes.len() / 2], offset)?;
            return Err(error);
        }
        self.file.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.syncs.fetch_add(1, Ordering::SeqCst);
        let mut gate = lock(&self.disk.gate);
        while *gate {
            gate = self.disk.gate_opened.wait(gate).unwrap();
        }
        self.disk.step(true)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.disk.step(false)?;
        self.file.truncate(len)
    }
}

fn at(path: &Path) -> config::Spool {
    config::Spool { path: path.join("spool"), min_free: 1_000_000, keep_failed: WEEK }
}

async fn open(dir: &TempDir) -> (Log, Report) {
    open_on(&TestDisk::new(), dir).await
}

async fn open_on(disk: &Arc<TestDisk>, dir: &TempDir) -> (Log, Report) {
    let disk = Arc::clone(disk);
    // What is read is to come from the disk.
    let geometry = Geometry { fresh: 0, ..Geometry::default() };
    Log::open_on(disk, &at(dir.path()), geometry).await.unwrap()
}

/// What a `kill -9` leaves: the files as they are now.
fn snapshot(dir: &TempDir) -> TempDir {
    fn copy(from: &Path, to: &Path) {
        fs::create_dir(to).unwrap();
        for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
            let to = to.join(entry.file_name());
            match entry.file_type().unwrap().is_dir() {
                true => copy(&entry.path(), &to),
                // A file may be removed under our eyes.
                false => drop(fs::copy(entry.path(), to)),
            }
        }
    }
    let copied = TempDir::new().unwrap();
    copy(&dir.path().join("spool"), &copied.path().join("spool"));
    copied
}

fn files(dir: &TempDir, folder: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir.path().join("spool").join(folder));
    let mut files: Vec<_> =
        entries.into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn segments(dir: &TempDir) -> Vec<PathBuf> {
    let mut found = files(dir, "log");
    found.retain(|path| path.extension().is_some());
    found
}

fn id(n: u128) -> SpoolId {
    SpoolId::from_u128(n)
}

fn mailbox(text: &str) -> Mailbox {
    Mailbox::parse(text, Charset::Utf8).unwrap()
}

fn rcpt(text: &str) -> Rcpt {
    let path = ForwardPath::parse(text, Charset::Utf8).unwrap();
    Rcpt { path, notify: Notify::Unsaid, orcpt: None }
}

pub(super) fn envelope(n: u128) -> Envelope {
    Envelope {
        kind: Kind::Mail,
        id: id(n),
        accepted: UnixMillis(1_000),
        reverse_path: ReversePath::Mailbox(mailbox("app@example.com")),
        rcpts: vec![rcpt("a@example.com"), rcpt("b@example.com")],
        smtputf8: false,
        eight_bit: false,
        ret: None,
        envid: None,
        size: 5,
        client: Client { address: "127.0.0.1".into(), helo: "app".into() },
        priority: Priority::Normal,
        author: None,
        prepend: Bytes::new(),
    }
}

fn put(n: u128, body: &[u8]) -> Op {
    Op::Put { envelope: envelope(n), body: Staged::Memory(body.to_vec()) }
}

fn progress(attempts: u16) -> Progress {
    Progress { attempts, ..Progress::new(UnixMillis(7_000), 2) }
}

fn update(n: u128, attempts: u16) -> Op {
    Op::Update { id: id(n), progress: progress(attempts) }
}

fn done(n: u128) -> Op {
    Op::Done { id: id(n) }
}

async fn stage(log: &Log, content: &[u8]) -> Staged {
    let mut stage = log.stage();
    for chunk in content.chunks(100_000) {
        stage.write(chunk).await.unwrap();
    }
    stage.finish().await.unwrap()
}

async fn read_all(body: &Body) -> io::Result<Vec<u8>> {
    let mut reader = body.reader();
    let mut all = Vec::new();
    while let Some(chunk) = reader.chunk().await? {
        all.extend_from_slice(&chunk);
    }
    Ok(all)
}

async fn body(log: &Log, n: u128) -> Vec<u8> {
    read_all(&log.open(id(n)).await.unwrap().body).await.unwrap()
}

fn ids(log: &Log) -> Vec<u128> {
    log.heads(None, usize::MAX).iter().map(|head| head.id.as_u128()).collect()
}

async fn durable(log: &Log, ops: Vec<Op>) {
    log.apply(ops, Durability::Durable).await.unwrap();
}

async fn until(mut holds: impl FnMut() -> bool) {
    for _ in 0..2_000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it did not come to be within 10 s");
}

/// A generator that gives the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

#[tokio::test]
async fn a_message_comes_back_to_the_octet_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let full = Envelope {
        reverse_path: ReversePath::Mailbox(mailbox("\"jörg x\"@bücher.example")),
        rcpts: vec![
            Rcpt {
                notify: Notify::On { success: true, failure: false, delay: true },
                orcpt: Some("rfc822;a+2Bb@example.com".into()),
                ..rcpt("a@example.com")
            },
            Rcpt { notify: Notify::Never, ..rcpt("PostMaster") },
            Rcpt {
                notify: Notify::On { success: false, failure: false, delay: false },
                ..rcpt("\"q\\\"\"@[192.0.2.1]")
            },
            rcpt("d@example.com"),
        ],
        smtputf8: true,
        eight_bit: true,
        ret: Some(Ret::Headers),
        envid: Some("a+2Bb".into()),
        client: Client { address: "unix".into(), helo: "he\\lo \"x\"".into() },
        priority: Priority::High,
        author: Some(mailbox("author@example.com")),
        prepend: Bytes::from_static(b"Received: from \xff\r\n"),
        ..envelope(1)
    };
    let plain = Envelope {
        reverse_path: ReversePath::Null,
        ret: Some(Ret::Full),
        prepend: Bytes::from_static(b"Received: x\r\n"),
        ..envelope(2)
    };
    let cause = Cause {
        status: Some(EnhancedStatus(4, 7, 999)),
        retry_after: Some(Duration::new(30, 5)),
        maybe_sent: true,
        ..Cause::new(Scope::Sender, outcome::Stage::EndOfData, "")
    };
    let words = |bytes: &[u8]| outcome::Words::from(bytes);
    let progress = Progress {
        attempts: 3,
        due: UnixMillis(99),
        first_deferral: Some(UnixMillis(77)),
        rcpts: vec![
            RcptStatus::Pending { last: None },
            RcptStatus::Pending {
                last: Some(Cause { words: words(b"451 \xff\x00 no\r"), ..cause.clone() }),
            },
            RcptStatus::Delivered(Receipt::new(words("250 ok \u{2028}".as_bytes()))),
            RcptStatus::Failed(Cause { words: words(b"550 \xc3"), ..cause }),
        ],
        sending: vec![0, 1],
        doubtful: vec![0],
        untold: vec![1, 2],
        warned: true,
        named: true,
    };
    let content = b"Subject: x\r\n\r\n\x00\xff\r\n".to_vec();
    let (log, report) = open(&dir).await;
    assert_eq!(report, Report::default());
    let (first, second) = (Staged::Memory(content.clone()), Staged::Memory(Vec::new()));
    durable(&log, vec![Op::Put { envelope: full.clone(), body: first }]).await;
    durable(&log, vec![Op::Put { envelope: plain.clone(), body: second }]).await;
    durable(&log, vec![Op::Update { id: id(1), progress: progress.clone() }]).await;
    for _ in 0..2 {
        let (log, report) = match log.heads(None, 9).len() {
            2 => (&log, None),
            n => panic!("{n} messages"),
        };
        assert!(report.is_none_or(|report: Report| report.damaged.is_empty()));
        let stored = log.open(id(1)).await.unwrap();
        assert_eq!(stored.envelope, full);
        assert_eq!(stored.progress, progress);
        assert_eq!(read_all(&stored.body).await.unwrap(), content);
    }
    drop(log);
    let (log, report) = open(&dir).await;
    assert_eq!(report, Report { messages: 2, ..Report::default() });
    let stored = log.open(id(1)).await.unwrap();
    assert_eq!((stored.envelope, stored.progress), (full, progress));
    assert_eq!(read_all(&stored.body).await.unwrap(), content);
    let stored = log.open(id(2)).await.unwrap();
    assert_eq!(stored.progress, Progress::new(plain.accepted, 2));
    assert_eq!(stored.envelope, plain);
    assert!(stored.body.is_empty());
}

#[tokio::test]
async fn every_operation_is_seen_at_once_and_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    durable(&log, (1..=6).map(|n| put(n, b"hello")).collect()).await;
    durable(&log, vec![update(2, 1), update(2, 2), done(5)]).await;
    durable(&log, vec![Op::Hold { id: id(3), progress: progress(1) }]).await;
    durable(&log, vec![Op::Fail { id: id(4), progress: progress(4) }, put(7, b"report")]).await;
    durable(&log, vec![put(8, b"x"), done(8)]).await;
    durable(&log, Vec::new()).await;
    let check = async |log: &Log| {
        let heads = log.heads(None, usize::MAX);
        let seen: Vec<_> =
            heads.iter().map(|h| (h.id.as_u128(), h.state, h.attempts, h.due.0)).collect();
        use QueueState::{Failed, Held, Queued};
        let should = [
            (1, Queued, 0, 1_000),
            (2, Queued, 2, 7_000),
            (3, Held, 1, 7_000),
            (4, Failed, 4, 7_000),
            (6, Queued, 0, 1_000),
            (7, Queued, 0, 1_000),
        ];
        assert_eq!(seen, should);
        assert!(heads.iter().all(|head| head.pending == 2 && head.size == 5));
        assert_eq!(log.heads(Some(id(2)), 2), heads[2..4]);
        assert_eq!(body(log, 4).await, b"hello");
        assert!(matches!(log.open(id(5)).await, Err(SpoolError::Unknown(_))));
    };
    check(&log).await;
    log.close().await;
    let late = log.apply(vec![put(9, b"late")], Durability::Durable).await;
    assert!(matches!(late, Err(SpoolError::Closed)), "{late:?}");
    drop(log);
    let (log, _) = open(&dir).await;
    check(&log).await;
}

#[tokio::test]
async fn operations_on_what_is_not_there_change_nothing() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    durable(&log, vec![put(1, b"one")]).await;
    for ops in [
        vec![put(2, b"two"), update(3, 1)],
        vec![done(1), update(1, 1)],
        vec![put(2, b"two"), done(9)],
    ] {
        let refused = log.apply(ops, Durability::Durable).await;
        assert!(matches!(refused, Err(SpoolError::Unknown(_))), "{refused:?}");
    }
    let twice = log.apply(vec![put(1, b"again")], Durability::Durable).await;
    assert!(matches!(twice, Err(SpoolError::Io(..))), "{twice:?}");
    assert_eq!(ids(&log), [1]);
    assert_eq!(body(&log, 1).await, b"one");
    drop(log);
    assert_eq!(ids(&open(&dir).await.0), [1]);
}

fn attempt(n: u128, attempts: u16, sending: &[u32]) -> Op {
    Op::Attempt {
        id: id(n),
        progress: Progress { sending: sending.to_vec(), ..progress(attempts) },
    }
}

fn note(key: &str, bytes: &[u8]) -> Op {
    Op::Note { key: key.into(), bytes: bytes.to_vec() }
}

#[tokio::test]
async fn an_attempt_that_is_open_at_a_start_is_in_doubt_until_its_outcome_is_written() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let in_doubt = |log: &Log| {
        let heads = log.heads(None, usize::MAX).into_iter().filter(|head| head.in_doubt);
        heads.map(|head| head.id.as_u128()).collect::<Vec<_>>()
    };
    durable(&log, (1..=9).map(|n| put(n, b"hello")).collect()).await;
    durable(&log, (1..=8).map(|n| attempt(n, 1, &[1])).collect()).await;
    assert_eq!(in_doubt(&log), [0; 0], "who began them is alive");
    durable(&log, vec![update(1, 2)]).await;
    log.apply(vec![attempt(9, 1, &[0, 1])], Durability::Lazy).await.unwrap();
    drop(log);
    let (log, report) = open(&dir).await;
    assert_eq!((report.messages, report.in_doubt), (9, 8));
    assert_eq!(in_doubt(&log), [2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(log.open(id(9)).await.unwrap().progress.sending, [0, 1]);
    durable(&log, vec![attempt(2, 2, &[1])]).await;
    assert_eq!(in_doubt(&log)[0], 2, "another attempt settles nothing");
    let (hold, fail) = ([3, 4, 5], [6]);
    durable(&log, hold.map(|n| Op::Hold { id: id(n), progress: progress(2) }).into()).await;
    durable(&log, fail.map(|n| Op::Fail { id: id(n), progress: progress(2) }).into()).await;
    durable(&log, vec![update(2, 3), done(7), Op::Delete { id: id(8) }]).await;
    assert_eq!(in_doubt(&log), [9]);
    let stored = log.open(id(2)).await.unwrap();
    assert_eq!(stored.progress, progress(3));
    drop(log);
    let (log, report) = open(&dir).await;
    assert_eq!((report.messages, report.in_doubt), (7, 1));
    assert_eq!(in_doubt(&log), [9]);
}

#[tokio::test]
async fn what_does_not_fit_the_state_of_a_message_is_refused_and_changes_nothing() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let held = |n| Op::Hold { id: id(n), progress: progress(1) };
    let failed = |n| Op::Fail { id: id(n), progress: progress(1) };
    let requeue = |n| Op::Requeue { id: id(n), progress: progress(2) };
    let release = |n| Op::Release { id: id(n), progress: progress(3) };
    durable(&log, (1..=5).map(|n| put(n, b"hello")).collect()).await;
    durable(&log, vec![held(2), held(3), failed(4), failed(5)]).await;
    for ops in [
        vec![requeue(1)],
        vec![release(1)],
        vec![release(4)],
        vec![attempt(2, 9, &[0])],
        vec![attempt(4, 9, &[0])],
        vec![release(2), release(2)],
        vec![requeue(2), requeue(2)],
        vec![held(1), attempt(1, 9, &[0])],
    ] {
        let text = format!("{ops:?}");
        let refused = log.apply(ops, Durability::Durable).await;
        assert!(matches!(refused, Err(SpoolError::Refused(..))), "{text}: {refused:?}");
    }
    for ops in [vec![requeue(9)], vec![release(9)], vec![Op::Delete { id: id(9) }]] {
        let refused = log.apply(ops, Durability::Durable).await;
        assert!(matches!(refused, Err(SpoolError::Unknown(_))), "{refused:?}");
    }
    let states = |log: &Log| {
        let heads = log.heads(None, usize::MAX).into_iter();
        heads.map(|head| (head.id.as_u128(), head.state, head.attempts)).collect::<Vec<_>>()
    };
    use QueueState::{Failed, Held, Queued};
    let before = [(1, Queued, 0), (2, Held, 1), (3, Held, 1), (4, Failed, 1), (5, Failed, 1)];
    assert_eq!(states(&log), before);
    durable(&log, vec![requeue(2), release(3), requeue(4), Op::Delete { id: id(5) }]).await;
    durable(&log, vec![held(1), release(1), attempt(1, 4, &[0]), update(1, 5)]).await;
    let after = [(1, Queued, 5), (2, Queued, 2), (3, Queued, 3), (4, Queued, 2)];
    assert_eq!(states(&log), after);
    drop(log);
    assert_eq!(states(&open(&dir).await.0), after);
}

#[tokio::test]
async fn an_outcome_does_not_undo_a_hold_not_even_when_the_record_of_that_is_gone() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    durable(&log, vec![put(1, b"hello"), Op::Hold { id: id(1), progress: progress(1) }]).await;
    durable(&log, vec![update(1, 2)]).await;
    let states = |log: &Log| log.heads(None, 9).iter().map(|h| h.state).collect::<Vec<_>>();
    assert_eq!(states(&log), [QueueState::Held]);
    let attempt = log.apply(vec![attempt(1, 3, &[0])], Durability::Durable).await;
    assert!(matches!(attempt, Err(SpoolError::Refused(..))), "{attempt:?}");
    let place = lock(&log.shared.index).get(id(1)).unwrap().progress.unwrap();
    let record = log.shared.files().record_again(id(1), place, false).unwrap();
    assert!(matches!(record.change, record::Change::Progress { step: record::Step::Hold, .. }));
    drop(log);
    let (log, _) = open(&dir).await;
    assert_eq!((states(&log), log.heads(None, 9)[0].attempts), (vec![QueueState::Held], 2));
}

#[tokio::test]
async fn the_last_value_of_a_note_is_there_until_it_is_taken_away() {
    let dir = TempDir::new().unwrap();
    let disk = TestDisk::new();
    let (log, _) = open_on(&disk, &dir).await;
    let largest = vec![0xff; 64 * 1024];
    let longest = "a-z/0_9.@+".repeat(6) + "abcd";
    assert_eq!(log.note("budget/a@example.com"), None);
    durable(&log, vec![note("budget/a@example.com", b"1"), note("x", b"x")]).await;
    durable(&log, vec![note("budget/a@example.com", b"2"), note(&longest, &largest)]).await;
    log.apply(vec![note("budget/a@example.com", b"3")], Durability::Lazy).await.unwrap();
    durable(&log, vec![note("x", b""), note("never", b"")]).await;
    log.apply(vec![note("lazy", b"yes")], Durability::Lazy).await.unwrap();
    // What was written lazily is written again in the next segment.
    disk.fail_next_syncs(1, EIO);
    log.apply(vec![put(1, b"one")], Durability::Durable).await.unwrap_err();
    disk.heal();
    until(|| log.health().trouble.is_none()).await;
    let check = |log: &Log| {
        assert_eq!(log.note("budget/a@example.com").unwrap(), b"3");
        assert_eq!(log.note("lazy").unwrap(), b"yes");
        assert_eq!(log.note(&longest).unwrap(), largest);
        assert_eq!((log.note("x"), log.note("never")), (None, None));
        assert_eq!(ids(log), [0; 0]);
    };
    check(&log);
    check(&open(&snapshot(&dir)).await.0);
    drop(log);
    let (log, report) = open(&dir).await;
    assert_eq!(report, Report::default());
    check(&log);
}

#[tokio::test]
async fn a_note_out_of_bounds_is_refused() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let unfit = async |ops: Vec<Op>| {
        let refused = log.apply(ops, Durability::Lazy).await;
        assert!(matches!(refused, Err(SpoolError::Unfit(..))), "{refused:?}");
    };
    for key in ["", "A", "a b", "\u{e4}", "a:b", &"k".repeat(65)] {
        unfit(vec![put(1, b"one"), note(key, b"x")]).await;
    }
    unfit(vec![note("k", &[0; 64 * 1024 + 1])]).await;
    let many = (0..4_096).map(|n| note(&format!("n{n}"), b"x"));
    unfit(many.clone().chain([note("one-more", b"x")]).collect()).await;
    durable(&log, many.collect()).await;
    unfit(vec![put(1, b"one"), note("one-more", b"x")]).await;
    unfit(vec![note("n7", b"y"), note("one-more", b"x")]).await;
    durable(&log, vec![note("n7", b"y"), note("n8", b""), note("one-more", b"x")]).await;
    assert_eq!(log.note("n7").unwrap(), b"y");
    assert_eq!(log.note("n8"), None);
    assert_eq!(ids(&log), [0; 0]);
}

#[tokio::test]
async fn a_large_content_has_a_file_of_its_own_until_it_is_done() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let content: Vec<u8> = (0..3_000_017_u32).map(|n| n.to_le_bytes()[(n % 3) as usize]).collect();
    let staged = stage(&log, &content).await;
    assert_eq!(staged.len(), content.len() as u64);
    assert_eq!((files(&dir, "bodies").len(), files(&dir, "tmp").len()), (1, 0));
    durable(&log, vec![Op::Put { envelope: envelope(1), body: staged }]).await;
    assert_eq!(body(&log, 1).await, content);
    assert!(log.health().used > content.len() as u64);
    drop(log);
    let (log, report) = open(&dir).await;
    assert_eq!(report, Report { messages: 1, ..Report::default() });
    let stored = log.open(id(1)).await.unwrap();
    log.apply(vec![done(1)], Durability::Lazy).await.unwrap();
    until(|| files(&dir, "bodies").is_empty()).await;
    assert_eq!(read_all(&stored.body).await.unwrap(), content, "an attempt under way goes on");
    until(|| log.health().used < 10_000).await;
}

#[tokio::test]
async fn a_content_that_is_not_put_leaves_no_file() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let large = vec![b'x'; 2_000_000];
    let mut unfinished = log.stage();
    unfinished.write(&large).await.unwrap();
    assert_eq!(files(&dir, "tmp").len(), 1);
    drop(unfinished);
    until(|| files(&dir, "tmp").is_empty()).await;
    let unused = stage(&log, &large).await;
    assert_eq!(files(&dir, "bodies").len(), 1);
    drop(unused);
    until(|| files(&dir, "bodies").is_empty()).await;
    let refused = Op::Put { envelope: envelope(1), body: stage(&log, &large).await };
    assert!(log.apply(vec![refused, done(7)], Durability::Durable).await.is_err());
    until(|| files(&dir, "bodies").is_empty()).await;

    let mut unfinished = log.stage();
    unfinished.write(&large).await.unwrap();
    let unused = stage(&log, &large).await;
    let killed = snapshot(&dir);
    assert_eq!((files(&killed, "bodies").len(), files(&killed, "tmp").len()), (1, 1));
    let (_log, report) = open(&killed).await;
    assert_eq!(report, Report { strays: 2, ..Report::default() });
    assert!(files(&killed, "bodies").is_empty() && files(&killed, "tmp").is_empty());
    drop(unused);
}

#[tokio::test]
async fn when_memory_is_crowded_smaller_contents_go_to_files_too() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let mut stages = Vec::new();
    for _ in 0..33 {
        let mut stage = log.stage();
        stage.write(&vec![b'x'; 1_048_576]).await.unwrap();
        stages.push(stage);
    }
    assert!(matches!(stage(&log, &[b'x'; 70_000]).await, Staged::File(_)));
    assert!(matches!(stage(&log, &[b'x'; 60_000]).await, Staged::Memory(_)));
    drop(stages);
    assert!(matches!(stage(&log, &[b'x'; 70_000]).await, Staged::Memory(_)));
}

#[tokio::test]
async fn a_side_file_that_is_lost_or_changed_is_reported_and_never_sent() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let content = vec![b'x'; 2_000_000];
    for n in 1..=3 {
        let body = stage(&log, &content).await;
        durable(&log, vec![Op::Put { envelope: envelope(n), body }]).await;
    }
    durable(&log, vec![put(4, b"small")]).await;
    drop(log);
    let name = |n: usize| files(&dir, "bodies")[n].clone();
    let (lost, short, flipped) = (name(0), name(1), name(2));
    fs::remove_file(lost).unwrap();
    File::options().write(true).open(short).unwrap().set_len(1_999_999).unwrap();
    File::options().write(true).open(flipped).unwrap().write_all_at(b"y", 1_000_000).unwrap();
    let (log, report) = open(&dir).await;
    assert_eq!(report.messages, 4);
    assert_eq!(report.damaged.len(), 2, "{report:?}");
    for n in [1, 2] {
        let opened = log.open(id(n)).await;
        assert!(matches!(opened, Err(SpoolError::Damaged(..))), "{opened:?}");
    }
    let stored = log.open(id(3)).await.unwrap();
    assert_eq!(read_all(&stored.body).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    assert_eq!(body(&log, 4).await, b"small");
}

/// Three batches, and a last one whose first octet is returned.
async fn four_batches(dir: &TempDir) -> (PathBuf, usize) {
    let (log, _) = open(dir).await;
    let segment = files(dir, "log").pop().unwrap();
    durable(&log, vec![put(1, b"one"), put(2, b"two")]).await;
    durable(&log, vec![put(3, b"three")]).await;
    durable(&log, vec![done(2), update(1, 1)]).await;
    let start = fs::metadata(&segment).unwrap().len();
    durable(&log, vec![put(4, b"four"), done(3), put(5, &[b'5'; 40])]).await;
    (segment, usize::try_from(start).unwrap())
}

#[tokio::test]
async fn a_batch_cut_anywhere_counts_whole_or_not_at_all() {
    let dir = TempDir::new().unwrap();
    let (segment, start) = four_batches(&dir).await;
    let whole = fs::read(&segment).unwrap();
    let padding = 15;
    for cut in start..=whole.len() {
        for zeros in [false, true] {
            let mut bytes = whole[..cut].to_vec();
            if zeros {
                bytes.resize(whole.len() + 100, 0);
            }
            fs::write(&segment, &bytes).unwrap();
            let killed = snapshot(&dir);
            let (log, report) = open(&killed).await;
            let is_whole = whole[cut..].iter().all(|b| *b == 0) && (zeros || cut == whole.len());
            match is_whole || ids(&log) == [1, 4, 5] {
                true => {
                    assert_eq!(ids(&log), [1, 4, 5], "cut at {cut}");
                    assert!(cut + padding >= whole.len(), "cut at {cut}");
                }
                false => assert_eq!(ids(&log), [1, 3], "cut at {cut}"),
            }
            assert!(report.damaged.is_empty(), "cut at {cut}: {report:?}");
            // From the number of the segment on it is plain whose record that was to be.
            let number = start..start + 24;
            let is_named = bytes.get(number.clone()) == whole.get(number);
            let has_part = ids(&log) == [1, 3] && is_named;
            assert_eq!(report.torn, has_part, "cut at {cut}");
            // What comes after is not hidden, and the torn batch stays dead.
            durable(&log, vec![put(9, b"nine")]).await;
            let before = ids(&log);
            drop(log);
            let (log, report) = open(&killed).await;
            assert_eq!((ids(&log), report.damaged), (before, Vec::new()), "cut at {cut}");
            assert_eq!(body(&log, 9).await, b"nine");
        }
    }
}

#[tokio::test]
async fn a_torn_batch_that_becomes_readable_later_stays_dropped() {
    let dir = TempDir::new().unwrap();
    let (segment, start) = four_batches(&dir).await;
    let whole = fs::read(&segment).unwrap();
    fs::write(&segment, &whole[..start + 60]).unwrap();
    let (log, _) = open(&dir).await;
    durable(&log, vec![put(9, b"nine")]).await;
    drop(log);
    fs::write(&segment, &whole).unwrap();
    let (log, report) = open(&dir).await;
    assert_eq!((ids(&log), report.damaged), (vec![1, 3, 9], Vec::new()));
}

#[tokio::test]
async fn damage_in_the_middle_costs_only_its_batch_and_is_reported() {
    let dir = TempDir::new().unwrap();
    let (segment, _) = four_batches(&dir).await;
    let whole = fs::read(&segment).unwrap();
    let third = whole.windows(5).position(|w| w == b"three").unwrap();
    let flips: [(usize, usize, &[u128]); 4] = [
        // Batch 2, batch 1, a hole over both, the header of the segment.
        (third, third + 1, &[1, 4, 5]),
        (100, 101, &[4, 5]),
        (100, third + 1, &[4, 5]),
        (20, 21, &[1, 4, 5]),
    ];
    for (from, to, left) in flips {
        let mut bytes = whole.clone();
        bytes[from..to].iter_mut().for_each(|b| *b ^= 0x40);
        fs::write(&segment, &bytes).unwrap();
        let damaged = snapshot(&dir);
        let (log, report) = open(&damaged).await;
        assert_eq!(ids(&log), left, "{from}");
        assert_eq!(report.damaged.len(), 1, "{report:?}");
        assert!(!report.torn, "{report:?}");
        let aside = files(&damaged, "damaged");
        assert_eq!(fs::read(&aside[0]).unwrap(), bytes);
        // All else is done: the segment leaves the log, what was put aside stays.
        durable(&log, left.iter().map(|n| done(*n)).collect()).await;
        until(|| files(&damaged, "log").len() == 1).await;
        drop(log);
        let (log, report) = open(&damaged).await;
        assert_eq!((ids(&log).len(), report.damaged), (0, Vec::new()));
        assert_eq!(fs::read(&aside[0]).unwrap(), bytes);
    }
}

#[tokio::test]
async fn a_damaged_segment_that_was_put_aside_is_never_written_over() {
    let dir = TempDir::new().unwrap();
    let geometry = Geometry { segment: 4_096, idle: 256, fresh: 0, ..Geometry::default() };
    let config = at(dir.path());
    let open = || Log::open_on(TestDisk::new(), &config, geometry);
    let (log, _) = open().await.unwrap();
    let segment = segments(&dir).pop().unwrap();
    durable(&log, vec![put(1, b"one")]).await;
    durable(&log, vec![put(2, b"two")]).await;
    drop(log);
    let mut bytes = fs::read(&segment).unwrap();
    bytes[200] ^= 1;
    fs::write(&segment, &bytes).unwrap();
    let (log, report) = open().await.unwrap();
    assert_eq!((ids(&log), report.damaged.len()), (vec![2], 1));
    durable(&log, vec![done(2)]).await;
    for n in 10..200 {
        durable(&log, vec![put(n, &[b'x'; 500])]).await;
        durable(&log, vec![done(n)]).await;
    }
    assert!(!segment.exists());
    let aside = &files(&dir, "damaged")[0];
    assert_eq!(fs::read(aside).unwrap(), bytes);
    // Nor will it be: it is none of the spares.
    let ino = |path: &PathBuf| fs::metadata(path).unwrap().ino();
    assert!(files(&dir, "log").iter().all(|file| ino(file) != ino(aside)));
}

#[tokio::test]
async fn a_torn_batch_still_proves_that_the_one_before_was_synced() {
    let dir = TempDir::new().unwrap();
    let (segment, start) = four_batches(&dir).await;
    let mut bytes = fs::read(&segment).unwrap();
    let number = segment::parse_name(segment.file_name().unwrap().to_str().unwrap()).unwrap();
    let first = record::decode(&bytes[start..], start as u64, number, None).unwrap();
    let cut = start + first.len_on_disk() + 20;
    bytes.truncate(cut);
    bytes[start - 40] ^= 1;
    fs::write(&segment, &bytes).unwrap();
    let (log, report) = open(&dir).await;
    assert_eq!((ids(&log), report.damaged.len(), report.torn), (vec![1, 2, 3], 1, true));
}

#[tokio::test]
async fn the_lost_end_of_a_segment_that_was_followed_is_damage() {
    let dir = TempDir::new().unwrap();
    let (segment, start) = four_batches(&dir).await;
    let (log, _) = open(&dir).await;
    durable(&log, vec![put(9, b"nine")]).await;
    drop(log);
    File::options().write(true).open(&segment).unwrap().set_len(start as u64 + 70).unwrap();
    let (log, report) = open(&dir).await;
    assert_eq!(ids(&log), [1, 3, 9]);
    assert_eq!(report.damaged.len(), 1, "{report:?}");
    drop(log);
    fs::remove_file(&segment).unwrap();
    let (log, _) = open(&dir).await;
    assert_eq!(ids(&log), [9]);
}

#[tokio::test]
async fn with_damage_about_side_files_without_a_record_are_kept() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let segment = files(&dir, "log").pop().unwrap();
    let body = stage(&log, &vec![b'x'; 2_000_000]).await;
    durable(&log, vec![Op::Put { envelope: envelope(1), body }]).await;
    durable(&log, vec![put(2, b"two")]).await;
    drop(log);
    File::options().write(true).open(&segment).unwrap().write_all_at(b"!!", 150).unwrap();
    let (log, report) = open(&dir).await;
    assert_eq!((ids(&log), report.damaged.len()), (vec![2], 1));
    assert!(files(&dir, "bodies").is_empty());
    assert_eq!(files(&dir, "damaged").len(), 2);
}

#[tokio::test]
async fn a_content_that_is_a_copy_of_a_segment_is_no_record() {
    let dir = TempDir::new().unwrap();
    let (segment, start) = four_batches(&dir).await;
    let (log, _) = open(&dir).await;
    let mut bytes = fs::read(&segment).unwrap();
    let inner = files(&dir, "log").pop().unwrap();
    durable(&log, vec![put(6, b"six")]).await;
    bytes.extend_from_slice(&fs::read(&inner).unwrap());
    let at = fs::metadata(&inner).unwrap().len();
    durable(&log, vec![put(7, &bytes)]).await;
    durable(&log, vec![put(8, b"eight")]).await;
    durable(&log, vec![done(6)]).await;
    drop(log);
    assert!(start > 0);
    // The record around it is damaged, so that the scan goes through the content.
    File::options().write(true).open(&inner).unwrap().write_all_at(b"!!", at + 50).unwrap();
    let (log, report) = open(&dir).await;
    assert_eq!(ids(&log), [1, 4, 5, 8]);
    assert_eq!(report.damaged.len(), 1, "{report:?}");
}

#[tokio::test]
async fn lazy_operations_survive_a_kill_and_are_synced_soon() {
    let dir = TempDir::new().unwrap();
    let disk = TestDisk::new();
    let (log, _) = open_on(&disk, &dir).await;
    durable(&log, vec![put(1, b"one"), put(2, b"two")]).await;
    let syncs = disk.syncs.load(Ordering::SeqCst);
    disk.set_gate(true);
    log.apply(vec![done(1)], Durability::Lazy).await.unwrap();
    log.apply(vec![update(2, 1)], Durability::Lazy).await.unwrap();
    let killed = snapshot(&dir);
    disk.set_gate(false);
    until(|| disk.syncs.load(Ordering::SeqCst) > syncs).await;
    let (log, report) = open(&killed).await;
    assert_eq!((ids(&log), report.damaged, report.torn), (vec![2], Vec::new(), false));
    assert_eq!(log.heads(None, 1)[0].attempts, 1);
}

#[tokio::test]
async fn an_unsynced_lazy_batch_that_is_lost_is_no_damage() {
    let dir = TempDir::new().unwrap();
    let disk = TestDisk::new();
    let (log, _) = open_on(&disk, &dir).await;
    let segment = files(&dir, "log").pop().unwrap();
    durable(&log, vec![put(1, b"one"), put(2, b"two")]).await;
    let start = fs::metadata(&segment).unwrap().len();
    disk.set_gate(true);
    log.apply(vec![done(1)], Durability::Lazy).await.unwrap();
    let refused = {
        let last = log.apply(vec![put(3, b"three")], Durability::Durable);
        tokio::pin!(last);
        let waiting = tokio::time::timeout(Duration::from_millis(1), &mut last).await;
        assert!(waiting.is_err());
        until(|| fs::metadata(&segment).unwrap().len() > start + 64).await;
        let cut = snapshot(&dir);
        disk.set_gate(false);
        last.await.unwrap();
        cut
    };
    // The power cut took the lazy batch, and left the one behind it, which was never answered.
    let path = files(&refused, "log").pop().unwrap();
    File::options().write(true).open(path).unwrap().write_all_at(&[0; 64], start).unwrap();
    let (log, report) = open(&refused).await;
    assert_eq!((ids(&log), report.damaged, report.torn), (vec![1, 2], Vec::new(), true));
}

#[tokio::test]
async fn a_batch_whose_sync_failed_does_not_come_to_life() {
    for times in [1, 2, 1_000] {
        let dir = TempDir::new().unwrap();
        let disk = TestDisk::new();
        let (log, _) = open_on(&disk, &dir).await;
        durable(&log, vec![put(1, b"one")]).await;
        log.apply(vec![put(2, b"lazy"), update(1, 7)], Durability::Lazy).await.unwrap();
        disk.fail_next_syncs(times, EIO);
        let refused = log.apply(vec![put(3, b"refused")], Durability::Durable).await;
        assert!(matches!(refused, Err(SpoolError::Io(..))), "{refused:?}");
        assert_eq!(ids(&log), [1, 2]);
        let killed = snapshot(&dir);
        assert_eq!(ids(&open(&killed).await.0), [1, 2], "killed after {times}");
        disk.heal();
        until(|| log.health().trouble.is_none()).await;
        assert_eq!(body(&log, 2).await, b"lazy");
        durable(&log, vec![put(4, b"four")]).await;
        log.close().await;
        drop(log);
        let (log, report) = open(&dir).await;
        assert_eq!((ids(&log), report.damaged), (vec![1, 2, 4], Vec::new()), "{times}");
        assert_eq!(body(&log, 2).await, b"lazy");
        assert_eq!(log.heads(None, 1)[0].attempts, 7);
    }
}

#[tokio::test]
async fn a_trouble_is_shown_refuses_everything_and_ends_by_itself() {
    let dir = TempDir::new().unwrap();
    let disk = TestDisk::new();
    let (log, _) = open_on(&disk, &dir).await;
    durable(&log, vec![put(1, b"one")]).await;
    disk.fail_next(u64::MAX, ENOSPC);
    let refused = log.apply(vec![put(2, b"two")], Durability::Durable).await;
    assert!(matches!(refused, Err(SpoolError::Full)), "{refused:?}");
    let trouble = log.health().trouble.unwrap();
    assert!(trouble.contains("No space left"), "{trouble}");
    assert!(matches!(log.trouble(), Some(SpoolError::Full)));
    let before = disk.count.load(Ordering::SeqCst);
    let refused = log.apply(vec![done(1)], Durability::Durable).await;
    assert!(matches!(refused, Err(SpoolError::Full)), "{refused:?}");
    assert_eq!(disk.count.load(Ordering::SeqCst), before, "the disk is not tried again at once");
    disk.heal();
    until(|| log.health().trouble.is_none()).await;
    assert!(log.trouble().is_none());
    durable(&log, vec![put(3, b"three"), done(1)]).await;
    assert_eq!(ids(&log), [3]);
    drop(log);
    let (log, report) = open(&dir).await;
    assert_eq!((ids(&log), report.damaged), (vec![3], Vec::new()));
}

/// Puts, changes and ends messages; returns what was answered `Ok` or was not.
async fn script(log: &Log) -> Vec<(u128, bool)> {
    let mut answers = Vec::new();
    for n in 1..=3 {
        let put = log.apply(vec![put(n, b"small")], Durability::Durable).await;
        answers.push((n, put.is_ok()));
    }
    let large = async {
        let mut stage = log.stage();
        stage.write(&vec![b'L'; 1_100_000]).await?;
        let body = stage.finish().await?;
        log.apply(vec![Op::Put { envelope: envelope(4), body }], Durability::Durable).await
    };
    answers.push((4, large.await.is_ok()));
    let lazy = log.apply(vec![put(5, b"lazy")], Durability::Lazy).await;
    answers.push((5, lazy.is_ok()));
    let done = log.apply(vec![done(1), put(6, b"report of 1")], Durability::Durable).await;
    answers.push((6, done.is_ok()));
    answers
}

#[tokio::test]
async fn whatever_operation_fails_an_ok_is_kept_and_an_error_leaves_nothing() {
    let mut from = 0;
    loop {
        let errno = if from % 2 == 0 { ENOSPC } else { EIO };
        let dir = TempDir::new().unwrap();
        let disk = TestDisk::new();
        disk.fail(from, 1, errno);
        let opened =
            Log::open_on(Arc::clone(&disk) as Arc<dyn Disk>, &at(dir.path()), Geometry::default())
                .await;
        let Ok((log, _)) = opened else {
            from += 1;
            continue;
        };
        let answers = script(&log).await;
        let killed = snapshot(&dir);
        let used = disk.count.load(Ordering::SeqCst);
        log.close().await;
        drop(log);
        for dir in [&killed, &dir] {
            let (log, report) = open(dir).await;
            let now = ids(&log);
            for (n, is_ok) in &answers {
                assert_eq!(now.contains(n), *is_ok && (*n != 1 || !answers[5].1), "{n}, {from}");
            }
            assert_eq!(report.damaged, Vec::<String>::new(), "{from}");
            for n in now {
                let content = body(&log, n).await;
                assert!(content.len() == 1_100_000 || content.len() < 20);
            }
        }
        from += 1;
        if from > used {
            break;
        }
    }
    assert!(from > 20, "{from}");
}

#[tokio::test]
async fn when_the_disk_fails_for_good_every_ok_is_kept() {
    for from in 5..40 {
        let dir = TempDir::new().unwrap();
        let disk = TestDisk::new();
        disk.fail(from, u64::MAX, EIO);
        let opened =
            Log::open_on(Arc::clone(&disk) as Arc<dyn Disk>, &at(dir.path()), Geometry::default())
                .await;
        let Ok((log, _)) = opened else { continue };
        let answers = script(&log).await;
        drop(log);
        let (log, report) = open(&dir).await;
        let now = ids(&log);
        for (n, is_ok) in &answers {
            assert!(!is_ok || now.contains(n) || (*n == 1 && now.contains(&6)), "{n}, {from}");
        }
        assert!(report.damaged.len() <= 1, "{report:?}");
    }
}

#[tokio::test]
async fn below_the_floor_nothing_is_put_but_all_else_goes_on() {
    let dir = TempDir::new().unwrap();
    let disk = TestDisk::new();
    let (log, _) = open_on(&disk, &dir).await;
    durable(&log, vec![put(1, b"one"), put(2, b"two")]).await;
    assert!(log.has_room_for(5_000_000));
    disk.free.store(999_999, Ordering::SeqCst);
    until(|| !log.has_room_for(0)).await;
    let refused = log.apply(vec![put(3, b"three")], Durability::Durable).await;
    assert!(matches!(refused, Err(SpoolError::Full)), "{refused:?}");
    let refused = log.stage().write(b"x").await;
    assert!(matches!(refused, Err(SpoolError::Full)), "{refused:?}");
    durable(&log, vec![update(1, 1), done(2)]).await;
    assert_eq!(log.health().free, 999_999);
    disk.free.store(1_500_000, Ordering::SeqCst);
    until(|| log.has_room_for(500_000)).await;
    assert!(!log.has_room_for(500_001));
    let mut stage = log.stage();
    stage.write(&[0; 400_000]).await.unwrap();
    assert!(!log.has_room_for(100_001) && log.has_room_for(100_000));
    drop(stage);
    assert!(log.has_room_for(500_000));
}

#[tokio::test]
async fn where_an_overwrite_takes_space_the_floor_is_twice_as_high() {
    let dir = TempDir::new().unwrap();
    let disk = TestDisk::new();
    disk.copies.store(true, Ordering::SeqCst);
    disk.free.store(2_100_000, Ordering::SeqCst);
    let config = at(dir.path());
    let opened = Log::open_on(Arc::clone(&disk) as Arc<dyn Disk>, &config, Geometry::default());
    let (log, report) = opened.await.unwrap();
    assert!(report.is_copy_on_write);
    assert!(log.has_room_for(100_000) && !log.has_room_for(100_001));
}

#[tokio::test]
async fn applies_that_come_together_share_a_sync() {
    let dir = TempDir::new().unwrap();
    let disk = TestDisk::new();
    let (log, _) = open_on(&disk, &dir).await;
    let log = Arc::new(log);
    let before = disk.syncs.load(Ordering::SeqCst);
    disk.set_gate(true);
    let mut tasks = tokio::task::JoinSet::new();
    for n in 1..=64 {
        let log = Arc::clone(&log);
        tasks.spawn(async move { durable(&log, vec![put(n, b"hello")]).await });
    }
    until(|| disk.syncs.load(Ordering::SeqCst) > before).await;
    assert!(ids(&log).is_empty(), "nothing counts before it is synced");
    disk.set_gate(false);
    tasks.join_all().await;
    assert_eq!(ids(&log).len(), 64);
    let syncs = disk.syncs.load(Ordering::SeqCst) - before;
    assert!(syncs <= 3, "{syncs} syncs");
}

#[tokio::test]
async fn nobody_waits_for_a_writer_that_has_died() {
    let dir = TempDir::new().unwrap();
    let disk = TestDisk::new();
    let (log, _) = open_on(&disk, &dir).await;
    disk.dies.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        let refused = log.apply(vec![put(1, b"one")], Durability::Durable).await;
        assert!(matches!(refused, Err(SpoolError::Closed)), "{refused:?}");
    }
    assert!(log.health().trouble.is_some());
    disk.dies.store(false, Ordering::SeqCst);
    log.close().await;
    drop(log);
    assert!(ids(&open(&dir).await.0).is_empty());
}

#[tokio::test]
async fn a_second_daemon_is_told_who_has_the_spool() {
    let dir = TempDir::new().unwrap();
    let (log, _) = Log::open(&at(dir.path())).await.unwrap();
    let second = Log::open(&at(dir.path())).await.unwrap_err();
    let pid = std::process::id().to_string();
    assert!(matches!(&second, OpenError::Locked { holder, .. } if *holder == pid), "{second}");
    log.close().await;
    Log::open(&at(dir.path())).await.unwrap();
}

#[tokio::test]
async fn whatever_a_lock_says_it_is_told_that_it_is_held() {
    let dir = TempDir::new().unwrap();
    let (log, _) = Log::open(&at(dir.path())).await.unwrap();
    let long = [b'9'; 1000];
    let path = dir.path().join("spool");
    for (content, says) in [
        (&b""[..], "another process".to_owned()),
        (b"\xff\xfe\n", "another process".to_owned()),
        (b"\x1b[31m12\xff\n", "process [31m12".to_owned()),
        (&long, format!("process {}", "9".repeat(64))),
    ] {
        fs::write(path.join("lock"), content).unwrap();
        let text = Log::open(&at(dir.path())).await.unwrap_err().to_string();
        let start = format!("the spool {} is in use by {says}: ", path.display());
        assert_eq!(text, format!("{start}stop it, or give this one another spool.path"));
        let text = inspect::Inspection::open(&path).unwrap_err().to_string();
        assert!(text.starts_with(&start) && text.ends_with("stop it first"), "{text}");
    }
    log.close().await;
}

#[test]
fn an_index_tells_what_counts_at_the_end_of_a_segment() {
    let memory = |n| Record::put(&envelope(n), b"hello".to_vec());
    let in_file = || {
        let file = side_file::FileRef { name: "a-file".into(), len: 7, crc32c: 1 };
        Record::put_file(&envelope(3), file)
    };
    let note = || Record::note("key".into(), b"value".to_vec()).unwrap();
    let records = [
        memory(1),
        Record::update(id(1), &progress(2)),
        in_file(),
        note(),
        Record::done(id(1)),
        memory(1),
        Record::fail(id(1), &progress(3)),
        Record::filed(id(9), UnixMillis(5), 6),
        Record::delete(id(8)),
    ];
    let stamp = record::Stamp { key: 1, segment: 2, batch: 3, unsynced: 0 };
    let mut octets = Vec::new();
    let places = record::encode_batch(&mut octets, 64, &stamp, &records.each_ref());
    let mut summary = record::Summary::default();
    records.iter().zip(&places).for_each(|(record, place)| summary.add(record, *place));
    let index = Record::index(&summary);
    let mut octets = Vec::new();
    record::encode_batch(&mut octets, 4096, &stamp, &[&index]);
    let found = record::decode(&octets, 4096, 2, Some(1)).unwrap();
    let told: Vec<_> = found.summary().unwrap().collect();
    // The first two are done with before the end.
    assert_eq!(told.iter().map(|(place, _)| *place).collect::<Vec<_>>(), places[2..]);
    for ((_, told), record) in told.iter().zip(&records[2..]) {
        match told {
            record::Told::Change(id, change) => {
                assert_eq!((*id, change), (record.id, &record.change));
            }
            record::Told::Unread => {
                let is_long = matches!(
                    record.change,
                    record::Change::Note { .. } | record::Change::Put { file: Some(_), .. }
                );
                assert!(is_long, "{record:?}");
            }
        }
    }
}

#[tokio::test]
async fn the_format_of_another_version_is_refused() {
    let dir = TempDir::new().unwrap();
    drop(open(&dir).await);
    let path = files(&dir, "log").pop().unwrap();
    let header = segment::Header::decode(&fs::read(&path).unwrap()).unwrap();
    for (version, says) in [(segment::VERSION + 1, "a later"), (segment::VERSION - 1, "an earlier")]
    {
        fs::write(&path, segment::Header { version, ..header }.encode()).unwrap();
        let refused = Log::open(&at(dir.path())).await.unwrap_err().to_string();
        let says = format!("was written by {says} version of the program: its format is {version}");
        assert!(refused.contains(&says), "{refused}");
        assert_eq!(files(&dir, "log").len(), 1);
    }
}

#[tokio::test]
async fn nobody_else_can_read_the_spool() {
    let dir = TempDir::new().unwrap();
    fs::create_dir(dir.path().join("spool")).unwrap();
    let (log, _) = Log::open(&at(dir.path())).await.unwrap();
    durable(&log, vec![put(1, b"one")]).await;
    let _staged = stage(&log, &vec![b'x'; 2_000_000]).await;
    let check = |path: &Path, mode: u32| {
        let found = fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(found, mode, "{}", path.display());
    };
    let root = dir.path().join("spool");
    for folder in ["", "log", "bodies", "failed", "tmp"] {
        check(&root.join(folder), 0o700);
    }
    let all = [files(&dir, "log"), files(&dir, "bodies"), vec![root.join("lock")]].concat();
    assert_eq!(all.len(), 3);
    all.iter().for_each(|file| check(file, 0o600));
}

#[tokio::test]
async fn space_is_given_back_when_messages_are_done() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let mib = vec![b'x'; 1024 * 1024];
    for n in 1..=66 {
        log.apply(vec![put(n, &mib)], Durability::Lazy).await.unwrap();
    }
    assert_eq!(segments(&dir).len(), 2);
    assert!(log.health().used > 66 * 1024 * 1024);
    durable(&log, (2..=66).map(done).collect()).await;
    assert_eq!(segments(&dir).len(), 2, "the first still lives in the first segment");
    durable(&log, vec![update(1, 1)]).await;
    assert_eq!(body(&log, 1).await, mib);
    durable(&log, vec![done(1)]).await;
    until(|| segments(&dir).len() == 1).await;
    // What it was is kept to be overwritten.
    until(|| log.health().used < 70 * 1024 * 1024).await;
    // One request that is longer than a segment.
    durable(&log, (100..165).map(|n| put(n, &mib)).collect()).await;
    durable(&log, vec![put(200, b"after")]).await;
    drop(log);
    let (log, report) = open(&dir).await;
    assert_eq!(report, Report { messages: 66, ..Report::default() });
    assert_eq!(body(&log, 164).await, mib);
    assert_eq!(body(&log, 200).await, b"after");
    durable(&log, ids(&log).into_iter().map(done).collect()).await;
    until(|| segments(&dir).len() == 1).await;
}

/// One message stays in the spool while `octets` pass in messages of `len`.
async fn check_that_a_message_that_stays_keeps_no_space(
    geometry: Geometry,
    octets: u64,
    len: usize,
) {
    let disk = sim_disk::SimDisk::new();
    let config = config::Spool { path: "/spool".into(), min_free: 0, keep_failed: Duration::MAX };
    let open = || async { Log::open_on(Arc::new(disk.clone()), &config, geometry).await.unwrap() };
    let (log, _) = open().await;
    durable(&log, vec![put(1, b"stays"), put(2, b"stays too")]).await;
    durable(&log, vec![update(1, 7), attempt(2, 1, &[1])]).await;
    durable(&log, vec![note("stays", b"too"), note("goes", b"x")]).await;
    durable(&log, vec![note("goes", b"")]).await;
    let (mut passed, mut most, mut n) = (0, 0, 10);
    let content = vec![b'x'; len];
    while passed < octets {
        durable(&log, (n..n + 8).map(|n| put(n, &content)).collect()).await;
        log.apply((n..n + 8).map(done).collect(), Durability::Lazy).await.unwrap();
        n += 8;
        passed += 8 * len as u64;
        most = most.max(log.health().used);
    }
    assert!(most <= 8 * geometry.segment, "{most} octets on disk, {passed} passed");
    drop(log);
    let (log, report) = open().await;
    assert_eq!((ids(&log), report.damaged), (vec![1, 2], Vec::new()));
    assert_eq!(body(&log, 1).await, b"stays");
    assert_eq!(log.open(id(1)).await.unwrap().progress, progress(7));
    assert_eq!(log.open(id(2)).await.unwrap().progress.sending, [1]);
    assert_eq!(report.in_doubt, 1);
    assert_eq!((log.note("stays").unwrap(), log.note("goes")), (b"too".to_vec(), None));
}

#[tokio::test]
async fn a_message_that_stays_keeps_no_space_while_others_pass() {
    let geometry =
        Geometry { segment: 256 * 1024, idle: 16 * 1024, fresh: 0, ..Geometry::default() };
    check_that_a_message_that_stays_keeps_no_space(geometry, 80_000_000, 10_000).await;
    if std::env::var_os("SLOW_TESTS").is_some() {
        let geometry = Geometry::default();
        check_that_a_message_that_stays_keeps_no_space(geometry, 20_000_000_000, 900_000).await;
    }
}

#[tokio::test]
async fn the_first_attempt_reads_no_file() {
    let (disk, dir) = (TestDisk::new(), tempfile::tempdir().unwrap());
    let opened = Log::open_on(Arc::clone(&disk) as _, &at(dir.path()), Geometry::default()).await;
    let log = opened.unwrap().0;
    for n in 1..=3 {
        log.apply(vec![put(n, b"hello")], Durability::Durable).await.unwrap();
    }
    log.apply(vec![update(2, 1)], Durability::Durable).await.unwrap();
    log.apply(vec![Op::Delete { id: id(3) }], Durability::Durable).await.unwrap();
    disk.bad_opens.store(2, Ordering::SeqCst);
    let first = log.open(id(1)).await.unwrap();
    assert_eq!(
        (first.envelope, first.progress),
        (envelope(1), Progress::new(UnixMillis(1_000), 2))
    );
    assert!(matches!(&first.body, Body::Memory(content) if &content[..] == b"hello"));
    for n in [1, 2] {
        let again = log.open(id(n)).await;
        assert!(
            matches!(again, Err(SpoolError::Io(..))),
            "{n}: memory has no word of its progress"
        );
    }
    assert_eq!(log.open(id(2)).await.unwrap().progress, progress(1));
    assert!(matches!(log.open(id(3)).await, Err(SpoolError::Unknown(_))));
    log.close().await;
}

#[tokio::test]
async fn what_the_operating_system_has_in_memory_is_read_without_a_thread_that_waits() {
    let (disk, dir) = (TestDisk::new(), tempfile::tempdir().unwrap());
    let (log, _) = open_on(&disk, &dir).await;
    log.apply(vec![put(1, b"hello"), put(2, b"you")], Durability::Durable).await.unwrap();
    log.apply(vec![update(1, 1)], Durability::Durable).await.unwrap();
    disk.remembers.store(true, Ordering::SeqCst);
    disk.bad_opens.store(1, Ordering::SeqCst);
    let read = log.open(id(1)).await.unwrap();
    assert_eq!((read.envelope, read.progress), (envelope(1), progress(1)));
    assert!(matches!(&read.body, Body::Memory(content) if &content[..] == b"hello"));
    disk.remembers.store(false, Ordering::SeqCst);
    assert!(matches!(log.open(id(2)).await, Err(SpoolError::Io(..))), "the file was opened");
    log.close().await;
}

const SMALL: Geometry = Geometry {
    segment: 256 * 1024,
    idle: 16 * 1024,
    reserve: 16 * 1024,
    few: 2,
    quiet: Duration::MAX,
    patience: Duration::ZERO,
    fresh: 0,
};

#[tokio::test]
async fn an_error_while_records_are_written_again_keeps_the_log_long_only_for_a_while() {
    let dir = TempDir::new().unwrap();
    let disk = TestDisk::new();
    let (config, content) = (at(dir.path()), vec![b'x'; 10_000]);
    let (log, _) = Log::open_on(Arc::clone(&disk) as _, &config, SMALL).await.unwrap();
    durable(&log, vec![put(1, b"stays")]).await;
    disk.bad_opens.store(1, Ordering::SeqCst);
    for n in 2..200 {
        durable(&log, vec![put(n, &content)]).await;
        durable(&log, vec![done(n)]).await;
    }
    assert_eq!(disk.bad_opens.load(Ordering::SeqCst), 0, "nothing was to be written again");
    until(|| segments(&dir).len() <= 3).await;
    assert_eq!(body(&log, 1).await, b"stays");
}

/// Others pass until the log is as short as it gets.
async fn pass(log: &Log, dir: &TempDir, from: u128) {
    for n in from..from + 100 {
        durable(log, vec![put(n, &[b'x'; 10_000])]).await;
        durable(log, vec![done(n)]).await;
    }
    until(|| segments(dir).len() <= 3).await;
}

/// Changes an octet of `what` in the oldest segment.
fn damage(dir: &TempDir, what: &[u8]) {
    let path = segments(dir).remove(0);
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(what.len()).position(|octets| octets == what).unwrap();
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
}

#[tokio::test]
async fn a_damaged_message_does_not_keep_the_log_from_becoming_shorter() {
    for is_restarted in [false, true] {
        let dir = TempDir::new().unwrap();
        let open = async || Log::open_on(TestDisk::new() as _, &at(dir.path()), SMALL).await;
        let (mut log, _) = open().await.unwrap();
        durable(&log, vec![put(1, b"it will be damaged"), put(2, b"stays")]).await;
        let body = stage(&log, &vec![b'y'; 1_100_000]).await;
        durable(&log, vec![Op::Put { envelope: envelope(3), body }]).await;
        for n in 100..130 {
            durable(&log, vec![put(n, &[b'x'; 10_000])]).await;
        }
        assert_eq!(segments(&dir).len(), 2, "the first is full and has an index");
        let oldest = segments(&dir).remove(0);
        damage(&dir, b"it will be damaged");
        // In the fixed fields of the third message: its id, big-endian, and then the time.
        damage(&dir, &[&3_u128.to_be_bytes()[8..], &1_000_u64.to_le_bytes()].concat());
        if is_restarted {
            drop(log);
            log = open().await.unwrap().0;
        }
        durable(&log, (100..130).map(done).collect()).await;
        pass(&log, &dir, 200).await;
        assert_eq!(ids(&log), [2]);
        assert_eq!(tests::body(&log, 2).await, b"stays");
        let kept = files(&dir, "damaged");
        let names = kept.iter().map(|path| path.file_name().unwrap()).collect::<Vec<_>>();
        assert!(names.contains(&oldest.file_name().unwrap()), "{names:?}");
        assert_eq!(kept.len(), 2, "the segment and the content of the third message");
        assert!(files(&dir, "bodies").is_empty());
        drop(log);
        let (log, report) = open().await.unwrap();
        assert_eq!((ids(&log), report.damaged), (vec![2], vec![]));
    }
}

#[tokio::test]
async fn what_was_put_aside_is_not_written_over_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let open = async || Log::open_on(TestDisk::new() as _, &at(dir.path()), SMALL).await;
    let (log, _) = open().await.unwrap();
    for n in 100..130 {
        durable(&log, vec![put(n, &[b'x'; 10_000])]).await;
    }
    drop(log);
    // As by a run that ended between the second name and the end of the message.
    let oldest = segments(&dir).remove(0);
    let aside = dir.path().join("spool/damaged");
    fs::create_dir(&aside).unwrap();
    let aside = aside.join(oldest.file_name().unwrap());
    fs::hard_link(&oldest, &aside).unwrap();
    let before = fs::read(&aside).unwrap();
    let (log, _) = open().await.unwrap();
    durable(&log, (100..130).map(done).collect()).await;
    pass(&log, &dir, 200).await;
    assert!(!oldest.exists());
    assert_eq!(fs::read(&aside).unwrap(), before);
}

#[tokio::test]
async fn a_message_whose_progress_is_damaged_is_held_in_doubt() {
    let dir = TempDir::new().unwrap();
    let (log, _) = Log::open_on(TestDisk::new() as _, &at(dir.path()), SMALL).await.unwrap();
    durable(&log, vec![put(1, b"stays"), update(1, 777)]).await;
    for n in 100..130 {
        durable(&log, vec![put(n, &[b'x'; 10_000])]).await;
    }
    let json = wire::write_progress(&progress(777));
    damage(&dir, &json);
    assert!(matches!(log.open(id(1)).await, Err(SpoolError::Damaged(..))));
    durable(&log, (100..130).map(done).collect()).await;
    pass(&log, &dir, 200).await;
    let check = async |log: &Log| {
        assert_eq!(log.heads(None, 9)[0].state, QueueState::Held);
        let stored = log.open(id(1)).await.unwrap();
        assert_eq!(read_all(&stored.body).await.unwrap(), b"stays");
        assert_eq!(stored.progress.doubtful, [0, 1]);
        assert_eq!(stored.progress.pending().count(), 2);
    };
    check(&log).await;
    assert_eq!(files(&dir, "damaged").len(), 1);
    drop(log);
    let (log, report) = open(&dir).await;
    assert_eq!(report.damaged, Vec::<String>::new());
    check(&log).await;
}

#[tokio::test]
async fn on_a_full_disk_the_reserve_takes_the_marks_of_all_that_is_delivered() {
    let dir = TempDir::new().unwrap();
    let disk = TestDisk::new();
    let geometry = Geometry { quiet: Duration::from_millis(1), ..SMALL };
    let config = at(dir.path());
    let open = || Log::open_on(Arc::clone(&disk) as Arc<dyn Disk>, &config, geometry);
    let (log, _) = open().await.unwrap();
    // Four segments, all alive.
    for n in 1..=36 {
        durable(&log, vec![put(n, &[b'x'; 25_000])]).await;
    }
    let has_spare = || {
        let log = files(&dir, "log");
        log.iter().any(|path| path.file_name().unwrap().to_str().unwrap().starts_with("spare-"))
    };
    until(has_spare).await;
    disk.free.store(0, Ordering::SeqCst);
    disk.is_full.store(true, Ordering::SeqCst);
    // What was known of the free space is old.
    until(|| log.health().free == 0).await;
    // More than half of the first segment first, so that writing the rest again would be worth it.
    let delivered: Vec<u128> = (2..=8).chain(11..=36).collect();
    let mut refused = 0;
    for n in &delivered {
        while log.apply(vec![done(*n)], Durability::Durable).await.is_err() {
            refused += 1;
            assert!(refused < 3, "{:?}", log.health().trouble);
        }
    }
    assert!(matches!(
        log.apply(vec![put(99, b"x")], Durability::Durable).await,
        Err(SpoolError::Full)
    ));
    drop(log);
    disk.free.store(u64::MAX, Ordering::SeqCst);
    disk.is_full.store(false, Ordering::SeqCst);
    let (log, report) = open().await.unwrap();
    assert_eq!((ids(&log), report.damaged), (vec![1, 9, 10], Vec::new()));
}

#[tokio::test]
async fn the_only_segment_gives_its_space_back_when_nothing_lives_in_it() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let first = segments(&dir);
    for n in 1..=5 {
        durable(&log, vec![put(n, &[b'x'; 1_000_000])]).await;
    }
    durable(&log, (1..=4).map(done).collect()).await;
    assert_eq!(segments(&dir), first, "one message lives in it");
    durable(&log, vec![done(5)]).await;
    until(|| segments(&dir).len() == 1 && segments(&dir) != first).await;
    // What it was is kept to be overwritten.
    until(|| log.health().used < 6_000_000).await;
    durable(&log, vec![put(6, b"next")]).await;
    drop(log);
    let (log, report) = open(&dir).await;
    assert_eq!((ids(&log), report.damaged), (vec![6], Vec::new()));
    assert_eq!(body(&log, 6).await, b"next");
}

/// What the spool should hold.
#[derive(Clone, Debug, Default)]
struct Model {
    messages: BTreeMap<u128, Kept>,
    notes: BTreeMap<u64, Vec<u8>>,
}

#[derive(Clone, Debug)]
struct Kept {
    state: QueueState,
    attempts: u16,
    content: Vec<u8>,
    /// The part of the attempt that is open.
    sending: Vec<u32>,
    in_doubt: bool,
}

impl Model {
    fn put(&mut self, n: u128, content: Vec<u8>) {
        let (state, sending) = (QueueState::Queued, Vec::new());
        let kept = Kept { state, attempts: 0, content, sending, in_doubt: false };
        self.messages.insert(n, kept);
    }

    /// Makes up an operation on message `n`, and does it; false if it is one that is refused.
    fn change(&mut self, n: u128, random: &mut Random, ops: &mut Vec<Op>) -> bool {
        let kept = self.messages.get_mut(&n).unwrap();
        let id = id(n);
        let attempts = u16::try_from(random.below(9)).unwrap();
        let sending = vec![u32::try_from(random.below(2)).unwrap()];
        use QueueState::{Failed, Held, Queued};
        let progress = progress(attempts);
        let (op, allowed, state) = match random.below(9) {
            0 => {
                let state = if kept.state == Held { Held } else { Queued };
                (Op::Update { id, progress }, kept.state != Failed, state)
            }
            1 => (Op::Hold { id, progress }, kept.state != Failed, Held),
            2 => (Op::Fail { id, progress }, kept.state != Failed, Failed),
            3 => (Op::Requeue { id, progress }, kept.state != Queued, Queued),
            4 => (Op::Release { id, progress }, kept.state == Held, Queued),
            5 | 6 => {
                ops.push(attempt(n, attempts, &sending));
                let allowed = kept.state == Queued;
                (kept.attempts, kept.sending) = (attempts, sending);
                return allowed;
            }
            7 => {
                ops.push(Op::Done { id });
                self.messages.remove(&n);
                return true;
            }
            _ => {
                ops.push(Op::Delete { id });
                self.messages.remove(&n);
                return true;
            }
        };
        ops.push(op);
        (kept.state, kept.attempts, kept.sending) = (state, attempts, Vec::new());
        kept.in_doubt = false;
        allowed
    }

    fn restart(&mut self) {
        for kept in self.messages.values_mut() {
            kept.in_doubt = !kept.sending.is_empty();
        }
    }

    async fn check(&self, log: &Log) {
        let heads = log.heads(None, usize::MAX);
        let seen =
            heads.iter().map(|head| (head.id.as_u128(), head.state, head.attempts, head.in_doubt));
        let should =
            self.messages.iter().map(|(n, kept)| (*n, kept.state, kept.attempts, kept.in_doubt));
        assert_eq!(seen.collect::<Vec<_>>(), should.collect::<Vec<_>>());
        for (n, kept) in &self.messages {
            let stored = log.open(id(*n)).await.unwrap();
            assert_eq!(stored.progress.attempts, kept.attempts);
            assert_eq!(stored.progress.sending, kept.sending);
            assert_eq!(read_all(&stored.body).await.unwrap(), kept.content);
        }
        for key in 0..NOTE_KEYS {
            assert_eq!(log.note(&format!("note/{key}")).as_ref(), self.notes.get(&key), "{key}");
        }
    }
}

const NOTE_KEYS: u64 = 4;

#[tokio::test]
async fn random_operations_agree_with_a_model() {
    for seed in 0..fuzz_rounds().div_ceil(50) {
        let mut random = Random(seed);
        let dir = TempDir::new().unwrap();
        let disk = TestDisk::new();
        // Files are copied one by one: nothing may be written meanwhile that nobody asked for.
        let fresh = if seed % 2 == 0 { 0 } else { Geometry::default().fresh };
        let geometry =
            Geometry { few: usize::MAX, quiet: Duration::MAX, fresh, ..Geometry::default() };
        let config = at(dir.path());
        let open_on = || Log::open_on(Arc::clone(&disk) as Arc<dyn Disk>, &config, geometry);
        let (mut log, _) = open_on().await.unwrap();
        let mut model = Model::default();
        let mut next = 1;
        for step in 0..300 {
            let mut after = model.clone();
            let mut ops = Vec::new();
            let mut is_allowed = true;
            for _ in 0..=random.below(3) {
                let known = usize::try_from(random.below(12)).unwrap();
                let known = after.messages.keys().nth(known).copied();
                match (random.below(9), known) {
                    (0, _) => {
                        let key = random.below(NOTE_KEYS);
                        let len = [0, 1, 30, 9_000][usize::try_from(random.below(4)).unwrap()];
                        let byte = u8::try_from(random.below(256)).unwrap();
                        ops.push(note(&format!("note/{key}"), &vec![byte; len]));
                        match len {
                            0 => after.notes.remove(&key),
                            _ => after.notes.insert(key, vec![byte; len]),
                        };
                    }
                    (1..=3, _) | (_, None) => {
                        let len = if random.below(40) == 0 { 1_100_000 } else { random.below(300) };
                        let byte = u8::try_from(random.below(256)).unwrap();
                        let content = vec![byte; usize::try_from(len).unwrap()];
                        let body = stage(&log, &content).await;
                        ops.push(Op::Put { envelope: envelope(next), body });
                        after.put(next, content);
                        next += 1;
                    }
                    (_, Some(n)) => is_allowed &= after.change(n, &mut random, &mut ops),
                }
            }
            let durability = match random.below(2) {
                0 => Durability::Durable,
                _ => Durability::Lazy,
            };
            if random.below(12) == 0 {
                disk.fail_next(1 + random.below(3), EIO);
            }
            match (log.apply(ops, durability).await, is_allowed) {
                (Ok(()), true) => model = after,
                (Err(SpoolError::Refused(..)), false) | (Err(SpoolError::Io(..)), true) => {}
                (other, _) => panic!("{seed}, {step}: {other:?}, {is_allowed}"),
            }
            disk.heal();
            let restart = random.below(15);
            if log.health().trouble.is_some() || restart == 0 {
                // By a kill: what was left is all there is.
                log.shared.wait_until_filed();
                let killed = snapshot(&dir);
                let (copy, report) = open(&killed).await;
                assert_eq!(report.damaged, Vec::<String>::new(), "{seed}, {step}");
                model.restart();
                model.check(&copy).await;
                let in_doubt = model.messages.values().filter(|kept| kept.in_doubt).count();
                assert_eq!((report.messages, report.in_doubt), (model.messages.len(), in_doubt));
                drop(log);
                log = open_on().await.unwrap().0;
            }
            if restart <= 1 {
                model.check(&log).await;
            }
        }
    }
}

fn fuzz_rounds() -> u64 {
    std::env::var("FUZZ_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(150)
}

#[tokio::test]
async fn a_start_never_panics_whatever_is_on_disk() {
    let dir = TempDir::new().unwrap();
    four_batches(&dir).await;
    let (log, _) = open(&dir).await;
    durable(&log, vec![put(6, b"six"), update(1, 4)]).await;
    log.apply(vec![put(7, b"seven")], Durability::Lazy).await.unwrap();
    drop(log);
    for seed in 0..fuzz_rounds() {
        let mut random = Random(seed);
        let mutated = snapshot(&dir);
        for path in files(&mutated, "log") {
            let mut bytes = fs::read(&path).unwrap();
            for _ in 0..random.below(4) {
                let mut at = |len: usize| usize::try_from(random.below(len as u64 + 1)).unwrap();
                let (from, len) = (at(bytes.len()), at(64));
                let to = (from + len).min(bytes.len());
                match at(5) {
                    0 => bytes.truncate(from),
                    1 => bytes[from..to].fill(0),
                    2 => drop(bytes.drain(from..to)),
                    3 => {
                        let copy = bytes[from..to].to_vec();
                        bytes.splice(from..from, copy);
                    }
                    _ => bytes[from..to].iter_mut().take(1).for_each(|b| *b ^= 1 << at(7)),
                }
            }
            fs::write(&path, bytes).unwrap();
        }
        let (log, _) = open(&mutated).await;
        for n in ids(&log) {
            // What is there can be read: its checksum was right a moment ago.
            log.open(id(n)).await.unwrap();
        }
        let before = ids(&log);
        durable(&log, vec![put(9, b"nine")]).await;
        drop(log);
        let (log, _) = open(&mutated).await;
        assert_eq!(ids(&log).len(), before.len() + 1, "seed {seed}");
        assert_eq!(body(&log, 9).await, b"nine", "seed {seed}");
    }
}

#[tokio::test]
async fn the_log_takes_no_more_than_three_times_what_is_queued() {
    let geometry =
        Geometry { segment: 256 * 1024, idle: 16 * 1024, fresh: 0, ..Geometry::default() };
    let content = [b'x'; 10_000];
    // Of the messages that come first every so many goes at once; the others stay.
    for every in [u128::MAX, 4, 2] {
        let config = config::Spool { path: "/spool".into(), min_free: 0, keep_failed: WEEK };
        let disk = Arc::new(sim_disk::SimDisk::new());
        let (log, _) = Log::open_on(disk, &config, geometry).await.unwrap();
        for n in 1..=600 {
            durable(&log, vec![put(n, &content)]).await;
            if n % every == 0 {
                log.apply(vec![done(n)], Durability::Lazy).await.unwrap();
            }
        }
        let live = lock(&log.shared.index).segments.values().map(|of| of.octets).sum::<u64>();
        let mut most = 0;
        for n in (1_000..3_400).step_by(8) {
            durable(&log, (n..n + 8).map(|n| put(n, &content)).collect()).await;
            log.apply((n..n + 8).map(done).collect(), Durability::Lazy).await.unwrap();
            most = most.max(log.health().used);
        }
        assert!(most <= 3 * live + 7 * geometry.segment, "{most} octets for {live}, {every}");
    }
}
