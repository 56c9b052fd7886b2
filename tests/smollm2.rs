//! The default base against transformers: tokenizer, losses, greedy text.

use crate::golden::{self, push};
use lonas::artifact::{Base, DEFAULT_BASE, TokenizerSource, locate};
use lonas::backend::Selection;
use lonas::backend::reference::Reference;
use lonas::generation::token_logprob;
use lonas::model::llama::{self, LlamaExecutor};
use lonas::model::{self, Batch, Executor, Orders};
use lonas::text::{ChatTemplate, Message, Tokenizer, VocabularyParts};
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(serde::Deserialize)]
struct Golden {
    greedy: Vec<Greedy>,
    losses: Vec<Loss>,
    tokenizer: Vec<Tokens>,
}

#[derive(serde::Deserialize)]
struct Greedy {
    text: String,
    #[serde(default)]
    messages: Vec<BTreeMap<String, String>>,
    prompt: Vec<u32>,
    continuation: Vec<u32>,
}

#[derive(serde::Deserialize)]
struct Loss {
    tokens: Vec<u32>,
    loss: f32,
}

#[derive(serde::Deserialize)]
struct Tokens {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

/// The default base, fetched on first use as the program itself does.
pub(crate) fn base() -> Base {
    let cache = std::env::var_os("LONAS_CACHE").map(std::path::PathBuf::from);
    let cache = cache.unwrap_or_else(|| std::env::home_dir().unwrap().join(".cache/lonas"));
    Base::open(&locate(&DEFAULT_BASE.source(), Some(DEFAULT_BASE.sha256), &cache).unwrap()).unwrap()
}

fn tokenizer(base: &Base) -> (Tokenizer, String) {
    let TokenizerSource::Gguf(v) = base.tokenizer.clone() else { panic!("the default base is a GGUF file") };
    let (bos, eos, add_bos) = (v.bos, v.eos, v.add_bos);
    let (model, pre, tokens, token_types, merges) = (v.model, v.pre, v.tokens, v.token_types, v.merges);
    let rest = VocabularyParts::default();
    let parts = VocabularyParts { model, pre, tokens, token_types, merges, bos, eos, add_bos, ..rest };
    (Tokenizer::from_vocabulary(parts).unwrap(), v.chat_template.unwrap())
}

#[test]
fn the_tokenizer_is_that_of_transformers() {
    let (tokenizer, _) = tokenizer(&base());
    let golden: Golden = golden::json("smollm2.json");
    for Tokens { text, ids, decoded } in &golden.tokenizer {
        assert_eq!(&tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(&tokenizer.decode(ids, false), decoded, "{text:?}");
    }
}

#[test]
fn the_chat_template_renders_as_in_transformers() {
    let (tokenizer, template) = tokenizer(&base());
    let text = |id: Option<u32>| tokenizer.token_text(id.unwrap()).unwrap();
    let template = ChatTemplate::new(&template, &text(tokenizer.bos()), &text(tokenizer.eos())).unwrap();
    let golden: Golden = golden::json("smollm2.json");
    let chats = golden.greedy.iter().filter(|g| !g.messages.is_empty()).collect::<Vec<_>>();
    assert_eq!(chats.len(), 5);
    for chat in chats {
        let turn =
            |m: &BTreeMap<String, String>| Message { role: m["role"].clone(), content: m["content"].clone() };
        let messages = chat.messages.iter().map(turn).collect::<Vec<_>>();
        let rendered = template.render(&messages, true).unwrap();
        assert_eq!(rendered, chat.text);
        assert_eq!(tokenizer.encode(&rendered, true).unwrap(), chat.prompt);
    }
}

#[test]
fn losses_and_greedy_text_are_those_of_transformers_in_f32() {
    let base = base();
    let golden: Golden = golden::json("smollm2.json");
    let backend = Reference::new();
    let model = llama::load(&backend, &base, Vec::new(), &Orders::default()).unwrap();
    let mut executor = LlamaExecutor::new(model, backend, 200, 16).unwrap();
    let shape = Arc::new(model::model_shape(&base.config, None).full());
    let selection = Selection { adapter: 0, subnetwork: 0, shape };

    for Loss { tokens, loss } in &golden.losses {
        let mut batch = Batch::default();
        let blocks = (0..20).collect::<Vec<_>>();
        push(&mut batch, selection.clone(), tokens, 0, &blocks);
        let logits = executor.forward(&batch).unwrap();
        let predicted = tokens[1..].iter().enumerate();
        let sum = predicted.map(|(i, &t)| token_logprob(logits.row(i), t, 0).0).sum::<f32>();
        let mean = -sum / (tokens.len() - 1) as f32;
        assert!((mean - loss).abs() < 1e-3, "loss {mean}, transformers {loss}");
    }

    // All prompts together: first whole, then one token each a step.
    let mut fed = golden.greedy.iter().map(|g| g.prompt.clone()).collect::<Vec<_>>();
    let mut starts = vec![0; fed.len()];
    let mut generated = vec![Vec::new(); fed.len()];
    for _ in 0..golden.greedy[0].continuation.len() {
        let (mut batch, mut last_rows) = (Batch::default(), Vec::new());
        for (i, tokens) in fed.iter().enumerate() {
            let blocks = (i as u32 * 10..i as u32 * 10 + 10).collect::<Vec<_>>();
            push(&mut batch, selection.clone(), tokens, starts[i], &blocks);
            last_rows.push(batch.tokens.len() as u32 - 1);
        }
        batch.outputs = last_rows;
        let logits = executor.forward(&batch).unwrap();
        for i in 0..fed.len() {
            let row = logits.row(i);
            let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
            starts[i] += fed[i].len();
            generated[i].push(best);
            fed[i] = vec![best];
        }
    }
    for (tokens, expected) in generated.iter().zip(&golden.greedy) {
        assert_eq!(tokens, &expected.continuation, "after {:?}", expected.text);
    }
}
