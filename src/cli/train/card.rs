//! The model card that a training leaves in its folder: what it was made from, how, and what it reached.

use crate::train::{LogLine, Recipe, Sampling, TrainingLog, VALIDATED};
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
        sampling,
        students,
        distill,
        response_only,
        length_buckets,
        max_tokens,
    } = recipe;
    let numbers = if *bf16_base { "base in bf16" } else { "f32" };
    let trained = trained_tokens(log);
    let duration = match max_tokens {
        Some(most) => format!("{trained} tokens forward and back, of {most} asked for"),
        None => format!("{epochs} epochs, {trained} tokens forward and back"),
    };
    let alike = if *length_buckets { " of like lengths" } else { "" };
    let sampled: String = match (sampling, students) {
        (Sampling::Random, _) => "a random one for each micro-batch".into(),
        (Sampling::Maximal, _) => "the maximal one only".into(),
        (Sampling::Sandwich, 1) => {
            "the maximal one, then the minimal or a random one on the same sequences".into()
        }
        (Sampling::Sandwich, students) => {
            let random = students - 1;
            format!("the maximal one, then the minimal and {random} random on the same sequences")
        }
    };
    let taught = match (*distill, *students) {
        (false, _) => "",
        (true, 1) => ", which learns the maximal one's distributions",
        (true, _) => ", which learn the maximal one's distributions",
    };
    let learnt = if *response_only { "responses only, in validation too" } else { "whole sequences" };
    let mut text = format!(
        "# {name}\n\nA LoNAS super-network: a frozen base with one elastic low-rank super-adapter. Serve it with\n\n    \
         lonas serve {folder}\n\n| | |\n|---|---|\n| base | {base} |\n| data | {files} |\n| form | {form} |\n\
         | trained on | {count} sequences, {tokens} tokens an epoch; {held_out} sequences held out |\n\
         | search space | {space} |\n| order of channels and heads | {order} |\n\
         | recipe | {duration}, {accumulation} micro-batches of {micro_batch} sequences{alike} a step; AdamW, rate \
         {learning_rate}, cosine to zero; weight decay {weight_decay}, clipped to {max_norm}, dropout {dropout}, seed \
         {seed}, {numbers}, {threads} threads |\n| sub-networks | {sampled}{taught} |\n| loss over | {learnt} |\n\n## \
         Training\n\n    {command}\n\n![loss](loss.svg)\n"
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

fn trained_tokens(log: &TrainingLog) -> usize {
    let tokens = log.lines().iter().map(|line| match line {
        LogLine::MicroBatch { trained_tokens, .. } => *trained_tokens,
        LogLine::Validation { .. } => 0,
    });
    tokens.sum()
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

    fn card_of(recipe: &Recipe) -> String {
        let folder = tempfile::tempdir().unwrap();
        let mut log = TrainingLog::open(&folder.path().join("train.jsonl"), 0).unwrap();
        for (micro_batch, maximal) in [(0, 4.0), (9, 2.5)] {
            let losses = crate::train::Validation { maximal, heuristic: 4.5, minimal: 5.0 };
            log.write(LogLine::Validation { micro_batch, losses }).unwrap();
            let (epoch, loss, learning_rate, tokens, gradient_norm) = (0, 4.0, 1e-3, 20, None);
            let (choices, trained_tokens, distilled) = (vec![8], 33, false);
            let micro_batch = micro_batch + 1;
            log.write(LogLine::MicroBatch {
                micro_batch,
                epoch,
                loss,
                learning_rate,
                tokens,
                trained_tokens,
                distilled,
                gradient_norm,
                choices,
            })
            .unwrap();
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
            recipe,
            command: ["lonas", "train", "--data", "b c.json"].map(String::from).to_vec(),
        };
        card(&facts, &log)
    }

    fn says(card: &str, expected: &[&str]) {
        for expected in expected {
            assert!(card.contains(expected), "{expected} in {card}");
        }
    }

    #[test]
    fn the_card_says_what_was_done_and_reached() {
        let card = card_of(&Recipe::default());
        says(
            &card,
            &["# mine\n", "`a.json`, `b c.json`", "| maximal | 4.0000 | 2.5000 |", "'b c.json'", "seed 42"],
        );
        says(&card, &["6 epochs, 66 tokens forward and back", "a random one for each", "whole sequences"]);
    }

    #[test]
    fn the_card_says_how_a_recipe_differs_from_lonas() {
        let card = card_of(&Recipe { max_tokens: Some(60), response_only: true, ..Recipe::best() });
        says(&card, &["66 tokens forward and back, of 60 asked for", "4 sequences of like lengths a step"]);
        says(
            &card,
            &["the minimal or a random one", "learns the maximal one's distributions", "responses only"],
        );
        let card = card_of(&Recipe { students: 3, accumulation: 8, ..Recipe::best() });
        says(&card, &["then the minimal and 2 random on the same sequences, which learn the maximal one's"]);
        let card = card_of(&Recipe { sampling: Sampling::Maximal, ..Recipe::default() });
        says(&card, &["| sub-networks | the maximal one only |"]);
    }
}
