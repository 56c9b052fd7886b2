//! The model card that a training leaves in its folder: what it was made from, how, and what it reached.

use crate::train::{LogLine, Recipe, TrainingLog, VALIDATED};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// What the card tells beside the log.
pub(super) struct Facts<'a> {
    pub(super) name: &'a str,
    pub(super) folder: &'a Path,
    pub(super) base: String,
    pub(super) data: &'a [PathBuf],
    pub(super) form: &'static str,
    /// Sequences and tokens trained on in one epoch; sequences held out.
    pub(super) sequences: (usize, usize, usize),
    pub(super) space: String,
    pub(super) reordered: bool,
    pub(super) recipe: &'a Recipe,
    /// The command line, program name included.
    pub(super) command: Vec<String>,
}

/// The card in Markdown.
pub(super) fn card(facts: &Facts<'_>, log: &TrainingLog) -> String {
    let Facts { name, base, form, sequences, space, recipe, .. } = facts;
    let (count, tokens, held_out) = *sequences;
    let files = facts.data.iter().map(|path| format!("`{}`", path.display())).collect::<Vec<_>>().join(", ");
    let folder = facts.folder.display();
    let order = if facts.reordered { "in falling importance" } else { "the base's own" };
    let command = facts.command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
    let Recipe {
        epochs,
        micro_batch,
        accumulation,
        learning_rate,
        weight_decay,
        max_norm,
        dropout,
        seed,
        bf16_base,
        threads,
    } = recipe;
    let numbers = if *bf16_base { "base in bf16" } else { "f32" };
    let mut text = format!(
        "# {name}\n\nA LoNAS super-network: a frozen base with one elastic low-rank super-adapter. Serve it with\n\n    \
         lonas serve {folder}\n\n| | |\n|---|---|\n| base | {base} |\n| data | {files} |\n| form | {form} |\n\
         | trained on | {count} sequences, {tokens} tokens an epoch; {held_out} sequences held out |\n\
         | search space | {space} |\n| MLP channels | {order} |\n\
         | recipe | {epochs} epochs, {accumulation} micro-batches of {micro_batch} sequences a step, one random \
         sub-network each; AdamW, rate {learning_rate}, cosine to zero; weight decay {weight_decay}, clipped to \
         {max_norm}, dropout {dropout}, seed {seed}, {numbers}, {threads} threads |\n\n## Training\n\n    {command}\n\n![loss](loss.svg)\n"
    );
    let validations = log.lines().iter().filter_map(|line| match line {
        LogLine::Validation { micro_batch, losses } => Some((*micro_batch, *losses)),
        LogLine::MicroBatch { .. } => None,
    });
    let validations = validations.collect::<Vec<_>>();
    if let (Some(first), Some(last)) = (validations.first(), validations.last()) {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "\nLoss on the held-out sequences, nats per token:\n\n| | before ({}) | after ({} micro-batches) |\n|---|---|---|",
            first.0, last.0
        );
        let of = |v: crate::train::Validation| [v.maximal, v.heuristic, v.minimal];
        for ((name, before), after) in VALIDATED.into_iter().zip(of(first.1)).zip(of(last.1)) {
            let _ = writeln!(text, "| {name} | {before:.4} | {after:.4} |");
        }
    }
    text
}

/// A word of a command line as a shell would read it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_string();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_can_be_copied_from_the_card() {
        assert_eq!(quoted("models/mine"), "models/mine");
        assert_eq!(quoted("two words"), "'two words'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn the_card_says_what_was_done_and_reached() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = TrainingLog::open(&folder.path().join("train.jsonl"), 0).unwrap();
        for (micro_batch, maximal) in [(0, 4.0), (9, 2.5)] {
            let losses = crate::train::Validation { maximal, heuristic: 4.5, minimal: 5.0 };
            log.write(LogLine::Validation { micro_batch, losses }).unwrap();
        }
        let facts = Facts {
            name: "mine",
            folder: Path::new("models/mine"),
            base: "b.gguf".into(),
            data: &["a.json".into(), "b c.json".into()],
            form: "short",
            sequences: (10, 300, 2),
            space: "3 groups".into(),
            reordered: true,
            recipe: &Recipe::default(),
            command: ["lonas", "train", "--data", "b c.json"].map(String::from).to_vec(),
        };
        let card = card(&facts, &log);
        for expected in
            ["# mine\n", "`a.json`, `b c.json`", "| maximal | 4.0000 | 2.5000 |", "'b c.json'", "seed 42"]
        {
            assert!(card.contains(expected), "{expected} in {card}");
        }
    }
}
