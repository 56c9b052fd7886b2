//! Texts and pairs of texts for a model that reads them whole: with token types, and cut where they are too long.

use super::{TextError, Tokenizer};
use tokenizers::utils::truncation::{TruncationDirection, TruncationParams, truncate_encodings};
use tokenizers::{Encoding, PostProcessor};

/// How a text that is too long is cut, as Hugging Face's `truncation=True` does it: the tokenizer's own tokens stay, and of a pair
/// the longer text gives first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Truncation {
    /// Tokens that may stay, the tokenizer's own ones among them.
    pub most: usize,
    /// Whether the beginning goes, not the end.
    pub from_left: bool,
}

/// One text or pair as a model reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedText {
    pub tokens: Vec<u32>,
    /// As many: 0 in the first text, 1 in the second, where the tokenizer tells them apart.
    pub token_types: Vec<u32>,
}

impl Tokenizer {
    /// Token ids and types of a text, or of a pair that is read as one.
    ///
    /// # Errors
    /// A text that the tokenizer cannot take; a truncation that leaves no room beside the tokenizer's own tokens.
    pub fn encode_whole(
        &self,
        text: &str,
        pair: Option<&str>,
        add_special: bool,
        truncation: Option<Truncation>,
    ) -> Result<EncodedText, TextError> {
        let failed = |e: tokenizers::Error| TextError::Encode { reason: e.to_string() };
        let mut first = self.inner.encode_fast(text, false).map_err(failed)?;
        let mut second = pair.map(|pair| self.second(pair)).transpose().map_err(failed)?;
        if let Some(Truncation { most, from_left }) = truncation {
            let processor = self.inner.get_post_processor().filter(|_| add_special);
            let own = processor.map_or(0, |p| p.added_tokens(pair.is_some()));
            let room = most.checked_sub(own).filter(|&room| room > 0);
            let max_length = room.ok_or(TextError::NoRoom { most, own })?;
            let direction = if from_left { TruncationDirection::Left } else { TruncationDirection::Right };
            let parameters = TruncationParams { max_length, direction, ..TruncationParams::default() };
            (first, second) = truncate_encodings(first, second, &parameters).map_err(failed)?;
        }
        let whole = self.inner.post_process(first, second, add_special).map_err(failed)?;
        Ok(EncodedText { tokens: whole.get_ids().to_vec(), token_types: whole.get_type_ids().to_vec() })
    }

    /// The second text of a pair, before the two are joined.
    fn second(&self, text: &str) -> tokenizers::Result<Encoding> {
        let mut second = self.inner.encode_fast(text, false)?;
        // `encode_fast` makes all types 0, and only a template sets them anew.
        second.set_type_ids(vec![1; second.len()]);
        Ok(second)
    }
}
