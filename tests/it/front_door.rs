//! What limits, time-outs and hostile clients do to the front door.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::client::{Client, id, stuffed};
use crate::support::gateway::{Gateway, Setup, get};
use crate::support::sink::{Answer, Sink};
use crate::support::{eventually, is_slow};

const REFUSED: &str = "mailsluice_messages_refused_total";
const ACCEPTED: &str = "mailsluice_messages_accepted_total";
const OPEN: &str = "mailsluice_connections";

/// A command line every so long: slow, and never done.
const DRIP: Duration = Duration::from_millis(20);

fn refused(gateway: &Gateway, reason: &str) -> f64 {
    gateway.metric(&format!("{REFUSED}{{reason=\"{reason}\"}}"))
}

fn turned_away(gateway: &Gateway, reason: &str) -> f64 {
    gateway.metric(&format!("mailsluice_connections_refused_total{{reason=\"{reason}\"}}"))
}

/// Waits until all connections have ended on the gateway's side too.
#[track_caller]
fn wait_closed(gateway: &Gateway) {
    eventually("all connections to end", || (gateway.metric(OPEN) == 0.0).then_some(()));
}

/// Opens a transaction up to the 354.
#[track_caller]
fn data(client: &mut Client) {
    client.command("MAIL FROM:<a@example.com>", 250);
    client.command("RCPT TO:<b@example.com>", 250);
    client.command("DATA", 354);
}

/// A normal client is served, and fast.
#[track_caller]
fn serves(gateway: &Gateway) -> Duration {
    let began = Instant::now();
    let mut client = Client::hello(gateway.smtp());
    client.mail("a@example.com", &["b@example.com"], "Subject: x\r\n\r\nhello\r\n");
    client.command("QUIT", 221);
    began.elapsed()
}

/// No CR without LF behind it, no LF without CR before it.
#[track_caller]
fn assert_whole_lines(content: &[u8]) {
    for (at, byte) in content.iter().enumerate() {
        let fits = match byte {
            b'\r' => content.get(at + 1) == Some(&b'\n'),
            b'\n' => at > 0 && content[at - 1] == b'\r',
            _ => true,
        };
        assert!(fits, "a lone newline at {at}: {}", content.escape_ascii());
    }
}

// The end of data (R10, R11)

/// What might be taken for the end of data and is none.
fn false_ends() -> Vec<Vec<u8>> {
    let starts: [&[u8]; 9] =
        [b"\n", b"\r", b"\r\n", b"\n\r", b"\r\r", b"\n\n", b"\r\n\0", b"\0\r\n", b"\r\n "];
    let dots: [&[u8]; 3] = [b".", b"..", b".\0"];
    let ends: [&[u8]; 7] = [b"\n", b"\r", b"\r\n", b"\n\r", b"\r\r\n", b"\0\r\n", b" \r\n"];
    let mut all = Vec::new();
    for start in starts {
        for dot in dots {
            for end in ends {
                let variant = [start, dot, end].concat();
                if !variant.windows(5).any(|it| it == b"\r\n.\r\n") {
                    all.push(variant);
                }
            }
        }
    }
    all
}

/// What arrives of what was sent before the final dot: a dot goes where a line ended by CRLF starts with it, a lone LF
/// becomes CRLF and a lone CR a blank.
fn arriving(sent: &[u8]) -> Vec<u8> {
    let text: String = sent.iter().map(|byte| char::from(*byte)).collect();
    let lines = text.split("\r\n").map(|line| {
        let line = line.strip_prefix('.').unwrap_or(line);
        line.replace('\r', " ").replace('\n', "\r\n")
    });
    lines.collect::<Vec<_>>().join("\r\n").into_bytes()
}

#[test]
fn only_crlf_dot_crlf_ends_data() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).set("log", "level = \"info\"").start();
    let ends = false_ends();
    assert!(ends.len() >= 30, "{}", ends.len());
    let mut work = Vec::new();
    for (number, end) in ends.iter().enumerate() {
        let mut content = b"Message-ID: <1@x>\r\nDate: today\r\n\r\nbefore".to_vec();
        let at = content.len();
        content.extend_from_slice(end);
        content.extend_from_slice(b"MAIL FROM:<evil@example.com>\r\nRCPT TO:<victim@example.com>\r\nDATA\r\nsmuggled\r\n.\r\n");
        // Everywhere for a few, and for the others around what looks like the end.
        let cuts = match number {
            0..3 => (1..content.len()).collect(),
            _ => vec![at + 1, at + 1 + number % end.len(), at + end.len()],
        };
        work.extend(cuts.into_iter().map(|cut| (content.clone(), cut)));
    }
    let address = gateway.smtp();
    std::thread::scope(|scope| {
        for share in work.chunks(work.len().div_ceil(8)) {
            scope.spawn(|| smuggle(address, &sink, share));
        }
    });
    gateway.wait_empty();
    assert_eq!(gateway.metric(ACCEPTED), work.len() as f64);
    let taken = sink.taken();
    assert_eq!(taken.len(), work.len());
    for taken in taken {
        assert_eq!((taken.from.as_str(), taken.to.len()), ("a@example.com", 1));
        assert_whole_lines(&taken.content);
    }
}

/// Sends each content in two pieces, and expects one message of it.
fn smuggle(address: SocketAddr, sink: &Sink, share: &[(Vec<u8>, usize)]) {
    let mut client = Client::hello(address);
    for (content, cut) in share {
        client.send("MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n");
        client.expect(250);
        client.expect(250);
        client.expect(354);
        client.send(&content[..*cut]);
        std::thread::yield_now();
        client.send(&content[*cut..]);
        let taken = sink.wait_id(&id(&client.expect(250)));
        let sent = content.strip_suffix(b".\r\n").unwrap();
        let shown = content.escape_ascii();
        assert_eq!(
            taken.original().escape_ascii().to_string(),
            arriving(sent).escape_ascii().to_string(),
            "cut at {cut}: {shown}"
        );
        // Nothing of it ran as a command.
        client.command("HELP", 214);
    }
}

/// Content, and what must arrive of it.
#[track_caller]
fn check_arrives(gateway: &Gateway, sink: &Sink, content: &[u8], arriving: &[u8]) {
    let id = Client::hello(gateway.smtp()).mail("a@example.com", &["b@example.com"], content);
    let taken = sink.wait_id(&id);
    let shown = |bytes: &[u8]| bytes[..bytes.len().min(2000)].escape_ascii().to_string();
    assert!(
        taken.original() == arriving,
        "{}\nis not\n{}",
        shown(taken.original()),
        shown(arriving)
    );
}

#[test]
fn content_arrives_byte_for_byte() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let long = [b"X-Long: ".as_slice(), &[b'h'; 1_000_000], b"\r\n\r\n", &[b'b'; 1_000_000]];
    let every_octet: Vec<u8> = (0..=255).filter(|byte| !b"\r\n".contains(byte)).collect();
    for content in [
        b"".as_slice(),
        b"\r\n",
        b"no header at all\r\n",
        b"\r\n\r\n\r\nno header, and empty lines\r\n\r\n\r\n",
        b"Subject: x\r\n",
        b"Subject: x\r\n\r\n",
        b"Subject: x\r\n \t\r\n folded\r\n\r\ntrailing blanks \t \r\n.\r\n..\r\n.x\r\n...\r\n",
        &[b"Subject: \xc3\xbc\xff\r\n\r\n", every_octet.as_slice(), b"\r\n"].concat(),
        &[long.concat().as_slice(), b"\r\n"].concat(),
        &b"Subject: x\r\n\r\n.\r\n".repeat(10_000),
    ] {
        check_arrives(&gateway, &sink, content, content);
    }
}

#[test]
fn chunks_arrive_byte_for_byte_and_end_their_last_line() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let mut client = Client::hello(gateway.smtp());
    let nul = b"Subject: x\r\n\r\n\0\x01\xff.\r\n.\r\n..\0";
    for (chunks, arriving) in [
        (vec![&nul[..9], &nul[9..15], b"", &nul[15..]], [nul.as_slice(), b"\r\n"].concat()),
        (vec![b"Subject: x\r", b"\n\r\nend\r\n".as_slice()], b"Subject: x\r\n\r\nend\r\n".to_vec()),
        (vec![&[b'x'; 300_000], b"".as_slice()], [[b'x'; 300_000].as_slice(), b"\r\n"].concat()),
        (vec![b"".as_slice()], Vec::new()),
    ] {
        client.command("MAIL FROM:<a@example.com> BODY=8BITMIME", 250);
        client.command("RCPT TO:<b@example.com>", 250);
        let (last, first) = chunks.split_last().unwrap();
        for chunk in first {
            client.send([format!("BDAT {}\r\n", chunk.len()).as_bytes(), chunk].concat());
            client.expect(250);
        }
        client.send([format!("BDAT {} LAST\r\n", last.len()).as_bytes(), last].concat());
        let taken = sink.wait_id(&id(&client.expect(250)));
        assert_eq!(
            taken.original().escape_ascii().to_string(),
            arriving.escape_ascii().to_string()
        );
    }
}

#[test]
fn blind_copies_and_return_path_do_not_leave() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    check_arrives(
        &gateway,
        &sink,
        b"Return-Path: <x@y>\r\nBcc: a@b,\r\n\tc@d\r\nSubject: x\r\nResent-Bcc: e@f\r\nbcc : g@h\r\n\r\nBcc: text\r\n",
        b"Subject: x\r\n\r\nBcc: text\r\n",
    );
}

#[test]
fn message_id_and_date_are_added_only_where_missing() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let (with_id, with_date) = ("message-id: <1@x>\r\n", "DATE: today\r\n");
    for header in ["", with_id, with_date, "message-id: <1@x>\r\nDATE: today\r\n"] {
        let content = format!("{header}Subject: x\r\n\r\nMessage-ID: text\r\nDate: text\r\n");
        let id = Client::hello(gateway.smtp()).mail("a@x.example", &["b@x.example"], &content);
        let taken = sink.wait_id(&id);
        let (head, _) =
            taken.text().split_once("\r\n\r\n").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        let count =
            |name: &str| head.lines().filter(|line| line.to_lowercase().starts_with(name)).count();
        assert_eq!((count("message-id:"), count("date:"), count("received:")), (1, 1, 1), "{head}");
        assert_eq!(
            head.contains(&format!("\r\nMessage-ID: <{id}@relay.test>")),
            !header.contains(with_id),
            "{head}"
        );
        assert_eq!(head.contains("\r\nDate: "), !header.contains(with_date), "{head}");
        assert!(taken.text().ends_with(&content));
    }
}

#[test]
fn a_message_that_goes_in_circles_is_refused() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let mut client = Client::hello(gateway.smtp());
    let hops = |n| format!("{}Subject: x\r\n\r\n", "Received: from x\r\n\tby y\r\n".repeat(n));
    for n in [20, 50] {
        let taken = sink.wait_id(&client.mail("a@example.com", &["b@example.com"], hops(n)));
        assert!(taken.text().ends_with(&hops(n)));
    }
    data(&mut client);
    client.send(stuffed(hops(51).as_bytes()));
    assert!(client.expect(554).starts_with("554 5.4.6 "));
    client.command("QUIT", 221);
    gateway.wait_event("refused", |event| event["reason"] == "loop");
    gateway.wait_empty();
    assert_eq!((gateway.metric(ACCEPTED), refused(&gateway, "loop")), (2.0, 1.0));
    assert_eq!(refused(&gateway, "unfinished"), 0.0);
}

/// It was counted as unfinished too.
#[test]
fn what_is_too_large_is_refused_and_counted_once() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).set("limits", "message_size = \"100kB\"").start();
    let mut client = Client::connect(gateway.smtp());
    assert!(client.command("EHLO c", 250).contains("250-SIZE 100000\r\n"));
    assert!(client.command("MAIL FROM:<a@b> SIZE=100001", 552).starts_with("552 5.3.4 "));
    assert_eq!(refused(&gateway, "too_large"), 1.0);
    data(&mut client);
    client.send(stuffed(&b"0123456789\r\n".repeat(10_000)));
    assert!(client.expect(552).starts_with("552 5.3.4 "));
    assert_eq!(refused(&gateway, "too_large"), 2.0);
    client.command("MAIL FROM:<a@b>", 250);
    client.command("RCPT TO:<b@example.com>", 250);
    client.send([b"BDAT 100001 LAST\r\n".as_slice(), &[b'x'; 100_001]].concat());
    assert!(client.expect(552).starts_with("552 5.3.4 "));
    let fits = "x".repeat(99_998) + "\r\n";
    let id = client.mail("a@example.com", &["b@example.com"], &fits);
    assert_eq!(String::from_utf8_lossy(sink.wait_id(&id).original()), fits);
    gateway.wait_empty();
    assert_eq!((refused(&gateway, "too_large"), refused(&gateway, "unfinished")), (3.0, 0.0));
    assert_eq!((gateway.metric(ACCEPTED), sink.taken().len()), (1.0, 1));
    gateway.wait_event("refused", |event| event["reason"] == "too_large");
}

#[test]
fn bare_newlines_are_refused_where_the_operator_says_so() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).set("limits", "bare_newline = \"reject\"").start();
    let mut client = Client::hello(gateway.smtp());
    data(&mut client);
    client.send("Subject: x\n\r\n.\r\n");
    assert!(client.expect(550).starts_with("550 5.6.0 "));
    client.command("QUIT", 221);
    assert_eq!((refused(&gateway, "content"), refused(&gateway, "unfinished")), (1.0, 0.0));
    assert_eq!(gateway.metric(ACCEPTED), 0.0);
}

// Hostile and odd clients (R15, R16, R19, R75)

#[test]
fn ten_thousand_recipients_get_a_thousand_in() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).set("log", "level = \"info\"").start();
    let mut client = Client::hello(gateway.smtp());
    client.command("MAIL FROM:<a@example.com>", 250);
    let mut accepted = BTreeSet::new();
    for group in 0..20 {
        let all: Vec<_> = (0..500).map(|n| format!("r{}@example.com", group * 500 + n)).collect();
        let lines: String = all.iter().map(|to| format!("RCPT TO:<{to}>\r\n")).collect();
        client.send(lines);
        for to in all {
            let reply = client.reply().unwrap();
            if reply.starts_with("250 ") {
                accepted.insert(to);
            } else {
                assert!(reply.starts_with("452 4.5.3 "), "{reply}");
                assert_eq!(accepted.len(), 1000);
            }
        }
    }
    client.command("DATA", 354);
    client.send("Subject: x\r\n\r\n.\r\n");
    client.expect(250);
    let delivered = || sink.taken().into_iter().flat_map(|taken| taken.to).collect::<Vec<_>>();
    eventually("all to be delivered", || (delivered().len() >= accepted.len()).then_some(()));
    gateway.wait_empty();
    let mut delivered = delivered();
    delivered.sort();
    assert_eq!(delivered, accepted.into_iter().collect::<Vec<_>>());
}

#[test]
fn lines_without_end_take_no_memory() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).set("log", "level = \"info\"").start();
    serves(&gateway);
    let before = gateway.peak_memory_kb();
    let mut client = Client::connect(gateway.smtp());
    for octet in [b'x', 0] {
        let piece = vec![octet; 1_000_000];
        (0..20).for_each(|_| client.send(&piece));
        client.send("\r\n");
        assert!(client.expect(500).starts_with("500 5.5.2 "));
    }
    client.command("NOOP", 250);
    // Content and its header have lines of any length.
    data(&mut client);
    client.send("X-Long: ");
    (0..5).for_each(|_| client.send(vec![b'x'; 1_000_000]));
    client.send("\r\n\r\n");
    (0..20).for_each(|_| client.send(vec![b'x'; 1_000_000]));
    client.send("\r\n.\r\n");
    let taken = sink.wait_id(&id(&client.expect(250)));
    assert!(taken.content.len() > 25_000_000);
    let grown = gateway.peak_memory_kb() - before;
    assert!(grown < 12_000, "{grown} kB more than the {before} kB before");
}

#[test]
fn a_hundred_bad_commands_are_too_many() {
    let gateway = Setup::none("hold").start();
    let mut client = Client::connect(gateway.smtp());
    client.send("\0\r\n".repeat(50) + &"FOO\r\n".repeat(50));
    for _ in 0..10 {
        client.expect(500);
    }
    assert!(client.expect(421).starts_with("421 4.7.0 "));
    assert_eq!(client.expect_end(), "");
    drop(client);
    wait_closed(&gateway);
}

#[test]
fn http_and_tls_are_sent_away_and_nothing_of_them_runs() {
    let gateway = Setup::none("hold").start();
    let mail = "EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n";
    for verb in ["GET / HTTP/1.1", "POST /x HTTP/1.1", "CONNECT x:25 HTTP/1.1", "PUT / HTTP/1.0"] {
        let mut client = Client::silent(gateway.smtp());
        client.send(format!("{verb}\r\nHost: {}\r\n\r\n{mail}", gateway.smtp()));
        client.expect(220);
        client.expect(421);
        assert_eq!(client.expect_end(), "");
    }
    let mut client = Client::silent(gateway.smtp());
    client.send([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".as_slice(), &[7; 500]].concat());
    client.expect(220);
    client.expect(421);
    assert_eq!(client.expect_end(), "");
    drop(client);
    wait_closed(&gateway);
    assert_eq!(gateway.metric(ACCEPTED), 0.0);
}

#[test]
fn a_client_that_is_not_allowed_learns_so_and_no_more() {
    let gateway = Setup::none("hold").set("[listener]", "allow = [\"192.0.2.0/24\"]").start();
    let mut client = Client::silent(gateway.smtp());
    assert!(client.expect(554).starts_with("554 5.7.1 "));
    assert_eq!(client.expect_end(), "");
    gateway.wait_event("refused", |event| event["reason"] == "not_allowed");
    assert_eq!((turned_away(&gateway, "not_allowed"), gateway.metric(OPEN)), (1.0, 0.0));
}

#[test]
fn the_connection_idle_longest_makes_room_and_a_busy_one_does_not() {
    let gateway = Setup::none("hold")
        .set("limits", "connections = 3")
        .set("limits", "connections_per_client = 1")
        .start();
    // Loopback is exempt from the limit per client.
    let mut idlest = Client::hello(gateway.smtp());
    let since = Instant::now();
    eventually("the clock to go on", || (since.elapsed().as_millis() > 5).then_some(()));
    let mut clients = vec![Client::hello(gateway.smtp()), Client::hello(gateway.smtp())];
    clients.push(Client::hello(gateway.smtp()));
    assert!(idlest.expect(421).starts_with("421 4.3.2 "));
    assert_eq!(idlest.expect_end(), "");
    for client in &mut clients {
        client.command("MAIL FROM:<a@example.com>", 250);
    }
    let mut late = Client::silent(gateway.smtp());
    assert!(late.expect(421).starts_with("421 4.3.2 "));
    assert_eq!(late.expect_end(), "");
    assert_eq!(
        (turned_away(&gateway, "evicted"), turned_away(&gateway, "connections")),
        (1.0, 1.0)
    );
    for client in &mut clients {
        client.command("RCPT TO:<b@example.com>", 250);
        client.command("DATA", 354);
        client.send("Subject: x\r\n.\r\n");
        client.expect(250);
        client.command("QUIT", 221);
    }
    drop(clients);
    wait_closed(&gateway);
    serves(&gateway);
    assert_eq!(gateway.metric(ACCEPTED), 4.0);
}

#[test]
fn a_command_that_drips_ends_in_time() {
    let gateway = Setup::none("hold").set("limits", "command_timeout = \"400ms\"").start();
    let mut client = Client::hello(gateway.smtp());
    client.command("MAIL FROM:<a@example.com>", 250);
    client.stream.set_read_timeout(Some(DRIP)).unwrap();
    client.send("NOOP ");
    let reply = eventually("the time-out", || {
        // A write to a closed connection is an end too.
        drop(client.stream.write_all(b"x"));
        client.reply()
    });
    assert!(reply.starts_with("421 4.4.2 "), "{reply}");
    drop(client);
    wait_closed(&gateway);
    assert_eq!(gateway.metric(ACCEPTED), 0.0);
}

#[test]
fn content_that_stays_away_ends_in_time_and_the_log_says_why() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).set("limits", "data_timeout = \"300ms\"").start();
    for (content, bare_end) in
        [("Subject: x\r\n\r\nhal", false), ("Subject: x\n\nhello\n.\n", true), (".\r", true)]
    {
        let mut client = Client::hello(gateway.smtp());
        data(&mut client);
        client.send(content);
        let reply = client.expect(421);
        assert!(reply.starts_with("421 4.4.2 "), "{reply}");
        assert_eq!(reply.contains("only CRLF.CRLF ends DATA"), bare_end, "{reply}");
        assert_eq!(client.expect_end(), "");
    }
    for bare_end in [false, true] {
        gateway.wait_event("refused", |event| {
            let message = event["message"].as_str().unwrap();
            event["reason"] == "timeout"
                && event["level"] == "WARN"
                && message.contains("only CRLF.CRLF ends DATA") == bare_end
        });
    }
    assert_eq!((gateway.metric(ACCEPTED), refused(&gateway, "unfinished")), (0.0, 3.0));
    assert_eq!(sink.connections(), 0);
}

#[test]
fn the_slow_and_the_idle_delay_nobody() {
    const IDLE: usize = 1000;
    const SLOW_COMMANDS: usize = 200;
    const SLOW_DATA: usize = 100;
    let sink = Sink::new();
    raise_descriptor_limit();
    let gateway = Setup::to(sink.address).set("log", "level = \"info\"").start();
    let address = gateway.smtp();
    let idle: Vec<_> = (0..IDLE).map(|_| Client::silent(address)).collect();
    let mut slow: Vec<_> =
        (0..SLOW_COMMANDS + SLOW_DATA).map(|_| Client::silent(address)).collect();
    for client in &mut slow {
        client.expect(220);
    }
    for client in &mut slow[SLOW_COMMANDS..] {
        client.send("MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n");
    }
    for client in &mut slow[SLOW_COMMANDS..] {
        client.expect(250);
        client.expect(250);
        client.expect(354);
    }
    let all = (IDLE + SLOW_COMMANDS + SLOW_DATA) as f64;
    eventually("all to be connected", || (gateway.metric(OPEN) == all).then_some(()));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                slow.iter_mut().for_each(|client| client.send("x"));
                std::thread::park_timeout(DRIP);
            }
        });
        let slowest = (0..20).map(|_| serves(&gateway)).max().unwrap();
        done.store(true, Ordering::SeqCst);
        assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    });
    sink.wait(20);
    drop(idle);
}

/// Room for the test's own ends of many connections.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let need = limit.maximum.map_or(8192, |maximum| maximum.min(8192));
    if limit.current.is_some_and(|current| current < need) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(need), ..limit }).unwrap();
    }
}

#[test]
fn a_client_that_never_reads_costs_little_and_ends() {
    let gateway = Setup::none("hold")
        .set("limits", "command_timeout = \"1s\"")
        .set("log", "level = \"info\"")
        .start();
    serves(&gateway);
    wait_closed(&gateway);
    let before = gateway.peak_memory_kb();
    // Commands that lead nowhere are limited in number.
    let mut client = Client::connect(gateway.smtp());
    client.stream.write_all("NOOP\r\nHELP\r\n".repeat(600).as_bytes()).unwrap_or_default();
    wait_closed(&gateway);
    // A recipient that is known already is always fine, so the replies go on until nothing takes them: the gateway
    // waits for its reader, and the client for the gateway.
    let client = Client::connect(gateway.smtp());
    rustix::net::sockopt::set_socket_recv_buffer_size(&client.stream, 4096).unwrap();
    let mut stream = &client.stream;
    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    stream.write_all(b"MAIL FROM:<a@example.com>\r\n").unwrap();
    let lines = "RCPT TO:<b@example.com>\r\n".repeat(4000);
    while stream.write_all(lines.as_bytes()).is_ok() {}
    let took = serves(&gateway);
    assert!(took < Duration::from_secs(1), "{took:?}");
    wait_closed(&gateway);
    let grown = gateway.peak_memory_kb() - before;
    assert!(grown < 8_000, "{grown} kB more than the {before} kB before");
    assert_eq!(gateway.metric(ACCEPTED), 2.0);
}

/// It was told to make room and stayed until its time to read was up, in the way of others.
#[test]
fn a_client_that_never_reads_makes_room() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("smtp.sock");
    // A socket of a size that the system fixes, and replies that fill it before they are too many.
    let gateway = Setup::none("hold")
        .set("", &format!("hostname = \"{}example\"", "long-name.".repeat(24)))
        .set("limits", "connections = 1")
        .set("log", "level = \"info\"");
    let gateway = start_on_unix(&gateway, &path);
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    stream.write_all("EHLO x\r\n".repeat(900).as_bytes()).unwrap();
    // A line without end is read as long as anything is.
    let end = stream.write_all(&vec![b'x'; 40_000_000]).map_err(|error| error.kind());
    assert_eq!(end, Err(ErrorKind::WouldBlock));
    let mut other = BufReader::new(UnixStream::connect(&path).unwrap());
    other.read_line(&mut String::new()).unwrap();
    eventually("it to make room", || (gateway.metric(OPEN) == 1.0).then_some(()));
    assert_eq!(turned_away(&gateway, "evicted"), 1.0);
    drop(stream);
}

/// A message that could not be read back for want of a descriptor was held until the next start.
#[test]
fn without_descriptors_it_waits_and_goes_on() {
    let sink = Sink::new();
    raise_descriptor_limit();
    let gateway = Setup::to(sink.address).set("limits", "connections = 10").start();
    let mut client = Client::hello(gateway.smtp());
    let limit = |descriptors: usize| {
        let (pid, limit) = (gateway.pid().to_string(), format!("--nofile={descriptors}:1024"));
        assert!(Command::new("prlimit").args(["--pid", &pid, &limit]).status().unwrap().success());
    };
    limit(gateway.descriptors());
    // The kernel makes the connection; the gateway cannot take it yet.
    let mut waiting = Client::silent(gateway.smtp());
    gateway.wait_log("cannot accept on ");
    // Whoever is in is served, also where the upstream cannot be reached for want of a socket.
    let first = client.mail("a@example.com", &["b@example.com"], "Subject: x\r\n");
    limit(1024);
    waiting.expect(220);
    let second = waiting.mail("a@example.com", &["b@example.com"], "Subject: x\r\n");
    sink.wait_id(&first);
    sink.wait_id(&second);
    assert_eq!(sink.taken().len(), 2);
}

/// The rate is asked for after 30 s, so this is slow.
#[test]
fn content_below_the_minimum_rate_ends() {
    if !is_slow() {
        println!("skipped: SLOW_TESTS is not set");
        return;
    }
    let gateway = Setup::none("hold").start();
    let mut client = Client::hello(gateway.smtp());
    data(&mut client);
    client.stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let began = Instant::now();
    let reply = loop {
        assert!(began.elapsed() < Duration::from_secs(60));
        // 100 octets a second, where 500 are asked for.
        client.stream.write_all(b"0123456789").unwrap_or_default();
        if let Some(reply) = client.reply() {
            break reply;
        }
    };
    assert!(reply.starts_with("421 4.4.2 "), "{reply}");
    assert!(began.elapsed() >= Duration::from_secs(29), "{:?}", began.elapsed());
    assert_eq!((gateway.metric(ACCEPTED), refused(&gateway, "unfinished")), (0.0, 1.0));
}

/// More than a gigabyte goes to disk, so this is slow.
#[test]
fn eight_clients_with_messages_of_34_mb_take_less_than_48_mib() {
    if !is_slow() {
        println!("skipped: SLOW_TESTS is not set");
        return;
    }
    let sink = Sink::scripted(|ask| match ask.is_greeting() {
        true => Answer::reply("421 4.3.2 closed"),
        false => Answer::Usual,
    });
    let gateway = Setup::to(sink.address)
        .set("limits", "message_size = \"40MB\"")
        .set("log", "level = \"info\"")
        .start();
    let at_start = gateway.peak_memory_kb();
    let address = gateway.smtp();
    let mut content = b"Subject: large\r\n\r\n".to_vec();
    content.extend(b"An ordinary line of text, as long as most are: 78......\r\n".repeat(600_000));
    assert!((33_000_000..36_000_000).contains(&content.len()));
    let content = Arc::new(content);
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let content = Arc::clone(&content);
            std::thread::spawn(move || {
                let mut client = Client::hello(address);
                for _ in 0..5 {
                    client.mail("a@example.com", &["b@example.org"], &*content);
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    assert_eq!(gateway.metric(ACCEPTED), 40.0);
    assert_eq!(sink.count(), 0);
    let peak = gateway.peak_memory_kb();
    println!("40 messages of 34 MB from 8 clients: {peak} kB at most, {at_start} kB at the start");
    assert!(peak <= 48 * 1024, "{peak} kB");
}

#[test]
fn the_name_in_hello_cannot_break_out_of_received_or_log() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let mut client = Client::connect(gateway.smtp());
    client.command("EHLO x) by evil; \"(\\", 250);
    let taken = sink.wait_id(&client.mail("a@example.com", &["b@example.com"], "Subject: x\r\n"));
    let start =
        "Received: from unknown (HELO x\\) by evil; \"\\(\\\\ [127.0.0.1])\r\n\tby relay.test ";
    assert!(taken.text().starts_with(start), "{}", taken.text());
    client.command("EHLO \x1b[2J", 500);
    client.command("EHLO a\rb", 500);
}

#[test]
fn at_debug_the_log_has_what_clients_say_but_no_credentials_and_no_content() {
    let gateway = Setup::none("reject").set("log", "level = \"debug\"").start();
    let mut client = Client::hello(gateway.smtp());
    for line in ["FOO \x1b[2J", "AUTH LOGIN", "c2VjcmV0", "auth plain AHNlY3JldAo="] {
        client.send(format!("{line}\r\n"));
        client.reply();
    }
    client.command("DATA", 503);
    client.send("Dear secret\r\n");
    client.expect_end();
    for words in ["EHLO client.test", "AUTH LOGIN ***", "***", "AUTH plain ***", "DATA"] {
        gateway.wait_log(&format!("\"command\":{}", serde_json::json!(words)));
    }
    gateway.wait_log(r#""command":"FOO \\x1b[2J""#);
    let log = gateway.log_text();
    for secret in ["c2VjcmV0", "AHNlY3JldAo", "Dear"] {
        assert!(!log.contains(secret), "{secret}\n{log}");
    }
    gateway.stop();
}

#[test]
fn nothing_half_received_is_sent() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let head = "MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\n";
    let halves = [
        "DATA\r\n",
        "DATA\r\nSubject: half\r\n\r\nhello\r\n",
        "DATA\r\nSubject: half\r\n\r\nhello\r\n.",
        "DATA\r\nSubject: half\r\n\r\nhello\r\n.\r",
        "BDAT 20 LAST\r\nSubject: half\r\n",
        "BDAT 15\r\nSubject: half\r\n",
        "BDAT 15\r\nSubject: half\r\nBDAT 0 LAS",
    ];
    for half in halves {
        let mut client = Client::hello(gateway.smtp());
        client.send(format!("{head}{half}"));
        client.expect(250);
        client.expect(250);
        if half.starts_with("DATA") || half.contains("BDAT 15") {
            client.reply().unwrap();
        }
        // Half of them say that they end, the others are just gone.
        client.finish();
        assert_eq!(client.expect_end(), "");
        let mut client = Client::hello(gateway.smtp());
        client.send(format!("{head}{half}"));
    }
    wait_closed(&gateway);
    assert_eq!(gateway.metric(ACCEPTED), 0.0);
    assert!(refused(&gateway, "unfinished") >= halves.len() as f64);
    assert_eq!(sink.connections(), 0);
}

#[test]
fn a_client_that_leaves_before_the_reply_had_its_message_taken_whole_or_not_at_all() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let whole = "MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\nSubject: whole\r\n\r\nhello\r\n.\r\n";
    for _ in 0..20 {
        // Replies that are unread at the end make it a reset, which may overtake the content.
        Client::hello(gateway.smtp()).send(whole);
    }
    wait_closed(&gateway);
    let all = || Some(sink.taken()).filter(|taken| taken.len() as f64 == gateway.metric(ACCEPTED));
    for taken in eventually("what was accepted to arrive", all) {
        assert_eq!(taken.original(), b"Subject: whole\r\n\r\nhello\r\n");
    }
    // One that says that it ends is served what is complete.
    let mut client = Client::hello(gateway.smtp());
    client.send(whole);
    client.finish();
    (0..2).for_each(|_| drop(client.expect(250)));
    client.expect(354);
    sink.wait_id(&id(&client.expect(250)));
    assert_eq!(client.expect_end(), "");
}

// Without a provider

#[test]
fn without_a_provider_mail_is_refused_or_held() {
    let gateway = Setup::none("reject").start();
    let mut client = Client::hello(gateway.smtp());
    assert!(client.command("MAIL FROM:<a@example.com>", 451).starts_with("451 4.3.2 "));
    drop(client);
    assert_eq!(refused(&gateway, "no_provider"), 1.0);
    gateway.stop();

    let gateway = Setup::none("hold").start();
    let id = Client::hello(gateway.smtp()).mail("a@example.com", &["b@example.com"], "x: y\r\n");
    gateway.wait_event("accepted", |event| event["id"] == id.as_str());
    eventually("it to be queued", || {
        (gateway.metric("mailsluice_queue_messages{state=\"queued\"}") == 1.0).then_some(())
    });
    assert_eq!(gateway.metric("mailsluice_attempts_total"), 0.0);
    gateway.stop();
}

// Other sockets

/// Starts a gateway that listens on a Unix socket and nowhere else.
#[track_caller]
fn start_on_unix(setup: &Setup, path: &Path) -> Gateway {
    let address = format!("unix:{}", path.display());
    let gateway = setup.clone().set("[listener]", &format!("bind = \"{address}\"")).spawn();
    gateway.wait_event("listening", |event| event["address"] == address);
    let admin = gateway.admin();
    eventually("/readyz to say anything", || get(admin, "/readyz").ok());
    gateway
}

/// Says each line and expects the code.
#[track_caller]
fn speak(path: &Path, dialog: &[(&str, &str)]) {
    let mut stream = UnixStream::connect(path).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    for (said, code) in dialog {
        stream.write_all(said.as_bytes()).unwrap();
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert!(line.starts_with(code), "{said:?}: {line}");
    }
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_unix_socket_takes_mail_is_replaced_when_stale_and_removed_at_the_end() {
    let sink = Sink::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("smtp.sock");
    let setup = Setup::to(sink.address);
    start_on_unix(&setup, &path).kill();
    assert!(std::fs::symlink_metadata(&path).unwrap().file_type().is_socket(), "it is stale now");
    let gateway = start_on_unix(&setup, &path);
    speak(
        &path,
        &[
            ("", "220 "),
            ("HELO x\r\n", "250 "),
            ("MAIL FROM:<a@example.com>\r\n", "250 "),
            ("RCPT TO:<b@example.com>\r\n", "250 "),
            ("DATA\r\n", "354 "),
            ("Subject: x\r\n\r\nhello\r\n.\r\n", "250 "),
            ("QUIT\r\n", "221 "),
        ],
    );
    let taken = sink.wait(1).remove(0);
    assert_eq!(taken.original(), b"Subject: x\r\n\r\nhello\r\n");
    gateway.stop();
    assert!(!path.exists());
}

#[test]
fn ipv6_is_served_and_ipv4_on_its_sockets_is_ipv4() {
    if TcpListener::bind("[::1]:0").is_err() {
        println!("skipped: this machine has no ::1");
        return;
    }
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).set("[listener]", "bind = \"[::1]:0\"").start();
    serves(&gateway);
    let text = sink.wait(1).remove(0).text();
    assert!(text.starts_with("Received: from client.test ([IPv6:::1])\r\n"), "{text}");

    let gateway = Setup::to(sink.address)
        .set("[listener]", "bind = \"[::]:0\"")
        .set("[listener]", "allow = [\"127.0.0.0/8\"]")
        .start();
    let port = gateway.smtp().port();
    let mut client = Client::hello(SocketAddr::from(([127, 0, 0, 1], port)));
    client.mail("a@example.com", &["b@example.com"], "Subject: x\r\n");
    let text = sink.wait(2).remove(1).text();
    assert!(text.starts_with("Received: from client.test ([127.0.0.1])\r\n"), "{text}");
    let mut client = Client::silent(SocketAddr::new("::1".parse().unwrap(), port));
    client.expect(554);
}
