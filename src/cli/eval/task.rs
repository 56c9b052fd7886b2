//! A task as one method wants it: every item's tokens, and digests by which it is known again.

use super::protocol::{Method, Protocol};
use crate::artifact::sha256_of_file;
use crate::cli::Failure;
use crate::cli::tasks::{check_length, item, joined, named, questions};
use crate::data::{Choice, TestItem, read_tests, training_tokens};
use crate::evaluate::Item;
use crate::text::Tokenizer;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

pub(super) struct Task {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) file_sha256: String,
    pub(super) asks: Vec<Ask>,
}

/// One item.
pub(super) struct Ask {
    /// Its place in the file, from 0.
    pub(super) index: usize,
    /// sha256 of the item as it stands in the file, white space aside.
    pub(super) sha256: String,
    pub(super) work: Work,
}

/// What is to be computed.
pub(super) enum Work {
    Options(Item),
    Continue {
        prompt: Vec<u32>,
        choice: Choice,
    },
    /// All tokens, of which so many are the prompt's.
    Text {
        tokens: Vec<u32>,
        prompt: usize,
    },
}

impl Task {
    /// The items of `NAME=FILE`, or the first `limit`.
    pub(super) fn read(
        argument: &str,
        protocol: Protocol,
        tokenizer: &Tokenizer,
        limit: Option<usize>,
        max_positions: usize,
    ) -> Result<Self, Failure> {
        let (name, path) = named(argument)?;
        let file_sha256 = sha256_of_file(&path)?;
        let items = match protocol.method {
            Method::Loss => examples(&path, protocol)?,
            Method::Likelihood | Method::Generation => questions(&path, protocol.form)?,
        };
        let ask = |(index, item): &(usize, TestItem)| -> Result<Ask, Failure> {
            let work = work(protocol, tokenizer, item)?;
            check_length(&path, *index, work.longest(protocol), max_positions)?;
            Ok(Ask { index: *index, sha256: hex(&item.source), work })
        };
        let asks = items.iter().take(limit.unwrap_or(usize::MAX)).map(ask).collect::<Result<Vec<_>, _>>()?;
        if asks.is_empty() {
            return Err(format!("{}: --limit leaves no item", path.display()).into());
        }
        Ok(Self { name, path, file_sha256, asks })
    }

    /// Of the items that are used, in their order.
    pub(super) fn items_sha256(&self) -> String {
        hex(&self.asks.iter().map(|ask| ask.sha256.as_str()).collect::<String>())
    }
}

impl Work {
    /// The most positions that it takes in one sequence.
    fn longest(&self, protocol: Protocol) -> usize {
        match self {
            Self::Options(item) => item.context.len() + item.options.iter().map(Vec::len).max().unwrap_or(0),
            Self::Continue { prompt, .. } => prompt.len() + protocol.max_new_tokens,
            Self::Text { tokens, .. } => tokens.len(),
        }
    }
}

/// All items that have the form.
fn examples(path: &Path, protocol: Protocol) -> Result<Vec<(usize, TestItem)>, Failure> {
    let items = read_tests(path)?;
    let all = items.len();
    let form = protocol.training_form();
    let fitting = items.into_iter().enumerate().filter(|(_, item)| form.text(&item.example).is_some());
    let fitting = fitting.collect::<Vec<_>>();
    if fitting.is_empty() {
        return Err(format!("{}: no item has the form; --form lonas takes every one", path.display()).into());
    }
    if fitting.len() < all {
        tracing::warn!("{}: {} items have no such form", path.display(), all - fitting.len());
    }
    Ok(fitting)
}

fn work(protocol: Protocol, tokenizer: &Tokenizer, item_of: &TestItem) -> Result<Work, Failure> {
    let no_question = || "an item has no answer that could be looked for: an option, with --protocol lonas-math a number or a letter";
    match protocol.method {
        Method::Likelihood => Ok(Work::Options(item(tokenizer, protocol.form, item_of)?)),
        Method::Generation => {
            let prompt = protocol.form.prompt(item_of).ok_or_else(no_question)?;
            let choice = protocol.form.choice(item_of).ok_or_else(no_question)?;
            Ok(Work::Continue { prompt: tokenizer.encode(&prompt, true)?, choice })
        }
        Method::Loss => {
            let texts = protocol.training_form().text(&item_of.example);
            let (prompt, response) = texts.ok_or("an item does not have the form")?;
            let (prompt, tokens) = joined(tokenizer, &prompt, &response)?;
            // The end is learnt as well.
            Ok(Work::Text { tokens: training_tokens(tokens, tokenizer.eos(), usize::MAX), prompt })
        }
    }
}

pub(super) fn hex(text: &str) -> String {
    Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect()
}
