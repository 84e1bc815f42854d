//! Wiring: the only place that builds the graph of parts, and knows the order in which they start and stop.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::admin;
use crate::clock;
use crate::config::{self, Config, OnMail};
use crate::delivery::dispatcher::{Dispatcher, Settings};
use crate::delivery::operator;
use crate::delivery::reports::House;
use crate::envelope::Intake;
use crate::listener::{self, slots};
use crate::metrics::Metrics;
use crate::outcome::Cause;
use crate::policy::{Names, Policy};
use crate::provider::Provider;
use crate::provider::graph::GraphProvider;
use crate::provider::smtp::SmtpProvider;
use crate::shutdown::Shutdown;
use crate::smtp::reply;
use crate::spool::log::{Log, OpenError, Report};
use crate::telemetry;

/// Descriptors beside those of clients: spool, log, admin, upstream connections.
const OTHER_DESCRIPTORS: u64 = 256 + admin::socket::PLACES as u64 + admin::socket::OPERATORS as u64;
/// How long the end waits for who has half a request open.
const ADMIN_GRACE: std::time::Duration = std::time::Duration::from_secs(1);
/// How long the start waits for a first token, so that the first client is told the right size.
const FIRST_TOKEN: std::time::Duration = std::time::Duration::from_secs(3);
/// Between two questions for a token, as long as there is none.
const RIGHTS_RETRY: std::time::Duration = std::time::Duration::from_secs(5);
/// Why larger messages are refused.
const WITHOUT_DRAFTS: &str = "to send larger ones by Microsoft 365, grant the gateway Mail.ReadWrite and see that large_messages is not off";

/// A running gateway.
pub struct App {
    /// Where SMTP listeners are bound, as logs name them.
    pub smtp: Vec<String>,
    /// The TCP ones of them.
    pub smtp_addresses: Vec<SocketAddr>,
    pub admin: SocketAddr,
    grace: std::time::Duration,
    spool: Arc<Log>,
    /// Of the listeners and their connections.
    acceptance: Shutdown,
    abort: CancellationToken,
    /// Of the dispatcher.
    delivery: Shutdown,
    provider: Option<Arc<dyn Provider>>,
    /// The file of the admin socket.
    socket: PathBuf,
    /// Of the admin listener, which ends last.
    admin_shutdown: Shutdown,
}

/// Why the gateway did not start.
#[derive(Debug)]
pub enum StartError {
    /// A socket, a limit: the system said no.
    System(io::Error),
    Spool(OpenError),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System(error) => error.fmt(f),
            Self::Spool(error) => error.fmt(f),
        }
    }
}

impl App {
    /// Binds first, so that what cannot start fails before it touches the spool; accepts last.
    pub async fn start(config: Config, metrics: Arc<Metrics>) -> Result<Self, StartError> {
        raise_descriptor_limit(config.limits.connections)?;
        let bound = config.listeners.iter().map(listener::bind).collect::<io::Result<Vec<_>>>();
        let bound = bound.map_err(StartError::System)?;
        let admin_socket = bind_admin(config.admin.bind).await?;
        let admin = admin_socket.local_addr().map_err(StartError::System)?;

        let Outlet { provider, graph } = provider(&config, &metrics)?;
        let (spool, report) = Log::open(&config.spool).await.map_err(StartError::Spool)?;
        let spool = Arc::new(spool);
        // Behind the lock of the spool: of two daemons the second is told by that.
        let operator_socket = bind_socket(&config.admin.socket)?;
        tell(&report);
        metrics.spool_damaged.inc_by(report.damaged.len() as u64);

        let (intake_is, intake) = watch::channel(intake(&config));
        if let Some(graph) = &graph {
            let learn = learn_rights(graph, &intake_is, config.limits.message_size);
            // Without a token nothing is known, and the start goes on.
            drop(tokio::time::timeout(FIRST_TOKEN, learn).await);
        }
        let (trouble_is, trouble) = watch::channel(None);
        let (accepted_is, accepted) = mpsc::unbounded_channel();
        let (operator, requests) = operator::channel();
        let grace = config.limits.shutdown_grace;

        let delivery = Shutdown::new();
        let concurrency = concurrency(&config);
        let policy = Arc::new(policy(&config));
        let settings = Settings {
            retry: config.retry.clone(),
            concurrency,
            policy: Arc::clone(&policy),
            house: house(&config),
        };
        let mut dispatcher = Dispatcher::new(
            Arc::clone(&spool),
            provider.clone(),
            settings,
            accepted,
            requests,
            Arc::clone(&metrics),
            trouble_is,
            telemetry::written(),
        );
        dispatcher.load();
        delivery.tasks.spawn(dispatcher.run(delivery.token.clone(), grace));

        let admin_shutdown = Shutdown::new();
        let acceptance = Shutdown::new();
        let shared = admin::Shared {
            spool: Arc::clone(&spool),
            metrics: Arc::clone(&metrics),
            intake: intake.clone(),
            trouble,
            stopping: acceptance.token.clone(),
            operator,
            recent: telemetry::recent(),
            followers: Arc::new(Semaphore::new(admin::FOLLOWERS)),
            facts: facts(&config, &bound, admin),
            end: admin_shutdown.token.clone(),
        };
        let shared = Arc::new(shared);
        admin_shutdown.tasks.spawn(admin::serve(admin_socket, Arc::clone(&shared)));
        admin_shutdown.tasks.spawn(admin::serve_operator(operator_socket, shared));
        let socket = config.admin.socket.clone();
        let address = format!("unix:{}", socket.display());
        info!(event = "listening", %address, protocol = "http", "admin listens on {address}");
        info!(event = "listening", address = %admin, protocol = "http", "admin listens on http://{admin}");

        let abort = CancellationToken::new();
        let limits = &config.limits;
        let slots = Arc::new(slots::Slots::new(limits.connections, limits.connections_per_client));
        let shared = Arc::new(listener::Shared {
            hostname: config.hostname.to_string(),
            policy,
            limits: config.limits.clone(),
            spool: Arc::clone(&spool),
            accepted: accepted_is,
            intake,
            metrics,
            slots,
            shutdown: acceptance.clone(),
            abort: abort.clone(),
        });
        let smtp = bound.iter().map(|bound| bound.name.clone()).collect();
        let smtp_addresses = bound.iter().filter_map(listener::Bound::address).collect();
        for bound in bound {
            acceptance.tasks.spawn(listener::listen(bound, Arc::clone(&shared)));
        }
        let stop = acceptance.token.clone();
        let most = config.limits.message_size;
        acceptance.tasks.spawn(async move {
            // Nothing is lost when it is dropped: it ends with acceptance.
            tokio::select! {
                () = stop.cancelled() => {}
                () = follow_rights(graph, intake_is, most) => {}
            }
        });
        Ok(Self {
            smtp,
            smtp_addresses,
            admin,
            grace,
            spool,
            acceptance,
            abort,
            delivery,
            provider,
            socket,
            admin_shutdown,
        })
    }

    /// Stops accepting, lets sessions that receive content and attempts under way end within the time of grace, then
    /// syncs and closes the spool (R70).
    pub async fn stop(self) {
        info!(event = "stopping", "stopping: no new mail is accepted; what is under way may end");
        let sessions = async {
            if tokio::time::timeout(self.grace, self.acceptance.stop()).await.is_err() {
                warn!(
                    "some sessions did not end within shutdown_grace and are cut off; their messages were not accepted"
                );
                self.abort.cancel();
                self.acceptance.stop().await;
            }
        };
        tokio::join!(sessions, self.delivery.stop());
        if let Some(provider) = &self.provider {
            provider.close().await;
        }
        // Before the spool is another's, who has a socket of that name. It may be gone already.
        drop(std::fs::remove_file(&self.socket));
        self.spool.close().await;
        // Whoever has half a request open is cut off when the runtime ends.
        tokio::time::timeout(ADMIN_GRACE, self.admin_shutdown.stop()).await.unwrap_or_default();
        info!(event = "stopped", "stopped");
    }
}

/// What the start found in the spool.
fn tell(report: &Report) {
    let Report { messages, in_doubt, damaged, torn, strays, is_copy_on_write } = report;
    for damage in damaged {
        error!(
            event = "damaged",
            %damage,
            "the spool is damaged: {damage}; all else in it is kept and delivered. See the folder damaged in the spool; \
             while the daemon is down, `mailsluice spool verify` says what is damaged"
        );
    }
    if *torn || *strays > 0 {
        info!(
            torn,
            strays,
            "the last run did not end in order: what it had not yet answered with 250 was dropped"
        );
    }
    if *in_doubt > 0 {
        warn!(
            in_doubt,
            "the last run ended within {in_doubt} attempts: what they were sending may have been taken"
        );
    }
    if *is_copy_on_write {
        info!(
            "the spool lies on a file system that copies on write: to mark mail as delivered takes space there, so spool.min_free counts twice"
        );
    }
    info!(event = "opened_spool", messages, "{messages} messages in the spool");
}

/// Room for every connection that the limits allow, or an error that says what is missing (R75).
fn raise_descriptor_limit(connections: usize) -> Result<(), StartError> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let need = connections as u64 + slots::SLACK as u64 + OTHER_DESCRIPTORS;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= need) {
        return Ok(());
    }
    if limit.maximum.is_some_and(|maximum| maximum < need) {
        let maximum = limit.maximum.unwrap_or(0);
        let text = format!(
            "limits.connections = {connections} needs {need} file descriptors and the system allows {maximum}: raise it (LimitNOFILE= in the unit, `ulimit -Hn`), or lower limits.connections"
        );
        return Err(StartError::System(io::Error::other(text)));
    }
    let raised = Rlimit { current: Some(need), maximum: limit.maximum };
    setrlimit(Resource::Nofile, raised).map_err(|error| {
        let text = format!("cannot raise the limit of file descriptors to {need}: {error}");
        StartError::System(io::Error::other(text))
    })
}

async fn bind_admin(address: SocketAddr) -> Result<TcpListener, StartError> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|error| {
        let name = format!("{address} (admin.bind)");
        StartError::System(listener::cannot_bind(&name, error))
    })
}

fn bind_socket(path: &Path) -> Result<UnixListener, StartError> {
    let bound = admin::socket::bind_private(path);
    bound.map_err(|error| {
        let name = format!("unix:{} (admin.socket)", path.display());
        StartError::System(listener::cannot_bind(&name, error))
    })
}

/// What an operator is told of the set-up.
fn facts(config: &Config, bound: &[listener::Bound], admin: SocketAddr) -> admin::status::Facts {
    let (provider, server, lane) = match &config.provider {
        config::Provider::None { .. } => ("none", None, String::new()),
        config::Provider::Smtp(section) => {
            let server = format!("{}:{}", section.server, section.port);
            let lane = section.lane().map(str::to_owned);
            ("smtp", Some(server.clone()), lane.unwrap_or(server))
        }
        config::Provider::Microsoft365(section) => {
            let sender = section.sender.as_str().to_owned();
            ("microsoft365", Some(section.graph.clone()), sender)
        }
    };
    let smtp = bound.iter().map(|bound| format!("smtp {}", bound.name));
    let http = [format!("http {admin}"), format!("http unix:{}", config.admin.socket.display())];
    let listeners = smtp.chain(http).collect();
    admin::status::Facts { started: clock::wall(), provider, server, lane, listeners }
}

/// What the listener may take, as far as the provider decides it.
fn intake(config: &Config) -> Intake {
    let refusal = match &config.provider {
        config::Provider::None { on_mail: OnMail::Reject } => Some(reply::no_provider()),
        config::Provider::None { on_mail: OnMail::Hold }
        | config::Provider::Smtp(_)
        | config::Provider::Microsoft365(_) => None,
    };
    Intake { refusal, max_size: config.limits.message_size, why: None }
}

/// Who readers see as the sender.
pub fn policy(config: &Config) -> Policy {
    let (sender, name) = match &config.provider {
        config::Provider::None { .. } => (None, None),
        config::Provider::Smtp(section) => {
            (section.sender.as_ref(), section.sender_name.as_deref())
        }
        config::Provider::Microsoft365(section) => {
            (Some(&section.sender), section.sender_name.as_deref())
        }
    };
    let names = match &config.provider {
        config::Provider::None { .. } | config::Provider::Smtp(_) => Names::AsTheyAre,
        config::Provider::Microsoft365(_) => Names::WithoutAt,
    };
    Policy::new(&config.sender, sender, name, names)
}

/// The provider as its kind is, where something of that kind matters beside deliveries.
struct Outlet {
    provider: Option<Arc<dyn Provider>>,
    graph: Option<Arc<GraphProvider>>,
}

fn provider(config: &Config, metrics: &Arc<Metrics>) -> Result<Outlet, StartError> {
    Ok(match &config.provider {
        config::Provider::None { .. } => Outlet { provider: None, graph: None },
        config::Provider::Smtp(section) => {
            let provider = SmtpProvider::new(section, config.hostname.to_string(), metrics);
            let provider = provider.map_err(StartError::System)?;
            Outlet { provider: Some(Arc::new(provider)), graph: None }
        }
        config::Provider::Microsoft365(section) => {
            let graph = GraphProvider::new(section, Arc::clone(metrics));
            let graph = Arc::new(graph.map_err(StartError::System)?);
            let provider: Arc<dyn Provider> = Arc::clone(&graph) as Arc<dyn Provider>;
            Outlet { provider: Some(provider), graph: Some(graph) }
        }
    })
}

/// Keeps the size of what is accepted at what there is a way for. Where a token is not to be had, nothing is known, and
/// what is accepted waits with the rest.
async fn follow_rights(
    graph: Option<Arc<GraphProvider>>,
    intake: watch::Sender<Intake>,
    most: u64,
) {
    // Of other providers the state that the listener reads stays as it is until a reload can change it.
    let Some(graph) = graph else { return std::future::pending().await };
    let mut roles = graph.roles();
    loop {
        match learn_rights(&graph, &intake, most).await {
            Ok(()) if roles.changed().await.is_ok() => {}
            Ok(()) => return,
            Err(_no_token) => tokio::time::sleep(RIGHTS_RETRY).await,
        }
    }
}

/// The error says why there is no token.
async fn learn_rights(
    graph: &GraphProvider,
    intake: &watch::Sender<Intake>,
    most: u64,
) -> Result<(), Cause> {
    let largest = graph.largest().await?;
    let why = largest.filter(|largest| *largest < most).map(|_| WITHOUT_DRAFTS);
    let max_size = largest.map_or(most, |largest| largest.min(most));
    intake.send_if_modified(|intake| {
        let is_new = (intake.max_size, intake.why) != (max_size, why);
        (intake.max_size, intake.why) = (max_size, why);
        is_new
    });
    Ok(())
}

/// What the gateway's own letters are written with.
fn house(config: &Config) -> House {
    let (sender, server) = match &config.provider {
        config::Provider::Smtp(section) => (section.sender.clone(), Some(section.server.clone())),
        config::Provider::Microsoft365(section) => {
            let host =
                section.graph.split_once("://").map_or(section.graph.as_str(), |(_, host)| host);
            (Some(section.sender.clone()), Some(host.to_owned()))
        }
        config::Provider::None { .. } => (None, None),
    };
    House {
        hostname: config.hostname.to_string(),
        sender,
        server,
        bounce: config.bounce.clone(),
        give_up_after: config.retry.give_up_after,
    }
}

fn concurrency(config: &Config) -> usize {
    let throttle = &config.throttle;
    let lane = match &config.provider {
        config::Provider::Smtp(section) => {
            let is_lane =
                |name: &String| section.lane().is_some_and(|lane| lane.eq_ignore_ascii_case(name));
            let named = throttle.mailbox_concurrency.iter().find(|(name, _)| is_lane(name));
            named.map_or(throttle.concurrency, |(_, concurrency)| *concurrency)
        }
        config::Provider::Microsoft365(section) => {
            let named = throttle.mailbox_concurrency.get(section.sender.as_str());
            named.copied().unwrap_or(throttle.concurrency)
        }
        config::Provider::None { .. } => throttle.concurrency,
    };
    lane.min(throttle.provider_concurrency)
}
