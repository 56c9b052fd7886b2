//! Text to token ids and back.

use super::tokenizer_json;
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, DecoderWrapper, PreTokenizerWrapper};

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

const SUPPORTED: &str = "gpt2 with smollm, gpt-2 or default";

/// A vocabulary as a GGUF file carries it.
#[derive(Debug, Clone, Default)]
pub struct VocabularyParts {
    /// `gpt2`: byte-level BPE.
    pub model: String,
    /// How text is cut before BPE, in llama.cpp's names.
    pub pre: String,
    pub tokens: Vec<String>,
    /// 3 marks control tokens, 4 user-defined ones; may be empty.
    pub token_types: Vec<i32>,
    /// `left right`, most important first.
    pub merges: Vec<String>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub add_bos: bool,
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
    /// Whether `encode` itself puts `bos` in front; tokenizer.json files do that in their own post-processor.
    add_bos: bool,
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
        Ok(Self::new(inner, bos, eos, false))
    }

    /// From the vocabulary inside a GGUF file.
    pub fn from_vocabulary(parts: VocabularyParts) -> Result<Self, TextError> {
        let VocabularyParts { model, pre, tokens, token_types, merges, bos, eos, add_bos } = parts;
        let digits = match (model.as_str(), pre.as_str()) {
            ("gpt2", "smollm") => true,
            ("gpt2", "gpt-2" | "default") => false,
            _ => return Err(TextError::Unsupported { model, pre }),
        };
        let wrong = |reason: String| TextError::Vocabulary { reason };
        let merge = |m: &String| {
            let pair = m.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string()));
            pair.ok_or_else(|| wrong(format!("merge {m:?} is not two tokens")))
        };
        let merges = merges.iter().map(merge).collect::<Result<Vec<_>, _>>()?;
        let ids = tokens.iter().cloned().zip(0..).collect::<HashMap<String, u32>>();
        if ids.len() != tokens.len() {
            return Err(wrong("two tokens have the same text".into()));
        }
        let bpe = BPE::builder()
            .vocab_and_merges(ids.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges);
        let mut inner = tokenizers::Tokenizer::new(bpe.build().map_err(|e| wrong(e.to_string()))?);
        let bytes = ByteLevel::new(false, false, true);
        let mut cuts: Vec<PreTokenizerWrapper> = Vec::new();
        if digits {
            cuts.push(Digits::new(true).into());
        }
        cuts.push(bytes.into());
        inner.with_pre_tokenizer(Some(Sequence::new(cuts)));
        inner.with_decoder(Some(bytes));
        for (token, kind) in tokens.iter().zip(&token_types) {
            let added = match kind {
                3 => inner.add_special_tokens([AddedToken::from(token.clone(), true)]),
                4 => inner.add_tokens([AddedToken::from(token.clone(), false)]),
                _ => continue,
            };
            added.map_err(|e| wrong(e.to_string()))?;
        }
        for (name, id) in [("bos", bos), ("eos", eos)] {
            if id.is_some_and(|id| id as usize >= tokens.len()) {
                return Err(wrong(format!("its {name} token {id:?} is outside the vocabulary")));
            }
        }
        Ok(Self::new(inner, bos, eos, add_bos))
    }

    fn new(inner: tokenizers::Tokenizer, bos: Option<u32>, eos: Option<u32>, add_bos: bool) -> Self {
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
        Self { inner, bytes, special, cuts_ends, bos, eos, add_bos }
    }

    /// tokenizer.json: what [`Self::from_hugging_face`] and Hugging Face's own library build the same tokenizer from.
    pub fn to_json(&self) -> Result<String, TextError> {
        let wrong = |reason: String| TextError::Vocabulary { reason };
        let text = self.inner.to_string(false).map_err(|e| wrong(e.to_string()))?;
        let bos = self.bos.filter(|_| self.add_bos).and_then(|id| Some((id, self.token_text(id)?)));
        let Some((id, bos)) = bos else { return Ok(text) };
        // What `encode` does itself, the file's own post-processor has to do.
        let front = json!({"SpecialToken": {"id": bos, "type_id": 0}});
        let of = |text: &str| json!({"Sequence": {"id": text, "type_id": 0}});
        let mut file: Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        file["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [front, of("A")],
            "pair": [front, of("A"), of("B")],
            "special_tokens": {bos.as_str(): {"id": bos, "ids": [id], "tokens": [bos]}},
        });
        Ok(file.to_string())
    }

    /// Token ids of `text`. Special tokens spelled out in the text become those tokens, as in Hugging Face; with
    /// `add_special` the tokenizer's own additions (such as a beginning of sequence) come too.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoded = self.inner.encode_fast(text, add_special);
        let encoded = encoded.map_err(|e| TextError::Encode { reason: e.to_string() })?;
        let bos = self.bos.filter(|_| add_special && self.add_bos);
        Ok(bos.into_iter().chain(encoded.get_ids().iter().copied()).collect())
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
