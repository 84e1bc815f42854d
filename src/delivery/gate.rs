//! Whether mail may flow to the provider. Pure.
//!
//! Trouble that is not a message's own closes the gate: everyone waits, nothing is counted against a message, and one
//! message at a time is let through as a probe, a different one each time. Two probes in a row that the provider
//! answers open it again (R43, R44).

use std::time::{Duration, Instant};

use crate::delivery::retry::spread;
use crate::envelope::SpoolId;
use crate::outcome::{Cause, Scope, Stage};

/// First and longest time between probes.
const PROBE_FIRST: Duration = Duration::from_secs(1);
const PROBE_MAX: Duration = Duration::from_secs(300);
const PROBE_JITTER: f64 = 0.2;
/// What is taken of a remote's wish to be left alone.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);
/// Probes in a row that open the gate.
const PROBES_TO_OPEN: u8 = 2;
/// A provider that has answered so shortly before a connection was refused works, and has no more to spare.
const BUSY_WINDOW: Duration = Duration::from_secs(1);
/// Answers for each attempt that is allowed at once before one more is.
const ANSWERS_TO_GROW: usize = 4;

#[derive(Debug, Default)]
pub struct Gate {
    /// Attempts at once, and since when, where the provider has shown that it takes fewer than configured.
    shrunk: Option<(usize, Instant)>,
    /// Answers since that number last changed.
    answers: usize,
    last_answer: Option<Instant>,
    closed: Option<Closed>,
    /// The message whose attempt last threw suspicion on the provider, while nothing has passed since.
    suspect: Option<SpoolId>,
}

#[derive(Debug)]
struct Closed {
    why: Cause,
    since: Instant,
    /// No probe before.
    until: Instant,
    failed_probes: u32,
    passed_probes: u8,
    /// One of them was taken, or got further than where the trouble was: enough where there is no other.
    is_proven: bool,
    probing: bool,
}

/// Whether an attempt may begin now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admit {
    Freely,
    /// This one is a probe; no other begins until it has ended.
    Probe,
    /// Not before; `None` while a probe is under way.
    Wait(Option<Instant>),
}

/// What the state of the gate became.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Unchanged,
    /// It was open and is closed now.
    Closed,
    /// It was closed, this long, and is open now.
    Opened(Duration),
}

/// What the provider made of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It took it, for one recipient at least.
    Taken,
    /// It had something to say about it.
    Spoken,
}

/// How an attempt began, as [`Gate::admit`] said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Free,
    Probe,
}

impl Closed {
    fn forget_passed(&mut self) {
        self.passed_probes = 0;
        self.is_proven = false;
    }
}

impl Gate {
    pub fn new() -> Self {
        Self::default()
    }

    /// Why it is closed, and until when no probe is made.
    pub fn closed(&self) -> Option<(&Cause, Instant)> {
        self.closed.as_ref().map(|closed| (&closed.why, closed.until))
    }

    /// Since when it is closed.
    pub fn closed_since(&self) -> Option<Instant> {
        self.closed.as_ref().map(|closed| closed.since)
    }

    /// How many attempts may be under way, of the `most` that are configured.
    pub fn allowance(&self, most: usize) -> usize {
        self.shrunk.map_or(most, |(shrunk, _)| shrunk.min(most))
    }

    /// The provider refused a connection, or wants fewer. Where it has answered another attempt since this one began at `since`, or just
    /// before, it has no more to spare, which is no trouble: fewer are asked for, and slowly more again. Otherwise this
    /// says no, and changes nothing.
    pub fn busy(&mut self, pass: Pass, most: usize, since: Instant, now: Instant) -> bool {
        if self.closed.is_some()
            || self.last_answer.is_none_or(|answer| answer + BUSY_WINDOW < since)
        {
            return false;
        }
        // Those that began before the number was lowered say nothing about the lower one.
        if self.shrunk.is_none_or(|(_, at)| at <= since) {
            self.shrunk = Some(((self.allowance(most) / 2).max(1), now));
            self.answers = 0;
        }
        self.unclear(pass, now);
        true
    }

    /// Asks for one attempt. After `Probe`, one of [`Gate::answered`], [`Gate::trouble`], [`Gate::suspect`] or
    /// [`Gate::unclear`] must follow.
    pub fn admit(&mut self, now: Instant) -> Admit {
        match &mut self.closed {
            None => Admit::Freely,
            Some(closed) if closed.probing => Admit::Wait(None),
            Some(closed) if now < closed.until => Admit::Wait(Some(closed.until)),
            Some(closed) => {
                closed.probing = true;
                Admit::Probe
            }
        }
    }

    /// The provider spoke about the message: it works.
    pub fn answered(&mut self, pass: Pass, answer: Answer, now: Instant) -> Change {
        self.suspect = None;
        self.last_answer = Some(now);
        self.answers += 1;
        if let Some((shrunk, _)) = &mut self.shrunk
            && self.answers >= ANSWERS_TO_GROW * *shrunk
        {
            *shrunk += 1;
            self.answers = 0;
        }
        let Some(closed) = &mut self.closed else { return Change::Unchanged };
        if pass == Pass::Free {
            // It began before the trouble; it proves nothing about now.
            return Change::Unchanged;
        }
        closed.probing = false;
        closed.until = now;
        closed.failed_probes = 0;
        closed.passed_probes += 1;
        closed.is_proven |= answer == Answer::Taken || closed.why.stage < Stage::Mail;
        if closed.passed_probes < PROBES_TO_OPEN {
            return Change::Unchanged;
        }
        self.open(now)
    }

    /// Nothing is due that could be a probe. Where one has passed, that has to do: else the gate would stay closed until
    /// there is mail again, however long that is.
    pub fn idle(&mut self, now: Instant) -> Change {
        match &self.closed {
            Some(closed) if closed.is_proven && !closed.probing => self.open(now),
            Some(_) | None => Change::Unchanged,
        }
    }

    fn open(&mut self, now: Instant) -> Change {
        match self.closed.take() {
            Some(closed) => Change::Opened(now.saturating_duration_since(closed.since)),
            None => Change::Unchanged,
        }
    }

    /// The trouble is the provider's or the account's, and no message's: it closes at once.
    pub fn trouble(&mut self, pass: Pass, cause: &Cause, now: Instant, random: f64) -> Change {
        self.close(pass, cause, now, random, PROBE_MAX)
    }

    /// The connection was lost in the middle of a message, or the account was refused over one. That message may be the
    /// reason itself, and does not close the gate; two different ones in a row, with nothing that passed between, are the
    /// provider's trouble. Where it may still be the messages', the next probe is not put off further each time; what
    /// speaks of the account is believed so far.
    pub fn suspect(
        &mut self,
        pass: Pass,
        id: SpoolId,
        cause: &Cause,
        now: Instant,
        random: f64,
    ) -> Change {
        let others = self.suspect.is_some_and(|last| last != id);
        self.suspect = Some(id);
        match self.closed.is_some() || others {
            true if cause.scope >= Scope::Sender => self.close(pass, cause, now, random, PROBE_MAX),
            true => self.close(pass, cause, now, random, PROBE_FIRST),
            false => Change::Unchanged,
        }
    }

    fn close(
        &mut self,
        pass: Pass,
        cause: &Cause,
        now: Instant,
        random: f64,
        longest: Duration,
    ) -> Change {
        let asked = cause.retry_after.map(|wish| wish.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX));
        let wait = |failed: u32| asked.unwrap_or_else(|| wait_for_probe(failed, longest, random));
        let Some(closed) = &mut self.closed else {
            let (why, until) = (cause.clone(), now + wait(0));
            self.closed = Some(Closed {
                why,
                since: now,
                until,
                failed_probes: 1,
                passed_probes: 0,
                is_proven: false,
                probing: false,
            });
            return Change::Closed;
        };
        if pass == Pass::Probe {
            closed.probing = false;
            closed.forget_passed();
            closed.until = now + wait(closed.failed_probes);
            closed.failed_probes = closed.failed_probes.saturating_add(1);
            closed.why = cause.clone();
        } else if let Some(wish) = asked {
            closed.until = closed.until.max(now + wish);
        }
        Change::Unchanged
    }

    /// A probe ended and says nothing about the provider.
    pub fn unclear(&mut self, pass: Pass, now: Instant) {
        if let (Pass::Probe, Some(closed)) = (pass, &mut self.closed) {
            closed.probing = false;
            closed.until = closed.until.max(now + PROBE_FIRST);
        }
    }

    /// The same, but what it was told may well be the trouble: the next probe comes later, as after one that failed.
    pub fn says_nothing(&mut self, pass: Pass, now: Instant, random: f64) {
        if let (Pass::Probe, Some(closed)) = (pass, &mut self.closed) {
            closed.probing = false;
            closed.forget_passed();
            closed.until =
                closed.until.max(now + wait_for_probe(closed.failed_probes, PROBE_MAX, random));
            closed.failed_probes = closed.failed_probes.saturating_add(1);
        }
    }
}

/// Before the next probe, after so many that failed.
fn wait_for_probe(failed: u32, longest: Duration, random: f64) -> Duration {
    let doubled = PROBE_FIRST * 2_u32.saturating_pow(failed.min(16));
    spread(doubled.min(longest), PROBE_JITTER, random).max(PROBE_FIRST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Stage;

    fn refused() -> Cause {
        Cause::new(Scope::Provider, Stage::Connect, "connection refused")
    }

    const A: SpoolId = SpoolId::from_u128(1);
    const B: SpoolId = SpoolId::from_u128(2);

    #[test]
    fn trouble_closes_and_probes_come_one_at_a_time_ever_more_rarely() {
        let mut now = crate::clock::now();
        let mut gate = Gate::new();
        assert_eq!(gate.admit(now), Admit::Freely);
        assert_eq!(gate.trouble(Pass::Free, &refused(), now, 0.5), Change::Closed);
        let mut waits = Vec::new();
        for _ in 0..12 {
            let Admit::Wait(Some(until)) = gate.admit(now) else { panic!("it waits") };
            waits.push((until - now).as_secs());
            assert_eq!(gate.admit(until), Admit::Probe);
            assert_eq!(gate.admit(until), Admit::Wait(None), "one probe at a time");
            assert_eq!(
                gate.trouble(Pass::Free, &refused(), until, 0.5),
                Change::Unchanged,
                "older attempts add nothing"
            );
            now = until;
            gate.trouble(Pass::Probe, &refused(), now, 0.5);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
    }

    #[test]
    fn never_more_than_one_probe_a_second() {
        let now = crate::clock::now();
        let mut gate = Gate::new();
        gate.trouble(Pass::Free, &refused(), now, 0.0);
        assert_eq!(
            gate.admit(now + Duration::from_millis(999)),
            Admit::Wait(Some(now + PROBE_FIRST))
        );
    }

    #[test]
    fn two_probes_in_a_row_open_it() {
        let now = crate::clock::now();
        let mut gate = Gate::new();
        gate.trouble(Pass::Free, &refused(), now, 0.5);
        let at = now + PROBE_FIRST;
        assert_eq!(gate.admit(at), Admit::Probe);
        assert_eq!(
            gate.answered(Pass::Free, Answer::Taken, at),
            Change::Unchanged,
            "an attempt from before proves nothing"
        );
        assert_eq!(gate.answered(Pass::Probe, Answer::Taken, at), Change::Unchanged);
        assert_eq!(gate.admit(at), Admit::Probe, "the second follows at once");
        assert_eq!(gate.answered(Pass::Probe, Answer::Taken, at), Change::Opened(PROBE_FIRST));
        assert_eq!(gate.admit(at), Admit::Freely);
    }

    #[test]
    fn what_the_remote_asks_for_is_taken_within_bounds() {
        let now = crate::clock::now();
        for (asked, taken) in [(0, 1), (30, 30), (86_400, 3600)] {
            let mut gate = Gate::new();
            let cause = Cause { retry_after: Some(Duration::from_secs(asked)), ..refused() };
            gate.trouble(Pass::Free, &cause, now, 0.5);
            assert_eq!(gate.admit(now), Admit::Wait(Some(now + Duration::from_secs(taken))));
        }
    }

    #[test]
    fn one_message_that_breaks_connections_does_not_close_it_and_two_do() {
        let now = crate::clock::now();
        let mut gate = Gate::new();
        for _ in 0..5 {
            assert_eq!(gate.suspect(Pass::Free, A, &refused(), now, 0.5), Change::Unchanged);
        }
        gate.answered(Pass::Free, Answer::Taken, now);
        assert_eq!(
            gate.suspect(Pass::Free, B, &refused(), now, 0.5),
            Change::Unchanged,
            "something passed between"
        );
        assert_eq!(gate.suspect(Pass::Free, A, &refused(), now, 0.5), Change::Closed);
    }

    #[test]
    fn suspicion_does_not_put_probes_off_further() {
        let mut now = crate::clock::now();
        let mut gate = Gate::new();
        let lost = Cause { lost: true, ..Cause::new(Scope::Message, Stage::Data, "lost") };
        gate.suspect(Pass::Free, A, &lost, now, 0.5);
        gate.suspect(Pass::Free, B, &lost, now, 0.5);
        for _ in 0..9 {
            now += PROBE_FIRST;
            assert_eq!(gate.admit(now), Admit::Probe);
            gate.suspect(Pass::Probe, A, &lost, now, 0.5);
        }
    }

    #[test]
    fn suspicion_of_the_account_puts_probes_off_as_trouble_does() {
        let mut now = crate::clock::now();
        let mut gate = Gate::new();
        let blocked = Cause::new(Scope::Provider, Stage::EndOfData, "550 5.7.708");
        gate.suspect(Pass::Free, A, &blocked, now, 0.5);
        gate.suspect(Pass::Free, B, &blocked, now, 0.5);
        let mut waits = Vec::new();
        for _ in 0..11 {
            let Admit::Wait(Some(until)) = gate.admit(now) else { panic!("it waits") };
            waits.push((until - now).as_secs());
            now = until;
            assert_eq!(gate.admit(now), Admit::Probe);
            gate.suspect(Pass::Probe, A, &blocked, now, 0.5);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
    }

    #[test]
    fn one_passed_probe_opens_it_where_nothing_is_left_for_a_second() {
        let now = crate::clock::now();
        let mut gate = Gate::new();
        assert_eq!(gate.idle(now), Change::Unchanged, "it is open");
        gate.trouble(Pass::Free, &refused(), now, 0.5);
        assert_eq!(gate.idle(now), Change::Unchanged, "nothing has passed");
        let at = now + PROBE_FIRST;
        assert_eq!(gate.admit(at), Admit::Probe);
        gate.answered(Pass::Probe, Answer::Taken, at);
        assert_eq!(gate.admit(at), Admit::Probe);
        assert_eq!(gate.idle(at), Change::Unchanged, "the second is under way");
        gate.unclear(Pass::Probe, at);
        assert_eq!(gate.idle(at), Change::Opened(PROBE_FIRST));
        assert_eq!(gate.admit(at), Admit::Freely);
    }

    #[test]
    fn alone_a_probe_opens_it_only_where_it_got_behind_the_trouble() {
        let now = crate::clock::now();
        for (stage, answer, opens) in [
            (Stage::Auth, Answer::Spoken, true),
            (Stage::EndOfData, Answer::Spoken, false),
            (Stage::EndOfData, Answer::Taken, true),
        ] {
            let mut gate = Gate::new();
            let cause = Cause::new(Scope::Provider, stage, "no");
            gate.trouble(Pass::Free, &cause, now, 0.5);
            let at = now + PROBE_FIRST;
            assert_eq!(gate.admit(at), Admit::Probe);
            gate.answered(Pass::Probe, answer, at);
            assert_eq!(gate.idle(at) != Change::Unchanged, opens, "{stage:?} {answer:?}");
        }
    }

    #[test]
    fn a_probe_that_passed_counts_no_more_after_one_that_was_refused_over_a_null_path() {
        let now = crate::clock::now();
        let mut gate = Gate::new();
        gate.trouble(Pass::Free, &refused(), now, 0.5);
        let at = now + PROBE_FIRST;
        assert_eq!(gate.admit(at), Admit::Probe);
        gate.answered(Pass::Probe, Answer::Taken, at);
        assert_eq!(gate.admit(at), Admit::Probe);
        gate.says_nothing(Pass::Probe, at, 0.5);
        assert_eq!(gate.idle(at), Change::Unchanged);
    }

    #[test]
    fn a_provider_without_a_connection_to_spare_gets_fewer_and_slowly_more() {
        let began = crate::clock::now();
        let at = |ms| began + Duration::from_millis(ms);
        let mut gate = Gate::new();
        assert!(!gate.busy(Pass::Free, 20, began, at(1)), "nobody was ever answered: it is down");
        gate.answered(Pass::Free, Answer::Taken, at(2));
        assert!(!gate.busy(Pass::Free, 20, at(1_003), at(1_004)), "nobody was answered for long");
        assert_eq!(gate.allowance(20), 20);
        for _ in 0..15 {
            assert!(gate.busy(Pass::Free, 20, began, at(5)));
        }
        assert_eq!(gate.allowance(20), 10, "those that began together lower it once");
        gate.answered(Pass::Free, Answer::Taken, at(7));
        assert!(gate.busy(Pass::Free, 20, at(6), at(8)));
        assert_eq!(gate.allowance(20), 5);
        for _ in 0..20 {
            gate.answered(Pass::Free, Answer::Taken, at(9));
        }
        assert_eq!(gate.allowance(20), 6);
        assert_eq!(gate.admit(at(9)), Admit::Freely);
    }

    #[test]
    fn a_probe_that_was_refused_over_a_null_path_puts_the_next_one_off() {
        let mut now = crate::clock::now();
        let mut gate = Gate::new();
        gate.trouble(Pass::Free, &refused(), now, 0.5);
        for waited in [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            let Admit::Wait(Some(until)) = gate.admit(now) else { panic!("it waits") };
            assert_eq!((until - now).as_secs(), waited);
            now = until;
            assert_eq!(gate.admit(now), Admit::Probe);
            gate.says_nothing(Pass::Probe, now, 0.5);
        }
    }

    #[test]
    fn a_probe_that_says_nothing_is_followed_by_another() {
        let now = crate::clock::now();
        let mut gate = Gate::new();
        gate.trouble(Pass::Free, &refused(), now, 0.5);
        assert_eq!(gate.admit(now + PROBE_FIRST), Admit::Probe);
        gate.unclear(Pass::Probe, now + PROBE_FIRST);
        assert_eq!(gate.admit(now + PROBE_FIRST * 2), Admit::Probe);
    }
}
