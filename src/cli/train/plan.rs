//! What a training starts from: base, search space, recipe, token sequences, channel order.

use super::{TrainArgs, device};
use crate::artifact::{AdapterConfig, Base, BaseReference, ModelFolder};
use crate::backend::reference::Compute;
use crate::cli::space::SpaceFile;
use crate::cli::{Failure, open};
use crate::data::{self, PromptForm};
use crate::model::{Layout, Orders, model_shape, search_space};
use crate::supernet::{ModelShape, SearchSpace, is_model_name};
use crate::text::Tokenizer;
use crate::train::{CALIBRATION_SEQUENCES, Recipe, Sequence, importance_orders};
use std::collections::BTreeMap;
use std::path::Path;

/// Everything a training starts from, all of it decided by the arguments.
pub(super) struct Plan {
    pub(super) base: Base,
    pub(super) base_reference: BaseReference,
    pub(super) adapter: AdapterConfig,
    pub(super) shape: ModelShape,
    pub(super) space: SearchSpace,
    pub(super) orders: Orders,
    pub(super) recipe: Recipe,
    pub(super) compute: Compute,
    pub(super) sequences: Vec<Sequence>,
    pub(super) validation: Vec<Sequence>,
}

/// What can be said of the arguments alone, before a folder is made, a GPU is looked for or a base is opened.
pub(super) fn check(args: &TrainArgs) -> Result<(), Failure> {
    args.recipe(&Compute::cpu())?;
    let name = open::name_of(&args.out);
    if !is_model_name(&name) {
        return Err(
            format!("--out: a model named `{name}` could not be asked for: no colon and no space").into()
        );
    }
    Ok(())
}

pub(super) fn plan(args: &TrainArgs) -> Result<Plan, Failure> {
    let compute = device::open(args.device)?;
    let recipe = args.recipe(&compute)?;
    let base_reference = args.base.reference()?;
    let base = open::base(&base_reference, &args.base.named())?;
    let sha256 = Some(base_reference.sha256.clone().map_or_else(|| base.sha256(), Ok)?);
    let base_reference = BaseReference { sha256, ..base_reference };
    let file = SpaceFile::read(&args.space)?;
    let adapter = file.adapter(base.config.family, recipe.dropout, open::name_of(base.path()))?;
    let shape = model_shape(&base.config, Some(&adapter));
    let space = search_space(&base.config, &shape, file.groups())?;
    let (sequences, validation) = sequences(args, recipe.response_only, &base, &open::tokenizer(&base)?)?;
    let orders = if let Some(folder) = &args.order {
        order_of(folder, &base, &base_reference)?
    } else if args.reorders() {
        tracing::info!("measuring what matters over {CALIBRATION_SEQUENCES} sequences");
        importance_orders(&base, &space, validation_or(&validation, &sequences), compute.clone())?
    } else {
        Orders::default()
    };
    Ok(Plan { base, base_reference, adapter, shape, space, orders, recipe, compute, sequences, validation })
}

/// The orders of another model folder, which must belong to the same base.
fn order_of(folder: &Path, base: &Base, reference: &BaseReference) -> Result<Orders, Failure> {
    let other = ModelFolder::open(folder)?;
    if other.base.sha256 != reference.sha256 {
        return Err(format!("--order {}: it belongs to another base", folder.display()).into());
    }
    let shape = model_shape(&base.config, Some(&other.adapter_config));
    let space = other.search_space(&shape)?;
    Ok(Orders::of_groups(Layout::of(base.config.family), &space, other.orders()))
}

/// Calibration should not see what is trained on, where something was held out.
fn validation_or<'a>(validation: &'a [Sequence], sequences: &'a [Sequence]) -> &'a [Sequence] {
    if validation.len() >= CALIBRATION_SEQUENCES { validation } else { sequences }
}

/// The sequences to train on and those held out.
type Sequences = (Vec<Sequence>, Vec<Sequence>);

fn sequences(
    args: &TrainArgs,
    response_only: bool,
    base: &Base,
    tokenizer: &Tokenizer,
) -> Result<Sequences, Failure> {
    let mut examples = Vec::new();
    for path in &args.data {
        examples.extend(data::read(path)?);
    }
    let (mut training, validation) = data::split(examples, args.validation, args.seed);
    training.truncate(args.limit.unwrap_or(usize::MAX));
    let cutoff = args.cutoff.min(base.config.max_positions);
    let form = PromptForm::from(args.form);
    let sequence = |(prompt, response): (String, String)| -> Result<Sequence, Failure> {
        // The prompt's own tokens are counted, as the authors do; in the whole text the last of them may be another.
        let given = if response_only { tokenizer.encode(&prompt, true)?.len() } else { 0 };
        let tokens = tokenizer.encode(&(prompt + &response), true)?;
        Ok(Sequence { tokens: data::training_tokens(tokens, tokenizer.eos(), cutoff), given })
    };
    let sequences = |examples: Vec<data::Example>| {
        examples.iter().filter_map(|e| form.text(e)).map(sequence).collect::<Result<Vec<_>, _>>()
    };
    let count = training.len();
    let (training, validation) = (sequences(training)?, sequences(validation)?);
    if training.len() < count {
        tracing::warn!("{} of {count} examples have no such form and are left out", count - training.len());
    }
    Ok((with_something_to_learn(training), with_something_to_learn(validation)))
}

fn with_something_to_learn(mut sequences: Vec<Sequence>) -> Vec<Sequence> {
    let count = sequences.len();
    sequences.retain(|s| !s.targets().is_empty());
    if sequences.len() < count {
        let out = count - sequences.len();
        tracing::warn!("{out} of {count} examples have no token to learn within --cutoff and are left out");
    }
    sequences
}

/// What a checkpoint must have been made from to be continued, as digests.
pub(super) fn inputs(plan: &Plan) -> Result<BTreeMap<String, String>, Failure> {
    // What is given of them follows from the recipe, which is compared by itself.
    let tokens = plan.sequences.iter().map(|s| &s.tokens).collect::<Vec<_>>();
    // What the base's folder is called decides nothing.
    let adapter = AdapterConfig { base_model_name: String::new(), ..plan.adapter.clone() };
    let inputs = [
        ("the base", format!("{:?}", plan.base_reference.sha256)),
        ("the base's configuration or tokenizer", plan.base.settings_sha256()?),
        ("the search space", format!("{adapter:?} {:?}", plan.space)),
        ("the order of channels and heads", plan.orders.told()),
        ("the training examples as tokens", format!("{tokens:?}")),
    ];
    use sha2::{Digest, Sha256};
    let digest = |text: String| Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect();
    Ok(inputs.map(|(name, text)| (name.to_string(), digest(text))).into())
}
