//! Large weights, which have kernels of their own: here they take weights of all sizes.

use super::*;
use crate::backend::cuda::device::How;
use crate::backend::cuda::streamed::Streamed;

fn streaming() -> Cuda {
    Cuda::open_as(0, How { apart: true, narrow: false, streams_from: Some(0), ..How::RULE }).unwrap()
}

fn parts((out, inp, rank): (usize, usize, usize)) -> Vec<Vec<ActiveLinear>> {
    let part = |n: usize, d: usize| {
        let part = |size: usize| (size * n / d).max(1);
        vec![ActiveLinear { out: part(out), inp: part(inp), rank: part(rank) }]
    };
    // The last two are of layers that go without this Linear.
    let nothing = [(out, 0), (0, inp)].map(|(out, inp)| vec![ActiveLinear { out, inp, rank: 0 }]);
    let parts = [part(1, 1), part(3, 4), part(2, 3), part(1, 2)];
    parts.into_iter().chain(nothing).collect()
}

#[test]
fn the_product_with_large_weights_is_what_the_reference_computes() {
    // Outputs and inputs that are no multiple of what a block takes, up to three spans; more ranks than one tile has.
    let sizes = [(1, 1, 1), (33, 100, 8), (23, 131, 33), (17, 1100, 3), (130, 2072, 24), (13, 20, 300)];
    for (out, inp, rank) in sizes {
        for count in [1, 2, 3, 7, 8] {
            for distribution in DISTRIBUTIONS {
                let segments = segments(count, distribution, &parts((out, inp, rank)));
                let what = format!("{out}x{inp} rank {rank}, {count} rows, {distribution}");
                let size = (out, inp, rank);
                let expected = product(&Reference::new(), size, count, count % 2 == 0, &segments);
                let got = product(&streaming(), size, count, count % 2 == 0, &segments);
                same(&what, &got, &expected, 0.0);
            }
        }
    }
}

#[test]
fn who_has_nothing_for_it_takes_other_kernels() {
    let gpu = streaming();
    let small = linear(&gpu, 1, (16, 64, 4), false);
    let plan = |gpu: &Cuda, rows, linear: &Linear<Cuda>| Streamed::of(&gpu.device, rows, &[linear], false);
    let streams = gpu.device.streams_from().is_some();
    assert_eq!(plan(&gpu, 8, &small).is_some(), streams);
    assert!(plan(&gpu, 9, &small).is_none(), "nine rows");
    // Seven rows of so many inputs leave no room for two slots.
    let wide = linear(&gpu, 1, (2, 11008, 1), false);
    assert_eq!([1, 6, 7].map(|rows| plan(&gpu, rows, &wide).is_some()), [streams, streams, false]);
    assert!(plan(&super::gpu(), 1, &small).is_none(), "a small weight");
}

#[test]
fn large_weights_of_normed_rows_are_what_the_reference_computes() {
    let actives = [(8, 1133, 9), (7, 64, 1), (5, 1025, 4)]
        .map(|(out, inp, rank)| vec![ActiveLinear { out, inp, rank }]);
    for (count, width) in [(1, 1133), (2, 1140), (4, 1133), (7, 1133)] {
        for distribution in DISTRIBUTIONS {
            let segments = segments(count, distribution, &actives);
            let what = format!("{count} rows of {width}, {distribution}");
            let expected = normed(&Reference::new(), count, width, &segments);
            same(&what, &normed(&streaming(), count, width, &segments), &expected, ROUNDED);
        }
    }
}

#[test]
fn the_elastic_mlp_of_large_weights_is_what_the_reference_computes() {
    for (hidden, width) in [(24, 77), (1030, 90)] {
        let actives = [width, 50, 64, 33, 0, 1].map(|kept| {
            let up = ActiveLinear { out: kept, inp: hidden, rank: 1 + kept % 5 };
            vec![up, ActiveLinear { out: hidden, inp: kept, rank: 5 }]
        });
        for count in [1, 3, 8] {
            for distribution in DISTRIBUTIONS {
                let segments = segments(count, distribution, &actives);
                let what = format!("{hidden} and {width}, {count} rows, {distribution}");
                let expected = mlp(&Reference::new(), count, hidden, width, &segments);
                same(&what, &mlp(&streaming(), count, hidden, width, &segments), &expected, ROUNDED);
            }
        }
    }
}

#[test]
fn a_row_of_large_weights_is_the_same_bit_for_bit_whatever_runs_beside_it() {
    let (gpu, size) = (streaming(), (210, 1070, 37));
    let linear = linear(&gpu, 1, size, true);
    let actives = [(210, 1070, 37), (9, 33, 2), (100, 1064, 5), (16, 1, 1)]
        .map(|(out, inp, rank)| vec![ActiveLinear { out, inp, rank }]);
    let all = segments(8, "distinct", &actives);
    let x = rows(&gpu, 3, 8, size.1);
    let mixed = gpu.host(gpu.linear(&x, &linear, &all).unwrap()).unwrap();
    for (row, segment) in all.iter().enumerate() {
        let alone = gpu.select(&x, &[row as u32]).unwrap();
        let segment = Segment { rows: 0..1, selection: segment.selection.clone() };
        let alone = gpu.host(gpu.linear(&alone, &linear, &[segment]).unwrap()).unwrap();
        assert_eq!(alone, mixed[row * size.0..(row + 1) * size.0], "row {row}");
    }
}
