//! The JSON form: a message resource of Graph.

use serde::Serialize;

use super::body::{Body, Links, Shown, compose, link};
use super::content::{Content, Names, sort};
use super::field::Address;
use super::header::Head;
use super::mime::lose_copy;
use super::recipients::Recipients;
use super::scan::{Kind, Node, Scanned};
use super::{
    Attachment, Case, Draft, Encoding, Json, LossKind, Losses, Piece, TAG_ID, encoded, tag,
};

/// Octets of what a request has around the message.
const FRAME: u64 = 64;
/// Octets of what a file has around its properties.
const FILE_FRAME: u64 = 32;

/// A message, from which a request or a draft can be made.
pub(super) struct Message {
    /// Without its files.
    text: String,
    files: Vec<Attachment>,
    losses: Losses,
    /// The text was too large to be the body.
    is_text_file: bool,
}

/// Writes the message; a body that is too large for any request becomes a file.
pub(super) fn write(scanned: &Scanned, case: &Case<'_>, mut losses: Losses) -> Message {
    let nodes = &scanned.nodes;
    if !scanned.has_all_of_header {
        let why = "is longer than 1 MiB: what is beyond is not read";
        losses.push(LossKind::Header, "the header", why);
    }
    let recipients = Recipients::divide(&scanned.header, case, &mut losses);
    let head = Head::read(&scanned.header, case, &mut losses);
    let mut content = sort(nodes);
    losses.extend(std::mem::take(&mut content.losses.list));
    let fitting =
        fitting(nodes, &content, &mut losses, case, |body| message(&head, &recipients, body, case));
    let is_too_large = fitting.is_none();
    let has_body = !(content.texts.is_empty() && has_long_text(nodes, &content.files));
    let (text, mut shown) = match fitting.filter(|_| has_body) {
        Some(fitting) => fitting,
        None => {
            content.files.append(&mut content.texts);
            content.files.sort_unstable();
            (message(&head, &recipients, &NOTE.body(), case), Shown::new())
        }
    };
    if is_too_large {
        let why = "is too large for the body: it becomes a file";
        losses.push(LossKind::Text, "the text", why);
    }
    let mut names = Names::default();
    let files = content.files.iter().filter_map(|at| {
        let node = nodes.get(*at)?;
        if node.entity.is_encoding_unknown {
            let why = "has an encoding that is not known: it goes along as it is";
            losses.push(LossKind::Part, super::content::describe(nodes, *at), why);
        }
        Some(attachment(node, names.next(node), shown.remove(at)))
    });
    let files = files.collect();
    Message { text, files, losses, is_text_file: is_too_large }
}

/// The message with its body, and what of it is shown; None where that is too large for any request, which is looked at
/// before each copy of the text.
fn fitting(
    nodes: &[Node],
    content: &Content,
    losses: &mut Losses,
    case: &Case<'_>,
    message: impl Fn(&Body) -> String,
) -> Option<(String, Shown)> {
    let fits = |octets: u64| octets + FRAME <= case.max_request;
    let octets = |at: &usize| match nodes.get(*at).map(|node| &node.kind) {
        Some(Kind::Text(text)) => text.len() as u64,
        _ => 0,
    };
    if !fits(content.texts.iter().map(octets).sum()) {
        return None;
    }
    let mut body = compose(nodes, &content.texts, losses);
    let mut shown = Shown::new();
    if body.is_html {
        let (linked, found) = link(&body.text, &Links::of(nodes, &content.files));
        body.text = linked.unwrap_or(body.text);
        shown = found;
    }
    if !fits(escaped_size(&body.text)) {
        return None;
    }
    let text = message(&body);
    fits(text.len() as u64).then_some((text, shown))
}

/// Octets of a text within JSON, at least.
fn escaped_size(text: &str) -> u64 {
    let is_escaped = |byte: &u8| matches!(byte, b'"' | b'\\' | b'\n' | b'\r' | b'\t');
    (text.len() + text.as_bytes().iter().filter(|byte| is_escaped(byte)).count()) as u64
}

/// Stands for a text that went into a file.
const NOTE: Note =
    Note("The text of this message is too large to stand here: see the attached file.\r\n");

struct Note(&'static str);

impl Note {
    fn body(&self) -> Body {
        Body { is_html: false, text: self.0.to_owned() }
    }
}

fn has_long_text(nodes: &[Node], files: &[usize]) -> bool {
    files.iter().filter_map(|at| nodes.get(*at)).any(|node| {
        matches!(node.kind, Kind::Leaf(_)) && node.entity.is_text() && !node.entity.is_attachment()
    })
}

fn attachment(node: &Node, name: String, content_id: Option<String>) -> Attachment {
    let entity = &node.entity;
    let (range, encoding, size) = match &node.kind {
        Kind::Leaf(size) => (node.body.clone(), entity.encoding, *size),
        Kind::Text(text) if entity.is_multipart() => {
            (node.body.clone(), Encoding::Identity, text.len() as u64)
        }
        Kind::Text(text) => (node.body.clone(), entity.encoding, text.len() as u64),
        // With the header, so that it can be read.
        Kind::Sealed | Kind::Multipart(_) => {
            let range = node.start..node.body.end;
            (range.clone(), Encoding::Identity, range.end - range.start)
        }
    };
    Attachment { name, content_type: content_type(node), content_id, range, encoding, size }
}

/// The media type, with what is needed to read the octets.
fn content_type(node: &Node) -> String {
    let entity = &node.entity;
    let kind = match node.kind {
        Kind::Sealed | Kind::Multipart(_) => "message/rfc822",
        Kind::Text(_) if entity.is_multipart() => "text/plain",
        Kind::Leaf(_) | Kind::Text(_) => entity.media_type(),
    };
    let is_valid =
        kind.len() <= 128 && kind.split('/').count() == 2 && kind.split('/').all(is_token);
    // A text it would be by the rules; but texts do not come with a name and no kind.
    let is_unsaid = entity.kind.is_none() && entity.name().is_some();
    if !is_valid || is_unsaid {
        return "application/octet-stream".to_owned();
    }
    let mut out = kind.to_owned();
    if kind.starts_with("text/") {
        for name in ["charset", "method"] {
            if let Some(value) = entity.parameter(name).filter(|it| it.len() <= 64 && is_token(it))
            {
                out.push_str(&format!("; {name}={value}"));
            }
        }
    }
    out
}

/// RFC 2045 5.1.
fn is_token(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !b"()<>@,;:\\\"/[]?=".contains(&byte);
    !text.is_empty() && text.bytes().all(is_plain)
}

impl Message {
    /// Whether the text was too large to be the body, and became a file.
    pub(super) fn is_text_file(&self) -> bool {
        self.is_text_file
    }

    /// Octets of the request with all files.
    pub(super) fn request_size(&self) -> u64 {
        let file =
            |file: &Attachment| encoded(file.size) + properties(file).len() as u64 + FILE_FRAME;
        self.text.len() as u64 + FRAME + self.files.iter().map(file).sum::<u64>()
    }

    /// The body of `sendMail`.
    pub(super) fn into_request(self, case: &Case<'_>) -> Json {
        let mut pieces = Vec::new();
        // A piece of its own, for the text is long.
        pieces.push(Piece::Text("{\"message\":".to_owned()));
        let mut text = open(self.text);
        if !self.files.is_empty() {
            text.push_str(",\"attachments\":[");
            for (position, attachment) in self.files.iter().enumerate() {
                if position > 0 {
                    text.push(',');
                }
                let mut file = file(attachment, text);
                text = match file.pop() {
                    Some(Piece::Text(end)) => end,
                    Some(Piece::Content(_)) | None => String::new(),
                };
                pieces.append(&mut file);
            }
            text.push(']');
        }
        text.push_str(&format!("}},\"saveToSentItems\":{}}}", case.save_to_sent_items));
        pieces.push(Piece::Text(text));
        Json::new(pieces, self.losses.list)
    }

    pub(super) fn into_draft(mut self, case: &Case<'_>) -> Draft {
        lose_copy(case, &mut self.losses);
        Draft { message: self.text, attachments: self.files, losses: self.losses.list }
    }
}

/// A file behind what was written before it.
pub(super) fn file(attachment: &Attachment, before: String) -> Vec<Piece> {
    let mut start = before;
    start.push_str(&open(properties(attachment)));
    start.push_str(",\"contentBytes\":\"");
    vec![Piece::Text(start), Piece::Content(attachment.clone()), Piece::Text("\"}".to_owned())]
}

/// An object to which more properties are to be added.
fn open(mut object: String) -> String {
    object.pop();
    object
}

fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("strings and lists of them always become JSON")
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct File<'a> {
    #[serde(rename = "@odata.type", skip_serializing_if = "Option::is_none")]
    odata_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attachment_type: Option<&'static str>,
    name: &'a str,
    content_type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    is_inline: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_id: Option<&'a str>,
}

impl<'a> File<'a> {
    fn of(attachment: &'a Attachment) -> Self {
        Self {
            odata_type: None,
            attachment_type: None,
            name: &attachment.name,
            content_type: &attachment.content_type,
            size: None,
            is_inline: attachment.content_id.is_some(),
            content_id: attachment.content_id.as_deref(),
        }
    }
}

fn properties(attachment: &Attachment) -> String {
    json(&File { odata_type: Some("#microsoft.graph.fileAttachment"), ..File::of(attachment) })
}

/// The body of `createUploadSession`.
pub(super) fn session(attachment: &Attachment) -> String {
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Session<'a> {
        attachment_item: File<'a>,
    }
    let item =
        File { attachment_type: Some("file"), size: Some(attachment.size), ..File::of(attachment) };
    json(&Session { attachment_item: item })
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MessageResource<'a> {
    subject: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    importance: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<Recipient<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    to_recipients: Vec<Recipient<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cc_recipients: Vec<Recipient<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bcc_recipients: Vec<Recipient<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reply_to: Vec<Recipient<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    internet_message_id: Option<&'a str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    is_read_receipt_requested: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    is_delivery_receipt_requested: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    internet_message_headers: Vec<NamedValue<'a>>,
    single_value_extended_properties: Vec<Property<'a>>,
    body: BodyResource<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Recipient<'a> {
    email_address: EmailAddress<'a>,
}

#[derive(Serialize)]
struct EmailAddress<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    name: &'a str,
    address: &'a str,
}

#[derive(Serialize)]
struct NamedValue<'a> {
    name: &'a str,
    value: &'a str,
}

/// A single-value extended property; its value is a string whatever its type.
#[derive(Serialize)]
struct Property<'a> {
    id: &'static str,
    value: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct BodyResource<'a> {
    content_type: &'static str,
    content: &'a str,
}

fn recipient<'a>(name: &'a str, address: &'a str) -> Recipient<'a> {
    Recipient { email_address: EmailAddress { name, address } }
}

fn list(addresses: &[Address]) -> Vec<Recipient<'_>> {
    addresses.iter().map(|it| recipient(&it.name, &it.address)).collect()
}

fn message(head: &Head, recipients: &Recipients, body: &Body, case: &Case<'_>) -> String {
    let tag = tag(case.envelope.id, case.part);
    let properties = [
        (TAG_ID, Some(tag.as_str())),
        ("String 0x1042", head.in_reply_to.as_deref()),
        ("String 0x1039", head.references.as_deref()),
        ("String 0x1045", head.list_unsubscribe.as_deref()),
        ("Integer 0x0036", head.sensitivity.filter(|_| case.extras)),
    ];
    // Its own mailbox is what Graph puts there; the name is one of the extras.
    let has_from = case.from.is_some() || (case.extras && !head.from_name.is_empty());
    let from =
        has_from.then(|| recipient(&head.from_name, case.from.unwrap_or(case.mailbox).as_str()));
    // An empty body was refused to some.
    let content = if body.text.is_empty() { "\r\n" } else { &body.text };
    json(&MessageResource {
        subject: &head.subject,
        importance: head.importance,
        from,
        to_recipients: list(&recipients.to),
        cc_recipients: list(&recipients.cc),
        bcc_recipients: list(&recipients.bcc),
        reply_to: list(&head.reply_to),
        internet_message_id: head.message_id.as_deref(),
        is_read_receipt_requested: head.read_receipt,
        is_delivery_receipt_requested: head.delivery_receipt,
        internet_message_headers: head
            .extras
            .iter()
            .map(|(name, value)| NamedValue { name, value })
            .collect(),
        single_value_extended_properties: properties
            .into_iter()
            .filter_map(|(id, value)| value.map(|value| Property { id, value }))
            .collect(),
        body: BodyResource { content_type: if body.is_html { "html" } else { "text" }, content },
    })
}
