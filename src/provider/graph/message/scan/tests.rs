use std::fmt::Write as _;

use super::*;
use crate::provider::graph::message::fuzz::scan;

/// The parts as `type start..end size`, indented as they lie within each other.
fn outline(message: &str) -> String {
    let message = message.replace('\n', "\r\n");
    let mut found = Vec::new();
    for step in [1, 2, 3, 7, message.len()] {
        found.push(write(&scan(message.as_bytes(), step)));
    }
    assert!(found.iter().all(|it| *it == found[0]), "{found:#?}");
    found.swap_remove(0)
}

fn write(scanned: &Scanned) -> String {
    fn walk(nodes: &[Node], at: usize, depth: usize, out: &mut String) {
        let node = &nodes[at];
        let (range, indent) = (&node.body, "  ".repeat(depth));
        let what = match &node.kind {
            Kind::Multipart(parts) => format!("of {}", parts.len()),
            Kind::Sealed => "sealed".to_owned(),
            Kind::Leaf(size) => format!("= {size}"),
            Kind::Text(text) => format!("\"{}\"", text.escape_ascii()),
        };
        let kind = node.entity.media_type();
        writeln!(out, "{indent}{kind} {}..{} {what}", range.start, range.end).unwrap();
        if let Kind::Multipart(parts) = &node.kind {
            parts.iter().for_each(|part| walk(nodes, *part, depth + 1, out));
        }
    }
    let mut out = String::new();
    walk(&scanned.nodes, 0, 0, &mut out);
    out
}

#[test]
fn parts_are_where_they_lie() {
    assert_eq!(outline("A: b\n\nhello\n"), "text/plain 8..15 \"hello\\r\\n\"\n");
    assert_eq!(outline(""), "text/plain 0..0 \"\"\n");
    assert_eq!(outline("A: b"), "text/plain 4..4 \"\"\n");
    assert_eq!(outline("no header"), "text/plain 0..9 \"no header\"\n");
    assert_eq!(
        outline(
            "Content-Type: multipart/mixed; boundary=b\n\npreamble\n--b\n\none\n--b\nContent-Type: a/b\nContent-Transfer-Encoding: base64\n\naGVsbG8=\n--b--\nend\n"
        ),
        "multipart/mixed 45..150 of 2\n  text/plain 62..65 \"one\"\n  a/b 128..136 = 5\n"
    );
}

#[test]
fn what_lies_too_deep_ends_with_its_boundary() {
    let levels = MAX_DEPTH + 1;
    let open: String = (0..levels)
        .map(|n| format!("Content-Type: multipart/mixed; boundary=n{n}\n\n--n{n}\n"))
        .collect();
    let last = levels - 1;
    let outline = outline(&format!("{open}\ndeep\n--n{last}--\n--n0\n\nmore\n--n0--\nend\n"));
    let sealed = outline.lines().find(|line| line.ends_with(" sealed")).unwrap();
    let (_, range) = sealed.trim().split_once(' ').unwrap();
    let (start, end) = range.trim_end_matches(" sealed").split_once("..").unwrap();
    let length = end.parse::<usize>().unwrap() - start.parse::<usize>().unwrap();
    assert_eq!(length, format!("--n{last}\r\n\r\ndeep\r\n--n{last}--").len(), "{outline}");
    assert!(outline.ends_with(" \"more\"\n"), "{outline}");
}

#[test]
fn what_lies_too_deep_ends_once_where_it_is_the_last() {
    let open: String = (0..=MAX_DEPTH)
        .map(|n| format!("Content-Type: multipart/mixed; boundary=n{n}\r\n\r\n--n{n}\r\n"))
        .collect();
    let ends: String = (0..MAX_DEPTH).rev().map(|n| format!("--n{n}--\r\nend\r\n")).collect();
    let deep = "\r\ndeep";
    for (rest, cut) in [(format!("\r\n{ends}--n0--\r\nend\r\n"), 0), ("\r\n".to_owned(), 2)] {
        let message = format!("{open}{deep}{rest}");
        for step in [1, 7, message.len()] {
            let scanned = scan(message.as_bytes(), step);
            let sealed = scanned.nodes.last().unwrap();
            assert!(matches!(sealed.kind, Kind::Sealed), "{sealed:?}");
            assert_eq!(sealed.body.end, (open.len() + deep.len() + cut) as u64);
        }
    }
}

#[test]
fn a_text_that_is_too_large_is_counted_only() {
    let line =
        "A line of text that is long, and there are many of them: too many to be a body.\r\n";
    let lines = MAX_TEXT / line.len() + 1;
    let message = format!("Subject: x\r\n\r\n{}", line.repeat(lines));
    for step in [4096, message.len()] {
        let scanned = scan(message.as_bytes(), step);
        let expected = format!("text/plain 14..{} = {}\n", message.len(), lines * line.len());
        assert_eq!(write(&scanned), expected);
    }
}

#[test]
fn texts_are_kept_only_as_far_as_all_of_them_may_go() {
    let text = "x".repeat(MAX_TEXT / 3);
    let part = format!("--b\r\nContent-Type: text/plain\r\n\r\n{text}\r\n");
    let header = "Content-Type: multipart/mixed; boundary=b\r\n\r\n";
    let message = format!("{header}{}--b--\r\n", part.repeat(20));
    let scanned = scan(message.as_bytes(), 64 * 1024);
    let kept: usize = scanned
        .nodes
        .iter()
        .map(|node| match &node.kind {
            Kind::Text(text) => text.len(),
            _ => 0,
        })
        .sum();
    assert!(kept <= MAX_TEXT && kept > MAX_TEXT / 2, "{kept}");
    assert_eq!(scanned.nodes.len(), 21);
}

#[test]
fn a_header_without_end_is_kept_only_in_part() {
    let long = "x".repeat(3 * MAX_HEADER);
    for message in [
        format!("A: b\r\nB: {long}\r\nC: d\r\n\r\nbody"),
        format!("A: b\r\nB: c\r\n {long}\r\nC: d\r\n\r\nbody"),
        format!("A: b\r\n{}C: d\r\n\r\nbody", "X: y\r\n".repeat(MAX_HEADER / 4)),
    ] {
        for step in [4096, 1_000_003, message.len()] {
            let scanned = scan(message.as_bytes(), step);
            assert!(!scanned.has_all_of_header && scanned.header.len() <= MAX_HEADER);
            assert!(scanned.header.starts_with(b"A: b\r\n"));
            assert!(matches!(&scanned.nodes[0].kind, Kind::Text(text) if text == b"body"));
        }
    }
    // A long line that is no field is content.
    let message = format!("A: b\r\n{long}");
    let scanned = scan(message.as_bytes(), 4096);
    assert!(scanned.has_all_of_header && scanned.header == b"A: b\r\n");
    assert_eq!(scanned.nodes[0].body, 6..message.len() as u64);
    // One that continues a field is not.
    let message = format!("A: b\r\n {}\r\n\r\nbody", "x".repeat(5000));
    let scanned = scan(message.as_bytes(), 4096);
    assert!(scanned.has_all_of_header && scanned.header.len() == message.len() - 4);
}

#[test]
fn only_so_many_parts_are_opened() {
    let header = "Content-Type: multipart/mixed; boundary=b\r\n\r\n";
    let parts = |count: usize| format!("{header}{}--b--\r\n", "--b\r\n\r\nx\r\n".repeat(count));
    assert!(scan(parts(MAX_PARTS - 1).as_bytes(), 4096).has_all_parts);
    let message = parts(MAX_PARTS + 5);
    let scanned = scan(message.as_bytes(), 4096);
    assert!(!scanned.has_all_parts && scanned.nodes.len() == MAX_PARTS);
    assert_eq!(scanned.size, message.len() as u64);
}

#[test]
fn ends_of_lines_that_are_not_crlf_are_counted() {
    for (message, bare) in [
        ("A: b\r\n\r\nx\r\n", 0),
        ("A: b\n\nx\r", 3),
        ("\r\r\n\n\r\n\n\r", 4),
        ("x\n\ry", 2),
        ("\n", 1),
        ("", 0),
    ] {
        for step in [1, 2, 3, 100] {
            assert_eq!(scan(message.as_bytes(), step).bare, bare, "{message:?} by {step}");
        }
    }
}
