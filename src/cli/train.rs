//! `lonas train`

use super::open::{self, BaseArg};
use super::{Failure, progress::Progress};
use crate::artifact::{
    AdapterConfig, AdapterTensors, Base, BaseReference, ModelFolder, TensorType, write_adapter,
};
use crate::backend::reference::{NamedTensor, Reference};
use crate::data::{self, PromptForm};
use crate::model::llama::{self, GroupTemplate, MODULES, SuperAdapter};
use crate::plot;
use crate::supernet::{Catalog, ModelShape, SearchSpace};
use crate::text::Tokenizer;
use crate::train::{
    CALIBRATION_SEQUENCES, Checkpoint, LogLine, Recipe, Trainer, TrainingLog, importance_orders,
};
use crate::weights::{HostData, HostMatrix};
use clap::Args;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Train a super-adapter with LoNAS's recipe.
///
/// Writes a model folder that `lonas serve` takes as it is. Run again with the same arguments after an interruption,
/// it goes on from the last checkpoint.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  lonas train --data train.json --space space.json --out models/mine --reorder"
)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    base: BaseArg,

    /// Training examples: JSON arrays of {instruction, input, output, answer}.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    data: Vec<PathBuf>,

    /// The search space: JSON with rank, alpha, targets and groups. See README, "Your own super-network".
    #[arg(long, value_name = "FILE")]
    space: PathBuf,

    /// The model folder to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// How an example becomes text.
    #[arg(long, value_enum, default_value_t = Form::Lonas)]
    form: Form,

    /// Put the MLP channels in falling importance before training.
    #[arg(long, conflicts_with = "order")]
    reorder: bool,

    /// Reuse the channel order of another model folder, so that both can be served on one copy of the base.
    #[arg(long, value_name = "DIR")]
    order: Option<PathBuf>,

    /// Use the first N training examples only (after shuffling).
    #[arg(long, value_name = "N")]
    limit: Option<usize>,

    /// Longest sequence, in tokens.
    #[arg(long, default_value_t = 256)]
    cutoff: usize,

    /// Examples held out for the validation loss.
    #[arg(long, default_value_t = 120, value_name = "N")]
    validation: usize,

    /// Micro-batches between two validations; 0 validates at the end only.
    #[arg(long, default_value_t = 400, value_name = "N")]
    validate_every: u64,

    /// Minutes between two checkpoints: what an interruption can cost at most.
    #[arg(long, default_value_t = 2.0, value_name = "MINUTES")]
    checkpoint_every: f64,

    #[arg(long, default_value_t = 6)]
    epochs: usize,

    /// Sequences in one micro-batch, which shares one random sub-network.
    #[arg(long, default_value_t = 4)]
    micro_batch: usize,

    /// Micro-batches in one optimizer step.
    #[arg(long, default_value_t = 4)]
    accumulation: usize,

    #[arg(long, default_value_t = 3e-4)]
    learning_rate: f64,

    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,

    /// Dropout of the adapters' input.
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,

    #[arg(long, default_value_t = 42)]
    seed: u64,

    /// Threads; 0 takes all cores.
    #[arg(long, env = "LONAS_THREADS", default_value_t = 0)]
    threads: usize,

    /// Number format of the written adapter.
    #[arg(long, value_enum, default_value_t = TensorType::Bf16)]
    adapter_type: TensorType,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Form {
    /// LoNAS's instruction template, byte for byte.
    Lonas,
    /// `Question: ...` and `Answer: ` with the right option's text; suits small models.
    Short,
}

impl From<Form> for PromptForm {
    fn from(form: Form) -> Self {
        match form {
            Form::Lonas => Self::Lonas,
            Form::Short => Self::Short,
        }
    }
}

/// A search-space file.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct SpaceFile {
    /// The adapters' full rank.
    rank: usize,
    /// The adapters' scale is `alpha / rank`.
    alpha: f64,
    /// Short names of the modules that get an adapter.
    targets: Vec<String>,
    groups: Vec<GroupTemplate>,
}

/// Everything a training starts from, all of it decided by the arguments.
struct Plan {
    base: Base,
    base_reference: BaseReference,
    adapter: AdapterConfig,
    shape: ModelShape,
    space: SearchSpace,
    /// Channel orders by layer.
    orders: BTreeMap<usize, Vec<usize>>,
    recipe: Recipe,
    sequences: Vec<Vec<u32>>,
    validation: Vec<Vec<u32>>,
}

pub(super) fn run(args: &TrainArgs) -> Result<(), Failure> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if args.threads == 0 { cores() } else { args.threads };
    candle_stays_on_its_thread();
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    let plan = plan(args)?;
    std::fs::create_dir_all(&args.out)?;
    let checkpoint = Checkpoint { recipe: plan.recipe.clone(), inputs: digest(&plan) };
    let checkpoint_path = args.out.join("checkpoint.safetensors");
    let mut trainer = trainer(&plan)?;
    if checkpoint.resume(&checkpoint_path, &mut trainer)? {
        tracing::info!("going on from micro-batch {} of {}", trainer.done(), trainer.total());
    }
    let mut log = TrainingLog::open(&args.out.join("train.jsonl"), trainer.done())?;
    tracing::info!(
        "training on {} sequences of {} tokens in all, {} micro-batches",
        plan.sequences.len(),
        plan.sequences.iter().map(Vec::len).sum::<usize>(),
        trainer.total()
    );
    train(args, &plan, &mut trainer, &mut log, |trainer| checkpoint.save(&checkpoint_path, trainer))?;
    write_folder(args, &plan, &trainer, &log)?;
    // The result is whole; what was only needed to get there goes.
    std::fs::remove_file(&checkpoint_path).or_else(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(e),
    })?;
    tracing::info!("wrote {}; serve it with: lonas serve {}", args.out.display(), args.out.display());
    Ok(())
}

/// The trainer runs one graph on each thread; candle's own threads inside each operation would only get in their way.
fn candle_stays_on_its_thread() {
    for name in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        #[expect(unsafe_code, reason = "candle reads the number of its threads from the environment only")]
        // SAFETY: no other thread has been started yet.
        unsafe {
            std::env::set_var(name, "1");
        }
    }
}

fn plan(args: &TrainArgs) -> Result<Plan, Failure> {
    let base_reference = args.base.reference();
    let base = open::base(&base_reference)?;
    let space_text = std::fs::read(&args.space).map_err(|e| format!("{}: {e}", args.space.display()))?;
    let file: SpaceFile =
        serde_json::from_slice(&space_text).map_err(|e| format!("{}: {e}", args.space.display()))?;
    let adapter = AdapterConfig {
        rank: file.rank,
        alpha: file.alpha,
        dropout: args.dropout,
        target_modules: file.targets,
        base_model_name: open::name_of(base.path()),
    };
    check_targets(&adapter)?;
    let shape = llama::model_shape(&base.config, Some(&adapter));
    let space = llama::search_space(&shape, &file.groups)?;
    let recipe = Recipe {
        epochs: args.epochs,
        micro_batch: args.micro_batch,
        accumulation: args.accumulation,
        learning_rate: args.learning_rate,
        weight_decay: args.weight_decay,
        dropout: args.dropout,
        seed: args.seed,
        ..Recipe::default()
    };
    let (sequences, validation) = sequences(args, &base, &open::tokenizer(&base)?)?;
    let orders = if let Some(folder) = &args.order {
        let other = open::models(std::slice::from_ref(folder), &args.base)?;
        other.orders
    } else if args.reorder {
        tracing::info!("measuring the MLP channels over {CALIBRATION_SEQUENCES} sequences");
        importance_orders(&base, &validation_or(&validation, &sequences))?
    } else {
        BTreeMap::new()
    };
    Ok(Plan { base, base_reference, adapter, shape, space, orders, recipe, sequences, validation })
}

fn check_targets(adapter: &AdapterConfig) -> Result<(), Failure> {
    if !(1..=4096).contains(&adapter.rank) || !(adapter.alpha.is_finite() && adapter.alpha > 0.0) {
        return Err(format!(
            "search space: rank {} or alpha {} is out of range",
            adapter.rank, adapter.alpha
        )
        .into());
    }
    let known = |t: &String| MODULES.iter().any(|m| m.rsplit('.').next() == Some(t));
    match adapter.target_modules.iter().find(|t| !known(t)) {
        Some(unknown) => {
            Err(format!("search space: targets: a LLaMA layer has no module `{unknown}`").into())
        }
        None if adapter.target_modules.is_empty() => Err("search space: targets: none".into()),
        None => Ok(()),
    }
}

/// Calibration should not see what is trained on, where something was held out.
fn validation_or<'a>(validation: &'a [Vec<u32>], sequences: &'a [Vec<u32>]) -> &'a [Vec<u32>] {
    if validation.len() >= CALIBRATION_SEQUENCES { validation } else { sequences }
}

/// The token sequences to train on and those held out.
type Sequences = (Vec<Vec<u32>>, Vec<Vec<u32>>);

fn sequences(args: &TrainArgs, base: &Base, tokenizer: &Tokenizer) -> Result<Sequences, Failure> {
    let mut examples = Vec::new();
    for path in &args.data {
        examples.extend(data::read(path)?);
    }
    let (mut training, validation) = data::split(examples, args.validation, args.seed);
    training.truncate(args.limit.unwrap_or(usize::MAX));
    let cutoff = args.cutoff.min(base.config.max_positions);
    let form = PromptForm::from(args.form);
    let tokens = |examples: Vec<data::Example>| -> Result<Vec<Vec<u32>>, Failure> {
        let texts = examples.iter().filter_map(|e| form.text(e));
        let tokens = texts.map(|(prompt, response)| tokenizer.encode(&(prompt + &response), true));
        let closed = tokens.map(|t| Ok(data::training_tokens(t?, tokenizer.eos(), cutoff)));
        closed.collect()
    };
    let (given, kept) = (training.len(), tokens(training)?);
    if kept.len() < given {
        tracing::warn!("{} of {given} examples have no such form and are left out", given - kept.len());
    }
    Ok((kept, tokens(validation)?))
}

/// What a checkpoint must have been made from to be continued.
fn digest(plan: &Plan) -> String {
    use sha2::{Digest, Sha256};
    let inputs = (&plan.base_reference, &plan.adapter.target_modules, plan.adapter.rank);
    let text = format!("{inputs:?} {:?} {:?} {:?}", plan.space, plan.orders, plan.sequences);
    Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect()
}

/// A trainer with a fresh adapter: A by Kaiming's uniform rule, B zero, as PEFT begins.
fn trainer(plan: &Plan) -> Result<Trainer, Failure> {
    let backend = Reference::for_training(plan.recipe.dropout, plan.recipe.seed);
    let tensors = crate::train::fresh_adapter(&plan.shape, plan.recipe.seed);
    let adapter = SuperAdapter { shape: plan.shape.clone(), tensors, scale: plan.adapter.scale() as f32 };
    let model = llama::load(&backend, &plan.base, vec![adapter], &plan.orders)?;
    let (shape, space) = (plan.shape.clone(), plan.space.clone());
    Ok(Trainer::new(backend, model, shape, space, plan.recipe.clone(), plan.sequences.clone())?)
}

fn train(
    args: &TrainArgs,
    plan: &Plan,
    trainer: &mut Trainer,
    log: &mut TrainingLog,
    save: impl Fn(&Trainer) -> Result<(), crate::train::TrainError>,
) -> Result<(), Failure> {
    let mut progress = Progress::new("micro-batch", trainer.total(), trainer.done());
    let interval = Duration::from_secs_f64(args.checkpoint_every.max(0.0) * 60.0);
    let mut saved = Instant::now();
    let mut smooth: Option<f32> = None;
    if trainer.done() == 0 {
        validate(plan, trainer, log)?;
    }
    while trainer.done() < trainer.total() {
        let done = trainer.step()?;
        log.write(LogLine::from(&done))?;
        let mean = smooth.map_or(done.loss, |s| s + 0.02 * (done.loss - s));
        smooth = Some(mean);
        progress.set(done.number, &format!("loss {mean:.3}"));
        let due = args.validate_every > 0 && done.number.is_multiple_of(args.validate_every);
        if due || done.number == trainer.total() {
            validate(plan, trainer, log)?;
        }
        if trainer.between_windows() && saved.elapsed() >= interval {
            save(trainer)?;
            saved = Instant::now();
        }
    }
    progress.finish();
    Ok(())
}

fn validate(plan: &Plan, trainer: &Trainer, log: &mut TrainingLog) -> Result<(), Failure> {
    if plan.validation.is_empty() {
        return Ok(());
    }
    let losses = trainer.validate(&plan.validation)?;
    let micro_batch = trainer.done();
    tracing::info!(
        "validation loss at {micro_batch}: maximal {:.4}, heuristic {:.4}, minimal {:.4}",
        losses.maximal,
        losses.heuristic,
        losses.minimal
    );
    Ok(log.write(LogLine::Validation { micro_batch, losses })?)
}

/// Writes the model folder: adapter, supernet.json, catalog.json, the loss curve.
fn write_folder(args: &TrainArgs, plan: &Plan, trainer: &Trainer, log: &TrainingLog) -> Result<(), Failure> {
    let tensors = natural_order(plan, trainer.optimizer().values());
    write_adapter(&args.out, &plan.adapter, &tensors, args.adapter_type)?;
    let orders = open::orders_by_group(&plan.space, &plan.orders);
    let name = open::name_of(&args.out);
    let base = BaseReference { sha256: base_digest(plan)?, ..plan.base_reference.clone() };
    let (shape, space) = (&plan.shape, &plan.space);
    ModelFolder::write_supernet(&args.out, &name, &base, plan.adapter.scale(), shape, space, &orders)?;
    ModelFolder::open(&args.out)?.write_catalog(&Catalog::new(shape, space))?;
    std::fs::write(args.out.join("loss.svg"), loss_curve(log))?;
    Ok(())
}

fn base_digest(plan: &Plan) -> Result<Option<String>, Failure> {
    match &plan.base_reference.sha256 {
        Some(known) => Ok(Some(known.clone())),
        None => Ok(Some(plan.base.sha256()?)),
    }
}

/// The trained tensors by module, put back into the base's own channel order.
fn natural_order(plan: &Plan, values: Vec<NamedTensor>) -> AdapterTensors {
    let mut by_name = values.into_iter().map(|t| (t.name.clone(), t)).collect::<BTreeMap<_, _>>();
    let mut take = |name: String| {
        let NamedTensor { name, rows, columns, values } = by_name.remove(&name)?;
        Some(HostMatrix { name, rows, columns, data: HostData::F32(values) })
    };
    let mut tensors = AdapterTensors::new();
    for (index, linear) in plan.shape.linears.iter().enumerate() {
        let halves =
            (take(format!("{}.lora_A.weight", linear.name)), take(format!("{}.lora_B.weight", linear.name)));
        let (Some(mut a), Some(mut b)) = halves else { continue };
        if let Some(order) = plan.orders.get(&(index / MODULES.len())) {
            let back = inverse(order);
            match MODULES[index % MODULES.len()] {
                "mlp.gate_proj" | "mlp.up_proj" => b = b.permute_rows(&back),
                "mlp.down_proj" => a = a.permute_columns(&back),
                _ => {}
            }
        }
        tensors.insert(linear.name.clone(), (a, b));
    }
    tensors
}

fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    for (place, &channel) in order.iter().enumerate() {
        inverse[channel] = place;
    }
    inverse
}

fn loss_curve(log: &TrainingLog) -> String {
    let mut micro_batches = Vec::new();
    let mut validated = [Vec::new(), Vec::new(), Vec::new()];
    for line in log.lines() {
        match line {
            LogLine::MicroBatch { micro_batch, loss, .. } => {
                micro_batches.push((*micro_batch as f64, f64::from(*loss)));
            }
            LogLine::Validation { micro_batch, losses } => {
                let all = [losses.maximal, losses.heuristic, losses.minimal];
                for (series, loss) in validated.iter_mut().zip(all) {
                    series.push((*micro_batch as f64, loss));
                }
            }
        }
    }
    let mut series = vec![plot::Series::dots("each micro-batch's random sub-network", micro_batches)];
    for (name, points) in crate::train::VALIDATED.into_iter().zip(validated) {
        series.push(plot::Series::line(&format!("validation, {name}"), points));
    }
    plot::chart("Training loss", "micro-batch", "loss (nats per token)", &series)
}
