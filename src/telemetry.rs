//! The log: one event per fact, formatted where it happens and written by a thread of its own.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tracing::{Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{FilterExt as _, LevelFilter, Targets, filter_fn};
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config;
use crate::metrics::Metrics;
use crate::telemetry::lines::Lines;
use crate::telemetry::recent::Recent;

pub(crate) mod lines;
mod mask;
pub mod recent;

pub use lines::Guard;

/// How long whoever must not go on before a line is written waits for that.
const WRITTEN_WITHIN: Duration = Duration::from_secs(1);

/// The log of this process, and its last events.
static LOG: OnceLock<(Written, Arc<Recent>)> = OnceLock::new();

/// Starts logging to standard error. Lines are flushed when the guard goes.
pub fn start(config: &config::Log, metrics: Arc<Metrics>) -> io::Result<Guard> {
    let level = match config.level {
        config::LogLevel::Error => Level::ERROR,
        config::LogLevel::Warn => Level::WARN,
        config::LogLevel::Info => Level::INFO,
        config::LogLevel::Debug => Level::DEBUG,
        config::LogLevel::Trace => Level::TRACE,
    };
    let json = match config.format {
        config::LogFormat::Auto => !io::stderr().is_terminal(),
        config::LogFormat::Text => false,
        config::LogFormat::Json => true,
    };
    let recent = Arc::new(Recent::default());
    // A line that is JSON and has every event in it need not be made twice.
    let shares_lines = json && level >= Level::INFO;
    let own = Events { recent: Arc::clone(&recent), addresses: config.addresses };
    let events = shares_lines.then(|| Arc::clone(&recent));
    let lost = metrics.log_lines_lost.clone();
    let (lines, guard) = Guard::start(move |n| lost.inc_by(n))?;
    let pipe = Pipe { lines: Arc::clone(&lines), metrics, events, addresses: config.addresses };
    // A second start in one process (tests) keeps the first.
    LOG.get_or_init(|| (Written(Some(lines)), recent));
    // What libraries say is of interest only when it goes wrong.
    let filter = Targets::new().with_default(LevelFilter::WARN).with_target("mailsluice", level);
    if shares_lines {
        install(tracing_subscriber::registry().with(filter).with(json_lines().with_writer(pipe)));
    } else {
        let is_event = filter_fn(|metadata| metadata.fields().field("event").is_some());
        let ours = Targets::new().with_target("mailsluice", Level::INFO);
        let own = json_lines().with_writer(own).with_filter(ours.and(is_event));
        let subscriber = tracing_subscriber::registry().with(own);
        if json {
            install(subscriber.with(json_lines().with_writer(pipe).with_filter(filter)));
        } else {
            let text = fmt::layer().with_target(false).with_ansi(false);
            install(subscriber.with(text.with_writer(pipe).with_filter(filter)));
        }
    }
    log_panics();
    Ok(guard)
}

/// The last events of the log that [`start`] has started; before that there are none.
pub fn recent() -> Arc<Recent> {
    LOG.get().map(|(_, recent)| Arc::clone(recent)).unwrap_or_default()
}

fn json_lines<S: Subscriber + for<'a> LookupSpan<'a>>()
-> fmt::Layer<S, fmt::format::JsonFields, fmt::format::Format<fmt::format::Json>> {
    let layer = fmt::layer().json().flatten_event(true).with_current_span(false);
    layer.with_span_list(false).with_target(false)
}

fn install(subscriber: impl Subscriber + Send + Sync + 'static) {
    drop(subscriber.try_init());
}

/// A panic ends one task, not the daemon; it is told as an event like any other.
fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let payload = info.payload();
        let what = payload.downcast_ref::<&str>().copied().map(str::to_owned);
        let what = what.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
        tracing::error!(
            event = "panic",
            place,
            what,
            "a task panicked at {place}: {what}; please report this as a bug"
        );
    }));
}

/// For what must not be known to the disk before it is known to people: lines wait in memory for a moment, and a process
/// that is killed takes them with it.
#[derive(Clone, Debug)]
pub struct Written(Option<Arc<Lines>>);

/// That of the log that [`start`] has started; before that, nothing is waited for.
pub fn written() -> Written {
    LOG.get().map_or(Written(None), |(written, _)| written.clone())
}

impl Written {
    /// Waits until all that was logged before is written. Where standard error is stuck, not for ever: mail goes on.
    pub async fn wait(&self) {
        let Some(lines) = &self.0 else { return };
        // An error is the end of the log.
        let told = tokio::time::timeout(WRITTEN_WITHIN, lines.written()).await;
        told.unwrap_or(Ok(())).unwrap_or_default();
    }

    /// With someone else to write the lines.
    #[cfg(test)]
    pub(crate) fn by() -> (Self, Arc<Lines>) {
        let lines = Arc::new(Lines::default());
        (Self(Some(Arc::clone(&lines))), lines)
    }
}

/// Where the subscriber writes: hands lines to the thread.
#[derive(Clone)]
struct Pipe {
    lines: Arc<Lines>,
    metrics: Arc<Metrics>,
    /// Gets the events among the lines.
    events: Option<Arc<Recent>>,
    /// Whether they stand as they are.
    addresses: bool,
}

impl Write for Pipe {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let shown = shown(line, self.addresses);
        if let Some(events) = self.events.as_ref().filter(|_| is_event(&shown)) {
            events.push(&shown);
        }
        if !self.lines.push(&shown) {
            self.metrics.log_lines_lost.inc();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Pipe {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// The one place where addresses are masked: whatever wrote the line, and whoever reads it.
fn shown(line: &[u8], addresses: bool) -> Cow<'_, [u8]> {
    match addresses {
        true => Cow::Borrowed(line),
        false => mask::masked(line),
    }
}

/// Whether a JSON line has the field `event`. Within a string its quotes would be escaped.
fn is_event(line: &[u8]) -> bool {
    memchr::memmem::find(line, b"\"event\":\"")
        .is_some_and(|at| line.get(at.wrapping_sub(1)) == Some(&b','))
}

/// Where the subscriber writes events that are not in the log, or not as JSON.
#[derive(Clone)]
struct Events {
    recent: Arc<Recent>,
    addresses: bool,
}

impl Write for Events {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.recent.push(&shown(line, self.addresses));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Events {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
