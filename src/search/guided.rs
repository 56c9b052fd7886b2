//! What the default search asks for next: genomes that a surrogate expects to enlarge the front.
//!
//! For each genome that is really scored hundreds are on the surrogate: an inner NSGA-II, whose
//! objectives are guessed or known, evolves the front that the surrogate believes in, and of it those genomes are asked for
//! that add most hypervolume to what was scored already.

use super::genome::{Genes, Genome};
use super::nsga2::{Member, Mutation, children, mutate, survive};
use super::seeds::scattered;
use super::sorting::{fronts, hypervolume};
use super::surrogate::Surrogate;
use super::{Evaluation, Known};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use std::collections::HashSet;

/// Genomes and generations of the inner search.
const INNER_POPULATION: usize = 100;
const INNER_GENERATIONS: usize = 60;
/// Scored genomes that the surrogate learns from, the best fronts first: its time grows with their third power.
const LEARNT_FROM: usize = 400;

/// `count` new genomes, of two objectives each; fewer where the space has no more.
pub(super) fn propose(
    genes: &Genes,
    evaluations: &[Evaluation],
    count: usize,
    known: &Known<'_>,
    random: &mut ChaCha8Rng,
) -> Vec<Genome> {
    let points = evaluations.iter().map(|e| e.objectives.as_slice()).collect::<Vec<_>>();
    let ranked = fronts(&points).concat();
    let learnt = ranked.iter().take(LEARNT_FROM).map(|&i| &evaluations[i]).collect::<Vec<_>>();
    let genomes = learnt.iter().map(|e| &e.genome).collect::<Vec<_>>();
    let given = known(learnt.first().map_or(&Genome::new(Vec::new()), |e| &e.genome));
    let fit = |objective: usize| {
        // What is known of one genome is known of all.
        if given.get(objective).is_some_and(Option::is_some) {
            return None;
        }
        let values = learnt.iter().map(|e| e.objectives[objective]).collect::<Vec<_>>();
        Some(Surrogate::fit(genes, &genomes, &values))
    };
    let surrogates: [Option<Surrogate<'_>>; 2] = std::array::from_fn(fit);
    let expect = |genome: &Genome| {
        let known = known(genome);
        let guess = |o: usize| surrogates[o].as_ref().map(|s| s.guess(genome));
        [0, 1].map(|o| guess(o).or(known.get(o).copied().flatten()).unwrap_or(0.0))
    };
    let taken = evaluations.iter().map(|e| e.genome.clone()).collect::<HashSet<_>>();
    let mut pool = inner(genes, &learnt, &expect, random);
    pool.retain(|member| !taken.contains(&member.genome));
    let mut chosen = enlarging(&points, pool, count);
    // Where the surrogate expects nothing better, what is near the front may still surprise.
    let mut known = taken;
    known.extend(chosen.iter().cloned());
    for _ in 0..100 * count {
        if chosen.len() == count {
            break;
        }
        let mut near = learnt[random.random_range(0..learnt.len())].genome.clone();
        mutate(&mut near, genes, mutation(genes), random);
        if known.insert(near.clone()) {
            chosen.push(near);
        }
    }
    chosen
}

/// Every child mutates, in two genes on average.
fn mutation(genes: &Genes) -> Mutation {
    Mutation { children: 1.0, genes: (2.0 / genes.len() as f64).min(0.5) }
}

/// The population of a search over what is expected, begun at the best that was scored and some random genomes.
fn inner(
    genes: &Genes,
    learnt: &[&Evaluation],
    expect: &dyn Fn(&Genome) -> [f64; 2],
    random: &mut ChaCha8Rng,
) -> Vec<Member> {
    let member = |genome: Genome| {
        let objectives = expect(&genome).to_vec();
        Member { genome, objectives, crowding: 0.0 }
    };
    let mut begin =
        learnt.iter().take(INNER_POPULATION / 2).map(|e| e.genome.clone()).collect::<HashSet<_>>();
    let fresh = (0..INNER_POPULATION / 2).map(|_| scattered(genes, random)).collect::<Vec<_>>();
    begin.extend(fresh);
    // A set has no order of its own, and the same seed must end in the same genomes.
    let mut begin = begin.into_iter().collect::<Vec<_>>();
    begin.sort_unstable();
    let mut members = survive(begin.into_iter().map(member).collect(), INNER_POPULATION, random);
    for _ in 0..INNER_GENERATIONS {
        let born = children(&members, genes, mutation(genes), INNER_POPULATION, &HashSet::new(), random);
        members.extend(born.into_iter().map(member));
        members = survive(members, INNER_POPULATION, random);
    }
    members
}

/// One after the other the genomes that add most hypervolume to the scored points and those chosen before, by what is
/// expected of them; none that adds nothing.
fn enlarging(points: &[&[f64]], mut pool: Vec<Member>, count: usize) -> Vec<Genome> {
    let pair = |p: &[f64]| [p[0], p[1]];
    let mut front = points.iter().map(|p| pair(p)).collect::<Vec<_>>();
    let all = front.iter().copied().chain(pool.iter().map(|m| pair(&m.objectives))).collect::<Vec<_>>();
    let bound = |o: usize, worst: bool| {
        let of = all.iter().map(|p| p[o]);
        if worst { of.fold(f64::NEG_INFINITY, f64::max) } else { of.fold(f64::INFINITY, f64::min) }
    };
    // Beyond the worst, so that the ends of the front count.
    let reference = [0, 1].map(|o| bound(o, true) + 0.1 * (bound(o, true) - bound(o, false)));
    let mut chosen = Vec::new();
    while chosen.len() < count {
        let area = hypervolume(&front, reference);
        let gain = |member: &Member| {
            let with = [front.as_slice(), &[pair(&member.objectives)]].concat();
            hypervolume(&with, reference) - area
        };
        let gains = pool.iter().map(gain).enumerate();
        let Some((best, _)) = gains.filter(|(_, g)| *g > 0.0).max_by(|a, b| a.1.total_cmp(&b.1)) else {
            break;
        };
        let member = pool.swap_remove(best);
        front.push(pair(&member.objectives));
        chosen.push(member.genome);
    }
    chosen
}
