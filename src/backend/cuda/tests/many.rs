//! Many rows: with `wgmma` where the GPU has it (the emulator has, unless it is told otherwise), and without.

use super::*;

/// The rows of a large tile less one, more than it, and more than two of them.
const MANY: [usize; 4] = [33, 65, 127, 300];

/// With the kernels that the GPU has, then with those for other GPUs.
fn both_kinds() -> [(&'static str, Cuda); 2] {
    [("its own", gpu()), ("mma.sync", Cuda::apart_without_wgmma(0).unwrap())]
}

/// Four Linears of one x, so that not all fit a launch: of other widths, with and without bias, with four super-adapters of which
/// two are not there, and one without any.
fn four<B: Backend>(backend: &B, inp: usize) -> [Linear<B>; 4] {
    let sizes = [(301, 9), (40, 33), (7, 3), (130, 20)];
    let mut linears = [0, 1, 2, 3].map(|i| {
        let (seed, (out, rank)) = (20 * i as u64, sizes[i]);
        let mut linear =
            linear_of(backend, whole(seed, out, inp, true), seed, (out, inp, rank), i % 2 == 0, whole);
        let more = linear_of(backend, whole(seed, out, inp, true), seed + 5, (out, inp, rank), true, whole);
        linear.adapters.extend([None, more.adapters.into_iter().next().flatten()]);
        Linear { index: i, ..linear }
    });
    linears[3].adapters = (0..4).map(|_| None).collect();
    linears
}

/// Rows that take turns in size and super-adapter.
fn mixed(count: usize, inp: usize, lengths: &[usize]) -> Vec<Segment> {
    let shape = |i: usize| {
        let part = |size: usize, i: usize| (size * [7, 3, 5, 2][i % 4]).div_ceil(7);
        let of =
            |(out, rank)| ActiveLinear { out: part(out, i), inp: part(inp, i + 1), rank: part(rank, i / 2) };
        [(301, 9), (40, 33), (7, 3), (130, 0)].map(of).to_vec()
    };
    let (mut start, mut all) = (0, Vec::new());
    for (i, &length) in lengths.iter().cycle().enumerate() {
        let end = (start + length).min(count);
        let shape = Arc::new(ActiveShape { linears: shape(i) });
        all.push(Segment {
            rows: start..end,
            selection: Selection { adapter: i % 4, subnetwork: i as u32, shape },
        });
        start = end;
        if start == count {
            break;
        }
    }
    all
}

fn products<B: Backend>(backend: &B, count: usize, inp: usize, segments: &[Segment]) -> Vec<f32> {
    let linears = four(backend, inp);
    let table = backend.table(whole(7, count, inp, false)).unwrap();
    let x = backend.embed(&table, &(0..count as u32).collect::<Vec<_>>()).unwrap();
    let all = backend.linears(&x, None, linears.each_ref(), segments).unwrap();
    all.into_iter().flat_map(|rows| backend.host(rows).unwrap()).collect()
}

#[test]
fn linears_of_many_rows_share_launches_and_stay_apart() {
    for (count, inp, lengths) in [(33, 67, &[1, 5][..]), (70, 200, &[40, 3, 1]), (300, 131, &[17, 1, 90])] {
        let segments = mixed(count, inp, lengths);
        let expected = products(&Reference::new(), count, inp, &segments);
        for (kind, gpu) in both_kinds() {
            let got = products(&gpu, count, inp, &segments);
            same(&format!("{kind}, {count} rows of {inp}"), &got, &expected, 0.0);
        }
    }
}

#[test]
fn products_of_many_rows_are_what_the_reference_computes() {
    let actives = |out: usize, inp: usize| {
        [(out, inp, 8), (out / 2, inp - 1, 1), (1, inp, 8), (out - 1, 7, 3)]
            .map(|(out, inp, rank)| vec![ActiveLinear { out, inp, rank }])
    };
    for (out, inp) in [(70, 40), (301, 129), (515, 64)] {
        for (count, onto) in MANY.into_iter().zip([true, false, false, true]) {
            let segments = segments(count, DISTRIBUTIONS[count % 3], &actives(out, inp));
            let expected = product(&Reference::new(), (out, inp, 8), count, onto, &segments);
            for (kind, gpu) in both_kinds() {
                let got = product(&gpu, (out, inp, 8), count, onto, &segments);
                same(&format!("{kind}, {count} rows, {out}x{inp}"), &got, &expected, 0.0);
            }
        }
    }
}

#[test]
fn the_elastic_mlp_of_many_rows_is_what_the_reference_computes() {
    for (count, width) in [(40, 77), (40, 301), (133, 300)] {
        let actives = [width, width / 4, width - 1].map(|kept| {
            let up = ActiveLinear { out: kept, inp: 24, rank: 1 + kept % 5 };
            vec![up, ActiveLinear { out: 24, inp: kept, rank: 5 }]
        });
        let segments = segments(count, "skewed", &actives);
        let expected = mlp(&Reference::new(), count, 24, width, &segments);
        for (kind, gpu) in both_kinds() {
            let got = mlp(&gpu, count, 24, width, &segments);
            same(&format!("{kind}, {count} rows, {width} wide"), &got, &expected, ROUNDED);
        }
    }
}

/// Numbers that round, so that another order of sums would show.
#[test]
fn a_row_among_many_is_the_same_bit_for_bit_whatever_runs_beside_it() {
    let (out, inp, count) = (270, 200, 150);
    let actives = [(out, inp, 5), (99, 133, 2), (1, 64, 5), (256, 1, 1)]
        .map(|(out, inp, rank)| vec![ActiveLinear { out, inp, rank }]);
    let all = segments(count, "distinct", &actives);
    for (kind, gpu) in both_kinds() {
        let linear = linear(&gpu, 1, (out, inp, 5), true);
        let x = rows(&gpu, 3, count, inp);
        let mixed = gpu.host(gpu.linear(&x, &linear, &all).unwrap()).unwrap();
        for row in [0, 1, 63, 64, 149] {
            // The fewest rows that are many, all the same.
            let alone = gpu.select(&x, &[row as u32; 33]).unwrap();
            let segment = Segment { rows: 0..33, selection: all[row].selection.clone() };
            let alone = gpu.host(gpu.linear(&alone, &linear, &[segment]).unwrap()).unwrap();
            for copy in alone.chunks(out) {
                assert_eq!(copy, &mixed[row * out..(row + 1) * out], "{kind}, row {row}");
            }
        }
    }
}
