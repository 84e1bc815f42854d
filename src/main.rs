//! The `mailsluice` binary: parses arguments, runs, and maps what happened to an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    mailsluice::cli::main()
}
