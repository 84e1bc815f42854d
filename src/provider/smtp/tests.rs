//! The provider against a server that follows a script, over loopback.

use std::future::Future;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::*;
use crate::envelope::{
    Body, BodyFile, Client, Envelope, Kind, Priority, Rcpt, SpoolId, UnixMillis,
};
use crate::message::outgoing::Message;
use crate::outcome::{Scope, Stage};
use crate::smtp::address::{Charset, ForwardPath, Mailbox};
use crate::smtp::params::Notify;

/// No wait of a test is longer.
const LONG: Duration = Duration::from_secs(20);
/// A deadline that is meant to pass.
const SOON: Duration = Duration::from_millis(60);

mod secured;
mod xoauth2;

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new())
}

struct Server {
    listener: TcpListener,
}

impl Server {
    async fn bind() -> Self {
        Self { listener: TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap() }
    }

    fn config(&self) -> config::SmtpProvider {
        config::SmtpProvider {
            server: "127.0.0.1".to_owned(),
            port: self.listener.local_addr().unwrap().port(),
            security: Security::None,
            login: None,
            ca_file: None,
            sender: Some(mailbox("reports@x.example")),
            sender_name: None,
            max_recipients: 100,
            connect_timeout: LONG,
            command_timeout: LONG,
            data_timeout: LONG,
            final_timeout: LONG,
        }
    }

    fn provider(&self) -> SmtpProvider {
        SmtpProvider::new(&self.config(), "me.example".to_owned(), &metrics()).unwrap()
    }

    fn pooling(&self, limits: pool::Limits) -> SmtpProvider {
        let pool = Arc::new(Pool::new(limits));
        let (config, hostname) = (self.config(), "me.example".to_owned());
        SmtpProvider {
            config,
            tls: None,
            hostname,
            tokens: None,
            pool,
            full_at: Mutex::default(),
            last: Mutex::default(),
        }
    }

    async fn accept(&self) -> Peer {
        let (stream, _) = self.listener.accept().await.unwrap();
        Peer { stream: BufReader::new(stream) }
    }

    /// A connection up to the reply to EHLO, with PIPELINING.
    async fn greet(&self) -> Peer {
        let mut peer = self.accept().await;
        peer.say("220 up").await;
        peer.expect(&["EHLO me.example"]).await;
        peer.say("250-up\r\n250-PIPELINING\r\n250 8BITMIME").await;
        peer
    }
}

/// The client, as the server sees it.
struct Peer<S = TcpStream> {
    stream: BufReader<S>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Peer<S> {
    async fn say(&mut self, lines: &str) {
        self.stream.write_all(format!("{lines}\r\n").as_bytes()).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    async fn expect(&mut self, lines: &[&str]) {
        for line in lines {
            let mut read = String::new();
            self.stream.read_line(&mut read).await.unwrap();
            assert_eq!(read.trim_end(), *line);
        }
    }

    /// Up to the 354.
    async fn take_envelope(&mut self) {
        let lines = ["MAIL FROM:<a@x.example>", "RCPT TO:<r0@y.example>", "DATA"];
        self.expect(&lines).await;
        self.say("250 ok\r\n250 ok\r\n354 go on").await;
    }

    /// The content as it goes over the wire, with its final dot.
    async fn content(&mut self) -> Vec<u8> {
        let mut wire = Vec::new();
        while !(wire == b".\r\n" || wire.ends_with(b"\r\n.\r\n")) {
            assert!(self.stream.read_until(b'\n', &mut wire).await.unwrap() > 0);
        }
        wire
    }

    async fn take_message(&mut self) -> Vec<u8> {
        self.take_envelope().await;
        let wire = self.content().await;
        self.say("250 2.0.0 queued").await;
        wire
    }

    /// What the client sends until it closes.
    async fn rest(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest).await {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
        rest
    }
}

fn mailbox(text: &str) -> Mailbox {
    Mailbox::parse(text, Charset::Ascii).unwrap()
}

fn submission(body: Body) -> Submission {
    let path = ForwardPath::Mailbox(mailbox("r0@y.example"));
    let envelope = Envelope {
        kind: Kind::Mail,
        id: SpoolId::from_u128(1),
        accepted: UnixMillis(0),
        reverse_path: ReversePath::Mailbox(mailbox("a@x.example")),
        rcpts: vec![Rcpt { path, notify: Notify::Unsaid, orcpt: None }],
        smtputf8: false,
        eight_bit: false,
        ret: None,
        envid: None,
        size: body.len(),
        client: Client { address: "127.0.0.1".into(), helo: "app".into() },
        priority: Priority::Normal,
        author: Some(mailbox("reports@x.example")),
        prepend: Bytes::from_static(b"Received: here\r\n"),
    };
    let (message, reverse_path) =
        (Message::stored(&envelope, &body), envelope.reverse_path.clone());
    Submission {
        envelope: Arc::new(envelope),
        reverse_path,
        part: vec![0],
        doubtful: Vec::new(),
        message,
    }
}

fn small() -> Submission {
    submission(Body::Memory(Bytes::from_static(b"Subject: x\r\n\r\n.dot\r\n")))
}

/// A content in a file of its own.
fn on_disk(octets: &[u8], crc32c: u32) -> Body {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(octets).unwrap();
    Body::File(BodyFile { file: Arc::new(file), start: 0, len: octets.len() as u64, crc32c })
}

/// The one outcome of a delivery.
async fn deliver(provider: &SmtpProvider, submission: &Submission) -> Outcome {
    let outcomes = Outcomes::new();
    provider.deliver(submission, &outcomes).await;
    outcomes.take(&submission.part).remove(0).1
}

/// Both sides, within the time that a test has.
async fn both<A, B>(server: impl Future<Output = A>, client: impl Future<Output = B>) -> (A, B) {
    timeout(LONG, async { tokio::join!(server, client) }).await.expect("the test hangs")
}

#[track_caller]
fn assert_deferred(outcome: &Outcome, scope: Scope, stage: Stage, words: &str) {
    let Outcome::Deferred(cause) = outcome else { panic!("{outcome:?}") };
    let got = (cause.scope, cause.stage, cause.words.to_string());
    assert_eq!(got, (scope, stage, words.to_owned()));
    assert_eq!(cause.maybe_sent, stage == Stage::EndOfData);
}

#[track_caller]
fn assert_delivered(outcome: &Outcome) {
    let Outcome::Delivered(receipt) = outcome else { panic!("{outcome:?}") };
    assert_eq!(receipt.words.to_string(), "250 2.0.0 queued");
}

#[tokio::test]
async fn the_account_is_itself_in_upper_case_too() {
    let config = Server::bind().await.config();
    for (author, is_own) in [
        (Some("reports@x.example"), true),
        (Some("Reports@X.example"), true),
        (Some("other@x.example"), false),
        (None, false),
    ] {
        assert_eq!(config.is_own(author.map(mailbox).as_ref()), is_own, "{author:?}");
    }
    let unicode = Mailbox::parse("r@b\u{fc}cher.example", Charset::Utf8).unwrap();
    let config = config::SmtpProvider { sender: Some(unicode), ..config };
    assert!(config.is_own(Some(&mailbox("r@xn--bcher-kva.example"))));
}

#[tokio::test]
async fn messages_share_a_connection_that_ends_with_quit() {
    let server = Server::bind().await;
    let provider = server.provider();
    let script = async {
        let mut peer = server.greet().await;
        for _ in 0..2 {
            let wire = peer.take_message().await;
            assert_eq!(wire, b"Received: here\r\nSubject: x\r\n\r\n..dot\r\n.\r\n");
        }
        peer.expect(&["QUIT"]).await;
        peer.say("221 bye").await;
        assert_eq!(peer.rest().await, b"");
    };
    let ((), ()) = both(script, async {
        assert_delivered(&deliver(&provider, &small()).await);
        assert_delivered(&deliver(&provider, &small()).await);
        provider.close().await;
    })
    .await;
}

#[tokio::test]
async fn a_large_content_arrives_to_the_octet() {
    let server = Server::bind().await;
    let provider = server.provider();
    let octets = b"..two\r\n.\r\nplain line\r\n\xff\0 eight\r\n".repeat(40_000);
    let submission = submission(on_disk(&octets, crc32c::crc32c(&octets)));
    let script = async {
        let mut peer = server.greet().await;
        peer.take_envelope().await;
        let wire = peer.content().await;
        peer.say("250 2.0.0 queued").await;
        wire
    };
    let (wire, outcome) = both(script, deliver(&provider, &submission)).await;
    assert_delivered(&outcome);
    // What a server does (RFC 5321 4.5.2), line by line.
    let mut content = Vec::new();
    for line in wire.split_inclusive(|b| *b == b'\n') {
        content.extend_from_slice(line.strip_prefix(b".").unwrap_or(line));
    }
    assert!(content == [b"Received: here\r\n", octets.as_slice(), b"\r\n"].concat());
}

#[tokio::test]
async fn a_damaged_content_never_gets_its_final_dot() {
    let server = Server::bind().await;
    let provider = server.provider();
    let octets = b"line\r\n".repeat(200_000);
    let submission = submission(on_disk(&octets, crc32c::crc32c(&octets) ^ 1));
    let script = async {
        let mut peer = server.greet().await;
        peer.take_envelope().await;
        peer.rest().await
    };
    let (rest, outcome) = both(script, deliver(&provider, &submission)).await;
    assert!(!rest.ends_with(b"\r\n.\r\n"));
    let Outcome::Held(cause) = outcome else { panic!("{outcome:?}") };
    assert_eq!((cause.scope, cause.stage), (Scope::Message, Stage::Local));
}

#[tokio::test]
async fn a_421_on_a_reused_connection_is_tried_at_once_on_a_new_one() {
    let server = Server::bind().await;
    let provider = server.provider();
    let script = async {
        let mut first = server.greet().await;
        first.take_message().await;
        first.expect(&["MAIL FROM:<a@x.example>"]).await;
        first.say("421 4.4.2 idle too long").await;
        let mut second = server.greet().await;
        second.take_message().await;
    };
    let ((), ()) = both(script, async {
        assert_delivered(&deliver(&provider, &small()).await);
        assert_delivered(&deliver(&provider, &small()).await);
    })
    .await;
}

#[tokio::test]
async fn what_a_server_says_to_an_idle_connection_answers_nothing() {
    let server = Server::bind().await;
    let provider = server.provider();
    for goodbye in ["421 4.3.2 closing", "250 2.0.0 queued", ""] {
        let script = async {
            let mut first = server.greet().await;
            first.take_message().await;
            first
        };
        let (mut first, outcome) = both(script, deliver(&provider, &small())).await;
        assert_delivered(&outcome);
        // It is in the client's socket when `say` or the close has returned: this is loopback.
        match goodbye {
            "" => drop(first),
            words => {
                first.say(words).await;
                drop(first);
            }
        }
        let script = async {
            let mut second = server.greet().await;
            second.take_message().await;
            second.say("421 bye").await;
        };
        let ((), outcome) = both(script, deliver(&provider, &small())).await;
        assert_delivered(&outcome);
    }
}

#[tokio::test]
async fn a_silent_server_meets_the_deadline_of_the_stage() {
    let server = Server::bind().await;
    let mut provider = server.provider();
    provider.config.command_timeout = SOON;
    let (peer, outcome) = both(server.accept(), deliver(&provider, &small())).await;
    let words = "no greeting within 0.06 s; a server that wants TLS from the start says nothing before: would provider.security = \"tls\" fit this port?";
    assert_deferred(&outcome, Scope::Provider, Stage::Greeting, words);
    assert_eq!(peer.rest().await, b"");

    let mut provider = server.provider();
    provider.config.final_timeout = SOON;
    let script = async {
        let mut peer = server.greet().await;
        peer.take_envelope().await;
        peer.content().await;
        peer
    };
    let (_peer, outcome) = both(script, deliver(&provider, &small())).await;
    let words = "no answer to the final dot within 0.06 s";
    assert_deferred(&outcome, Scope::Message, Stage::EndOfData, words);

    let mut provider = server.provider();
    provider.config.data_timeout = SOON;
    let script = async {
        let mut peer = server.greet().await;
        peer.expect(&["MAIL FROM:<a@x.example>", "RCPT TO:<r0@y.example>", "DATA"]).await;
        peer.say("250 ok\r\n250 ok").await;
        peer
    };
    let (_peer, outcome) = both(script, deliver(&provider, &small())).await;
    assert_deferred(&outcome, Scope::Message, Stage::Data, "no answer to DATA within 0.06 s");
}

#[tokio::test]
async fn octets_that_drip_do_not_move_the_deadline() {
    let server = Server::bind().await;
    let mut provider = server.provider();
    provider.config.command_timeout = SOON;
    let script = async {
        let mut peer = server.accept().await;
        let mut tick = tokio::time::interval(SOON / 6);
        let mut dripped = 0;
        while peer.stream.write_all(b"2").await.is_ok() {
            tick.tick().await;
            dripped += 1;
        }
        dripped
    };
    let (dripped, outcome) = both(script, deliver(&provider, &small())).await;
    assert_deferred(&outcome, Scope::Provider, Stage::Greeting, "no greeting within 0.06 s");
    assert!(dripped < 500);
}

#[tokio::test]
async fn a_server_that_stops_reading_meets_the_data_deadline() {
    let server = Server::bind().await;
    let mut provider = server.provider();
    provider.config.data_timeout = 5 * SOON;
    let submission = submission(Body::Memory(b"line\r\n".repeat(4_000_000).into()));
    let script = async {
        let mut peer = server.greet().await;
        peer.take_envelope().await;
        peer
    };
    let (_peer, outcome) = both(script, deliver(&provider, &submission)).await;
    let words = "the server took no content for 0.3 s";
    assert_deferred(&outcome, Scope::Message, Stage::Content, words);
}

/// It held the attempt for as long as it liked.
#[tokio::test]
async fn a_server_that_takes_a_little_at_a_time_meets_the_deadline_of_the_whole() {
    let server = Server::bind().await;
    let mut provider = server.provider();
    provider.config.data_timeout = Duration::from_secs(2);
    let mut submission = submission(Body::Memory(b"line\r\n".repeat(5_000_000).into()));
    // As long as a small one may take.
    submission.message.size = 10;
    let script = async {
        let mut peer = server.greet().await;
        peer.take_envelope().await;
        let mut some = vec![0; 256 * 1024];
        while peer.stream.read_exact(&mut some).await.is_ok() {
            tokio::time::sleep(SOON).await;
        }
    };
    let ((), outcome) = both(script, deliver(&provider, &submission)).await;
    let words = "the server did not take all of the content within 2 s";
    assert_deferred(&outcome, Scope::Message, Stage::Content, words);
}

#[tokio::test]
async fn a_refusal_amid_the_content_is_taken_for_what_it_says() {
    let server = Server::bind().await;
    let provider = server.provider();
    let submission = submission(Body::Memory(b"line\r\n".repeat(4_000_000).into()));
    for round in 0..4 {
        let script = async {
            let mut peer = server.greet().await;
            peer.take_envelope().await;
            let mut some = vec![0; 100_000 * round + 1];
            peer.stream.read_exact(&mut some).await.unwrap();
            peer.say("552 5.3.4 too large").await;
            // Closed with content unread: the client's next write breaks.
        };
        let ((), outcome) = both(script, deliver(&provider, &submission)).await;
        let Outcome::Failed(cause) = outcome else { panic!("{outcome:?}") };
        assert_eq!((cause.scope, cause.stage), (Scope::Message, Stage::Content));
        assert_eq!(cause.words.to_string(), "552 5.3.4 too large");
    }
}

#[tokio::test]
async fn a_server_that_closes_amid_the_content_leaves_no_doubt() {
    let server = Server::bind().await;
    let provider = server.provider();
    let submission = submission(Body::Memory(b"line\r\n".repeat(4_000_000).into()));
    let script = async {
        let mut peer = server.greet().await;
        peer.take_envelope().await;
    };
    let ((), outcome) = both(script, deliver(&provider, &submission)).await;
    let Outcome::Deferred(cause) = outcome else { panic!("{outcome:?}") };
    assert_eq!((cause.scope, cause.stage), (Scope::Message, Stage::Content));
    assert!(!cause.maybe_sent);
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_is_the_providers_trouble() {
    let server = Server::bind().await;
    let provider = server.provider();
    drop(server);
    let outcome = timeout(LONG, deliver(&provider, &small())).await.unwrap();
    let port = provider.config.port;
    let words = format!(
        "connecting to 127.0.0.1 port {port}: 127.0.0.1:{port}: Connection refused (os error 111)"
    );
    assert_deferred(&outcome, Scope::Provider, Stage::Connect, &words);
}

#[tokio::test]
async fn every_address_of_the_name_is_tried() {
    // Only the IPv4 one listens, whichever the resolver says first.
    let server = Server::bind().await;
    let mut provider = server.provider();
    provider.config.server = "localhost".to_owned();
    let script = async {
        let mut peer = server.greet().await;
        peer.take_message().await;
    };
    let ((), outcome) = both(script, deliver(&provider, &small())).await;
    assert_delivered(&outcome);
    assert_eq!(*provider.last(), server.listener.local_addr().ok(), "the first of the next time");
}

#[tokio::test]
async fn a_refused_greeting_settles_every_recipient() {
    let server = Server::bind().await;
    let provider = server.provider();
    for (greeting, label) in [("554 5.3.2 no", "held"), ("421 4.3.2 busy", "deferred")] {
        let script = async {
            let mut peer = server.accept().await;
            peer.say(greeting).await;
            peer.rest().await
        };
        let (rest, outcome) = both(script, deliver(&provider, &small())).await;
        assert_eq!(rest, b"");
        assert_eq!(outcome.label(), label);
        assert_eq!(outcome.cause().unwrap().scope, Scope::Provider);
    }
}

#[tokio::test]
async fn a_connection_serves_so_many_messages() {
    let server = Server::bind().await;
    let provider = server.pooling(pool::Limits { transactions: 2, ..pool::Limits::DEFAULT });
    let script = async {
        let mut first = server.greet().await;
        first.take_message().await;
        first.take_message().await;
        first.expect(&["QUIT"]).await;
        let mut second = server.greet().await;
        second.take_message().await;
    };
    let ((), ()) = both(script, async {
        for _ in 0..3 {
            assert_delivered(&deliver(&provider, &small()).await);
        }
    })
    .await;
}

#[tokio::test]
async fn an_idle_connection_is_closed_when_its_time_is_over() {
    let server = Server::bind().await;
    let provider = server.pooling(pool::Limits { idle_time: SOON, ..pool::Limits::DEFAULT });
    // Twice: the sweeper comes back after it had nothing to do.
    for _ in 0..2 {
        let script = async {
            let mut peer = server.greet().await;
            peer.take_message().await;
            peer.expect(&["QUIT"]).await;
        };
        let ((), outcome) = both(script, deliver(&provider, &small())).await;
        assert_delivered(&outcome);
    }
}

#[tokio::test]
async fn the_last_used_connection_is_taken_first_and_no_more_are_kept_than_may_be() {
    let server = Server::bind().await;
    let provider = server.pooling(pool::Limits { idle: 1, ..pool::Limits::DEFAULT });
    let script = async {
        let mut first = server.greet().await;
        let mut second = server.greet().await;
        first.take_envelope().await;
        second.take_envelope().await;
        first.content().await;
        second.content().await;
        first.say("250 2.0.0 queued").await;
        second.say("250 2.0.0 queued").await;
        let (one, other) = tokio::select! {
            () = first.expect(&["QUIT"]) => (first, second),
            () = second.expect(&["QUIT"]) => (second, first),
        };
        drop(one);
        other
    };
    let (first, second) = (small(), small());
    let (mut kept, outcomes) = both(script, async {
        tokio::join!(deliver(&provider, &first), deliver(&provider, &second))
    })
    .await;
    assert_delivered(&outcomes.0);
    assert_delivered(&outcomes.1);
    let (_, outcome) = both(kept.take_message(), deliver(&provider, &small())).await;
    assert_delivered(&outcome);
}

#[tokio::test]
async fn one_more_than_is_kept_serves_what_follows_at_once() {
    let server = Server::bind().await;
    let limits = pool::Limits { idle: 0, surplus_time: SOON, ..pool::Limits::DEFAULT };
    let provider = server.pooling(limits);
    let script = async {
        let mut peer = server.greet().await;
        peer.take_message().await;
        peer.take_message().await;
        peer.expect(&["QUIT"]).await;
    };
    let (first, second) = (small(), small());
    let deliveries = async {
        let one = deliver(&provider, &first).await;
        (one, deliver(&provider, &second).await)
    };
    let ((), (one, other)) = both(script, deliveries).await;
    assert_delivered(&one);
    assert_delivered(&other);
}

#[tokio::test]
async fn a_dropped_provider_leaves_no_connection_behind() {
    let server = Server::bind().await;
    let provider = server.provider();
    let script = async {
        let mut peer = server.greet().await;
        peer.take_message().await;
        peer.expect(&["QUIT"]).await;
    };
    let ((), ()) = both(script, async move {
        assert_delivered(&deliver(&provider, &small()).await);
    })
    .await;
}

#[tokio::test]
async fn a_delivery_that_is_dropped_ends_its_connection() {
    let server = Server::bind().await;
    let provider = server.provider();
    let script = async {
        let mut peer = server.greet().await;
        peer.take_envelope().await;
        peer.content().await;
        peer
    };
    let submission = small();
    let outcomes = Outcomes::new();
    let peer = timeout(LONG, async {
        tokio::select! {
            peer = script => peer,
            () = provider.deliver(&submission, &outcomes) => panic!("it cannot end"),
        }
    });
    assert_eq!(peer.await.unwrap().rest().await, b"");
    let (_, outcome) = outcomes.take(&submission.part).remove(0);
    assert!(outcome.cause().unwrap().maybe_sent);
}

#[tokio::test]
async fn no_content_leaves_before_it_may() {
    let server = Server::bind().await;
    let provider = server.provider();
    let submission = small();
    let (outcomes, mut leaving) = Outcomes::watched();
    let script = async {
        let mut peer = server.greet().await;
        peer.take_envelope().await;
        peer
    };
    let (mut peer, may_leave) = timeout(LONG, async {
        let asked = async { tokio::join!(script, leaving.recv()) };
        tokio::select! {
            asked = asked => asked,
            () = provider.deliver(&submission, &outcomes) => panic!("it cannot end"),
        }
    })
    .await
    .unwrap();
    // The delivery is gone, and the question with it.
    assert!(may_leave.unwrap().is_closed());
    let mut rest = Vec::new();
    peer.stream.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"");
    let (_, outcome) = outcomes.take(&submission.part).remove(0);
    assert!(!outcome.cause().unwrap().maybe_sent, "nothing of it had left");
}

#[tokio::test]
async fn the_lanes_own_mailbox_is_known_by_the_author() {
    let server = Server::bind().await;
    let provider = server.provider();
    let mut other = small();
    other.message.author = Some(mailbox("else@x.example"));
    for (submission, scope) in [(small(), Scope::Sender), (other, Scope::Message)] {
        let script = async {
            let mut peer = server.greet().await;
            peer.take_envelope().await;
            peer.content().await;
            peer.say("550 5.7.60 not allowed to send as this sender").await;
            peer.expect(&["RSET"]).await;
            peer.say("421 bye").await;
        };
        let ((), outcome) = both(script, deliver(&provider, &submission)).await;
        assert_eq!((outcome.label(), outcome.cause().unwrap().scope), ("held", scope));
    }
}
