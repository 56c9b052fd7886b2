//! Sub-networks as they are registered, listed and removed: a line of catalog.json, and whose it is.

use super::super::served::ServedSubNetwork;
use crate::artifact::CatalogLine;
use crate::supernet::{Evaluation, Latency};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Unknown keys are errors, as in the catalog's file. (`serde(flatten)` would lose the path of an error.)
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::server) struct RegisterRequest {
    pub(in crate::server) model: Option<String>,
    /// Whether the catalog's file is to have it too.
    pub(in crate::server) persist: Option<bool>,
    name: String,
    choices: Vec<usize>,
    parameters: Option<u64>,
    macs: Option<u64>,
    #[serde(default)]
    scores: BTreeMap<String, f64>,
    #[serde(default)]
    evaluations: Vec<Evaluation>,
    #[serde(default)]
    latency: BTreeMap<String, Latency>,
}

impl RegisterRequest {
    /// The sub-network, nothing checked but its types.
    pub(in crate::server) fn into_line(self) -> CatalogLine {
        let Self { name, choices, parameters, macs, scores, evaluations, latency, .. } = self;
        CatalogLine { name, choices, parameters, macs, scores, evaluations, latency }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::server) struct RemoveQuery {
    pub(in crate::server) persist: Option<bool>,
}

#[derive(Debug, Serialize)]
pub(in crate::server) struct Removed<'a> {
    pub(in crate::server) id: &'a str,
    pub(in crate::server) object: &'static str,
    pub(in crate::server) deleted: bool,
}

#[derive(Debug, Serialize)]
pub(in crate::server) struct SubNetworkList<'a> {
    pub(in crate::server) object: &'static str,
    pub(in crate::server) data: Vec<SubNetworkCard<'a>>,
}

/// One registered sub-network.
#[derive(Debug, Serialize)]
pub(in crate::server) struct SubNetworkCard<'a> {
    id: &'a str,
    object: &'static str,
    model: &'a str,
    #[serde(flatten)]
    line: CatalogLine,
}

impl<'a> SubNetworkCard<'a> {
    pub(in crate::server) fn new(model: &'a str, sub_network: &'a ServedSubNetwork) -> Self {
        let line = CatalogLine::of(&sub_network.entry);
        Self { id: &sub_network.label, object: "subnetwork", model, line }
    }
}
