//! A folder that `transformers` loads as an ordinary LLaMA: config.json, model.safetensors, the tokenizer's files.

use super::{
    CARD, ExportError, Notes, OnTensor, Source, Target, by_layer, card, check_exported, out, short,
    vocabulary_parts, write,
};
use crate::artifact::{
    ArtifactError, BaseConfig, GgufVocabulary, NumberFormat, SafetensorsWriter, TokenizerSource, WholeFolder,
    read_json,
};
use crate::model::llama::{Heads, Plain};
use crate::text::Tokenizer;
use serde_json::{Map, Value, json};

const CONFIG: &str = "config.json";
const TENSORS: &str = "model.safetensors";
const GENERATION: &str = "generation_config.json";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// What a folder takes over from a Hugging Face base as it is.
const COPIED: [&str; 9] = [
    GENERATION,
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
];

/// Writes the sub-network's folder.
///
/// # Errors
/// Beside files that cannot be read or written: widths or numbers of heads that differ by layer, Q8_0.
pub fn hugging_face(
    source: Source<'_>,
    dtype: NumberFormat,
    target: Target<'_>,
    on_tensor: OnTensor<'_>,
) -> Result<Notes, ExportError> {
    if dtype == NumberFormat::Q8_0 {
        let (dtype, format, possible) = (dtype.name(), "a Hugging Face folder", "f32, f16 and bf16");
        return Err(ExportError::Dtype { dtype, format, possible });
    }
    check_positions(source)?;
    let plain = source.plain()?;
    let widths = plain.widths();
    if widths.iter().any(|&width| width != widths[0]) {
        let (name, widths) = (source.entry.name.clone(), by_layer(&widths));
        return Err(ExportError::UnevenWidths { name, widths });
    }
    let heads = same_heads(source, &plain)?;
    let folder = source.folder(target, |folder| {
        let files = [CARD, CONFIG, TENSORS].iter().chain(&COPIED);
        check_exported(folder, |path| files.clone().any(|name| path.ends_with(name)))
    })?;
    let mut notes = Notes::new();
    write(&folder, CONFIG, &pretty(&config(source, &widths, heads, dtype)?))?;
    tokenizer(source, &folder, &mut notes)?;

    let tensors = plain.tensors();
    let planned = tensors.iter().map(|t| out(t, t.name.clone(), dtype, dtype)).collect();
    let mut writer = SafetensorsWriter::create(&folder.path().join(TENSORS), planned)?;
    for (done, tensor) in tensors.iter().enumerate() {
        on_tensor(done, tensors.len(), &tensor.name);
        writer.tensor(&plain.read(tensor)?)?;
    }
    writer.finish()?;
    let how = "    from transformers import AutoModelForCausalLM, AutoTokenizer\n\n    \
               model = AutoModelForCausalLM.from_pretrained(\"DIR\")\n    \
               tokenizer = AutoTokenizer.from_pretrained(\"DIR\")";
    write(&folder, CARD, &card::card(source, "transformers", dtype.name(), how, &notes))?;
    folder.finish()?;
    Ok(notes)
}

/// The heads that all layers have.
fn same_heads(source: Source<'_>, plain: &Plain<'_>) -> Result<Heads, ExportError> {
    let heads = plain.heads();
    let Some(at) = heads.iter().position(|other| *other != heads[0]) else { return Ok(heads[0]) };
    let (layer, other, Heads { query, kv }) = (plain.layers()[0], plain.layers()[at], heads[0]);
    Err(ExportError::UnevenHeads { name: source.entry.name.clone(), layer, query, kv, other })
}

/// Whether config.json can say how positions are scaled: a folder's own does, one that is made can name one factor for all.
fn check_positions(source: Source<'_>) -> Result<(), ExportError> {
    let is_made = matches!(source.base.tokenizer, TokenizerSource::Gguf(_));
    let factors = &source.base.config.rope_factors;
    match is_made && factors.iter().any(|factor| *factor != factors[0]) {
        true => Err(ExportError::FactorsWithoutRule),
        false => Ok(()),
    }
}

/// The base's config.json with other MLP widths and heads, which are the same for all layers, and so many layers; or one made from what
/// a GGUF file says.
fn config(
    source: Source<'_>,
    widths: &[usize],
    heads: Heads,
    dtype: NumberFormat,
) -> Result<Value, ArtifactError> {
    let mut config = match &source.base.tokenizer {
        TokenizerSource::HuggingFace { .. } => read_json(&source.base.path().join(CONFIG))?,
        TokenizerSource::Gguf(vocabulary) => config_of(&source.base.config, vocabulary),
    };
    let dtype = match dtype {
        NumberFormat::F16 => "float16",
        NumberFormat::Bf16 => "bfloat16",
        NumberFormat::F32 | NumberFormat::Q8_0 => "float32",
    };
    if let Some(fields) = config.as_object_mut() {
        fields.remove("_name_or_path");
        fields.remove("quantization_config");
        // The older of the two names, which newer versions read too.
        fields.remove("dtype");
        fields.insert("torch_dtype".into(), dtype.into());
        fields.insert("intermediate_size".into(), widths[0].into());
        if source.base.config.query_heads != heads.query {
            fields.insert("num_attention_heads".into(), heads.query.into());
            fields.insert("num_key_value_heads".into(), heads.kv.into());
            // It would be taken for the hidden size's share.
            fields.insert("head_dim".into(), source.base.config.head_size.into());
        }
        if source.base.config.layers != widths.len() {
            fields.insert("num_hidden_layers".into(), widths.len().into());
            // Layer by layer; transformers makes it anew.
            fields.remove("layer_types");
        }
    }
    Ok(config)
}

fn config_of(config: &BaseConfig, vocabulary: &GgufVocabulary) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": short(config.norm_eps),
        "rope_theta": short(config.rope_theta),
        "rope_scaling": config.rope_factors.first().map(|&factor| json!({"type": "linear", "factor": short(factor)})),
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.bos_token,
        "eos_token_id": ends(config, vocabulary),
        "pad_token_id": vocabulary.padding,
        "use_cache": true,
    })
}

fn tokenizer(source: Source<'_>, folder: &WholeFolder, notes: &mut Notes) -> Result<(), ExportError> {
    match &source.base.tokenizer {
        TokenizerSource::HuggingFace { .. } => {
            for name in COPIED {
                let (from, to) = (source.base.path().join(name), folder.path().join(name));
                if from.exists() {
                    let io = |source| ArtifactError::Io { path: from.clone(), source };
                    std::fs::copy(&from, &to).map_err(io)?;
                }
            }
            if !folder.path().join(TOKENIZER).exists() {
                notes.push("The base has no tokenizer.json, and so has this folder none.".into());
            }
        }
        TokenizerSource::Gguf(vocabulary) => {
            let tokenizer = Tokenizer::from_vocabulary(vocabulary_parts(vocabulary.clone()))?;
            write(folder, TOKENIZER, &tokenizer.to_json()?)?;
            let config = &source.base.config;
            write(folder, TOKENIZER_CONFIG, &pretty(&tokenizer_config(config, vocabulary)))?;
            let generation = [
                ("bos_token_id", vocabulary.bos.map(Value::from)),
                ("eos_token_id", ends(config, vocabulary)),
                ("pad_token_id", vocabulary.padding.map(Value::from)),
            ];
            let known = generation.into_iter().filter_map(|(name, id)| Some((name.to_string(), id?)));
            write(folder, GENERATION, &pretty(&Value::Object(known.collect())))?;
        }
    }
    Ok(())
}

/// All tokens that end a text, the tokenizer's own first: a number, or a list of several.
fn ends(config: &BaseConfig, vocabulary: &GgufVocabulary) -> Option<Value> {
    let own = vocabulary.eos.into_iter();
    let others = config.eos_tokens.iter().copied().filter(|&token| Some(token) != vocabulary.eos);
    match own.chain(others).collect::<Vec<_>>()[..] {
        [] => None,
        [only] => Some(only.into()),
        ref several => Some(json!(several)),
    }
}

fn tokenizer_config(config: &BaseConfig, vocabulary: &GgufVocabulary) -> Value {
    let mut fields = Map::new();
    fields.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    fields.insert("model_max_length".into(), config.max_positions.into());
    fields.insert("clean_up_tokenization_spaces".into(), false.into());
    for (name, id) in [
        ("bos_token", vocabulary.bos),
        ("eos_token", vocabulary.eos),
        ("unk_token", vocabulary.unknown),
        ("pad_token", vocabulary.padding),
    ] {
        if let Some(text) = id.and_then(|id| vocabulary.tokens.get(id as usize)) {
            fields.insert(name.into(), text.as_str().into());
        }
    }
    if let Some(template) = &vocabulary.chat_template {
        fields.insert("chat_template".into(), template.as_str().into());
    }
    Value::Object(fields)
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}
