//! What the commands that talk to the running gateway have in common: HTTP/1 over its admin socket.

use std::fmt::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, header};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use super::Stop;
use crate::config::Secrets;

/// The daemon answers each request in a few seconds, and sends something at least as often.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Octets of an answer that is read whole: a page of a thousand messages, or one with very many recipients.
const LARGEST: usize = 256 * 1024 * 1024;

#[derive(Debug, clap::Args)]
pub(super) struct Place {
    #[command(flatten)]
    config: super::ConfigArgs,
    /// The admin socket; without it, that of the configuration
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// What a remote says is cut after so many characters where it is one of many lines.
const SHOWN: usize = 300;

/// The beginning of words that may be very long, for a table or a screen.
pub(super) fn cut(words: &str) -> String {
    let mut beginning: String = words.chars().take(SHOWN).collect();
    if beginning.len() < words.len() {
        beginning.push_str("...");
    }
    beginning
}

/// Runs a command to its end, and says what is to be said of that.
pub(super) fn run(command: impl Future<Output = Result<u8, Stop>>) -> ExitCode {
    let runtime = match super::runtime() {
        Ok(runtime) => runtime,
        Err(code) => return code,
    };
    super::ended(runtime.block_on(command))
}

/// The running gateway.
pub(super) struct Daemon {
    socket: PathBuf,
}

impl Daemon {
    pub(super) fn of(place: &Place) -> Result<Self, Stop> {
        let socket = match &place.socket {
            Some(socket) => socket.clone(),
            None => {
                let config = super::load(&place.config.config, Secrets::Leave);
                config.map_err(Stop::Told)?.admin.socket
            }
        };
        Ok(Self { socket })
    }

    /// Asks, and has the answer read by `read`. An answer that is no success ends the command.
    pub(super) async fn ask<T>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        read: impl AsyncFnOnce(&Self, Response<Incoming>) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        let stream = in_time(UnixStream::connect(&self.socket)).await;
        let stream = stream.map_err(|error| self.silent(&error))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.silent(&error))?;
        let body = body.map(ToString::to_string).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| Stop::Said(super::EX_USAGE, error.to_string()))?;
        let work = async {
            let response = in_time(sender.send_request(request)).await;
            let response = response.map_err(|error| self.silent(&error))?;
            match response.status().is_success() {
                true => read(self, response).await,
                false => Err(self.refused(response).await),
            }
        };
        // What the connection came to is told by the request and its answer.
        let driven = async {
            drop(connection.await);
            std::future::pending().await
        };
        // Whichever is dropped, the command ends with it.
        tokio::select! {
            done = work => done,
            done = driven => done,
        }
    }

    pub(super) async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<T, Stop> {
        let whole = self.ask(method, path, body, Self::whole).await?;
        serde_json::from_slice(&whole).map_err(|error| self.silent(&error))
    }

    async fn whole(&self, response: Response<Incoming>) -> Result<Vec<u8>, Stop> {
        let mut body = response.into_body();
        let mut whole = Vec::new();
        while let Some(piece) = self.piece(&mut body).await? {
            whole.extend_from_slice(&piece);
            if whole.len() > LARGEST {
                return Err(self.silent("an answer without end"));
            }
        }
        Ok(whole)
    }

    /// The next piece of an answer; none at its end.
    pub(super) async fn piece(&self, body: &mut Incoming) -> Result<Option<Bytes>, Stop> {
        loop {
            let next = async { body.frame().await.transpose() };
            match in_time(next).await.map_err(|error| self.cut(&error))? {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(piece) = frame.into_data() {
                        return Ok(Some(piece));
                    }
                }
            }
        }
    }

    async fn refused(&self, response: Response<Incoming>) -> Stop {
        let status = response.status().as_u16();
        let body = match self.whole(response).await {
            Ok(body) => body,
            Err(stop) => return stop,
        };
        let said = serde_json::from_slice::<Value>(&body).ok();
        let said = said.as_ref().and_then(|said| said.get("error")?.as_str().map(printable));
        let code = match status {
            404 => super::EX_NOINPUT,
            400..=499 => super::EX_USAGE,
            503 => super::EX_UNAVAILABLE,
            _ => super::EX_OSERR,
        };
        Stop::Said(code, said.unwrap_or_else(|| format!("the gateway answered with {status}")))
    }

    fn silent(&self, error: impl fmt::Display) -> Stop {
        let words = format!(
            "no answer from {}: {error}; is `mailsluice run` running, and as this user? While it is down, \
             `mailsluice spool ls` shows what is in the spool",
            self.socket.display()
        );
        Stop::Said(super::EX_UNAVAILABLE, words)
    }

    /// The answer ended before its end.
    fn cut(&self, error: impl fmt::Display) -> Stop {
        let words = format!("the answer from {} was cut off: {error}", self.socket.display());
        Stop::Said(super::EX_UNAVAILABLE, words)
    }
}

async fn in_time<T, E: fmt::Display>(
    wait: impl Future<Output = Result<T, E>>,
) -> Result<T, String> {
    match tokio::time::timeout(TIMEOUT, wait).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_elapsed) => Err(format!("nothing came within {} s", TIMEOUT.as_secs())),
    }
}

/// One part of a query string.
pub(super) fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                out.push(char::from(byte));
            }
            _ => write!(out, "%{byte:02X}").unwrap_or_default(),
        }
    }
    out
}

/// Words that the gateway has escaped already. Whatever else it might be, no control character reaches the terminal.
pub(super) fn printable(text: &str) -> String {
    let is_fit = |c: &char| !c.is_control();
    text.chars().map(|c| if is_fit(&c) { c } else { '?' }).collect()
}

/// A length of time for people: its two largest units.
pub(super) fn age(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m{}s", seconds % 60),
        (0, hours, minutes) => format!("{hours}h{minutes}m"),
        (days, hours, _) => format!("{days}d{hours}h"),
    }
}

/// A number of octets for people.
pub(super) fn size(octets: u64) -> String {
    let units =
        [(1_000_000_000_000, "TB"), (1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")];
    match units.iter().find(|(unit, _)| octets >= *unit) {
        None => format!("{octets} B"),
        Some((unit, name)) => format!("{}.{} {name}", octets / unit, octets % unit * 10 / unit),
    }
}

/// A member of an answer as text for people, from outside: escaped.
pub(super) fn text<'a>(answer: &'a Value, name: &str) -> &'a str {
    answer.get(name).and_then(Value::as_str).unwrap_or_default()
}

pub(super) fn number(answer: &Value, name: &str) -> u64 {
    answer.get(name).and_then(Value::as_u64).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_for_people() {
        let ages = [0, 59, 60, 3_599, 3_600, 86_399, 86_400, 864_000].map(age);
        assert_eq!(ages, ["0s", "59s", "1m0s", "59m59s", "1h0m", "23h59m", "1d0h", "10d0h"]);
        let sizes = [0, 999, 1_000, 1_999_999, 34_000_000, 5_000_000_000].map(size);
        assert_eq!(sizes, ["0 B", "999 B", "1.0 kB", "1.9 MB", "34.0 MB", "5.0 GB"]);
    }

    #[test]
    fn a_query_is_encoded_and_a_terminal_safe() {
        assert_eq!(encoded("*@ex ample.com&ü"), "%2A%40ex%20ample.com%26%C3%BC");
        assert_eq!(printable("a\x1b[2Jb\u{9b}\n\\x0d"), "a?[2Jb??\\x0d");
    }
}
