//! Genomes to begin with: those that span the space, then random ones of every size.
//!
//! Uniformly random genomes of many groups all cost about the same, which is why a search that begins with them alone
//! hardly finds the ends of the front.

use super::genome::{Genes, Genome};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use std::collections::HashSet;

/// At most `count` different genomes: nothing cut, everything, all groups by the same share at each level that a class has,
/// LoNAS's heuristic; one class cut while the others are not, and the other way round; then random ones.
pub(super) fn seeds(genes: &Genes, count: usize, random: &mut ChaCha8Rng) -> Vec<Genome> {
    let mut seeds = Vec::with_capacity(count);
    let mut known = HashSet::new();
    let mut add = |seed: Genome| {
        if seeds.len() < count && known.insert(seed.clone()) {
            seeds.push(seed);
        }
        seeds.len()
    };
    let most = genes.choices.iter().copied().max().unwrap_or(1).max(2) - 1;
    let levels = (0..=most).map(|level| level as f64 / most as f64);
    // The ends first: they decide how far the front reaches, and may be all there is room for.
    for level in [0.0, 1.0].into_iter().chain(levels) {
        add(genes.cut(|_, _| level));
    }
    // LoNAS's heuristic: the middle choice, the larger one of two.
    add(Genome::new(genes.choices.iter().map(|&n| (n - 1) / 2).collect()));
    for of_class in 0..genes.class_count() {
        add(genes.cut(|_, class| f64::from(u8::from(class == of_class))));
        add(genes.cut(|_, class| f64::from(u8::from(class != of_class))));
    }
    // A small space may have fewer genomes than are asked for.
    for _ in 0..20 * count {
        if add(scattered(genes, random)) == count {
            break;
        }
    }
    seeds
}

/// A random genome of a random size: each class has a mean cut, around which its groups vary.
pub(super) fn scattered(genes: &Genes, random: &mut ChaCha8Rng) -> Genome {
    let overall = random.random::<f64>();
    let means =
        (0..genes.class_count()).map(|_| 0.5 * (overall + random.random::<f64>())).collect::<Vec<_>>();
    genes.cut(|_, class| means[class] + random.random_range(-0.5..=0.5))
}
