//! From files to a BLOOM on some backend.

use super::{Bloom, Layer};
use crate::backend::{AttentionShape, Backend};
use crate::model::layer_norm::LayerNorm;
use crate::model::load::{LoadError, Loader};
use std::sync::Arc;

pub(in crate::model) fn model<B: Backend>(mut loader: Loader<'_, B>) -> Result<Bloom<B>, LoadError> {
    let config = &loader.base.config;
    let (vocabulary, hidden) = (config.vocabulary, config.hidden);
    let embedding = loader.table("transformer.word_embeddings.weight", vocabulary, hidden)?;
    let head = match config.tied_embeddings {
        true => Arc::clone(&embedding),
        false => loader.table("lm_head.weight", vocabulary, hidden)?,
    };
    let order = by_part(config.query_heads, config.head_size);
    let layers =
        (0..config.layers).map(|index| layer(&mut loader, index, &order)).collect::<Result<_, _>>()?;
    let attention = AttentionShape {
        alibi: true,
        ..AttentionShape::new(config.query_heads, config.kv_heads, config.head_size)
    };
    Ok(Bloom {
        embedding,
        embedding_norm: LayerNorm::load(&loader, "transformer.word_embeddings_layernorm")?,
        layers,
        norm: LayerNorm::load(&loader, "transformer.ln_f")?,
        head,
        attention,
        residual_after_norm: config.residual_after_norm,
        vocabulary,
    })
}

fn layer<B: Backend>(
    loader: &mut Loader<'_, B>,
    layer: usize,
    order: &Vec<usize>,
) -> Result<Layer<B>, LoadError> {
    let of_layer = loader.layout.layer(layer);
    Ok(Layer {
        attention_norm: LayerNorm::load(loader, &format!("{of_layer}input_layernorm"))?,
        query_key_value: loader.reordered(layer, 0, Some(order))?,
        dense: loader.linear(layer, 1)?,
        mlp_norm: LayerNorm::load(loader, &format!("{of_layer}post_attention_layernorm"))?,
        up: loader.linear(layer, 2)?,
        down: loader.linear(layer, 3)?,
    })
}

/// A file has queries, keys and values of the first head, then of the second, and so on; attention takes all queries, then all
/// keys, then all values.
fn by_part(heads: usize, head_size: usize) -> Vec<usize> {
    let row = |part: usize, head: usize| (3 * head + part) * head_size;
    let parts = (0..3).flat_map(|part| (0..heads).map(move |head| row(part, head)));
    parts.flat_map(|start| start..start + head_size).collect()
}
