//! The sender policy, from the client to the upstream.

use crate::support::client::Client;
use crate::support::gateway::Setup;
use crate::support::sink::{Answer, Sink, Taken};

const REST: &str = "Message-ID: <1@x>\r\nDate: Tue, 24 Nov 2026 06:42:11 +0000\r\nSubject: caf\u{e9}\r\n\r\nFrom: body@old.example\r\n.\r\n";

fn setup(sink: &Sink, policy: &str) -> Setup {
    Setup::to(sink.address)
        .set("sender", &format!("policy = \"{policy}\""))
        .set("sender", "allowed = [\"*@scan.example.com\"]")
        .set("provider", "sender = \"reports@example.com\"")
        .set("provider", "sender_name = \"Reports\"")
}

/// What the sink took, without Received, and its reverse path.
#[track_caller]
fn sent(setup: &Setup, sink: &Sink, from: &str, header: &str) -> (String, String) {
    let gateway = setup.start();
    let content = format!("{header}{REST}");
    Client::hello(gateway.smtp()).mail(from, &["b@example.org"], &content);
    let taken = sink.wait(1).remove(0);
    gateway.wait_empty();
    gateway.stop();
    let declared = taken.mail_line.split("SIZE=").nth(1).unwrap().split(' ').next().unwrap();
    assert_eq!(declared.parse::<usize>().unwrap(), taken.content.len(), "{}", taken.mail_line);
    (taken.from.clone(), String::from_utf8(taken.original().to_vec()).unwrap())
}

#[test]
fn readers_see_the_providers_sender() {
    let sink = Sink::new();
    let header = "From: \"Backup, nightly\" <app@old.example>\r\nSender: root@old.example\r\n";
    let (from, text) = sent(&setup(&sink, "rewrite"), &sink, "app@old.example", header);
    assert_eq!(from, "reports@example.com");
    assert_eq!(
        text,
        format!(
            "From: \"Backup, nightly\" <reports@example.com>\r\nReply-To: \"Backup, nightly\" <app@old.example>\r\n{REST}"
        )
    );
}

#[test]
fn rewrite_is_what_holds_where_nothing_is_written() {
    let sink = Sink::new();
    let unwritten = Setup::to(sink.address)
        .set("provider", "sender = \"reports@example.com\"")
        .unset("sender", "policy");
    let (from, text) = sent(&unwritten, &sink, "app@old.example", "");
    assert_eq!(
        (from.as_str(), text),
        ("reports@example.com", format!("From: reports@example.com\r\n{REST}"))
    );
}

#[test]
fn an_allowed_from_stands_and_keeps_an_allowed_reverse_path() {
    let sink = Sink::new();
    let header = "From: Scanner <3@scan.example.com>\r\nSender: 4@scan.example.com\r\n";
    let (from, text) = sent(&setup(&sink, "rewrite"), &sink, "5@scan.example.com", header);
    assert_eq!((from.as_str(), text), ("5@scan.example.com", format!("{header}{REST}")));
}

#[test]
fn an_application_with_the_right_from_may_have_any_reverse_path() {
    let sink = Sink::new();
    let header = "From: Cron <reports@example.com>\r\n";
    let (from, text) = sent(&setup(&sink, "rewrite"), &sink, "www-data@host.local", header);
    assert_eq!((from.as_str(), text), ("reports@example.com", format!("{header}{REST}")));
}

#[test]
fn preserve_changes_nothing() {
    let sink = Sink::new();
    let header = "From: app@old.example\r\nFrom: again@old.example\r\nSender: x@old.example\r\n";
    let (from, text) = sent(&setup(&sink, "preserve"), &sink, "app@old.example", header);
    assert_eq!((from.as_str(), text), ("app@old.example", format!("{header}{REST}")));
}

#[test]
fn a_null_reverse_path_stays_null() {
    let sink = Sink::new();
    let header = "From: MAILER-DAEMON\r\n";
    let (from, text) = sent(&setup(&sink, "rewrite"), &sink, "", header);
    assert_eq!(from, "");
    assert!(text.starts_with("From: MAILER-DAEMON <reports@example.com>\r\nMessage-ID"), "{text}");
}

#[test]
fn reject_says_why_and_stores_nothing() {
    let sink = Sink::new();
    let gateway = setup(&sink, "reject").start();
    let mut client = Client::hello(gateway.smtp());
    for (header, why) in [
        (
            "From: Ann <ann@old.example>\r\n",
            "The From address <ann@old.example> is not one that may send here",
        ),
        ("From: 3@scan.example.com\r\nFrom: 3@scan.example.com\r\n", "more than one From"),
        ("From: root\r\n", "(\"root\") is not a mail address"),
        ("", "This message has no From"),
    ] {
        client.command("MAIL FROM:<reports@example.com>", 250);
        client.command("RCPT TO:<b@example.org>", 250);
        client.command("DATA", 354);
        client.send(format!("{header}Subject: x\r\n\r\nbody\r\n.\r\n"));
        let reply = client.expect(550);
        assert!(reply.contains("5.7.60") && reply.contains(why), "{reply}");
        assert!(reply.contains("<reports@example.com>"), "{reply}");
    }
    // The same connection may still send what may be sent; the envelope does not matter.
    client.mail("app@old.example", &["b@example.org"], "From: REPORTS@example.com\r\n\r\n");
    client.mail("app@old.example", &["b@example.org"], "From: A <3@Scan.Example.com>\r\n\r\n");
    let taken = sink.wait(2);
    assert!(taken.iter().all(|taken| taken.from == "app@old.example"));
    // They may arrive in any order.
    let is_first = |taken: &Taken| taken.text().contains("\r\nFrom: REPORTS@example.com\r\n");
    assert_eq!(taken.iter().filter(|taken| is_first(taken)).count(), 1);
    gateway.wait_empty();
    gateway.wait_event("refused", |event| event["reason"] == "sender");
    assert_eq!(gateway.metric("mailsluice_messages_refused_total{reason=\"sender\"}"), 4.0);
    gateway.stop();
    assert_eq!(sink.count(), 2);
}

#[test]
fn every_attempt_sends_the_same_octets() {
    // Deferred after the dot; then the kept connection is closed under the next message.
    let seen = std::sync::Arc::new(std::sync::Mutex::new(0));
    let count = std::sync::Arc::clone(&seen);
    let sink = Sink::scripted(move |ask| {
        if !ask.is_content() {
            return Answer::Usual;
        }
        let mut count = count.lock().unwrap();
        *count += 1;
        match *count {
            1 | 3 => Answer::reply("451 4.3.0 not now"),
            2 => Answer::TakeAndDrop,
            _ => Answer::Usual,
        }
    });
    let gateway = setup(&sink, "rewrite").start();
    let content = format!("From: App <app@old.example>\r\n{REST}");
    Client::hello(gateway.smtp()).mail("app@old.example", &["b@example.org"], &content);
    let taken = sink.wait(2);
    gateway.wait_empty();
    gateway.stop();
    assert!(taken[0].content == taken[1].content);
    assert_eq!(
        (taken[0].from.as_str(), taken[1].from.as_str()),
        ("reports@example.com", "reports@example.com")
    );
    assert!(
        taken[1]
            .text()
            .contains("\r\nFrom: App <reports@example.com>\r\nReply-To: App <app@old.example>\r\n")
    );
}

#[test]
fn a_message_is_whole_on_the_connection_that_takes_the_place_of_a_closed_one() {
    let sink = Sink::scripted(|ask| match (ask.is("MAIL"), ask.mails) {
        (true, 2) => Answer::Drop,
        _ => Answer::Usual,
    });
    let gateway = setup(&sink, "rewrite").start();
    let content = format!("From: App <app@old.example>\r\n{REST}");
    let mut client = Client::hello(gateway.smtp());
    client.mail("app@old.example", &["b@example.org"], &content);
    sink.wait(1);
    gateway.wait_empty();
    client.mail("app@old.example", &["b@example.org"], &content);
    let taken = sink.wait(2);
    gateway.wait_empty();
    gateway.stop();
    assert_eq!(
        String::from_utf8_lossy(taken[0].original()),
        String::from_utf8_lossy(taken[1].original())
    );
    assert_eq!(sink.connections(), 2);
}

#[test]
fn a_message_that_lies_in_a_file_is_rewritten_too() {
    let sink = Sink::new();
    let body = "line\r\n".repeat(400_000);
    let header = "From: App <app@old.example>\r\nX: y\r\n";
    let gateway = setup(&sink, "rewrite").start();
    let content = format!("{header}{REST}{body}");
    Client::hello(gateway.smtp()).mail("app@old.example", &["b@example.org"], &content);
    let taken = sink.wait(1).remove(0);
    gateway.wait_empty();
    gateway.stop();
    let expected = format!(
        "From: App <reports@example.com>\r\nReply-To: App <app@old.example>\r\nX: y\r\n{REST}{body}"
    );
    assert!(taken.original() == expected.as_bytes());
}
