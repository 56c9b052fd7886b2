//! What lies beside a Hugging Face tokenizer.json: chat template, special and added tokens; and the tokens that end a text.
//!
//! Read as transformers reads it: older files say in two places what newer ones say in one.

use super::base::TokenizerSource;
use super::{ArtifactError, read_json};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use tokenizers::AddedToken;

/// An added token as tokenizer_config.json has it; what it does not say is as in transformers.
#[derive(Deserialize)]
struct Added {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

/// The tokenizer of a folder.
pub(super) fn tokenizer(folder: &Path) -> Result<TokenizerSource, ArtifactError> {
    let config = json(&folder.join("tokenizer_config.json"))?;
    // Before transformers wrote added tokens into tokenizer_config.json, special tokens had a file of their own, which counts first.
    let older = config.get("added_tokens_decoder").is_none();
    let map = if older { json(&folder.join("special_tokens_map.json"))? } else { Value::Null };
    // A special token is a string or an object with its `content`.
    let special = |field: &str| {
        let text =
            |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(String::from);
        [&map, &config].into_iter().find_map(|json| json.get(field).and_then(text))
    };
    let (bos, eos) = (special("bos_token"), special("eos_token"));
    Ok(TokenizerSource::HuggingFace {
        tokenizer_json: folder.join("tokenizer.json"),
        chat_template: chat_template(folder, &config)?,
        bos,
        eos,
        added: added(folder, &config)?,
    })
}

/// A file of its own counts first. Several templates have names, and `default` is the one for conversations without tools.
fn chat_template(folder: &Path, config: &Value) -> Result<Option<String>, ArtifactError> {
    let template = folder.join("chat_template.jinja");
    if template.exists() {
        let io = |source| ArtifactError::Io { path: template.clone(), source };
        return Ok(Some(std::fs::read_to_string(&template).map_err(io)?));
    }
    let own = config.get("chat_template");
    let named = |templates: &Vec<Value>| {
        let default = templates.iter().find(|t| t.get("name").is_some_and(|name| name == "default"));
        default?.get("template")?.as_str().map(String::from)
    };
    Ok(own.and_then(|own| own.as_str().map(String::from).or_else(|| own.as_array().and_then(named))))
}

/// Tokens that tokenizer_config.json adds to those of tokenizer.json, by their ids.
fn added(folder: &Path, config: &Value) -> Result<Vec<AddedToken>, ArtifactError> {
    let field = "added_tokens_decoder";
    let Some(tokens) = config.get(field).filter(|tokens| !tokens.is_null()) else { return Ok(Vec::new()) };
    let tokens = BTreeMap::<u32, Added>::deserialize(tokens);
    let wrong = |e: serde_json::Error| {
        ArtifactError::field(&folder.join("tokenizer_config.json"), field, e.to_string())
    };
    let token = |Added { content, single_word, lstrip, rstrip, normalized, special }| {
        let normalized = normalized.unwrap_or(!special);
        AddedToken { content, single_word, lstrip, rstrip, normalized, special }
    };
    Ok(tokens.map_err(wrong)?.into_values().map(token).collect())
}

/// generation_config.json's tokens that end a text: an instruct model often names more there than in config.json.
pub(super) fn end_tokens(folder: &Path) -> Result<Vec<u32>, ArtifactError> {
    let (path, field) = (folder.join("generation_config.json"), "eos_token_id");
    let json = json(&path)?;
    let ends = match json.get(field) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(ends)) => ends.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        let wrong = || ArtifactError::field(&path, field, format!("expected a token id, got {value}"));
        id.ok_or_else(wrong)
    };
    ends.iter().map(id).collect()
}

/// A file that need not be there.
fn json(path: &Path) -> Result<Value, ArtifactError> {
    if path.exists() { read_json(path) } else { Ok(Value::Null) }
}
