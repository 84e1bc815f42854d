//! `kill -9`, full disks, and what the kernel saw.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mailsluice::config;
use mailsluice::envelope::QueueState;
use mailsluice::spool::Spool as _;
use mailsluice::spool::inspect::Inspection;
use mailsluice::spool::log::Log;
use rustix::fs::statvfs;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::support::client::{Client, stuffed};
use crate::support::gateway::{BINARY, Gateway, Setup};
use crate::support::peers::{find, is_root, need, run, skip};
use crate::support::sink::{Answer, Sink};
use crate::support::{PATIENCE, eventually, is_slow};

/// A content that is known by its token: `size` octets or a little more, with dots at line starts, 8-bit octets and
/// blanks at line ends.
fn content(token: &str, size: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(
        token.bytes().map(u64::from).fold(7, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte)),
    );
    let mut out = format!(
        "Subject: {token}\r\nFrom: a@example.com\r\nMessage-ID: <{token}@example.com>\r\nDate: Tue, 24 Nov 2026 06:42:11 +0000\r\nX-Size: {size}\r\n\r\n"
    )
    .into_bytes();
    while out.len() < size {
        out.extend_from_slice(match random.u8(0..8) {
            0 => b".",
            1 => b"..",
            2 => b"Gr\xc3\xb6\xdfe ",
            _ => b"",
        });
        let length = random.usize(0..120);
        out.extend(std::iter::repeat_with(|| random.u8(b' '..=b'~')).take(length));
        out.extend_from_slice(b" \r\n");
    }
    out
}

/// The token of a message that came out of [`content`].
#[track_caller]
fn token(content: &[u8]) -> String {
    let text = String::from_utf8_lossy(content);
    let found = text.split("Subject: ").nth(1).and_then(|rest| rest.split("\r\n").next());
    found.unwrap_or_else(|| panic!("a message without a token: {text}")).to_owned()
}

/// What the sink took, by token; every copy is byte for byte what `sizes` says was sent.
#[track_caller]
fn arrived(sink: &Sink, sizes: &BTreeMap<String, usize>) -> BTreeMap<String, usize> {
    let mut copies = BTreeMap::new();
    for taken in sink.taken() {
        let original = taken.original();
        let token = token(original);
        let size = sizes.get(&token).unwrap_or_else(|| panic!("nobody sent {token}"));
        assert!(original == content(&token, *size), "{token} ({size} octets) was changed");
        *copies.entry(token).or_default() += 1;
    }
    copies
}

/// Names in a folder of the spool.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).map(|entries| {
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    });
    entries.unwrap_or_default()
}

/// The segments of a spool, oldest first.
fn segments(spool: &Path) -> Vec<PathBuf> {
    let mut names = names(&spool.join("log"));
    names.sort();
    names.iter().map(|name| spool.join("log").join(name)).collect()
}

// --- kill -9

/// Where the clients find the gateway, and what they got from it so far.
#[derive(Default)]
struct Board {
    state: Mutex<BoardState>,
    changed: Condvar,
    /// Pulled by each client that has sent all of a message and has no reply yet.
    sent: Trigger,
}

#[derive(Default)]
struct BoardState {
    address: Option<SocketAddr>,
    /// Counts the gateways: a port may come again.
    run: usize,
    is_over: bool,
    /// Since the address was set.
    accepted: usize,
}

impl Board {
    fn open(&self, address: SocketAddr) {
        let mut state = self.state.lock().unwrap();
        (state.address, state.accepted) = (Some(address), 0);
        state.run += 1;
        self.changed.notify_all();
    }

    fn end(&self) {
        self.state.lock().unwrap().is_over = true;
        self.changed.notify_all();
    }

    fn count(&self) {
        self.state.lock().unwrap().accepted += 1;
        self.changed.notify_all();
    }

    /// Waits until so many were accepted since the gateway started.
    #[track_caller]
    fn wait(&self, accepted: usize) {
        let state = self.state.lock().unwrap();
        let (_state, waited) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| state.accepted < accepted)
            .unwrap();
        assert!(!waited.timed_out(), "{accepted} messages were not accepted within {PATIENCE:?}");
    }

    /// The first gateway after the run `last`, or the end.
    fn next(&self, last: usize) -> Option<(usize, SocketAddr)> {
        let state = self.state.lock().unwrap();
        let waits = |state: &mut BoardState| !state.is_over && state.run == last;
        let state = self.changed.wait_while(state, waits).unwrap();
        state.address.filter(|_| !state.is_over).map(|address| (state.run, address))
    }
}

/// Kills the gateway when it was pulled so many times.
#[derive(Default)]
struct Trigger(Mutex<Option<(usize, u32)>>);

impl Trigger {
    fn arm(&self, pulls: usize, pid: u32) {
        *self.0.lock().unwrap() = Some((pulls, pid));
    }

    fn pull(&self) {
        let mut armed = self.0.lock().unwrap();
        match *armed {
            Some((pulls, pid)) if pulls > 1 => *armed = Some((pulls - 1, pid)),
            Some((_, pid)) => {
                *armed = None;
                kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
            }
            None => {}
        }
    }
}

/// How far a message came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It got its 250.
    Accepted,
    /// All of it was sent, and no reply came.
    Unsure,
    /// Its end was never sent, or it was refused because the gateway closes.
    Unfinished,
}

/// One client's records: token, size, fate.
type Sent = Vec<(String, usize, Fate)>;

/// Sends messages until the board says it is over, each on the gateway that is there at the time.
fn send_until_over(board: &Board, name: usize) -> Sent {
    let mut random = fastrand::Rng::with_seed(name as u64);
    let mut sent = Sent::new();
    let mut last = 0;
    while let Some((run, address)) = board.next(last) {
        last = run;
        let Ok(stream) = TcpStream::connect(address) else { continue };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut line = Reader::new(&stream);
        let hello = || -> Result<(), Gone> {
            line.expect("220")?;
            (&stream).write_all(b"EHLO client.test\r\n")?;
            line.expect("250")
        };
        if { hello }().is_err() {
            continue;
        }
        loop {
            let size = match random.u8(0..24) {
                0 => random.usize(1_100_000..1_300_000),
                1..=6 => random.usize(20_000..100_000),
                _ => random.usize(1_000..20_000),
            };
            let token = format!("client{name}-{}", sent.len());
            let fate = offer(board, &stream, &mut line, &token, size);
            if fate == Fate::Accepted {
                board.count();
            }
            sent.push((token, size, fate));
            if fate != Fate::Accepted || board.state.lock().unwrap().is_over {
                break;
            }
        }
    }
    sent
}

/// One transaction, as far as the gateway lives.
fn offer(
    board: &Board,
    mut stream: &TcpStream,
    line: &mut Reader<'_>,
    token: &str,
    size: usize,
) -> Fate {
    let bytes = stuffed(&content(token, size));
    let (most, end) = bytes.split_at(bytes.len() - 5);
    let mut begin = || -> Result<(), Gone> {
        for (command, code) in [
            (format!("MAIL FROM:<{token}@example.com>\r\n"), "250"),
            ("RCPT TO:<b@example.org>\r\n".to_owned(), "250"),
            ("DATA\r\n".to_owned(), "354"),
        ] {
            stream.write_all(command.as_bytes())?;
            line.expect(code)?;
        }
        stream.write_all(most)?;
        Ok(stream.write_all(end)?)
    };
    if begin().is_err() {
        return Fate::Unfinished;
    }
    board.sent.pull();
    match line.expect("250") {
        Ok(()) => Fate::Accepted,
        Err(Gone::Dead) => Fate::Unsure,
        Err(Gone::Closing) => Fate::Unfinished,
    }
}

/// Why a reply did not come.
#[derive(Debug)]
enum Gone {
    /// The connection ended.
    Dead,
    /// 421: the gateway sends everyone away.
    Closing,
}

impl From<std::io::Error> for Gone {
    fn from(_: std::io::Error) -> Self {
        Self::Dead
    }
}

/// Reads replies from a gateway that may die at any time.
struct Reader<'a> {
    stream: &'a TcpStream,
    bytes: Vec<u8>,
}

impl<'a> Reader<'a> {
    fn new(stream: &'a TcpStream) -> Self {
        Self { stream, bytes: Vec::new() }
    }

    /// Reads a reply. A whole reply of a code that is neither this nor 421 is a failure of the test.
    #[track_caller]
    fn expect(&mut self, code: &str) -> Result<(), Gone> {
        loop {
            while let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                let text = String::from_utf8_lossy(&line);
                if text.starts_with("421 ") {
                    return Err(Gone::Closing);
                }
                assert!(text.starts_with(code), "{code} expected, got {text}");
                if line.get(3) != Some(&b'-') {
                    return Ok(());
                }
            }
            let mut piece = [0; 1024];
            match self.stream.read(&mut piece) {
                Ok(n) if n > 0 => self.bytes.extend_from_slice(&piece[..n]),
                _ => return Err(Gone::Dead),
            }
        }
    }
}

/// The messages that wait for an operator in a spool that nobody has: id by token.
fn held(spool: &Path) -> BTreeMap<String, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let config = config::Spool {
            path: spool.to_owned(),
            min_free: 0,
            keep_failed: Duration::from_secs(7 * 24 * 60 * 60),
        };
        let (log, _) = Log::open(&config).await.unwrap();
        let mut held = BTreeMap::new();
        for head in log.heads(None, usize::MAX) {
            assert_eq!(head.state, QueueState::Held);
            let stored = log.open(head.id).await.unwrap();
            let mut reader = stored.body.reader();
            let start = reader.chunk().await.unwrap().unwrap();
            held.insert(token(&start), head.id.to_string());
        }
        log.close().await;
        held
    })
}

/// Messages in flight at once in the tests below.
const IN_FLIGHT: usize = 4;
const CLIENTS: usize = 8;

/// Eight clients that send to whatever gateway is there, and an upstream that takes its time, so that some attempts are
/// under way at any moment.
struct Load {
    setup: Setup,
    folder: TempDir,
    sink: Sink,
    /// Pulled by the sink when it has all of a message and has not answered.
    taken: Arc<Trigger>,
    board: Arc<Board>,
    clients: Vec<JoinHandle<Sent>>,
    ends: Vec<End>,
}

/// What a gateway left behind.
struct End {
    /// How many messages the sink had taken.
    taken: usize,
    /// The ids that it has accepted, those that it has called in doubt, and those that it says were sent: as far as its
    /// log goes, of which a kill takes the last moments.
    accepted: BTreeSet<String>,
    in_doubt: BTreeSet<String>,
    delivered: BTreeSet<String>,
    /// What the next start will find: the ids of open attempts.
    open: BTreeSet<String>,
    /// The ids that the spool says may have been taken once.
    maybe_sent: BTreeSet<String>,
}

/// What became of all that was sent.
struct Tally {
    duplicates: usize,
    accepted: usize,
}

impl Load {
    fn new() -> Self {
        let taken = Arc::new(Trigger::default());
        let pulled = Arc::clone(&taken);
        let sink = Sink::scripted(move |ask| {
            if ask.is_content() {
                pulled.pull();
                std::thread::park_timeout(Duration::from_millis(10));
            }
            match ask.is("RCPT") && ask.mails.is_multiple_of(7) {
                true => Answer::reply("450 4.2.1 later"),
                false => Answer::Usual,
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let setup = Setup::to(sink.address)
            .spool(&folder.path().join("spool"))
            .set("throttle", &format!("concurrency = {IN_FLIGHT}"))
            .set("log", "level = \"info\"");
        let board = Arc::new(Board::default());
        let client = |name| {
            let board = Arc::clone(&board);
            std::thread::spawn(move || send_until_over(&board, name))
        };
        let clients = (0..CLIENTS).map(client).collect();
        Self { setup, folder, sink, taken, board, clients, ends: Vec::new() }
    }

    fn spool(&self) -> PathBuf {
        self.folder.path().join("spool")
    }

    /// Notes what a gateway left behind when it ended. Nothing of its attempts is under way after that.
    fn note_end(&mut self, gateway: &Gateway) {
        self.sink.wait_idle();
        let events = gateway.events();
        let named = |name: &str| {
            let events = events.iter().filter(|event| event["event"] == name);
            events.map(|event| event["id"].as_str().unwrap().to_owned()).collect()
        };
        let (mut open, mut maybe_sent) = (BTreeSet::new(), BTreeSet::new());
        // A first start that was killed early leaves none.
        if self.spool().join("log").is_dir() {
            let spool = Inspection::open(&self.spool()).unwrap();
            for head in spool.heads() {
                let id = head.id.to_string();
                if !spool.read(head.id).unwrap().progress.doubtful.is_empty() {
                    maybe_sent.insert(id.clone());
                }
                if head.in_doubt {
                    open.insert(id);
                }
            }
        }
        self.ends.push(End {
            taken: self.sink.count(),
            accepted: named("accepted"),
            in_doubt: named("in_doubt"),
            delivered: named("delivered"),
            open,
            maybe_sent,
        });
    }

    /// Ends the load, lets a last gateway deliver what is left, and says what became of it all: nothing that was
    /// accepted is lost, nothing is changed, nothing is sent whose end never came, nothing twice by the same gateway.
    #[track_caller]
    fn finish(mut self, what: &str) -> Tally {
        self.board.end();
        let clients = std::mem::take(&mut self.clients);
        let sent: Sent = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
        let mut gateway = self.setup.start();
        gateway.wait_empty();
        gateway.terminate();
        assert!(gateway.wait_exit().success(), "{}", gateway.log_text());
        self.note_end(&gateway);

        let sizes = sent.iter().map(|(token, size, _)| (token.clone(), *size)).collect();
        let copies = arrived(&self.sink, &sizes);
        let of = |wanted| sent.iter().filter(move |(_, _, fate)| *fate == wanted);
        // What was in flight at two deaths is in doubt twice, and waits for a person. Nothing else does.
        let held = held(&self.spool());
        let idle: Vec<_> = held.iter().filter(|(_, id)| !self.is_in_doubt_twice(id)).collect();
        let is_lost = |token: &String| !copies.contains_key(token) && !held.contains_key(token);
        let lost: Vec<_> = of(Fate::Accepted).filter(|(token, _, _)| is_lost(token)).collect();
        let phantoms: Vec<_> =
            of(Fate::Unfinished).filter(|(token, _, _)| copies.contains_key(token)).collect();
        let duplicates = copies.values().map(|copies| copies - 1).sum();
        let accepted = of(Fate::Accepted).count();
        println!(
            "{what}, {CLIENTS} clients: {accepted} accepted, {} unsure, {} unfinished; lost {}, held {}, duplicates {duplicates}, never finished and yet sent {}",
            of(Fate::Unsure).count(),
            of(Fate::Unfinished).count(),
            lost.len(),
            held.len(),
            phantoms.len()
        );
        assert!(lost.is_empty(), "accepted and lost: {lost:?}");
        for (token, id) in &idle {
            println!("{token} ({id}):{}", self.history(id));
        }
        assert!(idle.is_empty(), "held without having been in doubt twice: {idle:?}");
        assert!(phantoms.is_empty(), "never finished, and sent: {phantoms:?}");
        self.expect_duplicates_of_deaths_only();
        let spool = self.spool();
        assert_eq!(names(&spool.join("tmp")).len(), 0);
        assert!(names(&spool.join("bodies")).len() <= held.len());
        Tally { duplicates, accepted }
    }

    /// No gateway sends a message twice, and after each death no more is repeated than was in flight at the deaths so
    /// far. What is repeated was marked on disk at the death before, and a gateway has told of the doubt before the
    /// message went out again.
    #[track_caller]
    fn expect_duplicates_of_deaths_only(&self) {
        let taken = self.sink.taken();
        // Which gateway has sent it last, by token.
        let mut before = BTreeMap::new();
        let (mut from, mut repeated) = (0, 0);
        for (now, end) in self.ends.iter().enumerate() {
            for taken in &taken[from..end.taken] {
                let token = token(taken.original());
                let Some(last) = before.insert(token.clone(), now) else { continue };
                repeated += 1;
                let id = taken.id();
                let history =
                    || format!("{token} ({id}), sent by {last} and {now}:{}", self.history(&id));
                assert!(last != now, "twice from one gateway: {}", history());
                assert!(self.ends[last].open.contains(&id), "no mark: {}", history());
                let told = self.ends[last + 1..=now].iter().any(|end| end.in_doubt.contains(&id));
                assert!(told, "in silence: {}", history());
            }
            assert!(repeated <= IN_FLIGHT * now, "{repeated} duplicates of {now} deaths");
            from = end.taken;
        }
    }

    /// Whether an attempt was open at the end of one gateway, and another at the end of a later one that knew of the
    /// first.
    fn is_in_doubt_twice(&self, id: &str) -> bool {
        let first = self.ends.iter().position(|end| end.open.contains(id));
        let later = first.map_or(&[][..], |first| &self.ends[first + 1..]);
        later.iter().any(|end| end.open.contains(id) && end.maybe_sent.contains(id))
    }

    /// What each gateway and the spool said of a message.
    fn history(&self, id: &str) -> String {
        let mut text = String::new();
        for (n, end) in self.ends.iter().enumerate() {
            let what = [
                ("accepted it", &end.accepted),
                ("called it in doubt", &end.in_doubt),
                ("delivered it", &end.delivered),
                ("left it with an open mark", &end.open),
                ("left it as maybe sent", &end.maybe_sent),
            ];
            for (what, _) in what.iter().filter(|(_, ids)| ids.contains(id)) {
                text.push_str(&format!("\n  gateway {n} {what}"));
            }
            if end.accepted.is_empty() && end.in_doubt.is_empty() && end.delivered.is_empty() {
                text.push_str(&format!("\n  (gateway {n} has logged nothing of any message)"));
            }
        }
        text
    }
}

/// When a gateway is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// So many were accepted.
    Accepted(usize),
    /// A thread is about to make one of these system calls for the nth time, on this folder of the spool or on anything.
    Before(&'static str, Option<&'static str>, usize),
    /// A thread has made one of these system calls for the nth time, and has not done anything since.
    After(&'static str, usize),
    /// So many times a client has sent all of a message and has no reply.
    Sent(usize),
    /// So many times the upstream has all of a message and has not answered.
    Taken(usize),
}

impl Moment {
    /// The named points in turn, early or late as it happens.
    fn named(n: usize, random: &mut fastrand::Rng) -> Self {
        match n % 10 {
            0 => Self::Before("fdatasync", None, random.usize(2..30)),
            1 => Self::After("fdatasync", random.usize(2..30)),
            // Half of them replies to clients, half of them commands to the upstream.
            2 | 9 => Self::Before("sendto", None, random.usize(10..80)),
            3 => Self::Before("?rename,?renameat,?renameat2", None, 1),
            4 => Self::Before("pwrite64", None, random.usize(2..40)),
            5 => Self::Before("fsync", Some("bodies"), 1),
            6 => Self::Before("connect", None, 1),
            7 => Self::Sent(random.usize(1..40)),
            _ => Self::Taken(random.usize(1..40)),
        }
    }

    fn needs_strace(self) -> bool {
        matches!(self, Self::Before(..) | Self::After(..))
    }

    /// What to run the gateway under.
    fn wrapper(self, spool: &Path, trace: &Path) -> Vec<String> {
        let (calls, folder, inject) = match self {
            Self::Before(calls, folder, nth) => {
                (calls, folder, format!("inject={calls}:signal=SIGKILL:when={nth}"))
            }
            // Long enough for us to see it and to kill.
            Self::After(calls, nth) => {
                (calls, None, format!("inject={calls}:delay_exit=5000000:when={nth}"))
            }
            Self::Accepted(_) | Self::Sent(_) | Self::Taken(_) => return Vec::new(),
        };
        let trace = trace.to_str().unwrap();
        // The gateway stays our own child.
        let mut words = vec!["strace", "-f", "-D", "-y", "-o", trace];
        let filter = format!("trace={calls}");
        words.extend(["-e", &filter, "-e", &inject]);
        let folder = folder.map(|folder| spool.join(folder));
        if let Some(folder) = &folder {
            words.extend(["-P", folder.to_str().unwrap()]);
        }
        words.into_iter().map(str::to_owned).collect()
    }

    /// Runs the gateway to its death under the load; what it was doing when it died.
    #[track_caller]
    fn kill(self, load: &mut Load) -> String {
        let folder = tempfile::tempdir().unwrap();
        let trace = folder.path().join("trace");
        let wrapper = self.wrapper(&load.spool(), &trace);
        let words: Vec<&str> = wrapper.iter().map(String::as_str).collect();
        let mut gateway = load.setup.clone().under(&words).spawn();
        // It may die before it listens.
        let address = eventually("the gateway to listen, or to die", || {
            let event = gateway
                .events()
                .into_iter()
                .find(|event| event["event"] == "listening" && event["protocol"] == "smtp");
            let address = event.map(|event| event["address"].as_str().unwrap().parse().unwrap());
            (address.is_some() || gateway.has_ended()).then_some(address)
        });
        if let Some(address) = address {
            assert_eq!(names(&load.spool().join("tmp")).len(), 0, "left over from the one before");
            load.board.open(address);
        }
        let text = || String::from_utf8_lossy(&fs::read(&trace).unwrap_or_default()).into_owned();
        match self {
            Self::Accepted(n) => {
                load.board.wait(n);
                gateway.signal("KILL");
            }
            Self::After(..) => {
                eventually("the system call", || text().contains("(DELAYED)").then_some(()));
                gateway.signal("KILL");
            }
            Self::Sent(n) => load.board.sent.arm(n, gateway.pid()),
            Self::Taken(n) => load.taken.arm(n, gateway.pid()),
            Self::Before(..) => {}
        }
        let status = gateway.wait_exit();
        assert_eq!(status.signal(), Some(9), "{status}");
        load.note_end(&gateway);
        let text = text();
        match self {
            Self::Before(calls, ..) => format!("before {}", last_of(&text, calls)),
            Self::After(calls, _) => format!("after {}", last_of(&text, calls)),
            Self::Accepted(_) => "at random".to_owned(),
            Self::Sent(_) => "all of a message sent, no reply".to_owned(),
            Self::Taken(_) => "the upstream has all of a message, no answer".to_owned(),
        }
    }
}

/// The start of the last of these calls in a trace.
#[track_caller]
fn last_of(trace: &str, calls: &str) -> String {
    let starts: Vec<_> = calls.split(',').map(|it| format!("{}(", it.trim_matches('?'))).collect();
    let mut texts = trace.lines().filter_map(|line| Some(line.split_once(' ')?.1.trim_start()));
    let last = texts.rfind(|text| starts.iter().any(|start| text.starts_with(start)));
    let last = last.unwrap_or_else(|| panic!("no {calls} in the trace:\n{trace}"));
    last.chars().take(120).collect()
}

/// Whether system calls can be traced here; if not, the test says so.
#[track_caller]
fn can_trace() -> bool {
    if !need("strace") {
        return false;
    }
    let probe = Command::new("strace").args(["-D", "-o", "/dev/null", "true"]).output().unwrap();
    if !probe.status.success() {
        skip("strace may not trace here");
    }
    probe.status.success()
}

#[test]
fn kill_9_under_load_loses_nothing_and_repeats_no_more_than_was_in_flight() {
    let (at_random, named) = if is_slow() { (23, 27) } else { (3, 9) };
    let can_trace = can_trace();
    let mut load = Load::new();
    let mut random = fastrand::Rng::with_seed(9);
    let mut moments: Vec<_> = (0..named).map(|n| Moment::named(n, &mut random)).collect();
    moments.retain(|moment| can_trace || !moment.needs_strace());
    moments.extend((0..at_random).map(|_| Moment::Accepted(random.usize(3..40))));
    random.shuffle(&mut moments);
    let deaths = moments.len();
    for moment in moments {
        let died = moment.kill(&mut load);
        println!("{moment:?}: {died}");
    }
    let tally = load.finish(&format!("{deaths} kills"));
    assert!(tally.accepted >= deaths, "there was no load");
}

#[test]
fn what_is_half_sent_at_a_kill_is_never_delivered() {
    let folder = tempfile::tempdir().unwrap();
    let spool = folder.path().join("spool");
    let sink = Sink::new();
    let setup = Setup::to(sink.address).spool(&spool);
    for size in [9_000, 1_200_000] {
        let gateway = setup.start();
        let mut client = Client::hello(gateway.smtp());
        client.command("MAIL FROM:<a@example.com>", 250);
        client.command("RCPT TO:<b@example.org>", 250);
        client.command("DATA", 354);
        client.send(content("half", size));
        if size > 1_048_576 {
            let tmp = spool.join("tmp");
            eventually("the content to be on its way to disk", || names(&tmp).pop());
        }
        gateway.kill();
        let gateway = setup.start();
        assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"queued\"}"), 0.0);
        assert_eq!(names(&spool.join("tmp")).len() + names(&spool.join("bodies")).len(), 0);
        gateway.stop();
    }
    assert_eq!(sink.count(), 0);
}

#[test]
fn sigterm_under_load_loses_nothing_and_repeats_nothing() {
    let stops = if is_slow() { 20 } else { 4 };
    let mut load = Load::new();
    let mut random = fastrand::Rng::with_seed(15);
    for _ in 0..stops {
        let mut gateway = load.setup.start();
        load.board.open(gateway.smtp());
        load.board.wait(random.usize(3..40));
        gateway.terminate();
        let status = gateway.wait_exit();
        assert!(status.success(), "{status}:\n{}", gateway.log_text());
        load.note_end(&gateway);
    }
    let tally = load.finish(&format!("{stops} SIGTERM"));
    assert_eq!(tally.duplicates, 0);
    assert!(tally.accepted >= stops, "there was no load");
}

#[test]
fn an_attempt_that_a_kill_cut_off_is_in_doubt_after_the_restart() {
    let spool = tempfile::tempdir().unwrap();
    let asked = Arc::new(AtomicBool::new(false));
    let killed = Arc::new(AtomicBool::new(false));
    let sink = Sink::scripted({
        let (asked, killed) = (Arc::clone(&asked), Arc::clone(&killed));
        move |ask| {
            let began = Instant::now();
            let is_first = ask.is_content() && !asked.swap(true, Ordering::SeqCst);
            while is_first && !killed.load(Ordering::SeqCst) && began.elapsed() < PATIENCE {
                std::thread::park_timeout(Duration::from_millis(5));
            }
            Answer::Usual
        }
    });
    let setup = Setup::to(sink.address)
        .spool(&spool.path().join("spool"))
        .set("throttle", "concurrency = 1");
    let gateway = setup.start();
    let mut client = Client::hello(gateway.smtp());
    client.mail("cut@example.com", &["b@example.org"], content("cut", 2_000));
    eventually("the answer to the dot to be awaited", || {
        asked.load(Ordering::SeqCst).then_some(())
    });
    client.mail("waiting@example.com", &["b@example.org"], content("waiting", 2_000));
    assert_eq!(gateway.metric("mailsluice_in_doubt_total"), 0.0);
    gateway.kill();
    killed.store(true, Ordering::SeqCst);
    sink.wait(1);

    let gateway = setup.start();
    gateway.wait_event("in_doubt", |event| event["to"] == "b@example.org");
    sink.wait(3);
    gateway.wait_empty();
    assert_eq!(gateway.metric("mailsluice_in_doubt_total"), 1.0, "the other was not being sent");
    gateway.stop();
    let gateway = setup.start();
    gateway.wait_empty();
    assert_eq!(gateway.metric("mailsluice_in_doubt_total"), 0.0);
    gateway.stop();
    let sizes = ["cut", "waiting"].map(|token| (token.to_owned(), 2_000)).into();
    let copies = [("cut".to_owned(), 2), ("waiting".to_owned(), 1)].into();
    assert_eq!(arrived(&sink, &sizes), copies);
}

// --- what the kernel saw

/// One system call of a trace. Positions count the events of the trace, so they order what several threads did.
#[derive(Debug)]
struct Call {
    begun: usize,
    ended: usize,
    text: String,
}

impl Call {
    fn is(&self, name: &str) -> bool {
        self.text.strip_prefix(name).is_some_and(|rest| rest.starts_with('('))
    }

    fn result(&self) -> &str {
        self.text.rsplit_once(" = ").map_or("", |(_, result)| result.trim())
    }

    /// The path of the descriptor that is the first argument, as `strace -y` says.
    fn file(&self) -> &str {
        let inner = self.text.split_once('<').and_then(|(_, rest)| rest.split_once('>'));
        inner.map_or("", |(path, _)| path)
    }
}

fn parse_trace(text: &str) -> Vec<Call> {
    let mut calls = Vec::new();
    let mut open = HashMap::new();
    for (at, line) in text.lines().enumerate() {
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        let rest = rest.trim_start();
        if let Some(start) = rest.strip_suffix(" <unfinished ...>") {
            open.insert(thread, (at, start));
        } else if let Some(resumed) = rest.strip_prefix("<... ") {
            let Some((begun, start)) = open.remove(thread) else { continue };
            let end = resumed.split_once(" resumed>").map_or("", |(_, end)| end);
            calls.push(Call { begun, ended: at, text: format!("{start}{end}") });
        } else if rest.contains('(') {
            calls.push(Call { begun: at, ended: at, text: rest.to_owned() });
        }
    }
    calls
}

/// The first call of that name on `file` that began after the event `after`, and worked.
#[track_caller]
fn synced<'a>(calls: &'a [Call], name: &str, file: &str, after: usize) -> &'a Call {
    let found = calls.iter().find(|call| {
        call.is(name) && call.file() == file && call.begun > after && call.result() == "0"
    });
    found.unwrap_or_else(|| panic!("no {name} of {file} after event {after}"))
}

#[test]
fn every_250_is_written_after_the_sync_that_covers_it() {
    if !can_trace() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let sink = Sink::new();
    let gateway = Setup::to(sink.address)
        .set("log", "level = \"info\"")
        .under(&[
            "strace",
            "-f",
            // The gateway stays our own child, and gets our signals.
            "-D",
            "-y",
            "-s",
            "2000000",
            "-e",
            "trace=fdatasync,fsync,pwrite64,?pwritev,write,writev,sendto,sendmsg,?rename,?renameat,?renameat2",
            "-o",
            trace.to_str().unwrap(),
        ])
        .start();
    let address = gateway.smtp();
    let clients: Vec<_> = (0..5)
        .map(|name| {
            std::thread::spawn(move || {
                let mut client = Client::hello(address);
                let mut accepted = Vec::new();
                for n in 0..10 {
                    let is_large = n % 5 == 4;
                    let token = format!("traced-{name}-{n}");
                    let size = if is_large { 1_100_000 } else { 2_000 };
                    let id =
                        client.mail("a@example.com", &["b@example.org"], content(&token, size));
                    accepted.push((id, is_large));
                }
                accepted
            })
        })
        .collect();
    let accepted: Vec<_> = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
    gateway.stop();

    let text = String::from_utf8_lossy(&fs::read(&trace).unwrap()).into_owned();
    let calls = parse_trace(&text);
    let is_reply = |call: &&Call| {
        ["sendto", "sendmsg", "write", "writev"].iter().any(|name| call.is(name))
            && call.file().starts_with("socket:")
            && call.text.contains("250 2.0.0 Ok: queued as ")
    };
    let replies: Vec<_> = calls.iter().filter(is_reply).collect();
    assert_eq!(replies.len(), accepted.len(), "a reply for each message, and no other");
    for (id, is_large) in &accepted {
        let reply = replies
            .iter()
            .find(|call| call.text.contains(&format!("queued as {id}")))
            .unwrap_or_else(|| panic!("no reply for {id}"));
        // The record has the Received line, and that the id.
        let record = calls
            .iter()
            .find(|call| {
                call.is("pwrite64")
                    && call.file().ends_with(".seg")
                    && call.text.contains(&format!(" id {id};"))
            })
            .unwrap_or_else(|| panic!("no record of {id} was written before its 250"));
        let segment = record.file();
        let sync = synced(&calls, "fdatasync", segment, record.ended);
        assert!(sync.ended < reply.begun, "{id}: {reply:?} before the sync of its record");

        // The name of the segment.
        let (log, name) = segment.rsplit_once('/').unwrap();
        let renamed = calls.iter().find(|call| {
            call.text.starts_with("rename") && call.text.contains(name) && call.result() == "0"
        });
        let named = synced(&calls, "fsync", log, renamed.unwrap().ended);
        assert!(named.ended < reply.begun, "{id}: 250 before the name of its segment was synced");
        assert!(named.ended < record.begun);

        let side_file = side_file(record, id);
        assert_eq!(side_file.is_some(), *is_large, "{id}: {side_file:?}");
        if let Some(name) = side_file {
            let of = |call: &&Call| call.is("pwrite64") && call.file().ends_with(&name);
            let pieces: Vec<_> = calls.iter().filter(of).collect();
            let last = pieces.iter().map(|call| call.ended).max().expect("the content is written");
            let sync = synced(&calls, "fdatasync", pieces[0].file(), last);
            let renamed = calls
                .iter()
                .find(|call| call.text.starts_with("rename") && call.text.contains(&name))
                .unwrap_or_else(|| panic!("{name} was not renamed"));
            assert_eq!(renamed.result(), "0");
            assert!(sync.ended < renamed.begun, "{name} was moved before it was synced");
            let bodies = log.strip_suffix("/log").unwrap().to_owned() + "/bodies";
            let named = synced(&calls, "fsync", &bodies, renamed.ended);
            assert!(named.ended < record.begun, "{id}: its record before the name of its content");
        }
    }
    println!("{} replies, each after its sync; {} events", replies.len(), calls.len());
}

#[test]
fn a_hundred_clients_share_syncs_and_no_sync_is_needless() {
    if !can_trace() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let gateway = Setup::none("hold")
        .set("log", "level = \"info\"")
        .under(&[
            "strace",
            "-f",
            "-D",
            "-y",
            "-s",
            "2000000",
            "-e",
            "trace=fdatasync,pwrite64,?pwritev,?pwritev2,write",
            // A slow disk, whatever the real one is: those that come meanwhile make the next batch.
            "-e",
            "inject=fdatasync:delay_enter=100000",
            "-o",
            trace.to_str().unwrap(),
        ])
        .start();
    let address = gateway.smtp();
    let ready = Arc::new(Barrier::new(100));
    let clients: Vec<_> = (0..100)
        .map(|name| {
            let ready = Arc::clone(&ready);
            std::thread::spawn(move || {
                let mut client = Client::hello(address);
                ready.wait();
                let mail = |n| {
                    let content = content(&format!("shared-{name}-{n}"), 600);
                    client.mail("a@example.com", &["b@example.org"], content)
                };
                (0..4).map(mail).collect::<Vec<_>>()
            })
        })
        .collect();
    let accepted: Vec<_> = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
    gateway.kill();

    let text = String::from_utf8_lossy(&fs::read(&trace).unwrap()).into_owned();
    let calls = parse_trace(&text);
    let of_log = |call: &&Call| call.file().ends_with(".seg");
    let writes: Vec<_> = calls.iter().filter(of_log).filter(|call| !call.is("fdatasync")).collect();
    // The record has the Received line, and that the id.
    let written = |id: &String| {
        let words = format!(" id {id};");
        let write = writes.iter().find(|call| call.text.contains(&words));
        write.unwrap_or_else(|| panic!("no record of {id} was written before its 250"))
    };
    let batches: Vec<(&str, usize)> =
        accepted.iter().map(written).map(|call| (call.file(), call.ended)).collect();
    let first = batches.iter().map(|(_, ended)| *ended).min().unwrap();
    let syncs = calls.iter().filter(of_log);
    let syncs: Vec<_> = syncs.filter(|call| call.is("fdatasync") && call.begun > first).collect();
    let mut covered = 0;
    let mut shares = Vec::new();
    for sync in &syncs {
        let is_covered = |batch: &&(&str, usize)| batch.0 == sync.file() && batch.1 < sync.begun;
        let now = batches.iter().filter(is_covered).count();
        shares.push(now - covered);
        covered = now;
    }
    println!("{} messages by {} syncs, which cover {shares:?}", accepted.len(), syncs.len());
    assert_eq!(covered, accepted.len(), "accepted, and not covered by a sync");
    assert!(shares.iter().all(|share| *share > 0), "a sync without a message: {shares:?}");
    assert!(accepted.len() >= 20 * syncs.len(), "fewer than 20 messages share a sync");
}

/// The side file that the record of `id` names. Each record's envelope is one JSON text, which starts with `at`.
fn side_file(batch: &Call, id: &str) -> Option<String> {
    let (_, rest) = batch.text.split_once(&format!(" id {id};"))?;
    let own = rest.split("{\\\"at\\\":").next()?;
    let (_, name) = own.split_once("\\\"file\\\":{\\\"name\\\":\\\"")?;
    name.split('\\').next().map(str::to_owned)
}

// --- full disks

/// A file system of eight megabytes; unmounted when it goes.
struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// None where mounting is not permitted.
    fn mount() -> Option<Self> {
        Self::mounted(&["-t", "tmpfs", "-o", "size=8m", "tmpfs"])
    }

    fn mounted(how: &[&str]) -> Option<Self> {
        if !is_root() {
            println!("skipped: mounting a small file system needs root");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let mount = Command::new("mount").args(how).arg(folder.path()).output();
        if !mount.is_ok_and(|mount| mount.status.success()) {
            println!("skipped: mounting a small file system is not permitted");
            return None;
        }
        Some(Self { folder })
    }

    fn spool(&self) -> PathBuf {
        self.folder.path().join("spool")
    }

    /// Takes all space that is left.
    fn fill(&self) {
        let mut filler = File::create(self.filler()).unwrap();
        while filler.write_all(&[0; 4096]).is_ok() {}
    }

    fn filler(&self) -> PathBuf {
        self.folder.path().join("filler")
    }

    fn empty(&self) {
        fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmount = Command::new("umount").arg("-l").arg(self.folder.path()).status();
        if !unmount.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.folder.path().display());
        }
    }
}

#[test]
fn on_a_file_system_that_copies_on_write_min_free_counts_twice_and_that_is_said() {
    if !need("mkfs.btrfs") {
        return;
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(128 << 20).unwrap();
    run(Command::new(find("mkfs.btrfs").unwrap()).arg("-q").arg(image.path()));
    let Some(disk) = SmallDisk::mounted(&["-o", "loop", image.path().to_str().unwrap()]) else {
        return;
    };
    let space = statvfs(disk.folder.path()).unwrap();
    let floor = space.f_bavail * space.f_frsize * 2 / 3;
    for (min_free, reply) in [(floor, 452), (1_000_000, 250)] {
        let sink = Sink::new();
        let setup = Setup::to(sink.address)
            .spool(&disk.spool())
            .set("spool", &format!("min_free = \"{min_free}B\""));
        let gateway = setup.start();
        let mut client = Client::hello(gateway.smtp());
        client.command("MAIL FROM:<a@example.com>", reply);
        drop(client);
        if reply == 250 {
            assert!(offer_or_452(gateway.smtp(), "copied", 300_000));
            sink.wait(1);
        }
        gateway.wait_log("copies on write");
        let config = gateway.folder().join("mailsluice.toml");
        let said = run(Command::new(BINARY).args(["check", "--config"]).arg(config));
        assert!(said.contains(&format!("below {} free octets", 2 * min_free)), "{said}");
        gateway.stop();
    }
}

/// An upstream that sends everyone away until it is opened.
fn closed_sink() -> (Sink, Arc<AtomicBool>) {
    let open = Arc::new(AtomicBool::new(false));
    let is_open = Arc::clone(&open);
    let sink =
        Sink::scripted(move |ask| match ask.is_greeting() && !is_open.load(Ordering::SeqCst) {
            true => Answer::reply("421 4.3.2 closed"),
            false => Answer::Usual,
        });
    (sink, open)
}

/// Offers one message and says whether it was accepted; anything but 250 and `452 4.3.1` is a failure.
#[track_caller]
fn offer_or_452(address: SocketAddr, token: &str, size: usize) -> bool {
    let mut client = Client::hello(address);
    for command in ["MAIL FROM:<a@example.com>", "RCPT TO:<b@example.org>"] {
        client.send(format!("{command}\r\n"));
        let reply = client.reply().unwrap();
        if !reply.starts_with("250") {
            assert!(reply.starts_with("452 4.3.1 "), "{command}: {reply}");
            return false;
        }
    }
    client.command("DATA", 354);
    client.send(stuffed(&content(token, size)));
    let reply = client.reply().unwrap();
    assert!(reply.starts_with("250 2.0.0 ") || reply.starts_with("452 4.3.1 "), "{reply}");
    reply.starts_with("250")
}

/// Waits until mail is accepted again, and returns the token of the message that was.
#[track_caller]
fn accepted_again(gateway: &Gateway, sizes: &mut BTreeMap<String, usize>) -> String {
    let mut n = 0;
    eventually("mail to be accepted again", || {
        n += 1;
        let token = format!("again-{n}");
        let accepted = offer_or_452(gateway.smtp(), &token, 1_000);
        sizes.insert(token.clone(), 1_000);
        accepted.then_some(token)
    })
}

/// Exactly these arrived, each once.
#[track_caller]
fn expect_once(sink: &Sink, sizes: &BTreeMap<String, usize>, accepted: &BTreeSet<String>) {
    let copies = arrived(sink, sizes);
    assert_eq!(&copies.keys().cloned().collect::<BTreeSet<_>>(), accepted);
    assert!(copies.values().all(|copies| *copies == 1), "{copies:?}");
}

/// Fills a small disk by mail while the upstream is closed, opens it, and expects all to go on by itself.
fn fill_by_mail(min_free: &str, size: usize) {
    let Some(disk) = SmallDisk::mount() else { return };
    let (sink, open) = closed_sink();
    let gateway = Setup::to(sink.address)
        .spool(&disk.spool())
        .set("spool", &format!("min_free = \"{min_free}\""))
        .start();
    let mut sizes = BTreeMap::new();
    let mut accepted = BTreeSet::new();
    let mut refused = 0;
    for n in 0.. {
        assert!(n * size < 20_000_000, "the disk does not fill");
        let token = format!("fill-{n}");
        sizes.insert(token.clone(), size);
        match offer_or_452(gateway.smtp(), &token, size) {
            true => {
                accepted.insert(token);
            }
            false => refused += 1,
        }
        if refused == 5 {
            break;
        }
    }
    assert!(accepted.len() * size > 5_000_000, "{} fit", accepted.len());
    assert_eq!(gateway.get("/livez").0, 200);
    if min_free != "0B" {
        // A message of that size does not fit any more; smaller ones may, until there is room for none.
        let mut n = 0;
        let body = eventually("/readyz to say that the disk is full", || {
            let token = format!("last-{n}");
            n += 1;
            if offer_or_452(gateway.smtp(), &token, 1_000) {
                sizes.insert(token.clone(), 1_000);
                accepted.insert(token);
            }
            let (status, body) = gateway.get("/readyz");
            (status == 503).then_some(body)
        });
        let says = ["the disk of the spool is full or under spool.min_free", "No space left"];
        assert!(says.iter().any(|words| body.contains(words)), "{body}");
    }
    assert_eq!(sink.taken().len(), 0);

    open.store(true, Ordering::SeqCst);
    sink.wait(accepted.len());
    gateway.wait_empty();
    accepted.insert(accepted_again(&gateway, &mut sizes));
    sink.wait(accepted.len());
    gateway.wait_empty();
    eventually("/readyz to say so", || (gateway.get("/readyz").0 == 200).then_some(()));
    // What was delivered goes once its done-marks are synced, a moment later.
    eventually("the log to become short", || {
        let log = disk.spool().join("log");
        let octets = |name: &String| fs::metadata(log.join(name)).map_or(0, |file| file.len());
        (names(&log).iter().map(octets).sum::<u64>() < 5_000_000).then_some(())
    });
    // As much fits as before.
    for n in 0..10 {
        let token = format!("more-{n}");
        sizes.insert(token.clone(), 100_000);
        assert!(offer_or_452(gateway.smtp(), &token, 100_000), "{token}");
        accepted.insert(token);
    }
    sink.wait(accepted.len());
    gateway.stop();
    expect_once(&sink, &sizes, &accepted);
}

#[test]
fn a_disk_full_of_mail_refuses_more_delivers_and_accepts_again() {
    fill_by_mail("1MB", 300_000);
}

#[test]
fn a_disk_full_to_the_last_octet_refuses_more_delivers_and_accepts_again() {
    fill_by_mail("0B", 300_000);
}

#[test]
fn a_disk_full_of_side_files_refuses_more_delivers_and_accepts_again() {
    fill_by_mail("1MB", 1_500_000);
}

#[test]
fn a_small_disk_carries_more_mail_than_it_holds() {
    let Some(disk) = SmallDisk::mount() else { return };
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).spool(&disk.spool()).start();
    let mut sizes = BTreeMap::new();
    let mut accepted = BTreeSet::new();
    for n in 0..20 {
        let token = eventually("mail to be accepted", || {
            let token = format!("through-{n}-{}", sizes.len());
            sizes.insert(token.clone(), 900_000);
            offer_or_452(gateway.smtp(), &token, 900_000).then_some(token)
        });
        accepted.insert(token);
        gateway.wait_empty();
        // What the gateway knows of the disk is up to date, so that it stops at the floor and not at the end.
        eventually("the free space to be known", || {
            let free = statvfs(disk.folder.path()).unwrap();
            let known = gateway.metric("mailsluice_spool_free_bytes");
            (known == (free.f_bavail * free.f_frsize) as f64).then_some(())
        });
    }
    sink.wait(accepted.len());
    gateway.stop();
    expect_once(&sink, &sizes, &accepted);
}

#[test]
fn a_disk_that_fills_within_a_message_refuses_it_and_keeps_nothing_of_it() {
    let Some(disk) = SmallDisk::mount() else { return };
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).spool(&disk.spool()).start();
    let mut client = Client::hello(gateway.smtp());
    client.command("MAIL FROM:<a@example.com>", 250);
    client.command("RCPT TO:<b@example.org>", 250);
    client.command("DATA", 354);
    let bytes = stuffed(&content("cut", 4_000_000));
    let (begin, rest) = bytes.split_at(2_000_000);
    client.send(begin);
    let tmp = disk.spool().join("tmp");
    eventually("the content to be on its way to disk", || {
        let name = names(&tmp).pop()?;
        (fs::metadata(tmp.join(name)).ok()?.len() > 1_500_000).then_some(())
    });
    disk.fill();
    client.send(rest);
    let reply = client.expect(452);
    assert!(reply.starts_with("452 4.3.1 "), "{reply}");
    client.command("NOOP", 250);
    let left = || names(&tmp).len() + names(&disk.spool().join("bodies")).len();
    eventually("what was received to be removed", || (left() == 0).then_some(()));
    // What was removed has made room again, above the floor.
    disk.fill();
    eventually("/readyz to say so", || (gateway.get("/readyz").0 == 503).then_some(()));

    disk.empty();
    let mut sizes = BTreeMap::new();
    let again = accepted_again(&gateway, &mut sizes);
    sink.wait(1);
    gateway.stop();
    expect_once(&sink, &sizes, &BTreeSet::from([again]));
}

#[test]
fn outcomes_that_a_full_disk_does_not_take_are_written_when_there_is_space() {
    let Some(disk) = SmallDisk::mount() else { return };
    let open = Arc::new(AtomicBool::new(false));
    let is_open = Arc::clone(&open);
    let sink = Sink::scripted(move |ask| {
        let began = Instant::now();
        while ask.is_content() && !is_open.load(Ordering::SeqCst) && began.elapsed() < PATIENCE {
            std::thread::park_timeout(Duration::from_millis(5));
        }
        Answer::Usual
    });
    let gateway = Setup::to(sink.address).spool(&disk.spool()).start();
    let mut sizes = BTreeMap::new();
    let mut accepted = BTreeSet::new();
    for n in 0..60 {
        let token = format!("before-{n}");
        sizes.insert(token.clone(), 20_000);
        assert!(offer_or_452(gateway.smtp(), &token, 20_000));
        accepted.insert(token);
    }
    eventually("twenty to be in flight", || {
        (gateway.metric("mailsluice_in_flight_messages") == 20.0).then_some(())
    });
    disk.fill();
    assert!(!offer_or_452(gateway.smtp(), "refused", 20_000));
    open.store(true, Ordering::SeqCst);
    // None of them can be put down as done once the last page is used up.
    sink.wait(20);
    assert_eq!(gateway.get("/livez").0, 200);
    disk.empty();
    sink.wait(60);
    gateway.wait_empty();
    accepted.insert(accepted_again(&gateway, &mut sizes));
    sink.wait(61);
    gateway.stop();
    expect_once(&sink, &sizes, &accepted);
}

#[test]
fn under_min_free_mail_is_refused_at_once_and_readyz_says_so() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).set("spool", "min_free = \"900000GB\"").start();
    let mut client = Client::hello(gateway.smtp());
    let reply = client.command("MAIL FROM:<a@example.com>", 452);
    assert!(reply.starts_with("452 4.3.1 "), "{reply}");
    client.command("RCPT TO:<b@example.org>", 503);
    let (status, body) = gateway.get("/readyz");
    assert_eq!(status, 503);
    assert!(body.contains("spool.min_free"), "{body}");
    assert_eq!(gateway.get("/livez").0, 200);
    gateway.stop();
}

// --- a disk that fails

/// `strace` on a running gateway: from now on each `fdatasync` of it fails. Ends when it goes.
struct FailingSyncs(Child);

impl FailingSyncs {
    /// None where a running process may not be traced.
    #[track_caller]
    fn of(gateway: &Gateway) -> Option<Self> {
        if !need("strace") {
            return None;
        }
        let mut strace = Command::new("strace");
        strace.args(["-f", "-q", "-o", "/dev/null", "-e", "trace=fdatasync"]);
        strace.args(["-e", "inject=fdatasync:error=EIO", "-p", &gateway.pid().to_string()]);
        strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut strace = Self(strace.spawn().unwrap());
        let tasks = PathBuf::from(format!("/proc/{}/task", gateway.pid()));
        let tracer = format!("TracerPid:\t{}\n", strace.0.id());
        let is_traced = |task: &String| {
            // A thread that has ended meanwhile is none.
            let status = fs::read_to_string(tasks.join(task).join("status"));
            status.map_or(true, |status| status.contains(&tracer))
        };
        let attached = eventually("strace to have all threads, or to end", || {
            match strace.0.try_wait().unwrap() {
                Some(_) => Some(false),
                None => names(&tasks).iter().all(is_traced).then_some(true),
            }
        });
        if !attached {
            let mut said = String::new();
            strace.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            skip(&format!("strace may not attach here: {said}"));
        }
        attached.then_some(strace)
    }
}

impl Drop for FailingSyncs {
    fn drop(&mut self) {
        // Killed, it lets go of what it traces.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn a_disk_that_fails_refuses_at_mail_and_accepts_again_by_itself() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let mut sizes = BTreeMap::new();
    let mut accepted = BTreeSet::new();
    let mut offer = |token: &str| {
        sizes.insert(token.to_owned(), 2_000);
        let mut client = Client::hello(gateway.smtp());
        client.send("MAIL FROM:<a@example.com>\r\n");
        let reply = client.reply().unwrap();
        if !reply.starts_with("250") {
            return reply;
        }
        client.command("RCPT TO:<b@example.org>", 250);
        client.command("DATA", 354);
        client.send(stuffed(&content(token, 2_000)));
        let reply = client.reply().unwrap();
        assert!(reply.starts_with("250 2.0.0 ") || reply.starts_with("451 4.3.0 "), "{reply}");
        if reply.starts_with("250") {
            accepted.insert(token.to_owned());
        }
        reply
    };
    assert!(offer("before").starts_with("250"));
    sink.wait(1);
    gateway.wait_empty();

    let Some(failing) = FailingSyncs::of(&gateway) else { return };
    let mut n = 0;
    let reply = eventually("MAIL to be refused", || {
        n += 1;
        let reply = offer(&format!("meanwhile-{n}"));
        reply.starts_with("452").then_some(reply)
    });
    assert_eq!(reply, "452 4.3.0 No message can be stored now, try again later\r\n");
    let (status, body) = gateway.get("/readyz");
    assert_eq!(status, 503);
    assert!(body.starts_with("not ready: the spool takes no mail: "), "{body}");
    assert!(body.contains("Input/output error"), "{body}");
    assert!(gateway.metric("mailsluice_messages_refused_total{reason=\"storage\"}") >= 1.0);
    assert_eq!(gateway.get("/livez").0, 200);

    drop(failing);
    let mut n = 0;
    eventually("mail to be accepted again", || {
        n += 1;
        offer(&format!("after-{n}")).starts_with("250").then_some(())
    });
    eventually("/readyz to say so", || (gateway.get("/readyz").0 == 200).then_some(()));
    sink.wait(accepted.len());
    gateway.wait_empty();
    gateway.stop();
    expect_once(&sink, &sizes, &accepted);
}

// --- torn and damaged files

/// Has a gateway without a provider accept so many messages, one after another, and kills it.
fn accept_and_kill(spool: &Path, n: usize) -> BTreeMap<String, usize> {
    let gateway = Setup::none("hold").spool(spool).start();
    let mut client = Client::hello(gateway.smtp());
    let mut sizes = BTreeMap::new();
    for n in 0..n {
        let token = format!("kept-{n}-");
        let size = if n == 3 { 1_200_000 } else { 1_000 + 500 * n };
        client.mail("a@example.com", &["b@example.org"], content(&token, size));
        sizes.insert(token, size);
    }
    gateway.kill();
    sizes
}

#[test]
fn a_torn_tail_costs_nothing_that_was_accepted_and_is_no_damage() {
    let folder = tempfile::tempdir().unwrap();
    let spool = folder.path().join("spool");
    let mut sizes = accept_and_kill(&spool, 10);
    let garbage = |n: usize, octets: Vec<u8>| {
        let newest = segments(&spool).pop().unwrap();
        OpenOptions::new().append(true).open(newest).unwrap().write_all(&octets).unwrap();
        let gateway = Setup::none("hold").spool(&spool).start();
        assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"queued\"}"), n as f64);
        assert!(!gateway.log_text().contains("damaged"), "{}", gateway.log_text());
        let token = format!("then-{n}-");
        Client::hello(gateway.smtp()).mail(
            "a@example.com",
            &["b@example.org"],
            content(&token, 900),
        );
        gateway.kill();
        (token, 900)
    };
    let mut random = fastrand::Rng::with_seed(1);
    let noise = std::iter::repeat_with(|| random.u8(..)).take(5_000).collect();
    sizes.extend([garbage(10, noise)]);
    sizes.extend([garbage(11, vec![0; 4_096])]);
    // The start of a record that was whole, at the place where the next one would be.
    let newest = fs::read(segments(&spool).pop().unwrap()).unwrap();
    sizes.extend([garbage(12, newest[64..364].to_vec())]);

    let sink = Sink::new();
    let gateway = Setup::to(sink.address).spool(&spool).start();
    sink.wait(13);
    gateway.wait_empty();
    gateway.stop();
    expect_once(&sink, &sizes, &sizes.keys().cloned().collect());
    assert!(!spool.join("damaged").exists());
}

#[test]
fn a_damaged_record_is_reported_and_kept_and_stops_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let spool = folder.path().join("spool");
    let mut sizes = accept_and_kill(&spool, 20);
    let segment = segments(&spool).pop().unwrap();
    let bytes = fs::read(&segment).unwrap();
    let place = bytes.windows(16).position(|part| part == b"Subject: kept-9-").unwrap();
    let file = OpenOptions::new().write(true).open(&segment).unwrap();
    file.write_all_at(&[bytes[place + 300] ^ 1], place as u64 + 300).unwrap();
    let inode = file.metadata().unwrap().ino();

    let sink = Sink::new();
    let gateway = Setup::to(sink.address).spool(&spool).start();
    sink.wait(19);
    gateway.wait_empty();
    let name = segment.file_name().unwrap().to_str().unwrap();
    let told = gateway.events().into_iter().find(|event| {
        event["level"] == "ERROR" && event["message"].as_str().unwrap_or_default().contains(name)
    });
    let told = told.unwrap_or_else(|| panic!("no word of {name}:\n{}", gateway.log_text()));
    assert!(told["message"].as_str().unwrap().contains("the spool is damaged"), "{told}");
    let sentences = gateway.events().iter().filter(|event| event["event"] == "damaged").count();
    assert!(sentences > 0);
    assert_eq!(gateway.metric("mailsluice_spool_damaged_total"), sentences as f64);
    gateway.stop();
    sizes.remove("kept-9-");
    expect_once(&sink, &sizes, &sizes.keys().cloned().collect());

    let kept = spool.join("damaged").join(name);
    assert_eq!(fs::metadata(&kept).unwrap().ino(), inode);
    let mut now = fs::read(&kept).unwrap();
    now[place + 300] ^= 1;
    assert!(now == bytes, "the damaged file is what it was");
}

#[test]
fn a_message_that_is_damaged_when_it_is_read_is_counted_and_stops_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let spool = folder.path().join("spool");
    let (sink, open) = closed_sink();
    let gateway = Setup::to(sink.address).spool(&spool).start();
    let mut sizes = BTreeMap::new();
    let mut client = Client::hello(gateway.smtp());
    // Memory keeps the first 8 MiB; what finds no room there is read back.
    let first = (0..60).map(|n| (format!("first-{n}-"), 150_000));
    let then = (0..5).map(|n| (format!("read-{n}-"), 400_000));
    for (token, size) in first.chain(then) {
        client.mail("a@example.com", &["b@example.org"], content(&token, size));
        sizes.insert(token, size);
    }
    let segment = segments(&spool).pop().unwrap();
    let bytes = fs::read(&segment).unwrap();
    let place = bytes.windows(16).position(|part| part == b"Subject: read-2-").unwrap();
    let file = OpenOptions::new().write(true).open(&segment).unwrap();
    file.write_all_at(&[bytes[place + 300] ^ 1], place as u64 + 300).unwrap();
    assert_eq!(gateway.metric("mailsluice_spool_damaged_total"), 0.0);

    open.store(true, Ordering::SeqCst);
    sink.wait(64);
    let told = gateway.wait_event("held", |_| true);
    assert!(told["message"].as_str().unwrap().contains("damaged"), "{told}");
    gateway.wait_empty();
    assert_eq!(gateway.metric("mailsluice_spool_damaged_total"), 1.0);
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"held\"}"), 1.0);
    gateway.stop();
    sizes.remove("read-2-");
    expect_once(&sink, &sizes, &sizes.keys().cloned().collect());
}
