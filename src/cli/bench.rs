//! `lonas bench`

use super::Failure;
use super::open::{self, BaseArg, ComputeArgs};
use crate::backend::{Segment, Selection, SequenceSpan};
use crate::model::{Batch, Executor};
use crate::plot::{self, Point, Series};
use crate::supernet::Latency;
use clap::Args;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

/// Measure latency and throughput of each sub-network on this machine.
///
/// Sub-networks take turns within each round, so that a machine whose speed drifts favours none; the median of the
/// rounds counts. With --save, the latencies go into the catalog and a plot of accuracy over latency into the folder.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lonas bench models/mine --rounds 9 --save")]
pub(super) struct BenchArgs {
    /// The model folder.
    #[arg(default_value = super::DEFAULT_MODEL, value_name = "DIR")]
    model: PathBuf,

    /// Rounds that count; the first, which warms up, does not.
    #[arg(long, default_value_t = 5)]
    rounds: usize,

    /// Tokens of a prompt.
    #[arg(long, default_value_t = 256)]
    prompt: usize,

    /// Tokens to generate after it.
    #[arg(long, default_value_t = 64)]
    output: usize,

    /// Streams that decode together in the batched measurement.
    #[arg(long, default_value_t = 8)]
    streams: usize,

    /// Write latencies into the catalog and `accuracy-latency.svg` into the model folder.
    #[arg(long)]
    save: bool,

    /// How this machine is called in the catalog; by default its processor and cores.
    #[arg(long, env = "LONAS_MACHINE", value_name = "NAME")]
    machine: Option<String>,

    #[command(flatten)]
    base: BaseArg,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// Tokens per second of one sub-network, one number a round.
#[derive(Default, Clone)]
struct Rates {
    prefill: Vec<f64>,
    decode: Vec<f64>,
    batched: Vec<f64>,
}

#[expect(clippy::print_stdout, reason = "the command's output")]
pub(super) fn run(args: &BenchArgs) -> Result<(), Failure> {
    if args.rounds == 0 || args.prompt == 0 || args.output == 0 || args.streams == 0 {
        return Err("--rounds, --prompt, --output and --streams must be at least 1".into());
    }
    let began = Instant::now();
    let mut opened = open::models(std::slice::from_ref(&args.model), &args.base)?;
    let tokens = (args.prompt + args.output).next_multiple_of(16) * args.streams;
    let mut executor = args.compute.executor(&opened, tokens, open::BLOCK_SIZE)?;
    println!("loaded in {:.2} s; {}", began.elapsed().as_secs_f64(), args.compute.describe());
    let selections = open::selections(&opened);
    let mut rates = vec![Rates::default(); selections.len()];
    let mut mixed = Vec::new();
    let all = selections.iter().map(|(_, s)| s.clone()).collect::<Vec<_>>();
    // One round that does not count warms caches and clocks.
    for round in 0..=args.rounds {
        for (selection, rates) in all.iter().zip(&mut rates) {
            let one = measure(&mut *executor, args, std::slice::from_ref(selection), 1)?;
            let many = measure(&mut *executor, args, std::slice::from_ref(selection), args.streams)?;
            if round > 0 {
                rates.prefill.push(one.0);
                rates.decode.push(one.1);
                rates.batched.push(many.1);
            }
        }
        let rate = measure(&mut *executor, args, &all, args.streams)?.1;
        if round > 0 {
            mixed.push(rate);
        }
    }
    print!("{}", table(args, &selections, &rates, &mixed));
    if args.save {
        save(args, &mut opened, &rates)?;
    }
    Ok(())
}

/// Prefill and decode rates, tokens a second, of `streams` sequences that take turns through `selections`.
fn measure(
    executor: &mut dyn Executor,
    args: &BenchArgs,
    selections: &[Selection],
    streams: usize,
) -> Result<(f64, f64), Failure> {
    let blocks_each = (args.prompt + args.output).div_ceil(executor.block_size()) as u32;
    let step = |start: usize, tokens: usize| {
        let mut batch = Batch::default();
        // Streams of one sub-network stand together, as the engine would have them.
        let mut owners = (0..streams).map(|s| s % selections.len()).collect::<Vec<_>>();
        owners.sort_unstable();
        for (stream, owner) in owners.into_iter().enumerate() {
            let rows = batch.tokens.len()..batch.tokens.len() + tokens;
            let token = |i: usize| (1000 + (stream * 7919 + (start + i) * 104_729) % 40_000) as u32;
            let vocabulary = executor.vocabulary() as u32;
            batch.tokens.extend((0..tokens).map(|i| token(i) % vocabulary));
            batch.positions.extend((start..start + tokens).map(|p| p as u32));
            batch.outputs.push(rows.end as u32 - 1);
            let first = stream as u32 * blocks_each;
            let blocks = (first..first + blocks_each).collect();
            batch.spans.push(SequenceSpan { rows: rows.clone(), start, blocks });
            match batch.segments.last_mut() {
                Some(s) if s.selection == selections[owner] => s.rows.end = rows.end,
                _ => batch.segments.push(Segment { rows, selection: selections[owner].clone() }),
            }
        }
        batch
    };
    let (prefill, decode) = (step(0, args.prompt), (0..args.output).map(|i| step(args.prompt + i, 1)));
    let decode = decode.collect::<Vec<_>>();
    let began = Instant::now();
    executor.forward(&prefill)?;
    let prefilled = began.elapsed().as_secs_f64();
    let began = Instant::now();
    for batch in &decode {
        executor.forward(batch)?;
    }
    let decoded = began.elapsed().as_secs_f64();
    Ok(((args.prompt * streams) as f64 / prefilled, (args.output * streams) as f64 / decoded))
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn table(args: &BenchArgs, selections: &[open::Named], rates: &[Rates], mixed: &[f64]) -> String {
    let batched = format!("decode x{}", args.streams);
    // Writing to a string cannot fail.
    let mut text = format!(
        "{:<16} {:>18} {:>18} {:>18}  (tokens/s, median min..max)\n",
        "sub-network", "prefill", "decode", batched
    );
    let cell = |values: &[f64]| {
        let (low, high) = values.iter().fold((f64::INFINITY, 0f64), |(l, h), &v| (l.min(v), h.max(v)));
        format!("{:.0} {low:.0}..{high:.0}", median(values))
    };
    for (((_, name), _), rates) in selections.iter().zip(rates) {
        let (prefill, decode, batched) = (cell(&rates.prefill), cell(&rates.decode), cell(&rates.batched));
        let _ = writeln!(text, "{name:<16} {prefill:>18} {decode:>18} {batched:>18}");
    }
    let _ = writeln!(text, "{:<16} {:>18} {:>18} {:>18}", "all mixed", "", "", cell(mixed));
    text
}

fn save(args: &BenchArgs, opened: &mut open::Opened, rates: &[Rates]) -> Result<(), Failure> {
    let machine = open::machine(args.machine.as_ref());
    let model = opened.models.first_mut().ok_or("no model")?;
    let names = model.catalog.entries().iter().map(|e| e.name.clone()).collect::<Vec<_>>();
    for (name, rates) in names.iter().zip(rates) {
        let Some(entry) = model.catalog.get_mut(name) else { continue };
        let seconds = |rates: &[f64]| (1e9 / median(rates)).round() / 1e9;
        let latency = Latency {
            prefill_seconds_per_token: seconds(&rates.prefill),
            decode_seconds_per_token: seconds(&rates.decode),
        };
        entry.latency.insert(machine.clone(), latency);
    }
    model.folder.write_catalog(&model.catalog)?;
    let tasks = model.catalog.entries().iter().flat_map(|e| e.scores.keys().cloned());
    let mut tasks = tasks.collect::<Vec<_>>();
    tasks.sort();
    tasks.dedup();
    // The points of all tasks stand at the same latencies, so the names beside the highest ones name all of them.
    let best = |task: &String| {
        let scores = model.catalog.entries().iter().filter_map(|e| e.scores.get(task));
        scores.copied().fold(0.0, f64::max)
    };
    tasks.sort_by(|a, b| best(b).total_cmp(&best(a)));
    let series = tasks.iter().enumerate().map(|(rank, task)| {
        let point = |entry: &crate::supernet::CatalogEntry| {
            let latency = entry.latency.get(&machine)?.decode_seconds_per_token * 1e3;
            let accuracy = entry.scores.get(task)? * 100.0;
            Some(Point {
                x: latency,
                y: accuracy,
                interval: None,
                label: if rank == 0 { entry.name.clone() } else { String::new() },
            })
        };
        Series::labelled(task, model.catalog.entries().iter().filter_map(point).collect())
    });
    let title = format!("{}: accuracy over latency", model.folder.name);
    let x = format!("milliseconds for each generated token, one stream ({machine})");
    let svg = plot::chart(&title, &x, "accuracy, %", &series.collect::<Vec<_>>());
    std::fs::write(model.folder.path().join("accuracy-latency.svg"), svg)?;
    Ok(())
}
