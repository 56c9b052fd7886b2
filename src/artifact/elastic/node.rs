//! Names of modules: NNCF's paths through a traced model, torch's paths through its modules.
//!
//! NNCF writes `Class[attribute]/Class[attribute]/.../linear_0`. Classes change with versions (`LlamaSdpaAttention` was
//! `LlamaAttention`), so only what stands in brackets counts.

use crate::supernet::{ModelShape, Part, TensorRef};

/// What PEFT puts before every module of the base.
const PEFT: &str = "base_model.model.";

/// The path through the modules, e.g. `base_model.model.model.layers.0.mlp.gate_proj.self_linear`. A name without brackets is
/// such a path already.
pub(super) fn module_path(name: &str) -> String {
    if !name.contains('/') {
        return name.to_string();
    }
    let attribute = |part: &str| Some(part.split_once('[')?.1.strip_suffix(']')?.to_string());
    name.split('/').filter_map(attribute).collect::<Vec<_>>().join(".")
}

/// The tensor whose rows a module's outputs are; `None` where the model has none of this name.
pub(super) fn tensor(shape: &ModelShape, path: &str) -> Option<TensorRef> {
    let path = path.strip_prefix(PEFT)?;
    let path = path.strip_suffix(".default").unwrap_or(path);
    // The base's own Linear inside the one with an adapter: LoNAS's patch, then PEFT's name for it.
    let parts = [
        (".lora_A", Part::LoraA),
        (".lora_B", Part::LoraB),
        (".self_linear", Part::Weight),
        (".base_layer", Part::Weight),
    ];
    let found = parts.into_iter().find_map(|(end, part)| Some((path.strip_suffix(end)?, part)));
    let (module, part) = found.unwrap_or((path, Part::Weight));
    let linear = shape.find(module)?;
    let has_adapter = shape.linears[linear].rank.is_some();
    (part == Part::Weight || has_adapter).then_some(TensorRef { linear, part })
}
