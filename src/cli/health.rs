//! `mailsluice health`: asks the running gateway, so that an image without a shell has a health check.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use crate::config::Secrets;

const TIMEOUT: Duration = Duration::from_secs(5);
/// More than `/readyz` ever answers.
const MAX_ANSWER: u64 = 16 * 1024;

pub(super) fn run(path: &Path) -> ExitCode {
    let config = match super::load(path, Secrets::Leave) {
        Ok(config) => config,
        Err(code) => return code,
    };
    match ask(config.admin.bind) {
        Ok((ready, words)) => {
            print!("{words}");
            if ready { ExitCode::SUCCESS } else { super::EX_UNAVAILABLE.into() }
        }
        Err(error) => {
            eprintln!(
                "no answer from http://{}/readyz: {error}; is `mailsluice run` running?",
                config.admin.bind
            );
            super::EX_UNAVAILABLE.into()
        }
    }
}

/// One HTTP/1.0 request: whether the status is 200, and the body.
fn ask(admin: SocketAddr) -> io::Result<(bool, String)> {
    let mut stream = TcpStream::connect_timeout(&admin, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(format!("GET /readyz HTTP/1.0\r\nHost: {admin}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let ready = head.split(' ').nth(1) == Some("200");
    Ok((ready, body.to_owned()))
}
