//! A message as it leaves in one attempt: what goes before the stored content, the header as the sender policy made it,
//! and the rest of the content as a stream.

use std::io;

use bytes::Bytes;

use crate::envelope::{Body, BodyReader, Envelope};
use crate::message::header::HeaderFilter;
use crate::message::rewrite::{From, Rewritten, Rules, rewrite};
use crate::smtp::address::Mailbox;

/// What a provider sends. Cheap to clone; can be read as often as it takes, always to the same octets.
#[derive(Clone, Debug)]
pub struct Message {
    /// `envelope.prepend`, and the header as it leaves where it was looked at.
    head: Bytes,
    /// What was read of the content beyond that.
    read: Bytes,
    /// What was not read yet.
    rest: BodyReader,
    /// Takes fields out of what was not read, where the header goes on there.
    filter: Option<HeaderFilter>,
    /// Of all of it, in octets.
    pub size: u64,
    /// It may hold octets above 127 (RFC 6152).
    pub eight_bit: bool,
    /// An address in it may need RFC 6531, as far as is known.
    pub smtputf8: bool,
    /// The first mailbox of the From that leaves, where one can be read.
    pub author: Option<Mailbox>,
}

impl Message {
    /// As it was accepted.
    pub fn stored(envelope: &Envelope, body: &Body) -> Self {
        Self {
            head: envelope.prepend.clone(),
            read: Bytes::new(),
            rest: body.reader(),
            filter: None,
            size: envelope.prepend.len() as u64 + body.len(),
            eight_bit: envelope.eight_bit,
            smtputf8: envelope.smtputf8,
            author: envelope.author.clone(),
        }
    }

    /// With its header by these rules; and whether the provider's sender took the author's place.
    ///
    /// Of a content that lies in a file the first chunk is read, and the rules are applied to what the header says there.
    /// Where it goes on behind that, a new From goes on top of it, and any other is dropped on the way.
    pub async fn rewritten(
        envelope: &Envelope,
        body: &Body,
        rules: &Rules<'_>,
    ) -> io::Result<(Self, From)> {
        let mut rest = body.reader();
        let content = rest.chunk().await?.unwrap_or_default();
        let is_all = content.len() as u64 == body.len();
        let rewritten = rewrite(&content, is_all, rules);
        let Rewritten { header, used, author, from, drops } = rewritten;
        if from == From::Untouched {
            let stored = Self::stored(envelope, body);
            return Ok((Self { read: content, rest, author, ..stored }, from));
        }
        // It ends with an empty line where the content has no header at all: the new lines go before that.
        let before = match envelope.prepend.strip_suffix(b"\r\n") {
            Some(lines) if used == 0 && lines.ends_with(b"\r\n") => lines,
            _ => &envelope.prepend,
        };
        let mut head = Vec::with_capacity(before.len() + header.len());
        head.extend_from_slice(before);
        head.extend_from_slice(&header);
        let mut read = content.slice(used..);
        let mut filter = drops.map(HeaderFilter::separating);
        if let Some(filter) = &mut filter {
            let mut passed = Vec::with_capacity(read.len());
            filter.push(&read, &mut passed);
            read = passed.into();
        }
        let (head, is_read) = (Bytes::from(head), is_all && filter.is_none());
        let unread = body.len() - content.len() as u64;
        let left = match &filter {
            Some(filter) => passed_octets(filter.clone(), rest.clone(), unread).await?,
            None => unread,
        };
        let in_content = envelope.eight_bit && !(is_read && read.is_ascii());
        let message = Self {
            size: head.len() as u64 + read.len() as u64 + left,
            eight_bit: !head.is_ascii() || in_content,
            smtputf8: envelope.smtputf8 || (from == From::Replaced && !rules.sender.is_ascii()),
            head,
            read,
            rest,
            filter,
            author,
        };
        Ok((message, from))
    }

    /// From its first octet.
    pub fn reader(&self) -> MessageReader {
        let (head, read, rest) = (self.head.clone(), self.read.clone(), self.rest.clone());
        MessageReader { head, read, rest, filter: self.filter.clone() }
    }
}

/// How many of the `unread` octets of the content pass. Reads on to the end of the header: a server that is told of more
/// than comes may refuse what it would have taken.
async fn passed_octets(
    mut filter: HeaderFilter,
    mut rest: BodyReader,
    mut unread: u64,
) -> io::Result<u64> {
    let mut octets = 0;
    while !filter.in_body() {
        let mut passed = Vec::new();
        let Some(chunk) = rest.chunk().await? else {
            filter.finish(&mut passed);
            return Ok(octets + passed.len() as u64);
        };
        filter.push(&chunk, &mut passed);
        octets += passed.len() as u64;
        unread = unread.saturating_sub(chunk.len() as u64);
    }
    Ok(octets + unread)
}

/// Reads a [`Message`] in chunks.
#[derive(Debug)]
pub struct MessageReader {
    head: Bytes,
    read: Bytes,
    rest: BodyReader,
    filter: Option<HeaderFilter>,
}

impl MessageReader {
    /// The next chunk; `None` at the end. As [`BodyReader::chunk`], the last one comes only after the stored content was
    /// found to be whole.
    pub async fn chunk(&mut self) -> io::Result<Option<Bytes>> {
        for known in [&mut self.head, &mut self.read] {
            if !known.is_empty() {
                return Ok(Some(std::mem::take(known)));
            }
        }
        let Some(filter) = &mut self.filter else { return self.rest.chunk().await };
        loop {
            let mut passed = Vec::new();
            match self.rest.chunk().await? {
                Some(chunk) if filter.in_body() => return Ok(Some(chunk)),
                Some(chunk) => filter.push(&chunk, &mut passed),
                None => {
                    self.filter.take().map(|filter| filter.finish(&mut passed));
                    return Ok(Some(passed.into()).filter(|passed: &Bytes| !passed.is_empty()));
                }
            }
            if !passed.is_empty() {
                return Ok(Some(passed.into()));
            }
        }
    }
}
