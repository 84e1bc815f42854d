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
    /// Octets of the spares.
    pub(super) spares: u64,
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
    /// Records in it that are needed to read a message back, and the octets that they take.
    live: u64,
    octets: u64,
    /// Not to be removed: damage in it could not be put aside.
    pub(super) keep: bool,
    /// Nothing is to be written over it: a write to it or a sync failed, or it has a second name among what is damaged.
    pub(super) is_last_use: bool,
}

/// Where the records of a message stand.
pub(super) struct Living {
    pub(super) id: SpoolId,
    pub(super) put: Place,
    pub(super) progress: Option<Place>,
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
            + self.spares
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
                self.claim(place);
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
                self.claim(place);
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
                    self.claim(place);
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
        self.claim(to);
        self.release(Some(from));
    }

    /// The oldest segment, if nothing needs it.
    pub(super) fn oldest_unneeded(&self) -> Option<u64> {
        let (number, segment) = self.segments.first_key_value()?;
        (segment.live == 0 && !segment.keep).then_some(*number)
    }

    /// The oldest segment and the octets that live in it, if these are to be written again: they are less than half of
    /// it, or the log is longer than twice what lives. Never while the log has no more than `few` segments.
    pub(super) fn oldest_to_copy(&self, few: usize) -> Option<(u64, u64)> {
        let (number, oldest) = self.segments.first_key_value()?;
        if self.segments.len() <= few || oldest.keep {
            return None;
        }
        let sum = |octets: fn(&Segment) -> u64| self.segments.values().map(octets).sum::<u64>();
        let is_worth = oldest.octets * 2 < oldest.len || sum(|s| s.len) > 2 * sum(|s| s.octets);
        is_worth.then_some((*number, oldest.octets))
    }

    /// The messages after `after` of which a record stands in `segment`, as far as those lie among the next `n`
    /// messages, or until they have `octets` octets. And the last one that was looked at; `None` at the end.
    pub(super) fn in_segment(
        &self,
        segment: u64,
        after: Option<SpoolId>,
        n: usize,
        octets: u64,
    ) -> (Vec<Living>, Option<SpoolId>) {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut found = Vec::new();
        let (mut seen, mut taken) = (0, 0);
        for (id, entry) in self.entries.range((from, Bound::Unbounded)) {
            let is_here = |place: &Place| place.segment == segment;
            if is_here(&entry.put) || entry.progress.as_ref().is_some_and(is_here) {
                taken += u64::from(entry.put.len);
                found.push(Living { id: *id, put: entry.put, progress: entry.progress });
            }
            seen += 1;
            if seen == n || taken >= octets {
                return (found, Some(*id));
            }
        }
        (found, None)
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

    fn claim(&mut self, place: Place) {
        let segment = self.segments.entry(place.segment).or_default();
        segment.live += 1;
        segment.octets += place.len_on_disk();
    }

    pub(super) fn release(&mut self, place: Option<Place>) {
        let Some(place) = place else { return };
        if let Some(segment) = self.segments.get_mut(&place.segment) {
            segment.live = segment.live.saturating_sub(1);
            segment.octets = segment.octets.saturating_sub(place.len_on_disk());
        }
    }
}
