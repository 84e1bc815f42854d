//! The start of a spool on whatever lies on disk. All of it is in `mailsluice::spool::fuzz`, which exists only under
//! the `cfg(fuzzing)` that cargo-fuzz sets, so that `cargo test` can do the same.

#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use mailsluice::spool::fuzz;

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("mailsluice-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder to work in");
    folder
});

fuzz_target!(|octets: &[u8]| {
    fuzz::replay(&FOLDER, octets);
});

// Octets at random mostly spoil a script: lengths stand in it. So one in four only.
fuzz_mutator!(|octets: &mut [u8], len: usize, max: usize, seed: u32| {
    if seed % 4 == 0 {
        return fuzzer_mutate(octets, len, max);
    }
    let mutated = fuzz::mutate::mutate(&octets[..len], &[], seed.into());
    let len = mutated.len().min(max);
    octets[..len].copy_from_slice(&mutated[..len]);
    len
});
