//! What memory keeps of the spool: a head and the places on disk for each message, and what lives in each segment.

use std::collections::BTreeMap;
use std::iter;
use std::ops::Bound;

use super::failed::{Cabinet, Filed};
use super::record::{Change, Place};
use super::side_file::FileRef;
use crate::envelope::{Head, SpoolId};

#[derive(Debug, Default)]
pub(super) struct Index {
    entries: BTreeMap<SpoolId, Entry>,
    pub(super) segments: BTreeMap<u64, Segment>,
    /// Octets of the side files.
    files: u64,
    pub(super) failed: Cabinet,
}

/// Where a message is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lies {
    Log(Entry),
    Files(Filed),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) head: Head,
    pub(super) put: Place,
    /// The last record with a progress; none for a message that was never tried.
    pub(super) progress: Option<Place>,
    pub(super) file: Option<FileRef>,
}

#[derive(Debug, Default)]
pub(super) struct Segment {
    pub(super) len: u64,
    /// Records in it that are needed to read a message back.
    live: u64,
    /// Not to be removed: damage in it could not be put aside.
    pub(super) keep: bool,
}

impl Index {
    pub(super) fn new(failed: Cabinet) -> Self {
        Self { failed, ..Self::default() }
    }

    pub(super) fn get(&self, id: SpoolId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    pub(super) fn find(&self, id: SpoolId) -> Option<Lies> {
        match self.entries.get(&id) {
            Some(entry) => Some(Lies::Log(entry.clone())),
            None => self.failed.get(id).cloned().map(Lies::Files),
        }
    }

    pub(super) fn contains(&self, id: SpoolId) -> bool {
        self.entries.contains_key(&id) || self.failed.contains(id)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&SpoolId, &Entry)> {
        self.entries.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len() + self.failed.len()
    }

    pub(super) fn heads(&self, after: Option<SpoolId>, n: usize) -> Vec<Head> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let range = self.entries.range((from, Bound::Unbounded));
        let mut logged = range.map(|(_, entry)| entry.head).peekable();
        let mut filed = self.failed.heads(from).peekable();
        let next = || match (logged.peek(), filed.peek()) {
            (Some(one), Some(other)) if one.id > other.id => filed.next(),
            (Some(_), _) => logged.next(),
            (None, _) => filed.next(),
        };
        iter::from_fn(next).take(n).collect()
    }

    /// Octets on disk.
    pub(super) fn used(&self) -> u64 {
        self.files
            + self.failed.octets()
            + self.segments.values().map(|segment| segment.len).sum::<u64>()
    }

    /// Takes over a record that stands at `place`. What names a message that is not here changes nothing. Returns the
    /// side file of a message that is gone.
    pub(super) fn change(&mut self, id: SpoolId, change: &Change, place: Place) -> Option<FileRef> {
        match change {
            Change::Put { head, file } => {
                let gone = self.remove(id);
                self.files += file.as_ref().map_or(0, |file| file.len);
                self.segments.entry(place.segment).or_default().live += 1;
                let entry = Entry { head: *head, put: place, progress: None, file: file.clone() };
                self.entries.insert(id, entry);
                self.failed.changed(id, head.state);
                gone
            }
            Change::Progress { state, due, pending, attempts } => {
                let entry = self.entries.get_mut(&id)?;
                let (state, due, pending, attempts) = (*state, *due, *pending, *attempts);
                entry.head = Head { state, due, pending, attempts, ..entry.head };
                let old = entry.progress.replace(place);
                self.segments.entry(place.segment).or_default().live += 1;
                self.release(old);
                self.failed.changed(id, state);
                None
            }
            Change::Filed { at, len } => {
                let head = self.get(id).map(|entry| entry.head);
                let mark = self.failed.file(id, head, *at, *len);
                self.release(mark);
                self.remove(id)
            }
            Change::Done => {
                let (has_files, old) = self.failed.done(id, place);
                if has_files {
                    // It must not go before the files.
                    self.segments.entry(place.segment).or_default().live += 1;
                }
                self.release(old);
                self.remove(id)
            }
        }
    }

    /// The record of `id` at `from` was written again at `to`.
    pub(super) fn moved(&mut self, id: SpoolId, from: Place, to: Place) {
        match self.entries.get_mut(&id) {
            Some(entry) if entry.put == from => entry.put = to,
            Some(entry) if entry.progress == Some(from) => entry.progress = Some(to),
            _ if self.failed.moved(id, from, to) => {}
            _ => return,
        }
        self.segments.entry(to.segment).or_default().live += 1;
        self.release(Some(from));
    }

    /// The oldest segment, if nothing needs it.
    pub(super) fn oldest_unneeded(&self) -> Option<u64> {
        let (number, segment) = self.segments.first_key_value()?;
        (segment.live == 0 && !segment.keep).then_some(*number)
    }

    /// The files of a message that is done are gone for good.
    pub(super) fn forget_files(&mut self, id: SpoolId) {
        let mark = self.failed.forget(id);
        self.release(mark);
    }

    fn remove(&mut self, id: SpoolId) -> Option<FileRef> {
        let entry = self.entries.remove(&id)?;
        self.release(Some(entry.put));
        self.release(entry.progress);
        self.files -= entry.file.as_ref().map_or(0, |file| file.len);
        entry.file
    }

    pub(super) fn release(&mut self, place: Option<Place>) {
        let segment = place.and_then(|place| self.segments.get_mut(&place.segment));
        if let Some(segment) = segment {
            segment.live = segment.live.saturating_sub(1);
        }
    }
}
