//! Scripts: what the server says, what we answer, and what becomes of each recipient.

use std::time::Duration;

use bytes::Bytes;

use super::*;
use crate::envelope::{Client, Kind, Priority, SpoolId, UnixMillis};
use crate::outcome::Cause;
use crate::smtp::address::{Charset, ForwardPath, Mailbox, ReversePath};

/// A message of `from` (empty: a report) to `rcpts`.
fn order(from: &str, rcpts: &[&str]) -> Order {
    let reverse_path = match from {
        "" => ReversePath::Null,
        from => ReversePath::Mailbox(Mailbox::parse(from, Charset::Utf8).unwrap()),
    };
    let rcpt = |text: &&str| Rcpt {
        path: ForwardPath::parse(text, Charset::Utf8).unwrap(),
        notify: Notify::Unsaid,
        orcpt: None,
    };
    let envelope = Envelope {
        kind: Kind::Mail,
        id: SpoolId::from_u128(1),
        accepted: UnixMillis(0),
        reverse_path: reverse_path.clone(),
        rcpts: rcpts.iter().map(rcpt).collect(),
        smtputf8: false,
        eight_bit: false,
        ret: None,
        envid: None,
        size: 500,
        client: Client { address: "127.0.0.1".into(), helo: "app".into() },
        priority: Priority::Normal,
        author: None,
        prepend: Bytes::new(),
    };
    let case = Case {
        null_reverse_path: from.is_empty(),
        from_is_lane: false,
        reverse_path_is_lane: false,
    };
    Order {
        envelope: Arc::new(envelope),
        reverse_path,
        part: (0..rcpts.len()).collect(),
        size: 500,
        eight_bit: false,
        smtputf8: false,
        case,
    }
}

fn one() -> Order {
    order("a@x.example", &["r0@y.example"])
}

fn three() -> Order {
    order("a@x.example", &["r0@y.example", "r1@y.example", "r2@y.example"])
}

fn with(mut order: Order, change: impl FnOnce(&mut Envelope)) -> Order {
    change(Arc::make_mut(&mut order.envelope));
    order
}

/// An opening in which the server says that it can these things.
fn opening(capabilities: &str) -> String {
    let mut script = "S: 220 up ready\nC: EHLO me.example\n".to_owned();
    let lines: Vec<&str> =
        ["up"].into_iter().chain(capabilities.split(',').filter(|c| !c.is_empty())).collect();
    for (at, line) in lines.iter().enumerate() {
        let mark = if at + 1 == lines.len() { ' ' } else { '-' };
        script += &format!("S: 250{mark}{line}\n");
    }
    script
}

/// How the server's bytes are cut.
#[derive(Clone, Copy, Debug)]
enum Cuts {
    Whole,
    Octets,
    Random(u64),
}

impl Cuts {
    fn next(&mut self, left: usize) -> usize {
        match self {
            Self::Whole => left,
            Self::Octets => 1,
            Self::Random(seed) => usize::try_from(random(seed) % 9 + 1).unwrap().min(left),
        }
    }
}

/// SplitMix64.
fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut x = *seed;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// One thing that the server does.
#[derive(Clone, Debug)]
enum Turn {
    Says(Vec<u8>),
    /// It says so while the content is sent.
    Interrupts(Vec<u8>),
    Breaks(Fault),
}

/// `\xNN` in a script is that octet, `{long}` a thousand of them.
fn octets(text: &str) -> Vec<u8> {
    let text = text.replace("{long}", &"x".repeat(1_000));
    let mut parts = text.split("\\x");
    let mut out = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let (hex, rest) = part.split_at(2);
        out.push(u8::from_str_radix(hex, 16).unwrap());
        out.extend_from_slice(rest.as_bytes());
    }
    out
}

/// Lines of a script: `S:` the server's, `S~` with a lone LF, `S_` without an end, `S@` a hundred times with a hyphen;
/// `E:` the server's while the content is sent; `!closed`, `!silence`; `C:` ours; `--` the content; `=` what came of it.
fn parse(script: &str) -> (Vec<Turn>, Vec<String>, Vec<String>) {
    let (mut turns, mut ours, mut ends) = (Vec::new(), Vec::new(), Vec::new());
    let mut open = false;
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let was_open = std::mem::replace(&mut open, false);
        let (mark, text) = line.split_at(2);
        let text = text.strip_prefix(' ').unwrap_or(text);
        let said = match mark {
            "S:" | "E:" => [octets(text), b"\r\n".to_vec()].concat(),
            "S~" => [octets(text), b"\n".to_vec()].concat(),
            "S_" => octets(text),
            "S@" => format!("{text}\r\n").repeat(100).into_bytes(),
            "C:" | "--" => {
                ours.push(line.to_owned());
                continue;
            }
            "= " => {
                ends.push(text.to_owned());
                continue;
            }
            _ => {
                turns.push(Turn::Breaks(match line {
                    "!closed" => Fault::Closed,
                    "!network" => Fault::Network("Connection reset by peer".to_owned()),
                    "!silence" => Fault::Silence(Duration::from_secs(300)),
                    line => panic!("{line:?} is no line of a script"),
                }));
                continue;
            }
        };
        match (turns.last_mut(), mark) {
            (_, "E:") => turns.push(Turn::Interrupts(said)),
            (Some(Turn::Says(before)), _) if was_open => before.extend(said),
            _ => turns.push(Turn::Says(said)),
        }
        open = mark != "E:";
    }
    (turns, ours, ends)
}

fn short(rcpt: usize, outcome: &Outcome) -> String {
    match outcome {
        Outcome::Delivered(receipt) => format!("{rcpt} delivered: {}", receipt.words),
        Outcome::Deferred(cause) | Outcome::Failed(cause) | Outcome::Held(cause) => {
            format!("{rcpt} {}", short_cause(outcome.label(), cause))
        }
    }
}

fn short_cause(label: &str, cause: &Cause) -> String {
    let maybe = if cause.maybe_sent { " maybe" } else { "" };
    format!("{label} {} {}{maybe}: {}", cause.scope.label(), cause.stage.label(), cause.words)
}

/// Plays the server's turns: what we wrote, and what came of it.
fn play(
    turns: &[Turn],
    order: &Order,
    freshness: Freshness,
    mut cuts: Cuts,
) -> (Vec<String>, Vec<String>) {
    let mut dialog = Dialog::new("me.example", Opening::default());
    let (mut ours, mut ends) = (Vec::new(), Vec::new());
    let mut turns = turns.iter().cloned();
    // What is left of a turn.
    let mut left: Vec<u8> = Vec::new();
    let mut peeked: Option<Turn> = None;
    let mut begun = false;
    let mut feed = |dialog: &mut Dialog, left: &mut Vec<u8>| {
        while !left.is_empty() {
            let cut: Vec<u8> = left.drain(..cuts.next(left.len())).collect();
            if dialog.receive(&cut) {
                return true;
            }
        }
        false
    };
    loop {
        match dialog.next() {
            Step::Write(bytes) => {
                let text = String::from_utf8(bytes).unwrap();
                assert!(text.ends_with("\r\n"));
                ours.extend(text.trim_end().split("\r\n").map(|line| format!("C: {line}")));
            }
            Step::WriteSecret(_) | Step::StartTls => unreachable!("nothing of that is asked for"),
            Step::Read(_) => {
                if feed(&mut dialog, &mut left) {
                    continue;
                }
                match peeked.take().or_else(|| turns.next()) {
                    Some(Turn::Says(bytes) | Turn::Interrupts(bytes)) => left = bytes,
                    Some(Turn::Breaks(fault)) => dialog.fail(&fault),
                    None => {
                        ends.push("waits".to_owned());
                        return (ours, ends);
                    }
                }
            }
            Step::Settle(rcpt, outcome) => ends.push(short(rcpt, &outcome)),
            Step::Leave(rcpt) => ends.push(format!("{rcpt} left")),
            Step::Content => {
                // What is left of a turn came before the content.
                if feed(&mut dialog, &mut left) {
                    continue;
                }
                peeked = peeked.or_else(|| turns.next());
                match peeked.take() {
                    Some(Turn::Interrupts(bytes)) => left = bytes,
                    Some(Turn::Breaks(fault)) if ours.last().is_none_or(|last| last != "--") => {
                        dialog.fail(&fault);
                    }
                    other => {
                        peeked = other;
                        ours.push("--".to_owned());
                        dialog.content_sent();
                    }
                }
            }
            Step::Ready if !begun => {
                // A server that goes on talking has done so by now.
                begun = true;
                feed(&mut dialog, &mut left);
                dialog.begin(order.clone(), freshness);
            }
            Step::Ready => {
                ends.push("ready".to_owned());
                return (ours, ends);
            }
            Step::Again => {
                ends.push("again".to_owned());
                return (ours, ends);
            }
            Step::Refused(outcome) => {
                ends.push(short_cause(outcome.label(), outcome.cause().unwrap()));
            }
            Step::Close => {
                ends.push("close".to_owned());
                return (ours, ends);
            }
        }
    }
}

#[track_caller]
fn check_on(freshness: Freshness, order: &Order, script: &str) {
    let (turns, ours, ends) = parse(script);
    let random = (1..=8).map(Cuts::Random);
    for cuts in [Cuts::Whole, Cuts::Octets].into_iter().chain(random) {
        let (wrote, came) = play(&turns, order, freshness, cuts);
        assert_eq!(came, ends, "{cuts:?} of\n{script}");
        assert_eq!(wrote, ours, "{cuts:?} of\n{script}");
    }
}

#[track_caller]
fn check(order: &Order, script: &str) {
    check_on(Freshness::New, order, script);
}

/// After an opening with these capabilities.
#[track_caller]
fn check_after(capabilities: &str, order: &Order, script: &str) {
    check(order, &(opening(capabilities) + script));
}

const TO_ONE: &str = "
    C: MAIL FROM:<a@x.example>
    S: 250 2.1.0 ok
    C: RCPT TO:<r0@y.example>
    S: 250 2.1.5 ok
    C: DATA
";

/// All of a message to one, pipelined.
const TO_ONE_AT_ONCE: &str = "
    C: MAIL FROM:<a@x.example>
    C: RCPT TO:<r0@y.example>
    C: DATA
";

#[test]
fn a_message_is_sent_one_command_at_a_time() {
    check_after(
        "",
        &one(),
        &format!(
            "{TO_ONE} S: 354 go on\n--\nS: 250 2.0.0 queued as 1\n= 0 delivered: 250 2.0.0 queued as 1\n= ready"
        ),
    );
}

#[test]
fn a_message_is_sent_in_one_write_where_pipelining_is_offered() {
    check_after(
        "PIPELINING",
        &three(),
        "C: MAIL FROM:<a@x.example>
         C: RCPT TO:<r0@y.example>
         C: RCPT TO:<r1@y.example>
         C: RCPT TO:<r2@y.example>
         C: DATA
         S: 250 ok
         S: 250 ok
         S: 251 forwarded
         S: 250 ok
         S: 354 go on
         --
         S: 250 queued
         = 0 delivered: 250 queued
         = 1 delivered: 250 queued
         = 2 delivered: 250 queued
         = ready",
    );
}

#[test]
fn each_recipient_has_its_own_verdict() {
    for pipelining in ["", "PIPELINING"] {
        let script = match pipelining {
            "" => {
                "C: MAIL FROM:<a@x.example>
                 S: 250 ok
                 C: RCPT TO:<r0@y.example>
                 S: 550-5.1.1 no such
                 S: 550 5.1.1 user
                 C: RCPT TO:<r1@y.example>
                 S: 450 4.2.1 busy
                 C: RCPT TO:<r2@y.example>
                 S: 250 ok
                 C: DATA
                 S: 354 go on"
            }
            _ => {
                "C: MAIL FROM:<a@x.example>
                 C: RCPT TO:<r0@y.example>
                 C: RCPT TO:<r1@y.example>
                 C: RCPT TO:<r2@y.example>
                 C: DATA
                 S: 250 ok
                 S: 550-5.1.1 no such
                 S: 550 5.1.1 user
                 S: 450 4.2.1 busy
                 S: 250 ok
                 S: 354 go on"
            }
        };
        let end = "
            --
            S: 250 queued
            = 0 failed recipient rcpt: 550 5.1.1 no such user
            = 1 deferred recipient rcpt: 450 4.2.1 busy
            = 2 delivered: 250 queued
            = ready";
        check_after(pipelining, &three(), &format!("{script}{end}"));
    }
}

#[test]
fn without_a_recipient_no_content_is_sent() {
    check_after(
        "",
        &one(),
        "C: MAIL FROM:<a@x.example>
         S: 250 ok
         C: RCPT TO:<r0@y.example>
         S: 550 no
         C: RSET
         S: 250 ok
         = 0 failed recipient rcpt: 550 no
         = ready",
    );
    check_after(
        "PIPELINING",
        &one(),
        &format!(
            "{TO_ONE_AT_ONCE}
             S: 250 ok
             S: 550 no
             S: 554 no valid recipients
             C: RSET
             S: 250 ok
             = 0 failed recipient rcpt: 550 no
             = ready"
        ),
    );
}

#[test]
fn a_354_without_a_recipient_gets_a_lone_dot_that_delivers_nothing() {
    for answer in ["250 queued", "554 no valid recipients", "451 later"] {
        check_after(
            "PIPELINING",
            &one(),
            &format!(
                "{TO_ONE_AT_ONCE}
                 S: 250 ok
                 S: 550 no
                 S: 354 go on
                 C: .
                 S: {answer}
                 C: RSET
                 S: 250 ok
                 = 0 failed recipient rcpt: 550 no
                 = ready"
            ),
        );
    }
}

#[test]
fn the_replies_after_a_refused_mail_are_read() {
    check_after(
        "PIPELINING",
        &one(),
        &format!(
            "{TO_ONE_AT_ONCE}
             S: 550 5.7.1 no
             S: 503 5.5.1 need MAIL
             S: 503 5.5.1 need RCPT
             C: RSET
             S: 250 ok
             = 0 failed message mail: 550 5.7.1 no
             = ready"
        ),
    );
    // A server that counts on: still nothing is delivered.
    check_after(
        "PIPELINING",
        &one(),
        &format!(
            "{TO_ONE_AT_ONCE}
             S: 451 4.3.0 later
             S: 250 ok
             S: 354 go on
             C: .
             S: 250 queued
             C: RSET
             S: 250 ok
             = 0 deferred message mail: 451 4.3.0 later
             = ready"
        ),
    );
    check_after(
        "",
        &one(),
        "C: MAIL FROM:<a@x.example>
         S: 452 4.3.1 full
         C: RSET
         S: 250 ok
         = 0 deferred message mail: 452 4.3.1 full
         = ready",
    );
}

#[test]
fn an_opening_that_fails_is_the_providers_fault() {
    for (said, end) in [
        ("S: 421 4.3.2 busy", "deferred provider greeting: 421 4.3.2 busy"),
        ("S: 554 go away", "held provider greeting: 554 go away"),
        ("S: 250 hello", "deferred provider greeting: 250 hello"),
        ("S: 354 hello", "deferred provider greeting: 354 hello"),
        (
            "!closed",
            "deferred provider greeting: the server closed the connection before its greeting",
        ),
        (
            "S_ 220 he\n!closed",
            "deferred provider greeting: the server closed the connection before its greeting",
        ),
        ("!silence", "deferred provider greeting: no greeting within 300 s"),
        (
            "S: SSH-2.0-OpenSSH_9.2",
            "deferred provider greeting: the server broke the protocol before its greeting: a line is not a reply",
        ),
        (
            "S: \\x16\\x03\\x01\\x00",
            "deferred provider greeting: the server broke the protocol before its greeting: a line is not a reply",
        ),
        (
            "S_ {long}{long}",
            "deferred provider greeting: the server broke the protocol before its greeting: a line of a reply is too long",
        ),
        (
            "S: 220 {long}",
            "deferred provider greeting: the server broke the protocol before its greeting: a line of a reply is too long",
        ),
        ("S@ 220-and", "waits"),
        (
            "S@ 220-and\nS: 220 more",
            "deferred provider greeting: the server broke the protocol before its greeting: a reply has too many lines",
        ),
        (
            "S: 220-a\nS: 221 b",
            "deferred provider greeting: the server broke the protocol before its greeting: the lines of a reply have different codes",
        ),
    ] {
        let close = if end == "waits" { "" } else { "\n= close" };
        check(&one(), &format!("{said}\n= {end}{close}"));
    }
    for (said, end) in [
        ("S: 421 closing", "deferred provider ehlo: 421 closing"),
        ("S: 451 4.3.0 later", "deferred provider ehlo: 451 4.3.0 later"),
        ("S: 550 5.7.1 bad name", "held provider ehlo: 550 5.7.1 bad name"),
        ("S: 554 no", "held provider ehlo: 554 no"),
        ("S: 220 again", "deferred provider ehlo: 220 again"),
        ("!closed", "deferred provider ehlo: the server closed the connection after EHLO"),
        (
            "!network",
            "deferred provider ehlo: the connection broke after EHLO: Connection reset by peer",
        ),
        ("!silence", "deferred provider ehlo: no answer to EHLO within 300 s"),
    ] {
        check(&one(), &format!("S: 220 hi\nC: EHLO me.example\n{said}\n= {end}\n= close"));
    }
}

#[test]
fn helo_follows_where_ehlo_is_not_known() {
    for code in ["500", "501", "502", "504"] {
        check(
            &three(),
            &format!(
                "S: 220 hi
                 C: EHLO me.example
                 S: {code} what
                 C: HELO me.example
                 S: 250 hello
                 C: MAIL FROM:<a@x.example>
                 S: 421 bye
                 = 0 deferred message mail: 421 bye
                 = 1 deferred message mail: 421 bye
                 = 2 deferred message mail: 421 bye
                 = close"
            ),
        );
    }
    check(
        &one(),
        "S: 220 hi
         C: EHLO me.example
         S: 500 what
         C: HELO me.example
         S: 550 no
         = held provider ehlo: 550 no
         = close",
    );
}

#[test]
fn every_stage_of_a_transaction_has_its_verdict() {
    let mail = "C: MAIL FROM:<a@x.example>\n";
    let rcpt = format!("{mail}S: 250 ok\nC: RCPT TO:<r0@y.example>\n");
    let data = format!("{rcpt}S: 250 ok\nC: DATA\n");
    let content = format!("{data}S: 354 go on\n");
    let dot = format!("{content}--\n");
    let reset = "C: RSET\nS: 250 ok\n";
    let garbage = "the server broke the protocol";
    for (before, said, after, end) in [
        (mail, "S: 550 5.1.7 no", reset, "failed message mail: 550 5.1.7 no"),
        (mail, "S: 451 later", reset, "deferred message mail: 451 later"),
        (mail, "S: 530 5.7.57 log in", reset, "held provider mail: 530 5.7.57 log in"),
        (mail, "S: 552 5.2.2 quota", reset, "held sender mail: 552 5.2.2 quota"),
        (mail, "S: 421 bye", "", "deferred message mail: 421 bye"),
        (mail, "S: 354 go on", "", "deferred message mail: 354 go on"),
        (mail, "S: 220 hi", "", "deferred message mail: 220 hi"),
        (mail, "!closed", "", "deferred message mail: the server closed the connection after MAIL"),
        (mail, "!silence", "", "deferred message mail: no answer to MAIL within 300 s"),
        (
            mail,
            "S: what",
            "",
            &format!("deferred message mail: {garbage} after MAIL: a line is not a reply"),
        ),
        (&rcpt, "S: 550 n\\xe9", reset, "failed recipient rcpt: 550 n\\xe9"),
        (&rcpt, "S~ 450 busy", reset, "deferred recipient rcpt: 450 busy"),
        (&rcpt, "S: 452 4.5.3 many", reset, "deferred recipient rcpt: 452 4.5.3 many"),
        (&rcpt, "S: 421 bye", "", "deferred message rcpt: 421 bye"),
        (&rcpt, "S: 354 go on", "", "deferred message rcpt: 354 go on"),
        (
            &rcpt,
            "!closed",
            "",
            "deferred message rcpt: the server closed the connection after RCPT",
        ),
        (
            &rcpt,
            "S_ 2\n!closed",
            "",
            "deferred message rcpt: the server closed the connection after RCPT",
        ),
        (&rcpt, "!silence", "", "deferred message rcpt: no answer to RCPT within 300 s"),
        (&data, "S: 554 no", reset, "failed message data: 554 no"),
        (&data, "S: 451 later", reset, "deferred message data: 451 later"),
        (&data, "S: 421 bye", "", "deferred message data: 421 bye"),
        (&data, "S: 250 ok", "", "deferred message data: 250 ok"),
        (&data, "S: 334 more", "", "deferred message data: 334 more"),
        (
            &data,
            "!closed",
            "",
            "deferred message data: the server closed the connection after DATA",
        ),
        (&data, "!silence", "", "deferred message data: no answer to DATA within 300 s"),
        (&content, "E: 552 5.3.4 large", "", "failed message content: 552 5.3.4 large"),
        (&content, "E: 421 4.4.2 slow", "", "deferred message content: 421 4.4.2 slow"),
        (&content, "E: 451 later", "", "deferred message content: 451 later"),
        (&content, "E: 250 taken", "", "deferred message content: 250 taken"),
        (
            &content,
            "E: nonsense",
            "",
            &format!(
                "deferred message content: {garbage} while the content was being sent: a line is not a reply"
            ),
        ),
        (
            &content,
            "!closed",
            "",
            "deferred message content: the server closed the connection while the content was being sent",
        ),
        (
            &content,
            "!silence",
            "",
            "deferred message content: the server took no content for 300 s",
        ),
        (&dot, "S: 554 5.6.0 no", reset, "failed message end_of_data: 554 5.6.0 no"),
        (&dot, "S: 451 later", reset, "deferred message end_of_data: 451 later"),
        (&dot, "S: 550 5.7.60 as whom", reset, "held message end_of_data: 550 5.7.60 as whom"),
        (&dot, "S: 421 bye", "", "deferred message end_of_data: 421 bye"),
        (&dot, "S: 354 more", "", "deferred message end_of_data maybe: 354 more"),
        (&dot, "S: 220 hi", "", "deferred message end_of_data maybe: 220 hi"),
        (
            &dot,
            "S: taken",
            "",
            &format!(
                "deferred message end_of_data maybe: {garbage} after the final dot: a line is not a reply"
            ),
        ),
    ] {
        let end = match after {
            "" => format!("= 0 {end}\n= close"),
            _ => format!("= 0 {end}\n= ready"),
        };
        check_after("", &one(), &format!("{before}{said}\n{after}{end}"));
    }
}

#[test]
fn after_the_final_dot_a_broken_connection_leaves_a_doubt() {
    for (event, words) in [
        ("!closed", "the server closed the connection after the final dot"),
        ("!silence", "no answer to the final dot within 300 s"),
    ] {
        // The beginning of a reply puts the event after the content.
        let script = format!(
            "{TO_ONE} S: 354 go on\n--\nS_ 25\n{event}\n= 0 deferred message end_of_data maybe: {words}\n= close"
        );
        check_after("", &one(), &script);
    }
}

#[test]
fn a_connection_that_ends_among_recipients_defers_all_that_are_open() {
    check_after(
        "PIPELINING",
        &three(),
        "C: MAIL FROM:<a@x.example>
         C: RCPT TO:<r0@y.example>
         C: RCPT TO:<r1@y.example>
         C: RCPT TO:<r2@y.example>
         C: DATA
         S: 250 ok
         S: 250 ok
         S: 550 no
         S: 421 4.3.2 closing
         = 1 failed recipient rcpt: 550 no
         = 0 deferred message rcpt: 421 4.3.2 closing
         = 2 deferred message rcpt: 421 4.3.2 closing
         = close",
    );
    check_after(
        "PIPELINING",
        &three(),
        "C: MAIL FROM:<a@x.example>
         C: RCPT TO:<r0@y.example>
         C: RCPT TO:<r1@y.example>
         C: RCPT TO:<r2@y.example>
         C: DATA
         S: 250 ok
         S: 550 no
         S: 250 ok
         !closed
         = 0 failed recipient rcpt: 550 no
         = 1 deferred message rcpt: the server closed the connection after RCPT
         = 2 deferred message rcpt: the server closed the connection after RCPT
         = close",
    );
}

#[test]
fn a_full_transaction_goes_with_those_it_took() {
    let full = |refusal: &str| {
        format!(
            "C: MAIL FROM:<a@x.example>
             S: 250 ok
             C: RCPT TO:<r0@y.example>
             S: 250 ok
             C: RCPT TO:<r1@y.example>
             S: {refusal}
             C: DATA
             S: 354 go on
             --
             S: 250 queued
             = 1 left
             = 2 left
             = 0 delivered: 250 queued
             = ready"
        )
    };
    for refusal in ["452 4.5.3 too many", "452 enough", "552 5.5.3 too many"] {
        check_after("", &three(), &full(refusal));
    }
    // That recipient's own trouble ends nothing.
    check_after(
        "",
        &three(),
        "C: MAIL FROM:<a@x.example>
         S: 250 ok
         C: RCPT TO:<r0@y.example>
         S: 250 ok
         C: RCPT TO:<r1@y.example>
         S: 452 4.2.2 mailbox full
         C: RCPT TO:<r2@y.example>
         S: 250 ok
         C: DATA
         S: 451 later
         C: RSET
         S: 250 ok
         = 1 deferred recipient rcpt: 452 4.2.2 mailbox full
         = 0 deferred message data: 451 later
         = 2 deferred message data: 451 later
         = ready",
    );
    // Those under way have replies of their own: a later 250 counts.
    check_after(
        "PIPELINING",
        &three(),
        "C: MAIL FROM:<a@x.example>
         C: RCPT TO:<r0@y.example>
         C: RCPT TO:<r1@y.example>
         C: RCPT TO:<r2@y.example>
         C: DATA
         S: 250 ok
         S: 250 ok
         S: 452 4.5.3 many
         S: 250 ok
         S: 354 go on
         --
         S: 250 queued
         = 1 left
         = 0 delivered: 250 queued
         = 2 delivered: 250 queued
         = ready",
    );
}

#[test]
fn a_reused_connection_that_is_gone_is_replaced() {
    for pipelining in ["", "PIPELINING"] {
        let sent = match pipelining {
            "" => "C: MAIL FROM:<a@x.example>\n",
            _ => TO_ONE_AT_ONCE,
        };
        for event in ["S: 421 4.4.2 idle too long", "!closed", "!network", "S: nonsense"] {
            let script = format!("{}{sent}{event}\n= again", opening(pipelining));
            check_on(Freshness::Reused, &one(), &script);
        }
    }
    let mail = format!("{}C: MAIL FROM:<a@x.example>\n", opening(""));
    // It was waited for long enough; a refusal is one; and what MAIL began is not begun twice.
    check_on(
        Freshness::Reused,
        &one(),
        &format!(
            "{mail}!silence\n= 0 deferred message mail: no answer to MAIL within 300 s\n= close"
        ),
    );
    check_on(
        Freshness::Reused,
        &one(),
        &format!(
            "{mail}S: 451 later\nC: RSET\nS: 250 ok\n= 0 deferred message mail: 451 later\n= ready"
        ),
    );
    check_on(
        Freshness::Reused,
        &one(),
        &format!(
            "{mail}S: 250 ok\nC: RCPT TO:<r0@y.example>\n!closed\n= 0 deferred message rcpt: the server closed the connection after RCPT\n= close"
        ),
    );
}

#[test]
fn a_reply_that_nobody_asked_for_ends_the_connection() {
    let script = format!(
        "{}S: 421 4.3.2 closing\n= 0 deferred provider local: the server broke the protocol between two messages: a reply came before it was asked for\n= close",
        opening("")
    );
    check(&one(), &script);
    let script = format!("{}S_ 42\n= again", opening(""));
    check_on(Freshness::Reused, &one(), &script);
}

#[test]
fn a_failed_reset_takes_nothing_back() {
    for event in ["S: 421 bye", "S: 502 what", "!closed", "!silence"] {
        check_after(
            "",
            &one(),
            &format!(
                "C: MAIL FROM:<a@x.example>
                 S: 550 no
                 C: RSET
                 {event}
                 = 0 failed message mail: 550 no
                 = close"
            ),
        );
    }
}

/// What MAIL and RCPT look like to a server that can these things.
#[track_caller]
fn check_commands(capabilities: &str, order: &Order, commands: &[&str]) {
    let (turns, ..) = parse(&opening(&format!("PIPELINING,{capabilities}")));
    let (ours, ends) = play(&turns, order, Freshness::New, Cuts::Whole);
    let ours: Vec<&str> = ours[1..].iter().filter_map(|line| line.strip_prefix("C: ")).collect();
    assert_eq!(ours, [commands, &["DATA"]].concat(), "{capabilities}");
    assert_eq!(ends, ["waits"]);
}

#[test]
fn parameters_go_where_they_are_offered() {
    let rcpt = "RCPT TO:<r0@y.example>";
    check_commands("", &one(), &["MAIL FROM:<a@x.example>", rcpt]);
    check_commands("SIZE", &one(), &["MAIL FROM:<a@x.example> SIZE=500", rcpt]);
    check_commands("size 500", &one(), &["MAIL FROM:<a@x.example> SIZE=500", rcpt]);
    check_commands("SIZE 0", &one(), &["MAIL FROM:<a@x.example> SIZE=500", rcpt]);
    check_commands("SIZE x", &one(), &["MAIL FROM:<a@x.example> SIZE=500", rcpt]);
    check_commands("8BITMIME", &one(), &["MAIL FROM:<a@x.example>", rcpt]);
    let eight = Order { eight_bit: true, ..one() };
    check_commands("8bitmime", &eight, &["MAIL FROM:<a@x.example> BODY=8BITMIME", rcpt]);
    check_commands("SIZE", &eight, &["MAIL FROM:<a@x.example> SIZE=500", rcpt]);
    let utf8 = Order { smtputf8: true, ..one() };
    check_commands("8BITMIME,SMTPUTF8", &utf8, &["MAIL FROM:<a@x.example>", rcpt]);
    let utf8 = Order { eight_bit: true, ..utf8 };
    let mail = "MAIL FROM:<a@x.example> BODY=8BITMIME SMTPUTF8";
    check_commands("8BITMIME,SMTPUTF8", &utf8, &[mail, rcpt]);
    check_commands("8BITMIME", &utf8, &["MAIL FROM:<a@x.example> BODY=8BITMIME", rcpt]);
    check_commands("", &order("", &["postmaster"]), &["MAIL FROM:<>", "RCPT TO:<postmaster>"]);
    let odd = order("\"a b\"@[192.0.2.1]", &["\"x\\\"y\"@[IPv6:2001:db8::1]"]);
    let odd_lines = ["MAIL FROM:<\"a b\"@[192.0.2.1]>", "RCPT TO:<\"x\\\"y\"@[IPv6:2001:db8::1]>"];
    check_commands("", &odd, &odd_lines);
}

#[test]
fn dsn_parameters_are_passed_on() {
    let dsn = with(three(), |envelope| {
        envelope.ret = Some(Ret::Headers);
        envelope.envid = Some("QQ+2B314".into());
        envelope.rcpts[0].notify = Notify::Never;
        envelope.rcpts[1].notify = Notify::On { success: true, failure: true, delay: true };
        envelope.rcpts[1].orcpt = Some("rfc822;o+2B1@z.example".into());
        envelope.rcpts[2].notify = Notify::On { success: false, failure: true, delay: false };
        envelope.rcpts[2].orcpt = Some("utf-8;ö@z.example".into());
    });
    check_commands(
        "DSN",
        &dsn,
        &[
            "MAIL FROM:<a@x.example> RET=HDRS ENVID=QQ+2B314",
            "RCPT TO:<r0@y.example> NOTIFY=NEVER",
            "RCPT TO:<r1@y.example> NOTIFY=SUCCESS,FAILURE,DELAY ORCPT=rfc822;o+2B1@z.example",
            "RCPT TO:<r2@y.example> NOTIFY=FAILURE",
        ],
    );
    check_commands(
        "SIZE",
        &dsn,
        &[
            "MAIL FROM:<a@x.example> SIZE=500",
            "RCPT TO:<r0@y.example>",
            "RCPT TO:<r1@y.example>",
            "RCPT TO:<r2@y.example>",
        ],
    );
    let full = with(one(), |envelope| envelope.ret = Some(Ret::Full));
    check_commands("DSN", &full, &["MAIL FROM:<a@x.example> RET=FULL", "RCPT TO:<r0@y.example>"]);
}

#[test]
fn an_address_that_cannot_be_written_fails_alone() {
    let needs = "needs SMTPUTF8, which the server does not offer";
    let mixed =
        Order { smtputf8: true, ..order("a@x.example", &["jörg@y.example", "r1@y.example"]) };
    check_after(
        "8BITMIME",
        &mixed,
        &format!(
            "C: MAIL FROM:<a@x.example>
             S: 250 ok
             C: RCPT TO:<r1@y.example>
             S: 250 ok
             C: DATA
             S: 354 go on
             --
             S: 250 queued
             = 0 failed recipient local: the address {needs}
             = 1 delivered: 250 queued
             = ready"
        ),
    );
    check_commands(
        "8BITMIME,SMTPUTF8",
        &mixed,
        &["MAIL FROM:<a@x.example> SMTPUTF8", "RCPT TO:<jörg@y.example>", "RCPT TO:<r1@y.example>"],
    );
    // Only the part counts, not the other recipients of the envelope.
    let other = Order { part: vec![1], ..mixed };
    check_commands("SMTPUTF8", &other, &["MAIL FROM:<a@x.example>", "RCPT TO:<r1@y.example>"]);
    check_after(
        "",
        &order("ä@x.example", &["r0@y.example", "r1@y.example"]),
        &format!(
            "= 0 failed message local: the sender <ä@x.example> {needs}
             = 1 failed message local: the sender <ä@x.example> {needs}
             = ready"
        ),
    );
    check_after(
        "",
        &order("a@x.example", &["ä@y.example"]),
        &format!("= 0 failed recipient local: the address {needs}\n= ready"),
    );
}

#[test]
fn a_message_over_the_servers_limit_is_not_offered() {
    check_after(
        "SIZE 499",
        &one(),
        "= 0 failed message local: the message has 500 octets, the server takes at most 499
         = ready",
    );
}

/// A message to 250 over a server with PIPELINING that answers each line so; the commands in each write, and how many
/// recipients had which outcome.
fn play_many(answer: impl Fn(&str) -> &'static str) -> (Vec<usize>, Vec<(&'static str, usize)>) {
    let (windows, settled, _full_at) = play_to_many(answer);
    (windows, settled)
}

/// The same, and how many recipients the server had when it was full.
fn play_to_many(
    answer: impl Fn(&str) -> &'static str,
) -> (Vec<usize>, Vec<(&'static str, usize)>, Option<usize>) {
    let names: Vec<String> = (0..250).map(|at| format!("r{at}@y.example")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let order = order("a@x.example", &names);
    let mut dialog = Dialog::new("me.example", Opening::default());
    let (mut windows, mut settled) =
        (Vec::new(), [("delivered", 0), ("deferred", 0), ("failed", 0), ("left", 0)]);
    let mut begun = false;
    dialog.receive(b"220 hi\r\n");
    loop {
        match dialog.next() {
            Step::Write(bytes) => {
                assert!(bytes.len() <= WINDOW_OCTETS + 1_000);
                let lines = String::from_utf8(bytes).unwrap();
                let lines: Vec<&str> = lines.trim_end().split("\r\n").collect();
                windows.push(lines.len());
                for line in lines {
                    let reply = match line {
                        "EHLO me.example" => "250-up\r\n250 PIPELINING",
                        line => answer(line),
                    };
                    dialog.receive(format!("{reply}\r\n").as_bytes());
                }
            }
            Step::Content => {
                dialog.content_sent();
                dialog.receive(b"250 queued\r\n");
            }
            Step::Settle(_, outcome) => {
                let label = outcome.label();
                settled.iter_mut().find(|(known, _)| *known == label).unwrap().1 += 1;
            }
            Step::Leave(_) => settled[3].1 += 1,
            Step::Ready if !begun => {
                begun = true;
                dialog.begin(order.clone(), Freshness::New);
            }
            Step::Ready => break,
            step => panic!("{step:?}"),
        }
    }
    settled.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let settled = settled.into_iter().filter(|(_, count)| *count > 0).collect();
    (windows, settled, dialog.full_at())
}

#[test]
fn many_recipients_go_in_windows() {
    let (windows, settled) = play_many(|line| match line {
        "DATA" => "354 go on",
        _ => "250 ok",
    });
    // EHLO; MAIL with 99 recipients; 100; the rest with DATA.
    assert_eq!((windows, settled), (vec![1, 100, 100, 52], vec![("delivered", 250)]));
}

#[test]
fn no_window_follows_a_refused_mail() {
    let (windows, settled) = play_many(|line| match line {
        "RSET" => "250 ok",
        line if line.starts_with("MAIL") => "550 no",
        _ => "503 need MAIL",
    });
    assert_eq!((windows, settled), (vec![1, 100, 1], vec![("failed", 250)]));
}

#[test]
fn no_window_follows_a_full_transaction_and_data_goes_alone() {
    let (windows, settled) = play_many(|line| match line {
        "DATA" => "354 go on",
        "RCPT TO:<r0@y.example>" | "RCPT TO:<r1@y.example>" => "250 ok",
        line if line.starts_with("RCPT") => "452 4.5.3 too many",
        _ => "250 ok",
    });
    let want = vec![("left", 248), ("delivered", 2)];
    assert_eq!((windows, settled), (vec![1, 100, 1], want));
}

/// Two recipients a transaction for an hour were what one odd reply cost.
#[test]
fn a_server_that_takes_more_after_all_was_not_full() {
    for (odd, full_at) in [("RCPT TO:<r2@y.example>", None), ("RCPT TO:<r98@y.example>", Some(98))]
    {
        let (_, settled, learned) = play_to_many(|line| match line {
            "DATA" => "354 go on",
            line if line == odd => "452 too much mail data",
            _ => "250 ok",
        });
        assert_eq!(learned, full_at, "{settled:?}");
    }
}

#[test]
fn a_refused_data_changes_nothing_where_every_recipient_was_refused() {
    let (windows, settled) = play_many(|line| match line {
        "RSET" => "250 ok",
        "DATA" => "503 no valid recipients",
        line if line.starts_with("RCPT") => "550 no",
        _ => "250 ok",
    });
    // DATA went with the last recipients, before their replies came.
    assert_eq!((windows, settled), (vec![1, 100, 100, 52, 1], vec![("failed", 250)]));
}

#[test]
fn any_bytes_end_with_one_word_for_each_recipient() {
    const WORDS: &[&[u8]] = &[
        b"220 hi\r\n",
        b"250 ok\r\n",
        b"250-up\r\n",
        b"250-PIPELINING\r\n",
        b"250-SIZE 400\r\n",
        b"250-SMTPUTF8\r\n",
        b"354 go\r\n",
        b"354\n",
        b"421 bye\r\n",
        b"450 4.2.1 no\r\n",
        b"452 4.5.3 many\r\n",
        b"500 what\r\n",
        b"550 5.1.1 no\r\n",
        b"530 5.7.57 who\r\n",
        b"251 ok\r\n",
        b"\r\n",
        b"\0\xff\xfe",
        b"2",
        b"-",
        b" ",
        b"\r",
        b"\n",
    ];
    let rounds = std::env::var("FUZZ_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(5_000);
    for round in 0..rounds {
        let mut seed = round;
        let order = match round % 3 {
            0 => one(),
            1 => three(),
            _ => order("ä@x.example", &["r0@y.example", "ö@y.example"]),
        };
        let opening = match random(&mut seed) % 4 {
            0 => login(),
            1 => STARTTLS,
            2 => token("t0ken"),
            _ => Opening::default(),
        };
        let mut dialog = Dialog::new("me.example", opening);
        let mut settled = vec![0; order.part.len()];
        let (mut refused, mut begun) = (false, false);
        // Mostly what a server would say, so that the dialog gets far.
        let polite = random(&mut seed) % 8;
        for _ in 0..1_000 {
            match dialog.next() {
                Step::Write(_) | Step::WriteSecret(_) => {}
                Step::StartTls => dialog.secured(),
                Step::Read(wait) => {
                    let awaited = dialog.awaited.front().copied();
                    let bytes: Vec<u8> = match (random(&mut seed) % 8, awaited) {
                        (n, Some(command)) if n < polite => match command {
                            Command::Greeting => b"220 hi\r\n".to_vec(),
                            Command::Ehlo => {
                                b"250-a\r\n250-STARTTLS\r\n250-AUTH LOGIN\r\n250 PIPELINING\r\n"
                                    .to_vec()
                            }
                            Command::Data => b"354 go\r\n".to_vec(),
                            Command::StartTls => b"220 go\r\n".to_vec(),
                            Command::AuthPlain | Command::Password => b"235 in\r\n".to_vec(),
                            Command::AuthLogin | Command::Username => b"334 \r\n".to_vec(),
                            _ => b"250 ok\r\n".to_vec(),
                        },
                        (7, _) => vec![random(&mut seed).to_le_bytes()[0]; 700],
                        _ => WORDS[usize::try_from(random(&mut seed)).unwrap() % WORDS.len()]
                            .to_vec(),
                    };
                    match random(&mut seed) % 64 {
                        0 => dialog.fail(&Fault::Closed),
                        1 => dialog.fail(&Fault::Silence(Duration::from_secs(1))),
                        _ => {
                            dialog.receive(&bytes);
                        }
                    }
                    assert_eq!(Some(wait), awaited.map(Command::wait));
                }
                Step::Content => match random(&mut seed) % 4 {
                    0 => dialog.fail(&Fault::Closed),
                    1 => {
                        dialog.receive(b"552 no\r\n");
                    }
                    _ => dialog.content_sent(),
                },
                Step::Settle(rcpt, _) | Step::Leave(rcpt) => settled[rcpt] += 1,
                Step::Ready if !begun => {
                    begun = true;
                    dialog.begin(order.clone(), Freshness::New);
                }
                Step::Refused(_) => refused = true,
                Step::Ready | Step::Close => {
                    let want = if begun { 1 } else { 0 };
                    assert!(begun != refused, "round {round}");
                    assert!(
                        settled.iter().all(|times| *times == want),
                        "round {round}: {settled:?}"
                    );
                    break;
                }
                Step::Again => panic!("round {round}: a new connection is not replaced"),
            }
        }
    }
}

/// Plays the opening of a connection, a reply at a time; the handshake of TLS always succeeds.
fn open(opening: &Opening, replies: &[&str]) -> Vec<String> {
    let mut dialog = Dialog::new("me.example", opening.clone());
    let mut replies = replies.iter();
    let mut seen = Vec::new();
    loop {
        match dialog.next() {
            Step::Write(line) => seen.push(String::from_utf8(line).unwrap().trim_end().to_owned()),
            Step::WriteSecret(line) => {
                let line = String::from_utf8(line.to_vec()).unwrap();
                let (verb, secret) =
                    line.trim_end().rsplit_once(' ').unwrap_or(("", line.trim_end()));
                let secret = String::from_utf8(BASE64.decode(secret).unwrap()).unwrap();
                seen.push(format!("{verb} ({})", secret.replace('\0', "|")));
            }
            Step::StartTls => {
                seen.push("-- secured".to_owned());
                dialog.secured();
            }
            Step::Read(_) => match replies.next() {
                Some(reply) => drop(dialog.receive(format!("{reply}\r\n").as_bytes())),
                None => dialog.fail(&Fault::Closed),
            },
            Step::Ready => {
                seen.push("ready".to_owned());
                return seen;
            }
            Step::Refused(outcome) => {
                let Some(cause) = outcome.cause() else { panic!("{outcome:?}") };
                seen.push(short_cause(outcome.label(), cause));
                return seen;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[track_caller]
fn check_open(opening: &Opening, replies: &[&str], expected: &[&str]) {
    let seen = open(opening, replies);
    let ends_like = |seen: &String, expected: &&str| match expected.strip_suffix("…") {
        Some(start) => seen.starts_with(start),
        None => seen == expected,
    };
    let is_same =
        seen.len() == expected.len() && seen.iter().zip(expected).all(|(a, b)| ends_like(a, b));
    assert!(is_same, "{seen:#?}");
}

fn login() -> Opening {
    let password = Secret::for_tests("p w");
    let login = Login { username: "me@x.example".to_owned(), proof: Proof::Password(password) };
    Opening { starttls: false, login: Some(login) }
}

const STARTTLS: Opening = Opening { starttls: true, login: None };

#[test]
fn starttls_secures_the_connection_before_anything_else() {
    check_open(
        &Opening { starttls: true, ..login() },
        &[
            "220 hi",
            "250-up\r\n250-AUTH LOGIN\r\n250 starttls",
            "220 go on",
            "250-up\r\n250 AUTH PLAIN LOGIN",
            "235 in",
        ],
        &[
            "EHLO me.example",
            "STARTTLS",
            "-- secured",
            "EHLO me.example",
            "AUTH PLAIN (|me@x.example|p w)",
            "ready",
        ],
    );
}

#[test]
fn what_was_offered_in_clear_does_not_count() {
    check_open(
        &Opening { starttls: true, ..login() },
        &["220 hi", "250-up\r\n250-STARTTLS\r\n250 AUTH PLAIN", "220 go on", "250 up"],
        &[
            "EHLO me.example",
            "STARTTLS",
            "-- secured",
            "EHLO me.example",
            "held provider auth: the server offers neither…",
        ],
    );
}

#[test]
fn without_starttls_nothing_is_sent_in_clear() {
    let refused =
        "held provider starttls: the server does not offer STARTTLS, and nothing is sent in clear…";
    check_open(&STARTTLS, &["220 hi", "250-up\r\n250 SIZE 1"], &["EHLO me.example", refused]);
    check_open(
        &STARTTLS,
        &["220 hi", "502 what?", "250 up"],
        &["EHLO me.example", "HELO me.example", refused],
    );
    let offers = ["220 hi", "250-up\r\n250 STARTTLS"];
    let asked = ["EHLO me.example", "STARTTLS"];
    for (reply, end) in [
        ("454 4.7.0 not now", "deferred provider starttls: 454 4.7.0 not now"),
        ("501 5.5.4 no", "held provider starttls: 501 5.5.4 no"),
        ("421 4.3.2 bye", "deferred provider starttls: 421 4.3.2 bye"),
    ] {
        check_open(&STARTTLS, &[&offers[..], &[reply]].concat(), &[&asked[..], &[end]].concat());
    }
    check_open(
        &STARTTLS,
        &offers,
        &[
            asked[0],
            asked[1],
            "deferred provider starttls: the server closed the connection after STARTTLS",
        ],
    );
}

#[test]
fn a_reply_smuggled_in_before_the_handshake_breaks_the_protocol() {
    check_open(
        &STARTTLS,
        &["220 hi", "250-up\r\n250 STARTTLS", "220 go on\r\n250 up"],
        &[
            "EHLO me.example",
            "STARTTLS",
            "deferred provider starttls: the server broke the protocol after STARTTLS: a reply came before it was asked for",
        ],
    );
}

#[test]
fn a_login_takes_the_way_that_the_server_offers() {
    let plain = "AUTH PLAIN (|me@x.example|p w)";
    check_open(
        &login(),
        &["220 hi", "250-up\r\n250 AUTH XOAUTH2 plain", "235 2.7.0 in"],
        &["EHLO me.example", plain, "ready"],
    );
    check_open(
        &login(),
        &["220 hi", "250-up\r\n250 AUTH PLAIN", "334 ", "235 in"],
        &["EHLO me.example", plain, " (|me@x.example|p w)", "ready"],
    );
    for offer in ["AUTH LOGIN XOAUTH2", "AUTH=LOGIN", "auth=login plainer"] {
        check_open(
            &login(),
            &[
                "220 hi",
                &format!("250-up\r\n250 {offer}"),
                "334 VXNlcm5hbWU6",
                "334 UGFzc3dvcmQ6",
                "235 in",
            ],
            &["EHLO me.example", "AUTH LOGIN", " (me@x.example)", " (p w)", "ready"],
        );
    }
    for offer in ["AUTH XOAUTH2 CRAM-MD5", "SIZE 5", "AUTH"] {
        check_open(
            &login(),
            &["220 hi", &format!("250-up\r\n250 {offer}")],
            &[
                "EHLO me.example",
                "held provider auth: the server offers neither AUTH PLAIN nor AUTH LOGIN here…",
            ],
        );
    }
}

#[test]
fn a_refused_login_is_the_providers_trouble_in_the_servers_words() {
    for (reply, end) in [
        ("535 5.7.8 no", "held provider auth: 535 5.7.8 no"),
        (
            "535 5.7.139 Authentication unsuccessful",
            "held provider auth: 535 5.7.139 Authentication unsuccessful",
        ),
        ("534 5.7.9 ask your admin", "held provider auth: 534 5.7.9 ask your admin"),
        ("454 4.7.0 later", "deferred provider auth: 454 4.7.0 later"),
        ("421 4.7.0 too many logins", "deferred provider auth: 421 4.7.0 too many logins"),
        ("250 what", "deferred provider auth: 250 what"),
        ("334 more", "deferred provider auth: 334 more"),
    ] {
        let greeting = ["220 hi", "250-up\r\n250 AUTH LOGIN"];
        let asked = ["EHLO me.example", "AUTH LOGIN"];
        if reply != "334 more" {
            check_open(
                &login(),
                &[&greeting[..], &[reply]].concat(),
                &[&asked[..], &[end]].concat(),
            );
        }
        check_open(
            &login(),
            &[&greeting[..], &["334 u", "334 p", reply]].concat(),
            &[&asked[..], &[" (me@x.example)", " (p w)", end]].concat(),
        );
    }
}

#[test]
fn a_server_that_repeats_the_login_is_not_quoted() {
    let greeting = ["220 hi", "250-up\r\n250 AUTH PLAIN"];
    for echo in ["AUTH PLAIN AG1lQHguZXhhbXBsZQBwIHc=", "cCB3", "so it is p w"] {
        check_open(
            &login(),
            &[&greeting[..], &[&format!("500 5.5.1 what is \"{echo}\"?")]].concat(),
            &[
                "EHLO me.example",
                "AUTH PLAIN (|me@x.example|p w)",
                "held provider auth: 500 5.5.1 (its words are not shown: the login is in them)",
            ],
        );
    }
}

#[test]
fn a_login_longer_than_a_line_follows_the_334() {
    let password = Secret::for_tests(&"x".repeat(400));
    let login = Login { username: "me".to_owned(), proof: Proof::Password(password) };
    let opening = Opening { starttls: false, login: Some(login) };
    let secret = format!(" (|me|{})", "x".repeat(400));
    check_open(
        &opening,
        &["220 hi", "250-up\r\n250 AUTH PLAIN", "334 ", "235 in"],
        &["EHLO me.example", "AUTH PLAIN", &secret, "ready"],
    );
}

fn token(token: &str) -> Opening {
    let proof = Proof::Bearer(Secret::for_tests(token));
    let login = Login { username: "me@x.example".to_owned(), proof };
    Opening { starttls: false, login: Some(login) }
}

const SHOWN: &str = "user=me@x.example\u{1}auth=Bearer t0ken\u{1}\u{1}";

#[test]
fn a_token_is_shown_by_xoauth2_alone() {
    let greeting = ["220 hi", "250-up\r\n250 AUTH PLAIN LOGIN XOAUTH2"];
    let line = format!("AUTH XOAUTH2 ({SHOWN})");
    check_open(
        &token("t0ken"),
        &[&greeting[..], &["235 2.7.0 in"]].concat(),
        &["EHLO me.example", &line, "ready"],
    );
    // The server did not take what came with the command.
    check_open(
        &token("t0ken"),
        &[&greeting[..], &["334 ", "235 2.7.0 in"]].concat(),
        &["EHLO me.example", &line, &format!(" ({SHOWN})"), "ready"],
    );
    check_open(
        &token("t0ken"),
        &["220 hi", "250-up\r\n250 AUTH PLAIN LOGIN"],
        &["EHLO me.example", "held provider auth: the server does not offer AUTH XOAUTH2…"],
    );
}

#[test]
fn a_refused_token_is_answered_until_the_refusal_comes() {
    let greeting = ["220 hi", "250-up\r\n250 AUTH XOAUTH2"];
    let line = format!("AUTH XOAUTH2 ({SHOWN})");
    for (replies, asked) in [
        (&["334 eyJzdGF0dXMiOiI0MDEifQ==", "535 5.7.3 no"][..], &[""][..]),
        (&["334 ", "334 eyJzdGF0dXMiOiI0MDEifQ==", "535 5.7.3 no"][..], &["(blob)", ""][..]),
        (&["535 5.7.3 no"][..], &[][..]),
    ] {
        let blob = format!(" ({SHOWN})");
        let asked = asked.iter().map(|it| if *it == "(blob)" { blob.as_str() } else { it });
        let expected: Vec<&str> = ["EHLO me.example", &line]
            .into_iter()
            .chain(asked)
            .chain(["held provider auth: 535 5.7.3 no"])
            .collect();
        check_open(&token("t0ken"), &[&greeting[..], replies].concat(), &expected);
    }
    check_open(
        &token("t0ken"),
        &[&greeting[..], &["432 4.3.2 Concurrent connections limit exceeded"]].concat(),
        &["EHLO me.example", &line, "held sender auth: 432 4.3.2…"],
    );
}

#[test]
fn a_token_longer_than_a_line_follows_the_334() {
    let long = "t".repeat(2_000);
    let blob = format!(" (user=me@x.example\u{1}auth=Bearer {long}\u{1}\u{1})");
    check_open(
        &token(&long),
        &["220 hi", "250-up\r\n250 AUTH XOAUTH2", "334 ", "235 in"],
        &["EHLO me.example", "AUTH XOAUTH2", &blob, "ready"],
    );
}

#[test]
fn a_server_that_repeats_the_token_is_not_quoted() {
    let blob = BASE64.encode(SHOWN);
    for echo in ["t0ken", &blob] {
        check_open(
            &token("t0ken"),
            &["220 hi", "250-up\r\n250 AUTH XOAUTH2", &format!("535 5.7.3 what is {echo}?")],
            &[
                "EHLO me.example",
                &format!("AUTH XOAUTH2 ({SHOWN})"),
                "held provider auth: 535 5.7.3 (its words are not shown: the login is in them)",
            ],
        );
    }
}
