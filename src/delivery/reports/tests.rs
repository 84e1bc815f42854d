use std::collections::BTreeMap;

use super::*;
use crate::outcome::Receipt;

const AT: UnixMillis = UnixMillis(1_795_502_531_000);

fn mailbox(text: &str) -> Mailbox {
    Mailbox::parse(text, Charset::Ascii).unwrap()
}

fn house(postmaster: bool) -> House {
    House {
        hostname: "relay.test".to_owned(),
        sender: Some(mailbox("reports@example.com")),
        server: Some("smtp.example.com".to_owned()),
        bounce: Bounce {
            to: BounceTo::Sender,
            postmaster: postmaster.then(|| mailbox("ops@example.com")),
            delay_warning_after: Duration::from_secs(4 * 3600),
            max_per_hour: 2,
            full: false,
        },
        give_up_after: Duration::from_secs(5 * 86_400),
    }
}

fn envelope(from: &str, rcpts: &[(&str, Notify)]) -> Envelope {
    let rcpt = |(path, notify): &(&str, Notify)| Rcpt {
        path: ForwardPath::parse(path, Charset::Ascii).unwrap(),
        notify: *notify,
        orcpt: None,
    };
    let letter = house(true).notice(&mailbox("x@example.com"), "x", String::new(), AT);
    Envelope {
        kind: Kind::Mail,
        reverse_path: match from {
            "" => ReversePath::Null,
            from => ReversePath::Mailbox(mailbox(from)),
        },
        rcpts: rcpts.iter().map(rcpt).collect(),
        ..letter.envelope
    }
}

fn no() -> Cause {
    Cause::new(Scope::Recipient, Stage::Rcpt, "550 no such user")
}

fn later() -> Cause {
    Cause::new(Scope::Recipient, Stage::Rcpt, "450 later")
}

fn delivered(relayed: bool) -> Outcome {
    Outcome::Delivered(Receipt { relayed, ..Receipt::new("250 ok") })
}

#[test]
fn what_is_told_depends_on_kind_notify_and_end() {
    let on = |success, failure, delay| Notify::On { success, failure, delay };
    for (kind, notify, outcome, due) in [
        (Kind::Mail, Notify::Unsaid, Outcome::Failed(no()), true),
        (Kind::Mail, Notify::Never, Outcome::Failed(no()), false),
        (Kind::Mail, on(true, false, true), Outcome::Failed(no()), false),
        (Kind::Mail, on(false, true, false), Outcome::Failed(no()), true),
        (Kind::Mail, Notify::Unsaid, Outcome::Deferred(no()), false),
        (Kind::Mail, Notify::Unsaid, Outcome::Held(no()), false),
        (Kind::Mail, Notify::Unsaid, delivered(true), false),
        (Kind::Mail, on(true, false, false), delivered(true), true),
        (Kind::Mail, on(true, false, false), delivered(false), false),
        (Kind::Mail, on(false, true, true), delivered(true), false),
        (Kind::Report, Notify::Never, Outcome::Failed(no()), true),
        (Kind::Report, Notify::Never, delivered(true), false),
        (Kind::Notice, Notify::Unsaid, Outcome::Failed(no()), false),
    ] {
        assert_eq!(is_due(kind, notify, &outcome), due, "{kind:?} {notify:?} {outcome:?}");
    }
}

/// One letter for each recipient of the progress: failed, waiting for its own reason, the provider's, or because it may
/// have been sent, delivered.
fn told(notify: &[Notify], statuses: &str, untold: &[u32], delayed: bool) -> String {
    let rcpts: Vec<_> = notify.iter().map(|notify| ("b@example.org", *notify)).collect();
    let envelope = envelope("a@example.com", &rcpts);
    let status = |letter| match letter {
        'f' => RcptStatus::Failed(no()),
        'w' => RcptStatus::Pending { last: Some(later()) },
        'p' => {
            let cause = Cause::new(Scope::Provider, Stage::Connect, "refused");
            RcptStatus::Pending { last: Some(cause) }
        }
        'm' => RcptStatus::Pending { last: Some(Cause { maybe_sent: true, ..later() }) },
        _ => RcptStatus::Delivered(Receipt::new("250 ok")),
    };
    let progress = Progress {
        rcpts: statuses.chars().map(status).collect(),
        untold: untold.to_vec(),
        ..Progress::new(AT, notify.len())
    };
    let letter = |entry: &Entry<'_>| match entry.news {
        News::Failed(_) => 'F',
        News::Delayed(..) => 'D',
        News::Relayed(_) => 'R',
    };
    news(&envelope, &progress, delayed.then_some(AT)).iter().map(letter).collect()
}

#[test]
fn a_report_tells_what_is_untold_and_who_waits_for_a_reason_of_his_own() {
    let unsaid = Notify::Unsaid;
    assert_eq!(told(&[unsaid; 4], "ffwd", &[1, 3], false), "FR");
    assert_eq!(told(&[unsaid; 4], "ffwd", &[1], true), "FD");
    assert_eq!(told(&[unsaid; 3], "wpd", &[], true), "D", "not for the provider's");
    assert_eq!(told(&[unsaid; 3], "wpd", &[], false), "");
    assert_eq!(told(&[unsaid; 2], "mm", &[], true), "", "not of a doubt");
    let only = |delay| Notify::On { success: true, failure: true, delay };
    assert_eq!(told(&[Notify::Never, only(false), only(true)], "www", &[], true), "D");
    assert_eq!(told(&[unsaid], "f", &[7], true), "", "no such recipient");
}

#[test]
fn a_report_goes_to_the_sender_or_where_that_makes_no_sense_to_the_postmaster() {
    let cause = no();
    let audience = |house: &House, envelope: &Envelope| {
        let entries = [Entry { rcpt: &envelope.rcpts[0], news: News::Failed(&cause) }];
        let audience = house.audience(envelope, &entries);
        audience.map_or_else(|_nobody| "nobody".to_owned(), |it| it.to.to_string())
    };
    let unsaid = Notify::Unsaid;
    for (from, to) in [
        ("a@example.com", "a@example.com"),
        ("", "ops@example.com"),
        ("root@box", "ops@example.com"),
        ("root@box.LOCAL", "ops@example.com"),
        ("root@localhost.localhost", "ops@example.com"),
        ("root@a.internal", "ops@example.com"),
        ("root@a.invalid", "ops@example.com"),
        ("b@example.org", "ops@example.com"),
        ("a@internal.example", "a@internal.example"),
    ] {
        let envelope = envelope(from, &[("b@example.org", unsaid)]);
        assert_eq!(audience(&house(true), &envelope), to, "<{from}>");
        let alone = if to == "ops@example.com" { "nobody" } else { to };
        assert_eq!(audience(&house(false), &envelope), alone, "<{from}> without postmaster");
    }
    let mut mail = envelope("a@example.com", &[("b@example.org", unsaid)]);
    let mut other = house(true);
    other.bounce.to = BounceTo::Postmaster;
    assert_eq!(audience(&other, &mail), "ops@example.com");
    other.bounce.to = BounceTo::Nobody;
    assert_eq!(audience(&other, &mail), "nobody");
    mail.kind = Kind::Report;
    assert_eq!(audience(&house(true), &mail), "ops@example.com");
    mail.kind = Kind::Notice;
    assert_eq!(audience(&house(true), &mail), "nobody", "a notice that fails is dropped");
}

#[test]
fn the_postmaster_hears_why_he_is_told_in_the_authors_stead() {
    let cause = no();
    let mut by_choice = house(true);
    by_choice.bounce.to = BounceTo::Postmaster;
    for (house, kind, from, reader) in [
        (house(true), Kind::Mail, "a@example.com", Reader::Author),
        (house(true), Kind::Mail, "", Reader::Postmaster(Why::NoAuthor)),
        (house(true), Kind::Mail, "root@box", Reader::Postmaster(Why::LocalAuthor)),
        (house(true), Kind::Mail, "b@example.org", Reader::Postmaster(Why::AuthorFailed)),
        (house(true), Kind::Report, "", Reader::Postmaster(Why::ReportFailed)),
        (by_choice, Kind::Mail, "a@example.com", Reader::Postmaster(Why::Chosen)),
    ] {
        let mut mail = envelope(from, &[("b@example.org", Notify::Unsaid)]);
        mail.kind = kind;
        let entries = [Entry { rcpt: &mail.rcpts[0], news: News::Failed(&cause) }];
        let audience = house.audience(&mail, &entries).unwrap();
        assert_eq!(audience.reader, reader, "{kind:?} <{from}>");
        let letter = house.report(audience, &mail, &entries, Returned::Header(b""), AT);
        let is_to_author = letter.envelope.kind == Kind::Report;
        assert_eq!(is_to_author, reader == Reader::Author, "{kind:?} <{from}>");
    }
}

#[test]
fn letters_are_marked_and_ask_for_nothing() {
    let original = envelope("a@example.com", &[("b@example.org", Notify::Unsaid)]);
    let cause = no();
    let entries = [Entry { rcpt: &original.rcpts[0], news: News::Failed(&cause) }];
    let house = house(true);
    let audience = house.audience(&original, &entries).unwrap();
    let letter = house.report(audience, &original, &entries, Returned::Header(b"A: b\r\n"), AT);
    let envelope = &letter.envelope;
    assert_eq!((envelope.kind, &envelope.reverse_path), (Kind::Report, &ReversePath::Null));
    assert_eq!(envelope.rcpts[0].notify, Notify::Never);
    assert_eq!(envelope.author.as_ref().unwrap().as_str(), "reports@example.com");
    assert_eq!(envelope.size, letter.content.len() as u64);
}

/// A desk with the notes that it would have in the spool.
struct Office {
    desk: Desk,
    house: House,
    notes: BTreeMap<Box<str>, Vec<u8>>,
    /// The letters that nobody has yet.
    in_spool: Vec<SpoolId>,
    began: Instant,
}

impl Office {
    fn new() -> Self {
        let began = crate::clock::now();
        let desk = Desk::load(|_| None, began, AT);
        Self { desk, house: house(true), notes: BTreeMap::new(), in_spool: Vec::new(), began }
    }

    fn at(&self, minutes: u64) -> (Instant, UnixMillis) {
        let after = Duration::from_secs(60 * minutes);
        (self.began + after, AT.plus(after))
    }

    fn restart(&mut self, minutes: u64) {
        let (now, wall) = self.at(minutes);
        self.desk = Desk::load(|key| self.notes.get(key).cloned(), now, wall);
    }

    fn report(&mut self, minutes: u64, line: &str) -> bool {
        self.report_of(Gist::Failure, minutes, line)
    }

    fn report_of(&mut self, gist: Gist, minutes: u64, line: &str) -> bool {
        let (now, wall) = self.at(minutes);
        let admitted = self.desk.admits(gist, &self.house.bounce, now);
        if !admitted {
            let notes = self.desk.list(line.to_owned(), now, wall);
            self.keep(notes.into());
        }
        admitted
    }

    fn keep(&mut self, notes: Vec<Note>) {
        for (key, bytes) in notes {
            match bytes.is_empty() {
                true => self.notes.remove(&key),
                false => self.notes.insert(key, bytes),
            };
        }
    }

    fn closed(&mut self, minutes: u64) {
        let (now, wall) = self.at(minutes);
        let cause = Cause::new(Scope::Provider, Stage::Auth, "535 5.7.8 bad password");
        let is_there = |id| self.in_spool.contains(&id);
        self.desk.closed(&self.house.bounce, &cause, is_there, now, wall);
    }

    fn opened(&mut self, minutes: u64) {
        let (now, wall) = self.at(minutes);
        self.desk.opened(now, wall);
    }

    /// The errand that is due then, with its text.
    fn errand(&mut self, minutes: u64) -> Option<(Errand, String)> {
        let (now, wall) = self.at(minutes);
        self.desk.due().filter(|due| *due <= now)?;
        let waiting = Waiting { messages: 3, oldest: Some(AT) };
        let errand = self.desk.errand(&self.house, waiting, now, wall)?;
        self.keep(errand.notes.clone());
        self.in_spool.retain(|id| errand.replaces != Some(*id));
        self.in_spool.extend(errand.letter.as_ref().map(|letter| letter.envelope.id));
        let letter = errand.letter.clone().map_or_else(Vec::new, |letter| letter.content);
        let text = String::from_utf8(letter).unwrap();
        Some((errand, text.replace("=\r\n", "")))
    }
}

fn id_of(errand: &Errand) -> SpoolId {
    errand.letter.as_ref().unwrap().envelope.id
}

#[test]
fn beyond_the_limit_of_an_hour_one_digest_goes_to_the_postmaster() {
    let mut office = Office::new();
    let admitted: Vec<bool> = (0..4).map(|n| office.report(0, &format!("line {n}"))).collect();
    assert_eq!(admitted, [true, true, false, false]);
    assert!(office.errand(59).is_none());
    let (errand, text) = office.errand(60).unwrap();
    assert_eq!(
        (errand.label, errand.letter.as_ref().unwrap().envelope.kind),
        ("digest", Kind::Notice)
    );
    assert!(text.contains("line 2\r\nline 3\r\n") && !text.contains("line 1"), "{text}");
    assert!(office.notes.is_empty());
    assert!(office.errand(1000).is_none());
    assert!(office.report(61, "x"), "another hour");
}

#[test]
fn what_is_listed_survives_a_restart_and_is_told_once() {
    let mut office = Office::new();
    for n in 0..5 {
        office.report(0, &format!("line {n}"));
    }
    office.restart(1);
    let (_, text) = office.errand(60).unwrap();
    assert!(text.contains("line 2\r\nline 3\r\nline 4\r\n"), "{text}");
    office.restart(61);
    assert!(office.errand(200).is_none());
}

/// Each start sent what was listed so far.
#[test]
fn the_hour_of_a_digest_goes_on_over_a_restart() {
    let mut office = Office::new();
    for n in 0..4 {
        office.report(0, &format!("line {n}"));
    }
    for minutes in [20, 40] {
        office.restart(minutes);
        office.report(minutes, "x");
        office.report(minutes, "y");
        office.report(minutes, &format!("line {minutes}"));
        assert!(office.errand(minutes).is_none() && office.errand(59).is_none());
    }
    let (_, text) = office.errand(60).unwrap();
    assert!(text.contains("line 3\r\nline 20\r\nline 40\r\n"), "{text}");
    assert!(office.notes.is_empty());
    // One that is over is not waited for again, and a clock that stepped back makes it no longer.
    for (restarted, due) in [(200, 200), (0, 60)] {
        let mut office = Office::new();
        for n in 0..3 {
            office.report(100, &format!("line {n}"));
        }
        office.restart(restarted);
        assert!(office.errand(due - 1).is_none() && office.errand(due).is_some(), "{restarted}");
    }
}

/// Delay warnings pushed failures onto the digest.
#[test]
fn many_delays_leave_failures_their_reports() {
    let mut office = Office::new();
    let admitted: Vec<bool> = (0..3).map(|_| office.report_of(Gist::Delay, 0, "late")).collect();
    assert_eq!(admitted, [true, true, false]);
    for gist in [Gist::Failure, Gist::Relayed] {
        let admitted: Vec<bool> = (0..3).map(|_| office.report_of(gist, 0, "x")).collect();
        assert_eq!(admitted, [true, true, false], "{gist:?}");
    }
    office.desk.withdraw(Gist::Failure);
    office.desk.withdraw(Gist::Failure);
    assert!(!office.report_of(Gist::Delay, 0, "late"), "each is counted by itself");
    assert!(office.report(0, "x"));
}

#[test]
fn what_comes_while_a_digest_is_written_is_not_lost_with_its_notes() {
    let mut office = Office::new();
    for n in 0..4 {
        office.report(0, &format!("line {n}"));
    }
    let (now, wall) = office.at(60);
    let none = Waiting { messages: 0, oldest: None };
    let errand = office.desk.errand(&office.house, none, now, wall).unwrap();
    for n in 10..13 {
        office.report(60, &format!("line {n}"));
    }
    office.keep(errand.notes);
    office.restart(61);
    assert!(office.errand(119).is_none());
    let (_, text) = office.errand(120).unwrap();
    assert!(text.contains("line 12\r\n") && !text.contains("line 3"), "{text}");
}

#[test]
fn a_digest_and_its_notes_are_bounded() {
    let mut office = Office::new();
    for n in 0..1_000 {
        office.report(0, &format!("{n} {}", "x".repeat(5_000)));
    }
    assert_eq!(office.notes.len(), MAX_LISTED + 2);
    office.restart(1);
    let (_, text) = office.errand(60).unwrap();
    assert!(text.contains("and at least 798 more"), "{}", text.len());
    assert!(text.len() < 300_000 && office.notes.is_empty());
}

#[test]
fn an_outage_is_told_once_it_lasts_then_daily_and_when_it_ends() {
    let mut office = Office::new();
    office.closed(0);
    assert!(office.errand(14).is_none(), "it may be a blip");
    let (first, text) = office.errand(15).unwrap();
    assert_eq!((first.label, first.replaces), ("notice", None));
    for part in ["Mail waits", "535 5.7.8 bad password", "that wait now: 3", "user and password"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    office.closed(100);
    assert!(office.errand(15 + 24 * 60 - 1).is_none());
    let (daily, _) = office.errand(15 + 24 * 60).unwrap();
    assert_eq!(daily.replaces, Some(id_of(&first)));
    office.opened(6 * 24 * 60);
    let (end, text) = office.errand(6 * 24 * 60).unwrap();
    assert_eq!(end.replaces, Some(id_of(&daily)));
    for part in ["Mail flows again", "535 5.7.8 bad password", "6 d 0 h"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    office.opened(6 * 24 * 60 + 1);
    assert!(office.errand(30 * 24 * 60).is_none() && office.notes.is_empty());
}

#[test]
fn a_blip_is_told_to_nobody() {
    let mut office = Office::new();
    office.closed(0);
    office.opened(14);
    assert!(office.errand(100).is_none());
    office.closed(200);
    assert!(office.errand(214).is_none(), "it counts from its own start");
    assert!(office.errand(215).unwrap().0.replaces.is_none());
}

#[test]
fn an_outage_goes_on_over_a_restart() {
    let mut office = Office::new();
    office.closed(0);
    let (first, _) = office.errand(15).unwrap();
    office.restart(60);
    office.closed(61);
    assert!(office.errand(15 + 24 * 60 - 1).is_none());
    let (daily, text) = office.errand(15 + 24 * 60).unwrap();
    assert_eq!(daily.replaces, Some(id_of(&first)));
    assert!(text.contains("(1 d 0 h)"), "{text}");
    // Over while nobody ran: the first answer says so.
    office.restart(3000);
    office.opened(3001);
    let (end, _) = office.errand(3001).unwrap();
    assert_eq!(end.replaces, Some(id_of(&daily)));
}

/// It was told in halves, each of them wrong.
#[test]
fn an_outage_whose_end_nobody_has_heard_of_goes_on() {
    let mut office = Office::new();
    office.closed(0);
    let (first, _) = office.errand(15).unwrap();
    office.opened(99);
    office.closed(100);
    let (again, text) = office.errand(115).unwrap();
    assert_eq!(again.replaces, Some(id_of(&first)), "its end was not written yet");
    assert!(text.contains("(1 h 55 min)"), "{text}");
    office.opened(200);
    let (end, _) = office.errand(200).unwrap();
    office.closed(201);
    assert!(office.errand(215).is_none());
    let (again, text) = office.errand(216).unwrap();
    assert_eq!(again.replaces, Some(id_of(&end)), "its end was not sent yet");
    assert!(text.contains("(3 h 36 min)"), "{text}");
    office.opened(300);
    office.errand(300).unwrap();
    office.in_spool.clear();
    office.closed(301);
    let (other, text) = office.errand(316).unwrap();
    assert!(other.replaces.is_none() && text.contains("(15 min)"), "another one: {text}");
}

#[test]
fn an_outage_of_a_former_run_is_over_by_an_answer_from_behind_where_it_was() {
    for (stage, answer, is_over) in [
        (Stage::Auth, Answer::Spoken, true),
        (Stage::EndOfData, Answer::Spoken, false),
        (Stage::EndOfData, Answer::Taken, true),
    ] {
        let mut office = Office::new();
        let (now, wall) = office.at(0);
        let cause = Cause::new(Scope::Provider, stage, "550 5.7.708 no");
        office.desk.closed(&office.house.bounce, &cause, |_| false, now, wall);
        office.errand(15).unwrap();
        office.restart(60);
        let (now, wall) = office.at(61);
        office.desk.answered(answer, now, wall);
        assert_eq!(office.desk.is_over(), is_over, "{stage:?} {answer:?}");
    }
}

/// What it says is not known any more.
#[test]
fn a_start_long_after_an_outage_tells_nothing_before_an_attempt_met_it_again() {
    let mut office = Office::new();
    office.closed(0);
    let (first, _) = office.errand(15).unwrap();
    office.restart(3000);
    assert_eq!(office.desk.notice(), Some(id_of(&first)));
    assert!(office.desk.due().is_none() && office.errand(4000).is_none());
    office.closed(4001);
    let (daily, text) = office.errand(4001).unwrap();
    assert_eq!(daily.replaces, Some(id_of(&first)));
    assert!(text.contains("(2 d 18 h)"), "{text}");
}

#[test]
fn without_a_postmaster_there_are_no_notices() {
    let mut office = Office::new();
    office.house = house(false);
    office.closed(0);
    for n in 0..4 {
        office.report(0, &format!("line {n}"));
    }
    let (now, _) = office.at(100);
    assert!(office.errand(100).is_none());
    assert!(office.desk.due().is_none_or(|due| due > now), "it is not asked over and over");
    office.opened(101);
    assert!(office.errand(101).is_none());
}

#[test]
fn a_message_comes_back_as_was_asked_for() {
    let cause = no();
    let waits = later();
    let mut original = envelope("a@example.com", &[("b@example.org", Notify::Unsaid)]);
    let failed = News::Failed(&cause);
    let delayed = News::Delayed(&waits, None);
    for (kind, ret, full, news, all) in [
        (Kind::Mail, None, false, failed, false),
        (Kind::Mail, None, true, failed, true),
        (Kind::Mail, Some(Ret::Full), false, failed, true),
        (Kind::Mail, Some(Ret::Headers), true, failed, false),
        (Kind::Mail, Some(Ret::Full), true, delayed, false),
        (Kind::Report, None, false, failed, true),
    ] {
        (original.kind, original.ret) = (kind, ret);
        let mut house = house(true);
        house.bounce.full = full;
        let entries = [Entry { rcpt: &original.rcpts[0], news }];
        assert_eq!(house.returns_all(&original, &entries), all, "{kind:?} {ret:?} {news:?}");
    }
    // The report of what was too large was too large itself, and so was the postmaster's copy.
    for (words, status) in [
        ("552 too big", None),
        ("554 5.3.4 too big", Some(EnhancedStatus(5, 3, 4))),
        ("550 5.2.3 too long", Some(EnhancedStatus(5, 2, 3))),
    ] {
        let cause = Cause { status, ..Cause::new(Scope::Message, Stage::EndOfData, words) };
        for kind in [Kind::Mail, Kind::Report] {
            (original.kind, original.ret) = (kind, Some(Ret::Full));
            let entries = [Entry { rcpt: &original.rcpts[0], news: News::Failed(&cause) }];
            assert!(!house(true).returns_all(&original, &entries), "{words}");
        }
    }
}

#[test]
fn what_could_not_be_listed_is_taken_back() {
    let now = crate::clock::now();
    let mut desk = Desk::load(|_| None, now, UnixMillis(0));
    let wall = UnixMillis(0);
    let mut list = |line: &str| desk.list(line.to_owned(), now, wall);
    let [(first, _), since] = list("one");
    let [(second, _), again] = list("two");
    assert_eq!(since, again);
    desk.unlist(&first);
    desk.unlist(&since.0);
    let [(third, _), _] = desk.list("three".to_owned(), now, wall);
    assert_eq!(third, first, "no note takes another's place");
    let listed: Vec<_> = desk.digest.listed.iter().map(|(key, line)| (&**key, &**line)).collect();
    assert_eq!(listed, [(&*second, "two"), (&*third, "three")]);
    for _ in 0..MAX_LISTED {
        desk.list("more".to_owned(), now, wall);
    }
    assert_eq!((desk.digest.listed.len(), desk.digest.more), (MAX_LISTED, 2));
    desk.unlist("report/a/more");
    assert_eq!(desk.digest.more, 1);
    // Of nothing no digest is sent.
    let mut desk = Desk::load(|_| None, now, wall);
    let notes = desk.list("one".to_owned(), now, wall);
    notes.iter().for_each(|(key, _)| desk.unlist(key));
    assert_eq!(desk.due(), None);
}
