//! The question for a token, by each of the ways to log in.

use std::fmt;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use oauth2::basic::{
    BasicErrorResponse, BasicRevocationErrorResponse, BasicTokenIntrospectionResponse,
};
use oauth2::{
    AsyncHttpClient, AuthType, Client, ClientId, ClientSecret, EndpointNotSet, EndpointSet,
    HttpRequest, HttpResponse, RequestTokenError, Scope, StandardRevocableToken, TokenUrl,
};
use reqwest::header::{DATE, HeaderMap, RETRY_AFTER};
use tracing::{debug, warn};
use zeroize::Zeroizing;

use crate::clock;
use crate::config::{self, App, Credential, Secret};
use crate::metrics::Metrics;
use crate::provider::{BoxFuture, http};

use super::answer::{Failure, Granted, Refusal, Remedy, Reply, refused};
use super::assertion::assertion;

/// Most of an answer that is read, in octets.
const MAX_ANSWER: usize = 64 * 1024;
/// Longest wait for an answer, once the question is on its way.
const ANSWER: Duration = Duration::from_secs(30);
/// Longest token of another authority, in octets.
const MAX_FEDERATED: u64 = 64 * 1024;

/// How often and how long the service of a machine's identity is asked; it is restarted at times, and says 410 then.
const IMDS_TRIES: u32 = 5;
const IMDS_FIRST: Duration = Duration::from_millis(800);
/// Waited in all while it says 410, in units of the first wait: at least 70 s.
const IMDS_GONE: u32 = 88;
const IMDS_CONNECT: Duration = Duration::from_secs(5);

const ASSERTION_TYPE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

type Entra = Client<
    BasicErrorResponse,
    Reply,
    BasicTokenIntrospectionResponse,
    StandardRevocableToken,
    BasicRevocationErrorResponse,
    EndpointNotSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointSet,
>;

/// What the question shows.
enum Shown<'a> {
    Secret(&'a Secret),
    Assertion(Zeroizing<String>),
}

pub(super) struct Ask {
    http: reqwest::Client,
    app: App,
    metrics: Arc<Metrics>,
    /// The next secret is the one that works.
    next_works: AtomicBool,
    /// The first wait between two questions to the service of a machine's identity.
    imds_first: Duration,
}

/// Why the question got no answer that grants a token.
#[derive(Debug)]
enum Fault {
    Http(reqwest::Error),
    Late,
    Refused(Refusal),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no token")
    }
}

impl std::error::Error for Fault {}

impl Ask {
    pub(super) fn new(http: reqwest::Client, app: App, metrics: Arc<Metrics>) -> Self {
        Self { http, app, metrics, next_works: AtomicBool::new(false), imds_first: IMDS_FIRST }
    }

    #[cfg(test)]
    pub(super) fn in_haste(self) -> Self {
        Self { imds_first: Duration::from_millis(1), ..self }
    }

    pub(super) async fn fetch(&self) -> Result<Granted, Failure> {
        match &self.app.credential {
            Credential::Secret { secret, next } => self.by_secret(secret, next.as_ref()).await,
            Credential::Certificate { certificate, private_key } => {
                self.by_certificate(certificate, private_key).await
            }
            Credential::WorkloadIdentity { token_file } => {
                let token = federated(token_file).map_err(|why| {
                    let file = token_file.display();
                    Failure::local(format!("AZURE_FEDERATED_TOKEN_FILE is {file}, which {why}"))
                })?;
                self.entra(Shown::Assertion(token)).await
            }
            Credential::ManagedIdentity => self.by_machine().await,
        }
    }

    /// With the secret that worked last, and where that is refused, with the other.
    async fn by_secret(&self, secret: &Secret, next: Option<&Secret>) -> Result<Granted, Failure> {
        let Some(next) = next else { return self.entra(Shown::Secret(secret)).await };
        let next_works = self.next_works.load(Ordering::Relaxed);
        let (one, other) = if next_works { (next, secret) } else { (secret, next) };
        let failure = match self.entra(Shown::Secret(one)).await {
            Err(failure) if failure.remedy == Remedy::AnotherSecret => failure,
            result => return result,
        };
        let result = self.entra(Shown::Secret(other)).await;
        match &result {
            Ok(_) => {
                self.next_works.store(!next_works, Ordering::Relaxed);
                if !next_works {
                    let why = &failure.cause;
                    warn!(
                        "provider.client_secret is refused and provider.next_client_secret works: put it in the place of the first, and leave that out; the first was refused with: {why}"
                    );
                }
            }
            // Of two refusals, the one of the secret that is meant to work tells more.
            Err(second) if second.remedy == Remedy::AnotherSecret => return Err(failure),
            Err(_) => {}
        }
        result
    }

    /// The files are read each time, so that a new certificate needs no restart; and once more where this one is
    /// refused, because it may have been replaced in between.
    async fn by_certificate(
        &self,
        certificate: &Path,
        private_key: &Path,
    ) -> Result<Granted, Failure> {
        let result = self.entra(self.sign(certificate, private_key)?).await;
        match result {
            Err(failure) if failure.remedy == Remedy::ReadAgain => {
                self.entra(self.sign(certificate, private_key)?).await
            }
            result => result,
        }
    }

    fn sign(&self, certificate: &Path, private_key: &Path) -> Result<Shown<'static>, Failure> {
        let pair = config::pair(certificate, private_key).map_err(|(key, why)| {
            let path = if key == "certificate" { certificate } else { private_key };
            Failure::local(format!("provider.{key} is {}, which {why}", path.display()))
        })?;
        if let Some(end) = config::not_after(&pair.certificate) {
            self.metrics.credential_expiry.set(Duration::from_millis(end).as_secs_f64());
        }
        let made = assertion(&pair, &self.app.client_id, &self.token_url(), clock::wall());
        let made = made.map_err(|why| Failure::local(why.to_owned()))?;
        Ok(Shown::Assertion(Zeroizing::new(made)))
    }

    fn token_url(&self) -> String {
        format!("{}/{}/oauth2/v2.0/token", self.app.login, self.app.tenant_id)
    }

    /// The grant of client credentials (RFC 6749 4.4), as Microsoft Entra has it.
    async fn entra(&self, shown: Shown<'_>) -> Result<Granted, Failure> {
        let url = TokenUrl::new(self.token_url())
            .map_err(|_no_url| Failure::local("provider.endpoints.login is no URL".to_owned()))?;
        let client: Entra = Client::new(ClientId::new(self.app.client_id.clone()))
            .set_auth_type(AuthType::RequestBody)
            .set_token_uri(url);
        let client = match &shown {
            Shown::Secret(secret) => {
                client.set_client_secret(ClientSecret::new(secret.as_str().to_owned()))
            }
            Shown::Assertion(_) => client,
        };
        let mut question =
            client.exchange_client_credentials().add_scope(Scope::new(self.app.scope.clone()));
        if let Shown::Assertion(assertion) = &shown {
            question = question
                .add_extra_param("client_assertion_type", ASSERTION_TYPE)
                .add_extra_param("client_assertion", assertion.as_str());
        }
        let http = Http(self.http.clone());
        let answer = question.request_async(&http).await;
        let secret = match &shown {
            Shown::Secret(secret) => secret.as_str(),
            Shown::Assertion(assertion) => assertion,
        };
        match answer {
            Ok(reply) => read(&reply),
            Err(RequestTokenError::Request(fault)) => Err(self.failure(fault, &[secret])),
            // What they say may have a token in it.
            Err(
                RequestTokenError::ServerResponse(_)
                | RequestTokenError::Parse(..)
                | RequestTokenError::Other(_),
            ) => Err(no_token("its body is none that grants one")),
        }
    }

    /// The machine's own identity (IMDS of Azure).
    async fn by_machine(&self) -> Result<Granted, Failure> {
        let near = http::near(IMDS_CONNECT);
        let near = near.map_err(|error| Failure::local(error.to_string()))?;
        let mut wait = self.imds_first;
        let mut waited = Duration::ZERO;
        let mut tries = 0;
        loop {
            tries += 1;
            let fault = match send(self.question_to_machine(&near)).await {
                Ok((200, _, body)) => {
                    return match serde_json::from_slice(&body) {
                        Ok(reply) => read(&reply),
                        // What the error says may have the token in it.
                        Err(_) => Err(no_token("its body is none that grants one")),
                    };
                }
                Ok((status, headers, body)) => Fault::Refused(refusal(status, &headers, body)),
                Err(fault) => fault,
            };
            let again = match &fault {
                Fault::Refused(Refusal { status: 410, .. }) => waited < self.imds_first * IMDS_GONE,
                Fault::Refused(Refusal { status: 404 | 429 | 500.., .. }) => tries < IMDS_TRIES,
                Fault::Refused(_) | Fault::Http(_) | Fault::Late => false,
            };
            if !again {
                return Err(self.machine_failure(fault));
            }
            debug!("the identity service of this machine is asked again in {wait:?}");
            tokio::time::sleep(wait).await;
            waited += wait;
            wait *= 2;
        }
    }

    fn question_to_machine(&self, near: &reqwest::Client) -> reqwest::RequestBuilder {
        let resource = self.app.scope.strip_suffix("/.default").unwrap_or(&self.app.scope);
        let mut query = vec![("api-version", "2018-02-01"), ("resource", resource)];
        if !self.app.client_id.is_empty() {
            query.push(("client_id", &self.app.client_id));
        }
        let url = format!("{}/metadata/identity/oauth2/token", self.app.login);
        // What is no URL is an error of the request.
        let asked = reqwest::Url::parse_with_params(&url, &query).map(String::from).unwrap_or(url);
        near.get(asked).header("Metadata", "true")
    }

    fn machine_failure(&self, fault: Fault) -> Failure {
        match fault {
            Fault::Http(error) => Failure::unreachable(format!(
                "asking {} for a token: {}; this machine is none of Azure, or may not reach its identity service",
                self.app.login,
                http::words(error)
            )),
            Fault::Refused(refusal) => {
                let none = refusal.status == 400;
                let mut failure = refused(&refusal, clock::wall(), &[]);
                if none {
                    failure = failure.with_cure(
                        "is an identity assigned to this machine, and is provider.client_id its client id?",
                    );
                }
                failure
            }
            Fault::Late => self.failure(Fault::Late, &[]),
        }
    }

    fn failure(&self, fault: Fault, secrets: &[&str]) -> Failure {
        let login = &self.app.login;
        match fault {
            Fault::Http(error) => {
                let connect = error.is_connect();
                let words = format!("asking {login} for a token: {}", http::words(error));
                match connect {
                    true => Failure::unreachable(words),
                    false => Failure::broken(words),
                }
            }
            Fault::Late => {
                let wait = ANSWER.as_secs();
                Failure::broken(format!("asking {login} for a token: no answer within {wait} s"))
            }
            Fault::Refused(refusal) => refused(&refusal, clock::wall(), secrets),
        }
    }
}

/// What the library sends by.
struct Http(reqwest::Client);

impl AsyncHttpClient<'_> for Http {
    type Error = Fault;
    type Future = BoxFuture<'static, Result<HttpResponse, Fault>>;

    fn call(&self, request: HttpRequest) -> Self::Future {
        let (parts, body) = request.into_parts();
        let request = self.0.post(parts.uri.to_string()).headers(parts.headers).body(body);
        Box::pin(async move {
            match send(request).await? {
                (200, _, body) => Ok(HttpResponse::new(body)),
                (status, headers, body) => Err(Fault::Refused(refusal(status, &headers, body))),
            }
        })
    }
}

/// Sends and reads the answer, all of it in bounded time and space.
async fn send(request: reqwest::RequestBuilder) -> Result<(u16, HeaderMap, Vec<u8>), Fault> {
    let exchange = async {
        let response = request.send().await.map_err(Fault::Http)?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = http::body(response, MAX_ANSWER).await.map_err(Fault::Http)?;
        Ok((status, headers, body))
    };
    tokio::time::timeout(ANSWER, exchange).await.unwrap_or(Err(Fault::Late))
}

fn refusal(status: u16, headers: &HeaderMap, body: Vec<u8>) -> Refusal {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    Refusal {
        status,
        retry_after: text(RETRY_AFTER).and_then(|value| http::retry_after(value, clock::wall())),
        date: text(DATE).and_then(http::date),
        body,
    }
}

fn read(reply: &Reply) -> Result<Granted, Failure> {
    Granted::read(reply, clock::wall()).map_err(no_token)
}

fn no_token(why: &str) -> Failure {
    Failure::broken(format!("the answer to the question for a token cannot be used: {why}"))
}

/// The token of the cluster, as its file has it now.
fn federated(path: &Path) -> Result<Zeroizing<String>, String> {
    let mut text = Zeroizing::new(String::new());
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FEDERATED + 1).read_to_string(&mut text));
    let length = read.map_err(|error| format!("cannot be read: {error}"))?;
    match text.trim() {
        _ if length as u64 > MAX_FEDERATED => Err("is longer than 64 KiB".to_owned()),
        "" => Err("is empty".to_owned()),
        token => Ok(Zeroizing::new(token.to_owned())),
    }
}
