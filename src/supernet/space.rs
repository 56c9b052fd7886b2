//! The search space of one model, and the sub-networks in it.

use super::{ActiveShape, Channels, Group, Kind, ModelShape, Part, SpaceError, TensorRef};
use std::collections::{BTreeSet, HashMap};

/// All elastic groups of one model, checked against its shapes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SearchSpace {
    groups: Vec<Group>,
}

/// One choice for every group of a [`SearchSpace`], which has accepted it. No weights: a few hundred bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SubNetwork {
    choices: Vec<usize>,
}

impl SubNetwork {
    /// The choice of each group, in group order.
    pub fn choices(&self) -> &[usize] {
        &self.choices
    }
}

impl SearchSpace {
    /// Checks the groups against the model.
    ///
    /// # Errors
    /// Choices that are not strictly descending from the tensors' own size, a tensor cut twice along one axis, a group
    /// that leaves out a tensor which must be cut together with its others (an adapter's `B` beside its `W`, `B`'s
    /// columns with `A`'s rows, whoever reads the channels that are cut) or has one that must not.
    pub fn new(shape: &ModelShape, groups: Vec<Group>) -> Result<Self, SpaceError> {
        let mut rows = HashMap::new();
        let mut columns = HashMap::new();
        for (id, group) in groups.iter().enumerate() {
            check_choices(id, group)?;
            for (tensors, cut_by, axis) in
                [(&group.members, &mut rows, "rows"), (&group.followers, &mut columns, "columns")]
            {
                for &tensor in tensors {
                    check_size(shape, id, group, tensor, axis)?;
                    if let Some(first) = cut_by.insert(tensor, id) {
                        let tensor = shape.tensor_name(tensor);
                        return Err(SpaceError::CutTwice { tensor, axis, first, second: id });
                    }
                }
            }
            check_tensors(shape, id, group)?;
        }
        Ok(Self { groups })
    }

    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Checks one choice for each group.
    pub fn sub_network(&self, choices: Vec<usize>) -> Result<SubNetwork, SpaceError> {
        if choices.len() != self.groups.len() {
            let (expected, got) = (self.groups.len(), choices.len());
            return Err(SpaceError::WrongCount { expected, got });
        }
        for (group, (&got, of)) in choices.iter().zip(&self.groups).enumerate() {
            if !of.choices.contains(&got) {
                return Err(SpaceError::NotAChoice { group, choices: of.choices.clone(), got });
            }
        }
        Ok(SubNetwork { choices })
    }

    /// The sub-network whose group `id` takes the choice at `pick(id, n)`, an index below `n`, the number of choices.
    /// This is how a random sub-network is drawn without this floor knowing a random generator.
    pub fn pick(&self, mut pick: impl FnMut(usize, usize) -> usize) -> SubNetwork {
        let groups = self.groups.iter().enumerate();
        let choose = |(id, g): (usize, &Group)| g.choices[pick(id, g.choices.len()).min(g.choices.len() - 1)];
        SubNetwork { choices: groups.map(choose).collect() }
    }

    pub fn maximal(&self) -> SubNetwork {
        SubNetwork { choices: self.groups.iter().map(Group::maximal).collect() }
    }

    pub fn heuristic(&self) -> SubNetwork {
        SubNetwork { choices: self.groups.iter().map(Group::heuristic).collect() }
    }

    pub fn minimal(&self) -> SubNetwork {
        SubNetwork { choices: self.groups.iter().map(Group::minimal).collect() }
    }

    /// log10 of the number of sub-networks.
    pub fn log10_size(&self) -> f64 {
        self.groups.iter().map(|g| (g.choices.len() as f64).log10()).sum()
    }

    /// The sizes that `sub_network` leaves of every Linear.
    pub fn resolve(&self, shape: &ModelShape, sub_network: &SubNetwork) -> ActiveShape {
        let mut active = shape.full();
        for (group, &choice) in self.groups.iter().zip(&sub_network.choices) {
            // The choice counts the first member's rows. Only heads can have others of another size, which keep the same share.
            let share = |full: usize| full * choice / group.maximal();
            for member in &group.members {
                let (full, linear) = (&shape.linears[member.linear], &mut active.linears[member.linear]);
                match member.part {
                    Part::Weight | Part::LoraB => linear.out = share(full.out),
                    Part::LoraA => linear.rank = choice,
                }
            }
            for follower in &group.followers {
                let (full, linear) = (&shape.linears[follower.linear], &mut active.linears[follower.linear]);
                match follower.part {
                    Part::Weight | Part::LoraA => linear.inp = share(full.inp),
                    Part::LoraB => linear.rank = choice,
                }
            }
        }
        // An adapter beside nothing has nothing to do either.
        for linear in active.linears.iter_mut().filter(|linear| linear.is_nothing()) {
            linear.rank = 0;
        }
        active
    }
}

fn check_choices(id: usize, group: &Group) -> Result<(), SpaceError> {
    let descending = group.choices.windows(2).all(|w| w[0] > w[1]);
    // Without channels, or without heads, the layer goes without its MLP or its attention.
    let least = usize::from(group.kind == Kind::Rank);
    if descending && group.choices.first() > Some(&0) && group.choices.last() >= Some(&least) {
        return Ok(());
    }
    Err(SpaceError::BadChoices { group: id, choices: group.choices.clone() })
}

fn check_size(
    shape: &ModelShape,
    group_id: usize,
    group: &Group,
    tensor: TensorRef,
    axis: &str,
) -> Result<(), SpaceError> {
    let (rows, columns) = shape.tensor_size(tensor);
    let expected = if axis == "rows" { rows } else { columns };
    // Grouped queries have fewer keys and values: those keep the share that the first member keeps.
    let counted = group.kind != Kind::Heads || group.members.first() == Some(&tensor);
    if group.choices[0] == expected || !counted {
        return Ok(());
    }
    let tensor = shape.tensor_name(tensor);
    Err(SpaceError::WrongSize { group: group_id, tensor, expected, got: group.choices[0] })
}

/// What a group cuts must be whole: a sub-network that cuts `B` but not `A`, or the writers of channels but not their
/// readers, would compute something, but nothing that was meant.
fn check_tensors(shape: &ModelShape, id: usize, group: &Group) -> Result<(), SpaceError> {
    let not_elastic = |reason: String| SpaceError::NotElastic { group: id, reason };
    let first = group.members.first().ok_or_else(|| not_elastic("it has no members".into()))?;
    let of = |linears: &[usize], parts: [Part; 2]| {
        let all = linears.iter().flat_map(|&linear| parts.map(|part| TensorRef { linear, part }));
        let exists = |t: &TensorRef| t.part == Part::Weight || shape.linears[t.linear].rank.is_some();
        all.filter(exists).collect::<BTreeSet<_>>()
    };
    let (members, followers) = match group.kind {
        Kind::Rank => {
            let linears = group.members.iter().map(|t| t.linear).collect::<Vec<_>>();
            (of(&linears, [Part::LoraA; 2]), of(&linears, [Part::LoraB; 2]))
        }
        Kind::Width | Kind::Heads => {
            let of_kind = |c: &&Channels| c.kind == group.kind && c.writers.contains(&first.linear);
            let what = if group.kind == Kind::Heads { "heads" } else { "width" };
            let fixed = || not_elastic(format!("`{}` has no elastic {what}", shape.tensor_name(*first)));
            let channels = shape.channels.iter().find(of_kind).ok_or_else(fixed)?;
            let rows = |linear: usize| shape.linears[linear].out;
            if channels.writers.iter().any(|&writer| rows(writer) > rows(first.linear)) {
                let what = shape.tensor_name(*first);
                return Err(not_elastic(format!(
                    "its first member, whose rows it counts, must be a query's, not `{what}`"
                )));
            }
            if let Some(part) = group.choices.iter().find(|choice| !choice.is_multiple_of(channels.unit)) {
                let reason =
                    format!("{part} rows are no whole number of heads; {} belong together", channels.unit);
                return Err(not_elastic(reason));
            }
            let members = of(&channels.writers, [Part::Weight, Part::LoraB]);
            (members, of(&channels.readers, [Part::Weight, Part::LoraA]))
        }
    };
    let has = |tensors: &[TensorRef]| tensors.iter().copied().collect::<BTreeSet<_>>();
    if has(&group.members) == members && has(&group.followers) == followers {
        return Ok(());
    }
    let names = |tensors: BTreeSet<TensorRef>| tensors.into_iter().map(|t| shape.tensor_name(t)).collect();
    Err(SpaceError::WrongTensors { group: id, members: names(members), followers: names(followers) })
}
