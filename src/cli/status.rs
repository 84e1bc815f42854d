//! `mailsluice status`: the running gateway on one screen.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;

use hyper::Method;
use serde_json::Value;

use super::daemon::{self, Daemon, Place, age, cut, number, printable, size, text};
use super::spool::{ascii, shown};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

pub(super) fn run(args: &Args) -> ExitCode {
    daemon::run(async {
        let daemon = Daemon::of(&args.place)?;
        let status: Value = daemon.json(Method::GET, "/api/v1/status", None).await?;
        let text = match args.json {
            true => format!("{}\n", ascii(serde_json::to_string_pretty(&status))),
            false => screen(&status),
        };
        io::stdout().write_all(text.as_bytes())?;
        Ok(0)
    })
}

fn screen(status: &Value) -> String {
    let null = Value::Null;
    let part = |name: &str| status.get(name).unwrap_or(&null);
    let (provider, queue, spool) = (part("provider"), part("queue"), part("spool"));
    let mut screen = String::new();
    let mut say = |name: &str, words: String| {
        writeln!(screen, "{name:<10} {words}").unwrap_or_default();
    };
    say(
        "mailsluice",
        format!(
            "{}, up {} (since {})",
            printable(text(status, "version")),
            age(number(status, "uptime_seconds")),
            printable(text(status, "started"))
        ),
    );
    let server = provider.get("server").and_then(Value::as_str);
    let server = server.map(|server| format!(" {}", shown(server))).unwrap_or_default();
    say(
        "provider",
        match text(provider, "state") {
            "none" => "none".to_owned(),
            state => format!("{}{server}, {}", printable(text(provider, "kind")), printable(state)),
        },
    );
    if let Some(why) = provider.get("why").and_then(Value::as_str) {
        let since = printable(text(provider, "closed_since"));
        let probe = printable(text(provider, "next_probe"));
        say("", format!("closed since {since}: {}", cut(&printable(why))));
        say("", format!("next probe at {probe}; nothing is lost or bounced meanwhile"));
    }
    say(
        "since then",
        format!(
            "{} messages accepted; {} recipients delivered, {} failed",
            number(status, "accepted"),
            number(status, "delivered"),
            number(status, "failed")
        ),
    );
    say(
        "queue",
        format!(
            "{} due, {} deferred, {} in flight, {} held, {} failed; {}",
            number(queue, "due"),
            number(queue, "deferred"),
            number(queue, "in_flight"),
            number(queue, "held"),
            number(queue, "failed"),
            size(number(queue, "bytes"))
        ),
    );
    if number(queue, "in_doubt") > 0 {
        let n = number(queue, "in_doubt");
        say("", format!("{n} in doubt: `mailsluice queue list --state in-doubt` shows which"));
    }
    if let Some(oldest) = queue.get("oldest").and_then(Value::as_str) {
        let since = age(number(queue, "oldest_age_seconds"));
        say("", format!("the oldest waits since {} ({since})", printable(oldest)));
    }
    let (used, free) = (number(spool, "used_bytes"), number(spool, "free_bytes"));
    say("spool", format!("{} used, {} free", size(used), size(free)));
    if let Some(trouble) = spool.get("trouble").and_then(Value::as_str) {
        say("", format!("takes no mail: {}", printable(trouble)));
    }
    for listener in part("listeners").as_array().map(Vec::as_slice).unwrap_or_default() {
        say("listens", shown(listener.as_str().unwrap_or_default()));
    }
    screen
}
