//! How a question is put to a model, and which option its answer names.

use super::{Choice, PromptForm, TestItem, math};
use std::cmp::Reverse;

/// A form for asking: a training form, or LoNAS's test form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answering {
    /// As [`PromptForm::Short`]: the answer is an option's text.
    Short,
    /// As [`PromptForm::Lonas`]: the answer names an option's label.
    Lonas,
    /// As the authors' `run_commonsense.py` asks: 24 spaces where training has 20, one after the first sentence where training
    /// has two, and never an input. Byte for byte, since published figures were measured so.
    LonasTest,
    /// As their `run_math.py` asks: 28 spaces; the answer is a number or a letter.
    LonasMathTest,
}

/// The authors' test template, which they indent by so many spaces.
fn test_prompt(item: &TestItem, spaces: usize) -> String {
    let pad = " ".repeat(spaces);
    format!(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n\
         {pad}### Instruction:\n{pad}{}\n\n{pad}### Response:\n{pad}",
        item.example.instruction
    )
}

impl Answering {
    /// What stands before the answer; `None` where the item has none that is looked for.
    pub fn prompt(self, item: &TestItem) -> Option<String> {
        let choice = self.choice(item)?;
        Some(match self {
            Self::Short => choice.prompt(),
            Self::Lonas => PromptForm::Lonas.text(&item.example)?.0,
            Self::LonasTest => test_prompt(item, 24),
            Self::LonasMathTest => test_prompt(item, 28),
        })
    }

    /// What the answer is looked for among; `None` where the item has no such answer.
    pub fn choice(self, item: &TestItem) -> Option<Choice> {
        match self {
            Self::LonasMathTest => math::choice(&item.example),
            _ => item.choice.clone(),
        }
    }

    /// One option as it follows the prompt.
    pub fn continuation(self, choice: &Choice, option: usize) -> String {
        match self {
            Self::Short => choice.continuation(option),
            // As the files' `output` has it.
            Self::Lonas | Self::LonasTest | Self::LonasMathTest => {
                format!("the correct answer is {}", choice.labels[option])
            }
        }
    }

    /// The option that a generated text names, if there is one.
    pub fn chosen(self, choice: &Choice, text: &str) -> Option<usize> {
        match self {
            Self::Short => by_text(&choice.options, text),
            Self::Lonas | Self::LonasTest => by_label(&choice.labels, text),
            Self::LonasMathTest => {
                math::chosen(choice, text.split("### Response:").next().unwrap_or_default())
            }
        }
    }

    /// Whether only a text's first line is looked at, so that a generation may end there.
    pub fn is_one_line(self) -> bool {
        self == Self::Short
    }
}

/// The labels that the authors' scripts look for, by how a label begins (`extract_answer` in `run_commonsense.py`).
const LABELS: [(&str, &[&str]); 4] = [
    ("solution", &["solution1", "solution2"]),
    ("answer", &["answer1", "answer2", "answer3", "answer4", "answer5"]),
    ("ending", &["ending1", "ending2", "ending3", "ending4"]),
    ("option", &["option1", "option2"]),
];

/// The first label in the text. As the authors do it: case counts, and what is looked for are the labels of the data set, not of
/// the question, so that `answer5` is an answer (a wrong one) even where there are four.
fn by_label(labels: &[String], text: &str) -> Option<usize> {
    // A model that goes on may begin another response; what follows is not the answer.
    let text = text.split("### Response:").next().unwrap_or_default();
    let first = labels.first().map_or("", String::as_str);
    let known =
        LABELS.iter().filter(|(head, _)| first.starts_with(head)).flat_map(|(_, known)| *known).copied();
    let all = known.chain(labels.iter().map(String::as_str));
    // Of labels at one place the longest: `answer12` is not `answer1`.
    let found = all.filter_map(|label| Some((text.find(label)?, Reverse(label.len()), label)));
    let (.., label) = found.min()?;
    labels.iter().position(|l| l == label)
}

/// The option whose text is the text's first line; else the longest one that the line begins with, word by word.
fn by_text(options: &[String], text: &str) -> Option<usize> {
    let said = words(text.split('\n').next().unwrap_or_default());
    let options = options.iter().map(|option| words(option)).enumerate();
    let begun = options.filter(|(_, option)| !option.is_empty() && said.starts_with(option));
    // Of two that are alike the first.
    begun.max_by_key(|(i, option)| (option.len(), Reverse(*i))).map(|(i, _)| i)
}

/// Words to compare, as SQuAD's scorer makes them (Rajpurkar et al. 2016): in lower case, without articles and punctuation; but a
/// number keeps its point and its signs, which tell options apart.
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let edge = |c: char| !c.is_alphanumeric() && !"-+$%".contains(c);
    let words = lower.split_whitespace().map(|word| word.trim_matches(edge));
    let kept = words.filter(|w| w.contains(char::is_alphanumeric) && !["a", "an", "the"].contains(w));
    kept.map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(options: &[&str]) -> Vec<String> {
        options.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_text_names_the_option_that_it_is_or_begins_with() {
        let options = texts(&["a whale", "the whale shark.", "3.5 km", "-5", "5", "the"]);
        for (text, chosen) in [
            (" a whale", Some(0)),
            ("Whale.", Some(0)),
            (" The WHALE shark\n\nQuestion: 5", Some(1)),
            (" whale sharks", Some(0)),
            ("whalebone", None),
            (" 3.5  km.", Some(2)),
            (" 35 km", None),
            (" -5", Some(3)),
            (" 5, because", Some(4)),
            ("\n5", None),
            (" the", None),
            ("", None),
            (" it is a whale", None),
        ] {
            assert_eq!(by_text(&options, text), chosen, "{text:?}");
        }
        assert_eq!(by_text(&texts(&["Yes", "yes!"]), "yes"), Some(0), "of two that are alike the first");
    }

    #[test]
    fn labels_of_ones_own_are_looked_for_too() {
        let many = (1..=12).map(|n| format!("answer{n}")).collect::<Vec<_>>();
        assert_eq!(by_label(&many, "the correct answer is answer12"), Some(11));
        assert_eq!(by_label(&many, "answer7 or answer1"), Some(6));
        assert_eq!(
            by_label(&texts(&["yes", "no"]), "I know: yes"),
            Some(1),
            "as any regular expression finds it"
        );
        assert_eq!(by_label(&texts(&["true", "false"]), "True"), None);
        assert_eq!(by_label(&many, "I say\n### Response: answer1"), None);
    }
}
