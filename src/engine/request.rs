//! What the engine is asked for and what it answers. Token ids only: the engine never sees text.

use crate::backend::Selection;
use crate::generation::Sampling;
use std::sync::Arc;
use std::time::Instant;

/// One sequence to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// At least one token; the server has checked that prompt and `max_tokens` fit the context together.
    pub prompt: Vec<u32>,
    pub selection: Selection,
    pub sampling: Sampling,
    /// Tokens to generate at most; 0 computes the prompt only.
    pub max_tokens: usize,
    /// Before as many generated tokens, no token of `stop_tokens` ends the sequence (nor is sampled).
    pub min_tokens: usize,
    /// Tokens that end the sequence, e.g. end of text; empty to ignore them all.
    pub stop_tokens: Vec<u32>,
    /// `Some(n)`: report each generated token's log probability and the `n` likeliest tokens.
    pub logprobs: Option<usize>,
    /// `Some(n)`: the same for each prompt token. It is computed whole then, whatever is in the cache.
    pub prompt_logprobs: Option<usize>,
    /// Only requests with the same one begin with what others of them have computed, so that nobody can tell by the time what
    /// somebody else has asked.
    pub cache_salt: Option<Arc<str>>,
}

/// A token's log probability under the model's own distribution (before temperature and the like), natural log.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    pub token: u32,
    pub logprob: f32,
    /// The likeliest tokens, falling; as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Finish {
    /// A stop token was generated (it is the last `Token` event).
    Stop(u32),
    /// `max_tokens` reached.
    Length,
    /// The engine is shutting down or the step failed; `Event::Failed` says why.
    Failed,
}

/// What happens to a submitted sequence, in this order: `Started` once, `Prompt` once if asked for, `Token`s, then `Finished`.
#[derive(Debug, Clone)]
pub enum Event {
    /// It has its first share of a step; so many tokens of its prompt were in the cache already.
    Started {
        cached: usize,
    },
    /// Log probabilities of prompt tokens `1..`; the first has none.
    Prompt(Vec<TokenLogprob>),
    /// One generated token; `logprob` if asked for.
    Token {
        token: u32,
        logprob: Option<TokenLogprob>,
        at: Instant,
    },
    Finished(Finish),
    /// The sequence could not be computed; the last event.
    Failed(String),
}

/// Why a sequence was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SubmitError {
    /// As many sequences as may run and wait together are there already.
    QueueFull { limit: usize },
    /// The sequence could never fit into the key-value pool.
    TooLong { tokens: usize, limit: usize },
    /// The engine drains or has stopped.
    Stopped,
}
