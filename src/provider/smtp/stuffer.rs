//! Content on its way out: dot-stuffed, ended, and otherwise untouched (RFC 5321 4.5.2).

use memchr::memmem;

/// Doubles the dot that a line starts with, whatever the chunks are.
///
/// A line starts at the beginning and after CRLF. Stored content has no lone CR or LF (R11), so no server can find
/// another line start in it.
#[derive(Debug)]
pub(super) struct Stuffer {
    tail: Tail,
}

/// What the last octets were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tail {
    /// CRLF, or nothing yet.
    LineEnd,
    Cr,
    Other,
}

impl Stuffer {
    pub(super) fn new() -> Self {
        Self { tail: Tail::LineEnd }
    }

    /// Appends `chunk` as it goes over the wire: at most a third longer.
    pub(super) fn push(&mut self, chunk: &[u8], out: &mut Vec<u8>) {
        // What the chunk before left open: its line end, and the dot that may follow.
        let mut rest = match (self.tail, chunk) {
            (Tail::LineEnd, [b'.', ..]) => {
                out.push(b'.');
                chunk
            }
            (Tail::Cr, [b'\n', b'.', rest @ ..]) => {
                out.extend_from_slice(b"\n..");
                rest
            }
            _ => chunk,
        };
        while let Some(at) = memmem::find(rest, b"\r\n.") {
            let (line, after) = rest.split_at(at + 3);
            out.extend_from_slice(line);
            out.push(b'.');
            rest = after;
        }
        out.extend_from_slice(rest);
        self.tail = match chunk {
            [] => self.tail,
            [b'\n'] if self.tail == Tail::Cr => Tail::LineEnd,
            [.., b'\r', b'\n'] => Tail::LineEnd,
            [.., b'\r'] => Tail::Cr,
            _ => Tail::Other,
        };
    }

    /// Appends the final dot, after the line end that the content lacks.
    pub(super) fn finish(self, out: &mut Vec<u8>) {
        out.extend_from_slice(match self.tail {
            Tail::LineEnd => b".\r\n",
            Tail::Cr | Tail::Other => b"\r\n.\r\n",
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 5321 4.5.2, octet by octet.
    fn model(content: &[u8]) -> Vec<u8> {
        let mut wire = Vec::new();
        for (at, octet) in content.iter().enumerate() {
            if *octet == b'.' && (at == 0 || content[..at].ends_with(b"\r\n")) {
                wire.push(b'.');
            }
            wire.push(*octet);
        }
        if !content.is_empty() && !content.ends_with(b"\r\n") {
            wire.extend_from_slice(b"\r\n");
        }
        wire.extend_from_slice(b".\r\n");
        wire
    }

    fn stuffed<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
        let (mut stuffer, mut wire) = (Stuffer::new(), Vec::new());
        for chunk in chunks {
            stuffer.push(chunk, &mut wire);
        }
        stuffer.finish(&mut wire);
        wire
    }

    #[test]
    fn every_short_content_is_stuffed_as_the_model_says_at_every_cut() {
        // All strings over these four octets up to length 6.
        for length in 0..=6u32 {
            for number in 0..4usize.pow(length) {
                let octet = |at: u32| b"\r\n.x"[number / 4usize.pow(at) % 4];
                let content: Vec<u8> = (0..length).map(octet).collect();
                let want = model(&content);
                assert_eq!(stuffed([content.as_slice()]), want, "{content:?}");
                assert_eq!(stuffed(content.chunks(1)), want, "{content:?}");
                for at in 0..=content.len() {
                    let (head, tail) = content.split_at(at);
                    assert_eq!(stuffed([head, &[], tail]), want, "{content:?} at {at}");
                }
            }
        }
    }

    #[test]
    fn a_long_content_of_dots_is_stuffed() {
        for content in [b".\r\n".repeat(5_000), b"..\r\nx\r\n".repeat(5_000), vec![b'.'; 10_000]] {
            let want = model(&content);
            for size in [1, 2, 3, 4_096] {
                assert_eq!(stuffed(content.chunks(size)), want);
            }
            assert!(want.len() <= content.len() * 4 / 3 + 5);
        }
    }
}
