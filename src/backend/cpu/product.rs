//! The elastic low-rank product and the gated MLP over a mixed batch.
//!
//! One operation is one run of the team in phases with a barrier between them: prepare the rows (norm, rounding), shrink
//! them to the adapters' ranks, multiply panel by panel. A panel's weights serve the rows of all segments that reach it
//! before the next panel is touched, so each weight is read from memory once a step, whatever sub-networks the rows use;
//! and to the kernel an adapter's B is only a few more inputs of the panel.
#![allow(unsafe_code)]

use super::ahead::{Operation, Runs};
use super::ask::Reading;
use super::group::{Group, GroupBuffers, Source, unfit};
use super::inputs::Inputs;
use super::kernel::{Lanes, Loops};
use super::matrix::Matrix;
use super::multiply::{Work, panels_at_once};
use super::plan::{Plan, RowPlan, size};
use super::shared::Shared;
use super::team::Member;
use super::tile::{TILE, Tile, TileRow};
use super::vector::PANEL;
use super::{Cpu, Rows};
use crate::backend::{BackendError, GatedMlp, Linear, Norm, Segment};

/// Buffers that operations use one after the other.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    first: GroupBuffers,
    second: GroupBuffers,
    gated: Vec<f32>,
}

/// Each Linear of the same rows, which may be normed first.
pub(super) fn linears<const N: usize>(
    cpu: &Cpu,
    x: &Rows,
    norm: Option<Norm<'_, Cpu>>,
    linears: [&Linear<Cpu>; N],
    segments: &[Segment],
) -> Result<[Rows; N], BackendError> {
    let plans = linears.iter().map(|linear| Plan::new(linear, size(x), segments));
    let plans = plans.collect::<Result<Vec<_>, _>>()?;
    let mut scratch = cpu.scratch();
    let group = Group::new(cpu, &plans, false, x.len(), &mut scratch.first)?;
    let mut ys = linears.map(|linear| cpu.rows(x.len(), linear.weight.rows()));
    let outputs = ys.each_mut().map(Columns::new);
    cpu.team.run(|member| {
        group.prepare(member, &Source::Rows(x), norm);
        group.shrink(member);
        let clear =
            |plan: usize, panel, place: usize| outputs[plan].clear(plans[plan].rows[place].row, panel);
        group.multiply(member, clear, |work| {
            let (columns, plan) = (&outputs[work.plan], &plans[work.plan]);
            cpu.kernel.vectorised(Put::<false> { columns, plan, work });
        });
    });
    Ok(ys)
}

/// `x + linear(input)`
pub(super) fn linear_onto(
    cpu: &Cpu,
    mut x: Rows,
    input: &Rows,
    linear: &Linear<Cpu>,
    segments: &[Segment],
) -> Result<Rows, BackendError> {
    super::expect("linear", "columns to add to", linear.weight.rows(), x.width())?;
    super::expect("linear", "rows to add to", input.len(), x.len())?;
    let plans = [Plan::new(linear, size(input), segments)?];
    let mut scratch = cpu.scratch();
    let group = Group::new(cpu, &plans, false, input.len(), &mut scratch.first)?;
    let output = Columns::new(&mut x);
    cpu.team.run(|member| {
        group.prepare(member, &Source::Rows(input), None);
        group.shrink(member);
        add_to(&group, member, &output);
    });
    Ok(x)
}

/// `onto + down(silu(gate(x)) * up(x))`, `x` normed first where there is a norm. Without `x`, `onto` takes its place;
/// without `onto`, zero.
pub(super) fn gated_mlp(
    cpu: &Cpu,
    onto: Option<Rows>,
    x: Option<&Rows>,
    norm: Option<Norm<'_, Cpu>>,
    mlp: &GatedMlp<Cpu>,
    segments: &[Segment],
) -> Result<Rows, BackendError> {
    let hidden = mlp.down.weight.rows();
    let mut output = match (onto, x) {
        (Some(rows), _) => rows,
        (None, Some(x)) => Rows::zeros(x.len(), hidden),
        (None, None) => return Err(unfit_mlp("rows", "none".into())),
    };
    super::expect("gated mlp", "columns to add to", hidden, output.width())?;
    let (length, width) = x.map_or(size(&output), size);
    super::expect("gated mlp", "rows to add to", length, output.len())?;
    let (plans, down) = gated_plans(mlp, (length, width), segments)?;
    let channels = mlp.gate.weight.rows();
    let mut scratch = cpu.scratch();
    let Scratch { first, second, gated } = &mut *scratch;
    let group = Group::new(cpu, &plans, true, length, first)?;
    let last = Group::new(cpu, &down, false, length, second)?;
    let stride = apart(channels);
    if gated.len() < length * stride {
        gated.resize(length * stride, 0.0);
    }
    let (gated, columns) = (Shared::new(&mut gated[..length * stride]), Columns::new(&mut output));
    // What is added to is read by the first phase of all and written by the last, with barriers between.
    let source = x.map_or(Source::Shared(&columns.values, hidden), Source::Rows);
    cpu.team.run(|member| {
        group.prepare(member, &source, norm);
        group.shrink(member);
        group.multiply_gated(member, &gated, (channels, stride));
        member.barrier();
        last.prepare(member, &Source::Shared(&gated, stride), None);
        last.shrink(member);
        add_to(&last, member, &columns);
    });
    Ok(output)
}

/// Floats from one row to the next of a buffer that is written panel by panel, many rows of one panel after the other: an odd
/// number of cache lines, since lines that lie a multiple of a page apart fall into the same few places of a cache.
fn apart(width: usize) -> usize {
    const LINE: usize = super::ahead::LINE / size_of::<f32>();
    (width.div_ceil(LINE) | 1) * LINE
}

/// The plans of gate and up, and that of down.
fn gated_plans<'a>(
    mlp: &'a GatedMlp<Cpu>,
    x: (usize, usize),
    segments: &[Segment],
) -> Result<([Plan<'a>; 2], [Plan<'a>; 1]), BackendError> {
    let plans = [Plan::new(&mlp.gate, x, segments)?, Plan::new(&mlp.up, x, segments)?];
    let down = [Plan::new(&mlp.down, (x.0, mlp.gate.weight.rows()), segments)?];
    for segment in segments {
        // Within bounds: the plans have looked.
        let [gate, up, down] =
            [&mlp.gate, &mlp.up, &mlp.down].map(|l| segment.selection.shape.linears[l.index]);
        if (gate.out, gate.inp) != (up.out, up.inp) || down.inp > gate.out {
            let got = format!("{gate}, {up} and {down}");
            return Err(unfit_mlp("gate and up of one size, and a down no wider", got));
        }
    }
    Ok((plans, down))
}

fn unfit_mlp(expected: &str, got: String) -> BackendError {
    BackendError::Shape { operation: "gated mlp", expected: expected.into(), got }
}

/// `x W^T` for all rows at full size.
pub(super) fn plain(cpu: &Cpu, x: &Rows, weight: &Matrix) -> Result<Rows, BackendError> {
    let mut scratch = cpu.scratch();
    let inputs = Inputs::new(&mut scratch.first.inputs, x.len(), weight.columns(), std::iter::once(weight));
    let inputs = inputs.ok_or_else(|| unfit("logits"))?;
    let mut y = cpu.rows(x.len(), weight.rows());
    let output = Columns::new(&mut y);
    let (columns, quads) = (weight.columns(), weight.quads(weight.columns()));
    let rows = (0..x.len()).map(|row| TileRow { place: row, row, inp: columns }).collect::<Vec<_>>();
    let (preparing, panels) = (cpu.team.pieces(x.len()), cpu.team.pieces(weight.rows().div_ceil(PANEL)));
    let own = |thread| panels.start_of(thread)..panels.start_of(thread + 1);
    let first = |thread| [Runs::default(), weight.reading(own(thread), columns)];
    let start = weight.addresses(0).start;
    let operation = Operation { start, adapter: 0, panels: panels.count(), inputs: columns };
    let next = cpu.order.follow(operation, || (0..cpu.threads).map(first).collect());
    let few = x.len() <= cpu.kernel.few();
    cpu.team.run(|member| {
        member.share(&preparing, |rows| {
            // SAFETY: each row is one piece, and nobody reads before the barrier.
            rows.for_each(|row| unsafe { inputs.fill(cpu.kernel, row, x.row(row)) });
        });
        member.barrier();
        let mut lanes = Vec::new();
        let thread = member.index();
        let reading = Reading { few, pieces: &panels, thread, next: next.as_ref().map(|next| next[thread]) };
        member.share(&panels, |range| {
            let at_once = panels_at_once(cpu.kernel, x.len());
            for start in range.clone().step_by(at_once) {
                let strip = start..range.end.min(start + at_once);
                let ask = reading.asking(strip.clone(), || weight.addresses(strip.end));
                ask.begin(member.ahead());
                for rows in rows.chunks(TILE) {
                    lanes.resize(rows.len() * strip.len(), [0.0; PANEL]);
                    lanes.fill([0.0; PANEL]);
                    let tile = Tile {
                        matrix: weight,
                        panels: strip.clone(),
                        inputs: &inputs,
                        first: 0,
                        rows,
                        active: Some(columns),
                        ahead: member.ahead(),
                        spread: Some(ask.spread),
                        then: ask.then,
                        quads: &quads,
                    };
                    // SAFETY: all rows are filled, before the barrier.
                    unsafe { cpu.kernel.accumulate(&tile, &mut lanes) };
                    for (panel, lanes) in strip.clone().zip(lanes.chunks_exact(rows.len())) {
                        for (row, lanes) in rows.iter().zip(lanes) {
                            let to = output.panel(row.row, panel);
                            to.copy_from_slice(&lanes[..to.len()]);
                        }
                    }
                }
            }
        });
    });
    Ok(y)
}

/// Rows that several threads fill panel by panel.
struct Columns<'a> {
    values: Shared<'a, f32>,
    width: usize,
}

impl<'a> Columns<'a> {
    fn new(rows: &'a mut Rows) -> Self {
        Self { width: rows.width(), values: Shared::new(rows.values_mut()) }
    }

    #[expect(clippy::mut_from_ref, reason = "each panel of a row is in one thread's hands")]
    #[inline(always)]
    fn panel(&self, row: usize, panel: usize) -> &mut [f32] {
        let start = row * self.width + panel * PANEL;
        let end = ((row + 1) * self.width).min(start + PANEL);
        // SAFETY: work is cut by panels and rows, each (panel, row) is in one piece, and nobody reads before the run ends.
        unsafe { self.values.part(start..end) }
    }

    fn clear(&self, row: usize, panel: usize) {
        self.panel(row, panel).fill(0.0);
    }
}

/// `output += y` of the group's only plan.
fn add_to(group: &Group<'_>, member: &Member<'_>, output: &Columns<'_>) {
    group.multiply(
        member,
        |_, _, _| {},
        |work| {
            let plan = &group.plans[work.plan];
            group.cpu.kernel.vectorised(Put::<true> { columns: output, plan, work });
        },
    );
}

/// Writes or adds what some rows have of one panel: as many outputs as are active, then zeros.
struct Put<'a, const ADD: bool> {
    columns: &'a Columns<'a>,
    plan: &'a Plan<'a>,
    work: Work<'a>,
}

impl<const ADD: bool> Loops for Put<'_, ADD> {
    #[inline(always)]
    fn run(self) {
        let Self { columns, plan, work: Work { panel, rows, lanes, .. } } = self;
        for (row, lanes) in rows.iter().zip(lanes) {
            let RowPlan { row, active, .. } = plan.rows[row.place];
            let to = columns.panel(row, panel);
            let kept = to.len().min(active.out - panel * PANEL);
            match to.first_chunk_mut::<PANEL>() {
                Some(to) if kept == PANEL => put::<ADD>(to, lanes),
                _ => {
                    let (to, rest) = to.split_at_mut(kept);
                    put::<ADD>(to, lanes);
                    if !ADD {
                        rest.fill(0.0);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn put<const ADD: bool>(to: &mut [f32], lanes: &Lanes) {
    for (to, lane) in to.iter_mut().zip(lanes) {
        *to = if ADD { *to + lane } else { *lane };
    }
}
