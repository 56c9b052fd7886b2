//! What a search found: the front, the best, and a table of both.

use super::cost::CostModel;
use super::scores::Scores;
use super::state::State;
use super::{Objective, SearchArgs, minimised, objectives};
use crate::cli::Failure;
use crate::cli::open::OpenedModel;
use crate::cli::tasks::Task;
use crate::search::{Genome, cheapest_below, front, hypervolume};

/// One sub-network with all that is known of it.
pub(super) struct Point {
    pub(super) genome: Genome,
    pub(super) cost: f64,
    pub(super) scores: Scores,
}

/// What a search found.
pub(super) struct Found {
    pub(super) objective: Objective,
    cost_title: &'static str,
    /// By rising cost.
    pub(super) front: Vec<Point>,
    pub(super) maximal: Point,
    pub(super) heuristic: Point,
    pub(super) minimal: Point,
    /// By LoNAS's rule; `None` where the objective is no accuracy.
    pub(super) best: Option<Point>,
    /// What `best` had to be above.
    floor: f64,
    /// What the front dominates, in parts of the box between `maximal` and `minimal`: less cost than the first, a better score
    /// than the second.
    pub(super) hypervolume: f64,
    items: String,
    cost_error: Option<String>,
}

impl Found {
    pub(super) fn new(
        args: &SearchArgs,
        model: &OpenedModel,
        tasks: &[Task],
        costs: &CostModel,
        state: &State,
    ) -> Result<Self, Failure> {
        let point = |genome: &Genome| {
            let scores = state.scores(genome).cloned().ok_or("a genome was not scored")?;
            Ok::<_, Failure>(Point { genome: genome.clone(), cost: costs.of(model, genome), scores })
        };
        let space = &model.space;
        let [maximal, heuristic, minimal] = [space.maximal(), space.heuristic(), space.minimal()];
        let evaluations = state.search.evaluations();
        let maximal = point(&Genome::of(space, &maximal))?;
        let floor = args.reference_accuracy.unwrap_or(maximal.scores.accuracy()) - args.accuracy_delta;
        let best = match args.objective {
            Objective::Loss => None,
            // If none qualifies it is the maximal one, as in NNCF.
            Objective::Accuracy => {
                Some(point(cheapest_below(evaluations, -floor).map_or(&maximal.genome, |e| &e.genome))?)
            }
        };
        let minimal = point(&Genome::of(space, &minimal))?;
        let pair = |p: &Point| [p.cost, minimised(args.objective, &p.scores)];
        let (worst, best_of_box) = ([maximal.cost, pair(&minimal)[1]], [minimal.cost, pair(&maximal)[1]]);
        let area = (worst[0] - best_of_box[0]) * (worst[1] - best_of_box[1]);
        let points = evaluations.iter().map(objectives).collect::<Vec<_>>();
        let items = tasks.iter().map(|t| format!("{} {}", t.items.len(), t.name));
        Ok(Self {
            objective: args.objective,
            cost_title: args.cost.title(),
            front: front(evaluations).into_iter().map(|e| point(&e.genome)).collect::<Result<_, _>>()?,
            heuristic: point(&Genome::of(space, &heuristic))?,
            minimal,
            maximal,
            best,
            hypervolume: hypervolume(&points, worst) / area,
            floor,
            items: items.collect::<Vec<_>>().join(", "),
            cost_error: costs.error(),
        })
    }

    /// The sub-networks that are known without a search, by name.
    pub(super) fn always(&self) -> [(&'static str, &Point); 3] {
        use crate::supernet::{HEURISTIC, MAXIMAL, MINIMAL};
        [(MAXIMAL, &self.maximal), (HEURISTIC, &self.heuristic), (MINIMAL, &self.minimal)]
    }

    /// Of the second objective, as people read it: more is better for accuracy only.
    pub(super) fn value(&self, point: &Point) -> f64 {
        match self.objective {
            Objective::Accuracy => point.scores.accuracy(),
            Objective::Loss => point.scores.loss(),
        }
    }

    pub(super) fn table(&self) -> String {
        let mut text = format!("items: {}; cost: {}\n", self.items, self.cost_title);
        text +=
            &format!("{:<10} {:>12} {:>10} {:>9} {:>9}\n", "front", "cost", "of maximal", "accuracy", "loss");
        let line = |name: String, point: &Point| {
            format!(
                "{name:<10} {:>12} {:>9.1}% {:>8.1}% {:>9.4}\n",
                significant(point.cost),
                100.0 * point.cost / self.maximal.cost,
                100.0 * point.scores.accuracy(),
                point.scores.loss()
            )
        };
        text += &self.front.iter().enumerate().map(|(i, p)| line(i.to_string(), p)).collect::<String>();
        text += &self.always().map(|(name, point)| line(name.into(), point)).concat();
        if let Some(best) = &self.best {
            text += &line("best".into(), best);
            text += &format!("best: the cheapest above {:.2}% accuracy", 100.0 * self.floor);
            text += if best.scores.accuracy() > self.floor { "\n" } else { "; none is, so it is maximal\n" };
        }
        // Where minimal scores as well as maximal there is no box.
        if self.hypervolume.is_finite() && self.hypervolume >= 0.0 {
            text += &format!(
                "hypervolume of the front, in boxes between maximal and minimal: {:.4}\n",
                self.hypervolume
            );
        }
        if let Some(error) = &self.cost_error {
            text += &format!("{error}\n");
        }
        text
    }
}

/// Six significant digits, and all before the point.
fn significant(value: f64) -> String {
    let before = value.abs().max(1.0).log10().floor() as usize + 1;
    format!("{value:.*}", 6usize.saturating_sub(before))
}
