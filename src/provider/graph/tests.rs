use crate::smtp::address::Charset;

use super::*;

fn address(text: &str) -> Mailbox {
    Mailbox::parse(text, Charset::Ascii).unwrap()
}

#[test]
fn an_alias_is_remembered_for_an_hour_whatever_its_case() {
    let now = clock::now();
    let mut memory = Memory::default();
    memory.is_no_mailbox(&address("News@contoso.test"), now);
    let is_alias = |text, after| memory.is_alias(&address(text), now + after);
    assert!(is_alias("news@CONTOSO.test", REMEMBERED - Duration::from_secs(1)));
    assert!(!is_alias("news@contoso.test", REMEMBERED));
    assert!(!is_alias("other@contoso.test", Duration::ZERO));
}

#[test]
fn one_mailbox_that_may_not_be_looked_into_hides_no_other() {
    let now = clock::now();
    let mut memory = Memory::default();
    memory.may_not_look(&address("a@contoso.test"), now);
    assert!(memory.is_blind(&address("A@contoso.test"), now));
    assert!(!memory.is_blind(&address("b@contoso.test"), now));
    assert!(!memory.is_blind(&address("a@contoso.test"), now + REMEMBERED));
}

#[test]
fn what_is_remembered_is_bounded_and_makes_room() {
    let now = clock::now();
    let mut memory = Memory::default();
    for n in 0..MAX_REMEMBERED + 10 {
        memory.is_no_mailbox(&address(&format!("a{n}@contoso.test")), now);
    }
    assert_eq!(memory.aliases.len(), MAX_REMEMBERED);
    let later = now + REMEMBERED;
    memory.is_no_mailbox(&address("new@contoso.test"), later);
    assert_eq!(memory.aliases.len(), 1);
}

#[test]
fn a_mailbox_rests_as_long_as_was_asked_and_an_hour_at_most() {
    let now = clock::now();
    let (one, other) = (address("a@contoso.test"), address("b@contoso.test"));
    let mut memory = Memory::default();
    memory.is_to_rest(&one, Duration::from_secs(5), now);
    assert_eq!(memory.rest(&one, now + Duration::from_secs(2)), Some(Duration::from_secs(3)));
    assert_eq!(memory.rest(&other, now), None);
    assert_eq!(memory.rest(&one, now + Duration::from_secs(5)), None);
    memory.is_to_rest(&one, Duration::from_secs(1_000_000), now);
    assert_eq!(memory.rest(&one, now), Some(REMEMBERED));
}

#[test]
fn a_message_goes_through_its_authors_mailbox_and_a_report_through_the_senders() {
    let sender = address("me@contoso.test");
    let path = ReversePath::Mailbox(address("app@example.com"));
    let check = |path: &ReversePath, author: Option<&str>, expected: &str| {
        let author = author.map(address);
        assert_eq!(mailbox(&sender, path, author.as_ref()).as_str(), expected, "{author:?}");
    };
    check(&path, Some("you@contoso.test"), "you@contoso.test");
    check(&path, Some("ME@contoso.TEST"), "me@contoso.test");
    check(&path, None, "me@contoso.test");
    check(&ReversePath::Null, Some("you@contoso.test"), "me@contoso.test");
}
