//! A server for tokens: gives the same answer to every question, and keeps the questions.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

pub struct Authority {
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Authority {
    /// Answers with this status and JSON. Its thread ends with the tests.
    pub fn with(status: u16, json: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (keep, json) = (Arc::clone(&asked), json.to_owned());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // One that breaks off is of no interest.
                drop(stream.and_then(|stream| answer(&stream, status, &json, &keep)));
            }
        });
        Self { address, asked }
    }

    /// One that grants this token.
    pub fn granting(token: &str) -> Self {
        Self::with(
            200,
            &format!(r#"{{"token_type":"Bearer","expires_in":3599,"access_token":"{token}"}}"#),
        )
    }

    /// The bodies that came.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn answer(
    stream: &TcpStream,
    status: u16,
    json: &str,
    keep: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim_end().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    keep.lock().unwrap().push(String::from_utf8_lossy(&body).into_owned());
    let (mut writer, length) = (stream, json.len());
    write!(
        writer,
        "HTTP/1.1 {status} x\r\nContent-Type: application/json; charset=utf-8\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n{json}"
    )
}
