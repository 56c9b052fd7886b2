//! SQFT's `elastic_adapter_config.json`: a list of `{"target": [paths of lora_A], "search_space": [ranks]}`.

use super::{ElasticFile, Name, NamedGroup, sorted, typed};
use crate::artifact::ArtifactError;
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Item {
    target: Vec<String>,
    search_space: Option<Vec<usize>>,
    /// In the file of one sub-adapter.
    active_rank_value: Option<usize>,
}

pub(super) fn read(path: &Path, value: Value) -> Result<ElasticFile, ArtifactError> {
    let (mut groups, mut unsorted) = (Vec::new(), None);
    for (id, item) in typed::<Vec<Item>>(path, value)?.into_iter().enumerate() {
        let Item { target, search_space, active_rank_value } = item;
        let field = format!("[{id}].search_space");
        let Some(choices) = search_space else {
            let reason = match active_rank_value {
                Some(_) => {
                    "missing; a list with `active_rank_value` chooses one sub-network, the search space is in \
                     elastic_adapter_config.json"
                }
                None => "missing",
            };
            return Err(ArtifactError::field(path, &field, reason));
        };
        let name = |(i, text)| Name { field: format!("[{id}].target[{i}]"), text };
        let members = target.into_iter().enumerate().map(name).collect();
        let falling = sorted(&choices);
        if falling != choices && unsorted.is_none() {
            unsorted = Some(format!(
                "search_space of group {id} is {choices:?}, which does not fall: SQFT's own `maximal`, `heuristic` and \
                 `minimal` go by that order, here they go by {falling:?}."
            ));
        }
        groups.push(NamedGroup { members, field, choices: falling });
    }
    Ok(ElasticFile {
        path: path.into(),
        groups,
        dynamic_inputs: Vec::new(),
        notes: unsorted.into_iter().collect(),
    })
}
