//! A checkpoint: one safetensors file with the adapters, AdamW's moments and how far the training was.
//!
//! One file and a rename, so that a kill at any moment leaves either the old checkpoint or the new one.

use super::{Recipe, TrainError, Trainer};
use crate::artifact::{remove_partial, write_whole};
use crate::backend::reference::{AdamWState, NamedTensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// What a checkpoint belongs to: a training continues only one that has the same.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Checkpoint {
    pub recipe: Recipe,
    /// Digests of base, search space, channel orders, training tokens: whatever else decides the outcome, by what people call it.
    pub inputs: BTreeMap<String, String>,
}

const META: &str = "lonas";

#[derive(serde::Serialize)]
struct Meta<'a> {
    checkpoint: &'a Checkpoint,
    done: u64,
    steps: u64,
}

#[derive(serde::Deserialize)]
struct ReadMeta {
    checkpoint: ReadCheckpoint,
    done: u64,
    steps: u64,
}

#[derive(serde::Deserialize)]
struct ReadCheckpoint {
    recipe: Recipe,
    /// Of any shape: what has other inputs is another training's, not damaged.
    inputs: Value,
}

impl Checkpoint {
    /// Writes the trainer's state. Gradients of an unfinished accumulation window are not kept, nor is what a student is
    /// to learn from, so this must follow an optimizer step; see [`Trainer::between_windows`].
    pub fn save(&self, path: &Path, trainer: &Trainer) -> Result<(), TrainError> {
        let AdamWState { steps, values, moments1, moments2 } = trainer.optimizer.state();
        let meta = Meta { checkpoint: self, done: trainer.done, steps };
        let meta = serde_json::to_string(&meta).map_err(|e| wrong(path, e.to_string()))?;
        let groups = [("value", values), ("moment1", moments1), ("moment2", moments2)];
        let bytes = groups.iter().flat_map(|(group, tensors)| {
            tensors
                .iter()
                .map(move |t| (format!("{group}/{}", t.name), vec![t.rows, t.columns], le_bytes(&t.values)))
        });
        let bytes = bytes.collect::<Vec<_>>();
        let views = bytes.iter().map(|(name, shape, bytes)| {
            TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (name.as_str(), view))
        });
        let views = views.collect::<Result<Vec<_>, _>>().map_err(|e| wrong(path, e.to_string()))?;
        let header = HashMap::from([(META.to_string(), meta)]);
        let file = safetensors::serialize(views, Some(header)).map_err(|e| wrong(path, e.to_string()))?;
        Ok(write_whole(path, &file)?)
    }

    /// Removes what a killed process has left of a checkpoint that was not whole yet. For who has the folder alone.
    pub fn remove_unfinished(path: &Path) -> Result<(), TrainError> {
        Ok(remove_partial(path)?)
    }

    /// Continues `trainer` from the file, if there is one. Returns whether there was.
    ///
    /// # Errors
    /// A file that is damaged or belongs to another training.
    pub fn resume(&self, path: &Path, trainer: &mut Trainer) -> Result<bool, TrainError> {
        let io = |source| TrainError::Io { path: path.to_path_buf(), source };
        let bytes = match std::fs::read(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            read => read.map_err(io)?,
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| wrong(path, e.to_string()))?;
        let meta = header.metadata().as_ref().and_then(|m| m.get(META));
        let meta = meta.ok_or_else(|| wrong(path, "not a checkpoint of lonas".into()))?;
        let ReadMeta { checkpoint, done, steps } =
            serde_json::from_str(meta).map_err(|e| wrong(path, e.to_string()))?;
        let differences = self.differences(&checkpoint);
        if !differences.is_empty() {
            let what = differences.join("; ");
            return Err(TrainError::OtherTraining { path: path.to_path_buf(), what });
        }
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| wrong(path, e.to_string()))?;
        let group = |group: &str| -> Result<Vec<NamedTensor>, TrainError> {
            let prefix = format!("{group}/");
            let of_group = tensors.iter().filter(|(name, _)| name.starts_with(&prefix));
            of_group.map(|(name, view)| read(path, &name[prefix.len()..], &view)).collect()
        };
        let (values, moments1, moments2) = (group("value")?, group("moment1")?, group("moment2")?);
        trainer.optimizer.restore(AdamWState { steps, values, moments1, moments2 })?;
        trainer.done = done;
        trainer.teacher = None;
        Ok(true)
    }
}

impl Checkpoint {
    /// What is not as it was, each as a part of a sentence.
    fn differences(&self, then: &ReadCheckpoint) -> Vec<String> {
        let fields = |recipe: &Recipe| match serde_json::to_value(recipe) {
            Ok(Value::Object(fields)) => fields,
            _ => Map::new(),
        };
        let shown = |value: Option<&Value>| match value {
            None | Some(Value::Null) => "none".into(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        let old = fields(&then.recipe);
        let recipe = fields(&self.recipe).into_iter().filter(|(name, now)| old.get(name) != Some(now));
        let recipe = recipe.map(|(name, now)| {
            format!("{} was {}, not {}", name.replace('_', " "), shown(old.get(&name)), shown(Some(&now)))
        });
        let same = |name: &str, now: &str| then.inputs.get(name).and_then(Value::as_str) == Some(now);
        let inputs = self.inputs.iter().filter(|(name, now)| !same(name, now));
        // Digests say nothing to people.
        recipe.chain(inputs.map(|(name, _)| format!("{name}: not the same"))).collect()
    }
}

impl Trainer {
    /// Whether the last micro-batch ended with an optimizer step, so that a checkpoint loses nothing.
    pub fn between_windows(&self) -> bool {
        self.done.is_multiple_of(self.recipe.accumulation as u64)
    }
}

fn read(path: &Path, name: &str, view: &TensorView<'_>) -> Result<NamedTensor, TrainError> {
    let (&[rows, columns], Dtype::F32) = (view.shape(), view.dtype()) else {
        let got = format!("{:?} {:?}", view.dtype(), view.shape());
        return Err(wrong(path, format!("tensor `{name}`: expected an f32 matrix, got {got}")));
    };
    let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Ok(NamedTensor { name: name.to_string(), rows, columns, values: values.collect() })
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn wrong(path: &Path, reason: String) -> TrainError {
    TrainError::Checkpoint { path: path.to_path_buf(), reason }
}
