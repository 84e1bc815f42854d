//! What memory keeps of the spool: a head and the places on disk for each message, and what lives in each segment.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::record::{self, Change, Place, Step};
use super::side_file::FileRef;
use crate::envelope::{Head, QueueState, SpoolId};

#[derive(Debug, Default)]
pub(super) struct Index {
    entries: BTreeMap<SpoolId, Entry>,
    pub(super) segments: BTreeMap<u64, Segment>,
    /// Octets of the side files.
    files: u64,
    notes: BTreeMap<Box<str>, Note>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) head: Head,
    pub(super) put: Place,
    /// The last record with a progress; none for a message that was never tried.
    pub(super) progress: Option<Place>,
    pub(super) file: Option<FileRef>,
    /// The last record is the mark of an attempt.
    is_attempted: bool,
}

#[derive(Debug)]
struct Note {
    bytes: Box<[u8]>,
    place: Place,
}

#[derive(Debug, Default)]
pub(super) struct Segment {
    pub(super) len: u64,
    /// Records in it that are needed: to read a message back, or for the value of a note.
    live: u64,
    /// Octets that these take in it.
    pub(super) live_octets: u64,
    /// Not to be removed: damage in it could not be put aside.
    pub(super) keep: bool,
}

impl Index {
    pub(super) fn get(&self, id: SpoolId) -> Option<&Entry> {
        self.entries.get(&id)
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
        self.files + self.segments.values().map(|segment| segment.len).sum::<u64>()
    }

    /// Where a message is; none when it is not here.
    pub(super) fn state(&self, id: SpoolId) -> Option<QueueState> {
        self.entries.get(&id).map(|entry| entry.head.state)
    }

    pub(super) fn note(&self, key: &str) -> Option<&[u8]> {
        self.notes.get(key).map(|note| &*note.bytes)
    }

    /// How many notes there are.
    pub(super) fn notes(&self) -> usize {
        self.notes.len()
    }

    /// At the end of a replay: who began the attempts that are open now is dead. Returns how many messages that leaves
    /// in doubt.
    pub(super) fn doubt_open_attempts(&mut self) -> usize {
        let open = self.entries.values_mut().filter(|entry| entry.is_attempted);
        open.map(|entry| entry.head.in_doubt = true).count()
    }

    /// Takes over a record that stands at `place`. What names a message that is not here changes nothing. Returns the
    /// side file of a message that is gone.
    pub(super) fn change(&mut self, id: SpoolId, change: &Change, place: Place) -> Option<FileRef> {
        match change {
            Change::Put { head, file } => {
                let gone = self.remove(id);
                self.files += file.as_ref().map_or(0, |file| file.len);
                self.need(place);
                let (head, file) = (*head, file.clone());
                let entry = Entry { head, put: place, progress: None, file, is_attempted: false };
                self.entries.insert(id, entry);
                gone
            }
            Change::Progress { step, due, pending, attempts } => {
                let entry = self.entries.get_mut(&id)?;
                let (state, due, pending, attempts) = (step.state(), *due, *pending, *attempts);
                entry.is_attempted = *step == Step::Attempt;
                // A new attempt settles nothing about the one before.
                let in_doubt = entry.head.in_doubt && entry.is_attempted;
                entry.head = Head { state, due, pending, attempts, in_doubt, ..entry.head };
                let old = entry.progress.replace(place);
                self.need(place);
                self.release(old);
                None
            }
            Change::Done => self.remove(id),
            Change::Note { key, bytes } => {
                let old = match bytes.is_empty() {
                    true => self.notes.remove(key),
                    false => {
                        self.need(place);
                        self.notes.insert(key.clone(), Note { bytes: bytes.clone(), place })
                    }
                };
                self.release(old.map(|note| note.place));
                None
            }
        }
    }

    /// Whether the record of `id` at `place` is one of those that a message is read back from.
    #[allow(dead_code, reason = "asked when live records are copied out of old segments")]
    pub(super) fn is_needed(&self, id: SpoolId, place: Place) -> bool {
        let entry = self.entries.get(&id);
        entry.is_some_and(|entry| entry.put == place || entry.progress == Some(place))
    }

    /// Whether the record at `place` holds the value of the note `key`.
    #[allow(dead_code, reason = "asked when live records are copied out of old segments")]
    pub(super) fn is_needed_note(&self, key: &str, place: Place) -> bool {
        self.notes.get(key).is_some_and(|note| note.place == place)
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
        self.need(to);
        self.release(Some(from));
    }

    /// The record of the note `key` at `from` was written again at `to`.
    pub(super) fn moved_note(&mut self, key: &str, from: Place, to: Place) {
        let Some(note) = self.notes.get_mut(key).filter(|note| note.place == from) else { return };
        note.place = to;
        self.need(to);
        self.release(Some(from));
    }

    /// The oldest segment, if nothing needs it.
    pub(super) fn oldest_unneeded(&self) -> Option<u64> {
        let (number, segment) = self.segments.first_key_value()?;
        (segment.live == 0 && !segment.keep).then_some(*number)
    }

    fn remove(&mut self, id: SpoolId) -> Option<FileRef> {
        let entry = self.entries.remove(&id)?;
        self.release(Some(entry.put));
        self.release(entry.progress);
        self.files -= entry.file.as_ref().map_or(0, |file| file.len);
        entry.file
    }

    fn need(&mut self, place: Place) {
        let segment = self.segments.entry(place.segment).or_default();
        segment.live += 1;
        segment.live_octets += record::octets(place);
    }

    fn release(&mut self, place: Option<Place>) {
        let Some(place) = place else { return };
        if let Some(segment) = self.segments.get_mut(&place.segment) {
            segment.live = segment.live.saturating_sub(1);
            segment.live_octets = segment.live_octets.saturating_sub(record::octets(place));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::UnixMillis;

    fn place(segment: u64, offset: u64, len: u32) -> Place {
        Place { segment, offset, len }
    }

    fn put(id: SpoolId) -> Change {
        let due = UnixMillis(1);
        let state = QueueState::Queued;
        let head = Head { id, state, due, size: 5, pending: 2, attempts: 0, in_doubt: false };
        Change::Put { head, file: None }
    }

    fn update(attempts: u16) -> Change {
        Change::Progress { step: Step::Update, due: UnixMillis(2), pending: 2, attempts }
    }

    fn note(bytes: &[u8]) -> Change {
        Change::Note { key: "k".into(), bytes: bytes.into() }
    }

    fn live(index: &Index) -> Vec<(u64, u64, u64)> {
        let segments = index.segments.iter();
        segments.map(|(number, of)| (*number, of.live, of.live_octets)).collect()
    }

    #[test]
    fn a_segment_counts_the_records_in_it_that_are_needed() {
        let (first, second) = (1 << 40 | 7, 2 << 40 | 7);
        let id = SpoolId::from_u128;
        let mut index = Index::default();
        let [put_at, old, last] = [(first, 64, 17), (first, 160, 80), (second, 64, 0)]
            .map(|(segment, offset, len)| place(segment, offset, len));
        let (noted, noted_again) = (place(first, 320, 40), place(second, 128, 16));
        index.change(id(1), &put(id(1)), put_at);
        index.change(id(1), &update(1), old);
        index.change(id(0), &note(b"one"), noted);
        // A header of 48 octets, and in multiples of 16.
        assert_eq!(live(&index), [(first, 3, 80 + 128 + 96)]);
        assert!(index.is_needed(id(1), put_at) && index.is_needed(id(1), old));
        assert!(!index.is_needed(id(1), last) && !index.is_needed(id(2), put_at));
        assert!(index.is_needed_note("k", noted) && !index.is_needed_note("l", noted));
        index.change(id(1), &update(2), last);
        index.change(id(0), &note(b"two"), noted_again);
        assert_eq!(live(&index), [(first, 1, 80), (second, 2, 48 + 64)]);
        assert!(index.is_needed(id(1), last) && !index.is_needed(id(1), old));
        assert!(index.is_needed_note("k", noted_again) && !index.is_needed_note("k", noted));
        assert_eq!(index.oldest_unneeded(), None);
        index.moved(id(1), put_at, place(second, 256, 17));
        index.moved(id(1), old, place(second, 512, 80));
        index.moved_note("k", noted, place(second, 512, 40));
        assert_eq!(live(&index), [(first, 0, 0), (second, 3, 80 + 48 + 64)]);
        assert_eq!(index.oldest_unneeded(), Some(first));
        index.moved_note("k", noted_again, place(first, 640, 16));
        assert_eq!(live(&index), [(first, 1, 64), (second, 2, 80 + 48)]);
        index.change(id(1), &Change::Done, place(second, 640, 16));
        index.change(id(0), &note(b""), place(second, 640, 16));
        assert_eq!(live(&index), [(first, 0, 0), (second, 0, 0)]);
        assert_eq!((index.len(), index.notes()), (0, 0));
    }
}
