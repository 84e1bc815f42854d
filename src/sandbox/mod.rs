//! A stand-in for the world: an upstream that takes everything (and fails where an address asks it to), an inbox to
//! look at what arrived, and the gateway between, all in one process and on loopback.
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
use crate::sandbox::inbox::Inbox;
use crate::shutdown::Shutdown;

pub mod graph;
pub mod inbox;
pub mod upstream;

/// Where the parts of a sandbox listen.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// The gateway's listener: applications send here.
    pub smtp: SocketAddr,
    /// The inbox's API.
    pub inbox: SocketAddr,
    pub admin: SocketAddr,
}

/// A running world.
pub struct Sandbox {
    /// Where everything is bound.
    pub addresses: Addresses,
    pub inbox: Arc<Inbox>,
    app: App,
    world: Shutdown,
}

impl Sandbox {
    /// Starts the world, then the gateway with its spool under `folder`. `slow` is how long `slow@` makes it wait.
    pub async fn start(wanted: Addresses, folder: &Path, slow: Duration) -> io::Result<Self> {
        let world = Shutdown::new();
        let inbox = Arc::new(Inbox::new());
        let upstream = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
        let upstream_address = upstream.local_addr()?;
        let api = bind(wanted.inbox).await?;
        let inbox_address = api.local_addr()?;
        let server = upstream::Upstream { inbox: Arc::clone(&inbox), slow, world: world.clone() };
        world.tasks.spawn(server.listen(upstream));
        world.tasks.spawn(inbox::serve(
            api,
            inbox::router(Arc::clone(&inbox)),
            world.token.clone(),
        ));

        let text = configuration(wanted, upstream_address, folder);
        let loaded = config::parse(&text, "sandbox.toml")
            .map_err(|problems| io::Error::other(problems.to_string()))?;
        let app = App::start(loaded.config, Arc::new(Metrics::new())).await;
        let app = app.map_err(|error| io::Error::other(error.to_string()))?;
        let smtp = app
            .smtp_addresses
            .first()
            .copied()
            .ok_or_else(|| io::Error::other("the gateway does not listen"))?;
        let addresses = Addresses { smtp, inbox: inbox_address, admin: app.admin };
        Ok(Self { addresses, inbox, app, world })
    }

    pub async fn stop(self) {
        self.app.stop().await;
        // An inbox that is being looked at does not keep the world alive.
        tokio::time::timeout(Duration::from_secs(1), self.world.stop()).await.unwrap_or_default();
    }
}

async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"))
    })
}

/// The gateway's configuration, as an operator would write it.
fn configuration(wanted: Addresses, upstream: SocketAddr, folder: &Path) -> String {
    // A TOML basic string takes what JSON writes.
    let path = serde_json::Value::from(folder.join("spool").to_string_lossy().into_owned());
    format!(
        r#"hostname = "sandbox.mailsluice.test"

[[listener]]
bind = "{smtp}"

[sender]
policy = "preserve"

[provider]
kind = "smtp"
server = "{host}"
port = {port}
security = "none"
auth = "none"

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
        host = upstream.ip(),
        port = upstream.port(),
        admin = wanted.admin,
    )
}
