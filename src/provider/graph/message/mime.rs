//! The MIME form: the message as it is, but for the header lines that say who gets it.

use crate::message::rewrite::{Rules, display_name, rewrite};
use crate::smtp::address::Mailbox;

use super::field::{Address, fields};
use super::header::{SUPPRESS, is_automatic};
use super::recipients::Recipients;
use super::scan::Scanned;
use super::{Case, LossKind, Losses, Mime, encoded};

/// A line is folded before an address where it would be longer (RFC 5322 2.1.1).
const LINE: usize = 78;

/// Fields from which Exchange might take a recipient, or a path that is not ours to say.
const DROPPED: [&str; 9] = [
    "to",
    "cc",
    "bcc",
    "resent-to",
    "resent-cc",
    "resent-bcc",
    "apparently-to",
    "return-path",
    "delivered-to",
];

/// The request, where its header is known whole.
pub(super) fn write(scanned: &Scanned, case: &Case<'_>) -> Option<Mime> {
    if !scanned.has_all_of_header {
        return None;
    }
    let mut losses = Losses::default();
    let recipients = Recipients::divide(&scanned.header, case, &mut losses);
    let head = head(scanned, case, &recipients, &mut losses);
    let used = scanned.nodes.first().map_or(0, |root| root.body.start);
    let octets = head.len() as u64 + scanned.size.saturating_sub(used) + scanned.bare;
    lose_copy(case, &mut losses);
    Some(Mime { head, used, repairs: scanned.bare > 0, size: encoded(octets), losses: losses.list })
}

/// What neither the MIME form nor the draft can be kept from.
pub(super) fn lose_copy(case: &Case<'_>, losses: &mut Losses) {
    if !case.save_to_sent_items {
        let why = "keep a copy, for this form has no word against it";
        losses.push(LossKind::Copy, "Sent Items", why);
    }
}

/// The header with the empty line behind it.
fn head(
    scanned: &Scanned,
    case: &Case<'_>,
    recipients: &Recipients,
    losses: &mut Losses,
) -> Vec<u8> {
    let sender = case.from.unwrap_or(case.mailbox);
    // Exchange refuses another one, and where the reverse path is null no policy looked at it before.
    let may_stand = |author: &Mailbox| author.is_same(sender);
    let rules = Rules { sender, sender_name: b"", clean_names: true, may_stand: &may_stand };
    let rewritten = rewrite(&scanned.header, true, &rules);
    let rest = scanned.header.get(rewritten.used..).unwrap_or_default();
    let mut head = Vec::with_capacity(scanned.header.len() + 256);
    let mut shown = [(&recipients.to, "To", false), (&recipients.cc, "Cc", false)];
    for field in fields(&rewritten.header).chain(fields(rest)) {
        if let Some((list, name, is_written)) = shown.iter_mut().find(|(_, name, _)| field.is(name))
        {
            if !std::mem::replace(is_written, true) {
                push_list(name, list, &mut head);
            }
            continue;
        }
        if DROPPED.iter().any(|name| field.is(name)) {
            if field.name.get(..7).is_some_and(|it| it.eq_ignore_ascii_case(b"resent-")) {
                let why = "names recipients of another sending, and is dropped";
                losses.push(LossKind::Header, "Resent-To", why);
            }
            continue;
        }
        push_line(field.line, &mut head);
    }
    push_list("Bcc", &recipients.bcc, &mut head);
    let is_suppressed = || fields(&scanned.header).any(|field| field.is(SUPPRESS));
    if case.extras && is_automatic(&scanned.header, case) && !is_suppressed() {
        head.extend_from_slice(SUPPRESS.as_bytes());
        head.extend_from_slice(b": All\r\n");
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// A field of mailboxes, in folded lines; nothing where there are none.
fn push_list(name: &str, list: &[Address], out: &mut Vec<u8>) {
    if list.is_empty() {
        return;
    }
    out.extend_from_slice(name.as_bytes());
    out.push(b':');
    let mut line = name.len() + 1;
    for (at, mailbox) in list.iter().enumerate() {
        let entry = entry(mailbox);
        let first = entry.split(|byte| *byte == b'\n').next().map_or(0, <[u8]>::len);
        if at > 0 {
            out.push(b',');
        }
        if line + first + 2 > LINE && at > 0 {
            out.extend_from_slice(b"\r\n");
            line = 0;
        }
        out.push(b' ');
        out.extend_from_slice(&entry);
        let last = entry.rsplit(|byte| *byte == b'\n').next().map_or(0, <[u8]>::len);
        line = if last == entry.len() { line + last + 2 } else { last };
    }
    out.extend_from_slice(b"\r\n");
}

fn entry(mailbox: &Address) -> Vec<u8> {
    let mut entry = display_name(&mailbox.name);
    if entry.is_empty() {
        return mailbox.address.as_bytes().to_vec();
    }
    entry.extend_from_slice(b" <");
    entry.extend_from_slice(mailbox.address.as_bytes());
    entry.push(b'>');
    entry
}

/// A field as it was, in lines that end with CRLF. Those that have only blanks are left out: some readers take one for
/// the end of the header (RFC 5322 4.2).
fn push_line(line: &[u8], out: &mut Vec<u8>) {
    for line in line.split_inclusive(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.trim_ascii().is_empty() {
            continue;
        }
        out.extend(line.iter().map(|byte| if *byte == b'\r' { b' ' } else { *byte }));
        out.extend_from_slice(b"\r\n");
    }
}
