//! What the engine reports, as metrics. Runs on the engine's thread.

use super::metrics::Metrics;
use crate::engine::{Load, Observer, Step};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

impl Observer for Metrics {
    fn step(&self, step: &Step) {
        let phase = match (step.prefill_tokens, step.decode_tokens) {
            (_, 0) => "prefill",
            (0, _) => "decode",
            _ => "mixed",
        };
        self.engine.step_seconds.with_label_values(&[phase]).observe(step.duration.as_secs_f64());
        let tokens = step.prefill_tokens + step.decode_tokens;
        self.engine.step_tokens.with_label_values(&[phase]).observe(tokens as f64);
        self.engine.step_subnetworks.observe(step.sub_networks as f64);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.engine.last_step.set(now.as_secs_f64());
        self.load(&step.load);
    }

    fn load(&self, load: &Load) {
        // Added up, as a sub-network that was removed and one that took its name count under one label.
        let mut counts = BTreeMap::<Arc<str>, (usize, usize)>::new();
        for (&id, (running, waiting)) in &load.by_sub_network {
            let count = counts.entry(self.label(id)).or_default();
            *count = (count.0 + running, count.1 + waiting);
        }
        let set = |label: &str, (running, waiting): (usize, usize)| {
            self.engine.running.with_label_values(&[label]).set(running as i64);
            self.engine.waiting.with_label_values(&[label]).set(waiting as i64);
        };
        // What is not in the report has nothing any more. Only what had something is set, so that a step does not take longer
        // for every sub-network that could run in it.
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.iter().filter(|label| !counts.contains_key(*label)).for_each(|label| set(label, (0, 0)));
        counts.iter().for_each(|(label, &count)| set(label, count));
        *busy = counts.into_keys().collect();
        drop(busy);
        let (used, all) = (load.blocks_used, load.blocks);
        self.engine.kv_usage.set(if all == 0 { 0.0 } else { used as f64 / all as f64 });
        self.engine.kv_blocks.with_label_values(&["used"]).set(used as i64);
        self.engine.kv_blocks.with_label_values(&["free"]).set(all.saturating_sub(used) as i64);
    }

    fn preempted(&self, subnetwork: u32) {
        self.engine.preemptions.with_label_values(&[&*self.label(subnetwork)]).inc();
    }

    fn started(&self, subnetwork: u32, waited: Duration) {
        self.times.queue.with_label_values(&[&*self.label(subnetwork)]).observe(waited.as_secs_f64());
    }

    fn looked_up(&self, subnetwork: u32, tokens: usize, cached: usize) {
        let label = self.label(subnetwork);
        self.engine.prefix_queried.with_label_values(&[&*label]).inc_by(tokens as u64);
        self.engine.prefix_hits.with_label_values(&[&*label]).inc_by(cached as u64);
    }
}
