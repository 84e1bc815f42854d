//! The SMTP protocol as the server side speaks it, and the words both sides share.
//!
//! Nothing here knows a socket, a clock, a task or a log: bytes and `now` come in as arguments, steps go out as values.
//! That is why every rule of RFC 5321 that we keep can be tested by a function call, at every cut of the input.

#![warn(clippy::indexing_slicing, clippy::wildcard_enum_match_arm)]

pub mod address;
pub mod params;
pub mod reply;

pub mod command;
pub mod data;
mod heard;
pub mod line;
pub mod session;

#[cfg(test)]
pub(crate) mod testing;
