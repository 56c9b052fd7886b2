//! One JSON object a line for each figure, for scripts.

use super::BenchArgs;
use super::case::{Mix, Test};
use super::facts::Facts;
use super::figures::{Figure, Spread};
use crate::backend::cpu::Limits;
use serde_json::{Map, Value, json};

pub(super) fn lines(facts: &Facts, args: &BenchArgs, limits: &[Limits], figures: &[Figure]) -> Vec<Value> {
    let load = json!({
        "test": "load", "seconds": facts.load.seconds, "resident_bytes": facts.load.resident_bytes,
        "weight_bytes": facts.load.weight_bytes,
    });
    let register = json!({
        "test": "register", "seconds": facts.registering.seconds, "bytes": facts.registering.bytes,
    });
    let spread = |of: fn(&Limits) -> Option<f64>| {
        limits.iter().map(of).collect::<Option<Vec<_>>>().map(|values| Spread::of(values.into_iter()))
    };
    let limits = json!({
        "test": "limits",
        "read_bytes_per_second": spread(|l| Some(l.read_bytes_per_second)),
        "f32_flops": spread(|l| Some(l.f32_flops)),
        "bf16_flops": spread(|l| l.bf16_flops),
        "int8_ops": spread(|l| l.int8_ops),
    });
    let noise = json!({
        "test": "noise", "foreign_share": facts.noise.foreign, "stolen_share": facts.noise.stolen,
    });
    let rates = figures.iter().map(|figure| rate(facts, args, figure));
    [load, register, limits].into_iter().chain(rates).chain([noise]).map(|l| with_machine(facts, l)).collect()
}

/// What every line says first.
fn with_machine(facts: &Facts, line: Value) -> Value {
    let machine = json!({
        "machine": facts.machine, "device": facts.device, "dtype": facts.dtype, "threads": facts.threads,
    });
    let fields = [machine, line].into_iter().flat_map(|part| match part {
        Value::Object(fields) => fields,
        _ => Map::new(),
    });
    Value::Object(fields.collect())
}

fn rate(facts: &Facts, args: &BenchArgs, figure: &Figure) -> Value {
    let (model, subnetwork, adapter) = match figure.mix {
        Mix::One { index, adapter } => (Some(&facts.names[index].0), Some(&facts.names[index].1), adapter),
        Mix::All => (None, None, true),
    };
    let (test, context, streams) = match figure.test {
        Test::Prefill { .. } => ("prefill", 0, 1),
        Test::Decode { context, streams, .. } if figure.mix == Mix::All => ("mixed", context, streams),
        Test::Decode { context, streams, .. } => ("decode", context, streams),
    };
    json!({
        "test": test, "model": model, "subnetwork": subnetwork, "adapter": adapter,
        "prompt": args.prompt, "context": context, "streams": streams,
        "rounds": args.rounds, "steps": figure.steps,
        "tokens_per_second": figure.tokens_per_second,
        "seconds_per_step": figure.seconds_per_step,
        "traffic_bytes": figure.traffic, "multiply_adds": figure.multiply_adds,
        "bandwidth": figure.traffic / figure.seconds_per_step,
        "bound": figure.bound, "share_of_bound": figure.share,
        "over_uniform": figure.over_uniform, "adapter_share": figure.adapter_share,
    })
}
