//! A problem shaped like ours with a closed formula: 30 layers, 90 groups of 2 or 5 choices, cost against error.

use lonas::search::{Genome, Method, Search, Settings};
use lonas::supernet::{Channels, Group, Kind, LinearShape, ModelShape, Part, SearchSpace, TensorRef};

pub(crate) const LAYERS: usize = 30;
/// By kind of group: its number of choices.
const CHOICES: [usize; 3] = [2, 5, 2];

/// A space of so many layers with the groups of LoNAS's BLOOMZ configuration: a rank, a width, a rank.
pub(crate) fn space(layers: usize, choices: [usize; 3]) -> SearchSpace {
    let linear = |name: String, out, inp, rank| LinearShape { name, out, inp, rank };
    let [r, w, s] = choices;
    let of_layer = |l| {
        [
            linear(format!("{l}.q"), 8, 8, Some(r)),
            linear(format!("{l}.up"), w, 8, Some(s)),
            linear(format!("{l}.down"), 8, w, None),
        ]
    };
    let channels = |l| Channels::width(vec![3 * l + 1], vec![3 * l + 2]);
    let linears = (0..layers).flat_map(of_layer).collect();
    let shape = ModelShape::language_model(linears, (0..layers).map(channels).collect());
    let tensors =
        |linear: usize, parts: &[Part]| parts.iter().map(|&part| TensorRef { linear, part }).collect();
    let group = |(kind, layer): (usize, usize)| {
        let (kind_of, linear, members, followers) = match kind {
            0 => (Kind::Rank, 3 * layer, vec![Part::LoraA], tensors(3 * layer, &[Part::LoraB])),
            1 => {
                let down = tensors(3 * layer + 2, &[Part::Weight]);
                (Kind::Width, 3 * layer + 1, vec![Part::Weight, Part::LoraB], down)
            }
            _ => (Kind::Rank, 3 * layer + 1, vec![Part::LoraA], tensors(3 * layer + 1, &[Part::LoraB])),
        };
        let choices = (1..=choices[kind]).rev().collect();
        Group { kind: kind_of, members: tensors(linear, &members), followers, choices }
    };
    let groups = (0..3).flat_map(|kind| (0..layers).map(move |layer| (kind, layer)));
    SearchSpace::new(&shape, groups.map(group).collect()).unwrap()
}

pub(crate) fn whole_space() -> SearchSpace {
    space(LAYERS, CHOICES)
}

/// (cost, error): `tests/golden/search/make_search.py` has the same formula in the same order of operations.
pub(crate) fn objectives(genome: &Genome) -> [f64; 2] {
    let (mut cost, mut linear, mut mixed, mut before) = (100.0, 0.0, 0.0, 0.0);
    for (group, &gene) in genome.genes().iter().enumerate() {
        let (kind, layer) = (group / LAYERS, group % LAYERS);
        let x = gene as f64 / (CHOICES[kind] - 1) as f64;
        let saved = [0.125, 1.0, 0.25][kind] * (1.0 + 0.125 * ((layer * 7) % 5) as f64);
        cost -= saved * x;
        let hurt = [0.25, 1.0, 0.125][kind] * (0.125 + ((layer * 37 + kind * 11) % 29) as f64 / 16.0);
        linear += hurt * (0.5 * x + 0.5 * x * x);
        if layer > 0 {
            mixed += 0.25 * hurt * x * before;
        }
        before = x;
    }
    let total = linear + mixed;
    [cost, total + total * total / 64.0]
}

pub(crate) fn settings(method: Method, evaluations: usize, population: usize, seed: u64) -> Settings {
    Settings { method, evaluations, population, seed }
}

/// Runs a search to its end; `after` sees it after each generation. Cost is known without scoring, and scores are `score`'s.
pub(crate) fn run(search: &mut Search, score: impl Fn(&Genome) -> [f64; 2], mut after: impl FnMut(&Search)) {
    let known = |genome: &Genome| vec![Some(objectives(genome)[0]), None];
    loop {
        let asked = search.ask(&known);
        if !search.evaluations().is_empty() {
            after(search);
        }
        if asked.is_empty() {
            return;
        }
        for genome in asked {
            search.tell(&genome, score(&genome).to_vec()).unwrap();
        }
    }
}
