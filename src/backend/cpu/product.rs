//! The elastic low-rank product and the gated MLP over a mixed batch.
//!
//! Work is cut by panels of outputs. A panel's weights serve the rows of all segments that reach it before the next
//! panel is touched, so each base weight is read from memory once a step, whatever sub-networks the rows use.
#![allow(unsafe_code)]

use super::kernel::{Lanes, Tile, block_sums};
use super::matrix::{Matrix, PANEL};
use super::rows::silu;
use super::{Cpu, Rows};
use crate::backend::{Adapter, BackendError, GatedMlp, Linear, Segment};
use crate::supernet::ActiveLinear;
use std::ops::Range;

/// Rows that one pass over a panel takes together: what stays in the first-level cache beside the panel.
const ROWS: usize = 32;

/// One segment's part in one Linear.
struct Part<'a> {
    rows: Range<usize>,
    active: ActiveLinear,
    adapter: Option<&'a Adapter<Cpu>>,
}

/// One Linear over all segments, its adapters' inputs already shrunk to their ranks.
struct Product<'a> {
    cpu: &'a Cpu,
    x: &'a Rows,
    weight: &'a Matrix,
    bias: Option<&'a [f32]>,
    parts: Vec<Part<'a>>,
    /// By row: sums by block, where the weight's storage needs them.
    sums: Vec<Vec<f32>>,
    /// `(T, R)`: `s A x`.
    shrunk: Rows,
}

pub(super) fn linear(
    cpu: &Cpu,
    x: &Rows,
    linear: &Linear<Cpu>,
    segments: &[Segment],
) -> Result<Rows, BackendError> {
    let product = Product::new(cpu, x, linear, segments)?;
    Ok(product.run())
}

/// `x W^T` for all rows at full size.
pub(super) fn plain(cpu: &Cpu, x: &Rows, weight: &Matrix) -> Rows {
    let active = ActiveLinear { out: weight.rows(), inp: weight.columns(), rank: 0 };
    let parts = vec![Part { rows: 0..x.len(), active, adapter: None }];
    let sums = (0..x.len()).map(|r| block_sums(weight, x.row(r), active.inp)).collect();
    Product { cpu, x, weight, bias: None, parts, sums, shrunk: Rows::zeros(0, 1) }.run()
}

pub(super) fn gated_mlp(
    cpu: &Cpu,
    x: &Rows,
    mlp: &GatedMlp<Cpu>,
    segments: &[Segment],
) -> Result<Rows, BackendError> {
    let gate = Product::new(cpu, x, &mlp.gate, segments)?;
    let up = Product::new(cpu, x, &mlp.up, segments)?;
    let mut gated = Rows::zeros(x.len(), mlp.gate.weight.rows());
    let columns = Columns::of(&mut gated);
    cpu.each(mlp.gate.weight.rows().div_ceil(PANEL), |panel| {
        for (of_gate, of_up) in gate.parts.iter().zip(&up.parts) {
            let kept = kept(of_gate.active.out, panel);
            if kept == 0 {
                continue;
            }
            for rows in chunks(&of_gate.rows) {
                let (gates, ups) = (gate.panel(of_gate, panel, &rows), up.panel(of_up, panel, &rows));
                cpu.kernel.vectorised(|| {
                    for ((row, gates), ups) in rows.clone().zip(gates).zip(ups) {
                        let product: Lanes = std::array::from_fn(|lane| silu(gates[lane]) * ups[lane]);
                        columns.write(row, panel * PANEL, &product[..kept]);
                    }
                });
            }
        }
    });
    linear(cpu, &gated, &mlp.down, segments)
}

impl<'a> Product<'a> {
    fn new(
        cpu: &'a Cpu,
        x: &'a Rows,
        linear: &'a Linear<Cpu>,
        segments: &'a [Segment],
    ) -> Result<Self, BackendError> {
        let weight: &Matrix = &linear.weight;
        let parts = segments.iter().map(|segment| part(x, linear, segment)).collect::<Result<Vec<_>, _>>()?;
        let mut sums = vec![Vec::new(); x.len()];
        for part in &parts {
            for row in part.rows.clone() {
                sums[row] = block_sums(weight, x.row(row), part.active.inp);
            }
        }
        let shrunk = shrink(cpu, x, &parts);
        Ok(Self { cpu, x, weight, bias: linear.bias.as_deref(), parts, sums, shrunk })
    }

    fn run(&self) -> Rows {
        let mut y = Rows::zeros(self.x.len(), self.weight.rows());
        let columns = Columns::of(&mut y);
        self.cpu.each(self.weight.rows().div_ceil(PANEL), |panel| {
            for part in &self.parts {
                let kept = kept(part.active.out, panel);
                if kept == 0 {
                    continue;
                }
                for rows in chunks(&part.rows) {
                    for (row, lanes) in rows.clone().zip(self.panel(part, panel, &rows)) {
                        columns.write(row, panel * PANEL, &lanes[..kept]);
                    }
                }
            }
        });
        y
    }

    /// The panel's outputs for some rows of one part: base, bias and adapter.
    fn panel(&self, part: &Part<'_>, panel: usize, rows: &Range<usize>) -> Vec<Lanes> {
        let mut start = [0.0; PANEL];
        if let Some(bias) = self.bias {
            let bias = &bias[panel * PANEL..bias.len().min((panel + 1) * PANEL)];
            start[..bias.len()].copy_from_slice(bias);
        }
        let mut lanes = vec![start; rows.len()];
        let x = rows.clone().map(|r| self.x.row(r)).collect::<Vec<_>>();
        let sums = rows.clone().map(|r| self.sums[r].as_slice()).collect::<Vec<_>>();
        let tile = Tile { matrix: self.weight, panel, inp: part.active.inp, x: &x, sums: &sums };
        self.cpu.kernel.accumulate(&tile, &mut lanes);
        if let Some(adapter) = part.adapter {
            let shrunk = rows.clone().map(|r| self.shrunk.row(r)).collect::<Vec<_>>();
            let tile = Tile { matrix: &adapter.b, panel, inp: part.active.rank, x: &shrunk, sums: &sums };
            self.cpu.kernel.accumulate(&tile, &mut lanes);
        }
        lanes
    }
}

/// Checks one segment against the Linear.
fn part<'a>(x: &Rows, linear: &'a Linear<Cpu>, segment: &Segment) -> Result<Part<'a>, BackendError> {
    let weight: &Matrix = &linear.weight;
    let active = segment.selection.shape.linears.get(linear.index).copied();
    let adapter = linear.adapters.get(segment.selection.adapter).and_then(Option::as_ref);
    let fits = |a: &ActiveLinear| {
        let adapter = adapter.is_none_or(|adapter| {
            a.rank <= adapter.a.rows().min(adapter.b.columns())
                && a.inp <= adapter.a.columns()
                && a.out <= adapter.b.rows()
        });
        a.out <= weight.rows() && a.inp <= weight.columns().min(x.width()) && adapter
    };
    match active.filter(fits).filter(|_| segment.rows.end <= x.len()) {
        Some(active) => Ok(Part { rows: segment.rows.clone(), active, adapter }),
        None => Err(BackendError::Shape {
            operation: "linear",
            expected: format!(
                "a prefix of ({}, {}) for rows of {} of {}",
                weight.rows(),
                weight.columns(),
                x.width(),
                x.len()
            ),
            got: format!("{active:?} for rows {:?}", segment.rows),
        }),
    }
}

/// `s A[:r,:i] x` for every row with an adapter: `(T, R)`.
fn shrink(cpu: &Cpu, x: &Rows, parts: &[Part<'_>]) -> Rows {
    let rank = parts.iter().filter_map(|p| p.adapter.map(|a| a.a.rows())).max();
    let Some(rank) = rank else { return Rows::zeros(0, 1) };
    let mut shrunk = Rows::zeros(x.len(), rank);
    let columns = Columns::of(&mut shrunk);
    let work = parts.iter().flat_map(|part| chunks(&part.rows).map(move |rows| (part, rows)));
    let work = work.collect::<Vec<_>>();
    let none: &[f32] = &[];
    let run = |(part, rows): &(&Part<'_>, Range<usize>)| {
        let Some(adapter) = part.adapter else { return };
        let x = rows.clone().map(|r| x.row(r)).collect::<Vec<_>>();
        let sums = vec![none; x.len()];
        for panel in 0..part.active.rank.div_ceil(PANEL) {
            let mut lanes = vec![[0.0; PANEL]; x.len()];
            let tile = Tile { matrix: &adapter.a, panel, inp: part.active.inp, x: &x, sums: &sums };
            cpu.kernel.accumulate(&tile, &mut lanes);
            let kept = kept(part.active.rank, panel);
            for (row, mut lanes) in rows.clone().zip(lanes) {
                lanes.iter_mut().for_each(|l| *l *= adapter.scale);
                columns.write(row, panel * PANEL, &lanes[..kept]);
            }
        }
    };
    cpu.each(work.len(), |i| run(&work[i]));
    shrunk
}

/// Outputs of this panel below `out`.
fn kept(out: usize, panel: usize) -> usize {
    out.saturating_sub(panel * PANEL).min(PANEL)
}

fn chunks(rows: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = rows.end;
    rows.clone().step_by(ROWS).map(move |start| start..(start + ROWS).min(end))
}

/// Rows that several threads fill, each its own columns of its own rows.
struct Columns {
    values: *mut f32,
    length: usize,
    width: usize,
}

// SAFETY: `write` is the only access, and its callers give every (row, column) to one thread only: work is cut by panels
// (columns) or by chunks of rows, and neither overlaps.
unsafe impl Sync for Columns {}

impl Columns {
    /// The rows must not be used before the work is done; `Cpu::each` returns only then.
    fn of(rows: &mut Rows) -> Self {
        let width = rows.width();
        let values = rows.values_mut();
        Self { values: values.as_mut_ptr(), length: values.len(), width }
    }

    fn write(&self, row: usize, column: usize, values: &[f32]) {
        let at = row * self.width + column;
        assert!(column + values.len() <= self.width && at + values.len() <= self.length);
        // SAFETY: within the buffer, as just checked; nobody else writes or reads these numbers meanwhile, see `Sync`.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.values.add(at), values.len()) };
    }
}
