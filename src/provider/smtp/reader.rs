//! Bytes of a server in, replies out. Bounded, whatever the server sends (R42).

use std::borrow::Cow;

use crate::smtp::reply::{EnhancedStatus, Reply, ReplyCode};

use super::answer::Garbage;

/// Longest line of a reply, in octets without its end.
const MAX_LINE: usize = 1_000;
/// Most lines of a reply.
const MAX_LINES: usize = 100;

/// Cuts a stream into replies. A lone LF ends a line too; text may be any bytes.
#[derive(Debug, Default)]
pub(super) struct ReplyReader {
    /// What came and is not yet read, from `read` on.
    input: Vec<u8>,
    read: usize,
    /// The lines of a reply whose last line is still to come.
    begun: Option<Begun>,
}

#[derive(Debug)]
struct Begun {
    code: ReplyCode,
    enhanced: Option<EnhancedStatus>,
    text: Vec<u8>,
    lines: usize,
}

impl ReplyReader {
    /// Whoever calls this takes out what is complete before more is read, so `input` stays below a line and a read.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.input.drain(..self.read);
        self.read = 0;
        self.input.extend_from_slice(bytes);
    }

    /// Whether nothing is left, not even a part of a reply.
    pub(super) fn is_empty(&self) -> bool {
        self.read == self.input.len() && self.begun.is_none()
    }

    /// The next complete reply. After an error the stream has no meaning any more.
    pub(super) fn next(&mut self) -> Option<Result<Reply, Garbage>> {
        loop {
            let rest = self.input.get(self.read..).unwrap_or_default();
            let Some(end) = memchr::memchr(b'\n', rest) else {
                // The octet beyond the limit may be the CR of the line's end.
                let open = rest.strip_suffix(b"\r").unwrap_or(rest);
                return (open.len() > MAX_LINE).then_some(Err(Garbage::LongLine));
            };
            let (line, _end) = rest.split_at(end);
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let taken = match line.len() > MAX_LINE {
                true => Err(Garbage::LongLine),
                false => add_line(&mut self.begun, line),
            };
            self.read += end + 1;
            match taken {
                Ok(None) => {}
                Ok(Some(reply)) => return Some(Ok(reply)),
                Err(garbage) => return Some(Err(garbage)),
            }
        }
    }
}

/// Adds a line to the reply it belongs to; the reply, where that was its last.
fn add_line(begun: &mut Option<Begun>, line: &[u8]) -> Result<Option<Reply>, Garbage> {
    let (code, more, text) = split_line(line).ok_or(Garbage::NoReply)?;
    let begun_now = match begun.take() {
        Some(mut reply) => {
            if reply.code != code {
                return Err(Garbage::CodesDiffer);
            }
            if reply.lines == MAX_LINES {
                return Err(Garbage::ManyLines);
            }
            reply.lines += 1;
            reply.text.push(b'\n');
            reply.text.extend_from_slice(match status(code, text) {
                // The same status again, as RFC 2034 4 wants it on each line.
                (Some(again), rest) if reply.enhanced == Some(again) => rest,
                _ => text,
            });
            reply
        }
        None => {
            let (enhanced, text) = status(code, text);
            Begun { code, enhanced, text: text.to_vec(), lines: 1 }
        }
    };
    if more {
        *begun = Some(begun_now);
        return Ok(None);
    }
    let Begun { code, enhanced, text, .. } = begun_now;
    Ok(Some(Reply { code, enhanced, text: Cow::Owned(text) }))
}

/// Code, whether more lines follow, and text. A code alone is a last line (RFC 5321 4.2).
fn split_line(line: &[u8]) -> Option<(ReplyCode, bool, &[u8])> {
    let (digits, rest) = line.split_at_checked(3)?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let code = digits.iter().fold(0, |code, digit| code * 10 + u16::from(digit - b'0'));
    let code = ReplyCode::parse(code)?;
    match rest.split_first() {
        None => Some((code, false, rest)),
        Some((b' ', text)) => Some((code, false, text)),
        Some((b'-', text)) => Some((code, true, text)),
        Some(_) => None,
    }
}

/// The enhanced status that the text starts with, and the text after it. One of another class than the code's is text.
fn status(code: ReplyCode, text: &[u8]) -> (Option<EnhancedStatus>, &[u8]) {
    match EnhancedStatus::parse(text) {
        Some(status) if u16::from(status.0) == code.get() / 100 => {
            let end = memchr::memchr(b' ', text).map_or(text.len(), |blank| blank + 1);
            (Some(status), text.get(end..).unwrap_or_default())
        }
        _ => (None, text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that can be read from `bytes`, given in pieces of `size`.
    fn read(bytes: &[u8], size: usize) -> Vec<String> {
        let mut reader = ReplyReader::default();
        let mut replies = Vec::new();
        for piece in bytes.chunks(size) {
            reader.push(piece);
            while let Some(next) = reader.next() {
                match next {
                    Ok(reply) => replies.push(reply.to_string()),
                    Err(garbage) => {
                        replies.push(garbage.to_string());
                        return replies;
                    }
                }
            }
            assert!(reader.input.len() <= MAX_LINE + 1 + size);
        }
        replies
    }

    #[track_caller]
    fn check(bytes: &[u8], replies: &[&str]) {
        for size in [1, 2, 3, 7, bytes.len()] {
            assert_eq!(read(bytes, size), replies, "in pieces of {size}");
        }
    }

    #[test]
    fn replies_are_cut_at_line_ends() {
        check(b"250 ok\r\n354 go on\r\n", &["250 ok", "354 go on"]);
        check(b"250\r\n250 \r\n", &["250 ", "250 "]);
        check(b"250-one\r\n250-two\r\n250 three\r\n", &["250 one two three"]);
        check(b"250-one\n250 two\n", &["250 one two"]);
        check(b"550 5.1.1 gone\r\n", &["550 5.1.1 gone"]);
        check(b"550-5.1.1 gone\r\n550 5.1.1 for good\r\n", &["550 5.1.1 gone for good"]);
        check(b"550-5.1.1 gone\r\n550 5.1.2 other\r\n", &["550 5.1.1 gone 5.1.2 other"]);
        check(b"550 n\xe9 \xff\0\r\n", &["550 n\\xe9 \\xff\\x00"]);
        check(b"550 5.1.1\r\n", &["550 5.1.1 "]);
    }

    #[test]
    fn a_status_of_another_class_is_text() {
        let mut reader = ReplyReader::default();
        reader.push(b"450 5.1.1 gone\r\n");
        let reply = reader.next().unwrap().unwrap();
        assert_eq!((reply.enhanced, &reply.text[..]), (None, &b"5.1.1 gone"[..]));
    }

    #[test]
    fn what_is_no_reply_is_an_error() {
        for bytes in [
            &b"hello\r\n"[..],
            b"\r\n",
            b"25\r\n",
            b"199 x\r\n",
            b"600 x\r\n",
            b"250_x\r\n",
            b"2 0 x\r\n",
        ] {
            check(bytes, &["a line is not a reply"]);
        }
        check(b"250-a\r\n251 b\r\n", &["the lines of a reply have different codes"]);
        check(b"250-a\r\n\r\n", &["a line is not a reply"]);
    }

    #[test]
    fn lines_and_their_number_are_bounded() {
        let line = |length: usize| [b"250 ".as_slice(), &vec![b'x'; length - 4]].concat();
        for end in [&b"\r\n"[..], b"\n"] {
            assert_eq!(read(&[&line(1_000), end].concat(), 64).len(), 1);
            check(&[&line(1_001), end].concat(), &["a line of a reply is too long"]);
        }
        check(&vec![b'2'; 5_000], &["a line of a reply is too long"]);
        let lines = |count: usize| [b"250-x\r\n".repeat(count - 1), b"250 x\r\n".to_vec()].concat();
        assert!(read(&lines(100), 64)[0].starts_with("250 x x"));
        check(&lines(101), &["a reply has too many lines"]);
    }
}
