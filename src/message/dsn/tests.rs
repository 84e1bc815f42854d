use std::fs;
use std::path::Path;

use bytes::Bytes;

use super::*;
use crate::envelope::{Client, Kind, Priority};
use crate::outcome::Scope;
use crate::smtp::address::{Charset, ForwardPath, ReversePath};
use crate::smtp::params::{Notify, Ret};

const AT: UnixMillis = UnixMillis(1_795_502_531_000);
const HEADER: &str = "Received: from app.test ([127.0.0.1])\r\n\tby relay.test (mailsluice) with ESMTP id 1;\r\n\tTue, 24 Nov 2026 06:42:11 +0000\r\nFrom: app@example.com\r\nTo: list@example.org\r\nSubject: Monthly\r\n figures\r\nMessage-ID: <figures.11@app.test>\r\n";

fn rcpt(path: &str) -> Rcpt {
    let path = ForwardPath::parse(path, Charset::Utf8).unwrap();
    Rcpt { path, notify: Notify::Unsaid, orcpt: None }
}

fn original(rcpts: Vec<Rcpt>) -> Envelope {
    Envelope {
        kind: Kind::Mail,
        id: SpoolId::from_u128(0x0195_0000_0000_7000_8000_0000_0000_0001),
        accepted: AT,
        reverse_path: ReversePath::Mailbox(mailbox("app@example.com")),
        rcpts,
        smtputf8: false,
        eight_bit: false,
        ret: None,
        envid: None,
        size: 10,
        client: Client { address: "127.0.0.1".into(), helo: "app.test".into() },
        priority: Priority::Normal,
        author: None,
        prepend: Bytes::new(),
    }
}

fn mailbox(text: &str) -> Mailbox {
    Mailbox::parse(text, Charset::Utf8).unwrap()
}

fn cause(stage: Stage, words: impl Into<crate::outcome::Words>) -> Cause {
    let words = words.into();
    let status = EnhancedStatus::parse(words.as_bytes().get(4..).unwrap_or_default());
    Cause { status, ..Cause::new(Scope::Recipient, stage, words) }
}

fn compose(to: &str, original: &Envelope, news: &[News<'_>], returned: Returned<'_>) -> Vec<u8> {
    compose_to(Reader::Author, to, original, news, returned)
}

fn compose_to(
    reader: Reader,
    to: &str,
    original: &Envelope,
    news: &[News<'_>],
    returned: Returned<'_>,
) -> Vec<u8> {
    let entries: Vec<Entry<'_>> =
        original.rcpts.iter().zip(news).map(|(rcpt, news)| Entry { rcpt, news: *news }).collect();
    report(&Report {
        letterhead: Letterhead {
            id: SpoolId::from_u128(0x0195_0000_1000_7000_8000_0000_0000_0002),
            at: AT.plus(std::time::Duration::from_secs(3600)),
            hostname: "relay.test",
            from: &mailbox("reports@example.com"),
            to: &mailbox(to),
        },
        reader,
        original,
        entries: &entries,
        remote: Some("smtp.example.com"),
        returned,
    })
}

/// Compares with the file of that name; `UPDATE_EXPECT=1` writes it. Line ends are LF there.
#[track_caller]
fn check(name: &str, composed: &[u8]) {
    for line in composed.split(|octet| *octet == b'\n') {
        assert!(line.len() <= 998, "{name}: a line of {} octets", line.len());
        assert!(line.is_empty() || line.ends_with(b"\r"), "{name}: a lone LF");
        assert!(!line.strip_suffix(b"\r").unwrap_or(line).contains(&b'\r'), "{name}: a lone CR");
    }
    let boundary = b"\r\n--=_01950000-1000-7000-8000-000000000002";
    let parts = composed.windows(boundary.len()).filter(|at| at == boundary).count();
    assert!(matches!(parts, 0 | 4), "{name}: {parts} boundaries");
    let text = String::from_utf8(composed.to_vec()).unwrap().replace("\r\n", "\n");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/message/testdata");
    let path = folder.join(format!("{name}.eml"));
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(text == expected, "{name} is now (UPDATE_EXPECT=1 takes it):\n{text}");
}

#[test]
fn a_failure_is_reported_in_the_remotes_words() {
    let no = cause(Stage::Rcpt, "550 5.1.1 <b@example.org>: no such user here");
    let original = original(vec![rcpt("b@example.org"), rcpt("c@example.org")]);
    let report = compose(
        "app@example.com",
        &original,
        &[News::Failed(&no)],
        Returned::Header(HEADER.as_bytes()),
    );
    assert!(report.is_ascii());
    check("failure", &report);
}

#[test]
fn a_delay_says_that_it_is_still_tried() {
    let later = cause(Stage::Rcpt, "450 4.2.1 mailbox busy");
    let until = Some(AT.plus(std::time::Duration::from_secs(5 * 86_400)));
    let news = [News::Delayed(&later, until)];
    let original = original(vec![rcpt("b@example.org")]);
    let report = compose("app@example.com", &original, &news, Returned::Header(HEADER.as_bytes()));
    check("delay", &report);
}

#[test]
fn a_relay_is_told_to_who_asked_for_success() {
    let receipt = Receipt::new("250 2.0.0 queued as 4711");
    let original = original(vec![rcpt("b@example.org")]);
    let news = [News::Relayed(&receipt)];
    let report = compose("app@example.com", &original, &news, Returned::Header(HEADER.as_bytes()));
    check("relayed", &report);
}

#[test]
fn one_report_tells_of_all_recipients() {
    let no = cause(Stage::EndOfData, "554 5.7.1 we do not like it");
    let later = cause(Stage::Connect, "connection refused");
    let receipt = Receipt::new("250 ok");
    let names = ["b@example.org", "c@example.org", "d@example.org", "e@example.org"];
    let original = original(names.map(rcpt).to_vec());
    let news = [News::Failed(&no), News::Delayed(&later, None), News::Relayed(&receipt)];
    let report = compose("app@example.com", &original, &news, Returned::Header(HEADER.as_bytes()));
    check("mixed", &report);
}

/// RFC 6533 3. The addresses stay, in ASCII, in what programs read.
#[test]
fn addresses_outside_ascii_are_written_in_ascii() {
    let no = cause(Stage::Local, "the server takes no addresses outside ASCII");
    let original = original(vec![rcpt("jörg+=x@bücher.example")]);
    let header = "From: j\u{f6}rg@example.org\r\nSubject: Gr\u{fc}\u{df}e\r\nX: =\r\n";
    let news = [News::Failed(&no)];
    check(
        "utf8",
        &compose("app@example.com", &original, &news, Returned::Header(header.as_bytes())),
    );
    let to_utf8 = compose("jörg@example.com", &original, &news, Returned::Header(b""));
    assert!(String::from_utf8(to_utf8).unwrap().contains("\r\nTo: <jörg@example.com>\r\n"));
}

#[test]
fn hostile_words_and_headers_stay_where_they_belong() {
    let boundary = "=_01950000-1000-7000-8000-000000000002";
    let words = format!(
        "550 5.1.1 no\r\n\r\n--{boundary}--\r\nBcc: x@y\0\x1b[2J \\ caf\u{e9} \u{202e} {}",
        "x".repeat(1_900)
    );
    let no = cause(Stage::Rcpt, words);
    let raw = cause(Stage::Rcpt, &b"550 \xff\xfe"[..]);
    let mut strange = rcpt("\"a  \\\" b\"@example.org");
    strange.orcpt = Some("rfc822;x+0D+0ABcc:+20y".into());
    let mut original = original(vec![strange, rcpt("b@example.org")]);
    original.envid = Some("a+0D+0Ab".into());
    let header = "Subject: a\x07b\r\nMessage-ID: <x>\r\n , <y>\r\nlong: ".to_owned()
        + &"y".repeat(2_000)
        + "\r\n";
    let news = [News::Failed(&no), News::Failed(&raw)];
    let report = compose("app@example.com", &original, &news, Returned::Header(header.as_bytes()));
    assert!(report.is_ascii());
    check("hostile", &report);
}

#[test]
fn the_whole_message_comes_back_where_that_is_asked_for() {
    let no = cause(Stage::Rcpt, "550 5.1.1 no such user");
    let mut original = original(vec![rcpt("b@example.org")]);
    original.ret = Some(Ret::Full);
    let content = format!("{HEADER}\r\nThe figures.\r\n--=_\r\nno end");
    let news = [News::Failed(&no)];
    let whole = compose("app@example.com", &original, &news, Returned::Full(content.as_bytes()));
    check("ret-full", &whole);
    let content = format!("{HEADER}\r\ncaf\u{e9}\r\n");
    let whole = compose("app@example.com", &original, &news, Returned::Full(content.as_bytes()));
    check("ret-full-8bit", &whole);
    // RFC 2045 6.4: no part may be what the whole is not.
    assert_eq!(encodings(&whole), ["8bit", "quoted-printable", "7bit", "8bit"]);
}

/// The encodings of the whole and of its parts.
fn encodings(composed: &[u8]) -> Vec<String> {
    let text = String::from_utf8(composed.to_vec()).unwrap();
    let values = text.lines().filter_map(|line| line.strip_prefix("Content-Transfer-Encoding: "));
    values.map(str::to_owned).collect()
}

/// RFC 6533 4: as message/rfc822 it would be taken for one of ASCII.
#[test]
fn what_came_with_smtputf8_comes_back_as_such() {
    let no = cause(Stage::Rcpt, "550 5.1.1 no such user");
    let mut original = original(vec![rcpt("j\u{f6}rg@example.org")]);
    original.smtputf8 = true;
    let header = "From: j\u{f6}rg@example.com\r\nSubject: Gr\u{fc}\u{df}e\r\n";
    let whole = format!("{header}\r\nThe figures.\r\n");
    let report = |returned| compose("app@example.com", &original, &[News::Failed(&no)], returned);
    check("global", &report(Returned::Full(whole.as_bytes())));
    check("global-headers", &report(Returned::Header(header.as_bytes())));
    let long = format!("X: \u{f6}{}\r\n", "x".repeat(1_000));
    let plain = format!("{HEADER}\r\ncaf\u{e9}\r\n");
    let latin = b"From: j\xf6rg@example.com\r\n";
    for (returned, kind, encoding) in [
        (Returned::Header(HEADER.as_bytes()), "text/rfc822-headers", "7bit"),
        (Returned::Header(header.as_bytes()), "message/global-headers", "8bit"),
        (Returned::Header(long.as_bytes()), "message/global-headers", "quoted-printable"),
        (Returned::Header(latin), "text/rfc822-headers", "quoted-printable"),
        (Returned::Full(whole.as_bytes()), "message/global", "8bit"),
        (Returned::Full(plain.as_bytes()), "message/rfc822", "8bit"),
        (Returned::Full(HEADER.as_bytes()), "message/rfc822", "7bit"),
    ] {
        let composed = report(returned);
        let fields = format!("\nContent-Type: {kind}\r\nContent-Transfer-Encoding: {encoding}\r\n");
        let text = String::from_utf8_lossy(&composed);
        assert!(text.contains(&fields), "{kind} {encoding} in {text}");
        let container =
            text.starts_with("From") && text.contains("\"\r\nContent-Transfer-Encoding: 8bit");
        assert_eq!(container, encoding == "8bit", "{text}");
    }
}

/// "Your message" was in every letter, and nothing of whose it was.
#[test]
fn the_postmaster_is_told_whose_message_it_is_and_why_he_hears_of_it() {
    let no = cause(Stage::Rcpt, "550 5.1.1 no such user");
    let mut original = original(vec![rcpt("b@example.org")]);
    let compose = |original: &Envelope, why| {
        let (reader, news) = (Reader::Postmaster(why), [News::Failed(&no)]);
        let returned = Returned::Header(HEADER.as_bytes());
        let report = compose_to(reader, "ops@example.com", original, &news, returned);
        let text = String::from_utf8(report.clone()).unwrap().replace("=\r\n", "");
        assert!(!text.to_ascii_lowercase().contains("your message"), "{text}");
        (report, text)
    };
    original.reverse_path = ReversePath::Mailbox(mailbox("root@host.local"));
    check("postmaster", &compose(&original, Why::LocalAuthor).0);
    let (_, text) = compose(&original, Why::AuthorFailed);
    assert!(text.contains("because\r\nits sender is who could not be reached"), "{text}");
    original.reverse_path = ReversePath::Null;
    let (_, text) = compose(&original, Why::NoAuthor);
    assert!(text.contains("Its sender: none (MAIL FROM:<>)"), "{text}");
    original.client.helo = format!("a\r\nb \x1b[2J{}", "x".repeat(5_000)).into();
    let (report, text) = compose(&original, Why::Chosen);
    assert!(report.is_ascii() && report.len() < 4_000, "{text}");
    assert!(text.contains("itself a\\r\\nb") || text.contains("itself a\\x0d\\x0ab"), "{text}");
    original.kind = Kind::Report;
    check("postmaster-report", &compose(&original, Why::ReportFailed).0);
}

/// With NOTIFY=DELAY alone no word of a failure follows.
#[test]
fn a_delay_promises_word_of_a_failure_only_where_that_was_asked_for() {
    let later = cause(Stage::Rcpt, "450 4.2.1 mailbox busy");
    let on = |failure| Notify::On { success: false, failure, delay: true };
    for (notify, promise) in [
        ([Notify::Unsaid, on(true)], ". You are told\r\nif it cannot be delivered in the end.\r\n"),
        (
            [on(false), on(false)],
            ". You are not told\r\nif it cannot be delivered in the end: nobody",
        ),
        ([on(true), on(false)], ". Where that was asked\r\nfor, you are told if it cannot be"),
    ] {
        let rcpts = notify.map(|notify| Rcpt { notify, ..rcpt("b@example.org") });
        let news = [News::Delayed(&later, None); 2];
        let original = original(rcpts.to_vec());
        let report = compose("app@example.com", &original, &news, Returned::Header(b""));
        let text = String::from_utf8(report).unwrap();
        assert!(text.contains(promise), "{notify:?} in {text}");
    }
}

#[test]
fn what_the_sender_asked_for_by_dsn_parameters_is_named() {
    let no = cause(Stage::Rcpt, "550 5.1.1 no such user");
    let mut to = rcpt("b@example.org");
    to.orcpt = Some("rfc822;old+2Bname@example.org".into());
    let mut other = rcpt("c@example.org");
    other.orcpt = Some("utf-8;j\\x{F6}rg@example.org".into());
    let mut original = original(vec![to, other]);
    original.envid = Some("QQ+2B314159".into());
    original.ret = Some(Ret::Headers);
    let news = [News::Failed(&no), News::Failed(&no)];
    let report = compose("app@example.com", &original, &news, Returned::Header(HEADER.as_bytes()));
    check("envid-orcpt-ret-hdrs", &report);
}

#[test]
fn a_notice_is_plain_text() {
    let letterhead = Letterhead {
        id: SpoolId::from_u128(2),
        at: AT,
        hostname: "relay.test",
        from: &mailbox("reports@example.com"),
        to: &mailbox("ops@example.com"),
    };
    check("notice", &notice(&letterhead, "Mail waits", "It says: caf\u{e9}\n.\n".to_owned()));
}

#[test]
fn a_header_ends_at_its_empty_line_or_with_a_whole_line() {
    for (content, header) in [
        ("A: b\r\n\r\nbody", "A: b\r\n"),
        ("A: b\r\n", "A: b\r\n"),
        ("A: b", "A: b"),
        ("\r\nbody\r\n\r\n", ""),
        ("", ""),
    ] {
        assert_eq!(header_of(content.as_bytes()), header.as_bytes(), "{content:?}");
    }
    let long = "X: 3456789\r\n".repeat(10_000);
    let header = header_of(long.as_bytes());
    assert!(header.len() <= MAX_HEADER && header.len() > MAX_HEADER - 12);
    assert!(header.ends_with(b"\r\n"));
}

#[test]
fn many_recipients_make_no_endless_text() {
    let no = cause(Stage::Rcpt, "x".repeat(2_000));
    let rcpts: Vec<Rcpt> = (0..1_000).map(|n| rcpt(&format!("u{n}@example.org"))).collect();
    let original = original(rcpts);
    let news = vec![News::Failed(&no); 1_000];
    let report = compose("app@example.com", &original, &news, Returned::Header(b""));
    assert!(report.len() < 2_000_000, "{}", report.len());
    assert!(String::from_utf8(report).unwrap().contains("and 900 more"));
}
