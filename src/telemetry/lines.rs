//! Lines on their way to standard error.
//!
//! They are gathered in one buffer, and a thread of its own writes it out: whoever logs pays for a copy, not for a system
//! call, nor for waking the thread up, which happens once in a buffer.

use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::clock;

/// Longest time that a line waits in memory.
const FLUSH_EVERY: Duration = Duration::from_millis(100);
/// Before a pipe that was full is tried again.
const FULL_PIPE: Duration = Duration::from_millis(10);
/// How long a pipe that stays full is tried at the end.
const LAST_WAIT: Duration = Duration::from_secs(2);
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
    /// Some of what was there before had no room.
    has_dropped: bool,
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
            waiting.has_dropped = true;
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
        let mut waiting = self.waiting();
        // Those who gave up waiting.
        waiting.tell.retain(|tell| !tell.is_closed());
        waiting.tell.push(tell);
        drop(waiting);
        self.changed.notify_one();
        told
    }

    /// What is asked for by [`Lines::written`] now, for whoever takes the thread's place.
    #[cfg(test)]
    pub(crate) fn asked(&self) -> Vec<oneshot::Sender<()>> {
        mem::take(&mut self.waiting().tell)
    }

    /// Writes to `out` until the end, and says of how many lines it came to nothing.
    fn write(&self, mut out: impl Write, lost: impl Fn(u64)) {
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
            let has_dropped = mem::take(&mut waiting.has_dropped);
            drop(waiting);
            let left = write_out(&mut out, &text, || self.waiting().is_ended);
            lost(left.iter().filter(|octet| **octet == b'\n').count() as u64);
            let is_written = left.is_empty() && !has_dropped;
            text.clear();
            // What grew while standard error was stuck.
            text.shrink_to(2 * BUFFER);
            // Who no longer waits does not want to know; who is not told has an error.
            for tell in tell.into_iter().filter(|_| is_written) {
                tell.send(()).unwrap_or_default();
            }
            if is_ended {
                return;
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes `text`, and returns what could not be: nothing where all went well. A pipe that whoever shares it has made
/// non-blocking is waited for like any other, but not for ever once `is_ended`.
fn write_out<'a>(out: &mut impl Write, text: &'a [u8], is_ended: impl Fn() -> bool) -> &'a [u8] {
    let mut left = text;
    let mut deadline: Option<Instant> = None;
    while !left.is_empty() {
        match out.write(left) {
            Ok(0) => break,
            Ok(written) => left = left.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if is_ended() {
                    let now = clock::now();
                    if now >= *deadline.get_or_insert(now + LAST_WAIT) {
                        break;
                    }
                }
                std::thread::park_timeout(FULL_PIPE);
            }
            // Nobody is left to tell when standard error is gone.
            Err(_) => break,
        }
    }
    left
}

/// Writes what is left when it goes.
#[derive(Debug)]
pub struct Guard {
    lines: Arc<Lines>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    /// `lost` is told of lines that could not be written.
    pub(super) fn start(lost: impl Fn(u64) + Send + 'static) -> io::Result<(Arc<Lines>, Self)> {
        let lines = Arc::new(Lines::default());
        let taken = Arc::clone(&lines);
        let thread = std::thread::Builder::new().name("log".to_owned());
        let thread = thread.spawn(move || taken.write(io::stderr(), lost))?;
        Ok((Arc::clone(&lines), Self { lines, thread: Some(thread) }))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.lines.waiting().is_ended = true;
        self.lines.changed.notify_one();
        // Where a write blocks, so does the exit, for as long.
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

    /// Takes so many octets at a time, and says between two that it is full; after so many it is gone.
    struct Pipe {
        at_once: usize,
        room: usize,
        is_full: bool,
        taken: Vec<u8>,
    }

    impl Write for Pipe {
        fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
            self.is_full = !self.is_full;
            if self.is_full {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let n = self.at_once.min(octets.len()).min(self.room);
            if n == 0 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            self.room -= n;
            self.taken.extend_from_slice(&octets[..n]);
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_pipe_that_is_full_is_waited_for_and_what_a_broken_one_left_is_lost() {
        let mut pipe = Pipe { at_once: 4, room: 100, is_full: false, taken: Vec::new() };
        assert_eq!(write_out(&mut pipe, b"one\ntwo\nthree\n", || true), b"");
        assert_eq!(pipe.taken, b"one\ntwo\nthree\n");
        pipe.room = 6;
        assert_eq!(write_out(&mut pipe, b"four\nfive\nsix\n", || false), b"ive\nsix\n");
    }

    struct Stuck;

    impl Write for Stuck {
        fn write(&mut self, _octets: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_pipe_that_stays_full_does_not_keep_the_end_waiting() {
        let lines = Lines::default();
        lines.push(b"one\ntwo\n");
        lines.waiting().is_ended = true;
        let lost = std::cell::Cell::new(0);
        lines.write(Stuck, |n| lost.set(lost.get() + n));
        assert_eq!(lost.get(), 2);
    }

    #[test]
    fn nobody_is_told_that_lines_are_written_which_are_not() {
        let lines = Lines::default();
        lines.push(b"one\ntwo\n");
        let told = lines.written();
        lines.waiting().is_ended = true;
        let lost = std::cell::Cell::new(0);
        let gone = Pipe { at_once: 4, room: 4, is_full: false, taken: Vec::new() };
        lines.write(gone, |n| lost.set(lost.get() + n));
        assert_eq!(lost.get(), 1);
        assert!(told.blocking_recv().is_err());
        // And what had no room.
        lines.push(&vec![b'x'; MOST]);
        assert!(!lines.push(b"x"));
        let told = lines.written();
        lines.write(io::sink(), |n| assert_eq!(n, 0));
        assert!(told.blocking_recv().is_err());
        let told = lines.written();
        lines.write(io::sink(), drop);
        told.blocking_recv().unwrap();
    }

    #[test]
    fn who_gave_up_waiting_is_forgotten() {
        let lines = Lines::default();
        for _ in 0..100 {
            drop(lines.written());
        }
        assert_eq!(lines.asked().len(), 1);
    }

    #[test]
    fn who_waits_is_told_at_once_and_at_the_end() {
        let (lines, guard) = Guard::start(drop).unwrap();
        let told = lines.written();
        told.blocking_recv().unwrap();
        let told = lines.written();
        drop(guard);
        told.blocking_recv().unwrap();
    }
}
