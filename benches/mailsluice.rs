//! `cargo bench` measures; `cargo test --benches` runs each case once and small, so that a broken one is noticed.
//! `cargo bench -- spool` (or `million`, or `large`) is a run of the spool as a whole, on a disk of your
//! choice, `cargo bench -- neighbours` one of the whole gateway.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use mailsluice::bench::{Graph, SmtpSession, decode, parse_command};

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

/// A message for Graph with a file of about `octets`, from its octets to those that are sent.
#[divan::bench(args = [1_000_000, 10_000_000])]
fn graph_attachment(bencher: Bencher<'_, '_>, octets: usize) {
    let line = "JVBERi0xLjQKJeLjz9MKMSAwIG9iago8PC9UeXBlL0NhdGFsb2cvUGFnZXMgMiAwIFI+PgplbmRv\r\n";
    let file = line.repeat(sized(octets) / line.len());
    let message = format!(
        "From: Reports <reports@example.com>\r\nTo: reader@example.com\r\nSubject: The report\r\n\
         Message-ID: <1@example.com>\r\nMIME-Version: 1.0\r\n\
         Content-Type: multipart/mixed; boundary=\"=_b\"\r\n\r\n\
         --=_b\r\nContent-Type: text/plain; charset=utf-8\r\n\r\nSee the report.\r\n\
         --=_b\r\nContent-Type: application/pdf; name=report.pdf\r\n\
         Content-Transfer-Encoding: base64\r\n\
         Content-Disposition: attachment; filename=report.pdf\r\n\r\n{file}--=_b--\r\n"
    );
    let graph = Graph::new().expect("the addresses are valid");
    bencher
        .counter(BytesCount::new(message.len()))
        .bench_local(|| graph.convert(black_box(message.as_bytes())));
}

/// A short message in HTML and text, as applications send them.
#[divan::bench]
fn graph_small_html(bencher: Bencher<'_, '_>) {
    let row = "<tr><td style=3D\"padding:4px\">An item of the order</td><td>=E2=82=AC 12.00</td></tr>\r\n";
    let message = format!(
        "Received: from app (localhost [127.0.0.1]) by relay.example.com; Tue, 24 Nov 2026 10:00:00 +0000\r\n\
         From: =?utf-8?q?Caf=C3=A9?= <reports@example.com>\r\nTo: A Reader <reader@example.com>\r\n\
         Reply-To: help@example.com\r\nSubject: =?utf-8?q?Your_order_at_the_caf=C3=A9?=\r\n\
         Date: Tue, 24 Nov 2026 10:00:00 +0000\r\nMessage-ID: <order-12345@example.com>\r\n\
         X-Mailer: Shop 1.0\r\nX-Order: 12345\r\nMIME-Version: 1.0\r\n\
         Content-Type: multipart/alternative; boundary=\"=_b\"\r\n\r\n\
         --=_b\r\nContent-Type: text/plain; charset=utf-8\r\n\r\nThank you for your order.\r\n\
         --=_b\r\nContent-Type: text/html; charset=utf-8\r\n\
         Content-Transfer-Encoding: quoted-printable\r\n\r\n\
         <html><body><table>\r\n{}</table></body></html>\r\n--=_b--\r\n",
        row.repeat(20)
    );
    let graph = Graph::new().expect("the addresses are valid");
    bencher
        .counter(ItemsCount::new(1_usize))
        .bench_local(|| graph.convert(black_box(message.as_bytes())));
}
