//! Mail goes from a client to an upstream, byte for byte.

use std::collections::BTreeSet;

use crate::support::client::{Client, id, stuffed};
use crate::support::gateway::{Gateway, Setup};
use crate::support::sink::{Sink, Taken};

/// A header with all that a message should have, so that nothing but Received is added.
const HEAD: &str =
    "From: a@example.com\r\nMessage-ID: <1@x>\r\nDate: Tue, 24 Nov 2026 06:42:11 +0000\r\n";

#[test]
fn a_message_arrives_with_its_envelope_and_one_received_line() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let content = "From: a@example.com\r\nTo: header-only@example.org\r\nMessage-ID: <1@x>\r\nDate: Tue, 24 Nov 2026 06:42:11 +0000\r\n\r\n.\r\n..\r\nhello \t\r\n\r\n";
    let id = Client::hello(gateway.smtp()).mail(
        "bounce@example.com",
        &["b@example.org", "c@example.org"],
        content,
    );
    let taken = sink.wait(1).remove(0);
    assert_eq!(taken.from, "bounce@example.com");
    assert_eq!(taken.to, ["b@example.org", "c@example.org"]);
    assert_eq!(String::from_utf8_lossy(taken.original()), content);
    assert!(
        taken.text().starts_with("Received: from client.test ([127.0.0.1])\r\n\tby relay.test "),
        "{}",
        taken.text()
    );
    assert!(taken.text().contains(&format!(" id {id};")));
    gateway.wait_empty();
    gateway.wait_event("delivered", |event| {
        event["id"] == id.as_str() && event["to"] == "c@example.org"
    });
    gateway.stop();
    assert_eq!(sink.taken().len(), 1);
}

/// One gateway and its sink, for many contents one after the other.
struct Way {
    sink: Sink,
    gateway: Gateway,
    sent: usize,
}

impl Way {
    fn new() -> Self {
        let sink = Sink::new();
        let gateway = Setup::to(sink.address).start();
        Self { sink, gateway, sent: 0 }
    }

    /// What arrives of a content that is sent by DATA.
    #[track_caller]
    fn data(&mut self, content: &[u8]) -> Taken {
        Client::hello(self.gateway.smtp()).mail("a@example.com", &["b@example.org"], content);
        self.next()
    }

    /// By BDAT, in chunks of this size.
    #[track_caller]
    fn bdat(&mut self, content: &[u8], size: usize) -> Taken {
        let mut client = Client::hello(self.gateway.smtp());
        client.command("MAIL FROM:<a@example.com> BODY=8BITMIME", 250);
        client.command("RCPT TO:<b@example.org>", 250);
        for chunk in content.chunks(size) {
            client.send(format!("BDAT {}\r\n", chunk.len()));
            client.send(chunk);
            client.expect(250);
        }
        client.command("BDAT 0 LAST", 250);
        self.next()
    }

    #[track_caller]
    fn next(&mut self) -> Taken {
        self.sent += 1;
        let taken = self.sink.wait(self.sent).remove(self.sent - 1);
        assert!(taken.content.starts_with(b"Received: from client.test "), "{}", taken.text());
        taken
    }

    #[track_caller]
    fn end(self) {
        self.gateway.wait_empty();
        self.gateway.stop();
        assert_eq!(self.sink.taken().len(), self.sent);
    }
}

#[track_caller]
fn same(taken: &Taken, content: &[u8]) {
    let original = taken.original();
    assert!(
        original == content,
        "{} octets {:?}\nbecame {} octets {:?}",
        content.len(),
        String::from_utf8_lossy(&content[..content.len().min(300)]),
        original.len(),
        String::from_utf8_lossy(&original[..original.len().min(300)])
    );
}

/// R11, R17.
#[test]
fn contents_arrive_octet_for_octet() {
    let mut way = Way::new();
    let with_head = |body: &[u8]| [HEAD.as_bytes(), b"\r\n", body].concat();
    let every_octet: Vec<u8> = (0..=255).filter(|octet| !matches!(octet, b'\r' | b'\n')).collect();
    let long_header = format!("{HEAD}X-Long: {}\r\n\r\nbody\r\n", "x".repeat(150_000));
    let folded = format!("{HEAD}X-Folded: one\r\n\ttwo  \r\n   three\r\n\r\nbody\r\n");
    let contents = [
        with_head(b""),
        with_head(b".\r\n"),
        with_head(b"..\r\n.x\r\n...\r\n.\r\n\r\n.\r\n"),
        with_head(b".\r\n".repeat(3_000).as_slice()),
        with_head(b"\r\n\r\n\r\n"),
        with_head(b"trailing blanks  \t \r\n \r\n\t\r\n"),
        with_head(b"From the start\r\n>From\r\n"),
        with_head("naïve ✓ 漢字\r\n".as_bytes()),
        with_head(b"caf\xe9 \xff\xfe\x80\r\n"),
        with_head(&[&every_octet[..], b"\r\n"].concat()),
        with_head(&[&vec![b'x'; 998][..], b"\r\n"].concat()),
        with_head(&[&vec![b'x'; 200_000][..], b"\r\n", &vec![b'.'; 70_000], b"\r\n"].concat()),
        with_head(b"a tail\r\nthat looks like the end\r\n.\t\r\n. \r\n"),
        HEAD.as_bytes().to_vec(),
        long_header.into_bytes(),
        folded.into_bytes(),
        // No header at all.
        b"\r\nbody alone\r\n".to_vec(),
        b"not a header line\r\n\r\nbody\r\n".to_vec(),
        b"\r\n".to_vec(),
        Vec::new(),
    ];
    for content in &contents {
        same(&way.data(content), content);
    }
    for content in &contents {
        for size in [1_000, 1_000_000] {
            same(&way.bdat(content, size), content);
        }
    }
    way.end();
}

#[test]
fn contents_arrive_octet_for_octet_at_every_cut_of_the_chunks() {
    let mut way = Way::new();
    let content = format!("{HEAD}\r\n.a\r\n..\r\nb\0c\r\n.\r\n");
    for size in [1, 2, 3, 5, 7, 11] {
        same(&way.bdat(content.as_bytes(), size), content.as_bytes());
    }
    way.end();
}

/// DATA at the other side ends the last line; nothing else is added.
#[test]
fn a_last_line_without_its_end_gets_one() {
    let mut way = Way::new();
    for body in ["no end", ".", "", "a\r\n."] {
        let content = format!("{HEAD}\r\n{body}");
        let ended = match content.ends_with("\r\n") {
            true => content.clone(),
            false => format!("{content}\r\n"),
        };
        same(&way.bdat(content.as_bytes(), 1_000), ended.as_bytes());
    }
    way.end();
}

/// R11: no lone CR or LF ever leaves.
#[test]
fn lone_cr_and_lf_are_made_whole() {
    let mut way = Way::new();
    for (body, arrives) in [
        ("one\ntwo\r\n", "one\r\ntwo\r\n"),
        ("one\rtwo\r\n", "one two\r\n"),
        ("one\n.\ntwo\r\n", "one\r\n.\r\ntwo\r\n"),
        ("one\n.\r\ntwo\r\n", "one\r\n.\r\ntwo\r\n"),
        ("one\r.\rtwo\r\n", "one . two\r\n"),
        ("one\r\r\ntwo\r\n", "one \r\ntwo\r\n"),
        ("one\n\r\ntwo\r\n", "one\r\n\r\ntwo\r\n"),
        ("\n\n\n\r\n", "\r\n\r\n\r\n\r\n"),
    ] {
        let content = format!("{HEAD}\r\n{body}");
        let arrives = format!("{HEAD}\r\n{arrives}");
        same(&way.bdat(content.as_bytes(), 1_000), arrives.as_bytes());
        same(&way.bdat(content.as_bytes(), 1), arrives.as_bytes());
    }
    // The same by DATA, where a client stuffs dots only after CRLF.
    let content = format!("{HEAD}\r\none\n.\ntwo\rthree\r\n");
    let mut client = Client::hello(way.gateway.smtp());
    client.command("MAIL FROM:<a@example.com>", 250);
    client.command("RCPT TO:<b@example.org>", 250);
    client.command("DATA", 354);
    client.send(format!("{content}.\r\n"));
    client.expect(250);
    drop(client);
    same(&way.next(), format!("{HEAD}\r\none\r\n.\r\ntwo three\r\n").as_bytes());
    way.end();
}

/// Larger than what the log of the spool takes: it has a file of its own.
#[test]
fn a_large_content_arrives_octet_for_octet_also_after_a_restart() {
    let mut content = format!("{HEAD}\r\n").into_bytes();
    let mut seed = 1_u32;
    while content.len() < 2_000_000 {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        content.extend_from_slice(format!(".{seed} \u{e9}\r\n").as_bytes());
    }
    let spool = tempfile::tempdir().unwrap();
    let gateway = Setup::none("hold").spool(spool.path()).start();
    let mut client = Client::hello(gateway.smtp());
    client.mail("a@example.com", &["b@example.org"], &content);
    drop(client);
    gateway.stop();
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).spool(spool.path()).start();
    Client::hello(gateway.smtp()).mail("c@example.com", &["d@example.org"], &content);
    for taken in sink.wait(2) {
        same(&taken, &content);
    }
    gateway.wait_empty();
    gateway.stop();
}

#[test]
fn a_content_over_the_limit_is_refused_however_it_comes() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let mut client = Client::hello(gateway.smtp());
    client.command("MAIL FROM:<a@example.com> SIZE=40000000", 552);
    // Not declared: it is read to its end, and refused.
    client.command("MAIL FROM:<a@example.com>", 250);
    client.command("RCPT TO:<b@example.org>", 250);
    client.command("DATA", 354);
    let line = [vec![b'x'; 9_998], b"\r\n".to_vec()].concat();
    let content = line.repeat(4_000);
    client.send(stuffed(&content));
    client.expect(552);
    // The connection is good for one that fits.
    client.mail("a@example.com", &["b@example.org"], format!("{HEAD}\r\nsmall\r\n"));
    sink.wait(1);
    gateway.wait_empty();
    drop(client);
    gateway.stop();
    assert_eq!(sink.taken().len(), 1);
}

/// R12.
#[test]
fn odd_addresses_arrive_as_they_were_written() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let mut client = Client::hello(gateway.smtp());
    let cases: &[(&str, &[&str])] = &[
        ("", &["Postmaster"]),
        ("\"two words\"@example.com", &["\"a@b\"@example.org", "\"quote\\\"d\"@example.org"]),
        ("o'brien+tag@[192.0.2.1]", &["x@[IPv6:2001:db8::1]", "\"\"@example.org"]),
        ("a=b%c!d@example.com", &["user%host@example.org", "a!b@example.org"]),
        ("Mixed.Case@Example.COM", &["B@EXAMPLE.org"]),
    ];
    for (n, (from, to)) in cases.iter().enumerate() {
        client.mail(from, to, format!("{HEAD}\r\nhello\r\n"));
        let taken = sink.wait(n + 1).remove(n);
        assert_eq!(taken.from, *from);
        assert_eq!(taken.to, *to);
    }
    client.command("MAIL FROM:<jörg@bücher.example> SMTPUTF8", 250);
    client.command("RCPT TO:<用户@例子.example>", 250);
    client.command("RCPT TO:<\"ü ü\"@example.org>", 250);
    client.command("DATA", 354);
    client.send(stuffed("Subject: grüße\r\n\r\nhello\r\n".as_bytes()));
    id(&client.expect(250));
    let taken = sink.wait(cases.len() + 1).remove(cases.len());
    assert_eq!(taken.from, "jörg@bücher.example");
    assert_eq!(taken.to, ["用户@例子.example", "\"ü ü\"@example.org"]);
    gateway.wait_empty();
    drop(client);
    gateway.stop();
}

#[test]
fn many_messages_of_many_clients_arrive_each_once() {
    const CLIENTS: usize = 8;
    const MESSAGES: usize = 500;
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let content =
        |n: usize| format!("Subject: {n}\r\n\r\n{}", format!("line of {n}\r\n").repeat(n));
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let address = gateway.smtp();
            scope.spawn(move || {
                let mut connection = Client::hello(address);
                for n in (client..MESSAGES).step_by(CLIENTS) {
                    let (from, to) = (format!("m{n}@example.com"), format!("r{n}@example.org"));
                    connection.mail(&from, &[&to, "all@example.org"], content(n));
                }
            });
        }
    });
    sink.wait(MESSAGES);
    gateway.wait_empty();
    assert_eq!(gateway.metric("mailsluice_messages_accepted_total"), 500.0);
    assert_eq!(gateway.metric("mailsluice_recipients_total{outcome=\"delivered\"}"), 1_000.0);
    gateway.stop();
    let taken = sink.taken();
    let mut seen = BTreeSet::new();
    for taken in &taken {
        let n = taken.from.strip_prefix('m').unwrap().strip_suffix("@example.com").unwrap();
        let n: usize = n.parse().unwrap();
        assert_eq!(taken.to, [format!("r{n}@example.org"), "all@example.org".to_owned()]);
        same(taken, content(n).as_bytes());
        assert!(seen.insert(n), "{n} came twice");
    }
    assert_eq!(seen.len(), MESSAGES);
}
