//! The phases of an operation: prepare, shrink, multiply; each one a share of the work for every thread of a run.
#![allow(unsafe_code)]

use super::Cpu;
use super::Rows;
use super::inputs::{Buffers, Inputs};
use super::kernel::{Lanes, TILE, Tile, TileRow};
use super::plan::{AdapterPlan, Plan, RowPlan};
use super::rows::{normalise, silu};
use super::shared::Shared;
use super::team::{Member, Pieces};
use super::vector::PANEL;
use crate::backend::{BackendError, Norm};
use std::ops::Range;

/// Rows that a panel takes before the next panel comes: their prepared form stays in the second-level cache.
const CHUNK: usize = 128;
/// Rows that one piece of preparing or shrinking takes.
const FEW: usize = 8;

#[derive(Debug, Default)]
pub(super) struct GroupBuffers {
    pub(super) inputs: Buffers,
    pub(super) shrunk: Vec<Buffers>,
}

pub(super) fn unfit(operation: &'static str) -> BackendError {
    let expected = "weights and adapters that take the same inputs in the same order".into();
    BackendError::Shape { operation, expected, got: "others".into() }
}

/// Where an operation's inputs come from.
pub(super) enum Source<'a> {
    Rows(&'a Rows),
    /// Written by an earlier phase of the same run.
    Shared(&'a Shared<'a, f32>, usize),
}

impl Source<'_> {
    fn row(&self, row: usize) -> &[f32] {
        match self {
            Self::Rows(rows) => rows.row(row),
            // SAFETY: written before the barrier that ends the phase before, and not again in this run.
            Self::Shared(values, width) => unsafe { values.view(row * width..(row + 1) * width) },
        }
    }
}

/// Linears that read the same rows, with their buffers and the pieces of their phases.
pub(super) struct Group<'a> {
    cpu: &'a Cpu,
    pub(super) plans: &'a [Plan<'a>],
    inputs: Inputs<'a>,
    /// By plan: `s A x` up to each row's rank, zero beyond.
    shrunk: Vec<Inputs<'a>>,
    length: usize,
    preparing: Pieces,
    shrinking: Pieces,
    multiplying: Pieces,
}

impl<'a> Group<'a> {
    pub(super) fn new(
        cpu: &'a Cpu,
        plans: &'a [Plan<'a>],
        length: usize,
        buffers: &'a mut GroupBuffers,
    ) -> Result<Self, BackendError> {
        let GroupBuffers { inputs, shrunk } = buffers;
        let width = plans.iter().map(|plan| plan.linear.weight.columns()).max().unwrap_or(0);
        let equal = |plan: &Plan<'_>| {
            plan.rows.iter().zip(&plans[0].rows).all(|(a, b)| (a.row, a.active.inp) == (b.row, b.active.inp))
        };
        if !plans.iter().all(equal) {
            return Err(unfit("linear"));
        }
        let readers = plans.iter().flat_map(Plan::readers);
        let inputs = Inputs::new(inputs, length, width, readers).ok_or_else(|| unfit("linear"))?;
        shrunk.resize_with(shrunk.len().max(plans.len()), Buffers::default);
        let shrunk = plans.iter().zip(shrunk).map(|(plan, buffers)| {
            let b = plan.adapters.iter().map(|plan| &plan.adapter.b);
            Inputs::new(buffers, length, plan.rank(), b).ok_or_else(|| unfit("linear"))
        });
        let panels = plans.iter().map(|plan| plan.linear.weight.rows().div_ceil(PANEL)).sum::<usize>();
        let adapted = plans.iter().filter(|plan| !plan.adapters.is_empty()).count();
        Ok(Self {
            cpu,
            plans,
            inputs,
            shrunk: shrunk.collect::<Result<_, _>>()?,
            length,
            preparing: cpu.team.pieces(length.div_ceil(FEW)),
            shrinking: cpu.team.pieces(if adapted > 0 { length.div_ceil(FEW) * plans.len() } else { 0 }),
            multiplying: cpu.team.pieces(length.div_ceil(CHUNK) * panels),
        })
    }

    /// The first plan's panels only: each brings those of the others with it.
    pub(super) fn paired(self) -> Self {
        let panels = self.plans[0].linear.weight.rows().div_ceil(PANEL);
        let multiplying = self.cpu.team.pieces(self.length.div_ceil(CHUNK) * panels);
        Self { multiplying, ..self }
    }

    /// Norms and rounds all rows; ends with a barrier.
    pub(super) fn prepare(&self, member: &Member<'_>, source: &Source<'_>, norm: Option<Norm<'_, Cpu>>) {
        let rows = &self.plans[0].rows;
        member.share(&self.preparing, |pieces| {
            let mut normed = Vec::new();
            for plan in &rows[pieces.start * FEW..self.length.min(pieces.end * FEW)] {
                let x = source.row(plan.row);
                self.cpu.kernel.vectorised(|| {
                    let x = match norm {
                        Some(Norm { weight, eps }) => {
                            normed.clear();
                            normed.extend_from_slice(x);
                            normalise(&mut normed, weight, eps);
                            &normed
                        }
                        None => x,
                    };
                    // SAFETY: each row is in one piece, and nobody reads before the barrier.
                    unsafe { self.inputs.fill(plan.row, &x[..plan.active.inp]) };
                });
            }
        });
        // Memory answers while the others finish.
        let parts = self.length.div_ceil(FEW).max(1);
        match self.plans.get(member.first_of(&self.shrinking) / parts) {
            Some(plan) if !plan.adapters.is_empty() => plan.adapters[0].adapter.a.ask_for(0),
            _ => self.ask_for_panel(member.first_of(&self.multiplying)),
        }
        member.barrier();
    }

    /// `s A[:r,:i] x` for every row with an adapter; ends with a barrier where there is any.
    pub(super) fn shrink(&self, member: &Member<'_>) {
        if self.plans.iter().all(|plan| plan.adapters.is_empty()) {
            return;
        }
        let parts = self.length.div_ceil(FEW);
        member.share(&self.shrinking, |pieces| {
            for piece in pieces {
                let (plan, part) = (piece / parts, piece % parts);
                let mut rows = [0; FEW];
                let count = FEW.min(self.length - part * FEW);
                rows.iter_mut().enumerate().for_each(|(i, row)| *row = part * FEW + i);
                for (run, adapter) in self.plans[plan].runs(&rows[..count]) {
                    let start = part * FEW;
                    self.shrink_run(plan, start + run.start..start + run.end, adapter);
                }
            }
        });
        self.ask_for_panel(member.first_of(&self.multiplying));
        member.barrier();
    }

    /// A few rows of one super-adapter.
    fn shrink_run(&self, plan: usize, run: Range<usize>, adapter: &AdapterPlan<'_>) {
        let AdapterPlan { adapter, rank, .. } = *adapter;
        let rows = &self.plans[plan].rows[run];
        let mut shrunk = vec![0.0; rows.len() * rank.next_multiple_of(PANEL)];
        let width = rank.next_multiple_of(PANEL);
        let tile_rows = tile_rows(rows.iter(), |row| row.active.inp);
        for panel in 0..rank.div_ceil(PANEL) {
            let mut lanes = [[0.0; PANEL]; TILE];
            let lanes = &mut lanes[..rows.len()];
            let tile = Tile {
                matrix: &adapter.a,
                panel,
                inputs: &self.inputs,
                rows: &tile_rows[..rows.len()],
                cold: true,
                quads: self.plans[plan].quads(rows[0].active.inp),
            };
            // SAFETY: all rows were prepared before the barrier.
            unsafe { self.cpu.kernel.accumulate(&tile, lanes) };
            for (lanes, shrunk) in lanes.iter_mut().zip(shrunk.chunks_exact_mut(width)) {
                lanes.iter_mut().for_each(|lane| *lane *= adapter.scale);
                shrunk[panel * PANEL..(panel + 1) * PANEL].copy_from_slice(lanes);
            }
        }
        for (row, shrunk) in rows.iter().zip(shrunk.chunks_exact(width.max(1))) {
            self.cpu.kernel.vectorised(|| {
                // SAFETY: each row of each plan is in one piece, and nobody reads before the barrier.
                unsafe { self.shrunk[plan].fill(row.row, &shrunk[..row.active.rank]) };
            });
        }
    }

    /// Calls `work` with plan, panel and a range of the plan's rows, for all of them.
    pub(super) fn each_panel(&self, member: &Member<'_>, work: impl Fn(usize, usize, Range<usize>)) {
        let panels = self.panels();
        member.share(&self.multiplying, |pieces| {
            for piece in pieces {
                let (plan, panel) = self.panel(piece % panels);
                let part = piece / panels;
                work(plan, panel, part * CHUNK..self.length.min((part + 1) * CHUNK));
            }
        });
    }

    /// Panels of all plans.
    fn panels(&self) -> usize {
        self.plans.iter().map(|plan| plan.linear.weight.rows().div_ceil(PANEL)).sum()
    }

    /// The plan and its panel behind a number below [`Self::panels`].
    fn panel(&self, mut panel: usize) -> (usize, usize) {
        for (index, plan) in self.plans.iter().enumerate() {
            let panels = plan.linear.weight.rows().div_ceil(PANEL);
            if panel < panels {
                return (index, panel);
            }
            panel -= panels;
        }
        (0, 0)
    }

    fn ask_for_panel(&self, piece: usize) {
        let panels = self.multiplying.count() / self.length.div_ceil(CHUNK).max(1);
        let (plan, panel) = self.panel(piece % panels.max(1));
        self.plans[plan].linear.weight.ask_for(panel);
    }

    /// Calls `work` with a few of the range's rows at a time (by their place in the plan), as far as they reach the
    /// panel, and as many accumulators; last, whether the panel is touched for the first time.
    pub(super) fn each_tile(
        &self,
        plan: usize,
        panel: usize,
        range: Range<usize>,
        mut work: impl FnMut(&[usize], &mut [Lanes], bool),
    ) {
        let mut reached = [0; CHUNK];
        let mut count = 0;
        for row in range {
            reached[count] = row;
            count += usize::from(self.plans[plan].rows[row].active.out > panel * PANEL);
        }
        let mut lanes = [[0.0; PANEL]; TILE];
        let mut rest = &reached[..count];
        while !rest.is_empty() {
            // Cut evenly.
            let (tile, others) = rest.split_at(rest.len().div_ceil(rest.len().div_ceil(TILE)));
            work(tile, &mut lanes[..tile.len()], rest.len() == count);
            rest = others;
        }
    }

    /// The panel's outputs for some of a plan's rows: bias, base and adapters.
    pub(super) fn tile(&self, plan: usize, panel: usize, rows: &[usize], lanes: &mut [Lanes], cold: bool) {
        let (index, plan) = (plan, &self.plans[plan]);
        let mut start = [0.0; PANEL];
        if let Some(bias) = &plan.linear.bias {
            let bias = &bias[panel * PANEL..bias.len().min((panel + 1) * PANEL)];
            start[..bias.len()].copy_from_slice(bias);
        }
        lanes.fill(start);
        let of = |&row: &usize| &plan.rows[row];
        let base = tile_rows(rows.iter().map(of), |row| row.active.inp);
        let tile = Tile {
            matrix: &plan.linear.weight,
            panel,
            inputs: &self.inputs,
            rows: &base[..rows.len()],
            cold,
            quads: plan.quads(base[0].inp),
        };
        // SAFETY: all rows were prepared before the barrier.
        unsafe { self.cpu.kernel.accumulate(&tile, lanes) };
        for (run, adapter) in plan.runs(rows) {
            let shrunk = tile_rows(rows[run.clone()].iter().map(of), |_| adapter.rank);
            let tile = Tile {
                matrix: &adapter.adapter.b,
                panel,
                inputs: &self.shrunk[index],
                rows: &shrunk[..run.len()],
                cold,
                quads: &adapter.quads,
            };
            // SAFETY: all rows were shrunk before the barrier.
            unsafe { self.cpu.kernel.accumulate(&tile, &mut lanes[run]) };
        }
    }

    /// `gated = silu(y of the first plan) * (y of the second)`, for panels within each row's width.
    pub(super) fn multiply_gated(&self, member: &Member<'_>, gated: &Shared<'_, f32>, width: usize) {
        let panels = width.div_ceil(PANEL);
        member.share(&self.multiplying, |pieces| {
            for piece in pieces {
                let (part, panel) = (piece / panels, piece % panels);
                let chunk = part * CHUNK..self.length.min((part + 1) * CHUNK);
                self.each_tile(0, panel, chunk, |tile, gates, cold| {
                    let mut ups = [[0.0; PANEL]; TILE];
                    let ups = &mut ups[..tile.len()];
                    self.tile(0, panel, tile, gates, cold);
                    self.tile(1, panel, tile, ups, cold);
                    self.cpu.kernel.vectorised(|| {
                        for ((row, gates), ups) in tile.iter().zip(gates).zip(ups) {
                            gates.iter_mut().zip(ups).for_each(|(gate, up)| *gate = silu(*gate) * *up);
                            let at = self.plans[0].rows[*row].row * width + panel * PANEL;
                            let kept = PANEL.min(width - panel * PANEL);
                            // SAFETY: each panel of each row is in one piece, and nobody reads before the barrier.
                            unsafe { gated.part(at..at + kept) }.copy_from_slice(&gates[..kept]);
                        }
                    });
                });
            }
        });
    }
}

fn tile_rows<'a>(
    rows: impl Iterator<Item = &'a RowPlan>,
    inp: impl Fn(&RowPlan) -> usize,
) -> [TileRow; TILE] {
    let mut tile = [TileRow::default(); TILE];
    tile.iter_mut().zip(rows).for_each(|(to, row)| *to = TileRow { row: row.row, inp: inp(row) });
    tile
}
