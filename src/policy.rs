//! The sender policy: who readers see as the sender of a message, and who may be.
//!
//! A refusal happens when a message is accepted. Rewriting happens at each attempt, with the policy of that attempt: the
//! spool keeps what the application sent.

use std::io;

use crate::config;
use crate::config::{Pattern, SenderPolicy};
use crate::envelope::{Body, Envelope};
use crate::message::header::Facts;
use crate::message::outgoing::Message;
use crate::message::rewrite::{From, Rules, called, display_name, same, whole_list};
use crate::smtp::address::{Mailbox, ReversePath};
use crate::smtp::reply::{self, Escaped, Reply};

/// Octets of an address that a reply shows, so that its line has room for them.
const SHOWN: usize = 120;

#[derive(Clone, Debug)]
pub struct Policy {
    kind: SenderPolicy,
    /// The provider's own.
    sender: Option<Mailbox>,
    /// As a header writes it; empty for none.
    sender_name: Vec<u8>,
    allowed: Vec<Pattern>,
    names: Names,
}

/// What a provider makes of a display name with an `@`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// A name.
    AsTheyAre,
    /// It takes it for an address that the mail pretends to come from: there it becomes ` at `.
    WithoutAt,
}

impl Policy {
    /// Where there is no provider, `sender` is none, and nothing is judged or changed.
    pub fn new(
        section: &config::Sender,
        sender: Option<&Mailbox>,
        sender_name: Option<&str>,
        names: Names,
    ) -> Self {
        Self {
            kind: section.policy,
            sender: sender.cloned(),
            sender_name: sender_name.map(display_name).unwrap_or_default(),
            allowed: section.allowed.clone(),
            names,
        }
    }

    /// Whether [`Policy::refusal`] has to know what the From fields say.
    pub fn judges_at_acceptance(&self) -> bool {
        self.kind == SenderPolicy::Reject && self.sender.is_some()
    }

    /// What a client is told whose message may not be sent from its From. `facts` are those of a filter that kept the
    /// From fields.
    pub fn refusal(&self, facts: &Facts) -> Option<Reply> {
        let (SenderPolicy::Reject, Some(sender)) = (self.kind, &self.sender) else { return None };
        let may_stand = |value: &Vec<u8>| {
            whole_list(value)
                .is_some_and(|list| list.iter().all(|mailbox| self.may_stand(sender, mailbox)))
        };
        if facts.froms_are_cut {
            return Some(reply::sender_not_allowed("is too long", sender.as_str()));
        }
        if facts.froms.is_empty() {
            return Some(reply::sender_not_allowed("is missing", sender.as_str()));
        }
        let value = facts.froms.iter().find(|value| !may_stand(value))?;
        // Of several the one is named that may not.
        let listed = whole_list(value).unwrap_or_default();
        let named = listed.iter().find(|mailbox| !self.may_stand(sender, mailbox));
        let named = named.map_or_else(|| called(value), |mailbox| mailbox.as_str().into());
        let what = match named.is_empty() {
            true => "has no address".to_owned(),
            false => {
                let shown = named.get(..SHOWN).unwrap_or(&named);
                format!("<{}> is not allowed", ascii(shown))
            }
        };
        Some(reply::sender_not_allowed(&what, sender.as_str()))
    }

    /// The message as it leaves, and its reverse path.
    pub async fn apply(
        &self,
        envelope: &Envelope,
        body: &Body,
    ) -> io::Result<(Message, ReversePath)> {
        let reverse_path = envelope.reverse_path.clone();
        let (SenderPolicy::Rewrite, Some(sender)) = (self.kind, &self.sender) else {
            return Ok((Message::stored(envelope, body), reverse_path));
        };
        let may_stand = |mailbox: &Mailbox| self.may_stand(sender, mailbox);
        let rules = Rules {
            sender,
            sender_name: &self.sender_name,
            clean_names: self.names == Names::WithoutAt,
            may_stand: &may_stand,
        };
        let (message, from) = Message::rewritten(envelope, body, &rules).await?;
        let reverse_path = match (from, reverse_path) {
            (From::Replaced, ReversePath::Mailbox(_)) => ReversePath::Mailbox(sender.clone()),
            (From::Untouched | From::Stands | From::Replaced, as_given) => as_given,
        };
        Ok((message, reverse_path))
    }

    fn may_stand(&self, sender: &Mailbox, mailbox: &Mailbox) -> bool {
        same(mailbox, sender) || self.allowed.iter().any(|pattern| pattern.matches(mailbox))
    }
}

/// For a reply, which is ASCII unless the client asked for more.
fn ascii(bytes: &[u8]) -> String {
    let escaped = Escaped(bytes).to_string();
    escaped.chars().map(|c| if c.is_ascii() { c } else { '?' }).collect()
}

#[cfg(test)]
mod tests;
