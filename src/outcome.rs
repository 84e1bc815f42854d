//! What providers say and the queue acts on: one verdict per recipient, with its width and the remote's exact words.
//!
//! The verdict is made once, where the answer is read; nothing further on guesses whether something is temporary.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::smtp::reply::{EnhancedStatus, Escaped, Reply, ReplyClass};

mod cure;

/// What became of one recipient in one attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The remote took responsibility.
    Delivered(Receipt),
    /// Not now: it is tried again by the retry schedule.
    Deferred(Cause),
    /// Never: this recipient is reported to the sender.
    Failed(Cause),
    /// It waits, and waiting costs it nothing: the trouble is the account's or the set-up's, or needs a person.
    Held(Cause),
}

impl Outcome {
    pub fn cause(&self) -> Option<&Cause> {
        match self {
            Self::Delivered(_) => None,
            Self::Deferred(cause) | Self::Failed(cause) | Self::Held(cause) => Some(cause),
        }
    }

    /// The label of logs and metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Delivered(_) => "delivered",
            Self::Deferred(_) => "deferred",
            Self::Failed(_) => "failed",
            Self::Held(_) => "held",
        }
    }
}

/// The remote's words when it took the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    pub words: Words,
    /// The remote was not told who wants to hear of the delivery, because it does not know how to (RFC 3461 5.2.2).
    pub relayed: bool,
}

impl Receipt {
    pub fn new(words: impl Into<Words>) -> Self {
        Self { words: words.into(), relayed: false }
    }
}

/// Why a recipient was not delivered to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    pub scope: Scope,
    pub stage: Stage,
    /// The remote's exact words, code included; our own where the remote said nothing.
    pub words: Words,
    pub status: Option<EnhancedStatus>,
    /// What the remote asked us to wait.
    pub retry_after: Option<Duration>,
    /// The connection ended with it in the middle of a message, or the remote's system is in trouble: one message may be
    /// the reason, or the provider.
    pub lost: bool,
    /// The account, or MAIL, was refused over a null reverse path: with one of its own the message may pass.
    pub null_path: bool,
    /// The remote wants less at once: fewer connections, or a slower pace.
    pub busy: bool,
    /// The content was given away and no answer came: the remote may have taken it.
    pub maybe_sent: bool,
}

impl Cause {
    /// A cause with nothing but where, how wide and the words.
    pub fn new(scope: Scope, stage: Stage, words: impl Into<Words>) -> Self {
        Self {
            scope,
            stage,
            words: words.into(),
            status: None,
            retry_after: None,
            lost: false,
            null_path: false,
            busy: false,
            maybe_sent: false,
        }
    }

    /// Whether it cannot be a message's doing: it came before any was named, or the remote itself named a time (SMTP has
    /// no way to: there the time is ours), or it is what Graph has against all of them.
    pub fn is_certain(&self) -> bool {
        let is_of_transaction = (Stage::Mail..=Stage::EndOfData).contains(&self.stage);
        let is_of_all = self.scope == Scope::Provider && self.stage.is_graph();
        self.stage < Stage::Mail || is_of_all || (self.retry_after.is_some() && !is_of_transaction)
    }
}

/// The sentence that logs and operators read.
impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.words, self.stage.label())
    }
}

/// What of an attempt bears on whose fault a refusal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// A report: refused, it says nothing about a lane.
    pub null_reverse_path: bool,
    /// The author of the message, as it leaves, is the lane's own mailbox.
    pub from_is_lane: bool,
    /// So is what MAIL names.
    pub reverse_path_is_lane: bool,
}

/// How long a lane rests after its quota was used up and the remote named no time.
pub const LANE_PAUSE: Duration = Duration::from_secs(60 * 60);

/// The same after the remote wanted fewer connections, or a slower pace.
const FEWER_PAUSE: Duration = Duration::from_secs(60);
const SLOWER_PAUSE: Duration = Duration::from_secs(10);

/// Whose fault an SMTP reply is: the one table (R40).
///
/// To be asked about every reply that is not the one `stage` was waiting for, and about the reply to the final dot. A
/// reply of a class that has no meaning at `stage` is a protocol error, and for now.
pub fn verdict(stage: Stage, reply: &Reply, case: Case) -> Outcome {
    let narrow = match stage {
        Stage::Connect | Stage::Greeting | Stage::Ehlo | Stage::StartTls | Stage::Auth => {
            Scope::Provider
        }
        Stage::Rcpt => Scope::Recipient,
        // Those of Graph are judged by its own table.
        Stage::Mail
        | Stage::Data
        | Stage::Content
        | Stage::EndOfData
        | Stage::SendMail
        | Stage::Draft
        | Stage::Upload
        | Stage::Send
        | Stage::Local => Scope::Message,
    };
    let before_mail = narrow == Scope::Provider;
    let cause = |scope| Cause { status: reply.enhanced, ..Cause::new(scope, stage, reply) };
    let permanent = match reply.code.class() {
        ReplyClass::Done | ReplyClass::Continue => {
            return match stage == Stage::EndOfData && is_taken(reply) {
                true => Outcome::Delivered(Receipt::new(reply)),
                false => {
                    let scope = if before_mail { Scope::Provider } else { Scope::Message };
                    let maybe_sent = stage == Stage::EndOfData;
                    Outcome::Deferred(Cause { lost: !before_mail, maybe_sent, ..cause(scope) })
                }
            };
        }
        ReplyClass::Transient => false,
        ReplyClass::Permanent => true,
    };
    if let Some(pause) = wants_less(reply) {
        if case.null_reverse_path && !before_mail {
            return Outcome::Deferred(Cause { null_path: true, ..cause(Scope::Message) });
        }
        let cause = Cause { retry_after: Some(pause), busy: true, ..cause(Scope::Sender) };
        return Outcome::Held(cause);
    }
    if let Some(fault) = account_fault(stage, reply) {
        // A report says nothing about a lane. It ends where its sender is refused; what the account is in for passes.
        if case.null_reverse_path && !before_mail {
            let cause = Cause { null_path: true, ..cause(Scope::Message) };
            return match fault {
                AccountFault::SendAs | AccountFault::ReversePath if permanent => {
                    Outcome::Failed(cause)
                }
                AccountFault::Access
                | AccountFault::Quota
                | AccountFault::SendAs
                | AccountFault::ReversePath => Outcome::Deferred(cause),
            };
        }
        return Outcome::Held(match fault {
            AccountFault::Access => cause(Scope::Provider),
            AccountFault::Quota => Cause { retry_after: Some(LANE_PAUSE), ..cause(Scope::Sender) },
            AccountFault::SendAs | AccountFault::ReversePath if before_mail => {
                cause(Scope::Provider)
            }
            AccountFault::SendAs if case.from_is_lane => cause(Scope::Sender),
            AccountFault::ReversePath if case.reverse_path_is_lane => cause(Scope::Sender),
            AccountFault::SendAs | AccountFault::ReversePath => cause(Scope::Message),
        });
    }
    match permanent {
        true if before_mail => Outcome::Held(cause(Scope::Provider)),
        // RFC 5321 4.5.3.1.10: RFC 821 had 552 where 452 was meant.
        true if stage == Stage::Rcpt && too_many_recipients(reply) => {
            Outcome::Deferred(cause(Scope::Recipient))
        }
        true => {
            // Some tell only at RCPT, or at the dot, that they do not take the sender.
            let null_path =
                case.null_reverse_path && (stage == Stage::Mail || refuses_sender(reply));
            Outcome::Failed(Cause { null_path, ..cause(narrow) })
        }
        // 421 is about the connection, whichever recipient it met.
        false if reply.code.get() == 421 && !before_mail => {
            Outcome::Deferred(Cause { lost: true, ..cause(Scope::Message) })
        }
        // RFC 3463 3.4: "mail system status", and nothing of this message but its sender is known yet.
        false
            if stage == Stage::Mail && matches!(reply.enhanced, Some(EnhancedStatus(4, 3, _))) =>
        {
            Outcome::Deferred(Cause { lost: true, ..cause(Scope::Message) })
        }
        false => Outcome::Deferred(cause(narrow)),
    }
}

/// The stored content could not be read. Damage needs a person; anything else may pass.
pub fn unreadable(error: &io::Error) -> Outcome {
    let why = format!("reading the stored content: {error}");
    let cause = Cause::new(Scope::Message, Stage::Local, why);
    match error.kind() {
        io::ErrorKind::InvalidData => Outcome::Held(cause),
        _ => Outcome::Deferred(cause),
    }
}

/// Whether a reply is a plain success: 250, 251 and their like. 220 and 221 are of class 2 too, but where a 250 is due
/// they mean that the two sides count replies differently.
pub fn is_done(reply: &Reply) -> bool {
    (250..=259).contains(&reply.code.get())
}

/// Whether the reply to the final dot says that the message was taken: its first digit does (RFC 5321 4.2), unless it
/// clearly answers something else.
fn is_taken(reply: &Reply) -> bool {
    reply.code.class() == ReplyClass::Done
        && !matches!(reply.code.get(), 211 | 214 | 220 | 221 | 235)
}

/// Whether a refusal of RCPT speaks of the number of recipients rather than of this one: the transaction is full, and
/// the rest is for another.
pub fn too_many_recipients(reply: &Reply) -> bool {
    let counts = matches!(reply.enhanced, Some(EnhancedStatus(4 | 5, 5, 3)));
    match (reply.code.class(), reply.code.get()) {
        (_, 452) => counts || reply.enhanced.is_none(),
        (_, 552) if counts => true,
        (ReplyClass::Permanent, _) => says(reply, &["too many recipients"]),
        (ReplyClass::Done | ReplyClass::Continue | ReplyClass::Transient, _) => false,
    }
}

/// What can be wrong with the account rather than with the message.
#[derive(Clone, Copy)]
enum AccountFault {
    /// It may not send at all: no login, blocked, retired way of logging in.
    Access,
    /// It has sent all it may for now.
    Quota,
    /// It may not send as this author.
    SendAs,
    /// It may not name this reverse path.
    ReversePath,
}

/// How long to send less, where that is what the reply asks for (Exchange Online, Amazon SES).
fn wants_less(reply: &Reply) -> Option<Duration> {
    match (reply.code.get(), reply.enhanced) {
        // What a recipient's mailbox has enough of is no business of ours.
        (432, Some(EnhancedStatus(4, 3, 2))) if !says(reply, &["recipient thread"]) => {
            Some(FEWER_PAUSE)
        }
        (454, _) if says(reply, &["maximum sending rate exceeded"]) => Some(SLOWER_PAUSE),
        _ => None,
    }
}

/// The replies that speak of the account (facts of Exchange Online, Google, Amazon SES, Postfix), at whatever stage they
/// come.
fn account_fault(stage: Stage, reply: &Reply) -> Option<AccountFault> {
    let status =
        reply.enhanced.map(|EnhancedStatus(class, subject, detail)| (class, subject, detail));
    // Of a recipient others may speak through the remote, in words that they choose.
    let is_of_recipient =
        stage == Stage::Rcpt && matches!(reply.enhanced, Some(EnhancedStatus(_, 1, 1..=6 | 10)));
    let says = |phrases| !is_of_recipient && says(reply, phrases) && !says(reply, OTHERS_WORDS);
    match (reply.code.get(), status) {
        (_, Some((5, 7, 60) | (5, 2, 252))) => Some(AccountFault::SendAs),
        (_, Some((5, 4, 5) | (5, 1, 90) | (5, 7, 232 | 233))) => Some(AccountFault::Quota),
        // At RCPT it is the recipient's mailbox that is full.
        (_, Some((5, 2, 2))) if stage == Stage::Mail => Some(AccountFault::Quota),
        _ if says(QUOTA_WORDS) => Some(AccountFault::Quota),
        _ if says(&["sendasdenied"]) => Some(AccountFault::SendAs),
        _ if says(REVERSE_PATH_WORDS) => Some(AccountFault::ReversePath),
        (530 | 535, _) => Some(AccountFault::Access),
        (_, Some((5, 7, 30 | 57 | 64 | 501..=503 | 705 | 708 | 750))) => Some(AccountFault::Access),
        // Exchange says it of an account that it has blocked, others of a sender whose domain they cannot find (RFC 3463
        // 3.2).
        (_, Some((5, 1, 8))) if !self::says(reply, OTHERS_WORDS) && !speaks_of_domain(reply) => {
            Some(AccountFault::Access)
        }
        _ if says(ACCESS_WORDS) => Some(AccountFault::Access),
        _ => None,
    }
}

/// Whether a 5.1.8 means what RFC 3463 3.2 has it mean.
fn speaks_of_domain(reply: &Reply) -> bool {
    says(reply, &["domain", "resolv", "system address", "sender address rejected"])
}

/// Whether the sender is what is refused, whatever was asked.
fn refuses_sender(reply: &Reply) -> bool {
    matches!(reply.enhanced, Some(EnhancedStatus(_, 1, 8)))
        || says(reply, &["sender address rejected"])
}

/// What is said of a quota of the sender, in lower case. "Quota exceeded" alone would take in recipients' mailboxes.
const QUOTA_WORDS: &[&str] = &[
    "daily user sending limit",
    "daily user sending quota",
    "daily sending limit",
    "daily sending quota",
    "daily smtp relay limit",
    "daily smtp relay sending limit",
    "daily message quota exceeded",
    "submission quota",
    "submissionquotaexceeded",
];

/// What is said of a reverse path that is not the account's.
const REVERSE_PATH_WORDS: &[&str] =
    &["not owned by user", "not owned by auth user", "sender address rejected: not logged in"];

/// What is said of an account, or a client, that may not send.
const ACCESS_WORDS: &[&str] = &["invalid credentials for relay", "client host rejected"];

/// What stands before the words of another server, or of a policy about the recipient.
const OTHERS_WORDS: &[&str] = &["recipient address rejected", " said: "];

/// Whether the text holds one of the phrases, whatever its case and wherever its lines were broken. Addresses in it are
/// passed over: who chooses one may write anything.
fn says(reply: &Reply, phrases: &[&str]) -> bool {
    let lower = |b: &u8| if *b == b'\n' { b' ' } else { b.to_ascii_lowercase() };
    let text = without_addresses(&reply.text.iter().map(lower).collect::<Vec<u8>>());
    let holds = |phrase: &&str| text.windows(phrase.len()).any(|at| at == phrase.as_bytes());
    phrases.iter().any(holds)
}

/// Without paths in `<>`, and without words that have an `@`, be their local part quoted or not.
fn without_addresses(text: &[u8]) -> Vec<u8> {
    let mut outside = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, behind)) = rest.split_first() {
        let end = match first {
            b'<' => end_of_path(behind),
            b'"' => end_of_quoted(behind).filter(|end| behind.get(*end) == Some(&b'@')),
            _ => None,
        };
        match end {
            Some(end) => {
                outside.push(b'@');
                rest = behind.get(end..).unwrap_or_default();
            }
            None => {
                outside.push(*first);
                rest = behind;
            }
        }
    }
    let words = outside.split(|b| *b == b' ').filter(|word| !word.contains(&b'@'));
    words.collect::<Vec<_>>().join(&b' ')
}

/// Behind the `>` of the path that `text` begins with: one in a quoted local part is not its end.
fn end_of_path(text: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        at += match text.get(at)? {
            b'>' => return Some(at + 1),
            b'"' => 1 + end_of_quoted(text.get(at + 1..)?)?,
            _ => 1,
        };
    }
}

/// Behind the closing quote of the string that `text` begins within (RFC 5321 4.1.2).
fn end_of_quoted(text: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        at += match text.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => 2,
            _ => 1,
        };
    }
}

/// How wide a trouble is: who waits because of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// This recipient of this message.
    Recipient,
    /// This message.
    Message,
    /// Every message of this lane.
    Sender,
    /// Everyone.
    Provider,
}

impl Scope {
    pub const ALL: [Self; 4] = [Self::Recipient, Self::Message, Self::Sender, Self::Provider];

    pub fn label(self) -> &'static str {
        match self {
            Self::Recipient => "recipient",
            Self::Message => "message",
            Self::Sender => "sender",
            Self::Provider => "provider",
        }
    }
}

/// Where in an attempt something was said or went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Connect,
    Greeting,
    Ehlo,
    StartTls,
    Auth,
    Mail,
    Rcpt,
    Data,
    /// While the content was being sent, before the final dot.
    Content,
    EndOfData,
    /// Graph: the one request that carries the message.
    SendMail,
    /// Graph: making a draft of the message.
    Draft,
    /// Graph: giving a large attachment to the draft.
    Upload,
    /// Graph: sending the draft.
    Send,
    /// Within mailsluice: the remote was not asked.
    Local,
}

impl Stage {
    pub const ALL: [Self; 15] = [
        Self::Connect,
        Self::Greeting,
        Self::Ehlo,
        Self::StartTls,
        Self::Auth,
        Self::Mail,
        Self::Rcpt,
        Self::Data,
        Self::Content,
        Self::EndOfData,
        Self::SendMail,
        Self::Draft,
        Self::Upload,
        Self::Send,
        Self::Local,
    ];

    pub fn label(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Greeting => "greeting",
            Self::Ehlo => "ehlo",
            Self::StartTls => "starttls",
            Self::Auth => "auth",
            Self::Mail => "mail",
            Self::Rcpt => "rcpt",
            Self::Data => "data",
            Self::Content => "content",
            Self::EndOfData => "end_of_data",
            Self::SendMail => "send_mail",
            Self::Draft => "draft",
            Self::Upload => "upload",
            Self::Send => "send",
            Self::Local => "local",
        }
    }

    /// Whether Graph was asked about a message by then.
    pub fn is_graph(self) -> bool {
        (Self::SendMail..=Self::Send).contains(&self)
    }

    /// The reverse of [`Stage::label`], for what is read back from disk.
    pub fn from_label(label: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|stage| stage.label() == label)
    }
}

/// Words of a remote, byte for byte and bounded; shown escaped.
#[derive(Clone, PartialEq, Eq)]
pub struct Words(Box<[u8]>);

impl Words {
    /// Longest text that is kept with a message, in octets.
    pub const MAX: usize = 2_000;

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<&[u8]> for Words {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.iter().copied().take(Self::MAX).collect())
    }
}

impl From<&str> for Words {
    fn from(text: &str) -> Self {
        text.as_bytes().into()
    }
}

impl From<String> for Words {
    fn from(text: String) -> Self {
        text.as_bytes().into()
    }
}

/// Code, enhanced status and text as the remote wrote them, lines joined by a blank.
impl From<&Reply> for Words {
    fn from(reply: &Reply) -> Self {
        let mut words = reply.code.to_string().into_bytes();
        if let Some(enhanced) = reply.enhanced {
            words.extend_from_slice(format!(" {enhanced}").as_bytes());
        }
        for line in reply.text.split(|b| *b == b'\n') {
            words.push(b' ');
            words.extend_from_slice(line);
        }
        words.as_slice().into()
    }
}

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Escaped(&self.0).fmt(f)
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests;
