//! What a step has to read and to multiply, by which its time can be judged. Nothing is computed here.

use super::{Batch, CausalModel, MultiplyAdds};
use crate::backend::{Adapter, Arithmetic, AttentionShape, Backend, Segment, SequenceSpan};
use crate::supernet::ActiveLinear;
use std::sync::Arc;

/// Any size: the matrix's own.
const ALL: usize = usize::MAX;

/// A model and the backend that has its weights.
pub(super) struct Demand<'a, M, B> {
    pub(super) model: &'a M,
    pub(super) backend: &'a B,
}

impl<M: CausalModel<B>, B: Backend> Demand<'_, M, B> {
    /// Bytes of all weights, base and adapters.
    pub(super) fn weight_bytes(&self) -> usize {
        let backend = self.backend;
        let all = ActiveLinear { out: ALL, inp: ALL, rank: ALL };
        let linears = self.model.linears().map(|linear| {
            let adapters = linear.adapters.iter().flatten().map(|a| adapter_bytes(backend, a, all));
            backend.bytes(&linear.weight, ALL, ALL) + adapters.sum::<usize>()
        });
        let [embedding, head] = self.model.tables();
        let embedding = if Arc::ptr_eq(embedding, head) { 0 } else { backend.bytes(embedding, ALL, ALL) };
        linears.sum::<usize>() + embedding + backend.bytes(head, ALL, ALL)
    }

    /// Bytes of the weights that a step of these segments reads, each once.
    pub(super) fn weight_traffic(&self, segments: &[Segment]) -> usize {
        let backend = self.backend;
        let linears = self.model.linears().map(|linear| {
            let active = |s: &Segment| active(s, linear.index);
            let base =
                segments.iter().filter_map(active).map(|a| backend.bytes(&linear.weight, a.out, a.inp));
            let adapters = linear.adapters.iter().enumerate().filter_map(|(number, adapter)| {
                let adapter = adapter.as_ref()?;
                let of_adapter = segments.iter().filter(|s| s.selection.adapter == number);
                of_adapter.filter_map(active).map(|a| adapter_bytes(backend, adapter, a)).max()
            });
            base.max().unwrap_or(0) + adapters.sum::<usize>()
        });
        linears.sum::<usize>() + backend.bytes(self.model.tables()[1], ALL, ALL)
    }

    /// Attention is counted in f32: twice its kept heads' width for each position that a row sees.
    pub(super) fn multiply_adds(&self, batch: &Batch) -> MultiplyAdds {
        let backend = self.backend;
        let mut sum = MultiplyAdds::default();
        for linear in self.model.linears() {
            for segment in &batch.segments {
                let Some(ActiveLinear { out, inp, rank }) = active(segment, linear.index) else { continue };
                let rows = segment.rows.len();
                sum.add(backend.arithmetic(&linear.weight), rows * out * inp);
                let adapter = linear.adapters.get(segment.selection.adapter).and_then(Option::as_ref);
                if let Some(adapter) = adapter {
                    sum.add(backend.arithmetic(&adapter.a), rows * rank * inp);
                    sum.add(backend.arithmetic(&adapter.b), rows * out * rank);
                }
            }
        }
        let head = batch.segments.first().and_then(|s| s.selection.shape.linears.last());
        // The vocabulary product is the last Linear.
        if let Some(head) = head {
            // Where no logits are wanted one row stands in.
            let rows = batch.outputs.len().max(1);
            sum.add(backend.arithmetic(self.model.tables()[1]), rows * head.out * head.inp);
        }
        for (span, segment) in batch.spans_with_segments() {
            let rows = span.rows.len();
            let seen = rows * span.start + rows * (rows + 1) / 2;
            sum.add(Arithmetic::F32, 2 * self.model.attended(&segment.selection.shape) * seen);
        }
        sum
    }

    /// Bytes of the keys and values that a step reads, of a pool that has so many for each position.
    pub(super) fn cache_traffic(&self, batch: &Batch, of_position: usize) -> usize {
        let &AttentionShape { query_heads, head_size, .. } = self.model.attention();
        let all = (self.model.layers() * query_heads * head_size).max(1);
        let of_span = |(span, segment): (&SequenceSpan, &Segment)| {
            let kept = self.model.attended(&segment.selection.shape);
            (span.start + span.rows.len()) * of_position * kept / all
        };
        batch.spans_with_segments().map(of_span).sum()
    }
}

fn active(segment: &Segment, linear: usize) -> Option<ActiveLinear> {
    segment.selection.shape.linears.get(linear).copied()
}

fn adapter_bytes<B: Backend>(backend: &B, adapter: &Adapter<B>, active: ActiveLinear) -> usize {
    let ActiveLinear { out, inp, rank } = active;
    backend.bytes(&adapter.a, rank, inp) + backend.bytes(&adapter.b, out, rank)
}
