//! `/v1/completions`.

use super::fields::request;
use super::{ElasticAnswer, Prompts, ResponseFormat, StopReason, Usage};
use serde::{Serialize, Serializer};

request! {
    /// A request for the continuation of prompts.
    CompletionRequest {
        prompt: Option<Prompts>,
        echo: Option<bool>,
        logprobs: Option<i64>,
        best_of: Option<i64>,
        suffix: Option<String>,
        add_special_tokens: Option<bool>,
        response_format: Option<ResponseFormat>,
    }
}

/// A whole answer, or one chunk of a streamed one: both are a `text_completion`.
#[derive(Debug, Serialize)]
pub(in crate::server) struct CompletionAnswer<'a> {
    pub(in crate::server) id: &'a str,
    pub(in crate::server) object: &'static str,
    pub(in crate::server) created: u64,
    pub(in crate::server) model: &'a str,
    pub(in crate::server) system_fingerprint: &'a str,
    pub(in crate::server) choices: Vec<CompletionChoice>,
    /// Outer `None`: no such key; inner: null.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::server) usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::server) elastic: Option<&'a ElasticAnswer>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(in crate::server) struct CompletionChoice {
    pub(in crate::server) index: usize,
    pub(in crate::server) text: String,
    pub(in crate::server) logprobs: Option<CompletionLogprobs>,
    pub(in crate::server) finish_reason: Option<&'static str>,
    pub(in crate::server) stop_reason: Option<StopReason>,
}

/// Four arrays with one entry for each token.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(in crate::server) struct CompletionLogprobs {
    pub(in crate::server) tokens: Vec<String>,
    /// Null for a first prompt token.
    pub(in crate::server) token_logprobs: Vec<Option<f32>>,
    pub(in crate::server) top_logprobs: Vec<Option<TopLogprobs>>,
    /// In characters of the choice's text.
    pub(in crate::server) text_offset: Vec<usize>,
}

/// The likeliest tokens of one position, falling; on the wire an object.
///
/// Written as f32 like the token's own log probability: clients compare the two with `==`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(in crate::server) struct TopLogprobs(pub(in crate::server) Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}
