//! Results as a table, as JSON and as entries of the catalog.

use super::protocol::Protocol;
use super::task::Task;
use crate::evaluate::Summary;
use crate::supernet::Evaluation;
use serde_json::{Value, json};
use std::fmt::Write;

/// One task under one sub-network.
pub(super) struct Line {
    pub(super) task: String,
    pub(super) subnetwork: String,
    pub(super) summary: Summary,
    file: String,
    file_sha256: String,
    items_sha256: String,
}

impl Line {
    pub(super) fn new(task: &Task, subnetwork: &str, summary: Summary) -> Self {
        Self {
            task: task.name.clone(),
            subnetwork: subnetwork.into(),
            summary,
            file: task.path.display().to_string(),
            file_sha256: task.file_sha256.clone(),
            items_sha256: task.items_sha256(),
        }
    }

    pub(super) fn evaluation(&self, protocol: Protocol, numbers: &str) -> Evaluation {
        let Summary { metric, value, interval, count, details } = &self.summary;
        Evaluation {
            task: self.task.clone(),
            method: protocol.method_name().into(),
            form: protocol.form_name(),
            metric: (*metric).into(),
            value: rounded(*value),
            interval95: (rounded(interval.0), rounded(interval.1)),
            count: *count,
            details: details.iter().map(|(name, value)| ((*name).to_string(), rounded(*value))).collect(),
            file_sha256: self.file_sha256.clone(),
            items_sha256: self.items_sha256.clone(),
            numbers: numbers.into(),
        }
    }
}

/// To the four digits that a test set of some thousand items can tell.
pub(in crate::cli) fn rounded(number: f64) -> f64 {
    (number * 1e4).round() / 1e4
}

/// A column beside value, interval and items: its head, a detail's name, how a number is shown.
type Column = (&'static str, &'static str, fn(f64) -> String);

const PERCENT: fn(f64) -> String = |x| format!("{:.1}%", 100.0 * x);
const NATS: fn(f64) -> String = |x| format!("{x:.4}");
const COUNT: fn(f64) -> String = |x| format!("{x:.0}");

fn columns(summary: &Summary) -> &'static [Column] {
    const LIKELIHOOD: [Column; 2] =
        [("normalised", "normalised_accuracy", PERCENT), ("answer loss", "answer_loss", NATS)];
    const GENERATION: [Column; 1] = [("no answer", "unanswered", COUNT)];
    const LOSS: [Column; 3] = [
        ("perplexity", "perplexity", NATS),
        ("response loss", "response_loss", NATS),
        ("its perplexity", "response_perplexity", NATS),
    ];
    const CLASSES: [Column; 2] = [("Matthews", "matthews", PERCENT), ("F1", "f1", PERCENT)];
    const NUMBERS: [Column; 2] =
        [("Spearman", "spearman", PERCENT), ("squared error", "squared_error", NATS)];
    let has = |detail| summary.details.contains_key(detail);
    match summary.metric {
        "loss" => &LOSS,
        "pearson" => &NUMBERS,
        _ if has("unanswered") => &GENERATION,
        _ if has("matthews") => &CLASSES,
        _ => &LIKELIHOOD,
    }
}

/// For people. With several tasks the mean of each sub-network's values, every task counting the same (LoNAS's average).
pub(super) fn table(lines: &[Line]) -> String {
    let Some(first) = lines.first() else { return String::new() };
    let (metric, columns) = (first.summary.metric, columns(&first.summary));
    let show = if metric == "loss" { NATS } else { PERCENT };
    let width = |of: fn(&Line) -> usize, least: usize| lines.iter().map(of).max().unwrap_or(0).max(least);
    let (tasks, names) = (width(|l| l.task.len(), 8), width(|l| l.subnetwork.len(), 11));
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ =
        write!(text, "{:<tasks$}  {:<names$}  {metric:>9}  {:>17}", "task", "sub-network", "95 % interval");
    columns.iter().for_each(|(head, ..)| _ = write!(text, "  {head:>14}"));
    let _ = writeln!(text, "  {:>6}", "items");
    for Line { task, subnetwork, summary, .. } in lines {
        let (low, high) = summary.interval;
        let interval = format!("{}..{}", show(low), show(high));
        let value = show(summary.value);
        let _ = write!(text, "{task:<tasks$}  {subnetwork:<names$}  {value:>9}  {interval:>17}");
        for (_, detail, show) in columns {
            let value = summary.details.get(detail).map_or(String::new(), |value| show(*value));
            let _ = write!(text, "  {value:>14}");
        }
        let _ = writeln!(text, "  {:>6}", summary.count);
    }
    for (subnetwork, mean) in means(lines) {
        let _ = writeln!(text, "{:<tasks$}  {subnetwork:<names$}  {:>9}", "mean", show(mean));
    }
    text
}

/// Of several tasks, by sub-network.
fn means(lines: &[Line]) -> Vec<(String, f64)> {
    let mut sums: Vec<(String, f64, usize)> = Vec::new();
    for line in lines {
        match sums.iter_mut().find(|(name, ..)| *name == line.subnetwork) {
            Some((_, sum, count)) => (*sum, *count) = (*sum + line.summary.value, *count + 1),
            None => sums.push((line.subnetwork.clone(), line.summary.value, 1)),
        }
    }
    sums.into_iter().filter(|s| s.2 > 1).map(|(name, sum, count)| (name, sum / count as f64)).collect()
}

/// For programs; README says what the fields mean.
pub(super) fn json(lines: &[Line], protocol: Protocol, head: Value) -> Value {
    let line = |line: &Line| {
        let Line { task, subnetwork, summary, file, file_sha256, items_sha256 } = line;
        json!({
            "task": task, "subnetwork": subnetwork,
            "method": protocol.method_name(), "form": protocol.form_name(),
            "metric": summary.metric, "value": summary.value, "interval95": summary.interval,
            "count": summary.count, "details": summary.details,
            "file": file, "file_sha256": file_sha256, "items_sha256": items_sha256,
        })
    };
    let mut all = head;
    all["results"] = lines.iter().map(line).collect();
    all["means"] = means(lines).into_iter().map(|(name, mean)| (name, Value::from(mean))).collect();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(task: &str, subnetwork: &str, value: f64) -> Line {
        let details = [("normalised_accuracy", 0.25), ("answer_loss", 2.0)].into();
        let summary = Summary { metric: "accuracy", value, interval: (0.1, 1.0), count: 4, details };
        Line {
            task: task.into(),
            subnetwork: subnetwork.into(),
            summary,
            file: "f.json".into(),
            file_sha256: "ab".into(),
            items_sha256: "cd".into(),
        }
    }

    #[test]
    fn a_table_has_a_line_for_each_result_and_the_mean_over_tasks() {
        let lines =
            [line("arc", "maximal", 0.5), line("arc", "small", 0.25), line("a-long-name", "maximal", 1.0)];
        let text = table(&lines);
        let rows =
            text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>();
        assert_eq!(
            rows,
            [
                "task sub-network accuracy 95 % interval normalised answer loss items",
                "arc maximal 50.0% 10.0%..100.0% 25.0% 2.0000 4",
                "arc small 25.0% 10.0%..100.0% 25.0% 2.0000 4",
                "a-long-name maximal 100.0% 10.0%..100.0% 25.0% 2.0000 4",
                "mean maximal 75.0%",
            ]
        );
    }
}
