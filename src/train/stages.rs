//! Sequences as one packed batch, and its way through a model, stage by stage.

use super::Sequence;
use crate::backend::reference::{Reference, Stages};
use crate::backend::{Backend, BackendError, Segment, Selection, SequenceSpan};
use crate::model::Batch;
use crate::model::llama::Pass;
use std::ops::Range;

pub(super) type Rows = <Reference as Backend>::Rows;

/// A batch on its way through a model, and the tokens that its outputs should predict.
pub(super) struct OnBatch<'a> {
    pub(super) pass: Pass<'a, Reference>,
    pub(super) batch: &'a Batch,
    /// One for each of the batch's outputs.
    pub(super) targets: &'a [u32],
    /// What the maximal network's last layer gave for the same rows, where that is what to learn.
    pub(super) teacher: Option<&'a Rows>,
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

    fn teacher(&self) -> Option<&Rows> {
        self.teacher
    }
}

/// Packs whole sequences below each other; the row before each target predicts it.
pub(super) fn whole_sequences(sequences: &[&Sequence], selection: Selection) -> (Batch, Vec<u32>) {
    let mut batch = Batch::default();
    let mut targets = Vec::new();
    for sequence in sequences.iter().filter(|s| !s.targets().is_empty()) {
        let first = batch.tokens.len();
        let rows = first..first + sequence.tokens.len();
        batch.tokens.extend(&sequence.tokens);
        batch.positions.extend(0..sequence.tokens.len() as u32);
        batch.outputs.extend((first + sequence.first_target() - 1) as u32..(rows.end - 1) as u32);
        targets.extend(sequence.targets());
        batch.spans.push(SequenceSpan { rows, start: 0, blocks: Vec::new() });
    }
    batch.segments.push(Segment { rows: 0..batch.tokens.len(), selection });
    (batch, targets)
}
