//! Logits of tiny super-networks against PyTorch + PEFT, which slices every module by LoNAS's rules.

use crate::golden::{self, Supernet, distance, push};
use lonas::backend::Backend;
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::backend::reference::Reference;
use lonas::model::{Adapters, Batch, Executor};

#[derive(serde::Deserialize)]
pub(crate) struct Cases {
    pub(crate) tokens: Vec<Vec<u32>>,
    pub(crate) cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) choices: Vec<usize>,
}

/// Base, super-network.
pub(crate) const NETS: [(&str, &str); 16] = [
    LLAMAS[0],
    LLAMAS[1],
    LLAMAS[2],
    LLAMAS[3],
    ("tiny-heads/base", "tiny-heads"),
    ("tiny-heads/base", "tiny-heads-ordered"),
    ("tiny-depth/base", "tiny-depth"),
    ("tiny-depth-bias/base", "tiny-depth-bias"),
    ("tiny-llama3/base", "tiny-llama3"),
    ("tiny-mistral/base", "tiny-mistral"),
    ("tiny-qwen2/base", "tiny-qwen2"),
    ("tiny-qwen3/base", "tiny-qwen3"),
    ("tiny-bloom/base", "tiny-bloom"),
    ("tiny-bloom-post/base", "tiny-bloom-post"),
    ("tiny-mpt/base", "tiny-mpt"),
    ("tiny-mpt-split/base", "tiny-mpt-split"),
];

/// LLaMAs whose positions are not scaled.
pub(crate) const LLAMAS: [(&str, &str); 4] = [
    ("tiny-tied/base", "tiny-tied"),
    ("tiny-untied-bf16/base", "tiny-untied-bf16"),
    ("tiny-bias-headdim/base", "tiny-bias-headdim"),
    ("tiny-tied/base", "tiny-tied-ordered"),
];

/// Half of its base is zero, and its adapter counts only where the base is not: it can only be merged.
pub(crate) const SPARSE: (&str, &str) = ("sparse/base", "sparse");

const BLOCK_SIZE: usize = 4;
/// Room for every sub-network's sequences at once.
const BLOCKS: usize = 240;

/// Every sub-network and every sequence in one mixed batch, whole and in chunks of `chunk` tokens, against the golden
/// logits.
fn check<B: Backend>(backend: impl Fn() -> B) {
    for (base, name) in NETS {
        let net = Supernet::open(base, name);
        let Cases { tokens, cases } = golden::json(&format!("{name}/cases.json"));
        let golden = golden_logits(name, &cases, tokens.len());
        for chunk in [100, 5, 1] {
            let logits = run(&net, backend(), &tokens, &cases, chunk);
            for (case, (ours, golden)) in cases.iter().zip(logits.iter().zip(&golden)) {
                for (i, (ours, golden)) in ours.iter().zip(golden).enumerate() {
                    let off = distance(ours, golden);
                    assert!(off <= 1e-4, "{name} {} sequence {i} chunk {chunk}: off by {off}", case.name);
                }
            }
        }
    }
}

/// By case, by sequence: logits `(tokens, V)` as PyTorch has them.
pub(crate) fn golden_logits(name: &str, cases: &[Case], sequences: usize) -> Vec<Vec<Vec<f32>>> {
    let mut golden = golden::tensors(&format!("{name}/logits.safetensors"));
    let mut take = |case: &Case, i: usize| golden.remove(&format!("{}/{i}", case.name)).unwrap();
    cases.iter().map(|case| (0..sequences).map(|i| take(case, i)).collect()).collect()
}

pub(crate) fn run<B: Backend>(
    net: &Supernet,
    backend: B,
    tokens: &[Vec<u32>],
    cases: &[Case],
    chunk: usize,
) -> Vec<Vec<Vec<f32>>> {
    let beside = Adapters::Beside(vec![net.super_adapter()]);
    let mut executor = net.executor(backend, beside, (BLOCKS, BLOCK_SIZE));
    all_logits(&mut *executor, net, tokens, cases, chunk)
}

/// Sub-networks with all ranks, of every width, on a base that has taken in the super-adapter.
fn check_merged<B: Backend>(backend: impl Fn() -> B) {
    for (base, name) in NETS.into_iter().chain([SPARSE]) {
        let net = Supernet::open(base, name);
        let Cases { tokens, cases } = golden::json(&format!("{name}/cases.json"));
        let golden = golden_logits(name, &cases, tokens.len());
        let resolve = |case: &Case| {
            net.space.resolve(&net.shape, &net.space.sub_network(case.choices.clone()).unwrap())
        };
        let keeps = cases.iter().map(|case| net.shape.keeps_ranks(&resolve(case))).collect::<Vec<_>>();
        assert!(keeps.contains(&true) && keeps.contains(&false), "{name}: {keeps:?}");
        let merged = Adapters::Merged(net.super_adapter());
        let mut executor = net.executor(backend(), merged, (BLOCKS, BLOCK_SIZE));
        let logits = all_logits(&mut *executor, &net, &tokens, &cases, 100);
        for ((case, keeps), (ours, golden)) in cases.iter().zip(keeps).zip(logits.iter().zip(&golden)) {
            let off =
                ours.iter().zip(golden).map(|(ours, golden)| distance(ours, golden)).fold(0.0, f32::max);
            // Where ranks are cut, it is another function.
            assert!((off <= 1e-4) == keeps, "{name} {}: off by {off}", case.name);
        }
    }
}

/// By case, by sequence: logits `(tokens, V)`, computed in steps that feed every sequence its next `chunk` tokens.
fn all_logits(
    executor: &mut dyn Executor,
    net: &Supernet,
    tokens: &[Vec<u32>],
    cases: &[Case],
    chunk: usize,
) -> Vec<Vec<Vec<f32>>> {
    let mut logits = vec![vec![Vec::new(); tokens.len()]; cases.len()];
    let longest = tokens.iter().map(Vec::len).max().unwrap();
    for start in (0..longest).step_by(chunk) {
        let (mut batch, mut owners) = (Batch::default(), Vec::new());
        for (c, case) in cases.iter().enumerate() {
            let sub_network = net.space.sub_network(case.choices.clone()).unwrap();
            for (s, sequence) in tokens.iter().enumerate().filter(|(_, t)| t.len() > start) {
                let rows = &sequence[start..(start + chunk).min(sequence.len())];
                // Each sequence has blocks of its own, in an order that is not theirs in the pool.
                let first = (c * tokens.len() + s) * 6;
                let blocks = (0..6).rev().map(|b| (first + b) as u32).collect::<Vec<_>>();
                push(&mut batch, net.selection(c as u32, &sub_network), rows, start, &blocks);
                owners.extend(std::iter::repeat_n((c, s), rows.len()));
            }
        }
        let result = executor.forward(&batch).unwrap();
        for (row, (c, s)) in owners.into_iter().enumerate() {
            logits[c][s].extend_from_slice(result.row(row));
        }
    }
    logits
}

/// Greedy decoding and every logit are the same bit for bit alone and mixed, whole and in chunks.
fn bits<B: Backend>(backend: impl Fn() -> B) {
    for (base, name) in NETS {
        let net = Supernet::open(base, name);
        let Cases { tokens, cases } = golden::json(&format!("{name}/cases.json"));
        let run = |tokens: &[Vec<u32>], cases: &[Case], chunk| run(&net, backend(), tokens, cases, chunk);
        let mixed = run(&tokens, &cases, 100);
        assert!(run(&tokens, &cases, 1) == mixed, "{name}: one token at a time differs");
        assert!(run(&tokens, &cases, 7) == mixed, "{name}: chunks of 7 differ");
        for (case, of_case) in cases.iter().zip(&mixed) {
            for (sequence, logits) in tokens.iter().zip(of_case) {
                let alone = run(std::slice::from_ref(sequence), std::slice::from_ref(case), 100);
                assert!(&alone[0][0] == logits, "{name} {}: alone differs from mixed", case.name);
            }
        }
    }
}

#[test]
fn the_cpu_backend_agrees_with_pytorch() {
    check(|| Cpu::new(Dtype::F32, 2));
    // What the file has in bf16 stays as it is, so that Auto is as exact.
    check(|| Cpu::new(Dtype::Auto, 1));
}

#[test]
fn a_merged_adapter_agrees_with_pytorch_where_no_rank_is_cut() {
    check_merged(|| Cpu::new(Dtype::F32, 2));
    check_merged(Reference::new);
}

#[test]
fn rows_are_independent_bit_for_bit_on_the_cpu_backend() {
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8] {
        bits(|| Cpu::new(dtype, 2));
    }
}

#[test]
fn the_reference_backend_agrees_with_pytorch() {
    check(Reference::new);
}
