//! `mailsluice spool`: looks at a spool whose daemon is down or cannot start, and changes nothing in it.

use std::fmt::Write as _;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, BufWriter, Read as _, StdoutLock, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use serde::Serialize;

use super::Stop;
use crate::clock::Time;
use crate::config::Secrets;
use crate::envelope::{Head, Priority, QueueState, Rcpt, RcptStatus, SpoolId, UnixMillis};
use crate::smtp::params::{Notify, Ret};
use crate::smtp::reply::Escaped;
use crate::spool::inspect::{self, InspectError, Inspection};
use crate::spool::log::OpenError;
use crate::spool::{SpoolError, Stored};

/// Recipients that `ls` shows of a message.
const SHOWN: usize = 3;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "The daemon must be down: while it runs, these commands end with 75. Exit codes: 0 all right; 64 \
wrong usage, or an export into the spool itself; 65 something is damaged; 66 no spool, or no such message; 71 the \
system refused, or another version of the program has written the spool; 73 a file to be written exists already with \
another content, or cannot be written; 75 a daemon has the spool; 78 the configuration is wrong."
)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the messages, one a line: id, state, time of acceptance, octets, pending/all recipients, attempts, sender,
    /// recipients
    Ls {
        /// Print one JSON object a line, with all recipients
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Write a message to standard output, byte for byte as it would be sent
    Cat {
        /// The message
        #[arg(value_parser = parse_id)]
        id: SpoolId,
        /// Print its envelope, and how far it has come, as JSON instead
        #[arg(long)]
        envelope: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Read everything and say what is damaged
    Verify {
        #[command(flatten)]
        place: Place,
    },
    /// Write each message to DIR/ID.eml, as it would be sent, and its envelope and progress to DIR/ID.json after it
    Export {
        /// Where to; made where it is not there (mode 0700). Nothing in it is overwritten; an export that was cut off
        /// can be run again
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        /// Only messages in this state
        #[arg(long, value_enum)]
        state: Option<State>,
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Debug, clap::Args)]
struct Place {
    #[command(flatten)]
    config: super::ConfigArgs,
    /// The folder of the spool; without it, that of the configuration
    #[arg(long, value_name = "DIR")]
    spool: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum State {
    Queued,
    Held,
    Failed,
}

impl State {
    fn of(head: &Head) -> Self {
        match head.state {
            QueueState::Queued => Self::Queued,
            QueueState::Held => Self::Held,
            QueueState::Failed => Self::Failed,
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Held => "held",
            Self::Failed => "failed",
        }
    }
}

type Out<'a> = BufWriter<StdoutLock<'a>>;

pub(super) fn run(args: &Args) -> ExitCode {
    let mut out = BufWriter::new(io::stdout().lock());
    let done = match &args.command {
        Command::Ls { json, place } => ls(place, *json, &mut out),
        Command::Cat { id, envelope, place } => cat(place, *id, *envelope, &mut out),
        Command::Verify { place } => verify(place, &mut out),
        Command::Export { folder, state, place } => export(place, folder, *state, &mut out),
    };
    // What was found goes out before what is said of it.
    let done = match out.flush() {
        Err(error) if !matches!(done, Err(Stop::Output(_))) => Err(Stop::Output(error)),
        _ => done,
    };
    super::ended(done)
}

pub(super) fn parse_id(text: &str) -> Result<SpoolId, String> {
    SpoolId::parse(text).ok_or_else(|| "not the id of a message".to_owned())
}

fn open(place: &Place) -> Result<(Inspection, PathBuf), Stop> {
    let folder = match &place.spool {
        Some(folder) => folder.clone(),
        None => super::load(&place.config.config, Secrets::Leave).map_err(Stop::Told)?.spool.path,
    };
    let spool = Inspection::open(&folder).map_err(|error| {
        let code = match &error {
            InspectError::NotASpool(_) => super::EX_NOINPUT,
            InspectError::Open(OpenError::Locked { .. }) => super::EX_TEMPFAIL,
            InspectError::Open(OpenError::OtherFormat { .. } | OpenError::Io(..)) => {
                super::EX_OSERR
            }
        };
        Stop::Said(code, error.to_string())
    })?;
    Ok((spool, folder))
}

/// What is damaged may have been messages: where they are listed, it is said that some may be missing.
fn warn_of_damage(spool: &Inspection) -> bool {
    for damage in &spool.report().damaged {
        eprintln!("the spool is damaged: {}", shown(damage));
    }
    !spool.report().damaged.is_empty()
}

fn ls(place: &Place, json: bool, out: &mut Out<'_>) -> Result<u8, Stop> {
    let (spool, _) = open(place)?;
    let mut is_damaged = warn_of_damage(&spool);
    for head in spool.heads() {
        let read = spool.read(head.id);
        is_damaged |= read.is_err();
        match json {
            true => writeln!(out, "{}", ascii(serde_json::to_string(&Line::new(&head, &read))))?,
            false => write_line(&head, &read, out)?,
        }
    }
    Ok(if is_damaged { super::EX_DATAERR } else { 0 })
}

fn write_line(head: &Head, read: &Result<Stored, SpoolError>, out: &mut Out<'_>) -> io::Result<()> {
    let Head { id, size, pending, attempts, .. } = head;
    write!(out, "{id} {:<6} {} {size:>9} ", State::of(head).label(), Time(accepted(head, read)))?;
    let envelope = match read {
        Ok(stored) => &stored.envelope,
        Err(error) => {
            return writeln!(out, "{pending}/? {attempts} {}", shown(&error.to_string()));
        }
    };
    let from = shown(envelope.reverse_path.as_str());
    write!(out, "{pending}/{} {attempts} <{from}>", envelope.rcpts.len())?;
    for (rcpt, at) in envelope.rcpts.iter().take(SHOWN).zip(0..) {
        let comma = if at == 0 { "" } else { "," };
        write!(out, "{comma} <{}>", shown(rcpt.path.as_str()))?;
    }
    match envelope.rcpts.len().saturating_sub(SHOWN) {
        0 => writeln!(out),
        more => writeln!(out, " and {more} more"),
    }
}

fn cat(place: &Place, id: SpoolId, envelope: bool, out: &mut Out<'_>) -> Result<u8, Stop> {
    let (spool, _) = open(place)?;
    let Some(head) = spool.head(id) else {
        warn_of_damage(&spool);
        return Err(Stop::Said(super::EX_NOINPUT, SpoolError::Unknown(id).to_string()));
    };
    let stored = spool.read(id).map_err(|error| unreadable(&error))?;
    if envelope {
        out.write_all(Message::json(&head, &stored).as_bytes())?;
        return Ok(0);
    }
    for chunk in inspect::chunks(id, &stored) {
        out.write_all(&chunk.map_err(|error| unreadable(&error))?)?;
    }
    Ok(0)
}

fn unreadable(error: &SpoolError) -> Stop {
    let code = match error {
        SpoolError::Damaged(..) => super::EX_DATAERR,
        SpoolError::Unknown(_) => super::EX_NOINPUT,
        SpoolError::Full
        | SpoolError::Io(..)
        | SpoolError::Closed
        | SpoolError::Refused(..)
        | SpoolError::Unfit(..) => super::EX_OSERR,
    };
    Stop::Said(code, shown(&error.to_string()))
}

fn verify(place: &Place, out: &mut Out<'_>) -> Result<u8, Stop> {
    let (spool, folder) = open(place)?;
    let count = |counted: Result<usize, OpenError>| {
        counted.map_err(|error| Stop::Said(super::EX_OSERR, error.to_string()))
    };
    let mut damages = 0;
    let from_log = spool.report().damaged.iter().cloned();
    for damage in from_log.chain(spool.heads().filter_map(|head| spool.check(head.id))) {
        writeln!(out, "damaged: {}", shown(&damage))?;
        damages += 1;
    }
    if spool.report().torn {
        writeln!(
            out,
            "The log ends in a batch that is not whole. After a crash this is normal: nobody was told 250 for it, and \
             the next start drops it."
        )?;
    }
    for name in spool.strays() {
        writeln!(
            out,
            "bodies/{}: no message names it, as a crash leaves it; the next start {} it.",
            shown(name),
            if spool.has_damaged_segment() { "puts aside" } else { "removes" }
        )?;
    }
    let unfinished = count(spool.unfinished())?;
    if unfinished > 0 {
        writeln!(
            out,
            "tmp/ has {}, as a crash leaves them; the next start removes them.",
            several(unfinished, "unfinished content")
        )?;
    }
    let put_aside = count(spool.put_aside())?;
    if put_aside > 0 {
        writeln!(
            out,
            "damaged/ has {} that earlier starts put aside.",
            several(put_aside, "file")
        )?;
    }
    let totals = spool.totals();
    let messages = totals.queued + totals.held + totals.failed;
    writeln!(
        out,
        "{}: {} of {} octets; {} ({} queued, {} held, {} failed); {} of {} octets; {}",
        folder.display(),
        several(totals.segments, "segment"),
        totals.log,
        several(messages, "message"),
        totals.queued,
        totals.held,
        totals.failed,
        several(totals.files, "side file"),
        totals.file_octets,
        match damages {
            0 => "nothing is damaged".to_owned(),
            damages => several(damages, "damage"),
        }
    )?;
    Ok(if damages > 0 { super::EX_DATAERR } else { 0 })
}

pub(super) fn several(count: usize, noun: &str) -> String {
    match count {
        1 => format!("1 {noun}"),
        _ => format!("{count} {noun}s"),
    }
}

fn export(
    place: &Place,
    folder: &Path,
    state: Option<State>,
    out: &mut Out<'_>,
) -> Result<u8, Stop> {
    let (spool, root) = open(place)?;
    let cannot = |doing: &str, path: &Path, error: &io::Error| {
        Stop::Said(super::EX_CANTCREAT, format!("{doing} {}: {error}", path.display()))
    };
    if is_within(folder, &root).map_err(|error| cannot("looking at", folder, &error))? {
        let words = format!("{} is within the spool, which is left as it is", folder.display());
        return Err(Stop::Said(super::EX_USAGE, words));
    }
    let mut is_damaged = warn_of_damage(&spool);
    let make = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    make.map_err(|error| cannot("making the folder", folder, &error))?;
    let _lock = lock(folder).map_err(|error| cannot("writing to", folder, &error))?;
    let (mut written, mut there, mut kept) = (0, 0, 0);
    for head in spool.heads().filter(|head| state.is_none_or(|state| state == State::of(head))) {
        match export_one(&spool, &head, folder) {
            Ok(Export::Written) => written += 1,
            Ok(Export::WasThere) => there += 1,
            Err(ExportError::Message(error)) => {
                is_damaged = true;
                eprintln!("not exported: {}", shown(&error.to_string()));
            }
            Err(ExportError::File(path, error)) if error.kind() == io::ErrorKind::AlreadyExists => {
                kept += 1;
                eprintln!(
                    "not exported: {} exists already with another content and is not overwritten",
                    path.display()
                );
            }
            Err(ExportError::File(path, error)) => return Err(cannot("writing", &path, &error)),
        }
    }
    let sync = File::open(folder).and_then(|folder| Ok(rustix::fs::syncfs(folder)?));
    sync.map_err(|error| cannot("syncing", folder, &error))?;
    write!(out, "{} written to {}", several(written, "message"), folder.display())?;
    match there {
        0 => writeln!(out)?,
        there => writeln!(out, ", where {there} more had been written before")?,
    }
    Ok(match (is_damaged, kept) {
        (true, _) => super::EX_DATAERR,
        (false, 0) => 0,
        (false, _) => super::EX_CANTCREAT,
    })
}

/// Another export to the same folder would take our unfinished files for left-over ones. A file system without locks
/// does without.
fn lock(folder: &Path) -> io::Result<File> {
    let file = File::open(folder)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(io::Error::other("another export is writing there")),
        Ok(()) | Err(_) => Ok(file),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Export {
    Written,
    /// All of it, and the same.
    WasThere,
}

enum ExportError {
    /// The message cannot be read.
    Message(SpoolError),
    /// A file cannot be written.
    File(PathBuf, io::Error),
}

/// The JSON comes last: a message that has it is whole.
fn export_one(spool: &Inspection, head: &Head, folder: &Path) -> Result<Export, ExportError> {
    let id = head.id;
    let stored = spool.read(id).map_err(ExportError::Message)?;
    let eml = write_new(folder, &format!("{id}.eml"), inspect::chunks(id, &stored))?;
    let json = Message::json(head, &stored);
    let json = write_new(folder, &format!("{id}.json"), [Ok(json)])?;
    Ok(match (eml, json) {
        (Export::WasThere, Export::WasThere) => Export::WasThere,
        (Export::Written, _) | (_, Export::Written) => Export::Written,
    })
}

/// Whatever has its final name is whole, though a kill may come at any time. A file that is there is looked at instead
/// of written.
fn write_new(
    folder: &Path,
    name: &str,
    chunks: impl IntoIterator<Item = Result<impl AsRef<[u8]>, SpoolError>>,
) -> Result<Export, ExportError> {
    let (path, part) = (folder.join(name), folder.join(format!(".{name}.part")));
    let failed = |error| ExportError::File(path.clone(), error);
    match fs::symlink_metadata(&path) {
        Ok(found) if found.is_file() => {
            return match is_same(&path, chunks)? {
                true => Ok(Export::WasThere),
                false => Err(failed(io::ErrorKind::AlreadyExists.into())),
            };
        }
        Ok(_) => return Err(failed(io::ErrorKind::AlreadyExists.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // An export that was cut off has left it.
    match fs::remove_file(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        Ok(()) | Err(_) => {}
    }
    let create = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part);
    let mut file = create.map_err(failed)?;
    let mut chunks = chunks.into_iter();
    let written = chunks
        .try_for_each(|chunk| {
            file.write_all(chunk.map_err(ExportError::Message)?.as_ref()).map_err(failed)
        })
        .and_then(|()| rename_new(&part, &path).map_err(failed));
    if let Err(error) = written {
        // The error that is told is the first.
        drop(fs::remove_file(&part));
        return Err(error);
    }
    Ok(Export::Written)
}

/// Whether the file has this content.
fn is_same(
    path: &Path,
    chunks: impl IntoIterator<Item = Result<impl AsRef<[u8]>, SpoolError>>,
) -> Result<bool, ExportError> {
    let failed = |error| ExportError::File(path.to_owned(), error);
    let mut file = BufReader::new(File::open(path).map_err(failed)?);
    let mut there = Vec::new();
    for chunk in chunks {
        let chunk = chunk.map_err(ExportError::Message)?;
        let chunk = chunk.as_ref();
        there.clear();
        let read = (&mut file).take(chunk.len() as u64).read_to_end(&mut there);
        read.map_err(failed)?;
        if there != chunk {
            return Ok(false);
        }
    }
    Ok(file.fill_buf().map_err(failed)?.is_empty())
}

/// Gives a file its name where none has it.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system knows how, and those that do not have links.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        renamed => Ok(renamed?),
    }
}

/// Whether `folder`, which may not be there yet, is in `root` or is it.
fn is_within(folder: &Path, root: &Path) -> io::Result<bool> {
    let (folder, root) = (std::path::absolute(folder)?, root.canonicalize()?);
    let there = folder.ancestors().find_map(|part| part.canonicalize().ok());
    Ok(there.is_some_and(|there| there.starts_with(&root)))
}

fn accepted(head: &Head, read: &Result<Stored, SpoolError>) -> UnixMillis {
    match read {
        Ok(stored) => stored.envelope.accepted,
        Err(_) => head.id.accepted(),
    }
}

/// A line of `ls --json`.
#[derive(Serialize)]
struct Line<'a> {
    id: String,
    state: &'static str,
    accepted: String,
    due: String,
    size_bytes: u64,
    pending: u32,
    attempts: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<Vec<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl<'a> Line<'a> {
    fn new(head: &Head, read: &'a Result<Stored, SpoolError>) -> Self {
        let envelope = read.as_ref().ok().map(|stored| &stored.envelope);
        Self {
            id: head.id.to_string(),
            state: State::of(head).label(),
            accepted: Time(accepted(head, read)).to_string(),
            due: Time(head.due).to_string(),
            size_bytes: head.size,
            pending: head.pending,
            attempts: head.attempts,
            from: envelope.map(|envelope| envelope.reverse_path.as_str()),
            to: envelope
                .map(|envelope| envelope.rcpts.iter().map(|rcpt| rcpt.path.as_str()).collect()),
            error: read.as_ref().err().map(ToString::to_string),
        }
    }
}

/// Envelope and progress of a message, for people and their scripts.
#[derive(Serialize)]
struct Message<'a> {
    id: String,
    state: &'static str,
    accepted: String,
    due: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_deferral: Option<String>,
    /// Of the content as it came in; the lines that go before it are not counted.
    size_bytes: u64,
    attempts: u16,
    from: &'a str,
    smtputf8: bool,
    eight_bit: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    ret: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    envid: Option<&'a str>,
    priority: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    author: Option<&'a str>,
    client: &'a str,
    helo: &'a str,
    recipients: Vec<Recipient<'a>>,
}

impl<'a> Message<'a> {
    fn json(head: &Head, stored: &'a Stored) -> String {
        let mut json = ascii(serde_json::to_string_pretty(&Self::new(head, stored)));
        json.push('\n');
        json
    }

    fn new(head: &Head, stored: &'a Stored) -> Self {
        let (envelope, progress) = (&stored.envelope, &stored.progress);
        Self {
            id: head.id.to_string(),
            state: State::of(head).label(),
            accepted: Time(envelope.accepted).to_string(),
            due: Time(progress.due).to_string(),
            first_deferral: progress.first_deferral.map(|at| Time(at).to_string()),
            size_bytes: envelope.size,
            attempts: progress.attempts,
            from: envelope.reverse_path.as_str(),
            smtputf8: envelope.smtputf8,
            eight_bit: envelope.eight_bit,
            ret: envelope.ret.map(|ret| match ret {
                Ret::Full => "FULL",
                Ret::Headers => "HDRS",
            }),
            envid: envelope.envid.as_deref(),
            priority: match envelope.priority {
                Priority::Normal => "normal",
                Priority::High => "high",
            },
            author: envelope.author.as_ref().map(|author| author.as_str()),
            client: &envelope.client.address,
            helo: &envelope.client.helo,
            recipients: envelope
                .rcpts
                .iter()
                .zip(&progress.rcpts)
                .zip(0..)
                .map(|((rcpt, status), at)| {
                    Recipient::new(rcpt, status, progress.doubtful.contains(&at))
                })
                .collect(),
        }
    }
}

#[derive(Serialize)]
struct Recipient<'a> {
    to: &'a str,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    notify: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    orcpt: Option<&'a str>,
    /// What the remote said last, escaped as in the log.
    #[serde(skip_serializing_if = "Option::is_none")]
    words: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stage: Option<&'static str>,
    /// The remote may have taken it.
    #[serde(skip_serializing_if = "Option::is_none")]
    maybe_sent: Option<bool>,
}

impl<'a> Recipient<'a> {
    fn new(rcpt: &'a Rcpt, status: &RcptStatus, is_doubtful: bool) -> Self {
        let (state, cause) = match status {
            RcptStatus::Pending { last } => ("pending", last.as_ref()),
            RcptStatus::Delivered(_) => ("delivered", None),
            RcptStatus::Failed(cause) => ("failed", Some(cause)),
        };
        let receipt = match status {
            RcptStatus::Delivered(receipt) => Some(receipt.words.to_string()),
            RcptStatus::Pending { .. } | RcptStatus::Failed(_) => None,
        };
        Self {
            to: rcpt.path.as_str(),
            state,
            notify: notify(rcpt.notify),
            orcpt: rcpt.orcpt.as_deref(),
            words: receipt.or_else(|| cause.map(|cause| cause.words.to_string())),
            scope: cause.map(|cause| cause.scope.label()),
            stage: cause.map(|cause| cause.stage.label()),
            maybe_sent: cause.map(|_| is_doubtful),
        }
    }
}

/// As RFC 3461 4.1 has it.
fn notify(notify: Notify) -> Option<String> {
    let (success, failure, delay) = match notify {
        Notify::Unsaid => return None,
        Notify::Never => return Some("NEVER".to_owned()),
        Notify::On { success, failure, delay } => (success, failure, delay),
    };
    let words = [(success, "SUCCESS"), (failure, "FAILURE"), (delay, "DELAY")];
    let asked = words.iter().filter(|(asked, _)| *asked).map(|(_, word)| *word);
    Some(asked.collect::<Vec<_>>().join(","))
}

/// Text from outside made fit for a terminal, as in the log.
pub(super) fn shown(text: &str) -> String {
    Escaped(text.as_bytes()).to_string()
}

/// JSON in ASCII: exact for a script, and harmless on a terminal.
pub(super) fn ascii(json: serde_json::Result<String>) -> String {
    let json = json.expect("strings, numbers and lists can always be written");
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            ' '..='~' | '\n' => out.push(c),
            // Only within a string can it stand.
            c => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}").expect("writing to a string cannot fail");
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_ascii_and_says_the_same() {
        let text = "\u{202e}\u{7f}\u{9b}ü😀\"\\\n";
        let json = ascii(serde_json::to_string(text));
        assert!(json.bytes().all(|b| (b' '..=b'~').contains(&b)), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
    }
}
