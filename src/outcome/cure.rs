//! What an operator can do about a trouble of the provider or of the account, as far as the remote's words tell.

use memchr::memmem;

use super::{Cause, Scope, Stage};
use crate::smtp::reply::EnhancedStatus;

impl Cause {
    /// None where the words say it themselves, nothing is known, or only one message is concerned.
    pub fn cure(&self) -> Option<&'static str> {
        let says_it = || memmem::find(self.words.as_bytes(), b"provider.").is_some();
        if self.scope < Scope::Sender || says_it() {
            return None;
        }
        let status =
            self.status.map(|EnhancedStatus(class, subject, detail)| (class, subject, detail));
        let code = self.words.as_bytes().get(..3).unwrap_or_default();
        match (code, status) {
            // facts of Exchange Online (SMTP AUTH) and of Google.
            (_, Some((5, 7, 139 | 30))) => Some(
                "is SMTP AUTH switched off for this mailbox or tenant? An administrator can switch it on \
                 (Set-CASMailbox -SmtpClientAuthenticationDisabled $false)",
            ),
            (_, Some((5, 7, 9))) => {
                Some("this account wants a password of its own for applications")
            }
            (b"530", _) | (_, Some((5, 7, 57))) => Some(
                "the server wants a login: are provider.auth, provider.username and its password set?",
            ),
            (_, Some((5, 1, 8) | (5, 7, 501..=503 | 705 | 708 | 750))) => {
                Some("an administrator of the account has to unblock it at the provider")
            }
            (_, Some((5, 7, 60) | (5, 2, 252))) => Some(
                "may the account send as provider.sender? Grant it Send As there, or write another \
                 sender",
            ),
            (_, Some((5, 7, 64))) => Some(
                "does the connector at the provider still name this machine's address or certificate?",
            ),
            _ => match self.stage {
                Stage::Connect => Some(
                    "are provider.server and provider.port right, is the server up, and does a firewall \
                     let this machine through?",
                ),
                Stage::Greeting if code.starts_with(b"5") => Some(
                    "does the server have to be told to take mail from this machine's address?",
                ),
                Stage::Auth if code.starts_with(b"5") => {
                    Some("are provider.username and its password right?")
                }
                _ => None,
            },
        }
    }

    /// The words, where they were said, and what to do about it.
    pub fn with_cure(&self) -> String {
        match self.cure() {
            Some(cure) => format!("{self}; {cure}"),
            None => self.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_about_a_trouble_is_told() {
        let cases = [
            (Stage::Connect, None, "connection refused", Some("is the server up")),
            (Stage::Greeting, None, "554 go away", Some("this machine's address")),
            (Stage::Greeting, None, "421 too busy", None),
            (Stage::Auth, Some((5, 7, 8)), "535 5.7.8 bad credentials", Some("provider.username")),
            (Stage::Auth, Some((4, 7, 0)), "454 4.7.0 later", None),
            (Stage::Auth, Some((5, 7, 139)), "535 5.7.139 disabled", Some("Set-CASMailbox")),
            (Stage::Auth, Some((5, 7, 9)), "534 5.7.9 app password", Some("for applications")),
            (Stage::Mail, None, "530 log in first", Some("wants a login")),
            (Stage::EndOfData, Some((5, 7, 708)), "550 5.7.708 blocked", Some("unblock")),
            (Stage::EndOfData, Some((5, 7, 60)), "550 5.7.60 no", Some("Send As")),
            (Stage::StartTls, None, "no STARTTLS offered", None),
        ];
        for (stage, status, words, cure) in cases {
            let status =
                status.map(|(class, subject, detail)| EnhancedStatus(class, subject, detail));
            let cause = Cause { status, ..Cause::new(Scope::Provider, stage, words) };
            let said = cause.cure();
            match cure {
                None => assert_eq!(said, None, "{words}"),
                Some(cure) => {
                    assert!(said.is_some_and(|it| it.contains(cure)), "{words}: {said:?}");
                }
            }
            let narrow = Cause { scope: Scope::Message, ..cause };
            assert_eq!(
                narrow.with_cure(),
                narrow.to_string(),
                "a message's own trouble is no set-up's"
            );
        }
    }
}
