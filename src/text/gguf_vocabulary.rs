//! tokenizer.json in the words of a GGUF file, which knows two kinds of tokenizer of LLaMAs.
//!
//! `gpt2`, byte-level BPE: tokens, merges, and the name of one of llama.cpp's ways to cut text before. `llama`,
//! sentencepiece's BPE over characters: tokens with scores. What is neither is refused, never approximated.

use super::{TextError, VocabularyParts, tokenizer_json};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use tokenizers::AddedToken;

/// llama.cpp's kinds of tokens.
pub(super) const NORMAL: i32 = 1;
pub(super) const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// How LLaMA 3 cuts text; llama.cpp's `llama-bpe` is the same, written for its own regular expressions.
pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Sentencepiece's space.
pub(super) const SPACE: &str = "\u{2581}";

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    vocab: BTreeMap<String, u32>,
    merges: Vec<Merge>,
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// Older files have `left right`, newer ones both apart.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Joined(String),
    Pair([String; 2]),
}

impl Merge {
    fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Self::Joined(text) => text.split_once(' '),
            Self::Pair([left, right]) => Some((left, right)),
        }
    }
}

/// Reads a tokenizer.json for a model of `vocabulary` tokens; `added` are what other files add to it, `bos` and `eos` the special
/// tokens' texts.
///
/// # Errors
/// [`TextError::NotInGguf`] for a tokenizer that llama.cpp would not compute, beside files that are no tokenizer.
pub fn gguf_tokenizer(
    path: &Path,
    added: Vec<AddedToken>,
    bos: Option<&str>,
    eos: Option<&str>,
    vocabulary: usize,
) -> Result<VocabularyParts, TextError> {
    // Whether it is a tokenizer at all; what it says is then read from the text itself.
    let mut known = tokenizer_json::read(path)?;
    let wrong = |reason: String| TextError::File { path: path.into(), reason };
    known.add_tokens(added.clone()).map_err(|e| wrong(e.to_string()))?;
    let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    let not_in_gguf = |reason: String| TextError::NotInGguf { path: path.into(), reason };
    // A unigram's vocabulary is no map, so that the kind is asked first.
    let kind = serde_json::from_str::<Value>(&text)
        .ok()
        .and_then(|v| Some(v["model"]["type"].as_str()?.to_string()));
    if let Some(kind) = kind.filter(|kind| kind != "BPE") {
        return Err(not_in_gguf(format!("its model is {kind}, not BPE")));
    }
    let mut file = serde_json::from_str::<File>(&text).map_err(|e| wrong(e.to_string()))?;
    file.added_tokens.extend(added.into_iter().filter_map(|token| {
        let id = known.token_to_id(&token.content)?;
        Some(Added { id, content: token.content, special: token.special })
    }));

    let id = |text: Option<&str>| text.and_then(|t| known.token_to_id(t));
    let (bos, eos) = (id(bos), id(eos));
    let (add_bos, add_eos) = additions(&file.post_processor, bos, eos).map_err(&not_in_gguf)?;
    let (tokens, token_types) = tokens(&file, vocabulary).map_err(&wrong)?;
    let unknown = id(file.model.unk_token.as_deref());
    let mut merges = Vec::with_capacity(file.model.merges.len());
    for merge in &file.model.merges {
        merges.push(merge.pair().ok_or_else(|| wrong("a merge is not two tokens".into()))?);
    }
    let parts = VocabularyParts {
        tokens,
        token_types,
        bos,
        eos,
        unknown,
        add_bos,
        add_eos,
        ..VocabularyParts::default()
    };
    if file.model.byte_fallback {
        if file.model.ignore_merges {
            return Err(not_in_gguf(
                "it takes whole words before it joins, which sentencepiece does not".into(),
            ));
        }
        let add_space_prefix = space_prefix(&file).map_err(&not_in_gguf)?;
        let scores = scores(&parts, &merges).map_err(&not_in_gguf)?;
        let (model, pre) = ("llama".into(), "default".into());
        return Ok(VocabularyParts { model, pre, scores, add_space_prefix, ..parts });
    }
    let pre = cuts(&file).map_err(&not_in_gguf)?.into();
    let merges = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
    Ok(VocabularyParts { model: "gpt2".into(), pre, merges, ..parts })
}

/// Tokens by id with their kinds; ids that stand for nothing are filled up, as llama.cpp's converter does.
fn tokens(file: &File, vocabulary: usize) -> Result<(Vec<String>, Vec<i32>), String> {
    let mut tokens = (0..vocabulary).map(|id| format!("[PAD{id}]")).collect::<Vec<_>>();
    let mut types = vec![UNUSED; vocabulary];
    let mut put = |text: &str, id: u32, kind| {
        let place = tokens.get_mut(id as usize).zip(types.get_mut(id as usize));
        let (token, its_kind) = place
            .ok_or_else(|| format!("token {text:?} has id {id}, but the model has {vocabulary} tokens"))?;
        (*token, *its_kind) = (text.to_string(), kind);
        Ok::<_, String>(())
    };
    let spm = file.model.byte_fallback;
    let is_unknown = |text: &String| spm && file.model.unk_token.as_ref() == Some(text);
    for (text, &id) in &file.model.vocab {
        let kind = if spm && is_byte(text) { BYTE } else { NORMAL };
        put(text, id, if is_unknown(text) { UNKNOWN } else { kind })?;
    }
    // Some tokenizers add tokens for which the model has no row, such as a padding; it could not take them anyway.
    for Added { id, content, special } in file.added_tokens.iter().filter(|t| (t.id as usize) < vocabulary) {
        let kind = if *special { CONTROL } else { USER_DEFINED };
        put(content, *id, if is_unknown(content) { UNKNOWN } else { kind })?;
    }
    Ok((tokens, types))
}

/// `<0x0A>`
fn is_byte(token: &str) -> bool {
    let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

/// Whether a beginning and an end of sequence come to every text.
fn additions(processor: &Value, bos: Option<u32>, eos: Option<u32>) -> Result<(bool, bool), String> {
    let mut templates = Vec::new();
    let inner = processor["processors"].as_array().into_iter().flatten();
    for part in std::iter::once(processor).chain(inner) {
        match part["type"].as_str() {
            None | Some("Sequence" | "ByteLevel") => {}
            Some("TemplateProcessing") => templates.push(part),
            Some(other) => return Err(format!("its post-processor is {other}")),
        }
    }
    let (mut before, mut after, mut seen) = (Vec::new(), Vec::new(), templates.is_empty());
    for template in &templates {
        for piece in template["single"].as_array().into_iter().flatten() {
            let Some(name) = piece["SpecialToken"]["id"].as_str() else {
                seen = true;
                continue;
            };
            let ids = template["special_tokens"][name]["ids"].as_array().into_iter().flatten();
            let ids = ids.map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
            if seen { &mut after } else { &mut before }.extend(ids);
        }
    }
    let is = |ids: &[Option<u32>], token: Option<u32>| match ids {
        [] => Ok(false),
        [one] if token.is_some() && *one == token => Ok(true),
        _ => Err("its post-processor adds other tokens than a beginning and an end of sequence".to_string()),
    };
    Ok((is(&before, bos)?, is(&after, eos)?))
}

/// llama.cpp's name for how a byte-level BPE cuts text first.
fn cuts(file: &File) -> Result<&'static str, String> {
    if file.decoder["type"] != "ByteLevel" {
        return Err("its BPE is neither byte-level nor falls back to bytes".into());
    }
    if !file.normalizer.is_null() {
        return Err(format!("it has a normalizer ({})", file.normalizer["type"]));
    }
    let own = &file.pre_tokenizer;
    let steps = match own["pretokenizers"].as_array() {
        Some(steps) => steps.iter().collect::<Vec<_>>(),
        None => vec![own],
    };
    let is = |step: &Value, kind: &str| step["type"] == kind;
    // Bytes come last; a missing `use_regex` means that they cut as GPT-2 does.
    let bytes = |step: &Value, cut: bool| {
        is(step, "ByteLevel")
            && step["add_prefix_space"] == false
            && step["use_regex"].as_bool().unwrap_or(true) == cut
    };
    let digits = |step: &Value| is(step, "Digits") && step["individual_digits"] == true;
    let llama3 = |step: &Value| {
        is(step, "Split")
            && step["pattern"]["Regex"] == LLAMA3
            && step["behavior"] == "Isolated"
            && step["invert"] != true
    };
    match (steps.as_slice(), file.model.ignore_merges) {
        ([last], false) if bytes(last, true) => Ok("gpt-2"),
        ([first, last], false) if digits(first) && bytes(last, true) => Ok("smollm"),
        ([first, last], true) if llama3(first) && bytes(last, false) => Ok("llama-bpe"),
        _ => Err("it cuts text in another way than GPT-2, SmolLM and LLaMA 3".into()),
    }
}

/// Of sentencepiece's kind: whether a text gets a space in front.
fn space_prefix(file: &File) -> Result<bool, String> {
    let normalizer = &file.normalizer;
    let steps = match normalizer["normalizers"].as_array() {
        Some(steps) => steps.iter().collect::<Vec<_>>(),
        None if normalizer.is_null() => Vec::new(),
        None => vec![normalizer],
    };
    let replaces = |step: &Value| {
        step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == SPACE
    };
    let prepends = |step: &Value| step["type"] == "Prepend" && step["prepend"] == SPACE;
    let own = &file.pre_tokenizer;
    let whole = own["type"] == "Metaspace" && own["replacement"] == SPACE && own["split"] == false;
    match steps.as_slice() {
        [first, second] if own.is_null() && prepends(first) && replaces(second) => Ok(true),
        [only] if own.is_null() && replaces(only) => Ok(false),
        [] if whole && own["prepend_scheme"] == "never" => Ok(false),
        [] if whole => Ok(true),
        _ => Err("it prepares text in another way than sentencepiece does for LLaMA".into()),
    }
}

/// Sentencepiece joins the two neighbours that make the token with the highest score, whichever two they are; a
/// tokenizer.json lists the pairs. They say the same if every pair that makes a token is listed, those of one token next
/// to each other; then the score of a token is how early its pairs come.
fn scores(parts: &VocabularyParts, merges: &[(&str, &str)]) -> Result<Vec<f32>, String> {
    let normal = |(_, kind): &(&String, &i32)| **kind == NORMAL;
    let tokens = parts.tokens.iter().zip(&parts.token_types).filter(normal);
    let tokens = tokens.map(|(token, _)| token.as_str()).collect::<HashSet<_>>();
    let mut ranks: HashMap<String, usize> = HashMap::new();
    let mut listed = HashSet::with_capacity(merges.len());
    let mut last = String::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        let joined = format!("{left}{right}");
        listed.insert((*left, *right));
        if joined != last && ranks.insert(joined.clone(), rank).is_some() {
            return Err(format!(
                "the merges that make {joined:?} do not stand together, as sentencepiece's would"
            ));
        }
        last = joined;
    }
    for token in &tokens {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if tokens.contains(left) && tokens.contains(right) && !listed.contains(&(left, right)) {
                return Err(format!("it never joins {left:?} and {right:?}, as sentencepiece would"));
            }
        }
    }
    // A single character is never the result of a join, so its score is never looked at.
    let score = |token: &String| ranks.get(token).map_or(0.0, |&rank| -(rank as f32) - 1.0);
    Ok(parts.tokens.iter().map(score).collect())
}
