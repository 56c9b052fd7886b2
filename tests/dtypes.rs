//! Bases kept in fewer bits: the kernels against plain f32 on weights that this file rounds itself, and what the
//! rounding does to the logits.

use crate::golden::{self, Supernet, distance};
use crate::logits::{Cases, NETS, golden_logits, run};
use half::bf16;
use lonas::artifact::Base;
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::backend::reference::Reference;
use safetensors::tensor::{Dtype as FileType, TensorView};
use std::collections::BTreeMap;

/// Values that share one scale in int8.
const BLOCK: usize = 32;

/// One row of a weight as this number format has it.
type Round = fn(&[f32]) -> Vec<f32>;

fn as_bf16(row: &[f32]) -> Vec<f32> {
    row.iter().map(|&v| bf16::from_f32(v).to_f32()).collect()
}

/// Symmetric, by the largest absolute value of each block along the row; a last block may be shorter.
fn as_int8(row: &[f32]) -> Vec<f32> {
    let block = |block: &[f32]| {
        let step = block.iter().map(|v| v.abs()).fold(0.0, f32::max) / 127.0;
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        block.iter().map(|v| (v * inverse).round().clamp(-127.0, 127.0) * step).collect::<Vec<_>>()
    };
    row.chunks(BLOCK).flat_map(block).collect()
}

/// The same super-network over a base whose matrices are rounded, in f32 files of its own.
fn rounded(base: &str, name: &str, round: Round) -> (Supernet, tempfile::TempDir) {
    let mut net = Supernet::open(base, name);
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden::path(base).join("config.json"), folder.path().join("config.json")).unwrap();
    let mut encoded = Vec::new();
    for (tensor, shape, values) in base_tensors(base) {
        // The channels of a reordered network are put in order before they are packed, and blocks run along them.
        let layer = tensor.strip_prefix("model.layers.").and_then(|t| t.split_once(".mlp.down_proj"));
        let order = layer.and_then(|(layer, _)| net.orders.get(&layer.parse::<usize>().unwrap()));
        let values = match shape.as_slice() {
            &[_, columns] => {
                let in_order = (0..columns).collect::<Vec<_>>();
                let order = order.unwrap_or(&in_order);
                values.chunks_exact(columns).flat_map(|row| round_in_order(row, order, round)).collect()
            }
            _ => values,
        };
        encoded.push((tensor, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>()));
    }
    let views = encoded
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(FileType::F32, shape.clone(), bytes).unwrap()));
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
    net.base = Base::open(folder.path()).unwrap();
    (net, folder)
}

fn round_in_order(row: &[f32], order: &[usize], round: Round) -> Vec<f32> {
    let mut result = vec![0.0; row.len()];
    let permuted = order.iter().map(|&i| row[i]).collect::<Vec<_>>();
    for (&i, value) in order.iter().zip(round(&permuted)) {
        result[i] = value;
    }
    result
}

/// Every tensor of a golden base, in f32: name, shape, values.
fn base_tensors(base: &str) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let mut tensors = BTreeMap::new();
    for entry in std::fs::read_dir(golden::path(base)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let bytes = std::fs::read(path).unwrap();
        for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().iter() {
            let values = match view.dtype() {
                FileType::F32 => {
                    view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
                }
                FileType::BF16 => view
                    .data()
                    .chunks_exact(2)
                    .map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
                    .collect(),
                other => panic!("{name} is {other:?}"),
            };
            tensors.insert(name.to_string(), (view.shape().to_vec(), values));
        }
    }
    tensors.into_iter().map(|(name, (shape, values))| (name, shape, values)).collect()
}

/// The errors of 3 layers' 21 products add up like independent ones, `sqrt(21)` times a single one's; layers of large
/// random weights, whose softmax is steep, amplify them 4 to 6 times more. Something wrong moves logits by about 1.
const AMPLIFIED: f32 = 8.0;

/// The cpu backend in `dtype` on the base as it is, against the reference backend in f32 on the rounded base: what
/// is left is the kernels' own error. And both against PyTorch on the unrounded base: what the rounding costs, as the
/// Euclidean distance over the golden norm. `error` is a rounded weight's, root mean square, over the weights' own.
fn check(dtype: Dtype, round: Round, error: f32) {
    let cost = AMPLIFIED * 21f32.sqrt() * error;
    for (base, name) in NETS {
        let Cases { tokens, cases } = golden::json(&format!("{name}/cases.json"));
        let (rounded, _folder) = rounded(base, name, round);
        let expected = run(&rounded, Reference::new(), &tokens, &cases, 100).concat().concat();
        let net = Supernet::open(base, name);
        for threads in [1, 2] {
            let ours = run(&net, Cpu::new(dtype, threads), &tokens, &cases, 6).concat().concat();
            let off = distance(&ours, &expected);
            assert!(off <= 1e-4, "{name} in {dtype:?} is off by {off}");
        }
        let golden = golden_logits(name, &cases, tokens.len()).concat().concat();
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
        let off = norm(&mut expected.iter().zip(&golden).map(|(a, b)| a - b));
        let off = off / norm(&mut golden.iter().copied());
        assert!(off <= cost, "{name}: rounding to {dtype:?} moves the logits by {off} of their norm");
    }
}

#[test]
fn bf16_kernels_are_exact_on_rounded_weights() {
    // 8 bits of mantissa: off by up to 2^-9 of itself, uniformly, and a bit less for mantissas above 1.
    check(Dtype::Bf16, as_bf16, 0.0008);
}

#[test]
fn int8_kernels_are_exact_on_rounded_weights() {
    // The largest of 32 normal weights is about 2.3 deviations, a step that over 127, the error a step over sqrt(12).
    check(Dtype::Int8, as_int8, 0.0053);
}
