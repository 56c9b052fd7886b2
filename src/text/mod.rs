//! Text on its way to tokens and back: tokenizer, chat template, incremental decoding, stop strings.
//!
//! Knows no files of a model and no HTTP; whoever opens a base passes the parts.

mod chat;
mod gguf_vocabulary;
mod pair;
mod stop;
mod stream;
mod tokenizer;
mod tokenizer_json;
mod vocabulary;

pub use chat::{ChatError, ChatTemplate, Message};
pub use gguf_vocabulary::gguf_tokenizer;
pub use pair::{EncodedText, Truncation};
pub use stop::{Pushed, StopMatcher};
pub use stream::StreamDecoder;
pub use tokenizer::{TextError, Tokenizer};
pub use vocabulary::VocabularyParts;
