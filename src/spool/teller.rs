//! The teller's thread: it answers what a batch has brought to disk while the writer writes the next one. To wake so many
//! who wait takes as long as a tenth of the disk's own work.

use std::io;
use std::sync::mpsc::{self, SendError, Sender};
use std::thread::{Builder, JoinHandle};

use super::writer::Request;

/// So few are answered sooner at once than by another thread.
const FEW: usize = 8;

/// Dropped when the writer ends, and then all are answered.
pub(super) struct Teller {
    batches: Option<Sender<Vec<Request>>>,
    thread: Option<JoinHandle<()>>,
}

impl Teller {
    pub(super) fn start() -> io::Result<Self> {
        // Not more than there are places in the writer's queue.
        let (send, receive) = mpsc::channel();
        let tell = move || receive.into_iter().for_each(answer);
        let thread = Builder::new().name("spool-teller".to_owned()).spawn(tell)?;
        Ok(Self { batches: Some(send), thread: Some(thread) })
    }

    /// All of `batch` has succeeded.
    pub(super) fn tell(&self, batch: Vec<Request>) {
        let handed_over = match &self.batches {
            Some(batches) if batch.len() > FEW => batches.send(batch),
            _ => Err(SendError(batch)),
        };
        if let Err(SendError(batch)) = handed_over {
            answer(batch);
        }
    }
}

fn answer(batch: Vec<Request>) {
    batch.into_iter().for_each(|request| request.answer(Ok(())));
}

impl Drop for Teller {
    fn drop(&mut self) {
        drop(self.batches.take());
        if let Some(thread) = self.thread.take() {
            // What it had in hand is answered as closed if it panicked.
            drop(thread.join());
        }
    }
}
