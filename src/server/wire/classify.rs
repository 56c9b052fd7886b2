//! `/v1/classify`, as vLLM has it, and text pairs.

use super::{ElasticAnswer, ElasticFields, Usage};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use std::fmt;

/// A request to classify texts.
#[derive(Debug, Deserialize)]
pub(in crate::server) struct ClassifyRequest {
    pub(in crate::server) model: Option<String>,
    pub(in crate::server) elastic: Option<ElasticFields>,
    pub(in crate::server) input: Option<Inputs>,
    pub(in crate::server) truncate_prompt_tokens: Option<i64>,
    pub(in crate::server) truncation_side: Option<String>,
    pub(in crate::server) add_special_tokens: Option<bool>,
    pub(in crate::server) use_activation: Option<bool>,
    /// Older names of `use_activation`.
    pub(in crate::server) activation: Option<bool>,
    pub(in crate::server) softmax: Option<bool>,
    /// vLLM's other form of the request, by a chat template.
    pub(in crate::server) messages: Option<Value>,
}

/// `input`: one input, or several in an array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::server) struct Inputs {
    pub(in crate::server) list: Vec<Input>,
    /// It was not in an array.
    pub(in crate::server) single: bool,
}

/// What is classified as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::server) enum Input {
    Text(String),
    Pair(Pair),
    Tokens(Vec<u32>),
}

/// Two texts that are read together, by the names that transformers' pipeline has for them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::server) struct Pair {
    pub(in crate::server) text: String,
    pub(in crate::server) text_pair: Option<String>,
}

impl Inputs {
    /// How messages call the input at this place.
    pub(in crate::server) fn name(&self, at: usize) -> String {
        if self.single { "input".into() } else { format!("input[{at}]") }
    }
}

impl<'de> Deserialize<'de> for Inputs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InputsVisitor;
        impl<'de> Visitor<'de> for InputsVisitor {
            type Value = Inputs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, an object with `text` and `text_pair`, an array of token ids, or an array of these")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Inputs, E> {
                Ok(Inputs { list: vec![Input::Text(text.into())], single: true })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Inputs, A::Error> {
                let pair = Pair::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Inputs { list: vec![Input::Pair(pair)], single: true })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Inputs, A::Error> {
                let (mut list, mut tokens) = (Vec::new(), Vec::new());
                while let Some(element) = seq.next_element()? {
                    match element {
                        Element::Input(input) => list.push(input),
                        Element::Token(token) => tokens.push(token),
                    }
                    if !list.is_empty() && !tokens.is_empty() {
                        return Err(A::Error::custom("token ids and other inputs cannot stand in one array"));
                    }
                }
                let single = !tokens.is_empty();
                Ok(Inputs { list: if single { vec![Input::Tokens(tokens)] } else { list }, single })
            }
        }
        deserializer.deserialize_any(InputsVisitor)
    }
}

/// One element of an `input` array: an input, or a token id of the only one.
enum Element {
    Input(Input),
    Token(u32),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a string, an object with `text` and `text_pair`, a token id or an array of token ids",
                )
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Input(Input::Text(text.into())))
            }

            fn visit_u64<E: Error>(self, id: u64) -> Result<Element, E> {
                let id = u32::try_from(id).map_err(|_| E::custom(format!("{id} is no token id")))?;
                Ok(Element::Token(id))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Element, A::Error> {
                Ok(Element::Input(Input::Pair(Pair::deserialize(MapAccessDeserializer::new(map))?)))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element, A::Error> {
                let mut tokens = Vec::new();
                while let Some(token) = seq.next_element()? {
                    tokens.push(token);
                }
                Ok(Element::Input(Input::Tokens(tokens)))
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

/// The whole answer.
#[derive(Debug, Serialize)]
pub(in crate::server) struct ClassifyAnswer<'a> {
    pub(in crate::server) id: &'a str,
    pub(in crate::server) object: &'static str,
    pub(in crate::server) created: u64,
    pub(in crate::server) model: &'a str,
    pub(in crate::server) data: Vec<ClassifiedInput<'a>>,
    pub(in crate::server) usage: Usage,
    pub(in crate::server) elastic: &'a ElasticAnswer,
}

/// What one input is.
#[derive(Debug, Serialize)]
pub(in crate::server) struct ClassifiedInput<'a> {
    pub(in crate::server) index: usize,
    /// Of the largest output.
    pub(in crate::server) label: Option<&'a str>,
    /// By label: probabilities, or the outputs themselves if the request wants them or they are numbers.
    pub(in crate::server) probs: Vec<f32>,
    pub(in crate::server) num_classes: usize,
}
