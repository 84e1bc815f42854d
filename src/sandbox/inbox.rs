//! What arrived in the sandbox, in memory, and the API to look at it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use bytes::Bytes;
use serde::{Serialize, Serializer};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::sandbox::graph::message::Stored;

/// The oldest go beyond so many messages, or so many octets.
const MAX_MESSAGES: usize = 1_000;
pub(super) const MAX_OCTETS: usize = 256 * 1024 * 1024;

/// A message as the other side took it: the envelope that was really used, and the bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Mail {
    pub number: u64,
    /// Milliseconds since 1970.
    pub received: u64,
    pub from: String,
    pub to: Vec<String>,
    pub form: Form,
    pub size: usize,
    #[serde(skip)]
    pub content: Bytes,
    /// What a mailbox makes of it, where it went to one.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "inner")]
    pub stored: Option<Arc<Stored>>,
}

fn inner<S: Serializer>(stored: &Option<Arc<Stored>>, serializer: S) -> Result<S::Ok, S::Error> {
    stored.as_deref().serialize(serializer)
}

/// In which form it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    Smtp,
    /// The request of sendMail.
    Json,
    Mime,
    /// Piece by piece: what is kept is the draft as it stood when it was sent.
    Draft,
}

impl Form {
    fn content_type(self) -> &'static str {
        match self {
            Self::Smtp | Self::Mime => "message/rfc822",
            Self::Json | Self::Draft => "application/json",
        }
    }
}

/// A message that arrives.
pub struct Taken {
    pub received: u64,
    pub from: String,
    pub to: Vec<String>,
    pub form: Form,
    pub content: Bytes,
    pub stored: Option<Arc<Stored>>,
}

/// A recipient that the upstream refused because its address asked for it.
#[derive(Clone, Debug, Serialize)]
pub struct Refused {
    pub to: String,
    pub reply: String,
}

#[derive(Debug)]
pub struct Inbox {
    most: usize,
    kept: Mutex<Kept>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Kept {
    next: u64,
    octets: usize,
    /// Each with the octets that it takes.
    mails: VecDeque<(usize, Mail)>,
    refused: VecDeque<Refused>,
}

impl Inbox {
    pub fn new() -> Self {
        Self::keeping(MAX_OCTETS)
    }

    /// With so many octets at most, and one message at least.
    pub fn keeping(most: usize) -> Self {
        Self { most, kept: Mutex::new(Kept::default()), changed: watch::Sender::new(0) }
    }

    /// Keeps a message that came by SMTP, and says its number.
    pub fn put(&self, received: u64, from: String, to: Vec<String>, content: Bytes) -> u64 {
        self.take(Taken { received, from, to, form: Form::Smtp, content, stored: None })
    }

    /// Keeps a message and says its number.
    pub fn take(&self, taken: Taken) -> u64 {
        let mut kept = self.kept();
        kept.next += 1;
        let number = kept.next;
        let size = taken.content.len();
        let attachments = taken.stored.as_ref().map_or(0, |stored| stored.kept());
        let octets = size + attachments;
        kept.octets += octets;
        let Taken { received, from, to, form, content, stored } = taken;
        let mail = Mail { number, received, from, to, form, size, content, stored };
        kept.mails.push_back((octets, mail));
        while kept.mails.len() > MAX_MESSAGES || (kept.octets > self.most && kept.mails.len() > 1) {
            let gone = kept.mails.pop_front().map_or(0, |(octets, _)| octets);
            kept.octets -= gone;
        }
        drop(kept);
        self.changed.send_modify(|changes| *changes += 1);
        number
    }

    pub fn refuse(&self, to: String, reply: String) {
        let mut kept = self.kept();
        kept.refused.push_back(Refused { to, reply });
        if kept.refused.len() > MAX_MESSAGES {
            kept.refused.pop_front();
        }
        drop(kept);
        self.changed.send_modify(|changes| *changes += 1);
    }

    pub fn mails(&self) -> Vec<Mail> {
        self.kept().mails.iter().map(|(_, mail)| mail.clone()).collect()
    }

    /// How many messages have arrived since the start.
    pub fn arrived(&self) -> u64 {
        self.kept().next
    }

    pub fn refused(&self) -> Vec<Refused> {
        self.kept().refused.iter().cloned().collect()
    }

    pub fn clear(&self) {
        let next = self.kept().next;
        *self.kept() = Kept { next, ..Kept::default() };
    }

    /// Changes whenever something arrives or is refused.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves the inbox, and what else there is to look at, until the end.
pub async fn serve(socket: TcpListener, router: Router, stop: CancellationToken) {
    if let Err(error) =
        axum::serve(socket, router).with_graceful_shutdown(stop.cancelled_owned()).await
    {
        error!(%error, "the inbox ended: {error}");
    }
}

/// `GET /api/v1/inbox`: what arrived and what was refused; `DELETE` empties it. `GET /api/v1/inbox/N`: the bytes that
/// came in; `GET /api/v1/inbox/N/attachments/M`: what an attachment holds.
pub fn router(inbox: Arc<Inbox>) -> Router {
    Router::new()
        .route("/api/v1/inbox", get(list).delete(clear))
        .route("/api/v1/inbox/{number}", get(show))
        .route("/api/v1/inbox/{number}/attachments/{attachment}", get(attachment))
        .with_state(inbox)
}

async fn list(State(inbox): State<Arc<Inbox>>) -> Json<serde_json::Value> {
    Json(serde_json::json!({ "messages": inbox.mails(), "refused": inbox.refused() }))
}

async fn show(State(inbox): State<Arc<Inbox>>, Path(number): Path<u64>) -> Response {
    match inbox.mails().into_iter().find(|mail| mail.number == number) {
        Some(mail) => {
            ([(header::CONTENT_TYPE, mail.form.content_type())], mail.content).into_response()
        }
        None => (StatusCode::NOT_FOUND, "no such message\n").into_response(),
    }
}

async fn attachment(
    State(inbox): State<Arc<Inbox>>,
    Path((number, attachment)): Path<(u64, usize)>,
) -> Response {
    let mail = inbox.mails().into_iter().find(|mail| mail.number == number);
    let stored = mail.and_then(|mail| mail.stored);
    match stored.as_ref().and_then(|stored| stored.attachments.get(attachment)) {
        Some(attachment) => {
            // A picture may be looked at; nothing is ever a page of our own.
            let pictures = ["image/png", "image/jpeg", "image/gif", "image/webp"];
            let kind = attachment.content_type.to_ascii_lowercase();
            let picture = pictures.into_iter().find(|picture| *picture == kind);
            let place = if picture.is_some() { "inline" } else { "attachment" };
            let headers = [
                (header::CONTENT_TYPE, picture.unwrap_or("application/octet-stream")),
                (header::CONTENT_DISPOSITION, place),
                (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            ];
            (headers, attachment.content.clone()).into_response()
        }
        None => (StatusCode::NOT_FOUND, "no such attachment\n").into_response(),
    }
}

async fn clear(State(inbox): State<Arc<Inbox>>) -> StatusCode {
    inbox.clear();
    StatusCode::NO_CONTENT
}
