//! Every metric, in one place. The README's table is checked against [`Metrics::describe`].
//!
//! Labels come from closed sets, so the number of series does not grow with traffic (R74). There is no default
//! registry: whoever counts holds an `Arc<Metrics>`.

use std::fs;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Counter, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

use crate::clock;
use crate::outcome::{Outcome, Scope, Stage};

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    described: Vec<(String, String)>,
    pub connections: IntGauge,
    pub connections_total: IntCounter,
    pub connections_refused: IntCounterVec,
    pub accepted: IntCounter,
    pub accepted_recipients: IntCounter,
    pub refused: IntCounterVec,
    pub received_bytes: IntCounter,
    pub attempts: IntCounter,
    pub deliveries: IntCounterVec,
    pub recipients: IntCounterVec,
    pub in_doubt: IntCounter,
    pub in_doubt_messages: IntGauge,
    pub reports: IntCounterVec,
    pub queue: IntGaugeVec,
    pub in_flight: IntGauge,
    pub queue_bytes: IntGauge,
    pub queue_oldest: IntGauge,
    pub time_in_queue: Histogram,
    pub attempt_seconds: Histogram,
    pub commit_seconds: Histogram,
    pub spool_free: IntGauge,
    pub spool_used: IntGauge,
    pub spool_damaged: IntCounter,
    pub provider_open: IntGauge,
    pub last_success: Gauge,
    pub losses: IntCounterVec,
    pub token_fetches: IntCounterVec,
    pub token_expiry: Gauge,
    pub credential_expiry: Gauge,
    pub log_lines_lost: IntCounter,
    process: Process,
}

/// What the system says of the process; the names are those that every Prometheus client has.
#[derive(Debug)]
struct Process {
    cpu_seconds: Counter,
    resident: IntGauge,
    open_fds: IntGauge,
    max_fds: IntGauge,
    start_time: Gauge,
}

impl Process {
    /// What cannot be asked stays as it was.
    fn measure(&self) {
        use rustix::process::{Resource, getrlimit};
        use rustix::time::{ClockId, clock_gettime};
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let cpu = Duration::try_from(cpu).unwrap_or_default().as_secs_f64();
        self.cpu_seconds.inc_by((cpu - self.cpu_seconds.get()).max(0.0));
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
        if let Some(pages) = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()) {
            self.resident.set(gauge(pages.saturating_mul(rustix::param::page_size() as u64)));
        }
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            // Without the one that looks.
            self.open_fds.set(gauge((open.count() as u64).saturating_sub(1)));
        }
        self.max_fds.set(gauge(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)));
    }
}

/// Why a client or a message was turned away: the label `reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The client's address is not in `allow`.
    NotAllowed,
    /// `limits.connections` were taken and none could make room.
    TooManyConnections,
    /// `limits.connections_per_client` were taken.
    TooManyOfClient,
    /// An idle connection made room for another.
    Evicted,
    /// There is no provider that takes mail.
    NoProvider,
    /// The spool is full, or under its floor.
    Full,
    /// The spool could not store it.
    Storage,
    /// Larger than the limit.
    TooLarge,
    /// Too many Received lines.
    Loop,
    /// The From may not send here, and `sender.policy` is `reject`.
    Sender,
    /// A lone CR or LF, and `limits.bare_newline` is `reject`.
    Content,
    /// The client went away or took too long before the end of data.
    Unfinished,
}

impl Refusal {
    pub fn label(self) -> &'static str {
        match self {
            Self::NotAllowed => "not_allowed",
            Self::TooManyConnections => "connections",
            Self::TooManyOfClient => "connections_per_client",
            Self::Evicted => "evicted",
            Self::NoProvider => "no_provider",
            Self::Full => "full",
            Self::Storage => "storage",
            Self::TooLarge => "too_large",
            Self::Loop => "loop",
            Self::Sender => "sender",
            Self::Content => "content",
            Self::Unfinished => "unfinished",
        }
    }
}

impl Metrics {
    #[expect(clippy::expect_used, reason = "names and labels are constants; a test makes one")]
    pub fn new() -> Self {
        let mut described = Vec::new();
        let registry = Registry::new();
        let mut opts = |name: &str, help: &str| {
            let name = match name.strip_prefix("process_") {
                Some(_) => name.to_owned(),
                None => format!("mailsluice_{name}"),
            };
            described.push((name.clone(), help.to_owned()));
            Opts::new(name, help)
        };
        fn register<C: Collector + Clone + 'static>(
            registry: &Registry,
            made: prometheus::Result<C>,
        ) -> C {
            let collector = made.expect("the name is valid");
            registry.register(Box::new(collector.clone())).expect("the name is used once");
            collector
        }
        macro_rules! metric {
            ($kind:ident, $name:literal, $help:literal) => {
                register(&registry, $kind::with_opts(opts($name, $help)))
            };
            ($kind:ident, $name:literal, $help:literal, [$($label:literal),+]) => {
                register(&registry, $kind::new(opts($name, $help), &[$($label),+]))
            };
        }
        macro_rules! histogram {
            ($name:literal, $help:literal, $buckets:expr) => {
                register(
                    &registry,
                    Histogram::with_opts(
                        HistogramOpts::from(opts($name, $help)).buckets($buckets.to_vec()),
                    ),
                )
            };
        }
        let metrics = Self {
            connections: metric!(IntGauge, "connections", "SMTP connections open now."),
            connections_total: metric!(IntCounter, "connections_total", "SMTP connections taken."),
            connections_refused: metric!(
                IntCounterVec,
                "connections_refused_total",
                "SMTP connections turned away or ended to make room, by reason.",
                ["reason"]
            ),
            accepted: metric!(
                IntCounter,
                "messages_accepted_total",
                "Messages answered with 250 after the end of data."
            ),
            accepted_recipients: metric!(
                IntCounter,
                "recipients_accepted_total",
                "Recipients of the accepted messages."
            ),
            refused: metric!(
                IntCounterVec,
                "messages_refused_total",
                "Messages turned away at MAIL, during data or at its end, by reason.",
                ["reason"]
            ),
            received_bytes: metric!(
                IntCounter,
                "received_bytes_total",
                "Octets of accepted content."
            ),
            attempts: metric!(
                IntCounter,
                "attempts_total",
                "Parts of messages handed to the provider."
            ),
            deliveries: metric!(
                IntCounterVec,
                "deliveries_total",
                "What attempts came to, per recipient, by outcome, scope and stage (both `none` where delivered).",
                ["outcome", "scope", "stage"]
            ),
            recipients: metric!(
                IntCounterVec,
                "recipients_total",
                "Recipients that came to an end, by outcome (delivered or failed).",
                ["outcome"]
            ),
            in_doubt: metric!(
                IntCounter,
                "in_doubt_total",
                "Recipients whose content was given away, or may have been when the process was killed, and that got no answer: the remote may have taken it."
            ),
            in_doubt_messages: metric!(
                IntGauge,
                "in_doubt_messages",
                "Messages, queued or held, that may have been taken already: see `mailsluice queue list --state in-doubt`."
            ),
            reports: metric!(
                IntCounterVec,
                "reports_total",
                "Reports put into the queue, by kind: failure, delay or relayed (to senders, or in their stead to the postmaster), digest or notice (to the postmaster).",
                ["kind"]
            ),
            queue: metric!(
                IntGaugeVec,
                "queue_messages",
                "Messages in the spool, by state (queued, held or failed).",
                ["state"]
            ),
            in_flight: metric!(IntGauge, "in_flight_messages", "Messages being sent now."),
            queue_bytes: metric!(
                IntGauge,
                "queue_bytes",
                "Octets of the contents of the messages in the spool, failed ones too."
            ),
            queue_oldest: metric!(
                IntGauge,
                "queue_oldest_age_seconds",
                "Age of the queued message that was accepted first; 0 when none is queued."
            ),
            time_in_queue: histogram!(
                "time_in_queue_seconds",
                "From acceptance to the end of the last recipient.",
                [
                    0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 600.0, 3600.0, 21600.0, 86400.0,
                    432_000.0
                ]
            ),
            attempt_seconds: histogram!(
                "attempt_seconds",
                "How long an attempt took.",
                [0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 30.0, 120.0, 600.0]
            ),
            commit_seconds: histogram!(
                "commit_seconds",
                "From the end of data until the message was durable on disk.",
                [0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1.0, 5.0]
            ),
            spool_free: metric!(
                IntGauge,
                "spool_free_bytes",
                "Free space on the file system of the spool."
            ),
            spool_used: metric!(
                IntGauge,
                "spool_used_bytes",
                "Octets that the spool takes on disk."
            ),
            spool_damaged: metric!(
                IntCounter,
                "spool_damaged_total",
                "Damage found in the spool: what the start reported, and each message whose record was found damaged when it was read since. Nothing of it is deleted."
            ),
            provider_open: metric!(
                IntGauge,
                "provider_open",
                "1 while mail flows to the provider, 0 while it is closed and probed, or there is none."
            ),
            last_success: metric!(
                Gauge,
                "last_success_timestamp_seconds",
                "When the provider last took a message, in seconds since 1970; 0 before the first."
            ),
            losses: metric!(
                IntCounterVec,
                "message_losses_total",
                "What messages lost on their way through Microsoft 365, by kind.",
                ["kind"]
            ),
            token_fetches: metric!(
                IntCounterVec,
                "token_fetches_total",
                "Tokens asked for, by result (fetched, refused, or failed for now).",
                ["result"]
            ),
            token_expiry: metric!(
                Gauge,
                "token_expiry_timestamp_seconds",
                "When the newest token ends, in seconds since 1970; 0 before the first."
            ),
            credential_expiry: metric!(
                Gauge,
                "credential_expiry_timestamp_seconds",
                "When the certificate that tokens are asked for with ends, in seconds since 1970; 0 without one."
            ),
            log_lines_lost: metric!(
                IntCounter,
                "log_lines_lost_total",
                "Log lines dropped because whoever reads the log did not keep up."
            ),
            process: Process {
                cpu_seconds: metric!(
                    Counter,
                    "process_cpu_seconds_total",
                    "Processor time, user and system, in seconds."
                ),
                resident: metric!(
                    IntGauge,
                    "process_resident_memory_bytes",
                    "Memory that is resident."
                ),
                open_fds: metric!(IntGauge, "process_open_fds", "File descriptors open now."),
                max_fds: metric!(IntGauge, "process_max_fds", "File descriptors that may be open."),
                start_time: metric!(
                    Gauge,
                    "process_start_time_seconds",
                    "When the process started, in seconds since 1970."
                ),
            },
            described: Vec::new(),
            registry: registry.clone(),
        };
        let build =
            metric!(IntGaugeVec, "build_info", "Always 1; the version is a label.", ["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        for reason in [
            Refusal::NotAllowed,
            Refusal::TooManyConnections,
            Refusal::TooManyOfClient,
            Refusal::Evicted,
        ] {
            metrics.connections_refused.with_label_values(&[reason.label()]);
        }
        for reason in [
            Refusal::NoProvider,
            Refusal::Full,
            Refusal::Storage,
            Refusal::TooLarge,
            Refusal::Loop,
            Refusal::Sender,
            Refusal::Content,
            Refusal::Unfinished,
        ] {
            metrics.refused.with_label_values(&[reason.label()]);
        }
        for outcome in ["delivered", "failed"] {
            metrics.recipients.with_label_values(&[outcome]);
        }
        for kind in ["failure", "delay", "relayed", "digest", "notice"] {
            metrics.reports.with_label_values(&[kind]);
        }
        for kind in ["header", "recipient", "part", "signature", "invitation", "text", "copy"] {
            metrics.losses.with_label_values(&[kind]);
        }
        for result in ["fetched", "refused", "failed"] {
            metrics.token_fetches.with_label_values(&[result]);
        }
        for state in ["queued", "held", "failed"] {
            metrics.queue.with_label_values(&[state]);
        }
        let started = Duration::from_millis(clock::wall().0);
        metrics.process.start_time.set(started.as_secs_f64());
        Self { described, ..metrics }
    }

    pub fn refuse_connection(&self, reason: Refusal) {
        self.connections_refused.with_label_values(&[reason.label()]).inc();
    }

    pub fn refuse_message(&self, reason: Refusal) {
        self.refused.with_label_values(&[reason.label()]).inc();
    }

    /// One recipient's outcome of one attempt.
    pub fn settle(&self, outcome: &Outcome) {
        let (scope, stage) = match outcome.cause() {
            Some(cause) => (Scope::label(cause.scope), Stage::label(cause.stage)),
            None => ("none", "none"),
        };
        self.deliveries.with_label_values(&[outcome.label(), scope, stage]).inc();
    }

    /// The text that Prometheus scrapes (exposition format 0.0.4).
    pub fn render(&self) -> String {
        self.process.measure();
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }

    /// Name and help of every metric.
    pub fn describe(&self) -> &[(String, String)] {
        &self.described
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::{Cause, Receipt};

    #[test]
    fn every_metric_has_its_unit_and_help() {
        let metrics = Metrics::new();
        metrics.settle(&Outcome::Delivered(Receipt::new("250 ok")));
        metrics.settle(&Outcome::Deferred(Cause::new(Scope::Recipient, Stage::Rcpt, "451 later")));
        let text = metrics.render();
        for (name, help) in metrics.describe() {
            assert!(text.contains(&format!("# HELP {name} {help}")), "{name}");
            assert!(help.ends_with('.'), "{name}");
        }
        assert!(text.contains(
            "mailsluice_deliveries_total{outcome=\"deferred\",scope=\"recipient\",stage=\"rcpt\"} 1"
        ));
    }
}
