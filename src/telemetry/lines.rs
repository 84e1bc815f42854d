//! Lines on their way to standard error.
//!
//! They are gathered in one buffer, and a thread of its own writes it out: whoever logs pays for a copy, not for a system
//! call, nor for waking the thread up, which happens once in a buffer.

use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::clock;

/// Longest time that a line waits in memory.
const FLUSH_EVERY: Duration = Duration::from_millis(100);
/// Octets that are gathered before they are written.
const BUFFER: usize = 64 * 1024;
/// Octets that wait for the thread. Beyond them (whoever reads the log is stuck) lines are dropped: mail goes on.
const MOST: usize = 4 * 1024 * 1024;

#[derive(Debug, Default)]
pub(crate) struct Lines {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    text: Vec<u8>,
    /// To be told when all that was there before is written.
    tell: Vec<oneshot::Sender<()>>,
    is_ended: bool,
}

impl Waiting {
    fn is_urgent(&self) -> bool {
        self.text.len() >= BUFFER || !self.tell.is_empty() || self.is_ended
    }
}

impl Lines {
    /// False: there was no room for it.
    pub(super) fn push(&self, line: &[u8]) -> bool {
        let mut waiting = self.waiting();
        let before = waiting.text.len();
        if before + line.len() > MOST {
            return false;
        }
        waiting.text.extend_from_slice(line);
        let is_full = before < BUFFER && waiting.text.len() >= BUFFER;
        drop(waiting);
        if before == 0 || is_full {
            self.changed.notify_one();
        }
        true
    }

    /// Tells when all that was pushed before is written; an error where that is not to be.
    pub(super) fn written(&self) -> oneshot::Receiver<()> {
        let (tell, told) = oneshot::channel();
        self.waiting().tell.push(tell);
        self.changed.notify_one();
        told
    }

    /// What is asked for by [`Lines::written`] now, for whoever takes the thread's place.
    #[cfg(test)]
    pub(crate) fn asked(&self) -> Vec<oneshot::Sender<()>> {
        mem::take(&mut self.waiting().tell)
    }

    /// Writes until the end.
    fn write(&self) {
        let mut text = Vec::with_capacity(BUFFER);
        loop {
            let mut waiting = self.waiting();
            while waiting.text.is_empty() && !waiting.is_urgent() {
                waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            let deadline = clock::now() + FLUSH_EVERY;
            while !waiting.is_urgent() {
                let left = deadline.saturating_duration_since(clock::now());
                if left.is_zero() {
                    break;
                }
                let waited = self.changed.wait_timeout(waiting, left);
                waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            mem::swap(&mut text, &mut waiting.text);
            let (tell, is_ended) = (mem::take(&mut waiting.tell), waiting.is_ended);
            drop(waiting);
            // Nobody is left to tell when standard error is gone.
            drop(io::stderr().write_all(&text));
            text.clear();
            // What grew while standard error was stuck.
            text.shrink_to(2 * BUFFER);
            // Who no longer waits does not want to know.
            tell.into_iter().for_each(|tell| tell.send(()).unwrap_or_default());
            if is_ended {
                return;
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes what is left when it goes.
#[derive(Debug)]
pub struct Guard {
    lines: Arc<Lines>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    pub(super) fn start() -> io::Result<(Arc<Lines>, Self)> {
        let lines = Arc::new(Lines::default());
        let taken = Arc::clone(&lines);
        let thread =
            std::thread::Builder::new().name("log".to_owned()).spawn(move || taken.write())?;
        Ok((Arc::clone(&lines), Self { lines, thread: Some(thread) }))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.lines.waiting().is_ended = true;
        self.lines.changed.notify_one();
        // Where standard error is stuck, so is the exit, for as long.
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_room_is_dropped_and_what_has_is_kept() {
        let lines = Lines::default();
        let line = vec![b'x'; MOST / 4];
        for _ in 0..4 {
            assert!(lines.push(&line));
        }
        assert!(!lines.push(b"x"), "nobody takes them");
        assert_eq!(lines.waiting().text.len(), MOST);
    }

    #[test]
    fn who_waits_is_told_at_once_and_at_the_end() {
        let (lines, guard) = Guard::start().unwrap();
        let told = lines.written();
        told.blocking_recv().unwrap();
        let told = lines.written();
        drop(guard);
        told.blocking_recv().unwrap();
    }
}
