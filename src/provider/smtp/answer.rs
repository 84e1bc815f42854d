//! What becomes of a message where the server said nothing that counts: the connection broke, or we saw ourselves that
//! it cannot be sent. What the server did say is judged by [`crate::outcome::verdict`].

use std::fmt;
use std::time::Duration;

use crate::outcome::{Cause, Outcome, Scope, Stage};
use crate::smtp::address::ReversePath;
use crate::smtp::reply::EnhancedStatus;

/// What a missing greeting is most often.
pub(super) const WANTS_TLS: &str = "; a server that wants TLS from the start says nothing before: would provider.security = \"tls\" fit this port?";

/// How a connection broke.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The server closed it.
    Closed,
    /// The network did, in its words.
    Network(String),
    /// Nothing came, or nothing could be written, for so long.
    Silence(Duration),
    /// The same of a server that was to speak first, in clear, and from which not an octet came.
    Mute(Duration),
    /// It took the content, but not all of it within that time.
    Slow(Duration),
    /// What came cannot be a reply.
    Garbage(Garbage),
    /// The connection could not be secured.
    Tls(String),
}

/// Why bytes are not a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Garbage {
    LongLine,
    ManyLines,
    NoReply,
    CodesDiffer,
    /// A reply, but nothing was asked.
    OutOfTurn,
}

impl fmt::Display for Garbage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LongLine => "a line of a reply is too long",
            Self::ManyLines => "a reply has too many lines",
            Self::NoReply => "a line is not a reply",
            Self::CodesDiffer => "the lines of a reply have different codes",
            Self::OutOfTurn => "a reply came before it was asked for",
        })
    }
}

/// A connection that broke at `stage`: for now. Before MAIL it is the provider's trouble, later this message's; after
/// the final dot the server may have taken the message.
pub(super) fn broken(stage: Stage, fault: &Fault) -> Outcome {
    let (scope, maybe_sent) = match stage {
        Stage::Connect
        | Stage::Greeting
        | Stage::Ehlo
        | Stage::StartTls
        | Stage::Auth
        | Stage::Local => (Scope::Provider, false),
        Stage::Mail | Stage::Rcpt | Stage::Data | Stage::Content => (Scope::Message, false),
        Stage::EndOfData => (Scope::Message, true),
        Stage::SendMail | Stage::Draft | Stage::Upload | Stage::Send => (Scope::Message, false),
    };
    let lost = scope == Scope::Message;
    Outcome::Deferred(Cause { lost, maybe_sent, ..Cause::new(scope, stage, words(stage, fault)) })
}

fn words(stage: Stage, fault: &Fault) -> String {
    let after = match stage {
        Stage::Connect => "while connecting",
        Stage::Greeting => "before its greeting",
        Stage::Ehlo => "after EHLO",
        Stage::StartTls => "after STARTTLS",
        Stage::Auth => "after AUTH",
        Stage::Mail => "after MAIL",
        Stage::Rcpt => "after RCPT",
        Stage::Data => "after DATA",
        Stage::Content => "while the content was being sent",
        Stage::EndOfData => "after the final dot",
        Stage::SendMail | Stage::Draft | Stage::Upload | Stage::Send | Stage::Local => {
            "between two messages"
        }
    };
    match fault {
        Fault::Closed => format!("the server closed the connection {after}"),
        Fault::Network(error) => format!("the connection broke {after}: {error}"),
        Fault::Garbage(garbage) => format!("the server broke the protocol {after}: {garbage}"),
        Fault::Tls(why) => format!("no secure connection: {why}"),
        Fault::Mute(wait) => format!("no greeting within {} s{WANTS_TLS}", wait.as_secs_f64()),
        Fault::Slow(wait) => {
            format!("the server did not take all of the content within {} s", wait.as_secs())
        }
        Fault::Silence(wait) => {
            let wait = wait.as_secs_f64();
            match stage {
                Stage::Connect => format!("no connection within {wait} s"),
                Stage::Greeting => format!("no greeting within {wait} s"),
                Stage::Content => format!("the server took no content for {wait} s"),
                Stage::EndOfData => format!("no answer to the final dot within {wait} s"),
                Stage::Ehlo
                | Stage::StartTls
                | Stage::Auth
                | Stage::Mail
                | Stage::Rcpt
                | Stage::Data
                | Stage::SendMail
                | Stage::Draft
                | Stage::Upload
                | Stage::Send
                | Stage::Local => {
                    let command = after.strip_prefix("after ").unwrap_or(after);
                    format!("no answer to {command} within {wait} s")
                }
            }
        }
    }
}

/// No address of the server could be connected to; `why` says of each what happened.
pub(super) fn unreachable(why: String) -> Outcome {
    Outcome::Deferred(Cause::new(Scope::Provider, Stage::Connect, why))
}

/// The connection cannot be made as the configuration wants it: an operator's matter.
pub(super) fn unfit_server(stage: Stage, why: String) -> Outcome {
    Outcome::Held(Cause::new(Scope::Provider, stage, why))
}

/// A recipient that cannot be written to a server without SMTPUTF8 (RFC 6531 3.5): it fails alone.
pub(super) fn recipient_needs_utf8() -> Outcome {
    let why = "the address needs SMTPUTF8, which the server does not offer";
    Outcome::Failed(Cause {
        status: Some(EnhancedStatus(5, 6, 7)),
        ..Cause::new(Scope::Recipient, Stage::Local, why)
    })
}

/// A message whose reverse path cannot be written to a server without SMTPUTF8.
pub(super) fn sender_needs_utf8(reverse_path: &ReversePath) -> Outcome {
    let why = format!("the sender {reverse_path} needs SMTPUTF8, which the server does not offer");
    Outcome::Failed(Cause {
        status: Some(EnhancedStatus(5, 6, 7)),
        ..Cause::new(Scope::Message, Stage::Local, why)
    })
}

/// A message over the limit that the server named with SIZE (RFC 1870).
pub(super) fn too_large(size: u64, limit: u64) -> Outcome {
    let why = format!("the message has {size} octets, the server takes at most {limit}");
    Outcome::Failed(Cause {
        status: Some(EnhancedStatus(5, 3, 4)),
        ..Cause::new(Scope::Message, Stage::Local, why)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(stage: Stage, fault: Fault, scope: Scope, maybe_sent: bool, words: &str) {
        let outcome = broken(stage, &fault);
        let Outcome::Deferred(cause) = outcome else { panic!("{outcome:?}") };
        assert_eq!((cause.scope, cause.maybe_sent), (scope, maybe_sent));
        assert_eq!(cause.words.to_string(), words);
        assert_eq!(cause.stage, stage);
    }

    #[test]
    fn a_broken_connection_says_where_and_how() {
        use Scope::{Message, Provider};
        let silence = || Fault::Silence(Duration::from_secs(600));
        let closed = "the server closed the connection";
        check(Stage::Rcpt, Fault::Closed, Message, false, &format!("{closed} after RCPT"));
        check(
            Stage::Greeting,
            Fault::Closed,
            Provider,
            false,
            &format!("{closed} before its greeting"),
        );
        check(
            Stage::Content,
            Fault::Network("Broken pipe".to_owned()),
            Message,
            false,
            "the connection broke while the content was being sent: Broken pipe",
        );
        check(
            Stage::EndOfData,
            Fault::Closed,
            Message,
            true,
            &format!("{closed} after the final dot"),
        );
        check(
            Stage::EndOfData,
            silence(),
            Message,
            true,
            "no answer to the final dot within 600 s",
        );
        check(Stage::Greeting, silence(), Provider, false, "no greeting within 600 s");
        check(Stage::Mail, silence(), Message, false, "no answer to MAIL within 600 s");
        check(Stage::Ehlo, silence(), Provider, false, "no answer to EHLO within 600 s");
        check(
            Stage::Data,
            Fault::Garbage(Garbage::LongLine),
            Message,
            false,
            "the server broke the protocol after DATA: a line of a reply is too long",
        );
    }
}
