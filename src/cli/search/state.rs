//! What a search keeps on disk while it runs: everything that it needs to go on, in one file that is replaced whole.

use super::cost::CostModel;
use super::scores::Scores;
use super::{Objective, SAMPLE_SEED, SearchArgs};
use crate::artifact::{read_json, sha256_of_file, write_whole};
use crate::cli::Failure;
use crate::cli::open::{self, Opened};
use crate::cli::tasks::Task;
use crate::search::{Genome, Search, Settings};
use crate::supernet::SearchSpace;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

const FILE: &str = "state.json";
const VERSION: u32 = 1;

/// A search, what it is made of, and what was scored so far.
pub(super) struct State {
    folder: PathBuf,
    made_of: Vec<(String, String)>,
    pub(super) costs: Option<CostModel>,
    pub(super) search: Search,
    scored: Vec<(Genome, Scores)>,
    /// Into `scored`.
    places: HashMap<Genome, usize>,
}

#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    made_of: &'a [(String, String)],
    costs: &'a Option<CostModel>,
    search: &'a Search,
    scored: &'a [(Genome, Scores)],
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Read {
    version: u32,
    made_of: Vec<(String, String)>,
    costs: Option<CostModel>,
    search: Search,
    scored: Vec<(Genome, Scores)>,
}

/// Everything that decides how a search ends, by the option that people would change.
pub(super) fn made_of(
    args: &SearchArgs,
    settings: &Settings,
    opened: &Opened,
    tasks: &[Task],
) -> Result<Vec<(String, String)>, Failure> {
    let model = opened.models.first().ok_or("no model")?;
    let adapter = sha256_of_file(&model.folder.path().join("adapter_model.safetensors"))?;
    let base = opened.base.sha256()?;
    let digest = |text: String| Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect::<String>();
    let names = tasks.iter().map(|t| t.name.as_str()).collect::<Vec<_>>().join(" ");
    let items = tasks.iter().map(|t| format!("{:?}", t.items)).collect::<Vec<_>>();
    let objective = if args.objective == Objective::Accuracy { "accuracy" } else { "loss" };
    let made_of = [
        ("the super-network", digest(format!("{base} {adapter} {:?} {}", model.space, opened.orders.told()))),
        ("the base's configuration or tokenizer", opened.base.settings_sha256()?),
        ("--task", names),
        ("--samples", args.samples.to_string()),
        ("the tasks' items", format!("{} {SAMPLE_SEED}", digest(items.concat()))),
        ("--objective", objective.into()),
        ("--cost", args.cost.label().into()),
        ("--evaluations", settings.evaluations.to_string()),
        ("--population", settings.population.to_string()),
        ("--seed", settings.seed.to_string()),
        ("--faithful", args.faithful.to_string()),
        ("--device", args.compute.device_name()?.into()),
        ("--dtype or --kv-dtype", args.compute.numbers()?),
    ];
    let mut made_of = made_of.map(|(name, value)| (name.to_string(), value)).to_vec();
    if args.cost.is_measured() {
        made_of.push(("the machine".into(), open::machine(None)));
    }
    Ok(made_of)
}

impl State {
    /// The search that `folder` holds, or a fresh one.
    ///
    /// # Errors
    /// A state that is damaged or belongs to another search, unless it is to be overwritten.
    pub(super) fn open(
        folder: &Path,
        overwrite: bool,
        made_of: Vec<(String, String)>,
        fresh: Search,
        space: &SearchSpace,
        settings: &Settings,
    ) -> Result<Self, Failure> {
        let path = folder.join(FILE);
        let folder = folder.to_path_buf();
        if overwrite || !path.exists() {
            return Ok(Self {
                folder,
                made_of,
                costs: None,
                search: fresh,
                scored: Vec::new(),
                places: HashMap::new(),
            });
        }
        let named =
            |reason: String| format!("{}: {reason}; give another --out, or --overwrite", path.display());
        let read: Read = read_json(&path).map_err(|e| format!("{e}; give another --out, or --overwrite"))?;
        if read.version != VERSION {
            return Err(
                named(format!("version {} is not supported; supported: {VERSION}", read.version)).into()
            );
        }
        if read.made_of != made_of {
            let differs = made_of.iter().find(|now| !read.made_of.contains(now));
            let differs = differs.map_or("its arguments differ".into(), |(name, now)| {
                let then = read.made_of.iter().find(|(other, _)| other == name).map(|(_, then)| then);
                match then {
                    // Digests say nothing to people.
                    Some(then) if now.len().max(then.len()) < 64 => format!("{name} was {then}, not {now}"),
                    _ => format!("{name}: not the same"),
                }
            });
            return Err(named(format!("it is another search's: {differs}")).into());
        }
        let search = read.search.restored(space, settings).map_err(|e| named(e.to_string()))?;
        let places = read.scored.iter().enumerate().map(|(i, (genome, _))| (genome.clone(), i)).collect();
        let done = search.evaluations().len();
        tracing::info!("going on after {done} of {} sub-networks", search.total());
        Ok(Self { folder, made_of, costs: read.costs, search, scored: read.scored, places })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn scores(&self, genome: &Genome) -> Option<&Scores> {
        self.places.get(genome).and_then(|&i| self.scored.get(i)).map(|(_, scores)| scores)
    }

    pub(super) fn remember(&mut self, genome: &Genome, scores: Scores) {
        self.places.insert(genome.clone(), self.scored.len());
        self.scored.push((genome.clone(), scores));
    }

    /// Replaces the file, so that a kill at any moment leaves the old one or the new one.
    pub(super) fn save(&self) -> Result<(), Failure> {
        std::fs::create_dir_all(&self.folder).map_err(|e| format!("{}: {e}", self.folder.display()))?;
        let Self { made_of, costs, search, scored, .. } = self;
        let text = serde_json::to_vec(&Written { version: VERSION, made_of, costs, search, scored })?;
        Ok(write_whole(&self.folder.join(FILE), &text)?)
    }
}
