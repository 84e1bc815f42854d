//! `mailsluice check`: looks the configuration over and starts nothing.

use std::path::Path;
use std::process::ExitCode;

pub(super) fn run(path: &Path) -> ExitCode {
    match super::load(path) {
        Ok(_) => {
            println!("{}: no problems found", path.display());
            ExitCode::SUCCESS
        }
        Err(code) => code,
    }
}
