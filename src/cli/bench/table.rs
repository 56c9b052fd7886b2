//! The figures for people.

use super::BenchArgs;
use super::case::{Mix, Test};
use super::facts::{Facts, Noise};
use super::figures::{Bound, Figure, Spread};
use crate::backend::cpu::Limits;
use std::fmt::Write;

/// Width of a cell.
const CELL: usize = 24;
/// Behind the name of a sub-network that was measured without its adapter.
const BARE: &str = " bare";

pub(super) fn text(facts: &Facts, args: &BenchArgs, limits: &[Limits], figures: &[Figure]) -> String {
    let mut text = head(facts, limits);
    let legend = "tokens/s: median min..max, share of the bound (m: memory, a: arithmetic)";
    // Writing to a string cannot fail, so the results are dropped throughout.
    let steps = figures.iter().find(|f| matches!(f.test, Test::Prefill { .. })).map_or(1, |f| f.steps);
    let _ = writeln!(text, "\nprefill of {} tokens, steps: {steps}; {legend}", args.prompt);
    rows(&mut text, facts, figures, &|f| matches!(f.test, Test::Prefill { .. }), "one prompt");
    let mut contexts = figures.iter().filter_map(context).collect::<Vec<_>>();
    contexts.dedup();
    for at in contexts {
        let _ = writeln!(text, "\ndecode from {at} tokens of context, all streams together; {legend}");
        rows(&mut text, facts, figures, &|f| context(f) == Some(at), "");
    }
    adapters(&mut text, facts, figures);
    text
}

fn context(figure: &Figure) -> Option<usize> {
    match figure.test {
        Test::Prefill { .. } => None,
        Test::Decode { context, .. } => Some(context),
    }
}

fn head(facts: &Facts, limits: &[Limits]) -> String {
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    let resident =
        facts.load.resident_bytes.map_or(String::new(), |b| format!(", {:.0} MiB resident", mib(b)));
    let giga = |of: fn(&Limits) -> Option<f64>| {
        let values = limits.iter().map(of).collect::<Option<Vec<_>>>();
        values.map_or("none".into(), |v| format!("{:.1}", Spread::of(v.into_iter()).median / 1e9))
    };
    let (read, f32) = (giga(|l| Some(l.read_bytes_per_second)), giga(|l| Some(l.f32_flops)));
    format!(
        "{}; {}\nloaded in {:.2} s{resident}, weights {:.0} MiB; one more sub-network: {:.1} us, {} bytes\n\
         bound: memory {read} GB/s; arithmetic, G/s: f32 {f32}, bf16 {}, int8 {}{}\n",
        facts.machine,
        facts.description,
        facts.load.seconds,
        mib(facts.load.weight_bytes),
        facts.registering.seconds * 1e6,
        facts.registering.bytes,
        giga(|l| l.bf16_flops),
        giga(|l| l.int8_ops),
        noise(&facts.noise)
    )
}

fn noise(noise: &Noise) -> String {
    let (Some(foreign), Some(stolen)) = (noise.foreign, noise.stolen) else { return String::new() };
    format!(
        "\nmeanwhile other processes took {:.0}% of this machine, its host {:.0}%",
        100.0 * foreign,
        100.0 * stolen
    )
}

/// A line for each sub-network and the mix, a column for each number of streams.
fn rows(
    text: &mut String,
    facts: &Facts,
    figures: &[Figure],
    wanted: &dyn Fn(&Figure) -> bool,
    only_column: &str,
) {
    let wanted = figures.iter().filter(|f| wanted(f)).collect::<Vec<_>>();
    let mut streams = wanted.iter().map(|f| f.test.streams()).collect::<Vec<_>>();
    streams.dedup();
    let names = names(facts);
    let _ = write!(text, "{:<names$}", "sub-network");
    for &streams in &streams {
        let title = if only_column.is_empty() { format!("x{streams}") } else { only_column.into() };
        let _ = write!(text, " {title:>CELL$}");
    }
    text.push('\n');
    let named = (0..facts.names.len()).flat_map(|index| {
        [(true, ""), (false, BARE)]
            .map(|(adapter, suffix)| (Mix::One { index, adapter }, facts.label(index) + suffix))
    });
    for (mix, name) in named.chain([(Mix::All, "all mixed".into())]) {
        let of_mix = wanted.iter().filter(|f| f.mix == mix).collect::<Vec<_>>();
        if of_mix.is_empty() {
            continue;
        }
        let _ = write!(text, "{name:<names$}");
        for &streams in &streams {
            let cell = of_mix.iter().find(|f| f.test.streams() == streams).map_or(String::new(), |f| cell(f));
            let _ = write!(text, " {cell:>CELL$}");
        }
        let ratio = of_mix.iter().find_map(|f| f.over_uniform);
        let ratio =
            ratio.map_or(String::new(), |r| format!("  takes {r:.2} of the uniform batches' mean time"));
        let _ = writeln!(text, "{ratio}");
    }
}

/// Width of the first column.
fn names(facts: &Facts) -> usize {
    let longest = (0..facts.names.len()).map(|index| facts.label(index).len()).max().unwrap_or(0);
    longest.max("sub-network".len()) + BARE.len()
}

fn cell(figure: &Figure) -> String {
    let Spread { median, min, max } = figure.tokens_per_second;
    let bound = if figure.bound == Bound::Memory { 'm' } else { 'a' };
    let digits = decimals(min);
    format!("{median:.digits$} {min:.digits$}..{max:.digits$} {:.0}%{bound}", 100.0 * figure.share)
}

/// So many that a rate has three digits.
fn decimals(rate: f64) -> usize {
    match rate {
        100.0.. => 0,
        10.0.. => 1,
        _ => 2,
    }
}

/// What adapters cost, where it was measured.
fn adapters(text: &mut String, facts: &Facts, figures: &[Figure]) {
    let costs = figures.iter().filter_map(|f| Some((f, f.adapter_share?))).collect::<Vec<_>>();
    if costs.is_empty() {
        return;
    }
    let _ = writeln!(text, "\nshare of the time that the adapter takes");
    let names = names(facts);
    for index in 0..facts.names.len() {
        let _ = write!(text, "{:<names$}", facts.label(index));
        for (figure, share) in costs.iter().filter(|(f, _)| f.mix == Mix::One { index, adapter: true }) {
            let test = match figure.test {
                Test::Prefill { .. } => "prefill".to_string(),
                Test::Decode { context, streams, .. } => format!("x{streams}@{context}"),
            };
            let _ = write!(text, "  {test} {:.1}%", 100.0 * share);
        }
        text.push('\n');
    }
}
