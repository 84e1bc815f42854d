use std::borrow::Cow;

use super::*;
use crate::smtp::reply::ReplyCode;

/// A reply as the reply reader makes it: the enhanced status counts only where its class is that of the code.
fn reply(line: &str) -> Reply {
    let (code, text) = line.split_at(3);
    let code = ReplyCode::parse(code.parse().unwrap()).unwrap();
    let text = text.strip_prefix(' ').unwrap_or_default();
    let enhanced = EnhancedStatus::parse(text.as_bytes())
        .filter(|status| u16::from(status.0) == code.get() / 100);
    let text = match enhanced {
        Some(status) => text.strip_prefix(&status.to_string()).unwrap().trim_start(),
        None => text,
    };
    Reply { code, enhanced, text: Cow::Owned(text.as_bytes().to_vec()) }
}

/// An outcome in short: `held sender 1h`, `deferred message lost maybe`.
fn short(outcome: &Outcome) -> String {
    let Some(cause) = outcome.cause() else { return outcome.label().to_owned() };
    let pause = match cause.retry_after {
        Some(LANE_PAUSE) => " 1h",
        Some(FEWER_PAUSE) => " 1m",
        Some(SLOWER_PAUSE) => " 10s",
        Some(_) => " other",
        None => "",
    };
    let lost = if cause.lost { " lost" } else { "" };
    let maybe = if cause.maybe_sent { " maybe" } else { "" };
    let null = if cause.null_path { " null" } else { "" };
    let busy = if cause.busy { " busy" } else { "" };
    format!("{} {}{pause}{lost}{null}{busy}{maybe}", outcome.label(), cause.scope.label())
}

/// An ordinary message of another author.
const PLAIN: Case =
    Case { null_reverse_path: false, from_is_lane: false, reverse_path_is_lane: false };
/// A message of the lane's own mailbox.
const OWN: Case = Case { from_is_lane: true, reverse_path_is_lane: true, ..PLAIN };
/// The same, with the reverse path of another.
const AUTHOR: Case = Case { from_is_lane: true, ..PLAIN };
/// A report.
const NULL: Case = Case { null_reverse_path: true, ..PLAIN };

#[test]
fn every_reply_has_one_verdict() {
    use Stage::{Auth, Content, Data, Ehlo, EndOfData, Greeting, Mail, Rcpt, StartTls};
    let table: &[(Stage, &str, Case, &str)] = &[
        // For now, by stage.
        (Greeting, "421 4.3.2 too busy", PLAIN, "deferred provider"),
        (Greeting, "450 later", PLAIN, "deferred provider"),
        (Greeting, "421 4.7.0 try again later", NULL, "deferred provider"),
        (Ehlo, "421 closing", PLAIN, "deferred provider"),
        (Ehlo, "451 4.3.0 trouble", OWN, "deferred provider"),
        (StartTls, "454 4.7.0 TLS not available", PLAIN, "deferred provider"),
        (Auth, "454 4.7.0 temporary authentication failure", PLAIN, "deferred provider"),
        (Auth, "421 4.7.0 too many login attempts", PLAIN, "deferred provider"),
        (Mail, "451 4.3.0 trouble", PLAIN, "deferred message lost"),
        (Mail, "452 4.3.1 disk full", PLAIN, "deferred message lost"),
        (Mail, "421 4.3.0 closing", PLAIN, "deferred message lost"),
        (Mail, "450 4.7.1 greylisted", NULL, "deferred message"),
        (Rcpt, "450 4.2.1 busy", PLAIN, "deferred recipient"),
        (Rcpt, "450 4.2.1 busy", NULL, "deferred recipient"),
        (Rcpt, "452 4.2.2 mailbox full", PLAIN, "deferred recipient"),
        (Rcpt, "452 4.5.3 too many recipients", PLAIN, "deferred recipient"),
        (Rcpt, "452 too much", PLAIN, "deferred recipient"),
        (Rcpt, "421 4.3.2 closing", PLAIN, "deferred message lost"),
        (Rcpt, "451 4.7.1 greylisted", OWN, "deferred recipient"),
        (Data, "451 4.3.0 trouble", PLAIN, "deferred message"),
        (Data, "421 closing", PLAIN, "deferred message lost"),
        (Content, "421 4.4.2 too slow", PLAIN, "deferred message lost"),
        (Content, "452 4.3.1 disk full", PLAIN, "deferred message"),
        (EndOfData, "451 4.3.0 trouble", PLAIN, "deferred message"),
        (EndOfData, "421 4.3.0 closing", PLAIN, "deferred message lost"),
        (EndOfData, "450 4.7.1 later", NULL, "deferred message"),
        // For good, by stage.
        (Greeting, "554 5.3.2 go away", PLAIN, "held provider"),
        (Greeting, "500 what", NULL, "held provider"),
        (Ehlo, "550 5.7.1 bad name", PLAIN, "held provider"),
        (Ehlo, "554 no service", OWN, "held provider"),
        (StartTls, "501 5.5.4 no parameters", PLAIN, "held provider"),
        (StartTls, "502 5.5.1 unknown", PLAIN, "held provider"),
        (Auth, "534 5.7.9 mechanism too weak", PLAIN, "held provider"),
        (Auth, "504 5.5.4 mechanism unknown", PLAIN, "held provider"),
        (Mail, "550 5.1.7 bad sender", PLAIN, "failed message"),
        (Mail, "552 5.3.4 too large", PLAIN, "failed message"),
        (Mail, "555 parameters", PLAIN, "failed message"),
        (Mail, "553 5.1.3 bad address", NULL, "failed message null"),
        (Rcpt, "550 5.1.1 no such user", PLAIN, "failed recipient"),
        // Who chooses an address may write anything into it.
        (Rcpt, "550 5.1.1 <submissionquotaexceeded@b.test>: unknown", PLAIN, "failed recipient"),
        (Rcpt, "550 <submissionquotaexceeded@b.test> unknown", PLAIN, "failed recipient"),
        (Rcpt, "550 sendasdenied@b.test unknown", OWN, "failed recipient"),
        (Rcpt, "550 \"client host rejected\"@b.test: relay denied", PLAIN, "failed recipient"),
        (EndOfData, "554 <daily sending limit@b.test> unknown", PLAIN, "failed message"),
        (Rcpt, "550 <\"a> client host rejected \"@b.test> unknown", PLAIN, "failed recipient"),
        (Rcpt, "550 \"a\\\" client host rejected\"@b.test unknown", PLAIN, "failed recipient"),
        (Rcpt, "550 \"Daily user sending limit exceeded\"", PLAIN, "held sender 1h"),
        // The sender is refused where a recipient was named (Postfix, smtpd_delay_reject).
        (
            Rcpt,
            "554 5.7.1 <>: Sender address rejected: Access denied",
            NULL,
            "failed recipient null",
        ),
        // 5.1.8 of a domain; and in words of another server.
        (Mail, "550 5.1.8 unresolvable sender", PLAIN, "failed message"),
        (Mail, "550 5.1.8 no", PLAIN, "held provider"),
        (EndOfData, "550 5.1.8 host mx.b.test said: bad outbound sender", PLAIN, "failed message"),
        (Rcpt, "550 no such user", PLAIN, "failed recipient"),
        (Rcpt, "554 5.7.1 relay access denied", PLAIN, "failed recipient"),
        (Rcpt, "550 5.1.1 no such user", NULL, "failed recipient"),
        (Rcpt, "552 5.2.2 mailbox full", PLAIN, "failed recipient"),
        (Rcpt, "550 5.2.2 over quota", PLAIN, "failed recipient"),
        (Rcpt, "552 5.2.3 message too long for mailbox", PLAIN, "failed recipient"),
        (Data, "554 5.5.1 no valid recipients", PLAIN, "failed message"),
        (Data, "503 sequence", OWN, "failed message"),
        (Content, "552 5.3.4 too large", PLAIN, "failed message"),
        (Content, "554 5.6.0 bad content", NULL, "failed message"),
        (EndOfData, "554 5.6.0 bad content", PLAIN, "failed message"),
        (EndOfData, "550 5.7.1 spam", OWN, "failed message"),
        (EndOfData, "552 5.2.2 mailbox full", PLAIN, "failed message"),
        (EndOfData, "554 refused", NULL, "failed message"),
        // Too many recipients (RFC 5321 4.5.3.1.10).
        (Rcpt, "552 5.5.3 too many", PLAIN, "deferred recipient"),
        (Rcpt, "552 Too many recipients", PLAIN, "deferred recipient"),
        (Rcpt, "550 5.5.3 Too Many Recipients", PLAIN, "deferred recipient"),
        (Rcpt, "552 full", PLAIN, "failed recipient"),
        (Mail, "552 5.5.3 too many", PLAIN, "failed message"),
        // The account may not send.
        (Mail, "530 5.7.57 Client was not authenticated to send mail", PLAIN, "held provider"),
        (Mail, "530 5.7.0 Must issue a STARTTLS command first", PLAIN, "held provider"),
        (Mail, "530 authentication required", OWN, "held provider"),
        (Rcpt, "530 5.7.1 authenticate first", PLAIN, "held provider"),
        (Data, "530 authentication required", PLAIN, "held provider"),
        (Auth, "535 5.7.3 Authentication unsuccessful", PLAIN, "held provider"),
        (Auth, "535 5.7.139 SmtpClientAuthentication is disabled", PLAIN, "held provider"),
        (Mail, "535 5.7.8 bad credentials", PLAIN, "held provider"),
        (EndOfData, "550 5.7.57 not authenticated", PLAIN, "held provider"),
        (Auth, "550 5.7.30 Basic authentication is not supported", PLAIN, "held provider"),
        (Mail, "550 5.7.30 Basic authentication is not supported", PLAIN, "held provider"),
        (EndOfData, "550 5.1.8 Access denied, bad outbound sender", PLAIN, "held provider"),
        (Rcpt, "550 5.1.8 Access denied, bad outbound sender", PLAIN, "held provider"),
        (EndOfData, "550 5.7.705 tenant has exceeded threshold", PLAIN, "held provider"),
        (Rcpt, "550 5.7.708 Access denied, traffic not accepted", OWN, "held provider"),
        (Mail, "450 5.1.8 wrong class is no status", PLAIN, "deferred message"),
        // Its quota is used up.
        (EndOfData, "550 5.4.5 Daily user sending limit exceeded.", PLAIN, "held sender 1h"),
        (Mail, "550 5.4.5 Daily SMTP relay limit exceeded for user", PLAIN, "held sender 1h"),
        (Mail, "550 5.7.1 Daily SMTP relay limit exceeded for customer", OWN, "held sender 1h"),
        (EndOfData, "550 Daily sending quota exceeded", PLAIN, "held sender 1h"),
        (Rcpt, "450 4.2.1 DAILY USER SENDING QUOTA EXCEEDED", PLAIN, "held sender 1h"),
        (Rcpt, "550 5.4.5 limit", PLAIN, "held sender 1h"),
        (Mail, "432 4.3.2 Concurrent connections limit exceeded", PLAIN, "held sender 1m busy"),
        (Auth, "432 4.3.2 Concurrent connections limit exceeded", PLAIN, "held sender 1m busy"),
        (EndOfData, "432 4.3.2 sender thread limit exceeded", OWN, "held sender 1m busy"),
        (Mail, "432 4.7.12 password transition", PLAIN, "deferred message"),
        (Mail, "552 5.2.2 over quota", PLAIN, "held sender 1h"),
        (Mail, "554 5.2.2 full", OWN, "held sender 1h"),
        (EndOfData, "554 5.2.2 Submission quota exceeded", PLAIN, "held sender 1h"),
        (
            EndOfData,
            "554 5.2.0 STOREDRV.Submission.Exception:SubmissionQuotaExceededException",
            PLAIN,
            "held sender 1h",
        ),
        // It may not send as this author.
        (EndOfData, "550 5.7.60 not allowed to send as this sender", PLAIN, "held message"),
        (EndOfData, "550 5.7.60 not allowed to send as this sender", OWN, "held sender"),
        (Mail, "550 5.7.60 not allowed to send as this sender", OWN, "held sender"),
        (EndOfData, "554 5.2.252 SendAsDenied; a not allowed to send as b", PLAIN, "held message"),
        (EndOfData, "554 5.2.252 denied", OWN, "held sender"),
        (EndOfData, "554 5.2.0 Exception:SendAsDeniedException", PLAIN, "held message"),
        (Rcpt, "550 5.7.60 no", PLAIN, "held message"),
        // A report is never evidence against a lane.
        (Mail, "530 5.7.57 not authenticated", NULL, "deferred message null"),
        (Mail, "550 5.1.8 bad outbound sender", NULL, "deferred message null"),
        (EndOfData, "550 5.7.60 not allowed", NULL, "failed message null"),
        (EndOfData, "550 5.4.5 daily limit", NULL, "deferred message null"),
        (EndOfData, "554 5.2.252 SendAsDenied", NULL, "failed message null"),
        (Rcpt, "550 5.7.705 blocked", NULL, "deferred message null"),
        (Mail, "432 4.3.2 Concurrent connections limit exceeded", NULL, "deferred message null"),
        (Rcpt, "450 4.2.1 Daily sending quota exceeded", NULL, "deferred message null"),
        (Auth, "535 5.7.3 unsuccessful", NULL, "held provider"),
        (Auth, "432 4.3.2 Concurrent connections", NULL, "held sender 1m busy"),
        // A class without a meaning there.
        (Greeting, "250 ok", PLAIN, "deferred provider"),
        (Greeting, "354 go on", PLAIN, "deferred provider"),
        (Ehlo, "220 hello", PLAIN, "deferred provider"),
        (Auth, "354 go on", PLAIN, "deferred provider"),
        (Mail, "354 go on", PLAIN, "deferred message lost"),
        (Mail, "221 bye", PLAIN, "deferred message lost"),
        (Rcpt, "354 go on", PLAIN, "deferred message lost"),
        (Data, "250 ok", PLAIN, "deferred message lost"),
        (Content, "250 ok", PLAIN, "deferred message lost"),
        (EndOfData, "354 go on", PLAIN, "deferred message lost maybe"),
        (EndOfData, "221 bye", PLAIN, "deferred message lost maybe"),
        // Taken.
        (EndOfData, "250 2.0.0 queued", PLAIN, "delivered"),
        (EndOfData, "250", NULL, "delivered"),
        (EndOfData, "251 forwarded", OWN, "delivered"),
        // What Google says, at the stages where it does.
        (Greeting, "421 4.7.0 IP not in whitelist for RCPT domain", PLAIN, "deferred provider"),
        (Ehlo, "421 4.7.0 Try again later, closing connection.", PLAIN, "deferred provider"),
        (Mail, "421 4.7.0 Try again later, closing connection.", PLAIN, "deferred message lost"),
        (Mail, "421 4.7.0 TLS required for RCPT domain", OWN, "deferred message lost"),
        (
            Rcpt,
            "450 4.2.1 Peak SMTP relay limit exceeded for customer",
            PLAIN,
            "deferred recipient",
        ),
        (EndOfData, "450 4.2.1 Peak SMTP relay limit exceeded", PLAIN, "deferred message"),
        (Mail, "450 4.2.1 Peak SMTP relay limit exceeded", NULL, "deferred message"),
        (Auth, "454 4.7.0 Too many login attempts", PLAIN, "deferred provider"),
        (Mail, "454 4.7.0 Temporary authentication failure", PLAIN, "deferred message"),
        (Rcpt, "550 5.4.5 Daily SMTP relay limit exceeded for user", OWN, "held sender 1h"),
        (
            EndOfData,
            "550 5.7.1 Daily SMTP relay limit exceeded for customer",
            PLAIN,
            "held sender 1h",
        ),
        (Rcpt, "550 5.2.1 The user is receiving mail at a rate", PLAIN, "failed recipient"),
        (
            Rcpt,
            "452 4.2.2 The recipient's inbox is out of storage space",
            PLAIN,
            "deferred recipient",
        ),
        (
            Rcpt,
            "552 5.2.2 The recipient's inbox is out of storage space",
            PLAIN,
            "failed recipient",
        ),
        (Auth, "534 5.7.9 Application-specific password required", PLAIN, "held provider"),
        (Auth, "535 5.7.8 Username and Password not accepted", PLAIN, "held provider"),
        (Mail, "530 5.7.0 Authentication Required", NULL, "deferred message null"),
        // What Exchange Online says.
        (Mail, "432 4.3.2 Concurrent connections limit exceeded", OWN, "held sender 1m busy"),
        (Data, "432 4.3.2 Concurrent connections limit exceeded", PLAIN, "held sender 1m busy"),
        (Greeting, "432 4.3.2 Concurrent connections limit exceeded", PLAIN, "held sender 1m busy"),
        (Auth, "535 5.7.139 basic authentication is disabled", OWN, "held provider"),
        (Mail, "535 5.7.3 Authentication unsuccessful", NULL, "deferred message null"),
        (Rcpt, "550 5.7.57 Client not authenticated", PLAIN, "held provider"),
        (EndOfData, "550 5.7.708 Service unavailable. Access denied", PLAIN, "held provider"),
        (
            EndOfData,
            "550 5.7.708 Service unavailable. Access denied",
            NULL,
            "deferred message null",
        ),
        (Mail, "550 5.7.705 Access denied, tenant exceeded threshold", OWN, "held provider"),
        (Data, "550 5.1.8 Access denied, bad outbound sender", OWN, "held provider"),
        (
            EndOfData,
            "550 5.1.90 You've reached your daily limit for message recipients",
            PLAIN,
            "held sender 1h",
        ),
        (
            EndOfData,
            "550 5.1.90 You've reached your daily limit for message recipients",
            NULL,
            "deferred message null",
        ),
        (Rcpt, "554 5.2.252 SendAsDenied; a not allowed to send as b", OWN, "held sender"),
        (Data, "554 5.2.252 SendAsDenied; a not allowed to send as b", PLAIN, "held message"),
        (EndOfData, "550 5.2.0 SENDASDENIED", OWN, "held sender"),
        (Auth, "550 5.7.60 no", PLAIN, "held provider"),
        (Mail, "552 5.2.2 over quota", NULL, "deferred message null"),
        (EndOfData, "554 5.2.0 SubmissionQuotaExceededException", NULL, "deferred message null"),
        (Rcpt, "451 4.5.3 Too many recipients", PLAIN, "deferred recipient"),
        (Mail, "451 4.7.500 Server busy", PLAIN, "deferred message"),
        (EndOfData, "550 5.7.232 tenant exceeded its external limit", OWN, "held sender 1h"),
        (EndOfData, "550 5.7.233 tenant exceeded its daily limit", PLAIN, "held sender 1h"),
        (Rcpt, "550 5.7.64 TenantAttribution; Relay Access Denied SMTP", PLAIN, "held provider"),
        (EndOfData, "550 5.7.750 unregistered domain", PLAIN, "held provider"),
        (Mail, "550 5.7.501 Access denied, spam abuse detected", PLAIN, "held provider"),
        (EndOfData, "550 5.7.502 Access denied, banned sender", OWN, "held provider"),
        (Rcpt, "550 5.7.503 Access denied, banned sender", PLAIN, "held provider"),
        (
            EndOfData,
            "432 4.3.2 STOREDRV.Deliver; recipient thread limit exceeded",
            PLAIN,
            "deferred message",
        ),
        // What Amazon SES, Google's relay and Postfix say of accounts.
        (Mail, "454 Throttling failure: Daily message quota exceeded.", PLAIN, "held sender 1h"),
        (
            EndOfData,
            "454 Throttling failure: Maximum sending rate exceeded.",
            PLAIN,
            "held sender 10s busy",
        ),
        (Rcpt, "550 5.7.1 Invalid credentials for relay [192.0.2.1]", PLAIN, "held provider"),
        (
            Rcpt,
            "554 5.7.1 <host[192.0.2.1]>: Client host rejected: Access denied",
            OWN,
            "held provider",
        ),
        (
            Rcpt,
            "553 5.7.1 <a@b>: Sender address rejected: not owned by user x",
            PLAIN,
            "held message",
        ),
        (Mail, "553 5.7.1 Sender address rejected: not owned by auth user.", OWN, "held sender"),
        (Rcpt, "553 5.7.1 <a@b>: Sender address rejected: not logged in", PLAIN, "held message"),
        (
            Mail,
            "553 5.7.1 Sender address rejected: not owned by auth user.",
            AUTHOR,
            "held message",
        ),
        (EndOfData, "550 5.7.60 not allowed to send as this sender", AUTHOR, "held sender"),
        // Over a null reverse path MAIL itself may be what is refused.
        (
            Mail,
            "553 5.7.1 Sender address rejected: not owned by auth user.",
            NULL,
            "failed message null",
        ),
        (Mail, "501 5.1.7 Invalid address", NULL, "failed message null"),
        (Mail, "450 4.1.7 Invalid address", NULL, "deferred message"),
        (Rcpt, "501 5.1.7 Invalid address", NULL, "failed recipient"),
        // Another server's words, which whoever runs that chooses.
        (
            Rcpt,
            "550 5.1.1 <x@evil>: Recipient address rejected: undeliverable: host mx.evil said: daily sending limit",
            PLAIN,
            "failed recipient",
        ),
        (
            EndOfData,
            "554 5.7.1 host mx.evil said: 550 5.7.1 Client host rejected",
            PLAIN,
            "failed message",
        ),
        // A domain that does not exist is the message's fault.
        (
            Rcpt,
            "554 5.1.8 <a@b>: Sender address rejected: Domain not found",
            PLAIN,
            "failed recipient",
        ),
        (Mail, "550 5.1.8 bad sender's system address", OWN, "failed message"),
        // The server's own disk, and the recipient's.
        (Mail, "452 4.3.1 Insufficient system storage", PLAIN, "deferred message lost"),
        (Rcpt, "452 4.3.1 Insufficient system storage", PLAIN, "deferred recipient"),
        (EndOfData, "452 4.3.1 Insufficient system storage", PLAIN, "deferred message"),
        // Near misses: the same numbers of another class, place or subject say nothing about the account.
        (Rcpt, "550 5.7.1 not our customer", PLAIN, "failed recipient"),
        (Mail, "550 5.7.1 relaying denied", OWN, "failed message"),
        (Mail, "450 4.7.60 later", OWN, "deferred message"),
        (EndOfData, "451 4.2.252 later", OWN, "deferred message"),
        (Mail, "450 4.4.5 later", PLAIN, "deferred message"),
        (Mail, "432 wait", PLAIN, "deferred message"),
        (Rcpt, "550 5.1.80 no", PLAIN, "failed recipient"),
        (Rcpt, "550 5.7.570 no", PLAIN, "failed recipient"),
        (Rcpt, "550 5.7.7 no", PLAIN, "failed recipient"),
        (Rcpt, "552 5.2.2 quota exceeded", OWN, "failed recipient"),
        (Rcpt, "550 quota exceeded", PLAIN, "failed recipient"),
        (Rcpt, "550 5.4.50 limit", PLAIN, "failed recipient"),
        // Codes without an enhanced status, and odd ones.
        (Mail, "500", PLAIN, "failed message"),
        (Mail, "501 bad address", NULL, "failed message null"),
        (Mail, "503 nested MAIL", PLAIN, "failed message"),
        (Rcpt, "501", PLAIN, "failed recipient"),
        (Rcpt, "551 user not local; please try <b@y.example>", PLAIN, "failed recipient"),
        (Rcpt, "599 never", NULL, "failed recipient"),
        (Rcpt, "499 later", PLAIN, "deferred recipient"),
        (Data, "503 no recipients", PLAIN, "failed message"),
        (Data, "554 no valid recipients", NULL, "failed message"),
        (Content, "554 5.6.0 too many headers", PLAIN, "failed message"),
        (Content, "421 out of time", NULL, "deferred message lost"),
        (EndOfData, "500", PLAIN, "failed message"),
        (EndOfData, "499", PLAIN, "deferred message"),
        (EndOfData, "421", NULL, "deferred message lost"),
        (Greeting, "599", PLAIN, "held provider"),
        (Greeting, "400", PLAIN, "deferred provider"),
        (StartTls, "421 4.3.0 closing", PLAIN, "deferred provider"),
        (StartTls, "554", PLAIN, "held provider"),
        (Auth, "530 5.7.0 Must issue a STARTTLS command first", PLAIN, "held provider"),
        (Auth, "538 5.7.11 encryption required", PLAIN, "held provider"),
        (Auth, "500 what", PLAIN, "held provider"),
        (Auth, "432 4.7.12 A password transition is needed", PLAIN, "deferred provider"),
        // Successes that are none.
        (Greeting, "221 bye", PLAIN, "deferred provider"),
        (StartTls, "250 ok", PLAIN, "deferred provider"),
        (StartTls, "354 go on", PLAIN, "deferred provider"),
        (Auth, "250 ok", PLAIN, "deferred provider"),
        (Mail, "220 hello", PLAIN, "deferred message lost"),
        (Mail, "235 2.7.0 accepted", PLAIN, "deferred message lost"),
        (Rcpt, "220 hello", NULL, "deferred message lost"),
        (Rcpt, "334 more", PLAIN, "deferred message lost"),
        (Data, "220 hello", PLAIN, "deferred message lost"),
        (Data, "334 more", PLAIN, "deferred message lost"),
        (EndOfData, "220 hello", PLAIN, "deferred message lost maybe"),
        (EndOfData, "299 fine", PLAIN, "delivered"),
        (EndOfData, "259 fine", PLAIN, "delivered"),
        (EndOfData, "200 2.0.0 ok", NULL, "delivered"),
        (EndOfData, "235 2.7.0 accepted", PLAIN, "deferred message lost maybe"),
        // Texts of several lines.
        (
            EndOfData,
            "550 5.7.1 Our system has found\nthat you reached the Daily\nuser sending limit",
            OWN,
            "held sender 1h",
        ),
        (
            EndOfData,
            "554 5.2.0 STOREDRV.Submission\nSendAsDenied; a not allowed\nto send as b",
            PLAIN,
            "held message",
        ),
        (EndOfData, "550 5.1.1 one\n550 5.4.5 two", PLAIN, "failed message"),
        (Rcpt, "550 5.5.3 too\nmany recipients", PLAIN, "deferred recipient"),
        (EndOfData, "250 2.0.0 queued\nas 1", NULL, "delivered"),
    ];
    assert!(table.len() >= 170, "{}", table.len());
    for (stage, line, case, _) in table {
        let rows = table.iter().filter(|row| (row.0, row.1, row.2) == (*stage, *line, *case));
        assert_eq!(rows.count(), 1, "{stage:?} {line:?} is there twice");
    }
    let wrong: Vec<String> = table
        .iter()
        .map(|(stage, line, case, want)| {
            (short(&verdict(*stage, &reply(line), *case)), stage, line, want)
        })
        .filter(|(got, .., want)| got != *want)
        .map(|(got, stage, line, want)| format!("{stage:?} {line:?}: {got}, not {want}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_cause_keeps_words_status_and_stage() {
    let outcome = verdict(Stage::Rcpt, &reply("550 5.1.1 no such user"), PLAIN);
    let cause = outcome.cause().unwrap();
    assert_eq!(cause.to_string(), "550 5.1.1 no such user (rcpt)");
    assert_eq!(cause.status, Some(EnhancedStatus(5, 1, 1)));
}

#[test]
fn only_a_full_transaction_counts_as_too_many_recipients() {
    for line in ["452 too many", "452 4.5.3 enough", "552 5.5.3 x", "550 too many recipients"] {
        assert!(too_many_recipients(&reply(line)), "{line}");
    }
    for line in
        ["452 4.2.2 full", "452 4.3.1 disk", "450 too many recipients", "552 full", "250 ok"]
    {
        assert!(!too_many_recipients(&reply(line)), "{line}");
    }
}

#[test]
fn a_damaged_content_is_held_and_an_unreadable_one_tried_again() {
    let damaged = io::Error::new(io::ErrorKind::InvalidData, "checksum");
    assert_eq!(unreadable(&damaged).label(), "held");
    assert_eq!(unreadable(&io::Error::other("device")).label(), "deferred");
}
