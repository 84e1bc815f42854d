//! The login by token, with a server for tokens beside the one for mail.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::*;
use crate::config::Proof;
use crate::provider::token::testing::{Answer, Authority, secret};

fn provider(authority: &Authority, server: &Server) -> SmtpProvider {
    let proof = Proof::Token(authority.app(secret("s3cret")));
    let login = config::Login { username: "me@x.example".to_owned(), proof };
    let config = config::SmtpProvider { login: Some(login), ..server.config() };
    SmtpProvider::new(&config, "me.example".to_owned(), &metrics()).unwrap()
}

fn blob(token: &str) -> String {
    BASE64.encode(format!("user=me@x.example\x01auth=Bearer {token}\x01\x01"))
}

async fn greet(server: &Server) -> Peer {
    let mut peer = server.accept().await;
    peer.say("220 up").await;
    peer.expect(&["EHLO me.example"]).await;
    peer.say("250-up\r\n250-PIPELINING\r\n250-AUTH LOGIN XOAUTH2\r\n250 8BITMIME").await;
    peer
}

#[tokio::test]
async fn one_token_serves_for_every_connection() {
    let server = Server::bind().await;
    let mut authority = Authority::with([Answer::token("t1"), Answer::token("t2")]).await;
    let provider = provider(&authority, &server);
    let script = async {
        for _ in 0..2 {
            let mut peer = greet(&server).await;
            peer.expect(&[&format!("AUTH XOAUTH2 {}", blob("t1"))]).await;
            peer.say("235 2.7.0 in").await;
            peer.take_message().await;
        }
    };
    let ((), ()) = both(script, async {
        assert_delivered(&deliver(&provider, &small()).await);
        assert_delivered(&deliver(&provider, &small()).await);
    })
    .await;
    assert_eq!(authority.questions().len(), 1);
}

#[tokio::test]
async fn a_token_that_makes_the_line_too_long_follows_the_334() {
    let server = Server::bind().await;
    let token = "t".repeat(2000);
    let authority = Authority::with([Answer::token(&token)]).await;
    let provider = provider(&authority, &server);
    let script = async {
        let mut peer = greet(&server).await;
        peer.expect(&["AUTH XOAUTH2"]).await;
        peer.say("334 ").await;
        peer.expect(&[&blob(&token)]).await;
        peer.say("235 2.7.0 in").await;
        peer.take_message().await;
    };
    let ((), outcome) = both(script, deliver(&provider, &small())).await;
    assert_delivered(&outcome);
}

#[tokio::test]
async fn a_refused_token_is_followed_by_another_once() {
    let server = Server::bind().await;
    let mut authority = Authority::with(["t1", "t2", "t3"].map(Answer::token)).await;
    let provider = provider(&authority, &server);
    let refuse = async |token: &str| {
        let mut peer = greet(&server).await;
        peer.expect(&[&format!("AUTH XOAUTH2 {}", blob(token))]).await;
        peer.say("334 eyJzdGF0dXMiOiI0MDEifQ==").await;
        peer.expect(&[""]).await;
        peer.say("535 5.7.3 Authentication unsuccessful").await;
        assert_eq!(peer.rest().await, b"");
    };
    let script = async {
        refuse("t1").await;
        let mut peer = greet(&server).await;
        peer.expect(&[&format!("AUTH XOAUTH2 {}", blob("t2"))]).await;
        peer.say("235 2.7.0 in").await;
        peer.take_message().await;
        peer.say("421 bye").await;
    };
    let ((), outcome) = both(script, deliver(&provider, &small())).await;
    assert_delivered(&outcome);
    // Soon after, no third is fetched: the server refuses whatever it is shown.
    let ((), outcome) = both(refuse("t2"), deliver(&provider, &small())).await;
    let Outcome::Held(cause) = outcome else { panic!("{outcome:?}") };
    assert_eq!((cause.scope, cause.stage), (Scope::Provider, Stage::Auth));
    assert_eq!(cause.words.to_string(), "535 5.7.3 Authentication unsuccessful");
    assert_eq!(authority.questions().len(), 2);
}

#[tokio::test]
async fn without_a_token_the_server_is_not_asked() {
    let server = Server::bind().await;
    let refusal = Answer::refusal(401, "invalid_client", 7_000_215, "Invalid client secret.");
    let mut authority = Authority::with([refusal]).await;
    let provider = provider(&authority, &server);
    for _ in 0..3 {
        let outcome = timeout(LONG, deliver(&provider, &small())).await.unwrap();
        let Outcome::Held(cause) = outcome else { panic!("{outcome:?}") };
        assert_eq!((cause.scope, cause.stage), (Scope::Provider, Stage::Auth));
        let words = cause.words.to_string();
        let exact = "AADSTS7000215: Invalid client secret. Trace ID: tr-1 Correlation ID: co-1; ";
        assert!(words.starts_with(exact), "{words}");
    }
    assert_eq!(authority.questions().len(), 1);
}
