//! The sockets of the simulated service: requests in, answers out, and the ends that are no answer.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::shutdown::Shutdown;

use super::answer::{Answer, End, Refusal, guid};
use super::records;
use super::{Entered, Head, Octets, Service};

/// What is read of a body that is too large, so that its sender hears the answer.
const MAX_READ: u64 = 512 * 1024 * 1024;

pub(super) async fn listen(service: Arc<Service>, socket: TcpListener, shutdown: Shutdown) {
    // An accept that is dropped mid-way has taken no connection.
    while let Some(accepted) = shutdown.token.run_until_cancelled(socket.accept()).await {
        let Ok((stream, _)) = accepted else { continue };
        drop(stream.set_nodelay(true));
        let service = Arc::clone(&service);
        let token = shutdown.token.clone();
        shutdown.tasks.spawn(async move {
            let service = service_fn(|request| exchange(Arc::clone(&service), request));
            let served = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            // The end of a connection is part of the play.
            drop(token.run_until_cancelled(served).await);
        });
    }
}

/// The connection goes without an answer.
#[derive(Debug)]
struct Dropped;

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("dropped, as was asked for")
    }
}

impl std::error::Error for Dropped {}

/// Writes into the record how the request ended, also where its sender went away.
struct Recording {
    service: Arc<Service>,
    number: u64,
    end: &'static str,
    status: Option<u16>,
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.service.records.end(self.number, self.end, self.status);
    }
}

async fn exchange(
    service: Arc<Service>,
    request: Request<Incoming>,
) -> Result<Response<Content>, Dropped> {
    let (parts, mut body) = request.into_parts();
    let head = head(&parts);
    let mut headers = head.headers.clone();
    if let Some(value) = headers.get_mut("authorization") {
        *value = service.shown_authorization(value);
    }
    let path = parts.uri.path_and_query().map_or_else(String::new, ToString::to_string);
    let number = service.records.begin(head.method.clone(), without_secret(&path), headers);
    let mut recording =
        Recording { service: Arc::clone(&service), number, end: "dropped", status: None };
    let request_id = guid();
    // Until it has been answered, a request is at work.
    let (end, _at_work) = play(&service, &head, &mut body, number, &request_id).await;
    let (answer, kind) = match end {
        End::Answer(answer) => (answer, Kind::Whole),
        End::Endless(answer) => (answer, Kind::Endless),
        End::Truncated(answer) => (answer, Kind::Truncated),
        End::Drop => return Err(Dropped),
        End::Hang => {
            recording.end = "hung";
            // Until the other side, or the service, ends.
            std::future::pending::<Infallible>().await;
            return Err(Dropped);
        }
    };
    recording.end = "answered";
    recording.status = Some(answer.status);
    respond(answer, kind, &request_id, head.header("client-request-id")).ok_or(Dropped)
}

async fn play(
    service: &Arc<Service>,
    head: &Head,
    body: &mut Incoming,
    number: u64,
    request_id: &str,
) -> (End, Option<Entered>) {
    let fault = service.faults.take(&head.method, &head.path);
    if let Some(fault) = &fault {
        service.records.fault(number, "by request");
        if !fault.acts && !fault.only_delays() {
            if read(body, 0, fault.read.unwrap_or(MAX_READ)).await.is_err() {
                return (End::Drop, None);
            }
            tokio::time::sleep(Duration::from_millis(fault.delay_ms)).await;
            return (fault.end(request_id), None);
        }
    }
    let entered = service.enter(head);
    let most = service.settings().request_size;
    let Ok(octets) = read(body, most, MAX_READ).await else { return (End::Drop, None) };
    let content_type = head.content_type();
    service.records.body(number, octets.size, records::shown(&octets.kept, &content_type));
    let done = match &entered {
        None => service.act_elsewhere(head, &octets),
        Some(Ok(entered)) => entered.act(head, &octets),
        Some(Err(refusal)) => Err(refusal.clone()),
    };
    let outcome = match done {
        Ok(outcome) => outcome,
        Err(refusal) => refused(&refusal, request_id, head).into(),
    };
    if let Some(words) = outcome.fault {
        service.records.fault(number, words);
    }
    tokio::time::sleep(outcome.delay).await;
    let mut end = outcome.end;
    if let Some(fault) = fault {
        tokio::time::sleep(Duration::from_millis(fault.delay_ms)).await;
        if !fault.only_delays() {
            end = fault.end(request_id);
        }
    }
    (end, entered.and_then(Result::ok))
}

fn refused(refusal: &Refusal, request_id: &str, head: &Head) -> Answer {
    refusal.answer(request_id, head.header("client-request-id"))
}

fn head(parts: &hyper::http::request::Parts) -> Head {
    let mut headers = BTreeMap::new();
    for (name, value) in &parts.headers {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        headers.insert(name.as_str().to_owned(), value);
    }
    let path = parts.uri.path();
    Head {
        method: parts.method.as_str().to_owned(),
        segments: path.split('/').skip(1).map(decode).collect(),
        path: path.to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        headers,
    }
}

/// Takes the percent-encoding from a segment of a path (RFC 3986 2.1).
fn decode(segment: &str) -> String {
    let mut octets = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..2).and_then(|it| std::str::from_utf8(it).ok());
        let encoded = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match encoded {
            Some(octet) if *first == b'%' => {
                octets.push(octet);
                rest = after.get(2..).unwrap_or_default();
            }
            _ => {
                octets.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&octets).into_owned()
}

/// Whoever has an upload URL may write to it.
fn without_secret(path: &str) -> String {
    match path.split_once("authtoken=") {
        Some((before, _)) => format!("{before}authtoken=(not shown)"),
        None => path.to_owned(),
    }
}

/// Keeps `most` octets and one more, counts the rest, and stops after `end`.
async fn read(body: &mut Incoming, most: usize, end: u64) -> Result<Octets, hyper::Error> {
    let mut octets = Octets::default();
    while octets.size < end {
        let Some(frame) = body.frame().await else { break };
        let Ok(data) = frame?.into_data() else { continue };
        octets.size += data.len() as u64;
        let room = most.saturating_sub(octets.kept.len()).min(data.len());
        octets.kept.extend_from_slice(data.get(..room).unwrap_or_default());
    }
    Ok(octets)
}

fn respond(
    answer: Answer,
    kind: Kind,
    request_id: &str,
    client_request_id: Option<&str>,
) -> Option<Response<Content>> {
    let mut response = Response::builder().status(answer.status).header("request-id", request_id);
    if let Some(id) = client_request_id {
        response = response.header("client-request-id", id);
    }
    let own_length = answer.headers.iter().any(|(name, _)| name == "content-length");
    for (name, value) in &answer.headers {
        response = response.header(name.as_ref(), value);
    }
    response = match kind {
        Kind::Whole if !own_length => response.header("content-length", answer.body.len()),
        // More is promised than comes.
        Kind::Truncated if !own_length => {
            response.header("content-length", answer.body.len() + 100)
        }
        _ => response,
    };
    response.body(Content { kind, first: Some(answer.body), waited: false }).ok()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Whole,
    Endless,
    Truncated,
}

/// The body of an answer.
struct Content {
    kind: Kind,
    first: Option<Bytes>,
    waited: bool,
}

impl Body for Content {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        const MORE: &[u8] = &[b' '; 16 * 1024];
        let first = self.first.take().filter(|first| !first.is_empty());
        if first.is_none() && self.kind == Kind::Truncated && !self.waited {
            // What there is goes out before the connection is dropped.
            self.waited = true;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(match (first, self.kind) {
            (Some(first), _) => Some(Ok(Frame::data(first))),
            (None, Kind::Whole) => None,
            (None, Kind::Endless) => Some(Ok(Frame::data(Bytes::from_static(MORE)))),
            (None, Kind::Truncated) => Some(Err(io::Error::other("truncated, as was asked for"))),
        })
    }
}
