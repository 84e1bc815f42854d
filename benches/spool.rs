//! The spool as a whole, on a real file system: `cargo bench -- spool` in the folder that `SPOOL_BENCH_DIR` names (or a
//! temporary one). Prints what it did beside a bare loop that overwrites a prewritten file and syncs, on the same file
//! system and in the same run: the ratio is the figure, for disks differ.

#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mailsluice::config;
use mailsluice::envelope::{Client, Envelope, Priority, Rcpt, SpoolId, UnixMillis};
use mailsluice::smtp::address::{Charset, ForwardPath, Mailbox, ReversePath};
use mailsluice::smtp::params::Notify;
use mailsluice::spool::log::Log;
use mailsluice::spool::{Durability, Op, Spool, Staged};

const BODY: usize = 10 * 1024;
/// What the bare loop overwrites: larger than a disk's own cache of writes is likely to hide.
const FLOOR_FILE: u64 = 256 * 1024 * 1024;
/// Messages that share a sync when 128 producers wait.
const BATCH: u64 = 64;

/// How large the cases are.
struct Scale {
    parallel: usize,
    serial: usize,
    floor: u64,
}

pub(crate) fn run(measured: bool) {
    let scale = match measured {
        true => Scale { parallel: 40_000, serial: 2_000, floor: FLOOR_FILE },
        false => Scale { parallel: 200, serial: 10, floor: 4 * 1024 * 1024 },
    };
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let folder =
        std::env::var_os("SPOOL_BENCH_DIR").map_or(temporary.path().to_owned(), PathBuf::from);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    println!("spool in {}, bodies of {BODY} octets", folder.display());

    let floor = Floor::prepare(&folder, scale.floor);
    let log = runtime.block_on(open(&folder.join("spool")));
    // The log makes its segments the first time round and overwrites them from then on.
    runtime.block_on(parallel(&log, scale.parallel));

    let before = (floor.rate(BATCH * BODY as u64), Cost::now());
    let began = mailsluice::clock::now();
    runtime.block_on(parallel(&log, scale.parallel));
    let (taken, cost) = (began.elapsed(), Cost::now().since(&before.1));
    let after = floor.rate(BATCH * BODY as u64);
    let bare = f64::midpoint(before.0, after) * BATCH as f64;
    report("128 producers", scale.parallel, taken, bare, &cost);

    let before = (floor.rate(BODY as u64), Cost::now());
    let began = mailsluice::clock::now();
    runtime.block_on(serial(&log, scale.serial));
    let (taken, cost) = (began.elapsed(), Cost::now().since(&before.1));
    let bare = f64::midpoint(before.0, floor.rate(BODY as u64));
    report("one in sequence", scale.serial, taken, bare, &cost);
    runtime.block_on(log.close());
    drop(std::fs::remove_dir_all(folder.join("spool")));
}

fn report(case: &str, messages: usize, taken: Duration, bare: f64, cost: &Cost) {
    let rate = messages as f64 / taken.as_secs_f64();
    let payload = (messages * BODY) as f64;
    println!(
        "{case}: {rate:.0} messages/s, {:.2} of a bare overwrite and sync ({bare:.0}/s); {:.1} µs of CPU a message; {:.3} octets written per octet",
        rate / bare,
        cost.cpu.as_secs_f64() * 1e6 / messages as f64,
        cost.written as f64 / payload,
    );
}

/// What the process has used.
struct Cost {
    cpu: Duration,
    written: u64,
}

impl Cost {
    fn now() -> Self {
        let stat = std::fs::read_to_string("/proc/self/stat").expect("/proc");
        let fields: Vec<&str> =
            stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks: u64 =
            fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum();
        let io = std::fs::read_to_string("/proc/self/io").expect("/proc");
        let written =
            io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).expect("write_bytes");
        // The kernel counts in hundredths of a second, whatever the clock of the machine.
        Self { cpu: Duration::from_millis(ticks * 10), written: written.parse().expect("a number") }
    }

    fn since(&self, earlier: &Self) -> Self {
        Self { cpu: self.cpu - earlier.cpu, written: self.written - earlier.written }
    }
}

/// A file whose blocks were all written once.
struct Floor {
    file: File,
    len: u64,
}

impl Floor {
    fn prepare(folder: &Path, len: u64) -> Self {
        let path = folder.join("floor");
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .expect("a file");
        let chunk = vec![0xa5; 1024 * 1024];
        for at in (0..len).step_by(chunk.len()) {
            file.write_all_at(&chunk, at).expect("space");
        }
        file.sync_all().expect("a sync");
        drop(std::fs::remove_file(path));
        Self { file, len }
    }

    /// Overwrites of `size` octets with a sync each, per second.
    fn rate(&self, size: u64) -> f64 {
        let chunk = vec![0x5a; usize::try_from(size).expect("it fits")];
        let rounds = (self.len / size).min(2_000);
        let began = mailsluice::clock::now();
        for round in 0..rounds {
            self.file.write_all_at(&chunk, round * size % (self.len - size)).expect("a write");
            self.file.sync_data().expect("a sync");
        }
        rounds as f64 / began.elapsed().as_secs_f64()
    }
}

async fn open(path: &Path) -> Arc<Log> {
    let config = config::Spool { path: path.to_owned(), min_free: 0, keep_failed: Duration::MAX };
    Arc::new(Log::open(&config).await.expect("a spool").0)
}

/// 128 producers; each message is done as soon as it is durable, as a consumer that keeps up would have it.
async fn parallel(log: &Arc<Log>, messages: usize) {
    let tasks: Vec<_> = (0..128)
        .map(|producer| {
            let log = Arc::clone(log);
            #[expect(clippy::disallowed_methods, reason = "every handle is joined below")]
            tokio::spawn(async move {
                for n in (producer..messages).step_by(128) {
                    one(&log, n as u64).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("a producer");
    }
}

async fn serial(log: &Log, messages: usize) {
    for n in 0..messages {
        one(log, n as u64).await;
    }
}

async fn one(log: &Log, n: u64) {
    let envelope = envelope(n);
    let id = envelope.id;
    let put = Op::Put { envelope, body: Staged::Memory(vec![b'm'; BODY]) };
    log.apply(vec![put], Durability::Durable).await.expect("a put");
    log.apply(vec![Op::Done { id }], Durability::Lazy).await.expect("a done");
}

fn envelope(n: u64) -> Envelope {
    let accepted = UnixMillis(1_795_502_531_000 + n);
    let mailbox = |text: &str| Mailbox::parse(text, Charset::Ascii).expect("an address");
    let path = ForwardPath::Mailbox(mailbox("reader@example.com"));
    Envelope {
        id: SpoolId::new(accepted),
        accepted,
        reverse_path: ReversePath::Mailbox(mailbox("reports@example.com")),
        rcpts: vec![Rcpt { path, notify: Notify::Unsaid, orcpt: None }],
        smtputf8: false,
        eight_bit: false,
        ret: None,
        envid: None,
        size: BODY as u64,
        client: Client { address: "127.0.0.1".into(), helo: "app.example.com".into() },
        priority: Priority::Normal,
        author: Some(mailbox("reports@example.com")),
        prepend: "Received: from app.example.com ([127.0.0.1])\r\n\tby relay.test (mailsluice) with ESMTP id 1;\r\n\tTue, 24 Nov 2026 06:42:11 +0000\r\n".into(),
    }
}
