//! What all families that continue a text have in common: a forward with a key-value pool, run step by step.

use super::demand::Demand;
use super::{Batch, Executor, Logits, MultiplyAdds, Outputs};
use crate::backend::{
    AttentionShape, Backend, BackendError, CacheLayout, Draw, Linear, Segment, Selection, SequenceSpan,
};
use crate::supernet::ActiveShape;
use std::ops::Range;
use std::sync::Arc;

/// A model that says what may follow each token, with every super-adapter that shares its base.
pub trait CausalModel<B: Backend>: Send {
    /// Logits `(outputs, V)` of the rows that the batch wants.
    ///
    /// Without a cache every sequence must be whole (start at position 0), as in training.
    fn forward(
        &self,
        backend: &B,
        batch: &Batch,
        cache: Option<&mut B::Cache>,
    ) -> Result<B::Rows, BackendError>;

    fn layers(&self) -> usize;

    fn attention(&self) -> &AttentionShape;

    /// The embedding and the vocabulary product, `(V, H)` each; one and the same where they are tied.
    fn tables(&self) -> [&Arc<B::Matrix>; 2];

    /// `V`
    fn vocabulary(&self) -> usize;

    /// All Linears but the vocabulary product, in execution order.
    fn linears(&self) -> impl Iterator<Item = &Linear<B>>;

    /// Columns of queries, of all layers, that a sub-network attends with.
    fn attended(&self, _sub_network: &ActiveShape) -> usize {
        let &AttentionShape { query_heads, head_size, .. } = self.attention();
        self.layers() * query_heads * head_size
    }

    /// The pool that this model needs for `blocks` blocks of `block_size` positions.
    fn cache_layout(&self, blocks: usize, block_size: usize) -> CacheLayout {
        let &AttentionShape { kv_heads, head_size, .. } = self.attention();
        CacheLayout { layers: self.layers(), kv_heads, head_size, blocks, block_size }
    }
}

/// What a batch must satisfy before anything is computed, so that a bad one leaves the pool untouched.
pub(super) fn check(batch: &Batch, vocabulary: usize) -> Result<(), BackendError> {
    let wrong =
        |expected: String, got: String| Err(BackendError::Shape { operation: "forward", expected, got });
    let rows = batch.tokens.len();
    if let Some(token) = batch.tokens.iter().find(|&&t| t as usize >= vocabulary) {
        return wrong(format!("tokens below {vocabulary}"), token.to_string());
    }
    if rows == 0 || batch.positions.len() != rows {
        return wrong(format!("{rows} positions, at least one"), batch.positions.len().to_string());
    }
    if let Some(row) = batch.outputs.iter().find(|&&r| r as usize >= rows) {
        return wrong(format!("output rows below {rows}"), row.to_string());
    }
    let segments = covered(batch.segments.iter().map(|s| &s.rows));
    let spans = covered(batch.spans.iter().map(|s| &s.rows));
    if segments != Some(rows) || spans != Some(rows) {
        return wrong(
            format!("segments and spans that cover rows 0..{rows} in order"),
            format!("segments to {segments:?}, spans to {spans:?}"),
        );
    }
    Ok(())
}

/// How many rows ranges cover that stand one after the other from row 0 on, none empty; `None` if they do not.
pub(super) fn covered<'a>(mut ranges: impl Iterator<Item = &'a Range<usize>>) -> Option<usize> {
    ranges.try_fold(0, |end, r| (r.start == end && r.end > end).then_some(r.end))
}

/// A model on one backend with its key-value pool.
pub struct CausalExecutor<M, B: Backend> {
    model: M,
    backend: B,
    cache: B::Cache,
    layout: CacheLayout,
}

impl<M: CausalModel<B>, B: Backend> CausalExecutor<M, B> {
    /// Allocates a pool of `blocks` blocks of `block_size` positions.
    pub fn new(model: M, backend: B, blocks: usize, block_size: usize) -> Result<Self, BackendError> {
        let layout = model.cache_layout(blocks, block_size);
        let cache = backend.cache(layout)?;
        Ok(Self { model, backend, cache, layout })
    }

    fn demand(&self) -> Demand<'_, M, B> {
        Demand { model: &self.model, backend: &self.backend }
    }

    /// Logits of the rows that the batch wants.
    fn step(&mut self, batch: &Batch) -> Result<B::Rows, BackendError> {
        check(batch, self.model.vocabulary())?;
        let logits = self.model.forward(&self.backend, batch, Some(&mut self.cache));
        if logits.is_err() {
            self.backend.forget();
        }
        logits
    }
}

impl<M: CausalModel<B>, B: Backend> Executor for CausalExecutor<M, B> {
    fn forward(&mut self, batch: &Batch) -> Result<Logits, BackendError> {
        let vocabulary = self.model.vocabulary();
        if batch.outputs.is_empty() {
            // Nobody reads this step's logits, but its keys and values are wanted: one row stands in.
            let batch = Batch { outputs: vec![0], ..batch.clone() };
            self.step(&batch)?;
            self.backend.finish()?;
            return Ok(Logits { values: Vec::new(), vocabulary });
        }
        let logits = self.step(batch)?;
        let values = self.backend.host(logits).inspect_err(|_| self.backend.forget())?;
        Ok(Logits { values, vocabulary })
    }

    fn sample(&mut self, batch: &Batch, draws: &[(u32, Draw)]) -> Result<Outputs, BackendError> {
        let (vocabulary, count) = (self.model.vocabulary(), batch.outputs.len());
        if draws.is_empty() {
            return Ok(Outputs::arranged(count, std::iter::empty(), self.forward(batch)?));
        }
        let logits = self.step(batch)?;
        let choices = self.backend.choose(&logits, draws).inspect_err(|_| self.backend.forget())?;
        let drawn = |row: &u32| draws.binary_search_by_key(row, |(row, _)| *row).is_ok();
        let left = (0..count as u32).filter(|row| !drawn(row)).collect::<Vec<_>>();
        let values = match left.as_slice() {
            [] => Vec::new(),
            left => {
                let rows = self.backend.select(&logits, left).and_then(|rows| self.backend.host(rows));
                rows.inspect_err(|_| self.backend.forget())?
            }
        };
        let choices = draws.iter().zip(choices).map(|((row, _), choice)| (*row as usize, choice));
        Ok(Outputs::arranged(count, choices, Logits { values, vocabulary }))
    }

    fn log_probabilities(&mut self, batch: &Batch, tokens: &[(u32, u32)]) -> Result<Vec<f32>, BackendError> {
        if batch.outputs.is_empty() {
            return self.forward(batch).map(|_| Vec::new());
        }
        let logits = self.step(batch)?;
        let found = self.backend.log_probabilities(logits, batch.outputs.len(), tokens);
        found.inspect_err(|_| self.backend.forget())
    }

    /// One step of so many rows of one sequence, all of whose logits are wanted.
    fn prepare(&mut self, rows: usize, selection: &Selection) -> Result<(), BackendError> {
        if !self.backend.keeps_step_memory()? {
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
        self.model.vocabulary()
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
        self.demand().weight_traffic(&batch.segments) + self.demand().cache_traffic(batch, of_position)
    }

    fn multiply_adds(&self, batch: &Batch) -> MultiplyAdds {
        self.demand().multiply_adds(batch)
    }

    fn weight_bytes(&self) -> usize {
        self.demand().weight_bytes()
    }
}
