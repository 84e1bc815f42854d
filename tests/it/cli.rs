//! The commands, their output and their exit codes.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::support::gateway::{BINARY, Setup};
use crate::support::sink::Sink;

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
        let output = run(&["check", "--config", "config.toml"], &folder);
        assert_eq!(err(&output).trim_end(), expected.trim_end(), "{}", folder.display());
        assert_eq!((code(&output), out(&output).as_str()), (78, ""), "{}", folder.display());
        seen += 1;
    }
    assert!(seen >= 40, "{seen} cases");
}

#[test]
fn check_takes_the_shipped_configuration() {
    let output = run(&["check", "--config", "config/mailsluice.toml"], root());
    assert_eq!((code(&output), err(&output).as_str()), (0, ""));
    assert_eq!(out(&output), "config/mailsluice.toml: no problems found\n");
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
    for word in ["run", "check", "health", "sandbox", "version", "Exit codes"] {
        assert!(out(&help).contains(word), "{word}");
    }
    for command in ["run", "check", "health", "sandbox", "version"] {
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
