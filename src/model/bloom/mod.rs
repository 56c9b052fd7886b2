//! The BLOOM family (BigScience 2022): layer norms with a shift, one also after the embedding; attention by distance (ALiBi);
//! queries, keys and values from one Linear; a plain MLP.

mod load;
mod tensors;

pub(super) use load::model;
pub use tensors::base_tensors;

use super::layer_norm::LayerNorm;
use super::{Batch, CausalModel};
use crate::backend::{Activation, AttentionShape, Backend, BackendError, Linear};
use std::sync::Arc;

/// A BLOOM with every super-adapter that shares its base.
pub struct Bloom<B: Backend> {
    /// `(V, H)`
    embedding: Arc<B::Matrix>,
    embedding_norm: LayerNorm<B>,
    layers: Vec<Layer<B>>,
    norm: LayerNorm<B>,
    /// `(V, H)`; the embedding itself where the two are tied.
    head: Arc<B::Matrix>,
    attention: AttentionShape,
    /// Whether a layer's two results are added to the norm's output instead of its input.
    residual_after_norm: bool,
    vocabulary: usize,
}

struct Layer<B: Backend> {
    attention_norm: LayerNorm<B>,
    /// All queries, then all keys, then all values: the loader has put them so.
    query_key_value: Linear<B>,
    dense: Linear<B>,
    mlp_norm: LayerNorm<B>,
    up: Linear<B>,
    down: Linear<B>,
}

impl<B: Backend> Bloom<B> {
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
        let [q, k, v] = backend.split(&backend.linear(&normed, &layer.query_key_value, segments)?)?;
        let cache = cache.map(|cache| (cache, index));
        let attended = backend.attention(&q, &k, &v, &self.attention, spans, cache)?;
        let onto = if self.residual_after_norm { normed } else { x };
        let x = backend.linear_onto(onto, &attended, &layer.dense, segments)?;

        let normed = layer.mlp_norm.of(backend, &x)?;
        let wide = backend.linear(&normed, &layer.up, segments)?;
        let wide = backend.activate(wide, Activation::GeluTanh)?;
        let onto = if self.residual_after_norm { normed } else { x };
        backend.linear_onto(onto, &wide, &layer.down, segments)
    }
}

impl<B: Backend> CausalModel<B> for Bloom<B> {
    fn forward(
        &self,
        backend: &B,
        batch: &Batch,
        mut cache: Option<&mut B::Cache>,
    ) -> Result<B::Rows, BackendError> {
        let x = backend.embed(&self.embedding, &batch.tokens)?;
        let mut x = self.embedding_norm.of(backend, &x)?;
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
        self.layers.iter().flat_map(|layer| [&layer.query_key_value, &layer.dense, &layer.up, &layer.down])
    }
}
