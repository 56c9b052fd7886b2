//! Which value of the label `subnetwork` a sub-network's events are counted under.

use crate::server::served::ServedSubNetwork;
use crate::supernet::ActiveShape;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};

/// Different values of the label in the life of a server. A series stays when its sub-network goes, so that no count is
/// lost; this bounds how many can gather.
const MOST: usize = 2048;

/// Where there is no value of its own left.
const OTHER: &str = "other";

/// Values by the process-wide id of a sub-network.
pub(super) struct Labels {
    by_id: HashMap<u32, Label>,
    given: HashSet<Arc<str>>,
    other: Arc<str>,
}

struct Label {
    value: Arc<str>,
    /// Held by the server while the sub-network can be asked for, and by everything that still runs with it.
    shape: Weak<ActiveShape>,
}

impl Labels {
    pub(super) fn new() -> Self {
        Self { by_id: HashMap::new(), given: HashSet::new(), other: OTHER.into() }
    }

    pub(super) fn get(&self, id: u32) -> Option<&Arc<str>> {
        self.by_id.get(&id).map(|label| &label.value)
    }

    /// Gives a sub-network its value, and forgets ids that nobody can bring any more. Returns the value if it is the
    /// sub-network's own.
    pub(super) fn give(&mut self, sub_network: &ServedSubNetwork) -> Option<Arc<str>> {
        self.by_id.retain(|_, label| label.shape.strong_count() > 0);
        let own = &sub_network.label;
        let may = self.given.contains(own) || self.given.len() < MOST;
        if may {
            self.given.insert(own.clone());
        }
        let value = if may { own } else { &self.other }.clone();
        let shape = Arc::downgrade(&sub_network.selection.shape);
        self.by_id.insert(sub_network.selection.subnetwork, Label { value, shape });
        may.then(|| own.clone())
    }
}
