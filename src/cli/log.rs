//! `mailsluice log`: the last events of the running gateway.

use std::io::{self, Write};
use std::process::ExitCode;

use hyper::Method;
use serde_json::Value;

use super::Stop;
use super::daemon::{self, Daemon, Place, printable, text};

/// Octets of a line that is waited for.
const LONGEST: usize = 64 * 1024;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Go on with each new event
    #[arg(short, long)]
    follow: bool,
    /// Begin with so many of the last events; a thousand are kept
    #[arg(short, value_name = "N", default_value_t = 20)]
    n: usize,
    /// Print the events as they are, one JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

pub(super) fn run(args: &Args) -> ExitCode {
    daemon::run(async {
        let daemon = Daemon::of(&args.place)?;
        let path = format!("/api/v1/log?n={}&follow={}", args.n, args.follow);
        let read = async |daemon: &Daemon, response: hyper::Response<_>| {
            let mut body = response.into_body();
            let mut lines = Lines::default();
            let mut out = io::stdout();
            while let Some(piece) = daemon.piece(&mut body).await? {
                lines.take(&piece, args.json, &mut out)?;
                out.flush()?;
            }
            Ok::<u8, Stop>(0)
        };
        daemon.ask(Method::GET, &path, None, read).await
    })
}

/// Makes lines of pieces.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn take(&mut self, piece: &[u8], json: bool, out: &mut impl Write) -> io::Result<()> {
        for part in piece.split_inclusive(|octet| *octet == b'\n') {
            self.0.extend_from_slice(part);
            if !part.ends_with(b"\n") {
                self.0.truncate(LONGEST);
                continue;
            }
            let line = std::mem::take(&mut self.0);
            let Ok(event) = serde_json::from_slice::<Value>(&line) else { continue };
            match json {
                true => writeln!(out, "{}", super::spool::ascii(serde_json::to_string(&event)))?,
                false => writeln!(out, "{}", shown(&event))?,
            }
        }
        Ok(())
    }
}

fn shown(event: &Value) -> String {
    let time: String = text(event, "timestamp").chars().take("2026-11-24T06:42:11".len()).collect();
    let level = text(event, "level");
    printable(&format!("{time:<19} {level:<5} {}", text(event, "message")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_made_of_pieces_and_empty_ones_are_not_shown() {
        let (mut lines, mut out) = (Lines::default(), Vec::new());
        for piece in [
            "\n{\"timestamp\":\"2026-11-24T06:42:11.123Z\",\"lev",
            "el\":\"INFO\",",
            "\"message\":\"a\\u001b b\"}\n\n{",
        ] {
            lines.take(piece.as_bytes(), false, &mut out).unwrap();
        }
        assert_eq!(String::from_utf8(out).unwrap(), "2026-11-24T06:42:11 INFO  a? b\n");
    }
}
