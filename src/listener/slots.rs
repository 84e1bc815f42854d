//! Who may be connected at once: places in all, places per client, and who makes room (R19).

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use crate::clock;
use crate::metrics::Refusal;

/// Connections that may be on their way out while their places are taken already.
pub const SLACK: usize = 64;

/// The places of all listeners together.
#[derive(Debug)]
pub struct Slots {
    total: usize,
    per_client: usize,
    began: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    open: HashMap<u64, Arc<Entry>>,
    by_client: HashMap<IpAddr, usize>,
    /// Those that were told to make room and have not gone yet.
    leaving: usize,
}

#[derive(Debug)]
struct Entry {
    /// Milliseconds since `began` (plus one) since when it has been idle before MAIL; 0 while it is busy or told to go.
    idle_since: AtomicU64,
    /// It was told to make room.
    told: AtomicBool,
    evict: Notify,
}

impl Slots {
    pub fn new(total: usize, per_client: usize) -> Self {
        Self { total, per_client, began: clock::now(), inner: Mutex::new(Inner::default()) }
    }

    /// A place for a connection; where all are taken, the connection that has been idle longest before MAIL is told to
    /// go. `client` is none for those that are exempt from the limit per client (loopback, Unix sockets).
    pub fn take(self: &Arc<Self>, client: Option<IpAddr>) -> Result<Slot, Refusal> {
        let mut inner = self.inner();
        if let Some(client) = client
            && inner.by_client.get(&client).is_some_and(|open| *open >= self.per_client)
        {
            return Err(Refusal::TooManyOfClient);
        }
        if inner.open.len() - inner.leaving >= self.total {
            let idlest =
                inner.open.values().filter(|entry| entry.idle_since.load(Ordering::Relaxed) > 0);
            let idlest =
                idlest.min_by_key(|entry| entry.idle_since.load(Ordering::Relaxed)).cloned();
            let Some(idlest) = idlest.filter(|_| inner.leaving < SLACK) else {
                return Err(Refusal::TooManyConnections);
            };
            idlest.idle_since.store(0, Ordering::Relaxed);
            idlest.told.store(true, Ordering::Relaxed);
            idlest.evict.notify_one();
            inner.leaving += 1;
        }
        let number = inner.next;
        inner.next += 1;
        let idle_since = AtomicU64::new(self.stamp());
        let entry =
            Arc::new(Entry { idle_since, told: AtomicBool::new(false), evict: Notify::new() });
        inner.open.insert(number, Arc::clone(&entry));
        if let Some(client) = client {
            *inner.by_client.entry(client).or_default() += 1;
        }
        Ok(Slot { slots: Arc::clone(self), number, client, entry })
    }

    fn stamp(&self) -> u64 {
        u64::try_from(clock::now().saturating_duration_since(self.began).as_millis())
            .unwrap_or(u64::MAX - 1)
            + 1
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One place, given back when it goes.
#[derive(Debug)]
pub struct Slot {
    slots: Arc<Slots>,
    number: u64,
    client: Option<IpAddr>,
    entry: Arc<Entry>,
}

impl Slot {
    /// The connection waits for a command and has no transaction open: it may be told to make room.
    pub fn idle(&self) {
        let told = self.entry.told.load(Ordering::Relaxed);
        if !told && self.entry.idle_since.load(Ordering::Relaxed) == 0 {
            self.entry.idle_since.store(self.slots.stamp(), Ordering::Relaxed);
        }
    }

    pub fn busy(&self) {
        self.entry.idle_since.store(0, Ordering::Relaxed);
    }

    /// Returns when this connection is to make room for another; cancel-safe.
    pub async fn evicted(&self) {
        self.entry.evict.notified().await;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut inner = self.slots.inner();
        inner.open.remove(&self.number);
        if let Some(client) = self.client
            && let Some(open) = inner.by_client.get_mut(&client)
        {
            *open -= 1;
            if *open == 0 {
                inner.by_client.remove(&client);
            }
        }
        if self.entry.told.load(Ordering::Relaxed) {
            inner.leaving = inner.leaving.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    #[test]
    fn a_client_has_its_share_and_gets_it_back() {
        let slots = Arc::new(Slots::new(10, 2));
        let first = slots.take(Some(CLIENT)).unwrap();
        let _second = slots.take(Some(CLIENT)).unwrap();
        assert_eq!(slots.take(Some(CLIENT)).unwrap_err(), Refusal::TooManyOfClient);
        drop(first);
        assert!(slots.take(Some(CLIENT)).is_ok());
        assert!(slots.take(None).is_ok(), "others and the exempt are not concerned");
    }

    #[test]
    fn the_one_idle_longest_makes_room_and_the_busy_never() {
        let slots = Arc::new(Slots::new(3, 10));
        let taken: Vec<Slot> = (0..3).map(|_| slots.take(None).unwrap()).collect();
        taken[0].busy();
        taken[1].entry.idle_since.store(7, Ordering::Relaxed);
        taken[2].entry.idle_since.store(3, Ordering::Relaxed);
        let fourth = slots.take(None).unwrap();
        assert!(taken[2].entry.told.load(Ordering::Relaxed));
        taken[2].idle();
        fourth.busy();
        let _fifth = slots.take(None).unwrap();
        assert!(
            taken[1].entry.told.load(Ordering::Relaxed),
            "one that is leaving is not asked again"
        );
        _fifth.busy();
        assert_eq!(slots.take(None).unwrap_err(), Refusal::TooManyConnections);
        drop(taken);
        assert!(slots.take(None).is_ok());
        assert_eq!(slots.inner().leaving, 0);
    }
}
