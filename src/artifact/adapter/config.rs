//! adapter_config.json, read.

use super::{AdapterConfig, CONFIG, HEADS};
use crate::artifact::{ArtifactError, read_json};
use serde_json::Value;
use std::path::Path;

/// Fields of adapter_config.json that make an adapter compute something else than `W x + s B A x` on plain Linears.
const OFF: [&str; 15] = [
    "use_rslora",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "layers_to_transform",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
    // SQFT's QA-SparsePEFT: the sum is rounded to a GPTQ base's blocks, which needs the base before it was quantised too.
    "quantization_aware",
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
    let sparse = field("sparse_adapter").map_or(Some(false), Value::as_bool);
    let sparse = sparse.ok_or_else(|| wrong("sparse_adapter", "true or false"))?;
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
    let rank = rank.filter(|r| RANKS.contains(r)).ok_or_else(|| wrong("r", "a rank from 1 to 4096"))?;
    let alpha = field("lora_alpha").and_then(Value::as_f64).filter(|a| a.abs() <= f64::from(f32::MAX));
    let dropout = field("lora_dropout").map_or(Some(0.0), Value::as_f64).filter(|d| (0.0..1.0).contains(d));
    let targets = field("target_modules").and_then(Value::as_array);
    let targets = targets.and_then(|t| t.iter().map(|m| m.as_str().map(String::from)).collect());
    let alpha = alpha.ok_or_else(|| wrong("lora_alpha", "a number"))?;
    let classifies = field("task_type").is_some_and(|task| task == "SEQ_CLS");
    let is_head = |module: &Value| classifies && HEADS.iter().any(|(head, _)| module == head);
    let saved = field("modules_to_save").filter(|v| !is_empty(v));
    if saved.is_some_and(|v| !v.as_array().is_some_and(|modules| modules.iter().all(is_head))) {
        return Err(wrong("modules_to_save", "nothing, or a classifier's head where task_type is SEQ_CLS"));
    }
    Ok(AdapterConfig {
        rank,
        alpha,
        dropout: dropout.ok_or_else(|| wrong("lora_dropout", "a number from 0 to below 1"))?,
        sparse,
        target_modules: targets.ok_or_else(|| wrong("target_modules", "a list of module names"))?,
        base_model_name: field("base_model_name_or_path").and_then(Value::as_str).unwrap_or_default().into(),
        rank_pattern: rank_pattern(path, &json, alpha, alpha / rank as f64)?,
        classifies,
    })
}

/// Ranks that this program can run.
const RANKS: std::ops::RangeInclusive<usize> = 1..=4096;

/// `rank_pattern`, whose modules must have the scale of the others by their `alpha_pattern`: a super-adapter has one scale.
fn rank_pattern(
    path: &Path,
    json: &Value,
    alpha: f64,
    scale: f64,
) -> Result<Vec<(String, usize)>, ArtifactError> {
    let patterns = |field: &str| {
        let value = json.get(field).filter(|v| !v.is_null());
        let wrong = || ArtifactError::field(path, field, "expected an object of numbers by module");
        let entries = value.map(|v| v.as_object().ok_or_else(wrong)).transpose()?;
        Ok(entries.map(|entries| entries.iter().collect::<Vec<_>>()).unwrap_or_default())
    };
    let (ranks, alphas) = (patterns("rank_pattern")?, patterns("alpha_pattern")?);
    // PEFT takes the first that fits of each, so that with other names or another order they would not go together.
    let names =
        |entries: &[(&String, &Value)]| entries.iter().map(|(name, _)| (*name).clone()).collect::<Vec<_>>();
    if !alphas.is_empty() && names(&ranks) != names(&alphas) {
        let reason = "expected the modules of `rank_pattern`, in its order, or nothing";
        return Err(ArtifactError::field(path, "alpha_pattern", reason));
    }
    let alpha = |i: usize| alphas.get(i).map_or(Some(alpha), |(_, alpha)| alpha.as_f64());
    let pair = |(i, &(name, rank)): (usize, &(&String, &Value))| {
        let wrong = |expected: String| {
            let shown = name.chars().take(200).collect::<String>();
            ArtifactError::field(path, "rank_pattern", format!("`{shown}`: expected {expected}"))
        };
        // To PEFT they are regular expressions; names are the ones that need no engine to be read.
        if !name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '.') {
            return Err(wrong("a module's name or path".into()));
        }
        let rank = rank.as_u64().and_then(|r| usize::try_from(r).ok()).filter(|r| RANKS.contains(r));
        let rank = rank.ok_or_else(|| wrong("a rank from 1 to 4096".into()))?;
        let kept = alpha(i).is_some_and(|alpha| (alpha / rank as f64 - scale).abs() <= 1e-6 * scale.abs());
        if !kept {
            let needed = scale * rank as f64;
            return Err(wrong(format!(
                "{needed} for it in `alpha_pattern`, which keeps alpha / r at {scale} for all modules"
            )));
        }
        Ok((name.clone(), rank))
    };
    ranks.iter().enumerate().map(pair).collect()
}
