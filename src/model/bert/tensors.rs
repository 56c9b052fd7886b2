//! The tensors of a BERT that classifies, by their Hugging Face names.

use crate::artifact::{BaseConfig, BaseTensor};
use crate::model::Layout;

/// Every tensor, in the order in which the model uses them.
pub fn base_tensors(config: &BaseConfig) -> Vec<BaseTensor> {
    let layout = Layout::of(config.family);
    let tensor = |name: String, shape: &[usize]| BaseTensor { name, shape: shape.to_vec() };
    let norm = |name: String| {
        ["weight", "bias"].map(|part| tensor(format!("{name}.LayerNorm.{part}"), &[config.hidden]))
    };
    let token_types = config.classifier.as_ref().map_or(0, |c| c.token_types);
    let embeddings =
        [("word", config.vocabulary), ("position", config.max_positions), ("token_type", token_types)];
    let embedding =
        |(kind, rows)| tensor(format!("bert.embeddings.{kind}_embeddings.weight"), &[rows, config.hidden]);
    let mut tensors = embeddings.map(embedding).to_vec();
    tensors.extend(norm("bert.embeddings".into()));
    for layer in 0..config.layers {
        for place in 0..layout.modules.len() {
            let (name, (out, inp)) = (layout.module(layer, place), layout.size(config, place));
            tensors.push(tensor(format!("{name}.weight"), &[out, inp]));
            tensors.push(tensor(format!("{name}.bias"), &[out]));
            if let Some(output) = name.strip_suffix(".dense").filter(|n| n.ends_with("output")) {
                tensors.extend(norm(output.into()));
            }
        }
    }
    for (name, out, inp) in layout.after(config) {
        tensors.push(tensor(format!("{name}.weight"), &[out, inp]));
        tensors.push(tensor(format!("{name}.bias"), &[out]));
    }
    tensors
}
