//! How a value of each type is written, and what to write where it is not.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use toml::de::DeValue;

use crate::config::keys::{self, Available, Key, Type, Unwritten};
use crate::config::problem::shown;
use crate::config::{Bind, Rate, Secret};
use crate::smtp::address::{AddressError, Charset, Domain, Mailbox};

/// A value as the parts use it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Flag(bool),
    /// A count, a port, or a size in octets.
    Integer(u64),
    Number(f64),
    Duration(Duration),
    /// `None` is no limit.
    Rate(Option<Rate>),
    Text(String),
    Texts(Vec<String>),
    /// There is one, and it is shown to nobody.
    Hidden,
    Secret(Secret),
    Domain(Domain),
    Mailbox(Mailbox),
    Path(PathBuf),
    Bind(Bind),
    Networks(Vec<IpNet>),
}

impl Value {
    /// As the table of keys writes it where it says which values work; none for what it cannot name.
    pub(super) fn plain(&self) -> Option<&str> {
        let plain = match self {
            Self::Flag(true) => "true",
            Self::Flag(false) => "false",
            Self::Rate(None) => "none",
            Self::Text(text) => text,
            Self::Texts(texts) if texts.is_empty() => "[]",
            Self::Networks(networks) if networks.is_empty() => "[]",
            _ => return None,
        };
        Some(plain)
    }
}

/// The value that holds where the key is not written, if the table of keys has one.
pub(super) fn default(key: &Key) -> Option<Value> {
    let Unwritten::Is(text) = key.default else { return None };
    let value = DeValue::parse(text).ok()?;
    read(key, value.get_ref()).ok()
}

/// Reads a value of the key's type, or says what is wrong with it and what to write instead.
pub(super) fn read(key: &Key, value: &DeValue<'_>) -> Result<Value, String> {
    let wanted = wanted(key);
    let wrong_type = || format!("is {}, write {wanted}", type_of(value));
    match key.r#type {
        Type::Flag => match value {
            DeValue::Boolean(flag) => Ok(Value::Flag(*flag)),
            _ => Err(wrong_type()),
        },
        Type::Integer(min, max) => {
            let DeValue::Integer(written) = value else { return Err(wrong_type()) };
            integer(written.as_str(), written.radix())
                .filter(|n| (min..=max).contains(n))
                .map(Value::Integer)
                .ok_or_else(|| {
                    format!(
                        "is {}, write an integer from {min} to {max}",
                        shown(&written.to_string())
                    )
                })
        }
        Type::Number(min, max) => {
            let written = match value {
                DeValue::Float(written) => written.as_str(),
                DeValue::Integer(written) if written.radix() == 10 => written.as_str(),
                _ => return Err(wrong_type()),
            };
            (written.parse().ok())
                .filter(|n: &f64| (min..=max).contains(n))
                .map(Value::Number)
                .ok_or_else(|| format!("is {}, write a number from {min} to {max}", shown(written)))
        }
        Type::Size(min, max) => {
            let octets = match value {
                DeValue::Integer(written) => integer(written.as_str(), written.radix()),
                DeValue::String(written) => size(written),
                _ => return Err(wrong_type()),
            };
            match octets {
                Some(n) if n > max => {
                    Err(format!("is too large, write at most \"{}\"", size_text(max)))
                }
                Some(n) if n < min => Err(format!("is too small, write {wanted}")),
                Some(n) => Ok(Value::Integer(n)),
                None => Err(format!(
                    "is {}, write {wanted} (B, kB, MB, GB by thousands, KiB, MiB, GiB by 1024)",
                    written(value)
                )),
            }
        }
        Type::Duration(min, max) => {
            let DeValue::String(text) = value else { return Err(wrong_type()) };
            let millis = duration(text).ok_or_else(|| {
                format!("is {}, write {wanted} (units ms, s, m, h, d)", written(value))
            })?;
            match millis {
                n if n < min => Err(format!("is zero, write {wanted}")),
                n if n > max => Err("is too long, write at most \"365d\"".to_owned()),
                n => Ok(Value::Duration(Duration::from_millis(n))),
            }
        }
        Type::Rate | Type::ByteRate => {
            let DeValue::String(text) = value else { return Err(wrong_type()) };
            rate(text, matches!(key.r#type, Type::ByteRate))
                .map(Value::Rate)
                .map_err(|why| format!("is {}{why}, write {wanted}", written(value)))
        }
        Type::Choice(choices) => {
            let DeValue::String(text) = value else { return Err(wrong_type()) };
            match choices.iter().find(|choice| **choice == text.as_ref()) {
                Some(choice) => Ok(Value::Text((*choice).to_owned())),
                None => Err(format!("is {}, write {wanted}", written(value))),
            }
        }
        Type::Texts => {
            let texts = strings(value).ok_or_else(wrong_type)?;
            match texts.iter().any(|text| text.is_empty()) {
                true => Err("holds an empty text, leave that out".to_owned()),
                false => Ok(Value::Texts(texts.into_iter().map(str::to_owned).collect())),
            }
        }
        Type::Networks => {
            let texts = strings(value).ok_or_else(wrong_type)?;
            texts
                .into_iter()
                .map(network)
                .collect::<Result<_, _>>()
                .map(Value::Networks)
                .map_err(|(text, instead)| format!("holds \"{}\", write {instead}", shown(text)))
        }
        Type::Text
        | Type::Secret
        | Type::Hash
        | Type::Domain
        | Type::Host
        | Type::Mailbox
        | Type::MailboxOrNone
        | Type::Path
        | Type::Url
        | Type::Bind
        | Type::Address => {
            let DeValue::String(text) = value else { return Err(wrong_type()) };
            string(key.r#type, text).map_err(|why| match key.r#type {
                // A URL may have a login in it.
                Type::Secret | Type::Hash | Type::Url => format!("{why}, write {wanted}"),
                _ if why.is_empty() => format!("is {}, write {wanted}", written(value)),
                _ => format!("is {}: {why}; write {wanted}", written(value)),
            })
        }
    }
}

/// The secret, from where its forms KEY_file, KEY_env and KEY_credential say; none where it is written itself.
pub(super) fn read_secret(form: &str, source: &Value) -> Option<Result<Secret, String>> {
    let (name, secret) = match source {
        Value::Path(path) => (path.display().to_string(), Secret::of_file(path)),
        Value::Text(name) if form == "_env" => (name.clone(), Secret::of_variable(name)),
        Value::Text(name) => (name.clone(), Secret::of_credential(name)),
        _ => return None,
    };
    Some(secret.map_err(|why| format!("is \"{}\", which {why}", shown(&name))))
}

/// Where the secret comes from, for its forms KEY_file, KEY_env and KEY_credential.
pub(super) fn read_secret_source(form: &str, value: &DeValue<'_>) -> Result<Value, String> {
    let wanted = match form {
        "_file" => "the absolute path of a file",
        "_env" => "the name of an environment variable",
        _ => "the name of a systemd credential",
    };
    match value {
        DeValue::String(text) if text.is_empty() => Err(format!("is empty, write {wanted}")),
        DeValue::String(text) if form == "_file" => {
            path(text).map_err(|why| format!("{why}, write {wanted}"))
        }
        DeValue::String(text) => Ok(Value::Text(text.clone().into_owned())),
        _ => Err(format!("is {}, write {wanted}", type_of(value))),
    }
}

/// The type of what is written, with its article.
pub(super) fn type_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// What to write, with an example: the default where it has one.
fn wanted(key: &Key) -> String {
    let (what, example) = match key.r#type {
        Type::Flag => return "true or false".to_owned(),
        Type::Choice(all) => {
            return match key.available {
                Available::Only(works) => choices(works),
                Available::Now | Available::Later => choices(all),
            };
        }
        Type::Text | Type::Secret => return "text in quotes".to_owned(),
        Type::Integer(..) => ("an integer", "10"),
        Type::Number(..) => ("a number", "2.0"),
        Type::Size(..) => ("a size", "\"35MB\""),
        Type::Duration(..) => ("a duration", "\"5m\""),
        Type::Rate => ("\"none\" or a rate", "\"30/1m\""),
        Type::ByteRate => ("\"none\" or a rate", "\"150MB/5m\""),
        Type::Texts => ("a list", "[\"*@example.com\"]"),
        Type::Hash => ("an argon2id hash", "\"$argon2id$…\""),
        Type::Domain => ("a domain name", "\"relay.example.net\""),
        Type::Host => ("a host name or an IP address", "\"smtp.example.com\""),
        Type::Mailbox | Type::MailboxOrNone => ("a mail address", "\"reports@example.com\""),
        Type::Path => ("an absolute path", "\"/etc/mailsluice/file.pem\""),
        Type::Url => ("a URL", "\"https://login.example.com\""),
        Type::Bind => {
            return "an address and a port such as \"127.0.0.1:25\" or \"[::1]:25\", or a socket \
                    such as \"unix:/run/mailsluice/smtp.sock\""
                .to_owned();
        }
        Type::Address => ("an address and a port", "\"127.0.0.1:9925\""),
        Type::Networks => ("a list of networks", "[\"10.0.0.0/8\", \"192.0.2.1\"]"),
    };
    let example = match key.default {
        Unwritten::Is(default) if !matches!(default, "[]" | "\"\"" | "\"none\"") => default,
        _ => example,
    };
    format!("{what} such as {example}")
}

/// What is written, where it is no secret.
fn written(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("\"{}\"", shown(text)),
        DeValue::Integer(written) => shown(&written.to_string()),
        DeValue::Float(written) => shown(&written.to_string()),
        other => type_of(other).to_owned(),
    }
}

/// A string of the types that are more than any text; an empty reason where the form alone is wrong.
fn string(of: Type, text: &str) -> Result<Value, &'static str> {
    let syntax = || "";
    match of {
        Type::Secret => Secret::new(text.to_owned()).map(Value::Secret),
        Type::Hash => {
            text.starts_with("$argon2id$").then_some(Value::Hidden).ok_or("is no argon2id hash")
        }
        Type::Domain => match Domain::parse(text, Charset::Ascii) {
            Ok(domain) => Ok(Value::Domain(domain)),
            Err(AddressError::Syntax(why)) => Err(why),
            Err(_) => Err("a domain name is ASCII here"),
        },
        Type::Host => host(text).map(Value::Text),
        Type::MailboxOrNone if text.is_empty() => Ok(Value::Text(String::new())),
        Type::Mailbox | Type::MailboxOrNone => match Mailbox::parse(text, Charset::Utf8) {
            Ok(mailbox) => Ok(Value::Mailbox(mailbox)),
            Err(AddressError::Syntax(why)) => Err(why),
            Err(_) => Err(""),
        },
        Type::Path => path(text).map_err(|_why| ""),
        Type::Url => match is_root_url(text) {
            true => Ok(Value::Text(text.to_owned())),
            false => Err(NO_ROOT_URL),
        },
        Type::Bind => bind(text).map(Value::Bind),
        Type::Address => {
            (text.parse().ok()).map(|address| Value::Bind(Bind::Tcp(address))).ok_or_else(syntax)
        }
        _ if text.is_empty() => Err(""),
        _ => Ok(Value::Text(text.to_owned())),
    }
}

fn integer(digits: &str, radix: u32) -> Option<u64> {
    u64::from_str_radix(digits, radix).ok()
}

/// Digits, and what follows them; a sign is no digit.
fn leading_digits(text: &str) -> Option<(u64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at_checked(end)?;
    Some((digits.parse().ok()?, rest))
}

/// `35MB`, in octets.
fn size(text: &str) -> Option<u64> {
    let (amount, unit) = leading_digits(text)?;
    let octets: u64 = match unit {
        "" | "B" => 1,
        "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    amount.checked_mul(octets)
}

/// Octets as a size, in the largest unit that is exact.
fn size_text(octets: u64) -> String {
    for (unit, name) in [(1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")] {
        if octets >= unit && octets.is_multiple_of(unit) {
            return format!("{}{name}", octets / unit);
        }
    }
    format!("{octets}B")
}

/// `1h30m`, in milliseconds.
fn duration(text: &str) -> Option<u64> {
    let mut rest = text;
    let mut total: u64 = 0;
    loop {
        let (amount, after) = leading_digits(rest)?;
        let end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at_checked(end)?;
        let millis: u64 = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60 * 1000,
            "h" => 60 * 60 * 1000,
            "d" => 24 * 60 * 60 * 1000,
            _ => return None,
        };
        total = total.checked_add(amount.checked_mul(millis)?)?;
        if after.is_empty() {
            return Some(total);
        }
        rest = after;
    }
}

/// `30/1m`, with `bytes` also `500B/1s`; or `none`.
fn rate(text: &str, bytes: bool) -> Result<Option<Rate>, &'static str> {
    if text == "none" {
        return Ok(None);
    }
    let (amount, per) = text.split_once('/').ok_or("")?;
    let amount = match bytes {
        true => size(amount),
        false => leading_digits(amount).filter(|(_, rest)| rest.is_empty()).map(|(n, _)| n),
    };
    let (amount, per) = amount.zip(duration(per)).ok_or("")?;
    match (amount, per) {
        (0, _) | (_, 0) => Err(", which is zero"),
        (_, per) if per > 365 * 24 * 60 * 60 * 1000 => Err(", which is longer than a year"),
        (amount, per) => Ok(Some(Rate { amount, per: Duration::from_millis(per) })),
    }
}

/// The texts of a list that holds nothing else.
fn strings<'a>(value: &'a DeValue<'_>) -> Option<Vec<&'a str>> {
    value.as_array()?.iter().map(|item| item.get_ref().as_str()).collect()
}

/// A network in CIDR form, or one host; IPv4-mapped IPv6 becomes IPv4. Else the text and what to write.
fn network(text: &str) -> Result<IpNet, (&str, String)> {
    let network = match text.parse::<IpAddr>() {
        Ok(address) => IpNet::from(address),
        Err(_) => text.parse().map_err(|_not_cidr| {
            (text, "networks such as \"10.0.0.0/8\" or addresses such as \"192.0.2.1\"".to_owned())
        })?,
    };
    let network = match (network, network.addr().to_canonical()) {
        (IpNet::V6(v6), IpAddr::V4(v4)) if v6.prefix_len() >= 96 => {
            Ipv4Net::new(v4, v6.prefix_len() - 96).map_or(network, IpNet::V4)
        }
        _ => network,
    };
    match network.trunc() {
        whole if whole == network => Ok(network),
        whole => Err((text, format!("the network \"{whole}\" or one address without \"/\""))),
    }
}

/// A host name, or an IP address (IPv6 with or without brackets; kept without).
fn host(text: &str) -> Result<String, &'static str> {
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    if bare.parse::<IpAddr>().is_ok() {
        return Ok(bare.to_owned());
    }
    if text.split_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
        return Err("the port has a key of its own, `port`");
    }
    let last_label = text.rsplit('.').next().unwrap_or_default();
    if last_label.starts_with(|c: char| c.is_ascii_digit())
        && last_label.bytes().all(|b| b.is_ascii_digit())
    {
        return Err("it is neither a name nor an IP address");
    }
    match Domain::parse(text, Charset::Ascii) {
        Ok(_) if text.starts_with('[') => Err("write an IP address without brackets"),
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err(""),
    }
}

fn path(text: &str) -> Result<Value, &'static str> {
    match text.starts_with('/') && !text.contains(char::is_control) {
        true => Ok(Value::Path(PathBuf::from(text))),
        false => Err("is no absolute path"),
    }
}

/// Longest path of a Unix socket, in octets (unix(7): `sun_path` less its NUL).
pub(super) const MAX_SOCKET_PATH: usize = 107;

fn bind(text: &str) -> Result<Bind, &'static str> {
    if let Some(socket) = text.strip_prefix("unix:") {
        return match path(socket) {
            Ok(_) if socket.len() > MAX_SOCKET_PATH => {
                Err("the path of a socket has at most 107 octets")
            }
            Ok(_) => Ok(Bind::Unix(PathBuf::from(socket))),
            Err(_) => Err("the path of a socket is absolute"),
        };
    }
    if text.starts_with("systemd:") {
        return Err("sockets of systemd are not available in this version of mailsluice");
    }
    if text.starts_with(':') || text.starts_with("*:") {
        return Err("all addresses are \"0.0.0.0\" or \"[::]\"");
    }
    text.parse().map(Bind::Tcp).map_err(|_neither| "")
}

/// What is said of one that is not.
pub(super) const NO_ROOT_URL: &str =
    "is no https URL (http only to loopback) without login, query and fragment";

/// Whether this is the root of a server that secrets may be sent to: https, or http to this machine; no login, query
/// or fragment.
pub(super) fn is_root_url(text: &str) -> bool {
    // The parser passes over some of these.
    if text.contains(|c: char| c.is_control() || c.is_whitespace() || c == '\\') {
        return false;
    }
    let Ok(url) = reqwest::Url::parse(text) else { return false };
    let host = url.host_str().unwrap_or_default();
    let is_safe = match url.scheme() {
        "https" => !host.is_empty(),
        "http" => is_loopback(host.trim_matches(['[', ']'])),
        _ => false,
    };
    let is_bare = url.username().is_empty() && url.password().is_none();
    is_safe && is_bare && url.query().is_none() && url.fragment().is_none()
}

/// Whether a host, by name or address, is this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    match host.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

/// `"none"` or `"auto", "text"`, for what works in this version.
pub(super) fn choices(plain: &[&str]) -> String {
    let quoted: Vec<String> = plain.iter().map(|value| keys::toml(value)).collect();
    match quoted.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => quoted.concat(),
    }
}
