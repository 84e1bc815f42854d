//! Who is told what: reports to senders, and notices to the postmaster. Pure.
//!
//! A report is composed where a message's recipient came to an end, and goes into the spool in the batch that says so:
//! neither can be without the other. Nothing is reported for the provider's fault, for a doubt, or while a message is
//! held; of an outage the postmaster hears, in notices of which the last tells the whole.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::mem;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::config::{Bounce, BounceTo};
use crate::delivery::gate::Answer;
use crate::envelope::{
    Client, Envelope, Kind, Priority, Progress, Rcpt, RcptStatus, SpoolId, UnixMillis,
};
use crate::message::dsn::{self, Entry, Letterhead, News, Reader, Returned, Why};
use crate::message::received::date;
use crate::outcome::{Cause, Outcome, Scope, Stage};
use crate::smtp::address::{Charset, ForwardPath, Mailbox, ReversePath};
use crate::smtp::params::{Notify, Ret};
use crate::smtp::reply::{EnhancedStatus, Escaped};

/// Reports are counted by it, and a digest comes once in it.
const HOUR: Duration = Duration::from_secs(3600);
/// An outage that is over before this is told to nobody.
const BLIP: Duration = Duration::from_secs(15 * 60);
/// Between two notices of one outage.
const DAY: Duration = Duration::from_secs(24 * 3600);
/// What a digest lists. Each has a note in the spool.
const MAX_LISTED: usize = 200;
/// Characters of one line of a digest.
const MAX_LINE: usize = 1_000;

/// What every letter of this gateway is written with.
#[derive(Clone, Debug)]
pub struct House {
    pub hostname: String,
    /// The provider's sender.
    pub sender: Option<Mailbox>,
    /// The name of the provider's server.
    pub server: Option<String>,
    pub bounce: Bounce,
    /// `retry.give_up_after`
    pub give_up_after: Duration,
}

/// Who is told.
#[derive(Clone, Copy, Debug)]
pub struct Audience<'a> {
    pub to: &'a Mailbox,
    pub reader: Reader,
}

/// A letter that is ready for the spool.
#[derive(Clone, Debug)]
pub struct Letter {
    pub envelope: Envelope,
    pub content: Vec<u8>,
}

/// What a report says at its worst: the label of logs and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gist {
    Failure,
    Delay,
    Relayed,
}

impl Gist {
    pub fn label(self) -> &'static str {
        match self {
            Self::Failure => "failure",
            Self::Delay => "delay",
            Self::Relayed => "relayed",
        }
    }
}

/// Whether a report is due of a recipient that came to an end so. Of our own letters only their failure is told, and of
/// those to the postmaster nothing.
pub fn is_due(kind: Kind, notify: Notify, outcome: &Outcome) -> bool {
    match (kind, outcome) {
        (Kind::Notice, _) | (_, Outcome::Deferred(_) | Outcome::Held(_)) => false,
        (Kind::Report, Outcome::Failed(_)) => true,
        (Kind::Report, Outcome::Delivered(_)) => false,
        (Kind::Mail, Outcome::Failed(_)) => notify.wants_failure(),
        (Kind::Mail, Outcome::Delivered(receipt)) => {
            receipt.relayed && matches!(notify, Notify::On { success: true, .. })
        }
    }
}

/// The recipients of which a report is due now, and what became of them. With `delayed`, those too that still wait for a
/// reason of their own.
pub fn news<'a>(
    envelope: &'a Envelope,
    progress: &'a Progress,
    delayed: Option<UnixMillis>,
) -> Vec<Entry<'a>> {
    let is_untold = |rcpt: usize| progress.untold.iter().any(|it| *it as usize == rcpt);
    let each = envelope.rcpts.iter().zip(&progress.rcpts).enumerate();
    let entry = |(at, (rcpt, status)): (usize, (&'a Rcpt, &'a RcptStatus))| {
        let news = match status {
            RcptStatus::Failed(cause) if is_untold(at) => News::Failed(cause),
            RcptStatus::Delivered(receipt) if is_untold(at) => News::Relayed(receipt),
            RcptStatus::Pending { last: Some(cause) }
                if cause.scope <= Scope::Message
                    && !cause.maybe_sent
                    && wants_delay(rcpt.notify) =>
            {
                News::Delayed(cause, Some(delayed?))
            }
            RcptStatus::Failed(_) | RcptStatus::Delivered(_) | RcptStatus::Pending { .. } => {
                return None;
            }
        };
        Some(Entry { rcpt, news })
    };
    each.filter_map(entry).collect()
}

fn wants_delay(notify: Notify) -> bool {
    match notify {
        Notify::Unsaid => true,
        Notify::Never => false,
        Notify::On { delay, .. } => delay,
    }
}

pub fn gist(entries: &[Entry<'_>]) -> Gist {
    let any = |is: fn(&News<'_>) -> bool| entries.iter().any(|entry| is(&entry.news));
    if any(|news| matches!(news, News::Failed(_))) {
        Gist::Failure
    } else if any(|news| matches!(news, News::Delayed(..))) {
        Gist::Delay
    } else {
        Gist::Relayed
    }
}

impl House {
    /// Who is told of a message's end; else why nobody is.
    pub fn audience<'a>(
        &'a self,
        envelope: &'a Envelope,
        entries: &[Entry<'_>],
    ) -> Result<Audience<'a>, &'static str> {
        let postmaster = |why| {
            let to = self.bounce.postmaster.as_ref().ok_or("and bounce.postmaster is not set")?;
            Ok(Audience { to, reader: Reader::Postmaster(why) })
        };
        match (envelope.kind, self.bounce.to) {
            (Kind::Notice, _) => Err("it was a report itself"),
            (Kind::Report, _) => postmaster(Why::ReportFailed),
            (Kind::Mail, BounceTo::Nobody) => Err("bounce.to is \"none\""),
            (Kind::Mail, BounceTo::Postmaster) => postmaster(Why::Chosen),
            (Kind::Mail, BounceTo::Sender) => match &envelope.reverse_path {
                ReversePath::Mailbox(to) => match why_not(to, entries) {
                    Some(why) => postmaster(why),
                    None => Ok(Audience { to, reader: Reader::Author }),
                },
                ReversePath::Null => postmaster(Why::NoAuthor),
            },
        }
    }

    /// Whether the message comes back whole; of a report all does, for the postmaster has not seen it.
    pub fn returns_all(&self, envelope: &Envelope, entries: &[Entry<'_>]) -> bool {
        let asked = match (envelope.kind, envelope.ret) {
            (Kind::Report, _) | (_, Some(Ret::Full)) => true,
            (_, Some(Ret::Headers)) => false,
            (_, None) => self.bounce.full,
        };
        // What was too large must not make its report too large as well.
        let is_too_large =
            |entry: &Entry<'_>| matches!(entry.news, News::Failed(cause) if is_of_size(cause));
        // RFC 3461 4.3: what has not failed comes back as its header.
        asked && gist(entries) == Gist::Failure && !entries.iter().any(is_too_large)
    }

    /// `content` is the message that is reported on, or as much of it as comes back.
    pub fn report(
        &self,
        Audience { to, reader }: Audience<'_>,
        original: &Envelope,
        entries: &[Entry<'_>],
        returned: Returned<'_>,
        now: UnixMillis,
    ) -> Letter {
        let id = SpoolId::new(now);
        let from = self.from();
        let letterhead = Letterhead { id, at: now, hostname: &self.hostname, from: &from, to };
        let remote = self.server.as_deref();
        let report = dsn::Report { letterhead, reader, original, entries, remote, returned };
        let content = dsn::report(&report);
        // Where that fails, the postmaster is told in the author's stead, and of his own letters nobody.
        let kind = match reader {
            Reader::Author => Kind::Report,
            Reader::Postmaster(_) => Kind::Notice,
        };
        self.letter(kind, id, now, from, to, content)
    }

    /// A letter to the postmaster.
    pub fn notice(&self, to: &Mailbox, subject: &str, text: String, now: UnixMillis) -> Letter {
        let id = SpoolId::new(now);
        let from = self.from();
        let letterhead = Letterhead { id, at: now, hostname: &self.hostname, from: &from, to };
        let content = dsn::notice(&letterhead, subject, text);
        self.letter(Kind::Notice, id, now, from, to, content)
    }

    fn letter(
        &self,
        kind: Kind,
        id: SpoolId,
        now: UnixMillis,
        from: Mailbox,
        to: &Mailbox,
        content: Vec<u8>,
    ) -> Letter {
        let path = ForwardPath::Mailbox(to.clone());
        let envelope = Envelope {
            id,
            kind,
            accepted: now,
            reverse_path: ReversePath::Null,
            // RFC 3461 5.2.7: of a report no report comes.
            rcpts: vec![Rcpt { path, notify: Notify::Never, orcpt: None }],
            smtputf8: !to.is_ascii() || !from.is_ascii(),
            eight_bit: !content.is_ascii(),
            ret: None,
            envid: None,
            size: content.len() as u64,
            client: Client { address: "local".into(), helo: self.hostname.as_str().into() },
            priority: Priority::Normal,
            author: Some(from),
            prepend: Bytes::new(),
        };
        Letter { envelope, content }
    }

    fn server(&self) -> &str {
        self.server.as_deref().unwrap_or("The provider")
    }

    fn from(&self) -> Mailbox {
        let own = self.sender.clone().or_else(|| self.bounce.postmaster.clone());
        let postmaster = || Mailbox::parse(&format!("postmaster@{}", self.hostname), Charset::Utf8);
        own.or_else(|| postmaster().ok()).unwrap_or_else(|| {
            #[expect(clippy::expect_used, reason = "a constant")]
            Mailbox::parse("postmaster@localhost", Charset::Ascii).expect("it is an address")
        })
    }
}

/// Whether the message was refused for its size (RFC 3463 3.3, 3.4; RFC 5321 4.2.3).
fn is_of_size(cause: &Cause) -> bool {
    let by_status = matches!(cause.status, Some(EnhancedStatus(5, 2, 3) | EnhancedStatus(5, 3, 4)));
    by_status || cause.words.as_bytes().starts_with(b"552")
}

/// Why nothing can come to the sender, if so.
fn why_not(sender: &Mailbox, entries: &[Entry<'_>]) -> Option<Why> {
    let domain = sender.domain().to_ascii_lowercase();
    let is_local = [".local", ".localhost", ".internal", ".invalid"]
        .iter()
        .any(|ending| domain.ends_with(ending));
    let has_failed = entries.iter().any(|entry| {
        let is_sender =
            matches!(&entry.rcpt.path, ForwardPath::Mailbox(mailbox) if mailbox == sender);
        is_sender && matches!(entry.news, News::Failed(_))
    });
    match (domain.contains('.') && !is_local, has_failed) {
        (false, _) => Some(Why::LocalAuthor),
        (true, true) => Some(Why::AuthorFailed),
        (true, false) => None,
    }
}

/// What is remembered between letters.
#[derive(Debug)]
pub struct Desk {
    /// For each kind of report, when its hour began, and the reports in it: many delays are no reason to leave a failure
    /// to the digest.
    failures: Hour,
    delays: Hour,
    relays: Hour,
    digest: Digest,
    outage: Option<Outage>,
    /// The outage that is over, and when that was: its last notice is due.
    over: Option<(Outage, UnixMillis)>,
    /// That of which it was told last that it is over, with the letter that tells it.
    told_over: Option<Outage>,
    /// Put into the spool and not yet into the schedule.
    put: Vec<SpoolId>,
}

type Hour = Option<(Instant, usize)>;

/// What is remembered over a restart: a key, and what is noted under it; nothing takes it away.
pub type Note = (Box<str>, Vec<u8>);

/// What was not reported one by one.
#[derive(Debug, Default)]
struct Digest {
    /// With the key of its note.
    listed: VecDeque<(Box<str>, String)>,
    /// What is not listed, for there is more of it than a letter holds.
    more: u64,
    /// Of the two halves of the keys, the one that is written to: a note that goes with a digest under way is never one
    /// that came since.
    half: bool,
    /// When its hour began.
    since: Option<UnixMillis>,
    /// When the digest is due.
    due: Option<Instant>,
}

/// The keys of the notes.
const HALVES: [&str; 2] = ["report/a", "report/b"];
pub const OUTAGE: &str = "report/outage";

/// A trouble of the provider, since it began.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outage {
    since: UnixMillis,
    stage: Stage,
    words: String,
    /// The last notice of it, and when that was.
    last: Option<(SpoolId, UnixMillis)>,
    due: Instant,
    /// This run has met it too. That of a former run may have ended since, which the next answer tells.
    is_met: bool,
}

/// An outage as a note, from its first notice to its last.
#[derive(Serialize, Deserialize)]
struct OutageWire {
    since: u64,
    stage: String,
    words: String,
    notice: String,
    told: u64,
}

/// How much waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub messages: usize,
    pub oldest: Option<UnixMillis>,
}

/// What the postmaster is to be told now.
#[derive(Clone, Debug)]
pub struct Errand {
    /// The label of logs and metrics.
    pub label: &'static str,
    /// None where nobody is to be told, and notes are to go.
    pub letter: Option<Letter>,
    /// A notice that says less, to be taken out of the queue where it still is there.
    pub replaces: Option<SpoolId>,
    /// Notes that go with it.
    pub notes: Vec<Note>,
}

impl Desk {
    /// As a former run left it: `note` reads what was noted under a key.
    pub fn load(note: impl Fn(&str) -> Option<Vec<u8>>, now: Instant, wall: UnixMillis) -> Self {
        let mut digest = Digest::default();
        for half in HALVES {
            for at in 0..MAX_LISTED {
                let key = format!("{half}/{at}");
                if let Some(line) = note(&key) {
                    let line = String::from_utf8_lossy(&line).into_owned();
                    digest.listed.push_back((key.into(), line));
                }
            }
            let more = note(&format!("{half}/more")).and_then(|it| String::from_utf8(it).ok());
            digest.more += more.and_then(|it| it.parse().ok()).unwrap_or(0);
            let since = note(&format!("{half}/since")).and_then(|it| String::from_utf8(it).ok());
            let since = since.and_then(|it| it.parse().ok()).map(UnixMillis);
            digest.since = digest.since.into_iter().chain(since).min();
        }
        if !digest.is_empty() {
            let left = digest.since.map_or(Duration::ZERO, |it| it.plus(HOUR).since(wall));
            digest.due = Some(now + left.min(HOUR));
        }
        digest.half = digest.listed.back().is_some_and(|(key, _)| key.starts_with(HALVES[1]));
        let outage = note(OUTAGE).and_then(|it| Outage::read(&it, now, wall));
        let (failures, delays, relays) = (None, None, None);
        let (over, told_over, put) = Default::default();
        Self { failures, delays, relays, digest, outage, over, told_over, put }
    }

    fn hour(&mut self, gist: Gist) -> &mut Hour {
        match gist {
            Gist::Failure => &mut self.failures,
            Gist::Delay => &mut self.delays,
            Gist::Relayed => &mut self.relays,
        }
    }

    /// Whether one more report of that kind may go out in this hour; it is counted then.
    pub fn admits(&mut self, gist: Gist, bounce: &Bounce, now: Instant) -> bool {
        match self.hour(gist) {
            Some((since, count)) if now.saturating_duration_since(*since) < HOUR => {
                *count += 1;
                *count <= bounce.max_per_hour
            }
            hour => {
                *hour = Some((now, 1));
                true
            }
        }
    }

    /// A report that was admitted could not be written, and will be asked for again.
    pub fn withdraw(&mut self, gist: Gist) {
        if let Some((_, count)) = self.hour(gist) {
            *count = count.saturating_sub(1);
        }
    }

    /// Puts a report on the list that did not go out: the notes that go into the spool with it.
    pub fn list(&mut self, line: String, now: Instant, wall: UnixMillis) -> [Note; 2] {
        let digest = &mut self.digest;
        digest.due.get_or_insert(now + HOUR);
        let since = digest.since.get_or_insert(wall).0.to_string().into_bytes();
        let half = digest.key();
        let since = (format!("{half}/since").into(), since);
        let key = |at: usize| -> Box<str> { format!("{half}/{at}").into() };
        let is_free = |key: &str| !digest.listed.iter().any(|(listed, _)| &**listed == key);
        let Some(key) = (0..MAX_LISTED).map(key).find(|key| is_free(key)) else {
            digest.more += 1;
            let more = (format!("{half}/more").into(), digest.more.to_string().into_bytes());
            return [more, since];
        };
        let line: String = line.chars().take(MAX_LINE).collect();
        digest.listed.push_back((key.clone(), line.clone()));
        [(key, line.into_bytes()), since]
    }

    /// Takes back what was put on the list under `key` last: its note could not be written.
    pub fn unlist(&mut self, key: &str) {
        let digest = &mut self.digest;
        if let Some(at) = digest.listed.iter().position(|(listed, _)| &**listed == key) {
            digest.listed.remove(at);
        } else if key.ends_with("/more") {
            digest.more = digest.more.saturating_sub(1);
        }
        if digest.is_empty() {
            (digest.since, digest.due) = (None, None);
        }
    }

    /// The provider takes no mail, for that reason; told again, the words are the newer ones. Where nobody has heard yet
    /// that the last outage is over, since that letter still is in the spool, it was not: it goes on.
    pub fn closed(
        &mut self,
        bounce: &Bounce,
        cause: &Cause,
        is_there: impl Fn(SpoolId) -> bool,
        now: Instant,
        wall: UnixMillis,
    ) {
        let words = cause.words.to_string().chars().take(MAX_LINE).collect();
        if self.outage.is_none() {
            let told = self.told_over.take();
            let told = told.filter(|outage| outage.last.is_some_and(|(id, _)| is_there(id)));
            let due = now + bounce.delay_warning_after.min(BLIP);
            let last = self.over.take().map(|(outage, _)| outage).or(told);
            self.outage = last.map(|outage| Outage { due, ..outage });
        }
        match &mut self.outage {
            Some(outage) => {
                outage.words = words;
                outage.stage = cause.stage;
                outage.is_met = true;
            }
            None => {
                let due = now + bounce.delay_warning_after.min(BLIP);
                let stage = cause.stage;
                let outage = Outage { since: wall, stage, words, last: None, due, is_met: true };
                self.outage = Some(outage);
            }
        }
    }

    /// The provider takes mail. Of an outage that nobody was told of nobody is told that it is over.
    pub fn opened(&mut self, now: Instant, wall: UnixMillis) {
        if let Some(outage) = self.outage.take().filter(|outage| outage.last.is_some()) {
            self.over = Some((Outage { due: now, ..outage }, wall));
        }
    }

    /// The gate is open, and the provider had something to say: an outage that only a former run knows of is over, unless
    /// it may have been at a later stage than that.
    pub fn answered(&mut self, answer: Answer, now: Instant, wall: UnixMillis) {
        let is_over = |outage: &Outage| answer == Answer::Taken || outage.stage < Stage::Mail;
        if self.outage.as_ref().is_some_and(is_over) {
            self.opened(now, wall);
        }
    }

    /// When there is something to tell.
    pub fn due(&self) -> Option<Instant> {
        let over = self.over.as_ref().map(|(outage, _)| outage.due);
        let outage = self.outage.as_ref().filter(|outage| outage.is_met).map(|outage| outage.due);
        [over, outage, self.digest.due].into_iter().flatten().min()
    }

    /// The last notice of an outage, which the next one of it replaces. It is put into no schedule.
    pub fn notice(&self) -> Option<SpoolId> {
        let over = self.over.as_ref().map(|(outage, _)| outage);
        over.or(self.outage.as_ref())?.last.map(|(id, _)| id)
    }

    /// Whether an outage has ended of which that is still to be told.
    pub fn is_over(&self) -> bool {
        self.over.is_some()
    }

    /// What the postmaster is to be told now. Whoever takes it puts it into the spool, and says so by [`Desk::put`].
    /// `waiting` does not count the notice that this replaces.
    pub fn errand(
        &mut self,
        house: &House,
        waiting: Waiting,
        now: Instant,
        wall: UnixMillis,
    ) -> Option<Errand> {
        let Some(postmaster) = &house.bounce.postmaster else {
            // Nobody is told, but for the log, which has it all. A list of a former run waits for somebody.
            self.digest.due = None;
            if let Some(outage) = &mut self.outage {
                outage.due = now + DAY;
            }
            self.over.take()?;
            let notes = vec![(OUTAGE.into(), Vec::new())];
            return Some(Errand { label: "notice", letter: None, replaces: None, notes });
        };
        if let Some((outage, until)) = self.over.take() {
            let replaces = outage.last.map(|(id, _)| id);
            let text = outage.over(house, waiting, until);
            let letter = house.notice(postmaster, "Mail flows again", text, wall);
            self.told_over = Some(Outage { last: Some((letter.envelope.id, wall)), ..outage });
            let notes = vec![(OUTAGE.into(), Vec::new())];
            return Some(Errand { label: "notice", letter: Some(letter), replaces, notes });
        }
        if let Some(outage) = self.outage.as_mut().filter(|it| it.is_met && it.due <= now) {
            let replaces = outage.last.map(|(id, _)| id);
            let text = outage.text(house, waiting, wall);
            let subject = "Mail waits: the provider does not take it";
            let letter = house.notice(postmaster, subject, text, wall);
            outage.due = now + DAY;
            outage.last = Some((letter.envelope.id, wall));
            let notes = vec![(OUTAGE.into(), outage.write())];
            return Some(Errand { label: "notice", letter: Some(letter), replaces, notes });
        }
        if self.digest.due.is_some_and(|due| due <= now) {
            let half = !self.digest.half;
            let digest = mem::replace(&mut self.digest, Digest { half, ..Digest::default() });
            let written = |half: &&str| {
                *half == digest.key() || digest.listed.iter().any(|(key, _)| key.starts_with(*half))
            };
            let others: Vec<_> = (HALVES.into_iter().filter(written))
                .flat_map(|half| ["more", "since"].map(|key| format!("{half}/{key}")))
                .map(|key| (key.into(), Vec::new()))
                .collect();
            let letter = house.notice(
                postmaster,
                "Reports that were not sent one by one",
                digest.text(&house.bounce),
                wall,
            );
            let listed = digest.listed.into_iter().map(|(key, _)| (key, Vec::new()));
            let notes = listed.chain(others).collect();
            return Some(Errand { label: "digest", letter: Some(letter), replaces: None, notes });
        }
        None
    }

    /// A letter is in the spool, and is to be sent.
    pub fn put(&mut self, id: SpoolId) {
        self.put.push(id);
    }

    /// What was put since.
    pub fn take_put(&mut self) -> Vec<SpoolId> {
        mem::take(&mut self.put)
    }
}

impl Digest {
    fn key(&self) -> &'static str {
        let [a, b] = HALVES;
        if self.half { b } else { a }
    }

    fn is_empty(&self) -> bool {
        self.listed.is_empty() && self.more == 0
    }

    fn text(&self, bounce: &Bounce) -> String {
        let total = self.listed.len() as u64 + self.more;
        let mut out = format!(
            "This is the mail gateway. In an hour it had more to report than bounce.max_per_hour\n\
             allows ({} of a kind), so these {total} reports were not sent to anyone but you:\n\n",
            bounce.max_per_hour
        );
        for (_, line) in &self.listed {
            out.push_str(line);
            out.push('\n');
        }
        if self.more > 0 {
            let _infallible =
                writeln!(out, "\nand at least {} more, which are in the log.", self.more);
        }
        out.push_str(
            "\nWhat to do: so many failures at once often have one reason. Look at the answers\n\
             above, and at the application that sent the mail. Messages that failed are kept:\n\
             `mailsluice queue list --state failed` lists them.\n",
        );
        out
    }
}

impl Outage {
    fn read(note: &[u8], now: Instant, wall: UnixMillis) -> Option<Self> {
        let wire: OutageWire = serde_json::from_slice(note).ok()?;
        let told = UnixMillis(wire.told);
        Some(Self {
            since: UnixMillis(wire.since),
            stage: Stage::from_label(&wire.stage).unwrap_or(Stage::Local),
            words: wire.words,
            last: Some((SpoolId::parse(&wire.notice)?, told)),
            due: now + told.plus(DAY).since(wall).min(DAY),
            is_met: false,
        })
    }

    fn write(&self) -> Vec<u8> {
        let (notice, told) = self.last.unwrap_or((SpoolId::from_u128(0), UnixMillis(0)));
        let wire = OutageWire {
            since: self.since.0,
            stage: self.stage.label().to_owned(),
            words: self.words.clone(),
            notice: notice.to_string(),
            told: told.0,
        };
        serde_json::to_vec(&wire).unwrap_or_default()
    }

    /// How it is while it lasts.
    fn text(&self, house: &House, waiting: Waiting, wall: UnixMillis) -> String {
        let state = format!(
            "{} takes no mail since {} ({}).\nIts last answer ({}):",
            house.server(),
            date(self.since),
            span(wall.since(self.since)),
            at(self.stage)
        );
        let next = format!(
            "What happens next: the gateway goes on accepting mail, and tries the provider until\n\
             it works. Nothing is lost, and no sender gets a report because of this.\n\
             What to do: {}\n",
            advice(self.stage)
        );
        self.letter(house, &state, waiting, &next)
    }

    /// The whole of it.
    fn over(&self, house: &House, waiting: Waiting, until: UnixMillis) -> String {
        let state = format!(
            "{} takes mail again since {}.\n\
             It took none from {} on: {}.\nIts last answer ({}) was:",
            house.server(),
            date(until),
            date(self.since),
            span(until.since(self.since)),
            at(self.stage)
        );
        let next = "What happens next: what waits is being delivered. Nothing was lost, and no sender\n\
             got a report because of this.\nWhat to do: nothing.\n";
        self.letter(house, &state, waiting, next)
    }

    fn letter(&self, house: &House, state: &str, waiting: Waiting, next: &str) -> String {
        let waits = match waiting.oldest {
            Some(oldest) => format!(
                "Messages that wait now: {}, the oldest since {}.",
                waiting.messages,
                date(oldest)
            ),
            None => "No message waits now.".to_owned(),
        };
        format!(
            "This is the mail gateway at {}.\n\n{state}\n\n    {}\n\n{waits}\n{next}",
            house.hostname, self.words
        )
    }
}

fn at(stage: Stage) -> &'static str {
    match stage {
        Stage::Connect => "when the gateway connected",
        Stage::StartTls => "when the connection was to be made secure",
        Stage::Auth => "to the login",
        Stage::Greeting
        | Stage::Ehlo
        | Stage::Mail
        | Stage::Rcpt
        | Stage::Data
        | Stage::Content
        | Stage::EndOfData
        | Stage::SendMail
        | Stage::Draft
        | Stage::Upload
        | Stage::Send
        | Stage::Local => stage.label(),
    }
}

fn advice(stage: Stage) -> &'static str {
    match stage {
        Stage::Connect => {
            "see whether the server is up and can be reached from the gateway (name,\n\
             port, firewall). `provider.server` and `provider.port` say where it is looked for."
        }
        Stage::StartTls => {
            "see whether the server's certificate is valid and names the server, and\n\
             whether `provider.security` fits its port."
        }
        Stage::Auth => {
            "see whether user and password, or the application and its secret, are right\n\
             and may log in. Change them in `[provider]` and restart the gateway."
        }
        Stage::Greeting
        | Stage::Ehlo
        | Stage::Mail
        | Stage::Rcpt
        | Stage::Data
        | Stage::Content
        | Stage::EndOfData
        | Stage::SendMail
        | Stage::Draft
        | Stage::Upload
        | Stage::Send
        | Stage::Local => {
            "the answer above says what the server objects to. If it makes no sense to\n\
             you, ask who runs that server."
        }
    }
}

fn span(length: Duration) -> String {
    let minutes = length.as_secs() / 60;
    let (days, hours, minutes) = (minutes / 1440, minutes / 60 % 24, minutes % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes} min"),
        (0, _) => format!("{hours} h {minutes} min"),
        (_, _) => format!("{days} d {hours} h"),
    }
}

/// What a digest says of a report that it stands for.
pub fn line(original: &Envelope, entries: &[Entry<'_>], now: UnixMillis) -> String {
    let from = Escaped(original.reverse_path.as_str().as_bytes()).to_string();
    let mut out = format!("{} {} from <{from}>", date(now), original.id);
    for entry in entries.iter().take(3) {
        let (what, words) = match entry.news {
            News::Failed(cause) => ("failed", &cause.words),
            News::Delayed(cause, _) => ("delayed", &cause.words),
            News::Relayed(receipt) => ("relayed", &receipt.words),
        };
        let to = Escaped(entry.rcpt.path.as_str().as_bytes());
        let words: String = words.to_string().chars().take(200).collect();
        let _infallible = write!(out, "; {what} for <{to}>: {words}");
    }
    if entries.len() > 3 {
        let _infallible = write!(out, "; and {} more recipients", entries.len() - 3);
    }
    out
}

#[cfg(test)]
mod tests;
