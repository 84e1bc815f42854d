//! One request to Graph: with an id of its own, a deadline for each wait, and the knowledge whether its body went out.

use std::convert::Infallible;
use std::fmt;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use reqwest::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER,
};
use reqwest::{Method, RequestBuilder, Response, Url};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::debug;
use uuid::{NoContext, Timestamp, Uuid};

use crate::clock;
use crate::provider::http;
use crate::provider::token::Token;
use crate::smtp::reply::Escaped;

use super::answer::{Answer, Fault, MAX_BODY, Step};

/// Octets of a body that are handed over at once.
const PIECE: usize = 64 * 1024;
/// The most that is read of an answer that shows the message as Graph made it.
const MAX_MADE: usize = 16 * 1024 * 1024;

/// Asks; it knows neither messages nor outcomes.
pub(super) struct Client {
    http: reqwest::Client,
    pub(super) timeouts: Timeouts,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Timeouts {
    pub(super) connect: Duration,
    /// For the answer to a step that sends nothing.
    pub(super) command: Duration,
    /// Between two pieces of a body.
    pub(super) data: Duration,
    /// For the answer to a step that sends.
    pub(super) end: Duration,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub(super) struct Call<'a> {
    pub(super) step: Step,
    pub(super) method: Method,
    pub(super) target: Target<'a>,
    pub(super) content: Content,
    pub(super) body: Bytes,
}

#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    /// A URL of Graph, with our token.
    Graph(&'a str, &'a Token),
    /// The URL of an upload session, which is a secret and gets no token.
    Upload(&'a str),
}

impl fmt::Debug for Target<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Graph(url, _) => f.write_str(url),
            Self::Upload(_) => f.write_str("(upload session)"),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) enum Content {
    None,
    Json,
    /// A message in base64.
    Mime,
    /// Part of a file: `bytes 0-99/1000`.
    Range(String),
}

/// What came back.
pub(super) struct Reply {
    pub(super) answer: Answer,
    pub(super) body: Vec<u8>,
    /// The body of the request had gone out to its end.
    pub(super) body_out: bool,
}

impl Reply {
    /// What of the JSON of a success is wanted.
    pub(super) fn json<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_slice(&self.body).ok()
    }
}

/// There is no answer.
pub(super) struct Unanswered {
    pub(super) fault: Fault,
    pub(super) body_out: bool,
}

impl Client {
    pub(super) fn new(http: reqwest::Client, timeouts: Timeouts) -> Self {
        Self { http, timeouts }
    }

    pub(super) async fn call(&self, call: Call<'_>) -> Result<Reply, Unanswered> {
        let Call { step, method, target, content, body } = call;
        let id = request_id();
        let octets = body.len();
        debug!("graph: {method} {target:?}, {octets} octets (client-request-id {id})");
        let out = Arc::new(Out::new(octets == 0));
        let request = self.request(&method, target, &content, body, &id, &out);
        let sent = self.send(request, &out, step).await;
        let response = match sent {
            Ok(response) => response,
            Err(fault) => {
                let fault = told_where(fault, target);
                debug!("graph: no answer to {id}: {fault:?}");
                return Err(Unanswered { fault, body_out: out.is_out() });
            }
        };
        let body_out = out.is_out();
        let read = self.read(response, step, target).await;
        match &read {
            Ok((answer, _)) => debug!("graph: {}", Escaped(answer.to_string().as_bytes())),
            Err(fault) => debug!("graph: half an answer to {id}: {fault:?}"),
        }
        match read {
            Ok((answer, body)) => Ok(Reply { answer, body, body_out }),
            Err(fault) => Err(Unanswered { fault, body_out }),
        }
    }

    fn request(
        &self,
        method: &Method,
        target: Target<'_>,
        content: &Content,
        body: Bytes,
        id: &str,
        out: &Arc<Out>,
    ) -> RequestBuilder {
        let mut request = match target {
            Target::Graph(url, token) => {
                let bearer = HeaderValue::from_str(&format!("Bearer {}", token.bearer()));
                let request = self.http.request(method.clone(), url);
                match bearer {
                    Ok(mut bearer) => {
                        bearer.set_sensitive(true);
                        request.header(AUTHORIZATION, bearer)
                    }
                    // Graph says what it thinks of a request without one.
                    Err(_unfit) => request,
                }
            }
            Target::Upload(url) => self.http.request(method.clone(), url),
        };
        request =
            request.header("client-request-id", id).header("return-client-request-id", "true");
        request = match content {
            Content::None => request,
            Content::Json => request.header(CONTENT_TYPE, "application/json"),
            Content::Mime => request.header(CONTENT_TYPE, "text/plain"),
            Content::Range(range) => request
                .header(CONTENT_TYPE, "application/octet-stream")
                .header(CONTENT_RANGE, range.as_str()),
        };
        match (body.is_empty(), *method == Method::GET || *method == Method::DELETE) {
            (true, true) => request,
            (true, false) => request.header(CONTENT_LENGTH, 0).body(Vec::new()),
            (false, _) => request
                .header(CONTENT_LENGTH, body.len())
                .body(reqwest::Body::wrap(Sending { left: body, out: Arc::clone(out) })),
        }
    }

    /// Sends, and waits for the head of the answer. Each wait has its deadline: the next piece of the body, and after
    /// the last the answer.
    async fn send(
        &self,
        request: RequestBuilder,
        out: &Out,
        step: Step,
    ) -> Result<Response, Fault> {
        let Timeouts { connect, command, data, end } = self.timeouts;
        let after = match step {
            Step::SendMail | Step::Send => end,
            Step::Create | Step::Attach | Step::Session | Step::Range | Step::Find => command,
        };
        let mut sent = pin!(request.send());
        loop {
            let (moved, wait) = match out.state() {
                State { moved, is_out: true, .. } => (moved, after),
                State { moved, begun: true, .. } => (moved, data),
                State { moved, .. } => (moved, connect + data),
            };
            // Dropping the notice or the sleep loses nothing, for the state is looked at again; dropping the request ends
            // it.
            tokio::select! {
                biased;
                response = &mut sent => return response.map_err(fault),
                () = out.changed.notified() => {}
                () = tokio::time::sleep_until((moved + wait).into()) => {
                    return Err(Fault::Silence(wait));
                }
            }
        }
    }

    /// The rest of an answer, bounded in size and time. What a refusal says beyond that is left alone.
    async fn read(
        &self,
        response: Response,
        step: Step,
        target: Target<'_>,
    ) -> Result<(Answer, Vec<u8>), Fault> {
        let status = response.status().as_u16();
        let (request_id, retry_after) = told(response.headers());
        let is_success = response.status().is_success();
        let body = match (is_success, step) {
            // All is said: nothing that a body could hold changes it.
            (true, Step::SendMail | Step::Send) => Vec::new(),
            (true, Step::Create | Step::Attach) => {
                let read = timeout(self.timeouts.data, http::body(response, MAX_MADE)).await;
                read.map_err(|_elapsed| Fault::Silence(self.timeouts.data))?.map_err(fault)?
            }
            (true, Step::Session | Step::Range | Step::Find) => {
                let read = timeout(self.timeouts.data, http::body(response, MAX_BODY)).await;
                read.map_err(|_elapsed| Fault::Silence(self.timeouts.data))?.map_err(fault)?
            }
            (false, _) => {
                let read = timeout(self.timeouts.data, http::body(response, MAX_BODY)).await;
                read.map(Result::unwrap_or_default).unwrap_or_default()
            }
        };
        let shown = if is_success { Vec::new() } else { masked(&body, target) };
        let answer = Answer::read(status, request_id.as_deref(), retry_after, &shown);
        Ok((answer, body))
    }
}

/// An upload has a host of its own: of the URL it alone is no secret.
fn told_where(fault: Fault, target: Target<'_>) -> Fault {
    let host = match target {
        Target::Graph(..) => None,
        Target::Upload(url) => {
            Url::parse(url).ok().and_then(|url| url.host_str().map(str::to_owned))
        }
    };
    match (fault, host) {
        (Fault::Unconnected(why), Some(host)) => Fault::Unconnected(format!("{host}: {why}")),
        (fault, _) => fault,
    }
}

/// Octets of the value of a query that is taken for a secret: shorter ones are words that may stand anywhere.
const SECRET: usize = 8;

/// The URL, and the values in its query as they stand and as they are meant.
fn secrets(url: &str) -> Vec<String> {
    let mut secrets = vec![url.to_owned()];
    if let Ok(url) = Url::parse(url) {
        let stands = url.query().unwrap_or_default().split('&');
        let stands = stands.filter_map(|pair| pair.split_once('=')).map(|it| it.1.to_owned());
        secrets.extend(stands.filter(|it| it.len() >= SECRET));
        let meant = url.query_pairs().map(|(_, value)| value.into_owned());
        secrets.extend(meant.filter(|it| it.len() >= SECRET));
    }
    secrets
}

/// What a remote repeats of our secrets goes no further.
fn masked(body: &[u8], target: Target<'_>) -> Vec<u8> {
    let secrets = match target {
        Target::Graph(_, token) => vec![token.bearer().to_owned()],
        Target::Upload(url) => secrets(url),
    };
    let mut text = String::from_utf8_lossy(body).into_owned();
    for secret in secrets.iter().filter(|secret| !secret.is_empty()) {
        text = text.replace(secret, "***");
    }
    text.into_bytes()
}

/// The id of the request at Graph, and the pause that it asks for.
fn told(headers: &HeaderMap) -> (Option<String>, Option<Duration>) {
    let text = |name: &str| headers.get(name).map(|it| String::from_utf8_lossy(it.as_bytes()));
    let request_id = text("request-id").map(|id| id.chars().take(100).collect());
    let wait = text(RETRY_AFTER.as_str());
    (request_id, wait.and_then(|wait| http::retry_after(&wait, clock::wall())))
}

fn fault(error: reqwest::Error) -> Fault {
    match error.is_connect() {
        true => Fault::Unconnected(http::words(error)),
        false => Fault::Broken(http::words(error)),
    }
}

/// Tells one request from another in Graph's records; it makes nothing idempotent.
fn request_id() -> String {
    let now = clock::wall().0;
    let nanos = u32::try_from(now % 1000).unwrap_or(0) * 1_000_000;
    Uuid::new_v7(Timestamp::from_unix(NoContext, now / 1000, nanos)).to_string()
}

/// One segment of a path.
pub(super) fn segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'@' => {
                out.push(char::from(byte));
            }
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// How far a body has gone. What was handed over is counted as gone: whether the network took it, nobody tells.
struct Out {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Clone, Copy)]
struct State {
    moved: Instant,
    begun: bool,
    is_out: bool,
}

impl Out {
    fn new(is_empty: bool) -> Self {
        let state = State { moved: clock::now(), begun: is_empty, is_out: is_empty };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> State {
        *self.lock()
    }

    fn is_out(&self) -> bool {
        self.state().is_out
    }

    fn moved(&self, is_out: bool) {
        *self.lock() = State { moved: clock::now(), begun: true, is_out };
        self.changed.notify_one();
    }
}

/// A body that is handed over piece by piece.
struct Sending {
    left: Bytes,
    out: Arc<Out>,
}

impl Body for Sending {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left.is_empty() {
            return Poll::Ready(None);
        }
        let most = PIECE.min(self.left.len());
        let piece = self.left.split_to(most);
        self.out.moved(self.left.is_empty());
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_shows_nothing_that_ends_a_path() {
        assert_eq!(segment("a.b-c_d~1@example.com"), "a.b-c_d~1@example.com");
        assert_eq!(segment("o'x_e.com#EXT#+1@t/?%"), "o%27x_e.com%23EXT%23%2B1@t%2F%3F%25");
        assert_eq!(segment("é"), "%C3%A9");
    }

    #[test]
    fn a_body_is_out_with_its_last_piece_and_not_before() {
        let out = Arc::new(Out::new(false));
        let left = Bytes::from(vec![b'x'; PIECE + 1]);
        let mut sending = Sending { left, out: Arc::clone(&out) };
        assert_eq!(sending.size_hint().exact(), Some(PIECE as u64 + 1));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut piece = || match Pin::new(&mut sending).poll_frame(&mut cx) {
            Poll::Ready(Some(Ok(frame))) => frame.into_data().unwrap().len(),
            Poll::Ready(_) | Poll::Pending => 0,
        };
        assert!(!out.is_out());
        assert_eq!((piece(), out.is_out()), (PIECE, false));
        assert_eq!((piece(), out.is_out()), (1, true));
        assert_eq!(piece(), 0);
        assert!(Out::new(true).is_out());
    }

    #[test]
    fn ids_differ() {
        assert_ne!(request_id(), request_id());
    }

    #[test]
    fn an_upload_url_is_not_shown() {
        assert_eq!(format!("{:?}", Target::Upload("https://x/y?authtoken=z")), "(upload session)");
        let body =
            masked(b"no https://x/y?authtoken=z here", Target::Upload("https://x/y?authtoken=z"));
        assert_eq!(body, b"no *** here");
        let url = "https://x/y?authtoken=eyJ0%2Bsecret&v=1";
        let body = masked(b"eyJ0%2Bsecret or eyJ0+secret: 1", Target::Upload(url));
        assert_eq!(body, b"*** or ***: 1");
    }

    #[test]
    fn an_upload_host_that_cannot_be_reached_is_named_and_no_more_of_its_url() {
        let fault = Fault::Unconnected("refused".to_owned());
        let told = told_where(fault, Target::Upload("https://up.example.com/y?authtoken=z"));
        assert_eq!(told, Fault::Unconnected("up.example.com: refused".to_owned()));
    }
}
