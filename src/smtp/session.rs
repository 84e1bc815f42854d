//! The server's side of an SMTP connection as a machine without a socket: bytes go in by [`Session::receive`], steps
//! come out of [`Session::next`].
//!
//! The driver asks for the next step, does it, and asks again. [`Step::Mail`], [`Step::Rcpt`], [`Step::Begin`] and
//! [`Step::Commit`] are questions: until one is answered, `next` repeats it. The machine never waits by itself, never
//! copies a whole body, and holds at most one line and what was received last. While it waits for a command outside a
//! transaction it holds no buffer at all.
//!
//! Where RFC 5321 leaves room, this is what is chosen and why:
//!
//! - MAIL without HELO or EHLO is taken, with the name `unknown`: old clients do it, and nothing is decided by the name.
//! - Answers to a pipeline group leave in one write (RFC 2920): they are gathered until the input is used up, before a
//!   commit, or once there are 8 KiB of them, so that a client that never reads costs no more than that.
//! - A refused DATA with more input at hand ends the session, and so does a line that is not a command in valid form
//!   after a refused DATA or BDAT: what follows may be the content, and content never runs as commands (R15). The chunk
//!   of a refused BDAT is read over, since its length is known.
//! - Chunks (BDAT) of a message that fails are read and dropped until LAST or RSET. Once those of one message announce
//!   more than twice the largest message and 1 MiB, the session ends instead: nobody reads 2^64 octets.
//! - Errors are counted (500, 501, 502, 503, 555; refused recipients only while none of the transaction was accepted;
//!   not what was pipelined behind a refused MAIL), and at `errors` of them the session ends. A stored message sets the count back: a connection may live for days.
//!   Of commands that are no error but lead to no message, 1,000 are free between two messages; each further one counts
//!   as an error.
//! - A reply 421 that the driver gives as an answer closes the session behind it, as RFC 5321 3.8 has it.
//!
//! STARTTLS and AUTH will be two more steps and a state each; until then they are neither listed nor taken.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::smtp::address::{Charset, ForwardPath, ReversePath};
use crate::smtp::command::{self, Chunk, Command};
use crate::smtp::data::{BareNewline, Content as Decoded, Decoder, Framing};
use crate::smtp::heard::Heard;
use crate::smtp::line::{Line, LineBuffer};
use crate::smtp::params::{BodyType, MailParams, Recipient, Ret};
use crate::smtp::reply::{self, Reply};

/// Replies are written once there are so many octets of them.
const FLUSH: usize = 8 * 1024;
/// Commands between two messages that lead nowhere and are not yet errors.
const IDLE_COMMANDS: u32 = 1000;
/// RCPT that add no recipient, between two messages, and are not yet errors: a long list sent to a server that takes
/// fewer is answered to its end.
const SURPLUS_RCPTS: u32 = 100_000;
/// What the chunks of one message may announce beyond twice the largest message.
const CHUNK_SLACK: u64 = 1024 * 1024;
/// The minimum data rate is asked for after so long.
const RATE_AFTER: Duration = Duration::from_secs(30);
/// Stands for a deadline that lies beyond what `Instant` can say.
const FAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// What the driver sets. Taken over at HELO, EHLO and MAIL, so a reload reaches connections that live for days.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub hostname: String,
    /// The largest message, in octets as it would be stored: without stuffed dots, with its line ends made whole.
    pub max_size: u64,
    /// Why it is no larger, for who is refused by it.
    pub size_why: Option<&'static str>,
    pub max_recipients: usize,
    pub bare_newline: BareNewline,
    /// Errors that end the session.
    pub errors: u32,
    /// From one complete command to the next.
    pub command_timeout: Duration,
    /// Without any octet of content.
    pub data_timeout: Duration,
    /// Octets in a time, on average over the content; asked for after its first 30 s.
    pub min_data_rate: Option<(u64, Duration)>,
}

impl Settings {
    fn too_large(&self) -> Reply {
        reply::too_large(self.max_size, self.size_why)
    }
}

/// What the driver is to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// Send these octets.
    Write(Vec<u8>),
    /// Wait for input and hand it to [`Session::receive`] or [`Session::eof`]; at `until`, call `next` all the same.
    NeedInput { until: Instant },
    /// MAIL: answer with `accept` or `refuse`.
    Mail(&'a MailParams),
    /// RCPT: answer with `accept` or `refuse`.
    Rcpt(&'a ForwardPath),
    /// Content is about to come: answer with `accept` or `refuse`. Once accepted, `Body` follows any number of times,
    /// then exactly one of `Commit` and `Abort`.
    Begin(&'a Transaction),
    /// A part of the content, as it is to be stored.
    Body(&'a [u8]),
    /// The content is whole: store it, then answer with `stored` or `refuse`.
    Commit,
    /// The session refused a message on its own account, or lost patience with its content: to be counted and logged.
    /// What came of the content may be forgotten at once; `Abort` follows where it was begun.
    Refused(Objection),
    /// The content will never be whole: forget what came of it.
    Abort,
    /// Nothing more will come: close the connection.
    Close,
}

/// What the session itself has against a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objection {
    /// Larger than [`Settings::max_size`], as declared or as it came.
    TooLarge,
    /// It has a lone CR or LF, and those are rejected.
    BareNewline,
    /// Its content stayed away, or came too slowly.
    TimedOut {
        /// Behind a line with a single dot that CRLF did not enclose: the client thinks that it ended its message.
        bare_end: bool,
    },
}

/// One message on its way in, from MAIL to the answer at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    pub reverse_path: ReversePath,
    /// The accepted recipients, each once.
    pub rcpts: Vec<Recipient>,
    pub body: BodyType,
    pub smtputf8: bool,
    pub ret: Option<Ret>,
    pub envid: Option<Box<str>>,
    pub declared_size: Option<u64>,
    /// The argument of HELO or EHLO.
    pub helo: Box<str>,
    /// It was EHLO.
    pub esmtp: bool,
}

/// The server's side of one connection.
#[derive(Debug)]
pub struct Session {
    /// The latest from the driver, and those in force.
    latest: Arc<Settings>,
    settings: Arc<Settings>,
    state: State,
    input: LineBuffer,
    out: Vec<u8>,
    hello: Option<Hello>,
    transaction: Option<Box<Open>>,
    /// Content is being received. Between the chunks of BDAT it stays while commands are awaited.
    content: Option<Box<Content>>,
    /// Since when the client is awaited: `None` is set to `now` when the waiting begins.
    waiting_since: Option<Instant>,
    errors: u32,
    idle_commands: u32,
    surplus_rcpts: u32,
    /// No whole line has come yet.
    fresh: bool,
    /// DATA or BDAT was refused: the next line must be a command in valid form.
    wary: bool,
    /// The command lines, where somebody wants them.
    heard: Option<Heard>,
    /// A content that the driver has begun will not be committed, and the driver has not been told.
    abort_due: bool,
    /// An objection that the driver has not been told.
    objection: Option<Objection>,
    /// The last MAIL was refused, so what was pipelined behind it is not the client's error.
    mail_refused: bool,
    eof: bool,
    shutting_down: bool,
}

#[derive(Debug)]
enum State {
    /// The greeting has not been given.
    Greeting,
    Command,
    /// Questions to the driver.
    AskMail(Box<MailParams>),
    AskRcpt(Box<Recipient>),
    AskBegin(Begin),
    AskCommit,
    /// Octets are content: see `Session::content`.
    Content,
    /// What is gathered is written, then nothing more.
    Closing,
}

/// By which command content begins.
#[derive(Clone, Copy, Debug)]
enum Begin {
    Data,
    Bdat { size: u64, last: bool },
}

#[derive(Debug)]
struct Hello {
    name: Box<str>,
    esmtp: bool,
}

#[derive(Debug)]
struct Open {
    transaction: Transaction,
    /// Hashes of the recipients, so that a repeated one is found without comparing all pairs.
    seen: BTreeSet<u64>,
}

/// Content that is being received, from DATA or the first BDAT to its end.
#[derive(Debug)]
struct Content {
    decoder: Decoder,
    /// Octets left of the chunk at hand, and whether it is the last. `None`: DATA.
    chunk: Option<ChunkLeft>,
    /// What all chunks so far have announced.
    announced: u64,
    /// Octets handed out: decoded, normalised.
    size: u64,
    /// Set once the content is not wanted any more: what comes of it is dropped, and this is said at its end.
    verdict: Option<Reply>,
    /// The driver has begun with it, and is owed a `Commit` or an `Abort`.
    begun: bool,
    /// A refused chunk outside a message: it is read over, and nothing else changes.
    stray: bool,
    ended: bool,
    scratch: Vec<u8>,
    /// For the data rate: when it began, and octets received.
    since: Option<Instant>,
    received: u64,
}

#[derive(Clone, Copy, Debug)]
struct ChunkLeft {
    size: u64,
    left: u64,
    last: bool,
    /// Refusing it is an error of the client.
    fault: bool,
}

/// A step without what it borrows.
enum Move {
    Write,
    NeedInput { until: Instant },
    Ask,
    Input(Range<usize>),
    Scratch,
    Blank,
    Refused(Objection),
    Abort,
    Close,
}

/// What is left to say about a command.
enum Answer {
    Reply(Reply),
    /// It counts as an error.
    Fault(Reply),
    /// It was dealt with.
    Done,
}

impl Session {
    /// A new connection. The first step is the greeting.
    pub fn new(settings: Arc<Settings>, now: Instant) -> Self {
        Self {
            latest: Arc::clone(&settings),
            settings,
            state: State::Greeting,
            input: LineBuffer::default(),
            out: Vec::new(),
            hello: None,
            transaction: None,
            content: None,
            waiting_since: Some(now),
            errors: 0,
            idle_commands: 0,
            surplus_rcpts: 0,
            fresh: true,
            wary: false,
            heard: None,
            abort_due: false,
            objection: None,
            mail_refused: false,
            eof: false,
            shutting_down: false,
        }
    }

    /// Other settings, at any time; in force from the next HELO, EHLO or MAIL.
    pub fn configure(&mut self, settings: Arc<Settings>) {
        self.latest = settings;
    }

    /// Bytes came in. Only after [`Step::NeedInput`].
    pub fn receive(&mut self, bytes: &[u8], now: Instant) {
        match self.state {
            State::Closing => {}
            State::Content => {
                // Content keeps its deadline from the last octet, commands from the last command: slow ones must end.
                self.waiting_since = Some(now);
                self.input.push(bytes);
            }
            State::Greeting
            | State::Command
            | State::AskMail(_)
            | State::AskRcpt(_)
            | State::AskBegin(_)
            | State::AskCommit => self.input.push(bytes),
        }
    }

    /// The peer closed its side. What is complete in the buffer is still served.
    pub fn eof(&mut self) {
        self.eof = true;
    }

    /// What to do next.
    pub fn next(&mut self, now: Instant) -> Step<'_> {
        let step = loop {
            if let Some(step) = self.advance(now) {
                break step;
            }
        };
        match step {
            Move::Write => Step::Write(std::mem::take(&mut self.out)),
            Move::NeedInput { until } => Step::NeedInput { until },
            Move::Input(used) => Step::Body(self.input.slice(used)),
            Move::Scratch => Step::Body(self.content.as_ref().map_or(&[], |c| &c.scratch)),
            Move::Blank => Step::Body(b" "),
            Move::Refused(objection) => Step::Refused(objection),
            Move::Abort => Step::Abort,
            Move::Close => Step::Close,
            Move::Ask => match &self.state {
                State::AskMail(mail) => Step::Mail(mail),
                State::AskRcpt(rcpt) => Step::Rcpt(&rcpt.path),
                State::AskBegin(_) => {
                    self.transaction.as_ref().map_or(Step::Close, |o| Step::Begin(&o.transaction))
                }
                State::AskCommit => Step::Commit,
                State::Greeting | State::Command | State::Content | State::Closing => Step::Close,
            },
        }
    }

    /// Yes to [`Step::Mail`], [`Step::Rcpt`] or [`Step::Begin`].
    pub fn accept(&mut self) {
        match std::mem::replace(&mut self.state, State::Command) {
            State::AskMail(mail) => {
                let hello = self.hello.as_ref();
                self.transaction = Some(Box::new(Open {
                    transaction: Transaction {
                        reverse_path: mail.reverse_path,
                        rcpts: Vec::new(),
                        body: mail.body,
                        smtputf8: mail.smtputf8,
                        ret: mail.ret,
                        envid: mail.envid,
                        declared_size: mail.declared_size,
                        helo: hello.map_or_else(|| "unknown".into(), |hello| hello.name.clone()),
                        esmtp: hello.is_some_and(|hello| hello.esmtp),
                    },
                    seen: BTreeSet::new(),
                }));
                self.say(&reply::sender_ok());
            }
            State::AskRcpt(rcpt) => {
                if let Some(open) = &mut self.transaction {
                    open.seen.insert(hash(&rcpt.path));
                    open.transaction.rcpts.push(*rcpt);
                    self.say(&reply::recipient_ok());
                }
            }
            State::AskBegin(Begin::Data) => {
                self.say(&reply::start_content());
                self.content = Some(Content::new(Framing::Dots, true));
                self.waiting_since = None;
                self.state = State::Content;
            }
            State::AskBegin(Begin::Bdat { size, last }) => {
                let chunk = ChunkLeft { size, left: size, last, fault: false };
                self.receive_chunk(Content::chunks(true), chunk);
            }
            other @ (State::Greeting
            | State::Command
            | State::AskCommit
            | State::Content
            | State::Closing) => self.state = other,
        }
    }

    /// No to [`Step::Mail`], [`Step::Rcpt`], [`Step::Begin`] or [`Step::Commit`].
    pub fn refuse(&mut self, reply: Reply) {
        let hang_up = reply.code.get() == 421;
        match std::mem::replace(&mut self.state, State::Command) {
            State::AskMail(_) => {
                self.mail_refused = true;
                self.say(&reply);
            }
            State::AskRcpt(_) => match self.no_recipient_yet() {
                true => self.fault(&reply),
                false => self.say(&reply),
            },
            State::AskBegin(Begin::Data) if hang_up => self.say(&reply),
            State::AskBegin(Begin::Data) => {
                self.say(&reply);
                self.refused_data();
            }
            State::AskBegin(Begin::Bdat { .. }) if hang_up => self.say(&reply),
            State::AskBegin(Begin::Bdat { size, last }) => {
                let mut content = Content::chunks(false);
                content.verdict = Some(reply);
                let chunk = ChunkLeft { size, left: size, last, fault: false };
                self.receive_chunk(content, chunk);
            }
            State::AskCommit => {
                self.say(&reply);
                self.end_transaction();
            }
            other @ (State::Greeting | State::Command | State::Content | State::Closing) => {
                self.state = other;
                return;
            }
        }
        if hang_up {
            self.close();
        }
    }

    /// The message is safe: the answer to [`Step::Commit`].
    pub fn stored(&mut self, id: &str) {
        if let State::AskCommit = self.state {
            self.state = State::Command;
            self.say(&reply::queued(id));
            self.end_transaction();
            self.errors = 0;
            self.idle_commands = 0;
            self.surplus_rcpts = 0;
        }
    }

    /// The content that is being received cannot be kept. [`Step::Abort`] follows; the rest is read and dropped, and
    /// `reply` is given at its end, for BDAT also at the end of each further chunk until LAST or RSET.
    pub fn fail(&mut self, reply: Reply) {
        if let Some(content) = self.content.as_mut().filter(|content| content.begun) {
            self.abort_due |= content.spoil(reply);
        }
    }

    /// From here on command lines are kept for [`Session::heard`].
    pub fn hear(&mut self) {
        self.heard.get_or_insert_default();
    }

    /// The command lines since it was last asked, as they came; without credentials, and without what may be content.
    pub fn heard(&mut self) -> Vec<Box<[u8]>> {
        self.heard.as_mut().map(Heard::take).unwrap_or_default()
    }

    /// 421 and close as soon as no content is being received.
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// `reply` and close at once. Not while a commit is being answered.
    pub fn evict(&mut self, reply: Reply) {
        match self.state {
            State::Closing | State::AskCommit => {}
            State::Greeting
            | State::Command
            | State::AskMail(_)
            | State::AskRcpt(_)
            | State::AskBegin(_)
            | State::Content => self.hang_up(&reply),
        }
    }

    /// Whether no transaction is open.
    pub fn before_mail(&self) -> bool {
        self.transaction.is_none()
    }

    /// Whether content is being received: from an accepted [`Step::Begin`] to the answer at its end.
    pub fn receiving(&self) -> bool {
        self.content.is_some()
    }

    /// The open transaction, until its end was answered.
    pub fn transaction(&self) -> Option<&Transaction> {
        self.transaction.as_ref().map(|open| &open.transaction)
    }

    /// Memory held in buffers, in octets.
    pub fn buffered(&self) -> usize {
        let scratch = self.content.as_ref().map_or(0, |content| content.scratch.capacity());
        self.input.capacity() + self.out.capacity() + scratch
    }

    /// One turn of the machine; `None` if it is to turn again.
    fn advance(&mut self, now: Instant) -> Option<Move> {
        if let Some(objection) = self.objection.take() {
            return Some(Move::Refused(objection));
        }
        if std::mem::take(&mut self.abort_due) {
            return Some(Move::Abort);
        }
        if self.out.len() > FLUSH {
            return Some(Move::Write);
        }
        match self.state {
            State::Greeting => {
                self.state = State::Command;
                // A gateway that shuts down says so in place of the greeting.
                if !self.shutting_down {
                    self.say(&reply::greeting(&self.settings.hostname));
                }
                None
            }
            State::Command => self.command(now),
            State::AskMail(_) | State::AskRcpt(_) | State::AskBegin(_) => Some(Move::Ask),
            State::AskCommit if !self.out.is_empty() => Some(Move::Write),
            State::AskCommit => Some(Move::Ask),
            State::Content => self.content(now),
            State::Closing if !self.out.is_empty() => Some(Move::Write),
            State::Closing => Some(Move::Close),
        }
    }

    // Commands

    fn command(&mut self, now: Instant) -> Option<Move> {
        let wanted = |content: &Content| content.verdict.is_none();
        if self.shutting_down && !self.content.as_deref().is_some_and(wanted) {
            self.hang_up(&reply::shutting_down());
            return None;
        }
        if self.fresh && !self.input.is_skipping() && is_foreign(self.input.unread()) {
            self.hang_up(&reply::not_smtp());
            return None;
        }
        let utf8 = self.transaction().is_some_and(|transaction| transaction.smtputf8);
        let charset = if utf8 { Charset::Utf8 } else { Charset::Ascii };
        let (parsed, is_mail, is_rcpt, is_http) = match self.input.line() {
            Line::Unfinished => return self.wait_for_command(now),
            Line::TooLong => {
                if let Some(heard) = &mut self.heard {
                    heard.too_long();
                }
                (Err(reply::line_too_long()), false, false, false)
            }
            Line::Whole(line) => {
                let parsed = command::parse(line, charset);
                if let Some(heard) = &mut self.heard {
                    heard.line(line, parsed.is_ok(), self.wary);
                }
                let is_http = command::is_http(line);
                (parsed, command::is(line, b"MAIL"), command::is(line, b"RCPT"), is_http)
            }
        };
        self.waiting_since = None;
        self.fresh = false;
        if is_http {
            self.hang_up(&reply::not_smtp());
            return None;
        }
        if std::mem::take(&mut self.wary) && parsed.is_err() {
            self.hang_up(&reply::out_of_step());
            return None;
        }
        if is_mail && parsed.is_err() && self.transaction.is_none() {
            self.mail_refused = true;
        }
        let answer = match parsed {
            Ok(command) => self.obey(command),
            Err(reply) if is_rcpt && !self.no_recipient_yet() => self.surplus(reply),
            Err(reply) => Answer::Fault(reply),
        };
        self.answer(answer);
        None
    }

    fn answer(&mut self, answer: Answer) {
        match answer {
            Answer::Reply(reply) => self.say(&reply),
            Answer::Fault(reply) => self.fault(&reply),
            Answer::Done => {}
        }
    }

    fn wait_for_command(&mut self, now: Instant) -> Option<Move> {
        if !self.out.is_empty() {
            return Some(Move::Write);
        }
        if self.eof {
            self.close();
            return None;
        }
        let since = *self.waiting_since.get_or_insert(now);
        let mut until = after(since, self.settings.command_timeout);
        // Between two chunks the message goes on taking time.
        if let Some(slow) = self.content.as_ref().and_then(|c| c.too_slow_at(&self.settings)) {
            until = until.min(slow);
        }
        if now >= until {
            if self.content.is_some() {
                self.objection = Some(Objection::TimedOut { bare_end: false });
            }
            self.hang_up(&reply::command_timeout());
            return None;
        }
        self.input.rest_a_while(false);
        Some(Move::NeedInput { until })
    }

    fn obey(&mut self, command: Command) -> Answer {
        match command {
            Command::Ehlo(name) => {
                self.reset();
                self.settings = Arc::clone(&self.latest);
                self.hello = Some(Hello { name, esmtp: true });
                self.idle(reply::ehlo(&self.settings.hostname, self.settings.max_size))
            }
            Command::Helo(name) => {
                self.reset();
                self.settings = Arc::clone(&self.latest);
                self.hello = Some(Hello { name, esmtp: false });
                self.idle(reply::helo(&self.settings.hostname))
            }
            Command::Mail(mail) => self.mail(mail),
            Command::Rcpt(rcpt) => self.rcpt(rcpt),
            Command::Data => self.data(),
            Command::Bdat(chunk) => self.bdat(chunk),
            Command::Rset => {
                self.reset();
                self.idle(reply::ok())
            }
            Command::Noop => self.idle(reply::ok()),
            Command::Help => self.idle(reply::help()),
            Command::Vrfy => self.idle(reply::cannot_verify()),
            Command::Quit => {
                self.hang_up(&reply::bye());
                Answer::Done
            }
        }
    }

    fn mail(&mut self, mail: MailParams) -> Answer {
        if self.transaction.is_some() {
            return Answer::Fault(reply::nested_mail());
        }
        self.settings = Arc::clone(&self.latest);
        if mail.declared_size.is_some_and(|size| size > self.settings.max_size) {
            self.mail_refused = true;
            self.objection = Some(Objection::TooLarge);
            return self.idle(self.settings.too_large());
        }
        if self.is_idle_too_long() && self.is_last_error() {
            return Answer::Done;
        }
        self.mail_refused = false;
        self.state = State::AskMail(Box::new(mail));
        Answer::Done
    }

    fn rcpt(&mut self, rcpt: Recipient) -> Answer {
        let Some(open) = &self.transaction else {
            return self.without_mail();
        };
        if self.content.is_some() {
            return Answer::Fault(reply::bad_sequence());
        }
        // The first of two that are the same stands, with its parameters.
        let rcpts = &open.transaction.rcpts;
        let seen = open.seen.contains(&hash(&rcpt.path));
        if seen && rcpts.iter().any(|known| known.path == rcpt.path) {
            return self.surplus(reply::recipient_ok());
        }
        if rcpts.len() >= self.settings.max_recipients {
            return self.surplus(reply::too_many_recipients());
        }
        self.state = State::AskRcpt(Box::new(rcpt));
        Answer::Done
    }

    fn data(&mut self) -> Answer {
        let answer = if self.transaction.is_none() {
            self.without_mail()
        } else if self.content.is_some() {
            Answer::Fault(reply::bad_sequence())
        } else if self.no_recipient_yet() {
            self.idle(reply::no_valid_recipients())
        } else {
            self.state = State::AskBegin(Begin::Data);
            return Answer::Done;
        };
        self.answer(answer);
        self.refused_data();
        Answer::Done
    }

    fn bdat(&mut self, chunk: Chunk) -> Answer {
        let Some(size) = chunk.size else {
            self.fault(&reply::bdat_syntax());
            self.refused_data();
            if !matches!(self.state, State::Closing) && !self.no_recipient_yet() {
                // A chunk without a known end: the message that it is a part of has a hole now.
                let content = self.content.get_or_insert_with(|| Content::chunks(false));
                self.abort_due |= content.spoil(reply::bdat_syntax());
            }
            return Answer::Done;
        };
        // Refused for itself: `None`, or the reply, whether it is an error, and whether it is part of a message.
        let refusal = if self.transaction.is_none() {
            match self.without_mail() {
                Answer::Fault(reply) => Some((reply, true, false)),
                Answer::Reply(reply) => Some((reply, false, false)),
                Answer::Done => None,
            }
        } else if self.no_recipient_yet() {
            Some((reply::no_valid_recipients(), false, false))
        } else if chunk.last.is_none() {
            Some((reply::bdat_syntax(), true, true))
        } else {
            None
        };
        let max_size = self.settings.max_size;
        let before = self.content.as_ref().map_or(0, |content| content.announced);
        let announced = before.saturating_add(size);
        let (refusal, fault, stray) = match refusal {
            Some((reply, fault, part)) => (Some(reply), fault, !part),
            None if announced > max_size => {
                if self.content.as_ref().is_none_or(|content| content.verdict.is_none()) {
                    self.objection = Some(Objection::TooLarge);
                }
                (Some(self.settings.too_large()), false, false)
            }
            None => (None, false, false),
        };
        if announced > max_size.saturating_mul(2).saturating_add(CHUNK_SLACK) {
            let reply = refusal.unwrap_or_else(|| self.settings.too_large());
            self.hang_up(&reply);
            return Answer::Done;
        }
        // Empty chunks and stray ones lead nowhere.
        if (size == 0 || stray) && self.is_idle_too_long() && self.is_last_error() {
            return Answer::Done;
        }
        let last = chunk.last.unwrap_or(false);
        let left = ChunkLeft { size, left: size, last, fault };
        let content = match (self.content.take(), refusal) {
            (None, None) => {
                self.state = State::AskBegin(Begin::Bdat { size, last });
                return Answer::Done;
            }
            (Some(content), None) => content,
            (content, Some(refusal)) => {
                let mut content = content.unwrap_or_else(|| Content::chunks(false));
                content.stray = stray;
                self.abort_due |= content.spoil(refusal);
                content
            }
        };
        self.receive_chunk(content, left);
        Answer::Done
    }

    /// RCPT, DATA or BDAT outside a transaction: an error, unless a refused MAIL came in the same pipeline group.
    fn without_mail(&self) -> Answer {
        match self.mail_refused {
            true => Answer::Reply(reply::mail_first()),
            false => Answer::Fault(reply::mail_first()),
        }
    }

    fn no_recipient_yet(&self) -> bool {
        self.transaction().is_none_or(|transaction| transaction.rcpts.is_empty())
    }

    /// DATA, or BDAT without a legible size, was refused and answered.
    fn refused_data(&mut self) {
        match (&self.state, self.input.is_empty()) {
            (State::Closing, _) => {}
            (_, true) => self.wary = true,
            (_, false) => self.hang_up(&reply::out_of_step()),
        }
    }

    /// The answer to a command that by itself leads to no message.
    fn idle(&mut self, reply: Reply) -> Answer {
        match self.is_idle_too_long() {
            true => Answer::Fault(reply),
            false => Answer::Reply(reply),
        }
    }

    /// A RCPT that adds no recipient.
    fn surplus(&mut self, reply: Reply) -> Answer {
        self.surplus_rcpts = self.surplus_rcpts.saturating_add(1);
        match self.surplus_rcpts > SURPLUS_RCPTS {
            true => Answer::Fault(reply),
            false => Answer::Reply(reply),
        }
    }

    fn is_idle_too_long(&mut self) -> bool {
        self.idle_commands = self.idle_commands.saturating_add(1);
        self.idle_commands > IDLE_COMMANDS
    }

    // Content

    fn receive_chunk(&mut self, mut content: Box<Content>, chunk: ChunkLeft) {
        content.announced = content.announced.saturating_add(chunk.size);
        content.chunk = Some(chunk);
        self.content = Some(content);
        self.waiting_since = None;
        self.state = State::Content;
    }

    fn content(&mut self, now: Instant) -> Option<Move> {
        let Some(content) = &mut self.content else {
            self.state = State::Command;
            return None;
        };
        content.since.get_or_insert(now);
        let chunk_over = content.chunk.as_ref().is_some_and(|chunk| chunk.left == 0);
        if content.ended || chunk_over {
            return self.content_over();
        }
        if self.input.is_empty() {
            return self.wait_for_content(now);
        }
        let mut input = self.input.unread();
        if let Some(chunk) = &content.chunk {
            let left = usize::try_from(chunk.left).unwrap_or(usize::MAX);
            input = input.get(..left).unwrap_or(input);
            if content.verdict.is_some() {
                // Nobody looks at it: no need to decode.
                let used = input.len();
                content.count(used);
                self.input.consume(used);
                return None;
            }
        }
        let decoded = content.decoder.decode(input, &mut content.scratch);
        content.count(decoded.used);
        content.ended = decoded.end;
        let len = match &decoded.content {
            Decoded::Input(range) => range.len(),
            Decoded::Scratch => content.scratch.len(),
        };
        let used = self.input.consume(decoded.used);
        if content.verdict.is_some() {
            return None;
        }
        content.size = content.size.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        if let Some(objection) = content.objection(&self.settings) {
            self.object(objection);
            return None;
        }
        match decoded.content {
            Decoded::Scratch if len == 0 => None,
            Decoded::Scratch => Some(Move::Scratch),
            Decoded::Input(range) => {
                Some(Move::Input(used.start + range.start..used.start + range.end))
            }
        }
    }

    fn wait_for_content(&mut self, now: Instant) -> Option<Move> {
        if !self.out.is_empty() {
            return Some(Move::Write);
        }
        if self.eof {
            self.close();
            return None;
        }
        let since = *self.waiting_since.get_or_insert(now);
        let mut until = after(since, self.settings.data_timeout);
        if let Some(content) = &mut self.content {
            if let Some(slow) = content.too_slow_at(&self.settings) {
                until = until.min(slow);
            }
            if now >= until {
                let bare_end = content.decoder.bare_end_of_data();
                let late = Objection::TimedOut { bare_end };
                self.objection = Some(late);
                self.hang_up(&late.reply(&self.settings));
                return None;
            }
        }
        self.input.rest_a_while(true);
        Some(Move::NeedInput { until })
    }

    /// The end of the data, or of a chunk.
    fn content_over(&mut self) -> Option<Move> {
        let Some(content) = &mut self.content else { return None };
        self.waiting_since = None;
        let last = content.chunk.is_none_or(|chunk| chunk.last);
        if last && content.verdict.is_none() {
            // A CR as the very last octet is a lone one.
            let held = content.decoder.finish();
            if !held.is_empty() {
                content.size = content.size.saturating_add(1);
                match content.objection(&self.settings) {
                    Some(objection) => self.object(objection),
                    None => return Some(Move::Blank),
                }
            }
        }
        let Some(content) = &mut self.content else { return None };
        self.state = State::Command;
        content.scratch = Vec::new();
        let chunk = content.chunk;
        let Some(verdict) = content.verdict.clone() else {
            match last {
                true => {
                    content.begun = false;
                    self.state = State::AskCommit;
                }
                false => self.say(&reply::chunk_ok(chunk.map_or(0, |chunk| chunk.size))),
            }
            return None;
        };
        match chunk.is_some_and(|chunk| chunk.fault) {
            true => self.fault(&verdict),
            false => self.say(&verdict),
        }
        self.wary = chunk.is_some();
        if self.content.as_ref().is_some_and(|content| content.stray) {
            self.content = None;
        } else if last {
            self.end_transaction();
        }
        None
    }

    /// The content is not wanted, for a reason that the session itself found.
    fn object(&mut self, objection: Objection) {
        self.objection = Some(objection);
        if let Some(content) = &mut self.content {
            self.abort_due |= content.spoil(objection.reply(&self.settings));
        }
    }

    // Ends

    fn say(&mut self, reply: &Reply) {
        reply.write_to(&mut self.out);
    }

    /// Says `reply` and counts an error.
    fn fault(&mut self, reply: &Reply) {
        self.say(reply);
        self.is_last_error();
    }

    /// Counts an error; true if it ended the session.
    fn is_last_error(&mut self) -> bool {
        self.errors = self.errors.saturating_add(1);
        let last = self.errors >= self.settings.errors;
        if last {
            self.hang_up(&reply::too_many_errors());
        }
        last
    }

    fn hang_up(&mut self, reply: &Reply) {
        self.say(reply);
        self.close();
    }

    fn close(&mut self) {
        self.reset();
        self.input.clear();
        self.state = State::Closing;
    }

    /// The transaction ends without a message.
    fn reset(&mut self) {
        self.mail_refused = false;
        self.abort_due |= self.content.as_ref().is_some_and(|content| content.begun);
        self.end_transaction();
    }

    fn end_transaction(&mut self) {
        self.content = None;
        self.transaction = None;
    }
}

impl Objection {
    fn reply(self, settings: &Settings) -> Reply {
        match self {
            Self::TooLarge => settings.too_large(),
            Self::BareNewline => reply::bare_newline(),
            Self::TimedOut { bare_end: true } => reply::data_timeout_bare_end(),
            Self::TimedOut { bare_end: false } => reply::data_timeout(),
        }
    }
}

impl Content {
    /// Content in chunks, before the first of them.
    fn chunks(begun: bool) -> Box<Self> {
        Self::new(Framing::Counted, begun)
    }

    fn new(framing: Framing, begun: bool) -> Box<Self> {
        Box::new(Self {
            decoder: Decoder::new(framing),
            chunk: None,
            announced: 0,
            size: 0,
            verdict: None,
            begun,
            stray: false,
            ended: false,
            scratch: Vec::new(),
            since: None,
            received: 0,
        })
    }

    fn count(&mut self, octets: usize) {
        let octets = u64::try_from(octets).unwrap_or(u64::MAX);
        self.received = self.received.saturating_add(octets);
        if let Some(chunk) = &mut self.chunk {
            chunk.left = chunk.left.saturating_sub(octets);
        }
    }

    /// It will not be stored. The first reason stands; true if the driver is to be told to abort.
    fn spoil(&mut self, reply: Reply) -> bool {
        self.verdict.get_or_insert(reply);
        std::mem::take(&mut self.begun)
    }

    /// What speaks against the content as it was decoded so far.
    fn objection(&self, settings: &Settings) -> Option<Objection> {
        if self.decoder.bare_newline_seen() && settings.bare_newline == BareNewline::Reject {
            return Some(Objection::BareNewline);
        }
        (self.size > settings.max_size).then_some(Objection::TooLarge)
    }

    /// When the client falls below the minimum data rate unless it sends more.
    fn too_slow_at(&self, settings: &Settings) -> Option<Instant> {
        let (octets, time) = settings.min_data_rate.filter(|(octets, _)| *octets > 0)?;
        let nanos = time.as_nanos().saturating_mul(u128::from(self.received)) / u128::from(octets);
        let earned = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        Some(after(self.since?, earned.max(RATE_AFTER)))
    }
}

/// Whether the first octets of a connection are those of an HTTP request or of a TLS handshake.
fn is_foreign(start: &[u8]) -> bool {
    start.starts_with(&[0x16, 0x03]) || command::is_http(start)
}

fn after(start: Instant, wait: Duration) -> Instant {
    start.checked_add(wait.min(FAR)).unwrap_or(start)
}

fn hash(path: &ForwardPath) -> u64 {
    let mut hasher = DefaultHasher::new();
    match path {
        ForwardPath::Mailbox(mailbox) => {
            mailbox.local_part().hash(&mut hasher);
            mailbox.domain().to_ascii_lowercase().hash(&mut hasher);
        }
        ForwardPath::Postmaster(_) => "postmaster".hash(&mut hasher),
    }
    hasher.finish()
}

#[cfg(test)]
#[path = "../../tests/it/support/dialog.rs"]
#[allow(unreachable_pub, dead_code, reason = "shared with the integration tests")]
mod dialog;
#[cfg(test)]
mod tests;
