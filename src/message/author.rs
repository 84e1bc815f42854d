//! The author of a message: the first mailbox of its header field From (RFC 5322 3.6.2).

use crate::smtp::address::{Charset, Mailbox};

/// Reads the first mailbox of an address list: with or without display name, comments and groups. `None` where there is
/// none that has the form of an address.
pub fn first_mailbox(value: &[u8]) -> Option<Mailbox> {
    let text = std::str::from_utf8(value).ok()?;
    let mut word = String::new();
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
                return Mailbox::parse(address, Charset::Utf8).ok();
            }
            // The name of a group ends: its first member follows.
            ':' => word.clear(),
            ',' | ';' => match Mailbox::parse(&word, Charset::Utf8) {
                Ok(mailbox) => return Some(mailbox),
                Err(_) => word.clear(),
            },
            c if is_blank(c) => {}
            c => word.push(c),
        }
    }
    Mailbox::parse(&word, Charset::Utf8).ok()
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
}
