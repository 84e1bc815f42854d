//! STARTTLS, TLS and logins against a server with a certificate.

use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::*;

/// An authority of our own, and what its server shows.
struct World {
    dir: TempDir,
    acceptor: TlsAcceptor,
}

impl World {
    /// The certificate is good for `name`, in these years.
    fn new(name: &str, years: std::ops::Range<i32>) -> Self {
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.distinguished_name.push(DnType::CommonName, fastrand::u64(..).to_string());
        let ca_key = KeyPair::generate().unwrap();
        let root = ca.self_signed(&ca_key).unwrap();
        let issuer = Issuer::new(ca, ca_key);
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(years.start, 1, 1);
        params.not_after = rcgen::date_time_ymd(years.end, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        let dir = TempDir::new().unwrap();
        std::fs::write(dir.path().join("ca.pem"), root.pem()).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        Self { dir, acceptor: TlsAcceptor::from(Arc::new(config)) }
    }

    fn good() -> Self {
        Self::new("127.0.0.1", 2020..2090)
    }

    fn ca_file(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    fn provider(&self, server: &Server, security: Security) -> SmtpProvider {
        let password = config::Secret::for_tests("p w");
        let proof = config::Proof::Password(password);
        let login = Some(config::Login { username: "me@x.example".to_owned(), proof });
        let ca_file = Some(self.ca_file());
        let config = config::SmtpProvider { security, login, ca_file, ..server.config() };
        SmtpProvider::new(&config, "me.example".to_owned(), &metrics()).unwrap()
    }

    /// The rest of a connection whose first part was in clear, or none of it.
    async fn accept(&self, peer: Peer) -> Peer<impl AsyncRead + AsyncWrite + Unpin + use<>> {
        assert!(peer.stream.buffer().is_empty());
        let secured = self.acceptor.accept(peer.stream.into_inner()).await.unwrap();
        Peer { stream: BufReader::new(secured) }
    }
}

/// STARTTLS up to the 220.
async fn up_to_starttls(server: &Server) -> Peer {
    let mut peer = server.accept().await;
    peer.say("220 up").await;
    peer.expect(&["EHLO me.example"]).await;
    peer.say("250-up\r\n250 STARTTLS").await;
    peer.expect(&["STARTTLS"]).await;
    peer.say("220 go on").await;
    peer
}

/// Greets over a secured connection, takes the login, and two messages.
async fn serve<S: AsyncRead + AsyncWrite + Unpin>(peer: &mut Peer<S>) -> [Vec<u8>; 2] {
    peer.expect(&["EHLO me.example"]).await;
    peer.say("250-up\r\n250-PIPELINING\r\n250 AUTH PLAIN").await;
    peer.expect(&["AUTH PLAIN AG1lQHguZXhhbXBsZQBwIHc="]).await;
    peer.say("235 in").await;
    [peer.take_message().await, peer.take_message().await]
}

#[tokio::test]
async fn mail_goes_over_a_secured_connection_that_is_used_again() {
    for security in [Security::StartTls, Security::Tls] {
        let (world, server) = (World::good(), Server::bind().await);
        let provider = world.provider(&server, security);
        let large = vec![b'x'; 1_000_000];
        let large = submission(Body::Memory(Bytes::from(large)));
        let (wires, outcomes) = both(
            async {
                let mut peer = match security {
                    Security::StartTls => world.accept(up_to_starttls(&server).await).await,
                    _ => {
                        let mut peer = world.accept(server.accept().await).await;
                        peer.say("220 up").await;
                        peer
                    }
                };
                serve(&mut peer).await
            },
            async { [deliver(&provider, &small()).await, deliver(&provider, &large).await] },
        )
        .await;
        assert!(outcomes.iter().all(|outcome| outcome.label() == "delivered"), "{outcomes:?}");
        assert_eq!(wires[0], b"Received: here\r\nSubject: x\r\n\r\n..dot\r\n.\r\n");
        assert_eq!(wires[1].len(), "Received: here\r\n\r\n.\r\n".len() + 1_000_000);
    }
}

/// The one outcome where the handshake fails, and whether the server heard anything after it.
async fn fails(world: &World, server_config: impl FnOnce(&mut config::SmtpProvider)) -> String {
    let server = Server::bind().await;
    let mut config = config::SmtpProvider {
        security: Security::StartTls,
        ca_file: Some(world.ca_file()),
        ..server.config()
    };
    server_config(&mut config);
    let provider = SmtpProvider::new(&config, "me.example".to_owned(), &metrics()).unwrap();
    let (accepted, outcome) = both(
        async {
            let peer = up_to_starttls(&server).await;
            world.acceptor.accept(peer.stream.into_inner()).await.map(drop)
        },
        deliver(&provider, &small()),
    )
    .await;
    assert!(accepted.is_err(), "the client goes before anything is said");
    let Outcome::Deferred(cause) = outcome else { panic!("{outcome:?}") };
    assert_eq!(
        (cause.scope, cause.stage, cause.maybe_sent),
        (Scope::Provider, Stage::StartTls, false)
    );
    cause.words.to_string()
}

#[tokio::test]
async fn a_certificate_that_does_not_prove_the_server_gets_no_mail_and_the_cure_is_named() {
    let says = fails(&World::new("127.0.0.1", 2001..2002), |_| {}).await;
    assert!(says.starts_with("no secure connection: invalid peer certificate: "), "{says}");
    assert!(says.contains("expired") && says.ends_with("this system's clock is wrong"), "{says}");
    let says = fails(&World::new("127.0.0.1", 2080..2090), |_| {}).await;
    assert!(says.contains("not valid yet"), "{says}");
    let says = fails(&World::new("mail.x.example", 2020..2090), |_| {}).await;
    assert!(says.contains("mail.x.example"), "{says}");
    assert!(says.ends_with("write in provider.server a name that the certificate has"), "{says}");
    let other = World::good();
    let says = fails(&World::good(), |config| config.ca_file = Some(other.ca_file())).await;
    assert!(says.contains("UnknownIssuer") && says.contains("provider.ca_file"), "{says}");
}

#[tokio::test]
async fn a_name_is_proven_as_it_is_written_in_the_config() {
    let world = World::new("localhost", 2020..2090);
    let server = Server::bind().await;
    let config = config::SmtpProvider {
        server: "localhost".to_owned(),
        security: Security::Tls,
        ca_file: Some(world.ca_file()),
        ..server.config()
    };
    let provider = SmtpProvider::new(&config, "me.example".to_owned(), &metrics()).unwrap();
    let (_, outcome) = both(
        async {
            let mut peer = world.accept(server.accept().await).await;
            peer.say("220 up").await;
            peer.expect(&["EHLO me.example"]).await;
            peer.say("250-up\r\n250 PIPELINING").await;
            peer.take_message().await
        },
        deliver(&provider, &small()),
    )
    .await;
    assert_eq!(outcome.label(), "delivered");
}

#[tokio::test]
async fn a_server_without_tls_on_a_port_for_it_is_named() {
    let (world, server) = (World::good(), Server::bind().await);
    let provider = world.provider(&server, Security::Tls);
    let (_, outcome) = both(
        async {
            let mut peer = server.accept().await;
            peer.say("220 up, in clear").await;
            peer
        },
        deliver(&provider, &small()),
    )
    .await;
    let Outcome::Deferred(cause) = outcome else { panic!("{outcome:?}") };
    let says = cause.words.to_string();
    assert!(says.ends_with("is provider.security right for this port?"), "{says}");
}

#[tokio::test]
async fn a_reply_put_in_before_the_handshake_is_not_taken() {
    let (world, server) = (World::good(), Server::bind().await);
    let provider = world.provider(&server, Security::StartTls);
    let (rest, outcome) = both(
        async {
            let mut peer = server.accept().await;
            peer.say("220 up").await;
            peer.expect(&["EHLO me.example"]).await;
            peer.say("250-up\r\n250 STARTTLS").await;
            peer.expect(&["STARTTLS"]).await;
            peer.say("220 go on\r\n250 smuggled").await;
            peer.rest().await
        },
        deliver(&provider, &small()),
    )
    .await;
    assert!(rest.is_empty(), "{rest:?}");
    let says = "the server broke the protocol after STARTTLS: a reply came before it was asked for";
    assert_deferred(&outcome, Scope::Provider, Stage::StartTls, says);
}

#[tokio::test]
async fn a_handshake_without_end_has_a_deadline() {
    let (world, server) = (World::good(), Server::bind().await);
    let login = None;
    let config = config::SmtpProvider {
        security: Security::StartTls,
        login,
        ca_file: Some(world.ca_file()),
        connect_timeout: SOON,
        ..server.config()
    };
    let provider = SmtpProvider::new(&config, "me.example".to_owned(), &metrics()).unwrap();
    let (_, outcome) = both(
        async {
            let peer = up_to_starttls(&server).await;
            peer.rest().await
        },
        deliver(&provider, &small()),
    )
    .await;
    let says = "no secure connection: the handshake was not over within 0.06 s";
    assert_deferred(&outcome, Scope::Provider, Stage::StartTls, says);
}

#[tokio::test]
async fn a_kept_connection_on_which_the_server_spoke_is_not_used() {
    let (world, server) = (World::good(), Server::bind().await);
    let provider = world.provider(&server, Security::Tls);
    let (_, outcomes) = both(
        async {
            for n in 0..2 {
                let mut peer = world.accept(server.accept().await).await;
                peer.say("220 up").await;
                peer.expect(&["EHLO me.example"]).await;
                peer.say("250-up\r\n250-PIPELINING\r\n250 AUTH PLAIN").await;
                peer.expect(&["AUTH PLAIN AG1lQHguZXhhbXBsZQBwIHc="]).await;
                peer.say("235 in").await;
                peer.take_envelope().await;
                peer.content().await;
                // In one record, so that both are read at once.
                peer.say(["250 queued\r\n421 bye", "250 queued"][n]).await;
            }
        },
        async { [deliver(&provider, &small()).await, deliver(&provider, &small()).await] },
    )
    .await;
    assert!(outcomes.iter().all(|outcome| outcome.label() == "delivered"), "{outcomes:?}");
}

#[test]
fn a_ca_file_without_certificates_is_told_at_the_start() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("ca.pem");
    let refused =
        |path: &std::path::Path| Tls::new("x.example", Some(path)).err().unwrap().to_string();
    assert!(refused(&path).contains("ca.pem"), "{}", refused(&path));
    std::fs::write(&path, "no certificate").unwrap();
    assert!(refused(&path).contains("has no certificate in PEM"), "{}", refused(&path));
    std::fs::write(&path, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .unwrap();
    assert!(!refused(&path).is_empty());
}

/// Where a connection can go wrong, in its order.
const STAGES: [&str; 10] = [
    "greeting",
    "ehlo",
    "starttls",
    "handshake",
    "ehlo again",
    "auth",
    "mail",
    "rcpt",
    "data",
    "dot",
];

/// What is expected and said in clear, and after the handshake.
const IN_CLEAR: [(&str, &str, &str); 3] = [
    ("greeting", "", "220 up"),
    ("ehlo", "EHLO me.example", "250-up\r\n250-AUTH PLAIN\r\n250 STARTTLS"),
    ("starttls", "STARTTLS", "220 go on"),
];
const SECURED: [(&str, &str, &str); 5] = [
    ("ehlo again", "EHLO me.example", "250-up\r\n250 AUTH PLAIN"),
    ("auth", "AUTH PLAIN AG1lQHguZXhhbXBsZQBwIHc=", "235 in"),
    ("mail", "MAIL FROM:<a@x.example>", "250 ok"),
    ("rcpt", "RCPT TO:<r0@y.example>", "250 ok"),
    ("data", "DATA", "354 go on"),
];

#[derive(Clone, Copy, Debug)]
enum Fault {
    Drops,
    Says(&'static [u8]),
    /// Again and again.
    Endless(&'static [u8]),
    Silent,
}

/// What no client lets a server send it before it goes: what fits into the buffers of two sockets.
const BUFFERS: usize = 32 << 20;

impl Fault {
    async fn happen<S: AsyncRead + AsyncWrite + Unpin>(self, peer: &mut Peer<S>) {
        match self {
            Self::Drops => return,
            Self::Silent => {}
            Self::Says(bytes) => {
                peer.stream.write_all(bytes).await.unwrap();
                peer.stream.flush().await.unwrap();
                // Up to a RSET, or until the client goes.
                return drop(peer.stream.fill_buf().await);
            }
            Self::Endless(bytes) => {
                let (bytes, mut written) = (bytes.repeat(1_000), 0);
                while peer.stream.write_all(&bytes).await.is_ok() {
                    written += bytes.len();
                    assert!(written < BUFFERS, "it reads on");
                }
            }
        }
        // Until the client goes, however it does.
        let mut rest = Vec::new();
        drop(peer.stream.read_to_end(&mut rest).await);
    }
}

/// One connection, on which the fault happens at its stage. All that came in clear.
async fn serve_with(world: &World, server: &Server, stage: &str, fault: Fault) -> Vec<String> {
    let mut clear = Vec::new();
    let mut peer = server.accept().await;
    for (at, _, reply) in IN_CLEAR {
        if at != "greeting" {
            let mut line = String::new();
            peer.stream.read_line(&mut line).await.unwrap();
            clear.push(line);
        }
        if at == stage {
            fault.happen(&mut peer).await;
            return clear;
        }
        peer.say(reply).await;
    }
    if stage == "handshake" {
        fault.happen(&mut peer).await;
        return clear;
    }
    let mut peer = world.accept(peer).await;
    for (at, command, reply) in SECURED {
        peer.expect(&[command]).await;
        if at == stage {
            fault.happen(&mut peer).await;
            return clear;
        }
        peer.say(reply).await;
    }
    peer.content().await;
    match stage {
        "dot" => fault.happen(&mut peer).await,
        _ => peer.say("250 2.0.0 queued").await,
    }
    clear
}

/// The outcome in short, as the table of faults has it: before MAIL everyone waits, later this message.
fn expected(stage: &str, fault: &str) -> &'static str {
    let before_mail = STAGES.iter().position(|at| *at == stage) < Some(6);
    match (stage, fault) {
        ("handshake", _) => "deferred provider",
        (_, "5xx") if before_mail => "held provider",
        (_, _) if before_mail => "deferred provider",
        ("rcpt", "5xx") => "failed recipient",
        (_, "5xx") => "failed message",
        ("rcpt", "4xx") => "deferred recipient",
        ("dot", "421" | "4xx") => "deferred message",
        ("dot", _) => "deferred message maybe",
        (_, _) => "deferred message",
    }
}

#[tokio::test]
async fn every_fault_at_every_stage_of_a_secured_connection_has_its_outcome_and_heals() {
    let faults = [
        ("drop", Fault::Drops),
        ("silence", Fault::Silent),
        ("421", Fault::Says(b"421 4.3.2 closing\r\n")),
        ("4xx", Fault::Says(b"451-4.3.0 not\xff\n451 4.3.0 now\n")),
        ("5xx", Fault::Says(b"554 5.0.0 never \xe9\r\n")),
        ("wrong code", Fault::Says(b"221 fine\r\n")),
        ("garbage", Fault::Says(b"\x16\x03\0what?\r\n")),
        ("two codes", Fault::Says(b"250-one\r\n354 two\r\n")),
        ("endless line", Fault::Endless(b"250 xxxxxxxxxxxxxxxxxxxxxxxxx")),
        ("endless reply", Fault::Endless(b"250-more\r\n")),
    ];
    let (world, server) = (World::good(), Server::bind().await);
    let mut provider = world.provider(&server, Security::StartTls);
    let patient = provider.config.clone();
    for stage in STAGES {
        for (name, fault) in faults {
            let row = format!("{name} at {stage}");
            if let Fault::Silent = fault {
                let config = &mut provider.config;
                match stage {
                    "handshake" => config.connect_timeout = SOON,
                    "data" => config.data_timeout = SOON,
                    "dot" => config.final_timeout = SOON,
                    _ => config.command_timeout = 5 * SOON,
                }
            }
            let message = small();
            let (clear, outcome) =
                both(serve_with(&world, &server, stage, fault), deliver(&provider, &message)).await;
            let cause = outcome.cause().unwrap_or_else(|| panic!("{row}: {outcome:?}"));
            let maybe = if cause.maybe_sent { " maybe" } else { "" };
            let got = format!("{} {}{maybe}", outcome.label(), cause.scope.label());
            assert_eq!(got, expected(stage, name), "{row}: {cause}");
            assert!(!cause.words.to_string().contains("p w"), "{row}");
            let harmless = |line: &String| line == "EHLO me.example\r\n" || line == "STARTTLS\r\n";
            assert!(clear.iter().all(harmless), "{row}: {clear:?}");
            // It is over: the next delivery is on a new connection, and goes through.
            provider.config = patient.clone();
            let healed = serve_with(&world, &server, "", Fault::Drops);
            let (_, outcome) = both(healed, deliver(&provider, &small())).await;
            assert_delivered(&outcome);
        }
    }
}

#[tokio::test]
async fn an_end_without_close_notify_is_an_end() {
    let (world, server) = (World::good(), Server::bind().await);
    let provider = world.provider(&server, Security::StartTls);
    let served = serve_with(&world, &server, "mail", Fault::Drops);
    let (_, outcome) = both(served, deliver(&provider, &small())).await;
    let says = "the server closed the connection after MAIL";
    assert_deferred(&outcome, Scope::Message, Stage::Mail, says);
    let served = serve_with(&world, &server, "handshake", Fault::Drops);
    let (_, outcome) = both(served, deliver(&provider, &small())).await;
    let says = "no secure connection: the server closed the connection during the handshake";
    assert_deferred(&outcome, Scope::Provider, Stage::StartTls, says);
}

/// Wherever in a content it comes, also while the last of it cannot be handed over.
#[tokio::test]
async fn a_refusal_by_a_server_that_reads_no_more_is_heard() {
    let (world, server) = (World::good(), Server::bind().await);
    let mut provider = world.provider(&server, Security::StartTls);
    // It hears no RSET either.
    provider.config.command_timeout = LONG / 10;
    let content = Bytes::from(b"line\r\n".repeat(1_000_000));
    for size in [2_500_000, 6_000_000] {
        let submission = submission(Body::Memory(content.slice(..size)));
        let script = async {
            let mut peer = world.accept(up_to_starttls(&server).await).await;
            for (_, command, reply) in SECURED {
                peer.expect(&[command]).await;
                peer.say(reply).await;
            }
            peer.say("552 5.3.4 too large").await;
            peer
        };
        let (_peer, outcome) = both(script, deliver(&provider, &submission)).await;
        assert_eq!(outcome.label(), "failed", "{size}: {outcome:?}");
    }
}
