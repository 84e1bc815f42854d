//! What the table of keys cannot say: which keys go together, and what this version does not do yet.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;

use crate::config::certificates;
use crate::config::keys::{self, Available, Type};
use crate::config::load::{Section, Tables, Written};
use crate::config::problem::{Findings, shown};
use crate::config::value::{self, MAX_SOCKET_PATH, Value};
use crate::config::{Bind, Pattern};

pub(super) fn check(file: &Tables, findings: &mut Findings) {
    for section in file.sections() {
        check_secret_forms(section, findings);
        if !matches!(section.path, "provider" | "provider.endpoints" | "user") {
            check_available(section, |_| true, findings);
        }
    }
    for user in &file.users {
        findings.wrong(
            user.at.unwrap_or_default(),
            &user.header,
            format!("users are {NOT_AVAILABLE}; leave the table out"),
        );
    }
    check_listeners(file, findings);
    check_allowed(&file.sender, findings);
    check_provider(file, findings);
    let says = |key, default: &'static str| match file.provider.find(key).map(|found| &found.value)
    {
        Some(Some(value)) => value.plain().unwrap_or_default().to_owned(),
        Some(None) | None => default.to_owned(),
    };
    if says("kind", "none") == "none" && says("on_mail", "reject") == "reject" {
        findings.warning(
            file.provider.at.unwrap_or_default(),
            "[provider]",
            "there is none, so all mail is refused for now; write one, or on_mail = \"hold\" to keep \
             the mail until there is one"
                .to_owned(),
        );
    }
    check_lanes(file, findings);
    check_retry(&file.retry, findings);
    check_admin(&file.admin, &file.admin_socket(), findings);
    if file.bounce.find("postmaster").is_none() {
        findings.warning(
            file.bounce.at.unwrap_or_default(),
            "[bounce] postmaster",
            "is not set, so nobody is told of outages, nor of mail that failed and whose sender \
             cannot be told; write the address of who runs this gateway"
                .to_owned(),
        );
    }
}

/// Longest `sender_name`, in characters.
const MAX_SENDER_NAME: usize = 100;

const NOT_AVAILABLE: &str = "not available in this version of mailsluice";

/// Finds what the table of keys has and this version has not, among the keys that `concerns` takes.
fn check_available(
    section: &Section,
    concerns: impl Fn(&keys::Key) -> bool,
    findings: &mut Findings,
) {
    for written in section.written.iter().filter(|written| concerns(written.key)) {
        let Some(value) = &written.value else { continue };
        let plain = value.plain();
        let instead = match written.key.available {
            Available::Now => continue,
            Available::Only(values) if plain.is_some_and(|plain| values.contains(&plain)) => {
                continue;
            }
            Available::Later => "leave it out".to_owned(),
            Available::Only(values) if written.key.name() == "kind" => {
                format!("write {}", value::choices(values))
            }
            Available::Only(values) => {
                format!("leave it out or write {}", value::choices(values))
            }
        };
        // The value is named where another would do; a key that does not work at all may hold a secret.
        let what = match (written.key.available, plain) {
            (Available::Only(_), Some(plain)) => {
                format!("{} ", keys::toml(plain))
            }
            _ => String::new(),
        };
        findings.wrong(
            written.value_at,
            &section.named(&written.name),
            format!("{what}is {NOT_AVAILABLE}; {instead}"),
        );
    }
}

/// A secret is written in one of its forms.
fn check_secret_forms(section: &Section, findings: &mut Findings) {
    let mut first: HashMap<&str, &Written> = HashMap::new();
    let mut secrets: Vec<&Written> = (section.written.iter())
        .filter(|written| matches!(written.key.r#type, Type::Secret))
        .collect();
    secrets.sort_by_key(|written| written.at);
    for written in secrets {
        if let Some(other) = first.get(written.key.path) {
            findings.wrong(
                written.at,
                &section.named(&written.name),
                format!("is the same secret as `{}`; keep one of them", other.name),
            );
        } else {
            first.insert(written.key.path, written);
        }
    }
}

fn check_listeners(file: &Tables, findings: &mut Findings) {
    let mut seen: HashMap<String, usize> = HashMap::new();
    for (number, listener) in file.listeners.iter().enumerate() {
        let Some(Value::Bind(bind)) = listener.value("bind") else { continue };
        let at = at_value(listener, "bind");
        let allow = listener.find("allow");
        match &bind {
            Bind::Tcp(address) => check_open(listener, *address, at, findings),
            Bind::Unix(_) => {
                if let Some(allow) = allow {
                    findings.warning(
                        allow.at,
                        &listener.named("allow"),
                        "has no effect on a Unix socket, whose clients have no address".to_owned(),
                    );
                }
            }
        }
        if let Some(Value::Networks(networks)) = allow.and_then(|allow| allow.value.as_ref()) {
            let at = at_value(listener, "allow");
            if networks.is_empty() {
                let text = "is empty, so that nobody could connect; name the clients' networks";
                findings.wrong(at, &listener.named("allow"), text.to_owned());
            } else if let Some(all) = networks.iter().find(|network| network.prefix_len() == 0) {
                let text = format!("{all} lets everybody send mail through this gateway");
                findings.warning(at, &listener.named("allow"), text);
            }
        }
        let name = match &bind {
            Bind::Tcp(address) if address.port() == 0 => continue,
            Bind::Tcp(address) => address.to_string(),
            Bind::Unix(path) => path.display().to_string(),
        };
        if let Some(first) = seen.insert(name, number) {
            findings.wrong(
                at,
                &listener.named("bind"),
                format!("is the same as that of listener {}; bind each to its own", first + 1),
            );
        }
    }
    if let Some(Value::Bind(Bind::Tcp(admin))) = file.admin.value("bind")
        && seen.contains_key(&admin.to_string())
    {
        findings.wrong(
            at_value(&file.admin, "bind"),
            &file.admin.named("bind"),
            "is the same as that of a listener; bind each to its own".to_owned(),
        );
    }
}

/// A listener that others reach says who may connect, or makes them log in.
fn check_open(listener: &Section, address: SocketAddr, at: usize, findings: &mut Findings) {
    let requires_auth = listener.value("auth") == Some(Value::Text("required".to_owned()));
    let says_who = listener.find("allow").is_some() || requires_auth;
    if !address.ip().to_canonical().is_loopback() && !says_who {
        findings.missing(
            at,
            &listener.named("bind"),
            format!(
                "{address} can be reached by others; write who may connect, such as \
                 allow = [\"10.0.0.0/8\"]"
            ),
        );
    }
}

fn check_allowed(sender: &Section, findings: &mut Findings) {
    let Some(Value::Texts(allowed)) = sender.value("allowed") else { return };
    for text in allowed {
        if let Err(why) = Pattern::parse(&text) {
            let text = format!("holds \"{}\": {why}", shown(&text));
            findings.wrong(at_value(sender, "allowed"), &sender.named("allowed"), text);
        }
    }
}

fn check_provider(file: &Tables, findings: &mut Findings) {
    let provider = &file.provider;
    let Some(provider_at) = provider.at else { return };
    let kind = match provider.find("kind").map(|kind| &kind.value) {
        Some(Some(Value::Text(kind))) => kind.as_str(),
        Some(_) => return,
        None => {
            let text = "is missing; write kind = \"smtp\", \"microsoft365\" or \"none\"";
            findings.missing(provider_at, &provider.named("kind"), text.to_owned());
            return;
        }
    };
    let auth = provider.find("auth").and_then(|auth| auth.value.as_ref());
    let xoauth2 = kind == keys::SMTP && auth.is_some_and(|auth| auth.plain() == Some("xoauth2"));
    let fits = |key: &keys::Key| {
        key.kinds.is_empty()
            || key.kinds.contains(&kind)
            || (xoauth2 && key.kinds.contains(&keys::XOAUTH2))
    };
    for section in [provider, &file.endpoints] {
        for written in section.written.iter().filter(|written| !fits(written.key)) {
            findings.wrong(
                written.at,
                &section.named(&written.name),
                format!(
                    "belongs to the kind {}, and this provider is of the kind {kind}; leave it out",
                    written.key.kinds.join(" or ")
                ),
            );
        }
    }
    check_available(provider, fits, findings);
    match kind {
        keys::SMTP => check_smtp(file, findings),
        keys::MICROSOFT365 => check_microsoft365(provider, findings),
        _ => {}
    }
}

fn check_microsoft365(provider: &Section, findings: &mut Findings) {
    if provider.find("sender").is_none() {
        let text = "is missing; write sender = \"reports@example.com\", the mailbox that sends";
        let at = provider.at.unwrap_or_default();
        findings.missing(at, &provider.named("sender"), text.to_owned());
    }
    check_sender_name(provider, findings);
    check_roots(provider, findings);
}

fn check_smtp(file: &Tables, findings: &mut Findings) {
    let provider = &file.provider;
    let at = provider.at.unwrap_or_default();
    if provider.find("server").is_none() {
        let text = "is missing; write server = \"smtp.example.com\", or an IP address";
        findings.missing(at, &provider.named("server"), text.to_owned());
    }
    let preserve =
        file.sender.value("policy").is_some_and(|policy| policy.plain() == Some("preserve"));
    if provider.find("sender").is_none() && !preserve {
        let text = "is missing; write sender = \"reports@example.com\"; only the policy \"preserve\" \
                    does without";
        findings.missing(at, &provider.named("sender"), text.to_owned());
    }
    check_sender_name(provider, findings);
    check_login(provider, findings);
    check_roots(provider, findings);
    let security = provider.find("security").and_then(|security| security.value.as_ref());
    if let (Some(security), Some(Value::Text(server))) = (security, provider.value("server"))
        && security.plain() == Some(keys::NONE)
        && !value::is_loopback(&server)
    {
        let auth = provider.value("auth");
        let what = match auth.and_then(|auth| auth.plain().map(str::to_owned)).as_deref() {
            Some("none") => "all mail goes",
            Some("xoauth2") => "all mail and the token go",
            _ => "all mail and the password go",
        };
        findings.warning(
            at_value(provider, "security"),
            &provider.named("security"),
            format!("{what} to {server} in clear; write \"starttls\" or \"tls\" where it can"),
        );
    }
    let security =
        provider.value("security").and_then(|security| security.plain().map(str::to_owned));
    let fits = match (provider.value("port"), security.as_deref()) {
        (Some(Value::Integer(465)), Some("starttls" | "none")) => Some("tls"),
        (Some(Value::Integer(25 | 587)), Some("tls")) => Some("starttls"),
        _ => None,
    };
    if let Some(fits) = fits {
        let text = format!("servers on this port usually want security = \"{fits}\"");
        findings.warning(at_value(provider, "port"), &provider.named("port"), text);
    }
}

fn check_sender_name(provider: &Section, findings: &mut Findings) {
    if let Some(Value::Text(name)) = provider.value("sender_name")
        && name.chars().count() > MAX_SENDER_NAME
    {
        let text = format!("is longer than {MAX_SENDER_NAME} characters, which no reader shows");
        findings.wrong(at_value(provider, "sender_name"), &provider.named("sender_name"), text);
    }
}

fn check_roots(provider: &Section, findings: &mut Findings) {
    if let Some(written) = provider.find("ca_file")
        && let Some(Value::Path(path)) = &written.value
        && let Err(why) = certificates::roots(path)
    {
        let text = format!("is \"{}\", which {why}", path.display());
        findings.wrong(written.value_at, &provider.named("ca_file"), text);
    }
}

/// A password, and whose it is; or none of both. What a token needs is checked elsewhere.
fn check_login(provider: &Section, findings: &mut Findings) {
    let Some(Value::Text(auth)) = provider.value("auth") else { return };
    let at = provider.at.unwrap_or_default();
    let passwords = keys::SECRET_FORMS.map(|form| provider.find(&format!("password{form}")));
    let password = passwords.into_iter().flatten().next();
    match (auth.as_str(), password) {
        ("password", None) => {
            let text = "is missing; write password_file = \"/etc/mailsluice/smtp-password\" (mode 0600), \
                        or auth = \"none\" for a server that wants no login";
            findings.missing(at, &provider.named("password"), text.to_owned());
        }
        ("xoauth2", Some(left)) => {
            let text =
                "has no effect with auth = \"xoauth2\"; leave it out, or write auth = \"password\"";
            findings.wrong(left.at, &provider.named(&left.name), text.to_owned());
        }
        ("password", Some(_)) | ("xoauth2", None)
            if provider.find("username").is_none() && provider.find("sender").is_none() =>
        {
            let text = "is missing; write username = \"reports@example.com\", or a sender, which \
                        it is the same as then";
            findings.missing(at, &provider.named("username"), text.to_owned());
        }
        // A login that is written is meant: without one, mail would go as nobody.
        ("none", _) => {
            for left in provider.find("username").into_iter().chain(password) {
                let text = "has no effect with auth = \"none\"; leave it out, or write auth = \"password\"";
                findings.wrong(left.at, &provider.named(&left.name), text.to_owned());
            }
        }
        _ => {}
    }
}

/// What is written for a lane that no mail goes by. An upstream has one.
fn check_lanes(file: &Tables, findings: &mut Findings) {
    let provider = &file.provider;
    let is_smtp = |kind: &Value| matches!(kind, Value::Text(kind) if kind == "smtp");
    if !provider.value("kind").is_some_and(|kind| is_smtp(&kind)) {
        return;
    }
    let username = match provider.value("username") {
        Some(Value::Text(username)) => Some(username),
        _ => None,
    };
    let sender = || match provider.value("sender") {
        Some(Value::Mailbox(sender)) => Some(sender.as_str().to_owned()),
        _ => None,
    };
    let Some(lane) = username.or_else(sender) else { return };
    for (name, section) in &file.throttle_mailbox {
        if !name.eq_ignore_ascii_case(&lane) {
            let text =
                format!("is no lane, so it has no effect; the one of this provider is \"{lane}\"");
            findings.warning(section.at.unwrap_or_default(), &section.header, text);
        }
    }
}

fn check_retry(retry: &Section, findings: &mut Findings) {
    if let (Some(Value::Duration(first)), Some(Value::Duration(max))) =
        (retry.value("first"), retry.value("max"))
        && max < first
    {
        let name = if retry.find("max").is_some() { "max" } else { "first" };
        findings.wrong(
            at_value(retry, name),
            &retry.named(name),
            "`max` is shorter than `first`; write the longest wait as `max`".to_owned(),
        );
    }
}

fn check_admin(admin: &Section, socket: &Path, findings: &mut Findings) {
    if socket.as_os_str().len() > MAX_SOCKET_PATH {
        findings.wrong(
            at_value(admin, "socket"),
            &admin.named("socket"),
            format!(
                "the path of a socket has at most {MAX_SOCKET_PATH} octets, and this one has {}; write a shorter one, \
                 such as \"/run/mailsluice/admin.sock\"",
                socket.as_os_str().len()
            ),
        );
    }
    if let Some(Value::Bind(Bind::Tcp(address))) = admin.value("bind")
        && !address.ip().to_canonical().is_loopback()
    {
        findings.wrong(
            at_value(admin, "bind"),
            &admin.named("bind"),
            format!(
                "{address} can be reached by others, which needs `token_file`, and that is \
                 {NOT_AVAILABLE}; write a loopback address such as \"127.0.0.1:9925\""
            ),
        );
    }
}

/// Where a value stands, or the table if it is the default.
fn at_value(section: &Section, name: &str) -> usize {
    section.find(name).map_or_else(|| section.at.unwrap_or_default(), |written| written.value_at)
}
