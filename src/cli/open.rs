//! From arguments to loaded things: bases, model folders, tokenizers.

use super::Failure;
use crate::artifact::{
    AdapterConfig, ArtifactError, Base, BaseReference, BaseSource, ClassifierConfig, DEFAULT_BASE, Family,
    FolderLock, ModelFolder, TokenizerSource, locate,
};
use crate::backend::Selection;
use crate::export::vocabulary_parts;
use crate::model::{Layout, Orders, SuperAdapter, model_shape};
use crate::supernet::{Catalog, CatalogEntry, ModelShape, SearchSpace};
use crate::text::{ChatError, ChatTemplate, Tokenizer};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where fetched bases are kept: `LONAS_CACHE`, else the user's cache folder.
pub(super) fn cache() -> PathBuf {
    let home = || std::env::var_os("HOME").map_or_else(std::env::temp_dir, PathBuf::from).join(".cache");
    let user = || std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("lonas");
    std::env::var_os("LONAS_CACHE").map_or_else(user, PathBuf::from)
}

/// Which base to use.
#[derive(Debug, clap::Args)]
pub(super) struct BaseArg {
    /// The base model: a Hugging Face folder or a GGUF file. Without it, the base of the default super-network.
    #[arg(long, env = "LONAS_BASE", value_name = "PATH")]
    base: Option<PathBuf>,
}

impl BaseArg {
    /// A base to build on; `None` names the default one. What is built remembers its place, whatever folder it is used from.
    pub(super) fn reference(&self) -> Result<BaseReference, Failure> {
        Ok(match &self.base {
            Some(path) => BaseReference { source: BaseSource::Path(place(path)?), sha256: None },
            None => {
                BaseReference { source: DEFAULT_BASE.source(), sha256: Some(DEFAULT_BASE.sha256.to_string()) }
            }
        })
    }

    /// Who names the base to build on.
    pub(super) fn named(&self) -> String {
        if self.base.is_some() { BASE_OPTION.into() } else { "lonas".into() }
    }

    /// The base of a model folder, unless the argument names another place for it.
    fn for_folder(&self, folder: &ModelFolder) -> BaseReference {
        let sha256 = folder.base.sha256.clone();
        match &self.base {
            Some(path) => BaseReference { source: BaseSource::Path(path.clone()), sha256 },
            None => folder.base.clone(),
        }
    }
}

const BASE_OPTION: &str = "--base (LONAS_BASE)";

/// Where a base lies, from wherever one looks. A link keeps its name, by which people know the base.
pub(super) fn place(base: &Path) -> Result<PathBuf, Failure> {
    let parent = base.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let place = match base.file_name() {
        Some(name) => parent.canonicalize().map(|parent| parent.join(name)),
        None => base.canonicalize(),
    };
    let named = |error| format!("the base, which {BASE_OPTION} names: {}: {error}", base.display());
    Ok(place.map_err(named)?)
}

/// Opens a base, fetched first if need be. `named` is who names it, for the message.
///
/// # Errors
/// Beside what is wrong with a file: another base than the one that was meant, by its digest.
pub(super) fn base(reference: &BaseReference, named: &str) -> Result<Base, Failure> {
    opened(reference).map_err(|error| format!("the base, which {named} names: {error}").into())
}

fn opened(reference: &BaseReference) -> Result<Base, Failure> {
    let path = locate(&reference.source, reference.sha256.as_deref(), &cache())?;
    let base = Base::open(&path)?;
    // A single file has been checked while it was located; a folder's digest is that of its weights.
    if let Some(expected) = reference.sha256.as_ref().filter(|_| path.is_dir()) {
        let got = base.sha256()?;
        if !got.eq_ignore_ascii_case(expected) {
            return Err(ArtifactError::Digest { path, expected: expected.clone(), got }.into());
        }
    }
    Ok(base)
}

/// A base with every super-adapter that was asked for, nothing loaded onto a backend yet.
pub(super) struct Opened {
    pub(super) base: Base,
    pub(super) models: Vec<OpenedModel>,
    /// Shared by all super-adapters.
    pub(super) orders: Orders,
}

/// One model folder, checked against the base.
pub(super) struct OpenedModel {
    pub(super) folder: ModelFolder,
    /// With this super-adapter's own labels; `None` of a language model.
    pub(super) classifier: Option<ClassifierConfig>,
    pub(super) shape: ModelShape,
    pub(super) space: SearchSpace,
    pub(super) catalog: Catalog,
}

/// Opens model folders that share one base.
///
/// # Errors
/// Folders with different bases or orders, names that clash, anything wrong in a file.
pub(super) fn models(folders: &[PathBuf], base_arg: &BaseArg) -> Result<Opened, Failure> {
    let folders = folders.iter().map(|path| ModelFolder::open(path)).collect::<Result<Vec<_>, _>>()?;
    let first = folders.first().ok_or("no model folder was given")?;
    for other in &folders[1..] {
        check_together(first, other, base_arg)?;
    }
    let named = match base_arg.base {
        Some(_) => BASE_OPTION.into(),
        None => first.path().join("supernet.json").display().to_string(),
    };
    let base = base(&base_arg.for_folder(first), &named)?;
    let open = |folder: ModelFolder| -> Result<OpenedModel, Failure> {
        check_task(&folder.adapter_config, &base)?;
        let config = base.config.with_head_of(folder.path())?;
        let shape = model_shape(&config, Some(&folder.adapter_config));
        let space = folder.search_space(&shape)?;
        let catalog = folder.catalog(&shape, &space)?;
        Ok(OpenedModel { folder, classifier: config.classifier, shape, space, catalog })
    };
    let models = folders.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let orders = common_orders(&models, Layout::of(base.config.family))?;
    Ok(Opened { base, models, orders })
}

/// The orders that all of them have: by layer, since their groups need not be the same.
fn common_orders(models: &[OpenedModel], layout: &Layout) -> Result<Orders, Failure> {
    let of = |model: &OpenedModel| Orders::of_groups(layout, &model.space, model.folder.orders());
    let Some((first, others)) = models.split_first() else { return Ok(Orders::default()) };
    let orders = of(first);
    let Some(other) = others.iter().find(|other| of(other) != orders) else { return Ok(orders) };
    let (a, b) = (first.folder.path().display(), other.folder.path().display());
    Err(format!(
        "{a} and {b} order the base's channels or heads differently and cannot share one copy of it; \
         train the second with `--order {a}`"
    )
    .into())
}

/// A classifier's adapter on a model that writes text would leave its head out without a word.
pub(super) fn check_task(adapter: &AdapterConfig, base: &Base) -> Result<(), Failure> {
    if !adapter.classifies || base.config.family == Family::Bert {
        return Ok(());
    }
    let family = Layout::of(base.config.family).name;
    Err(format!("the adapter is a classifier's (task_type SEQ_CLS), and {family} models write text").into())
}

fn check_together(first: &ModelFolder, other: &ModelFolder, base: &BaseArg) -> Result<(), Failure> {
    let (a, b) = (first.path().display(), other.path().display());
    if first.name == other.name {
        return Err(format!(
            "{a} and {b} are both named `{}`; requests could not tell them apart",
            first.name
        )
        .into());
    }
    let same_base = match (&first.base.sha256, &other.base.sha256) {
        (Some(one), Some(two)) => one == two,
        _ => base.base.is_some() || first.base.source == other.base.source,
    };
    if !same_base {
        return Err(format!("{a} and {b} have different bases; one server serves one base").into());
    }
    Ok(())
}

impl OpenedModel {
    /// Puts what was found out about sub-networks, by their names, into the catalog as it is now: others may have changed it while
    /// that took hours. One that is another sub-network now learns nothing.
    pub(super) fn learn(
        &mut self,
        found: impl IntoIterator<Item = (String, impl FnOnce(&mut CatalogEntry))>,
    ) -> Result<(), Failure> {
        let mut held = self.folder.hold_catalog(&self.shape, &self.space)?;
        for (name, learn) in found {
            let then = self.catalog.get(&name).map(|entry| &entry.sub_network);
            match held.catalog.get_mut(&name).filter(|now| Some(&now.sub_network) == then) {
                Some(now) => learn(now),
                None => tracing::warn!(
                    "{}: `{name}` is not what it was when this began; nothing was written for it",
                    self.folder.path().display()
                ),
            }
        }
        self.catalog = held.write()?;
        Ok(())
    }
}

impl Opened {
    /// The super-adapters' tensors for the model's loader.
    pub(super) fn super_adapters(&self) -> Result<Vec<SuperAdapter>, Failure> {
        let load = |model: &OpenedModel| {
            Ok(SuperAdapter {
                shape: model.shape.clone(),
                tensors: model.folder.adapter()?,
                head: model.folder.head()?,
                scale: model.folder.adapter_config.scale() as f32,
                sparse: model.folder.adapter_config.sparse,
            })
        };
        self.models.iter().map(load).collect()
    }
}

/// A sub-network of a loaded model: (the model's number, the sub-network's name), and how a batch selects it.
pub(super) type Named = ((usize, String), Selection);

/// Every sub-network of every catalog, model by model in catalog order, with ids that are unique in the process.
pub(super) fn selections(opened: &Opened) -> Vec<Named> {
    let all = opened.models.iter().enumerate().flat_map(|(adapter, model)| {
        model.catalog.entries().iter().map(move |entry| (adapter, model, entry))
    });
    let selection = |(id, (adapter, model, entry)): (u32, (usize, &OpenedModel, &CatalogEntry))| {
        let shape = Arc::new(model.space.resolve(&model.shape, &entry.sub_network));
        ((adapter, entry.name.clone()), Selection { adapter, subnetwork: id, shape })
    };
    (0..).zip(all).map(selection).collect()
}

/// A folder where a run of hours keeps its state and results, for this process alone.
///
/// # Errors
/// Somebody else's, or one that cannot be written to.
pub(super) fn output(folder: &Path) -> Result<FolderLock, Failure> {
    FolderLock::take(folder).map_err(|error| match error {
        ArtifactError::Busy { .. } => format!("{error}; wait for it, or give another --out").into(),
        other => other.into(),
    })
}

/// The base's tokenizer.
pub(super) fn tokenizer(base: &Base) -> Result<Tokenizer, Failure> {
    let tokenizer = match &base.tokenizer {
        TokenizerSource::HuggingFace { tokenizer_json, bos, eos, added, .. } => {
            Tokenizer::from_files(tokenizer_json, added.clone(), bos.as_deref(), eos.as_deref())?
        }
        TokenizerSource::Gguf(vocabulary) => {
            Tokenizer::from_vocabulary(vocabulary_parts(vocabulary.clone()))?
        }
    };
    Ok(tokenizer)
}

/// The base's chat template.
///
/// # Errors
/// It has none, or one that does not parse: all but chat works without.
pub(super) fn chat_template(base: &Base, tokenizer: &Tokenizer) -> Result<ChatTemplate, ChatError> {
    let source = match &base.tokenizer {
        TokenizerSource::HuggingFace { chat_template, .. } => chat_template,
        TokenizerSource::Gguf(vocabulary) => &vocabulary.chat_template,
    };
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or_default();
    let source = source.as_ref().ok_or(ChatError::Missing)?;
    ChatTemplate::new(source, &text(tokenizer.bos()), &text(tokenizer.eos()))
}

/// The tokens that end a text: the base's own and the tokenizer's.
pub(super) fn end_tokens(base: &Base, tokenizer: &Tokenizer) -> Vec<u32> {
    let mut ends = base.config.eos_tokens.clone();
    ends.extend(tokenizer.eos());
    ends.sort_unstable();
    ends.dedup();
    ends
}

/// How `bench` names this machine and `serve` finds its measurements again: processor and cores.
pub(super) fn machine(named: Option<&String>) -> String {
    let processor = || {
        let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
        let line = text.lines().find(|l| l.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_string())
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let own = || format!("{} x{cores}", processor().unwrap_or_else(|| std::env::consts::ARCH.into()));
    named.cloned().unwrap_or_else(own)
}

/// The name of a path's last part, for messages and for a new model.
pub(super) fn name_of(path: &Path) -> String {
    path.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned())
}
