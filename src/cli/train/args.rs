//! The options of `lonas train`, and the recipe that they come to.

use crate::artifact::TensorType;
use crate::backend::reference::Compute;
use crate::cli::Failure;
use crate::cli::device::DeviceArg;
use crate::cli::open::BaseArg;
use crate::data::PromptForm;
use crate::train::{Recipe, Sampling};
use clap::Args;
use std::path::PathBuf;

/// Train a super-adapter, by LoNAS's recipe or by one beyond it.
///
/// Writes a model folder that `lonas serve` takes as it is. Run again with the same arguments after an interruption,
/// it goes on from the last checkpoint.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  lonas train --data train.json --space space.json --out models/mine --reorder"
)]
pub(in crate::cli) struct TrainArgs {
    #[command(flatten)]
    pub(super) base: BaseArg,

    /// Training examples: JSON arrays of {instruction, input, output, answer}.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub(super) data: Vec<PathBuf>,

    /// The search space: JSON with rank, alpha, targets and groups. See README, "Your own super-network".
    #[arg(long, value_name = "FILE")]
    pub(super) space: PathBuf,

    /// The model folder to write.
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,

    /// How an example becomes text.
    #[arg(long, value_enum, default_value_t = Form::Lonas)]
    pub(super) form: Form,

    /// Where the options below begin that are not given: `lonas` is the authors' recipe to the letter; `best` is
    /// `--reorder --sampling sandwich --distill --length-buckets --learning-rate 1e-3`.
    #[arg(long, value_enum, default_value_t = RecipeName::Lonas)]
    recipe: RecipeName,

    /// Put the MLP channels, and heads where they are elastic, in falling importance before training.
    #[arg(
        long,
        conflicts_with = "order",
        value_name = "true|false",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    reorder: Option<bool>,

    /// Reuse the order of channels and heads of another model folder, so that both can be served on one copy of the base.
    #[arg(long, value_name = "DIR")]
    pub(super) order: Option<PathBuf>,

    /// Use the first N training examples only (after shuffling).
    #[arg(long, value_name = "N")]
    pub(super) limit: Option<usize>,

    /// Longest sequence, in tokens.
    #[arg(long, default_value_t = 256)]
    pub(super) cutoff: usize,

    /// Examples held out for the validation loss.
    #[arg(long, default_value_t = 120, value_name = "N")]
    pub(super) validation: usize,

    /// Micro-batches between two validations; 0 validates at the end only.
    #[arg(long, default_value_t = 400, value_name = "N")]
    pub(super) validate_every: u64,

    /// Minutes between two checkpoints: what an interruption can cost at most.
    #[arg(long, default_value_t = 2.0, value_name = "MINUTES")]
    pub(super) checkpoint_every: f64,

    /// Which sub-networks are trained: `random` is another one for each micro-batch; with `sandwich` every batch of
    /// sequences is seen by the maximal network and then by a student, the minimal sub-network and a random one in turn
    /// (or by `--students`); `maximal` is plain LoRA.
    #[arg(long, value_enum)]
    sampling: Option<SamplingName>,

    /// Students of each batch with `--sampling sandwich`, beside the maximal network; of several the first is the minimal
    /// sub-network and the others are random [default: 1]
    #[arg(long, value_name = "N")]
    students: Option<usize>,

    /// Let the students of `--sampling sandwich` learn the maximal network's distributions in place of the text.
    #[arg(
        long,
        value_name = "true|false",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    distill: Option<bool>,

    /// Take the loss over responses only; prompts are context. The validation loss, too.
    #[arg(
        long,
        value_name = "true|false",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    response_only: Option<bool>,

    /// Make micro-batches of sequences of about equal lengths.
    #[arg(
        long,
        value_name = "true|false",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    length_buckets: Option<bool>,

    /// Times that each training example is seen [default: 6]
    #[arg(long)]
    epochs: Option<usize>,

    /// End with the optimizer step that reaches so many tokens, in as many epochs as that takes. What goes forward and
    /// back counts, prompts and a student's pass included, so that recipes can be compared at equal cost.
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    max_tokens: Option<u64>,

    /// Sequences in one micro-batch, which shares one sub-network [default: 4]
    #[arg(long)]
    micro_batch: Option<usize>,

    /// Micro-batches in one optimizer step; the maximal network and each student of a sandwich have one [default: 4, or the
    /// next number that whole batches of a sandwich come to]
    #[arg(long)]
    accumulation: Option<usize>,

    /// At the start; it falls along a cosine to zero [default: 3e-4]
    #[arg(long)]
    learning_rate: Option<f64>,

    /// AdamW's [default: 0]
    #[arg(long)]
    weight_decay: Option<f64>,

    /// Dropout of the adapters' input [default: 0.1]
    #[arg(long)]
    dropout: Option<f64>,

    /// Decides the split, the order, the sub-networks, the dropout and the fresh adapter.
    #[arg(long, default_value_t = 42)]
    pub(super) seed: u64,

    /// Threads; 0 takes all cores.
    #[arg(long, env = "LONAS_THREADS", default_value_t = 0)]
    pub(super) threads: usize,

    /// Remember only each layer's input for the backward pass and compute the rest again: about a third slower, in
    /// less than half the memory. The result is the same bit for bit.
    #[arg(long)]
    pub(super) gradient_checkpointing: bool,

    /// Where to train: `auto` (the first GPU if there is one that can be used, else the processor), `cpu`, `cuda` or
    /// `cuda:N`. On a GPU the base is rounded to bf16, so a training stays on the kind of device it began on.
    #[arg(long, env = "LONAS_DEVICE", default_value = "auto")]
    pub(super) device: DeviceArg,

    /// Number format of the written adapter.
    #[arg(long, value_enum, default_value_t = AdapterType::Bf16)]
    pub(super) adapter_type: AdapterType,

    /// Train anew where --out holds a finished super-network, and replace all of it.
    #[arg(long)]
    pub(super) overwrite: bool,
}

impl TrainArgs {
    /// The recipe that the options come to on this device.
    ///
    /// # Errors
    /// A field out of its range, by name.
    pub(super) fn recipe(&self, compute: &Compute) -> Result<Recipe, Failure> {
        let preset = match self.recipe {
            RecipeName::Lonas => Recipe::default(),
            RecipeName::Best => Recipe::best(),
        };
        let sampling = self.sampling.map_or(preset.sampling, Sampling::from);
        let students = self.students.unwrap_or(preset.students);
        let passes = Recipe { sampling, students, ..preset.clone() }.passes() as usize;
        let recipe = Recipe {
            epochs: self.epochs.unwrap_or(preset.epochs),
            micro_batch: self.micro_batch.unwrap_or(preset.micro_batch),
            accumulation: self
                .accumulation
                .unwrap_or(preset.accumulation.div_ceil(passes).saturating_mul(passes)),
            learning_rate: self.learning_rate.unwrap_or(preset.learning_rate),
            weight_decay: self.weight_decay.unwrap_or(preset.weight_decay),
            dropout: self.dropout.unwrap_or(preset.dropout),
            seed: self.seed,
            bf16_base: compute.rounds_weights(),
            // A GPU takes a micro-batch as one graph.
            threads: if compute.is_gpu() { 1 } else { rayon::current_num_threads() },
            sampling,
            students,
            // Another sampling than the preset's has no students.
            distill: self.distill.unwrap_or(preset.distill && sampling == preset.sampling),
            response_only: self.response_only.unwrap_or(preset.response_only),
            length_buckets: self.length_buckets.unwrap_or(preset.length_buckets),
            max_tokens: self.max_tokens,
            max_norm: preset.max_norm,
        };
        recipe.check()?;
        Ok(recipe)
    }

    /// Whether channels and heads are to be put in an order of this training's own.
    pub(super) fn reorders(&self) -> bool {
        let preset = self.order.is_none() && matches!(self.recipe, RecipeName::Best);
        self.reorder.unwrap_or(preset)
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum RecipeName {
    /// The authors' recipe, to the letter.
    Lonas,
    /// What did best where it was measured.
    Best,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum SamplingName {
    Random,
    Sandwich,
    Maximal,
}

impl From<SamplingName> for Sampling {
    fn from(name: SamplingName) -> Self {
        match name {
            SamplingName::Random => Self::Random,
            SamplingName::Sandwich => Self::Sandwich,
            SamplingName::Maximal => Self::Maximal,
        }
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(super) enum AdapterType {
    F32,
    Bf16,
}

impl From<AdapterType> for TensorType {
    fn from(adapter_type: AdapterType) -> Self {
        match adapter_type {
            AdapterType::F32 => Self::F32,
            AdapterType::Bf16 => Self::Bf16,
        }
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(super) enum Form {
    /// LoNAS's instruction template, byte for byte.
    Lonas,
    /// `Question: ...` and `Answer: ` with the right option's text; suits small models.
    Short,
}

impl Form {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Lonas => "LoNAS's instruction template",
            Self::Short => "`Question: ...` and `Answer: ` with the right option's text",
        }
    }
}

impl From<Form> for PromptForm {
    fn from(form: Form) -> Self {
        match form {
            Form::Lonas => Self::Lonas,
            Form::Short => Self::Short,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, Parser};

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        args: TrainArgs,
    }

    fn parsed(more: &[&str]) -> Result<TrainArgs, clap::Error> {
        let required = ["lonas", "--data", "d.json", "--space", "s.json", "--out", "mine"];
        Program::try_parse_from(required.iter().chain(more)).map(|program| program.args)
    }

    fn recipe(more: &[&str]) -> Recipe {
        Recipe { threads: 1, ..parsed(more).unwrap().recipe(&Compute::cpu()).unwrap() }
    }

    #[test]
    fn without_options_the_recipe_is_lonas() {
        assert_eq!(recipe(&[]), Recipe::default());
        assert_eq!(recipe(&["--recipe", "lonas"]), Recipe::default());
        assert!(!parsed(&[]).unwrap().reorders());
    }

    #[test]
    fn what_is_given_wins_over_the_preset() {
        assert_eq!(recipe(&["--recipe", "best"]), Recipe::best());
        assert!(parsed(&["--recipe", "best"]).unwrap().reorders());
        assert!(!parsed(&["--recipe", "best", "--reorder=false"]).unwrap().reorders());
        assert!(!parsed(&["--recipe", "best", "--order", "other"]).unwrap().reorders());
        let other =
            ["--recipe", "best", "--learning-rate", "1e-4", "--length-buckets=false", "--distill=false"];
        let expected =
            Recipe { learning_rate: 1e-4, length_buckets: false, distill: false, ..Recipe::best() };
        assert_eq!(recipe(&other), expected);
        let maximal = recipe(&["--recipe", "best", "--sampling", "maximal", "--max-tokens", "5000"]);
        let expected =
            Recipe { sampling: Sampling::Maximal, distill: false, max_tokens: Some(5000), ..Recipe::best() };
        assert_eq!(maximal, expected);
        let whole = recipe(&["--sampling", "sandwich", "--distill", "--response-only"]);
        let expected =
            Recipe { sampling: Sampling::Sandwich, distill: true, response_only: true, ..Recipe::default() };
        assert_eq!(whole, expected);
        // A step takes whole batches: six micro-batches, not four.
        let expected = Recipe { students: 2, accumulation: 6, ..Recipe::best() };
        assert_eq!(recipe(&["--recipe", "best", "--students", "2"]), expected);
    }

    #[test]
    fn the_help_of_best_is_what_best_is() {
        let program = Program::command();
        let recipe_argument = program.get_arguments().find(|a| a.get_id() == "recipe").unwrap();
        let help = recipe_argument.get_help().unwrap().to_string();
        let options = help.split_once("`best` is `").unwrap().1.split_once('`').unwrap().0;
        let options = options.split_whitespace().collect::<Vec<_>>();
        assert_eq!(recipe(&options), Recipe::best());
        assert!(parsed(&options).unwrap().reorders());
    }

    #[test]
    fn what_excludes_each_other_is_refused() {
        assert!(parsed(&["--epochs", "2", "--max-tokens", "9"]).is_err());
        assert!(parsed(&["--reorder", "--order", "other"]).is_err());
        for students in ["0", "65", "18446744073709551615"] {
            let refused = parsed(&["--recipe", "best", "--students", students]).unwrap();
            let refused = refused.recipe(&Compute::cpu()).unwrap_err();
            assert!(refused.to_string().contains("students"), "{refused}");
        }
        let refused = parsed(&["--distill"]).unwrap().recipe(&Compute::cpu()).unwrap_err();
        assert!(refused.to_string().contains("distill"), "{refused}");
    }
}
