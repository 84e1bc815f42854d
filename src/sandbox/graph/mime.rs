//! The MIME form of a message: base64 of the whole of it, whose header says to whom it goes.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use mail_parser::{
    Address, HeaderName, HeaderValue, MessageParser, MessagePart, MimeHeaders, PartType,
};

use super::answer::Refusal;
use super::message::{Attachment, Body, Pair, Recipient, Stored};

type Result<T> = std::result::Result<T, Refusal>;

/// The octets of the message: base64, in lines or not.
pub(super) fn decoded(body: &[u8]) -> Result<Vec<u8>> {
    let text: Vec<u8> = body.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    STANDARD.decode(text).map_err(|_not_base64| {
        let words = "The MIME content contains an invalid base64 string.";
        Refusal::new(400, "ErrorMimeContentInvalidBase64String", words)
    })
}

/// The message as it is stored.
pub(super) fn read(body: &[u8]) -> Result<Stored> {
    let octets = decoded(body)?;
    let invalid = |words: &str| Refusal::new(400, "ErrorMimeContentInvalid", words);
    if has_bare_line_end(&octets) {
        // The real one takes it, and garbles quoted-printable content.
        return Err(invalid("The MIME content has lines that do not end with CRLF."));
    }
    let starts_with_header = octets
        .split(|byte| *byte == b'\r')
        .next()
        .is_some_and(|line| line.contains(&b':') && line.first() != Some(&b':'));
    let message = MessageParser::default()
        .parse(&octets)
        .filter(|_| starts_with_header)
        .ok_or_else(|| invalid("The MIME content is invalid."))?;
    let mut stored = Stored { importance: "normal".to_owned(), ..Stored::default() };
    stored.subject = message.subject().unwrap_or_default().chars().take(255).collect();
    stored.internet_message_id =
        message.message_id().map(|id| format!("<{id}>")).unwrap_or_default();
    for header in message.headers() {
        let list = match header.name {
            HeaderName::To => &mut stored.to_recipients,
            HeaderName::Cc => &mut stored.cc_recipients,
            HeaderName::Bcc => &mut stored.bcc_recipients,
            HeaderName::ReplyTo => &mut stored.reply_to,
            HeaderName::From => {
                stored.from = recipients(&header.value)?.into_iter().next();
                continue;
            }
            _ => {
                let name = header.name.as_str();
                let value = header.value.as_text();
                match value {
                    Some(value) if name.to_ascii_lowercase().starts_with("x-") => {
                        let pair = Pair { key: name.to_owned(), value: value.to_owned() };
                        stored.internet_message_headers.push(pair);
                    }
                    Some(value) if name.eq_ignore_ascii_case("importance") => {
                        stored.importance = value.to_ascii_lowercase();
                    }
                    _ => {}
                }
                continue;
            }
        };
        list.extend(recipients(&header.value)?);
    }
    let part = |id: &u32| message.parts.get(usize::try_from(*id).unwrap_or(usize::MAX));
    let html = message.html_body.iter().filter_map(part).find_map(|part| match &part.body {
        PartType::Html(html) => Some(("html", html.to_string())),
        _ => None,
    });
    let text = || {
        message.text_body.iter().filter_map(part).find_map(|part| match &part.body {
            PartType::Text(text) => Some(("text", text.to_string())),
            _ => None,
        })
    };
    if let Some((kind, content)) = html.or_else(text) {
        stored.body = Body { content_type: kind.to_owned(), content };
    }
    stored.attachments = message.attachments.iter().filter_map(part).map(attachment).collect();
    Ok(stored)
}

/// The addresses of a field; a group is none, as Exchange has it.
fn recipients(value: &HeaderValue<'_>) -> Result<Vec<Recipient>> {
    let HeaderValue::Address(address) = value else { return Ok(Vec::new()) };
    match address {
        Address::List(list) => Ok(list
            .iter()
            .map(|addr| Recipient {
                address: addr.address.as_deref().unwrap_or_default().to_owned(),
                name: addr.name.as_deref().map(str::to_owned),
            })
            .collect()),
        Address::Group(_) => {
            let words =
                "At least one recipient is not valid., The header of the message names a group.";
            Err(Refusal::new(400, "ErrorInvalidRecipients", words))
        }
    }
}

fn attachment(part: &MessagePart<'_>) -> Attachment {
    let content_type = part.content_type().map_or_else(
        || "application/octet-stream".to_owned(),
        |kind| match kind.subtype() {
            Some(subtype) => format!("{}/{subtype}", kind.ctype()),
            None => kind.ctype().to_owned(),
        },
    );
    let content = part.contents().to_vec();
    Attachment {
        name: part.attachment_name().unwrap_or("attachment").to_owned(),
        content_type,
        content_id: part.content_id().map(str::to_owned),
        is_inline: part.content_id().is_some(),
        size: content.len() as u64,
        is_item: false,
        content: content.into(),
    }
}

fn has_bare_line_end(octets: &[u8]) -> bool {
    let mut previous = 0;
    for byte in octets.iter().copied().chain([0]) {
        if (byte == b'\n') != (previous == b'\r') {
            return true;
        }
        previous = byte;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_line_ends_are_found() {
        assert!(!has_bare_line_end(b"a\r\nb\r\n"));
        assert!(!has_bare_line_end(b""));
        for wrong in [&b"a\nb"[..], b"\na", b"a\rb", b"a\r", b"a\r\r\n", b"a\n"] {
            assert!(has_bare_line_end(wrong), "{wrong:?}");
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let code = |text: &str| read(text.as_bytes()).map_err(|refusal| refusal.code);
        assert_eq!(code("not base64!"), Err("ErrorMimeContentInvalidBase64String"));
        let encoded = |text: &str| STANDARD.encode(text);
        assert_eq!(code(&encoded("hello")), Err("ErrorMimeContentInvalid"));
        assert_eq!(code(&encoded("To: a@b.c\n\nx\n")), Err("ErrorMimeContentInvalid"));
        let group = "To: undisclosed-recipients:;\r\n\r\nx\r\n";
        assert_eq!(code(&encoded(group)), Err("ErrorInvalidRecipients"));
    }

    #[test]
    fn a_message_is_stored_with_its_parts() {
        let text = "From: Ann <ann@x.test>\r\nTo: b@x.test, C <c@x.test>\r\nBcc: d@x.test\r\n\
            Subject: =?utf-8?q?caf=C3=A9?=\r\nX-One: 1\r\nMessage-ID: <1@x.test>\r\nMIME-Version: 1.0\r\n\
            Content-Type: multipart/mixed; boundary=b\r\n\r\n\
            --b\r\nContent-Type: text/html\r\n\r\n<p>hi</p>\r\n\
            --b\r\nContent-Type: application/pdf; name=a.pdf\r\nContent-Disposition: attachment\r\n\
            Content-Transfer-Encoding: base64\r\n\r\nUERG\r\n--b--\r\n";
        let stored = read(STANDARD.encode(text).as_bytes()).unwrap();
        assert_eq!(stored.subject, "café");
        assert_eq!(stored.recipients().collect::<Vec<_>>(), ["b@x.test", "c@x.test", "d@x.test"]);
        assert_eq!(stored.from.unwrap().name.as_deref(), Some("Ann"));
        assert_eq!(
            (stored.body.content_type.as_str(), stored.body.content.trim()),
            ("html", "<p>hi</p>")
        );
        assert_eq!(stored.attachments.len(), 1);
        assert_eq!(stored.attachments[0].name, "a.pdf");
        assert_eq!(&stored.attachments[0].content[..], b"PDF");
        assert_eq!(stored.internet_message_id, "<1@x.test>");
    }
}
