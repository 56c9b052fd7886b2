//! What a kernel is called with.

use super::ahead::Ahead;
use super::inputs::Inputs;
use super::matrix::{BlockPanels, Matrix, Panels};
use super::vector::{PANEL, Vector};
use std::ops::Range;

/// The most rows that one tile holds: enough that loading a part of a panel into the first-level cache costs little
/// beside its products.
pub(super) const TILE: usize = 48;

/// Neighbouring panels times some rows.
pub(super) struct Tile<'a> {
    pub(super) matrix: &'a Matrix,
    pub(super) panels: Range<usize>,
    pub(super) inputs: &'a Inputs<'a>,
    /// Which of the inputs is row 0.
    pub(super) first: usize,
    /// The rows, at most [`TILE`].
    pub(super) rows: &'a [TileRow],
    /// How many inputs are active: of all rows, or each row's own number, which then falls from row to row.
    pub(super) active: Option<usize>,
    /// What is asked of memory meanwhile: what is left of this, evenly in the time of so many panels, this tile's being the
    /// first of them.
    pub(super) ahead: &'a Ahead,
    pub(super) spread: Option<usize>,
    /// Where reading goes on after these panels, if not behind the last. Few rows ask for it.
    pub(super) then: Option<usize>,
    /// For quantised weights: [`Matrix::quads`] of the first row's inputs.
    pub(super) quads: &'a [u8],
}

impl Tile<'_> {
    /// Whether few rows, see [`Kernel::few`], take the same inputs, so that they go through its panels together.
    pub(super) fn is_straight<V: Vector>(&self) -> bool {
        let same = || self.rows.first().map(|row| row.inp) == self.rows.last().map(|row| row.inp);
        (1..=V::FEW).contains(&self.rows.len()) && (self.active.is_some() || same())
    }

    /// [`Self::spread`], counted from this panel on.
    pub(super) fn spread_from(&self, panel: usize) -> Option<usize> {
        self.spread.map(|panels| panels.saturating_sub(panel - self.panels.start).max(1))
    }

    /// Units that hold the first `inp` inputs.
    pub(super) fn units(&self, inp: usize) -> usize {
        let columns = self.matrix.columns();
        match &self.matrix.panels {
            // Blocks in an order of their own: each has some of every row's inputs.
            Panels::Blocks(BlockPanels { places: Some(_), .. }) if inp > 0 => columns.div_ceil(PANEL),
            panels => inp.min(columns).div_ceil(panels.unit()),
        }
    }
}

/// A row's part in a tile.
#[derive(Debug, Clone, Copy)]
pub(super) struct TileRow {
    /// Its place in the plan.
    pub(super) place: usize,
    pub(super) row: usize,
    pub(super) inp: usize,
}
