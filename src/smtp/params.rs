//! What MAIL and RCPT carry: paths and their parameters (RFC 1870, 3461, 6152, 6531).

use crate::smtp::address::{ForwardPath, ReversePath};

/// `NOTIFY` (RFC 3461 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notify {
    /// Not given: report failure, and delay if we like.
    Unsaid,
    Never,
    On {
        success: bool,
        failure: bool,
        delay: bool,
    },
}

impl Notify {
    /// Whether a failure is to be reported.
    pub fn wants_failure(self) -> bool {
        match self {
            Self::Unsaid => true,
            Self::Never => false,
            Self::On { failure, .. } => failure,
        }
    }
}

/// `RET` (RFC 3461 4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ret {
    Full,
    Headers,
}

/// `BODY` (RFC 6152): what the client says of its content. What it then sends is taken as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyType {
    /// `7BIT`, or not given.
    SevenBit,
    /// `8BITMIME`
    EightBitMime,
}

/// The argument of MAIL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MailParams {
    pub reverse_path: ReversePath,
    /// `SIZE` (RFC 1870): an estimate, so it may refuse a message but never vouches for it.
    pub declared_size: Option<u64>,
    pub body: BodyType,
    /// `SMTPUTF8` (RFC 6531).
    pub smtputf8: bool,
    pub ret: Option<Ret>,
    /// `ENVID`, still in xtext (RFC 3461 4.4).
    pub envid: Option<Box<str>>,
}

/// The argument of RCPT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipient {
    pub path: ForwardPath,
    pub notify: Notify,
    /// `ORCPT`, still as `type;xtext` (RFC 3461 4.2).
    pub orcpt: Option<Box<str>>,
}
