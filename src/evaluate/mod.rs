//! Scoring sub-networks: the likelihood of texts, multiple choice by it, losses, texts that are generated,
//! and texts that are classified.
//!
//! Knows token ids and an executor, not text; several sub-networks are scored in the same mixed batches. What several texts begin
//! with is computed once: by all texts of a call (`preamble`), and by any two of one step (`step`).

mod accuracy;
mod agreement;
mod beams;
mod classify;
mod generate;
mod likelihood;
mod outcome;
mod preamble;
mod step;

pub use accuracy::{Accuracy, Item, Score, multiple_choice};
pub use agreement::{correlation_interval, f1, matthews, pearson, spearman};
pub use classify::{WholeText, classify};
pub use generate::{Decoding, Prompt, generate};
pub use likelihood::{Scored, Text, score};
pub use outcome::{Outcome, Summary};
