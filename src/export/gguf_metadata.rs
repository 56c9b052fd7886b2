//! The metadata of an exported GGUF file: a GGUF base's own, carried over; or a Hugging Face folder's, in llama.cpp's words.

use super::{ExportError, Notes, Source};
use crate::artifact::{BaseConfig, GgufValue, NumberFormat, TokenizerSource};
use crate::model::llama::Plain;
use crate::text::gguf_tokenizer;

type Metadata = Vec<(String, GgufValue)>;

/// Keys of the base that the export says anew, or that would not be true of it.
const REPLACED: [&str; 21] = [
    "general.architecture",
    "general.type",
    "general.name",
    "general.basename",
    "general.finetune",
    "general.version",
    "general.description",
    "general.size_label",
    "general.file_type",
    "general.quantization_version",
    "general.quantized_by",
    "general.uuid",
    "general.alignment",
    "general.tensor_count",
    "llama.block_count",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.value_length",
    "llama.rope.dimension_count",
];

/// A key that every export has, and nothing that is carried over.
pub(super) const MARK: &str = "lonas.subnetwork";

/// Beginnings of such keys: pieces of a split file, how it was quantised, what a base was itself exported from.
const REPLACED_PREFIXES: [&str; 3] = ["split.", "quantize.", "lonas."];

/// All metadata of the sub-network's file. What cannot be said goes into `notes`.
pub(super) fn metadata(
    source: Source<'_>,
    plain: &Plain<'_>,
    dtype: NumberFormat,
    notes: &mut Notes,
) -> Result<Metadata, ExportError> {
    let (widths, heads) = (plain.widths(), plain.heads());
    let query = heads.iter().map(|heads| heads.query).collect::<Vec<_>>();
    let kv = heads.iter().map(|heads| heads.kv).collect::<Vec<_>>();
    let [uneven_widths, uneven_heads] = [&widths, &query].map(|of| of.windows(2).any(|w| w[0] != w[1]));
    let architecture = if uneven_widths || uneven_heads { "deci" } else { "llama" };
    if let Some(what) = match (uneven_widths, uneven_heads) {
        (true, true) => Some("MLP widths and numbers of heads"),
        (true, false) => Some("MLP widths"),
        (false, true) => Some("numbers of heads"),
        (false, false) => None,
    } {
        notes.push(format!(
            "The layers have different {what}, so the file's architecture is llama.cpp's `deci`: a LLaMA with its own for \
             each layer."
        ));
    }
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    // One number for all layers, as files for `llama` have it, or one for each.
    let by_layer = |of: &[usize]| match of.windows(2).any(|w| w[0] != w[1]) {
        true => GgufValue::U32s(of.iter().map(|&n| number(n)).collect()),
        false => GgufValue::U32(number(of[0])),
    };
    let mut metadata = general(source, architecture, dtype);
    let head_size = || GgufValue::U32(number(source.base.config.head_size));
    let own = [
        ("block_count", GgufValue::U32(number(widths.len()))),
        ("feed_forward_length", by_layer(&widths)),
        ("attention.head_count", by_layer(&query)),
        ("attention.head_count_kv", by_layer(&kv)),
        ("attention.key_length", head_size()),
        ("attention.value_length", head_size()),
        ("rope.dimension_count", head_size()),
    ];
    metadata.extend(own.map(|(key, value)| (format!("{architecture}.{key}"), value)));
    match source.base.gguf_metadata() {
        Some(own) => metadata.extend(carried(own, architecture)),
        None => {
            metadata.extend(sizes(&source.base.config, architecture));
            metadata.extend(tokenizer(source, notes)?);
        }
    }
    Ok(metadata)
}

fn general(source: Source<'_>, architecture: &str, dtype: NumberFormat) -> Metadata {
    let text = |text: String| GgufValue::Text(text);
    let (name, subnetwork) = (&source.folder.name, &source.entry.name);
    // llama.cpp's `LLAMA_FTYPE`.
    let file_type = match dtype {
        NumberFormat::F32 => 0,
        NumberFormat::F16 => 1,
        NumberFormat::Q8_0 => 7,
        NumberFormat::Bf16 => 32,
    };
    let choices = source.entry.sub_network.choices().iter().map(|&c| u32::try_from(c).unwrap_or(u32::MAX));
    let description =
        format!("Sub-network {subnetwork} of the LoNAS super-network {name}, exported by lonas");
    let mut metadata = vec![
        ("general.architecture", text(architecture.into())),
        ("general.type", text("model".into())),
        ("general.name", text(source.name())),
        ("general.description", text(description)),
        ("general.file_type", GgufValue::U32(file_type)),
        ("general.quantization_version", GgufValue::U32(2)),
        ("lonas.supernetwork", text(name.clone())),
        (MARK, text(subnetwork.clone())),
        ("lonas.choices", GgufValue::U32s(choices.collect())),
    ];
    if let Some(digest) = &source.folder.base.sha256 {
        metadata.push(("lonas.base.sha256", text(digest.clone())));
    }
    // A GGUF base's is carried over with the rest.
    if let Some(licence) = source.base.licence().filter(|_| source.base.gguf_metadata().is_none()) {
        metadata.push(("general.license", text(licence)));
    }
    metadata.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}

/// The base's own, byte for byte.
fn carried(own: Vec<(&str, &[u8])>, architecture: &str) -> Metadata {
    let replaced =
        |key: &str| REPLACED.contains(&key) || REPLACED_PREFIXES.iter().any(|p| key.starts_with(p));
    let kept = own.into_iter().filter(|(key, _)| !replaced(key));
    let renamed = |key: &str| match key.strip_prefix("llama.") {
        Some(rest) => format!("{architecture}.{rest}"),
        None => key.to_string(),
    };
    kept.map(|(key, value)| (renamed(key), GgufValue::Raw(value.to_vec()))).collect()
}

fn sizes(config: &BaseConfig, architecture: &str) -> Metadata {
    let sizes = [
        ("context_length", config.max_positions),
        ("embedding_length", config.hidden),
        ("vocab_size", config.vocabulary),
    ];
    let floats =
        [("rope.freq_base", config.rope_theta), ("attention.layer_norm_rms_epsilon", config.norm_eps)];
    let number = |n: usize| GgufValue::U32(u32::try_from(n).unwrap_or(u32::MAX));
    let sizes = sizes.into_iter().map(|(key, size)| (key, number(size)));
    let floats = floats.into_iter().map(|(key, value)| (key, GgufValue::F32(value)));
    sizes.chain(floats).map(|(key, value)| (format!("{architecture}.{key}"), value)).collect()
}

/// A folder's tokenizer.json and chat template.
fn tokenizer(source: Source<'_>, notes: &mut Notes) -> Result<Metadata, ExportError> {
    let config = &source.base.config;
    let TokenizerSource::HuggingFace { tokenizer_json, chat_template, bos, eos, added } =
        &source.base.tokenizer
    else {
        return Ok(Metadata::new());
    };
    let parts =
        gguf_tokenizer(tokenizer_json, added.clone(), bos.as_deref(), eos.as_deref(), config.vocabulary)?;
    let eos = parts.eos.or(config.eos_tokens.first().copied());
    let bos = parts.bos.or(config.bos_token);
    let ends = config.eos_tokens.iter().copied().filter(|&token| Some(token) != eos).collect::<Vec<_>>();
    let mut own = vec![
        ("model", GgufValue::Text(parts.model)),
        ("pre", GgufValue::Text(parts.pre)),
        ("tokens", GgufValue::Texts(parts.tokens)),
        ("token_type", GgufValue::I32s(parts.token_types)),
        ("add_bos_token", GgufValue::Flag(parts.add_bos)),
        ("add_eos_token", GgufValue::Flag(parts.add_eos)),
        ("add_space_prefix", GgufValue::Flag(parts.add_space_prefix)),
    ];
    own.push(match parts.scores.is_empty() {
        true => ("merges", GgufValue::Texts(parts.merges)),
        false => ("scores", GgufValue::F32s(parts.scores)),
    });
    let special = [
        ("bos_token_id", bos),
        ("eos_token_id", eos),
        ("eot_token_id", ends.first().copied()),
        ("unknown_token_id", parts.unknown),
    ];
    own.extend(special.into_iter().filter_map(|(key, id)| Some((key, GgufValue::U32(id?)))));
    if ends.len() > 1 {
        notes.push(format!("Of the tokens that end a text, the file cannot name {:?}.", &ends[1..]));
    }
    let named = |(key, value)| (format!("tokenizer.ggml.{key}"), value);
    let mut metadata = own.into_iter().map(named).collect::<Metadata>();
    if let Some(template) = chat_template {
        metadata.push(("tokenizer.chat_template".into(), GgufValue::Text(template.clone())));
    } else {
        notes.push("The base has no chat template, and so has this file none.".into());
    }
    Ok(metadata)
}
