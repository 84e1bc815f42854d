//! Whether a message was sent after all.
//!
//! The one proof is a message in the mailbox with our own extended property: the application's Message-ID proves
//! nothing, for others may have it too. One that is still a draft was not sent; as a former attempt may have ended
//! before it was complete, only the draft of this attempt is ever sent, and others go. Where nothing is found, nothing is
//! known: the mailbox keeps no copy, its index lags, or we may not look.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Method;
use serde_json::Value;
use tokio::time::sleep;

use crate::clock;
use crate::outcome::Outcome;

use super::answer::{self, Step};
use super::client::{Content, segment};
use super::delivery::{Delivery, Refusal};
use super::message::{TAG_ID, tag};

/// Before each look for what was sent a moment ago: the index of a mailbox lags by seconds.
const LOOKS: [Duration; 4] =
    [Duration::ZERO, Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)];

/// What a look into the mailbox shows.
enum Found {
    Sent(Outcome),
    /// The paths of drafts.
    Drafts(Vec<String>),
    Nothing,
    /// There is no telling, and no use in asking again.
    Unknown,
}

impl Delivery<'_> {
    /// Looks for what a former attempt may have sent to some of the part, and settles those it was sent to. True: the
    /// part is another now.
    pub(super) async fn settle_doubts(&mut self) -> bool {
        let doubtful: Vec<usize> =
            self.part.iter().copied().filter(|it| self.submission.doubtful.contains(it)).collect();
        if doubtful.is_empty() {
            return false;
        }
        let outcome = match self.find(&doubtful).await {
            Found::Sent(outcome) => outcome,
            Found::Drafts(paths) => {
                for path in paths {
                    self.discard(&path).await;
                }
                return false;
            }
            Found::Nothing | Found::Unknown => return false,
        };
        doubtful.iter().for_each(|rcpt| self.outcomes.settle(*rcpt, outcome.clone()));
        self.part.retain(|rcpt| !doubtful.contains(rcpt));
        true
    }

    /// The answer to the last request stayed away, or says nothing: looks for the message.
    pub(super) async fn resolve(&mut self, refusal: Refusal) -> Outcome {
        let part = self.part.clone();
        // Without a copy in Sent Items it is to be found while it is on its way, or not at all.
        let is_kept = self.graph.config.save_to_sent_items || sent_a_draft(&refusal.outcome);
        let looks = if is_kept { LOOKS.len() } else { 1 };
        let mut is_draft = false;
        for wait in LOOKS.into_iter().take(looks) {
            sleep(wait).await;
            match self.find(&part).await {
                Found::Sent(outcome) => return outcome,
                Found::Drafts(paths) => {
                    is_draft = self.draft.as_ref().is_some_and(|draft| paths.contains(draft));
                }
                Found::Nothing => is_draft = false,
                Found::Unknown => return refusal.outcome,
            }
        }
        let Some(path) = self.draft.clone().filter(|_| is_draft) else { return refusal.outcome };
        match self.send_it(&path).await {
            Ok(outcome) => outcome,
            // It left its folder after the last look.
            Err(Refusal { status: Some(404), .. }) => {
                self.look_again(&part).await.unwrap_or(refusal.outcome)
            }
            Err(_no_better) => refusal.outcome,
        }
    }

    async fn look_again(&mut self, part: &[usize]) -> Option<Outcome> {
        for wait in LOOKS.into_iter().take(3) {
            sleep(wait).await;
            if let Found::Sent(outcome) = self.find(part).await {
                return Some(outcome);
            }
        }
        None
    }

    async fn find(&mut self, part: &[usize]) -> Found {
        let now = clock::now();
        if self.graph.memory().is_blind(&self.route.mailbox, now) {
            return Found::Unknown;
        }
        let tag = tag(self.submission.envelope.id, part);
        let filter = format!(
            "singleValueExtendedProperties/any(ep: ep/id eq '{TAG_ID}' and ep/value eq '{tag}')"
        );
        let path = format!("/messages?$filter={}&$select=id,isDraft&$top=5", segment(&filter));
        match self.call(Step::Find, Method::GET, &path, Content::None, Bytes::new()).await {
            Ok(reply) => match reply.json::<Value>().as_ref().and_then(seen) {
                Some(Seen::Sent) => Found::Sent(answer::found(&reply.answer)),
                Some(Seen::Drafts(ids)) => {
                    let path = |id: &String| format!("/messages/{}", segment(id));
                    Found::Drafts(ids.iter().map(path).collect())
                }
                Some(Seen::Nothing) => Found::Nothing,
                None => Found::Unknown,
            },
            Err(refusal) => {
                if refusal.status == Some(403) {
                    self.graph.memory().may_not_look(&self.route.mailbox, now);
                }
                Found::Unknown
            }
        }
    }
}

fn sent_a_draft(outcome: &Outcome) -> bool {
    outcome.cause().is_some_and(|cause| cause.stage == Step::Send.stage())
}

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Sent,
    Drafts(Vec<String>),
    Nothing,
}

/// What a list of messages shows; None where it is none.
fn seen(list: &Value) -> Option<Seen> {
    let messages = list.get("value")?.as_array()?;
    let is_draft = |message: &&Value| message.get("isDraft").and_then(Value::as_bool);
    if messages.iter().any(|message| is_draft(&message) == Some(false)) {
        return Some(Seen::Sent);
    }
    let id = |message: &Value| {
        is_draft(&message)?;
        message.get("id")?.as_str().map(str::to_owned)
    };
    let ids = messages.iter().map(id).collect::<Option<Vec<_>>>()?;
    Some(if ids.is_empty() { Seen::Nothing } else { Seen::Drafts(ids) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_is_no_draft_was_sent() {
        let check = |json: &str, expected: Option<Seen>| {
            assert_eq!(seen(&serde_json::from_str(json).unwrap()), expected, "{json}");
        };
        check(r#"{"value":[]}"#, Some(Seen::Nothing));
        check(r#"{"value":[{"id":"a","isDraft":false}]}"#, Some(Seen::Sent));
        check(r#"{"value":[{"id":"a","isDraft":true}]}"#, Some(Seen::Drafts(vec!["a".to_owned()])));
        check(
            r#"{"value":[{"id":"a","isDraft":true},{"id":"b","isDraft":false}]}"#,
            Some(Seen::Sent),
        );
        check(r#"{"value":[{"id":"a"}]}"#, None);
        check(r#"{"value":[{"isDraft":true}]}"#, None);
        check(r#"{"value":7}"#, None);
        check("[]", None);
    }
}
