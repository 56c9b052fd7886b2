//! Model cards, and text to tokens and back.

use super::super::served::{ServedModel, ServedSubNetwork};
use crate::supernet::Latency;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Debug, Serialize)]
pub(in crate::server) struct CardList<'a> {
    pub(in crate::server) object: &'static str,
    pub(in crate::server) data: Vec<Card<'a>>,
}

/// One card of `/v1/models`: a super-adapter, which stands for its default sub-network, or one sub-network.
#[derive(Debug, Serialize)]
pub(in crate::server) struct Card<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: &'a str,
    parent: Option<&'a str>,
    max_model_len: usize,
    /// `generate` or `classify`.
    task: &'static str,
    /// Of a super-adapter that classifies: what each of `probs` is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    labels: Option<&'a [String]>,
    elastic: CardElastic<'a>,
}

#[derive(Debug, Serialize)]
struct CardElastic<'a> {
    subnetwork: &'a str,
    parameters: u64,
    macs: u64,
    scores: &'a BTreeMap<String, f64>,
    latency: &'a BTreeMap<String, Latency>,
}

impl<'a> Card<'a> {
    /// The card of `model` itself or of one of its sub-networks. `None` if it has no default sub-network.
    pub(in crate::server) fn new(
        model: &'a ServedModel,
        sub_network: Option<&'a ServedSubNetwork>,
        created: u64,
        max_model_len: usize,
    ) -> Option<Self> {
        let shown = sub_network.or_else(|| model.get(&model.default).map(|s| &**s))?;
        let classes = model.classes.as_deref();
        Some(Self {
            id: sub_network.map_or(&model.name, |s| &s.label),
            object: "model",
            created,
            owned_by: "lonas",
            root: &model.base,
            parent: sub_network.map(|_| model.name.as_str()),
            max_model_len,
            task: if classes.is_some() { "classify" } else { "generate" },
            labels: classes.filter(|_| sub_network.is_none()).map(|c| c.names.as_slice()),
            elastic: CardElastic {
                subnetwork: &shown.entry.name,
                parameters: shown.entry.cost.parameters,
                macs: shown.entry.cost.macs,
                scores: &shown.entry.scores,
                latency: &shown.entry.latency,
            },
        })
    }
}

#[derive(Debug, Deserialize)]
pub(in crate::server) struct TokenizeRequest {
    pub(in crate::server) prompt: String,
    pub(in crate::server) add_special_tokens: Option<bool>,
}

#[derive(Debug, Serialize)]
pub(in crate::server) struct TokenizeAnswer {
    pub(in crate::server) tokens: Vec<u32>,
    pub(in crate::server) count: usize,
    pub(in crate::server) max_model_len: usize,
}

#[derive(Debug, Deserialize)]
pub(in crate::server) struct DetokenizeRequest {
    pub(in crate::server) tokens: Vec<u32>,
}

#[derive(Debug, Serialize)]
pub(in crate::server) struct DetokenizeAnswer {
    pub(in crate::server) prompt: String,
}
