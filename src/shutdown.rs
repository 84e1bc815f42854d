//! How the daemon ends: a signal stops acceptance first, then deliveries, within a time of grace.

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Handed to every part that runs: its tasks are counted, and end on the token.
#[derive(Clone, Debug)]
pub struct Shutdown {
    /// Fires when no further work is to be begun.
    pub token: CancellationToken,
    pub tasks: TaskTracker,
}

impl Shutdown {
    pub fn new() -> Self {
        Self { token: CancellationToken::new(), tasks: TaskTracker::new() }
    }

    /// Fires the token and waits until every task has ended.
    pub async fn stop(&self) {
        self.token.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}
