//! What the header of a message says, in Graph's words.

use crate::smtp::address::ReversePath;

use super::field::{self, Address, Field, fields, one_line, unfold};
use super::{Case, Loss, LossKind, charset, unfit_address};

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
    pub(super) fn read(header: &[u8], case: &Case<'_>, losses: &mut Vec<Loss>) -> Self {
        let mut head = Self::default();
        let mut lost: Vec<String> = Vec::new();
        let mut extras: Vec<(u8, String, String)> = Vec::new();
        // Importance goes before X-Priority, and that before the others.
        let mut importance: [Option<&'static str>; 4] = [None; 4];
        for field in fields(header) {
            let name = String::from_utf8_lossy(field.name).to_ascii_lowercase();
            match name.as_str() {
                "subject" if head.subject.is_empty() => head.subject = subject(&field, losses),
                "from" if head.from_name.is_empty() => {
                    let author = field::addresses(field.value).into_iter().next();
                    head.from_name =
                        author.map(|it| without_at(&it.name, &it.address)).unwrap_or_default();
                }
                "reply-to" => head.reply_to.extend(field::addresses(field.value)),
                "message-id" => {
                    head.message_id = field::message_id(field.value);
                    if head.message_id.is_none() {
                        losses.push(header_loss(
                            "Message-ID",
                            "is not in the form <left@right>: Exchange makes one",
                        ));
                    }
                }
                "importance" => set(&mut importance, 0, named_importance(&field)),
                "x-priority" => set(&mut importance, 1, numbered_importance(&field)),
                "x-msmail-priority" => set(&mut importance, 2, named_importance(&field)),
                "priority" => set(&mut importance, 3, named_importance(&field)),
                "sensitivity" => head.sensitivity = sensitivity(&field),
                "disposition-notification-to" | "x-confirm-reading-to" => {
                    head.read_receipt = true;
                    losses.push(header_loss(
                        "Disposition-Notification-To",
                        "asks for receipts: they go to the sender's mailbox",
                    ));
                }
                "return-receipt-to" => {
                    head.delivery_receipt = true;
                    losses.push(header_loss(
                        "Return-Receipt-To",
                        "asks for receipts: they go to the sender's mailbox",
                    ));
                }
                "in-reply-to" if head.in_reply_to.is_none() => head.in_reply_to = ids(&field),
                "references" if head.references.is_none() => head.references = ids(&field),
                "list-unsubscribe" if head.list_unsubscribe.is_none() => {
                    head.list_unsubscribe = plain_value(&field);
                }
                "subject" | "from" | "to" | "cc" | "in-reply-to" | "references"
                | "list-unsubscribe" | "mime-version" => {}
                name if name.starts_with("content-") => {}
                name if USUAL.contains(&name) => lose(name, LossKind::Usual, &mut lost, losses),
                name if name.starts_with("x-") => match rank(name) {
                    None => lose(name, LossKind::Usual, &mut lost, losses),
                    Some(rank) => match plain_value(&field).filter(|_| is_token(name)) {
                        Some(value)
                            if !extras.iter().any(|(_, it, _)| it.eq_ignore_ascii_case(name)) =>
                        {
                            extras.push((
                                rank,
                                String::from_utf8_lossy(field.name).into_owned(),
                                value,
                            ));
                        }
                        _ => lose(name, LossKind::Header, &mut lost, losses),
                    },
                },
                name => lose(name, LossKind::Header, &mut lost, losses),
            }
        }
        head.importance = importance.into_iter().flatten().next().filter(|it| *it != "normal");
        head.choose_replies(losses);
        head.choose_extras(extras, is_automatic(header, case), case, &mut lost, losses);
        head
    }

    /// An address that Graph dislikes would fail the message.
    fn choose_replies(&mut self, losses: &mut Vec<Loss>) {
        let before = self.reply_to.len();
        let mut seen = Vec::new();
        self.reply_to.retain(|it| {
            let key = it.address.to_lowercase();
            let is_new = !seen.contains(&key);
            seen.push(key);
            is_new && unfit_address(&it.address).is_none()
        });
        self.reply_to.truncate(MAX_REPLIES);
        if self.reply_to.len() < before {
            losses.push(header_loss("Reply-To", "has addresses that Graph does not take"));
        }
    }

    fn choose_extras(
        &mut self,
        mut extras: Vec<(u8, String, String)>,
        is_automatic: bool,
        case: &Case<'_>,
        lost: &mut Vec<String>,
        losses: &mut Vec<Loss>,
    ) {
        if is_automatic && !extras.iter().any(|(_, name, _)| name.eq_ignore_ascii_case(SUPPRESS)) {
            extras.insert(0, (0, SUPPRESS.to_owned(), "All".to_owned()));
        }
        // Within a rank they keep their order.
        extras.sort_by_key(|(rank, _, _)| *rank);
        let taken = if case.extras { MAX_EXTRAS } else { 0 };
        for (position, (_, name, value)) in extras.into_iter().enumerate() {
            if position < taken {
                self.extras.push((name, value));
            } else {
                lose(&name.to_ascii_lowercase(), LossKind::Header, lost, losses);
            }
        }
        if !case.extras {
            let said = [
                (self.in_reply_to.take(), "in-reply-to"),
                (self.references.take(), "references"),
                (self.list_unsubscribe.take(), "list-unsubscribe"),
            ];
            for (_, name) in said.iter().filter(|(value, _)| value.is_some()) {
                lose(name, LossKind::Header, lost, losses);
            }
        }
    }
}

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

/// Notes a field that does not go along, once.
fn lose(name: &str, kind: LossKind, lost: &mut Vec<String>, losses: &mut Vec<Loss>) {
    if lost.len() >= MAX_LOST || lost.iter().any(|it| it == name) {
        return;
    }
    lost.push(name.to_owned());
    let why = match kind {
        LossKind::Usual => "is made anew or of no use behind Graph",
        _ => "has no place in the request",
    };
    let what: String = name.chars().filter(char::is_ascii_graphic).take(80).collect();
    losses.push(Loss { kind, what: what.into(), why });
}

/// Fields that are named as lost.
const MAX_LOST: usize = 200;

fn header_loss(name: &'static str, why: &'static str) -> Loss {
    Loss { kind: LossKind::Header, what: name.into(), why }
}

fn subject(field: &Field<'_>, losses: &mut Vec<Loss>) -> String {
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
        losses.push(Loss {
            kind: LossKind::Text,
            what: "Subject".into(),
            why: "is longer than the 255 characters that Exchange takes, and is cut",
        });
    }
    cut
}

/// Exchange takes a name with an `@` for an address that the mail pretends to come from.
fn without_at(name: &str, address: &str) -> String {
    match name.eq_ignore_ascii_case(address) {
        true => String::new(),
        false => name.replace('@', " at ").chars().take(256).collect(),
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
    name.len() <= 128 && name.bytes().all(is_plain)
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
