//! Attention, over one sequence or over several at once, and a paged key-value pool simple enough to be an oracle.

use super::composed::{Composed, Softmax, run};
use super::named;
use crate::backend::{AttentionShape, BackendError, CacheLayout, SequenceSpan, Sight, alibi_slopes};
use candle_core::{Device, Result, Tensor};

/// Attention of one sequence's rows. `q (t, N*D)` at positions `start..start+t`; `k`, `v (start + t, K*D)`.
pub(super) fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    start: usize,
) -> Result<Tensor> {
    let bias = bias(shape, q.dim(0)?, k.dim(0)?, start, q.device())?;
    attend_each(q, k, v, shape, 1, &bias)
}

/// The same of several whole sequences, in as many operations as of one: each is padded to the longest. `q (T, N*D)`,
/// `k`, `v (T, K*D)`. A row must see nothing that comes after it, so that what pads a sequence changes none of its rows.
pub(super) fn attend_padded(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    spans: &[SequenceSpan],
) -> Result<Tensor> {
    let longest = spans.iter().map(|span| span.rows.len()).max().unwrap_or(0);
    let bias = bias(shape, longest, longest, 0, q.device())?;
    let places = Places::new(spans, longest, q.dim(0)?, q.device())?;
    let padded = |x: &Tensor| run(Padded(places.clone()), &[&x.contiguous()?]);
    let y = attend_each(&padded(q)?, &padded(k)?, &padded(v)?, shape, spans.len(), &bias)?;
    run(Unpadded(places), &[&y])
}

/// Of `count` sequences below each other, all equally long, which `bias` is the same for.
fn attend_each(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    count: usize,
    bias: &Tensor,
) -> Result<Tensor> {
    let AttentionShape { query_heads, kv_heads, head_size, .. } = *shape;
    let (rows, positions) = (q.dim(0)? / count, k.dim(0)? / count);
    let group = query_heads / kv_heads;
    let heads = count * query_heads;
    let q = q.reshape((count, rows, query_heads, head_size))?.transpose(1, 2)?;
    let q = q.reshape((heads, rows, head_size))?;
    // (positions, K*D) to (N, positions, D): each key-value head serves `group` consecutive query heads.
    let spread = |x: &Tensor| {
        let x = x.reshape((count, positions, kv_heads, 1, head_size))?;
        let x = x.broadcast_as((count, positions, kv_heads, group, head_size))?;
        let x = x.reshape((count, positions, query_heads, head_size))?.transpose(1, 2)?;
        x.reshape((heads, positions, head_size))
    };
    let scores = q.matmul(&spread(k)?.t()?)?;
    let factor = 1.0 / (head_size as f32).sqrt();
    let shares = run(Softmax { bias: bias.clone(), factor }, &[&scores])?;
    let y = shares.matmul(&spread(v)?)?.reshape((count, query_heads, rows, head_size))?;
    y.transpose(1, 2)?.reshape((count * rows, query_heads * head_size))
}

/// Where rows of sequences stand when all are padded to one length.
#[derive(Clone)]
struct Places {
    /// By padded row the row that stands there; one beyond all rows where none does.
    rows: Tensor,
    /// By row its padded row.
    padded: Tensor,
}

impl Places {
    fn new(spans: &[SequenceSpan], longest: usize, rows: usize, device: &Device) -> Result<Self> {
        let (mut of_padded, mut of_rows) = (vec![rows as u32; spans.len() * longest], vec![0; rows]);
        for (span, first) in spans.iter().zip((0..).step_by(longest.max(1))) {
            for (padded, row) in (first..).zip(span.rows.clone()) {
                of_padded[padded] = row as u32;
                of_rows[row] = padded as u32;
            }
        }
        let on_device = |places: Vec<u32>| Tensor::new(places, device);
        Ok(Self { rows: on_device(of_padded)?, padded: on_device(of_rows)? })
    }

    /// Padding rows are zeros.
    fn pad(&self, x: &Tensor) -> Result<Tensor> {
        x.pad_with_zeros(0, 0, 1)?.index_select(&self.rows, 0)
    }

    fn unpad(&self, x: &Tensor) -> Result<Tensor> {
        x.contiguous()?.index_select(&self.padded, 0)
    }
}

/// Each is the other's way back; candle's own of `index_select` adds row after row.
struct Padded(Places);
struct Unpadded(Places);

impl Composed for Padded {
    const NAME: &'static str = "padded";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        self.0.pad(&operands[0])
    }

    fn backward(&self, _: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        Ok(vec![self.0.unpad(dy)?])
    }
}

impl Composed for Unpadded {
    const NAME: &'static str = "unpadded";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        self.0.unpad(&operands[0])
    }

    fn backward(&self, _: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        Ok(vec![self.0.pad(dy)?])
    }
}

/// What is added to scores, `(1 or N, rows, positions)`: minus infinity where row `start + r` may not see position `p`, else 0 or
/// what the distance costs.
fn bias(
    shape: &AttentionShape,
    rows: usize,
    positions: usize,
    start: usize,
    device: &Device,
) -> Result<Tensor> {
    let sees = |own: usize, p: usize| match shape.sight {
        Sight::Past => p <= own,
        Sight::Window(width) => p <= own && own < p + width,
        Sight::All => true,
    };
    let slopes = if shape.alibi { alibi_slopes(shape.query_heads) } else { vec![0.0] };
    let mut cells = Vec::with_capacity(slopes.len() * rows * positions);
    for slope in &slopes {
        for own in start..start + rows {
            let cell =
                |p: usize| if sees(own, p) { slope * (p as f32 - own as f32) } else { f32::NEG_INFINITY };
            cells.extend((0..positions).map(cell));
        }
    }
    Tensor::from_vec(cells, (slopes.len(), rows, positions), device)
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
