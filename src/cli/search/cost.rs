//! What a sub-network costs: counted, or by a model of measured latencies.

use super::SearchArgs;
use super::latency::LatencyModel;
use crate::cli::Failure;
use crate::cli::open::{Opened, OpenedModel};
use crate::search::Genome;
use serde::{Deserialize, Serialize};

/// What is counted or measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Cost {
    Macs,
    Parameters,
    Prefill,
    Decode,
}

impl Cost {
    /// With its unit, for people.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Macs => "MMACs of 256 tokens",
            Self::Parameters => "million weights",
            Self::Prefill => "ms for each prompt token",
            Self::Decode => "ms for each generated token",
        }
    }

    /// As the authors' file names it; those that they do not have in the same manner.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Macs => "MACs",
            Self::Parameters => "parameters",
            Self::Prefill => "prefill_ms",
            Self::Decode => "decode_ms",
        }
    }

    pub(super) fn is_measured(self) -> bool {
        matches!(self, Self::Prefill | Self::Decode)
    }
}

/// The cost of every sub-network of a space.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum CostModel {
    /// By LoNAS's rule, in millions.
    Counted(Cost),
    /// Milliseconds a token.
    Measured(LatencyModel),
}

impl CostModel {
    /// Measures what has to be measured.
    pub(super) fn new(args: &SearchArgs, opened: &Opened) -> Result<Self, Failure> {
        if !args.cost.is_measured() {
            return Ok(Self::Counted(args.cost));
        }
        Ok(Self::Measured(LatencyModel::measure(args, opened)?))
    }

    pub(super) fn of(&self, model: &OpenedModel, genome: &Genome) -> f64 {
        match self {
            Self::Measured(latency) => latency.milliseconds(genome),
            Self::Counted(cost) => {
                let active = model.space.resolve(&model.shape, &genome.sub_network(&model.space));
                let counted = crate::supernet::Cost::of(&model.shape, &active);
                let count = if *cost == Cost::Parameters { counted.parameters } else { counted.macs };
                count as f64 / 1e6
            }
        }
    }

    /// Of a measured one, how far it was from what was measured.
    pub(super) fn error(&self) -> Option<String> {
        match self {
            Self::Measured(latency) => Some(latency.describe()),
            Self::Counted(_) => None,
        }
    }
}
