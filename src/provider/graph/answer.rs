//! What Graph's answers mean: from a status, a code and headers to an outcome, and to what may be tried before it
//! stands. Pure, and the one table of its kind.
//!
//! The deepest code that is known decides; where none is, the status does. Answers that are not Graph's own (a proxy's
//! page, half a JSON) have a status alone, and never fail a message.

use std::fmt;
use std::time::Duration;

use serde_json::Value;

use crate::outcome::{Cause, LANE_PAUSE, Outcome, Receipt, Scope, Stage};
use crate::smtp::reply::EnhancedStatus;

use super::message::Unfit;

/// The most that is read of the body of a refusal, in octets.
pub(super) const MAX_BODY: usize = 64 * 1024;
/// What is kept of a remote's text, in characters.
const MAX_TEXT: usize = 600;
/// How deep inner errors are looked at.
const MAX_DEPTH: usize = 8;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The whole message in one request.
    SendMail,
    /// A draft of it.
    Create,
    /// A small attachment of the draft.
    Attach,
    /// A session for a large one.
    Session,
    /// A range of it, by the session's own URL.
    Range,
    /// The draft to be sent.
    Send,
    /// Whether a message is there.
    Find,
}

impl Step {
    pub(super) fn stage(self) -> Stage {
        match self {
            Self::SendMail => Stage::SendMail,
            Self::Create | Self::Attach => Stage::Draft,
            Self::Session | Self::Range => Stage::Upload,
            Self::Send | Self::Find => Stage::Send,
        }
    }

    /// Whether the message may be on its way once this was asked for in full.
    fn sends(self) -> bool {
        match self {
            Self::SendMail | Self::Send => true,
            Self::Create | Self::Attach | Self::Session | Self::Range | Self::Find => false,
        }
    }

    /// Whether the URL names a draft of ours, which may be gone.
    fn is_within_draft(self) -> bool {
        match self {
            Self::Attach | Self::Session | Self::Range | Self::Send => true,
            Self::SendMail | Self::Create | Self::Find => false,
        }
    }

    /// Whether a part of the draft goes into it.
    fn fills(self) -> bool {
        match self {
            Self::Attach | Self::Session | Self::Range => true,
            Self::SendMail | Self::Create | Self::Send | Self::Find => false,
        }
    }

    fn is_taken(self, status: u16) -> bool {
        match self {
            Self::SendMail | Self::Send => status == 202,
            Self::Create | Self::Attach | Self::Session => matches!(status, 200 | 201),
            Self::Range => matches!(status, 200..=202),
            Self::Find => status == 200,
        }
    }
}

/// What of the request bears on whose fault a refusal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) step: Step,
    /// The body had gone out to its end before the answer came.
    pub(super) body_out: bool,
    /// The mailbox in the URL is the provider's sender.
    pub(super) own_mailbox: bool,
    /// The message is sent as the mailbox in the URL.
    pub(super) from_is_mailbox: bool,
    pub(super) null_reverse_path: bool,
}

/// What Graph said, as far as it matters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// Outermost first; none where the body is no error of Graph.
    codes: Vec<String>,
    message: String,
    request_id: Option<String>,
    retry_after: Option<Duration>,
}

impl Answer {
    /// `body` may be anything, cut anywhere.
    pub(super) fn read(
        status: u16,
        request_id: Option<&str>,
        retry_after: Option<Duration>,
        body: &[u8],
    ) -> Self {
        let json: Option<Value> = serde_json::from_slice(body).ok();
        let error = json.as_ref().and_then(|json| member(json, "error"));
        let (codes, message) = match error {
            Some(Value::String(code)) => {
                let says = json.as_ref().and_then(|json| text(json, "error_description"));
                (vec![short(code)], says.map(short).unwrap_or_default())
            }
            Some(error) => (codes(error), text(error, "message").map(short).unwrap_or_default()),
            None => (Vec::new(), short(String::from_utf8_lossy(body).trim())),
        };
        Self { status, codes, message, request_id: request_id.map(short), retry_after }
    }

    /// The deepest code that is known, and what it means.
    fn known(&self) -> Option<(&str, Meaning)> {
        self.codes.iter().rev().find_map(|code| Some((code.as_str(), meaning(code)?)))
    }

    fn code(&self) -> Option<&str> {
        let known = self.known().map(|(code, _)| code);
        known.or_else(|| self.codes.last().map(String::as_str))
    }

    pub(super) fn message(&self) -> &str {
        &self.message
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }
}

/// The words that logs and operators read: `403 ErrorAccessDenied: Access is denied. (request-id …)`.
impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.status)?;
        match self.code() {
            Some(code) => write!(f, " {code}")?,
            None => f.write_str(reason(self.status))?,
        }
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        match &self.request_id {
            Some(id) => write!(f, " (request-id {id})"),
            None => Ok(()),
        }
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => " OK",
        202 => " Accepted",
        _ => "",
    }
}

/// A member of an object, whatever the case of its name.
fn member<'a>(json: &'a Value, name: &str) -> Option<&'a Value> {
    json.as_object()?.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, it)| it)
}

fn text<'a>(json: &'a Value, name: &str) -> Option<&'a str> {
    member(json, name)?.as_str()
}

/// Of an error and of those within it.
fn codes(error: &Value) -> Vec<String> {
    let chain = std::iter::successors(Some(error), |error| member(error, "innerError"));
    let chain = chain.take(MAX_DEPTH);
    chain.filter_map(|error| text(error, "code")).map(short).collect()
}

fn short(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

/// What a code says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    /// An address of the request is none.
    Recipient,
    TooManyRecipients,
    /// Something in the request is not as Graph wants it.
    Payload,
    /// It is not clear what is wrong with the request.
    Unclear,
    TooLarge,
    /// An upload session is for larger files.
    TooSmall,
    /// The mailbox may not send as the author.
    SendAs,
    /// The mailbox has sent all it may for now, or is blocked.
    Quota,
    /// The mailbox is full.
    Full,
    /// The application may not.
    Access,
    /// There is no such mailbox, or none that Graph reaches.
    NoMailbox,
    /// The draft, or the upload session.
    Gone,
    /// What of the file is expected is not this.
    Range,
    Throttled,
    Token,
    /// The service has a trouble of its own.
    Trouble,
}

/// Codes are spelt in either case.
fn meaning(code: &str) -> Option<Meaning> {
    let is = |known: &&(&str, Meaning)| known.0.eq_ignore_ascii_case(code);
    if let Some((_, meaning)) = CODES.iter().find(is) {
        return Some(*meaning);
    }
    let starts = |prefix: &str| {
        code.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    (starts("ErrorMimeContent") || starts("InvalidInternetMessageHeader"))
        .then_some(Meaning::Payload)
}

const CODES: &[(&str, Meaning)] = &[
    ("ErrorInvalidRecipients", Meaning::Recipient),
    ("ErrorInvalidSmtpAddress", Meaning::Recipient),
    ("ErrorRecipientNotFound", Meaning::Recipient),
    ("ErrorRecipientLimitExceeded", Meaning::TooManyRecipients),
    ("ErrorTooManyRecipients", Meaning::TooManyRecipients),
    ("ErrorInvalidExtendedProperty", Meaning::Payload),
    ("ErrorInvalidExtendedPropertyValue", Meaning::Payload),
    ("RequestBodyRead", Meaning::Payload),
    ("BadRequest", Meaning::Payload),
    ("invalidRequest", Meaning::Payload),
    ("ErrorMessageSizeExceeded", Meaning::TooLarge),
    ("ErrorAttachmentSizeLimitExceeded", Meaning::TooLarge),
    ("ErrorAttachmentSizeShouldNotBeLessThanMinimumSize", Meaning::TooSmall),
    ("ErrorSendAsDenied", Meaning::SendAs),
    ("ErrorSendOnBehalfOfDenied", Meaning::SendAs),
    ("ErrorExceededMessageLimit", Meaning::Quota),
    ("ErrorExceededHourlyMessageLimit", Meaning::Quota),
    ("ErrorSubmissionQuotaExceeded", Meaning::Quota),
    ("ErrorMessageSubmissionBlocked", Meaning::Quota),
    ("ErrorQuotaExceeded", Meaning::Full),
    ("quotaLimitReached", Meaning::Full),
    ("ErrorAccessDenied", Meaning::Access),
    ("accessDenied", Meaning::Access),
    ("Authorization_RequestDenied", Meaning::Access),
    ("Forbidden", Meaning::Access),
    ("ErrorInvalidUser", Meaning::NoMailbox),
    ("ErrorNonExistentMailbox", Meaning::NoMailbox),
    ("ResourceNotFound", Meaning::NoMailbox),
    ("Request_ResourceNotFound", Meaning::NoMailbox),
    ("MailboxNotEnabledForRESTAPI", Meaning::NoMailbox),
    ("ErrorItemNotFound", Meaning::Gone),
    ("itemNotFound", Meaning::Gone),
    ("ErrorInvalidIdMalformed", Meaning::Gone),
    ("uploadSessionNotFound", Meaning::Gone),
    ("invalidRange", Meaning::Range),
    ("fragmentOverlap", Meaning::Range),
    ("fragmentOutOfOrder", Meaning::Range),
    ("ApplicationThrottled", Meaning::Throttled),
    ("TooManyRequests", Meaning::Throttled),
    ("activityLimitReached", Meaning::Throttled),
    ("CommandConcurrencyLimitReached", Meaning::Throttled),
    ("InvalidAuthenticationToken", Meaning::Token),
    ("ErrorServerBusy", Meaning::Trouble),
    ("serviceNotAvailable", Meaning::Trouble),
    ("ErrorMailboxStoreUnavailable", Meaning::Trouble),
    ("ErrorMailboxMoveInProgress", Meaning::Trouble),
    ("ErrorTimeoutExpired", Meaning::Trouble),
    ("ErrorInternalServerError", Meaning::Trouble),
    ("ErrorInternalServerTransientError", Meaning::Trouble),
    ("UnknownError", Meaning::Trouble),
];

/// What comes of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is the success that the step was waiting for.
    Taken,
    /// What became of the recipients, unless there is something to try first, each kind once.
    Refused { outcome: Outcome, first: Option<Try> },
}

/// What may help at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Try {
    /// The same with another token.
    NewToken,
    /// The same without what Graph may refuse of a header.
    WithoutExtras,
    /// The same through the mailbox of the provider's sender.
    ThroughSender,
    /// Without the recipient that the answer names, or with half of them.
    FewerRecipients,
    /// As a draft rather than as one request; an attachment by the other way.
    OtherWay,
    /// From the draft on.
    NewDraft,
    /// The range that is expected.
    OtherRange,
}

/// Whose fault an answer is.
pub(super) fn verdict(answer: &Answer, case: Case) -> Verdict {
    let Case { step, .. } = case;
    if step.is_taken(answer.status) {
        return Verdict::Taken;
    }
    let said = Said { answer, case };
    if (200..=299).contains(&answer.status) {
        // Another success than the one that is due: nobody knows what it means.
        return Verdict::Refused { outcome: said.maybe(step.sends()), first: None };
    }
    let meaning = answer.known().map(|(_, meaning)| meaning).or_else(|| by_status(answer, case));
    let (outcome, first) = match meaning {
        // It may have been taken before the service failed, whatever the words; but these are said before it is.
        Some(
            Meaning::Recipient
            | Meaning::TooManyRecipients
            | Meaning::Payload
            | Meaning::Unclear
            | Meaning::TooLarge
            | Meaning::TooSmall
            | Meaning::NoMailbox
            | Meaning::Gone
            | Meaning::Range
            | Meaning::Token
            | Meaning::Trouble,
        ) if said.in_doubt() => (said.by_status(), None),
        Some(Meaning::Token) => match step {
            // It asks for no token; who has one there is told so.
            Step::Range => (said.for_now(), Some(Try::NewDraft)),
            _ => (said.held(Scope::Provider, Stage::Auth, TOKEN), Some(Try::NewToken)),
        },
        Some(Meaning::Recipient) => {
            (said.failed(Scope::Recipient, (5, 1, 3)), Some(Try::FewerRecipients))
        }
        Some(Meaning::TooManyRecipients) => {
            (said.failed(Scope::Message, (5, 5, 3)), Some(Try::FewerRecipients))
        }
        // What is wrong may be the draft that it is asked of.
        Some(Meaning::Payload | Meaning::Unclear) if step.fills() => {
            (said.alone(), Some(Try::NewDraft))
        }
        // A code that nobody knows fails nothing at once: it ends by retry.give_up_after.
        Some(Meaning::Unclear) => (said.alone(), Some(Try::WithoutExtras)),
        Some(Meaning::Payload) => {
            (said.failed(Scope::Message, (5, 6, 0)), Some(Try::WithoutExtras))
        }
        Some(Meaning::TooLarge | Meaning::TooSmall) => {
            (said.failed(Scope::Message, (5, 3, 4)), Some(Try::OtherWay))
        }
        Some(Meaning::SendAs) => (said.send_as(), None),
        Some(Meaning::Quota) => (said.account(step.stage(), Some(LANE_PAUSE), QUOTA), None),
        Some(Meaning::Full) => (said.account(step.stage(), Some(LANE_PAUSE), FULL), None),
        Some(Meaning::Access) => (said.access(), None),
        // Where there is no draft it is the mailbox.
        Some(Meaning::NoMailbox | Meaning::Gone) if !step.is_within_draft() => {
            (said.no_mailbox(), (!case.own_mailbox).then_some(Try::ThroughSender))
        }
        Some(Meaning::NoMailbox | Meaning::Gone) => (said.for_now(), Some(Try::NewDraft)),
        Some(Meaning::Range) => (said.for_now(), Some(Try::OtherRange)),
        Some(Meaning::Throttled) => (said.throttled(), None),
        Some(Meaning::Trouble) | None => (said.by_status(), None),
    };
    Verdict::Refused { outcome, first }
}

/// What a status says where no code is known.
fn by_status(answer: &Answer, case: Case) -> Option<Meaning> {
    // Of a page that is not Graph's we know too little to fail a message for it.
    let is_graph = !answer.codes.is_empty();
    match answer.status {
        400 if is_graph || case.step.fills() => Some(Meaning::Unclear),
        401 => Some(Meaning::Token),
        403 => Some(Meaning::Access),
        404 | 410 if case.step.is_within_draft() => Some(Meaning::Gone),
        404 | 410 => Some(Meaning::NoMailbox),
        413 => Some(Meaning::TooLarge),
        416 => Some(Meaning::Range),
        429 | 509 => Some(Meaning::Throttled),
        507 => Some(Meaning::Full),
        _ => None,
    }
}

const TOKEN: &str =
    "Graph refuses each token it is shown: are tenant_id, cloud and endpoints those of one cloud?";
const QUOTA: &str = "the mailbox has sent all it may for now, or is blocked: see the restricted entities in the Defender portal";
const FULL: &str = "the mailbox is full: make room in it, or set save_to_sent_items = false";
const ACCESS: &str = "grant the application Mail.Send for this mailbox, by consent in Entra or by RBAC for Applications in Exchange (which takes up to two hours), and see that no access policy shuts it out";
const ACCESS_DRAFT: &str =
    "messages of this size need Mail.ReadWrite too: grant it, or set large_messages = \"off\"";
const ACCESS_UPLOAD: &str = "files go up to a host of their own, which refuses them: let a firewall or proxy between let this through, or set large_messages = \"off\"";
const UPLOAD_HOST: &str = "this is where large files go: let the firewall or proxy let it through, or set large_messages = \"off\"";
const NO_MAILBOX: &str = "provider.sender has to be the name of a mailbox in Exchange Online";
const SEND_AS: &str =
    "grant the mailbox Send As for this address, or set sender.policy = \"rewrite\"";
const SETUP: &str =
    "Graph cannot be asked like this: are endpoints and what stands between (a proxy) right?";

struct Said<'a> {
    answer: &'a Answer,
    case: Case,
}

impl Said<'_> {
    fn stage(&self) -> Stage {
        self.case.step.stage()
    }

    fn cause(&self, scope: Scope, stage: Stage) -> Cause {
        Cause {
            retry_after: self.answer.retry_after,
            ..Cause::new(scope, stage, self.answer.to_string())
        }
    }

    fn failed(&self, scope: Scope, (class, subject, detail): (u8, u16, u16)) -> Outcome {
        let status = Some(EnhancedStatus(class, subject, detail));
        Outcome::Failed(Cause { status, retry_after: None, ..self.cause(scope, self.stage()) })
    }

    /// It waits, for a reason that is not the message's; `cure` is what an operator can do.
    fn held(&self, scope: Scope, stage: Stage, cure: &str) -> Outcome {
        let words = format!("{}; {cure}", self.answer).into();
        Outcome::Held(Cause { words, ..self.cause(scope, stage) })
    }

    fn throttled(&self) -> Outcome {
        Outcome::Deferred(self.cause(Scope::Sender, self.stage()))
    }

    /// A deferral of this message and no other.
    fn alone(&self) -> Outcome {
        Outcome::Deferred(self.cause(Scope::Message, self.stage()))
    }

    /// The service may have taken the message before it failed.
    fn in_doubt(&self) -> bool {
        let Case { step, body_out, .. } = self.case;
        let is_sure = matches!(self.answer.status, 0..=499 | 501 | 503 | 507 | 509);
        step.sends() && body_out && !is_sure
    }

    /// A deferral; a remote that names a time wants to be left alone by all.
    fn for_now(&self) -> Outcome {
        let named = self.answer.retry_after.is_some();
        let scope = if named { Scope::Sender } else { Scope::Message };
        Outcome::Deferred(self.cause(scope, self.stage()))
    }

    /// The mailbox is refused. A report is no evidence against it.
    fn account(&self, stage: Stage, pause: Option<Duration>, cure: &str) -> Outcome {
        if self.case.null_reverse_path {
            let cause = self.cause(Scope::Message, self.stage());
            return Outcome::Deferred(Cause { null_path: true, retry_after: None, ..cause });
        }
        match self.held(Scope::Sender, stage, cure) {
            Outcome::Held(cause) => {
                Outcome::Held(Cause { retry_after: cause.retry_after.or(pause), ..cause })
            }
            other => other,
        }
    }

    /// Of the provider's sender it is no message's doing, and everyone waits. Another mailbox may be refused alone.
    fn access(&self) -> Outcome {
        match (self.case.step, self.case.own_mailbox) {
            // Smaller ones pass without this right.
            (Step::Create | Step::Attach | Step::Session, _) => {
                self.held(Scope::Message, self.stage(), ACCESS_DRAFT)
            }
            (Step::Range, _) => self.held(Scope::Message, self.stage(), ACCESS_UPLOAD),
            (Step::SendMail | Step::Send | Step::Find, true) => {
                self.account(Stage::Auth, None, ACCESS)
            }
            (Step::SendMail | Step::Send | Step::Find, false) => {
                self.account(self.stage(), None, ACCESS)
            }
        }
    }

    fn no_mailbox(&self) -> Outcome {
        match self.case.own_mailbox {
            true => self.account(Stage::Auth, None, NO_MAILBOX),
            false => self.account(self.stage(), None, NO_MAILBOX),
        }
    }

    fn send_as(&self) -> Outcome {
        if self.case.null_reverse_path {
            let cause = self.cause(Scope::Message, self.stage());
            return Outcome::Failed(Cause { null_path: true, retry_after: None, ..cause });
        }
        let scope = if self.case.from_is_mailbox { Scope::Sender } else { Scope::Message };
        self.held(scope, self.stage(), SEND_AS)
    }

    fn by_status(&self) -> Outcome {
        match self.answer.status {
            // Not followed, for our words are not for others.
            300..=399 | 402 | 405 | 406 | 411 | 415 | 422 | 501 => {
                self.held(Scope::Provider, self.stage(), SETUP)
            }
            // Also 408, the conflicts 409, 412 and 423; a 400 that is not Graph's.
            _ => self.maybe(self.in_doubt()),
        }
    }

    /// A trouble for now, which may be the service's: two messages in a row tell.
    fn maybe(&self, maybe_sent: bool) -> Outcome {
        match self.for_now() {
            Outcome::Deferred(cause) => {
                let is_conflict = matches!(self.answer.status, 409 | 412 | 423);
                let lost = cause.scope == Scope::Message && !is_conflict;
                Outcome::Deferred(Cause { lost, maybe_sent, ..cause })
            }
            other => other,
        }
    }
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// No connection was made; the words say why.
    Unconnected(String),
    /// The connection broke.
    Broken(String),
    /// Nothing moved for so long.
    Silence(Duration),
    /// What came cannot be used.
    Garbage(&'static str),
}

/// A request without an answer: in doubt where it sends and its body had gone out to its end, else an ordinary deferral.
pub(super) fn unanswered(fault: &Fault, case: Case) -> Outcome {
    let stage = case.step.stage();
    let when = match (case.step, case.body_out) {
        (_, false) => "while the request was being sent",
        (Step::SendMail, true) => "after the message had gone out",
        (Step::Send, true) => "after the draft was to be sent",
        (Step::Create | Step::Attach | Step::Session | Step::Range | Step::Find, true) => {
            "after the request"
        }
    };
    let words = match fault {
        // It is another host than Graph's, of which others know nothing.
        Fault::Unconnected(why) if case.step == Step::Range => {
            let words = format!("{why}; {UPLOAD_HOST}");
            let cause = Cause::new(Scope::Message, stage, words);
            return Outcome::Deferred(Cause { lost: true, ..cause });
        }
        Fault::Unconnected(why) => {
            return Outcome::Deferred(Cause::new(Scope::Provider, Stage::Connect, why.as_str()));
        }
        Fault::Broken(why) => format!("the connection broke {when}: {why}"),
        Fault::Silence(wait) => format!("no answer within {} s {when}", wait.as_secs_f64()),
        Fault::Garbage(what) => format!("an answer that is of no use came {when}: {what}"),
    };
    let maybe_sent = case.step.sends() && case.body_out;
    Outcome::Deferred(Cause { lost: true, maybe_sent, ..Cause::new(Scope::Message, stage, words) })
}

/// What stays of a delivery: the words that lead to the message in Graph's own records.
pub(super) fn receipt(answer: &Answer) -> Outcome {
    Outcome::Delivered(Receipt { words: answer.to_string().into(), relayed: true })
}

/// The same for a message that was found where it had been sent.
pub(super) fn found(answer: &Answer) -> Outcome {
    let words = format!("sent before: found in the mailbox by its mailsluice-id, {answer}");
    Outcome::Delivered(Receipt { words: words.into(), relayed: true })
}

/// A recipient for whose address Graph would refuse all others: it fails alone.
pub(super) fn unfit_recipient(why: &str) -> Outcome {
    let words = format!("Microsoft 365 takes no such address: {why}");
    let status = Some(EnhancedStatus(5, 1, 3));
    Outcome::Failed(Cause { status, ..Cause::new(Scope::Recipient, Stage::Local, words) })
}

/// A message that there is no way for.
pub(super) fn unfit_message(unfit: &Unfit) -> Outcome {
    let status = match unfit {
        Unfit::TooLarge { .. } | Unfit::FileTooLarge => EnhancedStatus(5, 3, 4),
        Unfit::TooManyParts => EnhancedStatus(5, 6, 0),
    };
    let cause = Cause::new(Scope::Message, Stage::Local, unfit.to_string());
    Outcome::Failed(Cause { status: Some(status), ..cause })
}

/// The positions of those `addresses` that the text of a refusal names.
pub(super) fn named(text: &str, addresses: &[&str]) -> Vec<usize> {
    let text = text.to_ascii_lowercase();
    let is_named = |address: &str| {
        let address = address.to_ascii_lowercase();
        text.match_indices(&address).any(|(at, found)| {
            let before = text.get(..at).and_then(|before| before.chars().next_back());
            let mut after = text.get(at + found.len()..).unwrap_or_default().chars();
            // A full stop may end the sentence, or the address may go on.
            let follows = match after.next() {
                Some('.') => after.next(),
                other => other,
            };
            !before.is_some_and(is_of_address) && !follows.is_some_and(is_of_address)
        })
    };
    let all = addresses.iter().enumerate();
    all.filter(|(_, address)| !address.is_empty() && is_named(address)).map(|(at, _)| at).collect()
}

fn is_of_address(c: char) -> bool {
    c.is_alphanumeric() || "!#$%&*+-/=?^_`{|}~.@".contains(c)
}

#[cfg(test)]
mod tests;
