//! Upstreams that refuse, hang, lie and drop, at every stage.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::Value;

use crate::support::client::{Client, stuffed};
use crate::support::eventually;
use crate::support::gateway::{Gateway, Setup};
use crate::support::sink::{Answer, EXTENSIONS, Sink, Taken};

const SMALL: &str = "Subject: hi\r\n\r\nhello\r\n";

/// One short message.
#[track_caller]
fn mail(gateway: &Gateway, from: &str, to: &[&str]) -> String {
    Client::hello(gateway.smtp()).mail(from, to, SMALL)
}

/// The reverse paths of what was taken, sorted.
fn senders(taken: &[Taken]) -> Vec<&str> {
    let mut senders: Vec<&str> = taken.iter().map(|taken| taken.from.as_str()).collect();
    senders.sort_unstable();
    senders
}

/// How often each recipient was delivered to.
fn deliveries(taken: &[Taken]) -> BTreeMap<String, usize> {
    let mut times = BTreeMap::new();
    for to in taken.iter().flat_map(|taken| &taken.to) {
        *times.entry(to.clone()).or_default() += 1;
    }
    times
}

fn count(gateway: &Gateway, name: &str, fits: impl Fn(&Value) -> bool) -> usize {
    gateway.events().iter().filter(|event| event["event"] == name && fits(event)).count()
}

/// Stops it; the log is whole then.
#[track_caller]
fn stop(mut gateway: Gateway) -> Gateway {
    gateway.terminate();
    let status = gateway.wait_exit();
    assert!(status.success(), "{status}:\n{}", gateway.log_text());
    gateway
}

#[track_caller]
fn wait_queue(gateway: &Gateway, state: &str, n: f64) {
    let name = format!("mailsluice_queue_messages{{state=\"{state}\"}}");
    eventually(&format!("{n} {state}"), || (gateway.metric(&name) == n).then_some(()));
}

/// Whether some file of the folder holds the text.
fn holds(folder: &Path, text: &str) -> bool {
    std::fs::read_dir(folder).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => holds(&path, text),
            false => {
                let bytes = std::fs::read(&path).unwrap();
                bytes.windows(text.len()).any(|window| window == text.as_bytes())
            }
        }
    })
}

/// A switch that scripts look at.
#[derive(Clone, Default)]
struct Switch(Arc<AtomicBool>);

impl Switch {
    fn turn(&self) {
        self.0.store(true, SeqCst);
    }

    fn is_on(&self) -> bool {
        self.0.load(SeqCst)
    }

    #[track_caller]
    fn wait(&self) {
        eventually("the switch", || self.is_on().then_some(()));
    }
}

/// What becomes of a message that met a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// Delivered: it was no fault.
    AtOnce,
    /// Deferred, and delivered by a later attempt.
    Later,
    /// Failed for good.
    Failed,
    /// The final dot was sent: counted as in doubt, and sent once more.
    InDoubt,
}

use Ends::{AtOnce as A, Failed as F, InDoubt as D, Later as L};

/// What the sink is asked at each stage. `(receiving)` is while the content is sent, before its final dot.
const STAGES: [&str; 7] =
    ["(greeting)", "EHLO", "MAIL", "RCPT", "DATA", "(receiving)", "(content)"];

/// The code that the client waits for.
fn good(stage: &str) -> u16 {
    match stage {
        "(greeting)" => 220,
        "DATA" => 354,
        // Nothing is due here; a refusal is all that makes sense.
        "(receiving)" => 452,
        _ => 250,
    }
}

/// Rows that run at once; nearly all of their time is waiting.
const AT_ONCE: usize = 16;

/// The first time that a stage is reached, the fault happens; from then on the upstream behaves. Each row has a gateway
/// of its own.
#[test]
fn every_fault_at_every_stage_ends_as_the_table_says() {
    let no_words =
        |stage: &str| [format!("{} ", good(stage)).as_bytes(), b"caf\xe9 \xff\r\n"].concat();
    let reply = |words| move |_: &str| Answer::reply(words);
    let (closing, not_now, never) =
        (reply("421 4.3.2 closing"), reply("451 4.3.0 not now"), reply("554 5.0.0 never"));
    let two_lines = |stage: &str| format!("{0}-one\n{0} two\n", good(stage));
    let lines = |stage: &str| format!("{}-more\r\n", good(stage));
    let line = |stage: &str| format!("{} xxxxxxxxxxxxxxxxxxxxxxx", good(stage));
    let class = |stage: &str| Answer::reply(if stage == "DATA" { "250 ok" } else { "354 go on" });
    let success =
        |stage: &str| Answer::reply(if stage == "(content)" { "220 ok" } else { "299 ok" });
    let raw = |bytes: Vec<u8>| Answer::Raw(bytes);
    type Fault<'a> = &'a dyn Fn(&str) -> Answer;
    let table: [(&str, Fault<'_>, [Ends; 7]); 13] = [
        //                                                 greeting EHLO MAIL RCPT DATA content dot
        ("hangs", &|_| Answer::Hang, [L, L, L, L, L, L, D]),
        ("drops", &|_| Answer::Drop, [L, L, L, L, L, L, D]),
        ("421", &closing, [L, L, L, L, L, L, L]),
        ("4xx", &not_now, [L, L, L, L, L, L, L]),
        ("5xx", &never, [L, L, F, F, F, F, F]),
        ("garbage", &|_| raw(b"what?\r\n\0\xff\r\n".to_vec()), [L, L, L, L, L, L, D]),
        ("endless reply", &|at| Answer::Endless(lines(at).into()), [L, L, L, L, L, L, D]),
        ("endless line", &|at| Answer::Endless(line(at).into()), [L, L, L, L, L, L, D]),
        ("any charset", &|at| raw(no_words(at)), [A, A, A, A, A, L, A]),
        ("lone LF", &|at| raw(two_lines(at).into()), [A, A, A, A, A, L, A]),
        ("wrong class", &class, [L, L, L, L, L, L, D]),
        ("other success", &success, [L, L, L, L, L, L, D]),
        ("half a reply", &|_| Answer::RawThenDrop(b"25".to_vec()), [L, L, L, L, L, L, D]),
    ];
    let rows = table.iter().flat_map(|(name, fault, ends)| {
        let at = |(stage, ends): (&'static str, Ends)| (*name, stage, fault(stage), ends);
        STAGES.into_iter().zip(*ends).map(at).collect::<Vec<_>>()
    });
    let rows = Mutex::new(rows.collect::<Vec<_>>().into_iter());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let Some((name, stage, fault, ends)) = rows.lock().unwrap().next() else {
                        return;
                    };
                    row(name, stage, fault, ends);
                }
            });
        }
    });
}

fn row(name: &str, stage: &'static str, fault: Answer, ends: Ends) {
    let met = Switch::default();
    let hangs = matches!(fault, Answer::Hang);
    let sink = Sink::scripted({
        let met = met.clone();
        move |ask| match ask.is(stage) && !met.0.swap(true, SeqCst) {
            true => fault.clone(),
            false => Answer::Usual,
        }
    });
    let mut setup = Setup::to(sink.address);
    if hangs {
        let timeout = match stage {
            "(receiving)" => "data_timeout",
            "(content)" => "final_timeout",
            _ => "command_timeout",
        };
        setup = setup.set("provider", &format!("{timeout} = \"1s\""));
    }
    let gateway = setup.start();
    // Without more than what the sockets take in, the final dot would be on its way before the fault.
    let large = format!("Subject: hi\r\n\r\n{}", format!("{}\r\n", "x".repeat(30_000)).repeat(270));
    let content = if stage == "(receiving)" { &large } else { SMALL };
    Client::hello(gateway.smtp()).mail("one@example.com", &["a@example.org"], content);
    met.wait();
    mail(&gateway, "two@example.com", &["a@example.org"]);
    let expected: &[&str] = match ends {
        Ends::Failed => &["two@example.com"],
        Ends::AtOnce | Ends::Later | Ends::InDoubt => &["one@example.com", "two@example.com"],
    };
    sink.wait(expected.len());
    gateway.wait_empty();
    assert_eq!(senders(&sink.taken()), expected, "{name} at {stage}");
    let failed = f64::from(u8::from(ends == Ends::Failed));
    let in_doubt = f64::from(u8::from(ends == Ends::InDoubt));
    assert_eq!(
        gateway.metric("mailsluice_recipients_total{outcome=\"failed\"}"),
        failed,
        "{name} at {stage}"
    );
    wait_queue(&gateway, "failed", failed);
    assert_eq!(
        gateway.metric("mailsluice_queue_messages{state=\"held\"}"),
        0.0,
        "{name} at {stage}"
    );
    assert_eq!(gateway.metric("mailsluice_in_doubt_total"), in_doubt, "{name} at {stage}");
    let gateway = stop(gateway);
    let set_back = gateway
        .events()
        .iter()
        .filter(|event| ["deferred", "held", "in_doubt"].iter().any(|name| event["event"] == *name))
        .count();
    match ends {
        Ends::AtOnce | Ends::Failed => assert_eq!(set_back, 0, "{name} at {stage}"),
        Ends::Later | Ends::InDoubt => assert!(set_back >= 1, "{name} at {stage}"),
    }
    assert_eq!(senders(&sink.taken()), expected, "{name} at {stage}, once");
}

/// It refuses while content is still being sent, and goes without reading the rest.
#[test]
fn an_early_refusal_is_heard_although_the_connection_breaks() {
    let sink = Sink::scripted(|ask| match ask.is("(receiving)") {
        true => Answer::RawThenDrop(b"552 5.3.4 too large for us\r\n".to_vec()),
        false => Answer::Usual,
    });
    let gateway = Setup::to(sink.address).start();
    let large = format!("Subject: hi\r\n\r\n{}", format!("{}\r\n", "x".repeat(30_000)).repeat(270));
    Client::hello(gateway.smtp()).mail("a@example.com", &["b@example.org"], large);
    let failed = gateway.wait_event("failed", |_| true);
    assert_eq!(failed["words"], "552 5.3.4 too large for us");
    assert_eq!(failed["stage"], "content");
    wait_queue(&gateway, "failed", 1.0);
    let gateway = stop(gateway);
    assert_eq!(count(&gateway, "deferred", |_| true), 0);
}

#[test]
fn every_address_of_the_upstreams_name_is_tried() {
    let sink = Sink::new();
    // The name has ::1 too on most systems, where nothing listens.
    let gateway = Setup::to(sink.address).set("provider", "server = \"localhost\"").start();
    mail(&gateway, "a@example.com", &["b@example.org"]);
    sink.wait(1);
    gateway.wait_empty();
    let gateway = stop(gateway);
    assert_eq!(count(&gateway, "deferred", |_| true), 0);
}

/// The upstream took the message, and its answer was lost: one duplicate, and it is counted.
#[test]
fn a_lost_answer_to_the_dot_makes_one_duplicate_at_most() {
    let first = Switch::default();
    let sink = Sink::scripted(move |ask| match ask.is_content() && !first.0.swap(true, SeqCst) {
        true => Answer::TakeAndDrop,
        false => Answer::Usual,
    });
    let gateway = Setup::to(sink.address).start();
    let id = mail(&gateway, "a@example.com", &["b@example.org"]);
    gateway.wait_event("in_doubt", |event| event["id"] == id.as_str());
    let taken = sink.wait(2);
    gateway.wait_empty();
    assert_eq!(taken[0].content, taken[1].content, "the same message, so that it can be told");
    assert_eq!(gateway.metric("mailsluice_in_doubt_total"), 1.0);
    gateway.stop();
    assert_eq!(sink.taken().len(), 2);
}

#[test]
fn each_recipient_has_its_own_fate_and_it_survives_a_restart() {
    let later = Switch::default();
    let sink = Sink::scripted({
        let later = later.clone();
        move |ask| match () {
            () if ask.is("RCPT TO:<gone@") => Answer::reply("550 5.1.1 no such user"),
            () if ask.is("RCPT TO:<busy@") && !later.is_on() => Answer::reply("450 4.2.0 busy"),
            () => Answer::Usual,
        }
    });
    let spool = tempfile::tempdir().unwrap();
    let setup = Setup::to(sink.address).spool(spool.path());
    let gateway = setup.start();
    let id = mail(
        &gateway,
        "a@example.com",
        &["gone@example.org", "good@example.org", "busy@example.org"],
    );
    let of = |to: &str| {
        let (id, to) = (id.clone(), to.to_owned());
        move |event: &Value| event["id"] == id.as_str() && event["to"] == to.as_str()
    };
    let failed = gateway.wait_event("failed", of("gone@example.org"));
    assert_eq!(failed["words"], "550 5.1.1 no such user");
    gateway.wait_event("delivered", of("good@example.org"));
    let deferred = gateway.wait_event("deferred", of("busy@example.org"));
    assert_eq!(deferred["words"], "450 4.2.0 busy");
    assert_eq!(deferred["scope"], "recipient");
    assert_eq!(sink.wait(1)[0].to, ["good@example.org"]);
    gateway.stop();

    later.turn();
    let gateway = setup.start();
    gateway.wait_event("delivered", of("busy@example.org"));
    assert_eq!(sink.wait(2)[1].to, ["busy@example.org"]);
    wait_queue(&gateway, "failed", 1.0);
    gateway.stop();

    let gateway = setup.start();
    wait_queue(&gateway, "failed", 1.0);
    gateway.wait_empty();
    gateway.stop();
    assert_eq!(sink.taken().len(), 2);
    let asked = |to: &str| sink.lines().iter().filter(|line| line.contains(to)).count();
    assert_eq!(
        (asked("<gone@"), asked("<good@")),
        (1, 1),
        "what came to an end is not tried again"
    );
}

#[track_caller]
fn refused_for_good(stage: &'static str) {
    let sink = Sink::scripted(move |ask| match ask.is(stage) {
        true => Answer::reply("552 5.6.0 not of this kind"),
        false => Answer::Usual,
    });
    let spool = tempfile::tempdir().unwrap();
    let setup = Setup::to(sink.address).spool(spool.path());
    let gateway = setup.start();
    let content = "Subject: kept\r\n\r\nto be found in the spool\r\n";
    Client::hello(gateway.smtp()).mail("a@example.com", &["b@example.org"], content);
    let failed = gateway.wait_event("failed", |_| true);
    assert_eq!(failed["words"], "552 5.6.0 not of this kind");
    wait_queue(&gateway, "failed", 1.0);
    gateway.wait_empty();
    gateway.stop();
    assert!(holds(spool.path(), "to be found in the spool"), "{stage}");
    let gateway = setup.start();
    wait_queue(&gateway, "failed", 1.0);
    gateway.stop();
    assert!(sink.taken().is_empty());
    assert_eq!(sink.lines().iter().filter(|line| line.starts_with("MAIL")).count(), 1, "{stage}");
}

#[test]
fn a_message_refused_for_good_is_kept_and_not_tried_again() {
    for stage in ["MAIL", "DATA", "(content)"] {
        refused_for_good(stage);
    }
}

/// An address that refuses connections until somebody listens there; nobody else can take it.
fn reserved() -> (OwnedFd, SocketAddr) {
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};
    let fd = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&fd, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
    let address = SocketAddr::try_from(getsockname(&fd).unwrap()).unwrap();
    (fd, address)
}

/// R43, and R45: an outage fails nothing, however long.
#[test]
fn when_nothing_listens_mail_waits_and_all_goes_when_something_does() {
    let (socket, address) = reserved();
    let gateway = Setup::to(address).set("retry", "give_up_after = \"300ms\"").start();
    mail(&gateway, "m0@example.com", &["b@example.org"]);
    let closed = gateway.wait_event("closed", |_| true);
    assert_eq!(closed["stage"], "connect");
    assert!(closed["words"].as_str().unwrap().contains("refused"), "{closed}");
    let before = gateway.metric("mailsluice_attempts_total");
    for n in 1..10 {
        mail(&gateway, &format!("m{n}@example.com"), &["b@example.org"]);
    }
    // By the first probe all have waited longer than give_up_after.
    eventually("a probe", || (gateway.metric("mailsluice_attempts_total") > before).then_some(()));
    assert_eq!(gateway.metric("mailsluice_provider_open"), 0.0);
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"queued\"}"), 10.0);
    rustix::net::listen(&socket, 128).unwrap();
    let sink = Sink::on(TcpListener::from(socket), EXTENSIONS, |_| Answer::Usual);
    let taken = sink.wait(10);
    gateway.wait_event("opened", |_| true);
    gateway.wait_empty();
    assert_eq!(senders(&taken), (0..10).map(|n| format!("m{n}@example.com")).collect::<Vec<_>>());
    assert_eq!(gateway.metric("mailsluice_provider_open"), 1.0);
    let gateway = stop(gateway);
    assert_eq!(count(&gateway, "failed", |_| true), 0);
}

#[test]
fn an_upstream_that_is_down_sees_one_connection_a_second_at_most() {
    let works = Switch::default();
    let refused = Arc::new(AtomicUsize::new(0));
    let sink = Sink::scripted({
        let (works, refused) = (works.clone(), Arc::clone(&refused));
        move |ask| match ask.is_greeting() && !works.is_on() {
            true => {
                refused.fetch_add(1, SeqCst);
                Answer::reply("421 4.3.2 down for maintenance")
            }
            false => Answer::Usual,
        }
    });
    let gateway = Setup::to(sink.address).start();
    mail(&gateway, "m0@example.com", &["b@example.org"]);
    gateway.wait_event("closed", |_| true);
    for n in 1..20 {
        mail(&gateway, &format!("m{n}@example.com"), &["b@example.org"]);
    }
    eventually("a probe", || (refused.load(SeqCst) >= 2).then_some(()));
    works.turn();
    let first = sink.wait(1).remove(0);
    assert_ne!(first.from, "m0@example.com", "each probe is another message");
    sink.wait(20);
    gateway.wait_event("opened", |_| true);
    gateway.wait_empty();
    for pair in sink.opened()[..3].windows(2) {
        assert!(pair[1] - pair[0] >= Duration::from_millis(990), "{pair:?}");
    }
    gateway.stop();
    assert_eq!(sink.taken().len(), 20);
}

/// R44.
#[test]
fn a_poison_message_delays_no_other() {
    let sink = Sink::scripted(|ask| match ask.is("MAIL FROM:<poison@") {
        true => Answer::Drop,
        false => Answer::Usual,
    });
    let gateway = Setup::to(sink.address).start();
    let poison = mail(&gateway, "poison@example.com", &["b@example.org"]);
    gateway.wait_event("deferred", |event| event["id"] == poison.as_str());
    let mut client = Client::hello(gateway.smtp());
    for n in 0..30 {
        client.mail(&format!("m{n}@example.com"), &["b@example.org"], SMALL);
    }
    sink.wait(30);
    eventually("another try of the poison", || {
        (count(&gateway, "deferred", |event| event["id"] == poison.as_str()) >= 3).then_some(())
    });
    wait_queue(&gateway, "queued", 1.0);
    drop(client);
    let gateway = stop(gateway);
    assert_eq!(count(&gateway, "deferred", |event| event["id"] != poison.as_str()), 0);
    assert_eq!(count(&gateway, "closed", |_| true), 0);
    assert_eq!(sink.taken().len(), 30);
}

#[test]
fn one_deferred_domain_delays_no_other() {
    let sink = Sink::scripted(|ask| match ask.is("RCPT") && ask.line.contains("@slow.example>") {
        true => Answer::reply("451 4.4.1 no answer from slow.example"),
        false => Answer::Usual,
    });
    let gateway = Setup::to(sink.address).set("throttle", "concurrency = 2").start();
    let mut client = Client::hello(gateway.smtp());
    for n in 0..30 {
        let domain = if n % 3 == 0 { "slow.example" } else { "quick.example" };
        client.mail(&format!("m{n}@example.com"), &[&format!("b@{domain}")], SMALL);
    }
    sink.wait(20);
    wait_queue(&gateway, "queued", 10.0);
    let to = |event: &Value, domain| event["to"].as_str().unwrap().ends_with(domain);
    drop(client);
    let gateway = stop(gateway);
    assert_eq!(count(&gateway, "deferred", |event| to(event, "quick.example")), 0);
    assert_eq!(count(&gateway, "closed", |_| true), 0);
    assert_eq!(sink.taken().len(), 20);
}

#[test]
fn an_account_refusal_of_one_message_closes_nothing_and_bounces_nothing() {
    let works = Switch::default();
    let sink = Sink::scripted({
        let works = works.clone();
        move |ask| match ask.is("MAIL FROM:<blocked@") && !works.is_on() {
            true => Answer::reply("550 5.1.8 Access denied, bad outbound sender"),
            false => Answer::Usual,
        }
    });
    let gateway = Setup::to(sink.address).set("retry", "give_up_after = \"300ms\"").start();
    let blocked = mail(&gateway, "blocked@example.com", &["b@example.org"]);
    let mut client = Client::hello(gateway.smtp());
    for n in 0..10 {
        client.mail(&format!("m{n}@example.com"), &["b@example.org"], SMALL);
        // In step with the refusals, so that there is something between them that passed.
        gateway.wait_event("held", |event| event["id"] == blocked.as_str());
        sink.wait(n + 1);
    }
    eventually("more tries", || {
        (count(&gateway, "held", |event| event["id"] == blocked.as_str()) >= 4).then_some(())
    });
    wait_queue(&gateway, "queued", 1.0);
    works.turn();
    sink.wait(11);
    gateway.wait_empty();
    drop(client);
    let gateway = stop(gateway);
    assert_eq!(count(&gateway, "closed", |_| true), 0);
    assert_eq!(count(&gateway, "failed", |_| true), 0);
    assert_eq!(sink.taken().len(), 11);
}

#[test]
fn an_account_that_may_not_send_bounces_nothing_and_says_so() {
    let works = Switch::default();
    let sink = Sink::scripted({
        let works = works.clone();
        move |ask| match ask.is("MAIL") && !works.is_on() {
            true => Answer::reply("530 5.7.57 Client not authenticated to send mail"),
            false => Answer::Usual,
        }
    });
    let gateway = Setup::to(sink.address).set("retry", "give_up_after = \"300ms\"").start();
    for n in 0..5 {
        mail(&gateway, &format!("m{n}@example.com"), &["b@example.org"]);
    }
    let closed = gateway.wait_event("closed", |_| true);
    assert_eq!(closed["words"], "530 5.7.57 Client not authenticated to send mail");
    let ready = "ready; deliveries wait: 530 5.7.57 Client not authenticated to send mail (mail); the server \
                 wants a login: are provider.auth, provider.username and its password set?\n";
    assert_eq!(gateway.get("/readyz"), (200, ready.to_owned()));
    assert_eq!(gateway.metric("mailsluice_provider_open"), 0.0);
    // A probe more, which has the same answer.
    let refused = count(&gateway, "held", |_| true);
    eventually("a probe", || (count(&gateway, "held", |_| true) > refused).then_some(()));
    works.turn();
    sink.wait(5);
    gateway.wait_event("opened", |_| true);
    gateway.wait_empty();
    assert_eq!(gateway.get("/readyz"), (200, "ready\n".to_owned()));
    let gateway = stop(gateway);
    assert_eq!(count(&gateway, "failed", |_| true), 0);
    assert_eq!(
        senders(&sink.taken()),
        (0..5).map(|n| format!("m{n}@example.com")).collect::<Vec<_>>()
    );
}

#[test]
fn what_speaks_of_the_account_holds_the_queue_wherever_it_is_said() {
    for (asked, reply, scope) in [
        ("MAIL", "550 5.7.708 Service unavailable. Access denied", "provider"),
        ("RCPT", "550 5.7.708 Service unavailable. Access denied", "provider"),
        ("(content)", "550 5.7.708 Service unavailable. Access denied", "provider"),
        ("(content)", "550 5.1.8 Access denied, bad outbound sender", "provider"),
        ("MAIL", "550 5.4.5 Daily user sending limit exceeded", "sender"),
        ("(content)", "550 5.4.5 Daily user sending limit exceeded", "sender"),
    ] {
        let sink = Sink::scripted(move |ask| match ask.is(asked) {
            true => Answer::reply(reply),
            false => Answer::Usual,
        });
        let gateway = Setup::to(sink.address).set("retry", "give_up_after = \"300ms\"").start();
        for n in 0..3 {
            mail(&gateway, &format!("m{n}@example.com"), &["b@example.org"]);
        }
        let closed = gateway.wait_event("closed", |_| true);
        assert_eq!((&closed["words"], &closed["scope"]), (&reply.into(), &scope.into()), "{asked}");
        wait_queue(&gateway, "queued", 3.0);
        let gateway = stop(gateway);
        assert_eq!(count(&gateway, "failed", |_| true), 0, "{asked} {reply}");
    }
}

#[test]
fn a_recipient_that_is_deferred_too_long_fails_with_its_last_words() {
    let sink = Sink::scripted(|ask| match ask.is("RCPT TO:<full@") {
        true => Answer::reply("452 4.2.2 mailbox full"),
        false => Answer::Usual,
    });
    let gateway = Setup::to(sink.address).set("retry", "give_up_after = \"300ms\"").start();
    let id = mail(&gateway, "a@example.com", &["full@example.org", "good@example.org"]);
    let failed = gateway.wait_event("failed", |event| event["id"] == id.as_str());
    assert_eq!(failed["to"], "full@example.org");
    let words = failed["words"].as_str().unwrap();
    assert!(words.ends_with("last: 452 4.2.2 mailbox full"), "{words}");
    wait_queue(&gateway, "failed", 1.0);
    gateway.wait_empty();
    // The failure came with an attempt: as many refusals as tries.
    let tries = sink.lines().iter().filter(|line| line.starts_with("RCPT TO:<full@")).count();
    assert!(tries >= 3, "{tries}");
    let gateway = stop(gateway);
    assert_eq!(count(&gateway, "deferred", |event| event["to"] == "full@example.org"), tries);
    assert_eq!(deliveries(&sink.taken()), BTreeMap::from([("good@example.org".to_owned(), 1)]));
}

#[test]
fn many_messages_go_over_few_connections() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).set("throttle", "concurrency = 1").start();
    let mut client = Client::hello(gateway.smtp());
    for n in 0..130 {
        client.mail(&format!("m{n}@example.com"), &["b@example.org"], SMALL);
    }
    sink.wait(130);
    gateway.wait_empty();
    drop(client);
    gateway.stop();
    assert_eq!(sink.connections(), 2, "a hundred messages a connection");
    let quits = sink.lines().iter().filter(|line| *line == "QUIT").count();
    assert_eq!(quits, 2, "it takes leave");
}

#[test]
fn a_421_on_a_reused_connection_is_tried_at_once_on_a_new_one() {
    let sink = Sink::scripted(|ask| match ask.is("MAIL") && ask.mails == 2 {
        true => Answer::RawThenDrop(b"421 4.3.2 too many messages\r\n".to_vec()),
        false => Answer::Usual,
    });
    let gateway = Setup::to(sink.address).set("throttle", "concurrency = 1").start();
    for n in 0..3 {
        mail(&gateway, &format!("m{n}@example.com"), &["b@example.org"]);
        sink.wait(n + 1);
    }
    gateway.wait_empty();
    let gateway = stop(gateway);
    assert_eq!(count(&gateway, "deferred", |_| true), 0);
    assert_eq!((sink.connections(), sink.taken().len()), (2, 3));
}

#[test]
fn an_upstream_that_closes_idle_connections_costs_nothing() {
    for last in [&b"250 2.0.0 taken\r\n"[..], b"250 2.0.0 taken\r\n421 4.4.2 idle\r\n"] {
        let sink = Sink::scripted(move |ask| match ask.is_content() {
            true => Answer::RawThenDrop(last.to_vec()),
            false => Answer::Usual,
        });
        let gateway = Setup::to(sink.address).start();
        for n in 0..10 {
            mail(&gateway, &format!("m{n}@example.com"), &["b@example.org"]);
            sink.wait(n + 1);
        }
        gateway.wait_empty();
        let gateway = stop(gateway);
        assert_eq!(count(&gateway, "deferred", |_| true), 0);
        assert_eq!(count(&gateway, "in_doubt", |_| true), 0);
        assert_eq!(sink.taken().len(), 10);
    }
}

/// What is sent to a server with these extensions.
#[track_caller]
fn sent(extensions: &[&str], mail: &str, rcpts: &[&str], content: impl AsRef<[u8]>) -> Taken {
    let sink = Sink::with(extensions, |_| Answer::Usual);
    let gateway = Setup::to(sink.address).start();
    let mut client = Client::hello(gateway.smtp());
    client.command(mail, 250);
    for rcpt in rcpts {
        client.command(rcpt, 250);
    }
    client.command("DATA", 354);
    client.send(stuffed(content.as_ref()));
    client.expect(250);
    let taken = sink.wait(1).remove(0);
    gateway.wait_empty();
    drop(client);
    gateway.stop();
    assert_eq!(sink.taken().len(), 1);
    taken
}

const RCPTS: [&str; 3] =
    ["RCPT TO:<b@example.org>", "RCPT TO:<c@example.org>", "RCPT TO:<d@example.org>"];

#[test]
fn an_upstream_with_and_without_pipelining_is_served() {
    for extensions in [&["PIPELINING"][..], &[]] {
        let taken = sent(extensions, "MAIL FROM:<a@example.com>", &RCPTS, SMALL);
        assert_eq!(taken.to, ["b@example.org", "c@example.org", "d@example.org"]);
        assert_eq!(taken.mail_line, "MAIL FROM:<a@example.com>");
        assert_eq!(taken.original(), SMALL.as_bytes());
    }
}

#[test]
fn an_upstream_that_knows_only_helo_is_served() {
    let sink = Sink::scripted(|ask| match ask.is("EHLO") {
        true => Answer::reply("502 what is that"),
        false => Answer::Usual,
    });
    let gateway = Setup::to(sink.address).start();
    mail(&gateway, "a@example.com", &["b@example.org"]);
    assert_eq!(sink.wait(1)[0].mail_line, "MAIL FROM:<a@example.com>");
    gateway.wait_empty();
    assert_eq!(sink.lines()[..2], ["EHLO relay.test", "HELO relay.test"]);
    gateway.stop();
}

#[test]
fn body_is_declared_by_what_the_content_holds() {
    let plain = "Subject: x\r\n\r\nplain\r\n".as_bytes();
    let eight = "Subject: x\r\n\r\nnaïve \u{fffd}\r\n".as_bytes();
    for (declared, content, expected) in [
        ("", plain, ""),
        (" BODY=8BITMIME", plain, ""),
        ("", eight, " BODY=8BITMIME"),
        (" BODY=7BIT", eight, " BODY=8BITMIME"),
    ] {
        let line = format!("MAIL FROM:<a@example.com>{declared}");
        let taken = sent(&["8BITMIME"], &line, &RCPTS[..1], content);
        assert_eq!(taken.mail_line, format!("MAIL FROM:<a@example.com>{expected}"), "{declared}");
        assert_eq!(taken.original(), content);
    }
    // As Postfix does: what an upstream did not offer to take is sent as it is.
    let taken = sent(&[], "MAIL FROM:<a@example.com> BODY=8BITMIME", &RCPTS[..1], eight);
    assert_eq!(taken.mail_line, "MAIL FROM:<a@example.com>");
    assert_eq!(taken.original(), eight);
}

#[test]
fn smtputf8_is_asked_for_only_where_the_message_needs_it() {
    let offered = &["8BITMIME", "SMTPUTF8"];
    let ascii = "Subject: x\r\n\r\nplain\r\n";
    let line = |mail| format!("{mail} SMTPUTF8");
    let taken = sent(offered, &line("MAIL FROM:<a@example.com>"), &RCPTS[..1], ascii);
    assert_eq!(taken.mail_line, "MAIL FROM:<a@example.com>");
    let taken = sent(offered, &line("MAIL FROM:<jörg@example.com>"), &RCPTS[..1], ascii);
    assert_eq!(taken.mail_line, "MAIL FROM:<jörg@example.com> SMTPUTF8");
    let rcpts = ["RCPT TO:<δοκιμή@παράδειγμα.example>"];
    let taken = sent(offered, &line("MAIL FROM:<a@example.com>"), &rcpts, ascii);
    assert_eq!(taken.mail_line, "MAIL FROM:<a@example.com> SMTPUTF8");
    assert_eq!(taken.to, ["δοκιμή@παράδειγμα.example"]);
}

#[test]
fn a_recipient_that_an_upstream_cannot_be_told_fails_alone() {
    let sink = Sink::with(&["8BITMIME"], |_| Answer::Usual);
    let gateway = Setup::to(sink.address).start();
    let mut client = Client::hello(gateway.smtp());
    client.command("MAIL FROM:<a@example.com> SMTPUTF8", 250);
    client.command("RCPT TO:<jörg@example.org>", 250);
    client.command("RCPT TO:<b@example.org>", 250);
    client.command("DATA", 354);
    client.send(stuffed(SMALL.as_bytes()));
    client.expect(250);
    let failed = gateway.wait_event("failed", |_| true);
    assert_eq!(failed["to"], "jörg@example.org");
    assert_eq!(failed["stage"], "local");
    assert_eq!(sink.wait(1)[0].to, ["b@example.org"]);
    wait_queue(&gateway, "failed", 1.0);

    // A reverse path that cannot be told fails the message, and closes nothing.
    client.command("MAIL FROM:<jörg@example.com> SMTPUTF8", 250);
    client.command("RCPT TO:<b@example.org>", 250);
    client.command("DATA", 354);
    client.send(stuffed(SMALL.as_bytes()));
    client.expect(250);
    wait_queue(&gateway, "failed", 2.0);
    drop(client);
    let gateway = stop(gateway);
    assert_eq!(count(&gateway, "closed", |_| true), 0);
    assert_eq!(sink.taken().len(), 1);
}

#[test]
fn a_message_too_large_for_the_upstream_fails_without_being_sent() {
    let sink = Sink::with(&["SIZE 2000"], |_| Answer::Usual);
    let gateway = Setup::to(sink.address).start();
    let mut client = Client::hello(gateway.smtp());
    let large = format!("{SMALL}{}\r\n", "x".repeat(2_000));
    let id = client.mail("a@example.com", &["b@example.org"], large);
    let failed = gateway.wait_event("failed", |event| event["id"] == id.as_str());
    assert_eq!((&failed["scope"], &failed["stage"]), (&"message".into(), &"local".into()));
    let words = failed["words"].as_str().unwrap();
    assert!(words.ends_with("octets, the server takes at most 2000"), "{words}");
    wait_queue(&gateway, "failed", 1.0);
    client.mail("a@example.com", &["b@example.org"], SMALL);
    let taken = sink.wait(1).remove(0);
    let size = format!("MAIL FROM:<a@example.com> SIZE={}", taken.content.len());
    assert_eq!(taken.mail_line, size, "what is sent, all of it");
    drop(client);
    gateway.stop();
    assert_eq!(sink.lines().iter().filter(|line| line.starts_with("MAIL")).count(), 1);
}

#[test]
fn dsn_parameters_are_passed_on_as_they_came() {
    let mail = "MAIL FROM:<a@example.com> RET=HDRS ENVID=QQ+2B314159";
    let rcpts = [
        "RCPT TO:<b@example.org> NOTIFY=SUCCESS,FAILURE,DELAY ORCPT=rfc822;Bob+2Bx@example.org",
        "RCPT TO:<c@example.org> NOTIFY=NEVER",
        "RCPT TO:<d@example.org>",
    ];
    let taken = sent(&["DSN", "PIPELINING"], mail, &rcpts, SMALL);
    assert_eq!(taken.mail_line, mail);
    assert_eq!(taken.rcpt_lines, rcpts);
    let taken = sent(&["PIPELINING"], mail, &rcpts, SMALL);
    assert_eq!(taken.mail_line, "MAIL FROM:<a@example.com>");
    assert_eq!(taken.rcpt_lines, ["RCPT TO:<b@example.org>", RCPTS[1], RCPTS[2]]);
}

/// Sends one message to 250 recipients, and expects each to get it once, in parts of these sizes.
#[track_caller]
fn check_parts(sink: &Sink, parts: &[usize]) {
    let gateway = Setup::to(sink.address).start();
    let to: Vec<String> = (0..250).map(|n| format!("r{n}@example.org")).collect();
    let to: Vec<&str> = to.iter().map(String::as_str).collect();
    mail(&gateway, "a@example.com", &to);
    let taken = sink.wait(parts.len());
    gateway.wait_empty();
    gateway.stop();
    assert_eq!(taken.iter().map(|taken| taken.to.len()).collect::<Vec<_>>(), parts);
    assert_eq!(sink.taken().len(), parts.len());
    let deliveries = deliveries(&taken);
    assert_eq!(deliveries.len(), 250);
    assert!(deliveries.values().all(|times| *times == 1));
}

#[test]
fn many_recipients_are_sent_in_parts_each_once() {
    check_parts(&Sink::new(), &[100, 100, 50]);
    check_parts(&Sink::with(&[], |_| Answer::Usual), &[100, 100, 50]);
}

#[test]
fn an_upstream_that_takes_fewer_recipients_gets_them_in_smaller_parts() {
    let sink = Sink::scripted(|ask| match ask.is("RCPT") && ask.to.len() >= 80 {
        true => Answer::reply("452 4.5.3 too many recipients"),
        false => Answer::Usual,
    });
    // The rest of the first part goes at once, and the number is remembered.
    check_parts(&sink, &[80, 80, 80, 10]);
    let is_rcpt = |line: &&String| line.starts_with("RCPT");
    // The hundredth of the first part was not asked for.
    assert_eq!(sink.lines().iter().filter(is_rcpt).count(), 99 + 80 + 80 + 10);
}

#[test]
fn no_more_messages_are_under_way_than_the_throttle_allows() {
    let go = Switch::default();
    let under_way = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let sink = Sink::scripted({
        let (go, under_way, most) = (go.clone(), Arc::clone(&under_way), Arc::clone(&most));
        move |ask| {
            if ask.is("MAIL") {
                most.fetch_max(under_way.fetch_add(1, SeqCst) + 1, SeqCst);
            }
            if ask.is_content() {
                go.wait();
                under_way.fetch_sub(1, SeqCst);
            }
            Answer::Usual
        }
    });
    let gateway = Setup::to(sink.address).set("throttle", "concurrency = 2").start();
    let mut client = Client::hello(gateway.smtp());
    for n in 0..20 {
        client.mail(&format!("m{n}@example.com"), &["b@example.org"], SMALL);
    }
    wait_queue(&gateway, "queued", 20.0);
    eventually("two under way", || (under_way.load(SeqCst) == 2).then_some(()));
    assert_eq!(gateway.metric("mailsluice_in_flight_messages"), 2.0);
    go.turn();
    sink.wait(20);
    gateway.wait_empty();
    drop(client);
    gateway.stop();
    assert_eq!(most.load(SeqCst), 2);
    assert_eq!(sink.connections(), 2);
}

/// R41.
#[test]
fn one_hung_connection_delays_nothing_else() {
    let sink = Sink::scripted(|ask| match ask.is_content() && ask.from.starts_with("hangs@") {
        true => Answer::Hang,
        false => Answer::Usual,
    });
    let gateway = Setup::to(sink.address).start();
    mail(&gateway, "hangs@example.com", &["b@example.org"]);
    eventually("the hang", || {
        sink.lines().iter().any(|line| line.starts_with("MAIL FROM:<hangs@")).then_some(())
    });
    let mut client = Client::hello(gateway.smtp());
    for n in 0..20 {
        client.mail(&format!("m{n}@example.com"), &["b@example.org"], SMALL);
    }
    sink.wait(20);
    wait_queue(&gateway, "queued", 1.0);
    assert_eq!(count(&gateway, "closed", |_| true), 0);
}

#[test]
fn an_upstream_where_everything_hangs_never_stops_acceptance() {
    let sink = Sink::scripted(|_| Answer::Hang);
    let gateway = Setup::to(sink.address).start();
    let mut client = Client::hello(gateway.smtp());
    for n in 0..60 {
        client.mail(&format!("m{n}@example.com"), &["b@example.org"], SMALL);
    }
    wait_queue(&gateway, "queued", 60.0);
    assert_eq!(gateway.metric("mailsluice_in_flight_messages"), 20.0);
    assert_eq!(gateway.get("/readyz").0, 200);
}

#[test]
fn a_message_that_could_not_be_read_for_a_moment_was_held_until_a_restart() {
    let works = Switch::default();
    let sink = Sink::scripted({
        let works = works.clone();
        move |ask| match ask.is("RCPT") && !works.is_on() {
            true => Answer::reply("450 4.2.0 busy"),
            false => Answer::Usual,
        }
    });
    let gateway = Setup::to(sink.address).start();
    // Over a mebibyte: it lies in a file of its own, and not in one that is open anyway.
    let content = format!("{SMALL}{}", "0123456789\r\n".repeat(100_000));
    let mut client = Client::hello(gateway.smtp());
    let id = client.mail("a@example.com", &["b@example.org"], content);
    gateway.wait_event("deferred", |event| event["id"] == id.as_str());
    // Without descriptors the file cannot be opened that the message lies in.
    let pid = Pid::from_raw(i32::try_from(gateway.pid()).unwrap());
    let limit = |limit| prlimit(pid, Resource::Nofile, limit).unwrap();
    // The hard limit is inherited; lowered, an ordinary user could not raise it again.
    let maximum = getrlimit(Resource::Nofile).maximum;
    let before = limit(Rlimit { current: Some(0), maximum });
    gateway
        .wait_event("deferred", |event| event["id"] == id.as_str() && event["error"].is_string());
    works.turn();
    limit(before);
    sink.wait(1);
    gateway.wait_empty();
    gateway.stop();
    assert_eq!(sink.taken().len(), 1);
}

/// Two messages that break every connection close the gate, and then took the probes in turn: a good one waited.
#[test]
fn poison_that_closed_the_gate_kept_a_good_message_waiting() {
    let sink = Sink::scripted(|ask| match ask.is("MAIL") && ask.line.contains("poison") {
        true => Answer::Drop,
        false => Answer::Usual,
    });
    let gateway = Setup::to(sink.address).start();
    for n in 0..2 {
        mail(&gateway, &format!("poison{n}@example.com"), &["b@example.org"]);
    }
    gateway.wait_event("closed", |_| true);
    let poison =
        |from: usize| sink.lines()[from..].iter().filter(|line| line.contains("poison")).count();
    eventually("a probe", || (poison(0) >= 3).then_some(()));
    let seen = sink.lines().len();
    mail(&gateway, "good@example.com", &["b@example.org"]);
    sink.wait(1);
    // The other of the two may be tried before; the one that was the last probe not.
    assert!(poison(seen) <= 1, "{:?}", sink.lines());
}

/// A message whose answer is lost each time went out again and again.
#[test]
fn a_second_doubt_holds_the_message() {
    let sink = Sink::scripted(|ask| match ask.is_content() {
        true => Answer::TakeAndDrop,
        false => Answer::Usual,
    });
    let gateway = Setup::to(sink.address).start();
    let id = mail(&gateway, "a@example.com", &["b@example.org"]);
    let held = gateway.wait_event("held", |event| event["id"] == id.as_str());
    assert!(held["message"].as_str().unwrap().contains("may have been taken twice"), "{held}");
    eventually("the message to be held", || {
        (gateway.metric("mailsluice_queue_messages{state=\"held\"}") == 1.0).then_some(())
    });
    assert_eq!(gateway.metric("mailsluice_in_doubt_total"), 2.0);
    let spool = gateway.kill();
    let gateway = Setup::to(sink.address).spool(&spool.path().join("spool")).start();
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"held\"}"), 1.0);
    gateway.stop();
    assert_eq!(sink.taken().len(), 2);
}

#[test]
fn with_hold_a_lost_answer_makes_no_duplicate() {
    let sink = Sink::scripted(|ask| match ask.is_content() {
        true => Answer::TakeAndDrop,
        false => Answer::Usual,
    });
    let gateway = Setup::to(sink.address).set("retry", "in_doubt = \"hold\"").start();
    let id = mail(&gateway, "a@example.com", &["b@example.org"]);
    let held = gateway.wait_event("held", |event| event["id"] == id.as_str());
    assert!(held["message"].as_str().unwrap().contains("by retry.in_doubt"), "{held}");
    wait_queue(&gateway, "held", 1.0);
    let gateway = stop(gateway);
    assert_eq!((count(&gateway, "in_doubt", |_| true), sink.taken().len()), (0, 1));
}

/// The process is killed while it waits for the answer.
#[test]
fn with_hold_a_kill_makes_no_duplicate() {
    let met = Switch::default();
    let sink = Sink::scripted({
        let met = met.clone();
        move |ask| match ask.is_content() {
            true => {
                met.0.store(true, SeqCst);
                Answer::Hang
            }
            false => Answer::Usual,
        }
    });
    let setup = Setup::to(sink.address).set("retry", "in_doubt = \"hold\"");
    let gateway = setup.start();
    mail(&gateway, "a@example.com", &["b@example.org"]);
    met.wait();
    let spool = gateway.kill();
    let gateway = setup.spool(&spool.path().join("spool")).start();
    wait_queue(&gateway, "held", 1.0);
    let gateway = stop(gateway);
    assert_eq!(sink.lines().iter().filter(|line| *line == "DATA").count(), 1);
    assert_eq!(count(&gateway, "held", |_| true), 1);
}

/// An upstream that takes three connections at once was taken for one that is down, over and over.
#[test]
fn an_upstream_that_takes_few_connections_was_called_down() {
    let open = Arc::new(AtomicUsize::new(0));
    let sink = Sink::scripted({
        let open = Arc::clone(&open);
        move |ask| {
            if ask.is_greeting() && open.fetch_add(1, SeqCst) >= 3 {
                open.fetch_sub(1, SeqCst);
                return Answer::RawThenDrop(b"421 4.7.0 too many connections\r\n".to_vec());
            }
            if ask.is("QUIT") {
                open.fetch_sub(1, SeqCst);
            }
            Answer::Usual
        }
    });
    let gateway = Setup::to(sink.address).start();
    // One is served first, so that the server is known to work.
    mail(&gateway, "m@example.com", &["b@example.org"]);
    sink.wait(1);
    let address = gateway.smtp();
    std::thread::scope(|scope| {
        for client in 0..10 {
            scope.spawn(move || {
                let mut connection = Client::hello(address);
                for n in 0..20 {
                    connection.mail(
                        &format!("m{client}-{n}@example.com"),
                        &["b@example.org"],
                        "Subject: x\r\n\r\n",
                    );
                }
            });
        }
    });
    sink.wait(201);
    gateway.wait_empty();
    let gateway = stop(gateway);
    assert_eq!(count(&gateway, "closed", |_| true), 0, "{}", gateway.log_text());
    assert_eq!(count(&gateway, "failed", |_| true), 0);
    assert_eq!(sink.taken().len(), 201);
}
