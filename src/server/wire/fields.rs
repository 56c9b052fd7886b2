//! Fields that several requests share, and values that JSON may write in more than one way.

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;

/// The fields that `/v1/completions` and `/v1/chat/completions` have in common, as they came.
///
/// Integers are read as `i64` so that a negative one is told its range, not its type.
#[derive(Debug, Clone, Default, PartialEq)]
pub(in crate::server) struct Shared {
    pub(in crate::server) model: Option<String>,
    pub(in crate::server) elastic: Option<ElasticFields>,
    pub(in crate::server) max_tokens: Option<i64>,
    pub(in crate::server) min_tokens: Option<i64>,
    pub(in crate::server) temperature: Option<f64>,
    pub(in crate::server) top_p: Option<f64>,
    pub(in crate::server) top_k: Option<i64>,
    pub(in crate::server) min_p: Option<f64>,
    pub(in crate::server) frequency_penalty: Option<f64>,
    pub(in crate::server) presence_penalty: Option<f64>,
    pub(in crate::server) repetition_penalty: Option<f64>,
    pub(in crate::server) logit_bias: Option<BTreeMap<String, f64>>,
    pub(in crate::server) seed: Option<i64>,
    pub(in crate::server) n: Option<i64>,
    pub(in crate::server) stop: Option<Stop>,
    pub(in crate::server) stop_token_ids: Option<Vec<i64>>,
    pub(in crate::server) ignore_eos: Option<bool>,
    pub(in crate::server) stream: Option<bool>,
    pub(in crate::server) stream_options: Option<StreamOptions>,
    pub(in crate::server) cache_salt: Option<String>,
    /// A field that asks for what cannot be served yet.
    pub(in crate::server) unsupported: Option<&'static str>,
}

/// The first field that asks for something. Clients that write everything out send null, false or nothing in a list.
pub(super) fn first_asked(fields: &[(&'static str, &Option<Value>)]) -> Option<&'static str> {
    let idle = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    fields.iter().find(|(_, value)| value.as_ref().is_some_and(|v| !idle(v))).map(|(name, _)| *name)
}

/// Declares a request with its own fields and the shared ones. (`serde(flatten)` would lose the path of an error.)
macro_rules! request {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, serde::Deserialize)]
        pub(in crate::server) struct $name {
            $($(#[$field_meta])* pub(in crate::server) $field: $type,)*
            model: Option<String>,
            elastic: Option<$crate::server::wire::ElasticFields>,
            max_tokens: Option<i64>,
            min_tokens: Option<i64>,
            temperature: Option<f64>,
            top_p: Option<f64>,
            top_k: Option<i64>,
            min_p: Option<f64>,
            frequency_penalty: Option<f64>,
            presence_penalty: Option<f64>,
            repetition_penalty: Option<f64>,
            logit_bias: Option<std::collections::BTreeMap<String, f64>>,
            seed: Option<i64>,
            n: Option<i64>,
            stop: Option<$crate::server::wire::Stop>,
            stop_token_ids: Option<Vec<i64>>,
            ignore_eos: Option<bool>,
            stream: Option<bool>,
            stream_options: Option<$crate::server::wire::StreamOptions>,
            cache_salt: Option<String>,
            // These would change the answer, so they are read and refused instead of ignored.
            truncate_prompt_tokens: Option<serde_json::Value>,
            allowed_token_ids: Option<serde_json::Value>,
            bad_words: Option<serde_json::Value>,
            include_stop_str_in_output: Option<serde_json::Value>,
            structured_outputs: Option<serde_json::Value>,
            use_beam_search: Option<serde_json::Value>,
            skip_special_tokens: Option<bool>,
            prompt_logprobs: Option<serde_json::Value>,
            // As older versions of vLLM and llama.cpp call structured outputs.
            guided_json: Option<serde_json::Value>,
            guided_regex: Option<serde_json::Value>,
            guided_choice: Option<serde_json::Value>,
            guided_grammar: Option<serde_json::Value>,
            json_schema: Option<serde_json::Value>,
            grammar: Option<serde_json::Value>,
        }

        impl $name {
            /// Takes the shared fields out.
            pub(in crate::server) fn take_shared(&mut self) -> $crate::server::wire::Shared {
                $crate::server::wire::Shared {
                    model: self.model.take(),
                    elastic: self.elastic.take(),
                    max_tokens: self.max_tokens,
                    min_tokens: self.min_tokens,
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    frequency_penalty: self.frequency_penalty,
                    presence_penalty: self.presence_penalty,
                    repetition_penalty: self.repetition_penalty,
                    logit_bias: self.logit_bias.take(),
                    seed: self.seed,
                    n: self.n,
                    stop: self.stop.take(),
                    stop_token_ids: self.stop_token_ids.take(),
                    ignore_eos: self.ignore_eos,
                    stream: self.stream,
                    stream_options: self.stream_options.take(),
                    cache_salt: self.cache_salt.take(),
                    unsupported: $crate::server::wire::fields::first_asked(&[
                        ("truncate_prompt_tokens", &self.truncate_prompt_tokens),
                        ("allowed_token_ids", &self.allowed_token_ids),
                        ("bad_words", &self.bad_words),
                        ("include_stop_str_in_output", &self.include_stop_str_in_output),
                        ("structured_outputs", &self.structured_outputs),
                        ("use_beam_search", &self.use_beam_search),
                        ("skip_special_tokens", &self.skip_special_tokens.map(|skip| (!skip).into())),
                        ("prompt_logprobs", &self.prompt_logprobs),
                        ("guided_json", &self.guided_json),
                        ("guided_regex", &self.guided_regex),
                        ("guided_choice", &self.guided_choice),
                        ("guided_grammar", &self.guided_grammar),
                        ("json_schema", &self.json_schema),
                        ("grammar", &self.grammar),
                    ]),
                }
            }
        }
    };
}
pub(super) use request;

/// `elastic`: which sub-network, or what it must keep. Unknown keys are errors: to ignore one would be to serve
/// something else than was asked for.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::server) struct ElasticFields {
    pub(in crate::server) subnetwork: Option<String>,
    pub(in crate::server) min_accuracy: Option<f64>,
    pub(in crate::server) max_tpot_ms: Option<f64>,
    pub(in crate::server) max_ttft_ms: Option<f64>,
    pub(in crate::server) deadline_ms: Option<f64>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(in crate::server) struct StreamOptions {
    pub(in crate::server) include_usage: Option<bool>,
    pub(in crate::server) continuous_usage_stats: Option<bool>,
}

/// `stop`: one string or several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::server) struct Stop(pub(in crate::server) Vec<String>);

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StopVisitor;
        impl<'de> Visitor<'de> for StopVisitor {
            type Value = Stop;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of strings")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Stop, E> {
                Ok(Stop(vec![text.into()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Stop, A::Error> {
                let mut stops = Vec::new();
                while let Some(stop) = seq.next_element()? {
                    stops.push(stop);
                }
                Ok(Stop(stops))
            }
        }
        deserializer.deserialize_any(StopVisitor)
    }
}

/// `prompt`: a text, several, token ids, or several lists of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::server) enum Prompts {
    Texts(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

impl Prompts {
    pub(in crate::server) fn len(&self) -> usize {
        match self {
            Self::Texts(texts) => texts.len(),
            Self::Tokens(tokens) => tokens.len(),
        }
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptsVisitor)
    }
}

struct PromptsVisitor;

impl<'de> Visitor<'de> for PromptsVisitor {
    type Value = Prompts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, an array of strings, an array of token ids or an array of arrays of token ids")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts::Texts(vec![text.into()]))
    }

    /// The first element says what all are.
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompts, A::Error> {
        let Some(first) = seq.next_element::<Element>()? else { return Ok(Prompts::Texts(Vec::new())) };
        let mixed =
            || A::Error::custom("the array must hold only strings, only token ids or only arrays of them");
        match first {
            Element::Text(text) => {
                let mut texts = vec![text];
                while let Some(element) = seq.next_element()? {
                    let Element::Text(text) = element else { return Err(mixed()) };
                    texts.push(text);
                }
                Ok(Prompts::Texts(texts))
            }
            Element::Token(token) => {
                let mut tokens = vec![token];
                while let Some(element) = seq.next_element()? {
                    let Element::Token(token) = element else { return Err(mixed()) };
                    tokens.push(token);
                }
                Ok(Prompts::Tokens(vec![tokens]))
            }
            Element::Tokens(first) => {
                let mut lists = vec![first];
                while let Some(element) = seq.next_element()? {
                    let Element::Tokens(tokens) = element else { return Err(mixed()) };
                    lists.push(tokens);
                }
                Ok(Prompts::Tokens(lists))
            }
        }
    }
}

/// One element of a `prompt` array.
enum Element {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or an array of token ids")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.into()))
            }

            fn visit_u64<E: Error>(self, id: u64) -> Result<Element, E> {
                let id = u32::try_from(id).map_err(|_| E::custom(format!("{id} is no token id")))?;
                Ok(Element::Token(id))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element, A::Error> {
                let mut tokens = Vec::new();
                while let Some(token) = seq.next_element()? {
                    tokens.push(token);
                }
                Ok(Element::Tokens(tokens))
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

/// A message's `content`: a text or parts, of which only text ones can be served, each a line of its own as in vLLM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::server) struct Content(pub(in crate::server) String);

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of text parts")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content(text.into()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
                let mut all = Vec::new();
                while let Some(part) = seq.next_element::<Part>()? {
                    match (part.kind.as_str(), part.text) {
                        ("text", Some(text)) => all.push(text),
                        ("text", None) => return Err(A::Error::missing_field("text")),
                        (_, _) => return Err(A::Error::custom("only parts of type `text` can be served")),
                    }
                }
                Ok(Content(all.join("\n")))
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}
