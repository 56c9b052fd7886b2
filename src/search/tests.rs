//! What cannot be seen from outside: operators against pymoo's counts, seeds, the surrogate.

use super::genome::{Genes, Genome};
use super::nsga2::{Mutation, cross, mutate};
use super::seeds::{scattered, seeds};
use super::surrogate::Surrogate;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

#[derive(Deserialize)]
struct Operators {
    samples: usize,
    crossover: Vec<Crossover>,
    mutation: Vec<Mutated>,
    /// By number of changed genes, how many of `samples` children.
    changed: Vec<usize>,
}

/// Of `samples / 2` pairs of children, by `first * choices + second`.
#[derive(Deserialize)]
struct Crossover {
    choices: usize,
    parents: [usize; 2],
    pairs: Vec<usize>,
}

#[derive(Deserialize)]
struct Mutated {
    choices: usize,
    value: usize,
    counts: Vec<usize>,
}

fn golden() -> Operators {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/search/operators.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// One gene of interest, and 89 more, so that genes mutate at the rate of 90 groups.
fn one_of_ninety(choices: usize) -> Genes {
    let choices = std::iter::once(choices).chain(std::iter::repeat_n(2, 89)).collect::<Vec<_>>();
    Genes { classes: vec![0; 90], choices }
}

fn with_first(gene: usize) -> Genome {
    Genome::new(std::iter::once(gene).chain(std::iter::repeat_n(0, 89)).collect())
}

/// Two samples of the same size from one distribution differ by less than 5 standard errors nearly always.
fn assert_alike(ours: &[usize], theirs: &[usize], what: &str) {
    assert_eq!(ours.iter().sum::<usize>(), theirs.iter().sum::<usize>(), "{what}");
    for (value, (&a, &b)) in ours.iter().zip(theirs).enumerate() {
        let error = ((a + b) as f64).sqrt().max(1.0);
        assert!((a as f64 - b as f64).abs() < 5.0 * error, "{what}: {value} comes {a} times, with pymoo {b}");
    }
}

#[test]
fn crossed_genes_are_distributed_as_pymoos() {
    let (golden, mut random) = (golden(), ChaCha8Rng::seed_from_u64(1));
    for Crossover { choices, parents, pairs } in golden.crossover {
        let genes = one_of_ninety(choices);
        let [a, b] = parents.map(with_first);
        let mut ours = vec![0; choices * choices];
        for _ in 0..golden.samples / 2 {
            let (one, other) = cross(&a, &b, &genes, &mut random);
            ours[one.genes()[0] * choices + other.genes()[0]] += 1;
            assert_eq!(one.genes()[1..], a.genes()[1..], "what the parents have in common stays");
        }
        assert_alike(&ours, &pairs, &format!("{choices} choices, {parents:?}"));
    }
}

#[test]
fn mutated_genes_are_distributed_as_pymoos() {
    let (golden, mut random) = (golden(), ChaCha8Rng::seed_from_u64(2));
    let always = Mutation { children: 1.0, ..Mutation::faithful(90) };
    for Mutated { choices, value, counts } in golden.mutation {
        let mut ours = vec![0; choices];
        for _ in 0..golden.samples {
            let mut child = with_first(value);
            mutate(&mut child, &one_of_ninety(choices), always, &mut random);
            ours[child.genes()[0]] += 1;
        }
        assert_alike(&ours, &counts, &format!("{value} of {choices}"));
    }
    let mut changed = vec![0; golden.changed.len()];
    for _ in 0..golden.samples {
        let mut child = with_first(0);
        mutate(&mut child, &one_of_ninety(2), Mutation::faithful(90), &mut random);
        changed[child.genes().iter().filter(|&&g| g != 0).count()] += 1;
    }
    assert_alike(&changed, &golden.changed, "changed genes of a child");
    assert!(changed[0] > golden.samples * 97 / 100, "few children mutate at all");
}

#[test]
fn seeds_reach_both_ends_and_every_level_and_are_different() {
    let genes = Genes { choices: vec![2, 2, 5, 5, 1], classes: vec![0, 0, 1, 1, 2] };
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let all = seeds(&genes, 40, &mut random);
    assert_eq!(all.len(), 40);
    assert!(all.iter().all(|g| genes.accept(g)));
    assert_eq!(all.iter().collect::<std::collections::HashSet<_>>().len(), 40);
    let has = |genes: [usize; 5]| all.contains(&Genome::new(genes.to_vec()));
    assert_eq!(all[..2], [Genome::new(vec![0; 5]), Genome::new(vec![1, 1, 4, 4, 0])]);
    assert!(has([0, 0, 2, 2, 0]), "LoNAS's heuristic");
    assert!(has([0, 0, 1, 1, 0]) && has([1, 1, 2, 2, 0]), "uniform levels");
    assert!(has([1, 1, 0, 0, 0]) && has([0, 0, 4, 4, 0]), "one class cut, the other not");
    assert_eq!(seeds(&genes, 2, &mut random), all[..2], "the ends come first");
    assert_eq!(seeds(&genes, 1000, &mut random).len(), 100, "a small space is exhausted");
}

#[test]
fn the_surrogate_tells_which_groups_matter() {
    let genes = Genes { choices: vec![5; 40], classes: (0..40).map(|g| g / 20).collect() };
    let mut random = ChaCha8Rng::seed_from_u64(4);
    let matters = (0..40).map(|_| random.random::<f64>().powi(3)).collect::<Vec<_>>();
    let value = |genome: &Genome| {
        let hurt = genes.cuts(genome).iter().zip(&matters).map(|(x, m)| m * x).sum::<f64>();
        hurt + 0.05 * hurt * hurt
    };
    let genomes = (0..240).map(|_| scattered(&genes, &mut random)).collect::<Vec<_>>();
    let (learnt, unseen) = genomes.split_at(120);
    let values = learnt.iter().map(value).collect::<Vec<_>>();
    let surrogate = Surrogate::fit(&genes, &learnt.iter().collect::<Vec<_>>(), &values);
    let mean = values.iter().sum::<f64>() / 120.0;
    let (mut wrong, mut spread) = (0.0, 0.0);
    for genome in unseen {
        wrong += (surrogate.guess(genome) - value(genome)).powi(2);
        spread += (value(genome) - mean).powi(2);
    }
    assert!(wrong < 0.02 * spread, "it explains all but {} of the variance", wrong / spread);
    // One value says nothing but itself, and equal ones are expected again.
    let one = Surrogate::fit(&genes, &[&learnt[0], &learnt[1]], &[3.0, 3.0]);
    assert!((one.guess(&unseen[0]) - 3.0).abs() < 1e-9);
}
