//! Reports to senders and to the postmaster, as they arrive at the upstream.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mailsluice::config;
use mailsluice::spool::log::Log;
use mailsluice::spool::{Durability, Op, Spool as _};
use serde_json::Value;

use crate::support::client::Client;
use crate::support::eventually;
use crate::support::gateway::{Gateway, Setup};
use crate::support::sink::{Answer, Ask, EXTENSIONS, Sink, Taken};

const CONTENT: &str = "From: app@example.com\r\nSubject: Monthly figures\r\nMessage-ID: <1@app.test>\r\nDate: Tue, 24 Nov 2026 06:42:11 +0000\r\n\r\nThe secret body.\r\n";

/// Refuses who is called `no`, defers who is called `later`.
fn picky(ask: &Ask<'_>) -> Answer {
    match ask {
        ask if ask.is("RCPT TO:<no") => Answer::reply("550 5.1.1 no such user here"),
        ask if ask.is("RCPT TO:<later") => Answer::reply("450 4.2.1 mailbox busy"),
        _ => Answer::Usual,
    }
}

fn with_postmaster(sink: &Sink) -> Setup {
    Setup::to(sink.address)
        .set("bounce", "to = \"sender\"")
        .set("bounce", "postmaster = \"ops@example.net\"")
}

/// What Python's `email` makes of a message: a list of its parts, each with its type, its header fields and its text.
#[track_caller]
fn parsed(taken: &Taken) -> Value {
    let program = "\
import email, json, sys
from email import policy
message = email.message_from_bytes(sys.stdin.buffer.read(), policy=policy.default)
assert not message.defects, message.defects
out = []
for part in message.walk():
    text = '' if part.is_multipart() else part.get_content()
    text = text if isinstance(text, str) else text.decode('ascii')
    fields = {name.lower(): str(value) for name, value in part.items()}
    out.append({'type': part.get_content_type(), 'fields': fields, 'text': text})
print(json.dumps(out))";
    let mut python = Command::new("python3")
        .args(["-c", program])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    python.stdin.take().unwrap().write_all(&taken.content).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", taken.text());
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The reports among what was taken, once there are that many.
#[track_caller]
fn reports(sink: &Sink, n: usize) -> Vec<Taken> {
    let is_report = |taken: &Taken| taken.text().contains("Auto-Submitted: auto-");
    eventually("the reports", || {
        let reports: Vec<Taken> = sink.taken().into_iter().filter(is_report).collect();
        (reports.len() >= n).then_some(reports)
    })
}

/// Everything has come to its end, and so many reports went out.
#[track_caller]
fn end(gateway: Gateway, sink: &Sink, n: usize) {
    gateway.wait_empty();
    gateway.stop();
    assert_eq!(reports(sink, n).len(), n);
}

#[test]
fn a_failure_of_one_of_two_is_one_report_to_the_sender() {
    let sink = Sink::scripted(picky);
    let gateway = with_postmaster(&sink).start();
    let mut client = Client::hello(gateway.smtp());
    client.command("MAIL FROM:<app@example.com> ENVID=QQ+2B1", 250);
    client.command("RCPT TO:<no@example.org> ORCPT=rfc822;old@example.org", 250);
    client.command("RCPT TO:<b@example.org>", 250);
    client.command("DATA", 354);
    client.send(format!("{CONTENT}.\r\n"));
    client.expect(250);
    let report = reports(&sink, 1).remove(0);
    assert_eq!((report.from.as_str(), &report.to[..]), ("", &["app@example.com".to_owned()][..]));
    assert!(report.rcpt_lines[0].contains("NOTIFY=NEVER"), "{:?}", report.rcpt_lines);
    let parts = parsed(&report);
    let types: Vec<&str> =
        parts.as_array().unwrap().iter().map(|part| part["type"].as_str().unwrap()).collect();
    assert_eq!(types[..3], ["multipart/report", "text/plain", "message/delivery-status"]);
    let fields = &parts[0]["fields"];
    assert_eq!(fields["auto-submitted"], "auto-replied");
    assert_eq!(fields["in-reply-to"], "<1@app.test>");
    let text = parts[1]["text"].as_str().unwrap();
    assert!(text.contains("127.0.0.1 answered: 550 5.1.1 no such user here"), "{text}");
    assert_eq!(parts[3]["fields"]["original-envelope-id"], "QQ+1");
    let rcpt = &parts[4]["fields"];
    assert_eq!(rcpt["original-recipient"], "rfc822;old@example.org");
    assert_eq!(rcpt["final-recipient"], "rfc822;no@example.org");
    assert_eq!((&rcpt["action"], &rcpt["status"]), (&"failed".into(), &"5.1.1".into()));
    let returned = parts.as_array().unwrap().last().unwrap();
    assert_eq!(returned["type"], "text/rfc822-headers");
    assert!(returned["text"].as_str().unwrap().contains("Subject: Monthly figures"));
    assert!(!report.text().contains("secret body"));
    assert_eq!(gateway.metric("mailsluice_reports_total{kind=\"failure\"}"), 1.0);
    gateway.wait_event("reported", |event| event["kind"] == "failure");
    end(gateway, &sink, 1);
}

#[test]
fn who_wants_no_report_gets_none() {
    let sink = Sink::scripted(picky);
    let gateway = with_postmaster(&sink).start();
    for notify in ["NEVER", "SUCCESS,DELAY"] {
        let mut client = Client::hello(gateway.smtp());
        client.command("MAIL FROM:<app@example.com>", 250);
        client.command(&format!("RCPT TO:<no@example.org> NOTIFY={notify}"), 250);
        client.command("DATA", 354);
        client.send(format!("{CONTENT}.\r\n"));
        client.expect(250);
    }
    eventually("both to fail", || {
        (gateway.metric("mailsluice_recipients_total{outcome=\"failed\"}") == 2.0).then_some(())
    });
    end(gateway, &sink, 0);
}

#[test]
fn a_delay_is_told_once() {
    let sink = Sink::scripted(|ask| match ask.mails {
        // The third try passes; the report is the third or the fourth of all.
        0..=4 => picky(ask),
        _ => Answer::Usual,
    });
    let gateway = with_postmaster(&sink).set("bounce", "delay_warning_after = \"50ms\"").start();
    Client::hello(gateway.smtp()).mail("app@example.com", &["later@example.org"], CONTENT);
    let report = reports(&sink, 1).remove(0);
    let parts = parsed(&report);
    assert_eq!(parts[4]["fields"]["action"], "delayed");
    assert_eq!(parts[4]["fields"]["diagnostic-code"], "smtp; 450 4.2.1 mailbox busy");
    assert!(parts[4]["fields"]["will-retry-until"].is_string());
    end(gateway, &sink, 1);
    assert_eq!(sink.taken().len(), 2);
}

#[test]
fn a_server_without_dsn_makes_us_say_that_mail_was_handed_on() {
    for (extensions, n) in [(&["PIPELINING"][..], 1), (EXTENSIONS, 0)] {
        let sink = Sink::with(extensions, picky);
        let gateway = with_postmaster(&sink).start();
        let mut client = Client::hello(gateway.smtp());
        client.command("MAIL FROM:<app@example.com>", 250);
        client.command("RCPT TO:<b@example.org> NOTIFY=SUCCESS", 250);
        client.command("RCPT TO:<c@example.org>", 250);
        client.command("DATA", 354);
        client.send(format!("{CONTENT}.\r\n"));
        client.expect(250);
        for report in reports(&sink, n) {
            let parts = parsed(&report);
            assert_eq!(parts[4]["fields"]["action"], "relayed");
            assert_eq!(parts[4]["fields"]["final-recipient"], "rfc822;b@example.org");
        }
        sink.wait(1 + n);
        end(gateway, &sink, n);
    }
}

#[test]
fn where_the_sender_cannot_be_told_the_postmaster_is() {
    let sink = Sink::scripted(picky);
    let gateway = with_postmaster(&sink).start();
    let mut client = Client::hello(gateway.smtp());
    for from in ["", "root@host", "root@host.local", "no@example.org"] {
        client.mail(from, &["no@example.org"], CONTENT);
    }
    for report in reports(&sink, 4) {
        assert_eq!(report.to, ["ops@example.net"]);
    }
    // A report that fails goes to the postmaster, whole; and is not kept.
    client.mail("no.sender@example.com", &["no@example.org"], CONTENT);
    let report = reports(&sink, 5).remove(4);
    assert_eq!(report.to, ["ops@example.net"]);
    let parts = parsed(&report);
    assert_eq!(parts[4]["fields"]["final-recipient"], "rfc822;no.sender@example.com");
    assert!(report.text().contains("Content-Type: message/rfc822"), "{}", report.text());
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"failed\"}"), 5.0);
    end(gateway, &sink, 5);
}

#[test]
fn a_notice_that_fails_is_dropped() {
    let sink = Sink::scripted(|ask| match ask.is("RCPT") {
        true => Answer::reply("550 5.1.1 nobody here"),
        false => Answer::Usual,
    });
    let gateway = with_postmaster(&sink).start();
    Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], CONTENT);
    eventually("the message, its report and the notice to fail", || {
        (gateway.metric("mailsluice_recipients_total{outcome=\"failed\"}") == 3.0).then_some(())
    });
    gateway.wait_empty();
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"failed\"}"), 1.0);
    assert_eq!(gateway.metric("mailsluice_reports_total{kind=\"failure\"}"), 2.0);
    end(gateway, &sink, 0);
}

#[test]
fn beyond_the_limit_the_postmaster_gets_a_list_that_survives_a_kill() {
    let sink = Sink::scripted(picky);
    let setup = with_postmaster(&sink).set("bounce", "max_per_hour = 2");
    let spool = tempfile::tempdir().unwrap();
    let setup = setup.spool(&spool.path().join("spool"));
    let gateway = setup.start();
    let mut client = Client::hello(gateway.smtp());
    let ids: Vec<String> =
        (0..5).map(|_| client.mail("app@example.com", &["no@example.org"], CONTENT)).collect();
    reports(&sink, 2);
    for _ in 0..3 {
        gateway.wait_event("listed", |_| true);
    }
    eventually("all to fail", || {
        (gateway.metric("mailsluice_recipients_total{outcome=\"failed\"}") == 5.0).then_some(())
    });
    gateway.wait_empty();
    gateway.kill();
    an_hour_passes(&spool.path().join("spool"));
    let gateway = setup.start();
    let digest = reports(&sink, 3).remove(2);
    assert_eq!(digest.to, ["ops@example.net"]);
    let text = parsed(&digest)[0]["text"].as_str().unwrap().to_owned();
    let listed = ids.iter().filter(|id| text.contains(*id)).count();
    assert_eq!(listed, 3, "{text}");
    assert!(text.contains("550 5.1.1 no such user here"), "{text}");
    end(gateway, &sink, 3);
    let gateway = setup.start();
    end(gateway, &sink, 3);
}

/// The list says that it was begun an hour earlier.
fn an_hour_passes(spool: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let keep_failed = Duration::from_secs(7 * 24 * 60 * 60);
        let config = config::Spool { path: spool.to_owned(), min_free: 0, keep_failed };
        let (log, _) = Log::open(&config).await.unwrap();
        let key = "report/a/since";
        let since: u64 = String::from_utf8(log.note(key).unwrap()).unwrap().parse().unwrap();
        let bytes = (since - 3_600_000).to_string().into_bytes();
        log.apply(vec![Op::Note { key: key.into(), bytes }], Durability::Durable).await.unwrap();
        log.close().await;
    });
}

/// The record of the failure and the report are one batch: however the process ends, both are there or none, and then
/// the message is tried again.
#[test]
fn a_kill_right_after_a_failure_loses_no_report_and_doubles_none() {
    for _ in 0..5 {
        let sink = Sink::scripted(picky);
        let spool = tempfile::tempdir().unwrap();
        let setup = with_postmaster(&sink).spool(&spool.path().join("spool"));
        let gateway = setup.start();
        let mut client = Client::hello(gateway.smtp());
        for _ in 0..5 {
            client.mail("app@example.com", &["no@example.org"], CONTENT);
        }
        gateway.wait_event("failed", |_| true);
        gateway.kill();
        let gateway = setup.start();
        // A report that was on its way when the process was killed is in doubt, and may come twice.
        reports(&sink, 5);
        gateway.wait_empty();
        let in_doubt = gateway.metric("mailsluice_in_doubt_total");
        gateway.stop();
        let ids: std::collections::BTreeSet<String> =
            reports(&sink, 5).iter().map(message_id).collect();
        assert_eq!(ids.len(), 5);
        let came = sink.taken().len();
        assert!(came >= 5 && came as f64 <= 5.0 + in_doubt, "{came} with {in_doubt} in doubt");
    }
}

fn message_id(report: &Taken) -> String {
    let text = report.text();
    let line = text.lines().find(|line| line.starts_with("Message-ID: ")).unwrap();
    line.to_owned()
}

#[test]
fn a_report_refused_for_its_null_reverse_path_goes_once_more_from_the_providers_sender() {
    // Postfix says it where a recipient is named.
    for (asked, reply) in [
        ("MAIL", "550 5.7.60 client may not send as this sender"),
        ("RCPT", "554 5.7.1 <>: Sender address rejected: Access denied"),
    ] {
        let sink = Sink::scripted(move |ask| {
            let is_null = ask.is("MAIL FROM:<>") || (ask.is("RCPT") && ask.from.is_empty());
            match is_null && ask.is(asked) {
                true => Answer::reply(reply),
                false => picky(ask),
            }
        });
        let gateway = with_postmaster(&sink).set("provider", "sender = \"r@example.com\"").start();
        Client::hello(gateway.smtp()).mail("app@example.com", &["no@example.org"], CONTENT);
        let report = reports(&sink, 1).remove(0);
        assert_eq!(
            (report.from.as_str(), &report.to[..]),
            ("r@example.com", &["app@example.com".to_owned()][..])
        );
        // It is no trouble of the provider's, so nobody waits for it.
        assert_eq!(gateway.metric("mailsluice_provider_open"), 1.0);
        end(gateway, &sink, 1);
    }
}

#[test]
fn an_outage_is_one_notice_though_the_gateway_was_killed_meanwhile() {
    let works = Arc::new(AtomicBool::new(false));
    let open = Arc::clone(&works);
    let sink = Sink::scripted(move |ask| match ask.is_greeting() && !open.load(Ordering::SeqCst) {
        true => Answer::reply("554 5.3.2 we are closed"),
        false => Answer::Usual,
    });
    let spool = tempfile::tempdir().unwrap();
    let setup = with_postmaster(&sink)
        .set("bounce", "delay_warning_after = \"100ms\"")
        .spool(&spool.path().join("spool"));
    let gateway = setup.start();
    let mut client = Client::hello(gateway.smtp());
    for _ in 0..3 {
        client.mail("app@example.com", &["b@example.org"], CONTENT);
    }
    gateway.wait_event("reported", |event| event["kind"] == "notice");
    gateway.kill();
    works.store(true, Ordering::SeqCst);
    let gateway = setup.start();
    gateway.wait_event("reported", |event| event["kind"] == "notice");
    let last = reports(&sink, 1).remove(0);
    assert!(last.text().contains("Mail flows again"), "{}", last.text());
    assert_eq!(last.to, ["ops@example.net"]);
    let text = parsed(&last)[0]["text"].as_str().unwrap().to_owned();
    assert!(text.contains("554 5.3.2 we are closed"), "{text}");
    end(gateway, &sink, 1);
    assert_eq!(sink.taken().len(), 4);
}
