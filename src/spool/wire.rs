//! Envelope and progress as JSON, by types of their own: what is on disk does not change when a type inside does.
//!
//! Fields that a later version adds are passed over, and optional ones may be missing. Octets that are not UTF-8 are
//! written in hexadecimal and come back exactly.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::side_file::FileRef;
use crate::envelope::{
    Client, Envelope, Kind, Priority, Progress, Rcpt, RcptStatus, SpoolId, UnixMillis,
};
use crate::outcome::{Cause, Receipt, Scope, Stage, Words};
use crate::smtp::address::{AddressError, Charset, ForwardPath, Mailbox, ReversePath};
use crate::smtp::params::{Notify, Ret};
use crate::smtp::reply::EnhancedStatus;

/// The envelope and, where the content lies in a side file, which.
pub(super) fn write_envelope(envelope: &Envelope, file: Option<&FileRef>) -> Vec<u8> {
    let wire = EnvelopeWire {
        kind: match envelope.kind {
            Kind::Mail => None,
            Kind::Report => Some("report".into()),
            Kind::Notice => Some("notice".into()),
        },
        at: envelope.accepted.0,
        from: envelope.reverse_path.as_str().into(),
        to: envelope.rcpts.iter().map(RcptWire::new).collect(),
        utf8: envelope.smtputf8,
        eight: envelope.eight_bit,
        ret: envelope.ret.map(|ret| match ret {
            Ret::Full => "full".into(),
            Ret::Headers => "hdrs".into(),
        }),
        envid: envelope.envid.as_deref().map(Cow::Borrowed),
        size: envelope.size,
        peer: (&*envelope.client.address).into(),
        helo: (&*envelope.client.helo).into(),
        high: envelope.priority == Priority::High,
        author: envelope.author.as_ref().map(|author| author.as_str().into()),
        add: Octets::new(&envelope.prepend),
        file: file.map(|file| FileWire {
            name: (&*file.name).into(),
            len: file.len,
            crc: file.crc32c,
        }),
    };
    serde_json::to_vec(&wire).expect("strings, numbers and lists can always be written")
}

pub(super) fn read_envelope(
    id: SpoolId,
    json: &[u8],
) -> Result<(Envelope, Option<FileRef>), String> {
    let wire: EnvelopeWire<'_> = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    let mailbox = |text: &str| Mailbox::parse(text, Charset::Utf8).map_err(said);
    let envelope = Envelope {
        id,
        kind: match wire.kind.as_deref() {
            None => Kind::Mail,
            Some("report") => Kind::Report,
            Some("notice") => Kind::Notice,
            Some(other) => return Err(format!("the kind is {other:?}")),
        },
        accepted: UnixMillis(wire.at),
        reverse_path: match &*wire.from {
            "" => ReversePath::Null,
            text => ReversePath::Mailbox(mailbox(text)?),
        },
        rcpts: wire.to.iter().map(RcptWire::read).collect::<Result<_, _>>()?,
        smtputf8: wire.utf8,
        eight_bit: wire.eight,
        ret: match wire.ret.as_deref() {
            None => None,
            Some("full") => Some(Ret::Full),
            Some("hdrs") => Some(Ret::Headers),
            Some(other) => return Err(format!("RET is {other:?}")),
        },
        envid: wire.envid.map(|envid| envid.into()),
        size: wire.size,
        client: Client { address: wire.peer.into(), helo: wire.helo.into() },
        priority: match wire.high {
            true => Priority::High,
            false => Priority::Normal,
        },
        author: wire.author.as_deref().map(mailbox).transpose()?,
        prepend: Bytes::from(wire.add.read()?),
    };
    let file = match wire.file {
        None => None,
        Some(file) => Some(FileRef::parse(&file.name, file.len, file.crc)?),
    };
    Ok((envelope, file))
}

pub(super) fn write_progress(progress: &Progress) -> Vec<u8> {
    let wire = ProgressWire {
        n: progress.attempts,
        due: progress.due.0,
        first: progress.first_deferral.map(|at| at.0),
        to: progress.rcpts.iter().map(StatusWire::new).collect(),
        sending: progress.sending.as_slice().into(),
        doubtful: progress.doubtful.as_slice().into(),
        untold: progress.untold.as_slice().into(),
        warned: progress.warned,
        named: progress.named,
    };
    serde_json::to_vec(&wire).expect("strings, numbers and lists can always be written")
}

pub(super) fn read_progress(json: &[u8]) -> Result<Progress, String> {
    let wire: ProgressWire<'_> = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    Ok(Progress {
        attempts: wire.n,
        due: UnixMillis(wire.due),
        first_deferral: wire.first.map(UnixMillis),
        rcpts: wire.to.iter().map(StatusWire::read).collect::<Result<_, _>>()?,
        sending: wire.sending.into_owned(),
        doubtful: wire.doubtful.into_owned(),
        untold: wire.untold.into_owned(),
        warned: wire.warned,
        named: wire.named,
    })
}

#[derive(Serialize, Deserialize)]
struct EnvelopeWire<'a> {
    /// Missing for what a client handed in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kind: Option<Cow<'a, str>>,
    at: u64,
    /// Empty for the null path.
    from: Cow<'a, str>,
    to: Vec<RcptWire<'a>>,
    #[serde(default, skip_serializing_if = "is_false")]
    utf8: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    eight: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ret: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    envid: Option<Cow<'a, str>>,
    size: u64,
    peer: Cow<'a, str>,
    helo: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "is_false")]
    high: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    author: Option<Cow<'a, str>>,
    #[serde(default)]
    add: Octets<'a>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<FileWire<'a>>,
}

#[derive(Serialize, Deserialize)]
struct FileWire<'a> {
    name: Cow<'a, str>,
    len: u64,
    crc: u32,
}

#[derive(Serialize, Deserialize)]
struct RcptWire<'a> {
    p: Cow<'a, str>,
    /// `NOTIFY`: missing, `never`, or the first letters of what is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    n: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    o: Option<Cow<'a, str>>,
}

impl<'a> RcptWire<'a> {
    fn new(rcpt: &'a Rcpt) -> Self {
        let n = match rcpt.notify {
            Notify::Unsaid => None,
            Notify::Never => Some("never".into()),
            Notify::On { success, failure, delay } => {
                let letters = [(success, 's'), (failure, 'f'), (delay, 'd')];
                let asked = letters.iter().filter(|(asked, _)| *asked).map(|(_, letter)| letter);
                Some(asked.collect::<String>().into())
            }
        };
        Self { p: rcpt.path.as_str().into(), n, o: rcpt.orcpt.as_deref().map(Cow::Borrowed) }
    }

    fn read(&self) -> Result<Rcpt, String> {
        let notify = match self.n.as_deref() {
            None => Notify::Unsaid,
            Some("never") => Notify::Never,
            Some(asked) => Notify::On {
                success: asked.contains('s'),
                failure: asked.contains('f'),
                delay: asked.contains('d'),
            },
        };
        let path = ForwardPath::parse(&self.p, Charset::Utf8).map_err(said)?;
        Ok(Rcpt { path, notify, orcpt: self.o.as_deref().map(Into::into) })
    }
}

#[derive(Serialize, Deserialize)]
struct ProgressWire<'a> {
    n: u16,
    due: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    first: Option<u64>,
    to: Vec<StatusWire<'a>>,
    #[serde(default, skip_serializing_if = "is_none_of")]
    sending: Cow<'a, [u32]>,
    #[serde(default, skip_serializing_if = "is_none_of")]
    doubtful: Cow<'a, [u32]>,
    #[serde(default, skip_serializing_if = "is_none_of")]
    untold: Cow<'a, [u32]>,
    #[serde(default, skip_serializing_if = "is_false")]
    warned: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    named: bool,
}

#[derive(Serialize, Deserialize)]
enum StatusWire<'a> {
    #[serde(rename = "p")]
    Pending {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        last: Option<CauseWire<'a>>,
    },
    #[serde(rename = "d")]
    Delivered {
        words: Octets<'a>,
        #[serde(default, skip_serializing_if = "is_false")]
        relayed: bool,
    },
    #[serde(rename = "f")]
    Failed(CauseWire<'a>),
}

impl<'a> StatusWire<'a> {
    fn new(status: &'a RcptStatus) -> Self {
        match status {
            RcptStatus::Pending { last } => {
                Self::Pending { last: last.as_ref().map(CauseWire::new) }
            }
            RcptStatus::Delivered(receipt) => {
                let words = Octets::new(receipt.words.as_bytes());
                Self::Delivered { words, relayed: receipt.relayed }
            }
            RcptStatus::Failed(cause) => Self::Failed(CauseWire::new(cause)),
        }
    }

    fn read(&self) -> Result<RcptStatus, String> {
        Ok(match self {
            Self::Pending { last } => {
                RcptStatus::Pending { last: last.as_ref().map(CauseWire::read).transpose()? }
            }
            Self::Delivered { words, relayed } => {
                RcptStatus::Delivered(Receipt { words: words.read_words()?, relayed: *relayed })
            }
            Self::Failed(cause) => RcptStatus::Failed(cause.read()?),
        })
    }
}

#[derive(Serialize, Deserialize)]
struct CauseWire<'a> {
    scope: Cow<'a, str>,
    stage: Cow<'a, str>,
    words: Octets<'a>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    status: Option<(u8, u16, u16)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    wait: Option<Duration>,
    #[serde(default, skip_serializing_if = "is_false")]
    maybe: bool,
}

impl<'a> CauseWire<'a> {
    fn new(cause: &'a Cause) -> Self {
        Self {
            scope: cause.scope.label().into(),
            stage: cause.stage.label().into(),
            words: Octets::new(cause.words.as_bytes()),
            status: cause
                .status
                .map(|EnhancedStatus(class, subject, detail)| (class, subject, detail)),
            wait: cause.retry_after,
            maybe: cause.maybe_sent,
        }
    }

    /// A scope or stage of a later version becomes the nearest of ours: this is what once happened, told to people, and
    /// no reason to lose a message.
    fn read(&self) -> Result<Cause, String> {
        let scope = Scope::ALL.into_iter().find(|scope| scope.label() == self.scope);
        Ok(Cause {
            scope: scope.unwrap_or(Scope::Message),
            stage: Stage::from_label(&self.stage).unwrap_or(Stage::Local),
            words: self.words.read_words()?,
            status: self
                .status
                .map(|(class, subject, detail)| EnhancedStatus(class, subject, detail)),
            retry_after: self.wait,
            lost: false,
            null_path: false,
            busy: false,
            maybe_sent: self.maybe,
        })
    }
}

/// Octets as a string where they are UTF-8, else in hexadecimal.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Octets<'a> {
    Text(Cow<'a, str>),
    Hex { hex: String },
}

impl Default for Octets<'_> {
    fn default() -> Self {
        Self::Text("".into())
    }
}

impl<'a> Octets<'a> {
    fn new(octets: &'a [u8]) -> Self {
        match std::str::from_utf8(octets) {
            Ok(text) => Self::Text(text.into()),
            Err(_not_utf8) => {
                let mut hex = String::with_capacity(octets.len() * 2);
                for octet in octets {
                    write!(hex, "{octet:02x}").expect("writing to a string cannot fail");
                }
                Self::Hex { hex }
            }
        }
    }

    fn read(&self) -> Result<Vec<u8>, String> {
        match self {
            Self::Text(text) => Ok(text.as_bytes().to_vec()),
            Self::Hex { hex } => {
                let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
                let pair = |pair: &[u8]| match pair {
                    [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
                    _ => None,
                };
                let octets: Option<Vec<u8>> = hex.as_bytes().chunks(2).map(pair).collect();
                octets.ok_or_else(|| "octets are not in hexadecimal".to_owned())
            }
        }
    }

    fn read_words(&self) -> Result<Words, String> {
        Ok(self.read()?.as_slice().into())
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_false(value: &bool) -> bool {
    !value
}

fn is_none_of(positions: &[u32]) -> bool {
    positions.is_empty()
}

fn said(error: AddressError) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_a_later_version_are_passed_over_and_optional_ones_may_be_missing() {
        let json = br#"{"at":7,"from":"","to":[{"p":"a@b","zz":[1]}],"size":3,"peer":"unix",
            "helo":"h","later":{"x":null}}"#;
        let (envelope, file) = read_envelope(SpoolId::from_u128(1), json).unwrap();
        assert_eq!(envelope.rcpts.len(), 1);
        assert!(file.is_none() && envelope.prepend.is_empty());
        let json = br#"{"n":1,"due":9,"to":[{"f":{"scope":"galaxy","stage":"later","words":"no",
            "more":1}},{"p":{}}],"zz":0}"#;
        let progress = read_progress(json).unwrap();
        let cause = Cause::new(Scope::Message, Stage::Local, "no");
        let should = vec![RcptStatus::Failed(cause), RcptStatus::Pending { last: None }];
        assert_eq!(progress.rcpts, should);
    }

    #[test]
    fn what_is_not_an_envelope_is_refused() {
        for json in [
            &b""[..],
            b"{}",
            br#"{"at":7,"from":"x","to":[],"size":3,"peer":"u","helo":"h"}"#,
            br#"{"at":7,"from":"","to":[],"size":3,"peer":"u","helo":"h","add":{"hex":"0"}}"#,
            br#"{"at":7,"from":"","to":[],"size":3,"peer":"u","helo":"h","file":{"name":"../x",
                "len":1,"crc":1}}"#,
        ] {
            assert!(read_envelope(SpoolId::from_u128(1), json).is_err());
        }
    }
}
