//! A message as Graph stores it, and the JSON from which it is made, looked at as strictly as the documents allow.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::smtp::address::{Charset, Mailbox};

use super::answer::Refusal;

type Object = Map<String, Value>;
type Result<T> = std::result::Result<T, Refusal>;

/// What the mailbox keeps, and the inbox shows.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stored {
    pub subject: String,
    pub body: Body,
    /// Where another than the mailbox itself is written.
    pub from: Option<Recipient>,
    pub to_recipients: Vec<Recipient>,
    pub cc_recipients: Vec<Recipient>,
    pub bcc_recipients: Vec<Recipient>,
    pub reply_to: Vec<Recipient>,
    pub importance: String,
    pub internet_message_id: String,
    pub internet_message_headers: Vec<Pair>,
    pub single_value_extended_properties: Vec<Pair>,
    pub is_read_receipt_requested: bool,
    pub is_delivery_receipt_requested: bool,
    pub categories: Vec<String>,
    pub attachments: Vec<Attachment>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Body {
    /// `text` or `html`.
    pub content_type: String,
    pub content: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Recipient {
    pub address: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A header field or an extended property: name or id, and value.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pair {
    #[serde(rename = "name")]
    pub key: String,
    pub value: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    pub name: String,
    pub content_type: String,
    pub content_id: Option<String>,
    pub is_inline: bool,
    pub size: u64,
    /// An attached Outlook item, which has no octets of its own.
    pub is_item: bool,
    #[serde(skip)]
    pub content: Bytes,
}

impl Stored {
    /// Everybody to whom it goes.
    pub fn recipients(&self) -> impl Iterator<Item = &str> {
        let lists = [&self.to_recipients, &self.cc_recipients, &self.bcc_recipients];
        lists.into_iter().flatten().map(|recipient| recipient.address.as_str())
    }

    pub(super) fn octets(&self) -> u64 {
        let attachments: u64 = self.attachments.iter().map(|it| it.size).sum();
        attachments + self.body.content.len() as u64
    }

    /// Octets in memory.
    pub(crate) fn kept(&self) -> usize {
        let attachments: usize = self.attachments.iter().map(|it| it.content.len()).sum();
        attachments + self.body.content.len()
    }

    /// What only shows once it is sent: that there is a recipient, that none of them is odd, that there are not too many.
    pub(super) fn check_recipients(&self, most: usize) -> Result<()> {
        let mut count = 0;
        for address in self.recipients() {
            count += 1;
            if !is_fit(address) {
                let words = format!(
                    "At least one recipient is not valid., Recipient '{address}' is not resolved. All recipients must be resolved before a message can be submitted."
                );
                return Err(Refusal::new(400, "ErrorInvalidRecipients", words));
            }
        }
        if count == 0 {
            let words = "At least one recipient is not valid., A message can't be sent because it contains no recipients.";
            return Err(Refusal::new(400, "ErrorInvalidRecipients", words));
        }
        if count > most {
            let words =
                format!("The message has {count} recipients, and the mailbox allows {most}.");
            return Err(Refusal::new(400, "ErrorRecipientLimitExceeded", words));
        }
        Ok(())
    }
}

/// Addresses that Graph takes: ASCII, nothing quoted, a domain with a dot.
fn is_fit(address: &str) -> bool {
    Mailbox::parse(address, Charset::Ascii).is_ok_and(|mailbox| {
        let domain = mailbox.domain();
        !mailbox.local_part().starts_with('"') && domain.contains('.') && !domain.starts_with('[')
    })
}

/// Any JSON at all.
pub(super) fn parse(body: &[u8]) -> Result<Value> {
    serde_json::from_slice(body).map_err(|_not_json| {
        Refusal::new(
            400,
            "BadRequest",
            "Unable to read JSON request payload. Please ensure Content-Type header is set and payload is of valid JSON format.",
        )
    })
}

/// The parameters of sendMail: the message, and whether a copy stays in Sent Items.
pub(super) fn read_send_mail(body: &[u8]) -> Result<(Stored, bool)> {
    let json = parse(body)?;
    let mut parameters = Object::new();
    for (name, value) in object(&json, "microsoft.graph.sendMail")? {
        // Both spellings are in the documents.
        let name = match name.as_str() {
            "Message" => "message",
            "SaveToSentItems" => "saveToSentItems",
            other => other,
        };
        parameters.insert(name.to_owned(), value.clone());
    }
    only(&parameters, &["message", "saveToSentItems"], "microsoft.graph.sendMail")?;
    let message = parameters.get("message").filter(|value| !value.is_null()).ok_or_else(|| {
        Refusal::new(400, "ErrorInvalidParameter", "The value of the parameter 'Message' is empty.")
    })?;
    let save = boolean(&parameters, "saveToSentItems")?.unwrap_or(true);
    Ok((read(message)?, save))
}

/// A message that stands by itself.
pub(super) fn read(json: &Value) -> Result<Stored> {
    let mut stored = Stored { importance: "normal".to_owned(), ..Stored::default() };
    change(&mut stored, json)?;
    Ok(stored)
}

/// Takes the properties that are named into a message.
pub(super) fn change(stored: &mut Stored, json: &Value) -> Result<()> {
    const KIND: &str = "microsoft.graph.message";
    let map = object(json, KIND)?;
    for name in OF_THE_SERVER {
        if map.contains_key(name) {
            let words = format!("The property '{name}' is read-only and cannot be set.");
            return Err(Refusal::new(400, "ErrorInvalidPropertySet", words));
        }
    }
    only(map, &PROPERTIES, KIND)?;
    annotation(map, &["#microsoft.graph.message"])?;
    if let Some(subject) = text(map, "subject")? {
        no_line_breaks(&subject, "subject")?;
        // Exchange cuts it there.
        stored.subject = subject.chars().take(255).collect();
    }
    if let Some(body) = map.get("body").filter(|value| !value.is_null()) {
        stored.body = read_body(body)?;
    }
    for (name, list) in [
        ("toRecipients", &mut stored.to_recipients),
        ("ccRecipients", &mut stored.cc_recipients),
        ("bccRecipients", &mut stored.bcc_recipients),
        ("replyTo", &mut stored.reply_to),
    ] {
        if let Some(values) = list_of(map, name)? {
            *list = values.iter().map(read_recipient).collect::<Result<_>>()?;
        }
    }
    if let Some(from) = map.get("from").filter(|value| !value.is_null()) {
        stored.from = Some(read_recipient(from)?);
    }
    if let Some(sender) = map.get("sender").filter(|value| !value.is_null()) {
        read_recipient(sender)?;
    }
    if let Some(importance) = choice(map, "importance", &["low", "normal", "high"])? {
        stored.importance = importance;
    }
    choice(map, "inferenceClassification", &["focused", "other"])?;
    if let Some(id) = text(map, "internetMessageId")? {
        let inner = id.strip_prefix('<').and_then(|id| id.strip_suffix('>'));
        let good = inner.and_then(|inner| inner.split_once('@')).is_some_and(|(left, right)| {
            let clean = |text: &str| {
                !text.is_empty()
                    && text.bytes().all(|b| b.is_ascii_graphic() && !b"<>@".contains(&b))
            };
            clean(left) && clean(right)
        });
        if !good {
            let words =
                "The value of the property 'internetMessageId' is not of the form <left@right>.";
            return Err(Refusal::new(400, "ErrorInvalidRequest", words));
        }
        stored.internet_message_id = id;
    }
    for (name, flag) in [
        ("isReadReceiptRequested", &mut stored.is_read_receipt_requested),
        ("isDeliveryReceiptRequested", &mut stored.is_delivery_receipt_requested),
    ] {
        if let Some(value) = boolean(map, name)? {
            *flag = value;
        }
    }
    if let Some(values) = list_of(map, "categories")? {
        let texts = values.iter().map(|value| match value {
            Value::String(text) => Ok(text.clone()),
            other => Err(wrong_type(other, "Edm.String")),
        });
        stored.categories = texts.collect::<Result<_>>()?;
    }
    if let Some(values) = list_of(map, "internetMessageHeaders")? {
        stored.internet_message_headers = read_headers(values)?;
    }
    if let Some(values) = list_of(map, "singleValueExtendedProperties")? {
        stored.single_value_extended_properties =
            values.iter().map(read_property).collect::<Result<_>>()?;
    }
    if let Some(values) = list_of(map, "attachments")? {
        stored.attachments = values.iter().map(read_attachment).collect::<Result<_>>()?;
    }
    Ok(())
}

const PROPERTIES: [&str; 18] = [
    "@odata.type",
    "subject",
    "body",
    "from",
    "sender",
    "toRecipients",
    "ccRecipients",
    "bccRecipients",
    "replyTo",
    "importance",
    "inferenceClassification",
    "internetMessageHeaders",
    "internetMessageId",
    "isReadReceiptRequested",
    "isDeliveryReceiptRequested",
    "singleValueExtendedProperties",
    "attachments",
    "categories",
];

/// Known, and never sent by a client.
const OF_THE_SERVER: [&str; 16] = [
    "id",
    "bodyPreview",
    "changeKey",
    "conversationId",
    "conversationIndex",
    "createdDateTime",
    "hasAttachments",
    "isDraft",
    "isRead",
    "lastModifiedDateTime",
    "parentFolderId",
    "receivedDateTime",
    "sentDateTime",
    "uniqueBody",
    "webLink",
    "@odata.context",
];

fn read_body(json: &Value) -> Result<Body> {
    const KIND: &str = "microsoft.graph.itemBody";
    let map = object(json, KIND)?;
    only(map, &["@odata.type", "contentType", "content"], KIND)?;
    Ok(Body {
        content_type: choice(map, "contentType", &["text", "html"])?
            .unwrap_or_else(|| "text".to_owned()),
        content: text(map, "content")?.unwrap_or_default(),
    })
}

fn read_recipient(json: &Value) -> Result<Recipient> {
    const KIND: &str = "microsoft.graph.recipient";
    const ADDRESS: &str = "microsoft.graph.emailAddress";
    let map = object(json, KIND)?;
    only(map, &["@odata.type", "emailAddress"], KIND)?;
    let inner = map.get("emailAddress").ok_or_else(|| {
        Refusal::new(400, "ErrorInvalidRecipients", "At least one recipient is not valid.")
    })?;
    let inner = object(inner, ADDRESS)?;
    only(inner, &["@odata.type", "address", "name"], ADDRESS)?;
    let recipient = Recipient {
        address: text(inner, "address")?.unwrap_or_default(),
        name: text(inner, "name")?,
    };
    no_line_breaks(&recipient.address, "address")?;
    no_line_breaks(recipient.name.as_deref().unwrap_or_default(), "name")?;
    Ok(recipient)
}

fn read_headers(values: &[Value]) -> Result<Vec<Pair>> {
    const KIND: &str = "microsoft.graph.internetMessageHeader";
    if values.len() > 5 {
        return Err(Refusal::new(
            400,
            "InvalidInternetMessageHeaderCollection",
            "Maximum number of headers in one message should be less than or equal to 5.",
        ));
    }
    let mut headers = Vec::new();
    for value in values {
        let map = object(value, KIND)?;
        only(map, &["@odata.type", "name", "value"], KIND)?;
        let name = text(map, "name")?.unwrap_or_default();
        let value = text(map, "value")?.unwrap_or_default();
        let refuse = |words: String| Err(Refusal::new(400, "InvalidInternetMessageHeader", words));
        if !name.to_ascii_lowercase().starts_with("x-") {
            return refuse(format!(
                "The internet message header name '{name}' should start with 'x-' or 'X-'."
            ));
        }
        if !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':') {
            return refuse(
                "The internet message header name holds a forbidden character.".to_owned(),
            );
        }
        if value.chars().any(|c| c.is_control() && c != '\t') {
            return refuse(format!(
                "The value of the internet message header '{name}' holds a forbidden character."
            ));
        }
        headers.push(Pair { key: name, value });
    }
    if headers.iter().map(|it| it.key.len() + it.value.len()).sum::<usize>() > 256 * 1024 {
        let words = "The headers of the message are larger than 256 KB.";
        return Err(Refusal::new(400, "InvalidInternetMessageHeaderCollection", words));
    }
    Ok(headers)
}

fn read_property(json: &Value) -> Result<Pair> {
    const KIND: &str = "microsoft.graph.singleValueLegacyExtendedProperty";
    let map = object(json, KIND)?;
    only(map, &["@odata.type", "id", "value"], KIND)?;
    let id = text(map, "id")?.unwrap_or_default();
    let value = text(map, "value")?;
    let invalid = |words: String| Refusal::new(400, "ErrorInvalidExtendedProperty", words);
    let kind = kind_of_property(&id)
        .ok_or_else(|| invalid(format!("The extended property '{id}' is invalid.")))?;
    let value = value.ok_or_else(|| invalid(format!("The property '{id}' has no value.")))?;
    let good = match kind.as_str() {
        "integer" | "short" => value.parse::<i32>().is_ok(),
        "boolean" => ["true", "false"].contains(&value.to_ascii_lowercase().as_str()),
        "systemtime" => value.len() >= 20 && value.contains('T') && value.ends_with('Z'),
        _ => true,
    };
    if good {
        return Ok(Pair { key: id, value });
    }
    Err(invalid(format!("The value of the extended property '{id}' is not of its type.")))
}

/// The type that an id names, in lower case: `Type 0xNNNN`, `Type {guid} Name x`, `Type {guid} Id 0xNNNN`.
fn kind_of_property(id: &str) -> Option<String> {
    let hex = |text: &str| {
        let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
        digits.is_some_and(|it| {
            (1..=4).contains(&it.len()) && it.bytes().all(|b| b.is_ascii_hexdigit())
        })
    };
    let (kind, rest) = id.split_once(' ')?;
    let kind = kind.to_ascii_lowercase();
    if !["string", "integer", "short", "boolean", "systemtime"].contains(&kind.as_str()) {
        return None;
    }
    let good = match rest.split_once(' ') {
        None => hex(rest),
        Some((set, rest)) => {
            let guid = set.strip_prefix('{').and_then(|set| set.strip_suffix('}'));
            let guid = guid.is_some_and(|guid| uuid::Uuid::try_parse(guid).is_ok());
            guid && match rest.split_once(' ') {
                Some(("Name", name)) => !name.is_empty(),
                Some(("Id", number)) => hex(number),
                _ => false,
            }
        }
    };
    good.then_some(kind)
}

/// The same property, however its id is spelt.
pub(super) fn same_property(one: &str, other: &str) -> bool {
    one.eq_ignore_ascii_case(other)
}

pub(super) fn read_attachment(json: &Value) -> Result<Attachment> {
    const KIND: &str = "microsoft.graph.attachment";
    let map = object(json, KIND)?;
    let kind = text(map, "@odata.type")?.ok_or_else(|| {
        let words = "A type must be specified for an attachment: '@odata.type' is missing.";
        Refusal::new(400, "RequestBodyRead", words)
    })?;
    let name = text(map, "name")?
        .filter(|name| !name.is_empty())
        .ok_or_else(|| Refusal::new(400, "ErrorInvalidRequest", "The attachment has no 'name'."))?;
    match kind.as_str() {
        "#microsoft.graph.fileAttachment" => {}
        "#microsoft.graph.itemAttachment" => {
            only(map, &["@odata.type", "name", "contentType", "isInline", "item"], &kind)?;
            let Some(item) = map.get("item") else {
                let words = "The attachment has no 'item'.";
                return Err(Refusal::new(400, "ErrorInvalidRequest", words));
            };
            let size = item.to_string().len() as u64;
            return Ok(Attachment { name, is_item: true, size, ..Attachment::default() });
        }
        other => {
            let words = format!("A type named '{other}' could not be resolved by the model.");
            return Err(Refusal::new(400, "RequestBodyRead", words));
        }
    }
    let known = [
        "@odata.type",
        "name",
        "contentType",
        "contentBytes",
        "contentId",
        "contentLocation",
        "isInline",
    ];
    only(map, &known, "microsoft.graph.fileAttachment")?;
    let bytes = text(map, "contentBytes")?.ok_or_else(|| {
        Refusal::new(400, "ErrorInvalidRequest", "The attachment has no 'contentBytes'.")
    })?;
    let content = STANDARD.decode(&bytes).map_err(|_not_base64| {
        wrong_type(&Value::from(bytes.chars().take(20).collect::<String>()), "Edm.Binary")
    })?;
    let content_id = text(map, "contentId")?;
    let is_inline = boolean(map, "isInline")?.unwrap_or(false);
    check_inline(content_id.as_deref(), is_inline)?;
    Ok(Attachment {
        name,
        content_type: text(map, "contentType")?
            .unwrap_or_else(|| "application/octet-stream".to_owned()),
        content_id,
        is_inline,
        size: content.len() as u64,
        is_item: false,
        content: content.into(),
    })
}

/// The HTML names it by `cid:`, without brackets: written otherwise it would not be found.
pub(super) fn check_inline(content_id: Option<&str>, is_inline: bool) -> Result<()> {
    let refuse = |words: &str| Err(Refusal::new(400, "ErrorInvalidRequest", words));
    match content_id {
        Some(id) if id.contains(['<', '>', '\r', '\n']) => {
            refuse("The property 'contentId' is written without angle brackets.")
        }
        Some("") => refuse("The property 'contentId' is empty."),
        None if is_inline => refuse("An attachment that is inline has a 'contentId'."),
        _ => Ok(()),
    }
}

pub(super) fn object<'a>(json: &'a Value, kind: &str) -> Result<&'a Object> {
    json.as_object().ok_or_else(|| wrong_type(json, kind))
}

pub(super) fn only(map: &Object, known: &[&str], kind: &str) -> Result<()> {
    match map.keys().find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => {
            let words = format!(
                "The property '{name}' does not exist on type '{kind}'. Make sure to only use property names that are defined by the type."
            );
            Err(Refusal::new(400, "RequestBodyRead", words))
        }
    }
}

fn annotation(map: &Object, allowed: &[&str]) -> Result<()> {
    match text(map, "@odata.type")? {
        Some(kind) if !allowed.contains(&kind.as_str()) => {
            let words = format!("A type named '{kind}' could not be resolved by the model.");
            Err(Refusal::new(400, "RequestBodyRead", words))
        }
        _ => Ok(()),
    }
}

fn list_of<'a>(map: &'a Object, name: &str) -> Result<Option<&'a [Value]>> {
    match map.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(values)) => Ok(Some(values)),
        Some(other) => Err(wrong_type(other, "Collection")),
    }
}

pub(super) fn text(map: &Object, name: &str) -> Result<Option<String>> {
    match map.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.contains('\0') => {
            Err(Refusal::new(400, "RequestBodyRead", "The request holds an invalid character."))
        }
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(wrong_type(other, "Edm.String")),
    }
}

pub(super) fn boolean(map: &Object, name: &str) -> Result<Option<bool>> {
    match map.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(other) => Err(wrong_type(other, "Edm.Boolean")),
    }
}

/// One of a closed set, in any case: the documents mix them.
pub(super) fn choice(map: &Object, name: &str, known: &[&str]) -> Result<Option<String>> {
    let Some(value) = text(map, name)? else { return Ok(None) };
    let lower = value.to_ascii_lowercase();
    if known.contains(&lower.as_str()) {
        return Ok(Some(lower));
    }
    Err(wrong_type(&json!(value), name))
}

fn no_line_breaks(text: &str, name: &str) -> Result<()> {
    if text.contains(['\r', '\n']) {
        let words = format!("The property '{name}' holds a line break.");
        return Err(Refusal::new(400, "ErrorInvalidRequest", words));
    }
    Ok(())
}

fn wrong_type(found: &Value, expected: &str) -> Refusal {
    let mut literal = found.to_string();
    if literal.len() > 80 {
        literal = literal.chars().take(80).collect();
    }
    let words =
        format!("Cannot convert the literal '{literal}' to the expected type '{expected}'.");
    Refusal::new(400, "RequestBodyRead", words)
}
