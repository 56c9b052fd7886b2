//! One sub-network as a plain model that other programs load: a GGUF file, a Hugging Face folder, a PEFT adapter.
//!
//! Nothing of the super-network is left but what the sub-network computes. Every format is written tensor by tensor into
//! a place of its own and renamed, so that no reader ever sees half of it. Knows no command line.

mod card;
mod gguf;
mod gguf_metadata;
mod hugging_face;
mod peft;

pub use gguf::gguf;
pub use hugging_face::hugging_face;
pub use peft::peft;

use crate::artifact::{
    ArtifactError, Base, GgufVocabulary, MODEL_CARD as CARD, ModelFolder, NumberFormat, OutTensor,
    Replaceable, WholeFolder, check_apart, check_written,
};
use crate::model::llama::{Plain, PlainTensor};
use crate::model::{LoadError, Orders, SuperAdapter};
use crate::supernet::{ActiveShape, CatalogEntry, ModelShape, SearchSpace};
use crate::text::{TextError, VocabularyParts};
use std::collections::BTreeMap;
use std::path::Path;

/// What is exported: a sub-network of an opened super-network.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub base: &'a Base,
    pub folder: &'a ModelFolder,
    pub shape: &'a ModelShape,
    pub space: &'a SearchSpace,
    pub entry: &'a CatalogEntry,
    pub orders: &'a Orders,
}

/// Where an export goes.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    pub path: &'a Path,
    /// Whether an earlier export may be replaced.
    pub overwrite: bool,
}

/// What somebody should know about a finished export, in whole sentences.
pub type Notes = Vec<String>;

/// Told of each tensor before it is written: how many have been, of how many, and its name.
pub type OnTensor<'a> = &'a mut dyn FnMut(usize, usize, &str);

/// Why a sub-network was not exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(
        "sub-network `{name}`: a Hugging Face LLaMA has one MLP width, and this one has {widths}; a GGUF file can hold it"
    )]
    UnevenWidths { name: String, widths: String },
    #[error(
        "sub-network `{name}`: group {group} (`{member}`) is cut to width {width} of {full}, but an adapter leaves the \
         base as it is and can only have fewer ranks; gguf and hf can hold it"
    )]
    CutWidth { name: String, group: usize, member: String, width: usize, full: usize },
    #[error(
        "the adapter is sparse (`sparse_adapter` in its configuration): it counts only where a base weight is not 0, which PEFT \
         does not know; gguf and hf can hold it"
    )]
    SparseAdapter,
    #[error(
        "sub-network `{name}`: layer {layer} has {query} query and {kv} key-value heads and layer {other} has others, but a \
         Hugging Face LLaMA has as many in every layer; a GGUF file can hold it"
    )]
    UnevenHeads { name: String, layer: usize, query: usize, kv: usize, other: usize },
    #[error(
        "sub-network `{name}`: layer {layer} has an MLP and no attention, and in what is exported every layer has both"
    )]
    NoAttention { name: String, layer: usize },
    #[error(
        "sub-network `{name}`: layer {layer} has an attention and no MLP, and in what is exported every layer has both"
    )]
    NoMlp { name: String, layer: usize },
    #[error("sub-network `{name}` has no layer left")]
    NoLayers { name: String },
    #[error("the base has {what}, which is not written to GGUF; hf can hold it")]
    NotInGguf { what: &'static str },
    #[error(
        "the base's file has a factor for each frequency of its positions, and not the rule that gave them, which a \
         config.json wants"
    )]
    FactorsWithoutRule,
    #[error("number format {dtype} is not for {format}; it has {possible}")]
    Dtype { dtype: &'static str, format: &'static str, possible: &'static str },
}

impl<'a> Source<'a> {
    /// `NAME-SUBNETWORK`
    pub fn name(&self) -> String {
        format!("{}-{}", self.folder.name, self.entry.name)
    }

    /// A folder for an export. One that an earlier export wrote is replaced if the target says so.
    ///
    /// # Errors
    /// A target that is taken, cannot be written to, or does not lie apart from what is exported.
    fn folder(&self, target: Target<'_>, ours: Replaceable) -> Result<WholeFolder, ArtifactError> {
        self.check_apart(target)?;
        WholeFolder::create(target.path, target.overwrite.then_some(ours))
    }

    fn check_apart(&self, target: Target<'_>) -> Result<(), ArtifactError> {
        let sources =
            [("the base", self.base.path()), ("the super-adapter's model folder", self.folder.path())];
        check_apart(target.path, &sources)
    }

    fn active(&self) -> ActiveShape {
        self.space.resolve(self.shape, &self.entry.sub_network)
    }

    fn adapter(&self) -> Result<SuperAdapter, ExportError> {
        let adapter = SuperAdapter {
            shape: self.shape.clone(),
            tensors: self.folder.adapter()?,
            head: self.folder.head()?,
            scale: self.folder.adapter_config.scale() as f32,
            sparse: self.folder.adapter_config.sparse,
        };
        adapter.check()?;
        Ok(adapter)
    }

    fn plain(&self) -> Result<Plain<'a>, ExportError> {
        let plain = Plain::new(self.base, self.adapter()?, self.active(), self.orders)?;
        let name = || self.entry.name.clone();
        if let Some((&layer, _)) =
            plain.layers().iter().zip(plain.heads()).find(|(_, heads)| heads.query == 0)
        {
            return Err(ExportError::NoAttention { name: name(), layer });
        }
        let without = plain.layers().iter().zip(plain.widths()).find(|(_, width)| *width == 0);
        match (without, plain.layers()) {
            (Some((&layer, _)), _) => Err(ExportError::NoMlp { name: name(), layer }),
            (_, []) => Err(ExportError::NoLayers { name: name() }),
            _ => Ok(plain),
        }
    }
}

/// A tensor as it is written: a matrix in `dtype`, a vector, of which there are few numbers, in `vectors`.
fn out(tensor: &PlainTensor, name: String, dtype: NumberFormat, vectors: NumberFormat) -> OutTensor {
    let format = if tensor.shape.len() > 1 { dtype } else { vectors };
    OutTensor { name, shape: tensor.shape.clone(), format }
}

/// `1536 in layers 0-3, 7; 768 in layers 4-6`, falling.
fn by_layer(sizes: &[usize]) -> String {
    let mut layers: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (layer, &size) in sizes.iter().enumerate() {
        layers.entry(size).or_default().push(layer);
    }
    let of = |(size, layers): (&usize, &Vec<usize>)| format!("{size} in layers {}", ranges(layers));
    layers.iter().rev().map(of).collect::<Vec<_>>().join("; ")
}

/// `0-3, 7` of rising numbers.
fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let shown = |(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    runs.iter().map(shown).collect::<Vec<_>>().join(", ")
}

/// Whether exports wrote all of a folder: it has their model card, and each file is one that they write, by its path.
fn check_exported(folder: &Path, ours: impl Fn(&Path) -> bool) -> Result<(), ArtifactError> {
    check_written(folder, &card::WORDS, ours)
}

/// Writes a file into a folder on its way.
fn write(folder: &WholeFolder, name: &str, text: &str) -> Result<(), ArtifactError> {
    crate::artifact::write_whole(&folder.path().join(name), text.as_bytes())
}

/// A number as its shortest decimal, which 32 bits read back to the same; as 64 bits it would have digits of noise.
fn short(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

/// A GGUF file's vocabulary as the tokenizer takes it: `artifact` and `text` do not know each other.
pub fn vocabulary_parts(vocabulary: GgufVocabulary) -> VocabularyParts {
    let GgufVocabulary { model, pre, tokens, token_types, scores, merges, .. } = vocabulary;
    let GgufVocabulary { bos, eos, unknown, add_bos, add_eos, add_space_prefix, .. } = vocabulary;
    VocabularyParts {
        model,
        pre,
        tokens,
        token_types,
        scores,
        merges,
        bos,
        eos,
        unknown,
        add_bos,
        add_eos,
        add_space_prefix,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_told_by_runs_of_layers() {
        assert_eq!(by_layer(&[8, 8, 8, 4, 4, 8, 6]), "8 in layers 0-2, 5; 6 in layers 6; 4 in layers 3-4");
    }

    #[test]
    fn a_number_is_written_without_noise() {
        assert_eq!(short(1e-5), 1e-5);
        assert_eq!(short(10000.0), 10000.0);
    }
}
