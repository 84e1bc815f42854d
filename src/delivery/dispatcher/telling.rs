//! Puts what is to be told into the spool: reports in the batch of the outcome that they tell, letters to the postmaster
//! by themselves. What is told to whom, `reports` decides.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use tracing::{error, info, warn};

use super::{DISK_RETRY, Dispatcher, Ended, Round, Shared};
use crate::clock;
use crate::delivery::gate::Change;
use crate::delivery::operator::Place;
use crate::delivery::reports::{self, Errand, Gist, Letter, Note, Waiting};
use crate::delivery::retry;
use crate::delivery::schedule::Turn;
use crate::envelope::{Kind, Progress, QueueState, SpoolId, UnixMillis};
use crate::message::dsn::{self, Returned};
use crate::outcome::Cause;
use crate::smtp::address::ReversePath;
use crate::smtp::reply::Escaped;
use crate::spool::{Durability, Op, Spool, SpoolError, Stage, Staged};

/// What goes into the spool together with the record of an outcome.
#[derive(Debug)]
pub(super) struct Enclosed {
    letter: Option<(Letter, Gist)>,
    notes: Vec<Note>,
    /// What the progress said was untold, in case it stays so.
    untold: Vec<u32>,
    warned: bool,
}

impl<S: Spool> Dispatcher<S> {
    /// Begins what the postmaster is to be told now, and says when to look again.
    pub(super) fn begin_errand(&mut self) -> Option<Instant> {
        if !self.errand.is_empty() {
            return None;
        }
        let (due, notice) = {
            let desk = self.shared.desk();
            (desk.due()?, desk.notice())
        };
        let (now, wall) = (clock::now(), clock::wall());
        if due > now {
            return Some(due);
        }
        // The end of what is done to it wakes the loop.
        if notice.is_some_and(|id| self.is_busy(id)) {
            return None;
        }
        self.replaced = notice.map(|id| (id, self.take_out(id)));
        let waiting = self.waiting();
        let errand = self.shared.desk().errand(&self.shared.settings.house, waiting, now, wall);
        match errand {
            Some(errand) => drop(self.errand.spawn(run(Arc::clone(&self.shared), errand))),
            None => self.put_replaced_back(),
        }
        // The next one after this, or at once where there was nobody to tell.
        self.shared.desk().due().filter(|_| self.errand.is_empty())
    }

    pub(super) fn errand_ended(&mut self) {
        self.put_replaced_back();
        self.schedule_letters();
    }

    /// Behind all that is due by now and was tried before, so that new mail has three turns for each of theirs.
    pub(super) fn schedule_letters(&mut self) {
        let put = self.shared.desk().take_put();
        let notice = self.outage_notice();
        for id in put {
            match notice == Some(id) {
                true => self.kept = Some((id, clock::now())),
                false => self.schedule.push(id, Turn::Again, clock::now()),
            }
        }
    }

    /// The notice of an outage that is kept until that is over. What was written to a postmaster who is none any more is
    /// a letter like any other.
    pub(super) fn outage_notice(&self) -> Option<SpoolId> {
        let is_set = self.shared.settings.house.bounce.postmaster.is_some();
        self.shared.desk().notice().filter(|_| is_set)
    }

    /// From when on the notice of an outage is to find out that the provider works: where there is nothing else to send,
    /// for nobody would hear of the outage before there is new mail. Where the last of the mail was taken, that was the end
    /// of the outage, and the one that tells so follows it.
    pub(super) fn probes_by_notice(&self) -> Option<Instant> {
        let is_more_left = !self.schedule.is_empty()
            || !self.attempts.is_empty()
            || !self.changing.is_empty()
            || !self.accepted.is_empty();
        if is_more_left {
            return None;
        }
        let is_over = self.shared.desk().is_over();
        self.kept.filter(|_| !is_over).map(|(_, at)| at)
    }

    fn is_busy(&self, id: SpoolId) -> bool {
        self.in_flight.values().any(|(sent, _)| *sent == id)
            || self.changing.iter().any(|(changed, _)| *changed == id)
    }

    /// Takes a notice from where it is, so that nothing begins with it while another takes its place.
    fn take_out(&mut self, id: SpoolId) -> Place {
        if let Some((_, at)) = self.kept.take_if(|(kept, _)| *kept == id) {
            return Place::Kept(at);
        }
        if self.unreadable.remove(&id) {
            return Place::Unreadable;
        }
        match self.shared.spool.head(id).map(|head| head.state) {
            Some(QueueState::Held) => {
                self.held = self.held.saturating_sub(1);
                Place::Held
            }
            Some(QueueState::Queued) => {
                let mut due = self.schedule.remove_all(&HashSet::from([id]));
                due.remove(&id).map_or(Place::Out, Place::Due)
            }
            Some(QueueState::Failed) | None => Place::Out,
        }
    }

    /// Where it still is there, nothing took its place.
    fn put_replaced_back(&mut self) {
        let is_there = |id: SpoolId| self.shared.spool.head(id).is_some();
        if let Some((id, place)) = self.replaced.take().filter(|(id, _)| is_there(*id)) {
            self.put(id, place);
        }
    }

    /// How much waits, but for what was just taken out. What an operator is changing at this moment is counted and not
    /// dated.
    fn waiting(&self) -> Waiting {
        let in_flight = self.in_flight.values().map(|(id, _)| *id);
        let oldest = in_flight.chain(self.schedule.oldest()).min();
        let replaced = match self.replaced {
            Some((_, Place::Due(_) | Place::Kept(_))) => 1,
            Some((_, Place::Held | Place::Unreadable | Place::Out)) | None => 0,
        };
        let messages = self.queued().saturating_sub(replaced);
        Waiting { messages, oldest: oldest.map(SpoolId::accepted) }
    }
}

/// Puts a letter to the postmaster into the spool, however long the disk refuses it: it is not known elsewhere.
async fn run<S: Spool>(shared: Arc<Shared<S>>, mut errand: Errand) {
    loop {
        let put = match put(shared.spool.as_ref(), errand.letter.as_ref()).await {
            Ok(put) => {
                let delete = errand.replaces.map(|id| Op::Delete { id });
                let notes = notes(&errand.notes);
                let ops = delete.into_iter().chain(put).chain(notes).collect();
                shared.spool.apply(ops, Durability::Lazy).await
            }
            Err(error) => Err(error),
        };
        match put {
            Ok(()) => break,
            // It has been sent meanwhile, or an operator took it away.
            Err(SpoolError::Unknown(_)) if errand.replaces.is_some() => {
                errand.replaces = None;
                continue;
            }
            Err(SpoolError::Closed) => return,
            Err(error) => {
                error!(%error, "what the postmaster is told cannot be written: {error}; trying again");
            }
        }
        tokio::time::sleep(DISK_RETRY).await;
    }
    let Some(letter) = errand.letter else { return };
    shared.metrics.reports.with_label_values(&[errand.label]).inc();
    let id = letter.envelope.id;
    let kind = errand.label;
    info!(event = "reported", report = %id, kind, "the postmaster is told: {kind} {id}");
    shared.desk().put(id);
}

async fn put<S: Spool>(spool: &S, letter: Option<&Letter>) -> Result<Option<Op>, SpoolError> {
    let Some(letter) = letter else { return Ok(None) };
    let mut stage = spool.stage();
    stage.write(&letter.content).await?;
    let body: Staged = stage.finish().await?;
    Ok(Some(Op::Put { envelope: letter.envelope.clone(), body }))
}

fn notes(notes: &[Note]) -> impl Iterator<Item = Op> + '_ {
    notes.iter().map(|(key, bytes)| Op::Note { key: key.clone(), bytes: bytes.clone() })
}

impl<S: Spool> Shared<S> {
    /// Neither the letter nor what is on the list instead could be written.
    fn take_back(&self, letter: Option<Gist>, notes: &[Note]) {
        let mut desk = self.desk();
        if let Some(gist) = letter {
            desk.withdraw(gist);
        }
        notes.iter().for_each(|(key, _)| desk.unlist(key));
    }

    pub(super) fn note_outage(&self, change: Change, cause: Option<&Cause>) {
        let lasts = match change {
            Change::Opened(_) => return self.desk().opened(clock::now(), clock::wall()),
            Change::Closed => true,
            Change::Unchanged => cause.is_some() && self.gate().closed().is_some(),
        };
        if let Some(cause) = cause.filter(|_| lasts) {
            let bounce = &self.settings.house.bounce;
            let is_there = |id| self.spool.head(id).is_some();
            self.desk().closed(bounce, cause, is_there, clock::now(), clock::wall());
        }
    }
}

impl<S: Spool> Round<'_, S> {
    /// Whether this is a letter of ours that was refused for its null reverse path, and may go from the provider's sender
    /// instead. Once: what is refused then has failed.
    pub(super) fn may_be_named(&self, cause: &Cause) -> bool {
        cause.null_path
            && self.message.envelope.kind != Kind::Mail
            && !self.message.progress.named
            && self.shared.settings.house.sender.is_some()
    }

    /// The reverse path that the message leaves with.
    pub(super) fn named(&self, reverse_path: ReversePath) -> ReversePath {
        match &self.shared.settings.house.sender {
            Some(sender) if self.message.progress.named => ReversePath::Mailbox(sender.clone()),
            Some(_) | None => reverse_path,
        }
    }

    /// What is to be told of the message now. From here on its progress says that it is told. `own`: it was just deferred
    /// for a reason of its own.
    pub(super) async fn enclose(&mut self, own: bool, wall: UnixMillis) -> Option<Enclosed> {
        let house = &self.shared.settings.house;
        let progress = &self.message.progress;
        let envelope = &self.message.envelope;
        let delayed = progress.first_deferral.filter(|first| {
            let (retry, after) = (&self.shared.settings.retry, house.bounce.delay_warning_after);
            own && !progress.warned
                && envelope.kind == Kind::Mail
                && retry::span_fills(retry, after, progress.attempts, *first, wall)
        });
        let until = delayed.map(|first| first.plus(house.give_up_after));
        let entries = reports::news(envelope, progress, until);
        if entries.is_empty() {
            return None;
        }
        let (untold, warned) = (progress.untold.clone(), progress.warned);
        let mut enclosed = Enclosed { letter: None, notes: Vec::new(), untold, warned };
        let (id, gist) = (envelope.id, reports::gist(&entries));
        match house.audience(envelope, &entries) {
            Err(why) => {
                let kind = gist.label();
                warn!(event = "unreported", %id, kind, "nobody is told what became of message {id} ({kind}): {why}");
            }
            Ok(audience) => {
                let now = clock::now();
                let admitted = self.shared.desk().admits(gist, &house.bounce, now);
                if admitted {
                    let all = house.returns_all(envelope, &entries);
                    let (content, is_whole) = self.read(all).await;
                    let returned = match is_whole {
                        true => Returned::Full(&content),
                        false => Returned::Header(&content),
                    };
                    let letter = house.report(audience, envelope, &entries, returned, wall);
                    enclosed.letter = Some((letter, gist));
                } else if house.bounce.postmaster.is_none() {
                    let kind = gist.label();
                    warn!(event = "unreported", %id, kind, "nobody is told what became of message {id} ({kind}): more than bounce.max_per_hour reports, and bounce.postmaster, who would get the list, is not set");
                } else {
                    let line = reports::line(envelope, &entries, wall);
                    enclosed.notes.extend(self.shared.desk().list(line, now, wall));
                }
            }
        }
        let is_delay = |entry: &dsn::Entry<'_>| matches!(entry.news, dsn::News::Delayed(..));
        let warns = entries.iter().any(is_delay);
        let progress = &mut self.message.progress;
        progress.untold.clear();
        progress.warned |= warns;
        self.changed = true;
        Some(enclosed)
    }

    /// The message as it was stored, where `all` of it is asked for and can be had; else as much as holds its header.
    async fn read(&self, all: bool) -> (Vec<u8>, bool) {
        let (id, body) = (self.id(), &self.message.body);
        let mut content = self.message.envelope.prepend.to_vec();
        let all = all && content.len() as u64 + body.len() <= dsn::MAX_FULL;
        let mut reader = body.reader();
        let mut is_whole = all;
        while all || content.len() < dsn::MAX_HEADER {
            match reader.chunk().await {
                Ok(Some(chunk)) => content.extend_from_slice(&chunk),
                Ok(None) => break,
                Err(error) => {
                    warn!(%id, %error, "the content of message {id} cannot be read for its report: {error}");
                    is_whole = false;
                    break;
                }
            }
        }
        (content, is_whole)
    }

    /// Writes one op with what is enclosed. Where the spool has no room for a letter, the outcome is written alone, and
    /// the message stays queued until it can be told: how, is returned.
    pub(super) async fn write_with(
        &self,
        op: impl Fn() -> Op + Send + Sync,
        enclosed: Option<Enclosed>,
    ) -> Option<Ended> {
        let Some(enclosed) = enclosed else {
            self.write(op, Durability::Lazy).await;
            return None;
        };
        self.doubt_is_told().await;
        let id = self.id();
        let letter = enclosed.letter.as_ref().map(|(letter, _)| letter);
        let written = match put(self.shared.spool.as_ref(), letter).await {
            Ok(letter) => {
                let ops = [op()].into_iter().chain(letter).chain(notes(&enclosed.notes)).collect();
                self.shared.spool.apply(ops, Durability::Lazy).await
            }
            Err(error) => Err(error),
        };
        match written {
            Ok(()) => {
                self.told(&enclosed);
                None
            }
            Err(SpoolError::Closed | SpoolError::Unknown(_) | SpoolError::Refused(..)) => None,
            Err(error) => {
                warn!(%id, %error, "the report on message {id} cannot be written now: {error}; trying again");
                let Enclosed { letter, notes, untold, warned } = enclosed;
                self.shared.take_back(letter.map(|(_, gist)| gist), &notes);
                let progress = Progress { untold, warned, ..self.message.progress.clone() };
                // One that is to be held is told when it is let go.
                if self.held {
                    let hold = || Op::Hold { id, progress: progress.clone() };
                    self.write(hold, Durability::Lazy).await;
                    return Some(Ended::Held);
                }
                let update = || Op::Update { id, progress: progress.clone() };
                self.write(update, Durability::Lazy).await;
                Some(Ended::Again(clock::now() + self.shared.settings.retry.first))
            }
        }
    }

    fn told(&self, enclosed: &Enclosed) {
        let id = self.id();
        match &enclosed.letter {
            Some((letter, gist)) => {
                let kind = gist.label();
                let report = letter.envelope.id;
                let to = letter.envelope.rcpts.first().map_or("", |rcpt| rcpt.path.as_str());
                let to = Escaped(to.as_bytes());
                self.shared.metrics.reports.with_label_values(&[kind]).inc();
                info!(event = "reported", %id, %report, kind, %to, "message {id}: <{to}> is told ({kind}) by {report}");
                self.shared.desk().put(report);
            }
            None if !enclosed.notes.is_empty() => {
                info!(event = "listed", %id, "message {id}: more than bounce.max_per_hour reports, so it is on the postmaster's list");
            }
            None => {}
        }
    }
}
