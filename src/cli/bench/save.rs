//! Into the model folders: latencies in the catalog, and pictures.

use super::Failure;
use super::case::{Mix, Test};
use super::facts::Facts;
use super::figures::Figure;
use crate::artifact::write_whole;
use crate::cli::open::{Opened, OpenedModel};
use crate::plot::{self, Point, Series};
use crate::supernet::{CatalogEntry, Latency};

/// Writes the catalog and the pictures of every model folder.
pub(super) fn save(opened: &mut Opened, facts: &Facts, figures: &[Figure]) -> Result<(), Failure> {
    for model in &mut opened.models {
        let of_model = |index: &usize| facts.names[*index].0 == model.folder.name;
        let learnt = |index: usize| {
            let latency = latency(index, figures)?;
            let learn = |entry: &mut CatalogEntry| _ = entry.latency.insert(facts.machine.clone(), latency);
            Some((facts.names[index].1.clone(), learn))
        };
        let indices = (0..facts.names.len()).filter(of_model).collect::<Vec<_>>();
        model.learn(indices.into_iter().filter_map(learnt))?;
        let folder = model.folder.path();
        let picture = accuracy_over_latency(model, &facts.machine);
        write_whole(&folder.join("accuracy-latency.svg"), picture.as_bytes())?;
        write_whole(&folder.join("throughput.svg"), throughput(model, facts, figures).as_bytes())?;
    }
    Ok(())
}

/// Of one stream at the first context.
fn latency(index: usize, figures: &[Figure]) -> Option<Latency> {
    let mut own = figures.iter().filter(|f| f.mix == Mix::One { index, adapter: true });
    let seconds = |figure: &Figure| (1e9 / figure.tokens_per_second.median).round() / 1e9;
    let prefill = own.clone().find(|f| matches!(f.test, Test::Prefill { .. }))?;
    let decode = own.find(|f| matches!(f.test, Test::Decode { streams: 1, .. }))?;
    Some(Latency { prefill_seconds_per_token: seconds(prefill), decode_seconds_per_token: seconds(decode) })
}

fn accuracy_over_latency(model: &OpenedModel, machine: &str) -> String {
    let entries = model.catalog.entries();
    let mut tasks = entries.iter().flat_map(|e| e.scores.keys().cloned()).collect::<Vec<_>>();
    tasks.sort();
    tasks.dedup();
    // The points of all tasks stand at the same latencies, so the names beside the highest ones name all of them.
    let best = |task: &String| {
        let scores = entries.iter().filter_map(|e| e.scores.get(task));
        scores.copied().fold(0.0, f64::max)
    };
    tasks.sort_by(|a, b| best(b).total_cmp(&best(a)));
    let series = tasks.iter().enumerate().map(|(rank, task)| {
        let point = |entry: &CatalogEntry| {
            let latency = entry.latency.get(machine)?.decode_seconds_per_token * 1e3;
            let accuracy = entry.scores.get(task)? * 100.0;
            let label = if rank == 0 { entry.name.clone() } else { String::new() };
            Some(Point { x: latency, y: accuracy, interval: None, label })
        };
        Series::labelled(task, entries.iter().filter_map(point).collect())
    });
    let title = format!("{}: accuracy over latency", model.folder.name);
    let x = format!("milliseconds for each generated token, one stream ({machine})");
    plot::chart(&title, &x, "accuracy, %", &series.collect::<Vec<_>>())
}

/// Tokens a second over streams, a line for each sub-network.
fn throughput(model: &OpenedModel, facts: &Facts, figures: &[Figure]) -> String {
    let context = figures.iter().find_map(|f| match f.test {
        Test::Decode { context, .. } => Some(context),
        Test::Prefill { .. } => None,
    });
    let of_model = |index: &usize| facts.names[*index].0 == model.folder.name;
    let line = |index: usize| {
        let point = |figure: &Figure| match figure.test {
            Test::Decode { context: at, streams, .. } if Some(at) == context => {
                Some((streams as f64, figure.tokens_per_second.median))
            }
            _ => None,
        };
        let own = figures.iter().filter(|f| f.mix == Mix::One { index, adapter: true });
        Series::line(&facts.names[index].1, own.filter_map(point).collect())
    };
    let series = (0..facts.names.len()).filter(of_model).map(line).collect::<Vec<_>>();
    let title = format!("{}: throughput over streams", model.folder.name);
    let x = format!(
        "streams that decode together, from {} tokens of context ({})",
        context.unwrap_or(0),
        facts.machine
    );
    plot::chart(&title, &x, "tokens/s, all streams", &series)
}
