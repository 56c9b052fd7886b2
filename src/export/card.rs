//! The model card of an export: which sub-network of what, and how to load it.

use super::{Source, by_layer};
use crate::model::Layout;
use crate::supernet::{Kind, SearchSpace};
use std::collections::BTreeMap;
use std::fmt::Write;

/// What one line of every export's card has, by which a folder is known to be one.
pub(super) const WORDS: [&str; 2] = ["` of the LoNAS super-network `", "`, exported by lonas "];

/// The card in Markdown. `library` is the program that loads the export, `how` its lines of code.
pub(super) fn card(source: Source<'_>, library: &str, numbers: &str, how: &str, notes: &[String]) -> String {
    let (name, entry) = (&source.folder.name, &source.entry);
    let base = source.base.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    // As licences are called; a file may say anything, and this goes into the card's YAML.
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._+".contains(c);
    let licence = source.base.licence().filter(|licence| licence.chars().all(plain));
    let mut text = String::from("---\n");
    if let Some(licence) = &licence {
        text += &format!("license: {licence}\n");
    }
    let said = licence.unwrap_or_else(|| "not stated in its files".into());
    let digest = source.folder.base.sha256.as_ref().map_or(String::new(), |d| format!(", sha256 `{d}`"));
    // Writing to a string cannot fail.
    let _ = write!(
        text,
        "library_name: {library}\n---\n\n# {name}:{subnetwork}\n\nThe sub-network `{subnetwork}{of}{name}{by}{version}.\n\n| | |\n|---|---|\n| base | {base}{digest} |\n\
         | licence of the base | {said}; the super-network's own model card says what it was trained on |\n\
         | weights | {parameters} in Linears and adapters, as served |\n| MLP width | {widths} |\n\
         | query heads | {heads} |\n| ranks | {ranks} |\n| numbers | {numbers} |\n",
        subnetwork = entry.name,
        of = WORDS[0],
        by = WORDS[1],
        version = env!("CARGO_PKG_VERSION"),
        parameters = entry.cost.parameters,
        widths = by_layer(&widths(source)),
        heads = by_layer(&heads(source)),
        ranks = ranks(source.space, entry.sub_network.choices()),
    );
    for (task, score) in &entry.scores {
        let _ = writeln!(text, "| {task}, as served | {:.1}% |", 100.0 * score);
    }
    let _ = write!(text, "\n## Load it\n\n{how}\n");
    for note in notes {
        let _ = write!(text, "\n{note}\n");
    }
    let choices = entry.sub_network.choices();
    let _ = write!(
        text,
        "\n## Choices\n\nOne for each group of the super-network's search space:\n\n    {choices:?}\n"
    );
    text
}

fn widths(source: Source<'_>) -> Vec<usize> {
    let active = source.active();
    let writers = source.shape.channels.iter().filter_map(|c| c.writers.first());
    writers.map(|&linear| active.linears[linear].out).collect()
}

/// Of the base's layers, as widths are.
fn heads(source: Source<'_>) -> Vec<usize> {
    let (active, config) = (source.active(), &source.base.config);
    let layout = Layout::of(config.family);
    (0..config.layers).map(|layer| active.linears[layout.index(layer, 0)].out / config.head_size).collect()
}

/// `32, 24 and 16` would not say how often: each choice of a rank with its number of groups.
fn ranks(space: &SearchSpace, choices: &[usize]) -> String {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    for (group, &choice) in space.groups().iter().zip(choices) {
        if group.kind == Kind::Rank {
            *counts.entry(choice).or_default() += 1;
        }
    }
    if counts.is_empty() {
        return "all".into();
    }
    let of = |(rank, groups): (&usize, &usize)| format!("{rank} in {groups} groups");
    counts.iter().rev().map(of).collect::<Vec<_>>().join(", ")
}
