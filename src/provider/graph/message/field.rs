//! Header fields (RFC 5322, 2047, 2231), read as they are found: what breaks the rules is read as far as it goes, in time
//! proportional to its length.

use std::borrow::Cow;

use super::charset;
use super::decode::{Decoder, Encoding, hex};

/// Octets of an encoded word's text that are looked at; RFC 2047 2 has 75 for the whole word.
const MAX_WORD: usize = 2048;
/// Octets of the name of a charset.
const MAX_CHARSET: usize = 64;
/// Parameters of one field.
const MAX_PARAMETERS: usize = 64;
/// Octets of a value with parameters that are looked at.
const MAX_PARAMETER_VALUE: usize = 16 * 1024;

/// Octets of a comment behind a parameter.
const MAX_COMMENT: usize = 256;
/// Parentheses of one value of which it is asked whether they begin a comment; the others stand for themselves.
const MAX_COMMENTS: usize = 32;

/// One field of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Field<'a> {
    /// Without blanks.
    pub(super) name: &'a [u8],
    /// From behind the colon, folded as it was, with its end of line.
    pub(super) value: &'a [u8],
    /// The whole, with its end of line.
    pub(super) line: &'a [u8],
}

impl<'a> Field<'a> {
    pub(super) fn is(&self, name: &str) -> bool {
        self.name.eq_ignore_ascii_case(name.as_bytes())
    }

    /// The value as readers see it.
    pub(super) fn text(&self) -> String {
        text(self.value)
    }
}

/// The fields of a header that holds nothing else, in its order.
pub(super) fn fields(header: &[u8]) -> impl Iterator<Item = Field<'_>> {
    let mut rest = header;
    std::iter::from_fn(move || {
        while !rest.is_empty() {
            let (line, after) = split_field(rest);
            rest = after;
            if let Some(colon) = memchr::memchr(b':', line) {
                let (name, value) = line.split_at_checked(colon)?;
                let (name, value) = (name.trim_ascii_end(), value.get(1..).unwrap_or_default());
                if !name.is_empty() && name.iter().all(u8::is_ascii_graphic) {
                    return Some(Field { name, value, line });
                }
            }
        }
        None
    })
}

/// The first field with the lines that continue it, and the rest.
fn split_field(header: &[u8]) -> (&[u8], &[u8]) {
    let mut end = 0;
    loop {
        let rest = header.get(end..).unwrap_or_default();
        end += memchr::memchr(b'\n', rest).map_or(rest.len(), |at| at + 1);
        match header.get(end) {
            Some(b' ' | b'\t') => {}
            _ => return header.split_at_checked(end).unwrap_or((header, &[])),
        }
    }
}

/// Without the ends of its lines (RFC 5322 2.2.3), and without blanks around it.
pub(super) fn unfold(value: &[u8]) -> Cow<'_, [u8]> {
    let value = value.trim_ascii();
    match memchr::memchr2(b'\r', b'\n', value) {
        None => value.into(),
        Some(_) => {
            let is_end = |byte: &u8| matches!(byte, b'\r' | b'\n');
            value.iter().copied().filter(|byte| !is_end(byte)).collect::<Vec<u8>>().into()
        }
    }
}

/// Unstructured text (RFC 5322 3.2.5) with its encoded words, on one line: no control character is left.
pub(super) fn text(value: &[u8]) -> String {
    one_line(&decode_words(&unfold(value)))
}

/// Control characters become blanks, and what stands around it goes.
pub(super) fn one_line(text: &str) -> String {
    let text: String = text.chars().map(|c| if is_control(c) { ' ' } else { c }).collect();
    text.trim().to_owned()
}

/// What would break a line or a reader of JSON lines: also the separators of Unicode.
fn is_control(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}')
}

/// Decodes encoded words (RFC 2047). Those that follow each other in one charset are decoded as one, since many mailers
/// cut them within a character.
fn decode_words(value: &[u8]) -> String {
    let mut out = String::new();
    let mut words = Words::default();
    let mut rest = value;
    while let Some(at) = memchr::memmem::find(rest, b"=?") {
        let (before, word) = rest.split_at_checked(at).unwrap_or((rest, &[]));
        match encoded_word(word) {
            Some((charset, octets, length)) => {
                // Blanks between encoded words are not part of the text.
                if words.is_empty() || !before.trim_ascii().is_empty() {
                    words.write(&mut out);
                    out.push_str(&charset::decode(before, None).0);
                }
                words.push(charset, &octets, &mut out);
                rest = word.get(length..).unwrap_or_default();
            }
            None => {
                words.write(&mut out);
                let (plain, after) = rest.split_at_checked(at + 2).unwrap_or((rest, &[]));
                out.push_str(&charset::decode(plain, None).0);
                rest = after;
            }
        }
    }
    words.write(&mut out);
    out.push_str(&charset::decode(rest, None).0);
    out
}

/// Encoded words of one charset.
#[derive(Default)]
struct Words {
    charset: String,
    octets: Vec<u8>,
}

impl Words {
    fn is_empty(&self) -> bool {
        self.charset.is_empty()
    }

    fn push(&mut self, charset: String, octets: &[u8], out: &mut String) {
        if self.charset != charset {
            self.write(out);
            self.charset = charset;
        }
        self.octets.extend_from_slice(octets);
    }

    fn write(&mut self, out: &mut String) {
        out.push_str(&charset::decode(&self.octets, Some(&self.charset)).0);
        self.octets.clear();
        self.charset.clear();
    }
}

/// Charset, octets and length of the encoded word that `text` begins with.
fn encoded_word(text: &[u8]) -> Option<(String, Vec<u8>, usize)> {
    let rest = text.strip_prefix(b"=?")?;
    let charset_length = rest.iter().take(MAX_CHARSET).position(|byte| *byte == b'?')?;
    let (charset, rest) = rest.split_at_checked(charset_length)?;
    // A language may follow (RFC 2231 5).
    let charset = charset.split(|byte| *byte == b'*').next().unwrap_or_default();
    let charset =
        String::from_utf8(charset.to_ascii_lowercase()).ok().filter(|it| !it.is_empty())?;
    let [b'?', encoding, b'?', rest @ ..] = rest else { return None };
    let encoded = rest.get(..MAX_WORD).unwrap_or(rest);
    let length = memchr::memmem::find(encoded, b"?=")?;
    let encoded = encoded.get(..length)?;
    let mut octets = Vec::with_capacity(length);
    match encoding {
        b'B' | b'b' => {
            let mut decoder = Decoder::new(Encoding::Base64);
            decoder.push(encoded, &mut octets);
            decoder.finish(&mut octets);
        }
        b'Q' | b'q' => {
            let blank = |byte| if byte == b'_' { b' ' } else { byte };
            decode_percent(encoded, b'=', blank, &mut octets);
        }
        _ => return None,
    }
    let used = text.len() - rest.len() + length + 2;
    Some((charset, octets, used))
}

/// Decodes `sign` and two hexadecimal digits; what else it begins stands for itself.
fn decode_percent(text: &[u8], sign: u8, other: impl Fn(u8) -> u8, out: &mut Vec<u8>) {
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        let digits = match after {
            [high, low, ..] if first == sign => hex(*high).zip(hex(*low)),
            _ => None,
        };
        match digits {
            Some((high, low)) => {
                out.push(high << 4 | low);
                rest = after.get(2..).unwrap_or_default();
            }
            None => out.push(other(first)),
        }
    }
}

/// URLs within a message are compared without their escapes.
pub(super) fn unescape_url(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return text.into();
    }
    let mut octets = Vec::with_capacity(text.len());
    decode_percent(text.as_bytes(), b'%', |byte| byte, &mut octets);
    String::from_utf8(octets).map_or(text.into(), Cow::from)
}

/// A value with parameters, such as that of Content-Type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Parameters {
    /// In lower case, without comments.
    pub(super) value: String,
    /// Names in lower case; each once.
    list: Vec<(String, String)>,
}

impl Parameters {
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.list.iter().find(|(it, _)| it == name).map(|(_, value)| value.as_str())
    }

    /// RFC 2045 5.1 with RFC 2231.
    pub(super) fn read(value: &[u8]) -> Self {
        let value = unfold(value);
        let mut rest = value.get(..MAX_PARAMETER_VALUE).unwrap_or(&value);
        let mut looks = MAX_COMMENTS;
        let main = take_token(&mut rest, b";", &mut looks);
        let main = String::from_utf8_lossy(&main).trim().to_ascii_lowercase();
        let mut pieces: Vec<Piece> = Vec::new();
        while !rest.is_empty() && pieces.len() < MAX_PARAMETERS {
            let name = take_token(&mut rest, b"=;", &mut looks);
            let Some((b'=', after)) = rest.split_first().map(|(sign, after)| (*sign, after)) else {
                rest = rest.get(1..).unwrap_or_default();
                continue;
            };
            rest = after;
            let value = take_token(&mut rest, b";", &mut looks);
            rest = rest.get(1..).unwrap_or_default();
            pieces.extend(Piece::new(&name, value));
        }
        // The sort keeps the order of those that are alike.
        pieces.sort_by_key(|piece| piece.index);
        let mut parameters = Self { value: main, list: Vec::new() };
        for piece in &pieces {
            if parameters.get(&piece.name).is_none() {
                let text = assemble(pieces.iter().filter(|it| it.name == piece.name));
                parameters.list.push((piece.name.clone(), text));
            }
        }
        parameters
    }
}

/// One `name*index*=value`.
struct Piece {
    name: String,
    index: Option<u16>,
    /// RFC 2231 rather than a plain one.
    extended: bool,
    escaped: bool,
    octets: Vec<u8>,
}

impl Piece {
    fn new(name: &[u8], octets: Vec<u8>) -> Option<Self> {
        let name = String::from_utf8_lossy(name).trim().to_ascii_lowercase();
        let mut words = name.split('*');
        let base = words.next().filter(|it| !it.is_empty())?.to_owned();
        let (second, third) = (words.next(), words.next());
        let index = second.and_then(|digits| digits.parse().ok());
        let escaped = second == Some("") || third == Some("");
        Some(Self { name: base, index, extended: second.is_some(), escaped, octets })
    }
}

/// The value of a parameter from its pieces, which come in their order.
fn assemble<'a>(pieces: impl Iterator<Item = &'a Piece> + Clone) -> String {
    // Mailers that write both mean the new form, and the old one for those who cannot read it.
    let extended = || pieces.clone().filter(|piece| piece.extended);
    let Some(first) = extended().next() else {
        let plain = pieces.clone().next();
        // Not allowed within quotes, and done by many.
        return plain.map(|piece| text(&piece.octets)).unwrap_or_default();
    };
    if first.index.is_none() {
        let (charset, octets) = first.open();
        return one_line(&charset::decode(&octets, charset.as_deref()).0);
    }
    let (charset, mut octets) = first.open();
    for piece in extended().filter(|piece| piece.index.is_some()).skip(1) {
        match piece.escaped {
            true => decode_percent(&piece.octets, b'%', |byte| byte, &mut octets),
            false => octets.extend_from_slice(&piece.octets),
        }
    }
    one_line(&charset::decode(&octets, charset.as_deref()).0)
}

impl Piece {
    /// `charset'language'octets` where it is escaped.
    fn open(&self) -> (Option<String>, Vec<u8>) {
        if !self.escaped {
            return (None, self.octets.clone());
        }
        let mut words = self.octets.splitn(3, |byte| *byte == b'\'');
        let (charset, text) = match (words.next(), words.next(), words.next()) {
            (Some(charset), Some(_), Some(text)) => {
                (Some(String::from_utf8_lossy(charset).into_owned()), text)
            }
            _ => (None, &self.octets[..]),
        };
        let mut octets = Vec::with_capacity(text.len());
        decode_percent(text, b'%', |byte| byte, &mut octets);
        (charset, octets)
    }
}

/// Takes what stands before one of the `ends`, without quotes and comments; the end is left. Of so many parentheses as
/// `looks` says it is looked whether they begin a comment.
fn take_token(rest: &mut &[u8], ends: &[u8], looks: &mut usize) -> Vec<u8> {
    let mut token = Vec::new();
    let mut at = 0;
    // How much of the token was within quotes: blanks there are part of it.
    let mut quoted = 0;
    while let Some(byte) = rest.get(at) {
        match byte {
            b'"' => {
                at = take_quoted(rest, at, &mut token);
                quoted = token.len();
                continue;
            }
            b'(' if is_comment(rest, at, token.is_empty(), looks) => at = skip_comment(rest, at),
            byte if ends.contains(byte) => break,
            b' ' | b'\t' if token.is_empty() => at += 1,
            byte => {
                token.push(*byte);
                at += 1;
            }
        }
    }
    *rest = rest.get(at..).unwrap_or_default();
    while token.len() > quoted && token.last().is_some_and(u8::is_ascii_whitespace) {
        token.pop();
    }
    token
}

/// Whether the parenthesis at `at` begins a comment rather than standing in a name that should have been quoted.
fn is_comment(bytes: &[u8], at: usize, is_first: bool, looks: &mut usize) -> bool {
    let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let is_after_blank = at.checked_sub(1).and_then(|it| bytes.get(it)).is_some_and(is_blank);
    if is_first || !is_after_blank || *looks == 0 {
        return is_first;
    }
    *looks -= 1;
    let near = bytes.get(..at + MAX_COMMENT).unwrap_or(bytes);
    let after = near.get(skip_comment(near, at)..).unwrap_or_default();
    matches!(after.iter().find(|byte| !is_blank(byte)), None | Some(b';' | b'('))
}

/// Appends the inside of the quoted string at `at` and says where it ends.
fn take_quoted(bytes: &[u8], at: usize, out: &mut Vec<u8>) -> usize {
    let mut at = at + 1;
    while let Some(byte) = bytes.get(at) {
        at += 1;
        match byte {
            b'"' => break,
            b'\\' => {
                // Only what needs it is meant to be quoted: paths of Windows are written so too.
                match bytes.get(at) {
                    Some(next @ (b'"' | b'\\')) => {
                        out.push(*next);
                        at += 1;
                    }
                    _ => out.push(b'\\'),
                }
            }
            byte => out.push(*byte),
        }
    }
    at
}

/// Where the comment at `at` ends; a parenthesis that is never closed is skipped alone.
fn skip_comment(bytes: &[u8], at: usize) -> usize {
    let mut depth = 0_usize;
    let mut end = at;
    while let Some(byte) = bytes.get(end) {
        end += 1;
        match byte {
            b'\\' => end += 1,
            b'(' => depth += 1,
            b')' if depth == 1 => return end.min(bytes.len()),
            b')' => depth -= 1,
            _ => {}
        }
    }
    bytes.len()
}

/// One mailbox of an address list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    /// As readers see it; empty for none.
    pub(super) name: String,
    /// As it stands there, without blanks and comments; may be anything.
    pub(super) address: String,
}

/// The mailboxes of an address list (RFC 5322 3.4), those of groups among them.
pub(super) fn addresses(value: &[u8]) -> Vec<Address> {
    let value = unfold(value);
    let value = value.as_ref();
    let mut found = Vec::new();
    let mut open = Open::default();
    let mut at = 0;
    while let Some(byte) = value.get(at) {
        match byte {
            b'"' => {
                let start = at;
                let mut inner = Vec::new();
                at = take_quoted(value, at, &mut inner);
                open.phrase.extend_from_slice(&inner);
                open.bare.extend_from_slice(value.get(start..at).unwrap_or_default());
                continue;
            }
            b'(' => {
                let end = skip_comment(value, at);
                if open.comment.is_empty() {
                    let inner = value.get(at + 1..end).unwrap_or_default();
                    open.comment = inner.strip_suffix(b")").unwrap_or(inner);
                }
                at = end;
                continue;
            }
            b'<' => {
                let rest = value.get(at + 1..).unwrap_or_default();
                let length = end_of_brackets(rest);
                let inner = rest.get(..length).unwrap_or_default();
                if open.address.is_none() {
                    open.address = Some(inner);
                }
                at += length + 1;
            }
            b',' | b';' => found.extend(std::mem::take(&mut open).close()),
            // Mailers leave in it what would end a name.
            b'=' if let Some((_, _, length)) =
                encoded_word(value.get(at..).unwrap_or_default()) =>
            {
                let word = value.get(at..at + length).unwrap_or_default();
                open.phrase.extend_from_slice(word);
                open.bare.extend_from_slice(word);
                at += length;
                continue;
            }
            // The name of a group was before it.
            b':' => open = Open::default(),
            byte => {
                open.phrase.push(*byte);
                open.bare.push(*byte);
            }
        }
        at += 1;
    }
    found.extend(open.close());
    found
}

/// Where `>` stands, outside of quotes.
fn end_of_brackets(bytes: &[u8]) -> usize {
    let mut is_quoted = false;
    let mut is_escaped = false;
    let is_end = |byte: &u8| {
        let is_end = *byte == b'>' && !is_quoted;
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = true,
            b'"' => is_quoted = !is_quoted,
            _ => {}
        }
        is_end
    };
    bytes.iter().position(is_end).unwrap_or(bytes.len())
}

/// A mailbox that is being read.
#[derive(Default)]
struct Open<'a> {
    /// What is no address in brackets, without quotes.
    phrase: Vec<u8>,
    /// The same with its quotes.
    bare: Vec<u8>,
    comment: &'a [u8],
    /// The inside of the first brackets.
    address: Option<&'a [u8]>,
}

impl Open<'_> {
    fn close(self) -> Option<Address> {
        let comment = || text(self.comment);
        let (address, name) = match self.address {
            Some(address) => (address, text(&self.phrase)),
            None => (&self.bare[..], String::new()),
        };
        let address = String::from_utf8_lossy(address);
        // A source route may stand before it (RFC 5322 4.4).
        let address = match address.strip_prefix('@') {
            Some(route) => route.split_once(':').map_or("", |(_, address)| address),
            None => &address,
        };
        let address: String =
            address.chars().filter(|c| !c.is_whitespace() && !is_control(*c)).collect();
        if address.is_empty() {
            return None;
        }
        let name = if name.is_empty() { comment() } else { name };
        Some(Address { name, address })
    }
}

/// The first `<left@right>` in it, if it is in valid form: readers thread and servers index by it.
pub(super) fn message_id(value: &[u8]) -> Option<String> {
    let value = unfold(value);
    let start = memchr::memchr(b'<', &value)?;
    let rest = value.get(start..)?;
    let end = memchr::memchr(b'>', rest)?;
    let id = rest.get(..=end)?;
    let inner = id.get(1..id.len() - 1)?;
    let (left, right) = inner.split_at_checked(memchr::memchr(b'@', inner)?)?;
    let right = right.get(1..)?;
    let is_plain = |byte: &u8| matches!(byte, b'!'..=b'~') && !matches!(byte, b'<' | b'>' | b'@');
    let is_side = |side: &[u8]| !side.is_empty() && side.iter().all(is_plain);
    let is_valid = is_side(left) && is_side(right) && id.len() <= 998;
    is_valid.then(|| String::from_utf8_lossy(id).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_with_their_continuations() {
        let header =
            b"From x@y Mon 10:00\r\nA: 1\r\nb : 2\r\n\tand 3\r\nnothing\r\nC:\r\n d\r\nE: no end";
        let found: Vec<(String, String)> = fields(header)
            .map(|field| {
                let name = String::from_utf8_lossy(field.name).into_owned();
                assert!(field.is(&name.to_uppercase()));
                (name, field.text())
            })
            .collect();
        let expected = [("A", "1"), ("b", "2\tand 3"), ("C", "d"), ("E", "no end")];
        let expected = expected.map(|(name, text)| (name.to_owned(), text.replace('\t', " ")));
        assert_eq!(found, expected);
    }

    #[test]
    fn unstructured_text_is_decoded() {
        for (value, expected) in [
            (" plain\r\n", "plain"),
            (" folded\r\n  here\r\n", "folded  here"),
            ("=?utf-8?q?caf=C3=A9?=", "café"),
            ("=?UTF-8?Q?caf=c3=a9_au_lait?= ok", "café au lait ok"),
            ("=?iso-8859-1?Q?caf=E9?=", "café"),
            ("=?iso-8859-1*fr?Q?caf=E9?=", "café"),
            ("=?utf-8?B?Y2Fmw6k=?=", "café"),
            ("=?utf-8?B?Y2Fmw6k?=", "café"),
            ("=?iso-2022-jp?B?GyRCJU8lbSE8GyhC?=", "ハロー"),
            ("=?utf-8?q?one?= =?utf-8?q?two?=\r\n =?utf-8?q?three?=", "onetwothree"),
            ("=?utf-8?q?one?= and =?utf-8?q?two?=", "one and two"),
            ("a =?utf-8?q?b?= c", "a b c"),
            // A character cut in two, in both encodings and in both.
            ("=?utf-8?Q?caf=C3?= =?utf-8?Q?=A9?=", "café"),
            ("=?utf-8?B?Y2Fmww==?= =?utf-8?B?qQ==?=", "café"),
            ("=?utf-8?Q?caf=C3?= =?utf-8?B?qQ==?=", "café"),
            ("=?utf-8?q?a?= =?iso-8859-1?q?=E9?=", "aé"),
            // Blanks within, which old mailers write.
            ("=?utf-8?q?two words?=", "two words"),
            // What is none stays.
            ("=?utf-8?x?abc?=", "=?utf-8?x?abc?="),
            ("=?utf-8?q?abc", "=?utf-8?q?abc"),
            ("=??q?abc?=", "=??q?abc?="),
            ("a=?b", "a=?b"),
            ("=?=?utf-8?q?x?=", "=?x"),
            ("=?klingon?q?x?=", "x"),
            // No line breaks, no controls.
            ("=?utf-8?q?a=0D=0ABcc:_x@y?=", "a  Bcc: x@y"),
            ("=?utf-8?b?AAo=?=x", "x"),
            ("a\0b", "a b"),
            ("", ""),
        ] {
            assert_eq!(text(value.as_bytes()), expected, "{value:?}");
        }
        assert_eq!(text(b"caf\xe9 \x93q\x94"), "café “q”");
        assert_eq!(text("café".as_bytes()), "café");
    }

    #[test]
    fn parameters_are_read_in_all_their_forms() {
        #[track_caller]
        fn check(value: &str, main: &str, list: &[(&str, &str)]) {
            let read = Parameters::read(value.as_bytes());
            assert_eq!(read.value, main, "{value:?}");
            for (name, text) in list {
                assert_eq!(read.get(name), Some(*text), "{value:?}");
            }
            assert_eq!(read.list.len(), list.len(), "{value:?}: {read:?}");
        }
        check(" text/plain\r\n", "text/plain", &[]);
        check("Text/HTML; Charset=UTF-8", "text/html", &[("charset", "UTF-8")]);
        check(
            "text/plain (comment); charset=us-ascii (Plain text)",
            "text/plain",
            &[("charset", "us-ascii")],
        );
        check(
            "multipart/mixed;\r\n\tboundary=\"a b;c=\\\"d\"",
            "multipart/mixed",
            &[("boundary", "a b;c=\"d")],
        );
        check("a/b; name=two words.pdf ; x=1;", "a/b", &[("name", "two words.pdf"), ("x", "1")]);
        check("a/b; name=report(1).pdf", "a/b", &[("name", "report(1).pdf")]);
        check("a/b; name=report (1).pdf", "a/b", &[("name", "report (1).pdf")]);
        check("a/b; name=\" x \"", "a/b", &[("name", "x")]);
        check(
            "attachment; filename=\"C:\\dir\\a.txt\"",
            "attachment",
            &[("filename", "C:\\dir\\a.txt")],
        );
        check("a; f=\"=?utf-8?q?caf=C3=A9.pdf?=\"", "a", &[("f", "café.pdf")]);
        check("a; f==?utf-8?q?caf=C3=A9.pdf?=", "a", &[("f", "café.pdf")]);
        check("a; f*=utf-8''caf%C3%A9.pdf", "a", &[("f", "café.pdf")]);
        check("a; f*=iso-8859-1'fr'caf%E9.pdf", "a", &[("f", "café.pdf")]);
        check("a; f=cafe.pdf; f*=utf-8''caf%C3%A9.pdf", "a", &[("f", "café.pdf")]);
        check("a; f*=utf-8''caf%C3%A9.pdf; f=cafe.pdf", "a", &[("f", "café.pdf")]);
        check("a; f*0=\"one \"; f*1=two; f*2=.pdf", "a", &[("f", "one two.pdf")]);
        check("a; f*1=two; f*0=one", "a", &[("f", "onetwo")]);
        check("a; f*0*=iso-8859-1''caf; f*1*=%E9; f*2=.pdf", "a", &[("f", "café.pdf")]);
        check("a; f*0*=utf-8''caf%C3; f*1*=%A9", "a", &[("f", "café")]);
        check("a; f*=no-quotes%20here", "a", &[("f", "no-quotes here")]);
        check("a; f=1; f=2", "a", &[("f", "1")]);
        check("a; f=\"unclosed; b=c", "a", &[("f", "unclosed; b=c")]);
        check("a; ; =x; novalue; f=", "a", &[("f", "")]);
        check("", "", &[]);
        check("; charset=x", "", &[("charset", "x")]);
    }

    #[test]
    fn address_lists_are_read_in_all_their_forms() {
        #[track_caller]
        fn check(value: &str, expected: &[(&str, &str)]) {
            let found = addresses(value.as_bytes());
            let found: Vec<(&str, &str)> =
                found.iter().map(|it| (it.name.as_str(), it.address.as_str())).collect();
            assert_eq!(found, expected, "{value:?}");
        }
        check(" a@b.c\r\n", &[("", "a@b.c")]);
        check("Ann Lee <a@b.c>, d@e.f", &[("Ann Lee", "a@b.c"), ("", "d@e.f")]);
        check("\"Lee, Ann\" <a@b.c>", &[("Lee, Ann", "a@b.c")]);
        check("\"Ann \\\"A\\\" Lee\"<a@b.c>", &[("Ann \"A\" Lee", "a@b.c")]);
        check("=?utf-8?q?J=C3=B6rg?= <a@b.c>", &[("Jörg", "a@b.c")]);
        check("\"=?utf-8?q?J=C3=B6rg?=\" <a@b.c>", &[("Jörg", "a@b.c")]);
        check("=?utf-8?q?a=2C_b_=3Cx=40y=3E?= <a@b.c>", &[("a, b <x@y>", "a@b.c")]);
        check("Jörg <jörg@b.c>", &[("Jörg", "jörg@b.c")]);
        check("a@b.c (Ann Lee)", &[("Ann Lee", "a@b.c")]);
        check("(x (y) z) a@b.c", &[("x (y) z", "a@b.c")]);
        check(
            "Team: a@b.c, Dan <d@e.f>;, g@h.i",
            &[("", "a@b.c"), ("Dan", "d@e.f"), ("", "g@h.i")],
        );
        check("undisclosed-recipients:;", &[]);
        check("<@x,@y:a@b.c>", &[("", "a@b.c")]);
        check(
            "\"odd, local\"@b.c, \"x y\" <\"p>q\"@b.c>",
            &[("", "\"odd,local\"@b.c"), ("x y", "\"p>q\"@b.c")],
        );
        check("a @ b . c", &[("", "a@b.c")]);
        check("a@b.c; d@e.f", &[("", "a@b.c"), ("", "d@e.f")]);
        check("Ann <a@b.c", &[("Ann", "a@b.c")]);
        check("<>, , <a@b.c>", &[("", "a@b.c")]);
        check("\"unclosed <a@b.c>", &[("", "\"unclosed<a@b.c>")]);
        check("(unclosed a@b.c", &[]);
        check("root", &[("", "root")]);
        check("", &[]);
        check("=?utf-8?q?x=0D=0ABcc:_e@f?= <a@b.c>", &[("x  Bcc: e@f", "a@b.c")]);
    }

    #[test]
    fn only_a_message_id_in_valid_form_is_one() {
        for (value, expected) in [
            (" <a@b>\r\n", Some("<a@b>")),
            ("<a.b$c@d.e> (comment)", Some("<a.b$c@d.e>")),
            ("\r\n <a@b>", Some("<a@b>")),
            ("<a@[192.0.2.1]>", Some("<a@[192.0.2.1]>")),
            ("a@b", None),
            ("<ab>", None),
            ("<@b>", None),
            ("<a@>", None),
            ("<a@b@c>", None),
            ("<a b@c>", None),
            ("<\u{e9}@b>", None),
            ("<a@b", None),
            ("", None),
        ] {
            assert_eq!(message_id(value.as_bytes()).as_deref(), expected, "{value:?}");
        }
        assert_eq!(message_id(format!("<{}@b>", "x".repeat(1000)).as_bytes()), None);
    }
}
