//! Test files: LLM-Adapters' items, or a user's own questions.
//!
//! An item of one's own is `{"question": text, "choices": [text, ...], "answer": right}`, where `right` is the number of the
//! right choice, from 0, or its text. It becomes an LLM-Adapters item, so that it can be asked in every form.

use super::example::{parse, read_items};
use super::{Choice, DataError, Example};
use serde_json::{Map, Value};
use std::path::Path;

/// One item of a test file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestItem {
    pub example: Example,
    /// `None` where it is no question with options.
    pub choice: Option<Choice>,
    /// The item as the file has it, without white space between its parts.
    pub source: String,
}

/// Reads a test file.
///
/// # Errors
/// A file that is no JSON array or empty; an item that lacks a field or whose answer is no option, by its index from 0.
pub fn read_tests(path: &Path) -> Result<Vec<TestItem>, DataError> {
    read_items(path, |item| {
        let own = item.as_object().filter(|o| o.contains_key("choices") || o.contains_key("question"));
        let (example, choice) = match own {
            Some(fields) => own_question(fields).map(|(example, choice)| (example, Some(choice)))?,
            None => {
                let example = parse(item)?;
                let choice = Choice::parse(&example)?;
                (example, choice)
            }
        };
        Ok(TestItem { example, choice, source: item.to_string() })
    })
}

fn own_question(fields: &Map<String, Value>) -> Result<(Example, Choice), String> {
    let field = |name: &str| fields.get(name).ok_or_else(|| format!("field `{name}` is missing"));
    let text = |name: &str, value: &Value| match value.as_str().map(str::trim) {
        Some(text) if !text.is_empty() => Ok(text.to_string()),
        Some(_) => Err(format!("field `{name}`: it is empty")),
        None => Err(format!("field `{name}`: expected a string, got {value}")),
    };
    let question = text("question", field("question")?)?;
    let choices = field("choices")?;
    let expected = || format!("field `choices`: expected an array of at least two texts, got {choices}");
    let array = choices.as_array().filter(|a| a.len() > 1).ok_or_else(expected)?;
    let options = array.iter().enumerate().map(|(i, option)| text(&format!("choices[{i}]"), option));
    let options = options.collect::<Result<Vec<_>, _>>()?;
    if let Some(twice) = options.iter().enumerate().find(|(i, option)| options[..*i].contains(option)) {
        return Err(format!("field `choices`: `{}` is there twice", twice.1));
    }
    let answer = field("answer")?;
    let correct = match answer {
        Value::String(text) => options.iter().position(|option| option == text.trim()),
        number => number.as_u64().map(|n| n as usize).filter(|&n| n < options.len()),
    };
    let last = options.len() - 1;
    let correct = correct.ok_or_else(|| {
        format!("field `answer`: expected one of the choices or a number from 0 to {last}, got {answer}")
    })?;
    let labels = (1..=options.len()).map(|n| format!("answer{n}")).collect::<Vec<_>>();
    let listed = options.iter().enumerate().map(|(i, option)| format!("Answer{}: {option}", i + 1));
    let listed = listed.collect::<Vec<_>>().join(" ");
    let example = Example {
        instruction: format!(
            "Please choose the correct answer to the question: {question}\n\n{listed}\n\nAnswer format: {}",
            labels.join("/")
        ),
        input: String::new(),
        output: format!("the correct answer is {}", labels[correct]),
        answer: labels[correct].clone(),
    };
    Ok((example, Choice { question, options, labels, correct }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(items: &Value) -> Result<Vec<TestItem>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own.json");
        std::fs::write(&path, items.to_string()).unwrap();
        read_tests(&path).map_err(|e| e.to_string())
    }

    #[test]
    fn a_question_of_ones_own_is_as_good_as_one_of_llm_adapters() {
        let own = json!([
            {"question": "Why? ", "choices": ["so", "Answer2: no"], "answer": 1},
            {"question": "Why?", "choices": ["3", "1"], "answer": "1", "source": "me"},
        ]);
        let items = read(&own).unwrap();
        assert_eq!(items[0].choice.as_ref().unwrap().correct, 1);
        assert_eq!(items[1].choice.as_ref().unwrap().correct, 1, "a text, not a number");
        assert_eq!(
            items[1].example.instruction,
            "Please choose the correct answer to the question: Why?\n\nAnswer1: 3 Answer2: 1\n\nAnswer format: answer1/answer2"
        );
        // Written out, it is read back as the same question.
        let Example { instruction, input, output, answer } = items[1].example.clone();
        let adapters =
            json!([{"instruction": instruction, "input": input, "output": output, "answer": answer}]);
        let again = read(&adapters).unwrap();
        assert_eq!((&again[0].example, &again[0].choice), (&items[1].example, &items[1].choice));
    }

    #[test]
    fn what_is_wrong_with_an_item_is_named_by_file_number_and_field() {
        let good = json!({"question": "q", "choices": ["a", "b"], "answer": 0});
        let adapters = |instruction: &str, answer: &str| json!({"instruction": instruction, "input": "", "output": "o", "answer": answer});
        let asked = "to the question: q\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2";
        for (item, named) in [
            (json!({"question": "q", "choices": ["a", "b"]}), "field `answer` is missing"),
            (json!({"choices": ["a", "b"], "answer": 0}), "field `question` is missing"),
            (json!({"question": "q", "answer": 0}), "field `choices` is missing"),
            (
                json!({"question": 7, "choices": ["a", "b"], "answer": 0}),
                "field `question`: expected a string, got 7",
            ),
            (json!({"question": " ", "choices": ["a", "b"], "answer": 0}), "field `question`: it is empty"),
            (json!({"question": "q", "choices": ["a"], "answer": 0}), "field `choices`: expected an array"),
            (json!({"question": "q", "choices": "ab", "answer": 0}), "field `choices`: expected an array"),
            (
                json!({"question": "q", "choices": ["a", 2], "answer": 0}),
                "field `choices[1]`: expected a string",
            ),
            (
                json!({"question": "q", "choices": ["a", "a"], "answer": 0}),
                "field `choices`: `a` is there twice",
            ),
            (
                json!({"question": "q", "choices": ["a", "b"], "answer": 2}),
                "field `answer`: expected one of the choices or a number from 0 to 1, got 2",
            ),
            (json!({"question": "q", "choices": ["a", "b"], "answer": -1}), "got -1"),
            (json!({"question": "q", "choices": ["a", "b"], "answer": "c"}), "got \"c\""),
            (json!({"question": "q", "choices": ["a", "b"], "answer": null}), "got null"),
            (adapters(asked, "answer3"), "field `answer`: `answer3` is none of answer1/answer2"),
            (adapters(asked, ""), "field `answer` is missing; expected one of answer1/answer2"),
            (
                adapters("to the question: q\n\nAnswer1: a\n\nAnswer format: answer1/answer2", "answer1"),
                "field `instruction`: expected options as `Answer1: ... Answer2: ...`",
            ),
            (
                adapters("q\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2", "answer1"),
                "field `instruction`: no `question:`",
            ),
            (adapters("q\n\nAnswer format: answer1/answer2", "answer1"), "field `instruction`: no options"),
            (json!({"instruction": "q"}), "field `output` is missing"),
            (json!(3), "expected an object"),
        ] {
            let message = read(&json!([good, item])).unwrap_err();
            assert!(message.contains("own.json: item 1: ") && message.contains(named), "{named}: {message}");
        }
        assert!(read(&json!([])).unwrap_err().contains("it is empty"));
        let plain = read(&json!([{"instruction": "Say a.", "output": "a"}])).unwrap();
        assert_eq!(plain[0].choice, None, "an example to measure a loss of");
    }
}
