//! Tasks from `--task NAME=FILE`: read, taken apart, tokenized.

use super::Failure;
use crate::data::{self, Answering, TestItem};
use crate::evaluate::Item;
use crate::text::Tokenizer;
use std::path::{Path, PathBuf};

/// Of the pool that tasks are scored with: one step's texts, or the longest single one.
pub(super) const POOL_TOKENS: usize = 8192;

/// One task of multiple-choice questions, to be scored in the short form.
pub(super) struct Task {
    pub(super) name: String,
    pub(super) items: Vec<Item>,
}

impl Task {
    /// All questions of `NAME=FILE`, or the first `limit`; `max_positions` is what a question and its longest option may have in
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
        let (name, path) = named(argument)?;
        let questions = questions(&path, Answering::Short)?;
        let asked = questions.iter().take(limit.unwrap_or(usize::MAX));
        let items = asked.map(|(index, question)| {
            let item = item(tokenizer, Answering::Short, question)?;
            let tokens = item.context.len() + item.options.iter().map(Vec::len).max().unwrap_or(0);
            check_length(&path, *index, tokens, max_positions)?;
            Ok(item)
        });
        Ok(Self { name, items: items.collect::<Result<Vec<_>, Failure>>()? })
    }
}

/// Name and file.
pub(super) fn named(argument: &str) -> Result<(String, PathBuf), Failure> {
    let parts = argument.split_once('=').filter(|(name, path)| !name.is_empty() && !path.is_empty());
    let (name, path) = parts.ok_or_else(|| format!("--task {argument}: expected NAME=FILE"))?;
    Ok((name.into(), path.into()))
}

/// The file's items that can be asked so, each with its index.
///
/// # Errors
/// What is wrong with the file; no such item in it.
pub(super) fn questions(path: &Path, form: Answering) -> Result<Vec<(usize, TestItem)>, Failure> {
    let items = data::read_tests(path)?;
    let all = items.len();
    let questions = items.into_iter().enumerate().filter(|(_, item)| form.choice(item).is_some());
    let questions = questions.collect::<Vec<_>>();
    let what = if form == Answering::LonasMathTest { "a number or letter to find" } else { "options" };
    if questions.is_empty() {
        return Err(format!("{}: no item is a question with {what}", path.display()).into());
    }
    if questions.len() < all {
        let others = all - questions.len();
        tracing::warn!("{}: {others} items are no questions with {what}", path.display());
    }
    Ok(questions)
}

/// A question's tokens in a form.
pub(super) fn item(tokenizer: &Tokenizer, form: Answering, question: &TestItem) -> Result<Item, Failure> {
    let (Some(choice), Some(prompt)) = (&question.choice, form.prompt(question)) else {
        return Err("an item is no question with options".into());
    };
    let texts = (0..choice.options.len()).map(|i| joined(tokenizer, &prompt, &form.continuation(choice, i)));
    let texts = texts.collect::<Result<Vec<_>, _>>()?;
    // So that all options are measured after the same tokens.
    let context = texts.iter().map(|(context, _)| *context).min().unwrap_or(1);
    let options = texts.iter().map(|(_, tokens)| tokens[context..].to_vec()).collect();
    let context = texts.first().map_or(Vec::new(), |(_, tokens)| tokens[..context].to_vec());
    Ok(Item { context, options, correct: choice.correct })
}

/// The tokens of a prompt with what follows it, as a model is trained on them: not those of the two texts, where a tokenizer
/// joins what stands at their boundary. And how many of them are the prompt's by itself, at least one.
pub(super) fn joined(tokenizer: &Tokenizer, prompt: &str, rest: &str) -> Result<(usize, Vec<u32>), Failure> {
    let (alone, all) = (tokenizer.encode(prompt, true)?, tokenizer.encode(&format!("{prompt}{rest}"), true)?);
    let common = alone.iter().zip(&all).take_while(|(a, b)| a == b).count();
    Ok((common.max(1).min(all.len()), all))
}

/// Whether an item fits the model and the pool.
pub(super) fn check_length(
    path: &Path,
    index: usize,
    tokens: usize,
    max_positions: usize,
) -> Result<(), Failure> {
    let longest = max_positions.min(POOL_TOKENS);
    if tokens <= longest {
        return Ok(());
    }
    Err(format!("{}: item {index}: it has {tokens} tokens, at most {longest}", path.display()).into())
}
