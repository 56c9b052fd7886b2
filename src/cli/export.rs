//! `lonas export`

use super::Failure;
use super::open::{self, BaseArg, OpenedModel};
use super::progress::Progress;
use crate::artifact::NumberFormat;
use crate::export::{self, Source, Target};
use crate::supernet::CatalogEntry;
use clap::Args;
use std::path::PathBuf;

/// Write one sub-network as a plain model: for llama.cpp, transformers or PEFT.
///
/// The super-adapter is added into the base, everything is cut to what the sub-network keeps, and the result is an
/// ordinary LLaMA that needs no `lonas`. Only `peft` keeps the adapter apart.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lonas export --subnetwork minimal --format gguf --out minimal.gguf\n  \
                  lonas export models/mine --subnetwork heuristic --format hf --out heuristic")]
pub(super) struct ExportArgs {
    /// The model folder.
    #[arg(default_value = super::DEFAULT_MODEL, value_name = "DIR")]
    model: PathBuf,

    /// The sub-network, by its name in the catalog.
    #[arg(long, value_name = "NAME")]
    subnetwork: String,

    /// What to write.
    #[arg(long, value_enum)]
    format: Format,

    /// Where to: a folder, which gets a model card too; or, for gguf, a file whose name ends in .gguf.
    #[arg(long, value_name = "PATH")]
    out: PathBuf,

    /// Number format of the written weights; norms and biases of a GGUF file stay f32. `auto` is f16 for gguf and hf,
    /// which keeps 11 bits of a weight where bf16 keeps 8, and the super-adapter's own for peft. `q8_0` is for gguf only.
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    dtype: Dtype,

    /// Replace what an earlier export wrote to --out.
    #[arg(long)]
    overwrite: bool,

    #[command(flatten)]
    base: BaseArg,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// One file for llama.cpp and what is built on it; the only format for widths or heads that differ by layer.
    Gguf,
    /// A Hugging Face folder: config.json, model.safetensors, the tokenizer's files.
    Hf,
    /// A PEFT adapter for the plain base, of a sub-network that has all widths and heads.
    Peft,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Dtype {
    Auto,
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
}

impl Dtype {
    /// `None` for what suits the format.
    fn format(self) -> Option<NumberFormat> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(NumberFormat::F32),
            Self::F16 => Some(NumberFormat::F16),
            Self::Bf16 => Some(NumberFormat::Bf16),
            Self::Q8_0 => Some(NumberFormat::Q8_0),
        }
    }
}

pub(super) fn run(args: &ExportArgs) -> Result<(), Failure> {
    let opened = open::models(std::slice::from_ref(&args.model), &args.base)?;
    let model = opened.models.first().ok_or("no model")?;
    let OpenedModel { folder, shape, space, .. } = model;
    let source = Source {
        base: &opened.base,
        folder,
        shape,
        space,
        entry: entry(args, model)?,
        orders: &opened.orders,
    };
    let target = Target { path: &args.out, overwrite: args.overwrite };
    let mut progress = None;
    let mut on_tensor = |done: usize, total: usize, name: &str| {
        let progress = progress.get_or_insert_with(|| Progress::new("tensor", total as u64, 0));
        progress.set(done as u64, name);
    };
    let dtype = args.dtype.format();
    let weights = dtype.unwrap_or(NumberFormat::F16);
    let notes = match args.format {
        Format::Gguf => export::gguf(source, weights, target, &mut on_tensor),
        Format::Hf => export::hugging_face(source, weights, target, &mut on_tensor),
        Format::Peft => export::peft(source, dtype, target, &mut on_tensor),
    };
    if let Some(progress) = progress {
        progress.finish();
    }
    let notes = notes.map_err(|error| match error {
        export::ExportError::Artifact(crate::artifact::ArtifactError::Exists { path }) => {
            format!("{}: there is something already; give another --out, or --overwrite", path.display())
                .into()
        }
        other => Failure::from(other),
    })?;
    notes.iter().for_each(|note| tracing::warn!("{note}"));
    tracing::info!("wrote {}", args.out.display());
    Ok(())
}

fn entry<'a>(args: &ExportArgs, model: &'a OpenedModel) -> Result<&'a CatalogEntry, Failure> {
    let names = || model.catalog.entries().iter().map(|e| e.name.as_str()).collect::<Vec<_>>().join(", ");
    let unknown = || format!("--subnetwork {}: the catalog has {}", args.subnetwork, names()).into();
    model.catalog.get(&args.subnetwork).ok_or_else(unknown)
}
