//! An ordered map for very many small entries: a million of them cost little more than their own size.
//!
//! A `BTreeMap` whose keys come in ascending order leaves its nodes half empty. This one keeps entries in sorted chunks
//! of a fixed capacity, which are full when keys ascend; it grows by a chunk at a time, never by doubling.

use std::collections::BTreeMap;
use std::ops::Bound;

/// Entries per chunk: few enough to move about, many enough that a chunk's own cost is nothing.
const CHUNK: usize = 128;
/// Entries that go to a neighbour at once.
const SHIFT: usize = 16;

/// Every operation is O(log n), and moves at most a chunk's worth of entries.
#[derive(Clone, Debug)]
pub struct OrderedMap<K, V> {
    /// By a lower bound of the keys of the chunk. No chunk is empty.
    chunks: BTreeMap<K, Vec<(K, V)>>,
    len: usize,
}

impl<K: Ord + Copy, V> Default for OrderedMap<K, V> {
    fn default() -> Self {
        Self { chunks: BTreeMap::new(), len: 0 }
    }
}

impl<K: Ord + Copy, V> OrderedMap<K, V> {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn get(&self, key: &K) -> Option<&V> {
        let (_, chunk) = self.chunks.range(..=*key).next_back()?;
        let at = chunk.binary_search_by(|(known, _)| known.cmp(key)).ok()?;
        chunk.get(at).map(|(_, value)| value)
    }

    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        let (_, chunk) = self.chunks.range_mut(..=*key).next_back()?;
        let at = chunk.binary_search_by(|(known, _)| known.cmp(key)).ok()?;
        chunk.get_mut(at).map(|(_, value)| value)
    }

    pub fn contains_key(&self, key: &K) -> bool {
        self.get(key).is_some()
    }

    /// Returns what was there under the key.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.insert_or_split(key, value, false)
    }

    /// A chunk that is full shifts some entries to a neighbour, once; or else it is split.
    fn insert_or_split(&mut self, key: K, value: V, has_shifted: bool) -> Option<V> {
        let is_last = self.chunks.last_key_value().is_none_or(|(last, _)| *last <= key);
        let Some((bound, chunk)) = self.chunks.range_mut(..=key).next_back() else {
            self.insert_below(key, value);
            return None;
        };
        let bound = *bound;
        let at = match chunk.binary_search_by(|(known, _)| known.cmp(&key)) {
            Ok(at) => return chunk.get_mut(at).map(|(_, old)| std::mem::replace(old, value)),
            Err(at) => at,
        };
        if chunk.len() == CHUNK && at < CHUNK && !has_shifted && self.shift(bound) {
            return self.insert_or_split(key, value, true);
        }
        let chunk = self.chunks.get_mut(&bound)?;
        self.len += 1;
        if chunk.len() < CHUNK {
            chunk.insert(at, (key, value));
            return None;
        }
        let mut upper = Vec::with_capacity(CHUNK);
        if is_last && at == CHUNK {
            // Keys that ascend fill every chunk.
            upper.push((key, value));
        } else {
            // Keys that ascend but for a few that come late leave little room behind them.
            let split = if is_last { CHUNK / 8 * 7 } else { CHUNK / 2 };
            upper.extend(chunk.drain(split..));
            match at.checked_sub(split) {
                Some(at) => upper.insert(at, (key, value)),
                None => chunk.insert(at, (key, value)),
            }
        }
        if let Some((bound, _)) = upper.first() {
            self.chunks.insert(*bound, upper);
        }
        None
    }

    /// Moves some entries of a full chunk to a neighbour that has room: keys that come a little out of order leave chunks
    /// nearly full. False where there is none.
    fn shift(&mut self, bound: K) -> bool {
        let room = |chunk: &Vec<(K, V)>| (CHUNK - chunk.len()).min(SHIFT);
        let before = self.chunks.range(..bound).next_back().map_or(0, |(_, chunk)| room(chunk));
        let above = (Bound::Excluded(bound), Bound::Unbounded);
        let after = self.chunks.range(above).next().map(|(key, chunk)| (*key, room(chunk)));
        if before > 0 {
            let Some(mut chunk) = self.chunks.remove(&bound) else { return false };
            if let Some((_, lower)) = self.chunks.range_mut(..bound).next_back() {
                lower.extend(chunk.drain(..before));
            }
            self.append(chunk);
            return true;
        }
        let Some((key, room)) = after.filter(|(_, room)| *room > 0) else { return false };
        let Some(mut upper) = self.chunks.remove(&key) else { return false };
        if let Some(chunk) = self.chunks.get_mut(&bound) {
            upper.splice(..0, chunk.drain(CHUNK - room..));
        }
        self.append(upper);
        true
    }

    /// The key is below every bound: it goes into the first chunk, whose bound it becomes.
    fn insert_below(&mut self, key: K, value: V) {
        self.len += 1;
        let first = self.chunks.first_entry().filter(|first| first.get().len() < CHUNK);
        let mut chunk = first.map_or_else(|| Vec::with_capacity(CHUNK), |first| first.remove());
        chunk.insert(0, (key, value));
        self.chunks.insert(key, chunk);
    }

    pub fn remove(&mut self, key: &K) -> Option<V> {
        let (bound, chunk) = self.chunks.range_mut(..=*key).next_back()?;
        let at = chunk.binary_search_by(|(known, _)| known.cmp(key)).ok()?;
        let (bound, (_, value)) = (*bound, chunk.remove(at));
        self.len -= 1;
        if chunk.len() < CHUNK / 4 {
            self.shrink(bound);
        }
        Some(value)
    }

    /// A chunk that has become small is joined with a neighbour, so that what is left does not lie in many small chunks.
    fn shrink(&mut self, bound: K) {
        let small = self.chunks.get(&bound).map_or(0, Vec::len);
        if small == 0 {
            self.chunks.remove(&bound);
            return;
        }
        let joins = |(_, chunk): &(&K, &Vec<(K, V)>)| small + chunk.len() <= CHUNK / 2;
        let before = self.chunks.range(..bound).next_back().filter(joins);
        let after =
            self.chunks.range((Bound::Excluded(bound), Bound::Unbounded)).next().filter(joins);
        let (lower, upper) = match (before, after) {
            (Some((before, _)), _) => (*before, bound),
            (None, Some((after, _))) => (bound, *after),
            (None, None) => return,
        };
        let taken = self.chunks.remove(&upper).unwrap_or_default();
        if let Some(chunk) = self.chunks.get_mut(&lower) {
            chunk.extend(taken);
        }
    }

    fn append(&mut self, chunk: Vec<(K, V)>) {
        if let Some((bound, _)) = chunk.first() {
            self.chunks.insert(*bound, chunk);
        }
    }

    pub fn first(&self) -> Option<(&K, &V)> {
        let (_, chunk) = self.chunks.first_key_value()?;
        chunk.first().map(|(key, value)| (key, value))
    }

    pub fn pop_first(&mut self) -> Option<(K, V)> {
        let key = *self.first()?.0;
        self.remove(&key).map(|value| (key, value))
    }

    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.chunks.values().flatten().map(|(key, value)| (key, value))
    }

    pub fn for_each_mut(&mut self, change: impl FnMut(&mut V)) {
        self.chunks.values_mut().flatten().map(|(_, value)| value).for_each(change);
    }

    /// Entries with keys above `after`, in order; all where it is none.
    pub fn iter_after(&self, after: Option<K>) -> impl Iterator<Item = (&K, &V)> {
        let start = after
            .and_then(|after| self.chunks.range(..=after).next_back())
            .map(|(bound, _)| *bound);
        let from = start.map_or(Bound::Unbounded, Bound::Included);
        let entries = self.chunks.range((from, Bound::Unbounded)).flat_map(|(_, chunk)| chunk);
        let is_past = move |key: &K| after.is_none_or(|after| *key > after);
        entries.filter(move |(key, _)| is_past(key)).map(|(key, value)| (key, value))
    }
}

#[cfg(test)]
impl<K: Ord + Copy, V> OrderedMap<K, V> {
    /// What it takes of memory, in octets: all that chunks can hold, and for each chunk its place in the tree, whose nodes
    /// are at worst less than half full, and what the allocator adds. Without what values have elsewhere.
    pub fn octets(&self) -> usize {
        let entries = self.chunks.values().map(Vec::capacity).sum::<usize>() * size_of::<(K, V)>();
        entries + self.chunks.len() * (size_of::<(K, Vec<(K, V)>)>() * 11 / 5 + 16)
    }
}

/// A hundred thousand numbers as ids come: in order, but for one of fifty, which is up to a hundred places late.
#[cfg(test)]
pub fn nearly_in_order() -> Vec<u32> {
    let mut random = fastrand::Rng::with_seed(1);
    let late = |n: u32, random: &mut fastrand::Rng| match n.is_multiple_of(50) {
        true => n + random.u32(..100),
        false => n,
    };
    let mut numbers: Vec<_> = (0..100_000).map(|n| (late(n, &mut random), n)).collect();
    numbers.sort_unstable();
    numbers.into_iter().map(|(_, n)| n).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_agrees_with_a_btree_map() {
        for (seed, keys) in [(1, 50), (2, 400), (3, 5_000)] {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut map, mut model) = (OrderedMap::new(), BTreeMap::new());
            for round in 0..20_000 {
                let key = random.u32(..keys);
                match random.u8(..10) {
                    0..5 => assert_eq!(map.insert(key, round), model.insert(key, round)),
                    5..8 => assert_eq!(map.remove(&key), model.remove(&key)),
                    8 => assert_eq!(map.pop_first(), model.pop_first()),
                    _ => {
                        assert_eq!(map.get(&key), model.get(&key));
                        assert_eq!(map.get_mut(&key), model.get_mut(&key));
                        let after: Vec<_> = map.iter_after(Some(key)).take(5).collect();
                        let expected =
                            model.range((Bound::Excluded(key), Bound::Unbounded)).take(5);
                        assert_eq!(after, expected.collect::<Vec<_>>());
                    }
                }
                assert_eq!(map.len(), model.len());
                assert_eq!(map.first(), model.first_key_value());
            }
            assert!(map.iter().eq(model.iter()));
            assert!(map.iter_after(None).eq(model.iter()));
            map.for_each_mut(|value| *value += 1);
            assert!(map.iter().eq(model.iter_mut().map(|(key, value)| {
                *value += 1;
                (key, &*value)
            })));
            assert!(map.chunks.values().all(|chunk| !chunk.is_empty() && chunk.len() <= CHUNK));
        }
    }

    #[test]
    fn keys_that_come_a_little_late_leave_chunks_nearly_full() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut map = OrderedMap::new();
        for key in 0..100_000_u64 {
            map.insert((key + random.u64(..100)) << 17 | key, ());
        }
        let least = map.len().div_ceil(CHUNK);
        assert!(map.chunks.len() * 9 < least * 10, "{} chunks, at least {least}", map.chunks.len());
        assert!(map.iter().is_sorted());
    }

    #[test]
    fn ascending_keys_fill_every_chunk_and_descending_ones_do_not_scatter() {
        let mut map = OrderedMap::new();
        for key in 0..12_800 {
            map.insert(key, ());
        }
        assert_eq!(map.chunks.len(), 100);
        for key in 0..12_800 {
            if key % 16 != 0 {
                map.remove(&key);
            }
        }
        assert!(map.chunks.len() <= 40, "{} chunks for {} entries", map.chunks.len(), map.len());
        let mut map = OrderedMap::new();
        for key in (0..1_280).rev() {
            map.insert(key, ());
        }
        assert!(map.chunks.len() <= 20, "{}", map.chunks.len());
    }
}
