//! The search against pymoo, and against itself.

mod guided;
pub(crate) mod problem;
mod pymoo;
mod state;
