//! `lonas bench`: arguments, the order in which things are measured, where the results go.

pub(super) mod case;
mod facts;
pub(super) mod figures;
mod json;
mod report;
mod save;
mod table;

use super::Failure;
use super::compute::{BLOCK_SIZE, ComputeArgs};
use super::device::Meter;
use super::open::{self, BaseArg, Named, Opened};
use super::progress::Progress;
use crate::backend::cpu::Limits;
use case::{Case, Driver, Mix, Test};
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use facts::{Facts, Load};
use figures::figures;
use std::path::PathBuf;

/// Measure each sub-network on this machine, beside what the machine can do at most.
///
/// Computes a prompt in the steps that the server would take, and decodes with several numbers of streams, each
/// sub-network by itself and all of them mixed in one batch. Sub-networks take turns every few steps, so that a
/// machine whose speed drifts favours none; the median of the rounds counts. The bound is the larger of two times: that
/// of reading what the step must read (weights, adapters, cached keys and values, each once), and that of its
/// arithmetic, both at the best rates that plain loops reach in the same round.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  lonas bench\n  lonas bench models/mine --rounds 9 --save\n  \
    lonas bench models/commonsense models/math --streams 1,8 --context 128,2048 --json")]
pub(super) struct BenchArgs {
    /// Model folders; several share one base, and the mixed batch has the sub-networks of all.
    #[arg(default_value = super::DEFAULT_MODEL, value_name = "DIR")]
    models: Vec<PathBuf>,

    /// Sub-networks to measure, of whichever folder; without it, all of the catalogs.
    #[arg(long, num_args = 1.., value_name = "NAME")]
    subnetwork: Vec<String>,

    /// Rounds.
    #[arg(long, default_value_t = 5, value_parser = positive, value_name = "N")]
    rounds: usize,

    /// Tokens of the prompt.
    #[arg(long, default_value_t = 512, value_parser = positive, value_name = "N")]
    prompt: usize,

    /// Tokens that one stream generates; with several streams each generates its part of them, but at least 16.
    #[arg(long, default_value_t = 128, value_parser = positive, value_name = "N")]
    output: usize,

    /// How many streams decode together; the mixed batch's number is always measured.
    #[arg(long, default_value = "1,4,8,16", value_delimiter = ',', value_parser = positive, value_name = "N,...")]
    streams: Vec<usize>,

    /// Streams of the batch in which all sub-networks are mixed; at least one for each.
    #[arg(long, default_value_t = 8, value_parser = positive, value_name = "N")]
    mixed_streams: usize,

    /// Tokens of context at which decoding starts; without it, the prompt's length.
    #[arg(long, value_delimiter = ',', value_parser = positive, value_name = "N,...")]
    context: Vec<usize>,

    /// Prompt tokens computed in one step, as for `serve`.
    #[arg(long, default_value_t = 256, value_parser = positive, value_name = "N")]
    step_tokens: usize,

    /// Measure the same sub-networks without their adapters as well, in turn, and report what adapters cost.
    #[arg(long, conflicts_with = "merge_adapter")]
    without_adapter: bool,

    /// Print JSON, one object a line for each figure.
    #[arg(long)]
    json: bool,

    /// Write latencies into the catalog, and `accuracy-latency.svg` and `throughput.svg` into each model folder. The
    /// catalog's latencies are those of live adapters.
    #[arg(long, conflicts_with = "merge_adapter")]
    save: bool,

    /// Also write into this folder: the figures as text and JSON; every sub-network's logits beside those of the processor in
    /// f32, which have to be near; on a GPU single operations, over this base's sizes and LLaMA-7B's.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,

    /// Rows of the steps that `--report` measures operations of.
    #[arg(long, hide = true, value_delimiter = ',', value_parser = positive, default_value = "1,4,8,16,32,64,256,2048")]
    report_rows: Vec<usize>,

    /// Bytes of different weights that each operation goes through there.
    #[arg(long, hide = true, default_value_t = 512 << 20)]
    report_bytes: usize,

    /// Whether LLaMA-7B's sizes are measured there too.
    #[arg(long, hide = true, default_value_t = true, action = clap::ArgAction::Set)]
    report_llama_7b: bool,

    /// How this machine is called in the catalog; by default its processor and cores.
    #[arg(long, env = "LONAS_MACHINE", value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    machine: Option<String>,

    #[command(flatten)]
    base: BaseArg,

    #[command(flatten)]
    compute: ComputeArgs,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a number of at least 1".to_string())
}

#[expect(clippy::print_stdout, reason = "the command's output")]
pub(super) fn run(args: &BenchArgs) -> Result<(), Failure> {
    if args.save && !args.streams.contains(&1) {
        return Err("--save keeps the latency of one stream, so --streams must have 1".into());
    }
    let load = Load::begin();
    let mut opened = open::models(&args.models, &args.base)?;
    if opened.models.iter().any(|model| model.classifier.is_some()) {
        return Err("the model classifies texts; this measures those that continue them".into());
    }
    let selections = chosen(args, args.compute.selections(&opened)?)?;
    let plan = Plan::new(args, opened.base.config.max_positions, selections.len())?;
    let mut executor = args.compute.executor(&opened, plan.pool_tokens(), BLOCK_SIZE)?;
    let load = load.end(executor.weight_bytes());

    let draws = args.compute.gpu_name()?.is_some();
    let mut driver = Driver::new(&mut *executor, plan.stream_tokens(), args.step_tokens).drawing(draws);
    let mut cases = plan.cases(args, &driver, &selections);
    let cpu = args.compute.cpu();
    let meter = args.compute.meter(&cpu)?;
    let gpu = args.compute.gpu_name()?;
    let (limits, noise) = rounds(args, &plan, &mut driver, &mut cases, &meter)?;
    let facts = Facts {
        machine: open::machine(args.machine.as_ref().or(gpu.as_ref())),
        device: args.compute.device_name()?.into(),
        dtype: args.compute.dtype_name()?,
        // One thread of the processor starts what a GPU does.
        threads: if gpu.is_some() { 1 } else { cpu.threads() },
        description: args.compute.describe()?,
        load,
        registering: facts::registering(&opened),
        noise,
        names: names(&opened, &selections),
    };
    let figures = figures(&cases, &limits);
    let (text, lines) =
        (table::text(&facts, args, &limits, &figures), json::lines(&facts, args, &limits, &figures));
    if args.json {
        lines.iter().for_each(|line| println!("{line}"));
    } else {
        print!("{text}");
    }
    if let Some(folder) = &args.report {
        report::figures(folder, &text, &lines)?;
        #[cfg(feature = "cuda")]
        report::operations(folder, args, &opened)?;
        report::checks(folder, args, &opened, &selections, &mut *executor)?;
    }
    if args.save {
        save::save(&mut opened, &facts, &figures)?;
    }
    Ok(())
}

/// Those that `--subnetwork` names.
fn chosen(args: &BenchArgs, mut selections: Vec<Named>) -> Result<Vec<Named>, Failure> {
    let known = selections.iter().map(|((_, name), _)| name.clone()).collect::<Vec<_>>();
    if let Some(unknown) = args.subnetwork.iter().find(|n| !known.contains(n)) {
        return Err(format!("--subnetwork {unknown}: the catalog has {}", known.join(", ")).into());
    }
    selections.retain(|((_, name), _)| args.subnetwork.is_empty() || args.subnetwork.contains(name));
    Ok(selections)
}

/// By sub-network: the model folder's name and its own.
fn names(opened: &Opened, selections: &[Named]) -> Vec<(String, String)> {
    let name = |((model, name), _): &Named| (opened.models[*model].folder.name.clone(), name.clone());
    selections.iter().map(name).collect()
}

/// Which lengths and numbers of streams are measured.
struct Plan {
    prompt: usize,
    contexts: Vec<usize>,
    /// Ascending; the mixed batch's number is among them.
    streams: Vec<usize>,
    /// `None` where there is only one sub-network.
    mixed_streams: Option<usize>,
    output: usize,
}

impl Plan {
    fn new(args: &BenchArgs, max_positions: usize, sub_networks: usize) -> Result<Self, Failure> {
        let contexts = if args.context.is_empty() { vec![args.prompt] } else { args.context.clone() };
        let mixed_streams = (sub_networks > 1).then_some(args.mixed_streams.max(sub_networks));
        let mut streams = args.streams.clone();
        streams.extend(mixed_streams);
        streams.sort_unstable();
        streams.dedup();
        let plan = Self { prompt: args.prompt, contexts, streams, mixed_streams, output: args.output };
        let longest = plan.prompt.max(plan.deepest().saturating_add(plan.output));
        if longest > max_positions {
            return Err(format!(
                "a prompt of {}, or a context of {} and {} tokens after it, is longer than the base's {max_positions} positions",
                plan.prompt,
                plan.deepest(),
                plan.output
            )
            .into());
        }
        Ok(plan)
    }

    fn deepest(&self) -> usize {
        self.contexts.iter().copied().max().unwrap_or(self.prompt)
    }

    /// What the pool must hold of each stream.
    fn stream_tokens(&self) -> usize {
        self.prompt.max(self.deepest() + self.output)
    }

    fn most_streams(&self) -> usize {
        self.streams.last().copied().unwrap_or(1)
    }

    fn pool_tokens(&self) -> usize {
        self.stream_tokens().next_multiple_of(BLOCK_SIZE).saturating_mul(self.most_streams())
    }

    /// Everything that is measured in a round; cases of the same test stand together.
    fn cases(&self, args: &BenchArgs, driver: &Driver<'_>, selections: &[Named]) -> Vec<Case> {
        let mut tests = vec![Test::Prefill { prompt: self.prompt }];
        for &context in &self.contexts {
            let steps = |streams: usize| (self.output / streams).max(16).min(self.output);
            let test = |&streams: &usize| Test::Decode { context, streams, steps: steps(streams) };
            tests.extend(self.streams.iter().map(test));
        }
        let mut cases = Vec::new();
        for test in tests {
            for (index, (_, selection)) in selections.iter().enumerate() {
                cases.push(driver.case(
                    test,
                    Mix::One { index, adapter: true },
                    std::slice::from_ref(selection),
                ));
                if args.without_adapter {
                    let bare = case::without_adapter(selection);
                    cases.push(driver.case(test, Mix::One { index, adapter: false }, &[bare]));
                }
            }
            if matches!(test, Test::Decode { streams, .. } if Some(streams) == self.mixed_streams) {
                let all = selections.iter().map(|(_, s)| s.clone()).collect::<Vec<_>>();
                cases.push(driver.case(test, Mix::All, &all));
            }
        }
        cases
    }
}

/// Fills the pool, warms up, and runs every case once a round; the machine's limits by round, and other load meanwhile.
fn rounds(
    args: &BenchArgs,
    plan: &Plan,
    driver: &mut Driver<'_>,
    cases: &mut [Case],
    meter: &Meter<'_>,
) -> Result<(Vec<Limits>, facts::Noise), Failure> {
    let filler = cases.iter().min_by_key(|c| c.multiply_adds.total()).map(|c| c.selections[0].clone());
    if let Some(filler) = filler {
        let mut progress = Progress::new("stream filled", plan.most_streams() as u64, 0);
        for stream in 0..plan.most_streams() {
            driver.fill(stream, plan.deepest(), &filler)?;
            progress.set(stream as u64 + 1, "");
        }
        progress.finish();
    }
    for case in &*cases {
        driver.warm_up(case)?;
    }
    let watch = facts::Watch::begin();
    let mut limits = Vec::with_capacity(args.rounds);
    let mut progress = Progress::new("measurement", (args.rounds * cases.len()) as u64, 0);
    let mut done = 0;
    for round in 0..args.rounds {
        limits.push(meter.measure()?);
        for together in cases.chunk_by_mut(|a, b| a.test == b.test) {
            driver.round(together, round)?;
            done += together.len() as u64;
            progress.set(done, "");
        }
    }
    progress.finish();
    Ok((limits, watch.end()))
}
