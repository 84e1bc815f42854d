//! Microsoft 365, as the sandbox plays it.

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::cloud::{Cloud, SENDER};
use crate::support::gateway::Gateway;
use crate::support::{eventually, is_slow};

const HEAD: &str = "Message-ID: <hi@example.com>\r\nDate: Tue, 24 Nov 2026 06:42:11 +0000\r\nMIME-Version: 1.0\r\n";

fn from(author: &str) -> String {
    format!("From: Some One <{author}>\r\nTo: b@example.org\r\nSubject: hi\r\n{HEAD}\r\nhello\r\n")
}

#[track_caller]
fn send(gateway: &Gateway, to: &[&str]) -> String {
    Client::hello(gateway.smtp()).mail("app@example.com", to, from(SENDER))
}

/// A message with a file of so many octets, in base64.
fn with_file(octets: usize) -> String {
    let line = format!("{}\r\n", "QUJD".repeat(19));
    let lines = octets.div_ceil(57);
    let mut out = format!(
        "From: {SENDER}\r\nTo: b@example.org\r\nSubject: large\r\n{HEAD}Content-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\nContent-Type: text/plain\r\n\r\nsee the file\r\n--x\r\nContent-Type: application/pdf; name=big.pdf\r\nContent-Disposition: attachment; filename=big.pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    );
    out.reserve(lines * line.len());
    (0..lines).for_each(|_| out.push_str(&line));
    out.push_str("--x--\r\n");
    out
}

#[test]
fn a_message_arrives_at_its_envelope_alone() {
    let cloud = Cloud::new();
    let gateway = cloud.setup().start();
    let content = format!(
        "From: Me <{SENDER}>\r\nTo: B <b@example.org>, header-only@example.org\r\nCc: c@example.org\r\nSubject: =?utf-8?q?h=C3=A9llo?=\r\n{HEAD}X-One: 1\r\n\r\nhello\r\n"
    );
    let to = ["b@example.org", "c@example.org", "hidden@example.org"];
    let id = Client::hello(gateway.smtp()).mail("bounce@example.com", &to, content);
    let mail = cloud.wait(1).remove(0);
    let mut reached = mail.to.clone();
    reached.sort();
    assert_eq!(reached, to);
    assert_eq!(mail.from, SENDER);
    let told = gateway.wait_event("delivered", |event| event["id"] == id.as_str());
    let words = told["words"].as_str().unwrap();
    assert!(words.starts_with("202 Accepted (request-id "), "{words}");
    gateway.wait_empty();

    let asked = cloud.asked("/sendMail").remove(0);
    let message = &asked.body["message"];
    assert_eq!(asked.body["saveToSentItems"], false);
    assert_eq!(message["subject"], "héllo");
    assert_eq!(message["toRecipients"].as_array().unwrap().len(), 1);
    assert_eq!(message["bccRecipients"][0]["emailAddress"]["address"], "hidden@example.org");
    assert_eq!(message["internetMessageId"], "<hi@example.com>");
    assert_eq!(asked.headers["content-type"], "application/json");
    assert_eq!(asked.headers["content-length"], asked.body_size.to_string());
    assert!(asked.headers.contains_key("client-request-id"));
    assert!(!asked.headers.contains_key("transfer-encoding"));
    // The header that nobody else is shown.
    gateway.wait_event("reduced", |event| event["id"] == id.as_str());
    assert!(gateway.metric("mailsluice_message_losses_total{kind=\"recipient\"}") >= 1.0);
    gateway.stop();
}

/// What a fault at `sendMail` comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Comes {
    /// It is tried again, and nobody but it waits.
    Again,
    /// Everyone waits a little; then it goes.
    Waits,
    /// Everyone waits for a person, or for long.
    Closed,
    /// It waits for an operator.
    Held,
    Fails,
    /// It may have been sent, and is sent once more.
    Doubt,
}

/// A fault at the first `sendMail` of one message.
#[track_caller]
fn check(fault: Value, comes: Comes, words: &str) {
    let cloud = Cloud::new();
    let mut all = json!({ "method": "POST", "path": "*/sendMail" });
    all.as_object_mut().unwrap().extend(fault.as_object().unwrap().clone());
    let acts = all["acts"] == true;
    cloud.fault(all);
    let gateway = cloud.setup().set("provider", "final_timeout = \"300ms\"").start();
    let id = send(&gateway, &["b@example.org"]);
    let event = match comes {
        Comes::Again | Comes::Waits => "deferred",
        Comes::Closed => "closed",
        Comes::Held => "held",
        Comes::Fails => "failed",
        Comes::Doubt => "in_doubt",
    };
    let told = gateway.wait_event(event, |_| true);
    assert!(told["words"].as_str().unwrap().contains(words), "{fault} {told}");
    match comes {
        Comes::Again | Comes::Waits | Comes::Doubt => {
            gateway.wait_event("delivered", |event| event["id"] == id.as_str());
            gateway.wait_empty();
            let copies = 1 + usize::from(acts && comes == Comes::Doubt);
            assert_eq!(cloud.mails().len(), copies, "{fault}");
            assert_eq!(cloud.asked("/sendMail").len(), 2, "{fault}");
            let closed = gateway.events().iter().any(|event| event["event"] == "closed");
            assert_eq!(closed, comes == Comes::Waits, "{fault}");
        }
        Comes::Closed => {
            let (status, ready) = gateway.get("/readyz");
            assert!(status == 200 && ready.contains(words), "{fault} {ready}");
            assert_eq!(cloud.mails().len(), 0, "{fault}");
            assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"queued\"}"), 1.0);
        }
        Comes::Held | Comes::Fails => {
            gateway.wait_empty();
            assert_eq!(cloud.mails().len(), 0, "{fault}");
            let state = if comes == Comes::Held { "held" } else { "failed" };
            let n = format!("mailsluice_queue_messages{{state=\"{state}\"}}");
            eventually(&n, || (gateway.metric(&n) == 1.0).then_some(()));
        }
    }
    let failed = gateway.metric("mailsluice_recipients_total{outcome=\"failed\"}");
    assert_eq!(failed > 0.0, comes == Comes::Fails, "{fault}");
    gateway.stop();
}

fn code(status: u16, code: &str) -> Value {
    json!({ "path": "*/sendMail", "status": status, "code": code, "times": null })
}

#[test]
fn a_message_that_graph_will_not_have_fails_alone() {
    check(code(400, "ErrorInvalidRecipients"), Comes::Fails, "400 ErrorInvalidRecipients: A fault");
    check(code(400, "ErrorMimeContentInvalid"), Comes::Fails, "ErrorMimeContentInvalid");
    check(code(400, "InvalidInternetMessageHeader"), Comes::Fails, "InvalidInternetMessageHeader");
    let many = "InvalidInternetMessageHeaderCollection";
    check(code(400, many), Comes::Fails, many);
    check(code(400, "RequestBodyRead"), Comes::Fails, "RequestBodyRead");
    check(code(400, "ErrorInvalidSmtpAddress"), Comes::Fails, "ErrorInvalidSmtpAddress");
    check(code(400, "ErrorMessageSizeExceeded"), Comes::Fails, "ErrorMessageSizeExceeded");
    check(json!({ "status": 413, "body": "<html>", "times": null }), Comes::Fails, "413");
}

#[test]
fn what_is_the_accounts_affair_holds_the_queue() {
    check(code(401, "InvalidAuthenticationToken"), Comes::Closed, "InvalidAuthenticationToken");
    check(code(403, "ErrorAccessDenied"), Comes::Closed, "ErrorAccessDenied");
    check(code(403, "Authorization_RequestDenied"), Comes::Closed, "Authorization_RequestDenied");
    check(code(403, "ErrorExceededMessageLimit"), Comes::Closed, "ErrorExceededMessageLimit");
    check(code(400, "ErrorSubmissionQuotaExceeded"), Comes::Closed, "ErrorSubmissionQuotaExceeded");
    check(code(403, "ErrorMessageSubmissionBlocked"), Comes::Closed, "SubmissionBlocked");
    check(code(507, "ErrorQuotaExceeded"), Comes::Closed, "the mailbox is full");
    check(code(404, "ErrorInvalidUser"), Comes::Closed, "provider.sender");
    check(code(404, "MailboxNotEnabledForRESTAPI"), Comes::Closed, "MailboxNotEnabledForRESTAPI");
    check(code(404, "ResourceNotFound"), Comes::Closed, "ResourceNotFound");
    check(code(404, "ErrorNonExistentMailbox"), Comes::Closed, "ErrorNonExistentMailbox");
    check(code(403, "Forbidden"), Comes::Closed, "Forbidden");
    let hourly = "ErrorExceededHourlyMessageLimit";
    check(code(429, hourly), Comes::Closed, hourly);
}

/// One message may be the reason itself, though its From is the mailbox: two are the mailbox's affair.
#[test]
fn a_mailbox_that_may_not_send_as_itself_holds_the_queue_from_the_second_message_on() {
    let cloud = Cloud::new();
    cloud.fault(code(403, "ErrorSendAsDenied"));
    let gateway = cloud.setup().start();
    for _ in 0..2 {
        send(&gateway, &["b@example.org"]);
    }
    let told = gateway.wait_event("closed", |_| true);
    assert!(told["words"].as_str().unwrap().contains("403 ErrorSendAsDenied"), "{told}");
    assert_eq!(cloud.mails().len(), 0);
    assert_eq!(gateway.metric("mailsluice_recipients_total{outcome=\"failed\"}"), 0.0);
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"queued\"}"), 2.0);
    gateway.stop();
}

#[test]
fn what_is_the_set_ups_affair_holds_the_queue() {
    for status in [402, 405, 406, 411, 415, 422, 501, 302, 307] {
        let fault = json!({ "status": status, "body": "no", "times": null });
        check(fault, Comes::Closed, &status.to_string());
    }
}

#[test]
fn what_passes_is_tried_again() {
    for status in [408, 409, 412, 423, 503] {
        check(json!({ "status": status, "body": "<html>" }), Comes::Again, &status.to_string());
    }
    check(code(503, "ErrorServerBusy").take_once(), Comes::Again, "503 ErrorServerBusy");
    check(code(429, "TooManyRequests").take_once(), Comes::Again, "429 TooManyRequests");
    check(code(429, "ApplicationThrottled").take_once(), Comes::Again, "ApplicationThrottled");
    check(code(429, "activityLimitReached").take_once(), Comes::Again, "activityLimitReached");
    let (store, moved) = ("ErrorMailboxStoreUnavailable", "ErrorMailboxMoveInProgress");
    check(code(503, store).take_once(), Comes::Again, store);
    check(code(503, moved).take_once(), Comes::Again, moved);
    check(json!({ "status": 400, "body": "<html>" }), Comes::Again, "400");
    // Nothing of it was read, so nothing was sent.
    check(json!({ "status": 509, "body": "" }), Comes::Again, "509");
}

#[test]
fn what_may_have_been_sent_is_sent_once_more() {
    for status in [500, 502, 504] {
        check(json!({ "status": status, "body": "<html>" }), Comes::Doubt, &status.to_string());
        let acts = json!({ "status": status, "body": "<html>", "acts": true });
        check(acts, Comes::Doubt, &status.to_string());
    }
    check(code(500, "ErrorInternalServerError").take_once(), Comes::Doubt, "ErrorInternalServer");
    check(json!({ "status": 200, "body": {} }), Comes::Doubt, "200");
    check(json!({ "then": "drop" }), Comes::Doubt, "after the message had gone out");
    check(json!({ "then": "drop", "acts": true }), Comes::Doubt, "after the message had gone out");
    check(json!({ "then": "hang" }), Comes::Doubt, "no answer within 0.3 s");
    check(
        json!({ "status": 500, "then": "truncate", "code": "UnknownError" }),
        Comes::Doubt,
        "500",
    );
}

trait Once {
    fn take_once(self) -> Self;
}

impl Once for Value {
    /// The fault is played a single time.
    fn take_once(mut self) -> Self {
        self["times"] = json!(1);
        self
    }
}

#[test]
fn nothing_is_asked_before_retry_after_is_over() {
    for (status, pause, wait) in [(429, "1.5", 1_500), (503, "2", 2_000)] {
        let cloud = Cloud::new();
        let headers = json!({ "Retry-After": pause });
        let fault = json!({ "path": "*/sendMail", "status": status, "headers": headers });
        cloud.fault(fault);
        let gateway = cloud.setup().start();
        for _ in 0..3 {
            send(&gateway, &["b@example.org"]);
        }
        cloud.wait(3);
        gateway.wait_empty();
        let asked = cloud.asked("/sendMail");
        let refused = asked.iter().find(|it| it.status == Some(status)).unwrap();
        let after = asked.iter().filter(|it| it.number > refused.number);
        // Those that were on their way at that moment aside.
        let next = after.map(|it| it.began).filter(|at| *at > refused.began + 500).min();
        assert!(next.unwrap() >= refused.began + wait, "{status}");
        assert_eq!(cloud.mails().len(), 3);
        gateway.stop();
    }
}

#[test]
fn an_answer_without_an_end_is_cut() {
    let cloud = Cloud::new();
    let fault = json!({ "path": "*/sendMail", "status": 503, "then": "endless" });
    cloud.fault(fault);
    let gateway = cloud.setup().set("provider", "data_timeout = \"1s\"").start();
    send(&gateway, &["b@example.org"]);
    cloud.wait(1);
    gateway.wait_empty();
    assert!(gateway.peak_memory_kb() < 100_000);
    gateway.stop();
}

#[test]
fn a_token_that_is_refused_is_replaced_once() {
    let cloud = Cloud::new();
    let gateway = cloud.setup().start();
    send(&gateway, &["b@example.org"]);
    cloud.wait(1);
    cloud.world.revoke_tokens();
    send(&gateway, &["b@example.org"]);
    cloud.wait(2);
    gateway.wait_empty();
    let status: Vec<_> = cloud.asked("/sendMail").iter().map(|it| it.status.unwrap()).collect();
    assert_eq!(status, [202, 401, 202]);
    assert_eq!(cloud.asked("/token").len(), 2);
    gateway.stop();
}

#[test]
fn a_wrong_secret_holds_all_and_says_why() {
    let cloud = Cloud::new();
    let mut apps = serde_json::to_value(&cloud.world.settings().apps).unwrap();
    apps[0]["secrets"] = json!(["another"]);
    cloud.set(json!({ "apps": apps }));
    let gateway = cloud.setup().start();
    send(&gateway, &["b@example.org"]);
    let closed = gateway.wait_event("closed", |_| true);
    let words = closed["words"].as_str().unwrap();
    assert!(words.contains("AADSTS7000215"), "{words}");
    let (status, ready) = gateway.get("/readyz");
    assert!(status == 200 && ready.contains("AADSTS7000215"), "{status} {ready}");
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"queued\"}"), 1.0);
    assert_eq!(cloud.asked("/sendMail").len(), 0);
    gateway.stop();
}

#[test]
fn one_recipient_that_is_refused_leaves_the_others() {
    for bad in ["invalid@example.org", "unresolved@example.org"] {
        let cloud = Cloud::new();
        let gateway = cloud.setup().start();
        let others: Vec<String> = (0..20).map(|n| format!("r{n}@example.org")).collect();
        let mut to: Vec<&str> = others.iter().map(String::as_str).collect();
        to.insert(7, bad);
        send(&gateway, &to);
        let failed = gateway.wait_event("failed", |_| true);
        assert_eq!(failed["to"], bad);
        gateway.wait_event("delivered", |event| event["to"] == "r19@example.org");
        gateway.wait_empty();
        let mut reached: Vec<String> = cloud.mails().into_iter().flat_map(|mail| mail.to).collect();
        reached.sort();
        let mut all = others.clone();
        all.sort();
        assert_eq!(reached, all, "each once");
        assert!(cloud.asked("/sendMail").len() <= 16, "{}", cloud.asked("/sendMail").len());
        gateway.stop();
    }
}

#[test]
fn what_graph_cannot_write_fails_alone_and_is_not_sent() {
    let cloud = Cloud::new();
    let gateway = cloud.setup().start();
    let to = ["\"a b\"@example.org", "b@example.org", "c@[192.0.2.1]", "d@localhost"];
    send(&gateway, &to);
    let mail = cloud.wait(1).remove(0);
    assert_eq!(mail.to, ["b@example.org"]);
    gateway.wait_event("delivered", |_| true);
    gateway.wait_empty();
    let failed = gateway.events().into_iter().filter(|event| event["event"] == "failed").count();
    assert_eq!(failed, 3);
    gateway.stop();
}

#[test]
fn an_alias_goes_through_the_sender_and_is_remembered() {
    let cloud = Cloud::new();
    let gateway = cloud.setup().start();
    for n in 1..=2 {
        let list = "list@contoso.test";
        Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], from(list));
        let mail = cloud.wait(n).pop().unwrap();
        assert_eq!(mail.from, list);
        gateway.wait_empty();
    }
    let paths: Vec<_> = cloud.asked("/sendMail").into_iter().map(|it| it.path).collect();
    assert_eq!(paths.len(), 3, "{paths:?}");
    assert!(paths[0].contains("/users/list@") && paths[1..].iter().all(|it| it.contains(SENDER)));

    // Without the right to send as it, that message alone waits.
    let other = "missing@contoso.test";
    Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], from(other));
    let held = gateway.wait_event("held", |_| true);
    assert!(held["words"].as_str().unwrap().contains("ErrorSendAsDenied"), "{held}");
    send(&gateway, &["b@example.org"]);
    cloud.wait(3);
    gateway.stop();
}

#[test]
fn another_mailbox_of_the_tenant_sends_for_itself() {
    let cloud = Cloud::new();
    let gateway = cloud.setup().start();
    let author = "o'neill+x@contoso.test";
    Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], from(author));
    assert_eq!(cloud.wait(1)[0].from, author);
    let path = &cloud.asked("/sendMail")[0].path;
    assert!(path.contains("/users/o%27neill%2Bx@contoso.test/"), "{path}");
    gateway.stop();
}

#[test]
fn a_null_reverse_path_leaves_from_the_sender() {
    let cloud = Cloud::new();
    let gateway = cloud.setup().start();
    let content = from("mailer-daemon@elsewhere.test");
    Client::hello(gateway.smtp()).mail("", &["b@example.org"], content);
    assert_eq!(cloud.wait(1)[0].from, SENDER);
    let headers = cloud.asked("/sendMail")[0].body["message"]["internetMessageHeaders"].clone();
    assert!(headers.to_string().contains("X-Auto-Response-Suppress"), "{headers}");
    gateway.stop();
}

#[test]
fn a_large_message_goes_by_draft_and_upload() {
    let cloud = Cloud::new();
    let gateway = cloud.setup().start();
    let content = with_file(9_000_000);
    let to = ["b@example.org", "hidden@example.org"];
    Client::hello(gateway.smtp()).mail("app@example.com", &to, content);
    let mail = cloud.wait(1).remove(0);
    assert_eq!(mail.to, to);
    gateway.wait_event("delivered", |event| event["to"] == "hidden@example.org");
    gateway.wait_empty();
    let stored = serde_json::to_value(mail.stored.unwrap().as_ref()).unwrap();
    let attachment = &stored["attachments"][0];
    assert_eq!(attachment["name"], "big.pdf", "{stored}");
    assert_eq!(attachment["size"], 9_000_000_u64.div_ceil(57) * 57, "{attachment}");
    let puts: Vec<_> = cloud.world.requests().into_iter().filter(|it| it.method == "PUT").collect();
    assert!(puts.len() == 3 && puts.iter().all(|put| put.body_size < 4_000_000));
    assert!(puts.iter().all(|put| !put.headers.contains_key("authorization")));
    let sent = cloud.asked("/send").remove(0);
    assert_eq!(sent.headers["content-length"], "0");
    // The URL of the upload is a secret.
    assert!(!gateway.log_text().contains("authtoken"));
    gateway.stop();
}

#[test]
fn an_upload_that_breaks_is_gone_on_with() {
    for fault in [
        json!({ "status": 503, "body": "" }),
        json!({ "then": "drop" }),
        json!({ "status": 500, "body": "", "acts": true }),
        json!({ "status": 416, "code": "invalidRange" }),
    ] {
        let cloud = Cloud::new();
        let mut all = json!({ "method": "PUT", "skip": 1 });
        all.as_object_mut().unwrap().extend(fault.as_object().unwrap().clone());
        cloud.fault(all);
        let gateway = cloud.setup().start();
        let content = with_file(9_000_000);
        Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], content);
        cloud.wait(1);
        gateway.wait_empty();
        assert_eq!(cloud.asked("/messages").len(), 1, "one draft: {fault}");
        let delivered = gateway.events().into_iter().any(|event| event["event"] == "deferred");
        assert!(!delivered, "{fault}");
        gateway.stop();
    }
}

#[test]
fn an_upload_is_complete_with_201_and_nothing_else() {
    // In the middle the session is asked once; at the end nothing is sent.
    for (skip, drafts) in [(0, 1), (2, 2)] {
        let cloud = Cloud::new();
        cloud.fault(
            json!({ "method": "PUT", "skip": skip, "status": 200, "body": "{}", "acts": true }),
        );
        let gateway = cloud.setup().start();
        let content = with_file(9_000_000);
        Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], content);
        cloud.wait(1);
        gateway.wait_empty();
        let made = cloud.world.requests();
        let made = made.iter().filter(|it| it.method == "POST" && it.path.ends_with("/messages"));
        assert_eq!((made.count(), cloud.mails().len()), (drafts, 1), "{skip}");
        let looks = cloud.world.requests().iter().filter(|it| it.method == "GET").count();
        assert_eq!(looks, 1, "the session is asked once: {skip}");
        assert!(!gateway.events().iter().any(|event| event["event"] == "in_doubt"), "{skip}");
        gateway.stop();
    }
}

#[test]
fn a_draft_that_may_not_be_made_holds_no_other_message() {
    let cloud = Cloud::new();
    cloud.fault(json!({ "method": "POST", "path": "*/messages", "status": 403, "code": "ErrorAccessDenied", "times": null }));
    let gateway = cloud.setup().start();
    Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], with_file(4_000_000));
    let told = gateway.wait_event("held", |_| true);
    assert!(told["words"].as_str().unwrap().contains("Mail.ReadWrite"), "{told}");
    send(&gateway, &["b@example.org"]);
    cloud.wait(1);
    assert!(!gateway.events().iter().any(|event| event["event"] == "closed"));
    gateway.stop();
}

#[test]
fn mime_that_is_too_large_goes_as_json_where_no_draft_can_be_made() {
    let cloud = Cloud::new();
    cloud.rights(&["Mail.Send"], &[]);
    cloud.fault(json!({ "path": "*/sendMail", "status": 413, "body": "" }));
    let gateway = cloud.setup().set("provider", "format = \"mime\"").start();
    send(&gateway, &["b@example.org"]);
    cloud.wait(1);
    gateway.wait_empty();
    let asked = cloud.asked("/sendMail");
    let forms: Vec<_> = asked.iter().map(|it| it.headers["content-type"].as_str()).collect();
    assert_eq!(forms, ["text/plain", "application/json"]);
    gateway.stop();
}

#[test]
fn a_draft_that_fails_is_deleted_and_begun_again() {
    let cloud = Cloud::new();
    cloud.fault(
        json!({ "method": "POST", "path": "*/createUploadSession", "status": 503, "body": "" }),
    );
    let gateway = cloud.setup().start();
    Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], with_file(4_000_000));
    cloud.wait(1);
    gateway.wait_empty();
    let deleted = cloud.asked("/permanentDelete").len();
    assert_eq!((deleted, cloud.asked("/messages").len()), (1, 2));
    gateway.stop();

    // A draft may not be found at once, and may be gone at last.
    let cloud = Cloud::new();
    let gone = |path: &str| json!({ "method": "POST", "path": path, "status": 404, "code": "ErrorItemNotFound" });
    cloud.fault(gone("*/createUploadSession"));
    cloud.fault(gone("*/send"));
    let gateway = cloud.setup().start();
    Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], with_file(4_000_000));
    cloud.wait(1);
    gateway.wait_empty();
    assert_eq!((cloud.asked("/messages").len(), cloud.mails().len()), (2, 1));
    assert!(!gateway.events().iter().any(|event| event["event"] == "in_doubt"));
    gateway.stop();
}

#[test]
fn without_the_right_large_messages_are_refused_at_once() {
    let cloud = Cloud::new();
    cloud.rights(&["Mail.Send"], &[]);
    let gateway = cloud.setup().start();
    let mut client = Client::connect(gateway.smtp());
    let ehlo = client.command("EHLO client.test", 250);
    assert!(ehlo.contains("SIZE 4000000"), "{ehlo}");
    let refused = client.command("MAIL FROM:<a@example.com> SIZE=5000000", 552);
    assert!(refused.contains("5.3.4") && refused.contains("Mail.ReadWrite"), "{refused}");

    // The rare one below it whose request does not fit fails with the same code.
    let text =
        "a line of a text that is a file, eighty octets of it, again and again and again\r\n";
    let head = with_file(0).replace("base64", "8bit").replace("--x--\r\n", "");
    let content = format!("{head}{}--x--\r\n", text.repeat(45_000));
    assert!((3_000_000..4_000_000).contains(&content.len()));
    Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], &content);
    let told = gateway.wait_event("failed", |_| true);
    assert!(told["words"].as_str().unwrap().contains("octets"), "{told}");
    gateway.stop();

    // With rights that no token shows, the operator says so.
    cloud.rights(&["Mail.Send"], &["Mail.ReadWrite"]);
    let gateway = cloud.setup().set("provider", "large_messages = \"on\"").start();
    Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], with_file(5_000_000));
    cloud.wait(1);
    gateway.stop();
}

#[test]
fn a_doubt_is_settled_by_what_is_found_and_by_nothing_else() {
    // Kept in Sent Items, so that it is found.
    let cloud = Cloud::new();
    cloud.fault(json!({ "path": "*/sendMail", "then": "drop", "acts": true }));
    let setup = cloud.setup().set("provider", "save_to_sent_items = true");
    let gateway = setup.start();
    let id = send(&gateway, &["b@example.org"]);
    let told = gateway.wait_event("delivered", |event| event["id"] == id.as_str());
    assert!(told["words"].as_str().unwrap().contains("mailsluice-id"), "{told}");
    gateway.wait_empty();
    assert_eq!((cloud.mails().len(), cloud.asked("/sendMail").len()), (1, 1));
    assert!(!gateway.events().iter().any(|event| event["event"] == "in_doubt"));
    gateway.stop();

    // Where we may not look there is no telling.
    let cloud = Cloud::new();
    cloud.rights(&["Mail.Send"], &[]);
    cloud.fault(json!({ "path": "*/sendMail", "then": "drop", "acts": true }));
    let gateway = cloud.setup().set("provider", "save_to_sent_items = true").start();
    send(&gateway, &["b@example.org"]);
    gateway.wait_event("in_doubt", |_| true);
    cloud.wait(2);
    gateway.wait_empty();
    // By retry.in_doubt it is held at once.
    let cloud = Cloud::new();
    cloud.fault(json!({ "path": "*/sendMail", "then": "drop", "acts": true }));
    let gateway = cloud.setup().set("retry", "in_doubt = \"hold\"").start();
    send(&gateway, &["b@example.org"]);
    gateway.wait_event("held", |_| true);
    assert_eq!(cloud.mails().len(), 1);
    gateway.stop();
}

#[test]
fn a_draft_in_doubt_is_sent_once() {
    for acts in [true, false] {
        let cloud = Cloud::new();
        cloud.fault(json!({ "method": "POST", "path": "*/send", "then": "drop", "acts": acts }));
        let gateway = cloud.setup().start();
        let content = with_file(4_000_000);
        Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], content);
        gateway.wait_event("delivered", |_| true);
        gateway.wait_empty();
        assert_eq!((cloud.mails().len(), cloud.asked("/messages").len() > 1), (1, true), "{acts}");
        let drafts = cloud.world.requests();
        let made = drafts.iter().filter(|it| it.method == "POST" && it.path.ends_with("/messages"));
        assert_eq!(made.count(), 1, "{acts}");
        gateway.stop();
    }
}

#[test]
fn a_doubt_of_a_former_run_is_looked_for_first() {
    let cloud = Cloud::new();
    cloud.fault(json!({ "path": "*/sendMail", "then": "hang", "acts": true }));
    let spool = tempfile::tempdir().unwrap();
    let setup = cloud.setup().spool(spool.path()).set("provider", "save_to_sent_items = true");
    let gateway = setup.start();
    send(&gateway, &["b@example.org"]);
    cloud.wait(1);
    drop(gateway.kill());
    let gateway = setup.start();
    gateway.wait_event("in_doubt", |_| true);
    let told = gateway.wait_event("delivered", |_| true);
    assert!(told["words"].as_str().unwrap().contains("mailsluice-id"), "{told}");
    gateway.wait_empty();
    assert_eq!((cloud.mails().len(), cloud.asked("/sendMail").len()), (1, 1));
    gateway.stop();
}

#[test]
fn no_secret_is_in_the_log() {
    let cloud = Cloud::new();
    let gateway = cloud.setup().set("log", "level = \"trace\"").start();
    send(&gateway, &["b@example.org"]);
    Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], with_file(4_000_000));
    cloud.wait(2);
    cloud.fault(code(401, "InvalidAuthenticationToken"));
    send(&gateway, &["b@example.org"]);
    gateway.wait_event("closed", |_| true);
    let (log, metrics) = (gateway.log_text(), gateway.get("/metrics").1);
    let secret = mailsluice::sandbox::graph::settings::SECRET;
    for text in [&log, &metrics] {
        assert!(!text.contains(secret) && !text.contains("authtoken"));
        // A token is a JWT.
        assert!(!text.contains("eyJ"), "{text}");
    }
    assert!(log.contains("graph: POST"), "the log is at trace");
    gateway.stop();
}

#[test]
fn large_messages_are_never_whole_in_memory() {
    let cloud = Cloud::with(json!({ "limits": {}, "message_size": 60_000_000 }));
    let content = with_file(22_000_000);
    assert!(content.len() > 30_000_000);
    let gateway = cloud.setup().start();
    Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], &content);
    cloud.wait(1);
    gateway.wait_empty();
    let peak = gateway.peak_memory_kb();
    assert!(peak < 64_000, "{peak} kB");
    gateway.stop();
}

#[test]
fn many_large_messages_at_once_take_little_memory() {
    if !is_slow() {
        return;
    }
    let settings = json!({ "limits": { "concurrency": null }, "message_size": 60_000_000 });
    let cloud = Cloud::with(settings);
    let content = with_file(22_000_000);
    let gateway = cloud.setup().set("throttle", "concurrency = 4").start();
    std::thread::scope(|scope| {
        for _ in 0..40 {
            scope.spawn(|| {
                let mut client = Client::hello(gateway.smtp());
                client.mail("app@example.com", &["b@example.org"], &content);
            });
        }
    });
    for n in (5..=40).step_by(5) {
        let arrived = || (cloud.world.inbox.arrived() >= n).then_some(());
        eventually(&format!("{n} messages"), arrived);
    }
    gateway.wait_empty();
    let peak = gateway.peak_memory_kb();
    assert!(peak < 256_000, "{peak} kB");
    gateway.stop();
}

#[test]
fn a_pause_that_comes_with_a_success_is_for_the_next() {
    let cloud = Cloud::new();
    let headers = json!({ "Retry-After": "1.5" });
    cloud.fault(json!({ "path": "*/sendMail", "status": 202, "acts": true, "headers": headers }));
    let gateway = cloud.setup().start();
    let id = send(&gateway, &["b@example.org"]);
    gateway.wait_event("delivered", |event| event["id"] == id.as_str());
    send(&gateway, &["c@example.org"]);
    cloud.wait(2);
    gateway.wait_empty();
    let asked = cloud.asked("/sendMail");
    assert_eq!(asked.len(), 2, "each once");
    assert!(asked[1].began >= asked[0].began + 1_400);
    gateway.stop();
}

#[test]
fn a_header_that_is_refused_does_not_fail_the_message() {
    let cloud = Cloud::new();
    cloud.fault(code(400, "InvalidInternetMessageHeader").take_once());
    let gateway = cloud.setup().start();
    let content = format!(
        "From: {SENDER}\r\nTo: b@example.org\r\nIn-Reply-To: <a@b>\r\nX-One: 1\r\n{HEAD}\r\nhello\r\n"
    );
    Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], content);
    cloud.wait(1);
    gateway.wait_empty();
    let asked = cloud.asked("/sendMail");
    assert_eq!(asked.len(), 2);
    let message = &asked[1].body["message"];
    assert!(message["internetMessageHeaders"].is_null(), "{message}");
    // Our own mark stays.
    let properties = message["singleValueExtendedProperties"].as_array().unwrap();
    assert_eq!(properties.len(), 1, "{message}");
    assert!(!gateway.events().iter().any(|event| event["event"] == "deferred"));
    gateway.stop();
}

#[test]
fn many_small_files_go_one_by_one() {
    let cloud = Cloud::new();
    let gateway = cloud.setup().start();
    let file = format!(
        "--x\r\nContent-Type: application/pdf; name=small.pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n{}",
        format!("{}\r\n", "QUJD".repeat(19)).repeat(15_000)
    );
    let content =
        with_file(1_000_000).replace("--x--\r\n", &format!("{}--x--\r\n", file.repeat(5)));
    Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], content);
    let stored = cloud.wait(1).remove(0).stored.unwrap();
    gateway.wait_empty();
    let stored = serde_json::to_value(stored.as_ref()).unwrap();
    let sizes: Vec<_> = stored["attachments"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["size"].as_u64().unwrap())
        .collect();
    assert_eq!(sizes, [1_000_008, 855_000, 855_000, 855_000, 855_000, 855_000]);
    assert_eq!(cloud.asked("/attachments").len(), 6);
    gateway.stop();
}

#[test]
fn mail_waits_for_a_cloud_that_cannot_be_reached() {
    let cloud = Cloud::new();
    let setup = cloud.setup();
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gateway = setup.set("provider.endpoints", &format!("login = \"http://{dead}\"")).start();
    send(&gateway, &["b@example.org"]);
    let closed = gateway.wait_event("closed", |_| true);
    assert_eq!((&closed["scope"], &closed["stage"]), (&"provider".into(), &"connect".into()));
    assert_eq!(gateway.metric("mailsluice_queue_messages{state=\"queued\"}"), 1.0);
    assert_eq!(gateway.metric("mailsluice_in_doubt_total"), 0.0);
    gateway.stop();
}

#[test]
fn a_signed_message_goes_as_mime_to_its_envelope() {
    let cloud = Cloud::new();
    let gateway = cloud.setup().start();
    let content = format!(
        "From: {SENDER}\r\nTo: b@example.org, header-only@example.org\r\n{HEAD}Content-Type: multipart/signed; protocol=\"application/pkcs7-signature\"; micalg=sha-256; boundary=x\r\n\r\n--x\r\nContent-Type: text/plain\r\n\r\nsigned\r\n--x\r\nContent-Type: application/pkcs7-signature; name=smime.p7s\r\nContent-Transfer-Encoding: base64\r\n\r\nQUJD\r\n--x--\r\n"
    );
    let to = ["b@example.org", "hidden@example.org"];
    Client::hello(gateway.smtp()).mail("app@example.com", &to, &content);
    let mail = cloud.wait(1).remove(0);
    let mut reached = mail.to.clone();
    reached.sort();
    assert_eq!(reached, to);
    assert_eq!(cloud.asked("/sendMail")[0].headers["content-type"], "text/plain");
    let sent = String::from_utf8_lossy(&mail.content).into_owned();
    let signed = &content[content.find("--x").unwrap()..];
    assert!(sent.ends_with(signed), "{sent}");
    gateway.stop();
}

#[test]
fn what_a_crash_leaves_of_a_draft_is_never_sent() {
    let cloud = Cloud::new();
    let spool = tempfile::tempdir().unwrap();
    let setup = cloud.setup().spool(spool.path());
    // Once in the middle of the upload, once when it is to be sent.
    cloud.fault(json!({ "method": "PUT", "skip": 1, "then": "hang" }));
    cloud.fault(json!({ "method": "POST", "path": "*/send", "then": "hang" }));
    let gateway = setup.start();
    let content = with_file(9_000_000);
    Client::hello(gateway.smtp()).mail("app@example.com", &["b@example.org"], &content);
    let hangs = |n: usize| {
        eventually("a request that hangs", || {
            let hung = cloud.world.requests().iter().filter(|it| it.fault.is_some()).count();
            (hung == n).then_some(())
        });
    };
    hangs(1);
    drop(gateway.kill());
    let gateway = setup.start();
    hangs(2);
    drop(gateway.kill());
    let gateway = setup.start();
    gateway.wait_event("in_doubt", |_| true);
    let mail = cloud.wait(1).remove(0);
    gateway.wait_event("delivered", |_| true);
    gateway.wait_empty();
    assert_eq!(cloud.mails().len(), 1);
    let stored = serde_json::to_value(mail.stored.unwrap().as_ref()).unwrap();
    assert_eq!(stored["attachments"][0]["size"], 9_000_000_u64.div_ceil(57) * 57);
    let deleted = cloud.asked("/permanentDelete").len();
    assert_eq!(deleted, 2, "the drafts of the former runs");
    gateway.stop();
}

#[test]
fn a_right_that_is_taken_away_holds_all_and_given_back_lets_it_go() {
    let cloud = Cloud::new();
    let gateway = cloud.setup().start();
    cloud.rights(&[], &[]);
    let ids: Vec<_> = (0..3).map(|_| send(&gateway, &["b@example.org"])).collect();
    let closed = gateway.wait_event("closed", |_| true);
    let words = closed["words"].as_str().unwrap();
    assert!(words.contains("ErrorAccessDenied") && words.contains("Mail.Send"), "{words}");
    let (_, ready) = gateway.get("/readyz");
    assert!(ready.contains("ErrorAccessDenied"), "{ready}");
    cloud.rights(&["Mail.Send"], &[]);
    cloud.wait(3);
    for id in ids {
        gateway.wait_event("delivered", |event| event["id"] == id.as_str());
    }
    gateway.wait_empty();
    assert_eq!(cloud.mails().len(), 3);
    assert_eq!(gateway.metric("mailsluice_recipients_total{outcome=\"failed\"}"), 0.0);
    gateway.stop();
}

#[test]
fn many_recipients_go_in_parts_each_to_its_own() {
    let cloud = Cloud::new();
    let gateway = cloud.setup().set("provider", "max_recipients = 2").start();
    let to = ["b@example.org", "c@example.org", "d@example.org", "e@example.org", "f@example.org"];
    send(&gateway, &to);
    let mails = cloud.wait(3);
    gateway.wait_event("delivered", |event| event["to"] == "f@example.org");
    gateway.wait_empty();
    let parts: Vec<_> = mails.iter().map(|mail| mail.to.len()).collect();
    assert_eq!(parts, [2, 2, 1]);
    let mut reached: Vec<_> = mails.into_iter().flat_map(|mail| mail.to).collect();
    reached.sort();
    assert_eq!(reached, to);
    // Only the first part has the one that the header names.
    let visible = |at: usize| cloud.asked("/sendMail")[at].body["message"]["toRecipients"].clone();
    assert!(visible(0).to_string().contains("b@example.org"));
    assert!(!visible(1).to_string().contains("example.org"), "{}", visible(1));
    gateway.stop();
}
