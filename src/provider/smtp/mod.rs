//! The upstream SMTP server.
//!
//! `dialog` is the protocol and knows no socket; `connection` drives it over one; `answer` says what a broken
//! connection means; here is the pool, and what the dispatcher sees.

use std::sync::Arc;

use crate::config;
use crate::outcome::{Case, Outcome};
use crate::smtp::address::ReversePath;

use super::{BoxFuture, Limits, Outcomes, Provider, Submission};

use connection::{Connection, End};
use dialog::{Freshness, Order};
use pool::Pool;

mod answer;
mod connection;
mod dialog;
mod pool;
mod reader;
mod stuffer;

/// An upstream SMTP server, in clear and without a login.
pub struct SmtpProvider {
    config: config::SmtpProvider,
    hostname: String,
    pool: Arc<Pool>,
}

impl SmtpProvider {
    /// `hostname` is how we call ourselves at EHLO.
    pub fn new(config: &config::SmtpProvider, hostname: String) -> Self {
        Self { config: config.clone(), hostname, pool: Arc::new(Pool::new(pool::Limits::DEFAULT)) }
    }

    async fn send(&self, submission: &Submission, outcomes: &Outcomes) {
        let envelope = &submission.envelope;
        let sender = self.config.sender.as_ref();
        let order = Order {
            envelope: Arc::clone(envelope),
            part: submission.part.clone(),
            size: envelope.prepend.len() as u64 + submission.body.len(),
            case: Case {
                null_reverse_path: envelope.reverse_path == ReversePath::Null,
                from_is_lane: sender.is_some() && envelope.author.as_ref() == sender,
            },
        };
        let mut idle = self.pool.take();
        // Twice at most: only an idle connection says `Again`, and it is followed by a new one.
        loop {
            let (mut connection, freshness) = match idle.take() {
                Some(connection) => (connection, Freshness::Reused),
                None => match Connection::open(&self.config, &self.hostname).await {
                    Ok(connection) => (connection, Freshness::New),
                    Err(outcome) => return settle_all(submission, outcomes, &outcome),
                },
            };
            match connection.deliver(submission, order.clone(), freshness, outcomes).await {
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
        Limits { recipients: self.config.max_recipients.max(1) }
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
