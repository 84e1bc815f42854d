use super::*;

#[track_caller]
fn parsed(line: &str) -> Command {
    parse(line.as_bytes(), Charset::Ascii).unwrap_or_else(|reply| panic!("{line:?}: {reply}"))
}

#[track_caller]
fn mail_of(line: &str) -> MailParams {
    let command = parsed(line);
    let Command::Mail(mail) = command else { panic!("{line:?} is {command:?}") };
    mail
}

#[track_caller]
fn rcpt_of(line: &str) -> Recipient {
    match parse(line.as_bytes(), Charset::Utf8) {
        Ok(Command::Rcpt(rcpt)) => rcpt,
        other => panic!("{line:?} is {other:?}"),
    }
}

/// `line` is refused with this code and status, whatever the text says.
#[track_caller]
fn refused(line: impl AsRef<[u8]>, expected: &str) {
    let line = line.as_ref();
    match parse(line, Charset::Ascii) {
        Ok(command) => panic!("{} is taken: {command:?}", line.escape_ascii()),
        Err(reply) => {
            let status = reply.enhanced.unwrap();
            assert_eq!(format!("{} {status}", reply.code), expected, "{}", line.escape_ascii());
        }
    }
}

#[test]
fn verbs_are_read_in_any_case_and_with_blanks_behind() {
    for (line, command) in [
        ("DATA", Command::Data),
        ("data  ", Command::Data),
        ("Rset\t", Command::Rset),
        ("nOOp", Command::Noop),
        ("NOOP whatever it says", Command::Noop),
        ("help", Command::Help),
        ("HELP MAIL", Command::Help),
        ("vrfy someone", Command::Vrfy),
        ("QUIT", Command::Quit),
        ("ehlo host.example", Command::Ehlo("host.example".into())),
        ("EHLO   my old_printer ", Command::Ehlo("my old_printer".into())),
        ("HELO [192.0.2.1]", Command::Helo("[192.0.2.1]".into())),
    ] {
        assert_eq!(parsed(line), command, "{line:?}");
    }
}

#[test]
fn chunk_sizes_are_read_even_where_the_rest_is_wrong() {
    for (line, size, last) in [
        ("BDAT 0", Some(0), Some(false)),
        ("BDAT 0 LAST", Some(0), Some(true)),
        ("bdat 86 last", Some(86), Some(true)),
        ("BDAT  86  LAST  ", Some(86), Some(true)),
        ("BDAT 18446744073709551615", Some(u64::MAX), Some(false)),
        ("BDAT 99999999999999999999999", Some(u64::MAX), Some(false)),
        ("BDAT 5 LAS", Some(5), None),
        ("BDAT 5 LAST LAST", Some(5), None),
        ("BDAT", None, Some(false)),
        ("BDAT LAST", None, Some(false)),
        ("BDAT -1 LAST", None, Some(true)),
        ("BDAT +1", None, Some(false)),
        ("BDAT 1x", None, Some(false)),
        ("BDAT 0x10", None, Some(false)),
    ] {
        assert_eq!(parsed(line), Command::Bdat(Chunk { size, last }), "{line:?}");
    }
}

#[test]
fn sloppy_paths_are_taken_and_never_repaired() {
    for (line, address) in [
        ("MAIL FROM:<>", ""),
        ("MAIL FROM: <>", ""),
        ("mail from:<a@b>", "a@b"),
        ("MAIL FROM:a@b", "a@b"),
        ("MAIL FROM:   a@b  ", "a@b"),
        ("MAIL  FROM:<a@b>", "a@b"),
        ("MAIL\tFROM:\t<a@b>\t", "a@b"),
        ("MAIL FROM:<@x,@y.example:a@b>", "a@b"),
        ("MAIL FROM:@x:a@b", "a@b"),
        ("MAIL FROM:<\"two words\"@b>", "\"two words\"@b"),
        ("MAIL FROM:\"two words\"@b SIZE=1", "\"two words\"@b"),
        ("MAIL FROM:<\"a>b\\\"c\"@b> SIZE=1", "\"a>b\\\"c\"@b"),
        ("MAIL FROM:<a%x!y@[IPv6:::1]>", "a%x!y@[IPv6:::1]"),
    ] {
        assert_eq!(mail_of(line).reverse_path.as_str(), address, "{line:?}");
    }
    for (line, address) in [
        ("RCPT TO:<a@b>", "a@b"),
        ("rcpt to: a@b ", "a@b"),
        ("RCPT TO:<Postmaster>", "Postmaster"),
        ("RCPT TO:postmaster", "postmaster"),
        ("RCPT TO:<@x:a@b>", "a@b"),
        ("RCPT TO:<ü@ü.example>", "ü@ü.example"),
    ] {
        assert_eq!(rcpt_of(line).path.as_str(), address, "{line:?}");
    }
}

#[test]
fn parameters_of_mail_are_read() {
    let mail = mail_of("MAIL FROM:<a@b> size=12 BODY=8bitmime SMTPUTF8 RET=HDRS ENVID=x+2By");
    assert_eq!(mail.declared_size, Some(12));
    assert_eq!(mail.body, BodyType::EightBitMime);
    assert!(mail.smtputf8);
    assert_eq!(mail.ret, Some(Ret::Headers));
    assert_eq!(mail.envid.as_deref(), Some("x+2By"));
    let mail = mail_of("MAIL FROM:<a@b>");
    assert_eq!((mail.declared_size, mail.body), (None, BodyType::SevenBit));
    assert_eq!(mail_of("MAIL FROM:<ü@b> SMTPUTF8").reverse_path.as_str(), "ü@b");
    let huge = mail_of("MAIL FROM:<a@b> SIZE=99999999999999999999");
    assert_eq!(huge.declared_size, Some(u64::MAX));
    let envid = "x".repeat(100);
    assert_eq!(mail_of(&format!("MAIL FROM:<> ENVID={envid}")).envid.as_deref(), Some(&*envid));
}

#[test]
fn parameters_of_rcpt_are_read() {
    let on = |success, failure, delay| Notify::On { success, failure, delay };
    for (line, notify, orcpt) in [
        ("RCPT TO:<a@b>", Notify::Unsaid, None),
        ("RCPT TO:<a@b> NOTIFY=NEVER", Notify::Never, None),
        ("RCPT TO:<a@b> notify=success", on(true, false, false), None),
        ("RCPT TO:<a@b> NOTIFY=DELAY,FAILURE", on(false, true, true), None),
        ("RCPT TO:<a@b> ORCPT=rfc822;c+2Bd@e", Notify::Unsaid, Some("rfc822;c+2Bd@e")),
        ("RCPT TO:<a@b> ORCPT=utf-8;ü@e", Notify::Unsaid, Some("utf-8;ü@e")),
        ("RCPT TO:<a@b> ORCPT=utf-8;\\x{FC}@e", Notify::Unsaid, Some("utf-8;\\x{FC}@e")),
    ] {
        let rcpt = rcpt_of(line);
        assert_eq!((rcpt.notify, rcpt.orcpt.as_deref()), (notify, orcpt), "{line:?}");
    }
}

#[test]
fn what_is_wrong_gets_the_reply_that_names_it() {
    for (line, expected) in [
        ("", "500 5.5.1"),
        (" ", "500 5.5.1"),
        (" NOOP", "500 5.5.1"),
        ("NOOPS", "500 5.5.1"),
        ("MAILFROM:<a@b>", "500 5.5.1"),
        ("MAIL", "501 5.5.4"),
        ("MAIL a@b", "501 5.5.4"),
        ("MAIL TO:<a@b>", "501 5.5.4"),
        ("MAIL FROM <a@b>", "501 5.5.4"),
        ("MAIL FROM:", "501 5.1.7"),
        ("MAIL FROM: SIZE=1", "501 5.1.7"),
        ("MAIL FROM:<", "501 5.1.7"),
        ("MAIL FROM:<a@b", "501 5.1.7"),
        ("MAIL FROM:a@b>", "501 5.1.7"),
        ("MAIL FROM:<a@b>SIZE=1", "501 5.1.7"),
        ("MAIL FROM:<a@b>>", "501 5.1.7"),
        ("MAIL FROM:<<a@b>>", "501 5.1.7"),
        ("MAIL FROM:< a@b>", "501 5.1.7"),
        ("MAIL FROM:<a>", "501 5.1.7"),
        ("MAIL FROM:<postmaster>", "501 5.1.7"),
        ("MAIL FROM:<\"a@b>", "501 5.1.7"),
        ("MAIL FROM:<@x>", "501 5.1.7"),
        ("MAIL FROM:<@x:>", "501 5.1.7"),
        ("MAIL FROM:<@x,y:a@b>", "501 5.1.7"),
        ("MAIL FROM:<@x@y:a@b>", "501 5.1.7"),
        ("MAIL FROM:<ü@b>", "553 5.6.7"),
        ("MAIL FROM:<a@ü>", "553 5.6.7"),
        ("MAIL FROM:<a@b> SIZE", "501 5.5.4"),
        ("MAIL FROM:<a@b> SIZE=", "501 5.5.4"),
        ("MAIL FROM:<a@b> SIZE=-1", "501 5.5.4"),
        ("MAIL FROM:<a@b> SIZE=1k", "501 5.5.4"),
        ("MAIL FROM:<a@b> SIZE=000000000000000000001", "501 5.5.4"),
        ("MAIL FROM:<a@b> SIZE=1 size=1", "501 5.5.4"),
        ("MAIL FROM:<a@b> BODY=9BIT", "501 5.5.4"),
        ("MAIL FROM:<a@b> BODY=BINARYMIME", "555 5.5.4"),
        ("MAIL FROM:<a@b> BODY", "501 5.5.4"),
        ("MAIL FROM:<a@b> SMTPUTF8=yes", "501 5.5.4"),
        ("MAIL FROM:<a@b> RET=SOME", "501 5.5.4"),
        ("MAIL FROM:<a@b> ENVID=", "501 5.5.4"),
        ("MAIL FROM:<a@b> ENVID=a=b", "501 5.5.4"),
        ("MAIL FROM:<a@b> ENVID=a+2b", "501 5.5.4"),
        ("MAIL FROM:<a@b> ENVID=a+", "501 5.5.4"),
        ("MAIL FROM:<a@b> ENVID=ü", "501 5.5.4"),
        ("MAIL FROM:<a@b> AUTH=<>", "555 5.5.4"),
        ("MAIL FROM:<a@b> FUTURERELEASE=1", "555 5.5.4"),
        ("MAIL FROM:<a@b> NOTIFY=NEVER", "555 5.5.4"),
        ("MAIL FROM:<a@b> =", "501 5.5.4"),
        ("MAIL FROM:<a@b> -X=1", "501 5.5.4"),
        ("MAIL FROM:<a@b> ü=1", "501 5.5.4"),
        ("RCPT", "501 5.5.4"),
        ("RCPT FROM:<a@b>", "501 5.5.4"),
        ("RCPT TO:", "501 5.1.3"),
        ("RCPT TO:<>", "501 5.1.3"),
        ("RCPT TO:<a>", "501 5.1.3"),
        ("RCPT TO:<a@b> <c@d>", "501 5.5.4"),
        ("RCPT TO:a@b,c@d", "501 5.1.3"),
        ("RCPT TO:<a@b,c@d>", "501 5.1.3"),
        ("RCPT TO:<ü@b>", "553 5.6.7"),
        ("RCPT TO:<a@b> NOTIFY=NEVER,FAILURE", "501 5.5.4"),
        ("RCPT TO:<a@b> NOTIFY=", "501 5.5.4"),
        ("RCPT TO:<a@b> NOTIFY=FAILURE,", "501 5.5.4"),
        ("RCPT TO:<a@b> NOTIFY=SOMETIMES", "501 5.5.4"),
        ("RCPT TO:<a@b> ORCPT=a@b", "501 5.5.4"),
        ("RCPT TO:<a@b> ORCPT=;a@b", "501 5.5.4"),
        ("RCPT TO:<a@b> ORCPT=rfc822;", "501 5.5.4"),
        ("RCPT TO:<a@b> ORCPT=rfc822;a+zz", "501 5.5.4"),
        ("RCPT TO:<a@b> ORCPT=utf-8;ü", "501 5.5.4"),
        ("RCPT TO:<a@b> SIZE=1", "555 5.5.4"),
        ("DATA now", "501 5.5.4"),
        ("RSET all", "501 5.5.4"),
        ("QUIT bye", "501 5.5.4"),
        ("HELO", "501 5.5.4"),
        ("EHLO ", "501 5.5.4"),
        ("EHLO h\u{85}st", "501 5.5.4"),
        ("VRFY", "501 5.5.4"),
        ("EXPN list", "502 5.5.1"),
        ("ETRN x", "502 5.5.1"),
        ("TURN", "502 5.5.1"),
        ("AUTH PLAIN AGEAYg==", "502 5.5.1"),
        ("STARTTLS", "502 5.5.1"),
        ("XCLIENT ADDR=1.2.3.4", "500 5.5.1"),
        ("DÄTA", "500 5.5.1"),
    ] {
        refused(line, expected);
    }
    refused(format!("EHLO {}", "x".repeat(256)), "501 5.5.4");
    refused(format!("MAIL FROM:<> ENVID={}", "x".repeat(101)), "501 5.5.4");
    refused(format!("RCPT TO:<a@b> ORCPT=rfc822;{}", "x".repeat(494)), "501 5.5.4");
    refused(b"MAIL FROM:<\xe9@b>", "553 5.6.7");
    refused(b"MAIL FROM:<\xe9@b> SMTPUTF8", "501 5.1.7");
    refused(b"RCPT TO:<\xe9@b>", "553 5.6.7");
}

#[test]
fn control_characters_are_refused_wherever_they_stand() {
    for octet in (0..=31u8).chain([127]).filter(|octet| *octet != b'\t') {
        for line in ["NOOP", "EHLO host", "MAIL FROM:<a@b> SIZE=1", "RCPT TO:<a@b> NOTIFY=NEVER"] {
            for at in 0..=line.len() {
                let mut line = line.as_bytes().to_vec();
                line.insert(at, octet);
                refused(&line, "500 5.5.2");
            }
        }
    }
    refused("MAIL FROM:<a\t@b>", "501 5.1.7");
    refused("EHLO a\tb", "501 5.5.4");
}

#[test]
fn http_is_recognised_by_verb_and_blank() {
    for line in ["GET / HTTP/1.1", "post /x HTTP/1.0", "CONNECT a:25 HTTP/1.1", "OPTIONS *"] {
        assert!(is_http(line.as_bytes()), "{line}");
    }
    for line in ["GET", "GETS x", "HELO x", "", "DATA", "PUTx "] {
        assert!(!is_http(line.as_bytes()), "{line}");
    }
}
