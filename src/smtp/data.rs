//! The content of a message on its way in.

/// What becomes of a lone CR or LF in content (R11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BareNewline {
    /// A lone LF becomes CRLF, a lone CR a blank.
    Normalize,
    /// 550 5.6.0 at the end of data.
    Reject,
}
