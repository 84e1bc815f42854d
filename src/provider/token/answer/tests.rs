use super::*;

const NOW: UnixMillis = UnixMillis(1_795_502_531_000);

fn body(error: &str, codes: &[u64]) -> Vec<u8> {
    let code = codes.first().copied().unwrap_or_default();
    serde_json::json!({
        "error": error,
        "error_description": format!("AADSTS{code}: Exact words.\r\nTrace ID: tr-1\r\nCorrelation ID: co-1"),
        "error_codes": codes,
        "trace_id": "tr-1",
        "correlation_id": "co-1",
    })
    .to_string()
    .into_bytes()
}

fn refusal(status: u16, body: Vec<u8>) -> Refusal {
    Refusal { status, retry_after: None, date: None, body }
}

fn words(refusal: &Refusal) -> String {
    refused(refusal, NOW, &["s3cret"]).cause.words.to_string()
}

#[test]
fn each_documented_code_has_its_class_and_a_cure() {
    use Class::{Certificate, Operator, Secret, Throttled, Transient};
    let check = |codes: &[u64], expected: Class| {
        for code in codes {
            let (class, cure) = judge(400, "invalid_client", &[*code]);
            assert_eq!(class, expected, "{code}");
            assert!(!cure.is_empty() && !cure.ends_with('.'), "{code}");
            assert_ne!((class, cure), judge(400, "invalid_client", &[]), "{code}");
        }
    };
    check(&[7_000_215, 7_000_222], Secret);
    check(&[7_000_218, 700_016, 7_000_112, 90_002], Operator);
    check(&[900_382, 900_432, 90_038, 9_001_023], Operator);
    check(&[70_011, 700_022, 700_023, 500_011], Operator);
    check(&[50_012, 50_013, 500_133], Operator);
    check(&[700_027, 700_024, 7_000_214, 1_000_502, 7_000_274, 7_000_277], Certificate);
    check(&[530_032, 53_003, 70_021, 700_213], Operator);
    check(&[90_006, 90_012, 90_024, 90_033, 90_090], Transient);
    check(&[90_055], Throttled);
}

#[test]
fn what_has_no_known_code_goes_by_its_error_then_by_its_status() {
    use Class::{Operator, Throttled, Transient};
    let check = |status, error, codes: &[u64], expected| {
        assert_eq!(judge(status, error, codes).0, expected, "{status} {error} {codes:?}");
    };
    for error in ["invalid_client", "unauthorized_client", "invalid_scope", "invalid_request"] {
        check(400, error, &[1], Operator);
    }
    for error in ["invalid_resource", "invalid_grant"] {
        check(401, error, &[], Operator);
    }
    check(400, "temporarily_unavailable", &[], Transient);
    check(400, "a_new_one", &[], Operator);
    check(400, "invalid_client", &[1, 90_033], Transient);
    for status in [408, 500, 502, 503, 504, 599] {
        check(status, "", &[], Transient);
    }
    check(429, "", &[], Throttled);
    for status in [400, 403, 404, 407, 413] {
        check(status, "", &[], Operator);
    }
    // A redirect, or a body where a token was due.
    for status in [204, 302, 101] {
        check(status, "", &[], Transient);
    }
}

#[test]
fn the_words_are_exact_on_one_line_with_both_ids_and_the_cure() {
    let said = words(&refusal(401, body("invalid_client", &[7_000_222])));
    let exact = "AADSTS7000222: Exact words. Trace ID: tr-1 Correlation ID: co-1; the client secret has expired: ";
    assert!(said.starts_with(exact), "{said}");
    let bare = br#"{"error":"invalid_client","trace_id":"tr-2","correlation_id":"co-2"}"#;
    let said = words(&refusal(401, bare.to_vec()));
    assert!(said.starts_with("invalid_client (trace id tr-2) (correlation id co-2); "), "{said}");
    let long = serde_json::json!({
        "error": "invalid_client",
        "error_description": format!("AADSTS7000222: {}", "\u{e9}".repeat(30_000)),
        "trace_id": "x".repeat(10_000),
        "correlation_id": "co-3",
    });
    let said = words(&refusal(401, long.to_string().into_bytes()));
    assert!(said.contains(" (correlation id co-3); the client secret has expired: "), "{said}");
    // The code of the text counts where no list has it.
    let old = br#"{"error":"x","error_description":"AADSTS7000112: Disabled."}"#;
    assert!(words(&refusal(400, old.to_vec())).contains("the application is disabled"));
}

#[test]
fn a_body_that_is_not_documented_is_shown_short_and_escaped_or_not_at_all() {
    let check = |body: &[u8], expected: &str| {
        let said = words(&refusal(503, body.to_vec()));
        assert!(said.starts_with(expected), "{said}");
        assert!(said.len() < 1_000 && !said.contains(char::is_control), "{said}");
    };
    check(b"", "HTTP 503; ");
    check(b"<html><body>Busy", "HTTP 503; ");
    check(b"busy\r\nnow\0", "HTTP 503: busy");
    check(&[0xff; 10_000], "HTTP 503: ");
    check(&b"x".repeat(60_000), "HTTP 503: xxxx");
    for json in [&b"7"[..], b"null", b"[]", b"{}", br#"{"error":7}"#, br#"{"error":{"code":"x"}}"#]
    {
        check(json, "HTTP 503: ");
    }
    check(&b"[".repeat(60_000), "HTTP 503: [[[[");
}

#[test]
fn a_secret_that_the_remote_repeats_is_not_shown() {
    for body in [&b"what is s3cret?"[..], br#"{"error":"x","error_description":"s3cret is wrong"}"#]
    {
        let said = words(&refusal(400, body.to_vec()));
        assert!(said.starts_with("HTTP 400 (its words are not shown"), "{said}");
    }
}

#[test]
fn how_long_nothing_is_asked_for_again() {
    let check = |status, codes: &[u64], named: Option<u64>, hold: u64, told: Option<u64>| {
        let wait = named.map(Duration::from_secs);
        let body = if codes.is_empty() { Vec::new() } else { body("invalid_client", codes) };
        let failure = refused(&Refusal { retry_after: wait, ..refusal(status, body) }, NOW, &[]);
        assert_eq!(failure.hold, Duration::from_secs(hold), "{status} {codes:?} {named:?}");
        assert_eq!(failure.cause.retry_after, told.map(Duration::from_secs), "{status} {codes:?}");
    };
    check(401, &[7_000_215], None, 60, None);
    check(400, &[700_016], None, 60, None);
    check(400, &[700_016], Some(7), 7, Some(7));
    check(503, &[], None, 5, None);
    check(503, &[], Some(120), 120, Some(120));
    check(503, &[], Some(0), 1, Some(1));
    check(503, &[], Some(1_000_000), 3600, Some(3600));
    check(429, &[], None, 60, Some(60));
    check(429, &[], Some(2), 2, Some(2));
    check(400, &[90_055], None, 60, Some(60));
    check(400, &[90_033], None, 5, None);
}

#[test]
fn what_may_help_at_once() {
    let check = |error: &str, code: u64, expected| {
        let failure = refused(&refusal(401, body(error, &[code])), NOW, &[]);
        assert_eq!(failure.remedy, expected, "{error} {code}");
    };
    check("invalid_client", 7_000_215, Remedy::AnotherSecret);
    check("invalid_client", 7_000_222, Remedy::AnotherSecret);
    check("invalid_client", 1, Remedy::AnotherSecret);
    check("unauthorized_client", 700_016, Remedy::Nothing);
    check("invalid_client", 700_027, Remedy::ReadAgain);
    check("invalid_client", 700_024, Remedy::ReadAgain);
    check("temporarily_unavailable", 90_033, Remedy::Nothing);
}

#[test]
fn a_clock_that_is_off_is_blamed_before_the_certificate() {
    let said = |offset: i64| {
        let date = Some(UnixMillis(NOW.0.checked_add_signed(offset * 1000).unwrap()));
        let refusal = refusal(401, body("invalid_client", &[700_024]));
        words(&Refusal { date, ..refusal })
    };
    assert!(said(600).contains("; this system's clock is off: 600 s behind the server's"));
    assert!(said(-600).contains("; this system's clock is off: 600 s ahead of the server's"));
    for near in [30, -30, 0] {
        assert!(!said(near).contains("clock is off"), "{}", said(near));
    }
}

#[test]
fn a_reply_is_read_as_servers_write_it() {
    let read = |json: &str| -> Result<(u64, Option<u64>), &'static str> {
        let reply: Reply = serde_json::from_str(json).map_err(|_unfit| "no reply")?;
        let granted = Granted::read(&reply, NOW)?;
        Ok((granted.expires_in().as_secs(), granted.refresh_in().map(|it| it.as_secs())))
    };
    let check = |fields: &str, expected| {
        let json = format!(r#"{{"access_token":"t","token_type":"Bearer"{fields}}}"#);
        assert_eq!(read(&json), Ok(expected), "{fields}");
    };
    check(r#","expires_in":3599"#, (3599, None));
    check(r#","expires_in":"3599","refresh_in":"1800""#, (3599, Some(1800)));
    check(r#","expires_on":"1795502591""#, (60, None));
    check(r#","expires_on":7"#, (0, None));
    check(r#","expires_in":-7,"refresh_in":null"#, (600, None));
    check(r#","expires_in":1.5"#, (600, None));
    check(r#","expires_in":18446744073709551615"#, (u64::MAX, None));
    check(r#","expires_in":[]"#, (600, None));
    check("", (600, None));
    assert_eq!(read(r#"{"access_token":"t","token_type":"bearer"}"#), Ok((600, None)));
    assert_eq!(read(r#"{"access_token":"t"}"#), Ok((600, None)));
    for hostile in [
        "{}",
        "[]",
        "",
        r#"{"access_token":7}"#,
        r#"{"access_token":""}"#,
        r#"{"access_token":"a\r\nb"}"#,
        r#"{"access_token":"a b"}"#,
        "{\"access_token\":\"\u{e9}\"}",
        r#"{"access_token":"t","token_type":"pop"}"#,
        &format!(r#"{{"access_token":"{}"}}"#, "x".repeat(40_000)),
        &"[".repeat(60_000),
    ] {
        assert!(read(hostile).is_err(), "{hostile}");
    }
    assert!(
        !format!("{:?}", serde_json::from_str::<Reply>(r#"{"access_token":"s3cret"}"#))
            .contains("s3cret")
    );
}
