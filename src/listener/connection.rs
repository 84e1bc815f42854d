//! One connection: drives a [`Session`] over a socket, and stores what it brings.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tracing::{debug, info, warn};

use crate::clock;
use crate::envelope::{Client, Envelope, Intake, Kind, Rcpt, SpoolId};
use crate::listener::Shared;
use crate::listener::slots::Slot;
use crate::message::header::{Facts, HeaderFilter};
use crate::message::received::{self, Arrival};
use crate::metrics::Refusal;
use crate::smtp::params::{MailParams, Recipient};
use crate::smtp::reply::{self, Escaped, Reply};
use crate::smtp::session::{Objection, Session, Settings, Step, Transaction};
use crate::spool::{Durability, Op, Spool, SpoolError, Stage};

/// Octets read at once while commands come, and while content does.
const COMMAND_READ: usize = 2 * 1024;
const CONTENT_READ: usize = 64 * 1024;
/// How long a connection that is told to go may take to read it.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Who is at the other end.
#[derive(Clone, Debug)]
pub(super) enum Peer {
    Tcp(IpAddr),
    Unix,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

/// Says why and closes, without waiting for anybody.
pub(super) fn turn_away(stream: Stream, reply: &Reply) {
    let mut words = Vec::new();
    reply.write_to(&mut words);
    // The socket is new, so its buffer takes the line; where it does not, the client learns nothing but the end.
    match stream {
        Stream::Tcp(stream) => drop(stream.try_write(&words)),
        Stream::Unix(stream) => drop(stream.try_write(&words)),
    }
}

/// Serves one client to its end.
pub(super) async fn serve<S: Spool>(
    stream: Stream,
    peer: Peer,
    shared: Arc<Shared<S>>,
    slot: Slot,
) {
    shared.metrics.connections.inc();
    shared.metrics.connections_total.inc();
    let _open = Open(&shared);
    let mut connection = Connection {
        session: Session::new(session_settings(&shared, &shared.intake.borrow()), clock::now()),
        intake: shared.intake.clone(),
        shared: &shared,
        stream,
        peer,
        slot,
        buffer: BytesMut::new(),
        receiving: None,
        made_room: false,
    };
    if tracing::enabled!(tracing::Level::DEBUG) {
        connection.session.hear();
    }
    // A client that went away is its own affair.
    if let Err(error) = connection.run().await {
        debug!(client = %connection.peer, %error, "connection from {} ended: {error}", connection.peer);
    }
    if connection.receiving.is_some() {
        shared.metrics.refuse_message(Refusal::Unfinished);
    }
}

/// Counts the connection as open while it lives, also where its task panics.
struct Open<'a, S>(&'a Shared<S>);

impl<S> Drop for Open<'_, S> {
    fn drop(&mut self) {
        self.0.metrics.connections.dec();
    }
}

fn session_settings<S>(shared: &Shared<S>, intake: &Intake) -> Arc<Settings> {
    let limits = &shared.limits;
    Arc::new(Settings {
        hostname: shared.hostname.clone(),
        max_size: limits.message_size.min(intake.max_size),
        size_why: intake.why,
        max_recipients: limits.recipients,
        bare_newline: limits.bare_newline,
        errors: limits.errors_per_session,
        command_timeout: limits.command_timeout,
        data_timeout: limits.data_timeout,
        min_data_rate: limits.min_data_rate.map(|rate| (rate.amount, rate.per)),
    })
}

struct Connection<'a, S: Spool> {
    shared: &'a Shared<S>,
    session: Session,
    intake: tokio::sync::watch::Receiver<Intake>,
    stream: Stream,
    peer: Peer,
    slot: Slot,
    buffer: BytesMut,
    receiving: Option<Box<Receiving<S::Stage>>>,
    /// It was idle, and goes at once.
    made_room: bool,
}

/// The content of one message while it comes in.
struct Receiving<T> {
    stage: T,
    filter: HeaderFilter,
    /// What the filter let through and is not staged yet.
    passed: Vec<u8>,
}

/// What a step asked for, with the session free again.
enum Todo {
    Write(Vec<u8>),
    Read(std::time::Instant),
    Accept,
    Refuse(Reply),
    Begin,
    Stored(Result<(), Reply>),
    Commit,
    Refused(Objection),
    Abort,
    Close,
}

impl<S: Spool> Connection<'_, S> {
    async fn run(&mut self) -> io::Result<()> {
        loop {
            match self.step().await {
                Todo::Write(bytes) => self.write(&bytes).await?,
                Todo::Read(until) => {
                    if self.read(until).await?.is_break() {
                        return Ok(());
                    }
                }
                Todo::Accept => self.session.accept(),
                Todo::Refuse(reply) => self.session.refuse(reply),
                Todo::Begin => self.begin(),
                Todo::Stored(Ok(())) => {}
                Todo::Stored(Err(reply)) => {
                    self.receiving = None;
                    self.session.fail(reply);
                }
                Todo::Commit => match self.commit().await {
                    Ok(id) => self.session.stored(&id.to_string()),
                    Err(reply) => self.session.refuse(reply),
                },
                Todo::Refused(objection) => self.refused(objection),
                // What was refused before its end is counted already.
                Todo::Abort => {
                    if self.receiving.take().is_some() {
                        self.shared.metrics.refuse_message(Refusal::Unfinished);
                    }
                }
                Todo::Close => return self.close().await,
            }
        }
    }

    /// The session's next step, and what the client has said for it.
    async fn step(&mut self) -> Todo {
        let todo = self.todo().await;
        for line in self.session.heard() {
            debug!(client = %self.peer, command = %Escaped(&line), "command");
        }
        todo
    }

    /// The session's next step, reduced to what is to be done outside of it.
    async fn todo(&mut self) -> Todo {
        match self.session.next(clock::now()) {
            Step::Write(bytes) => Todo::Write(bytes),
            Step::NeedInput { until } => Todo::Read(until),
            Step::Mail(params) => match refuse_mail(self.shared, &self.intake, params) {
                Some(reply) => Todo::Refuse(reply),
                None => {
                    // Before the client is told, so that it is not asked to make room from here on.
                    self.slot.busy();
                    Todo::Accept
                }
            },
            Step::Rcpt(_) => Todo::Accept,
            Step::Begin(_) => Todo::Begin,
            Step::Body(chunk) => Todo::Stored(match &mut self.receiving {
                Some(receiving) => receiving
                    .take(chunk)
                    .await
                    .map_err(|error| refuse_storage(self.shared, &error, reply::local_error())),
                None => Ok(()),
            }),
            Step::Commit => Todo::Commit,
            Step::Refused(objection) => Todo::Refused(objection),
            Step::Abort => Todo::Abort,
            Step::Close => Todo::Close,
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        debug!(client = %self.peer, reply = %Escaped(bytes), "reply");
        let timeout = self.shared.limits.command_timeout;
        let abort = self.shared.abort.clone();
        // Dropping a write mid-way leaves a torn reply to a client that is cut off anyway.
        tokio::select! {
            biased;
            // Asked first: what is said about a message that is on disk reaches whoever reads, also at the very end.
            written = tokio::time::timeout(timeout, self.stream.write_all(bytes)) => {
                written.map_err(|_late| io::Error::new(io::ErrorKind::TimedOut, "the client does not read"))?
            }
            () = abort.cancelled() => Err(io::ErrorKind::ConnectionAborted.into()),
            // Asked last: only who does not read is cut off here, all others read why.
            () = self.slot.evicted() => {
                self.shared.metrics.refuse_connection(Refusal::Evicted);
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, "it made room and does not read"))
            }
        }
    }

    /// Waits for input, a deadline, or a reason to end.
    async fn read(&mut self, until: std::time::Instant) -> io::Result<std::ops::ControlFlow<()>> {
        use std::ops::ControlFlow::{Break, Continue};
        let want = if self.session.receiving() { CONTENT_READ } else { COMMAND_READ };
        if self.buffer.capacity() > want || self.buffer.capacity() < want {
            self.buffer = BytesMut::with_capacity(want);
        }
        match self.session.before_mail() {
            true => self.slot.idle(),
            false => self.slot.busy(),
        }
        let stop = &self.shared.shutdown.token;
        let stopping = stop.is_cancelled();
        if stopping {
            self.session.shut_down();
        }
        // All branches may be dropped mid-way: a read that is not ready has taken nothing.
        tokio::select! {
            biased;
            () = self.shared.abort.cancelled() => return Ok(Break(())),
            () = stop.cancelled(), if !stopping => self.session.shut_down(),
            () = self.slot.evicted() => {
                self.shared.metrics.refuse_connection(Refusal::Evicted);
                self.session.evict(reply::made_room());
                self.made_room = true;
            }
            read = self.stream.read_buf(&mut self.buffer) => {
                if read? == 0 {
                    self.session.eof();
                } else {
                    self.session.receive(&self.buffer, clock::now());
                    self.buffer.clear();
                }
            }
            () = tokio::time::sleep_until(until.into()) => {}
        }
        if self.intake.has_changed().unwrap_or(false) {
            let settings = session_settings(self.shared, &self.intake.borrow_and_update());
            self.session.configure(settings);
        }
        Ok(Continue(()))
    }

    fn begin(&mut self) {
        let refusal = self.intake.borrow().refusal.clone();
        if let Some(reply) = refusal {
            self.shared.metrics.refuse_message(Refusal::NoProvider);
            return self.session.refuse(reply);
        }
        let stage = self.shared.spool.stage();
        let filter = HeaderFilter::new();
        self.receiving = Some(Box::new(Receiving { stage, filter, passed: Vec::new() }));
        self.session.accept();
    }

    /// The session has something against a message: counts it, and says it to whoever looks after the client.
    fn refused(&mut self, objection: Objection) {
        let client = &self.peer;
        match objection {
            Objection::TooLarge => {
                self.receiving = None;
                self.shared.metrics.refuse_message(Refusal::TooLarge);
                warn!(event = "refused", %client, reason = Refusal::TooLarge.label(), "message from {client} refused: it is larger than limits.message_size or what the provider takes");
            }
            Objection::BareNewline => {
                self.receiving = None;
                self.shared.metrics.refuse_message(Refusal::Content);
                warn!(event = "refused", %client, reason = Refusal::Content.label(), "message from {client} refused: it has a CR or LF that is not part of a CRLF, and limits.bare_newline is \"reject\"");
            }
            // `Abort` counts it, unless it was refused before.
            Objection::TimedOut { bare_end: false } => {
                warn!(event = "refused", %client, reason = "timeout", "message from {client} not taken: its content stayed away or came too slowly");
            }
            Objection::TimedOut { bare_end: true } => {
                warn!(event = "refused", %client, reason = "timeout", "message from {client} not taken: the client ended it with a dot between bare newlines and then waited, but only CRLF.CRLF ends DATA");
            }
        }
    }

    /// The content is whole: makes it durable. Only after this may the client be told 250 (R1).
    async fn commit(&mut self) -> Result<SpoolId, Reply> {
        let began = clock::now();
        let receiving = self.receiving.take().ok_or_else(reply::local_error)?;
        let transaction = self.session.transaction().ok_or_else(reply::local_error)?;
        let (staged, facts) = receiving
            .finish()
            .await
            .map_err(|error| refuse_storage(self.shared, &error, reply::local_error()))?;
        if facts.received > self.shared.limits.received_headers {
            self.shared.metrics.refuse_message(Refusal::Loop);
            let (client, n) = (&self.peer, facts.received);
            warn!(event = "refused", %client, reason = "loop", "message from {client} refused: {n} Received lines, it goes round in circles");
            return Err(reply::loops());
        }
        if let Some(reply) = self.shared.policy.refusal(&facts) {
            self.shared.metrics.refuse_message(Refusal::Sender);
            let client = &self.peer;
            warn!(event = "refused", %client, reason = Refusal::Sender.label(), "message from {client} refused, for sender.policy is \"reject\": {reply}");
            return Err(reply);
        }
        let refusal = self.intake.borrow().refusal.clone();
        if let Some(reply) = refusal {
            self.shared.metrics.refuse_message(Refusal::NoProvider);
            return Err(reply);
        }
        let envelope = envelope(transaction, &facts, &self.peer, &self.shared.hostname);
        let (id, size, recipients) = (envelope.id, envelope.size, envelope.rcpts.len());
        let from = Escaped(envelope.reverse_path.as_str().as_bytes()).to_string();
        let put = Op::Put { envelope, body: staged };
        let stored = self.shared.spool.apply(vec![put], Durability::Durable).await;
        stored.map_err(|error| refuse_storage(self.shared, &error, reply::local_error()))?;
        let metrics = &self.shared.metrics;
        metrics.commit_seconds.observe(clock::now().saturating_duration_since(began).as_secs_f64());
        metrics.accepted.inc();
        metrics.accepted_recipients.inc_by(recipients as u64);
        metrics.received_bytes.inc_by(size);
        let client = &self.peer;
        info!(event = "accepted", %id, %client, %from, recipients, size, "message {id} accepted from {client}: <{from}>, {recipients} recipients, {size} octets");
        // While the daemon stops nobody takes it any more: it waits in the spool for the next start.
        self.shared.accepted.send(id).unwrap_or_default();
        Ok(id)
    }

    /// Ends our side and waits a moment for the client's, so that the last reply is not lost to a reset.
    async fn close(&mut self) -> io::Result<()> {
        self.stream.shutdown().await?;
        if self.made_room {
            return Ok(());
        }
        let mut rest = BytesMut::with_capacity(COMMAND_READ);
        let drain = async {
            // What still comes is thrown away, but not for ever.
            for _ in 0..64 {
                rest.clear();
                if self.stream.read_buf(&mut rest).await? == 0 {
                    break;
                }
            }
            Ok(())
        };
        tokio::time::timeout(LAST_WORDS, drain).await.unwrap_or(Ok(()))
    }
}

impl<T: Stage> Receiving<T> {
    async fn take(&mut self, chunk: &[u8]) -> Result<(), SpoolError> {
        if self.filter.in_body() {
            self.filter.pass(chunk);
            return self.stage.write(chunk).await;
        }
        self.passed.clear();
        self.filter.push(chunk, &mut self.passed);
        self.stage.write(&self.passed).await
    }

    async fn finish(self) -> Result<(crate::spool::Staged, Facts), SpoolError> {
        let Self { mut stage, filter, mut passed } = self;
        passed.clear();
        let facts = filter.finish(&mut passed);
        if !passed.is_empty() {
            stage.write(&passed).await?;
        }
        Ok((stage.finish().await?, facts))
    }
}

/// Intake, the disk floor and trouble with the disk, at MAIL (R4).
fn refuse_mail<S: Spool>(
    shared: &Shared<S>,
    intake: &tokio::sync::watch::Receiver<Intake>,
    params: &MailParams,
) -> Option<Reply> {
    let refusal = intake.borrow().refusal.clone();
    if refusal.is_some() {
        shared.metrics.refuse_message(Refusal::NoProvider);
        return refusal;
    }
    let has_room = shared.spool.has_room_for(params.declared_size.unwrap_or(0));
    let error = if has_room { shared.spool.trouble() } else { Some(SpoolError::Full) };
    error.map(|error| refuse_storage(shared, &error, reply::cannot_store()))
}

/// What the client is told: `reply`, unless the disk is full. The operator finds more in the log.
fn refuse_storage<S>(shared: &Shared<S>, error: &SpoolError, reply: Reply) -> Reply {
    match error {
        SpoolError::Full => {
            shared.metrics.refuse_message(Refusal::Full);
            warn!(
                event = "refused",
                reason = "full",
                "mail is refused with 452: the disk of the spool is full or under spool.min_free"
            );
            reply::no_space()
        }
        SpoolError::Unknown(_)
        | SpoolError::Refused(..)
        | SpoolError::Unfit(..)
        | SpoolError::Damaged(..)
        | SpoolError::Io(..)
        | SpoolError::Closed => {
            shared.metrics.refuse_message(Refusal::Storage);
            let code = reply.code;
            tracing::error!(event = "refused", reason = "storage", %error, "mail is refused with {code}: it cannot be stored: {error}");
            reply
        }
    }
}

fn envelope(transaction: &Transaction, facts: &Facts, peer: &Peer, hostname: &str) -> Envelope {
    let accepted = clock::wall();
    let id = SpoolId::new(accepted);
    let client = Client { address: peer.to_string().into(), helo: transaction.helo.clone() };
    let protocol = match (transaction.smtputf8, transaction.esmtp) {
        (true, _) => "UTF8SMTP",
        (false, true) => "ESMTP",
        (false, false) => "SMTP",
    };
    let prepend =
        received::prepend(Arrival { id, at: accepted, client: &client, hostname, protocol }, facts);
    let rcpt = |rcpt: &Recipient| Rcpt {
        path: rcpt.path.clone(),
        notify: rcpt.notify,
        orcpt: rcpt.orcpt.clone(),
    };
    Envelope {
        kind: Kind::Mail,
        id,
        accepted,
        reverse_path: transaction.reverse_path.clone(),
        rcpts: transaction.rcpts.iter().map(rcpt).collect(),
        smtputf8: transaction.smtputf8,
        eight_bit: facts.eight_bit,
        ret: transaction.ret,
        envid: transaction.envid.clone(),
        size: facts.size,
        client,
        priority: facts.priority(),
        author: facts.author.clone(),
        prepend,
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
