//! `POST /v1/completions`.

use super::answer::{Format, Piece, WireError, answer, to_json};
use super::app::ServerState;
use super::choice::{Delta, ScoredToken};
use super::generate::{self, Head, Job};
use super::metrics::Endpoint;
use super::run::{Run, Sequence};
use super::ticket::Ticket;
use super::validate::{self, StreamMode};
use super::wire::{
    ApiError, CompletionAnswer, CompletionChoice, CompletionLogprobs, CompletionRequest, Slo, TopLogprobs,
    Usage, logprob_on_wire, read_json,
};
use crate::text::Tokenizer;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

/// OpenAI's default.
const DEFAULT_MAX_TOKENS: usize = 16;

pub(super) async fn handle(State(state): State<Arc<ServerState>>, request: Request) -> Response {
    let mut ticket = Ticket::new(state.metrics.clone(), Endpoint::Completions);
    match start(&state, &mut ticket, request).await {
        Ok((head, sequences, format, mode)) => {
            let run = Run::new(sequences, ticket, state.admission.when_cut_off());
            answer(run, head, format, mode).await
        }
        Err(error) => {
            ticket.fail(&error);
            error.into_response()
        }
    }
}

async fn start(
    state: &Arc<ServerState>,
    ticket: &mut Ticket,
    request: Request,
) -> Result<(Head, Vec<Sequence>, CompletionFormat, Option<StreamMode>), ApiError> {
    let slo = Slo::of(request.headers());
    let mut request: CompletionRequest = read_json(request, state.limits.max_body).await?;
    state.task.generation()?;
    let shared = request.take_shared();
    let parameters = validate::completion(&request, &shared, &state.limits)?;
    let prompts = request.prompt.ok_or_else(|| ApiError::invalid("prompt", "prompt is missing".into()))?;
    let (mode, logprobs) = (parameters.stream, parameters.logprobs.is_some());
    let job = Job {
        model: shared.model,
        elastic: slo?.with(shared.elastic)?,
        parameters,
        prompts,
        add_special: request.add_special_tokens.unwrap_or(true),
        echo: request.echo.unwrap_or(false),
        default_max_tokens: Some(DEFAULT_MAX_TOKENS),
        prompt_field: "prompt",
    };
    let (head, sequences) = generate::start(state, ticket, "cmpl-", job).await?;
    let format = CompletionFormat { tokenizer: state.tokenizer.clone(), logprobs };
    Ok((head, sequences, format, mode))
}

/// Writes a `text_completion`.
struct CompletionFormat {
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
}

impl CompletionFormat {
    fn choice(&self, index: usize, delta: Delta) -> CompletionChoice {
        let logprobs = self.logprobs.then(|| self.logprobs(delta.tokens));
        let (finish_reason, stop_reason) = match delta.finish {
            Some(finished) => (Some(finished.reason), finished.stop),
            None => (None, None),
        };
        CompletionChoice { index, text: delta.text, logprobs, finish_reason, stop_reason }
    }

    fn logprobs(&self, tokens: Vec<ScoredToken>) -> CompletionLogprobs {
        let mut all = CompletionLogprobs::default();
        for ScoredToken { token, score, offset, .. } in tokens {
            let text = self.token_text(token);
            all.token_logprobs.push(score.as_ref().map(|(logprob, _)| logprob_on_wire(*logprob)));
            all.top_logprobs.push(score.map(|(logprob, top)| self.top(token, logprob, &top)));
            all.tokens.push(text);
            all.text_offset.push(offset);
        }
        all
    }

    /// The likeliest tokens and, as OpenAI does it, the token itself even if it is not among them.
    fn top(&self, token: u32, logprob: f32, top: &[(u32, f32)]) -> TopLogprobs {
        let itself = [(token, logprob)];
        let more = itself.iter().filter(|_| top.iter().all(|(other, _)| *other != token));
        let entries = top.iter().chain(more).map(|&(id, l)| (self.token_text(id), logprob_on_wire(l)));
        TopLogprobs(entries.collect())
    }

    /// A token's text; bytes that are no text by themselves are spelled out, as OpenAI does it.
    fn token_text(&self, token: u32) -> String {
        let bytes = self.tokenizer.token_bytes(token);
        match std::str::from_utf8(bytes) {
            Ok(text) => text.into(),
            Err(_) => bytes.iter().fold("bytes:".to_string(), |all, b| all + &format!("\\x{b:02x}")),
        }
    }

    fn message(
        head: &Head,
        choices: Vec<CompletionChoice>,
        usage: Option<Option<Usage>>,
        with_elastic: bool,
    ) -> Result<String, WireError> {
        to_json(&CompletionAnswer {
            id: &head.id,
            object: "text_completion",
            created: head.created,
            model: &head.chosen.sub_network.label,
            system_fingerprint: &head.chosen.fingerprint,
            choices,
            usage,
            elastic: with_elastic.then_some(&head.chosen.answer),
        })
    }
}

impl Format for CompletionFormat {
    fn opening(&self, _: &Head, _: usize, _: Option<Option<Usage>>) -> Option<Result<String, WireError>> {
        None
    }

    fn chunks(
        &self,
        head: &Head,
        piece: Piece,
        usage: Option<Option<Usage>>,
    ) -> Result<Vec<String>, WireError> {
        let choice = self.choice(piece.index, piece.delta);
        Ok(vec![Self::message(head, vec![choice], usage, piece.first)?])
    }

    fn usage(&self, head: &Head, usage: Usage) -> Result<String, WireError> {
        Self::message(head, Vec::new(), Some(Some(usage)), false)
    }

    fn whole(&self, head: &Head, answers: Vec<Delta>, usage: Usage) -> Result<String, WireError> {
        let choices =
            answers.into_iter().enumerate().map(|(index, delta)| self.choice(index, delta)).collect();
        Self::message(head, choices, Some(Some(usage)), true)
    }
}
