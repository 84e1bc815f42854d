//! Entry points for `benches/`: each does the work of one case and returns a figure that depends on all of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::clock;
use crate::envelope::{Client, Envelope, Kind, Priority, Rcpt, SpoolId, UnixMillis};
use crate::provider::graph::message::{Assembly, Attachment, Case, Format, Plan, Scan, convert};
use crate::smtp::address::{Charset, ForwardPath, Mailbox, ReversePath};
use crate::smtp::command;
use crate::smtp::data::{BareNewline, Content, Decoder, Framing};
use crate::smtp::params::Notify;
use crate::smtp::session::{Session, Settings, Step};

/// What a connection hands over at once.
const CHUNK: usize = 64 * 1024;

/// A session that waits for commands, and the time it believes in.
pub struct SmtpSession {
    session: Session,
    now: Instant,
}

impl SmtpSession {
    pub fn new() -> Self {
        let now = clock::now();
        let settings = Settings {
            hostname: "relay.test".to_owned(),
            max_size: u64::MAX,
            size_why: None,
            max_recipients: 1000,
            bare_newline: BareNewline::Normalize,
            errors: 10,
            command_timeout: Duration::from_secs(300),
            data_timeout: Duration::from_secs(600),
            min_data_rate: None,
        };
        Self { session: Session::new(Arc::new(settings), now), now }
    }

    /// One message by DATA, `content` being already dot-stuffed and ended; the octets that were handed out.
    pub fn message(&mut self, content: &[u8]) -> usize {
        let envelope: &[u8] =
            b"MAIL FROM:<reports@example.com>\r\nRCPT TO:<reader@example.com>\r\nDATA\r\n";
        let mut chunks = std::iter::once(envelope).chain(content.chunks(CHUNK));
        let mut octets = 0;
        loop {
            match self.session.next(self.now) {
                Step::Write(bytes) => octets += bytes.len(),
                Step::Body(bytes) => octets += bytes.len(),
                Step::Mail(_) | Step::Rcpt(_) | Step::Begin(_) => self.session.accept(),
                Step::Commit => self.session.stored("0198f3c2-7a5e-7000-8000-000000000000"),
                Step::NeedInput { .. } => match chunks.next() {
                    Some(chunk) => self.session.receive(chunk, self.now),
                    None => return octets,
                },
                Step::Refused(_) | Step::Abort | Step::Close => return octets,
            }
        }
    }
}

/// DATA's decoder over the whole of `raw`; the octets of content.
pub fn decode(raw: &[u8]) -> usize {
    let (mut decoder, mut scratch) = (Decoder::new(Framing::Dots), Vec::new());
    let mut octets = 0;
    for mut chunk in raw.chunks(CHUNK) {
        while !chunk.is_empty() {
            let decoded = decoder.decode(chunk, &mut scratch);
            octets += match decoded.content {
                Content::Input(range) => range.len(),
                Content::Scratch => scratch.len(),
            };
            chunk = chunk.get(decoded.used..).unwrap_or_default();
        }
    }
    octets
}

/// Whether the command line is in valid form.
pub fn parse_command(line: &[u8]) -> bool {
    command::parse(line, Charset::Ascii).is_ok()
}

/// The conversion of messages for Graph.
pub struct Graph {
    envelope: Envelope,
    mailbox: Mailbox,
}

impl Graph {
    /// None where an address is in no valid form.
    pub fn new() -> Option<Self> {
        let mailbox = |text| Mailbox::parse(text, Charset::Ascii).ok();
        let path = ForwardPath::Mailbox(mailbox("reader@example.com")?);
        let envelope = Envelope {
            id: SpoolId::from_u128(1),
            kind: Kind::Mail,
            accepted: UnixMillis(0),
            reverse_path: ReversePath::Null,
            rcpts: vec![Rcpt { path, notify: Notify::Unsaid, orcpt: None }],
            smtputf8: false,
            eight_bit: false,
            ret: None,
            envid: None,
            size: 0,
            client: Client { address: "unix".into(), helo: "app".into() },
            priority: Priority::Normal,
            author: None,
            prepend: Bytes::new(),
        };
        Some(Self { envelope, mailbox: mailbox("reports@example.com")? })
    }

    /// Reads the message and makes every request of it but the ones that are sent as they are; their octets.
    pub fn convert(&self, message: &[u8]) -> usize {
        let mut scan = Scan::new();
        message.chunks(CHUNK).for_each(|piece| scan.push(piece));
        let reverse_path = ReversePath::Mailbox(self.mailbox.clone());
        let case = Case {
            envelope: &self.envelope,
            reverse_path: &reverse_path,
            part: &[0],
            mailbox: &self.mailbox,
            from: None,
            save_to_sent_items: false,
            format: Format::Auto,
            may_draft: true,
            extras: true,
            max_request: 4_000_000,
        };
        match convert(&scan.finish(), &case) {
            Ok(Plan::Json(json)) => assemble(json.assembly(), message),
            Ok(Plan::Mime(mime)) => assemble(mime.assembly(), message),
            Ok(Plan::Draft(draft)) => {
                draft.attachments.iter().map(|file| upload(file, message)).sum()
            }
            Err(_) => 0,
        }
    }
}

fn pieces(message: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    message.chunks(CHUNK).scan(0, |at, piece| {
        let start = *at;
        *at += piece.len() as u64;
        Some((start, piece))
    })
}

fn assemble(mut assembly: Assembly<'_>, message: &[u8]) -> usize {
    pieces(message).for_each(|(at, piece)| assembly.push(at, piece));
    assembly.finish().len()
}

/// The octets of an upload, each piece by itself.
fn upload(file: &Attachment, message: &[u8]) -> usize {
    let (mut octets, mut out, mut count) = (file.octets(), Vec::new(), 0);
    for (at, piece) in pieces(message) {
        octets.push(at, piece, &mut out);
        count += out.len();
        out.clear();
    }
    octets.finish(&mut out);
    count + out.len()
}
