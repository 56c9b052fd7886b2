//! Ranks in falling importance, for an adapter that was trained without elastic ranks.
//!
//! LoRA says nothing of its ranks but their sum `B A`: any rotation between the two is the same adapter, so a prefix of its ranks
//! is an arbitrary part of it. Of all factors of that sum, those of its singular value decomposition have the prefixes that
//! are nearest to it (Eckart and Young 1936). An adapter that was trained with prefixes has an order of its own, and should
//! keep it: benches/runs/2026-11-27-importance-epyc-zen3-2vcpu.md.

use crate::artifact::AdapterTensors;
use crate::weights::{HostData, HostMatrix};
use rayon::prelude::*;

/// Two vectors whose cosine is less are at right angles.
const ORTHOGONAL: f64 = 1e-12;
/// Passes over all pairs, at most; a handful is usual.
const SWEEPS: usize = 40;

/// Replaces each `A` and `B` by factors of the same product whose ranks fall in importance, in f32.
pub fn order_ranks(tensors: &mut AdapterTensors) {
    tensors.par_iter_mut().for_each(|(_, (a, b))| {
        let mut rows = a.to_f32().chunks_exact(a.columns.max(1)).map(widened).collect::<Vec<_>>();
        let values = b.to_f32();
        let column =
            |rank| values.iter().skip(rank).step_by(b.columns.max(1)).map(|&v| f64::from(v)).collect();
        let mut columns = (0..b.columns).map(column).collect::<Vec<_>>();
        decompose(&mut rows, &mut columns);
        let a_values = rows.iter().flatten().map(|&v| v as f32).collect();
        let b_values = (0..b.rows).flat_map(|row| columns.iter().map(move |column| column[row] as f32));
        *b = HostMatrix { data: HostData::F32(b_values.collect()), ..b.clone() };
        *a = HostMatrix { data: HostData::F32(a_values), ..a.clone() };
    });
}

fn widened(row: &[f32]) -> Vec<f64> {
    row.iter().map(|&v| f64::from(v)).collect()
}

/// Makes `sum of columns[i] rows[i]^T` a singular value decomposition, each value shared evenly by its two vectors, the
/// largest first.
fn decompose(rows: &mut [Vec<f64>], columns: &mut [Vec<f64>]) {
    orthogonalise(rows, columns);
    for (row, column) in rows.iter_mut().zip(columns.iter_mut()) {
        let size = norm(row);
        scale(row, if size > 0.0 { 1.0 / size } else { 0.0 });
        scale(column, size);
    }
    // Unit vectors at right angles stay so when they are rotated.
    orthogonalise(columns, rows);
    let mut sizes = columns.iter().map(|column| norm(column)).enumerate().collect::<Vec<_>>();
    sizes.sort_by(|(_, one), (_, other)| other.total_cmp(one));
    for vectors in [&mut *rows, columns] {
        let sorted = sizes.iter().map(|&(from, _)| std::mem::take(&mut vectors[from])).collect::<Vec<_>>();
        vectors.iter_mut().zip(sorted).for_each(|(to, vector)| *to = vector);
    }
    for ((row, column), (_, size)) in rows.iter_mut().zip(columns).zip(sizes) {
        scale(row, size.sqrt());
        scale(column, if size > 0.0 { 1.0 / size.sqrt() } else { 0.0 });
    }
}

/// Rotates `vectors` among themselves until they are at right angles, and `others` alike, so that `sum of vectors[i] others[i]^T`
/// stays what it is (Jacobi's one-sided method, Hestenes 1958).
fn orthogonalise(vectors: &mut [Vec<f64>], others: &mut [Vec<f64>]) {
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for i in 0..vectors.len() {
            for j in i + 1..vectors.len() {
                let (alpha, beta) = (dot(&vectors[i], &vectors[i]), dot(&vectors[j], &vectors[j]));
                let gamma = dot(&vectors[i], &vectors[j]);
                if gamma.abs() <= ORTHOGONAL * (alpha * beta).sqrt() {
                    continue;
                }
                rotated = true;
                let zeta = (beta - alpha) / (2.0 * gamma);
                let tangent = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let cosine = 1.0 / (1.0 + tangent * tangent).sqrt();
                rotate(vectors, i, j, cosine, cosine * tangent);
                rotate(others, i, j, cosine, cosine * tangent);
            }
        }
        if !rotated {
            return;
        }
    }
}

fn rotate(vectors: &mut [Vec<f64>], i: usize, j: usize, cosine: f64, sine: f64) {
    let (head, tail) = vectors.split_at_mut(j);
    for (x, y) in head[i].iter_mut().zip(&mut tail[0]) {
        (*x, *y) = (cosine * *x - sine * *y, sine * *x + cosine * *y);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(vector: &[f64]) -> f64 {
    dot(vector, vector).sqrt()
}

fn scale(vector: &mut [f64], by: f64) {
    vector.iter_mut().for_each(|v| *v *= by);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn matrix(rows: usize, columns: usize, seed: usize) -> HostMatrix {
        let value = |i: usize| ((i * 37 + seed * 101 + 11) % 53) as f32 / 26.0 - 1.0;
        let data = HostData::F32((0..rows * columns).map(value).collect());
        HostMatrix { name: "m".into(), rows, columns, data }
    }

    /// `B[:, :rank] A[:rank]`
    fn product(a: &HostMatrix, b: &HostMatrix, rank: usize) -> Vec<f64> {
        let (a_values, b_values) = (a.to_f32(), b.to_f32());
        let value = |row: usize, column: usize| {
            let part =
                |r| f64::from(b_values[row * b.columns + r]) * f64::from(a_values[r * a.columns + column]);
            (0..rank).map(part).sum::<f64>()
        };
        (0..b.rows)
            .flat_map(|row| (0..a.columns).map(move |column| (row, column)))
            .map(|(r, c)| value(r, c))
            .collect()
    }

    fn distance(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
    }

    /// Of each pair of vectors the product, largest first if it is a decomposition.
    fn ordered(a: HostMatrix, b: HostMatrix) -> (HostMatrix, HostMatrix) {
        let mut tensors = BTreeMap::from([("m".to_string(), (a, b))]);
        order_ranks(&mut tensors);
        tensors.remove("m").unwrap()
    }

    #[test]
    fn the_adapter_stays_the_same_and_its_prefixes_are_the_nearest_there_are() {
        for (rank, inputs, outputs) in [(1, 3, 2), (5, 17, 9), (8, 6, 40), (16, 20, 5)] {
            let (a, b) = (matrix(rank, inputs, 1), matrix(outputs, rank, 2));
            let whole = product(&a, &b, rank);
            let size = whole.iter().map(|v| v * v).sum::<f64>().sqrt();
            let (first, second) = ordered(a.clone(), b.clone());
            assert!(distance(&product(&first, &second, rank), &whole) < 1e-5 * size);
            // Vectors at right angles on both sides, of one size, falling: a singular value decomposition, and so the nearest.
            let rows = first.to_f32().chunks_exact(inputs).map(widened).collect::<Vec<_>>();
            let columns = (0..rank).map(|r| {
                (0..outputs).map(|row| f64::from(second.to_f32()[row * rank + r])).collect::<Vec<_>>()
            });
            let columns = columns.collect::<Vec<_>>();
            for i in 0..rank {
                assert!((norm(&rows[i]) - norm(&columns[i])).abs() < 1e-4 * size.sqrt(), "{rank} {i}");
                for j in 0..i {
                    assert!(norm(&rows[j]) >= norm(&rows[i]) - 1e-5);
                    let limit = 1e-4 * size;
                    assert!(
                        dot(&rows[i], &rows[j]).abs() < limit && dot(&columns[i], &columns[j]).abs() < limit
                    );
                }
            }
            for kept in 1..rank {
                let before = distance(&product(&a, &b, kept), &whole);
                assert!(distance(&product(&first, &second, kept), &whole) <= before + 1e-5 * size);
            }
        }
    }

    #[test]
    fn an_adapter_that_has_learnt_nothing_and_ranks_that_are_the_same_twice_are_no_trouble() {
        let (a, mut b) = (matrix(4, 10, 3), matrix(7, 4, 4));
        b.data = HostData::F32(vec![0.0; 28]);
        let (first, second) = ordered(a, b);
        let all = [first.to_f32(), second.to_f32()].concat();
        assert!(all.iter().all(|v| *v == 0.0), "{all:?}");
        // Two ranks that are one: the second has nothing left.
        let twice = |m: &HostMatrix, by_row: bool| {
            let values = m.to_f32();
            let data = if by_row {
                [values.clone(), values].concat()
            } else {
                values.iter().flat_map(|v| [*v; 2]).collect()
            };
            let (rows, columns) = if by_row { (2, m.columns) } else { (m.rows, 2) };
            HostMatrix { name: "m".into(), rows, columns, data: HostData::F32(data) }
        };
        let (a, b) = (matrix(1, 6, 5), matrix(5, 1, 6));
        let (first, second) = ordered(twice(&a, true), twice(&b, false));
        let whole = product(&a, &b, 1).iter().map(|v| 2.0 * v).collect::<Vec<_>>();
        assert!(distance(&product(&first, &second, 1), &whole) < 1e-5);
    }
}
