//! Every kernel against the reference backend over ugly sizes, on whatever GPU the driver knows: a real one, or the
//! emulator of kernels/emulator.
//!
//! Products round what they take to bf16. So they are compared twice: over small whole numbers, where nothing is rounded and
//! results must be equal, and over others, to bf16's rounding.

mod attention;
mod blocks;
mod decoding;
mod many;
mod narrow;
mod plain;
mod sampling;
mod sight;
mod training;

use super::Cuda;
use crate::backend::reference::Reference;
use crate::backend::{
    Adapter, AttentionShape, Backend, CacheLayout, GatedMlp, Linear, Norm, Segment, Selection, SequenceSpan,
};
use crate::supernet::{ActiveLinear, ActiveShape};
use crate::weights::{HostData, HostMatrix, HostVector};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// Rows of a batch; more on a real GPU would be as quick, on the emulator they are not.
const ROWS: [usize; 8] = [1, 2, 3, 7, 16, 30, 64, 133];
const DISTRIBUTIONS: [&str; 3] = ["identical", "distinct", "skewed"];

fn gpu() -> Cuda {
    Cuda::apart(0).unwrap()
}

/// What rounding to bf16 may do to a result, beside the largest.
const ROUNDED: f32 = 1e-2;
/// One number's rounding.
const BF16: f32 = 1.0 / 256.0;

/// Numbers that bf16 holds.
fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| bf16::from_f32(random.random_range(-1.0..1.0)).to_f32()).collect()
}

fn host(seed: u64, rows: usize, columns: usize) -> HostMatrix {
    HostMatrix { name: format!("m{seed}"), rows, columns, data: HostData::F32(random(seed, rows * columns)) }
}

fn vector(seed: u64, length: usize) -> HostVector {
    HostVector { name: format!("v{seed}"), data: random(seed, length) }
}

/// `count` rows of `width` numbers on the backend's side.
fn rows<B: Backend>(backend: &B, seed: u64, count: usize, width: usize) -> B::Rows {
    let table = backend.table(host(seed, count, width)).unwrap();
    backend.embed(&table, &(0..count as u32).collect::<Vec<_>>()).unwrap()
}

/// Whole numbers from -3 to 3, or in place of most of them zeros.
fn whole(seed: u64, rows: usize, columns: usize, sparse: bool) -> HostMatrix {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let number = |_| match random.random_range(0..if sparse { columns.div_ceil(6) } else { 1 }) {
        0 => random.random_range(-3i8..=3).into(),
        _ => 0.0,
    };
    HostMatrix {
        name: format!("w{seed}"),
        rows,
        columns,
        data: HostData::F32((0..rows * columns).map(number).collect()),
    }
}

/// With two super-adapters, the second of which leaves a Linear without a bias alone.
fn linear<B: Backend>(backend: &B, seed: u64, size: (usize, usize, usize), bias: bool) -> Linear<B> {
    let weight = host(seed, size.0, size.1);
    linear_of(backend, weight, seed, size, bias, |seed, rows, columns, _| host(seed, rows, columns))
}

/// With adapters and bias that `host` makes; those that are to be sparse it is told.
fn linear_of<B: Backend>(
    backend: &B,
    weight: HostMatrix,
    seed: u64,
    (out, inp, rank): (usize, usize, usize),
    bias: bool,
    host: impl Fn(u64, usize, usize, bool) -> HostMatrix,
) -> Linear<B> {
    let weight = backend.matrix(weight).unwrap();
    let adapter = |seed: u64, scale| {
        let hosts = [host(seed, rank, inp, true), host(seed + 1, out, rank, false)];
        let [a, b] = backend.adapter(hosts[0].clone(), hosts[1].clone(), &weight).unwrap();
        Adapter { a, b, scale }
    };
    let adapters = vec![Some(adapter(seed + 50, 2.0)), bias.then(|| adapter(seed + 60, 0.5))];
    let bias = bias.then(|| {
        let data = host(seed + 9, 1, out, false).to_f32();
        backend.vector(HostVector { name: format!("b{seed}"), data }).unwrap()
    });
    Linear { index: 0, weight: Arc::new(weight), bias, adapters }
}

/// Segments over all rows; sizes run through `actives`, super-adapters alternate.
fn segments(rows: usize, distribution: &str, actives: &[Vec<ActiveLinear>]) -> Vec<Segment> {
    let lengths = match distribution {
        "identical" => vec![rows],
        "distinct" => vec![1; rows],
        _ => match rows.div_ceil(8) {
            last if rows > last => vec![rows - last, last],
            _ => vec![rows],
        },
    };
    let mut start = 0;
    let segment = |(i, length): (usize, usize)| {
        let shape = Arc::new(ActiveShape { linears: actives[i % actives.len()].clone() });
        start += length;
        let selection = Selection { adapter: i % 2, subnetwork: i as u32, shape };
        Segment { rows: start - length..start, selection }
    };
    lengths.into_iter().enumerate().map(segment).collect()
}

/// Compares in a way that a NaN fails: numbers may be off by a share of the largest.
fn same(what: &str, got: &[f32], expected: &[f32], off_by: f32) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let off = (got - expected).abs();
        assert!(off <= off_by * largest, "{what}: number {i} is {got}, not {expected} (of {largest})");
    }
}

/// The same on both.
fn both(what: &str, off_by: f32, run: (impl FnOnce(&Cuda) -> Vec<f32>, impl FnOnce(&Reference) -> Vec<f32>)) {
    same(what, &(run.0)(&gpu()), &(run.1)(&Reference::new()), off_by);
}

/// A generic function on both backends.
macro_rules! on_both {
    ($what:expr, $off_by:expr, $function:ident($($argument:expr),*)) => {
        both(
            &$what,
            $off_by,
            (|gpu| $function(gpu, $($argument),*), |reference| $function(reference, $($argument),*)),
        )
    };
}

/// Of whole numbers.
fn product<B: Backend>(
    backend: &B,
    size: (usize, usize, usize),
    count: usize,
    onto: bool,
    segments: &[Segment],
) -> Vec<f32> {
    product_of(backend, whole(1, size.0, size.1, false), size.2, count, onto, segments)
}

fn product_of<B: Backend>(
    backend: &B,
    weight: HostMatrix,
    rank: usize,
    count: usize,
    onto: bool,
    segments: &[Segment],
) -> Vec<f32> {
    let size = (weight.rows, weight.columns, rank);
    let linear = linear_of(backend, weight, 1, size, size.0 % 2 == 1, whole);
    let rows = |seed, width| {
        let table = backend.table(whole(seed, count, width, false)).unwrap();
        backend.embed(&table, &(0..count as u32).collect::<Vec<_>>()).unwrap()
    };
    let x = rows(7, size.1);
    let y = if onto {
        backend.linear_onto(rows(8, size.0), &x, &linear, segments)
    } else {
        backend.linear(&x, &linear, segments)
    };
    backend.host(y.unwrap()).unwrap()
}

#[test]
fn the_low_rank_product_is_what_the_reference_computes() {
    let sizes =
        [(1, 1, 1), (5, 17, 3), (33, 100, 8), (48, 64, 24), (23, 131, 33), (17, 1100, 3), (13, 20, 300)];
    for (out, inp, rank) in sizes {
        let part = |n: usize, d: usize| {
            let part = |size: usize| (size * n / d).max(1);
            vec![ActiveLinear { out: part(out), inp: part(inp), rank: part(rank) }]
        };
        // The last two are of layers that go without this Linear.
        let nothing = [(out, 0), (0, inp)].map(|(out, inp)| vec![ActiveLinear { out, inp, rank: 0 }]);
        let parts = [part(1, 1), part(3, 4), part(2, 3), part(1, 2)];
        let actives = parts.into_iter().chain(nothing).collect::<Vec<_>>();
        for count in ROWS {
            for distribution in DISTRIBUTIONS {
                let segments = segments(count, distribution, &actives);
                let what = format!("{out}x{inp} rank {rank}, {count} rows, {distribution}");
                on_both!(what, 0.0, product((out, inp, rank), count, count % 2 == 0, &segments));
            }
        }
    }
}

/// Large enough for every tile that there is, of which the emulator, with its few multiprocessors, then takes the largest.
#[test]
fn tiles_of_all_sizes_compute_the_same_product() {
    let actives = |out: usize| {
        [(out, 40, 8), (out / 2, 33, 1), (1, 40, 8), (out - 1, 7, 3)]
            .map(|(out, inp, rank)| vec![ActiveLinear { out, inp, rank }])
    };
    for out in [70, 200, 301] {
        for distribution in DISTRIBUTIONS {
            let segments = segments(133, distribution, &actives(out));
            on_both!(
                format!("{out} outputs, {distribution}"),
                0.0,
                product((out, 40, 8), 133, true, &segments)
            );
        }
    }
    let actives = [300, 77, 0, 299].map(|kept| {
        let ranks = if kept == 0 { [0; 2] } else { [1 + kept % 5, 5] };
        let up = ActiveLinear { out: kept, inp: 24, rank: ranks[0] };
        vec![up, ActiveLinear { out: 24, inp: kept, rank: ranks[1] }]
    });
    for (count, width) in [(40, 300), (133, 300)] {
        let segments = segments(count, "skewed", &actives);
        on_both!(format!("{count} rows, {width} wide"), ROUNDED, mlp(count, 24, width, &segments));
    }
}

#[test]
fn a_row_is_the_same_bit_for_bit_whatever_runs_beside_it() {
    let (gpu, size) = (gpu(), (21, 70, 5));
    let linear = linear(&gpu, 1, size, true);
    let actives = [(21, 70, 5), (9, 33, 2), (1, 64, 5), (16, 1, 1)]
        .map(|(out, inp, rank)| vec![ActiveLinear { out, inp, rank }]);
    let all = segments(19, "distinct", &actives);
    let x = rows(&gpu, 3, 19, 70);
    let mixed = gpu.host(gpu.linear(&x, &linear, &all).unwrap()).unwrap();
    for row in [0, 1, 7, 8, 18] {
        let alone = gpu.select(&x, &[row as u32]).unwrap();
        let segment = Segment { rows: 0..1, selection: all[row].selection.clone() };
        let alone = gpu.host(gpu.linear(&alone, &linear, &[segment]).unwrap()).unwrap();
        assert_eq!(alone, mixed[row * 21..(row + 1) * 21], "row {row}");
    }
}

/// Three Linears of normed rows, of which the last has no adapters, one after the other.
fn normed<B: Backend>(backend: &B, count: usize, width: usize, segments: &[Segment]) -> Vec<f32> {
    let weight = backend.vector(vector(6, width)).unwrap();
    let x = rows(backend, 7, count, width);
    let [one, other] = [(3, 33), (4, 20)].map(|(seed, out)| linear(backend, seed, (out, width, 9), true));
    let bare = Linear { adapters: vec![None, None], ..linear(backend, 5, (8, width, 1), false) };
    let norm = Some(Norm { weight: &weight, eps: 1e-5 });
    let all = backend.linears(&x, norm, [&one, &other, &bare], segments).unwrap();
    all.into_iter().flat_map(|rows| backend.host(rows).unwrap()).collect()
}

#[test]
fn linears_of_normed_rows_are_what_the_reference_computes() {
    let actives =
        [(8, 133, 9), (7, 64, 1), (5, 101, 4)].map(|(out, inp, rank)| vec![ActiveLinear { out, inp, rank }]);
    for (count, width) in [(1, 133), (2, 140), (4, 133), (5, 133), (17, 133), (40, 136)] {
        for distribution in DISTRIBUTIONS {
            let segments = segments(count, distribution, &actives);
            let what = format!("{count} rows of {width}, {distribution}");
            on_both!(what, ROUNDED, normed(count, width, &segments));
        }
    }
}

fn mlp<B: Backend>(backend: &B, count: usize, hidden: usize, width: usize, segments: &[Segment]) -> Vec<f32> {
    let [gate, up] = [3, 4].map(|seed| linear(backend, seed, (width, hidden, 5), true));
    let down = Linear { index: 1, ..linear(backend, 5, (hidden, width, 5), true) };
    let weight = backend.vector(vector(6, hidden)).unwrap();
    let norm = Norm { weight: &weight, eps: 1e-5 };
    let x = rows(backend, 7, count, hidden);
    backend.host(backend.gated_mlp_onto(x, norm, &GatedMlp { gate, up, down }, segments).unwrap()).unwrap()
}

#[test]
fn the_elastic_mlp_is_what_the_reference_computes() {
    let (hidden, width) = (24, 77);
    let actives = [77, 50, 64, 33, 0, 1].map(|kept| {
        let up = ActiveLinear { out: kept, inp: hidden, rank: 1 + kept % 5 };
        vec![up, ActiveLinear { out: hidden, inp: kept, rank: 5 }]
    });
    for count in [1, 3, 16] {
        for distribution in DISTRIBUTIONS {
            let segments = segments(count, distribution, &actives);
            on_both!(format!("{count} rows, {distribution}"), ROUNDED, mlp(count, hidden, width, &segments));
        }
    }
}

fn norms<B: Backend>(backend: &B, count: usize, width: usize) -> Vec<f32> {
    let weight = backend.vector(vector(2, width)).unwrap();
    let x = rows(backend, 1, count, width);
    let normed = backend.rms_norm(&x, &weight, 1e-5).unwrap();
    let sum = backend.add(normed, &x).unwrap();
    let last = backend.select(&sum, &[count as u32 - 1, 0]).unwrap();
    let head = backend.table(host(4, 19, width)).unwrap();
    let mut all = backend.host(backend.logits(&last, &head).unwrap()).unwrap();
    all.extend(backend.host(sum).unwrap());
    all
}

#[test]
fn norms_sums_choices_and_logits_are_what_the_reference_computes() {
    for (count, width) in [(1, 1), (2, 7), (7, 64), (16, 133), (3, 700)] {
        on_both!(format!("{count} rows of {width}"), ROUNDED, norms(count, width));
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_panics() {
    let gpu = gpu();
    let linear = linear(&gpu, 1, (8, 6, 2), true);
    let x = rows(&gpu, 2, 1, 6);
    for (out, inp, rank, rows) in [(9, 6, 2, 1), (8, 7, 2, 1), (8, 6, 3, 1), (8, 6, 2, 2)] {
        let shape = Arc::new(ActiveShape { linears: vec![ActiveLinear { out, inp, rank }] });
        let segment = Segment { rows: 0..rows, selection: Selection { adapter: 0, subnetwork: 0, shape } };
        assert!(gpu.linear(&x, &linear, &[segment]).is_err(), "{out} {inp} {rank} {rows}");
    }
    assert!(gpu.embed(&linear.weight, &[8]).is_err());
    assert!(gpu.select(&x, &[1]).is_err());
    assert!(gpu.logits(&x, &gpu.matrix(host(1, 3, 5)).unwrap()).is_err());
    let layout = CacheLayout { layers: 1, kv_heads: 2, head_size: 10, blocks: 2, block_size: 4 };
    let huge = CacheLayout { layers: 1 << 10, blocks: 1 << 30, ..layout };
    let refused = gpu.cache(huge).err().unwrap().to_string();
    assert!(refused.contains("key-value pool") && refused.contains("MiB are free"), "{refused}");
    assert!(gpu.cache(CacheLayout { blocks: usize::MAX, ..layout }).is_err());
    let mut cache = gpu.cache(layout).unwrap();
    let shape = AttentionShape::new(6, 2, 10);
    let (q, kv) = (rows(&gpu, 1, 1, 60), rows(&gpu, 2, 1, 20));
    for (start, blocks, layer) in [(0, vec![2], 0), (4, vec![0], 0), (0, vec![0], 1)] {
        let span = SequenceSpan { rows: 0..1, start, blocks };
        assert!(gpu.attention(&q, &kv, &kv, &shape, &[span], Some((&mut cache, layer))).is_err());
    }
    assert!(Cuda::open(1000).unwrap_err().to_string().contains("no GPU 1000"));
}
