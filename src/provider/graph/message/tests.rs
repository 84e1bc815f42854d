//! The corpus in `testdata/`, hostile messages, and what holds for all of them.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::fuzz::{assemble, check, check_plan, envelope, scan};
use super::*;
use crate::smtp::address::Charset;
use crate::smtp::testing::{Rng, rounds};

/// One case of a file of the corpus:
///
/// ```text
/// #### its name
/// key: value            (where it is not as usual)
/// ----
/// the message           (its lines end with CRLF; with `escapes: yes`, `\xHH` is an octet)
/// ====
/// what is expected      (UPDATE_EXPECT=1 writes it)
/// ```
struct Sample {
    name: String,
    options: Vec<(String, String)>,
    /// As it stands in the file.
    written: String,
    expected: String,
}

impl Sample {
    fn read_all(text: &str) -> Vec<Self> {
        let read = |case: &str| {
            let (head, rest) = case.split_once("\n----\n").expect("a line of hyphens");
            let (written, expected) = rest.split_once("====\n").expect("a line of equals signs");
            let mut lines = head.lines();
            let name = lines.next().expect("a name").trim().to_owned();
            let option = |line: &str| {
                let (key, value) = line.split_once(':').expect("key: value");
                (key.trim().to_owned(), value.trim().to_owned())
            };
            let (written, expected) = (written.to_owned(), expected.to_owned());
            Self { name, options: lines.map(option).collect(), written, expected }
        };
        text.split("#### ").skip(1).map(read).collect()
    }

    fn option(&self, key: &str) -> Option<&str> {
        self.options.iter().find(|(it, _)| it == key).map(|(_, value)| value.as_str())
    }

    fn is(&self, key: &str) -> bool {
        self.option(key) == Some("yes")
    }

    fn message(&self) -> Vec<u8> {
        let text = self.written.replace('\n', "\r\n");
        if !self.is("escapes") {
            return text.into_bytes();
        }
        let mut octets = Vec::new();
        let mut rest = text.as_str();
        while let Some((before, after)) = rest.split_once("\\x") {
            octets.extend_from_slice(before.as_bytes());
            let (digits, after) = after.split_at(2);
            octets.push(u8::from_str_radix(digits, 16).expect("two digits"));
            rest = after;
        }
        octets.extend_from_slice(rest.as_bytes());
        octets
    }

    fn run(&self) -> Value {
        let message = self.message();
        let rcpts: Vec<&str> = match self.option("to") {
            Some(list) => list.split(", ").collect(),
            None => vec!["ann@example.com"],
        };
        let envelope = envelope(&rcpts);
        let part = match self.option("part") {
            Some(list) => list.split(", ").map(|it| it.parse().unwrap()).collect(),
            None => (0..rcpts.len()).collect::<Vec<usize>>(),
        };
        let mailbox = |text| Mailbox::parse(text, Charset::Ascii).unwrap();
        let own = mailbox("reports@contoso.example");
        let from = self.option("send as").map(mailbox);
        let reverse_path = match self.is("null reverse path") {
            true => ReversePath::Null,
            false => ReversePath::Mailbox(own.clone()),
        };
        let case = Case {
            envelope: &envelope,
            reverse_path: &reverse_path,
            part: &part,
            mailbox: &own,
            from: from.as_ref(),
            save_to_sent_items: self.is("save"),
            format: match self.option("format") {
                None => Format::Auto,
                Some("json") => Format::Json,
                Some("mime") => Format::Mime,
                Some(other) => panic!("format {other}"),
            },
            may_draft: self.is("drafts"),
            extras: self.option("extras") != Some("no"),
            max_request: self.option("max").map_or(4_000_000, |it| it.parse().unwrap()),
        };
        for step in [1, 7, message.len()] {
            let scanned = scan(&message, step);
            if let Ok(plan) = convert(&scanned, &case) {
                check_plan(&plan, &case, &message, step.max(1));
            }
        }
        match convert(&scan(&message, message.len()), &case) {
            Ok(plan) => show(&plan, &message),
            Err(unfit) => json!({ "unfit": unfit.to_string() }),
        }
    }
}

fn show(plan: &Plan, message: &[u8]) -> Value {
    let losses: Vec<String> = plan.losses().iter().map(show_loss).collect();
    match plan {
        Plan::Json(json) => {
            let request = assemble(json.assembly(), message, message.len());
            let mut request: Value = serde_json::from_slice(&request).unwrap();
            open_files(&mut request["message"]);
            json!({ "json": request, "losses": losses })
        }
        Plan::Mime(mime) => {
            let request = assemble(mime.assembly(), message, message.len());
            let written = BASE64.decode(request).unwrap();
            let lines = written.split_inclusive(|byte| *byte == b'\n');
            let lines = lines.map(|line| {
                let line = line.strip_suffix(b"\r\n").unwrap_or(line);
                line.escape_ascii().to_string().replace("\\\"", "\"").replace("\\\\", "\\")
            });
            json!({ "mime": lines.collect::<Vec<_>>(), "losses": losses })
        }
        Plan::Draft(draft) => {
            let text: Value = serde_json::from_str(&draft.message).unwrap();
            let files = draft.attachments.iter().map(|attachment| {
                let (mut octets, mut file) = (attachment.octets(), Vec::new());
                octets.push(0, message, &mut file);
                octets.finish(&mut file);
                let session: Value = serde_json::from_str(&attachment.session()).unwrap();
                json!({ "session": session, "octets": show_octets(&file) })
            });
            json!({ "draft": text, "files": files.collect::<Vec<_>>(), "losses": losses })
        }
    }
}

fn show_loss(loss: &Loss) -> String {
    match loss.kind {
        LossKind::Usual => format!("usual: {}", loss.what),
        kind => format!("{}: {} {}", kind.as_str(), loss.what, loss.why),
    }
}

/// What is in the files, in place of base64.
fn open_files(message: &mut Value) {
    let files = message.get_mut("attachments").and_then(Value::as_array_mut);
    for file in files.into_iter().flatten() {
        let octets = BASE64.decode(file["contentBytes"].as_str().unwrap()).unwrap();
        file["contentBytes"] = show_octets(&octets);
    }
}

fn show_octets(octets: &[u8]) -> Value {
    match octets.len() {
        0..=400 => format!("= {}", octets.escape_ascii()).into(),
        length => format!("{length} octets, CRC {:08x}", crc32c::crc32c(octets)).into(),
    }
}

/// Pretty, with what is short on one line.
fn print(value: &Value, indent: usize, out: &mut String) {
    let short = serde_json::to_string(value).unwrap();
    let (open, close) = match value {
        _ if short.len() + indent <= 150 => return out.push_str(&short),
        Value::Array(_) => ('[', ']'),
        Value::Object(_) => ('{', '}'),
        _ => return out.push_str(&short),
    };
    let entries: Vec<(Option<&String>, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, value)| (Some(key), value)).collect(),
        Value::Array(list) => list.iter().map(|value| (None, value)).collect(),
        _ => Vec::new(),
    };
    out.push(open);
    for (position, (key, value)) in entries.iter().enumerate() {
        out.push_str(if position > 0 { ",\n" } else { "\n" });
        out.push_str(&" ".repeat(indent + 2));
        if let Some(key) = key {
            out.push_str(&format!("\"{key}\": "));
        }
        print(value, indent + 2, out);
    }
    out.push_str(&format!("\n{}{close}", " ".repeat(indent)));
}

fn corpus() -> Vec<(PathBuf, Vec<Sample>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/provider/graph/testdata");
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let read = |path: PathBuf| {
        let samples = Sample::read_all(&fs::read_to_string(&path).unwrap());
        (path, samples)
    };
    files.into_iter().map(read).collect()
}

#[test]
fn every_message_of_the_corpus_becomes_what_is_expected() {
    let is_update = std::env::var_os("UPDATE_EXPECT").is_some();
    let (mut count, mut wrong) = (0, Vec::new());
    for (path, samples) in corpus() {
        let mut file = String::new();
        for sample in samples {
            count += 1;
            let mut found = String::new();
            print(&sample.run(), 0, &mut found);
            found.push_str("\n\n");
            if found.trim_end() != sample.expected.trim_end() {
                wrong.push(format!("{}: {}\n{found}", path.display(), sample.name));
            }
            let options: String =
                sample.options.iter().map(|(key, value)| format!("{key}: {value}\n")).collect();
            let Sample { name, written, .. } = &sample;
            file.push_str(&format!("#### {name}\n{options}----\n{written}====\n{found}"));
        }
        if is_update {
            fs::write(path, file).unwrap();
        }
    }
    assert!(count >= 200, "{count} messages");
    assert!(is_update || wrong.is_empty(), "{}", wrong.join("\n"));
}

/// One message made of the corpus: pieces cut out, doubled, put elsewhere, octets changed.
fn mutate(samples: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let mut message = vec![u8::try_from(rng.below(256)).unwrap()];
    message.extend_from_slice(&samples[rng.below(samples.len())]);
    for _ in 0..rng.below(6) {
        let at = 1 + rng.below(message.len());
        match rng.below(5) {
            0 => {
                let end = at + rng.below(60).min(message.len() - at.min(message.len()));
                drop(message.drain(at.min(message.len())..end.min(message.len())));
            }
            1 => {
                let other = &samples[rng.below(samples.len())];
                let start = rng.below(other.len());
                let end = (start + rng.below(200)).min(other.len());
                let at = at.min(message.len());
                message.splice(at..at, other[start..end].iter().copied());
            }
            2 => {
                let words: [&[u8]; 14] = [
                    b"\r\n",
                    b"\n",
                    b"\r",
                    b"--b",
                    b"\r\n--b\r\n",
                    b"\r\n--b--\r\n",
                    b"\0",
                    b"=?utf-8?q?",
                    b"?=",
                    b"\"",
                    b"<",
                    b"=",
                    b"\r\nTo: eve@evil.example\r\n",
                    b"\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n",
                ];
                let at = at.min(message.len());
                message.splice(at..at, words[rng.below(words.len())].iter().copied());
            }
            3 => {
                let octet = u8::try_from(rng.below(256)).unwrap();
                if let Some(place) = message.get_mut(at) {
                    *place = octet;
                }
            }
            _ => {
                let end = (at + rng.below(300)).min(message.len());
                let piece = message[at.min(end)..end].to_vec();
                message.extend_from_slice(&piece);
            }
        }
    }
    message
}

#[test]
fn whatever_comes_is_sent_to_exactly_the_part() {
    let samples: Vec<Vec<u8>> =
        corpus().iter().flat_map(|(_, samples)| samples.iter().map(Sample::message)).collect();
    for seed in 0..rounds(1500) {
        let mut rng = Rng::new(seed);
        let message = mutate(&samples, &mut rng);
        let checked = std::panic::catch_unwind(|| check(&message));
        assert!(checked.is_ok(), "seed {seed}: {}", message.escape_ascii());
    }
}

/// What takes quadratic time takes hours here, and what calls itself overflows its stack.
#[test]
fn a_hostile_message_takes_no_more_than_its_length() {
    let size = 300_000;
    let fill = |piece: &str| piece.repeat(size / piece.len());
    let mixed = "Content-Type: multipart/mixed; boundary=b\r\n\r\n";
    let html =
        "Content-Type: multipart/related; boundary=b\r\n\r\n--b\r\nContent-Type: text/html\r\n\r\n";
    let image = "\r\n--b\r\nContent-Type: image/png\r\nContent-ID: <i>\r\nContent-Location: x.png\r\n\r\nx\r\n--b--\r\n";
    let nested: String = (0..6_000)
        .map(|n| format!("Content-Type: multipart/mixed; boundary=n{n}\r\n\r\n--n{n}\r\n"))
        .collect();
    let messages = [
        fill("Content-Type: message/rfc822\r\n\r\n"),
        nested,
        format!(
            "{mixed}{}",
            fill("--b\r\nContent-Type: multipart/mixed; boundary=never\r\n\r\nx\r\n")
        ),
        format!("{mixed}{}", fill("--b\r\n")),
        format!("{mixed}{}", fill("--c\r\n")),
        format!("{mixed}{}", fill("--")),
        format!("{mixed}{}", fill("--b--\r\n")),
        format!(
            "{mixed}{}",
            fill("--b\r\nContent-Type: application/pdf; name=a\r\n\r\nx\r\n").split_at(200_000).0
        ),
        format!("To: {}", fill("=?utf-8?q?")),
        format!("To: {}", fill("(")),
        format!("To: {}", fill("\"")),
        format!("To: {}", fill("<")),
        format!("To: {}", fill("a@b.c, ")),
        format!("Subject: {}", fill("=?utf-8?b?")),
        format!("Reply-To: {}", fill("a@b.example, ")),
        fill("X-A: =?utf-8?q?x?=\r\n"),
        (0..30_000).map(|n| format!("X-{n}: {n}\r\n")).collect(),
        fill("Message-ID: x\r\n"),
        format!("Content-Type: text/plain{}", fill("; a*0=b; b (")),
        format!(
            "{mixed}{}",
            fill(&format!("--b\r\nContent-Type: a/b{}\r\n\r\n", " (".repeat(8000)))
        ),
        format!("{html}{}{image}", fill("cid:")),
        format!("{html}{}{image}", fill("src=")),
        format!("{html}{}{image}", fill("url(")),
        format!("{html}{}{image}", fill("<img src=\"cid:i\">")),
        format!("{html}{}{image}", fill("&amp;=&quot;'")),
        format!("Content-Type: text/plain; format=flowed\r\n\r\n{}", fill(">")),
        format!("Content-Type: text/plain; format=flowed\r\n\r\n{}", fill("> \r\n")),
        format!("Content-Transfer-Encoding: quoted-printable\r\n\r\n{}", fill("= ")),
        format!("Content-Transfer-Encoding: quoted-printable\r\n\r\n{}", fill(" ")),
        format!("Content-Transfer-Encoding: base64\r\n\r\n{}", fill("=a")),
        format!("Content-Type: text/plain; charset=utf-7\r\n\r\n{}", fill("+A")),
        format!("Content-Type: text/html\r\n\r\n{}", fill("<body></body>")),
        fill("\r\n "),
        fill(":"),
        fill("\0"),
    ];
    let began = crate::clock::now();
    for (position, message) in messages.iter().enumerate() {
        let message = [&[0xff], message.as_bytes()].concat();
        check(&message);
        let spent = began.elapsed();
        assert!(spent.as_secs() < 120, "{position} took until {spent:?}");
    }
}

/// Each field would be looked at 256 times over, and each of them: minutes.
#[test]
fn parentheses_in_every_field_take_no_more_than_their_length() {
    let field = |name: &str| format!("Content-{name}: a{}\r\n", " (".repeat(8_000));
    let encodings = field("Transfer-Encoding").repeat(3);
    let part = format!("\r\n--b\r\n{encodings}Content-ID: <x>\r\n\r\nx");
    let mut scan = Scan::new();
    scan.push(b"Content-Type: multipart/mixed; boundary=b\r\n\r\n");
    let began = crate::clock::now();
    for _ in 0..500 {
        scan.push(part.as_bytes());
    }
    let scanned = scan.finish();
    let spent = began.elapsed();
    assert_eq!(scanned.nodes.len(), 501);
    assert!(spent.as_secs() < 20, "{spent:?}");
}

#[test]
fn an_id_of_any_length_is_not_kept() {
    for (length, is_kept) in [(900, true), (2_000, false)] {
        let long = "x".repeat(length);
        let message =
            format!("Content-ID: <{long}@y>\r\nContent-Location: http://{long}/\r\n\r\nx");
        let scanned = scan(message.as_bytes(), 100);
        let entity = &scanned.nodes[0].entity;
        assert_eq!((entity.id.is_some(), entity.location.is_some()), (is_kept, is_kept));
    }
}

#[test]
fn the_first_encoding_of_a_part_counts() {
    let twice = "Content-Transfer-Encoding: base64\r\nContent-Transfer-Encoding: x-odd\r\n\r\nSGk=";
    let scanned = scan(twice.as_bytes(), 10);
    let entity = &scanned.nodes[0].entity;
    assert_eq!((entity.encoding, entity.is_encoding_unknown), (Encoding::Base64, false));
}

#[test]
fn only_addresses_that_graph_takes_are_fit() {
    for (address, why) in [
        ("ann@example.com", None),
        ("o'brien+tag=x@mail.example.com", None),
        ("jörg@example.com", Some("it has characters outside ASCII")),
        ("ann@bücher.example", Some("it has characters outside ASCII")),
        ("\"ann lee\"@example.com", Some("its local part is quoted")),
        ("\"a@b\"@example.com", Some("its local part is quoted")),
        ("ann@[192.0.2.1]", Some("its domain is an address literal")),
        ("ann@localhost", Some("its domain has no dot")),
        ("postmaster", Some("it has no domain")),
    ] {
        let path = ForwardPath::parse(address, Charset::Utf8).unwrap();
        assert_eq!(unfit(&path), why, "{address}");
    }
}

#[test]
fn a_tag_tells_parts_apart_and_stays_short() {
    let id = SpoolId::from_u128(0x0198_f3c2_7a5e_7000_8000_0000_0000_0001);
    let name = "0198f3c2-7a5e-7000-8000-000000000001";
    for (part, expected) in [(&[0][..], "/0"), (&[0, 1, 2, 5, 7, 8], "/0-2,5,7-8"), (&[], "/")] {
        assert_eq!(tag(id, part), format!("{name}{expected}"));
    }
    let odd: Vec<usize> = (0..500).map(|n| n * 2).collect();
    let other: Vec<usize> = (0..500).map(|n| n * 2 + 1).collect();
    assert!(tag(id, &odd).starts_with(&format!("{name}/500:")) && tag(id, &odd).len() < 60);
    assert_ne!(tag(id, &odd), tag(id, &other));
}

#[test]
fn losses_are_named_once_and_not_without_end() {
    let mut losses = Losses::default();
    for n in 0..1000 {
        losses.push(LossKind::Header, format!("X-{}", n / 2), "is lost");
    }
    assert_eq!(losses.list.len(), MAX_LOSSES);
    assert_eq!(losses.list[MORE].what, "more");
}
