//! What an answer to the question for a token means: pure.

use std::fmt;
use std::time::Duration;

use oauth2::basic::BasicTokenType;
use oauth2::{AccessToken, RefreshToken, TokenResponse};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::config::Secret;
use crate::envelope::UnixMillis;
use crate::outcome::{Cause, Scope, Stage};

/// How long nothing is asked for again: after a refusal that only a person ends, after trouble without a time, after a
/// connection that was not made.
const REFUSED: Duration = Duration::from_secs(60);
const TROUBLED: Duration = Duration::from_secs(5);
const UNREACHABLE: Duration = Duration::from_secs(1);
/// What is taken of a remote's wish to be left alone.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);
/// Of a tenant that asks too much, where no time is named.
const THROTTLED: Duration = Duration::from_secs(60);
/// The life of a token whose answer does not say.
const UNSAID: Duration = Duration::from_secs(600);
/// Longest token.
const MAX_TOKEN: usize = 32 * 1024;
/// A clock that is off by more is worth a word.
const SKEW: Duration = Duration::from_secs(60);
/// Longest id that is worth a place, in octets.
const MAX_ID: usize = 64;
/// Most of its words that are kept, in octets, so that the cure after them is never cut off.
const WORDS: usize = 1_200;
/// Most of a body that is shown where it is none of the documented ones, in octets.
const SHOWN: usize = 200;

/// The answer that grants a token (RFC 6749 5.1). Numbers may be written as strings, as some servers do.
#[derive(Deserialize, Serialize)]
pub(super) struct Reply {
    access_token: AccessToken,
    #[serde(default)]
    token_type: String,
    #[serde(default, deserialize_with = "seconds")]
    expires_in: Option<u64>,
    #[serde(default, deserialize_with = "seconds")]
    expires_on: Option<u64>,
    #[serde(default, deserialize_with = "seconds")]
    refresh_in: Option<u64>,
}

/// Digits, with or without quotes. Anything else says nothing.
fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    })
}

/// Without the token.
impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("expires_in", &self.expires_in).finish_non_exhaustive()
    }
}

impl TokenResponse for Reply {
    type TokenType = BasicTokenType;

    fn access_token(&self) -> &AccessToken {
        &self.access_token
    }

    fn token_type(&self) -> &BasicTokenType {
        &BasicTokenType::Bearer
    }

    fn expires_in(&self) -> Option<Duration> {
        self.expires_in.map(Duration::from_secs)
    }

    fn refresh_token(&self) -> Option<&RefreshToken> {
        None
    }

    fn scopes(&self) -> Option<&Vec<oauth2::Scope>> {
        None
    }
}

/// A token that can be used.
#[derive(Debug)]
pub(super) struct Granted {
    bearer: Secret,
    expires_in: Duration,
    refresh_in: Option<Duration>,
}

impl Granted {
    /// Err says why it is none.
    pub(super) fn read(reply: &Reply, now: UnixMillis) -> Result<Self, &'static str> {
        let bearer = reply.access_token.secret();
        if !reply.token_type.is_empty() && !reply.token_type.eq_ignore_ascii_case("Bearer") {
            return Err("it is of another type than Bearer");
        }
        if bearer.len() > MAX_TOKEN || !bearer.bytes().all(|b| b.is_ascii_graphic()) {
            return Err("it is too long, or has octets that no token has");
        }
        let left = |on: u64| UnixMillis(on.saturating_mul(1000)).since(now);
        let expires_in = reply.expires_in.map(Duration::from_secs);
        Ok(Self {
            bearer: Secret::new(bearer.to_owned()).map_err(|_empty| "it is empty")?,
            expires_in: expires_in.or(reply.expires_on.map(left)).unwrap_or(UNSAID),
            refresh_in: reply.refresh_in.map(Duration::from_secs),
        })
    }

    pub(super) fn bearer(&self) -> &str {
        self.bearer.as_str()
    }

    pub(super) fn into_bearer(self) -> Secret {
        self.bearer
    }

    pub(super) fn expires_in(&self) -> Duration {
        self.expires_in
    }

    pub(super) fn refresh_in(&self) -> Option<Duration> {
        self.refresh_in
    }
}

/// Why there is no token.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) cause: Cause,
    /// Nothing is asked for again for so long.
    pub(super) hold: Duration,
    /// The remote said no, rather than nothing that counts.
    pub(super) refused: bool,
    /// What else may be tried at once.
    pub(super) remedy: Remedy,
}

/// What may help at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    Nothing,
    /// The next secret.
    AnotherSecret,
    /// The certificate, as its file is now.
    ReadAgain,
}

impl Failure {
    /// For now: `words` say what happened to the question.
    pub(super) fn of(cause: Cause) -> Self {
        let hold = if cause.stage == Stage::Connect { UNREACHABLE } else { TROUBLED };
        Self { cause, hold, refused: false, remedy: Remedy::Nothing }
    }

    /// The remote cannot be reached.
    pub(super) fn unreachable(words: String) -> Self {
        Self::of(Cause::new(Scope::Provider, Stage::Connect, words))
    }

    /// It was, and no answer came that is one.
    pub(super) fn broken(words: String) -> Self {
        Self::of(Cause::new(Scope::Provider, Stage::Auth, words))
    }

    /// Nothing was asked, because of what an operator has to mend.
    pub(super) fn local(words: String) -> Self {
        Self { hold: TROUBLED, ..Self::broken(words) }
    }

    /// With more to do about it, which only whoever asked knows.
    pub(super) fn with_cure(self, cure: &str) -> Self {
        let cause = Cause { words: format!("{}; {cure}", self.cause.words).into(), ..self.cause };
        Self { cause, ..self }
    }

    pub(super) fn late(after: Duration) -> Self {
        Self::broken(format!("no token within {} s", after.as_secs()))
    }

    pub(super) fn stopped() -> Self {
        Self::broken("the fetch of a token was given up, because the gateway stops".to_owned())
    }
}

/// An answer that grants nothing.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: u16,
    /// As the header says, in which form ever.
    pub(super) retry_after: Option<Duration>,
    /// What the server takes the time to be.
    pub(super) date: Option<UnixMillis>,
    pub(super) body: Vec<u8>,
}

/// The fields that Microsoft Entra documents, as far as they are there and of their types.
#[derive(Debug, Default)]
struct Entra {
    error: String,
    description: String,
    codes: Vec<u64>,
    trace: String,
    correlation: String,
}

impl Entra {
    fn read(body: &[u8]) -> Option<Self> {
        let json: Value = serde_json::from_slice(body).ok()?;
        let text =
            |name: &str| json.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let codes = json.get("error_codes").and_then(Value::as_array);
        let mut entra = Self {
            error: text("error"),
            description: text("error_description"),
            codes: codes.into_iter().flatten().filter_map(Value::as_u64).take(10).collect(),
            trace: text("trace_id"),
            correlation: text("correlation_id"),
        };
        // The code of old answers stands only in the text.
        let named = entra.description.strip_prefix("AADSTS").and_then(|rest| {
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            rest.get(..end)?.parse().ok()
        });
        if let Some(named) = named
            && !entra.codes.contains(&named)
        {
            entra.codes.insert(0, named);
        }
        (!entra.error.is_empty() || !entra.description.is_empty()).then_some(entra)
    }

    /// Its exact words on one line, with both ids.
    fn words(&self) -> String {
        let mut words = match self.description.as_str() {
            "" => self.error.clone(),
            description => description.split_whitespace().collect::<Vec<_>>().join(" "),
        };
        words.truncate(words.floor_char_boundary(WORDS));
        for (name, id) in [("trace id", &self.trace), ("correlation id", &self.correlation)] {
            if !id.is_empty() && id.len() <= MAX_ID && !words.contains(id.as_str()) {
                words = format!("{words} ({name} {id})");
            }
        }
        words
    }
}

/// What a refusal means, by the code and then the `error` of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// It stays so until a person changes something.
    Operator,
    /// The same of the secret.
    Secret,
    /// The same of the certificate, whose file may have changed a moment ago.
    Certificate,
    /// It may pass.
    Transient,
    /// The tenant asks too much.
    Throttled,
}

/// What each code means and what to do about it, facts of Microsoft Entra.
fn of_code(code: u64) -> Option<(Class, &'static str)> {
    use Class::{Certificate, Operator, Secret, Throttled, Transient};
    Some(match code {
        7_000_215 => (
            Secret,
            "write the value of the client secret into provider.client_secret, not its id; if it is lost, make a new one in Entra (App registrations, Certificates & secrets)",
        ),
        7_000_222 => (
            Secret,
            "the client secret has expired: make a new one in Entra (App registrations, Certificates & secrets) and write it into provider.client_secret",
        ),
        7_000_218 => (Operator, "no credential arrived: please report this as a bug"),
        700_016 => (
            Operator,
            "the application is not in this tenant: are provider.client_id, provider.tenant_id and provider.cloud right?",
        ),
        7_000_112 => (
            Operator,
            "the application is disabled: enable it in Entra (Enterprise applications, Properties)",
        ),
        90_002 => {
            (Operator, "there is no such tenant: are provider.tenant_id and provider.cloud right?")
        }
        900_382 | 900_432 | 90_038 => {
            (Operator, "the tenant belongs to another national cloud: write it as provider.cloud")
        }
        9_001_023 => (Operator, "write the id or domain of one tenant as provider.tenant_id"),
        70_011 | 700_022 | 700_023 => (
            Operator,
            "are provider.cloud and provider.endpoints right? If so, please report this as a bug",
        ),
        500_011 => (
            Operator,
            "the tenant does not know the service that mail goes by: is provider.cloud right, and has an administrator consented to the application's permissions?",
        ),
        700_024 => (
            Certificate,
            "what was shown is outside of its time: see whether this system's clock is right, and with workload identity whether the token's file is fresh",
        ),
        700_027 | 7_000_214 | 1_000_502 | 7_000_274 | 7_000_277 => (
            Certificate,
            "upload the certificate of provider.certificate in Entra (App registrations, Certificates & secrets), or see whether it has expired",
        ),
        50_012 | 50_013 | 500_133 => (
            Operator,
            "see whether the certificate or federated credential of the application in Entra is the one that is used here, and this system's clock is right",
        ),
        70_021 | 700_211 | 700_212 | 700_213 => (
            Operator,
            "no federated credential of the application fits the token of the cluster: its issuer, subject (system:serviceaccount:NAMESPACE:NAME) and audience must be the same",
        ),
        53_003 | 530_032 => (
            Operator,
            "a policy of the tenant (Conditional Access) blocks the application: its administrator has to let it in",
        ),
        90_055 => (Throttled, "the tenant asks for too many tokens; it is tried again"),
        90_006 | 90_012 | 90_024 | 90_033 | 90_090 => {
            (Transient, "the service has trouble; it is tried again")
        }
        _ => return None,
    })
}

/// What is left to go by.
fn of_error(error: &str) -> Option<(Class, &'static str)> {
    Some(match error {
        "invalid_client" | "unauthorized_client" | "invalid_grant" => (
            Class::Operator,
            "see whether provider.client_id and its credential are right and the application may log in",
        ),
        "invalid_scope" | "invalid_resource" | "invalid_request" => (
            Class::Operator,
            "are provider.cloud, provider.endpoints and provider.tenant_id right?",
        ),
        "temporarily_unavailable" | "server_error" => {
            (Class::Transient, "the service has trouble; it is tried again")
        }
        _ => return None,
    })
}

/// The class of a refusal and what to do about it.
pub(super) fn judge(status: u16, error: &str, codes: &[u64]) -> (Class, &'static str) {
    let known = codes.iter().find_map(|code| of_code(*code)).or_else(|| of_error(error));
    known.unwrap_or(match status {
        429 => (Class::Throttled, "too many tokens are asked for; it is tried again"),
        408 | 500.. => (Class::Transient, "the service has trouble; it is tried again"),
        400..=499 => (
            Class::Operator,
            "see what Microsoft writes about this code (https://login.microsoftonline.com/error)",
        ),
        _ => (
            Class::Transient,
            "no server for tokens answers so: are provider.endpoints and the proxy right?",
        ),
    })
}

/// What a refusal means for all who wait. `secrets` never show, even where the remote repeats them.
pub(super) fn refused(refusal: &Refusal, now: UnixMillis, secrets: &[&str]) -> Failure {
    let entra = Entra::read(&refusal.body);
    let (error, codes) =
        entra.as_ref().map_or(("", &[][..]), |entra| (entra.error.as_str(), &entra.codes[..]));
    let (class, cure) = judge(refusal.status, error, codes);
    let words = match &entra {
        Some(entra) => entra.words(),
        None => {
            let body = refusal.body.get(..SHOWN).unwrap_or(&refusal.body).trim_ascii();
            let body = String::from_utf8_lossy(body);
            let text = if body.starts_with('<') { String::new() } else { format!(": {body}") };
            let text = if body.is_empty() { String::new() } else { text };
            format!("HTTP {}{text}", refusal.status)
        }
    };
    let repeats = |secret: &&str| !secret.is_empty() && words.contains(*secret);
    let words = match secrets.iter().any(repeats) {
        true => format!("HTTP {} (its words are not shown: a secret is in them)", refusal.status),
        false => words,
    };
    // The ids come before the cure, so that neither is lost where the words are cut.
    let cure = match off_by(refusal.date, now).filter(|_| class == Class::Certificate) {
        Some(off) => format!("{off}; {cure}"),
        None => cure.to_owned(),
    };
    let cause = Cause::new(Scope::Provider, Stage::Auth, format!("{words}; {cure}"));
    let named = refusal.retry_after.map(|wait| wait.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX));
    let hold = named.unwrap_or(match class {
        Class::Operator | Class::Secret | Class::Certificate => REFUSED,
        Class::Transient => TROUBLED,
        Class::Throttled => THROTTLED,
    });
    let retry_after = match class {
        Class::Throttled => Some(hold),
        Class::Operator | Class::Secret | Class::Certificate | Class::Transient => named,
    };
    Failure {
        cause: Cause { retry_after, ..cause },
        hold,
        refused: matches!(class, Class::Operator | Class::Secret | Class::Certificate),
        remedy: match class {
            Class::Secret => Remedy::AnotherSecret,
            Class::Certificate => Remedy::ReadAgain,
            // Whatever `invalid_client` is about, another secret may be right.
            Class::Operator if error == "invalid_client" => Remedy::AnotherSecret,
            Class::Operator | Class::Transient | Class::Throttled => Remedy::Nothing,
        },
    }
}

/// In words, how wrong this system's clock is, if the server's is right.
fn off_by(date: Option<UnixMillis>, now: UnixMillis) -> Option<String> {
    let date = date?;
    let (behind, ahead) = (date.since(now), now.since(date));
    let (off, way) = if behind > ahead { (behind, "behind") } else { (ahead, "ahead of") };
    (off > SKEW).then(|| {
        format!(
            "this system's clock is off: {} s {way} the server's, which may be the reason; set it",
            off.as_secs()
        )
    })
}

#[cfg(test)]
mod tests;
