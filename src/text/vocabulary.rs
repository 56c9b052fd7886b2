//! A tokenizer from the vocabulary that a GGUF file carries, made as Hugging Face's library has it in a tokenizer.json.
//!
//! The other way round is `gguf_vocabulary`.

use super::gguf_vocabulary::{CONTROL, LLAMA3, NORMAL, SPACE, UNKNOWN, USER_DEFINED};
use super::{TextError, Tokenizer};
use serde_json::json;
use std::collections::HashMap;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{Prepend, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, decoders,
    normalizers,
};

pub(super) const SUPPORTED: &str = "gpt2 with llama-bpe, smollm, gpt-2 or default; llama";

/// A vocabulary as a GGUF file carries it.
#[derive(Debug, Clone, Default)]
pub struct VocabularyParts {
    /// `gpt2`: byte-level BPE. `llama`: sentencepiece's BPE over characters.
    pub model: String,
    /// How text is cut before byte-level BPE, in llama.cpp's names.
    pub pre: String,
    /// As many as the model has rows.
    pub tokens: Vec<String>,
    /// llama.cpp's kinds of tokens; may be empty.
    pub token_types: Vec<i32>,
    /// By token, of `llama` only: the higher the earlier two tokens are joined to this one.
    pub scores: Vec<f32>,
    /// `left right`, most important first; of `gpt2` only.
    pub merges: Vec<String>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unknown: Option<u32>,
    pub add_bos: bool,
    pub add_eos: bool,
    /// Whether a text gets a space in front; of `llama` only.
    pub add_space_prefix: bool,
}

/// Sentencepiece's tokens have up to 16 characters unless a training says otherwise; no vocabulary is known to have longer ones
/// than this. What is more would only make pairs without end.
const LONGEST_PIECE: usize = 256;
/// LLaMA's 32,000 tokens are joined in 61,249 ways.
const MOST_MERGES_PER_TOKEN: usize = 32;

fn wrong(reason: String) -> TextError {
    TextError::Vocabulary { reason }
}

impl Tokenizer {
    /// From the vocabulary inside a GGUF file.
    ///
    /// # Errors
    /// [`TextError::Unsupported`] for kinds that are not known here; a vocabulary that contradicts itself.
    pub fn from_vocabulary(parts: VocabularyParts) -> Result<Self, TextError> {
        let steps = |steps: &[PreTokenizerWrapper]| Sequence::new(steps.to_vec());
        let llama3 = || {
            let cut = Split::new(SplitPattern::Regex(LLAMA3.into()), SplitDelimiterBehavior::Isolated, false);
            let cut = cut.map_err(|e| wrong(e.to_string()))?;
            Ok::<_, TextError>(steps(&[cut.into(), ByteLevel::new(false, true, false).into()]))
        };
        let bytes = ByteLevel::new(false, false, true);
        let mut inner = match (parts.model.as_str(), parts.pre.as_str()) {
            ("gpt2", "gpt-2" | "default") => byte_level(&parts, steps(&[bytes.into()]), false)?,
            ("gpt2", "smollm") => {
                byte_level(&parts, steps(&[Digits::new(true).into(), bytes.into()]), false)?
            }
            ("gpt2", "llama-bpe" | "llama3" | "llama-v3") => byte_level(&parts, llama3()?, true)?,
            ("llama", _) => sentence_piece(&parts)?,
            _ => return Err(TextError::Unsupported { model: parts.model, pre: parts.pre }),
        };
        for (name, id) in [("bos", parts.bos), ("eos", parts.eos), ("unknown", parts.unknown)] {
            if id.is_some_and(|id| id as usize >= parts.tokens.len()) {
                return Err(wrong(format!("its {name} token {id:?} is outside the vocabulary")));
            }
        }
        let added = parts.tokens.iter().zip(&parts.token_types).filter_map(|(token, &kind)| {
            let special = match kind {
                CONTROL => true,
                // Of sentencepiece's; byte-level BPE knows everything.
                UNKNOWN if parts.model == "llama" => true,
                USER_DEFINED => false,
                _ => return None,
            };
            Some(AddedToken::from(token.clone(), special).normalized(false))
        });
        inner.add_tokens(added.collect::<Vec<_>>()).map_err(|e| wrong(e.to_string()))?;
        inner.with_post_processor(additions(&parts)?);
        Ok(Self::new(inner, parts.bos, parts.eos))
    }
}

/// Tokens with their ids.
fn ids(parts: &VocabularyParts) -> Result<Vocab, TextError> {
    let ids = parts.tokens.iter().cloned().zip(0..).collect::<Vocab>();
    if ids.len() == parts.tokens.len() { Ok(ids) } else { Err(wrong("two tokens have the same text".into())) }
}

/// `whole_words`: a word that is a token is taken as it is, whichever merges there are.
fn byte_level(
    parts: &VocabularyParts,
    cuts: Sequence,
    whole_words: bool,
) -> Result<tokenizers::Tokenizer, TextError> {
    let merge = |m: &String| {
        let pair = m.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string()));
        pair.ok_or_else(|| wrong(format!("merge {m:?} is not two tokens")))
    };
    let merges = parts.merges.iter().map(merge).collect::<Result<Merges, _>>()?;
    let bpe = BPE::builder().vocab_and_merges(ids(parts)?, merges).ignore_merges(whole_words);
    let mut inner = tokenizers::Tokenizer::new(bpe.build().map_err(|e| wrong(e.to_string()))?);
    inner.with_pre_tokenizer(Some(cuts));
    inner.with_decoder(Some(ByteLevel::new(false, false, true)));
    Ok(inner)
}

fn sentence_piece(parts: &VocabularyParts) -> Result<tokenizers::Tokenizer, TextError> {
    let failed = |e: tokenizers::Error| wrong(e.to_string());
    let count = parts.tokens.len();
    for (what, length) in [("scores", parts.scores.len()), ("kinds of tokens", parts.token_types.len())] {
        if length != count {
            return Err(wrong(format!("{count} tokens, but {length} {what}")));
        }
    }
    let mut bpe =
        BPE::builder().vocab_and_merges(ids(parts)?, pairs(parts)?).byte_fallback(true).fuse_unk(true);
    let marked = || parts.token_types.iter().position(|&kind| kind == UNKNOWN);
    let unknown = parts.unknown.map(|id| id as usize).or_else(marked);
    if let Some(unknown) = unknown.and_then(|id| parts.tokens.get(id)) {
        bpe = bpe.unk_token(unknown.clone());
    }
    let mut inner = tokenizers::Tokenizer::new(bpe.build().map_err(failed)?);
    let spaces = Replace::new(" ", SPACE).map_err(failed)?;
    let front = parts.add_space_prefix.then(|| Prepend::new(SPACE.into()).into());
    let steps = front.into_iter().chain([NormalizerWrapper::from(spaces)]).collect();
    inner.with_normalizer(Some(normalizers::Sequence::new(steps))).map_err(failed)?;
    let mut steps: Vec<DecoderWrapper> = vec![
        Replace::new(SPACE, " ").map_err(failed)?.into(),
        decoders::byte_fallback::ByteFallback::new().into(),
        decoders::fuse::Fuse::new().into(),
    ];
    if parts.add_space_prefix {
        steps.push(decoders::strip::Strip::new(' ', 1, 0).into());
    }
    inner.with_decoder(Some(decoders::sequence::Sequence::new(steps)));
    Ok(inner)
}

/// All pairs that make a token, in the order in which transformers lists them (`generate_merges` in convert_slow_tokenizer.py):
/// by the token's score, then the longer left part first.
fn pairs(parts: &VocabularyParts) -> Result<Merges, TextError> {
    let all = parts.tokens.iter().zip(&parts.token_types).zip(&parts.scores);
    let normal = all.filter(|((_, kind), _)| **kind == NORMAL);
    let scores = normal.map(|((token, _), &score)| (token.as_str(), score));
    let scores = scores.collect::<Vec<_>>();
    let known = scores.iter().copied().collect::<HashMap<_, _>>();
    let mut found = Vec::new();
    for &(token, score) in &scores {
        if token.len() > LONGEST_PIECE {
            return Err(wrong(format!("a token has {} bytes, at most {LONGEST_PIECE}", token.len())));
        }
        for (length, (at, _)) in token.char_indices().enumerate().skip(1) {
            let (left, right) = token.split_at(at);
            if known.contains_key(left) && known.contains_key(right) {
                found.push((score, length, left, right));
            }
        }
        if found.len() > scores.len() * MOST_MERGES_PER_TOKEN {
            return Err(wrong("its tokens are made of each other in more ways than any known".into()));
        }
    }
    // Stable: what is left equal stays in the order of the tokens.
    found.sort_by(|one, other| {
        let right = |pair: &(f32, usize, &str, &str)| pair.3.chars().count();
        let by_score = other.0.total_cmp(&one.0);
        by_score.then(other.1.cmp(&one.1)).then_with(|| right(other).cmp(&right(one)))
    });
    Ok(found.into_iter().map(|(_, _, left, right)| (left.to_string(), right.to_string())).collect())
}

/// A beginning and an end of sequence that come to every text.
fn additions(parts: &VocabularyParts) -> Result<Option<TemplateProcessing>, TextError> {
    let token = |id: Option<u32>, add: bool| {
        let id = id.filter(|_| add)?;
        Some((id, parts.tokens.get(id as usize)?.as_str()))
    };
    let (front, back) = (token(parts.bos, parts.add_bos), token(parts.eos, parts.add_eos));
    if front.is_none() && back.is_none() {
        return Ok(None);
    }
    let special = |(_, text): (u32, &str)| json!({"SpecialToken": {"id": text, "type_id": 0}});
    let around = |texts: &[&str]| {
        let texts = texts.iter().map(|text| json!({"Sequence": {"id": text, "type_id": 0}}));
        front.map(special).into_iter().chain(texts).chain(back.map(special)).collect::<Vec<_>>()
    };
    let tokens = [front, back].into_iter().flatten();
    let tokens = tokens.map(|(id, text)| (text, json!({"id": text, "ids": [id], "tokens": [text]})));
    // From JSON: the builder reads templates from a text, in which a token could be anything.
    let template = json!({
        "type": "TemplateProcessing",
        "single": around(&["A"]),
        "pair": around(&["A", "B"]),
        "special_tokens": tokens.collect::<HashMap<_, _>>(),
    });
    serde_json::from_value(template).map(Some).map_err(|e| wrong(e.to_string()))
}
