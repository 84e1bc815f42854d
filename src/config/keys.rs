//! The one table of keys: what a file may say, of which type, what holds where it says nothing, and what works.
//!
//! The reader checks a file against it and takes the defaults from it; README's table and the sample are compared
//! with it.

use std::fmt;

use self::Available::{Later, Now, Only};
use self::Unwritten::{Is, Nothing, Says};

/// One key.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// With its tables, such as `limits.recipients`; `*` stands for a name of the operator's choice.
    pub path: &'static str,
    pub r#type: Type,
    pub default: Unwritten,
    pub available: Available,
    /// One line, Markdown.
    pub doc: &'static str,
    /// The kinds of provider that have it; empty for what is no key of a provider or fits all.
    pub kinds: &'static [&'static str],
}

/// What holds where the key is not written.
#[derive(Clone, Copy, Debug)]
pub enum Unwritten {
    /// This value, as TOML writes it.
    Is(&'static str),
    /// What these words say.
    Says(&'static str),
    /// Nothing.
    Nothing,
}

/// Whether this version does what the key asks for.
#[derive(Clone, Copy, Debug)]
pub enum Available {
    Now,
    /// Only these values, plainly written (no quotes; `[]` is the empty list); left out, it acts as the first of them.
    Only(&'static [&'static str]),
    /// Not at all. A default has no effect yet.
    Later,
}

/// The type of a key's value, with its bounds, both included.
#[derive(Clone, Copy, Debug)]
pub enum Type {
    Flag,
    Integer(u64, u64),
    Number(f64, f64),
    /// In octets.
    Size(u64, u64),
    /// In milliseconds.
    Duration(u64, u64),
    /// So many per window, or no limit.
    Rate,
    /// So many octets per window, or no limit.
    ByteRate,
    Choice(&'static [&'static str]),
    Text,
    Texts,
    /// Has the forms KEY, KEY_file, KEY_env and KEY_credential.
    Secret,
    /// An argon2id hash, never shown.
    Hash,
    Domain,
    /// A name or an IP address.
    Host,
    Mailbox,
    /// A mailbox, or empty for none.
    MailboxOrNone,
    /// Absolute.
    Path,
    Url,
    /// Where a listener listens: an IP address and a port, or a Unix socket.
    Bind,
    /// An IP address and a port.
    Address,
    Networks,
}

/// The forms of a secret: itself, and where it comes from.
pub(super) const SECRET_FORMS: [&str; 4] = ["", "_file", "_env", "_credential"];

/// Messages in flight where `[throttle]` does not say: server, in a lane, over all lanes. The first fits all others.
pub(super) const CONCURRENCY: [(&str, usize, usize); 3] =
    [("", 20, 20), ("smtp.office365.com", 3, 20), ("smtp.gmail.com", 5, 20)];
/// The same for microsoft365, in a lane and over all lanes.
pub(super) const GRAPH_CONCURRENCY: (usize, usize) = (4, 4);
/// Recipients in one request of microsoft365 where it is not said.
pub(super) const GRAPH_RECIPIENTS: usize = 500;

const MB: u64 = 1_000_000;
const DAY: u64 = 24 * 60 * 60 * 1000;

const COUNT: Type = Type::Integer(1, 1_000_000);
const PORT: Type = Type::Integer(1, 65535);
const TIME: Type = Type::Duration(1, 365 * DAY);
const TIME_OR_ZERO: Type = Type::Duration(0, 365 * DAY);
const SIZE: Type = Type::Size(0, 1_000_000_000 * MB);
const PRIORITY: Type = Type::Choice(&["normal", "high"]);

pub(super) const SMTP: &str = "smtp";
pub(super) const MICROSOFT365: &str = "microsoft365";
pub(super) const NONE: &str = "none";
/// Counts as a kind of its own: an SMTP provider that logs in with a token has some keys of the other kind.
pub(super) const XOAUTH2: &str = "smtp with auth = \"xoauth2\"";

const fn key(
    path: &'static str,
    r#type: Type,
    default: Unwritten,
    available: Available,
    doc: &'static str,
) -> Key {
    Key { path, r#type, default, available, doc, kinds: &[] }
}

const fn smtp(name: &'static str, t: Type, d: Unwritten, a: Available, doc: &'static str) -> Key {
    Key { kinds: &[SMTP], ..key(name, t, d, a, doc) }
}

const fn graph(name: &'static str, t: Type, d: Unwritten, a: Available, doc: &'static str) -> Key {
    Key { kinds: &[MICROSOFT365], ..key(name, t, d, a, doc) }
}

const fn both(name: &'static str, t: Type, d: Unwritten, a: Available, doc: &'static str) -> Key {
    Key { kinds: &[SMTP, MICROSOFT365], ..key(name, t, d, a, doc) }
}

const fn oauth(name: &'static str, t: Type, d: Unwritten, a: Available, doc: &'static str) -> Key {
    Key { kinds: &[MICROSOFT365, XOAUTH2], ..key(name, t, d, a, doc) }
}

const fn none(name: &'static str, t: Type, d: Unwritten, a: Available, doc: &'static str) -> Key {
    Key { kinds: &[NONE], ..key(name, t, d, a, doc) }
}

#[rustfmt::skip] // it is read as a table
const KEYS: &[Key] = &[
    key("hostname", Type::Domain, Says("the system's name"), Now,
        "Name in greeting, EHLO, Received and reports."),
    key("provider_file", Type::Path, Nothing, Later,
        "File that holds the `[provider]` table, for a main file that nobody writes to."),

    key("listener.bind", Type::Bind, Is("\"127.0.0.1:25\""), Now,
        "Where clients connect: `ADDRESS:PORT` or `unix:/PATH`. A table `[[listener]]` for each; without any, one with the defaults."),
    key("listener.tls", Type::Choice(&["none", "starttls", "implicit"]), Is("\"none\""), Only(&["none"]),
        "TLS towards clients."),
    key("listener.certificate", Type::Path, Nothing, Later,
        "Certificate chain for `tls`, PEM."),
    key("listener.private_key", Type::Path, Nothing, Later,
        "Its key, PEM."),
    key("listener.auth", Type::Choice(&["off", "optional", "required"]), Is("\"off\""), Only(&["off"]),
        "Whether clients log in."),
    key("listener.allow_plaintext_auth", Type::Flag, Is("false"), Only(&["false"]),
        "Take AUTH without TLS."),
    key("listener.allow", Type::Networks, Is("[\"127.0.0.0/8\", \"::1/128\"]"), Now,
        "Networks whose clients may connect; an address alone is that one host. To be written where `bind` is not loopback."),
    key("listener.proxy_protocol", Type::Networks, Is("[]"), Only(&["[]"]),
        "Networks whose PROXY header is believed."),
    key("listener.priority", PRIORITY, Is("\"normal\""), Only(&["normal"]),
        "Priority of what comes in here."),

    key("user.name", Type::Text, Nothing, Later,
        "Name for AUTH. A table `[[user]]` for each."),
    key("user.password_hash", Type::Hash, Nothing, Later,
        "Argon2id hash of the password."),
    key("user.may_send_as", Type::Texts, Nothing, Later,
        "From addresses that this user may write."),
    key("user.priority", PRIORITY, Is("\"normal\""), Later,
        "Priority of what this user sends."),

    key("limits.message_size", Type::Size(1, 150 * MB), Is("\"35MB\""), Now,
        "Largest message, at most 150MB; also told to clients."),
    key("limits.recipients", COUNT, Is("1000"), Now,
        "Recipients of a message; more are told to come in another."),
    key("limits.connections", COUNT, Is("4000"), Now,
        "Connections in all."),
    key("limits.connections_per_client", COUNT, Is("200"), Now,
        "Connections of one address; loopback and Unix sockets are exempt."),
    key("limits.command_timeout", TIME, Is("\"5m\""), Now,
        "Longest wait for a command."),
    key("limits.data_timeout", TIME, Is("\"10m\""), Now,
        "Longest silence within a message."),
    key("limits.min_data_rate", Type::ByteRate, Is("\"500B/1s\""), Now,
        "Slowest that a message may come, after its first 30 s."),
    key("limits.errors_per_session", COUNT, Is("10"), Now,
        "Errors of a client before it is sent away."),
    key("limits.received_headers", COUNT, Is("50"), Now,
        "Received fields in a message before it is taken for a loop."),
    key("limits.bare_newline", Type::Choice(&["normalize", "reject"]), Is("\"normalize\""), Now,
        "A lone CR or LF in a message: made whole, or the message refused."),
    key("limits.shutdown_grace", TIME_OR_ZERO, Is("\"60s\""), Now,
        "How long a stop waits for deliveries in flight."),

    key("recipients.allowed", Type::Texts, Is("[]"), Only(&["[]"]),
        "For staging: patterns of recipients that are taken; empty for all."),
    key("recipients.redirect_all_to", Type::MailboxOrNone, Is("\"\""), Only(&[""]),
        "For staging: every message goes there instead."),

    key("sender.policy", Type::Choice(&["rewrite", "preserve", "reject"]), Is("\"rewrite\""), Now,
        "What becomes of a From that is not the provider's sender: rewritten, left as it is, or refused."),
    key("sender.allowed", Type::Texts, Is("[]"), Now,
        "Other From addresses that may stand, such as `*@example.com`."),

    key("provider.kind", Type::Choice(&[NONE, SMTP, MICROSOFT365]), Nothing, Now,
        "How mail leaves; decides which keys are allowed. Without a `[provider]` table: none."),
    both("provider.sender", Type::Mailbox, Nothing, Now,
        "The provider's own sender; of microsoft365 the mailbox that sends. For smtp it may be left out with the policy `preserve`."),
    both("provider.sender_name", Type::Text, Nothing, Now,
        "Display name where a message has none."),
    smtp("provider.server", Type::Host, Nothing, Now,
        "Name or IP address of the upstream server."),
    smtp("provider.port", PORT, Is("587"), Now,
        "Its port."),
    smtp("provider.security", Type::Choice(&["starttls", "tls", "none"]), Is("\"starttls\""), Now,
        "How the connection is secured. There is no fallback to clear text."),
    smtp("provider.auth", Type::Choice(&["none", "password", "xoauth2"]), Is("\"password\""), Now,
        "How to log in: with `password` by AUTH PLAIN or LOGIN, whichever the server offers; with `xoauth2` by a token of Microsoft Entra."),
    smtp("provider.username", Type::Text, Says("as `sender`"), Now,
        "Name to log in with."),
    smtp("provider.password", Type::Secret, Nothing, Now,
        "Password to log in with."),
    both("provider.ca_file", Type::Path, Nothing, Now,
        "Extra root certificates beside the system's, PEM."),
    both("provider.max_recipients", Type::Integer(1, 10_000), Is("100"), Now,
        "Recipients in one transaction (microsoft365: 500)."),
    both("provider.connect_timeout", TIME, Is("\"30s\""), Now,
        "Longest wait for a connection."),
    both("provider.command_timeout", TIME, Is("\"5m\""), Now,
        "Longest wait for the answer to a command."),
    both("provider.data_timeout", TIME, Is("\"3m\""), Now,
        "Longest wait while content is being sent."),
    both("provider.final_timeout", TIME, Is("\"10m\""), Now,
        "Longest wait for the answer to a whole message."),
    oauth("provider.tenant_id", Type::Text, Nothing, Now,
        "Directory (tenant) id or domain; workload identity takes `AZURE_TENANT_ID` where it is left out."),
    oauth("provider.client_id", Type::Text, Nothing, Now,
        "Application (client) id; workload identity takes `AZURE_CLIENT_ID` where it is left out, and a managed identity without is the machine's own."),
    oauth("provider.client_secret", Type::Secret, Nothing, Now,
        "Client secret of the application."),
    oauth("provider.next_client_secret", Type::Secret, Nothing, Now,
        "Tried when the first is refused, so that a secret can be changed without an outage."),
    oauth("provider.certificate", Type::Path, Nothing, Now,
        "Certificate in place of a client secret, PEM. Read again at each login."),
    oauth("provider.private_key", Type::Path, Nothing, Now,
        "Its key: RSA, PEM, not encrypted."),
    oauth("provider.workload_identity", Type::Flag, Is("false"), Now,
        "Log in by workload identity (Kubernetes) instead: with the token in the file that `AZURE_FEDERATED_TOKEN_FILE` names."),
    oauth("provider.managed_identity", Type::Flag, Is("false"), Now,
        "Log in by managed identity (Azure) instead."),
    oauth("provider.cloud", Type::Choice(&["global", "us-gov", "us-gov-dod", "china"]), Is("\"global\""), Now,
        "National cloud. Where it is left out, `AZURE_AUTHORITY_HOST` and `MAILSLUICE_GRAPH_ENDPOINT` may name the endpoints."),
    oauth("provider.endpoints.login", Type::Url, Says("by `cloud`"), Now,
        "Where tokens are fetched, the root; `http:` only on loopback."),
    graph("provider.endpoints.graph", Type::Url, Says("by `cloud`"), Now,
        "Where mail is sent, the root; `http:` only on loopback."),
    graph("provider.save_to_sent_items", Type::Flag, Is("false"), Now,
        "Keep a copy in Sent Items."),
    graph("provider.format", Type::Choice(&["auto", "json", "mime"]), Is("\"auto\""), Now,
        "Form of a request."),
    graph("provider.large_messages", Type::Choice(&["auto", "on", "off"]), Is("\"auto\""), Now,
        "Whether messages over about 3 MB are sent by draft and upload."),
    none("provider.on_mail", Type::Choice(&["reject", "hold"]), Is("\"reject\""), Now,
        "Without a provider: refuse mail for now, or accept it and wait for a provider."),

    key("throttle.messages", Type::Rate, Says("by provider"), Only(&["none"]),
        "Messages of a lane (the account that the remote counts)."),
    key("throttle.recipients", Type::Rate, Says("by provider"), Only(&["none"]),
        "Recipients of a lane."),
    key("throttle.requests", Type::Rate, Says("by provider"), Only(&["none"]),
        "Requests of a lane."),
    key("throttle.upload", Type::ByteRate, Says("by provider"), Only(&["none"]),
        "Octets sent of a lane."),
    key("throttle.concurrency", COUNT, Says("20; at smtp.office365.com 3, at smtp.gmail.com 5; microsoft365: 4"), Now,
        "Messages of a lane in flight."),
    key("throttle.provider.messages", Type::Rate, Is("\"none\""), Only(&["none"]),
        "Messages over all lanes."),
    key("throttle.provider.recipients", Type::Rate, Is("\"none\""), Only(&["none"]),
        "Recipients over all lanes."),
    key("throttle.provider.requests", Type::Rate, Is("\"none\""), Only(&["none"]),
        "Requests over all lanes."),
    key("throttle.provider.upload", Type::ByteRate, Is("\"none\""), Only(&["none"]),
        "Octets sent over all lanes."),
    key("throttle.provider.concurrency", COUNT, Says("20; microsoft365: 4"), Now,
        "Messages in flight over all lanes."),
    key("throttle.mailbox.*.messages", Type::Rate, Says("as `throttle.messages`"), Only(&["none"]),
        "Messages of the lane of that name."),
    key("throttle.mailbox.*.recipients", Type::Rate, Says("as `throttle.recipients`"), Only(&["none"]),
        "Recipients of that lane."),
    key("throttle.mailbox.*.requests", Type::Rate, Says("as `throttle.requests`"), Only(&["none"]),
        "Requests of that lane."),
    key("throttle.mailbox.*.upload", Type::ByteRate, Says("as `throttle.upload`"), Only(&["none"]),
        "Octets sent of that lane."),
    key("throttle.mailbox.*.concurrency", COUNT, Says("as `throttle.concurrency`"), Now,
        "Messages of that lane in flight."),

    key("retry.first", TIME, Is("\"1m\""), Now,
        "Wait after the first deferral."),
    key("retry.factor", Type::Number(1.0, 100.0), Is("2.0"), Now,
        "Each further wait is so many times the one before."),
    key("retry.max", TIME, Is("\"1h\""), Now,
        "Longest wait between two attempts."),
    key("retry.jitter", Type::Number(0.0, 1.0), Is("0.2"), Now,
        "Spread of a wait: 0.2 makes it 80 % to 120 % of itself."),
    key("retry.give_up_after", TIME, Is("\"5d\""), Now,
        "A message fails once its own deferrals span more than this."),
    key("retry.in_doubt", Type::Choice(&["retry", "hold"]), Is("\"retry\""), Now,
        "A message that may have been sent: sent once more, or held."),
    key("retry.in_doubt_after", TIME, Is("\"10m\""), Now,
        "Wait before a message in doubt is sent once more."),

    key("bounce.to", Type::Choice(&["sender", "postmaster", "none"]), Is("\"sender\""), Now,
        "Who is told that a message failed."),
    key("bounce.postmaster", Type::Mailbox, Nothing, Now,
        "Who is told where the sender cannot be, and of outages."),
    key("bounce.delay_warning_after", TIME, Is("\"4h\""), Now,
        "When the sender is told that a message waits."),
    key("bounce.max_per_hour", COUNT, Is("100"), Now,
        "Reports of a kind in an hour; beyond it one digest."),
    key("bounce.return", Type::Choice(&["headers", "full"]), Is("\"headers\""), Now,
        "What a report returns of the message."),

    key("spool.path", Type::Path, Is("\"/var/lib/mailsluice/spool\""), Now,
        "Folder of the queue; mode 0700."),
    key("spool.min_free", SIZE, Is("\"500MB\""), Now,
        "Below this much free space nothing is accepted; twice that where the file system copies on write (btrfs, zfs)."),
    key("spool.keep_failed", TIME_OR_ZERO, Is("\"14d\""), Now,
        "How long failed messages are kept, at least; looked at every hour."),

    key("admin.bind", Type::Address, Is("\"127.0.0.1:9925\""), Now,
        "HTTP: health and metrics. Loopback only."),
    key("admin.socket", Type::Path, Says("`admin.sock` in the folder of the spool"), Now,
        "The same and the queue by a Unix socket (0600), for the command line."),
    key("admin.token_file", Type::Path, Nothing, Later,
        "File with the token that callers show."),

    key("log.level", Type::Choice(&["error", "warn", "info", "debug", "trace"]), Is("\"info\""), Now,
        "How much is logged."),
    key("log.format", Type::Choice(&["auto", "text", "json", "journald"]), Is("\"auto\""), Only(&["auto", "text", "json"]),
        "`auto` is text on a terminal, else JSON lines."),
    key("log.addresses", Type::Flag, Is("true"), Now,
        "Whether mail addresses stand in the log; false masks their local parts."),
];

/// Every key, in the order of README and the sample.
pub fn keys() -> &'static [Key] {
    KEYS
}

impl Key {
    /// The table it stands in, empty for the top of the file.
    pub fn table(&self) -> &'static str {
        self.path.rsplit_once('.').map_or("", |(table, _)| table)
    }

    pub fn name(&self) -> &'static str {
        self.path.rsplit_once('.').map_or(self.path, |(_, name)| name)
    }

    /// The names under which it is written: one, or the four forms of a secret.
    pub(super) fn names(&self) -> impl Iterator<Item = String> {
        let forms = match self.r#type {
            Type::Secret => &SECRET_FORMS[..],
            _ => &SECRET_FORMS[..1],
        };
        forms.iter().map(|form| format!("{}{form}", self.name()))
    }
}

/// The keys of one table.
pub(super) fn of_table(table: &str) -> impl Iterator<Item = &'static Key> {
    KEYS.iter().filter(move |key| key.table() == table)
}

/// The names of the tables within a table.
pub(super) fn tables_of(table: &str) -> Vec<&'static str> {
    let mut names = Vec::new();
    for key in KEYS {
        let inner = match table {
            "" => Some(key.path),
            _ => key.path.strip_prefix(table).and_then(|rest| rest.strip_prefix('.')),
        };
        if let Some((name, _)) = inner.and_then(|inner| inner.split_once('.'))
            && !names.contains(&name)
        {
            names.push(name);
        }
    }
    names
}

/// A table's name as the file writes its header; empty for the top of the file.
pub(super) fn header(table: &str) -> String {
    match table {
        "" => String::new(),
        "listener" | "user" => format!("[[{table}]]"),
        _ => format!("[{table}]"),
    }
}

impl fmt::Display for Unwritten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Is(value) => write!(f, "`{value}`"),
            Says(words) => f.write_str(words),
            Nothing => f.write_str("–"),
        }
    }
}

/// In words for README.
impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flag => "`true` or `false`",
            Self::Integer(min, max) => return write!(f, "integer, {min} to {max}"),
            Self::Number(min, max) => return write!(f, "number, {min} to {max}"),
            Self::Size(..) => "size",
            Self::Duration(..) => "duration",
            Self::Rate | Self::ByteRate => "rate",
            Self::Choice(choices) => {
                let quoted: Vec<String> = choices.iter().map(|c| format!("`\"{c}\"`")).collect();
                return f.write_str(&quoted.join(", "));
            }
            Self::Text => "text",
            Self::Texts => "list of texts",
            Self::Secret => "secret",
            Self::Hash => "argon2id hash",
            Self::Domain => "domain name",
            Self::Host => "host name or IP address",
            Self::Mailbox | Self::MailboxOrNone => "mail address",
            Self::Path => "absolute path",
            Self::Url => "URL",
            Self::Bind => "address and port, or socket",
            Self::Address => "address and port",
            Self::Networks => "list of networks",
        })
    }
}

/// The Markdown table of all keys that README holds.
pub fn reference() -> String {
    use fmt::Write as _;
    let mut out = String::from("| key | type | default | what it does |\n|---|---|---|---|\n");
    for key in KEYS {
        let mark = match key.available {
            Now => String::new(),
            Only(values) => {
                let quoted: Vec<String> = values.iter().map(|v| format!("`{}`", toml(v))).collect();
                format!(" *In this version only {}.*", quoted.join(", "))
            }
            Later => " *Not in this version.*".to_owned(),
        };
        let kinds = match key.kinds {
            [] => String::new(),
            kinds => format!(" ({})", kinds.join(", ")),
        };
        let names: Vec<String> = key.names().map(|name| format!("`{name}`")).collect();
        let names = match (&names[..], key.table()) {
            ([_], _) | ([], _) => format!("`{}`", key.path),
            (forms, table) => format!("`{table}.` {}", forms.join(", ")),
        };
        // Writing to a String does not fail.
        let _infallible = writeln!(
            out,
            "| {names}{kinds} | {} | {} | {}{mark} |",
            key.r#type, key.default, key.doc
        );
    }
    out
}

/// A plainly written value as TOML has it.
pub(super) fn toml(plain: &str) -> String {
    match plain {
        "true" | "false" | "[]" => plain.to_owned(),
        _ => format!("\"{plain}\""),
    }
}
