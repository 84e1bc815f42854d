//! What memory keeps of the spool: a head and the places on disk for each message, and what lives in each segment.

use std::collections::BTreeMap;
use std::ops::Bound;

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
    pub(super) fn get(&self, id: SpoolId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    pub(super) fn contains(&self, id: SpoolId) -> bool {
        self.entries.contains_key(&id)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&SpoolId, &Entry)> {
        self.entries.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn heads(&self, after: Option<SpoolId>, n: usize) -> Vec<Head> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let range = self.entries.range((from, Bound::Unbounded));
        range.take(n).map(|(_, entry)| entry.head).collect()
    }

    /// Octets on disk.
    pub(super) fn used(&self) -> u64 {
        self.files + self.spares + self.segments.values().map(|segment| segment.len).sum::<u64>()
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
                gone
            }
            Change::Progress { state, due, pending, attempts } => {
                let entry = self.entries.get_mut(&id)?;
                let (state, due, pending, attempts) = (*state, *due, *pending, *attempts);
                entry.head = Head { state, due, pending, attempts, ..entry.head };
                let old = entry.progress.replace(place);
                self.claim(place);
                self.release(old);
                None
            }
            Change::Done => self.remove(id),
        }
    }

    /// The record of `id` at `from` was written again at `to`.
    pub(super) fn moved(&mut self, id: SpoolId, from: Place, to: Place) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if entry.put == from {
            entry.put = to;
        } else if entry.progress == Some(from) {
            entry.progress = Some(to);
        } else {
            return;
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

    fn release(&mut self, place: Option<Place>) {
        let Some(place) = place else { return };
        if let Some(segment) = self.segments.get_mut(&place.segment) {
            segment.live = segment.live.saturating_sub(1);
            segment.octets = segment.octets.saturating_sub(place.len_on_disk());
        }
    }
}
