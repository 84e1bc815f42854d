//! What the provider would make of a message: the way it would take, the requests without what they carry, and all that
//! would be dropped or changed. Nothing is sent and nothing is asked.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};

use crate::config::{self, LargeMessages};
use crate::envelope::{Body, Client, Envelope, Kind, Priority, Rcpt, SpoolId, UnixMillis};
use crate::message::header::HeaderFilter;
use crate::message::outgoing::Message;
use crate::message::received::{self, Arrival};
use crate::policy::Policy;
use crate::provider::graph::message::{
    Attachment, Case, Draft, Format, Json, LossKind, Mime, Piece, Plan, Scan, convert, unfit,
};
use crate::provider::graph::{self, MAX_REQUEST};
use crate::smtp::address::{ForwardPath, Mailbox, ReversePath};
use crate::smtp::params::Notify;
use crate::smtp::reply::Escaped;

/// Fields of a header that are looked at.
const MAX_FIELDS: usize = 2_000;
/// Octets of a header line that are shown.
const SHOWN: usize = 200;

/// A message as an application would hand it in.
pub struct Question<'a> {
    pub provider: &'a config::Provider,
    pub policy: &'a Policy,
    pub hostname: &'a str,
    pub reverse_path: ReversePath,
    pub recipients: Vec<ForwardPath>,
    /// Its lines end with CRLF.
    pub content: Bytes,
    pub now: UnixMillis,
}

#[derive(Debug, Serialize)]
pub struct Explanation {
    /// `smtp`, `microsoft365` or `none`.
    pub provider: &'static str,
    /// `smtp`, `json`, `mime` or `draft`; `refused` where there is none, and `none` where nothing is sent.
    pub way: &'static str,
    /// Who readers see as the sender.
    pub sender: Option<String>,
    pub recipients: Vec<String>,
    /// Recipients that fail, and why the message does.
    pub refused: Vec<Note>,
    /// What the server is asked, in that order.
    pub requests: Vec<Request>,
    pub changes: Vec<Note>,
    /// What depends on something that is not known here.
    pub remarks: Vec<String>,
}

/// Something, and what happens to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Note {
    pub kind: &'static str,
    pub what: String,
    pub why: String,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Request {
    /// A method and a path, or the commands of SMTP.
    pub request: String,
    #[serde(skip_serializing_if = "Value::is_null")]
    pub body: Value,
}

/// Fails where the content cannot be read, which a content in memory always can.
pub async fn explain(question: Question<'_>) -> io::Result<Explanation> {
    let Question { provider, policy, hostname, reverse_path, recipients, content, now } = question;
    let mut filter = HeaderFilter::new();
    let mut stored = Vec::with_capacity(content.len());
    filter.push(&content, &mut stored);
    let facts = filter.finish(&mut stored);
    let id = SpoolId::new(now);
    let client = Client { address: "127.0.0.1".into(), helo: "localhost".into() };
    let arrival = Arrival { id, at: now, client: &client, hostname, protocol: "ESMTP" };
    let prepend = received::prepend(arrival, &facts);
    let rcpt =
        |path: &ForwardPath| Rcpt { path: path.clone(), notify: Notify::Unsaid, orcpt: None };
    let envelope = Envelope {
        id,
        kind: Kind::Mail,
        accepted: now,
        smtputf8: !reverse_path.is_ascii() || recipients.iter().any(|to| !to.is_ascii()),
        reverse_path,
        rcpts: recipients.iter().map(rcpt).collect(),
        eight_bit: facts.eight_bit,
        ret: None,
        envid: None,
        size: facts.size,
        client,
        priority: Priority::Normal,
        author: facts.author.clone(),
        prepend,
    };
    let body = Body::Memory(Bytes::from(stored));
    let (message, reverse_path) = policy.apply(&envelope, &body).await?;
    let mut leaving = Vec::new();
    let mut reader = message.reader();
    while let Some(chunk) = reader.chunk().await? {
        leaving.extend_from_slice(&chunk);
    }
    let mut explanation = Explanation {
        provider: "none",
        way: "none",
        sender: message.author.as_ref().map(|author| author.as_str().to_owned()),
        recipients: recipients.iter().map(|to| to.as_str().to_owned()).collect(),
        refused: Vec::new(),
        requests: Vec::new(),
        changes: header_changes(&content, &leaving),
        remarks: Vec::new(),
    };
    if let Some(reply) = policy.refusal(&facts) {
        explanation.refused.push(note("message", "the message", &reply.to_string()));
        explanation.way = "refused";
    }
    match provider {
        config::Provider::None { .. } => {}
        config::Provider::Smtp(section) => {
            explanation.provider = "smtp";
            by_smtp(section, &envelope, &message, &reverse_path, &mut explanation);
        }
        config::Provider::Microsoft365(section) => {
            explanation.provider = "microsoft365";
            let mut scan = Scan::new();
            scan.push(&leaving);
            let author = message.author.as_ref();
            by_graph(section, &envelope, &reverse_path, author, scan, &mut explanation);
        }
    }
    Ok(explanation)
}

fn by_smtp(
    section: &config::SmtpProvider,
    envelope: &Envelope,
    message: &Message,
    reverse_path: &ReversePath,
    explanation: &mut Explanation,
) {
    if explanation.refused.is_empty() {
        explanation.way = "smtp";
    }
    for part in envelope.rcpts.chunks(section.max_recipients.max(1)) {
        let mut lines = vec![format!("MAIL FROM:{reverse_path} SIZE={}", message.size)];
        lines.extend(part.iter().map(|rcpt| format!("RCPT TO:{}", rcpt.path)));
        lines.push("DATA".to_owned());
        explanation.requests.push(Request { request: lines.join("\n"), body: Value::Null });
    }
    if message.smtputf8 || envelope.smtputf8 {
        let remark = "some of it needs SMTPUTF8: where the server does not offer that, those recipients fail that need it";
        explanation.remarks.push(remark.to_owned());
    }
}

fn by_graph(
    section: &config::Microsoft365,
    envelope: &Envelope,
    reverse_path: &ReversePath,
    author: Option<&Mailbox>,
    scan: Scan,
    explanation: &mut Explanation,
) {
    let mailbox = graph::mailbox(&section.sender, reverse_path, author);
    explanation.sender = Some(mailbox.as_str().to_owned());
    let mut part = Vec::new();
    for (at, rcpt) in envelope.rcpts.iter().enumerate() {
        match unfit(&rcpt.path) {
            Some(why) => {
                explanation.refused.push(note("recipient", rcpt.path.as_str(), why));
            }
            None => part.push(at),
        }
    }
    if part.is_empty() {
        explanation.way = "refused";
        return;
    }
    if mailbox != &section.sender {
        explanation.remarks.push(format!("where {mailbox} is no mailbox (an alias, a list), it goes through {} and needs Send As there", section.sender));
    }
    let scanned = scan.finish();
    for part in part.chunks(section.max_recipients.max(1)) {
        let case = Case {
            envelope,
            reverse_path,
            part,
            mailbox,
            from: None,
            save_to_sent_items: section.save_to_sent_items,
            format: match section.format {
                config::Format::Auto => Format::Auto,
                config::Format::Json => Format::Json,
                config::Format::Mime => Format::Mime,
            },
            may_draft: section.large_messages != LargeMessages::Off,
            extras: true,
            max_request: MAX_REQUEST,
        };
        let plan = match convert(&scanned, &case) {
            Ok(plan) => plan,
            Err(unfit) => {
                explanation.refused.push(note("message", "the message", &unfit.to_string()));
                explanation.way = "refused";
                return;
            }
        };
        let user = format!("/v1.0/users/{mailbox}");
        let (way, requests) = match &plan {
            Plan::Json(json) => ("json", vec![send_mail(&user, json)]),
            Plan::Mime(mime) => ("mime", vec![send_mime(&user, mime)]),
            Plan::Draft(draft) => ("draft", draft_requests(&user, draft)),
        };
        if explanation.way == "none" {
            explanation.way = way;
            // They are the same for each part but for the addresses, of which every part has its own.
            explanation.changes.extend(
                plan.losses().iter().map(|loss| note(loss.kind.as_str(), &loss.what, loss.why)),
            );
            if way == "draft" && section.large_messages == LargeMessages::Auto {
                let remark = "this way is open where the token shows Mail.ReadWrite; else the message is refused (552 5.3.4)";
                explanation.remarks.push(remark.to_owned());
            }
        }
        explanation.requests.extend(requests);
    }
    // What the gateway puts before every message stays behind in JSON.
    let is_ours = |change: &Note| {
        let names = ["Received", "Message-ID", "Date"];
        change.kind == "added" && names.iter().any(|name| change.what.ends_with(name))
    };
    if explanation.way != "mime" {
        explanation.changes.retain(|change| !is_ours(change));
    }
    explanation.changes.sort_by_key(|change| change.kind == LossKind::Usual.as_str());
}

fn note(kind: &'static str, what: &str, why: &str) -> Note {
    Note { kind, what: what.to_owned(), why: why.to_owned() }
}

fn send_mail(user: &str, json: &Json) -> Request {
    Request { request: format!("POST {user}/sendMail ({} octets)", json.size), body: shown(json) }
}

fn send_mime(user: &str, mime: &Mime) -> Request {
    let header = String::from_utf8_lossy(&mime.head).into_owned();
    let request = format!("POST {user}/sendMail ({} octets of base64)", mime.size);
    Request { request, body: Value::String(header) }
}

fn draft_requests(user: &str, draft: &Draft) -> Vec<Request> {
    let create = format!("POST {user}/messages ({} octets)", draft.message.len());
    let mut requests = vec![Request { request: create, body: without_text(&draft.message) }];
    requests.extend(draft.attachments.iter().map(|file| attach(user, file)));
    let send = format!("POST {user}/messages/ID/send");
    requests.push(Request { request: send, body: Value::Null });
    requests
}

fn attach(user: &str, file: &Attachment) -> Request {
    let post = file.post();
    match graph::is_posted(file) {
        true => Request {
            request: format!("POST {user}/messages/ID/attachments ({} octets)", post.size),
            body: shown(&post),
        },
        false => Request {
            request: format!(
                "POST {user}/messages/ID/attachments/createUploadSession, then PUT {} octets",
                file.size
            ),
            body: serde_json::from_str(&file.session()).unwrap_or_default(),
        },
    }
}

/// The JSON with the size of each file in place of its content, and without the text.
fn shown(json: &Json) -> Value {
    let piece = |piece: &Piece| match piece {
        Piece::Text(text) => text.clone(),
        Piece::Content(file) => format!("({} octets)", file.size),
    };
    without_text(&json.pieces.iter().map(piece).collect::<String>())
}

fn without_text(json: &str) -> Value {
    let mut value: Value = serde_json::from_str(json).unwrap_or_default();
    for pointer in ["/message/body/content", "/body/content"] {
        if let Some(content) = value.pointer_mut(pointer) {
            let octets = content.as_str().map_or(0, str::len);
            *content = json!(format!("({octets} octets)"));
        }
    }
    value
}

/// What the header loses and gains on its way from the application to the provider.
fn header_changes(before: &[u8], after: &[u8]) -> Vec<Note> {
    let mut added: VecDeque<&[u8]> = fields(after).into();
    let mut gone = Vec::new();
    for field in fields(before) {
        match added.iter().position(|it| *it == field) {
            Some(at) => drop(added.remove(at)),
            None => gone.push(field),
        }
    }
    let mut changes = Vec::new();
    for field in gone {
        let name = name(field);
        let becomes = added.iter().position(|it| self::name(it).eq_ignore_ascii_case(&name));
        let what = format!("header field {name}");
        match becomes.and_then(|at| added.remove(at)) {
            Some(new) => changes.push(note("changed", &what, &format!("becomes {}", line(new)))),
            None => changes.push(note("dropped", &what, "is not sent")),
        }
    }
    let new = |field: &&[u8]| note("added", &format!("header field {}", name(field)), &line(field));
    changes.extend(added.iter().map(new));
    changes
}

/// The fields of a header, each with its continuation lines.
fn fields(content: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    let (mut start, mut at) = (0, 0);
    for line in content.split_inclusive(|byte| *byte == b'\n') {
        let is_end = line.trim_ascii().is_empty();
        if !matches!(line.first(), Some(b' ' | b'\t')) || is_end {
            found.extend(content.get(start..at).filter(|field| !field.is_empty()));
            start = at;
        }
        if is_end || found.len() >= MAX_FIELDS {
            return found;
        }
        at += line.len();
    }
    found.extend(content.get(start..at).filter(|field| !field.is_empty()));
    found
}

fn name(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == b':').unwrap_or(field.len());
    let name: String = String::from_utf8_lossy(field.get(..end).unwrap_or_default()).into();
    name.trim().chars().take(SHOWN).collect::<String>().escape_default().to_string()
}

fn line(field: &[u8]) -> String {
    let field = field.trim_ascii();
    Escaped(field.get(..SHOWN.min(field.len())).unwrap_or_default()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_compared_field_by_field() {
        let before =
            b"From: a@b\r\nBcc: x@y\r\nSubject: long\r\n subject\r\nTo: b\r\n\r\nTo: body\r\n";
        let after = b"Received: from x\r\nFrom: c@d\r\nSubject: long\r\n subject\r\nTo: b\r\n\r\n";
        let changes: Vec<_> = header_changes(before, after)
            .into_iter()
            .map(|it| format!("{} {}: {}", it.kind, it.what, it.why))
            .collect();
        assert_eq!(
            changes,
            [
                "changed header field From: becomes From: c@d",
                "dropped header field Bcc: is not sent",
                "added header field Received: Received: from x",
            ]
        );
        assert!(header_changes(before, before).is_empty());
        assert!(fields(b"").is_empty());
        assert_eq!(fields(b"no end").len(), 1);
        assert_eq!(fields(b" folded\r\n\r\n").len(), 1);
    }
}
