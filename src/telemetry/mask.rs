//! Local parts of mail addresses, taken out of a line of the log. Pure.

use std::borrow::Cow;

/// `line` without local parts: `a***@example.com` for all that looks like an address, wherever it stands. Rather too much
/// goes than too little: `mailto:`-like prefixes and a quoted local part go whole.
pub(super) fn masked(line: &[u8]) -> Cow<'_, [u8]> {
    if memchr::memchr(b'@', line).is_none() {
        return Cow::Borrowed(line);
    }
    let is_json = line.first() == Some(&b'{');
    let mut out = Vec::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = memchr::memchr(b'@', rest) {
        let (before, after) = rest.split_at(at);
        let local = local_part(before, is_json);
        let (kept, local) = before.split_at(before.len() - local);
        out.extend_from_slice(kept);
        if !local.is_empty() {
            out.extend_from_slice(first(local));
            out.extend_from_slice(b"***");
        }
        out.push(b'@');
        rest = after.get(1..).unwrap_or_default();
    }
    out.extend_from_slice(rest);
    Cow::Owned(out)
}

/// How many octets at the end of `before` are a local part (RFC 5321 4.1.2, RFC 6531 3.3), as the log writes it.
fn local_part(before: &[u8], is_json: bool) -> usize {
    if before.last() == Some(&b'"') {
        return quoted(before, is_json);
    }
    word(before)
}

fn word(before: &[u8]) -> usize {
    let text = before.iter().rev().take_while(|octet| is_of_local_part(**octet)).count();
    // A text line names its fields.
    let start = before.len() - text;
    let is_field =
        |name: &&&str| before.get(start..).is_some_and(|it| it.starts_with(name.as_bytes()));
    match FIELDS.iter().find(is_field) {
        Some(name) => text - name.len(),
        None => text,
    }
}

const FIELDS: &[&str] = &["to=", "from=", "words=", "author=", "client="];

fn is_of_local_part(octet: u8) -> bool {
    !octet.is_ascii_whitespace() && !b"<>()[]:;,@\"".contains(&octet)
}

/// Back to the quote that opens it: it stands at the start of a value or after what no local part has. Where none does,
/// back to any quote, or as far as a local part may reach; or, where no other quote is, the word before this one, for a
/// stranger may write one alone. And never out of the string of a JSON line.
fn quoted(before: &[u8], is_json: bool) -> usize {
    let Some(last) = before.len().checked_sub(1) else { return 0 };
    if is_json && !is_escaped(before, last) {
        // It opens the string: there is no local part.
        return 0;
    }
    let quote: &[u8] = if is_json { b"\\\"" } else { b"\"" };
    let end = before.len() - quote.len();
    let opens_string = |at: &usize| before.get(*at) == Some(&b'"') && !is_escaped(before, *at);
    let inside = match is_json {
        true => (0..end).rev().find(opens_string).map_or(0, |at| at + 1),
        false => start_of_character(before, end.saturating_sub(LONGEST)),
    };
    let mut farthest = None;
    for start in (inside..end).rev() {
        if !before.get(start..end).is_some_and(|it| it.starts_with(quote)) {
            continue;
        }
        let ahead = before.get(..start).and_then(|ahead| ahead.last());
        if ahead.is_none_or(|octet| b"<\"'=:;, ([{".contains(octet)) {
            return before.len() - start;
        }
        farthest = Some(start);
    }
    match farthest {
        Some(start) => before.len() - start,
        None if !is_json && inside > 0 => before.len() - inside,
        None => quote.len() + before.get(inside..end).map_or(0, word),
    }
}

/// A quoted local part of a path (RFC 5321 4.5.3.1.3), each octet of at most four when it is escaped, and its quotes.
const LONGEST: usize = 4 * 256 + 2;

/// The start of a character at `at` or behind it.
fn start_of_character(text: &[u8], at: usize) -> usize {
    let rest = text.get(at..).unwrap_or_default();
    at + rest.iter().take_while(|octet| **octet & 0xc0 == 0x80).count()
}

/// Whether what stands at `at` has an odd number of backslashes before it.
fn is_escaped(line: &[u8], at: usize) -> bool {
    let before = line.get(..at).unwrap_or_default();
    before.iter().rev().take_while(|octet| **octet == b'\\').count() % 2 == 1
}

/// The first character of a local part of more than one; of a quoted one, or an escape, nothing.
fn first(local: &[u8]) -> &[u8] {
    let is_start = |octet: &u8| octet & 0xc0 != 0x80;
    let second = local.iter().skip(1).position(is_start).map(|at| at + 1);
    match (local.first(), second) {
        (Some(b'"' | b'\\'), _) | (_, None) => b"",
        (_, Some(second)) => local.get(..second).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_parts_go_and_all_else_stays() {
        for (line, expected) in [
            ("nothing here", "nothing here"),
            ("for <anna@example.com>: no", "for <a***@example.com>: no"),
            ("a@b.c and dd@e.f, g@[::1]", "***@b.c and d***@e.f, ***@[::1]"),
            (r#"{"to":"anna.b+c@example.com"}"#, r#"{"to":"a***@example.com"}"#),
            (r#"{"to":"\"anna b\"@example.com","x":1}"#, r#"{"to":"***@example.com","x":1}"#),
            (r#"{"m":"x <\"anna b\"@example.com> y"}"#, r#"{"m":"x <***@example.com> y"}"#),
            (r#"{"m":"\"an\\\\\\\"na\"@x.y"}"#, r#"{"m":"***@x.y"}"#),
            ("x <\"anna b\"@example.com> y", "x <***@example.com> y"),
            ("to=anna@example.com id=1", "to=a***@example.com id=1"),
            ("bounce+anna=example.com@list.org", "b***@list.org"),
            ("b=anna=x@list.org", "b***@list.org"),
            ("jürgen@example.com ümit@x.y ü@x.y", "j***@example.com ü***@x.y ***@x.y"),
            (r#"{"w":"550 \\xff\\xfe@x.y"}"#, r#"{"w":"550 ***@x.y"}"#),
            ("RCPT TO:<@relay.org:anna@x.y>", "RCPT TO:<@relay.org:a***@x.y>"),
            ("anna@", "a***@"),
            ("@", "@"),
            ("\"@", "***@"),
            ("421 try later\"@noon", "421 try l***@noon"),
            (r#"550 no x"anna b"@x.y here"#, "550 no x***@x.y here"),
            (
                r#"'"anna b"@x.y' ["anna b"@x.y] {"anna b"@x.y};"anna b"@x.y"#,
                "'***@x.y' [***@x.y] {***@x.y};***@x.y",
            ),
            (r#"{"m":"x\"anna b\"@x.y no","x":1}"#, r#"{"m":"x***@x.y no","x":1}"#),
            (r#"{"m":"421 try later\"@noon","x":1}"#, r#"{"m":"421 try l***@noon","x":1}"#),
            (r#"{"m":"@noon","to":"\"@x"}"#, r#"{"m":"@noon","to":"***@x"}"#),
            (r#"{"w":"x\"@x.y gone","s":"rcpt"}"#, r#"{"w":"x***@x.y gone","s":"rcpt"}"#),
            ("a@b@c", "***@***@c"),
        ] {
            let shown = masked(line.as_bytes());
            assert_eq!(std::str::from_utf8(&shown).unwrap(), expected, "{line}");
        }
    }

    /// Most of it stood in the log: it was taken for a word.
    #[test]
    fn the_longest_quoted_local_part_goes_whole() {
        for octet in ["\\\\", " ", "\\\"", "ü"] {
            let local = format!("\"anna.secret {}b\"", octet.repeat(110));
            let shown = crate::smtp::reply::Escaped(local.as_bytes()).to_string();
            let line = format!("INFO accepted from=<{shown}@x.example> id=1");
            let masked = String::from_utf8(masked(line.as_bytes()).into_owned()).unwrap();
            assert_eq!(masked, "INFO accepted from=<***@x.example> id=1", "{line}");
        }
        let endless = format!("INFO \"{}ü\"@x.example", "ü".repeat(1_000));
        let masked = String::from_utf8(masked(endless.as_bytes()).into_owned()).unwrap();
        assert!(masked.ends_with("ü***@x.example"), "{masked}");
    }

    /// A reply with a quote too few took the whole line with it.
    #[test]
    fn whatever_a_stranger_says_a_json_line_stays_one() {
        let pieces =
            ["\"", "@", "\\", " ", "a", "<", ">", ":", ",", "é", "\"@", "\\\"", "x.y", "="];
        let mut random = fastrand::Rng::with_seed(7);
        for round in 0..20_000 {
            let mut says = || (0..random.usize(..9)).map(|_| pieces[random.usize(..14)]).collect();
            let (one, other): (String, String) = (says(), says());
            let line = serde_json::json!({ "first": one, "event": "closed", "last": other });
            let shown = masked(line.to_string().as_bytes()).into_owned();
            let shown: Result<serde_json::Value, _> = serde_json::from_slice(&shown);
            let shown = shown.unwrap_or_else(|error| panic!("{round}: {line}: {error}"));
            assert_eq!(shown["event"], "closed", "{line}");
            assert_eq!(shown.as_object().unwrap().len(), 3, "{line}");
        }
    }
}
