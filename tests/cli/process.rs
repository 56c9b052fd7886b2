//! Running the built program.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

/// Longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(30);

/// The program with these arguments, without settings from the environment.
pub(crate) fn lonas(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lonas"));
    let settings = std::env::vars_os().map(|(name, _)| name);
    for name in settings.filter(|name| name.to_string_lossy().starts_with("LONAS_")) {
        command.env_remove(name);
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

/// A running `lonas serve`; killed when this is dropped.
pub(crate) struct Server {
    process: Child,
    log: Receiver<String>,
    pub(crate) address: SocketAddr,
}

impl Server {
    /// Starts it on a free port and waits until it listens.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let all = [&["serve", "--port", "0", "--threads", "1"], arguments].concat();
        let mut process = lonas(&all).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = lines(process.stderr.take().unwrap());
        let mut said = Vec::new();
        let address = loop {
            let Ok(line) = log.recv_timeout(PATIENCE) else {
                let _ = process.kill();
                panic!("it does not listen; it said\n{}", said.join("\n"));
            };
            if let Some((_, address)) = line.split_once("listening on http://") {
                break address.trim().parse().unwrap();
            }
            said.push(line);
        };
        Self { process, log, address }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Head and body of an answer.
    pub(crate) fn get(&self, path: &str) -> (String, String) {
        self.ask(&format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"))
    }

    /// As [`Self::get`], with a body of JSON.
    pub(crate) fn post(&self, path: &str, body: &serde_json::Value) -> (String, String) {
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-type: application/json"
        );
        self.ask(&format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()))
    }

    /// As [`Self::post`], by any method and with a key.
    pub(crate) fn send(
        &self,
        method: &str,
        path: &str,
        key: &str,
        body: &serde_json::Value,
    ) -> (String, String) {
        let body = body.to_string();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\nauthorization: Bearer {key}\r\n\
             content-type: application/json"
        );
        self.ask(&format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()))
    }

    fn ask(&self, request: &str) -> (String, String) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut all = String::new();
        stream.read_to_string(&mut all).unwrap();
        let (head, body) = all.split_once("\r\n\r\n").unwrap();
        assert!(!head.to_lowercase().contains("transfer-encoding"), "the body is not in chunks");
        (head.into(), body.into())
    }

    /// Sends a signal, e.g. `TERM`, and waits for the end: how it ended, and what it logged after it listened.
    pub(crate) fn end_by(mut self, signal: &str) -> (ExitStatus, String) {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &id]).status().unwrap().success());
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return (status, self.log.iter().collect::<Vec<_>>().join("\n"));
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The lines of a stream, read by a thread of their own so that a full pipe never holds the writer up.
fn lines(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = sync_channel(100_000);
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
