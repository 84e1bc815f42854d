//! The inbox as pages for a browser: plain HTML, without scripts and without anything from elsewhere.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::clock;
use crate::envelope::UnixMillis;
use crate::sandbox::graph::message::{Recipient, Stored};
use crate::sandbox::inbox::{Inbox, Mail};

/// Octets of the bytes that came in which a page shows; the rest is behind the link.
const SHOWN: usize = 64 * 1024;

/// What a message brings is shown in a frame without rights; it loads nothing but its own pictures.
const POLICY: &str = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; frame-src 'self'; form-action 'none'; base-uri 'none'";

const STYLE: &str = "body{font:15px/1.4 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em}\
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.3em .8em .3em 0;border-bottom:1px solid #ddd}\
th{white-space:nowrap;width:1%}pre{background:#f6f6f6;padding:1em;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere}\
iframe{width:100%;height:24em;border:1px solid #ddd}";

/// `/` lists what arrived, `/messages/N` shows one.
pub(super) fn router(inbox: Arc<Inbox>) -> Router {
    Router::new().route("/", get(list)).route("/messages/{number}", get(show)).with_state(inbox)
}

async fn list(State(inbox): State<Arc<Inbox>>) -> Response {
    let mut body = "<h1>Inbox</h1>\n".to_owned();
    let mails = inbox.mails();
    if mails.is_empty() {
        body.push_str("<p>Nothing has arrived yet.</p>\n");
    } else {
        body.push_str("<table>\n<tr><th>time</th><th>from</th><th>to</th><th>subject</th></tr>\n");
        for mail in mails.iter().rev() {
            let subject =
                mail.stored.as_ref().map_or_else(|| subject(mail), |it| it.subject.clone());
            let subject = if subject.is_empty() { "(no subject)".to_owned() } else { subject };
            body.push_str(&format!(
                "<tr><td>{}</td><td>{}</td><td>{}</td><td><a href=\"/messages/{}\">{}</a></td></tr>\n",
                clock::Time(UnixMillis(mail.received)),
                escape(&mail.from),
                escape(&mail.to.join(", ")),
                mail.number,
                escape(&subject),
            ));
        }
        body.push_str("</table>\n");
    }
    let refused = inbox.refused();
    if !refused.is_empty() {
        body.push_str("<h2>Refused</h2>\n<table>\n");
        for one in refused.iter().rev() {
            let (to, reply) = (escape(&one.to), escape(&one.reply));
            body.push_str(&format!("<tr><td>{to}</td><td>{reply}</td></tr>\n"));
        }
        body.push_str("</table>\n");
    }
    page("Inbox", "<meta http-equiv=\"refresh\" content=\"5\">", &body)
}

async fn show(State(inbox): State<Arc<Inbox>>, Path(number): Path<u64>) -> Response {
    match inbox.mails().into_iter().find(|mail| mail.number == number) {
        Some(mail) => page(&format!("Message {number}"), "", &message(&mail)),
        None => (StatusCode::NOT_FOUND, page("No such message", "", "<p>No such message.</p>"))
            .into_response(),
    }
}

fn message(mail: &Mail) -> String {
    let number = mail.number;
    let mut body = format!("<p><a href=\"/\">Inbox</a></p>\n<h1>Message {number}</h1>\n<table>\n");
    body.push_str(&row("received", &clock::Time(UnixMillis(mail.received)).to_string()));
    body.push_str(&row("from", &mail.from));
    body.push_str(&row("to", &mail.to.join(", ")));
    body.push_str("</table>\n");
    if let Some(stored) = &mail.stored {
        body.push_str(&as_stored(number, stored));
    }
    body.push_str(&format!(
        "<h2>As it came in</h2>\n<p><a href=\"/api/v1/inbox/{number}\">{} octets</a></p>\n",
        mail.size
    ));
    let start = mail.content.get(..SHOWN).unwrap_or(&mail.content);
    body.push_str(&format!("<pre>{}</pre>\n", escape(&String::from_utf8_lossy(start))));
    body
}

/// As the mailbox has it.
fn as_stored(number: u64, stored: &Stored) -> String {
    let mut body = "<h2>As it is stored</h2>\n<table>\n".to_owned();
    body.push_str(&row("subject", &stored.subject));
    let from: Vec<Recipient> = stored.from.iter().cloned().collect();
    for (name, list) in [
        ("From", &from),
        ("To", &stored.to_recipients),
        ("Cc", &stored.cc_recipients),
        ("Bcc", &stored.bcc_recipients),
        ("Reply-To", &stored.reply_to),
    ] {
        if !list.is_empty() {
            body.push_str(&row(name, &named(list)));
        }
    }
    body.push_str(&row("importance", &stored.importance));
    body.push_str(&row("Message-ID", &stored.internet_message_id));
    let pairs = stored.internet_message_headers.iter();
    for pair in pairs.chain(&stored.single_value_extended_properties) {
        body.push_str(&row(&pair.key, &pair.value));
    }
    for (at, attachment) in stored.attachments.iter().enumerate() {
        let inline = match &attachment.content_id {
            Some(id) if attachment.is_inline => format!(", inline as {}", escape(id)),
            _ => String::new(),
        };
        body.push_str(&format!(
            "<tr><th>attachment</th><td><a href=\"/api/v1/inbox/{number}/attachments/{at}\">{}</a> ({}, {} octets{inline})</td></tr>\n",
            escape(&attachment.name),
            escape(&attachment.content_type),
            attachment.size,
        ));
    }
    body.push_str("</table>\n");
    if stored.body.content_type == "html" {
        let html = with_pictures(number, stored);
        body.push_str(&format!("<iframe sandbox srcdoc=\"{}\"></iframe>\n", escape(&html)));
    } else {
        body.push_str(&format!("<pre>{}</pre>\n", escape(&stored.body.content)));
    }
    body
}

/// The HTML with its inline pictures found.
fn with_pictures(number: u64, stored: &Stored) -> String {
    let mut html = stored.body.content.clone();
    for (at, attachment) in stored.attachments.iter().enumerate() {
        if let Some(id) = attachment.content_id.as_ref().filter(|_| attachment.is_inline) {
            let place = format!("/api/v1/inbox/{number}/attachments/{at}");
            html = html.replace(&format!("cid:{id}"), &place);
        }
    }
    html
}

fn named(list: &[Recipient]) -> String {
    let shown = list.iter().map(|it| match &it.name {
        Some(name) => format!("{name} <{}>", it.address),
        None => it.address.clone(),
    });
    shown.collect::<Vec<_>>().join(", ")
}

fn row(name: &str, value: &str) -> String {
    format!("<tr><th>{}</th><td>{}</td></tr>\n", escape(name), escape(value))
}

/// The subject of a message that no mailbox has read, as it is written.
fn subject(mail: &Mail) -> String {
    let start = mail.content.get(..SHOWN).unwrap_or(&mail.content);
    let text = String::from_utf8_lossy(start);
    let header = text.split("\r\n\r\n").next().unwrap_or_default();
    let is_subject = |name: &str| name.eq_ignore_ascii_case("subject");
    let mut fields = header.split("\r\n").filter_map(|line| line.split_once(':'));
    fields
        .find(|(name, _)| is_subject(name))
        .map(|(_, value)| value.trim().to_owned())
        .unwrap_or_default()
}

fn page(title: &str, head: &str, body: &str) -> Response {
    let html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{}</title>{head}\n<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n",
        escape(title)
    );
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, html).into_response()
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::sandbox::graph::message::{Attachment, Body};
    use crate::sandbox::inbox::{Form, Taken};

    #[test]
    fn what_a_message_brings_stays_text() {
        let inbox = Inbox::new();
        let evil = "<script>alert('1')</script>\"";
        let stored = Stored {
            subject: evil.to_owned(),
            body: Body {
                content_type: "html".to_owned(),
                content: format!("<p>{evil}<img src=\"cid:1@x\">"),
            },
            to_recipients: vec![Recipient {
                address: evil.to_owned(),
                name: Some(evil.to_owned()),
            }],
            attachments: vec![Attachment {
                name: evil.to_owned(),
                content_type: evil.to_owned(),
                content_id: Some("1@x".to_owned()),
                is_inline: true,
                ..Attachment::default()
            }],
            ..Stored::default()
        };
        inbox.take(Taken {
            received: 0,
            from: evil.to_owned(),
            to: vec![evil.to_owned()],
            form: Form::Json,
            content: Bytes::from_static(b"<script>"),
            stored: Some(Arc::new(stored)),
        });
        let html = message(&inbox.mails()[0]);
        assert!(!html.contains("<script"), "{html}");
        assert!(
            html.contains("&lt;img src=&quot;/api/v1/inbox/1/attachments/0&quot;&gt;"),
            "{html}"
        );
        assert!(html.contains("<iframe sandbox srcdoc="));
    }

    #[test]
    fn a_message_by_smtp_shows_its_subject() {
        let inbox = Inbox::new();
        let content =
            Bytes::from_static(b"From: a@x\r\nSubject: Hello & more\r\n\r\nSubject: no\r\n");
        inbox.put(0, "a@x".to_owned(), vec!["b@x".to_owned()], content);
        assert_eq!(subject(&inbox.mails()[0]), "Hello & more");
    }
}
