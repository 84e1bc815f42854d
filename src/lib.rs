//! mailsluice: a mail gateway that stands beside old applications.

pub mod smtp;

pub mod envelope;
pub mod outcome;

pub mod message;

pub mod spool;

pub mod listener;

pub mod provider;

pub mod delivery;

pub mod config;

pub mod admin;

pub mod sandbox;

pub mod app;
pub mod cli;

pub mod metrics;
pub mod telemetry;

pub mod clock;
pub mod shutdown;

pub mod bench;
