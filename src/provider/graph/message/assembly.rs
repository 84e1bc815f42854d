//! Bodies of requests, and files, made while the message passes.

use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::decode::Decoder;
use super::{Attachment, Json, Mime, Piece};

/// The octets of one file, decoded while the message passes.
#[derive(Debug)]
pub struct Octets {
    range: Range<u64>,
    decoder: Decoder,
}

impl Octets {
    pub(super) fn new(attachment: &Attachment) -> Self {
        Self { range: attachment.range.clone(), decoder: Decoder::new(attachment.encoding) }
    }

    /// Takes octets of the message, `at` being the position of their first, and appends to `out` what they hold of the
    /// file. Each octet of [`Attachment::range`] must come once and in order; others may.
    pub fn push(&mut self, at: u64, bytes: &[u8], out: &mut Vec<u8>) {
        self.decoder.push(within(at, bytes, &self.range), out);
    }

    /// The end of the file.
    pub fn finish(self, out: &mut Vec<u8>) {
        self.decoder.finish(out);
    }
}

/// Those of the octets from `at` on that lie in the range.
fn within<'a>(at: u64, bytes: &'a [u8], range: &Range<u64>) -> &'a [u8] {
    let position = |it: u64| usize::try_from(it.saturating_sub(at)).unwrap_or(usize::MAX);
    let (start, end) = (position(range.start), position(range.end).min(bytes.len()));
    bytes.get(start..end).unwrap_or_default()
}

/// Makes the body of a request while the message passes.
#[derive(Debug)]
pub struct Assembly<'a> {
    source: Source<'a>,
    out: Base64Writer,
}

#[derive(Debug)]
enum Source<'a> {
    /// The pieces that are not written yet, and the file that is being written.
    Json {
        pieces: std::slice::Iter<'a, Piece>,
        open: Option<Octets>,
        scratch: Vec<u8>,
    },
    Mime {
        used: u64,
        repair: Option<Repair>,
    },
}

impl<'a> Assembly<'a> {
    pub(super) fn of_json(json: &'a Json) -> Self {
        let source = Source::Json { pieces: json.pieces.iter(), open: None, scratch: Vec::new() };
        let mut assembly = Self { source, out: Base64Writer::new(json.size) };
        assembly.advance();
        assembly
    }

    pub(super) fn of_mime(mime: &'a Mime) -> Self {
        let mut out = Base64Writer::new(mime.size);
        out.push(&mime.head);
        let repair = mime.repairs.then(Repair::default);
        Self { source: Source::Mime { used: mime.used, repair }, out }
    }

    /// Takes octets of the message, `at` being the position of their first: each once and in order.
    pub fn push(&mut self, at: u64, bytes: &[u8]) {
        let end = at + bytes.len() as u64;
        loop {
            match &mut self.source {
                Source::Mime { used, repair } => {
                    let body = within(at, bytes, &(*used..end));
                    match repair {
                        Some(repair) => repair.push(body, &mut self.out),
                        None => self.out.push(body),
                    }
                    return;
                }
                Source::Json { open, scratch, .. } => {
                    let Some(octets) = open else { return };
                    octets.push(at, bytes, scratch);
                    self.out.push(scratch);
                    scratch.clear();
                    if octets.range.end > end {
                        return;
                    }
                }
            }
            // The next file may lie in these octets too.
            self.advance();
        }
    }

    /// Ends the file that is open, and writes up to the content of the next.
    fn advance(&mut self) {
        let Source::Json { pieces, open, scratch } = &mut self.source else { return };
        if let Some(octets) = open.take() {
            octets.finish(scratch);
            self.out.push(scratch);
            scratch.clear();
            self.out.close();
        }
        for piece in pieces.by_ref() {
            match piece {
                Piece::Text(text) => self.out.written.extend_from_slice(text.as_bytes()),
                Piece::Content(attachment) => {
                    *open = Some(Octets::new(attachment));
                    return;
                }
            }
        }
    }

    /// The body of the request, when all of the message was pushed. What was not is missing: the size tells.
    pub fn finish(mut self) -> Vec<u8> {
        loop {
            match &mut self.source {
                Source::Mime { repair, .. } => {
                    if let Some(repair) = repair.take() {
                        repair.finish(&mut self.out);
                    }
                    break;
                }
                Source::Json { open: None, .. } => break,
                Source::Json { open: Some(_), .. } => self.advance(),
            }
        }
        self.out.close();
        self.out.written
    }
}

/// Writes base64 without lines.
#[derive(Debug)]
struct Base64Writer {
    written: Vec<u8>,
    /// Octets of the group that is not full yet.
    rest: Vec<u8>,
}

impl Base64Writer {
    fn new(size: u64) -> Self {
        let size = usize::try_from(size).unwrap_or_default();
        Self { written: Vec::with_capacity(size), rest: Vec::with_capacity(3) }
    }

    fn push(&mut self, octets: &[u8]) {
        let mut octets = octets;
        if !self.rest.is_empty() {
            let missing = 3_usize.saturating_sub(self.rest.len()).min(octets.len());
            let (first, after) = octets.split_at_checked(missing).unwrap_or((octets, &[]));
            self.rest.extend_from_slice(first);
            octets = after;
            if self.rest.len() < 3 {
                return;
            }
            self.close();
        }
        let (groups, rest) = octets.split_at_checked(octets.len() / 3 * 3).unwrap_or((octets, &[]));
        self.encode(groups);
        self.rest.extend_from_slice(rest);
    }

    /// Pads what is left.
    fn close(&mut self) {
        let mut rest = std::mem::take(&mut self.rest);
        self.encode(&rest);
        rest.clear();
        self.rest = rest;
    }

    fn encode(&mut self, octets: &[u8]) {
        let start = self.written.len();
        self.written.resize(start + octets.len().div_ceil(3) * 4, 0);
        if let Some(room) = self.written.get_mut(start..) {
            let written = BASE64.encode_slice(octets, room).unwrap_or_default();
            self.written.truncate(start + written);
        }
    }
}

/// Makes a CRLF of each CR and LF that is none.
#[derive(Debug, Default)]
struct Repair {
    after_cr: bool,
}

impl Repair {
    fn push(&mut self, bytes: &[u8], out: &mut Base64Writer) {
        let mut repaired = Vec::with_capacity(bytes.len() + 64);
        for byte in bytes {
            match (self.after_cr, byte) {
                (true, b'\n') => {
                    repaired.push(b'\n');
                    self.after_cr = false;
                    continue;
                }
                (true, _) => repaired.push(b'\n'),
                (false, _) => {}
            }
            match byte {
                b'\n' => repaired.extend_from_slice(b"\r\n"),
                byte => repaired.push(*byte),
            }
            self.after_cr = *byte == b'\r';
        }
        out.push(&repaired);
    }

    fn finish(self, out: &mut Base64Writer) {
        if self.after_cr {
            out.push(b"\n");
        }
    }
}
