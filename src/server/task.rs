//! What the models of a server do: continue texts or classify them. One process serves one base, so it is one of the two.

use super::wire::ApiError;
use crate::engine::{ClassifierEngine, Engine};
use crate::text::{ChatError, ChatTemplate};

/// What is done, by which engine.
pub enum Task {
    Generate(Box<Generation>),
    Classify(ClassifierEngine),
}

/// What continuing texts takes.
pub struct Generation {
    pub engine: Engine,
    /// Without one, `/v1/chat/completions` answers 400 and says why.
    pub chat_template: Result<ChatTemplate, ChatError>,
    /// Tokens that end a text, unless a request says `ignore_eos`.
    pub end_tokens: Vec<u32>,
}

impl Task {
    /// Whether the engine takes requests.
    pub(super) fn is_accepting(&self) -> bool {
        match self {
            Self::Generate(generation) => generation.engine.is_accepting(),
            Self::Classify(engine) => engine.is_accepting(),
        }
    }

    /// What a completion needs.
    pub(super) fn generation(&self) -> Result<&Generation, ApiError> {
        match self {
            Self::Generate(generation) => Ok(generation),
            Self::Classify(_) => Err(ApiError::wrong_task(
                "this model classifies texts and does not continue them; use /v1/classify",
            )),
        }
    }

    /// What a classification needs.
    pub(super) fn classifier(&self) -> Result<&ClassifierEngine, ApiError> {
        match self {
            Self::Classify(engine) => Ok(engine),
            Self::Generate(_) => Err(ApiError::wrong_task(
                "this model continues texts and does not classify them; use /v1/completions or /v1/chat/completions",
            )),
        }
    }
}
