//! The events of the log, as JSON lines.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Has};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use crate::admin::queue::Refused;
use crate::admin::{Shared, stream};
use crate::spool::Spool;
use crate::telemetry::recent::{Follower, KEPT, Recent};

/// A follower to whom there is nothing to say gets an empty line: so one that is gone is noticed, and the connection is
/// not taken for idle.
const PULSE: Duration = Duration::from_secs(4);

/// Who follows keeps a connection, and others want some too.
pub(crate) const FOLLOWERS: usize = 4;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Span {
    /// Events of the past.
    n: Option<usize>,
    follow: bool,
}

/// `GET /api/v1/log`.
pub(super) async fn log<S: Spool>(
    Has(shared): Has<Arc<Shared<S>>>,
    span: Result<Query<Span>, QueryRejection>,
) -> Result<Response, Refused> {
    let Query(Span { n, follow }) = span?;
    let place = match follow.then(|| Arc::clone(&shared.followers).try_acquire_owned()) {
        Some(Err(_full)) => {
            let words = format!("{FOLLOWERS} others follow the log already, and no more may");
            return Err(Refused(StatusCode::SERVICE_UNAVAILABLE, words));
        }
        Some(Ok(place)) => Some(place),
        None => None,
    };
    let reading = Reading {
        follower: Recent::follow(&shared.recent, n.unwrap_or(KEPT)),
        end: shared.end.clone(),
        place,
    };
    let lines = stream::body(reading, |reading| async move { Ok(reading.next().await) });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], lines).into_response())
}

struct Reading {
    follower: Follower,
    end: CancellationToken,
    /// Of one who follows.
    place: Option<OwnedSemaphorePermit>,
}

impl Reading {
    async fn next(mut self) -> Option<(Bytes, Self)> {
        loop {
            let lines = self.follower.take();
            if !lines.is_empty() {
                return Some((lines.into(), self));
            }
            self.place.as_ref()?;
            // What is dropped mid-way is only a wish to be woken.
            tokio::select! {
                () = self.end.cancelled() => return None,
                () = self.follower.wait() => {}
                () = tokio::time::sleep(PULSE) => return Some((Bytes::from_static(b"\n"), self)),
            }
        }
    }
}
