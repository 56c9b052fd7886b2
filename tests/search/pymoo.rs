//! The faithful search against pymoo 0.6.0.1: what is deterministic to the number, what is random in distribution.

use super::problem::{self, objectives, settings};
use crate::golden;
use lonas::search::{Method, Search, crowding, fronts, hypervolume};
use lonas::supernet::SearchSpace;
use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Sorted {
    points: Vec<Vec<f64>>,
    fronts: Vec<Vec<usize>>,
    /// By front; null is infinite.
    crowding: Vec<Vec<Option<f64>>>,
    crowding_of_all: Vec<Option<f64>>,
    reference: Vec<f64>,
    hypervolume: Option<f64>,
}

#[test]
fn fronts_and_crowding_and_hypervolume_are_pymoos() {
    let cases = golden::json::<Vec<Sorted>>("search/sorting.json");
    assert_eq!(cases.len(), 60);
    for case in cases {
        let points = case.points.iter().map(Vec::as_slice).collect::<Vec<_>>();
        assert_eq!(fronts(&points), case.fronts);
        let of = |indices: &[usize]| crowding(&indices.iter().map(|&i| points[i]).collect::<Vec<_>>());
        let expected =
            |values: &[Option<f64>]| values.iter().map(|v| v.unwrap_or(f64::INFINITY)).collect::<Vec<_>>();
        for (front, distances) in case.fronts.iter().zip(&case.crowding) {
            assert_near(&of(front), &expected(distances));
        }
        assert_near(&crowding(&points), &expected(&case.crowding_of_all));
        if let Some(area) = case.hypervolume {
            let pairs = points.iter().map(|p| [p[0], p[1]]).collect::<Vec<_>>();
            assert_near(&[hypervolume(&pairs, [case.reference[0], case.reference[1]])], &[area]);
        }
    }
}

fn assert_near(got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    for (g, e) in got.iter().zip(expected) {
        assert!(g == e || (g - e).abs() <= 1e-12 * e.abs().max(1.0), "{got:?} {expected:?}");
    }
}

#[derive(Deserialize)]
struct Example {
    genome: lonas::search::Genome,
    objectives: [f64; 2],
}

#[derive(Deserialize)]
struct Runs {
    reference: [f64; 2],
    generations: usize,
    /// By population, seed and generation.
    hypervolumes: BTreeMap<usize, Vec<Vec<f64>>>,
    examples: Vec<Example>,
}

#[test]
fn both_programs_solve_the_same_problem() {
    let runs = golden::json::<Runs>("search/runs.json");
    assert_eq!(runs.examples.len(), 12);
    for example in runs.examples {
        assert_eq!(objectives(&example.genome), example.objectives);
    }
}

#[test]
fn faithful_fronts_grow_as_pymoos_do() {
    let (runs, space) = (golden::json::<Runs>("search/runs.json"), problem::whole_space());
    assert_eq!(runs.hypervolumes.keys().copied().collect::<Vec<_>>(), [8, 40], "LoNAS's populations");
    for (population, theirs) in &runs.hypervolumes {
        let ours = (0..theirs.len() as u64).map(|seed| hypervolumes(&space, &runs, *population, seed));
        let ours = ours.collect::<Vec<_>>();
        for generation in [1, 3, 8, runs.generations] {
            let at = |of: &[Vec<f64>]| of.iter().map(|run| run[generation - 1]).collect::<Vec<_>>();
            let (ours, theirs) = (Sample::of(at(&ours)), Sample::of(at(theirs)));
            let error = ours.error().hypot(theirs.error());
            let named = format!(
                "population {population}, generation {generation}: {} {}",
                ours.mean(),
                theirs.mean()
            );
            assert!((ours.mean() - theirs.mean()).abs() < 3.0 * error, "{named} +- {error}");
            // Kolmogorov and Smirnov's bound at one in a thousand, of two samples of 40.
            assert!(
                ours.distance(&theirs) < 1.95 * (2.0 / 40.0f64).sqrt(),
                "{named}: {}",
                ours.distance(&theirs)
            );
        }
    }
}

/// Of the population's first front, by generation.
fn hypervolumes(space: &SearchSpace, runs: &Runs, population: usize, seed: u64) -> Vec<f64> {
    let settings = settings(Method::Faithful, population * runs.generations, population, seed);
    let (mut search, mut areas) = (Search::new(space, settings).unwrap(), Vec::new());
    problem::run(&mut search, objectives, |search| {
        let points = search.population().map(|(_, o)| [o[0], o[1]]).collect::<Vec<_>>();
        assert_eq!(points.len(), population);
        areas.push(hypervolume(&points, runs.reference));
    });
    assert_eq!(areas.len(), runs.generations);
    areas
}

struct Sample {
    sorted: Vec<f64>,
}

impl Sample {
    fn of(mut values: Vec<f64>) -> Self {
        assert_eq!(values.len(), 40);
        values.sort_by(f64::total_cmp);
        Self { sorted: values }
    }

    fn mean(&self) -> f64 {
        self.sorted.iter().sum::<f64>() / self.sorted.len() as f64
    }

    /// Of the mean.
    fn error(&self) -> f64 {
        let (mean, n) = (self.mean(), self.sorted.len() as f64);
        (self.sorted.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0) / n).sqrt()
    }

    /// The largest between the two distribution functions.
    fn distance(&self, other: &Self) -> f64 {
        let share =
            |of: &Self, at: f64| of.sorted.partition_point(|&v| v <= at) as f64 / of.sorted.len() as f64;
        let all = self.sorted.iter().chain(&other.sorted);
        all.map(|&at| (share(self, at) - share(other, at)).abs()).fold(0.0, f64::max)
    }
}
