//! What can be wrong with a search space, a sub-network or a catalog.

use std::fmt;

/// A search space that does not fit its model, or a choice outside the search space.
///
/// `Display` names the group, tensor or sub-network and says what was expected and what was found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpaceError {
    /// A group names a tensor that the model does not have.
    UnknownTensor { group: usize, tensor: String },
    /// The choices of a group are empty, not strictly descending, or end in a rank of zero.
    BadChoices { group: usize, choices: Vec<usize> },
    /// The largest choice is not the tensor's own size.
    WrongSize { group: usize, tensor: String, expected: usize, got: usize },
    /// Two groups cut the same axis of one tensor.
    CutTwice { tensor: String, axis: &'static str, first: usize, second: usize },
    /// A group's tensors are not those that a group of its kind has to cut together.
    WrongTensors { group: usize, members: Vec<String>, followers: Vec<String> },
    /// A group cuts what has no width, or what this program cannot cut.
    NotElastic { group: usize, reason: String },
    /// A sub-network has a different number of choices than the search space has groups.
    WrongCount { expected: usize, got: usize },
    /// A sub-network picks a value that its group does not offer.
    NotAChoice { group: usize, choices: Vec<usize>, got: usize },
    /// A catalog entry's name is empty, too long, or has characters other than `A-Za-z0-9._-`.
    BadName { name: String },
    /// Two catalog entries have the same name.
    DuplicateName { name: String },
    /// A name that every catalog has is given to another sub-network.
    Fixed { name: String },
    /// A name that one sub-network has is given to another.
    Taken { name: String },
    /// A catalog entry says what its sub-network costs, and it does not.
    WrongCost { name: String, field: &'static str, expected: u64, got: u64 },
    /// A score or latency that is none.
    BadFigure { name: String, field: String, got: String },
    /// An order is not a permutation of the group's channels or key-value heads.
    BadOrder { group: usize, expected: usize },
}

impl fmt::Display for SpaceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownTensor { group, tensor } => {
                write!(f, "group {group}: the model has no tensor `{tensor}`")
            }
            Self::BadChoices { group, choices } => {
                write!(
                    f,
                    "group {group}: choices must be strictly descending, and ranks positive, got {choices:?}"
                )
            }
            Self::WrongSize { group, tensor, expected, got } => {
                write!(f, "group {group}: the first choice is {got} but `{tensor}` has size {expected}")
            }
            Self::CutTwice { tensor, axis, first, second } => {
                write!(f, "groups {first} and {second} both cut the {axis} of `{tensor}`")
            }
            Self::WrongTensors { group, members, followers } => {
                let (members, followers) = (members.join(", "), followers.join(", "));
                write!(f, "group {group}: such a group has members {members} and followers {followers}")
            }
            Self::NotElastic { group, reason } => write!(f, "group {group}: {reason}"),
            Self::WrongCount { expected, got } => {
                write!(f, "a sub-network needs {expected} choices, one for each group, got {got}")
            }
            Self::NotAChoice { group, choices, got } => {
                write!(f, "group {group}: {got} is not one of the choices {choices:?}")
            }
            Self::BadName { name } => {
                write!(f, "sub-network name {name:?} must be 1 to 64 characters of A-Z a-z 0-9 . _ -")
            }
            Self::DuplicateName { name } => write!(f, "two sub-networks are named `{name}`"),
            Self::Fixed { name } => write!(f, "`{name}` has a fixed meaning and these are not its choices"),
            Self::Taken { name } => write!(f, "`{name}` is the name of another sub-network already"),
            Self::WrongCost { name, field, expected, got } => {
                write!(f, "`{name}`: {field}: expected {expected}, got {got}")
            }
            Self::BadFigure { name, field, got } => {
                write!(f, "`{name}`: {field}: {got} is no score or latency")
            }
            Self::BadOrder { group, expected } => {
                write!(f, "group {group}: its order is not a permutation of 0..{expected}")
            }
        }
    }
}

impl std::error::Error for SpaceError {}
