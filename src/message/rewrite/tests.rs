use super::*;
use crate::message::header::HeaderFilter;

fn mailbox(text: &str) -> Mailbox {
    Mailbox::parse(text, Charset::Utf8).unwrap()
}

fn rewritten(content: &[u8], is_all: bool, clean_names: bool) -> Rewritten {
    let sender = mailbox("reports@example.com");
    let may_stand =
        |mailbox: &Mailbox| mailbox.is_same(&sender) || mailbox.domain() == "allowed.example";
    let rules =
        Rules { sender: &sender, sender_name: b"Reports", clean_names, may_stand: &may_stand };
    rewrite(content, is_all, &rules)
}

/// What leaves where so much of the content is looked at.
fn left(content: &[u8], looked_at: usize, done: &Rewritten) -> Vec<u8> {
    if done.from == From::Untouched {
        return content.to_vec();
    }
    let mut out = done.header.clone();
    match done.drops {
        None => out.extend_from_slice(&content[done.used..]),
        Some(drops) => {
            assert!(looked_at < content.len());
            let mut filter = HeaderFilter::separating(drops);
            filter.push(content, &mut out);
            filter.finish(&mut out);
        }
    }
    out
}

/// Fields of a header, each with its continuation lines, up to what is no field.
fn fields(content: &[u8]) -> (Vec<Vec<u8>>, Vec<u8>) {
    let mut fields: Vec<Vec<u8>> = Vec::new();
    let mut rest = content;
    while let Some(end) = memchr::memchr(b'\n', rest) {
        let (line, after) = rest.split_at(end + 1);
        match fields.last_mut() {
            Some(field) if matches!(line[0], b' ' | b'\t') => field.extend_from_slice(line),
            _ if colon(line).is_some() => fields.push(line.to_vec()),
            _ => break,
        }
        rest = after;
    }
    (fields, rest.to_vec())
}

fn is_named(field: &[u8]) -> bool {
    name(&field[..colon(field).unwrap()]).is_some()
}

/// R11: exactly one From leaves, no line is torn, and nothing else changes.
#[test]
fn random_headers_keep_all_lines_but_the_named_ones() {
    let pieces: [&[u8]; 34] = [
        b"From:",
        b"from :",
        b"Sender:",
        b"Reply-To:",
        b"Subject:",
        b"X:",
        b" a@allowed.example",
        b" app@old.example",
        b" <",
        b">",
        b"\"",
        b"(",
        b")",
        b",",
        b";",
        b":",
        b"@",
        b"\\",
        b"\r\n",
        b"\r\n",
        b"\r\n ",
        b"\r\n\t",
        b" =?utf-8?q?a=40b?=",
        b" =?utf-8?b?YUBi?=",
        b"=?",
        b"?=",
        b"\xff",
        "é".as_bytes(),
        b"\0",
        b"\x1b",
        b" Ann",
        b" reports@example.com",
        b"To: x@y\r\n",
        b"\r\nFrom:",
    ];
    let mut random = fastrand::Rng::with_seed(7);
    let rounds = std::env::var("FUZZ_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000);
    let mut replaced = 0;
    for round in 0..rounds {
        let mut content = b"Subject: x\r\n".to_vec();
        for _ in 0..random.usize(..24) {
            content.extend_from_slice(pieces[random.usize(..pieces.len())]);
        }
        content.extend_from_slice(b"\r\nTo: b@example.org\r\n\r\nFrom: body@old.example\r\n");
        let looked_at = match random.bool() {
            true => content.len(),
            false => random.usize(..content.len()),
        };
        let is_all = looked_at == content.len();
        let done = rewritten(&content[..looked_at], is_all, random.bool());
        let out = left(&content, looked_at, &done);
        let what = || {
            let (content, out) = (content.escape_ascii(), out.escape_ascii());
            format!("round {round}, {looked_at} looked at:\n{content}\n--\n{out}")
        };
        replaced += usize::from(done.from == From::Replaced);
        let ((before, body), (after, new_body)) = (fields(&content), fields(&out));
        let others = |fields: &[Vec<u8>]| -> Vec<Vec<u8>> {
            fields.iter().filter(|field| !is_named(field)).cloned().collect()
        };
        assert_eq!(others(&before), others(&after), "{}", what());
        let body = body.strip_prefix(b"\r\n").unwrap_or(&body);
        assert_eq!(body, new_body.strip_prefix(b"\r\n").unwrap_or(&new_body), "{}", what());
        let mut filter = HeaderFilter::new();
        filter.push(&out, &mut Vec::new());
        let facts = filter.finish(&mut Vec::new());
        assert_eq!((facts.froms, facts.broken_at), (1, None), "{}", what());
        let froms: Vec<&Vec<u8>> = after
            .iter()
            .filter(|field| name(&field[..colon(field).unwrap()]) == Some(Name::From))
            .collect();
        assert_eq!(froms.len(), 1, "{}", what());
        let value = &froms[0][colon(froms[0]).unwrap() + 1..];
        assert!(List::read(value).is_whole, "{}", what());
        let list: Vec<Mailbox> = List::read(value).mailboxes().cloned().collect();
        match done.from {
            From::Replaced => assert_eq!(list, [mailbox("reports@example.com")], "{}", what()),
            From::Untouched | From::Stands => {
                assert!(list.iter().all(|it| it.is_same(&mailbox("reports@example.com"))
                    || it.domain() == "allowed.example"));
            }
        }
        assert_eq!(list.first(), done.author.as_ref(), "{}", what());
        for (at, byte) in out.iter().enumerate() {
            match byte {
                b'\n' => assert_eq!(out[at - 1], b'\r', "{}", what()),
                b'\r' => assert_eq!(out[at + 1], b'\n', "{}", what()),
                _ => {}
            }
        }
    }
    assert!(replaced > rounds / 10 && replaced < rounds, "{replaced}");
}

#[test]
fn a_name_of_any_length_makes_no_line_of_any_length() {
    for name in
        ["x".repeat(5_000), "\"".to_owned() + &"y ".repeat(4_000) + "\"", "=?".repeat(4_000)]
    {
        let done =
            rewritten(format!("From: {name} <app@old.example>\r\n\r\n").as_bytes(), true, true);
        let text = String::from_utf8(done.header).unwrap();
        assert!(
            text.starts_with("From: Reports <reports@example.com>\r\nReply-To: "),
            "{name:.20}"
        );
    }
}

/// As at acceptance, which keeps no more of it.
#[test]
fn a_from_of_more_than_8_kib_is_not_read() {
    let allowed = |length: usize| {
        let list = "a@allowed.example,".repeat(length / 18) + &" ".repeat(length % 18);
        format!("From:{list}\r\n\r\n")
    };
    let from = |content: String| {
        let done = rewritten(content.as_bytes(), true, true);
        (done.from, done.header)
    };
    assert_eq!(from(allowed(MAX_VALUE - 3)).0, From::Untouched);
    let replaced = (From::Replaced, b"From: Reports <reports@example.com>\r\n".to_vec());
    assert_eq!(from(allowed(MAX_VALUE - 2)), replaced);
    assert_eq!(List::read("a,".repeat(500_000).as_bytes()).entries.capacity(), 0);
}

#[test]
fn what_was_not_seen_to_its_end_does_not_stand() {
    // The same octets, once as all there is and once as the start of more.
    let content = b"Subject: x\r\nFrom: a@allowed.example";
    assert_eq!(rewritten(content, true, false).from, From::Untouched);
    let open = rewritten(content, false, false);
    assert_eq!((open.from, open.used), (From::Replaced, 0));
    assert_eq!(open.header, b"From: Reports <reports@example.com>\r\n");
    assert_eq!(open.drops, Some(&["from", "sender"][..]));

    // A Reply-To may follow.
    let open = rewritten(b"From: Ann <app@old.example>\r\nX: y", false, false);
    assert_eq!(open.header, b"From: Ann <reports@example.com>\r\n");
    assert_eq!(open.drops, Some(&["from", "sender"][..]));

    let open = rewritten(b"From: a@allowed.example\r\nX: y", false, false);
    assert_eq!((open.from, open.header), (From::Stands, b"From: a@allowed.example\r\n".to_vec()));
    assert_eq!(open.drops, Some(&["from", "sender"][..]));
}

/// What acceptance judges is what is rewritten later.
#[test]
fn the_header_is_read_as_it_is_at_acceptance() {
    let long = ["x".repeat(997), "x".repeat(998), "x".repeat(999), " ".repeat(994)];
    // No lone CR or LF: what is stored has none (R11).
    let mut pieces: Vec<&str> = vec![
        "From",
        "From: x",
        "\r\nX: y",
        "\r\nfrom :",
        "X: y\r\n",
        "from",
        ">From",
        "Sender",
        "X",
        ":",
        ":",
        " ",
        "\t",
        "\r\n",
        "\r\n",
        "\r\n",
        "root",
        "é",
        "a@b.c",
        "\0",
        "\x0b",
        "\x0c",
        "\x7f",
        "garbage",
    ];
    pieces.extend(long.iter().map(String::as_str));
    let mut random = fastrand::Rng::with_seed(11);
    let mut with_from = 0;
    for round in 0..30_000 {
        let mut content = String::new();
        for _ in 0..random.usize(..14) {
            content.push_str(pieces[random.usize(..pieces.len())]);
        }
        let content = content.as_bytes();
        let header = Header::scan(content, true);
        let mut left = Vec::new();
        let mut copied = 0;
        for field in header.of(Name::From) {
            left.extend_from_slice(&content[copied..field.range.start]);
            copied = field.range.end;
            with_from += 1;
        }
        left.extend_from_slice(&content[copied..header.end]);
        if header.has_ended && !header.is_separated {
            left.extend_from_slice(b"\r\n");
        }
        left.extend_from_slice(&content[header.end..]);
        let (mut filter, mut out) = (HeaderFilter::separating(&["from"]), Vec::new());
        filter.push(content, &mut out);
        filter.finish(&mut out);
        assert!(out == left, "round {round}: {}\n{}", content.escape_ascii(), out.escape_ascii());
        // Where less is looked at, it says the same as far as it says something.
        let cuts = if round % 8 == 0 { content.len().min(300) } else { 0 };
        for looked_at in 0..cuts {
            let start = Header::scan(&content[..looked_at], false);
            let what = || format!("round {round}, {looked_at}: {}", content.escape_ascii());
            if start.has_ended {
                assert_eq!(start.end, header.end, "{}", what());
            }
            for (one, other) in start.fields.iter().zip(&header.fields) {
                assert_eq!(one.range.start, other.range.start, "{}", what());
                assert!(one.range == other.range || one.range.end == looked_at, "{}", what());
            }
            let all = header.fields.iter().filter(|field| field.value.start <= looked_at).count();
            assert_eq!(start.fields.len(), all, "{}", what());
        }
    }
    assert!(with_from > 1_000, "{with_from}");
}
