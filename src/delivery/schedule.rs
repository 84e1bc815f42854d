//! What is waiting, in the order in which it is due. Pure.
//!
//! There is one lane: the account of the upstream.

use std::time::{Duration, Instant};

use crate::envelope::SpoolId;
use crate::ordered::OrderedMap;

/// Queued messages that are not being sent, by id: 24 octets each. What else is known of them the spool knows. Every
/// operation is O(log n).
#[derive(Debug)]
pub struct Schedule {
    began: Instant,
    /// By microseconds since `began`, then id, as octets so that no room is lost to alignment.
    waiting: OrderedMap<(u64, [u8; 16]), ()>,
}

impl Schedule {
    /// `now` may be any time that is not later than what is asked.
    pub fn new(now: Instant) -> Self {
        Self { began: now, waiting: OrderedMap::new() }
    }

    /// The message may be tried from `at` on. Those due at the same time go in the order of acceptance.
    pub fn push(&mut self, id: SpoolId, at: Instant) {
        // Never early.
        let since = at.saturating_duration_since(self.began).as_nanos().div_ceil(1_000);
        let since = u64::try_from(since).unwrap_or(u64::MAX);
        self.waiting.insert((since, id.as_u128().to_be_bytes()), ());
    }

    /// Takes the message that has been due longest.
    pub fn pop(&mut self, now: Instant) -> Option<SpoolId> {
        if self.next_at()? > now {
            return None;
        }
        let ((_, id), ()) = self.waiting.pop_first()?;
        Some(SpoolId::from_u128(u128::from_be_bytes(id)))
    }

    /// When the next message is due; it may be past.
    pub fn next_at(&self) -> Option<Instant> {
        let ((since, _), ()) = self.waiting.first()?;
        Some(self.began + Duration::from_micros(*since))
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
    use super::*;

    fn id(n: u128) -> SpoolId {
        SpoolId::from_u128(n)
    }

    /// Its entry and the room around it. With what the index of the spool keeps of a message that is less than 100
    /// octets.
    #[test]
    fn a_waiting_message_takes_less_than_28_octets_of_the_schedule() {
        let now = crate::clock::now();
        let mut schedule = Schedule::new(now);
        for (n, at) in crate::ordered::nearly_in_order().into_iter().zip(0..) {
            schedule.push(id(n.into()), now + Duration::from_micros(at));
        }
        assert_eq!(schedule.len(), 100_000);
        let octets = schedule.waiting.octets();
        assert!(octets < 28 * schedule.len(), "{octets} for {}", schedule.len());
        // As a start finds them: in the order of their ids, due at any time.
        let mut schedule = Schedule::new(now);
        for n in crate::ordered::nearly_in_order() {
            schedule.push(id(schedule.len() as u128), now + Duration::from_micros(n.into()));
        }
        let octets = schedule.waiting.octets();
        assert!(octets < 28 * schedule.len(), "{octets} for {}", schedule.len());
    }

    #[test]
    fn what_is_due_longest_goes_first_and_nothing_goes_early() {
        let now = crate::clock::now();
        let later = now + Duration::from_nanos(1_000_000_100);
        let mut schedule = Schedule::new(now - Duration::from_secs(2));
        for (n, at) in
            [(3, later), (2, now), (1 << 64, now), (1, now), (4, now - Duration::from_secs(1))]
        {
            schedule.push(id(n), at);
        }
        let at_once = now + Duration::from_millis(1);
        let mut popped = Vec::new();
        while let Some(id) = schedule.pop(at_once) {
            popped.push(id.as_u128());
        }
        assert_eq!(popped, [4, 1, 2, 1 << 64]);
        let next = schedule.next_at().unwrap();
        assert!(next >= later && next <= later + Duration::from_micros(1));
        assert_eq!(schedule.pop(later), None);
        assert_eq!(schedule.pop(next), Some(id(3)));
        assert!(schedule.is_empty());
    }
}
