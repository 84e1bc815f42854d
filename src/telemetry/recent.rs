//! The last events, in memory, for `mailsluice log`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::Notify;

/// Events that are kept.
pub const KEPT: usize = 1_000;
/// Octets of a line that are kept.
const LONGEST: usize = 16 * 1024;
/// Octets that are kept of a text in a line that is longer than that.
const TEXT: usize = 1_000;
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
        let line = match line.len() > LONGEST {
            true => shortened(line).unwrap_or_else(left_out).into(),
            false => Arc::from(line),
        };
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

/// An event with its texts cut: a remote may say very much.
fn shortened(line: &[u8]) -> Option<Vec<u8>> {
    let mut event: serde_json::Map<String, Value> = serde_json::from_slice(line).ok()?;
    for value in event.values_mut() {
        if let Value::String(text) = value
            && text.len() > TEXT
        {
            text.truncate(text.floor_char_boundary(TEXT));
            text.push_str("...");
        }
    }
    let mut line = serde_json::to_vec(&event).ok()?;
    line.push(b'\n');
    (line.len() <= LONGEST).then_some(line)
}

/// What stands for an event that cannot be cut.
fn left_out() -> Vec<u8> {
    missed(1, "1 event was too long to be kept")
}

fn missed(n: u64, message: &str) -> Vec<u8> {
    format!("{{\"event\":\"missed\",\"missed\":{n},\"message\":\"{message}\"}}\n").into_bytes()
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
        let gone = ring.gone.saturating_sub(self.next);
        if gone > 0 {
            let words = format!("{gone} events were not read in time");
            taken.extend(missed(gone, &words));
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
        let missed: Value = serde_json::from_str(lines.next().unwrap()).unwrap();
        assert_eq!((&missed["event"], &missed["missed"]), (&"missed".into(), &7.into()));
        assert_eq!(lines.next(), Some("12"));
        assert_eq!(recent.ring().lines.len(), KEPT);
    }

    /// It was left out without a word.
    #[test]
    fn an_event_that_is_very_long_is_cut_and_one_that_cannot_be_is_missed() {
        let recent = Arc::new(Recent::default());
        let words = format!("550 {}", "ü".repeat(LONGEST));
        let line = serde_json::json!({ "event": "failed", "words": words, "size": 7 });
        recent.push(format!("{line}\n").as_bytes());
        recent.push(&vec![b'x'; LONGEST + 1]);
        let kept = text(&mut Recent::follow(&recent, KEPT));
        let kept: Vec<Value> =
            kept.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((&kept[0]["event"], &kept[0]["size"]), (&"failed".into(), &7.into()));
        let cut = kept[0]["words"].as_str().unwrap();
        assert_eq!(cut, format!("550 {}...", "ü".repeat(TEXT / 2 - 2)));
        assert_eq!((&kept[1]["event"], &kept[1]["missed"]), (&"missed".into(), &1.into()));
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
