//! All integration tests, in one binary. What belongs where:

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

/// The floors, who may name which crate, the length of files and functions.
mod architecture;
/// The program as a process: serving, stopping, exit codes; other people's clients.
mod cli;
/// Logits of tiny super-networks against PyTorch + PEFT, on every backend.
mod logits;
/// The HTTP server: every endpoint, every error, clients that go away.
mod server;
/// The default base: tokenizer, greedy text and losses against transformers.
mod smollm2;
/// Ten steps of training, gradients, kill and resume, against PyTorch + PEFT.
mod training;

/// Opening what lies under `tests/golden`.
mod golden;
/// A tiny base with a tokenizer and two super-adapters, written into a temporary folder.
mod tiny;
