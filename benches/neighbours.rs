//! `cargo bench -- neighbours`: whether 10,000 messages for a domain that defers them again and again make mail for
//! another one wait.
//!
//! The whole gateway, in memory but for its spool, which is in the folder that `SPOOL_BENCH_DIR` names (or a temporary
//! one), which must be empty. A client that keeps its connection sends one message after the other; the figure is how long each took from its
//! MAIL until it was at the upstream, beside the 10,000 as a ratio to without them, in the same run.

#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mailsluice::app::App;
use mailsluice::config;
use mailsluice::metrics::Metrics;
use mailsluice::sandbox::inbox::Inbox;
use mailsluice::sandbox::upstream::Upstream;
use mailsluice::shutdown::Shutdown;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufStream};
use tokio::net::{TcpListener, TcpStream};

use crate::spool::{Case, folder};

const GOOD: &str = "reader@works.example";
const BAD: &str = "defer-451@defers.example";

pub(crate) const CASES: &[Case] = &[("neighbours", neighbours)];

fn neighbours(measured: bool) {
    let (waiting, sent) = if measured { (10_000, 1_000) } else { (20, 10) };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(run(waiting, sent));
}

async fn run(waiting: u64, sent: usize) {
    let (folder, _temporary) = folder();
    let (inbox, world) = (Arc::new(Inbox::new()), Shutdown::new());
    let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = socket.local_addr().expect("its address").port();
    let slow = Duration::from_secs(1);
    let upstream = Upstream { inbox: Arc::clone(&inbox), slow, world: world.clone() };
    world.tasks.spawn(upstream.listen(socket));
    let metrics = Arc::new(Metrics::new());
    let text = configuration(&folder, port);
    let config = config::parse(&text, "bench.toml").expect("a configuration").config;
    let app = App::start(config, Arc::clone(&metrics)).await.expect("a gateway");

    let mut client = Client::connect(app.smtp_addresses[0]).await;
    let without = client.latencies(&inbox, sent).await;
    for _ in 0..waiting {
        client.send(BAD).await;
    }
    let attempts = || metrics.attempts.get();
    while attempts() < sent as u64 + waiting {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (before, began) = (attempts(), mailsluice::clock::now());
    let beside = client.latencies(&inbox, sent).await;
    let took = began.elapsed().as_secs_f64();
    let retries = (attempts() - before).saturating_sub(sent as u64) as f64 / took;
    app.stop().await;
    world.stop().await;

    for (which, latencies) in [("without", &without), ("beside", &beside)] {
        println!(
            "neighbours: {which}: p50 {:.2} ms, p99 {:.2} ms",
            percentile(latencies, 50),
            percentile(latencies, 99)
        );
    }
    println!(
        "neighbours: {waiting} deferred, {retries:.0} retries a second beside it: p50 {:.2} x, p99 {:.2} x",
        percentile(&beside, 50) / percentile(&without, 50),
        percentile(&beside, 99) / percentile(&without, 99)
    );
}

/// In milliseconds.
fn percentile(latencies: &[f64], of_hundred: usize) -> f64 {
    let mut sorted = latencies.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() - 1) * of_hundred / 100] * 1_000.0
}

/// Every deferred message is tried again every ten seconds, all through.
fn configuration(folder: &Path, port: u16) -> String {
    let spool = folder.join("spool");
    format!(
        r#"hostname = "bench.test"
[[listener]]
bind = "127.0.0.1:0"
[sender]
policy = "preserve"
[provider]
kind = "smtp"
server = "127.0.0.1"
port = {port}
security = "none"
auth = "none"
[retry]
first = "10s"
factor = 1.0
jitter = 0.5
[spool]
path = "{}"
min_free = "0B"
[admin]
bind = "127.0.0.1:0"
"#,
        spool.display()
    )
}

struct Client(BufStream<TcpStream>);

impl Client {
    async fn connect(address: std::net::SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("a connection");
        stream.set_nodelay(true).expect("no delay");
        let mut client = Self(BufStream::new(stream));
        client.replies(1).await;
        client.say("HELO bench.test\r\n", 1).await;
        client
    }

    async fn send(&mut self, to: &str) {
        let envelope = format!("MAIL FROM:<a@works.example>\r\nRCPT TO:<{to}>\r\nDATA\r\n");
        self.say(&envelope, 3).await;
        let line =
            "An ordinary line of text in a message, as long as most of them are: 78.......\r\n";
        let content = format!("Subject: it\r\n\r\n{}.\r\n", line.repeat(100));
        self.say(&content, 1).await;
    }

    /// How long each of `n` messages took, one after the other, until the upstream had it; in seconds.
    async fn latencies(&mut self, inbox: &Inbox, n: usize) -> Vec<f64> {
        let mut latencies = Vec::new();
        for _ in 0..n {
            let mut changed = inbox.changes();
            let arrived = inbox.arrived();
            let began = mailsluice::clock::now();
            self.send(GOOD).await;
            while inbox.arrived() == arrived {
                changed.changed().await.expect("an inbox");
            }
            latencies.push(began.elapsed().as_secs_f64());
        }
        latencies
    }

    async fn say(&mut self, text: &str, replies: usize) {
        self.0.write_all(text.as_bytes()).await.expect("a write");
        self.0.flush().await.expect("a write");
        self.replies(replies).await;
    }

    async fn replies(&mut self, n: usize) {
        for _ in 0..n {
            let mut line = String::new();
            self.0.read_line(&mut line).await.expect("a reply");
            assert!(line.starts_with(['2', '3']), "{line}");
        }
    }
}
