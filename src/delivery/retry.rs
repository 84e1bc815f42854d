//! When a deferred message is tried again, and when it is given up. Pure.
//!
//! Giving up (and, for a shorter span, the warning of a delay) asks two witnesses, and both must say that the message's own deferrals span `give_up_after`. The clock on
//! the wall may step, or have stood in the past when the first deferral was stored; so the waits between its attempts
//! must have come to as much (R73). Each of them was waited for by a clock that does not step, and a restart can cut
//! short one at most: it tries at once what is due by the wall. Time in which the message waited for something else (an
//! outage, its turn) is no wait of its own, so it may take longer than `give_up_after`, never less. The waits alone would
//! not do either: they are reckoned by the configuration of today.

use std::time::Duration;

use crate::config::Retry;
use crate::envelope::UnixMillis;

/// How long to wait after the `attempts`-th deferral of a message's own (from 1): `first × factor^(attempts-1)`, at most
/// `max`, spread by `jitter`. `random` is uniform in 0..1.
pub fn delay(config: &Retry, attempts: u16, random: f64) -> Duration {
    spread(nominal(config, attempts), config.jitter, random)
}

fn nominal(config: &Retry, attempts: u16) -> Duration {
    let growth = config.factor.powi(i32::from(attempts.max(1)) - 1);
    let seconds = (config.first.as_secs_f64() * growth).min(config.max.as_secs_f64());
    Duration::from_secs_f64(seconds)
}

/// The longest that a message ever waits on its own account, jitter aside.
pub fn longest(config: &Retry) -> Duration {
    config.max.max(config.in_doubt_after)
}

/// Whether a message is given up that has been deferred for its own reason `attempts` times before, since
/// `first_deferral`. Time alone expires nothing: this is asked only when it just was once more (R45).
pub fn gives_up(
    config: &Retry,
    attempts: u16,
    first_deferral: UnixMillis,
    now: UnixMillis,
) -> bool {
    span_fills(config, config.give_up_after, attempts, first_deferral, now)
}

/// Whether the deferrals of a message's own span more than `length`, by both witnesses.
pub fn span_fills(
    config: &Retry,
    length: Duration,
    attempts: u16,
    first_deferral: UnixMillis,
    now: UnixMillis,
) -> bool {
    now.since(first_deferral) > length && waits_fill(config, length, attempts)
}

/// Whether the waits after `attempts` deferrals come to `length`, or are more than can be counted.
fn waits_fill(config: &Retry, length: Duration, attempts: u16) -> bool {
    let mut left = length;
    for attempt in 1..=attempts {
        left = left.saturating_sub(nominal(config, attempt));
        if left.is_zero() {
            return true;
        }
    }
    left.is_zero() || attempts == u16::MAX
}

/// `delay` times something between `1 - jitter` and `1 + jitter`.
pub fn spread(delay: Duration, jitter: f64, random: f64) -> Duration {
    delay.mul_f64((1.0 + jitter * (2.0 * random - 1.0)).max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::InDoubt;

    fn config() -> Retry {
        Retry {
            first: Duration::from_secs(60),
            factor: 2.0,
            max: Duration::from_secs(3600),
            jitter: 0.2,
            give_up_after: Duration::from_secs(5 * 86400),
            in_doubt: InDoubt::Retry,
            in_doubt_after: Duration::from_secs(600),
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
        let gives_up = |after: Duration| gives_up(&config(), u16::MAX, first, first.plus(after));
        assert!(!gives_up(config().give_up_after));
        assert!(gives_up(config().give_up_after + Duration::from_millis(1)));
    }

    #[test]
    fn a_clock_that_steps_gives_nothing_up() {
        let first = UnixMillis(1_000_000_000_000);
        assert!(!gives_up(&config(), u16::MAX, first, UnixMillis(0)), "back");
        let ahead = first.plus(Duration::from_secs(10 * 86400));
        // 63 minutes until the waits have grown to an hour, and 119 hours more.
        for (attempts, is_over) in [(0, false), (1, false), (124, false), (125, true)] {
            assert_eq!(gives_up(&config(), attempts, first, ahead), is_over, "{attempts} waits");
        }
    }

    #[test]
    fn more_waits_than_can_be_counted_are_enough() {
        let second = Duration::from_secs(1);
        let short = Retry { first: second, max: second, ..config() };
        let ahead = UnixMillis(0).plus(Duration::from_secs(10 * 86400));
        assert!(!gives_up(&short, u16::MAX - 1, UnixMillis(0), ahead));
        assert!(gives_up(&short, u16::MAX, UnixMillis(0), ahead));
    }
}
