//! A server for tokens that follows a script.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, Method, Response, StatusCode, Uri};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::config::{App, Cloud, Credential, Secret};

pub(in crate::provider) struct Authority {
    /// Its root URL.
    pub(in crate::provider) login: String,
    asked: mpsc::UnboundedReceiver<Question>,
    /// Each answer takes one.
    pub(in crate::provider) may_answer: Arc<Semaphore>,
    _runs: AbortOnDropHandle<()>,
}

#[derive(Debug)]
pub(in crate::provider) struct Question {
    pub(in crate::provider) method: Method,
    pub(in crate::provider) uri: Uri,
    pub(in crate::provider) headers: HeaderMap,
    pub(in crate::provider) body: String,
}

#[derive(Clone, Debug)]
pub(in crate::provider) struct Answer {
    pub(in crate::provider) status: u16,
    pub(in crate::provider) headers: Vec<(&'static str, String)>,
    pub(in crate::provider) body: String,
}

impl Answer {
    pub(in crate::provider) fn new(status: u16, body: impl Into<String>) -> Self {
        Self { status, headers: Vec::new(), body: body.into() }
    }

    pub(in crate::provider) fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    pub(in crate::provider) fn token(token: &str) -> Self {
        let fields = r#""token_type":"Bearer","expires_in":3599"#;
        Self::new(200, format!(r#"{{{fields},"access_token":"{token}"}}"#))
    }

    /// As Microsoft Entra refuses.
    pub(in crate::provider) fn refusal(status: u16, error: &str, code: u64, text: &str) -> Self {
        let body = serde_json::json!({
            "error": error,
            "error_description": format!("AADSTS{code}: {text} Trace ID: tr-1 Correlation ID: co-1"),
            "error_codes": [code],
            "trace_id": "tr-1",
            "correlation_id": "co-1",
        });
        Self::new(status, body.to_string())
    }
}

impl Authority {
    /// Gives these answers one after the other, and the last for ever.
    pub(in crate::provider) async fn with(answers: impl IntoIterator<Item = Answer>) -> Self {
        let answers = Mutex::new(answers.into_iter().collect::<VecDeque<_>>());
        let answers = Arc::new(answers);
        let (tell, asked) = mpsc::unbounded_channel();
        let may_answer = Arc::new(Semaphore::new(1_000));
        let permits = Arc::clone(&may_answer);
        let handler = move |method: Method, uri: Uri, headers: HeaderMap, body: Bytes| {
            let (answers, permits, tell) =
                (Arc::clone(&answers), Arc::clone(&permits), tell.clone());
            async move {
                let body = String::from_utf8(body.to_vec()).unwrap();
                drop(tell.send(Question { method, uri, headers, body }));
                permits.acquire().await.unwrap().forget();
                let answer = {
                    let mut answers = answers.lock().unwrap();
                    match answers.len() {
                        1 => answers[0].clone(),
                        _ => answers.pop_front().unwrap(),
                    }
                };
                let mut response = Response::new(axum::body::Body::from(answer.body));
                *response.status_mut() = StatusCode::from_u16(answer.status).unwrap();
                for (name, value) in answer.headers {
                    response.headers_mut().insert(name, value.parse().unwrap());
                }
                response
            }
        };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let login = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(handler);
        let runs = TaskTracker::new().spawn(async move {
            axum::serve(listener, router).await.unwrap();
        });
        Self { login, asked, may_answer, _runs: AbortOnDropHandle::new(runs) }
    }

    /// What was asked since the last call.
    pub(in crate::provider) fn questions(&mut self) -> Vec<Question> {
        std::iter::from_fn(|| self.asked.try_recv().ok()).collect()
    }

    /// The next question.
    pub(in crate::provider) async fn question(&mut self) -> Question {
        self.asked.recv().await.unwrap()
    }

    /// An application that asks here.
    pub(in crate::provider) fn app(&self, credential: Credential) -> App {
        App {
            tenant_id: "contoso.example".to_owned(),
            client_id: "client-1".to_owned(),
            credential,
            login: self.login.clone(),
            scope: "https://graph.example/.default".to_owned(),
            cloud: Cloud::Global,
        }
    }
}

/// A client secret without a second one.
pub(in crate::provider) fn secret(text: &str) -> Credential {
    Credential::Secret { secret: Secret::for_tests(text), next: None }
}

impl Question {
    /// The fields of the form that it has for a body, decoded.
    pub(in crate::provider) fn form(&self) -> Vec<(String, String)> {
        let url = reqwest::Url::parse(&format!("http://x/?{}", self.body)).unwrap();
        url.query_pairs().map(|(name, value)| (name.into_owned(), value.into_owned())).collect()
    }

    pub(in crate::provider) fn field(&self, name: &str) -> String {
        let form = self.form();
        let field = form.into_iter().find(|(own, _)| own == name);
        field.map(|(_, value)| value).unwrap_or_default()
    }
}
