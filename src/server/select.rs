//! Which sub-network a request asks for; never a silent fall-back.
//!
//! First the names (an unknown one ends the request before anything costs time), then, once the prompt's length is
//! known, wishes for accuracy or latency, answered from the catalog's measurements.

use super::served::{ServedModel, ServedModels, ServedSubNetwork};
use super::wire::{ApiError, ElasticAnswer, ElasticFields};
use crate::supernet::Latency;
use serde_json::{Value, json};
use std::sync::Arc;

/// What a request asks for, its names resolved.
#[derive(Debug)]
pub(super) struct Wish<'a> {
    model: &'a ServedModel,
    machine: Option<&'a str>,
    kind: Kind<'a>,
}

#[derive(Debug)]
enum Kind<'a> {
    Named { sub_network: &'a Arc<ServedSubNetwork>, requested: Value, reason: &'static str },
    Measured(Bounds),
}

/// Bounds that a sub-network must keep.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Bounds {
    min_accuracy: Option<f64>,
    max_tpot_ms: Option<f64>,
    max_ttft_ms: Option<f64>,
    deadline_ms: Option<f64>,
}

/// Tokens by which bounds are kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lengths {
    pub(super) prompt: usize,
    /// At most; `None` for as many as fit.
    pub(super) answer: Option<usize>,
}

/// The sub-network that will answer.
#[derive(Debug, Clone)]
pub(super) struct Chosen {
    pub(super) sub_network: Arc<ServedSubNetwork>,
    pub(super) fingerprint: String,
    pub(super) answer: ElasticAnswer,
}

impl<'a> Wish<'a> {
    /// Resolves the names in `model` and `elastic`.
    pub(super) fn new(
        models: &'a ServedModels,
        model: Option<&str>,
        elastic: Option<&ElasticFields>,
    ) -> Result<Self, ApiError> {
        let (served, by_model) = match model {
            None => (&models.models()[0], None),
            Some(id) => find_model(models, id)?,
        };
        let by_elastic = elastic.and_then(|e| e.subnetwork.as_deref());
        let by_elastic = by_elastic.map(|name| find_sub_network(served, name, "elastic.subnetwork"));
        let by_elastic = by_elastic.transpose()?;
        let bounds = elastic.map(Bounds::new).transpose()?.unwrap_or_default();
        let named = match (by_model, by_elastic) {
            (Some(one), Some(two)) if one.entry.name != two.entry.name => {
                return Err(contradiction(&format!(
                    "`model` names {}, `elastic.subnetwork` {}",
                    one.entry.name, two.entry.name
                )));
            }
            (Some(one), _) => Some((one, "model")),
            (None, Some(two)) => Some((two, "elastic")),
            (None, None) => None,
        };
        let kind = match named {
            Some((one, _)) if bounds != Bounds::default() => {
                return Err(contradiction(&format!(
                    "{} is named and bounds are given as well",
                    one.entry.name
                )));
            }
            Some((sub_network, reason)) => {
                Kind::Named { requested: json!(sub_network.entry.name), sub_network, reason }
            }
            None if bounds != Bounds::default() => Kind::Measured(bounds),
            None => {
                let default = find_sub_network(served, &served.default, "model")?;
                Kind::Named { sub_network: default, requested: Value::Null, reason: "default" }
            }
        };
        Ok(Self { model: served, machine: models.machine(), kind })
    }

    /// The super-adapter, whichever of its sub-networks it will be.
    pub(super) fn model(&self) -> &'a ServedModel {
        self.model
    }

    /// The sub-network where it is certain before the prompt's length is known.
    pub(super) fn certain(&self) -> Option<&ServedSubNetwork> {
        match &self.kind {
            Kind::Named { sub_network, .. } => Some(sub_network),
            Kind::Measured(_) => None,
        }
    }

    /// The sub-network for a prompt and an answer of so many tokens.
    pub(super) fn resolve(self, lengths: Lengths) -> Result<Chosen, ApiError> {
        let Self { model, machine, kind } = self;
        let (sub_network, requested, reason) = match kind {
            Kind::Named { sub_network, requested, reason } => (sub_network, requested, reason),
            Kind::Measured(bounds) => {
                let found = bounds.best_of(model, machine, lengths)?;
                let latency = bounds.are_of_latency();
                (found, bounds.to_json(), if latency { "latency" } else { "accuracy" })
            }
        };
        let answer = ElasticAnswer { requested, served: sub_network.entry.name.clone(), reason };
        Ok(Chosen {
            fingerprint: format!(
                "fp_{}_{}_{}",
                env!("CARGO_PKG_VERSION"),
                model.fingerprint,
                sub_network.entry.name
            ),
            sub_network: sub_network.clone(),
            answer,
        })
    }
}

fn contradiction(what: &str) -> ApiError {
    ApiError::invalid("elastic", format!("contradictory choice of sub-network: {what}"))
}

/// `NAME` or `NAME:SUBNETWORK`.
pub(super) fn find_model<'a>(
    models: &'a ServedModels,
    id: &str,
) -> Result<(&'a ServedModel, Option<&'a Arc<ServedSubNetwork>>), ApiError> {
    let (name, sub_network) = match id.rsplit_once(':') {
        Some((name, sub_network)) => (name, Some(sub_network)),
        None => (id, None),
    };
    let Some(model) = models.get(name) else {
        let known = listing(models.models().iter().map(|m| m.name.as_str()));
        return Err(ApiError::no_model(
            "model",
            format!("the model {} does not exist; there is {known}", quoted(id)),
        ));
    };
    let sub_network = sub_network.map(|name| find_sub_network(model, name, "model")).transpose()?;
    Ok((model, sub_network))
}

fn find_sub_network<'a>(
    model: &'a ServedModel,
    name: &str,
    param: &'static str,
) -> Result<&'a Arc<ServedSubNetwork>, ApiError> {
    model.get(name).ok_or_else(|| {
        let known = listing(model.sub_networks.iter().map(|s| s.entry.name.as_str()));
        let message =
            format!("the model `{}` has no sub-network {}; there is {known}", model.name, quoted(name));
        ApiError::no_model(param, message)
    })
}

/// A client's own words in a message, cut to a sane length.
pub(super) fn quoted(text: &str) -> String {
    let cut = text.chars().take(100).collect::<String>();
    format!("`{}`{}", cut.escape_debug(), if cut.len() < text.len() { "…" } else { "" })
}

fn listing<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names = names.collect::<Vec<_>>();
    let shown = names.iter().take(20).map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(20) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

impl Bounds {
    fn new(fields: &ElasticFields) -> Result<Self, ApiError> {
        let within = |param: &str, value: Option<f64>, most: f64| match value {
            Some(v) if !(v.is_finite() && v > 0.0 && v <= most) => {
                Err(ApiError::invalid(param, format!("{param} must be above 0 and at most {most}, got {v}")))
            }
            other => Ok(other),
        };
        Ok(Self {
            min_accuracy: within("elastic.min_accuracy", fields.min_accuracy, 1.0)?,
            max_tpot_ms: within("elastic.max_tpot_ms", fields.max_tpot_ms, 1e9)?,
            max_ttft_ms: within("elastic.max_ttft_ms", fields.max_ttft_ms, 1e9)?,
            deadline_ms: within("elastic.deadline_ms", fields.deadline_ms, 1e9)?,
        })
    }

    fn are_of_latency(&self) -> bool {
        self.max_tpot_ms.or(self.max_ttft_ms).or(self.deadline_ms).is_some()
    }

    fn to_json(self) -> Value {
        let fields = [
            ("min_accuracy", self.min_accuracy),
            ("max_tpot_ms", self.max_tpot_ms),
            ("max_ttft_ms", self.max_ttft_ms),
            ("deadline_ms", self.deadline_ms),
        ];
        let given = fields.into_iter().filter_map(|(name, value)| Some((name.to_string(), json!(value?))));
        Value::Object(given.collect())
    }

    /// With a latency bound the most accurate sub-network that keeps all bounds, otherwise the cheapest.
    fn best_of<'a>(
        &self,
        model: &'a ServedModel,
        machine: Option<&str>,
        lengths: Lengths,
    ) -> Result<&'a Arc<ServedSubNetwork>, ApiError> {
        let mut kept = model.sub_networks.iter().collect::<Vec<_>>();
        if let Some(least) = self.min_accuracy {
            let known = kept.iter().filter_map(|s| Some((*s, s.accuracy()?))).collect::<Vec<_>>();
            kept = keep("elastic.min_accuracy", &known, least, true)?;
        }
        let latency = |s: &ServedSubNetwork| machine.and_then(|m| s.entry.latency.get(m)).cloned();
        if let Some(most) = self.max_tpot_ms {
            let known = kept.iter().filter_map(|s| Some((*s, latency(s)?.decode_seconds_per_token * 1e3)));
            kept = keep("elastic.max_tpot_ms", &known.collect::<Vec<_>>(), most, false)?;
        }
        let whole = |s: &ServedSubNetwork, answer: usize| {
            let Latency { prefill_seconds_per_token, decode_seconds_per_token } = latency(s)?;
            // The first token of an answer comes with its prompt.
            let after = answer.saturating_sub(1) as f64 * decode_seconds_per_token;
            Some((prefill_seconds_per_token * lengths.prompt as f64 + after) * 1e3)
        };
        if let Some(most) = self.max_ttft_ms {
            let known = kept.iter().filter_map(|s| Some((*s, whole(s, 0)?)));
            kept = keep("elastic.max_ttft_ms", &known.collect::<Vec<_>>(), most, false)?;
        }
        if let Some(most) = self.deadline_ms {
            let answer = lengths.answer.ok_or_else(|| {
                let message =
                    "elastic.deadline_ms needs max_tokens: without it nobody knows how long an answer takes";
                ApiError::invalid("elastic.deadline_ms", message.into())
            })?;
            let known = kept.iter().filter_map(|s| Some((*s, whole(s, answer)?)));
            kept = keep("elastic.deadline_ms", &known.collect::<Vec<_>>(), most, false)?;
        }
        let best = if self.are_of_latency() {
            let rank = |s: &ServedSubNetwork| (s.accuracy().unwrap_or(0.0), s.entry.cost.macs);
            kept.into_iter().max_by(|a, b| rank(a).partial_cmp(&rank(b)).unwrap_or(std::cmp::Ordering::Equal))
        } else {
            kept.into_iter().min_by_key(|s| s.entry.cost.macs)
        };
        best.ok_or_else(|| ApiError::invalid("elastic", "no sub-network keeps these bounds".into()))
    }
}

/// The sub-networks on the right side of a bound; where there is none, says how near the best one comes.
fn keep<'a>(
    param: &'static str,
    known: &[(&'a Arc<ServedSubNetwork>, f64)],
    bound: f64,
    at_least: bool,
) -> Result<Vec<&'a Arc<ServedSubNetwork>>, ApiError> {
    let keeps = |value: f64| if at_least { value >= bound } else { value <= bound };
    let kept = known.iter().filter(|(_, v)| keeps(*v)).map(|(s, _)| *s).collect::<Vec<_>>();
    if !kept.is_empty() {
        return Ok(kept);
    }
    let order = |a: &&(_, f64), b: &&(_, f64)| a.1.total_cmp(&b.1);
    let best = if at_least { known.iter().max_by(order) } else { known.iter().min_by(order) };
    let message = match best {
        None if at_least => {
            format!("{param} cannot be kept: the catalog has no scores; `lonas eval` finds them out")
        }
        None => format!(
            "{param} cannot be kept: the catalog has no latencies of this machine; `lonas bench --save` measures them"
        ),
        Some((s, v)) => {
            format!("no sub-network keeps {param} {bound}; the nearest is `{}` with {v:.4}", s.entry.name)
        }
    };
    Err(ApiError::invalid(param, message))
}
