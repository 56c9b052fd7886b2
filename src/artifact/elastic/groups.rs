//! From names to elastic groups: templates repeated by layer, kinds and followers by the model's shape.

use super::node::{module_path, tensor};
use super::{ElasticFile, Name, NamedGroup};
use crate::artifact::ArtifactError;
use crate::supernet::{Group, Kind, ModelShape, Part, TensorRef};
use std::collections::BTreeSet;

/// Shears' marks: of a group that stands for one in each layer, and of the layer's number in it.
const TEMPLATE: &str = "{re}";
const LAYER: &str = "{*}";

/// Names in a file are as long as somebody likes; messages are not.
const SHOWN: usize = 300;

pub(super) fn groups(
    file: &ElasticFile,
    shape: &ModelShape,
    rank: usize,
) -> Result<Vec<Group>, ArtifactError> {
    // Each tensor can be cut along its rows once; a file that says more is refused before its groups fill the memory.
    let most = 3 * shape.linears.len();
    let mut groups = Vec::new();
    for named in &file.groups {
        for layer in layers(file, shape, named)? {
            if groups.len() == most {
                let reason = format!("more groups than the {most} tensors that the model could have");
                return Err(ArtifactError::wrong(&file.path, reason));
            }
            groups.push(group(file, shape, rank, named, layer)?);
        }
    }
    check_dynamic_inputs(file, shape, &groups)?;
    Ok(groups)
}

fn error(file: &ElasticFile, name: &Name, reason: &str) -> ArtifactError {
    let shown = name.text.chars().take(SHOWN).collect::<String>();
    ArtifactError::field(&file.path, &name.field, format!("`{shown}` {reason}"))
}

/// For which layers a group stands: once for `None`, or for each layer that has its first member.
fn layers(
    file: &ElasticFile,
    shape: &ModelShape,
    named: &NamedGroup,
) -> Result<Vec<Option<usize>>, ArtifactError> {
    let Some(first) = named.members.first() else {
        let field = named.field.as_str();
        return Err(ArtifactError::field(&file.path, field, "its group has no members"));
    };
    let is_template = |name: &Name| name.text.starts_with(TEMPLATE);
    if let Some(odd) = named.members.iter().find(|name| is_template(name) != is_template(first)) {
        return Err(error(
            file,
            odd,
            "stands beside its group's first member: one is a template, the other not",
        ));
    }
    if !is_template(first) {
        return Ok(vec![None]);
    }
    if let Some(fixed) = named.members.iter().find(|name| !name.text.contains(LAYER)) {
        return Err(error(file, fixed, "is a template without `{*}`, so it is the same in every layer"));
    }
    let exists = |layer: &usize| find(shape, first, Some(*layer)).is_some();
    let layers = (0..shape.linears.len()).take_while(exists).map(Some).collect::<Vec<_>>();
    if layers.is_empty() {
        return Err(unknown(file, shape, first, Some(0)));
    }
    Ok(layers)
}

fn path_in(name: &Name, layer: Option<usize>) -> String {
    match layer {
        None => module_path(&name.text),
        Some(layer) => module_path(&name.text.replace(TEMPLATE, "").replace(LAYER, &layer.to_string())),
    }
}

fn find(shape: &ModelShape, name: &Name, layer: Option<usize>) -> Option<TensorRef> {
    tensor(shape, &path_in(name, layer))
}

/// Says what the model has in its place, since a missing adapter and a wrong base are told by that.
fn unknown(file: &ElasticFile, shape: &ModelShape, name: &Name, layer: Option<usize>) -> ArtifactError {
    let path = path_in(name, layer);
    let path = path.chars().take(SHOWN).collect::<String>();
    let is_lora = path.contains(".lora_");
    let module = path.split(".lora_").next().and_then(|m| m.strip_prefix("base_model.model."));
    let known = module.is_some_and(|m| shape.find(m).is_some());
    let reason = match (is_lora, known) {
        (true, true) => format!("is module `{path}`, and the adapter has none there"),
        _ => {
            let some = shape.linears.first().map_or("nothing", |l| l.name.as_str());
            format!(
                "is module `{path}`, which the model does not have; it has, e.g., `base_model.model.{some}`"
            )
        }
    };
    error(file, name, &reason)
}

fn group(
    file: &ElasticFile,
    shape: &ModelShape,
    rank: usize,
    named: &NamedGroup,
    layer: Option<usize>,
) -> Result<Group, ArtifactError> {
    let member = |name: &Name| find(shape, name, layer).ok_or_else(|| unknown(file, shape, name, layer));
    let members = named.members.iter().map(member).collect::<Result<Vec<_>, _>>()?;
    let is_rank = |t: &TensorRef| t.part == Part::LoraA;
    if let Some(i) = members.iter().position(|t| is_rank(t) != is_rank(&members[0])) {
        let reason = "stands beside its group's first member: one is a rank, the other a width";
        return Err(error(file, &named.members[i], reason));
    }
    if is_rank(&members[0]) {
        let followers = members.iter().map(|t| TensorRef { part: Part::LoraB, ..*t }).collect();
        let choices = left_to(&named.choices, rank, shape.tensor_size(members[0]).0);
        return Ok(Group { kind: Kind::Rank, members, followers, choices });
    }
    let channels = shape.channels.iter().find(|c| c.writers.contains(&members[0].linear));
    let Some(channels) = channels else {
        return Err(error(file, &named.members[0], "has no elastic width in this model"));
    };
    let columns = |&linear: &usize| {
        let has_adapter = shape.linears[linear].rank.is_some();
        let parts = [Some(Part::Weight), has_adapter.then_some(Part::LoraA)];
        parts.into_iter().flatten().map(move |part| TensorRef { linear, part })
    };
    let followers = channels.readers.iter().flat_map(columns).collect();
    Ok(Group { kind: channels.kind, members, followers, choices: named.choices.clone() })
}

/// The choices that are left to an adapter of which somebody has kept `stored` ranks of those it was trained with: Shears and
/// SQFT publish such sub-adapters. What does not fit is left for the search space to refuse.
fn left_to(choices: &[usize], trained: usize, stored: usize) -> Vec<usize> {
    let cut = stored < trained && choices.first() == Some(&trained);
    choices.iter().copied().filter(|&choice| !cut || choice <= stored).collect()
}

/// `add_dynamic_inputs` tells NNCF whose input follows a group where it cannot see it; each must be what we derived.
fn check_dynamic_inputs(
    file: &ElasticFile,
    shape: &ModelShape,
    groups: &[Group],
) -> Result<(), ArtifactError> {
    let followers = groups.iter().flat_map(|g| &g.followers).collect::<BTreeSet<_>>();
    for name in &file.dynamic_inputs {
        let tensor = find(shape, name, None).ok_or_else(|| unknown(file, shape, name, None))?;
        if !followers.contains(&tensor) {
            return Err(error(file, name, "follows no group of this file"));
        }
    }
    Ok(())
}
