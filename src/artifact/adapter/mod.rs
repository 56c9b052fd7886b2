//! A super-adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors, or the older adapter_model.bin.

mod config;
mod file;
mod write;

pub use config::read_adapter_config;
pub use write::{TensorType, write_adapter, write_adapter_and_head};

use super::ArtifactError;
use crate::weights::HostMatrix;
use file::TensorFile;
use std::collections::BTreeMap;
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const PREFIX: &str = "base_model.model.";

/// What adapter_config.json says.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterConfig {
    /// `r`: the full rank.
    pub rank: usize,
    /// `lora_alpha`; the scale is `alpha / rank` for every active rank.
    pub alpha: f64,
    pub dropout: f64,
    /// SQFT's `sparse_adapter` (SparsePEFT): `s B A` counts only where the base's weight is not 0.
    pub sparse: bool,
    /// Short module names, e.g. `q_proj`.
    pub target_modules: Vec<String>,
    pub base_model_name: String,
    /// Modules that have another full rank, by their paths or the ends of them; the first that fits counts. Their scale is
    /// that of the others.
    pub rank_pattern: Vec<(String, usize)>,
    /// The model classifies (`task_type` `SEQ_CLS`), and its head was trained whole: see [`read_adapter_head`].
    pub classifies: bool,
}

impl AdapterConfig {
    /// `alpha / r`
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// The full rank of the adapter of a module, by its path in the base.
    pub fn rank_of(&self, module: &str) -> usize {
        let fits = |end: &str| module.strip_suffix(end).is_some_and(|m| m.is_empty() || m.ends_with('.'));
        self.rank_pattern.iter().find(|(end, _)| fits(end)).map_or(self.rank, |(_, rank)| *rank)
    }
}

/// By module path, e.g. `model.layers.0.self_attn.q_proj`: A `(R, inp)` and B `(out, R)`.
pub type AdapterTensors = BTreeMap<String, (HostMatrix, HostMatrix)>;

/// Tensors that were trained whole, beside the adapters, by name in the base, e.g. `classifier.weight`.
pub type HeadTensors = BTreeMap<String, HeadTensor>;

/// A tensor of a classifier's head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadTensor {
    pub shape: Vec<usize>,
    /// Row-major.
    pub values: Vec<f32>,
}

/// Modules of a classifier that PEFT can train whole, as `modules_to_save` and as tensors' names call them. Of `classifier` and
/// `score` it lists both, and a model has one.
const HEADS: [(&str, &str); 3] =
    [("classifier", "classifier."), ("score", "score."), ("pooler", "bert.pooler.")];

/// Whether each adapter must have the rank that the configuration says.
#[derive(Clone, Copy, PartialEq)]
enum Ranks {
    AsConfigured,
    AsStored,
}

/// Reads a folder that PEFT (or this program) wrote.
///
/// # Errors
/// A kind of adapter that is not plain LoRA (rank-stabilised, DoRA, biases, a scale of its own for some modules), a tensor
/// without its partner or of another rank, or one that is no LoRA tensor.
pub fn read_adapter(folder: &Path) -> Result<(AdapterConfig, AdapterTensors), ArtifactError> {
    read(folder, Ranks::AsConfigured).map(|published| (published.config, published.tensors))
}

/// The head that was trained whole beside the adapters; empty where there is none.
///
/// # Errors
/// As [`read_adapter`].
pub fn read_adapter_head(folder: &Path) -> Result<HeadTensors, ArtifactError> {
    let config = read_adapter_config(folder)?;
    let file = TensorFile::in_folder(folder)?;
    let mut head = HeadTensors::new();
    for (key, shape) in file.shapes()? {
        if let Some(name) = head_name(&config, &key) {
            let matrix = HostMatrix {
                name,
                rows: 1,
                columns: shape.iter().product(),
                data: file.values(&key, &shape)?,
            };
            head.insert(matrix.name.clone(), HeadTensor { shape, values: matrix.to_f32() });
        }
    }
    Ok(head)
}

/// A super-adapter, or what somebody has cut out of one.
#[derive(Debug)]
pub struct PublishedAdapter {
    /// With the ranks that are stored.
    pub config: AdapterConfig,
    pub tensors: AdapterTensors,
    pub head: HeadTensors,
    /// Of how many modules only a part of the ranks is left.
    pub cut: usize,
}

/// Reads an adapter as it is published. Shears and SQFT cut a sub-adapter out of a super-adapter (`A[:r]`, `B[:, :r]`) and leave
/// its configuration as it was; the scale stays that of the configuration, and the ranks are those of the tensors.
///
/// # Errors
/// As [`read_adapter`], but that ranks may be smaller than the configuration's.
pub fn read_published_adapter(folder: &Path) -> Result<PublishedAdapter, ArtifactError> {
    let mut published = read(folder, Ranks::AsStored)?;
    published.head = read_adapter_head(folder)?;
    Ok(published)
}

fn read(folder: &Path, ranks: Ranks) -> Result<PublishedAdapter, ArtifactError> {
    let mut config = read_adapter_config(folder)?;
    let file = TensorFile::in_folder(folder)?;
    let path = file.path();
    let mut halves: BTreeMap<String, [Option<HostMatrix>; 2]> = BTreeMap::new();
    for (key, shape) in file.shapes()? {
        if head_name(&config, &key).is_some() {
            continue;
        }
        let (module, half) = parse_key(&key)
            .ok_or_else(|| ArtifactError::wrong(path, format!("tensor `{key}` is not a LoRA tensor")))?;
        let &[rows, columns] = shape.as_slice() else {
            let reason = format!("tensor `{key}`: expected a matrix, got shape {shape:?}");
            return Err(ArtifactError::wrong(path, reason));
        };
        // A is (R, inp), B is (out, R).
        let (full, stored) = (config.rank_of(module), if half == 0 { rows } else { columns });
        let rank = if ranks == Ranks::AsStored && (1..=full).contains(&stored) { stored } else { full };
        let expected = if half == 0 { [rank, columns] } else { [rows, rank] };
        let data = file.values(&key, &expected)?;
        let name = format!("{module}.{}", ["lora_A.weight", "lora_B.weight"][half]);
        let slot = &mut halves.entry(module.to_string()).or_default()[half];
        if slot.replace(HostMatrix { name, rows, columns, data }).is_some() {
            return Err(ArtifactError::wrong(path, format!("tensor `{key}` stands there twice")));
        }
    }
    let pair = |(module, [a, b]): (String, [Option<HostMatrix>; 2])| match (a, b) {
        (Some(a), Some(b)) if a.rows == b.columns => Ok((module, (a, b))),
        (Some(a), Some(b)) => Err(ArtifactError::TensorShape {
            path: path.into(),
            tensor: format!("{PREFIX}{}", b.name),
            expected: vec![b.rows, a.rows],
            got: vec![b.rows, b.columns],
        }),
        (None, _) => Err(missing(path, &module, "lora_A")),
        (_, None) => Err(missing(path, &module, "lora_B")),
    };
    let tensors = halves.into_iter().map(pair).collect::<Result<AdapterTensors, _>>()?;
    let cut = tensors.iter().filter(|(module, (a, _))| a.rows < config.rank_of(module)).count();
    if ranks == Ranks::AsStored {
        let of_its_own = tensors.iter().filter(|(_, (a, _))| a.rows != config.rank);
        config.rank_pattern = of_its_own.map(|(module, (a, _))| (module.clone(), a.rows)).collect();
    }
    Ok(PublishedAdapter { config, tensors, head: HeadTensors::new(), cut })
}

fn missing(path: &Path, module: &str, half: &str) -> ArtifactError {
    ArtifactError::MissingTensor { path: path.into(), tensor: format!("{PREFIX}{module}.{half}.weight") }
}

/// `base_model.model.M.lora_A.weight`, as saved, or `.lora_A.default.weight`, as in memory: `M`, and 0 for A, 1 for B.
fn parse_key(key: &str) -> Option<(&str, usize)> {
    let rest = key.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    let rest = rest.strip_suffix(".default").unwrap_or(rest);
    rest.strip_suffix(".lora_A").map(|m| (m, 0)).or_else(|| rest.strip_suffix(".lora_B").map(|m| (m, 1)))
}

/// `base_model.model.classifier.weight`, as saved, or `.classifier.modules_to_save.default.weight`, as in memory: the tensor's
/// name in the base, if it belongs to a head.
fn head_name(config: &AdapterConfig, key: &str) -> Option<String> {
    let name = key.strip_prefix(PREFIX)?.replace(".modules_to_save.default.", ".");
    let is_head = HEADS.iter().any(|(_, head)| name.starts_with(head));
    (config.classifies && is_head && !name.contains(".lora_")).then_some(name)
}
