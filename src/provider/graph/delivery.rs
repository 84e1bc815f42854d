//! One delivery: a part of a message, from its plan to an outcome for each recipient.

use std::mem;

use bytes::Bytes;
use reqwest::Method;
use tracing::{debug, info};

use crate::clock;
use crate::config;
use crate::outcome::{Cause, Outcome, Scope, Stage, unreadable};
use crate::provider::token::{Token, without_token};
use crate::provider::{Outcomes, Submission};
use crate::smtp::address::{Mailbox, ReversePath};
use crate::smtp::reply::Escaped;

use super::answer::{self, Case, Step, Try, Verdict, receipt, unanswered, verdict};
use super::client::{Call, Content, Reply, Target, Unanswered, segment};
use super::message::{self, Assembly, Format, LossKind, Piece, Plan, Scan, Scanned, convert};
use super::{GraphProvider, MAX_REQUEST};

/// Losses that a line of the log names.
const MAX_TOLD: usize = 20;

/// Through which mailbox, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// The one in the URL.
    pub(super) mailbox: Mailbox,
    /// Another address to send as.
    pub(super) from: Option<Mailbox>,
}

pub(super) struct Delivery<'a> {
    pub(super) graph: &'a GraphProvider,
    pub(super) submission: &'a Submission,
    pub(super) outcomes: &'a Outcomes,
    /// Who is still to be sent to, by this delivery.
    pub(super) part: Vec<usize>,
    pub(super) route: Route,
    token: Token,
    /// Another token was fetched because one was refused.
    renewed: bool,
    extras: bool,
    max_request: u64,
    /// The MIME form was too large.
    as_json: bool,
    /// A draft was begun again.
    again: bool,
    /// What a former attempt may have sent was looked for.
    looked: bool,
    /// The path of the draft that was made last.
    pub(super) draft: Option<String>,
}

/// Why a step was not taken.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) outcome: Outcome,
    pub(super) first: Option<Try>,
    /// The text of the answer.
    pub(super) said: String,
    /// Its status, where there is an answer.
    pub(super) status: Option<u16>,
}

impl From<Outcome> for Refusal {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, first: None, said: String::new(), status: None }
    }
}

impl Refusal {
    pub(super) fn maybe_sent(&self) -> bool {
        self.outcome.cause().is_some_and(|cause| cause.maybe_sent)
    }
}

impl<'a> Delivery<'a> {
    pub(super) fn new(
        graph: &'a GraphProvider,
        submission: &'a Submission,
        outcomes: &'a Outcomes,
        part: Vec<usize>,
        token: Token,
        route: Route,
    ) -> Self {
        Self {
            graph,
            submission,
            outcomes,
            part,
            route,
            token,
            renewed: false,
            extras: true,
            max_request: MAX_REQUEST,
            as_json: false,
            again: false,
            looked: false,
            draft: None,
        }
    }

    pub(super) async fn run(mut self) {
        let scanned = match self.scan().await {
            Ok(scanned) => scanned,
            Err(outcome) => return self.settle(&outcome),
        };
        // Each turn has fewer recipients than the one before, or is the only one of its kind.
        loop {
            let plan = match convert(&scanned, &self.case()) {
                Ok(plan) => plan,
                Err(unfit) => return self.settle(&answer::unfit_message(&unfit)),
            };
            let is_tagged = match plan {
                Plan::Json(_) | Plan::Draft(_) => true,
                Plan::Mime(_) => false,
            };
            if is_tagged && !mem::replace(&mut self.looked, true) && self.settle_doubts().await {
                match self.part.is_empty() {
                    true => return,
                    false => continue,
                }
            }
            let refusal = match self.carry_out(&plan).await {
                Ok(delivered) => {
                    self.tell(&plan);
                    return self.settle(&delivered);
                }
                Err(refusal) => refusal,
            };
            if refusal.maybe_sent() && is_tagged {
                let outcome = self.resolve(refusal).await;
                return self.settle(&outcome);
            }
            let Refusal { outcome, first, said, .. } = refusal;
            let goes_on = match first {
                Some(Try::WithoutExtras) => mem::replace(&mut self.extras, false),
                Some(Try::ThroughSender) => self.go_through_sender(),
                Some(Try::FewerRecipients) => self.go_with_fewer(&said, &outcome),
                Some(Try::OtherWay) => self.go_by_draft(&plan),
                Some(Try::NewDraft) => !mem::replace(&mut self.again, true),
                Some(Try::NewToken | Try::OtherRange) | None => false,
            };
            if !goes_on {
                return self.settle(&outcome);
            }
            debug!("graph: another way after {outcome:?}");
        }
    }

    async fn scan(&self) -> Result<Scanned, Outcome> {
        let mut scan = Scan::new();
        let mut reader = self.submission.message.reader();
        while let Some(chunk) = reader.chunk().await.map_err(|error| unreadable(&error))? {
            scan.push(&chunk);
        }
        Ok(scan.finish())
    }

    fn case(&self) -> message::Case<'_> {
        let config = &self.graph.config;
        message::Case {
            envelope: &self.submission.envelope,
            reverse_path: &self.submission.reverse_path,
            part: &self.part,
            mailbox: &self.route.mailbox,
            from: self.route.from.as_ref(),
            save_to_sent_items: config.save_to_sent_items,
            format: match config.format {
                _ if self.as_json => Format::Json,
                config::Format::Auto => Format::Auto,
                config::Format::Json => Format::Json,
                config::Format::Mime => Format::Mime,
            },
            may_draft: self.graph.may_draft(),
            extras: self.extras,
            max_request: self.max_request,
        }
    }

    /// What the message lost on its way: counted, and told where somebody may miss it.
    fn tell(&self, plan: &Plan) {
        let losses = || plan.losses().iter().filter(|loss| loss.kind != LossKind::Usual);
        for loss in losses() {
            self.graph.metrics.losses.with_label_values(&[loss.kind.as_str()]).inc();
        }
        let missed = || losses().filter(|loss| loss.kind != LossKind::Copy);
        let losses = missed().count();
        if losses == 0 {
            return;
        }
        let shown: Vec<String> =
            missed().take(MAX_TOLD).map(|loss| format!("{} {}", loss.what, loss.why)).collect();
        let (id, shown) = (self.submission.envelope.id, shown.join("; "));
        let shown = Escaped(shown.as_bytes());
        info!(event = "reduced", %id, losses, "message {id} did not go whole: {shown}");
    }

    async fn carry_out(&mut self, plan: &Plan) -> Result<Outcome, Refusal> {
        match plan {
            Plan::Json(json) => self.send_mail(Content::Json, json.assembly(), json.size).await,
            Plan::Mime(mime) => self.send_mail(Content::Mime, mime.assembly(), mime.size).await,
            Plan::Draft(draft) => Box::pin(self.send_draft(draft)).await,
        }
    }

    async fn send_mail(
        &mut self,
        content: Content,
        assembly: Assembly<'_>,
        size: u64,
    ) -> Result<Outcome, Refusal> {
        let body = of_size(self.assemble(assembly).await?, size)?;
        self.outcomes.content_leaves().await;
        let reply = self.call(Step::SendMail, Method::POST, "/sendMail", content, body).await?;
        Ok(self.taken(&reply))
    }

    /// The message was taken; a pause that was asked for with it is for the next.
    pub(super) fn taken(&self, reply: &Reply) -> Outcome {
        if let Some(pause) = reply.answer.retry_after() {
            self.graph.memory().is_to_rest(&self.route.mailbox, pause, clock::now());
        }
        receipt(&reply.answer)
    }

    async fn assemble(&self, mut assembly: Assembly<'_>) -> Result<Vec<u8>, Outcome> {
        let mut reader = self.submission.message.reader();
        let mut at = 0;
        while let Some(chunk) = reader.chunk().await.map_err(|error| unreadable(&error))? {
            assembly.push(at, &chunk);
            at += chunk.len() as u64;
        }
        Ok(assembly.finish())
    }

    fn judged(&self, step: Step, body_out: bool) -> Case {
        Case {
            step,
            body_out,
            own_mailbox: self.route.mailbox.is_same(&self.graph.config.sender),
            from_is_mailbox: self.route.from.is_none(),
            null_reverse_path: self.submission.reverse_path == ReversePath::Null,
        }
    }

    /// Asks Graph about the mailbox; `path` is what follows it. A token that is refused is replaced once.
    pub(super) async fn call(
        &mut self,
        step: Step,
        method: Method,
        path: &str,
        content: Content,
        body: Bytes,
    ) -> Result<Reply, Refusal> {
        let (root, mailbox) = (&self.graph.config.graph, segment(self.route.mailbox.as_str()));
        let url = format!("{root}/v1.0/users/{mailbox}{path}");
        loop {
            let token = self.token.clone();
            let (method, content, body) = (method.clone(), content.clone(), body.clone());
            let target = Target::Graph(&url, &token);
            match self.ask(Call { step, method, target, content, body }).await {
                Err(Refusal { first: Some(Try::NewToken), outcome, .. }) => {
                    self.renew_token(outcome).await?;
                }
                result => return result,
            }
        }
    }

    async fn renew_token(&mut self, outcome: Outcome) -> Result<(), Outcome> {
        if mem::replace(&mut self.renewed, true) {
            return Err(outcome);
        }
        self.graph.tokens.refuse(&self.token);
        let token = self.graph.tokens.token().await.map_err(without_token)?;
        if token.is(&self.token) {
            return Err(outcome);
        }
        self.token = token;
        Ok(())
    }

    pub(super) async fn ask(&self, call: Call<'_>) -> Result<Reply, Refusal> {
        let step = call.step;
        let reply = match self.graph.client.call(call).await {
            Ok(reply) => reply,
            Err(Unanswered { fault, body_out }) => {
                return Err(unanswered(&fault, self.judged(step, body_out)).into());
            }
        };
        match verdict(&reply.answer, self.judged(step, reply.body_out)) {
            Verdict::Taken => Ok(reply),
            Verdict::Refused { outcome, first } => {
                let said = reply.answer.message().to_owned();
                Err(Refusal { outcome, first, said, status: Some(reply.answer.status) })
            }
        }
    }

    /// What came instead of what is needed to go on.
    pub(super) fn garbage(&self, step: Step, what: &'static str) -> Refusal {
        unanswered(&answer::Fault::Garbage(what), self.judged(step, true)).into()
    }

    /// The address is no mailbox; the provider's sender may have the right to send as it.
    fn go_through_sender(&mut self) -> bool {
        let sender = self.graph.config.sender.clone();
        let author = mem::replace(&mut self.route.mailbox, sender);
        self.graph.memory().is_no_mailbox(&author, clock::now());
        self.route.from = Some(author);
        true
    }

    /// Some recipient is refused and the others are not: those that the answer names fail. Where it names none, half of
    /// the part is tried, and the rest is for the next.
    fn go_with_fewer(&mut self, said: &str, outcome: &Outcome) -> bool {
        if self.part.len() == 1 {
            return false;
        }
        let is_one = outcome.cause().is_some_and(|cause| cause.scope == Scope::Recipient);
        let rcpts = &self.submission.envelope.rcpts;
        let address = |at: &usize| rcpts.get(*at).map_or("", |rcpt| rcpt.path.as_str());
        let addresses: Vec<&str> = self.part.iter().map(address).collect();
        let named: Vec<usize> = match is_one {
            true => answer::named(said, &addresses),
            false => Vec::new(),
        };
        let named: Vec<usize> = named.iter().filter_map(|at| self.part.get(*at).copied()).collect();
        if !named.is_empty() {
            named.iter().for_each(|rcpt| self.outcomes.settle(*rcpt, outcome.clone()));
            self.part.retain(|rcpt| !named.contains(rcpt));
            return !self.part.is_empty();
        }
        let rest = self.part.split_off(self.part.len().div_ceil(2));
        rest.iter().for_each(|rcpt| self.outcomes.leave(*rcpt));
        if !is_one {
            self.graph.memory().full_at = Some((self.part.len(), clock::now()));
        }
        true
    }

    /// The request was too large for Graph, though not for us.
    fn go_by_draft(&mut self, plan: &Plan) -> bool {
        let is_file = |piece: &Piece| matches!(piece, Piece::Content(_));
        let size = match plan {
            Plan::Json(json) if json.pieces.iter().any(is_file) => json.size,
            // The base64 of it is larger than the same as JSON may be.
            Plan::Mime(_) if !self.graph.may_draft() => {
                return !mem::replace(&mut self.as_json, true);
            }
            Plan::Mime(mime) => mime.size,
            // Without files there is nothing that could go apart.
            Plan::Json(_) | Plan::Draft(_) => return false,
        };
        self.max_request = self.max_request.min(size.saturating_sub(1));
        self.graph.may_draft()
    }

    pub(super) fn settle(&self, outcome: &Outcome) {
        self.part.iter().for_each(|rcpt| self.outcomes.settle(*rcpt, outcome.clone()));
    }
}

/// The body of a request, which was measured when the message was read first.
pub(super) fn of_size(body: Vec<u8>, size: u64) -> Result<Bytes, Outcome> {
    match body.len() as u64 == size {
        true => Ok(body.into()),
        false => Err(other_size()),
    }
}

pub(super) fn other_size() -> Outcome {
    let words = "the message came out with another size than when it was read first";
    Outcome::Deferred(Cause::new(Scope::Message, Stage::Local, words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_of_another_size_than_planned_is_not_sent() {
        assert_eq!(of_size(b"abc".to_vec(), 3), Ok(Bytes::from_static(b"abc")));
        for size in [2, 4] {
            let outcome = of_size(b"abc".to_vec(), size).unwrap_err();
            let Outcome::Deferred(cause) = outcome else { panic!("{outcome:?}") };
            assert_eq!((cause.scope, cause.stage), (Scope::Message, Stage::Local));
        }
    }
}
