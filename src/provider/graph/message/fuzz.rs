//! Any octets for a message, and what must hold whatever they are.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde_json::Value;

use super::{Assembly, Case, Format, Plan, Scan, Scanned, convert};
use crate::envelope::{Client, Envelope, Kind, Priority, Rcpt, SpoolId, UnixMillis};
use crate::smtp::address::{Charset, ForwardPath, Mailbox, ReversePath};
use crate::smtp::params::Notify;

/// The recipients of every message here.
pub const RCPTS: [&str; 4] =
    ["ann@example.com", "Bob@Example.com", "o'brien+x@example.org", "carol@example.net"];

/// An envelope with these recipients.
pub fn envelope(rcpts: &[&str]) -> Envelope {
    let rcpt = |address: &&str| Rcpt {
        path: ForwardPath::parse(address, Charset::Utf8).expect("an address"),
        notify: Notify::Unsaid,
        orcpt: None,
    };
    Envelope {
        id: SpoolId::from_u128(0x0198_f3c2_7a5e_7000_8000_0000_0000_0001),
        kind: Kind::Mail,
        accepted: UnixMillis(0),
        reverse_path: ReversePath::Null,
        rcpts: rcpts.iter().map(rcpt).collect(),
        smtputf8: false,
        eight_bit: false,
        ret: None,
        envid: None,
        size: 0,
        client: Client { address: "unix".into(), helo: "app".into() },
        priority: Priority::Normal,
        author: None,
        prepend: Bytes::new(),
    }
}

/// The message read in pieces of `step` octets.
pub fn scan(message: &[u8], step: usize) -> Scanned {
    let mut scan = Scan::new();
    message.chunks(step.max(1)).for_each(|piece| scan.push(piece));
    scan.finish()
}

/// What an assembly makes of the message in pieces of `step` octets.
pub fn assemble(mut assembly: Assembly<'_>, message: &[u8], step: usize) -> Vec<u8> {
    for (position, piece) in message.chunks(step.max(1)).enumerate() {
        assembly.push((position * step.max(1)) as u64, piece);
    }
    assembly.finish()
}

/// Converts the message in every way. The first octet says how it is cut, and which of the recipients are the part.
pub fn check(octets: &[u8]) {
    let Some((first, message)) = octets.split_first() else { return };
    let step = usize::from(*first) + 1;
    let whole = scan(message, message.len());
    let cut = scan(message, step);
    assert_eq!(format!("{whole:?}"), format!("{cut:?}"), "in pieces of {step}");
    let envelope = envelope(&RCPTS);
    let part: Vec<usize> = (0..RCPTS.len()).filter(|at| first >> at & 1 == 0 || *at == 3).collect();
    let mailbox = Mailbox::parse("reports@contoso.example", Charset::Ascii).expect("an address");
    let reverse_path = ReversePath::Mailbox(mailbox.clone());
    for format in [Format::Auto, Format::Json, Format::Mime] {
        for (may_draft, max_request) in [(false, 4_000_000), (true, 4_000_000), (true, 2_000)] {
            let case = Case {
                envelope: &envelope,
                reverse_path: &reverse_path,
                part: &part,
                mailbox: &mailbox,
                from: None,
                save_to_sent_items: false,
                format,
                may_draft,
                extras: first & 16 == 0,
                max_request,
            };
            if let Ok(plan) = convert(&whole, &case) {
                check_plan(&plan, &case, message, step);
            }
        }
    }
}

/// Each request is valid, as large as it was said to be, and for exactly the part.
pub fn check_plan(plan: &Plan, case: &Case<'_>, message: &[u8], step: usize) {
    for loss in plan.losses() {
        assert!(!loss.what.chars().any(char::is_control), "{loss:?}");
    }
    match plan {
        Plan::Json(json) => {
            let request = assemble(json.assembly(), message, step);
            assert_eq!(request.len() as u64, json.size);
            assert!(json.size <= case.max_request);
            let request: Value = serde_json::from_slice(&request).expect("JSON");
            check_message(&request["message"], case);
            for file in request["message"]["attachments"].as_array().into_iter().flatten() {
                let content = file["contentBytes"].as_str().expect("a text");
                assert!(BASE64.decode(content).is_ok());
            }
        }
        Plan::Mime(mime) => {
            let request = assemble(mime.assembly(), message, step);
            assert!(request.len() as u64 <= mime.size && mime.size <= case.max_request);
            let written = BASE64.decode(&request).expect("base64");
            check_mime(&written, case);
        }
        Plan::Draft(draft) => {
            let text: Value = serde_json::from_str(&draft.message).expect("JSON");
            check_message(&text, case);
            let mut end = 0;
            for attachment in &draft.attachments {
                assert!(attachment.range.start >= end, "files are in order");
                end = attachment.range.end;
                let (mut octets, mut file) = (attachment.octets(), Vec::new());
                for (position, piece) in message.chunks(step).enumerate() {
                    octets.push((position * step) as u64, piece, &mut file);
                }
                octets.finish(&mut file);
                assert_eq!(file.len() as u64, attachment.size, "{attachment:?}");
                let post = attachment.post();
                let request = assemble(post.assembly(), message, step);
                assert_eq!(request.len() as u64, post.size);
                let request: Value = serde_json::from_slice(&request).expect("JSON");
                assert_eq!(request["contentBytes"], BASE64.encode(&file));
                let session: Value = serde_json::from_str(&attachment.session()).expect("JSON");
                assert_eq!(session["AttachmentItem"]["size"], attachment.size);
            }
        }
    }
}

fn check_message(message: &Value, case: &Case<'_>) {
    let mut found = Vec::new();
    for list in ["toRecipients", "ccRecipients", "bccRecipients"] {
        for recipient in message[list].as_array().into_iter().flatten() {
            found.push(recipient["emailAddress"]["address"].as_str().expect("a text").to_owned());
            let name = recipient["emailAddress"]["name"].as_str().unwrap_or_default();
            assert!(!name.chars().any(char::is_control), "{name:?}");
        }
    }
    check_recipients(found, case);
    let headers = message["internetMessageHeaders"].as_array();
    let headers: Vec<&Value> = headers.into_iter().flatten().collect();
    assert!(headers.len() <= 5);
    for header in headers {
        let (name, value) = (header["name"].as_str().expect("a text"), header["value"].as_str());
        assert!(name.get(..2).is_some_and(|it| it.eq_ignore_ascii_case("x-")), "{name}");
        assert!(value.is_some_and(|it| !it.is_empty() && !it.chars().any(char::is_control)));
    }
    let subject = message["subject"].as_str().expect("a text");
    assert!(subject.encode_utf16().count() <= 255 && !subject.chars().any(char::is_control));
    assert!(message["body"]["content"].as_str().is_some_and(|it| !it.is_empty()));
}

/// Read by another parser than ours.
fn check_mime(written: &[u8], case: &Case<'_>) {
    let lone = |(at, byte): (usize, &u8)| match byte {
        b'\n' => at == 0 || written[at - 1] != b'\r',
        b'\r' => written.get(at + 1) != Some(&b'\n'),
        _ => false,
    };
    assert!(!written.iter().enumerate().any(lone), "{}", written.escape_ascii());
    let end = memchr::memmem::find(written, b"\r\n\r\n").expect("an empty line");
    let header = written[..end + 4].to_ascii_lowercase();
    for name in ["\r\nresent-to", "\r\nresent-cc", "\r\nresent-bcc"] {
        assert!(memchr::memmem::find(&header, name.as_bytes()).is_none(), "{name}");
    }
    let read = mail_parser::MessageParser::default().parse_headers(written).expect("a header");
    let lists = read.headers().iter().filter(|header| {
        use mail_parser::HeaderName;
        matches!(header.name, HeaderName::To | HeaderName::Cc | HeaderName::Bcc)
    });
    let addresses = lists.filter_map(|header| header.value.as_address());
    let addresses = addresses.flat_map(|list| list.iter());
    let found = addresses.filter_map(|it| it.address()).map(str::to_owned).collect();
    check_recipients(found, case);
}

fn check_recipients(found: Vec<String>, case: &Case<'_>) {
    let expected: BTreeSet<String> =
        case.part.iter().map(|at| case.envelope.rcpts[*at].path.as_str().to_lowercase()).collect();
    let once: BTreeSet<String> = found.iter().map(|it| it.to_lowercase()).collect();
    assert_eq!(once, expected, "exactly the part");
    assert_eq!(found.len(), expected.len(), "each once: {found:?}");
}
