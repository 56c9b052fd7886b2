//! The tensors of a BLOOM's base, by their Hugging Face names.

use crate::artifact::{BaseConfig, BaseTensor};
use crate::model::Layout;

/// Every tensor, as the loader will ask for them, in the order in which the model uses them.
pub fn base_tensors(config: &BaseConfig) -> Vec<BaseTensor> {
    let layout = Layout::of(config.family);
    let tensor = |name: String, shape: &[usize]| BaseTensor { name, shape: shape.to_vec() };
    let table = |name: &str| tensor(name.into(), &[config.vocabulary, config.hidden]);
    let norm =
        |name: String| ["weight", "bias"].map(|part| tensor(format!("{name}.{part}"), &[config.hidden]));
    let mut tensors = vec![table("transformer.word_embeddings.weight")];
    tensors.extend(norm("transformer.word_embeddings_layernorm".into()));
    for layer in 0..config.layers {
        let of_layer = layout.layer(layer);
        for place in 0..layout.modules.len() {
            if place == 0 {
                tensors.extend(norm(format!("{of_layer}input_layernorm")));
            } else if Some(&place) == layout.mlp.0.first() {
                tensors.extend(norm(format!("{of_layer}post_attention_layernorm")));
            }
            let (name, (out, inp)) = (layout.module(layer, place), layout.size(config, place));
            tensors.push(tensor(format!("{name}.weight"), &[out, inp]));
            tensors.push(tensor(format!("{name}.bias"), &[out]));
        }
    }
    tensors.extend(norm("transformer.ln_f".into()));
    tensors.extend((!config.tied_embeddings).then(|| table("lm_head.weight")));
    tensors
}
