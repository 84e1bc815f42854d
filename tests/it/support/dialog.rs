//! Dialogs in `tests/dialogs/NN-name.txt`: what a client sends, what it is told, what was stored.
//!
//! The same files run in-process against the session and over TCP against the binary, so this file knows neither. One
//! line is one step:
//!
//! ```text
//! # a comment
//! = max_recipients 3        a setting other than the default; before the first step
//! > EHLO client.example     send the line and CRLF
//! >> half a li              send exactly this
//! < 250 2.0.0 Ok            the next line of the server is exactly this
//! <~ 250 2.0.0 Ok: *        the same with `*` for any text
//! stored from=<a@b> rcpt=<c@d>,<e@f> body="Subject: x\r\n\r\n"
//!                           the next message that was stored is this one
//! eof                       close our side
//! closed                    the server has closed, and sent nothing more
//! ```
//!
//! What is sent, and bodies, may hold `\r \n \t \0 \\ \" \xNN` and `\{500 text}` for 500 times the text. Messages that no
//! `stored` names must not have been stored. A file without `closed` at its end leaves the connection open.
//!
//! Settings: `max_size` (octets), `max_recipients`, `errors`, `bare_newline` (`normalize` or `reject`). The host is
//! `relay.test`. Steps that send and follow each other may reach the server in one piece or in many.

use std::fs;
use std::path::Path;

/// One file.
#[derive(Clone, Debug)]
pub struct Dialog {
    pub name: String,
    /// Key and value of each `=` line.
    pub settings: Vec<(String, String)>,
    pub steps: Vec<Step>,
}

/// One step and the number of its line.
#[derive(Clone, Debug)]
pub struct Step {
    pub line: usize,
    pub action: Action,
}

/// What one line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Send(Vec<u8>),
    Expect(Pattern),
    Stored(Stored),
    Eof,
    Closed,
}

/// What a line of the server must be, without its CRLF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pattern {
    Exact(String),
    /// The texts between the `*`.
    Wild(Vec<String>),
}

/// A message as it must have been stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// With its brackets.
    pub from: String,
    /// With their brackets, in the order of RCPT.
    pub rcpts: Vec<String>,
    pub body: Vec<u8>,
}

impl Dialog {
    /// Reads one dialog; an error names file and line.
    pub fn parse(name: &str, text: &str) -> Result<Self, String> {
        let mut dialog = Self { name: name.to_owned(), settings: Vec::new(), steps: Vec::new() };
        for (at, line) in text.lines().enumerate() {
            let line = line.trim_end_matches('\r');
            let wrong = |why: &str| format!("{name}:{}: {why}: {line}", at + 1);
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(setting) = line.strip_prefix("= ") {
                let (key, value) = setting.split_once(' ').ok_or_else(|| wrong("no value"))?;
                dialog.settings.push((key.to_owned(), value.trim().to_owned()));
                continue;
            }
            let action = action(line).map_err(|why| wrong(&why))?;
            dialog.steps.push(Step { line: at + 1, action });
        }
        Ok(dialog)
    }

    /// Reads all dialogs of a folder, by name.
    pub fn load_all(folder: &Path) -> Result<Vec<Self>, String> {
        let wrong = |error: std::io::Error| format!("{}: {error}", folder.display());
        let mut dialogs = Vec::new();
        for entry in fs::read_dir(folder).map_err(wrong)? {
            let path = entry.map_err(wrong)?.path();
            if path.extension().is_some_and(|extension| extension == "txt") {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                dialogs.push(Self::parse(&name, &fs::read_to_string(&path).map_err(wrong)?)?);
            }
        }
        dialogs.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(dialogs)
    }
}

impl Pattern {
    pub fn matches(&self, line: &str) -> bool {
        match self {
            Self::Exact(text) => line == text,
            Self::Wild(parts) => {
                let [first, middle @ .., last] = parts.as_slice() else {
                    return parts.first().is_some_and(|only| line == only);
                };
                let Some(mut rest) = line.strip_prefix(first.as_str()) else { return false };
                for part in middle {
                    let Some((_, after)) = rest.split_once(part.as_str()) else { return false };
                    rest = after;
                }
                rest.ends_with(last.as_str())
            }
        }
    }
}

fn action(line: &str) -> Result<Action, String> {
    if line == ">" {
        return Ok(Action::Send(b"\r\n".to_vec()));
    }
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    match word {
        ">" => {
            let mut bytes = unescape(rest)?;
            bytes.extend_from_slice(b"\r\n");
            Ok(Action::Send(bytes))
        }
        ">>" => Ok(Action::Send(unescape(rest)?)),
        "<" => Ok(Action::Expect(Pattern::Exact(rest.to_owned()))),
        "<~" => Ok(Action::Expect(Pattern::Wild(rest.split('*').map(str::to_owned).collect()))),
        "stored" => stored(rest).map(Action::Stored),
        "eof" => Ok(Action::Eof),
        "closed" => Ok(Action::Closed),
        _ => Err("not a step".to_owned()),
    }
}

fn stored(rest: &str) -> Result<Stored, String> {
    let wrong = || "write stored from=<...> rcpt=<...>,<...> body=\"...\"".to_owned();
    let rest = rest.strip_prefix("from=").ok_or_else(wrong)?;
    let (from, rest) = rest.split_once(" rcpt=").ok_or_else(wrong)?;
    let (rcpts, body) = rest.split_once(" body=\"").ok_or_else(wrong)?;
    let body = body.strip_suffix('"').ok_or_else(wrong)?;
    let mut addresses: Vec<String> = rcpts.split(">,").map(|rcpt| format!("{rcpt}>")).collect();
    if let Some(last) = addresses.last_mut() {
        last.pop();
    }
    Ok(Stored { from: from.to_owned(), rcpts: addresses, body: unescape(body)? })
}

fn unescape(text: &str) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some((plain, escape)) = rest.split_once('\\') {
        out.extend_from_slice(plain.as_bytes());
        let mut chars = escape.chars();
        match chars.next() {
            Some('r') => out.push(b'\r'),
            Some('n') => out.push(b'\n'),
            Some('t') => out.push(b'\t'),
            Some('0') => out.push(0),
            Some('\\') => out.push(b'\\'),
            Some('"') => out.push(b'"'),
            Some('x') => {
                let digits: String = chars.by_ref().take(2).collect();
                out.push(u8::from_str_radix(&digits, 16).map_err(|e| format!("\\x: {e}"))?);
            }
            Some('{') => {
                let inside = chars.as_str();
                let (inside, after) = inside.split_once('}').ok_or("\\{ without }")?;
                let (times, text) = inside.split_once(' ').ok_or("\\{ without a blank")?;
                let times = times.parse().map_err(|e| format!("\\{{: {e}"))?;
                let piece = unescape(text)?;
                (0..times).for_each(|_| out.extend_from_slice(&piece));
                chars = after.chars();
            }
            other => return Err(format!("\\{other:?} is no escape")),
        }
        rest = chars.as_str();
    }
    out.extend_from_slice(rest.as_bytes());
    Ok(out)
}
