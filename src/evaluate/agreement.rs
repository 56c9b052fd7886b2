//! How far predictions agree with what is right, beyond their share: Matthews' and Pearson's correlations, Spearman's, F1. As GLUE
//! scores its tasks (Wang et al. 2018), with scikit-learn's and SciPy's conventions.

/// Matthews' correlation of chosen and right classes, given in pairs; of more than two classes Gorodkin's `R_K` (2004). 0 where
/// either is always the same, as in scikit-learn.
pub fn matthews(pairs: &[(usize, usize)]) -> f64 {
    let classes = pairs.iter().map(|&(a, b)| a.max(b) + 1).max().unwrap_or(0);
    let (mut chosen, mut right, mut agreed) = (vec![0.0; classes], vec![0.0; classes], 0.0);
    for &(a, b) in pairs {
        chosen[a] += 1.0;
        right[b] += 1.0;
        agreed += f64::from(u8::from(a == b));
    }
    let all = pairs.len() as f64;
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let spread = (all * all - dot(&chosen, &chosen)) * (all * all - dot(&right, &right));
    if spread > 0.0 { (agreed * all - dot(&chosen, &right)) / spread.sqrt() } else { 0.0 }
}

/// F1 of class 1: the harmonic mean of how many of the chosen are right and how many of the right are chosen. 0 where there is
/// neither.
pub fn f1(pairs: &[(usize, usize)]) -> f64 {
    let both = pairs.iter().filter(|&&pair| pair == (1, 1)).count() as f64;
    let either = pairs.iter().map(|&(a, b)| usize::from(a == 1) + usize::from(b == 1)).sum::<usize>() as f64;
    if either > 0.0 { 2.0 * both / either } else { 0.0 }
}

/// Pearson's correlation of two columns; `None` where one does not vary, or is no number.
pub fn pearson(pairs: &[(f64, f64)]) -> Option<f64> {
    let n = pairs.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| pairs.iter().map(of).sum::<f64>() / n;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let sum = |of: &dyn Fn(f64, f64) -> f64| pairs.iter().map(|p| of(p.0 - x, p.1 - y)).sum::<f64>();
    let (both, xx, yy) = (sum(&|x, y| x * y), sum(&|x, _| x * x), sum(&|_, y| y * y));
    let correlation = both / (xx.sqrt() * yy.sqrt());
    correlation.is_finite().then(|| correlation.clamp(-1.0, 1.0))
}

/// Spearman's correlation: Pearson's of ranks, equal numbers sharing the mean of theirs.
pub fn spearman(pairs: &[(f64, f64)]) -> Option<f64> {
    let (x, y): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
    pearson(&ranks(&x).into_iter().zip(ranks(&y)).collect::<Vec<_>>())
}

/// The 95 % interval of a correlation of so many pairs, by Fisher's transformation (1921).
pub fn correlation_interval(correlation: f64, count: usize) -> (f64, f64) {
    if count < 4 {
        return (-1.0, 1.0);
    }
    let (centre, half) = (correlation.atanh(), super::outcome::Z / (count as f64 - 3.0).sqrt());
    ((centre - half).tanh(), (centre + half).tanh())
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order = (0..values.len()).collect::<Vec<_>>();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for equal in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let mean = (2 * first + equal.len() + 1) as f64 / 2.0;
        equal.iter().for_each(|&i| ranks[i] = mean);
        first += equal.len();
    }
    ranks
}
