//! What is on disk: base weights, super-adapters, model folders; and how a base comes onto this machine.
//!
//! Every file is taken to be hostile: sizes, offsets, shapes and types are checked before anything is allocated by
//! them, and an error names the file and the tensor or field. What is written goes to a temporary file in the same
//! folder and is renamed, so that no reader ever sees half of it. Knows no backend and no text.

mod adapter;
mod base;
mod catalog_line;
mod config;
mod elastic;
mod encode;
mod error;
mod fetch;
mod gguf;
mod gguf_header;
mod gguf_layout;
mod gguf_writer;
mod gptq;
mod hugging_face;
mod labels;
mod lock;
mod model_folder;
mod random;
mod safetensors_writer;
#[cfg(test)]
mod tests;
mod tokenizer_files;
mod torch;
mod whole;

pub use adapter::{
    AdapterConfig, AdapterTensors, HeadTensor, HeadTensors, PublishedAdapter, TensorType, read_adapter,
    read_adapter_config, read_adapter_head, read_published_adapter, write_adapter, write_adapter_and_head,
};
pub use base::{Activation, Base, BaseConfig, ClassifierConfig, Family, GgufVocabulary, TokenizerSource};
pub use catalog_line::CatalogLine;
pub use config::read_base_config;
pub use elastic::ElasticFile;
pub use encode::{NumberFormat, OutTensor};
pub use error::ArtifactError;
pub use fetch::{BaseSource, DEFAULT_BASE, locate};
pub use gguf::gguf_has;
pub use gguf_layout::{gguf_name, interleaved};
pub use gguf_writer::{GgufValue, GgufWriter};
pub use lock::FolderLock;
pub use model_folder::{BaseReference, HeldCatalog, ModelFolder};
pub use random::{BaseTensor, write_random_base};
pub use safetensors_writer::SafetensorsWriter;
pub use whole::{MODEL_CARD, Replaceable, WholeFolder, check_apart, check_written, remove_partial};

use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::Path;
use whole::WholeFile;

/// The sha256 of a file, in hex.
pub fn sha256_of_file(path: &Path) -> Result<String, ArtifactError> {
    let io = |source| ArtifactError::Io { path: path.to_path_buf(), source };
    let mut file = std::fs::File::open(path).map_err(io)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(io)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Writes a file so that it appears whole or not at all.
pub fn write_whole(path: &Path, contents: &[u8]) -> Result<(), ArtifactError> {
    let mut file = WholeFile::create(path)?;
    file.write(contents)?;
    file.finish()
}

/// Reads a JSON file into `T`; an error names the field where it can.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ArtifactError> {
    let io = |source| ArtifactError::Io { path: path.to_path_buf(), source };
    let length = std::fs::metadata(path).map_err(io)?.len();
    if length > MAX_JSON_BYTES {
        return Err(ArtifactError::wrong(path, format!("{length} bytes of JSON, at most {MAX_JSON_BYTES}")));
    }
    let text = std::fs::read(path).map_err(io)?;
    let mut json = serde_json::Deserializer::from_slice(&text);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|e| match e.path().to_string() {
        field if field == "." => ArtifactError::wrong(path, e.inner().to_string()),
        field => ArtifactError::field(path, &field, e.inner().to_string()),
    })?;
    json.end().map_err(|e| ArtifactError::wrong(path, e.to_string()))?;
    Ok(value)
}

/// A tokenizer.json of a large vocabulary is about 20 MB; nothing that we read as JSON is larger.
const MAX_JSON_BYTES: u64 = 256 << 20;
