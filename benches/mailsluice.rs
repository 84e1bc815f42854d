//! `cargo bench` measures; `cargo test --benches` runs each case once and small, so that a broken one is noticed.
//! `cargo bench -- spool` (or `million`, or `large`) is a run of the spool as a whole, on a disk of your
//! choice, `cargo bench -- neighbours` one of the whole gateway.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use mailsluice::bench::{SmtpSession, decode, parse_command};

mod measure;
mod neighbours;
mod spool;

fn main() {
    if spool::child() {
        return;
    }
    let is_asked_for = |case: &str| std::env::args().any(|argument| argument == case);
    let measured = is_asked_for("--bench");
    let mut is_run = false;
    for (case, run) in spool::CASES.iter().chain(neighbours::CASES) {
        if is_asked_for(case) || !measured {
            run(measured);
            is_run = true;
        }
    }
    if !is_run || !measured {
        divan::main();
    }
}

/// The size of a case, which is tiny unless it is measured.
fn sized(octets: usize) -> usize {
    if std::env::args().any(|argument| argument == "--bench") { octets } else { octets.min(2048) }
}

/// Lines of ordinary text, about `octets` of them.
fn text(octets: usize) -> Vec<u8> {
    let line = b"An ordinary line of text in a message, as long as most of them are: 78.......\r\n";
    line.iter().copied().cycle().take(octets / line.len() * line.len() + line.len()).collect()
}

#[divan::bench(args = [10_000, 10_000_000])]
fn session_message(bencher: Bencher<'_, '_>, octets: usize) {
    let content = [text(sized(octets)).as_slice(), b".\r\n"].concat();
    let mut session = SmtpSession::new();
    bencher
        .counter(BytesCount::new(content.len()))
        .bench_local(|| session.message(black_box(&content)));
}

/// One line in `raw` over and over.
fn decode_lines(bencher: Bencher<'_, '_>, line: &[u8]) {
    let raw = line.repeat(sized(1_000_000) / line.len());
    bencher.counter(BytesCount::new(raw.len())).bench_local(|| decode(black_box(&raw)));
}

#[divan::bench]
fn decode_text(bencher: Bencher<'_, '_>) {
    decode_lines(bencher, &text(1));
}

/// Every line begins with a stuffed dot and has nothing else.
#[divan::bench]
fn decode_all_dots(bencher: Bencher<'_, '_>) {
    decode_lines(bencher, b"..\r\n");
}

/// No line ends as it should.
#[divan::bench]
fn decode_lone_newlines(bencher: Bencher<'_, '_>) {
    decode_lines(bencher, b"an old client\n");
}

#[divan::bench(args = [
    "NOOP",
    "MAIL FROM:<reports@example.com> SIZE=12345 BODY=8BITMIME RET=HDRS ENVID=QQ314159",
    "RCPT TO:<reader@example.com> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;reader@example.com",
])]
fn command(line: &str) -> bool {
    parse_command(black_box(line.as_bytes()))
}
