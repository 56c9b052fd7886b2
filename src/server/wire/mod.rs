//! The JSON on the wire, as OpenAI's API writes it: what is read and what is written, and nothing else.
//!
//! Reading checks types only; ranges are `validate`'s. Keys that the API requires are always written, as null if
//! there is nothing to say.

mod answer;
mod body;
mod chat;
mod classify;
mod completions;
mod error;
mod fields;
mod models;
mod path;
mod slo;
mod subnetworks;

pub(super) use answer::{ElasticAnswer, StopReason, Usage, logprob_on_wire};
pub(super) use body::read_json;
pub(super) use chat::{
    AnswerMessage, ChatAnswer, ChatChoice, ChatChunk, ChatChunkChoice, ChatDelta, ChatLogprobs, ChatRequest,
    ChatToken, ChatTopToken, ResponseFormat,
};
pub(super) use classify::{ClassifiedInput, ClassifyAnswer, ClassifyRequest, Input, Inputs, Pair};
pub(super) use completions::{
    CompletionAnswer, CompletionChoice, CompletionLogprobs, CompletionRequest, TopLogprobs,
};
pub(super) use error::ApiError;
pub(super) use fields::{Content, ElasticFields, Prompts, Shared, Stop, StreamOptions};
pub(super) use models::{
    Card, CardList, DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest,
};
pub(super) use path::PathId;
pub(super) use slo::Slo;
pub(super) use subnetworks::{RegisterRequest, RemoveQuery, Removed, SubNetworkCard, SubNetworkList};
