//! Replies: a code, an enhanced status and text (RFC 5321 4.2, RFC 3463, RFC 2034).
//!
//! Refusing a client is a value: what may refuse returns `Result<_, Reply>`. The same type carries what an upstream
//! answered, whose text may be any bytes.

use std::borrow::Cow;
use std::fmt;

/// A three-digit reply code, 200 to 599.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplyCode(u16);

/// The first digit of a reply code (RFC 5321 4.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyClass {
    /// 2xx
    Done,
    /// 3xx
    Continue,
    /// 4xx: for now
    Transient,
    /// 5xx: for good
    Permanent,
}

impl ReplyCode {
    /// `None` for what RFC 5321 4.2.1 does not define (first digit 2 to 5).
    pub fn parse(code: u16) -> Option<Self> {
        (200..=599).contains(&code).then_some(Self(code))
    }

    pub fn get(self) -> u16 {
        self.0
    }

    pub fn class(self) -> ReplyClass {
        match self.0 / 100 {
            2 => ReplyClass::Done,
            3 => ReplyClass::Continue,
            4 => ReplyClass::Transient,
            _ => ReplyClass::Permanent,
        }
    }
}

impl fmt::Display for ReplyCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for ReplyCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An enhanced status code `class.subject.detail` (RFC 3463).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct EnhancedStatus(pub u8, pub u16, pub u16);

impl EnhancedStatus {
    /// Reads a status at the start of a reply's text; it ends at a blank or at the end (RFC 2034 4).
    pub fn parse(text: &[u8]) -> Option<Self> {
        let word = text.split(|b| *b == b' ').next()?;
        let mut parts = std::str::from_utf8(word).ok()?.split('.');
        let mut number = || -> Option<u16> {
            let digits = parts.next()?;
            let fits = matches!(digits.len(), 1..=3) && digits.bytes().all(|b| b.is_ascii_digit());
            fits.then(|| digits.parse().ok()).flatten()
        };
        let (class, subject, detail) = (number()?, number()?, number()?);
        match (class, parts.next()) {
            (2 | 4 | 5, None) => Some(Self(u8::try_from(class).ok()?, subject, detail)),
            _ => None,
        }
    }
}

impl fmt::Display for EnhancedStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl fmt::Debug for EnhancedStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A reply: ours to a client, or an upstream's to us.
#[derive(Clone, PartialEq, Eq)]
pub struct Reply {
    pub code: ReplyCode,
    pub enhanced: Option<EnhancedStatus>,
    /// Without code and enhanced status; lines are parted by `\n`. Ours is ASCII; an upstream's may be any bytes.
    pub text: Cow<'static, [u8]>,
}

impl Reply {
    /// A reply of our own.
    pub fn new(code: u16, enhanced: (u8, u16, u16), text: impl Into<Cow<'static, str>>) -> Self {
        let enhanced = EnhancedStatus(enhanced.0, enhanced.1, enhanced.2);
        Self { enhanced: Some(enhanced), ..Self::bare(code, text) }
    }

    /// A reply of our own without an enhanced status: the greeting, EHLO, HELO, 354 (RFC 2034 4).
    pub fn bare(code: u16, text: impl Into<Cow<'static, str>>) -> Self {
        let text = match text.into() {
            Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
            Cow::Owned(text) => Cow::Owned(text.into_bytes()),
        };
        Self { code: ReplyCode(code.clamp(200, 599)), enhanced: None, text }
    }

    /// As the wire has it: each line with the code and, where there is one, the enhanced status.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        let mut lines = self.text.split(|b| *b == b'\n').peekable();
        while let Some(line) = lines.next() {
            let mark = if lines.peek().is_some() { '-' } else { ' ' };
            out.extend_from_slice(format!("{}{mark}", self.code).as_bytes());
            if let Some(enhanced) = self.enhanced {
                out.extend_from_slice(format!("{enhanced} ").as_bytes());
            }
            out.extend_from_slice(line);
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// One line, escaped: fit for logs and error texts whatever the bytes are.
impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code)?;
        if let Some(enhanced) = self.enhanced {
            write!(f, " {enhanced}")?;
        }
        for line in self.text.split(|b| *b == b'\n') {
            write!(f, " {}", Escaped(line))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Bytes from a peer, made fit to be shown: printable UTF-8 stands, all else becomes `\xNN` (and a backslash `\\`).
///
/// What it writes holds no control character, so it cannot start a new line in a log, a header or a terminal.
pub struct Escaped<'a>(pub &'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '\\' => f.write_str("\\\\")?,
                    c if c.is_control() || is_invisible(c) => {
                        let mut bytes = [0; 4];
                        for byte in c.encode_utf8(&mut bytes).bytes() {
                            write!(f, "\\x{byte:02x}")?;
                        }
                    }
                    c => f.write_char(c)?,
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// Characters that end a line for some readers, or turn the writing direction of what follows.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' | '\u{feff}')
}

// The table of replies: everything the session says on its own account. What the listener refuses, it words itself.

pub fn greeting(hostname: &str) -> Reply {
    Reply::bare(220, format!("{hostname} ESMTP mailsluice"))
}

pub fn helo(hostname: &str) -> Reply {
    Reply::bare(250, hostname.to_owned())
}

/// The extensions that are served. What is listed here does what its RFC says (R20).
pub fn ehlo(hostname: &str, max_size: u64) -> Reply {
    Reply::bare(
        250,
        format!(
            "{hostname}\nPIPELINING\nSIZE {max_size}\n8BITMIME\nSMTPUTF8\nENHANCEDSTATUSCODES\nDSN\nCHUNKING\nHELP"
        ),
    )
}

pub fn sender_ok() -> Reply {
    Reply::new(250, (2, 1, 0), "Ok")
}

pub fn recipient_ok() -> Reply {
    Reply::new(250, (2, 1, 5), "Ok")
}

pub fn start_content() -> Reply {
    Reply::bare(354, "End data with <CR><LF>.<CR><LF>")
}

pub fn chunk_ok(octets: u64) -> Reply {
    Reply::new(250, (2, 0, 0), format!("Ok: {octets} octets received"))
}

/// The gateway answers for the message from here on.
pub fn queued(id: &str) -> Reply {
    Reply::new(250, (2, 0, 0), format!("Ok: queued as {id}"))
}

pub fn ok() -> Reply {
    Reply::new(250, (2, 0, 0), "Ok")
}

pub fn help() -> Reply {
    Reply::new(214, (2, 0, 0), "Commands: EHLO HELO MAIL RCPT DATA BDAT RSET NOOP VRFY HELP QUIT")
}

pub fn cannot_verify() -> Reply {
    Reply::new(252, (2, 5, 0), "Not verified, but mail for it is taken and delivery tried")
}

pub fn bye() -> Reply {
    Reply::new(221, (2, 0, 0), "Bye")
}

pub fn unknown_command() -> Reply {
    Reply::new(500, (5, 5, 1), "Unknown command")
}

pub fn line_too_long() -> Reply {
    Reply::new(500, (5, 5, 2), "Line too long")
}

pub fn control_character() -> Reply {
    Reply::new(500, (5, 5, 2), "The line has a control character")
}

pub fn not_implemented() -> Reply {
    Reply::new(502, (5, 5, 1), "Not offered here")
}

pub fn bad_sequence() -> Reply {
    Reply::new(503, (5, 5, 1), "Bad sequence of commands")
}

pub fn nested_mail() -> Reply {
    Reply::new(503, (5, 5, 1), "A transaction is open already")
}

pub fn mail_first() -> Reply {
    Reply::new(503, (5, 5, 1), "Needs MAIL first")
}

pub fn no_valid_recipients() -> Reply {
    Reply::new(554, (5, 5, 1), "No valid recipients")
}

pub fn argument_missing() -> Reply {
    Reply::new(501, (5, 5, 4), "An argument is missing")
}

pub fn argument_not_allowed() -> Reply {
    Reply::new(501, (5, 5, 4), "No argument is allowed here")
}

pub fn bad_hello() -> Reply {
    Reply::new(501, (5, 5, 4), "The name must be printable text of at most 255 octets")
}

pub fn mail_syntax() -> Reply {
    Reply::new(501, (5, 5, 4), "Write MAIL FROM:<address>")
}

pub fn rcpt_syntax() -> Reply {
    Reply::new(501, (5, 5, 4), "Write RCPT TO:<address>")
}

pub fn bdat_syntax() -> Reply {
    Reply::new(501, (5, 5, 4), "Write BDAT size [LAST]")
}

pub fn bad_parameter() -> Reply {
    Reply::new(501, (5, 5, 4), "A parameter is malformed")
}

pub fn duplicate_parameter() -> Reply {
    Reply::new(501, (5, 5, 4), "A parameter is given twice")
}

pub fn unknown_parameter() -> Reply {
    Reply::new(555, (5, 5, 4), "A parameter is not known or not offered")
}

pub fn bad_reverse_path(why: &str) -> Reply {
    Reply::new(501, (5, 1, 7), format!("Bad sender address: {why}"))
}

pub fn bad_forward_path(why: &str) -> Reply {
    Reply::new(501, (5, 1, 3), format!("Bad recipient address: {why}"))
}

pub fn needs_utf8() -> Reply {
    Reply::new(553, (5, 6, 7), "An address outside ASCII needs SMTPUTF8")
}

pub fn too_many_recipients() -> Reply {
    Reply::new(452, (4, 5, 3), "Too many recipients")
}

/// `why` follows the number, where the limit is not one of size alone.
pub fn too_large(max_size: u64, why: Option<&str>) -> Reply {
    let why = why.map(|why| format!("; {why}")).unwrap_or_default();
    Reply::new(552, (5, 3, 4), format!("The message is larger than {max_size} octets{why}"))
}

pub fn bare_newline() -> Reply {
    Reply::new(550, (5, 6, 0), "The message has a CR or LF that is not part of a CRLF")
}

pub fn not_smtp() -> Reply {
    Reply::new(421, (4, 7, 0), "This is an SMTP server")
}

/// What follows a refused DATA or BDAT may be content, and content must never run as commands (R15).
pub fn out_of_step() -> Reply {
    Reply::new(421, (4, 7, 0), "Content was refused and more came: closing")
}

pub fn too_many_errors() -> Reply {
    Reply::new(421, (4, 7, 0), "Too many errors: closing")
}

pub fn command_timeout() -> Reply {
    Reply::new(421, (4, 4, 2), "Timed out waiting for a command")
}

pub fn data_timeout() -> Reply {
    Reply::new(421, (4, 4, 2), "Timed out receiving the message")
}

pub fn data_timeout_bare_end() -> Reply {
    Reply::new(421, (4, 4, 2), "Timed out receiving the message: only CRLF.CRLF ends DATA")
}

pub fn shutting_down() -> Reply {
    Reply::new(421, (4, 3, 2), "Shutting down")
}

pub fn not_allowed() -> Reply {
    Reply::new(554, (5, 7, 1), "Clients at your address may not connect")
}

pub fn too_many_connections() -> Reply {
    Reply::new(421, (4, 3, 2), "Too many connections, try again later")
}

/// To the connection that was idle longest before MAIL, when all are taken (R19).
pub fn made_room() -> Reply {
    Reply::new(421, (4, 3, 2), "Idle, and another client needs the connection")
}

pub fn no_provider() -> Reply {
    Reply::new(451, (4, 3, 2), "No provider is active, mail is not accepted now")
}

pub fn no_space() -> Reply {
    Reply::new(452, (4, 3, 1), "Not enough disk space, try again later")
}

/// At MAIL, while the disk fails: nothing of the message was sent yet.
pub fn cannot_store() -> Reply {
    Reply::new(452, (4, 3, 0), "No message can be stored now, try again later")
}

pub fn local_error() -> Reply {
    Reply::new(451, (4, 3, 0), "The message could not be stored, try again later")
}

pub fn loops() -> Reply {
    Reply::new(554, (5, 4, 6), "Too many Received lines: the message goes round in circles")
}

/// At the end of data: that the From is `address`, and that `sender` would do; both in printable ASCII.
pub fn sender_not_allowed(address: &str, sender: &str) -> Reply {
    let cure = from_that_does(sender);
    let text = format!(
        "The From address <{address}> is not one that may send here:\n{cure}, or have the operator of the relay add the address to sender.allowed"
    );
    Reply::new(550, (5, 7, 60), text)
}

/// At the end of data: why the From cannot be judged, in printable ASCII, and that `sender` would do.
pub fn sender_unclear(why: &str, sender: &str) -> Reply {
    Reply::new(550, (5, 7, 60), format!("{why}:\n{}", from_that_does(sender)))
}

fn from_that_does(sender: &str) -> String {
    match sender.len() <= 120 && sender.is_ascii() {
        true => format!("send From: <{sender}>"),
        false => "send from the address that the operator names".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_carries_code_and_status() {
        let mut out = Vec::new();
        Reply::new(214, (2, 0, 0), "one\ntwo").write_to(&mut out);
        assert_eq!(out, b"214-2.0.0 one\r\n214 2.0.0 two\r\n");
        out.clear();
        Reply::bare(354, "go on").write_to(&mut out);
        assert_eq!(out, b"354 go on\r\n");
    }

    #[test]
    fn enhanced_status_is_read_strictly() {
        assert_eq!(EnhancedStatus::parse(b"5.7.60 SMTP; no"), Some(EnhancedStatus(5, 7, 60)));
        assert_eq!(EnhancedStatus::parse(b"2.0.0"), Some(EnhancedStatus(2, 0, 0)));
        for text in [
            &b"3.0.0 x"[..],
            b"5.7",
            b"5.7.1.2 x",
            b"5.7.1x",
            b"5..1",
            b"5.7.1000",
            b"+5.7.1",
            b"5.7.\xff",
            b"",
        ] {
            assert_eq!(EnhancedStatus::parse(text), None, "{}", Escaped(text));
        }
    }

    #[test]
    fn bytes_of_a_peer_are_shown_without_control_characters() {
        let shown = Escaped(b"a\r\nb\xff\\ \x1b[2J \xc3\xa9 \xe2\x80\xae").to_string();
        assert_eq!(shown, "a\\x0d\\x0ab\\xff\\\\ \\x1b[2J é \\xe2\\x80\\xae");
        let reply =
            Reply { code: ReplyCode(550), enhanced: None, text: Cow::Borrowed(b"no\nnever\xe9") };
        assert_eq!(reply.to_string(), "550 no never\\xe9");
    }
}
