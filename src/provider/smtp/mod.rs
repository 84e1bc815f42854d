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
use crate::outcome::{Case, Outcome};
use crate::smtp::address::ReversePath;

use super::tls::Tls;
use super::{BoxFuture, Limits, Outcomes, Provider, Submission};

use connection::{Connection, End};
use dialog::{Freshness, Order};
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
    pub fn new(config: &config::SmtpProvider, hostname: String) -> io::Result<Self> {
        let tls = || Tls::new(&config.server, config.ca_file.as_deref());
        let tls = match config.security {
            Security::None => None,
            Security::StartTls | Security::Tls => Some(tls()?),
        };
        let pool = Arc::new(Pool::new(pool::Limits::DEFAULT));
        let (full_at, last) = Default::default();
        Ok(Self { config: config.clone(), tls, hostname, pool, full_at, last })
    }

    fn full_at(&self) -> MutexGuard<'_, Option<(usize, Instant)>> {
        self.full_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last(&self) -> MutexGuard<'_, Option<SocketAddr>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn open(&self) -> Result<Connection, Outcome> {
        let last = *self.last();
        let opened = Connection::open(&self.config, self.tls.as_ref(), &self.hostname, last).await;
        let (connection, address) = opened?;
        *self.last() = Some(address);
        Ok(connection)
    }

    async fn send(&self, submission: &Submission, outcomes: &Outcomes) {
        let Submission { envelope, reverse_path, part, message } = submission;
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
        Box::pin(self.pool.close())
    }
}

impl Drop for SmtpProvider {
    fn drop(&mut self) {
        self.pool.stop();
    }
}

fn settle_all(submission: &Submission, outcomes: &Outcomes, outcome: &Outcome) {
    for rcpt in &submission.part {
        outcomes.settle(*rcpt, outcome.clone());
    }
}

#[cfg(test)]
mod tests;
