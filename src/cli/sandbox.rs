//! `mailsluice sandbox`: the gateway against a stand-in upstream.

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
use crate::sandbox::inbox::Mail;
use crate::sandbox::upstream::FAULTS;
use crate::sandbox::{Addresses, Sandbox};
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
    /// Where applications send to
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:2525")]
    smtp: SocketAddr,
    /// Where the inbox answers
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:2580")]
    inbox: SocketAddr,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    /// An upstream SMTP server
    Smtp,
}

fn faults() -> String {
    let mut text = "Recipients that ask the upstream for a fault, at any domain:\n".to_owned();
    for (address, what) in FAULTS {
        text.push_str(&format!("  {address:<14} {what}\n"));
    }
    text.push_str("\nThe inbox: GET /api/v1/inbox lists what arrived, GET /api/v1/inbox/N is a message, DELETE empties it.");
    text
}

pub(super) fn run(args: &Args) -> ExitCode {
    let Kind::Smtp = args.provider;
    let runtime = match super::runtime() {
        Ok(runtime) => runtime,
        Err(code) => return code,
    };
    let level =
        if args.message.is_some() { config::LogLevel::Error } else { config::LogLevel::Info };
    let log = config::Log { level, format: config::LogFormat::Text, addresses: true };
    let _log = telemetry::start(&log, Arc::new(Metrics::new())).ok();
    let folder = match Folder::make() {
        Ok(folder) => folder,
        Err(error) => {
            eprintln!("cannot make a folder for the sandbox: {error}");
            return super::EX_OSERR.into();
        }
    };
    let ended = match &args.message {
        Some(file) => runtime.block_on(send_one(file, args, &folder.0)),
        None => runtime.block_on(serve(args, &folder.0)),
    };
    ended.unwrap_or_else(|code| code)
}

/// The interactive form: runs until it is interrupted.
async fn serve(args: &Args, folder: &Path) -> Result<ExitCode, ExitCode> {
    let wanted = Addresses {
        smtp: args.smtp,
        inbox: args.inbox,
        admin: SocketAddr::from(([127, 0, 0, 1], 0)),
    };
    let sandbox = Sandbox::start(wanted, folder, SLOW).await.map_err(|error| {
        eprintln!("{error}\nAnother address can be given with --smtp and --inbox; port 0 takes a free one.");
        ExitCode::from(super::EX_OSERR)
    })?;
    let Addresses { smtp, inbox, admin } = sandbox.addresses;
    println!("send to   smtp://{smtp}");
    println!("inbox     http://{inbox}/api/v1/inbox");
    println!("metrics   http://{admin}/metrics");
    println!("for example: swaks --server {smtp} --from me@example.com --to you@example.com");
    println!("Ctrl-C ends it; nothing is kept.");
    drop(io::stdout().flush());
    super::run::Signals::new().map_err(|_refused| super::EX_OSERR)?.end().await;
    sandbox.stop().await;
    Ok(ExitCode::SUCCESS)
}

/// The form for scripts: one message in, what arrived out.
async fn send_one(file: &Path, args: &Args, folder: &Path) -> Result<ExitCode, ExitCode> {
    let content = fs::read(file).map_err(|error| {
        eprintln!("cannot read {}: {error}", file.display());
        ExitCode::from(super::EX_NOINPUT)
    })?;
    let message = Message::new(&content, args).map_err(|problem| {
        eprintln!("{}: {problem}", file.display());
        ExitCode::from(super::EX_USAGE)
    })?;
    let free = SocketAddr::from(([127, 0, 0, 1], 0));
    let sandbox =
        Sandbox::start(Addresses { smtp: free, inbox: free, admin: free }, folder, SLOW).await;
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
    for refused in sandbox.inbox.refused() {
        println!("refused by the upstream: <{}>: {}", refused.to, refused.reply);
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
