//! The gateway on one screen.

use std::sync::Arc;

use axum::Json;
use axum::extract::State as Has;
use serde::Serialize;

use crate::admin::Shared;
use crate::admin::filter::State;
use crate::admin::queue::Refused;
use crate::clock::{self, Time};
use crate::delivery::operator::Obstacle;
use crate::envelope::UnixMillis;
use crate::spool::Spool;

const HEADS: usize = 1_000;

/// What stays as it was at the start.
#[derive(Clone, Debug)]
pub struct Facts {
    pub started: UnixMillis,
    pub provider: &'static str,
    /// Where it is, as the configuration has it.
    pub server: Option<String>,
    /// The one lane: the account that the remote counts.
    pub lane: String,
    /// Where it listens, SMTP and HTTP.
    pub listeners: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct Status {
    version: &'static str,
    started: String,
    uptime_seconds: u64,
    provider: Provider,
    /// Since the start.
    accepted: u64,
    /// Recipients, since the start.
    delivered: u64,
    /// Recipients, since the start.
    failed: u64,
    queue: Queue,
    spool: Disk,
    listeners: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Provider {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<String>,
    lane: String,
    /// `open`, `closed` or `none`.
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    closed_since: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_probe: Option<String>,
}

/// Messages by state.
#[derive(Debug, Default, Serialize)]
struct Queue {
    due: u64,
    deferred: u64,
    in_flight: u64,
    held: u64,
    failed: u64,
    /// Of all but those that failed, those that may have been taken.
    in_doubt: usize,
    /// Octets of their contents.
    bytes: u64,
    /// Of those due, deferred or in flight.
    #[serde(skip_serializing_if = "Option::is_none")]
    oldest: Option<String>,
    oldest_age_seconds: u64,
}

#[derive(Debug, Serialize)]
struct Disk {
    used_bytes: u64,
    free_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    trouble: Option<String>,
}

/// `GET /api/v1/status`.
pub(super) async fn status<S: Spool>(
    Has(shared): Has<Arc<Shared<S>>>,
) -> Result<Json<Status>, Refused> {
    let look = shared.operator.look().await?;
    let now = clock::wall();
    let mut queue = Queue::default();
    let mut after = None;
    loop {
        let heads = shared.spool.heads(after, HEADS);
        let Some(last) = heads.last() else { break };
        after = Some(last.id);
        for head in heads {
            let state = State::of(&head, &look, now);
            let count = match state {
                State::Due | State::Queued | State::InDoubt => &mut queue.due,
                State::Deferred => &mut queue.deferred,
                State::InFlight => &mut queue.in_flight,
                State::Held => &mut queue.held,
                State::Failed => &mut queue.failed,
            };
            *count += 1;
            if queue.oldest.is_none() && !matches!(state, State::Held | State::Failed) {
                queue.oldest = Some(Time(head.id.accepted()).to_string());
                queue.oldest_age_seconds = now.since(head.id.accepted()).as_secs();
            }
        }
        tokio::task::yield_now().await;
    }
    let (facts, health, metrics) = (&shared.facts, shared.spool.health(), &shared.metrics);
    (queue.bytes, queue.in_doubt) = (health.contents, health.in_doubt);
    let ended = |outcome| metrics.recipients.with_label_values(&[outcome]).get();
    let closed = match &look.obstacle {
        Some(Obstacle::Closed(closed)) => Some(closed),
        Some(Obstacle::NoProvider) | None => None,
    };
    Ok(Json(Status {
        version: env!("CARGO_PKG_VERSION"),
        started: Time(facts.started).to_string(),
        uptime_seconds: now.since(facts.started).as_secs(),
        provider: Provider {
            kind: facts.provider,
            server: facts.server.clone(),
            lane: facts.lane.clone(),
            state: match look.obstacle {
                None => "open",
                Some(Obstacle::NoProvider) => "none",
                Some(Obstacle::Closed(_)) => "closed",
            },
            closed_since: closed.map(|closed| Time(closed.since).to_string()),
            why: closed.map(|closed| closed.why.with_cure()),
            next_probe: closed.map(|closed| Time(closed.until).to_string()),
        },
        accepted: metrics.accepted.get(),
        delivered: ended("delivered"),
        failed: ended("failed"),
        queue,
        spool: Disk { used_bytes: health.used, free_bytes: health.free, trouble: health.trouble },
        listeners: facts.listeners.clone(),
    }))
}
