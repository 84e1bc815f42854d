//! `mailsluice check`: looks the configuration over and starts nothing.

use std::path::Path;
use std::process::ExitCode;

use crate::config::Secrets;
use crate::spool::is_copy_on_write;

pub(super) fn run(path: &Path) -> ExitCode {
    match super::load_all(path, Secrets::Look) {
        Ok(loaded) => {
            let spool = &loaded.config.spool;
            // A folder that cannot be asked is told by the start.
            if is_copy_on_write(&spool.path).unwrap_or(false) {
                let (path, floor) = (spool.path.display(), spool.min_free.saturating_mul(2));
                println!(
                    "spool.path {path}: the file system copies on write (btrfs, zfs), so that to mark mail as \
                     delivered takes space: spool.min_free counts twice there, nothing is accepted below {floor} \
                     free octets"
                );
            }
            let name = path.display();
            match loaded.warnings.len() {
                0 => println!("{name}: no problems found"),
                1 => println!("{name}: no problems, one warning"),
                n => println!("{name}: no problems, {n} warnings"),
            }
            ExitCode::SUCCESS
        }
        Err(code) => code,
    }
}
