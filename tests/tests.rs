//! All integration tests, in one binary. What belongs where:
#![allow(clippy::unwrap_used, reason = "here a panic is a failed test, in helpers too")]

/// Super-adapters as PEFT writes them, whole and damaged.
mod adapters;
/// The floors, who may name which crate, the length of files and functions.
mod architecture;
/// Chat templates against transformers.
mod chat_templates;
/// Training that is killed and goes on.
mod checkpoints;
/// BERT super-networks that classify, against PyTorch + PEFT.
mod classifiers;
/// The program as a process: serving, stopping, exit codes; other people's clients.
mod cli;
/// Super-networks on a GPU or its emulator: against PyTorch + PEFT, and the whole server.
#[cfg(feature = "cuda")]
mod cuda;
/// What a step must read and multiply, counted by hand.
mod demand;
/// Bases in fewer bits: kernels against plain f32 on rounded weights, rounding against PyTorch.
mod dtypes;
/// Scoring, losses, greedy texts and beam search against transformers 4.31; answers against the authors' expressions.
mod evaluation;
/// Sub-networks as plain models, read back by our own readers.
mod export;
/// Tokenizers in llama.cpp's words.
mod export_tokenizers;
/// GGUF files against gguf-py and transformers.
mod gguf;
/// GGUF files that are damaged or lie.
mod gguf_damaged;
/// GPTQ and AWQ folders against PyTorch, whole and damaged.
mod gptq;
/// Every adapter tensor's gradient against finite differences.
mod gradients;
/// Arbitrary and mutated files of every kind.
mod hostile;
/// Hugging Face folders, whole and damaged.
mod hugging_face;
/// Logits of tiny super-networks against PyTorch + PEFT, on every backend.
mod logits;
/// supernet.json and catalog.json, written, read back, damaged.
mod model_folder;
/// Super-networks as LoNAS, Shears and SQFT publish them.
mod published;
/// The search against pymoo, saved and restored.
mod search;
/// The HTTP server: every endpoint, every error, clients that go away.
mod server;
/// The default base: tokenizer, greedy text and losses against transformers.
mod smollm2;
/// Sparse bases, and adapters that are to keep their zeros.
mod sparse;
/// What lies beside a tokenizer.json, against transformers.
mod tokenizer_files;
/// tokenizer.json files against Hugging Face's own library.
mod tokenizers;
/// Ten steps of training, gradients, kill and resume, against PyTorch + PEFT.
mod training;

/// Vocabularies of GGUF files against Hugging Face's own library.
mod vocabularies;

/// The most memory that was asked for at once.
mod allocations;
/// Copies of golden folders that a test may damage.
mod files;
/// Opening what lies under `tests/golden`.
mod golden;
/// A tiny base with a tokenizer and two super-adapters, written into a temporary folder.
mod tiny;
