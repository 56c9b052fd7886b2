//! What is known beside the rates: the machine, loading, registering a sub-network, other load during the measurements.

use crate::backend::Selection;
use crate::cli::open::Opened;
use crate::supernet::ActiveLinear;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

/// Everything beside the rates.
pub(super) struct Facts {
    pub(super) machine: String,
    pub(super) device: String,
    pub(super) dtype: &'static str,
    pub(super) threads: usize,
    /// For people.
    pub(super) description: String,
    pub(super) load: Loaded,
    pub(super) registering: Registering,
    pub(super) noise: Noise,
    /// By sub-network: its model's name and its own.
    pub(super) names: Vec<(String, String)>,
}

impl Facts {
    /// A sub-network's name for people: with its model's where there are several models.
    pub(super) fn label(&self, index: usize) -> String {
        let (model, name) = &self.names[index];
        let one_model = self.names.iter().all(|(other, _)| other == model);
        if one_model { name.clone() } else { format!("{model}:{name}") }
    }
}

/// From opening the files to an executor that can run.
pub(super) struct Loaded {
    pub(super) seconds: f64,
    /// Of the process when it had loaded, the files that are still mapped and the touched part of the pool included.
    pub(super) resident_bytes: Option<usize>,
    /// Base and adapters, as they are kept in memory.
    pub(super) weight_bytes: usize,
}

/// A loading that goes on.
pub(super) struct Load(Instant);

impl Load {
    pub(super) fn begin() -> Self {
        Self(Instant::now())
    }

    pub(super) fn end(self, weight_bytes: usize) -> Loaded {
        Loaded { seconds: self.0.elapsed().as_secs_f64(), resident_bytes: resident(), weight_bytes }
    }
}

/// `VmRSS`
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? * 1024)
}

/// What one more sub-network costs while the model stays loaded.
pub(super) struct Registering {
    pub(super) seconds: f64,
    pub(super) bytes: usize,
}

/// Times what makes a sub-network selectable: its sizes are worked out and put where batches find them.
pub(super) fn registering(opened: &Opened) -> Registering {
    const TIMES: u32 = 1000;
    let Some(model) = opened.models.first() else { return Registering { seconds: 0.0, bytes: 0 } };
    let sub_network = model.space.heuristic();
    let register = || {
        let shape = Arc::new(model.space.resolve(&model.shape, black_box(&sub_network)));
        Selection { adapter: 0, subnetwork: 0, shape }
    };
    let began = Instant::now();
    for _ in 0..TIMES {
        black_box(register());
    }
    let seconds = began.elapsed().as_secs_f64() / f64::from(TIMES);
    let choices = size_of_val(sub_network.choices());
    let sizes = model.shape.linears.len() * size_of::<ActiveLinear>();
    Registering { seconds, bytes: choices + sizes + size_of::<Selection>() }
}

/// What else happened on this machine, as shares of all its cores' time; `None` where the system does not say.
pub(super) struct Noise {
    /// Other processes.
    pub(super) foreign: Option<f64>,
    /// Time that the machine's host gave to other machines.
    pub(super) stolen: Option<f64>,
}

/// Counters in ticks at one moment.
#[derive(Clone, Copy)]
struct Ticks {
    all: f64,
    busy: f64,
    stolen: f64,
    own: f64,
}

/// A watch over other load.
pub(super) struct Watch(Option<Ticks>);

impl Watch {
    pub(super) fn begin() -> Self {
        Self(Ticks::now())
    }

    pub(super) fn end(self) -> Noise {
        let (Some(before), Some(after)) = (self.0, Ticks::now()) else {
            return Noise { foreign: None, stolen: None };
        };
        let share = |of: &dyn Fn(Ticks) -> f64| {
            let all = (after.all - before.all).max(1.0);
            ((of(after) - of(before)) / all).clamp(0.0, 1.0)
        };
        Noise { foreign: Some(share(&|t| t.busy - t.own)), stolen: Some(share(&|t| t.stolen)) }
    }
}

impl Ticks {
    fn now() -> Option<Self> {
        // proc(5): user nice system idle iowait irq softirq steal; both files count in the same ticks.
        let stat = std::fs::read_to_string("/proc/stat").ok()?;
        let words = stat.lines().next()?.split_whitespace().skip(1).take(8);
        let cpu = words.map(|w| w.parse().ok()).collect::<Option<Vec<f64>>>()?;
        let &[user, nice, system, idle, wait, irq, soft, stolen] = cpu.as_slice() else { return None };
        let own = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The second field is the program's name in brackets; user and system time are the 14th and 15th.
        let own = own.rsplit_once(')')?.1.split_whitespace().skip(11).take(2);
        let own = own.map(|w| w.parse().ok()).collect::<Option<Vec<f64>>>()?.iter().sum();
        let busy = user + nice + system + irq + soft;
        Some(Self { all: busy + idle + wait + stolen, busy, stolen, own })
    }
}
