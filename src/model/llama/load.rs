//! From files to a LLaMA on some backend.

use super::{Layer, Llama};
use crate::artifact::{ArtifactError, Base, Family};
use crate::backend::{AttentionShape, Backend, GatedMlp, Sight};
use crate::model::load::{LoadError, Loader, SuperAdapter};
use crate::model::{Adapters, Orders};
use std::sync::Arc;

/// Loads the base once and every super-adapter beside it.
///
/// `orders` hold for the base and for every adapter alike.
///
/// # Errors
/// A tensor that is missing or has the wrong size, a sparse adapter, or a backend without memory for it.
pub fn load<B: Backend>(
    backend: &B,
    base: &Base,
    super_adapters: Vec<SuperAdapter>,
    orders: &Orders,
) -> Result<Llama<B>, LoadError> {
    model(Loader::new(backend, base, Adapters::Beside(super_adapters), orders)?)
}

/// Loads the base with one super-adapter added into it: `W + s B A`, at full rank. Prefixes of it are those of a
/// sub-network that keeps all ranks, see [`ModelShape::keeps_ranks`]; the model computes no adapter.
///
/// # Errors
/// As [`load`].
///
/// [`ModelShape::keeps_ranks`]: crate::supernet::ModelShape::keeps_ranks
pub fn load_merged<B: Backend>(
    backend: &B,
    base: &Base,
    super_adapter: SuperAdapter,
    orders: &Orders,
) -> Result<Llama<B>, LoadError> {
    model(Loader::new(backend, base, Adapters::Merged(super_adapter), orders)?)
}

/// A file may hold the head although it is the embedding; where the two differ, transformers 5 computes with the head and versions
/// before it with the embedding.
fn check_tied(base: &Base, vocabulary: usize, hidden: usize) -> Result<(), ArtifactError> {
    let embedding = "model.embed_tokens.weight";
    let head = match base.matrix("lm_head.weight", vocabulary, hidden) {
        Err(ArtifactError::MissingTensor { .. }) => return Ok(()),
        head => head?,
    };
    if head.data == base.matrix(embedding, vocabulary, hidden)?.data {
        return Ok(());
    }
    Err(ArtifactError::Wrong {
        path: base.path().into(),
        reason: format!("`tie_word_embeddings` is true, but lm_head.weight is not {embedding}"),
    })
}

pub(in crate::model) fn model<B: Backend>(mut loader: Loader<'_, B>) -> Result<Llama<B>, LoadError> {
    if loader.base.config.family != Family::Llama {
        return Err(LoadError::OnlyLlama { what: "training", family: loader.layout.name });
    }
    let config = &loader.base.config;
    let (vocabulary, hidden) = (config.vocabulary, config.hidden);
    let embedding = loader.table("model.embed_tokens.weight", vocabulary, hidden)?;
    let head = match config.tied_embeddings {
        true => {
            check_tied(loader.base, vocabulary, hidden)?;
            Arc::clone(&embedding)
        }
        false => loader.table("lm_head.weight", vocabulary, hidden)?,
    };
    let layers = (0..config.layers).map(|index| layer(&mut loader, index)).collect::<Result<_, _>>()?;
    let pairs = config.head_size / 2;
    let frequency = |i| {
        let exponent = (2 * i) as f32 / config.head_size as f32;
        1.0 / config.rope_theta.powf(exponent) / config.rope_factors.get(i).copied().unwrap_or(1.0)
    };
    let attention = AttentionShape {
        sight: config.window.map_or(Sight::Past, Sight::Window),
        ..AttentionShape::new(config.query_heads, config.kv_heads, config.head_size)
    };
    Ok(Llama {
        embedding,
        layers,
        norm: loader.vector("model.norm.weight", hidden)?,
        head,
        attention,
        inverse_frequencies: (0..pairs).map(frequency).collect(),
        eps: config.norm_eps,
        vocabulary,
    })
}

fn layer<B: Backend>(loader: &mut Loader<'_, B>, layer: usize) -> Result<Layer<B>, LoadError> {
    let (of_layer, hidden) = (loader.layout.layer(layer), loader.base.config.hidden);
    let norm = |loader: &Loader<'_, B>, name| loader.vector(&format!("{of_layer}{name}.weight"), hidden);
    let config = &loader.base.config;
    let head_norm = |name| loader.vector(&format!("{of_layer}self_attn.{name}.weight"), config.head_size);
    let head_norms =
        if config.head_norms { Some([head_norm("q_norm")?, head_norm("k_norm")?]) } else { None };
    Ok(Layer {
        attention_norm: norm(loader, "input_layernorm")?,
        q: loader.linear(layer, 0)?,
        k: loader.linear(layer, 1)?,
        v: loader.linear(layer, 2)?,
        o: loader.linear(layer, 3)?,
        head_norms,
        mlp_norm: norm(loader, "post_attention_layernorm")?,
        mlp: GatedMlp {
            gate: loader.linear(layer, 4)?,
            up: loader.linear(layer, 5)?,
            down: loader.linear(layer, 6)?,
        },
    })
}
