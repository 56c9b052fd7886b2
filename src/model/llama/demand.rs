//! What a step has to read and to multiply, by which its time can be judged. Nothing is computed here.

use super::{Batch, Llama, MODULES};
use crate::backend::{Adapter, Arithmetic, Backend, Linear, Segment};
use crate::model::MultiplyAdds;
use crate::supernet::ActiveLinear;

/// Any size: the matrix's own.
const ALL: usize = usize::MAX;

impl<B: Backend> Llama<B> {
    fn linears(&self) -> impl Iterator<Item = &Linear<B>> {
        self.layers.iter().flat_map(|layer| {
            let mlp = &layer.mlp;
            [&layer.q, &layer.k, &layer.v, &layer.o, &mlp.gate, &mlp.up, &mlp.down]
        })
    }

    /// Bytes of all weights, base and adapters.
    pub(super) fn weight_bytes(&self, backend: &B) -> usize {
        let all = ActiveLinear { out: ALL, inp: ALL, rank: ALL };
        let linears = self.linears().map(|linear| {
            let adapters = linear.adapters.iter().flatten().map(|a| adapter_bytes(backend, a, all));
            backend.bytes(&linear.weight, ALL, ALL) + adapters.sum::<usize>()
        });
        let own = !std::sync::Arc::ptr_eq(&self.embedding, &self.head);
        let embedding = if own { backend.bytes(&self.embedding, ALL, ALL) } else { 0 };
        linears.sum::<usize>() + embedding + backend.bytes(&self.head, ALL, ALL)
    }

    /// Bytes of the weights that a step of these segments reads, each once.
    pub(super) fn weight_traffic(&self, backend: &B, segments: &[Segment]) -> usize {
        let linears = self.linears().map(|linear| {
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
        linears.sum::<usize>() + backend.bytes(&self.head, ALL, ALL)
    }

    /// Attention is counted in f32: twice its heads' width for each position that a row sees.
    pub(super) fn multiply_adds(&self, backend: &B, batch: &Batch) -> MultiplyAdds {
        let mut sum = MultiplyAdds::default();
        for linear in self.linears() {
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
        let head = batch.segments.first().and_then(|s| active(s, self.layers.len() * MODULES.len()));
        if let Some(head) = head {
            // Where no logits are wanted one row stands in.
            let rows = batch.outputs.len().max(1);
            sum.add(backend.arithmetic(&self.head), rows * head.out * head.inp);
        }
        let width = self.attention.query_heads * self.attention.head_size;
        for span in &batch.spans {
            let rows = span.rows.len();
            let seen = rows * span.start + rows * (rows + 1) / 2;
            sum.add(Arithmetic::F32, self.layers.len() * 2 * width * seen);
        }
        sum
    }
}

fn active(segment: &Segment, linear: usize) -> Option<ActiveLinear> {
    segment.selection.shape.linears.get(linear).copied()
}

fn adapter_bytes<B: Backend>(backend: &B, adapter: &Adapter<B>, active: ActiveLinear) -> usize {
    let ActiveLinear { out, inp, rank } = active;
    backend.bytes(&adapter.a, rank, inp) + backend.bytes(&adapter.b, out, rank)
}
