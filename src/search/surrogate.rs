//! A cheap guess of an objective from those that were measured: a Gaussian process over genomes (Rasmussen and Williams
//! 2006, chapters 2 and 5).
//!
//! Its covariance has two parts: a smooth function of how much is cut of each class of groups on average, and a linear one
//! of what each group deviates from its class. So much is known about every space of this kind: layers are alike, but not
//! equally important. How much each part and the noise weigh is chosen by the marginal likelihood.

use super::genome::{Genes, Genome};

/// What is tried for the weight of the linear part, beside 1 for the smooth one.
const LINEAR_WEIGHTS: [f64; 3] = [0.003, 0.02, 0.1];
/// What is tried for the variance of the noise.
const NOISES: [f64; 4] = [1e-6, 1e-3, 1e-2, 1e-1];
/// Of the smooth part: over what change of the mean cut it varies.
const LENGTHS: [f64; 2] = [0.7, 1.5];

/// A fitted process.
pub(super) struct Surrogate<'a> {
    genes: &'a Genes,
    features: Vec<Features>,
    /// `K^-1 (y - mean)`
    weights: Vec<f64>,
    mean: f64,
    length: f64,
    linear: f64,
}

/// What the covariance looks at.
struct Features {
    /// By class: the mean cut.
    means: Vec<f64>,
    /// By group: what it deviates from its class.
    deviations: Vec<f64>,
}

impl Features {
    fn of(genes: &Genes, genome: &Genome) -> Self {
        let cuts = genes.cuts(genome);
        let mut means = vec![0.0; genes.class_count()];
        let mut counts = vec![0.0; means.len()];
        for (&class, cut) in genes.classes.iter().zip(&cuts) {
            means[class] += cut;
            counts[class] += 1.0;
        }
        means.iter_mut().zip(&counts).for_each(|(mean, count)| *mean /= f64::max(*count, 1.0));
        let deviations = genes.classes.iter().zip(&cuts).map(|(&class, cut)| cut - means[class]).collect();
        Self { means, deviations }
    }

    /// The smooth and the linear part.
    fn covariance(&self, other: &Self, length: f64) -> (f64, f64) {
        let square = self.means.iter().zip(&other.means).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
        let product = self.deviations.iter().zip(&other.deviations).map(|(a, b)| a * b).sum::<f64>();
        ((-0.5 * square / (length * length)).exp(), product)
    }
}

impl<'a> Surrogate<'a> {
    /// Fits one objective of at least one genome.
    pub(super) fn fit(genes: &'a Genes, genomes: &[&Genome], values: &[f64]) -> Self {
        let features = genomes.iter().map(|g| Features::of(genes, g)).collect::<Vec<_>>();
        let count = values.len().max(1) as f64;
        let mean = values.iter().sum::<f64>() / count;
        let centred = values.iter().map(|v| v - mean).collect::<Vec<_>>();
        let mut best: Option<(f64, Vec<f64>, f64, f64)> = None;
        for length in LENGTHS {
            let parts = lower(&features, |a, b| a.covariance(b, length));
            for (linear, noise) in LINEAR_WEIGHTS.into_iter().flat_map(|l| NOISES.map(|n| (l, n))) {
                let mut matrix = parts
                    .iter()
                    .map(|row| row.iter().map(|(s, l)| s + linear * l).collect())
                    .collect::<Vec<Vec<f64>>>();
                matrix.iter_mut().for_each(|row| row.last_mut().into_iter().for_each(|d| *d += noise));
                let Some(likelihood) = likelihood(&mut matrix, &centred) else { continue };
                if best.as_ref().is_none_or(|(most, ..)| likelihood.0 > *most) {
                    best = Some((likelihood.0, likelihood.1, length, linear));
                }
            }
        }
        // Where no matrix was positive definite, everything is guessed to be average.
        let (_, weights, length, linear) = best.unwrap_or((0.0, vec![0.0; values.len()], 1.0, 0.0));
        Self { genes, features, weights, mean, length, linear }
    }

    /// The expected value.
    pub(super) fn guess(&self, genome: &Genome) -> f64 {
        let own = Features::of(self.genes, genome);
        let term = |(other, weight): (&Features, &f64)| {
            let (smooth, linear) = own.covariance(other, self.length);
            weight * (smooth + self.linear * linear)
        };
        self.mean + self.features.iter().zip(&self.weights).map(term).sum::<f64>()
    }
}

/// The lower triangle of a symmetric matrix, row by row.
fn lower<T, U>(items: &[T], value: impl Fn(&T, &T) -> U) -> Vec<Vec<U>> {
    items.iter().enumerate().map(|(i, a)| items[..=i].iter().map(|b| value(a, b)).collect()).collect()
}

/// The log marginal likelihood, at the scale of the covariance that makes it largest and without constants, and
/// `K^-1 y`. Turns the lower triangle of `K` into its Cholesky factor; `None` where there is none.
fn likelihood(matrix: &mut [Vec<f64>], values: &[f64]) -> Option<(f64, Vec<f64>)> {
    let count = matrix.len();
    for i in 0..count {
        let (before, rest) = matrix.split_at_mut(i);
        let row = rest.first_mut()?;
        for j in 0..i {
            let sum = dot(&row[..j], &before[j][..j]);
            row[j] = (row[j] - sum) / before[j][j];
        }
        let pivot = row[i] - dot(&row[..i], &row[..i]);
        if pivot.is_nan() || pivot <= 0.0 {
            return None;
        }
        row[i] = pivot.sqrt();
    }
    let mut half = values.to_vec();
    for i in 0..count {
        half[i] = (half[i] - dot(&matrix[i][..i], &half[..i])) / matrix[i][i];
    }
    let scale = dot(&half, &half) / count as f64;
    let determinant = (0..count).map(|i| matrix[i][i].ln()).sum::<f64>();
    let mut weights = half;
    for i in (0..count).rev() {
        weights[i] /= matrix[i][i];
        let solved = weights[i];
        for j in 0..i {
            weights[j] -= matrix[i][j] * solved;
        }
    }
    Some((-0.5 * count as f64 * scale.max(f64::MIN_POSITIVE).ln() - determinant, weights))
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}
