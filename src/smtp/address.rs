//! Mail addresses, parsed once at the edge and trusted from there on (RFC 5321 4.1.2, RFC 6531 3.3).
//!
//! Nothing is repaired: an address either has the form, and is then kept exactly as it was written, or it is refused.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Longest domain, in octets (RFC 5321 4.5.3.1.2).
const MAX_DOMAIN: usize = 255;
/// Longest label of a domain, in octets (RFC 1035 2.3.4); a U-label may need more octets than its A-label has.
const MAX_LABEL: usize = 63;
/// Longest local part that is taken, in octets. RFC 5321 4.5.3.1.1 asks for 64 and advises against a limit: forwarders
/// make longer ones (SRS, VERP).
const MAX_LOCAL: usize = 256;

/// Whether characters outside ASCII may stand in an address (RFC 6531: only in a transaction with `SMTPUTF8`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Charset {
    Ascii,
    Utf8,
}

/// Why an address was not taken. The words are fit for a reply to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressError {
    /// Not an address by the grammar.
    Syntax(&'static str),
    /// It would be an address in a transaction with `SMTPUTF8` (RFC 6531).
    NeedsUtf8,
}

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Syntax(why) => why,
            Self::NeedsUtf8 => "a character outside ASCII needs SMTPUTF8",
        })
    }
}

/// A domain name or an address literal such as `[192.0.2.1]`, as it was written.
#[derive(Clone, Debug)]
pub struct Domain(Box<str>);

impl Domain {
    /// Reads a domain (RFC 5321 `Domain`) or an address literal (`address-literal`, IPv4 or IPv6).
    ///
    /// An underscore is taken in a label although RFC 5321 has none: hosts are named so, and their mail is real.
    pub fn parse(text: &str, charset: Charset) -> Result<Self, AddressError> {
        if text.is_empty() {
            return Err(AddressError::Syntax("the domain is missing"));
        }
        if text.len() > MAX_DOMAIN {
            return Err(AddressError::Syntax("the domain is too long"));
        }
        if let Some(literal) = text.strip_prefix('[') {
            let inner = literal
                .strip_suffix(']')
                .ok_or(AddressError::Syntax("an address literal ends with ]"))?;
            return match is_address_literal(inner) {
                true => Ok(Self(text.into())),
                false => Err(AddressError::Syntax("the address literal is not an IP address")),
            };
        }
        for label in text.split('.') {
            check_label(label, charset)?;
        }
        Ok(Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it needs `SMTPUTF8` to be written.
    pub fn is_ascii(&self) -> bool {
        self.0.is_ascii()
    }
}

/// Domains are compared without regard to case (RFC 5321 2.4).
impl PartialEq for Domain {
    fn eq(&self, other: &Self) -> bool {
        self.0.eq_ignore_ascii_case(&other.0)
    }
}

impl Eq for Domain {}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_address_literal(inner: &str) -> bool {
    match inner.get(..5) {
        Some(tag) if tag.eq_ignore_ascii_case("IPv6:") => {
            inner.get(5..).is_some_and(|rest| rest.parse::<Ipv6Addr>().is_ok())
        }
        _ => inner.parse::<Ipv4Addr>().is_ok(),
    }
}

fn check_label(label: &str, charset: Charset) -> Result<(), AddressError> {
    if label.is_empty() {
        return Err(AddressError::Syntax("the domain has an empty label"));
    }
    if label.len() > MAX_LABEL && (label.is_ascii() || label.len() > MAX_DOMAIN) {
        return Err(AddressError::Syntax("a label of the domain is too long"));
    }
    if label.starts_with('-') || label.ends_with('-') {
        return Err(AddressError::Syntax("a label of the domain starts or ends with a hyphen"));
    }
    for c in label.chars() {
        match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' => {}
            c if is_printable_beyond_ascii(c) => match charset {
                Charset::Utf8 => {}
                Charset::Ascii => return Err(AddressError::NeedsUtf8),
            },
            _ => return Err(AddressError::Syntax("the domain has a character that no domain has")),
        }
    }
    Ok(())
}

/// UTF-8 beyond ASCII without what would break a line, a header or a log: C1 controls, line and paragraph separators.
fn is_printable_beyond_ascii(c: char) -> bool {
    !c.is_ascii() && !c.is_control() && !matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}')
}

/// One mailbox, `local-part@domain`, kept as it was written (quotes included).
#[derive(Clone)]
pub struct Mailbox {
    text: Box<str>,
    /// Position of the `@` that parts local part and domain.
    at: u16,
}

impl Mailbox {
    /// Reads an RFC 5321 `Mailbox` (dot-string or quoted local part; with `Charset::Utf8` as RFC 6531 widens it).
    pub fn parse(text: &str, charset: Charset) -> Result<Self, AddressError> {
        let at = match text.starts_with('"') {
            true => quoted_length(text, charset)?,
            false => {
                let at = text
                    .find('@')
                    .ok_or(AddressError::Syntax("the address has no @ and domain"))?;
                check_dot_string(text.get(..at).unwrap_or_default(), charset)?;
                at
            }
        };
        if at > MAX_LOCAL {
            return Err(AddressError::Syntax("the local part is too long"));
        }
        let domain = text
            .get(at..)
            .and_then(|rest| rest.strip_prefix('@'))
            .ok_or(AddressError::Syntax("the address has no @ and domain"))?;
        Domain::parse(domain, charset)?;
        let at = u16::try_from(at)
            .map_err(|_longer| AddressError::Syntax("the local part is too long"))?;
        Ok(Self { text: text.into(), at })
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it is one with `other` to those who judge senders: no server that matters tells case in a local part, and
    /// a domain may be written with A-labels or U-labels.
    pub fn is_same(&self, other: &Self) -> bool {
        if self.as_str().eq_ignore_ascii_case(other.as_str()) {
            return true;
        }
        let unicode = |mailbox: &Self| unicode_domain(mailbox.domain());
        self.local_part().eq_ignore_ascii_case(other.local_part())
            && unicode(self).is_some_and(|domain| Some(domain) == unicode(other))
    }

    /// The local part as written; case and quotes matter (RFC 5321 2.4).
    pub fn local_part(&self) -> &str {
        self.text.get(..usize::from(self.at)).unwrap_or_default()
    }

    pub fn domain(&self) -> &str {
        self.text.get(usize::from(self.at) + 1..).unwrap_or_default()
    }

    /// Whether the whole address can be written without `SMTPUTF8`.
    pub fn is_ascii(&self) -> bool {
        self.text.is_ascii()
    }
}

/// Same local part to the letter, same domain without regard to case.
impl PartialEq for Mailbox {
    fn eq(&self, other: &Self) -> bool {
        self.local_part() == other.local_part()
            && self.domain().eq_ignore_ascii_case(other.domain())
    }
}

impl Eq for Mailbox {}

impl fmt::Display for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{}>", self.text)
    }
}

fn check_dot_string(local: &str, charset: Charset) -> Result<(), AddressError> {
    if local.is_empty() {
        return Err(AddressError::Syntax("the local part is missing"));
    }
    for atom in local.split('.') {
        if atom.is_empty() {
            return Err(AddressError::Syntax("the local part has an empty atom; quote it"));
        }
        for c in atom.chars() {
            match c {
                c if is_atext(c) => {}
                c if is_printable_beyond_ascii(c) => match charset {
                    Charset::Utf8 => {}
                    Charset::Ascii => return Err(AddressError::NeedsUtf8),
                },
                _ => {
                    return Err(AddressError::Syntax(
                        "the local part has a character that needs quotes",
                    ));
                }
            }
        }
    }
    Ok(())
}

/// RFC 5322 `atext` within ASCII.
fn is_atext(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-/=?^_`{|}~".contains(c)
}

/// The length in octets of the quoted string (RFC 5321 `Quoted-string`) that `text` starts with, quotes included.
fn quoted_length(text: &str, charset: Charset) -> Result<usize, AddressError> {
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok(at + 1),
            '\\' => match chars.next() {
                Some((_, ' '..='~')) => {}
                _ => {
                    return Err(AddressError::Syntax(
                        "a backslash in the local part quotes nothing",
                    ));
                }
            },
            ' '..='~' => {}
            c if is_printable_beyond_ascii(c) => match charset {
                Charset::Utf8 => {}
                Charset::Ascii => return Err(AddressError::NeedsUtf8),
            },
            _ => return Err(AddressError::Syntax("the local part has a control character")),
        }
    }
    Err(AddressError::Syntax("the quoted local part does not end"))
}

/// A domain, or a part of one, with its labels as a person reads them: A-labels as U-labels (RFC 5890 2.3.2.1), in lower
/// case, so that two spellings of one domain are one text. None where it has neither, or they are broken.
pub fn unicode_domain(domain: &str) -> Option<String> {
    let is_a_label =
        |label: &str| label.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("xn--"));
    if domain.is_ascii() && !domain.split('.').any(is_a_label) {
        return None;
    }
    let (unicode, valid) = idna::domain_to_unicode(domain);
    valid.is_ok().then_some(unicode)
}

/// Where a report about a message goes: MAIL FROM's argument. `<>` is a variant, never an empty string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReversePath {
    Null,
    Mailbox(Mailbox),
}

impl ReversePath {
    pub fn is_ascii(&self) -> bool {
        match self {
            Self::Null => true,
            Self::Mailbox(mailbox) => mailbox.is_ascii(),
        }
    }

    /// The address without brackets; empty for the null path, as `MAIL FROM:<>` writes it.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Null => "",
            Self::Mailbox(mailbox) => mailbox.as_str(),
        }
    }
}

/// With its angle brackets, as commands and headers write it.
impl fmt::Display for ReversePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{}>", self.as_str())
    }
}

/// Where a message is to go: RCPT TO's argument.
#[derive(Clone, Debug)]
pub enum ForwardPath {
    Mailbox(Mailbox),
    /// `<Postmaster>` without a domain (RFC 5321 4.1.1.3), as it was written.
    Postmaster(Box<str>),
}

impl ForwardPath {
    /// Reads the inside of the brackets of RCPT TO.
    pub fn parse(text: &str, charset: Charset) -> Result<Self, AddressError> {
        match text.eq_ignore_ascii_case("postmaster") {
            true => Ok(Self::Postmaster(text.into())),
            false => Mailbox::parse(text, charset).map(Self::Mailbox),
        }
    }

    pub fn is_ascii(&self) -> bool {
        self.as_str().is_ascii()
    }

    /// The address without brackets.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Mailbox(mailbox) => mailbox.as_str(),
            Self::Postmaster(text) => text,
        }
    }
}

/// As mailboxes compare; `Postmaster` in any case is the same (RFC 5321 4.1.1.3).
impl PartialEq for ForwardPath {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Mailbox(one), Self::Mailbox(other)) => one == other,
            (Self::Postmaster(_), Self::Postmaster(_)) => true,
            (Self::Mailbox(_), Self::Postmaster(_)) | (Self::Postmaster(_), Self::Mailbox(_)) => {
                false
            }
        }
    }
}

impl Eq for ForwardPath {}

/// With its angle brackets, as commands write it.
impl fmt::Display for ForwardPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{}>", self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn taken(text: &str, charset: Charset) {
        let mailbox = Mailbox::parse(text, charset).unwrap_or_else(|e| panic!("{text:?}: {e}"));
        assert_eq!(mailbox.as_str(), text);
        assert_eq!(format!("{}@{}", mailbox.local_part(), mailbox.domain()), text);
    }

    #[track_caller]
    fn refused(text: &str) {
        for charset in [Charset::Ascii, Charset::Utf8] {
            assert!(Mailbox::parse(text, charset).is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn ordinary_and_odd_addresses_are_kept_as_written() {
        for text in [
            "a@b",
            "reports@Example.COM",
            "o'brien+tag@example.com",
            "user%host@example.com",
            "a!b@example.com",
            "\"two words\"@example.com",
            "\"at@sign\"@example.com",
            "\"quote\\\"d\"@example.com",
            "\"\"@example.com",
            "x@[192.0.2.1]",
            "x@[IPv6:2001:db8::1]",
            "svc@host_name.internal",
        ] {
            taken(text, Charset::Ascii);
            taken(text, Charset::Utf8);
        }
    }

    #[test]
    fn utf8_needs_smtputf8() {
        for text in ["jörg@example.com", "x@bücher.example", "\"ü ü\"@example.com"] {
            taken(text, Charset::Utf8);
            assert_eq!(
                Mailbox::parse(text, Charset::Ascii),
                Err(AddressError::NeedsUtf8),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "@",
            "a@",
            "@b",
            "a",
            "a b@c",
            "a..b@c",
            ".a@c",
            "a.@c",
            "a@b..c",
            "a@.b",
            "a@b.",
            "a@-b",
            "a@b-",
            "a@b c",
            "a@b\r\nRCPT TO:<x@y>",
            "a\0@b",
            "a@b\0",
            "\"a@b",
            "\"a\"b@c",
            "\"a\\\"@b",
            "a@[1.2.3]",
            "a@[1.2.3.4",
            "a@[IPv6:zz]",
            "a@b@c",
            "a,b@c",
            "a<b@c",
            "a@b>",
            "a\u{85}@b",
            "\"a\u{2028}\"@b",
            "a@b\u{7f}",
            "(c)a@b",
        ] {
            refused(text);
        }
        refused(&format!("{}@b", "x".repeat(257)));
        refused(&format!("a@{}", "x".repeat(64)));
        refused(&format!("a@{}", ["x"; 129].join(".")));
    }

    #[test]
    fn domains_compare_without_case_and_local_parts_with_it() {
        let parse = |text| Mailbox::parse(text, Charset::Ascii).unwrap();
        assert_eq!(parse("a@EXAMPLE.com"), parse("a@example.COM"));
        assert_ne!(parse("A@example.com"), parse("a@example.com"));
    }

    #[test]
    fn postmaster_needs_no_domain() {
        let path = ForwardPath::parse("PostMaster", Charset::Ascii).unwrap();
        assert_eq!(path.to_string(), "<PostMaster>");
        assert_eq!(path, ForwardPath::parse("postmaster", Charset::Utf8).unwrap());
        assert!(ForwardPath::parse("root", Charset::Ascii).is_err());
    }
}
