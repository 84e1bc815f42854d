//! What the tests stand on: the gateway as a child process, a scripted upstream, a client that says exactly what it is
//! told, and waiting for observable facts.

use std::time::{Duration, Instant};

pub mod authority;
pub mod client;
pub mod cloud;
pub mod dialog;
pub mod gateway;
pub mod peers;
pub mod sink;

/// Long enough for a slow machine; a test that passes never waits for it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Whether the long forms of the tests are asked for.
pub fn is_slow() -> bool {
    std::env::var_os("SLOW_TESTS").is_some()
}

/// Asks until there is an answer, or fails after [`PATIENCE`] naming what it waited for.
#[track_caller]
pub fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(began.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain for {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}
