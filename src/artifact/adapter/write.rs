//! Writing an adapter as PEFT reads it.

use super::file::SAFETENSORS;
use super::{AdapterConfig, AdapterTensors, CONFIG, HEADS, HeadTensors, PREFIX};
use crate::artifact::{ArtifactError, write_whole};
use crate::weights::HostData;
use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, json};
use std::path::Path;

/// The number format of a written adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorType {
    F32,
    Bf16,
}

impl TensorType {
    /// The one that holds all of these as they are.
    pub fn of(tensors: &AdapterTensors) -> Self {
        let all = tensors.values().all(|(a, b)| [a, b].iter().all(|m| matches!(m.data, HostData::Bf16(_))));
        if all { Self::Bf16 } else { Self::F32 }
    }
}

/// Writes the two files that `PeftModel.from_pretrained` reads. A module may have fewer ranks than the configuration says;
/// PEFT then scales it by the same `alpha / r` as the others.
pub fn write_adapter(
    folder: &Path,
    config: &AdapterConfig,
    tensors: &AdapterTensors,
    number_type: TensorType,
) -> Result<(), ArtifactError> {
    write_adapter_and_head(folder, config, tensors, &HeadTensors::new(), number_type)
}

/// [`write_adapter`], with a classifier's head beside the adapters, in f32.
pub fn write_adapter_and_head(
    folder: &Path,
    config: &AdapterConfig,
    tensors: &AdapterTensors,
    head: &HeadTensors,
    number_type: TensorType,
) -> Result<(), ArtifactError> {
    let path = folder.join(SAFETENSORS);
    let wrong = |e: safetensors::SafeTensorError| ArtifactError::wrong(&path, e.to_string());
    type Encode = fn(&[f32]) -> Vec<u8>;
    let in_f32: Encode = |values| values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let (dtype, encode): (_, Encode) = match number_type {
        TensorType::F32 => (Dtype::F32, in_f32),
        TensorType::Bf16 => {
            (Dtype::BF16, |values| values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect())
        }
    };
    let mut encoded = Vec::with_capacity(2 * tensors.len());
    for (module, (a, b)) in tensors {
        for (half, matrix) in [("lora_A", a), ("lora_B", b)] {
            let bytes = match &matrix.data {
                HostData::F32(values) => encode(values),
                _ => encode(&matrix.to_f32()),
            };
            encoded.push((
                format!("{PREFIX}{module}.{half}.weight"),
                dtype,
                vec![matrix.rows, matrix.columns],
                bytes,
            ));
        }
    }
    for (name, tensor) in head {
        encoded.push((format!("{PREFIX}{name}"), Dtype::F32, tensor.shape.clone(), in_f32(&tensor.values)));
    }
    let views = encoded.iter().map(|(key, dtype, shape, bytes)| {
        Ok((key.as_str(), TensorView::new(*dtype, shape.clone(), bytes.as_slice())?))
    });
    let views = views.collect::<Result<Vec<_>, _>>().map_err(wrong)?;
    let metadata = Some([("format".to_string(), "pt".to_string())].into());
    write_whole(&path, &safetensors::serialize(views, metadata).map_err(wrong)?)?;
    write_whole(&folder.join(CONFIG), &config_json(config, tensors, head))
}

fn config_json(config: &AdapterConfig, tensors: &AdapterTensors, head: &HeadTensors) -> Vec<u8> {
    let mut json = json!({
        "peft_type": "LORA",
        "task_type": if config.classifies { "SEQ_CLS" } else { "CAUSAL_LM" },
        "base_model_name_or_path": config.base_model_name,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": config.target_modules,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
    });
    let fewer =
        tensors.iter().map(|(module, (a, _))| (module, a.rows)).filter(|(_, rank)| *rank != config.rank);
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for (module, rank) in fewer {
        ranks.insert(module.clone(), rank.into());
        alphas.insert(module.clone(), (config.scale() * rank as f64).into());
    }
    if config.sparse {
        json["sparse_adapter"] = true.into();
    }
    if !ranks.is_empty() {
        json["rank_pattern"] = ranks.into();
        json["alpha_pattern"] = alphas.into();
    }
    let is_there = |(_, tensors): &&(&str, &str)| head.keys().any(|name| name.starts_with(tensors));
    let heads = HEADS.iter().filter(is_there).map(|(module, _)| *module).collect::<Vec<_>>();
    if !heads.is_empty() {
        json["modules_to_save"] = heads.into();
    }
    format!("{json:#}\n").into_bytes()
}
