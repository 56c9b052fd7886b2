//! How an example becomes text to learn, and a question with options to score.

use super::Example;

/// The form of a training text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptForm {
    /// LoNAS's instruction template byte for byte, the odd indentation included, since published super-adapters have
    /// learnt it.
    Lonas,
    /// `Question: ...`, then `Answer: ` and the text of the right option.
    Short,
}

/// A multiple-choice question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    pub question: String,
    pub options: Vec<String>,
    /// What the options are called, e.g. `answer1`.
    pub labels: Vec<String>,
    /// Index into `options`.
    pub correct: usize,
}

impl PromptForm {
    /// The prompt and the response that follows it; `None` where the example has no such form.
    pub fn text(self, example: &Example) -> Option<(String, String)> {
        match self {
            Self::Lonas => Some((lonas_prompt(example), example.output.clone())),
            Self::Short => {
                let choice = Choice::of(example)?;
                Some((choice.prompt(), choice.continuation(choice.correct)))
            }
        }
    }
}

fn lonas_prompt(example: &Example) -> String {
    let pad = " ".repeat(20);
    let Example { instruction, input, .. } = example;
    if input.is_empty() {
        return format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the \
             request.  \n\n{pad}### Instruction:\n{pad}{instruction}\n\n{pad}### Response:\n{pad}"
        );
    }
    format!(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
         response that appropriately completes the request. \n\n{pad}### Instruction:\n{pad}{instruction}\n\n\
         {pad}### Input:\n{pad}{input}\n\n{pad}### Response:\n{pad}"
    )
}

impl Choice {
    /// Takes an LLM-Adapters question apart; `None` where the example is no question with options.
    pub fn of(example: &Example) -> Option<Self> {
        Self::parse(example).ok().flatten()
    }

    /// Likewise; `None` where it does not even say so.
    ///
    /// # Errors
    /// The field that is wrong: a question whose options cannot be found, an answer that is none of them.
    pub fn parse(example: &Example) -> Result<Option<Self>, String> {
        let Some((body, format)) = example.instruction.rsplit_once("\n\nAnswer format:") else {
            return Ok(None);
        };
        let labels = format.trim().split('/').map(String::from).collect::<Vec<_>>();
        let wrong = |reason: &str| format!("field `instruction`: {reason}");
        let (question, options) = if labels == ["true", "false"] {
            (body, labels.clone())
        } else {
            let (question, options) =
                body.rsplit_once("\n\n").ok_or_else(|| wrong("no options before `Answer format:`"))?;
            let expected = || {
                let marks = labels.iter().map(|l| format!("{} ...", mark(l))).collect::<Vec<_>>().join(" ");
                wrong(&format!("expected options as `{marks}` before `Answer format:`"))
            };
            (question, options_of(options, &labels).ok_or_else(expected)?)
        };
        let question =
            asked(question).ok_or_else(|| wrong("no `question:` or `sentence:` before the options"))?;
        let said = labels.join("/");
        if example.answer.is_empty() {
            return Err(format!("field `answer` is missing; expected one of {said}"));
        }
        let correct = labels.iter().position(|l| *l == example.answer);
        let correct =
            correct.ok_or_else(|| format!("field `answer`: `{}` is none of {said}", example.answer))?;
        Ok(Some(Self { question: question.into(), options, labels, correct }))
    }

    /// What stands before every option.
    pub fn prompt(&self) -> String {
        format!("Question: {}\nAnswer:", self.question)
    }

    /// One option as it follows the prompt.
    pub fn continuation(&self, option: usize) -> String {
        format!(" {}", self.options[option])
    }
}

/// What comes after `... the question:` or, for what is to be completed, `... the given sentence:`.
fn asked(text: &str) -> Option<&str> {
    let after = |head: &str| text.find(head).map(|at| at + head.len());
    let first = ["question:", "sentence:"].into_iter().filter_map(after).min();
    first.map(|at| text[at..].trim())
}

/// `Answer1: a Answer2: b ...` to the texts, one for each label; a label is looked for after the one before it, so
/// that an option's text may contain what looks like another label's.
fn options_of(text: &str, labels: &[String]) -> Option<Vec<String>> {
    let mut rest = text.trim_start().strip_prefix(&mark(labels.first()?))?;
    let mut options = Vec::with_capacity(labels.len());
    for label in &labels[1..] {
        let (option, after) = rest.split_once(&format!(" {}", mark(label)))?;
        options.push(option.trim().to_string());
        rest = after;
    }
    options.push(rest.trim().to_string());
    Some(options)
}

/// How a label stands before its option: `answer1` as `Answer1:`.
fn mark(label: &str) -> String {
    let mut chars = label.chars();
    let first = chars.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(chars).chain([':']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(instruction: &str, answer: &str) -> Example {
        let output = format!("the correct answer is {answer}");
        Example { instruction: instruction.into(), input: String::new(), output, answer: answer.into() }
    }

    #[test]
    fn the_short_form_has_the_text_of_the_right_option() {
        let item = example(
            "Please choose the correct answer to the question: Why? Because:\n\nAnswer1: a b Answer2: see \
             Answer1: c Answer3: d.\n\nAnswer format: answer1/answer2/answer3",
            "answer2",
        );
        let (prompt, response) = PromptForm::Short.text(&item).unwrap();
        assert_eq!(prompt + &response, "Question: Why? Because:\nAnswer: see Answer1: c");
    }

    #[test]
    fn the_short_form_of_a_yes_or_no_question_is_true_or_false() {
        let item = example(
            "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
            "false",
        );
        let (prompt, response) = PromptForm::Short.text(&item).unwrap();
        assert_eq!(prompt + &response, "Question: is it?\nAnswer: false");
    }

    #[test]
    fn an_example_without_options_has_no_short_form() {
        for instruction in
            ["Say hello.", "Q\n\nAnswer1: a\n\nAnswer format: answer1/answer2", "\n\nAnswer format:"]
        {
            assert_eq!(PromptForm::Short.text(&example(instruction, "answer1")), None, "{instruction}");
        }
        assert_eq!(
            PromptForm::Short.text(&example("question: Q\n\nAnswer1: a\n\nAnswer format: answer1", "?")),
            None
        );
    }

    #[test]
    fn the_lonas_form_is_the_authors_template() {
        // As the authors' f-strings print it: two spaces after the sentence, 20 before each line.
        let (prompt, response) = PromptForm::Lonas.text(&example("Do.", "answer1")).unwrap();
        assert_eq!(
            prompt,
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n                    ### Instruction:\n                    Do.\n\n                    ### Response:\n                    "
        );
        assert_eq!(response, "the correct answer is answer1");
        let with_input = Example { input: "In.".into(), ..example("Do.", "answer1") };
        let (prompt, _) = PromptForm::Lonas.text(&with_input).unwrap();
        assert!(prompt.contains("completes the request. \n\n                    ### Instruction:"));
        assert!(prompt.contains("\n\n                    ### Input:\n                    In.\n\n"));
    }
}
