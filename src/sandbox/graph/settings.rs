//! How the simulated service is set up: who may log in, which mailboxes there are, which limits hold.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The tenant, client and secret of the app that is there from the start.
pub const TENANT: &str = "5a4db0c5-0000-4000-8000-000000000001";
pub const CLIENT: &str = "5a4db0c5-0000-4000-8000-000000000002";
pub const SECRET: &str = "sandbox~secret+with/odd&characters";

/// Everything about the service that can be set; `GET /api/v1/settings` shows it, `PATCH` changes the keys it names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    pub apps: Vec<App>,
    /// Seconds that a token lasts.
    pub token_lifetime: u64,
    /// Seconds after which the answer asks for another, where it says so.
    pub refresh_in: Option<u64>,
    /// Octets of a request's body; beyond it 413.
    pub request_size: usize,
    /// Octets of a message with its attachments, as a tenant sets it.
    pub message_size: u64,
    /// To, Cc and Bcc together.
    pub recipients: usize,
    /// Those that exist; without a list, every one whose local part asks for no fault.
    pub mailboxes: Option<Vec<String>>,
    /// Pairs of a mailbox and an address that it may send as; `"*"` is any.
    pub send_as: Vec<(String, String)>,
    /// Milliseconds until a message is found by `$filter`.
    pub index_lag_ms: u64,
    /// Milliseconds that `slow@` takes.
    pub slow_ms: u64,
    /// Octets of attachments in drafts and of mail in the inbox that are kept.
    pub keep: usize,
    pub limits: Limits,
}

/// An application registered in a tenant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct App {
    pub tenant: String,
    /// Domains of the tenant's mailboxes and another name of the tenant; empty: all.
    pub domains: Vec<String>,
    pub client_id: String,
    pub secrets: Vec<String>,
    pub expired_secrets: Vec<String>,
    /// PEM, of RSA keys.
    pub certificates: Vec<String>,
    /// Tokens of another issuer that are taken for a login (workload identity).
    pub federated: Vec<String>,
    /// Whether the instance metadata service answers for it.
    pub managed_identity: bool,
    /// Rights that its tokens show.
    pub roles: Vec<String>,
    /// Rights that no token shows (RBAC for Applications).
    pub hidden_roles: Vec<String>,
    /// The only mailboxes it may touch, where an access policy says so.
    pub only: Option<Vec<String>>,
    pub enabled: bool,
}

/// What a mailbox may do within a window. `None` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Requests at once of one app to one mailbox.
    pub concurrency: Option<usize>,
    pub requests: Option<Rate>,
    /// Octets of bodies.
    pub upload: Option<Rate>,
    pub messages: Option<Rate>,
    pub recipients: Option<Rate>,
}

/// So many per window, written as in the configuration: `"30/1m"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub amount: u64,
    pub per: Duration,
}

impl Limits {
    /// All that the documents name.
    pub const DOCUMENTED: Self = Self {
        concurrency: Some(4),
        requests: Some(Rate { amount: 10_000, per: Duration::from_secs(600) }),
        upload: Some(Rate { amount: 150_000_000, per: Duration::from_secs(300) }),
        messages: Some(Rate { amount: 30, per: Duration::from_secs(60) }),
        recipients: Some(Rate { amount: 10_000, per: Duration::from_secs(86_400) }),
    };

    pub const NONE: Self =
        Self { concurrency: None, requests: None, upload: None, messages: None, recipients: None };
}

impl Default for Limits {
    /// The gateway has no budgets yet: only what is at once is limited.
    fn default() -> Self {
        Self { concurrency: Some(4), ..Self::NONE }
    }
}

impl Default for App {
    fn default() -> Self {
        Self {
            tenant: TENANT.to_owned(),
            domains: Vec::new(),
            client_id: CLIENT.to_owned(),
            secrets: vec![SECRET.to_owned()],
            expired_secrets: vec!["expired-secret".to_owned()],
            certificates: Vec::new(),
            federated: Vec::new(),
            managed_identity: false,
            roles: vec!["Mail.Send".to_owned(), "Mail.ReadWrite".to_owned()],
            hidden_roles: Vec::new(),
            only: None,
            enabled: true,
        }
    }
}

impl App {
    /// Whether it has this right, shown by its tokens or not.
    pub(super) fn may(&self, right: &str) -> bool {
        let mut rights = self.roles.iter().chain(&self.hidden_roles);
        rights.any(|role| role == right)
    }

    pub(super) fn is_in(&self, tenant: &str) -> bool {
        self.tenant.eq_ignore_ascii_case(tenant)
            || self.domains.iter().any(|domain| domain.eq_ignore_ascii_case(tenant))
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            apps: vec![App::default()],
            token_lifetime: 3_599,
            refresh_in: None,
            request_size: 4_000_000,
            message_size: 35 * 1024 * 1024,
            recipients: 500,
            mailboxes: None,
            send_as: Vec::new(),
            index_lag_ms: 0,
            slow_ms: 3_000,
            keep: 256 * 1024 * 1024,
            limits: Limits::default(),
        }
    }
}

impl Settings {
    /// With one key changed, as a command line writes it: `limits.messages` and `3/10s`. The value is JSON, else a text.
    pub fn with(&self, key: &str, value: &str) -> Result<Self, serde_json::Error> {
        let value = serde_json::from_str(value).unwrap_or_else(|_text| value.into());
        let change = key.rsplit('.').fold(value, |inner, name| serde_json::json!({ name: inner }));
        self.patched(&change)
    }

    /// Takes the keys that `change` names; of a table, the keys in it.
    pub(super) fn patched(&self, change: &serde_json::Value) -> Result<Self, serde_json::Error> {
        fn merge(into: &mut serde_json::Value, change: &serde_json::Value) {
            match (into, change) {
                (serde_json::Value::Object(into), serde_json::Value::Object(change)) => {
                    for (key, value) in change {
                        merge(into.entry(key).or_insert(serde_json::Value::Null), value);
                    }
                }
                (into, change) => *into = change.clone(),
            }
        }
        let mut all = serde_json::to_value(self)?;
        merge(&mut all, change);
        serde_json::from_value(all)
    }
}

impl Rate {
    /// Reads `AMOUNT/WINDOW`; the amount may have a unit of octets (`MB`, `kB`), the window one of `ms s m h d`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no rate such as \"30/1m\" or \"150MB/5m\"");
        let (amount, window) = text.split_once('/').ok_or_else(wrong)?;
        let number = |text: &str, units: &[(&str, u64)]| {
            let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
            let unit = text.strip_prefix(digits)?;
            let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
            digits.parse::<u64>().ok()?.checked_mul(*factor).filter(|number| *number > 0)
        };
        let amount = number(amount, &[("", 1), ("kB", 1_000), ("MB", 1_000_000)]);
        let units = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
        let per = number(window, &units).map(Duration::from_millis);
        Ok(Self { amount: amount.ok_or_else(wrong)?, per: per.ok_or_else(wrong)? })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}ms", self.amount, self.per.as_millis())
    }
}

impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_and_written() {
        let rate = |text| Rate::parse(text).map(|rate| (rate.amount, rate.per.as_millis()));
        assert_eq!(rate("30/1m"), Ok((30, 60_000)));
        assert_eq!(rate("150MB/5m"), Ok((150_000_000, 300_000)));
        assert_eq!(rate("3/250ms"), Ok((3, 250)));
        for wrong in
            ["", "30", "0/1m", "30/0s", "30/1y", "x/1m", "-1/1m", "99999999999999999999/1m"]
        {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
        let all = serde_json::to_value(Limits::DOCUMENTED).unwrap();
        assert_eq!(serde_json::from_value::<Limits>(all).unwrap(), Limits::DOCUMENTED);
    }

    #[test]
    fn a_change_names_some_keys_and_leaves_the_others() {
        let before = Settings::default();
        let change = serde_json::json!({ "token_lifetime": 5, "limits": { "messages": "2/1s" } });
        let after = before.patched(&change).unwrap();
        assert_eq!(after.token_lifetime, 5);
        assert_eq!(after.limits.concurrency, Some(4));
        assert_eq!(after.limits.messages, Some(Rate::parse("2/1s").unwrap()));
        assert_eq!(after.apps, before.apps);
        assert_eq!(before.with("token_lifetime", "5").unwrap().token_lifetime, 5);
        let limits = before.with("limits.messages", "2/1s").unwrap().limits;
        assert_eq!(limits, after.limits);
        assert_eq!(before.with("limits.concurrency", "null").unwrap().limits.concurrency, None);
        assert!(before.with("limits.message", "2/1s").is_err());
        assert!(before.patched(&serde_json::json!({ "tokenlifetime": 5 })).is_err());
        assert!(before.patched(&serde_json::json!({ "limits": { "messages": "2" } })).is_err());
    }
}
