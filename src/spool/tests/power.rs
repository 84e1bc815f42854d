//! Power cuts after every operation of the real engine on a [`SimDisk`], and what a start makes of each.
//!
//! A *run* works through steps and keeps a journal: what was asked, what was answered, and a *shot* of the disk before
//! and after each operation. Each shot is then cut in many ways, and a spool is opened on what is left. It must hold
//! what the operations up to some point make, in order and whole: a point not before the last one that was answered
//! `Ok` when it was durable. What was refused has no part in it.
//!
//! While the one who asks has an answer to write down, the disk stands still: so no shot misses an answer that was
//! given before its time.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::pin::pin;
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll, Wake, Waker};

use tokio::runtime::{self, Runtime};

use super::log::{Counted, Paths};
use super::recover::{self, Depth, Recovered};
use super::sim_disk::{BLOCK, Cut, Fault, Item, Moment, Operation, SimDisk, State, Torn};
use super::*;

/// Where the spool lies. Every spool of these tests is opened by [`open_log`].
fn spool() -> config::Spool {
    config::Spool { path: "/spool".into(), min_free: 1_000_000, keep_failed: WEEK }
}

/// So small that segments fill up, and are written over, in every run.
const TINY: Geometry = Geometry {
    segment: 16 * 1024,
    idle: 4 * 1024,
    reserve: 8 * 1024,
    few: 2,
    // What happens by itself after some time would happen at any time here.
    quiet: Duration::MAX,
    patience: Duration::MAX,
    fresh: 0,
};

async fn open_log(disk: &SimDisk) -> Result<(Log, Report), OpenError> {
    open_with(disk, TINY).await
}

async fn open_with(disk: &SimDisk, geometry: Geometry) -> Result<(Log, Report), OpenError> {
    Log::open_on(Arc::new(disk.clone()), &spool(), geometry).await
}

/// With a reserve that is made whenever there is none, in three pieces.
const RESERVING: Geometry = Geometry { reserve: 2 * PIECE + 1, quiet: Duration::ZERO, ..TINY };
/// Octets of a reserve that are written at once. No other write of these tests has so many.
const PIECE: u64 = 256 * 1024;

/// The smallest content that gets a side file while the memory is [`CROWDED`], as it is in every run: so the disks are
/// small, and many of them can be looked at.
const LARGE: usize = 64 * 1024 + 1;
/// One that is written and read in several pieces.
const HUGE: usize = 1024 * 1024 + 1;
const CROWDED: u64 = 64 * 1024 * 1024;

/// One change of state, as the model has it.
#[derive(Clone, Debug)]
enum Change {
    Put(u128, Arc<[u8]>),
    Update(u128, u16),
    Hold(u128, u16),
    Fail(u128, u16),
    Attempt(u128, u16),
    Requeue(u128, u16),
    Release(u128, u16),
    Done(u128),
    Delete(u128),
    /// Of that number; 0 takes it away.
    Note(u8, u16),
}

impl Change {
    fn message(&self) -> Option<u128> {
        match self {
            Self::Put(n, _)
            | Self::Update(n, _)
            | Self::Hold(n, _)
            | Self::Fail(n, _)
            | Self::Attempt(n, _)
            | Self::Requeue(n, _)
            | Self::Release(n, _)
            | Self::Done(n)
            | Self::Delete(n) => Some(*n),
            Self::Note(..) => None,
        }
    }
}

/// One `apply`.
#[derive(Clone, Debug)]
struct Request {
    changes: Vec<Change>,
    durability: Durability,
}

#[derive(Clone, Debug)]
enum Step {
    /// One after the other, or all at once.
    Apply(Vec<Request>),
    /// What was done lazily gets the time to be synced.
    Settle,
    /// A large content that is not put; received in part, or whole.
    Discard {
        is_whole: bool,
    },
    Restart,
    Kill,
    /// Waits until the spool says that it can write again.
    Recover,
    /// Waits until the reserve is there.
    Reserve,
    /// Asked when the writer of a reserve stands before the piece that was named; then it goes on. The next time it
    /// stands before the piece that is named here.
    Meanwhile(Request, Option<u64>),
}

/// A message of the model.
#[derive(Clone, PartialEq, Eq)]
struct Message {
    state: QueueState,
    /// None: never tried.
    attempts: Option<u16>,
    /// The last that was written of it is the mark of an attempt.
    is_attempted: bool,
    body: Arc<[u8]>,
}

/// The messages, and beside them the notes.
#[derive(Clone, Default, PartialEq, Eq)]
struct Model {
    messages: BTreeMap<u128, Message>,
    notes: BTreeMap<u8, u16>,
}

impl Model {
    fn new() -> Self {
        Self::default()
    }

    fn has_notes_of(&self, log: &Log) -> bool {
        (0..NOTES).all(|key| log.note(&name_of(key)) == self.notes.get(&key).map(|n| value(*n)))
    }
}

impl std::ops::Deref for Model {
    type Target = BTreeMap<u128, Message>;

    fn deref(&self) -> &Self::Target {
        &self.messages
    }
}

impl std::ops::DerefMut for Model {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.messages
    }
}

/// Notes are of numbers below.
const NOTES: u8 = 3;

fn name_of(key: u8) -> String {
    format!("note/{key}")
}

/// Of a length that is not always the same.
fn value(n: u16) -> Vec<u8> {
    n.to_be_bytes().repeat(usize::from(n % 700))
}

impl Request {
    fn apply(&self, model: &mut Model) {
        for change in &self.changes {
            let (n, state, attempts) = match change {
                Change::Put(n, body) => {
                    let body = Arc::clone(body);
                    let (state, attempts) = (QueueState::Queued, None);
                    model.insert(*n, Message { state, attempts, is_attempted: false, body });
                    continue;
                }
                Change::Done(n) | Change::Delete(n) => {
                    model.remove(n);
                    continue;
                }
                Change::Note(key, n) => {
                    match value(*n).is_empty() {
                        true => model.notes.remove(key),
                        false => model.notes.insert(*key, *n),
                    };
                    continue;
                }
                Change::Attempt(n, attempts)
                | Change::Requeue(n, attempts)
                | Change::Release(n, attempts) => (n, QueueState::Queued, attempts),
                // It does not undo a hold.
                Change::Update(n, attempts) => match model.get(n).map(|message| message.state) {
                    Some(QueueState::Held) => (n, QueueState::Held, attempts),
                    _ => (n, QueueState::Queued, attempts),
                },
                Change::Hold(n, attempts) => (n, QueueState::Held, attempts),
                Change::Fail(n, attempts) => (n, QueueState::Failed, attempts),
            };
            // It may not be there when what put it there was lost by damage.
            if let Some(message) = model.get_mut(n) {
                (message.state, message.attempts) = (state, Some(*attempts));
                message.is_attempted = matches!(change, Change::Attempt(..));
            }
        }
    }

    fn puts(&self) -> impl Iterator<Item = u128> {
        self.changes.iter().filter_map(|change| match change {
            Change::Put(n, _) => Some(*n),
            Change::Update(..)
            | Change::Hold(..)
            | Change::Fail(..)
            | Change::Attempt(..)
            | Change::Requeue(..)
            | Change::Release(..)
            | Change::Done(_)
            | Change::Delete(_)
            | Change::Note(..) => None,
        })
    }
}

fn durably(changes: Vec<Change>) -> Request {
    Request { changes, durability: Durability::Durable }
}

fn lazily(changes: Vec<Change>) -> Request {
    Request { changes, durability: Durability::Lazy }
}

fn content(n: u128, len: usize) -> Arc<[u8]> {
    let mut text = format!("Subject: message {n} of {len}\r\n\r\n").into_bytes();
    text.resize(len.min(BLOCK), b'.');
    let number = u32::try_from(n).unwrap().to_le_bytes();
    text.chunks_exact_mut(64).for_each(|line| line[60..].copy_from_slice(&number));
    let mut all = text.repeat(len.div_ceil(BLOCK));
    all.truncate(len);
    all.into()
}

fn message(n: u128, len: usize) -> Change {
    Change::Put(n, content(n, len))
}

/// What happened, in order.
#[derive(Clone, Debug)]
enum Event {
    Asked(Request),
    /// To the request of this position.
    Answered(usize, Answer),
    /// The spool was opened again without a power cut: it says itself that all it found is on stable storage.
    Reopened,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Ok,
    Refused,
    /// Refused while the spool could not write at all, so it could not take back what it had written.
    InTrouble,
}

/// The disk at one time.
struct Shot {
    state: State,
    /// So many events had happened.
    events: usize,
    at: Option<Moment>,
}

#[derive(Default)]
struct Journal {
    events: Vec<Event>,
    shots: Vec<Shot>,
}

impl Journal {
    /// Called with the lock of the journal: what is not written down yet has not been asked.
    fn take_shot(&mut self, disk: &SimDisk, at: Option<Moment>) {
        let state = disk.state();
        let events = self.events.len();
        let is_same = |last: &Shot| last.state.version == state.version && last.events == events;
        if !self.shots.last().is_some_and(is_same) {
            self.shots.push(Shot { state, events, at });
        }
    }
}

/// Who may go on: the one who asks, or the disk.
#[derive(Default)]
struct Turn {
    state: Mutex<TurnState>,
    changed: Condvar,
}

#[derive(Default)]
struct TurnState {
    is_asking: bool,
    wakes: u64,
    seen: u64,
    /// The writer of a reserve stands before this piece, until something was asked.
    stop_before: Option<u64>,
    is_stopped: bool,
    /// What is asked now lets it go on.
    goes_on: bool,
}

impl Wake for Turn {
    fn wake(self: Arc<Self>) {
        lock(&self.state).wakes += 1;
        self.changed.notify_all();
    }
}

impl Turn {
    /// The disk waits until every answer was looked at.
    fn wait(&self) {
        let mut state = lock(&self.state);
        while state.is_asking && state.wakes != state.seen {
            state = self.changed.wait(state).unwrap();
        }
    }

    fn wait_if_stopped(&self, operation: Operation) {
        let mut state = lock(&self.state);
        let Operation::Write { offset, len, .. } = operation else { return };
        if len as u64 != PIECE || state.stop_before.is_none_or(|piece| offset != piece * PIECE) {
            return;
        }
        (state.stop_before, state.is_stopped) = (None, true);
        self.changed.notify_all();
        while state.is_stopped {
            state = self.changed.wait(state).unwrap();
        }
    }
}

impl TurnState {
    fn asked(&mut self) {
        if std::mem::take(&mut self.goes_on) {
            self.is_stopped = false;
        }
    }
}

/// The engine at work on a disk.
struct Run {
    disk: SimDisk,
    geometry: Geometry,
    log: Option<Log>,
    /// Contents of others, in memory.
    crowd: Option<Counted>,
    base: Model,
    journal: Arc<Mutex<Journal>>,
    turn: Arc<Turn>,
    runtime: Runtime,
    /// Several starts failed or several operations: what is in memory of the system need not be on disk.
    is_doubtful: bool,
}

fn runtime() -> Runtime {
    runtime::Builder::new_current_thread().enable_time().build().unwrap()
}

impl Run {
    fn new(disk: SimDisk, base: Model) -> Self {
        let run = Self {
            disk,
            geometry: TINY,
            log: None,
            crowd: None,
            base,
            journal: Arc::default(),
            turn: Arc::default(),
            runtime: runtime(),
            is_doubtful: false,
        };
        run.record();
        run
    }

    fn record(&self) {
        let (journal, turn) = (Arc::clone(&self.journal), Arc::clone(&self.turn));
        self.disk.observe(move |disk, moment| {
            if moment.is_before {
                turn.wait_if_stopped(moment.operation);
                turn.wait();
            }
            lock(&journal).take_shot(disk, Some(moment));
        });
    }

    /// Waits for `future`, and lets the disk wait while there is an answer to write down.
    fn drive<T>(&self, future: impl Future<Output = T>) -> T {
        let _context = self.runtime.enter();
        let waker = Waker::from(Arc::clone(&self.turn));
        let mut future = pin!(future);
        let mut seen = {
            let mut state = lock(&self.turn.state);
            state.is_asking = true;
            state.wakes += 1;
            state.wakes
        };
        loop {
            let polled = future.as_mut().poll(&mut Context::from_waker(&waker));
            lock(&self.journal).take_shot(&self.disk, None);
            let mut state = lock(&self.turn.state);
            if let Poll::Ready(value) = polled {
                state.is_asking = false;
                state.asked();
                self.turn.changed.notify_all();
                return value;
            }
            state.seen = seen;
            state.asked();
            self.turn.changed.notify_all();
            while state.wakes == state.seen {
                state = self.turn.changed.wait(state).unwrap();
            }
            seen = state.wakes;
        }
    }

    fn open(&mut self) -> Result<Report, OpenError> {
        let (log, report) = self.drive(open_with(&self.disk, self.geometry))?;
        self.crowd = Some(Counted::new(Arc::clone(&log.shared.space), CROWDED));
        self.log = Some(log);
        if !self.is_doubtful {
            lock(&self.journal).events.push(Event::Reopened);
        }
        Ok(report)
    }

    async fn ask(&self, request: Request) {
        let log = self.log.as_ref().unwrap();
        let mut ops = Vec::new();
        for change in &request.changes {
            ops.push(match change {
                Change::Put(n, body) => {
                    // What cannot be received is not asked for.
                    let Ok(staged) = receive(log, body).await else { return };
                    Op::Put { envelope: sized(*n, body.len()), body: staged }
                }
                Change::Update(n, attempts) => update(*n, *attempts),
                Change::Hold(n, attempts) => Op::Hold { id: id(*n), progress: progress(*attempts) },
                Change::Fail(n, attempts) => Op::Fail { id: id(*n), progress: progress(*attempts) },
                Change::Attempt(n, attempts) => attempt(*n, *attempts, &[1]),
                Change::Requeue(n, attempts) => {
                    Op::Requeue { id: id(*n), progress: progress(*attempts) }
                }
                Change::Release(n, attempts) => {
                    Op::Release { id: id(*n), progress: progress(*attempts) }
                }
                Change::Done(n) => done(*n),
                Change::Delete(n) => Op::Delete { id: id(*n) },
                Change::Note(key, n) => note(&name_of(*key), &value(*n)),
            });
        }
        let durability = request.durability;
        let at = {
            let mut journal = lock(&self.journal);
            let asked = |event: &&Event| matches!(event, Event::Asked(_));
            let at = journal.events.iter().filter(asked).count();
            journal.events.push(Event::Asked(request));
            at
        };
        let answer = match log.apply(ops, durability).await {
            Ok(()) => Answer::Ok,
            Err(_) if log.health().trouble.is_some() => Answer::InTrouble,
            Err(_) => Answer::Refused,
        };
        lock(&self.journal).events.push(Event::Answered(at, answer));
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Apply(requests) => {
                let all: Vec<_> =
                    requests.into_iter().map(|request| Box::pin(self.ask(request))).collect();
                self.drive(together(all));
            }
            Step::Settle => {
                self.log.as_ref().unwrap().shared.wait_until_filed();
                for _ in 0..50 {
                    let items = self.disk.state().items();
                    if !items.iter().any(|item| matches!(item, Item::Block(..))) {
                        break;
                    }
                    let state = lock(&self.turn.state);
                    let pause = Duration::from_millis(2);
                    drop(self.turn.changed.wait_timeout(state, pause).unwrap());
                }
            }
            Step::Recover => {
                let log = self.log.as_ref().unwrap();
                self.wait_until(|| log.health().trouble.is_none());
            }
            Step::Reserve => {
                let folder = spool().path.join("log");
                self.wait_until(|| {
                    let names = self.disk.names(&folder).unwrap();
                    names.iter().any(|name| segment::parse_spare(name).is_some())
                });
            }
            Step::Meanwhile(request, next) => {
                self.wait_until(|| lock(&self.turn.state).is_stopped);
                let mut state = lock(&self.turn.state);
                (state.stop_before, state.goes_on) = (next, true);
                drop(state);
                self.drive(self.ask(request));
            }
            Step::Discard { is_whole } => {
                let log = self.log.as_ref().unwrap();
                let content = content(0, LARGE);
                self.drive(async {
                    match is_whole {
                        true => drop(receive(log, &content).await),
                        false => drop(log.stage().write(&content).await),
                    }
                });
            }
            Step::Restart => {
                self.log = None;
                self.reopen();
            }
            Step::Kill => {
                let killed = self.disk.kill();
                self.disk.observe(|_, _| {});
                self.log = None;
                self.disk = killed;
                self.record();
                self.reopen();
            }
        }
    }

    fn wait_until(&self, is_so: impl Fn() -> bool) {
        for _ in 0..1_000 {
            if is_so() {
                return;
            }
            let state = lock(&self.turn.state);
            let pause = Duration::from_millis(20);
            drop(self.turn.changed.wait_timeout(state, pause).unwrap());
        }
        panic!("it does not come to pass");
    }

    /// After a fault the spool may not open: then it is tried once more, as an operator would.
    fn reopen(&mut self) {
        if self.open().is_err() {
            self.is_doubtful = true;
            self.open().unwrap();
        }
    }

    /// Ends the run. What the end does is part of it.
    fn finish(mut self) -> Finished {
        self.log = None;
        self.disk.observe(|_, _| {});
        let Journal { events, shots } = std::mem::take(&mut *lock(&self.journal));
        Finished { disk: self.disk, base: self.base, events, shots }
    }
}

/// All of them, each polled when anything happens.
async fn together<F: Future<Output = ()> + Unpin>(mut futures: Vec<F>) {
    std::future::poll_fn(|context| {
        futures.retain_mut(|future| pin!(future).poll(context).is_pending());
        match futures.is_empty() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
}

async fn receive(log: &Log, content: &[u8]) -> Result<Staged, SpoolError> {
    let mut stage = log.stage();
    stage.write(content).await?;
    stage.finish().await
}

fn sized(n: u128, len: usize) -> Envelope {
    Envelope { size: len as u64, ..envelope(n) }
}

/// A run that is over.
struct Finished {
    disk: SimDisk,
    base: Model,
    events: Vec<Event>,
    shots: Vec<Shot>,
}

impl Finished {
    /// All that the spool may hold after a power cut when so many events had happened.
    fn candidates(&self, events: usize) -> Vec<Model> {
        let mut requests: Vec<(&Request, Option<Answer>)> = Vec::new();
        let mut sure = 0;
        for event in &self.events[..events] {
            match event {
                Event::Asked(request) => requests.push((request, None)),
                Event::Answered(at, answer) => {
                    requests[*at].1 = Some(*answer);
                    if *answer == Answer::Ok {
                        // It writes again, so it has taken back what it refused.
                        let troubled = requests[..*at].iter_mut();
                        troubled
                            .filter(|request| request.1 == Some(Answer::InTrouble))
                            .for_each(|request| request.1 = Some(Answer::Refused));
                        if requests[*at].0.durability == Durability::Durable {
                            sure = sure.max(at + 1);
                        }
                    }
                }
                Event::Reopened => sure = requests.len(),
            }
        }
        let mut ended: Vec<Model> = Vec::new();
        let mut open = vec![self.base.clone()];
        for (at, (request, answer)) in requests.iter().enumerate() {
            if *answer == Some(Answer::Refused) {
                continue;
            }
            let is_sure = at < sure && *answer == Some(Answer::Ok);
            let mut with = open.clone();
            with.iter_mut().for_each(|model| request.apply(model));
            if is_sure {
                open = with;
            } else if at < sure || *answer == Some(Answer::InTrouble) {
                open.extend(with);
            } else {
                ended.append(&mut open);
                open = with;
            }
        }
        ended.append(&mut open);
        ended
    }
}

/// How thoroughly a shot is cut.
#[derive(Clone, Copy)]
struct Plan {
    /// With at most so many items: all subsets of them.
    exhaustive: usize,
    /// Else so many, besides the usual ones.
    seeded: u64,
    /// Of so many cuts one is followed up: the spool is used, and opened again.
    follow: u64,
    /// Of so many cuts one is followed by a second power cut in the start that comes after it.
    second: u64,
    /// At so many shots once the program is killed, started again, and then the power fails.
    kill: u64,
}

const THOROUGH: Plan = Plan { exhaustive: 10, seeded: 64, follow: 10, second: 150, kill: 8 };
/// For where there are very many shots.
const BRIEF: Plan = Plan { exhaustive: 2, seeded: 3, follow: 20, second: u64::MAX, kill: 60 };
/// For where very much is not synced.
const RESERVED: Plan = Plan { exhaustive: 6, seeded: 12, follow: 10, second: 150, kill: 8 };

impl Plan {
    fn cuts(&self, items: &[Item], random: &mut Random) -> Vec<Cut> {
        let n = items.len();
        let plain = |chosen| Cut { chosen, ..Cut::default() };
        if n == 0 {
            return vec![Cut::default()];
        }
        let mut some = |n: usize| -> Vec<bool> { (0..n).map(|_| random.below(2) == 0).collect() };
        let mut cuts: Vec<Cut> = Vec::new();
        if n <= self.exhaustive {
            let subset = |bits: u32| (0..n).map(|item| bits >> item & 1 == 1).collect();
            cuts.extend((0..1_u32 << n).map(subset).map(plain));
        } else {
            cuts.extend((0..self.seeded).map(|_| plain(some(n))));
            cuts.extend([vec![false; n], vec![true; n]].map(plain));
            cuts.push(plain((0..n).map(|item| item < n / 2).collect()));
            cuts.push(plain((0..n).map(|item| item >= n / 2).collect()));
        }
        let blocks: Vec<usize> =
            (0..n).filter(|item| matches!(items[*item], Item::Block(..))).collect();
        if blocks.is_empty() {
            return cuts;
        }
        for chosen in [vec![true; n], some(n)] {
            let item = blocks[index(random, blocks.len())];
            let sectors = 1 + index(random, BLOCK / 512 - 1);
            let torn = Some(Torn { item, sectors, is_start: random.below(3) != 0 });
            let mut cut = Cut { chosen, torn, stale: None };
            cut.chosen[item] = true;
            cuts.push(cut);
        }
        let mut chosen = vec![true; n];
        chosen[blocks[index(random, blocks.len())]] = false;
        cuts.push(Cut { chosen, torn: None, stale: Some(random.below(u64::MAX)) });
        cuts
    }
}

fn index(random: &mut Random, len: usize) -> usize {
    usize::try_from(random.below(len as u64)).unwrap()
}

/// Side files that were read once: the file, and whose content it has.
type Verified = Mutex<HashSet<(u64, u128)>>;

/// Disks that were opened once, and what they hold: another cut may leave the same.
type Known = Mutex<HashMap<u64, Model>>;

/// Cuts all shots of a run; returns the number of cuts that left a disk of their own.
fn check(run: &Finished, plan: Plan, seed: u64) -> u64 {
    let (next, count) = (AtomicUsize::new(0), AtomicU64::new(0));
    let (verified, known) = (Verified::default(), Known::default());
    let failed: Mutex<Option<String>> = Mutex::default();
    // What they may leave is the same for all shots between two events.
    let groups: Vec<_> = run.shots.chunk_by(|one, next| one.events == next.events).collect();
    let starts = groups.iter().scan(0, |start, group| {
        *start += group.len();
        Some(*start - group.len())
    });
    let groups: Vec<_> = starts.zip(groups.iter().copied()).collect();
    let work = || {
        let runtime = runtime();
        let (verified, known) = (&verified, &known);
        let cutter = Cutter { run, plan, runtime: &runtime, verified, known };
        while let Some((start, group)) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
            let candidates = run.candidates(group[0].events);
            for (at, shot) in (*start..).zip(*group) {
                if lock(&failed).is_some() {
                    return;
                }
                match cutter.check(shot, &candidates, seed << 32 | at as u64) {
                    Ok(cuts) => drop(count.fetch_add(cuts, Ordering::Relaxed)),
                    Err(what) => {
                        let place = format!("run {seed}, shot {at} ({:?})", shot.at);
                        lock(&failed).get_or_insert(format!("{place}: {what}"));
                    }
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let second = scope.spawn(work);
        work();
        second.join().unwrap();
    });
    if let Some(what) = lock(&failed).take() {
        let mut story = String::new();
        for event in &run.events {
            writeln!(story, "  {}", shortened(event)).unwrap();
        }
        panic!("{what}\nafter\n{story}");
    }
    count.into_inner()
}

/// An event without the contents.
fn shortened(event: &Event) -> String {
    let Event::Asked(request) = event else { return format!("{event:?}") };
    let change = |change: &Change| match change {
        Change::Put(n, body) => format!("Put({n}, {} octets)", body.len()),
        other => format!("{other:?}"),
    };
    let changes: Vec<_> = request.changes.iter().map(change).collect();
    format!("Asked {:?} {}", request.durability, changes.join(", "))
}

struct Cutter<'a> {
    run: &'a Finished,
    plan: Plan,
    runtime: &'a Runtime,
    verified: &'a Verified,
    known: &'a Known,
}

impl Cutter<'_> {
    fn check(&self, shot: &Shot, candidates: &[Model], seed: u64) -> Result<u64, String> {
        let mut random = Random(seed);
        let items = shot.state.items();
        let mut count = 0;
        // What a failed sync dropped a start still finds in memory, so it takes that for safe.
        if !shot.state.has_dropped && random.below(self.plan.kill) == 0 {
            count += self.kill(shot, random.below(u64::MAX))?;
        }
        for cut in self.plan.cuts(&items, &mut random) {
            let at = |what: String| format!("{what}\n  events {}, {cut}", shot.events);
            let disk = self.run.disk.cut(&shot.state, &items, &cut);
            let is_plain = cut.torn.is_none() && cut.stale.is_none();
            let fingerprint = is_plain.then(|| disk.fingerprint());
            if let Some(fingerprint) = fingerprint
                && let Some(model) = lock(self.known).get(&fingerprint)
                && candidates.contains(model)
            {
                continue;
            }
            let follow = random.below(self.plan.follow) == 0;
            let model = self.runtime.block_on(self.open(&disk, candidates, follow)).map_err(at)?;
            count += 1;
            if let Some(fingerprint) = fingerprint {
                lock(self.known).insert(fingerprint, model.clone());
            }
            if random.below(self.plan.second) == 0 {
                let disk = self.run.disk.cut(&shot.state, &items, &cut);
                let second = random.below(u64::MAX);
                count += self.cut_again(disk, model, second).map_err(at)?;
            }
        }
        Ok(count)
    }

    /// Opens what a power cut left, and compares. Returns what is there.
    async fn open(
        &self,
        disk: &SimDisk,
        candidates: &[Model],
        follow: bool,
    ) -> Result<Model, String> {
        let (log, report) = open_log(disk).await.map_err(|e| format!("it does not open: {e}"))?;
        let model = compare(&log, &report, disk, candidates, self.verified)?;
        if follow {
            let n = if model.contains_key(&NEXT) { NEXT + 1 } else { NEXT };
            let next = durably(vec![message(n, 300)]);
            let body = Staged::Memory(content(n, 300).to_vec());
            let ops = vec![Op::Put { envelope: sized(n, 300), body }];
            let put = log.apply(ops, Durability::Durable).await;
            put.map_err(|e| format!("nothing can be put: {e}"))?;
            drop(log);
            let again = open_log(disk).await;
            let (log, report) = again.map_err(|e| format!("it does not open twice: {e}"))?;
            let mut after = model.clone();
            next.apply(&mut after);
            let compared = compare(&log, &report, disk, &[after], self.verified);
            compared.map_err(|what| format!("opened again: {what}"))?;
            drop(log);
        } else {
            drop(log);
        }
        compare_files(disk, &model)?;
        Ok(model)
    }

    /// The power fails again while the spool is opened and used for the first time.
    fn cut_again(&self, disk: SimDisk, model: Model, seed: u64) -> Result<u64, String> {
        let mut run = Run::new(disk, model);
        run.open().map_err(|e| format!("it does not open: {e}"))?;
        run.step(Step::Apply(vec![durably(vec![message(NEXT, 300)])]));
        let run = run.finish();
        self.check_again(&run, seed)
    }

    /// The program is killed at `shot`, and the power fails while it starts again and after that.
    fn kill(&self, shot: &Shot, seed: u64) -> Result<u64, String> {
        let disk = self.run.disk.kill_at(&shot.state);
        disk.set_fault(None);
        let mut run = Run::new(disk, self.run.base.clone());
        lock(&run.journal).events.extend_from_slice(&self.run.events[..shot.events]);
        run.open().map_err(|e| format!("killed, it does not open: {e}"))?;
        run.step(Step::Apply(vec![durably(vec![message(NEXT, 300)])]));
        let run = run.finish();
        let checked = self.check_again(&run, seed);
        checked.map_err(|what| format!("killed before: {what}"))
    }

    fn check_again(&self, run: &Finished, seed: u64) -> Result<u64, String> {
        let rare = u64::MAX;
        let plan = Plan { exhaustive: 5, seeded: 12, follow: 10, second: rare, kill: rare };
        let known = Known::default();
        let cutter = Cutter { run, plan, known: &known, ..*self };
        let mut count = 0;
        for (at, shot) in run.shots.iter().enumerate() {
            let candidates = run.candidates(shot.events);
            let checked = cutter.check(shot, &candidates, seed ^ at as u64);
            count += checked.map_err(|what| format!("cut again at {:?}: {what}", shot.at))?;
        }
        Ok(count)
    }
}

/// An id that no step uses.
const NEXT: u128 = 1_000_000;

/// Whether a spool holds what one of `candidates` says, to the octet, and nothing is damaged.
fn compare(
    log: &Log,
    report: &Report,
    disk: &SimDisk,
    candidates: &[Model],
    verified: &Verified,
) -> Result<Model, String> {
    let heads = log.heads(None, usize::MAX);
    let found = candidates.iter().rev().find(|model| {
        model.has_notes_of(log)
            && model.len() == heads.len()
            && model.iter().zip(&heads).all(|((n, message), head)| *head == message.head(*n))
    });
    let Some(model) = found else {
        let mut text = String::from("it holds");
        for head in &heads {
            let (id, state) = (head.id.as_u128(), head.state);
            write!(text, " {id}: {state:?} {}", head.attempts).unwrap();
        }
        for model in candidates {
            text.push_str("\n  it could hold");
            for (n, message) in model.iter() {
                write!(text, " {n}: {:?} {:?}", message.state, message.attempts).unwrap();
            }
        }
        write!(text, "\n  {report:?}").unwrap();
        return Err(text);
    };
    if !report.damaged.is_empty() {
        return Err(format!("a power cut counts as damage: {:?}", report.damaged));
    }
    // Failed messages move meanwhile: here from the log, below from their files.
    for (n, message) in model.iter() {
        message.compare(*n, log, verified)?;
    }
    log.shared.wait_until_filed();
    if log.heads(None, usize::MAX) != heads {
        return Err(format!("filing changes what is listed from {heads:?}"));
    }
    let is_failed = |message: &Message| message.state == QueueState::Failed;
    for (n, message) in model.iter().filter(|(_, message)| is_failed(message)) {
        message.compare(*n, log, verified).map_err(|what| format!("filed: {what}"))?;
        let eml = disk.content(&spool().path.join("failed").join(format!("{}.eml", id(*n))));
        if eml.ok().as_deref() != Some(&*message.body) {
            return Err(format!("the file of {n} is not its content"));
        }
    }
    Ok(model.clone())
}

/// Whether a spool that was closed has the files of `model`, and nothing is left over.
fn compare_files(disk: &SimDisk, model: &Model) -> Result<(), String> {
    let is_failed = |message: &Message| message.state == QueueState::Failed;
    let is_large = |message: &&Message| message.body.len() >= LARGE && !is_failed(message);
    let large = model.values().filter(is_large).count();
    let failed = model.values().filter(|message| is_failed(message)).count();
    let names = |folder| disk.names(&spool().path.join(folder)).unwrap();
    let found = ["bodies", "tmp", "failed"].map(names);
    if found.each_ref().map(Vec::len) != [large, 0, 2 * failed] {
        return Err(format!("{large} large messages, {failed} failed, and files {found:?}"));
    }
    match names("log").iter().find(|name| name.starts_with(segment::UNNAMED)) {
        Some(name) => Err(format!("{name} is left over")),
        None => Ok(()),
    }
}

impl Message {
    fn head(&self, n: u128) -> Head {
        Head {
            id: id(n),
            state: self.state,
            due: self.progress().due,
            size: self.body.len() as u64,
            pending: 2,
            attempts: self.attempts.unwrap_or(0),
            in_doubt: self.is_attempted,
        }
    }

    fn progress(&self) -> Progress {
        match self.attempts {
            Some(attempts) => {
                let sending = if self.is_attempted { vec![1] } else { Vec::new() };
                Progress { sending, ..progress(attempts) }
            }
            None => Progress::new(UnixMillis(1_000), 2),
        }
    }

    fn compare(&self, n: u128, log: &Log, verified: &Verified) -> Result<(), String> {
        let stored = log.shared.read(id(n)).map_err(|e| e.to_string())?;
        if stored.envelope != sized(n, self.body.len()) || stored.progress != self.progress() {
            return Err(format!("{n} has changed: {:?}", stored.progress));
        }
        let key = match &stored.body {
            Body::Memory(_) => None,
            Body::File(file) => Some((file.file.metadata().unwrap().ino(), n)),
        };
        if key.is_some_and(|key| lock(verified).contains(&key)) {
            return Ok(());
        }
        let (mut reader, mut body) = (stored.body.reader(), Vec::new());
        while let Some(chunk) = reader.chunk_blocking().map_err(|e| format!("{n}: {e}"))? {
            body.extend_from_slice(&chunk);
        }
        if body != *self.body {
            return Err(format!("the content of {n} has changed"));
        }
        lock(verified).extend(key);
        Ok(())
    }
}

/// One of everything, with large contents and lazy operations in between.
fn all_steps() -> Vec<Step> {
    let one = |request| Step::Apply(vec![request]);
    vec![
        one(durably(vec![message(1, 100), message(2, 5_000)])),
        one(lazily(vec![Change::Update(1, 1)])),
        one(lazily(vec![Change::Attempt(1, 1), Change::Note(0, 5)])),
        one(lazily(vec![message(3, 700)])),
        one(durably(vec![message(4, 200)])),
        one(durably(vec![message(5, HUGE)])),
        one(lazily(vec![Change::Done(2), Change::Hold(3, 1)])),
        Step::Settle,
        Step::Apply(vec![
            durably(vec![message(6, 100)]),
            lazily(vec![message(7, 4_000)]),
            durably(vec![Change::Fail(4, 9), message(8, 50)]),
        ]),
        Step::Discard { is_whole: false },
        Step::Discard { is_whole: true },
        one(durably(vec![Change::Done(4), message(11, LARGE + 5_000)])),
        one(lazily(vec![Change::Fail(11, 2), Change::Done(5)])),
        one(lazily(vec![Change::Update(1, 2)])),
        Step::Settle,
        one(lazily(vec![Change::Attempt(6, 1), Change::Note(0, 699)])),
        // One that lies in files.
        one(durably(vec![Change::Requeue(11, 1), Change::Release(3, 2), Change::Note(1, 80)])),
        Step::Kill,
        one(durably(vec![message(9, 9_000), Change::Done(1), Change::Done(11)])),
        one(lazily(vec![Change::Update(3, 2)])),
        Step::Restart,
        one(lazily(vec![Change::Note(0, 0), Change::Attempt(6, 2), Change::Fail(7, 1)])),
        one(durably(vec![Change::Done(6), Change::Fail(8, 1)])),
        Step::Settle,
        // It is put again, and fails again.
        one(lazily(vec![Change::Requeue(8, 2)])),
        one(lazily(vec![Change::Fail(8, 4)])),
        one(lazily(vec![Change::Delete(7)])),
        one(durably(vec![Change::Done(3), Change::Done(8), Change::Done(9)])),
        one(durably(vec![message(10, 10)])),
    ]
}

/// Steps that nobody thought of.
fn random_steps(random: &mut Random) -> Vec<Step> {
    let mut known: Vec<(u128, QueueState)> = Vec::new();
    let mut next = 1;
    let mut large = 2;
    let mut steps = Vec::new();
    for _ in 0..14 {
        let mut request = |random: &mut Random, can_be_large: bool| {
            let mut changes = Vec::new();
            for _ in 0..=random.below(3) {
                let attempts = u16::try_from(1 + random.below(9)).unwrap();
                let at = random.below(known.len().max(1) as u64);
                let at = usize::try_from(at).unwrap();
                let known_one = known.get(at).copied();
                use QueueState::{Failed, Held, Queued};
                let mut into = |state| known[at].1 = state;
                changes.push(match (random.below(12), known_one) {
                    (0, _) => {
                        let key = u8::try_from(random.below(NOTES.into())).unwrap();
                        Change::Note(key, u16::try_from(random.below(30)).unwrap())
                    }
                    (1..=4, _) | (_, None) => {
                        let len = match random.below(12) {
                            0 if can_be_large && large > 0 => {
                                large -= 1;
                                LARGE
                            }
                            0..=2 => 2_000 + index(random, 8_000),
                            3 => 20_000,
                            _ => 1 + index(random, 300),
                        };
                        known.push((next, Queued));
                        next += 1;
                        message(next - 1, len)
                    }
                    (5, Some((n, Queued | Held))) => {
                        into(Held);
                        Change::Hold(n, attempts)
                    }
                    (6, Some((n, Queued | Held))) => {
                        into(Failed);
                        Change::Fail(n, attempts)
                    }
                    (7 | 8, Some((n, Queued))) => Change::Attempt(n, attempts),
                    (7, Some((n, Held))) => {
                        into(Queued);
                        Change::Release(n, attempts)
                    }
                    // What lies in files has to be read first, and is looked for.
                    (8, Some((n, Held))) if can_be_large => {
                        into(Queued);
                        Change::Requeue(n, attempts)
                    }
                    (7..=9, Some((n, Failed))) if can_be_large => {
                        into(Queued);
                        Change::Requeue(n, attempts)
                    }
                    (9, Some((n, Queued | Held))) => Change::Update(n, attempts),
                    (10, Some((n, _))) => {
                        known.remove(at);
                        Change::Delete(n)
                    }
                    (_, Some((n, _))) => {
                        known.remove(at);
                        Change::Done(n)
                    }
                });
            }
            match random.below(2) {
                0 => durably(changes),
                _ => lazily(changes),
            }
        };
        steps.push(match random.below(24) {
            0 => Step::Restart,
            1 => Step::Kill,
            2 => Step::Settle,
            3 => Step::Discard { is_whole: random.below(2) == 0 },
            // Of what comes at the same time, only small contents keep their order, and what asks for no files.
            4..=8 => Step::Apply((0..=random.below(3)).map(|_| request(random, false)).collect()),
            _ => Step::Apply(vec![request(random, true)]),
        });
    }
    steps
}

fn run(steps: Vec<Step>) -> Finished {
    let mut run = Run::new(SimDisk::new(), Model::new());
    run.open().unwrap();
    for step in steps {
        run.step(step);
    }
    run.finish()
}

fn is_slow() -> bool {
    std::env::var_os("SLOW_TESTS").is_some()
}

#[test]
fn a_power_cut_after_any_operation_loses_nothing_that_was_acknowledged() {
    let started = crate::clock::now();
    let mut cuts = check(&run(all_steps()), THOROUGH, 0);
    let wanted = if is_slow() { 100_000 } else { 10_000 };
    let mut seed = 1;
    while cuts < wanted {
        let run = run(random_steps(&mut Random(seed)));
        cuts += check(&run, THOROUGH, seed);
        seed += 1;
    }
    let took = crate::clock::now() - started;
    println!("{cuts} power cuts in {seed} runs, {took:?}");
    assert!(cuts >= wanted);
}

#[test]
fn indexes_say_the_same_as_all_that_is_in_the_log() {
    let mut with_index = 0;
    for seed in 0..if is_slow() { 400 } else { 40 } {
        let run = run(random_steps(&mut Random(seed)));
        let paths = Paths::new(&spool().path);
        for shot in run.shots.iter().step_by(7) {
            let disk = run.disk.kill_at(&shot.state);
            let read = |depth| recover::read(&disk, &paths, depth);
            // Before there is a segment there is nothing to read.
            let Ok(short) = read(Depth::Indexes) else { continue };
            if short.index.segments.is_empty() {
                continue;
            }
            let full = read(Depth::Everything).unwrap();
            let said = |found: &Recovered| {
                let index = &found.index;
                let heads: Vec<Head> = index.heads(None).collect();
                let places: Vec<_> = heads.iter().map(|head| index.find(head.id)).collect();
                let segments: Vec<_> =
                    index.segments.iter().map(|(n, of)| format!("{n} {}", of.needs())).collect();
                let notes: Vec<_> = (0..NOTES).map(|key| index.note(&name_of(key))).collect();
                let files: Vec<_> = index.files().collect();
                format!(
                    "{heads:?} {places:?} {segments:?} {notes:?} {files:?} {:?} {:?} {:?}",
                    index.failed, found.next, found.report
                )
            };
            assert_eq!(said(&short), said(&full), "seed {seed}, {:?}", shot.at);
            let names = disk.names(&paths.log).unwrap().into_iter();
            let mut starts = names.filter_map(|name| disk.content(&paths.log.join(name)).ok());
            let is_sealed = |bytes: Vec<u8>| segment::Header::decode(&bytes)?.sealed;
            with_index += usize::from(starts.any(|bytes| is_sealed(bytes).is_some()));
        }
    }
    assert!(with_index > 100, "{with_index} shots of a log with an index");
}

#[test]
fn damage_in_a_full_segment_is_told_when_the_message_is_read_and_in_its_index_at_the_start() {
    let runtime = runtime();
    let mut run = Run::new(SimDisk::new(), Model::new());
    run.geometry.few = usize::MAX;
    run.open().unwrap();
    for n in 1..=8 {
        run.step(Step::Apply(vec![durably(vec![message(n, 5_000)])]));
    }
    run.step(Step::Apply(vec![durably(vec![Change::Done(2)])]));
    let disk = run.finish().disk;
    let paths = Paths::new(&spool().path);
    let first = paths.log.join(disk.names(&paths.log).unwrap().remove(0));
    let sound = disk.content(&first).unwrap();
    let at = |words: &[u8]| {
        let found = sound.windows(words.len()).position(|window| window == words);
        found.unwrap_or_else(|| panic!("{words:?} is not there"))
    };
    let index = disk.names(&paths.log).unwrap().iter().find_map(|name| {
        let header = segment::Header::decode(&disk.content(&paths.log.join(name)).unwrap())?;
        header.sealed.map(|sealed| usize::try_from(sealed.offset).unwrap())
    });
    let index = index.expect("a segment that is full");
    let flipped = |at: usize| {
        let disk = disk.kill();
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        disk.set_content(&first, &bytes);
        disk
    };

    let disk = flipped(at(b"message 1 "));
    let everything = recover::read(&disk, &paths, Depth::Everything).unwrap();
    assert_eq!(everything.report.damaged.len(), 1, "{:?}", everything.report);
    let (log, report) = runtime.block_on(open_log(&disk)).unwrap();
    assert_eq!((ids(&log), report.damaged), (vec![1, 3, 4, 5, 6, 7, 8], vec![]));
    let read = |log: &Log, n| runtime.block_on(log.open(id(n)));
    assert!(matches!(read(&log, 1), Err(SpoolError::Damaged(..))));
    assert!(read(&log, 3).is_ok());

    let disk = flipped(index + 100);
    let (log, report) = runtime.block_on(open_log(&disk)).unwrap();
    assert_eq!(ids(&log), [1, 3, 4, 5, 6, 7, 8]);
    assert_eq!(report.damaged.len(), 1, "{report:?}");
    assert!(ids(&log).into_iter().all(|n| read(&log, n).is_ok()));
}

/// Few steps, so that each of their operations can fail in turn.
fn short_steps(large: usize) -> Vec<Step> {
    let one = |request| Step::Apply(vec![request]);
    vec![
        one(durably(vec![message(1, 100), message(2, 5_000)])),
        one(lazily(vec![message(3, 100), Change::Attempt(1, 1), Change::Note(0, 40)])),
        one(durably(vec![message(4, 6_000)])),
        one(lazily(vec![Change::Done(2)])),
        one(lazily(vec![message(5, 5_000)])),
        one(durably(vec![message(6, large)])),
        Step::Apply(vec![
            durably(vec![message(7, 100)]),
            lazily(vec![message(8, 200)]),
            durably(vec![Change::Hold(1, 2)]),
        ]),
        one(lazily(vec![Change::Fail(3, 3), message(9, 300)])),
        one(durably(vec![Change::Done(4), message(10, 100)])),
        one(lazily(vec![Change::Done(6)])),
        Step::Settle,
        one(durably(vec![Change::Requeue(3, 1)])),
        Step::Settle,
        one(durably(vec![Change::Fail(3, 4)])),
        Step::Settle,
        one(durably(vec![Change::Done(3)])),
        Step::Settle,
    ]
}

const LAST: [Step; 2] = [Step::Settle, Step::Restart];

/// A run in which the operations of `fault` fail. `None` if there are not so many.
fn run_with(fault: Fault) -> Option<Finished> {
    let disk = SimDisk::new();
    let mut run = Run::new(disk.clone(), Model::new());
    let is_single = fault.times == 1;
    run.is_doubtful = !is_single;
    if !is_single {
        run.open().unwrap();
    }
    disk.set_fault(Some(fault));
    if is_single && run.open().is_err() {
        run.open().unwrap();
    }
    // While nothing can be written, a refused message may be on disk, and its side file is gone: a start calls that
    // damage, rightly.
    let mut steps = short_steps(if is_single { LARGE } else { 3_000 });
    if !is_single {
        steps.extend((12..16).map(|n| Step::Apply(vec![durably(vec![message(n, 2_000)])])));
    }
    if is_single {
        // What several failures left in the memory of the system alone is not on disk, though a start finds it there.
        steps.extend(LAST);
        steps.push(Step::Apply(vec![durably(vec![message(11, 100)])]));
    }
    for step in steps {
        if run.is_with_what(&step) {
            run.step(step);
        }
    }
    let mut run = run.finish();
    let is_hit = |shot: &Shot| match fault.only_syncs {
        true => shot.state.syncs > fault.from,
        false => shot.state.operations > fault.from,
    };
    let first = run.shots.iter().position(is_hit)?;
    // The first ones after the fault, and then some.
    let mut at = 0;
    run.shots.retain(|_| {
        at += 1;
        at > first && (at <= first + 12 || at % 6 == 0 || is_slow())
    });
    Some(run)
}

impl Run {
    /// After a fault, what a step changes may not be there.
    fn is_with_what(&self, step: &Step) -> bool {
        let Step::Apply(requests) = step else { return true };
        let heads = self.log.as_ref().unwrap().heads(None, usize::MAX);
        let mut known: HashSet<u128> = heads.iter().map(|head| head.id.as_u128()).collect();
        requests.iter().all(|request| {
            known.extend(request.puts());
            request.changes.iter().all(|change| match change {
                Change::Put(..) => true,
                Change::Update(n, _)
                | Change::Hold(n, _)
                | Change::Fail(n, _)
                | Change::Attempt(n, _)
                | Change::Requeue(n, _)
                | Change::Release(n, _)
                | Change::Done(n)
                | Change::Delete(n) => known.contains(n),
                Change::Note(..) => true,
            })
        })
    }
}

fn check_faults(errno: i32, only_syncs: bool, times: u64) {
    let started = crate::clock::now();
    // Every place when there is time, every other one on every run.
    let step = if is_slow() { 1 } else { 2 };
    let (next, cuts) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        loop {
            let from = next.fetch_add(step, Ordering::Relaxed);
            let Some(run) = run_with(Fault { from, times, errno, only_syncs }) else { return from };
            cuts.fetch_add(check(&run, BRIEF, from), Ordering::Relaxed);
        }
    };
    // A run mostly waits: for a disk that makes trouble, and for what is done a while later.
    let from = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).min().unwrap()
    });
    let (took, cuts) = (crate::clock::now() - started, cuts.into_inner());
    println!("{from} places for {times} faults of {errno}, {cuts} power cuts, {took:?}");
    assert!(from > 10, "{from}");
}

#[test]
fn a_full_disk_at_any_operation_and_then_a_power_cut_loses_nothing() {
    check_faults(ENOSPC, false, 1);
}

#[test]
fn failed_operations_and_then_a_power_cut_loses_nothing() {
    check_faults(EIO, false, if is_slow() { 1 } else { 2 });
    check_faults(EIO, false, 3);
}

#[test]
fn a_failed_sync_that_drops_what_it_should_have_written_loses_nothing() {
    check_faults(EIO, true, 1);
    check_faults(EIO, true, 3);
    check_faults(EIO, true, u64::MAX);
}

#[test]
fn a_disk_that_is_full_from_some_time_on_loses_nothing() {
    check_faults(ENOSPC, false, u64::MAX);
}

#[test]
fn a_first_start_that_was_cut_short_leaves_no_folder_unsynced() {
    for from in 0..8 {
        let disk = SimDisk::new();
        disk.set_fault(Some(Fault { from, times: 1, errno: EIO, only_syncs: false }));
        let mut run = Run::new(disk, Model::new());
        run.reopen();
        run.step(Step::Apply(vec![durably(vec![message(1, 100)])]));
        check(&run.finish(), BRIEF, from);
    }
}

#[test]
fn when_the_spool_writes_again_what_was_refused_meanwhile_stays_refused() {
    let places = if is_slow() { 24 } else { 4 };
    let work = |from: u64| {
        let disk = SimDisk::new();
        let mut run = Run::new(disk.clone(), Model::new());
        run.open().unwrap();
        let times = 2 + from % 3;
        disk.set_fault(Some(Fault { from: from * 2, times, errno: EIO, only_syncs: false }));
        for step in short_steps(3_000) {
            if run.is_with_what(&step) {
                run.step(step);
            }
        }
        run.step(Step::Recover);
        disk.set_fault(None);
        run.step(Step::Apply(vec![durably(vec![message(20, 100)])]));
        run.step(Step::Apply(vec![lazily(vec![message(21, 100)])]));
        run.step(Step::Restart);
        run.step(Step::Apply(vec![durably(vec![message(22, 100)])]));
        check(&run.finish(), BRIEF, from)
    };
    let cuts: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..places).map(|from| scope.spawn(move || work(from))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    println!("{places} places, {cuts} power cuts");
}

/// Where on disk what one request wrote is.
#[derive(Clone)]
struct Region {
    path: PathBuf,
    from: usize,
    to: usize,
    request: usize,
}

/// A spool of several segments in which every batch was synced, one request each.
struct Written {
    disk: SimDisk,
    requests: Vec<Request>,
    regions: Vec<Region>,
    /// The segments as they are.
    files: BTreeMap<PathBuf, Vec<u8>>,
}

fn write(random: &mut Random) -> Written {
    let mut run = Run::new(SimDisk::new(), Model::new());
    // Every record stays where it was written.
    run.geometry.few = usize::MAX;
    run.open().unwrap();
    let mut n = 1;
    for at in 0..24 {
        let len = match random.below(3) {
            0 => 2_000 + index(random, 8_000),
            _ => 1 + index(random, 900),
        };
        let mut changes = vec![message(n, len)];
        n += 1;
        for _ in 0..random.below(3) {
            let other = 2 + u128::from(random.below(24));
            let is_known = other < n && !matches!(changes[..], [_, Change::Done(_), ..]);
            match random.below(3) {
                _ if !is_known => {}
                0 => changes.push(Change::Update(other, 3)),
                1 => changes.push(Change::Hold(other, 4)),
                _ => changes.push(Change::Done(other)),
            }
        }
        // Message 1 keeps the first segment, and with it all others.
        let step = Step::Apply(vec![durably(changes)]);
        if run.is_with_what(&step) {
            run.step(step);
        }
        if at % 3 == 0 {
            run.step(Step::Restart);
        }
    }
    let run = run.finish();
    let folder = spool().path.join("log");
    let paths = run.disk.names(&folder).unwrap().into_iter().map(|name| folder.join(name));
    let files: BTreeMap<PathBuf, Vec<u8>> =
        paths.map(|path| (path.clone(), run.disk.content(&path).unwrap())).collect();
    // The last write of a request is its batch: an index may come before, at the end of a segment that is full.
    let mut regions = BTreeMap::new();
    for (path, bytes) in &files {
        let node = run.disk.node(path).unwrap();
        for (shot, at) in run.shots.iter().zip(0..) {
            let Some(Moment { is_before: false, operation }) = shot.at else { continue };
            let Operation::Write { node: to, offset, len } = operation else { continue };
            let asked = run.events[..shot.events].iter();
            let asked = asked.filter(|event| matches!(event, Event::Asked(_))).count();
            let is_open = matches!(run.events[..shot.events].last(), Some(Event::Asked(_)));
            // The header of a segment comes first.
            if to == node && is_open && offset > 0 {
                let from = usize::try_from(offset).unwrap();
                let to = from + len;
                assert!(to <= bytes.len());
                let region = Region { path: path.clone(), from, to, request: asked - 1 };
                let last = regions.entry(region.request).or_insert((at, region.clone()));
                if last.0 < at {
                    *last = (at, region);
                }
            }
        }
    }
    let requests: Vec<Request> = run
        .events
        .into_iter()
        .filter_map(|event| match event {
            Event::Asked(request) => Some(request),
            Event::Answered(_, answer) => {
                assert_eq!(answer, Answer::Ok);
                None
            }
            Event::Reopened => None,
        })
        .collect();
    assert_eq!(regions.len(), requests.len());
    let regions = regions.into_values().map(|(_, region)| region).collect();
    Written { disk: run.disk, requests, regions, files }
}

type Files = BTreeMap<PathBuf, Vec<u8>>;

/// One thing that goes wrong with what is on disk.
fn damage(files: &mut Files, foreign: &Files, random: &mut Random) -> String {
    let paths: Vec<PathBuf> = files.keys().cloned().collect();
    let [one, two] = [(); 2].map(|()| paths[index(random, paths.len())].clone());
    let block = |bytes: &[u8], random: &mut Random| {
        let from = index(random, bytes.len().div_ceil(BLOCK).max(1)) * BLOCK;
        from.min(bytes.len())..(from + BLOCK).min(bytes.len())
    };
    let mut bytes = files[&one].clone();
    let range = block(&bytes, random);
    let kind = random.below(12);
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let mut said = format!("{kind} of {} {range:?} and {}", name(&one), name(&two));
    match kind {
        0..=2 if !bytes.is_empty() => {
            let at = index(random, bytes.len());
            bytes[at] ^= 1 << random.below(8);
        }
        3 => bytes[range].fill(0),
        4 => bytes[range].iter_mut().for_each(|octet| *octet = random.below(256).to_le_bytes()[0]),
        // Swapped, or a copy of another.
        5 | 6 => {
            let mut other = files[&two].clone();
            let there = block(&other, random);
            let len = range.len().min(there.len());
            let (here, there) = (range.start..range.start + len, there.start..there.start + len);
            let old = bytes[here.clone()].to_vec();
            bytes[here].copy_from_slice(&other[there.clone()]);
            if one != two && random.below(2) == 0 {
                other[there].copy_from_slice(&old);
                files.insert(two, other);
            }
        }
        // Of another spool, at the same place or not.
        7 => {
            if let Some(other) = foreign.get(&one) {
                let from = if random.below(3) == 0 { 0 } else { range.start };
                let to = (from + range.len()).min(other.len()).min(bytes.len()).max(from);
                if to <= other.len() {
                    bytes[from..to].copy_from_slice(&other[from..to]);
                }
            }
        }
        8 => bytes.truncate(index(random, bytes.len() + 1)),
        9 => bytes.resize(bytes.len() + index(random, 9_000), u8::from(random.below(2) == 0)),
        // Whole files.
        _ => {
            let which = random.below(5);
            write!(said, ", {which}").unwrap();
            match which {
                0 => drop(files.insert(two, bytes.clone())),
                1 => bytes = files.insert(two, bytes).unwrap(),
                2 => bytes.fill(0),
                3 => bytes.clear(),
                _ => bytes = foreign.get(&one).cloned().unwrap_or_default(),
            }
        }
    }
    files.insert(one, bytes);
    said
}

impl Written {
    /// Whether all that is not in `found` is reported. Only the end of the log may be lost without damage: what no whole
    /// batch follows, and no segment whose header can be read. Even so it is said that the log is torn, if anything that
    /// began as a record of it is left.
    fn check_report(
        &self,
        files: &Files,
        is_whole: &[bool],
        found: &Model,
        report: &Report,
    ) -> Result<(), String> {
        if !report.damaged.is_empty() {
            return Ok(());
        }
        let has_header = |region: &&Region| {
            let header =
                |files: &Files| files[&region.path].get(..segment::HEADER).map(<[u8]>::to_vec);
            header(files) == header(&self.files)
        };
        let last = self.regions.iter().filter(has_header).map(|region| &region.path).max();
        let of_last = |region: &&Region| Some(&region.path) >= last;
        let proven = self.regions.iter().filter(of_last).map(|region| region.request).min();
        let whole = is_whole.iter().rposition(|is_whole| *is_whole).map_or(0, |last| last + 1);
        let proven = proven.unwrap_or(0).max(whole);
        let mut model = Model::new();
        let mut kept = None;
        for (at, request) in self.requests.iter().enumerate() {
            if at >= proven && model == *found {
                kept = Some(at);
            }
            request.apply(&mut model);
        }
        if model == *found {
            return Ok(());
        }
        let lost = || (0..is_whole.len()).filter(|at| !is_whole[*at]).collect::<Vec<_>>();
        let Some(kept) = kept else {
            return Err(format!("damage of requests {:?} is not reported", lost()));
        };
        let is_begun = |region: &&Region| {
            let number = segment::parse_name(region.path.file_name().unwrap().to_str().unwrap());
            let bytes = files[&region.path].get(region.from..region.to).unwrap_or_default();
            region.request >= kept
                && bytes
                    .chunks(record::ALIGN)
                    .enumerate()
                    .any(|(at, _)| record::claims(&bytes[at * record::ALIGN..], number.unwrap()))
        };
        match self.regions.iter().find(is_begun) {
            Some(region) if !report.torn => {
                Err(format!("of request {} something is left, and nothing is said", region.request))
            }
            Some(_) | None => Ok(()),
        }
    }
}

/// Opens the spool with `files` in place of what was written: all whose octets are as they were must be there.
fn check_damage(written: &Written, files: &Files, runtime: &Runtime) -> Result<(), String> {
    let disk = written.disk.kill();
    files.iter().for_each(|(path, bytes)| disk.set_content(path, bytes));
    let mut is_whole = vec![true; written.requests.len()];
    for region in &written.regions {
        let place = region.from..region.to;
        let is_same =
            files[&region.path].get(place.clone()) == written.files[&region.path].get(place);
        is_whole[region.request] &= is_same;
    }
    // For each message by itself: all that may have become of it.
    let mut may_be: BTreeMap<u128, Vec<Option<Message>>> = BTreeMap::new();
    for n in written.requests.iter().flat_map(Request::puts) {
        let mut models = vec![Model::new()];
        for (request, is_whole) in written.requests.iter().zip(&is_whole) {
            let mut with = models.clone();
            with.iter_mut().for_each(|model| {
                request.apply(model);
                model.retain(|other, _| *other == n);
            });
            match is_whole {
                true => models = with,
                false => models.extend(with),
            }
            models.dedup_by(|one, two| one == two);
        }
        may_be.insert(n, models.iter().map(|model| model.get(&n).cloned()).collect());
    }

    let reopened = |disk: &SimDisk| {
        let opened = runtime.block_on(open_log(disk));
        opened.map_err(|e| format!("it does not open: {e}"))
    };
    let is_touched = |n: u128| {
        let broken = written.requests.iter().zip(&is_whole).filter(|(_, is_whole)| !**is_whole);
        broken.flat_map(|(request, _)| &request.changes).any(|change| change.message() == Some(n))
    };
    let look = |log: &Log| -> Result<Model, String> {
        let mut found = Model::new();
        for head in log.heads(None, usize::MAX) {
            let n = head.id.as_u128();
            let fits = |message: &&Message| message.head(n) == head;
            let may_be = may_be.get(&n).ok_or_else(|| format!("{n} comes from nowhere"))?;
            let message = may_be.iter().flatten().find(fits);
            let message = message.ok_or_else(|| format!("{n} cannot be {head:?}"))?;
            match message.compare(n, log, &Verified::default()) {
                Err(what) if is_touched(n) && what.contains("is damaged") => {}
                compared => compared?,
            }
            found.insert(n, message.clone());
        }
        let is_lost = |(n, may_be): &(&u128, &Vec<Option<Message>>)| {
            !found.contains_key(n) && may_be.iter().all(Option::is_some)
        };
        match may_be.iter().find(is_lost) {
            Some((n, _)) => Err(format!("{n} is lost")),
            None => Ok(found),
        }
    };
    let (log, report) = reopened(&disk)?;
    let found = look(&log)?;
    written.check_report(files, &is_whole, &found, &report)?;
    let body = Staged::Memory(content(NEXT, 300).to_vec());
    let put = vec![Op::Put { envelope: sized(NEXT, 300), body }];
    let put = runtime.block_on(log.apply(put, Durability::Durable));
    put.map_err(|e| format!("nothing can be put: {e}"))?;
    drop(log);
    // The power fails right then: nothing of it depends on memory.
    let state = disk.state();
    let items = state.items();
    let disk =
        disk.cut(&state, &items, &Cut { chosen: vec![false; items.len()], ..Cut::default() });
    let (log, _) = reopened(&disk)?;
    let again: Vec<u128> = ids(&log);
    let should: Vec<u128> = found.keys().copied().chain([NEXT]).collect();
    match again == should {
        true => Ok(()),
        false => Err(format!("it held {should:?}, opened again {again:?}")),
    }
}

#[test]
fn damage_anywhere_costs_only_what_it_touches_and_is_reported() {
    let rounds = if is_slow() { 3_000 } else { 200 };
    let runtime = runtime();
    let mut failed = Vec::new();
    for spool in 0..4 {
        let mut random = Random(spool);
        let (written, foreign) = (write(&mut random), write(&mut random));
        for seed in 0..rounds {
            let mut random = Random(spool << 32 | seed);
            let mut files = written.files.clone();
            let mut said = Vec::new();
            // With more of another spool than of this one, nobody can say which it is.
            said.push(damage(&mut files, &foreign.files, &mut random));
            for _ in 0..random.below(3) {
                said.push(damage(&mut files, &Files::new(), &mut random));
            }
            if let Err(what) = check_damage(&written, &files, &runtime) {
                failed.push(format!("spool {spool}, seed {seed}, {said:?}: {what}"));
            }
        }
    }
    assert!(failed.is_empty(), "{} of {}: {:#?}", failed.len(), 4 * rounds, failed);
}

#[test]
fn what_was_put_aside_survives_a_power_cut() {
    let runtime = runtime();
    let mut run = Run::new(SimDisk::new(), Model::new());
    run.open().unwrap();
    for n in 1..=3 {
        run.step(Step::Apply(vec![durably(vec![message(n, 3_000)])]));
    }
    run.step(Step::Apply(vec![durably(vec![message(4, LARGE)])]));
    run.step(Step::Apply(vec![durably(vec![message(5, 10)])]));
    let disk = run.finish().disk;
    let path = disk.names(&spool().path.join("log")).unwrap().remove(0);
    let path = spool().path.join("log").join(path);
    let mut bytes = disk.content(&path).unwrap();
    // The second message, and the one with the side file.
    let at = bytes.windows(10).position(|words| words == b"message 2 ").unwrap();
    bytes[at] ^= 1;
    let end = bytes.len() - 400;
    bytes[end..end + 8].fill(0);
    disk.set_content(&path, &bytes);
    let side_file = disk.names(&spool().path.join("bodies")).unwrap().remove(0);

    let opened = disk.kill();
    let mut run = Run::new(opened, Model::new());
    let report = run.open().unwrap();
    assert_eq!(report.damaged.len(), 2, "{report:?}");
    run.step(Step::Apply(vec![durably([1, 3, 5].map(Change::Done).to_vec())]));
    let run = run.finish();
    for shot in &run.shots {
        let items = shot.state.items();
        for cut in BRIEF.cuts(&items, &mut Random(7)) {
            let disk = run.disk.cut(&shot.state, &items, &cut);
            let is_somewhere = |folders: [&str; 2], name: &str| {
                folders.iter().any(|folder| {
                    let names = disk.names(&spool().path.join(folder));
                    names.is_ok_and(|names| names.iter().any(|found| found == name))
                })
            };
            let name = path.file_name().unwrap().to_str().unwrap();
            let at = format!("{:?}, {cut}", shot.at);
            assert!(is_somewhere(["log", "damaged"], name), "the segment is gone: {at}");
            assert!(is_somewhere(["bodies", "damaged"], &side_file), "the file is gone: {at}");
            runtime.block_on(open_log(&disk)).unwrap();
        }
    }
}

#[test]
fn a_power_cut_while_the_reserve_is_made_loses_nothing() {
    let one = |request| Step::Apply(vec![request]);
    let mut run = Run::new(SimDisk::new(), Model::new());
    run.geometry = RESERVING;
    // At the start there is none, so it is begun at once.
    lock(&run.turn.state).stop_before = Some(0);
    run.open().unwrap();
    for step in [
        Step::Meanwhile(durably(vec![message(1, 5_000), message(2, 100)]), Some(1)),
        Step::Meanwhile(lazily(vec![Change::Attempt(1, 1), message(3, 9_000)]), Some(2)),
        Step::Meanwhile(durably(vec![Change::Done(2), message(4, 300)]), None),
        Step::Reserve,
        one(lazily(vec![message(5, 6_000), Change::Hold(4, 1)])),
        one(durably(vec![message(6, 7_000), Change::Done(1)])),
        one(durably(vec![Change::Done(3), Change::Done(5)])),
        Step::Restart,
        one(durably(vec![message(7, 10)])),
        Step::Kill,
        one(durably(vec![message(8, 10)])),
    ] {
        run.step(step);
    }
    let run = run.finish();
    let is_written = |shot: &&Shot| {
        let Some(Moment { is_before: false, operation }) = shot.at else { return false };
        matches!(operation, Operation::Write { len, .. } if len as u64 == PIECE)
    };
    // One of the first, two of the second, all of the third.
    assert_eq!(run.shots.iter().filter(is_written).count(), 6);
    let mut cuts = check(&run, RESERVED, 0);
    for seed in 0..if is_slow() { 20 } else { 2 } {
        let mut run = Run::new(SimDisk::new(), Model::new());
        run.geometry = RESERVING;
        run.open().unwrap();
        for step in random_steps(&mut Random(1_000 + seed)) {
            run.step(step);
        }
        cuts += check(&run.finish(), RESERVED, 1_000 + seed);
    }
    println!("{cuts} power cuts");
}

/// A failed message that is written to its file, read from it and put again in several pieces.
#[test]
fn a_power_cut_while_a_large_message_is_filed_or_queued_again_loses_nothing() {
    let one = |request| Step::Apply(vec![request]);
    let steps = vec![
        one(durably(vec![message(1, HUGE), message(2, 100)])),
        one(lazily(vec![Change::Fail(1, 1)])),
        Step::Settle,
        one(durably(vec![Change::Requeue(1, 2)])),
        one(durably(vec![Change::Fail(1, 3)])),
        Step::Settle,
        one(durably(vec![Change::Done(1)])),
    ];
    println!("{} power cuts", check(&run(steps), BRIEF, 0));
}

/// A message that is put and fails in one batch, neither synced yet.
#[test]
fn files_of_a_failed_message_do_not_outlive_the_rest_of_its_batch() {
    let batch = vec![message(1, 20_000), message(2, 30), Change::Fail(2, 8)];
    check(&run(vec![Step::Apply(vec![lazily(batch)]), Step::Settle]), THOROUGH, 0);
}

/// The done-mark of a failed message goes as soon as a start misses its files.
#[test]
fn files_that_a_start_takes_for_gone_do_not_come_back_with_a_power_cut() {
    let runtime = runtime();
    let mut run = Run::new(SimDisk::new(), Model::new());
    run.open().unwrap();
    run.step(Step::Apply(vec![durably(vec![message(1, 100)])]));
    run.step(Step::Apply(vec![durably(vec![Change::Fail(1, 1)])]));
    run.step(Step::Settle);
    run.step(Step::Apply(vec![durably(vec![Change::Done(1)])]));
    let names = |disk: &SimDisk| disk.names(&spool().path.join("failed")).unwrap_or_default();
    run.wait_until(|| names(&run.disk).is_empty());
    let run = run.finish();
    let without_power = |disk: &SimDisk| {
        let state = disk.state();
        let items = state.items();
        let cut = Cut { chosen: vec![false; items.len()], ..Cut::default() };
        names(&disk.cut(&state, &items, &cut))
    };
    let mut seen = 0;
    for shot in &run.shots {
        let disk = run.disk.kill_at(&shot.state);
        if !names(&disk).is_empty() || without_power(&disk).is_empty() {
            continue;
        }
        seen += 1;
        let (log, _) = runtime.block_on(open_log(&disk)).unwrap();
        assert_eq!((ids(&log), without_power(&disk)), (vec![], vec![]), "{:?}", shot.at);
    }
    assert!(seen > 0, "no shot of removed files in a folder that was not synced");
}

#[test]
fn a_second_daemon_and_a_later_version_leave_the_spool_as_it_is() {
    let runtime = runtime();
    let written = write(&mut Random(1));
    let (log, _) = runtime.block_on(open_log(&written.disk)).unwrap();
    let items = written.disk.state().items().len();
    let second = runtime.block_on(open_log(&written.disk));
    assert!(matches!(second, Err(OpenError::Locked { .. })));
    assert_eq!(written.disk.state().items().len(), items);
    drop(log);
    for (path, bytes) in &written.files {
        let disk = written.disk.kill();
        let header = segment::Header::decode(bytes).unwrap();
        let header = segment::Header { version: segment::VERSION + 1, ..header };
        let later = [&header.encode(), &bytes[segment::HEADER..]].concat();
        disk.set_content(path, &later);
        let names = |folder: &str| disk.names(&spool().path.join(folder)).unwrap();
        let before = ["log", "bodies", "tmp"].map(names);
        let refused = runtime.block_on(open_log(&disk));
        assert!(matches!(refused, Err(OpenError::OtherFormat { .. })));
        assert_eq!(["log", "bodies", "tmp"].map(names), before);
        assert_eq!(disk.content(path).unwrap(), later);
    }
}

#[test]
fn what_was_to_become_a_segment_and_did_not_goes_at_the_next_start() {
    let runtime = runtime();
    for octet in [0, b'x'] {
        let mut run = Run::new(SimDisk::new(), Model::new());
        run.open().unwrap();
        run.step(Step::Apply(vec![durably(vec![message(1, 100)])]));
        let disk = run.finish().disk;
        let path = spool().path.join("log").join(segment::unnamed(7));
        disk.set_content(&path, &[octet; 5_000]);
        let (log, report) = runtime.block_on(open_log(&disk)).unwrap();
        assert_eq!((ids(&log), report.strays), (vec![1], 1));
        assert_eq!(report.damaged, Vec::<String>::new());
        drop(log);
        let (_, report) = runtime.block_on(open_log(&disk)).unwrap();
        assert_eq!(report.strays, 0);
    }
}

#[test]
fn a_segment_of_another_spool_has_no_say_about_ours() {
    let runtime = runtime();
    let mut random = Random(1);
    let (written, foreign) = (write(&mut random), write(&mut random));
    for ((path, bytes), theirs) in written.files.iter().zip(foreign.files.values()) {
        // Its header, all of it, or all of it in a number of its own.
        let header = [&theirs[..segment::HEADER], &bytes[segment::HEADER..]].concat();
        let next = spool().path.join("log").join(segment::name(u64::MAX >> 1));
        for (path, bytes) in
            [(path, header.as_slice()), (path, theirs.as_slice()), (&next, theirs.as_slice())]
        {
            let mut files = written.files.clone();
            files.insert(path.clone(), bytes.to_vec());
            check_damage(&written, &files, &runtime).unwrap();
        }
    }
}

#[test]
fn below_the_floor_not_an_octet_is_written() {
    let disk = SimDisk::new();
    disk.set_free(999_999);
    let mut run = Run::new(disk.clone(), Model::new());
    run.open().unwrap();
    let before = disk.state().version;
    run.step(Step::Apply(vec![durably(vec![message(1, 10)]), lazily(vec![message(2, LARGE)])]));
    assert_eq!(disk.state().version, before);
}
