//! A model of five Linears by hand: what its sub-networks are, cost and leave of it.

use super::*;
use proptest::prelude::*;

const GATE: usize = 1;
const UP: usize = 2;
const DOWN: usize = 3;

/// `q` (4 of 6), a gated MLP of width 10 with adapters of rank 5, a head without one.
fn shape() -> ModelShape {
    let linear = |name: &str, out, inp, rank| LinearShape { name: name.into(), out, inp, rank };
    ModelShape::language_model(
        vec![
            linear("q", 4, 6, Some(5)),
            linear("mlp.gate", 10, 6, Some(5)),
            linear("mlp.up", 10, 6, Some(5)),
            linear("mlp.down", 6, 10, None),
            linear("head", 20, 6, None),
        ],
        vec![Channels::width(vec![GATE, UP], vec![DOWN])],
    )
}

fn tensor(linear: usize, part: Part) -> TensorRef {
    TensorRef { linear, part }
}

fn rank(linears: &[usize], choices: &[usize]) -> Group {
    let all = |part| linears.iter().map(|&l| tensor(l, part)).collect();
    Group {
        kind: Kind::Rank,
        members: all(Part::LoraA),
        followers: all(Part::LoraB),
        choices: choices.to_vec(),
    }
}

fn width(choices: &[usize]) -> Group {
    let members = [GATE, UP].into_iter().flat_map(|l| [tensor(l, Part::Weight), tensor(l, Part::LoraB)]);
    Group {
        kind: Kind::Width,
        members: members.collect(),
        // The down projection of this model has no adapter.
        followers: vec![tensor(DOWN, Part::Weight)],
        choices: choices.to_vec(),
    }
}

fn space() -> SearchSpace {
    SearchSpace::new(
        &shape(),
        vec![rank(&[0], &[5, 3]), width(&[10, 8, 5, 2]), rank(&[GATE, UP], &[5, 4, 1])],
    )
    .unwrap()
}

#[test]
fn the_three_sub_networks_are_the_first_the_middle_and_the_last_choice() {
    // LoNAS: the middle of the descending list, the larger of two.
    for (choices, middle) in
        [(&[9][..], 9), (&[9, 7], 9), (&[9, 7, 5], 7), (&[9, 7, 5, 3], 7), (&[9, 7, 5, 3, 1], 5)]
    {
        let group = Group { choices: choices.to_vec(), ..width(&[]) };
        assert_eq!(
            (group.maximal(), group.heuristic(), group.minimal()),
            (9, middle, *choices.last().unwrap())
        );
    }
    let space = space();
    assert_eq!(space.maximal().choices(), [5, 10, 5]);
    assert_eq!(space.heuristic().choices(), [5, 8, 4]);
    assert_eq!(space.minimal().choices(), [3, 2, 1]);
}

#[test]
fn a_space_counts_its_sub_networks_in_powers_of_ten() {
    assert!((space().log10_size() - 24f64.log10()).abs() < 1e-12);
    let empty = SearchSpace::new(&shape(), Vec::new()).unwrap();
    assert_eq!(empty.log10_size(), 0.0);
    assert_eq!(empty.maximal().choices(), &[] as &[usize]);
    assert_eq!(empty.resolve(&shape(), &empty.maximal()), shape().full());
}

#[test]
fn a_sub_network_is_one_offered_choice_for_each_group() {
    let space = space();
    assert_eq!(space.sub_network(vec![3, 8, 1]).unwrap().choices(), [3, 8, 1]);
    assert_eq!(space.sub_network(vec![3, 8]), Err(SpaceError::WrongCount { expected: 3, got: 2 }));
    assert_eq!(space.sub_network(vec![3, 8, 1, 1]), Err(SpaceError::WrongCount { expected: 3, got: 4 }));
    let refused = SpaceError::NotAChoice { group: 1, choices: vec![10, 8, 5, 2], got: 9 };
    assert_eq!(space.sub_network(vec![3, 9, 1]), Err(refused));
    // An index beyond the last choice is the last choice.
    assert_eq!(space.pick(|_, _| 99), space.minimal());
    assert_eq!(space.pick(|_, _| 0), space.maximal());
}

#[test]
fn a_sub_network_leaves_prefixes_of_each_linear() {
    let space = space();
    let active = space.resolve(&shape(), &space.sub_network(vec![3, 8, 4]).unwrap());
    let sizes = active.linears.iter().map(|l| (l.out, l.inp, l.rank)).collect::<Vec<_>>();
    assert_eq!(sizes, [(4, 6, 3), (8, 6, 4), (8, 6, 4), (6, 8, 0), (20, 6, 0)]);
    assert_eq!(space.resolve(&shape(), &space.maximal()), shape().full());
    assert_eq!(active.linears[1].to_string(), "8x6 rank 4");
}

#[test]
fn a_cost_is_every_linear_and_adapter_once() {
    let space = space();
    let cost = |choices| Cost::of(&shape(), &space.resolve(&shape(), &space.sub_network(choices).unwrap()));
    // By hand: q 24 + 5 (6 + 4); gate, up 60 + 5 (6 + 10) each; down 60; head 120.
    let full = 24 + 50 + 2 * (60 + 80) + 60 + 120;
    assert_eq!(cost(vec![5, 10, 5]), Cost { parameters: full, macs: full * 256 });
    // q 24 + 3 (6 + 4); gate, up 12 + 1 (6 + 2) each; down 12; head 120.
    let least = 24 + 30 + 2 * (12 + 8) + 12 + 120;
    assert_eq!(cost(vec![3, 2, 1]), Cost { parameters: least, macs: least * 256 });
}

#[test]
fn an_mlp_that_is_left_out_costs_nothing() {
    let space = SearchSpace::new(&shape(), vec![width(&[10, 0])]).unwrap();
    let active = space.resolve(&shape(), &space.minimal());
    let sizes = active.linears.iter().map(|l| (l.out, l.inp, l.rank)).collect::<Vec<_>>();
    assert_eq!(sizes, [(4, 6, 5), (0, 6, 0), (0, 6, 0), (6, 0, 0), (20, 6, 0)]);
    assert!(shape().keeps_ranks(&active));
    let left = 24 + 50 + 120;
    assert_eq!(Cost::of(&shape(), &active), Cost { parameters: left, macs: left * 256 });
}

#[test]
fn a_group_that_no_sub_network_could_be_cut_by_is_refused() {
    let refused = |groups: Vec<Group>| SearchSpace::new(&shape(), groups).unwrap_err();
    for choices in [&[][..], &[0], &[10, 10], &[8, 10]] {
        let error = SpaceError::BadChoices { group: 0, choices: choices.to_vec() };
        assert_eq!(refused(vec![width(choices)]), error);
    }
    let error = SpaceError::BadChoices { group: 0, choices: vec![5, 0] };
    assert_eq!(refused(vec![rank(&[0], &[5, 0])]), error);
    let error = refused(vec![rank(&[0], &[5]), width(&[9, 8])]);
    let tensor_name = "mlp.gate.weight".to_string();
    assert_eq!(error, SpaceError::WrongSize { group: 1, tensor: tensor_name, expected: 10, got: 9 });
    let error = refused(vec![rank(&[0], &[5]), rank(&[GATE, 0], &[5])]);
    let tensor_name = "q.lora_A.weight".to_string();
    assert_eq!(error, SpaceError::CutTwice { tensor: tensor_name, axis: "rows", first: 0, second: 1 });

    let edited = |edit: fn(&mut Group)| {
        let mut group = width(&[10, 8]);
        edit(&mut group);
        refused(vec![group])
    };
    let whole = SpaceError::WrongTensors {
        group: 0,
        members: ["gate.weight", "gate.lora_B.weight", "up.weight", "up.lora_B.weight"]
            .map(|n| format!("mlp.{n}"))
            .to_vec(),
        followers: vec!["mlp.down.weight".into()],
    };
    assert_eq!(edited(|g| g.members.truncate(2)), whole);
    assert_eq!(edited(|g| g.followers.clear()), whole);
    let error = edited(|g| g.kind = Kind::Heads);
    assert_eq!(error.to_string(), "group 0: `mlp.gate.weight` has no elastic heads");
    // The kind says rank, the tensors a width.
    assert!(matches!(edited(|g| g.kind = Kind::Rank), SpaceError::WrongTensors { group: 0, .. }));

    let alone = |linear, size: usize| Group {
        members: vec![tensor(linear, Part::Weight)],
        followers: Vec::new(),
        ..width(&[size])
    };
    assert_eq!(refused(vec![alone(0, 4)]).to_string(), "group 0: `q.weight` has no elastic width");
    let group = Group { members: Vec::new(), followers: Vec::new(), ..width(&[10]) };
    assert_eq!(refused(vec![group]).to_string(), "group 0: it has no members");
    let mut group = rank(&[0], &[5]);
    group.followers = vec![tensor(GATE, Part::LoraB)];
    assert!(matches!(refused(vec![group]), SpaceError::WrongTensors { group: 0, .. }));
}

/// Attention with two query heads of 3 for each of 4 key-value heads, adapters on queries and values.
fn attention() -> ModelShape {
    let linear = |name: &str, out, inp, rank| LinearShape { name: name.into(), out, inp, rank };
    let linears = vec![
        linear("q", 24, 10, Some(2)),
        linear("k", 12, 10, None),
        linear("v", 12, 10, Some(2)),
        linear("o", 10, 24, Some(2)),
    ];
    let heads = Channels { kind: Kind::Heads, writers: vec![0, 1, 2], readers: vec![3], unit: 6 };
    ModelShape::language_model(linears, vec![heads])
}

fn heads(first: usize, choices: &[usize]) -> Group {
    let rows = [(0, Part::Weight), (0, Part::LoraB), (1, Part::Weight), (2, Part::Weight), (2, Part::LoraB)];
    let mut members = rows.map(|(linear, part)| tensor(linear, part)).to_vec();
    members.swap(0, first);
    let followers = vec![tensor(3, Part::Weight), tensor(3, Part::LoraA)];
    Group { kind: Kind::Heads, members, followers, choices: choices.to_vec() }
}

#[test]
fn heads_are_counted_in_rows_of_queries_and_keys_keep_the_same_share() {
    let shape = attention();
    let space = SearchSpace::new(&shape, vec![heads(0, &[24, 12, 6])]).unwrap();
    let active = space.resolve(&shape, &space.sub_network(vec![6]).unwrap());
    let sizes = active.linears.iter().map(|l| (l.out, l.inp, l.rank)).collect::<Vec<_>>();
    assert_eq!(sizes, [(6, 10, 2), (3, 10, 0), (3, 10, 2), (10, 6, 2)]);

    let refused = |group| SearchSpace::new(&shape, vec![group]).unwrap_err().to_string();
    assert!(refused(heads(0, &[24, 9])).contains("9 rows are no whole number of heads; 6 belong together"));
    assert!(refused(heads(2, &[12, 6])).contains("must be a query's, not `k.weight`"));
    assert!(refused(heads(0, &[12, 6])).contains("first choice is 12 but `q.weight` has size 24"));
    let group = Group { kind: Kind::Width, ..heads(0, &[24, 12]) };
    assert!(refused(group).contains("first choice is 24 but `k.weight` has size 12"));
}

#[test]
fn what_is_computed_once_for_a_sequence_costs_no_more() {
    let mut shape = attention();
    (shape.cost_tokens, shape.once_from) = (100, 3);
    let cost = Cost::of(&shape, &shape.full());
    // q 240 + 2 (10 + 24); k 120; v 120 + 2 (10 + 12); o, once, 240 + 2 (24 + 10).
    let (each, once) = (240 + 68 + 120 + 120 + 44, 240 + 68);
    assert_eq!(cost, Cost { parameters: each + once, macs: 100 * each + once });
}

#[test]
fn a_tensors_name_leads_back_to_it() {
    let shape = shape();
    for linear in 0..shape.linears.len() {
        for part in [Part::Weight, Part::LoraA, Part::LoraB] {
            let named = tensor(linear, part);
            let exists = part == Part::Weight || shape.linears[linear].rank.is_some();
            assert_eq!(shape.parse_tensor(&shape.tensor_name(named)), exists.then_some(named));
        }
    }
    for unknown in ["", ".weight", "q", "q.bias", "gate.weight", "q.lora_C.weight", "q.weight.weight"] {
        assert_eq!(shape.parse_tensor(unknown), None, "{unknown}");
    }
    assert_eq!(shape.tensor_size(tensor(GATE, Part::LoraA)), (5, 6));
    assert_eq!(shape.tensor_size(tensor(GATE, Part::LoraB)), (10, 5));
    assert_eq!(shape.tensor_size(tensor(DOWN, Part::Weight)), (6, 10));
}

#[test]
fn a_catalog_has_the_three_names_and_each_other_name_once() {
    let (shape, space) = (shape(), space());
    let mut catalog = Catalog::new(&shape, &space);
    let names = |catalog: &Catalog| catalog.entries().iter().map(|e| e.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&catalog), [MAXIMAL, HEURISTIC, MINIMAL]);
    let added = space.sub_network(vec![3, 10, 4]).unwrap();
    let entry = catalog.add(&shape, &space, "A-z0.9_", added.clone()).unwrap();
    assert_eq!(entry.cost, Cost::of(&shape, &space.resolve(&shape, &added)));
    assert_eq!(catalog.get("A-z0.9_").unwrap().sub_network, added);
    for taken in [MAXIMAL, "A-z0.9_"] {
        let error = catalog.add(&shape, &space, taken, added.clone()).unwrap_err();
        assert_eq!(error, SpaceError::DuplicateName { name: taken.into() });
    }
    for bad in ["", ".", "..", " ", "a:b", "a/b", "é", &"a".repeat(65)] {
        let error = catalog.add(&shape, &space, bad, added.clone()).unwrap_err();
        assert_eq!(error, SpaceError::BadName { name: bad.into() });
    }
    assert_eq!(catalog.entries().len(), 4);
    assert_eq!(catalog.get("b"), None);
}

proptest! {
    #[test]
    fn whatever_is_picked_is_in_the_space_and_between_minimal_and_maximal(picks in prop::collection::vec(0usize..6, 3)) {
        let (shape, space) = (shape(), space());
        let picked = space.pick(|group, choices| picks[group] % choices);
        prop_assert_eq!(space.sub_network(picked.choices().to_vec()), Ok(picked.clone()));
        let cost = |s: &SubNetwork| Cost::of(&shape, &space.resolve(&shape, s)).parameters;
        prop_assert!(cost(&space.minimal()) <= cost(&picked) && cost(&picked) <= cost(&space.maximal()));
    }
}

#[test]
fn a_catalog_takes_a_known_sub_network_for_its_figures_and_no_other_under_its_name() {
    let (shape, space) = (shape(), space());
    let mut catalog = Catalog::new(&shape, &space);
    for (name, fixed) in
        [(MAXIMAL, space.maximal()), (HEURISTIC, space.heuristic()), (MINIMAL, space.minimal())]
    {
        assert_eq!(Catalog::fixed(&space, name), Some(fixed));
    }
    assert_eq!(Catalog::fixed(&space, "mine"), None);
    let with = |name: &str, sub_network: SubNetwork, task: &str| {
        let mut entry = catalog.get(MAXIMAL).unwrap().clone();
        (entry.name, entry.sub_network) = (name.into(), sub_network);
        entry.scores = [(task.to_string(), 0.5)].into();
        entry
    };
    let (mine, more) = (with("mine", space.minimal(), "one"), with("mine", space.minimal(), "two"));
    let other = with("mine", space.heuristic(), "one");
    catalog.put(mine).unwrap();
    catalog.put(more).unwrap();
    assert_eq!(catalog.entries().len(), 4);
    assert_eq!(catalog.get("mine").unwrap().scores.keys().collect::<Vec<_>>(), ["one", "two"]);
    assert_eq!(catalog.put(other), Err(SpaceError::Taken { name: "mine".into() }));
    assert_eq!(catalog.get("mine").unwrap().sub_network, space.minimal());
    assert!(catalog.remove("mine") && !catalog.remove("mine"));
    assert!(!catalog.remove(MINIMAL) && catalog.get(MINIMAL).is_some());
}
