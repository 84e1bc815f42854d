//! The one place that reads time. What is pure takes `now` as an argument.

use std::fmt;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::envelope::UnixMillis;

/// For waiting: never steps. It is the clock of tokio's timers, which is the system's but where a test has paused it.
#[expect(clippy::disallowed_methods, reason = "this is the place that reads time")]
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// For what is stored and shown: may step, either way.
#[cfg(not(test))]
pub fn wall() -> UnixMillis {
    system()
}

/// The same, going on as [`now`] does, so that a test which lets days pass sees them in both.
#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "this is the place that reads time")]
pub fn wall() -> UnixMillis {
    static ORIGIN: std::sync::LazyLock<(Instant, UnixMillis)> =
        std::sync::LazyLock::new(|| (Instant::now(), system()));
    let (began, then) = *ORIGIN;
    then.plus(now().saturating_duration_since(began))
}

#[expect(clippy::disallowed_methods, reason = "this is the place that reads time")]
fn system() -> UnixMillis {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
}

/// A time of day in UTC (RFC 3339), to the second.
#[derive(Clone, Copy, Debug)]
pub struct Time(pub UnixMillis);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.0 / 1000;
        let (year, month, day) = date(seconds / 86_400);
        let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

/// Year, month and day in the Gregorian calendar. Counted in eras of 400 years from March of the year 0, so that the day
/// of a leap year is the last of its year.
fn date(days_since_1970: u64) -> (u64, u64, u64) {
    let days = days_since_1970 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_shown_in_utc() {
        let check = |millis, expected| assert_eq!(Time(UnixMillis(millis)).to_string(), expected);
        check(0, "1970-01-01T00:00:00Z");
        check(951_782_399_999, "2000-02-28T23:59:59Z");
        check(951_782_400_000, "2000-02-29T00:00:00Z");
        check(951_868_800_000, "2000-03-01T00:00:00Z");
        check(1_795_502_531_000, "2026-11-24T06:42:11Z");
        check(4_107_542_400_000, "2100-03-01T00:00:00Z");
    }
}
