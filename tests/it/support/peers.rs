//! Real programs as peers: finding them, and a Postfix of our own, with dovecot for its logins.

use std::fs::{self, Permissions};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::client::Client;
use super::eventually;

/// Whether the program is installed. Where it is not, the test says so and ends, or fails where peers are required.
#[track_caller]
pub fn need(program: &str) -> bool {
    let found = find(program).is_some();
    if !found {
        skip(&format!("{program} is not installed"));
    }
    found
}

/// Says that a test does not run; a failure where peers are required.
#[track_caller]
pub fn skip(why: &str) {
    println!("skipped: {why}");
    let required = std::env::var("MAILSLUICE_REQUIRE_PEERS").is_ok_and(|value| value == "1");
    assert!(!required, "{why}, and MAILSLUICE_REQUIRE_PEERS is set");
}

/// The path of an installed program.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    // Not in the path of everyone.
    folders.extend(["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from));
    folders.iter().map(|folder| folder.join(program)).find(|path| path.is_file())
}

pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

fn need_root(program: &str) -> bool {
    let root = is_root();
    if !root {
        println!("skipped: {program} needs root");
    }
    root
}

/// A port that was free a moment ago, for a peer that cannot choose one by itself.
pub fn free_port() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

/// A peer as a child process, asked to end when it goes.
pub struct Peer {
    child: Child,
}

impl Peer {
    /// Starts it and waits until something listens at `address`.
    #[track_caller]
    pub fn start(command: &mut Command, address: SocketAddr) -> Self {
        Self::start_until(command, || TcpStream::connect(address).is_ok())
    }

    #[track_caller]
    fn start_until(command: &mut Command, listens: impl Fn() -> bool) -> Self {
        let child =
            command.stdin(Stdio::null()).spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let mut peer = Self { child };
        eventually(&format!("{command:?} to listen"), || {
            assert!(peer.child.try_wait().unwrap().is_none(), "{command:?} ended");
            listens().then_some(())
        });
        peer
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let kill = format!("kill {}", self.child.id());
            drop(Command::new("sh").args(["-c", &kill]).status());
        }
        for _ in 0..1_000 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::park_timeout(std::time::Duration::from_millis(5));
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Debian's Postfix with configuration, queue and data of its own, which relays everything to one server and changes
/// nothing but for its own Received line.
pub struct Postfix {
    pub address: SocketAddr,
    _peer: Peer,
    _dovecot: Option<Dovecot>,
    folder: TempDir,
}

/// stunnel, which speaks TLS from the start and hands on in clear. None where it is not installed.
#[track_caller]
pub fn stunnel(folder: &Path, pem: &Path, to: SocketAddr) -> Option<(SocketAddr, Peer)> {
    if !need("stunnel4") {
        return None;
    }
    let (address, pem) = (free_port(), pem.display());
    let config = folder.join("stunnel.conf");
    let text = format!(
        "foreground = yes\npid =\nsyslog = no\ndebug = err\n[smtps]\naccept = {address}\nconnect = {to}\ncert = {pem}\n"
    );
    fs::write(&config, text).unwrap();
    let mut command = Command::new(find("stunnel4").unwrap());
    command.arg(config).stdout(Stdio::null()).stderr(Stdio::null());
    let peer = Peer::start(&mut command, address);
    Some((address, peer))
}

/// How a [`Postfix`] wants to be spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Secured {
    /// In clear until STARTTLS, which it insists on.
    StartTls,
    /// From the start.
    Tls,
}

impl Postfix {
    /// None where it is not installed, or we may not run it.
    #[track_caller]
    pub fn start(relay_to: SocketAddr) -> Option<Self> {
        Self::with(relay_to, FOR_LOOPBACK.to_owned(), None)
    }

    /// One that insists on TLS, with key and certificate in one file.
    #[track_caller]
    pub fn secured(relay_to: SocketAddr, secured: Secured, pem: &Path) -> Option<Self> {
        Self::with(relay_to, FOR_LOOPBACK.to_owned() + &tls_cf(secured, pem), None)
    }

    /// One that insists on TLS and relays for nobody but [`USER`] with [`PASSWORD`], by these mechanisms of SASL.
    #[track_caller]
    pub fn with_login(
        relay_to: SocketAddr,
        secured: Secured,
        pem: &Path,
        mechanisms: &str,
    ) -> Option<Self> {
        let dovecot = Dovecot::start(mechanisms)?;
        Self::with(relay_to, tls_cf(secured, pem) + &sasl_cf(&dovecot.socket()), Some(dovecot))
    }

    #[track_caller]
    fn with(relay_to: SocketAddr, more: String, dovecot: Option<Dovecot>) -> Option<Self> {
        if !need("postfix") || !need("postconf") || !need_root("Postfix") {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
        for name in ["etc", "queue", "data"] {
            fs::create_dir(path.join(name)).unwrap();
        }
        run(Command::new("chown").arg("postfix").arg(path.join("data")));
        let address = free_port();
        let daemons = run(Command::new("postconf").args(["-dh", "daemon_directory"]));
        let daemons = Path::new(daemons.trim());
        fs::write(path.join("etc/main.cf"), main_cf(path, relay_to) + &more).unwrap();
        fs::write(path.join("etc/master.cf"), master_cf(address)).unwrap();
        for name in ["dynamicmaps.cf", "postfix-files"] {
            if let Ok(text) = fs::read(Path::new("/etc/postfix").join(name)) {
                fs::write(path.join("etc").join(name), text).unwrap();
            }
        }
        // Makes the folders of the queue.
        run(Command::new("postfix").arg("-c").arg(path.join("etc")).arg("check"));
        // In the foreground, so that it is our child.
        let mut master = Command::new(daemons.join("master"));
        master.arg("-c").arg(path.join("etc")).arg("-s");
        master.stdout(Stdio::null()).stderr(Stdio::null());
        let peer = Peer::start(&mut master, address);
        if !more.contains("wrappermode") {
            Client::connect(address).command("QUIT", 221);
        }
        Some(Self { address, _peer: peer, _dovecot: dovecot, folder })
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("mail.log")).unwrap_or_default()
    }
}

impl Drop for Postfix {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let from = lines.len().saturating_sub(50);
            eprintln!("--- the end of Postfix's log\n{}\n---", lines[from..].join("\n"));
        }
    }
}

fn main_cf(folder: &Path, relay_to: SocketAddr) -> String {
    let (folder, ip, port) = (folder.display(), relay_to.ip(), relay_to.port());
    format!(
        "compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
maillog_file_prefixes = {folder}
maillog_file = {folder}/mail.log
myhostname = postfix.test
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
relayhost = [{ip}]:{port}
disable_dns_lookups = yes
smtp_dns_support_level = disabled
smtp_host_lookup = native
smtpd_peername_lookup = no
alias_maps =
alias_database =
local_recipient_maps =
biff = no
message_size_limit = 100000000
append_dot_mydomain = no
append_at_myorigin = no
local_header_rewrite_clients =
remote_header_rewrite_domain =
smtp_line_length_limit = 0
header_size_limit = 1000000
enable_long_queue_ids = yes
in_flow_delay = 0
default_process_limit = 50
default_destination_concurrency_limit = 20
initial_destination_concurrency = 20
smtpd_client_connection_count_limit = 0
smtpd_client_connection_rate_limit = 0
"
    )
}

/// Whoever connects may relay.
const FOR_LOOPBACK: &str = "mynetworks = 127.0.0.0/8\n";

fn tls_cf(secured: Secured, pem: &Path) -> String {
    let how = match secured {
        Secured::StartTls => "smtpd_tls_security_level = encrypt",
        Secured::Tls => "smtpd_tls_wrappermode = yes",
    };
    let pem = pem.display();
    format!("{how}\nsmtpd_tls_chain_files = {pem}\nsmtpd_tls_received_header = yes\n")
}

/// Whoever has logged in may relay, and nobody else.
fn sasl_cf(socket: &Path) -> String {
    let socket = socket.display();
    format!(
        "mynetworks =
smtpd_tls_auth_only = yes
smtpd_sasl_auth_enable = yes
smtpd_sasl_type = dovecot
smtpd_sasl_path = {socket}
smtpd_sasl_authenticated_header = yes
smtpd_relay_restrictions = permit_sasl_authenticated, reject_unauth_destination
"
    )
}

fn master_cf(listen: SocketAddr) -> String {
    format!(
        "{listen} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
pickup unix n - n 60 1 pickup
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
tlsmgr unix - - n 1000? 1 tlsmgr
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
proxywrite unix - - n - 1 proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"
    )
}

/// Who may relay through a [`Postfix`] with logins.
pub const USER: &str = "name";
pub const PASSWORD: &str = "p w";

/// Debian's dovecot with everything in a folder of its own: no mail, only the logins of a Postfix.
struct Dovecot {
    _peer: Peer,
    folder: TempDir,
}

impl Dovecot {
    /// None where it is not installed, or we may not run it.
    #[track_caller]
    fn start(mechanisms: &str) -> Option<Self> {
        if !need("dovecot") || !need_root("dovecot") {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        // Its children and Postfix's are other users.
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
        for name in ["run", "state"] {
            fs::create_dir(path.join(name)).unwrap();
        }
        fs::write(path.join("users"), format!("{USER}:{PASSWORD}\n")).unwrap();
        let config = path.join("dovecot.conf");
        fs::write(&config, dovecot_conf(path, mechanisms)).unwrap();
        let mut command = Command::new(find("dovecot").unwrap());
        command.arg("-F").arg("-c").arg(config).stdout(Stdio::null()).stderr(Stdio::null());
        let socket = path.join("sasl");
        let peer = Peer::start_until(&mut command, || UnixStream::connect(&socket).is_ok());
        Some(Self { _peer: peer, folder })
    }

    /// Where it answers about logins.
    fn socket(&self) -> PathBuf {
        self.folder.path().join("sasl")
    }
}

impl Drop for Dovecot {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.folder.path().join("dovecot.log"));
            eprintln!("--- dovecot's log\n{}---", log.unwrap_or_default());
        }
    }
}

/// A wrong password costs no time: neither by the delay of the answer, nor by the penalty that anvil counts.
fn dovecot_conf(folder: &Path, mechanisms: &str) -> String {
    let folder = folder.display();
    format!(
        "base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/dovecot.log
protocols =
ssl = no
default_internal_user = dovecot
default_login_user = dovenull
auth_mechanisms = {mechanisms}
auth_failure_delay = 0
passdb {{
  driver = passwd-file
  args = scheme=PLAIN username_format=%u {folder}/users
}}
service anvil {{
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
service auth {{
  unix_listener {folder}/sasl {{
    mode = 0666
  }}
}}
"
    )
}

/// Runs a command to its end, expects success, and returns what it said.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output =
        command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    said
}
