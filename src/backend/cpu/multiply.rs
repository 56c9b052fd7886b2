//! The last phase of an operation: panel by panel, for all rows that reach it, the base's product and the adapters'.
#![allow(unsafe_code)]

use super::ahead::{Runs, prefetch_all};
use super::ask::{Ask, Reading};
use super::group::{DESK, Desk, Group};
use super::kernel::{Kernel, Lanes, Loops};
use super::plan::{AdapterPlan, Plan};
use super::rows::silu;
use super::shared::Shared;
use super::team::Member;
use super::tile::{TILE, Tile, TileRow};
use super::vector::PANEL;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Accumulators of a strip, at most: half of a first-level cache has room for those of two plans.
const STRIP: usize = 64;

/// Rows that most kernels take at once, a divisor of [`TILE`].
const TOGETHER: usize = 8;

/// Neighbouring panels that so many rows take in one call.
pub(super) fn panels_at_once(kernel: Kernel, rows: usize) -> usize {
    if rows <= kernel.few() { (STRIP / rows.max(1)).max(1) } else { 1 }
}

/// Some rows of one plan that reach a panel, and their accumulators.
pub(super) struct Work<'a> {
    pub(super) plan: usize,
    pub(super) panel: usize,
    pub(super) rows: &'a [TileRow],
    pub(super) lanes: &'a mut [Lanes],
}

/// Neighbouring panels of one plan and some of its rows, by their places.
struct Strip {
    plan: usize,
    panels: Range<usize>,
    places: Range<usize>,
    ask: Ask,
}

impl Group<'_> {
    /// Calls `write` with the finished outputs of some rows of one panel at a time; before that, for each panel and the rows
    /// that do not reach it, `clear` with plan, panel and the row's place.
    pub(super) fn multiply(
        &self,
        member: &Member<'_>,
        clear: impl Fn(usize, usize, usize),
        write: impl Fn(Work<'_>),
    ) {
        for (index, plan) in self.plans.iter().enumerate() {
            for place in (member.index()..self.length).step_by(self.cpu.threads) {
                plan.unreached().for_each(|panel| clear(index, panel, place));
            }
        }
        self.each_strip(member, |strip, desk| {
            let (plan, places) = (strip.plan, strip.places.clone());
            for panel in self.plans[plan].shared.max(strip.panels.start)..strip.panels.end {
                let unreached = |place: &usize| self.plans[plan].rows[*place].active.out <= panel * PANEL;
                places.clone().filter(unreached).for_each(|place| clear(plan, panel, place));
            }
            let Desk { rows, listed, lanes, .. } = desk;
            self.each_tile(strip, (rows, listed), |rows, panels, ask| {
                let lanes = room(lanes, rows.len() * panels.len());
                self.tile(member, plan, panels.clone(), rows, lanes, ask);
                for (panel, lanes) in panels.zip(lanes.chunks_exact_mut(rows.len())) {
                    write(Work { plan, panel, rows, lanes });
                }
            });
        });
    }

    /// `gated = silu(y of the first plan) * (y of the second)`, for panels within each row's width; rows of `width`, each
    /// `stride` after the one before.
    pub(super) fn multiply_gated(
        &self,
        member: &Member<'_>,
        gated: &Shared<'_, f32>,
        (width, stride): (usize, usize),
    ) {
        let few = self.is_few();
        self.each_strip(member, |strip, desk| {
            let Desk { rows, listed, lanes, others, .. } = desk;
            self.each_tile(strip, (rows, listed), |rows, panels, ask| {
                let count = rows.len() * panels.len();
                let (gates, ups) = (room(lanes, count), room(others, count));
                let second = self.plans[1].linear.weight.addresses(panels.start);
                let then = Some(second.start);
                // Many rows ask for the second panel during the first one, few for what follows during all panels of both.
                let [first, second] = match few {
                    true => {
                        let spread = 2 * ask.spread;
                        [
                            Ask { spread, then, ..ask },
                            Ask { spread: spread - panels.len(), next: None, ..ask },
                        ]
                    }
                    false => {
                        let second = ask.next.map(|_| [Runs::whole(second), Runs::default()]);
                        [Ask { next: second, then, ..ask }, ask]
                    }
                };
                self.tile(member, 0, panels.clone(), rows, gates, first);
                self.tile(member, 1, panels.clone(), rows, ups, second);
                let lanes = gates.chunks_exact(rows.len()).zip(ups.chunks_exact(rows.len()));
                for (panel, (gates, ups)) in panels.zip(lanes) {
                    let columns = panel * PANEL..width.min((panel + 1) * PANEL);
                    self.cpu.kernel.vectorised(Gate { rows, gates, ups, gated, stride, columns });
                }
            });
        });
    }

    fn is_few(&self) -> bool {
        self.length <= self.cpu.kernel.few()
    }

    /// Calls `work` for all panels and rows: with neighbouring panels where there are few rows, else with one panel and some
    /// of the rows.
    fn each_strip(&self, member: &Member<'_>, mut work: impl FnMut(Strip, &mut Desk)) {
        let numbers = self.numbers();
        let most = panels_at_once(self.cpu.kernel, self.length);
        let reading = Reading {
            few: self.is_few(),
            pieces: self.multiplying,
            thread: member.index(),
            next: self.next.as_ref().map(|next| next[member.index()]),
        };
        DESK.with_borrow_mut(|desk| {
            desk.listed = None;
            member.share(self.multiplying, |mut pieces| {
                while !pieces.is_empty() {
                    let first = pieces.start;
                    let start = first / numbers * self.chunk;
                    let places = start..self.length.min(start + self.chunk);
                    let (plan, panel) = self.panel(first % numbers);
                    let count = pieces.len().min(most).min(self.plans[plan].reached - panel);
                    pieces.start += count;
                    let following = || self.panel_addresses(pieces.start % numbers);
                    let ask = reading.asking(first..pieces.start, following);
                    work(Strip { plan, panels: panel..panel + count, places, ask }, desk);
                }
            });
        });
    }

    /// Calls `work` with some of a strip's rows at a time and panels that they all reach. Most panels take all rows of a
    /// chunk, which are listed once.
    fn each_tile(
        &self,
        strip: Strip,
        (rows, listed): (&mut Vec<TileRow>, &mut Option<(usize, usize)>),
        mut work: impl FnMut(&[TileRow], Range<usize>, Ask),
    ) {
        let Strip { plan: number, mut panels, places, mut ask } = strip;
        let (plan, then) = (&self.plans[number], ask.then);
        let reached = |place: usize| plan.rows[place].active.out.div_ceil(PANEL);
        while !panels.is_empty() {
            let mut end = panels.end;
            let all = Some((number, places.start)).filter(|_| panels.start < plan.shared);
            if all.is_some() {
                end = end.min(plan.shared);
            }
            if all.is_none() || all != *listed {
                *listed = all;
                rows.clear();
                for place in places.clone().filter(|&place| reached(place) > panels.start) {
                    end = end.min(reached(place));
                    rows.push(plan.tile_row(place));
                }
            }
            if rows.is_empty() {
                return;
            }
            ask.then = if end == panels.end { then } else { Some(plan.linear.weight.addresses(end).start) };
            // Cut evenly, but into as many as kernels take together.
            let at_once = rows.len().div_ceil(rows.len().div_ceil(TILE)).next_multiple_of(TOGETHER);
            for rows in rows.chunks(at_once) {
                work(rows, panels.start..end, ask);
                (ask.fresh, ask.next) = (false, None);
            }
            ask.spread = ask.spread.saturating_sub(end - panels.start).max(panels.end - end);
            panels.start = end;
        }
    }

    /// Bias, base and adapters of one plan.
    fn tile(
        &self,
        member: &Member<'_>,
        number: usize,
        panels: Range<usize>,
        rows: &[TileRow],
        lanes: &mut [Lanes],
        ask: Ask,
    ) {
        let plan = &self.plans[number];
        self.ask(member, plan, &panels, &ask);
        for (panel, lanes) in panels.clone().zip(lanes.chunks_exact_mut(rows.len())) {
            lanes.fill(bias(plan, panel));
        }
        let mut runs = plan.runs(rows).peekable();
        let after = |run: Option<&(Range<usize>, &AdapterPlan<'_>)>| {
            run.map(|(_, plan)| plan.adapter.b.addresses(panels.start).start).or(ask.then)
        };
        let tile = Tile {
            matrix: &plan.linear.weight,
            panels: panels.clone(),
            inputs: &self.inputs,
            first: self.first(member),
            rows,
            active: None,
            ahead: member.ahead(),
            spread: Some(ask.spread),
            then: after(runs.peek()),
            quads: plan.quads(rows[0].inp),
        };
        // SAFETY: all rows were prepared, before the barrier or by this thread.
        unsafe { self.cpu.kernel.accumulate(&tile, lanes) };
        if plan.adapters.is_empty() {
            return;
        }
        // Rarely waits: others have shrunk while this thread multiplied.
        member.wait_until(|| self.shrunken.load(Ordering::Acquire) >= self.shrinking.count());
        while let Some((run, adapter)) = runs.next() {
            let then = after(runs.peek());
            let expand = |panels: Range<usize>, then: Option<usize>, lanes: &mut [Lanes]| {
                let tile = Tile {
                    matrix: &adapter.adapter.b,
                    panels,
                    inputs: &self.shrunk[number],
                    first: 0,
                    rows: &rows[run.clone()],
                    active: Some(adapter.rank),
                    ahead: member.ahead(),
                    spread: None,
                    then,
                    quads: &adapter.quads,
                };
                // SAFETY: all rows have been shrunk, as just waited for.
                unsafe { self.cpu.kernel.accumulate(&tile, lanes) };
            };
            if run.len() == rows.len() {
                expand(panels.clone(), then, lanes);
                continue;
            }
            for (panel, lanes) in panels.clone().zip(lanes.chunks_exact_mut(rows.len())) {
                let then = then.filter(|_| panel + 1 == panels.end);
                expand(panel..panel + 1, then, &mut lanes[run.clone()]);
            }
        }
    }

    /// Before the panels: many rows ask for what is needed after the base's, the adapters' panels first, since memory has
    /// time until then.
    fn ask(&self, member: &Member<'_>, plan: &Plan<'_>, panels: &Range<usize>, ask: &Ask) {
        ask.begin(member.ahead());
        if ask.fresh && !self.is_few() {
            let adapters = |panel| plan.adapters.iter().map(move |plan| plan.adapter.b.addresses(panel));
            panels.clone().flat_map(adapters).for_each(prefetch_all);
        }
    }
}

/// `gated[.., columns] = silu(gate) * up`, for some rows of one panel.
struct Gate<'a> {
    rows: &'a [TileRow],
    gates: &'a [Lanes],
    ups: &'a [Lanes],
    gated: &'a Shared<'a, f32>,
    stride: usize,
    columns: Range<usize>,
}

impl Loops for Gate<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { rows, gates, ups, gated, stride, columns } = self;
        for ((row, gates), ups) in rows.iter().zip(gates).zip(ups) {
            let start = row.row * stride;
            // SAFETY: each panel of each row is in one piece, and nobody reads before the barrier.
            let to = unsafe { gated.part(start + columns.start..start + columns.end) };
            match to.first_chunk_mut::<PANEL>() {
                Some(to) => gate(to, gates, ups),
                None => gate(to, gates, ups),
            }
        }
    }
}

#[inline(always)]
fn gate(to: &mut [f32], gates: &Lanes, ups: &Lanes) {
    for ((to, gate), up) in to.iter_mut().zip(gates).zip(ups) {
        *to = silu(*gate) * up;
    }
}

/// Where a panel's sums begin.
fn bias(plan: &Plan<'_>, panel: usize) -> Lanes {
    let mut start = [0.0; PANEL];
    if let Some(bias) = &plan.linear.bias {
        let bias = &bias[panel * PANEL..bias.len().min((panel + 1) * PANEL)];
        start[..bias.len()].copy_from_slice(bias);
    }
    start
}

/// So many accumulators.
fn room(lanes: &mut Vec<Lanes>, count: usize) -> &mut [Lanes] {
    lanes.resize(count.max(lanes.len()), [0.0; PANEL]);
    &mut lanes[..count]
}
