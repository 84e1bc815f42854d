//! What arrived in the sandbox, in memory, and the API to look at it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use bytes::Bytes;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::error;

/// The oldest go beyond so many messages, or so many octets.
const MAX_MESSAGES: usize = 1_000;
const MAX_OCTETS: usize = 256 * 1024 * 1024;

/// A message as the upstream took it: the envelope that was really used, and the bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Mail {
    pub number: u64,
    /// Milliseconds since 1970.
    pub received: u64,
    pub from: String,
    pub to: Vec<String>,
    pub size: usize,
    #[serde(skip)]
    pub content: Bytes,
}

/// A recipient that the upstream refused because its address asked for it.
#[derive(Clone, Debug, Serialize)]
pub struct Refused {
    pub to: String,
    pub reply: String,
}

#[derive(Debug)]
pub struct Inbox {
    kept: Mutex<Kept>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Kept {
    next: u64,
    octets: usize,
    mails: VecDeque<Mail>,
    refused: VecDeque<Refused>,
}

impl Inbox {
    pub fn new() -> Self {
        Self { kept: Mutex::new(Kept::default()), changed: watch::Sender::new(0) }
    }

    /// Keeps a message and says its number.
    pub fn put(&self, received: u64, from: String, to: Vec<String>, content: Bytes) -> u64 {
        let mut kept = self.kept();
        kept.next += 1;
        let number = kept.next;
        kept.octets += content.len();
        kept.mails.push_back(Mail { number, received, from, to, size: content.len(), content });
        while kept.mails.len() > MAX_MESSAGES || (kept.octets > MAX_OCTETS && kept.mails.len() > 1)
        {
            let gone = kept.mails.pop_front().map_or(0, |mail| mail.size);
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
        self.kept().mails.iter().cloned().collect()
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

/// `GET /api/v1/inbox`: what arrived and what was refused; `DELETE` empties it. `GET /api/v1/inbox/N`: the message.
pub async fn serve(socket: TcpListener, inbox: Arc<Inbox>, stop: CancellationToken) {
    let router = Router::new()
        .route("/api/v1/inbox", get(list).delete(clear))
        .route("/api/v1/inbox/{number}", get(show))
        .with_state(inbox);
    if let Err(error) =
        axum::serve(socket, router).with_graceful_shutdown(stop.cancelled_owned()).await
    {
        error!(%error, "the inbox ended: {error}");
    }
}

async fn list(State(inbox): State<Arc<Inbox>>) -> Json<serde_json::Value> {
    Json(serde_json::json!({ "messages": inbox.mails(), "refused": inbox.refused() }))
}

async fn show(State(inbox): State<Arc<Inbox>>, Path(number): Path<u64>) -> Response {
    match inbox.mails().into_iter().find(|mail| mail.number == number) {
        Some(mail) => ([(header::CONTENT_TYPE, "message/rfc822")], mail.content).into_response(),
        None => (StatusCode::NOT_FOUND, "no such message\n").into_response(),
    }
}

async fn clear(State(inbox): State<Arc<Inbox>>) -> StatusCode {
    inbox.clear();
    StatusCode::NO_CONTENT
}
