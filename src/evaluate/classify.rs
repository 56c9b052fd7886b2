//! Whole texts through a classifier: many of any sub-networks in a step.

use crate::backend::{BackendError, Segment, Selection};
use crate::model::{Classifier, TextBatch};

/// A text to classify.
#[derive(Debug, Clone)]
pub struct WholeText {
    pub tokens: Vec<u32>,
    /// As many.
    pub token_types: Vec<u32>,
    pub selection: Selection,
}

/// Tokens in one step: enough for products of many rows, few enough that results come steadily.
const STEP_TOKENS: usize = 2048;

/// Classifies every text. `done` is given numbers by label, text by text, step by step, in the order of the texts. Within a step those
/// of a sub-network stand together.
///
/// # Errors
/// A text that the classifier cannot take, what fails below, and what `done` says.
pub fn classify<E: From<BackendError>>(
    classifier: &mut dyn Classifier,
    texts: &[WholeText],
    mut done: impl FnMut(Vec<Vec<f32>>) -> Result<(), E>,
) -> Result<(), E> {
    let mut rest = texts;
    while !rest.is_empty() {
        let mut tokens = 0;
        let fits = |text: &&WholeText| {
            tokens += text.tokens.len();
            tokens <= STEP_TOKENS
        };
        let (step, later) = rest.split_at(rest.iter().take_while(fits).count().max(1));
        let mut order = (0..step.len()).collect::<Vec<_>>();
        order.sort_by_key(|&i| (step[i].selection.adapter, step[i].selection.subnetwork));
        let numbers = classifier.classify(&batch(order.iter().map(|&i| &step[i])))?;
        let mut in_order = vec![Vec::new(); step.len()];
        order.into_iter().zip(numbers).for_each(|(i, numbers)| in_order[i] = numbers);
        done(in_order)?;
        rest = later;
    }
    Ok(())
}

fn batch<'a>(texts: impl Iterator<Item = &'a WholeText>) -> TextBatch {
    let mut batch = TextBatch::default();
    for WholeText { tokens, token_types, selection } in texts {
        let first = batch.tokens.len();
        batch.tokens.extend(tokens);
        batch.token_types.extend(token_types);
        let rows = first..batch.tokens.len();
        match batch.segments.last_mut() {
            Some(last) if last.selection == *selection => last.rows.end = rows.end,
            _ => batch.segments.push(Segment { rows: rows.clone(), selection: selection.clone() }),
        }
        batch.texts.push(rows);
    }
    batch
}
