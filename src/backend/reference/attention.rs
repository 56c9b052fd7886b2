//! Causal attention over one sequence, and a paged key-value pool simple enough to be an oracle.

use super::named;
use crate::backend::{AttentionShape, BackendError, CacheLayout, SequenceSpan};
use candle_core::{D, Result, Tensor};

/// Attention of one sequence's rows. `q (t, N*D)` at positions `start..start+t`; `k`, `v (start + t, K*D)`.
pub(super) fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    start: usize,
) -> Result<Tensor> {
    let AttentionShape { query_heads, kv_heads, head_size } = *shape;
    let (rows, positions) = (q.dim(0)?, k.dim(0)?);
    let group = query_heads / kv_heads;
    let q = q.reshape((rows, query_heads, head_size))?.transpose(0, 1)?.contiguous()?;
    // (positions, K*D) to (N, positions, D): each key-value head serves `group` consecutive query heads.
    let spread = |x: &Tensor| {
        let x = x.reshape((positions, kv_heads, 1, head_size))?;
        let x = x.broadcast_as((positions, kv_heads, group, head_size))?;
        x.reshape((positions, query_heads, head_size))?.transpose(0, 1)?.contiguous()
    };
    let scores = (q.matmul(&spread(k)?.t()?)? * (1.0 / (head_size as f64).sqrt()))?;
    let probabilities = softmax(&scores.broadcast_add(&causal_mask(rows, positions, start, q.device())?)?)?;
    probabilities.matmul(&spread(v)?)?.transpose(0, 1)?.reshape((rows, query_heads * head_size))
}

/// Over the last axis. The maximum is a constant for the gradient: it cancels.
fn softmax(x: &Tensor) -> Result<Tensor> {
    let exponentials = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)
}

/// `(rows, positions)`: 0 where row `start + r` may see position `p`, minus infinity elsewhere.
fn causal_mask(rows: usize, positions: usize, start: usize, device: &candle_core::Device) -> Result<Tensor> {
    let cell = |r: usize, p: usize| if p <= start + r { 0.0 } else { f32::NEG_INFINITY };
    let cells = (0..rows).flat_map(|r| (0..positions).map(move |p| cell(r, p)));
    Tensor::from_vec(cells.collect::<Vec<f32>>(), (rows, positions), device)
}

/// Keys and values in host memory, `[layer][block][position][K*D]`.
pub struct PagedCache {
    layout: CacheLayout,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl PagedCache {
    pub(super) fn new(layout: CacheLayout) -> std::result::Result<Self, BackendError> {
        let zeros = || {
            let mut pool = Vec::new();
            let floats = layout.floats() / 2;
            let reserved = pool.try_reserve_exact(floats);
            reserved.map_err(|_| BackendError::Memory {
                what: "the key-value pool".into(),
                bytes: layout.floats().saturating_mul(4),
            })?;
            pool.resize(floats, 0.0);
            Ok(pool)
        };
        Ok(Self { layout, keys: zeros()?, values: zeros()? })
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.keys.as_slice()) + size_of_val(self.values.as_slice())
    }

    /// Writes the span's keys and values `(t, K*D)` and returns those of the whole sequence `(start + t, K*D)`.
    pub(super) fn extend(
        &mut self,
        layer: usize,
        span: &SequenceSpan,
        k: &Tensor,
        v: &Tensor,
    ) -> std::result::Result<(Tensor, Tensor), BackendError> {
        let end = span.start + span.rows.len();
        let width = self.layout.kv_heads * self.layout.head_size;
        let slots = (0..end).map(|position| self.slot(layer, span, position));
        let slots = slots.collect::<std::result::Result<Vec<_>, _>>()?;
        let turn = |pool: &mut Vec<f32>, new: &Tensor| {
            let new = new.flatten_all()?.to_vec1::<f32>()?;
            for (row, slot) in new.chunks_exact(width).zip(&slots[span.start..]) {
                pool[slot * width..(slot + 1) * width].copy_from_slice(row);
            }
            let all = slots.iter().flat_map(|slot| &pool[slot * width..(slot + 1) * width]).copied();
            Tensor::from_vec(all.collect::<Vec<f32>>(), (end, width), k.device())
        };
        let keys = named("attention", turn(&mut self.keys, k))?;
        let values = named("attention", turn(&mut self.values, v))?;
        Ok((keys, values))
    }

    fn slot(
        &self,
        layer: usize,
        span: &SequenceSpan,
        position: usize,
    ) -> std::result::Result<usize, BackendError> {
        let CacheLayout { layers, blocks, block_size, .. } = self.layout;
        let block = span.blocks.get(position / block_size).map(|&b| b as usize);
        match block.filter(|&b| b < blocks && layer < layers) {
            Some(block) => Ok((layer * blocks + block) * block_size + position % block_size),
            None => Err(BackendError::Shape {
                operation: "attention",
                expected: format!("a block below {blocks} for position {position}, a layer below {layers}"),
                got: format!("block {block:?}, layer {layer}"),
            }),
        }
    }
}
