//! Searches that are written down and read back, small spaces, bad settings, and what is made of the scores.

use super::problem::{settings, space};
use lonas::search::{
    Evaluation, Genome, Method, Search, SearchError, cheapest_below, dominates, front, fronts, hypervolume,
};
use lonas::supernet::SearchSpace;
use proptest::prelude::*;
use serde_json::{Value, json};

/// Something that all genes take part in.
fn score(genome: &Genome) -> Vec<f64> {
    let genes = genome.genes().iter().enumerate();
    let cost = genes.clone().map(|(i, &g)| ((i % 3 + 1) * g) as f64).sum::<f64>();
    vec![-cost, genes.map(|(i, &g)| ((i * 7 % 5) * g * g) as f64 / 8.0).sum()]
}

/// Tells up to `most` more genomes, and whether there were so many.
fn go_on(search: &mut Search, most: usize) -> bool {
    for _ in 0..most {
        let asked = search.ask(&|_| Vec::new());
        let Some(genome) = asked.first() else { return false };
        search.tell(genome, score(genome)).unwrap();
    }
    true
}

fn written(search: &Search) -> Value {
    serde_json::to_value(search).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_search_that_is_interrupted_anywhere_ends_the_same(
        faithful in any::<bool>(), layers in 1usize..5, choices in [1usize..4, 2..5, 1..3],
        population in 2usize..9, stops in prop::collection::vec(1usize..12, 1..6), seed in any::<u64>(),
    ) {
        let method = if faithful { Method::Faithful } else { Method::Guided };
        let (space, settings) = (space(layers, choices), settings(method, 40, population, seed));
        let mut through = Search::new(&space, settings.clone()).unwrap();
        while go_on(&mut through, 10) {}
        let mut broken = Search::new(&space, settings.clone()).unwrap();
        for most in stops {
            go_on(&mut broken, most);
            let read: Search = serde_json::from_str(&written(&broken).to_string()).unwrap();
            prop_assert_eq!(&read, &broken);
            broken = read.restored(&space, &settings).unwrap();
        }
        while go_on(&mut broken, 10) {}
        prop_assert_eq!(&broken, &through);
        prop_assert!(through.evaluations().len() <= through.total());
    }

    #[test]
    fn fronts_part_the_points_and_hypervolume_is_the_area(
        points in prop::collection::vec([0u8..9, 0..9], 0..30),
    ) {
        let points = points.iter().map(|p| p.map(f64::from)).collect::<Vec<_>>();
        let slices = points.iter().map(|p| &p[..]).collect::<Vec<_>>();
        let fronts = fronts(&slices);
        let mut all = fronts.concat();
        all.sort_unstable();
        prop_assert_eq!(all, (0..points.len()).collect::<Vec<_>>());
        for pair in fronts.windows(2) {
            for &i in &pair[1] {
                prop_assert!(pair[0].iter().any(|&better| dominates(slices[better], slices[i])));
            }
        }
        // Unit squares whose lower corner is dominated by a point.
        let squares = (0..8).flat_map(|x| (0..8).map(move |y| [f64::from(x), f64::from(y)]));
        let dominated = squares.filter(|s| points.iter().any(|p| p[0] <= s[0] && p[1] <= s[1]));
        prop_assert_eq!(hypervolume(&points, [8.0, 8.0]), dominated.count() as f64);
    }
}

#[test]
fn what_was_told_is_checked() {
    let mut search = Search::new(&space(2, [2, 3, 2]), settings(Method::Guided, 20, 4, 0)).unwrap();
    let asked = search.ask(&|_| Vec::new());
    let told = |search: &mut Search, genome, objectives: &[f64]| search.tell(genome, objectives.to_vec());
    for (bad, named) in [
        (&[1.0][..], "2 for"),
        (&[1.0, f64::NAN], "finite"),
        (&[1.0, f64::INFINITY], "finite"),
        (&[], "2 for"),
    ] {
        let error = told(&mut search, &asked[0], bad).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    told(&mut search, &asked[0], &[1.0, 2.0]).unwrap();
    let again = told(&mut search, &asked[0], &[1.0, 2.0]).unwrap_err();
    assert!(matches!(again, SearchError::NotAsked { .. }), "{again}");
    assert_eq!(search.ask(&|_| Vec::new()), asked[1..], "the rest is asked for again");
}

#[test]
fn settings_that_no_search_can_run_by_are_refused() {
    let spaces = [space(1, [2, 2, 2]), space(2, [1, 1, 1])];
    let new = |space: &SearchSpace, evaluations, population| {
        Search::new(space, settings(Method::Faithful, evaluations, population, 0)).unwrap_err().to_string()
    };
    assert!(new(&spaces[0], 10, 1).contains("population: expected at least 2, got 1"));
    assert!(new(&spaces[0], 10, 11).contains("population: expected at most the 10 evaluations, got 11"));
    assert!(new(&spaces[0], usize::MAX, 11).contains("evaluations"));
    assert!(new(&spaces[1], 10, 5).contains("only one sub-network"));
}

#[test]
fn a_state_of_something_else_is_refused() {
    let (space, settings) = (space(2, [2, 3, 2]), settings(Method::Faithful, 20, 4, 0));
    let mut search = Search::new(&space, settings.clone()).unwrap();
    go_on(&mut search, 10);
    let restored = |change: &dyn Fn(&mut Value)| {
        let mut state = written(&search);
        change(&mut state);
        let read = serde_json::from_value::<Search>(state).map_err(|e| e.to_string())?;
        read.restored(&space, &settings).map(|_| ()).map_err(|e| e.to_string())
    };
    restored(&|_| {}).unwrap();
    for (pointer, value, named) in [
        ("/settings/seed", json!(1), "settings"),
        ("/genes/choices/0", json!(3), "another search space"),
        ("/evaluations/0/genome/0", json!(2), "no genome"),
        ("/evaluations/0/genome", json!([0]), "no genome"),
        ("/members/0/genome/0", json!(-1), "invalid value"),
        ("/members/0/objectives", json!([0.0]), "expected 2 finite objectives"),
        ("/asked/0/0/0", json!(7), "no genome"),
    ] {
        let error = restored(&|state| *state.pointer_mut(pointer).unwrap() = value.clone()).unwrap_err();
        assert!(error.contains(named), "{pointer}: {error}");
    }
}

#[test]
fn the_best_is_the_cheapest_strictly_below_the_limit() {
    let evaluation = |gene, objectives: [f64; 2]| {
        let genome = serde_json::from_value::<Genome>(json!([gene])).unwrap();
        Evaluation { genome, objectives: objectives.to_vec(), generation: 1 }
    };
    let all = [[5.0, -0.5], [3.0, -0.44], [2.0, -0.43], [3.0, -0.6], [9.0, -0.6]];
    let all = all.iter().enumerate().map(|(i, o)| evaluation(i, *o)).collect::<Vec<_>>();
    assert_eq!(
        cheapest_below(&all, -0.43),
        Some(&all[1]),
        "-0.43 is not below, and the first of two at 3 counts"
    );
    assert_eq!(cheapest_below(&all, -0.425), Some(&all[2]));
    assert_eq!(cheapest_below(&all, -0.6), None);
    assert_eq!(front(&all), [&all[2], &all[3]]);
}
