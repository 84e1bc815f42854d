//! The upstream SMTP server.
//!
//! `dialog` is the protocol and knows no socket; `connection` drives it over one; `answer` says what a broken
//! connection means; here is the pool, and what the dispatcher sees.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::clock;
use crate::config::{self, Security};
use crate::metrics::Metrics;
use crate::outcome::{Case, Cause, Outcome, Stage};
use crate::smtp::address::ReversePath;

use super::tls::Tls;
use super::token::{Token, Tokens, without_token};
use super::{BoxFuture, Limits, Outcomes, Provider, Submission, http};

use connection::{Connection, End};
use dialog::{Freshness, Login, Order, Proof};
use pool::Pool;

mod answer;
mod connection;
mod dialog;
mod pool;
mod reader;
mod stream;
mod stuffer;

/// An upstream SMTP server.
pub struct SmtpProvider {
    config: config::SmtpProvider,
    tls: Option<Tls>,
    hostname: String,
    /// Where the login is by token.
    tokens: Option<Tokens>,
    pool: Arc<Pool>,
    /// How many recipients the server took last when it would take no more in a transaction, and when that was.
    full_at: Mutex<Option<(usize, Instant)>>,
    /// The address that served last: while one of several is down, not every connection waits for it.
    last: Mutex<Option<SocketAddr>>,
}

/// How long such a number is gone by.
const FULL_FOR: Duration = Duration::from_secs(60 * 60);

impl SmtpProvider {
    /// `hostname` is how we call ourselves at EHLO. Fails where connections are to be secured and there are no root
    /// certificates.
    pub fn new(
        config: &config::SmtpProvider,
        hostname: String,
        metrics: &Arc<Metrics>,
    ) -> io::Result<Self> {
        let tls = || Tls::new(&config.server, config.ca_file.as_deref());
        let tls = match config.security {
            Security::None => None,
            Security::StartTls | Security::Tls => Some(tls()?),
        };
        let tokens = match config.login.as_ref().map(|login| &login.proof) {
            Some(config::Proof::Token(app)) => {
                let http = http::client(config.ca_file.as_deref(), config.connect_timeout)?;
                Some(Tokens::new(http, app, Arc::clone(metrics)))
            }
            Some(config::Proof::Password(_)) | None => None,
        };
        let pool = Arc::new(Pool::new(pool::Limits::DEFAULT));
        let config = config.clone();
        let (full_at, last) = Default::default();
        Ok(Self { config, tls, hostname, tokens, pool, full_at, last })
    }

    fn full_at(&self) -> MutexGuard<'_, Option<(usize, Instant)>> {
        self.full_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last(&self) -> MutexGuard<'_, Option<SocketAddr>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new connection that is logged in. A token that is refused is followed by another, once: it may have been
    /// taken back.
    async fn open(&self) -> Result<Connection, Outcome> {
        let (Some(tokens), Some(login)) = (&self.tokens, &self.config.login) else {
            return self.connect(self.by_password().as_ref()).await;
        };
        let by_token = |token: &Token| Login {
            username: login.username.clone(),
            proof: Proof::Bearer(token.secret().clone()),
        };
        let token = tokens.token().await.map_err(without_token)?;
        let outcome = match self.connect(Some(&by_token(&token))).await {
            Err(outcome) if is_refused_login(&outcome) => outcome,
            opened => return opened,
        };
        tokens.refuse(&token);
        let another = tokens.token().await.map_err(without_token)?;
        match another.is(&token) {
            true => Err(outcome),
            false => self.connect(Some(&by_token(&another))).await,
        }
    }

    fn by_password(&self) -> Option<Login> {
        let login = self.config.login.as_ref()?;
        match &login.proof {
            config::Proof::Password(password) => Some(Login {
                username: login.username.clone(),
                proof: Proof::Password(password.clone()),
            }),
            config::Proof::Token(_) => None,
        }
    }

    async fn connect(&self, login: Option<&Login>) -> Result<Connection, Outcome> {
        let (last, tls) = (*self.last(), self.tls.as_ref());
        let opened = Connection::open(&self.config, tls, &self.hostname, login, last).await;
        let (connection, address) = opened?;
        *self.last() = Some(address);
        Ok(connection)
    }

    async fn send(&self, submission: &Submission, outcomes: &Outcomes) {
        let Submission { envelope, reverse_path, part, message, .. } = submission;
        let order = Order {
            envelope: Arc::clone(envelope),
            reverse_path: reverse_path.clone(),
            part: part.clone(),
            size: message.size,
            eight_bit: message.eight_bit,
            smtputf8: message.smtputf8,
            case: Case {
                null_reverse_path: *reverse_path == ReversePath::Null,
                from_is_lane: self.config.is_own(message.author.as_ref()),
                reverse_path_is_lane: match reverse_path {
                    ReversePath::Null => false,
                    ReversePath::Mailbox(mailbox) => self.config.is_own(Some(mailbox)),
                },
            },
        };
        let mut idle = self.pool.take();
        // Twice at most: only an idle connection says `Again`, and it is followed by a new one.
        loop {
            let (mut connection, freshness) = match idle.take() {
                Some(connection) => (connection, Freshness::Reused),
                None => match self.open().await {
                    Ok(connection) => (connection, Freshness::New),
                    Err(outcome) => return settle_all(submission, outcomes, &outcome),
                },
            };
            let end = connection.deliver(submission, order.clone(), freshness, outcomes).await;
            if let Some(full_at) = connection.full_at() {
                *self.full_at() = Some((full_at, clock::now()));
            }
            match end {
                End::Ready => return self.pool.put(connection),
                End::Again => {}
                End::Closed => return,
                End::Refused(outcome) => return settle_all(submission, outcomes, &outcome),
            }
        }
    }
}

impl Provider for SmtpProvider {
    fn limits(&self) -> Limits {
        let is_fresh = |since: &Instant| clock::now().saturating_duration_since(*since) < FULL_FOR;
        let learned = self.full_at().filter(|(_, since)| is_fresh(since));
        let most = learned.map_or(usize::MAX, |(full_at, _)| full_at);
        Limits { recipients: self.config.max_recipients.min(most).max(1) }
    }

    fn deliver<'a>(
        &'a self,
        submission: &'a Submission,
        outcomes: &'a Outcomes,
    ) -> BoxFuture<'a, ()> {
        Box::pin(self.send(submission, outcomes))
    }

    /// Says QUIT on every idle connection.
    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.pool.close().await;
            if let Some(tokens) = &self.tokens {
                tokens.close().await;
            }
        })
    }
}

impl Drop for SmtpProvider {
    fn drop(&mut self) {
        self.pool.stop();
    }
}

/// Whether the server did not like what the login showed (RFC 4954 4: 535), rather than anything else.
fn is_refused_login(outcome: &Outcome) -> bool {
    let said =
        |cause: &Cause| cause.stage == Stage::Auth && cause.words.as_bytes().starts_with(b"535");
    outcome.cause().is_some_and(said)
}

fn settle_all(submission: &Submission, outcomes: &Outcomes, outcome: &Outcome) {
    for rcpt in &submission.part {
        outcomes.settle(*rcpt, outcome.clone());
    }
}

#[cfg(test)]
mod tests;
