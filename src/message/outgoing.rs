//! A message as it leaves in one attempt: what goes before the stored content, the header as the sender policy made it,
//! and the rest of the content as a stream.

use std::io;

use bytes::Bytes;

use crate::envelope::{Body, BodyReader, Envelope};
use crate::smtp::address::Mailbox;

/// What a provider sends. Cheap to clone; can be read as often as it takes, always to the same octets.
#[derive(Clone, Debug)]
pub struct Message {
    /// `envelope.prepend`, and the header as it leaves where it was looked at.
    pub(super) head: Bytes,
    /// What was read of the content beyond that.
    pub(super) read: Bytes,
    /// What was not read yet.
    pub(super) rest: BodyReader,
    /// Of all of it, in octets.
    pub size: u64,
    /// It may hold octets above 127 (RFC 6152).
    pub eight_bit: bool,
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
            size: envelope.prepend.len() as u64 + body.len(),
            eight_bit: envelope.eight_bit,
            author: envelope.author.clone(),
        }
    }

    /// From its first octet.
    pub fn reader(&self) -> MessageReader {
        let (head, read, rest) = (self.head.clone(), self.read.clone(), self.rest.clone());
        MessageReader { head, read, rest }
    }
}

/// Reads a [`Message`] in chunks.
#[derive(Debug)]
pub struct MessageReader {
    head: Bytes,
    read: Bytes,
    rest: BodyReader,
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
        self.rest.chunk().await
    }
}
