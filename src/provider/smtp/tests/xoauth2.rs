//! The login by token, with a server for tokens beside the one for mail.

use axum::Router;
use axum::http::StatusCode;
use axum::routing::post;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use tokio::sync::mpsc;

use super::*;
use crate::config::{App, Cloud, Credential, Proof, Secret};

/// Gives out these answers, one after the other, and the last for ever.
struct Authority {
    login: String,
    asked: mpsc::UnboundedReceiver<String>,
    _runs: tokio_util::task::AbortOnDropHandle<()>,
}

impl Authority {
    async fn with(answers: &[(u16, &str)]) -> Self {
        let answers: Vec<(u16, String)> =
            answers.iter().map(|(status, body)| (*status, (*body).to_owned())).collect();
        let (tell, asked) = mpsc::unbounded_channel();
        let next = Arc::new(Mutex::new(0));
        let answer = move |body: String| {
            let mut next = next.lock().unwrap();
            let (status, body_back) = answers[(*next).min(answers.len() - 1)].clone();
            *next += 1;
            tell.send(body).unwrap();
            async move { (StatusCode::from_u16(status).unwrap(), body_back) }
        };
        let router = Router::new().route("/{tenant}/oauth2/v2.0/token", post(answer));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let login = format!("http://{}", listener.local_addr().unwrap());
        let tasks = tokio_util::task::TaskTracker::new();
        let runs = tasks.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { login, asked, _runs: tokio_util::task::AbortOnDropHandle::new(runs) }
    }

    fn provider(&self, server: &Server) -> SmtpProvider {
        let app = App {
            tenant_id: "contoso.example".to_owned(),
            client_id: "client".to_owned(),
            credential: Credential::Secret { secret: Secret::for_tests("s3cret"), next: None },
            login: self.login.clone(),
            scope: "https://outlook.office365.com/.default".to_owned(),
            cloud: Cloud::Global,
        };
        let login = config::Login { username: "me@x.example".to_owned(), proof: Proof::Token(app) };
        let config = config::SmtpProvider { login: Some(login), ..server.config() };
        SmtpProvider::new(&config, "me.example".to_owned(), &metrics()).unwrap()
    }

    fn questions(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.asked.try_recv().ok()).collect()
    }
}

fn granting(token: &str) -> String {
    format!(r#"{{"token_type":"Bearer","expires_in":3599,"access_token":"{token}"}}"#)
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
async fn the_login_shows_a_token_that_serves_for_every_connection() {
    let server = Server::bind().await;
    let mut authority = Authority::with(&[(200, &granting("t1"))]).await;
    let provider = authority.provider(&server);
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
    let asked = authority.questions();
    let [asked] = &asked[..] else { panic!("{asked:?}") };
    for field in [
        "grant_type=client_credentials",
        "client_id=client",
        "client_secret=s3cret",
        "scope=https%3A%2F%2Foutlook.office365.com%2F.default",
    ] {
        assert!(asked.split('&').any(|own| own == field), "{asked}");
    }
}

#[tokio::test]
async fn a_token_that_makes_the_line_too_long_follows_the_334() {
    let server = Server::bind().await;
    let token = "t".repeat(2000);
    let authority = Authority::with(&[(200, &granting(&token))]).await;
    let provider = authority.provider(&server);
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
    let answers = [granting("t1"), granting("t2"), granting("t3")];
    let answers: Vec<(u16, &str)> = answers.iter().map(|body| (200, body.as_str())).collect();
    let mut authority = Authority::with(&answers).await;
    let provider = authority.provider(&server);
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
    let refusal = r#"{"error":"invalid_client","error_description":"AADSTS7000215: Invalid client secret provided.","error_codes":[7000215],"trace_id":"tr","correlation_id":"co"}"#;
    let mut authority = Authority::with(&[(401, refusal)]).await;
    let provider = authority.provider(&server);
    for _ in 0..3 {
        let outcome = timeout(LONG, deliver(&provider, &small())).await.unwrap();
        let Outcome::Held(cause) = outcome else { panic!("{outcome:?}") };
        assert_eq!((cause.scope, cause.stage), (Scope::Provider, Stage::Auth));
        let words = cause.words.to_string();
        let exact =
            "AADSTS7000215: Invalid client secret provided. (trace id tr) (correlation id co); ";
        assert!(words.starts_with(exact), "{words}");
        assert!(!words.contains("s3cret"));
    }
    assert_eq!(authority.questions().len(), 1);
}

#[tokio::test]
async fn a_server_that_repeats_the_token_is_not_quoted() {
    let server = Server::bind().await;
    let authority = Authority::with(&[(200, &granting("t0ken"))]).await;
    let provider = authority.provider(&server);
    let script = async {
        for _ in 0..2 {
            let mut peer = greet(&server).await;
            peer.expect(&[&format!("AUTH XOAUTH2 {}", blob("t0ken"))]).await;
            peer.say(&format!("535 5.7.3 what is {}?", blob("t0ken"))).await;
        }
    };
    let ((), outcome) = both(script, deliver(&provider, &small())).await;
    let words = outcome.cause().unwrap().words.to_string();
    assert_eq!(words, "535 5.7.3 (its words are not shown: the password is in them)");
}
