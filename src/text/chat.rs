//! Chat templates: the base's own Jinja template, rendered as transformers does.
//!
//! A template comes from the model's files only, never from a request; it runs with a bounded amount of work.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// Why a conversation did not become a prompt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    #[error("the model's chat template does not parse: {0}")]
    Template(String),
    /// The template itself refuses, e.g. an unknown role; its own words.
    #[error("the chat template refuses the conversation: {0}")]
    Refused(String),
    #[error("the chat template fails: {0}")]
    Render(String),
}

/// Instructions that one rendering may take: far more than any real conversation needs, far less than a second.
const FUEL: u64 = 5_000_000;

/// Prefix of an error that the template raised on purpose.
const RAISED: &str = "raised: ";

/// A parsed chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// `bos` and `eos` are the texts of those tokens, which templates write out.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| ChatError::Template(e.to_string()))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
        });
        let added = environment.add_template_owned("chat", source.to_string());
        added.map_err(|e| ChatError::Template(e.to_string()))?;
        Ok(Self { environment, bos: bos.into(), eos: eos.into() })
    }

    /// The prompt; with `add_generation_prompt` it ends where the assistant's answer begins.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        let template =
            self.environment.get_template("chat").map_err(|e| ChatError::Template(e.to_string()))?;
        let rendered = template.render(context! {
            messages => Serde(messages),
            add_generation_prompt => add_generation_prompt,
            bos_token => &self.bos,
            eos_token => &self.eos,
        });
        rendered.map_err(|e| match e.detail().and_then(|d| d.strip_prefix(RAISED)) {
            Some(message) => ChatError::Refused(message.into()),
            None => ChatError::Render(e.to_string()),
        })
    }
}
