//! What a super-network is: shapes, elastic groups, the search space, sub-networks, the catalog, cost.
//!
//! Nothing here holds a tensor or touches a file. The one invariant: a [`SubNetwork`] exists only if its
//! [`SearchSpace`] accepted it, so whoever holds one need not check it again.

mod catalog;
mod cost;
mod error;
mod group;
mod shape;
mod space;
#[cfg(test)]
mod tests;

pub use catalog::{Catalog, CatalogEntry, Evaluation, HEURISTIC, Latency, MAXIMAL, MINIMAL, is_model_name};
pub use cost::{COST_TOKENS, Cost};
pub use error::SpaceError;
pub use group::{Group, Kind};
pub use shape::{ActiveLinear, ActiveShape, Channels, LinearShape, ModelShape, Part, TensorRef};
pub use space::{SearchSpace, SubNetwork};
