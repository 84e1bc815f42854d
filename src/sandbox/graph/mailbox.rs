//! What stands in the mailboxes: drafts with their attachments and upload sessions, and what was sent.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use serde_json::{Map, Value, json};

use crate::clock;

use super::answer::{Answer, Refusal, guid};
use super::filter::Filter;
use super::limits::Lane;
use super::message::{self, Attachment, Pair, Stored};
use super::settings::Settings;

/// Items in all mailboxes; the oldest that were sent go first.
const MAX_ITEMS: usize = 10_000;
const MAX_SESSIONS: usize = 1_000;
/// Octets of the smallest attachment for an upload session, and of the largest.
const SESSION: std::ops::RangeInclusive<u64> = 2_097_152..=157_286_400;
/// Octets of the largest attachment that is posted as it is.
const POSTED: u64 = 3_145_611;

type Result<T> = std::result::Result<T, Refusal>;

#[derive(Debug, Default)]
pub(super) struct Mailboxes {
    items: VecDeque<Item>,
    sessions: HashMap<String, Session>,
}

/// A message in a mailbox.
#[derive(Clone, Debug)]
struct Item {
    /// In lower case.
    mailbox: String,
    id: String,
    is_immutable: bool,
    is_draft: bool,
    made: Instant,
    stored: Stored,
}

/// An attachment that comes in ranges.
#[derive(Debug)]
struct Session {
    /// To whose account its octets go.
    lane: Lane,
    message: String,
    attachment: Attachment,
    size: u64,
    got: BytesMut,
    answers: u32,
}

impl Mailboxes {
    /// A draft (`POST …/messages`).
    pub(super) fn create(
        &mut self,
        mailbox: &str,
        mut stored: Stored,
        is_immutable: bool,
    ) -> Answer {
        if stored.internet_message_id.is_empty() {
            stored.internet_message_id = format!("<{}@sandbox.prod.outlook.invalid>", guid());
        }
        let mailbox = mailbox.to_owned();
        let made = clock::now();
        let item = Item { mailbox, id: id(), is_immutable, is_draft: true, made, stored };
        let answer = Answer::json(201, &item.json(None));
        self.put(item);
        answer
    }

    /// A copy of what went out without a draft.
    pub(super) fn keep_sent(&mut self, mailbox: &str, stored: Stored) {
        let mailbox = mailbox.to_owned();
        let made = clock::now();
        let (is_immutable, is_draft) = (false, false);
        let item = Item { mailbox, id: id(), is_immutable, is_draft, made, stored };
        self.put(item.emptied());
    }

    fn put(&mut self, item: Item) {
        self.items.push_back(item);
        if self.items.len() > MAX_ITEMS {
            let oldest = self.items.iter().position(|item| !item.is_draft).unwrap_or(0);
            self.items.remove(oldest);
        }
    }

    /// `GET …/messages/{id}`.
    pub(super) fn show(&self, mailbox: &str, id: &str, select: Option<&str>) -> Result<Answer> {
        let mut items = self.items.iter();
        let item = items.find(|item| item.mailbox == mailbox && item.id == id);
        Ok(Answer::json(200, &item.ok_or_else(not_found)?.json(select)))
    }

    /// `GET …/messages`, and the same of one folder.
    pub(super) fn list(
        &self,
        mailbox: &str,
        filter: &Filter,
        drafts: Option<bool>,
        query: &Map<String, Value>,
        lag: Duration,
    ) -> Answer {
        let text = |name: &str| query.get(name).and_then(Value::as_str);
        let top = text("$top").and_then(|top| top.parse().ok()).unwrap_or(10);
        let now = clock::now();
        let items = self.items.iter().rev().filter(|item| item.mailbox == mailbox);
        let found = items
            .filter(|item| now.saturating_duration_since(item.made) >= lag)
            .filter(|item| drafts.is_none_or(|drafts| item.is_draft == drafts))
            .filter(|item| filter.takes(&item.stored, item.is_draft))
            .take(top)
            .map(|item| item.json(text("$select")));
        Answer::json(200, &json!({ "value": found.collect::<Vec<_>>() }))
    }

    /// `PATCH …/messages/{id}`, of a draft.
    pub(super) fn change(&mut self, mailbox: &str, id: &str, change: &Value) -> Result<Answer> {
        let item = self.draft(mailbox, id)?;
        message::change(&mut item.stored, change)?;
        Ok(Answer::json(200, &item.json(None)))
    }

    /// `DELETE …/messages/{id}`.
    pub(super) fn delete(&mut self, mailbox: &str, id: &str) -> Result<Answer> {
        let mut items = self.items.iter();
        let at = items.position(|item| item.mailbox == mailbox && item.id == id);
        self.items.remove(at.ok_or_else(not_found)?);
        self.sessions.retain(|_, session| session.message != id);
        Ok(Answer::empty(204))
    }

    /// `POST …/attachments`.
    pub(super) fn attach(
        &mut self,
        mailbox: &str,
        id: &str,
        attachment: Attachment,
        settings: &Settings,
    ) -> Result<Answer> {
        if attachment.size > POSTED {
            return Err(Refusal::new(413, "RequestEntityTooLarge", ""));
        }
        self.has_room(attachment.size, settings)?;
        let item = self.draft(mailbox, id)?;
        let answer = json!({
            "@odata.type": "#microsoft.graph.fileAttachment",
            "id": self::id(),
            "name": attachment.name,
            "contentType": attachment.content_type,
            "size": attachment.size,
            "isInline": attachment.is_inline,
            "contentId": attachment.content_id,
        });
        item.attach(attachment, settings)?;
        Ok(Answer::json(201, &answer))
    }

    /// `POST …/attachments/createUploadSession`.
    pub(super) fn open_session(
        &mut self,
        lane: &Lane,
        id: &str,
        json: &Value,
        root: &str,
        settings: &Settings,
    ) -> Result<Answer> {
        let (_, mailbox) = lane;
        let (attachment, size) = read_attachment_item(json)?;
        if size < *SESSION.start() {
            let words = "The attachment size is smaller than the minimum size for an upload session. Please use a simple attachment.";
            return Err(Refusal::new(
                400,
                "ErrorAttachmentSizeShouldNotBeLessThanMinimumSize",
                words,
            ));
        }
        if size > *SESSION.end() {
            let words = "The size of the attachment exceeds the allowed limit.";
            return Err(Refusal::new(400, "ErrorAttachmentSizeLimitExceeded", words));
        }
        self.has_room(size, settings)?;
        let item = self.draft(mailbox, id)?;
        item.fits(size, settings)?;
        if self.sessions.len() >= MAX_SESSIONS {
            return Err(Refusal::new(
                503,
                "ErrorServerBusy",
                "There are too many upload sessions.",
            ));
        }
        let token = format!("{}{}", guid(), guid());
        let url = format!(
            "{root}/api/v2.0/Users('{}')/Messages('{id}')/AttachmentSessions('{}')?authtoken={token}",
            mailbox.replace('@', "%40"),
            guid()
        );
        let session = Session {
            lane: lane.clone(),
            message: id.to_owned(),
            attachment,
            size,
            got: BytesMut::new(),
            answers: 0,
        };
        self.sessions.insert(token, session);
        let answer = json!({
            "@odata.context": format!("{root}/v1.0/$metadata#microsoft.graph.uploadSession"),
            "uploadUrl": url,
            "expirationDateTime": expires(),
            "nextExpectedRanges": ["0-"],
        });
        Ok(Answer::json(201, &answer))
    }

    /// Whose upload it is.
    pub(super) fn lane_of_session(&self, token: &str) -> Option<Lane> {
        self.sessions.get(token).map(|session| session.lane.clone())
    }

    /// `GET` of an upload URL.
    pub(super) fn show_session(&mut self, token: &str) -> Result<Answer> {
        let session = self.sessions.get_mut(token).ok_or_else(no_session)?;
        Ok(Answer::json(200, &session.json()))
    }

    /// `DELETE` of an upload URL.
    pub(super) fn close_session(&mut self, token: &str) -> Result<Answer> {
        self.sessions.remove(token).map(|_| Answer::empty(204)).ok_or_else(no_session)
    }

    /// `PUT` of a range.
    pub(super) fn upload(
        &mut self,
        token: &str,
        range: Option<&str>,
        octets: &[u8],
        root: &str,
        settings: &Settings,
    ) -> Result<Answer> {
        let session = self.sessions.get_mut(token).ok_or_else(no_session)?;
        let (start, end, total) = range.and_then(content_range).ok_or_else(|| {
            Refusal::new(
                400,
                "ErrorInvalidRequest",
                "The header Content-Range is missing or malformed.",
            )
        })?;
        if total != session.size || end >= total || end < start {
            let words = "The Content-Range does not fit the size of the attachment.";
            return Err(Refusal::new(400, "ErrorInvalidRequest", words));
        }
        if octets.len() as u64 != end - start + 1 {
            let words = "The length of the content does not fit the Content-Range.";
            return Err(Refusal::new(400, "ErrorInvalidRequest", words));
        }
        let got = session.got.len() as u64;
        let wrong = |inner| {
            let words = "The uploaded range is invalid.";
            Err(Refusal::new(416, "invalidRange", words).inner(inner))
        };
        if start < got {
            return wrong("fragmentOverlap");
        }
        if start > got {
            return wrong("fragmentOutOfOrder");
        }
        if got == 0 {
            session.got.reserve(usize::try_from(session.size).unwrap_or(0));
        }
        session.got.extend_from_slice(octets);
        if end + 1 < total {
            return Ok(Answer::json(200, &session.json()));
        }
        let Some(session) = self.sessions.remove(token) else { return Err(no_session()) };
        let attachment = Attachment { content: session.got.freeze(), ..session.attachment };
        let (_, mailbox) = &session.lane;
        self.draft(mailbox, &session.message)?.attach(attachment, settings)?;
        let place = format!(
            "{root}/api/v2.0/Users('{}')/Messages('{}')/Attachments('{}')",
            mailbox.replace('@', "%40"),
            session.message,
            id()
        );
        Ok(Answer::empty(201).with("location", place))
    }

    /// The draft that is to be sent, still where it is.
    pub(super) fn peek(&mut self, mailbox: &str, id: &str) -> Result<Stored> {
        self.draft(mailbox, id).map(|item| item.stored.clone())
    }

    /// It goes out: from Drafts to Sent Items, where it has another id unless that is to last.
    pub(super) fn sent(&mut self, mailbox: &str, id: &str) -> Result<Stored> {
        let item = self.draft(mailbox, id)?;
        let stored = item.stored.clone();
        item.is_draft = false;
        item.made = clock::now();
        if !item.is_immutable {
            item.id = self::id();
        }
        let emptied = item.clone().emptied();
        *item = emptied;
        self.sessions.retain(|_, session| session.message != id);
        Ok(stored)
    }

    fn draft(&mut self, mailbox: &str, id: &str) -> Result<&mut Item> {
        let mut items = self.items.iter_mut();
        items
            .find(|item| item.mailbox == mailbox && item.id == id && item.is_draft)
            .ok_or_else(not_found)
    }

    /// Drafts are in memory.
    fn has_room(&self, octets: u64, settings: &Settings) -> Result<()> {
        let drafts = self.items.iter().map(|item| item.stored.octets());
        let sessions = self.sessions.values().map(|session| session.size);
        let used: u64 = drafts.chain(sessions).sum();
        if used.saturating_add(octets) > settings.keep as u64 {
            return Err(Refusal::new(507, "ErrorQuotaExceeded", "The mailbox is over its quota."));
        }
        Ok(())
    }
}

impl Item {
    fn json(&self, select: Option<&str>) -> Value {
        let (stored, mailbox) = (&self.stored, self.mailbox.as_str());
        let recipients = |list: &[message::Recipient]| {
            let shown = list.iter().map(|it| {
                json!({ "emailAddress": {
                    "address": it.address,
                    "name": it.name.as_deref().unwrap_or(&it.address),
                }})
            });
            Value::Array(shown.collect())
        };
        let pairs = |pairs: &[Pair], key: &str| {
            let shown = pairs.iter().map(|pair| json!({ key: pair.key, "value": pair.value }));
            Value::Array(shown.collect())
        };
        let from = stored.from.as_ref().map_or(mailbox, |from| &from.address);
        let all = json!({
            "id": self.id,
            "createdDateTime": now(),
            "subject": stored.subject,
            "bodyPreview": stored.body.content.chars().take(255).collect::<String>(),
            "body": { "contentType": stored.body.content_type, "content": stored.body.content },
            "from": { "emailAddress": { "address": from, "name": from } },
            "sender": { "emailAddress": { "address": mailbox, "name": mailbox } },
            "toRecipients": recipients(&stored.to_recipients),
            "ccRecipients": recipients(&stored.cc_recipients),
            "bccRecipients": recipients(&stored.bcc_recipients),
            "replyTo": recipients(&stored.reply_to),
            "importance": stored.importance,
            "hasAttachments": !stored.attachments.is_empty(),
            "internetMessageId": stored.internet_message_id,
            "internetMessageHeaders": pairs(&stored.internet_message_headers, "name"),
            "singleValueExtendedProperties": pairs(&stored.single_value_extended_properties, "id"),
            "isDraft": self.is_draft,
            "isRead": true,
            "isReadReceiptRequested": stored.is_read_receipt_requested,
            "isDeliveryReceiptRequested": stored.is_delivery_receipt_requested,
            "parentFolderId": if self.is_draft { "drafts" } else { "sentitems" },
        });
        let (Some(select), Value::Object(all)) = (select, &all) else { return all };
        let wanted: Vec<&str> = select.split(',').map(str::trim).collect();
        let shown = all.iter().filter(|(name, _)| *name == "id" || wanted.contains(&name.as_str()));
        Value::Object(shown.map(|(name, value)| (name.clone(), value.clone())).collect())
    }

    /// Without the octets of its attachments, which nobody asks for any more.
    fn emptied(mut self) -> Self {
        for attachment in &mut self.stored.attachments {
            attachment.content = Bytes::new();
            attachment.size = 0;
        }
        self.stored.body.content.truncate(0);
        self
    }

    fn attach(&mut self, attachment: Attachment, settings: &Settings) -> Result<()> {
        self.fits(attachment.size, settings)?;
        self.stored.attachments.push(attachment);
        Ok(())
    }

    fn fits(&self, more: u64, settings: &Settings) -> Result<()> {
        if self.stored.octets().saturating_add(more) <= settings.message_size {
            return Ok(());
        }
        let words = "The message exceeds the maximum supported size.";
        Err(Refusal::new(400, "ErrorMessageSizeExceeded", words))
    }
}

impl Session {
    /// Both spellings that the documents show.
    fn json(&mut self) -> Value {
        self.answers += 1;
        let next = self.got.len();
        if self.answers % 2 == 1 {
            json!({ "ExpirationDateTime": expires(), "NextExpectedRanges": [next.to_string()] })
        } else {
            json!({ "expirationDateTime": expires(), "nextExpectedRanges": [format!("{next}-")] })
        }
    }
}

fn read_attachment_item(json: &Value) -> Result<(Attachment, u64)> {
    const KIND: &str = "microsoft.graph.attachmentItem";
    let outer = message::object(json, "microsoft.graph.createUploadSession")?;
    message::only(
        outer,
        &["AttachmentItem", "attachmentItem"],
        "microsoft.graph.createUploadSession",
    )?;
    let missing = |what: &str| {
        Refusal::new(400, "ErrorInvalidRequest", format!("The property '{what}' is missing."))
    };
    let item = outer.values().next().ok_or_else(|| missing("AttachmentItem"))?;
    let map = message::object(item, KIND)?;
    let known =
        ["@odata.type", "attachmentType", "name", "size", "contentType", "isInline", "contentId"];
    message::only(map, &known, KIND)?;
    let kinds = ["file", "item", "reference"];
    message::choice(map, "attachmentType", &kinds)?.ok_or_else(|| missing("attachmentType"))?;
    let name = message::text(map, "name")?.filter(|name| !name.is_empty());
    let size = match map.get("size") {
        None => return Err(missing("size")),
        Some(size) => size.as_u64().ok_or_else(|| {
            let words =
                format!("Cannot convert the literal '{size}' to the expected type 'Edm.Int64'.");
            Refusal::new(400, "RequestBodyRead", words)
        })?,
    };
    let content_id = message::text(map, "contentId")?;
    let is_inline = message::boolean(map, "isInline")?.unwrap_or(false);
    message::check_inline(content_id.as_deref(), is_inline)?;
    let attachment = Attachment {
        name: name.ok_or_else(|| missing("name"))?,
        content_type: message::text(map, "contentType")?
            .unwrap_or_else(|| "application/octet-stream".to_owned()),
        content_id,
        is_inline,
        size,
        is_item: false,
        content: Bytes::new(),
    };
    Ok((attachment, size))
}

/// `bytes START-END/TOTAL` (RFC 9110 14.4).
fn content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, end) = range.split_once('-')?;
    Some((start.parse().ok()?, end.parse().ok()?, total.parse().ok()?))
}

fn not_found() -> Refusal {
    Refusal::new(404, "ErrorItemNotFound", "The specified object was not found in the store.")
}

fn no_session() -> Refusal {
    Refusal::new(404, "itemNotFound", "The upload session was not found.")
        .inner("uploadSessionNotFound")
}

/// An id as long as the real ones, with what is to be encoded in a URL.
fn id() -> String {
    format!("AAMkAD{}{}-_=", guid().replace('-', ""), guid().replace('-', ""))
}

fn now() -> String {
    clock::Time(clock::wall()).to_string()
}

fn expires() -> String {
    clock::Time(clock::wall().plus(Duration::from_secs(3_600))).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_range_is_read() {
        assert_eq!(content_range("bytes 0-9/100"), Some((0, 9, 100)));
        for wrong in ["", "bytes 0-9", "0-9/100", "bytes */100", "bytes 0-9/*", "bytes -9/100"] {
            assert_eq!(content_range(wrong), None, "{wrong}");
        }
    }
}
