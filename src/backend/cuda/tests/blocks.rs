//! Weights in blocks of 8 and 4 bits.

use super::*;
use crate::backend::cuda::Dtype;
use crate::weights::{BLOCK, Blocks};

/// Numbers in blocks that bf16 holds: of 8 bits, of 4 around zero, of 4 above a minimum.
fn in_blocks(seed: u64, rows: usize, columns: usize, kind: &str) -> HostMatrix {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let (quants, scale) = match kind {
        "int8" => (-127..=127, 1.0),
        "int4" => (-8..=7, 2.0),
        _ => (0..=15, 0.5),
    };
    let quants = (0..rows * columns).map(|_| random.random_range(quants.clone())).collect();
    let scales = (0..rows * columns / BLOCK).map(|i| scale * [1.0, 0.5][i % 2]).collect();
    let minimums = (0..rows * columns / BLOCK).map(|i| -((i % 4) as f32)).collect();
    let minimums = (kind == "minimums").then_some(minimums);
    let data = HostData::Blocks(Blocks { quants, scales, minimums, places: None });
    HostMatrix { name: kind.into(), rows, columns, data }
}

#[test]
fn weights_in_blocks_are_multiplied_as_they_are() {
    for kind in ["int8", "int4", "minimums"] {
        for (out, inp) in [(5, 32), (33, 160), (17, 1120), (70, 64)] {
            let actives = [(out, inp), (out / 2, inp - 1), (1, inp / 2), (out, 17)]
                .map(|(out, inp)| vec![ActiveLinear { out, inp, rank: 3 }]);
            for count in [1, 4, 9, 30, 40, 133] {
                let segments = segments(count, "distinct", &actives);
                let weight = || in_blocks(out as u64, out, inp, kind);
                let gpu = gpu().with_dtype(Dtype::Auto);
                let got = product_of(&gpu, weight(), 3, count, true, &segments);
                let expected = product_of(&Reference::new(), weight(), 3, count, true, &segments);
                same(&format!("{kind}, {count} rows of {out}x{inp}"), &got, &expected, 0.0);
                let head = gpu.table(weight()).unwrap();
                let ids = (0..count as u32).map(|row| row % out as u32).collect::<Vec<_>>();
                let values = weight().to_f32();
                let rows = ids.iter().flat_map(|&id| &values[id as usize * inp..][..inp]).copied();
                let x = gpu.embed(&head, &ids).unwrap();
                let logits = gpu.host(gpu.logits(&x, &head).unwrap()).unwrap();
                assert_eq!(gpu.host(x).unwrap(), rows.collect::<Vec<_>>());
                let reference = Reference::new();
                let head = reference.table(weight()).unwrap();
                let x = reference.embed(&head, &ids).unwrap();
                let expected = reference.host(reference.logits(&x, &head).unwrap()).unwrap();
                // Sums of squares are beyond what f32 counts exactly.
                same(&format!("{kind}, {count} logits of {out}x{inp}"), &logits, &expected, 2e-6);
            }
        }
    }
}

#[test]
fn weights_are_rounded_to_the_blocks_that_were_asked_for() {
    let shape = vec![ActiveLinear { out: 40, inp: 70, rank: 5 }];
    let segments = segments(3, "identical", &[shape]);
    let [exact, other] = [Dtype::Bf16, Dtype::Auto].map(|dtype| {
        let gpu = gpu().with_dtype(dtype);
        (
            gpu.bytes(&gpu.matrix(host(1, 40, 70)).unwrap(), 40, 70),
            product_of(&gpu, host(1, 40, 70), 5, 3, false, &segments),
        )
    });
    assert_eq!(exact, other);
    for (dtype, bytes, most) in [(Dtype::Int8, 40 * 3 * 34, 0.02), (Dtype::Int4, 40 * 3 * 20, 0.2)] {
        let gpu = gpu().with_dtype(dtype);
        assert_eq!(gpu.bytes(&gpu.matrix(host(1, 40, 70)).unwrap(), 40, 70), bytes);
        let rounded = product_of(&gpu, host(1, 40, 70), 5, 3, false, &segments);
        assert_ne!(rounded, exact.1);
        same(&format!("{dtype:?}"), &rounded, &exact.1, most);
    }
    // Blocks that run across an order are cut anew; those with minimums and too many bits become bf16.
    let order = (0..64).map(|i| i * 5 % 64).collect::<Vec<_>>();
    let gpu = gpu().with_dtype(Dtype::Auto);
    for kind in ["int8", "int4", "minimums"] {
        let ordered = in_blocks(3, 10, 64, kind).permute_columns(&order);
        let expected = ordered.to_f32();
        let table = gpu.table(ordered).unwrap();
        let got = gpu.host(gpu.embed(&table, &(0..10).collect::<Vec<_>>()).unwrap()).unwrap();
        same(kind, &got, &expected, ROUNDED);
        assert_eq!(gpu.bytes(&table, 1, 64), 68, "{kind}");
    }
    let mut wide = in_blocks(3, 10, 64, "int8");
    if let HostData::Blocks(blocks) = &mut wide.data {
        blocks.minimums = Some(vec![0.25; 20]);
    }
    assert_eq!(gpu.bytes(&gpu.matrix(wide).unwrap(), 1, 64), 128);
}

/// An MLP whose three weights are in blocks of these kinds.
fn mlp_in_blocks<B: Backend>(backend: &B, kinds: [&str; 3], count: usize, segments: &[Segment]) -> Vec<f32> {
    let linear = |i: usize, (out, inp): (usize, usize)| {
        let weight = in_blocks(i as u64, out, inp, kinds[i]);
        let host = |seed, rows, columns, _| host(seed, rows, columns);
        let linear = linear_of(backend, weight, i as u64, (out, inp, 5), true, host);
        Linear { index: usize::from(i == 2), ..linear }
    };
    let mlp = GatedMlp { gate: linear(0, (96, 32)), up: linear(1, (96, 32)), down: linear(2, (32, 96)) };
    let weight = backend.vector(HostVector { name: "n".into(), data: vec![0.01; 32] }).unwrap();
    let norm = Norm { weight: &weight, eps: 1e-5 };
    let x = rows(backend, 7, count, 32);
    backend.host(backend.gated_mlp_onto(x, norm, &mlp, segments).unwrap()).unwrap()
}

#[test]
fn an_mlp_in_blocks_is_what_the_reference_computes() {
    let actives = [96, 50, 64].map(|kept| {
        let up = ActiveLinear { out: kept, inp: 32, rank: 5 };
        vec![up, ActiveLinear { out: 32, inp: kept, rank: 2 }]
    });
    for kinds in [["int8"; 3], ["int4"; 3], ["int4", "int8", "minimums"]] {
        for count in [2, 7, 12, 20, 40] {
            let segments = segments(count, "distinct", &actives);
            let gpu = gpu().with_dtype(Dtype::Auto);
            let expected = mlp_in_blocks(&Reference::new(), kinds, count, &segments);
            let got = mlp_in_blocks(&gpu, kinds, count, &segments);
            same(&format!("{kinds:?}, {count} rows"), &got, &expected, ROUNDED);
        }
    }
}
