use super::*;

/// The message as the provider's own sender, by one request that went out to its end.
fn case(step: Step) -> Case {
    Case {
        step,
        body_out: true,
        own_mailbox: true,
        from_is_mailbox: true,
        null_reverse_path: false,
    }
}

fn body(code: &str) -> Vec<u8> {
    match code {
        "" => b"<html><body>Bad Gateway</body></html>".to_vec(),
        code => format!(r#"{{"error":{{"code":"{code}","message":"No."}}}}"#).into_bytes(),
    }
}

fn describe(verdict: &Verdict) -> String {
    let Verdict::Refused { outcome, first } = verdict else { return "taken".to_owned() };
    let cause = outcome.cause().unwrap();
    let mut out = format!("{} {} {}", outcome.label(), cause.scope.label(), cause.stage.label());
    if let Some(wait) = cause.retry_after {
        out += &format!(" {}s", wait.as_secs_f64());
    }
    if let Some(EnhancedStatus(class, subject, detail)) = cause.status {
        out += &format!(" {class}.{subject}.{detail}");
    }
    for (is, name) in [(cause.lost, "lost"), (cause.maybe_sent, "maybe"), (cause.null_path, "null")]
    {
        if is {
            out += &format!(" {name}");
        }
    }
    if let Some(first) = first {
        out += &format!(" +{first:?}");
    }
    out
}

#[track_caller]
fn judge(case: Case, status: u16, code: &str, wait: Option<f64>, expected: &str) {
    let wait = wait.map(Duration::from_secs_f64);
    let answer = Answer::read(status, Some("r-1"), wait, &body(code));
    let shown = describe(&verdict(&answer, case));
    assert_eq!(shown, expected, "{case:?} {status} {code} {wait:?}");
}

#[track_caller]
fn check(status: u16, code: &str, expected: &str) {
    judge(case(Step::SendMail), status, code, None, expected);
}

#[track_caller]
fn check_at(step: Step, status: u16, code: &str, expected: &str) {
    judge(case(step), status, code, None, expected);
}

#[test]
fn only_the_success_that_is_due_is_one() {
    check(202, "", "taken");
    for status in [200, 201, 203, 204, 206, 299] {
        check(status, "", "deferred message send_mail lost maybe");
    }
    check(200, "ErrorInvalidRecipients", "deferred message send_mail lost maybe");
    check_at(Step::Send, 202, "", "taken");
    check_at(Step::Send, 200, "", "deferred message send lost maybe");
    check_at(Step::Send, 204, "", "deferred message send lost maybe");
    check_at(Step::Create, 201, "", "taken");
    check_at(Step::Create, 202, "", "deferred message draft lost");
    check_at(Step::Attach, 201, "", "taken");
    check_at(Step::Attach, 204, "", "deferred message draft lost");
    check_at(Step::Session, 201, "", "taken");
    check_at(Step::Session, 200, "", "taken");
    check_at(Step::Range, 200, "", "taken");
    check_at(Step::Range, 201, "", "taken");
    check_at(Step::Range, 202, "", "taken");
    check_at(Step::Range, 204, "", "deferred message upload lost");
    check_at(Step::Find, 200, "", "taken");
}

#[test]
fn a_recipient_is_refused_alone() {
    let fails = "failed recipient send_mail 5.1.3 +FewerRecipients";
    check(400, "ErrorInvalidRecipients", fails);
    check(400, "errorinvalidrecipients", fails);
    check(400, "ErrorInvalidSmtpAddress", fails);
    check(400, "ErrorRecipientNotFound", fails);
    check(403, "ErrorInvalidRecipients", fails);
    // Of what may have been taken nobody is told that it failed.
    check(500, "ErrorInvalidRecipients", "deferred message send_mail lost maybe");
    judge(
        Case { body_out: false, ..case(Step::SendMail) },
        500,
        "ErrorInvalidRecipients",
        None,
        fails,
    );
    check_at(
        Step::Create,
        400,
        "ErrorInvalidRecipients",
        "failed recipient draft 5.1.3 +FewerRecipients",
    );
    check_at(
        Step::Send,
        400,
        "ErrorInvalidRecipients",
        "failed recipient send 5.1.3 +FewerRecipients",
    );
    check(400, "ErrorRecipientLimitExceeded", "failed message send_mail 5.5.3 +FewerRecipients");
    check(403, "ErrorTooManyRecipients", "failed message send_mail 5.5.3 +FewerRecipients");
}

#[test]
fn what_is_wrong_with_the_request_fails_the_message_and_the_extras_go_first() {
    let fails = "failed message send_mail 5.6.0 +WithoutExtras";
    for code in [
        "InvalidInternetMessageHeader",
        "InvalidInternetMessageHeaderCollection",
        "invalidinternetmessageheader",
        "ErrorMimeContentInvalid",
        "ErrorMimeContentInvalidBase64String",
        "ErrorMimeContentConversionFailed",
        "ErrorInvalidExtendedProperty",
        "ErrorInvalidExtendedPropertyValue",
        "RequestBodyRead",
        "BadRequest",
        "invalidRequest",
    ] {
        check(400, code, fails);
    }
    check(422, "BadRequest", fails);
    check_at(Step::Create, 400, "BadRequest", "failed message draft 5.6.0 +WithoutExtras");
    check_at(Step::Send, 400, "BadRequest", "failed message send 5.6.0 +WithoutExtras");
    // What nobody knows fails nothing at once.
    check(400, "SomethingNew", "deferred message send_mail +WithoutExtras");
    check_at(Step::Create, 400, "SomethingNew", "deferred message draft +WithoutExtras");
    check_at(Step::Send, 400, "SomethingNew", "deferred message send +WithoutExtras");
    judge(
        case(Step::SendMail),
        400,
        "New",
        Some(9.0),
        "deferred message send_mail 9s +WithoutExtras",
    );
    // Of a file, another draft may help.
    for code in ["BadRequest", "SomethingNew", ""] {
        check_at(Step::Attach, 400, code, "deferred message draft +NewDraft");
        check_at(Step::Session, 400, code, "deferred message upload +NewDraft");
        check_at(Step::Range, 400, code, "deferred message upload +NewDraft");
    }
    // A page of a proxy is no reason to fail a message.
    check(400, "", "deferred message send_mail lost");
}

#[test]
fn what_is_too_large_goes_the_other_way() {
    check(413, "", "failed message send_mail 5.3.4 +OtherWay");
    check(413, "RequestEntityTooLarge", "failed message send_mail 5.3.4 +OtherWay");
    check(400, "ErrorMessageSizeExceeded", "failed message send_mail 5.3.4 +OtherWay");
    check(500, "ErrorMessageSizeExceeded", "deferred message send_mail lost maybe");
    check_at(Step::Create, 500, "ErrorMessageSizeExceeded", "failed message draft 5.3.4 +OtherWay");
    check_at(Step::Create, 413, "", "failed message draft 5.3.4 +OtherWay");
    check_at(Step::Attach, 413, "", "failed message draft 5.3.4 +OtherWay");
    check_at(Step::Range, 413, "", "failed message upload 5.3.4 +OtherWay");
    check_at(Step::Send, 400, "ErrorMessageSizeExceeded", "failed message send 5.3.4 +OtherWay");
    check_at(
        Step::Session,
        400,
        "ErrorAttachmentSizeShouldNotBeLessThanMinimumSize",
        "failed message upload 5.3.4 +OtherWay",
    );
    check_at(
        Step::Attach,
        400,
        "ErrorAttachmentSizeLimitExceeded",
        "failed message draft 5.3.4 +OtherWay",
    );
}

#[test]
fn a_token_is_fetched_anew_once_and_then_everyone_waits() {
    let held = "held provider auth +NewToken";
    check(401, "InvalidAuthenticationToken", held);
    check(401, "", held);
    check(401, "Unauthorized", held);
    check(403, "InvalidAuthenticationToken", held);
    check_at(Step::Create, 401, "InvalidAuthenticationToken", held);
    check_at(Step::Attach, 401, "", held);
    check_at(Step::Session, 401, "", held);
    check_at(Step::Send, 401, "", held);
    check_at(Step::Range, 401, "", "deferred message upload +NewDraft");
    check_at(Step::Range, 401, "InvalidAudienceForResource", "deferred message upload +NewDraft");
}

#[test]
fn access_is_the_accounts_affair() {
    for code in
        ["ErrorAccessDenied", "accessDenied", "Authorization_RequestDenied", "Forbidden", "New", ""]
    {
        check(403, code, "held sender auth");
        let other = Case { own_mailbox: false, ..case(Step::SendMail) };
        judge(other, 403, code, None, "held sender send_mail");
        let report = Case { null_reverse_path: true, ..case(Step::SendMail) };
        judge(report, 403, code, None, "deferred message send_mail null");
    }
    judge(case(Step::SendMail), 403, "Forbidden", Some(7.0), "held sender auth 7s");
    // The right to make drafts is another than that to send.
    check_at(Step::Create, 403, "ErrorAccessDenied", "held message draft");
    check_at(Step::Attach, 403, "ErrorAccessDenied", "held message draft");
    check_at(Step::Session, 403, "ErrorAccessDenied", "held message upload");
    check_at(Step::Range, 403, "", "held message upload");
    check_at(Step::Send, 403, "ErrorAccessDenied", "held sender auth");
}

#[test]
fn send_as_is_the_lanes_fault_only_of_its_own_mailbox() {
    for code in ["ErrorSendAsDenied", "ErrorSendOnBehalfOfDenied"] {
        check(403, code, "held sender send_mail");
        let alias = Case { from_is_mailbox: false, ..case(Step::SendMail) };
        judge(alias, 403, code, None, "held message send_mail");
        judge(Case { step: Step::Send, ..alias }, 403, code, None, "held message send");
        let report = Case { null_reverse_path: true, ..case(Step::SendMail) };
        judge(report, 403, code, None, "failed message send_mail null");
    }
    check(400, "ErrorSendAsDenied", "held sender send_mail");
    check(500, "ErrorSendAsDenied", "held sender send_mail");
}

#[test]
fn a_quota_closes_for_an_hour_or_as_long_as_it_says() {
    for code in [
        "ErrorExceededMessageLimit",
        "ErrorExceededHourlyMessageLimit",
        "ErrorSubmissionQuotaExceeded",
        "ErrorMessageSubmissionBlocked",
        "ErrorQuotaExceeded",
        "quotaLimitReached",
    ] {
        for status in [400, 403, 429, 507] {
            check(status, code, "held sender send_mail 3600s");
        }
        judge(case(Step::SendMail), 429, code, Some(90.0), "held sender send_mail 90s");
        check_at(Step::Create, 403, code, "held sender draft 3600s");
        check_at(Step::Send, 403, code, "held sender send 3600s");
        let report = Case { null_reverse_path: true, ..case(Step::SendMail) };
        judge(report, 403, code, Some(90.0), "deferred message send_mail null");
    }
    check(507, "", "held sender send_mail 3600s");
    check(507, "New", "held sender send_mail 3600s");
}

#[test]
fn a_mailbox_that_is_none_is_tried_through_the_sender() {
    for code in [
        "ErrorInvalidUser",
        "ResourceNotFound",
        "Request_ResourceNotFound",
        "MailboxNotEnabledForRESTAPI",
        "ErrorNonExistentMailbox",
        "ErrorItemNotFound",
        "New",
        "",
    ] {
        check(404, code, "held sender auth");
        let alias = Case { own_mailbox: false, ..case(Step::SendMail) };
        judge(alias, 404, code, None, "held sender send_mail +ThroughSender");
        let draft = Case { own_mailbox: false, ..case(Step::Create) };
        judge(draft, 404, code, None, "held sender draft +ThroughSender");
    }
    check(400, "MailboxNotEnabledForRESTAPI", "held sender auth");
    check(403, "ErrorNonExistentMailbox", "held sender auth");
    check(410, "", "held sender auth");
}

#[test]
fn a_draft_or_session_that_is_gone_is_begun_again() {
    for code in ["ErrorItemNotFound", "itemNotFound", "ResourceNotFound", "New", ""] {
        check_at(Step::Attach, 404, code, "deferred message draft +NewDraft");
        check_at(Step::Session, 404, code, "deferred message upload +NewDraft");
        check_at(Step::Range, 404, code, "deferred message upload +NewDraft");
        check_at(Step::Send, 404, code, "deferred message send +NewDraft");
    }
    check_at(Step::Range, 404, "uploadSessionNotFound", "deferred message upload +NewDraft");
    check_at(Step::Range, 410, "", "deferred message upload +NewDraft");
    check_at(Step::Send, 400, "ErrorInvalidIdMalformed", "deferred message send +NewDraft");
    check_at(Step::Range, 416, "", "deferred message upload +OtherRange");
    for code in ["invalidRange", "fragmentOverlap", "fragmentOutOfOrder"] {
        check_at(Step::Range, 416, code, "deferred message upload +OtherRange");
        check_at(Step::Range, 400, code, "deferred message upload +OtherRange");
    }
}

#[test]
fn who_asks_for_a_pause_gets_it() {
    for code in
        ["ApplicationThrottled", "TooManyRequests", "activityLimitReached", "MailboxBusy", ""]
    {
        let at = case(Step::SendMail);
        judge(at, 429, code, Some(2.128), "deferred sender send_mail 2.128s");
        judge(at, 429, code, None, "deferred sender send_mail");
    }
    check(503, "ApplicationThrottled", "deferred sender send_mail");
    check(400, "CommandConcurrencyLimitReached", "deferred sender send_mail");
    check(500, "ApplicationThrottled", "deferred sender send_mail");
    check(509, "", "deferred sender send_mail");
    judge(case(Step::SendMail), 509, "", Some(30.0), "deferred sender send_mail 30s");
    judge(case(Step::SendMail), 503, "", Some(30.0), "deferred sender send_mail 30s");
    judge(case(Step::Create), 503, "", Some(30.0), "deferred sender draft 30s");
    judge(case(Step::Range), 429, "", Some(30.0), "deferred sender upload 30s");
    judge(case(Step::SendMail), 504, "", Some(30.0), "deferred sender send_mail 30s maybe");
    judge(case(Step::SendMail), 409, "", Some(30.0), "deferred sender send_mail 30s");
    // What fails, fails now.
    judge(
        case(Step::SendMail),
        400,
        "BadRequest",
        Some(30.0),
        "failed message send_mail 5.6.0 +WithoutExtras",
    );
}

#[test]
fn a_trouble_of_the_service_is_in_doubt_once_the_message_was_out() {
    // Whatever it says of a reason, but for those that come before the message is taken.
    for code in ["ErrorItemNotFound", "InvalidAuthenticationToken", "BadRequest", "New"] {
        check(500, code, "deferred message send_mail lost maybe");
        check_at(Step::Send, 502, code, "deferred message send lost maybe");
    }
    check(500, "ErrorAccessDenied", "held sender auth");
    check(500, "ErrorQuotaExceeded", "held sender send_mail 3600s");
    for code in
        ["ErrorInternalServerError", "ErrorInternalServerTransientError", "UnknownError", "New", ""]
    {
        for status in [500, 502, 504] {
            check(status, code, "deferred message send_mail lost maybe");
            let early = Case { body_out: false, ..case(Step::SendMail) };
            judge(early, status, code, None, "deferred message send_mail lost");
            check_at(Step::Create, status, code, "deferred message draft lost");
            check_at(Step::Range, status, code, "deferred message upload lost");
            check_at(Step::Send, status, code, "deferred message send lost maybe");
        }
    }
    for code in [
        "ErrorServerBusy",
        "serviceNotAvailable",
        "ErrorMailboxStoreUnavailable",
        "ErrorTimeoutExpired",
        "ErrorMailboxMoveInProgress",
        "",
    ] {
        check(503, code, "deferred message send_mail lost");
    }
    check(500, "ErrorServerBusy", "deferred message send_mail lost maybe");
    check(520, "", "deferred message send_mail lost maybe");
    check(599, "", "deferred message send_mail lost maybe");
    // The same words in another status are for now too.
    check(400, "ErrorServerBusy", "deferred message send_mail lost");
    check(404, "ErrorMailboxMoveInProgress", "deferred message send_mail lost");
}

#[test]
fn conflicts_pass() {
    for status in [409, 412, 423] {
        check(status, "", "deferred message send_mail");
        check(status, "New", "deferred message send_mail");
    }
    for status in [408, 421, 424, 425, 426, 428, 431, 451, 418] {
        check(status, "", "deferred message send_mail lost");
        check(status, "New", "deferred message send_mail lost");
    }
}

#[test]
fn what_only_a_person_can_mend_holds_the_provider() {
    for status in [402, 405, 406, 411, 415, 422, 501] {
        check(status, "", "held provider send_mail");
        check(status, "New", "held provider send_mail");
        check_at(Step::Send, status, "", "held provider send");
    }
    for status in [300, 301, 302, 303, 304, 307, 308] {
        check(status, "", "held provider send_mail");
        check_at(Step::Range, status, "", "held provider upload");
    }
}

#[test]
fn the_deepest_known_code_decides() {
    let check = |body: &str, expected: &str| {
        let answer = Answer::read(403, None, None, body.as_bytes());
        assert_eq!(describe(&verdict(&answer, case(Step::SendMail))), expected, "{body}");
    };
    let inner = r#"{"error":{"code":"UnknownError","message":"m","innerError":{"code":"ErrorInvalidRecipients"}}}"#;
    check(inner, "failed recipient send_mail 5.1.3 +FewerRecipients");
    check(
        &inner.replace("innerError", "innererror"),
        "failed recipient send_mail 5.1.3 +FewerRecipients",
    );
    check(&inner.replace("ErrorInvalidRecipients", "Whatever"), "deferred message send_mail lost");
    let deep = r#"{"error":{"code":"generalException","innererror":{"code":"x","innererror":{"code":"ErrorSendAsDenied","innererror":{"code":"y"}}}}}"#;
    check(deep, "held sender send_mail");
    check(
        r#"{"error":"ErrorInvalidRecipients"}"#,
        "failed recipient send_mail 5.1.3 +FewerRecipients",
    );
}

#[test]
fn any_body_is_read() {
    let status = |body: &[u8]| {
        let answer = Answer::read(502, None, None, body);
        describe(&verdict(&answer, case(Step::SendMail)))
    };
    let bodies: [&[u8]; 12] = [
        b"",
        b"{",
        b"{\"error\":{\"code\":\"ErrorInvalidRecip",
        b"{\"error\":null}",
        b"{\"error\":[]}",
        b"{\"error\":{\"code\":7}}",
        b"[1,2]",
        b"null",
        b"\xff\xfe\x00",
        b"<html>",
        &[b'['; 60_000],
        &[b'x'; MAX_BODY],
    ];
    for body in bodies {
        assert_eq!(status(body), "deferred message send_mail lost maybe");
    }
}

#[test]
fn the_remotes_words_are_told() {
    let check = |status, id: Option<&str>, body: &str, expected: &str| {
        let answer = Answer::read(status, id, None, body.as_bytes());
        assert_eq!(answer.to_string(), expected);
    };
    check(202, Some("1f-2"), "", "202 Accepted (request-id 1f-2)");
    check(
        403,
        Some("1f-2"),
        r#"{"error":{"code":"ErrorSendAsDenied","message":"The user account …"}}"#,
        "403 ErrorSendAsDenied: The user account … (request-id 1f-2)",
    );
    check(502, None, "<html>Bad Gateway</html>\r\n", "502: <html>Bad Gateway</html>");
    check(503, None, "", "503");
    let long = Answer::read(500, None, None, &[b'x'; 5_000]).to_string();
    assert_eq!(long.len(), "500: ".len() + MAX_TEXT);
}

#[test]
fn a_cure_follows_the_words() {
    let words = |status, code| {
        let answer = Answer::read(status, Some("r"), None, &body(code));
        match verdict(&answer, case(Step::SendMail)) {
            Verdict::Refused { outcome, .. } => outcome.cause().unwrap().words.to_string(),
            Verdict::Taken => String::new(),
        }
    };
    let denied = words(403, "ErrorAccessDenied");
    assert!(denied.starts_with("403 ErrorAccessDenied: No. (request-id r); grant the"), "{denied}");
    assert!(words(401, "").contains("tenant_id"));
    assert!(words(404, "ErrorInvalidUser").contains("provider.sender"));
    assert!(words(507, "").contains("full"));
    let words = |step| {
        let answer = Answer::read(403, None, None, b"");
        match verdict(&answer, case(step)) {
            Verdict::Refused { outcome, .. } => outcome.cause().unwrap().words.to_string(),
            Verdict::Taken => String::new(),
        }
    };
    assert!(words(Step::Create).contains("Mail.ReadWrite"));
    assert!(words(Step::Range).contains("proxy"));
}

#[test]
fn without_an_answer_it_is_in_doubt_only_where_it_may_have_been_sent() {
    let check = |step, body_out, fault: Fault, maybe_sent, words: &str| {
        let case = Case { body_out, ..case(step) };
        let outcome = unanswered(&fault, case);
        let Outcome::Deferred(cause) = outcome else { panic!("{outcome:?}") };
        assert_eq!((cause.maybe_sent, cause.words.to_string().as_str()), (maybe_sent, words));
        assert_eq!(cause.lost, cause.scope == Scope::Message);
    };
    let reset = || Fault::Broken("reset".to_owned());
    let silence = || Fault::Silence(Duration::from_millis(1_500));
    let sendmail = Step::SendMail;
    let out = "after the message had gone out";
    check(sendmail, true, reset(), true, &format!("the connection broke {out}: reset"));
    check(sendmail, true, silence(), true, &format!("no answer within 1.5 s {out}"));
    check(
        sendmail,
        false,
        reset(),
        false,
        "the connection broke while the request was being sent: reset",
    );
    check(
        sendmail,
        false,
        silence(),
        false,
        "no answer within 1.5 s while the request was being sent",
    );
    check(
        Step::Send,
        true,
        silence(),
        true,
        "no answer within 1.5 s after the draft was to be sent",
    );
    check(Step::Create, true, reset(), false, "the connection broke after the request: reset");
    check(
        Step::Create,
        true,
        Fault::Garbage("no id"),
        false,
        "an answer that is of no use came after the request: no id",
    );
    let refused = unanswered(&Fault::Unconnected("refused".to_owned()), case(sendmail));
    let cause = refused.cause().unwrap();
    assert_eq!((cause.scope, cause.stage), (Scope::Provider, Stage::Connect));
    assert!(!cause.maybe_sent);
    // The host of an upload is not Graph's.
    let fault = Fault::Unconnected("up.example.com: refused".to_owned());
    let refused = unanswered(&fault, case(Step::Range));
    let cause = refused.cause().unwrap();
    assert_eq!((cause.scope, cause.stage, cause.lost), (Scope::Message, Stage::Upload, true));
    let words = cause.words.to_string();
    assert!(
        words.starts_with("up.example.com: refused; ") && words.contains("firewall"),
        "{words}"
    );
}

#[test]
fn the_recipient_that_is_named_is_found() {
    let addresses = ["a@example.org", "b@example.org", "c.a@example.org", ""];
    let check = |text: &str, expected: &[usize]| {
        assert_eq!(named(text, &addresses), expected, "{text}");
    };
    check("Recipient 'b@example.org' is not resolved.", &[1]);
    check("recipient B@EXAMPLE.ORG. All must be", &[1]);
    check("b@example.org", &[1]);
    check("<c.a@example.org>", &[2]);
    check("c.a@example.org and a@example.org", &[0, 2]);
    check("a@example.organic, a@example.org.uk, xa@example.org", &[]);
    check("At least one recipient isn't valid.", &[]);
    check("", &[]);
}
