//! `mailsluice queue`: the queue of the running gateway.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use hyper::Method;
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::daemon::{self, Daemon, Place, Stop, encoded, number, printable, text};
use super::spool::{ascii, parse_id, several, shown};
use crate::admin::filter::Age;
use crate::envelope::SpoolId;

/// Messages that are asked for at once.
const PAGE: usize = 500;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "The daemon must run: while it is down these commands end with 69, and `mailsluice spool` looks at the \
queue. Exit codes: 0 all right; 64 wrong usage; 66 no such message; 69 no answer from the gateway, or a message is in \
no state for it; 71 the system refused; 73 a file exists already, or cannot be written; 75 a message is being sent now, \
try again; 78 the configuration is wrong."
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
        limit: Option<usize>,
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

/// Which messages; all of what is said must hold.
#[derive(Debug, clap::Args)]
struct Filter {
    /// Only messages in this state; `queued` is any of due, deferred and in-flight
    #[arg(long, value_enum)]
    state: Option<State>,
    /// Only those of this lane (the account that the remote counts); `*` stands for anything, here and below
    #[arg(long, value_name = "PATTERN")]
    lane: Option<String>,
    /// Only those with this sender (reverse path); `<>` is the empty one
    #[arg(long, value_name = "PATTERN")]
    sender: Option<String>,
    /// Only those with such a recipient that is not delivered to
    #[arg(long, value_name = "PATTERN")]
    recipient: Option<String>,
    /// Only those accepted so long ago: 90s, 5m, 2h, 3d
    #[arg(long, value_name = "AGE", value_parser = parse_age)]
    older_than: Option<String>,
}

fn parse_age(text: &str) -> Result<String, String> {
    match Age::parse(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err("a length of time is written like 90s, 5m, 2h or 3d".to_owned()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum State {
    Queued,
    Due,
    Deferred,
    InFlight,
    InDoubt,
    Held,
    Failed,
}

impl State {
    fn label(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Due => "due",
            Self::Deferred => "deferred",
            Self::InFlight => "in_flight",
            Self::InDoubt => "in_doubt",
            Self::Held => "held",
            Self::Failed => "failed",
        }
    }
}

impl Filter {
    /// As the API names them.
    fn parts(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let parts = [
            ("state", self.state.map(State::label)),
            ("lane", self.lane.as_deref()),
            ("sender", self.sender.as_deref()),
            ("recipient", self.recipient.as_deref()),
            ("older_than", self.older_than.as_deref()),
        ];
        parts.into_iter().filter_map(|(name, value)| Some((name, value?)))
    }

    fn query(&self) -> String {
        self.parts().fold(String::new(), |mut query, (name, value)| {
            write!(query, "{name}={}&", encoded(value)).unwrap_or_default();
            query
        })
    }
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
                list(&Daemon::of(place)?, filter, *limit, *json, &mut out).await
            }
            Command::Show { id, json, place } => {
                show(&Daemon::of(place)?, *id, *json, &mut out).await
            }
            Command::Retry(change) => carry_out("retry", change, &mut out).await,
            Command::Hold(change) => carry_out("hold", change, &mut out).await,
            Command::Release(change) => carry_out("release", change, &mut out).await,
            Command::Delete { change, yes } => {
                let is_bulk =
                    change.all || change.ids.len() > 1 || change.filter.parts().count() > 0;
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
    limit: Option<usize>,
    json: bool,
    out: &mut impl Write,
) -> Result<u8, Stop> {
    let mut left = limit.unwrap_or(usize::MAX);
    let mut after = String::new();
    let mut is_first = true;
    while left > 0 {
        let page = left.min(PAGE);
        let path = format!("/api/v1/queue?{}limit={page}{after}", filter.query());
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
    Ok(0)
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
        line.push_str(&printable(error));
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
        writeln!(line, "    {}", printable(last)).unwrap_or_default();
    }
    line
}

async fn show(daemon: &Daemon, id: SpoolId, json: bool, out: &mut impl Write) -> Result<u8, Stop> {
    let answer: Value = daemon.json(Method::GET, &format!("/api/v1/queue/{id}"), None).await?;
    match json {
        true => writeln!(out, "{}", ascii(serde_json::to_string_pretty(&answer)))?,
        false => out.write_all(story(&answer).as_bytes())?,
    }
    Ok(0)
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
    say(
        "accepted",
        format!(
            "{} ({} ago) from {}, which called itself {}",
            printable(text(message, "accepted")),
            daemon::age(number(message, "age_seconds")),
            shown(text(message, "client")),
            shown(text(message, "helo")),
        ),
    );
    say("from", format!("<{}>", shown(text(message, "from"))));
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
    let filter: serde_json::Map<String, Value> =
        change.filter.parts().map(|(name, value)| (name.to_owned(), Value::from(value))).collect();
    if !by_ids && filter.is_empty() && !change.all {
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
        let mut body = json!({ "filter": filter, "all": change.all, "limit": PAGE });
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
    Ok(tally.code(by_ids))
}

/// How many came to what.
#[derive(Debug, Default)]
struct Tally {
    done: usize,
    not_found: usize,
    busy: usize,
    not_now: usize,
    error: usize,
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
        let results = answer.get("results").and_then(Value::as_array).map(Vec::as_slice);
        for result in results.unwrap_or_default() {
            let (count, is_told) = match text(result, "result") {
                "done" => (&mut self.done, false),
                "not_found" => (&mut self.not_found, by_ids),
                "busy" => (&mut self.busy, true),
                // A filter takes such messages too.
                "not_now" => (&mut self.not_now, by_ids),
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
        let Self { done, not_found, busy, not_now, error } = self;
        let mut words = format!("{} done", several(*done, "message"));
        for (n, what) in [
            (not_found, "not found"),
            (busy, "being sent now"),
            (not_now, "left as they are"),
            (error, "failed"),
        ] {
            if *n > 0 {
                write!(words, ", {n} {what}").unwrap_or_default();
            }
        }
        words
    }

    fn code(&self, by_ids: bool) -> u8 {
        match self {
            Self { error: 1.., .. } => super::EX_OSERR,
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
        check(&["done", "error", "not_found"], true, 71);
    }
}
