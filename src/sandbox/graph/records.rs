//! Every request that came, for tests and for who wonders what the gateway does.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;

use crate::clock;

const MAX_RECORDS: usize = 10_000;
/// Octets of headers and bodies in all records together.
const MAX_OCTETS: usize = 32 * 1024 * 1024;
/// A text that is longer is cut.
const MAX_TEXT: usize = 4_096;

/// One request and how it ended. No token and no secret is in it.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    pub number: u64,
    /// Milliseconds since 1970.
    pub began: u64,
    pub method: String,
    /// With the query.
    pub path: String,
    /// Names in lower case. `authorization` says only which of the tokens it was.
    pub headers: BTreeMap<String, String>,
    pub body_size: u64,
    /// JSON as such with its long texts cut, a form as an object without secrets, else text.
    pub body: Value,
    /// The fault that was played.
    pub fault: Option<String>,
    /// What was answered; none while it goes on, and where nothing was.
    pub status: Option<u16>,
    /// `going on`, `answered`, `dropped`, `hung`.
    pub end: &'static str,
    pub took_ms: Option<u64>,
    #[serde(skip)]
    kept: usize,
}

#[derive(Debug)]
pub(super) struct Records {
    kept: Mutex<Kept>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Kept {
    next: u64,
    octets: usize,
    records: VecDeque<Record>,
}

impl Records {
    pub(super) fn new() -> Self {
        Self { kept: Mutex::new(Kept::default()), changed: watch::Sender::new(0) }
    }

    pub(super) fn begin(
        &self,
        method: String,
        path: String,
        headers: BTreeMap<String, String>,
    ) -> u64 {
        let fields: usize = headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        let octets = path.len() + fields;
        let mut kept = self.kept();
        kept.next += 1;
        kept.octets += octets;
        let number = kept.next;
        kept.records.push_back(Record {
            number,
            began: clock::wall().0,
            method,
            path,
            headers,
            body_size: 0,
            body: Value::Null,
            fault: None,
            status: None,
            end: "going on",
            took_ms: None,
            kept: octets,
        });
        while kept.records.len() > MAX_RECORDS
            || (kept.octets > MAX_OCTETS && kept.records.len() > 1)
        {
            let gone = kept.records.pop_front().map_or(0, |record| record.kept);
            kept.octets -= gone;
        }
        drop(kept);
        self.changed.send_modify(|changes| *changes += 1);
        number
    }

    pub(super) fn body(&self, number: u64, size: u64, body: Value) {
        let octets = body.to_string().len();
        let mut kept = self.kept();
        let Some(record) = find(&mut kept, number) else { return };
        record.body_size = size;
        record.body = body;
        record.kept += octets;
        kept.octets += octets;
    }

    pub(super) fn fault(&self, number: u64, fault: &str) {
        if let Some(record) = find(&mut self.kept(), number) {
            record.fault = Some(fault.to_owned());
        }
    }

    pub(super) fn end(&self, number: u64, end: &'static str, status: Option<u16>) {
        if let Some(record) = find(&mut self.kept(), number) {
            record.end = end;
            record.status = status;
            record.took_ms = Some(clock::wall().0.saturating_sub(record.began));
        }
        self.changed.send_modify(|changes| *changes += 1);
    }

    pub(super) fn all(&self) -> Vec<Record> {
        self.kept().records.iter().cloned().collect()
    }

    /// Forgets those that have ended.
    pub(super) fn clear(&self) {
        let mut kept = self.kept();
        kept.records.retain(|record| record.end == "going on");
        kept.octets = kept.records.iter().map(|record| record.kept).sum();
    }

    /// Changes whenever a request begins or ends.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn find(kept: &mut Kept, number: u64) -> Option<&mut Record> {
    kept.records.iter_mut().rev().find(|record| record.number == number)
}

/// A body as a record shows it.
pub(super) fn shown(body: &[u8], content_type: &str) -> Value {
    if content_type.starts_with("application/x-www-form-urlencoded") {
        let pairs = oauth2::url::form_urlencoded::parse(body);
        let pairs = pairs.map(|(name, value)| {
            let secret = matches!(&*name, "client_secret" | "client_assertion");
            let value = if secret { "(not shown)".into() } else { cut(&value) };
            (name.into_owned(), value.into())
        });
        return Value::Object(pairs.collect());
    }
    match serde_json::from_slice(body) {
        Ok(mut json) if content_type.starts_with("application/json") => {
            shorten(&mut json);
            json
        }
        _ if body.is_empty() => Value::Null,
        _ => {
            let start = body.get(..MAX_TEXT * 2).unwrap_or(body);
            Value::String(cut(&String::from_utf8_lossy(start)))
        }
    }
}

fn shorten(json: &mut Value) {
    match json {
        Value::String(text) if text.len() > MAX_TEXT => *text = cut(text),
        Value::Array(values) => values.iter_mut().for_each(shorten),
        Value::Object(map) => map.values_mut().for_each(shorten),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MAX_TEXT) {
        None => text.to_owned(),
        Some((end, _)) => {
            let start = text.get(..end).unwrap_or_default();
            format!("{start}… ({} octets in all)", text.len())
        }
    }
}
