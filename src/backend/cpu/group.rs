//! The first phases of an operation, prepare and shrink; `multiply` has the last. Each is a share of the work for every thread of
//! a run.
#![allow(unsafe_code)]

use super::Cpu;
use super::Rows;
use super::ahead::{ByThread, Operation, Runs, Spans};
use super::inputs::{Buffers, Inputs};
use super::kernel::Lanes;
use super::plan::{AdapterPlan, Plan};
use super::rows::Normalise;
use super::shared::Shared;
use super::team::{Member, Pieces};
use super::tile::{TILE, Tile, TileRow};
use super::vector::PANEL;
use crate::backend::{BackendError, Norm};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of prepared rows that a panel takes before the next panel comes: half of a small second-level cache.
const CHUNK_BYTES: usize = 256 << 10;
/// At least and at most so many rows.
const CHUNK: [usize; 2] = [24, 144];
/// Rows that one piece of shrinking takes, at least and at most.
const FEW: [usize; 2] = [4, TILE];
/// So few rows each thread prepares for itself, which takes less time than to wait for another.
const OWN: usize = 2;

#[derive(Debug, Default)]
pub(super) struct GroupBuffers {
    pub(super) inputs: Buffers,
    pub(super) shrunk: Vec<Buffers>,
    pieces: [Pieces; 3],
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
            // SAFETY: written before the barrier that ends the phase before, and not again until the next barrier.
            Self::Shared(values, width) => unsafe { values.view(row * width..(row + 1) * width) },
        }
    }
}

/// What a thread works in, from one operation to the next.
#[derive(Default)]
pub(super) struct Desk {
    pub(super) rows: Vec<TileRow>,
    /// Of which plan `rows` has all rows, and of which chunk, by its first place.
    pub(super) listed: Option<(usize, usize)>,
    pub(super) lanes: Vec<Lanes>,
    pub(super) others: Vec<Lanes>,
    floats: Vec<f32>,
}

thread_local! {
    pub(super) static DESK: RefCell<Desk> = RefCell::default();
}

/// Linears that read the same rows, with their buffers and the pieces of their phases.
pub(super) struct Group<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) plans: &'a [Plan<'a>],
    pub(super) inputs: Inputs<'a>,
    /// By plan: `s A x` up to each row's rank, zero beyond.
    pub(super) shrunk: Vec<Inputs<'a>>,
    pub(super) length: usize,
    /// Rows that a panel takes before the next panel comes.
    pub(super) chunk: usize,
    /// Rows of one piece of shrinking.
    few: usize,
    preparing: &'a Pieces,
    pub(super) shrinking: &'a Pieces,
    /// Pieces of shrinking that are done.
    pub(super) shrunken: AtomicUsize,
    pub(super) multiplying: &'a Pieces,
    paired: bool,
    /// What will be read after this.
    pub(super) next: Option<ByThread>,
}

impl<'a> Group<'a> {
    /// `paired`: of pieces to multiply there are those of the first plan only, each brings the same panel of the others with
    /// it.
    pub(super) fn new(
        cpu: &'a Cpu,
        plans: &'a [Plan<'a>],
        paired: bool,
        length: usize,
        buffers: &'a mut GroupBuffers,
    ) -> Result<Self, BackendError> {
        let GroupBuffers { inputs, shrunk, pieces: [preparing, shrinking, multiplying] } = buffers;
        let width = plans.iter().map(|plan| plan.linear.weight.columns()).max().unwrap_or(0);
        let equal = |plan: &Plan<'_>| {
            plan.rows.iter().zip(&plans[0].rows).all(|(a, b)| (a.row, a.active.inp) == (b.row, b.active.inp))
        };
        if !plans.iter().all(equal) {
            return Err(unfit("linear"));
        }
        let readers = plans.iter().flat_map(Plan::readers);
        let copies = if length <= OWN { cpu.threads } else { 1 };
        let inputs = Inputs::new(inputs, length * copies, width, readers).ok_or_else(|| unfit("linear"))?;
        shrunk.resize_with(shrunk.len().max(plans.len()), Buffers::default);
        let shrunk = plans.iter().zip(shrunk).map(|(plan, buffers)| {
            let b = plan.adapters.iter().map(|plan| &plan.adapter.b);
            Inputs::new(buffers, length, plan.rank(), b).ok_or_else(|| unfit("linear"))
        });
        let adapted = plans.iter().any(|plan| !plan.adapters.is_empty());
        let few = (length / cpu.threads).clamp(FEW[0], FEW[1]);
        let chunk = (CHUNK_BYTES / inputs.row_bytes().max(1)).clamp(CHUNK[0], CHUNK[1]);
        // Whole tiles, if more than one.
        let chunk = if chunk > TILE { chunk - chunk % TILE } else { chunk };
        let pieces = if paired { 1 } else { plans.len() };
        let panels = plans[..pieces].iter().map(|plan| plan.reached).sum::<usize>();
        let group = Self {
            cpu,
            plans,
            inputs,
            shrunk: shrunk.collect::<Result<_, _>>()?,
            length,
            chunk,
            few,
            preparing: cpu.team.pieces_in(preparing, if copies == 1 { length } else { 0 }),
            shrinking: cpu
                .team
                .pieces_in(shrinking, if adapted { length.div_ceil(few) * plans.len() } else { 0 }),
            shrunken: AtomicUsize::new(0),
            multiplying: cpu.team.pieces_in(multiplying, length.div_ceil(chunk) * panels),
            paired,
            next: None,
        };
        let spans = || (0..cpu.threads).map(|thread| group.first_spans(thread)).collect();
        let start = plans.first().map_or(0, |plan| plan.linear.weight.addresses(0).start);
        let adapter = plans.iter().find_map(|plan| plan.adapters.first());
        let adapter = adapter.map_or(0, |plan| plan.adapter.a.addresses(0).start);
        let inputs = plans.first().map_or(0, Plan::widest);
        let next = cpu.order.follow(Operation { start, adapter, panels, inputs }, spans);
        Ok(Self { next, ..group })
    }

    /// Norms and rounds all rows; each thread for itself if they are few, else ending with a barrier.
    pub(super) fn prepare(&self, member: &Member<'_>, source: &Source<'_>, norm: Option<Norm<'_, Cpu>>) {
        DESK.with_borrow_mut(|desk| {
            if self.length <= OWN {
                (0..self.length).for_each(|place| self.prepare_row(member, source, norm, place, desk));
            } else {
                member.share(self.preparing, |rows| {
                    rows.for_each(|place| self.prepare_row(member, source, norm, place, desk));
                });
                member.barrier();
            }
        });
    }

    fn prepare_row(
        &self,
        member: &Member<'_>,
        source: &Source<'_>,
        norm: Option<Norm<'_, Cpu>>,
        place: usize,
        desk: &mut Desk,
    ) {
        let plan = &self.plans[0].rows[place];
        let x = source.row(plan.row);
        let Desk { floats, .. } = desk;
        let x = match norm {
            Some(Norm { weight, eps }) => {
                floats.clear();
                floats.extend_from_slice(x);
                self.cpu.kernel.vectorised(Normalise { x: floats, weight, eps });
                floats
            }
            None => x,
        };
        let (row, x) = (self.first(member) + plan.row, &x[..plan.active.inp]);
        // SAFETY: each row is in one piece and nobody reads before the barrier, or is this thread's own.
        unsafe { self.inputs.fill(self.cpu.kernel, row, x) };
    }

    /// Which of the inputs is row 0 to a thread.
    pub(super) fn first(&self, member: &Member<'_>) -> usize {
        if self.length <= OWN { member.index() * self.length } else { 0 }
    }

    /// What a thread will read first: an adapter's A, then panels.
    fn first_spans(&self, thread: usize) -> Spans {
        let parts = self.length.div_ceil(self.few).max(1);
        let adapter =
            self.plans.get(self.shrinking.start_of(thread) / parts).and_then(|p| p.adapters.first());
        let range = self.multiplying.start_of(thread)..self.multiplying.start_of(thread + 1);
        let (plan, panel) = self.panel(range.start % self.numbers().max(1));
        let plan = &self.plans[plan];
        let panels = panel..plan.reached.min(panel + range.len());
        let panels = plan.linear.weight.reading(panels, plan.widest());
        [adapter.map_or(Runs::default(), |adapter| adapter.adapter.a.reading(0..1, plan.widest())), panels]
    }

    /// Panels that are pieces of their own.
    pub(super) fn numbers(&self) -> usize {
        let pieces = if self.paired { 1 } else { self.plans.len() };
        self.plans[..pieces].iter().map(|plan| plan.reached).sum()
    }

    pub(super) fn panel_addresses(&self, number: usize) -> Range<usize> {
        let (plan, panel) = self.panel(number);
        self.plans[plan].linear.weight.addresses(panel)
    }

    /// `s A[:r,:i] x` for every row with an adapter. Who reads it waits until all of it is there, see [`Self::multiply`].
    pub(super) fn shrink(&self, member: &Member<'_>) {
        let parts = self.length.div_ceil(self.few);
        DESK.with_borrow_mut(|desk| {
            member.share(self.shrinking, |pieces| {
                for piece in pieces.clone() {
                    let (plan, part) = (piece / parts, piece % parts);
                    let places = part * self.few..self.length.min((part + 1) * self.few);
                    desk.rows.clear();
                    desk.rows.extend(places.map(|place| self.plans[plan].tile_row(place)));
                    let rows = std::mem::take(&mut desk.rows);
                    for (run, adapter) in self.plans[plan].runs(&rows) {
                        self.shrink_run(member, plan, &rows[run], adapter, desk);
                    }
                    desk.rows = rows;
                }
                self.shrunken.fetch_add(pieces.len(), Ordering::Release);
            });
        });
    }

    /// A few rows of one super-adapter.
    fn shrink_run(
        &self,
        member: &Member<'_>,
        plan: usize,
        rows: &[TileRow],
        adapter: &AdapterPlan<'_>,
        desk: &mut Desk,
    ) {
        let Desk { lanes, floats: shrunk, .. } = desk;
        let AdapterPlan { adapter, rank, .. } = *adapter;
        let width = rank.next_multiple_of(PANEL);
        shrunk.clear();
        shrunk.resize(rows.len() * width, 0.0);
        let panels = 0..rank.div_ceil(PANEL);
        // Few rows go on to the base.
        let base = self.multiplying.start_of(member.index()) % self.numbers().max(1);
        let base = self.panel_addresses(base).start;
        for panel in panels.clone() {
            lanes.clear();
            lanes.resize(rows.len(), [0.0; PANEL]);
            let tile = Tile {
                matrix: &adapter.a,
                panels: panel..panel + 1,
                inputs: &self.inputs,
                first: self.first(member),
                rows,
                active: None,
                ahead: member.ahead(),
                spread: Some(1),
                then: Some(base).filter(|_| panel + 1 == panels.end),
                quads: self.plans[plan].quads(rows[0].inp),
            };
            // SAFETY: all rows were prepared, before the barrier or by this thread.
            unsafe { self.cpu.kernel.accumulate(&tile, lanes) };
            for (lanes, shrunk) in lanes.iter_mut().zip(shrunk.chunks_exact_mut(width)) {
                lanes.iter_mut().for_each(|lane| *lane *= adapter.scale);
                shrunk[panel * PANEL..(panel + 1) * PANEL].copy_from_slice(lanes);
            }
        }
        for (row, shrunk) in rows.iter().zip(shrunk.chunks_exact(width.max(1))) {
            let rank = self.plans[plan].rows[row.place].active.rank;
            // SAFETY: each row of each plan is in one piece, and nobody reads before all pieces are done.
            unsafe { self.shrunk[plan].fill(self.cpu.kernel, row.row, &shrunk[..rank]) };
        }
    }

    /// The plan and its panel behind a number.
    pub(super) fn panel(&self, mut number: usize) -> (usize, usize) {
        for (index, plan) in self.plans.iter().enumerate() {
            if number < plan.reached {
                return (index, number);
            }
            number -= plan.reached;
        }
        (0, 0)
    }
}
