//! The LLaMA family (Touvron et al. 2023): RMS norms, rotary positions, grouped queries, a gated MLP. Mistral has a window beside,
//! Qwen2 biases, Qwen3 norms of each head.

mod load;
mod plain;
mod tensors;

pub(super) use load::model;
pub use load::{load, load_merged};
pub use plain::{Heads, Plain, PlainTensor};
pub use tensors::base_tensors;

use super::{Batch, CausalExecutor, CausalModel};
use crate::backend::{AttentionShape, Backend, BackendError, GatedMlp, Linear, Norm, Segment};
use crate::supernet::ActiveShape;
use std::sync::Arc;

/// A LLaMA on one backend with its key-value pool.
pub type LlamaExecutor<B> = CausalExecutor<Llama<B>, B>;

/// A LLaMA with every super-adapter that shares its base.
pub struct Llama<B: Backend> {
    /// `(V, H)`
    embedding: Arc<B::Matrix>,
    layers: Vec<Layer<B>>,
    /// `(H)`
    norm: B::Vector,
    /// `(V, H)`; the embedding itself where the two are tied.
    head: Arc<B::Matrix>,
    attention: AttentionShape,
    /// `(D / 2)` radians per position.
    inverse_frequencies: Vec<f32>,
    eps: f32,
    vocabulary: usize,
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    q: Linear<B>,
    k: Linear<B>,
    v: Linear<B>,
    o: Linear<B>,
    /// Of each head of queries and of keys, `(D)` each.
    head_norms: Option<[B::Vector; 2]>,
    mlp_norm: B::Vector,
    mlp: GatedMlp<B>,
}

/// One batch on its way through a model, stage by stage: what [`Llama::forward`] does in one go.
pub struct Pass<'a, B: Backend> {
    model: &'a Llama<B>,
    backend: &'a B,
    batch: &'a Batch,
    angles: B::Angles,
}

impl<B: Backend> Pass<'_, B> {
    pub fn layers(&self) -> usize {
        self.model.layers.len()
    }

    /// `(T, H)`: what the first layer takes.
    pub fn embed(&self) -> Result<B::Rows, BackendError> {
        self.backend.embed(&self.model.embedding, &self.batch.tokens)
    }

    /// `x (T, H)` to the same after layer `index`, one of `0..layers()`.
    pub fn layer(
        &self,
        index: usize,
        x: B::Rows,
        cache: Option<&mut B::Cache>,
    ) -> Result<B::Rows, BackendError> {
        let (layer, eps, segments) = (&self.model.layers[index], self.model.eps, &self.batch.segments);
        let x = match self.leaves_out(&layer.q, &layer.o) {
            true => x,
            false => self.attention(layer, x, cache.map(|cache| (cache, index)))?,
        };
        match self.leaves_out(&layer.mlp.gate, &layer.mlp.down) {
            true => Ok(x),
            false => {
                self.backend.gated_mlp_onto(x, Norm { weight: &layer.mlp_norm, eps }, &layer.mlp, segments)
            }
        }
    }

    /// Whether nobody in the batch has any of what `writer` gives to `reader`, which has nothing to add by itself.
    fn leaves_out(&self, writer: &Linear<B>, reader: &Linear<B>) -> bool {
        let nothing = |segment: &Segment| segment.selection.shape.linears[writer.index].out == 0;
        reader.bias.is_none() && self.batch.segments.iter().all(nothing)
    }

    /// `x + attention(norm(x))`
    fn attention(
        &self,
        layer: &Layer<B>,
        x: B::Rows,
        cache: Option<(&mut B::Cache, usize)>,
    ) -> Result<B::Rows, BackendError> {
        let Self { model, backend, batch, angles } = self;
        let Batch { segments, spans, .. } = batch;
        let (shape, eps) = (&model.attention, model.eps);
        let qkv = [&layer.q, &layer.k, &layer.v];
        let qkv = backend.linears(&x, Some(Norm { weight: &layer.attention_norm, eps }), qkv, segments)?;
        let [mut q, mut k, v] = qkv;
        if let Some([of_queries, of_keys]) = &layer.head_norms {
            (q, k) = (backend.head_norm(&q, of_queries, eps)?, backend.head_norm(&k, of_keys, eps)?);
        }
        let kept = batch.kept_heads(&layer.k, shape);
        let attended = backend.rotary_attention([q, k, v], angles, shape, spans, &kept, cache)?;
        backend.linear_onto(x, &attended, &layer.o, segments)
    }

    /// Logits `(rows.len(), V)` of these rows of what the last layer gave.
    pub fn logits(&self, x: &B::Rows, rows: &[u32]) -> Result<B::Rows, BackendError> {
        let Self { model, backend, .. } = self;
        let normed = backend.rms_norm(&backend.select(x, rows)?, &model.norm, model.eps)?;
        backend.logits(&normed, &model.head)
    }
}

impl<B: Backend> Llama<B> {
    /// Begins a forward whose stages the caller runs.
    pub fn pass<'a>(&'a self, backend: &'a B, batch: &'a Batch) -> Result<Pass<'a, B>, BackendError> {
        let angles = backend.angles(&batch.positions, &self.inverse_frequencies)?;
        Ok(Pass { model: self, backend, batch, angles })
    }
}

impl<B: Backend> CausalModel<B> for Llama<B> {
    fn forward(
        &self,
        backend: &B,
        batch: &Batch,
        mut cache: Option<&mut B::Cache>,
    ) -> Result<B::Rows, BackendError> {
        let pass = self.pass(backend, batch)?;
        let mut x = pass.embed()?;
        for index in 0..pass.layers() {
            x = pass.layer(index, x, cache.as_deref_mut())?;
        }
        pass.logits(&x, &batch.outputs)
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

    fn attended(&self, sub_network: &ActiveShape) -> usize {
        self.layers.iter().map(|layer| sub_network.linears.get(layer.q.index).map_or(0, |q| q.out)).sum()
    }

    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn linears(&self) -> impl Iterator<Item = &Linear<B>> {
        self.layers.iter().flat_map(|layer| {
            let mlp = &layer.mlp;
            [&layer.q, &layer.k, &layer.v, &layer.o, &mlp.gate, &mlp.up, &mlp.down]
        })
    }
}
