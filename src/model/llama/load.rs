//! From files to a LLaMA on some backend: base tensors by their Hugging Face names, adapters by PEFT's.

use super::{Layer, Llama, MODULES};
use crate::artifact::{AdapterTensors, ArtifactError, Base};
use crate::backend::{Adapter, AttentionShape, Backend, BackendError, GatedMlp, Linear};
use crate::supernet::{LinearShape, ModelShape};
use crate::weights::{HostMatrix, HostVector};
use std::collections::BTreeMap;
use std::sync::Arc;

/// One super-adapter to load beside the base.
pub struct SuperAdapter {
    /// The model's Linears with this super-adapter's ranks.
    pub shape: ModelShape,
    pub tensors: AdapterTensors,
    /// `alpha / R_config`
    pub scale: f32,
}

impl SuperAdapter {
    /// Whether it has the tensors that its shape says, and no others.
    pub fn check(&self) -> Result<(), LoadError> {
        for module in self.tensors.keys() {
            let place = self.shape.find(module).map(|i| &self.shape.linears[i]);
            if place.is_none_or(|linear| linear.rank.is_none()) {
                return Err(LoadError::StrayAdapter { module: module.clone() });
            }
        }
        for linear in &self.shape.linears {
            let Some(rank) = linear.rank else { continue };
            let Some((a, b)) = self.tensors.get(&linear.name) else {
                return Err(LoadError::MissingAdapter { module: linear.name.clone() });
            };
            for (matrix, expected) in [(a, (rank, linear.inp)), (b, (linear.out, rank))] {
                let got = (matrix.rows, matrix.columns);
                if got != expected {
                    return Err(LoadError::AdapterSize { tensor: matrix.name.clone(), expected, got });
                }
            }
        }
        Ok(())
    }
}

/// Why a model could not be put together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error("the adapter has a tensor for `{module}`, which has no place in this model")]
    StrayAdapter { module: String },
    #[error("the adapter has no tensors for `{module}`, which its configuration targets")]
    MissingAdapter { module: String },
    #[error("adapter tensor `{tensor}`: expected {expected:?}, got {got:?} (rows, columns)")]
    AdapterSize { tensor: String, expected: (usize, usize), got: (usize, usize) },
}

/// Loads the base once and every super-adapter beside it.
///
/// `orders` gives, by layer, the order of the MLP's channels: channel `i` of the loaded model is channel `order[i]` of
/// the file, in the base and in every adapter alike. A layer without an entry keeps the file's order.
///
/// # Errors
/// A tensor that is missing or has the wrong size, or a backend without memory for it.
pub fn load<B: Backend>(
    backend: &B,
    base: &Base,
    super_adapters: Vec<SuperAdapter>,
    orders: &BTreeMap<usize, Vec<usize>>,
) -> Result<Llama<B>, LoadError> {
    for adapter in &super_adapters {
        adapter.check()?;
    }
    let shape = super::model_shape(&base.config, None);
    Loader { backend, base, shape, super_adapters, merged: None, orders }.model()
}

/// Loads the base with one super-adapter added into it: `W + s B A`, at full rank. Prefixes of it are those of a
/// sub-network that keeps all ranks, see [`ModelShape::keeps_ranks`]; the model computes no adapter.
///
/// # Errors
/// As [`load`].
pub fn load_merged<B: Backend>(
    backend: &B,
    base: &Base,
    super_adapter: SuperAdapter,
    orders: &BTreeMap<usize, Vec<usize>>,
) -> Result<Llama<B>, LoadError> {
    super_adapter.check()?;
    let shape = super::model_shape(&base.config, None);
    let merged = Some(super_adapter);
    Loader { backend, base, shape, super_adapters: Vec::new(), merged, orders }.model()
}

struct Loader<'a, B: Backend> {
    backend: &'a B,
    base: &'a Base,
    shape: ModelShape,
    super_adapters: Vec<SuperAdapter>,
    /// Added into the base.
    merged: Option<SuperAdapter>,
    orders: &'a BTreeMap<usize, Vec<usize>>,
}

/// Which axis of a Linear carries a layer's MLP channels.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Channels {
    None,
    Rows,
    Columns,
}

impl Channels {
    /// By the Linear's place in its layer.
    pub(super) fn of(place: usize) -> Self {
        match MODULES[place] {
            "mlp.gate_proj" | "mlp.up_proj" => Self::Rows,
            "mlp.down_proj" => Self::Columns,
            _ => Self::None,
        }
    }
}

impl<B: Backend> Loader<'_, B> {
    fn model(mut self) -> Result<Llama<B>, LoadError> {
        let (base, config) = (self.base, &self.base.config);
        let embedding = base.matrix("model.embed_tokens.weight", config.vocabulary, config.hidden)?;
        let embedding = Arc::new(self.backend.table(embedding)?);
        let head = if config.tied_embeddings {
            Arc::clone(&embedding)
        } else {
            let head = base.matrix("lm_head.weight", config.vocabulary, config.hidden)?;
            Arc::new(self.backend.table(head)?)
        };
        let layers = (0..config.layers).map(|layer| self.layer(layer)).collect::<Result<_, _>>()?;
        let pairs = config.head_size / 2;
        let frequency = |i| {
            let exponent = (2 * i) as f32 / config.head_size as f32;
            1.0 / config.rope_theta.powf(exponent)
        };
        Ok(Llama {
            embedding,
            layers,
            norm: self.vector("model.norm.weight", config.hidden)?,
            head,
            attention: AttentionShape {
                query_heads: config.query_heads,
                kv_heads: config.kv_heads,
                head_size: config.head_size,
            },
            inverse_frequencies: (0..pairs).map(frequency).collect(),
            eps: config.rms_eps,
            vocabulary: config.vocabulary,
        })
    }

    fn layer(&mut self, layer: usize) -> Result<Layer<B>, LoadError> {
        let hidden = self.base.config.hidden;
        let norm = |name| format!("model.layers.{layer}.{name}.weight");
        let config = &self.base.config;
        let (attention_bias, mlp_bias) = (config.attention_bias, config.mlp_bias);
        Ok(Layer {
            attention_norm: self.vector(&norm("input_layernorm"), hidden)?,
            q: self.linear(layer, 0, attention_bias)?,
            k: self.linear(layer, 1, attention_bias)?,
            v: self.linear(layer, 2, attention_bias)?,
            o: self.linear(layer, 3, attention_bias)?,
            mlp_norm: self.vector(&norm("post_attention_layernorm"), hidden)?,
            mlp: GatedMlp {
                gate: self.linear(layer, 4, mlp_bias)?,
                up: self.linear(layer, 5, mlp_bias)?,
                down: self.linear(layer, 6, mlp_bias)?,
            },
        })
    }

    fn vector(&self, name: &str, length: usize) -> Result<B::Vector, LoadError> {
        Ok(self.backend.vector(self.base.vector(name, length)?)?)
    }

    fn linear(&mut self, layer: usize, place: usize, bias: bool) -> Result<Linear<B>, LoadError> {
        let index = layer * MODULES.len() + place;
        let channels = Channels::of(place);
        let LinearShape { name, out, inp, .. } = self.shape.linears[index].clone();
        let order = self.orders.get(&layer).filter(|_| channels != Channels::None);
        let rows = order.filter(|_| channels == Channels::Rows);
        let columns = order.filter(|_| channels == Channels::Columns);

        let mut weight = self.base.matrix(&format!("{name}.weight"), out, inp)?;
        if let Some(adapter) = &mut self.merged
            && let Some((a, b)) = adapter.tensors.remove(&name)
        {
            weight = weight.plus_product(adapter.scale, &b, &a);
        }
        let weight = self.backend.matrix(permuted(weight, rows, columns))?;
        let bias = if bias { Some(self.bias(&name, out, rows)?) } else { None };
        let mut adapters = Vec::with_capacity(self.super_adapters.len());
        for adapter in &mut self.super_adapters {
            let Some((a, b)) = adapter.tensors.remove(&name) else {
                adapters.push(None);
                continue;
            };
            let (a, b) = (permuted(a, None, columns), permuted(b, rows, None));
            let [a, b] = self.backend.adapter(a, b, &weight)?;
            adapters.push(Some(Adapter { a, b, scale: adapter.scale }));
        }
        Ok(Linear { index, weight: Arc::new(weight), bias, adapters })
    }

    fn bias(&self, name: &str, out: usize, order: Option<&Vec<usize>>) -> Result<B::Vector, LoadError> {
        let HostVector { name, data } = self.base.vector(&format!("{name}.bias"), out)?;
        let data = order.map_or_else(|| data.clone(), |order| order.iter().map(|&i| data[i]).collect());
        Ok(self.backend.vector(HostVector { name, data })?)
    }
}

pub(super) fn permuted(
    matrix: HostMatrix,
    rows: Option<&Vec<usize>>,
    columns: Option<&Vec<usize>>,
) -> HostMatrix {
    let matrix = if let Some(order) = rows { matrix.permute_rows(order) } else { matrix };
    if let Some(order) = columns { matrix.permute_columns(order) } else { matrix }
}
