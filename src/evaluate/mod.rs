//! Scoring sub-networks: the likelihood of texts, multiple choice by it, losses, and texts that are generated.
//!
//! Knows token ids and an executor, not text; several sub-networks are scored in the same mixed batches. What several texts begin
//! with is computed once: by all texts of a call (`preamble`), and by any two of one step (`step`).

mod accuracy;
mod beams;
mod generate;
mod likelihood;
mod outcome;
mod preamble;
mod step;

pub use accuracy::{Accuracy, Item, Score, multiple_choice};
pub use generate::{Decoding, Prompt, generate};
pub use likelihood::{Scored, Text, score};
pub use outcome::{Outcome, Summary};
