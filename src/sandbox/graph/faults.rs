//! Faults on demand: by a recipient's address, or for requests that a test names.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::answer::{Answer, End, Refusal};

/// What recipients ask for, as `--help` and README list it.
pub const FAULTS: [(&str, &str); 13] = [
    ("fail-503@", "nothing is taken, and that status answered (any from 300 to 599)"),
    ("sent-504@", "the message is taken, and that status answered (any from 200 to 599)"),
    ("throttle-2@", "so many times 429 with Retry-After, then it is taken"),
    ("busy-2@", "so many times 503 with Retry-After, then it is taken"),
    ("invalid@", "ErrorInvalidRecipients that names the recipient"),
    ("unresolved@", "ErrorInvalidRecipients that names nobody"),
    ("quota@", "the mailbox is over its daily limit"),
    ("sendas@", "ErrorSendAsDenied"),
    ("drop@", "nothing is taken, and the connection dropped"),
    ("lost-answer@", "the message is taken, and the connection dropped before the answer"),
    ("hang@", "nothing is taken, and nothing answered"),
    ("endless@", "nothing is taken, and the answer never ends"),
    ("slow@", "the answer takes a while"),
];

/// What senders ask for by the local part of the mailbox in the URL.
pub const MAILBOXES: [(&str, &str); 6] = [
    ("missing@", "there is no such user (404 ErrorInvalidUser)"),
    ("unlicensed@", "it is no mailbox of Exchange Online (404 MailboxNotEnabledForRESTAPI)"),
    ("list@", "a list: no such user, but whoever sends may send as it"),
    ("denied@", "an access policy keeps the app away (403 ErrorAccessDenied)"),
    ("full@", "the mailbox is full (507 ErrorQuotaExceeded)"),
    ("blocked@", "it may not send (403 ErrorMessageSubmissionBlocked)"),
];

/// Refuses what the mailbox in the URL asks for; not where it stands in a list of those that exist.
pub(super) fn of_mailbox(mailbox: &str) -> Option<Refusal> {
    let refuse = |status, code, message: &str| Some(Refusal::new(status, code, message));
    match local(mailbox) {
        "missing" | "list" => {
            refuse(404, "ErrorInvalidUser", &format!("The requested user '{mailbox}' is invalid."))
        }
        "unlicensed" => refuse(
            404,
            "MailboxNotEnabledForRESTAPI",
            "The mailbox is either inactive, soft-deleted, or is hosted on-premise.",
        ),
        "denied" => refuse(403, "ErrorAccessDenied", "Access to OData is disabled."),
        "full" => refuse(507, "ErrorQuotaExceeded", "The mailbox is over its quota."),
        "blocked" => refuse(
            403,
            "ErrorMessageSubmissionBlocked",
            "Cannot send mail. Submission is blocked for this mailbox.",
        ),
        _ => None,
    }
}

/// Whether anybody may send as this address.
pub(super) fn is_list(address: &str) -> bool {
    local(address) == "list"
}

/// What a recipient's address asks for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Asked {
    /// Not taken.
    Instead(End),
    Refused(Refusal),
    /// Not taken this time.
    Later(Refusal),
    /// Taken, then this.
    Then(End),
    /// Taken, after a while.
    Slow,
}

/// Counts how often an address has asked.
#[derive(Debug, Default)]
pub(super) struct Askers(HashMap<String, u32>);

impl Askers {
    /// What the recipients ask for, and which of them; the first that asks for something is heard.
    pub(super) fn ask<'a>(
        &mut self,
        mut recipients: impl Iterator<Item = &'a str>,
    ) -> Option<(&'a str, Asked)> {
        recipients.find_map(|recipient| Some((recipient, self.one(recipient)?)))
    }

    fn one(&mut self, address: &str) -> Option<Asked> {
        let local = local(address);
        let invalid = |named: &str| {
            let words = format!("At least one recipient is not valid.{named}");
            Some(Asked::Refused(Refusal::new(400, "ErrorInvalidRecipients", words)))
        };
        match local {
            "slow" => return Some(Asked::Slow),
            "drop" => return Some(Asked::Instead(End::Drop)),
            "hang" => return Some(Asked::Instead(End::Hang)),
            "lost-answer" => return Some(Asked::Then(End::Drop)),
            "endless" => {
                return Some(Asked::Instead(End::Endless(Answer::html(500, "Server Error"))));
            }
            "unresolved" => return invalid(""),
            "invalid" => {
                let rest = format!(
                    ", Recipient '{address}' is not resolved. All recipients must be resolved before a message can be submitted."
                );
                return invalid(&rest);
            }
            "quota" => {
                let words = "Cannot send mail. Daily Message/Recipient limit exceeded.";
                return Some(Asked::Refused(Refusal::new(429, "ErrorExceededMessageLimit", words)));
            }
            "sendas" => return Some(Asked::Refused(send_as_denied())),
            _ => {}
        }
        let (word, number) = local.rsplit_once('-')?;
        let number: u16 = number.parse().ok()?;
        match word {
            "fail" if (300..600).contains(&number) => {
                Some(Asked::Instead(End::Answer(status(number))))
            }
            "sent" if (200..600).contains(&number) => {
                Some(Asked::Then(End::Answer(status(number))))
            }
            "throttle" | "busy" => {
                let key = address.to_ascii_lowercase();
                // A sandbox that is asked by so many addresses forgets.
                if self.0.len() > 10_000 {
                    self.0.clear();
                }
                let asked = self.0.entry(key).or_insert(0);
                if *asked >= u32::from(number) {
                    *asked = 0;
                    return None;
                }
                *asked += 1;
                let delay = Duration::from_millis(1_064);
                let refusal = if word == "throttle" {
                    Refusal::new(429, "ApplicationThrottled", "Too many requests.")
                } else {
                    Refusal::new(
                        503,
                        "ErrorServerBusy",
                        "The server cannot service this request right now.",
                    )
                };
                Some(Asked::Later(refusal.retry_after(delay)))
            }
            _ => None,
        }
    }
}

pub(super) fn send_as_denied() -> Refusal {
    let words = "The user account which was used to submit this request does not have the right to send mail on behalf of the specified sending account., Cannot submit message.";
    Refusal::new(403, "ErrorSendAsDenied", words)
}

/// The answer that is usual for a status.
fn status(status: u16) -> Answer {
    let refuse = |code, message: &str| {
        Refusal::new(status, code, message).answer(&super::answer::guid(), None)
    };
    match status {
        200..=299 => Answer::json(status, &serde_json::json!({})),
        300..=399 => Answer::empty(status).with("location", "https://elsewhere.invalid/v1.0/"),
        400 => refuse("BadRequest", "The address asked for it."),
        401 => refuse("InvalidAuthenticationToken", "The address asked for it."),
        403 => refuse("ErrorAccessDenied", "Access is denied. Check credentials and try again."),
        404 => refuse("ErrorItemNotFound", "The specified object was not found in the store."),
        409 => refuse("ErrorIrresolvableConflict", "The address asked for it."),
        412 => refuse("ErrorIrresolvableConflict", "The address asked for it."),
        413 => Answer::html(413, "The request entity is too large"),
        429 => refuse("TooManyRequests", "Too many requests."),
        500 => refuse(
            "ErrorInternalServerError",
            "An internal server error occurred. The operation failed.",
        ),
        502..=504 => Answer::html(status, "The address asked for it"),
        507 => refuse("ErrorQuotaExceeded", "The mailbox is over its quota."),
        _ => refuse("UnknownError", "The address asked for it."),
    }
}

fn local(address: &str) -> &str {
    address.split(['@', '+']).next().unwrap_or_default()
}

/// A fault for requests that are named by method and path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fault {
    /// Any, where none is named.
    pub method: Option<String>,
    /// Of the URL, without the query; `*` stands for anything, an upload URL included.
    pub path: String,
    /// So many that fit go by first.
    pub skip: u32,
    /// So many times; null is for ever.
    pub times: Option<u32>,
    /// The request has its effect before.
    pub acts: bool,
    /// Only so many octets of the body are read.
    pub read: Option<u64>,
    pub delay_ms: u64,
    /// Without one the real answer is given, after the delay.
    pub status: Option<u16>,
    pub headers: BTreeMap<String, String>,
    /// A text goes out as it is, anything else as JSON.
    pub body: Value,
    /// In place of `body`: the code of an error in Graph's shape.
    pub code: Option<String>,
    pub message: String,
    pub then: Then,
}

/// How the exchange ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Then {
    Answer,
    Drop,
    Hang,
    /// A body without an end.
    Endless,
    /// The connection is dropped within the body.
    Truncate,
}

impl Default for Fault {
    fn default() -> Self {
        Self {
            method: None,
            path: "*".to_owned(),
            skip: 0,
            times: Some(1),
            acts: false,
            read: None,
            delay_ms: 0,
            status: None,
            headers: BTreeMap::new(),
            body: Value::Null,
            code: None,
            message: "A fault was asked for.".to_owned(),
            then: Then::Answer,
        }
    }
}

impl Fault {
    /// Whether the request is handled as ever, and only takes longer.
    pub(super) fn only_delays(&self) -> bool {
        self.then == Then::Answer && self.status.is_none() && self.code.is_none()
    }

    fn fits(&self, method: &str, path: &str) -> bool {
        self.method.as_deref().is_none_or(|it| it.eq_ignore_ascii_case(method))
            && glob(&self.path, path)
    }

    /// How the exchange ends, where it does not only take longer.
    pub(super) fn end(&self, request_id: &str) -> End {
        match self.then {
            Then::Answer => End::Answer(self.answer(request_id)),
            Then::Drop => End::Drop,
            Then::Hang => End::Hang,
            Then::Endless => End::Endless(self.answer(request_id)),
            Then::Truncate => End::Truncated(self.answer(request_id)),
        }
    }

    fn answer(&self, request_id: &str) -> Answer {
        let status = self.status.unwrap_or(if self.code.is_some() { 400 } else { 503 });
        let mut answer = match (&self.code, &self.body) {
            (Some(code), _) => {
                let body = serde_json::json!({ "error": {
                    "code": code,
                    "message": self.message,
                    "innerError": { "request-id": request_id, "client-request-id": request_id },
                }});
                Answer::json(status, &body)
            }
            (None, Value::Null) => Answer::empty(status),
            (None, Value::String(text)) => {
                Answer { body: text.clone().into_bytes().into(), ..Answer::empty(status) }
            }
            (None, json) => Answer::json(status, json),
        };
        answer.headers.retain(|(name, _)| {
            !self.headers.keys().any(|header| header.eq_ignore_ascii_case(name))
        });
        for (name, value) in &self.headers {
            answer = answer.with(name.to_ascii_lowercase(), value.clone());
        }
        answer
    }
}

/// `*` stands for any octets.
fn glob(pattern: &str, text: &str) -> bool {
    let mut words = pattern.split('*');
    let Some(mut rest) = words.next().and_then(|start| text.strip_prefix(start)) else {
        return false;
    };
    let words: Vec<&str> = words.collect();
    let Some((last, middle)) = words.split_last() else { return rest.is_empty() };
    for word in middle {
        let Some((_, after)) = rest.split_once(word) else { return false };
        rest = after;
    }
    rest.ends_with(last)
}

/// The faults that wait for their requests, in the order in which they were asked for.
#[derive(Debug, Default)]
pub(super) struct Faults(Mutex<Vec<Fault>>);

impl Faults {
    pub(super) fn add(&self, fault: Fault) {
        self.kept().push(fault);
    }

    pub(super) fn all(&self) -> Vec<Fault> {
        self.kept().clone()
    }

    pub(super) fn clear(&self) {
        self.kept().clear();
    }

    /// The fault for this request, counted.
    pub(super) fn take(&self, method: &str, path: &str) -> Option<Fault> {
        let mut kept = self.kept();
        for at in 0..kept.len() {
            let Some(fault) = kept.get_mut(at).filter(|fault| fault.fits(method, path)) else {
                continue;
            };
            if fault.skip > 0 {
                fault.skip -= 1;
                continue;
            }
            match &mut fault.times {
                None => return Some(fault.clone()),
                Some(0) => continue,
                Some(1) => return Some(kept.remove(at)),
                Some(times) => {
                    *times -= 1;
                    return Some(fault.clone());
                }
            }
        }
        None
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Fault>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_ask_for_their_faults() {
        let mut askers = Askers::default();
        for (address, _) in FAULTS {
            let address = format!("{address}example.com");
            assert!(askers.ask([address.as_str()].into_iter()).is_some(), "{address}");
        }
        for address in ["ann@x", "fail-@x", "fail-200@x", "fail-999@x", "slower@x", "sent-99@x"] {
            assert_eq!(askers.ask([address].into_iter()), None, "{address}");
        }
        for (mailbox, _) in MAILBOXES {
            assert!(of_mailbox(mailbox).is_some(), "{mailbox}");
        }
        assert_eq!(of_mailbox("me@example.com"), None);
    }

    #[test]
    fn a_counted_fault_ends_and_begins_again() {
        let mut askers = Askers::default();
        let mut asked = || askers.ask(["throttle-2@x"].into_iter()).is_some();
        let asked: Vec<bool> = (0..6).map(|_| asked()).collect();
        assert_eq!(asked, [true, true, false, true, true, false]);
    }

    #[test]
    fn a_star_in_a_pattern_stands_for_anything() {
        let check = |pattern, text, fits| assert_eq!(glob(pattern, text), fits, "{pattern} {text}");
        check("*", "/anything", true);
        check("/a", "/a", true);
        check("/a", "/ab", false);
        check("/v1.0/users/*/sendMail", "/v1.0/users/a@b/sendMail", true);
        check("/v1.0/users/*/sendMail", "/v1.0/users/a@b/messages", false);
        check("*/messages/*/send", "/v1.0/users/a/messages/1/send", true);
        check("*/messages/*/send", "/v1.0/users/a/messages", false);
    }

    #[test]
    fn a_fault_is_played_as_often_as_it_was_asked_for() {
        let faults = Faults::default();
        let fault = Fault { path: "/a".to_owned(), skip: 1, times: Some(2), ..Fault::default() };
        faults.add(Fault { method: Some("post".to_owned()), ..fault });
        let mut taken = Vec::new();
        for method in ["POST", "GET", "POST", "POST", "POST"] {
            taken.push(faults.take(method, "/a").is_some());
        }
        assert_eq!(taken, [false, false, true, true, false]);
        assert!(faults.all().is_empty());
    }
}
