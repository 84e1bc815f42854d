//! The engine: which message is tried when, and what follows from the outcome.
//!
//! `retry`, `schedule`, `gate` and `reports` are pure: `now` and randomness come in as arguments. `dispatcher` is the async
//! one, and `operator` how others ask it.

#![warn(clippy::indexing_slicing, clippy::wildcard_enum_match_arm)]

pub mod retry;

pub mod schedule;

pub mod gate;

pub mod reports;

pub mod operator;

pub mod dispatcher;
