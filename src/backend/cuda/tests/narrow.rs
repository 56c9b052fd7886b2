//! Small weights, which have kernels of their own: results are those of the kernels for all weights, bit for bit, but where a norm is
//! done on the way, whose sums a GPU rounds as each kernel was compiled.

use super::*;
use crate::backend::cuda::device::How;
use crate::backend::cuda::few::Few;
use crate::backend::cuda::rows::Rows;

/// With kernels of their own for small weights, and without.
fn both_kinds() -> [Cuda; 2] {
    [gpu(), Cuda::open_as(0, How { apart: true, narrow: false, ..How::RULE }).unwrap()]
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// With three super-adapters, of which the second leaves a Linear without a bias alone.
fn small(gpu: &Cuda, seed: u64, size: (usize, usize, usize), bias: bool) -> Linear<Cuda> {
    let mut small = linear(gpu, seed, size, bias);
    small
        .adapters
        .extend(linear(gpu, seed + 3, (size.0, size.1, size.2.div_ceil(2)), bias).adapters.drain(..1));
    small
}

/// Rows of `lengths` with sizes and super-adapters that take turns, of a Linear and of one that takes its outputs.
fn taking_turns(lengths: &[usize], adapters: usize, (out, inp, rank): (usize, usize, usize)) -> Vec<Segment> {
    let mut start = 0;
    let segment = |(i, &length): (usize, &usize)| {
        let part = |size: usize, i: usize| (size * [7, 3, 6, 1][i % 4]).div_ceil(7);
        let adapter = i % adapters;
        let most = if adapter == 2 { rank.div_ceil(2) } else { rank };
        let rank = |i| part(most, i);
        let up = ActiveLinear { out: part(out, i), inp: part(inp, i / 3), rank: rank(i) };
        let down = ActiveLinear { out: part(inp, i / 3), inp: part(out, i), rank: rank(i + 1) };
        start += length;
        let shape = Arc::new(ActiveShape { linears: vec![up, down] });
        let selection = Selection { adapter, subnetwork: i as u32, shape };
        Segment { rows: start - length..start, selection }
    };
    lengths.iter().enumerate().map(segment).collect()
}

/// Whatever a layer multiplies: Linears and an MLP, without a norm and with one.
fn products(
    gpu: &Cuda,
    size: (usize, usize, usize),
    x: &Rows,
    segments: &[Segment],
    narrow: bool,
) -> [Vec<f32>; 2] {
    let (out, inp, rank) = size;
    let [gate, up] = [3, 4].map(|seed| small(gpu, seed, size, true));
    let down = Linear { index: 1, ..small(gpu, 5, (inp, out, rank), false) };
    let [q, k] =
        [(11, out.div_ceil(3)), (12, out)].map(|(seed, out)| small(gpu, seed, (out, inp, rank), seed == 11));
    let bare = Linear { adapters: vec![None, None, None], ..linear(gpu, 14, (out, inp, 1), true) };
    let (rows, width) = (x.length, x.width);
    assert_eq!(Few::has_narrow(&gpu.device, (rows, width), &[&q, &k, &bare], false), narrow, "{size:?}");
    assert_eq!(Few::has_narrow(&gpu.device, (rows, out), &[&down], false), narrow, "{size:?}");
    let weight = gpu.vector(vector(6, inp)).unwrap();
    let norm = || Norm { weight: &weight, eps: 1e-5 };
    let three = |norm| gpu.linears(x, norm, [&k, &bare, &k], segments).unwrap();
    let mut all = three(None).into_iter().collect::<Vec<_>>();
    let shape = &segments[0].selection.shape.linears;
    let of_q = ActiveLinear { out: out.div_ceil(4), inp, rank: shape[0].rank };
    let shape = Arc::new(ActiveShape { linears: vec![of_q] });
    let selection = Selection { shape, ..segments[0].selection.clone() };
    all.push(gpu.linear(x, &q, &[Segment { rows: 0..rows, selection }]).unwrap());
    let mlp = GatedMlp { gate, up, down };
    all.push(gpu.gated_mlp(x, &mlp, segments).unwrap());
    // Of more rows the others have their norm before, which rounds every input elsewhere.
    let mut normed = Vec::new();
    if rows <= 4 {
        normed.extend(three(Some(norm())));
        let again = gpu.select(x, &(0..rows as u32).collect::<Vec<_>>()).unwrap();
        normed.push(gpu.gated_mlp_onto(again, norm(), &mlp, segments).unwrap());
    }
    [all, normed].map(|all| all.into_iter().flat_map(|rows| gpu.host(rows).unwrap()).collect())
}

#[test]
fn small_weights_give_the_bits_of_the_kernels_for_all_weights() {
    let lengths: [&[usize]; 6] = [&[1], &[2, 1], &[4], &[1; 5], &[3, 2, 2], &[1; 8]];
    let sizes = [(1, 1, 1), (17, 70, 5), (33, 255, 32), (40, 257, 9), (130, 768, 31), (96, 576, 32)];
    for (i, size) in sizes.into_iter().enumerate() {
        for (j, lengths) in lengths.into_iter().enumerate() {
            // Three super-adapters are more than a block shrinks for.
            let segments = taking_turns(lengths, 1 + (i + j) % 3, size);
            let count = lengths.iter().sum();
            let [got, expected] = both_kinds().map(|gpu| {
                let narrow = gpu.device.has_narrow();
                products(&gpu, size, &rows(&gpu, 7, count, size.1), &segments, narrow)
            });
            let what = format!("{size:?}, {lengths:?}");
            assert!(got.iter().flatten().all(|number| number.is_finite()), "{what}");
            assert_eq!(bits(&got[0]), bits(&expected[0]), "{what}");
            // Another last bit of a norm can make another bf16 number of an input.
            same(&format!("{what}, normed"), &got[1], &expected[1], BF16);
        }
    }
}

/// The largest that there are, where a shrink has two parts.
#[test]
fn the_widest_of_small_weights_give_those_bits_too() {
    for ((out, inp, rank), lengths) in [
        ((20, 1536, 32), &[1][..]),
        ((33, 1536, 17), &[2, 6]),
        ((16, 1025, 32), &[1, 1, 1]),
        ((50, 1087, 4), &[8]),
    ] {
        let segments = taking_turns(lengths, lengths.len().min(2), (out, inp, rank));
        let count = lengths.iter().sum::<usize>();
        let [got, expected] = both_kinds().map(|gpu| {
            let (small, x) = (small(&gpu, 1, (out, inp, rank), true), rows(&gpu, 7, count, inp));
            assert_eq!(Few::has_narrow(&gpu.device, (count, inp), &[&small], false), gpu.device.has_narrow());
            let y = gpu.linear_onto(rows(&gpu, 8, count, out), &x, &small, &segments).unwrap();
            gpu.host(y).unwrap()
        });
        assert_eq!(bits(&got), bits(&expected), "{out}x{inp} rank {rank}, {lengths:?}");
    }
}

#[test]
fn a_row_of_small_weights_is_the_same_alone_and_beside_other_super_adapters() {
    let (gpu, size) = (gpu(), (40, 257, 9));
    let all = taking_turns(&[1; 8], 3, size);
    let small = small(&gpu, 1, size, true);
    let weight = gpu.vector(vector(6, size.1)).unwrap();
    let x = rows(&gpu, 3, 8, size.1);
    for normed in [false, true] {
        let product = |x: &Rows, segments: &[Segment]| {
            let norm = normed.then_some(Norm { weight: &weight, eps: 1e-5 });
            let [y] = gpu.linears(x, norm, [&small], segments).unwrap();
            gpu.host(y).unwrap()
        };
        let mixed = product(&x, &all);
        for (row, segment) in all.iter().enumerate() {
            let alone = gpu.select(&x, &[row as u32]).unwrap();
            let segment = Segment { rows: 0..1, selection: segment.selection.clone() };
            let of_row = &mixed[row * size.0..(row + 1) * size.0];
            let alone = product(&alone, &[segment]);
            if normed {
                same(&format!("row {row}, normed"), &alone, of_row, BF16);
            } else {
                assert_eq!(bits(&alone), bits(of_row), "row {row}");
            }
        }
    }
}

#[test]
fn a_gate_with_an_adapter_beside_an_up_without_one_is_what_the_reference_computes() {
    fn gated<B: Backend>(backend: &B, count: usize, segments: &[Segment]) -> Vec<f32> {
        let gate = linear(backend, 3, (40, 24, 5), true);
        let up = Linear { adapters: vec![None, None], ..linear(backend, 4, (40, 24, 1), true) };
        let down = Linear { index: 1, ..linear(backend, 5, (24, 40, 5), true) };
        let x = rows(backend, 7, count, 24);
        backend.host(backend.gated_mlp(&x, &GatedMlp { gate, up, down }, segments).unwrap()).unwrap()
    }
    let shape = vec![ActiveLinear { out: 40, inp: 24, rank: 5 }, ActiveLinear { out: 24, inp: 40, rank: 5 }];
    for count in [1, 3, 9] {
        let segments = segments(count, "distinct", std::slice::from_ref(&shape));
        let run = (
            |gpu: &Cuda| gated(gpu, count, &segments),
            |backend: &Reference| gated(backend, count, &segments),
        );
        both(&format!("{count} rows"), ROUNDED, run);
    }
}
