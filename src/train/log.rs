//! The training log: one JSON object for each line, a micro-batch or a validation.

use super::{MicroBatch, TrainError, Validation};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

/// One line of `train.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum LogLine {
    MicroBatch {
        micro_batch: u64,
        epoch: u64,
        loss: f32,
        learning_rate: f64,
        /// That the loss is the mean over.
        tokens: usize,
        /// That went forward and back, prompts included.
        #[serde(default)]
        trained_tokens: usize,
        /// Whether the loss is the divergence from the maximal network's distributions, not cross-entropy.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        distilled: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        gradient_norm: Option<f64>,
        /// The sub-network that the loss belongs to: its choice for each group.
        choices: Vec<usize>,
    },
    Validation {
        micro_batch: u64,
        #[serde(flatten)]
        losses: Validation,
    },
}

impl LogLine {
    pub fn micro_batch(&self) -> u64 {
        match self {
            Self::MicroBatch { micro_batch, .. } | Self::Validation { micro_batch, .. } => *micro_batch,
        }
    }
}

impl From<&MicroBatch> for LogLine {
    fn from(m: &MicroBatch) -> Self {
        Self::MicroBatch {
            micro_batch: m.number,
            epoch: m.epoch,
            loss: m.loss,
            learning_rate: m.learning_rate,
            tokens: m.tokens,
            trained_tokens: m.trained_tokens,
            distilled: m.distilled,
            gradient_norm: m.gradient_norm,
            choices: m.sub_network.choices().to_vec(),
        }
    }
}

/// An append-only log file.
pub struct TrainingLog {
    path: PathBuf,
    file: File,
    lines: Vec<LogLine>,
}

impl TrainingLog {
    /// Opens the log and forgets what came after micro-batch `done`: a killed training wrote lines that its last
    /// checkpoint does not know, and they will be computed again.
    pub fn open(path: &Path, done: u64) -> Result<Self, TrainError> {
        let io = |source| TrainError::Io { path: path.to_path_buf(), source };
        let mut lines = Vec::new();
        if path.exists() {
            for line in BufReader::new(File::open(path).map_err(io)?).lines() {
                // A kill can leave half a line; whatever does not parse was not finished.
                let Ok(line) = serde_json::from_str::<LogLine>(&line.map_err(io)?) else { break };
                if line.micro_batch() <= done {
                    lines.push(line);
                }
            }
        }
        let mut text = String::new();
        for line in &lines {
            text += &to_json(line);
        }
        std::fs::write(path, text).map_err(io)?;
        let file = OpenOptions::new().append(true).open(path).map_err(io)?;
        Ok(Self { path: path.to_path_buf(), file, lines })
    }

    pub fn write(&mut self, line: LogLine) -> Result<(), TrainError> {
        let written = self.file.write_all(to_json(&line).as_bytes());
        written.map_err(|source| TrainError::Io { path: self.path.clone(), source })?;
        self.lines.push(line);
        Ok(())
    }

    /// All lines so far, those of earlier runs included.
    pub fn lines(&self) -> &[LogLine] {
        &self.lines
    }
}

fn to_json(line: &LogLine) -> String {
    let json = serde_json::to_string(line).expect("a log line has string keys and finite or null numbers");
    json + "\n"
}
