//! Command lines: a pure function from a line to a [`Command`] or to the [`Reply`] that refuses it.
//!
//! It is lenient where old clients are sloppy and nothing is lost by it (no brackets, blanks behind the colon, trailing
//! blanks), and strict wherever two readers could understand a line in two ways (R12, R20).

use std::str;

use crate::smtp::address::{AddressError, Charset, Domain, ForwardPath, Mailbox, ReversePath};
use crate::smtp::params::{BodyType, MailParams, Notify, Recipient, Ret};
use crate::smtp::reply::{self, Reply};

/// Longest argument of HELO and EHLO, in octets (RFC 5321 4.5.3.1.2).
const MAX_HELO: usize = 255;
/// Longest `ENVID`, in characters (RFC 3461 4.4).
const MAX_ENVID: usize = 100;
/// Longest `ORCPT`, in characters (RFC 3461 4.2).
const MAX_ORCPT: usize = 500;

/// A command in valid form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    Helo(Box<str>),
    Ehlo(Box<str>),
    Mail(MailParams),
    Rcpt(Recipient),
    Data,
    Bdat(Chunk),
    Rset,
    Noop,
    Help,
    Vrfy,
    Quit,
}

/// The argument of BDAT (RFC 3030). It says how many octets follow even where the command is refused, so those can be
/// read over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// `None`: not a number, so nobody knows where the chunk ends. A number beyond 64 bits is the largest one.
    pub size: Option<u64>,
    /// `None`: something else than `LAST` stood behind the size.
    pub last: Option<bool>,
}

/// Reads a command line without its end. `charset` is that of the open transaction, for RCPT; MAIL says its own.
pub fn parse(line: &[u8], charset: Charset) -> Result<Command, Reply> {
    if line.iter().any(|octet| matches!(octet, 0..=8 | 10..=31 | 127)) {
        return Err(reply::control_character());
    }
    let line = line.trim_ascii_end();
    let end = line.iter().position(|octet| is_blank(*octet)).unwrap_or(line.len());
    let (verb, argument) = line.split_at_checked(end).unwrap_or((line, b""));
    let argument = argument.trim_ascii_start();
    match verb.to_ascii_uppercase().as_slice() {
        b"HELO" => hello(argument).map(Command::Helo),
        b"EHLO" => hello(argument).map(Command::Ehlo),
        b"MAIL" => mail(argument).map(Command::Mail),
        b"RCPT" => rcpt(argument, charset).map(Command::Rcpt),
        b"DATA" => alone(argument, Command::Data),
        b"BDAT" => Ok(Command::Bdat(chunk(argument))),
        b"RSET" => alone(argument, Command::Rset),
        b"NOOP" => Ok(Command::Noop),
        b"HELP" => Ok(Command::Help),
        b"VRFY" if argument.is_empty() => Err(reply::argument_missing()),
        b"VRFY" => Ok(Command::Vrfy),
        b"QUIT" => alone(argument, Command::Quit),
        b"EXPN" | b"ETRN" | b"TURN" | b"SEND" | b"SOML" | b"SAML" | b"AUTH" | b"STARTTLS" => {
            Err(reply::not_implemented())
        }
        _ => Err(reply::unknown_command()),
    }
}

/// Whether a line is the command `verb` (in capitals), in whatever form.
pub fn is(line: &[u8], verb: &[u8]) -> bool {
    line.get(..verb.len()).is_some_and(|start| start.eq_ignore_ascii_case(verb))
        && line.get(verb.len()).is_none_or(|octet| is_blank(*octet))
}

/// Whether a line starts as an HTTP request does: a browser was led here to speak in another's name (R15).
pub fn is_http(line: &[u8]) -> bool {
    const VERBS: [&[u8]; 9] = [
        b"GET ",
        b"POST ",
        b"PUT ",
        b"HEAD ",
        b"OPTIONS ",
        b"CONNECT ",
        b"DELETE ",
        b"PATCH ",
        b"TRACE ",
    ];
    VERBS.iter().any(|verb| line.get(..verb.len()).is_some_and(|l| l.eq_ignore_ascii_case(verb)))
}

fn is_blank(octet: u8) -> bool {
    matches!(octet, b' ' | b'\t')
}

fn alone(argument: &[u8], command: Command) -> Result<Command, Reply> {
    match argument.is_empty() {
        true => Ok(command),
        false => Err(reply::argument_not_allowed()),
    }
}

/// Anything printable will do: old devices name themselves with blanks, underscores and umlauts, and nothing is decided
/// by it.
fn hello(argument: &[u8]) -> Result<Box<str>, Reply> {
    if argument.is_empty() {
        return Err(reply::argument_missing());
    }
    match str::from_utf8(argument) {
        Ok(name) if !name.chars().any(char::is_control) && name.len() <= MAX_HELO => {
            Ok(name.into())
        }
        _ => Err(reply::bad_hello()),
    }
}

fn chunk(argument: &[u8]) -> Chunk {
    let mut words = argument.split(|octet| is_blank(*octet)).filter(|word| !word.is_empty());
    let size = words.next().and_then(decimal);
    let last = match (words.next(), words.next()) {
        (None, _) => Some(false),
        (Some(word), None) if word.eq_ignore_ascii_case(b"LAST") => Some(true),
        _ => None,
    };
    Chunk { size, last }
}

/// Digits only; a number beyond 64 bits is the largest one.
fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |number, digit| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        Some(number.saturating_mul(10).saturating_add(digit))
    })
}

fn mail(argument: &[u8]) -> Result<MailParams, Reply> {
    let argument = after_keyword(argument, b"FROM:").ok_or_else(reply::mail_syntax)?;
    let (path, rest) = split_path(argument).ok_or_else(|| reply::bad_reverse_path("no path"))?;
    let params = Params::read(rest)?;
    let smtputf8 = params.has(b"SMTPUTF8");
    let charset = if smtputf8 { Charset::Utf8 } else { Charset::Ascii };
    let mut mail = MailParams {
        reverse_path: reverse_path(path, charset)?,
        declared_size: None,
        body: BodyType::SevenBit,
        smtputf8,
        ret: None,
        envid: None,
    };
    for (key, value) in params.0 {
        match (key.to_ascii_uppercase().as_slice(), value) {
            (b"SIZE", Some(value)) if value.len() <= 20 => {
                mail.declared_size = Some(decimal(value).ok_or_else(reply::bad_parameter)?);
            }
            (b"BODY", Some(value)) => mail.body = body_type(value)?,
            (b"SMTPUTF8", None) => {}
            (b"RET", Some(value)) => mail.ret = Some(ret(value)?),
            (b"ENVID", Some(value)) if value.len() <= MAX_ENVID => {
                mail.envid = Some(xtext(value, Charset::Ascii)?.into());
            }
            (b"SIZE" | b"BODY" | b"SMTPUTF8" | b"RET" | b"ENVID", _) => {
                return Err(reply::bad_parameter());
            }
            _ => return Err(reply::unknown_parameter()),
        }
    }
    Ok(mail)
}

fn rcpt(argument: &[u8], charset: Charset) -> Result<Recipient, Reply> {
    let argument = after_keyword(argument, b"TO:").ok_or_else(reply::rcpt_syntax)?;
    let (path, rest) = split_path(argument).ok_or_else(|| reply::bad_forward_path("no path"))?;
    let params = Params::read(rest)?;
    let mut rcpt =
        Recipient { path: forward_path(path, charset)?, notify: Notify::Unsaid, orcpt: None };
    for (key, value) in params.0 {
        match (key.to_ascii_uppercase().as_slice(), value) {
            (b"NOTIFY", Some(value)) => rcpt.notify = notify(value)?,
            (b"ORCPT", Some(value)) if value.len() <= MAX_ORCPT => {
                rcpt.orcpt = Some(orcpt(value, charset)?.into());
            }
            (b"NOTIFY" | b"ORCPT", _) => return Err(reply::bad_parameter()),
            _ => return Err(reply::unknown_parameter()),
        }
    }
    Ok(rcpt)
}

/// What follows `FROM:` or `TO:`, without the blanks that sloppy clients put there.
fn after_keyword<'a>(argument: &'a [u8], keyword: &[u8]) -> Option<&'a [u8]> {
    let (start, rest) = argument.split_at_checked(keyword.len())?;
    start.eq_ignore_ascii_case(keyword).then(|| rest.trim_ascii_start())
}

/// Parts the path from its parameters: the inside of `<...>`, or a word where a sloppy client left the brackets out. A
/// quoted local part may hold blanks and brackets.
fn split_path(argument: &[u8]) -> Option<(&[u8], &[u8])> {
    let bracketed = argument.first() == Some(&b'<');
    let text = if bracketed { argument.get(1..)? } else { argument };
    let (mut quoted, mut escaped) = (false, false);
    let end = text.iter().position(|octet| {
        if escaped {
            escaped = false;
            return false;
        }
        match octet {
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'>' if bracketed => return !quoted,
            octet if !bracketed && is_blank(*octet) => return !quoted,
            _ => {}
        }
        false
    });
    let (path, rest) = match (bracketed, end) {
        (true, Some(end)) => (text.get(..end)?, text.get(end + 1..)?),
        (true, None) => return None,
        (false, end) => text.split_at_checked(end.unwrap_or(text.len()))?,
    };
    let parted = rest.first().is_none_or(|octet| is_blank(*octet));
    let there = bracketed || !path.is_empty();
    (parted && there).then_some((path, rest))
}

fn reverse_path(path: &[u8], charset: Charset) -> Result<ReversePath, Reply> {
    if path.is_empty() {
        return Ok(ReversePath::Null);
    }
    let text = match str::from_utf8(path) {
        Ok(text) => text,
        Err(_) if charset == Charset::Ascii => return Err(reply::needs_utf8()),
        Err(_) => return Err(reply::bad_reverse_path("the address is not UTF-8")),
    };
    without_route(text, charset)
        .and_then(|text| Mailbox::parse(text, charset))
        .map(ReversePath::Mailbox)
        .map_err(|error| match error {
            AddressError::NeedsUtf8 => reply::needs_utf8(),
            AddressError::Syntax(why) => reply::bad_reverse_path(why),
        })
}

fn forward_path(path: &[u8], charset: Charset) -> Result<ForwardPath, Reply> {
    let text = match str::from_utf8(path) {
        Ok(text) => text,
        Err(_) if charset == Charset::Ascii => return Err(reply::needs_utf8()),
        Err(_) => return Err(reply::bad_forward_path("the address is not UTF-8")),
    };
    without_route(text, charset).and_then(|text| ForwardPath::parse(text, charset)).map_err(
        |error| match error {
            AddressError::NeedsUtf8 => reply::needs_utf8(),
            AddressError::Syntax(why) => reply::bad_forward_path(why),
        },
    )
}

/// The mailbox behind a source route `@a,@b:`, which is read and ignored (RFC 5321 3.6.1, appendix C and F.2).
fn without_route(path: &str, charset: Charset) -> Result<&str, AddressError> {
    if !path.starts_with('@') {
        return Ok(path);
    }
    let bad = AddressError::Syntax("the source route is not one");
    // An IPv6 literal in the route has colons of its own; nobody writes that.
    let (route, mailbox) = path.split_once(':').ok_or(bad)?;
    for hop in route.split(',') {
        Domain::parse(hop.strip_prefix('@').ok_or(bad)?, charset)?;
    }
    Ok(mailbox)
}

/// ESMTP parameters, `KEY` or `KEY=VALUE` (RFC 5321 4.1.2), each key at most once.
struct Params<'a>(Vec<(&'a [u8], Option<&'a [u8]>)>);

impl<'a> Params<'a> {
    fn read(rest: &'a [u8]) -> Result<Self, Reply> {
        let mut params = Self(Vec::new());
        for word in rest.split(|octet| is_blank(*octet)).filter(|word| !word.is_empty()) {
            let (key, value) = match word.iter().position(|octet| *octet == b'=') {
                Some(at) => {
                    let value = word.get(at + 1..).unwrap_or_default();
                    (word.get(..at).unwrap_or_default(), Some(value))
                }
                None => (word, None),
            };
            let named = key.first().is_some_and(u8::is_ascii_alphanumeric)
                && key.iter().all(|octet| octet.is_ascii_alphanumeric() || *octet == b'-');
            let valued = value.is_none_or(|value| !value.is_empty() && !value.contains(&b'='));
            if !named || !valued {
                return Err(reply::bad_parameter());
            }
            if params.has(key) {
                return Err(reply::duplicate_parameter());
            }
            params.0.push((key, value));
        }
        Ok(params)
    }

    fn has(&self, name: &[u8]) -> bool {
        self.0.iter().any(|(key, _)| key.eq_ignore_ascii_case(name))
    }
}

fn body_type(value: &[u8]) -> Result<BodyType, Reply> {
    match value.to_ascii_uppercase().as_slice() {
        b"7BIT" => Ok(BodyType::SevenBit),
        b"8BITMIME" => Ok(BodyType::EightBitMime),
        // RFC 3030 offers it under a keyword of its own, which we do not list.
        b"BINARYMIME" => Err(reply::unknown_parameter()),
        _ => Err(reply::bad_parameter()),
    }
}

fn ret(value: &[u8]) -> Result<Ret, Reply> {
    match value.to_ascii_uppercase().as_slice() {
        b"FULL" => Ok(Ret::Full),
        b"HDRS" => Ok(Ret::Headers),
        _ => Err(reply::bad_parameter()),
    }
}

fn notify(value: &[u8]) -> Result<Notify, Reply> {
    if value.eq_ignore_ascii_case(b"NEVER") {
        return Ok(Notify::Never);
    }
    let (mut success, mut failure, mut delay) = (false, false, false);
    for word in value.split(|octet| *octet == b',') {
        match word.to_ascii_uppercase().as_slice() {
            b"SUCCESS" => success = true,
            b"FAILURE" => failure = true,
            b"DELAY" => delay = true,
            _ => return Err(reply::bad_parameter()),
        }
    }
    Ok(Notify::On { success, failure, delay })
}

/// `type;xtext`. In a transaction with `SMTPUTF8` the address may be written in UTF-8 (RFC 6533 3).
fn orcpt(value: &[u8], charset: Charset) -> Result<&str, Reply> {
    let at = value.iter().position(|octet| *octet == b';').ok_or_else(reply::bad_parameter)?;
    let kind = value.get(..at).unwrap_or_default();
    let utf8 = kind.eq_ignore_ascii_case(b"utf-8");
    let named = !kind.is_empty()
        && kind.iter().all(|octet| octet.is_ascii_alphanumeric() || *octet == b'-');
    if !named {
        return Err(reply::bad_parameter());
    }
    let charset = if utf8 { charset } else { Charset::Ascii };
    xtext(value.get(at + 1..).unwrap_or_default(), charset)?;
    str::from_utf8(value).map_err(|_not_utf8| reply::bad_parameter())
}

/// Checks xtext (RFC 3461 4): printable ASCII without `=`, and `+` only before two upper-case hexadecimal digits. What
/// it encodes is not looked at: it goes on as it came.
fn xtext(value: &[u8], charset: Charset) -> Result<&str, Reply> {
    let text = str::from_utf8(value).map_err(|_not_utf8| reply::bad_parameter())?;
    let hex = |octet: Option<&u8>| matches!(octet, Some(b'0'..=b'9' | b'A'..=b'F'));
    let valid = |(at, octet): (usize, &u8)| match octet {
        b'+' => hex(value.get(at + 1)) && hex(value.get(at + 2)),
        b'=' => false,
        b'!'..=b'~' => true,
        _ => charset == Charset::Utf8 && !octet.is_ascii(),
    };
    let controls = text.chars().any(|c| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}'));
    match !text.is_empty() && !controls && value.iter().enumerate().all(valid) {
        true => Ok(text),
        false => Err(reply::bad_parameter()),
    }
}

#[cfg(test)]
mod tests;
