//! From files to a BERT on some backend.

use super::{Bert, Head, Layer};
use crate::artifact::{self, HeadTensors};
use crate::backend::{Activation, AttentionShape, Backend, Linear, Sight};
use crate::model::classifier::Bounds;
use crate::model::layer_norm::LayerNorm;
use crate::model::load::{LoadError, Loader};
use std::sync::Arc;

/// Places among the Linears after the layers.
const POOLER: usize = 0;
const CLASSIFIER: usize = 1;

pub(in crate::model) fn model<B: Backend>(mut loader: Loader<'_, B>) -> Result<Bert<B>, LoadError> {
    let config = &loader.base.config;
    let Some(classifier) = &config.classifier else {
        return Err(LoadError::NoClassifier { family: loader.layout.name });
    };
    let activation = match classifier.activation {
        artifact::Activation::Gelu => Activation::Gelu,
        artifact::Activation::GeluTanh => Activation::GeluTanh,
        artifact::Activation::Relu => Activation::Relu,
    };
    let (vocabulary, token_types) = (config.vocabulary, classifier.token_types);
    let max_positions = config.max_positions;
    let table = |kind: &str, rows| {
        loader.table(&format!("bert.embeddings.{kind}_embeddings.weight"), rows, config.hidden)
    };
    let words = table("word", vocabulary)?;
    let positions = table("position", max_positions)?;
    let types = table("token_type", token_types)?;
    let embedding_norm = LayerNorm::load(&loader, "bert.embeddings.LayerNorm")?;
    let layers = (0..config.layers).map(|index| layer(&mut loader, index)).collect::<Result<_, _>>()?;
    let (heads, base_head) = heads(&mut loader)?;
    let attention = AttentionShape {
        sight: Sight::All,
        ..AttentionShape::new(config.query_heads, config.kv_heads, config.head_size)
    };
    Ok(Bert {
        words,
        positions,
        types,
        embedding_norm,
        layers,
        heads,
        base_head,
        attention,
        activation,
        bounds: Bounds { vocabulary, token_types, max_positions },
    })
}

fn layer<B: Backend>(loader: &mut Loader<'_, B>, layer: usize) -> Result<Layer<B>, LoadError> {
    let of_layer = loader.layout.layer(layer);
    Ok(Layer {
        query: loader.linear(layer, 0)?,
        key: loader.linear(layer, 1)?,
        value: loader.linear(layer, 2)?,
        attended: loader.linear(layer, 3)?,
        attention_norm: LayerNorm::load(loader, &format!("{of_layer}attention.output.LayerNorm"))?,
        up: loader.linear(layer, 4)?,
        down: loader.linear(layer, 5)?,
        mlp_norm: LayerNorm::load(loader, &format!("{of_layer}output.LayerNorm"))?,
    })
}

/// The head of each super-adapter, in which the base's own Linears stand in for what was not trained; and the base's, if it is whole.
#[expect(clippy::type_complexity, reason = "named by what is said above")]
fn heads<B: Backend>(loader: &mut Loader<'_, B>) -> Result<(Vec<Head<B>>, Option<Head<B>>), LoadError> {
    let saved = loader.take_heads();
    let pooler = loader.linear_after(POOLER)?.map(Arc::new);
    let classifier = loader.linear_after(CLASSIFIER)?.map(Arc::new);
    let labels = loader.base.config.classifier.as_ref().map_or(0, |c| c.labels.len());
    let head = |saved: &HeadTensors| -> Result<Head<B>, LoadError> {
        let own = |number, base: &Option<Arc<Linear<B>>>, tensor: &str| {
            let own = loader.head_linear(number, saved)?.map(Arc::new);
            own.or_else(|| base.clone()).ok_or_else(|| LoadError::NoHead { tensor: tensor.into() })
        };
        let rows = saved.get("classifier.weight").and_then(|t| t.shape.first().copied());
        Ok(Head {
            pooler: own(POOLER, &pooler, "bert.pooler.dense.weight")?,
            classifier: own(CLASSIFIER, &classifier, "classifier.weight")?,
            labels: rows.unwrap_or(labels),
        })
    };
    let heads = saved.iter().map(head).collect::<Result<_, _>>()?;
    let base_head = pooler.clone().zip(classifier.clone());
    Ok((heads, base_head.map(|(pooler, classifier)| Head { pooler, classifier, labels })))
}
