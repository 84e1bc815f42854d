//! Connections kept for the next message.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock;

use super::connection::Connection;

/// What is kept, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) idle: usize,
    /// Transactions on one connection.
    pub(super) transactions: u32,
    pub(super) idle_time: Duration,
    /// How long one more than `idle` is kept: under load it is wanted again at once.
    pub(super) surplus_time: Duration,
}

impl Limits {
    pub(super) const DEFAULT: Self = Self {
        idle: 10,
        transactions: 100,
        idle_time: Duration::from_secs(30),
        surplus_time: Duration::from_secs(1),
    };
}

/// The last used is the first taken, so that the others may grow old and close.
pub(super) struct Pool {
    limits: Limits,
    state: Mutex<State>,
    /// The sweeper and each QUIT.
    tasks: TaskTracker,
    stop: CancellationToken,
}

struct State {
    /// Oldest first.
    idle: Vec<Idle>,
    /// A sweeper runs; it ends when nothing is idle.
    sweeping: bool,
}

struct Idle {
    connection: Connection,
    since: Instant,
}

impl Pool {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            state: Mutex::new(State { idle: Vec::new(), sweeping: false }),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    /// A connection that was good a moment ago.
    pub(super) fn take(&self) -> Option<Connection> {
        let mut state = self.lock();
        while let Some(Idle { mut connection, since }) = state.idle.pop() {
            let age = clock::now().saturating_duration_since(since);
            match connection.is_quiet() {
                true if age < self.limits.idle_time => return Some(connection),
                true => drop(self.tasks.spawn(connection.quit())),
                // The server closed it, or says that it will.
                false => {}
            }
        }
        None
    }

    /// Keeps a connection that has not served enough.
    pub(super) fn put(self: &Arc<Self>, connection: Connection) {
        let mut state = self.lock();
        if self.stop.is_cancelled() {
            return;
        }
        if connection.transactions() >= self.limits.transactions {
            self.tasks.spawn(connection.quit());
            return;
        }
        state.idle.push(Idle { connection, since: clock::now() });
        if !mem::replace(&mut state.sweeping, true) {
            self.tasks.spawn(Arc::clone(self).sweep());
        }
    }

    /// No connection is kept any more; those idle are closed.
    pub(super) fn stop(&self) {
        self.stop.cancel();
    }

    /// Stops, and returns when the last QUIT is through.
    pub(super) async fn close(&self) {
        self.stop();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Closes each connection when its idle time is over, and all on stop.
    async fn sweep(self: Arc<Self>) {
        while let Some(wait) = self.next_expiry() {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.stop.cancelled() => {}
            }
            for idle in self.take_expired() {
                self.tasks.spawn(idle.connection.quit());
            }
        }
    }

    /// How long until the oldest may have to be closed; `None` ends the sweeper. There may be a surplus before.
    fn next_expiry(&self) -> Option<Duration> {
        let mut state = self.lock();
        let oldest = state.idle.first().map(|idle| idle.since);
        state.sweeping = oldest.is_some();
        let age = clock::now().saturating_duration_since(oldest?);
        Some(self.limits.idle_time.saturating_sub(age).min(self.limits.surplus_time))
    }

    fn take_expired(&self) -> Vec<Idle> {
        let mut state = self.lock();
        if self.stop.is_cancelled() {
            return mem::take(&mut state.idle);
        }
        let now = clock::now();
        let surplus = state.idle.len().saturating_sub(self.limits.idle);
        let is_over = |(at, idle): &(usize, &Idle)| {
            let time = match *at < surplus {
                true => self.limits.surplus_time.min(self.limits.idle_time),
                false => self.limits.idle_time,
            };
            now.saturating_duration_since(idle.since) >= time
        };
        let expired = state.idle.iter().enumerate().take_while(is_over).count();
        state.idle.drain(..expired).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
