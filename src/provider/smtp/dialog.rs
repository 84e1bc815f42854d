//! The client's side of SMTP as a state machine: bytes of the server in, commands and outcomes out.
//!
//! No socket, clock or task is known here. A driver asks [`Dialog::next`] what to do, does it, and reports what came of
//! it by [`Dialog::receive`], [`Dialog::content_sent`] or [`Dialog::fail`].

use std::collections::VecDeque;
use std::iter;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use zeroize::Zeroizing;

use crate::config::Secret;
use crate::envelope::{Envelope, Rcpt};
use crate::outcome::{Case, Outcome, Receipt, Stage, is_done, too_many_recipients, verdict};
use crate::smtp::address::ReversePath;
use crate::smtp::params::{Notify, Ret};
use crate::smtp::reply::{Reply, ReplyClass};

use super::answer::{
    Fault, Garbage, broken, recipient_needs_utf8, sender_needs_utf8, too_large, unfit_server,
};
use super::reader::ReplyReader;

/// Most commands, and most octets of them, whose replies are still to come. Both sides may block on full buffers when
/// neither reads; so much fits into them.
const WINDOW_COMMANDS: usize = 100;
const WINDOW_OCTETS: usize = 16 * 1024;
/// Octets of a command, without its end (RFC 5321 4.5.3.1.4).
const LINE: usize = 510;

/// What the driver is to do next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Write this, whole.
    Write(Vec<u8>),
    /// The same, and show it to nobody.
    WriteSecret(Zeroizing<Vec<u8>>),
    /// Make the connection secure, then call [`Dialog::secured`].
    StartTls,
    /// Read until [`Dialog::receive`] says that there is something; it must come within that wait.
    Read(Wait),
    /// This recipient's outcome is final.
    Settle(usize, Outcome),
    /// This recipient is for another transaction, because this one is full.
    Leave(usize),
    /// Send the content with its final dot, then call [`Dialog::content_sent`]. What the server says meanwhile goes to
    /// [`Dialog::receive`]; where that says that there is something, stop.
    Content,
    /// Nothing is open: begin a transaction or quit.
    Ready,
    /// The connection was no longer good and nothing of the message is settled or sent: take a new one.
    Again,
    /// The connection never came so far as to take a message. It is to be dropped.
    Refused(Outcome),
    /// Drop the connection; every recipient is settled.
    Close,
}

/// Which of the time-outs of RFC 5321 4.5.3.2 a reply has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    Greeting,
    Command,
    /// For the 354.
    Data,
    /// For the reply to the final dot.
    Final,
    /// For what only makes the connection fit for the next message: a short one, no recipient hangs on it.
    Reset,
}

/// What the server says it can (RFC 5321 4.1.1.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Capabilities {
    pipelining: bool,
    size: bool,
    /// The largest message in octets, where the server named one.
    size_limit: Option<u64>,
    eight_bit_mime: bool,
    smtputf8: bool,
    dsn: bool,
    starttls: bool,
    plain: bool,
    login: bool,
    xoauth2: bool,
}

impl Capabilities {
    /// From the reply to EHLO; its first line is a greeting.
    fn read(ehlo: &Reply) -> Self {
        let mut capabilities = Self::default();
        for line in ehlo.text.split(|b| *b == b'\n').skip(1) {
            let mut words = line.split(|b| matches!(b, b' ' | b'\t'));
            let keyword = words.next().unwrap_or_default().to_ascii_uppercase();
            match keyword.as_slice() {
                b"PIPELINING" => capabilities.pipelining = true,
                b"8BITMIME" => capabilities.eight_bit_mime = true,
                b"SMTPUTF8" => capabilities.smtputf8 = true,
                b"DSN" => capabilities.dsn = true,
                b"STARTTLS" => capabilities.starttls = true,
                // Servers of old write "AUTH=LOGIN" too.
                _ if keyword == b"AUTH" || keyword.starts_with(b"AUTH=") => {
                    let first = keyword.strip_prefix(b"AUTH=").unwrap_or_default();
                    for mechanism in iter::once(first).chain(words) {
                        capabilities.plain |= mechanism.eq_ignore_ascii_case(b"PLAIN");
                        capabilities.login |= mechanism.eq_ignore_ascii_case(b"LOGIN");
                        capabilities.xoauth2 |= mechanism.eq_ignore_ascii_case(b"XOAUTH2");
                    }
                }
                b"SIZE" => {
                    let limit = words.next().and_then(|word| std::str::from_utf8(word).ok());
                    let limit = limit.and_then(|word| word.parse().ok());
                    capabilities.size = true;
                    // RFC 1870 4: zero is no fixed limit.
                    capabilities.size_limit = limit.filter(|limit| *limit > 0);
                }
                _ => {}
            }
        }
        capabilities
    }
}

/// A command whose reply is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    /// None of ours: the server speaks first.
    Greeting,
    Ehlo,
    Helo,
    StartTls,
    AuthPlain,
    AuthLogin,
    /// The user's name, as LOGIN asks for it.
    Username,
    /// The last that AUTH wants.
    Password,
    AuthXoauth2,
    /// What XOAUTH2 sends, after the 334 that asks for it.
    Bearer,
    /// The empty line that a refused token is answered with, so that the refusal proper comes.
    Refusal,
    Mail,
    /// The recipient at this position of the envelope.
    Rcpt(usize),
    Data,
    /// The final dot of the content.
    Dot,
    /// A dot after a 354 that came although no recipient was taken.
    EmptyDot,
    Rset,
}

impl Command {
    fn wait(self) -> Wait {
        match self {
            Self::Greeting => Wait::Greeting,
            Self::Ehlo
            | Self::Helo
            | Self::StartTls
            | Self::AuthPlain
            | Self::AuthLogin
            | Self::Username
            | Self::Password
            | Self::AuthXoauth2
            | Self::Bearer
            | Self::Refusal
            | Self::Mail
            | Self::Rcpt(_) => Wait::Command,
            Self::Data => Wait::Data,
            Self::Dot => Wait::Final,
            Self::EmptyDot | Self::Rset => Wait::Reset,
        }
    }

    fn stage(self) -> Stage {
        match self {
            Self::Greeting => Stage::Greeting,
            Self::Ehlo | Self::Helo => Stage::Ehlo,
            Self::StartTls => Stage::StartTls,
            Self::AuthPlain
            | Self::AuthLogin
            | Self::Username
            | Self::Password
            | Self::AuthXoauth2
            | Self::Bearer
            | Self::Refusal => Stage::Auth,
            Self::Mail => Stage::Mail,
            Self::Rcpt(_) => Stage::Rcpt,
            Self::Data => Stage::Data,
            Self::Dot => Stage::EndOfData,
            Self::EmptyDot | Self::Rset => Stage::Local,
        }
    }
}

/// What a transaction is about.
#[derive(Clone, Debug)]
pub(super) struct Order {
    pub(super) envelope: Arc<Envelope>,
    /// What MAIL names; the envelope's does not count.
    pub(super) reverse_path: ReversePath,
    /// Positions in `envelope.rcpts`.
    pub(super) part: Vec<usize>,
    /// All that is sent as content, in octets.
    pub(super) size: u64,
    /// The content may hold octets above 127.
    pub(super) eight_bit: bool,
    /// And may need SMTPUTF8 then.
    pub(super) smtputf8: bool,
    pub(super) case: Case,
}

/// A transaction under way.
#[derive(Debug)]
struct Transaction {
    order: Order,
    connection: Freshness,
    smtputf8: bool,
    /// Recipients without an outcome, in the order of the part.
    open: Vec<usize>,
    /// Of these, the ones that RCPT was not yet sent for.
    unsent: VecDeque<usize>,
    /// How many the server took.
    accepted: usize,
    mail: Mail,
    /// DATA was sent.
    data: bool,
    /// The server waits for content.
    content: bool,
}

/// Whether a connection has waited since its last use: it may have been closed under us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Freshness {
    New,
    Reused,
}

/// How far MAIL is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mail {
    Unsent,
    Asked,
    Taken,
    Refused,
}

#[derive(Debug)]
enum State {
    /// Until a message may be sent: EHLO or HELO, STARTTLS, AUTH.
    Opening,
    Ready,
    Busy(Box<Transaction>),
    Closed,
}

/// What has to be before a message may be sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Opening {
    /// The connection is in clear and is to be made secure.
    pub(super) starttls: bool,
    pub(super) login: Option<Login>,
}

/// How to log in.
#[derive(Clone, Debug)]
pub(super) struct Login {
    pub(super) username: String,
    pub(super) proof: Proof,
}

#[derive(Clone, Debug)]
pub(super) enum Proof {
    /// AUTH PLAIN or LOGIN.
    Password(Secret),
    /// The token of AUTH XOAUTH2.
    Bearer(Secret),
}

impl Proof {
    fn secret(&self) -> &str {
        match self {
            Self::Password(secret) | Self::Bearer(secret) => secret.as_str(),
        }
    }
}

/// One connection's dialog.
#[derive(Debug)]
pub(super) struct Dialog {
    hostname: String,
    opening: Opening,
    reader: ReplyReader,
    /// A reply that [`Dialog::receive`] has seen and [`Dialog::next`] not yet.
    arrived: Option<Result<Reply, Garbage>>,
    /// Oldest first: replies come in the order of the commands (RFC 2920 3.1).
    awaited: VecDeque<Command>,
    /// Decided, not yet handed out.
    steps: VecDeque<Step>,
    capabilities: Capabilities,
    /// The token goes only after a 334.
    asked_for_token: bool,
    full_at: Option<usize>,
    state: State,
}

impl Dialog {
    /// A connection just made; `hostname` is how we call ourselves.
    pub(super) fn new(hostname: &str, opening: Opening) -> Self {
        Self {
            hostname: hostname.to_owned(),
            opening,
            reader: ReplyReader::default(),
            arrived: None,
            awaited: VecDeque::from([Command::Greeting]),
            steps: VecDeque::new(),
            capabilities: Capabilities::default(),
            asked_for_token: false,
            full_at: None,
            state: State::Opening,
        }
    }

    /// Takes bytes of the server. `true`: there is something, call [`Dialog::next`].
    pub(super) fn receive(&mut self, bytes: &[u8]) -> bool {
        self.reader.push(bytes);
        if self.arrived.is_none() {
            self.arrived = self.reader.next();
        }
        self.arrived.is_some()
    }

    /// Whether nothing has come of a reply that is awaited.
    pub(super) fn is_unheard(&self) -> bool {
        self.reader.is_empty() && self.arrived.is_none()
    }

    /// Begins a transaction; the last step was [`Step::Ready`].
    pub(super) fn begin(&mut self, order: Order, connection: Freshness) {
        let open = order.part.clone();
        self.full_at = None;
        self.state = State::Busy(Box::new(Transaction {
            order,
            connection,
            smtputf8: false,
            unsent: VecDeque::new(),
            open,
            accepted: 0,
            mail: Mail::Unsent,
            data: false,
            content: false,
        }));
        if !self.is_unheard() {
            return self.fail(&Fault::Garbage(Garbage::OutOfTurn));
        }
        self.screen();
    }

    /// The connection is secure. What was said before does not count (RFC 3207 4.2).
    pub(super) fn secured(&mut self) {
        self.opening.starttls = false;
        self.capabilities = Capabilities::default();
        self.ask(Command::Ehlo, &format!("EHLO {}\r\n", self.hostname));
    }

    /// The content and its final dot have been written.
    pub(super) fn content_sent(&mut self) {
        if let State::Busy(transaction) = &mut self.state {
            transaction.content = false;
            self.awaited.push_back(Command::Dot);
        }
    }

    /// The connection broke, or what was awaited did not come.
    pub(super) fn fail(&mut self, fault: &Fault) {
        let awaited = self.awaited.front().map(|command| command.stage());
        self.fail_at(awaited, fault);
    }

    /// The same; `awaited` is what an answer was due to.
    pub(super) fn fail_at(&mut self, awaited: Option<Stage>, fault: &Fault) {
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Opening => {
                let stage = awaited.unwrap_or(Stage::Greeting);
                self.steps.push_back(Step::Refused(broken(stage, fault)));
            }
            State::Busy(transaction) => {
                let stage = match transaction.mail {
                    // Nothing was sent, so the fault lies in what went before.
                    Mail::Unsent => Stage::Local,
                    _ if transaction.content => Stage::Content,
                    Mail::Asked | Mail::Taken | Mail::Refused => awaited.unwrap_or(Stage::Mail),
                };
                let again = match fault {
                    Fault::Closed | Fault::Network(_) | Fault::Garbage(_) | Fault::Tls(_) => true,
                    // It was waited for long enough.
                    Fault::Silence(_) | Fault::Mute(_) | Fault::Slow(_) => false,
                };
                match again && transaction.may_move() {
                    true => self.steps.push_back(Step::Again),
                    false => self.settle_all(&transaction.open, &broken(stage, fault)),
                }
            }
            State::Ready | State::Closed => {}
        }
        self.awaited.clear();
    }

    /// Gives up while the content is sent, before its final dot: without that the server has no message.
    pub(super) fn abandon(&mut self, outcome: &Outcome) {
        if let State::Busy(transaction) = std::mem::replace(&mut self.state, State::Closed) {
            self.settle_all(&transaction.open, outcome);
        }
    }

    pub(super) fn next(&mut self) -> Step {
        loop {
            if let Some(step) = self.steps.pop_front() {
                return step;
            }
            match &self.state {
                State::Closed => return Step::Close,
                // What has come unasked is judged where it does harm, in `begin`.
                State::Ready => return Step::Ready,
                State::Opening | State::Busy(_) => {}
            }
            if let Some(arrived) = self.arrived.take().or_else(|| self.reader.next()) {
                match arrived {
                    Ok(reply) => self.answered(&reply),
                    Err(garbage) => self.fail(&Fault::Garbage(garbage)),
                }
                continue;
            }
            if let Some(command) = self.awaited.front() {
                return Step::Read(command.wait());
            }
            match &self.state {
                State::Busy(transaction) if transaction.content => return Step::Content,
                State::Busy(_) => self.write_window(),
                // While it opens, a reply is always awaited.
                State::Opening | State::Ready | State::Closed => return Step::Close,
            }
        }
    }

    fn answered(&mut self, reply: &Reply) {
        match self.awaited.pop_front() {
            Some(Command::Greeting) => match reply.code.get() {
                220 => self.ask(Command::Ehlo, &format!("EHLO {}\r\n", self.hostname)),
                _ => self.refused(Stage::Greeting, reply),
            },
            Some(Command::Ehlo) => match reply.code.get() {
                _ if is_done(reply) => {
                    self.capabilities = Capabilities::read(reply);
                    self.introduced();
                }
                // It does not know EHLO (RFC 5321 4.1.1.1); other refusals are of us.
                500 | 501 | 502 | 504 => {
                    self.ask(Command::Helo, &format!("HELO {}\r\n", self.hostname));
                }
                _ => self.refused(Stage::Ehlo, reply),
            },
            Some(Command::Helo) => match is_done(reply) {
                true => self.introduced(),
                false => self.refused(Stage::Ehlo, reply),
            },
            Some(Command::StartTls) => match reply.code.get() {
                // Whoever is in the middle may have put in what looks like the secured server's reply.
                220 if !self.reader.is_empty() => {
                    self.fail_at(Some(Stage::StartTls), &Fault::Garbage(Garbage::OutOfTurn));
                }
                220 => self.steps.push_back(Step::StartTls),
                _ => self.refused(Stage::StartTls, reply),
            },
            Some(Command::AuthPlain) => match reply.code.get() {
                // It does not know of initial responses.
                334 => self.tell(Command::Password, &self.plain()),
                _ => self.logged_in(reply),
            },
            Some(Command::AuthLogin) => match (reply.code.get(), &self.opening.login) {
                (334, Some(login)) => {
                    let name = Zeroizing::new(BASE64.encode(&login.username));
                    self.tell(Command::Username, &name);
                }
                _ => self.logged_in(reply),
            },
            Some(Command::Username) => match (reply.code.get(), &self.opening.login) {
                (334, Some(login)) => {
                    let password = Zeroizing::new(BASE64.encode(login.proof.secret()));
                    self.tell(Command::Password, &password);
                }
                _ => self.logged_in(reply),
            },
            Some(Command::Password | Command::Refusal) => self.logged_in(reply),
            Some(Command::AuthXoauth2) => match reply.code.get() {
                // It asks for the token, or has it and says in the challenge why it does not like it.
                334 if self.asked_for_token || reply.text.trim_ascii().is_empty() => {
                    self.tell(Command::Bearer, &self.xoauth2());
                }
                334 => self.ask(Command::Refusal, "\r\n"),
                _ => self.logged_in(reply),
            },
            Some(Command::Bearer) => match reply.code.get() {
                334 => self.ask(Command::Refusal, "\r\n"),
                _ => self.logged_in(reply),
            },
            Some(Command::Mail) => self.mail_answered(reply),
            Some(Command::Rcpt(rcpt)) => self.rcpt_answered(rcpt, reply),
            Some(Command::Data) => self.data_answered(reply),
            Some(Command::Dot) => self.all_answered(Stage::EndOfData, reply),
            Some(Command::EmptyDot) => self.reset(),
            Some(Command::Rset) => {
                self.state = match is_done(reply) {
                    true => State::Ready,
                    false => State::Closed,
                };
            }
            None => match &self.state {
                // An early end, such as 552 or 421.
                State::Busy(transaction) if transaction.content => {
                    let outcome = verdict(Stage::Content, reply, transaction.order.case);
                    self.abandon(&outcome);
                }
                State::Opening | State::Ready | State::Busy(_) | State::Closed => {
                    self.fail(&Fault::Garbage(Garbage::OutOfTurn));
                }
            },
        }
    }

    /// The server said what it can: on to what has to be before the first message.
    fn introduced(&mut self) {
        if self.opening.starttls {
            return match self.capabilities.starttls {
                true => self.ask(Command::StartTls, "STARTTLS\r\n"),
                false => self.unfit(Stage::StartTls, "the server does not offer STARTTLS, and nothing is sent in clear: is provider.port right, or does provider.security = \"tls\" fit it?"),
            };
        }
        match self.opening.login.as_ref().map(|login| &login.proof) {
            None => self.state = State::Ready,
            Some(Proof::Password(_)) => self.log_in_by_password(),
            Some(Proof::Bearer(_)) => self.log_in_by_token(),
        }
    }

    fn log_in_by_password(&mut self) {
        match self.capabilities {
            Capabilities { plain: true, .. } => {
                let line = Zeroizing::new(["AUTH PLAIN ", &self.plain()].concat());
                // Longer lines are for after the 334 (RFC 4954 4).
                match line.len() <= LINE {
                    true => self.tell(Command::AuthPlain, &line),
                    false => self.ask(Command::AuthPlain, "AUTH PLAIN\r\n"),
                }
            }
            Capabilities { login: true, .. } => self.ask(Command::AuthLogin, "AUTH LOGIN\r\n"),
            _ => self.unfit(Stage::Auth, "the server offers neither AUTH PLAIN nor AUTH LOGIN here: does it want another provider.security or provider.port first, or no login (provider.auth = \"none\")?"),
        }
    }

    fn log_in_by_token(&mut self) {
        if !self.capabilities.xoauth2 {
            return self.unfit(Stage::Auth, "the server does not offer AUTH XOAUTH2 here: does it want another provider.security or provider.port first, or a password (provider.auth = \"password\")?");
        }
        let line = Zeroizing::new(["AUTH XOAUTH2 ", &self.xoauth2()].concat());
        self.asked_for_token = line.len() > LINE;
        match self.asked_for_token {
            false => self.tell(Command::AuthXoauth2, &line),
            true => self.ask(Command::AuthXoauth2, "AUTH XOAUTH2\r\n"),
        }
    }

    /// What AUTH PLAIN sends (RFC 4616 2).
    fn plain(&self) -> Zeroizing<String> {
        let Some(login) = &self.opening.login else { return Zeroizing::default() };
        let parts = ["\0", &login.username, "\0", login.proof.secret()];
        let message = Zeroizing::new(parts.concat());
        Zeroizing::new(BASE64.encode(message.as_str()))
    }

    /// What AUTH XOAUTH2 sends.
    fn xoauth2(&self) -> Zeroizing<String> {
        let Some(login) = &self.opening.login else { return Zeroizing::default() };
        let parts =
            ["user=", &login.username, "\x01auth=Bearer ", login.proof.secret(), "\x01\x01"];
        let message = Zeroizing::new(parts.concat());
        Zeroizing::new(BASE64.encode(message.as_str()))
    }

    fn logged_in(&mut self, reply: &Reply) {
        match reply.code.get() {
            235 => self.state = State::Ready,
            _ => self.refused(Stage::Auth, reply),
        }
    }

    /// The server is not what the configuration takes it for.
    fn unfit(&mut self, stage: Stage, why: &str) {
        self.steps.push_back(Step::Refused(unfit_server(stage, why.to_owned())));
        self.state = State::Closed;
    }

    fn mail_answered(&mut self, reply: &Reply) {
        let State::Busy(transaction) = &mut self.state else { return };
        if is_done(reply) {
            transaction.mail = Mail::Taken;
            return;
        }
        if reply.code.get() == 421 && transaction.may_move() {
            self.steps.push_back(Step::Again);
            self.state = State::Closed;
            return;
        }
        transaction.mail = Mail::Refused;
        transaction.unsent.clear();
        self.all_answered(Stage::Mail, reply);
    }

    fn rcpt_answered(&mut self, rcpt: usize, reply: &Reply) {
        let State::Busy(transaction) = &mut self.state else { return };
        // After a refused MAIL, what is said of recipients says nothing.
        if transaction.mail == Mail::Refused {
            return;
        }
        if is_done(reply) {
            transaction.accepted += 1;
            // It was not full then, whatever it said.
            self.full_at = None;
            return;
        }
        if transaction.accepted > 0 && too_many_recipients(reply) {
            self.full_at.get_or_insert(transaction.accepted);
            let left: Vec<usize> = iter::once(rcpt).chain(transaction.unsent.drain(..)).collect();
            transaction.open.retain(|open| !left.contains(open));
            self.steps.extend(left.into_iter().map(Step::Leave));
            return;
        }
        let outcome = verdict(Stage::Rcpt, reply, transaction.order.case);
        if ends_connection(reply) {
            let open = std::mem::take(&mut transaction.open);
            self.settle_all(&open, &outcome);
            self.state = State::Closed;
            return;
        }
        transaction.open.retain(|open| *open != rcpt);
        self.settle_all(&[rcpt], &outcome);
    }

    /// How many recipients the last transaction had when the server would take no more.
    pub(super) fn full_at(&self) -> Option<usize> {
        self.full_at
    }

    fn data_answered(&mut self, reply: &Reply) {
        let State::Busy(transaction) = &mut self.state else { return };
        let expected = reply.code.get() == 354;
        match (transaction.open.is_empty(), expected) {
            (false, true) => transaction.content = true,
            (false, false) => self.all_answered(Stage::Data, reply),
            // It waits for content although it took no recipient: an empty one, whatever is said to it (RFC 2920 3.1).
            (true, true) => self.ask(Command::EmptyDot, ".\r\n"),
            (true, false) if ends_connection(reply) => self.state = State::Closed,
            (true, false) => self.reset(),
        }
    }

    /// One reply for every recipient that is open. The transaction is over, but for replies still to come.
    fn all_answered(&mut self, stage: Stage, reply: &Reply) {
        let State::Busy(transaction) = &mut self.state else { return };
        let open = std::mem::take(&mut transaction.open);
        let outcome = match verdict(stage, reply, transaction.order.case) {
            Outcome::Delivered(receipt) => {
                Outcome::Delivered(Receipt { relayed: !self.capabilities.dsn, ..receipt })
            }
            outcome => outcome,
        };
        self.settle_all(&open, &outcome);
        if matches!(outcome, Outcome::Delivered(_)) {
            self.state = State::Ready;
        } else if ends_connection(reply) {
            self.state = State::Closed;
        } else if self.awaited.is_empty() {
            self.reset();
        }
    }

    fn settle_all(&mut self, rcpts: &[usize], outcome: &Outcome) {
        self.steps.extend(rcpts.iter().map(|rcpt| Step::Settle(*rcpt, outcome.clone())));
    }

    /// Whether what is said now is about the login.
    pub(super) fn is_logging_in(&self) -> bool {
        self.awaited.front().is_some_and(|command| command.stage() == Stage::Auth)
    }

    /// A server may repeat what it did not understand.
    fn without_secrets(&self, reply: &Reply) -> Reply {
        let login = self.opening.login.as_ref();
        let password = login.map_or("", |login| login.proof.secret());
        let encoded = Zeroizing::new(BASE64.encode(password));
        let (plain, xoauth2) = (self.plain(), self.xoauth2());
        let secrets = [password, &encoded, &plain, &xoauth2];
        let has = |secret: &&str| {
            let mut parts = reply.text.windows(secret.len().max(1));
            !secret.is_empty() && parts.any(|part| part == secret.as_bytes())
        };
        let mut reply = reply.clone();
        if secrets.iter().any(has) {
            reply.text = b"(its words are not shown: the login is in them)"[..].into();
        }
        reply
    }

    /// The opening came to nothing.
    fn refused(&mut self, stage: Stage, reply: &Reply) {
        let reply = &self.without_secrets(reply);
        let case =
            Case { null_reverse_path: false, from_is_lane: false, reverse_path_is_lane: false };
        self.steps.push_back(Step::Refused(verdict(stage, reply, case)));
        self.state = State::Closed;
    }

    /// Makes the connection fit for the next message.
    fn reset(&mut self) {
        self.ask(Command::Rset, "RSET\r\n");
    }

    /// Says what nobody else is to see; `concat` above and here leave no copy behind, as growing would.
    fn tell(&mut self, command: Command, line: &str) {
        let line = Zeroizing::new([line.as_bytes(), b"\r\n"].concat());
        self.steps.push_back(Step::WriteSecret(line));
        self.awaited.push_back(command);
    }

    fn ask(&mut self, command: Command, line: &str) {
        self.steps.push_back(Step::Write(line.into()));
        self.awaited.push_back(command);
    }

    /// Settles what needs no server, and chooses who is asked for.
    fn screen(&mut self) {
        let State::Busy(transaction) = &mut self.state else { return };
        let Order { envelope, reverse_path, size, eight_bit, smtputf8, .. } = &transaction.order;
        let size = *size;
        let unfit = match self.capabilities.size_limit {
            Some(limit) if size > limit => Some(too_large(size, limit)),
            _ if !self.capabilities.smtputf8 && !reverse_path.is_ascii() => {
                Some(sender_needs_utf8(reverse_path))
            }
            _ => None,
        };
        if let Some(outcome) = unfit {
            let open = std::mem::take(&mut transaction.open);
            self.settle_all(&open, &outcome);
            self.state = State::Ready;
            return;
        }
        let is_ascii =
            |rcpt: &usize| envelope.rcpts.get(*rcpt).is_none_or(|rcpt| rcpt.path.is_ascii());
        let mut needs_utf8 = Vec::new();
        match self.capabilities.smtputf8 {
            true => {
                let addresses = reverse_path.is_ascii() && transaction.open.iter().all(is_ascii);
                transaction.smtputf8 = !addresses || (*smtputf8 && *eight_bit);
            }
            false => {
                needs_utf8 = transaction.open.extract_if(.., |rcpt| !is_ascii(rcpt)).collect();
            }
        }
        transaction.unsent = transaction.open.iter().copied().collect();
        if transaction.unsent.is_empty() {
            self.state = State::Ready;
        }
        self.settle_all(&needs_utf8, &recipient_needs_utf8());
    }

    /// The next commands, as many as may be under way at once; all replies to those before have come.
    fn write_window(&mut self) {
        let State::Busy(transaction) = &mut self.state else { return };
        let commands = if self.capabilities.pipelining { WINDOW_COMMANDS } else { 1 };
        let mut out = Vec::new();
        if transaction.mail == Mail::Unsent {
            transaction.mail = Mail::Asked;
            mail_line(transaction, self.capabilities, &mut out);
            self.awaited.push_back(Command::Mail);
        }
        while self.awaited.len() < commands && out.len() < WINDOW_OCTETS {
            let Some(rcpt) = transaction.unsent.pop_front() else { break };
            let Some(path) = transaction.order.envelope.rcpts.get(rcpt) else { continue };
            rcpt_line(path, self.capabilities.dsn, transaction.smtputf8, &mut out);
            self.awaited.push_back(Command::Rcpt(rcpt));
        }
        // DATA goes with the last recipients, where it may; alone it waits until one is taken.
        let with_others = self.capabilities.pipelining && !out.is_empty();
        let alone = out.is_empty() && transaction.accepted > 0;
        if transaction.unsent.is_empty() && !transaction.data && (with_others || alone) {
            transaction.data = true;
            out.extend_from_slice(b"DATA\r\n");
            self.awaited.push_back(Command::Data);
        }
        match out.is_empty() {
            true => self.reset(),
            false => self.steps.push_back(Step::Write(out)),
        }
    }
}

impl Transaction {
    /// Whether a new connection may take it: this one had waited, and the server has taken nothing of it.
    fn may_move(&self) -> bool {
        self.connection == Freshness::Reused && matches!(self.mail, Mail::Unsent | Mail::Asked)
    }
}

/// Whether the connection is of no use after such a reply: 421 says so, and where a class has no meaning the two sides
/// no longer count replies alike.
fn ends_connection(reply: &Reply) -> bool {
    match reply.code.class() {
        ReplyClass::Done | ReplyClass::Continue => true,
        ReplyClass::Transient | ReplyClass::Permanent => reply.code.get() == 421,
    }
}

fn mail_line(transaction: &Transaction, capabilities: Capabilities, out: &mut Vec<u8>) {
    let Order { envelope, reverse_path, size, eight_bit, .. } = &transaction.order;
    out.extend_from_slice(format!("MAIL FROM:{reverse_path}").as_bytes());
    if capabilities.size {
        out.extend_from_slice(format!(" SIZE={size}").as_bytes());
    }
    if capabilities.eight_bit_mime && *eight_bit {
        out.extend_from_slice(b" BODY=8BITMIME");
    }
    if transaction.smtputf8 {
        out.extend_from_slice(b" SMTPUTF8");
    }
    if capabilities.dsn {
        match envelope.ret {
            Some(Ret::Full) => out.extend_from_slice(b" RET=FULL"),
            Some(Ret::Headers) => out.extend_from_slice(b" RET=HDRS"),
            None => {}
        }
        if let Some(envid) = &envelope.envid {
            out.extend_from_slice(format!(" ENVID={envid}").as_bytes());
        }
    }
    out.extend_from_slice(b"\r\n");
}

fn rcpt_line(rcpt: &Rcpt, dsn: bool, smtputf8: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(format!("RCPT TO:{}", rcpt.path).as_bytes());
    if dsn {
        match rcpt.notify {
            Notify::Unsaid => {}
            Notify::Never => out.extend_from_slice(b" NOTIFY=NEVER"),
            Notify::On { success, failure, delay } => {
                let words = [(success, "SUCCESS"), (failure, "FAILURE"), (delay, "DELAY")];
                let words: Vec<&str> =
                    words.into_iter().filter(|(on, _)| *on).map(|(_, word)| word).collect();
                if !words.is_empty() {
                    out.extend_from_slice(format!(" NOTIFY={}", words.join(",")).as_bytes());
                }
            }
        }
        // RFC 6533 3 lets UTF-8 stand here, where the transaction has SMTPUTF8.
        if let Some(orcpt) = rcpt.orcpt.as_deref().filter(|orcpt| smtputf8 || orcpt.is_ascii()) {
            out.extend_from_slice(format!(" ORCPT={orcpt}").as_bytes());
        }
    }
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests;
