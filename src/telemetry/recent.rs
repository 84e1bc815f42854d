//! The last events, in memory, for `mailsluice log`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Events that are kept.
pub const KEPT: usize = 1_000;
/// Octets of a line that are kept.
const LONGEST: usize = 16 * 1024;
/// Lines that a follower gets at once.
const AT_ONCE: usize = 100;

/// Whoever writes never waits for who reads: the oldest goes, and a follower that was too slow is told how many.
#[derive(Debug, Default)]
pub struct Recent {
    ring: Mutex<Ring>,
    more: Notify,
}

#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<Arc<[u8]>>,
    /// Lines that went before the first of these.
    gone: u64,
}

impl Recent {
    /// `line` is a JSON object and the end of its line.
    pub(super) fn push(&self, line: &[u8]) {
        if line.len() > LONGEST {
            return;
        }
        let line = Arc::from(line);
        let mut ring = self.ring();
        if ring.lines.len() == KEPT {
            ring.lines.pop_front();
            ring.gone += 1;
        }
        ring.lines.push_back(line);
        drop(ring);
        self.more.notify_waiters();
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins with the last `n` events.
    pub fn follow(recent: &Arc<Self>, n: usize) -> Follower {
        let ring = recent.ring();
        let next = ring.gone + ring.lines.len().saturating_sub(n) as u64;
        drop(ring);
        Follower { recent: Arc::clone(recent), next }
    }
}

/// One who reads.
#[derive(Debug)]
pub struct Follower {
    recent: Arc<Recent>,
    /// The number of the next line, counted from the start.
    next: u64,
}

impl Follower {
    /// Some of what is there, as lines; first of all how many were missed, if any were.
    pub fn take(&mut self) -> Vec<u8> {
        let ring = self.recent.ring();
        let mut taken = Vec::new();
        let missed = ring.gone.saturating_sub(self.next);
        if missed > 0 {
            let told = format!(
                "{{\"event\":\"missed\",\"missed\":{missed},\"message\":\"{missed} events were not read in time\"}}\n"
            );
            taken.extend_from_slice(told.as_bytes());
            self.next = ring.gone;
        }
        let skip = usize::try_from(self.next - ring.gone).unwrap_or(usize::MAX);
        for line in ring.lines.iter().skip(skip).take(AT_ONCE) {
            taken.extend_from_slice(line);
            self.next += 1;
        }
        taken
    }

    fn has_more(&self) -> bool {
        let ring = self.recent.ring();
        ring.gone + ring.lines.len() as u64 > self.next
    }

    /// Until there is something to take.
    pub async fn wait(&self) {
        let more = self.recent.more.notified();
        if !self.has_more() {
            more.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(follower: &mut Follower) -> String {
        String::from_utf8(follower.take()).unwrap()
    }

    #[test]
    fn a_follower_begins_with_the_last_ones_and_is_told_what_it_missed() {
        let recent = Arc::new(Recent::default());
        for n in 0..5 {
            recent.push(format!("{n}\n").as_bytes());
        }
        let mut follower = Recent::follow(&recent, 2);
        assert_eq!(text(&mut follower), "3\n4\n");
        assert_eq!(text(&mut follower), "");
        for n in 5..5 + KEPT + 7 {
            recent.push(format!("{n}\n").as_bytes());
        }
        let lines = text(&mut follower);
        let mut lines = lines.lines();
        let missed: serde_json::Value = serde_json::from_str(lines.next().unwrap()).unwrap();
        assert_eq!((&missed["event"], &missed["missed"]), (&"missed".into(), &7.into()));
        assert_eq!(lines.next(), Some("12"));
        assert_eq!(recent.ring().lines.len(), KEPT);
        recent.push(&vec![b'x'; LONGEST + 1]);
        assert_eq!(
            recent.ring().lines.back().unwrap().as_ref(),
            format!("{}\n", KEPT + 11).as_bytes()
        );
    }

    #[tokio::test]
    async fn a_follower_is_woken() {
        let recent = Arc::new(Recent::default());
        let follower = Recent::follow(&recent, 0);
        let push = async { recent.push(b"x\n") };
        tokio::join!(follower.wait(), push);
        follower.wait().await;
    }
}
