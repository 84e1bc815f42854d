//! Tokens of Microsoft Entra, for Graph and for SMTP AUTH.
//!
//! One is fetched early, once for all who wait, by a task of its own: whoever stops waiting stops nobody. What was
//! refused is not asked for again at once. `ask` talks to the remote, `answer` says what its answers mean, `assertion` is
//! what a certificate signs.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{debug, warn};

use crate::clock;
use crate::config::{self, Secret};
use crate::metrics::Metrics;
use crate::outcome::{Cause, Outcome, Scope, Stage};
use crate::shutdown::Shutdown;

use answer::{Failure, Granted};
use ask::Ask;

pub use claims::Roles;

mod answer;
mod ask;
mod assertion;
mod claims;

/// A token is taken for at least and at most so long a life, whatever its answer says.
const SHORTEST: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// How long before its end a token is fetched anew, unless the answer named a time.
const EARLY: Duration = Duration::from_secs(5 * 60);
/// A token with less left is not begun with.
const MARGIN: Duration = Duration::from_secs(30);
/// A remote that refuses each token it is shown makes us fetch one no more often.
const REFUSALS: Duration = Duration::from_secs(60);
/// Longest fetch, with all that is tried in it.
const FETCH: Duration = Duration::from_secs(150);

/// Where tokens come from; cheap to clone.
#[derive(Clone)]
pub struct Tokens {
    shared: Arc<Shared>,
}

struct Shared {
    ask: Ask,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
    roles: watch::Sender<Option<Roles>>,
    fetches: Shutdown,
}

/// One token.
#[derive(Clone)]
pub struct Token {
    bearer: Arc<Secret>,
    /// Tells it from others.
    number: u64,
    /// From when on another is fetched.
    early: Instant,
    /// No longer of use.
    ends: Instant,
}

#[derive(Default)]
struct State {
    token: Option<Token>,
    /// How many were fetched.
    number: u64,
    /// When a refusal by the remote last made us drop one.
    refused: Option<Instant>,
    failure: Option<Failed>,
    /// The fetch that is under way.
    fetching: Option<Told>,
}

/// Nothing is asked for again before.
struct Failed {
    cause: Cause,
    until: Instant,
    /// The remote named that time.
    named: bool,
}

/// What a fetch comes to, for all who wait.
type Told = watch::Receiver<Option<Result<Token, Cause>>>;

/// What there is for who wants a token.
enum Standing {
    Good(Token),
    /// Good, and to be followed by another.
    Aging(Token),
    Failed(Cause),
    Missing,
}

impl Tokens {
    pub fn new(http: reqwest::Client, app: &config::App, metrics: Arc<Metrics>) -> Self {
        let shared = Shared {
            ask: Ask::new(http, app.clone(), Arc::clone(&metrics)),
            metrics,
            state: Mutex::default(),
            roles: watch::Sender::new(None),
            fetches: Shutdown::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// One that is good for a while yet; one fetch for all who wait. The error closes the provider, in the remote's
    /// words and with the cure.
    pub async fn token(&self) -> Result<Token, Cause> {
        let mut told = {
            let mut state = self.shared.lock();
            match state.standing(clock::now()) {
                Standing::Good(token) => return Ok(token),
                Standing::Aging(token) => {
                    self.shared.begin(&mut state);
                    return Ok(token);
                }
                Standing::Failed(cause) => return Err(cause),
                Standing::Missing => self.shared.begin(&mut state),
            }
        };
        let end = told.wait_for(Option::is_some).await.map(|told| told.clone());
        // Without a word: the task panicked.
        end.ok().flatten().unwrap_or_else(|| Err(ended()))
    }

    /// The remote refused it: the next call fetches another, unless that has happened already.
    pub fn refuse(&self, token: &Token) {
        self.shared.lock().refuse(token, clock::now());
    }

    /// The `roles` of the newest token; None before the first or where it shows none.
    pub fn roles(&self) -> watch::Receiver<Option<Roles>> {
        self.shared.roles.subscribe()
    }

    /// Ends what is under way.
    pub async fn close(&self) {
        self.shared.fetches.stop().await;
    }
}

impl Token {
    /// What stands after `Bearer`; visible ASCII.
    pub fn bearer(&self) -> &str {
        self.bearer.as_str()
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.bearer
    }

    /// Whether both are the same one.
    pub fn is(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.number)
    }
}

/// What is said of an attempt that had no token: a remote that cannot be reached is for now, else a person may have to
/// act. Either way everyone waits, and nothing counts against a message.
pub fn without_token(cause: Cause) -> Outcome {
    match cause.stage {
        Stage::Connect => Outcome::Deferred(cause),
        _ => Outcome::Held(cause),
    }
}

fn ended() -> Cause {
    Cause::new(Scope::Provider, Stage::Auth, "the fetch of a token ended without a result")
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fetch that is under way, or a new one.
    fn begin(self: &Arc<Self>, state: &mut State) -> Told {
        if let Some(told) = &state.fetching {
            return told.clone();
        }
        let (tell, told) = watch::channel(None);
        state.fetching = Some(told.clone());
        let fetch = Fetch { shared: Arc::clone(self), tell, result: None };
        self.fetches.tasks.spawn(fetch.run());
        told
    }
}

/// A fetch; when it goes, however that comes about, another may begin.
struct Fetch {
    shared: Arc<Shared>,
    tell: watch::Sender<Option<Result<Token, Cause>>>,
    result: Option<Result<Granted, Failure>>,
}

impl Fetch {
    async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let fetch = tokio::time::timeout(FETCH, shared.ask.fetch());
        // Both are safe to drop: nothing of a fetch is kept.
        self.result = tokio::select! {
            fetched = fetch => Some(fetched.unwrap_or_else(|_elapsed| Err(Failure::late(FETCH)))),
            () = shared.fetches.token.cancelled() => Some(Err(Failure::stopped())),
        };
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        let result = self.result.take().unwrap_or_else(|| Err(Failure::of(ended())));
        let metrics = &self.shared.metrics;
        let label = match &result {
            Ok(_) => "fetched",
            Err(failure) if failure.refused => "refused",
            Err(_) => "failed",
        };
        metrics.token_fetches.with_label_values(&[label]).inc();
        if let Ok(granted) = &result {
            let end = Duration::from_millis(clock::wall().0) + granted.life();
            metrics.token_expiry.set(end.as_secs_f64());
            self.shared.roles.send_replace(claims::roles(granted.bearer()));
        }
        let told = self.shared.lock().settle(result, clock::now());
        self.tell.send_replace(Some(told));
    }
}

impl Granted {
    fn life(&self) -> Duration {
        self.expires_in().clamp(SHORTEST, LONGEST)
    }
}

impl State {
    fn standing(&self, now: Instant) -> Standing {
        let failure = self.failure.as_ref().filter(|failure| now < failure.until);
        match (&self.token, failure) {
            (Some(token), _) if now < token.early => Standing::Good(token.clone()),
            (Some(token), failure) if now < token.ends => match failure {
                Some(_) => Standing::Good(token.clone()),
                None => Standing::Aging(token.clone()),
            },
            (_, Some(failure)) => {
                let wait = failure.named.then(|| failure.until.saturating_duration_since(now));
                Standing::Failed(Cause { retry_after: wait, ..failure.cause.clone() })
            }
            (_, None) => Standing::Missing,
        }
    }

    fn refuse(&mut self, token: &Token, now: Instant) {
        let is_newest = self.token.as_ref().is_some_and(|newest| newest.number == token.number);
        let is_late = |at: Instant| now.saturating_duration_since(at) >= REFUSALS;
        if is_newest && self.refused.is_none_or(is_late) {
            self.token = None;
            self.refused = Some(now);
        }
    }

    fn settle(&mut self, result: Result<Granted, Failure>, now: Instant) -> Result<Token, Cause> {
        self.fetching = None;
        match result {
            Ok(granted) => {
                self.number += 1;
                let life = granted.life();
                let early = granted.refresh_in().unwrap_or(life.saturating_sub(EARLY));
                let margin = MARGIN.min(life / 4);
                let token = Token {
                    number: self.number,
                    // Half of a life is early enough for any.
                    early: now + early.clamp(life / 2, life - 2 * margin),
                    ends: now + life - margin,
                    bearer: Arc::new(granted.into_bearer()),
                };
                debug!("a token was fetched; it is good for {} s", life.as_secs());
                self.failure = None;
                self.token = Some(token.clone());
                Ok(token)
            }
            Err(failure) => {
                if self.token.as_ref().is_some_and(|token| now < token.ends) {
                    warn!("no new token yet, the one there is serves on: {}", failure.cause);
                }
                let cause = failure.cause.clone();
                let named = failure.cause.retry_after.is_some();
                self.failure =
                    Some(Failed { cause: failure.cause, until: now + failure.hold, named });
                Err(cause)
            }
        }
    }
}

#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;
