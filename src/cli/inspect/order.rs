//! `lonas inspect --check-order`: whether the super-adapter's tensors look as if they were trained in the order of the choices.
//!
//! A training that samples sub-networks trains the rows below a group's smallest choice in every step, those above in fewer and
//! fewer. B begins as zeros, so what is in it is what training put there, and its mean size falls from block to block. Where
//! it does not, tensors may stand in another order than the one they were trained in, and every prefix would be a wrong one.

use crate::artifact::AdapterTensors;
use crate::cli::Failure;
use crate::cli::open::OpenedModel;
use crate::model::SuperAdapter;
use crate::supernet::{Group, Kind, ModelShape, Part, TensorRef};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;

/// A step counts where it is this many standard errors: one in 30 000 would be by chance.
const CLEAR: f64 = 4.0;

/// One kind of group, one of its tensors' axes, all layers together.
pub(super) struct Table {
    /// E.g. `width of gate_proj, up_proj`.
    name: String,
    /// Short names of the modules whose tensors were measured.
    modules: Vec<String>,
    part: Part,
    axis: &'static str,
    /// From the rows that every sub-network has to those that only the largest choice has.
    blocks: Vec<Block>,
}

#[derive(Default)]
struct Block {
    /// Where it lies, if that is the same in all layers.
    range: Option<(usize, usize)>,
    rows: usize,
    /// Of the mean sizes of rows, as they are.
    sum: f64,
    /// Of the same by the tensor's own mean size, so that layers of different size can be taken together.
    relative: f64,
    squares: f64,
}

impl Block {
    fn mean(&self) -> f64 {
        self.sum / self.rows as f64
    }

    /// Mean of the relative sizes, and the square of its standard error.
    fn relative(&self) -> (f64, f64) {
        let n = self.rows as f64;
        let mean = self.relative / n;
        (mean, (self.squares / n - mean * mean).max(0.0) / (n - 1.0).max(1.0))
    }
}

impl Table {
    /// By how many standard errors a block is smaller than the one before it; `None` before there are two rows of each.
    fn step(&self, block: usize) -> Option<f64> {
        let [before, this] = [self.blocks.get(block.checked_sub(1)?)?, &self.blocks[block]];
        let ((a, a_error), (b, b_error)) = (before.relative(), this.relative());
        let error = (a_error + b_error).sqrt();
        (before.rows > 1 && this.rows > 1 && error > 0.0).then(|| (a - b) / error)
    }

    /// Of the sub-networks that a uniform sampling takes, the share that has this block.
    fn share(&self, block: usize) -> f64 {
        (self.blocks.len() - block) as f64 / self.blocks.len() as f64
    }

    fn label(&self, block: usize) -> String {
        match self.blocks[block].range {
            Some((from, to)) => format!("{from}..{to}"),
            None => format!("block {} of {}", block + 1, self.blocks.len()),
        }
    }

    fn tensor(&self) -> &'static str {
        if self.part == Part::LoraB { "B" } else { "A" }
    }
}

/// Measures all groups of more than one choice.
///
/// # Errors
/// An adapter that cannot be read, or is not of this model.
pub(super) fn tables(model: &OpenedModel) -> Result<Vec<Table>, Failure> {
    let (config, orders) = (&model.folder.adapter_config, model.folder.orders());
    let (shape, tensors, head) = (model.shape.clone(), model.folder.adapter()?, model.folder.head()?);
    let (scale, sparse) = (config.scale() as f32, config.sparse);
    let adapter = SuperAdapter { shape, tensors, head, scale, sparse };
    adapter.check()?;
    let of_group =
        |(id, group): (usize, &Group)| measured(&model.shape, &adapter.tensors, group, orders.get(&id));
    Ok(pooled(model.space.groups().iter().enumerate().flat_map(of_group)))
}

/// Tables of the same name, part and number of blocks as one, in the order in which they come.
fn pooled(all: impl Iterator<Item = Table>) -> Vec<Table> {
    let (mut tables, mut places) = (Vec::<Table>::new(), BTreeMap::new());
    for table in all {
        let key = (table.name.clone(), table.part, table.axis, table.blocks.len());
        let place = *places.entry(key).or_insert(tables.len());
        let Some(into) = tables.get_mut(place) else {
            tables.push(table);
            continue;
        };
        into.modules.extend(table.modules);
        into.modules.sort_unstable();
        into.modules.dedup();
        for (into, block) in into.blocks.iter_mut().zip(table.blocks) {
            into.range = into.range.filter(|range| block.range == Some(*range));
            into.rows += block.rows;
            into.sum += block.sum;
            into.relative += block.relative;
            into.squares += block.squares;
        }
    }
    tables
}

/// The adapter's tensors that a group cuts, along the axis that it cuts.
fn measured(
    shape: &ModelShape,
    adapter: &AdapterTensors,
    group: &Group,
    order: Option<&Vec<usize>>,
) -> Vec<Table> {
    if group.choices.len() < 2 {
        return Vec::new();
    }
    let short =
        |t: &TensorRef| shape.linears[t.linear].name.rsplit('.').next().unwrap_or_default().to_string();
    let mut modules = group.members.iter().map(short).collect::<Vec<_>>();
    modules.dedup();
    let kind = match group.kind {
        Kind::Rank => "rank",
        Kind::Width => "width",
        Kind::Heads => "heads",
    };
    let name = format!("{kind} of {}", modules.join(", "));
    let cut = [(&group.members, "rows"), (&group.followers, "columns")];
    let cut = cut.into_iter().flat_map(|(tensors, axis)| tensors.iter().map(move |&tensor| (tensor, axis)));
    let table = |(tensor, axis): (TensorRef, &'static str)| {
        let (a, b) = adapter.get(&shape.linears[tensor.linear].name)?;
        let matrix = match tensor.part {
            Part::LoraA => a,
            Part::LoraB => b,
            Part::Weight => return None,
        };
        let sizes = sizes(&matrix.to_f32(), matrix.columns, axis == "rows");
        let sizes = match order {
            Some(order) => order.iter().map(|&channel| sizes[channel]).collect(),
            None => sizes,
        };
        // Grouped queries have fewer keys and values, which keep the same share.
        let share = |choice: usize| choice * sizes.len() / group.maximal();
        let ends = group.choices.iter().rev().map(|&choice| share(choice)).collect::<Vec<_>>();
        let (name, modules) = (name.clone(), vec![short(&tensor)]);
        Some(Table { name, modules, part: tensor.part, axis, blocks: blocks(&sizes, &ends) })
    };
    cut.filter_map(table).collect()
}

/// The mean absolute value of each row, or of each column.
fn sizes(values: &[f32], columns: usize, by_row: bool) -> Vec<f64> {
    let rows = values.chunks_exact(columns.max(1));
    if by_row {
        return rows
            .map(|row| row.iter().map(|v| f64::from(v.abs())).sum::<f64>() / columns as f64)
            .collect();
    }
    let count = rows.len().max(1) as f64;
    let mut sums = vec![0.0; columns];
    rows.for_each(|row| sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += f64::from(v.abs())));
    sums.into_iter().map(|sum| sum / count).collect()
}

/// Blocks that end at `ends`, rising, the last of which is the number of rows.
fn blocks(sizes: &[f64], ends: &[usize]) -> Vec<Block> {
    let mean = sizes.iter().sum::<f64>() / sizes.len().max(1) as f64;
    let starts = std::iter::once(&0).chain(ends);
    let block = |(&from, &to): (&usize, &usize)| {
        let rows = &sizes[from..to];
        let relative = rows.iter().map(|size| if mean > 0.0 { size / mean } else { 0.0 });
        Block {
            range: Some((from, to)),
            rows: rows.len(),
            sum: rows.iter().sum(),
            relative: relative.clone().sum(),
            squares: relative.map(|size| size * size).sum(),
        }
    };
    starts.zip(ends).map(block).collect()
}

pub(super) fn text(tables: &[Table]) -> String {
    let mut text = String::from(
        "\n  Mean absolute values of the super-adapter between neighbouring choices, all layers:\n",
    );
    for table in tables {
        // Writing to a string cannot fail.
        let (name, of) = (&table.name, table.modules.join(", "));
        let _ = writeln!(text, "\n    {name}: {} of {} of {of}", table.axis, table.tensor());
        let _ = writeln!(text, "      {:<16} {:>8} {:>12} {:>9}", "block", "sampled", "mean", "step");
        for (i, block) in table.blocks.iter().enumerate() {
            let step = match table.step(i) {
                Some(step) if step.abs() >= CLEAR => {
                    format!("{} {:.0} s", if step > 0.0 { "down" } else { "up" }, step.abs())
                }
                Some(_) => "unclear".into(),
                None => String::new(),
            };
            let share = format!("{:.0}%", 100.0 * table.share(i));
            let _ =
                writeln!(text, "      {:<16} {share:>8} {:>12.3e} {step:>9}", table.label(i), block.mean());
        }
    }
    let _ = writeln!(
        text,
        "\n    sampled: the share of steps that train a block if choices are drawn evenly; s: standard errors.\n\n  {}",
        verdict(tables)
    );
    text
}

/// What the tables say, by B alone: A begins as random numbers, among which a little training hardly shows.
fn verdict(tables: &[Table]) -> String {
    let of_b = tables.iter().filter(|table| table.part == Part::LoraB).collect::<Vec<_>>();
    if of_b.is_empty() {
        return "Verdict: no elastic group cuts a B, so the adapter says nothing about its order.".into();
    }
    if of_b.iter().all(|table| table.blocks.iter().all(|block| block.sum == 0.0)) {
        return "Verdict: B is all zeros: this adapter has not been trained.".into();
    }
    let steps = of_b.iter().flat_map(|table| (1..table.blocks.len()).map(move |i| (*table, i)));
    let clear = |(table, i): &(&Table, usize)| table.step(*i).is_some_and(|step| step >= CLEAR);
    let (down, other): (Vec<_>, Vec<_>) = steps.partition(clear);
    if other.is_empty() {
        return format!(
            "Verdict: B steps down at all {} boundaries, as it does if the tensors stand in the order in which they were \
             trained.\n  It cannot show whether the base's channels stand in that order too, nor an order changed within a \
             block; and channels\n  that were put in falling importance may step down by themselves.",
            down.len()
        );
    }
    let where_ = other.iter().map(|(table, i)| format!("{} at {}", table.name, table.label(*i)));
    let mut where_ = where_.collect::<Vec<_>>();
    where_.dedup();
    let more = if where_.len() > 4 { format!(" and {} more", where_.len() - 4) } else { String::new() };
    where_.truncate(4);
    format!(
        "Verdict: B steps down at {} of {} boundaries; not at: {}{more}.\n  Either these tensors do not stand in the order in \
         which they were trained, or with these choices, or the training was\n  too short to show, or all choices were \
         trained alike (as in a plain LoRA). The last two do no harm to a prefix's order.",
        down.len(),
        down.len() + other.len(),
        where_.join("; ")
    )
}

pub(super) fn json(tables: &[Table]) -> Value {
    let table = |table: &Table| {
        let block = |(i, block): (usize, &Block)| {
            json!({
                "range": block.range, "sampled": table.share(i), "mean": block.mean(), "step": table.step(i),
            })
        };
        let blocks = table.blocks.iter().enumerate().map(block).collect::<Vec<_>>();
        json!({ "groups": table.name, "modules": table.modules, "tensor": table.tensor(), "axis": table.axis, "blocks": blocks })
    };
    json!({ "tables": tables.iter().map(table).collect::<Vec<_>>(), "verdict": verdict(tables) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supernet::{Channels, LinearShape};
    use crate::weights::{HostData, HostMatrix};
    use rand::seq::SliceRandom;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    const CHOICES: [usize; 3] = [90, 60, 30];
    const LAYERS: usize = 3;

    fn model() -> (ModelShape, Vec<Group>) {
        let mut shape = ModelShape::language_model(Vec::new(), Vec::new());
        let mut groups = Vec::new();
        for layer in 0..LAYERS {
            let (up, down) = (2 * layer, 2 * layer + 1);
            for (name, out, inp) in [("up_proj", 90, 8), ("down_proj", 8, 90)] {
                shape.linears.push(LinearShape { name: format!("{layer}.{name}"), out, inp, rank: Some(4) });
            }
            shape.channels.push(Channels::width(vec![up], vec![down]));
            let tensor = |linear, part| TensorRef { linear, part };
            groups.push(Group {
                kind: Kind::Width,
                members: vec![tensor(up, Part::Weight), tensor(up, Part::LoraB)],
                followers: vec![tensor(down, Part::Weight), tensor(down, Part::LoraA)],
                choices: CHOICES.into(),
            });
        }
        (shape, groups)
    }

    /// Adapters whose channels are as large as `size` says, but for noise, and layers of very different size.
    fn adapter(shape: &ModelShape, size: impl Fn(usize) -> f32) -> AdapterTensors {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let mut matrix = |rows: usize, columns: usize, size: &dyn Fn(usize, usize) -> f32| {
            let value = |i: usize| random.random_range(-1.0..1.0f32) * size(i / columns, i % columns);
            let data = HostData::F32((0..rows * columns).map(value).collect());
            HostMatrix { name: String::new(), rows, columns, data }
        };
        let pair = |(i, linear): (usize, &LinearShape)| {
            let layer = 10f32.powi((i / 2) as i32);
            let (a, b) = if linear.name.ends_with("up_proj") {
                (matrix(4, 8, &|_, _| layer), matrix(90, 4, &|row, _| layer * size(row)))
            } else {
                (matrix(4, 90, &|_, column| layer * size(column)), matrix(8, 4, &|_, _| layer))
            };
            (linear.name.clone(), (a, b))
        };
        shape.linears.iter().enumerate().map(pair).collect()
    }

    fn tables_of(adapter: &AdapterTensors, order: Option<&Vec<usize>>) -> Vec<Table> {
        let (shape, groups) = model();
        pooled(groups.iter().flat_map(|group| measured(&shape, adapter, group, order)))
    }

    /// In three thirds, trained in all steps, two of three, one of three.
    fn thirds(channel: usize) -> f32 {
        [1.0, 0.8, 0.6][channel / 30]
    }

    #[test]
    fn blocks_that_were_trained_less_are_seen_in_the_order_of_training() {
        let (shape, _) = model();
        let adapter = adapter(&shape, thirds);
        let tables = tables_of(&adapter, None);
        assert_eq!(
            tables.iter().map(|t| (t.tensor(), t.axis)).collect::<Vec<_>>(),
            [("B", "rows"), ("A", "columns")]
        );
        let table = &tables[0];
        assert_eq!(
            table.blocks.iter().map(|b| (b.range, b.rows)).collect::<Vec<_>>(),
            [(Some((0, 30)), 90), (Some((30, 60)), 90), (Some((60, 90)), 90)]
        );
        let relative = |i: usize| table.blocks[i].relative().0 / table.blocks[0].relative().0;
        assert!((relative(1) - 0.8).abs() < 0.05 && (relative(2) - 0.6).abs() < 0.05);
        assert_eq!([table.share(0), table.share(2)], [1.0, 1.0 / 3.0]);
        let text = text(&tables);
        assert!(
            text.contains("width of up_proj: columns of A of down_proj") && text.contains("down "),
            "{text}"
        );
        assert!(text.contains("B steps down at all 2 boundaries"), "{text}");
    }

    #[test]
    fn an_order_that_is_not_that_of_the_training_is_seen_and_one_that_is_known_is_applied() {
        let (shape, _) = model();
        let mut order = (0..90).collect::<Vec<_>>();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(1));
        // Channel `order[i]` of the file is the super-network's channel i.
        let mut place = vec![0; 90];
        order.iter().enumerate().for_each(|(i, &channel)| place[channel] = i);
        let shuffled = adapter(&shape, |channel| thirds(place[channel]));
        let text = text(&tables_of(&shuffled, None));
        assert!(
            text.contains("B steps down at 0 of 2 boundaries; not at: width of up_proj at 30..60"),
            "{text}"
        );
        assert!(verdict(&tables_of(&shuffled, Some(&order))).contains("at all 2 boundaries"));
    }

    #[test]
    fn what_says_nothing_is_said_to_say_nothing() {
        let (shape, _) = model();
        let alike = verdict(&tables_of(&adapter(&shape, |_| 1.0), None));
        assert!(alike.contains("0 of 2") && alike.contains("trained alike"), "{alike}");
        assert!(verdict(&tables_of(&adapter(&shape, |_| 0.0), None)).contains("has not been trained"));
        assert!(verdict(&[]).contains("says nothing about its order"));
        let told = super::json(&tables_of(&adapter(&shape, thirds), None));
        assert_eq!(told["tables"][0]["blocks"][2]["range"], json!([60, 90]));
        assert!(told["tables"][0]["blocks"][0]["step"].is_null());
    }
}
