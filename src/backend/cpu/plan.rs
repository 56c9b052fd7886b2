//! What each row of a batch needs of one Linear.

use super::matrix::{Matrix, Quads};
use super::tile::TileRow;
use super::vector::PANEL;
use super::{Cpu, Rows};
use crate::backend::{Adapter, BackendError, Linear, Segment};
use crate::supernet::ActiveLinear;
use std::ops::Range;

/// One Linear over all rows of a batch.
pub(super) struct Plan<'a> {
    pub(super) linear: &'a Linear<Cpu>,
    /// All rows, those with more active inputs first, so that the rows that reach an input are the first ones.
    pub(super) rows: Vec<RowPlan>,
    /// By distinct number of active inputs: [`Matrix::quads`].
    quads: Vec<(usize, Quads<'a>)>,
    /// The super-adapters in use.
    pub(super) adapters: Vec<AdapterPlan<'a>>,
    /// Panels that some row reaches; those after them are zero for all.
    pub(super) reached: usize,
    /// Panels that all rows reach.
    pub(super) shared: usize,
    /// Whether all rows have the same super-adapter, or none.
    alike: bool,
}

/// One row of a [`Plan`].
#[derive(Clone, Copy)]
pub(super) struct RowPlan {
    pub(super) row: usize,
    pub(super) active: ActiveLinear,
    /// Which of [`Plan::adapters`].
    adapter: Option<usize>,
}

/// What the rows of one super-adapter have in common.
pub(super) struct AdapterPlan<'a> {
    pub(super) adapter: &'a Adapter<Cpu>,
    /// The highest active rank.
    pub(super) rank: usize,
    /// [`Matrix::quads`] of B up to that rank.
    pub(super) quads: Quads<'a>,
}

impl<'a> Plan<'a> {
    /// # Errors
    /// Segments that do not cover the rows in order, or sizes that are no prefix of the weights.
    pub(super) fn new(
        linear: &'a Linear<Cpu>,
        x: (usize, usize),
        segments: &[Segment],
    ) -> Result<Self, BackendError> {
        let (length, _) = x;
        let rows = Vec::with_capacity(length);
        let (quads, adapters) = (Vec::new(), Vec::new());
        let mut plan = Self { linear, rows, quads, adapters, reached: 0, shared: usize::MAX, alike: true };
        for segment in segments {
            let (active, adapter) = part(x, plan.rows.len(), linear, segment)?;
            let panels = active.out.div_ceil(PANEL);
            plan.reached = plan.reached.max(panels);
            plan.shared = plan.shared.min(panels);
            let adapter = adapter.map(|adapter| plan.note(adapter, active.rank));
            plan.alike &= plan.rows.first().is_none_or(|first| first.adapter == adapter);
            plan.rows.extend(segment.rows.clone().map(|row| RowPlan { row, active, adapter }));
            if plan.quads.iter().all(|(inp, _)| *inp != active.inp) {
                plan.quads.push((active.inp, linear.weight.quads(active.inp)));
            }
        }
        if plan.rows.len() != length {
            let (expected, got) = (format!("segments over {length} rows"), plan.rows.len().to_string());
            return Err(BackendError::Shape { operation: "linear", expected, got });
        }
        for adapter in &mut plan.adapters {
            adapter.quads = adapter.adapter.b.quads(adapter.rank);
        }
        if plan.quads.len() > 1 {
            plan.rows.sort_by_key(|row| std::cmp::Reverse(row.active.inp));
        }
        Ok(plan)
    }

    /// The adapter's place in [`Self::adapters`].
    fn note(&mut self, adapter: &'a Adapter<Cpu>, rank: usize) -> usize {
        let known = self.adapters.iter().position(|known| std::ptr::eq(known.adapter, adapter));
        let place = known.unwrap_or_else(|| {
            self.adapters.push(AdapterPlan { adapter, rank, quads: Quads::Of(&[]) });
            self.adapters.len() - 1
        });
        self.adapters[place].rank = self.adapters[place].rank.max(rank);
        place
    }

    /// The row at a place of this plan, for a tile.
    pub(super) fn tile_row(&self, place: usize) -> TileRow {
        let RowPlan { row, active, .. } = self.rows[place];
        TileRow { place, row, inp: active.inp }
    }

    /// The panels beyond those that are reached.
    pub(super) fn unreached(&self) -> Range<usize> {
        self.reached..self.linear.weight.rows().div_ceil(PANEL)
    }

    /// The most inputs that a row has.
    pub(super) fn widest(&self) -> usize {
        self.rows.first().map_or(0, |row| row.active.inp)
    }

    /// The weight and the adapters' A: what takes this Linear's inputs.
    pub(super) fn readers(&self) -> impl Iterator<Item = &'a Matrix> {
        let weight: &'a Matrix = &self.linear.weight;
        std::iter::once(weight).chain(self.adapters.iter().map(|plan| &plan.adapter.a))
    }

    /// The highest full rank in use, 0 without an adapter.
    pub(super) fn rank(&self) -> usize {
        self.adapters.iter().map(|plan| plan.adapter.b.columns()).max().unwrap_or(0)
    }

    pub(super) fn quads(&self, inp: usize) -> &[u8] {
        self.quads.iter().find(|(known, _)| *known == inp).map_or(&[], |(_, quads)| quads)
    }

    /// Cuts rows into runs of one super-adapter, and leaves out those without any: a range of `rows` and what the run has in
    /// common.
    pub(super) fn runs<'p>(
        &'p self,
        rows: &'p [TileRow],
    ) -> impl Iterator<Item = (Range<usize>, &'p AdapterPlan<'a>)> + 'p {
        let mut start = 0;
        let runs = std::iter::from_fn(move || {
            let first = self.rows[rows.get(start)?.place].adapter;
            let same = |row: &&TileRow| self.rows[row.place].adapter == first;
            let length = if self.alike { rows.len() } else { rows[start..].iter().take_while(same).count() };
            let run = start..start + length;
            start = run.end;
            Some((run, first))
        });
        runs.filter_map(|(run, adapter)| Some((run, &self.adapters[adapter?])))
    }
}

/// Checks one segment against the Linear.
fn part<'a>(
    (length, width): (usize, usize),
    start: usize,
    linear: &'a Linear<Cpu>,
    segment: &Segment,
) -> Result<(ActiveLinear, Option<&'a Adapter<Cpu>>), BackendError> {
    let weight: &Matrix = &linear.weight;
    let active = segment.selection.shape.linears.get(linear.index).copied();
    let adapter = linear.adapters.get(segment.selection.adapter).and_then(Option::as_ref);
    let fits = |a: &ActiveLinear| {
        let adapter = adapter.is_none_or(|adapter| {
            a.rank <= adapter.a.rows().min(adapter.b.columns())
                && a.inp <= adapter.a.columns()
                && a.out <= adapter.b.rows()
        });
        a.out <= weight.rows() && a.inp <= weight.columns().min(width) && adapter
    };
    let rows = &segment.rows;
    match active.filter(fits).filter(|_| rows.start == start && rows.end <= length) {
        Some(active) => Ok((active, adapter)),
        None => Err(BackendError::Shape {
            operation: "linear",
            expected: format!(
                "a prefix of ({}, {}) for rows of {width} from {start} on, of {length}",
                weight.rows(),
                weight.columns(),
            ),
            got: format!("{active:?} for rows {rows:?}"),
        }),
    }
}

/// The activations' size, for [`Plan::new`].
pub(super) fn size(x: &Rows) -> (usize, usize) {
    (x.len(), x.width())
}
