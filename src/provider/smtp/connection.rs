//! One connection to the server: drives a [`Dialog`] over a socket, with a deadline for each wait.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::clock;
use crate::config::{self, Security};
use crate::outcome::{Outcome, Stage, unreadable};
use crate::provider::tls::{self, Tls};
use crate::provider::{Outcomes, Submission};
use crate::smtp::reply::Escaped;

use super::answer::{self, Fault, broken, unreachable};
use super::dialog::{Dialog, Freshness, Login, Opening, Order, Step, Wait};
use super::stream::Stream;
use super::stuffer::Stuffer;

/// Octets that are read at once.
const INPUT: usize = 4 * 1024;
/// Octets of content that are written at once, before stuffing.
const OUTPUT: usize = 64 * 1024;
/// How long a server that closed its side may take to say why, and to say goodbye after QUIT.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Octets a second that a server must take on the whole.
const SLOWEST: u64 = 1_000;
/// How long a server may take to answer RSET; the attempt ends only then.
const RESET: Duration = Duration::from_secs(10);
/// When a greeting is so late that the log says what it may be.
const LATE: Duration = Duration::from_secs(15);

pub(super) struct Connection {
    stream: Stream,
    /// None where nothing is to be secured.
    tls: Option<Tls>,
    dialog: Dialog,
    timeouts: Timeouts,
    input: Vec<u8>,
    /// Transactions begun on it.
    transactions: u32,
}

#[derive(Clone, Copy)]
struct Timeouts {
    connect: Duration,
    greeting: Duration,
    command: Duration,
    data: Duration,
    end: Duration,
}

impl Timeouts {
    fn of(&self, wait: Wait) -> Duration {
        match wait {
            Wait::Greeting => self.greeting,
            Wait::Command => self.command,
            Wait::Data => self.command.min(self.data),
            Wait::Final => self.end,
            Wait::Reset => self.command.min(RESET),
        }
    }
}

/// How a run of the dialog ended.
pub(super) enum End {
    /// The next transaction may begin.
    Ready,
    /// Nothing was sent: a new connection is to be taken at once.
    Again,
    /// The connection is over; every recipient is settled.
    Closed,
    /// It never took a message.
    Refused(Outcome),
}

/// Why the content was not sent to its end.
enum Cut {
    /// The server spoke; the dialog has its words.
    Answered,
    Fault(Fault),
    /// We could not read it.
    Unreadable(io::Error),
}

impl Connection {
    /// Connects and greets. Every address of the server's name is tried, `last` before the others and these in the
    /// resolver's order, until one serves; a refusal for good counts for all.
    pub(super) async fn open(
        config: &config::SmtpProvider,
        tls: Option<&Tls>,
        hostname: &str,
        login: Option<&Login>,
        last: Option<SocketAddr>,
    ) -> Result<(Self, SocketAddr), Outcome> {
        let (server, port) = (config.server.as_str(), config.port);
        let addresses = match timeout(config.connect_timeout, resolve(server, port)).await {
            Ok(Ok(addresses)) => addresses,
            Ok(Err(error)) => return Err(unreachable(format!("looking up {server}: {error}"))),
            Err(_elapsed) => {
                let wait = config.connect_timeout.as_secs_f64();
                return Err(unreachable(format!("looking up {server}: no answer within {wait} s")));
            }
        };
        let mut failures = Vec::new();
        let mut refused = None;
        let mut greeting = config.command_timeout;
        for address in first(last, addresses) {
            match timeout(config.connect_timeout, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    let began = clock::now();
                    match Self::greet(stream, config, tls, hostname, login, greeting).await {
                        Ok(connection) => return Ok((connection, address)),
                        Err(outcome @ Outcome::Held(_)) => return Err(outcome),
                        Err(outcome) => refused = Some(outcome),
                    }
                    // One address has had all the time that a greeting may take; the others will hardly need it.
                    if clock::now().saturating_duration_since(began) >= greeting {
                        greeting = greeting.min(config.connect_timeout);
                    }
                }
                Ok(Err(error)) => failures.push(format!("{address}: {error}")),
                Err(_elapsed) => {
                    let wait = config.connect_timeout.as_secs_f64();
                    failures.push(format!("{address}: no connection within {wait} s"));
                }
            }
        }
        if failures.is_empty() {
            failures.push("the name has no address".to_owned());
        }
        // A server that spoke tells more than an address that is silent.
        Err(refused.unwrap_or_else(|| {
            unreachable(format!("connecting to {server} port {port}: {}", failures.join("; ")))
        }))
    }

    async fn greet(
        stream: TcpStream,
        config: &config::SmtpProvider,
        tls: Option<&Tls>,
        hostname: &str,
        login: Option<&Login>,
        greeting: Duration,
    ) -> Result<Self, Outcome> {
        if let Err(error) = stream.set_nodelay(true) {
            debug!("nodelay was not set: {error}");
        }
        let opening =
            Opening { starttls: config.security == Security::StartTls, login: login.cloned() };
        let mut connection = Self {
            stream: Stream::Plain(stream),
            tls: tls.cloned(),
            dialog: Dialog::new(hostname, opening),
            timeouts: Timeouts {
                connect: config.connect_timeout,
                greeting,
                command: config.command_timeout,
                data: config.data_timeout,
                end: config.final_timeout,
            },
            input: vec![0; INPUT],
            transactions: 0,
        };
        if config.security == Security::Tls {
            let secured = connection.secure().await;
            secured.map_err(|fault| broken(Stage::StartTls, &fault))?;
        }
        match connection.drive(None).await {
            End::Ready => Ok(connection),
            End::Refused(outcome) => Err(outcome),
            End::Again | End::Closed => Err(broken(Stage::Greeting, &Fault::Closed)),
        }
    }

    /// Sends one part; the connection is of further use only where it ends [`End::Ready`].
    pub(super) async fn deliver(
        &mut self,
        submission: &Submission,
        order: Order,
        freshness: Freshness,
        outcomes: &Outcomes,
    ) -> End {
        self.transactions += 1;
        self.dialog.begin(order, freshness);
        self.drive(Some((submission, outcomes))).await
    }

    /// How many recipients the last transaction had when the server would take no more.
    pub(super) fn full_at(&self) -> Option<usize> {
        self.dialog.full_at()
    }

    pub(super) fn transactions(&self) -> u32 {
        self.transactions
    }

    /// Whether nothing has come since the last reply. A 421 or an end that waits in the socket must not be taken for
    /// the answer to the next command.
    pub(super) fn is_quiet(&mut self) -> bool {
        self.stream.is_quiet()
    }

    async fn secure(&mut self) -> Result<(), Fault> {
        let Some(tls) = &self.tls else { return Err(Fault::Tls("none is set up".to_owned())) };
        match timeout(self.timeouts.connect, self.stream.secure(tls)).await {
            Ok(secured) => secured.map_err(Fault::Tls),
            Err(_elapsed) => {
                let wait = self.timeouts.connect.as_secs_f64();
                Err(Fault::Tls(format!("the handshake was not over within {wait} s")))
            }
        }
    }

    /// Says goodbye, within a bounded time.
    pub(super) async fn quit(mut self) {
        let goodbye = async {
            debug!("client: QUIT");
            self.stream.write_all(b"QUIT\r\n").await?;
            self.stream.flush().await?;
            // Whatever it answers; then the socket closes without data of the server's left unread.
            self.stream.read(&mut self.input).await
        };
        match timeout(LAST_WORDS, goodbye).await {
            Ok(Ok(_octets)) => {}
            Ok(Err(error)) => debug!("QUIT: {error}"),
            Err(_elapsed) => debug!("QUIT: no answer"),
        }
    }

    async fn drive(&mut self, delivery: Option<(&Submission, &Outcomes)>) -> End {
        loop {
            match self.dialog.next() {
                Step::StartTls => match self.secure().await {
                    Ok(()) => self.dialog.secured(),
                    Err(fault) => self.dialog.fail_at(Some(Stage::StartTls), &fault),
                },
                Step::WriteSecret(bytes) => {
                    debug!("client: (a secret)");
                    if let Err(fault) = self.write(&bytes).await {
                        self.last_words(&fault).await;
                    }
                }
                Step::Write(bytes) => {
                    for line in bytes.split_inclusive(|b| *b == b'\n') {
                        debug!("client: {}", Escaped(line.trim_ascii_end()));
                    }
                    if let Err(fault) = self.write(&bytes).await {
                        self.last_words(&fault).await;
                    }
                }
                Step::Read(wait) => {
                    let read = match wait {
                        Wait::Greeting => self.read_greeting().await,
                        Wait::Command | Wait::Data | Wait::Final | Wait::Reset => {
                            self.read(self.timeouts.of(wait)).await
                        }
                    };
                    if let Err(fault) = read {
                        self.dialog.fail(&fault);
                    }
                }
                Step::Settle(rcpt, outcome) => {
                    if let Some((_, outcomes)) = delivery {
                        outcomes.settle(rcpt, outcome);
                    }
                }
                Step::Leave(rcpt) => {
                    if let Some((_, outcomes)) = delivery {
                        outcomes.leave(rcpt);
                    }
                }
                Step::Content => {
                    let Some((submission, outcomes)) = delivery else { return End::Closed };
                    outcomes.content_leaves().await;
                    match self.send_content_in_time(submission).await {
                        Ok(()) => self.dialog.content_sent(),
                        Err(Cut::Answered) => {}
                        Err(Cut::Fault(fault)) => self.last_words(&fault).await,
                        Err(Cut::Unreadable(error)) => self.dialog.abandon(&unreadable(&error)),
                    }
                }
                Step::Ready => return End::Ready,
                Step::Again => return End::Again,
                Step::Refused(outcome) => return End::Refused(outcome),
                Step::Close => return End::Closed,
            }
        }
    }

    /// Writes commands. A window of them is small enough to be written without reading.
    async fn write(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let write = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        match timeout(self.timeouts.command, write).await {
            Ok(written) => written.map_err(|error| network(&error)),
            Err(_elapsed) => Err(Fault::Silence(self.timeouts.command)),
        }
    }

    /// A server that wants TLS from the start waits for us as we do for it. RFC 5321 4.5.3.2.1 gives a greeting five
    /// minutes, which is long for who looks for the mistake.
    async fn read_greeting(&mut self) -> Result<(), Fault> {
        let wait = self.timeouts.of(Wait::Greeting);
        let in_clear = matches!(self.stream, Stream::Plain(_));
        let read = {
            let mut read = pin!(self.read(wait));
            match timeout(LATE, &mut read).await {
                Ok(read) => read,
                Err(_elapsed) => {
                    let hint = if in_clear { answer::WANTS_TLS } else { "" };
                    let seconds = LATE.as_secs();
                    warn!("no greeting from the server within {seconds} s, still waiting{hint}");
                    read.await
                }
            }
        };
        read.map_err(|fault| match fault {
            Fault::Silence(wait) if in_clear && self.dialog.is_unheard() => Fault::Mute(wait),
            fault => fault,
        })
    }

    /// Reads until the dialog has something, all of it within `wait`.
    async fn read(&mut self, wait: Duration) -> Result<(), Fault> {
        let Self { stream, dialog, input, .. } = self;
        let reply = async {
            loop {
                if take(stream.read(input).await, input, dialog)? {
                    return Ok(());
                }
            }
        };
        timeout(wait, reply).await.unwrap_or(Err(Fault::Silence(wait)))
    }

    /// After a failed write: the server may have said why before it closed.
    async fn last_words(&mut self, fault: &Fault) {
        let said = match fault {
            Fault::Network(_) => self.read(LAST_WORDS.min(self.timeouts.command)).await.is_ok(),
            Fault::Closed
            | Fault::Silence(_)
            | Fault::Mute(_)
            | Fault::Slow(_)
            | Fault::Garbage(_)
            | Fault::Tls(_) => false,
        };
        if !said {
            self.dialog.fail(fault);
        }
    }

    /// As [`Connection::send_content`]. A server that takes an octet now and then would hold the attempt for ever.
    async fn send_content_in_time(&mut self, submission: &Submission) -> Result<(), Cut> {
        let longest = longest(self.timeouts.data, submission.message.size);
        // Dropped, the connection is not used again; where the last octets were not written, the dot was not sent.
        timeout(longest, self.send_content(submission))
            .await
            .unwrap_or(Err(Cut::Fault(Fault::Slow(longest))))
    }

    /// Streams the content. The final dot goes with the last write, and only after the content was read to its end.
    async fn send_content(&mut self, submission: &Submission) -> Result<(), Cut> {
        let mut stuffer = Stuffer::new();
        let mut out = Vec::new();
        let mut message = submission.message.reader();
        while let Some(octets) = message.chunk().await.map_err(Cut::Unreadable)? {
            for piece in octets.chunks(OUTPUT) {
                if out.len() >= OUTPUT {
                    self.write_content(&out).await?;
                    out.clear();
                }
                stuffer.push(piece, &mut out);
            }
        }
        stuffer.finish(&mut out);
        // Where this fails, its last octets were not taken by the kernel, so the server cannot have seen the dot.
        self.write_content(&out).await
    }

    /// Writes, and listens meanwhile: a server may refuse early, and then stop reading or close.
    async fn write_content(&mut self, octets: &[u8]) -> Result<(), Cut> {
        let Self { stream, dialog, input, timeouts, .. } = self;
        let (mut from, mut to) = tokio::io::split(stream);
        let mut left = octets;
        while !left.is_empty() {
            let progress = async {
                loop {
                    // Both are safe to drop: read and write either did their work or nothing.
                    tokio::select! {
                        biased;
                        read = from.read(input) => {
                            if take(read, input, dialog).map_err(Cut::Fault)? {
                                return Err(Cut::Answered);
                            }
                        }
                        written = to.write(left) => {
                            return written.map_err(|error| Cut::Fault(network(&error)));
                        }
                    }
                }
            };
            let written = timeout(timeouts.data, progress)
                .await
                .unwrap_or(Err(Cut::Fault(Fault::Silence(timeouts.data))))?;
            left = left.get(written..).unwrap_or_default();
        }
        let flush = async {
            loop {
                // Both are safe to drop, as above. As long as the first has more to do, the server cannot have all, so
                // what is read is no answer to the final dot; afterwards it may be.
                tokio::select! {
                    biased;
                    flushed = to.flush() => {
                        return flushed.map_err(|error| Cut::Fault(network(&error)));
                    }
                    read = from.read(input) => {
                        if take(read, input, dialog).map_err(Cut::Fault)? {
                            return Err(Cut::Answered);
                        }
                    }
                }
            }
        };
        timeout(timeouts.data, flush)
            .await
            .unwrap_or(Err(Cut::Fault(Fault::Silence(timeouts.data))))
    }
}

/// How long content of so many octets may take, where each piece may take `data`.
fn longest(data: Duration, size: u64) -> Duration {
    data + Duration::from_secs(size / SLOWEST)
}

/// Gives what was read to the dialog; whether it has something now.
fn take(read: io::Result<usize>, input: &[u8], dialog: &mut Dialog) -> Result<bool, Fault> {
    let octets = match read {
        Ok(0) => return Err(Fault::Closed),
        Ok(octets) => input.get(..octets).unwrap_or_default(),
        Err(error) => return Err(network(&error)),
    };
    // What it says of a login may have the login in it.
    let lines = octets.split_inclusive(|b| *b == b'\n');
    for line in lines.filter(|_| !dialog.is_logging_in()) {
        debug!("server: {}", Escaped(line.trim_ascii_end()));
    }
    Ok(dialog.receive(octets))
}

/// Many servers end a secured connection without saying so, which the TLS library calls unexpected.
fn network(error: &io::Error) -> Fault {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Fault::Closed,
        _ => Fault::Network(error.to_string()),
    }
}

/// The addresses in their order, but for `last`, which is the first if it is still one of them.
fn first(last: Option<SocketAddr>, mut addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    addresses.sort_by_key(|address| Some(*address) != last);
    addresses
}

async fn resolve(server: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok(lookup_host((tls::bare(server), port)).await?.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_that_served_last_is_the_first_and_no_other_moves() {
        let at = |n: u16| SocketAddr::from(([192, 0, 2, 1], n));
        let all = || vec![at(3), at(1), at(2)];
        for (last, expected) in
            [(None, all()), (Some(at(9)), all()), (Some(at(2)), vec![at(2), at(3), at(1)])]
        {
            assert_eq!(first(last, all()), expected, "{last:?}");
        }
    }

    #[test]
    fn content_may_take_so_long_as_it_is_large() {
        let data = Duration::from_secs(180);
        for (size, seconds) in
            [(0, 180), (999, 180), (35_000_000, 35_180), (u64::MAX, u64::MAX / 1_000 + 180)]
        {
            assert_eq!(longest(data, size).as_secs(), seconds);
        }
    }
}
