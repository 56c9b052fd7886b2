//! Everything that generates nothing: model cards, tokens, health, version, metrics.

use super::app::ServerState;
use super::select::find_model;
use super::wire::{
    ApiError, Card, CardList, DetokenizeAnswer, DetokenizeRequest, PathId, TokenizeAnswer, TokenizeRequest,
    read_json,
};
use axum::Json;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

type Shared = State<Arc<ServerState>>;

/// `GET /v1/models`: each super-adapter, then each of its sub-networks.
pub(super) async fn models(State(state): Shared) -> Response {
    let (created, most) = (state.created, state.limits.max_model_len);
    let models = state.registry.now();
    let cards = models.models().iter().flat_map(|model| {
        let own = Card::new(model, None, created, most);
        own.into_iter()
            .chain(model.sub_networks.iter().filter_map(move |s| Card::new(model, Some(s), created, most)))
    });
    Json(CardList { object: "list", data: cards.collect() }).into_response()
}

/// `GET /v1/models/{id}`
pub(super) async fn model(State(state): Shared, PathId(id): PathId) -> Result<Response, ApiError> {
    let models = state.registry.now();
    let (model, sub_network) = find_model(&models, &id)?;
    let card = Card::new(model, sub_network.map(|s| &**s), state.created, state.limits.max_model_len);
    Ok(Json(card.ok_or_else(ApiError::internal)?).into_response())
}

/// `POST /tokenize`
pub(super) async fn tokenize(State(state): Shared, request: Request) -> Result<Response, ApiError> {
    let TokenizeRequest { prompt, add_special_tokens } = read_json(request, state.limits.max_body).await?;
    let shared = state.clone();
    let encoded =
        state.text_work.run(move || shared.tokenizer.encode(&prompt, add_special_tokens.unwrap_or(true)));
    let tokens = encoded.await?.map_err(|error| ApiError::invalid("prompt", format!("prompt: {error}")))?;
    let (count, max_model_len) = (tokens.len(), state.limits.max_model_len);
    Ok(Json(TokenizeAnswer { tokens, count, max_model_len }).into_response())
}

/// `POST /detokenize`
pub(super) async fn detokenize(State(state): Shared, request: Request) -> Result<Response, ApiError> {
    let DetokenizeRequest { tokens } = read_json(request, state.limits.max_body).await?;
    let vocabulary = state.limits.vocabulary;
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= vocabulary) {
        let message = format!("token id {id} is outside the vocabulary of {vocabulary}");
        return Err(ApiError::invalid("tokens", message));
    }
    let shared = state.clone();
    let decoded = state.text_work.run(move || shared.tokenizer.decode_whole(&tokens, false));
    let prompt = decoded.await?.map_err(|error| ApiError::invalid("tokens", format!("tokens: {error}")))?;
    Ok(Json(DetokenizeAnswer { prompt }).into_response())
}

/// `GET /tokenizer_info`: what clients with a remote tokenizer need to know.
pub(super) async fn tokenizer_info(State(state): Shared) -> Json<Value> {
    let text = |token: Option<u32>| token.and_then(|id| state.tokenizer.token_text(id));
    Json(json!({
        "bos_token": text(state.tokenizer.bos()),
        "eos_token": text(state.tokenizer.eos()),
        "model_max_length": state.limits.max_model_len,
    }))
}

/// `GET /health`: whether new requests are taken.
pub(super) async fn health(State(state): Shared) -> Response {
    let (status, word) = match (state.admission.draining(), state.task.is_accepting()) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        (false, false) => (StatusCode::SERVICE_UNAVAILABLE, "stopped"),
        (false, true) => (StatusCode::OK, "ok"),
    };
    (status, Json(json!({"status": word}))).into_response()
}

/// `GET /version`
pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// `GET /metrics`
pub(super) async fn metrics(State(state): Shared) -> Result<Response, ApiError> {
    let text = state.metrics.render().map_err(|error| {
        tracing::error!(%error, "the metrics could not be written");
        ApiError::internal()
    })?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}
