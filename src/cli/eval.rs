//! `lonas eval`

use super::Failure;
use super::compute::ComputeArgs;
use super::open::{self, BaseArg};
use super::progress::Progress;
use super::tasks::{POOL_TOKENS, Task};
use crate::backend::Selection;
use crate::evaluate::{Score, multiple_choice};
use clap::Args;
use std::path::PathBuf;

/// Score sub-networks on multiple-choice tasks by the likelihood of each answer's text.
///
/// Each option is scored as it follows `Question: ...` and `Answer:`; the likeliest is the model's answer. Results go
/// into the model folder's catalog.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  lonas eval models/mine --task arc-easy=ARC-Easy.json --subnetwork minimal"
)]
pub(super) struct EvalArgs {
    /// The model folder.
    #[arg(default_value = super::DEFAULT_MODEL, value_name = "DIR")]
    model: PathBuf,

    /// A task: its name and a JSON array of {instruction, input, output, answer}.
    #[arg(long, required = true, num_args = 1.., value_name = "NAME=FILE")]
    task: Vec<String>,

    /// Sub-networks to score; without it, all of the catalog.
    #[arg(long, num_args = 1.., value_name = "NAME")]
    subnetwork: Vec<String>,

    /// Score the first N items of each task only; nothing is written.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,

    /// Leave the super-adapter out: the base alone, cut to the same widths. Nothing is written.
    #[arg(long)]
    without_adapter: bool,

    /// Print the results and leave the catalog as it is.
    #[arg(long)]
    dry_run: bool,

    /// Print JSON.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    base: BaseArg,

    #[command(flatten)]
    compute: ComputeArgs,
}

#[expect(clippy::print_stdout, reason = "the command's output")]
pub(super) fn run(args: &EvalArgs) -> Result<(), Failure> {
    if args.compute.merge_adapter && args.without_adapter {
        return Err("--merge-adapter does not go with --without-adapter".into());
    }
    let mut opened = open::models(std::slice::from_ref(&args.model), &args.base)?;
    let tokenizer = open::tokenizer(&opened.base)?;
    // Blocks of one position: the options of a question share all of its context.
    let mut executor = args.compute.executor(&opened, POOL_TOKENS, 1)?;
    let mut selections = args.compute.selections(&opened)?;
    let names = names(args, &selections)?;
    selections.retain(|(entry, _)| names.contains(&entry.1));
    let chosen = selections.iter().map(|(_, selection)| Selection {
        // Without a super-adapter of that number, only the base is left.
        adapter: if args.without_adapter { usize::MAX } else { selection.adapter },
        ..selection.clone()
    });
    let chosen = chosen.collect::<Vec<_>>();
    let task = |task: &String| Task::read(task, &tokenizer, args.limit, opened.base.config.max_positions);
    // All of them are read before the first is scored, which can take an hour.
    let tasks = args.task.iter().map(task).collect::<Result<Vec<_>, _>>()?;
    let written = !args.without_adapter && !args.dry_run && args.limit.is_none();
    let mut results = Vec::new();
    for Task { name, items } in &tasks {
        let texts = items.iter().map(|i| i.options.len()).sum::<usize>() * chosen.len();
        let mut progress = Progress::new("text", texts as u64, 0);
        let scores = multiple_choice(&mut *executor, items, &chosen, |done| progress.set(done as u64, name))?;
        progress.finish();
        results.extend(
            names.iter().cloned().zip(scores).map(|(subnetwork, score)| (name.clone(), subnetwork, score)),
        );
        if written {
            save(&mut opened, &results)?;
        }
    }
    if args.json {
        println!("{:#}", json(&results));
    } else {
        print!("{}", table(&results));
    }
    Ok(())
}

/// Puts what is known so far into the catalog.
fn save(opened: &mut open::Opened, results: &[(String, String, Score)]) -> Result<(), Failure> {
    let model = opened.models.first_mut().ok_or("no model")?;
    for (task, subnetwork, score) in results {
        if let Some(entry) = model.catalog.get_mut(subnetwork) {
            entry.scores.insert(task.clone(), rounded(score.accuracy.share()));
        }
    }
    Ok(model.folder.write_catalog(&model.catalog)?)
}

/// The names to score, in the catalog's order.
fn names(args: &EvalArgs, selections: &[open::Named]) -> Result<Vec<String>, Failure> {
    let known = selections.iter().map(|((_, name), _)| name.clone()).collect::<Vec<_>>();
    if let Some(unknown) = args.subnetwork.iter().find(|n| !known.contains(n)) {
        return Err(format!("--subnetwork {unknown}: the catalog has {}", known.join(", ")).into());
    }
    let wanted = |n: &String| args.subnetwork.is_empty() || args.subnetwork.contains(n);
    Ok(known.into_iter().filter(wanted).collect())
}

/// To the four digits that a test set of some thousand items can tell.
pub(super) fn rounded(share: f64) -> f64 {
    (share * 1e4).round() / 1e4
}

fn table(results: &[(String, String, Score)]) -> String {
    let head = format!(
        "{:<16} {:<12} {:>9} {:>15} {:>11} {:>12} {:>6}\n",
        "task", "sub-network", "accuracy", "95 % interval", "normalised", "answer loss", "items"
    );
    let line = |(task, subnetwork, score): &(String, String, Score)| {
        let (low, high) = score.accuracy.interval();
        format!(
            "{task:<16} {subnetwork:<12} {:>8.1}% {:>15} {:>10.1}% {:>12.4} {:>6}\n",
            100.0 * score.accuracy.share(),
            format!("{:.1}..{:.1}%", 100.0 * low, 100.0 * high),
            100.0 * score.accuracy_normalised.share(),
            score.answer_loss,
            score.accuracy.count
        )
    };
    head + &results.iter().map(line).collect::<String>()
}

fn json(results: &[(String, String, Score)]) -> serde_json::Value {
    let entry = |(task, subnetwork, score): &(String, String, Score)| {
        let interval = score.accuracy.interval();
        serde_json::json!({ "task": task, "subnetwork": subnetwork, "score": score, "interval95": interval })
    };
    results.iter().map(entry).collect()
}
