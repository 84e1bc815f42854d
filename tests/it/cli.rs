//! The commands, their output and their exit codes.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::client::{Client, id, stuffed};
use crate::support::eventually;
use crate::support::gateway::{BINARY, Gateway, Setup};
use crate::support::sink::{Answer, Sink};

fn run(arguments: &[&str], folder: &Path) -> Output {
    Command::new(BINARY)
        .args(arguments)
        .current_dir(folder)
        .env_remove("MAILSLUICE_CONFIG")
        .output()
        .unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn check_says_every_problem_of_every_broken_config() {
    let cases = root().join("tests/bad_configs");
    let mut seen = 0;
    for case in fs::read_dir(cases).unwrap() {
        let folder = case.unwrap().path();
        let expected = fs::read_to_string(folder.join("expected.txt")).unwrap();
        // In the checkout anybody can read it, which is a problem of its own where a secret stands in it.
        let private = tempfile::tempdir().unwrap();
        let config = private.path().join("config.toml");
        fs::copy(folder.join("config.toml"), &config).unwrap();
        fs::set_permissions(&config, fs::Permissions::from_mode(0o600)).unwrap();
        let output = run(&["check", "--config", "config.toml"], private.path());
        assert_eq!(err(&output).trim_end(), expected.trim_end(), "{}", folder.display());
        assert_eq!((code(&output), out(&output).as_str()), (78, ""), "{}", folder.display());
        seen += 1;
    }
    assert!(seen >= 40, "{seen} cases");
}

#[test]
fn check_takes_the_shipped_configuration() {
    let output = run(&["check", "--config", "config/mailsluice.toml"], root());
    assert_eq!(code(&output), 0);
    // Nobody can know the address of who runs it.
    assert!(err(&output).contains("[bounce] postmaster: is not set"), "{}", err(&output));
    assert_eq!(err(&output).lines().count(), 1, "{}", err(&output));
    // Where the spool would lie on a file system that copies on write, that is said first.
    assert!(out(&output).ends_with("config/mailsluice.toml: no problems, one warning\n"));
}

#[test]
fn a_missing_file_is_named_and_ends_with_78() {
    for command in ["check", "run", "health"] {
        let output = run(&[command, "--config", "/nonexistent/mailsluice.toml"], root());
        assert_eq!(code(&output), 78, "{command}");
        assert!(err(&output).contains("/nonexistent/mailsluice.toml"), "{}", err(&output));
    }
}

#[test]
fn wrong_usage_ends_with_64_and_help_with_0() {
    assert_eq!(code(&run(&[], root())), 64);
    assert_eq!(code(&run(&["deliver"], root())), 64);
    assert_eq!(code(&run(&["run", "--port", "25"], root())), 64);
    let help = run(&["--help"], root());
    assert_eq!(code(&help), 0);
    for word in ["run", "check", "health", "sandbox", "spool", "version", "Exit codes"] {
        assert!(out(&help).contains(word), "{word}");
    }
    for command in ["run", "check", "health", "sandbox", "spool", "version"] {
        assert_eq!(code(&run(&[command, "--help"], root())), 0, "{command}");
    }
}

#[test]
fn version_is_the_one_of_the_package() {
    assert_eq!(
        out(&run(&["version"], root())),
        format!("mailsluice {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn health_says_whether_mail_is_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let health = |admin: std::net::SocketAddr| {
        // The gateway chose a free port; its operator would have written it.
        let config = folder.path().join("health.toml");
        fs::write(
            &config,
            format!("[sender]\npolicy = \"preserve\"\n[admin]\nbind = \"{admin}\"\n"),
        )
        .unwrap();
        run(&["health", "--config", "health.toml"], folder.path())
    };
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).start();
    let output = health(gateway.admin());
    assert_eq!((code(&output), out(&output).as_str()), (0, "ready\n"));
    let gone = gateway.admin();
    gateway.stop();
    let output = health(gone);
    assert_eq!(code(&output), 69);
    assert!(err(&output).contains("no answer from"), "{}", err(&output));

    let refusing = Setup::none("reject").start();
    let output = health(refusing.admin());
    assert_eq!(code(&output), 69);
    assert!(
        out(&output).starts_with("not ready: mail is refused with 451 4.3.2"),
        "{}",
        out(&output)
    );
}

#[test]
fn sandbox_sends_a_message_and_prints_what_arrived() {
    let output = run(&["sandbox", "--message", "tests/data/report.eml"], root());
    assert_eq!(code(&output), 0, "{}", err(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("the gateway answered: 250 2.0.0 Ok: queued as "), "{text}");
    let envelope = "arrived: from <reports@example.com> to <ann@example.com>, <bob@example.org>, <jane@example.net>";
    assert!(text.contains(envelope), "{text}");
    assert!(text.contains(&fs::read_to_string(root().join("tests/data/report.eml")).unwrap()));
}

#[test]
fn sandbox_plays_the_faults_that_addresses_ask_for() {
    let send = |to: &[&str]| {
        let mut arguments = vec!["sandbox", "--message", "tests/data/report.eml"];
        arguments.extend(to.iter().flat_map(|to| ["--to", *to]));
        run(&arguments, root())
    };
    let output = send(&["fail-550@x.test", "ok@x.test"]);
    assert_eq!(code(&output), 69);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("to <ok@x.test>,"), "{text}");
    assert!(text.contains("refused by the upstream: <fail-550@x.test>: 550 5.1.1"), "{text}");
    let output = send(&["drop@x.test"]);
    assert_eq!(code(&output), 69);
    let output = send(&["lost-answer@x.test"]);
    assert_eq!(code(&output), 0);
}

#[test]
fn sandbox_sends_a_message_by_graph_and_prints_what_is_stored() {
    let microsoft365 = ["sandbox", "--provider", "microsoft365"];
    let send = |more: &[&str]| {
        let message = ["--message", "tests/data/report.eml"];
        run(&[&microsoft365[..], &message, more].concat(), root())
    };
    let output = send(&[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(code(&output), 0, "{text}{}", err(&output));
    let envelope = "arrived: from <reports@example.com> to <ann@example.com>, <bob@example.org>, <jane@example.net>";
    assert!(text.contains(envelope), "{text}");
    assert!(text.contains("\"name\": \"Bericht Q3 – Übersicht.pdf\""), "{text}");
    let output = send(&["--to", "invalid@x.test", "--to", "ok@x.test"]);
    assert_eq!(code(&output), 69, "{}", err(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("to <ok@x.test>,"), "{text}");
    let refused = "refused by Graph: <invalid@x.test>: 400 ErrorInvalidRecipients";
    assert!(text.contains(refused), "{text}");
    for (arguments, words) in [
        (["--set", "limits.messages=often"], "is no rate such as"),
        (["--set", "token_life=5"], "unknown field `token_life`"),
        (["--set", "token_lifetime"], "no KEY=VALUE"),
    ] {
        let output = run(&[&microsoft365[..], &arguments].concat(), root());
        assert_eq!(code(&output), 64);
        assert!(err(&output).contains(words), "{}", err(&output));
    }
    assert_eq!(code(&run(&["sandbox", "--limits", "none"], root())), 64, "there are none for SMTP");
}

/// A sandbox in the background, which ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn sandbox_alone_prints_the_provider_for_a_gateway_and_shows_its_inbox() {
    let arguments = ["sandbox", "--provider", "microsoft365", "--only-world"];
    let mut command = Command::new(BINARY);
    let command = command.args(arguments).args(["--inbox", "127.0.0.1:0"]);
    let mut sandbox = Running(command.stdout(Stdio::piped()).spawn().unwrap());
    let lines = BufReader::new(sandbox.0.stdout.take().unwrap()).lines();
    let lines: Vec<String> =
        lines.map(Result::unwrap).take_while(|line| !line.starts_with("Ctrl-C")).collect();
    let text = lines.join("\n");
    let (head, table) = text.split_once("# for the configuration of a gateway\n").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("mailsluice.toml");
    let spool = folder.path().join("spool");
    fs::write(&config, format!("{table}\n[spool]\npath = \"{}\"\n", spool.display())).unwrap();
    fs::set_permissions(&config, fs::Permissions::from_mode(0o600)).unwrap();
    let output = run(&["check", "--config", "mailsluice.toml"], folder.path());
    assert_eq!(code(&output), 0, "{}", err(&output));

    let address = head.trim().trim_start_matches("inbox     http://").trim_end_matches('/');
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    assert!(page.contains("content-security-policy: default-src 'none'"), "{page}");
    assert!(page.contains("Nothing has arrived yet."), "{page}");
}

#[test]
fn sandbox_says_what_is_wrong_with_its_message() {
    let output = run(&["sandbox", "--message", "/nonexistent.eml"], root());
    assert_eq!(code(&output), 66);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("x.eml"), "Subject: nobody\n\nhello\n").unwrap();
    let output = run(&["sandbox", "--message", "x.eml"], folder.path());
    assert_eq!(code(&output), 64);
    assert!(err(&output).contains("no recipient"), "{}", err(&output));
    let output = run(&["sandbox", "--message", "x.eml", "--to", "a b@c"], folder.path());
    assert_eq!(code(&output), 64);
}

/// A content with all that a message should have, so that nothing but Received is put before it.
fn content(text: &str) -> String {
    format!(
        "From: a@example.com\r\nMessage-ID: <1@x>\r\nDate: Tue, 24 Nov 2026 06:42:11 +0000\r\n\r\n{text}\r\n"
    )
}

/// A spool whose gateway was stopped.
struct Filled {
    folder: TempDir,
    ids: Vec<String>,
}

impl Filled {
    /// With these messages, for which there was no upstream: the last of them is the last of the log.
    fn queued(contents: &[&str]) -> Self {
        let closed = Sink::scripted(|ask| match ask.is_greeting() {
            true => Answer::reply("421 4.3.2 closed"),
            false => Answer::Usual,
        });
        Self::by(Setup::to(closed.address), contents, |_| {})
    }

    /// With these messages, each of which the upstream refused for now when it had it: what became of an attempt is the
    /// last of the log.
    fn deferred(contents: &[&str]) -> Self {
        let full = Sink::scripted(|ask| match ask.is_content() {
            true => Answer::reply("451 4.3.0 later"),
            false => Answer::Usual,
        });
        let settle = |gateway: &Gateway| {
            eventually("all to be refused for now", || {
                let deferred = gateway.events().into_iter().filter(|it| it["event"] == "deferred");
                (deferred.count() >= 2 * contents.len()).then_some(())
            });
        };
        Self::by(Setup::to(full.address), contents, settle)
    }

    fn by(setup: Setup, contents: &[&str], settle: impl FnOnce(&Gateway)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let gateway = setup.spool(&folder.path().join("spool")).start();
        let mut client = Client::hello(gateway.smtp());
        let to = &["b@example.org", "c@example.org"];
        let ids = contents.iter().map(|it| client.mail("a@example.com", to, content(it))).collect();
        drop(client);
        settle(&gateway);
        gateway.stop();
        Self { folder, ids }
    }

    fn spool(&self) -> PathBuf {
        self.folder.path().join("spool")
    }

    fn run(&self, arguments: &[&str]) -> Output {
        spool(arguments, &self.spool())
    }

    /// The path of the only file in a folder of the spool.
    fn only(&self, folder: &str) -> PathBuf {
        let mut files = fs::read_dir(self.spool().join(folder)).unwrap();
        let file = files.next().unwrap().unwrap().path();
        assert!(files.next().is_none());
        file
    }

    /// Changes one octet of `text` in the log.
    fn flip(&self, text: &str) {
        let path = self.only("log");
        let log = fs::read(&path).unwrap();
        let at = log.windows(text.len()).position(|it| it == text.as_bytes()).unwrap();
        Self::flip_at(&path, &log, at);
    }

    /// Changes one octet of the last record of the log.
    fn flip_last(&self) {
        let path = self.only("log");
        let log = fs::read(&path).unwrap();
        // Its magic, and then its header and the id of its message.
        let record = log.windows(4).rposition(|it| it == b"\xf7msr").unwrap();
        Self::flip_at(&path, &log, record + 48);
    }

    fn flip_at(path: &Path, log: &[u8], at: usize) {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.write_all_at(&[log[at] ^ 1], at as u64).unwrap();
    }
}

fn spool(arguments: &[&str], spool: &Path) -> Output {
    let mut words = vec!["spool"];
    words.extend(arguments);
    words.extend(["--spool", spool.to_str().unwrap()]);
    run(&words, root())
}

/// Every file and folder below, with its content and the time of its last change.
fn tree(folder: &Path) -> BTreeMap<PathBuf, (Vec<u8>, std::time::SystemTime)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let changed = fs::metadata(&path).unwrap().modified().unwrap();
        let content = match path.is_dir() {
            true => {
                found.extend(tree(&path));
                Vec::new()
            }
            false => fs::read(&path).unwrap(),
        };
        found.insert(path, (content, changed));
    }
    found
}

#[test]
fn an_empty_spool_lists_nothing_and_is_not_damaged() {
    let filled = Filled::queued(&[]);
    let output = filled.run(&["ls"]);
    assert_eq!((code(&output), out(&output), err(&output)), (0, String::new(), String::new()));
    let output = filled.run(&["verify"]);
    assert_eq!(code(&output), 0, "{}", out(&output));
    assert!(out(&output).ends_with("nothing is damaged\n"), "{}", out(&output));
    let to = filled.folder.path().join("export");
    let output = filled.run(&["export", to.to_str().unwrap()]);
    assert_eq!(code(&output), 0, "{}", err(&output));
    assert_eq!(fs::read_dir(to).unwrap().count(), 0);
}

#[test]
fn the_spool_is_that_of_the_configuration_where_none_is_named() {
    let filled = Filled::queued(&["one"]);
    let config = filled.folder.path().join("mailsluice.toml");
    fs::write(&config, Setup::none("hold").text(filled.folder.path())).unwrap();
    let output = run(&["spool", "ls", "--config", config.to_str().unwrap()], root());
    assert_eq!(code(&output), 0, "{}", err(&output));
    assert!(out(&output).starts_with(&filled.ids[0]), "{}", out(&output));
}

#[test]
fn messages_are_listed_with_their_state_and_exported_by_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("spool");
    let sink = Sink::scripted(|ask| match ask.from {
        "held@example.com" if ask.is_content() => Answer::TakeAndDrop,
        "failed@example.com" if ask.is("RCPT") => Answer::reply("550 5.1.1 \x1b[31mno such user"),
        "queued@example.com" if ask.is("RCPT TO:<b@") => Answer::reply("451 4.2.0 later"),
        _ => Answer::Usual,
    });
    let gateway = Setup::to(sink.address).spool(&path).start();
    let mut ids = BTreeMap::new();
    for (state, event) in [("queued", "deferred"), ("failed", "failed"), ("held", "held")] {
        let from = format!("{state}@example.com");
        let to: &[&str] = match state {
            "queued" => &["b@x.test", "c@x.test", "d@x.test", "e@x.test", "f@x.test"],
            _ => &["b@x.test"],
        };
        let id = Client::hello(gateway.smtp()).mail(&from, to, content(state));
        gateway.wait_event(event, |it| it["id"] == id.as_str());
        ids.insert(state, id);
    }
    gateway.stop();

    let output = spool(&["ls"], &path);
    assert_eq!(code(&output), 0, "{}", err(&output));
    let text = out(&output);
    let line = |state: &str| {
        let mut found = text.lines().filter(|line| line.starts_with(&ids[state]));
        found.next().unwrap().split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(text.lines().count(), 3, "{text}");
    for (state, pending) in [("queued", "1/5"), ("held", "1/1"), ("failed", "0/1")] {
        let words = line(state);
        assert_eq!((words[1], words[4]), (state, pending), "{text}");
        assert!(words[2].starts_with("20") && words[2].ends_with('Z'), "{text}");
        assert_eq!(words[3], content(state).len().to_string());
        assert_eq!(words[6], format!("<{state}@example.com>"));
        assert_eq!(words[7].trim_end_matches(','), "<b@x.test>");
    }
    assert!(text.contains("<b@x.test>, <c@x.test>, <d@x.test> and 2 more\n"), "{text}");

    let json = out(&spool(&["ls", "--json"], &path));
    let lines: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let held = lines.iter().find(|line| line["id"] == ids["held"].as_str()).unwrap();
    assert_eq!((&held["state"], &held["pending"]), (&"held".into(), &1.into()));
    assert_eq!(held["to"], serde_json::json!(["b@x.test"]));

    let output = spool(&["cat", "--envelope", &ids["failed"]], &path);
    let envelope: Value = serde_json::from_str(&out(&output)).unwrap();
    assert_eq!(envelope["recipients"][0]["state"], "failed");
    assert_eq!(envelope["recipients"][0]["words"], "550 5.1.1 \\x1b[31mno such user");

    for (state, id) in &ids {
        let to = folder.path().join(state);
        let output = spool(&["export", to.to_str().unwrap(), "--state", state], &path);
        assert_eq!(code(&output), 0, "{}", err(&output));
        let mut names: Vec<_> = fs::read_dir(&to)
            .unwrap()
            .map(|it| it.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, [format!("{id}.eml"), format!("{id}.json")]);
    }
}

#[test]
fn cat_and_export_write_what_the_upstream_would_get() {
    let large = "0123456789".repeat(150_000);
    let filled = Filled::queued(&[".\r\n..dots\r\n\tblanks \t", &large, ""]);
    let to = filled.folder.path().join("made/for it");
    let output = filled.run(&["export", to.to_str().unwrap()]);
    assert_eq!(code(&output), 0, "{}", err(&output));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&to), 0o700);
    let mut printed = BTreeMap::new();
    for id in &filled.ids {
        let output = filled.run(&["cat", id]);
        assert_eq!(code(&output), 0, "{}", err(&output));
        let eml = to.join(format!("{id}.eml"));
        assert!(fs::read(&eml).unwrap() == output.stdout, "{id}");
        let json = to.join(format!("{id}.json"));
        assert_eq!((mode(&eml), mode(&json)), (0o600, 0o600));
        let json: Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
        assert_eq!(json["id"], id.as_str());
        printed.insert(id.clone(), output.stdout);
    }
    let sink = Sink::new();
    let gateway = Setup::to(sink.address).spool(&filled.spool()).start();
    for taken in sink.wait(3) {
        assert!(printed[&taken.id()] == taken.content, "{}", taken.id());
    }
    gateway.stop();
}

#[test]
fn export_overwrites_nothing() {
    let filled = Filled::queued(&["one", "two"]);
    let to = filled.folder.path().join("export");
    fs::create_dir(&to).unwrap();
    let first = to.join(format!("{}.eml", filled.ids[0]));
    fs::write(&first, "mine").unwrap();
    let arguments = ["export", to.to_str().unwrap()];
    let output = filled.run(&arguments);
    assert_eq!(code(&output), 73);
    assert_eq!(fs::read_to_string(&first).unwrap(), "mine");
    assert!(err(&output).contains(&format!("{} exists already", first.display())));
    assert!(to.join(format!("{}.json", filled.ids[1])).exists());
    assert!(!to.join(format!("{}.json", filled.ids[0])).exists());
    let before = tree(&to);
    let output = filled.run(&arguments);
    assert_eq!(code(&output), 73);
    assert_eq!(err(&output).lines().count(), 1, "{}", err(&output));
    assert!(out(&output).contains(", where 1 more had been written before\n"), "{}", out(&output));
    assert!(tree(&to) == before);
    // Nor what is no file.
    let odd = filled.folder.path().join("odd");
    fs::create_dir(&odd).unwrap();
    let outside = filled.folder.path().join("outside");
    std::os::unix::fs::symlink(&outside, odd.join(format!("{}.eml", filled.ids[0]))).unwrap();
    fs::create_dir(odd.join(format!("{}.json", filled.ids[1]))).unwrap();
    let output = filled.run(&["export", odd.to_str().unwrap()]);
    assert_eq!((code(&output), err(&output).lines().count()), (73, 2), "{}", err(&output));
    assert!(!outside.exists());
    let within = filled.spool().join("bodies/new");
    assert_eq!(code(&filled.run(&["export", within.to_str().unwrap()])), 64);
    assert!(!within.exists());
}

#[test]
fn an_export_that_was_cut_off_is_completed_by_the_next() {
    let filled = Filled::queued(&["one", "two", &"large".repeat(300_000)]);
    let [whole, to] = ["whole", "cut off"].map(|name| filled.folder.path().join(name));
    assert_eq!(code(&filled.run(&["export", whole.to_str().unwrap()])), 0);
    let contents = |folder| -> Vec<(PathBuf, Vec<u8>)> {
        let contents = tree(folder)
            .into_iter()
            .map(|(path, (content, _))| (path.strip_prefix(folder).unwrap().to_owned(), content));
        contents.collect()
    };
    let expected = contents(&whole);
    assert_eq!(expected.len(), 6);
    fs::create_dir(&to).unwrap();
    // A kill left part of a file, a message without its JSON, and another with part of it.
    fs::write(to.join(format!(".{}.eml.part", filled.ids[0])), "part of an older one").unwrap();
    for id in &filled.ids[1..] {
        let eml = format!("{id}.eml");
        fs::copy(whole.join(&eml), to.join(&eml)).unwrap();
    }
    fs::write(to.join(format!(".{}.json.part", filled.ids[1])), "{").unwrap();
    for (written, before) in
        [("3 messages", ""), ("0 messages", ", where 3 more had been written before")]
    {
        let output = filled.run(&["export", to.to_str().unwrap()]);
        assert_eq!((code(&output), err(&output)), (0, String::new()));
        assert_eq!(out(&output), format!("{written} written to {}{before}\n", to.display()));
        assert!(contents(&to) == expected);
    }
    // What is only the start of it, or more than it, is another content.
    let eml = to.join(format!("{}.eml", filled.ids[2]));
    let content = fs::read(&eml).unwrap();
    for other in [&content[..content.len() - 1], &[&content[..], b"x"].concat(), b""] {
        fs::write(&eml, other).unwrap();
        let output = filled.run(&["export", to.to_str().unwrap()]);
        assert_eq!(code(&output), 73);
        let says = format!("{} exists already with another content", eml.display());
        assert!(err(&output).contains(&says), "{}", err(&output));
        assert!(fs::read(&eml).unwrap() == other);
    }
}

#[test]
fn two_exports_to_one_folder_do_not_meet() {
    let filled = Filled::queued(&["one"]);
    let to = filled.folder.path().join("export");
    fs::create_dir(&to).unwrap();
    let other = fs::File::open(&to).unwrap();
    other.lock().unwrap();
    let output = filled.run(&["export", to.to_str().unwrap()]);
    assert_eq!(code(&output), 73);
    assert!(err(&output).contains("another export is writing there"), "{}", err(&output));
    // Not by closing it: a process that another test begins at this moment may have a copy.
    other.unlock().unwrap();
    assert_eq!(code(&filled.run(&["export", to.to_str().unwrap()])), 0);
}

#[test]
fn a_flipped_byte_in_a_segment_is_found_and_costs_only_its_message() {
    let filled = Filled::queued(&["the first", "the second", "the third"]);
    filled.flip("the second");
    let before = tree(&filled.spool());
    let output = filled.run(&["verify"]);
    assert_eq!(code(&output), 65);
    let text = out(&output);
    assert!(text.starts_with("damaged: log/0000000") && text.contains(".seg: batch "), "{text}");
    assert!(text.contains("cannot be read; octets "), "{text}");
    assert!(text.ends_with("1 damage\n"), "{text}");
    let output = filled.run(&["ls"]);
    assert_eq!((code(&output), out(&output).lines().count()), (65, 2));
    assert!(err(&output).contains("the spool is damaged: log/"), "{}", err(&output));
    let to = filled.folder.path().join("export");
    assert_eq!(code(&filled.run(&["export", to.to_str().unwrap()])), 65);
    assert_eq!(fs::read_dir(to).unwrap().count(), 4);
    assert_eq!(code(&filled.run(&["cat", &filled.ids[1]])), 66);
    assert_eq!(code(&filled.run(&["cat", &filled.ids[2]])), 0);
    assert!(tree(&filled.spool()) == before);
}

#[test]
fn a_torn_tail_is_said_and_is_no_damage() {
    let contents = &["the first", "the second"];
    // The last record is a message that nobody was told of; or what became of an attempt.
    for (filled, left) in [(Filled::queued(contents), 1), (Filled::deferred(contents), 2)] {
        filled.flip_last();
        let output = filled.run(&["verify"]);
        assert_eq!(code(&output), 0, "{}", out(&output));
        assert!(out(&output).starts_with("The log ends in a batch that is not whole."));
        assert_eq!(out(&filled.run(&["ls"])).lines().count(), left);
    }
}

#[test]
fn a_side_file_that_is_cut_short_or_changed_is_found() {
    let filled = Filled::queued(&["small", &"large".repeat(300_000)]);
    let path = filled.only("bodies");
    let file = fs::File::options().write(true).open(&path).unwrap();
    let check = |expected: &str| {
        let output = filled.run(&["verify"]);
        assert_eq!(code(&output), 65, "{}", out(&output));
        let text = out(&output);
        assert!(text.starts_with(&format!("damaged: message {}: ", filled.ids[1])), "{text}");
        assert!(text.contains(&format!("{}{expected}", path.display())), "{text}");
        assert!(text.ends_with("1 damage\n"), "{text}");
        assert_eq!(code(&filled.run(&["cat", &filled.ids[1]])), 65);
        let to = tempfile::tempdir().unwrap();
        let output = filled.run(&["export", to.path().to_str().unwrap()]);
        assert_eq!(code(&output), 65);
        assert!(err(&output).contains(&filled.ids[1]), "{}", err(&output));
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 2);
    };
    let len = fs::metadata(&path).unwrap().len();
    file.write_all_at(b"X", 1_000_000).unwrap();
    check(&format!(", octets 0 to {len}: the stored content is damaged (checksum)"));
    file.set_len(1_000_000).unwrap();
    check(&format!(" has 1000000 octets instead of {len}"));
    fs::remove_file(&path).unwrap();
    check(" is missing");
}

#[test]
fn while_a_daemon_runs_its_spool_is_not_looked_at() {
    let gateway = Setup::none("hold").start();
    let path = gateway.folder().join("spool");
    for arguments in [&["ls"][..], &["verify"], &["export", "/nonexistent/x"]] {
        let output = spool(arguments, &path);
        assert_eq!((code(&output), out(&output).as_str()), (75, ""));
        let words = format!("in use by process {}: ", gateway.pid());
        assert!(err(&output).contains(&words), "{}", err(&output));
        assert!(err(&output).contains("misleading"), "{}", err(&output));
    }
    gateway.stop();
}

#[test]
fn while_a_spool_is_looked_at_others_may_look_and_no_daemon_starts() {
    let filled = Filled::queued(&[&"large".repeat(300_000)]);
    let spool = filled.spool();
    let words = ["spool", "cat", &filled.ids[0], "--spool", spool.to_str().unwrap()];
    let mut looking = Command::new(BINARY).args(words).stdout(Stdio::piped()).spawn().unwrap();
    let mut pipe = looking.stdout.take().unwrap();
    // More than a pipe takes in is yet to come.
    pipe.read_exact(&mut [0; 1000]).unwrap();
    assert_eq!(code(&filled.run(&["verify"])), 0);
    let mut gateway = Setup::none("hold").spool(&spool).spawn();
    assert_eq!(gateway.wait_exit().code(), Some(71));
    assert!(gateway.log_text().contains("is in use by process"), "{}", gateway.log_text());
    // Whoever reads has seen enough: no error.
    drop(pipe);
    assert!(looking.wait().unwrap().success());
    Setup::none("hold").spool(&spool).start().stop();
}

#[test]
fn a_lock_is_held_whatever_it_says() {
    let filled = Filled::queued(&["one"]);
    let path = filled.spool().join("lock");
    let lock = fs::File::options().write(true).open(&path).unwrap();
    lock.lock().unwrap();
    for content in [&b"\xff\xfe\n"[..], b""] {
        fs::write(&path, content).unwrap();
        let output = filled.run(&["ls"]);
        assert_eq!(code(&output), 75);
        assert!(err(&output).contains("in use by another process: "), "{}", err(&output));
        let mut gateway = Setup::none("hold").spool(&filled.spool()).spawn();
        assert_eq!(gateway.wait_exit().code(), Some(71));
        let text = gateway.log_text();
        assert!(text.contains("stop it, or give this one another spool.path"), "{text}");
    }
    drop(lock);
    assert_eq!(code(&filled.run(&["ls"])), 0);
}

#[test]
fn the_spool_of_another_version_ends_with_71() {
    let filled = Filled::queued(&["one"]);
    let path = filled.only("log");
    let mut log = fs::read(&path).unwrap();
    // The header has its version after the magic, and then a checksum over all but the magic and itself.
    log[8] += 1;
    let sum = crc32c::crc32c_append(crc32c::crc32c(&log[8..12]), &log[16..64]);
    log[12..16].copy_from_slice(&sum.to_le_bytes());
    fs::write(&path, log).unwrap();
    let before = tree(&filled.spool());
    let to = filled.folder.path().join("export");
    for arguments in [&["ls"][..], &["verify"], &["export", to.to_str().unwrap()]] {
        let output = filled.run(arguments);
        assert_eq!((code(&output), out(&output).as_str()), (71, ""));
        let says = format!("{} was written by a later version", path.display());
        assert!(err(&output).starts_with(&says), "{}", err(&output));
    }
    assert!(tree(&filled.spool()) == before && !to.exists());
}

#[test]
fn damage_among_the_failed_is_found_and_costs_only_its_message() {
    let sink = Sink::scripted(|ask| match ask.is("RCPT") {
        true => Answer::reply("550 5.1.1 no such user"),
        false => Answer::Usual,
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("spool");
    let gateway = Setup::to(sink.address).spool(&path).start();
    let send = |text| {
        let mut client = Client::hello(gateway.smtp());
        client.mail("a@example.com", &["b@x.test"], content(text))
    };
    let ids = ["one", "two", "three"].map(send);
    let file = |id: &String, ending| path.join("failed").join(format!("{id}.{ending}"));
    eventually("all to be filed", || ids.iter().all(|id| file(id, "json").exists()).then_some(()));
    gateway.stop();
    assert_eq!(code(&spool(&["verify"], &path)), 0);
    fs::write(file(&ids[0], "eml"), "other").unwrap();
    fs::write(file(&ids[1], "json"), "{}").unwrap();
    let output = spool(&["verify"], &path);
    assert_eq!(code(&output), 65);
    let text = out(&output);
    assert!(
        text.contains(&format!("damaged: message {}: failed/{0}.eml has 5 octets", ids[0])),
        "{text}"
    );
    assert!(text.contains(&format!("failed/{}.json: it has no checksum", ids[1])), "{text}");
    assert_eq!(code(&spool(&["ls"], &path)), 65);
    assert_eq!(code(&spool(&["cat", &ids[0]], &path)), 65);
    let to = folder.path().join("export");
    assert_eq!(code(&spool(&["export", to.to_str().unwrap()], &path)), 65);
    let mut names: Vec<_> = fs::read_dir(&to)
        .unwrap()
        .map(|it| it.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, [format!("{}.eml", ids[2]), format!("{}.json", ids[2])]);
}

#[test]
fn a_spool_that_may_not_be_read_ends_with_71() {
    let filled = Filled::queued(&["one"]);
    let log = filled.spool().join("log");
    let mode = |mode| fs::set_permissions(&log, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o000);
    // Root may read all.
    if fs::read_dir(&log).is_err() {
        let output = filled.run(&["verify"]);
        assert_eq!(code(&output), 71);
        assert!(err(&output).contains(log.to_str().unwrap()), "{}", err(&output));
    }
    mode(0o700);
    // Nor what is no folder, whoever asks.
    fs::rename(&log, filled.folder.path().join("log")).unwrap();
    std::os::unix::fs::symlink("log", &log).unwrap();
    let output = filled.run(&["verify"]);
    assert_eq!(code(&output), 71);
    assert!(err(&output).starts_with(&format!("opening {}: ", log.display())), "{}", err(&output));
}

#[test]
fn every_exit_code_of_a_look_is_in_its_help_and_the_readme() {
    let help = out(&run(&["spool", "--help"], root()));
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, section) = readme.split_once("### The spool by hand\n").unwrap();
    let (section, _) = section.split_once("\n### ").unwrap();
    for code in ["0", "64", "65", "66", "71", "73", "75", "78"] {
        let is_listed = help.split_whitespace().any(|word| word == code);
        assert!(is_listed, "{code}: {help}");
        assert!(section.contains(&format!("\n| {code} | ")), "{code}");
    }
    let missing = ["spool", "ls", "--config", "/nonexistent/mailsluice.toml"];
    assert_eq!(code(&run(&missing, root())), 78);
}

#[test]
fn what_is_no_spool_or_not_in_it_ends_with_66() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().to_owned(), folder.path().join("missing")] {
        let output = spool(&["verify"], &path);
        assert_eq!(code(&output), 66);
        assert!(err(&output).contains("is not a spool"), "{}", err(&output));
        assert!(err(&output).contains("with --spool"), "{}", err(&output));
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    let filled = Filled::queued(&["one"]);
    let unknown = "01950000-0000-7000-8000-000000000001";
    let output = filled.run(&["cat", unknown]);
    assert_eq!(code(&output), 66);
    assert_eq!(err(&output), format!("no message {unknown} in the spool\n"));
    assert_eq!(code(&filled.run(&["cat", "nonsense"])), 64);
}

#[test]
fn a_spool_that_cannot_be_written_is_read_and_left_as_it_is() {
    let filled = Filled::queued(&["one", &"large".repeat(300_000)]);
    for name in ["lock", "tmp"] {
        // A copy may lack what holds no mail.
        let path = filled.spool().join(name);
        fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)).unwrap();
    }
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let folders = ["", "log", "bodies"].map(|name| filled.spool().join(name));
    mode(&filled.only("log"), 0o400);
    mode(&filled.only("bodies"), 0o400);
    folders.iter().for_each(|path| mode(path, 0o500));
    let before = tree(&filled.spool());
    let output = filled.run(&["verify"]);
    assert_eq!(code(&output), 0, "{}{}", out(&output), err(&output));
    assert_eq!(out(&filled.run(&["ls"])).lines().count(), 2);
    assert_eq!(code(&filled.run(&["cat", &filled.ids[1]])), 0);
    assert!(tree(&filled.spool()) == before);
    folders.iter().for_each(|path| mode(path, 0o700));
}

#[test]
fn addresses_are_shown_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("spool");
    let gateway = Setup::none("hold").spool(&path).start();
    let mut client = Client::hello(gateway.smtp());
    let from = "\"a\\ b\"@x.test";
    let to = "moc\u{202e}evil@x.test";
    client.command(&format!("MAIL FROM:<{from}> SMTPUTF8"), 250);
    client.command(&format!("RCPT TO:<{to}>"), 250);
    client.command("DATA", 354);
    client.send(stuffed(b"Subject: hi\r\n\r\nhello\r\n"));
    id(&client.expect(250));
    gateway.stop();
    let text = out(&spool(&["ls"], &path));
    assert!(text.ends_with("<\"a\\\\ b\"@x.test> <moc\\xe2\\x80\\xaeevil@x.test>\n"), "{text}");
    let json = out(&spool(&["ls", "--json"], &path));
    assert!(json.contains("moc\\u202eevil@x.test"), "{json}");
    let line: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((line["from"].as_str(), line["to"][0].as_str()), (Some(from), Some(to)));
}
