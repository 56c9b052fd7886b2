//! `POST /v1/chat/completions`.

use super::answer::{Format, Piece, WireError, answer, to_json};
use super::app::ServerState;
use super::choice::{Delta, ScoredToken};
use super::generate::{self, Head, Job};
use super::metrics::Endpoint;
use super::run::{Run, Sequence};
use super::ticket::Ticket;
use super::validate::{self, StreamMode};
use super::wire::{
    AnswerMessage, ApiError, ChatAnswer, ChatChoice, ChatChunk, ChatChunkChoice, ChatDelta, ChatLogprobs,
    ChatRequest, ChatToken, ChatTopToken, Prompts, Slo, Usage, logprob_on_wire, read_json,
};
use crate::text::{ChatError, Message, Tokenizer};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

pub(super) async fn handle(State(state): State<Arc<ServerState>>, request: Request) -> Response {
    let mut ticket = Ticket::new(state.metrics.clone(), Endpoint::Chat);
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
) -> Result<(Head, Vec<Sequence>, ChatFormat, Option<StreamMode>), ApiError> {
    let slo = Slo::of(request.headers());
    let mut request: ChatRequest = read_json(request, state.limits.max_body).await?;
    state.task.generation()?;
    let shared = request.take_shared();
    let parameters = validate::chat(&request, &shared, &state.limits)?;
    let messages = validate::messages(&mut request)?;
    let prompt = render(state, messages, request.add_generation_prompt.unwrap_or(true)).await?;
    let (mode, logprobs) = (parameters.stream, parameters.logprobs.is_some());
    let job = Job {
        model: shared.model,
        elastic: slo?.with(shared.elastic)?,
        parameters,
        prompts: Prompts::Texts(vec![prompt]),
        // The template writes them out.
        add_special: false,
        echo: false,
        default_max_tokens: None,
        prompt_field: "messages",
    };
    let (head, sequences) = generate::start(state, ticket, "chatcmpl-", job).await?;
    let format = ChatFormat { tokenizer: state.tokenizer.clone(), logprobs };
    Ok((head, sequences, format, mode))
}

/// The conversation as the model's template writes it.
async fn render(
    state: &Arc<ServerState>,
    messages: Vec<Message>,
    add_generation_prompt: bool,
) -> Result<String, ApiError> {
    if let Err(why) = &state.task.generation()?.chat_template {
        return Err(ApiError::invalid("messages", format!("{why}; use /v1/completions")));
    }
    let shared = state.clone();
    let rendered = state.text_work.run(move || {
        let template = shared.task.generation()?.chat_template.as_ref();
        Ok(template.map(|template| template.render(&messages, add_generation_prompt)).ok())
    });
    match rendered.await?? {
        Some(Ok(text)) => Ok(text),
        Some(Err(ChatError::Refused(why))) => Err(ApiError::invalid("messages", format!("messages: {why}"))),
        Some(Err(error)) => {
            tracing::warn!(%error, "a conversation could not be rendered");
            Err(ApiError::invalid(
                "messages",
                "the model's chat template cannot take this conversation".into(),
            ))
        }
        None => Err(ApiError::internal()),
    }
}

/// Writes a `chat.completion` or its chunks.
struct ChatFormat {
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
}

impl ChatFormat {
    fn logprobs(&self, tokens: &[ScoredToken]) -> Option<ChatLogprobs> {
        // The end of text has no place in the content, so it has none here either.
        let content = tokens.iter().filter(|t| !t.end).filter_map(|t| self.token(t)).collect();
        self.logprobs.then_some(ChatLogprobs { content, refusal: None })
    }

    fn token(&self, scored: &ScoredToken) -> Option<ChatToken> {
        let (logprob, top) = scored.score.as_ref()?;
        let ChatTopToken { token, logprob, bytes } = self.top_token(scored.token, *logprob);
        let top_logprobs = top.iter().map(|&(id, l)| self.top_token(id, l)).collect();
        Some(ChatToken { token, logprob, bytes, top_logprobs })
    }

    fn top_token(&self, token: u32, logprob: f32) -> ChatTopToken {
        let bytes = self.tokenizer.token_bytes(token).to_vec();
        ChatTopToken {
            token: String::from_utf8_lossy(&bytes).into(),
            logprob: logprob_on_wire(logprob),
            bytes,
        }
    }

    fn chunk(
        head: &Head,
        choices: Vec<ChatChunkChoice>,
        usage: Option<Option<Usage>>,
        with_elastic: bool,
    ) -> Result<String, WireError> {
        to_json(&ChatChunk {
            id: &head.id,
            object: "chat.completion.chunk",
            created: head.created,
            model: &head.chosen.sub_network.label,
            system_fingerprint: &head.chosen.fingerprint,
            choices,
            usage,
            elastic: with_elastic.then_some(&head.chosen.answer),
        })
    }
}

impl Format for ChatFormat {
    /// The role, and nothing else.
    fn opening(
        &self,
        head: &Head,
        index: usize,
        usage: Option<Option<Usage>>,
    ) -> Option<Result<String, WireError>> {
        let delta = ChatDelta { role: Some("assistant"), content: Some(String::new()) };
        let choice = ChatChunkChoice { index, delta, logprobs: None, finish_reason: None, stop_reason: None };
        Some(Self::chunk(head, vec![choice], usage, true))
    }

    /// Content, and at the end a chunk of its own with the reason and an empty delta.
    fn chunks(
        &self,
        head: &Head,
        piece: Piece,
        usage: Option<Option<Usage>>,
    ) -> Result<Vec<String>, WireError> {
        let Piece { index, delta: Delta { text, tokens, finish }, first } = piece;
        let mut chunks = Vec::new();
        let logprobs = self.logprobs(&tokens);
        if !text.is_empty() || logprobs.as_ref().is_some_and(|l| !l.content.is_empty()) {
            let delta = ChatDelta { role: None, content: Some(text) };
            let choice = ChatChunkChoice { index, delta, logprobs, finish_reason: None, stop_reason: None };
            chunks.push(Self::chunk(head, vec![choice], usage, first)?);
        }
        if let Some(finished) = finish {
            let choice = ChatChunkChoice {
                index,
                delta: ChatDelta::default(),
                logprobs: None,
                finish_reason: Some(finished.reason),
                stop_reason: finished.stop,
            };
            chunks.push(Self::chunk(head, vec![choice], usage, false)?);
        }
        Ok(chunks)
    }

    fn usage(&self, head: &Head, usage: Usage) -> Result<String, WireError> {
        Self::chunk(head, Vec::new(), Some(Some(usage)), false)
    }

    fn whole(&self, head: &Head, answers: Vec<Delta>, usage: Usage) -> Result<String, WireError> {
        let choice = |(index, delta): (usize, Delta)| {
            let logprobs = self.logprobs(&delta.tokens);
            let (finish_reason, stop_reason) = match delta.finish {
                Some(finished) => (Some(finished.reason), finished.stop),
                None => (None, None),
            };
            ChatChoice {
                index,
                message: AnswerMessage::new(delta.text),
                logprobs,
                finish_reason,
                stop_reason,
            }
        };
        to_json(&ChatAnswer {
            id: &head.id,
            object: "chat.completion",
            created: head.created,
            model: &head.chosen.sub_network.label,
            system_fingerprint: &head.chosen.fingerprint,
            choices: answers.into_iter().enumerate().map(choice).collect(),
            usage,
            elastic: &head.chosen.answer,
        })
    }
}
