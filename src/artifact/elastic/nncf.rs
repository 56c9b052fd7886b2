//! NNCF configurations: `bootstrapNAS` (LoNAS, Shears) or `SQFT` (its first version), training, elasticity, width.
//!
//! What has no part in which sub-networks there are (learning rates, epochs, the search's settings) is skipped by name; a
//! field that nobody knows is an error, since it might have one.

use super::{ElasticFile, Name, NamedGroup, sorted, typed};
use crate::artifact::ArtifactError;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use std::path::Path;

/// The rest of the root is about devices, logs and inputs.
#[derive(Deserialize)]
struct File {
    #[serde(rename = "bootstrapNAS")]
    bootstrap_nas: Option<Algorithm>,
    #[serde(rename = "SQFT")]
    sqft: Option<Algorithm>,
}

#[derive(Deserialize)]
struct Algorithm {
    training: Training,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Training {
    algorithm: Option<String>,
    #[serde(default)]
    schedule: Schedule,
    elasticity: Elasticity,
    // Not about the search space; nothing in NNCF reads the last one.
    #[serde(default, rename = "frozen_layers_allowed")]
    _frozen_layers_allowed: IgnoredAny,
    #[serde(default, rename = "progressivity_of_elasticity")]
    _progressivity: IgnoredAny,
    #[serde(default, rename = "batchnorm_adaptation")]
    _batchnorm_adaptation: IgnoredAny,
    #[serde(default, rename = "lr_schedule")]
    _lr_schedule: IgnoredAny,
    #[serde(default, rename = "sandwich_rule")]
    _sandwich_rule: IgnoredAny,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Schedule {
    list_stage_descriptions: Vec<Stage>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stage {
    train_dims: Option<Vec<String>>,
    width_indicator: Option<i64>,
    #[serde(default)]
    reorg_weights: bool,
    #[serde(default, rename = "epochs")]
    _epochs: IgnoredAny,
    #[serde(default, rename = "depth_indicator")]
    _depth_indicator: IgnoredAny,
    #[serde(default, rename = "bn_adapt")]
    _bn_adapt: IgnoredAny,
    #[serde(default, rename = "init_lr")]
    _init_lr: IgnoredAny,
    #[serde(default, rename = "epochs_lr")]
    _epochs_lr: IgnoredAny,
    #[serde(default, rename = "sample_rate")]
    _sample_rate: IgnoredAny,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Elasticity {
    available_elasticity_dims: Option<Vec<String>>,
    width: Width,
    // `available_elasticity_dims` decides whether they are used.
    #[serde(default, rename = "depth")]
    _depth: IgnoredAny,
    #[serde(default, rename = "kernel")]
    _kernel: IgnoredAny,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Width {
    overwrite_groups: Option<Vec<Vec<String>>>,
    overwrite_groups_widths: Option<Vec<Vec<usize>>>,
    #[serde(default)]
    add_dynamic_inputs: Vec<String>,
    // How NNCF would make up widths and order channels, were there no lists and were it asked to.
    #[serde(default, rename = "min_width")]
    _min_width: IgnoredAny,
    #[serde(default, rename = "max_num_widths")]
    _max_num_widths: IgnoredAny,
    #[serde(default, rename = "width_step")]
    _width_step: IgnoredAny,
    #[serde(default, rename = "width_multipliers")]
    _width_multipliers: IgnoredAny,
    #[serde(default, rename = "filter_importance")]
    _filter_importance: IgnoredAny,
}

pub(super) fn read(path: &Path, value: Value) -> Result<ElasticFile, ArtifactError> {
    let (root, training) = training(path, value)?;
    let Training { algorithm, schedule, elasticity, .. } = training;
    let training = format!("{root}.training");
    let wrong =
        |field: &str, reason: String| ArtifactError::field(path, &format!("{training}.{field}"), reason);
    if let Some(other) = algorithm.filter(|a| a != "progressive_shrinking" && a != "nls") {
        let reason = format!("expected \"progressive_shrinking\" or \"nls\", got {other:?}");
        return Err(wrong("algorithm", reason));
    }
    only_width(elasticity.available_elasticity_dims.as_deref())
        .map_err(|reason| wrong("elasticity.available_elasticity_dims", reason))?;
    let trained = trained_choices(&schedule)
        .map_err(|(field, reason)| wrong(&format!("schedule.list_stage_descriptions{field}"), reason))?;

    let Width { overwrite_groups, overwrite_groups_widths, add_dynamic_inputs, .. } = elasticity.width;
    let listed = || "missing; without it NNCF would make up groups from a trace of the model".to_string();
    let (of_names, of_widths) =
        ("elasticity.width.overwrite_groups", "elasticity.width.overwrite_groups_widths");
    let names = overwrite_groups.ok_or_else(|| wrong(of_names, listed()))?;
    let widths = overwrite_groups_widths.ok_or_else(|| wrong(of_widths, listed()))?;
    if names.len() != widths.len() {
        let reason = format!("expected {} lists, one for each group, got {}", names.len(), widths.len());
        return Err(wrong(of_widths, reason));
    }
    let named = |field: String, text| Name { field: format!("{training}.{field}"), text };
    let group = |(id, (members, widths)): (usize, (Vec<String>, Vec<usize>))| {
        let member = |(i, text)| named(format!("{of_names}[{id}][{i}]"), text);
        NamedGroup {
            members: members.into_iter().enumerate().map(member).collect(),
            field: format!("{training}.{of_widths}[{id}]"),
            choices: sorted(&widths),
        }
    };
    let mut groups = names.into_iter().zip(widths).enumerate().map(group).collect::<Vec<_>>();
    let notes = trained.and_then(|count| restrict(&mut groups, count)).into_iter().collect();
    let dynamic = add_dynamic_inputs.into_iter().enumerate();
    let dynamic = dynamic.map(|(i, text)| named(format!("elasticity.width.add_dynamic_inputs[{i}]"), text));
    Ok(ElasticFile { path: path.into(), groups, dynamic_inputs: dynamic.collect(), notes })
}

/// The root's name, and what stands below it about training.
fn training(path: &Path, value: Value) -> Result<(&'static str, Training), ArtifactError> {
    let File { bootstrap_nas, sqft } = typed(path, value)?;
    match (bootstrap_nas, sqft) {
        (Some(algorithm), None) => Ok(("bootstrapNAS", algorithm.training)),
        (None, Some(algorithm)) => Ok(("SQFT", algorithm.training)),
        (Some(_), Some(_)) => {
            let reason = "it stands beside `bootstrapNAS`; which one counts?";
            Err(ArtifactError::field(path, "SQFT", reason))
        }
        (None, None) => {
            let reason = "neither an NNCF configuration (an object with `bootstrapNAS` or `SQFT`) nor SQFT's \
                          elastic_adapter_config.json (a list of `target` and `search_space`)";
            Err(ArtifactError::wrong(path, reason))
        }
    }
}

/// Leaves the `count` largest choices of each group; what to say if that is less than there were.
fn restrict(groups: &mut [NamedGroup], count: usize) -> Option<String> {
    let longer = groups.iter_mut().filter(|group| group.choices.len() > count);
    let cut = longer.map(|group| group.choices.truncate(count)).count();
    (cut > 0).then(|| {
        format!(
            "width_indicator is {count}: of {cut} lists of choices only the {count} largest were trained, and only those \
             were imported (LoNAS's test scripts would take them all)."
        )
    })
}

fn only_width(dimensions: Option<&[String]>) -> Result<(), String> {
    let Some(dimensions) = dimensions else {
        // NNCF's default is every dimension, of which the others are depth and kernel sizes.
        return Err("missing; expected [\"width\"]".into());
    };
    if dimensions.iter().all(|d| d == "width") && !dimensions.is_empty() {
        return Ok(());
    }
    Err(format!("expected [\"width\"], got {dimensions:?}; elastic depth and kernels are not supported"))
}

/// How many of each list's largest choices were trained, where the file says so and means less than all.
///
/// LoNAS's scripts for test and search set `width_indicator` to -1, all choices, whatever the file says. Where the file says
/// that fewer were trained, whoever serves the rest would serve what no training has touched; where it says nothing (SQFT
/// fills the schedule in at run time; NNCF's default of 1 would leave nothing elastic), all are taken.
///
/// # Errors
/// The field after the list of stages, and what is wrong with it.
fn trained_choices(schedule: &Schedule) -> Result<Option<usize>, (String, String)> {
    let (mut most, mut all) = (0, schedule.list_stage_descriptions.is_empty());
    for (i, stage) in schedule.list_stage_descriptions.iter().enumerate() {
        if stage.reorg_weights {
            let reason = "the base's channels were reordered in training, and the order was not saved".into();
            return Err((format!("[{i}].reorg_weights"), reason));
        }
        if let Some(dimensions) = stage.train_dims.as_ref().filter(|d| !d.is_empty()) {
            only_width(Some(dimensions)).map_err(|reason| (format!("[{i}].train_dims"), reason))?;
        }
        match stage.width_indicator {
            None | Some(-1) => all = true,
            Some(count @ 1..) => most = most.max(usize::try_from(count).unwrap_or(usize::MAX)),
            Some(other) => {
                let reason = format!("expected a count, or -1 for all, got {other}");
                return Err((format!("[{i}].width_indicator"), reason));
            }
        }
    }
    Ok((!all).then_some(most))
}
