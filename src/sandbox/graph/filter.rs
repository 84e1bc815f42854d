//! `$filter` of messages, as far as it is used to look for one that was sent.

use super::answer::Refusal;
use super::message::{self, Stored};

/// All of these are to be true.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Filter(Vec<Term>);

#[derive(Clone, Debug, PartialEq)]
enum Term {
    InternetMessageId(String),
    IsDraft(bool),
    /// An extended property of that id and value.
    Property(String, String),
}

impl Filter {
    /// The terms `internetMessageId eq '…'`, `isDraft eq true` and
    /// `singleValueExtendedProperties/any(ep: ep/id eq '…' and ep/value eq '…')`, joined by `and`.
    pub(super) fn parse(text: &str) -> Result<Self, Refusal> {
        let wrong = || Refusal::new(400, "BadRequest", format!("Invalid filter clause: '{text}'."));
        let mut words = Words(text);
        let mut terms = Vec::new();
        loop {
            terms.push(term(&mut words).ok_or_else(wrong)?);
            if words.0.trim().is_empty() {
                return Ok(Self(terms));
            }
            words.take("and").ok_or_else(wrong)?;
        }
    }

    pub(super) fn takes(&self, stored: &Stored, is_draft: bool) -> bool {
        self.0.iter().all(|term| match term {
            Term::InternetMessageId(id) => stored.internet_message_id == *id,
            Term::IsDraft(wanted) => is_draft == *wanted,
            Term::Property(id, value) => stored
                .single_value_extended_properties
                .iter()
                .any(|pair| message::same_property(&pair.key, id) && pair.value == *value),
        })
    }
}

fn term(words: &mut Words<'_>) -> Option<Term> {
    if words.take("internetMessageId").is_some() {
        words.take("eq")?;
        return words.text().map(Term::InternetMessageId);
    }
    if words.take("isDraft").is_some() {
        words.take("eq")?;
        return match words.take("true") {
            Some(()) => Some(Term::IsDraft(true)),
            None => words.take("false").map(|()| Term::IsDraft(false)),
        };
    }
    words.take("singleValueExtendedProperties/any(")?;
    let (name, rest) = words.0.split_once(':')?;
    let name = name.trim();
    words.0 = rest;
    words.take(&format!("{name}/id"))?;
    words.take("eq")?;
    let id = words.text()?;
    words.take("and")?;
    words.take(&format!("{name}/value"))?;
    words.take("eq")?;
    let value = words.text()?;
    words.take(")")?;
    Some(Term::Property(id, value))
}

/// What is left to be read.
struct Words<'a>(&'a str);

impl Words<'_> {
    fn take(&mut self, word: &str) -> Option<()> {
        self.0 = self.0.trim_start().strip_prefix(word)?;
        Some(())
    }

    /// A text in quotes; a quote in it is doubled.
    fn text(&mut self) -> Option<String> {
        let mut rest = self.0.trim_start().strip_prefix('\'')?;
        let mut text = String::new();
        loop {
            let (before, after) = rest.split_once('\'')?;
            text.push_str(before);
            match after.strip_prefix('\'') {
                Some(after) => {
                    text.push('\'');
                    rest = after;
                }
                None => {
                    self.0 = after;
                    return Some(text);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read() {
        let check = |text: &str, terms: &[Term]| {
            assert_eq!(Filter::parse(text), Ok(Filter(terms.to_vec())), "{text}");
        };
        check(
            "internetMessageId eq '<o''neill@x>'",
            &[Term::InternetMessageId("<o'neill@x>".to_owned())],
        );
        let id = "String {66f5a359-4659-4830-9070-00047ec6ac6e} Name mailsluice-id";
        check(
            &format!(
                "isDraft eq false and singleValueExtendedProperties/any(ep: ep/id eq '{id}' and ep/value eq 'a-1')"
            ),
            &[Term::IsDraft(false), Term::Property(id.to_owned(), "a-1".to_owned())],
        );
        for wrong in [
            "",
            "subject eq 'x'",
            "internetMessageId eq x",
            "internetMessageId eq 'x",
            "isDraft eq 1",
        ] {
            assert!(Filter::parse(wrong).is_err(), "{wrong}");
        }
    }
}
