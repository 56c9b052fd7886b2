//! Over a real socket: clients that go away, and a server that goes away.
//!
//! The clients block, so the server has threads of its own.

use super::app::{App, COMPLETIONS, Options, PATIENCE};
use super::held::Then;
use crate::tiny::X;
use lonas::engine::EngineOptions;
use lonas::server::{Drained, serve};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A server on a socket of its own.
pub(super) struct Served {
    pub(super) app: App,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    pub(super) serving: JoinHandle<std::io::Result<Drained>>,
}

impl Served {
    pub(super) async fn start(options: Options, drain: Duration) -> Self {
        let app = App::with(options);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async move { drop(stopped.await) };
        let serving = tokio::spawn(serve(listener, app.state.clone(), shutdown, drain));
        Self { app, address, stop: Some(stop), serving }
    }

    async fn plain() -> Self {
        Self::start(Options::default(), Duration::from_secs(30)).await
    }

    /// Opens a connection and sends a request, whose answer is left to the caller.
    pub(super) fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n\r\n"
        );
        stream.write_all((head + body).as_bytes()).unwrap();
        stream
    }

    fn ask(&self, body: &Value) -> TcpStream {
        self.send("POST", COMPLETIONS, &body.to_string())
    }

    /// Status and whole answer of a request.
    pub(super) fn whole(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        read(&mut self.send(method, path, body))
    }

    pub(super) fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }
}

/// Status and everything up to the end of the connection.
pub(super) fn read(stream: &mut TcpStream) -> (u16, String) {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    let all = String::from_utf8(all).unwrap();
    let status = all.strip_prefix("HTTP/1.1 ").unwrap()[..3].parse().unwrap();
    (status, all)
}

/// Reads until this has come.
fn read_until(stream: &mut TcpStream, text: &str) {
    let (mut all, mut piece) = (Vec::new(), [0; 256]);
    // Comments that keep a stream alive would let single reads succeed for ever.
    let deadline = Instant::now() + PATIENCE;
    while !String::from_utf8_lossy(&all).contains(text) {
        let length = stream.read(&mut piece).unwrap();
        let late = Instant::now() > deadline;
        assert!(length > 0 && !late, "no {text} in {}", String::from_utf8_lossy(&all));
        all.extend(&piece[..length]);
    }
}

fn long(more: &Value) -> Value {
    let mut body = json!({"prompt": "one", "max_tokens": 100, "logit_bias": {(X.to_string()): 100}});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_in_the_middle_of_a_stream_frees_everything() {
    let served = Served::plain().await;
    served.app.gate.after(0, Then::Wait);
    let mut client = served.ask(&long(&json!({"stream": true, "n": 3})));
    served.app.until("all three are in", |s| s.accepted() == 1.0).await;
    served.app.gate.after(4, Then::Wait);
    read_until(&mut client, "data: ");
    served.app.until("three sequences hold blocks", |s| s.load().0 == 3.0 && s.load().2 > 0.0).await;
    drop(client);
    served.app.until("the request is over", |s| s.ended("cancelled") == 1.0).await;
    served.app.gate.open();
    served.app.until_idle().await;
    let generated = served.app.scrape().await.sum("lonas_generated_tokens_total", &[]);
    assert!(generated < 50.0, "{generated} tokens for a client that had gone");
    assert_eq!(served.app.complete(long(&json!({}))).await["usage"]["completion_tokens"], 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_before_its_plain_answer_frees_everything() {
    let served = Served::plain().await;
    served.app.gate.after(5, Then::Wait);
    let client = served.ask(&long(&json!({})));
    served.app.until("it runs", |s| s.load().0 == 1.0).await;
    drop(client);
    served.app.until("the request is over", |s| s.ended("cancelled") == 1.0).await;
    served.app.gate.open();
    served.app.until_idle().await;
    assert!(
        served.app.scrape().await.sum("lonas_step_subnetworks_count", &[]) < 20.0,
        "it was not computed to its end"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_has_sent_more_than_is_read_can_go_as_well() {
    let served = Served::plain().await;
    served.app.gate.after(5, Then::Wait);
    for more in ["\r\n", "GET /health HTTP/1.1\r\nhost: test\r\n\r\n"] {
        let before = served.app.scrape().await.ended("cancelled");
        let mut client = served.ask(&long(&json!({})));
        client.write_all(more.as_bytes()).unwrap();
        served.app.until("it runs", |s| s.load().0 == 1.0).await;
        drop(client);
        served.app.until("the request is over", |s| s.ended("cancelled") == before + 1.0).await;
    }
    served.app.gate.open();
    served.app.until_idle().await;
    let scrape = served.app.scrape().await;
    assert_eq!(scrape.sum("lonas_http_requests_total", &[("status", "499")]), 2.0, "counted as HTTP too");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_is_too_large_is_answered_and_not_just_cut_off() {
    let served = Served::plain().await;
    for megabytes in [3, 8, 40] {
        let body = json!({"prompt": "x".repeat(megabytes << 20)}).to_string();
        let (status, answer) = served.whole("POST", COMPLETIONS, &body);
        assert!(status == 413 && answer.contains("request_too_large"), "{megabytes} MB: {answer}");
    }
    let mut announced = TcpStream::connect(served.address).unwrap();
    announced.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n");
    announced.write_all(format!("{head}content-length: 99999999\r\n\r\n{{").as_bytes()).unwrap();
    read_until(&mut announced, "413");
    let mut asking = TcpStream::connect(served.address).unwrap();
    asking.set_read_timeout(Some(PATIENCE)).unwrap();
    let expects = format!("{head}expect: 100-continue\r\ncontent-length: 3000000\r\n\r\n");
    asking.write_all(expects.as_bytes()).unwrap();
    read_until(&mut asking, "413");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_while_it_waits_is_never_computed() {
    let engine = EngineOptions { max_running: 1, max_waiting: 4, step_tokens: 64, prefix_cache: true };
    let served = Served::start(Options { engine, ..Options::default() }, Duration::from_secs(30)).await;
    served.app.gate.after(0, Then::Wait);
    let mut first = served.ask(&long(&json!({"max_tokens": 3})));
    served.app.until("one is in", |s| s.accepted() == 1.0).await;
    let second = served.ask(&long(&json!({"model": "tiny-tied:minimal"})));
    served.app.until("two are in", |s| s.accepted() == 2.0).await;
    drop(second);
    served.app.until("the second has gone", |s| s.ended("cancelled") == 1.0).await;
    served.app.gate.open();
    let (status, answer) = read(&mut first);
    assert!(status == 200 && answer.contains("\"completion_tokens\":3"), "{answer}");
    served.app.until_idle().await;
    assert_eq!(served.app.scrape().await.sum("lonas_queue_seconds_count", &[]), 1.0, "only the first began");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_finishes_what_runs_and_turns_away_what_comes() {
    let mut served = Served::plain().await;
    served.app.gate.after(3, Then::Wait);
    let mut streamed = served.ask(&long(&json!({"stream": true})));
    read_until(&mut streamed, "data: ");
    let mut plain = served.ask(&long(&json!({})));
    served.app.until("both are in", |s| s.accepted() == 2.0).await;
    assert_eq!(served.whole("GET", "/health", "").0, 200);

    served.stop();
    served.app.until_health(503).await;
    let (status, health) = served.whole("GET", "/health", "");
    assert!(status == 503 && health.contains("{\"status\":\"draining\"}"), "{health}");
    let (status, refused) = served.whole("POST", COMPLETIONS, "{\"prompt\": \"one\"}");
    assert_eq!(status, 503);
    assert!(refused.contains("retry-after: 1") && refused.contains("shutting_down"), "{refused}");
    assert!(!served.serving.is_finished(), "it waits for the two");

    served.app.gate.open();
    let mut rest = String::new();
    streamed.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"), "{rest}");
    let (status, answer) = read(&mut plain);
    assert!(status == 200 && answer.contains("\"completion_tokens\":100"), "{answer}");
    assert_eq!(served.serving.await.unwrap().unwrap(), Drained::All);
    assert!(TcpStream::connect(served.address).is_err(), "nobody listens any more");
    let scrape = served.app.scrape().await;
    assert_eq!(scrape.sum("lonas_rejected_total", &[("reason", "drain")]), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_end_in_time_is_told_so_within_its_stream() {
    let mut served = Served::start(Options::default(), Duration::from_millis(50)).await;
    served.app.gate.after(3, Then::Wait);
    let mut streamed = served.ask(&long(&json!({"stream": true})));
    read_until(&mut streamed, "data: ");
    let mut plain = served.ask(&long(&json!({})));
    served.app.until("both are in", |s| s.accepted() == 2.0).await;
    served.stop();
    let mut rest = String::new();
    streamed.read_to_string(&mut rest).unwrap();
    let (_, end) = rest.split_once("shutting_down").unwrap();
    assert!(end.contains("data: [DONE]"), "{rest}");
    assert_eq!(read(&mut plain).0, 503);
    assert_eq!(served.serving.await.unwrap().unwrap(), Drained::TimedOut);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_dawdles_over_its_head_is_cut_off_and_others_are_not() {
    let options = Options { head_timeout: Duration::from_millis(200), ..Options::default() };
    let served = Served::start(options, Duration::from_secs(30)).await;
    let mut dawdling = TcpStream::connect(served.address).unwrap();
    dawdling.set_read_timeout(Some(PATIENCE)).unwrap();
    dawdling.write_all(b"GET /health HTTP/1.1\r\nhost: te").unwrap();
    // The end of the connection, not the client's own patience, ends this.
    let mut answer = Vec::new();
    dawdling.read_to_end(&mut answer).unwrap();
    assert!(!String::from_utf8_lossy(&answer).contains(" 200 "));
    assert_eq!(served.whole("GET", "/health", "").0, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_its_answers_unread_is_cut_off() {
    const REQUESTS: usize = 2000;
    let options = Options { stall_timeout: Duration::from_millis(200), ..Options::default() };
    let served = Served::start(options, Duration::from_secs(30)).await;
    // More than the system's buffers hold: about 30 kB of metrics for each.
    let mut client = TcpStream::connect(served.address).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all("GET /metrics HTTP/1.1\r\nhost: test\r\n\r\n".repeat(REQUESTS).as_bytes()).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let mut answers = Vec::new();
    // A reset is as good an end as any; what counts is that most answers were never sent.
    let _ = client.read_to_end(&mut answers);
    let sent = String::from_utf8_lossy(&answers).matches("HTTP/1.1 200").count();
    assert!((1..REQUESTS / 2).contains(&sent), "{sent} answers");
    assert_eq!(served.whole("GET", "/health", "").0, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_server_stops_at_once() {
    let mut served = Served::plain().await;
    // A connection that is kept alive and says nothing must not hold the server up.
    let idle = TcpStream::connect(served.address).unwrap();
    served.whole("GET", "/health", "");
    served.stop();
    let stopped = tokio::time::timeout(Duration::from_secs(3), served.serving).await;
    assert_eq!(stopped.unwrap().unwrap().unwrap(), Drained::All);
    drop(idle);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_engine_is_not_healthy() {
    let app = App::new();
    assert_eq!(app.get("/health").await.status, 200);
    app.gate.after(0, Then::Nothing);
    app.post(COMPLETIONS, &json!({"prompt": "one"})).await.expect(500);
    // The answer may be here before the thread has ended.
    let health = app.until_health(503).await;
    assert_eq!(health.json(), json!({"status": "stopped"}));
    app.post(COMPLETIONS, &json!({"prompt": "one"})).await.expect(503);
}
