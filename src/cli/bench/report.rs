//! `--report DIR`: everything that a few minutes on a machine are worth, in one folder.

use super::BenchArgs;
use super::case::Driver;
use crate::backend::Selection;
use crate::cli::Failure;
use crate::cli::open::{Named, Opened};
use crate::model::Executor;
use serde_json::Value;
use std::fmt::Write as _;
use std::path::Path;

/// Positions of the comparison's prompt, at most, and those at its end whose logits are compared.
const COMPARED: usize = 128;
const OUTPUTS: usize = 16;
/// A share of the logits' norm that rounding to bf16 or 8 bits stays below, and a wrong kernel does not; four bits made of a finer
/// base may go beyond it.
const MOST_OFF: f64 = 0.15;

/// Writes `bench.txt` and `bench.json`, the figures as they were printed.
pub(super) fn figures(folder: &Path, text: &str, lines: &[Value]) -> Result<(), Failure> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("bench.txt"), text)?;
    write_lines(folder, "bench.json", lines)
}

fn write_lines(folder: &Path, name: &str, lines: &[Value]) -> Result<(), Failure> {
    let text = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    Ok(std::fs::write(folder.join(name), text)?)
}

/// Writes `checks.txt`: every sub-network's logits beside those of the processor in f32.
///
/// # Errors
/// They differ by more than rounding.
pub(super) fn checks(
    folder: &Path,
    args: &BenchArgs,
    opened: &Opened,
    selections: &[Named],
    executor: &mut dyn Executor,
) -> Result<(), Failure> {
    let pool = executor.blocks() * executor.block_size();
    let tokens = COMPARED.min(pool).min(opened.base.config.max_positions);
    let mut exact = args.compute.exact(opened, tokens)?;
    let (mut text, mut worst) = (String::new(), 0.0f64);
    for ((_, name), selection) in selections {
        let ours = logits(executor, tokens, selection)?;
        let theirs = logits(&mut *exact, tokens, selection)?;
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        let off = norm(&mut ours.iter().zip(&theirs).map(|(a, b)| f64::from(a - b)));
        let off = off / norm(&mut theirs.iter().map(|x| f64::from(*x)));
        let vocabulary = executor.vocabulary();
        let likeliest =
            |logits: &[f32]| logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i);
        let rows = ours.chunks_exact(vocabulary).zip(theirs.chunks_exact(vocabulary));
        let same = rows.filter(|(ours, theirs)| likeliest(ours) == likeliest(theirs)).count();
        let _ = writeln!(
            text,
            "{name}: logits are off by {off:.5} of their norm; {same} of {} likeliest tokens are the same",
            ours.len() / vocabulary
        );
        worst = if off.is_nan() { f64::INFINITY } else { worst.max(off) };
    }
    std::fs::write(folder.join("checks.txt"), &text)?;
    if worst > MOST_OFF {
        return Err(format!(
            "logits are not those of the processor in f32, see {}:\n{text}",
            folder.join("checks.txt").display()
        )
        .into());
    }
    Ok(())
}

/// Of the last positions of a prompt.
fn logits(executor: &mut dyn Executor, tokens: usize, selection: &Selection) -> Result<Vec<f32>, Failure> {
    let batch = Driver::new(executor, tokens, tokens).whole(tokens, OUTPUTS, selection);
    Ok(executor.forward(&batch)?.values)
}

/// Writes `operations.txt` and `operations.json`: single operations on the GPU, over this base's sizes and LLaMA-7B's.
#[cfg(feature = "cuda")]
pub(super) fn operations(folder: &Path, args: &BenchArgs, opened: &Opened) -> Result<(), Failure> {
    use crate::backend::AttentionShape;
    use crate::backend::cuda::{LayerSizes, Measured, operations};
    let Some(cuda) = args.compute.gpu()? else { return Ok(()) };
    let config = &opened.base.config;
    let (query_heads, kv_heads, head_size) = (config.query_heads, config.kv_heads, config.head_size);
    let own = LayerSizes {
        hidden: config.hidden,
        mlp: config.intermediate,
        vocabulary: config.vocabulary,
        attention: AttentionShape::new(query_heads, kv_heads, head_size),
        ..LayerSizes::LLAMA_7B
    };
    let measured = Measured { bytes: args.report_bytes, rounds: args.rounds, rows: args.report_rows.clone() };
    let mut models = vec![("this base", own)];
    if args.report_llama_7b {
        models.push(("LLaMA-7B", LayerSizes::LLAMA_7B));
    }
    let (mut text, mut lines) = (String::new(), Vec::new());
    for (model, sizes) in models {
        let _ = writeln!(
            text,
            "{model}\n{:<20} {:>5} {:>8} {:>10} {:>9} {:>9}",
            "", "rows", "adapter", "us", "GB/s", "TFLOP/s"
        );
        for figure in operations(cuda, &sizes, &measured)? {
            let (bandwidth, flops) =
                (figure.bytes as f64 / figure.seconds, 2.0 * figure.multiply_adds as f64 / figure.seconds);
            let adapter = if figure.adapter { "yes" } else { "no" };
            let _ = writeln!(
                text,
                "{:<20} {:>5} {adapter:>8} {:>10.1} {:>9.0} {:>9.1}",
                figure.operation,
                figure.rows,
                figure.seconds * 1e6,
                bandwidth / 1e9,
                flops / 1e12
            );
            lines.push(serde_json::json!({
                "machine": cuda.name(), "model": model, "operation": figure.operation, "rows": figure.rows,
                "adapter": figure.adapter, "seconds": figure.seconds, "bandwidth": bandwidth, "flops": flops,
            }));
        }
    }
    std::fs::write(folder.join("operations.txt"), text)?;
    write_lines(folder, "operations.json", &lines)
}
