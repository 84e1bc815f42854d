//! An SMTP server that takes everything, in memory: a small loop over [`Session`].
//!
//! A recipient's local part asks for a fault: see [`FAULTS`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::clock;
use crate::sandbox::inbox::Inbox;
use crate::shutdown::Shutdown;
use crate::smtp::data::BareNewline;
use crate::smtp::reply::Reply;
use crate::smtp::session::{Session, Settings, Step};

/// What addresses ask for, as `--help` and README list it.
pub const FAULTS: [(&str, &str); 5] = [
    ("fail-550@", "refused for good with that code (any from 500 to 599)"),
    ("defer-451@", "refused for now with that code (any from 400 to 499)"),
    ("drop@", "the connection is dropped when the recipient is named"),
    ("lost-answer@", "the message is taken, and the connection dropped before the answer"),
    ("slow@", "the answer to the recipient takes a while"),
];

const READ: usize = 64 * 1024;

pub struct Upstream {
    pub inbox: Arc<Inbox>,
    /// How long `slow@` takes.
    pub slow: Duration,
    pub world: Shutdown,
}

/// What a recipient's address asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    Refuse(u16),
    Drop,
    LostAnswer,
    Slow,
}

impl Fault {
    fn of(address: &str) -> Self {
        let local = address.split(['@', '+']).next().unwrap_or_default();
        let code = |prefix: &str, class: u16| {
            let code: u16 = local.strip_prefix(prefix)?.parse().ok()?;
            (code / 100 == class).then_some(Self::Refuse(code))
        };
        match local {
            "drop" => Self::Drop,
            "lost-answer" => Self::LostAnswer,
            "slow" => Self::Slow,
            _ => code("fail-", 5).or_else(|| code("defer-", 4)).unwrap_or(Self::None),
        }
    }
}

impl Upstream {
    pub async fn listen(self, socket: TcpListener) {
        let server = Arc::new(self);
        // An accept that is dropped mid-way has taken no connection.
        while let Some(accepted) = server.world.token.run_until_cancelled(socket.accept()).await {
            let Ok((stream, _)) = accepted else { continue };
            let one = Arc::clone(&server);
            server.world.tasks.spawn(async move {
                // The end of a connection is part of the play.
                let served = one.world.token.run_until_cancelled(one.serve(stream)).await;
                drop(served);
            });
        }
    }

    async fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let settings = Settings {
            hostname: "upstream.mailsluice.test".to_owned(),
            max_size: 150_000_000,
            size_why: None,
            max_recipients: 1_000,
            bare_newline: BareNewline::Reject,
            errors: 100,
            command_timeout: Duration::from_secs(300),
            data_timeout: Duration::from_secs(300),
            min_data_rate: None,
        };
        let mut session = Session::new(Arc::new(settings), clock::now());
        let mut read = BytesMut::with_capacity(READ);
        let mut content = BytesMut::new();
        let mut lose_answer = false;
        loop {
            match session.next(clock::now()) {
                Step::Write(bytes) => stream.write_all(&bytes).await?,
                Step::NeedInput { until } => {
                    // A read that is not ready has taken nothing.
                    tokio::select! {
                        got = stream.read_buf(&mut read) => match got? {
                            0 => session.eof(),
                            _ => session.receive(&read, clock::now()),
                        },
                        () = tokio::time::sleep_until(until.into()) => {}
                    }
                    read.clear();
                }
                Step::Mail(_) => {
                    lose_answer = false;
                    session.accept();
                }
                Step::Rcpt(path) => {
                    let address = path.as_str().to_owned();
                    match Fault::of(&address) {
                        Fault::None => session.accept(),
                        Fault::Refuse(code) => {
                            let class = if code < 500 { 4 } else { 5 };
                            let reply = Reply::new(code, (class, 1, 1), "the address asked for it");
                            self.inbox.refuse(address, reply.to_string());
                            session.refuse(reply);
                        }
                        Fault::Drop => {
                            self.inbox.refuse(address, "connection dropped".to_owned());
                            return Ok(());
                        }
                        Fault::LostAnswer => {
                            lose_answer = true;
                            session.accept();
                        }
                        Fault::Slow => {
                            tokio::time::sleep(self.slow).await;
                            session.accept();
                        }
                    }
                }
                Step::Begin(_) => {
                    content.clear();
                    session.accept();
                }
                Step::Body(chunk) => content.extend_from_slice(chunk),
                Step::Commit => {
                    let Some(transaction) = session.transaction() else { return Ok(()) };
                    let from = transaction.reverse_path.as_str().to_owned();
                    let to = transaction
                        .rcpts
                        .iter()
                        .map(|rcpt| rcpt.path.as_str().to_owned())
                        .collect();
                    let content = std::mem::take(&mut content).freeze();
                    let number = self.inbox.put(clock::wall().0, from, to, content);
                    if lose_answer {
                        return Ok(());
                    }
                    session.stored(&number.to_string());
                }
                Step::Refused(_) => {}
                Step::Abort => content.clear(),
                Step::Close => return stream.shutdown().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_ask_for_their_faults() {
        for (address, fault) in [
            ("fail-550@x", Fault::Refuse(550)),
            ("fail-450@x", Fault::None),
            ("defer-451@x", Fault::Refuse(451)),
            ("defer-451+tag@x", Fault::Refuse(451)),
            ("drop@x", Fault::Drop),
            ("dropped@x", Fault::None),
            ("lost-answer@x", Fault::LostAnswer),
            ("slow@x", Fault::Slow),
            ("fail-@x", Fault::None),
        ] {
            assert_eq!(Fault::of(address), fault, "{address}");
        }
        for (address, _) in FAULTS {
            assert_ne!(Fault::of(address), Fault::None, "{address}");
        }
    }
}
