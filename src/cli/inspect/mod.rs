//! `lonas inspect`

mod order;

use crate::artifact::ClassifierConfig;
use crate::cli::Failure;
use crate::cli::open::{self, BaseArg};
use crate::supernet::{CatalogEntry, Group, Kind, SearchSpace};
use clap::Args;
use std::path::PathBuf;

/// Show a super-network's groups, sub-networks, parameters and MACs.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lonas inspect models/smollm2-135m-commonsense")]
pub(super) struct InspectArgs {
    /// The model folder.
    #[arg(default_value = crate::cli::DEFAULT_MODEL, value_name = "DIR")]
    model: PathBuf,

    #[command(flatten)]
    base: BaseArg,

    /// Print JSON.
    #[arg(long)]
    json: bool,

    /// Look whether the super-adapter's tensors were trained in the order of the choices: how large they are on average in
    /// each block of rows or columns between two neighbouring choices. Reads the adapter.
    #[arg(long)]
    check_order: bool,
}

#[expect(clippy::print_stdout, reason = "the command's output")]
pub(super) fn run(args: &InspectArgs) -> Result<(), Failure> {
    let opened = open::models(std::slice::from_ref(&args.model), &args.base)?;
    for model in &opened.models {
        let tables = if args.check_order { Some(order::tables(model)?) } else { None };
        if args.json {
            let mut json = json(model);
            if let Some(tables) = &tables {
                json["order"] = order::json(tables);
            }
            println!("{json:#}");
            continue;
        }
        let config = &opened.base.config;
        println!("{}", model.folder.name);
        println!(
            "  base       {} ({} layers, hidden {})",
            opened.base.path().display(),
            config.layers,
            config.hidden
        );
        let adapter = &model.folder.adapter_config;
        println!(
            "  adapter    rank {}, alpha {}, on {}",
            adapter.rank,
            adapter.alpha,
            adapter.target_modules.join(", ")
        );
        if let Some(classifier) = &model.classifier {
            println!("  labels     {}", labels(classifier));
        }
        let order = if opened.orders.is_empty() { "the base's own" } else { "by importance (supernet.json)" };
        println!("  order      {order}");
        println!(
            "  space      {} groups, 10^{:.1} sub-networks",
            model.space.groups().len(),
            model.space.log10_size()
        );
        for line in group_lines(&model.space) {
            println!("    {line}");
        }
        println!("\n  {:<16} {:>12} {:>12}  merge  scores", "sub-network", "parameters", "MACs");
        for entry in model.catalog.entries() {
            let scores = entry.scores.iter().map(|(task, score)| format!("{task} {score:.3}"));
            let scores = scores.collect::<Vec<_>>().join(", ");
            let (parameters, macs) = (short(entry.cost.parameters), short(entry.cost.macs));
            let merge = if can_merge(model, entry) { "yes" } else { "no" };
            println!("  {:<16} {parameters:>12} {macs:>12}  {merge:<5}  {scores}", entry.name);
        }
        println!(
            "\n  Parameters are Linear weights with adapters; MACs are for {} tokens (LoNAS's rule); \
             merge: has all ranks, so `--merge-adapter` serves it.",
            model.shape.cost_tokens
        );
        if let Some(tables) = &tables {
            print!("{}", order::text(tables));
        }
    }
    Ok(())
}

/// Beyond so many their number says enough.
const LABELS_SHOWN: usize = 8;

fn labels(classifier: &ClassifierConfig) -> String {
    let all = &classifier.labels;
    let shown = all.iter().take(LABELS_SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = if all.len() > LABELS_SHOWN { format!(", ... ({} in all)", all.len()) } else { String::new() };
    match (classifier.regression, classifier.multi_label) {
        (true, _) => format!("{shown}{more} (a number, not a choice)"),
        (_, true) => format!("{shown}{more} (do not exclude each other)"),
        _ => format!("{shown}{more}"),
    }
}

/// Whether the super-adapter can be merged into the base for this sub-network.
fn can_merge(model: &open::OpenedModel, entry: &CatalogEntry) -> bool {
    model.shape.keeps_ranks(&model.space.resolve(&model.shape, &entry.sub_network))
}

/// Equal groups of different layers on one line.
pub(super) fn group_lines(space: &SearchSpace) -> Vec<String> {
    let mut kinds: Vec<(&Group, usize)> = Vec::new();
    for group in space.groups() {
        let same = |(g, _): &&mut (&Group, usize)| {
            (g.kind, &g.choices, g.members.len()) == (group.kind, &group.choices, group.members.len())
        };
        match kinds.iter_mut().find(same) {
            Some((_, count)) => *count += 1,
            None => kinds.push((group, 1)),
        }
    }
    let name = |kind| match kind {
        Kind::Rank => "rank",
        Kind::Width => "width",
        Kind::Heads => "heads",
    };
    let line = |(group, count): (&Group, usize)| {
        let members = group.members.len();
        format!("{count} x {} of {members} tensors: {:?}", name(group.kind), group.choices)
    };
    kinds.into_iter().map(line).collect()
}

fn json(model: &open::OpenedModel) -> serde_json::Value {
    let entries = model.catalog.entries().iter().map(|e| {
        let choices = e.sub_network.choices();
        serde_json::json!({ "name": e.name, "cost": e.cost, "choices": choices, "can_merge": can_merge(model, e), "scores": e.scores, "evaluations": e.evaluations, "latency": e.latency })
    });
    serde_json::json!({
        "name": model.folder.name,
        "labels": model.classifier.as_ref().map(|c| &c.labels),
        "groups": model.space.groups().len(),
        "log10_sub_networks": model.space.log10_size(),
        "sub_networks": entries.collect::<Vec<_>>(),
    })
}

/// 143123456 as `143.1M`.
fn short(number: u64) -> String {
    let number = number as f64;
    let unit =
        [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")].into_iter().find(|(size, _)| number >= *size);
    unit.map_or(format!("{number}"), |(size, unit)| format!("{:.1}{unit}", number / size))
}
