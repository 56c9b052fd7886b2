//! What is to be classified, as token ids.

use super::app::ServerState;
use super::validate::ClassifyParameters;
use super::wire::{ApiError, Input, Inputs, Pair};
use crate::engine::TextTokens;
use crate::text::{EncodedText, TextError, Truncation};
use std::sync::Arc;

/// The inputs as the model reads them, each short enough, for a model that tells so many token types apart.
pub(super) async fn tokenize(
    state: &Arc<ServerState>,
    mut inputs: Inputs,
    parameters: &ClassifyParameters,
    token_types: usize,
) -> Result<Vec<TextTokens>, ApiError> {
    let (shared, parameters) = (state.clone(), *parameters);
    let work = move || {
        let list = std::mem::take(&mut inputs.list).into_iter().enumerate();
        list.map(|(at, input)| {
            let name = inputs.name(at);
            let text = encode(&shared, input, &parameters, &name)?;
            check(&shared, &text, &name, token_types)?;
            Ok(text)
        })
        .collect()
    };
    state.text_work.run(work).await?
}

fn encode(
    state: &ServerState,
    input: Input,
    parameters: &ClassifyParameters,
    name: &str,
) -> Result<TextTokens, ApiError> {
    let &ClassifyParameters { add_special, truncation, .. } = parameters;
    let (text, pair) = match input {
        Input::Tokens(mut tokens) => {
            truncation.inspect(|truncation| cut(&mut tokens, *truncation));
            let token_types = vec![0; tokens.len()];
            return Ok(TextTokens { tokens, token_types });
        }
        Input::Text(text) => (text, None),
        Input::Pair(Pair { text, text_pair }) => (text, text_pair),
    };
    let encoded = state.tokenizer.encode_whole(&text, pair.as_deref(), add_special, truncation);
    let EncodedText { tokens, token_types } = encoded.map_err(|error| match error {
        TextError::NoRoom { .. } => {
            ApiError::invalid("truncate_prompt_tokens", format!("truncate_prompt_tokens: {error} ({name})"))
        }
        other => ApiError::invalid(name, format!("{name}: {other}")),
    })?;
    Ok(TextTokens { tokens, token_types })
}

/// Token ids are cut as they are; which of them are special is the client's to know.
fn cut(tokens: &mut Vec<u32>, Truncation { most, from_left }: Truncation) {
    let surplus = tokens.len().saturating_sub(most);
    if from_left {
        tokens.drain(..surplus);
    } else {
        tokens.truncate(tokens.len() - surplus);
    }
}

fn check(state: &ServerState, text: &TextTokens, name: &str, token_types: usize) -> Result<(), ApiError> {
    let (most, vocabulary) = (state.limits.max_model_len, state.limits.vocabulary);
    let length = text.tokens.len();
    if length == 0 {
        return Err(ApiError::invalid(name, format!("{name} has no tokens")));
    }
    if length > most {
        let message = format!(
            "{name} has {length} tokens, and this model reads at most {most}; `\"truncate_prompt_tokens\": -1` cuts what is longer"
        );
        return Err(ApiError::too_long(name, message));
    }
    if let Some(id) = text.tokens.iter().find(|&&id| id as usize >= vocabulary) {
        let message = format!("{name}: token id {id} is outside the vocabulary of {vocabulary}");
        return Err(ApiError::invalid(name, message));
    }
    if text.token_types.iter().any(|&kind| kind as usize >= token_types) {
        return Err(ApiError::invalid(name, format!("{name}: this model reads single texts, not pairs")));
    }
    Ok(())
}
