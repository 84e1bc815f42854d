//! What a client has said, for the log: its command lines, without what is a secret or may be content. Pure.

/// Command lines that nobody has taken yet. They are no more than one chunk of input.
#[derive(Debug, Default)]
pub(super) struct Heard {
    lines: Vec<Box<[u8]>>,
    /// AUTH was said, and no command since: lines may be the rest of it, from a client that does not read replies.
    in_auth: bool,
}

/// Stands for what is not shown.
const HIDDEN: &[u8] = b"***";
/// Other words behind AUTH may be the credentials themselves.
const MECHANISMS: [&[u8]; 4] = [b"PLAIN", b"LOGIN", b"XOAUTH2", b"CRAM-MD5"];

impl Heard {
    /// `line` has no end. What is no command in valid form may be content where `is_content` says so.
    pub(super) fn line(&mut self, line: &[u8], is_command: bool, is_content: bool) {
        let is_auth = starts_with(line.trim_ascii_start(), b"AUTH");
        self.in_auth = is_auth || (self.in_auth && !is_command);
        let shown = match (is_auth, is_command) {
            (true, _) => auth(line),
            (false, false) if self.in_auth || is_content => HIDDEN.into(),
            (false, _) => line.into(),
        };
        self.lines.push(shown);
    }

    /// One of which nothing was kept.
    pub(super) fn too_long(&mut self) {
        self.lines.push(b"(a line that is too long)".as_slice().into());
    }

    pub(super) fn take(&mut self) -> Vec<Box<[u8]>> {
        std::mem::take(&mut self.lines)
    }
}

fn starts_with(line: &[u8], word: &[u8]) -> bool {
    line.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word))
}

fn auth(line: &[u8]) -> Box<[u8]> {
    let words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    let mechanism = words.skip(1).take(1).filter(|word| is_mechanism(word));
    let shown: Vec<&[u8]> =
        [b"AUTH".as_slice()].into_iter().chain(mechanism).chain([HIDDEN]).collect();
    shown.join(&b' ').into()
}

fn is_mechanism(word: &[u8]) -> bool {
    MECHANISMS.iter().any(|known| word.eq_ignore_ascii_case(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines with what they are: `c`ommand, `x` for none, `?` for what may be content.
    fn check(lines: &[(&str, char)], expected: &[&str]) {
        let mut heard = Heard::default();
        for (line, kind) in lines {
            heard.line(line.as_bytes(), *kind == 'c', *kind == '?');
        }
        let shown: Vec<_> =
            heard.take().iter().map(|it| String::from_utf8_lossy(it).into_owned()).collect();
        assert_eq!(shown, expected);
        assert!(heard.take().is_empty());
    }

    #[test]
    fn commands_are_shown_as_they_came() {
        check(&[("EHLO x", 'c'), ("MAIL FROM:<a@b>", 'c')], &["EHLO x", "MAIL FROM:<a@b>"]);
        check(&[("HELP\x1b me", 'x'), ("", 'x')], &["HELP\x1b me", ""]);
    }

    #[test]
    fn no_credential_is_shown_however_it_is_sent() {
        check(
            &[("AUTH LOGIN", 'x'), ("dXNlcg==", 'x'), ("c2VjcmV0", 'x'), ("QUIT", 'c'), ("y", 'x')],
            &["AUTH LOGIN ***", "***", "***", "QUIT", "y"],
        );
        check(&[("auth plain AGEAc2VjcmV0", 'x')], &["AUTH plain ***"]);
        check(&[(" AUTH PLAIN AGEAc2VjcmV0", 'x')], &["AUTH PLAIN ***"]);
        check(&[("AUTH AGEAc2VjcmV0", 'x'), ("AUTHORIZATION: Basic x", 'x')], &["AUTH ***"; 2]);
    }

    #[test]
    fn what_may_be_content_is_not_shown() {
        check(&[("Dear Anna,", '?'), ("DATA", 'c')], &["***", "DATA"]);
    }
}
