//! mailsluice: a mail gateway that stands beside old applications.

pub mod smtp;

pub mod envelope;
pub mod outcome;

pub mod spool;

pub mod provider;

pub mod config;

pub mod clock;

pub mod bench;
