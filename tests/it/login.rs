//! Upstreams that want TLS or a login.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::support::client::Client;
use crate::support::gateway::{Gateway, Setup};
use crate::support::peers::{Postfix, Secured};
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
        let password = folder.path().join("password");
        fs::write(&password, "p w\n").unwrap();
        fs::set_permissions(&password, Permissions::from_mode(0o600)).unwrap();
        let gateway = Setup::to(sink.address)
            .set("provider", "auth = \"password\"")
            .set("provider", "username = \"name\"")
            .set("provider", &format!("password_file = \"{}\"", password.display()))
            .start();
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
