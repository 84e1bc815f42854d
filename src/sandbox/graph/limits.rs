//! What a mailbox may do within a window, as the documents say.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::answer::Refusal;
use super::settings::{Limits, Rate};

/// Who is limited: an app at a mailbox.
pub(super) type Lane = (String, String);

/// With more of them, those at rest are forgotten.
const MAX_LANES: usize = 10_000;

#[derive(Debug, Default)]
pub(super) struct Traffic {
    lanes: HashMap<Lane, Use>,
}

#[derive(Debug, Default)]
struct Use {
    at_once: usize,
    requests: Window,
    upload: Window,
    messages: Window,
    recipients: Window,
}

impl Traffic {
    /// A request begins. One that is refused counts too, but is not at work.
    pub(super) fn enter(
        &mut self,
        lane: &Lane,
        limits: &Limits,
        now: Instant,
    ) -> Result<(), Refusal> {
        if self.lanes.len() > MAX_LANES {
            self.lanes.retain(|_, lane| lane.at_once > 0);
        }
        let lane = self.lanes.entry(lane.clone()).or_default();
        lane.requests.take(limits.requests, 1, now).map_err(|delay| {
            throttled("Application is over its MailboxRequests limit.").retry_after(delay)
        })?;
        if limits.concurrency.is_some_and(|most| lane.at_once >= most) {
            let delay = Duration::from_millis(1_128);
            return Err(
                throttled("Application is over its MailboxConcurrency limit.").retry_after(delay)
            );
        }
        lane.at_once += 1;
        Ok(())
    }

    /// A request that had entered has ended.
    pub(super) fn leave(&mut self, lane: &Lane) {
        if let Some(lane) = self.lanes.get_mut(lane) {
            lane.at_once = lane.at_once.saturating_sub(1);
        }
    }

    pub(super) fn upload(
        &mut self,
        lane: &Lane,
        octets: u64,
        limits: &Limits,
        now: Instant,
    ) -> Result<(), Refusal> {
        let lane = self.lanes.entry(lane.clone()).or_default();
        lane.upload.take(limits.upload, octets, now).map_err(|delay| {
            throttled("Application is over its MailboxUploadBytes limit.").retry_after(delay)
        })
    }

    /// A message is to be sent to so many.
    pub(super) fn send(
        &mut self,
        mailbox: &str,
        recipients: u64,
        limits: &Limits,
        now: Instant,
    ) -> Result<(), Refusal> {
        // These are limits of the mailbox, whichever app sends.
        let lane = self.lanes.entry((String::new(), mailbox.to_owned())).or_default();
        lane.messages.take(limits.messages, 1, now).map_err(|delay| {
            throttled("Mailbox is over its message rate limit.").retry_after(delay)
        })?;
        lane.recipients.take(limits.recipients, recipients, now).map_err(|delay| {
            let words = "Cannot send mail. Daily Message/Recipient limit exceeded.";
            Refusal::new(429, "ErrorExceededMessageLimit", words).retry_after(delay)
        })
    }
}

fn throttled(message: &str) -> Refusal {
    Refusal::new(429, "ApplicationThrottled", message)
}

/// What was used of late.
#[derive(Debug, Default)]
struct Window {
    uses: VecDeque<(Instant, u64)>,
    sum: u64,
}

impl Window {
    /// Takes so much, or says after how long there will be room for it.
    fn take(&mut self, limit: Option<Rate>, amount: u64, now: Instant) -> Result<(), Duration> {
        let Some(limit) = limit else { return Ok(()) };
        while let Some((at, used)) = self.uses.front().copied() {
            if now.saturating_duration_since(at) < limit.per {
                break;
            }
            self.uses.pop_front();
            self.sum = self.sum.saturating_sub(used);
        }
        if self.sum.saturating_add(amount) <= limit.amount {
            self.uses.push_back((now, amount));
            self.sum += amount;
            return Ok(());
        }
        let mut left = self.sum;
        for (at, used) in &self.uses {
            left = left.saturating_sub(*used);
            if left.saturating_add(amount) <= limit.amount {
                return Err(limit.per.saturating_sub(now.saturating_duration_since(*at)));
            }
        }
        Err(limit.per)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn a_window_slides() {
        let start = clock::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let limit = Some(Rate { amount: 10, per: Duration::from_secs(60) });
        let mut window = Window::default();
        assert_eq!(window.take(limit, 6, at(0)), Ok(()));
        assert_eq!(window.take(limit, 4, at(10)), Ok(()));
        assert_eq!(window.take(limit, 1, at(20)), Err(Duration::from_secs(40)));
        assert_eq!(window.take(limit, 7, at(20)), Err(Duration::from_secs(50)));
        assert_eq!(window.take(limit, 11, at(20)), Err(Duration::from_secs(60)));
        assert_eq!(window.take(limit, 6, at(60)), Ok(()));
        assert_eq!(window.take(limit, 1, at(60)), Err(Duration::from_secs(10)));
        assert_eq!(window.take(None, 1_000, at(60)), Ok(()));
    }

    #[test]
    fn the_fifth_at_once_is_refused_until_another_leaves() {
        let mut traffic = Traffic::default();
        let lane = |mailbox: &str| ("app".to_owned(), mailbox.to_owned());
        let limits = Limits::default();
        let now = clock::now();
        for _ in 0..4 {
            traffic.enter(&lane("a@x"), &limits, now).unwrap();
        }
        let refused = traffic.enter(&lane("a@x"), &limits, now).unwrap_err();
        assert_eq!((refused.status, refused.code), (429, "ApplicationThrottled"));
        assert!(refused.message.contains("MailboxConcurrency"));
        traffic.enter(&lane("b@x"), &limits, now).unwrap();
        traffic.leave(&lane("a@x"));
        traffic.enter(&lane("a@x"), &limits, now).unwrap();
    }
}
