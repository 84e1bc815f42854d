//! What memory keeps of the spool: a head and the places on disk for each message, and what lives in each segment.
//!
//! A million small messages are to cost little: an entry is 48 octets beside its id, kept in an [`OrderedMap`]. The
//! number of a segment is told by a *slot*, and what few messages have, a side file, stands apart.

use std::collections::BTreeMap;
use std::iter;
use std::num::NonZeroU32;
use std::ops::Bound;

use super::failed::{Cabinet, Filed};
use super::record::{ALIGN, Change, Place, Record, Step};
use super::side_file::FileRef;
use crate::envelope::{Head, QueueState, SpoolId, UnixMillis};
use crate::ordered::OrderedMap;

#[derive(Debug, Default)]
pub(super) struct Index {
    entries: OrderedMap<SpoolId, Packed>,
    pub(super) segments: BTreeMap<u64, Segment>,
    slots: Slots,
    files: BTreeMap<SpoolId, FileRef>,
    /// Octets of the side files, as their records have it: a sum of those can be too long for 64 bits.
    in_files: u128,
    /// Octets of the contents of `entries`, in the same way.
    contents: u128,
    /// How many of `entries` may have been taken.
    in_doubt: usize,
    notes: BTreeMap<Box<str>, Note>,
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

/// What is known of a message in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) put: Place,
    /// The last record with a progress; none for a message that was never tried.
    pub(super) progress: Option<Place>,
}

/// [`Entry`] and head, as they are kept.
#[derive(Debug)]
struct Packed {
    due: UnixMillis,
    size: u64,
    put: PackedPlace,
    progress: Option<PackedPlace>,
    pending: u32,
    attempts: u16,
    state: QueueState,
    attempt: Attempt,
}

/// Whether the message has an attempt of which no outcome was written, and whether one before may have reached someone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    None,
    Doubtful,
    Open,
    OpenDoubtful,
    /// A former run began it.
    InDoubt,
}

impl Attempt {
    fn none(is_doubtful: bool) -> Self {
        if is_doubtful { Self::Doubtful } else { Self::None }
    }

    fn open(is_doubtful: bool) -> Self {
        if is_doubtful { Self::OpenDoubtful } else { Self::Open }
    }
}

/// A [`Place`] in 12 octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PackedPlace {
    slot: NonZeroU32,
    /// In multiples of [`ALIGN`], so that it reaches to 64 GiB: no batch comes near.
    offset: u32,
    len: u32,
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
    pub(super) octets: u64,
    /// Not to be removed: damage in it could not be put aside.
    pub(super) keep: bool,
    /// Nothing is to be written over it: a write to it or a sync failed, or it has a second name among what is damaged.
    pub(super) is_last_use: bool,
    /// What packed places call it; it has one while something lives in it.
    slot: Option<NonZeroU32>,
}

#[cfg(test)]
impl Segment {
    /// What needs it.
    pub(super) fn needs(&self) -> String {
        format!("{} records, {} octets of {}", self.live, self.octets, self.len)
    }
}

/// The numbers of segments by slot, counted from 1.
#[derive(Debug, Default)]
struct Slots {
    numbers: Vec<u64>,
    free: Vec<NonZeroU32>,
}

impl Slots {
    fn take(&mut self, number: u64) -> NonZeroU32 {
        if let Some(slot) = self.free.pop() {
            if let Some(at) = self.numbers.get_mut(Self::at(slot)) {
                *at = number;
            }
            return slot;
        }
        self.numbers.push(number);
        let slot = u32::try_from(self.numbers.len()).ok().and_then(NonZeroU32::new);
        slot.expect("there are fewer segments than 2^32")
    }

    fn at(slot: NonZeroU32) -> usize {
        slot.get() as usize - 1
    }

    /// The number of the segment in `slot`.
    fn number(&self, slot: NonZeroU32) -> u64 {
        self.numbers.get(Self::at(slot)).copied().unwrap_or_default()
    }

    fn unpack(&self, place: PackedPlace) -> Place {
        let offset = u64::from(place.offset) * ALIGN as u64;
        Place { segment: self.number(place.slot), offset, len: place.len }
    }
}

/// Where the records of a message stand.
pub(super) struct Living {
    pub(super) id: SpoolId,
    pub(super) put: Place,
    pub(super) progress: Option<Place>,
}

impl Packed {
    fn head(&self, id: SpoolId) -> Head {
        Head {
            id,
            state: self.state,
            due: self.due,
            size: self.size,
            pending: self.pending,
            attempts: self.attempts,
            in_doubt: self.attempt == Attempt::InDoubt,
        }
    }

    /// Whether it is still to be delivered and may have been taken: 1, to be counted.
    fn doubts(&self) -> usize {
        let is_in_doubt = match self.attempt {
            Attempt::Doubtful | Attempt::OpenDoubtful | Attempt::InDoubt => true,
            Attempt::None | Attempt::Open => false,
        };
        usize::from(is_in_doubt && self.state != QueueState::Failed)
    }
}

impl Index {
    pub(super) fn new(failed: Cabinet) -> Self {
        Self { failed, ..Self::default() }
    }

    /// A message in the log.
    pub(super) fn get(&self, id: SpoolId) -> Option<Entry> {
        let entry = self.entries.get(&id)?;
        let progress = entry.progress.map(|place| self.unpack(place));
        Some(Entry { put: self.unpack(entry.put), progress })
    }

    /// The side file of a message that has one.
    pub(super) fn file(&self, id: SpoolId) -> Option<&FileRef> {
        self.files.get(&id)
    }

    pub(super) fn find(&self, id: SpoolId) -> Option<Lies> {
        match self.get(id) {
            Some(entry) => Some(Lies::Log(entry)),
            None => self.failed.get(id).cloned().map(Lies::Files),
        }
    }

    pub(super) fn head(&self, id: SpoolId) -> Option<Head> {
        let logged = self.entries.get(&id).map(|entry| entry.head(id));
        logged.or_else(|| self.failed.get(id).map(|filed| filed.head))
    }

    /// The heads from the first id after `after`, in the order of their ids.
    pub(super) fn heads(&self, after: Option<SpoolId>) -> impl Iterator<Item = Head> {
        let logged = self.entries.iter_after(after).map(|(id, entry)| entry.head(*id));
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let (mut logged, mut filed) = (logged.peekable(), self.failed.heads(from).peekable());
        iter::from_fn(move || match (logged.peek(), filed.peek()) {
            (Some(one), Some(other)) if one.id > other.id => filed.next(),
            (Some(_), _) => logged.next(),
            (None, _) => filed.next(),
        })
    }

    /// The side files of messages.
    pub(super) fn files(&self) -> impl Iterator<Item = (&SpoolId, &FileRef)> {
        self.files.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len() + self.failed.len()
    }

    /// Octets on disk.
    pub(super) fn used(&self) -> u64 {
        let in_files = u64::try_from(self.in_files).unwrap_or(u64::MAX);
        self.segments
            .values()
            .map(|segment| segment.len)
            .chain([self.spares, self.failed.octets()])
            .fold(in_files, u64::saturating_add)
    }

    /// Octets of the contents of all messages, failed ones too.
    pub(super) fn contents(&self) -> u64 {
        u64::try_from(self.contents).unwrap_or(u64::MAX).saturating_add(self.failed.contents())
    }

    /// The state of a message in the log.
    pub(super) fn state(&self, id: SpoolId) -> Option<QueueState> {
        self.entries.get(&id).map(|entry| entry.state)
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
        let (mut n, mut in_doubt) = (0, 0);
        self.entries.for_each_mut(|entry| {
            if let Attempt::Open | Attempt::OpenDoubtful = entry.attempt {
                entry.attempt = Attempt::InDoubt;
                n += 1;
            }
            in_doubt += entry.doubts();
        });
        self.in_doubt = in_doubt;
        n
    }

    /// Messages, queued or held, that may have been taken.
    pub(super) fn in_doubt(&self) -> usize {
        self.in_doubt
    }

    /// Takes over a record that stands at `place`. What names a message that is not here changes nothing. Returns the
    /// side file of a message that is gone.
    pub(super) fn change(&mut self, id: SpoolId, change: &Change, place: Place) -> Option<FileRef> {
        match change {
            Change::Put { head, file } => {
                let gone = self.remove(id);
                if let Some(file) = file {
                    self.in_files += u128::from(file.len);
                    self.files.insert(id, file.clone());
                }
                let Head { id: _, state, due, size, pending, attempts, in_doubt: _ } = *head;
                let (put, attempt) = (self.claim(place), Attempt::None);
                let entry =
                    Packed { due, size, put, progress: None, pending, attempts, state, attempt };
                self.entries.insert(id, entry);
                self.contents += u128::from(size);
                let mark = self.failed.changed(id, state);
                self.release(mark);
                gone
            }
            Change::Progress { step, due, pending, attempts, is_doubtful } => {
                if !self.entries.contains_key(&id) {
                    return None;
                }
                let place = self.claim(place);
                let entry = self.entries.get_mut(&id)?;
                let old = entry.progress.replace(place);
                let doubts_before = entry.doubts();
                entry.state = step.state();
                entry.due = *due;
                entry.pending = *pending;
                entry.attempts = *attempts;
                entry.attempt = match (step, entry.attempt) {
                    // A new attempt settles nothing about the one before.
                    (Step::Attempt, Attempt::InDoubt) => Attempt::InDoubt,
                    (Step::Attempt, _) => Attempt::open(*is_doubtful),
                    (Step::Update | Step::Hold | Step::Fail | Step::Requeue | Step::Release, _) => {
                        Attempt::none(*is_doubtful)
                    }
                };
                self.in_doubt = self.in_doubt.saturating_sub(doubts_before) + entry.doubts();
                self.release_packed(old);
                let mark = self.failed.changed(id, step.state());
                self.release(mark);
                None
            }
            Change::Filed { at, len } => {
                let mark = self.failed.file(id, self.head(id), *at, *len);
                self.release(mark);
                self.remove(id)
            }
            Change::Index => None,
            Change::Done | Change::DoneInFiles => {
                let (has_files, old) = self.failed.done(id, place);
                if has_files {
                    // It must not go before the files.
                    self.claim(place);
                }
                self.release(old);
                self.remove(id)
            }
            Change::Note { key, bytes } => {
                let old = match bytes.is_empty() {
                    true => self.notes.remove(key),
                    false => {
                        self.claim(place);
                        self.notes.insert(key.clone(), Note { bytes: bytes.clone(), place })
                    }
                };
                self.release(old.map(|note| note.place));
                None
            }
        }
    }

    /// Whether the record of `id` at `place` is one of those that a message is read back from.
    fn is_needed(&self, id: SpoolId, place: Place) -> bool {
        let entry = self.get(id);
        entry.is_some_and(|entry| entry.put == place || entry.progress == Some(place))
    }

    /// `record`, which stood at `from`, was written again at `to`.
    pub(super) fn moved_record(&mut self, record: &Record, from: Place, to: Place) {
        match &record.change {
            Change::Note { key, .. } => self.moved_note(key, from, to),
            Change::Done | Change::DoneInFiles if self.failed.moved(record.id, from, to) => {
                self.claim(to);
                self.release(Some(from));
            }
            Change::Put { .. }
            | Change::Progress { .. }
            | Change::Filed { .. }
            | Change::Index
            | Change::Done
            | Change::DoneInFiles => {
                self.moved(record.id, from, to);
            }
        }
    }

    /// The record of `id` at `from` was written again at `to`.
    fn moved(&mut self, id: SpoolId, from: Place, to: Place) {
        if !self.is_needed(id, from) {
            return;
        }
        let to = self.claim(to);
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let old = match self.slots.unpack(entry.put) == from {
            true => std::mem::replace(&mut entry.put, to),
            false => match entry.progress.replace(to) {
                Some(old) => old,
                None => return,
            },
        };
        self.release_packed(Some(old));
    }

    /// The record of the note `key` at `from` was written again at `to`.
    fn moved_note(&mut self, key: &str, from: Place, to: Place) {
        let Some(note) = self.notes.get_mut(key).filter(|note| note.place == from) else { return };
        note.place = to;
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
        let mut found = Vec::new();
        let (mut seen, mut taken) = (0, 0);
        for (id, entry) in self.entries.iter_after(after) {
            let put = self.unpack(entry.put);
            let progress = entry.progress.map(|place| self.unpack(place));
            if [Some(put), progress].into_iter().flatten().any(|place| place.segment == segment) {
                taken += u64::from(put.len);
                found.push(Living { id: *id, put, progress });
            }
            seen += 1;
            if seen == n || taken >= octets {
                return (found, Some(*id));
            }
        }
        (found, None)
    }

    /// The notes whose value stands in `segment`, until they have `octets` octets.
    pub(super) fn notes_in_segment(&self, segment: u64, octets: u64) -> Vec<(Box<str>, Place)> {
        let mut taken = 0;
        let here = self.notes.iter().filter(|(_, note)| note.place.segment == segment);
        let some = here.take_while(|(_, note)| {
            let is_one_more = taken < octets;
            taken += note.place.len_on_disk();
            is_one_more
        });
        some.map(|(key, note)| (key.clone(), note.place)).collect()
    }

    /// The files of a message that is done are gone for good.
    pub(super) fn forget_files(&mut self, id: SpoolId) {
        let mark = self.failed.forget(id);
        self.release(mark);
    }

    fn remove(&mut self, id: SpoolId) -> Option<FileRef> {
        let entry = self.entries.remove(&id)?;
        self.contents = self.contents.saturating_sub(entry.size.into());
        self.in_doubt = self.in_doubt.saturating_sub(entry.doubts());
        self.release_packed(Some(entry.put));
        self.release_packed(entry.progress);
        let file = self.files.remove(&id)?;
        self.in_files = self.in_files.saturating_sub(file.len.into());
        Some(file)
    }

    fn unpack(&self, place: PackedPlace) -> Place {
        self.slots.unpack(place)
    }

    /// Counts the record at `place`.
    fn claim(&mut self, place: Place) -> PackedPlace {
        let segment = self.segments.entry(place.segment).or_default();
        segment.live += 1;
        segment.octets += place.len_on_disk();
        let slot = *segment.slot.get_or_insert_with(|| self.slots.take(place.segment));
        let offset = u32::try_from(place.offset / ALIGN as u64).unwrap_or(u32::MAX);
        PackedPlace { slot, offset, len: place.len }
    }

    fn release_packed(&mut self, place: Option<PackedPlace>) {
        self.release(place.map(|place| self.unpack(place)));
    }

    pub(super) fn release(&mut self, place: Option<Place>) {
        let Some(place) = place else { return };
        if let Some(segment) = self.segments.get_mut(&place.segment) {
            segment.live = segment.live.saturating_sub(1);
            segment.octets = segment.octets.saturating_sub(place.len_on_disk());
            if segment.live == 0 {
                self.slots.free.extend(segment.slot.take());
            }
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

    fn progress(step: Step, attempts: u16, is_doubtful: bool) -> Change {
        Change::Progress { step, due: UnixMillis(2), pending: 2, attempts, is_doubtful }
    }

    fn update(attempts: u16) -> Change {
        progress(Step::Update, attempts, false)
    }

    fn note(bytes: &[u8]) -> Change {
        Change::Note { key: "k".into(), bytes: bytes.into() }
    }

    fn live(index: &Index) -> Vec<(u64, u64, u64)> {
        let segments = index.segments.iter();
        segments.map(|(number, of)| (*number, of.live, of.octets)).collect()
    }

    /// Its entry and the room around it. With what the schedule keeps of a message that is less than 100 octets.
    #[test]
    fn a_waiting_message_takes_less_than_70_octets_of_the_index() {
        assert_eq!(size_of::<PackedPlace>(), 12);
        assert_eq!(size_of::<Packed>(), 48);
        assert_eq!(size_of::<(SpoolId, Packed)>(), 64);
        let mut index = Index::default();
        for n in crate::ordered::nearly_in_order() {
            let id = SpoolId::from_u128(n.into());
            index.change(id, &put(id), place(1 << 32, 64 * u64::from(n), 1));
        }
        assert_eq!(index.len(), 100_000);
        let octets = index.entries.octets();
        assert!(octets < 70 * index.len(), "{octets} for {}", index.len());
    }

    #[test]
    fn the_octets_of_the_contents_are_those_of_the_heads() {
        let mut index = Index::default();
        let sum = |index: &Index| index.heads(None).map(|head| head.size).sum::<u64>();
        let mut random = fastrand::Rng::with_seed(3);
        for n in 0..2_000_u64 {
            let (id, at) = (SpoolId::from_u128(random.u128(0..40)), place(1 << 32, 64 * n, 1));
            let change = match random.u8(0..4) {
                0 | 1 => put(id),
                2 => update(1),
                _ => Change::Done,
            };
            index.change(id, &change, at);
            assert_eq!(index.contents(), sum(&index));
        }
        assert!(index.contents() > 0);
        // It goes to a file of its own, and from there.
        let id = index.heads(None).next().unwrap().id;
        index.change(id, &Change::Filed { at: UnixMillis(1), len: 9 }, place(1 << 32, 0, 1));
        assert!(index.failed.contains(id));
        assert_eq!(index.contents(), sum(&index));
        index.change(id, &Change::DoneInFiles, place(1 << 32, 0, 1));
        assert_eq!(index.contents(), sum(&index));
    }

    #[test]
    fn what_may_have_been_taken_is_counted_until_it_ends() {
        let id = SpoolId::from_u128(1);
        let mut index = Index::default();
        let mut check = |change: Change, expected: usize| {
            index.change(id, &change, place(1 << 32, 0, 1));
            assert_eq!(index.in_doubt(), expected, "{change:?}");
        };
        check(put(id), 0);
        check(progress(Step::Attempt, 0, false), 0);
        check(progress(Step::Update, 1, true), 1);
        check(progress(Step::Attempt, 1, true), 1);
        check(progress(Step::Hold, 1, true), 1);
        check(progress(Step::Release, 1, true), 1);
        check(progress(Step::Fail, 1, true), 0);
        check(progress(Step::Requeue, 0, false), 0);
        check(progress(Step::Update, 1, true), 1);
        check(Change::Done, 0);
        check(put(id), 0);
        check(progress(Step::Attempt, 0, false), 0);
        // The process is killed, and the next one sends it once more.
        assert_eq!((index.doubt_open_attempts(), index.in_doubt()), (1, 1));
        let mut check = |change: Change, expected: usize| {
            index.change(id, &change, place(1 << 32, 0, 1));
            assert_eq!(index.in_doubt(), expected, "{change:?}");
        };
        check(progress(Step::Attempt, 0, false), 1);
        check(progress(Step::Update, 1, true), 1);
        check(put(id), 0);
    }

    #[test]
    fn a_slot_is_used_again_when_nothing_lives_in_its_segment() {
        let id = SpoolId::from_u128;
        let mut index = Index::default();
        for n in 1..=1_000_u64 {
            let (number, key) = (n << 32 | 5, id(n.into()));
            index.change(key, &put(key), place(number, 64 * n, 1));
            index.change(key, &update(1), place(number, 64 * n + 16, 2));
            let entry = index.get(key).unwrap();
            assert_eq!(entry.put, place(number, 64 * n, 1));
            assert_eq!(entry.progress, Some(place(number, 64 * n + 16, 2)));
            if n > 3 {
                let old = id((n - 3).into());
                index.change(old, &Change::Done, place(number, 0, 0));
                let unneeded = index.oldest_unneeded().unwrap();
                index.segments.remove(&unneeded);
            }
        }
        assert_eq!(index.slots.numbers.len(), 4);
        let last = [998, 999, 1_000].map(|n: u64| index.get(id(n.into())).unwrap().put.segment);
        assert_eq!(last, [998 << 32 | 5, 999 << 32 | 5, 1_000 << 32 | 5]);
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
        assert_eq!(index.notes_in_segment(first, 1), [("k".into(), noted)]);
        index.change(id(1), &update(2), last);
        index.change(id(0), &note(b"two"), noted_again);
        assert_eq!(live(&index), [(first, 1, 80), (second, 2, 48 + 64)]);
        assert!(index.is_needed(id(1), last) && !index.is_needed(id(1), old));
        assert_eq!(index.notes_in_segment(first, 1), []);
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
