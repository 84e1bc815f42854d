//! What Graph is asked to do with a message: pure, from octets to requests.
//!
//! ```text
//! octets ──► Scan ──► Scanned ──convert(Case)──► Plan ─┬─ Json  ──► Assembly ──► the body of one sendMail
//!           (headers, texts, where each part lies)     ├─ Mime  ──► Assembly ──► the body of one sendMail
//!                                                      └─ Draft ──► message, then for each attachment either
//!                                                                   post() ──► Assembly, or session() and Octets
//! ```
//!
//! A message is read twice, never held whole: once by [`Scan`], which keeps its header lines and the texts that may
//! become the body (at most [`MAX_TEXT`]) and notes where every other part lies and how large it is decoded; and once
//! more, in the same pieces or others, by an [`Assembly`] or [`Octets`], which take what a request needs out of it.
//! [`convert`] decides between the two. The size of each request is known before it is made.
//!
//! The recipients of a request are exactly the part, whatever the header says. What a request cannot carry is a
//! [`Loss`] of its plan.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use crate::envelope::{Envelope, SpoolId};
use crate::smtp::address::{ForwardPath, Mailbox, ReversePath};

mod assembly;
mod body;
mod charset;
mod content;
mod decode;
mod field;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod header;
mod json;
mod mime;
mod recipients;
mod scan;

pub use assembly::{Assembly, Octets};
pub use decode::Encoding;
pub use scan::{Scan, Scanned};

/// The id of our own extended property, which every JSON request carries and which can be filtered on. Its value is a
/// [`tag`].
pub const TAG_ID: &str = "String {6c52bbf1-6e4c-4e0e-8a0b-6f6a1d0f2a57} Name mailsluice-id";

/// Octets of decoded text that are kept of a message for its body.
pub const MAX_TEXT: usize = 4 * 1024 * 1024;
/// Octets of a message that may be sent as MIME: more do not fit into any request.
const MAX_MIME: u64 = 4_000_000;
/// Files of a draft: Exchange takes no more.
const MAX_FILES: usize = 250;
/// Octets of a file: an upload session takes no more.
const MAX_FILE: u64 = 150_000_000;

/// One attempt at one part of a message.
#[derive(Clone, Copy)]
pub struct Case<'a> {
    pub envelope: &'a Envelope,
    /// Where reports go, as it leaves: a null one marks the message as auto-generated.
    pub reverse_path: &'a ReversePath,
    /// Positions in `envelope.rcpts`.
    pub part: &'a [usize],
    /// The mailbox in the URL.
    pub mailbox: &'a Mailbox,
    /// Another address to send as.
    pub from: Option<&'a Mailbox>,
    pub save_to_sent_items: bool,
    pub format: Format,
    /// Whether the large-message path is open.
    pub may_draft: bool,
    /// Whether `x-` headers and extended properties but our own are sent.
    pub extras: bool,
    /// Octets of one request.
    pub max_request: u64,
}

/// The form of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// JSON, but MIME where that would lose a signature, an invitation and the like.
    Auto,
    Json,
    Mime,
}

/// The requests by which a part of the message is sent.
#[derive(Debug)]
pub enum Plan {
    /// `sendMail`, `Content-Type: application/json`.
    Json(Json),
    /// `sendMail`, `Content-Type: text/plain`: the message in base64.
    Mime(Mime),
    Draft(Draft),
}

impl Plan {
    /// What the message loses on this way.
    pub fn losses(&self) -> &[Loss] {
        match self {
            Self::Json(it) => &it.losses,
            Self::Mime(it) => &it.losses,
            Self::Draft(it) => &it.losses,
        }
    }
}

/// A JSON text with places for the contents of attachments.
#[derive(Debug)]
pub struct Json {
    /// In the order in which the contents lie in the message.
    pub pieces: Vec<Piece>,
    /// Octets of all of it.
    pub size: u64,
    pub losses: Vec<Loss>,
}

#[derive(Debug)]
pub enum Piece {
    Text(String),
    /// The octets of this attachment in base64.
    Content(Attachment),
}

impl Json {
    fn new(pieces: Vec<Piece>, losses: Vec<Loss>) -> Self {
        let octets = |piece: &Piece| match piece {
            Piece::Text(text) => text.len() as u64,
            Piece::Content(attachment) => encoded(attachment.size),
        };
        Self { size: pieces.iter().map(octets).sum(), pieces, losses }
    }

    /// Makes the text while the message passes.
    pub fn assembly(&self) -> Assembly<'_> {
        Assembly::of_json(self)
    }
}

/// The message as MIME, with another header.
#[derive(Debug)]
pub struct Mime {
    /// In place of the first `used` octets of the message.
    pub head: Vec<u8>,
    pub used: u64,
    /// The message has CRs or LFs that are not CRLF.
    repairs: bool,
    /// Octets of the request, which is base64; at most so many where lines end oddly.
    pub size: u64,
    pub losses: Vec<Loss>,
}

impl Mime {
    /// Makes the request while the message passes. All its lines end with CRLF: Exchange misreads others.
    pub fn assembly(&self) -> Assembly<'_> {
        Assembly::of_mime(self)
    }
}

/// The message without its attachments, and each of them.
#[derive(Debug)]
pub struct Draft {
    /// The body of `POST …/messages`.
    pub message: String,
    /// In the order in which they lie in the message.
    pub attachments: Vec<Attachment>,
    pub losses: Vec<Loss>,
}

/// A file of the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    pub name: String,
    pub content_type: String,
    /// Without brackets. With one, the file is shown within the HTML.
    pub content_id: Option<String>,
    /// Where it lies in the message as it leaves.
    pub range: Range<u64>,
    pub encoding: Encoding,
    /// Octets, decoded.
    pub size: u64,
}

impl Attachment {
    /// The body of `POST …/attachments`.
    pub fn post(&self) -> Json {
        Json::new(json::file(self, String::new()), Vec::new())
    }

    /// The body of `POST …/attachments/createUploadSession`.
    pub fn session(&self) -> String {
        json::session(self)
    }

    /// Takes the octets of the file out of the message.
    pub fn octets(&self) -> Octets {
        Octets::new(self)
    }
}

/// Something that the message loses, or that changes, on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    pub kind: LossKind,
    /// The field or the part, without a stranger's control characters.
    pub what: Cow<'static, str>,
    /// What happens to it: words that follow its name.
    pub why: &'static str,
}

/// A closed set, for a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LossKind {
    /// What every message loses, and nobody misses: no reason to log it.
    Usual,
    /// A header field.
    Header,
    /// An address of To or Cc that is no recipient.
    Recipient,
    /// A part of the message, or its place.
    Part,
    /// A signature or an encryption.
    Signature,
    /// An invitation became a file.
    Invitation,
    /// A text is not what its charset says, was cut or became a file.
    Text,
    /// A copy stays in Sent Items.
    Copy,
}

impl LossKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Usual => "usual",
            Self::Header => "header",
            Self::Recipient => "recipient",
            Self::Part => "part",
            Self::Signature => "signature",
            Self::Invitation => "invitation",
            Self::Text => "text",
            Self::Copy => "copy",
        }
    }
}

/// The losses of one message: each once, and not more than anybody reads.
#[derive(Debug, Default)]
struct Losses {
    list: Vec<Loss>,
}

impl Losses {
    fn push(&mut self, kind: LossKind, what: impl Into<Cow<'static, str>>, why: &'static str) {
        let loss = match self.list.len() {
            MAX_LOSSES.. => return,
            MORE => Loss { kind, what: "more".into(), why: "is lost in such ways" },
            _ => Loss { kind, what: what.into(), why },
        };
        if !self.list.contains(&loss) {
            self.list.push(loss);
        }
    }
}

impl Extend<Loss> for Losses {
    fn extend<T: IntoIterator<Item = Loss>>(&mut self, losses: T) {
        losses.into_iter().for_each(|it| self.push(it.kind, it.what, it.why));
    }
}

/// Losses that are named.
const MAX_LOSSES: usize = 100;
/// The last of them stands for all others.
const MORE: usize = MAX_LOSSES - 1;

/// Why a message cannot be sent by Graph at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Its request would be too large, and the large-message path is closed: 5.3.4.
    TooLarge { request: u64, max: u64 },
    /// A file is larger than any way to Graph: 5.3.4.
    FileTooLarge,
    /// More parts or files than are taken: 5.6.0.
    TooManyParts,
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { request, max } => write!(
                f,
                "the request for this message has {request} octets; Graph takes {max} unless large messages are allowed"
            ),
            Self::FileTooLarge => f.write_str("an attachment of this message is larger than 150 MB, the most that Graph takes"),
            Self::TooManyParts => f.write_str("this message has more than 10,000 parts, or more than 250 attachments that do not fit into one request"),
        }
    }
}

/// Decides how a part of a message is sent.
pub fn convert(scanned: &Scanned, case: &Case<'_>) -> Result<Plan, Unfit> {
    if !scanned.has_all_parts {
        return Err(Unfit::TooManyParts);
    }
    let specials = content::specials(&scanned.nodes);
    let may_be_mime = !content::has_tnef(&scanned.nodes);
    let as_mime = || {
        let mime = may_be_mime.then(|| mime::write(scanned, case)).flatten();
        mime.filter(|it| it.size <= case.max_request)
    };
    let wants_mime = match case.format {
        Format::Auto => !specials.list.is_empty(),
        Format::Json => false,
        Format::Mime => true,
    };
    if wants_mime && let Some(mime) = as_mime() {
        return Ok(Plan::Mime(mime));
    }
    let message = json::write(scanned, case, specials);
    let size = message.request_size();
    let fits = size <= case.max_request;
    let is_poor = message.is_text_file() || (!fits && !case.may_draft);
    if case.format == Format::Auto
        && is_poor
        && let Some(mime) = as_mime()
    {
        return Ok(Plan::Mime(mime));
    }
    if fits {
        return Ok(Plan::Json(message.into_request(case)));
    }
    if !case.may_draft {
        return Err(Unfit::TooLarge { request: size, max: case.max_request });
    }
    let draft = message.into_draft(case);
    let files = &draft.attachments;
    if files.iter().any(|file| file.size > MAX_FILE) {
        return Err(Unfit::FileTooLarge);
    }
    if files.len() > MAX_FILES {
        return Err(Unfit::TooManyParts);
    }
    Ok(Plan::Draft(draft))
}

/// Why Graph would refuse a whole request for this recipient.
pub fn unfit(rcpt: &ForwardPath) -> Option<&'static str> {
    match rcpt {
        ForwardPath::Mailbox(mailbox) => unfit_address(mailbox.as_str()),
        ForwardPath::Postmaster(_) => Some("it has no domain"),
    }
}

fn unfit_address(address: &str) -> Option<&'static str> {
    let Some((local, domain)) = address.rsplit_once('@') else { return Some("it has no domain") };
    if !address.is_ascii() {
        return Some("it has characters outside ASCII");
    }
    if local.contains(['"', '@', ' ', '\\']) || local.is_empty() {
        return Some("its local part is quoted");
    }
    if domain.contains(['[', ']']) {
        return Some("its domain is an address literal");
    }
    if !domain.trim_matches('.').contains('.') {
        return Some("its domain has no dot");
    }
    let is_plain =
        |c: char| c.is_ascii_graphic() && !matches!(c, '<' | '>' | '(' | ')' | ',' | ';' | ':');
    if !address.chars().all(is_plain) {
        return Some("it is not a mail address");
    }
    None
}

/// Positions that are written out in a tag, in octets.
const MAX_POSITIONS: usize = 100;

/// The value of our own extended property: the message and the part, the same for each attempt.
pub fn tag(id: SpoolId, part: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for at in part {
        match runs.last_mut() {
            Some((_, end)) if *end + 1 == *at => *end = *at,
            _ => runs.push((*at, *at)),
        }
    }
    let write = |(start, end): &(usize, usize)| match start == end {
        true => start.to_string(),
        false => format!("{start}-{end}"),
    };
    let positions = runs.iter().map(write).collect::<Vec<_>>().join(",");
    match positions.len() <= MAX_POSITIONS {
        true => format!("{id}/{positions}"),
        // A filter takes no value of any length.
        false => format!("{id}/{}:{:08x}", part.len(), crc32c::crc32c(positions.as_bytes())),
    }
}

/// Octets of so many in base64.
fn encoded(octets: u64) -> u64 {
    octets.div_ceil(3) * 4
}

#[cfg(test)]
mod tests;
