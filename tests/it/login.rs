//! Upstreams that want TLS or a login.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::peers::{MESSAGE, expect_message, original};
use crate::support::client::Client;
use crate::support::eventually;
use crate::support::gateway::{Gateway, Setup};
use crate::support::peers::{self, Postfix, Secured, USER};
use crate::support::sink::{Answer, Sink};

const SMALL: &str = "Subject: hi\r\nMessage-ID: <hi@example.com>\r\nDate: Tue, 24 Nov 2026 06:42:11 +0000\r\n\r\nhello\r\n";

#[track_caller]
fn mail(gateway: &Gateway, from: &str) {
    Client::hello(gateway.smtp()).mail(from, &["b@example.org"], SMALL);
}

/// The root, and the server's certificate and key in one file, for 127.0.0.1.
pub fn certificates(folder: &Path) -> (PathBuf, PathBuf) {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_key = KeyPair::generate().unwrap();
    let root = ca.self_signed(&ca_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &Issuer::new(ca, ca_key)).unwrap();
    let (root_file, own) = (folder.join("root.pem"), folder.join("server.pem"));
    fs::write(&root_file, root.pem()).unwrap();
    fs::write(&own, format!("{}{}", key.serialize_pem(), certificate.pem())).unwrap();
    fs::set_permissions(&own, Permissions::from_mode(0o600)).unwrap();
    (root_file, own)
}

/// A file that only its owner may read, as the gateway insists.
pub fn password_file(folder: &Path, password: &str) -> PathBuf {
    let file = folder.join("password");
    fs::write(&file, format!("{password}\n")).unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    file
}

#[test]
fn postfix_takes_mail_over_starttls_and_over_tls() {
    let folder = tempfile::tempdir().unwrap();
    let (root, own) = certificates(folder.path());
    for (secured, security) in [(Secured::StartTls, "starttls"), (Secured::Tls, "tls")] {
        let sink = Sink::new();
        let Some(postfix) = Postfix::secured(sink.address, secured, &own) else { return };
        let setup = Setup::to(postfix.address)
            .set("provider", &format!("security = \"{security}\""))
            .set("provider", &format!("ca_file = \"{}\"", root.display()));
        let gateway = setup.start();
        for n in 0..3 {
            mail(&gateway, &format!("a{n}@example.com"));
        }
        let taken = sink.wait(3);
        assert!(taken.iter().all(|taken| taken.text().contains("TLSv1.3")), "{}", taken[0].text());
        assert!(taken.iter().all(|taken| taken.text().ends_with("\r\n\r\nhello\r\n")));
        gateway.wait_empty();
        gateway.stop();

        // Without the root nobody proves who it is, and nothing is sent.
        let gateway = Setup::to(postfix.address)
            .set("provider", &format!("security = \"{security}\""))
            .start();
        mail(&gateway, "a@example.com");
        let closed = gateway.wait_event("closed", |_| true);
        let says = closed["words"].as_str().unwrap();
        assert!(says.contains("UnknownIssuer") && says.contains("provider.ca_file"), "{says}");
        let (status, ready) = gateway.get("/readyz");
        assert!(status == 200 && ready.contains("UnknownIssuer"), "{status} {ready}");
        gateway.stop();
        assert_eq!(sink.taken().len(), 3);
    }
}

/// A gateway to a Postfix that takes mail by STARTTLS.
fn over_starttls(postfix: &Postfix, root: &Path) -> Setup {
    Setup::to(postfix.address)
        .set("provider", "security = \"starttls\"")
        .set("provider", &format!("ca_file = \"{}\"", root.display()))
}

#[test]
fn postfix_takes_mail_after_a_login_by_plain_or_login() {
    let folder = tempfile::tempdir().unwrap();
    let (root, own) = certificates(folder.path());
    let password = password_file(folder.path(), peers::PASSWORD);
    for (secured, security, offer, used) in [
        (Secured::StartTls, "starttls", "plain login", "PLAIN"),
        (Secured::StartTls, "starttls", "login", "LOGIN"),
        (Secured::Tls, "tls", "plain", "PLAIN"),
    ] {
        let sink = Sink::new();
        let postfix = Postfix::with_login(sink.address, secured, &own, offer);
        let Some(postfix) = postfix else { return };
        let setup = over_starttls(&postfix, &root).login(USER, &password);
        let gateway = setup.set("provider", &format!("security = \"{security}\"")).start();
        let to = ["b@example.org", "c@example.org"];
        Client::hello(gateway.smtp()).mail("a@example.com", &to, MESSAGE);
        let taken = sink.wait(1).remove(0);
        assert_eq!(
            (taken.from.as_str(), taken.to.as_slice()),
            ("a@example.com", &to.map(str::to_owned)[..])
        );
        expect_message(&original(&taken));
        let text = taken.text();
        assert!(
            text.contains(" with ESMTPSA id ") && text.contains("Authenticated sender: name)"),
            "{text}"
        );
        gateway.wait_empty();
        gateway.stop();
        let log = postfix.log();
        assert!(log.contains(&format!("sasl_method={used}, sasl_username=name")), "{log}");
        assert_eq!(sink.taken().len(), 1);
    }
}

#[test]
fn a_wrong_password_at_postfix_bounces_nothing_and_the_right_one_delivers_all_once() {
    let folder = tempfile::tempdir().unwrap();
    let (root, own) = certificates(folder.path());
    let sink = Sink::new();
    let postfix = Postfix::with_login(sink.address, Secured::StartTls, &own, "plain login");
    let Some(postfix) = postfix else { return };
    let wrong = password_file(folder.path(), "not p w");
    // Long past while the password is wrong: what waits for the provider's fault is not given up.
    let setup = over_starttls(&postfix, &root)
        .set("retry", "give_up_after = \"300ms\"")
        .spool(&folder.path().join("spool"))
        .login(USER, &wrong);
    let gateway = setup.start();
    for n in 0..5 {
        mail(&gateway, &format!("a{n}@example.com"));
    }
    let words = "535 5.7.8 Error: authentication failed: (reason unavailable)";
    let closed = gateway.wait_event("closed", |_| true);
    assert_eq!(closed["words"], words);
    assert_eq!((&closed["scope"], &closed["stage"]), (&"provider".into(), &"auth".into()));
    let ready = format!(
        "ready; deliveries wait: {words} (auth); are provider.username and its password right?\n"
    );
    assert_eq!(gateway.get("/readyz"), (200, ready));
    // One more than there are messages: a probe, which has the same answer.
    eventually("a probe", || {
        (postfix.log().matches("SASL PLAIN authentication failed").count() > 5).then_some(())
    });
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"queued\"}"), 5.0);
    assert!(gateway.events().iter().all(|event| event["event"] != "failed"));
    assert!(!gateway.log_text().contains("not p w"));
    gateway.stop();
    assert!(sink.taken().is_empty());

    password_file(folder.path(), peers::PASSWORD);
    let gateway = setup.start();
    let mut taken = sink.wait(5);
    gateway.wait_empty();
    assert!(gateway.events().iter().all(|event| event["event"] != "failed"));
    assert_eq!(gateway.get("/readyz"), (200, "ready\n".to_owned()));
    gateway.stop();
    assert_eq!(sink.taken().len(), 5);
    taken.sort_by(|a, b| a.from.cmp(&b.from));
    for (n, taken) in taken.iter().enumerate() {
        assert_eq!(taken.from, format!("a{n}@example.com"));
        assert_eq!(taken.to, ["b@example.org"]);
        assert_eq!(original(taken), SMALL.as_bytes());
    }
}

#[test]
fn a_postfix_that_relays_for_nobody_without_a_login_fails_the_recipient() {
    let folder = tempfile::tempdir().unwrap();
    let (root, own) = certificates(folder.path());
    let sink = Sink::new();
    let postfix = Postfix::with_login(sink.address, Secured::StartTls, &own, "plain login");
    let Some(postfix) = postfix else { return };
    let gateway = over_starttls(&postfix, &root).start();
    mail(&gateway, "a@example.com");
    let failed = gateway.wait_event("failed", |_| true);
    assert_eq!(failed["words"], "554 5.7.1 <b@example.org>: Relay access denied");
    assert_eq!((&failed["scope"], &failed["stage"]), (&"recipient".into(), &"rcpt".into()));
    eventually("the message to be kept as failed", || {
        (gateway.metric("mailsluice_queue_messages{state=\"failed\"}") == 1.0).then_some(())
    });
    gateway.wait_empty();
    // It is the recipient's fault: deliveries go on.
    assert_eq!(gateway.get("/readyz"), (200, "ready\n".to_owned()));
    assert!(gateway.events().iter().all(|event| event["event"] != "closed"));
    gateway.stop();
    assert!(sink.taken().is_empty());
}

#[test]
fn a_server_without_starttls_gets_nothing_in_clear() {
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).set("provider", "security = \"starttls\"").start();
    mail(&gateway, "a@example.com");
    let closed = gateway.wait_event("closed", |_| true);
    assert!(closed["words"].as_str().unwrap().starts_with("the server does not offer STARTTLS"));
    gateway.stop();
    let lines = sink.lines();
    assert!(lines.iter().all(|line| line.starts_with("EHLO")), "{lines:?}");
}

/// `name` and `p w` as AUTH PLAIN and LOGIN write them.
const PLAIN: &str = "AG5hbWUAcCB3";
const NAME: &str = "bmFtZQ==";
const PASSWORD: &str = "cCB3";

#[test]
fn a_login_that_is_refused_bounces_nothing_and_the_password_is_never_shown() {
    for (offer, login) in [("AUTH PLAIN LOGIN", true), ("AUTH LOGIN", false)] {
        let refusals = AtomicUsize::new(0);
        let sink = Sink::with(&["PIPELINING", offer], move |ask| {
            let ends = if login { ask.is("AUTH PLAIN") } else { ask.line == PASSWORD };
            match ask.line {
                _ if ends && refusals.fetch_add(1, SeqCst) < 2 => {
                    Answer::reply("535 5.7.8 Error: authentication failed")
                }
                _ if ends => Answer::reply("235 2.7.0 in"),
                "AUTH LOGIN" => Answer::reply("334 VXNlcm5hbWU6"),
                NAME => Answer::reply("334 UGFzc3dvcmQ6"),
                _ => Answer::Usual,
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let password = password_file(folder.path(), "p w");
        let gateway = Setup::to(sink.address).login("name", &password).start();
        mail(&gateway, "a@example.com");
        let closed = gateway.wait_event("closed", |_| true);
        assert_eq!(closed["words"], "535 5.7.8 Error: authentication failed");
        assert_eq!((&closed["scope"], &closed["stage"]), (&"provider".into(), &"auth".into()));
        let taken = sink.wait(1).remove(0);
        assert_eq!(taken.from, "a@example.com");
        // A second probe that is answered opens the provider.
        mail(&gateway, "c@example.com");
        gateway.wait_event("opened", |_| true);
        gateway.wait_empty();
        assert!(gateway.events().iter().all(|event| event["event"] != "failed"));
        let log = gateway.log_text();
        for secret in [PLAIN, PASSWORD, "p w"] {
            assert!(!log.contains(secret), "{secret}");
        }
        gateway.stop();
        let lines = sink.lines();
        let first = lines.iter().position(|line| line.starts_with("MAIL")).unwrap();
        let expected = if login { format!("AUTH PLAIN {PLAIN}") } else { PASSWORD.to_owned() };
        assert_eq!(lines[first - 1], expected);
    }
}
