//! The real binary as a child process, with its own folder and free ports.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::{PATIENCE, eventually};

/// The path of the binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_mailsluice");

/// A configuration in the making: lines by table, so that a test says only what it is about.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    tables: BTreeMap<String, Vec<String>>,
    spool: Option<PathBuf>,
    wrapper: Vec<String>,
}

impl Setup {
    /// A gateway that delivers to `upstream`.
    pub fn to(upstream: SocketAddr) -> Self {
        Self::bare()
            .set("provider", "kind = \"smtp\"")
            .set("provider", &format!("server = \"{}\"", upstream.ip()))
            .set("provider", &format!("port = {}", upstream.port()))
            .set("provider", "security = \"none\"")
            .set("provider", "auth = \"none\"")
            .set("retry", "first = \"100ms\"")
            .set("retry", "max = \"1s\"")
            .set("retry", "jitter = 0.0")
            .set("retry", "in_doubt_after = \"100ms\"")
            // A report is mail that the test did not send: the tests of reports ask for them.
            .set("bounce", "to = \"none\"")
    }

    /// A gateway without a provider.
    pub fn none(on_mail: &str) -> Self {
        Self::bare()
            .set("provider", "kind = \"none\"")
            .set("provider", &format!("on_mail = \"{on_mail}\""))
    }

    fn bare() -> Self {
        Self::default()
            .set("", "hostname = \"relay.test\"")
            .set("[listener]", "bind = \"127.0.0.1:0\"")
            .set("sender", "policy = \"preserve\"")
            .set("spool", "min_free = \"1MB\"")
            .set("admin", "bind = \"127.0.0.1:0\"")
            .set("log", "level = \"debug\"")
            .set("log", "format = \"json\"")
            .set("limits", "shutdown_grace = \"10s\"")
    }

    /// Sets `line` (`key = value`) in `table`; a later value of a key replaces the earlier. The listener's table is
    /// called `[listener]`, the top level is the empty name.
    pub fn set(mut self, table: &str, line: &str) -> Self {
        let key = line.split('=').next().unwrap().trim().to_owned();
        let lines = self.tables.entry(table.to_owned()).or_default();
        lines.retain(|it| it.split('=').next().unwrap().trim() != key);
        lines.push(line.to_owned());
        self
    }

    /// Logs in at the upstream.
    pub fn login(self, username: &str, password_file: &Path) -> Self {
        self.set("provider", "auth = \"password\"")
            .set("provider", &format!("username = \"{username}\""))
            .set("provider", &format!("password_file = \"{}\"", password_file.display()))
    }

    /// Leaves the key to its default.
    pub fn unset(mut self, table: &str, key: &str) -> Self {
        let lines = self.tables.entry(table.to_owned()).or_default();
        lines.retain(|it| it.split('=').next().unwrap().trim() != key);
        self
    }

    /// Uses a spool that outlives the gateway.
    pub fn spool(mut self, path: &Path) -> Self {
        self.spool = Some(path.to_owned());
        self
    }

    /// Runs the binary under another program, such as `strace`.
    pub fn under(mut self, wrapper: &[&str]) -> Self {
        self.wrapper = wrapper.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// The configuration as text, for a gateway whose files are in `folder`.
    pub fn text(&self, folder: &Path) -> String {
        let spool = self.spool.clone().unwrap_or_else(|| folder.join("spool"));
        let with_spool = self.clone().set("spool", &format!("path = \"{}\"", spool.display()));
        let mut text = String::new();
        for (table, lines) in &with_spool.tables {
            if !table.is_empty() {
                let closing = if table.starts_with('[') { "]]" } else { "]" };
                text.push_str(&format!("\n[{}{closing}\n", table.trim_end_matches(']')));
            }
            for line in lines {
                text.push_str(line);
                text.push('\n');
            }
        }
        text
    }

    /// Starts it and waits until it is ready.
    #[track_caller]
    pub fn start(&self) -> Gateway {
        let gateway = self.spawn();
        gateway.wait_ready();
        gateway
    }

    /// Starts it and does not wait for anything but its process.
    #[track_caller]
    pub fn spawn(&self) -> Gateway {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("mailsluice.toml");
        std::fs::write(&config, self.text(folder.path())).unwrap();
        let mut words = self.wrapper.clone();
        words.extend([BINARY.to_owned(), "run".to_owned(), "--config".to_owned()]);
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{words:?}: {e}"));
        let log = Arc::new(Log::default());
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let reader = {
            let log = Arc::clone(&log);
            std::thread::spawn(move || {
                for line in stderr.lines().map_while(Result::ok) {
                    log.push(line);
                }
                log.end();
            })
        };
        Gateway { child, log, reader: Some(reader), folder, done: false }
    }
}

/// What the gateway has logged so far.
#[derive(Debug, Default)]
struct Log {
    lines: Mutex<(Vec<String>, bool)>,
    more: Condvar,
}

impl Log {
    /// A test that fails while it looks at the log must still be able to print it.
    fn lock(&self) -> MutexGuard<'_, (Vec<String>, bool)> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        lines: MutexGuard<'a, (Vec<String>, bool)>,
    ) -> MutexGuard<'a, (Vec<String>, bool)> {
        let waited = self.more.wait_timeout(lines, Duration::from_millis(100));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn push(&self, line: String) {
        self.lock().0.push(line);
        self.more.notify_all();
    }

    fn end(&self) {
        self.lock().1 = true;
        self.more.notify_all();
    }
}

/// A running gateway; killed when it goes, and its log is printed where the test failed.
pub struct Gateway {
    child: Child,
    log: Arc<Log>,
    reader: Option<std::thread::JoinHandle<()>>,
    folder: TempDir,
    done: bool,
}

impl Gateway {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The most memory that the process has had resident, in kB.
    #[track_caller]
    pub fn peak_memory_kb(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        peak.unwrap().trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// How many file descriptors the process has open.
    #[track_caller]
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The address of the first SMTP listener on TCP.
    #[track_caller]
    pub fn smtp(&self) -> SocketAddr {
        self.listening("smtp")
    }

    #[track_caller]
    pub fn admin(&self) -> SocketAddr {
        self.listening("http")
    }

    #[track_caller]
    fn listening(&self, protocol: &str) -> SocketAddr {
        let event = self.wait_event("listening", |event| {
            event["protocol"] == protocol
                && !event["address"].as_str().unwrap_or_default().starts_with("unix:")
        });
        event["address"].as_str().unwrap().parse().unwrap()
    }

    #[track_caller]
    pub fn wait_ready(&self) {
        self.smtp();
        let admin = self.admin();
        eventually("/readyz to say anything", || get(admin, "/readyz").ok());
    }

    /// The status and body of a GET on the admin listener.
    #[track_caller]
    pub fn get(&self, path: &str) -> (u16, String) {
        get(self.admin(), path).unwrap()
    }

    /// The value of a metric: the name with its labels, as the text form has it. 0 where it does not exist (yet).
    #[track_caller]
    pub fn metric(&self, name: &str) -> f64 {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Waits until no message is queued. One that was accepted a moment ago may not be counted yet: first wait for what
    /// becomes of it.
    #[track_caller]
    pub fn wait_empty(&self) {
        eventually("the queue to be empty", || {
            (self.metric("mailsluice_queue_messages{state=\"queued\"}") == 0.0).then_some(())
        });
    }

    /// Every event logged so far.
    pub fn events(&self) -> Vec<Value> {
        let lines = self.log.lock();
        lines.0.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Whether its log has come to its end, as it does when the process dies.
    pub fn has_ended(&self) -> bool {
        self.log.lock().1
    }

    /// The log as text.
    pub fn log_text(&self) -> String {
        self.log.lock().0.join("\n")
    }

    /// Waits for an event of that name that fits.
    #[track_caller]
    pub fn wait_event(&self, name: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        let mut seen = 0;
        let mut lines = self.log.lock();
        loop {
            while let Some(line) = lines.0.get(seen) {
                seen += 1;
                if let Ok(event) = serde_json::from_str::<Value>(line)
                    && event["event"] == name
                    && fits(&event)
                {
                    return event;
                }
            }
            let ended = lines.1;
            let text = || lines.0.join("\n");
            assert!(!ended, "the gateway ended without the event {name}:\n{}", text());
            assert!(began.elapsed() < PATIENCE, "no event {name} within {PATIENCE:?}:\n{}", text());
            lines = self.log.wait(lines);
        }
    }

    /// Waits until the log holds that text.
    #[track_caller]
    pub fn wait_log(&self, text: &str) {
        eventually(text, || self.log_text().contains(text).then_some(()));
    }

    /// `kill -9`.
    pub fn kill(mut self) -> TempDir {
        self.child.kill().unwrap();
        self.finish();
        std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap())
    }

    /// SIGTERM, without waiting.
    pub fn terminate(&self) {
        self.signal("TERM");
    }

    pub fn signal(&self, name: &str) {
        // The shell has it built in; as a program it is not everywhere.
        let kill = format!("kill -{name} {}", self.pid());
        let status = Command::new("sh").args(["-c", &kill]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for the process to end by itself.
    #[track_caller]
    pub fn wait_exit(&mut self) -> ExitStatus {
        let status = eventually("the gateway to end", || self.child.try_wait().unwrap());
        self.finish();
        status
    }

    /// SIGTERM, and expects exit status 0.
    #[track_caller]
    pub fn stop(mut self) {
        self.terminate();
        let status = self.wait_exit();
        assert!(status.success(), "{status}:\n{}", self.log_text());
    }

    fn finish(&mut self) {
        drop(self.child.wait());
        self.done = true;
        if let Some(reader) = self.reader.take() {
            drop(reader.join());
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if !self.done {
            drop(self.child.kill());
            self.finish();
        }
        if std::thread::panicking() {
            let lines = self.log.lock();
            let from = lines.0.len().saturating_sub(200);
            eprintln!("--- the end of the gateway's log\n{}\n---", lines.0[from..].join("\n"));
        }
    }
}

/// One HTTP GET: status and body.
pub fn get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    Ok((status, body.to_owned()))
}
