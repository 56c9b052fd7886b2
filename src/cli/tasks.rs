//! Multiple-choice tasks from `--task NAME=FILE`: read, taken apart, tokenized.

use super::Failure;
use crate::data::{self, Choice};
use crate::evaluate::Item;
use crate::text::Tokenizer;
use std::path::Path;

/// Of the pool that tasks are scored with: one step's texts, or the longest single one.
pub(super) const POOL_TOKENS: usize = 8192;

/// One task.
pub(super) struct Task {
    pub(super) name: String,
    pub(super) items: Vec<Item>,
}

impl Task {
    /// All questions of `NAME=FILE`, or the first `limit`; `longest` is what a question and its longest option may have in
    /// tokens.
    ///
    /// # Errors
    /// Beside what is wrong with a file: no question in it, or one that is too long.
    pub(super) fn read(
        argument: &str,
        tokenizer: &Tokenizer,
        limit: Option<usize>,
        max_positions: usize,
    ) -> Result<Self, Failure> {
        let expected = || format!("--task {argument}: expected NAME=FILE");
        let (name, path) = argument.split_once('=').ok_or_else(expected)?;
        if name.is_empty() {
            return Err(expected().into());
        }
        let longest = max_positions.min(POOL_TOKENS);
        Ok(Self { name: name.into(), items: items(tokenizer, Path::new(path), limit, longest)? })
    }
}

fn items(
    tokenizer: &Tokenizer,
    path: &Path,
    limit: Option<usize>,
    longest: usize,
) -> Result<Vec<Item>, Failure> {
    let examples = data::read(path)?;
    let choices = examples.iter().filter_map(Choice::of).collect::<Vec<_>>();
    if choices.is_empty() {
        return Err(format!("{}: no item is a question with options", path.display()).into());
    }
    if choices.len() < examples.len() {
        tracing::warn!(
            "{}: {} items are no questions with options",
            path.display(),
            examples.len() - choices.len()
        );
    }
    let item = |choice: &Choice| -> Result<Item, Failure> {
        let options =
            (0..choice.options.len()).map(|i| Ok(tokenizer.encode(&choice.continuation(i), false)?));
        let options = options.collect::<Result<Vec<_>, Failure>>()?;
        let context = tokenizer.encode(&choice.prompt(), true)?;
        let tokens = context.len() + options.iter().map(Vec::len).max().unwrap_or(0);
        if tokens > longest {
            let question = choice.question.chars().take(60).collect::<String>();
            return Err(format!(
                "{}: `{question}...` has {tokens} tokens, at most {longest}",
                path.display()
            )
            .into());
        }
        Ok(Item { context, options, correct: choice.correct })
    };
    choices.iter().take(limit.unwrap_or(usize::MAX)).map(item).collect()
}
