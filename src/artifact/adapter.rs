//! A super-adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors, full size.

use super::hugging_face::SafetensorsFile;
use super::{ArtifactError, read_json, write_whole};
use crate::weights::{HostData, HostMatrix};
use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// What adapter_config.json says.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterConfig {
    /// `r`: the full rank.
    pub rank: usize,
    /// `lora_alpha`; the scale is `alpha / rank` for every active rank.
    pub alpha: f64,
    pub dropout: f64,
    /// Short module names, e.g. `q_proj`.
    pub target_modules: Vec<String>,
    pub base_model_name: String,
}

impl AdapterConfig {
    /// `alpha / r`
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }
}

/// By module path, e.g. `model.layers.0.self_attn.q_proj`: A `(R, inp)` and B `(out, R)`.
pub type AdapterTensors = BTreeMap<String, (HostMatrix, HostMatrix)>;

/// The number format of a written adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorType {
    F32,
    Bf16,
}

/// Reads a folder that PEFT (or this program) wrote.
///
/// # Errors
/// A kind of adapter that is not plain LoRA (rank-stabilised, DoRA, biases, per-module ranks, saved modules), a tensor
/// without its partner, or one that is no LoRA tensor.
pub fn read_adapter(folder: &Path) -> Result<(AdapterConfig, AdapterTensors), ArtifactError> {
    let config = read_adapter_config(folder)?;
    let path = folder.join(TENSORS);
    let file = SafetensorsFile::open(&path)?;
    let tensors = file.tensors()?;
    let mut halves: BTreeMap<String, [Option<HostMatrix>; 2]> = BTreeMap::new();
    for (key, view) in tensors.iter() {
        let (module, half) = parse_key(key)
            .ok_or_else(|| ArtifactError::wrong(&path, format!("tensor `{key}` is not a LoRA tensor")))?;
        let &[rows, columns] = view.shape() else {
            let reason = format!("tensor `{key}`: expected a matrix, got shape {:?}", view.shape());
            return Err(ArtifactError::wrong(&path, reason));
        };
        // A is (R, inp), B is (out, R).
        let expected = if half == 0 { [config.rank, columns] } else { [rows, config.rank] };
        let data = file.matrix(key, &expected)?;
        let name = format!("{module}.{}", ["lora_A.weight", "lora_B.weight"][half]);
        let slot = &mut halves.entry(module.to_string()).or_default()[half];
        if slot.replace(HostMatrix { name, rows, columns, data }).is_some() {
            return Err(ArtifactError::wrong(&path, format!("tensor `{key}` stands there twice")));
        }
    }
    let pair = |(module, [a, b]): (String, [Option<HostMatrix>; 2])| match (a, b) {
        (Some(a), Some(b)) => Ok((module, (a, b))),
        (None, _) => Err(missing(&path, &module, "lora_A")),
        (_, None) => Err(missing(&path, &module, "lora_B")),
    };
    Ok((config, halves.into_iter().map(pair).collect::<Result<_, _>>()?))
}

fn missing(path: &Path, module: &str, half: &str) -> ArtifactError {
    ArtifactError::MissingTensor { path: path.into(), tensor: format!("{PREFIX}{module}.{half}.weight") }
}

/// `base_model.model.M.lora_A.weight`, as saved, or `.lora_A.default.weight`, as in memory: `M`, and 0 for A, 1 for B.
fn parse_key(key: &str) -> Option<(&str, usize)> {
    let rest = key.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    let rest = rest.strip_suffix(".default").unwrap_or(rest);
    rest.strip_suffix(".lora_A").map(|m| (m, 0)).or_else(|| rest.strip_suffix(".lora_B").map(|m| (m, 1)))
}

/// Fields of adapter_config.json that make an adapter compute something else than `W x + s B A x` on plain Linears.
const OFF: [&str; 17] = [
    "use_rslora",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
];

fn is_empty(value: &Value) -> bool {
    value.as_object().is_some_and(serde_json::Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}

/// Reads adapter_config.json alone.
///
/// # Errors
/// A kind of adapter that is not plain LoRA.
pub fn read_adapter_config(folder: &Path) -> Result<AdapterConfig, ArtifactError> {
    let path = &folder.join(CONFIG);
    let json: Value = read_json(path)?;
    let field = |name: &str| json.get(name).filter(|v| !v.is_null());
    let wrong = |name: &str, expected: &str| {
        let got = json.get(name).map_or("nothing".to_string(), |v| v.to_string().chars().take(80).collect());
        ArtifactError::field(path, name, format!("expected {expected}, got {got}"))
    };
    if field("peft_type").and_then(Value::as_str) != Some("LORA") {
        return Err(wrong("peft_type", "\"LORA\""));
    }
    for name in OFF {
        if field(name).is_some_and(|v| v != &Value::Bool(false) && !is_empty(v)) {
            return Err(wrong(name, "nothing or false"));
        }
    }
    if field("bias").is_some_and(|v| v != "none") {
        return Err(wrong("bias", "\"none\""));
    }
    let keeps_the_base =
        |v: &Value| v.is_boolean() || ["gaussian", "eva", "orthogonal"].iter().any(|k| v == k);
    if field("init_lora_weights").is_some_and(|v| !keeps_the_base(v)) {
        // PiSSA, OLoRA, CorDA and their like change the base weights too, and do so again when PEFT loads them.
        return Err(wrong("init_lora_weights", "an initialisation that leaves the base as it is"));
    }
    let rank = field("r").and_then(Value::as_u64).and_then(|r| usize::try_from(r).ok());
    let rank =
        rank.filter(|&r| (1..=4096).contains(&r)).ok_or_else(|| wrong("r", "a rank from 1 to 4096"))?;
    let alpha = field("lora_alpha").and_then(Value::as_f64).filter(|a| a.abs() <= f64::from(f32::MAX));
    let dropout = field("lora_dropout").map_or(Some(0.0), Value::as_f64).filter(|d| (0.0..1.0).contains(d));
    let targets = field("target_modules").and_then(Value::as_array);
    let targets = targets.and_then(|t| t.iter().map(|m| m.as_str().map(String::from)).collect());
    Ok(AdapterConfig {
        rank,
        alpha: alpha.ok_or_else(|| wrong("lora_alpha", "a number"))?,
        dropout: dropout.ok_or_else(|| wrong("lora_dropout", "a number from 0 to below 1"))?,
        target_modules: targets.ok_or_else(|| wrong("target_modules", "a list of module names"))?,
        base_model_name: field("base_model_name_or_path").and_then(Value::as_str).unwrap_or_default().into(),
    })
}

/// Writes the two files that `PeftModel.from_pretrained` reads. A module may have fewer ranks than the configuration says;
/// PEFT then scales it by the same `alpha / r` as the others.
pub fn write_adapter(
    folder: &Path,
    config: &AdapterConfig,
    tensors: &AdapterTensors,
    number_type: TensorType,
) -> Result<(), ArtifactError> {
    let path = folder.join(TENSORS);
    let wrong = |e: safetensors::SafeTensorError| ArtifactError::wrong(&path, e.to_string());
    type Encode = fn(&[f32]) -> Vec<u8>;
    let (dtype, encode): (_, Encode) = match number_type {
        TensorType::F32 => (Dtype::F32, |values| values.iter().flat_map(|v| v.to_le_bytes()).collect()),
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
                vec![matrix.rows, matrix.columns],
                bytes,
            ));
        }
    }
    let view = |(key, shape, bytes)| Ok((key, TensorView::new(dtype, shape, bytes)?));
    let views = encoded.iter().map(|(k, s, b)| view((k.as_str(), s.clone(), b.as_slice())));
    let views = views.collect::<Result<Vec<_>, _>>().map_err(wrong)?;
    let metadata = Some([("format".to_string(), "pt".to_string())].into());
    write_whole(&path, &safetensors::serialize(views, metadata).map_err(wrong)?)?;
    write_whole(&folder.join(CONFIG), &config_json(config, tensors))
}

fn config_json(config: &AdapterConfig, tensors: &AdapterTensors) -> Vec<u8> {
    let mut json = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
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
    if !ranks.is_empty() {
        json["rank_pattern"] = ranks.into();
        json["alpha_pattern"] = alphas.into();
    }
    format!("{json:#}\n").into_bytes()
}
