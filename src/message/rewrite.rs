//! The header fields of the author (RFC 5322 3.6.2) as the sender policy wants them. All other lines stay as they are.

use std::borrow::Cow;
use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::message::header::{MAX_NAME as MAX_FIELD_NAME, MAX_VALUE, is_separator};
use crate::smtp::address::{Charset, Domain, Mailbox};

/// Longest display name that is kept, in octets; a longer one is nobody's name and would not fit into a line.
const MAX_NAME: usize = 700;
/// A line is folded before the address where it would be longer (RFC 5322 2.1.1).
const LINE: usize = 78;

/// What the policy wants.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    /// The address that readers see where the application's may not stand.
    pub sender: &'a Mailbox,
    /// The display name where there is none, as [`display_name`] makes it; empty for none.
    pub sender_name: &'a [u8],
    /// Takes `@` out of display names, for a server that takes them for addresses.
    pub clean_names: bool,
    pub may_stand: &'a (dyn Fn(&Mailbox) -> bool + Sync),
}

/// What came of it.
#[derive(Debug)]
pub struct Rewritten {
    /// In place of the first `used` octets of the content; goes directly behind what is put before it.
    pub header: Vec<u8>,
    pub used: usize,
    /// The first mailbox of the From that leaves.
    pub author: Option<Mailbox>,
    pub from: From,
    /// The header goes on behind what was looked at: these fields are to be dropped from all of the content, and
    /// `header` goes before all of it (`used` is 0).
    pub drops: Option<&'static [&'static str]>,
}

/// What became of the application's From.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// It stands, to the octet.
    Untouched,
    /// Its addresses stand; a display name was changed, a further From or a `Sender` removed, or the header ended.
    Stands,
    /// The provider's sender took its place, and is to be the reverse path too.
    Replaced,
}

/// Rewrites the header that `content` begins with. `is_all`: the content ends there.
pub fn rewrite(content: &[u8], is_all: bool, rules: &Rules<'_>) -> Rewritten {
    let header = Header::scan(content, is_all);
    let is_open = !header.has_ended && !is_all;
    let is_broken = !header.is_separated && header.end < content.len();
    let first = header.of(Name::From).next();
    let value = match first {
        // Its end was not seen, so nothing is known of it.
        Some(field) if is_open && field.range.end == content.len() => None,
        Some(field) => content.get(field.value.clone()),
        None => None,
    };
    let list = List::read(value.unwrap_or_default());
    let stands = list.stands(rules.may_stand);
    let line = match stands {
        true => standing(&list, rules),
        false => Some(from_line(list.name(), rules.sender.as_str(), rules)),
    };
    let author = match stands {
        true => list.mailboxes().next().cloned(),
        false => Some(rules.sender.clone()),
    };
    let is_alone = header.of(Name::From).count() == 1;
    let sender_goes = |field: &Field| {
        let value = content.get(field.value.clone()).unwrap_or_default();
        !stands || !all_may_stand(value, rules.may_stand)
    };
    let is_alone = is_alone && !header.of(Name::Sender).any(sender_goes);
    if stands && line.is_none() && is_alone && !is_open && !is_broken {
        let (header, used, from, drops) = (Vec::new(), 0, From::Untouched, None);
        return Rewritten { header, used, author, from, drops };
    }
    let is_said = |field: &Field| {
        content.get(field.value.clone()).is_some_and(|value| !value.trim_ascii().is_empty())
    };
    // Behind what was looked at there may be a Reply-To.
    let replies = !stands
        && !is_open
        && list.mailboxes().next().is_some()
        && !header.of(Name::ReplyTo).any(is_said);
    let mut from = match (line, first) {
        (Some(line), _) => line,
        (None, Some(field)) => {
            let mut line = content.get(field.range.clone()).unwrap_or_default().to_vec();
            end_line(&mut line);
            line
        }
        (None, None) => Vec::new(),
    };
    if replies {
        push_reply_to(value.unwrap_or_default(), &list, &mut from);
    }
    let became = if stands { From::Stands } else { From::Replaced };
    if is_open {
        let drops = Some(&["from", "sender"][..]);
        return Rewritten { header: from, used: 0, author, from: became, drops };
    }

    let mut out = Vec::with_capacity(header.end + from.len() + 4);
    let mut copied = 0;
    // Where there is no From, the new one goes on top.
    if first.is_none() {
        out.extend_from_slice(&from);
    }
    let mut placed = first.is_none();
    for field in &header.fields {
        let goes = match field.name {
            Name::From => true,
            Name::Sender => sender_goes(field),
            Name::ReplyTo => replies,
        };
        if !goes {
            continue;
        }
        out.extend_from_slice(content.get(copied..field.range.start).unwrap_or_default());
        copied = field.range.end;
        if field.name == Name::From && !placed {
            placed = true;
            out.extend_from_slice(&from);
        }
    }
    out.extend_from_slice(content.get(copied..header.end).unwrap_or_default());
    if is_broken {
        // What follows is no field, and some readers would look for more of them behind it.
        out.extend_from_slice(b"\r\n");
    }
    Rewritten { header: out, used: header.end, author, from: became, drops: None }
}

/// Whether a From has at least one mailbox and nothing else, and each of them may stand; also those that some readers
/// see in a name.
pub fn all_may_stand(value: &[u8], rule: &dyn Fn(&Mailbox) -> bool) -> bool {
    List::read(value).stands(rule)
}

/// The first of the mailboxes that may not.
pub fn find_other(value: &[u8], rule: &dyn Fn(&Mailbox) -> bool) -> Option<Mailbox> {
    let list = List::read(value);
    let posing = list.posing.iter().filter_map(|name| mailbox(&bare(name)));
    list.mailboxes().cloned().chain(posing).find(|mailbox| !rule(mailbox))
}

/// The name as a header writes it: atoms, a quoted string, or encoded words (RFC 2047).
pub fn display_name(name: &str) -> Vec<u8> {
    let name: String = name.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let name = name.trim();
    if name.is_ascii() {
        let mut out = Vec::new();
        push_name(name.as_bytes(), Syntax::Text, &mut out);
        return out;
    }
    // An encoded word has at most 75 octets: 12 around the text, and 4 for each 3 of it.
    let mut words: Vec<String> = vec![String::new()];
    for c in name.chars() {
        match words.last_mut() {
            Some(word) if word.len() + c.len_utf8() <= 45 => word.push(c),
            _ => words.push(c.to_string()),
        }
    }
    let encoded: Vec<String> =
        words.iter().map(|word| format!("=?UTF-8?B?{}?=", BASE64.encode(word))).collect();
    encoded.join("\r\n ").into_bytes()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    From,
    Sender,
    ReplyTo,
}

#[derive(Clone, Debug)]
struct Field {
    name: Name,
    /// With its end of line, where it has one.
    range: Range<usize>,
    /// From behind the colon.
    value: Range<usize>,
}

/// Where the fields of the author are. What a field is, and where the header ends, is as in
/// [`crate::message::header::HeaderFilter`].
struct Header {
    fields: Vec<Field>,
    /// Where the empty line or the first line that is no field begins.
    end: usize,
    /// Such a line was seen.
    has_ended: bool,
    /// It was an empty one.
    is_separated: bool,
}

impl Header {
    /// `is_all`: the content ends there. Otherwise a last line without its end may still become a field.
    fn scan(content: &[u8], is_all: bool) -> Self {
        let mut header = Self { fields: Vec::new(), end: 0, has_ended: false, is_separated: false };
        // The last field is one of the author's: its continuation lines belong to it.
        let mut is_within = false;
        while let Some(rest) = content.get(header.end..).filter(|rest| !rest.is_empty()) {
            let start = header.end;
            let length = memchr::memchr(b'\n', rest).map_or(rest.len(), |at| at + 1);
            let line = rest.get(..length).unwrap_or_default();
            let end = start + length;
            match line {
                [b' ' | b'\t', ..] if start > 0 => {
                    if let Some(field) = header.fields.last_mut().filter(|_| is_within) {
                        field.range.end = end;
                        field.value.end = end;
                    }
                }
                _ if start == 0 && is_separator(line.get(..=MAX_FIELD_NAME).unwrap_or(line)) => {}
                _ => {
                    let Some(colon) = colon(line) else {
                        if !is_all && !line.ends_with(b"\n") {
                            return header;
                        }
                        header.has_ended = true;
                        header.is_separated = line.starts_with(b"\r") || line == b"\n";
                        return header;
                    };
                    let name = name(line.get(..colon).unwrap_or_default());
                    is_within = name.is_some();
                    header.fields.extend(name.map(|name| Field {
                        name,
                        range: start..end,
                        value: start + colon + 1..end,
                    }));
                }
            }
            header.end = end;
        }
        header
    }

    fn of(&self, name: Name) -> impl Iterator<Item = &Field> {
        self.fields.iter().filter(move |field| field.name == name)
    }
}

/// Where the name of the field ends; None where the line is no field.
fn colon(line: &[u8]) -> Option<usize> {
    let colon = memchr::memchr(b':', line)?;
    let name = without_blanks(line.get(..colon)?);
    let is_name = !name.is_empty() && name.iter().all(|b| matches!(b, b'!'..=b'~'));
    (is_name && colon <= MAX_FIELD_NAME).then_some(colon)
}

/// RFC 5322 4.5.3: blanks may stand before the colon.
fn without_blanks(mut name: &[u8]) -> &[u8] {
    while let [rest @ .., b' ' | b'\t'] = name {
        name = rest;
    }
    name
}

fn name(name: &[u8]) -> Option<Name> {
    let name = without_blanks(name);
    match name.len() {
        4 if name.eq_ignore_ascii_case(b"from") => Some(Name::From),
        6 if name.eq_ignore_ascii_case(b"sender") => Some(Name::Sender),
        8 if name.eq_ignore_ascii_case(b"reply-to") => Some(Name::ReplyTo),
        _ => None,
    }
}

/// The From as it was, or the mailboxes in it where there is more, which would not answer to anybody.
fn push_reply_to(value: &[u8], list: &List<'_>, out: &mut Vec<u8>) {
    out.extend_from_slice(b"Reply-To:");
    if list.is_whole && list.posing.is_empty() {
        return push_value(value, out);
    }
    for (at, mailbox) in list.mailboxes().enumerate() {
        out.extend_from_slice(if at > 0 { b",\r\n " } else { b" " });
        out.extend_from_slice(mailbox.as_str().as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}

/// The value of a field as it was, in lines that end with CRLF.
fn push_value(value: &[u8], out: &mut Vec<u8>) {
    let value = value.strip_suffix(b"\n").unwrap_or(value);
    for line in value.split(|b| *b == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        out.extend(line.iter().map(|b| if *b == b'\r' { b' ' } else { *b }));
        out.extend_from_slice(b"\r\n");
    }
}

fn end_line(line: &mut Vec<u8>) {
    if !line.ends_with(b"\n") {
        line.extend_from_slice(b"\r\n");
    }
}

/// A new line for a From whose addresses stand; None where it stands as it is.
fn standing(list: &List<'_>, rules: &Rules<'_>) -> Option<Vec<u8>> {
    if let ([entry], None) = (&list.entries[..], list.group)
        && !entry.has_name()
        && !rules.sender_name.is_empty()
        && entry.mailbox.as_ref().is_some_and(|mailbox| mailbox.is_same(rules.sender))
    {
        return Some(from_line(None, rules.sender.as_str(), rules));
    }
    let is_clean = |entry: &Entry<'_>| {
        let mut name = Vec::new();
        entry.push_name(&mut name);
        name.len() <= MAX_NAME && clean(&name).is_none()
    };
    if !rules.clean_names || list.entries.iter().all(is_clean) {
        return None;
    }
    let mut line = b"From: ".to_vec();
    for (at, entry) in list.entries.iter().enumerate() {
        if at > 0 {
            line.extend_from_slice(b",\r\n ");
        }
        let mut name = Vec::new();
        entry.push_name(&mut name);
        let name = match name.len() > MAX_NAME {
            true => Vec::new(),
            false => clean(&name).unwrap_or(name),
        };
        let address = entry.mailbox.as_ref().map_or("", Mailbox::as_str);
        push_mailbox(&name, address, &mut line);
    }
    line.extend_from_slice(b"\r\n");
    Some(line)
}

/// `From: name <address>`; without a name, that of the rules.
fn from_line(name: Option<Vec<u8>>, address: &str, rules: &Rules<'_>) -> Vec<u8> {
    let name = match name.filter(|name| name.len() <= MAX_NAME) {
        Some(name) if rules.clean_names => clean(&name).unwrap_or(name),
        Some(name) => name,
        None => rules.sender_name.to_vec(),
    };
    let mut line = Vec::with_capacity(name.len() + address.len() + 16);
    line.extend_from_slice(b"From: ");
    push_mailbox(&name, address, &mut line);
    line.extend_from_slice(b"\r\n");
    line
}

fn push_mailbox(name: &[u8], address: &str, line: &mut Vec<u8>) {
    if name.is_empty() {
        return line.extend_from_slice(address.as_bytes());
    }
    line.extend_from_slice(name);
    let last = line.rsplit(|b| *b == b'\n').next().map_or(0, <[u8]>::len);
    line.extend_from_slice(if last + address.len() + 3 > LINE { b"\r\n <" } else { b" <" });
    line.extend_from_slice(address.as_bytes());
    line.push(b'>');
}

/// One element of an address list.
#[derive(Debug)]
struct Entry<'a> {
    /// What stands before the brackets, or all of it where there is no address.
    phrase: &'a [u8],
    /// The inside of the first comment: old mailers have the name there.
    comment: &'a [u8],
    mailbox: Option<Mailbox>,
}

impl Entry<'_> {
    fn has_name(&self) -> bool {
        let mut name = Vec::new();
        self.push_name(&mut name);
        !name.is_empty()
    }

    fn push_name(&self, out: &mut Vec<u8>) {
        push_name(self.phrase, Syntax::Phrase, out);
        if out.is_empty() {
            push_name(self.comment, Syntax::Comment, out);
        }
    }
}

/// An address list (RFC 5322 3.4), read octet by octet: display names may be in any charset.
#[derive(Debug)]
struct List<'a> {
    entries: Vec<Entry<'a>>,
    /// The name of the first group.
    group: Option<&'a [u8]>,
    /// There is at least one mailbox, and nothing that is none.
    is_whole: bool,
    /// Names with an `@` outside of quotes, which some readers take for the address; but for those that say the address
    /// itself.
    posing: Vec<&'a [u8]>,
}

impl<'a> List<'a> {
    /// One that is not whole where the value is longer than what acceptance keeps of it.
    fn read(value: &'a [u8]) -> Self {
        let (entries, posing) = (Vec::new(), Vec::new());
        let mut list = Self { entries, group: None, is_whole: value.len() < MAX_VALUE, posing };
        if !list.is_whole {
            return list;
        }
        let mut open = Open::at(0);
        let mut in_group = false;
        let mut at = 0;
        while let Some(byte) = value.get(at) {
            match byte {
                b'"' | b'(' | b'<' => {
                    let end = closing(value, at);
                    list.is_whole &= end.is_some();
                    let end = end.unwrap_or(value.len());
                    let inner = value.get(at + 1..end).unwrap_or_default();
                    match byte {
                        b'(' if open.comment.is_empty() => open.comment = inner,
                        b'<' if open.brackets.is_none() => open.brackets = Some(at..end),
                        b'<' => list.is_whole = false,
                        _ => {}
                    }
                    at = end;
                }
                b':' if !in_group && open.brackets.is_none() => {
                    in_group = true;
                    let name = value.get(open.start..at).unwrap_or_default();
                    list.group = list.group.or(Some(name));
                    list.posing.extend(Some(name).filter(|name| has_at(name)));
                    open = Open::at(at + 1);
                }
                b',' | b';' => {
                    list.is_whole &= *byte == b',' || in_group;
                    in_group &= *byte == b',';
                    list.close(value, &open, at);
                    open = Open::at(at + 1);
                }
                _ => {}
            }
            at += 1;
        }
        list.close(value, &open, value.len());
        list.is_whole &= !in_group && list.mailboxes().next().is_some();
        list
    }

    fn close(&mut self, value: &'a [u8], open: &Open<'a>, end: usize) {
        let all = value.get(open.start..end).unwrap_or_default();
        let (phrase, address) = match &open.brackets {
            Some(brackets) => {
                let after = value.get(brackets.end + 1..end).unwrap_or_default();
                self.is_whole &= bare(after).is_empty();
                let phrase = value.get(open.start..brackets.start).unwrap_or_default();
                (phrase, value.get(brackets.start + 1..brackets.end).unwrap_or_default())
            }
            None => (&[][..], all),
        };
        let bare = bare(address);
        if open.brackets.is_none() && bare.is_empty() && open.comment.is_empty() {
            return;
        }
        let mailbox = mailbox(&bare);
        self.is_whole &= mailbox.is_some();
        if has_at(phrase) {
            let says_it = |mailbox: &Mailbox| {
                self::mailbox(&self::bare(phrase)).is_some_and(|it| it.is_same(mailbox))
            };
            self.posing.extend(Some(phrase).filter(|_| !mailbox.as_ref().is_some_and(says_it)));
        }
        let phrase = match &mailbox {
            // `<root>` is called root.
            None if bare_name(phrase).is_empty() => address,
            _ => phrase,
        };
        self.entries.push(Entry { phrase, comment: open.comment, mailbox });
    }

    fn stands(&self, rule: &dyn Fn(&Mailbox) -> bool) -> bool {
        self.is_whole
            && self.mailboxes().all(rule)
            && self.posing.iter().all(|name| mailbox(&bare(name)).is_some_and(|it| rule(&it)))
    }

    fn mailboxes(&self) -> impl Iterator<Item = &Mailbox> {
        self.entries.iter().filter_map(|entry| entry.mailbox.as_ref())
    }

    /// The display name of the author: the group's, else the first mailbox's.
    fn name(&self) -> Option<Vec<u8>> {
        let mut name = Vec::new();
        if let Some(group) = self.group {
            push_name(group, Syntax::Phrase, &mut name);
        }
        if let (true, Some(entry)) = (name.is_empty(), self.entries.first()) {
            entry.push_name(&mut name);
        }
        Some(name).filter(|name| !name.is_empty())
    }
}

/// An element whose end was not seen yet.
struct Open<'a> {
    start: usize,
    comment: &'a [u8],
    /// Where `<` and `>` are.
    brackets: Option<Range<usize>>,
}

impl Open<'_> {
    fn at(start: usize) -> Self {
        Self { start, comment: &[], brackets: None }
    }
}

/// Where what opens at `at` closes: a quoted string, a comment (they nest) or brackets, which may hold the others.
fn closing(value: &[u8], at: usize) -> Option<usize> {
    let opened = *value.get(at)?;
    let mut depth = 0_usize;
    let mut at = at + 1;
    loop {
        match (opened, *value.get(at)?) {
            (b'"' | b'(', b'\\') => at += 1,
            (b'"', b'"') | (b'<', b'>') => return Some(at),
            (b'(', b'(') => depth += 1,
            (b'(', b')') => match depth.checked_sub(1) {
                Some(less) => depth = less,
                None => return Some(at),
            },
            (b'<', b'"' | b'(') => at = closing(value, at)?,
            _ => {}
        }
        at += 1;
    }
}

/// Whether an `@` stands outside of quoted strings and comments.
fn has_at(phrase: &[u8]) -> bool {
    let mut at = 0;
    while let Some(found) = memchr::memchr3(b'@', b'"', b'(', phrase.get(at..).unwrap_or_default())
    {
        at += found;
        match phrase.get(at) {
            Some(b'@') => return true,
            _ => at = closing(phrase, at).map_or(phrase.len(), |end| end + 1),
        }
    }
    false
}

/// Without comments, and without the blanks that may stand around the parts of an address. Other control characters
/// stay: no address has them.
fn bare(address: &[u8]) -> Cow<'_, [u8]> {
    let is_plain = |b: &u8| !is_white(*b) && !matches!(b, b'(' | b'"');
    let trimmed = trim(address, is_white);
    if trimmed.iter().all(is_plain) {
        return Cow::Borrowed(trimmed);
    }
    let mut out: Vec<u8> = Vec::with_capacity(trimmed.len());
    let mut blank = false;
    let mut at = 0;
    while let Some(byte) = trimmed.get(at) {
        match byte {
            b'(' => {
                at = closing(trimmed, at).unwrap_or(trimmed.len());
                blank = true;
            }
            b if is_white(*b) => blank = true,
            b => {
                let joins = |b: u8| matches!(b, b'@' | b'.' | b',' | b':');
                if blank && out.last().is_some_and(|last| !joins(*last)) && !joins(*b) {
                    out.push(b' ');
                }
                blank = false;
                let end = if *b == b'"' { closing(trimmed, at) } else { Some(at) };
                let end = end.unwrap_or(trimmed.len().saturating_sub(1));
                out.extend_from_slice(trimmed.get(at..=end).unwrap_or_default());
                at = end;
            }
        }
        at += 1;
    }
    Cow::Owned(out)
}

fn bare_name(phrase: &[u8]) -> Vec<u8> {
    let mut name = Vec::new();
    push_name(phrase, Syntax::Phrase, &mut name);
    name
}

fn mailbox(bare: &[u8]) -> Option<Mailbox> {
    let text = std::str::from_utf8(bare).ok()?;
    // A source route before the address (RFC 5322 4.4).
    let address = match text.starts_with('@') {
        true => {
            let (route, address) = text.split_once(':')?;
            let is_hop = |hop: &str| {
                hop.strip_prefix('@').is_some_and(|hop| Domain::parse(hop, Charset::Utf8).is_ok())
            };
            route.split(',').all(|hop| hop.is_empty() || is_hop(hop)).then_some(address)?
        }
        false => text,
    };
    Mailbox::parse(address, Charset::Utf8).ok()
}

fn is_blank(byte: u8) -> bool {
    byte <= b' ' || byte == 127
}

fn is_white(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

fn trim(mut bytes: &[u8], is_trimmed: fn(u8) -> bool) -> &[u8] {
    while let [first, rest @ ..] = bytes
        && is_trimmed(*first)
    {
        bytes = rest;
    }
    while let [rest @ .., last] = bytes
        && is_trimmed(*last)
    {
        bytes = rest;
    }
    bytes
}

/// How a name is written where it is taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Syntax {
    /// Atoms and quoted strings; comments are not part of it.
    Phrase,
    /// Words, some of their characters escaped.
    Comment,
    /// Only words.
    Text,
}

/// Appends the name as a phrase (RFC 5322 3.2.5): what is one stays, control characters become blanks, and words that
/// cannot stand alone are quoted.
fn push_name(raw: &[u8], syntax: Syntax, out: &mut Vec<u8>) {
    let mut words: Vec<(&[u8], Word)> = Vec::new();
    let mut folded = false;
    let mut at = 0;
    while let Some(byte) = raw.get(at).copied() {
        if is_blank(byte) {
            folded |= byte == b'\n';
            at += 1;
            continue;
        }
        let fold = std::mem::take(&mut folded) && !words.is_empty();
        let start = at;
        match (syntax, byte) {
            (Syntax::Phrase, b'(') => {
                at = closing(raw, at).map_or(raw.len(), |end| end + 1);
                continue;
            }
            (Syntax::Phrase, b'"') => {
                let end = closing(raw, at).unwrap_or(raw.len());
                let text = raw.get(at + 1..end).unwrap_or_default();
                if !trim(text, is_blank).is_empty() {
                    words.push((text, Word { quoted: Quoted::Already, fold }));
                }
                at = end + 1;
            }
            _ => {
                let ends =
                    |b: &u8| is_blank(*b) || (syntax == Syntax::Phrase && matches!(b, b'"' | b'('));
                let rest = raw.get(at..).unwrap_or_default();
                at += rest.iter().position(ends).unwrap_or(rest.len()).max(1);
                let word = raw.get(start..at).unwrap_or_default();
                let stands = word.iter().all(is_atom) || is_encoded_word(word);
                let quoted = if stands { Quoted::No } else { Quoted::Must };
                words.push((word, Word { quoted, fold }));
            }
        }
    }
    let has = |quoted| words.iter().any(|(_, word)| word.quoted == quoted);
    let has_encoded = memchr::memmem::find(raw, b"=?").is_some();
    if has(Quoted::Must) && !has(Quoted::Already) && !has_encoded {
        // As one string: nothing in it has a meaning of its own.
        out.push(b'"');
        for (at, (word, _)) in words.iter().enumerate() {
            if at > 0 {
                out.push(b' ');
            }
            push_quoted(word, syntax == Syntax::Comment, out);
        }
        return out.push(b'"');
    }
    for (at, (text, word)) in words.iter().enumerate() {
        if at > 0 {
            out.extend_from_slice(if word.fold { b"\r\n " } else { b" " });
        }
        match word.quoted {
            Quoted::No => push_atom(text, out),
            quoted => {
                let is_escaped = quoted == Quoted::Already || syntax == Syntax::Comment;
                out.push(b'"');
                push_quoted(text, is_escaped, out);
                out.push(b'"');
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Word {
    quoted: Quoted,
    /// A line began before it.
    fold: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quoted {
    No,
    Already,
    Must,
}

/// RFC 5322 `atext`, dots (RFC 5322 4.1 `obs-phrase`), and anything beyond ASCII.
fn is_atom(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || *byte > 127 || b"!#$%&'*+-/=?^_`{|}~.".contains(byte)
}

/// An encoded word as it may stand in a phrase, but for an `@` that should have been encoded.
fn is_encoded_word(word: &[u8]) -> bool {
    word.iter().all(|b| is_atom(b) || *b == b'@')
        && encoded_word(word).is_some_and(|(_, length)| length == word.len())
}

fn push_atom(atom: &[u8], out: &mut Vec<u8>) {
    for byte in atom {
        match byte {
            b'@' => out.extend_from_slice(b"=40"),
            byte => out.push(*byte),
        }
    }
}

/// The inside of a quoted string, on one line. `is_escaped`: it was one before.
fn push_quoted(text: &[u8], is_escaped: bool, out: &mut Vec<u8>) {
    let mut bytes = text.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' if is_escaped => match bytes.next() {
                Some(b'\r' | b'\n') | None => {}
                Some(escaped) if is_blank(escaped) => out.push(b' '),
                Some(escaped) => out.extend_from_slice(&[b'\\', escaped]),
            },
            b'\\' | b'"' => out.extend_from_slice(&[b'\\', byte]),
            // Line ends go with folding; all that is no character becomes a blank.
            b'\r' | b'\n' => {}
            b if is_blank(b) => out.push(b' '),
            b => out.push(b),
        }
    }
}

/// The name with ` at ` for every `@`, also in encoded words; None where it has none.
fn clean(name: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(name.len() + 16);
    let mut changed = false;
    let mut rest = name;
    while let Some((&byte, after)) = rest.split_first() {
        if let Some((word, length)) = encoded_word(rest) {
            let cleaned = clean_word(&word);
            changed |= cleaned.is_some();
            let raw = rest.get(..length).unwrap_or_default();
            out.extend_from_slice(cleaned.as_deref().unwrap_or(raw));
            rest = rest.get(length..).unwrap_or_default();
            continue;
        }
        match byte {
            b'@' => {
                changed = true;
                out.extend_from_slice(b" at ");
            }
            byte => out.push(byte),
        }
        rest = after;
    }
    changed.then_some(out)
}

/// `=?charset?encoding?text?=` (RFC 2047 2).
struct EncodedWord<'a> {
    charset: &'a [u8],
    encoding: u8,
    text: &'a [u8],
}

/// The encoded word that `bytes` begin with, and its length.
fn encoded_word(bytes: &[u8]) -> Option<(EncodedWord<'_>, usize)> {
    let inner = bytes.strip_prefix(b"=?")?;
    let mut parts = inner.splitn(3, |b| *b == b'?');
    let (charset, encoding, rest) = (parts.next()?, parts.next()?, parts.next()?);
    let [encoding] = encoding else { return None };
    let end = memchr::memmem::find(rest, b"?=")?;
    let text = rest.get(..end)?;
    let is_word = |bytes: &[u8]| bytes.iter().all(|b| (b'!'..=b'~').contains(b));
    let length = 2 + charset.len() + 3 + end + 2;
    let word = EncodedWord { charset, encoding: *encoding, text };
    (is_word(charset) && is_word(text)).then_some((word, length))
}

/// None where it has no `@`, or where one cannot be told from a part of another character.
fn clean_word(word: &EncodedWord<'_>) -> Option<Vec<u8>> {
    let charset = word.charset.to_ascii_lowercase();
    let like_ascii: [&[u8]; 6] =
        [b"utf-8", b"us-ascii", b"iso-8859-", b"windows-125", b"koi8-", b"ascii"];
    if !like_ascii.iter().any(|prefix| charset.starts_with(prefix)) {
        return None;
    }
    let text = match word.encoding.to_ascii_uppercase() {
        b'B' => {
            let text = BASE64.decode(word.text).ok().filter(|text| text.contains(&b'@'))?;
            let spaced: Vec<&[u8]> = text.split(|b| *b == b'@').collect();
            BASE64.encode(spaced.join(&b" at "[..])).into_bytes()
        }
        b'Q' => {
            let text = String::from_utf8_lossy(word.text);
            let spaced = text.replace('@', "_at_").replace("=40", "_at_");
            (spaced != text).then(|| spaced.into_bytes())?
        }
        _ => return None,
    };
    Some([b"=?", word.charset, b"?", &[word.encoding], b"?", &text, b"?="].concat())
}

#[cfg(test)]
mod tests;
