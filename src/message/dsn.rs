//! Reports on what became of a message (RFC 3464, RFC 6522), and the other letters that start here. Pure.
//!
//! Everything is ASCII wherever the standards leave a choice, so that any upstream takes it. Words and addresses of
//! strangers are escaped, bounded and folded: none of them ends a line, a header or a part.

use std::fmt::Write as _;

use lettre::message::header::{
    ContentTransferEncoding, ContentType, HeaderName, HeaderValue, Headers,
};
use lettre::message::{Body, MultiPart, SinglePart};

use crate::envelope::{Client, Envelope, Kind, Rcpt, SpoolId, UnixMillis};
use crate::message::received::date;
use crate::outcome::{Cause, Receipt, Stage};
use crate::smtp::address::{Mailbox, ReversePath};
use crate::smtp::reply::{EnhancedStatus, Escaped};

/// Octets of a header that is returned.
pub const MAX_HEADER: usize = 64 * 1024;
/// Octets of a message that is returned whole; of a larger one its header is.
pub const MAX_FULL: u64 = 1_000_000;
/// Recipients that the readable part names, for each thing that can have happened to them.
const MAX_NAMED: usize = 100;
/// Characters of a remote's words, and of a subject.
const MAX_WORDS: usize = 1_000;
const MAX_SUBJECT: usize = 200;
/// Where a field is folded, and where a word that is longer is cut (RFC 5322 2.1.1).
const FOLD: usize = 76;
const CUT: usize = 900;

/// Who writes to whom, and when.
#[derive(Clone, Copy, Debug)]
pub struct Letterhead<'a> {
    /// Of the letter itself.
    pub id: SpoolId,
    pub at: UnixMillis,
    pub hostname: &'a str,
    pub from: &'a Mailbox,
    pub to: &'a Mailbox,
}

/// What is told of one message.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    pub letterhead: Letterhead<'a>,
    pub reader: Reader,
    pub original: &'a Envelope,
    /// At least one.
    pub entries: &'a [Entry<'a>],
    /// The name of the server that was asked.
    pub remote: Option<&'a str>,
    pub returned: Returned<'a>,
}

/// Whom a report is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Who sent the message.
    Author,
    /// Who runs this gateway, in the author's stead.
    Postmaster(Why),
}

/// Why the author is not told himself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The reverse path is null.
    NoAuthor,
    /// The address is of this house alone.
    LocalAuthor,
    /// He is who could not be reached.
    AuthorFailed,
    /// `bounce.to` says so.
    Chosen,
    /// The message is a report to him, which could not be delivered.
    ReportFailed,
}

/// What is told of one recipient.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    pub rcpt: &'a Rcpt,
    pub news: News<'a>,
}

/// `Action` of RFC 3464 2.3.3.
#[derive(Clone, Copy, Debug)]
pub enum News<'a> {
    Failed(&'a Cause),
    /// It is still tried, unless it comes to an end before; until about then, where that is known.
    Delayed(&'a Cause, Option<UnixMillis>),
    /// Handed on to a server that will not report its delivery.
    Relayed(&'a Receipt),
}

/// What goes back of the message, as it was stored: header lines that were put before it included.
#[derive(Clone, Copy, Debug)]
pub enum Returned<'a> {
    Header(&'a [u8]),
    Full(&'a [u8]),
}

/// Composes a report (`multipart/report`).
pub fn report(report: &Report<'_>) -> Vec<u8> {
    let Report { letterhead, returned, .. } = report;
    let header = match returned {
        Returned::Header(bytes) | Returned::Full(bytes) => header_of(bytes),
    };
    let subject = match report.reader {
        Reader::Author => format!("Your {}", subject(report.entries)),
        Reader::Postmaster(_) => format!("A {}", subject(report.entries)),
    };
    let mut top = top(letterhead, &subject, "auto-replied");
    if let Some(id) = message_id(header) {
        for name in ["In-Reply-To", "References"] {
            put(&mut top, name, id.clone());
        }
    }
    // No one who wrote the message that comes back can have known the id of the report.
    let boundary = format!("=_{}", letterhead.id);
    let kind = format!("multipart/report; report-type=delivery-status; boundary=\"{boundary}\"");
    let (returned, encoding) = returned_part(report);
    let mut parts = MultiPart::builder().header(content_type(&kind));
    // RFC 2045 6.4: no part needs more than the whole says.
    if encoding == ContentTransferEncoding::EightBit {
        parts = parts.header(encoding);
    }
    let parts = parts
        .singlepart(text(readable(report, header)))
        .singlepart(part(
            "message/delivery-status",
            delivery_status(report).into_bytes(),
            ContentTransferEncoding::SevenBit,
        ))
        .singlepart(returned);
    let mut out = top.to_string().into_bytes();
    out.extend_from_slice(&parts.formatted());
    out
}

/// Composes a letter of nothing but text, to a person who runs this gateway.
pub fn notice(letterhead: &Letterhead<'_>, subject: &str, words: String) -> Vec<u8> {
    let mut out = top(letterhead, subject, "auto-generated").to_string().into_bytes();
    out.extend_from_slice(&text(words).formatted());
    out
}

/// The header of a content: up to its empty line, at most [`MAX_HEADER`] octets, whole lines.
pub fn header_of(content: &[u8]) -> &[u8] {
    let bounded = content.get(..MAX_HEADER).unwrap_or(content);
    if bounded.starts_with(b"\r\n") {
        return &[];
    }
    let end = bounded.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 2);
    let last_line = || bounded.windows(2).rposition(|two| two == b"\r\n").map(|at| at + 2);
    let end = match end {
        Some(end) => end,
        None if bounded.len() == content.len() => content.len(),
        None => last_line().unwrap_or(bounded.len()),
    };
    bounded.get(..end).unwrap_or(bounded)
}

fn top(letterhead: &Letterhead<'_>, subject: &str, auto_submitted: &str) -> Headers {
    let Letterhead { id, at, hostname, from, to } = letterhead;
    let mut top = Headers::new();
    // A host name has no character that ends a quoted string.
    put(&mut top, "From", format!("\"Mail gateway {hostname}\" <{from}>"));
    put(&mut top, "To", format!("<{to}>"));
    top.insert_raw(HeaderValue::new(name("Subject"), subject.to_owned()));
    put(&mut top, "Date", date(*at));
    put(&mut top, "Message-ID", format!("<{id}@{hostname}>"));
    put(&mut top, "Auto-Submitted", auto_submitted.to_owned());
    put(&mut top, "MIME-Version", "1.0".to_owned());
    top
}

/// A field whose value is safe as it is.
fn put(headers: &mut Headers, field: &str, value: String) {
    headers.insert_raw(HeaderValue::dangerous_new_pre_encoded(name(field), value.clone(), value));
}

#[expect(clippy::expect_used, reason = "the names are constants of this file")]
fn name(field: &str) -> HeaderName {
    HeaderName::new_from_ascii(field.to_owned()).expect("the name of a field is ASCII")
}

#[expect(clippy::expect_used, reason = "the types are made in this file")]
fn content_type(text: &str) -> ContentType {
    ContentType::parse(text).expect("a type with known parameters can be parsed")
}

fn text(words: String) -> SinglePart {
    SinglePart::builder()
        .header(content_type("text/plain; charset=utf-8"))
        .header(ContentTransferEncoding::QuotedPrintable)
        .body(words)
}

fn part(kind: &str, octets: Vec<u8>, encoding: ContentTransferEncoding) -> SinglePart {
    SinglePart::builder()
        .header(content_type(kind))
        .body(Body::dangerous_pre_encoded(octets, encoding))
}

/// What comes back of the message, and how that is encoded. What needed SMTPUTF8 has types of its own (RFC 6533 4);
/// the part for programs needs none, for it names such addresses in ASCII.
fn returned_part(report: &Report<'_>) -> (SinglePart, ContentTransferEncoding) {
    use ContentTransferEncoding::{EightBit, QuotedPrintable, SevenBit};
    let (content, is_whole) = match report.returned {
        Returned::Header(content) => (header_of(content), false),
        Returned::Full(content) => (content, true),
    };
    let header = header_of(content);
    let is_global =
        report.original.smtputf8 && !header.is_ascii() && std::str::from_utf8(header).is_ok();
    let kind = match (is_whole, is_global) {
        (true, true) => "message/global",
        (true, false) => "message/rfc822",
        (false, true) => "message/global-headers",
        (false, false) => "text/rfc822-headers",
    };
    let encoding = match (is_whole, is_global) {
        _ if is_seven_bit(content) => SevenBit,
        // A message within a message may not be encoded (RFC 2046 5.2.1).
        (true, _) => EightBit,
        // As it is, where that is possible (RFC 6533 6.3).
        (false, true) if is_eight_bit(content) => EightBit,
        // It may be encoded where it must (RFC 6522 4).
        (false, _) => QuotedPrintable,
    };
    let part = match encoding {
        QuotedPrintable => SinglePart::builder()
            .header(content_type(kind))
            .header(QuotedPrintable)
            .body(content.to_vec()),
        _ => part(kind, content.to_vec(), encoding),
    };
    (part, encoding)
}

/// RFC 2045 2.7.
fn is_seven_bit(octets: &[u8]) -> bool {
    let is_plain = |octet: &u8| matches!(octet, b'\t' | b'\r' | b'\n' | b' '..=b'~');
    octets.iter().all(is_plain) && has_short_lines(octets)
}

/// RFC 2045 2.8.
fn is_eight_bit(octets: &[u8]) -> bool {
    !octets.contains(&0) && has_short_lines(octets)
}

fn has_short_lines(octets: &[u8]) -> bool {
    octets.split(|octet| *octet == b'\n').all(|line| line.len() <= 999)
}

fn subject(entries: &[Entry<'_>]) -> &'static str {
    let any = |is: fn(&News<'_>) -> bool| entries.iter().any(|entry| is(&entry.news));
    if any(|news| matches!(news, News::Failed(_))) {
        "message could not be delivered"
    } else if any(|news| matches!(news, News::Delayed(..))) {
        "message is delayed and is still being tried"
    } else {
        "message was handed on"
    }
}

/// The part for people.
fn readable(report: &Report<'_>, header: &[u8]) -> String {
    let Report { letterhead, reader, original, entries, remote, .. } = report;
    let mut out = format!(
        "This is the mail gateway at {}. It writes to you by itself;\nnobody reads what you answer to it.\n\n",
        letterhead.hostname
    );
    let about = match reader {
        Reader::Author => "This is about your message",
        Reader::Postmaster(_) => "This is about a message",
    };
    out.push_str(about);
    if let Some(subject) = plain_field(header, b"subject") {
        let subject: String = subject.chars().take(MAX_SUBJECT).collect();
        // Writing to a string does not fail.
        let _infallible = write!(out, " \"{subject}\"");
    }
    let _infallible = writeln!(out, "\nof {}.", date(original.accepted));
    if let Reader::Postmaster(why) = reader {
        introduce(&mut out, original, *why);
    }
    let of = |is: fn(&News<'_>) -> bool| -> Vec<&Entry<'_>> {
        entries.iter().filter(|entry| is(&entry.news)).collect()
    };
    let failed = of(|news| matches!(news, News::Failed(_)));
    let delayed = of(|news| matches!(news, News::Delayed(..)));
    let relayed = of(|news| matches!(news, News::Relayed(_)));
    let remote = remote.unwrap_or("the mail server");
    if !failed.is_empty() {
        out.push_str("\nIt was NOT delivered to:\n");
        name_all(&mut out, &failed, remote);
        out.push_str("\nWhat happens next: nothing. It is not sent to them again.\n");
        match (reader, original.kind) {
            (Reader::Author, _) => out.push_str(
                "What to do: read the answer above; it often says what is wrong. Check the\n\
                 address for a typing error and send the message again, or reach them in\n\
                 another way. If the answer makes no sense to you, pass this report on to\n\
                 who looks after your mail.\n",
            ),
            (Reader::Postmaster(_), Kind::Mail) => out.push_str(
                "What to do: read the answer above; it often says what is wrong. Where an\n\
                 address is wrong, have it put right in what sent the message. It is kept for\n\
                 a while: `mailsluice queue show` tells its story by the number below, and\n\
                 `queue retry` sends it again.\n",
            ),
            (Reader::Postmaster(_), Kind::Report | Kind::Notice) => out.push_str(
                "What to do: see to it that who sent the first message hears of what the\n\
                 report says, which is attached, and writes from an address that mail reaches.\n",
            ),
        }
    }
    if !delayed.is_empty() {
        out.push_str("\nIt is delayed. It was not delivered YET to:\n");
        name_all(&mut out, &delayed, remote);
        out.push_str("\nWhat happens next: it is tried again and again");
        let until = delayed.iter().filter_map(|entry| match entry.news {
            News::Delayed(_, until) => until,
            News::Failed(_) | News::Relayed(_) => None,
        });
        if let Some(until) = until.max() {
            let _infallible = write!(out, ", until about\n{}", date(until));
        }
        // Only those of NOTIFY=FAILURE, said or unsaid, are told of (RFC 3461 4.1).
        let told = delayed.iter().filter(|entry| entry.rcpt.notify.wants_failure()).count();
        out.push_str(match told {
            0 => {
                ". You are not told\nif it cannot be delivered in the end: nobody asked for that.\n"
            }
            told if told < delayed.len() => {
                ". Where that was asked\nfor, you are told if it cannot be delivered in the end.\n"
            }
            _ => ". You are told\nif it cannot be delivered in the end.\n",
        });
        out.push_str("What to do: nothing. Do not send it again.\n");
    }
    if !relayed.is_empty() {
        out.push_str("\nIt was handed on for:\n");
        name_all(&mut out, &relayed, remote);
        out.push_str(
            "\nWhat happens next: that server delivers it, and it does not confirm deliveries,\n\
             although that was asked for. You may hear no more.\n\
             What to do: nothing.\n",
        );
    }
    let others = original.rcpts.len().saturating_sub(entries.len());
    if others > 0 {
        let _infallible = writeln!(
            out,
            "\nThis report says nothing about the other recipients of the message ({others})."
        );
    }
    let _infallible = writeln!(out, "\nThe number of the message at the gateway: {}", original.id);
    out
}

/// Tells who runs the gateway what the author would know: who sent this, and from where.
fn introduce(out: &mut String, original: &Envelope, why: Why) {
    let shown = |text: &str| -> String {
        Escaped(text.as_bytes()).to_string().chars().take(MAX_SUBJECT).collect()
    };
    let Client { address, helo } = &original.client;
    let client = match original.kind {
        Kind::Mail => format!("{}, which calls itself {}", shown(address), shown(helo)),
        Kind::Report | Kind::Notice => "this gateway".to_owned(),
    };
    let sender = match &original.reverse_path {
        ReversePath::Mailbox(sender) => format!("<{}>", shown(sender.as_str())),
        ReversePath::Null => "none (MAIL FROM:<>)".to_owned(),
    };
    let why = match why {
        Why::NoAuthor => "it names no sender who could be told",
        Why::LocalAuthor => "no mail can come to its sender's address",
        Why::AuthorFailed => "its sender is who could not be reached",
        Why::Chosen => "`bounce.to` says so",
        Why::ReportFailed => "it is a report that could not be delivered itself",
    };
    let _infallible = write!(
        out,
        "It came from: {client}\nIts sender: {sender}\n\
         You are told, as `bounce.postmaster`, because\n{why}.\n"
    );
}

fn name_all(out: &mut String, entries: &[&Entry<'_>], remote: &str) {
    for entry in entries.iter().take(MAX_NAMED) {
        let (words, stage) = match entry.news {
            News::Failed(cause) | News::Delayed(cause, _) => (&cause.words, cause.stage),
            News::Relayed(receipt) => (&receipt.words, Stage::EndOfData),
        };
        let said: String = words.to_string().chars().take(MAX_WORDS).collect();
        let path = Escaped(entry.rcpt.path.as_str().as_bytes());
        let who = match stage {
            Stage::Local => "the gateway says".to_owned(),
            Stage::Connect => format!("{remote} could not be reached"),
            _ => format!("{remote} answered"),
        };
        let _infallible = writeln!(out, "\n  {path}\n    {who}: {said}");
    }
    if let Some(more @ 1..) = entries.len().checked_sub(MAX_NAMED) {
        let _infallible =
            writeln!(out, "\n  and {more} more, who are in the details attached to this report");
    }
}

/// The part for programs (RFC 3464 2.1).
fn delivery_status(report: &Report<'_>) -> String {
    let Report { letterhead, original, entries, remote, .. } = report;
    let mut out = String::new();
    if let Some(envid) = &original.envid {
        line(&mut out, "Original-Envelope-Id", &from_xtext(envid));
    }
    field(&mut out, "Reporting-MTA", &format!("dns; {}", letterhead.hostname));
    field(&mut out, "Arrival-Date", &date(original.accepted));
    for entry in *entries {
        out.push_str("\r\n");
        if let Some((kind, path)) = entry.rcpt.orcpt.as_deref().and_then(|it| it.split_once(';')) {
            // That of type utf-8 is in a form of its own, which is kept (RFC 6533 3).
            let path = match kind.eq_ignore_ascii_case("utf-8") {
                true => utf8_orcpt(path),
                false => from_xtext(path),
            };
            line(&mut out, "Original-Recipient", &format!("{};{path}", ascii(kind.as_bytes())));
        }
        let path = entry.rcpt.path.as_str();
        let kind = if path.is_ascii() { "rfc822" } else { "utf-8" };
        let written = if path.is_ascii() { path.to_owned() } else { utf8_addr_xtext(path) };
        line(&mut out, "Final-Recipient", &format!("{kind};{written}"));
        let (action, words, stage, status) = match entry.news {
            News::Failed(cause) => ("failed", &cause.words, cause.stage, cause.status),
            News::Delayed(cause, _) => ("delayed", &cause.words, cause.stage, cause.status),
            News::Relayed(receipt) => {
                let said = receipt.words.as_bytes().get(4..).unwrap_or_default();
                ("relayed", &receipt.words, Stage::EndOfData, EnhancedStatus::parse(said))
            }
        };
        let status = status.unwrap_or(match entry.news {
            News::Failed(_) => EnhancedStatus(5, 0, 0),
            News::Delayed(..) => EnhancedStatus(4, 0, 0),
            News::Relayed(_) => EnhancedStatus(2, 0, 0),
        });
        field(&mut out, "Action", action);
        field(&mut out, "Status", &status.to_string());
        if let (Some(remote), true) = (remote, stage != Stage::Local) {
            field(&mut out, "Remote-MTA", &format!("dns; {}", ascii(remote.as_bytes())));
        }
        // What no server said has a type of its own.
        let is_smtp = (Stage::Mail..=Stage::EndOfData).contains(&stage);
        let kind = if is_smtp { "smtp" } else { "x-mailsluice" };
        field(&mut out, "Diagnostic-Code", &format!("{kind}; {}", ascii(words.as_bytes())));
        field(&mut out, "Last-Attempt-Date", &date(letterhead.at));
        if let News::Delayed(_, Some(until)) = entry.news {
            field(&mut out, "Will-Retry-Until", &date(until));
        }
    }
    out
}

/// Octets of a stranger as printable ASCII, bounded.
fn ascii(octets: &[u8]) -> String {
    let mut out = String::new();
    for octet in octets {
        if out.len() >= MAX_WORDS {
            out.push_str("...");
            break;
        }
        match octet {
            b'\\' => out.push_str("\\\\"),
            b' '..=b'~' => out.push(char::from(*octet)),
            _ => {
                let _infallible = write!(out, "\\x{octet:02x}");
            }
        }
    }
    out
}

/// RFC 3461 4. What would not be printable stays as it was.
fn from_xtext(text: &str) -> String {
    let mut decoded = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = |octet: u8| char::from(octet).to_digit(16).and_then(|it| u8::try_from(it).ok());
        match (first, after) {
            (b'+', [high, low, after @ ..]) => {
                let (Some(high), Some(low)) = (hex(*high), hex(*low)) else { break };
                decoded.push(high << 4 | low);
                rest = after;
            }
            (first, after) => {
                decoded.push(*first);
                rest = after;
            }
        }
    }
    let is_printable = decoded.iter().all(|octet| matches!(octet, b' '..=b'~'));
    match String::from_utf8(decoded) {
        Ok(decoded) if is_printable && rest.is_empty() => decoded.chars().take(MAX_WORDS).collect(),
        Ok(_) | Err(_) => ascii(text.as_bytes()),
    }
}

/// RFC 6533 3: an address outside ASCII, in ASCII.
fn utf8_addr_xtext(path: &str) -> String {
    let mut out = String::new();
    for c in path.chars() {
        match c {
            '!'..='~' if !matches!(c, '\\' | '+' | '=') => out.push(c),
            _ => {
                let _infallible = write!(out, "\\x{{{:02X}}}", u32::from(c));
            }
        }
    }
    out
}

/// An address of the type utf-8 as ORCPT has it (RFC 6533 3): what is ASCII is in its form already.
fn utf8_orcpt(path: &str) -> String {
    let mut out = String::new();
    for c in path.chars() {
        match c {
            '!'..='~' => out.push(c),
            _ => {
                let _infallible = write!(out, "\\x{{{:02X}}}", u32::from(c));
            }
        }
    }
    out
}

/// Appends a field in which every blank counts, and which is not long.
fn line(out: &mut String, name: &str, value: &str) {
    let value = value.get(..CUT).unwrap_or(value);
    let _infallible = write!(out, "{name}: {value}\r\n");
}

/// Appends a field, folded at its blanks. `value` is printable ASCII.
fn field(out: &mut String, name: &str, value: &str) {
    let _infallible = write!(out, "{name}:");
    let mut column = name.len() + 1;
    let mut is_first = true;
    for word in value.split(' ').filter(|word| !word.is_empty()) {
        let mut rest = word;
        while !rest.is_empty() {
            let (now, later) = rest.split_at_checked(CUT).unwrap_or((rest, ""));
            if !is_first && column + 1 + now.len() > FOLD {
                out.push_str("\r\n");
                column = 0;
            }
            out.push(' ');
            out.push_str(now);
            column += 1 + now.len();
            is_first = false;
            rest = later;
        }
    }
    out.push_str("\r\n");
}

/// The value of the first field of that name (in lower case), unfolded.
fn unfolded(header: &[u8], name: &[u8]) -> Option<Vec<u8>> {
    let mut value: Option<Vec<u8>> = None;
    for line in header.split(|octet| *octet == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match &mut value {
            Some(value) if line.starts_with(b" ") || line.starts_with(b"\t") => {
                value.push(b' ');
                value.extend_from_slice(line.trim_ascii());
            }
            Some(_) => break,
            None => {
                let colon = line.iter().position(|octet| *octet == b':');
                let Some((field, rest)) = colon.and_then(|at| line.split_at_checked(at)) else {
                    continue;
                };
                if field.trim_ascii_end().eq_ignore_ascii_case(name) {
                    value = Some(rest.get(1..).unwrap_or_default().trim_ascii().to_vec());
                }
            }
        }
    }
    value
}

/// The same where it can be shown as it is: neither encoded (RFC 2047) nor with anything that does not print.
fn plain_field(header: &[u8], name: &[u8]) -> Option<String> {
    let value = unfolded(header, name)?;
    let is_printable = value.iter().all(|octet| matches!(octet, b' '..=b'~'));
    let text = String::from_utf8(value).ok()?;
    (is_printable && !text.is_empty() && !text.contains("=?")).then_some(text)
}

/// The `Message-ID`, where it has the form of one.
fn message_id(header: &[u8]) -> Option<String> {
    let id = plain_field(header, b"message-id")?;
    let inner = id.strip_prefix('<')?.strip_suffix('>')?;
    let is_word = |c: char| matches!(c, '!'..='~') && !matches!(c, '<' | '>' | ',');
    (id.len() <= CUT && inner.chars().all(is_word)).then_some(id)
}

#[cfg(test)]
mod tests;
