//! The MPT family (MosaicML 2023), as Shears trains it: layer norms without a shift, attention by distance (ALiBi), no biases, a plain
//! MLP. Queries, keys and values are Linears of their own, as Shears splits them.

mod load;
mod tensors;

pub(super) use load::model;
pub use tensors::base_tensors;

use super::layer_norm::LayerNorm;
use super::{Batch, CausalModel};
use crate::backend::{Activation, AttentionShape, Backend, BackendError, Linear};
use std::sync::Arc;

/// An MPT with every super-adapter that shares its base.
pub struct Mpt<B: Backend> {
    /// `(V, H)`
    embedding: Arc<B::Matrix>,
    layers: Vec<Layer<B>>,
    norm: LayerNorm<B>,
    /// `(V, H)`; the embedding itself where the two are tied.
    head: Arc<B::Matrix>,
    attention: AttentionShape,
    vocabulary: usize,
}

struct Layer<B: Backend> {
    attention_norm: LayerNorm<B>,
    query: Linear<B>,
    key: Linear<B>,
    value: Linear<B>,
    attended: Linear<B>,
    mlp_norm: LayerNorm<B>,
    up: Linear<B>,
    down: Linear<B>,
}

impl<B: Backend> Mpt<B> {
    /// `x (T, H)` to the same after layer `index`.
    fn layer(
        &self,
        backend: &B,
        batch: &Batch,
        index: usize,
        x: B::Rows,
        cache: Option<&mut B::Cache>,
    ) -> Result<B::Rows, BackendError> {
        let Batch { segments, spans, .. } = batch;
        let layer = &self.layers[index];
        let normed = layer.attention_norm.of(backend, &x)?;
        let linears = [&layer.query, &layer.key, &layer.value];
        let [q, k, v] = backend.linears(&normed, None, linears, segments)?;
        let cache = cache.map(|cache| (cache, index));
        let heads = backend.attention(&q, &k, &v, &self.attention, spans, cache)?;
        let x = backend.linear_onto(x, &heads, &layer.attended, segments)?;

        let normed = layer.mlp_norm.of(backend, &x)?;
        let wide = backend.activate(backend.linear(&normed, &layer.up, segments)?, Activation::Gelu)?;
        backend.linear_onto(x, &wide, &layer.down, segments)
    }
}

impl<B: Backend> CausalModel<B> for Mpt<B> {
    fn forward(
        &self,
        backend: &B,
        batch: &Batch,
        mut cache: Option<&mut B::Cache>,
    ) -> Result<B::Rows, BackendError> {
        let mut x = backend.embed(&self.embedding, &batch.tokens)?;
        for index in 0..self.layers.len() {
            x = self.layer(backend, batch, index, x, cache.as_deref_mut())?;
        }
        let x = self.norm.of(backend, &backend.select(&x, &batch.outputs)?)?;
        backend.logits(&x, &self.head)
    }

    fn layers(&self) -> usize {
        self.layers.len()
    }

    fn attention(&self) -> &AttentionShape {
        &self.attention
    }

    fn tables(&self) -> [&Arc<B::Matrix>; 2] {
        [&self.embedding, &self.head]
    }

    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn linears(&self) -> impl Iterator<Item = &Linear<B>> {
        self.layers.iter().flat_map(|layer| {
            [&layer.query, &layer.key, &layer.value, &layer.attended, &layer.up, &layer.down]
        })
    }
}
