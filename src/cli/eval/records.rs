//! `eval.jsonl`: one line for each item that was computed, so that a killed evaluation goes on and sub-networks can be compared
//! question by question.
//!
//! A line is known by what it was computed from (`of`: a digest of weights, sub-network, method and numbers, which a line of
//! its own spells out) and by its item's digest. So results are taken over whatever the task, file or sub-network is
//! called, and never from other weights. Lines are only ever appended; a last line without its end, which a killed
//! process leaves, is dropped.

use crate::cli::Failure;
use crate::evaluate::Outcome;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// Characters of a digest that tell items and settings apart.
const KEY: usize = 16;

/// One item under one sub-network.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    /// What it was computed from: a setting's key.
    pub(super) of: String,
    /// The item's key.
    pub(super) item: String,
    /// For people: what it was called when it was computed.
    pub(super) task: String,
    pub(super) index: usize,
    pub(super) subnetwork: String,
    #[serde(flatten)]
    pub(super) outcome: Outcome,
}

/// What is known, and where more is written.
pub(super) struct Records {
    path: PathBuf,
    file: Option<File>,
    known: HashMap<(String, String), Outcome>,
}

/// The beginning of a digest.
pub(super) fn key(sha256: &str) -> String {
    sha256.chars().take(KEY).collect()
}

impl Records {
    /// In memory only.
    pub(super) fn none() -> Self {
        Self { path: PathBuf::new(), file: None, known: HashMap::new() }
    }

    /// Reads the file, made if need be, and keeps what belongs to one of these settings: key, and what it stands for. Settings that
    /// the file does not have yet are added to it.
    ///
    /// # Errors
    /// A file that another process writes to, or with a line that is no record.
    pub(super) fn open(path: &Path, settings: &[(String, Value)]) -> Result<Self, Failure> {
        let named = |reason: String| format!("{}: {reason}", path.display());
        let file = OpenOptions::new().read(true).append(true).create(true).open(path);
        let mut file = file.map_err(|e| named(e.to_string()))?;
        // Where a file system knows no locks, it does without.
        if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            return Err(named("another evaluation is writing to it; give another --records".into()).into());
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(|e| named(e.to_string()))?;
        let whole = text.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        if whole < text.len() {
            tracing::info!("{}: the last line was not finished and is dropped", path.display());
            file.set_len(whole as u64).map_err(|e| named(e.to_string()))?;
            text.truncate(whole);
        }
        let (known, mut headed) = parse(&text, settings).map_err(named)?;
        let mut lines = String::new();
        for (key, setting) in settings.iter().filter(|(key, _)| headed.insert(key.clone())) {
            lines += &format!("{}\n", json!({"setting": key, "is": setting}));
        }
        file.write_all(lines.as_bytes()).map_err(|e| named(e.to_string()))?;
        Ok(Self { path: path.into(), file: Some(file), known })
    }

    pub(super) fn get(&self, of: &str, item: &str) -> Option<&Outcome> {
        self.known.get(&(of.to_string(), item.to_string()))
    }

    /// Appends all of these in one go.
    pub(super) fn add(&mut self, records: Vec<Record>) -> Result<(), Failure> {
        if let Some(file) = &mut self.file {
            let lines = records.iter().map(|r| Ok(serde_json::to_string(r)? + "\n"));
            let lines = lines.collect::<Result<String, serde_json::Error>>()?;
            file.write_all(lines.as_bytes()).map_err(|e| format!("{}: {e}", self.path.display()))?;
        }
        self.known.extend(records.into_iter().map(|r| ((r.of, r.item), r.outcome)));
        Ok(())
    }
}

type Parsed = (HashMap<(String, String), Outcome>, HashSet<String>);

/// Results of these settings, and the settings that stand in the file.
fn parse(text: &[u8], settings: &[(String, Value)]) -> Result<Parsed, String> {
    let wanted = settings.iter().map(|(key, _)| key.as_str()).collect::<HashSet<_>>();
    let (mut known, mut headed) = (HashMap::new(), HashSet::new());
    for (number, line) in text.split(|&b| b == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
        let wrong = |reason: String| {
            format!("line {}: no record of an evaluation: {reason}; remove the line or the file", number + 1)
        };
        let value: Value = serde_json::from_slice(line).map_err(|e| wrong(e.to_string()))?;
        if let Some(key) = value.get("setting").and_then(Value::as_str) {
            headed.insert(key.to_string());
            continue;
        }
        let record: Record = serde_json::from_value(value).map_err(|e| wrong(e.to_string()))?;
        if !record.outcome.is_sound() {
            return Err(wrong("its numbers do not fit each other".into()));
        }
        if wanted.contains(record.of.as_str()) {
            known.insert((record.of, record.item), record.outcome);
        }
    }
    Ok((known, headed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(of: &str, item: &str, nll: f64) -> Record {
        let outcome = Outcome::Loss { nll, tokens: 3, response_nll: 0.1 + 0.2, response_tokens: 1 };
        Record {
            of: of.into(),
            item: item.into(),
            task: "t".into(),
            index: 0,
            subnetwork: "s".into(),
            outcome,
        }
    }

    #[test]
    fn what_is_written_is_known_again_and_a_torn_line_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("eval.jsonl");
        let settings = [("a".to_string(), json!({"method": "loss"}))];
        let mut records = Records::open(&path, &settings).unwrap();
        records.add(vec![record("a", "1", 1.0 / 3.0), record("a", "2", 2.5)]).unwrap();
        let refused = Records::open(&path, &settings).err().unwrap().to_string();
        assert!(refused.contains("another evaluation is writing"), "{refused}");
        drop(records);
        let whole = std::fs::read_to_string(&path).unwrap();
        for cut in [1, 5, 30] {
            std::fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            let records = Records::open(&path, &settings).unwrap();
            assert_eq!(records.get("a", "1"), Some(&record("a", "1", 1.0 / 3.0).outcome));
            assert_eq!(records.get("a", "2"), None, "cut by {cut}");
            assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2);
        }
        // Other settings have results of their own, in the same file.
        let other = [("b".to_string(), json!({}))];
        let mut records = Records::open(&path, &other).unwrap();
        assert_eq!(records.get("a", "1"), None);
        records.add(vec![record("b", "1", 7.0)]).unwrap();
        drop(records);
        assert!(Records::open(&path, &settings).unwrap().get("a", "1").is_some());
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 4);
    }

    #[test]
    fn a_line_that_is_no_record_is_named_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("eval.jsonl");
        for line in [
            "x",
            "{}",
            r#"{"of":"a","item":"1","task":"t","index":0,"subnetwork":"s","loss":{"nll":null}}"#,
            r#"{"of":"a","item":"1","task":"t","index":0,"subnetwork":"s","likelihood":{"logprobs":[-1.0],"tokens":[1],"correct":3}}"#,
        ] {
            let text = format!("{}\n{line}\n", json!({"setting": "a", "is": {}}));
            std::fs::write(&path, &text).unwrap();
            let message = Records::open(&path, &[("a".into(), json!({}))]).err().unwrap().to_string();
            assert!(message.contains("eval.jsonl: line 2: no record of an evaluation"), "{message}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }
}
