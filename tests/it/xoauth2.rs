//! An upstream that wants a token, and the server that gives it out.

use std::io::{BufRead, BufReader};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::login::password_file;
use crate::support::authority::Authority;
use crate::support::client::Client;
use crate::support::gateway::Setup;
use crate::support::sink::{Answer, Sink};

const SMALL: &str = "Subject: hi\r\nMessage-ID: <hi@example.com>\r\nDate: Tue, 24 Nov 2026 06:42:11 +0000\r\n\r\nhello\r\n";

const SECRET: &str = "cl1ent-s3cret~+/&";
const TOKEN: &str = "eyJ0eXAiOiJKV1QifQ.t0k3n.s1gn";

fn setup(sink: &Sink, authority: &Authority, folder: &Path) -> Setup {
    let secret = password_file(folder, SECRET);
    Setup::to(sink.address)
        .set("provider", "auth = \"xoauth2\"")
        .set("provider", "username = \"reports@contoso.com\"")
        .set("provider", "tenant_id = \"contoso.com\"")
        .set("provider", "client_id = \"client-1\"")
        .set("provider", &format!("client_secret_file = \"{}\"", secret.display()))
        .set("provider", &format!("endpoints = {{ login = \"http://{}\" }}", authority.address))
        .set("log", "level = \"trace\"")
}

fn blob(token: &str) -> String {
    BASE64.encode(format!("user=reports@contoso.com\x01auth=Bearer {token}\x01\x01"))
}

#[test]
fn mail_goes_by_token_and_no_secret_is_shown_anywhere() {
    let authority = Authority::granting(TOKEN);
    let right = format!("AUTH XOAUTH2 {}", blob(TOKEN));
    let expected = right.clone();
    let sink = Sink::with(&["PIPELINING", "AUTH XOAUTH2"], move |ask| match ask.line {
        line if line == expected => Answer::reply("235 2.7.0 in"),
        line if line.starts_with("AUTH") => Answer::reply("535 5.7.3 no"),
        _ => Answer::Usual,
    });
    let folder = tempfile::tempdir().unwrap();
    let gateway = setup(&sink, &authority, folder.path()).start();
    for n in 0..3 {
        Client::hello(gateway.smtp()).mail(&format!("a{n}@example.com"), &["b@example.org"], SMALL);
    }
    sink.wait(3);
    gateway.wait_empty();
    assert_eq!(gateway.metric("mailsluice_token_fetches_total{result=\"fetched\"}"), 1.0);
    assert!(gateway.metric("mailsluice_token_expiry_timestamp_seconds") > 1_700_000_000.0);
    let metrics = gateway.get("/metrics").1;
    let log = gateway.log_text();
    gateway.stop();
    for secret in [SECRET, TOKEN, "cl1ent", &blob(TOKEN)] {
        assert!(!log.contains(secret) && !metrics.contains(secret), "{secret}");
    }
    assert!(sink.lines().contains(&right));
    let asked = authority.asked();
    let [asked] = &asked[..] else { panic!("{asked:?}") };
    for field in [
        "grant_type=client_credentials",
        "client_secret=cl1ent-s3cret%7E%2B%2F%26",
        "scope=https%3A%2F%2Foutlook.office365.com%2F.default",
    ] {
        assert!(asked.split('&').any(|own| own == field), "{asked}");
    }
}

#[test]
fn a_secret_that_is_refused_holds_the_mail_and_says_the_cure() {
    let refusal = r#"{"error":"invalid_client","error_description":"AADSTS7000222: The provided client secret keys for app 'client-1' are expired. Trace ID: tr-1 Correlation ID: co-1","error_codes":[7000222],"trace_id":"tr-1","correlation_id":"co-1"}"#;
    let authority = Authority::with(401, refusal);
    let sink = Sink::with(&["AUTH XOAUTH2"], |ask| match ask.is("AUTH") {
        true => Answer::reply("235 2.7.0 in"),
        false => Answer::Usual,
    });
    let folder = tempfile::tempdir().unwrap();
    let spool = folder.path().join("spool");
    let gateway = setup(&sink, &authority, folder.path()).spool(&spool).start();
    Client::hello(gateway.smtp()).mail("a@example.com", &["b@example.org"], SMALL);
    let closed = gateway.wait_event("closed", |_| true);
    let words = closed["words"].as_str().unwrap();
    let exact = "AADSTS7000222: The provided client secret keys for app 'client-1' are expired. Trace ID: tr-1 Correlation ID: co-1; the client secret has expired: make a new one";
    assert!(words.starts_with(exact), "{words}");
    assert_eq!((&closed["scope"], &closed["stage"]), (&"provider".into(), &"auth".into()));
    // It is ready to take mail, and says that none leaves.
    let (_, ready) = gateway.get("/readyz");
    assert!(ready.contains("AADSTS7000222") && ready.contains("make a new one"), "{ready}");
    assert_eq!(gateway.metric("mailsluice_token_fetches_total{result=\"refused\"}"), 1.0);
    assert!(gateway.events().iter().all(|event| event["event"] != "failed"));
    gateway.stop();
    // Without a token nobody connects.
    assert_eq!(sink.lines(), Vec::<String>::new());
    assert_eq!(authority.asked().len(), 1);

    let authority = Authority::granting(TOKEN);
    let gateway = setup(&sink, &authority, folder.path()).spool(&spool).start();
    assert_eq!(sink.wait(1).remove(0).from, "a@example.com");
    gateway.wait_empty();
    gateway.stop();
}

/// The first line that each connection brings, and then nothing but its end.
fn proxy() -> (std::net::SocketAddr, std::sync::mpsc::Receiver<String>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, asked) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut line = String::new();
            drop(BufReader::new(stream).read_line(&mut line));
            if tell.send(line.trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    (address, asked)
}

#[test]
fn tokens_are_fetched_through_the_proxy_of_the_system_but_on_loopback() {
    let authority = Authority::granting(TOKEN);
    let sink = Sink::with(&["AUTH XOAUTH2"], |ask| match ask.is("AUTH") {
        true => Answer::reply("235 2.7.0 in"),
        false => Answer::Usual,
    });
    let folder = tempfile::tempdir().unwrap();
    let (address, asked) = proxy();
    let https = format!("HTTPS_PROXY=http://{address}");
    let through = |setup: Setup, more: &str| {
        let all = format!("http_proxy=http://{address}");
        setup.under(&["env", &https, &all, more])
    };
    // A secret in clear is for this machine alone.
    let gateway = through(setup(&sink, &authority, folder.path()), "NO_PROXY=").start();
    Client::hello(gateway.smtp()).mail("a@example.com", &["b@example.org"], SMALL);
    sink.wait(1);
    gateway.stop();
    assert_eq!(authority.asked().len(), 1);

    let far = || {
        setup(&sink, &authority, folder.path())
            .set("provider", "endpoints = { login = \"https://login.example.invalid\" }")
    };
    let gateway = through(far(), "NO_PROXY=example.org").start();
    Client::hello(gateway.smtp()).mail("a@example.com", &["b@example.org"], SMALL);
    assert_eq!(asked.recv().unwrap(), "CONNECT login.example.invalid:443 HTTP/1.1");
    let closed = gateway.wait_event("closed", |_| true);
    assert_eq!((&closed["scope"], &closed["stage"]), (&"provider".into(), &"connect".into()));
    gateway.stop();

    while asked.try_recv().is_ok() {}
    let gateway = through(far(), "NO_PROXY=example.invalid").start();
    Client::hello(gateway.smtp()).mail("a@example.com", &["b@example.org"], SMALL);
    let closed = gateway.wait_event("closed", |_| true);
    let words = closed["words"].as_str().unwrap();
    assert!(words.starts_with("asking https://login.example.invalid for a token: "), "{words}");
    gateway.stop();
    assert!(asked.try_recv().is_err());
}
