//! `lonas serve`

use super::Failure;
use super::compute::{BLOCK_SIZE, ComputeArgs};
use super::open::{self, BaseArg};
use crate::engine::{ClassifierEngine, Engine, EngineOptions};
use crate::server::{
    Classes, Generation, Limits, Metrics, RunInfo, ServedModel, ServedModels, ServerParts, ServerState,
    SuperAdapter, Task, serve as serve_http,
};
use crate::text::{ChatError, Tokenizer};
use clap::Args;
use clap::builder::{NonEmptyStringValueParser, RangedU64ValueParser};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What threads that still work may take when the server has stopped.
const AFTER_SERVING: Duration = Duration::from_secs(2);

/// Serve every sub-network over an OpenAI-style HTTP API.
///
/// The base is loaded once, whatever the number of super-adapters and sub-networks. A request picks its sub-network by
/// `"model": "NAME:SUBNETWORK"`. Models of a family that continues texts answer /v1/completions and /v1/chat/completions, those
/// of one that classifies (BERT) /v1/classify.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  lonas serve\n  lonas serve models/commonsense models/math --port 9000\n  \
    LONAS_ADMIN_KEY=secret lonas serve models/mine\n  \
    curl -s localhost:8080/v1/subnetworks -H 'authorization: Bearer secret' \\\n    \
    -H 'content-type: application/json' -d '{\"name\": \"mine\", \"choices\": [one for each elastic group]}'\n  \
    curl -s localhost:8080/v1/classify -H 'content-type: application/json' \\\n    \
    -d '{\"input\": [\"one text\", {\"text\": \"two that\", \"text_pair\": \"belong together\"}]}'"
)]
pub(super) struct ServeArgs {
    /// Model folders; several share one base.
    #[arg(default_value = super::DEFAULT_MODEL, value_name = "DIR")]
    models: Vec<PathBuf>,

    /// Address to listen on; 0.0.0.0 for all.
    #[arg(long, env = "LONAS_HOST", default_value = "127.0.0.1")]
    host: String,

    /// Port to listen on; 0 takes a free one and logs it.
    #[arg(long, env = "LONAS_PORT", default_value_t = 8080)]
    port: u16,

    /// Which sub-network answers where a request names none.
    #[arg(long, env = "LONAS_DEFAULT_SUBNETWORK", default_value = crate::supernet::MAXIMAL, value_name = "NAME")]
    default_subnetwork: String,

    /// Tokens that the key-value pool holds, all sequences together.
    #[arg(long, env = "LONAS_KV_TOKENS", default_value_t = 16384, value_name = "N")]
    kv_tokens: usize,

    /// Longest prompt and answer together, or longest text to classify, in tokens; 0 takes what the base allows and the pool
    /// holds.
    #[arg(long, env = "LONAS_MAX_MODEL_LEN", default_value_t = 0, value_name = "N")]
    max_model_len: usize,

    /// Sequences that compute together. Of texts to classify as many may be in as this and those that wait come to.
    #[arg(long, env = "LONAS_MAX_RUNNING", default_value_t = 64, value_name = "N", value_parser = places())]
    max_running: usize,

    /// Sequences that may wait; beyond that a request is answered 503 at once.
    #[arg(long, env = "LONAS_MAX_WAITING", default_value_t = 256, value_name = "N", value_parser = places())]
    max_waiting: usize,

    /// Tokens computed in one step; longer prompts are computed in chunks, longer texts to classify by themselves.
    #[arg(long, env = "LONAS_STEP_TOKENS", default_value_t = 256, value_name = "N")]
    step_tokens: usize,

    /// Keep what prompts and answers have computed, as long as nobody needs the room, for requests to the same sub-network that
    /// begin with the same tokens: they are answered sooner.
    #[arg(
        long,
        env = "LONAS_PREFIX_CACHE",
        value_name = "true|false",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = true,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    prefix_cache: bool,

    /// Seconds that running requests may take to finish after SIGTERM.
    #[arg(long, env = "LONAS_DRAIN_SECONDS", default_value_t = 30, value_name = "SECONDS")]
    drain_seconds: u64,

    /// A key that requests must bring as `Authorization: Bearer KEY`; may be given several times.
    #[arg(long, env = "LONAS_API_KEY", hide_env_values = true, value_delimiter = ',', value_name = "KEY")]
    api_key: Vec<String>,

    /// A key with which sub-networks are registered and removed while the server runs (POST and DELETE /v1/subnetworks), as
    /// `Authorization: Bearer KEY`; may be given several times. Without one, those are answered 403. No key of --api-key
    /// opens them, nor does this one open what needs an --api-key.
    #[arg(long, env = "LONAS_ADMIN_KEY", hide_env_values = true, value_delimiter = ',', value_name = "KEY")]
    admin_key: Vec<String>,

    /// The machine whose measured latencies in the catalog hold here, as `lonas bench --save` has named it; by default
    /// this one's processor and cores.
    #[arg(long, env = "LONAS_MACHINE", value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    machine: Option<String>,

    #[command(flatten)]
    base: BaseArg,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// What a base's family decides.
struct Ready {
    models: ServedModels,
    metrics: Arc<Metrics>,
    task: Task,
    /// Tokens: of prompt and answer together, or of a text that is classified.
    longest: usize,
    vocabulary: usize,
}

/// Sequences that may be in. Each has room set aside on the engine's way in, so there must be a bound.
fn places() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(0..=100_000)
}

pub(super) fn run(args: &ServeArgs) -> Result<(), Failure> {
    let began = Instant::now();
    let (api_keys, admin_keys) = keys(args)?;
    let opened = open::models(&args.models, &args.base)?;
    let tokenizer = open::tokenizer(&opened.base)?;
    let ready = if opened.base.config.classifier.is_some() {
        classification(args, opened)?
    } else {
        generation(args, opened, &tokenizer)?
    };
    let Ready { models, metrics, task, longest, vocabulary } = ready;
    let longest = if args.max_model_len == 0 { longest } else { longest.min(args.max_model_len) };
    let cards = models.sub_networks().map(|s| s.label.to_string()).collect::<Vec<_>>();
    let vocabulary = vocabulary.min(tokenizer.vocabulary());
    let EngineOptions { max_running, max_waiting, .. } = args.engine();
    let state = ServerState::new(ServerParts {
        models,
        task,
        tokenizer: Arc::new(tokenizer),
        limits: Limits::new(longest, vocabulary, max_running + max_waiting),
        metrics,
        api_keys,
        admin_keys,
    });
    tracing::info!("loaded in {:.2} s; {}", began.elapsed().as_secs_f64(), args.compute.describe()?);
    tracing::info!("sub-networks: {}", cards.join(", "));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let served = runtime.block_on(listen(args, state));
    // A text that is still read belongs to a client that has gone; a catalog that is written takes less.
    runtime.shutdown_timeout(AFTER_SERVING);
    served
}

/// Loads a model that continues texts and starts its engine.
fn generation(args: &ServeArgs, opened: open::Opened, tokenizer: &Tokenizer) -> Result<Ready, Failure> {
    let chat_template = open::chat_template(&opened.base, tokenizer);
    if let Err(why @ ChatError::Template(_)) = &chat_template {
        tracing::warn!("{why}; chat requests are refused");
    }
    let mut executor = args.compute.executor(&opened, args.kv_tokens, BLOCK_SIZE)?;
    if let Some((_, selection)) = args.compute.selections(&opened)?.first() {
        executor.prepare(args.step_tokens.max(args.max_running), selection)?;
    }
    let capacity = executor.blocks() * executor.block_size();
    let longest = opened.base.config.max_positions.min(capacity);
    let end_tokens = open::end_tokens(&opened.base, tokenizer);
    let (models, metrics) = served(args, opened)?;
    let vocabulary = executor.vocabulary();
    let engine = Engine::start(executor, args.engine(), metrics.clone())?;
    let task = Task::Generate(Box::new(Generation { engine, chat_template, end_tokens }));
    Ok(Ready { models, metrics, task, longest, vocabulary })
}

/// Loads a model that classifies texts and starts its engine.
fn classification(args: &ServeArgs, opened: open::Opened) -> Result<Ready, Failure> {
    let classifier = args.compute.classifier(&opened)?;
    let vocabulary = opened.base.config.vocabulary;
    let (models, metrics) = served(args, opened)?;
    for (number, model) in models.models().iter().enumerate() {
        let named = model.classes.as_ref().map(|classes| classes.names.len());
        let computed = classifier.labels(number);
        if computed != named {
            let count = |labels: Option<usize>| labels.map_or_else(|| "none".into(), |n| n.to_string());
            let (name, named, computed) = (&model.name, count(named), count(computed));
            return Err(format!(
                "`{name}` has {named} labels by its files, but the model computes {computed}"
            )
            .into());
        }
    }
    let engine = ClassifierEngine::start(classifier, args.engine(), metrics.clone())?;
    let longest = engine.longest();
    Ok(Ready { models, metrics, task: Task::Classify(engine), longest, vocabulary })
}

/// What can be asked for, and what counts it.
fn served(args: &ServeArgs, opened: open::Opened) -> Result<(ServedModels, Arc<Metrics>), Failure> {
    let models = served_models(args, opened)?;
    let info =
        RunInfo { dtype: args.compute.dtype_name()?.into(), device: args.compute.device_name()?.into() };
    let metrics = Arc::new(Metrics::new(&models, &info)?);
    Ok((models, metrics))
}

impl ServeArgs {
    fn engine(&self) -> EngineOptions {
        let Self { max_running, max_waiting, step_tokens, prefix_cache, .. } = self;
        EngineOptions {
            prefix_cache: *prefix_cache,
            max_running: (*max_running).max(1),
            max_waiting: (*max_waiting).max(1),
            step_tokens: (*step_tokens).max(1),
        }
    }
}

/// The keys of those who ask and of those who change what is served.
fn keys(args: &ServeArgs) -> Result<(Vec<String>, Vec<String>), Failure> {
    // An empty variable means no key, not an empty one.
    let [api, admin] = [&args.api_key, &args.admin_key]
        .map(|keys| keys.iter().filter(|k| !k.is_empty()).cloned().collect::<Vec<_>>());
    if admin.iter().any(|key| api.contains(key)) {
        return Err(
            "--admin-key: one of these is an --api-key too, so whoever may ask could change what is served"
                .into(),
        );
    }
    Ok((api, admin))
}

async fn listen(args: &ServeArgs, state: Arc<ServerState>) -> Result<(), Failure> {
    let address = format!("{}:{}", args.host, args.port);
    let listener = tokio::net::TcpListener::bind(&address).await;
    let listener = listener.map_err(|e| format!("cannot listen on {address}: {e}"))?;
    let stop = stop_signal()?;
    tracing::info!("listening on http://{}", listener.local_addr()?);
    let drain = Duration::from_secs(args.drain_seconds);
    let stop = async {
        stop.await;
        tokio::spawn(leave_at_once(stop_signal()));
    };
    serve_http(listener, state, stop, drain).await?;
    tracing::info!("stopped");
    Ok(())
}

/// Ready at the first SIGTERM or Ctrl-C. The handlers are in place when this returns.
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Whoever asks twice does not want to wait for the drain.
async fn leave_at_once(again: std::io::Result<impl Future<Output = ()>>) {
    if let Ok(again) = again {
        again.await;
        tracing::warn!("asked to stop again: leaving at once");
        std::process::exit(1);
    }
}

fn served_models(args: &ServeArgs, opened: open::Opened) -> Result<ServedModels, Failure> {
    let base = open::name_of(opened.base.path());
    let selections = args.compute.selections(&opened)?;
    let mut models = Vec::with_capacity(opened.models.len());
    for (number, model) in opened.models.into_iter().enumerate() {
        let open::OpenedModel { folder, classifier, shape, space, catalog } = model;
        let entries = selections
            .iter()
            .filter(|((of, _), _)| *of == number)
            .filter_map(|((_, name), selection)| Some((catalog.get(name)?, selection.clone())));
        let fingerprint = crate::artifact::sha256_of_file(&folder.path().join("adapter_model.safetensors"))?;
        let adapter = SuperAdapter { number, shape, space, merged: args.compute.merge_adapter, folder };
        let mut served = ServedModel::new(adapter, &base, &fingerprint[..12], entries);
        if served.get(&args.default_subnetwork).is_none() {
            let known =
                served.sub_networks.iter().map(|s| s.entry.name.as_str()).collect::<Vec<_>>().join(", ");
            let (name, wanted) = (&served.name, &args.default_subnetwork);
            return Err(format!("--default-subnetwork {wanted}: `{name}` has {known}").into());
        }
        served.default.clone_from(&args.default_subnetwork);
        served.classes = classifier.as_ref().map(|config| Arc::new(Classes::of(config)));
        models.push(served);
    }
    Ok(ServedModels::new(
        models,
        Some(open::machine(args.machine.as_ref().or(args.compute.gpu_name()?.as_ref()))),
    )?)
}
