//! What `mailsluice explain` says, of either provider.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::gateway::{BINARY, Setup};

const MESSAGE: &str = "From: Boss <boss@elsewhere.test>\nTo: B <b@example.org>, c@example.org\nBcc: d@example.org\nSubject: hi\nPrecedence: bulk\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=x\n\n--x\nContent-Type: text/plain\n\na secret text\n--x\nContent-Type: application/pdf; name=a.pdf\nContent-Transfer-Encoding: base64\n\nQUJDRA==\n--x--\n";

fn microsoft365() -> Setup {
    Setup::none("hold")
        .unset("provider", "on_mail")
        .set("sender", "policy = \"rewrite\"")
        .set("provider", "kind = \"microsoft365\"")
        .set("provider", "sender = \"reports@contoso.test\"")
        .set("provider", "tenant_id = \"contoso.test\"")
        .set("provider", "client_id = \"11111111-2222-3333-4444-555555555555\"")
        // Not there: nothing of a secret is read.
        .set("provider", "client_secret_file = \"/nowhere/secret\"")
}

fn explain(setup: &Setup, message: &str, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("config.toml", &setup.text(folder.path()));
    write("mail.eml", message);
    let mut command = Command::new(BINARY);
    command.args(["explain", "mail.eml", "--config", "config.toml"]).args(arguments);
    command.current_dir(folder.path() as &Path).output().unwrap()
}

#[track_caller]
fn said(setup: &Setup, message: &str, arguments: &[&str]) -> String {
    let output = explain(setup, message, arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn explain_shows_the_way_and_the_losses_of_microsoft_365() {
    let text = said(&microsoft365(), MESSAGE, &[]);
    let has = |what: &str| assert!(text.contains(what), "{what}\n{text}");
    has("provider   microsoft365\nway        json: ");
    has("sender     reports@contoso.test\n");
    has("recipients b@example.org, c@example.org, d@example.org\n");
    has("header field Bcc is not sent");
    has("header field From becomes From: Boss <reports@contoso.test>");
    has("added: header field Reply-To");
    assert!(!text.contains("added: header field Received"), "{text}");
    has("Precedence");
    has("POST /v1.0/users/reports@contoso.test/sendMail (");
    has("\"contentBytes\": \"(4 octets)\"");
    assert!(!text.contains("a secret text") && !text.contains("QUJDRA"), "{text}");

    let json: Value = serde_json::from_str(&said(&microsoft365(), MESSAGE, &["--json"])).unwrap();
    assert_eq!((&json["provider"], &json["way"]), (&"microsoft365".into(), &"json".into()));
    let message = &json["requests"][0]["body"]["message"];
    assert_eq!(message["subject"], "hi");
    assert_eq!(message["bccRecipients"][0]["emailAddress"]["address"], "d@example.org");
    assert_eq!(message["body"]["content"].as_str().unwrap().chars().next(), Some('('));
}

#[test]
fn explain_shows_each_way_of_microsoft_365() {
    let way = |setup: &Setup, message: &str, arguments: &[&str]| -> Value {
        let arguments = [&["--json"], arguments].concat();
        serde_json::from_str(&said(setup, message, &arguments)).unwrap()
    };
    let mime = way(&microsoft365().set("provider", "format = \"mime\""), MESSAGE, &[]);
    assert_eq!(mime["way"], "mime");
    assert!(mime["requests"][0]["body"].as_str().unwrap().contains("Subject: hi"), "{mime}");
    let copies = |json: &Value| {
        json["changes"].as_array().unwrap().iter().filter(|it| it["kind"] == "copy").count()
    };
    assert_eq!(copies(&mime), 1, "{mime}");

    let large = MESSAGE.replace("QUJDRA==\n", &format!("{}\n", "QUJD".repeat(19)).repeat(90_000));
    let draft = way(&microsoft365(), &large, &[]);
    assert_eq!((&draft["way"], copies(&draft)), (&"draft".into(), 1), "{draft}");
    let requests = draft["requests"].as_array().unwrap();
    let starts = |at: usize, with: &str| {
        let request = requests[at]["request"].as_str().unwrap();
        assert!(request.starts_with(with), "{request}");
    };
    starts(0, "POST /v1.0/users/reports@contoso.test/messages (");
    starts(1, "POST /v1.0/users/reports@contoso.test/messages/ID/attachments/createUploadSession");
    starts(2, "POST /v1.0/users/reports@contoso.test/messages/ID/send");
    assert!(draft["remarks"][0].as_str().unwrap().contains("Mail.ReadWrite"));

    let off = microsoft365().set("provider", "large_messages = \"off\"");
    let refused = way(&off, &large, &[]);
    assert_eq!(refused["way"], "refused");
    assert!(refused["refused"][0]["why"].as_str().unwrap().contains("octets"), "{refused}");

    let odd = way(&microsoft365(), MESSAGE, &["--to", "x@localhost", "--to", "b@example.org"]);
    assert_eq!(odd["refused"][0]["what"], "x@localhost");
    assert_eq!(odd["way"], "json");
}

#[test]
fn explain_shows_what_smtp_changes() {
    let setup = Setup::to("127.0.0.1:25".parse().unwrap())
        .set("sender", "policy = \"rewrite\"")
        .set("provider", "sender = \"reports@contoso.test\"");
    let text = said(&setup, MESSAGE, &[]);
    let has = |what: &str| assert!(text.contains(what), "{what}\n{text}");
    has("provider   smtp\nway        smtp: ");
    has("MAIL FROM:<reports@contoso.test> SIZE=");
    has("RCPT TO:<d@example.org>");
    has("header field From becomes From: Boss <reports@contoso.test>");
    has("header field Bcc is not sent");
    has("added: header field Received");
    assert!(!text.contains("Precedence"), "{text}");
}

#[test]
fn explain_says_what_it_lacks() {
    let nobody = "From: a@b.test\n\nhello\n";
    let output = explain(&microsoft365(), nobody, &[]);
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--to"));
    let output = explain(&microsoft365().unset("provider", "sender"), MESSAGE, &[]);
    assert_eq!(output.status.code(), Some(78));
    // Whatever is in the file.
    let mut hostile = vec![b'x'; 300_000];
    (0..hostile.len()).step_by(7).for_each(|at| hostile[at] = (at % 251) as u8);
    let hostile = String::from_utf8_lossy(&hostile).into_owned();
    said(&microsoft365(), &hostile, &["--from", "", "--to", "b@example.org"]);
}
