//! The command line. One file per command; what each prints and how it exits is an interface.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line talks to its user")]

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::Secrets;

mod check;
mod daemon;
mod explain;
mod health;
mod log;
mod queue;
mod run;
mod sandbox;
mod spool;
mod status;
mod version;

/// Exit codes, as sysexits(3) has them.
const EX_USAGE: u8 = 64;
const EX_DATAERR: u8 = 65;
const EX_NOINPUT: u8 = 66;
const EX_UNAVAILABLE: u8 = 69;
const EX_OSERR: u8 = 71;
const EX_CANTCREAT: u8 = 73;
const EX_TEMPFAIL: u8 = 75;
const EX_CONFIG: u8 = 78;

/// A mail gateway that stands beside old applications: they speak plain SMTP to it, it keeps every accepted message on
/// disk, and sends it through the one active provider.
///
/// Start with `mailsluice sandbox`, which needs no configuration: it runs the gateway against a stand-in upstream and
/// shows what arrives. Then write /etc/mailsluice/mailsluice.toml, look it over with `mailsluice check`, and
/// `mailsluice run`.
#[derive(Debug, Parser)]
#[command(name = "mailsluice", version, propagate_version = true, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 all right; 64 wrong usage; 65 something in the spool is damaged; 66 no such \
input; 69 not available; 71 the system refused; 73 a file cannot be written; 75 try again later; 78 the configuration \
is wrong."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the gateway in the foreground until SIGTERM or SIGINT
    Run(ConfigArgs),
    /// Check the configuration without starting: every problem at once, with line and column
    Check(ConfigArgs),
    /// Say what the provider would make of a message, and what it would lose on its way; nothing is sent
    Explain(explain::Args),
    /// Ask the running gateway whether it accepts mail (its /readyz); for container health checks
    Health(ConfigArgs),
    /// Run the gateway against a stand-in for its provider with an inbox, to try it or to test an application
    Sandbox(sandbox::Args),
    /// Look at the queue of the running gateway and act on it: list, show, retry, hold, release, delete and export messages
    Queue(queue::Args),
    /// Show the running gateway on one screen
    Status(status::Args),
    /// Show the last events of the running gateway, and follow them
    Log(log::Args),
    /// Look at a spool whose daemon is down or cannot start: list, print, verify and export messages
    Spool(spool::Args),
    /// Print the version
    Version,
}

#[derive(Debug, clap::Args)]
struct ConfigArgs {
    /// The configuration file
    #[arg(
        long,
        value_name = "FILE",
        env = "MAILSLUICE_CONFIG",
        default_value = "/etc/mailsluice/mailsluice.toml"
    )]
    config: PathBuf,
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nobody is left to tell when the terminal is gone.
            drop(error.print());
            return if error.use_stderr() { EX_USAGE.into() } else { ExitCode::SUCCESS };
        }
    };
    match cli.command {
        Command::Run(args) => run::run(&args.config),
        Command::Check(args) => check::run(&args.config),
        Command::Explain(args) => explain::run(&args),
        Command::Health(args) => health::run(&args.config),
        Command::Sandbox(args) => sandbox::run(&args),
        Command::Queue(args) => queue::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Log(args) => log::run(&args),
        Command::Spool(args) => spool::run(&args),
        Command::Version => version::run(),
    }
}

/// Reads the configuration, or says everything that is wrong with it.
fn load(path: &std::path::Path, secrets: Secrets) -> Result<crate::config::Config, ExitCode> {
    load_all(path, secrets).map(|loaded| loaded.config)
}

/// The same with the warnings, which are told too.
fn load_all(path: &std::path::Path, secrets: Secrets) -> Result<crate::config::Loaded, ExitCode> {
    let loaded = crate::config::load(path, secrets).map_err(|problems| {
        eprintln!("{problems}");
        ExitCode::from(EX_CONFIG)
    })?;
    // They are for who looks the configuration over or lives by it.
    if secrets != Secrets::Leave {
        for warning in &loaded.warnings {
            eprintln!("{}:{warning} (warning)", path.display());
        }
    }
    Ok(loaded)
}

/// Why a command ends early.
enum Stop {
    /// All is said.
    Told(ExitCode),
    /// An exit code and what is said of it.
    Said(u8, String),
    /// Standard output cannot be written.
    Output(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// What a command came to, said and made an exit code.
fn ended(done: Result<u8, Stop>) -> ExitCode {
    match done {
        Ok(code) => code.into(),
        Err(Stop::Told(code)) => code,
        Err(Stop::Said(code, words)) => {
            eprintln!("{words}");
            code.into()
        }
        // Whoever reads has seen enough, as in `mailsluice spool ls | head`.
        Err(Stop::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(Stop::Output(error)) => {
            eprintln!("writing to standard output: {error}");
            EX_OSERR.into()
        }
    }
}

/// The runtime of every command that waits.
fn runtime() -> Result<tokio::runtime::Runtime, ExitCode> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("mailsluice")
        .build()
        .map_err(|error| {
            eprintln!("cannot start: {error}");
            EX_OSERR.into()
        })
}
