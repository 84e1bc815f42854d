//! What providers say and the queue acts on: one verdict per recipient, with its width and the remote's exact words.
//!
//! The verdict is made once, where the answer is read; nothing further on guesses whether something is temporary.

use std::fmt;
use std::time::Duration;

use crate::smtp::reply::{EnhancedStatus, Escaped, Reply};

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
    /// The connection ended with it, in the middle of a message: one message may be the reason, or the provider.
    pub lost: bool,
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
            maybe_sent: false,
        }
    }
}

/// The sentence that logs and operators read.
impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.words, self.stage.label())
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
    /// Within mailsluice: the remote was not asked.
    Local,
}

impl Stage {
    pub const ALL: [Self; 11] = [
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
            Self::Local => "local",
        }
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
