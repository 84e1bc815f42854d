//! A message while it passes: its header, where each of its parts lies, and the texts that may become the body.
//!
//! A parser of whole messages will not do here: it would want all of a large one in memory, and what hostile ones do
//! to such parsers (parts in parts without end, boundaries that never come) is that each octet is looked at many times.
//! Here each is looked at once: lines are told apart by what they begin with, and a line that begins with two hyphens is
//! compared with the boundaries that are open, at most [`MAX_DEPTH`]. A message within the message is not opened.

use std::ops::Range;

use super::decode::{Counter, Decoder, Encoding};
use super::field::{self, Parameters, unfold};
use super::{MAX_MIME, MAX_TEXT};

/// Multiparts within each other; what lies deeper becomes a file as it is.
const MAX_DEPTH: usize = 32;
/// Parts of a message. One with more is not sent.
const MAX_PARTS: usize = 10_000;
/// Octets of the message's header that are kept.
const MAX_HEADER: usize = 1024 * 1024;
/// Octets of the header of a part that are kept.
const MAX_PART_HEADER: usize = 64 * 1024;
/// Octets of a field's name (RFC 5322 2.1.1); a longer line without a colon is none.
const MAX_NAME: usize = 998;
/// Octets of Content-ID and of Content-Location; a longer one is none.
const MAX_ID: usize = 1024;
/// Octets of a line with a boundary. RFC 2046 5.1.1 has 70 for the boundary.
const MAX_BOUNDARY_LINE: usize = 1024;

/// Reads a message as it leaves, in pieces of any size.
#[derive(Debug)]
pub struct Scan {
    state: State,
    /// Octets taken; those in `line` are among them.
    at: u64,
    /// The start of a line of which it is not known yet what it is.
    line: Vec<u8>,
    /// The header that is being read, as far as it is kept.
    header: Vec<u8>,
    /// The multiparts that are open, outermost first.
    open: Vec<Open>,
    /// In the order in which they begin; the last one is being read.
    nodes: Vec<Node>,
    /// What takes the content; None where nobody does.
    sink: Option<Sink>,
    /// The end of a line that belongs to the content, unless a boundary follows.
    held: Held,
    /// Octets of text in `nodes` and `sink`.
    text: usize,
    /// The header of the message.
    top: Vec<u8>,
    has_all_of_top: bool,
    has_all_parts: bool,
    /// CRs and LFs, and those that are a CRLF, in a message that may be sent as MIME.
    ends: u64,
    pairs: u64,
    last: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// At the start of a line of a header, or within one.
    Header,
    /// Within a line of the header that is not kept.
    LongField,
    /// At the start of a line of content.
    LineStart,
    /// Within a line of content.
    Content,
}

/// A multipart that is open.
#[derive(Debug)]
struct Open {
    node: usize,
    boundary: Vec<u8>,
}

/// The end of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Nothing,
    Cr,
    Lf,
    CrLf,
}

impl Held {
    fn octets(self) -> &'static [u8] {
        match self {
            Self::Nothing => b"",
            Self::Cr => b"\r",
            Self::Lf => b"\n",
            Self::CrLf => b"\r\n",
        }
    }
}

/// Takes the content of one part.
#[derive(Debug)]
enum Sink {
    Count(Counter),
    /// A text that may become the body.
    Keep(Decoder, Vec<u8>),
    /// A multipart that is not opened.
    Seal,
}

/// A message that was read.
#[derive(Debug)]
pub struct Scanned {
    /// The first is the message itself. Those within a multipart follow it.
    pub(super) nodes: Vec<Node>,
    /// The header of the message, from its first octet.
    pub(super) header: Vec<u8>,
    /// Whether that is all of it.
    pub(super) has_all_of_header: bool,
    /// Whether [`MAX_PARTS`] were enough.
    pub(super) has_all_parts: bool,
    pub(super) size: u64,
    /// CRs and LFs that are not CRLF; only for a message of at most [`MAX_MIME`].
    pub(super) bare: u64,
}

impl Scanned {
    /// The message, in octets.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// A part of the message.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) entity: Entity,
    /// Where its header begins.
    pub(super) start: u64,
    /// Without the end of line that belongs to the boundary.
    pub(super) body: Range<u64>,
    pub(super) kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// With the positions of its parts.
    Multipart(Vec<usize>),
    /// A multipart that was not opened.
    Sealed,
    /// A content of so many octets, decoded.
    Leaf(u64),
    /// One that may be the body, decoded.
    Text(Vec<u8>),
}

/// What the header of a part says about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entity {
    /// Content-Type; none where there is none, or none that can be read.
    pub(super) kind: Option<Parameters>,
    /// Content-Disposition.
    pub(super) disposition: Option<Parameters>,
    pub(super) encoding: Encoding,
    /// The encoding is none that we know: the content is passed on as it is.
    pub(super) is_encoding_unknown: bool,
    /// Content-ID without its brackets.
    pub(super) id: Option<String>,
    /// Content-Location.
    pub(super) location: Option<String>,
}

impl Entity {
    fn read(header: &[u8]) -> Self {
        let mut entity = Self::default();
        let mut encoding: Option<String> = None;
        for field in field::fields(header) {
            if !field.name.get(..8).is_some_and(|it| it.eq_ignore_ascii_case(b"content-")) {
                continue;
            }
            let is_short = field.value.len() <= MAX_ID;
            if field.is("content-type") && entity.kind.is_none() {
                let read = Parameters::read(field.value);
                entity.kind = read.value.contains('/').then_some(read);
            } else if field.is("content-disposition") && entity.disposition.is_none() {
                entity.disposition = Some(Parameters::read(field.value));
            } else if field.is("content-transfer-encoding") && encoding.is_none() {
                encoding = Some(Parameters::read(field.value).value);
            } else if field.is("content-id") && is_short && entity.id.is_none() {
                entity.id = bare_id(field.value);
            } else if field.is("content-location") && is_short && entity.location.is_none() {
                let location: String =
                    field.text().chars().filter(|c| !c.is_whitespace()).collect();
                entity.location = Some(location).filter(|it| !it.is_empty());
            }
        }
        (entity.encoding, entity.is_encoding_unknown) = match encoding.as_deref() {
            Some("base64") => (Encoding::Base64, false),
            Some("quoted-printable") => (Encoding::QuotedPrintable, false),
            None | Some("7bit" | "8bit" | "binary" | "") => (Encoding::Identity, false),
            Some(_) => (Encoding::Identity, true),
        };
        entity
    }

    /// `type/subtype` in lower case.
    pub(super) fn media_type(&self) -> &str {
        self.kind.as_ref().map_or("text/plain", |kind| &kind.value)
    }

    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.kind.as_ref().and_then(|kind| kind.get(name))
    }

    /// The name of a file, as its sender gave it.
    pub(super) fn name(&self) -> Option<&str> {
        let named = self.disposition.as_ref().and_then(|it| it.get("filename"));
        named.or_else(|| self.parameter("name")).filter(|name| !name.trim().is_empty())
    }

    pub(super) fn is_attachment(&self) -> bool {
        self.disposition.as_ref().is_some_and(|it| !matches!(it.value.as_str(), "" | "inline"))
    }

    pub(super) fn is_multipart(&self) -> bool {
        self.media_type().starts_with("multipart/")
    }

    /// Whether it may become the body, or a piece of it.
    pub(super) fn is_text(&self) -> bool {
        matches!(self.media_type(), "text/plain" | "text/html")
    }
}

/// What stands between the brackets, or all of it.
fn bare_id(value: &[u8]) -> Option<String> {
    let value = unfold(value);
    let value = String::from_utf8_lossy(&value);
    let inner = value.split_once('<').map_or(&*value, |(_, inner)| inner);
    let inner = inner.split_once('>').map_or(inner, |(inner, _)| inner).trim();
    let is_plain = !inner.is_empty() && !inner.chars().any(char::is_control);
    is_plain.then(|| inner.to_owned())
}

impl Scan {
    pub fn new() -> Self {
        let root = Node { entity: Entity::default(), start: 0, body: 0..0, kind: Kind::Leaf(0) };
        Self {
            state: State::Header,
            at: 0,
            line: Vec::new(),
            header: Vec::new(),
            open: Vec::new(),
            nodes: vec![root],
            sink: None,
            held: Held::Nothing,
            text: 0,
            top: Vec::new(),
            has_all_of_top: true,
            has_all_parts: true,
            ends: 0,
            pairs: 0,
            last: 0,
        }
    }

    /// Takes the next octets of the message.
    pub fn push(&mut self, bytes: &[u8]) {
        self.count_ends(bytes);
        let mut rest = bytes;
        while !rest.is_empty() && self.has_all_parts {
            let used = match self.state {
                State::Header | State::LineStart => self.line_start(rest),
                State::LongField => self.long_field(rest),
                State::Content => self.content(rest),
            };
            rest = rest.get(used..).unwrap_or_default();
        }
        self.at += rest.len() as u64;
    }

    /// The message has ended.
    pub fn finish(mut self) -> Scanned {
        if self.has_all_parts {
            let line = std::mem::take(&mut self.line);
            match self.state {
                State::Header if !line.is_empty() => self.header_line(line),
                State::Header | State::LongField => {}
                State::LineStart | State::Content => {
                    if !self.delimiter(&line) {
                        self.take(&line);
                    }
                }
            }
        }
        match self.state {
            State::Header | State::LongField => self.end_header(self.at),
            State::LineStart | State::Content => {}
        }
        self.take_held();
        self.close(self.at);
        while let Some(open) = self.open.pop() {
            self.end_multipart(open.node, self.at);
        }
        Scanned {
            nodes: self.nodes,
            header: self.top,
            has_all_of_header: self.has_all_of_top,
            has_all_parts: self.has_all_parts,
            size: self.at,
            bare: self.ends.saturating_sub(2 * self.pairs),
        }
    }

    fn count_ends(&mut self, bytes: &[u8]) {
        let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return };
        if self.at > MAX_MIME {
            return;
        }
        self.pairs += u64::from(self.last == b'\r' && *first == b'\n');
        self.pairs += memchr::memmem::find_iter(bytes, b"\r\n").count() as u64;
        self.ends += memchr::memchr2_iter(b'\r', b'\n', bytes).count() as u64;
        self.last = *last;
    }

    /// The rest of a line of which `line` is the start; returns how much of it was used.
    fn line_start(&mut self, rest: &[u8]) -> usize {
        if self.state == State::LineStart && !begins_like_delimiter(&self.line, rest) {
            self.state = State::Content;
            let line = std::mem::take(&mut self.line);
            self.take(&line);
            return 0;
        }
        let length = memchr::memchr(b'\n', rest).map_or(rest.len(), |at| at + 1);
        // A line that is too long is passed on before it is held.
        let limit = match self.state {
            State::Header => MAX_HEADER.saturating_sub(self.line.len()),
            _ => MAX_BOUNDARY_LINE.saturating_sub(self.line.len()),
        };
        let length = length.min(limit.max(1));
        let piece = rest.get(..length).unwrap_or_default();
        self.line.extend_from_slice(piece);
        self.at += piece.len() as u64;
        let is_whole = self.line.ends_with(b"\n");
        match self.state {
            State::Header if is_whole => {
                let line = std::mem::take(&mut self.line);
                self.header_line(line);
            }
            State::Header if self.line.len() > MAX_NAME && self.is_content(&self.line) => {
                let line = std::mem::take(&mut self.line);
                self.header_line(line);
            }
            State::Header if self.line.len() >= MAX_HEADER => {
                let line = std::mem::take(&mut self.line);
                self.keep(&line);
                self.state = State::LongField;
            }
            State::Header => {}
            _ if is_whole || self.line.len() >= MAX_BOUNDARY_LINE => {
                let line = std::mem::take(&mut self.line);
                if !(is_whole && self.delimiter(&line)) {
                    self.take(&line);
                    self.state = if is_whole { State::LineStart } else { State::Content };
                }
            }
            _ => {}
        }
        length
    }

    /// A line of a header, whole or the last one, or one that is so long that it can be none.
    fn header_line(&mut self, line: Vec<u8>) {
        let is_whole = line.ends_with(b"\n");
        let start = self.at - line.len() as u64;
        if line == b"\r\n" || line == b"\n" {
            self.keep(&line);
            self.end_header(self.at);
            self.state = State::LineStart;
            return;
        }
        if line.starts_with(b"--") && self.delimiter_in_header(&line, start) {
            return;
        }
        if !self.is_content(&line) {
            self.keep(&line);
            self.state = if is_whole { State::Header } else { State::LongField };
            return;
        }
        // The body begins without an empty line before it.
        self.end_header(start);
        self.take(&line);
        self.state = if is_whole { State::LineStart } else { State::Content };
    }

    /// Whether a line that begins so can be none of the header.
    fn is_content(&self, line: &[u8]) -> bool {
        let is_first = self.header.is_empty();
        let continues = matches!(line.first(), Some(b' ' | b'\t')) && !is_first;
        let separates = is_first && self.nodes.len() == 1 && is_separator(line);
        !continues && !separates && is_no_field(line)
    }

    fn keep(&mut self, line: &[u8]) {
        let max = if self.nodes.len() == 1 { MAX_HEADER } else { MAX_PART_HEADER };
        if self.header.len() + line.len() <= max {
            self.header.extend_from_slice(line);
        } else if self.nodes.len() == 1 {
            self.has_all_of_top = false;
        }
    }

    fn long_field(&mut self, rest: &[u8]) -> usize {
        let end = memchr::memchr(b'\n', rest);
        if self.nodes.len() == 1 {
            self.has_all_of_top = false;
        }
        if end.is_some() {
            self.state = State::Header;
        }
        let used = end.map_or(rest.len(), |at| at + 1);
        self.at += used as u64;
        used
    }

    /// The header of the last node has ended; its body begins at `at`.
    fn end_header(&mut self, at: u64) {
        let header = std::mem::take(&mut self.header);
        let entity = Entity::read(&header);
        let is_top = self.nodes.len() == 1;
        if is_top {
            self.top = header;
        } else {
            self.header = header;
            self.header.clear();
        }
        let is_in_digest = self.open.last().is_some_and(|open| {
            let parent = self.nodes.get(open.node);
            parent.is_some_and(|it| it.entity.media_type() == "multipart/digest")
        });
        let Some(node) = self.nodes.last_mut() else { return };
        node.body = at..at;
        node.entity = entity;
        // RFC 2046 5.1.5.
        if is_in_digest && node.entity.kind.is_none() {
            node.entity.kind = Some(Parameters::read(b"message/rfc822"));
        }
        let entity = &node.entity;
        if entity.is_multipart() {
            let boundary = entity.parameter("boundary").unwrap_or_default();
            let boundary = boundary.as_bytes().to_vec();
            let is_usable = (1..=MAX_BOUNDARY_LINE / 2).contains(&boundary.len());
            if is_usable && self.open.len() >= MAX_DEPTH {
                self.sink = Some(Sink::Seal);
                return;
            }
            if is_usable {
                let node = self.nodes.len() - 1;
                self.open.push(Open { node, boundary });
            }
            // Until a boundary comes it is a text, for there may be none.
            self.sink = Some(Sink::Keep(Decoder::new(Encoding::Identity), Vec::new()));
            return;
        }
        let (may_be_body, encoding) =
            (entity.is_text() && !entity.is_attachment(), entity.encoding);
        self.sink = Some(match may_be_body && self.text < MAX_TEXT {
            true => Sink::Keep(Decoder::new(encoding), Vec::new()),
            false => Sink::Count(Counter::new(encoding)),
        });
    }

    /// Content up to the next line that begins with two hyphens.
    fn content(&mut self, rest: &[u8]) -> usize {
        let length = match memchr::memmem::find(rest, b"\n--") {
            Some(at) => at + 1,
            // What comes next may make it one.
            None if rest.ends_with(b"\n-") => rest.len() - 1,
            None => rest.len(),
        };
        let piece = rest.get(..length).unwrap_or_default();
        self.at += piece.len() as u64;
        self.take(piece);
        if piece.ends_with(b"\n") {
            self.state = State::LineStart;
        }
        length
    }

    /// Passes content on, but for the end of its last line.
    fn take(&mut self, content: &[u8]) {
        let mut content = content;
        if content.is_empty() {
            return;
        }
        if self.held == Held::Cr
            && let Some(after) = content.strip_prefix(b"\n")
        {
            self.held = Held::CrLf;
            content = after;
            if content.is_empty() {
                return;
            }
        }
        self.take_held();
        let (text, held) = match content {
            [text @ .., b'\r', b'\n'] => (text, Held::CrLf),
            [text @ .., b'\n'] => (text, Held::Lf),
            [text @ .., b'\r'] => (text, Held::Cr),
            text => (text, Held::Nothing),
        };
        self.held = held;
        self.pass(text);
    }

    fn take_held(&mut self) {
        let held = std::mem::replace(&mut self.held, Held::Nothing);
        self.pass(held.octets());
    }

    fn pass(&mut self, content: &[u8]) {
        match &mut self.sink {
            None | Some(Sink::Seal) => {}
            Some(Sink::Count(counter)) => counter.push(content),
            Some(Sink::Keep(decoder, text)) => {
                let before = text.len();
                decoder.push(content, text);
                self.text += text.len() - before;
                if self.text <= MAX_TEXT {
                    return;
                }
                // Too much to be a body: what was kept of it is let go.
                self.text -= text.len();
                let decoder = std::mem::replace(decoder, Decoder::new(Encoding::Identity));
                self.sink = Some(Sink::Count(Counter::going_on(decoder, text.len())));
            }
        }
    }

    /// Whether the line is a boundary; then what it ends has ended.
    fn delimiter(&mut self, line: &[u8]) -> bool {
        let start = self.at - line.len() as u64 - self.held.octets().len() as u64;
        self.delimiter_at(line, start)
    }

    fn delimiter_in_header(&mut self, line: &[u8], start: u64) -> bool {
        if self.matching(line).is_none() {
            return false;
        }
        self.end_header(start);
        self.delimiter_at(line, start)
    }

    fn delimiter_at(&mut self, line: &[u8], end: u64) -> bool {
        let Some((level, closes)) = self.matching(line) else { return false };
        let outer = self.open.get(level).map(|open| open.node);
        let is_first = outer == Some(self.nodes.len() - 1);
        // A multipart that ends before its first part is what stands there.
        if is_first && closes && self.has_text() {
            return false;
        }
        self.held = Held::Nothing;
        // The text before the first boundary is none.
        if is_first {
            self.forget();
        } else {
            self.close(end);
        }
        for open in self.open.split_off(level + 1).into_iter().rev() {
            self.end_multipart(open.node, end);
        }
        if let Some(Node { kind: kind @ Kind::Leaf(_), .. }) =
            outer.and_then(|it| self.nodes.get_mut(it))
        {
            *kind = Kind::Multipart(Vec::new());
        }
        self.sink = None;
        if closes {
            // What follows is no content, unless a mailer closed too early and another part comes.
            self.state = State::LineStart;
            return true;
        }
        if self.nodes.len() >= MAX_PARTS {
            self.has_all_parts = false;
            return true;
        }
        let node = self.nodes.len();
        if let Some(Node { kind: Kind::Multipart(parts), .. }) =
            outer.and_then(|it| self.nodes.get_mut(it))
        {
            parts.push(node);
        }
        let start = self.at;
        self.nodes.push(Node {
            entity: Entity::default(),
            start,
            body: start..start,
            kind: Kind::Leaf(0),
        });
        self.header.clear();
        self.state = State::Header;
        true
    }

    /// Which of the open boundaries it is, the innermost first, and whether it closes.
    fn matching(&self, line: &[u8]) -> Option<(usize, bool)> {
        let line = line.trim_ascii_end();
        let rest = line.strip_prefix(b"--")?;
        let is = |boundary: &[u8]| {
            let boundary = boundary.trim_ascii_end();
            match rest.strip_prefix(boundary) {
                Some(b"") => Some(false),
                Some(b"--") => Some(true),
                _ => None,
            }
        };
        let levels = self.open.iter().enumerate().rev();
        levels.filter_map(|(level, open)| is(&open.boundary).map(|closes| (level, closes))).next()
    }

    fn has_text(&self) -> bool {
        match &self.sink {
            Some(Sink::Keep(_, text)) => !text.trim_ascii().is_empty(),
            Some(Sink::Count(_) | Sink::Seal) => true,
            None => false,
        }
    }

    fn forget(&mut self) {
        if let Some(Sink::Keep(_, text)) = self.sink.take() {
            self.text -= text.len();
        }
    }

    /// The content of the last node has ended.
    fn close(&mut self, end: u64) {
        let Some(sink) = self.sink.take() else { return };
        let Some(node) = self.nodes.last_mut() else { return };
        node.body.end = end.max(node.body.start);
        node.kind = match sink {
            Sink::Seal => Kind::Sealed,
            Sink::Count(counter) => Kind::Leaf(counter.finish()),
            Sink::Keep(decoder, mut text) => {
                let before = text.len();
                decoder.finish(&mut text);
                self.text += text.len() - before;
                Kind::Text(text)
            }
        };
    }

    fn end_multipart(&mut self, node: usize, end: u64) {
        if let Some(node @ Node { kind: Kind::Multipart(_), .. }) = self.nodes.get_mut(node) {
            node.body.end = end.max(node.body.start);
        }
    }
}

/// Whether a line of content that begins with `line` and goes on with `rest` may be a boundary.
fn begins_like_delimiter(line: &[u8], rest: &[u8]) -> bool {
    let mut octets = line.iter().chain(rest).take(2);
    octets.all(|byte| *byte == b'-')
}

/// Whether the line, or what there is of it, has no name before a colon.
fn is_no_field(line: &[u8]) -> bool {
    let start = line.get(..=MAX_NAME).unwrap_or(line);
    let Some(colon) = memchr::memchr(b':', start) else { return true };
    let name = start.get(..colon).unwrap_or_default();
    let name = name.trim_ascii_end();
    name.is_empty() || !name.iter().all(|byte| matches!(byte, b'!'..=b'~'))
}

/// The separator of an mbox, which old mailers leave on top.
fn is_separator(line: &[u8]) -> bool {
    line.starts_with(b"From ") || line.starts_with(b">From ")
}

#[cfg(test)]
mod tests;
