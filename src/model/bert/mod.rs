//! The BERT family (Devlin et al. 2019), as a classifier of whole sequences: learnt positions, every row sees every row, a norm after
//! each residual; the first row of each text, pooled, decides.
//!
//! Each super-adapter has a head of its own, so that several tasks share one base.

mod load;
mod tensors;

pub(super) use load::model;
pub use tensors::base_tensors;

use super::classifier::{self, Bounds};
use super::layer_norm::LayerNorm;
use super::{Classifier, TextBatch};
use crate::backend::{Activation, AttentionShape, Backend, BackendError, Linear, Segment, SequenceSpan};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// A BERT with every super-adapter that shares its base.
pub struct Bert<B: Backend> {
    /// `(V, H)`
    words: Arc<B::Matrix>,
    /// `(max_positions, H)`
    positions: Arc<B::Matrix>,
    /// `(token_types, H)`
    types: Arc<B::Matrix>,
    embedding_norm: LayerNorm<B>,
    layers: Vec<Layer<B>>,
    /// By super-adapter.
    heads: Vec<Head<B>>,
    /// For what runs without any.
    base_head: Option<Head<B>>,
    attention: AttentionShape,
    activation: Activation,
    bounds: Bounds,
}

struct Layer<B: Backend> {
    query: Linear<B>,
    key: Linear<B>,
    value: Linear<B>,
    attended: Linear<B>,
    attention_norm: LayerNorm<B>,
    up: Linear<B>,
    down: Linear<B>,
    mlp_norm: LayerNorm<B>,
}

/// From a text's first row to a number for each label. What is the base's is shared.
struct Head<B: Backend> {
    /// `(H, H)`
    pooler: Arc<Linear<B>>,
    /// `(labels, H)`
    classifier: Arc<Linear<B>>,
    labels: usize,
}

impl<B: Backend> Bert<B> {
    /// `(T, H)`
    fn embed(&self, backend: &B, batch: &TextBatch) -> Result<B::Rows, BackendError> {
        let positions = batch.texts.iter().flat_map(|text| 0..text.len() as u32).collect::<Vec<_>>();
        let x = backend.embed(&self.words, &batch.tokens)?;
        let x = backend.add(x, &backend.embed(&self.positions, &positions)?)?;
        let x = backend.add(x, &backend.embed(&self.types, &batch.token_types)?)?;
        self.embedding_norm.of(backend, &x)
    }

    /// What rows see of their texts: `x (T, H)` to `(T, N*D)`.
    fn attend(
        &self,
        backend: &B,
        x: &B::Rows,
        layer: &Layer<B>,
        segments: &[Segment],
        spans: &[SequenceSpan],
    ) -> Result<B::Rows, BackendError> {
        let linears = [&layer.query, &layer.key, &layer.value];
        let [q, k, v] = backend.linears(x, None, linears, segments)?;
        backend.attention(&q, &k, &v, &self.attention, spans, None)
    }

    /// The rest of a layer, which each row does by itself.
    fn alone(
        &self,
        backend: &B,
        x: B::Rows,
        attended: &B::Rows,
        layer: &Layer<B>,
        segments: &[Segment],
    ) -> Result<B::Rows, BackendError> {
        let x = backend.linear_onto(x, attended, &layer.attended, segments)?;
        let x = layer.attention_norm.of(backend, &x)?;
        let wide = backend.activate(backend.linear(&x, &layer.up, segments)?, self.activation)?;
        let x = backend.linear_onto(x, &wide, &layer.down, segments)?;
        layer.mlp_norm.of(backend, &x)
    }

    /// `(texts, H)`: the last layer's first row of each text. Behind its attention nobody reads the others.
    fn first_rows(
        &self,
        backend: &B,
        batch: &TextBatch,
        of_texts: &[Segment],
    ) -> Result<B::Rows, BackendError> {
        let span = |rows: &Range<usize>| SequenceSpan { rows: rows.clone(), start: 0, blocks: Vec::new() };
        let spans = batch.texts.iter().map(span).collect::<Vec<_>>();
        let firsts = batch.texts.iter().map(|text| text.start as u32).collect::<Vec<_>>();
        let mut x = self.embed(backend, batch)?;
        let (last, others) = self.layers.split_last().ok_or(BackendError::Shape {
            operation: "classify",
            expected: "a layer".into(),
            got: "none".into(),
        })?;
        for layer in others {
            let attended = self.attend(backend, &x, layer, &batch.segments, &spans)?;
            x = self.alone(backend, x, &attended, layer, &batch.segments)?;
        }
        let attended = self.attend(backend, &x, last, &batch.segments, &spans)?;
        let (x, attended) = (backend.select(&x, &firsts)?, backend.select(&attended, &firsts)?);
        self.alone(backend, x, &attended, last, of_texts)
    }

    /// The head of a super-adapter; that of the base for a number that none has.
    fn head(&self, adapter: usize) -> Option<&Head<B>> {
        self.heads.get(adapter).or(self.base_head.as_ref())
    }

    /// By text: a number for each label.
    fn forward(&self, backend: &B, batch: &TextBatch) -> Result<Vec<Vec<f32>>, BackendError> {
        classifier::check(batch, self.bounds)?;
        let of_texts = batch.segments_of_texts();
        self.check_heads(&of_texts)?;
        let rows = self.first_rows(backend, batch, &of_texts)?;
        let mut by_adapter = BTreeMap::<usize, OfAdapter>::new();
        for segment in of_texts {
            by_adapter.entry(segment.selection.adapter).or_default().push(segment);
        }
        let mut logits = vec![Vec::new(); batch.texts.len()];
        for (adapter, OfAdapter { texts, segments }) in by_adapter {
            let Some(head) = self.head(adapter) else { continue };
            let x = backend.linear(&backend.select(&rows, &texts)?, &head.pooler, &segments)?;
            let x = backend.activate(x, Activation::Tanh)?;
            let values = backend.host(backend.linear(&x, &head.classifier, &segments)?)?;
            for (text, values) in texts.into_iter().zip(values.chunks_exact(head.labels)) {
                logits[text as usize] = values.to_vec();
            }
        }
        Ok(logits)
    }

    /// Whether each text has a head, and its sub-network is one of a model with that head.
    fn check_heads(&self, of_texts: &[Segment]) -> Result<(), BackendError> {
        let wrong = |expected, got| Err(BackendError::Shape { operation: "classify", expected, got });
        for Segment { selection, .. } in of_texts {
            let Some(head) = self.head(selection.adapter) else {
                let expected = format!("super-adapters below {}", self.heads.len());
                return wrong(expected, selection.adapter.to_string());
            };
            let outputs = selection.shape.linears.get(head.classifier.index).map(|linear| linear.out);
            if outputs != Some(head.labels) {
                return wrong(format!("a sub-network with {} labels", head.labels), format!("{outputs:?}"));
            }
        }
        Ok(())
    }
}

/// The texts of one super-adapter, which go through its head together.
#[derive(Default)]
struct OfAdapter {
    /// Where they stand among all.
    texts: Vec<u32>,
    /// Cover `texts`.
    segments: Vec<Segment>,
}

impl OfAdapter {
    fn push(&mut self, Segment { rows, selection }: Segment) {
        let first = self.texts.len();
        self.texts.extend(rows.map(|text| text as u32));
        self.segments.push(Segment { rows: first..self.texts.len(), selection });
    }
}

/// A BERT on one backend.
pub struct BertClassifier<B: Backend> {
    model: Bert<B>,
    backend: B,
}

impl<B: Backend> BertClassifier<B> {
    pub(super) fn new(model: Bert<B>, backend: B) -> Self {
        Self { model, backend }
    }
}

impl<B: Backend> Classifier for BertClassifier<B> {
    fn classify(&mut self, batch: &TextBatch) -> Result<Vec<Vec<f32>>, BackendError> {
        let logits = self.model.forward(&self.backend, batch);
        if logits.is_err() {
            self.backend.forget();
        }
        logits
    }

    fn labels(&self, adapter: usize) -> Option<usize> {
        self.model.head(adapter).map(|head| head.labels)
    }

    fn max_positions(&self) -> usize {
        self.model.bounds.max_positions
    }
}
