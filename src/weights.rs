//! Weights on their way from a file to a backend: plain numbers in host memory, as precise as the file has them.
//!
//! `artifact` makes them, `backend` takes them, and neither knows the other; so they stand below both.

use half::bf16;
use std::ops::Range;
use std::sync::Arc;

/// A matrix in host memory, row-major.
#[derive(Debug, Clone)]
pub struct HostMatrix {
    /// The tensor's name, for messages and for training checkpoints.
    pub name: String,
    pub rows: usize,
    pub columns: usize,
    pub data: HostData,
}

/// A norm's weight or a bias in host memory, `(n)`.
#[derive(Debug, Clone)]
pub struct HostVector {
    pub name: String,
    pub data: Vec<f32>,
}

/// The values of a [`HostMatrix`], as precise as the file has them.
#[derive(Debug, Clone, PartialEq)]
pub enum HostData {
    F32(Vec<f32>),
    Bf16(Bf16Values),
    /// Holds Q8_0, Q4_0 and Q4_1 exactly; `columns` is a multiple of 32.
    Blocks(Blocks),
}

/// Numbers in bf16, in memory of their own or where somebody else keeps them: a base of many gigabytes is not copied on its way.
#[derive(Clone)]
pub enum Bf16Values {
    Owned(Vec<bf16>),
    Kept(Arc<dyn AsRef<[bf16]> + Send + Sync>),
}

impl std::ops::Deref for Bf16Values {
    type Target = [bf16];

    fn deref(&self) -> &[bf16] {
        match self {
            Self::Owned(values) => values,
            Self::Kept(values) => (**values).as_ref(),
        }
    }
}

impl PartialEq for Bf16Values {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl From<Vec<bf16>> for Bf16Values {
    fn from(values: Vec<bf16>) -> Self {
        Self::Owned(values)
    }
}

impl FromIterator<bf16> for Bf16Values {
    fn from_iter<I: IntoIterator<Item = bf16>>(values: I) -> Self {
        Self::Owned(values.into_iter().collect())
    }
}

impl std::fmt::Debug for Bf16Values {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// Blocks of 32 consecutive values of one row: `value = scale * quant + minimum`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Blocks {
    /// `(rows, columns)`
    pub quants: Vec<i8>,
    /// `(rows, columns / 32)`
    pub scales: Vec<f32>,
    /// `(rows, columns / 32)`; `None` means all zero.
    pub minimums: Option<Vec<f32>>,
    /// `(columns)`: the matrix's column that stands at each place of a row of `quants`; `None` where they stand in order.
    /// Within a block they rise, so that a prefix of the matrix's columns is a prefix of every block.
    pub places: Option<Vec<u32>>,
}

/// Values that share one scale in [`HostData::Blocks`].
pub const BLOCK: usize = 32;

impl HostMatrix {
    /// Row `i` of the result is row `order[i]` of `self`; exact for every kind of data.
    ///
    /// `order` is a permutation of `0..rows`.
    pub fn permute_rows(self, order: &[usize]) -> Self {
        let data = match &self.data {
            HostData::F32(values) => HostData::F32(gather_rows(values, self.columns, order)),
            HostData::Bf16(values) => HostData::Bf16(gather_rows(values, self.columns, order).into()),
            HostData::Blocks(blocks) => {
                let per_row = self.columns / BLOCK;
                HostData::Blocks(Blocks {
                    quants: gather_rows(&blocks.quants, self.columns, order),
                    scales: gather_rows(&blocks.scales, per_row, order),
                    minimums: blocks.minimums.as_ref().map(|m| gather_rows(m, per_row, order)),
                    places: blocks.places.clone(),
                })
            }
        };
        Self { data, ..self }
    }

    /// Column `i` of the result is column `order[i]` of `self`; exact for every kind of data.
    ///
    /// A block's values share a scale and must stay together, so blocks keep their columns, sorted within each, and
    /// remember which they are (see [`Blocks::places`]).
    ///
    /// `order` is a permutation of `0..columns`.
    pub fn permute_columns(self, order: &[usize]) -> Self {
        let data = match self.data {
            HostData::F32(values) => HostData::F32(gather_columns(&values, self.columns, order)),
            HostData::Bf16(values) => HostData::Bf16(gather_columns(&values, self.columns, order).into()),
            HostData::Blocks(blocks) => HostData::Blocks(blocks.permute_columns(order)),
        };
        Self { data, ..self }
    }

    /// The first `rows` and `columns`, in f32; at most as many as there are.
    pub fn prefix(self, rows: usize, columns: usize) -> Self {
        let (name, full) = (self.name.clone(), self.columns);
        let mut values = self.into_f32();
        values.truncate(rows * full);
        if columns < full {
            // In place: a row never moves to the right.
            for row in 0..rows {
                values.copy_within(row * full..row * full + columns, row * columns);
            }
            values.truncate(rows * columns);
        }
        Self { name, rows, columns, data: HostData::F32(values) }
    }

    /// `self + scale b a` in f32; `b (rows, r)`, `a (r, columns)`, as the caller has checked. `keep_zeros`: what is 0 in `self`
    /// stays so.
    pub fn plus_product(self, scale: f32, b: &Self, a: &Self, keep_zeros: bool) -> Self {
        let (name, rows, columns) = (self.name.clone(), self.rows, self.columns);
        let (mut sums, b_values, a_values) = (self.into_f32(), b.to_f32(), a.to_f32());
        let of_rows = sums.chunks_exact_mut(columns.max(1)).zip(b_values.chunks_exact(b.columns.max(1)));
        let mut zeros = Vec::new();
        for (sums, b) in of_rows {
            zeros.clear();
            zeros.extend((0..columns).filter(|&column| keep_zeros && sums[column] == 0.0));
            for (a, b) in a_values.chunks_exact(columns.max(1)).zip(b) {
                sums.iter_mut().zip(a).for_each(|(sum, a)| *sum += scale * b * a);
            }
            zeros.iter().for_each(|&column| sums[column] = 0.0);
        }
        Self { name, rows, columns, data: HostData::F32(sums) }
    }

    /// As [`Self::to_f32`], without a copy of what is f32 already.
    pub fn into_f32(self) -> Vec<f32> {
        match self.data {
            HostData::F32(values) => values,
            _ => self.to_f32(),
        }
    }

    /// All values as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        self.rows_to_f32(0..self.rows)
    }

    /// The values of some rows as f32, row-major.
    pub fn rows_to_f32(&self, rows: Range<usize>) -> Vec<f32> {
        let values = rows.start * self.columns..rows.end * self.columns;
        match &self.data {
            HostData::F32(all) => all[values].to_vec(),
            HostData::Bf16(all) => all[values].iter().map(|v| v.to_f32()).collect(),
            HostData::Blocks(blocks) => blocks.to_f32(self.columns, values),
        }
    }
}

impl Blocks {
    fn permute_columns(self, order: &[usize]) -> Self {
        let mut new_column = vec![0; order.len()];
        for (new, &old) in order.iter().enumerate() {
            new_column[old] = new as u32;
        }
        let column = |place: usize| self.places.as_ref().map_or(place, |places| places[place] as usize);
        // By place in the result: the place in `self` that it comes from, and its column.
        let mut sorted = (0..order.len()).map(|p| (p, new_column[column(p)])).collect::<Vec<_>>();
        for block in sorted.chunks_mut(BLOCK) {
            block.sort_unstable_by_key(|&(_, column)| column);
        }
        let from = sorted.iter().map(|&(place, _)| place).collect::<Vec<_>>();
        Self {
            quants: gather_columns(&self.quants, order.len(), &from),
            places: Some(sorted.into_iter().map(|(_, column)| column).collect()),
            ..self
        }
    }

    /// Of some rows, given by where their values are among all.
    fn to_f32(&self, columns: usize, values: Range<usize>) -> Vec<f32> {
        let value = |(i, &q): (usize, &i8)| {
            let block = i / BLOCK;
            let minimum = self.minimums.as_ref().map_or(0.0, |m| m[block]);
            self.scales[block] * f32::from(q) + minimum
        };
        let quants = &self.quants[values.clone()];
        let in_place = quants.iter().zip(values.start..).map(|(q, i)| value((i, q)));
        let Some(places) = &self.places else { return in_place.collect() };
        let mut values = vec![0.0; quants.len()];
        for (i, value) in in_place.enumerate() {
            values[i / columns * columns + places[i % columns] as usize] = value;
        }
        values
    }
}

fn gather_rows<T: Copy>(values: &[T], columns: usize, order: &[usize]) -> Vec<T> {
    order.iter().flat_map(|&row| &values[row * columns..(row + 1) * columns]).copied().collect()
}

fn gather_columns<T: Copy>(values: &[T], columns: usize, order: &[usize]) -> Vec<T> {
    values.chunks_exact(columns).flat_map(|row| order.iter().map(|&column| row[column])).collect()
}
