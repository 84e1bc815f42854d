//! The one body that Graph takes, made of all the texts that a reader of the message would see.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use super::charset::{self, Said};
use super::content::describe;
use super::field::unescape_url;
use super::scan::{Kind, Node};
use super::{LossKind, Losses};

/// How far a charset is looked for in HTML that came without one.
const MAX_SNIFF: usize = 1024;
/// Octets of a URL within HTML that are looked at.
const MAX_URL: usize = 512;

/// The body.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Body {
    pub(super) is_html: bool,
    pub(super) text: String,
}

/// Puts the texts together, in their order; as HTML where one of them is that.
pub(super) fn compose(nodes: &[Node], texts: &[usize], losses: &mut Losses) -> Body {
    let mut pieces: Vec<Piece> = Vec::new();
    for at in texts {
        let Some(node) = nodes.get(*at) else { continue };
        let Kind::Text(octets) = &node.kind else { continue };
        if texts.len() > 1 && octets.trim_ascii().is_empty() {
            continue;
        }
        let (piece, why) = Piece::read(node, octets);
        pieces.push(piece);
        if let Some(why) = why {
            losses.push(LossKind::Text, describe(nodes, *at), why);
        }
    }
    match pieces.iter().position(|piece| piece.is_html) {
        None => Body { is_html: false, text: join(pieces) },
        Some(first) => Body { is_html: true, text: join_html(pieces, first) },
    }
}

struct Piece {
    is_html: bool,
    text: String,
}

impl Piece {
    /// The text, and what is wrong with it.
    fn read(node: &Node, octets: &[u8]) -> (Self, Option<&'static str>) {
        let entity = &node.entity;
        let is_html = entity.media_type() == "text/html";
        let charset = match entity.parameter("charset") {
            None if is_html && std::str::from_utf8(octets).is_err() => sniff(octets),
            charset => charset.map(Cow::from),
        };
        let (text, said) = charset::decode(octets, charset.as_deref());
        let text = match text.strip_prefix('\u{feff}') {
            Some(rest) => rest.to_owned().into(),
            None => text,
        };
        let is_flowed = !is_html
            && entity.parameter("format").is_some_and(|it| it.eq_ignore_ascii_case("flowed"));
        let text = match is_flowed {
            true => {
                let delsp = entity.parameter("delsp");
                unflow(&text, delsp.is_some_and(|it| it.eq_ignore_ascii_case("yes")))
            }
            false => text.into_owned(),
        };
        let (mut text, has_controls) = without_controls(text);
        if is_html {
            say_utf8(&mut text);
        }
        let why = match said {
            _ if has_controls => Some("has control characters, which are replaced"),
            Said::Nonsense => Some("has octets that are not of its charset"),
            Said::Nothing | Said::Truth => None,
        };
        (Self { is_html, text }, why)
    }
}

/// The charset that HTML says of itself.
fn sniff(octets: &[u8]) -> Option<Cow<'static, str>> {
    let start = start_of(octets);
    let name = start.get(charset_name(&start)?)?;
    Some(name.iter().map(|byte| char::from(*byte)).collect::<String>().into())
}

/// A `<meta>` that names another charset would be believed, and what it says is UTF-8 from here on.
fn say_utf8(html: &mut String) {
    let start = start_of(html.as_bytes());
    let Some(name) = charset_name(&start) else { return };
    let before = start.get(..name.start).unwrap_or_default();
    let tag = memchr::memmem::rfind(before, b"<meta").and_then(|at| before.get(at..));
    let is_in_meta = tag.is_some_and(|tag| !tag.contains(&b'>'));
    let is_whole = name.end < start.len() && !name.is_empty();
    let is_other = !matches!(start.get(name.clone()), Some(b"utf-8" | b"utf8"));
    if is_in_meta && is_whole && is_other {
        // The name is ASCII, so these are borders of characters.
        html.replace_range(name, "utf-8");
    }
}

/// Where a charset is looked for, in lower case.
fn start_of(html: &[u8]) -> Vec<u8> {
    html.get(..MAX_SNIFF).unwrap_or(html).to_ascii_lowercase()
}

/// Where the first name of a charset stands.
fn charset_name(start: &[u8]) -> Option<Range<usize>> {
    let at = memchr::memmem::find(start, b"charset=")? + b"charset=".len();
    let is_quote = |byte: &&u8| matches!(byte, b'"' | b'\'' | b' ');
    let at = at + start.get(at..)?.iter().take_while(is_quote).count();
    let is_name = |byte: &&u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b':');
    let length = start.get(at..)?.iter().take_while(is_name).count();
    Some(at..at + length)
}

/// A form feed ends a page, and so a line; other controls have no place in JSON's readers.
fn without_controls(text: String) -> (String, bool) {
    let is_control = |c: char| c < ' ' && !matches!(c, '\t' | '\r' | '\n');
    if !text.bytes().any(|byte| is_control(char::from(byte))) {
        return (text, false);
    }
    let has_others = text.chars().any(|c| is_control(c) && c != '\u{c}');
    let replace = |c| match c {
        '\u{c}' => '\n',
        c if is_control(c) => '\u{fffd}',
        c => c,
    };
    (text.chars().map(replace).collect(), has_others)
}

/// Joins the lines of `format=flowed` (RFC 3676).
fn unflow(text: &str, delsp: bool) -> String {
    let mut out = String::with_capacity(text.len());
    // The quote depth of a line that flows on.
    let mut flowing: Option<usize> = None;
    for line in text.split_inclusive('\n') {
        let end = if line.ends_with("\r\n") {
            "\r\n"
        } else if line.ends_with('\n') {
            "\n"
        } else {
            ""
        };
        let line = line.strip_suffix(end).unwrap_or(line);
        let words = line.trim_start_matches('>');
        let depth = line.len() - words.len();
        let words = words.strip_prefix(' ').unwrap_or(words);
        if flowing != Some(depth) {
            if flowing.is_some() {
                out.push_str("\r\n");
            }
            out.extend(std::iter::repeat_n('>', depth));
            if depth > 0 && !words.is_empty() {
                out.push(' ');
            }
        }
        // A signature's separator never flows (RFC 3676 4.3).
        flowing = (words.ends_with(' ') && words != "-- " && !end.is_empty()).then_some(depth);
        match flowing {
            Some(_) if delsp => out.push_str(words.strip_suffix(' ').unwrap_or(words)),
            Some(_) => out.push_str(words),
            None => {
                out.push_str(words);
                out.push_str(end);
            }
        }
    }
    out
}

fn join(mut pieces: Vec<Piece>) -> String {
    if let [piece] = &mut pieces[..] {
        return std::mem::take(&mut piece.text);
    }
    let mut out = String::with_capacity(pieces.iter().map(|piece| piece.text.len() + 2).sum());
    for piece in &pieces {
        if !out.is_empty() && !out.ends_with('\n') {
            out.push_str("\r\n");
        }
        out.push_str(&piece.text);
    }
    out
}

/// What stands before the first HTML goes to the start of its body, the rest to the end of it.
fn join_html(mut pieces: Vec<Piece>, first: usize) -> String {
    if let [piece] = &mut pieces[..] {
        return std::mem::take(&mut piece.text);
    }
    let Some(document) = pieces.get(first).map(|piece| piece.text.as_str()) else {
        return String::new();
    };
    let lower = document.to_ascii_lowercase();
    let start =
        lower.find("<body").and_then(|at| lower.get(at..)?.find('>').map(|end| at + end + 1));
    let start = start.unwrap_or(0);
    let end = lower.rfind("</body").or_else(|| lower.rfind("</html")).filter(|end| *end >= start);
    let (opening, rest) = document.split_at_checked(start).unwrap_or(("", document));
    let (inner, closing) =
        rest.split_at_checked(end.map_or(rest.len(), |end| end - start)).unwrap_or((rest, ""));
    let mut out = String::with_capacity(document.len() * 2);
    out.push_str(opening);
    for (position, piece) in pieces.iter().enumerate() {
        match (position == first, piece.is_html) {
            (true, _) => out.push_str(inner),
            (false, true) => out.push_str(&piece.text),
            (false, false) => {
                out.push_str("<pre>");
                push_escaped(&piece.text, &mut out);
                out.push_str("</pre>");
            }
        }
        out.push_str("\r\n");
    }
    out.push_str(closing);
    out
}

fn push_escaped(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            c => out.push(c),
        }
    }
}

/// The files that HTML may show.
#[derive(Debug, Default)]
pub(super) struct Links<'a> {
    by_id: HashMap<&'a str, usize>,
    by_location: HashMap<&'a str, usize>,
    ids: HashMap<usize, &'a str>,
}

impl<'a> Links<'a> {
    /// Of several files with one name, the first is meant.
    pub(super) fn of(nodes: &'a [Node], files: &[usize]) -> Self {
        let mut links = Self::default();
        for at in files {
            let Some(node) = nodes.get(*at) else { continue };
            links.add(*at, node.entity.id.as_deref(), node.entity.location.as_deref());
        }
        links
    }

    fn add(&mut self, file: usize, id: Option<&'a str>, location: Option<&'a str>) {
        if let Some(id) = id {
            self.by_id.entry(id).or_insert(file);
            self.ids.insert(file, id);
        }
        if let Some(location) = location {
            self.by_location.entry(location).or_insert(file);
        }
    }
}

/// What of a message its HTML shows: the file, and the id by which it does.
pub(super) type Shown = HashMap<usize, String>;

/// Finds the files that the HTML shows, and writes their URLs as `cid:` and the id that they get.
pub(super) fn link(html: &str, links: &Links<'_>) -> (Option<String>, Shown) {
    let mut shown = Shown::new();
    if links.by_id.is_empty() && links.by_location.is_empty() {
        return (None, shown);
    }
    let mut out = String::new();
    let mut copied = 0;
    let any = !links.by_location.is_empty();
    let mut urls = Urls { html: html.as_bytes(), any, at: 0, ends: [None; 4] };
    while let Some(found) = urls.next() {
        let value = html.get(found.start..found.end).unwrap_or_default();
        let plain = value.replace("&amp;", "&");
        let plain = unescape_url(plain.trim());
        let scheme = plain.get(..4).filter(|it| it.eq_ignore_ascii_case("cid:"));
        let file = match scheme {
            Some(_) => plain.get(4..).and_then(|id| links.by_id.get(id)),
            None => links.by_location.get(plain.as_ref()).or_else(|| links.by_location.get(value)),
        };
        let Some(file) = file else { continue };
        let id = links.ids.get(file).filter(|id| is_plain_id(id));
        // A second file with that id is another one.
        let id = match id.filter(|id| links.by_id.get(**id) == Some(file)) {
            Some(id) => (*id).to_owned(),
            None => format!("part-{file}@mailsluice"),
        };
        let url = format!("cid:{id}");
        if value != url {
            out.push_str(html.get(copied..found.start).unwrap_or_default());
            out.push_str(&url);
            copied = found.end;
        }
        urls.at = found.end;
        shown.insert(*file, id);
    }
    if copied == 0 {
        return (None, shown);
    }
    out.push_str(html.get(copied..).unwrap_or_default());
    (Some(out), shown)
}

/// Whether an id can stand in a URL as it is.
fn is_plain_id(id: &str) -> bool {
    let is_plain = |byte| matches!(byte, b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' | b'@' | b'$' | b'+' | b'!');
    id.len() <= 200 && id.bytes().all(is_plain)
}

/// A value that may be a URL.
struct Url {
    start: usize,
    end: usize,
}

/// Finds the values that may be URLs: those with `cid:`, and, if `any`, those of attributes that hold URLs and of
/// `url(`.
struct Urls<'a> {
    html: &'a [u8],
    any: bool,
    /// Where the search goes on.
    at: usize,
    /// The next end of a value of each kind, as far as it was looked for: no octet is looked at again for each start.
    ends: [Option<usize>; 4],
}

impl Urls<'_> {
    fn next(&mut self) -> Option<Url> {
        loop {
            let rest = self.html.get(self.at..)?;
            let sign = match self.any {
                true => memchr::memchr3(b':', b'=', b'(', rest)?,
                false => memchr::memchr(b':', rest)?,
            };
            let at = self.at + sign;
            self.at = at + 1;
            let before = self.html.get(..at).unwrap_or_default();
            let start = match self.html.get(at) {
                Some(b':') if ends_with_word(before, b"cid") => at - 3,
                Some(b'=') if holds_url(before) => skip_quote(self.html, at + 1),
                Some(b'(') if ends_with_word(before, b"url") => skip_quote(self.html, at + 1),
                _ => continue,
            };
            // ASCII on both sides, so these are borders of characters.
            let end = self.end(start);
            if end < self.html.len() && end - start <= MAX_URL {
                return Some(Url { start, end });
            }
        }
    }

    /// Where the value that starts there ends.
    fn end(&mut self, start: usize) -> usize {
        let before = start.checked_sub(1).and_then(|it| self.html.get(it));
        let kind = match before {
            Some(b'"') => 0,
            Some(b'\'') => 1,
            Some(b'(') => 2,
            _ => 3,
        };
        let rest = self.html.get(start..).unwrap_or_default();
        let is_end = |byte: &u8| b" \t\r\n>\"')<".contains(byte);
        if let Some(end) = self.ends.get(kind).copied().flatten().filter(|end| *end >= start) {
            return end;
        }
        let length = match kind {
            0 => memchr::memchr(b'"', rest),
            1 => memchr::memchr(b'\'', rest),
            2 => memchr::memchr(b')', rest),
            _ => rest.iter().position(is_end),
        };
        let end = start + length.unwrap_or(rest.len());
        if let Some(known) = self.ends.get_mut(kind) {
            *known = Some(end);
        }
        end
    }
}

fn ends_with_word(before: &[u8], word: &[u8]) -> bool {
    let Some(start) = before.len().checked_sub(word.len()) else { return false };
    let is_word = before.get(start..).is_some_and(|it| it.eq_ignore_ascii_case(word));
    let is_within = start.checked_sub(1).and_then(|it| before.get(it));
    is_word && !is_within.is_some_and(u8::is_ascii_alphanumeric)
}

/// Whether an attribute that holds a URL ends there.
fn holds_url(before: &[u8]) -> bool {
    let names: [&[u8]; 7] =
        [b"src", b"href", b"background", b"poster", b"data", b"lowsrc", b"dynsrc"];
    let before = before.trim_ascii_end();
    names.iter().any(|name| ends_with_word(before, name))
}

fn skip_quote(bytes: &[u8], at: usize) -> usize {
    let rest = bytes.get(at..).unwrap_or_default();
    let blanks = rest.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
    match rest.get(blanks) {
        Some(b'"' | b'\'') => at + blanks + 1,
        _ => at + blanks,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flowed_text_is_joined() {
        for (text, delsp, expected) in [
            ("one \r\ntwo\r\n", false, "one two\r\n"),
            ("one \r\ntwo \r\nthree", false, "one two three"),
            ("one \r\ntwo\r\n", true, "onetwo\r\n"),
            ("stop.\r\n\r\nnext \r\nline\r\n", false, "stop.\r\n\r\nnext line\r\n"),
            ("> a \r\n> b\r\nc\r\n", false, "> a b\r\nc\r\n"),
            ("> a \r\n>> b\r\n", false, "> a \r\n>> b\r\n"),
            ("> a \r\nb\r\n", false, "> a \r\nb\r\n"),
            (" > stuffed\r\n  From x\r\n", false, "> stuffed\r\n From x\r\n"),
            ("x\r\n-- \r\nAnn\r\n", false, "x\r\n-- \r\nAnn\r\n"),
            ("ends ", false, "ends "),
            ("", false, ""),
        ] {
            assert_eq!(unflow(text, delsp), expected, "{text:?}");
        }
    }

    #[test]
    fn html_does_not_contradict_its_charset() {
        for (html, expected) in [
            ("<meta charset=iso-8859-1>é", "<meta charset=utf-8>é"),
            (
                "<META content='text/html; charset=Windows-1252'>",
                "<META content='text/html; charset=utf-8'>",
            ),
            ("<meta charset=\"\">", "<meta charset=\"\">"),
            ("<meta charset=UTF-8>", "<meta charset=UTF-8>"),
            ("<meta name=x>charset=koi8-r ", "<meta name=x>charset=koi8-r "),
            ("<script charset=koi8-r>", "<script charset=koi8-r>"),
            ("<meta charset=koi8-r", "<meta charset=koi8-r"),
            ("é", "é"),
        ] {
            let mut text = html.to_owned();
            say_utf8(&mut text);
            assert_eq!(text, expected);
        }
        let mut late = format!("{}<meta charset=koi8-r>", "é".repeat(MAX_SNIFF));
        let before = late.clone();
        say_utf8(&mut late);
        assert_eq!(late, before);
    }

    #[test]
    fn texts_around_html_go_into_its_body() {
        let piece = |is_html, text: &str| Piece { is_html, text: text.to_owned() };
        let pieces = vec![
            piece(false, "before <&>"),
            piece(true, "<HTML><Body bgcolor=x>hi</BODY></HTML>"),
            piece(false, "after"),
            piece(true, "<p>more</p>"),
        ];
        assert_eq!(
            join_html(pieces, 1),
            "<HTML><Body bgcolor=x><pre>before &lt;&amp;&gt;</pre>\r\nhi\r\n<pre>after</pre>\r\n<p>more</p>\r\n</BODY></HTML>"
        );
        assert_eq!(
            join_html(vec![piece(true, "<p>a"), piece(false, "b")], 0),
            "<p>a\r\n<pre>b</pre>\r\n"
        );
        assert_eq!(
            join_html(vec![piece(true, "</body><body>"), piece(false, "b")], 0),
            "</body><body>\r\n<pre>b</pre>\r\n"
        );
    }

    #[test]
    fn only_what_the_html_shows_is_linked() {
        #[track_caller]
        fn check(html: &str, expected: &str, expected_shown: &[(usize, &str)]) {
            let mut links = Links::default();
            links.add(1, Some("logo@x"), None);
            links.add(2, Some("odd id%/"), None);
            links.add(3, None, Some("http://x/a.png"));
            links.add(4, None, Some("pic.gif"));
            let (linked, shown) = link(html, &links);
            assert_eq!(linked.as_deref().unwrap_or(html), expected);
            let expected_shown =
                expected_shown.iter().map(|(at, id)| (*at, (*id).to_owned())).collect();
            assert_eq!(shown, expected_shown, "{html:?}");
        }
        let same = |html: &str, shown: &[(usize, &str)]| check(html, html, shown);
        same("<img src=\"cid:logo@x\">", &[(1, "logo@x")]);
        same("<img src='cid:logo@x'><td background=cid:logo@x>", &[(1, "logo@x")]);
        same("<i style=\"background:url(cid:logo@x)\">", &[(1, "logo@x")]);
        check("<img src=\"CID:logo%40x\">", "<img src=\"cid:logo@x\">", &[(1, "logo@x")]);
        check(
            "<img src=\"cid:odd id%25/\">",
            "<img src=\"cid:part-2@mailsluice\">",
            &[(2, "part-2@mailsluice")],
        );
        same("<img src=\"cid:other@x\"> cid: acid:logo@x", &[]);
        check(
            "<img src=\"http://x/a.png\"><IMG SRC = 'pic.gif'><td background=pic.gif>",
            "<img src=\"cid:part-3@mailsluice\"><IMG SRC = 'cid:part-4@mailsluice'><td background=cid:part-4@mailsluice>",
            &[(3, "part-3@mailsluice"), (4, "part-4@mailsluice")],
        );
        check("a{b:url(pic.gif)}", "a{b:url(cid:part-4@mailsluice)}", &[(4, "part-4@mailsluice")]);
        check(
            "a{b:url( \"pic.gif\" )}",
            "a{b:url( \"cid:part-4@mailsluice\" )}",
            &[(4, "part-4@mailsluice")],
        );
        same("<img src=\"http://x/a.png?1\"><img src=\"my pic.gif\"> pic.gif alt=pic.gif", &[]);
        same("<img src=\"pic.gif", &[]);
        same("src=", &[]);
        same("", &[]);
    }
}
