//! The tensors of an MPT's base, by their Hugging Face names, queries, keys and values split.

use crate::artifact::{BaseConfig, BaseTensor};
use crate::model::Layout;

/// Every tensor, as the loader will ask for them, in the order in which the model uses them.
pub fn base_tensors(config: &BaseConfig) -> Vec<BaseTensor> {
    let layout = Layout::of(config.family);
    let tensor = |name: String, shape: &[usize]| BaseTensor { name, shape: shape.to_vec() };
    let table = |name: &str| tensor(name.into(), &[config.vocabulary, config.hidden]);
    let norm = |name: String| tensor(format!("{name}.weight"), &[config.hidden]);
    let mut tensors = vec![table("transformer.wte.weight")];
    for layer in 0..config.layers {
        let of_layer = layout.layer(layer);
        for place in 0..layout.modules.len() {
            if place == 0 {
                tensors.push(norm(format!("{of_layer}norm_1")));
            } else if Some(&place) == layout.mlp.0.first() {
                tensors.push(norm(format!("{of_layer}norm_2")));
            }
            let (out, inp) = layout.size(config, place);
            tensors.push(tensor(format!("{}.weight", layout.module(layer, place)), &[out, inp]));
        }
    }
    tensors.push(norm("transformer.norm_f".into()));
    tensors.extend((!config.tied_embeddings).then(|| table("lm_head.weight")));
    tensors
}
