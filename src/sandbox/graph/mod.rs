//! Microsoft 365, simulated: the login that gives tokens, and Graph as far as mail is sent through it.
//!
//! It holds to what the documents say, as strictly as they can be read, so that a client which gets something wrong
//! fails here. Everything is in memory and bounded. One port serves the login (`/{tenant}/oauth2/v2.0/token`), the
//! metadata service of a machine (`/metadata/identity/oauth2/token`), Graph (`/v1.0/…`) and the upload URLs.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::clock;
use crate::sandbox::inbox::{Form, Inbox, Taken};
use crate::shutdown::Shutdown;

use self::answer::{Answer, End, Refusal};
use self::faults::{Asked, Askers, Faults};
use self::filter::Filter;
use self::limits::{Lane, Traffic};
use self::login::{Asking, Given, Tokens};
use self::mailbox::Mailboxes;
use self::message::Stored;
use self::records::Records;
use self::settings::{App, Settings};

mod answer;
mod assertion;
pub mod control;
pub mod faults;
mod filter;
mod http;
mod limits;
mod login;
mod mailbox;
pub mod message;
mod mime;
pub mod records;
pub mod settings;
#[cfg(test)]
mod tests;

/// The simulated service.
pub struct Service {
    /// `http://ADDRESS:PORT`: the root of login and Graph.
    pub root: String,
    pub inbox: Arc<Inbox>,
    settings: Mutex<Arc<Settings>>,
    faults: Faults,
    records: Records,
    tokens: Mutex<Tokens>,
    traffic: Mutex<Traffic>,
    mailboxes: Mutex<Mailboxes>,
    askers: Mutex<Askers>,
}

/// A request without its body.
#[derive(Debug)]
struct Head {
    method: String,
    /// Its path's segments, decoded.
    segments: Vec<String>,
    path: String,
    query: String,
    /// Names in lower case.
    headers: BTreeMap<String, String>,
}

impl Head {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Without parameters, in lower case.
    fn content_type(&self) -> String {
        let value = self.header("content-type").unwrap_or_default();
        value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
    }
}

/// A body, of which no more is kept than the largest request has.
#[derive(Debug, Default)]
struct Octets {
    kept: Vec<u8>,
    size: u64,
}

/// What a request comes to.
struct Outcome {
    end: End,
    delay: Duration,
    /// The fault that was played.
    fault: Option<&'static str>,
}

impl From<Answer> for Outcome {
    fn from(answer: Answer) -> Self {
        Self { end: End::Answer(answer), delay: Duration::ZERO, fault: None }
    }
}

/// A request that is at work: it counts among those at once until this is dropped.
struct Entered {
    service: Arc<Service>,
    lane: Lane,
    app: App,
    settings: Arc<Settings>,
    mailbox: String,
}

impl Drop for Entered {
    fn drop(&mut self) {
        lock(&self.service.traffic).leave(&self.lane);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    /// Serves on that socket until the end.
    pub fn start(
        socket: TcpListener,
        settings: Settings,
        inbox: Arc<Inbox>,
        shutdown: &Shutdown,
    ) -> io::Result<Arc<Self>> {
        let root = format!("http://{}", socket.local_addr()?);
        let service = Arc::new(Self {
            root,
            inbox,
            settings: Mutex::new(Arc::new(settings)),
            faults: Faults::default(),
            records: Records::new(),
            tokens: Mutex::default(),
            traffic: Mutex::default(),
            mailboxes: Mutex::default(),
            askers: Mutex::default(),
        });
        shutdown.tasks.spawn(http::listen(Arc::clone(&service), socket, shutdown.clone()));
        Ok(service)
    }

    pub fn settings(&self) -> Arc<Settings> {
        Arc::clone(&lock(&self.settings))
    }

    pub fn set(&self, settings: Settings) {
        *lock(&self.settings) = Arc::new(settings);
    }

    pub fn fault(&self, fault: faults::Fault) {
        self.faults.add(fault);
    }

    /// Every request since the start, those that were forgotten for want of room left out.
    pub fn requests(&self) -> Vec<records::Record> {
        self.records.all()
    }

    /// Changes whenever a request begins or ends.
    pub fn request_changes(&self) -> watch::Receiver<u64> {
        self.records.changes()
    }

    /// Every token that was given is worth nothing from now on.
    pub fn revoke_tokens(&self) {
        lock(&self.tokens).revoke();
    }

    /// What the front door does without a look at the body; `None` where the request is not Graph's.
    fn enter(self: &Arc<Self>, head: &Head) -> Option<Result<Entered, Refusal>> {
        let segments: Vec<&str> = head.segments.iter().map(String::as_str).collect();
        match segments.as_slice() {
            ["v1.0", "users", mailbox, ..] => Some(self.enter_graph(head, mailbox)),
            ["v1.0", ..] => Some(Err(Refusal::new(
                404,
                "BadRequest",
                format!("Resource not found for the segment '{}'.", segments.get(1).unwrap_or(&"")),
            ))),
            _ => None,
        }
    }

    fn enter_graph(self: &Arc<Self>, head: &Head, mailbox: &str) -> Result<Entered, Refusal> {
        let settings = self.settings();
        let given = self.given(head.header("authorization"))?;
        if given.audience == "https://outlook.office365.com" {
            return Err(unauthorized("Access token validation failure. Invalid audience."));
        }
        let app = settings.apps.iter().find(|app| {
            app.is_in(&given.tenant) && app.client_id == given.client_id && app.enabled
        });
        let app = app.ok_or_else(|| unauthorized("The identity of the application is unknown."))?;
        let mailbox = mailbox.to_ascii_lowercase();
        let lane = (app.client_id.clone(), mailbox.clone());
        lock(&self.traffic).enter(&lane, &settings.limits, clock::now())?;
        let app = app.clone();
        let entered = Entered { service: Arc::clone(self), lane, app, settings, mailbox };
        entered.exists()?;
        Ok(entered)
    }

    fn given(&self, authorization: Option<&str>) -> Result<Given, Refusal> {
        let token = authorization.and_then(|value| value.split_once(' '));
        let token = token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let (_, token) = token.ok_or_else(|| unauthorized("Access token is empty."))?;
        let tokens = lock(&self.tokens);
        let given = tokens.find(token).ok_or_else(|| {
            unauthorized("IDX14100: JWT is not well formed, or it was not issued here.")
        })?;
        if given.expires <= clock::now() {
            return Err(unauthorized("Lifetime validation failed, the token is expired."));
        }
        Ok(given.clone())
    }

    /// Which of the tokens a header shows, for a record.
    fn shown_authorization(&self, value: &str) -> String {
        match value.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => {
                match lock(&self.tokens).find(token) {
                    Some(given) => format!("Bearer (token {})", given.number),
                    None => "Bearer (unknown)".to_owned(),
                }
            }
            Some((scheme, _)) => format!("{scheme} (not shown)"),
            None => "(not shown)".to_owned(),
        }
    }

    /// What is not Graph's: login, metadata service, uploads.
    fn act_elsewhere(self: &Arc<Self>, head: &Head, body: &Octets) -> Result<Outcome, Refusal> {
        let segments: Vec<&str> = head.segments.iter().map(String::as_str).collect();
        match segments.as_slice() {
            [tenant, "oauth2", "v2.0", "token"] => {
                if head.method != "POST" {
                    return Err(Refusal::new(405, "MethodNotAllowed", "Use POST."));
                }
                let settings = self.settings();
                let content_type = head.content_type();
                let asking = Asking {
                    tenant,
                    content_type: &content_type,
                    authorization: head.header("authorization"),
                    body: &body.kept,
                    root: &self.root,
                };
                Ok(login::token(&settings, &mut lock(&self.tokens), &asking).into())
            }
            ["metadata", "identity", "oauth2", "token"] => {
                let settings = self.settings();
                let mut tokens = lock(&self.tokens);
                let answer =
                    login::machine(&settings, &mut tokens, &head.query, &head.headers, &self.root);
                Ok(answer.into())
            }
            ["api", "v2.0", _, _, session] if session.starts_with("AttachmentSessions(") => {
                self.act_on_session(head, body).map(Outcome::from)
            }
            _ => Err(Refusal::new(404, "ResourceNotFound", "Resource could not be discovered.")),
        }
    }

    fn act_on_session(self: &Arc<Self>, head: &Head, body: &Octets) -> Result<Answer, Refusal> {
        // Whoever has the URL may upload; a token of Graph is for another audience.
        if head.header("authorization").is_some() {
            let words = "The audience claim value is invalid for current resource. Audience claim is 'https://graph.microsoft.com', request url is 'https://outlook.office.com/…' and resource type is 'None'.";
            return Err(Refusal::new(401, "InvalidAudienceForResource", words));
        }
        let query = query(&head.query);
        let token = query.get("authtoken").and_then(Value::as_str).unwrap_or_default();
        let settings = self.settings();
        let mut mailboxes = lock(&self.mailboxes);
        match head.method.as_str() {
            "GET" => mailboxes.show_session(token),
            "DELETE" => mailboxes.close_session(token),
            "PUT" => {
                if body.size > settings.request_size as u64 {
                    return Err(Refusal::new(413, "RequestEntityTooLarge", ""));
                }
                if let Some(lane) = mailboxes.lane_of_session(token) {
                    let mut traffic = lock(&self.traffic);
                    traffic.upload(&lane, body.size, &settings.limits, clock::now())?;
                }
                if head.content_type() != "application/octet-stream" {
                    return Err(unsupported());
                }
                let range = head.header("content-range");
                mailboxes.upload(token, range, &body.kept, &self.root, &settings)
            }
            _ => Err(Refusal::new(405, "MethodNotAllowed", "The method is not allowed.")),
        }
    }
}

impl Entered {
    /// Whether there is such a mailbox for the app.
    fn exists(&self) -> Result<(), Refusal> {
        let mailbox = &self.mailbox;
        let invalid = || {
            let words = format!("The requested user '{mailbox}' is invalid.");
            Err(Refusal::new(404, "ErrorInvalidUser", words))
        };
        let Some((_, domain)) = mailbox.rsplit_once('@') else { return invalid() };
        let domains = &self.app.domains;
        if !domains.is_empty() && !domains.iter().any(|it| it.eq_ignore_ascii_case(domain)) {
            return invalid();
        }
        let named = |list: &[String]| list.iter().any(|it| it.eq_ignore_ascii_case(mailbox));
        match &self.settings.mailboxes {
            Some(mailboxes) if !named(mailboxes) => return invalid(),
            Some(_) => {}
            None => faults::of_mailbox(mailbox).map_or(Ok(()), Err)?,
        }
        match &self.app.only {
            Some(only) if !named(only) => {
                Err(Refusal::new(403, "ErrorAccessDenied", "Access to OData is disabled."))
            }
            _ => Ok(()),
        }
    }

    fn needs(&self, rights: &[&str]) -> Result<(), Refusal> {
        if rights.iter().any(|right| self.app.may(right)) {
            return Ok(());
        }
        let words = "Access is denied. Check credentials and try again.";
        Err(Refusal::new(403, "ErrorAccessDenied", words))
    }

    /// What Graph does.
    fn act(&self, head: &Head, body: &Octets) -> Result<Outcome, Refusal> {
        if body.size > self.settings.request_size as u64 {
            return Err(Refusal::new(413, "RequestEntityTooLarge", ""));
        }
        let limits = &self.settings.limits;
        lock(&self.service.traffic).upload(&self.lane, body.size, limits, clock::now())?;
        let segments: Vec<&str> = head.segments.iter().skip(3).map(String::as_str).collect();
        let method = head.method.as_str();
        let mailboxes = || lock(&self.service.mailboxes);
        let query = query(&head.query);
        let select = query.get("$select").and_then(Value::as_str);
        let write = ["Mail.ReadWrite"];
        let read = ["Mail.ReadWrite", "Mail.Read", "Mail.ReadBasic.All"];
        let answer = match (method, segments.as_slice()) {
            ("POST", ["sendMail"]) => {
                self.needs(&["Mail.Send"])?;
                return self.send_mail(head, body);
            }
            ("POST", ["messages"]) => {
                self.needs(&write)?;
                let stored = match head.content_type().as_str() {
                    "application/json" => message::read(&message::parse(&body.kept)?)?,
                    "text/plain" => mime::read(&body.kept)?,
                    _ => return Err(unsupported()),
                };
                let prefer = head.header("prefer").unwrap_or_default().to_ascii_lowercase();
                let is_immutable = prefer.contains("idtype=\"immutableid\"");
                mailboxes().create(&self.mailbox, stored, is_immutable)
            }
            ("GET", ["messages"]) => {
                self.needs(&read)?;
                self.list(&query, None)?
            }
            ("GET", ["mailFolders", folder, "messages"]) => {
                self.needs(&read)?;
                let drafts = match folder.to_ascii_lowercase().as_str() {
                    "drafts" => true,
                    "sentitems" => false,
                    _ => return Err(Refusal::new(404, "ErrorFolderNotFound", "No such folder.")),
                };
                self.list(&query, Some(drafts))?
            }
            ("GET", ["messages", id]) => {
                self.needs(&read)?;
                mailboxes().show(&self.mailbox, id, select)?
            }
            ("PATCH", ["messages", id]) => {
                self.needs(&write)?;
                needs_json(head)?;
                mailboxes().change(&self.mailbox, id, &message::parse(&body.kept)?)?
            }
            ("DELETE", ["messages", id]) | ("POST", ["messages", id, "permanentDelete"]) => {
                self.needs(&write)?;
                mailboxes().delete(&self.mailbox, id)?
            }
            ("POST", ["messages", id, "attachments"]) => {
                self.needs(&write)?;
                needs_json(head)?;
                let attachment = message::read_attachment(&message::parse(&body.kept)?)?;
                mailboxes().attach(&self.mailbox, id, attachment, &self.settings)?
            }
            ("POST", ["messages", id, "attachments", "createUploadSession"]) => {
                self.needs(&write)?;
                needs_json(head)?;
                let json = message::parse(&body.kept)?;
                let root = &self.service.root;
                mailboxes().open_session(&self.lane, id, &json, root, &self.settings)?
            }
            ("POST", ["messages", id, "send"]) => {
                self.needs(&["Mail.Send"])?;
                return self.send_draft(head, id, body);
            }
            (_, ["sendMail" | "messages", ..]) => {
                return Err(Refusal::new(
                    405,
                    "ErrorMethodNotAllowed",
                    "The method is not allowed.",
                ));
            }
            _ => {
                let segment = segments.first().copied().unwrap_or_default();
                let words = format!("Resource not found for the segment '{segment}'.");
                return Err(Refusal::new(400, "BadRequest", words));
            }
        };
        Ok(answer.into())
    }

    fn list(&self, query: &Map<String, Value>, drafts: Option<bool>) -> Result<Answer, Refusal> {
        let filter = match query.get("$filter").and_then(Value::as_str) {
            Some(text) => Filter::parse(text)?,
            None => Filter::default(),
        };
        let lag = Duration::from_millis(self.settings.index_lag_ms);
        Ok(lock(&self.service.mailboxes).list(&self.mailbox, &filter, drafts, query, lag))
    }

    fn send_mail(&self, head: &Head, body: &Octets) -> Result<Outcome, Refusal> {
        let (stored, save, form) = match head.content_type().as_str() {
            "application/json" => {
                let (stored, save) = message::read_send_mail(&body.kept)?;
                (stored, save, Form::Json)
            }
            // There is nowhere to say that no copy is wanted.
            "text/plain" => (mime::read(&body.kept)?, true, Form::Mime),
            _ => return Err(unsupported()),
        };
        if stored.octets() > self.settings.message_size {
            let words = "The message exceeds the maximum supported size.";
            return Err(Refusal::new(400, "ErrorMessageSizeExceeded", words));
        }
        self.submit(&stored, |service| {
            if save {
                let mut copy = stored.clone();
                if copy.internet_message_id.is_empty() {
                    copy.internet_message_id =
                        format!("<{}@sandbox.prod.outlook.invalid>", answer::guid());
                }
                lock(&service.mailboxes).keep_sent(&self.mailbox, copy);
            }
            let bytes = match form {
                Form::Mime => mime::decoded(&body.kept).unwrap_or_default(),
                _ => body.kept.clone(),
            };
            Ok((stored.clone(), form, bytes))
        })
    }

    fn send_draft(&self, head: &Head, id: &str, body: &Octets) -> Result<Outcome, Refusal> {
        if head.header("content-length").is_none() {
            return Err(Refusal::new(
                411,
                "LengthRequired",
                "The header Content-Length is missing.",
            ));
        }
        if body.size > 0 {
            return Err(Refusal::new(400, "BadRequest", "The request has a body."));
        }
        let stored = lock(&self.service.mailboxes).peek(&self.mailbox, id)?;
        self.submit(&stored, |service| {
            let stored = lock(&service.mailboxes).sent(&self.mailbox, id)?;
            let bytes = serde_json::to_vec(&stored).unwrap_or_default();
            Ok((stored, Form::Draft, bytes))
        })
    }

    /// Looks whether the message may go, and lets `taken` say what arrived.
    fn submit(
        &self,
        stored: &Stored,
        taken: impl Fn(&Service) -> Result<(Stored, Form, Vec<u8>), Refusal>,
    ) -> Result<Outcome, Refusal> {
        stored.check_recipients(self.settings.recipients)?;
        self.may_send_as(stored)?;
        let asked = lock(&self.service.askers).ask(stored.recipients());
        let fault = asked.as_ref().map(|_| "by address");
        let mut outcome = Outcome { fault, ..Outcome::from(Answer::empty(202)) };
        let (address, asked) = asked.unzip();
        let turned_away = |words: String| {
            self.service.inbox.refuse(address.unwrap_or_default().to_owned(), words);
        };
        match asked {
            Some(Asked::Later(refusal)) => return Err(refusal),
            Some(Asked::Refused(refusal)) => {
                turned_away(format!("{} {}", refusal.status, refusal.code));
                return Err(refusal);
            }
            Some(Asked::Instead(end)) => {
                turned_away(match &end {
                    End::Answer(answer) => answer.status.to_string(),
                    End::Drop => "connection dropped".to_owned(),
                    End::Hang => "no answer".to_owned(),
                    End::Endless(_) | End::Truncated(_) => "an answer without an end".to_owned(),
                });
                outcome.end = end;
                return Ok(outcome);
            }
            Some(Asked::Then(end)) => outcome.end = end,
            Some(Asked::Slow) => outcome.delay = Duration::from_millis(self.settings.slow_ms),
            None => {}
        }
        let count = stored.recipients().count() as u64;
        let limits = &self.settings.limits;
        lock(&self.service.traffic).send(&self.mailbox, count, limits, clock::now())?;
        let (stored, form, bytes) = taken(&self.service)?;
        let from = stored.from.as_ref().map_or(&self.mailbox, |from| &from.address).clone();
        self.service.inbox.take(Taken {
            received: clock::wall().0,
            from,
            to: stored.recipients().map(str::to_owned).collect(),
            form,
            content: bytes.into(),
            stored: Some(Arc::new(stored)),
        });
        Ok(outcome)
    }

    fn may_send_as(&self, stored: &Stored) -> Result<(), Refusal> {
        let Some(from) = &stored.from else { return Ok(()) };
        // An address in the display name is taken for an attempt to deceive.
        if from.name.as_deref().is_some_and(|name| name.contains('@')) {
            return Err(faults::send_as_denied());
        }
        let is =
            |pattern: &str, address: &str| pattern == "*" || pattern.eq_ignore_ascii_case(address);
        let granted =
            from.address.eq_ignore_ascii_case(&self.mailbox)
                || (self.settings.mailboxes.is_none() && faults::is_list(&from.address))
                || self.settings.send_as.iter().any(|(mailbox, address)| {
                    is(mailbox, &self.mailbox) && is(address, &from.address)
                });
        if granted { Ok(()) } else { Err(faults::send_as_denied()) }
    }
}

fn needs_json(head: &Head) -> Result<(), Refusal> {
    if head.content_type() == "application/json" { Ok(()) } else { Err(unsupported()) }
}

fn unsupported() -> Refusal {
    let words = "The content type of the request is missing or not supported.";
    Refusal::new(415, "UnsupportedMediaType", words)
}

fn unauthorized(words: &str) -> Refusal {
    Refusal::new(401, "InvalidAuthenticationToken", words)
}

fn query(text: &str) -> Map<String, Value> {
    let pairs = oauth2::url::form_urlencoded::parse(text.as_bytes());
    pairs.map(|(name, value)| (name.into_owned(), Value::from(value))).collect()
}
