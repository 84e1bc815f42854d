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

/// The id of our own extended property, which every JSON request carries and which can be filtered on. Its value is a
/// [`tag`].
pub const TAG_ID: &str = "String {6c52bbf1-6e4c-4e0e-8a0b-6f6a1d0f2a57} Name mailsluice-id";

/// Octets of decoded text that are kept of a message for its body.
pub const MAX_TEXT: usize = 4 * 1024 * 1024;

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

/// Reads a message as it leaves.
#[derive(Debug)]
pub struct Scan {}

/// A message that was read.
#[derive(Debug)]
pub struct Scanned {}

impl Scan {
    pub fn new() -> Self {
        Self {}
    }

    pub fn push(&mut self, bytes: &[u8]) {
        let _ = bytes;
    }

    pub fn finish(self) -> Scanned {
        Scanned {}
    }
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
    /// Makes the text from the message. For a text without attachments nothing needs to be pushed.
    pub fn assembly(&self) -> Assembly<'_> {
        Assembly { pieces: &self.pieces }
    }
}

/// The message as MIME, with another header.
#[derive(Debug)]
pub struct Mime {
    /// In place of the first `used` octets of the message.
    pub head: Vec<u8>,
    pub used: u64,
    /// Octets of the request: base64.
    pub size: u64,
    pub losses: Vec<Loss>,
}

impl Mime {
    pub fn assembly(&self) -> Assembly<'_> {
        Assembly { pieces: &[] }
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
    /// Without brackets; shown within the HTML.
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
        Json { pieces: Vec::new(), size: 0, losses: Vec::new() }
    }

    /// The body of `POST …/attachments/createUploadSession`.
    pub fn session(&self) -> String {
        String::new()
    }

    /// Takes the octets of the file out of the message.
    pub fn octets(&self) -> Octets {
        Octets { range: self.range.clone() }
    }
}

/// How a part is written (RFC 2045 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Base64,
    QuotedPrintable,
    /// 7bit, 8bit, binary, and what we do not know.
    Identity,
}

/// The octets of one part, decoded while the message passes.
#[derive(Debug)]
pub struct Octets {
    range: Range<u64>,
}

impl Octets {
    /// Takes octets of the message, `at` being the position of their first, and appends to `out` what they hold of the
    /// file. Each octet of [`Attachment::range`] must come once and in order; others may.
    pub fn push(&mut self, at: u64, bytes: &[u8], out: &mut Vec<u8>) {
        let _ = (at, bytes, out, &self.range);
    }

    /// The end of the file.
    pub fn finish(self, out: &mut Vec<u8>) {
        let _ = out;
    }
}

/// Makes the body of a request while the message passes.
#[derive(Debug)]
pub struct Assembly<'a> {
    pieces: &'a [Piece],
}

impl Assembly<'_> {
    /// Takes octets of the message, `at` being the position of their first: each once and in order.
    pub fn push(&mut self, at: u64, bytes: &[u8]) {
        let _ = (at, bytes, self.pieces);
    }

    pub fn finish(self) -> Vec<u8> {
        Vec::new()
    }
}

/// Something that the message loses, or that changes, on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    pub kind: LossKind,
    /// The field, the part or the file.
    pub what: Cow<'static, str>,
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
    /// A text is not what its charset says, or was cut.
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

/// Why a message cannot be sent by Graph at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Its request would be too large, and the large-message path is closed: 5.3.4.
    TooLarge { request: u64, max: u64 },
    /// More parts or attachments than are taken, or a file beyond 150 MB: 5.6.0 or 5.3.4.
    Content(&'static str),
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { request, max } => {
                write!(f, "its request has {request} octets and Graph takes {max}")
            }
            Self::Content(why) => f.write_str(why),
        }
    }
}

/// Decides how a part of a message is sent.
pub fn convert(scanned: &Scanned, case: &Case<'_>) -> Result<Plan, Unfit> {
    let _ = (scanned, case);
    Err(Unfit::Content(""))
}

/// Why Graph would refuse a whole request for this recipient.
pub fn unfit(rcpt: &ForwardPath) -> Option<&'static str> {
    let _ = rcpt;
    None
}

/// The value of our own extended property: the message and the part, the same for each attempt.
pub fn tag(id: SpoolId, part: &[usize]) -> String {
    let _ = part;
    id.to_string()
}
