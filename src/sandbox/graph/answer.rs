//! What the simulator says: the shapes of Graph's and the login's answers.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::clock;

/// A whole answer. `request-id` and `Date` are put in on the way out.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(Cow<'static, str>, String)>,
    pub(super) body: Bytes,
}

impl Answer {
    pub(super) fn empty(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Bytes::new() }
    }

    pub(super) fn json(status: u16, body: &Value) -> Self {
        let kind = "application/json; odata.metadata=minimal; charset=utf-8".to_owned();
        Self {
            status,
            headers: vec![("content-type".into(), kind)],
            body: body.to_string().into_bytes().into(),
        }
    }

    /// As the front doors of the service answer, without a word of JSON.
    pub(super) fn html(status: u16, title: &str) -> Self {
        let body = format!(
            "<!DOCTYPE html>\r\n<html><head><title>{title}</title></head>\r\n<body><h2>{title}</h2></body></html>\r\n"
        );
        let kind = "text/html; charset=us-ascii".to_owned();
        Self {
            status,
            headers: vec![("content-type".into(), kind)],
            body: body.into_bytes().into(),
        }
    }

    pub(super) fn with(
        mut self,
        name: impl Into<Cow<'static, str>>,
        value: impl Into<String>,
    ) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
}

/// Why a request was not done: an error as Graph writes it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) code: &'static str,
    pub(super) message: String,
    /// A more exact code, inside.
    pub(super) inner: Option<&'static str>,
    pub(super) retry_after: Option<Duration>,
}

impl Refusal {
    pub(super) fn new(status: u16, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), inner: None, retry_after: None }
    }

    pub(super) fn inner(mut self, code: &'static str) -> Self {
        self.inner = Some(code);
        self
    }

    pub(super) fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// The ids are for correlation, as real ones.
    pub(super) fn answer(&self, request_id: &str, client_request_id: Option<&str>) -> Answer {
        if self.status == 413 {
            return Answer::html(413, "The request entity is too large");
        }
        let mut inner = json!({
            "date": clock::Time(clock::wall()).to_string().trim_end_matches('Z'),
            "request-id": request_id,
            "client-request-id": client_request_id.unwrap_or(request_id),
        });
        if let (Some(code), Some(map)) = (self.inner, inner.as_object_mut()) {
            map.insert("code".to_owned(), code.into());
        }
        let body = json!({
            "error": { "code": self.code, "message": self.message, "innerError": inner }
        });
        let mut answer = Answer::json(self.status, &body);
        if self.status == 401 {
            answer = answer.with("www-authenticate", "Bearer realm=\"\", error=\"invalid_token\"");
        }
        if let Some(delay) = self.retry_after {
            // Seconds, with a fraction, as the documents show them.
            answer = answer.with("retry-after", format!("{:.3}", delay.as_secs_f64()));
        }
        answer
    }
}

/// The end of an exchange that is no answer, or a bad one.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum End {
    Answer(Answer),
    /// The connection is dropped without a word.
    Drop,
    /// Nothing more is ever said.
    Hang,
    /// The body never ends.
    Endless(Answer),
    /// The connection is dropped within the body.
    Truncated(Answer),
}

/// A fresh GUID.
pub(super) fn guid() -> String {
    uuid::Builder::from_random_bytes(fastrand::u128(..).to_be_bytes()).into_uuid().to_string()
}
