//! Texts and pairs with what is right about them, as GLUE has them: JSON arrays, JSON lines, or tables with tabs and a head.
//!
//! Which columns hold the texts is GLUE's own naming, by which every task can be told from the others.

use super::DataError;
use serde_json::{Map, Value};
use std::path::Path;

/// A text or pair, and what is right.
#[derive(Debug, Clone, PartialEq)]
pub struct JudgedText {
    pub text: String,
    pub pair: Option<String>,
    /// As the file has it: see [`JudgedText::class`] and [`JudgedText::number`].
    label: Value,
    /// The item as the file has it, without white space between its parts.
    pub source: String,
}

/// Columns of the two texts of a pair, then those of single texts; the first that an item has count.
const PAIRS: [[&str; 2]; 6] = [
    ["sentence1", "sentence2"],
    ["premise", "hypothesis"],
    ["question1", "question2"],
    ["question", "sentence"],
    ["#1 String", "#2 String"],
    ["text", "text_pair"],
];
const SINGLES: [&str; 2] = ["sentence", "text"];
/// Columns of what is right: MNLI's, QQP's, MRPC's and STS-B's tables have names of their own.
const LABELS: [&str; 5] = ["label", "gold_label", "is_duplicate", "Quality", "score"];

impl JudgedText {
    /// The right class: a label's name or its number from 0.
    ///
    /// # Errors
    /// What is neither.
    pub fn class(&self, labels: &[String]) -> Result<usize, String> {
        let number = match &self.label {
            Value::String(text) => match labels.iter().position(|label| label == text) {
                Some(class) => return Ok(class),
                None => text.parse::<u64>().ok(),
            },
            other => other.as_u64(),
        };
        let class = number.and_then(|n| usize::try_from(n).ok()).filter(|&class| class < labels.len());
        class.ok_or_else(|| {
            let last = labels.len().saturating_sub(1);
            let names = labels.join(", ");
            format!("label {}: expected one of {names}, or its number from 0 to {last}", self.label)
        })
    }

    /// The right number, of a task that asks for one.
    ///
    /// # Errors
    /// What is no number.
    pub fn number(&self) -> Result<f64, String> {
        let number = match &self.label {
            Value::String(text) => text.parse::<f64>().ok(),
            other => other.as_f64(),
        };
        number.filter(|n| n.is_finite()).ok_or_else(|| format!("label {}: expected a number", self.label))
    }
}

/// Reads a file of judged texts; a name that ends in `.tsv` says that it is a table.
///
/// # Errors
/// A file that is empty or of another kind; an item without texts or label, by its index from 0.
pub fn read_judged(path: &Path) -> Result<Vec<JudgedText>, DataError> {
    let bytes = std::fs::read(path).map_err(|source| DataError::Io { path: path.into(), source })?;
    let wrong = |reason: String| DataError::NotExamples { path: path.into(), reason };
    let text = String::from_utf8(bytes).map_err(|e| wrong(e.to_string()))?;
    let is_table = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tsv"));
    let items = match text.trim_start().starts_with('[') {
        _ if is_table => table(&text),
        true => serde_json::from_str(&text).map_err(|e| (None, e.to_string())),
        false => lines(&text),
    };
    let items: Vec<Value> = items.map_err(|(index, reason)| match index {
        Some(index) => DataError::Item { path: path.into(), index, reason },
        None => wrong(reason),
    })?;
    if items.is_empty() {
        return Err(wrong("it is empty".into()));
    }
    let item = |(index, item): (usize, &Value)| {
        parse(item).map_err(|reason| DataError::Item { path: path.into(), index, reason })
    };
    items.iter().enumerate().map(item).collect()
}

/// Which item is wrong, if it is one, and why.
type Wrong = (Option<usize>, String);

/// One object a line.
fn lines(text: &str) -> Result<Vec<Value>, Wrong> {
    let lines = text.lines().filter(|line| !line.trim().is_empty()).enumerate();
    lines.map(|(i, line)| serde_json::from_str(line).map_err(|e| (Some(i), e.to_string()))).collect()
}

/// A head, then one item a line. GLUE's tables quote nothing: a quotation mark is one.
fn table(text: &str) -> Result<Vec<Value>, Wrong> {
    let mut rows = text.lines().filter(|line| !line.is_empty());
    let head = rows.next().unwrap_or_default().trim_start_matches('\u{feff}');
    let head = head.split('\t').map(str::trim).collect::<Vec<_>>();
    let row = |(index, line): (usize, &str)| {
        let cells = line.split('\t').collect::<Vec<_>>();
        if cells.len() < head.len() {
            let reason = format!("expected {} columns, got {}", head.len(), cells.len());
            return Err((Some(index), reason));
        }
        let named = head.iter().zip(&cells).map(|(name, cell)| ((*name).to_string(), Value::from(*cell)));
        Ok(Value::Object(named.collect()))
    };
    rows.enumerate().map(row).collect()
}

fn parse(item: &Value) -> Result<JudgedText, String> {
    let fields = item.as_object().ok_or("expected an object")?;
    let has = |name: &&str| fields.contains_key(*name);
    let pair = PAIRS.into_iter().find(|names| names.iter().all(has));
    let (text, pair) = match (pair, SINGLES.into_iter().find(|name| has(name))) {
        (Some([first, second]), _) => (text(fields, first)?, Some(text(fields, second)?)),
        (None, Some(single)) => (text(fields, single)?, None),
        (None, None) => {
            let known = PAIRS.map(|[a, b]| format!("{a} and {b}")).join(", ");
            return Err(format!("expected one of {known}, {}", SINGLES.join(", ")));
        }
    };
    let label = LABELS.into_iter().find_map(|name| fields.get(name)).filter(|label| !label.is_null());
    let label = label.cloned().ok_or_else(|| format!("expected one of {}", LABELS.join(", ")))?;
    Ok(JudgedText { text, pair, label, source: item.to_string() })
}

fn text(fields: &Map<String, Value>, name: &str) -> Result<String, String> {
    let value = fields.get(name).unwrap_or(&Value::Null);
    value.as_str().map(String::from).ok_or_else(|| format!("field `{name}`: expected a string, got {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &str) -> Result<Vec<JudgedText>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        read_judged(&path).map_err(|e| e.to_string())
    }

    fn labels(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| (*n).to_string()).collect()
    }

    #[test]
    fn each_of_glues_tasks_is_known_by_its_columns() {
        for (item, text, pair) in [
            (r#"{"sentence": "a", "label": 1, "idx": 0}"#, "a", None),
            (r#"{"sentence1": "a", "sentence2": "b", "label": 1}"#, "a", Some("b")),
            (r#"{"premise": "a", "hypothesis": "b", "label": 1}"#, "a", Some("b")),
            (r#"{"question1": "a", "question2": "b", "label": 1}"#, "a", Some("b")),
            (r#"{"question": "a", "sentence": "b", "label": 1}"#, "a", Some("b")),
            (r#"{"text": "a", "label": 1}"#, "a", None),
        ] {
            for file in [format!("[{item}]"), format!("{item}\n\n{item}\n")] {
                let items = read("dev.json", &file).unwrap();
                assert_eq!((items[0].text.as_str(), items[0].pair.as_deref()), (text, pair), "{file}");
                assert_eq!(items[0].class(&labels(&["no", "yes"])), Ok(1));
            }
        }
    }

    #[test]
    fn glues_own_tables_are_read_by_their_heads() {
        let rte = "index\tsentence1\tsentence2\tlabel\n0\tHe said \"no\t\"b\" c\tnot_entailment\n";
        let items = read("dev.tsv", rte).unwrap();
        assert_eq!(items[0].text, "He said \"no");
        assert_eq!(items[0].pair.as_deref(), Some("\"b\" c"));
        assert_eq!(items[0].class(&labels(&["entailment", "not_entailment"])), Ok(1));
        let mrpc = "\u{feff}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\ta\tb\r\n";
        let items = read("dev.tsv", mrpc).unwrap();
        assert_eq!((items[0].text.as_str(), items[0].pair.as_deref()), ("a", Some("b")));
        assert_eq!(items[0].class(&labels(&["0", "1"])), Ok(1));
        let stsb = "index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.750\n";
        assert_eq!(read("dev.tsv", stsb).unwrap()[0].number(), Ok(2.75));
    }

    #[test]
    fn what_is_wrong_with_a_judged_text_is_named() {
        for (name, text, named) in [
            ("a.json", "[]", "it is empty"),
            ("a.json", "", "it is empty"),
            ("a.json", "[3]", "item 0: expected an object"),
            (
                "a.json",
                r#"[{"sentence": "a", "label": 0}, {"label": 0}]"#,
                "item 1: expected one of sentence1 and sentence2",
            ),
            ("a.json", r#"[{"sentence": "a"}]"#, "item 0: expected one of label, gold_label"),
            ("a.json", r#"[{"sentence": 3, "label": 0}]"#, "field `sentence`: expected a string, got 3"),
            ("a.jsonl", "{\"sentence\": \"a\", \"label\": 0}\n{", "item 1: EOF"),
            ("a.tsv", "sentence\tlabel\na\n", "item 0: expected 2 columns, got 1"),
            ("a.tsv", "gj04\t1\t\tOur friends.\n", "it is empty"),
        ] {
            let error = read(name, text).unwrap_err();
            assert!(error.contains(named), "{error} does not say {named}");
        }
        let items = read("a.json", r#"[{"sentence": "a", "label": 2}, {"sentence": "a", "label": "maybe"}]"#);
        let items = items.unwrap();
        let error = items[0].class(&labels(&["no", "yes"])).unwrap_err();
        assert_eq!(error, "label 2: expected one of no, yes, or its number from 0 to 1");
        assert!(items[1].class(&labels(&["no", "yes"])).is_err());
        assert!(items[1].number().is_err());
    }
}
