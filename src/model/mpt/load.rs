//! From files to an MPT on some backend.

use super::{Layer, Mpt};
use crate::backend::{AttentionShape, Backend};
use crate::model::layer_norm::LayerNorm;
use crate::model::load::{LoadError, Loader};
use std::sync::Arc;

pub(in crate::model) fn model<B: Backend>(mut loader: Loader<'_, B>) -> Result<Mpt<B>, LoadError> {
    let config = &loader.base.config;
    let (vocabulary, hidden) = (config.vocabulary, config.hidden);
    let embedding = loader.table("transformer.wte.weight", vocabulary, hidden)?;
    let head = match config.tied_embeddings {
        true => Arc::clone(&embedding),
        false => loader.table("lm_head.weight", vocabulary, hidden)?,
    };
    let layers = (0..config.layers).map(|index| layer(&mut loader, index)).collect::<Result<_, _>>()?;
    let attention = AttentionShape {
        alibi: true,
        ..AttentionShape::new(config.query_heads, config.kv_heads, config.head_size)
    };
    let norm = LayerNorm::without_shift(&loader, "transformer.norm_f")?;
    Ok(Mpt { embedding, layers, norm, head, attention, vocabulary })
}

fn layer<B: Backend>(loader: &mut Loader<'_, B>, layer: usize) -> Result<Layer<B>, LoadError> {
    let of_layer = loader.layout.layer(layer);
    Ok(Layer {
        attention_norm: LayerNorm::without_shift(loader, &format!("{of_layer}norm_1"))?,
        query: loader.linear(layer, 0)?,
        key: loader.linear(layer, 1)?,
        value: loader.linear(layer, 2)?,
        attended: loader.linear(layer, 3)?,
        mlp_norm: LayerNorm::without_shift(loader, &format!("{of_layer}norm_2"))?,
        up: loader.linear(layer, 4)?,
        down: loader.linear(layer, 5)?,
    })
}
