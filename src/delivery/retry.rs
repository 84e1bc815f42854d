//! When a deferred message is tried again, and when it is given up. Pure.

use std::time::Duration;

use crate::config::Retry;
use crate::envelope::UnixMillis;

/// How long to wait after the `attempts`-th deferral of a message's own (from 1): `first × factor^(attempts-1)`, at most
/// `max`, spread by `jitter`. `random` is uniform in 0..1.
pub fn delay(config: &Retry, attempts: u16, random: f64) -> Duration {
    let growth = config.factor.powi(i32::from(attempts.max(1)) - 1);
    let seconds = (config.first.as_secs_f64() * growth).min(config.max.as_secs_f64());
    spread(Duration::from_secs_f64(seconds), config.jitter, random)
}

/// Time alone expires nothing: this is asked only when a message's own attempt was just deferred (R45).
pub fn gives_up(config: &Retry, first_deferral: UnixMillis, now: UnixMillis) -> bool {
    now.since(first_deferral) > config.give_up_after
}

/// `delay` times something between `1 - jitter` and `1 + jitter`.
pub fn spread(delay: Duration, jitter: f64, random: f64) -> Duration {
    delay.mul_f64((1.0 + jitter * (2.0 * random - 1.0)).max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Retry {
        Retry {
            first: Duration::from_secs(60),
            factor: 2.0,
            max: Duration::from_secs(3600),
            jitter: 0.2,
            give_up_after: Duration::from_secs(5 * 86400),
        }
    }

    #[test]
    fn delays_double_up_to_the_maximum() {
        let seconds: Vec<u64> = (1..=9).map(|n| delay(&config(), n, 0.5).as_secs()).collect();
        assert_eq!(seconds, [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]);
        assert_eq!(delay(&config(), u16::MAX, 0.5).as_secs(), 3600);
        assert_eq!(delay(&config(), 0, 0.5).as_secs(), 60);
    }

    #[test]
    fn jitter_spreads_both_ways() {
        assert_eq!(delay(&config(), 1, 0.0).as_secs(), 48);
        assert_eq!(delay(&config(), 1, 1.0).as_secs(), 72);
        let none = Retry { jitter: 0.0, ..config() };
        assert_eq!(delay(&none, 1, 0.9).as_secs(), 60);
    }

    #[test]
    fn a_message_is_given_up_only_after_its_own_deferrals_span_the_limit() {
        let first = UnixMillis(1_000_000);
        assert!(!gives_up(&config(), first, first.plus(config().give_up_after)));
        assert!(gives_up(
            &config(),
            first,
            first.plus(config().give_up_after + Duration::from_millis(1))
        ));
        assert!(
            !gives_up(&config(), first, UnixMillis(0)),
            "a clock that stepped back gives nothing up"
        );
    }
}
