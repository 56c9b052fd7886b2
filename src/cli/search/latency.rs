//! Latency of every sub-network from a few that are measured: a constant and a part for each group.
//!
//! Groups that are alike (one kind, the same choices, another layer) take the same time, so they share their parts; measuring
//! each by itself would need hundreds of sub-networks, since one group's part is far below the noise. Either each choice has a
//! time of its own or time grows evenly with the choice, whichever predicts what was left out better. A quarter of the
//! measured sub-networks is not learnt from, and says how far the model is off.

use super::SearchArgs;
use super::cost::Cost;
use super::scores::selection;
use crate::cli::Failure;
use crate::cli::bench::case::{Case, Driver, Mix, Test};
use crate::cli::bench::figures::Spread;
use crate::cli::compute::BLOCK_SIZE;
use crate::cli::open::{Opened, OpenedModel};
use crate::cli::progress::Progress;
use crate::search::{Genome, alike, spanning};
use serde::{Deserialize, Serialize};

/// Sub-networks that are measured; every fourth only checks.
const MEASURED: usize = 32;
/// Times that each is measured, in turn.
const ROUNDS: usize = 11;
/// Tokens of a measured prompt, or context and tokens generated after it.
const PROMPT: usize = 256;
const CONTEXT: usize = 128;
const STEPS: usize = 16;

/// Milliseconds of a token for every genome.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct LatencyModel {
    constant: f64,
    /// By group and choice.
    parts: Vec<Vec<f64>>,
    /// Of the sub-networks that it was not fitted to: the mean of |predicted - measured| / measured.
    error: f64,
    /// Of how many.
    checked: usize,
    /// The mean over sub-networks of |one round - median| / median: what measuring each once would be off by.
    noise: f64,
}

impl LatencyModel {
    /// Measures some sub-networks on this machine and fits their times.
    pub(super) fn measure(args: &SearchArgs, opened: &Opened) -> Result<Self, Failure> {
        let model = opened.models.first().ok_or("no model")?;
        let genomes = spanning(&model.space, MEASURED, 0);
        let rounds = steadied(rounds(args, opened, model, &genomes)?);
        let measured = rounds.iter().map(|of| median(of)).collect::<Vec<_>>();
        let off = |(rounds, median): (&Vec<f64>, &f64)| {
            rounds.iter().map(|s| (s - median).abs() / median).sum::<f64>() / rounds.len() as f64
        };
        let noise = rounds.iter().zip(&measured).map(off).sum::<f64>() / measured.len().max(1) as f64;
        let classes = alike(&model.space);
        let choices = model.space.groups().iter().map(|g| g.choices.as_slice()).collect::<Vec<_>>();
        let fitted = Self { noise, ..Self::fit(&classes, &choices, &genomes, &measured) };
        tracing::info!("{}", fitted.describe());
        Ok(fitted)
    }

    pub(super) fn milliseconds(&self, genome: &Genome) -> f64 {
        let of_group = |(parts, &gene): (&Vec<f64>, &usize)| parts.get(gene).copied().unwrap_or(0.0);
        self.constant + self.parts.iter().zip(genome.genes()).map(of_group).sum::<f64>()
    }

    /// For people.
    pub(super) fn describe(&self) -> String {
        format!(
            "latency model: {:.1} % off on average over {} measured sub-networks that it was not fitted to; one round is {:.1} % off its median",
            100.0 * self.error,
            self.checked,
            100.0 * self.noise
        )
    }

    /// Fits all but every fourth, which check.
    fn fit(classes: &[usize], choices: &[&[usize]], genomes: &[Genome], measured: &[f64]) -> Self {
        let all = genomes.iter().zip(measured).enumerate();
        let (check, fit): (Vec<_>, Vec<_>) = all.partition(|(i, _)| i % 4 == 3);
        let fit = fit.into_iter().map(|(_, (g, &m))| (g, m)).collect::<Vec<_>>();
        let forms = [Form::Even, Form::Table].map(|form| Features { form, classes, choices });
        let left_out = |features: &Features<'_>| {
            let errors = (0..fit.len()).map(|out| {
                let others =
                    fit.iter().enumerate().filter(|(i, _)| *i != out).map(|(_, &(g, m))| (features.of(g), m));
                let weights = least_squares(&others.collect::<Vec<_>>());
                (dot(&weights, &features.of(fit[out].0)) / fit[out].1 - 1.0).abs()
            });
            errors.sum::<f64>()
        };
        let [even, table] = &forms;
        let features = if left_out(table) < left_out(even) { table } else { even };
        let weights = least_squares(&fit.iter().map(|&(g, m)| (features.of(g), m)).collect::<Vec<_>>());
        let parts = (0..choices.len()).map(|group| {
            (0..choices[group].len()).map(|gene| dot(&weights, &features.of_gene(group, gene))).collect()
        });
        let constant = weights.first().copied().unwrap_or(0.0);
        let mut model =
            Self { constant, parts: parts.collect(), error: 0.0, checked: check.len(), noise: 0.0 };
        let off =
            check.iter().map(|(_, (genome, measured))| (model.milliseconds(genome) / **measured - 1.0).abs());
        model.error = off.sum::<f64>() / check.len().max(1) as f64;
        model
    }
}

/// Milliseconds a token, by genome and round; genomes take turns, so that a machine whose speed drifts favours none.
fn rounds(
    args: &SearchArgs,
    opened: &Opened,
    model: &OpenedModel,
    genomes: &[Genome],
) -> Result<Vec<Vec<f64>>, Failure> {
    let most = opened.base.config.max_positions;
    let test = match args.cost {
        Cost::Prefill => Test::Prefill { prompt: PROMPT.min(most) },
        _ => {
            let steps = STEPS.min(most / 2).max(1);
            Test::Decode { context: CONTEXT.min(most - steps), streams: 1, steps }
        }
    };
    let tokens = PROMPT.min(most);
    let mut executor = args.compute.executor(opened, tokens, BLOCK_SIZE)?;
    let draws = args.compute.gpu_name()?.is_some();
    let mut driver = Driver::new(&mut *executor, tokens, tokens).drawing(draws);
    let selections = (0..).zip(genomes).map(|(id, genome)| selection(model, genome, id)).collect::<Vec<_>>();
    let case = |(index, selection)| {
        driver.case(test, Mix::One { index, adapter: true }, std::slice::from_ref(selection))
    };
    let mut cases = selections.iter().enumerate().map(case).collect::<Vec<Case>>();
    if let (Test::Decode { context, .. }, Some(first)) = (test, selections.first()) {
        driver.fill(0, context, first)?;
    }
    for case in &cases {
        driver.warm_up(case)?;
    }
    let mut progress = Progress::new("latency", ROUNDS as u64, 0);
    for round in 0..ROUNDS {
        driver.round(&mut cases, round)?;
        progress.set(round as u64 + 1, "");
    }
    progress.finish();
    let each = 1e3 / test.tokens() as f64;
    Ok(cases.into_iter().map(|case| case.seconds.iter().map(|s| s * each).collect()).collect())
}

/// The same times as if every round had been as fast as the middle one: what slows a whole round is not the sub-networks.
fn steadied(mut times: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let count = times.len().max(1) as f64;
    let rounds = (0..ROUNDS).map(|round| times.iter().filter_map(|of| of.get(round)).sum::<f64>() / count);
    let rounds = rounds.collect::<Vec<_>>();
    let middle = median(&rounds);
    for of in &mut times {
        of.iter_mut().zip(&rounds).for_each(|(time, round)| *time *= middle / round);
    }
    times
}

fn median(values: &[f64]) -> f64 {
    Spread::of(values.iter().copied()).median
}

/// How a group's part depends on its choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// It is in proportion to what is cut.
    Even,
    /// Each choice has its own.
    Table,
}

/// What times are fitted to: a constant, and what alike groups have in common.
struct Features<'a> {
    form: Form,
    classes: &'a [usize],
    choices: &'a [&'a [usize]],
}

impl Features<'_> {
    fn of(&self, genome: &Genome) -> Vec<f64> {
        let mut sum = self.empty();
        for (group, &gene) in genome.genes().iter().enumerate() {
            sum.iter_mut().zip(self.of_gene(group, gene)).for_each(|(sum, part)| *sum += part);
        }
        if let Some(constant) = sum.first_mut() {
            *constant = 1.0;
        }
        sum
    }

    /// What one group adds.
    fn of_gene(&self, group: usize, gene: usize) -> Vec<f64> {
        let mut features = self.empty();
        let (class, choices) = (self.classes[group], self.choices[group]);
        match self.form {
            Form::Even => {
                let cut = choices[0] - choices.get(gene).copied().unwrap_or(choices[0]);
                features[1 + class] = cut as f64 / choices[0] as f64;
            }
            Form::Table if gene > 0 => features[self.first(class) + gene - 1] = 1.0,
            Form::Table => {}
        }
        features
    }

    fn empty(&self) -> Vec<f64> {
        vec![0.0; self.first(self.classes.iter().max().map_or(0, |&c| c + 1))]
    }

    /// Where a class's features begin: the constant comes first, and the first choice adds nothing.
    fn first(&self, class: usize) -> usize {
        let width = |class: usize| match self.form {
            Form::Even => 1,
            Form::Table => {
                let group = self.classes.iter().position(|&c| c == class);
                group.map_or(0, |g| self.choices[g].len() - 1)
            }
        };
        1 + (0..class).map(width).sum::<usize>()
    }
}

/// The weights whose products with the features come nearest to the values. A little is added to the diagonal, so that
/// features which say the same share what they have to say.
fn least_squares(rows: &[(Vec<f64>, f64)]) -> Vec<f64> {
    let count = rows.first().map_or(0, |(features, _)| features.len());
    let product = |i: usize, j: usize| rows.iter().map(|(f, _)| f[i] * f[j]).sum::<f64>();
    let mut matrix =
        (0..count).map(|i| (0..count).map(|j| product(i, j)).collect()).collect::<Vec<Vec<f64>>>();
    let mut right = (0..count).map(|i| rows.iter().map(|(f, v)| f[i] * v).sum::<f64>()).collect::<Vec<_>>();
    for (i, row) in matrix.iter_mut().enumerate() {
        row[i] = row[i] * (1.0 + 1e-9) + 1e-6;
    }
    // Elimination without pivots: the matrix is symmetric and positive.
    for i in 0..count {
        let row = matrix[i].clone();
        for j in i + 1..count {
            let factor = matrix[j][i] / row[i];
            matrix[j].iter_mut().zip(&row).for_each(|(a, b)| *a -= factor * b);
            right[j] -= factor * right[i];
        }
    }
    for i in (0..count).rev() {
        let known = dot(&matrix[i][i + 1..], &right[i + 1..]);
        right[i] = (right[i] - known) / matrix[i][i];
    }
    right
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_are_sums_of_parts_are_found_again() {
        let choices: Vec<&[usize]> = vec![&[4, 2], &[8, 6, 1], &[8, 6, 1], &[4, 2]];
        let classes = [0, 1, 1, 0];
        let genome = |i: usize| {
            let genes = [i % 2, i % 3, (i / 3) % 3, (i / 2) % 2];
            serde_json::from_value::<Genome>(serde_json::json!(genes)).unwrap()
        };
        let genomes = (0..24).map(genome).collect::<Vec<_>>();
        // The second choice of the wide groups saves more than its share, which no even part can say.
        let saved = [[0.0, 0.5, f64::NAN], [0.0, 2.0, 2.5]];
        let time = |g: &Genome| 20.0 - g.genes().iter().zip(classes).map(|(&x, c)| saved[c][x]).sum::<f64>();
        let measured = genomes.iter().map(time).collect::<Vec<_>>();
        let model = LatencyModel::fit(&classes, &choices, &genomes, &measured);
        assert_eq!(model.checked, 6);
        assert!(model.error < 1e-6, "{model:?}");
        for genome in &genomes {
            assert!((model.milliseconds(genome) - time(genome)).abs() < 1e-4, "{model:?}");
        }
    }
}
