//! `mailsluice queue`: the queue of the running gateway.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use hyper::Method;
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::Stop;
use super::daemon::{self, Daemon, Place, cut, encoded, number, printable, text};
use super::spool::{ascii, parse_id, several, shown};
use crate::admin::filter::Filter;
use crate::envelope::SpoolId;

/// Messages that are asked for at once.
const PAGE: usize = 500;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "The daemon must run: while it is down these commands end with 69, and `mailsluice spool` looks at the \
queue. Exit codes: 0 all right; 64 wrong usage; 65 the message is damaged; 66 no such message; 69 no answer from the \
gateway, or a message is in no state for it; 71 the system refused; 73 a file exists already, or cannot be written; 75 a \
message is being sent now, try again; 78 the configuration is wrong."
)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List messages: id, state, age, size, attempts, sender, recipients, what was last said
    List {
        #[command(flatten)]
        filter: Filter,
        /// No more than so many
        #[arg(long, value_name = "N")]
        limit: Option<NonZeroUsize>,
        /// Print one JSON object a line
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Tell the story of a message: whence, for whom, what was said, what comes next
    Show {
        /// The message
        #[arg(value_parser = parse_id)]
        id: SpoolId,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Try messages now; what is held is released, what has failed is queued again
    Retry(Change),
    /// Hold messages: they wait until they are released
    Hold(Change),
    /// Release messages that are held: they are due at once
    Release(Change),
    /// Remove messages for good, whatever their state
    Delete {
        #[command(flatten)]
        change: Change,
        /// More than one may go
        #[arg(long)]
        yes: bool,
    },
    /// Write a message, byte for byte as it lies in the spool, to standard output or a new file
    Export {
        /// The message
        #[arg(value_parser = parse_id)]
        id: SpoolId,
        /// The file, made with mode 0600; one that exists is not overwritten
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
        #[command(flatten)]
        place: Place,
    },
}

/// What a filter says, as the API has it.
fn parts(filter: &Filter) -> serde_json::Map<String, Value> {
    match serde_json::to_value(filter) {
        Ok(Value::Object(parts)) => parts,
        Ok(_) | Err(_) => serde_json::Map::new(),
    }
}

fn query(filter: &Filter) -> String {
    parts(filter).iter().fold(String::new(), |mut query, (name, value)| {
        let value = encoded(value.as_str().unwrap_or_default());
        write!(query, "{name}={value}&").unwrap_or_default();
        query
    })
}

#[derive(Debug, clap::Args)]
struct Change {
    /// The messages
    #[arg(value_parser = parse_id, conflicts_with_all = ["state", "lane", "sender", "recipient", "older_than", "all"])]
    ids: Vec<SpoolId>,
    #[command(flatten)]
    filter: Filter,
    /// Every message
    #[arg(long)]
    all: bool,
    /// Print the answers as JSON, one object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

pub(super) fn run(args: &Args) -> ExitCode {
    daemon::run(async {
        let mut out = io::stdout();
        match &args.command {
            Command::List { filter, limit, json, place } => {
                let limit = limit.map_or(usize::MAX, NonZeroUsize::get);
                list(&Daemon::of(place)?, filter, limit, *json, &mut out).await
            }
            Command::Show { id, json, place } => {
                show(&Daemon::of(place)?, *id, *json, &mut out).await
            }
            Command::Retry(change) => carry_out("retry", change, &mut out).await,
            Command::Hold(change) => carry_out("hold", change, &mut out).await,
            Command::Release(change) => carry_out("release", change, &mut out).await,
            Command::Delete { change, yes } => {
                let is_bulk = change.all || change.ids.len() > 1 || !change.filter.is_empty();
                if is_bulk && !yes {
                    let words = "more than one message may go, and none comes back: say --yes. `mailsluice queue list` \
                                 with the same filter shows which";
                    return Err(Stop::Said(super::EX_USAGE, words.to_owned()));
                }
                carry_out("delete", change, &mut out).await
            }
            Command::Export { id, to, place } => {
                export(&Daemon::of(place)?, *id, to.as_deref(), &mut out).await
            }
        }
    })
}

async fn list(
    daemon: &Daemon,
    filter: &Filter,
    limit: usize,
    json: bool,
    out: &mut impl Write,
) -> Result<u8, Stop> {
    let mut left = limit;
    let mut after = String::new();
    let mut unreadable = 0;
    let mut is_first = true;
    while left > 0 {
        let page = left.min(PAGE);
        let path = format!("/api/v1/queue?{}limit={page}{after}", query(filter));
        let answer: Value = daemon.json(Method::GET, &path, None).await?;
        let messages = answer.get("messages").and_then(Value::as_array);
        let messages = messages.map(Vec::as_slice).unwrap_or_default();
        let mut lines = String::new();
        for message in messages {
            if json {
                lines.push_str(&ascii(serde_json::to_string(message)));
                lines.push('\n');
            } else {
                if is_first {
                    lines.push_str(HEADER);
                }
                is_first = false;
                lines.push_str(&line(message));
            }
        }
        out.write_all(lines.as_bytes())?;
        unreadable += number(&answer, "unreadable");
        left = left.saturating_sub(messages.len());
        match answer.get("next").and_then(Value::as_str) {
            Some(next) => after = format!("&after={}", encoded(next)),
            None => break,
        }
    }
    if is_first && !json {
        writeln!(out, "no messages")?;
    }
    out.flush()?;
    tell_unreadable(unreadable);
    Ok(0)
}

/// Whether these fit the filter nobody knows.
fn tell_unreadable(unreadable: u64) {
    if unreadable > 0 {
        eprintln!(
            "{unreadable} more cannot be read, so the filter does not know them: `mailsluice queue list` without \
             --sender, --recipient and --state in-doubt shows which"
        );
    }
}

const HEADER: &str =
    "ID                                    STATE           AGE      SIZE  TRIES  FROM -> TO\n";

/// A message in a table, and what was last said below it.
fn line(message: &Value) -> String {
    let doubt = if message.get("in_doubt") == Some(&Value::Bool(true)) { "?" } else { "" };
    let mut line = format!(
        "{:<36}  {:<11}  {:>6}  {:>8}  {:>5}  ",
        printable(text(message, "id")),
        format!("{}{doubt}", printable(text(message, "state"))),
        daemon::age(number(message, "age_seconds")),
        daemon::size(number(message, "size_bytes")),
        number(message, "attempts"),
    );
    if let Some(error) = message.get("error").and_then(Value::as_str) {
        line.push_str(&cut(&printable(error)));
    } else {
        let to = message.get("to").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let names: Vec<_> =
            to.iter().filter_map(Value::as_str).map(|to| format!("<{}>", shown(to))).collect();
        write!(line, "<{}> -> {}", shown(text(message, "from")), names.join(", "))
            .unwrap_or_default();
        let more = number(message, "recipients").saturating_sub(to.len() as u64);
        if more > 0 {
            write!(line, " and {more} more").unwrap_or_default();
        }
    }
    line.push('\n');
    if let Some(last) = message.get("last").and_then(Value::as_str) {
        writeln!(line, "    {}", cut(&printable(last))).unwrap_or_default();
    }
    line
}

async fn show(daemon: &Daemon, id: SpoolId, json: bool, out: &mut impl Write) -> Result<u8, Stop> {
    let answer: Value = daemon.json(Method::GET, &format!("/api/v1/queue/{id}"), None).await?;
    match json {
        true => writeln!(out, "{}", ascii(serde_json::to_string_pretty(&answer)))?,
        false => out.write_all(story(&answer).as_bytes())?,
    }
    let is_damaged = answer.get("error").is_some();
    Ok(if is_damaged { super::EX_DATAERR } else { 0 })
}

fn story(message: &Value) -> String {
    let mut story = String::new();
    let mut say = |name: &str, words: String| {
        writeln!(story, "{name:<10} {words}").unwrap_or_default();
    };
    let is_doubtful = |it: &Value| it.get("in_doubt") == Some(&Value::Bool(true));
    say("message", printable(text(message, "id")));
    let doubt = if is_doubtful(message) { ", in doubt: it may have been taken" } else { "" };
    say("state", format!("{}{doubt}", printable(text(message, "state"))));
    let said = |name| message.get(name).and_then(Value::as_str);
    let client = match (said("client"), said("helo")) {
        (Some(client), Some(helo)) => {
            format!(" from {}, which called itself {}", shown(client), shown(helo))
        }
        (_, _) => String::new(),
    };
    let accepted = printable(text(message, "accepted"));
    let age = daemon::age(number(message, "age_seconds"));
    say("accepted", format!("{accepted} ({age} ago){client}"));
    if let Some(from) = said("from") {
        say("from", format!("<{}>", shown(from)));
    }
    if let Some(author) = message.get("author").and_then(Value::as_str) {
        say("author", shown(author));
    }
    say("size", format!("{} octets", number(message, "size_bytes")));
    say("lane", shown(text(message, "lane")));
    say("attempts", number(message, "attempts").to_string());
    if let Some(first) = message.get("first_deferral").and_then(Value::as_str) {
        say("deferred", format!("first at {}", printable(first)));
    }
    let rcpts = message.get("rcpts").and_then(Value::as_array).map(Vec::as_slice);
    for rcpt in rcpts.unwrap_or_default() {
        let doubt = if is_doubtful(rcpt) { ", in doubt" } else { "" };
        let words = rcpt.get("words").and_then(Value::as_str);
        let words = words.map(|words| format!(": {}", printable(words))).unwrap_or_default();
        let stage = rcpt.get("stage").and_then(Value::as_str);
        let stage = stage.map(|stage| format!(" ({})", printable(stage))).unwrap_or_default();
        let state = printable(text(rcpt, "state"));
        say("to", format!("<{}> {state}{doubt}{words}{stage}", shown(text(rcpt, "to"))));
    }
    say("next", printable(text(message, "next")));
    story
}

async fn carry_out(verb: &str, change: &Change, out: &mut impl Write) -> Result<u8, Stop> {
    let by_ids = !change.ids.is_empty();
    if !by_ids && change.filter.is_empty() && !change.all {
        let words = "name messages by id, by a filter such as --state, or all of them by --all";
        return Err(Stop::Said(super::EX_USAGE, words.to_owned()));
    }
    let daemon = Daemon::of(&change.place)?;
    let (method, path) = match verb {
        "delete" => (Method::DELETE, "/api/v1/queue".to_owned()),
        verb => (Method::POST, format!("/api/v1/queue/{verb}")),
    };
    let mut tally = Tally::default();
    if by_ids {
        for ids in change.ids.chunks(PAGE) {
            let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
            let answer = daemon.json(method.clone(), &path, Some(&json!({ "ids": ids }))).await?;
            tally.tell(&answer, by_ids, change.json, out)?;
        }
    } else {
        let mut body = json!({ "filter": change.filter, "all": change.all, "limit": PAGE });
        loop {
            let answer: Value = daemon.json(method.clone(), &path, Some(&body)).await?;
            tally.tell(&answer, by_ids, change.json, out)?;
            match answer.get("next") {
                Some(next @ Value::String(_)) => body["after"] = next.clone(),
                _ => break,
            }
        }
    }
    if !change.json {
        writeln!(out, "{verb}: {}", tally.words())?;
    }
    tell_unreadable(tally.unreadable);
    Ok(tally.code(by_ids))
}

/// How many came to what.
#[derive(Debug, Default)]
struct Tally {
    done: usize,
    not_found: usize,
    busy: usize,
    not_now: usize,
    in_doubt: usize,
    damaged: usize,
    error: usize,
    /// Why what was done waits.
    waits: Option<String>,
    /// Those that the filter could not judge.
    unreadable: u64,
}

impl Tally {
    /// Counts, and says what was not done.
    fn tell(
        &mut self,
        answer: &Value,
        by_ids: bool,
        json: bool,
        out: &mut impl Write,
    ) -> io::Result<()> {
        if let Some(waits) = answer.get("waits").and_then(Value::as_str) {
            self.waits = Some(cut(&printable(waits)));
        }
        self.unreadable += number(answer, "unreadable");
        let results = answer.get("results").and_then(Value::as_array).map(Vec::as_slice);
        for result in results.unwrap_or_default() {
            let (count, is_told) = match text(result, "result") {
                "done" => (&mut self.done, false),
                "not_found" => (&mut self.not_found, by_ids),
                "busy" => (&mut self.busy, true),
                // A filter takes such messages too.
                "not_now" => (&mut self.not_now, by_ids),
                // Their number is told.
                "in_doubt" => (&mut self.in_doubt, false),
                "damaged" => (&mut self.damaged, true),
                _ => (&mut self.error, true),
            };
            *count += 1;
            if json {
                writeln!(out, "{}", ascii(serde_json::to_string(result)))?;
            } else if is_told {
                let (id, why) = (printable(text(result, "id")), printable(text(result, "why")));
                eprintln!("{id}: {why}");
            }
        }
        Ok(())
    }

    fn words(&self) -> String {
        let Self { done, not_found, busy, not_now, in_doubt, damaged, error, waits, .. } = self;
        let mut words = format!("{} done", several(*done, "message"));
        for (n, what) in [
            (not_found, "not found"),
            (busy, "being sent now"),
            (not_now, "left as they are"),
            (damaged, "damaged"),
            (error, "failed"),
            (
                in_doubt,
                "left alone because they may have been taken already (look at them, then name their ids, or --state in-doubt)",
            ),
        ] {
            if *n > 0 {
                write!(words, ", {n} {what}").unwrap_or_default();
            }
        }
        if let Some(waits) = waits {
            write!(words, "\nwhat is due waits: {waits}").unwrap_or_default();
        }
        words
    }

    fn code(&self, by_ids: bool) -> u8 {
        match self {
            Self { error: 1.., .. } => super::EX_OSERR,
            Self { damaged: 1.., .. } => super::EX_DATAERR,
            Self { not_found: 1.., .. } if by_ids => super::EX_NOINPUT,
            Self { not_now: 1.., .. } if by_ids => super::EX_UNAVAILABLE,
            Self { busy: 1.., .. } => super::EX_TEMPFAIL,
            Self { .. } => 0,
        }
    }
}

async fn export(
    daemon: &Daemon,
    id: SpoolId,
    to: Option<&Path>,
    out: &mut impl Write,
) -> Result<u8, Stop> {
    let path = format!("/api/v1/queue/{id}/content");
    let Some(file) = to else {
        let write = async |daemon: &Daemon, response: hyper::Response<Incoming>| {
            copy(daemon, response.into_body(), out, Stop::Output).await
        };
        return daemon.ask(Method::GET, &path, None, write).await;
    };
    let write = async |daemon: &Daemon, response: hyper::Response<Incoming>| {
        let cannot = |error: io::Error| {
            Stop::Said(super::EX_CANTCREAT, format!("writing {}: {error}", file.display()))
        };
        // Only now, so that a message that is not there leaves no file.
        let create = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
        let mut made = create.map_err(cannot)?;
        let copied = match copy(daemon, response.into_body(), &mut made, cannot).await {
            Ok(_) => made.sync_all().map_err(cannot),
            Err(stop) => Err(stop),
        };
        if let Err(stop) = copied {
            // The error that is told is the first.
            drop(std::fs::remove_file(file));
            return Err(stop);
        }
        Ok(0)
    };
    daemon.ask(Method::GET, &path, None, write).await
}

async fn copy(
    daemon: &Daemon,
    mut body: Incoming,
    out: &mut impl Write,
    failed: impl Fn(io::Error) -> Stop,
) -> Result<u8, Stop> {
    while let Some(piece) = daemon.piece(&mut body).await? {
        out.write_all(&piece).map_err(&failed)?;
    }
    out.flush().map_err(&failed)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_shows_hostile_addresses_and_words_harmlessly() {
        let message = json!({
            "id": "0193", "state": "deferred", "in_doubt": true, "age_seconds": 7_500,
            "size_bytes": 12_345, "attempts": 3, "from": "\u{1b}[2J@x", "recipients": 5,
            "to": ["a\nb@y", "c@z"], "last": "450 \u{7} \\x0d later (rcpt)",
        });
        let line = line(&message);
        assert!(
            line.ends_with(
                "  deferred?      2h5m   12.3 kB      3  <\\x1b[2J@x> -> <a\\x0ab@y>, <c@z> and 3 more\n    \
                 450 ? \\x0d later (rcpt)\n"
            ),
            "{line}"
        );
    }

    #[test]
    fn what_a_verb_came_to_decides_the_exit_code() {
        let check = |results: &[&str], by_ids, code| {
            let results: Vec<_> = results.iter().map(|it| json!({ "result": it })).collect();
            let mut tally = Tally::default();
            tally.tell(&json!({ "results": results }), by_ids, true, &mut Vec::new()).unwrap();
            assert_eq!(tally.code(by_ids), code, "{results:?}");
        };
        check(&["done", "done"], true, 0);
        check(&[], false, 0);
        check(&["done", "busy"], true, 75);
        check(&["done", "busy"], false, 75);
        check(&["done", "not_now", "busy"], true, 69);
        check(&["done", "not_now", "not_found"], false, 0);
        check(&["not_found", "not_now"], true, 66);
        check(&["done", "error", "not_found", "damaged"], true, 71);
        check(&["done", "damaged", "not_found"], true, 65);
        check(&["done", "in_doubt"], false, 0);
    }

    /// A remote that answered with a hundred lines filled the screen with one message.
    #[test]
    fn very_long_words_are_cut_in_a_table() {
        let long = "450 later ".repeat(10_000);
        let line = line(&json!({ "id": "0193", "state": "deferred", "last": long }));
        assert!(line.len() < 500 && line.ends_with("later ...\n"), "{line}");
    }

    #[test]
    fn a_filter_is_said_to_the_gateway_as_it_was_given() {
        use crate::admin::filter::{Age, State};
        let filter = Filter {
            state: Some(State::InDoubt),
            sender: Some("<>".to_owned()),
            older_than: Age::parse("2h").ok(),
            ..Filter::default()
        };
        let mut parts: Vec<_> = query(&filter).split('&').map(str::to_owned).collect();
        parts.sort();
        assert_eq!(parts, ["", "older_than=7200s", "sender=%3C%3E", "state=in_doubt"]);
    }
}
