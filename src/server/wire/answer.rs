//! Parts that several answers share.

use serde::Serialize;
use serde_json::Value;

/// Tokens that went in and came out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(in crate::server) struct Usage {
    pub(in crate::server) prompt_tokens: usize,
    pub(in crate::server) completion_tokens: usize,
    pub(in crate::server) total_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::server) prompt_tokens_details: Option<PromptTokensDetails>,
}

/// How many tokens of the prompt did not have to be computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(in crate::server) struct PromptTokensDetails {
    pub(in crate::server) cached_tokens: usize,
}

impl Usage {
    pub(in crate::server) fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        let total_tokens = prompt_tokens + completion_tokens;
        Self { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details: None }
    }

    pub(in crate::server) fn with_cached(self, cached_tokens: usize) -> Self {
        Self { prompt_tokens_details: Some(PromptTokensDetails { cached_tokens }), ..self }
    }
}

/// Which sub-network answered and why.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(in crate::server) struct ElasticAnswer {
    /// The name or the bounds that the request gave; null for none.
    pub(in crate::server) requested: Value,
    pub(in crate::server) served: String,
    /// `model`, `elastic`, `default`, `accuracy` or `latency`.
    pub(in crate::server) reason: &'static str,
}

/// What stopped a sequence, where it was asked for: the string or the token id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(in crate::server) enum StopReason {
    Text(String),
    Token(u32),
}

/// JSON has no infinity; impossible tokens get a number that is low enough, as in other servers.
pub(in crate::server) fn logprob_on_wire(logprob: f32) -> f32 {
    const LOWEST: f32 = -9999.0;
    if logprob.is_nan() { LOWEST } else { logprob.max(LOWEST) }
}
