//! `lonas eval`: arguments; what is known already, what is left to compute, where results go.

mod ask;
mod protocol;
mod records;
mod report;
mod task;

pub(super) use protocol::check_usage;
pub(super) use report::rounded;

use super::Failure;
use super::compute::ComputeArgs;
use super::open::{self, BaseArg, Opened};
use super::progress::Progress;
use super::tasks::POOL_TOKENS;
use crate::artifact::sha256_of_file;
use crate::backend::Selection;
use crate::evaluate::Summary;
use crate::supernet::CatalogEntry;
use ask::{Alone, Asked, Asking, Pair};
use clap::Args;
use protocol::{Form, Method, Protocol, ProtocolArg};
use records::{Record, Records, key};
use report::Line;
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;
use task::{Task, hex};

/// Score sub-networks on tasks: accuracy by likelihood or by generation, or loss and perplexity.
///
/// All sub-networks are asked together, in mixed batches. By likelihood, the default, the likeliest option is the model's answer;
/// by generation, what a greedy text (or the best of several beams) names. Every item's result is kept in MODEL/eval.jsonl as
/// soon as it is there, so that a killed evaluation goes on where it was, and results over whole files go into the model
/// folder's catalog.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  lonas eval models/mine --task arc-easy=ARC-Easy.json --subnetwork minimal\n  \
    lonas eval models/mine --task boolq=boolq.json --method generation --form lonas\n  \
    lonas eval models/mine --task dev=dev.json --method loss --limit 200 --json\n  \
    lonas eval models/mine --task boolq=boolq.json piqa=piqa.json --protocol lonas\n  \
    lonas eval models/bert-rte --task rte=dev.tsv"
)]
pub(super) struct EvalArgs {
    /// The model folder.
    #[arg(default_value = super::DEFAULT_MODEL, value_name = "DIR")]
    model: PathBuf,

    /// A task: its name and a JSON array of {instruction, input, output, answer}, as LLM-Adapters and LoNAS have them, or of
    /// {question, choices, answer}, where the answer is a choice's text or its number from 0. For a classifier, GLUE's files: JSON,
    /// JSON lines or .tsv with sentence, sentence1 and sentence2, premise and hypothesis ..., and a label's name or number.
    #[arg(long, required = true, num_args = 1.., value_name = "NAME=FILE")]
    task: Vec<String>,

    /// Sub-networks to score; without it, all of the catalog.
    #[arg(long, num_args = 1.., value_name = "NAME")]
    subnetwork: Vec<String>,

    /// What is measured; without it, likelihood, or classification of a model that classifies.
    #[arg(long, value_enum)]
    method: Option<Method>,

    /// How items become text: as the super-adapter was trained (`lonas train --form`).
    #[arg(long, value_enum, default_value_t = Form::Short)]
    form: Form,

    /// Beams of a generation; 1 is greedy. More is beam search as transformers 4.31 does it.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16), value_name = "N")]
    beams: u16,

    /// Tokens that a generation may have.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=2048), value_name = "N")]
    max_new_tokens: u16,

    /// Tokens of a text that is classified, or of a pair; what is longer is cut, of a pair the longer text first.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u16).range(3..), value_name = "N")]
    max_text_tokens: u16,

    /// Generate as LoNAS's own scripts do: `lonas` as that for commonsense tasks (its test template, 24 spaces where training has 20;
    /// four beams, 32 new tokens), `lonas-math` as that for math (28 spaces, 256 new tokens; the last number is the answer, or AQuA's
    /// letter).
    #[arg(long, value_enum, conflicts_with_all = ["method", "form", "beams", "max_new_tokens"])]
    protocol: Option<ProtocolArg>,

    /// Score the first N items of each task only; the catalog stays as it is.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,

    /// Leave the super-adapter out: the base alone, cut to the same widths. The catalog stays as it is.
    #[arg(long, conflicts_with = "merge_adapter")]
    without_adapter: bool,

    /// Write nothing into the model folder. Items' results are kept only where --records says, the catalog stays as it is.
    #[arg(long)]
    dry_run: bool,

    /// Where every item's result is kept, one JSON object a line; without it, eval.jsonl in the model folder.
    #[arg(long, value_name = "FILE")]
    records: Option<PathBuf>,

    /// Print JSON.
    #[arg(long)]
    json: bool,

    /// One sub-network at a time, one question or one question with one option at a time: to measure what mixing is worth.
    #[arg(long, value_enum, hide = true)]
    one_at_a_time: Option<Alone>,

    #[command(flatten)]
    base: BaseArg,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// A sub-network that is scored.
struct Scored {
    name: String,
    selection: Selection,
    /// The key of what its results come from.
    of: String,
}

pub(super) fn run(args: &EvalArgs) -> Result<(), Failure> {
    let mut opened = open::models(std::slice::from_ref(&args.model), &args.base)?;
    let classifier = opened.models.first().and_then(|model| model.classifier.clone());
    let protocol = Protocol::of(args, classifier.is_some());
    if classifier.is_some() && protocol.method != Method::Classification {
        return Err(format!("--method {}: the model classifies texts", protocol.method_name()).into());
    }
    let tokenizer = open::tokenizer(&opened.base)?;
    let selections = chosen(args, &opened)?;
    let of_model = (&opened.base.config, classifier.as_ref());
    let read = |task: &String| Task::read(task, protocol, &tokenizer, args.limit, of_model);
    // All of them are read before the first is scored, which can take an hour.
    let tasks = args.task.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let mut names = tasks.iter().map(|t| t.name.as_str()).collect::<Vec<_>>();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
        return Err(format!("--task: two tasks are named `{}`", twice[0]).into());
    }
    let made_of = made_of(args, &opened, protocol)?;
    let (sub_networks, settings) = settings(&opened, &selections, &made_of)?;
    let default = opened.models.first().map(|m| m.folder.path().join("eval.jsonl")).filter(|_| !args.dry_run);
    let records = args.records.clone().or(default);
    let records = records.map_or_else(|| Ok(Records::none()), |path| Records::open(&path, &settings))?;
    let mut evaluation = Evaluated { args, protocol, tasks: &tasks, sub_networks: &sub_networks, records };
    let computed = evaluation.compute(&opened, &tokenizer)?;
    let lines = evaluation.lines()?;
    let text = if args.json {
        let head = json!({"model": made_of["model"], "computed": computed, "made_of": made_of});
        format!("{:#}\n", report::json(&lines, protocol, head))
    } else {
        report::table(&lines)
    };
    // This may have taken hours: neither a catalog that cannot be written nor a reader who has gone takes the other's.
    let printed = std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush());
    if !(args.without_adapter || args.dry_run || args.limit.is_some()) {
        save(args, &mut opened, protocol, &lines)?;
    }
    Ok(printed.map_err(|e| format!("standard output: {e}"))?)
}

/// Names and selections to score, in the catalog's order.
fn chosen(args: &EvalArgs, opened: &Opened) -> Result<Vec<(String, Selection)>, Failure> {
    let known = args.compute.selections(opened)?;
    let known = known.into_iter().map(|((_, name), selection)| (name, selection)).collect::<Vec<_>>();
    if let Some(unknown) = args.subnetwork.iter().find(|name| known.iter().all(|k| k.0 != **name)) {
        let names = known.iter().map(|k| k.0.as_str()).collect::<Vec<_>>().join(", ");
        return Err(format!("--subnetwork {unknown}: the catalog has {names}").into());
    }
    let wanted = known.into_iter().filter(|k| args.subnetwork.is_empty() || args.subnetwork.contains(&k.0));
    // Without a super-adapter of that number, only the base is left.
    let adapter = |of: usize| if args.without_adapter { usize::MAX } else { of };
    let chosen = wanted
        .map(|(name, selection)| (name, Selection { adapter: adapter(selection.adapter), ..selection }));
    Ok(chosen.collect())
}

/// Everything but sub-network and item that decides a result.
fn made_of(args: &EvalArgs, opened: &Opened, protocol: Protocol) -> Result<Value, Failure> {
    let model = opened.models.first().ok_or("no model")?;
    let adapter = match args.without_adapter {
        true => None,
        false => Some(sha256_of_file(&model.folder.path().join("adapter_model.safetensors"))?),
    };
    let mut made_of = json!({
        "model": model.folder.name,
        "base_sha256": opened.base.sha256()?,
        "base_config_sha256": hex(&format!("{} {:?}", opened.base.settings_sha256()?, model.classifier)),
        "adapter_sha256": adapter,
        "scale": model.folder.adapter_config.scale(),
        "orders_sha256": hex(&opened.orders.told()),
        "device": args.compute.device_name()?,
        "numbers": args.compute.numbers()?,
        "method": protocol.method_name(),
        "form": protocol.form_name(),
    });
    if protocol.method == Method::Generation {
        made_of["beams"] = protocol.beams.into();
        made_of["max_new_tokens"] = protocol.max_new_tokens.into();
    }
    Ok(made_of)
}

/// What a result was made of, and the key of it.
type Setting = (String, Value);

/// The sub-networks with the keys of their settings, and those settings.
fn settings(
    opened: &Opened,
    selections: &[(String, Selection)],
    made_of: &Value,
) -> Result<(Vec<Scored>, Vec<Setting>), Failure> {
    let model = opened.models.first().ok_or("no model")?;
    let setting = |(name, selection): &(String, Selection)| -> Result<(Scored, Setting), Failure> {
        let entry = model.catalog.get(name).ok_or("the catalog lost a sub-network")?;
        let mut setting = made_of.clone();
        // Not what the model is called, but what it is.
        setting.as_object_mut().map(|fields| fields.shift_remove("model"));
        setting["choices"] = entry.sub_network.choices().into();
        let of = key(&hex(&setting.to_string()));
        Ok((Scored { name: name.clone(), selection: selection.clone(), of: of.clone() }, (of, setting)))
    };
    let all = selections.iter().map(setting).collect::<Result<Vec<_>, _>>()?;
    Ok(all.into_iter().unzip())
}

/// An evaluation on its way.
struct Evaluated<'a> {
    args: &'a EvalArgs,
    protocol: Protocol,
    tasks: &'a [Task],
    sub_networks: &'a [Scored],
    records: Records,
}

impl Evaluated<'_> {
    /// Computes what is not known yet, and says how many results that were. The model is loaded only where something is.
    fn compute(&mut self, opened: &Opened, tokenizer: &crate::text::Tokenizer) -> Result<usize, Failure> {
        let pairs = self.tasks.iter().map(|task| self.missing(task)).collect::<Vec<_>>();
        let missing = pairs.iter().map(Vec::len).sum::<usize>();
        let all = self.tasks.iter().map(|t| t.asks.len()).sum::<usize>() * self.sub_networks.len();
        if missing < all {
            tracing::info!("{} of {all} results are known already", all - missing);
        }
        if missing == 0 {
            return Ok(0);
        }
        let compute = &self.args.compute;
        let mut model = match self.protocol.method {
            Method::Classification => Asked::Classifies(compute.classifier(opened)?),
            _ => Asked::Continues(compute.executor(opened, POOL_TOKENS, self.protocol.block_size())?),
        };
        let selections = self.sub_networks.iter().map(|s| s.selection.clone()).collect::<Vec<_>>();
        let asking = Asking {
            tokenizer,
            protocol: self.protocol,
            selections: &selections,
            ends: open::end_tokens(&opened.base, tokenizer),
            alone: self.args.one_at_a_time,
        };
        let (began, mut done) = (Instant::now(), all - missing);
        let mut progress = Progress::new("question", all as u64, done as u64);
        for (task, pairs) in self.tasks.iter().zip(&pairs) {
            self.compute_task(&mut model, &asking, task, pairs, |count| {
                done += count;
                progress.set(done as u64, &task.name);
            })?;
        }
        progress.finish();
        let seconds = began.elapsed().as_secs_f64();
        tracing::info!("{missing} results in {seconds:.1} s, {:.2} a second", missing as f64 / seconds);
        Ok(missing)
    }

    /// Items that are not known, each under all sub-networks before the next one.
    fn missing(&self, task: &Task) -> Vec<Pair> {
        let of_ask = |ask: usize| (0..self.sub_networks.len()).map(move |selection| (ask, selection));
        let all = (0..task.asks.len()).flat_map(of_ask);
        let unknown = |&(ask, selection): &Pair| {
            let of = &self.sub_networks[selection].of;
            self.records.get(of, &key(&task.asks[ask].sha256)).is_none()
        };
        let mut missing = all.filter(unknown).collect::<Vec<_>>();
        if self.args.one_at_a_time.is_some() {
            missing.sort_by_key(|&(ask, selection)| (selection, ask));
        }
        missing
    }

    fn compute_task(
        &mut self,
        model: &mut Asked,
        asking: &Asking<'_>,
        task: &Task,
        pairs: &[Pair],
        mut progress: impl FnMut(usize),
    ) -> Result<(), Failure> {
        let (records, sub_networks) = (&mut self.records, self.sub_networks);
        asking.ask(model, &task.asks, pairs, |outcomes| {
            let count = outcomes.len();
            let record = |(i, outcome)| {
                let (ask, selection): Pair = pairs[i];
                let (ask, sub_network) = (&task.asks[ask], &sub_networks[selection]);
                Record {
                    of: sub_network.of.clone(),
                    item: key(&ask.sha256),
                    task: task.name.clone(),
                    index: ask.index,
                    subnetwork: sub_network.name.clone(),
                    outcome,
                }
            };
            let new = outcomes.into_iter().map(record).collect::<Vec<_>>();
            if let Some(bad) = new.iter().find(|r| !r.outcome.is_sound()) {
                let (index, name) = (bad.index, &bad.subnetwork);
                let path = task.path.display();
                return Err(format!("{path}: item {index}: under `{name}` a result is no number").into());
            }
            records.add(new)?;
            progress(count);
            Ok(())
        })
    }

    /// What it all comes to, task by task.
    fn lines(&self) -> Result<Vec<Line>, Failure> {
        let pairs = self.tasks.iter().flat_map(|task| self.sub_networks.iter().map(move |s| (task, s)));
        let line = |(task, sub_network): (&Task, &Scored)| {
            let outcomes =
                task.asks.iter().filter_map(|a| self.records.get(&sub_network.of, &key(&a.sha256)));
            let summary = Summary::of(outcomes).ok_or("nothing was computed")?;
            Ok(Line::new(task, &sub_network.name, summary))
        };
        pairs.map(line).collect()
    }
}

/// Puts the results into the catalog, all or none. Accuracy by likelihood or of a classifier is also what `min_accuracy` of a request goes by.
fn save(args: &EvalArgs, opened: &mut Opened, protocol: Protocol, lines: &[Line]) -> Result<(), Failure> {
    let numbers = format!("{}, {}", args.compute.device_name()?, args.compute.numbers()?);
    let model = opened.models.first_mut().ok_or("no model")?;
    let learnt = |line: &Line| {
        let (evaluation, task) = (line.evaluation(protocol, &numbers), line.task.clone());
        // A request's `min_accuracy` goes by these, so they are accuracies.
        let scores = matches!(protocol.method, Method::Likelihood | Method::Classification)
            && line.summary.metric == "accuracy";
        let score = scores.then(|| rounded(line.summary.value));
        let learn = move |entry: &mut CatalogEntry| {
            entry.record(evaluation);
            entry.scores.extend(score.map(|score| (task, score)));
        };
        (line.subnetwork.clone(), learn)
    };
    model.learn(lines.iter().map(learnt))
}
