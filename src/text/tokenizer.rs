//! Text to token ids and back.

use super::tokenizer_json;
use super::vocabulary::SUPPORTED;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use tokenizers::{AddedToken, DecoderWrapper};

/// A tokenizer that cannot be built or a text it cannot take.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error(
        "the base's tokenizer `{model}` with pre-tokenizer `{pre}` is not supported; supported: {SUPPORTED}"
    )]
    Unsupported { model: String, pre: String },
    /// A tokenizer that works, but that a GGUF file cannot say.
    #[error("{}: a GGUF file cannot hold this tokenizer: {reason}", path.display())]
    NotInGguf { path: PathBuf, reason: String },
    #[error("the base's tokenizer: {reason}")]
    Vocabulary { reason: String },
    #[error("cannot tokenize: {reason}")]
    Encode { reason: String },
    #[error("cannot make text of tokens: {reason}")]
    Decode { reason: String },
    #[error("{most} tokens leave no room for a text beside the tokenizer's own {own}")]
    NoRoom { most: usize, own: usize },
}

/// Text to token ids and back.
pub struct Tokenizer {
    pub(super) inner: tokenizers::Tokenizer,
    /// The bytes of every token, by id.
    bytes: Vec<Vec<u8>>,
    special: HashSet<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    /// The library that decodes takes it on trust that there are as many characters as it is to take.
    cuts_ends: bool,
}

impl Tokenizer {
    /// From a tokenizer.json; `bos` and `eos` are the special tokens' texts, as tokenizer_config.json gives them.
    pub fn from_hugging_face(path: &Path, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TextError> {
        Self::from_files(path, Vec::new(), bos, eos)
    }

    /// The same with tokens that other files add to those of the tokenizer.json.
    pub fn from_files(
        path: &Path,
        added: Vec<AddedToken>,
        bos: Option<&str>,
        eos: Option<&str>,
    ) -> Result<Self, TextError> {
        let wrong = |reason: String| TextError::File { path: path.into(), reason };
        let mut inner = tokenizer_json::read(path)?;
        inner.add_tokens(added).map_err(|e| wrong(e.to_string()))?;
        let id = |text: Option<&str>| text.and_then(|t| inner.token_to_id(t));
        let (bos, eos) = (id(bos), id(eos));
        Ok(Self::new(inner, bos, eos))
    }

    pub(super) fn new(inner: tokenizers::Tokenizer, bos: Option<u32>, eos: Option<u32>) -> Self {
        let added = inner.get_added_tokens_decoder();
        let byte_level = any_decoder(inner.get_decoder(), |d| matches!(d, DecoderWrapper::ByteLevel(_)));
        let alphabet = byte_alphabet();
        // Not the number of tokens: ids may have gaps.
        let size = inner.get_vocab(true).into_values().max().map_or(0, |last| last + 1);
        let bytes = (0..size).map(|id| {
            let Some(text) = inner.id_to_token(id) else { return Vec::new() };
            if added.contains_key(&id) {
                text.into_bytes()
            } else if byte_level {
                text.chars().filter_map(|c| alphabet.get(&c).copied()).collect()
            } else {
                sentence_piece_bytes(&text)
            }
        });
        let bytes = bytes.collect();
        let special = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let cuts_ends =
            any_decoder(inner.get_decoder(), |d| matches!(d, DecoderWrapper::Strip(s) if s.stop > 0));
        Self { inner, bytes, special, cuts_ends, bos, eos }
    }

    /// tokenizer.json: what [`Self::from_hugging_face`] and Hugging Face's own library build the same tokenizer from.
    pub fn to_json(&self) -> Result<String, TextError> {
        let wrong = |reason: String| TextError::Vocabulary { reason };
        self.inner.to_string(false).map_err(|e| wrong(e.to_string()))
    }

    /// Token ids of `text`. Special tokens spelled out in the text become those tokens, as in Hugging Face; with
    /// `add_special` the tokenizer's own additions (such as a beginning of sequence) come too.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoded = self.inner.encode_fast(text, add_special);
        let encoded = encoded.map_err(|e| TextError::Encode { reason: e.to_string() })?;
        Ok(encoded.get_ids().to_vec())
    }

    /// The text of a whole sequence, as the tokenizer itself writes it: without the space that it puts in front of a text, and
    /// with those between words that its tokens do not have.
    pub fn decode_whole(&self, tokens: &[u32], skip_special: bool) -> Result<String, TextError> {
        if self.cuts_ends {
            let reason = "its decoder takes characters from the ends of tokens".to_string();
            return Err(TextError::Decode { reason });
        }
        let decoded = self.inner.decode(tokens, skip_special);
        decoded.map_err(|e| TextError::Decode { reason: e.to_string() })
    }

    /// The text of `tokens` that go on from others; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> String {
        let kept = tokens.iter().filter(|t| !skip_special || !self.is_special(**t));
        let bytes = kept.flat_map(|&t| self.token_bytes(t)).copied().collect::<Vec<_>>();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes that one token stands for; empty outside the vocabulary.
    pub fn token_bytes(&self, token: u32) -> &[u8] {
        self.bytes.get(token as usize).map_or(&[], Vec::as_slice)
    }

    /// Whether decoding leaves this token out.
    pub fn is_special(&self, token: u32) -> bool {
        self.special.contains(&token)
    }

    /// The number of token ids.
    pub fn vocabulary(&self) -> usize {
        self.bytes.len()
    }

    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The text by which the chat template knows a token.
    pub fn token_text(&self, token: u32) -> Option<String> {
        self.inner.id_to_token(token)
    }
}

/// Whether a decoder is such a one, or one of its parts is.
fn any_decoder(decoder: Option<&DecoderWrapper>, is: fn(&DecoderWrapper) -> bool) -> bool {
    let within = |decoder: &DecoderWrapper| match decoder {
        DecoderWrapper::Sequence(parts) => {
            parts.get_decoders().iter().any(|part| any_decoder(Some(part), is))
        }
        other => is(other),
    };
    decoder.is_some_and(within)
}

/// GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on.
fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let shifted = (0..=255u8).filter(|b| !printable(b)).zip('\u{100}'..);
    let same = (0..=255u8).filter(printable).map(|b| (char::from(b), b));
    same.chain(shifted.map(|(b, c)| (c, b))).collect()
}

/// `▁` is a space, `<0x0A>` a byte.
fn sentence_piece_bytes(token: &str) -> Vec<u8> {
    let byte = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => token.replace('\u{2581}', " ").into_bytes(),
    }
}
