//! The queue, for operators: by the commands, and by HTTP on the admin socket.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::gateway::{BINARY, Gateway, Setup};
use crate::support::sink::{Answer, Sink};
use crate::support::{PATIENCE, eventually};

const FROM: &str = "anna@example.com";
const CONTENT: &str = "From: anna@example.com\r\nMessage-ID: <1@x>\r\nDate: Tue, 24 Nov 2026 06:42:11 +0000\r\n\r\nhello\r\n";

/// A sink that refuses for now, until it is told otherwise.
fn reluctant(words: &'static str) -> (Sink, Arc<AtomicBool>) {
    let willing = Arc::new(AtomicBool::new(false));
    let is_willing = Arc::clone(&willing);
    let sink =
        Sink::scripted(move |ask| match ask.is("RCPT") && !is_willing.load(Ordering::SeqCst) {
            true => Answer::reply(words),
            false => Answer::Usual,
        });
    (sink, willing)
}

/// A gateway that tries again only when it is told to.
fn patient(sink: &Sink) -> Setup {
    Setup::to(sink.address).set("retry", "first = \"1h\"").set("retry", "max = \"1h\"")
}

fn command(gateway: &Gateway, words: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    let config = gateway.folder().join("mailsluice.toml");
    command.args(words).arg("--config").arg(config).env_remove("MAILSLUICE_CONFIG");
    command
}

fn run(gateway: &Gateway, words: &[&str]) -> (i32, String, String) {
    said(&command(gateway, words).output().unwrap())
}

fn said(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// What a command prints that must succeed.
#[track_caller]
fn well(gateway: &Gateway, words: &[&str]) -> String {
    let (code, out, err) = run(gateway, words);
    assert_eq!((code, err.as_str()), (0, ""), "{words:?}: {out}");
    out
}

/// The messages that a filter takes, as JSON.
#[track_caller]
fn listed(gateway: &Gateway, filter: &[&str]) -> Vec<Value> {
    let words = [&["queue", "list", "--json"], filter].concat();
    let out = well(gateway, &words);
    assert!(out.is_ascii());
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn ids(messages: &[Value]) -> Vec<&str> {
    messages.iter().map(|message| message["id"].as_str().unwrap()).collect()
}

fn send(gateway: &Gateway, from: &str, to: &[&str]) -> String {
    Client::hello(gateway.smtp()).mail(from, to, CONTENT)
}

/// Accepted, and deferred once.
fn deferred(gateway: &Gateway, from: &str, to: &[&str]) -> String {
    let id = send(gateway, from, to);
    eventually("the deferral to be written", || {
        let (_, out, _) = run(gateway, &["queue", "show", "--json", &id]);
        let story: Value = serde_json::from_str(&out).ok()?;
        (story["state"] == "deferred").then_some(())
    });
    id
}

fn socket(gateway: &Gateway) -> PathBuf {
    gateway.folder().join("spool/admin.sock")
}

/// One request on the socket, as any client would make it.
fn http(gateway: &Gateway, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket(gateway)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.0\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[test]
fn a_deferred_message_is_listed_shown_and_retried() {
    let (sink, willing) = reluctant("450 4.2.1 mailbox busy \x07 now");
    let gateway = patient(&sink).start();
    let id = deferred(&gateway, FROM, &["bob@example.org", "carl@example.org"]);
    let messages = listed(&gateway, &[]);
    assert_eq!(ids(&messages), [&id]);
    let message = &messages[0];
    assert_eq!((&message["state"], &message["attempts"]), (&json!("deferred"), &json!(1)));
    assert_eq!(message["to"], json!(["bob@example.org", "carl@example.org"]));
    let table = well(&gateway, &["queue", "list"]);
    assert!(table.contains(&format!("{id}  deferred ")), "{table}");
    assert!(
        table.contains("<anna@example.com> -> <bob@example.org>, <carl@example.org>\n"),
        "{table}"
    );
    let story = well(&gateway, &["queue", "show", &id]);
    for words in [
        "accepted   20",
        " from 127.0.0.1, which called itself client.test\n",
        "from       <anna@example.com>\n",
        "to         <bob@example.org> pending: 450 4.2.1 mailbox busy \\x07 now (rcpt)\n",
        "attempts   1\n",
        "next       it is tried again at 20",
    ] {
        assert!(story.contains(words), "{words}\n{story}");
    }
    assert!(!story.contains('\x07') && !table.contains('\x07'));

    willing.store(true, Ordering::SeqCst);
    assert_eq!(well(&gateway, &["queue", "retry", &id]), "retry: 1 message done\n");
    let taken = sink.wait(1).remove(0);
    assert_eq!(taken.to, ["bob@example.org", "carl@example.org"]);
    gateway.wait_empty();
    gateway.wait_event("retried", |event| event["id"] == id.as_str());
    assert_eq!(well(&gateway, &["queue", "list"]), "no messages\n");
    let (code, _, err) = run(&gateway, &["queue", "retry", &id]);
    assert_eq!((code, err), (66, format!("{id}: no such message\n")));
    let (code, out, err) = run(&gateway, &["queue", "show", &id]);
    assert_eq!((code, out.as_str(), err), (66, "", format!("no message {id} in the spool\n")));
    gateway.stop();
}

#[test]
fn what_is_held_waits_and_what_is_released_goes() {
    let (sink, willing) = reluctant("450 later");
    let gateway = patient(&sink).start();
    let id = deferred(&gateway, FROM, &["bob@example.org"]);
    assert_eq!(well(&gateway, &["queue", "hold", &id]), "hold: 1 message done\n");
    willing.store(true, Ordering::SeqCst);
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"held\"}"), 1.0);
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"queued\"}"), 0.0);
    let (code, _, err) = run(&gateway, &["queue", "hold", &id]);
    assert_eq!((code, err), (69, format!("{id}: it is held already\n")));
    assert_eq!(ids(&listed(&gateway, &["--state", "held"])), [&id]);
    assert!(well(&gateway, &["queue", "show", &id]).contains("nothing until `queue release`"));
    // It stays held over a restart.
    let spool = gateway.folder().join("spool");
    let folder = gateway.kill();
    let gateway = patient(&sink).spool(&folder.path().join("spool")).start();
    assert!(spool.exists());
    eventually("the held one to be counted", || {
        (gateway.metric("mailsluice_queue_messages{state=\"held\"}") == 1.0).then_some(())
    });
    let words = ["queue", "release", &id, "--socket"];
    let mut release = Command::new(BINARY);
    release.args(words).arg(folder.path().join("spool/admin.sock"));
    assert_eq!(said(&release.output().unwrap()).1, "release: 1 message done\n");
    assert_eq!(sink.wait(1)[0].to, ["bob@example.org"]);
    gateway.wait_event("released", |event| event["id"] == id.as_str());
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"held\"}"), 0.0);
    gateway.stop();
}

#[test]
fn what_has_failed_is_delivered_once_it_is_retried() {
    let (sink, willing) = reluctant("550 5.1.1 no such user");
    let gateway = patient(&sink).start();
    let id = send(&gateway, FROM, &["bob@example.org"]);
    gateway.wait_event("failed", |event| event["id"] == id.as_str());
    eventually("it to be listed as failed", || {
        (ids(&listed(&gateway, &["--state", "failed"])) == [&id]).then_some(())
    });
    let (code, _, err) = run(&gateway, &["queue", "release", &id]);
    assert_eq!((code, err), (69, format!("{id}: it has failed; `retry` queues it again\n")));
    assert!(well(&gateway, &["queue", "show", &id]).contains("550 5.1.1 no such user"));
    willing.store(true, Ordering::SeqCst);
    assert_eq!(well(&gateway, &["queue", "retry", "--state", "failed"]), "retry: 1 message done\n");
    assert_eq!(sink.wait(1)[0].original(), CONTENT.as_bytes());
    gateway.wait_empty();
    assert_eq!(well(&gateway, &["queue", "list"]), "no messages\n");
    gateway.stop();
    assert_eq!(sink.taken().len(), 1);
}

#[test]
fn filters_take_what_they_say_and_nothing_else() {
    let (sink, _) = reluctant("450 later");
    let gateway = patient(&sink).set("provider", "sender = \"lane@example.com\"").start();
    let one = deferred(&gateway, "a@one.test", &["x@example.org"]);
    let two = deferred(&gateway, "b@two.test", &["y@example.org", "z@example.net"]);
    let null = deferred(&gateway, "", &["x@example.org"]);
    well(&gateway, &["queue", "hold", &two]);
    let check = |filter: &[&str], expected: &[&String]| {
        assert_eq!(ids(&listed(&gateway, filter)), expected, "{filter:?}");
    };
    check(&[], &[&one, &two, &null]);
    check(&["--sender", "*@ONE.test"], &[&one]);
    check(&["--sender", "<>"], &[&null]);
    check(&["--recipient", "x@*"], &[&one, &null]);
    check(&["--recipient", "*.net"], &[&two]);
    check(&["--recipient", "x@*", "--sender", "*two*"], &[]);
    check(&["--state", "held"], &[&two]);
    check(&["--state", "queued"], &[&one, &null]);
    check(&["--state", "deferred"], &[&one, &null]);
    check(&["--state", "due"], &[]);
    check(&["--state", "in-flight"], &[]);
    check(&["--state", "in-doubt"], &[]);
    check(&["--state", "failed"], &[]);
    check(&["--older-than", "1h"], &[]);
    check(&["--older-than", "0s"], &[&one, &two, &null]);
    check(&["--lane", "lane@example.com"], &[&one, &two, &null]);
    check(&["--lane", "other"], &[]);
    check(&["--limit", "2"], &[&one, &two]);
    let (code, _, err) = run(&gateway, &["queue", "list", "--older-than", "soon"]);
    assert!(code == 64 && err.contains("90s, 5m, 2h or 3d"), "{err}");
    // A variable of a script that was not set.
    let (code, _, err) = run(&gateway, &["queue", "list", "--limit", "0"]);
    assert!(code == 64 && err.contains("'--limit <N>'"), "{code} {err}");
    check(&["--state", "in_flight"], &[]);
    for verb in ["list", "hold", "retry"] {
        let (code, _, err) = run(&gateway, &["queue", verb, "--sender", ""]);
        assert!(code != 0 && err.contains("a pattern of the filter is empty"), "{code} {err}");
    }
    assert_eq!(ids(&listed(&gateway, &["--state", "queued"])), [&one, &null]);
    // A page at a time, by HTTP.
    let (status, page) = http(&gateway, "GET", "/api/v1/queue?limit=2", "");
    let page: Value = serde_json::from_str(&page).unwrap();
    assert_eq!((status, page["next"].as_str()), (200, Some(two.as_str())));
    let (_, rest) = http(&gateway, "GET", &format!("/api/v1/queue?limit=2&after={two}"), "");
    let rest: Value = serde_json::from_str(&rest).unwrap();
    assert_eq!(
        (ids(rest["messages"].as_array().unwrap()), &rest["next"]),
        (vec![null.as_str()], &Value::Null)
    );

    let (code, _, err) = run(&gateway, &["queue", "delete", "--sender", "*"]);
    assert!(code == 64 && err.contains("say --yes"), "{err}");
    let (code, _, err) = run(&gateway, &["queue", "delete"]);
    assert!(code == 64 && err.contains("name messages"), "{err}");
    let (code, _, _) = run(&gateway, &["queue", "delete", &one, "--all", "--yes"]);
    assert_eq!(code, 64);
    check(&[], &[&one, &two, &null]);
    let out = well(&gateway, &["queue", "delete", "--recipient", "x@*", "--yes"]);
    assert_eq!(out, "delete: 2 messages done\n");
    gateway.wait_event("deleted", |event| event["id"] == null.as_str());
    check(&[], &[&two]);
    let out = well(&gateway, &["queue", "delete", &two, "--json"]);
    assert_eq!(
        serde_json::from_str::<Value>(&out).unwrap(),
        json!({ "id": two, "result": "done" })
    );
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"held\"}"), 0.0);
    gateway.stop();
    assert!(sink.taken().is_empty());
}

#[test]
fn a_message_that_is_being_sent_is_left_alone() {
    let sink = Sink::scripted(|ask| match ask.is_content() {
        true => Answer::Hang,
        false => Answer::Usual,
    });
    let gateway = patient(&sink).set("limits", "shutdown_grace = \"1s\"").start();
    let id = send(&gateway, FROM, &["bob@example.org"]);
    eventually("the content to leave", || {
        sink.lines().iter().any(|line| line == "DATA").then_some(())
    });
    assert_eq!(ids(&listed(&gateway, &["--state", "in-flight"])), [&id]);
    for verb in ["hold", "retry", "delete", "release"] {
        let (code, out, err) = run(&gateway, &["queue", verb, &id]);
        let words = format!("{id}: it is being sent now; try again when that has ended\n");
        assert_eq!((code, err), (75, words), "{verb} {out}");
    }
    assert_eq!(listed(&gateway, &[]).len(), 1);
}

/// Nobody answered on the socket until the attempts had ended.
#[test]
fn while_the_gateway_stops_the_queue_can_be_looked_at_and_is_not_changed() {
    let sink = Sink::scripted(|ask| match ask.is_content() {
        true => Answer::Hang,
        false => Answer::Usual,
    });
    let mut gateway = patient(&sink).set("limits", "shutdown_grace = \"10m\"").start();
    let id = send(&gateway, FROM, &["bob@example.org"]);
    eventually("the content to leave", || {
        sink.lines().iter().any(|line| line == "DATA").then_some(())
    });
    gateway.terminate();
    gateway.wait_event("stopping", |_| true);
    assert_eq!(ids(&listed(&gateway, &["--state", "in-flight"])), [&id]);
    assert!(well(&gateway, &["queue", "show", &id]).contains("it is being sent now"));
    assert!(well(&gateway, &["status"]).contains(" 1 in flight"));
    // The dispatcher hears of it a moment later.
    let (code, _, err) = eventually("the verb to be refused", || {
        let said = run(&gateway, &["queue", "delete", &id]);
        (said.0 != 75).then_some(said)
    });
    assert!(code == 69 && err.contains("the gateway is stopping"), "{code} {err}");
    assert_eq!(listed(&gateway, &[]).len(), 1);
    // The attempt comes to its end, and with it the gateway.
    drop(sink);
    assert!(gateway.wait_exit().success());
}

#[test]
fn an_export_is_what_would_be_sent_and_overwrites_nothing() {
    let (sink, willing) = reluctant("450 later");
    let gateway = patient(&sink).start();
    // Over a mebibyte: it lies in a file of its own.
    let large = format!("{CONTENT}{}", "0123456789\r\n".repeat(200_000));
    let mut sent = Vec::new();
    for content in [CONTENT, &large] {
        let id = Client::hello(gateway.smtp()).mail(FROM, &["bob@example.org"], content);
        gateway.wait_event("deferred", |event| event["id"] == id.as_str());
        let file = gateway.folder().join(format!("{id}.eml"));
        let to = file.to_str().unwrap();
        assert_eq!(well(&gateway, &["queue", "export", &id, "--to", to]), "");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o600);
        let (code, _, err) = run(&gateway, &["queue", "export", &id, "--to", to]);
        assert!(code == 73 && err.contains("exists"), "{code} {err}");
        let exported = fs::read(&file).unwrap();
        assert!(well(&gateway, &["queue", "export", &id]).as_bytes() == exported);
        sent.push((id, exported));
    }
    let nobody = "00000000-0000-7000-8000-000000000000";
    let none = gateway.folder().join("none");
    let (code, _, _) = run(&gateway, &["queue", "export", nobody, "--to", none.to_str().unwrap()]);
    assert!(code == 66 && !none.exists());
    willing.store(true, Ordering::SeqCst);
    eventually("both to be due", || {
        let (code, _, _) = run(&gateway, &["queue", "retry", "--all"]);
        (code == 0).then_some(())
    });
    for (id, exported) in sent {
        assert!(sink.wait_id(&id).content == exported);
    }
    gateway.stop();
}

/// "It is tried now", the log said, and `show` that it was to be sent when its turn came.
#[test]
fn without_a_provider_nothing_is_said_to_be_sent() {
    let gateway = Setup::none("hold").start();
    let id = send(&gateway, FROM, &["bob@example.org"]);
    let waits = "no provider is set, and mail is kept until there is one";
    let story = well(&gateway, &["queue", "show", &id]);
    assert!(story.contains(&format!("next       it is due, but {waits}\n")), "{story}");
    let out = well(&gateway, &["queue", "retry", &id]);
    assert_eq!(out, format!("retry: 1 message done\nwhat is due waits: {waits}\n"));
    let event = gateway.wait_event("retried", |event| event["id"] == id.as_str());
    let words = format!("message {id} is due now: an operator asked for it; it waits: {waits}");
    assert_eq!(event["message"], words.as_str());
    well(&gateway, &["queue", "hold", &id]);
    assert!(well(&gateway, &["queue", "release", "--state", "held"]).contains(waits));
    assert!(well(&gateway, &["status"]).contains("provider   none\n"));
    gateway.stop();
}

/// What a recipient had failed for stood there.
#[test]
fn the_row_of_a_message_says_why_it_waits() {
    let sink = Sink::scripted(|ask| match ask.line {
        line if line.starts_with("RCPT TO:<bad@") => Answer::reply("550 5.1.1 no such user"),
        line if line.starts_with("RCPT") => Answer::reply("450 4.2.1 mailbox busy"),
        _ => Answer::Usual,
    });
    let gateway = patient(&sink).start();
    let id = deferred(&gateway, FROM, &["bad@example.org", "busy@example.org"]);
    let row = listed(&gateway, &[]).into_iter().find(|row| row["id"] == id.as_str()).unwrap();
    assert!(row["last"].as_str().unwrap().contains("450 4.2.1 mailbox busy"), "{row}");
    assert_eq!(row["to"], json!(["busy@example.org", "bad@example.org"]));
    gateway.stop();
}

/// It was held to `list`, not held to `release`, no message to filters, and nothing at all to `show`.
#[test]
fn a_damaged_message_is_one_to_all_commands() {
    let (sink, _) = reluctant("450 later");
    let gateway = patient(&sink).start();
    let id = deferred(&gateway, FROM, &["bob@example.org"]);
    let sound = deferred(&gateway, FROM, &["carl@example.org"]);
    damage(&gateway, b"bob@example.org");
    let check = |verb: &str| {
        let (code, _, err) = run(&gateway, &["queue", verb, &id]);
        assert!(
            code == 65
                && err.contains(&format!("message {id} is damaged: "))
                && err.contains("`mailsluice spool verify` says what is damaged"),
            "{verb}: {code} {err}"
        );
    };
    check("retry");
    check("hold");
    let (code, out, err) = run(&gateway, &["queue", "export", &id]);
    assert!(code == 71 && out.is_empty() && err.contains("`mailsluice spool verify`"), "{err}");
    let (code, story, _) = run(&gateway, &["queue", "show", &id]);
    assert_eq!(code, 65, "{story}");
    for words in ["state      deferred\n", "attempts   1\n", "next       nothing: message "] {
        assert!(story.contains(words), "{words}\n{story}");
    }
    let (code, out, err) = run(&gateway, &["queue", "list", "--sender", "*"]);
    assert!(code == 0 && out.contains(&sound) && !out.contains(&id), "{out}");
    assert!(err.starts_with("1 more cannot be read, so the filter does not know them"), "{err}");
    let (code, out, err) = run(&gateway, &["queue", "hold", "--sender", "*"]);
    assert_eq!((code, out.as_str()), (0, "hold: 1 message done\n"));
    assert!(err.starts_with("1 more cannot be read"), "{err}");
    assert!(well(&gateway, &["queue", "list"]).contains(&format!("message {id} is damaged")));
    assert_eq!(well(&gateway, &["queue", "delete", &id]), "delete: 1 message done\n");
    assert_eq!(ids(&listed(&gateway, &[])), [&sound]);
    gateway.stop();
}

/// Changes an octet of what the log of the spool has.
fn damage(gateway: &Gateway, what: &[u8]) {
    for entry in fs::read_dir(gateway.folder().join("spool/log")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let Some(at) = bytes.windows(what.len()).position(|part| part == what) else { continue };
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[bytes[at] ^ 1], at as u64).unwrap();
    }
}

/// `retry --all` sent what was held because it may have been taken.
#[test]
fn what_is_held_in_doubt_is_sent_only_to_who_means_it() {
    let sink = Sink::scripted(|ask| match ask.is_content() && ask.mails == 1 {
        true => Answer::TakeAndDrop,
        false => Answer::Usual,
    });
    let gateway = patient(&sink).set("retry", "in_doubt = \"hold\"").start();
    let id = send(&gateway, FROM, &["bob@example.org"]);
    gateway.wait_event("held", |event| event["id"] == id.as_str());
    eventually("it to be held", || {
        (ids(&listed(&gateway, &["--state", "held"])) == [&id]).then_some(())
    });
    for verb in ["retry", "release"] {
        let out = well(&gateway, &["queue", verb, "--all"]);
        let words = "0 messages done, 1 left alone because they may have been taken already";
        assert!(out.starts_with(&format!("{verb}: {words}")), "{out}");
    }
    assert_eq!(gateway.metric("mailsluice_in_doubt_messages"), 1.0);
    assert!(well(&gateway, &["status"]).contains("1 in doubt: `mailsluice queue list"));
    let story = well(&gateway, &["queue", "show", &id]);
    assert!(story.contains("it is held, and may have been taken already; last was"), "{story}");
    assert_eq!(sink.count(), 1);
    let out = well(&gateway, &["queue", "retry", "--state", "in-doubt"]);
    assert_eq!(out, "retry: 1 message done\n");
    sink.wait(2);
    gateway.wait_empty();
    assert_eq!(gateway.metric("mailsluice_in_doubt_messages"), 0.0);
    gateway.stop();
}

/// More than one request takes.
#[test]
fn a_whole_queue_is_changed_at_once() {
    const MESSAGES: usize = 1_100;
    let gateway = Setup::none("hold").start();
    let mut client = Client::hello(gateway.smtp());
    for _ in 0..MESSAGES {
        client.mail(FROM, &["bob@example.org"], CONTENT);
    }
    let done = |verb: &str| format!("{verb}: {MESSAGES} messages done\n");
    assert_eq!(well(&gateway, &["queue", "hold", "--state", "queued"]), done("hold"));
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"held\"}"), MESSAGES as f64);
    let out = well(&gateway, &["queue", "hold", "--all"]);
    assert_eq!(out, format!("hold: 0 messages done, {MESSAGES} left as they are\n"));
    let mut messages =
        ids(&listed(&gateway, &[])).into_iter().map(str::to_owned).collect::<Vec<_>>();
    messages.dedup();
    assert_eq!(messages.len(), MESSAGES);
    let out = well(&gateway, &["queue", "release", "--older-than", "0s"]);
    let waits = "what is due waits: no provider is set, and mail is kept until there is one\n";
    assert_eq!(out, done("release") + waits);
    assert_eq!(well(&gateway, &["queue", "delete", "--all", "--yes"]), done("delete"));
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"queued\"}"), 0.0);
    gateway.stop();
}

#[test]
fn the_socket_is_private_and_serves_what_tcp_serves_and_tcp_no_queue() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    assert_eq!(fs::metadata(socket(&gateway)).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(http(&gateway, "GET", "/livez", ""), (200, "ok\n".to_owned()));
    assert_eq!(http(&gateway, "GET", "/metrics", "").0, 200);
    assert_eq!(gateway.get("/api/v1/queue").0, 404);
    assert_eq!(gateway.get("/api/v1/status").0, 404);
    for (method, path, body, status) in [
        ("GET", "/api/v1/queue?recipent=x", "", 400),
        ("GET", "/api/v1/queue?limit=x", "", 400),
        ("GET", "/api/v1/queue?limit=0", "", 400),
        ("GET", "/api/v1/queue?state=held&state=failed", "", 400),
        ("GET", "/api/v1/queue?state=in-flight", "", 200),
        ("GET", "/api/v1/log?n=1&n=2", "", 400),
        ("POST", "/api/v1/queue/retry", "{\"all\":true,\"limit\":0}", 400),
        ("GET", "/api/v1/queues", "", 404),
        ("GET", "/api/v1/queue?state=x", "", 400),
        ("GET", "/api/v1/queue/x", "", 400),
        ("POST", "/api/v1/queue/retry", "{}", 400),
        ("POST", "/api/v1/queue/retry", "{\"filter\":{}}", 400),
        ("POST", "/api/v1/queue/retry", "{\"filter\":{\"recipent\":\"x\"}}", 422),
        ("POST", "/api/v1/queue/retry", "{\"ids\":[\"x\"]}", 400),
        ("DELETE", "/api/v1/queue", "", 400),
        ("DELETE", "/api/v1/queue/x", "", 405),
    ] {
        let (found, words) = http(&gateway, method, path, body);
        assert_eq!(found, status, "{method} {path} {body}: {words}");
        if status != 200 {
            let words: Value = serde_json::from_str(&words).unwrap();
            assert!(!words["error"].as_str().unwrap().is_empty(), "{method} {path} {body}");
        }
    }
    assert_eq!(
        gateway.get("/nothing"),
        (404, "{\"error\":\"nothing is at this path\"}".to_owned())
    );
    let (status, _) = http(&gateway, "POST", "/api/v1/queue/retry", &" ".repeat(300_000));
    assert_eq!(status, 413);
    let path = socket(&gateway);
    gateway.stop();
    assert!(!path.exists());
}

#[test]
fn a_command_without_a_daemon_says_so_and_what_else_to_do() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let folder = gateway.kill();
    let config = folder.path().join("mailsluice.toml");
    for words in [&["queue", "list"][..], &["status"], &["log"], &["queue", "retry", "--all"]] {
        let output =
            Command::new(BINARY).args(words).arg("--config").arg(&config).output().unwrap();
        let (code, out, err) = said(&output);
        assert_eq!((code, out.as_str()), (69, ""), "{words:?}");
        assert!(
            err.contains("is `mailsluice run` running") && err.contains("mailsluice spool ls"),
            "{err}"
        );
    }
    // What the dead one left is no hindrance.
    assert!(folder.path().join("spool/admin.sock").exists());
    let setup = Setup::to(sink.address).spool(&folder.path().join("spool"));
    let gateway = setup.start();
    let socket = folder.path().join("spool/admin.sock");
    let status = Command::new(BINARY).args(["status", "--socket"]).arg(socket).output().unwrap();
    assert_eq!(said(&status).0, 0);
    gateway.stop();
}

#[test]
fn status_says_what_the_provider_and_the_queue_are_like() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    send(&gateway, FROM, &["bob@example.org", "carl@example.org"]);
    sink.wait(1);
    gateway.wait_empty();
    let status: Value = serde_json::from_str(&well(&gateway, &["status", "--json"])).unwrap();
    assert_eq!(status["provider"]["state"], "open");
    assert_eq!(status["provider"]["server"], sink.address.to_string());
    assert_eq!((&status["accepted"], &status["delivered"]), (&json!(1), &json!(2)));
    assert_eq!(status["queue"]["due"], 0);
    let screen = well(&gateway, &["status"]);
    assert!(screen.lines().count() <= 24 && screen.contains("1 messages accepted"), "{screen}");
    gateway.stop();

    // Nobody listens there.
    let address = sink.address;
    drop(sink);
    let gateway = Setup::to(address).start();
    let id = send(&gateway, FROM, &["bob@example.org"]);
    gateway.wait_event("closed", |_| true);
    let screen = eventually("it to be closed", || {
        let screen = well(&gateway, &["status"]);
        screen.contains("closed since 20").then_some(screen)
    });
    assert!(
        screen.contains("next probe at 20") && screen.contains("the oldest waits since"),
        "{screen}"
    );
    let story = eventually("the story to say so", || {
        let story = well(&gateway, &["queue", "show", &id]);
        story.contains("the provider is closed since 20").then_some(story)
    });
    assert!(story.contains("it is probed from 20"), "{story}");
}

/// Kills what is left of a command.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A few that were forgotten took every place of the operator.
#[test]
fn those_who_follow_the_log_leave_places_to_others() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let _followers: Vec<_> = (0..4)
        .map(|_| {
            let mut follow = command(&gateway, &["log", "-f", "-n", "1"]);
            let mut child = Running(follow.stdout(Stdio::piped()).spawn().unwrap());
            let mut first = String::new();
            BufReader::new(child.0.stdout.as_mut().unwrap()).read_line(&mut first).unwrap();
            child
        })
        .collect();
    let (code, _, err) = run(&gateway, &["log", "-f"]);
    assert!(code == 69 && err.contains("4 others follow the log already"), "{code} {err}");
    well(&gateway, &["status"]);
    well(&gateway, &["log", "-n", "1"]);
}

#[test]
fn the_log_is_followed() {
    let sink = Sink::new();
    for format in ["json", "text"] {
        let setup = Setup::to(sink.address).set("log", &format!("format = \"{format}\""));
        let setup = match format {
            // No event of a delivery is written there, and all the same it is told.
            "text" => setup.set("log", "level = \"info\""),
            _ => setup,
        };
        let gateway = match format {
            "json" => setup.start(),
            _ => {
                // Its ports are told by JSON only; the log of the past says where it listens.
                let gateway = setup.spawn();
                eventually("the socket", || UnixStream::connect(socket(&gateway)).ok());
                gateway
            }
        };
        let mut follow = command(&gateway, &["log", "-f", "-n", "1000", "--json"]);
        let mut child = Running(follow.stdout(Stdio::piped()).spawn().unwrap());
        let lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
        let mut events = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        let listens = |event: &Value| {
            let address = event["address"].as_str()?;
            (event["event"] == "listening" && event["protocol"] == "smtp")
                .then(|| address.parse().unwrap())
        };
        let smtp = events.find_map(|event| listens(&event)).unwrap();
        let id = Client::hello(smtp).mail(FROM, &["bob@example.org"], CONTENT);
        let mut of_message = events.filter(|event| event["id"] == id.as_str());
        for name in ["accepted", "delivered"] {
            assert_eq!(of_message.next().unwrap()["event"], name);
        }
        let (_, last, _) = run(&gateway, &["log", "-n", "1"]);
        assert!(last.lines().count() == 1 && last.contains(" INFO  "), "{last}");
        // The end of the gateway is the end of the command.
        gateway.stop();
        eventually("the command to end", || child.0.try_wait().unwrap());
    }
}

#[test]
fn no_local_part_is_in_the_log_where_addresses_are_not_to_be() {
    let words = "450 4.2.0 <Zebulon@example.org> and \"zebu lon\"@example.net wait";
    let (sink, willing) = reluctant(words);
    let setup = patient(&sink).set("log", "addresses = false").set("log", "level = \"trace\"");
    let gateway = setup.start();
    let to = ["zebulon@example.org", "\"zebulon the 2nd\"@example.org"];
    let id = deferred(&gateway, "zebulon+tag@example.com", &to);
    willing.store(true, Ordering::SeqCst);
    well(&gateway, &["queue", "retry", &id]);
    sink.wait(1);
    gateway.wait_empty();
    let event = gateway.wait_event("delivered", |event| event["to"] == "z***@example.org");
    assert_eq!(event["id"], id.as_str());
    gateway.wait_event("accepted", |event| event["from"] == "z***@example.com");
    gateway.wait_event("deferred", |event| {
        event["words"].as_str().unwrap().contains("<Z***@example.org> and ***@example.net wait")
    });
    let followed = well(&gateway, &["log", "-n", "1000", "--json"]);
    assert!(followed.contains("delivered"));
    gateway.wait_log(r#""command":"RCPT TO:<z***@example.org>""#);
    // Who may ask for the queue sees whom it is for.
    let log = format!("{followed}{}", gateway.log_text()).to_lowercase();
    for line in log.lines() {
        assert!(!line.contains("zebu"), "{line}");
    }
    gateway.stop();
}

#[test]
fn the_process_is_measured() {
    let gateway = Setup::none("hold").start();
    for name in ["process_resident_memory_bytes", "process_open_fds", "process_max_fds"] {
        assert!(gateway.metric(name) > 1.0, "{name}");
    }
    assert!(gateway.metric("process_cpu_seconds_total") > 0.0);
    assert!(gateway.metric("process_start_time_seconds") > 1_600_000_000.0);
    send(&gateway, FROM, &["bob@example.org"]);
    assert_eq!(gateway.metric("mailsluice_queue_bytes"), CONTENT.len() as f64);
}

/// Where curl is.
#[test]
fn curl_is_a_client_too() {
    let gateway = Setup::none("hold").start();
    let id = send(&gateway, FROM, &["bob@example.org"]);
    let curl = |words: &[&str]| {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "30", "--unix-socket"]).arg(socket(&gateway)).args(words);
        curl.output().ok().map(|output| said(&output))
    };
    let Some((code, out, err)) = curl(&["http://localhost/api/v1/queue?sender=anna*"]) else {
        println!("skipped: no curl");
        return;
    };
    assert_eq!(code, 0, "{err}");
    let page: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(ids(page["messages"].as_array().unwrap()), [&id]);
    let body = json!({ "filter": { "sender": "anna*" } }).to_string();
    let words = ["-X", "DELETE", "--json", &body, "http://localhost/api/v1/queue"];
    let (_, out, _) = curl(&words).unwrap();
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["results"], json!([{ "id": id, "result": "done" }]));
    assert!(listed(&gateway, &[]).is_empty());
}
