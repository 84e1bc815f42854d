//! A stand-in for the world: an upstream that takes everything or a simulated Microsoft 365 (both fail where an address
//! asks them to), an inbox to look at what arrived, and the gateway between, all in one process and on loopback.
//!
//! It is what the README's first command runs, what tests use, and where an application is tried before it goes live.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;

use crate::app::App;
use crate::config;
use crate::metrics::Metrics;
use crate::sandbox::graph::settings::Settings;
use crate::sandbox::inbox::Inbox;
use crate::shutdown::Shutdown;

pub mod graph;
pub mod inbox;
mod page;
pub mod upstream;

/// The provider's sender at the simulated Microsoft 365.
pub const SENDER: &str = "reports@sandbox.mailsluice.test";

/// Where the parts of a sandbox listen.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// The gateway's listener: applications send here.
    pub smtp: SocketAddr,
    /// The inbox: its page and its API.
    pub inbox: SocketAddr,
    /// The provider's stand-in.
    pub remote: SocketAddr,
    pub admin: SocketAddr,
}

/// What stands in for the provider.
#[derive(Clone, Debug)]
pub enum Remote {
    /// `slow` is how long `slow@` makes it wait.
    Smtp {
        slow: Duration,
    },
    Microsoft365(Box<Settings>),
}

/// A running world, with the gateway before it.
pub struct Sandbox {
    /// Where everything is bound.
    pub addresses: Addresses,
    pub inbox: Arc<Inbox>,
    app: App,
    world: World,
}

/// What is beyond the gateway: the provider's stand-in and the inbox.
pub struct World {
    /// Where the provider's stand-in is bound.
    pub remote: SocketAddr,
    /// Where the inbox is bound.
    pub inbox_address: SocketAddr,
    pub inbox: Arc<Inbox>,
    remote_name: &'static str,
    shutdown: Shutdown,
}

impl World {
    pub async fn start(
        remote: &Remote,
        remote_address: SocketAddr,
        inbox_address: SocketAddr,
    ) -> io::Result<Self> {
        let shutdown = Shutdown::new();
        let keep = match remote {
            Remote::Smtp { .. } => inbox::MAX_OCTETS,
            Remote::Microsoft365(settings) => settings.keep,
        };
        let inbox = Arc::new(Inbox::keeping(keep));
        let socket = bind(remote_address).await?;
        let api = bind(inbox_address).await?;
        let remote_address = socket.local_addr()?;
        let inbox_address = api.local_addr()?;
        let mut router = inbox::router(Arc::clone(&inbox)).merge(page::router(Arc::clone(&inbox)));
        match remote {
            Remote::Smtp { slow } => {
                let inbox = Arc::clone(&inbox);
                let server = upstream::Upstream { inbox, slow: *slow, world: shutdown.clone() };
                shutdown.tasks.spawn(server.listen(socket));
            }
            Remote::Microsoft365(settings) => {
                let settings = settings.as_ref().clone();
                let service =
                    graph::Service::start(socket, settings, Arc::clone(&inbox), &shutdown)?;
                router = router.merge(graph::control::router(service));
            }
        }
        shutdown.tasks.spawn(inbox::serve(api, router, shutdown.token.clone()));
        let remote_name = match remote {
            Remote::Smtp { .. } => "the upstream",
            Remote::Microsoft365(_) => "Graph",
        };
        Ok(Self { remote: remote_address, inbox_address, inbox, remote_name, shutdown })
    }

    pub async fn stop(self) {
        // An inbox that is being looked at does not keep the world alive.
        tokio::time::timeout(Duration::from_secs(1), self.shutdown.stop())
            .await
            .unwrap_or_default();
    }
}

impl Sandbox {
    /// Starts the world, then the gateway with its spool under `folder`.
    pub async fn start(wanted: Addresses, remote: &Remote, folder: &Path) -> io::Result<Self> {
        let world = World::start(remote, wanted.remote, wanted.inbox).await?;
        let provider = provider(remote, world.remote);
        let text = configuration(wanted, &provider, folder);
        let loaded = config::parse(&text, "sandbox.toml")
            .map_err(|problems| io::Error::other(problems.to_string()))?;
        let app = App::start(loaded.config, Arc::new(Metrics::new())).await;
        let app = app.map_err(|error| io::Error::other(error.to_string()))?;
        let smtp = app
            .smtp_addresses
            .first()
            .copied()
            .ok_or_else(|| io::Error::other("the gateway does not listen"))?;
        let addresses =
            Addresses { smtp, inbox: world.inbox_address, remote: world.remote, admin: app.admin };
        Ok(Self { addresses, inbox: Arc::clone(&world.inbox), app, world })
    }

    /// Who is beyond the gateway, for people.
    pub fn remote_name(&self) -> &'static str {
        self.world.remote_name
    }

    pub async fn stop(self) {
        self.app.stop().await;
        self.world.stop().await;
    }
}

async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"))
    })
}

/// The table `[provider]` with which a gateway sends to the stand-in at that address.
pub fn provider(remote: &Remote, address: SocketAddr) -> String {
    match remote {
        Remote::Smtp { .. } => format!(
            r#"[provider]
kind = "smtp"
server = "{host}"
port = {port}
security = "none"
auth = "none"
"#,
            host = address.ip(),
            port = address.port(),
        ),
        Remote::Microsoft365(settings) => {
            let app = settings.apps.first().cloned().unwrap_or_default();
            let secret = app.secrets.first().cloned().unwrap_or_default();
            // A TOML basic string takes what JSON writes.
            let text = |text: String| serde_json::Value::from(text);
            format!(
                r#"[provider]
kind = "microsoft365"
sender = "{SENDER}"
tenant_id = {tenant}
client_id = {client}
client_secret = {secret}
endpoints = {{ login = "http://{address}", graph = "http://{address}" }}
"#,
                tenant = text(app.tenant),
                client = text(app.client_id),
                secret = text(secret),
            )
        }
    }
}

/// The gateway's configuration, as an operator would write it.
fn configuration(wanted: Addresses, provider: &str, folder: &Path) -> String {
    let path = serde_json::Value::from(folder.join("spool").to_string_lossy().into_owned());
    format!(
        r#"hostname = "sandbox.mailsluice.test"

[[listener]]
bind = "{smtp}"

[sender]
policy = "preserve"

{provider}
[retry]
first = "2s"
max = "30s"

[spool]
path = {path}
min_free = "50MB"

[admin]
bind = "{admin}"
"#,
        smtp = wanted.smtp,
        admin = wanted.admin,
    )
}
