//! What is waiting, in the order in which it is due. Pure.
//!
//! There is one lane: the account of the upstream. Within it, messages that were never tried and those that were take
//! turns, so that thousands that are deferred again and again do not make new mail wait (R44).

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use crate::envelope::SpoolId;
use crate::ordered::OrderedMap;

/// First attempts in a row while a message that was deferred is due too.
const FIRST_IN_A_ROW: u8 = 3;

/// Which turn a message has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It was never deferred for a reason of its own.
    First,
    Again,
}

/// Queued messages that are not being sent, by id: 24 octets each. What else is known of them the spool knows. Every
/// operation is O(log n).
#[derive(Debug)]
pub struct Schedule {
    began: Instant,
    first: Waiting,
    again: Waiting,
    /// Since a message last had the other turn.
    firsts: u8,
}

/// By microseconds since the schedule began, then id, as octets so that no room is lost to alignment.
type Waiting = OrderedMap<(u64, [u8; 16]), ()>;

impl Schedule {
    /// `now` may be any time that is not later than what is asked.
    pub fn new(now: Instant) -> Self {
        Self { began: now, first: OrderedMap::new(), again: OrderedMap::new(), firsts: 0 }
    }

    /// The message may be tried from `at` on. Those of a turn that are due at the same time go in the order of
    /// acceptance.
    pub fn push(&mut self, id: SpoolId, turn: Turn, at: Instant) {
        // Never early.
        let since = at.saturating_duration_since(self.began).as_nanos().div_ceil(1_000);
        let since = u64::try_from(since).unwrap_or(u64::MAX);
        let waiting = match turn {
            Turn::First => &mut self.first,
            Turn::Again => &mut self.again,
        };
        waiting.insert((since, id.as_u128().to_be_bytes()), ());
    }

    /// Takes the message that has been due longest, of those whose turn it is. Without `again` these are first attempts
    /// only.
    pub fn pop(&mut self, now: Instant, again: bool) -> Option<(SpoolId, Turn)> {
        let is_due = |waiting| self.first_at(waiting).is_some_and(|at| at <= now);
        let turn = match (is_due(&self.first), again && is_due(&self.again)) {
            (false, false) => return None,
            (true, true) if self.firsts == FIRST_IN_A_ROW => Turn::Again,
            (true, _) => Turn::First,
            (false, true) => Turn::Again,
        };
        let waiting = match turn {
            Turn::First => {
                self.firsts = (self.firsts + 1).min(FIRST_IN_A_ROW);
                &mut self.first
            }
            Turn::Again => {
                self.firsts = 0;
                &mut self.again
            }
        };
        let ((_, id), ()) = waiting.pop_first()?;
        Some((SpoolId::from_u128(u128::from_be_bytes(id)), turn))
    }

    /// Takes out those of `ids` that wait here, with the time at which each is due. O(n), once for all of them: nothing
    /// but an operator asks for a message by its id.
    pub fn remove_all(&mut self, ids: &HashSet<SpoolId>) -> HashMap<SpoolId, Instant> {
        let id_of = |id: &[u8; 16]| SpoolId::from_u128(u128::from_be_bytes(*id));
        let mut removed = HashMap::new();
        // A page of a listing lies close together: most of what waits is passed over by this alone.
        let (Some(first), Some(last)) = (ids.iter().min(), ids.iter().max()) else {
            return removed;
        };
        let is_asked = |id: SpoolId| (*first..=*last).contains(&id) && ids.contains(&id);
        for waiting in [&mut self.first, &mut self.again] {
            let keys = waiting.iter().map(|(key, ())| *key);
            let keys: Vec<_> = keys.filter(|(_, id)| is_asked(id_of(id))).collect();
            for key in keys {
                waiting.remove(&key);
                removed.insert(id_of(&key.1), self.began + Duration::from_micros(key.0));
            }
        }
        removed
    }

    /// When the next message is due, as in [`Schedule::pop`]; it may be past.
    pub fn next_at(&self, again: bool) -> Option<Instant> {
        let first = self.first_at(&self.first);
        let again = self.first_at(&self.again).filter(|_| again);
        first.into_iter().chain(again).min()
    }

    fn first_at(&self, waiting: &Waiting) -> Option<Instant> {
        let ((since, _), ()) = waiting.first()?;
        Some(self.began + Duration::from_micros(*since))
    }

    /// The message that was accepted first. O(n).
    pub fn oldest(&self) -> Option<SpoolId> {
        let ids = self.first.iter().chain(self.again.iter()).map(|((_, id), ())| *id);
        ids.min().map(|id| SpoolId::from_u128(u128::from_be_bytes(id)))
    }

    pub fn len(&self) -> usize {
        self.first.len() + self.again.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
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
            schedule.push(id(n.into()), Turn::First, now + Duration::from_micros(at));
        }
        assert_eq!(schedule.len(), 100_000);
        let octets = schedule.first.octets();
        assert!(octets < 28 * schedule.len(), "{octets} for {}", schedule.len());
        // As a start finds them: in the order of their ids, due at any time.
        let mut schedule = Schedule::new(now);
        for n in crate::ordered::nearly_in_order() {
            let at = now + Duration::from_micros(n.into());
            schedule.push(id(schedule.len() as u128), Turn::First, at);
        }
        let octets = schedule.first.octets();
        assert!(octets < 28 * schedule.len(), "{octets} for {}", schedule.len());
    }

    #[test]
    fn what_an_operator_asks_for_is_taken_out_with_its_time_and_the_rest_stays() {
        let now = crate::clock::now();
        let mut schedule = Schedule::new(now);
        for n in 0..1_000_u64 {
            let turn = if n < 100 { Turn::First } else { Turn::Again };
            schedule.push(id(n.into()), turn, now + Duration::from_secs(n % 7));
        }
        let asked = HashSet::from([id(3), id(500), id(5_000)]);
        let removed = schedule.remove_all(&asked);
        let expected = [(id(3), 3), (id(500), 3)];
        let expected = expected.map(|(id, secs)| (id, now + Duration::from_secs(secs)));
        assert_eq!(removed, HashMap::from(expected));
        assert_eq!(schedule.len(), 998);
        assert!(schedule.remove_all(&asked).is_empty());
    }

    #[test]
    fn what_is_due_longest_goes_first_and_nothing_goes_early() {
        let now = crate::clock::now();
        let later = now + Duration::from_nanos(1_000_000_100);
        for turn in [Turn::First, Turn::Again] {
            let mut schedule = Schedule::new(now - Duration::from_secs(2));
            for (n, at) in
                [(3, later), (2, now), (1 << 64, now), (1, now), (4, now - Duration::from_secs(1))]
            {
                schedule.push(id(n), turn, at);
            }
            let at_once = now + Duration::from_millis(1);
            let mut popped = Vec::new();
            while let Some((id, _)) = schedule.pop(at_once, true) {
                popped.push(id.as_u128());
            }
            assert_eq!(popped, [4, 1, 2, 1 << 64]);
            let next = schedule.next_at(true).unwrap();
            assert!(next >= later && next <= later + Duration::from_micros(1));
            assert_eq!(schedule.pop(later, true), None);
            assert_eq!(schedule.pop(next, true), Some((id(3), turn)));
            assert!(schedule.is_empty());
        }
    }

    /// The turns of what is due at `now`.
    fn turns(schedule: &mut Schedule, now: Instant, again: bool) -> String {
        let mut turns = String::new();
        while let Some((_, turn)) = schedule.pop(now, again) {
            turns.push(if turn == Turn::First { 'f' } else { 'a' });
        }
        turns
    }

    #[test]
    fn new_mail_has_three_of_four_turns() {
        let now = crate::clock::now();
        let mut schedule = Schedule::new(now);
        for n in 0..10 {
            schedule.push(id(n), Turn::Again, now);
            schedule.push(id(100 + n), Turn::First, now);
        }
        assert_eq!(turns(&mut schedule, now, true), "fffafffafffafaaaaaaa");
        // What was tried alone meanwhile is no turn that is owed later.
        schedule.push(id(1), Turn::First, now);
        schedule.push(id(2), Turn::Again, now);
        assert_eq!(turns(&mut schedule, now, true), "fa");
    }

    #[test]
    fn without_room_for_another_retry_only_new_mail_goes() {
        let now = crate::clock::now();
        let mut schedule = Schedule::new(now);
        let soon = now + Duration::from_secs(1);
        schedule.push(id(1), Turn::Again, now);
        for n in 2..8 {
            schedule.push(id(n), Turn::First, soon);
        }
        assert_eq!((schedule.next_at(true), schedule.next_at(false)), (Some(now), Some(soon)));
        assert_eq!(turns(&mut schedule, now, false), "");
        assert_eq!(turns(&mut schedule, soon, false), "ffffff");
        assert_eq!(schedule.next_at(false), None);
        assert_eq!(turns(&mut schedule, soon, true), "a");
    }
}
