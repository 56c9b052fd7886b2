//! Super-networks as LoNAS, Shears and SQFT publish them.

/// Torch's files, whole and hostile.
mod adapters;
/// `lonas import`, end to end.
mod import;
/// The twelve configurations of LoNAS, and what they cost.
mod lonas;
/// Configurations by templates, by lists, and damaged.
mod spaces;

/// Models by their sizes, configurations as their authors write them.
mod write;
