//! The queue, for operators: listed, told, and changed. Each request is bounded in what it reads and how long it takes;
//! who wants more goes on from `next`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State as Has};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::admin::filter::{Filter, State};
use crate::admin::view::{self, Changed, Item, Story, Surroundings};
use crate::admin::{Shared, stream};
use crate::clock;
use crate::delivery::operator::{self, Answer, Doubts, Look, Stopping, Verb};
use crate::envelope::{BodyReader, Head, SpoolId};
use crate::spool::{Spool, SpoolError, Stored};

/// Messages of a page, or that one request changes.
const MOST: usize = 1_000;
const PAGE: usize = 100;
/// Heads that are looked at before others have their turn.
const HEADS: usize = 1_000;
/// A request that has looked for so long answers with what it has found.
const LOOK_FOR: Duration = Duration::from_secs(2);

/// An answer that is none: what is said of it.
pub(super) struct Refused(pub(super) StatusCode, pub(super) String);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        #[derive(Serialize)]
        struct Error {
            error: String,
        }
        (self.0, Json(Error { error: self.1 })).into_response()
    }
}

impl From<Stopping> for Refused {
    fn from(stopping: Stopping) -> Self {
        Self(StatusCode::SERVICE_UNAVAILABLE, stopping.to_string())
    }
}

impl From<SpoolError> for Refused {
    fn from(error: SpoolError) -> Self {
        let status = match error {
            SpoolError::Unknown(_) => StatusCode::NOT_FOUND,
            SpoolError::Closed => StatusCode::SERVICE_UNAVAILABLE,
            SpoolError::Full
            | SpoolError::Refused(..)
            | SpoolError::Unfit(..)
            | SpoolError::Damaged(..)
            | SpoolError::Io(..) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let words = match error {
            SpoolError::Damaged(..) => operator::damaged(&error),
            error => error.to_string(),
        };
        Self(status, words)
    }
}

impl From<QueryRejection> for Refused {
    fn from(rejection: QueryRejection) -> Self {
        Self(StatusCode::BAD_REQUEST, rejection.body_text())
    }
}

impl From<JsonRejection> for Refused {
    fn from(rejection: JsonRejection) -> Self {
        Self(rejection.status(), rejection.body_text())
    }
}

fn bad(words: impl Into<String>) -> Refused {
    Refused(StatusCode::BAD_REQUEST, words.into())
}

fn empty_pattern() -> Refused {
    bad("a pattern of the filter is empty; the empty reverse path is written <>")
}

fn id(text: &str) -> Result<SpoolId, Refused> {
    SpoolId::parse(text).ok_or_else(|| bad("that is not the id of a message"))
}

/// Where a listing goes on, and how far.
#[derive(Debug, Default)]
struct Span {
    after: Option<String>,
    limit: Option<usize>,
}

impl Span {
    /// What a query says, and the filter that is the rest of it.
    fn parse(pairs: Vec<(String, String)>) -> Result<(Self, Filter), Refused> {
        let mut span = Self::default();
        let mut rest = serde_json::Map::new();
        for (name, value) in pairs {
            if rest.contains_key(&name) {
                return Err(bad(format!("{name:?} is in the query more than once")));
            }
            rest.insert(name, value.into());
        }
        let mut take = |name| match rest.remove(name) {
            Some(serde_json::Value::String(value)) => Some(value),
            _ => None,
        };
        span.after = take("after");
        if let Some(limit) = take("limit") {
            span.limit = Some(limit.parse().map_err(|_not_one| bad("limit is a number"))?);
        }
        let filter: Filter =
            serde_json::from_value(rest.into()).map_err(|error| bad(error.to_string()))?;
        match filter.has_empty_pattern() {
            true => Err(empty_pattern()),
            false => Ok((span, filter)),
        }
    }

    /// At most so many messages, `usual` where nothing is said.
    fn limit(&self, usual: usize) -> Result<usize, Refused> {
        match self.limit {
            Some(0) => Err(bad("limit is 1 or more")),
            limit => Ok(limit.unwrap_or(usual).min(MOST)),
        }
    }

    fn after(&self) -> Result<Option<SpoolId>, Refused> {
        self.after.as_deref().map(id).transpose()
    }
}

#[derive(Debug, Serialize)]
pub(super) struct Page {
    messages: Vec<Item>,
    /// Messages that cannot be read, so that nobody knows whether the filter means them.
    #[serde(skip_serializing_if = "is_zero")]
    unreadable: usize,
    /// Where to go on; none when all was seen.
    next: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// `GET /api/v1/queue`.
pub(super) async fn list<S: Spool>(
    Has(shared): Has<Arc<Shared<S>>>,
    query: Result<Query<Vec<(String, String)>>, QueryRejection>,
) -> Result<Json<Page>, Refused> {
    let (span, filter) = Span::parse(query?.0)?;
    let limit = span.limit(PAGE)?;
    let look = shared.operator.look().await?;
    let around = Surroundings { look: &look, lane: &shared.facts.lane, now: clock::wall() };
    let mut messages = Vec::new();
    let mut search = Search::new(&shared, &filter, &look, span.after()?);
    while messages.len() < limit
        && let Some(head) = search.next().await
    {
        let read = match search.read.take() {
            Some(read) => read,
            None => shared.spool.open(head.id).await,
        };
        // It has left the spool meanwhile.
        if !matches!(read, Err(SpoolError::Unknown(_))) {
            messages.push(Item::new(&head, read.as_ref(), around));
        }
    }
    Ok(Json(Page { messages, unreadable: search.unreadable, next: search.rest() }))
}

/// Goes through the heads, in order, for those that a filter takes.
struct Search<'a, S> {
    shared: &'a Shared<S>,
    filter: &'a Filter,
    look: &'a Look,
    heads: std::vec::IntoIter<Head>,
    /// The last head that was looked at.
    after: Option<SpoolId>,
    until: Instant,
    is_over: bool,
    /// The message that was found, where the filter had it read.
    read: Option<Result<Stored, SpoolError>>,
    /// Messages that it could not judge.
    unreadable: usize,
}

impl<'a, S: Spool> Search<'a, S> {
    fn new(
        shared: &'a Shared<S>,
        filter: &'a Filter,
        look: &'a Look,
        after: Option<SpoolId>,
    ) -> Self {
        let (heads, until) = (Vec::new().into_iter(), clock::now() + LOOK_FOR);
        let (is_over, read, unreadable) = (false, None, 0);
        Self { shared, filter, look, heads, after, until, is_over, read, unreadable }
    }

    /// The next message; none at the end, and when time is up.
    async fn next(&mut self) -> Option<Head> {
        let wall = clock::wall();
        loop {
            let Some(head) = self.heads.next() else {
                tokio::task::yield_now().await;
                self.heads = self.shared.spool.heads(self.after, HEADS).into_iter();
                if self.heads.len() == 0 {
                    self.is_over = true;
                    return None;
                }
                continue;
            };
            if clock::now() > self.until {
                return None;
            }
            self.after = Some(head.id);
            let state = State::of(&head, self.look, wall);
            if !self.filter.takes_head(&head, state, &self.shared.facts.lane, wall) {
                continue;
            }
            if self.filter.needs_envelope() {
                // One at a time: a content may come with it.
                let read = self.shared.spool.open(head.id).await;
                let stored = match &read {
                    Ok(stored) => stored,
                    // It has left the spool meanwhile.
                    Err(SpoolError::Unknown(_)) => continue,
                    Err(_) => {
                        self.unreadable += 1;
                        continue;
                    }
                };
                let in_doubt = view::is_in_doubt(&head, &stored.progress, self.look);
                if !self.filter.takes_envelope(&stored.envelope, &stored.progress, in_doubt) {
                    continue;
                }
                self.read = Some(read);
            }
            return Some(head);
        }
    }

    fn rest(&self) -> Option<String> {
        match self.is_over {
            true => None,
            false => self.after.map(|id| id.to_string()),
        }
    }
}

/// `GET /api/v1/queue/{id}`.
pub(super) async fn show<S: Spool>(
    Has(shared): Has<Arc<Shared<S>>>,
    Path(text): Path<String>,
) -> Result<Json<Story>, Refused> {
    let id = id(&text)?;
    let look = shared.operator.look().await?;
    let head = shared.spool.head(id).ok_or(SpoolError::Unknown(id))?;
    let around = Surroundings { look: &look, lane: &shared.facts.lane, now: clock::wall() };
    match shared.spool.open(id).await {
        Ok(stored) => Ok(Json(Story::new(&head, &stored, around))),
        Err(error @ SpoolError::Damaged(..)) => Ok(Json(Story::damaged(&head, &error, around))),
        Err(error) => Err(error.into()),
    }
}

/// `GET /api/v1/queue/{id}/content`: the message as it lies in the spool, our header lines first, as a
/// stream.
pub(super) async fn content<S: Spool>(
    Has(shared): Has<Arc<Shared<S>>>,
    Path(text): Path<String>,
) -> Result<Response, Refused> {
    let Stored { envelope, body, .. } = shared.spool.open(id(&text)?).await?;
    let length = envelope.prepend.len() as u64 + body.len();
    let first: (Option<Bytes>, BodyReader) = (Some(envelope.prepend), body.reader());
    // A damaged content ends short of its length, so nobody takes it for whole.
    let content = stream::body(first, |(prepend, mut rest)| async move {
        match prepend {
            Some(prepend) => Ok(Some((prepend, (None, rest)))),
            None => Ok(rest.chunk().await?.map(|chunk| (chunk, (None, rest)))),
        }
    });
    let headers = [
        (header::CONTENT_TYPE, "message/rfc822".to_owned()),
        (header::CONTENT_LENGTH, length.to_string()),
    ];
    Ok((headers, content).into_response())
}

/// Which messages a verb is for: ids, or a filter, or plainly all.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Target {
    ids: Vec<String>,
    filter: Option<Filter>,
    all: bool,
    after: Option<String>,
    limit: Option<usize>,
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    results: Vec<Changed>,
    /// Why what is due now waits all the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    waits: Option<String>,
    /// Messages that cannot be read, so that nobody knows whether the filter means them.
    #[serde(skip_serializing_if = "is_zero")]
    unreadable: usize,
    /// Where a filter goes on; none when all was seen.
    next: Option<String>,
}

type Asked = Result<Json<Target>, JsonRejection>;

pub(super) async fn retry<S: Spool>(
    Has(shared): Has<Arc<Shared<S>>>,
    target: Asked,
) -> Result<Json<Report>, Refused> {
    change(&shared, Verb::Retry, target?.0).await
}

pub(super) async fn hold<S: Spool>(
    Has(shared): Has<Arc<Shared<S>>>,
    target: Asked,
) -> Result<Json<Report>, Refused> {
    change(&shared, Verb::Hold, target?.0).await
}

pub(super) async fn release<S: Spool>(
    Has(shared): Has<Arc<Shared<S>>>,
    target: Asked,
) -> Result<Json<Report>, Refused> {
    change(&shared, Verb::Release, target?.0).await
}

pub(super) async fn delete<S: Spool>(
    Has(shared): Has<Arc<Shared<S>>>,
    target: Asked,
) -> Result<Json<Report>, Refused> {
    change(&shared, Verb::Delete, target?.0).await
}

async fn change<S: Spool>(
    shared: &Shared<S>,
    verb: Verb,
    target: Target,
) -> Result<Json<Report>, Refused> {
    let filter = target.filter.unwrap_or_default();
    if filter.has_empty_pattern() {
        return Err(empty_pattern());
    }
    let (answers, unreadable, next) =
        match (target.ids.is_empty(), target.all || !filter.is_empty()) {
            (false, true) => return Err(bad("name ids or a filter, not both")),
            (true, false) => return Err(bad("name ids, a filter, or \"all\": true")),
            (false, false) if target.ids.len() > MOST => {
                return Err(bad(format!("at most {MOST} ids at once")));
            }
            (false, false) => {
                let ids = target.ids.iter().map(|text| id(text)).collect::<Result<_, _>>()?;
                (shared.operator.change(verb, ids).await?, 0, None)
            }
            (true, true) => {
                let span = Span { after: target.after, limit: target.limit };
                let (limit, after) = (span.limit(MOST)?, span.after()?);
                let look = shared.operator.look().await?;
                let mut search = Search::new(shared, &filter, &look, after);
                let mut found = Vec::new();
                while found.len() < limit
                    && let Some(head) = search.next().await
                {
                    search.read = None;
                    found.push(head);
                }
                let doubts = match filter.state {
                    Some(State::InDoubt) => Doubts::Take,
                    _ => Doubts::Spare,
                };
                let answers = shared.operator.change_found(verb, found, doubts).await?;
                (answers, search.unreadable, search.rest())
            }
        };
    let is_done = answers.iter().any(|(_, answer)| *answer == Answer::Done);
    let waits = match verb {
        // Where it cannot be asked any more, all the same what was done is done.
        Verb::Retry | Verb::Release if is_done => {
            shared.operator.look().await.ok().and_then(|look| look.obstacle)
        }
        Verb::Retry | Verb::Release | Verb::Hold | Verb::Delete => None,
    };
    let waits = waits.map(|obstacle| obstacle.to_string());
    let results = answers.into_iter().map(|(id, answer)| Changed::new(id, answer)).collect();
    Ok(Json(Report { results, waits, unreadable, next }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_says_each_thing_once_and_asks_for_something() {
        let parse = |pairs: &[(&str, &str)]| {
            let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            let (span, filter) = Span::parse(pairs.iter().map(own).collect()).map_err(|it| it.1)?;
            Ok((span.limit(PAGE).map_err(|it| it.1)?, filter.state))
        };
        let says = |words: &str| Err(words.to_owned());
        assert_eq!(parse(&[]), Ok((PAGE, None)));
        assert_eq!(parse(&[("limit", "7"), ("state", "held")]), Ok((7, Some(State::Held))));
        assert_eq!(parse(&[("limit", "9999")]), Ok((MOST, None)));
        assert_eq!(parse(&[("limit", "0")]), says("limit is 1 or more"));
        assert_eq!(parse(&[("limit", "-1")]), says("limit is a number"));
        // The last one counted.
        for name in ["limit", "state", "after", "a\nb"] {
            let twice = parse(&[(name, "1"), (name, "2")]);
            assert_eq!(twice, says(&format!("{name:?} is in the query more than once")));
        }
    }
}
