//! `mailsluice sandbox`: the gateway against a stand-in for its provider.

use std::fs;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::config;
use crate::envelope::{self, Body, Client, Envelope, Priority, Rcpt, SpoolId};
use crate::message::addresses;
use crate::message::header::HeaderFilter;
use crate::message::outgoing;
use crate::metrics::Metrics;
use crate::outcome::Outcome;
use crate::provider::smtp::SmtpProvider;
use crate::provider::{Outcomes, Provider, Submission};
use crate::sandbox::graph::settings::{Limits, Settings};
use crate::sandbox::inbox::Mail;
use crate::sandbox::{self, Addresses, Outside, Remote, Sandbox, graph, upstream};
use crate::smtp::address::{Charset, ForwardPath, Mailbox, ReversePath};
use crate::smtp::params::Notify;
use crate::{clock, telemetry};

/// Who sends where a message names nobody.
const SENDER: &str = "app@sandbox.mailsluice.test";
/// How long `--message` waits for every recipient to come to an end.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long `slow@` takes.
const SLOW: Duration = Duration::from_secs(3);

#[derive(Debug, clap::Args)]
#[command(after_help = faults())]
pub(super) struct Args {
    /// The stand-in for the provider
    #[arg(long, value_enum, default_value = "smtp")]
    provider: Kind,
    /// Send this message through the gateway, print what arrived, and exit (0 when every recipient got it)
    #[arg(long, value_name = "FILE")]
    message: Option<PathBuf>,
    /// The envelope's sender for --message [default: the message's From]
    #[arg(long, value_name = "ADDRESS", requires = "message")]
    from: Option<String>,
    /// A recipient for --message, repeatable [default: the message's To, Cc and Bcc]
    #[arg(long, value_name = "ADDRESS", requires = "message")]
    to: Vec<String>,
    /// Run only the stand-in and the inbox, and print the [provider] table for a gateway of your own
    #[arg(long, conflicts_with = "message")]
    only_world: bool,
    /// Where applications send to
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:2525")]
    smtp: SocketAddr,
    /// Where the inbox answers, its page and its API
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:2580")]
    inbox: SocketAddr,
    /// Where the stand-in answers
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    remote: SocketAddr,
    /// Which limits of Microsoft 365 hold
    #[arg(long, value_enum, default_value = "concurrency")]
    limits: LimitsOf,
    /// A setting of the simulated Microsoft 365, repeatable, such as limits.messages=3/10s or token_lifetime=30
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// An upstream SMTP server
    Smtp,
    /// The login and Graph of Microsoft 365
    Microsoft365,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum LimitsOf {
    /// 4 requests at once to a mailbox
    Concurrency,
    /// All that the documents name
    Documented,
    /// None at all
    None,
}

fn faults() -> String {
    let mut text = String::new();
    for (title, list) in [
        (
            "Recipients that ask the SMTP server for a fault, at any domain:",
            upstream::FAULTS.as_slice(),
        ),
        ("\nRecipients that ask Microsoft 365 for a fault:", &graph::faults::FAULTS),
        (
            "\nMailboxes (From addresses) that Microsoft 365 has trouble with:",
            &graph::faults::MAILBOXES,
        ),
    ] {
        text.push_str(&format!("{title}\n"));
        for (address, what) in list {
            text.push_str(&format!("  {address:<14} {what}\n"));
        }
    }
    text.push_str("\nThe inbox: GET /api/v1/inbox lists what arrived, GET /api/v1/inbox/N is a message, DELETE empties it.");
    text
}

impl Args {
    fn remote(&self) -> Result<Remote, String> {
        if self.provider == Kind::Smtp {
            if !self.set.is_empty() || self.limits != LimitsOf::Concurrency {
                return Err("--set and --limits are for --provider microsoft365".to_owned());
            }
            return Ok(Remote::Smtp { slow: SLOW });
        }
        let mut settings = Settings::default();
        settings.limits = match self.limits {
            LimitsOf::Concurrency => settings.limits,
            LimitsOf::Documented => Limits::DOCUMENTED,
            LimitsOf::None => Limits::NONE,
        };
        for text in &self.set {
            let (key, value) =
                text.split_once('=').ok_or_else(|| format!("--set {text}: no KEY=VALUE"))?;
            let changed = settings.with(key, value);
            settings = changed.map_err(|error| format!("--set {text}: {error}"))?;
        }
        Ok(Remote::Microsoft365(Box::new(settings)))
    }
}

pub(super) fn run(args: &Args) -> ExitCode {
    let remote = match args.remote() {
        Ok(remote) => remote,
        Err(problem) => {
            eprintln!("{problem}");
            return super::EX_USAGE.into();
        }
    };
    let runtime = match super::runtime() {
        Ok(runtime) => runtime,
        Err(code) => return code,
    };
    let level =
        if args.message.is_some() { config::LogLevel::Error } else { config::LogLevel::Info };
    let log = config::Log { level, format: config::LogFormat::Text, addresses: true };
    let _log = telemetry::start(&log, Arc::new(Metrics::new())).ok();
    if args.only_world {
        return runtime.block_on(only_world(args, &remote)).unwrap_or_else(|code| code);
    }
    let folder = match Folder::make() {
        Ok(folder) => folder,
        Err(error) => {
            eprintln!("cannot make a folder for the sandbox: {error}");
            return super::EX_OSERR.into();
        }
    };
    let ended = match &args.message {
        Some(file) => runtime.block_on(send_one(file, args, &remote, &folder.0)),
        None => runtime.block_on(serve(args, &remote, &folder.0)),
    };
    ended.unwrap_or_else(|code| code)
}

/// Without a gateway: for one that is set up by hand, and for tests.
async fn only_world(args: &Args, remote: &Remote) -> Result<ExitCode, ExitCode> {
    let world = Outside::start(remote, args.remote, args.inbox).await.map_err(in_use)?;
    println!("inbox     http://{}/", world.inbox_address);
    println!("\n# for the configuration of a gateway\n{}", sandbox::provider(remote, world.remote));
    println!("Ctrl-C ends it; nothing is kept.");
    drop(io::stdout().flush());
    super::run::Signals::new().map_err(|_refused| super::EX_OSERR)?.end().await;
    world.stop().await;
    Ok(ExitCode::SUCCESS)
}

fn in_use(error: io::Error) -> ExitCode {
    eprintln!(
        "{error}\nAnother address can be given with --smtp, --inbox and --remote; port 0 takes a free one."
    );
    super::EX_OSERR.into()
}

/// The interactive form: runs until it is interrupted.
async fn serve(args: &Args, remote: &Remote, folder: &Path) -> Result<ExitCode, ExitCode> {
    let wanted = Addresses {
        smtp: args.smtp,
        inbox: args.inbox,
        remote: args.remote,
        admin: SocketAddr::from(([127, 0, 0, 1], 0)),
    };
    let sandbox = Sandbox::start(wanted, remote, folder).await.map_err(in_use)?;
    let Addresses { smtp, inbox, remote: _, admin } = sandbox.addresses;
    println!("send to   smtp://{smtp}");
    println!("inbox     http://{inbox}/");
    println!("metrics   http://{admin}/metrics");
    println!("for example: swaks --server {smtp} --from me@example.com --to you@example.com");
    println!("Ctrl-C ends it; nothing is kept.");
    drop(io::stdout().flush());
    super::run::Signals::new().map_err(|_refused| super::EX_OSERR)?.end().await;
    sandbox.stop().await;
    Ok(ExitCode::SUCCESS)
}

/// The form for scripts: one message in, what arrived out.
async fn send_one(
    file: &Path,
    args: &Args,
    remote: &Remote,
    folder: &Path,
) -> Result<ExitCode, ExitCode> {
    let content = fs::read(file).map_err(|error| {
        eprintln!("cannot read {}: {error}", file.display());
        ExitCode::from(super::EX_NOINPUT)
    })?;
    let message = Message::new(&content, args).map_err(|problem| {
        eprintln!("{}: {problem}", file.display());
        ExitCode::from(super::EX_USAGE)
    })?;
    let free = SocketAddr::from(([127, 0, 0, 1], 0));
    let wanted = Addresses { smtp: free, inbox: free, remote: free, admin: free };
    let sandbox = Sandbox::start(wanted, remote, folder).await;
    let sandbox = sandbox.map_err(|error| {
        eprintln!("{error}");
        ExitCode::from(super::EX_OSERR)
    })?;
    let accepted = message.submit(sandbox.addresses.smtp).await;
    let code = match accepted {
        Ok(words) => {
            println!("the gateway answered: {words}");
            wait_for(&sandbox, &message).await
        }
        Err(words) => {
            eprintln!("the gateway refused it: {words}");
            ExitCode::from(super::EX_UNAVAILABLE)
        }
    };
    sandbox.stop().await;
    Ok(code)
}

/// A message with its envelope.
struct Message {
    from: ReversePath,
    to: Vec<Mailbox>,
    content: Bytes,
}

impl Message {
    /// The envelope comes from the arguments, else from the header.
    fn new(content: &[u8], args: &Args) -> Result<Self, String> {
        let content = with_crlf(content);
        let named = |text: &String| {
            Mailbox::parse(text, Charset::Utf8).map_err(|why| format!("{text}: {why}"))
        };
        let from = match &args.from {
            Some(text) if text.is_empty() => ReversePath::Null,
            Some(text) => ReversePath::Mailbox(named(text)?),
            None => {
                let author = field(&content, "from").first().cloned();
                let author = author.map_or_else(|| named(&SENDER.to_owned()), Ok)?;
                ReversePath::Mailbox(author)
            }
        };
        let mut to = args.to.iter().map(named).collect::<Result<Vec<_>, _>>()?;
        if args.to.is_empty() {
            for mailbox in ["to", "cc", "bcc"].iter().flat_map(|name| field(&content, name)) {
                if !to.contains(&mailbox) {
                    to.push(mailbox);
                }
            }
        }
        if to.is_empty() {
            return Err("no recipient: give --to, or a message with To, Cc or Bcc".to_owned());
        }
        Ok(Self { from, to, content: content.into() })
    }

    /// Hands it to the gateway by SMTP, as an application would: the words of the answer.
    async fn submit(&self, gateway: SocketAddr) -> Result<String, String> {
        let section = config::SmtpProvider {
            server: gateway.ip().to_string(),
            port: gateway.port(),
            security: config::Security::None,
            login: None,
            ca_file: None,
            sender: None,
            sender_name: None,
            max_recipients: self.to.len(),
            connect_timeout: PATIENCE,
            command_timeout: PATIENCE,
            data_timeout: PATIENCE,
            final_timeout: PATIENCE,
        };
        let hostname = "app.sandbox.mailsluice.test".to_owned();
        let client = SmtpProvider::new(&section, hostname, &Arc::new(Metrics::new()));
        let client = client.map_err(|error| error.to_string())?;
        let mut filter = HeaderFilter::new();
        filter.pass(&self.content);
        let facts = filter.finish(&mut Vec::new());
        let accepted = clock::wall();
        let rcpt = |mailbox: &Mailbox| Rcpt {
            path: ForwardPath::Mailbox(mailbox.clone()),
            notify: Notify::Unsaid,
            orcpt: None,
        };
        let envelope = Envelope {
            kind: envelope::Kind::Mail,
            id: SpoolId::new(accepted),
            accepted,
            reverse_path: self.from.clone(),
            rcpts: self.to.iter().map(rcpt).collect(),
            smtputf8: !self.from.is_ascii() || self.to.iter().any(|to| !to.is_ascii()),
            eight_bit: facts.eight_bit,
            ret: None,
            envid: None,
            size: facts.size,
            client: Client { address: "sandbox".into(), helo: "sandbox".into() },
            priority: Priority::Normal,
            author: None,
            prepend: Bytes::new(),
        };
        let part: Vec<usize> = (0..self.to.len()).collect();
        let body = Body::Memory(self.content.clone());
        let submission = Submission {
            reverse_path: envelope.reverse_path.clone(),
            part: part.clone(),
            doubtful: Vec::new(),
            message: outgoing::Message::stored(&envelope, &body),
            envelope: Arc::new(envelope),
        };
        let outcomes = Outcomes::new();
        client.deliver(&submission, &outcomes).await;
        client.close().await;
        let left = outcomes.left().len();
        if left > 0 {
            return Err(format!("{left} recipients are too many for one message"));
        }
        let mut words = String::new();
        for (_, outcome) in outcomes.take(&part) {
            match outcome {
                Outcome::Delivered(receipt) => words = receipt.words.to_string(),
                Outcome::Deferred(cause) | Outcome::Failed(cause) | Outcome::Held(cause) => {
                    return Err(cause.to_string());
                }
            }
        }
        Ok(words)
    }
}

/// Prints what arrives until every recipient has come to an end.
async fn wait_for(sandbox: &Sandbox, message: &Message) -> ExitCode {
    let mut changes = sandbox.inbox.changes();
    let all_ended = async {
        loop {
            let mails = sandbox.inbox.mails();
            let refused = sandbox.inbox.refused();
            let arrived =
                |to: &Mailbox| mails.iter().any(|mail| mail.to.iter().any(|it| it == to.as_str()));
            let turned_away =
                |to: &Mailbox| refused.iter().any(|refused| refused.to == to.as_str());
            if message.to.iter().all(|to| arrived(to) || turned_away(to)) {
                return message.to.iter().all(arrived);
            }
            // The inbox lives as long as the sandbox, so the wait ends only with a change.
            if changes.changed().await.is_err() {
                return false;
            }
        }
    };
    let ended = tokio::time::timeout(PATIENCE, all_ended).await;
    for mail in sandbox.inbox.mails() {
        print_mail(&mail);
    }
    let by = sandbox.remote_name();
    for refused in sandbox.inbox.refused() {
        println!("refused by {by}: <{}>: {}", refused.to, refused.reply);
    }
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => super::EX_UNAVAILABLE.into(),
        Err(_late) => {
            eprintln!("not every recipient came to an end within {} s", PATIENCE.as_secs());
            super::EX_TEMPFAIL.into()
        }
    }
}

fn print_mail(mail: &Mail) {
    println!("arrived: from <{}> to <{}>, {} octets", mail.from, mail.to.join(">, <"), mail.size);
    println!("----");
    if let Some(stored) = &mail.stored {
        // As the mailbox has it; the bytes that came in are mostly base64.
        println!("{}", serde_json::to_string_pretty(stored.as_ref()).unwrap_or_default());
        println!("----");
        return;
    }
    let mut out = io::stdout().lock();
    // A pipe that was closed has seen enough.
    drop(out.write_all(&mail.content).and_then(|()| out.flush()));
    println!("----");
}

/// Line ends as SMTP has them.
pub(super) fn with_crlf(content: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(content.len() + content.len() / 32);
    for line in content.split_inclusive(|byte| *byte == b'\n') {
        let text = line.strip_suffix(b"\n").unwrap_or(line);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        // A lone CR cannot be sent.
        out.extend(text.iter().map(|byte| if *byte == b'\r' { b' ' } else { *byte }));
        out.extend_from_slice(b"\r\n");
    }
    out
}

/// The mailboxes of every field of that name in the header.
pub(super) fn field(content: &[u8], name: &str) -> Vec<Mailbox> {
    let header = content
        .windows(4)
        .position(|end| end == b"\r\n\r\n")
        .map_or(content, |end| &content[..end + 2]);
    let header = String::from_utf8_lossy(header).replace("\r\n ", " ").replace("\r\n\t", " ");
    let mut found = Vec::new();
    for line in header.split("\r\n") {
        if let Some((field, value)) = line.split_once(':')
            && field.trim_end().eq_ignore_ascii_case(name)
        {
            found.extend(addresses::mailboxes(value.as_bytes()));
        }
    }
    found
}

/// A folder that goes when the sandbox does.
struct Folder(PathBuf);

impl Folder {
    fn make() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("mailsluice-sandbox-{}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}
