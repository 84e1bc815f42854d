//! The content of a message on its way in: where it ends, which dots are stuffing, and what becomes of lone CRs and LFs.
//!
//! Everything hangs on one rule: only CRLF is a line end. The sequence that ends DATA is CRLF.CRLF and nothing else
//! (R10), a dot is stuffing only behind CRLF or at the very beginning, and a CR or LF that is not half of a CRLF is
//! content. Only then are lone CRs and LFs replaced (R11). So what a looser reader might take for an end of data
//! (`LF.LF`, `CRLF.CR CR LF`) comes out as plain content. That content may well hold a line with a single dot: whoever
//! sends it on stuffs dots again.

use std::ops::Range;

use memchr::memchr2;

/// What becomes of a lone CR or LF in content (R11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BareNewline {
    /// A lone LF becomes CRLF, a lone CR a blank.
    Normalize,
    /// 550 5.6.0 at the end of data.
    Reject,
}

/// How the end of the content is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// DATA: dots are stuffed, CRLF.CRLF ends it (RFC 5321 4.5.2).
    Dots,
    /// BDAT: octets are counted by whoever calls, dots mean nothing (RFC 3030).
    Counted,
}

/// Runs at least this long are handed out as they lie in the input; shorter ones are gathered, so that content full of
/// dots or lone LFs does not come in crumbs.
const RUN: usize = 256;
/// Gathered octets are handed out when there are so many.
const GATHER: usize = 4096;

/// Turns received octets into content, at any cut of the input.
#[derive(Debug)]
pub struct Decoder {
    framing: Framing,
    place: Place,
    bare_newline_seen: bool,
    /// The last received octets. The beginning of the content counts as behind a CRLF.
    tail: [u8; TAIL],
}

const TAIL: usize = 5;

/// Where in a line the decoder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Behind CRLF, or at the beginning.
    LineStart,
    /// Behind a dot at the start of a line, which is not content whatever follows.
    Dot,
    /// Behind such a dot and a CR.
    DotCr,
    /// Behind a CR that may turn out to be half of a CRLF.
    Cr,
    Inside,
}

/// What one call of [`Decoder::decode`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// Octets of the input that are used.
    pub used: usize,
    pub content: Content,
    /// The end of data was found; it is the last of the used octets.
    pub end: bool,
}

/// Where decoded content lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Unchanged, in the input.
    Input(Range<usize>),
    /// In the scratch buffer: all of it.
    Scratch,
}

impl Decoder {
    pub fn new(framing: Framing) -> Self {
        Self {
            framing,
            place: Place::LineStart,
            bare_newline_seen: false,
            tail: [0, 0, 0, b'\r', b'\n'],
        }
    }

    /// Decodes a part of `input`, at least one octet where there is one. `scratch` is overwritten.
    pub fn decode(&mut self, input: &[u8], scratch: &mut Vec<u8>) -> Decoded {
        scratch.clear();
        let (mut used, mut end) = (0, false);
        let content = loop {
            let rest = input.get(used..).unwrap_or_default();
            let (run, place) = self.plain_run(rest);
            if run >= RUN {
                if scratch.is_empty() {
                    self.place = place;
                    used += run;
                    break Content::Input(used - run..used);
                }
                break Content::Scratch;
            }
            self.place = place;
            used += run;
            scratch.extend_from_slice(rest.get(..run).unwrap_or_default());
            let Some(octet) = input.get(used) else { break Content::Scratch };
            used += 1;
            end = self.step(*octet, scratch);
            if end || scratch.len() >= GATHER {
                break Content::Scratch;
            }
        };
        self.remember(input.get(..used).unwrap_or_default());
        Decoded { used, content, end }
    }

    /// The counted content is whole: returns what was still held back. A CR at the very end is a lone one.
    pub fn finish(&mut self) -> &'static [u8] {
        match self.place {
            Place::Cr => {
                self.place = Place::Inside;
                self.bare_newline_seen = true;
                b" "
            }
            Place::LineStart | Place::Dot | Place::DotCr | Place::Inside => b"",
        }
    }

    /// Whether a lone CR or LF was met.
    pub fn bare_newline_seen(&self) -> bool {
        self.bare_newline_seen
    }

    /// Whether what came last is a line with a single dot that would have ended the content if its line ends were CRLFs.
    pub fn bare_end_of_data(&self) -> bool {
        let newline = |octet: &u8| matches!(octet, b'\r' | b'\n');
        let ends = self.tail.iter().rev().take_while(|octet| newline(octet)).count();
        let mut before = self.tail.iter().rev().skip(ends);
        self.framing == Framing::Dots
            && ends > 0
            && before.next() == Some(&b'.')
            && before.next().is_some_and(newline)
    }

    /// How many octets at the start of `rest` are content as they are, and where the decoder is behind them.
    fn plain_run(&self, rest: &[u8]) -> (usize, Place) {
        let stuffed = |at: usize| self.framing == Framing::Dots && rest.get(at) == Some(&b'.');
        let (mut at, mut place) = match self.place {
            Place::LineStart if stuffed(0) => return (0, self.place),
            Place::LineStart | Place::Inside => (0, self.place),
            Place::Dot | Place::DotCr | Place::Cr => return (0, self.place),
        };
        loop {
            let line = rest.get(at..).unwrap_or_default();
            let Some(text) = memchr2(b'\r', b'\n', line) else {
                let place = if line.is_empty() { place } else { Place::Inside };
                return (rest.len(), place);
            };
            if line.get(text..text + 2) != Some(b"\r\n") {
                return (at + text, if text == 0 { place } else { Place::Inside });
            }
            at += text + 2;
            place = Place::LineStart;
            if stuffed(at) {
                return (at, place);
            }
        }
    }

    /// Takes one octet; true if it ends the data.
    fn step(&mut self, octet: u8, out: &mut Vec<u8>) -> bool {
        match (self.place, octet) {
            (Place::DotCr, b'\n') => return true,
            (Place::Cr, b'\n') => {
                out.extend_from_slice(b"\r\n");
                self.place = Place::LineStart;
                return false;
            }
            (Place::Cr | Place::DotCr, _) => {
                self.bare_newline_seen = true;
                out.push(b' ');
                self.place = Place::Inside;
            }
            (Place::LineStart | Place::Dot | Place::Inside, _) => {}
        }
        self.place = match (self.place, octet) {
            (Place::LineStart, b'.') if self.framing == Framing::Dots => Place::Dot,
            (Place::Dot, b'\r') => Place::DotCr,
            (_, b'\r') => Place::Cr,
            (_, b'\n') => {
                self.bare_newline_seen = true;
                out.extend_from_slice(b"\r\n");
                Place::Inside
            }
            _ => {
                out.push(octet);
                Place::Inside
            }
        };
        false
    }

    fn remember(&mut self, received: &[u8]) {
        let last = received.get(received.len().saturating_sub(TAIL)..).unwrap_or_default();
        self.tail.rotate_left(last.len());
        for (kept, octet) in self.tail.iter_mut().rev().zip(last.iter().rev()) {
            *kept = *octet;
        }
    }
}

#[cfg(test)]
mod tests;
