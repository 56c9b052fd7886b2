//! tokenizer.json, checked for what the library that reads it takes on trust and would panic on.

use super::TextError;
use serde_json::Value;
use std::path::Path;
use std::str::FromStr;

/// No vocabulary is larger; a file must not make us allocate by its word.
const MAX_ID: u32 = 1 << 24;

/// The parts that are checked here; the rest is skipped.
#[derive(serde::Deserialize)]
struct Parts {
    /// Read only because the library panics where this part is no JSON.
    #[serde(default, rename = "decoder")]
    _decoder: Value,
    #[serde(default)]
    post_processor: Value,
}

pub(super) fn read(path: &Path) -> Result<tokenizers::Tokenizer, TextError> {
    let wrong = |reason: String| TextError::File { path: path.into(), reason };
    let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    let parts = serde_json::from_str::<Parts>(&text).map_err(|e| wrong(e.to_string()))?;
    check_templates(&parts.post_processor).map_err(|reason| wrong(format!("post_processor: {reason}")))?;
    let mut inner = tokenizers::Tokenizer::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    // Some files were saved with how a training cut and padded its texts. As in transformers, that is the caller's to say.
    inner.with_truncation(None).map_err(|e| wrong(e.to_string()))?;
    inner.with_padding(None);
    let last = inner.get_vocab(true).into_values().max().unwrap_or(0);
    if last > MAX_ID {
        return Err(wrong(format!("token id {last} is out of range")));
    }
    Ok(inner)
}

/// A template may name only special tokens that it defines, and a template for one text no second one.
fn check_templates(processor: &Value) -> Result<(), String> {
    let parts = |field: &str| processor.get(field).and_then(Value::as_array).into_iter().flatten();
    parts("processors").try_for_each(check_templates)?;
    let id = |piece: &Value, kind: &str| Some(piece.get(kind)?.get("id")?.as_str()?.to_string());
    for piece in parts("single").chain(parts("pair")) {
        if let Some(id) = id(piece, "SpecialToken")
            && processor.get("special_tokens").and_then(|t| t.get(&id)).is_none()
        {
            return Err(format!("its template names `{id}`, which is none of its special tokens"));
        }
    }
    if parts("single").any(|piece| id(piece, "Sequence").as_deref() == Some("B")) {
        return Err("its template for one text names a second one".into());
    }
    Ok(())
}
