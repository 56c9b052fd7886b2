//! The router: which path leads where, and what holds for every path.

use super::admission::Admission;
use super::metrics::Metrics;
use super::registry::Registry;
use super::served::ServedModels;
use super::task::Task;
use super::text_work::TextWork;
use super::validate::Limits;
use super::wire::ApiError;
use super::{access, admin, chat, classify, completions, http, system};
use crate::text::Tokenizer;
use axum::http::StatusCode;
use axum::routing::{delete, get, post};
use axum::{Router, middleware};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Everything that requests share.
pub struct ServerState {
    pub(super) registry: Registry,
    pub(super) task: Task,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) limits: Limits,
    pub(super) metrics: Arc<Metrics>,
    pub(super) admission: Admission,
    pub(super) text_work: TextWork,
    pub(super) api_keys: access::Keys,
    pub(super) admin_keys: access::Keys,
    /// Unix time of the start; `created` of the model cards.
    pub(super) created: u64,
}

/// What a server is made of.
pub struct ServerParts {
    pub models: ServedModels,
    pub task: Task,
    pub tokenizer: Arc<Tokenizer>,
    pub limits: Limits,
    pub metrics: Arc<Metrics>,
    /// Keys of which a request must bring one; empty lets everybody in.
    pub api_keys: Vec<String>,
    /// Keys of which whoever registers or removes a sub-network must bring one; empty lets nobody.
    pub admin_keys: Vec<String>,
}

impl ServerState {
    pub fn new(parts: ServerParts) -> Arc<Self> {
        let ServerParts { models, task, tokenizer, limits, metrics, api_keys, admin_keys } = parts;
        Arc::new(Self {
            registry: Registry::new(models, limits.max_sub_networks, metrics.clone()),
            task,
            tokenizer,
            admission: Admission::new(limits.max_sequences),
            text_work: TextWork::new(std::thread::available_parallelism().map_or(1, usize::from)),
            limits,
            metrics,
            api_keys: access::Keys::new(&api_keys),
            admin_keys: access::Keys::new(&admin_keys),
            created: unix_time(),
        })
    }
}

/// Seconds since 1970.
pub(super) fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The whole HTTP side.
pub fn app(state: &Arc<ServerState>) -> Router {
    let guarded = Router::new()
        .route("/v1/completions", post(completions::handle))
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/classify", post(classify::handle))
        // vLLM's own path.
        .route("/classify", post(classify::handle))
        .route("/v1/models", get(system::models))
        .route("/v1/models/{id}", get(system::model))
        .route("/v1/subnetworks", get(admin::list))
        .route("/v1/subnetworks/{id}", get(admin::get))
        .route("/tokenize", post(system::tokenize))
        .route("/detokenize", post(system::detokenize))
        .route("/tokenizer_info", get(system::tokenizer_info))
        .route("/version", get(system::version))
        .route("/metrics", get(system::metrics))
        .fallback(not_found)
        .layer(middleware::from_fn_with_state(state.clone(), access::check));
    // What changes the server takes a key of its own, not one of those that requests bring.
    let changing = Router::new()
        .route("/v1/subnetworks", post(admin::register))
        .route("/v1/subnetworks/{id}", delete(admin::remove))
        .layer(middleware::from_fn_with_state(state.clone(), access::check_admin));
    // Nothing is public unless it stands here.
    let public = Router::new().route("/health", get(system::health));
    public
        .merge(guarded)
        .merge(changing)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(http::catch_panic())
        .layer(middleware::from_fn_with_state(state.clone(), http::observe))
        .with_state(state.clone())
}

async fn not_found() -> ApiError {
    ApiError::http(StatusCode::NOT_FOUND, "not_found", "there is nothing at this path".into())
}

async fn method_not_allowed() -> ApiError {
    let message = "this path does not take this method".to_string();
    ApiError::http(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}
