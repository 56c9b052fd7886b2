//! model/llama
