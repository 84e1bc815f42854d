//! The sender policy: who readers see as the sender of a message, and who may be.
//!
//! The header decides. Under `rewrite` the reverse path follows it: the provider's sender where that takes the From's
//! place, else the first mailbox of the From, unless the application's own may stand. A null one stays.
//!
//! A refusal happens when a message is accepted. Rewriting happens at each attempt, with the policy of that attempt: the
//! spool keeps what the application sent.

use std::io;

use crate::config;
use crate::config::{Pattern, SenderPolicy};
use crate::envelope::{Body, Envelope};
use crate::message::header::{Facts, MAX_VALUE};
use crate::message::outgoing::Message;
use crate::message::rewrite::{From, Rules, all_may_stand, display_name, find_other};
use crate::smtp::address::{Mailbox, ReversePath};
use crate::smtp::reply::{self, Reply};

/// Octets of an address that a reply shows, so that its line has room for them.
const SHOWN: usize = 80;

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

    /// What a client is told whose message may not be sent from its From.
    pub fn refusal(&self, facts: &Facts) -> Option<Reply> {
        let (SenderPolicy::Reject, Some(sender)) = (self.kind, &self.sender) else { return None };
        let rule = |mailbox: &Mailbox| self.may_stand(sender, mailbox);
        let refused = |why: &str| Some(reply::sender_unclear(why, sender.as_str()));
        if let Some(line) = &facts.broken_at {
            let shown = shown(line.trim_ascii());
            return refused(&format!(
                "The header of this message is broken at the line \"{shown}\""
            ));
        }
        let value = facts.from.as_slice();
        match facts.froms {
            0 => return refused("This message has no From"),
            1 if value.len() >= MAX_VALUE => {
                return refused("The From of this message is too long to be judged");
            }
            1 if value.trim_ascii().is_empty() => {
                return refused("The From of this message is empty");
            }
            1 if all_may_stand(value, &rule) => return None,
            1 => {}
            _ => return refused("This message has more than one From"),
        }
        match find_other(value, &rule) {
            Some(mailbox) => {
                let shown = shown(mailbox.as_str().as_bytes());
                Some(reply::sender_not_allowed(&shown, sender.as_str()))
            }
            None => {
                let shown = shown(value.trim_ascii());
                refused(&format!("The From of this message (\"{shown}\") is not a mail address"))
            }
        }
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
        let (mut message, from) = Message::rewritten(envelope, body, &rules).await?;
        // An author beyond ASCII would ask for SMTPUTF8 where the message may do without.
        let author = message.author.as_ref();
        let author = author.filter(|it| message.smtputf8 || it.is_ascii()).unwrap_or(sender);
        let reverse_path = match (reverse_path, from) {
            (ReversePath::Null, _) => ReversePath::Null,
            (ReversePath::Mailbox(_), From::Replaced) => ReversePath::Mailbox(sender.clone()),
            (ReversePath::Mailbox(given), From::Untouched | From::Stands) => {
                // Upstreams refuse one that the account may not send as.
                ReversePath::Mailbox(if may_stand(&given) { given } else { author.clone() })
            }
        };
        message.smtputf8 |= !reverse_path.is_ascii();
        Ok((message, reverse_path))
    }

    fn may_stand(&self, sender: &Mailbox, mailbox: &Mailbox) -> bool {
        mailbox.is_same(sender) || self.allowed.iter().any(|pattern| pattern.matches(mailbox))
    }
}

/// The start of what a client sent, for a reply, which is ASCII unless the client asked for more.
fn shown(bytes: &[u8]) -> String {
    let mut out = String::new();
    for byte in bytes.iter().take(SHOWN) {
        match byte {
            b' '..=b'~' => out.push(char::from(*byte)),
            byte => out.push_str(&format!("\\x{byte:02x}")),
        }
    }
    out
}

#[cfg(test)]
mod tests;
