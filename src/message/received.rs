//! The lines that go before every accepted message: Received (RFC 5321 4.4), and Message-ID and Date where it had none.

use std::net::IpAddr;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;

use crate::envelope::{Client, SpoolId, UnixMillis};
use crate::message::header::Facts;
use crate::smtp::address::{Charset, Domain};

/// How the message came in.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    pub id: SpoolId,
    pub at: UnixMillis,
    pub client: &'a Client,
    pub hostname: &'a str,
    /// The `with` word: `SMTP`, `ESMTP` or `UTF8SMTP` (RFC 3848, RFC 6531 4.3).
    pub protocol: &'a str,
}

/// Made once at the end of data and stored, so that every attempt sends the same.
pub fn prepend(arrival: Arrival<'_>, facts: &Facts) -> Bytes {
    let Arrival { id, at, client, hostname, protocol } = arrival;
    let date = date(at);
    let mut lines = String::with_capacity(320);
    lines.push_str("Received: from ");
    write_from(&mut lines, client);
    lines.push_str(&format!(
        "\r\n\tby {hostname} (mailsluice) with {protocol} id {id};\r\n\t{date}\r\n"
    ));
    if !facts.has_message_id {
        lines.push_str(&format!("Message-ID: <{id}@{hostname}>\r\n"));
    }
    if !facts.has_date {
        lines.push_str(&format!("Date: {date}\r\n"));
    }
    if facts.starts_folded {
        // The content has no header and begins with a blank: it must not become the end of ours.
        lines.push_str("\r\n");
    }
    lines.into()
}

/// `helo ([address])`; a name that is no domain goes into the comment, with what a comment cannot hold quoted (R13).
fn write_from(lines: &mut String, client: &Client) {
    let address = match client.address.parse() {
        Ok(IpAddr::V4(address)) => format!("[{address}]"),
        Ok(IpAddr::V6(address)) => format!("[IPv6:{address}]"),
        // A Unix socket has none.
        Err(_) => client.address.to_string(),
    };
    match Domain::parse(&client.helo, Charset::Ascii) {
        Ok(helo) => lines.push_str(&format!("{helo} ({address})")),
        Err(_) => {
            lines.push_str("unknown (HELO ");
            for c in client.helo.chars() {
                match c {
                    '(' | ')' | '\\' => lines.extend(['\\', c]),
                    ' '..='~' => lines.push(c),
                    _ => lines.push('?'),
                }
            }
            lines.push_str(&format!(" {address})"));
        }
    }
}

/// An RFC 5322 3.3 date-time in UTC.
pub fn date(at: UnixMillis) -> String {
    // The HTTP form (RFC 9110 5.6.7) differs only in how it names the zone.
    let last = Duration::from_secs(253_402_300_799);
    let time = UNIX_EPOCH + Duration::from_millis(at.0).min(last);
    httpdate::fmt_http_date(time).replace("GMT", "+0000")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(helo: &str, address: &str, facts: &Facts) -> String {
        let client = Client { address: address.into(), helo: helo.into() };
        let arrival = Arrival {
            id: SpoolId::from_u128(0x0195_0000_0000_7000_8000_0000_0000_0001),
            at: UnixMillis(1_795_502_531_000),
            client: &client,
            hostname: "relay.test",
            protocol: "ESMTP",
        };
        String::from_utf8(prepend(arrival, facts).to_vec()).unwrap()
    }

    #[test]
    fn missing_lines_are_added_and_present_ones_are_not() {
        let id = "01950000-0000-7000-8000-000000000001";
        let received = format!(
            "Received: from app.test ([127.0.0.1])\r\n\tby relay.test (mailsluice) with ESMTP id {id};\r\n\tTue, 24 Nov 2026 06:42:11 +0000\r\n"
        );
        let bare = lines("app.test", "127.0.0.1", &Facts::default());
        assert_eq!(
            bare,
            format!(
                "{received}Message-ID: <{id}@relay.test>\r\nDate: Tue, 24 Nov 2026 06:42:11 +0000\r\n"
            )
        );
        let facts = Facts { has_message_id: true, has_date: true, ..Facts::default() };
        assert_eq!(lines("app.test", "127.0.0.1", &facts), received);
    }

    #[test]
    fn a_name_that_is_no_domain_cannot_leave_its_comment() {
        let facts = Facts { has_message_id: true, has_date: true, ..Facts::default() };
        let line = lines("my (printer) \\", "::1", &facts);
        assert!(
            line.starts_with(
                "Received: from unknown (HELO my \\(printer\\) \\\\ [IPv6:::1])\r\n\tby"
            ),
            "{line}"
        );
    }
}
