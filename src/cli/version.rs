//! `mailsluice version`.

use std::process::ExitCode;

pub(super) fn run() -> ExitCode {
    println!("mailsluice {}", env!("CARGO_PKG_VERSION"));
    ExitCode::SUCCESS
}
