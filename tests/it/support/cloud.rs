//! Microsoft 365 as the sandbox plays it, in this process, for a gateway that is another.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use mailsluice::sandbox::graph::World;
use mailsluice::sandbox::graph::records::Record;
use mailsluice::sandbox::graph::settings::{CLIENT, SECRET, Settings, TENANT};
use mailsluice::sandbox::inbox::{Inbox, Mail};
use mailsluice::shutdown::Shutdown;
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use super::eventually;
use super::gateway::Setup;

/// Whose mailbox sends.
pub const SENDER: &str = "me@contoso.test";

pub struct Cloud {
    pub world: Arc<World>,
    folder: TempDir,
    runtime: Option<Runtime>,
}

impl Cloud {
    pub fn new() -> Self {
        Self::with(serde_json::json!({}))
    }

    /// With settings that differ from the usual.
    pub fn with(change: Value) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let world = runtime.block_on(async {
            let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let inbox = Arc::new(Inbox::new());
            World::start(socket, Settings::default(), inbox, &Shutdown::new()).unwrap()
        });
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("secret");
        fs::write(&secret, SECRET).unwrap();
        fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
        let cloud = Self { world, folder, runtime: Some(runtime) };
        cloud.set(change);
        cloud
    }

    pub fn set(&self, change: Value) {
        // A merge by hand, of the top level: what is a table is given whole.
        let mut all = serde_json::to_value(self.world.settings().as_ref()).unwrap();
        for (key, value) in change.as_object().unwrap() {
            all[key] = value.clone();
        }
        self.world.set(serde_json::from_value(all).unwrap());
    }

    /// With these rights, and those that no token shows.
    pub fn rights(&self, shown: &[&str], hidden: &[&str]) {
        let mut apps = serde_json::to_value(&self.world.settings().apps).unwrap();
        apps[0]["roles"] = serde_json::json!(shown);
        apps[0]["hidden_roles"] = serde_json::json!(hidden);
        self.set(serde_json::json!({ "apps": apps }));
    }

    /// A gateway that delivers to it.
    pub fn setup(&self) -> Setup {
        let root = &self.world.root;
        let secret = self.folder.path().join("secret");
        Setup::none("hold")
            .unset("provider", "on_mail")
            .set("provider", "kind = \"microsoft365\"")
            .set("provider", &format!("sender = \"{SENDER}\""))
            .set("provider", &format!("tenant_id = \"{TENANT}\""))
            .set("provider", &format!("client_id = \"{CLIENT}\""))
            .set("provider", &format!("client_secret_file = \"{}\"", secret.display()))
            .set("provider.endpoints", &format!("login = \"{root}\""))
            .set("provider.endpoints", &format!("graph = \"{root}\""))
            .set("retry", "first = \"100ms\"")
            .set("retry", "max = \"1s\"")
            .set("retry", "jitter = 0.0")
            .set("retry", "in_doubt_after = \"100ms\"")
            .set("bounce", "to = \"none\"")
    }

    /// Plays a fault: the keys are those of the sandbox's API.
    pub fn fault(&self, fault: Value) {
        self.world.fault(serde_json::from_value(fault).unwrap());
    }

    /// The requests for a path that ends like this.
    pub fn asked(&self, end: &str) -> Vec<Record> {
        let is = |record: &Record| record.path.split('?').next().unwrap().ends_with(end);
        self.world.requests().into_iter().filter(is).collect()
    }

    pub fn mails(&self) -> Vec<Mail> {
        self.world.inbox.mails()
    }

    /// Waits for so many messages.
    #[track_caller]
    pub fn wait(&self, n: usize) -> Vec<Mail> {
        eventually(&format!("{n} messages in the inbox"), || {
            Some(self.mails()).filter(|mails| mails.len() >= n)
        })
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
