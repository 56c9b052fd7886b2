//! All integration tests, in one binary. What belongs where:

/// The floors, who may name which crate, the length of files and functions.
mod architecture;
/// Bases in fewer bits: kernels against plain f32 on rounded weights, rounding against PyTorch.
mod dtypes;
/// GGUF files against gguf-py and transformers.
mod gguf;
/// Logits of tiny super-networks against PyTorch + PEFT, on every backend.
mod logits;
/// The default base: tokenizer, greedy text and losses against transformers.
mod smollm2;
/// Ten steps of training, gradients, kill and resume, against PyTorch + PEFT.
mod training;

/// Opening what lies under `tests/golden`.
mod golden;
