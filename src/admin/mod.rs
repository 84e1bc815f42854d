//! The HTTP side: `/livez`, `/readyz`, `/metrics`. Read-only, on loopback.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::clock;
use crate::envelope::{Intake, QueueState};
use crate::metrics::Metrics;
use crate::outcome::Cause;
use crate::spool::Spool;

pub(crate) mod socket;

/// What the answers are made of.
pub struct Shared<S> {
    pub spool: Arc<S>,
    pub metrics: Arc<Metrics>,
    pub intake: watch::Receiver<Intake>,
    /// Why deliveries wait, where they do.
    pub trouble: watch::Receiver<Option<Cause>>,
    /// Fires when the daemon begins to stop.
    pub stopping: CancellationToken,
}

/// Serves until `stop` fires.
pub async fn serve<S: Spool>(socket: TcpListener, shared: Arc<Shared<S>>, stop: CancellationToken) {
    let router = Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz::<S>))
        .route("/metrics", get(metrics::<S>))
        .with_state(shared);
    let socket = socket::Guarded::new(socket);
    let served = axum::serve(socket, router).with_graceful_shutdown(stop.cancelled_owned()).await;
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
        Some(cause) => format!("ready; deliveries wait: {cause}\n").into_response(),
    }
}

async fn metrics<S: Spool>(State(shared): State<Arc<Shared<S>>>) -> Response {
    let health = shared.spool.health();
    let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    shared.metrics.spool_free.set(gauge(health.free));
    shared.metrics.spool_used.set(gauge(health.used));
    let failed = i64::try_from(health.failed).unwrap_or(i64::MAX);
    shared.metrics.queue.with_label_values(&["failed"]).set(failed);
    shared.metrics.queue_oldest.set(gauge(oldest_age(shared.spool.as_ref())));
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], shared.metrics.render()).into_response()
}

/// In seconds. Ids sort by the time of acceptance.
fn oldest_age<S: Spool>(spool: &S) -> u64 {
    let mut after = None;
    loop {
        let heads = spool.heads(after, 1_000);
        let Some(last) = heads.last() else { return 0 };
        if let Some(oldest) = heads.iter().find(|head| head.state == QueueState::Queued) {
            return clock::wall().since(oldest.id.accepted()).as_secs();
        }
        after = Some(last.id);
    }
}
