//! Chat templates: the base's own Jinja template, rendered as transformers does.
//!
//! A template comes from the model's files only, never from a request; it runs with a bounded amount of work.

use jiff::civil::DateTime;
use jiff::fmt::strtime::{BrokenDownTime, Config};
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
    #[error("this model has no chat template")]
    Missing,
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
        environment.add_function("strftime_now", |format: String| -> Result<String, minijinja::Error> {
            let failed = |reason| minijinja::Error::new(ErrorKind::InvalidOperation, reason);
            written(jiff::ZonedDateTime::now().datetime(), &format).map_err(failed)
        });
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
        });
        let added = environment.add_template_owned("chat", without_generation(source));
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
            // transformers passes these two always; templates ask whether they are none, not whether they are there.
            tools => (),
            documents => (),
            bos_token => &self.bos,
            eos_token => &self.eos,
        });
        rendered.map_err(|e| match e.detail().and_then(|d| d.strip_prefix(RAISED)) {
            Some(message) => ChatError::Refused(message.into()),
            None => ChatError::Render(e.to_string()),
        })
    }
}

/// As Python's `datetime.strftime` writes it; a directive that is none stands for itself.
fn written(now: DateTime, format: &str) -> Result<String, String> {
    let config = Config::new().lenient(true);
    BrokenDownTime::from(now).to_string_with_config(&config, format).map_err(|e| e.to_string())
}

/// transformers' `{% generation %}` only marks what a training takes its loss over. `with` is a block that does nothing either,
/// and whose variables end with it as well.
fn without_generation(source: &str) -> String {
    let (mut text, mut rest) = (String::with_capacity(source.len()), source);
    while let Some((before, after)) = rest.split_once("{%") {
        text.push_str(before);
        text.push_str("{%");
        rest = after;
        let inner = after.trim_start_matches(['-', '+']).trim_start();
        for (tag, other) in [("generation", "with"), ("endgeneration", "endwith")] {
            let behind = inner.strip_prefix(tag).map(str::trim_start);
            if let Some(behind) = behind.filter(|b| b.trim_start_matches(['-', '+']).starts_with("%}")) {
                text.push_str(&after[..after.len() - inner.len()]);
                text.push_str(other);
                text.push(' ');
                rest = behind;
            }
        }
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Written {
        format: String,
        text: String,
    }

    #[test]
    fn dates_are_written_as_python_writes_them() {
        let golden = include_str!("../../tests/golden/chat.json");
        let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
        let dates: Vec<Written> = serde_json::from_value(golden["dates"].clone()).unwrap();
        assert!(dates.len() > 5);
        for Written { format, text } in dates {
            let moment = jiff::civil::date(2024, 7, 6).at(9, 5, 3, 0);
            assert_eq!(written(moment, &format).unwrap(), text, "{format}");
        }
    }

    #[test]
    fn a_date_is_that_of_the_day() {
        let template = ChatTemplate::new("{{ strftime_now('%Y-%m-%d') }}", "", "").unwrap();
        let text = template.render(&[], false).unwrap();
        let digits = text.split('-').map(|part| part.parse::<u16>().unwrap()).collect::<Vec<_>>();
        assert!(text.len() == 10 && digits[0] > 2024 && digits[1] <= 12 && digits[2] <= 31, "{text}");
    }
}
