//! `POST /v1/classify`.

use super::answer::to_json;
use super::app::{ServerState, unix_time};
use super::classes::Classes;
use super::generate::{draining, not_taken, refused};
use super::http::unique;
use super::inputs::tokenize;
use super::metrics::Endpoint;
use super::select::{Chosen, Lengths, Wish};
use super::ticket::{Outcome, Ticket};
use super::validate;
use super::wire::{ApiError, ClassifiedInput, ClassifyAnswer, ClassifyRequest, Slo, Usage, read_json};
use crate::engine;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use std::sync::Arc;
use tokio::sync::mpsc;

pub(super) async fn handle(State(state): State<Arc<ServerState>>, request: Request) -> Response {
    let mut ticket = Ticket::new(state.metrics.clone(), Endpoint::Classify);
    match answer(&state, &mut ticket, request).await {
        Ok(response) => {
            ticket.end(Outcome::Done);
            response
        }
        Err(error) => {
            ticket.fail(&error);
            error.into_response()
        }
    }
}

/// In the order of [`generate`](super::generate): what is cheap to refuse is refused before anything costs time.
async fn answer(
    state: &Arc<ServerState>,
    ticket: &mut Ticket,
    request: Request,
) -> Result<Response, ApiError> {
    let slo = Slo::of_whole_answer(request.headers());
    let mut request: ClassifyRequest = read_json(request, state.limits.max_body).await?;
    let engine = state.task.classifier()?;
    let parameters = validate::classify(&request, &state.limits)?;
    request.elastic = slo?.with(request.elastic.take())?;
    let models = state.registry.now();
    let wish = Wish::new(&models, request.model.as_deref(), request.elastic.as_ref())?;
    if let Some(sub_network) = wish.certain() {
        ticket.set_subnetwork(sub_network);
    }
    let classes = wish.model().classes.as_ref().ok_or_else(ApiError::internal)?;
    let inputs = request.input.ok_or_else(|| ApiError::invalid("input", "input is missing".into()))?;
    let (count, most) = (inputs.list.len(), state.limits.max_prompts);
    if count == 0 || count > most {
        return Err(ApiError::invalid("input", format!("input must hold 1 to {most} inputs, got {count}")));
    }
    let too_many = |capacity| {
        let message = format!("input: {count} inputs are more than the {capacity} that this server holds");
        ApiError::invalid("input", message)
    };
    let places = state.admission.enter(count).map_err(|refusal| refused(refusal, too_many))?;
    ticket.set_places(places);
    let texts = tokenize(state, inputs, &parameters, classes.token_types).await?;
    let lengths = texts.iter().map(|t| t.tokens.len()).collect::<Vec<_>>();
    // The answer comes when the last text is done, so a bound on its time is one on all of them.
    let tokens = lengths.iter().sum();
    let chosen = wish.resolve(Lengths { prompt: tokens, answer: Some(0) })?;
    ticket.set_subnetwork(&chosen.sub_network);
    let request = engine::ClassifyRequest { texts, selection: chosen.sub_network.selection.clone() };
    let results = engine.submit(request).map_err(|error| not_taken(&error, "input"))?;
    ticket.accepted(tokens, chosen.answer.reason);
    let outputs = collect(state, ticket, results, &lengths, classes).await?;
    written(&chosen, classes, &outputs, parameters.activate, tokens)
}

/// The outputs of all texts, by their places. Dropped before its end, because the client has gone, it cancels what is left.
async fn collect(
    state: &ServerState,
    ticket: &Ticket,
    mut results: mpsc::Receiver<Result<engine::Classified, String>>,
    lengths: &[usize],
    classes: &Classes,
) -> Result<Vec<Vec<f32>>, ApiError> {
    let failed = |reason: &str| {
        tracing::error!(reason, "a text could not be classified");
        ApiError::internal()
    };
    let mut cut_off = std::pin::pin!(state.admission.when_cut_off());
    let mut all = vec![Vec::new(); lengths.len()];
    for _ in lengths {
        let result = tokio::select! {
            biased;
            result = results.recv() => result,
            () = &mut cut_off => return Err(draining()),
        };
        let engine::Classified { text, outputs } =
            result.ok_or_else(|| failed("the engine has stopped"))?.map_err(|reason| failed(&reason))?;
        if outputs.len() != classes.names.len() {
            return Err(failed(&format!("{} outputs for {} labels", outputs.len(), classes.names.len())));
        }
        ticket.prompt_done(lengths[text]);
        all[text] = outputs;
    }
    Ok(all)
}

/// The answer of vLLM's shape.
fn written(
    chosen: &Chosen,
    classes: &Classes,
    outputs: &[Vec<f32>],
    activate: bool,
    tokens: usize,
) -> Result<Response, ApiError> {
    let input = |(index, outputs): (usize, &Vec<f32>)| ClassifiedInput {
        index,
        label: classes.likeliest(outputs),
        probs: if activate { classes.probabilities(outputs) } else { outputs.clone() },
        num_classes: outputs.len(),
    };
    let body = to_json(&ClassifyAnswer {
        id: &unique("classify-"),
        object: "list",
        created: unix_time(),
        model: &chosen.sub_network.label,
        data: outputs.iter().enumerate().map(input).collect(),
        usage: Usage::new(tokens, 0),
        elastic: &chosen.answer,
    });
    let body = body.map_err(|error| {
        tracing::error!(%error, "an answer could not be written");
        ApiError::internal()
    })?;
    let mut response =
        ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response();
    if let Ok(served) = HeaderValue::try_from(&chosen.sub_network.entry.name) {
        response.headers_mut().insert("x-subnetwork", served);
    }
    Ok(response)
}
