//! A base model: its sizes, its tensors by their Hugging Face names, its tokenizer; whichever file it comes from.

use super::ArtifactError;
use super::gguf::GgufFile;
use super::hugging_face::HuggingFaceFolder;
use crate::weights::{HostMatrix, HostVector};
use std::path::{Path, PathBuf};
use tokenizers::AddedToken;

/// Models that are computed alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Family {
    #[default]
    Llama,
    Bloom,
    Mpt,
    Bert,
}

/// The sizes and constants of a base model. What its family has not is left as [`Default`] says.
#[derive(Debug, Clone, PartialEq)]
pub struct BaseConfig {
    pub family: Family,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub query_heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub vocabulary: usize,
    pub max_positions: usize,
    pub norm_eps: f32,
    /// Of LLaMA's rotary positions.
    pub rope_theta: f32,
    /// `(D / 2)`: what the frequency of each pair is divided by, where positions are scaled; else empty.
    pub rope_factors: Vec<f32>,
    /// How many positions back a row sees, itself included; `None` for all.
    pub window: Option<usize>,
    /// Queries and keys are normed head by head, before they are rotated (Qwen3).
    pub head_norms: bool,
    pub tied_embeddings: bool,
    /// Of queries, keys and values.
    pub attention_bias: bool,
    /// Of the Linear that reads the heads.
    pub output_bias: bool,
    pub mlp_bias: bool,
    /// BLOOM: what is added to a layer's results is the norm's output, not its input.
    pub residual_after_norm: bool,
    pub bos_token: Option<u32>,
    pub eos_tokens: Vec<u32>,
    /// BERT: what makes it a classifier.
    pub classifier: Option<ClassifierConfig>,
}

/// What a model that classifies has beside its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassifierConfig {
    /// By output.
    pub labels: Vec<String>,
    /// Whether a config.json names or counts them; where none does, a head has as many as its weight has rows.
    pub stated: bool,
    /// The output is a number, not a choice.
    pub regression: bool,
    /// Labels do not exclude each other.
    pub multi_label: bool,
    /// Rows of the embedding that tells a pair's texts apart.
    pub token_types: usize,
    pub activation: Activation,
}

/// The function between an MLP's two Linears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Gelu,
    GeluTanh,
    Relu,
}

impl Default for BaseConfig {
    /// No sizes, and the constants of a model whose family does not use them.
    fn default() -> Self {
        Self {
            family: Family::default(),
            hidden: 0,
            intermediate: 0,
            layers: 0,
            query_heads: 0,
            kv_heads: 0,
            head_size: 0,
            vocabulary: 0,
            max_positions: 0,
            norm_eps: 1e-5,
            rope_theta: 10000.0,
            rope_factors: Vec::new(),
            window: None,
            head_norms: false,
            tied_embeddings: false,
            attention_bias: false,
            output_bias: false,
            mlp_bias: false,
            residual_after_norm: false,
            bos_token: None,
            eos_tokens: Vec::new(),
            classifier: None,
        }
    }
}

/// No base model that this program can run is larger; a hostile file must not make us allocate by its word.
const MAX_DIMENSION: usize = 1 << 24;
/// Layers are allocated for before any tensor is looked at.
const MAX_LAYERS: usize = 1 << 12;

/// The size of a head where a file does not state it: each has the same share of the hidden size.
pub(super) fn even_share(path: &Path, hidden: usize, heads: usize) -> Result<usize, ArtifactError> {
    if heads > 0 && hidden.is_multiple_of(heads) {
        return Ok(hidden / heads);
    }
    let reason = format!("{heads} attention heads do not divide a hidden size of {hidden}");
    Err(ArtifactError::field(path, "num_attention_heads", reason))
}

impl BaseConfig {
    /// Checks what every family needs. `path` is for the message.
    pub(super) fn checked(self, path: &Path) -> Result<Self, ArtifactError> {
        let sizes = [
            ("hidden_size", self.hidden),
            ("intermediate_size", self.intermediate),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.query_heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_size),
            ("vocab_size", self.vocabulary),
            ("max_position_embeddings", self.max_positions),
        ];
        for (field, size) in sizes {
            let most = if field == "num_hidden_layers" { MAX_LAYERS } else { MAX_DIMENSION };
            if size == 0 || size > most {
                return Err(ArtifactError::field(path, field, format!("{size} is out of range")));
            }
        }
        if !self.query_heads.is_multiple_of(self.kv_heads) {
            let reason = format!("{} does not divide {} attention heads", self.kv_heads, self.query_heads);
            return Err(ArtifactError::field(path, "num_key_value_heads", reason));
        }
        if self.family == Family::Llama && !self.head_size.is_multiple_of(2) {
            let reason = format!("{} is odd, but rotary positions turn pairs", self.head_size);
            return Err(ArtifactError::field(path, "head_dim", reason));
        }
        let positive = |x: f32| x.is_finite() && x > 0.0;
        if !positive(self.norm_eps) {
            let field = match self.family {
                Family::Llama => "rms_norm_eps",
                Family::Bloom | Family::Mpt => "layer_norm_epsilon",
                Family::Bert => "layer_norm_eps",
            };
            return Err(ArtifactError::field(path, field, format!("{} is out of range", self.norm_eps)));
        }
        if !positive(self.rope_theta) {
            return Err(ArtifactError::field(
                path,
                "rope_theta",
                format!("{} is out of range", self.rope_theta),
            ));
        }
        Ok(self)
    }
}

/// Where the tokenizer comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenizerSource {
    HuggingFace {
        tokenizer_json: PathBuf,
        chat_template: Option<String>,
        bos: Option<String>,
        eos: Option<String>,
        /// Beside those of the tokenizer.json.
        added: Vec<AddedToken>,
    },
    Gguf(GgufVocabulary),
}

/// The tokenizer that a GGUF file carries.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`, e.g. `gpt2`.
    pub model: String,
    /// `tokenizer.ggml.pre`, e.g. `smollm`.
    pub pre: String,
    pub tokens: Vec<String>,
    /// 1 normal, 3 control, 4 user-defined, 6 byte.
    pub token_types: Vec<i32>,
    /// By token, of `llama` only.
    pub scores: Vec<f32>,
    pub merges: Vec<String>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unknown: Option<u32>,
    pub padding: Option<u32>,
    pub add_bos: bool,
    pub add_eos: bool,
    /// Whether a text gets a space in front; of `llama` only.
    pub add_space_prefix: bool,
    pub chat_template: Option<String>,
}

/// An opened base model; tensors are read when they are asked for.
#[derive(Debug)]
pub struct Base {
    pub config: BaseConfig,
    pub tokenizer: TokenizerSource,
    path: PathBuf,
    tensors: Tensors,
}

#[derive(Debug)]
enum Tensors {
    HuggingFace(HuggingFaceFolder),
    Gguf(GgufFile),
}

impl Base {
    /// Opens a Hugging Face folder or a GGUF file.
    pub fn open(path: &Path) -> Result<Self, ArtifactError> {
        if path.is_dir() {
            let (folder, config, tokenizer) = HuggingFaceFolder::open(path)?;
            return Ok(Self { config, tokenizer, path: path.into(), tensors: Tensors::HuggingFace(folder) });
        }
        let (file, config, vocabulary) = GgufFile::open(path)?;
        let tokenizer = TokenizerSource::Gguf(vocabulary);
        Ok(Self { config, tokenizer, path: path.into(), tensors: Tensors::Gguf(file) })
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensor `name`, by its Hugging Face name, as precise as the file has it.
    pub fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<HostMatrix, ArtifactError> {
        match &self.tensors {
            Tensors::HuggingFace(folder) => folder.matrix(name, rows, columns),
            Tensors::Gguf(file) => file.matrix(name, rows, columns),
        }
    }

    /// Which group of columns that share a scale each column of a matrix is in, where a file says so for each column (GPTQ).
    pub fn column_groups(&self, name: &str, columns: usize) -> Result<Option<Vec<usize>>, ArtifactError> {
        match &self.tensors {
            Tensors::HuggingFace(folder) => folder.column_groups(name, columns),
            Tensors::Gguf(_) => Ok(None),
        }
    }

    pub fn vector(&self, name: &str, length: usize) -> Result<HostVector, ArtifactError> {
        match &self.tensors {
            Tensors::HuggingFace(folder) => folder.vector(name, length),
            Tensors::Gguf(file) => file.vector(name, length),
        }
    }

    /// The metadata of a GGUF file, in the file's order: each value's bytes, its type included; `None` of a folder.
    pub fn gguf_metadata(&self) -> Option<Vec<(&str, &[u8])>> {
        match &self.tensors {
            Tensors::HuggingFace(_) => None,
            Tensors::Gguf(file) => Some(file.metadata().collect()),
        }
    }

    /// What the base says its licence is: `general.license` of a GGUF file, `license` in the head of a folder's README.md.
    pub fn licence(&self) -> Option<String> {
        match &self.tensors {
            Tensors::HuggingFace(folder) => folder.licence(),
            Tensors::Gguf(file) => file.text("general.license").map(String::from),
        }
    }

    /// Bytes of all files that hold tensors.
    pub fn bytes(&self) -> Result<u64, ArtifactError> {
        let size = |path: &PathBuf| {
            let io = |source| ArtifactError::Io { path: path.clone(), source };
            std::fs::metadata(path).map(|m| m.len()).map_err(io)
        };
        self.files().iter().map(size).sum()
    }

    /// The sha256 of the file that holds the tensors; of several files, the sha256 of their digests in name order.
    pub fn sha256(&self) -> Result<String, ArtifactError> {
        let digests = self.files().iter().map(|f| super::sha256_of_file(f)).collect::<Result<Vec<_>, _>>()?;
        match digests.as_slice() {
            [only] => Ok(only.clone()),
            several => {
                use sha2::Digest;
                Ok(super::hex(&sha2::Sha256::digest(several.concat())))
            }
        }
    }

    /// The sha256 of what decides a result beside the tensors: what the configuration and the tokenizer say. Not the chat
    /// template, through which no question of an evaluation goes.
    pub fn settings_sha256(&self) -> Result<String, ArtifactError> {
        let tokenizer = match &self.tokenizer {
            TokenizerSource::HuggingFace { tokenizer_json, bos, eos, added, .. } => {
                format!("{} {bos:?} {eos:?} {added:?}", super::sha256_of_file(tokenizer_json)?)
            }
            // It stands in the file with the tensors, which has a digest of its own.
            TokenizerSource::Gguf(_) => String::new(),
        };
        use sha2::Digest;
        let text = format!("{:?} {tokenizer}", self.config);
        Ok(super::hex(&sha2::Sha256::digest(text)))
    }

    fn files(&self) -> Vec<PathBuf> {
        match &self.tensors {
            Tensors::HuggingFace(folder) => folder.files(),
            Tensors::Gguf(_) => vec![self.path.clone()],
        }
    }
}
