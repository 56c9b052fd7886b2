//! Operations with a backward pass of their own, ours and those composed for other devices, against their formulas left
//! to candle: values and gradients.

use super::attention::{attend, attend_padded};
use super::composed::{Softmax, run};
use super::compute::Compute;
use super::dropout::Position;
use super::elastic::{Elastic, Frozen};
use super::fused::{CrossEntropy, Divergence, Gated, RmsNorm, Rotary, Turns};
use super::product::{Onto, View, multiply};
use crate::backend::{AttentionShape, SequenceSpan};
use crate::supernet::ActiveLinear;
use candle_core::{D, DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const ROWS: [usize; 6] = [1, 2, 3, 7, 16, 133];

fn random(rows: usize, columns: usize, seed: u64) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..rows * columns).map(|_| random.random_range(-1.0..1.0)).collect()
}

fn variable(rows: usize, columns: usize, seed: u64) -> Var {
    variable_on(&Device::Cpu, rows, columns, seed)
}

fn variable_on(device: &Device, rows: usize, columns: usize, seed: u64) -> Var {
    Var::from_vec(random(rows, columns, seed), (rows, columns), device).unwrap()
}

/// All that an operation can run on, by name: ours, composed, and composed on a GPU where there is one.
fn forms(weights: DType) -> Vec<(&'static str, Compute)> {
    let mut forms = vec![("composed", Compute::composed(weights == DType::BF16))];
    if weights == DType::F32 {
        forms.push(("ours", Compute::cpu()));
    }
    if let Ok(gpu) = Compute::cuda(0) {
        forms.push(("on a GPU", Compute { weights, ..gpu }));
    }
    forms
}

fn on(compute: &Compute, tensor: &Tensor) -> Tensor {
    tensor.to_device(&compute.device).unwrap()
}

/// Runs an operation, in all of its forms, and its formula on fresh variables of these shapes and compares the results
/// and every variable's gradient; the result is weighted with fixed random numbers, so that no gradient is trivial.
fn check(
    name: &str,
    shapes: &[(usize, usize)],
    operation: impl Fn(&Compute, &[Tensor]) -> Result<Tensor>,
    formula: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let expected = both_ways(&Device::Cpu, shapes, &formula);
    for (form, compute) in forms(DType::F32) {
        let got = both_ways(&compute.device, shapes, |v| operation(&compute, v));
        same(&format!("{name} {shapes:?}, {form}"), &got, &expected, 2e-5);
    }
}

/// The result, and each variable's gradient.
fn both_ways(
    device: &Device,
    shapes: &[(usize, usize)],
    operation: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Vec<Vec<f32>> {
    let variables = shapes.iter().zip(1..).map(|(&(r, c), seed)| variable_on(device, r, c, seed));
    let variables = variables.collect::<Vec<_>>();
    let inputs = variables.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>();
    let y = operation(&inputs).unwrap();
    let weights = Tensor::from_vec(random(1, y.elem_count(), 99), y.shape(), device).unwrap();
    let gradients = (&y * weights).unwrap().sum_all().unwrap().backward().unwrap();
    let gradient = |t: &Tensor| gradients.get(t).unwrap().clone();
    let all = std::iter::once(y).chain(inputs.iter().map(gradient));
    all.map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
}

fn same(what: &str, got: &[Vec<f32>], expected: &[Vec<f32>], tolerance: f32) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (output, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.len(), expected.len(), "{what}: output {output}");
        let largest = expected.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
        let off = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off <= tolerance * largest, "{what}: output {output} is off by {off} of {largest}");
    }
}

fn prefix(matrix: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
    matrix.narrow(0, 0, rows)?.narrow(1, 0, columns)
}

#[test]
fn the_elastic_product_is_its_formula_and_so_are_its_gradients() {
    let (full_out, full_inp, full_rank) = (37, 29, 9);
    let weight =
        Tensor::from_vec(random(full_out, full_inp, 50), (full_out, full_inp), &Device::Cpu).unwrap();
    for rows in ROWS {
        for (out, inp, rank) in [(37, 29, 9), (37, 13, 9), (20, 29, 5), (1, 1, 1)] {
            for dropout in [false, true] {
                let mask = dropout.then(|| Position::of(7, 1).draw(rows * inp, 0.25));
                let mut factors = vec![1.0; rows * inp];
                if let Some(mask) = mask {
                    mask.apply(&mut factors);
                }
                let active = ActiveLinear { out, inp, rank };
                check(
                    &format!("elastic {active:?}, dropout {dropout}"),
                    &[(rows, inp), (full_rank, full_inp), (full_out, full_rank)],
                    |compute, v| {
                        let elastic = Elastic::new(on(compute, &weight), active, 2.0, 1);
                        compute.run3(Elastic { dropout: mask, ..elastic }, &v[0], &v[1], &v[2])
                    },
                    |v| {
                        let (x, a, b) = (&v[0], prefix(&v[1], rank, inp)?, prefix(&v[2], out, rank)?);
                        let factors = Tensor::from_vec(factors.clone(), (rows, inp), &Device::Cpu)?;
                        let base = x.matmul(&prefix(&weight, out, inp)?.t()?)?;
                        base + (x.mul(&factors)?.matmul(&a.t()?)?.matmul(&b.t()?)? * 2.0)?
                    },
                );
            }
        }
    }
}

#[test]
fn a_parameter_outside_the_active_prefix_has_a_gradient_of_zero() {
    let weight = Tensor::from_vec(random(8, 6, 50), (8, 6), &Device::Cpu).unwrap();
    let (x, a, b) = (variable(3, 4, 1), variable(5, 6, 2), variable(8, 5, 3));
    for compute in [Compute::cpu(), Compute::composed(false)] {
        let elastic = Elastic::new(weight.clone(), ActiveLinear { out: 7, inp: 4, rank: 2 }, 2.0, 1);
        let y = compute.run3(elastic, x.as_tensor(), a.as_tensor(), b.as_tensor()).unwrap();
        let gradients = y.sum_all().unwrap().backward().unwrap();
        // The frozen weight has none, nor has anything else.
        assert_eq!(gradients.get_ids().count(), 3);
        let rows = |v: &Var| gradients.get(v.as_tensor()).unwrap().to_vec2::<f32>().unwrap();
        for (r, row) in rows(&a).iter().enumerate() {
            for (c, value) in row.iter().enumerate() {
                assert_eq!(*value != 0.0, r < 2 && c < 4, "A ({r}, {c})");
            }
        }
        for (r, row) in rows(&b).iter().enumerate() {
            for (c, value) in row.iter().enumerate() {
                assert_eq!(*value != 0.0, r < 7 && c < 2, "B ({r}, {c})");
            }
        }
    }
}

#[test]
fn the_frozen_product_has_the_gradient_of_its_input() {
    let weight = Tensor::from_vec(random(37, 29, 50), (37, 29), &Device::Cpu).unwrap();
    for rows in ROWS {
        for (out, inp) in [(37, 29), (20, 13)] {
            check(
                "frozen",
                &[(rows, inp)],
                |compute, v| {
                    compute.run1(Frozen { weight: on(compute, &weight), out, inp, threads: 2 }, &v[0])
                },
                |v| v[0].matmul(&prefix(&weight, out, inp)?.t()?),
            );
        }
    }
}

#[test]
fn row_wise_operations_are_their_formulas_and_so_are_their_gradients() {
    let device = Device::Cpu;
    for rows in ROWS {
        let weight = Tensor::from_vec(random(1, 24, 50), 24, &device).unwrap();
        check(
            "rms norm",
            &[(rows, 24)],
            |compute, v| compute.run1(RmsNorm { weight: on(compute, &weight), eps: 1e-5 }, &v[0]),
            |v| {
                let mean_square = (v[0].sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?;
                v[0].broadcast_div(&mean_square.sqrt()?)?.broadcast_mul(&weight)
            },
        );
        check(
            "gated",
            &[(rows, 24), (rows, 24)],
            |compute, v| compute.run2(Gated, &v[0], &v[1]),
            |v| v[0].div(&(v[0].neg()?.exp()? + 1.0)?)?.mul(&v[1]),
        );
        let angles = random(rows, 4, 60);
        check(
            "rotary",
            &[(rows, 24)],
            |compute, v| {
                let turns = Turns::new(angles.iter().map(|a| a.sin_cos()).collect());
                compute.run1(Rotary { turns, head_size: 8 }, &v[0])
            },
            |v| {
                let angles = Tensor::from_vec(angles.clone(), (rows, 1, 4), &device)?;
                let (sin, cos) = (angles.sin()?, angles.cos()?);
                let heads = v[0].reshape((rows, 3, 8))?;
                let (a, b) = (heads.narrow(2, 0, 4)?, heads.narrow(2, 4, 4)?);
                let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
                let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
                Tensor::cat(&[first, second], 2)?.reshape((rows, 24))
            },
        );
        let targets = (0..rows as u32).map(|r| r * 31 % 300).collect::<Vec<_>>();
        check(
            "cross entropy",
            &[(rows, 300)],
            |compute, v| compute.run1(CrossEntropy { targets: targets.clone(), count: rows }, &v[0]),
            |v| {
                let targets = Tensor::new(targets.as_slice(), &device)?.unsqueeze(1)?;
                let log_sum = v[0].exp()?.sum_keepdim(D::Minus1)?.log()?;
                (log_sum - v[0].gather(&targets, 1)?)?.mean_all()
            },
        );
        // Sharper than the student's, so that a divergence taken the other way round is another number.
        let teacher = random(rows, 300, 70).iter().map(|v| 4.0 * v).collect::<Vec<_>>();
        let teacher = Tensor::from_vec(teacher, (rows, 300), &device).unwrap();
        check(
            "divergence",
            &[(rows, 300)],
            |compute, v| compute.run1(Divergence { teacher: on(compute, &teacher), count: rows + 1 }, &v[0]),
            |v| {
                let shares = |x: &Tensor| x.exp()?.broadcast_div(&x.exp()?.sum_keepdim(D::Minus1)?);
                let (teacher, student) = (shares(&teacher)?, shares(&v[0])?);
                teacher.mul(&teacher.div(&student)?.log()?)?.sum_all()? / (rows + 1) as f64
            },
        );
    }
}

#[test]
fn nothing_diverges_from_itself_and_nothing_goes_back() {
    let logits = variable(7, 300, 1);
    for compute in [Compute::cpu(), Compute::composed(false)] {
        let same = Divergence { teacher: logits.as_tensor().detach(), count: 7 };
        let divergence = compute.run1(same, logits.as_tensor()).unwrap();
        assert!(divergence.to_scalar::<f32>().unwrap().abs() < 1e-7);
        let gradients = divergence.backward().unwrap();
        let gradient = gradients.get(logits.as_tensor()).unwrap().flatten_all().unwrap();
        assert!(gradient.to_vec1::<f32>().unwrap().iter().all(|&g| g == 0.0));
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let weight = Tensor::zeros((4, 3), DType::F32, &Device::Cpu).unwrap();
    let x = variable(2, 3, 1);
    for compute in [Compute::cpu(), Compute::composed(false)] {
        let frozen =
            |out, inp| compute.run1(Frozen { weight: weight.clone(), out, inp, threads: 1 }, x.as_tensor());
        assert!(frozen(4, 3).is_ok());
        assert!(frozen(5, 3).is_err());
        assert!(frozen(4, 2).is_err());
        let wrong_targets = CrossEntropy { targets: vec![0, 3], count: 2 };
        assert!(compute.run1(wrong_targets, x.as_tensor()).is_err());
        let of_fewer_tokens =
            Divergence { teacher: Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap(), count: 2 };
        assert!(compute.run1(of_fewer_tokens, x.as_tensor()).is_err());
        let too_few = Rotary { turns: Turns::new(vec![(0.0, 1.0)]), head_size: 2 };
        assert!(compute.run1(too_few, x.as_tensor()).is_err());
    }
}

#[test]
fn a_product_with_bf16_weights_rounds_its_input_and_its_result_and_nothing_else() {
    // Half a unit in the last of 8 bits.
    let unit = 2.0f32.powi(-9);
    let (out, inp, rows) = (37, 29, 7);
    let exact = Tensor::from_vec(random(out, inp, 50), (out, inp), &Device::Cpu).unwrap();
    let weight = exact.to_dtype(DType::BF16).unwrap();
    let rounded = weight.to_dtype(DType::F32).unwrap();
    let (compute, plain) = (Compute::composed(true), Compute::composed(false));
    for (o, i) in [(out, inp), (20, 13)] {
        let frozen = |weight: &Tensor| Frozen { weight: weight.clone(), out: o, inp: i, threads: 1 };
        let both_ways = |compute: &Compute, weight: &Tensor| {
            let x = variable(rows, i, 1);
            let y = compute.run1(frozen(weight), x.as_tensor()).unwrap();
            let dy = Tensor::from_vec(random(rows, o, 2), (rows, o), &Device::Cpu).unwrap();
            let dx = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap().remove(x.as_tensor()).unwrap();
            [y.to_vec2::<f32>().unwrap(), dx.to_vec2::<f32>().unwrap()].map(|rows| rows.concat())
        };
        let (got, expected) = (both_ways(&compute, &weight), both_ways(&plain, &rounded));
        // Inputs and weights are below 1, so that a sum's terms are below `inp` in all.
        for (way, (got, expected), terms) in
            [("y", (&got[0], &expected[0]), i), ("dx", (&got[1], &expected[1]), o)]
        {
            assert_ne!(got, expected, "{way}: nothing was rounded");
            for (g, e) in got.iter().zip(expected) {
                let bound = unit * (terms as f32 + e.abs() + 1.0);
                assert!((g - e).abs() <= bound, "{way} of ({o}, {i}): {g} not {e}, {bound} apart at most");
            }
        }
    }
}

#[test]
fn a_product_may_use_any_part_of_its_operands() {
    // (1 2; 3 4) in rows of three, times its own transpose, added to ones in rows of four.
    let a = [1.0, 2.0, 9.0, 3.0, 4.0, 9.0];
    let a = View::prefix(&a, 2, 2, 3);
    for threads in [1, 2] {
        let mut into = [1.0; 8];
        multiply((&mut into, 4), Onto::Sum, 2.0, a, a.t(), threads);
        assert_eq!(into, [11.0, 23.0, 1.0, 1.0, 23.0, 51.0, 1.0, 1.0]);
        multiply((&mut into, 4), Onto::Fresh, 1.0, a, a.t(), threads);
        assert_eq!(into, [5.0, 11.0, 1.0, 1.0, 11.0, 25.0, 1.0, 1.0]);
    }
}

#[test]
fn sequences_attended_to_together_are_as_each_alone() {
    let shape = AttentionShape::new(4, 2, 6);
    for lengths in [&[1][..], &[3, 3], &[7, 1, 16], &[2, 33, 5, 33]] {
        let mut spans = Vec::new();
        for &length in lengths {
            let first = spans.last().map_or(0, |span: &SequenceSpan| span.rows.end);
            spans.push(SequenceSpan { rows: first..first + length, start: 0, blocks: Vec::new() });
        }
        let rows = lengths.iter().sum();
        let shapes = [(rows, 24), (rows, 12), (rows, 12)];
        let expected = both_ways(&Device::Cpu, &shapes, |v| {
            let each = spans.iter().map(|span| {
                let of = |x: &Tensor| x.narrow(0, span.rows.start, span.rows.len());
                attend(&of(&v[0])?, &of(&v[1])?, &of(&v[2])?, &shape, 0)
            });
            Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)
        });
        for (form, compute) in forms(DType::F32) {
            let got =
                both_ways(&compute.device, &shapes, |v| attend_padded(&v[0], &v[1], &v[2], &shape, &spans));
            same(&format!("attention of {lengths:?}, {form}"), &got, &expected, 2e-5);
        }
    }
}

#[test]
fn what_a_head_attends_to_is_the_softmax_of_what_it_scores() {
    for (heads, biases, rows, positions) in [(1, 1, 1, 1), (3, 1, 7, 7), (6, 3, 5, 37), (4, 4, 16, 70)] {
        let seen = |index: usize| {
            let (row, position) = (index / positions % rows, index % positions);
            if position <= row + 2 { index as f32 % 5.0 / 10.0 } else { f32::NEG_INFINITY }
        };
        let bias = (0..biases * rows * positions).map(seen).collect::<Vec<_>>();
        let bias = Tensor::from_vec(bias, (biases, rows, positions), &Device::Cpu).unwrap();
        check(
            &format!("softmax with {biases} biases"),
            &[(heads * rows, positions)],
            |compute, v| {
                let scores = v[0].reshape((heads, rows, positions))?;
                run(Softmax { bias: on(compute, &bias), factor: 0.3 }, &[&scores])
            },
            |v| {
                let scores = (v[0].reshape((heads / biases, biases, rows, positions))? * 0.3)?;
                let exponentials = scores.broadcast_add(&bias)?.exp()?;
                let shares = exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?;
                shares.reshape((heads, rows, positions))
            },
        );
    }
}

/// Rounded to bf16 on the way, sums in another order differ by as much.
#[test]
fn the_elastic_product_of_a_bf16_weight_is_the_same_wherever_it_is_composed() {
    let weight = Tensor::from_vec(random(37, 29, 50), (37, 29), &Device::Cpu).unwrap();
    let weight = weight.to_dtype(DType::BF16).unwrap();
    for rows in ROWS {
        for dropout in [false, true] {
            let mask = dropout.then(|| Position::of(7, 1).draw(rows * 13, 0.25));
            let active = ActiveLinear { out: 20, inp: 13, rank: 5 };
            let shapes = [(rows, 13), (9, 29), (37, 9)];
            let each = forms(DType::BF16).into_iter().map(|(form, compute)| {
                let run = |v: &[Tensor]| {
                    let elastic = Elastic::new(on(&compute, &weight), active, 2.0, 1);
                    compute.run3(Elastic { dropout: mask, ..elastic }, &v[0], &v[1], &v[2])
                };
                (form, both_ways(&compute.device, &shapes, run))
            });
            let each = each.collect::<Vec<_>>();
            for (form, got) in &each {
                same(&format!("{rows} rows, dropout {dropout}, {form}"), got, &each[0].1, 1e-2);
            }
        }
    }
}
