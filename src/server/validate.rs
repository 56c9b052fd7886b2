//! Ranges of a request's parameters, each with an error that names the field.
//!
//! Invariant: nothing is allocated in proportion to a number that has not been checked here.

use super::wire::{ApiError, ChatRequest, ClassifyRequest, CompletionRequest, Shared, Stop};
use crate::generation::Sampling;
use crate::text::{Message, Truncation};
use std::sync::Arc;
use std::time::Duration;

const MOST_STOPS: usize = 16;
const LONGEST_STOP: usize = 256;
const MOST_BIASES: usize = 1024;
const MOST_LOGPROBS: i64 = 20;
const MOST_STOP_TOKENS: usize = 128;
const LONGEST_SALT: usize = 256;
const MOST_MESSAGES: usize = 4096;

/// What every server bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Prompt and answer together, in tokens.
    pub max_model_len: usize,
    /// Token ids from here on are refused: the smaller of the tokenizer's and the model's vocabulary.
    pub vocabulary: usize,
    /// Sequences that may run or wait at the same time, over all requests.
    pub max_sequences: usize,
    /// Prompts of one request.
    pub max_prompts: usize,
    /// Answers to one prompt.
    pub max_n: usize,
    /// Sub-networks that can be asked for, all super-adapters together; those of the catalogs always are.
    pub max_sub_networks: usize,
    /// Bytes of a body.
    pub max_body: usize,
    /// Entries of prompt log probabilities in one answer, the alternatives counted.
    pub max_prompt_logprobs: usize,
    /// How long a connection may take for the head of its next request.
    pub head_timeout: Duration,
    /// How long a client may leave an answer unread before its connection is cut.
    pub stall_timeout: Duration,
}

impl Limits {
    pub fn new(max_model_len: usize, vocabulary: usize, max_sequences: usize) -> Self {
        Self {
            max_model_len,
            vocabulary,
            max_sequences,
            max_prompts: 128,
            max_n: 16,
            max_sub_networks: 1024,
            max_body: 2 << 20,
            max_prompt_logprobs: 1 << 20,
            head_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(60),
        }
    }
}

/// Checked parameters of either endpoint.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Parameters {
    pub(super) sampling: Sampling,
    pub(super) n: usize,
    /// The name under which the client gave it, for messages, and the number.
    pub(super) max_tokens: Option<(&'static str, usize)>,
    pub(super) min_tokens: usize,
    pub(super) stop: Vec<String>,
    pub(super) stop_tokens: Vec<u32>,
    pub(super) ignore_eos: bool,
    /// The likeliest tokens to report for each generated one; `None` for no log probabilities.
    pub(super) logprobs: Option<usize>,
    pub(super) stream: Option<StreamMode>,
    pub(super) cache_salt: Option<Arc<str>>,
}

/// How a streamed answer reports usage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct StreamMode {
    pub(super) usage: bool,
    /// Also on every chunk.
    pub(super) continuous: bool,
}

/// Checked parameters of a classification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClassifyParameters {
    pub(super) truncation: Option<Truncation>,
    /// Whether outputs become probabilities.
    pub(super) activate: bool,
    /// Whether the tokenizer adds its own tokens.
    pub(super) add_special: bool,
}

/// Checks the fields of `/v1/classify`.
pub(super) fn classify(request: &ClassifyRequest, limits: &Limits) -> Result<ClassifyParameters, ApiError> {
    if request.messages.as_ref().is_some_and(|m| !m.is_null()) {
        return Err(ApiError::invalid("messages", "messages are not supported here; send `input`".into()));
    }
    if request.elastic.as_ref().is_some_and(|e| e.max_tpot_ms.is_some()) {
        let message = "elastic.max_tpot_ms is about generated tokens, of which a classification has none; \
                       elastic.max_ttft_ms bounds it as a whole";
        return Err(ApiError::invalid("elastic.max_tpot_ms", message.into()));
    }
    let field = "truncate_prompt_tokens";
    let most = match integer(field, request.truncate_prompt_tokens, -1, limits.max_model_len as i64)? {
        Some(0) => {
            return Err(ApiError::invalid(
                field,
                format!("{field} must be at least 1, or -1 for all that fit"),
            ));
        }
        Some(most) => Some(usize::try_from(most).unwrap_or(limits.max_model_len)),
        None => None,
    };
    let from_left = match request.truncation_side.as_deref() {
        None | Some("right") => false,
        Some("left") => true,
        Some(_) => {
            return Err(ApiError::invalid("truncation_side", "truncation_side must be left or right".into()));
        }
    };
    let flags = [
        ("use_activation", request.use_activation),
        ("activation", request.activation),
        ("softmax", request.softmax),
    ];
    let mut given = flags.into_iter().filter_map(|(name, value)| Some((name, value?)));
    let (first, activate) = given.next().unwrap_or(("use_activation", true));
    if let Some((other, _)) = given.find(|(_, value)| *value != activate) {
        return Err(ApiError::invalid(other, format!("{other} contradicts {first}, which means the same")));
    }
    let truncation = most.map(|most| Truncation { most, from_left });
    Ok(ClassifyParameters { truncation, activate, add_special: request.add_special_tokens.unwrap_or(true) })
}

/// Checks the fields that only `/v1/completions` has and the shared ones.
pub(super) fn completion(
    request: &CompletionRequest,
    shared: &Shared,
    limits: &Limits,
) -> Result<Parameters, ApiError> {
    if request.suffix.as_deref().is_some_and(|s| !s.is_empty()) {
        return Err(ApiError::invalid("suffix", "suffix is not supported by this model".into()));
    }
    if request.response_format.as_ref().is_some_and(|f| !f.is_text()) {
        return Err(unsupported("response_format"));
    }
    let mut parameters = shared_fields(shared, limits)?;
    parameters.logprobs = integer("logprobs", request.logprobs, 0, MOST_LOGPROBS)?.map(|n| n as usize);
    if let Some(best_of) = request.best_of
        && best_of != parameters.n as i64
    {
        let message =
            format!("best_of is only supported where it equals n: got {best_of} and {}", parameters.n);
        return Err(ApiError::invalid("best_of", message));
    }
    check_min_tokens(&parameters)?;
    Ok(parameters)
}

/// The same for `/v1/chat/completions`.
pub(super) fn chat(request: &ChatRequest, shared: &Shared, limits: &Limits) -> Result<Parameters, ApiError> {
    refuse_unsupported(request)?;
    let mut parameters = shared_fields(shared, limits)?;
    let longest = limits.max_model_len as i64;
    if let Some(n) = integer("max_completion_tokens", request.max_completion_tokens, 1, longest)? {
        parameters.max_tokens = Some(("max_completion_tokens", n as usize));
    } else if parameters.max_tokens == Some(("max_tokens", 0)) {
        return Err(ApiError::invalid("max_tokens", "max_tokens must be at least 1, got 0".into()));
    }
    let top = integer("top_logprobs", request.top_logprobs, 0, MOST_LOGPROBS)?;
    let wanted = request.logprobs.unwrap_or(false);
    if top.is_some_and(|n| n > 0) && !wanted {
        return Err(ApiError::invalid("top_logprobs", "top_logprobs needs `logprobs: true`".into()));
    }
    parameters.logprobs = wanted.then(|| top.unwrap_or(0) as usize);
    check_min_tokens(&parameters)?;
    Ok(parameters)
}

/// The conversation for the template.
pub(super) fn messages(request: &mut ChatRequest) -> Result<Vec<Message>, ApiError> {
    let given = std::mem::take(&mut request.messages);
    if given.is_empty() || given.len() > MOST_MESSAGES {
        let message = format!("messages must hold 1 to {MOST_MESSAGES} messages, got {}", given.len());
        return Err(ApiError::invalid("messages", message));
    }
    let checked = given.into_iter().enumerate().map(|(at, message)| {
        let role = match message.role.as_str() {
            // The name that newer clients give to the system's role.
            "developer" => "system",
            "system" | "user" | "assistant" => message.role.as_str(),
            _ => {
                let field = format!("messages[{at}].role");
                let expected = "must be system, developer, user or assistant";
                return Err(ApiError::invalid(&field, format!("{field} {expected}")));
            }
        };
        let Some(content) = message.content else {
            let field = format!("messages[{at}].content");
            return Err(ApiError::invalid(&field, format!("{field} is missing")));
        };
        Ok(Message { role: role.into(), content: content.0 })
    });
    checked.collect()
}

fn refuse_unsupported(request: &ChatRequest) -> Result<(), ApiError> {
    let given = |list: &Option<Vec<serde_json::Value>>| list.as_ref().is_some_and(|l| !l.is_empty());
    let refused = [
        ("tools", given(&request.tools)),
        ("tool_choice", request.tool_choice.as_ref().is_some_and(|c| c != "none" && c != "auto")),
        ("functions", given(&request.functions)),
        ("function_call", request.function_call.as_ref().is_some_and(|c| c != "none" && c != "auto")),
        ("response_format", request.response_format.as_ref().is_some_and(|f| !f.is_text())),
        ("modalities", request.modalities.as_ref().is_some_and(|m| m.iter().any(|kind| kind != "text"))),
        ("audio", request.audio.is_some()),
        ("chat_template", request.chat_template.is_some()),
        ("continue_final_message", request.continue_final_message.unwrap_or(false)),
        (
            "chat_template_kwargs",
            request.chat_template_kwargs.as_ref().is_some_and(|k| k != &serde_json::json!({})),
        ),
    ];
    match refused.into_iter().find(|(_, refused)| *refused) {
        Some((field, _)) => Err(unsupported(field)),
        None => Ok(()),
    }
}

fn unsupported(field: &str) -> ApiError {
    ApiError::invalid(field, format!("{field} is not supported with this value"))
}

fn shared_fields(shared: &Shared, limits: &Limits) -> Result<Parameters, ApiError> {
    if let Some(field) = shared.unsupported {
        return Err(unsupported(field));
    }
    let longest = limits.max_model_len as i64;
    let stream = shared.stream.unwrap_or(false);
    if shared.stream_options.is_some() && !stream {
        return Err(ApiError::invalid("stream_options", "stream_options needs `stream: true`".into()));
    }
    let options = shared.stream_options.unwrap_or_default();
    let (usage, continuous) = (options.include_usage, options.continuous_usage_stats);
    let mode = StreamMode { usage: usage.unwrap_or(false), continuous: continuous.unwrap_or(false) };
    Ok(Parameters {
        sampling: sampling(shared, limits.vocabulary)?,
        n: integer("n", shared.n, 1, limits.max_n as i64)?.unwrap_or(1) as usize,
        max_tokens: integer("max_tokens", shared.max_tokens, 0, longest)?.map(|n| ("max_tokens", n as usize)),
        min_tokens: integer("min_tokens", shared.min_tokens, 0, longest)?.unwrap_or(0) as usize,
        stop: stops(shared.stop.as_ref())?,
        stop_tokens: stop_tokens(shared.stop_token_ids.as_deref(), limits.vocabulary)?,
        ignore_eos: shared.ignore_eos.unwrap_or(false),
        logprobs: None,
        stream: stream.then_some(mode),
        cache_salt: cache_salt(shared.cache_salt.as_deref())?,
    })
}

fn cache_salt(salt: Option<&str>) -> Result<Option<Arc<str>>, ApiError> {
    match salt.map(str::len) {
        Some(0) => Err(ApiError::invalid("cache_salt", "cache_salt must not be empty".into())),
        Some(bytes) if bytes > LONGEST_SALT => {
            let message = format!("cache_salt may be at most {LONGEST_SALT} bytes long, got {bytes}");
            Err(ApiError::invalid("cache_salt", message))
        }
        _ => Ok(salt.map(Arc::from)),
    }
}

fn check_min_tokens(parameters: &Parameters) -> Result<(), ApiError> {
    match parameters.max_tokens {
        Some((field, most)) if parameters.min_tokens > most => {
            let message = format!("min_tokens {} is above {field} {most}", parameters.min_tokens);
            Err(ApiError::invalid("min_tokens", message))
        }
        _ => Ok(()),
    }
}

fn sampling(shared: &Shared, vocabulary: usize) -> Result<Sampling, ApiError> {
    let top_k = integer("top_k", shared.top_k, -1, i64::from(u32::MAX))?.unwrap_or(0);
    Ok(Sampling {
        temperature: real("temperature", shared.temperature, 1.0, (0.0, 2.0))?,
        top_p: above_zero("top_p", real("top_p", shared.top_p, 1.0, (0.0, 1.0))?)?,
        // -1 and 0 both mean all, as clients of other servers write it.
        top_k: usize::try_from(top_k).unwrap_or(0),
        min_p: real("min_p", shared.min_p, 0.0, (0.0, 1.0))?,
        frequency_penalty: real("frequency_penalty", shared.frequency_penalty, 0.0, (-2.0, 2.0))?,
        presence_penalty: real("presence_penalty", shared.presence_penalty, 0.0, (-2.0, 2.0))?,
        repetition_penalty: above_zero(
            "repetition_penalty",
            real("repetition_penalty", shared.repetition_penalty, 1.0, (0.0, 100.0))?,
        )?,
        logit_bias: logit_bias(shared, vocabulary)?,
        seed: shared.seed.map_or_else(rand::random, i64::cast_unsigned),
    })
}

fn logit_bias(shared: &Shared, vocabulary: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let given = shared.logit_bias.iter().flatten();
    let wrong = |message: String| ApiError::invalid("logit_bias", message);
    if shared.logit_bias.as_ref().is_some_and(|bias| bias.len() > MOST_BIASES) {
        return Err(wrong(format!("logit_bias may name at most {MOST_BIASES} tokens")));
    }
    let entry = |(token, &bias): (&String, &f64)| {
        let id = token.parse::<u32>().ok().filter(|&id| (id as usize) < vocabulary);
        let id =
            id.ok_or_else(|| wrong(format!("logit_bias: a key must be a token id below {vocabulary}")))?;
        if !(bias.is_finite() && (-100.0..=100.0).contains(&bias)) {
            return Err(wrong(format!("logit_bias of token {id} must be between -100 and 100, got {bias}")));
        }
        Ok((id, bias as f32))
    };
    given.map(entry).collect()
}

fn stops(stop: Option<&Stop>) -> Result<Vec<String>, ApiError> {
    let stops = stop.map(|s| s.0.clone()).unwrap_or_default();
    if stops.len() > MOST_STOPS {
        let message = format!("stop may hold at most {MOST_STOPS} strings, got {}", stops.len());
        return Err(ApiError::invalid("stop", message));
    }
    if stops.iter().any(|s| s.is_empty() || s.len() > LONGEST_STOP) {
        let message = format!("each stop string must have 1 to {LONGEST_STOP} bytes");
        return Err(ApiError::invalid("stop", message));
    }
    Ok(stops)
}

fn stop_tokens(ids: Option<&[i64]>, vocabulary: usize) -> Result<Vec<u32>, ApiError> {
    let ids = ids.unwrap_or_default();
    let known = |&id: &i64| u32::try_from(id).ok().filter(|&id| (id as usize) < vocabulary);
    let checked = ids.iter().map(known).collect::<Option<Vec<_>>>();
    match checked {
        Some(checked) if checked.len() <= MOST_STOP_TOKENS => Ok(checked),
        _ => {
            let message =
                format!("stop_token_ids may hold at most {MOST_STOP_TOKENS} token ids below {vocabulary}");
            Err(ApiError::invalid("stop_token_ids", message))
        }
    }
}

fn integer(field: &str, value: Option<i64>, least: i64, most: i64) -> Result<Option<i64>, ApiError> {
    match value {
        Some(v) if !(least..=most).contains(&v) => {
            Err(ApiError::invalid(field, format!("{field} must be between {least} and {most}, got {v}")))
        }
        other => Ok(other),
    }
}

fn real(field: &str, value: Option<f64>, default: f64, (least, most): (f64, f64)) -> Result<f32, ApiError> {
    let value = value.unwrap_or(default);
    if !(value.is_finite() && (least..=most).contains(&value)) {
        return Err(ApiError::invalid(
            field,
            format!("{field} must be between {least} and {most}, got {value}"),
        ));
    }
    Ok(value as f32)
}

/// Zero is out of the range, also where a tiny number became zero in f32.
fn above_zero(field: &str, value: f32) -> Result<f32, ApiError> {
    if value > 0.0 { Ok(value) } else { Err(ApiError::invalid(field, format!("{field} must be above 0"))) }
}
