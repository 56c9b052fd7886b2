//! One example, and files of them.

use serde_json::Value;
use std::path::{Path, PathBuf};

/// One item of an LLM-Adapters file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    pub instruction: String,
    /// Further context; empty in most files.
    pub input: String,
    /// The response to learn.
    pub output: String,
    /// The label, e.g. `answer3` or `true`; empty where there is none.
    pub answer: String,
}

/// A data file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: not a JSON array of examples: {reason}", path.display())]
    NotExamples { path: PathBuf, reason: String },
    #[error("{}: item {index}: {reason}", path.display())]
    Item { path: PathBuf, index: usize, reason: String },
}

/// Reads a file of examples. `input` and `answer` may be missing.
pub fn read(path: &Path) -> Result<Vec<Example>, DataError> {
    read_items(path, parse)
}

/// Reads a JSON array whose items `parse` takes; what it refuses is named with file and index, from 0.
pub(super) fn read_items<T>(
    path: &Path,
    parse: impl Fn(&Value) -> Result<T, String>,
) -> Result<Vec<T>, DataError> {
    let text = std::fs::read(path).map_err(|source| DataError::Io { path: path.into(), source })?;
    let not_examples = |reason: String| DataError::NotExamples { path: path.into(), reason };
    let items: Vec<Value> = serde_json::from_slice(&text).map_err(|e| not_examples(e.to_string()))?;
    if items.is_empty() {
        return Err(not_examples("it is empty".into()));
    }
    let item = |(index, item): (usize, &Value)| {
        parse(item).map_err(|reason| DataError::Item { path: path.into(), index, reason })
    };
    items.iter().enumerate().map(item).collect()
}

pub(super) fn parse(item: &Value) -> Result<Example, String> {
    let object = item.as_object().ok_or("expected an object")?;
    let text = |field: &str, required: bool| match object.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        None | Some(Value::Null) if !required => Ok(String::new()),
        Some(Value::Number(number)) if field == "answer" => Ok(number.to_string()),
        None => Err(format!("field `{field}` is missing")),
        Some(other) => Err(format!("field `{field}`: expected a string, got {other}")),
    };
    Ok(Example {
        instruction: text("instruction", true)?,
        input: text("input", false)?,
        output: text("output", true)?,
        answer: text("answer", false)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.json");
        for (text, named) in [
            ("{}", "not a JSON array"),
            ("[]", "it is empty"),
            ("[3]", "item 0: expected an object"),
            (
                r#"[{"instruction": "a", "output": "b"}, {"output": "b"}]"#,
                "item 1: field `instruction` is missing",
            ),
            (r#"[{"instruction": "a", "output": 3}]"#, "field `output`: expected a string, got 3"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        assert!(matches!(read(folder.path()), Err(DataError::Io { .. })));
    }
}
