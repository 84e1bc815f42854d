//! `mailsluice check`: looks the configuration over and starts nothing.

use std::path::Path;
use std::process::ExitCode;

use crate::config::Secrets;
use crate::spool::is_copy_on_write;

pub(super) fn run(path: &Path) -> ExitCode {
    match super::load(path, Secrets::Look) {
        Ok(config) => {
            let spool = &config.spool;
            // A folder that cannot be asked is told by the start.
            if is_copy_on_write(&spool.path).unwrap_or(false) {
                let (path, floor) = (spool.path.display(), spool.min_free.saturating_mul(2));
                println!(
                    "spool.path {path}: the file system copies on write (btrfs, zfs), so that to mark mail as \
                     delivered takes space: spool.min_free counts twice there, nothing is accepted below {floor} \
                     free octets"
                );
            }
            println!("{}: no problems found", path.display());
            ExitCode::SUCCESS
        }
        Err(code) => code,
    }
}
