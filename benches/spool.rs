//! The spool as a whole, on a real file system, in the folder that `SPOOL_BENCH_DIR` names (or a temporary one).
//!
//! - `cargo bench -- spool`: durable messages of 10 KiB, by many producers and by one, and the restart after them
//! - `cargo bench -- million`: 1,000,000 messages of 500 octets wait; restart, memory, and whether it still takes mail
//! - `cargo bench -- large`: 40 messages of 34 MB by 8 producers; memory and speed
//!
//! Each prints what the spool did beside what the same file system does without it, in turns and in the same run: the
//! ratio is the figure, for disks differ.

#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mailsluice::config;
use mailsluice::envelope::{Client, Envelope, Kind, Priority, Rcpt, SpoolId, UnixMillis};
use mailsluice::smtp::address::{Charset, ForwardPath, Mailbox, ReversePath};
use mailsluice::smtp::params::Notify;
use mailsluice::spool::log::Log;
use mailsluice::spool::{Durability, Op, Spool, Stage, Staged};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use crate::measure::{Cost, Floor, median, number};

const BODY: usize = 10 * 1024;
const SMALL_BODY: usize = 500;
const PRODUCERS: usize = 128;
/// Spool and bare loop take turns so many times.
const ROUNDS: usize = 5;
/// What is done by a process of its own, whose memory is that of the spool.
const CHILD: &str = "SPOOL_BENCH_CHILD";

/// Name and entry of each run; the argument is whether it is measured.
pub(crate) type Case = (&'static str, fn(bool));
pub(crate) const CASES: &[Case] = &[("spool", spool), ("million", million), ("large", large)];

/// What `SPOOL_BENCH_CHILD` asks of this process, if it is such a child.
pub(crate) fn child() -> bool {
    let Ok(task) = std::env::var(CHILD) else { return false };
    let words: Vec<&str> = task.splitn(4, ' ').collect();
    match words.as_slice() {
        ["open", folder] => open_once(Path::new(folder)),
        ["take", count, size, folder] => {
            let number = |text: &str| text.parse().expect("a number");
            take_large(Path::new(folder), number(count), number(size));
        }
        _ => unreachable!("no such task: {task}"),
    }
    true
}

/// Runs this program again for one task, and returns the numbers that it prints.
fn in_child(task: &str) -> Vec<f64> {
    let mut command = Command::new(std::env::current_exe().expect("the path of this program"));
    let output = command.env(CHILD, task).stderr(Stdio::inherit()).output().expect("a child");
    assert!(output.status.success(), "{task}: {}", output.status);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().map(|word| word.parse().expect("a number")).collect()
}

/// The folder to work in, and what must live as long.
pub(crate) fn folder() -> (PathBuf, tempfile::TempDir) {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let folder =
        std::env::var_os("SPOOL_BENCH_DIR").map_or(temporary.path().to_owned(), PathBuf::from);
    (folder, temporary)
}

/// Without an I/O driver, whose wake-ups are writes too, see [`Cost::batches`].
fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().enable_time().build().expect("a runtime")
}

// --- durable messages of 10 KiB

/// How large the cases are.
struct Scale {
    parallel: usize,
    serial: usize,
    waiting: usize,
    /// Octets of the bare loop's file, and how many syncs it makes in a turn.
    floor: u64,
    syncs: u64,
}

fn spool(measured: bool) {
    const MIB: u64 = 1024 * 1024;
    let scale = match measured {
        true => {
            Scale { parallel: 20_000, serial: 500, waiting: 20_000, floor: 256 * MIB, syncs: 500 }
        }
        false => Scale { parallel: 200, serial: 5, waiting: 100, floor: 4 * MIB, syncs: 5 },
    };
    let (folder, _temporary) = folder();
    let path = folder.join("spool");
    let runtime = runtime();
    println!("spool in {}, bodies of {BODY} octets", folder.display());

    let mut floor = Floor::prepare(&folder, scale.floor);
    let log = runtime.block_on(open(&path));
    // The first time round the disk gives new blocks to both.
    runtime.block_on(parallel(&log, scale.parallel, BODY, Then::Done));

    let mut turns = Turns::default();
    for _ in 0..ROUNDS {
        let (taken, cost) =
            timed(&runtime, &folder, parallel(&log, scale.parallel, BODY, Then::Done));
        let (size, messages) = match cost.batches {
            0 => (64 * BODY as u64, 64.0),
            batches => (cost.batched / batches, scale.parallel as f64 / batches as f64),
        };
        let bare = floor.rate(size, scale.syncs) * messages;
        turns.add(scale.parallel, taken, bare, &cost);
        turns.single.push(floor.rate(BODY as u64, scale.syncs));
    }
    turns.report(&format!("{PRODUCERS} producers"), "in batches of the same size");

    let mut turns = Turns::default();
    for _ in 0..ROUNDS {
        let (taken, cost) = timed(&runtime, &folder, serial(&log, scale.serial));
        let bare = floor.rate(BODY as u64, scale.syncs);
        turns.add(scale.serial, taken, bare, &cost);
    }
    turns.report("one in sequence", "one by one");

    runtime.block_on(parallel(&log, scale.waiting, BODY, Then::Wait));
    runtime.block_on(log.close());
    drop(log);
    let numbers = in_child(&format!("open {}", path.display()));
    println!("restart with {} messages: {:.0} ms", numbers[0], numbers[1] * 1e3);
    drop(std::fs::remove_dir_all(path));
}

/// Rounds of one case.
#[derive(Default)]
struct Turns {
    messages: usize,
    rates: Vec<f64>,
    bare: Vec<f64>,
    /// Of the bare loop with one message a sync, where that is something else.
    single: Vec<f64>,
    ratios: Vec<f64>,
    cost: Cost,
}

impl Turns {
    fn add(&mut self, messages: usize, taken: Duration, bare: f64, cost: &Cost) {
        let rate = messages as f64 / taken.as_secs_f64();
        self.messages += messages;
        self.rates.push(rate);
        self.bare.push(bare);
        self.ratios.push(rate / bare);
        self.cost = self.cost.plus(cost);
    }

    fn report(self, case: &str, bare: &str) {
        let payload = (self.messages * BODY) as f64;
        let (low, high) = self
            .ratios
            .iter()
            .fold((f64::MAX, 0.0_f64), |(low, high), ratio| (low.min(*ratio), high.max(*ratio)));
        println!(
            "{case}: {:.0} messages/s, {:.2} of overwriting and syncing {bare} ({:.0}/s), {low:.2} to {high:.2} in {} rounds",
            median(self.rates.clone()),
            median(self.ratios.clone()),
            median(self.bare),
            self.ratios.len(),
        );
        if !self.single.is_empty() {
            let single = median(self.single);
            let ratio = median(self.rates) / single;
            println!("  {ratio:.1} times the bare loop with one message a sync ({single:.0}/s)");
        }
        println!(
            "  {:.1} µs of CPU a message; octets per octet: {:.3} handed to the kernel, {:.3} to the disk; {:.1} messages a batch of {:.0} octets",
            self.cost.cpu.as_secs_f64() * 1e6 / self.messages as f64,
            self.cost.handed as f64 / payload,
            self.cost.written as f64 / payload,
            self.messages as f64 / self.cost.batches.max(1) as f64,
            self.cost.batched as f64 / self.cost.batches.max(1) as f64,
        );
    }
}

fn timed(runtime: &Runtime, folder: &Path, work: impl Future<Output = ()>) -> (Duration, Cost) {
    let before = Cost::now(folder);
    let began = mailsluice::clock::now();
    runtime.block_on(work);
    (began.elapsed(), Cost::now(folder).since(&before))
}

async fn open(path: &Path) -> Arc<Log> {
    let config = config::Spool { path: path.to_owned(), min_free: 0, keep_failed: Duration::MAX };
    Arc::new(Log::open(&config).await.expect("a spool").0)
}

/// What becomes of a message.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    /// A consumer marks it done as soon as it hears of it.
    Done,
    Wait,
}

/// Many producers that each wait for their message to be durable.
async fn parallel(log: &Arc<Log>, messages: usize, size: usize, then: Then) {
    let (durable, mut delivered) = mpsc::unbounded_channel();
    let mut tasks = tokio::task::JoinSet::new();
    for producer in 0..PRODUCERS {
        let (log, durable) = (Arc::clone(log), durable.clone());
        tasks.spawn(async move {
            for n in (producer..messages).step_by(PRODUCERS) {
                let id = put(&log, n as u64, size).await;
                if then == Then::Done {
                    durable.send(id).expect("the consumer hears till the end");
                }
            }
        });
    }
    drop(durable);
    let mut ids = Vec::new();
    while delivered.recv_many(&mut ids, 1024).await > 0 {
        let ops = ids.drain(..).map(|id| Op::Done { id }).collect();
        log.apply(ops, Durability::Lazy).await.expect("a done");
    }
    while let Some(ended) = tasks.join_next().await {
        ended.expect("a producer");
    }
}

async fn serial(log: &Log, messages: usize) {
    for n in 0..messages {
        let id = put(log, n as u64, BODY).await;
        log.apply(vec![Op::Done { id }], Durability::Lazy).await.expect("a done");
    }
}

async fn put(log: &Log, n: u64, size: usize) -> SpoolId {
    let envelope = envelope(n, size as u64);
    let id = envelope.id;
    let put = Op::Put { envelope, body: Staged::Memory(vec![b'm'; size]) };
    log.apply(vec![put], Durability::Durable).await.expect("a put");
    id
}

// --- a million that wait

fn million(measured: bool) {
    let (waiting, sample) = if measured { (1_000_000, 40_000) } else { (2_000, 200) };
    let (folder, _temporary) = folder();
    let path = folder.join("spool");
    let runtime = runtime();
    println!("{waiting} messages of {SMALL_BODY} octets in {}", folder.display());

    let log = runtime.block_on(open(&path));
    let rate = |messages| {
        let work = parallel(&log, messages, SMALL_BODY, Then::Wait);
        messages as f64 / timed(&runtime, &folder, work).0.as_secs_f64()
    };
    // The first time round is for the threads and the allocator.
    rate(sample / 4);
    let empty: Vec<f64> = (0..ROUNDS).map(|_| rate(sample / ROUNDS)).collect();
    rate(waiting - sample / 4 - 2 * sample);
    let full: Vec<f64> = (0..ROUNDS).map(|_| rate(sample / ROUNDS)).collect();
    let (empty, full) = (median(empty), median(full));
    println!("accepts {empty:.0} messages/s when empty, {full:.0} when full: {:.2}", full / empty);
    runtime.block_on(log.close());
    drop(log);

    let numbers = in_child(&format!("open {}", path.display()));
    println!(
        "restart with {} messages: {:.2} s, {:.1} MiB of memory (PSS), {:.1} MiB at most (RSS)",
        numbers[0],
        numbers[1],
        numbers[2] / 1024.0,
        numbers[3] / 1024.0,
    );
    drop(std::fs::remove_dir_all(path));
}

/// Opens the spool and prints: messages, seconds, PSS and the highest RSS in KiB.
fn open_once(path: &Path) {
    let runtime = runtime();
    let began = mailsluice::clock::now();
    let config = config::Spool { path: path.to_owned(), min_free: 0, keep_failed: Duration::MAX };
    let (log, report) = runtime.block_on(Log::open(&config)).expect("a spool");
    let taken = began.elapsed().as_secs_f64();
    let pss = number("/proc/self/smaps_rollup", "Pss");
    println!("{} {taken} {pss} {}", report.messages, number("/proc/self/status", "VmHWM"));
    runtime.block_on(log.close());
}

// --- large messages

fn large(measured: bool) {
    let (count, size, rounds) = if measured { (40, 34_000_000, 3) } else { (4, 2_000_000, 1) };
    let (folder, _temporary) = folder();
    let path = folder.join("spool");
    let octets = (count * size) as f64;
    println!("{count} messages of {size} octets by 8 producers in {}", folder.display());
    let (mut ours, mut plain, mut ratios, mut peaks) = (vec![], vec![], vec![], vec![]);
    for _ in 0..rounds {
        let numbers = in_child(&format!("take {count} {size} {}", path.display()));
        drop(std::fs::remove_dir_all(&path));
        let dd = dd(&folder, count * size);
        ours.push(octets / numbers[0] / 1e6);
        plain.push(octets / dd / 1e6);
        ratios.push(dd / numbers[0]);
        peaks.push(numbers[1] / 1024.0);
    }
    println!(
        "{:.0} MB/s, {:.2} of dd bs=1M conv=fdatasync ({:.0} MB/s); {:.1} MiB of memory at most (RSS)",
        median(ours),
        median(ratios),
        median(plain),
        peaks.into_iter().fold(0.0, f64::max),
    );
}

/// Seconds that `dd` takes for so many octets.
fn dd(folder: &Path, octets: usize) -> f64 {
    let to = folder.join("dd");
    let mut command = Command::new("dd");
    command.args(["if=/dev/zero", "bs=1M", "iflag=count_bytes", "conv=fdatasync", "status=none"]);
    command.arg(format!("count={octets}")).arg(format!("of={}", to.display()));
    let began = mailsluice::clock::now();
    let status = command.status().expect("dd");
    let taken = began.elapsed().as_secs_f64();
    assert!(status.success(), "dd: {status}");
    drop(std::fs::remove_file(to));
    taken
}

/// Takes in large messages as connections would, and prints: seconds, the highest RSS in KiB.
fn take_large(path: &Path, count: usize, size: usize) {
    let runtime = runtime();
    let log = runtime.block_on(open(path));
    let work = async {
        let mut tasks = tokio::task::JoinSet::new();
        for producer in 0..8 {
            let log = Arc::clone(&log);
            tasks.spawn(async move {
                // What a connection hands over at once.
                let chunk = [b'm'; 64 * 1024];
                for n in (producer..count).step_by(8) {
                    let mut stage = log.stage();
                    let mut left = size;
                    while left > 0 {
                        let now = left.min(chunk.len());
                        stage.write(&chunk[..now]).await.expect("a write");
                        left -= now;
                    }
                    let body = stage.finish().await.expect("the end of a content");
                    let put = Op::Put { envelope: envelope(n as u64, size as u64), body };
                    log.apply(vec![put], Durability::Durable).await.expect("a put");
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.expect("a producer");
        }
    };
    let (taken, _) = timed(&runtime, path, work);
    println!("{} {}", taken.as_secs_f64(), number("/proc/self/status", "VmHWM"));
    runtime.block_on(log.close());
}

fn envelope(n: u64, size: u64) -> Envelope {
    let accepted = UnixMillis(1_795_502_531_000 + n);
    let mailbox = |text: &str| Mailbox::parse(text, Charset::Ascii).expect("an address");
    let path = ForwardPath::Mailbox(mailbox("reader@example.com"));
    Envelope {
        kind: Kind::Mail,
        id: SpoolId::new(accepted),
        accepted,
        reverse_path: ReversePath::Mailbox(mailbox("reports@example.com")),
        rcpts: vec![Rcpt { path, notify: Notify::Unsaid, orcpt: None }],
        smtputf8: false,
        eight_bit: false,
        ret: None,
        envid: None,
        size,
        client: Client { address: "127.0.0.1".into(), helo: "app.example.com".into() },
        priority: Priority::Normal,
        author: Some(mailbox("reports@example.com")),
        prepend: "Received: from app.example.com ([127.0.0.1])\r\n\tby relay.test (mailsluice) with ESMTP id 1;\r\n\tTue, 24 Nov 2026 06:42:11 +0000\r\n".into(),
    }
}
