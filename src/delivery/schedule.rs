//! What is waiting, in the order in which it is due. Pure.
//!
//! There is one lane: the account of the upstream.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::envelope::{Head, SpoolId};

/// Queued messages that are not being sent. Every operation is O(log n).
#[derive(Debug, Default)]
pub struct Schedule {
    waiting: BTreeMap<(Instant, SpoolId), Head>,
}

impl Schedule {
    pub fn new() -> Self {
        Self::default()
    }

    /// `head` may be tried from `at` on. Messages due at the same time go in the order of acceptance.
    pub fn push(&mut self, head: Head, at: Instant) {
        self.waiting.insert((at, head.id), head);
    }

    /// Takes the message that has been due longest.
    pub fn pop(&mut self, now: Instant) -> Option<Head> {
        let first = self.waiting.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    /// When the next message is due; it may be past.
    pub fn next_at(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|((at, _), _)| *at)
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::envelope::{QueueState, UnixMillis};

    fn head(id: u128) -> Head {
        Head {
            id: SpoolId::from_u128(id),
            state: QueueState::Queued,
            due: UnixMillis(0),
            size: 1,
            pending: 1,
            attempts: 0,
        }
    }

    #[test]
    fn what_is_due_longest_goes_first_and_nothing_goes_early() {
        let now = crate::clock::now();
        let later = now + Duration::from_secs(1);
        let mut schedule = Schedule::new();
        for (id, at) in [(3, later), (2, now), (1, now), (4, now - Duration::from_secs(1))] {
            schedule.push(head(id), at);
        }
        let mut popped = Vec::new();
        while let Some(head) = schedule.pop(now) {
            popped.push(head.id.as_u128());
        }
        assert_eq!(popped, [4, 1, 2]);
        assert_eq!(schedule.next_at(), Some(later));
        assert_eq!(schedule.pop(later).map(|head| head.id.as_u128()), Some(3));
        assert!(schedule.is_empty());
    }
}
