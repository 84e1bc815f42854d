//! Any octets for a message to Graph. What must hold is in `mailsluice::provider::graph::message::fuzz`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mailsluice::provider::graph::message::fuzz;

fuzz_target!(|octets: &[u8]| {
    fuzz::check(octets);
});
