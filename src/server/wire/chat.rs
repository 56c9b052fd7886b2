//! `/v1/chat/completions`.

use super::fields::request;
use super::{Content, ElasticAnswer, StopReason, Usage};
use serde::{Deserialize, Serialize};
use serde_json::Value;

request! {
    /// A request for the next turn of a conversation.
    ChatRequest {
        // Missing or empty is one mistake, and `validate` names the field.
        #[serde(default)]
        messages: Vec<ChatMessage>,
        max_completion_tokens: Option<i64>,
        logprobs: Option<bool>,
        top_logprobs: Option<i64>,
        // What cannot be served yet is read, so that it can be refused instead of ignored.
        tools: Option<Vec<Value>>,
        tool_choice: Option<Value>,
        functions: Option<Vec<Value>>,
        function_call: Option<Value>,
        response_format: Option<ResponseFormat>,
        modalities: Option<Vec<String>>,
        audio: Option<Value>,
        chat_template: Option<Value>,
        chat_template_kwargs: Option<Value>,
        continue_final_message: Option<bool>,
        /// Whether the template begins the assistant's turn; it does unless told otherwise.
        add_generation_prompt: Option<bool>,
    }
}

#[derive(Debug, Deserialize)]
pub(in crate::server) struct ChatMessage {
    pub(in crate::server) role: String,
    pub(in crate::server) content: Option<Content>,
}

#[derive(Debug, Deserialize)]
pub(in crate::server) struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
}

impl ResponseFormat {
    /// Whether any text will do.
    pub(in crate::server) fn is_text(&self) -> bool {
        self.kind == "text"
    }
}

#[derive(Debug, Serialize)]
pub(in crate::server) struct ChatAnswer<'a> {
    pub(in crate::server) id: &'a str,
    pub(in crate::server) object: &'static str,
    pub(in crate::server) created: u64,
    pub(in crate::server) model: &'a str,
    pub(in crate::server) system_fingerprint: &'a str,
    pub(in crate::server) choices: Vec<ChatChoice>,
    pub(in crate::server) usage: Usage,
    pub(in crate::server) elastic: &'a ElasticAnswer,
}

#[derive(Debug, Serialize)]
pub(in crate::server) struct ChatChoice {
    pub(in crate::server) index: usize,
    pub(in crate::server) message: AnswerMessage,
    pub(in crate::server) logprobs: Option<ChatLogprobs>,
    pub(in crate::server) finish_reason: Option<&'static str>,
    pub(in crate::server) stop_reason: Option<StopReason>,
}

#[derive(Debug, Serialize)]
pub(in crate::server) struct AnswerMessage {
    role: &'static str,
    content: String,
    refusal: Option<String>,
}

impl AnswerMessage {
    pub(in crate::server) fn new(content: String) -> Self {
        Self { role: "assistant", content, refusal: None }
    }
}

#[derive(Debug, Serialize)]
pub(in crate::server) struct ChatChunk<'a> {
    pub(in crate::server) id: &'a str,
    pub(in crate::server) object: &'static str,
    pub(in crate::server) created: u64,
    pub(in crate::server) model: &'a str,
    pub(in crate::server) system_fingerprint: &'a str,
    pub(in crate::server) choices: Vec<ChatChunkChoice>,
    /// Outer `None`: no such key; inner: null.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::server) usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::server) elastic: Option<&'a ElasticAnswer>,
}

#[derive(Debug, Serialize)]
pub(in crate::server) struct ChatChunkChoice {
    pub(in crate::server) index: usize,
    pub(in crate::server) delta: ChatDelta,
    pub(in crate::server) logprobs: Option<ChatLogprobs>,
    pub(in crate::server) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::server) stop_reason: Option<StopReason>,
}

#[derive(Debug, Default, Serialize)]
pub(in crate::server) struct ChatDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::server) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::server) content: Option<String>,
}

#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub(in crate::server) struct ChatLogprobs {
    pub(in crate::server) content: Vec<ChatToken>,
    pub(in crate::server) refusal: Option<Vec<ChatToken>>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(in crate::server) struct ChatToken {
    pub(in crate::server) token: String,
    pub(in crate::server) logprob: f32,
    pub(in crate::server) bytes: Vec<u8>,
    pub(in crate::server) top_logprobs: Vec<ChatTopToken>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(in crate::server) struct ChatTopToken {
    pub(in crate::server) token: String,
    pub(in crate::server) logprob: f32,
    pub(in crate::server) bytes: Vec<u8>,
}
