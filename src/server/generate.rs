//! From checked parameters to running sequences: sub-network, admission, tokens, lengths, submission, in this order,
//! so that what is cheap to refuse is refused before anything costs time.

use super::admission::Refusal;
use super::app::{ServerState, unix_time};
use super::choice::{Choice, ChoiceSettings, Echo};
use super::http::unique;
use super::run::Sequence;
use super::select::{Chosen, Lengths, Wish};
use super::ticket::Ticket;
use super::validate::Parameters;
use super::wire::{ApiError, ElasticFields, Prompts};
use crate::engine::{Request, SubmitError};
use std::sync::Arc;

/// What is to be generated.
pub(super) struct Job {
    pub(super) model: Option<String>,
    pub(super) elastic: Option<ElasticFields>,
    pub(super) parameters: Parameters,
    pub(super) prompts: Prompts,
    /// Whether the tokenizer adds its own tokens, such as a beginning of sequence.
    pub(super) add_special: bool,
    /// Give the prompt back in front of the answer.
    pub(super) echo: bool,
    /// Tokens to generate where the request does not say; `None` for as many as fit.
    pub(super) default_max_tokens: Option<usize>,
    /// Where the prompt stands in the request, for messages.
    pub(super) prompt_field: &'static str,
}

/// What every part of an answer repeats.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) chosen: Chosen,
}

/// One prompt as the engine takes it.
struct Prompt {
    tokens: Arc<[u32]>,
    /// As the client wrote it, if it did.
    text: Option<Arc<str>>,
}

/// Submits a job's sequences, in the order of their indices: all answers to the first prompt, then the next.
pub(super) async fn start(
    state: &Arc<ServerState>,
    ticket: &mut Ticket,
    id_prefix: &str,
    job: Job,
) -> Result<(Head, Vec<Sequence>), ApiError> {
    let models = state.registry.now();
    let wish = Wish::new(&models, job.model.as_deref(), job.elastic.as_ref())?;
    if let Some(sub_network) = wish.certain() {
        ticket.set_subnetwork(sub_network);
    }
    let prompts = job.prompts.len();
    if prompts == 0 || prompts > state.limits.max_prompts {
        let message = format!("there must be 1 to {} prompts, got {prompts}", state.limits.max_prompts);
        return Err(ApiError::invalid(job.prompt_field, message));
    }
    let n = job.parameters.n;
    let too_many = |capacity| {
        let message = format!("{prompts} prompts with n {n} are more sequences than the {capacity} that fit");
        ApiError::invalid("n", message)
    };
    let places = state.admission.enter(prompts * n).map_err(|refusal| refused(refusal, too_many))?;
    ticket.set_places(places);
    let prompts = tokenize(state, &job).await?;
    let longest = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(0);
    let answer = job.parameters.max_tokens.map(|(_, tokens)| tokens).or(job.default_max_tokens);
    let chosen = wish.resolve(Lengths { prompt: longest, answer })?;
    ticket.set_subnetwork(&chosen.sub_network);

    let (requests, choices) = requests(state, &job, &prompts, &chosen)?;
    // All answers to one prompt count it once, as the usage does.
    let first = |answer: usize| answer.is_multiple_of(job.parameters.n);
    let counted = requests.iter().enumerate().map(|(at, r)| if first(at) { r.prompt.len() } else { 0 });
    let counted = counted.collect::<Vec<_>>();
    let receivers = state
        .task
        .generation()?
        .engine
        .submit_all(requests)
        .map_err(|error| not_taken(&error, job.prompt_field))?;
    ticket.accepted(prompts.iter().map(|p| p.tokens.len()).sum(), chosen.answer.reason);
    let sequences = receivers.into_iter().zip(choices).zip(counted);
    let sequences =
        sequences.map(|((events, choice), tokens)| Sequence::new(events, choice, tokens)).collect();
    let head = Head { id: unique(id_prefix), created: unix_time(), chosen };
    Ok((head, sequences))
}

/// `too_many` is what to say where the server holds no more than so many.
pub(super) fn refused(refusal: Refusal, too_many: impl FnOnce(u32) -> ApiError) -> ApiError {
    match refusal {
        Refusal::Draining => draining(),
        Refusal::Full => queue_full(),
        Refusal::TooMany { capacity } => too_many(capacity),
    }
}

pub(super) fn draining() -> ApiError {
    ApiError::unavailable("shutting_down", "the server is shutting down".into())
}

fn queue_full() -> ApiError {
    ApiError::unavailable("queue_full", "the server is full; try again a little later".into())
}

pub(super) fn not_taken(error: &SubmitError, prompt_field: &'static str) -> ApiError {
    match error {
        SubmitError::QueueFull { .. } => queue_full(),
        SubmitError::Stopped => draining(),
        SubmitError::TooLong { tokens, limit } => {
            let message =
                format!("{tokens} tokens of prompt and answer do not fit into this server's {limit}");
            ApiError::too_long(prompt_field, message)
        }
    }
}

/// The prompts as token ids, each short enough.
async fn tokenize(state: &Arc<ServerState>, job: &Job) -> Result<Vec<Prompt>, ApiError> {
    let field = job.prompt_field;
    let prompts = match &job.prompts {
        Prompts::Tokens(lists) => {
            lists.iter().map(|t| Prompt { tokens: t.as_slice().into(), text: None }).collect()
        }
        Prompts::Texts(texts) => {
            let (shared, texts, add_special) = (state.clone(), texts.clone(), job.add_special);
            state.text_work.run(move || encode(&shared, texts, add_special, field)).await??
        }
    };
    let vocabulary = state.limits.vocabulary;
    for prompt in &prompts {
        check_length(prompt.tokens.len(), state, field)?;
        if let Some(id) = prompt.tokens.iter().find(|&&id| id as usize >= vocabulary) {
            let message = format!("{field}: token id {id} is outside the vocabulary of {vocabulary}");
            return Err(ApiError::invalid(field, message));
        }
    }
    Ok(prompts)
}

fn encode(
    state: &ServerState,
    texts: Vec<String>,
    add_special: bool,
    field: &str,
) -> Result<Vec<Prompt>, ApiError> {
    let encode = |text: String| {
        let tokens = state.tokenizer.encode(&text, add_special);
        let tokens = tokens.map_err(|error| ApiError::invalid(field, format!("{field}: {error}")))?;
        check_length(tokens.len(), state, field)?;
        Ok(Prompt { tokens: tokens.into(), text: Some(text.into()) })
    };
    texts.into_iter().map(encode).collect()
}

fn check_length(tokens: usize, state: &ServerState, field: &str) -> Result<(), ApiError> {
    let most = state.limits.max_model_len;
    match tokens {
        0 => Err(ApiError::invalid(field, format!("{field} has no tokens"))),
        n if n > most => {
            let message = format!("this model's context holds {most} tokens, but {field} alone has {n}");
            Err(ApiError::too_long(field, message))
        }
        _ => Ok(()),
    }
}

/// The engine's requests and what will become of their tokens, by index.
fn requests(
    state: &ServerState,
    job: &Job,
    prompts: &[Prompt],
    chosen: &Chosen,
) -> Result<(Vec<Request>, Vec<Choice>), ApiError> {
    let parameters = &job.parameters;
    let prompt_logprobs = parameters.logprobs.filter(|_| job.echo);
    if let Some(top) = prompt_logprobs {
        let tokens = prompts.iter().map(|p| p.tokens.len()).sum::<usize>();
        if tokens * parameters.n * (top + 1) > state.limits.max_prompt_logprobs {
            let message =
                "echo with logprobs over so many prompt tokens is too much for one request".to_string();
            return Err(ApiError::invalid("logprobs", message));
        }
    }
    let ends = state.task.generation()?.end_tokens.iter().filter(|_| !parameters.ignore_eos);
    let stop_tokens: Arc<[u32]> = parameters.stop_tokens.iter().chain(ends).copied().collect();
    let mut requests = Vec::with_capacity(prompts.len() * parameters.n);
    let mut choices = Vec::with_capacity(requests.capacity());
    for prompt in prompts {
        let max_tokens = max_tokens(state, job, prompt.tokens.len())?;
        let echo = job.echo.then(|| Echo {
            text: prompt.text.clone().unwrap_or_else(|| state.tokenizer.decode(&prompt.tokens, false).into()),
            tokens: prompt.tokens.clone(),
        });
        for answer in 0..parameters.n {
            let mut sampling = parameters.sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(answer as u64);
            requests.push(Request {
                prompt: prompt.tokens.to_vec(),
                selection: chosen.sub_network.selection.clone(),
                sampling,
                max_tokens,
                min_tokens: parameters.min_tokens,
                stop_tokens: stop_tokens.to_vec(),
                logprobs: parameters.logprobs,
                prompt_logprobs,
                cache_salt: parameters.cache_salt.clone(),
            });
            let settings = ChoiceSettings {
                stop: parameters.stop.clone(),
                min_tokens: parameters.min_tokens,
                named_stop_tokens: parameters.stop_tokens.as_slice().into(),
                stop_tokens: stop_tokens.clone(),
                logprobs: parameters.logprobs.is_some(),
                echo: echo.clone(),
            };
            choices.push(Choice::new(state.tokenizer.clone(), settings));
        }
    }
    Ok((requests, choices))
}

/// How many tokens may follow a prompt of `length`; what the client asked for is never cut silently.
fn max_tokens(state: &ServerState, job: &Job, length: usize) -> Result<usize, ApiError> {
    let context = state.limits.max_model_len;
    let room = context.saturating_sub(length);
    let least = job.parameters.min_tokens;
    let (field, wanted) = match job.parameters.max_tokens {
        Some(given) => given,
        // A default is no wish: it gives way to the room there is and to `min_tokens`.
        None if room > 0 && least <= room => {
            return Ok(job.default_max_tokens.map_or(room, |n| n.clamp(least, room)));
        }
        None if room > 0 => ("min_tokens", least),
        None => (job.prompt_field, 1),
    };
    if wanted > room {
        let message = format!(
            "this model's context holds {context} tokens, but {} were asked for: {length} in the prompt and {wanted} to generate",
            length + wanted
        );
        return Err(ApiError::too_long(field, message));
    }
    Ok(wanted)
}
