//! Secrets: shown to nobody, and forgotten when they go.

use std::env::VarError;
use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

/// Longest secret in a file, in octets.
const MAX: u64 = 64 * 1024;

/// Outside of a unit.
const NO_CREDENTIALS: &str =
    "is not there: the process has no credentials of systemd (LoadCredential= in the unit)";

/// A password or the like. `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Err says what is wrong with it.
    pub fn new(text: String) -> Result<Self, &'static str> {
        let text = Zeroizing::new(text);
        match text.as_str() {
            "" => Err("is empty"),
            text if text.contains(['\0', '\r', '\n']) => Err("has more than one line"),
            _ => Ok(Self(text)),
        }
    }

    /// From a file; the end of its line is not part of it.
    pub(super) fn of_file(path: &Path) -> Result<Self, String> {
        let text = private_text(path)?;
        // Editors on Windows write one.
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let line = text.strip_suffix('\n').unwrap_or(text);
        let line = line.strip_suffix('\r').unwrap_or(line);
        Self::new(line.to_owned()).map_err(str::to_owned)
    }

    /// From an environment variable.
    pub(super) fn of_variable(name: &str) -> Result<Self, String> {
        let text = std::env::var(name).map_err(|error| match error {
            VarError::NotPresent => "has no value: set it for the daemon",
            // Its own words have the value in them.
            VarError::NotUnicode(_) => "is not UTF-8",
        })?;
        Self::new(text).map_err(str::to_owned)
    }

    /// From what systemd hands over (`LoadCredential=` in the unit).
    pub(super) fn of_credential(name: &str) -> Result<Self, String> {
        let folder = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        let folder = folder.ok_or(NO_CREDENTIALS)?;
        match name.contains('/') {
            true => Err("is the name of a credential, without /".to_owned()),
            false => Self::of_file(&folder.join(name)),
        }
    }

    /// Stands for one that whoever only looks has not read.
    pub(super) fn unread() -> Self {
        Self(Zeroizing::default())
    }

    #[cfg(test)]
    pub(crate) fn for_tests(text: &str) -> Self {
        Self::new(text.to_owned()).expect("one line of text")
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The text of a file that is not for everybody.
pub(super) fn private_text(path: &Path) -> Result<Zeroizing<String>, String> {
    let mut text = Zeroizing::new(String::new());
    let unreadable = |error| format!("cannot be read: {error}");
    let file = File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.permissions().mode() & 0o777;
    if mode & 0o007 != 0 {
        return Err(format!("anybody can read or change (mode {mode:04o}): run chmod 600 on it"));
    }
    let len = file.take(MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
    match len as u64 > MAX {
        true => Err("is longer than 64 KiB".to_owned()),
        false => Ok(text),
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}
