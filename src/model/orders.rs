//! In which order a super-network has a base's channels and heads. Sub-networks keep prefixes, so what matters most stands
//! first; the whole model computes the same in every order.

use super::{ChannelAxis, Layout};
use crate::artifact::BaseConfig;
use crate::supernet::{Group, Kind, SearchSpace};
use std::collections::BTreeMap;

/// Orders by layer; a layer without one keeps the base's own.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Orders {
    /// Channel `i` of the super-network's MLP is channel `order[i]` of the base's.
    pub channels: BTreeMap<usize, Vec<usize>>,
    /// Key-value head `i` of the super-network is head `order[i]` of the base's, with all queries that read it.
    pub heads: BTreeMap<usize, Vec<usize>>,
}

impl Orders {
    pub fn is_empty(&self) -> bool {
        self.channels.is_empty() && self.heads.is_empty()
    }

    /// From orders by group, as a model folder has them: a group's belongs to the layer of its members.
    pub fn of_groups(layout: &Layout, space: &SearchSpace, by_group: &BTreeMap<usize, Vec<usize>>) -> Self {
        let mut orders = Self::default();
        for (&id, order) in by_group {
            let Some(group) = space.groups().get(id) else { continue };
            let Some(member) = group.members.first() else { continue };
            let (layer, _) = layout.place(member.linear);
            match group.kind {
                Kind::Width => orders.channels.insert(layer, order.clone()),
                Kind::Heads => orders.heads.insert(layer, order.clone()),
                Kind::Rank => None,
            };
        }
        orders
    }

    /// The other way round.
    pub fn by_group(&self, layout: &Layout, space: &SearchSpace) -> BTreeMap<usize, Vec<usize>> {
        let order = |(id, group): (usize, &Group)| {
            let (layer, _) = layout.place(group.members.first()?.linear);
            let orders = match group.kind {
                Kind::Width => &self.channels,
                Kind::Heads => &self.heads,
                Kind::Rank => return None,
            };
            Some((id, orders.get(&layer)?.clone()))
        };
        space.groups().iter().enumerate().filter_map(order).collect()
    }

    /// Rows and columns of the Linear at a place of a layer, where they are not the base's: row `i` is row `rows[i]` there.
    pub fn of_linear(
        &self,
        config: &BaseConfig,
        layer: usize,
        place: usize,
    ) -> (Option<Vec<usize>>, Option<Vec<usize>>) {
        let layout = Layout::of(config.family);
        if let Some(order) = self.channels.get(&layer) {
            match layout.channels(place) {
                ChannelAxis::Rows => return (Some(order.clone()), None),
                ChannelAxis::Columns => return (None, Some(order.clone())),
                ChannelAxis::None => {}
            }
        }
        let (Some(order), Some((writers, reader))) = (self.heads.get(&layer), layout.heads) else {
            return (None, None);
        };
        let queries = config.head_size * (config.query_heads / config.kv_heads.max(1));
        match writers.iter().position(|&writer| writer == place) {
            Some(0) => (Some(in_blocks(order, queries)), None),
            Some(_) => (Some(in_blocks(order, config.head_size)), None),
            None if place == reader => (None, Some(in_blocks(order, queries))),
            None => (None, None),
        }
    }

    /// What tells them from others in the digests of kept results.
    pub fn told(&self) -> String {
        match self.heads.is_empty() {
            true => format!("{:?}", self.channels),
            false => format!("{:?} {:?}", self.channels, self.heads),
        }
    }
}

/// The order of single rows of which so many stay together.
fn in_blocks(order: &[usize], size: usize) -> Vec<usize> {
    order.iter().flat_map(|&block| block * size..(block + 1) * size).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_value_head_brings_its_queries() {
        let config =
            BaseConfig { query_heads: 6, kv_heads: 3, head_size: 2, hidden: 5, ..BaseConfig::default() };
        let orders = Orders {
            heads: BTreeMap::from([(1, vec![2, 0, 1])]),
            channels: BTreeMap::from([(0, vec![1, 0])]),
        };
        let of = |layer, place| orders.of_linear(&config, layer, place);
        let queries = vec![8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7];
        assert_eq!(of(1, 0), (Some(queries.clone()), None));
        assert_eq!(of(1, 1), (Some(vec![4, 5, 0, 1, 2, 3]), None));
        assert_eq!(of(1, 2), of(1, 1));
        assert_eq!(of(1, 3), (None, Some(queries)));
        assert_eq!((of(1, 4), of(1, 6)), ((None, None), (None, None)));
        assert_eq!((of(0, 0), of(0, 3)), ((None, None), (None, None)));
        assert_eq!((of(0, 5), of(0, 6)), ((Some(vec![1, 0]), None), (None, Some(vec![1, 0]))));
    }
}
