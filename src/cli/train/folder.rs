//! Where a training writes, alone, and what it leaves there: a model folder that `lonas serve` takes as it is.

use super::TrainArgs;
use super::card::{Facts, card};
use super::plan::Plan;
use crate::artifact::{AdapterTensors, FolderLock, MODEL_CARD, ModelFolder, write_adapter, write_whole};
use crate::backend::reference::NamedTensor;
use crate::cli::{Failure, open};
use crate::model::Layout;
use crate::plot;
use crate::supernet::Catalog;
use crate::train::{Checkpoint, LogLine, Trainer, TrainingLog};
use crate::weights::{HostData, HostMatrix};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The output folder, which no other training has meanwhile.
pub(super) struct Output {
    pub(super) checkpoint: PathBuf,
    pub(super) log: PathBuf,
    /// Whether what is written was there when this began, and is then to be replaced.
    replaces: bool,
    _lock: FolderLock,
}

impl Output {
    /// # Errors
    /// A folder that another training has, that holds a finished super-network or somebody's adapter, or that cannot be written to.
    pub(super) fn take(args: &TrainArgs) -> Result<Self, Failure> {
        let _lock = open::output(&args.out)?;
        let [checkpoint, log] = ["checkpoint.safetensors", "train.jsonl"].map(|name| args.out.join(name));
        let mut output = Self { checkpoint, log, replaces: false, _lock };
        if !output.checkpoint.exists() {
            output.check_free(args)?;
        }
        // A training that was killed while it wrote has a checkpoint and goes on.
        output.replaces = there(args).is_some();
        Checkpoint::remove_unfinished(&output.checkpoint)?;
        Ok(output)
    }

    /// Whether the result can be written, or somebody has put something else there.
    pub(super) fn check_free(&self, args: &TrainArgs) -> Result<(), Failure> {
        let out = args.out.display();
        match there(args).filter(|_| !self.replaces) {
            None => Ok(()),
            Some(SUPERNET) if args.overwrite => Ok(()),
            Some(SUPERNET) => {
                Err(format!("{out} holds a finished super-network; give another --out, or --overwrite")
                    .into())
            }
            Some(name) => Err(format!(
                "{out} holds {name}, but no super-network that it is part of; give another --out"
            )
            .into()),
        }
    }
}

/// The first of the files that are written which is there already.
fn there(args: &TrainArgs) -> Option<&'static str> {
    let written = [SUPERNET, "adapter_config.json", "adapter_model.safetensors", "catalog.json"];
    written.into_iter().find(|name| args.out.join(name).exists())
}

/// Removes a file, if it is there.
pub(super) fn remove(path: &Path) -> Result<(), Failure> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(format!("{}: {error}", path.display()).into())
        }
        _ => Ok(()),
    }
}

const SUPERNET: &str = "supernet.json";

/// Writes adapter, supernet.json, catalog.json, the loss curve and, where there is none, the model card.
pub(super) fn write(
    args: &TrainArgs,
    plan: &Plan,
    trainer: &Trainer,
    log: &TrainingLog,
) -> Result<(), Failure> {
    let tensors = natural_order(plan, trainer.optimizer().values());
    write_adapter(&args.out, &plan.adapter, &tensors, args.adapter_type.into())?;
    let orders = plan.orders.by_group(Layout::of(plan.base.config.family), &plan.space);
    let name = open::name_of(&args.out);
    let (shape, space, base) = (&plan.shape, &plan.space, &plan.base_reference);
    ModelFolder::write_supernet(&args.out, &name, base, plan.adapter.scale(), shape, space, &orders)?;
    ModelFolder::open(&args.out)?.write_catalog(&Catalog::new(shape, space))?;
    write_whole(&args.out.join("loss.svg"), loss_curve(log).as_bytes())?;
    // A card that somebody has written stays, unless everything is to be replaced.
    let path = args.out.join(MODEL_CARD);
    if args.overwrite || !path.exists() {
        write_whole(&path, card(&facts(args, plan, &name), log).as_bytes())?;
    }
    Ok(())
}

fn facts<'a>(args: &'a TrainArgs, plan: &'a Plan, name: &'a str) -> Facts<'a> {
    let space = &plan.space;
    let arguments = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned());
    Facts {
        name,
        folder: &args.out,
        base: open::name_of(plan.base.path()),
        data: &args.data,
        form: args.form.name(),
        sequences: (plan.sequences.len(), super::tokens(&plan.sequences), plan.validation.len()),
        space: format!("{} groups, 10^{:.1} sub-networks", space.groups().len(), space.log10_size()),
        reordered: !plan.orders.is_empty(),
        recipe: &plan.recipe,
        command: std::iter::once("lonas".into()).chain(arguments).collect(),
    }
}

/// The trained tensors by module, put back into the base's own order.
fn natural_order(plan: &Plan, values: Vec<NamedTensor>) -> AdapterTensors {
    let mut by_name = values.into_iter().map(|t| (t.name.clone(), t)).collect::<BTreeMap<_, _>>();
    let mut take = |name: String| {
        let NamedTensor { name, rows, columns, values } = by_name.remove(&name)?;
        Some(HostMatrix { name, rows, columns, data: HostData::F32(values) })
    };
    let layout = Layout::of(plan.base.config.family);
    let mut tensors = AdapterTensors::new();
    for (index, linear) in plan.shape.linears.iter().enumerate() {
        let halves =
            (take(format!("{}.lora_A.weight", linear.name)), take(format!("{}.lora_B.weight", linear.name)));
        let (Some(mut a), Some(mut b)) = halves else { continue };
        let (layer, place) = layout.place(index);
        let (rows, columns) = plan.orders.of_linear(&plan.base.config, layer, place);
        if let Some(order) = rows {
            b = b.permute_rows(&inverse(&order));
        }
        if let Some(order) = columns {
            a = a.permute_columns(&inverse(&order));
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
    let (mut micro_batches, mut distilled) = (Vec::new(), Vec::new());
    let mut validated = [Vec::new(), Vec::new(), Vec::new()];
    for line in log.lines() {
        match line {
            LogLine::MicroBatch { micro_batch, loss, distilled: of_student, .. } => {
                let series = if *of_student { &mut distilled } else { &mut micro_batches };
                series.push((*micro_batch as f64, f64::from(*loss)));
            }
            LogLine::Validation { micro_batch, losses } => {
                let all = [losses.maximal, losses.heuristic, losses.minimal];
                for (series, loss) in validated.iter_mut().zip(all) {
                    series.push((*micro_batch as f64, loss));
                }
            }
        }
    }
    let mut series = vec![plot::Series::dots("each micro-batch's sub-network", micro_batches)];
    if !distilled.is_empty() {
        series.push(plot::Series::dots("each student's divergence", distilled));
    }
    for (name, points) in crate::train::VALIDATED.into_iter().zip(validated) {
        series.push(plot::Series::line(&format!("validation, {name}"), points));
    }
    plot::chart("Training loss", "micro-batch", "loss (nats per token)", &series)
}
