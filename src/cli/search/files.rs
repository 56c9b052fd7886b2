//! What a search leaves beside its state: the authors' CSV, our JSON lines, the front as JSON, a picture.

use super::report::{Found, Point};
use super::state::State;
use super::{Objective, SearchArgs, objectives};
use crate::artifact::write_whole;
use crate::cli::Failure;
use crate::cli::open::OpenedModel;
use crate::plot::{self, Series};
use crate::search::{Evaluation, Genome};
use serde_json::{Value, json};

/// Writes all of them into the search's folder.
pub(super) fn write(
    args: &SearchArgs,
    model: &OpenedModel,
    found: &Found,
    state: &State,
) -> Result<(), Failure> {
    let evaluations = state.search.evaluations();
    let rows = evaluations.iter().map(|e| row(args, model, e)).collect::<String>();
    let line = |(i, e): (usize, &Evaluation)| line(args, model, state, i, e);
    let lines = evaluations.iter().enumerate().map(line).collect::<Result<String, Failure>>()?;
    let picture = picture(args, model, found, evaluations);
    let files = [
        ("search_progression.csv", rows),
        ("evaluations.jsonl", lines),
        ("front.json", format!("{:#}\n", front(args, model, found))),
        ("search.svg", picture),
    ];
    for (name, text) in files {
        write_whole(&state.folder().join(name), text.as_bytes())?;
    }
    Ok(())
}

/// As NNCF's `search_progression_to_csv` writes it with Python's csv module: no head, lines end in CR LF; the choices as an
/// `OrderedDict` prints itself; the second objective as it is minimised, so accuracy is negative.
fn row(args: &SearchArgs, model: &OpenedModel, evaluation: &Evaluation) -> String {
    let choices = choices(model, &evaluation.genome);
    let widths = choices.iter().enumerate().map(|(group, choice)| format!("{group}: {choice}"));
    let widths = widths.collect::<Vec<_>>().join(", ");
    let objective = match args.objective {
        Objective::Accuracy => "top1_acc",
        Objective::Loss => "loss",
    };
    let (cost, [first, second]) = (args.cost.label(), objectives(evaluation));
    format!(
        "\"OrderedDict([(<ElasticityDim.WIDTH: 'width'>, {{{widths}}})])\",{cost},{first:?},{objective},{second:?}\r\n"
    )
}

fn line(
    args: &SearchArgs,
    model: &OpenedModel,
    state: &State,
    index: usize,
    evaluation: &Evaluation,
) -> Result<String, Failure> {
    let genome = &evaluation.genome;
    let scores = state.scores(genome).ok_or("a genome was not scored")?;
    let [cost, objective] = objectives(evaluation);
    let line = json!({
        "evaluation": index + 1,
        "generation": evaluation.generation,
        "genome": genome,
        "choices": choices(model, genome),
        "objectives": { args.cost.label(): cost, name(args): objective },
        "tasks": scores.tasks,
        "items": scores.items(),
        "seconds": scores.seconds,
    });
    Ok(format!("{line}\n"))
}

/// Of the minimised second objective.
fn name(args: &SearchArgs) -> &'static str {
    match args.objective {
        Objective::Accuracy => "negative_accuracy",
        Objective::Loss => "loss",
    }
}

fn front(args: &SearchArgs, model: &OpenedModel, found: &Found) -> Value {
    let point = |point: &Point| {
        json!({
            "choices": choices(model, &point.genome),
            args.cost.label(): point.cost,
            "of_maximal": point.cost / found.maximal.cost,
            "accuracy": point.scores.accuracy(),
            "loss": point.scores.loss(),
            "tasks": point.scores.tasks,
        })
    };
    json!({
        "front": found.front.iter().map(point).collect::<Value>(),
        "hypervolume": found.hypervolume,
        "best": found.best.as_ref().map(point),
        "always": found.always().into_iter().map(|(name, p)| (name.to_string(), point(p))).collect::<Value>(),
    })
}

/// Everything that was scored, early and late, and the front.
fn picture(args: &SearchArgs, model: &OpenedModel, found: &Found, evaluations: &[Evaluation]) -> String {
    let shown = |objective: f64| match args.objective {
        Objective::Accuracy => -100.0 * objective,
        Objective::Loss => objective,
    };
    let dots = |name: &str, of: &[Evaluation]| {
        let points = of.iter().map(objectives).map(|[cost, objective]| (cost, shown(objective)));
        Series::dots(name, points.collect())
    };
    let third = evaluations.len().div_ceil(3).max(1);
    let names = ["the first third", "the second", "the last"];
    let mut series =
        evaluations.chunks(third).zip(names).map(|(of, name)| dots(name, of)).collect::<Vec<_>>();
    let percent = |point: &Point| match args.objective {
        Objective::Accuracy => 100.0 * found.value(point),
        Objective::Loss => found.value(point),
    };
    series.push(Series::line("front", found.front.iter().map(|p| (p.cost, percent(p))).collect()));
    let always = found.always().map(|(name, p)| plot::Point {
        x: p.cost,
        y: percent(p),
        interval: None,
        label: name.into(),
    });
    series.push(Series::labelled("", always.into()));
    let y = match args.objective {
        Objective::Accuracy => "accuracy, %",
        Objective::Loss => "loss of the right answers, nats per token",
    };
    let title = format!("{}: {} sub-networks that were scored", model.folder.name, evaluations.len());
    plot::chart(&title, args.cost.title(), y, &series)
}

fn choices(model: &OpenedModel, genome: &Genome) -> Vec<usize> {
    genome.sub_network(&model.space).choices().to_vec()
}
