//! A task as one method wants it: every item's tokens, and digests by which it is known again.

use super::protocol::{Method, Protocol};
use crate::artifact::{BaseConfig, ClassifierConfig, sha256_of_file};
use crate::cli::Failure;
use crate::cli::tasks::{check_length, item, joined, named, questions};
use crate::data::{Choice, JudgedText, TestItem, read_judged, read_tests, training_tokens};
use crate::evaluate::Item;
use crate::text::{EncodedText, Tokenizer, Truncation};
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
    Classify {
        text: EncodedText,
        right: Right,
    },
}

/// What a classifier is to say.
#[derive(Debug, Clone, Copy)]
pub(super) enum Right {
    Class(usize),
    Number(f64),
}

impl Task {
    /// The items of `NAME=FILE`, or the first `limit`.
    pub(super) fn read(
        argument: &str,
        protocol: Protocol,
        tokenizer: &Tokenizer,
        limit: Option<usize>,
        (config, classifier): (&BaseConfig, Option<&ClassifierConfig>),
    ) -> Result<Self, Failure> {
        let (name, path) = named(argument)?;
        let file_sha256 = sha256_of_file(&path)?;
        let limit = limit.unwrap_or(usize::MAX);
        let asks = match protocol.method {
            Method::Classification => {
                let classifier = classifier.ok_or("--method classification: the model does not classify")?;
                let most = protocol.max_text_tokens.min(config.max_positions);
                judged(&path, tokenizer, limit, most, classifier)?
            }
            Method::Loss => asks(&path, protocol, tokenizer, config, &examples(&path, protocol)?, limit)?,
            Method::Likelihood | Method::Generation => {
                asks(&path, protocol, tokenizer, config, &questions(&path, protocol.form)?, limit)?
            }
        };
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
            Self::Classify { text, .. } => text.tokens.len(),
        }
    }
}

fn asks(
    path: &Path,
    protocol: Protocol,
    tokenizer: &Tokenizer,
    config: &BaseConfig,
    items: &[(usize, TestItem)],
    limit: usize,
) -> Result<Vec<Ask>, Failure> {
    let ask = |(index, item): &(usize, TestItem)| -> Result<Ask, Failure> {
        let work = work(protocol, tokenizer, item)?;
        check_length(path, *index, work.longest(protocol), config.max_positions)?;
        Ok(Ask { index: *index, sha256: hex(&item.source), work })
    };
    items.iter().take(limit).map(ask).collect()
}

/// Texts for a classifier, cut as Hugging Face's example for GLUE cuts them: the longer text of a pair first, at its end.
fn judged(
    path: &Path,
    tokenizer: &Tokenizer,
    limit: usize,
    most: usize,
    classifier: &ClassifierConfig,
) -> Result<Vec<Ask>, Failure> {
    let cut = Truncation { most, from_left: false };
    let ask = |(index, item): (usize, &JudgedText)| -> Result<Ask, Failure> {
        let named = |reason: String| format!("{}: item {index}: {reason}", path.display());
        let text = tokenizer.encode_whole(&item.text, item.pair.as_deref(), true, Some(cut));
        let text = text.map_err(|e| named(e.to_string()))?;
        let right = match classifier.regression {
            true => item.number().map(Right::Number),
            false => item.class(&classifier.labels).map(Right::Class),
        };
        let right = right.map_err(named)?;
        Ok(Ask { index, sha256: hex(&item.source), work: Work::Classify { text, right } })
    };
    read_judged(path)?.iter().enumerate().take(limit).map(ask).collect()
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
        Method::Classification => Err("an item with a label is no question".into()),
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
