//! NSGA-II's operators as pymoo 0.6.0.1 has them and NNCF's BootstrapNAS calls them, which LoNAS's scripts do.
//!
//! Genes are integers: an operator computes with real numbers between the first and the last choice and rounds, a half to
//! the even neighbour.

use super::genome::{Genes, Genome};
use super::sorting::{by_falling, crowding, dominates, fronts};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::HashSet;

/// Pairs of parents that are crossed; the others' children are copies (NNCF's default).
const CROSSOVER_RATE: f64 = 0.9;
/// How near to their parents children stay (NNCF's default).
const CROSSOVER_ETA: f64 = 10.0;
/// Likewise of mutated genes (NNCF's default).
pub(super) const MUTATION_ETA: f64 = 3.0;
/// Times that mating is tried again where children are duplicates.
const ATTEMPTS: usize = 100;

/// A scored genome in the population.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Member {
    pub(super) genome: Genome,
    pub(super) objectives: Vec<f64>,
    /// Within its front, when it survived.
    #[serde(deserialize_with = "null_is_infinite")]
    pub(super) crowding: f64,
}

/// JSON has no infinity; serde_json writes null for it.
fn null_is_infinite<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
}

/// Which children mutate, and how much of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mutation {
    /// Share of children that mutate at all.
    pub(super) children: f64,
    /// Share of such a child's genes.
    pub(super) genes: f64,
}

impl Mutation {
    /// NNCF's 0.02, which pymoo takes for the share of children; of their genes one mutates on average.
    pub(super) fn faithful(genes: usize) -> Self {
        Self { children: 0.02, genes: (1.0 / genes as f64).min(0.5) }
    }
}

/// The best `count` by front, then by crowding; of equals any.
pub(super) fn survive(merged: Vec<Member>, count: usize, random: &mut ChaCha8Rng) -> Vec<Member> {
    let points = merged.iter().map(|m| m.objectives.as_slice()).collect::<Vec<_>>();
    let mut kept: Vec<(usize, f64)> = Vec::new();
    for front in fronts(&points) {
        if kept.len() >= count {
            break;
        }
        let distances = crowding(&front.iter().map(|&i| points[i]).collect::<Vec<_>>());
        let mut places = (0..front.len()).collect::<Vec<_>>();
        if kept.len() + front.len() > count {
            places.shuffle(random);
            places.sort_by(by_falling(&distances));
            places.truncate(count - kept.len());
        }
        kept.extend(places.into_iter().map(|place| (front[place], distances[place])));
    }
    let mut merged = merged.into_iter().map(Some).collect::<Vec<_>>();
    let member = |(i, crowding): (usize, f64)| Some(Member { crowding, ..merged[i].take()? });
    kept.into_iter().filter_map(member).collect()
}

/// `count` children that are neither among the members nor in `taken` nor twice; fewer where that does not come about.
pub(super) fn children(
    members: &[Member],
    genes: &Genes,
    mutation: Mutation,
    count: usize,
    taken: &HashSet<Genome>,
    random: &mut ChaCha8Rng,
) -> Vec<Genome> {
    let mut known = members.iter().map(|m| m.genome.clone()).collect::<HashSet<_>>();
    let mut children = Vec::with_capacity(count);
    if members.is_empty() {
        return children;
    }
    for _ in 0..ATTEMPTS {
        let pairs = (count - children.len()).div_ceil(2);
        // All first children stand before all second ones, which matters where only some are taken.
        let (mut born, mut second) = (Vec::with_capacity(2 * pairs), Vec::with_capacity(pairs));
        for [a, b] in parents(members, pairs, random) {
            let (one, other) = cross(&members[a].genome, &members[b].genome, genes, random);
            born.push(one);
            second.push(other);
        }
        born.append(&mut second);
        for child in &mut born {
            mutate(child, genes, mutation, random);
        }
        let fresh = born.into_iter().filter(|child| !taken.contains(child) && known.insert(child.clone()));
        let missing = count - children.len();
        children.extend(fresh.take(missing));
        if children.len() == count {
            break;
        }
    }
    children
}

/// Binary tournaments: everybody meets somebody once before anybody meets a second one.
fn parents(members: &[Member], pairs: usize, random: &mut ChaCha8Rng) -> Vec<[usize; 2]> {
    let mut order = Vec::with_capacity(4 * pairs + members.len());
    while order.len() < 4 * pairs {
        let from = order.len();
        order.extend(0..members.len());
        order[from..].shuffle(random);
    }
    let mut winner = |a: usize, b: usize| {
        let (first, second) = (&members[a], &members[b]);
        if dominates(&first.objectives, &second.objectives) {
            return a;
        }
        if dominates(&second.objectives, &first.objectives) {
            return b;
        }
        match first.crowding.total_cmp(&second.crowding) {
            std::cmp::Ordering::Greater => a,
            std::cmp::Ordering::Less => b,
            std::cmp::Ordering::Equal => *[a, b].get(random.random_range(0..2)).unwrap_or(&a),
        }
    };
    order[..4 * pairs]
        .chunks_exact(4)
        .map(|four| [winner(four[0], four[1]), winner(four[2], four[3])])
        .collect()
}

/// Simulated binary crossover (Deb and Agrawal 1995) within bounds: two children of two parents. Genes in which the
/// parents agree stay, and each other gene is crossed with probability 1/2.
pub(super) fn cross(a: &Genome, b: &Genome, genes: &Genes, random: &mut ChaCha8Rng) -> (Genome, Genome) {
    let (mut one, mut other) = (a.genes().to_vec(), b.genes().to_vec());
    if random.random::<f64>() >= CROSSOVER_RATE {
        return (Genome::new(one), Genome::new(other));
    }
    // In half of the pairs children exchange genes, each with probability 1/2.
    let exchange = if random.random::<f64>() > 0.5 { 0.0 } else { 0.5 };
    for (gene, &choices) in genes.choices.iter().enumerate() {
        if one[gene] == other[gene] || random.random::<f64>() >= 0.5 {
            continue;
        }
        let (low, high) = (one[gene].min(other[gene]) as f64, one[gene].max(other[gene]) as f64);
        let most = (choices - 1) as f64;
        let (share, distance) = (random.random::<f64>(), high - low);
        let lower = 0.5 * (low + high - spread(share, 1.0 + 2.0 * low / distance) * distance);
        let upper = 0.5 * (low + high + spread(share, 1.0 + 2.0 * (most - high) / distance) * distance);
        let rounded = |value: f64| value.clamp(0.0, most).round_ties_even() as usize;
        (one[gene], other[gene]) = match random.random::<f64>() < exchange {
            true => (rounded(upper), rounded(lower)),
            false => (rounded(lower), rounded(upper)),
        };
    }
    (Genome::new(one), Genome::new(other))
}

/// How far apart the children are, in distances of the parents; `beta` says how far a bound allows it.
fn spread(share: f64, beta: f64) -> f64 {
    let power = 1.0 / (CROSSOVER_ETA + 1.0);
    let alpha = 2.0 - beta.powf(-(CROSSOVER_ETA + 1.0));
    match share <= 1.0 / alpha {
        true => (share * alpha).powf(power),
        false => (1.0 / (2.0 - share * alpha)).powf(power),
    }
}

/// Polynomial mutation (Deb and Goyal 1996) within bounds.
pub(super) fn mutate(child: &mut Genome, genes: &Genes, mutation: Mutation, random: &mut ChaCha8Rng) {
    if random.random::<f64>() > mutation.children {
        return;
    }
    let mut mutated = child.genes().to_vec();
    for (gene, &choices) in mutated.iter_mut().zip(&genes.choices) {
        if choices > 1 && random.random::<f64>() < mutation.genes {
            let most = (choices - 1) as f64;
            let share = random.random::<f64>();
            let moved = *gene as f64 + most * shift(share, *gene as f64 / most);
            *gene = moved.clamp(0.0, most).round_ties_even() as usize;
        }
    }
    *child = Genome::new(mutated);
}

/// How far a gene at `place` moves, both in parts of its range.
fn shift(share: f64, place: f64) -> f64 {
    let (eta, power) = (MUTATION_ETA + 1.0, 1.0 / (MUTATION_ETA + 1.0));
    if share <= 0.5 {
        (2.0 * share + (1.0 - 2.0 * share) * (1.0 - place).powf(eta)).powf(power) - 1.0
    } else {
        1.0 - (2.0 * (1.0 - share) + 2.0 * (share - 0.5) * place.powf(eta)).powf(power)
    }
}
