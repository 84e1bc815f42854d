//! The configuration as the parts read it: plain structs, checked, with nothing left to interpret.
//!
//! Each part takes its own section, never the whole. A file becomes a `Config` in `load`, which checks it against the
//! one table of `keys`, reads each value as in `value`, and finds every `problem` at once; `validate` looks at what
//! goes together.

mod certificates;
mod keys;
mod load;
mod oauth;
mod pattern;
mod problem;
mod secret;
#[cfg(test)]
mod tests;
mod validate;
mod value;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use crate::smtp::address::{Charset, Domain, Mailbox};
use crate::smtp::data::BareNewline;

pub use certificates::{Pair, not_after, pair, roots};
pub use keys::{Available, Key, Type, Unwritten, keys, reference};
pub use load::{Loaded, Secrets, load, parse};
pub use pattern::Pattern;
pub use problem::{Problem, Problems};
pub use secret::Secret;

#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The name in greeting, EHLO, Received and reports.
    pub hostname: Domain,
    /// At least one.
    pub listeners: Vec<Listener>,
    pub limits: Limits,
    pub sender: Sender,
    pub provider: Provider,
    pub throttle: Throttle,
    pub retry: Retry,
    pub bounce: Bounce,
    pub spool: Spool,
    pub admin: Admin,
    pub log: Log,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Listener {
    pub bind: Bind,
    /// Clients that may connect; IPv4-mapped IPv6 counts as IPv4.
    pub allow: Vec<IpNet>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bind {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// In octets.
    pub message_size: u64,
    pub recipients: usize,
    pub connections: usize,
    /// Loopback and Unix sockets are exempt.
    pub connections_per_client: usize,
    pub command_timeout: Duration,
    pub data_timeout: Duration,
    /// At least so many octets of content per so long; applies after 30 s.
    pub min_data_rate: Option<Rate>,
    pub errors_per_session: u32,
    pub received_headers: usize,
    pub bare_newline: BareNewline,
    pub shutdown_grace: Duration,
}

/// So many per window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub amount: u64,
    pub per: Duration,
}

/// Who readers see as the sender.
#[derive(Clone, Debug, PartialEq)]
pub struct Sender {
    pub policy: SenderPolicy,
    /// Other From addresses that may stand beside the provider's sender.
    pub allowed: Vec<Pattern>,
}

/// What becomes of a From that is neither the provider's sender nor allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderPolicy {
    /// The provider's sender takes its place when the message leaves.
    Rewrite,
    /// It stays, as everything does.
    Preserve,
    /// The message is refused at the end of data.
    Reject,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Provider {
    None { on_mail: OnMail },
    Smtp(Box<SmtpProvider>),
    Microsoft365(Box<Microsoft365>),
}

/// What happens to mail while there is no provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnMail {
    /// 451 4.3.2 at MAIL; nothing is accepted.
    Reject,
    /// Accepted, and kept until there is a provider.
    Hold,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SmtpProvider {
    /// Name or address of the upstream server.
    pub server: String,
    pub port: u16,
    pub security: Security,
    /// None: no login.
    pub login: Option<Login>,
    /// Root certificates beside the system's, PEM.
    pub ca_file: Option<PathBuf>,
    /// The provider's own sender; none with the policy `preserve` where it was left out.
    pub sender: Option<Mailbox>,
    /// The display name where a message has none.
    pub sender_name: Option<String>,
    /// Recipients per transaction.
    pub max_recipients: usize,
    pub connect_timeout: Duration,
    pub command_timeout: Duration,
    pub data_timeout: Duration,
    pub final_timeout: Duration,
}

impl SmtpProvider {
    /// The name of the one lane of an upstream: who logs in, else whom readers see.
    pub fn lane(&self) -> Option<&str> {
        let login = self.login.as_ref().map(|login| login.username.as_str());
        login.or_else(|| self.sender.as_ref().map(Mailbox::as_str))
    }

    /// Whether the author is the account itself, as it logs in or as its sender is named.
    pub fn is_own(&self, author: Option<&Mailbox>) -> bool {
        let login = self.login.as_ref().map(|login| Mailbox::parse(&login.username, Charset::Utf8));
        let names = [login.and_then(Result::ok), self.sender.clone()];
        author.is_some_and(|author| names.iter().flatten().any(|name| name.is_same(author)))
    }
}

/// How a connection to the provider is secured. There is no way from one to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Security {
    /// It is not.
    None,
    /// By STARTTLS (RFC 3207).
    StartTls,
    /// From its start (RFC 8314 3.3).
    Tls,
}

/// What AUTH says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    pub username: String,
    pub proof: Proof,
}

/// What shows that a login is ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    Password(Secret),
    /// A token of this application (XOAUTH2).
    Token(App),
}

/// A Microsoft 365 tenant, reached by Microsoft Graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Microsoft365 {
    pub app: App,
    /// Root URL of Graph, without a slash at its end.
    pub graph: String,
    /// Whose mailbox sends.
    pub sender: Mailbox,
    /// The display name where a message has none.
    pub sender_name: Option<String>,
    pub save_to_sent_items: bool,
    pub format: Format,
    pub large_messages: LargeMessages,
    /// Recipients per request.
    pub max_recipients: usize,
    /// Root certificates beside the system's, PEM.
    pub ca_file: Option<PathBuf>,
    pub connect_timeout: Duration,
    pub command_timeout: Duration,
    pub data_timeout: Duration,
    pub final_timeout: Duration,
}

/// The form of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// JSON, or MIME where JSON would lose something.
    Auto,
    Json,
    Mime,
}

/// Whether messages that do not fit into one request are sent by draft and upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LargeMessages {
    /// Where the token shows the right to do so.
    Auto,
    On,
    Off,
}

/// Who fetches tokens, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct App {
    /// Empty for a managed identity, which does not need it.
    pub tenant_id: String,
    /// Empty for the managed identity of the machine itself.
    pub client_id: String,
    pub credential: Credential,
    /// Root URL of where tokens are fetched, without a slash at its end.
    pub login: String,
    /// What a token is for: `<root>/.default`.
    pub scope: String,
    pub cloud: Cloud,
}

/// How the application proves who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    Secret {
        secret: Secret,
        /// Tried when the first is refused.
        next: Option<Secret>,
    },
    /// Both in PEM.
    Certificate { certificate: PathBuf, private_key: PathBuf },
    /// The token of another authority (Kubernetes), in a file that changes.
    WorkloadIdentity { token_file: PathBuf },
    /// The machine's own (Azure).
    ManagedIdentity,
}

/// A national cloud. Tokens of one are of no use in another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cloud {
    /// With GCC.
    Global,
    /// L4, GCC High.
    UsGov,
    /// L5, DoD.
    UsGovDod,
    /// Operated by 21Vianet.
    China,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Throttle {
    /// Messages in flight per lane.
    pub concurrency: usize,
    /// Messages in flight over all lanes.
    pub provider_concurrency: usize,
    /// Concurrency of single lanes, by name.
    pub mailbox_concurrency: BTreeMap<String, usize>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Retry {
    pub first: Duration,
    pub factor: f64,
    pub max: Duration,
    /// 0.2 spreads a delay over 80 % to 120 % of itself.
    pub jitter: f64,
    pub give_up_after: Duration,
    pub in_doubt: InDoubt,
    /// Between a doubt and the one more try.
    pub in_doubt_after: Duration,
}

/// What becomes of a message that may have been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InDoubt {
    /// It is sent once more: a duplicate rather than a loss.
    Retry,
    /// It is held, until an operator knows.
    Hold,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Bounce {
    pub to: BounceTo,
    pub postmaster: Option<Mailbox>,
    /// Of a message's own deferrals.
    pub delay_warning_after: Duration,
    /// Reports, beyond which the postmaster gets one list an hour.
    pub max_per_hour: usize,
    /// Whether a failed message comes back whole, where its sender did not say.
    pub full: bool,
}

/// Who is told what becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BounceTo {
    Sender,
    Postmaster,
    /// The log alone.
    Nobody,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Spool {
    pub path: PathBuf,
    /// Below this much free space nothing is accepted, in octets.
    pub min_free: u64,
    pub keep_failed: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Admin {
    pub bind: SocketAddr,
    /// The Unix socket for the command line.
    pub socket: PathBuf,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    pub level: LogLevel,
    pub format: LogFormat,
    /// Whether mail addresses stand as they are; else their local parts are masked.
    pub addresses: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    Auto,
    Text,
    Json,
}
