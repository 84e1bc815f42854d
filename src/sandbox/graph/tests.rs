//! The simulated service, asked by a plain HTTP client.

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use reqwest::{Client, RequestBuilder, Response};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use serde_json::json;

use super::faults::{Fault, Then};
use super::settings::{CLIENT, SECRET, TENANT};
use super::*;

const CERTIFICATE: &str = include_str!("testdata/app.crt");
const KEY: &str = include_str!("testdata/app.key");
const MAILBOX: &str = "me@contoso.test";

/// A world with its client, which is logged in.
struct Play {
    world: Arc<World>,
    shutdown: Shutdown,
    client: Client,
    token: String,
}

impl Play {
    async fn start() -> Self {
        Self::with(Settings::default()).await
    }

    async fn with(settings: Settings) -> Self {
        static RING: LazyLock<()> = LazyLock::new(|| {
            drop(rustls::crypto::ring::default_provider().install_default());
        });
        LazyLock::force(&RING);
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let shutdown = Shutdown::new();
        let inbox = Arc::new(Inbox::new());
        let world = World::start(socket, settings, inbox, &shutdown).unwrap();
        let client = Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none());
        let mut play =
            Self { world, shutdown, client: client.build().unwrap(), token: String::new() };
        play.token = play.log_in().await;
        play
    }

    async fn log_in(&self) -> String {
        let answer = self.ask_token(&[("client_secret", SECRET)]).await;
        json_of(answer).await["access_token"].as_str().unwrap().to_owned()
    }

    /// With the fields that a good request has, but those that are named.
    async fn ask_token(&self, fields: &[(&str, &str)]) -> Response {
        self.ask_token_of(TENANT, fields).await
    }

    async fn ask_token_of(&self, tenant: &str, fields: &[(&str, &str)]) -> Response {
        let scope = format!("{}/.default", self.world.root);
        let mut form = BTreeMap::from([
            ("client_id", CLIENT),
            ("scope", scope.as_str()),
            ("grant_type", "client_credentials"),
        ]);
        form.extend(fields.iter().copied());
        form.retain(|_, value| !value.is_empty());
        let url = format!("{}/{tenant}/oauth2/v2.0/token", self.world.root);
        let mut body = oauth2::url::form_urlencoded::Serializer::new(String::new());
        let body = body.extend_pairs(form).finish();
        let request = self.client.post(url).body(body);
        request.header("content-type", "application/x-www-form-urlencoded").send().await.unwrap()
    }

    fn request(&self, method: &str, path: &str) -> RequestBuilder {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let url = format!("{}/v1.0/users/{MAILBOX}/{path}", self.world.root);
        self.client.request(method, url).bearer_auth(&self.token)
    }

    async fn post(&self, path: &str, body: &Value) -> Response {
        self.request("POST", path).json(body).send().await.unwrap()
    }

    /// What a message comes to, changed a little from one that is good: status and code.
    async fn check(&self, change: Value, status: u16, code: &str) {
        let mut message = message();
        merge(&mut message, &change);
        let before = self.world.inbox.arrived();
        let answer = self.post("sendMail", &message).await;
        let (found, body) = (answer.status().as_u16(), answer.text().await.unwrap());
        assert_eq!(found, status, "{change} {body}");
        let taken = self.world.inbox.arrived() - before;
        assert_eq!(taken, u64::from(status == 202), "{change}");
        if status == 202 {
            assert_eq!(body, "");
        } else if status != 413 {
            let body: Value = serde_json::from_str(&body).unwrap();
            assert_eq!(body["error"]["code"], code, "{change}");
            assert!(body["error"]["innerError"]["request-id"].is_string());
        }
    }

    async fn draft(&self) -> String {
        let answer = self.post("messages", &message()["message"]).await;
        assert_eq!(answer.status(), 201);
        json_of(answer).await["id"].as_str().unwrap().to_owned()
    }

    async fn send(&self, id: &str) -> Response {
        let request = self.request("POST", &format!("messages/{id}/send"));
        request.header("content-length", "0").send().await.unwrap()
    }

    fn set(&self, change: Value) {
        let settings = self.world.settings().patched(&change).unwrap();
        self.world.set(settings);
    }

    async fn stop(self) {
        drop(self.client);
        self.shutdown.stop().await;
    }
}

fn merge(into: &mut Value, change: &Value) {
    match (into, change) {
        (Value::Object(into), Value::Object(change)) => {
            for (key, value) in change {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, change) => *into = change.clone(),
    }
}

fn recipient(address: &str) -> Value {
    json!({ "emailAddress": { "address": address } })
}

/// One that everybody would take.
fn message() -> Value {
    json!({
        "message": {
            "subject": "Hello",
            "body": { "contentType": "html", "content": "<p>Hello</p>" },
            "toRecipients": [recipient("ann@example.com")],
        },
        "saveToSentItems": false,
    })
}

fn attachment(name: &str, octets: &[u8]) -> Value {
    json!({
        "@odata.type": "#microsoft.graph.fileAttachment",
        "name": name,
        "contentType": "application/octet-stream",
        "contentBytes": STANDARD.encode(octets),
    })
}

async fn json_of(answer: Response) -> Value {
    serde_json::from_str(&answer.text().await.unwrap()).unwrap()
}

async fn code_of(answer: Response) -> (u16, String) {
    let status = answer.status().as_u16();
    (status, json_of(answer).await["error"]["code"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn a_message_is_taken_and_shown_as_it_is_stored() {
    let play = Play::start().await;
    let change = json!({ "message": {
        "from": { "emailAddress": { "address": MAILBOX, "name": "Reports" } },
        "ccRecipients": [recipient("bob@example.com")],
        "bccRecipients": [recipient("eve@example.com")],
        "internetMessageId": "<1@app>",
        "internetMessageHeaders": [{ "name": "X-One", "value": "1" }],
        "singleValueExtendedProperties": [
            { "id": "String 0x1039", "value": "<0@app>" },
            { "id": "Integer 0x0036", "value": "2" },
            { "id": "String {66f5a359-4659-4830-9070-00047ec6ac6e} Name mailsluice-id", "value": "1" },
        ],
        "attachments": [attachment("a.bin", b"\0\x01\x02")],
    }});
    play.check(change, 202, "").await;
    let mails = play.world.inbox.mails();
    let mail = mails.last().unwrap();
    assert_eq!(mail.from, MAILBOX);
    assert_eq!(mail.to, ["ann@example.com", "bob@example.com", "eve@example.com"]);
    assert_eq!(mail.form, Form::Json);
    let stored = mail.stored.as_ref().unwrap();
    assert_eq!(stored.bcc_recipients[0].address, "eve@example.com");
    assert_eq!(&stored.attachments[0].content[..], b"\0\x01\x02");
    let shown = serde_json::to_value(mail).unwrap();
    assert_eq!(shown["stored"]["attachments"][0]["name"], "a.bin");
    assert_eq!(shown["form"], "json");
    play.stop().await;
}

#[tokio::test]
async fn what_the_documents_forbid_is_refused() {
    let play = Play::start().await;
    let message = |property: &str, value: Value| json!({ "message": { property: value } });
    let with = |property: &str, value: &str| message(property, json!([recipient(value)]));
    let header = |name: &str, value: &str| {
        message("internetMessageHeaders", json!([{ "name": name, "value": value }]))
    };
    let property = |id: &str, value: Value| {
        message("singleValueExtendedProperties", json!([{ "id": id, "value": value }]))
    };
    let attached = |change: Value| {
        let mut one = attachment("a", b"a");
        merge(&mut one, &change);
        message("attachments", json!([one]))
    };
    for (change, code) in [
        (message("subjekt", json!("x")), "RequestBodyRead"),
        (json!({ "savetosentitems": true }), "RequestBodyRead"),
        (json!({ "saveToSentItems": "false" }), "RequestBodyRead"),
        (json!({ "message": null }), "ErrorInvalidParameter"),
        (json!([]), "RequestBodyRead"),
        (message("subject", json!(1)), "RequestBodyRead"),
        (message("subject", json!("a\r\nBcc: x@y.z")), "ErrorInvalidRequest"),
        (message("isDraft", json!(true)), "ErrorInvalidPropertySet"),
        (message("importance", json!("urgent")), "RequestBodyRead"),
        (message("toRecipients", json!("ann@example.com")), "RequestBodyRead"),
        (message("toRecipients", json!(["ann@example.com"])), "RequestBodyRead"),
        (message("toRecipients", json!([])), "ErrorInvalidRecipients"),
        (with("toRecipients", "ann"), "ErrorInvalidRecipients"),
        (with("toRecipients", "ann@localhost"), "ErrorInvalidRecipients"),
        (with("ccRecipients", "änn@example.com"), "ErrorInvalidRecipients"),
        (with("bccRecipients", "\"a b\"@example.com"), "ErrorInvalidRecipients"),
        (with("bccRecipients", "ann@[127.0.0.1]"), "ErrorInvalidRecipients"),
        (header("List-Id", "x"), "InvalidInternetMessageHeader"),
        (header("X-A", "a\r\nb"), "InvalidInternetMessageHeader"),
        (header("X-A:", "a"), "InvalidInternetMessageHeader"),
        (property("String 1042", json!("x")), "ErrorInvalidExtendedProperty"),
        (property("Text 0x1042", json!("x")), "ErrorInvalidExtendedProperty"),
        (property("Integer 0x36", json!("x")), "ErrorInvalidExtendedProperty"),
        (property("Integer 0x36", json!(2)), "RequestBodyRead"),
        (property("String {1} Name x", json!("x")), "ErrorInvalidExtendedProperty"),
        (message("internetMessageId", json!("1@app")), "ErrorInvalidRequest"),
        (message("body", json!("text")), "RequestBodyRead"),
        (message("body", json!({ "contentType": "md", "content": "" })), "RequestBodyRead"),
        (message("body", json!([{ "contentType": "text" }])), "RequestBodyRead"),
        (attached(json!({ "@odata.type": null })), "RequestBodyRead"),
        (attached(json!({ "@odata.type": "fileAttachment" })), "RequestBodyRead"),
        (attached(json!({ "name": "" })), "ErrorInvalidRequest"),
        (attached(json!({ "contentBytes": "_-==" })), "RequestBodyRead"),
        (attached(json!({ "contentBytes": null })), "ErrorInvalidRequest"),
        (attached(json!({ "size": 1 })), "RequestBodyRead"),
        (attached(json!({ "isInline": true })), "ErrorInvalidRequest"),
        (attached(json!({ "isInline": true, "contentId": "<1@x>" })), "ErrorInvalidRequest"),
    ] {
        play.check(change, 400, code).await;
    }
    let headers: Vec<_> =
        (0..6).map(|n| json!({ "name": format!("X-{n}"), "value": "" })).collect();
    let change = message("internetMessageHeaders", headers.into());
    play.check(change, 400, "InvalidInternetMessageHeaderCollection").await;
    let many: Vec<_> = (0..501).map(|n| recipient(&format!("a{n}@example.com"))).collect();
    let change = message("bccRecipients", many.into());
    play.check(change, 400, "ErrorRecipientLimitExceeded").await;
    play.check(attached(json!({ "isInline": true, "contentId": "1@x" })), 202, "").await;
    play.stop().await;
}

#[tokio::test]
async fn a_request_has_its_content_type_its_size_and_its_json() {
    let play = Play::start().await;
    let send = |kind: &str, body: String| {
        let request = play.request("POST", "sendMail").header("content-type", kind).body(body);
        async { request.send().await.unwrap() }
    };
    let good = message().to_string();
    assert_eq!(code_of(send("text/html", good.clone()).await).await.0, 415);
    let broken = good.trim_end_matches('}').to_owned();
    assert_eq!(
        code_of(send("application/json", broken).await).await,
        (400, "BadRequest".to_owned())
    );
    let blank = " ".repeat(4_000_001 - good.len());
    let answer = send("application/json", format!("{good}{blank}")).await;
    assert_eq!(answer.status(), 413);
    assert!(answer.text().await.unwrap().starts_with("<!DOCTYPE"));
    let blank = " ".repeat(4_000_000 - good.len());
    assert_eq!(send("application/json", format!("{good}{blank}")).await.status(), 202);
    let mime = STANDARD.encode("To: ann@example.com\r\nSubject: x\r\n\r\nhello\r\n");
    assert_eq!(send("text/plain", mime).await.status(), 202);
    let mail = play.world.inbox.mails().pop().unwrap();
    assert!(mail.content.starts_with(b"To: ann@example.com\r\n"));
    assert_eq!(
        code_of(send("text/plain", "!".to_owned()).await).await.1,
        "ErrorMimeContentInvalidBase64String"
    );
    play.stop().await;
}

#[tokio::test]
async fn a_token_is_given_to_who_may_have_it() {
    let play = Play::start().await;
    let check = async |fields: &[(&str, &str)], status: u16, number: u64| {
        let answer = play.ask_token(fields).await;
        assert_eq!(answer.status().as_u16(), status, "{fields:?}");
        let body = json_of(answer).await;
        assert_eq!(body["error_codes"][0].as_u64(), Some(number), "{fields:?} {body}");
        let words = body["error_description"].as_str().unwrap();
        assert!(words.starts_with(&format!("AADSTS{number}: ")), "{words}");
        for key in ["error", "timestamp", "trace_id", "correlation_id"] {
            assert!(body[key].is_string(), "{key}");
        }
    };
    check(&[], 401, 7_000_218).await;
    check(&[("client_secret", "wrong")], 401, 7_000_215).await;
    check(&[("client_secret", "expired-secret")], 401, 7_000_222).await;
    check(&[("client_secret", SECRET), ("client_id", "unknown")], 400, 700_016).await;
    check(&[("client_secret", SECRET), ("grant_type", "password")], 400, 70_003).await;
    check(&[("client_secret", SECRET), ("grant_type", "")], 400, 900_144).await;
    check(&[("client_secret", SECRET), ("scope", "")], 400, 900_144).await;
    check(&[("client_secret", SECRET), ("scope", "https://x.test/.default")], 400, 500_011).await;
    check(&[("client_secret", SECRET), ("scope", "Mail.Send")], 400, 1_002_012).await;
    let two = "https://graph.microsoft.com/.default https://outlook.office365.com/.default";
    check(&[("client_secret", SECRET), ("scope", two)], 400, 70_011).await;
    for (tenant, number) in [("common", 9_001_023), ("unknown", 90_002)] {
        let answer = play.ask_token_of(tenant, &[("client_secret", SECRET)]).await;
        assert_eq!(json_of(answer).await["error_codes"][0], number);
    }
    play.set(json!({ "apps": [{ "enabled": false }] }));
    check(&[("client_secret", SECRET)], 400, 7_000_112).await;
    play.stop().await;
}

#[tokio::test]
async fn a_token_shows_its_rights_and_lasts_as_long_as_it_says() {
    let play = Play::start().await;
    let answer = json_of(play.ask_token(&[("client_secret", SECRET)]).await).await;
    assert_eq!((&answer["token_type"], &answer["expires_in"]), (&json!("Bearer"), &json!(3_599)));
    let token = answer["access_token"].as_str().unwrap();
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
    let payload: Value = serde_json::from_slice(&payload).unwrap();
    assert_eq!(payload["roles"], json!(["Mail.Send", "Mail.ReadWrite"]));
    assert_eq!(payload["aud"], play.world.root);
    play.set(json!({ "token_lifetime": 0, "refresh_in": 1 }));
    let url = format!("{}/v1.0/users/{MAILBOX}/sendMail", play.world.root);
    let expired = play.log_in().await;
    let answer = play.client.post(&url).bearer_auth(expired).json(&message()).send().await.unwrap();
    assert!(answer.headers().contains_key("www-authenticate"));
    assert_eq!(code_of(answer).await, (401, "InvalidAuthenticationToken".to_owned()));
    let answer = play.client.post(&url).json(&message()).send().await.unwrap();
    assert_eq!(answer.status(), 401);
    play.check(json!({}), 202, "").await;
    play.world.revoke_tokens();
    play.check(json!({}), 401, "InvalidAuthenticationToken").await;
    play.stop().await;
}

#[tokio::test]
async fn client_and_secret_are_taken_by_basic_too() {
    let play = Play::start().await;
    let encode = |text: &str| {
        oauth2::url::form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>()
    };
    let url = format!("{}/{TENANT}/oauth2/v2.0/token", play.world.root);
    let body =
        format!("grant_type=client_credentials&scope={}%2F.default", encode(&play.world.root));
    for (secret, status) in [(encode(SECRET), 200), (SECRET.to_owned(), 401)] {
        let request = play.client.post(&url).basic_auth(CLIENT, Some(secret)).body(body.clone());
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        assert_eq!(request.send().await.unwrap().status().as_u16(), status);
    }
    play.stop().await;
}

/// An assertion as a client makes it, but for what is changed.
fn assertion(root: &str, jti: &str, header: Value, claims: Value) -> String {
    use ring::rand::SystemRandom;
    use ring::signature::{RSA_PSS_SHA256, RsaKeyPair};
    let der = rustls::pki_types::CertificateDer::from_pem_slice(CERTIFICATE.as_bytes()).unwrap();
    let print = ring::digest::digest(&ring::digest::SHA256, &der);
    let now = clock::wall().0 / 1000;
    let mut head =
        json!({ "alg": "PS256", "typ": "JWT", "x5t#S256": URL_SAFE_NO_PAD.encode(print) });
    merge(&mut head, &header);
    let mut all = json!({
        "aud": format!("{root}/{TENANT}/oauth2/v2.0/token"),
        "iss": CLIENT, "sub": CLIENT, "jti": jti, "nbf": now, "iat": now, "exp": now + 600,
    });
    merge(&mut all, &claims);
    let part = |json: &Value| URL_SAFE_NO_PAD.encode(json.to_string());
    let signed = format!("{}.{}", part(&head), part(&all));
    let PrivateKeyDer::Pkcs8(key) = PrivateKeyDer::from_pem_slice(KEY.as_bytes()).unwrap() else {
        panic!("the key is not PKCS #8");
    };
    let pair = RsaKeyPair::from_pkcs8(key.secret_pkcs8_der()).unwrap();
    let mut signature = vec![0; pair.public().modulus_len()];
    pair.sign(&RSA_PSS_SHA256, &SystemRandom::new(), signed.as_bytes(), &mut signature).unwrap();
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

#[tokio::test]
async fn a_certificate_logs_in_by_an_assertion_that_is_right_in_every_point() {
    let play = Play::start().await;
    play.set(json!({ "apps": [{ "certificates": [CERTIFICATE] }] }));
    let root = play.world.root.clone();
    let ask = async |jwt: &str| {
        let kind = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
        let fields = [("client_assertion", jwt), ("client_assertion_type", kind)];
        let answer = play.ask_token(&fields).await;
        let status = answer.status().as_u16();
        (status, json_of(answer).await["error_codes"][0].as_u64().unwrap_or_default())
    };
    let good = assertion(&root, "1", json!({}), json!({}));
    assert_eq!(ask(&good).await, (200, 0));
    assert_eq!(ask(&good).await, (401, 50_013), "once more");
    let now = clock::wall().0 / 1000;
    for (header, claims, number) in [
        (json!({ "alg": "RS256" }), json!({}), 50_013),
        (json!({ "x5t#S256": "x" }), json!({}), 700_027),
        (json!({}), json!({ "aud": "https://login.microsoftonline.com/x" }), 50_013),
        (json!({}), json!({ "iss": "x" }), 50_013),
        (json!({}), json!({ "exp": now - 1_000, "nbf": now - 2_000 }), 700_024),
        (json!({}), json!({ "nbf": now + 1_000, "exp": now + 1_600 }), 700_024),
        (json!({}), json!({ "exp": now + 100_000 }), 700_024),
        (json!({}), json!({ "jti": null }), 50_013),
    ] {
        let jwt = assertion(&root, "2", header.clone(), claims.clone());
        assert_eq!(ask(&jwt).await, (401, number), "{header} {claims}");
    }
    let (signed, _) = good.rsplit_once('.').unwrap();
    assert_eq!(ask(&format!("{signed}.AAAA")).await, (401, 700_027));
    assert_eq!(ask("nonsense").await, (401, 50_027));
    play.set(json!({ "apps": [{ "federated": ["a.b.c"] }] }));
    assert_eq!(ask("a.b.c").await, (200, 0), "of another issuer");
    play.stop().await;
}

#[tokio::test]
async fn a_machine_with_an_identity_is_given_a_token_without_a_secret() {
    let play = Play::start().await;
    let ask = async |query: &str, metadata: bool| {
        let url = format!("{}/metadata/identity/oauth2/token?{query}", play.world.root);
        let request = play.client.get(url);
        let request = if metadata { request.header("metadata", "true") } else { request };
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), json_of(answer).await)
    };
    let query = format!("api-version=2018-02-01&resource={}", play.world.root);
    assert_eq!(ask(&query, true).await.0, 400, "no identity");
    play.set(json!({ "apps": [{ "managed_identity": true }] }));
    let (status, body) = ask(&query, true).await;
    assert_eq!((status, &body["expires_in"]), (200, &json!("3599")));
    assert_eq!(ask(&query, false).await.0, 400, "no header");
    assert_eq!(ask(&format!("{query}/.default"), true).await.0, 400, "a scope is no resource");
    assert_eq!(ask(&format!("{query}&client_id=other"), true).await.0, 400);
    assert_eq!(ask(&format!("{query}&client_id={CLIENT}"), true).await.0, 200);
    play.stop().await;
}

#[tokio::test]
async fn who_may_not_is_refused() {
    let play = Play::start().await;
    play.set(json!({ "apps": [{ "roles": ["Mail.Send"] }] }));
    let answer = play.post("messages", &message()["message"]).await;
    assert_eq!(code_of(answer).await, (403, "ErrorAccessDenied".to_owned()));
    play.check(json!({}), 202, "").await;
    play.set(json!({ "apps": [{ "roles": [], "hidden_roles": ["Mail.Send"] }] }));
    play.check(json!({}), 202, "").await;
    play.set(json!({ "apps": [{ "roles": [] }] }));
    play.check(json!({}), 403, "ErrorAccessDenied").await;
    play.set(json!({ "apps": [{ "only": ["other@contoso.test"] }] }));
    play.check(json!({}), 403, "ErrorAccessDenied").await;
    play.set(json!({ "apps": [{ "domains": ["fabrikam.test"] }] }));
    play.check(json!({}), 404, "ErrorInvalidUser").await;
    play.set(json!({ "apps": [{}], "mailboxes": ["other@contoso.test"] }));
    play.check(json!({}), 404, "ErrorInvalidUser").await;
    play.set(json!({ "mailboxes": null }));

    let from = |address: &str, name: &str| json!({ "message": { "from": { "emailAddress": { "address": address, "name": name } } } });
    play.check(from("other@contoso.test", "O"), 403, "ErrorSendAsDenied").await;
    play.check(from(MAILBOX, "me@contoso.test"), 403, "ErrorSendAsDenied").await;
    play.check(from("list@contoso.test", "L"), 202, "").await;
    play.set(json!({ "send_as": [[MAILBOX, "other@contoso.test"]] }));
    play.check(from("Other@contoso.test", "O"), 202, "").await;
    play.stop().await;
}

#[tokio::test]
async fn a_large_message_goes_by_a_draft_and_an_upload_session() {
    let play = Play::start().await;
    let id = play.draft().await;
    let path = format!("messages/{id}/attachments");
    assert_eq!(play.post(&path, &attachment("small.bin", b"abc")).await.status(), 201);
    let octets: Vec<u8> = (0..4_194_304_u32).map(|n| n.to_le_bytes()[0]).collect();
    let item = |size: usize| json!({ "AttachmentItem": { "attachmentType": "file", "name": "big.bin", "size": size } });
    let session = format!("{path}/createUploadSession");
    let answer = play.post(&session, &item(2_097_151)).await;
    let code = "ErrorAttachmentSizeShouldNotBeLessThanMinimumSize";
    assert_eq!(code_of(answer).await, (400, code.to_owned()));
    let answer = play.post(&session, &item(200_000_000)).await;
    assert_eq!(answer.status(), 400);
    let answer = play.post(&session, &item(octets.len())).await;
    assert_eq!(answer.status(), 201);
    let body = json_of(answer).await;
    assert_eq!(body["nextExpectedRanges"], json!(["0-"]));
    let url = body["uploadUrl"].as_str().unwrap().to_owned();

    let put = |start: usize, end: usize| {
        let range = format!("bytes {start}-{}/{}", end - 1, octets.len());
        let request = play.client.put(&url).header("content-range", range);
        request.header("content-type", "application/octet-stream").body(octets[start..end].to_vec())
    };
    let answer = put(0, 1_000_000).bearer_auth(&play.token).send().await.unwrap();
    assert_eq!(code_of(answer).await, (401, "InvalidAudienceForResource".to_owned()));
    let answer = put(0, 1_000_000).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(json_of(answer).await["NextExpectedRanges"], json!(["1000000"]));
    for (start, inner) in [(0, "fragmentOverlap"), (2_000_000, "fragmentOutOfOrder")] {
        let answer = put(start, start + 1_000).send().await.unwrap();
        assert_eq!(answer.status(), 416);
        let body = json_of(answer).await;
        assert_eq!(body["error"]["innerError"]["code"], inner);
    }
    assert_eq!(put(0, 4_000_001).send().await.unwrap().status(), 413);
    let wrong = put(1_000_000, 1_000_010).header("content-range", "bytes 1000000-1000020/4194304");
    assert_eq!(wrong.send().await.unwrap().status(), 400);
    let answer = play.client.get(&url).send().await.unwrap();
    assert_eq!(json_of(answer).await["nextExpectedRanges"], json!(["1000000-"]));
    let answer = put(1_000_000, octets.len()).send().await.unwrap();
    assert_eq!(answer.status(), 201);
    assert!(answer.headers().contains_key("location"));
    assert_eq!(put(0, 10).send().await.unwrap().status(), 404, "the session is over");

    assert_eq!(play.send(&id).await.status(), 202);
    let mail = play.world.inbox.mails().pop().unwrap();
    let stored = mail.stored.unwrap();
    assert_eq!(mail.form, Form::Draft);
    assert_eq!(&stored.attachments[0].content[..], b"abc");
    assert!(stored.attachments[1].content == octets);
    assert_eq!(play.send(&id).await.status(), 404, "it is no draft any more");
    play.stop().await;
}

#[tokio::test]
async fn a_draft_is_sent_only_with_a_length_of_zero_and_goes_on_delete() {
    let play = Play::start().await;
    let id = play.draft().await;
    let path = format!("messages/{id}");
    let url = format!("{}/v1.0/users/{MAILBOX}/{path}/send", play.world.root);
    // The client writes a length of zero by itself, so this one is written by hand.
    let answer = raw(&play, &format!("POST {url} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", play.token)).await;
    assert!(answer.starts_with("HTTP/1.1 411 "), "{answer}");
    let answer = play.request("POST", &format!("{path}/send")).body("{}").send().await.unwrap();
    assert_eq!(answer.status(), 400);
    let shown =
        json_of(play.request("GET", &format!("{path}?$select=isDraft")).send().await.unwrap());
    assert_eq!(shown.await, json!({ "id": id, "isDraft": true }));
    let answer =
        play.request("PATCH", &path).json(&json!({ "subject": "New" })).send().await.unwrap();
    assert_eq!(json_of(answer).await["subject"], "New");
    assert_eq!(play.request("DELETE", &path).send().await.unwrap().status(), 204);
    assert_eq!(play.request("GET", &path).send().await.unwrap().status(), 404);
    assert_eq!(play.world.inbox.arrived(), 0);
    play.stop().await;
}

/// What is answered to these octets, until the connection ends or its head is there.
async fn raw(play: &Play, request: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let address = play.world.root.strip_prefix("http://").unwrap();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.windows(4).any(|end| end == b"\r\n\r\n") {
        if stream.read_buf(&mut answer).await.unwrap() == 0 {
            break;
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn what_was_sent_is_found_by_its_id_and_by_its_property() {
    let play = Play::start().await;
    let property = "String {66f5a359-4659-4830-9070-00047ec6ac6e} Name mailsluice-id";
    let change = json!({ "saveToSentItems": true, "message": {
        "internetMessageId": "<o'neill+1@app>",
        "singleValueExtendedProperties": [{ "id": property, "value": "42-1" }],
    }});
    play.check(change.clone(), 202, "").await;
    let find = async |filter: &str| {
        let filter: String =
            oauth2::url::form_urlencoded::byte_serialize(filter.as_bytes()).collect();
        let path = format!("messages?$filter={filter}&$select=id,isDraft");
        let answer = json_of(play.request("GET", &path).send().await.unwrap()).await;
        answer["value"].as_array().unwrap_or_else(|| panic!("{answer}")).clone()
    };
    let found = find("internetMessageId eq '<o''neill+1@app>'").await;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0]["isDraft"], false);
    let by = |value: &str| {
        format!(
            "singleValueExtendedProperties/any(ep: ep/id eq '{property}' and ep/value eq '{value}')"
        )
    };
    assert_eq!(find(&by("42-1")).await.len(), 1);
    assert_eq!(find(&by("42-2")).await.len(), 0);
    let mut other = change;
    merge(&mut other, &json!({ "saveToSentItems": false }));
    play.check(other, 202, "").await;
    assert_eq!(find(&by("42-1")).await.len(), 1, "no copy is kept");
    play.draft().await;
    assert_eq!(find("isDraft eq true").await.len(), 1);
    play.set(json!({ "index_lag_ms": 60_000 }));
    assert_eq!(find(&by("42-1")).await.len(), 0, "it is not in the index yet");
    play.stop().await;
}

#[tokio::test]
async fn recipients_ask_for_faults() {
    let play = Play::start().await;
    let to = |address: &str| json!({ "message": { "ccRecipients": [recipient(address)] } });
    play.check(to("invalid@x.test"), 400, "ErrorInvalidRecipients").await;
    play.check(to("quota@x.test"), 429, "ErrorExceededMessageLimit").await;
    play.check(to("sendas@x.test"), 403, "ErrorSendAsDenied").await;
    play.check(to("fail-500@x.test"), 500, "ErrorInternalServerError").await;
    let mut one = message();
    merge(&mut one, &to("fail-503@x.test"));
    let answer = play.post("sendMail", &one).await;
    assert_eq!(answer.status(), 503);
    assert!(answer.text().await.unwrap().contains("<html>"));
    assert_eq!(play.world.inbox.arrived(), 0);
    play.check(to("throttle-1@x.test"), 429, "ApplicationThrottled").await;
    play.check(to("throttle-1@x.test"), 202, "").await;
    merge(&mut one, &to("sent-504@x.test"));
    assert_eq!(play.post("sendMail", &one).await.status(), 504);
    assert_eq!(play.world.inbox.arrived(), 2);
    merge(&mut one, &to("lost-answer@x.test"));
    assert!(play.request("POST", "sendMail").json(&one).send().await.is_err());
    assert_eq!(play.world.inbox.arrived(), 3);
    merge(&mut one, &to("drop@x.test"));
    assert!(play.request("POST", "sendMail").json(&one).send().await.is_err());
    assert_eq!(play.world.inbox.arrived(), 3);
    let url = format!("{}/v1.0/users/unlicensed@contoso.test/sendMail", play.world.root);
    let answer =
        play.client.post(url).bearer_auth(&play.token).json(&message()).send().await.unwrap();
    assert_eq!(code_of(answer).await, (404, "MailboxNotEnabledForRESTAPI".to_owned()));
    play.stop().await;
}

#[tokio::test]
async fn faults_are_played_for_the_requests_that_they_name() {
    let play = Play::start().await;
    let path = "/v1.0/users/*/sendMail".to_owned();
    let fault = |fault: Fault| play.world.fault(Fault { path: path.clone(), ..fault });
    fault(Fault {
        status: Some(503),
        headers: BTreeMap::from([("Retry-After".to_owned(), "2".to_owned())]),
        body: json!("busy"),
        ..Fault::default()
    });
    let answer = play.post("sendMail", &message()).await;
    assert_eq!(answer.headers()["retry-after"], "2");
    assert_eq!((answer.status().as_u16(), answer.text().await.unwrap()), (503, "busy".to_owned()));
    assert_eq!(play.world.inbox.arrived(), 0);
    fault(Fault {
        acts: true,
        code: Some("UnknownError".to_owned()),
        status: Some(500),
        ..Fault::default()
    });
    let answer = play.post("sendMail", &message()).await;
    assert_eq!(code_of(answer).await, (500, "UnknownError".to_owned()));
    assert_eq!(play.world.inbox.arrived(), 1);
    fault(Fault { then: Then::Drop, read: Some(10), ..Fault::default() });
    assert!(play.request("POST", "sendMail").json(&message()).send().await.is_err());
    fault(Fault {
        then: Then::Truncate,
        status: Some(500),
        body: json!({ "error": 1 }),
        ..Fault::default()
    });
    let answer = play.post("sendMail", &message()).await;
    assert!(answer.text().await.is_err());
    fault(Fault { then: Then::Endless, status: Some(500), ..Fault::default() });
    let mut answer = play.post("sendMail", &message()).await;
    let mut octets = 0;
    while octets < 10_000_000 {
        octets += answer.chunk().await.unwrap().unwrap().len();
    }
    drop(answer);
    fault(Fault { then: Then::Hang, acts: true, ..Fault::default() });
    let mut changes = play.world.inbox.changes();
    let hung = play.request("POST", "sendMail").json(&message());
    let hung = play.shutdown.tasks.spawn(async move { hung.send().await.is_ok() });
    while play.world.inbox.arrived() < 2 {
        changes.changed().await.unwrap();
    }
    tokio::task::yield_now().await;
    assert!(!hung.is_finished());
    hung.abort();
    fault(Fault { delay_ms: 1, ..Fault::default() });
    play.check(json!({}), 202, "").await;
    assert!(play.world.faults.all().is_empty());
    play.stop().await;
}

#[tokio::test]
async fn the_fifth_request_at_once_is_throttled_and_other_mailboxes_are_not() {
    let play = Play::start().await;
    for _ in 0..4 {
        play.world.fault(Fault { acts: true, then: Then::Hang, ..Fault::default() });
    }
    let mut requests = play.world.request_changes();
    let began = play.world.requests().len();
    let hanging: Vec<_> = (0..4)
        .map(|_| {
            let request = play.request("POST", "sendMail").json(&message());
            play.shutdown.tasks.spawn(async move { request.send().await.is_err() })
        })
        .collect();
    while play.world.inbox.arrived() < 4 {
        requests.changed().await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(play.world.requests().len(), began + 4);
    let answer = play.post("sendMail", &message()).await;
    let delay: f64 = answer.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!(delay > 0.0 && delay.fract() > 0.0);
    assert_eq!(code_of(answer).await, (429, "ApplicationThrottled".to_owned()));
    let url = format!("{}/v1.0/users/other@contoso.test/sendMail", play.world.root);
    let answer =
        play.client.post(url).bearer_auth(&play.token).json(&message()).send().await.unwrap();
    assert_eq!(answer.status(), 202);
    for one in hanging {
        one.abort();
    }
    play.stop().await;
}

#[tokio::test]
async fn limits_hold_when_they_are_on() {
    let play = Play::start().await;
    play.set(json!({ "limits": { "messages": "2/1h" } }));
    play.check(json!({}), 202, "").await;
    play.check(json!({}), 202, "").await;
    play.check(json!({}), 429, "ApplicationThrottled").await;
    play.set(json!({ "limits": { "messages": null, "recipients": "1/1h" } }));
    play.check(json!({}), 202, "").await;
    play.check(json!({}), 429, "ErrorExceededMessageLimit").await;
    play.set(json!({ "limits": { "recipients": null, "upload": "1kB/1h" } }));
    let change = json!({ "message": { "body": { "content": "x".repeat(800) } } });
    play.check(change.clone(), 202, "").await;
    play.check(change, 429, "ApplicationThrottled").await;
    play.set(json!({ "limits": { "upload": null, "requests": "1/1h" } }));
    play.check(json!({}), 202, "").await;
    play.check(json!({}), 429, "ApplicationThrottled").await;
    play.stop().await;
}

#[tokio::test]
async fn every_request_is_recorded_without_secrets() {
    let play = Play::start().await;
    play.check(json!({}), 202, "").await;
    let id = "3f2504e0-4f89-11d3-9a0c-0305e82c3301";
    let request = play.request("GET", "messages?$top=1").header("client-request-id", id);
    let answer = request.send().await.unwrap();
    assert_eq!(answer.headers()["client-request-id"], id);
    assert!(answer.headers().contains_key("request-id"));
    let records = play.world.requests();
    let [login, send, list] = records.as_slice() else { panic!("{records:?}") };
    assert_eq!(login.body["grant_type"], "client_credentials");
    assert_eq!((send.method.as_str(), send.status, send.end), ("POST", Some(202), "answered"));
    assert_eq!(send.path, format!("/v1.0/users/{MAILBOX}/sendMail"));
    assert_eq!(send.body["message"]["subject"], "Hello");
    assert_eq!(send.body_size, message().to_string().len() as u64);
    assert_eq!(send.headers["authorization"], "Bearer (token 1)");
    assert!(list.path.ends_with("?$top=1"));
    let all = serde_json::to_string(&records).unwrap();
    assert!(!all.contains(SECRET) && !all.contains(&play.token));
    play.stop().await;
}

#[tokio::test]
async fn tenants_and_their_apps_are_kept_apart() {
    let play = Play::start().await;
    let other = "5a4db0c5-0000-4000-8000-000000000009";
    play.set(json!({ "apps": [
        { "domains": ["contoso.test"] },
        { "tenant": other, "domains": ["fabrikam.test"], "client_id": "other", "secrets": ["s"] },
    ]}));
    play.check(json!({}), 202, "").await;
    let answer = play.ask_token_of(other, &[("client_secret", SECRET)]).await;
    assert_eq!(json_of(answer).await["error_codes"][0], 700_016, "the app is of another tenant");
    let fields = [("client_id", "other"), ("client_secret", "s")];
    let answer = json_of(play.ask_token_of("fabrikam.test", &fields).await).await;
    let token = answer["access_token"].as_str().unwrap();
    for (mailbox, status) in [(MAILBOX, 404), ("me@fabrikam.test", 202)] {
        let url = format!("{}/v1.0/users/{mailbox}/sendMail", play.world.root);
        let answer = play.client.post(url).bearer_auth(token).json(&message()).send().await;
        assert_eq!(answer.unwrap().status(), status, "{mailbox}");
    }
    play.stop().await;
}

#[tokio::test]
async fn a_message_has_no_more_octets_than_the_tenant_allows() {
    let play = Play::start().await;
    play.set(json!({ "message_size": 3_000_000 }));
    let id = play.draft().await;
    let path = format!("messages/{id}/attachments");
    let octets = vec![b'a'; 2_000_000];
    assert_eq!(play.post(&path, &attachment("1", &octets)).await.status(), 201);
    let answer = play.post(&path, &attachment("2", &octets)).await;
    assert_eq!(code_of(answer).await, (400, "ErrorMessageSizeExceeded".to_owned()));
    let item =
        json!({ "AttachmentItem": { "attachmentType": "file", "name": "3", "size": 2_500_000 } });
    let answer = play.post(&format!("{path}/createUploadSession"), &item).await;
    assert_eq!(code_of(answer).await, (400, "ErrorMessageSizeExceeded".to_owned()));
    play.set(json!({ "request_size": 10_000_000, "message_size": 35_000_000 }));
    let octets = vec![b'a'; 3_145_612];
    assert_eq!(play.post(&path, &attachment("4", &octets)).await.status(), 413);
    let octets = vec![b'a'; 3_145_611];
    assert_eq!(play.post(&path, &attachment("4", &octets)).await.status(), 201);
    play.set(json!({ "keep": 6_000_000 }));
    let answer = play.post(&path, &attachment("5", &octets)).await;
    assert_eq!(code_of(answer).await, (507, "ErrorQuotaExceeded".to_owned()));
    play.stop().await;
}

#[tokio::test]
async fn a_draft_keeps_its_id_only_where_that_is_asked_for() {
    let play = Play::start().await;
    let id = play.draft().await;
    assert_eq!(play.send(&id).await.status(), 202);
    let shown = async |id: &str| {
        let path = format!("messages/{id}?$select=isDraft");
        play.request("GET", &path).send().await.unwrap()
    };
    assert_eq!(shown(&id).await.status(), 404);
    let request = play.request("POST", "messages").header("prefer", "IdType=\"ImmutableId\"");
    let answer = request.json(&message()["message"]).send().await.unwrap();
    let id = json_of(answer).await["id"].as_str().unwrap().to_owned();
    assert_eq!(play.send(&id).await.status(), 202);
    assert_eq!(json_of(shown(&id).await).await["isDraft"], false);
    play.stop().await;
}

#[tokio::test]
async fn the_control_api_sets_faults_and_shows_what_came() {
    let play = Play::start().await;
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let api = format!("http://{}/api/v1", socket.local_addr().unwrap());
    let router = control::router(Arc::clone(&play.world));
    let token = play.shutdown.token.clone();
    play.shutdown.tasks.spawn(crate::sandbox::inbox::serve(socket, router, token));
    let post = async |path: &str, body: Value| {
        play.client
            .post(format!("{api}/{path}"))
            .json(&body)
            .send()
            .await
            .unwrap()
            .status()
            .as_u16()
    };
    let fault = json!({ "method": "POST", "path": "*/sendMail", "status": 429, "headers": { "Retry-After": "2" } });
    assert_eq!(post("faults", json!([fault])).await, 204);
    assert_eq!(post("faults", json!({ "pth": "*" })).await, 400);
    let answer = play.post("sendMail", &message()).await;
    assert_eq!(
        (answer.status().as_u16(), answer.headers()["retry-after"].as_bytes()),
        (429, &b"2"[..])
    );
    let get = async |path: &str| {
        json_of(play.client.get(format!("{api}/{path}")).send().await.unwrap()).await
    };
    assert_eq!(get("faults").await, json!([]));
    let requests = get("requests").await;
    assert_eq!(requests["requests"][1]["status"], 429);
    assert_eq!(requests["requests"][1]["fault"], "by request");
    let change = json!({ "token_lifetime": 7 });
    let request = play.client.patch(format!("{api}/settings")).json(&change);
    assert_eq!(request.send().await.unwrap().status(), 200);
    assert_eq!(get("settings").await["token_lifetime"], 7);
    let request = play.client.patch(format!("{api}/settings")).json(&json!({ "x": 1 }));
    assert_eq!(request.send().await.unwrap().status(), 400);
    for path in ["tokens", "requests", "faults"] {
        let answer = play.client.delete(format!("{api}/{path}")).send().await.unwrap();
        assert_eq!(answer.status(), 204, "{path}");
    }
    assert_eq!(get("requests").await["requests"], json!([]));
    play.check(json!({}), 401, "InvalidAuthenticationToken").await;
    play.stop().await;
}
