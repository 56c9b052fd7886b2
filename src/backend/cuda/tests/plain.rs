//! Operations on rows that no weight matrix takes part in: layer norms, activations, parts of rows.

use super::*;
use crate::backend::Activation;

/// Rows whose mean is far from zero, so that a variance of squares would cancel.
fn shifted<B: Backend>(backend: &B, count: usize, width: usize) -> B::Rows {
    let shift = HostMatrix {
        name: "shift".into(),
        rows: count,
        columns: width,
        data: HostData::F32((0..count * width).map(|i| (8 * (i / width) + 64) as f32).collect()),
    };
    let shift = backend.table(shift).unwrap();
    let shift = backend.embed(&shift, &(0..count as u32).collect::<Vec<_>>()).unwrap();
    backend.add(rows(backend, 1, count, width), &shift).unwrap()
}

/// A norm by itself, in a product, and as a residual, which is then multiplied itself.
fn layer_norms<B: Backend>(backend: &B, count: usize, width: usize) -> [Vec<f32>; 2] {
    let [weight, bias] = [2, 3].map(|seed| backend.vector(vector(seed, width)).unwrap());
    let normed = || backend.layer_norm(&shifted(backend, count, width), &weight, &bias, 1e-3).unwrap();
    let linear = linear(backend, 4, (width, width, 3), true);
    let actives = [vec![ActiveLinear { out: width, inp: width, rank: 3 }]];
    let segments = segments(count, "identical", &actives);
    let sum = backend.linear_onto(normed(), &normed(), &linear, &segments).unwrap();
    let product = backend.linear(&sum, &linear, &segments).unwrap();
    let all = [sum, product].map(|rows| backend.host(rows).unwrap());
    [backend.host(normed()).unwrap(), all.concat()]
}

#[test]
fn layer_norms_are_those_of_the_reference() {
    for (count, width) in [(1, 2), (2, 7), (7, 64), (16, 133), (3, 700), (40, 36)] {
        let what = format!("{count} rows of {width}");
        let [got, multiplied] = layer_norms(&gpu(), count, width);
        let [expected, of_products] = layer_norms(&Reference::new(), count, width);
        // What a residual goes on from is not rounded to bf16; means of 200 are, to f32.
        same(&what, &got, &expected, 1e-4);
        same(&format!("{what}, multiplied"), &multiplied, &of_products, 2.0 * ROUNDED);
    }
    let gpu = gpu();
    let [right, wrong] = [6, 7].map(|length| gpu.vector(vector(1, length)).unwrap());
    let x = rows(&gpu, 1, 2, 6);
    assert!(gpu.layer_norm(&x, &right, &right, 1e-5).is_ok());
    for (weight, bias) in [(&wrong, &right), (&right, &wrong)] {
        let said = gpu.layer_norm(&x, weight, bias, 1e-5).err().unwrap().to_string();
        assert!(said.contains("layer_norm: expected a vector of 6, got 7"), "{said}");
    }
}

#[test]
fn each_head_is_normed_by_itself_as_the_reference_does_it() {
    fn normed<B: Backend>(backend: &B, count: usize, heads: usize, size: usize) -> Vec<f32> {
        let weight = backend.vector(vector(5, size)).unwrap();
        let x = rows(backend, 1, count, heads * size);
        backend.host(backend.head_norm(&x, &weight, 1e-5).unwrap()).unwrap()
    }
    for (count, heads, size) in [(1, 1, 1), (2, 3, 7), (7, 9, 64), (3, 5, 130), (40, 2, 32)] {
        let expected = normed(&Reference::new(), count, heads, size);
        same(&format!("{count} rows of {heads} heads"), &normed(&gpu(), count, heads, size), &expected, 1e-5);
    }
    let gpu = gpu();
    let said = gpu.head_norm(&rows(&gpu, 1, 2, 10), &gpu.vector(vector(1, 4)).unwrap(), 1e-5).err().unwrap();
    assert!(said.to_string().contains("head_norm: expected columns in heads of 4, got 10"), "{said}");
}

fn activated<B: Backend>(backend: &B, activation: Activation, columns: usize) -> Vec<f32> {
    let numbers = [0.0, 1e-4, 0.25, 1.0, 2.0, 3.5, 7.0, 50.0, 1e4];
    let data = (0..columns * 40).map(|i| {
        let number = numbers[i % numbers.len()] * [1.0, -1.0][i % 2];
        bf16::from_f32(number * (1.0 + (i / 18) as f32 / 16.0)).to_f32()
    });
    let host = HostMatrix { name: "x".into(), rows: 40, columns, data: HostData::F32(data.collect()) };
    let table = backend.table(host).unwrap();
    let x = backend.embed(&table, &(0..40).collect::<Vec<_>>()).unwrap();
    backend.host(backend.activate(x, activation).unwrap()).unwrap()
}

#[test]
fn activations_are_those_of_the_reference() {
    for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Tanh, Activation::Relu] {
        for columns in [1, 9, 24] {
            let expected = activated(&Reference::new(), activation, columns);
            for (got, expected) in activated(&gpu(), activation, columns).iter().zip(&expected) {
                // Of the number itself; where almost all cancels, of what cancels.
                let off = (got - expected).abs();
                assert!(off <= BF16 * expected.abs() + 1e-6, "{activation:?}: {got}, not {expected}");
                assert!(*expected != 0.0 || *got == 0.0, "{activation:?} of zero is {got}");
            }
        }
    }
}

/// Each part by itself, and by whatever reads rows or writes to them; then the whole, which must be what it was.
fn parts<B: Backend, const N: usize>(backend: &B, count: usize, width: usize) -> Vec<f32> {
    let whole = rows(backend, 1, count, N * width);
    let split = || backend.split::<N>(&whole).unwrap();
    let linear = linear(backend, 4, (5, width, 3), true);
    let segments = segments(count, "identical", &[vec![ActiveLinear { out: 5, inp: width, rank: 3 }]]);
    let [weight, bias] = [2, 3].map(|seed| backend.vector(vector(seed, width)).unwrap());
    let angles = backend.angles(&(0..count as u32).collect::<Vec<_>>(), &vec![0.5; width / 2]).unwrap();
    let mut all = Vec::new();
    for (i, part) in split().into_iter().enumerate() {
        let again = || split().into_iter().nth(i).unwrap();
        let norm = Norm { weight: &weight, eps: 1e-3 };
        let [normed] = backend.linears(&part, Some(norm), [&linear], &segments).unwrap();
        let onto = backend.add(again(), &part).unwrap();
        all.extend([
            normed,
            onto,
            backend.linear(&part, &linear, &segments).unwrap(),
            backend.rms_norm(&part, &weight, 1e-3).unwrap(),
            backend.layer_norm(&part, &weight, &bias, 1e-3).unwrap(),
            backend.select(&part, &[count as u32 - 1, 0]).unwrap(),
            backend.activate(again(), Activation::Relu).unwrap(),
            backend.rotary(again(), width / 2 * 2, &angles).unwrap(),
            part,
        ]);
    }
    all.push(whole);
    all.into_iter().flat_map(|rows| backend.host(rows).unwrap()).collect()
}

#[test]
fn parts_of_rows_are_as_good_as_rows_and_leave_the_whole_alone() {
    for (count, width) in [(1, 8), (3, 6), (40, 22)] {
        let (gpu, reference) = (gpu(), Reference::new());
        let three = [parts::<Cuda, 3>(&gpu, count, width), parts::<Reference, 3>(&reference, count, width)];
        same(&format!("3 parts of {count} rows of {width}"), &three[0], &three[1], ROUNDED);
        let one = [parts::<Cuda, 1>(&gpu, count, width), parts::<Reference, 1>(&reference, count, width)];
        same(&format!("{count} rows of {width}"), &one[0], &one[1], ROUNDED);
    }
    let gpu = gpu();
    let said = gpu.split::<3>(&rows(&gpu, 1, 2, 8)).err().unwrap().to_string();
    assert!(said.contains("3 equal parts, got 8"), "{said}");
}
