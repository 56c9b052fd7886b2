//! `lonas import`

use super::Failure;
use super::open;
use crate::artifact::{
    AdapterConfig, Base, BaseReference, BaseSource, ElasticFile, MODEL_CARD, ModelFolder, PublishedAdapter,
    Replaceable, TensorType, WholeFolder, check_apart, check_written, read_published_adapter,
    write_adapter_and_head, write_whole,
};
use crate::model::{SuperAdapter, model_shape};
use crate::supernet::{Catalog, ModelShape, SearchSpace, is_model_name};
use clap::Args;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Make a model folder of a super-adapter that LoNAS, Shears or SQFT has published.
///
/// Takes the adapter as PEFT saved it (adapter_model.safetensors, or .bin, of which nothing is executed) and the search space as
/// its authors wrote it. The base stays where it is; the folder remembers its place. Channels are in the base's own order,
/// as these programs leave them; `lonas inspect --check-order` looks whether the adapter agrees.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  lonas import --base llama-7b-hf --adapter lonas-llama-7b-commonsense-adapter \
    --nncf-config nncf_lonas_llama_7b.json --out models/llama-7b-commonsense"
)]
pub(super) struct ImportArgs {
    /// The base model that the adapter was trained on: a Hugging Face folder or a GGUF file.
    #[arg(long, value_name = "PATH")]
    base: PathBuf,

    /// The folder with adapter_config.json and the adapter's tensors.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,

    /// The search space: an NNCF configuration (LoNAS, Shears) or SQFT's elastic_adapter_config.json; which one it is shows in
    /// what it contains. Without it, the file of that name, or nncf_config.json, in the adapter's folder.
    #[arg(long, visible_alias = "elastic-config", value_name = "FILE")]
    nncf_config: Option<PathBuf>,

    /// The model folder to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// What requests call it; the folder's name if it is not given.
    #[arg(long)]
    name: Option<String>,

    /// Put the ranks of each module in falling importance: the same adapter, whose first ranks are the most of it. For one that was
    /// trained as plain LoRA, whose ranks have no order; one that was trained with elastic ranks has its own, and loses by it.
    #[arg(long)]
    order_ranks: bool,

    /// Replace what an earlier import wrote to --out.
    #[arg(long)]
    overwrite: bool,
}

/// What an import writes, beside what `serve` and `eval` may add later.
const FILES: [&str; 6] =
    [MODEL_CARD, "adapter_config.json", "adapter_model.safetensors", "catalog.json", LABELS, "supernet.json"];

/// What one line of every import's card has, by which a folder is known to be one.
const IMPORTED: &str = ", imported by lonas ";

/// Names the labels of a classifier's adapter, where it lies beside it.
const LABELS: &str = "config.json";

pub(super) fn run(args: &ImportArgs) -> Result<(), Failure> {
    let name = args.name.clone().unwrap_or_else(|| open::name_of(&args.out));
    if !is_model_name(&name) {
        return Err(format!(
            "--name: a model named `{name}` could not be asked for: no colon, no space, at least one character"
        )
        .into());
    }
    let file = elastic_file(args)?;
    let sources =
        [("the base", &*args.base), ("the adapter", &args.adapter), ("the search space", file.path())];
    check_apart(&args.out, &sources)?;
    let base = Base::open(&args.base)?;
    let published = read_published_adapter(&args.adapter)?;
    open::check_task(&published.config, &base)?;
    let shape = model_shape(&base.config.with_head_of(&args.adapter)?, Some(&published.config));
    let mut published = checked(published, &shape)?;
    if args.order_ranks {
        crate::train::order_ranks(&mut published.tensors);
    }
    let space = file.search_space(&shape, published.config.rank)?;
    let mut notes = file.notes().to_vec();
    if published.cut > 0 {
        notes.push(format!(
            "{} of {} modules have a part of their {} ranks only: a sub-adapter. Its scale stays {}, its choices are \
             those that are left.",
            published.cut,
            published.tensors.len(),
            published.config.rank,
            published.config.scale()
        ));
    }
    let target =
        Target { name: &name, file: &file, base: &base, shape: &shape, space: &space, notes: &notes };
    write(args, &target, &published)?;
    notes.iter().for_each(|note| tracing::warn!("{note}"));
    tracing::info!(
        "wrote {}: {} elastic groups, 10^{:.1} sub-networks",
        args.out.display(),
        space.groups().len(),
        space.log10_size()
    );
    Ok(())
}

fn elastic_file(args: &ImportArgs) -> Result<ElasticFile, Failure> {
    let path = args.nncf_config.clone().or_else(|| ElasticFile::beside(&args.adapter));
    let missing = || {
        format!(
            "--nncf-config: which sub-networks are there? {} has neither elastic_adapter_config.json nor nncf_config.json",
            args.adapter.display()
        )
    };
    Ok(ElasticFile::read(&path.ok_or_else(missing)?)?)
}

/// The adapter, if it is one of this model.
fn checked(published: PublishedAdapter, shape: &ModelShape) -> Result<PublishedAdapter, Failure> {
    let PublishedAdapter { config, tensors, head, cut } = published;
    let (shape, scale, sparse) = (shape.clone(), config.scale() as f32, config.sparse);
    let adapter = SuperAdapter { shape, tensors, head, scale, sparse };
    adapter.check()?;
    Ok(PublishedAdapter { config, tensors: adapter.tensors, head: adapter.head, cut })
}

/// What the new folder is to say.
struct Target<'a> {
    name: &'a str,
    file: &'a ElasticFile,
    base: &'a Base,
    shape: &'a ModelShape,
    space: &'a SearchSpace,
    notes: &'a [String],
}

fn write(args: &ImportArgs, target: &Target<'_>, published: &PublishedAdapter) -> Result<(), Failure> {
    let &Target { name, shape, space, .. } = target;
    let PublishedAdapter { config, tensors, head, .. } = published;
    let imported: Replaceable =
        |folder| check_written(folder, &[IMPORTED], |path| FILES.iter().any(|name| path.ends_with(name)));
    let folder = WholeFolder::create(&args.out, args.overwrite.then_some(imported));
    let folder = folder.map_err(|error| match error {
        crate::artifact::ArtifactError::Exists { path } => Failure::from(format!(
            "{}: there is something already; give another --out, or --overwrite",
            path.display()
        )),
        other => other.into(),
    })?;
    write_adapter_and_head(folder.path(), config, tensors, head, TensorType::of(tensors))?;
    let base = BaseReference { source: BaseSource::Path(open::place(&args.base)?), sha256: None };
    let orders = BTreeMap::new();
    ModelFolder::write_supernet(folder.path(), name, &base, config.scale(), shape, space, &orders)?;
    ModelFolder::open(folder.path())?.write_catalog(&Catalog::new(shape, space))?;
    let labels = args.adapter.join(LABELS);
    if config.classifies && labels.exists() {
        write_whole(
            &folder.path().join(LABELS),
            &std::fs::read(&labels).map_err(|e| format!("{}: {e}", labels.display()))?,
        )?;
    }
    write_whole(&folder.path().join(MODEL_CARD), card(args, target, config).as_bytes())?;
    Ok(folder.finish()?)
}

/// The model card.
fn card(args: &ImportArgs, target: &Target<'_>, config: &AdapterConfig) -> String {
    let &Target { name, file, base, space, notes, .. } = target;
    let licence = base.licence().unwrap_or_else(|| "not stated in its files".into());
    let its_own = |path: &Path| open::name_of(path);
    let trained_on = match config.base_model_name.as_str() {
        "" => String::new(),
        trained_on => format!(" (the adapter says `{trained_on}`)"),
    };
    let mut text = format!(
        "# {name}\n\nA LoNAS super-network: a frozen base with one elastic low-rank super-adapter{IMPORTED}\
         {version}. Serve it with\n\n    lonas serve {out}\n\n| | |\n|---|---|\n| base | {base}{trained_on} |\n\
         | licence of the base | {licence}; that of the adapter is its authors' |\n| adapter | {adapter}: rank {rank}, \
         alpha {alpha}, on {targets} |\n| search space | {file}: {groups} groups, 10^{size:.1} sub-networks |\n\
         | order of channels and heads | the base's own |\n| ranks | {ranks} |\n\n## Elastic groups\n\n",
        version = env!("CARGO_PKG_VERSION"),
        out = args.out.display(),
        base = its_own(base.path()),
        adapter = its_own(&args.adapter),
        rank = config.rank,
        alpha = config.alpha,
        targets = config.target_modules.join(", "),
        file = its_own(file.path()),
        groups = space.groups().len(),
        size = space.log10_size(),
        ranks =
            if args.order_ranks { "in falling importance (`--order-ranks`)" } else { "as they were trained" },
    );
    for line in super::inspect::group_lines(space) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "- {line}");
    }
    for note in notes {
        let _ = write!(text, "\n{note}\n");
    }
    text
}
