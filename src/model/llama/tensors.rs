//! The tensors of a LLaMA's base, by their Hugging Face names.

use crate::artifact::{BaseConfig, BaseTensor};
use crate::model::Layout;

/// Every tensor, as [`super::load`] will ask for them, in the order in which the model uses them.
pub fn base_tensors(config: &BaseConfig) -> Vec<BaseTensor> {
    let layout = Layout::of(config.family);
    let tensor = |name: String, shape: &[usize]| BaseTensor { name, shape: shape.to_vec() };
    let table = |name: &str| tensor(name.into(), &[config.vocabulary, config.hidden]);
    let mut tensors = vec![table("model.embed_tokens.weight")];
    for layer in 0..config.layers {
        let norm = |name: &str| tensor(format!("{}{name}.weight", layout.layer(layer)), &[config.hidden]);
        for place in 0..layout.modules.len() {
            if place == 0 {
                tensors.push(norm("input_layernorm"));
            } else if Some(&place) == layout.mlp.0.first() {
                tensors.push(norm("post_attention_layernorm"));
            }
            let (name, (out, inp)) = (layout.module(layer, place), layout.size(config, place));
            tensors.push(tensor(format!("{name}.weight"), &[out, inp]));
            let bias = layout.has_bias(config, place);
            tensors.extend(bias.then(|| tensor(format!("{name}.bias"), &[out])));
            let head_norm = ["q_norm", "k_norm"].get(place).filter(|_| config.head_norms);
            let name = |norm| format!("{}self_attn.{norm}.weight", layout.layer(layer));
            tensors.extend(head_norm.map(|norm| tensor(name(norm), &[config.head_size])));
        }
    }
    tensors.push(tensor("model.norm.weight".into(), &[config.hidden]));
    tensors.extend((!config.tied_embeddings).then(|| table("lm_head.weight")));
    tensors
}
