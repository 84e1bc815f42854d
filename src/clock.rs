//! The one place that reads time. What is pure takes `now` as an argument.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::envelope::UnixMillis;

/// For waiting: never steps.
#[expect(clippy::disallowed_methods, reason = "this is the place that reads time")]
pub fn now() -> Instant {
    Instant::now()
}

/// For what is stored and shown: may step, either way.
#[expect(clippy::disallowed_methods, reason = "this is the place that reads time")]
pub fn wall() -> UnixMillis {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
}
