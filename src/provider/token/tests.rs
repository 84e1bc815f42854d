//! States without a server, then whole fetches from one that follows a script.

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::answer::Reply;
use super::testing::{Answer, Authority, secret};
use super::*;
use crate::config::{Credential, Secret};
use crate::provider::http;

/// No wait of a test is longer.
const LONG: Duration = Duration::from_secs(20);

fn tokens_of(app: &config::App) -> (Tokens, Arc<Metrics>) {
    let metrics = Arc::new(Metrics::new());
    let http = http::client(None, LONG).unwrap();
    (Tokens::new(http, app, Arc::clone(&metrics)), metrics)
}

fn tokens(authority: &Authority, credential: Credential) -> Tokens {
    tokens_of(&authority.app(credential)).0
}

async fn token(tokens: &Tokens) -> Result<String, String> {
    let token = timeout(LONG, tokens.token()).await.expect("the test hangs");
    token.map(|token| token.bearer().to_owned()).map_err(|cause| cause.words.to_string())
}

fn granted(fields: &str) -> Result<Granted, Failure> {
    let json = format!(r#"{{"access_token":"t"{fields}}}"#);
    let reply: Reply = serde_json::from_str(&json).unwrap();
    Ok(Granted::read(&reply, clock::wall()).unwrap())
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[track_caller]
fn assert_is(state: &State, now: Instant, expected: &str) {
    let is = match state.standing(now) {
        Standing::Good(token) => format!("good {}", token.number),
        Standing::Aging(token) => format!("aging {}", token.number),
        Standing::Failed(cause) => format!("failed {:?}", cause.retry_after),
        Standing::Missing => "missing".to_owned(),
    };
    assert_eq!(is, expected);
}

#[test]
fn a_token_ages_before_it_ends() {
    let now = clock::now();
    let check = |fields: &str, early: u64, ends: u64| {
        let mut state = State::default();
        assert_is(&state, now, "missing");
        state.settle(granted(fields), now).unwrap();
        for (at, expected) in [
            (0, "good 1"),
            (early - 1, "good 1"),
            (early, "aging 1"),
            (ends - 1, "aging 1"),
            (ends, "missing"),
        ] {
            assert_is(&state, now + secs(at), expected);
        }
    };
    check(r#","expires_in":3600"#, 3300, 3570);
    check(r#","expires_in":3600,"refresh_in":2000"#, 2000, 3570);
    // Nonsense that a server may say costs neither a fetch per message nor a token for ever.
    check(r#","expires_in":3600,"refresh_in":0"#, 1800, 3570);
    check(r#","expires_in":3600,"refresh_in":999999"#, 3540, 3570);
    check(r#","expires_in":0"#, 30, 45);
    check(r#","expires_in":120"#, 60, 90);
    check(r#","expires_in":18446744073709551615"#, 86_100, 86_370);
}

#[test]
fn a_failure_is_remembered_while_an_old_token_serves_on() {
    let now = clock::now();
    let fail = || Failure { hold: secs(60), ..Failure::broken("no".to_owned()) };
    let mut state = State::default();
    state.settle(Err(fail()), now).unwrap_err();
    assert_is(&state, now + secs(59), "failed None");
    assert_is(&state, now + secs(60), "missing");

    let mut state = State::default();
    state.settle(granted(r#","expires_in":3600"#), now).unwrap();
    let late = now + secs(3400);
    assert_is(&state, late, "aging 1");
    state.settle(Err(fail()), late).unwrap_err();
    assert_is(&state, late + secs(59), "good 1");
    assert_is(&state, late + secs(60), "aging 1");
    let later = now + secs(3560);
    state.settle(Err(fail()), later).unwrap_err();
    assert_is(&state, later + secs(20), "failed None");
    state.settle(granted(""), later + secs(60)).unwrap();
    assert_is(&state, later + secs(60), "good 2");
}

#[test]
fn a_named_wait_is_told_as_what_is_left_of_it() {
    let now = clock::now();
    let mut failure = Failure { hold: secs(90), ..Failure::broken("busy".to_owned()) };
    failure.cause.retry_after = Some(secs(90));
    let mut state = State::default();
    state.settle(Err(failure), now).unwrap_err();
    assert_is(&state, now + secs(30), "failed Some(60s)");
}

#[test]
fn a_refused_token_is_dropped_once_a_minute() {
    let now = clock::now();
    let mut state = State::default();
    let first = state.settle(granted(""), now).unwrap();
    state.refuse(&first, now);
    assert_is(&state, now, "missing");
    let second = state.settle(granted(""), now).unwrap();
    // Late news of the first says nothing about the second.
    state.refuse(&first, now + secs(70));
    assert_is(&state, now, "good 2");
    state.refuse(&second, now + secs(59));
    assert_is(&state, now, "good 2");
    state.refuse(&second, now + secs(60));
    assert_is(&state, now, "missing");
}

#[tokio::test]
async fn token_is_fetched_once_for_many_waiters() {
    let mut authority = Authority::with([Answer::token("t1"), Answer::token("t2")]).await;
    authority.may_answer.forget_permits(usize::MAX);
    let (tokens, metrics) = tokens_of(&authority.app(secret("s+3/c ret&")));
    let mut waiters = JoinSet::new();
    for _ in 0..50 {
        let tokens = tokens.clone();
        waiters.spawn(async move { token(&tokens).await });
    }
    let asked = authority.question().await;
    authority.may_answer.add_permits(1);
    let got = waiters.join_all().await;
    assert!(got.iter().all(|token| token.as_deref() == Ok("t1")), "{got:?}");
    assert!(authority.questions().is_empty());
    assert_eq!(asked.uri.path(), "/contoso.example/oauth2/v2.0/token");
    assert_eq!(asked.method, "POST");
    assert_eq!(asked.headers["content-type"], "application/x-www-form-urlencoded");
    assert!(!asked.headers.contains_key("authorization"));
    let mut form = asked.form();
    form.sort();
    let form: Vec<(&str, &str)> = form.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    assert_eq!(
        form,
        [
            ("client_id", "client-1"),
            ("client_secret", "s+3/c ret&"),
            ("grant_type", "client_credentials"),
            ("scope", "https://graph.example/.default"),
        ]
    );
    let text = metrics.render();
    assert!(text.contains("mailsluice_token_fetches_total{result=\"fetched\"} 1"), "{text}");
    let end = metrics.token_expiry.get() - Duration::from_millis(clock::wall().0).as_secs_f64();
    assert!((3500.0..3600.0).contains(&end), "{end}");
}

#[tokio::test]
async fn a_waiter_that_goes_away_does_not_stop_the_fetch() {
    let mut authority = Authority::with([Answer::token("t1")]).await;
    authority.may_answer.forget_permits(usize::MAX);
    let tokens = tokens(&authority, secret("s"));
    tokio::select! {
        biased;
        _ = tokens.token() => panic!("there is none yet"),
        _ = authority.question() => {}
    }
    authority.may_answer.add_permits(1);
    assert_eq!(token(&tokens).await.as_deref(), Ok("t1"));
    assert!(authority.questions().is_empty());
}

#[tokio::test]
async fn an_aging_token_is_used_while_another_is_fetched() {
    let fields = r#""expires_in":3600,"refresh_in":1"#;
    let aging = Answer::new(200, format!(r#"{{"access_token":"t1",{fields}}}"#));
    let mut authority = Authority::with([aging, Answer::token("t2")]).await;
    let tokens = tokens(&authority, secret("s"));
    assert_eq!(token(&tokens).await.as_deref(), Ok("t1"));
    let half = tokens.shared.lock().token.as_mut().map(|token| {
        token.early = clock::now();
        token.ends
    });
    assert!(half.is_some());
    authority.may_answer.forget_permits(usize::MAX);
    authority.questions();
    for _ in 0..3 {
        assert_eq!(token(&tokens).await.as_deref(), Ok("t1"));
    }
    authority.question().await;
    authority.may_answer.add_permits(1);
    let told = tokens.shared.lock().fetching.clone();
    if let Some(mut told) = told {
        drop(timeout(LONG, told.wait_for(Option::is_some)).await.unwrap().map(drop));
    }
    assert_eq!(token(&tokens).await.as_deref(), Ok("t2"));
    assert!(authority.questions().is_empty());
}

#[tokio::test]
async fn a_refusal_is_not_asked_for_again_at_once() {
    let refusal = Answer::refusal(400, "unauthorized_client", 700_016, "Not found.");
    let mut authority = Authority::with([refusal]).await;
    let (tokens, metrics) = tokens_of(&authority.app(secret("s")));
    for _ in 0..100 {
        let words = token(&tokens).await.unwrap_err();
        assert!(words.starts_with("AADSTS700016: Not found. Trace ID: tr-1"), "{words}");
    }
    assert_eq!(authority.questions().len(), 1);
    let text = metrics.render();
    assert!(text.contains("mailsluice_token_fetches_total{result=\"refused\"} 1"), "{text}");
}

#[tokio::test]
async fn a_server_that_is_busy_says_for_how_long() {
    for status in [429, 503] {
        let busy = Answer::new(status, "<html>").with("retry-after", "90");
        let mut authority = Authority::with([busy]).await;
        let tokens = tokens(&authority, secret("s"));
        for _ in 0..3 {
            let cause = timeout(LONG, tokens.token()).await.unwrap().unwrap_err();
            let wait = cause.retry_after.unwrap();
            assert!(wait > secs(60) && wait <= secs(90), "{wait:?}");
            assert_eq!((cause.scope, cause.stage), (Scope::Provider, Stage::Auth));
        }
        assert_eq!(authority.questions().len(), 1);
    }
}

#[tokio::test]
async fn the_next_secret_is_tried_and_remembered() {
    let refused = || Answer::refusal(401, "invalid_client", 7_000_222, "Expired.");
    let answers = [refused(), Answer::token("t1"), Answer::token("t2"), refused(), refused()];
    let mut authority = Authority::with(answers).await;
    let next = Some(Secret::for_tests("new"));
    let credential = Credential::Secret { secret: Secret::for_tests("old"), next };
    let tokens = tokens(&authority, credential);
    let mut shown = || -> Vec<String> {
        authority.questions().iter().map(|asked| asked.field("client_secret")).collect()
    };
    assert_eq!(token(&tokens).await.as_deref(), Ok("t1"));
    assert_eq!(shown(), ["old", "new"]);
    forget(&tokens);
    assert_eq!(token(&tokens).await.as_deref(), Ok("t2"));
    assert_eq!(shown(), ["new"]);
    forget(&tokens);
    let words = token(&tokens).await.unwrap_err();
    assert!(words.starts_with("AADSTS7000222: Expired."), "{words}");
    assert_eq!(shown(), ["new", "old"]);
}

#[tokio::test]
async fn the_next_secret_is_left_alone_where_the_first_is_not_the_trouble() {
    let refusal = Answer::refusal(400, "unauthorized_client", 700_016, "Not found.");
    let mut authority = Authority::with([refusal]).await;
    let next = Some(Secret::for_tests("new"));
    let credential = Credential::Secret { secret: Secret::for_tests("old"), next };
    token(&tokens(&authority, credential)).await.unwrap_err();
    assert_eq!(authority.questions().len(), 1);
}

/// As if the token had ended, and no failure were remembered.
fn forget(tokens: &Tokens) {
    let mut state = tokens.shared.lock();
    (state.token, state.failure) = (None, None);
}

/// A folder with `app.pem` and `app.key`.
struct Identity {
    folder: tempfile::TempDir,
    public: Vec<u8>,
}

impl Identity {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let public = Self::write(folder.path());
        Self { folder, public }
    }

    fn write(folder: &std::path::Path) -> Vec<u8> {
        use std::os::unix::fs::PermissionsExt as _;
        let key = rcgen::KeyPair::from_pem_and_sign_algo(RSA_KEY, &rcgen::PKCS_RSA_SHA256).unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["app.example".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(2049, 12, 31);
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(folder.join("app.pem"), certificate.pem()).unwrap();
        std::fs::write(folder.join("app.key"), RSA_KEY).unwrap();
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(folder.join("app.key"), private).unwrap();
        certificate.der().to_vec()
    }

    fn credential(&self) -> Credential {
        let file = |name: &str| self.folder.path().join(name);
        Credential::Certificate { certificate: file("app.pem"), private_key: file("app.key") }
    }
}

const RSA_KEY: &str = include_str!("testdata/rsa.pem");

/// The parts of a JWT: header, claims, what is signed, the signature.
fn jwt(text: &str) -> (Value, Value, String, Vec<u8>) {
    let parts: Vec<&str> = text.split('.').collect();
    let [header, claims, signature] = parts[..] else { panic!("{text}") };
    let json = |part: &str| serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap();
    let signed = format!("{header}.{claims}");
    (json(header), json(claims), signed, URL_SAFE_NO_PAD.decode(signature).unwrap())
}

#[tokio::test]
async fn a_certificate_signs_an_assertion_of_its_own_each_time() {
    use ring::signature::{KeyPair as _, RSA_PSS_2048_8192_SHA256, UnparsedPublicKey};
    let refused = Answer::refusal(401, "invalid_client", 700_027, "No such certificate.");
    let mut authority = Authority::with([refused, Answer::token("t1")]).await;
    let identity = Identity::new();
    let (tokens, metrics) = tokens_of(&authority.app(identity.credential()));
    assert_eq!(token(&tokens).await.as_deref(), Ok("t1"));
    let asked = authority.questions();
    assert_eq!(asked.len(), 2, "once more after such a refusal");
    let url = format!("{}/contoso.example/oauth2/v2.0/token", authority.login);
    let Credential::Certificate { certificate, private_key } = identity.credential() else {
        panic!()
    };
    let pair = config::pair(&certificate, &private_key).ok().unwrap();
    let key = UnparsedPublicKey::new(&RSA_PSS_2048_8192_SHA256, pair.key.public_key());
    let mut ids = Vec::new();
    for asked in &asked {
        let kind = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
        assert_eq!(asked.field("client_assertion_type"), kind);
        assert_eq!(asked.field("client_id"), "client-1");
        assert_eq!(asked.field("client_secret"), "");
        let (header, claims, signed, signature) = jwt(&asked.field("client_assertion"));
        let thumbprint = ring::digest::digest(&ring::digest::SHA256, &identity.public);
        let header_expected = serde_json::json!({
            "alg": "PS256", "typ": "JWT", "x5t#S256": URL_SAFE_NO_PAD.encode(thumbprint),
        });
        assert_eq!(header, header_expected);
        let now = clock::wall().0 / 1000;
        let at = claims["nbf"].as_u64().unwrap();
        assert!(now.abs_diff(at) <= 20, "{claims}");
        assert_eq!(claims["iat"].as_u64(), Some(at));
        assert_eq!(claims["exp"].as_u64(), Some(at + 600));
        assert_eq!(claims["aud"].as_str(), Some(url.as_str()));
        assert_eq!((&claims["iss"], &claims["sub"]), (&"client-1".into(), &"client-1".into()));
        ids.push(claims["jti"].as_str().unwrap().to_owned());
        key.verify(signed.as_bytes(), &signature).unwrap();
    }
    assert!(ids[0] != ids[1] && ids[0].len() == 36, "{ids:?}");
    // 2049-12-31
    assert_eq!(metrics.credential_expiry.get(), 2_524_521_600.0);
}

#[tokio::test]
async fn a_certificate_that_cannot_be_read_is_no_question() {
    let mut authority = Authority::with([Answer::token("t1")]).await;
    let identity = Identity::new();
    let tokens = tokens(&authority, identity.credential());
    std::fs::remove_file(identity.folder.path().join("app.key")).unwrap();
    let words = token(&tokens).await.unwrap_err();
    assert!(words.starts_with("provider.private_key is /"), "{words}");
    assert!(words.contains("app.key, which cannot be read: No such file"), "{words}");
    assert!(authority.questions().is_empty());
    // Mended, it works without a restart.
    Identity::write(identity.folder.path());
    forget(&tokens);
    assert_eq!(token(&tokens).await.as_deref(), Ok("t1"));
}

#[tokio::test]
async fn the_token_of_the_cluster_is_read_each_time() {
    let mut authority = Authority::with([Answer::token("t1"), Answer::token("t2")]).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let token_file = file.path().to_owned();
    let tokens = tokens(&authority, Credential::WorkloadIdentity { token_file });
    for (federated, expected) in [("a.b.c\n", "t1"), ("d.e.f", "t2")] {
        std::fs::write(file.path(), federated).unwrap();
        forget(&tokens);
        assert_eq!(token(&tokens).await.as_deref(), Ok(expected));
        let asked = authority.question().await;
        assert_eq!(asked.field("client_assertion"), federated.trim());
        assert_eq!(asked.field("grant_type"), "client_credentials");
    }
    for (federated, why) in [(String::new(), "is empty"), ("x".repeat(70_000), "is longer than")] {
        std::fs::write(file.path(), federated).unwrap();
        forget(&tokens);
        let words = token(&tokens).await.unwrap_err();
        assert!(words.starts_with("AZURE_FEDERATED_TOKEN_FILE is /"), "{words}");
        assert!(words.contains(why), "{words}");
    }
}

fn in_haste(tokens: Tokens) -> Tokens {
    let mut shared = Arc::into_inner(tokens.shared).unwrap();
    shared.ask = shared.ask.in_haste();
    Tokens { shared: Arc::new(shared) }
}

#[tokio::test]
async fn the_machine_is_asked_for_its_own_token() {
    let body = r#"{"access_token":"t1","expires_in":"3599","expires_on":"1506484173","resource":"x","token_type":"Bearer"}"#;
    let answers = [
        Answer::new(404, ""),
        Answer::new(410, ""),
        Answer::new(429, ""),
        Answer::new(500, ""),
        Answer::new(200, body),
    ];
    let mut authority = Authority::with(answers).await;
    let tokens = in_haste(tokens(&authority, Credential::ManagedIdentity));
    assert_eq!(token(&tokens).await.as_deref(), Ok("t1"));
    let asked = authority.questions();
    assert_eq!(asked.len(), 5);
    for asked in asked {
        let query =
            "api-version=2018-02-01&resource=https%3A%2F%2Fgraph.example&client_id=client-1";
        assert_eq!(asked.uri.query(), Some(query));
        assert_eq!(asked.uri.path(), "/metadata/identity/oauth2/token");
        assert_eq!(
            (asked.method.as_str(), asked.headers["metadata"].as_bytes()),
            ("GET", &b"true"[..])
        );
    }
}

#[tokio::test]
async fn a_machine_without_an_identity_is_not_asked_twice() {
    let none = r#"{"error":"invalid_request","error_description":"Identity not found"}"#;
    let mut authority = Authority::with([Answer::new(400, none)]).await;
    let tokens = in_haste(tokens(&authority, Credential::ManagedIdentity));
    let words = token(&tokens).await.unwrap_err();
    assert!(words.starts_with("Identity not found; "), "{words}");
    assert!(words.contains("is an identity assigned to this machine"), "{words}");
    assert_eq!(authority.questions().len(), 1);
}

#[tokio::test]
async fn a_machine_whose_service_stays_away_is_given_up() {
    for (status, most) in [(404, 5), (503, 5), (410, 20)] {
        let mut authority = Authority::with([Answer::new(status, "")]).await;
        let tokens = in_haste(tokens(&authority, Credential::ManagedIdentity));
        token(&tokens).await.unwrap_err();
        let asked = authority.questions().len();
        assert!((5..=most).contains(&asked), "{status}: {asked}");
    }
}

#[tokio::test]
async fn an_answer_that_is_none_is_trouble_and_shows_no_token() {
    let hostile = [
        Answer::new(200, ""),
        Answer::new(200, "<html>s3cret</html>"),
        Answer::new(200, "[".repeat(1_000_000)),
        Answer::new(200, r#"{"access_token":"s3cret\r\nX: y"}"#),
        Answer::new(200, r#"{"access_token":7,"x":"s3cret"}"#),
        Answer::new(200, r#"{"access_token":"s3cret"#),
        Answer::new(202, r#"{"access_token":"s3cret"}"#),
        Answer::new(302, "").with("location", "http://127.0.0.1:1/"),
        Answer::new(401, "s3cret".repeat(100_000)),
        Answer::new(500, "\u{0}\u{1b}[2J"),
    ];
    for answer in hostile {
        let shown = format!("{answer:?}").chars().take(80).collect::<String>();
        let mut authority = Authority::with([answer]).await;
        let tokens = tokens(&authority, secret("s3cret"));
        let cause = timeout(LONG, tokens.token()).await.unwrap().unwrap_err();
        assert_eq!((cause.scope, cause.stage), (Scope::Provider, Stage::Auth), "{shown}");
        let words = cause.words.to_string();
        assert!(!words.contains("s3cret") && words.len() < 1_000, "{shown}: {words}");
        assert_eq!(authority.questions().len(), 1, "{shown}");
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_trouble_of_the_connection() {
    let authority = Authority::with([Answer::token("t1")]).await;
    let mut app = authority.app(secret("s3cret"));
    // Nothing listens there: the port was ours a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    app.login = format!("http://{free}");
    let (tokens, metrics) = tokens_of(&app);
    let cause = timeout(LONG, tokens.token()).await.unwrap().unwrap_err();
    assert_eq!((cause.scope, cause.stage), (Scope::Provider, Stage::Connect));
    let words = cause.words.to_string();
    assert!(words.starts_with(&format!("asking http://{free} for a token: ")), "{words}");
    assert!(words.contains("Connection refused"), "{words}");
    assert!(matches!(without_token(cause), Outcome::Deferred(_)));
    assert!(metrics.render().contains("mailsluice_token_fetches_total{result=\"failed\"} 1"));
}

#[tokio::test]
async fn roles_of_the_newest_token_are_told() {
    let with_roles = |roles: &str| {
        let claims = URL_SAFE_NO_PAD.encode(format!(r#"{{"roles":{roles}}}"#));
        Answer::token(&format!("e30.{claims}.sig"))
    };
    let answers = [with_roles(r#"["Mail.Send"]"#), Answer::token("opaque")];
    let authority = Authority::with(answers).await;
    let tokens = tokens(&authority, secret("s"));
    let roles = tokens.roles();
    assert_eq!(*roles.borrow(), None);
    token(&tokens).await.unwrap();
    assert!(roles.borrow().as_ref().unwrap().has("Mail.Send"));
    forget(&tokens);
    token(&tokens).await.unwrap();
    assert_eq!(*roles.borrow(), None);
}

#[tokio::test]
async fn closing_ends_a_fetch() {
    let mut authority = Authority::with([Answer::token("t1")]).await;
    authority.may_answer.forget_permits(usize::MAX);
    let tokens = tokens(&authority, secret("s"));
    let waiter = tokens.clone();
    let mut waiters = JoinSet::new();
    waiters.spawn(async move { token(&waiter).await });
    authority.question().await;
    timeout(LONG, tokens.close()).await.unwrap();
    let words = waiters.join_next().await.unwrap().unwrap().unwrap_err();
    assert!(words.contains("the gateway stops"), "{words}");
}

#[tokio::test]
async fn a_fetch_that_panics_locks_nobody_out() {
    let authority = Authority::with([Answer::token("t1")]).await;
    let tokens = tokens(&authority, secret("s"));
    let told = {
        let mut state = tokens.shared.lock();
        let (tell, told) = watch::channel(None);
        state.fetching = Some(told);
        let fetch = Fetch { shared: Arc::clone(&tokens.shared), tell, result: None };
        let mut broken = JoinSet::new();
        broken.spawn(async move {
            let _fetch = fetch;
            panic!("on purpose");
        });
        broken
    };
    let waiting = token(&tokens);
    let (ended, got) = tokio::join!(told.join_all_or_panics(), waiting);
    assert!(ended);
    assert!(got.unwrap_err().contains("ended without a result"));
    forget(&tokens);
    assert_eq!(token(&tokens).await.as_deref(), Ok("t1"));
}

trait Ends {
    async fn join_all_or_panics(self) -> bool;
}

impl Ends for JoinSet<()> {
    /// Whether it panicked.
    async fn join_all_or_panics(mut self) -> bool {
        self.join_next().await.unwrap().is_err()
    }
}

#[test]
fn a_token_is_not_shown() {
    let now = clock::now();
    let mut state = State::default();
    let token = state.settle(granted(""), now).unwrap();
    assert_eq!(format!("{token:?}"), "Token(1)");
}

#[test]
fn files_that_do_not_fit_are_named() {
    let identity = Identity::new();
    let path = |name: &str| -> PathBuf { identity.folder.path().join(name) };
    let check = |certificate: &str, key: &str, expected: (&str, &str)| {
        let (name, why) = config::pair(&path(certificate), &path(key)).err().unwrap();
        assert_eq!(name, expected.0, "{why}");
        assert!(why.contains(expected.1), "{why}");
    };
    let other = rcgen::KeyPair::generate().unwrap();
    let write = |name: &str, text: &str| {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::write(path(name), text).unwrap();
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(path(name), private).unwrap();
    };
    write("ec.key", &other.serialize_pem());
    write("encrypted.key", "-----BEGIN ENCRYPTED PRIVATE KEY-----\n");
    write("empty", "");
    let foreign = rcgen::CertificateParams::new(vec!["x.example".to_owned()]).unwrap();
    write("foreign.pem", &foreign.self_signed(&other).unwrap().pem());
    check("app.pem", "ec.key", ("private_key", "is no RSA key"));
    check("app.pem", "encrypted.key", ("private_key", "is encrypted"));
    check("app.pem", "empty", ("private_key", "has no private key in PEM"));
    check("app.pem", "nothing", ("private_key", "cannot be read"));
    check("empty", "app.key", ("certificate", "has no certificate in PEM"));
    check("nothing", "app.key", ("certificate", "cannot be read"));
    check("foreign.pem", "app.key", ("private_key", "is not the key of the certificate"));
    assert!(config::pair(&path("app.pem"), &path("app.key")).is_ok());
    use std::os::unix::fs::PermissionsExt as _;
    let public = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(path("app.key"), public).unwrap();
    check("app.pem", "app.key", ("private_key", "anybody can read or change (mode 0644)"));
}
