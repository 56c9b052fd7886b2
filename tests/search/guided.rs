//! The default search beside the faithful one.

use super::problem::{self, objectives, settings, whole_space};
use lonas::search::{Genome, Method, Search, front, hypervolume};

#[test]
fn the_default_search_finds_more_than_the_faithful_one() {
    let space = whole_space();
    let worst = |sub_network| objectives(&Genome::of(&space, &sub_network));
    let reference = [worst(space.maximal())[0], worst(space.minimal())[1]];
    let area = |method, population, seed| {
        let mut search = Search::new(&space, settings(method, 120, population, seed)).unwrap();
        problem::run(&mut search, objectives, |_| {});
        assert_eq!(search.evaluations().len(), 120);
        let mut genomes = search.evaluations().iter().map(|e| &e.genome).collect::<Vec<_>>();
        genomes.sort_unstable();
        genomes.dedup();
        assert!(method == Method::Faithful || genomes.len() == 120, "nothing is scored twice");
        let front = front(search.evaluations());
        hypervolume(&front.iter().map(|e| [e.objectives[0], e.objectives[1]]).collect::<Vec<_>>(), reference)
    };
    for seed in 0..8 {
        let (faithful, guided) = (area(Method::Faithful, 8, seed), area(Method::Guided, 10, seed));
        println!("seed {seed}: faithful {faithful:.0}, guided {guided:.0}, ratio {:.3}", guided / faithful);
        assert!(guided > 1.15 * faithful, "seed {seed}: {guided} against {faithful}");
    }
}
