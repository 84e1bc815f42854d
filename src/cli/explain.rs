//! `mailsluice explain`: what the provider would make of a message. Nothing is sent.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::app;
use crate::clock;
use crate::config::Secrets;
use crate::explain::{Explanation, Note, Question, explain};
use crate::smtp::address::{Charset, ForwardPath, Mailbox, ReversePath};

use super::ConfigArgs;
use super::sandbox::{field, with_crlf};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The message, as an application would hand it in
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    config: ConfigArgs,
    /// The envelope's sender; empty for a report [default: the message's From]
    #[arg(long, value_name = "ADDRESS")]
    from: Option<String>,
    /// A recipient, repeatable [default: the message's To, Cc and Bcc]
    #[arg(long, value_name = "ADDRESS")]
    to: Vec<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> ExitCode {
    let config = match super::load(&args.config.config, Secrets::Leave) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let content = match fs::read(&args.file) {
        Ok(content) => with_crlf(&content),
        Err(error) => {
            eprintln!("cannot read {}: {error}", args.file.display());
            return super::EX_NOINPUT.into();
        }
    };
    let (reverse_path, recipients) = match envelope(args, &content) {
        Ok(envelope) => envelope,
        Err(problem) => {
            eprintln!("{problem}");
            return super::EX_USAGE.into();
        }
    };
    let runtime = match super::runtime() {
        Ok(runtime) => runtime,
        Err(code) => return code,
    };
    let policy = app::policy(&config);
    let hostname = config.hostname.to_string();
    let question = Question {
        provider: &config.provider,
        policy: &policy,
        hostname: &hostname,
        reverse_path,
        recipients,
        content: content.into(),
        now: clock::wall(),
    };
    let explanation = match runtime.block_on(explain(question)) {
        Ok(explanation) => explanation,
        Err(error) => {
            eprintln!("{}: {error}", args.file.display());
            return super::EX_NOINPUT.into();
        }
    };
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&explanation).unwrap_or_default()),
        false => print!("{}", text(&explanation)),
    }
    ExitCode::SUCCESS
}

/// Who it is from and to: as the arguments say, else as the header does.
fn envelope(args: &Args, content: &[u8]) -> Result<(ReversePath, Vec<ForwardPath>), String> {
    let mailbox = |text: &str| {
        Mailbox::parse(text, Charset::Utf8).map_err(|error| format!("{text}: {error}"))
    };
    let reverse_path = match args.from.as_deref() {
        Some("" | "<>") => ReversePath::Null,
        Some(from) => ReversePath::Mailbox(mailbox(from)?),
        None => field(content, "from")
            .into_iter()
            .next()
            .map_or(ReversePath::Null, ReversePath::Mailbox),
    };
    let recipients: Vec<Mailbox> = match args.to.as_slice() {
        [] => ["to", "cc", "bcc"].into_iter().flat_map(|name| field(content, name)).collect(),
        to => to.iter().map(|to| mailbox(to)).collect::<Result<_, _>>()?,
    };
    let mut paths: Vec<ForwardPath> = Vec::new();
    for path in recipients.into_iter().map(ForwardPath::Mailbox) {
        if !paths.contains(&path) {
            paths.push(path);
        }
    }
    match paths.is_empty() {
        true => Err("the message names no recipient; name one by --to".to_owned()),
        false => Ok((reverse_path, paths)),
    }
}

fn text(explanation: &Explanation) -> String {
    let Explanation { provider, way, sender, recipients, refused, requests, changes, remarks } =
        explanation;
    let mut out = format!("provider   {provider}\nway        {}\n", meaning(way));
    if let Some(sender) = sender {
        out.push_str(&format!("sender     {sender}\n"));
    }
    out.push_str(&format!("recipients {}\n", recipients.join(", ")));
    let list = |out: &mut String, title: &str, notes: &mut dyn Iterator<Item = &Note>| {
        let lines: Vec<String> =
            notes.map(|note| format!("  {}: {} {}\n", note.kind, note.what, note.why)).collect();
        if !lines.is_empty() {
            out.push_str(&format!("\n{title}\n{}", lines.concat()));
        }
    };
    list(&mut out, "Refused:", &mut refused.iter());
    let is_usual = |note: &&Note| note.kind == "usual";
    list(&mut out, "Dropped or changed:", &mut changes.iter().filter(|note| !is_usual(note)));
    list(&mut out, "As for every message:", &mut changes.iter().filter(is_usual));
    for remark in remarks {
        out.push_str(&format!("\n{remark}\n"));
    }
    for request in requests {
        out.push_str(&format!("\n{}\n", request.request));
        match &request.body {
            serde_json::Value::Null => {}
            serde_json::Value::String(header) => out.push_str(header),
            body => {
                out.push_str(&serde_json::to_string_pretty(body).unwrap_or_default());
                out.push('\n');
            }
        }
    }
    out
}

fn meaning(way: &str) -> String {
    let what = match way {
        "smtp" => "byte for byte, but for what the sender policy changes in the header",
        "json" => "one request, in JSON",
        "mime" => "one request, as MIME; a copy stays in Sent Items",
        "draft" => "a draft, its attachments one by one, then sent; a copy stays in Sent Items",
        "refused" => "it is refused",
        _ => "nothing is sent",
    };
    format!("{way}: {what}")
}
