//! A base's config.json: the sizes and constants of each family that this program knows. What would change the numbers and is
//! not supported is refused, never ignored.

use super::base::{Activation, BaseConfig, ClassifierConfig, Family, even_share};
use super::labels::{StatedOutputs, numbered_labels};
use super::{ArtifactError, read_json};
use serde_json::Value;
use std::path::Path;

/// Labels are named in every answer; no task has so many.
pub(super) const MAX_LABELS: usize = 1 << 16;

/// Reads a config.json alone, for weights that are still to be made.
///
/// # Errors
/// A family that this program has not, a field that is missing or out of range, weights that are to be quantised.
pub fn read_base_config(path: &Path) -> Result<BaseConfig, ArtifactError> {
    let json: Value = read_json(path)?;
    if json.get("quantization_config").is_some_and(|v| !v.is_null()) {
        return Err(ArtifactError::field(path, "quantization_config", "random weights are not quantised"));
    }
    read_config(path)
}

pub(super) fn read_config(path: &Path) -> Result<BaseConfig, ArtifactError> {
    let json: Value = read_json(path)?;
    let fields = Fields { path, json: &json };
    let family = fields.text("model_type")?.unwrap_or_default();
    let config = match family.as_str() {
        "llama" | "mistral" | "qwen2" | "qwen3" => llama(&fields, &family)?,
        "bloom" => bloom(&fields)?,
        "mpt" => mpt(&fields)?,
        "bert" => bert(&fields)?,
        _ => {
            let known = "llama, mistral, qwen2, qwen3, bloom, mpt, bert";
            let reason = format!("{family:?} is not supported; supported: {known}");
            return Err(ArtifactError::field(path, "model_type", reason));
        }
    };
    config.checked(path)
}

/// LLaMA and what differs from it by a bias, a norm or a window: Mistral, Qwen2 and Qwen3, as transformers' configurations of them
/// have it.
fn llama(fields: &Fields<'_>, model_type: &str) -> Result<BaseConfig, ArtifactError> {
    let path = fields.path;
    fields.only("hidden_act", &["silu", "swish"])?;
    let (hidden, query_heads) = (fields.size("hidden_size")?, fields.size("num_attention_heads")?);
    let head_size = match (fields.get("head_dim"), model_type) {
        (Some(_), _) => fields.size("head_dim")?,
        (None, "qwen3") => 128,
        (None, _) => even_share(path, hidden, query_heads)?,
    };
    let (attention_bias, output_bias) = match model_type {
        "qwen2" => (true, false),
        _ => [fields.flag("attention_bias", false)?; 2].into(),
    };
    let rope_theta = fields.rope_theta()?;
    Ok(BaseConfig {
        family: Family::Llama,
        hidden,
        intermediate: fields.size("intermediate_size")?,
        layers: fields.size("num_hidden_layers")?,
        query_heads,
        kv_heads: fields.size_or("num_key_value_heads", query_heads)?,
        head_size,
        vocabulary: fields.size("vocab_size")?,
        max_positions: fields.positions()?,
        norm_eps: fields.float("rms_norm_eps")?.unwrap_or(1e-6),
        rope_factors: fields.rope_factors(rope_theta, head_size)?,
        rope_theta,
        window: fields.window(model_type)?,
        head_norms: model_type == "qwen3",
        tied_embeddings: fields.flag("tie_word_embeddings", false)?,
        attention_bias,
        output_bias,
        mlp_bias: fields.flag("mlp_bias", false)?,
        bos_token: fields.tokens("bos_token_id")?.first().copied(),
        eos_tokens: fields.tokens("eos_token_id")?,
        ..BaseConfig::default()
    })
}

/// As transformers' `BloomConfig`, whose older files have names of their own for three sizes.
fn bloom(fields: &Fields<'_>) -> Result<BaseConfig, ArtifactError> {
    let size = |names: [&str; 2]| {
        fields.size(names.into_iter().find(|n| fields.get(n).is_some()).unwrap_or(names[0]))
    };
    let (hidden, heads) = (size(["hidden_size", "n_embed"])?, size(["n_head", "num_attention_heads"])?);
    Ok(BaseConfig {
        family: Family::Bloom,
        hidden,
        intermediate: hidden.saturating_mul(4),
        layers: size(["n_layer", "num_hidden_layers"])?,
        query_heads: heads,
        kv_heads: heads,
        head_size: even_share(fields.path, hidden, heads)?,
        vocabulary: fields.size("vocab_size")?,
        max_positions: fields.size_or("seq_length", 2048)?,
        norm_eps: fields.float("layer_norm_epsilon")?.unwrap_or(1e-5),
        tied_embeddings: fields.flag("tie_word_embeddings", true)?,
        attention_bias: true,
        output_bias: true,
        mlp_bias: true,
        residual_after_norm: fields.flag("apply_residual_connection_post_layernorm", false)?,
        bos_token: fields.tokens("bos_token_id")?.first().copied(),
        eos_tokens: fields.tokens("eos_token_id")?,
        ..BaseConfig::default()
    })
}

/// As transformers' `MptConfig`, and llm-foundry's, which the published MPT-7B has.
fn mpt(fields: &Fields<'_>) -> Result<BaseConfig, ArtifactError> {
    let path = fields.path;
    let attention = fields.get("attn_config").unwrap_or(&Value::Null);
    let attention = Fields { path, json: attention };
    let refused = |field: &str| {
        let reason =
            "only ALiBi, multi-head attention of plain queries and keys, and no biases are supported";
        Err(ArtifactError::field(path, field, reason))
    };
    for (of, field, only) in [
        (&attention, "alibi", true),
        (&attention, "qk_ln", false),
        (&attention, "qk_gn", false),
        (&attention, "prefix_lm", false),
        (fields, "no_bias", true),
    ] {
        if of.flag(field, only)? != only {
            return refused(field);
        }
    }
    attention.only("attn_type", &["multihead_attention"])?;
    fields.only("norm_type", &["low_precision_layernorm", "layernorm"])?;
    let feed_forward = Fields { path, json: fields.get("ffn_config").unwrap_or(&Value::Null) };
    feed_forward.only("ffn_type", &["mptmlp"])?;
    // No window is -1.
    if attention.float("sliding_window_size")?.is_some_and(|size| size != -1.0) {
        return refused("sliding_window_size");
    }
    let given = [
        (&attention, "clip_qkv"),
        (&attention, "softmax_scale"),
        (&attention, "attn_logit_softcapping"),
        (fields, "logit_scale"),
    ];
    if let Some((_, field)) = given.into_iter().find(|(of, field)| of.get(field).is_some()) {
        return refused(field);
    }
    if attention.float("alibi_bias_max")?.is_some_and(|most| most != 8.0) {
        return refused("alibi_bias_max");
    }
    let (hidden, heads) = (fields.size("d_model")?, fields.size("n_heads")?);
    Ok(BaseConfig {
        family: Family::Mpt,
        hidden,
        intermediate: hidden.saturating_mul(fields.size_or("expansion_ratio", 4)?),
        layers: fields.size("n_layers")?,
        query_heads: heads,
        kv_heads: heads,
        head_size: even_share(path, hidden, heads)?,
        vocabulary: fields.size("vocab_size")?,
        max_positions: fields.size_or("max_seq_len", 2048)?,
        norm_eps: fields.float("layer_norm_epsilon")?.unwrap_or(1e-5),
        tied_embeddings: fields.flag("tie_word_embeddings", true)?,
        bos_token: fields.tokens("bos_token_id")?.first().copied(),
        eos_tokens: fields.tokens("eos_token_id")?,
        ..BaseConfig::default()
    })
}

/// What a config.json says of a classifier's outputs, be it the base's or one that lies beside an adapter.
pub(super) fn read_outputs(path: &Path) -> Result<StatedOutputs, ArtifactError> {
    Fields { path, json: &read_json(path)? }.outputs()
}

/// As transformers' `BertConfig`, of a model that classifies.
fn bert(fields: &Fields<'_>) -> Result<BaseConfig, ArtifactError> {
    fields.only("position_embedding_type", &["absolute"])?;
    for field in ["is_decoder", "add_cross_attention"] {
        if fields.flag(field, false)? {
            return Err(ArtifactError::field(fields.path, field, "only encoders are supported"));
        }
    }
    let activation =
        match fields.only("hidden_act", &["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])?.as_deref() {
            Some("relu") => Activation::Relu,
            Some("gelu_new" | "gelu_pytorch_tanh") => Activation::GeluTanh,
            _ => Activation::Gelu,
        };
    let (hidden, heads) = (fields.size("hidden_size")?, fields.size("num_attention_heads")?);
    let outputs = fields.outputs()?;
    // Of those a head for whole texts is made or trained; what others compute for each token is no class of a text.
    const WHOLE: [&str; 5] = [
        "BertForSequenceClassification",
        "BertModel",
        "BertForPreTraining",
        "BertForMaskedLM",
        "BertLMHeadModel",
    ];
    if let Some(other) = fields.architectures().find(|name| !WHOLE.contains(name)) {
        let reason = format!("`{other}` is not supported; supported: {}", WHOLE.join(", "));
        return Err(ArtifactError::field(fields.path, "architectures", reason));
    }
    Ok(BaseConfig {
        family: Family::Bert,
        hidden,
        intermediate: fields.size("intermediate_size")?,
        layers: fields.size("num_hidden_layers")?,
        query_heads: heads,
        kv_heads: heads,
        head_size: even_share(fields.path, hidden, heads)?,
        vocabulary: fields.size("vocab_size")?,
        max_positions: fields.size_or("max_position_embeddings", 512)?,
        norm_eps: fields.float("layer_norm_eps")?.unwrap_or(1e-12),
        attention_bias: true,
        output_bias: true,
        mlp_bias: true,
        classifier: Some(ClassifierConfig {
            token_types: fields.size_or("type_vocab_size", 2)?,
            activation,
            ..ClassifierConfig::of(&outputs, 2)
        }),
        ..BaseConfig::default()
    })
}

/// Typed access to config.json; `null` counts as absent, as in transformers.
pub(super) struct Fields<'a> {
    pub(super) path: &'a Path,
    pub(super) json: &'a Value,
}

impl Fields<'_> {
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.json.get(field).filter(|v| !v.is_null())
    }

    fn wrong(&self, field: &str, expected: &str, got: &Value) -> ArtifactError {
        let mut got = got.to_string();
        got.truncate(got.char_indices().nth(80).map_or(got.len(), |(i, _)| i));
        ArtifactError::field(self.path, field, format!("expected {expected}, got {got}"))
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<String>, ArtifactError> {
        let text = |v: &Value| v.as_str().map(String::from).ok_or_else(|| self.wrong(field, "a string", v));
        self.get(field).map(text).transpose()
    }

    pub(super) fn size(&self, field: &str) -> Result<usize, ArtifactError> {
        let value = self.get(field).ok_or_else(|| ArtifactError::field(self.path, field, "missing"))?;
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok());
        size.ok_or_else(|| self.wrong(field, "a whole number", value))
    }

    fn size_or(&self, field: &str, default: usize) -> Result<usize, ArtifactError> {
        if self.get(field).is_some() { self.size(field) } else { Ok(default) }
    }

    fn float(&self, field: &str) -> Result<Option<f32>, ArtifactError> {
        let float = |v: &Value| v.as_f64().map(|f| f as f32).ok_or_else(|| self.wrong(field, "a number", v));
        self.get(field).map(float).transpose()
    }

    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool, ArtifactError> {
        let flag = |v: &Value| v.as_bool().ok_or_else(|| self.wrong(field, "true or false", v));
        self.get(field).map_or(Ok(default), flag)
    }

    /// A text that must be one of these where it is given.
    fn only(&self, field: &str, known: &[&str]) -> Result<Option<String>, ArtifactError> {
        let text = self.text(field)?;
        match &text {
            Some(text) if !known.contains(&text.as_str()) => {
                let reason = format!("`{text}` is not supported; supported: {}", known.join(", "));
                Err(ArtifactError::field(self.path, field, reason))
            }
            _ => Ok(text),
        }
    }

    fn architectures(&self) -> impl Iterator<Item = &str> {
        self.get("architectures").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
    }

    fn outputs(&self) -> Result<StatedOutputs, ArtifactError> {
        Ok(StatedOutputs { labels: self.labels()?, problem: self.text("problem_type")? })
    }

    /// The names of a classifier's outputs: `id2label`, else as many as `num_labels` says.
    fn labels(&self) -> Result<Option<Vec<String>>, ArtifactError> {
        let Some(value) = self.get("id2label") else {
            let Some(value) = self.get("num_labels") else { return Ok(None) };
            let count = self.size("num_labels")?;
            let in_range = (1..=MAX_LABELS).contains(&count);
            let wrong = || self.wrong("num_labels", &format!("a number from 1 to {MAX_LABELS}"), value);
            return in_range.then(|| Some(numbered_labels(count))).ok_or_else(wrong);
        };
        let wrong = || self.wrong("id2label", "a name for each number from 0 on", value);
        let names = value.as_object().filter(|names| !names.is_empty()).ok_or_else(wrong)?;
        let name = |i: usize| names.get(&i.to_string())?.as_str().map(String::from);
        (0..names.len()).map(|i| name(i).ok_or_else(wrong)).collect::<Result<_, _>>().map(Some)
    }

    /// One id or a list of them.
    fn tokens(&self, field: &str) -> Result<Vec<u32>, ArtifactError> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let all = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = all.iter().map(id).collect::<Option<Vec<_>>>();
        ids.ok_or_else(|| self.wrong(field, "a token id or a list of them", value))
    }

    /// `rope_theta`, or transformers 5's `rope_parameters.rope_theta`.
    fn rope_theta(&self) -> Result<f32, ArtifactError> {
        let mut theta = self.float("rope_theta")?;
        for of_rope in self.ropes()? {
            match (theta, of_rope.float("rope_theta")?) {
                (Some(theta), Some(other)) if theta != other => {
                    let reason = format!("is {theta} in one place and {other} in another");
                    return Err(ArtifactError::field(self.path, "rope_theta", reason));
                }
                (_, other) => theta = theta.or(other),
            }
        }
        Ok(theta.unwrap_or(10000.0))
    }

    /// What says how positions are rotated, beside `rope_theta`.
    fn ropes(&self) -> Result<Vec<Fields<'_>>, ArtifactError> {
        let found = ["rope_scaling", "rope_parameters"]
            .into_iter()
            .filter_map(|field| Some((field, self.get(field)?)));
        let object = |(field, rope): (&str, &'_ Value)| match rope.is_object() {
            true => Ok(()),
            false => Err(self.wrong(field, "an object", rope)),
        };
        found.clone().try_for_each(object)?;
        Ok(found.map(|(_, json)| Fields { path: self.path, json }).collect())
    }

    /// `max_position_embeddings`, of which `linear` scaling makes so many times more, as vLLM has it.
    fn positions(&self) -> Result<usize, ArtifactError> {
        let positions = self.size_or("max_position_embeddings", 2048)?;
        for rope in self.ropes()? {
            let kind = rope.text("rope_type")?.or(rope.text("type")?);
            if let (Some("linear"), Some(factor)) = (kind.as_deref(), rope.float("factor")?) {
                // What is out of range is found out with the other sizes.
                return Ok((positions as f64 * f64::from(factor)) as usize);
            }
        }
        Ok(positions)
    }

    /// What each pair's frequency is divided by: nothing, one number (`linear`), or LLaMA 3's rule, which leaves short waves as
    /// they are, divides long ones, and goes from one to the other between. Others are refused.
    fn rope_factors(&self, theta: f32, head_size: usize) -> Result<Vec<f32>, ArtifactError> {
        for rope in self.ropes()? {
            let kind = rope.text("rope_type")?.or(rope.text("type")?).unwrap_or_else(|| "default".into());
            let number = |field: &str| {
                let number = rope.float(field)?.filter(|x| x.is_finite() && *x > 0.0);
                number.ok_or_else(|| {
                    ArtifactError::field(self.path, field, "expected a positive number beside rope_type")
                })
            };
            match kind.as_str() {
                "default" => {}
                "linear" => return Ok(vec![number("factor")?; head_size / 2]),
                "llama3" => {
                    let (factor, low, high) =
                        (number("factor")?, number("low_freq_factor")?, number("high_freq_factor")?);
                    let positions = number("original_max_position_embeddings")?;
                    if high <= low {
                        let reason =
                            format!("expected more than low_freq_factor, which is {low}, got {high}");
                        return Err(ArtifactError::field(self.path, "high_freq_factor", reason));
                    }
                    let of_pair = |pair: usize| {
                        let exponent = (2 * pair) as f32 / head_size as f32;
                        let wave = 2.0 * std::f32::consts::PI * theta.powf(exponent);
                        // The share of the frequency that stays: 0 for waves longer than positions / low, 1 below positions / high.
                        let stays = ((positions / wave - low) / (high - low)).clamp(0.0, 1.0);
                        1.0 / ((1.0 - stays) / factor + stays)
                    };
                    return Ok((0..head_size / 2).map(of_pair).collect());
                }
                other => {
                    let reason = format!("`{other}` is not supported; supported: default, linear, llama3");
                    return Err(ArtifactError::field(self.path, "rope_type", reason));
                }
            }
        }
        Ok(Vec::new())
    }

    /// `sliding_window`, which Mistral means whenever it is there, and Qwen only with `use_sliding_window`.
    fn window(&self, model_type: &str) -> Result<Option<usize>, ArtifactError> {
        let given = self.get("sliding_window").is_some();
        match model_type {
            "mistral" if given => {
                let window = self.size("sliding_window")?;
                let none = || ArtifactError::field(self.path, "sliding_window", "0 positions see nothing");
                if window == 0 { Err(none()) } else { Ok(Some(window)) }
            }
            "qwen2" | "qwen3" if self.flag("use_sliding_window", false)? => Err(ArtifactError::field(
                self.path,
                "use_sliding_window",
                "windows in some layers only are not supported",
            )),
            "llama" if given => {
                Err(ArtifactError::field(self.path, "sliding_window", "not supported for llama"))
            }
            _ => Ok(None),
        }
    }
}
