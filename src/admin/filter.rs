//! Which messages of the queue are meant. Pure.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::delivery::operator::Look;
use crate::envelope::{Envelope, Head, Progress, QueueState, RcptStatus, UnixMillis};

/// Where a message stands. `Queued` is any of `Due`, `Deferred` and `InFlight`; one that may have been taken is `InDoubt`
/// whatever else it is.
// No doc comments on the variants: the help of the commands would spread over the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Queued,
    Due,
    Deferred,
    #[serde(alias = "in-flight")]
    #[value(alias = "in_flight")]
    InFlight,
    #[serde(alias = "in-doubt")]
    #[value(alias = "in_doubt")]
    InDoubt,
    Held,
    Failed,
}

impl State {
    /// Of a message; never `Queued` or `InDoubt`.
    pub fn of(head: &Head, look: &Look, now: UnixMillis) -> Self {
        match head.state {
            QueueState::Failed => Self::Failed,
            QueueState::Held => Self::Held,
            QueueState::Queued if look.unreadable.binary_search(&head.id).is_ok() => Self::Held,
            QueueState::Queued if look.in_flight.binary_search(&head.id).is_ok() => Self::InFlight,
            QueueState::Queued if head.due > now => Self::Deferred,
            QueueState::Queued => Self::Due,
        }
    }

    fn covers(self, state: Self) -> bool {
        match self {
            Self::Queued => matches!(state, Self::Due | Self::Deferred | Self::InFlight),
            // Told by the progress.
            Self::InDoubt => true,
            Self::Due | Self::Deferred | Self::InFlight | Self::Held | Self::Failed => {
                self == state
            }
        }
    }
}

/// Which messages; all of what is said must hold.
// The commands' arguments too: what is said of each field is their help.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Filter {
    /// Only messages in this state; `queued` is any of due, deferred and in-flight
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
    /// Only those of this lane (the account that the remote counts); `*` stands for anything, here and below
    #[arg(long, value_name = "PATTERN")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lane: Option<String>,
    /// Only those with this sender (reverse path); `<>` is the empty one
    #[arg(long, value_name = "PATTERN")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sender: Option<String>,
    /// Only those with such a recipient that is not delivered to
    #[arg(long, value_name = "PATTERN")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipient: Option<String>,
    /// Only those accepted so long ago: 90s, 5m, 2h, 3d
    #[arg(long, value_name = "AGE", value_parser = Age::parse)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub older_than: Option<Age>,
}

impl Filter {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a pattern is empty. It fits nothing but a reverse path that is, which is written `<>`: more likely a
    /// variable of a script was not set.
    pub fn has_empty_pattern(&self) -> bool {
        [&self.lane, &self.sender, &self.recipient].iter().any(|it| it.as_deref() == Some(""))
    }

    /// Whether a head alone does not say it.
    pub fn needs_envelope(&self) -> bool {
        self.state == Some(State::InDoubt) || self.sender.is_some() || self.recipient.is_some()
    }

    pub fn takes_head(&self, head: &Head, state: State, lane: &str, now: UnixMillis) -> bool {
        self.state.is_none_or(|wanted| wanted.covers(state))
            && self.lane.as_deref().is_none_or(|pattern| matches(pattern, lane))
            && self.older_than.is_none_or(|age| now.since(head.id.accepted()) >= age.0)
    }

    /// Of a message whose head it takes.
    pub fn takes_envelope(&self, envelope: &Envelope, progress: &Progress, in_doubt: bool) -> bool {
        let sender = envelope.reverse_path.as_str();
        let is_open = |status: &RcptStatus| !matches!(status, RcptStatus::Delivered(_));
        let mut open = envelope.rcpts.iter().zip(&progress.rcpts);
        (self.state != Some(State::InDoubt) || in_doubt)
            && self.sender.as_deref().is_none_or(|pattern| match pattern {
                "<>" => sender.is_empty(),
                pattern => matches(pattern, sender),
            })
            && self.recipient.as_deref().is_none_or(|pattern| {
                open.any(|(rcpt, status)| is_open(status) && matches(pattern, rcpt.path.as_str()))
            })
    }
}

/// A length of time as people write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Age(pub Duration);

impl Age {
    /// The error says how it is written.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        Self::from_words(text).ok_or("a length of time is written like 90s, 5m, 2h or 3d")
    }

    fn from_words(text: &str) -> Option<Self> {
        let split = text.find(|c: char| !c.is_ascii_digit())?;
        let (number, unit) = text.split_at(split);
        let seconds = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => return None,
        };
        let number: u64 = number.parse().ok()?;
        number.checked_mul(seconds).map(|seconds| Self(Duration::from_secs(seconds)))
    }
}

impl Serialize for Age {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}s", self.0.as_secs()))
    }
}

impl<'de> Deserialize<'de> for Age {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// Whether the whole of `text` is what `pattern` says: `*` stands for any run of characters, and ASCII letters are the
/// same in both cases.
pub fn matches(pattern: &str, text: &str) -> bool {
    let (mut pattern, mut text) = (pattern.as_bytes(), text.as_bytes());
    // Where to go on when what follows the last star does not fit: it takes one octet more.
    let mut back: Option<(&[u8], &[u8])> = None;
    loop {
        match (pattern.split_first(), text.split_first()) {
            (Some((b'*', rest)), _) => {
                back = Some((rest, text));
                pattern = rest;
                continue;
            }
            (Some((p, p_rest)), Some((t, t_rest))) if p.eq_ignore_ascii_case(t) => {
                (pattern, text) = (p_rest, t_rest);
                continue;
            }
            (None, None) => return true,
            (Some(_) | None, _) => {}
        }
        let Some((after_star, from)) = back else { return false };
        let Some((_, from)) = from.split_first() else { return false };
        back = Some((after_star, from));
        (pattern, text) = (after_star, from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::SpoolId;

    fn head(state: QueueState, due: u64) -> Head {
        let id = SpoolId::new(UnixMillis(1_000_000));
        Head { id, state, due: UnixMillis(due), size: 1, pending: 1, attempts: 0, in_doubt: false }
    }

    #[test]
    fn patterns_match_the_whole_text_in_either_case() {
        for (pattern, text, expected) in [
            ("a@example.com", "A@Example.COM", true),
            ("a@example.com", "a@example.com.evil", false),
            ("*@example.com", "x.y@example.com", true),
            ("*@example.com", "@example.com", true),
            ("*@example.com", "x@example.org", false),
            ("*", "", true),
            ("", "", true),
            ("", "x", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("*aab", "aaaab", true),
            ("ü*", "üx", true),
            ("**x", "x", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
        let long = "a".repeat(5_000);
        assert!(!matches("*a*a*a*a*b", &long));
    }

    #[test]
    fn ages_are_written_as_people_do() {
        for (text, seconds) in [("90s", Some(90)), ("5m", Some(300)), ("2h", Some(7200))]
            .into_iter()
            .chain([("3d", Some(259_200)), ("", None), ("5", None), ("h", None), ("1w", None)])
            .chain([("-1h", None), ("999999999999999999d", None), ("1hé", None)])
        {
            assert_eq!(Age::parse(text).map(|age| age.0.as_secs()).ok(), seconds, "{text}");
        }
    }

    #[test]
    fn a_state_is_written_either_way() {
        use clap::ValueEnum as _;
        for (text, state) in [
            ("in_flight", State::InFlight),
            ("in-flight", State::InFlight),
            ("in_doubt", State::InDoubt),
            ("in-doubt", State::InDoubt),
            ("held", State::Held),
        ] {
            assert_eq!(State::from_str(text, false), Ok(state));
            assert_eq!(serde_json::from_value::<State>(text.into()).unwrap(), state);
        }
    }

    #[test]
    fn states_are_told_by_head_and_what_is_under_way() {
        let now = UnixMillis(2_000_000);
        let (due, later) = (head(QueueState::Queued, 5), head(QueueState::Queued, 3_000_000));
        let look = Look { in_flight: vec![later.id], ..Look::default() };
        let check = |head: &Head, look: &Look, expected| {
            assert_eq!(State::of(head, look, now), expected);
        };
        check(&due, &Look::default(), State::Due);
        check(&later, &Look::default(), State::Deferred);
        check(&later, &look, State::InFlight);
        check(&head(QueueState::Held, 5), &Look::default(), State::Held);
        check(&head(QueueState::Failed, 5), &Look::default(), State::Failed);
        let look = Look { unreadable: vec![due.id], ..Look::default() };
        check(&due, &look, State::Held);
        let takes = |filter: &Filter, state| filter.takes_head(&due, state, "lane", now);
        let queued = Filter { state: Some(State::Queued), ..Filter::default() };
        assert!(
            [State::Due, State::Deferred, State::InFlight].iter().all(|it| takes(&queued, *it))
        );
        assert!(!takes(&queued, State::Held) && !takes(&queued, State::Failed));
        let old =
            |secs| Filter { older_than: Some(Age(Duration::from_secs(secs))), ..Filter::default() };
        assert!(takes(&old(1_000), State::Due) && !takes(&old(1_001), State::Due));
        let lane = |lane: &str| Filter { lane: Some(lane.to_owned()), ..Filter::default() };
        assert!(takes(&lane("LA*"), State::Due) && !takes(&lane("x"), State::Due));
    }
}
