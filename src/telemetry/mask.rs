//! Local parts of mail addresses, taken out of a line of the log. Pure.

use std::borrow::Cow;

/// `line` without local parts: `a***@example.com` for all that looks like an address, wherever it stands. Rather too much
/// goes than too little: `mailto:`-like prefixes and a quoted local part go whole.
pub(super) fn masked(line: &[u8]) -> Cow<'_, [u8]> {
    if memchr::memchr(b'@', line).is_none() {
        return Cow::Borrowed(line);
    }
    let mut out = Vec::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = memchr::memchr(b'@', rest) {
        let (before, after) = rest.split_at(at);
        let local = local_part(before);
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
fn local_part(before: &[u8]) -> usize {
    if before.last() == Some(&b'"') {
        return quoted(before);
    }
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

/// Back to the quote that opens it: in JSON or not, it stands at the start of a value or after what no local part has.
fn quoted(before: &[u8]) -> usize {
    let is_json = before.ends_with(b"\\\"");
    let quote: &[u8] = if is_json { b"\\\"" } else { b"\"" };
    let Some(end) = before.len().checked_sub(quote.len()) else { return before.len() };
    for start in (0..end).rev() {
        if !before.get(start..end).is_some_and(|it| it.starts_with(quote)) {
            continue;
        }
        let ahead = before.get(..start).and_then(|ahead| ahead.last());
        if ahead.is_none_or(|octet| b"<\"=:, (".contains(octet)) {
            return before.len() - start;
        }
    }
    before.len()
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
            ("a@b@c", "***@***@c"),
        ] {
            let shown = masked(line.as_bytes());
            assert_eq!(std::str::from_utf8(&shown).unwrap(), expected, "{line}");
        }
    }
}
