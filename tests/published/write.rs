//! Models by their sizes, configurations as their authors write them.

use lonas::artifact::{AdapterConfig, BaseConfig, ClassifierConfig, Family};
use lonas::model::model_shape;
use lonas::supernet::ModelShape;
use std::fmt::Write;

/// A model with adapters of this rank on `targets`.
pub(crate) fn adapted(base: &BaseConfig, rank: usize, targets: &[&str]) -> ModelShape {
    let target_modules = targets.iter().map(|t| (*t).to_string()).collect();
    model_shape(base, Some(&AdapterConfig { rank, target_modules, ..AdapterConfig::default() }))
}

/// A LLaMA with heads of 16 and adapters of rank 32.
pub(crate) fn llama(layers: usize, hidden: usize, intermediate: usize, targets: &[&str]) -> ModelShape {
    let heads = hidden / 16;
    let base = BaseConfig {
        family: Family::Llama,
        hidden,
        intermediate,
        layers,
        query_heads: heads,
        kv_heads: heads,
        head_size: 16,
        vocabulary: 32000,
        ..BaseConfig::default()
    };
    adapted(&base, 32, targets)
}

/// BLOOMZ-7B1 with LoNAS's adapters.
pub(crate) fn bloomz() -> ModelShape {
    let base = BaseConfig {
        family: Family::Bloom,
        hidden: 4096,
        intermediate: 16384,
        layers: 30,
        query_heads: 32,
        kv_heads: 32,
        head_size: 128,
        vocabulary: 250_880,
        ..BaseConfig::default()
    };
    adapted(&base, 32, &["query_key_value", "dense_h_to_4h", "dense_4h_to_h"])
}

/// MPT-7B with Shears' adapters.
pub(crate) fn mpt() -> ModelShape {
    let base = BaseConfig {
        family: Family::Mpt,
        hidden: 4096,
        intermediate: 16384,
        layers: 32,
        query_heads: 32,
        kv_heads: 32,
        head_size: 128,
        vocabulary: 50432,
        ..BaseConfig::default()
    };
    adapted(&base, 32, &["q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "down_proj"])
}

/// BERT-base with two labels and LoNAS's adapters.
pub(crate) fn bert() -> ModelShape {
    let classifier = ClassifierConfig {
        labels: vec!["0".into(), "1".into()],
        stated: true,
        regression: false,
        multi_label: false,
        token_types: 2,
        activation: lonas::artifact::Activation::Gelu,
    };
    let base = BaseConfig {
        family: Family::Bert,
        hidden: 768,
        intermediate: 3072,
        layers: 12,
        query_heads: 12,
        kv_heads: 12,
        head_size: 64,
        vocabulary: 30522,
        classifier: Some(classifier),
        ..BaseConfig::default()
    };
    adapted(&base, 8, &["query", "value"])
}

/// The ends of an NNCF node's name after the module: the base's Linear inside the one with an adapter, the adapter's halves.
pub(crate) const BASE: &str = "/NNCFUserSelfLinear[self_linear]/linear_0";
pub(crate) const A: &str = "/ModuleDict[lora_A]/NNCFLinear[default]/linear_0";
pub(crate) const B: &str = "/ModuleDict[lora_B]/NNCFLinear[default]/linear_0";

/// A node of a LLaMA's layer; `layer` may be a template's `{*}`.
pub(crate) fn llama_node(layer: impl std::fmt::Display, module: &str, end: &str) -> String {
    let root = "PeftModelForCausalLM/LoraModel[base_model]/LlamaForCausalLM[model]/LlamaModel[model]/ModuleList[layers]";
    let (class, part) = if module.starts_with('q') || module.starts_with('k') || module.starts_with('v') {
        ("LlamaAttention", "self_attn")
    } else {
        ("LlamaMLP", "mlp")
    };
    // A Linear without an adapter stands there itself.
    let linear = if end == "/linear_0" { "NNCFLinear" } else { "Linear" };
    format!("{root}/LlamaDecoderLayer[{layer}]/{class}[{part}]/{linear}[{module}]{end}")
}

/// Members and widths.
pub(crate) type Groups = Vec<(Vec<String>, Vec<usize>)>;

/// What differs between configurations beside their groups.
#[derive(Clone, Copy)]
pub(crate) struct Writing<'a> {
    pub(crate) root: &'a str,
    pub(crate) epochs: i64,
    pub(crate) init_lr: f64,
    pub(crate) width_indicator: Option<i64>,
    pub(crate) tokens: usize,
    pub(crate) sandwich_rule: bool,
    /// BLOOMZ's file has a comma after the only member of a group.
    pub(crate) trailing_commas: bool,
    pub(crate) dynamic_inputs: &'a [String],
}

pub(crate) const LONAS: Writing<'_> = Writing {
    root: "bootstrapNAS",
    epochs: 6,
    init_lr: 3e-4,
    width_indicator: Some(5),
    tokens: 256,
    sandwich_rule: false,
    trailing_commas: false,
    dynamic_inputs: &[],
};

/// An NNCF configuration with all that LoNAS's have.
pub(crate) fn nncf(groups: &Groups, writing: Writing<'_>) -> String {
    let list = |names: &[String]| {
        names.iter().map(|n| format!("\"{n}\"")).collect::<Vec<_>>().join(",\n            ")
    };
    let members = groups.iter().map(|(names, _)| {
        let comma = if writing.trailing_commas && names.len() == 1 { "," } else { "" };
        format!("[\n            {}{comma}\n          ]", list(names))
    });
    let members = members.collect::<Vec<_>>().join(", ");
    let widths = groups.iter().map(|(_, widths)| format!("{widths:?}")).collect::<Vec<_>>().join(", ");
    let (tokens, epochs, init_lr) = (writing.tokens, writing.epochs, writing.init_lr);
    let indicator = writing.width_indicator.map_or(String::new(), |n| format!("\"width_indicator\": {n}, "));
    let mut width =
        format!("\"overwrite_groups\": [{members}],\n          \"overwrite_groups_widths\": [{widths}]");
    if !writing.dynamic_inputs.is_empty() {
        write!(width, ",\n          \"add_dynamic_inputs\": [{}]", list(writing.dynamic_inputs)).unwrap();
    }
    let sandwich = if writing.sandwich_rule { ",\n      \"sandwich_rule\": false" } else { "" };
    format!(
        r#"{{
  "input_info": [{{"sample_size": [1, {tokens}], "type": "long", "keyword": "input_ids"}}],
  "{root}": {{
    "training": {{
      "algorithm": "progressive_shrinking",
      "frozen_layers_allowed": true,
      "progressivity_of_elasticity": ["width"],
      "batchnorm_adaptation": {{"num_bn_adaptation_samples": 0}},
      "schedule": {{"list_stage_descriptions": [
        {{"train_dims": ["width"], "epochs": {epochs}, "depth_indicator": 1, {indicator}"init_lr": {init_lr}, "epochs_lr": {epochs}, "sample_rate": 1}}
      ]}},
      "elasticity": {{
        "available_elasticity_dims": ["width"],
        "width": {{
          {width}
        }}
      }}{sandwich}
    }},
    "search": {{"algorithm": "NSGA2", "num_evals": 200, "population": 8, "ref_acc": 0.45, "acc_delta": 0.01}}
  }}
}}
"#,
        root = writing.root
    )
}
