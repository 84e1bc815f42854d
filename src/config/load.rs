//! From a file to `Config`: every table is read by the table of keys, every problem is kept, and only a file without
//! any becomes a `Config`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::config::keys::{self, Key};
use crate::config::oauth::{self, Variables};
use crate::config::problem::{Findings, Problem, Problems, shown};
use crate::config::value::{self, Value};
use crate::config::{
    Admin, Bind, Bounce, BounceTo, Config, InDoubt, Limits, Listener, Log, LogFormat, LogLevel,
    Login, OnMail, Pattern, Proof, Provider, Rate, Retry, Secret, Security, Sender, SenderPolicy,
    SmtpProvider, Spool, Throttle, validate,
};
use crate::smtp::address::{Charset, Domain, Mailbox};
use crate::smtp::data::BareNewline;
use crate::smtp::reply::Escaped;

/// Largest file that is read, in octets.
const MAX_FILE: u64 = 1 << 20;

/// A file without problems.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    pub config: Config,
    /// What works and is worth a look.
    pub warnings: Vec<Problem>,
}

/// What a configuration takes from the system it runs on.
#[derive(Clone, Debug)]
pub(super) struct Surroundings {
    /// The system's own name; may be anything.
    pub(super) hostname: String,
    /// The permissions of the file, where it is one.
    pub(super) mode: Option<u32>,
    pub(super) secrets: Secrets,
    pub(super) variables: Variables,
}

/// What becomes of secrets that stand elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Secrets {
    /// They are read, for the gateway itself.
    Read,
    /// The same for who only looks: what systemd hands to the gateway alone is not missed.
    Look,
    /// They are not read, for who does without.
    Leave,
}

impl Surroundings {
    fn of_this_system() -> Self {
        let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let variables = Variables::of_this_process();
        Self { hostname, mode: None, secrets: Secrets::Read, variables }
    }
}

/// Reads a file.
pub fn load(path: &Path, secrets: Secrets) -> Result<Loaded, Problems> {
    let name = Escaped(path.as_os_str().as_bytes()).to_string();
    let mut bytes = Vec::new();
    let mut mode = None;
    let read = File::open(path).and_then(|file| {
        mode = Some(file.metadata()?.permissions().mode());
        file.take(MAX_FILE + 1).read_to_end(&mut bytes)
    });
    let surroundings = Surroundings { mode, secrets, ..Surroundings::of_this_system() };
    match read {
        Err(e) => {
            let what = match e.kind() {
                io::ErrorKind::NotFound => {
                    "; name another with --config, or try `mailsluice sandbox`, which needs none"
                }
                _ => "",
            };
            Err(Problems::whole(name, format!("the file cannot be read: {e}{what}")))
        }
        Ok(length) if length as u64 > MAX_FILE => {
            Err(Problems::whole(name, "is larger than 1MiB, which no configuration is".to_owned()))
        }
        Ok(_) => parse_bytes(&bytes, &name, &surroundings),
    }
}

/// Reads a text; `name` stands for it in messages.
pub fn parse(text: &str, name: &str) -> Result<Loaded, Problems> {
    parse_in(text, name, &Surroundings::of_this_system())
}

pub(super) fn parse_bytes(
    bytes: &[u8],
    name: &str,
    surroundings: &Surroundings,
) -> Result<Loaded, Problems> {
    match std::str::from_utf8(bytes) {
        Ok(text) => parse_in(text, name, surroundings),
        Err(e) => {
            let good = bytes.utf8_chunks().next().map(|chunk| chunk.valid()).unwrap_or_default();
            let mut findings = Findings::default();
            let byte = bytes.get(e.valid_up_to()).copied().unwrap_or_default();
            findings.syntax(
                good.len(),
                format!("the byte {byte:#04x} is not UTF-8; save the file as UTF-8"),
            );
            Err(Problems { file: name.to_owned(), problems: findings.in_words(good).0 })
        }
    }
}

pub(super) fn parse_in(
    text: &str,
    name: &str,
    surroundings: &Surroundings,
) -> Result<Loaded, Problems> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut findings = Findings::default();
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let span = error.span().unwrap_or_default();
        let at = span.start.min(text.len());
        let there = shown(text.get(span).unwrap_or_default());
        match error.message() {
            "duplicate key" if there == "provider" => {
                findings.wrong(at, "[provider]", ONE_PROVIDER.to_owned());
            }
            "duplicate key" => {
                findings.wrong(at, "", format!("`{there}` is written twice; keep one of them"));
            }
            message => {
                let why = syntax_error(message, &there);
                findings.syntax(at, format!("this is no TOML: {why}"));
            }
        }
    }
    let mut file = Tables::read(table.get_ref(), &mut findings);
    read_secrets(&mut file.provider, surroundings, &mut findings);
    validate::check(&file, &mut findings);
    oauth::check(&file, surroundings, &mut findings);
    match findings.in_words(text) {
        (problems, warnings) if problems.is_empty() => {
            Ok(Loaded { config: file.config(surroundings), warnings })
        }
        (problems, _) => Err(Problems { file: name.to_owned(), problems }),
    }
}

/// The errors that are made most, in plainer words than the parser's.
fn syntax_error<'m>(message: &'m str, there: &str) -> &'m str {
    match message {
        m if m.starts_with("string values must be quoted") && there.is_empty() => {
            "the value is missing"
        }
        m if m.starts_with("string values must be quoted") => "text is written in quotes",
        m if m.starts_with("invalid basic string") => {
            "the text in quotes does not end on its line, or has a backslash that is not doubled"
        }
        m => m,
    }
}

/// A table of the file, read by the table of keys.
pub(super) struct Section {
    /// Its path in the table of keys.
    pub(super) path: &'static str,
    /// As the file writes it, for messages; empty for the top of the file.
    pub(super) header: String,
    /// Where it begins; none if it is not written.
    pub(super) at: Option<usize>,
    pub(super) written: Vec<Written>,
}

/// A key that the file has.
pub(super) struct Written {
    pub(super) key: &'static Key,
    /// As it is written; for a secret with its form.
    pub(super) name: String,
    pub(super) at: usize,
    pub(super) value_at: usize,
    /// None where it was wrong, which has been found then.
    pub(super) value: Option<Value>,
}

/// The tables of a file, those that are not written as empty ones.
pub(super) struct Tables {
    pub(super) root: Section,
    /// As written, possibly none.
    pub(super) listeners: Vec<Section>,
    pub(super) users: Vec<Section>,
    pub(super) limits: Section,
    pub(super) recipients: Section,
    pub(super) sender: Section,
    pub(super) provider: Section,
    pub(super) endpoints: Section,
    pub(super) throttle: Section,
    pub(super) throttle_provider: Section,
    /// With the names of the lanes.
    pub(super) throttle_mailbox: Vec<(String, Section)>,
    pub(super) retry: Section,
    pub(super) bounce: Section,
    pub(super) spool: Section,
    pub(super) admin: Section,
    pub(super) log: Section,
}

type Entry<'t, 'i> = (&'t Spanned<std::borrow::Cow<'i, str>>, &'t Spanned<DeValue<'i>>);

const ONE_PROVIDER: &str =
    "there is exactly one provider; write one table [provider], whose `kind` says which it is";

impl Tables {
    fn read(root: &DeTable<'_>, findings: &mut Findings) -> Self {
        let throttle = entry(root, "throttle").and_then(|(_, value)| value.get_ref().as_table());
        let provider = entry(root, "provider").and_then(|(_, value)| value.get_ref().as_table());
        let mut one = |parent: Option<&DeTable<'_>>, path: &'static str| {
            let name = path.rsplit('.').next().unwrap_or(path);
            table(path, parent.and_then(|parent| entry(parent, name)), findings)
        };
        Self {
            limits: one(Some(root), "limits"),
            recipients: one(Some(root), "recipients"),
            sender: one(Some(root), "sender"),
            provider: one(Some(root), "provider"),
            endpoints: one(provider, "provider.endpoints"),
            throttle: one(Some(root), "throttle"),
            throttle_provider: one(throttle, "throttle.provider"),
            retry: one(Some(root), "retry"),
            bounce: one(Some(root), "bounce"),
            spool: one(Some(root), "spool"),
            admin: one(Some(root), "admin"),
            log: one(Some(root), "log"),
            throttle_mailbox: mailboxes(throttle, findings),
            listeners: list("listener", entry(root, "listener"), findings),
            users: list("user", entry(root, "user"), findings),
            root: section("", String::new(), Some(0), root, findings),
        }
    }

    /// All of them, for checks that know no table by name.
    pub(super) fn sections(&self) -> impl Iterator<Item = &Section> {
        let single = [
            &self.root,
            &self.limits,
            &self.recipients,
            &self.sender,
            &self.provider,
            &self.endpoints,
            &self.throttle,
            &self.throttle_provider,
            &self.retry,
            &self.bounce,
            &self.spool,
            &self.admin,
            &self.log,
        ];
        let mailboxes = self.throttle_mailbox.iter().map(|(_, section)| section);
        single.into_iter().chain(&self.listeners).chain(&self.users).chain(mailboxes)
    }

    /// What the parts read. Only for a file without problems.
    fn config(&self, surroundings: &Surroundings) -> Config {
        let default_listener = [Section::unwritten("listener")];
        let listeners = match &self.listeners[..] {
            [] => &default_listener[..],
            written => written,
        };
        let provider = self.provider(surroundings);
        let (lane, over_all) = default_concurrency(&provider);
        Config {
            hostname: match self.root.value("hostname") {
                Some(Value::Domain(hostname)) => hostname,
                _ => hostname_of(surroundings),
            },
            listeners: listeners
                .iter()
                .map(|listener| Listener {
                    bind: listener.bind("bind"),
                    allow: listener.networks("allow"),
                })
                .collect(),
            limits: self.limits(),
            sender: self.sender(),
            throttle: Throttle {
                concurrency: self.throttle.count_or("concurrency", lane),
                provider_concurrency: self.throttle_provider.count_or("concurrency", over_all),
                mailbox_concurrency: self.mailbox_concurrency(),
            },
            provider,
            retry: Retry {
                first: self.retry.duration("first"),
                factor: self.retry.number("factor"),
                max: self.retry.duration("max"),
                jitter: self.retry.number("jitter"),
                give_up_after: self.retry.duration("give_up_after"),
                in_doubt: match self.retry.text("in_doubt").as_str() {
                    "hold" => InDoubt::Hold,
                    _ => InDoubt::Retry,
                },
                in_doubt_after: self.retry.duration("in_doubt_after"),
            },
            bounce: Bounce {
                to: match self.bounce.text("to").as_str() {
                    "postmaster" => BounceTo::Postmaster,
                    "none" => BounceTo::Nobody,
                    _ => BounceTo::Sender,
                },
                postmaster: self.bounce.mailbox("postmaster"),
                delay_warning_after: self.bounce.duration("delay_warning_after"),
                max_per_hour: self.bounce.count("max_per_hour"),
                full: self.bounce.text("return") == "full",
            },
            spool: Spool {
                path: self.spool.path("path"),
                min_free: self.spool.integer("min_free"),
                keep_failed: self.spool.duration("keep_failed"),
            },
            admin: Admin { bind: self.admin.address("bind"), socket: self.admin_socket() },
            log: Log {
                level: match self.log.text("level").as_str() {
                    "error" => LogLevel::Error,
                    "warn" => LogLevel::Warn,
                    "debug" => LogLevel::Debug,
                    "trace" => LogLevel::Trace,
                    _ => LogLevel::Info,
                },
                format: match self.log.text("format").as_str() {
                    "text" => LogFormat::Text,
                    "json" => LogFormat::Json,
                    _ => LogFormat::Auto,
                },
                addresses: self.log.flag("addresses"),
            },
        }
    }

    /// With the spool: its folder is there, ours and nobody else's, and no two daemons have the same.
    pub(super) fn admin_socket(&self) -> PathBuf {
        match (self.admin.value("socket"), self.spool.value("path")) {
            (Some(Value::Path(path)), _) => path,
            (_, Some(Value::Path(spool))) => spool.join("admin.sock"),
            // A path that is wrong is told elsewhere.
            _ => PathBuf::new(),
        }
    }

    fn limits(&self) -> Limits {
        let limits = &self.limits;
        Limits {
            message_size: limits.integer("message_size"),
            recipients: limits.count("recipients"),
            connections: limits.count("connections"),
            connections_per_client: limits.count("connections_per_client"),
            command_timeout: limits.duration("command_timeout"),
            data_timeout: limits.duration("data_timeout"),
            min_data_rate: limits.rate("min_data_rate"),
            errors_per_session: u32::try_from(limits.integer("errors_per_session"))
                .unwrap_or(u32::MAX),
            received_headers: limits.count("received_headers"),
            bare_newline: match limits.text("bare_newline").as_str() {
                "reject" => BareNewline::Reject,
                _ => BareNewline::Normalize,
            },
            shutdown_grace: limits.duration("shutdown_grace"),
        }
    }

    fn sender(&self) -> Sender {
        let allowed = match self.sender.value("allowed") {
            Some(Value::Texts(texts)) => texts,
            _ => Vec::new(),
        };
        Sender {
            policy: match self.sender.text("policy").as_str() {
                "preserve" => SenderPolicy::Preserve,
                "reject" => SenderPolicy::Reject,
                _ => SenderPolicy::Rewrite,
            },
            allowed: allowed.iter().filter_map(|text| Pattern::parse(text).ok()).collect(),
        }
    }

    fn provider(&self, surroundings: &Surroundings) -> Provider {
        let provider = &self.provider;
        match provider.value("kind") {
            Some(Value::Text(kind)) if kind == keys::SMTP => {
                Provider::Smtp(Box::new(SmtpProvider {
                    server: provider.text("server"),
                    security: match provider.text("security").as_str() {
                        "none" => Security::None,
                        "tls" => Security::Tls,
                        _ => Security::StartTls,
                    },
                    login: self.login(surroundings),
                    ca_file: match provider.value("ca_file") {
                        Some(Value::Path(path)) => Some(path),
                        _ => None,
                    },
                    port: u16::try_from(provider.integer("port")).unwrap_or(u16::MAX),
                    sender: provider.mailbox("sender"),
                    sender_name: match provider.value("sender_name") {
                        Some(Value::Text(name)) => Some(name),
                        _ => None,
                    },
                    max_recipients: provider.count("max_recipients"),
                    connect_timeout: provider.duration("connect_timeout"),
                    command_timeout: provider.duration("command_timeout"),
                    data_timeout: provider.duration("data_timeout"),
                    final_timeout: provider.duration("final_timeout"),
                }))
            }
            Some(Value::Text(kind)) if kind == keys::MICROSOFT365 => {
                Provider::Microsoft365(Box::new(self.microsoft365(surroundings)))
            }
            _ => Provider::None {
                on_mail: match provider.text("on_mail").as_str() {
                    "hold" => OnMail::Hold,
                    _ => OnMail::Reject,
                },
            },
        }
    }

    fn login(&self, surroundings: &Surroundings) -> Option<Login> {
        let provider = &self.provider;
        let proof = match provider.text("auth").as_str() {
            "password" => Proof::Password(provider.secret("password")?),
            "xoauth2" => Proof::Token(self.app(oauth::Of::Smtp, surroundings)),
            _ => return None,
        };
        let sender = || provider.mailbox("sender").map(|sender| sender.as_str().to_owned());
        let username = match provider.value("username") {
            Some(Value::Text(username)) => username,
            _ => sender()?,
        };
        Some(Login { username, proof })
    }

    fn mailbox_concurrency(&self) -> BTreeMap<String, usize> {
        let written = |(name, section): &(String, Section)| {
            let concurrency = section.find("concurrency").map(|_| section.count("concurrency"));
            concurrency.map(|concurrency| (name.clone(), concurrency))
        };
        self.throttle_mailbox.iter().filter_map(written).collect()
    }
}

/// The system's name, if mail can be sent under it.
fn hostname_of(surroundings: &Surroundings) -> Domain {
    Domain::parse(&surroundings.hostname, Charset::Ascii)
        .or_else(|_no_domain| Domain::parse("localhost", Charset::Ascii))
        .expect("localhost is a domain")
}

/// Messages in flight in a lane and over all of them.
fn default_concurrency(provider: &Provider) -> (usize, usize) {
    let server = match provider {
        Provider::Smtp(smtp) => smtp.server.as_str(),
        Provider::Microsoft365(_) => return keys::GRAPH_CONCURRENCY,
        Provider::None { .. } => "",
    };
    let [(_, lane, over_all), named @ ..] = keys::CONCURRENCY;
    let own = named.iter().find(|(name, _, _)| name.eq_ignore_ascii_case(server));
    own.map_or((lane, over_all), |(_, lane, over_all)| (*lane, *over_all))
}

/// The value of a name, with the key as the file has it.
fn entry<'t, 'i>(table: &'t DeTable<'i>, name: &str) -> Option<Entry<'t, 'i>> {
    table.get_key_value(name)
}

/// Reads a table that is written once, or not at all.
fn table(path: &'static str, entry: Option<Entry<'_, '_>>, findings: &mut Findings) -> Section {
    let Some((key, value)) = entry else { return Section::unwritten(path) };
    let header = keys::header(path);
    match value.get_ref() {
        DeValue::Table(inner) => section(path, header, Some(value.span().start), inner, findings),
        DeValue::Array(_) if path == "provider" => {
            findings.wrong(value.span().start, &header, ONE_PROVIDER.to_owned());
            Section::unwritten(path)
        }
        other => {
            let is = value::type_of(other);
            let name = key.get_ref();
            let text = format!("`{name}` is {is}, write a table: a line {header}, its keys below");
            findings.wrong(key.span().start, "", text);
            Section::unwritten(path)
        }
    }
}

/// Reads a table that is written any number of times, as `[[name]]`.
fn list(path: &'static str, entry: Option<Entry<'_, '_>>, findings: &mut Findings) -> Vec<Section> {
    let Some((key, value)) = entry else { return Vec::new() };
    let header = keys::header(path);
    let mut sections = Vec::new();
    if let DeValue::Array(items) = value.get_ref() {
        for item in items {
            if let DeValue::Table(inner) = item.get_ref() {
                let at = Some(item.span().start);
                sections.push(section(path, header.clone(), at, inner, findings));
            }
        }
        if sections.len() == items.len() {
            return sections;
        }
    }
    findings.wrong(
        key.span().start,
        "",
        format!("`{path}` may be there many times; write {header} above the keys of each"),
    );
    sections
}

/// Reads the tables `[throttle.mailbox."NAME"]`.
fn mailboxes(throttle: Option<&DeTable<'_>>, findings: &mut Findings) -> Vec<(String, Section)> {
    let Some((key, value)) = throttle.and_then(|throttle| entry(throttle, "mailbox")) else {
        return Vec::new();
    };
    let wanted = "write [throttle.mailbox.\"NAME\"] with the name of a lane, its keys below";
    let DeValue::Table(names) = value.get_ref() else {
        let is = value::type_of(value.get_ref());
        findings.wrong(key.span().start, "[throttle]", format!("`mailbox` is {is}, {wanted}"));
        return Vec::new();
    };
    let mut sections = Vec::new();
    for (name, value) in names {
        let shown_name = shown(name.get_ref());
        match value.get_ref() {
            DeValue::Table(inner) if !name.get_ref().is_empty() => {
                let header = format!("[throttle.mailbox.\"{shown_name}\"]");
                let at = Some(value.span().start);
                let section = section("throttle.mailbox.*", header, at, inner, findings);
                sections.push((name.get_ref().clone().into_owned(), section));
            }
            _ => findings.wrong(
                name.span().start,
                "[throttle.mailbox]",
                format!("`{shown_name}` is no lane, {wanted}"),
            ),
        }
    }
    sections
}

/// Reads the keys of one table. Tables within it are read by whoever asks for them.
fn section(
    path: &'static str,
    header: String,
    at: Option<usize>,
    table: &DeTable<'_>,
    findings: &mut Findings,
) -> Section {
    let mut section = Section { path, header, at, written: Vec::new() };
    let inner_tables = keys::tables_of(path);
    for (name, value) in table {
        let at = name.span().start;
        let value_at = value.span().start;
        if let Some((key, form)) = find_key(path, name.get_ref()) {
            let value = match form {
                "" => value::read(key, value.get_ref()),
                form => value::read_secret_source(form, value.get_ref()),
            };
            let name = name.get_ref().clone().into_owned();
            let value =
                value.map_err(|text| findings.wrong(value_at, &section.named(&name), text)).ok();
            section.written.push(Written { key, name, at, value_at, value });
        } else if !inner_tables.contains(&name.get_ref().as_ref()) {
            let is_table = value.get_ref().is_table();
            findings.wrong(at, &section.header, unknown(path, name.get_ref(), is_table));
        }
    }
    section
}

/// Puts what stands elsewhere in its place. What is of no use in this version is left where it is.
fn read_secrets(section: &mut Section, surroundings: &Surroundings, findings: &mut Findings) {
    if surroundings.secrets == Secrets::Leave {
        return;
    }
    let header = section.named("");
    for written in &mut section.written {
        let is_secret = matches!(written.key.r#type, keys::Type::Secret);
        if !is_secret || matches!(written.key.available, keys::Available::Later) {
            continue;
        }
        let form = written.name.strip_prefix(written.key.name()).unwrap_or_default();
        let Some(source) = &written.value else { continue };
        let named = format!("{header}{}", written.name);
        let Some(read) = value::read_secret(form, source) else {
            let mode = surroundings.mode.unwrap_or(0) & 0o777;
            if mode & 0o007 != 0 {
                let text = format!(
                    "stands in a file that anybody can read or change (mode {mode:04o}): run chmod \
                     600 on this file, or write `{}_file`",
                    written.key.name()
                );
                findings.wrong(written.value_at, &named, text);
            }
            continue;
        };
        let is_elsewhere = surroundings.secrets == Secrets::Look
            && form == "_credential"
            && std::env::var_os("CREDENTIALS_DIRECTORY").is_none();
        match read {
            Ok(secret) => written.value = Some(Value::Secret(secret)),
            Err(text) if is_elsewhere => findings.warning(written.value_at, &named, text),
            Err(text) => {
                findings.wrong(written.value_at, &named, text);
                written.value = None;
            }
        }
    }
}

/// The key of that name, and for a secret the form.
fn find_key(table: &str, name: &str) -> Option<(&'static Key, &'static str)> {
    keys::of_table(table).find_map(|key| {
        let form = name.strip_prefix(key.name())?;
        let forms: &[&'static str] = match key.r#type {
            keys::Type::Secret => &keys::SECRET_FORMS,
            _ => &[""],
        };
        forms.iter().find(|known| **known == form).map(|form| (key, *form))
    })
}

/// What to say of a name that the table does not have.
fn unknown(table: &str, name: &str, is_table: bool) -> String {
    let shown_name = shown(name);
    let names_a_kind = [keys::SMTP, keys::MICROSOFT365, keys::NONE].contains(&name);
    let second_provider = table == "provider" || names_a_kind || name.starts_with("provider");
    if is_table && second_provider && (table.is_empty() || table == "provider") {
        return format!("`{shown_name}` is a provider of its own, but {ONE_PROVIDER}");
    }
    let mut known: Vec<String> = keys::of_table(table).flat_map(Key::names).collect();
    known.extend(keys::tables_of(table).into_iter().filter(|name| *name != "*").map(str::to_owned));
    if let Some(nearest) = nearest(name, &known) {
        return match keys::tables_of(table).contains(&nearest) {
            true => format!("`{shown_name}` is unknown; the nearest table is `{nearest}`"),
            false => format!("`{shown_name}` is unknown; the nearest key is `{nearest}`"),
        };
    }
    let elsewhere: Vec<String> = (keys::keys().iter())
        .filter(|key| key.name() == name && !key.table().is_empty())
        .map(|key| keys::header(key.table()))
        .collect();
    match (&elsewhere[..], table) {
        ([], _) if known.len() > 15 || table.is_empty() => {
            format!("`{shown_name}` is unknown; leave it out")
        }
        ([], _) => format!("`{shown_name}` is unknown; the keys here are {}", known.join(", ")),
        (tables, _) => {
            format!("`{shown_name}` is not a key here; it belongs below {}", tables.join(" or "))
        }
    }
}

/// The name that was probably meant.
fn nearest<'k>(name: &str, known: &'k [String]) -> Option<&'k str> {
    // Longer than any key and its slips; also bounds the work.
    if name.len() > 60 {
        return None;
    }
    let name = name.to_lowercase().replace('-', "_");
    (known.iter())
        .filter(|known| known.len().abs_diff(name.len()) <= known.len().div_ceil(3))
        .map(|known| (distance(&name, known), known))
        .filter(|(distance, known)| *distance <= known.len().div_ceil(3))
        .min()
        .map(|(_, known)| known.as_str())
}

/// How many letters are missing, extra, wrong or swapped with their neighbour.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let same = usize::from(a[i - 1] != b[j - 1]);
            let mut least = (rows[i - 1][j] + 1).min(row[j - 1] + 1).min(rows[i - 1][j - 1] + same);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

/// The getters trust the table of keys for type and default; a test reads every key of every kind of provider.
impl Section {
    pub(super) fn unwritten(path: &'static str) -> Self {
        Self { path, header: keys::header(path), at: None, written: Vec::new() }
    }

    /// A key of it as messages name it.
    pub(super) fn named(&self, name: &str) -> String {
        match self.header.as_str() {
            "" => name.to_owned(),
            header => format!("{header} {name}"),
        }
    }

    pub(super) fn find(&self, name: &str) -> Option<&Written> {
        self.written.iter().find(|written| written.name == name)
    }

    /// What is written and right, else the default.
    pub(super) fn value(&self, name: &str) -> Option<Value> {
        match self.find(name) {
            Some(written) => written.value.clone(),
            None => find_key(self.path, name).and_then(|(key, _)| value::default(key)),
        }
    }

    fn take<T>(&self, name: &str, pick: impl FnOnce(Value) -> Option<T>) -> T {
        self.value(name).and_then(pick).expect(
            "the table of keys gives the key this type, and the checks or a default a value",
        )
    }

    fn integer(&self, name: &str) -> u64 {
        self.take(name, |value| match value {
            Value::Integer(n) => Some(n),
            _ => None,
        })
    }

    pub(super) fn count(&self, name: &str) -> usize {
        usize::try_from(self.integer(name)).unwrap_or(usize::MAX)
    }

    pub(super) fn count_or(&self, name: &str, default: usize) -> usize {
        self.find(name).map_or(default, |_| self.count(name))
    }

    fn number(&self, name: &str) -> f64 {
        self.take(name, |value| match value {
            Value::Number(n) => Some(n),
            _ => None,
        })
    }

    pub(super) fn duration(&self, name: &str) -> Duration {
        self.take(name, |value| match value {
            Value::Duration(duration) => Some(duration),
            _ => None,
        })
    }

    fn rate(&self, name: &str) -> Option<Rate> {
        self.take(name, |value| match value {
            Value::Rate(rate) => Some(rate),
            _ => None,
        })
    }

    pub(super) fn text(&self, name: &str) -> String {
        self.take(name, |value| match value {
            Value::Text(text) => Some(text),
            _ => None,
        })
    }

    pub(super) fn mailbox(&self, name: &str) -> Option<Mailbox> {
        match self.value(name) {
            Some(Value::Mailbox(mailbox)) => Some(mailbox),
            _ => None,
        }
    }

    /// In whichever form it is written.
    pub(super) fn secret(&self, name: &str) -> Option<Secret> {
        let forms = keys::SECRET_FORMS.iter().map(|form| self.value(&format!("{name}{form}")));
        forms.flatten().find_map(|value| match value {
            Value::Secret(secret) => Some(secret),
            _ => None,
        })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.take(name, |value| match value {
            Value::Path(path) => Some(path),
            _ => None,
        })
    }

    fn bind(&self, name: &str) -> Bind {
        self.take(name, |value| match value {
            Value::Bind(bind) => Some(bind),
            _ => None,
        })
    }

    pub(super) fn flag(&self, name: &str) -> bool {
        self.take(name, |value| match value {
            Value::Flag(flag) => Some(flag),
            _ => None,
        })
    }

    fn address(&self, name: &str) -> SocketAddr {
        self.take(name, |value| match value {
            Value::Bind(Bind::Tcp(address)) => Some(address),
            _ => None,
        })
    }

    fn networks(&self, name: &str) -> Vec<IpNet> {
        self.take(name, |value| match value {
            Value::Networks(networks) => Some(networks),
            _ => None,
        })
    }
}
