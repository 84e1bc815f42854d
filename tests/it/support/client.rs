//! An SMTP client that says exactly what it is told.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use super::PATIENCE;

pub struct Client {
    pub stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Client {
    /// Connects and reads the greeting.
    #[track_caller]
    pub fn connect(address: SocketAddr) -> Self {
        let mut client = Self::silent(address);
        client.expect(220);
        client
    }

    /// Connects and reads nothing.
    #[track_caller]
    pub fn silent(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        Self { stream, reader }
    }

    /// Connects, reads the greeting, and says EHLO.
    #[track_caller]
    pub fn hello(address: SocketAddr) -> Self {
        let mut client = Self::connect(address);
        client.command("EHLO client.test", 250);
        client
    }

    /// Writes the bytes as they are.
    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// Reads one line, without its CRLF; none at the end of the connection.
    pub fn line(&mut self) -> Option<String> {
        let mut line = Vec::new();
        let n = self.reader.read_until(b'\n', &mut line).unwrap_or(0);
        let line = line.strip_suffix(b"\r\n").unwrap_or(&line);
        (n > 0).then(|| String::from_utf8_lossy(line).into_owned())
    }

    /// Reads one reply, with all its lines; none at the end of the connection.
    pub fn reply(&mut self) -> Option<String> {
        let mut reply = String::new();
        loop {
            let line = self.line()?;
            reply.push_str(&line);
            reply.push_str("\r\n");
            if line.as_bytes().get(3) != Some(&b'-') {
                return Some(reply);
            }
        }
    }

    /// Reads one reply and expects its code.
    #[track_caller]
    pub fn expect(&mut self, code: u16) -> String {
        let reply =
            self.reply().unwrap_or_else(|| panic!("{code} expected, and the connection ended"));
        assert!(reply.starts_with(&code.to_string()), "{code} expected, got {reply}");
        reply
    }

    /// Sends a line and expects the code of its reply.
    #[track_caller]
    pub fn command(&mut self, line: &str, code: u16) -> String {
        self.send(format!("{line}\r\n"));
        let reply = self
            .reply()
            .unwrap_or_else(|| panic!("{line}: {code} expected, and the connection ended"));
        assert!(reply.starts_with(&code.to_string()), "{line}: {code} expected, got {reply}");
        reply
    }

    /// One whole transaction by DATA; `content` is dot-stuffed and ended here. The id that the 250 names.
    #[track_caller]
    pub fn mail(&mut self, from: &str, to: &[&str], content: impl AsRef<[u8]>) -> String {
        self.command(&format!("MAIL FROM:<{from}>"), 250);
        for to in to {
            self.command(&format!("RCPT TO:<{to}>"), 250);
        }
        self.command("DATA", 354);
        self.send(stuffed(content.as_ref()));
        id(&self.expect(250))
    }

    /// Expects the connection to end; what still came.
    #[track_caller]
    pub fn expect_end(&mut self) -> String {
        let mut rest = Vec::new();
        // A reset is an end too.
        if let Err(error) = self.reader.read_to_end(&mut rest) {
            assert_eq!(
                error.kind(),
                std::io::ErrorKind::ConnectionReset,
                "the connection did not end: {error}"
            );
        }
        String::from_utf8_lossy(&rest).into_owned()
    }

    /// Ends our side.
    pub fn finish(&mut self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }
}

/// The id in `250 2.0.0 Ok: queued as ID`.
#[track_caller]
pub fn id(reply: &str) -> String {
    let (_, id) =
        reply.trim_end().rsplit_once("queued as ").unwrap_or_else(|| panic!("no id in {reply}"));
    id.to_owned()
}

/// Content as DATA carries it: dots doubled at line starts, the last line ended, the final dot.
pub fn stuffed(content: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(content.len() + 64);
    for line in content.split_inclusive(|byte| *byte == b'\n') {
        if line.starts_with(b".") {
            out.push(b'.');
        }
        out.extend_from_slice(line);
    }
    if !out.is_empty() && !out.ends_with(b"\r\n") {
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b".\r\n");
    out
}
