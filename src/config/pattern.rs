//! Patterns of mail addresses, such as `*@example.com`.

use crate::smtp::address::{Charset, Mailbox, unicode_domain};

/// A pattern: `*` is any run of characters, within the local part or within the domain. Case makes no difference, nor does
/// it whether a domain is written with A-labels or U-labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    local_part: String,
    domain: String,
    /// The domain with its A-labels as U-labels, where it has no `*` in them.
    unicode_domain: String,
}

impl Pattern {
    /// Reads what has the form of an address, with `*` anywhere but for the `@`. Why not, otherwise.
    pub fn parse(text: &str) -> Result<Self, String> {
        let Some((local_part, domain)) =
            text.split_once('@').filter(|(_, rest)| !rest.contains('@'))
        else {
            return Err("a pattern has exactly one @, such as *@example.com".to_owned());
        };
        // A `*` may stand in a local part; in a domain it takes the place of letters.
        let example = format!("{local_part}@{}", domain.replace('*', "x"));
        if let Err(error) = Mailbox::parse(&example, Charset::Utf8) {
            return Err(format!("{error}; write a pattern such as *@example.com"));
        }
        let lower = str::to_ascii_lowercase;
        let unicode_label = |label: &str| match label.contains('*') {
            true => label.to_lowercase(),
            false => unicode_domain(label).unwrap_or_else(|| label.to_lowercase()),
        };
        let unicode_domain: Vec<String> = domain.split('.').map(unicode_label).collect();
        let unicode_domain = unicode_domain.join(".");
        Ok(Self { local_part: lower(local_part), domain: lower(domain), unicode_domain })
    }

    pub fn matches(&self, mailbox: &Mailbox) -> bool {
        is_like(self.local_part.as_bytes(), mailbox.local_part().as_bytes())
            && self.matches_domain(mailbox.domain())
    }

    fn matches_domain(&self, domain: &str) -> bool {
        is_like(self.domain.as_bytes(), domain.as_bytes())
            || unicode_domain(domain)
                .is_some_and(|domain| is_like(self.unicode_domain.as_bytes(), domain.as_bytes()))
    }
}

/// At most as many steps as the product of both lengths: of the stars only the last is ever tried again.
fn is_like(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut in_text) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while let Some(byte) = text.get(in_text) {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, in_text));
                at += 1;
            }
            Some(wanted) if *wanted == byte.to_ascii_lowercase() => {
                at += 1;
                in_text += 1;
            }
            _ => {
                let Some((star_at, from)) = star else { return false };
                star = Some((star_at, from + 1));
                at = star_at + 1;
                in_text = from + 1;
            }
        }
    }
    pattern.get(at..).unwrap_or_default().iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pattern: &str, matching: &[&str], others: &[&str]) {
        let parsed = Pattern::parse(pattern).unwrap();
        for (addresses, expected) in [(matching, true), (others, false)] {
            for address in addresses {
                let mailbox = Mailbox::parse(address, Charset::Utf8).unwrap();
                assert_eq!(parsed.matches(&mailbox), expected, "{pattern} and {address}");
            }
        }
    }

    #[test]
    fn a_star_stays_on_its_side_of_the_at() {
        check(
            "*@example.com",
            &["x@example.com", "X@EXAMPLE.com", "\"a@b\"@example.com", "ü@example.com"],
            &[
                "x@example.com.evil",
                "\"a@example.com\"@evil",
                "x@sub.example.com",
                "x@xexample.com",
            ],
        );
        check(
            "scan@*.example.com",
            &["scan@a.example.com", "Scan@a.b.example.com"],
            &["scan@example.com"],
        );
        check(
            "a*b*c@x.y",
            &["abc@x.y", "a-b-b-c@x.y", "abbcc@x.y"],
            &["abcd@x.y", "ab@x.y", "xabc@x.y"],
        );
        check("a@b.c", &["a@b.c", "A@B.C"], &["aa@b.c", "a@b.cc"]);
        check("*@*", &["a@b", "\"x y\"@[192.0.2.1]"], &[]);
    }

    /// An application that writes the one was refused where the configuration writes the other.
    #[test]
    fn a_domain_is_the_same_in_a_labels_and_u_labels() {
        let spellings =
            ["a@b\u{fc}cher.example", "a@xn--bcher-kva.example", "A@XN--BCHER-KVA.Example"];
        let others = ["a@bucher.example", "a@xn--bcher.example", "a@sub.b\u{fc}cher.example"];
        let upper = ["a@B\u{dc}CHER.example", "a@bu\u{308}cher.example"];
        for pattern in spellings.into_iter().chain(upper) {
            check(pattern, &spellings, &others);
            check(pattern, &upper, &others);
        }
        let sub = ["a@x.b\u{fc}cher.example", "a@x.xn--bcher-kva.example"];
        for pattern in ["*@*.b\u{fc}cher.example", "*@*.xn--bcher-kva.example"] {
            check(pattern, &sub, &["a@b\u{fc}cher.example", "a@x.b\u{fc}cher.example.evil"]);
        }
        check("*@b\u{fc}*.example", &spellings, &["a@xn--abc.example"]);
        // What is no A-label is only what it is written like.
        check("a@xn--\u{fc}.example", &["a@xn--\u{fc}.example"], &["a@\u{fc}.example"]);
        check("a@xn--99999.example", &["a@XN--99999.example"], &["a@x.example"]);
    }

    #[test]
    fn what_is_no_pattern_is_told() {
        for text in [
            "",
            "example.com",
            "@example.com",
            "a@",
            "a@b@c",
            "a b@c",
            "*@ex ample",
            "*@a..b",
            "<a@b>",
        ] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn many_stars_take_no_time() {
        let pattern = Pattern::parse(&format!("{}b@x", "*a".repeat(100))).unwrap();
        let mailbox = Mailbox::parse(&format!("{}@x", "a".repeat(256)), Charset::Ascii).unwrap();
        assert!(!pattern.matches(&mailbox));
    }
}
