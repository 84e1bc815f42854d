//! What the disk does without us, and what a process has used.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

/// The median of what was measured in several rounds.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The number after `key` in a file of `/proc`; 0 where there is none.
pub(crate) fn number(path: &str, key: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let value = value.and_then(|value| value.split_whitespace().next()?.parse().ok());
    value.unwrap_or_default()
}

/// Octets written to the disk that `folder` is on since the system started; 0 where it is on none.
fn written(folder: &Path) -> u64 {
    let device = fs::metadata(folder).map_or(0, |folder| folder.dev());
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    // iostats.txt of the kernel: the seventh field, in sectors of 512 octets.
    let stat = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat"));
    let sectors = stat.unwrap_or_default();
    let sectors = sectors.split_whitespace().nth(6).and_then(|sectors| sectors.parse::<u64>().ok());
    sectors.unwrap_or_default() * 512
}

/// What the process has used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    pub(crate) cpu: Duration,
    /// Octets that reached the disk, from whomever, journal of the file system included. Not what `/proc/self/io` calls
    /// written: that counts a large folio of the page cache whole when a part of it changes.
    pub(crate) written: u64,
    /// Octets that we handed to the kernel.
    pub(crate) handed: u64,
    /// Batches of the spool's writer, and their octets: it makes one system call for each. The runtime must have no
    /// I/O driver, for its wake-ups would be counted too.
    pub(crate) batches: u64,
    pub(crate) batched: u64,
}

impl Cost {
    /// `folder` is on the disk.
    pub(crate) fn now(folder: &Path) -> Self {
        let stat = fs::read_to_string("/proc/self/stat").expect("/proc");
        let fields: Vec<&str> =
            stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks: u64 =
            fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum();
        let (mut batches, mut batched) = (0, 0);
        for thread in fs::read_dir("/proc/self/task").expect("/proc").flatten() {
            let of = |name: &str| thread.path().join(name).display().to_string();
            if fs::read_to_string(of("comm")).is_ok_and(|name| name.trim() == "spool-writer") {
                batches += number(&of("io"), "syscw");
                batched += number(&of("io"), "wchar");
            }
        }
        Self {
            // The kernel counts in hundredths of a second, whatever the clock of the machine.
            cpu: Duration::from_millis(ticks * 10),
            written: written(folder),
            handed: number("/proc/self/io", "wchar"),
            batches,
            batched,
        }
    }

    pub(crate) fn since(&self, earlier: &Self) -> Self {
        Self {
            cpu: self.cpu.saturating_sub(earlier.cpu),
            written: self.written - earlier.written,
            handed: self.handed - earlier.handed,
            batches: self.batches - earlier.batches,
            batched: self.batched - earlier.batched,
        }
    }

    pub(crate) fn plus(&self, other: &Self) -> Self {
        Self {
            cpu: self.cpu + other.cpu,
            written: self.written + other.written,
            handed: self.handed + other.handed,
            batches: self.batches + other.batches,
            batched: self.batched + other.batched,
        }
    }
}

/// A file whose blocks were all written once, and that is overwritten from its start to its end, again and again.
pub(crate) struct Floor {
    file: File,
    len: u64,
    at: u64,
}

impl Floor {
    pub(crate) fn prepare(folder: &Path, len: u64) -> Self {
        let path = folder.join("floor");
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.expect("a file");
        let chunk = vec![0xa5; 1024 * 1024];
        for at in (0..len).step_by(chunk.len()) {
            file.write_all_at(&chunk, at).expect("space");
        }
        file.sync_all().expect("a sync");
        drop(fs::remove_file(path));
        Self { file, len, at: 0 }
    }

    /// Overwrites of `size` octets with a sync each, per second.
    pub(crate) fn rate(&mut self, size: u64, rounds: u64) -> f64 {
        let chunk = vec![0x5a; usize::try_from(size).expect("it fits")];
        let began = mailsluice::clock::now();
        for _ in 0..rounds {
            if self.at + size > self.len {
                self.at = 0;
            }
            self.file.write_all_at(&chunk, self.at).expect("a write");
            self.file.sync_data().expect("a sync");
            self.at += size;
        }
        rounds as f64 / began.elapsed().as_secs_f64()
    }
}
