//! Where a training runs, and whether it has room there.

use super::TrainArgs;
use super::plan::Plan;
use crate::backend::reference::Compute;
use crate::cli::Failure;
use crate::cli::device::DeviceArg;
use crate::train::{MemoryNeed, MemoryPlan};

/// What `--device` comes to.
///
/// # Errors
/// A GPU was asked for, and cannot be used.
pub(super) fn open(device: DeviceArg) -> Result<Compute, Failure> {
    match device {
        // The reference backend is what trains; the processor is where it is the reference.
        DeviceArg::Cpu | DeviceArg::Reference => Ok(Compute::cpu()),
        DeviceArg::Cuda(ordinal) => {
            Compute::cuda(ordinal).map_err(|why| format!("--device cuda:{ordinal}: {why}").into())
        }
        DeviceArg::Auto => Ok(Compute::cuda(0).unwrap_or_else(|why| {
            if cfg!(feature = "cuda-train") {
                tracing::info!("training on the processor: {why}");
            }
            Compute::cpu()
        })),
    }
}

/// Says what the training will need of its device's memory.
///
/// # Errors
/// A GPU that has not so much left.
pub(super) fn check_memory(args: &TrainArgs, plan: &Plan) -> Result<(), Failure> {
    let need = need(args, plan);
    let Some((free, total)) = plan.compute.memory() else {
        tracing::info!("needs about {need} of memory");
        return Ok(());
    };
    let gib = |bytes: usize| bytes as f64 / f64::from(1u32 << 30);
    let left = format!("{:.2} of {:.2} GiB are left", gib(free), gib(total));
    tracing::info!("needs about {need} of the GPU's memory; {left}");
    if need.total() <= free as u64 {
        return Ok(());
    }
    let smaller = if args.gradient_checkpointing {
        "a smaller --micro-batch or --cutoff needs less"
    } else {
        "--gradient-checkpointing, a smaller --micro-batch or --cutoff needs less"
    };
    Err(format!("the training needs about {need} of the GPU's memory, and {left}; {smaller}").into())
}

/// Of the largest micro-batch that these sequences could make.
fn need(args: &TrainArgs, plan: &Plan) -> MemoryNeed {
    let mut lengths = plan.sequences.iter().map(|s| s.tokens.len()).collect::<Vec<_>>();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    let memory = MemoryPlan {
        weight_bytes: if plan.compute.rounds_weights() { 2 } else { 4 },
        tokens: lengths.iter().take(plan.recipe.micro_batch).sum(),
        longest: lengths.first().copied().unwrap_or(0),
        graphs: plan.recipe.threads.min(plan.recipe.micro_batch),
        logits_rows: plan.compute.logits_rows(),
        recompute: args.gradient_checkpointing,
        distill: plan.recipe.distill,
        with_optimizer: !plan.compute.is_gpu(),
    };
    MemoryNeed::of(&plan.base.config, &plan.shape, &memory)
}
