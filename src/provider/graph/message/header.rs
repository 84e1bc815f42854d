//! What the header of a message says, in Graph's words.

use crate::smtp::address::ReversePath;

use super::field::{self, Address, Field, fields, one_line, unfold};
use super::{Case, LossKind, Losses, charset, unfit_address};

/// Characters of a subject that Exchange takes, as UTF-16 counts them.
const MAX_SUBJECT: usize = 255;
/// Fields that Graph takes in `internetMessageHeaders`.
const MAX_EXTRAS: usize = 5;
/// Octets of the value of one of them, and of a list of references.
const MAX_VALUE: usize = 4096;

/// What the header says.
#[derive(Debug, Default)]
pub(super) struct Head {
    pub(super) subject: String,
    pub(super) from_name: String,
    pub(super) reply_to: Vec<Address>,
    pub(super) message_id: Option<String>,
    pub(super) importance: Option<&'static str>,
    pub(super) sensitivity: Option<&'static str>,
    pub(super) read_receipt: bool,
    pub(super) delivery_receipt: bool,
    pub(super) in_reply_to: Option<String>,
    pub(super) references: Option<String>,
    pub(super) list_unsubscribe: Option<String>,
    /// At most [`MAX_EXTRAS`], in the order in which they go out.
    pub(super) extras: Vec<(String, String)>,
}

/// Fields that every message loses and that are made anew, or that are of use only on the way here.
const USUAL: [&str; 22] = [
    "arc-authentication-results",
    "arc-message-signature",
    "arc-seal",
    "authentication-results",
    "date",
    "delivered-to",
    "dkim-signature",
    "domainkey-signature",
    "domainkey-status",
    "lines",
    "message-context",
    "received",
    "received-spf",
    "return-path",
    "sender",
    "status",
    "thread-index",
    "thread-topic",
    "user-agent",
    "bcc",
    "content-language",
    "accept-language",
];

/// Fields of `x-` that are the trace of another system, or said by a property.
const JUNK: [&str; 25] = [
    "x-amavis",
    "x-apparently-to",
    "x-barracuda",
    "x-delivered-to",
    "x-envelope-",
    "x-eop",
    "x-forefront",
    "x-gm-",
    "x-google-",
    "x-ironport",
    "x-microsoft-antispam",
    "x-mozilla-",
    "x-ms-exchange-",
    "x-ms-has-attach",
    "x-ms-office365-",
    "x-ms-publictraffictype",
    "x-ms-tnef-",
    "x-msmail-priority",
    "x-priority",
    "x-proofpoint",
    "x-received",
    "x-scanned",
    "x-spam",
    "x-uid",
    "x-virus",
];

/// Fields of `x-` that name the software: of all that can go along, the least wanted.
const SOFTWARE: [&str; 8] = [
    "x-antiabuse",
    "x-authenticated-sender",
    "x-mailer",
    "x-mimeole",
    "x-originating",
    "x-php",
    "x-sender",
    "x-source",
];

/// A field of `x-` that asks for no automatic replies.
pub(super) const SUPPRESS: &str = "X-Auto-Response-Suppress";

impl Head {
    pub(super) fn read(header: &[u8], case: &Case<'_>, losses: &mut Losses) -> Self {
        let mut head = Self::default();
        let mut extras = Extras::default();
        let mut has_from = false;
        // Importance goes before X-Priority, and that before the others.
        let mut importance: [Option<&'static str>; 4] = [None; 4];
        for field in fields(header) {
            let name = String::from_utf8_lossy(field.name).to_ascii_lowercase();
            let mut is_taken = true;
            match name.as_str() {
                "subject" if head.subject.is_empty() => head.subject = subject(&field, losses),
                "from" if !has_from => {
                    has_from = true;
                    let mut authors = field::addresses(field.value).into_iter();
                    let name = authors.next().map(|it| without_at(&it.name, &it.address));
                    head.from_name = name.unwrap_or_default();
                    if authors.next().is_some() {
                        let why = "has several authors, and Graph takes one";
                        losses.push(LossKind::Header, "From", why);
                    }
                }
                "reply-to" => head.add_replies(&field, losses),
                "message-id" if head.message_id.is_none() => {
                    head.message_id = field::message_id(field.value);
                    if head.message_id.is_none() {
                        let why = "is not in the form <left@right>: Exchange makes one";
                        losses.push(LossKind::Header, "Message-ID", why);
                    }
                }
                "importance" => set(&mut importance, 0, named_importance(&field)),
                "x-priority" => set(&mut importance, 1, numbered_importance(&field)),
                "x-msmail-priority" => set(&mut importance, 2, named_importance(&field)),
                "priority" => set(&mut importance, 3, named_importance(&field)),
                "sensitivity" if case.extras => head.sensitivity = sensitivity(&field),
                "disposition-notification-to" | "x-confirm-reading-to" => {
                    head.read_receipt = true;
                    losses.push(LossKind::Header, shown(&field), RECEIPT);
                }
                "return-receipt-to" => {
                    head.delivery_receipt = true;
                    losses.push(LossKind::Header, shown(&field), RECEIPT);
                }
                "in-reply-to" if case.extras && head.in_reply_to.is_none() => {
                    head.in_reply_to = ids(&field);
                    is_taken = head.in_reply_to.is_some();
                }
                "references" if case.extras && head.references.is_none() => {
                    head.references = ids(&field);
                    is_taken = head.references.is_some();
                }
                "list-unsubscribe" if case.extras && head.list_unsubscribe.is_none() => {
                    head.list_unsubscribe = plain_value(&field);
                    is_taken = head.list_unsubscribe.is_some();
                }
                "to" | "cc" | "mime-version" => {}
                name if name.starts_with("content-") => {}
                name if USUAL.contains(&name) => {
                    losses.push(LossKind::Usual, shown(&field), USUALLY);
                }
                name if name.starts_with("x-") => match rank(name) {
                    None => losses.push(LossKind::Usual, shown(&field), USUALLY),
                    Some(rank) => is_taken = extras.add(rank, name, &field),
                },
                _ => is_taken = false,
            }
            if !is_taken {
                losses.push(LossKind::Header, shown(&field), NO_PLACE);
            }
        }
        head.importance = importance.into_iter().flatten().next().filter(|it| *it != "normal");
        head.extras = extras.choose(is_automatic(header, case), case.extras, losses);
        head
    }

    /// An address that Graph dislikes would fail the message.
    fn add_replies(&mut self, field: &Field<'_>, losses: &mut Losses) {
        for address in field::addresses(field.value) {
            let is = |it: &Address| it.address.eq_ignore_ascii_case(&address.address);
            if self.reply_to.len() >= MAX_REPLIES || unfit_address(&address.address).is_some() {
                let why = "has addresses that Graph does not take";
                losses.push(LossKind::Header, "Reply-To", why);
            } else if !self.reply_to.iter().any(is) {
                self.reply_to.push(address);
            }
        }
    }
}

const RECEIPT: &str = "asks for receipts: they go to the sender's mailbox";
const USUALLY: &str = "is made anew or of no use behind Graph";
const NO_PLACE: &str = "has no place in the request";

/// The name of a field for people to read.
fn shown(field: &Field<'_>) -> String {
    field.name.iter().take(80).map(|byte| char::from(*byte)).collect()
}

/// Fields of `x-`, of which [`MAX_EXTRAS`] go along.
#[derive(Debug, Default)]
struct Extras {
    /// Rank, name in lower case, name, value.
    found: Vec<(u8, String, String, String)>,
}

impl Extras {
    fn add(&mut self, rank: u8, name: &str, field: &Field<'_>) -> bool {
        let is_new = || !self.found.iter().any(|(_, it, _, _)| it == name);
        if self.found.len() >= MAX_CANDIDATES || !is_token(name) || !is_new() {
            return false;
        }
        let Some(value) = plain_value(field) else { return false };
        self.found.push((rank, name.to_owned(), shown(field), value));
        true
    }

    fn choose(
        mut self,
        is_automatic: bool,
        extras: bool,
        losses: &mut Losses,
    ) -> Vec<(String, String)> {
        let is_suppress = |name: &str| name.eq_ignore_ascii_case(SUPPRESS);
        if is_automatic && !self.found.iter().any(|(_, name, _, _)| is_suppress(name)) {
            let lower = SUPPRESS.to_ascii_lowercase();
            self.found.insert(0, (0, lower, SUPPRESS.to_owned(), "All".to_owned()));
        }
        // Within a rank they keep their order.
        self.found.sort_by_key(|(rank, _, _, _)| *rank);
        let rest = self.found.split_off(self.found.len().min(if extras { MAX_EXTRAS } else { 0 }));
        for (_, _, name, _) in rest {
            losses.push(LossKind::Header, name, NO_PLACE);
        }
        self.found.into_iter().map(|(_, _, name, value)| (name, value)).collect()
    }
}

/// Fields of `x-` of which the best are chosen.
const MAX_CANDIDATES: usize = 100;
/// Reply addresses of one message.
const MAX_REPLIES: usize = 50;

/// Whether the message came from no person: then nothing shall answer by itself.
pub(super) fn is_automatic(header: &[u8], case: &Case<'_>) -> bool {
    let is_said = |field: Field<'_>| {
        let word = || field.text().to_ascii_lowercase();
        (field.is("auto-submitted") && !word().starts_with("no"))
            || (field.is("precedence") && matches!(word().as_str(), "bulk" | "list" | "junk"))
    };
    *case.reverse_path == ReversePath::Null || fields(header).any(is_said)
}

fn set(all: &mut [Option<&'static str>; 4], at: usize, value: Option<&'static str>) {
    if let Some(place) = all.get_mut(at).filter(|place| place.is_none()) {
        *place = value;
    }
}

fn subject(field: &Field<'_>, losses: &mut Losses) -> String {
    // Encoded words need at most some twelve octets for one character; the rest would be cut.
    let value = field.value.get(..MAX_SUBJECT * 64).unwrap_or(field.value);
    let text = field::text(value);
    let mut units = 0;
    let cut: String = text
        .chars()
        .take_while(|c| {
            units += c.len_utf16();
            units <= MAX_SUBJECT
        })
        .collect();
    if cut.len() < text.len() || value.len() < field.value.len() {
        let why = "is longer than the 255 characters that Exchange takes, and is cut";
        losses.push(LossKind::Text, "Subject", why);
    }
    cut
}

/// Exchange takes a name with an `@` for an address that the mail pretends to come from.
fn without_at(name: &str, address: &str) -> String {
    match name.eq_ignore_ascii_case(address) {
        true => String::new(),
        false => name.replace(" @ ", " at ").replace('@', " at ").chars().take(256).collect(),
    }
}

fn named_importance(field: &Field<'_>) -> Option<&'static str> {
    match field.text().to_ascii_lowercase().as_str() {
        "high" | "urgent" | "highest" => Some("high"),
        "low" | "non-urgent" | "lowest" => Some("low"),
        "normal" => Some("normal"),
        _ => None,
    }
}

/// `1 (Highest)` to `5 (Lowest)`.
fn numbered_importance(field: &Field<'_>) -> Option<&'static str> {
    match field.value.trim_ascii().first() {
        Some(b'1' | b'2') => Some("high"),
        Some(b'3') => Some("normal"),
        Some(b'4' | b'5') => Some("low"),
        _ => None,
    }
}

/// The value of PidTagSensitivity.
fn sensitivity(field: &Field<'_>) -> Option<&'static str> {
    match field.text().to_ascii_lowercase().as_str() {
        "personal" => Some("1"),
        "private" => Some("2"),
        "company-confidential" => Some("3"),
        _ => None,
    }
}

/// What goes first of the `x-` fields; none that never goes along.
fn rank(name: &str) -> Option<u8> {
    let begins = |list: &[&str]| list.iter().any(|it| name.starts_with(it));
    match name {
        name if name.eq_ignore_ascii_case(SUPPRESS) => Some(0),
        _ if begins(&JUNK) => None,
        _ if begins(&SOFTWARE) => Some(2),
        _ => Some(1),
    }
}

fn is_token(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    name.len() <= 80 && name.bytes().all(is_plain)
}

/// The value on one line, encoded words as they are; none where nothing is left of it, or too much.
fn plain_value(field: &Field<'_>) -> Option<String> {
    let value = unfold(field.value.get(..2 * MAX_VALUE).unwrap_or(field.value));
    let text = one_line(&charset::decode(&value, None).0);
    Some(text).filter(|it| !it.is_empty() && it.len() <= MAX_VALUE)
}

/// Message ids, one blank between them. Of a list that is too long the last ones, to which this one is nearest.
fn ids(field: &Field<'_>) -> Option<String> {
    let value = unfold(field.value);
    let plain: Vec<u8> =
        value.iter().map(|byte| if byte.is_ascii_graphic() { *byte } else { b' ' }).collect();
    let text = String::from_utf8_lossy(&plain);
    let start = match text.len().checked_sub(MAX_VALUE) {
        None => 0,
        Some(start) => start + text.get(start..)?.find('<')?,
    };
    let words: Vec<&str> = text.get(start..)?.split_whitespace().collect();
    Some(words.join(" ")).filter(|it| !it.is_empty())
}
