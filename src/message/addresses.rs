//! The mailboxes of an address list, such as the header fields From and To (RFC 5322 3.4).

use crate::smtp::address::{Charset, Mailbox};

/// The author of a message: the first mailbox of its From. `None` where there is none that has the form of an address.
pub fn first_mailbox(value: &[u8]) -> Option<Mailbox> {
    mailboxes(value).into_iter().next()
}

/// Reads an address list, with or without display names, comments and groups. What has not the form of an address is
/// left out.
pub fn mailboxes(value: &[u8]) -> Vec<Mailbox> {
    let mut found = Vec::new();
    let Ok(text) = std::str::from_utf8(value) else { return found };
    let mut word = String::new();
    // An address in brackets was read: what is left before the next comma is not one.
    let mut bracketed = false;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => {
                word.push('"');
                read_quoted(&mut chars, &mut word);
            }
            '(' => skip_comment(&mut chars),
            '<' => {
                let inner: String =
                    chars.by_ref().take_while(|c| *c != '>').filter(|c| !is_blank(*c)).collect();
                // A source route before the address (RFC 5322 4.4).
                let address = inner.rsplit_once(':').map_or(inner.as_str(), |(_, address)| address);
                found.extend(Mailbox::parse(address, Charset::Utf8));
                bracketed = true;
            }
            // The name of a group ends: its first member follows.
            ':' => word.clear(),
            ',' | ';' => {
                let word = std::mem::take(&mut word);
                if !std::mem::take(&mut bracketed) {
                    found.extend(Mailbox::parse(&word, Charset::Utf8));
                }
            }
            c if is_blank(c) => {}
            c => word.push(c),
        }
    }
    if !bracketed {
        found.extend(Mailbox::parse(&word, Charset::Utf8));
    }
    found
}

fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\r' | '\n')
}

/// Takes the rest of a quoted string, its closing quote included.
fn read_quoted(chars: &mut std::str::Chars<'_>, word: &mut String) {
    while let Some(c) = chars.next() {
        word.push(c);
        match c {
            '"' => return,
            '\\' => word.extend(chars.next()),
            _ => {}
        }
    }
}

fn skip_comment(chars: &mut std::str::Chars<'_>) {
    let mut depth = 1;
    while let Some(c) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            '(' => depth += 1,
            ')' if depth == 1 => return,
            ')' => depth -= 1,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_mailbox_is_found_in_every_form() {
        for (value, author) in [
            (" a@b.c\r\n", Some("a@b.c")),
            (" Ann <a@b.c>", Some("a@b.c")),
            ("\"Doe, John <x@y>\" <a@b.c>, d@e", Some("a@b.c")),
            ("(comment (nested) x@y) a@b.c (more)", Some("a@b.c")),
            ("Team: a@b.c, d@e;", Some("a@b.c")),
            ("Team: ;, a@b.c", Some("a@b.c")),
            ("\"odd local\"@b.c", Some("\"odd local\"@b.c")),
            ("<@x,@y:a@b.c>", Some("a@b.c")),
            ("Jörg <jörg@b.c>", Some("jörg@b.c")),
            ("=?utf-8?q?J=C3=B6rg?=\r\n <a@b.c>", Some("a@b.c")),
            ("", None),
            ("root", None),
            ("undisclosed-recipients:;", None),
            ("<>", None),
            ("\"unclosed <a@b.c>", None),
            ("(unclosed a@b.c", None),
        ] {
            assert_eq!(
                first_mailbox(value.as_bytes()).as_ref().map(Mailbox::as_str),
                author,
                "{value:?}"
            );
        }
        assert_eq!(first_mailbox(b"\xff <a@b>"), None);
    }

    #[test]
    fn a_list_is_read_whole() {
        let found =
            mailboxes(b" Ann <a@b>, c@d, \"x, y\" <e@f>, Team: g@h, i@j;, broken, <k@l>\r\n");
        let found: Vec<&str> = found.iter().map(Mailbox::as_str).collect();
        assert_eq!(found, ["a@b", "c@d", "e@f", "g@h", "i@j", "k@l"]);
    }
}
