//! mailsluice: a mail gateway that stands beside old applications.
//!
//! They speak plain SMTP to it on localhost. It keeps every accepted message on disk until the one active provider has
//! taken it.
//!
//! # The way of a message
//!
//! ```text
//! app ──SMTP──► listener ─► session ─► spool (durable) ─► 250
//!                                         │ wake
//!                               schedule ─► gate ─► provider ──► upstream SMTP server | Graph
//!                                  ▲                   │ one outcome per recipient
//!                                  └── retry / wait ───┴─► done | failed (kept, and reported)
//! ```
//!
//! One direction, no short cuts. The listener and the delivery side meet only in the spool and in one wake-up (the head
//! of a new message, sent on a channel that `app` lays). To follow one message through the code: [`listener`] accepts
//! the socket, its `connection` drives a [`smtp::session::Session`] and puts the finished [`envelope::Envelope`] and
//! content into the [`spool`]; the [`delivery::dispatcher`] takes what is due, hands it to the [`provider`], and writes
//! what came of it back.
//!
//! # Promises, in this order
//!
//! 1. **No accepted message is lost.** The 250 after the end of data goes out only after the message is durable on disk.
//! 2. **The envelope is the truth.** Exactly the RCPT TO addresses get the mail, whatever the header says.
//! 3. **Duplicates only where the protocol leaves no choice**: the connection was lost after the final dot or after a
//!    request that sends, or the process died between the remote's answer and our record of it.
//! 4. **A fault of the provider is never the message's fault.** It closes the [`delivery::gate`]; nothing is counted
//!    against a message meanwhile, and nothing bounces for it.
//! 5. **One active provider**, one set of credentials.
//!
//! # Code map
//!
//! The modules below are in the order in which to read them. Start with [`envelope`], then [`smtp::session`].
//!
//! - [`smtp`] is the protocol, without sockets, clock, tasks or logs: bytes in, steps out.
//! - [`envelope`] and [`outcome`] are the words that the rooms share. Whose fault a refusal is, is decided by one table,
//!   [`outcome::verdict`].
//! - [`message`] works on the raw bytes of a header, and composes reports; [`policy`] says who readers see as the sender.
//! - [`listener`] is sockets in, [`provider`] is sockets out, [`spool`] is the disk, [`delivery`] is the engine between.
//! - [`explain`] says what a provider would make of a message, and sends nothing.
//! - [`config`] reads the file into plain structs; [`admin`] answers HTTP; [`sandbox`] is a stand-in for the world.
//! - [`app`] is the only place that builds the graph of parts; [`cli`] is the command line.
//!
//! # Where a change goes
//!
//! - A key of the configuration: the table in `config::keys` (README and the sample follow it), the struct in [`config`],
//!   its reading in `config::load`, what goes together in `config::validate`; [`app`] hands the section to its part.
//! - A verdict on a reply: [`outcome::verdict`], or `account_fault` beside it where the reply speaks of the account, and a
//!   row in `outcome/tests.rs`.
//! - A metric: [`metrics`], and where the fact becomes true. An event of the log: there, and README's list.
//! - A word that `queue show` or `list` says: `admin::view` makes it, `cli::queue` prints it.
//! - What changes after acceptance is `envelope::Progress`; `spool::wire` writes it.
//!
//! Tests hold README and code together; `UPDATE_EXPECT=1 cargo test` writes the generated parts and the golden files anew.
//!
//! # Who may use whom
//!
//! The edges between modules; a test reads this table and the `crate::` paths of the code, and fails on an edge that is
//! not here. `clock`, `metrics` and `shutdown` are open to all but the pure (those whose row says so), `ordered` to all.
//!
//! | module | may use |
//! |---|---|
//! | `smtp` | pure |
//! | `outcome` | pure, `smtp::address`, `smtp::reply` |
//! | `envelope` | pure, `smtp::address`, `smtp::params`, `smtp::reply`, `outcome` |
//! | `clock` | `envelope` |
//! | `ordered` | pure |
//! | `metrics` | `outcome` |
//! | `shutdown` | |
//! | `config` | `smtp::address`, `smtp::data`, `smtp::reply` |
//! | `telemetry` | `config` |
//! | `message` | pure, `smtp::address`, `smtp::reply`, `envelope`, `outcome` |
//! | `message::outgoing` | `smtp::address`, `envelope`, `message` |
//! | `policy` | `smtp::address`, `smtp::reply`, `envelope`, `message`, `config` |
//! | `delivery::schedule` | pure, `envelope` |
//! | `delivery::retry` | pure, `envelope`, `outcome`, `config` |
//! | `delivery::gate` | pure, `envelope`, `outcome`, `delivery::retry` |
//! | `delivery::operator` | `smtp::reply`, `envelope`, `outcome`, `spool`, `delivery::gate`, `telemetry` |
//! | `delivery::reports` | pure, `smtp::address`, `smtp::params`, `smtp::reply`, `envelope`, `outcome`, `message`, `delivery::gate`, `config` |
//! | `delivery::dispatcher` | `smtp::address`, `smtp::reply`, `envelope`, `outcome`, `message`, `policy`, `spool`, `provider`, `delivery`, `config`, `telemetry` |
//! | `spool` | `envelope`, `outcome`, `smtp::address`, `smtp::params`, `smtp::reply`, `config` |
//! | `listener` | `smtp`, `envelope`, `outcome`, `message`, `policy`, `spool`, `config` |
//! | `provider::smtp::dialog` | pure, `smtp::address`, `smtp::params`, `smtp::reply`, `envelope`, `outcome`, `config` |
//! | `provider::graph::answer` | pure, `smtp::reply`, `outcome` |
//! | `provider::graph::message` | pure, `smtp::address`, `smtp::params`, `envelope`, `message` |
//! | `provider` | `smtp::address`, `smtp::params`, `smtp::reply`, `envelope`, `outcome`, `message`, `config` |
//! | `explain` | `smtp::address`, `smtp::params`, `smtp::reply`, `envelope`, `message`, `policy`, `provider::graph`, `config` |
//! | `admin` | `envelope`, `outcome`, `spool`, `delivery::operator`, `telemetry` |
//! | `sandbox` | `smtp`, `envelope`, `config`, `app` |
//! | `app` | everything |
//! | `cli` | everything |
//! | `bench` | everything |
//!
//! And as absences: `smtp` never sees a socket, a clock or tokio. The listener never asks a provider anything: it reads
//! [`envelope::Intake`]. The log on disk never chooses what is sent next: the schedule does. `listener` and `delivery`
//! do not know each other. A provider touches neither spool nor schedule. Only [`clock`] reads time. There are no
//! statics and no default registry. A part takes its own section of the configuration, never the whole.

pub mod smtp;

pub mod envelope;
pub mod outcome;

pub mod message;
pub mod policy;

pub mod listener;

pub mod spool;

pub mod delivery;

pub mod provider;

pub mod config;

pub mod explain;

pub mod admin;

pub mod sandbox;

pub mod app;
pub mod cli;

pub mod metrics;
pub mod telemetry;

pub mod clock;
pub mod ordered;
pub mod shutdown;

pub mod bench;
