//! The whole server in this process, without a socket: two tiny super-adapters on one base.

use super::held::{Gate, Held, HeldClassifier};
use super::scrape::Scrape;
use crate::golden::Supernet;
use crate::tiny::{CONTEXT, EOS, NAME, OTHER, Tiny, VOCABULARY};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, header};
use lonas::artifact::{Base, TokenizerSource};
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::engine::{ClassifierEngine, Engine, EngineOptions};
use lonas::model::Orders;
use lonas::model::llama::{self, LlamaExecutor};
use lonas::server::{
    Classes, Generation, Limits, Metrics, OutputKind, RunInfo, ServedModel, ServedModels, ServerParts,
    ServerState, SuperAdapter, Task, app as router,
};
use lonas::text::{ChatError, ChatTemplate, Tokenizer};
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tower::ServiceExt;

pub(crate) const COMPLETIONS: &str = "/v1/completions";
pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const CLASSIFY: &str = "/v1/classify";

/// Longer than any test needs; what is waited for comes within milliseconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct App {
    pub(crate) state: Arc<ServerState>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// What the engine's steps go through.
    pub(crate) gate: Arc<Gate>,
    pub(crate) tiny: Tiny,
}

/// What a test may want to be otherwise.
pub(crate) struct Options {
    pub(crate) engine: EngineOptions,
    pub(crate) api_keys: Vec<String>,
    pub(crate) admin_keys: Vec<String>,
    pub(crate) max_sub_networks: usize,
    pub(crate) chat: bool,
    /// The super-adapters classify, by a stand-in: the first has three labels, the second one number.
    pub(crate) classify: bool,
    /// Changes the served super-adapters, e.g. gives their sub-networks scores.
    pub(crate) models: fn(&mut [ServedModel]),
    /// Changes the folders before they are opened.
    pub(crate) prepare: fn(&Tiny),
    pub(crate) machine: Option<String>,
    pub(crate) head_timeout: Duration,
    pub(crate) stall_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let engine = EngineOptions { max_running: 16, max_waiting: 64, step_tokens: 40, prefix_cache: true };
        Self {
            engine,
            api_keys: Vec::new(),
            admin_keys: Vec::new(),
            max_sub_networks: 1024,
            chat: true,
            classify: false,
            models: |_| {},
            prepare: |_| {},
            machine: None,
            head_timeout: PATIENCE,
            stall_timeout: PATIENCE,
        }
    }
}

impl App {
    pub(crate) fn new() -> Self {
        Self::with(Options::default())
    }

    pub(crate) fn with(options: Options) -> Self {
        let tiny = Tiny::write();
        (options.prepare)(&tiny);
        let nets = supernets(&tiny);
        let gate = Arc::new(Gate::default());
        let mut models = served(&nets);
        if options.classify {
            models
                .iter_mut()
                .zip(classes())
                .for_each(|(model, classes)| model.classes = Some(classes.into()));
        }
        (options.models)(&mut models);
        let models = ServedModels::new(models, options.machine).unwrap();
        let info = RunInfo { dtype: "f32".into(), device: "cpu".into() };
        let metrics = Arc::new(Metrics::new(&models, &info).unwrap());
        let (tokenizer, chat_template) = text(&nets[0].base);
        let task = if options.classify {
            let held = HeldClassifier { gate: Arc::clone(&gate), longest: CONTEXT };
            Task::Classify(ClassifierEngine::start(Box::new(held), options.engine, metrics.clone()).unwrap())
        } else {
            let executor = Box::new(executor(&nets, 300));
            let held = Held { executor, gate: Arc::clone(&gate) };
            Task::Generate(Box::new(Generation {
                engine: Engine::start(Box::new(held), options.engine, metrics.clone()).unwrap(),
                chat_template: chat_template.filter(|_| options.chat).ok_or(ChatError::Missing),
                end_tokens: vec![EOS],
            }))
        };
        let sequences = options.engine.max_running + options.engine.max_waiting;
        let state = ServerState::new(ServerParts {
            models,
            task,
            tokenizer: Arc::clone(&tokenizer),
            limits: Limits {
                head_timeout: options.head_timeout,
                stall_timeout: options.stall_timeout,
                max_sub_networks: options.max_sub_networks,
                ..Limits::new(CONTEXT, VOCABULARY, sequences)
            },
            metrics,
            api_keys: options.api_keys,
            admin_keys: options.admin_keys,
        });
        Self { state, tokenizer, gate, tiny }
    }

    pub(crate) fn router(&self) -> Router {
        router(&self.state)
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        Answer::read(self.router().oneshot(request).await.unwrap()).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_text(path, body.to_string()).await
    }

    pub(crate) async fn post_text(&self, path: &str, body: impl Into<Body>) -> Answer {
        let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
        self.send(request.body(body.into()).unwrap()).await
    }

    /// Sends a request that runs beside the test.
    pub(crate) fn start(&self, path: &str, body: &Value) -> JoinHandle<Answer> {
        let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
        let request = request.body(Body::from(body.to_string())).unwrap();
        let router = self.router();
        tokio::spawn(async move { Answer::read(router.oneshot(request).await.unwrap()).await })
    }

    /// A completion that must succeed.
    pub(crate) async fn complete(&self, body: Value) -> Value {
        self.post(COMPLETIONS, &body).await.expect(200)
    }

    /// A classification that must succeed.
    pub(crate) async fn classify(&self, body: Value) -> Value {
        self.post(CLASSIFY, &body).await.expect(200)
    }

    /// A chat completion that must succeed.
    pub(crate) async fn chat(&self, body: Value) -> Value {
        self.post(CHAT, &body).await.expect(200)
    }

    pub(crate) async fn scrape(&self) -> Scrape {
        Scrape(self.get("/metrics").await.body)
    }

    /// The same where a key is needed.
    pub(crate) async fn scrape_with(&self, key: &str) -> Scrape {
        let request = Request::get("/metrics").header(header::AUTHORIZATION, format!("Bearer {key}"));
        Scrape(self.send(request.body(Body::empty()).unwrap()).await.body)
    }

    /// Waits until the metrics say so.
    pub(crate) async fn until(&self, what: &str, said: impl Fn(&Scrape) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let scrape = self.scrape().await;
            if said(&scrape) {
                return;
            }
            assert!(Instant::now() < deadline, "{what} did not happen; the metrics say\n{}", scrape.0);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until `/health` has this status.
    pub(crate) async fn until_health(&self, status: u16) -> Answer {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let health = self.get("/health").await;
            if health.status == status {
                return health;
            }
            assert!(Instant::now() < deadline, "still {}: {}", health.status, health.body);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until nothing runs, nothing waits and no block is in use.
    pub(crate) async fn until_idle(&self) {
        self.until("everything is free", |s| s.load() == (0.0, 0.0, 0.0)).await;
    }

    /// The text of one token as completions' log probabilities spell it.
    pub(crate) fn spelled(&self, token: u32) -> String {
        let bytes = self.tokenizer.token_bytes(token);
        let hex = || bytes.iter().map(|b| format!("\\x{b:02x}")).collect::<String>();
        std::str::from_utf8(bytes).map_or_else(|_| format!("bytes:{}", hex()), String::from)
    }

    pub(crate) fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode(text, true).unwrap()
    }
}

impl Drop for App {
    /// The engine's thread must not be left waiting at the gate: dropping the engine waits for it.
    fn drop(&mut self) {
        self.gate.open();
    }
}

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) async fn read(response: axum::response::Response) -> Self {
        let (head, body) = response.into_parts();
        let body = to_bytes(body, usize::MAX).await.unwrap();
        let body = String::from_utf8(body.to_vec()).unwrap();
        Self { status: head.status.as_u16(), headers: head.headers, body }
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The JSON of an answer with this status.
    pub(crate) fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.body);
        self.json()
    }

    /// The error of an answer: `{"error": {message, type, param, code}}` and nothing else; `type` fits the status.
    pub(crate) fn error(&self) -> Value {
        let json = self.json();
        assert_eq!(json.as_object().unwrap().len(), 1, "{json}");
        let error = &json["error"];
        let keys = error.as_object().unwrap().keys().collect::<Vec<_>>();
        assert_eq!(keys, ["message", "type", "param", "code"], "{json}");
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()));
        assert!(error["param"].is_string() || error["param"].is_null());
        assert!(error["code"].is_string() || error["code"].is_null());
        let kind = if self.status >= 500 { "server_error" } else { "invalid_request_error" };
        assert_eq!(error["type"], kind);
        error.clone()
    }

    /// The chunks of a streamed answer, which must end with `[DONE]`.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        let events = self.body.split_terminator("\n\n").filter(|e| !e.starts_with(':'));
        let mut data = events.map(|e| e.strip_prefix("data: ").unwrap()).collect::<Vec<_>>();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.body);
        data.iter().map(|d| serde_json::from_str(d).unwrap()).collect()
    }
}

/// Tokens of a usage: prompt, completion, total.
pub(crate) fn tokens(usage: &Value) -> [usize; 3] {
    ["prompt_tokens", "completion_tokens", "total_tokens"].map(|key| usage[key].as_u64().unwrap() as usize)
}

/// Tokens of an answer's prompts that were in the cache.
pub(crate) fn cached(answer: &Value) -> usize {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() as usize
}

pub(crate) fn supernets(tiny: &Tiny) -> [Supernet; 2] {
    [NAME, OTHER].map(|name| Supernet::of(&tiny.base(), &tiny.model(name)))
}

/// Both super-adapters on one base, with a pool of so many blocks of 4 positions.
pub(crate) fn executor(nets: &[Supernet; 2], blocks: usize) -> LlamaExecutor<Cpu> {
    let backend = Cpu::new(Dtype::F32, 1);
    let adapters = nets.iter().map(Supernet::super_adapter).collect();
    let model = llama::load(&backend, &nets[0].base, adapters, &Orders::default()).unwrap();
    LlamaExecutor::new(model, backend, blocks, 4).unwrap()
}

fn served(nets: &[Supernet; 2]) -> Vec<ServedModel> {
    let mut next_id = 0..;
    let models = nets.iter().enumerate().map(|(adapter, net)| {
        let catalog = net.folder.catalog(&net.shape, &net.space).unwrap();
        let entries = catalog.entries().iter().map(|entry| {
            let mut selection = net.selection(next_id.next().unwrap(), &entry.sub_network);
            selection.adapter = adapter;
            (entry, selection)
        });
        let Supernet { folder, shape, space, .. } = net;
        let (folder, shape, space) = (folder.clone(), shape.clone(), space.clone());
        let adapter = SuperAdapter { number: adapter, shape, space, merged: false, folder };
        ServedModel::new(adapter, "base", "0123456789ab", entries)
    });
    models.collect()
}

/// Of the two super-adapters where they classify.
fn classes() -> [Classes; 2] {
    let names = |names: &[&str]| names.iter().copied().map(String::from).collect();
    [
        Classes { names: names(&["no", "maybe", "yes"]), kind: OutputKind::Exclusive, token_types: 2 },
        Classes { names: names(&["score"]), kind: OutputKind::Number, token_types: 1 },
    ]
}

fn text(base: &Base) -> (Arc<Tokenizer>, Option<ChatTemplate>) {
    let TokenizerSource::HuggingFace { tokenizer_json, chat_template, bos, eos, .. } = &base.tokenizer else {
        panic!("the tiny base is a Hugging Face folder")
    };
    let tokenizer = Tokenizer::from_hugging_face(tokenizer_json, bos.as_deref(), eos.as_deref()).unwrap();
    let template = chat_template.as_ref().map(|t| ChatTemplate::new(t, "<s>", "</s>").unwrap());
    (Arc::new(tokenizer), template)
}
