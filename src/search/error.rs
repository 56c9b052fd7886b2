//! What can be wrong with a search.

/// Settings that no search can run by, a score that is no score, a state that belongs to something else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SearchError {
    #[error("{field}: expected {expected}, got {got}")]
    Settings { field: &'static str, expected: String, got: String },
    #[error("the search space has only one sub-network: no group has more than one choice")]
    NothingToSearch,
    #[error("objectives: expected {expected}, got {got}")]
    Objectives { expected: String, got: String },
    #[error("this genome was not asked for: {genome}")]
    NotAsked { genome: String },
    #[error("the saved search cannot be used: {reason}")]
    State { reason: String },
}
