//! The LLaMA family (Touvron et al. 2023): RMS norms, rotary positions, grouped queries, a gated MLP.

mod demand;
mod load;
mod plain;
mod shape;

pub use load::{LoadError, SuperAdapter, load, load_merged};
pub use plain::{Plain, PlainTensor};
pub use shape::{GroupTemplate, MODULES, TemplateError, base_tensors, model_shape, search_space};

use super::{Batch, Executor, Logits, MultiplyAdds, Outputs};
use crate::backend::{
    AttentionShape, Backend, BackendError, CacheLayout, Draw, GatedMlp, Linear, Norm, Segment, Selection,
    SequenceSpan,
};
use std::sync::Arc;

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
        let Self { model, backend, batch, angles } = self;
        let Batch { segments, spans, .. } = batch;
        let (layer, eps) = (&model.layers[index], model.eps);
        let qkv = [&layer.q, &layer.k, &layer.v];
        let qkv = backend.linears(&x, Some(Norm { weight: &layer.attention_norm, eps }), qkv, segments)?;
        let cache = cache.map(|cache| (cache, index));
        let attended = backend.rotary_attention(qkv, angles, &model.attention, spans, cache)?;
        let x = backend.linear_onto(x, &attended, &layer.o, segments)?;
        backend.gated_mlp_onto(x, Norm { weight: &layer.mlp_norm, eps }, &layer.mlp, segments)
    }

    /// Logits `(rows.len(), V)` of these rows of what the last layer gave.
    pub fn logits(&self, x: &B::Rows, rows: &[u32]) -> Result<B::Rows, BackendError> {
        let Self { model, backend, .. } = self;
        let normed = backend.rms_norm(&backend.select(x, rows)?, &model.norm, model.eps)?;
        backend.logits(&normed, &model.head)
    }
}

impl<B: Backend> Llama<B> {
    /// Logits `(outputs, V)` of the rows that the batch wants.
    ///
    /// Without a cache every sequence must be whole (start at position 0), as in training.
    pub fn forward(
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

    /// Begins a forward whose stages the caller runs.
    pub fn pass<'a>(&'a self, backend: &'a B, batch: &'a Batch) -> Result<Pass<'a, B>, BackendError> {
        let angles = backend.angles(&batch.positions, &self.inverse_frequencies)?;
        Ok(Pass { model: self, backend, batch, angles })
    }

    /// The pool that this model needs for `blocks` blocks of `block_size` positions.
    pub fn cache_layout(&self, blocks: usize, block_size: usize) -> CacheLayout {
        let AttentionShape { kv_heads, head_size, .. } = self.attention;
        CacheLayout { layers: self.layers.len(), kv_heads, head_size, blocks, block_size }
    }

    /// What a batch must satisfy before anything is computed, so that a bad one leaves the pool untouched.
    fn check(&self, batch: &Batch) -> Result<(), BackendError> {
        let wrong =
            |expected: String, got: String| Err(BackendError::Shape { operation: "forward", expected, got });
        let rows = batch.tokens.len();
        if let Some(token) = batch.tokens.iter().find(|&&t| t as usize >= self.vocabulary) {
            return wrong(format!("tokens below {}", self.vocabulary), token.to_string());
        }
        if rows == 0 || batch.positions.len() != rows {
            return wrong(format!("{rows} positions, at least one"), batch.positions.len().to_string());
        }
        if let Some(row) = batch.outputs.iter().find(|&&r| r as usize >= rows) {
            return wrong(format!("output rows below {rows}"), row.to_string());
        }
        let ends = |ranges: Vec<&std::ops::Range<usize>>| {
            ranges.iter().try_fold(0, |end, r| (r.start == end && r.end > end).then_some(r.end))
        };
        let segments = ends(batch.segments.iter().map(|s| &s.rows).collect());
        let spans = ends(batch.spans.iter().map(|s| &s.rows).collect());
        if segments != Some(rows) || spans != Some(rows) {
            return wrong(
                format!("segments and spans that cover rows 0..{rows} in order"),
                format!("segments to {segments:?}, spans to {spans:?}"),
            );
        }
        Ok(())
    }
}

/// A LLaMA on one backend with its key-value pool.
pub struct LlamaExecutor<B: Backend> {
    model: Llama<B>,
    backend: B,
    cache: B::Cache,
    layout: CacheLayout,
}

impl<B: Backend> LlamaExecutor<B> {
    /// Allocates a pool of `blocks` blocks of `block_size` positions.
    pub fn new(model: Llama<B>, backend: B, blocks: usize, block_size: usize) -> Result<Self, BackendError> {
        let layout = model.cache_layout(blocks, block_size);
        let cache = backend.cache(layout)?;
        Ok(Self { model, backend, cache, layout })
    }

    /// Logits of the rows that the batch wants.
    fn step(&mut self, batch: &Batch) -> Result<B::Rows, BackendError> {
        self.model.check(batch)?;
        let logits = self.model.forward(&self.backend, batch, Some(&mut self.cache));
        if logits.is_err() {
            self.backend.forget();
        }
        logits
    }
}

impl<B: Backend> Executor for LlamaExecutor<B> {
    fn forward(&mut self, batch: &Batch) -> Result<Logits, BackendError> {
        let vocabulary = self.model.vocabulary;
        if batch.outputs.is_empty() {
            // Nobody reads this step's logits, but its keys and values are wanted: one row stands in.
            let batch = Batch { outputs: vec![0], ..batch.clone() };
            self.step(&batch)?;
            self.backend.finish()?;
            return Ok(Logits { values: Vec::new(), vocabulary });
        }
        let logits = self.step(batch)?;
        Ok(Logits { values: self.backend.host(logits)?, vocabulary })
    }

    fn sample(&mut self, batch: &Batch, draws: &[(u32, Draw)]) -> Result<Outputs, BackendError> {
        let (vocabulary, count) = (self.model.vocabulary, batch.outputs.len());
        if draws.is_empty() {
            return Ok(Outputs::arranged(count, std::iter::empty(), self.forward(batch)?));
        }
        let logits = self.step(batch)?;
        let choices = self.backend.choose(&logits, draws)?;
        let drawn = |row: &u32| draws.binary_search_by_key(row, |(row, _)| *row).is_ok();
        let left = (0..count as u32).filter(|row| !drawn(row)).collect::<Vec<_>>();
        let values = match left.as_slice() {
            [] => Vec::new(),
            left => self.backend.host(self.backend.select(&logits, left)?)?,
        };
        let choices = draws.iter().zip(choices).map(|((row, _), choice)| (*row as usize, choice));
        Ok(Outputs::arranged(count, choices, Logits { values, vocabulary }))
    }

    /// One step of so many rows of one sequence, all of whose logits are wanted.
    fn prepare(&mut self, rows: usize, selection: &Selection) -> Result<(), BackendError> {
        if !self.backend.keeps_step_memory() {
            return Ok(());
        }
        let rows = rows.clamp(1, (self.layout.blocks * self.layout.block_size).max(1));
        let blocks = rows.div_ceil(self.layout.block_size.max(1)) as u32;
        let batch = Batch {
            tokens: vec![0; rows],
            positions: (0..rows as u32).collect(),
            segments: vec![Segment { rows: 0..rows, selection: selection.clone() }],
            spans: vec![SequenceSpan { rows: 0..rows, start: 0, blocks: (0..blocks).collect() }],
            outputs: (0..rows as u32).collect(),
        };
        self.step(&batch)?;
        self.backend.finish()
    }

    fn vocabulary(&self) -> usize {
        self.model.vocabulary
    }

    fn blocks(&self) -> usize {
        self.layout.blocks
    }

    fn block_size(&self) -> usize {
        self.layout.block_size
    }

    fn traffic(&self, batch: &Batch) -> usize {
        let positions = (self.layout.blocks * self.layout.block_size).max(1);
        let of_position = self.backend.cache_bytes(&self.cache) / positions;
        let cached = batch.spans.iter().map(|span| span.start + span.rows.len()).sum::<usize>();
        self.model.weight_traffic(&self.backend, &batch.segments) + cached * of_position
    }

    fn multiply_adds(&self, batch: &Batch) -> MultiplyAdds {
        self.model.multiply_adds(&self.backend, batch)
    }

    fn weight_bytes(&self) -> usize {
        self.model.weight_bytes(&self.backend)
    }
}
