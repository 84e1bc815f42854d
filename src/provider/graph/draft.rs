//! The way of a message that does not fit into one request: a draft, its files one by one, and then it is sent.
//!
//! Until the last step nothing has left, so whatever fails before is an ordinary deferral, and its draft is deleted.

use std::io;
use std::mem;
use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use reqwest::{Method, Url};
use serde::Deserialize;
use serde_json::Value;
use tokio::time::{sleep, timeout};
use tracing::debug;

use crate::message::outgoing::{Message, MessageReader};
use crate::outcome::{Outcome, Scope, unreadable};

use super::answer::{Step, Try};
use super::client::{Call, Content, Reply, Target, segment};
use super::delivery::{Delivery, Refusal, of_size, other_size};
use super::message::{Attachment, Draft, Octets};
use super::{MAX_REQUEST, is_posted};

/// Octets of a range: below 4 MB, and a multiple of 320 KiB, which does no harm.
const RANGE: u64 = 12 * 320 * 1024;
/// A draft that was just made may not be found at once.
const SHORTLY: [Duration; 3] =
    [Duration::from_millis(250), Duration::from_millis(500), Duration::from_secs(1)];
/// How often an upload that broke is gone on with.
const RESUMES: usize = 3;
/// How long the deletion of a draft may take.
const DELETION: Duration = Duration::from_secs(10);

impl Delivery<'_> {
    pub(super) async fn send_draft(&mut self, draft: &Draft) -> Result<Outcome, Refusal> {
        let body = Bytes::from(draft.message.clone());
        let made = self.call(Step::Create, Method::POST, "/messages", Content::Json, body).await?;
        let Some(Made { id }) = made.json() else {
            return Err(self.garbage(Step::Create, "a draft without an id"));
        };
        let path = format!("/messages/{}", segment(&id));
        self.draft = Some(path.clone());
        let sent = self.fill_and_send(draft, &path).await;
        if sent.as_ref().is_err_and(|refusal| !refusal.maybe_sent()) {
            self.discard(&path).await;
        }
        sent
    }

    async fn fill_and_send(&mut self, draft: &Draft, path: &str) -> Result<Outcome, Refusal> {
        let message = &self.submission.message;
        let mut source = Source::new(message);
        for file in &draft.attachments {
            self.attach(file, path, &mut source).await?;
        }
        self.outcomes.content_leaves().await;
        self.send_it(path).await
    }

    /// Sends a draft that is complete. What leaves has to be known to have left before.
    pub(super) async fn send_it(&mut self, path: &str) -> Result<Outcome, Refusal> {
        let path = format!("{path}/send");
        let reply = self.call(Step::Send, Method::POST, &path, Content::None, Bytes::new()).await?;
        Ok(self.taken(&reply))
    }

    /// Best effort: a draft that stays harms nobody.
    pub(super) async fn discard(&mut self, path: &str) {
        if timeout(DELETION, self.delete(path)).await.is_err() {
            debug!("graph: a draft could not be deleted in time");
        }
    }

    /// For good where that is known, for what is in Deleted Items is found again.
    async fn delete(&mut self, path: &str) {
        let for_good = format!("{path}/permanentDelete");
        for (method, path) in [(Method::POST, for_good.as_str()), (Method::DELETE, path)] {
            let answer = self.call(Step::Find, method, path, Content::None, Bytes::new()).await;
            let status = answer.map_or_else(|refusal| refusal.status, |_taken| Some(200));
            if matches!(status, Some(200..=299 | 404)) {
                return;
            }
        }
    }

    async fn attach(
        &mut self,
        file: &Attachment,
        path: &str,
        source: &mut Source<'_>,
    ) -> Result<(), Refusal> {
        let can_post = file.post().size <= MAX_REQUEST;
        let posts = is_posted(file);
        let first = match posts {
            true => self.post(file, path, source).await,
            false => self.upload(file, path, source).await,
        };
        match first {
            Err(Refusal { first: Some(Try::OtherWay), .. }) if posts => {
                self.upload(file, path, source).await
            }
            Err(Refusal { first: Some(Try::OtherWay), .. }) if can_post => {
                self.post(file, path, source).await
            }
            result => result,
        }
    }

    async fn post(
        &mut self,
        file: &Attachment,
        path: &str,
        source: &mut Source<'_>,
    ) -> Result<(), Refusal> {
        let json = file.post();
        let mut assembly = json.assembly();
        let mut at = file.range.start;
        while at < file.range.end
            && let Some(octets) = source.from(at).await.map_err(|error| unreadable(&error))?
        {
            assembly.push(at, &octets);
            at += octets.len() as u64;
        }
        let body = of_size(assembly.finish(), json.size)?;
        let path = format!("{path}/attachments");
        self.call_shortly(Step::Attach, &path, body).await?;
        Ok(())
    }

    /// A POST to a draft that may have been made a moment ago.
    async fn call_shortly(
        &mut self,
        step: Step,
        path: &str,
        body: Bytes,
    ) -> Result<Reply, Refusal> {
        let mut waits = SHORTLY.into_iter();
        loop {
            let reply = self.call(step, Method::POST, path, Content::Json, body.clone()).await;
            match (reply, waits.next()) {
                (
                    Err(Refusal { first: Some(Try::NewDraft), status: Some(404), .. }),
                    Some(wait),
                ) => {
                    sleep(wait).await;
                }
                (reply, _) => return reply,
            }
        }
    }

    async fn upload(
        &mut self,
        file: &Attachment,
        path: &str,
        source: &mut Source<'_>,
    ) -> Result<(), Refusal> {
        let path = format!("{path}/attachments/createUploadSession");
        let begun = self.call_shortly(Step::Session, &path, file.session().into()).await?;
        let begun: Option<Value> = begun.json();
        let url = begun.as_ref().and_then(|it| member(it, "uploadUrl")?.as_str());
        let Some(url) = url.filter(|url| may_be_asked(url, &self.graph.config.graph)) else {
            return Err(
                self.garbage(Step::Session, "an upload session without a URL that is https")
            );
        };
        let mut window = Window::new(file);
        let mut next = begun.as_ref().and_then(expected).unwrap_or(0);
        let mut resumes = 0;
        while next < file.size {
            let want = RANGE.min(file.size - next);
            let piece = window.take(source, next, want).await;
            let piece = piece.map_err(|error| unreadable(&error))?;
            if piece.len() as u64 != want {
                return Err(other_size().into());
            }
            let range = format!("bytes {next}-{}/{}", next + want - 1, file.size);
            let then = match self.upload_url(url, Method::PUT, Content::Range(range), piece).await {
                Ok(reply) => match progress(&reply, next + want) {
                    Progress::Complete => return Ok(()),
                    Progress::At(at) => at,
                    Progress::Unknown => self.next_of(url, next + want).await?,
                },
                Err(refusal) if is_interruption(&refusal) && resumes < RESUMES => {
                    sleep(SHORTLY.get(resumes).copied().unwrap_or_default()).await;
                    match self.next_of(url, next + want).await {
                        Ok(at) => at,
                        Err(_no_better) => return Err(begin_again(refusal)),
                    }
                }
                Err(refusal) => return Err(refusal),
            };
            if then <= next {
                resumes += 1;
                if resumes > RESUMES {
                    return Err(self.garbage(Step::Range, "an upload that does not go on"));
                }
            }
            next = then;
        }
        Err(self.garbage(Step::Range, "an upload that came to its end without 201 Created"))
    }

    /// Where a session that was sent all before `sent` says it is.
    async fn next_of(&self, url: &str, sent: u64) -> Result<u64, Refusal> {
        let reply = self.upload_url(url, Method::GET, Content::None, Bytes::new()).await?;
        match progress(&reply, sent) {
            Progress::At(at) => Ok(at),
            Progress::Complete | Progress::Unknown => {
                Err(self.garbage(Step::Range, "an upload session that does not say where it is"))
            }
        }
    }

    async fn upload_url(
        &self,
        url: &str,
        method: Method,
        content: Content,
        body: Bytes,
    ) -> Result<Reply, Refusal> {
        let target = Target::Upload(url);
        self.ask(Call { step: Step::Range, method, target, content, body }).await
    }
}

/// Whether an upload may be gone on with.
fn is_interruption(refusal: &Refusal) -> bool {
    match (&refusal.first, &refusal.outcome) {
        (Some(Try::OtherRange), _) => true,
        (None, Outcome::Deferred(cause)) => cause.scope == Scope::Message,
        _ => false,
    }
}

/// Of the session nothing is known any more.
fn begin_again(refusal: Refusal) -> Refusal {
    match refusal.first {
        Some(Try::OtherRange) => Refusal { first: Some(Try::NewDraft), ..refusal },
        _ => refusal,
    }
}

/// The URL of an upload session may be on any host, and is asked only where others cannot listen: in tests Graph is on
/// this machine, and so is it.
fn may_be_asked(url: &str, graph: &str) -> bool {
    let Ok(url) = Url::parse(url) else { return false };
    match url.scheme() {
        "https" => true,
        "http" => {
            let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
            let is_near = host == "localhost"
                || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
            is_near && graph.starts_with("http:")
        }
        _ => false,
    }
}

/// A member of an object, whatever the case of its name: Exchange answers in either.
fn member<'a>(json: &'a Value, name: &str) -> Option<&'a Value> {
    json.as_object()?.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, it)| it)
}

/// A draft as Graph made it.
#[derive(Deserialize)]
struct Made {
    id: String,
}

/// How far an upload has come.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    /// The attachment was created: all of it is there.
    Complete,
    At(u64),
    Unknown,
}

fn progress(reply: &Reply, sent: u64) -> Progress {
    match reply.answer.status {
        201 => Progress::Complete,
        _ => come_to(reply.json().as_ref(), sent),
    }
}

/// A session cannot expect what lies beyond all that it was sent.
fn come_to(session: Option<&Value>, sent: u64) -> Progress {
    match session.and_then(expected) {
        Some(at) if at <= sent => Progress::At(at),
        Some(_) | None => Progress::Unknown,
    }
}

/// Where the next range begins: of `["2097152-"]`, `["2097152"]` or `["0-99"]` the first number.
fn expected(session: &Value) -> Option<u64> {
    let first = member(session, "nextExpectedRanges")?.as_array()?.first()?.as_str()?;
    first.split('-').next()?.trim().parse().ok()
}

/// The message, read once as long as files follow each other in it.
struct Source<'a> {
    message: &'a Message,
    reader: MessageReader,
    /// Where `chunk` begins.
    at: u64,
    chunk: Bytes,
}

impl<'a> Source<'a> {
    fn new(message: &'a Message) -> Self {
        Self { message, reader: message.reader(), at: 0, chunk: Bytes::new() }
    }

    /// Octets from that position on, as many as are at hand; None at the end.
    async fn from(&mut self, position: u64) -> io::Result<Option<Bytes>> {
        if position < self.at {
            *self = Self::new(self.message);
        }
        loop {
            let skip = usize::try_from(position - self.at).unwrap_or(usize::MAX);
            if skip < self.chunk.len() {
                return Ok(Some(self.chunk.slice(skip..)));
            }
            self.at += self.chunk.len() as u64;
            self.chunk = match self.reader.chunk().await? {
                Some(chunk) => chunk,
                None => {
                    self.chunk = Bytes::new();
                    return Ok(None);
                }
            };
        }
    }
}

/// The octets of one file, decoded as far as they are wanted.
struct Window<'a> {
    file: &'a Attachment,
    /// None once the file has come to its end.
    octets: Option<Octets>,
    /// What of the message comes next.
    at: u64,
    /// Where `decoded` begins in the file.
    start: u64,
    decoded: Vec<u8>,
}

impl<'a> Window<'a> {
    fn new(file: &'a Attachment) -> Self {
        let octets = Some(file.octets());
        Self { file, octets, at: file.range.start, start: 0, decoded: Vec::new() }
    }

    /// `want` octets of the file from `from` on; fewer at its end.
    async fn take(&mut self, source: &mut Source<'_>, from: u64, want: u64) -> io::Result<Bytes> {
        let want = usize::try_from(want).unwrap_or(usize::MAX);
        if from < self.start {
            *self = Self::new(self.file);
        }
        loop {
            let before = usize::try_from(from - self.start).unwrap_or(usize::MAX);
            let before = before.min(self.decoded.len());
            self.decoded.drain(..before);
            self.start += before as u64;
            if self.octets.is_none() || (self.start == from && self.decoded.len() >= want) {
                break;
            }
            self.fill(source).await?;
        }
        let rest = self.decoded.split_off(want.min(self.decoded.len()));
        let taken = mem::replace(&mut self.decoded, rest);
        self.start += taken.len() as u64;
        Ok(taken.into())
    }

    async fn fill(&mut self, source: &mut Source<'_>) -> io::Result<()> {
        let more = match self.at < self.file.range.end {
            true => source.from(self.at).await?,
            false => None,
        };
        match (more, &mut self.octets) {
            (Some(bytes), Some(octets)) => {
                octets.push(self.at, &bytes, &mut self.decoded);
                self.at += bytes.len() as u64;
            }
            _ => {
                if let Some(octets) = self.octets.take() {
                    octets.finish(&mut self.decoded);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_expected_next_is_read_in_each_form() {
        let check = |json: &str, expected_at: Option<u64>| {
            let json: Value = serde_json::from_str(json).unwrap();
            assert_eq!(expected(&json), expected_at, "{json}");
        };
        check(r#"{"nextExpectedRanges":["0-"]}"#, Some(0));
        check(r#"{"nextExpectedRanges":["2097152"]}"#, Some(2_097_152));
        check(r#"{"NextExpectedRanges":["2097152-3483321"]}"#, Some(2_097_152));
        check(r#"{"nextExpectedRanges":[]}"#, None);
        check(r#"{"nextExpectedRanges":["x"]}"#, None);
        check(r#"{"nextExpectedRanges":[7]}"#, None);
        check(r#"{"nextExpectedRanges":"0-"}"#, None);
        check("[]", None);
        check("{}", None);
    }

    #[test]
    fn an_upload_is_where_it_says_and_never_beyond_what_was_sent() {
        let check = |json: &str, come: Progress| {
            let json: Value = serde_json::from_str(json).unwrap();
            assert_eq!(come_to(Some(&json), 100), come, "{json}");
        };
        check(r#"{"nextExpectedRanges":["100-"]}"#, Progress::At(100));
        check(r#"{"nextExpectedRanges":["0-"]}"#, Progress::At(0));
        check(r#"{"nextExpectedRanges":["101-"]}"#, Progress::Unknown);
        check(r#"{"nextExpectedRanges":[]}"#, Progress::Unknown);
        check("{}", Progress::Unknown);
        assert_eq!(come_to(None, 100), Progress::Unknown);
    }

    #[test]
    fn an_upload_goes_only_where_nobody_listens() {
        let graph = "https://graph.microsoft.com";
        assert!(may_be_asked("https://outlook.office.com/api/x?authtoken=y", graph));
        assert!(!may_be_asked("http://outlook.office.com/api/x", graph));
        assert!(!may_be_asked("http://127.0.0.1:80/x", graph));
        assert!(may_be_asked("http://127.0.0.1:80/x", "http://127.0.0.1:81"));
        assert!(may_be_asked("http://[::1]:80/x", "http://localhost:81"));
        assert!(!may_be_asked("http://127.0.0.1.example.com/x", "http://127.0.0.1:81"));
        assert!(!may_be_asked("http://example.com/x", "http://127.0.0.1:81"));
        assert!(!may_be_asked("file:///etc/passwd", "http://127.0.0.1:81"));
        assert!(!may_be_asked("", graph));
    }
}
