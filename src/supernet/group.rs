//! Elastic groups: tensors that share one choice.

use super::TensorRef;

/// What a group's choice counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The active rank of one or several adapters.
    Rank,
    /// The active output rows of one or several Linears: an MLP's channels. 0 leaves the MLP out.
    Width,
    /// Like `Width`, in whole attention heads; the choice is still counted in rows. 0 leaves the attention out, and
    /// with the MLP's 0 the whole layer.
    Heads,
}

/// Tensors that share one choice. Every sub-network takes a prefix: the first `choice` rows of each member, the
/// first `choice` columns of each follower.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub kind: Kind,
    /// Cut along their rows.
    pub members: Vec<TensorRef>,
    /// Cut along their columns, because these multiply what the members produce.
    pub followers: Vec<TensorRef>,
    /// Strictly descending; the first is the tensors' own size.
    pub choices: Vec<usize>,
}

impl Group {
    pub fn maximal(&self) -> usize {
        self.choices[0]
    }

    /// LoNAS's heuristic: the middle of the descending list, the larger one of two.
    pub fn heuristic(&self) -> usize {
        self.choices[(self.choices.len() - 1) / 2]
    }

    pub fn minimal(&self) -> usize {
        self.choices[self.choices.len() - 1]
    }
}
