//! `mailsluice run`: the daemon.

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

use crate::app::App;
use crate::clock;
use crate::config::{Config, Secrets};
use crate::metrics::Metrics;
use crate::telemetry;

pub(super) fn run(path: &Path) -> ExitCode {
    let config = match super::load(path, Secrets::Read) {
        Ok(config) => config,
        Err(code) => return code,
    };
    // A core dump would have the secrets in it (R60).
    let no_core = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = setrlimit(Resource::Core, no_core) {
        eprintln!("core dumps cannot be switched off: {error}");
    }
    let runtime = match super::runtime() {
        Ok(runtime) => runtime,
        Err(code) => return code,
    };
    let metrics = Arc::new(Metrics::new());
    let _log = match telemetry::start(&config.log, Arc::clone(&metrics)) {
        Ok(guard) => guard,
        Err(error) => {
            eprintln!("cannot start the log: {error}");
            return super::EX_OSERR.into();
        }
    };
    let name = path.display();
    info!(
        event = "starting",
        version = env!("CARGO_PKG_VERSION"),
        "mailsluice {} with {name}",
        env!("CARGO_PKG_VERSION")
    );
    let code = runtime.block_on(serve(config, metrics));
    // What may still block is a look-up of the upstream's name: nothing to wait for.
    runtime.shutdown_background();
    code
}

async fn serve(config: Config, metrics: Arc<Metrics>) -> ExitCode {
    let mut signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => {
            error!(%error, "cannot start: {error}");
            return super::EX_OSERR.into();
        }
    };
    let app = match App::start(config, metrics).await {
        Ok(app) => app,
        Err(error) => {
            error!(event = "stopped", %error, "cannot start: {error}");
            return super::EX_OSERR.into();
        }
    };
    let name = signals.end().await;
    info!(event = "signal", signal = name, "{name} received");
    let received = clock::now();
    let second = async {
        loop {
            let again = signals.end().await;
            // Who signals a process and its group says it twice and means it once.
            if again != name || clock::now() > received + TWICE {
                return again;
            }
        }
    };
    tokio::select! {
        () = app.stop() => {}
        // Dropping the stop mid-way is what a second signal asks for; what was accepted is on disk.
        name = second => warn!(event = "stopped", signal = name, "a second {name}: stopped at once"),
    }
    ExitCode::SUCCESS
}

/// The same signal within this time is no second one.
const TWICE: Duration = Duration::from_millis(500);

pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// The next signal that asks for the end.
    pub(super) async fn end(&mut self) -> &'static str {
        loop {
            // Signals are counted by the streams, so a branch that is dropped loses none.
            tokio::select! {
                _ = self.terminate.recv() => return "SIGTERM",
                _ = self.interrupt.recv() => return "SIGINT",
                _ = self.hangup.recv() => {
                    warn!(event = "signal", signal = "SIGHUP", "SIGHUP ignored: this version cannot reload; restart to apply a changed configuration");
                }
            }
        }
    }
}
