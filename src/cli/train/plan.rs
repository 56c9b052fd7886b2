//! What a training starts from: base, search space, recipe, token sequences, channel order.

use super::{TrainArgs, device};
use crate::artifact::{AdapterConfig, Base, BaseReference, ModelFolder};
use crate::backend::reference::Compute;
use crate::cli::space::SpaceFile;
use crate::cli::{Failure, open};
use crate::data::{self, PromptForm};
use crate::model::llama;
use crate::supernet::{ModelShape, SearchSpace, is_model_name};
use crate::text::Tokenizer;
use crate::train::{CALIBRATION_SEQUENCES, Recipe, importance_orders};
use std::collections::BTreeMap;
use std::path::Path;

/// Everything a training starts from, all of it decided by the arguments.
pub(super) struct Plan {
    pub(super) base: Base,
    pub(super) base_reference: BaseReference,
    pub(super) adapter: AdapterConfig,
    pub(super) shape: ModelShape,
    pub(super) space: SearchSpace,
    /// Channel orders by layer.
    pub(super) orders: BTreeMap<usize, Vec<usize>>,
    pub(super) recipe: Recipe,
    pub(super) compute: Compute,
    pub(super) sequences: Vec<Vec<u32>>,
    pub(super) validation: Vec<Vec<u32>>,
}

pub(super) fn plan(args: &TrainArgs) -> Result<Plan, Failure> {
    // A mistake among the numbers is found before a GPU is looked for.
    recipe(args, &Compute::cpu())?;
    let compute = device::open(args.device)?;
    let recipe = recipe(args, &compute)?;
    let name = open::name_of(&args.out);
    if !is_model_name(&name) {
        return Err(
            format!("--out: a model named `{name}` could not be asked for: no colon and no space").into()
        );
    }
    let base_reference = args.base.reference();
    let base = open::base(&base_reference)?;
    let sha256 = Some(base_reference.sha256.clone().map_or_else(|| base.sha256(), Ok)?);
    let base_reference = BaseReference { sha256, ..base_reference };
    let file = SpaceFile::read(&args.space)?;
    let adapter = file.adapter(args.dropout, open::name_of(base.path()))?;
    let shape = llama::model_shape(&base.config, Some(&adapter));
    let space = llama::search_space(&shape, file.groups())?;
    let (sequences, validation) = sequences(args, &base, &open::tokenizer(&base)?)?;
    let orders = if let Some(folder) = &args.order {
        order_of(folder, &base, &base_reference)?
    } else if args.reorder {
        tracing::info!("measuring the MLP channels over {CALIBRATION_SEQUENCES} sequences");
        importance_orders(&base, validation_or(&validation, &sequences), compute.clone())?
    } else {
        BTreeMap::new()
    };
    Ok(Plan { base, base_reference, adapter, shape, space, orders, recipe, compute, sequences, validation })
}

fn recipe(args: &TrainArgs, compute: &Compute) -> Result<Recipe, Failure> {
    let recipe = Recipe {
        epochs: args.epochs,
        micro_batch: args.micro_batch,
        accumulation: args.accumulation,
        learning_rate: args.learning_rate,
        weight_decay: args.weight_decay,
        dropout: args.dropout,
        seed: args.seed,
        bf16_base: compute.rounds_weights(),
        // A GPU takes a micro-batch as one graph.
        threads: if compute.is_gpu() { 1 } else { rayon::current_num_threads() },
        ..Recipe::default()
    };
    recipe.check()?;
    Ok(recipe)
}

/// The channel order of another model folder, which must belong to the same base.
fn order_of(
    folder: &Path,
    base: &Base,
    reference: &BaseReference,
) -> Result<BTreeMap<usize, Vec<usize>>, Failure> {
    let other = ModelFolder::open(folder)?;
    if other.base.sha256 != reference.sha256 {
        return Err(format!("--order {}: it belongs to another base", folder.display()).into());
    }
    let shape = llama::model_shape(&base.config, Some(&other.adapter_config));
    let space = other.search_space(&shape)?;
    Ok(open::orders_by_layer(&space, other.orders()))
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
pub(super) fn digest(plan: &Plan) -> String {
    use sha2::{Digest, Sha256};
    let inputs = (&plan.base_reference.sha256, &plan.adapter);
    let text = format!("{inputs:?} {:?} {:?} {:?}", plan.space, plan.orders, plan.sequences);
    Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect()
}
