//! Microsoft 365 by Graph.
//!
//! `message` says what Graph is to be asked and `answer` what its answers mean, both pure; `client` asks, `delivery`
//! takes one part of a message from the one to the other, `draft` is the way of large messages, and `doubt` looks for
//! what may have been sent. Here is what one delivery learns for the next, and what the dispatcher sees.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::clock;
use crate::config::{self, LargeMessages};
use crate::metrics::Metrics;
use crate::outcome::{Cause, Outcome, Scope, Stage};
use crate::smtp::address::{Mailbox, ReversePath};

use super::token::{Roles, Tokens, without_token};
use super::{BoxFuture, Limits, Outcomes, Provider, Submission, http};

use client::{Client, Timeouts};
use delivery::{Delivery, Route};
use message::Attachment;

pub mod message;

mod answer;
mod client;
mod delivery;
mod doubt;
mod draft;

/// Octets of one request: 4 MB, whatever Graph counts as one (facts of Graph name no exact number).
pub const MAX_REQUEST: u64 = 4_000_000;
/// A file of less goes by one request; of more by an upload session.
const SMALL: u64 = 3_000_000;
/// The right to make drafts, and so to send what does not fit into one request.
const DRAFTS: &str = "Mail.ReadWrite";
/// How long it is gone by that an address is no mailbox, how many recipients were too many, or that we may not look.
const REMEMBERED: Duration = Duration::from_secs(60 * 60);
/// Addresses of which such things are remembered.
const MAX_REMEMBERED: usize = 1_000;

/// A Microsoft 365 tenant.
pub struct GraphProvider {
    config: config::Microsoft365,
    client: Client,
    tokens: Tokens,
    metrics: Arc<Metrics>,
    memory: Mutex<Memory>,
}

/// What was learned; all of it wears off.
#[derive(Default)]
struct Memory {
    /// Addresses that are no mailboxes, in lower case, and since when.
    aliases: HashMap<String, Instant>,
    /// Mailboxes that asked to be left alone, and until when.
    resting: HashMap<String, Instant>,
    /// How many recipients are taken at once, where that is fewer than configured.
    full_at: Option<(usize, Instant)>,
    /// Mailboxes that we may not look into, and since when.
    blind: HashMap<String, Instant>,
}

impl GraphProvider {
    /// Fails where there are no root certificates, or the system's proxy is no URL.
    pub fn new(config: &config::Microsoft365, metrics: Arc<Metrics>) -> io::Result<Self> {
        let http = http::client(config.ca_file.as_deref(), config.connect_timeout)?;
        let tokens = Tokens::new(http.clone(), &config.app, Arc::clone(&metrics));
        let timeouts = Timeouts {
            connect: config.connect_timeout,
            command: config.command_timeout,
            data: config.data_timeout,
            end: config.final_timeout,
        };
        let client = Client::new(http, timeouts);
        Ok(Self { config: config.clone(), client, tokens, metrics, memory: Mutex::default() })
    }

    /// Fetches a token where there is none, so that what it allows is known: the largest message there is a way for, or
    /// `None` for any. The error says why there is no token.
    pub async fn largest(&self) -> Result<Option<u64>, Cause> {
        self.tokens.token().await?;
        Ok((!self.may_draft()).then_some(MAX_REQUEST))
    }

    /// Changes with the rights that tokens show.
    pub fn roles(&self) -> watch::Receiver<Option<Roles>> {
        self.tokens.roles()
    }

    /// Whether the large-message path is open.
    fn may_draft(&self) -> bool {
        match self.config.large_messages {
            LargeMessages::On => true,
            LargeMessages::Off => false,
            LargeMessages::Auto => {
                self.tokens.roles().borrow().as_ref().is_some_and(|roles| roles.has(DRAFTS))
            }
        }
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Through which mailbox a message goes: the provider's sender also where its author's is known to be none.
    fn route(&self, submission: &Submission) -> Route {
        let sender = &self.config.sender;
        let author = submission.message.author.as_ref();
        let mailbox = mailbox(sender, &submission.reverse_path, author);
        match self.memory().is_alias(mailbox, clock::now()) {
            true => Route { mailbox: sender.clone(), from: Some(mailbox.clone()) },
            false => Route { mailbox: mailbox.clone(), from: None },
        }
    }

    async fn send(&self, submission: &Submission, outcomes: &Outcomes) {
        let mut part = Vec::with_capacity(submission.part.len());
        for rcpt in &submission.part {
            let path = submission.envelope.rcpts.get(*rcpt).map(|rcpt| &rcpt.path);
            match path.and_then(message::unfit) {
                Some(why) => outcomes.settle(*rcpt, answer::unfit_recipient(why)),
                None => part.push(*rcpt),
            }
        }
        if part.is_empty() {
            return;
        }
        let settle = |outcome: &Outcome| {
            part.iter().for_each(|rcpt| outcomes.settle(*rcpt, outcome.clone()));
        };
        let route = self.route(submission);
        let rest = self.memory().rest(&route.mailbox, clock::now());
        if let Some(rest) = rest {
            let words = "Graph took the message before and asked for a pause with it";
            let cause = Cause::new(Scope::Sender, Stage::SendMail, words);
            return settle(&Outcome::Deferred(Cause { retry_after: Some(rest), ..cause }));
        }
        match self.tokens.token().await {
            Ok(token) => {
                Delivery::new(self, submission, outcomes, part, token, route).run().await;
            }
            Err(cause) => settle(&without_token(cause)),
        }
    }
}

/// Through which mailbox a message goes: its author's, as the sender policy left it; the provider's sender where it has
/// none or is a report.
pub fn mailbox<'a>(
    sender: &'a Mailbox,
    reverse_path: &ReversePath,
    author: Option<&'a Mailbox>,
) -> &'a Mailbox {
    match (reverse_path, author) {
        (ReversePath::Mailbox(_), Some(author)) if !author.is_same(sender) => author,
        _ => sender,
    }
}

/// Whether a file of a draft goes by one request, rather than by an upload session.
pub fn is_posted(file: &Attachment) -> bool {
    file.size < SMALL && file.post().size <= MAX_REQUEST
}

impl Memory {
    fn is_alias(&self, address: &Mailbox, now: Instant) -> bool {
        let since = self.aliases.get(&address.as_str().to_ascii_lowercase());
        since.is_some_and(|since| is_fresh(*since, now))
    }

    fn is_no_mailbox(&mut self, address: &Mailbox, now: Instant) {
        remember(&mut self.aliases, address, now);
    }

    fn is_blind(&self, mailbox: &Mailbox, now: Instant) -> bool {
        let since = self.blind.get(&mailbox.as_str().to_ascii_lowercase());
        since.is_some_and(|since| is_fresh(*since, now))
    }

    fn may_not_look(&mut self, mailbox: &Mailbox, now: Instant) {
        remember(&mut self.blind, mailbox, now);
    }

    /// How long a mailbox is still to be left alone.
    fn rest(&mut self, mailbox: &Mailbox, now: Instant) -> Option<Duration> {
        self.resting.retain(|_, until| *until > now);
        let until = self.resting.get(&mailbox.as_str().to_ascii_lowercase())?;
        Some(until.saturating_duration_since(now))
    }

    fn is_to_rest(&mut self, mailbox: &Mailbox, pause: Duration, now: Instant) {
        if self.resting.len() < MAX_REMEMBERED {
            let until = now + pause.min(REMEMBERED);
            self.resting.insert(mailbox.as_str().to_ascii_lowercase(), until);
        }
    }
}

/// Bounded: what is too much is not remembered.
fn remember(what: &mut HashMap<String, Instant>, address: &Mailbox, now: Instant) {
    if what.len() >= MAX_REMEMBERED {
        what.retain(|_, since| is_fresh(*since, now));
    }
    if what.len() < MAX_REMEMBERED {
        what.insert(address.as_str().to_ascii_lowercase(), now);
    }
}

fn is_fresh(since: Instant, now: Instant) -> bool {
    now.saturating_duration_since(since) < REMEMBERED
}

impl Provider for GraphProvider {
    fn limits(&self) -> Limits {
        let now = clock::now();
        let learned = self.memory().full_at.filter(|(_, since)| is_fresh(*since, now));
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

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.tokens.close())
    }
}

#[cfg(test)]
mod tests;
