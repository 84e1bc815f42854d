//! SIGTERM, and starting when something is in the way.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::support::client::{Client, id};
use crate::support::eventually;
use crate::support::gateway::{Gateway, Setup};
use crate::support::sink::{Answer, Sink};

const SMALL: &str = "Subject: hi\r\n\r\nhello\r\n";

#[track_caller]
fn mail(gateway: &Gateway, from: &str) -> String {
    Client::hello(gateway.smtp()).mail(from, &["b@example.org"], SMALL)
}

/// A sink that answers the first final dot only when the switch is on.
fn slow_sink() -> (Sink, Arc<AtomicBool>) {
    let go = Arc::new(AtomicBool::new(false));
    let sink = Sink::scripted({
        let go = Arc::clone(&go);
        move |ask| {
            if ask.is_content() {
                eventually("the switch", || go.load(SeqCst).then_some(()));
            }
            Answer::Usual
        }
    });
    (sink, go)
}

/// A sink that answers no final dot.
fn hung_sink() -> Sink {
    Sink::scripted(|ask| if ask.is_content() { Answer::Hang } else { Answer::Usual })
}

#[track_caller]
fn wait_in_flight(gateway: &Gateway, sink: &Sink) {
    eventually("a delivery in flight", || sink.lines().contains(&"DATA".to_owned()).then_some(()));
    assert_eq!(gateway.metric("mailsluice_in_flight_messages"), 1.0);
}

/// Expects it to end by itself with this exit code, and returns its log.
#[track_caller]
fn ends_with(mut gateway: Gateway, code: i32) -> String {
    let status = gateway.wait_exit();
    assert_eq!(status.code(), Some(code), "{}", gateway.log_text());
    gateway.log_text()
}

/// R70.
#[test]
fn sigterm_sends_idle_sessions_away_and_lets_data_finish() {
    let spool = tempfile::tempdir().unwrap();
    let mut gateway = Setup::none("hold").spool(spool.path()).start();
    let mut greeted = Client::connect(gateway.smtp());
    let mut idle = Client::hello(gateway.smtp());
    let mut in_mail = Client::hello(gateway.smtp());
    in_mail.command("MAIL FROM:<lost@example.com>", 250);
    let mut in_data = Client::hello(gateway.smtp());
    in_data.command("MAIL FROM:<kept@example.com>", 250);
    in_data.command("RCPT TO:<b@example.org>", 250);
    in_data.command("DATA", 354);
    in_data.send("Subject: one half\r\n\r\n");
    let address = gateway.smtp();
    gateway.terminate();
    for client in [&mut greeted, &mut idle, &mut in_mail] {
        client.expect(421);
        assert_eq!(client.expect_end(), "");
    }
    // The socket closes by itself, not after the sessions.
    eventually("nobody new is taken", || TcpStream::connect(address).is_err().then_some(()));
    in_data.send("and the other\r\n.\r\n");
    let id = id(&in_data.expect(250));
    in_data.expect(421);
    in_data.expect_end();
    drop((greeted, idle, in_mail, in_data));
    let status = gateway.wait_exit();
    assert_eq!(status.code(), Some(0), "{}", gateway.log_text());

    let sink = Sink::new();
    let gateway = Setup::to(sink.address).spool(spool.path()).start();
    gateway.wait_event("delivered", |event| event["id"] == id.as_str());
    gateway.wait_empty();
    gateway.stop();
    let taken = sink.taken();
    assert_eq!(taken.len(), 1);
    assert!(taken[0].text().ends_with("Subject: one half\r\n\r\nand the other\r\n"));
}

#[test]
fn content_that_does_not_end_within_the_grace_is_dropped_without_a_250() {
    let spool = tempfile::tempdir().unwrap();
    let mut gateway =
        Setup::none("hold").spool(spool.path()).set("limits", "shutdown_grace = \"300ms\"").start();
    let mut client = Client::hello(gateway.smtp());
    client.command("MAIL FROM:<a@example.com>", 250);
    client.command("RCPT TO:<b@example.org>", 250);
    client.command("DATA", 354);
    client.send("Subject: half\r\n\r\nof i");
    gateway.terminate();
    assert_eq!(client.expect_end(), "");
    assert_eq!(gateway.wait_exit().code(), Some(0));
    let gateway = Setup::none("hold").spool(spool.path()).start();
    gateway.wait_empty();
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"queued\"}"), 0.0);
    gateway.stop();
}

#[test]
fn a_delivery_in_flight_ends_within_the_grace_and_is_not_made_again() {
    let spool = tempfile::tempdir().unwrap();
    let (sink, go) = slow_sink();
    let setup = Setup::to(sink.address).spool(spool.path());
    let mut gateway = setup.start();
    mail(&gateway, "a@example.com");
    wait_in_flight(&gateway, &sink);
    let admin = gateway.admin();
    gateway.terminate();
    gateway.wait_event("stopping", |_| true);
    let (status, body) = crate::support::gateway::get(admin, "/readyz").unwrap();
    assert_eq!((status, body.as_str()), (503, "not ready: shutting down\n"));
    go.store(true, SeqCst);
    assert_eq!(gateway.wait_exit().code(), Some(0));
    assert_eq!(sink.taken().len(), 1);

    let gateway = setup.start();
    mail(&gateway, "z@example.com");
    sink.wait(2);
    gateway.wait_empty();
    gateway.stop();
    let from: Vec<String> = sink.taken().into_iter().map(|taken| taken.from).collect();
    assert_eq!(from, ["a@example.com", "z@example.com"]);
}

#[test]
fn a_delivery_that_does_not_end_within_the_grace_is_made_by_the_next_run() {
    let spool = tempfile::tempdir().unwrap();
    let hung = hung_sink();
    let mut gateway = Setup::to(hung.address)
        .spool(spool.path())
        .set("limits", "shutdown_grace = \"300ms\"")
        .start();
    let id = mail(&gateway, "a@example.com");
    wait_in_flight(&gateway, &hung);
    let began = Instant::now();
    gateway.terminate();
    assert_eq!(gateway.wait_exit().code(), Some(0));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(gateway.log_text().contains("1 attempts did not end within shutdown_grace"));

    let sink = Sink::new();
    let gateway = Setup::to(sink.address).spool(spool.path()).start();
    gateway.wait_event("delivered", |event| event["id"] == id.as_str());
    gateway.wait_empty();
    gateway.stop();
    assert_eq!(sink.taken().len(), 1);
}

/// As `timeout -s INT` does, which signals its child and the group that the child is in.
#[test]
fn a_signal_that_comes_twice_at_once_is_one() {
    let spool = tempfile::tempdir().unwrap();
    let hung = hung_sink();
    let mut gateway = Setup::to(hung.address)
        .spool(spool.path())
        .set("limits", "shutdown_grace = \"60s\"")
        .start();
    mail(&gateway, "a@example.com");
    wait_in_flight(&gateway, &hung);
    gateway.signal("INT");
    gateway.signal("INT");
    gateway.wait_event("stopping", |_| true);
    gateway.signal("TERM");
    gateway.wait_exit();
    assert!(gateway.log_text().contains("a second SIGTERM: stopped at once"));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let spool = tempfile::tempdir().unwrap();
    let hung = hung_sink();
    let mut gateway = Setup::to(hung.address)
        .spool(spool.path())
        .set("limits", "shutdown_grace = \"60s\"")
        .start();
    let id = mail(&gateway, "a@example.com");
    wait_in_flight(&gateway, &hung);
    gateway.terminate();
    gateway.wait_event("stopping", |_| true);
    let began = Instant::now();
    gateway.signal("INT");
    gateway.wait_exit();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(gateway.log_text().contains("a second SIGINT: stopped at once"));

    let sink = Sink::new();
    let gateway = Setup::to(sink.address).spool(spool.path()).start();
    gateway.wait_event("delivered", |event| event["id"] == id.as_str());
    gateway.stop();
}

#[test]
fn sighup_does_not_end_it() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let mut client = Client::hello(gateway.smtp());
    gateway.signal("HUP");
    gateway.wait_event("signal", |event| event["signal"] == "SIGHUP");
    client.mail("a@example.com", &["b@example.org"], SMALL);
    sink.wait(1);
    drop(client);
    gateway.stop();
}

#[test]
fn sigint_stops_it_like_sigterm() {
    let mut gateway = Setup::none("hold").start();
    gateway.signal("INT");
    assert_eq!(gateway.wait_exit().code(), Some(0));
}

#[test]
fn a_second_daemon_on_one_spool_is_refused_and_told_who_has_it() {
    let spool = tempfile::tempdir().unwrap();
    let setup = Setup::none("hold").spool(spool.path());
    let gateway = setup.start();
    let log = ends_with(setup.spawn(), 71);
    assert!(log.contains(&spool.path().display().to_string()), "{log}");
    assert!(log.contains(&gateway.pid().to_string()), "{log}");
    mail(&gateway, "a@example.com");
    gateway.stop();
    // Nothing of it is left in the way.
    setup.start().stop();
}

#[test]
fn a_port_in_use_is_named() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap();
    let setup = Setup::none("hold").set("[listener]", &format!("bind = \"{address}\""));
    let log = ends_with(setup.spawn(), 71);
    assert!(log.contains(&format!("cannot listen on {address}")), "{log}");
    assert!(log.contains("ss -ltnp"), "{log}");
}

#[test]
fn a_port_of_the_admin_listener_in_use_was_named_without_saying_what_to_do() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap();
    let setup = Setup::none("hold").set("admin", &format!("bind = \"{address}\""));
    let log = ends_with(setup.spawn(), 71);
    assert!(log.contains(&format!("cannot listen on {address} (admin.bind)")), "{log}");
    assert!(log.contains("ss -ltnp"), "{log}");
}

#[test]
fn a_wrong_configuration_is_exit_78() {
    let log = ends_with(Setup::none("hold").set("limits", "recipents = 3").spawn(), 78);
    assert!(log.contains("recipents") && log.contains("recipients"), "{log}");
}

/// With a limit of file descriptors.
fn limited(setup: &Setup, ulimit: &str) -> Gateway {
    let script = format!("ulimit {ulimit} && exec \"$@\"");
    setup.clone().under(&["sh", "-c", &script, "sh"]).spawn()
}

#[test]
fn too_few_file_descriptors_are_said_at_the_start() {
    let log = ends_with(limited(&Setup::none("hold"), "-n 256"), 71);
    assert!(log.contains("limits.connections = 4000"), "{log}");
    assert!(log.contains("LimitNOFILE="), "{log}");
    // As many as the connections need is enough, and a soft limit is raised.
    let gateway = limited(&Setup::none("hold").set("limits", "connections = 10"), "-n 600");
    gateway.wait_ready();
    gateway.stop();
    let gateway = limited(&Setup::none("hold").set("limits", "connections = 400"), "-Sn 256");
    gateway.wait_ready();
    gateway.stop();
}

/// The answer to a GET, head and all.
fn raw_get(gateway: &Gateway, path: &str) -> String {
    let mut stream = TcpStream::connect(gateway.admin()).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn health_says_what_is() {
    let gateway = Setup::none("hold").start();
    assert_eq!(gateway.get("/livez"), (200, "ok\n".to_owned()));
    assert_eq!(gateway.get("/readyz"), (200, "ready\n".to_owned()));
    assert_eq!(gateway.get("/nothing").0, 404);
    gateway.stop();

    let gateway = Setup::none("reject").start();
    assert_eq!(gateway.get("/livez"), (200, "ok\n".to_owned()));
    let (status, body) = gateway.get("/readyz");
    assert_eq!(status, 503);
    assert!(body.starts_with("not ready: mail is refused with 451 4.3.2 "), "{body}");
    Client::hello(gateway.smtp()).command("MAIL FROM:<a@example.com>", 451);
    gateway.stop();
}

/// One line of the text form of metrics: name, labels, value.
fn sample(line: &str) -> Option<(&str, f64)> {
    let (series, value) = line.rsplit_once(' ')?;
    let (name, labels) = match series.split_once('{') {
        Some((name, rest)) => (name, rest.strip_suffix('}')?),
        None => (series, ""),
    };
    let is_name = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    // No label of ours has a comma or a quote in its value.
    let labels_fit = labels.split(',').filter(|label| !label.is_empty()).all(|label| {
        label.split_once('=').is_some_and(|(key, value)| {
            is_name(key) && value.len() >= 2 && value.starts_with('"') && value.ends_with('"')
        })
    });
    (is_name(name) && labels_fit).then_some((name, value.parse().ok()?))
}

#[test]
fn metrics_are_what_prometheus_reads() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    mail(&gateway, "a@example.com");
    sink.wait(1);
    gateway.wait_empty();
    let answer = raw_get(&gateway, "/metrics");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let head = head.to_ascii_lowercase();
    assert!(head.starts_with("http/1.0 200 ") || head.starts_with("http/1.1 200 "), "{head}");
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    assert!(body.ends_with('\n'));
    let (mut helped, mut family, mut samples) = (String::new(), String::new(), 0);
    for line in body.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').unwrap();
            assert!(!words.is_empty(), "{line}");
            name.clone_into(&mut helped);
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(name, helped);
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            name.clone_into(&mut family);
        } else {
            let (name, value) = sample(line).unwrap_or_else(|| panic!("{line}"));
            let of_family = ["", "_bucket", "_sum", "_count"]
                .iter()
                .any(|end| name.strip_suffix(end) == Some(&family));
            let is_ours = name.starts_with("mailsluice_") || name.starts_with("process_");
            assert!(of_family && is_ours, "{line} in {family}");
            assert!(value >= 0.0, "{line}");
            samples += 1;
        }
    }
    assert!(samples > 50, "{samples}");
    assert_eq!(gateway.metric("mailsluice_messages_accepted_total"), 1.0);
    assert_eq!(gateway.metric("mailsluice_recipients_total{outcome=\"delivered\"}"), 1.0);
    assert_eq!(gateway.metric("mailsluice_time_in_queue_seconds_count"), 1.0);
    gateway.stop();
}

#[test]
fn what_was_queued_before_a_restart_is_delivered_once() {
    const MESSAGES: usize = 300;
    let spool = tempfile::tempdir().unwrap();
    let gateway = Setup::none("hold").spool(spool.path()).start();
    std::thread::scope(|scope| {
        for worker in 0..6 {
            let address = gateway.smtp();
            scope.spawn(move || {
                let mut client = Client::hello(address);
                for n in (worker..MESSAGES).step_by(6) {
                    let content = format!("Subject: {n}\r\n\r\nbody {n}\r\n");
                    client.mail(&format!("m{n}@example.com"), &["b@example.org"], content);
                }
            });
        }
    });
    eventually("all to be queued", || {
        let queued = gateway.metric("mailsluice_queue_messages{state=\"queued\"}");
        (queued == 300.0).then_some(())
    });
    gateway.stop();

    let sink = Sink::new();
    let gateway = Setup::to(sink.address).spool(spool.path()).start();
    sink.wait(MESSAGES);
    gateway.wait_empty();
    gateway.stop();
    let mut from: Vec<String> = Vec::new();
    for taken in sink.taken() {
        let n = taken.from.strip_prefix('m').unwrap().strip_suffix("@example.com").unwrap();
        assert!(taken.text().ends_with(&format!("Subject: {n}\r\n\r\nbody {n}\r\n")));
        from.push(taken.from);
    }
    assert_eq!(from.len(), MESSAGES);
    from.sort_unstable();
    from.dedup();
    assert_eq!(from.len(), MESSAGES);
    // And nothing is left for a third run.
    let gateway = Setup::to(sink.address).spool(spool.path()).start();
    gateway.wait_empty();
    gateway.stop();
    assert_eq!(sink.taken().len(), MESSAGES);
}

/// Half a request, or answers that nobody reads, kept the daemon from ending.
#[test]
fn an_admin_client_with_half_a_request_did_not_let_the_daemon_end() {
    let mut gateway = Setup::none("hold").set("limits", "shutdown_grace = \"1s\"").start();
    let mut half = TcpStream::connect(gateway.admin()).unwrap();
    half.write_all(b"GET /metrics HT").unwrap();
    let mut silent = TcpStream::connect(gateway.admin()).unwrap();
    silent.write_all(&b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(500)).unwrap();
    gateway.terminate();
    assert!(gateway.wait_exit().success());
}

/// Idle connections to the admin port took every descriptor, and mail got none.
#[test]
fn a_crowd_at_the_admin_port_did_not_leave_mail_a_descriptor() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address)
        .set("limits", "connections = 10")
        .under(&["sh", "-c", "ulimit -n 400; exec \"$@\"", "sh"])
        .start();
    let admin = gateway.admin();
    // Those that find no place wait in the kernel, until there is none there either.
    let come = |_| TcpStream::connect_timeout(&admin, Duration::from_millis(5)).ok();
    let crowd: Vec<_> = (0..450).filter_map(come).collect();
    assert!(crowd.len() > 48);
    for _ in 0..3 {
        mail(&gateway, "a@example.com");
    }
    sink.wait(3);
}
