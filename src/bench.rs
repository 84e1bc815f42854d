//! Entry points for `benches/`: each does the work of one case and returns a figure that depends on all of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock;
use crate::smtp::address::Charset;
use crate::smtp::command;
use crate::smtp::data::{BareNewline, Content, Decoder, Framing};
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
