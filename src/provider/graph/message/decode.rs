//! Content transfer encodings (RFC 2045 6), in pieces of any size. Whatever comes is decoded to something, and to the
//! same however it is cut.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

/// Blanks at the end of a line that are taken for padding (RFC 2045 6.7 rule 3); a longer run is meant.
const MAX_PADDING: usize = 1024;

/// How a part is written (RFC 2045 6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    Base64,
    QuotedPrintable,
    /// 7bit, 8bit, binary, and what we do not know.
    #[default]
    Identity,
}

/// Decodes one part.
#[derive(Clone, Debug)]
pub(super) enum Decoder {
    Base64(Base64),
    QuotedPrintable(QuotedPrintable),
    Identity,
}

impl Decoder {
    pub(super) fn new(encoding: Encoding) -> Self {
        match encoding {
            Encoding::Base64 => Self::Base64(Base64::default()),
            Encoding::QuotedPrintable => Self::QuotedPrintable(QuotedPrintable::default()),
            Encoding::Identity => Self::Identity,
        }
    }

    /// Takes the next octets and appends what they decode to.
    pub(super) fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        match self {
            Self::Base64(it) => it.push(bytes, out),
            Self::QuotedPrintable(it) => it.push(bytes, out),
            Self::Identity => out.extend_from_slice(bytes),
        }
    }

    pub(super) fn finish(self, out: &mut Vec<u8>) {
        match self {
            Self::Base64(it) => it.finish(out),
            Self::QuotedPrintable(it) => it.finish(out),
            Self::Identity => {}
        }
    }
}

/// Octets outside of the alphabet are skipped; padding, or the end, closes a group of four that is not full.
#[derive(Clone, Debug, Default)]
pub(super) struct Base64 {
    /// Digits of the group that is not full yet: at most three.
    group: u32,
    digits: u8,
    /// The lines at hand without their ends.
    joined: Vec<u8>,
}

/// So much is decoded at once; a multiple of four.
const JOINED: usize = 16 * 1024;

impl Base64 {
    fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let length = memchr::memchr(b'\n', rest).map_or(rest.len(), |at| at + 1);
            let (line, after) = rest.split_at_checked(length).unwrap_or((rest, &[]));
            rest = after;
            let digits = line.strip_suffix(b"\n").unwrap_or(line);
            let digits = digits.strip_suffix(b"\r").unwrap_or(digits);
            // Whole groups in every line is how it is written; then the lines are decoded many at once.
            if self.digits == 0 && digits.len() % 4 == 0 {
                self.joined.extend_from_slice(digits);
                if self.joined.len() < JOINED {
                    continue;
                }
                self.flush(out);
            } else {
                self.flush(out);
                self.push_digits(line, out);
            }
        }
        self.flush(out);
    }

    /// Decodes the joined lines, each octet by itself where something in them is not as usual.
    fn flush(&mut self, out: &mut Vec<u8>) {
        let mut joined = std::mem::take(&mut self.joined);
        if self.digits > 0 || !decode_groups(&joined, out) {
            self.push_digits(&joined, out);
        }
        joined.clear();
        self.joined = joined;
    }

    fn push_digits(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        for byte in bytes {
            match value(*byte) {
                Some(value) => {
                    self.group = self.group << 6 | u32::from(value);
                    self.digits += 1;
                    if self.digits == 4 {
                        let [_, octets @ ..] = self.group.to_be_bytes();
                        out.extend_from_slice(&octets);
                        (self.group, self.digits) = (0, 0);
                    }
                }
                None if *byte == b'=' => self.close(out),
                None => {}
            }
        }
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        let [_, first, second, _] =
            (self.group << (6 * (4 - u32::from(self.digits)))).to_be_bytes();
        match self.digits {
            2 => out.push(first),
            3 => out.extend_from_slice(&[first, second]),
            // A single digit is less than an octet.
            _ => {}
        }
        (self.group, self.digits) = (0, 0);
    }

    fn finish(mut self, out: &mut Vec<u8>) {
        self.close(out);
    }
}

/// Appends what whole groups decode to, and says whether they do: no octet outside of the alphabet, no padding.
fn decode_groups(digits: &[u8], out: &mut Vec<u8>) -> bool {
    let start = out.len();
    out.resize(start + digits.len() / 4 * 3, 0);
    let is_decoded = match out.get_mut(start..) {
        Some(room) => BASE64.decode_slice(digits, room) == Ok(room.len()),
        None => false,
    };
    if !is_decoded {
        out.truncate(start);
    }
    is_decoded
}

fn value(byte: u8) -> Option<u8> {
    match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    }
}

/// Counts what a part decodes to, faster than by decoding where that can be.
#[derive(Clone, Debug)]
pub(super) struct Counter {
    counts: Counts,
    octets: u64,
}

#[derive(Clone, Debug)]
enum Counts {
    /// Digits since the last padding.
    Base64(u64),
    Decoded(Decoder, Vec<u8>),
    Identity,
}

impl Counter {
    pub(super) fn new(encoding: Encoding) -> Self {
        let counts = match encoding {
            Encoding::Base64 => Counts::Base64(0),
            Encoding::QuotedPrintable => Counts::Decoded(Decoder::new(encoding), Vec::new()),
            Encoding::Identity => Counts::Identity,
        };
        Self { counts, octets: 0 }
    }

    /// One for the rest of a part of which so many octets were decoded.
    pub(super) fn going_on(decoder: Decoder, octets: usize) -> Self {
        Self { counts: Counts::Decoded(decoder, Vec::new()), octets: octets as u64 }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        match &mut self.counts {
            Counts::Base64(digits) => {
                let mut rest = bytes;
                while let Some(at) = memchr::memchr(b'=', rest) {
                    let (before, after) = rest.split_at_checked(at + 1).unwrap_or((rest, &[]));
                    self.octets += decoded(*digits + count_digits(before));
                    *digits = 0;
                    rest = after;
                }
                *digits += count_digits(rest);
            }
            Counts::Decoded(decoder, scratch) => {
                decoder.push(bytes, scratch);
                self.octets += scratch.len() as u64;
                scratch.clear();
            }
            Counts::Identity => self.octets += bytes.len() as u64,
        }
    }

    /// Octets, decoded.
    pub(super) fn finish(self) -> u64 {
        match self.counts {
            Counts::Base64(digits) => self.octets + decoded(digits),
            Counts::Decoded(decoder, mut scratch) => {
                decoder.finish(&mut scratch);
                self.octets + scratch.len() as u64
            }
            Counts::Identity => self.octets,
        }
    }
}

/// Octets in so many digits up to a padding.
fn decoded(digits: u64) -> u64 {
    digits / 4 * 3 + (digits % 4).saturating_sub(1)
}

fn count_digits(bytes: &[u8]) -> u64 {
    let is_digit = |byte: u8| {
        let is_letter = (byte | 0x20).wrapping_sub(b'a') < 26;
        let is_number = byte.wrapping_sub(b'0') < 10;
        u8::from(is_letter | is_number | (byte == b'+') | (byte == b'/'))
    };
    // Pieces whose count fits into an octet, which the compiler turns into a few instructions.
    let count = |piece: &[u8]| {
        let count = piece.iter().fold(0_u8, |count, byte| count.wrapping_add(is_digit(*byte)));
        u64::from(count)
    };
    bytes.chunks(192).map(count).sum()
}

/// RFC 2045 6.7. An `=` that begins nothing known stands for itself.
#[derive(Clone, Debug, Default)]
pub(super) struct QuotedPrintable {
    state: Quoted,
    /// Blanks and CRs that may turn out to be the end of a line.
    blanks: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default)]
enum Quoted {
    #[default]
    Text,
    /// Behind `=`.
    Equals,
    /// Behind `=` and a hexadecimal digit.
    Digit(u8),
    /// Behind `=` and blanks, which are in `blanks`: a soft line break, or nothing.
    Break,
}

impl QuotedPrintable {
    fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let mut rest = bytes;
        while let Some((&byte, after)) = rest.split_first() {
            match self.state {
                Quoted::Text => {
                    let length = memchr::memchr2(b'=', b'\n', rest);
                    let (text, after) =
                        rest.split_at_checked(length.unwrap_or(rest.len())).unwrap_or((rest, &[]));
                    self.text(text, out);
                    rest = after;
                    match after.split_first() {
                        Some((b'\n', after)) => {
                            self.end_line(out);
                            rest = after;
                        }
                        Some((_, after)) => {
                            out.append(&mut self.blanks);
                            self.state = Quoted::Equals;
                            rest = after;
                        }
                        None => {}
                    }
                    continue;
                }
                Quoted::Equals => match byte {
                    b'\n' => self.state = Quoted::Text,
                    b' ' | b'\t' | b'\r' => {
                        self.blanks.push(byte);
                        self.state = Quoted::Break;
                    }
                    _ if byte.is_ascii_hexdigit() => self.state = Quoted::Digit(byte),
                    _ => {
                        out.push(b'=');
                        self.state = Quoted::Text;
                        continue;
                    }
                },
                Quoted::Digit(first) => {
                    self.state = Quoted::Text;
                    match (hex(first), hex(byte)) {
                        (Some(high), Some(low)) => out.push(high << 4 | low),
                        _ => {
                            out.extend_from_slice(&[b'=', first]);
                            continue;
                        }
                    }
                }
                Quoted::Break => match byte {
                    b'\n' => {
                        self.blanks.clear();
                        self.state = Quoted::Text;
                    }
                    b' ' | b'\t' | b'\r' if self.blanks.len() < MAX_PADDING => {
                        self.blanks.push(byte);
                    }
                    _ => {
                        out.push(b'=');
                        self.state = Quoted::Text;
                        continue;
                    }
                },
            }
            rest = after;
        }
    }

    /// Text without `=` and without the end of a line.
    fn text(&mut self, text: &[u8], out: &mut Vec<u8>) {
        let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\r');
        let words = text.iter().rposition(|byte| !is_blank(byte)).map_or(0, |at| at + 1);
        let (words, blanks) = text.split_at_checked(words).unwrap_or((text, &[]));
        if !words.is_empty() {
            out.append(&mut self.blanks);
            out.extend_from_slice(words);
        }
        self.blanks.extend_from_slice(blanks);
        let meant = self.blanks.len().saturating_sub(MAX_PADDING);
        out.extend(self.blanks.drain(..meant));
    }

    fn end_line(&mut self, out: &mut Vec<u8>) {
        let end: &[u8] = if self.blanks.ends_with(b"\r") { b"\r\n" } else { b"\n" };
        self.blanks.clear();
        out.extend_from_slice(end);
    }

    /// What ends with blanks, or with a soft break, ends before them.
    fn finish(self, out: &mut Vec<u8>) {
        if let Quoted::Digit(digit) = self.state {
            out.extend_from_slice(&[b'=', digit]);
        }
    }
}

pub(super) fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smtp::testing::{Rng, rounds};

    fn decode(encoding: Encoding, written: &[u8], step: usize) -> Vec<u8> {
        let (mut decoder, mut counter) = (Decoder::new(encoding), Counter::new(encoding));
        let mut out = Vec::new();
        for piece in written.chunks(step) {
            decoder.push(piece, &mut out);
            counter.push(piece);
        }
        decoder.finish(&mut out);
        assert_eq!(counter.finish(), out.len() as u64, "{}", written.escape_ascii());
        out
    }

    #[track_caller]
    fn check(encoding: Encoding, written: &[u8], expected: &[u8]) {
        for step in [usize::MAX, 1, 2, 3, 5, 77] {
            let decoded = decode(encoding, written, step);
            let (decoded, expected) = (decoded.escape_ascii(), expected.escape_ascii());
            assert_eq!(decoded.to_string(), expected.to_string(), "in pieces of {step}");
        }
    }

    #[test]
    fn base64_of_every_kind_is_decoded() {
        for (written, expected) in [
            ("", ""),
            ("aGVsbG8=", "hello"),
            ("aGVsbG8=\r\n", "hello"),
            ("aGVs\r\nbG8h\r\n", "hello!"),
            ("aGVs\nbG8h", "hello!"),
            // Lines that end within a group.
            ("aGVsb\r\nG8h\r\n", "hello!"),
            // Without padding, and with one in the middle.
            ("aGVsbG8", "hello"),
            ("aGVsbG8=d29ybGQ=", "helloworld"),
            ("aGVs\r\nbG8=\r\nd29y\r\nbGQ=\r\n", "helloworld"),
            ("aGk=\r\n\r\n", "hi"),
            // What is not of the alphabet is skipped.
            ("a G-V*s\u{e9}bG8=", "hello"),
            ("aGVsbG8h\r\n!!!!\r\naGVs", "hello!hel"),
            // Too little.
            ("a", ""),
            ("aG", "h"),
            ("====", ""),
            ("=aGVs", "hel"),
            ("aGVsbG9=", "hello"),
        ] {
            check(Encoding::Base64, written.as_bytes(), expected.as_bytes());
        }
        let octets: Vec<u8> =
            (0..100_000_u32).map(|n| (n.wrapping_mul(n) >> 7).to_le_bytes()[0]).collect();
        let digits = BASE64.encode(&octets);
        for width in [4, 76, 77, 1000] {
            let lines: Vec<&[u8]> = digits.as_bytes().chunks(width).collect();
            check(Encoding::Base64, &lines.join(&b"\r\n"[..]), &octets);
        }
    }

    #[test]
    fn quoted_printable_of_every_kind_is_decoded() {
        for (written, expected) in [
            ("", &b""[..]),
            ("plain\r\n", b"plain\r\n"),
            ("caf=C3=A9\r\n", b"caf\xc3\xa9\r\n"),
            ("caf=c3=a9", b"caf\xc3\xa9"),
            ("soft =\r\nbreak", b"soft break"),
            ("soft =\nbreak", b"soft break"),
            ("soft= \t \r\nbreak", b"softbreak"),
            ("padded  \t\r\nnext  ", b"padded\r\nnext"),
            ("lone\nnewline", b"lone\nnewline"),
            ("lone\rreturn", b"lone\rreturn"),
            ("a  b=20\r\n", b"a  b \r\n"),
            ("blank before =3D sign", b"blank before = sign"),
            // What is no code stands for itself.
            ("a=b", b"a=b"),
            ("1=1g", b"1=1g"),
            ("== =3D", b"== ="),
            ("=  x", b"=  x"),
            ("=\r\n=\r\nx", b"x"),
            ("=00=0D=0A", b"\0\r\n"),
            ("ends with =", b"ends with "),
            ("ends with =4", b"ends with =4"),
        ] {
            check(Encoding::QuotedPrintable, written.as_bytes(), expected);
        }
    }

    #[test]
    fn a_long_run_of_blanks_is_meant() {
        let blanks = " ".repeat(5000);
        let written = format!("x{blanks}\r\ny{blanks}z");
        let kept = " ".repeat(5001 - MAX_PADDING);
        let expected = format!("x{kept}\r\ny{blanks}z");
        check(Encoding::QuotedPrintable, written.as_bytes(), expected.as_bytes());
    }

    #[test]
    fn any_octets_decode_to_the_same_however_they_are_cut() {
        for seed in 0..rounds(3000) {
            let mut rng = Rng::new(seed);
            let words = [
                "=",
                "==",
                "\r\n",
                "\n",
                "\r",
                " ",
                "\t",
                "aGVs",
                "bG8=",
                "A",
                "f",
                "4",
                "\0",
                "\u{e9}",
                "-",
                "=3D",
                "=\r\n",
                "aGVsbG8gd29ybGQhIGhlbGxvIHdvcmxkIQ==\r\n",
                "aGVsbG8gd29ybGQhIGhlbGxvIHdvcmxkISEh\r\n",
            ];
            let text: String = (0..rng.below(60)).map(|_| rng.pick(&words)).collect();
            for encoding in [Encoding::Base64, Encoding::QuotedPrintable, Encoding::Identity] {
                let whole = decode(encoding, text.as_bytes(), usize::MAX);
                let step = 1 + rng.below(20);
                assert_eq!(decode(encoding, text.as_bytes(), step), whole, "seed {seed}");
            }
        }
    }
}
