//! A disk in memory that knows what a power cut can leave of it.
//!
//! There are two of everything: what the program sees, and what is on stable storage. Between them lie *items*, the
//! changes that were not synced: each block of 4 KiB that a write touched, each change of a length, each change of a
//! name. A power cut lets any of them reach the disk and loses the others.
//!
//! A sync of a file settles its blocks and its length, not its name. A sync of a folder settles its names, and none in
//! the folders below it. A rename is one item: at no time are both names there, or none; a sync of the folder it leads
//! to settles it. What is settled settles all that was done earlier to the same name.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Component, Path};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::Random;
use crate::spool::disk::{Disk, DiskFile, Lock, LockError};
use crate::spool::lock;

pub(super) const BLOCK: usize = 4096;
/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

type Block = Arc<[u8; BLOCK]>;
type Node = u64;

const ROOT: Node = 0;
/// Contents that are kept open: a process may have only so many files.
const BODIES: usize = 100;

/// A handle: clones are the same disk.
#[derive(Clone)]
pub(super) struct SimDisk(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    observer: Mutex<Option<Observer>>,
    is_locked: Arc<AtomicBool>,
    /// Contents that were read past the seam. Cuts of the same disk share it.
    bodies: Bodies,
}

type Bodies = Arc<Mutex<Vec<(Content, File)>>>;

/// Called without any lock held, before and after each operation that changes something.
type Observer = Arc<dyn Fn(&SimDisk, Moment) + Send + Sync>;

#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    pub(super) is_before: bool,
    pub(super) operation: Operation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Create,
    CreateDir,
    SyncDir,
    Rename,
    Link,
    Remove,
    Write { node: Node, offset: u64, len: usize },
    Sync(Node),
    Truncate(Node),
}

impl Operation {
    fn is_sync(self) -> bool {
        matches!(self, Self::Sync(_) | Self::SyncDir)
    }
}

/// Operations to fail.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    /// The first of them, counted among those of its kind.
    pub(super) from: u64,
    pub(super) times: u64,
    pub(super) errno: i32,
    pub(super) only_syncs: bool,
}

/// All of a disk at one time. Cheap to clone.
#[derive(Clone)]
pub(super) struct State {
    /// Rises with each change.
    pub(super) version: u64,
    files: BTreeMap<Node, Inode>,
    /// What the program sees, and what is on stable storage.
    seen: Names,
    durable: Names,
    /// Changes of names that are not synced, in order.
    names: Vec<NameItem>,
    next: Node,
    free: u64,
    fault: Option<Fault>,
    /// A sync failed: what the program sees is not what later syncs make durable.
    pub(super) has_dropped: bool,
    /// Operations so far, and syncs among them.
    pub(super) operations: u64,
    pub(super) syncs: u64,
}

type Names = BTreeMap<(Node, Arc<str>), Target>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    File(Node),
    Folder(Node),
}

#[derive(Clone, Default)]
struct Inode {
    seen: Content,
    durable: Content,
    items: Vec<FileItem>,
}

#[derive(Clone, Default)]
struct Content {
    /// `None` reads as zeros.
    blocks: Arc<Vec<Option<Block>>>,
    len: u64,
}

#[derive(Clone)]
enum FileItem {
    /// A write touched this block, which was so then.
    Block(usize, Block),
    Grow(u64),
    Shrink(u64),
}

#[derive(Clone)]
enum NameItem {
    Put { at: (Node, Arc<str>), target: Target },
    Remove { at: (Node, Arc<str>) },
    Rename { from: (Node, Arc<str>), to: (Node, Arc<str>), target: Target },
}

/// What was not synced, one by one.
#[derive(Clone, Copy)]
pub(super) enum Item {
    /// Of a file: which one of its items.
    Block(Node, usize),
    Len(Node, usize),
    Name(usize),
}

/// What of the items reached the disk.
#[derive(Clone, Debug, Default)]
pub(super) struct Cut {
    /// One for each item.
    pub(super) chosen: Vec<bool>,
    pub(super) torn: Option<Torn>,
    /// Blocks that never reached the disk, in a file that has their length, read as something old instead of zeros.
    pub(super) stale: Option<u64>,
}

/// Of this item, a block, only a part reached the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Torn {
    pub(super) item: usize,
    pub(super) sectors: usize,
    /// The first ones, or the last.
    pub(super) is_start: bool,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chosen = self.chosen.iter().map(|is_chosen| if *is_chosen { '1' } else { '0' });
        let chosen: String = chosen.collect();
        write!(f, "items {chosen}, {:?}, stale {:?}", self.torn, self.stale)
    }
}

impl Content {
    fn block_count(&self) -> usize {
        at(self.len).div_ceil(BLOCK)
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        if offset + bytes.len() as u64 > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut offset = at(offset);
        let mut rest = bytes;
        while !rest.is_empty() {
            let (index, start) = (offset / BLOCK, offset % BLOCK);
            let len = rest.len().min(BLOCK - start);
            let (piece, left) = rest.split_at_mut(len);
            match self.blocks.get(index) {
                Some(Some(block)) => piece.copy_from_slice(&block[start..start + len]),
                Some(None) | None => piece.fill(0),
            }
            offset += len;
            rest = left;
        }
        Ok(())
    }

    /// The blocks that it touched.
    fn write(&mut self, bytes: &[u8], offset: u64) -> Vec<(usize, Block)> {
        let mut touched = Vec::new();
        let blocks = Arc::make_mut(&mut self.blocks);
        let mut offset = at(offset);
        let mut rest = bytes;
        while !rest.is_empty() {
            let (index, start) = (offset / BLOCK, offset % BLOCK);
            let len = rest.len().min(BLOCK - start);
            let (piece, left) = rest.split_at(len);
            if blocks.len() <= index {
                blocks.resize(index + 1, None);
            }
            let mut block = blocks[index].as_deref().copied().unwrap_or([0; BLOCK]);
            block[start..start + len].copy_from_slice(piece);
            let block = Arc::new(block);
            blocks[index] = Some(Arc::clone(&block));
            touched.push((index, block));
            offset += len;
            rest = left;
        }
        self.len = self.len.max(offset as u64);
        touched
    }

    fn set_block(&mut self, index: usize, block: Block) {
        let blocks = Arc::make_mut(&mut self.blocks);
        if blocks.len() <= index {
            blocks.resize(index + 1, None);
        }
        blocks[index] = Some(block);
    }

    fn apply(&mut self, item: &FileItem) {
        match item {
            FileItem::Block(index, block) => self.set_block(*index, Arc::clone(block)),
            FileItem::Grow(len) => self.len = *len,
            FileItem::Shrink(len) => {
                self.len = *len;
                self.drop_end();
            }
        }
    }

    /// What lies beyond the length is gone: it must not show up when the file grows again.
    fn drop_end(&mut self) {
        let (count, tail) = (self.block_count(), at(self.len) % BLOCK);
        let is_dirty = |block: &Block| tail != 0 && block[tail..] != [0; BLOCK][tail..];
        let last = count.checked_sub(1).and_then(|last| self.blocks.get(last)?.clone());
        if self.blocks.len() <= count && !last.as_ref().is_some_and(is_dirty) {
            return;
        }
        let blocks = Arc::make_mut(&mut self.blocks);
        blocks.truncate(count);
        if let Some(mut block) = last.filter(is_dirty) {
            Arc::make_mut(&mut block)[tail..].fill(0);
            blocks[count - 1] = Some(block);
        }
    }

    fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; at(self.len)];
        self.read(&mut bytes, 0).unwrap();
        bytes
    }
}

impl Inode {
    fn settle(&mut self) {
        for item in std::mem::take(&mut self.items) {
            self.durable.apply(&item);
        }
        self.durable.drop_end();
    }

    /// A sync that failed: any of what it was to write is on disk, and none of it counts as unsynced any more.
    fn settle_badly(&mut self, random: &mut Random) {
        let keeps_some = random.below(2) == 0;
        for item in std::mem::take(&mut self.items) {
            if keeps_some && random.below(2) == 0 {
                self.durable.apply(&item);
            }
        }
        self.durable.drop_end();
    }
}

impl NameItem {
    /// The folder whose sync settles it.
    fn folder(&self) -> Node {
        match self {
            Self::Put { at, .. } | Self::Remove { at } | Self::Rename { to: at, .. } => at.0,
        }
    }

    fn touches(&self) -> impl Iterator<Item = &(Node, Arc<str>)> {
        let (first, second) = match self {
            Self::Put { at, .. } | Self::Remove { at } => (at, None),
            Self::Rename { from, to, .. } => (from, Some(to)),
        };
        [Some(first), second].into_iter().flatten()
    }

    fn apply(&self, names: &mut Names) {
        match self {
            Self::Put { at, target } => drop(names.insert(at.clone(), *target)),
            Self::Remove { at } => drop(names.remove(at)),
            Self::Rename { from, to, target } => {
                names.remove(from);
                names.insert(to.clone(), *target);
            }
        }
    }
}

impl State {
    fn folder(&self, path: &Path) -> io::Result<Node> {
        let mut folder = ROOT;
        for component in path.components() {
            let Component::Normal(name) = component else { continue };
            let name = name.to_str().unwrap();
            match self.seen.get(&(folder, Arc::from(name))) {
                Some(Target::Folder(node)) => folder = *node,
                Some(Target::File(_)) => return Err(io::ErrorKind::NotADirectory.into()),
                None => return Err(io::ErrorKind::NotFound.into()),
            }
        }
        Ok(folder)
    }

    fn place(&self, path: &Path) -> io::Result<(Node, Arc<str>)> {
        let folder = self.folder(path.parent().unwrap_or(Path::new("")))?;
        let name = path.file_name().and_then(|name| name.to_str()).unwrap();
        Ok((folder, Arc::from(name)))
    }

    fn file(&self, path: &Path) -> io::Result<Node> {
        match self.seen.get(&self.place(path)?) {
            Some(Target::File(node)) => Ok(*node),
            Some(Target::Folder(_)) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn inode(&mut self, node: Node) -> &mut Inode {
        self.files.get_mut(&node).unwrap()
    }

    fn put_name(&mut self, at: (Node, Arc<str>), target: Target) -> io::Result<()> {
        if self.seen.contains_key(&at) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.change_name(NameItem::Put { at, target });
        Ok(())
    }

    fn change_name(&mut self, item: NameItem) {
        item.apply(&mut self.seen);
        self.names.push(item);
    }

    fn new_node(&mut self) -> Node {
        self.next += 1;
        self.next
    }

    /// From the last to the first: what a settled item was built on is settled too.
    fn settle_names(&mut self, folder: Node) {
        let mut settled = BTreeSet::new();
        let mut is_settled = vec![false; self.names.len()];
        for (item, is_settled) in self.names.iter().zip(&mut is_settled).rev() {
            if item.folder() == folder || item.touches().any(|name| settled.contains(name)) {
                *is_settled = true;
                settled.extend(item.touches().cloned());
            }
        }
        let mut left = Vec::new();
        for (item, is_settled) in std::mem::take(&mut self.names).into_iter().zip(is_settled) {
            match is_settled {
                true => item.apply(&mut self.durable),
                false => left.push(item),
            }
        }
        self.names = left;
    }

    /// Whether this operation is one to fail.
    fn step(&mut self, operation: Operation) -> io::Result<()> {
        let count = match self.fault {
            Some(Fault { only_syncs: true, .. }) if !operation.is_sync() => None,
            Some(Fault { only_syncs: true, .. }) => Some(self.syncs),
            Some(Fault { only_syncs: false, .. }) | None => Some(self.operations),
        };
        self.operations += 1;
        self.syncs += u64::from(operation.is_sync());
        let is_hit =
            |fault: &Fault| count.is_some_and(|n| n >= fault.from && n - fault.from < fault.times);
        match self.fault.filter(is_hit) {
            Some(fault) => Err(io::Error::from_raw_os_error(fault.errno)),
            None => Ok(()),
        }
    }

    /// The files that have or may get a name.
    fn reachable(&self) -> BTreeSet<Node> {
        let mut found = BTreeSet::new();
        for target in self.seen.values().chain(self.durable.values()) {
            found.extend(target.as_file());
        }
        for item in &self.names {
            if let NameItem::Put { target, .. } | NameItem::Rename { target, .. } = item {
                found.extend(target.as_file());
            }
        }
        found
    }

    /// What a power cut may take, names first.
    pub(super) fn items(&self) -> Vec<Item> {
        let mut items: Vec<_> = (0..self.names.len()).map(Item::Name).collect();
        for node in self.reachable() {
            for (index, item) in self.files[&node].items.iter().enumerate() {
                items.push(match item {
                    FileItem::Block(..) => Item::Block(node, index),
                    FileItem::Grow(_) | FileItem::Shrink(_) => Item::Len(node, index),
                });
            }
        }
        items
    }

    /// What the power cut leaves.
    fn cut(&self, items: &[Item], cut: &Cut) -> Self {
        let mut durable = self.durable.clone();
        let mut contents: BTreeMap<Node, Content> = BTreeMap::new();
        let mut lost: Vec<(Node, usize, usize)> = Vec::new();
        for (at, (item, is_chosen)) in items.iter().zip(&cut.chosen).enumerate() {
            let (node, index) = match *item {
                Item::Name(index) => {
                    if *is_chosen {
                        self.names[index].apply(&mut durable);
                    }
                    continue;
                }
                Item::Block(node, index) | Item::Len(node, index) => (node, index),
            };
            let inode = &self.files[&node];
            let item = &inode.items[index];
            if let (FileItem::Block(index, _), false) = (item, is_chosen) {
                lost.push((node, *index, at));
            }
            if !is_chosen {
                continue;
            }
            let content = contents.entry(node).or_insert_with(|| inode.durable.clone());
            match (item, cut.torn.filter(|torn| torn.item == at)) {
                (FileItem::Block(index, new), Some(torn)) => {
                    let old = content.blocks.get(*index).and_then(Option::as_deref);
                    let mut block = old.copied().unwrap_or([0; BLOCK]);
                    let range = match torn.is_start {
                        true => 0..torn.sectors * SECTOR,
                        false => BLOCK - torn.sectors * SECTOR..BLOCK,
                    };
                    block[range.clone()].copy_from_slice(&new[range]);
                    content.set_block(*index, Arc::new(block));
                }
                (item, _) => content.apply(item),
            }
        }
        if let Some(seed) = cut.stale {
            let mut random = Random(seed);
            for (node, index, _) in lost {
                let Some(content) = contents.get_mut(&node) else { continue };
                let is_hole = content.blocks.get(index).is_none_or(Option::is_none);
                if index < content.block_count() && is_hole {
                    let old = self.any_block(&mut random);
                    content.set_block(index, old);
                }
            }
        }
        contents.values_mut().for_each(Content::drop_end);

        let durable = below_root(&durable);
        let mut files = BTreeMap::new();
        for node in durable.values().filter_map(|target| target.as_file()) {
            let content = contents.get(&node).unwrap_or(&self.files[&node].durable).clone();
            let inode = Inode { seen: content.clone(), durable: content, items: Vec::new() };
            files.insert(node, inode);
        }
        Self {
            version: 0,
            files,
            seen: durable.clone(),
            durable,
            names: Vec::new(),
            next: self.next,
            free: self.free,
            fault: None,
            has_dropped: false,
            operations: 0,
            syncs: 0,
        }
    }

    /// A block that was written at some time, or noise.
    fn any_block(&self, random: &mut Random) -> Block {
        let blocks: Vec<&Block> =
            self.files.values().flat_map(|file| file.seen.blocks.iter().flatten()).collect();
        match random.below(blocks.len() as u64 * 2) {
            n if at(n) < blocks.len() => Arc::clone(blocks[at(n)]),
            n => Arc::new([u8::try_from(n % 256).unwrap(); BLOCK]),
        }
    }
}

impl Target {
    fn as_file(self) -> Option<Node> {
        match self {
            Self::File(node) => Some(node),
            Self::Folder(_) => None,
        }
    }
}

/// Without what hangs below folders that have no name.
fn below_root(names: &Names) -> Names {
    let mut kept = Names::new();
    let mut folders = vec![ROOT];
    while let Some(folder) = folders.pop() {
        let entries = names.range((folder, Arc::from(""))..(folder + 1, Arc::from("")));
        for (at, target) in entries {
            kept.insert(at.clone(), *target);
            if let Target::Folder(node) = target {
                folders.push(*node);
            }
        }
    }
    kept
}

impl SimDisk {
    pub(super) fn new() -> Self {
        let state = State {
            version: 0,
            files: BTreeMap::new(),
            seen: Names::new(),
            durable: Names::new(),
            names: Vec::new(),
            next: ROOT,
            free: u64::MAX,
            fault: None,
            has_dropped: false,
            operations: 0,
            syncs: 0,
        };
        Self::with(state, Bodies::default())
    }

    fn with(state: State, bodies: Bodies) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::new(state),
            observer: Mutex::new(None),
            is_locked: Arc::new(AtomicBool::new(false)),
            bodies,
        }))
    }

    pub(super) fn observe(&self, observer: impl Fn(&Self, Moment) + Send + Sync + 'static) {
        *lock(&self.0.observer) = Some(Arc::new(observer));
    }

    pub(super) fn state(&self) -> State {
        lock(&self.0.state).clone()
    }

    /// The power fails at `state`, one that this disk had.
    pub(super) fn cut(&self, state: &State, items: &[Item], cut: &Cut) -> Self {
        Self::with(state.cut(items, cut), Arc::clone(&self.0.bodies))
    }

    /// The program is killed and the machine goes on: what was not synced is there, and still not synced.
    pub(super) fn kill(&self) -> Self {
        self.kill_at(&self.state())
    }

    /// The same at `state`, one that this disk had.
    pub(super) fn kill_at(&self, state: &State) -> Self {
        Self::with(state.clone(), Arc::clone(&self.0.bodies))
    }

    /// From now on; the counts begin at zero.
    pub(super) fn set_fault(&self, fault: Option<Fault>) {
        let mut state = lock(&self.0.state);
        state.fault = fault;
        (state.operations, state.syncs) = (0, 0);
    }

    pub(super) fn set_free(&self, free: u64) {
        lock(&self.0.state).free = free;
    }

    /// The content of a file as the program sees it.
    pub(super) fn content(&self, path: &Path) -> io::Result<Vec<u8>> {
        let state = self.state();
        let node = state.file(path)?;
        Ok(state.files[&node].seen.to_vec())
    }

    /// A file as no program left it, on stable storage; it is made if it is not there.
    pub(super) fn set_content(&self, path: &Path, bytes: &[u8]) {
        let mut state = lock(&self.0.state);
        let mut content = Content::default();
        content.write(bytes, 0);
        let place = state.place(path).unwrap();
        let node = match state.file(path) {
            Ok(node) => node,
            Err(_) => state.new_node(),
        };
        state.seen.insert(place.clone(), Target::File(node));
        state.durable.insert(place, Target::File(node));
        let inode = Inode { seen: content.clone(), durable: content, items: Vec::new() };
        state.files.insert(node, inode);
    }

    /// The same only for disks that a power cut left with the same names and contents, among those of states that are
    /// still there: a block counts by where it lies in memory.
    pub(super) fn fingerprint(&self) -> u64 {
        let state = lock(&self.0.state);
        let mut hasher = DefaultHasher::new();
        for (at, target) in &state.durable {
            at.hash(&mut hasher);
            match target {
                Target::File(node) => (0, node).hash(&mut hasher),
                Target::Folder(node) => (1, node).hash(&mut hasher),
            }
        }
        for (node, file) in &state.files {
            (node, file.durable.len, file.durable.blocks.len()).hash(&mut hasher);
            for block in file.durable.blocks.iter() {
                match block {
                    // The cut made it: another may come to lie there.
                    Some(block) if Arc::strong_count(block) == 1 => {
                        crc32c::crc32c(&block[..]).hash(&mut hasher);
                    }
                    Some(block) => hasher.write_usize(Arc::as_ptr(block).addr()),
                    None => hasher.write_usize(0),
                }
            }
        }
        hasher.finish()
    }

    /// Which file a name leads to: [`Operation`] names it so.
    pub(super) fn node(&self, path: &Path) -> io::Result<Node> {
        self.state().file(path)
    }

    /// One operation, unless it is to fail.
    fn operate<T>(
        &self,
        operation: Operation,
        work: impl FnOnce(&mut State) -> io::Result<T>,
    ) -> io::Result<T> {
        self.operate_or(operation, work, |_, _| {})
    }

    /// With what it does all the same when it is to fail.
    fn operate_or<T>(
        &self,
        operation: Operation,
        work: impl FnOnce(&mut State) -> io::Result<T>,
        fail: impl FnOnce(&mut State, &mut Random),
    ) -> io::Result<T> {
        let observer = lock(&self.0.observer).clone();
        let tell = |is_before| {
            if let Some(observer) = &observer {
                observer(self, Moment { is_before, operation });
            }
        };
        tell(true);
        let mut state = lock(&self.0.state);
        let result = match state.step(operation) {
            Ok(()) => work(&mut state),
            Err(error) => {
                let mut random = Random(state.operations);
                fail(&mut state, &mut random);
                Err(error)
            }
        };
        state.version += 1;
        drop(state);
        tell(false);
        result
    }
}

impl Disk for SimDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let node = self.operate(Operation::Create, |state| {
            let place = state.place(path)?;
            let node = state.new_node();
            state.put_name(place, Target::File(node))?;
            state.files.insert(node, Inode::default());
            Ok(node)
        })?;
        Ok(Arc::new(SimFile { disk: self.clone(), node }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let node = lock(&self.0.state).file(path)?;
        Ok(Arc::new(SimFile { disk: self.clone(), node }))
    }

    fn open_to_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.open(path)
    }

    fn open_body(&self, path: &Path) -> io::Result<File> {
        let state = self.state();
        let content = &state.files[&state.file(path)?].seen;
        let mut bodies = lock(&self.0.bodies);
        let known = bodies.iter().find(|(known, _)| {
            known.len == content.len && Arc::ptr_eq(&known.blocks, &content.blocks)
        });
        if let Some((_, file)) = known {
            return file.try_clone();
        }
        let file = tempfile::tempfile()?;
        file.write_all_at(&content.to_vec(), 0)?;
        if bodies.len() >= BODIES {
            bodies.remove(0);
        }
        bodies.push((content.clone(), file.try_clone()?));
        Ok(file)
    }

    fn create_dir(&self, path: &Path) -> io::Result<bool> {
        self.operate(Operation::CreateDir, |state| {
            let place = state.place(path)?;
            match state.seen.get(&place) {
                Some(Target::Folder(_)) => Ok(false),
                Some(Target::File(_)) => Err(io::ErrorKind::AlreadyExists.into()),
                None => {
                    let node = state.new_node();
                    state.put_name(place, Target::Folder(node))?;
                    Ok(true)
                }
            }
        })
    }

    fn names(&self, folder: &Path) -> io::Result<Vec<String>> {
        let state = lock(&self.0.state);
        let folder = state.folder(folder)?;
        let entries = state.seen.range((folder, Arc::from(""))..(folder + 1, Arc::from("")));
        Ok(entries.map(|((_, name), _)| String::from(&**name)).collect())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.operate(Operation::SyncDir, |state| {
            let folder = state.folder(path)?;
            state.settle_names(folder);
            Ok(())
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.operate(Operation::Rename, |state| {
            let (from, to) = (state.place(from)?, state.place(to)?);
            let target = *state.seen.get(&from).ok_or(io::ErrorKind::NotFound)?;
            state.change_name(NameItem::Rename { from, to, target });
            Ok(())
        })
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.operate(Operation::Link, |state| {
            let node = state.file(from)?;
            let place = state.place(to)?;
            state.put_name(place, Target::File(node))
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.operate(Operation::Remove, |state| {
            state.file(path)?;
            let at = state.place(path)?;
            state.change_name(NameItem::Remove { at });
            Ok(())
        })
    }

    fn free(&self, _path: &Path) -> io::Result<u64> {
        Ok(lock(&self.0.state).free)
    }

    fn is_copy_on_write(&self, _path: &Path) -> io::Result<bool> {
        Ok(false)
    }

    fn lock(&self, _path: &Path) -> Result<Lock, LockError> {
        if self.0.is_locked.swap(true, Ordering::SeqCst) {
            return Err(LockError::Held("another".to_owned()));
        }
        Ok(Box::new(Locked(Arc::clone(&self.0.is_locked))))
    }
}

struct Locked(Arc<AtomicBool>);

impl Drop for Locked {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// An open file; its name may be gone.
struct SimFile {
    disk: SimDisk,
    node: Node,
}

impl DiskFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.disk.0.state).inode(self.node).seen.len)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        lock(&self.disk.0.state).inode(self.node).seen.read(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let node = self.node;
        let write = |state: &mut State, bytes: &[u8]| {
            let inode = state.inode(node);
            let before = inode.seen.len;
            let touched = inode.seen.write(bytes, offset);
            let blocks = touched.into_iter().map(|(index, block)| FileItem::Block(index, block));
            inode.items.extend(blocks);
            if inode.seen.len != before {
                inode.items.push(FileItem::Grow(inode.seen.len));
            }
        };
        self.disk.operate_or(
            Operation::Write { node, offset, len: bytes.len() },
            |state| {
                write(state, bytes);
                Ok(())
            },
            |state, random| {
                let len = at(random.below(bytes.len() as u64));
                write(state, &bytes[..len]);
            },
        )
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.operate_or(
            Operation::Sync(self.node),
            |state| {
                state.inode(self.node).settle();
                Ok(())
            },
            |state, random| {
                state.has_dropped |= !state.inode(self.node).items.is_empty();
                state.inode(self.node).settle_badly(random);
            },
        )
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.disk.operate(Operation::Truncate(self.node), |state| {
            let inode = state.inode(self.node);
            let item = match len < inode.seen.len {
                true => FileItem::Shrink(len),
                false => FileItem::Grow(len),
            };
            inode.seen.apply(&item);
            inode.items.push(item);
            Ok(())
        })
    }
}

fn at(n: u64) -> usize {
    usize::try_from(n).unwrap()
}
