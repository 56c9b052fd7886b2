//! Super-networks as LoNAS, Shears and SQFT publish them.

/// Torch's files, whole and hostile.
mod adapters;
