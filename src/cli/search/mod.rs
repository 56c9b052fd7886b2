//! `lonas search`: arguments, the loop of asking, scoring and telling, what is left at the end.

mod cost;
mod files;
mod latency;
mod point;
mod register;
mod report;
mod scores;
mod state;

use super::Failure;
use super::compute::ComputeArgs;
use super::open::{self, BaseArg, Opened};
use super::progress::Progress;
use super::tasks::{POOL_TOKENS, Task};
use crate::data;
use crate::search::{Evaluation, Genome, Method, Search, Settings};
use clap::Args;
use cost::{Cost, CostModel};
use point::Named;
use register::Registrar;
use scores::{Scorer, Scores};
use state::State;
use std::path::PathBuf;

/// Search for sub-networks that no other is both cheaper and better than.
///
/// Scores sub-networks on a sample of multiple-choice questions, as `lonas eval` does, many of them in one batch. What is
/// left is a front: its sub-networks by cost, as JSON, table and picture; with `--name` into the catalog, from where they are
/// served. Run again with the same arguments after an interruption, it goes on where it was.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  lonas search models/mine --task dev=dev.json --name good=best\n  \
    lonas search models/mine --task dev=dev.json --cost decode --objective loss --name fast=0.8\n  \
    LONAS_ADMIN_KEY=secret lonas search models/mine --task dev=dev.json --name good=best \\\n    \
    --register http://127.0.0.1:8080\n  \
    lonas search models/mine --task dev=dev.json --faithful --evaluations 200 --population 8")]
pub(super) struct SearchArgs {
    /// The model folder.
    #[arg(default_value = super::DEFAULT_MODEL, value_name = "DIR")]
    model: PathBuf,

    /// A task: its name and a JSON array of {instruction, input, output, answer}. Use other items than you will report on.
    #[arg(long, required = true, num_args = 1.., value_name = "NAME=FILE")]
    task: Vec<String>,

    /// What makes a sub-network good, as the mean over tasks: the share of right answers, or the loss of the right ones'
    /// tokens, which tells more from the same number of questions.
    #[arg(long, value_enum, default_value_t = Objective::Accuracy)]
    objective: Objective,

    /// What makes it cheap: MACs of 256 tokens or weights by LoNAS's rule, or milliseconds for each token on this machine, of
    /// a prompt or generated. The last two are measured of some sub-networks first and worked out for the others.
    #[arg(long, value_enum, default_value_t = Cost::Macs)]
    cost: Cost,

    /// Sub-networks to score.
    #[arg(long, default_value_t = 200, value_name = "N")]
    evaluations: usize,

    /// Sub-networks of one generation; without it 10, and 8 for --faithful.
    #[arg(long, value_name = "N")]
    population: Option<usize>,

    /// Questions of each task, chosen at random but the same ones for every search.
    #[arg(long, default_value_t = 200, value_name = "N")]
    samples: usize,

    /// Decides what is random.
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Search as LoNAS's own scripts do (NSGA-II by NNCF and pymoo), with their numbers. The default begins with sub-networks
    /// of every size and scores what it expects to be better than what it knows.
    #[arg(long)]
    faithful: bool,

    /// What `best` is measured by; without it, the accuracy of `maximal` on the same questions.
    #[arg(long, value_name = "SHARE")]
    reference_accuracy: Option<f64>,

    /// `best` is the cheapest sub-network whose accuracy lies less than this below the reference.
    #[arg(long, default_value_t = 0.01, value_name = "SHARE")]
    accuracy_delta: f64,

    /// Put a sub-network into the catalog under a name. POINT is `best`; or a cost like `0.8`, for the best one that costs at
    /// most this part of `maximal`; or a line of the front, from 0.
    #[arg(long, num_args = 1.., value_name = "NAME=POINT")]
    name: Vec<String>,

    /// Also register what --name names with a server that runs, e.g. http://127.0.0.1:8080: it can be asked for at once.
    #[arg(long, value_name = "URL")]
    register: Option<String>,

    /// An admin key of that server.
    #[arg(long, env = "LONAS_ADMIN_KEY", hide_env_values = true, value_delimiter = ',', value_name = "KEY")]
    admin_key: Vec<String>,

    /// Where the search keeps its state and results; without it, `search` in the model folder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Begin anew where --out holds a search.
    #[arg(long)]
    overwrite: bool,

    #[command(flatten)]
    base: BaseArg,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// What is searched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Objective {
    Accuracy,
    Loss,
}

/// Sub-networks that are scored in the same batches, and so what a kill can cost.
const TOGETHER: usize = 8;

/// Of the sample: not the search's, so that searches by different seeds can be compared.
const SAMPLE_SEED: u64 = 0;

#[expect(clippy::print_stdout, reason = "the command's output")]
pub(super) fn run(args: &SearchArgs) -> Result<(), Failure> {
    let named = checked(args)?;
    let registrar = Registrar::new(args)?;
    let mut opened = open::models(std::slice::from_ref(&args.model), &args.base)?;
    let model = opened.models.first().ok_or("no model")?;
    let tokenizer = open::tokenizer(&opened.base)?;
    let read = |task: &String| Task::read(task, &tokenizer, None, opened.base.config.max_positions);
    let tasks = args.task.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let (tasks, whole) = sampled(args, tasks)?;
    named.iter().try_for_each(|n| n.check(&model.catalog))?;
    registrar.as_ref().map_or(Ok(()), |r| r.check(model))?;

    let settings = settings(args);
    let fresh = Search::new(&model.space, settings.clone())?;
    let out = args.out.clone().unwrap_or_else(|| model.folder.path().join("search"));
    let made_of = state::made_of(args, &settings, &opened, &tasks)?;
    let _lock = open::output(&out)?;
    let mut state = State::open(&out, args.overwrite, made_of, fresh, &model.space, &settings)?;
    let costs = match state.costs.take() {
        Some(costs) => costs,
        None => CostModel::new(args, &opened)?,
    };
    state.costs = Some(costs.clone());
    state.save()?;

    search(args, &opened, &tasks, &costs, &mut state)?;
    let found = report::Found::new(args, model, &tasks, &costs, &state)?;
    files::write(args, model, &found, &state)?;
    print!("{}", found.table());
    let entries = named.iter().map(|n| n.entry(&found)).collect::<Result<Vec<_>, _>>()?;
    if let Some(model) = opened.models.first_mut() {
        point::write(model, &entries, &tasks, &whole)?;
        registrar.map_or(Ok(()), |r| r.register(model, named.iter().map(Named::name)))?;
    }
    Ok(())
}

/// What can be said of the arguments alone.
fn checked(args: &SearchArgs) -> Result<Vec<Named>, Failure> {
    if args.compute.merge_adapter {
        return Err(
            "--merge-adapter: a search goes over ranks as well, and a merged adapter has all of them".into(),
        );
    }
    let named = args.name.iter().map(|n| Named::parse(n)).collect::<Result<Vec<_>, _>>()?;
    if args.samples == 0 {
        return Err("--samples: expected at least 1".into());
    }
    let loss = args.objective == Objective::Loss;
    if loss && (args.reference_accuracy.is_some() || named.iter().any(Named::is_best)) {
        return Err(
            "--objective loss: `best` and --reference-accuracy go by accuracy; name a cost like 0.8 instead"
                .into(),
        );
    }
    let share = |name: &str, value: f64| match (0.0..=1.0).contains(&value) {
        true => Ok(()),
        false => Err(format!("{name} {value}: expected a share from 0 to 1")),
    };
    share("--accuracy-delta", args.accuracy_delta)?;
    share("--reference-accuracy", args.reference_accuracy.unwrap_or(0.0))?;
    Ok(named)
}

fn settings(args: &SearchArgs) -> Settings {
    let (method, population) = if args.faithful { (Method::Faithful, 8) } else { (Method::Guided, 10) };
    let population = args.population.unwrap_or(population);
    Settings { method, evaluations: args.evaluations, population, seed: args.seed }
}

/// The sample of each task, and by task whether it is all of it.
fn sampled(args: &SearchArgs, tasks: Vec<Task>) -> Result<(Vec<Task>, Vec<bool>), Failure> {
    let mut names = tasks.iter().map(|t| t.name.as_str()).collect::<Vec<_>>();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
        return Err(format!("--task: two tasks are named `{}`", twice[0]).into());
    }
    let sample = |task: Task| {
        let whole = task.items.len() <= args.samples;
        let order = data::order(task.items.len(), 0, SAMPLE_SEED);
        let mut chosen = order.into_iter().take(args.samples).collect::<Vec<_>>();
        chosen.sort_unstable();
        let items = chosen.into_iter().map(|i| task.items[i].clone()).collect();
        (Task { name: task.name, items }, whole)
    };
    Ok(tasks.into_iter().map(sample).unzip())
}

/// Asks, scores and tells until the search is over.
fn search(
    args: &SearchArgs,
    opened: &Opened,
    tasks: &[Task],
    costs: &CostModel,
    state: &mut State,
) -> Result<(), Failure> {
    let model = opened.models.first().ok_or("no model")?;
    // Scored beside the search, as the authors' scripts do; `best` goes by the first.
    let always = [model.space.maximal(), model.space.heuristic(), model.space.minimal()];
    let always = always.map(|sub_network| Genome::of(&model.space, &sub_network));
    let known = |genome: &Genome| vec![Some(costs.of(model, genome)), None];
    let mut scorer: Option<Scorer<'_>> = None;
    let mut progress =
        Progress::new("sub-network", state.search.total() as u64, state.search.evaluations().len() as u64);
    let mut score = |state: &mut State, genomes: &[Genome]| -> Result<(), Failure> {
        let missing = genomes.iter().filter(|g| state.scores(g).is_none()).cloned().collect::<Vec<_>>();
        if missing.is_empty() {
            return Ok(());
        }
        // The model is loaded only where there is something left to score.
        let scorer = match &mut scorer {
            Some(scorer) => scorer,
            none => none.insert(Scorer::new(args.compute.executor(opened, POOL_TOKENS, 1)?, model, tasks)),
        };
        for (genome, scores) in missing.iter().zip(scorer.score(&missing)?) {
            state.remember(genome, scores);
        }
        state.save()
    };
    score(state, &always)?;
    loop {
        let asked = state.search.ask(&known);
        if asked.is_empty() {
            break;
        }
        for together in asked.chunks(TOGETHER) {
            score(state, together)?;
            for genome in together {
                let scores = state.scores(genome).ok_or("a genome was not scored")?;
                let objectives = vec![costs.of(model, genome), minimised(args.objective, scores)];
                state.search.tell(genome, objectives)?;
            }
            state.save()?;
            let front = crate::search::front(state.search.evaluations()).len();
            progress.set(state.search.evaluations().len() as u64, &format!("{front} on the front"));
        }
    }
    progress.finish();
    let (done, total) = (state.search.evaluations().len(), state.search.total());
    if done < total {
        tracing::warn!("the search found no more than {done} different sub-networks to score, of {total}");
    }
    Ok(())
}

/// The second objective.
fn minimised(objective: Objective, scores: &Scores) -> f64 {
    match objective {
        Objective::Accuracy => -scores.accuracy(),
        Objective::Loss => scores.loss(),
    }
}

/// Cost and score of an evaluation, both minimised.
fn objectives(evaluation: &Evaluation) -> [f64; 2] {
    [0, 1].map(|i| evaluation.objectives.get(i).copied().unwrap_or(f64::NAN))
}
