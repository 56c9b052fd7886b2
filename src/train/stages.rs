//! Sequences as one packed batch, and its way through a model, stage by stage.

use crate::backend::reference::{Reference, Stages};
use crate::backend::{Backend, BackendError, Segment, Selection, SequenceSpan};
use crate::model::Batch;
use crate::model::llama::Pass;
use std::ops::Range;

type Rows = <Reference as Backend>::Rows;

/// A batch on its way through a model, and the tokens that its outputs should predict.
pub(super) struct OnBatch<'a> {
    pub(super) pass: Pass<'a, Reference>,
    pub(super) batch: &'a Batch,
    /// One for each of the batch's outputs.
    pub(super) targets: &'a [u32],
}

impl Stages for OnBatch<'_> {
    fn embed(&self) -> Result<Rows, BackendError> {
        self.pass.embed()
    }

    fn layers(&self) -> usize {
        self.pass.layers()
    }

    fn layer(&self, index: usize, x: Rows) -> Result<Rows, BackendError> {
        self.pass.layer(index, x, None)
    }

    fn targets(&self) -> &[u32] {
        self.targets
    }

    fn logits(&self, x: &Rows, targets: Range<usize>) -> Result<Rows, BackendError> {
        self.pass.logits(x, &self.batch.outputs[targets])
    }
}

/// Packs whole sequences below each other; every row but each sequence's last one predicts the next token.
pub(super) fn whole_sequences(sequences: &[&[u32]], selection: Selection) -> (Batch, Vec<u32>) {
    let mut batch = Batch::default();
    let mut targets = Vec::new();
    for sequence in sequences {
        let first = batch.tokens.len();
        let rows = first..first + sequence.len();
        batch.tokens.extend(*sequence);
        batch.positions.extend(0..sequence.len() as u32);
        batch.outputs.extend(first as u32..(rows.end - 1) as u32);
        targets.extend(&sequence[1..]);
        batch.spans.push(SequenceSpan { rows, start: 0, blocks: Vec::new() });
    }
    batch.segments.push(Segment { rows: 0..batch.tokens.len(), selection });
    (batch, targets)
}
