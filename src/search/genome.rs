//! Genomes, and what of a search space decides which there are.

use crate::supernet::{Group, SearchSpace, SubNetwork};
use serde::{Deserialize, Serialize};

/// One index for each elastic group into its descending choices: 0 takes the largest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Genome(Vec<usize>);

impl Genome {
    /// Of one index a group; whoever makes one sees to it that each is below its group's number of choices.
    pub(super) fn new(genes: Vec<usize>) -> Self {
        Self(genes)
    }

    /// The genome of a sub-network of `space`.
    pub fn of(space: &SearchSpace, sub_network: &SubNetwork) -> Self {
        let chosen = space.groups().iter().zip(sub_network.choices());
        // A sub-network exists only with choices of its space.
        Self(chosen.map(|(g, c)| g.choices.iter().position(|of| of == c).unwrap_or(0)).collect())
    }

    pub fn genes(&self) -> &[usize] {
        &self.0
    }

    /// The sub-network that it stands for; an index beyond a group's choices means its last one.
    pub fn sub_network(&self, space: &SearchSpace) -> SubNetwork {
        space.pick(|group, _| self.0.get(group).copied().unwrap_or(0))
    }
}

/// By group a number that groups of one kind with the same choices, in different layers, have in common; from 0.
pub fn alike(space: &SearchSpace) -> Vec<usize> {
    let mut known = Vec::new();
    let class = |group: &Group| {
        let own = (group.kind, group.members.len(), group.choices.clone());
        known.iter().position(|k| *k == own).unwrap_or_else(|| {
            known.push(own);
            known.len() - 1
        })
    };
    space.groups().iter().map(class).collect()
}

/// How many choices each group has, and which groups are alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Genes {
    /// By group, at least 1.
    pub(super) choices: Vec<usize>,
    /// By group: a number that groups of one kind with the same choices, in different layers, have in common.
    pub(super) classes: Vec<usize>,
}

impl Genes {
    pub(super) fn of(space: &SearchSpace) -> Self {
        Self { choices: space.groups().iter().map(|g| g.choices.len()).collect(), classes: alike(space) }
    }

    pub(super) fn len(&self) -> usize {
        self.choices.len()
    }

    pub(super) fn class_count(&self) -> usize {
        self.classes.iter().max().map_or(0, |&last| last + 1)
    }

    /// Whether a genome, which may come from a file, has an index for every group and none too large.
    pub(super) fn accept(&self, genome: &Genome) -> bool {
        genome.genes().len() == self.len() && genome.genes().iter().zip(&self.choices).all(|(g, n)| g < n)
    }

    /// What is cut of each group, from 0 (nothing) to 1 (all that can be).
    pub(super) fn cuts(&self, genome: &Genome) -> Vec<f64> {
        let cut = |(&gene, &choices): (&usize, &usize)| gene as f64 / (choices.max(2) - 1) as f64;
        genome.genes().iter().zip(&self.choices).map(cut).collect()
    }

    /// The genome that cuts each group by about as much as `cut` says of its number and class.
    pub(super) fn cut(&self, mut cut: impl FnMut(usize, usize) -> f64) -> Genome {
        let gene = |(group, (&choices, &class)): (usize, (&usize, &usize))| {
            let most = (choices - 1) as f64;
            (cut(group, class).clamp(0.0, 1.0) * most).round() as usize
        };
        Genome(self.choices.iter().zip(&self.classes).enumerate().map(gene).collect())
    }
}
