//! How questions are put and what is made of the answers: `--method`, `--form`, `--protocol`.

use super::EvalArgs;
use crate::data::{Answering, PromptForm};
use crate::evaluate::Decoding;
use clap::ArgMatches;
use clap::parser::ValueSource;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Method {
    /// The share of questions whose right answer is the likeliest option. Fast.
    Likelihood,
    /// The share of questions whose right answer a generated text names.
    Generation,
    /// The loss of examples as they are trained on, nats per token.
    Loss,
    /// The share of texts or pairs whose right label a classifier gives most; of a classifier that says a number, its correlation
    /// with the right ones.
    Classification,
}

/// How questions become text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Form {
    /// `Question: ...` and `Answer: ` with the option's text.
    Short,
    /// LoNAS's instruction template; the answer names the option's label.
    Lonas,
}

/// Somebody's way to do it as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum ProtocolArg {
    /// As the authors' `run_commonsense.py`: their test template, four beams, 32 new tokens.
    Lonas,
    /// As their `run_math.py`: its test template, four beams, 256 new tokens; the answer is the last number, or AQuA's letter.
    LonasMath,
}

/// All of it, settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Protocol {
    pub(super) method: Method,
    pub(super) form: Answering,
    pub(super) beams: usize,
    pub(super) max_new_tokens: usize,
    /// Of a text that is classified.
    pub(super) max_text_tokens: usize,
}

/// Whether options that only a generation has go with one. Those of a settings file are for the generations among the
/// evaluations, so only what the command line says counts.
///
/// # Errors
/// The option that says nothing here.
pub(in crate::cli) fn check_usage(given: &ArgMatches) -> Result<(), String> {
    if given.get_one::<Method>("method") == Some(&Method::Generation) {
        return Ok(());
    }
    let is_given = |id: &&&str| given.value_source(id) == Some(ValueSource::CommandLine);
    match ["beams", "max_new_tokens"].iter().find(is_given) {
        Some(id) => Err(format!("--{}: goes with --method generation only", id.replace('_', "-"))),
        None => Ok(()),
    }
}

impl Protocol {
    /// A classifier is asked to classify, unless something else is said.
    pub(super) fn of(args: &EvalArgs, classifies: bool) -> Self {
        let max_text_tokens = usize::from(args.max_text_tokens);
        if let Some(protocol) = args.protocol {
            let (form, max_new_tokens) = match protocol {
                ProtocolArg::Lonas => (Answering::LonasTest, 32),
                ProtocolArg::LonasMath => (Answering::LonasMathTest, 256),
            };
            return Self { method: Method::Generation, form, beams: 4, max_new_tokens, max_text_tokens };
        }
        let form = match args.form {
            Form::Short => Answering::Short,
            Form::Lonas => Answering::Lonas,
        };
        let (beams, max_new_tokens) = (usize::from(args.beams), usize::from(args.max_new_tokens));
        let usual = if classifies { Method::Classification } else { Method::Likelihood };
        Self { method: args.method.unwrap_or(usual), form, beams, max_new_tokens, max_text_tokens }
    }

    pub(super) fn method_name(self) -> &'static str {
        match self.method {
            Method::Likelihood => "likelihood",
            Method::Generation => "generation",
            Method::Loss => "loss",
            Method::Classification => "classification",
        }
    }

    /// Of the form, with what else a generation depends on.
    pub(super) fn form_name(self) -> String {
        let form = match self.form {
            Answering::Short => "short",
            Answering::Lonas => "lonas",
            Answering::LonasTest => "lonas-test",
            Answering::LonasMathTest => "lonas-math-test",
        };
        match self.method {
            Method::Generation if self.beams > 1 => format!("{form}, {} beams", self.beams),
            Method::Classification => format!("{} tokens", self.max_text_tokens),
            _ => form.into(),
        }
    }

    /// The form of the texts whose loss is measured.
    pub(super) fn training_form(self) -> PromptForm {
        match self.form {
            Answering::Short => PromptForm::Short,
            Answering::Lonas | Answering::LonasTest | Answering::LonasMathTest => PromptForm::Lonas,
        }
    }

    /// Positions in one block of the pool: of one, where texts share what they begin with.
    pub(super) fn block_size(self) -> usize {
        match self.method {
            Method::Generation if self.beams == 1 => crate::cli::compute::BLOCK_SIZE,
            _ => 1,
        }
    }

    pub(super) fn decoding(self, stop: Vec<u32>) -> Decoding {
        Decoding { max_new_tokens: self.max_new_tokens, beams: self.beams, stop }
    }
}
