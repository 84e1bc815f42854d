//! The real binary against scripted and real peers, on loopback and free ports. One module per topic.
//!
//! `SLOW_TESTS=1` runs the long forms. `MAILSLUICE_REQUIRE_PEERS=1` turns the skip of a missing real peer into a failure.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::string_slice,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::disallowed_methods,
    unreachable_pub,
    reason = "a test says what went wrong by ending"
)]

mod support;

/// The commands, their output and their exit codes.
mod cli;
/// `kill -9`, full disks, and what the kernel saw.
mod crash;
/// Mail goes from a client to an upstream, byte for byte.
mod deliver;
/// The dialog files, against the binary.
mod dialogs;
/// What a provider would make of a message.
mod explain;
/// What limits, time-outs and hostile clients do to the front door.
mod front_door;
/// Microsoft 365, as the sandbox plays it.
mod graph;
/// SIGTERM, and starting when something is in the way.
mod lifecycle;
mod login;
/// Postfix (with dovecot for its logins), swaks, smtplib and curl.
mod peers;
/// The queue, for operators.
mod queue;
/// Reports to senders and to the postmaster.
mod reports;
/// Who readers see as the sender.
mod sender;
/// README, sample, metrics, import table: they say what is true.
mod tidy;
/// Upstreams that refuse, hang, lie and drop, at every stage.
mod upstream;
/// An upstream that wants a token.
mod xoauth2;
