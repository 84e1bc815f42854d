//! The header of a message while it streams in: some fields are dropped, some are noted, all else passes byte for byte.
//!
//! Nothing is held back but the name of a field, so a header of any size passes in constant memory (R17).

use crate::envelope::Priority;
use crate::message::addresses;
use crate::smtp::address::Mailbox;

/// Fields that no copy of the message may carry (R11): who gets a blind copy is the envelope's business, and
/// `Return-Path` is written by the final delivery (RFC 5321 4.4).
const DROPPED: [&str; 3] = ["bcc", "resent-bcc", "return-path"];

/// Longest field name that is looked at; RFC 5322 has none longer than a line.
pub(super) const MAX_NAME: usize = 998;

/// How much of a noted field's value is kept, in octets. A From that long is not judged: it may have been longer.
pub const MAX_VALUE: usize = 8 * 1024;

/// How much is kept of a line that is no field, in octets.
const MAX_SHOWN: usize = 80;

/// Takes the content in pieces, passes it on without the dropped fields, and remembers what acceptance needs to know.
#[derive(Clone, Debug)]
pub struct HeaderFilter {
    drops: &'static [&'static str],
    state: State,
    /// The start of a line that may still turn out to be a dropped field.
    held: Vec<u8>,
    /// A blank stands in what is held: only more of them and the colon may follow.
    held_blank: bool,
    /// The value of the field being noted.
    value: Vec<u8>,
    noting: Option<Noted>,
    any_field: bool,
    /// A header that ends by a line that is no field gets an empty line before that.
    separates: bool,
    /// The last field was dropped, and so are its continuation lines.
    dropped: bool,
    facts: Facts,
}

/// What the header said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    pub has_message_id: bool,
    pub has_date: bool,
    /// Received lines, for the loop check (R9).
    pub received: usize,
    /// The first mailbox of the first From.
    pub author: Option<Mailbox>,
    /// From fields.
    pub froms: usize,
    /// The value of the first From, as far as [`MAX_VALUE`].
    pub from: Vec<u8>,
    /// `X-Priority: 1|2`, `Importance: high` or `X-MSMail-Priority: High`.
    pub urgent: bool,
    /// Octets above 127 anywhere in the content.
    pub eight_bit: bool,
    /// The line that ended the header, where it is neither empty nor a field: the start of it.
    pub broken_at: Option<Vec<u8>>,
    /// Octets passed on.
    pub size: u64,
    /// The content starts with a blank or tab, which would continue the last line that is put before it.
    pub starts_folded: bool,
}

impl Facts {
    pub fn priority(&self) -> Priority {
        if self.urgent { Priority::High } else { Priority::Normal }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// At the first octet of a line of the header.
    LineStart,
    /// Within what may be a field's name; the line so far is in `held`.
    Name,
    /// Within a field that passes.
    Passing,
    /// Within a field that is dropped.
    Dropping,
    /// Within the first line that is no field, as far as it is noted.
    Broken,
    Body,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Noted {
    From,
    Priority,
}

impl HeaderFilter {
    pub fn new() -> Self {
        Self::of(&DROPPED)
    }

    /// One that drops these fields, named in lower case, and ends the header with an empty line where there is none
    /// before a line that is no field: some readers would look for more fields behind it.
    pub fn separating(drops: &'static [&'static str]) -> Self {
        Self { separates: true, ..Self::of(drops) }
    }

    fn of(drops: &'static [&'static str]) -> Self {
        Self {
            drops,
            state: State::LineStart,
            held: Vec::new(),
            held_blank: false,
            value: Vec::new(),
            noting: None,
            any_field: false,
            separates: false,
            dropped: false,
            facts: Facts::default(),
        }
    }

    /// Whether the header has ended: from here on the content passes as it is, and [`HeaderFilter::pass`] may be used
    /// in place of [`HeaderFilter::push`].
    pub fn in_body(&self) -> bool {
        self.state == State::Body
    }

    /// Takes note of body octets that the caller passes on itself.
    pub fn pass(&mut self, bytes: &[u8]) {
        self.facts.eight_bit |= !bytes.is_ascii();
        self.facts.size += bytes.len() as u64;
    }

    /// Takes the next octets of the content and appends to `out` what is to be stored. Line ends are CRLF.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let before = out.len();
        let mut rest = bytes;
        // Header by octet, body by slice.
        while let Some((&byte, after)) = rest.split_first() {
            if self.state == State::Body {
                out.extend_from_slice(rest);
                break;
            }
            self.header_octet(byte, out);
            rest = after;
        }
        let passed = out.get(before..).unwrap_or_default();
        self.facts.eight_bit |= !passed.is_ascii();
        self.facts.size += passed.len() as u64;
    }

    /// The content has ended: passes what was held back, and says what was noted.
    pub fn finish(mut self, out: &mut Vec<u8>) -> Facts {
        self.note();
        let before = out.len();
        if !self.held.is_empty() {
            self.end(out);
        }
        let passed = out.get(before..).unwrap_or_default();
        self.facts.size += passed.len() as u64;
        self.facts.eight_bit |= !passed.is_ascii();
        self.facts
    }

    fn header_octet(&mut self, byte: u8, out: &mut Vec<u8>) {
        match self.state {
            State::LineStart => self.line_start(byte, out),
            State::Name => self.name(byte, out),
            State::Passing => {
                out.push(byte);
                if self.noting.is_some() && self.value.len() < MAX_VALUE {
                    self.value.push(byte);
                }
                if byte == b'\n' {
                    self.state = State::LineStart;
                }
            }
            State::Dropping => {
                if byte == b'\n' {
                    self.state = State::LineStart;
                }
            }
            State::Broken => {
                out.push(byte);
                match &mut self.facts.broken_at {
                    Some(line) if byte != b'\n' && line.len() < MAX_SHOWN => line.push(byte),
                    _ => self.state = State::Body,
                }
            }
            State::Body => out.push(byte),
        }
    }

    fn line_start(&mut self, byte: u8, out: &mut Vec<u8>) {
        if matches!(byte, b' ' | b'\t') && self.any_field {
            self.state = if self.dropped { State::Dropping } else { State::Passing };
            if self.state == State::Passing {
                out.push(byte);
                if self.noting.is_some() && self.value.len() < MAX_VALUE {
                    self.value.push(byte);
                }
            }
            return;
        }
        if matches!(byte, b' ' | b'\t') {
            self.facts.starts_folded = true;
        }
        self.note();
        self.dropped = false;
        self.state = State::Name;
        self.held_blank = false;
        self.name(byte, out);
    }

    fn name(&mut self, byte: u8, out: &mut Vec<u8>) {
        self.held.push(byte);
        match byte {
            b':' => self.field(out),
            // RFC 5322 4.5.3: a blank may stand before the colon.
            b' ' | b'\t' if self.held.len() > 1 && self.held.len() <= MAX_NAME => {
                self.held_blank = true;
            }
            b'!'..=b'~' if self.held.len() <= MAX_NAME && !self.held_blank => {}
            // An empty line, or a line that is no field: the body begins here.
            b'\r' if self.held.len() == 1 => {}
            // The separator line of an mbox that an old mailer left on top: not a field, and no end of header.
            _ if !self.any_field && is_separator(&self.held) => {
                self.any_field = true;
                self.pass_held(out, State::Passing);
            }
            _ => self.end(out),
        }
    }

    /// `held` is `Name:`; decides what becomes of the field.
    fn field(&mut self, out: &mut Vec<u8>) {
        let name =
            self.held.strip_suffix(b":").unwrap_or_default().trim_ascii_end().to_ascii_lowercase();
        if name.is_empty() {
            return self.end(out);
        }
        self.any_field = true;
        if self.drops.iter().any(|dropped| dropped.as_bytes() == name) {
            self.held.clear();
            self.dropped = true;
            self.state = State::Dropping;
            return;
        }
        match name.as_slice() {
            b"message-id" => self.facts.has_message_id = true,
            b"date" => self.facts.has_date = true,
            b"received" => self.facts.received += 1,
            b"from" => {
                self.facts.froms += 1;
                self.noting = self.facts.author.is_none().then_some(Noted::From);
            }
            b"x-priority" | b"importance" | b"x-msmail-priority" => {
                self.noting = Some(Noted::Priority);
            }
            _ => {}
        }
        self.pass_held(out, State::Passing);
    }

    /// `held` is an empty line, or the start of a line that is no field.
    fn end(&mut self, out: &mut Vec<u8>) {
        if self.held.starts_with(b"\r") {
            return self.pass_held(out, State::Body);
        }
        if self.separates {
            out.extend_from_slice(b"\r\n");
        }
        self.facts.broken_at = Some(self.held.iter().copied().take(MAX_SHOWN).collect());
        let ended_line = self.held.ends_with(b"\n");
        self.pass_held(out, if ended_line { State::Body } else { State::Broken });
    }

    fn pass_held(&mut self, out: &mut Vec<u8>, next: State) {
        let ended_line = self.held.last() == Some(&b'\n');
        out.append(&mut self.held);
        self.state = match next {
            State::Passing if ended_line => State::LineStart,
            next => next,
        };
    }

    /// The field being noted has ended.
    fn note(&mut self) {
        let value = std::mem::take(&mut self.value);
        match self.noting.take() {
            Some(Noted::From) => {
                if self.facts.author.is_none() {
                    self.facts.author = addresses::first_mailbox(&value);
                }
                if self.facts.froms == 1 {
                    self.facts.from = value;
                }
            }
            Some(Noted::Priority) => {
                let word = value.trim_ascii().to_ascii_lowercase();
                self.facts.urgent |=
                    word.starts_with(b"1") || word.starts_with(b"2") || word.starts_with(b"high");
            }
            None => {}
        }
    }
}

/// Whether a line begins as the separator of an mbox does; a blank may also stand before a field's colon.
pub(super) fn is_separator(line: &[u8]) -> bool {
    let after = line.strip_prefix(b">").unwrap_or(line).strip_prefix(b"From");
    let Some([b' ', rest @ ..]) = after else { return false };
    let first = rest.iter().find(|b| !matches!(b, b' ' | b'\t'));
    first.is_some_and(|b| !matches!(b, b':' | b'\r' | b'\n'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(content: &[u8], step: usize) -> (String, Facts) {
        let (mut filter, mut out) = (HeaderFilter::new(), Vec::new());
        for piece in content.chunks(step) {
            filter.push(piece, &mut out);
        }
        let facts = filter.finish(&mut out);
        assert_eq!(facts.size, out.len() as u64);
        (String::from_utf8(out).unwrap(), facts)
    }

    #[track_caller]
    fn check(content: &str, stored: &str) -> Facts {
        let (whole, facts) = run(content.as_bytes(), usize::MAX);
        assert_eq!(whole, stored);
        for step in 1..content.len().min(40) {
            assert_eq!(
                run(content.as_bytes(), step),
                (whole.clone(), facts.clone()),
                "in pieces of {step}"
            );
        }
        facts
    }

    #[test]
    fn blind_copies_and_return_path_are_dropped_with_their_continuations() {
        check(
            "Bcc: a@b\r\nFrom: x@y\r\nbCC :\r\n c@d,\r\n\te@f\r\nReturn-Path: <q@r>\r\nResent-Bcc: s@t\r\nTo: z@z\r\n\r\nBcc: stays\r\n",
            "From: x@y\r\nTo: z@z\r\n\r\nBcc: stays\r\n",
        );
    }

    #[test]
    fn names_that_only_begin_like_a_dropped_one_pass() {
        let content = "Bcc-Note: 1\r\nX-Bcc: 2\r\nReturn-Path-X: 3\r\nBc: 4\r\n\r\n";
        check(content, content);
    }

    #[test]
    fn what_acceptance_needs_is_noted() {
        let facts = check(
            "Received: one\r\nreceived: two\r\nMessage-ID: <1@x>\r\nFROM: \"Doe, J\"\r\n <j@example.com>, k@l\r\nX-Priority: 1 (Highest)\r\n\r\nDate: in the body\r\n",
            "Received: one\r\nreceived: two\r\nMessage-ID: <1@x>\r\nFROM: \"Doe, J\"\r\n <j@example.com>, k@l\r\nX-Priority: 1 (Highest)\r\n\r\nDate: in the body\r\n",
        );
        assert_eq!(facts.received, 2);
        assert!(facts.has_message_id && !facts.has_date && facts.urgent && !facts.eight_bit);
        assert_eq!(facts.author.unwrap().as_str(), "j@example.com");
    }

    #[test]
    fn a_line_that_is_no_field_ends_the_header() {
        for content in [
            "hello\r\nBcc: a@b\r\n",
            "Subject: x\r\nno field here\r\nBcc: a@b\r\n",
            ": x\r\nBcc: a\r\n",
            "\r\nBcc: a\r\n",
        ] {
            check(content, content);
        }
        assert!(check(" hello\r\n", " hello\r\n").starts_folded);
    }

    #[test]
    fn the_line_that_breaks_the_header_is_noted() {
        for (content, line) in [
            ("X: y\r\ngarbage line\r\nFrom: a@b.c\r\n", Some("garbage line\r")),
            ("X: y\r\ngarbage", Some("garbage")),
            ("X: y\r\n: z\r\n", Some(": z\r")),
            ("X: y\r\n\r\nno field\r\n", None),
            ("X: y\r\n", None),
            ("\r\n", None),
            ("", None),
        ] {
            let facts = check(content, content);
            assert_eq!(facts.broken_at.as_deref(), line.map(str::as_bytes), "{content:?}");
        }
        let long = "x".repeat(5_000);
        for content in [long.clone(), format!("X Y{long}")] {
            let (_, facts) = run(content.as_bytes(), usize::MAX);
            assert_eq!(facts.broken_at.unwrap().len(), MAX_SHOWN);
        }
    }

    #[test]
    fn a_header_without_end_passes_whole() {
        for content in
            ["", "Sub", "Subject", "Subject: x", "Subject: x\r\n", "Subject: x\r\n\r", "Bc"]
        {
            check(content, content);
        }
        check("Bcc: x", "");
    }

    #[test]
    fn an_mbox_separator_is_neither_field_nor_end() {
        let content = "From root Tue Nov 24 06:42:11 2026\r\nBcc: a@b\r\nDate: x\r\n\r\n";
        let facts = check(content, "From root Tue Nov 24 06:42:11 2026\r\nDate: x\r\n\r\n");
        assert!(facts.has_date);
    }

    #[test]
    fn a_from_with_a_blank_before_its_colon_is_one() {
        let facts = check("From : a@b.c\r\n\r\n", "From : a@b.c\r\n\r\n");
        assert_eq!(facts.author.unwrap().as_str(), "a@b.c");
    }

    #[test]
    fn of_many_froms_the_first_is_kept_and_all_are_counted() {
        let content = "From:\r\n a@b.c\r\nTo: x\r\nfrom : d@e\r\n\r\nFrom: f@g\r\n";
        let facts = check(content, content);
        assert_eq!((facts.froms, facts.from.as_slice()), (2, &b"\r\n a@b.c\r\n"[..]));
        assert_eq!(facts.author.unwrap().as_str(), "a@b.c");
        // Each costs the same, also where none says anything.
        let (_, facts) = run("From:\r\n".repeat(100_000).as_bytes(), usize::MAX);
        assert_eq!((facts.froms, facts.from.as_slice()), (100_000, &b"\r\n"[..]));
        let (_, facts) = run(format!("From: {}", "x".repeat(MAX_VALUE)).as_bytes(), usize::MAX);
        assert_eq!(facts.from.len(), MAX_VALUE);
    }

    #[test]
    fn long_headers_pass_in_bounded_memory() {
        let mut filter = HeaderFilter::new();
        let mut out = Vec::new();
        filter.push(b"From: ", &mut out);
        for _ in 0..100 {
            filter.push(&[b'x'; 10_000], &mut out);
            assert!(filter.held.len() <= MAX_NAME + 1 && filter.value.len() <= MAX_VALUE);
        }
        assert_eq!(out.len(), 1_000_006);
    }
}
