//! Messages that came a moment ago, in memory until they are opened for the first time: the first attempt follows at
//! once where mail flows, and need not read them back.

use std::collections::HashMap;
use std::sync::Mutex;

use bytes::Bytes;

use super::lock;
use crate::envelope::{Envelope, Rcpt, SpoolId};

/// Octets that are counted for what an envelope and each of its recipients take beside the content.
const ENVELOPE: usize = 1024;

#[derive(Debug)]
pub(super) struct Fresh {
    /// In octets.
    most: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    messages: HashMap<SpoolId, (Envelope, Bytes)>,
    octets: usize,
}

impl Fresh {
    pub(super) fn new(most: usize) -> Self {
        Self { most, kept: Mutex::default() }
    }

    /// Not where there is no room: it is read back from disk then. None of those that are here makes room, for they are
    /// opened sooner.
    pub(super) fn keep(&self, envelope: Envelope, content: Bytes) {
        let octets = octets(&envelope, &content);
        let mut kept = lock(&self.kept);
        if kept.octets + octets <= self.most {
            kept.octets += octets;
            kept.messages.insert(envelope.id, (envelope, content));
        }
    }

    pub(super) fn take(&self, id: SpoolId) -> Option<(Envelope, Bytes)> {
        let mut kept = lock(&self.kept);
        let (envelope, content) = kept.messages.remove(&id)?;
        kept.octets -= octets(&envelope, &content);
        Some((envelope, content))
    }

    /// An attempt at it does not come soon.
    pub(super) fn forget(&self, id: SpoolId) {
        drop(self.take(id));
    }
}

fn octets(envelope: &Envelope, content: &Bytes) -> usize {
    let paths = |rcpt: &Rcpt| size_of::<Rcpt>() + rcpt.path.as_str().len();
    let rcpts: usize = envelope.rcpts.iter().map(paths).sum();
    content.len() + envelope.prepend.len() + rcpts + ENVELOPE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spool::tests::envelope as new_envelope;

    #[test]
    fn what_finds_no_room_is_not_kept_and_each_is_given_once() {
        let content = Bytes::from(vec![b'x'; 10_000]);
        let fresh = Fresh::new(25_000);
        let ids: Vec<_> = (1..=4).map(SpoolId::from_u128).collect();
        let keep = |id: &SpoolId| {
            fresh.keep(Envelope { id: *id, ..new_envelope(1) }, content.clone());
        };
        let taken = |ids: &[SpoolId]| -> Vec<_> {
            ids.iter().map(|id| fresh.take(*id).is_some()).collect()
        };
        ids.iter().take(3).for_each(keep);
        assert_eq!(taken(&ids[..1]), [true]);
        ids.iter().skip(3).for_each(keep);
        assert_eq!(taken(&ids), [false, true, false, true]);
        assert_eq!(lock(&fresh.kept).octets, 0);
    }
}
