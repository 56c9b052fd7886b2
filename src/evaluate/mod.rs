//! Scoring sub-networks: the likelihood of texts, and multiple choice by it.
//!
//! Knows token ids and an executor, not text; several sub-networks are scored in the same mixed batches.

mod accuracy;
mod likelihood;

pub use accuracy::{Accuracy, Item, Score, multiple_choice};
pub use likelihood::{Scored, Text, score};
