//! What a client sent and nobody has looked at yet: read as lines while commands are awaited, as octets in content.

use std::ops::Range;

use memchr::memchr;

/// Longest command line, in octets, its end included (R16). RFC 5321 4.5.3.1.4 asks for 512 and for more with each
/// extension that is offered.
pub const MAX_LINE: usize = 2048;

/// Above this, an empty buffer gives its memory back even while content is being received.
const KEEP: usize = 64 * 1024;

/// The bounded input of a session: at most one unfinished line and one received chunk.
#[derive(Debug, Default)]
pub struct LineBuffer {
    bytes: Vec<u8>,
    /// What lies before it was used; it stays until the next `push` or `rest_a_while`, so that slices of it can be
    /// handed out.
    start: usize,
    /// The line at hand was too long: all of it up to its LF is dropped.
    skipping: bool,
}

/// What [`LineBuffer::line`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// No line end yet.
    Unfinished,
    /// A whole line, without its end: CRLF, or a lone LF as sloppy clients send it (R20).
    Whole(&'a [u8]),
    /// The end of a line longer than [`MAX_LINE`], of which nothing was kept.
    TooLong,
}

impl LineBuffer {
    /// Adds what was received.
    pub fn push(&mut self, bytes: &[u8]) {
        self.compact();
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the next line.
    pub fn line(&mut self) -> Line<'_> {
        let end = memchr(b'\n', self.unread());
        if self.skipping {
            let Some(end) = end else {
                self.clear();
                return Line::Unfinished;
            };
            self.skipping = false;
            self.consume(end + 1);
            return Line::TooLong;
        }
        match end {
            Some(end) if end < MAX_LINE => {
                let line = self.start..self.start + end;
                self.consume(end + 1);
                let line = self.slice(line);
                Line::Whole(line.strip_suffix(b"\r").unwrap_or(line))
            }
            Some(end) => {
                self.consume(end + 1);
                Line::TooLong
            }
            None => {
                if self.unread().len() >= MAX_LINE {
                    self.skipping = true;
                    self.clear();
                }
                Line::Unfinished
            }
        }
    }

    /// What was received and not used.
    pub fn unread(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    pub fn is_empty(&self) -> bool {
        self.unread().is_empty()
    }

    /// Whether the input is inside a line that was too long.
    pub fn is_skipping(&self) -> bool {
        self.skipping
    }

    /// Uses `n` octets of [`LineBuffer::unread`] and says where they lie for [`LineBuffer::slice`].
    pub fn consume(&mut self, n: usize) -> Range<usize> {
        let end = self.start.saturating_add(n).min(self.bytes.len());
        let used = self.start..end;
        self.start = end;
        used
    }

    /// Octets that were used since the last `push`.
    pub fn slice(&self, used: Range<usize>) -> &[u8] {
        self.bytes.get(used).unwrap_or_default()
    }

    /// Drops all input.
    pub fn clear(&mut self) {
        self.bytes = Vec::new();
        self.start = 0;
    }

    /// The session is about to wait. While it waits for a command it keeps no more than the unfinished line; in content
    /// it keeps the memory for the next chunk.
    pub fn rest_a_while(&mut self, receiving: bool) {
        self.compact();
        match (self.bytes.is_empty(), receiving) {
            (true, true) if self.bytes.capacity() <= KEEP => {}
            (true, _) => self.bytes = Vec::new(),
            (false, _) => self.bytes.shrink_to_fit(),
        }
    }

    /// Memory held, in octets.
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    fn compact(&mut self) {
        self.bytes.drain(..self.start.min(self.bytes.len()));
        self.start = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All lines of `input`, fed in pieces of `step` octets.
    fn lines(input: &[u8], step: usize) -> Vec<Option<Vec<u8>>> {
        let (mut buffer, mut lines) = (LineBuffer::default(), Vec::new());
        for piece in input.chunks(step) {
            buffer.push(piece);
            loop {
                match buffer.line() {
                    Line::Unfinished => break,
                    Line::Whole(line) => lines.push(Some(line.to_vec())),
                    Line::TooLong => lines.push(None),
                }
            }
            buffer.rest_a_while(false);
            assert!(buffer.capacity() < 2 * MAX_LINE, "{}", buffer.capacity());
        }
        lines
    }

    #[test]
    fn lines_are_the_same_wherever_the_input_is_cut() {
        let mut input = b"one\r\ntwo\nth\rree\r\r\n\r\n\n".to_vec();
        for len in [MAX_LINE - 2, MAX_LINE - 1, MAX_LINE, 3 * MAX_LINE] {
            input.extend(std::iter::repeat_n(b'x', len));
            input.extend(b"\r\n");
        }
        input.extend(b"last\r\nunfinished");
        let whole = lines(&input, input.len());
        let text = |text: &[u8]| Some(text.to_vec());
        assert_eq!(whole.len(), 10);
        assert_eq!(whole[..2], [text(b"one"), text(b"two")]);
        assert_eq!(whole[2..5], [text(b"th\rree\r"), text(b""), text(b"")]);
        assert_eq!(whole[5], Some(vec![b'x'; MAX_LINE - 2]));
        assert_eq!(whole[6..], [None, None, None, text(b"last")]);
        for step in [1, 2, 3, 7, 2047, 2048, 2049] {
            assert_eq!(lines(&input, step), whole, "in pieces of {step}");
        }
    }

    #[test]
    fn an_endless_line_costs_no_memory() {
        let mut buffer = LineBuffer::default();
        for _ in 0..1000 {
            buffer.push(&[b'x'; 1500]);
            assert_eq!(buffer.line(), Line::Unfinished);
            buffer.rest_a_while(false);
            assert!(buffer.capacity() < 2 * MAX_LINE);
        }
        buffer.push(b"\nNOOP\n");
        assert_eq!(buffer.line(), Line::TooLong);
        assert_eq!(buffer.line(), Line::Whole(b"NOOP"));
        buffer.rest_a_while(false);
        assert_eq!(buffer.capacity(), 0);
    }
}
