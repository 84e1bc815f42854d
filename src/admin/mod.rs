//! The HTTP side: `/livez`, `/readyz`, `/metrics`, read-only, on loopback; the same and the queue on a Unix socket, which
//! only the user of the daemon can open.

use std::future::ready;
use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::clock;
use crate::delivery::operator::Operator;
use crate::envelope::{Intake, QueueState};
use crate::metrics::Metrics;
use crate::outcome::Cause;
use crate::spool::Spool;
use crate::telemetry::recent::Recent;

pub mod filter;
mod log;
mod queue;
pub(crate) mod socket;
pub mod status;
mod stream;
mod view;

pub(crate) use log::FOLLOWERS;

/// Octets of a request's body: a thousand ids are less.
const BODY: usize = 256 * 1024;

/// What the answers are made of.
pub struct Shared<S> {
    pub spool: Arc<S>,
    pub metrics: Arc<Metrics>,
    pub intake: watch::Receiver<Intake>,
    /// Why deliveries wait, where they do.
    pub trouble: watch::Receiver<Option<Cause>>,
    /// Fires when the daemon begins to stop.
    pub stopping: CancellationToken,
    pub operator: Operator,
    pub recent: Arc<Recent>,
    /// A place for each who follows the log.
    pub followers: Arc<Semaphore>,
    pub facts: status::Facts,
    /// Fires when whoever still listens is to be let go.
    pub end: CancellationToken,
}

/// Serves what anyone on this machine may see, until the end.
pub async fn serve<S: Spool>(socket: TcpListener, shared: Arc<Shared<S>>) {
    let end = shared.end.clone();
    serve_on(socket::Guarded::new(socket, socket::PLACES), looks().with_state(shared), end).await;
}

/// Serves the operator, until the end.
pub async fn serve_operator<S: Spool>(socket: UnixListener, shared: Arc<Shared<S>>) {
    let end = shared.end.clone();
    let router = looks()
        .route("/api/v1/status", get(status::status::<S>))
        .route("/api/v1/log", get(log::log::<S>))
        .route("/api/v1/queue", get(queue::list::<S>).delete(queue::delete::<S>))
        .route("/api/v1/queue/retry", post(queue::retry::<S>))
        .route("/api/v1/queue/hold", post(queue::hold::<S>))
        .route("/api/v1/queue/release", post(queue::release::<S>))
        .route("/api/v1/queue/{id}", get(queue::show::<S>))
        .route("/api/v1/queue/{id}/content", get(queue::content::<S>))
        .layer(DefaultBodyLimit::max(BODY))
        .with_state(shared);
    serve_on(socket::Guarded::new(socket, socket::OPERATORS), router, end).await;
}

fn looks<S: Spool>() -> Router<Arc<Shared<S>>> {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz::<S>))
        .route("/metrics", get(metrics::<S>))
}

async fn serve_on<L: socket::Source>(
    listener: socket::Guarded<L>,
    router: Router,
    end: CancellationToken,
) where
    L::Address: std::fmt::Debug,
{
    let refused = |status, words: &'static str| ready(queue::Refused(status, words.to_owned()));
    let router = router
        .fallback(move || refused(StatusCode::NOT_FOUND, "nothing is at this path"))
        // It is for the routes that are there by now.
        .method_not_allowed_fallback(move || {
            refused(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method")
        });
    let served = axum::serve(listener, router).with_graceful_shutdown(end.cancelled_owned()).await;
    if let Err(error) = served {
        error!(%error, "the admin listener ended: {error}");
    }
}

/// The process answers.
async fn livez() -> &'static str {
    "ok\n"
}

/// 200 while mail is accepted, else 503; the first reason on the ladder says why. That deliveries wait does not make
/// the gateway unready (accepting and keeping mail is what it is for), but it is told.
async fn readyz<S: Spool>(State(shared): State<Arc<Shared<S>>>) -> Response {
    let unready = |reason: String| {
        (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")).into_response()
    };
    if shared.stopping.is_cancelled() {
        return unready("shutting down".to_owned());
    }
    if let Some(trouble) = shared.spool.health().trouble {
        return unready(format!("the spool takes no mail: {trouble}"));
    }
    if !shared.spool.has_room_for(0) {
        return unready("the disk of the spool is full or under spool.min_free".to_owned());
    }
    if let Some(reply) = &shared.intake.borrow().refusal {
        return unready(format!("mail is refused with {reply}"));
    }
    match &*shared.trouble.borrow() {
        None => "ready\n".into_response(),
        Some(cause) => format!("ready; deliveries wait: {}\n", cause.with_cure()).into_response(),
    }
}

async fn metrics<S: Spool>(State(shared): State<Arc<Shared<S>>>) -> Response {
    let health = shared.spool.health();
    let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    shared.metrics.spool_free.set(gauge(health.free));
    shared.metrics.spool_used.set(gauge(health.used));
    let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    shared.metrics.queue.with_label_values(&["failed"]).set(count(health.failed));
    shared.metrics.in_doubt_messages.set(count(health.in_doubt));
    shared.metrics.queue_oldest.set(gauge(oldest(shared.spool.as_ref()).await));
    shared.metrics.queue_bytes.set(gauge(health.contents));
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], shared.metrics.render()).into_response()
}

/// The age of the oldest queued message, in seconds. Ids sort by the time of acceptance.
async fn oldest<S: Spool>(spool: &S) -> u64 {
    let mut after = None;
    loop {
        let heads = spool.heads(after, 1_000);
        let Some(last) = heads.last() else { return 0 };
        after = Some(last.id);
        if let Some(head) = heads.iter().find(|head| head.state == QueueState::Queued) {
            return clock::wall().since(head.id.accepted()).as_secs();
        }
        // Mail has its turn in between.
        tokio::task::yield_now().await;
    }
}
