//! Answers that are numbers or letters, as the authors' `run_math.py` finds them in a text (`extract_answer_number`,
//! `extract_answer_letter`).
//!
//! A number is asked for as if there were two options, the right number and any other; so a text can be right, wrong, or name none.

use super::{Choice, Example};

/// AQuA's.
const LETTERS: [&str; 5] = ["A", "B", "C", "D", "E"];

/// How far a number may be off.
const TOLERANCE: f64 = 0.001;

const RIGHT: usize = 0;
const OTHER: usize = 1;

/// What an example's answer is looked for among: letters for a letter, else a number; `None` where it is neither.
pub(super) fn choice(example: &Example) -> Option<Choice> {
    let answer = example.answer.trim();
    let (labels, correct) = match LETTERS.iter().position(|letter| *letter == answer) {
        Some(correct) => (LETTERS.map(String::from).to_vec(), correct),
        None => (vec![number(answer)?.to_string(), "another number".into()], RIGHT),
    };
    Some(Choice { question: example.instruction.clone(), options: labels.clone(), labels, correct })
}

/// Which of them a text names: the first letter of the five, wherever it stands (the A of `Answer` counts); the last number, which is
/// right within a thousandth.
pub(super) fn chosen(choice: &Choice, text: &str) -> Option<usize> {
    if choice.labels.len() == LETTERS.len() {
        let place = text.find(|c: char| ('A'..='E').contains(&c))?;
        return LETTERS.iter().position(|letter| text[place..].starts_with(letter));
    }
    let right = choice.labels.first().and_then(|label| number(label))?;
    let said = last_number(text)?;
    Some(if (right - said).abs() <= TOLERANCE { RIGHT } else { OTHER })
}

fn number(text: &str) -> Option<f64> {
    text.replace(',', "").parse::<f64>().ok().filter(|number| number.is_finite())
}

/// The last match of `-?\d+\.?\d*`, commas left out.
fn last_number(text: &str) -> Option<f64> {
    let text = text.replace(',', "");
    let (mut rest, mut last) = (text.as_str(), None);
    while let Some(start) = rest.find(|c: char| c.is_ascii_digit()) {
        let from = if rest[..start].ends_with('-') { start - 1 } else { start };
        let digits = |text: &str| text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let mut end = start + digits(&rest[start..]);
        if rest[end..].starts_with('.') {
            end += 1 + digits(&rest[end + 1..]);
        }
        last = rest[from..end].parse().ok();
        rest = &rest[end..];
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(answer: &str) -> Option<Choice> {
        let (instruction, input, output) = ("How many?".into(), String::new(), String::new());
        choice(&Example { instruction, input, output, answer: answer.into() })
    }

    #[test]
    fn the_last_number_of_a_text_is_its_answer() {
        // What Python's re.findall and float make of the same texts.
        for (text, last) in [
            ("It takes 3 + 4 = 7 eggs.", Some(7.0)),
            ("$1,234.50", Some(1234.5)),
            ("from 10 to -2", Some(-2.0)),
            ("5-3", Some(-3.0)),
            ("about 3.", Some(3.0)),
            ("1.2.3", Some(3.0)),
            ("x = .5", Some(5.0)),
            ("--4e3", Some(3.0)),
            ("no number", None),
            ("", None),
        ] {
            assert_eq!(last_number(text), last, "{text:?}");
        }
    }

    #[test]
    fn a_number_is_right_within_a_thousandth_and_a_text_without_one_names_none() {
        let choice = of("18.0").unwrap();
        assert_eq!((choice.correct, choice.labels[0].as_str()), (0, "18"));
        for (text, named) in [
            ("18", Some(0)),
            ("so 17.9991 dollars", Some(0)),
            ("17.998", Some(1)),
            ("18 eggs in 2 boxes", Some(1)),
            ("eighteen", None),
        ] {
            assert_eq!(chosen(&choice, text), named, "{text:?}");
        }
        assert_eq!(chosen(&of("1,000").unwrap(), "1000.0005"), Some(0));
        for none in ["", "answer2", "nan", "inf", "F"] {
            assert_eq!(of(none), None, "{none:?}");
        }
    }

    #[test]
    fn the_first_capital_of_five_is_the_letter() {
        let choice = of("B").unwrap();
        assert_eq!((choice.correct, choice.labels.len()), (1, 5));
        for (text, named) in [
            ("B", Some(1)),
            ("(C) or B", Some(2)),
            ("Answer: B", Some(0)),
            ("b", None),
            ("größer: E", Some(4)),
        ] {
            assert_eq!(chosen(&choice, text), named, "{text:?}");
        }
    }
}
