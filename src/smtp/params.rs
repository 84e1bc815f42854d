//! Parameters of MAIL and RCPT that outlive the session (RFC 3461).

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

/// `RET` (RFC 3461 4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ret {
    Full,
    Headers,
}
