//! A scripted upstream: answers each command as the script says, and records what it saw.

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::{PATIENCE, eventually};

/// What the sink offers, where a test does not say.
pub const EXTENSIONS: &[&str] =
    &["PIPELINING", "8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES", "SIZE 100000000"];

/// What the script is asked.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// The command line without its end; `(greeting)` when a connection opens; `(receiving)` after 354, before any
    /// content is read, where the usual answer is none; `(content)` after the final dot.
    pub line: &'a str,
    /// The commands MAIL on all connections so far, this one included where it is one.
    pub mails: usize,
    /// The transaction so far.
    pub from: &'a str,
    pub to: &'a [String],
}

impl Ask<'_> {
    /// The command is this verb.
    pub fn is(&self, verb: &str) -> bool {
        self.line.get(..verb.len()).is_some_and(|start| start.eq_ignore_ascii_case(verb))
    }

    pub fn is_content(&self) -> bool {
        self.line == "(content)"
    }

    pub fn is_greeting(&self) -> bool {
        self.line == "(greeting)"
    }
}

/// What the script says.
#[derive(Clone, Debug)]
pub enum Answer {
    /// As an ordinary server would.
    Usual,
    /// These words and CRLF.
    Reply(String),
    /// These bytes, and on.
    Raw(Vec<u8>),
    /// These bytes, then the connection ends.
    RawThenDrop(Vec<u8>),
    /// These bytes, again and again, until the connection ends.
    Endless(Vec<u8>),
    /// Nothing, and the connection ends.
    Drop,
    /// Nothing, and the connection ends; but what the 250 would have been about is taken.
    TakeAndDrop,
    /// Nothing, until the sink goes.
    Hang,
}

impl Answer {
    pub fn reply(words: &str) -> Self {
        Self::Reply(words.to_owned())
    }
}

/// A message that the sink took.
#[derive(Clone, Debug)]
pub struct Taken {
    pub from: String,
    pub to: Vec<String>,
    /// Without dot-stuffing and final dot.
    pub content: Vec<u8>,
    /// The MAIL line and the RCPT lines as they came.
    pub mail_line: String,
    pub rcpt_lines: Vec<String>,
}

impl Taken {
    /// The content without the lines that the gateway put before it (Received, Message-ID, Date).
    #[track_caller]
    pub fn original(&self) -> &[u8] {
        let mut rest = self.content.as_slice();
        for name in ["Received: from ", "Message-ID: <", "Date: "] {
            // Only ours: those of the message itself come after, and a message that has them gets none of ours.
            if name != "Received: from " && !self.has_ours(name) {
                continue;
            }
            if let Some(after) = rest.strip_prefix(name.as_bytes()) {
                let mut end = 0;
                loop {
                    end +=
                        after[end..].windows(2).position(|w| w == b"\r\n").expect("the line ends")
                            + 2;
                    if !matches!(after.get(end), Some(b' ' | b'\t')) || name != "Received: from " {
                        break;
                    }
                }
                rest = &after[end..];
            }
        }
        rest
    }

    /// Whether the line of that name right after Received is the gateway's: the id in it is that of Received.
    fn has_ours(&self, name: &str) -> bool {
        let text = String::from_utf8_lossy(&self.content);
        let id = text
            .split(" id ")
            .nth(1)
            .and_then(|rest| rest.split(';').next())
            .unwrap_or_default()
            .to_owned();
        let date = text
            .split(";\r\n\t")
            .nth(1)
            .and_then(|rest| rest.split("\r\n").next())
            .unwrap_or_default();
        match name {
            "Message-ID: <" => text.contains(&format!("\r\nMessage-ID: <{id}@")),
            _ => text.contains(&format!("\r\nDate: {date}\r\n")),
        }
    }

    /// The id that the gateway's Received line names.
    #[track_caller]
    pub fn id(&self) -> String {
        let text = self.text();
        let id = text.split_once(" id ").and_then(|(_, rest)| rest.split_once(';'));
        id.unwrap_or_else(|| panic!("no id in {text}")).0.to_owned()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.content).into_owned()
    }
}

type Script = dyn Fn(&Ask<'_>) -> Answer + Send + Sync;

/// The sink; it ends when it goes.
pub struct Sink {
    pub address: SocketAddr,
    state: Arc<State>,
}

struct State {
    script: Box<Script>,
    extensions: Vec<String>,
    taken: Mutex<Vec<Taken>>,
    /// Every command line, in the order it came.
    lines: Mutex<Vec<String>>,
    more: Condvar,
    /// When each connection was opened.
    opened: Mutex<Vec<Instant>>,
    /// Connections that have not ended.
    serving: AtomicUsize,
    mails: AtomicUsize,
    ended: AtomicBool,
}

impl Sink {
    /// Takes everything.
    pub fn new() -> Self {
        Self::scripted(|_| Answer::Usual)
    }

    pub fn scripted(script: impl Fn(&Ask<'_>) -> Answer + Send + Sync + 'static) -> Self {
        Self::with(EXTENSIONS, script)
    }

    /// With these lines in the answer to EHLO.
    pub fn with(
        extensions: &[&str],
        script: impl Fn(&Ask<'_>) -> Answer + Send + Sync + 'static,
    ) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").unwrap(), extensions, script)
    }

    /// On a socket that listens already.
    pub fn on(
        listener: TcpListener,
        extensions: &[&str],
        script: impl Fn(&Ask<'_>) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            script: Box::new(script),
            extensions: extensions.iter().map(|line| (*line).to_owned()).collect(),
            taken: Mutex::default(),
            lines: Mutex::default(),
            more: Condvar::new(),
            opened: Mutex::default(),
            serving: AtomicUsize::new(0),
            mails: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if accepting.ended.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let state = Arc::clone(&accepting);
                state.serving.fetch_add(1, Ordering::SeqCst);
                std::thread::spawn(move || {
                    // The end of a connection is part of the play.
                    drop(state.serve(&stream));
                    state.serving.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { address, state }
    }

    pub fn taken(&self) -> Vec<Taken> {
        self.state.taken.lock().unwrap().clone()
    }

    /// How many messages were taken.
    pub fn count(&self) -> usize {
        self.state.taken.lock().unwrap().len()
    }

    /// Waits until no connection is open: nothing more is taken from who has gone.
    #[track_caller]
    pub fn wait_idle(&self) {
        eventually("the sink's connections to end", || {
            (self.state.serving.load(Ordering::SeqCst) == 0).then_some(())
        });
    }

    pub fn lines(&self) -> Vec<String> {
        self.state.lines.lock().unwrap().clone()
    }

    pub fn connections(&self) -> usize {
        self.opened().len()
    }

    /// When each connection was opened.
    pub fn opened(&self) -> Vec<Instant> {
        self.state.opened.lock().unwrap().clone()
    }

    /// Waits until a message with that id was taken.
    #[track_caller]
    pub fn wait_id(&self, id: &str) -> Taken {
        let began = Instant::now();
        let mut taken = self.state.taken.lock().unwrap();
        loop {
            if let Some(it) = taken.iter().find(|it| it.id() == id) {
                return it.clone();
            }
            assert!(began.elapsed() < PATIENCE, "{id} did not come within {PATIENCE:?}");
            taken = self.state.more.wait_timeout(taken, Duration::from_millis(100)).unwrap().0;
        }
    }

    /// Waits until at least `n` messages were taken, and returns all.
    #[track_caller]
    pub fn wait(&self, n: usize) -> Vec<Taken> {
        let began = Instant::now();
        let mut taken = self.state.taken.lock().unwrap();
        while taken.len() < n {
            assert!(
                began.elapsed() < PATIENCE,
                "{n} messages expected within {PATIENCE:?}, {} came",
                taken.len()
            );
            taken = self.state.more.wait_timeout(taken, Duration::from_millis(100)).unwrap().0;
        }
        taken.clone()
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::SeqCst);
        // Wakes the accepting thread.
        drop(TcpStream::connect(self.address));
    }
}

impl State {
    fn serve(&self, stream: &TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        self.opened.lock().unwrap().push(Instant::now());
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut taken = None;
        if !self.answer(stream, "(greeting)", &mut taken)? {
            return Ok(());
        }
        loop {
            let mut line = Vec::new();
            if reader.read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            let line = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
            self.lines.lock().unwrap().push(line.clone());
            let go_on = self.answer(stream, &line, &mut taken)?;
            if !go_on {
                return Ok(());
            }
            let in_data = taken.as_ref().is_some_and(|taken: &Open| taken.data);
            if in_data {
                if !self.answer(stream, "(receiving)", &mut taken)? {
                    return Ok(());
                }
                let mut content = Vec::new();
                loop {
                    let before = content.len();
                    if reader.read_until(b'\n', &mut content)? == 0 {
                        return Ok(());
                    }
                    if &content[before..] == b".\r\n"
                        && (before == 0 || content[..before].ends_with(b"\r\n"))
                    {
                        content.truncate(before);
                        break;
                    }
                    if content[before..].starts_with(b".")
                        && (before == 0 || content[..before].ends_with(b"\r\n"))
                    {
                        content.remove(before);
                    }
                }
                if let Some(open) = &mut taken {
                    open.taken.content = content;
                }
                if !self.answer(stream, "(content)", &mut taken)? {
                    return Ok(());
                }
                taken = None;
            }
            if line.eq_ignore_ascii_case("QUIT") {
                return Ok(());
            }
        }
    }

    /// Answers one command; false where the connection is to end.
    fn answer(
        &self,
        mut stream: &TcpStream,
        line: &str,
        open: &mut Option<Open>,
    ) -> std::io::Result<bool> {
        let verb = line.split([' ', ':']).next().unwrap_or_default().to_ascii_uppercase();
        let path = || {
            let inner = line
                .split_once('<')
                .and_then(|(_, rest)| rest.rsplit_once('>'))
                .map(|(inner, _)| inner);
            inner.unwrap_or_default().to_owned()
        };
        if verb == "MAIL" {
            self.mails.fetch_add(1, Ordering::SeqCst);
        }
        let ask = Ask {
            line,
            mails: self.mails.load(Ordering::SeqCst),
            from: open.as_ref().map_or("", |open| &open.taken.from),
            to: open.as_ref().map_or(&[], |open| &open.taken.to),
        };
        let usual = match verb.as_str() {
            "(GREETING)" => "220 sink.test ESMTP".to_owned(),
            "EHLO" => {
                let mut lines = vec!["sink.test".to_owned()];
                lines.extend(self.extensions.iter().cloned());
                let last = lines.len() - 1;
                let lines = lines
                    .iter()
                    .enumerate()
                    .map(|(at, it)| format!("250{}{it}", if at == last { ' ' } else { '-' }));
                lines.collect::<Vec<_>>().join("\r\n")
            }
            "HELO" => "250 sink.test".to_owned(),
            "DATA" if open.as_ref().is_none_or(|open| open.taken.to.is_empty()) => {
                "554 5.5.1 no valid recipients".to_owned()
            }
            "DATA" => "354 go on".to_owned(),
            "(CONTENT)" => "250 2.0.0 taken".to_owned(),
            "QUIT" => "221 2.0.0 bye".to_owned(),
            "RCPT" if open.is_none() => "503 5.5.1 MAIL first".to_owned(),
            _ => "250 2.1.0 ok".to_owned(),
        };
        let answer = (self.script)(&ask);
        let took = matches!(answer, Answer::TakeAndDrop);
        let (bytes, go_on) = match answer {
            Answer::Usual if verb == "(RECEIVING)" => return Ok(true),
            Answer::Usual => (format!("{usual}\r\n").into_bytes(), true),
            Answer::Reply(words) => (format!("{words}\r\n").into_bytes(), true),
            Answer::Raw(bytes) => (bytes, true),
            Answer::RawThenDrop(bytes) => (bytes, false),
            Answer::Endless(bytes) => loop {
                stream.write_all(&bytes)?;
            },
            Answer::Drop | Answer::TakeAndDrop => (Vec::new(), false),
            Answer::Hang => {
                while !self.ended.load(Ordering::SeqCst) {
                    std::thread::park_timeout(Duration::from_millis(50));
                }
                return Ok(false);
            }
        };
        // Of the answers to the final dot, only one says that the message was taken.
        let positive = match verb.as_str() {
            "(CONTENT)" => took || bytes.starts_with(b"250"),
            _ => bytes.first().is_some_and(|digit| matches!(digit, b'2' | b'3')),
        };
        match verb.as_str() {
            "MAIL" if positive => *open = Some(Open::new(path(), line)),
            "RCPT" if positive => {
                if let Some(open) = open {
                    open.taken.to.push(path());
                    open.taken.rcpt_lines.push(line.to_owned());
                }
            }
            "DATA" => {
                if let Some(open) = open {
                    open.data = bytes.starts_with(b"354");
                }
            }
            "(CONTENT)" => {
                if let Some(open) = open.as_ref().filter(|_| positive) {
                    self.taken.lock().unwrap().push(open.taken.clone());
                    self.more.notify_all();
                }
            }
            "RSET" | "EHLO" | "HELO" => *open = None,
            _ => {}
        }
        stream.write_all(&bytes)?;
        if !go_on {
            stream.shutdown(Shutdown::Both)?;
        }
        Ok(go_on)
    }
}

struct Open {
    taken: Taken,
    data: bool,
}

impl Open {
    fn new(from: String, line: &str) -> Self {
        let taken = Taken {
            from,
            to: Vec::new(),
            content: Vec::new(),
            mail_line: line.to_owned(),
            rcpt_lines: Vec::new(),
        };
        Self { taken, data: false }
    }
}
