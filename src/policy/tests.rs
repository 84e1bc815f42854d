//! Every file of `tests/policies/` is a list of cases: a message, the policies it is put under, and what becomes of it.

use std::fmt::Write as _;
use std::path::Path;

use bytes::Bytes;

use super::*;
use crate::envelope::{Client, Kind, Priority, SpoolId, UnixMillis};
use crate::message::header::HeaderFilter;
use crate::smtp::address::Charset;

const SENDER: &str = "reports@example.com";

fn mailbox(text: &str) -> Mailbox {
    Mailbox::parse(text, Charset::Utf8).unwrap()
}

/// `rewrite`, and words as in `rewrite name="Re ports" allowed=*@x.example clean sender=a@b.c`.
fn policy(words: &str) -> Policy {
    let (before, name) = match words.split_once("name=\"") {
        Some((before, rest)) => {
            let (name, after) = rest.split_once('"').unwrap();
            (format!("{before}{after}"), Some(name))
        }
        None => (words.to_owned(), None),
    };
    let kind = match before.split(' ').next().unwrap() {
        "rewrite" => SenderPolicy::Rewrite,
        "preserve" => SenderPolicy::Preserve,
        "reject" => SenderPolicy::Reject,
        other => panic!("{other}"),
    };
    let (mut allowed, mut names, mut sender) = (Vec::new(), Names::AsTheyAre, mailbox(SENDER));
    for word in before.split(' ').skip(1).filter(|word| !word.is_empty()) {
        match word.split_once('=') {
            Some(("allowed", pattern)) => allowed.push(Pattern::parse(pattern).unwrap()),
            Some(("sender", address)) => sender = mailbox(address),
            None if word == "clean" => names = Names::WithoutAt,
            _ => panic!("{word}"),
        }
    }
    Policy::new(&config::Sender { policy: kind, allowed }, Some(&sender), name, names)
}

fn envelope(reverse_path: &str, content: &[u8]) -> Envelope {
    let starts_folded = content.starts_with(b" ") || content.starts_with(b"\t");
    Envelope {
        kind: Kind::Mail,
        id: SpoolId::from_u128(1),
        accepted: UnixMillis(0),
        reverse_path: match reverse_path {
            "" => ReversePath::Null,
            address => ReversePath::Mailbox(mailbox(address)),
        },
        rcpts: Vec::new(),
        smtputf8: false,
        eight_bit: !content.is_ascii(),
        ret: None,
        envid: None,
        size: content.len() as u64,
        client: Client { address: "127.0.0.1".into(), helo: "app".into() },
        priority: Priority::Normal,
        author: None,
        prepend: Bytes::from_static(match starts_folded {
            true => b"Received: x\r\n\r\n",
            false => b"Received: x\r\n",
        }),
    }
}

async fn read(message: &Message) -> Vec<u8> {
    let (mut reader, mut out) = (message.reader(), Vec::new());
    while let Some(chunk) = reader.chunk().await.unwrap() {
        assert!(!chunk.is_empty());
        out.extend_from_slice(&chunk);
    }
    out
}

/// What leaves, and whose it is.
async fn apply(policy: &Policy, reverse_path: &str, content: &[u8]) -> (Vec<u8>, ReversePath) {
    let envelope = envelope(reverse_path, content);
    let body = Body::Memory(content.to_vec().into());
    let (message, reverse_path) = policy.apply(&envelope, &body).await.unwrap();
    let out = read(&message).await;
    assert_eq!(message.size, out.len() as u64, "SIZE");
    assert_eq!(message.eight_bit, !out.is_ascii(), "8BITMIME");
    assert!(read(&message).await == out, "a second time");
    (out, reverse_path)
}

fn refusal(policy: &Policy, content: &[u8]) -> Option<Reply> {
    let (mut filter, mut out) = (HeaderFilter::new(), Vec::new());
    filter.push(content, &mut out);
    policy.refusal(&filter.finish(&mut out))
}

/// Lines end with CRLF, or nothing after `\z`; `\xNN` is an octet.
fn octets(text: &str) -> Vec<u8> {
    let text = text.replace('\n', "\r\n").replace("\\z\r\n", "");
    let mut parts = text.split("\\x");
    let mut out = parts.next().unwrap().as_bytes().to_vec();
    for part in parts {
        let (hex, rest) = part.split_at(2);
        out.push(u8::from_str_radix(hex, 16).unwrap());
        out.extend_from_slice(rest.as_bytes());
    }
    out
}

fn shown(octets: &[u8]) -> String {
    let mut out = String::new();
    let ends = octets.ends_with(b"\r\n");
    for chunk in octets.utf8_chunks() {
        for c in chunk.valid().replace("\r\n", "\n").chars() {
            match c {
                '\n' | ' '..='~' => out.push(c),
                c if c.is_ascii() => write!(out, "\\x{:02x}", u32::from(c)).unwrap(),
                c => out.push(c),
            }
        }
        chunk.invalid().iter().for_each(|b| write!(out, "\\x{b:02x}").unwrap());
    }
    if !ends {
        out.push_str("\\z\n");
    }
    out
}

/// What becomes of one case: `=== NAME`, lines `> POLICY` and `MAIL FROM:<...>`, `---`, the message.
async fn play(case: &str) -> (String, usize) {
    let (head, rest) = case.split_once("\n---\n").unwrap();
    let input = rest.split("\n-> ").next().unwrap();
    let input = if input.ends_with('\n') { input.to_owned() } else { format!("{input}\n") };
    let content = octets(&input);
    let from = head.lines().find_map(|line| line.strip_prefix("MAIL FROM:<"));
    let from = from.map_or("app@host.example", |rest| rest.strip_suffix('>').unwrap());
    let (mut out, mut played) = (format!("=== {head}\n---\n{input}"), 0);
    for words in head.lines().filter_map(|line| line.strip_prefix("> ")) {
        played += 1;
        let policy = policy(words);
        match refusal(&policy, &content) {
            Some(reply) => {
                let mut lines = Vec::new();
                reply.write_to(&mut lines);
                assert!(
                    lines.split(|b| *b == b'\n').all(|line| line.len() < 510 && line.is_ascii())
                );
                write!(out, "-> {words}\n{}", shown(&lines)).unwrap();
            }
            None => {
                let (left, reverse_path) = apply(&policy, from, &content).await;
                let left = left.strip_prefix(b"Received: x\r\n").unwrap();
                write!(out, "-> {words}\nMAIL FROM:{reverse_path}\n").unwrap();
                out.push_str(&match left == content {
                    true => "(as it came)\n".to_owned(),
                    false => shown(left),
                });
            }
        }
    }
    (out, played)
}

#[tokio::test]
async fn every_message_leaves_as_its_policy_wants_it() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/policies");
    let update = std::env::var_os("UPDATE_EXPECT").is_some();
    let mut files: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut all = 0;
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let mut out = String::new();
        for case in text.split("=== ").skip(1) {
            let (case, played) = play(case.trim_end_matches('\n')).await;
            out.push_str(&case);
            out.push('\n');
            all += played;
        }
        if update {
            std::fs::write(&file, &out).unwrap();
        }
        assert!(update || out == text, "{}: UPDATE_EXPECT=1 writes\n{out}", file.display());
    }
    assert!(all >= 60, "{all} cases");
}

/// A content in a file, which is read in chunks.
fn on_disk(octets: &[u8], crc32c: u32) -> Body {
    use std::io::Write as _;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(octets).unwrap();
    let file = std::sync::Arc::new(file);
    Body::File(crate::envelope::BodyFile { file, start: 0, len: octets.len() as u64, crc32c })
}

#[tokio::test]
async fn a_header_longer_than_what_is_read_of_it_keeps_no_second_from() {
    let long = format!("X: {}\r\n", "y".repeat(990)).repeat(300);
    let end = "Sender: s@old.example\r\nFROM :\r\n late@old.example\r\nReply-To: r@old.example\r\nTo: b@example.org\r\n\r\nFrom: body\r\n";
    for (first, words, expected, reverse_path) in [
        ("From: A <a@old.example>\r\n", "rewrite", "From: A <reports@example.com>\r\n", SENDER),
        ("", "rewrite name=\"Reports\"", "From: Reports <reports@example.com>\r\n", SENDER),
        (
            "From: a@ok.example\r\n",
            "rewrite allowed=*@ok.example",
            "From: a@ok.example\r\n",
            "a@ok.example",
        ),
    ] {
        let content = format!("{first}{long}{end}").into_bytes();
        let envelope = envelope("app@host.example", &content);
        let body = on_disk(&content, crc32c::crc32c(&content));
        let (message, path) = policy(words).apply(&envelope, &body).await.unwrap();
        assert_eq!(path.as_str(), reverse_path);
        let out = String::from_utf8(read(&message).await).unwrap();
        assert_eq!(message.size, out.len() as u64, "SIZE, with fields that fall out");
        let rest = "Reply-To: r@old.example\r\nTo: b@example.org\r\n\r\nFrom: body\r\n";
        let whole = format!("Received: x\r\n{expected}{long}{rest}");
        assert!(out == whole, "{words}: {} octets for {}", out.len(), whole.len());
        assert_eq!(String::from_utf8(read(&message).await).unwrap(), out, "a second time");
    }
}

/// What leaves where what is read of the content at first ends behind `before`, with `...` for what fills it up.
async fn read_behind(before: &str, after: &str) -> String {
    let (first, last) = before.split_once("...").unwrap();
    let room = 256 * 1024 - first.len() - last.len();
    let fill = format!("X: {}\r\n", "y".repeat(room - 5));
    let content = format!("{first}{fill}{last}{after}").into_bytes();
    let envelope = envelope("", &content);
    let body = on_disk(&content, crc32c::crc32c(&content));
    let policy = policy("rewrite allowed=*@ok.example");
    let (message, _) = policy.apply(&envelope, &body).await.unwrap();
    let out = String::from_utf8(read(&message).await).unwrap();
    assert_eq!(message.size, out.len() as u64, "SIZE, beyond what is read at first");
    out.replace(&fill, "...")
}

#[tokio::test]
async fn a_field_that_was_cut_in_its_name_is_no_end_of_the_header() {
    let rest = "To: b@example.org\r\n\r\nbody\r\n";
    for (before, after, expected) in [
        // A second From, which may not stand.
        (
            "From: a@ok.example\r\n...Fro",
            format!("m: ceo@evil.example\r\n{rest}"),
            format!("From: a@ok.example\r\n...{rest}"),
        ),
        (
            "...Fro",
            format!("m: ceo@evil.example\r\n{rest}"),
            format!("From: reports@example.com\r\n...{rest}"),
        ),
        // A message that says all it should.
        (
            "From: Ann <a@old.example>\r\n...Subj",
            format!("ect: x\r\n{rest}"),
            format!("From: Ann <reports@example.com>\r\n...Subject: x\r\n{rest}"),
        ),
        // The empty line itself, and a line that is no field.
        (
            "From: a@ok.example\r\n...\r",
            "\nFrom: body\r\n".to_owned(),
            "From: a@ok.example\r\n...\r\nFrom: body\r\n".to_owned(),
        ),
        (
            "From: a@ok.example\r\n...garb",
            "age\r\nFrom: ceo@evil.example\r\n".to_owned(),
            "From: a@ok.example\r\n...\r\ngarbage\r\nFrom: ceo@evil.example\r\n".to_owned(),
        ),
    ] {
        let out = read_behind(before, &after).await;
        assert!(out == format!("Received: x\r\n{expected}"), "{before:?}: {out}");
    }
}

#[tokio::test]
async fn a_large_body_leaves_as_it_is_and_a_damaged_one_never_to_its_end() {
    let content =
        [b"From: app@old.example\r\n\r\n".as_slice(), &b"line\r\n".repeat(200_000)].concat();
    let envelope = envelope("app@host.example", &content);
    let crc32c = crc32c::crc32c(&content);
    let (message, _) =
        policy("rewrite").apply(&envelope, &on_disk(&content, crc32c)).await.unwrap();
    let out = read(&message).await;
    assert_eq!(message.size, out.len() as u64);
    let head = b"Received: x\r\nFrom: reports@example.com\r\nReply-To: app@old.example\r\n";
    assert!(out == [head.as_slice(), &content[23..]].concat());

    let (message, _) =
        policy("rewrite").apply(&envelope, &on_disk(&content, crc32c ^ 1)).await.unwrap();
    let mut reader = message.reader();
    let error = loop {
        match reader.chunk().await {
            Ok(chunk) => assert!(chunk.is_some()),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    // A small one is known to be damaged before anything is made of it.
    let small = on_disk(b"From: app@old.example\r\n\r\n", 1);
    assert!(policy("rewrite").apply(&envelope, &small).await.is_err());
}

#[tokio::test]
async fn without_a_provider_nothing_is_judged_or_changed() {
    let content = b"From: app@old.example\r\n\r\n";
    for kind in [SenderPolicy::Rewrite, SenderPolicy::Preserve, SenderPolicy::Reject] {
        let section = config::Sender { policy: kind, allowed: Vec::new() };
        let policy = Policy::new(&section, None, None, Names::AsTheyAre);
        assert_eq!(refusal(&policy, content), None);
        let (out, _) = apply(&policy, "app@host.example", content).await;
        assert!(out.ends_with(content));
    }
}

#[tokio::test]
async fn the_reverse_path_asks_for_no_smtputf8_that_the_message_does_not_need() {
    let content = "From: jörg@ok.example\r\n\r\n".as_bytes();
    for (smtputf8, expected) in [(false, SENDER), (true, "jörg@ok.example")] {
        let envelope = Envelope { smtputf8, ..envelope("app@host.example", content) };
        let body = Body::Memory(Bytes::from_static(content));
        let policy = policy("rewrite allowed=*@ok.example");
        let (message, reverse_path) = policy.apply(&envelope, &body).await.unwrap();
        assert_eq!((message.smtputf8, reverse_path.as_str()), (smtputf8, expected));
    }
}

#[tokio::test]
async fn a_sender_beyond_ascii_needs_smtputf8_where_it_takes_the_place() {
    for (words, needs) in [
        ("rewrite sender=büro@example.com", true),
        ("rewrite sender=büro@example.com allowed=app@old.example", false),
        ("rewrite", false),
    ] {
        let content = b"From: app@old.example\r\n\r\n";
        let body = Body::Memory(Bytes::from_static(content));
        let (message, _) = policy(words).apply(&envelope("", content), &body).await.unwrap();
        assert_eq!((message.smtputf8, message.eight_bit), (needs, needs), "{words}");
    }
}

/// The provider's own address in the other spelling was taken for another's.
#[tokio::test]
async fn a_sender_is_the_same_in_a_labels_and_u_labels() {
    let content = b"From: r@xn--bcher-kva.example\r\n\r\n";
    for sender in ["r@b\u{fc}cher.example", "R@xn--bcher-kva.example"] {
        assert_eq!(refusal(&policy(&format!("reject sender={sender}")), content), None);
        let (out, path) =
            apply(&policy(&format!("rewrite sender={sender}")), "x@y.z", content).await;
        assert!(out.ends_with(content), "{}", shown(&out));
        assert_eq!(path.as_str(), "r@xn--bcher-kva.example");
    }
    let other = policy("reject sender=r@bucher.example");
    assert!(refusal(&other, content).is_some());
}
