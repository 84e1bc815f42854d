//! Postfix (with dovecot for its logins), swaks, smtplib and curl.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::login::{certificates, password_file};
use crate::support::client::stuffed;
use crate::support::gateway::Setup;
use crate::support::peers::{
    PASSWORD, Peer, Postfix, Secured, USER, find, free_port, is_root, need, run, stunnel,
};
use crate::support::sink::{Sink, Taken};
use crate::support::{eventually, is_slow};

/// What a client hands over where the test is about the bytes: it has all the lines that a gateway would add.
pub const MESSAGE: &str = "Subject: exact Gr\u{f6}\u{df}en\r\nFrom: Reports <a@example.com>\r\nTo: b@example.org\r\nMessage-ID: <exact@example.com>\r\nDate: Tue, 24 Nov 2026 06:42:11 +0000\r\nX-Folded: one\r\n\ttwo  \r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n.\r\n..\r\n...three dots\r\nGr\u{fc}\u{df}e \t\r\n\r\n\r\nFrom here on\r\nlast line\r\n";

/// The message without the lines of Postfix and of the gateway.
#[track_caller]
pub fn original(taken: &Taken) -> Vec<u8> {
    let text = taken.content.as_slice();
    let by = b"\r\n\tby postfix.test (Postfix) with ";
    assert!(text.starts_with(b"Received: from relay.test "), "{}", taken.text());
    assert!(text.windows(by.len()).any(|part| part == by), "{}", taken.text());
    let mut end = 0;
    loop {
        end += text[end..].windows(2).position(|part| part == b"\r\n").unwrap() + 2;
        if !matches!(text[end], b' ' | b'\t') {
            break;
        }
    }
    Taken { content: text[end..].to_vec(), ..taken.clone() }.original().to_vec()
}

#[track_caller]
pub fn expect_message(got: &[u8]) {
    assert_eq!(String::from_utf8_lossy(got), MESSAGE);
}

/// A file that a client sends.
fn message_file(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("message.eml");
    fs::write(&path, MESSAGE).unwrap();
    path
}

#[test]
fn swaks_sends_through_the_gateway_and_postfix() {
    if !need("swaks") {
        return;
    }
    let sink = Sink::new();
    let Some(postfix) = Postfix::start(sink.address) else { return };
    let gateway = Setup::to(postfix.address).start();
    let file = message_file(gateway.folder());
    let swaks = || {
        let mut swaks = Command::new("swaks");
        swaks.args(["--server", "127.0.0.1", "--port", &gateway.smtp().port().to_string()]);
        swaks.args(["--helo", "client.test", "--from", "a@example.com"]);
        swaks
    };
    // As it goes over the wire: swaks neither doubles dots then nor adds the last one.
    let wire = gateway.folder().join("wire");
    fs::write(&wire, stuffed(MESSAGE.as_bytes())).unwrap();
    run(swaks()
        .args(["--to", "b@example.org,c@example.org", "--no-data-fixup", "--data"])
        .arg(format!("@{}", wire.display())));
    let taken = sink.wait(1).remove(0);
    assert_eq!(taken.from, "a@example.com");
    assert_eq!(taken.to, ["b@example.org", "c@example.org"]);
    expect_message(&original(&taken));

    // Composed by swaks, which writes neither Message-ID nor MIME parts as we would.
    run(swaks()
        .args(["--to", "d@example.org", "--header", "Subject: composed", "--body", ".\n..dots"])
        .args(["--attach-name", "report.eml", "--attach"])
        .arg(format!("@{}", file.display())));
    let taken = sink.wait(2).remove(1);
    assert_eq!(taken.to, ["d@example.org"]);
    let text = String::from_utf8(original(&taken)).unwrap();
    assert!(text.contains("Subject: composed\r\n"), "{text}");
    assert!(text.contains("\r\n.\r\n..dots\r\n"), "{text}");
    assert!(text.contains("report.eml"), "{text}");
    gateway.wait_empty();
    gateway.stop();
    assert_eq!(sink.taken().len(), 2, "{}", postfix.log());
}

#[test]
fn curl_sends_through_the_gateway() {
    if !need("curl") {
        return;
    }
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let file = message_file(gateway.folder());
    run(Command::new("curl")
        .args(["--silent", "--show-error", "--mail-from", "a@example.com"])
        .args(["--mail-rcpt", "b@example.org", "--mail-rcpt", "c@example.org", "--upload-file"])
        .arg(&file)
        .arg(format!("smtp://{}/client.test", gateway.smtp())));
    let taken = sink.wait(1).remove(0);
    assert_eq!(taken.from, "a@example.com");
    assert_eq!(taken.to, ["b@example.org", "c@example.org"]);
    expect_message(taken.original());
    gateway.stop();
}

/// With an older verb, a null reverse path, several messages on a connection, RSET, and options.
const SMTPLIB: &str = "
import smtplib, sys
content = open(sys.argv[2], 'rb').read()
with smtplib.SMTP('127.0.0.1', int(sys.argv[1]), local_hostname='client.test') as smtp:
    smtp.helo('old.test')
    smtp.sendmail('', ['b@example.org'], content)
    smtp.rset()
    smtp.ehlo('client.test')
    assert smtp.has_extn('pipelining') and smtp.has_extn('size') and smtp.has_extn('dsn'), smtp.esmtp_features
    assert smtp.verify('someone')[0] == 252
    assert smtp.noop()[0] == 250
    refused = smtp.sendmail('a@example.com', ['b@example.org', 'c@example.org'], content,
        ['BODY=8BITMIME', 'RET=HDRS', 'ENVID=x1'], ['NOTIFY=NEVER'])
    assert refused == {}, refused
    smtp.sendmail('a@example.com', ['gr\u{f6}\u{df}e@example.org'], content, ['SMTPUTF8', 'BODY=8BITMIME'])
";

#[test]
fn smtplib_sends_through_the_gateway_and_postfix() {
    if !need("python3") {
        return;
    }
    let sink = Sink::new();
    let Some(postfix) = Postfix::start(sink.address) else { return };
    let gateway = Setup::to(postfix.address).start();
    let file = message_file(gateway.folder());
    let port = gateway.smtp().port().to_string();
    run(Command::new("python3").args(["-c", SMTPLIB, &port]).arg(&file));
    let mut taken = sink.wait(3);
    taken.sort_by_key(|taken| (taken.from.clone(), taken.to.len()));
    let [null, utf8, two] = taken.try_into().unwrap_or_else(|taken| panic!("{taken:?}"));
    assert_eq!((null.from.as_str(), null.to), ("", vec!["b@example.org".to_owned()]));
    assert_eq!(utf8.to, ["gr\u{f6}\u{df}e@example.org"]);
    assert_eq!(two.to, ["b@example.org", "c@example.org"]);
    assert!(two.mail_line.contains("ENVID=x1") && two.mail_line.contains("RET=HDRS"), "{two:?}");
    assert!(two.rcpt_lines.iter().all(|line| line.contains("NOTIFY=NEVER")), "{two:?}");
    for taken in sink.taken() {
        expect_message(&original(&taken));
    }
    gateway.stop();
}

#[test]
fn a_thousand_messages_with_attachments_arrive_once_and_unchanged() {
    let sink = Sink::new();
    let Some(postfix) = Postfix::start(sink.address) else { return };
    check_many(Setup::to(postfix.address), &sink, 1000, 8);
}

/// All sizes, from none to 4 MB.
#[test]
fn messages_of_many_clients_go_over_starttls_with_a_login_each_once_and_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let (root, own) = certificates(folder.path());
    let sink = Sink::new();
    let postfix = Postfix::with_login(sink.address, Secured::StartTls, &own, "plain login");
    let Some(postfix) = postfix else { return };
    let setup = Setup::to(postfix.address)
        .set("provider", "security = \"starttls\"")
        .set("provider", &format!("ca_file = \"{}\"", root.display()))
        .login(USER, &password_file(folder.path(), PASSWORD));
    let (count, clients) = if is_slow() { (5000, 50) } else { (300, 20) };
    check_many(setup, &sink, count, clients);
}

#[test]
fn messages_go_through_stunnel_each_once_and_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let (root, own) = certificates(folder.path());
    let sink = Sink::new();
    let Some(postfix) = Postfix::start(sink.address) else { return };
    let Some((address, _stunnel)) = stunnel(folder.path(), &own, postfix.address) else { return };
    let setup = Setup::to(address)
        .set("provider", "security = \"tls\"")
        .set("provider", &format!("ca_file = \"{}\"", root.display()));
    check_many(setup, &sink, if is_slow() { 1000 } else { 200 }, 8);
}

/// So many messages of so many clients at once arrive at the sink behind Postfix, each once and as it was.
#[track_caller]
fn check_many(setup: Setup, sink: &Sink, count: usize, clients: usize) {
    if !need("python3") {
        return;
    }
    let gateway = setup.set("log", "level = \"info\"").start();
    let sent = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/send_many.py");
    let said = run(Command::new("python3")
        .arg(script)
        .args(["127.0.0.1", &gateway.smtp().port().to_string()])
        .args([count.to_string(), clients.to_string()])
        .arg(sent.path()));
    assert_eq!(said, "");
    gateway.wait_empty();
    assert_eq!(gateway.metric("mailsluice_messages_accepted_total"), count as f64);
    assert_eq!(gateway.metric("mailsluice_in_doubt_total"), 0.0);
    gateway.stop();

    let mut copies = BTreeMap::new();
    let mut octets = 0;
    for taken in sink.wait(count) {
        let mut text = original(&taken);
        let n = taken.from.strip_prefix("bounce+").and_then(|rest| rest.split('@').next());
        let n = n.unwrap().to_owned();
        assert_eq!(taken.to, [format!("user{n}@example.org")]);
        let was = fs::read(sent.path().join(format!("many-{n}.eml"))).unwrap();
        // smtplib ends a line that is not there, and Postfix a header.
        if was.is_empty() && text == b"\r\n" {
            text.clear();
        }
        assert!(text == was, "many-{n} was changed:\n{}", String::from_utf8_lossy(&text));
        octets += text.len();
        *copies.entry(n).or_insert(0) += 1;
    }
    assert_eq!(copies.len(), count, "lost");
    assert!(copies.values().all(|copies| *copies == 1), "twice: {copies:?}");
    println!("{count} messages, {octets} octets, none lost, changed or twice");
}

#[test]
fn smtp_sink_takes_what_smtplib_sent() {
    if !need("python3") || !need("smtp-sink") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let address = free_port();
    let mut sink = Command::new(find("smtp-sink").unwrap());
    sink.current_dir(folder.path()).stdout(Stdio::null()).stderr(Stdio::null());
    if is_root() {
        // It insists on being someone else.
        run(Command::new("chown").arg("postfix").arg(folder.path()));
        sink.args(["-u", "postfix"]);
    }
    // A file for each message.
    sink.args(["-d", "message.", &address.to_string(), "100"]);
    let _peer = Peer::start(&mut sink, address);
    let gateway = Setup::to(address).start();
    let sent = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/send_many.py");
    run(Command::new("python3")
        .arg(script)
        .args(["127.0.0.1", &gateway.smtp().port().to_string(), "20", "2"])
        .arg(sent.path()));
    gateway.wait_empty();
    gateway.stop();
    // It writes lines as the system does, and adds some of its own on top.
    let dumped = || {
        let files = fs::read_dir(folder.path()).unwrap();
        let texts = files.map(|file| fs::read(file.unwrap().path()).unwrap());
        texts.collect::<Vec<_>>()
    };
    let dumped = eventually("all dumps", || Some(dumped()).filter(|dumps| dumps.len() == 20));
    for n in 0..20 {
        let was = fs::read_to_string(sent.path().join(format!("many-{n}.eml"))).unwrap();
        let was = was.replace("\r\n", "\n");
        let same = dumped.iter().filter(|dump| {
            let dump = String::from_utf8_lossy(dump);
            dump.trim_end().ends_with(was.trim_end())
        });
        assert_eq!(same.count(), 1, "many-{n}");
    }
}
