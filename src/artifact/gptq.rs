//! GPTQ and AWQ: the Linears of a Hugging Face folder in 4 or 8 bits a weight, packed into words of 32 bits.
//!
//! A Linear `N` of `out` outputs and `inp` inputs has no `N.weight` but, with groups of inputs that share a scale for each
//! output:
//!
//! | tensor | GPTQ | AWQ (`gemm`) |
//! |---|---|---|
//! | `N.qweight` | `(inp / per, out)`: `per = 32 / bits` inputs in a word, the first in its lowest bits | `(inp, out / 8)`: outputs in a word, see [`AWQ_PLACES`] |
//! | `N.qzeros` | `(groups, out / per)`, the first in the lowest bits; one too few where `checkpoint_format` is `gptq` | `(groups, out / 8)`, as `qweight` |
//! | `N.scales` | `(groups, out)` | the same |
//! | `N.g_idx` | `(inp)`: each input's group; any with `desc_act`, else in order | none: in order |
//!
//! and `W[o, i] = scales[g, o] * (qweight[i, o] - zeros[g, o])` (AutoGPTQ's `QuantLinear.forward`, AutoAWQ's
//! `WQLinear_GEMM`). Whole blocks of a group become [`Blocks`], which hold this exactly. With `desc_act` a group's inputs stand
//! anywhere, so they are put together and remember where they were ([`Blocks::places`]).

use super::ArtifactError;
use super::config::Fields;
use super::hugging_face::{HuggingFaceFolder, inside};
use super::read_json;
use crate::weights::{BLOCK, Blocks, HostData, HostMatrix};
use half::f16;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Where AutoGPTQ said how a model is packed before config.json did.
const OLDER: &str = "quantize_config.json";

/// AWQ: where in a word an output stands, in numbers of 4 bits from the lowest, by its place among the word's eight.
const AWQ_PLACES: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Outputs that are unpacked together, so that what is read of a row of words is at least a line of the cache.
const ROWS_AT_ONCE: usize = 32;

/// What a folder says of how its Linears are packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Quantisation {
    method: Method,
    bits: usize,
    /// Inputs that share a scale; `None`: all of them.
    group_size: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    /// `zero_below`: how much less than the zero point a file has. `in_order`: `g_idx` may be missing.
    Gptq {
        zero_below: u32,
        in_order: bool,
    },
    Awq,
}

/// Older tools call the file of the tensors `model_file_base_name` of quantize_config.json, with `.safetensors`.
pub(super) fn tensor_file(folder: &Path) -> Result<Option<PathBuf>, ArtifactError> {
    let path = folder.join(OLDER);
    if !path.exists() {
        return Ok(None);
    }
    let json = read_json(&path)?;
    let field = "model_file_base_name";
    let Some(name) = (Fields { path: &path, json: &json }).text(field)? else { return Ok(None) };
    inside(folder, &format!("{name}.safetensors"), &path, field).map(Some)
}

impl Quantisation {
    /// From `quantization_config` of config.json, or quantize_config.json, as older tools wrote it; `None` where there is neither.
    ///
    /// # Errors
    /// A method or a format that we do not read.
    pub(super) fn of_folder(folder: &Path) -> Result<Option<Self>, ArtifactError> {
        let (config, older) = (folder.join("config.json"), folder.join(OLDER));
        let json: Value = read_json(&config)?;
        if let Some(json) = json.get("quantization_config").filter(|v| !v.is_null()) {
            return Self::parse(&Fields { path: &config, json }).map(Some);
        }
        if !older.exists() {
            return Ok(None);
        }
        Self::parse(&Fields { path: &older, json: &read_json(&older)? }).map(Some)
    }

    fn parse(fields: &Fields<'_>) -> Result<Self, ArtifactError> {
        let refused = |field: &str, got: &str, supported: &str| {
            let reason = format!("{got:?} is not supported; supported: {supported}");
            Err(ArtifactError::field(fields.path, field, reason))
        };
        let is_awq = match fields.text("quant_method")?.as_deref() {
            None | Some("gptq") => false,
            Some("awq") => true,
            Some(other) => return refused("quant_method", other, "gptq, awq"),
        };
        let bits = fields.size("bits")?;
        if bits != 4 && (is_awq || bits != 8) {
            let supported = if is_awq { "4" } else { "4, 8" };
            return refused("bits", &bits.to_string(), supported);
        }
        if fields.flag("is_marlin_format", false)? {
            return refused("is_marlin_format", "true", "false");
        }
        let method = if is_awq {
            let version = fields.text("version")?.unwrap_or_default().to_lowercase();
            if !["", "gemm"].contains(&version.as_str()) {
                return refused("version", &version, "gemm");
            }
            if fields.get("zero_point").is_some() && !fields.flag("zero_point", false)? {
                return refused("zero_point", "false", "true");
            }
            Method::Awq
        } else {
            let zero_below = match fields.text("checkpoint_format")?.as_deref() {
                None | Some("gptq") => 1,
                Some("gptq_v2") => 0,
                Some(other) => return refused("checkpoint_format", other, "gptq, gptq_v2"),
            };
            Method::Gptq { zero_below, in_order: !fields.flag("desc_act", false)? }
        };
        let group_size = match fields.get("group_size").and_then(Value::as_i64) {
            Some(-1) => None,
            _ => Some(fields.size("group_size")?).filter(|&size| size > 0),
        };
        if group_size.is_none() && fields.get("group_size").is_some_and(|size| size == 0) {
            return refused("group_size", "0", "-1 (all inputs) and what is above 0");
        }
        Ok(Self { method, bits, group_size })
    }

    /// The weight of `linear`, which has the tensors named above.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape or number format than the above, or a group that there is not.
    pub(super) fn matrix(
        &self,
        folder: &HuggingFaceFolder,
        linear: &str,
        rows: usize,
        columns: usize,
    ) -> Result<HostMatrix, ArtifactError> {
        let packed = self.open(folder, linear, rows, columns)?;
        let data = match packed.places() {
            Some(places) if packed.fits_blocks() => HostData::Blocks(packed.blocks(places)),
            _ => HostData::F32(packed.values()),
        };
        Ok(HostMatrix { name: format!("{linear}.weight"), rows, columns, data })
    }

    /// A Linear's tensors, checked.
    fn open<'a>(
        &self,
        folder: &'a HuggingFaceFolder,
        linear: &str,
        rows: usize,
        columns: usize,
    ) -> Result<Packed<'a>, ArtifactError> {
        let name = |part: &str| format!("{linear}.{part}");
        let per_word = 32 / self.bits;
        let divides = |what: &str, n: usize| {
            let reason = format!("`{linear}`: {n} {what} do not divide into words of {per_word}");
            let path = folder.path_of(&name("qweight"));
            if n.is_multiple_of(per_word) { Ok(()) } else { Err(ArtifactError::wrong(path, reason)) }
        };
        divides("outputs", rows)?;
        if self.method != Method::Awq {
            divides("inputs", columns)?;
        }
        let group_size = self.group_size(columns);
        let groups = columns.div_ceil(group_size);
        let shape = match self.method {
            Method::Gptq { .. } => [columns / per_word, rows],
            Method::Awq => [columns, rows / per_word],
        };
        let quants = folder.words(&name("qweight"), &shape)?;
        let zeros = folder.words(&name("qzeros"), &[groups, rows / per_word])?;
        let scales = folder.numbers(&name("scales"), &[groups, rows])?;
        let group_of = match self.groups_by_column(folder, linear, columns)? {
            Some(groups) => groups,
            None => (0..columns).map(|column| column / group_size).collect(),
        };
        Ok(Packed { how: self.clone(), rows, columns, quants, zeros, scales, group_of })
    }

    fn group_size(&self, columns: usize) -> usize {
        self.group_size.unwrap_or(columns).max(1)
    }

    /// `g_idx`, if there is one, checked.
    pub(super) fn groups_by_column(
        &self,
        folder: &HuggingFaceFolder,
        linear: &str,
        columns: usize,
    ) -> Result<Option<Vec<usize>>, ArtifactError> {
        let (tensor, groups) = (format!("{linear}.g_idx"), columns.div_ceil(self.group_size(columns)));
        match self.method {
            Method::Awq => return Ok(None),
            Method::Gptq { in_order: true, .. } if !folder.has(&tensor) => return Ok(None),
            Method::Gptq { .. } => {}
        }
        let group = |(column, word): (usize, &[u8; 4])| {
            let group = i32::from_le_bytes(*word);
            let known = usize::try_from(group).ok().filter(|&group| group < groups);
            known.ok_or_else(|| {
                let at = format!("tensor `{tensor}`: input {column}");
                let reason = format!("{at}: expected a group below {groups}, got {group}");
                ArtifactError::wrong(folder.path_of(&tensor), reason)
            })
        };
        let words = folder.words(&tensor, &[columns])?;
        words.iter().enumerate().map(group).collect::<Result<_, _>>().map(Some)
    }
}

/// A Linear as its file has it.
struct Packed<'a> {
    how: Quantisation,
    rows: usize,
    columns: usize,
    quants: &'a [[u8; 4]],
    zeros: &'a [[u8; 4]],
    /// `(groups, rows)`
    scales: Vec<f32>,
    /// By column.
    group_of: Vec<usize>,
}

/// Some bits of a word: a matrix's `word` and `shift` are sums of one that its row and one that its column decides.
#[derive(Clone, Copy)]
struct Bits {
    word: usize,
    shift: u32,
}

impl Packed<'_> {
    /// The columns sorted by group, so that each block of 32 is of one group; within a group they rise. `None` where a group
    /// does not fill its blocks.
    fn places(&self) -> Option<Vec<u32>> {
        let mut places = (0..self.columns).map(|column| column as u32).collect::<Vec<_>>();
        places.sort_by_key(|&column| self.group_of[column as usize]);
        let group = |column: &u32| self.group_of[*column as usize];
        let of_one_group = |block: &[u32]| block.iter().all(|column| group(column) == group(&block[0]));
        let fits = self.columns.is_multiple_of(BLOCK) && places.chunks(BLOCK).all(of_one_group);
        fits.then_some(places)
    }

    /// Whether blocks hold the values exactly: scales are kept in f16, quants without their zero points in 8 bits with a sign.
    fn fits_blocks(&self) -> bool {
        let exact = |&scale: &f32| f16::from_f32(scale).to_f32() == scale;
        let symmetric = || {
            let half = 1 << (self.how.bits - 1);
            let of_group = |group| (0..self.rows).all(|row| self.zero(group, row) == half);
            (0..self.groups()).all(of_group)
        };
        self.scales.iter().all(exact) && (self.how.bits == 4 || symmetric())
    }

    fn blocks(&self, places: Vec<u32>) -> Blocks {
        let of_row = self.columns / BLOCK;
        let mut blocks = Blocks {
            quants: vec![0; self.rows * self.columns],
            scales: vec![0.0; self.rows * of_row],
            ..Blocks::default()
        };
        let columns = places.iter().map(|&column| self.column(column as usize)).collect::<Vec<_>>();
        let group_of_block = |block: usize| self.group_of[places[block * BLOCK] as usize];
        let some_rows = blocks.quants.chunks_mut(ROWS_AT_ONCE * self.columns);
        for (first, quants) in (0..self.rows).step_by(ROWS_AT_ONCE).zip(some_rows) {
            let count = quants.len() / self.columns;
            let rows = (first..first + count).map(|row| self.row(row)).collect::<Vec<_>>();
            for (block, columns) in columns.chunks(BLOCK).enumerate() {
                let group = group_of_block(block);
                let mut zeros = [0; ROWS_AT_ONCE];
                for (i, zero) in zeros[..count].iter_mut().enumerate() {
                    *zero = self.zero(group, first + i);
                    blocks.scales[(first + i) * of_row + block] = self.scales[group * self.rows + first + i];
                }
                for (i, &column) in columns.iter().enumerate() {
                    let place = block * BLOCK + i;
                    for (i, (&row, &zero)) in rows.iter().zip(&zeros).enumerate() {
                        // -15..=15 for 4 bits, -128..=127 for 8: `fits_blocks` has looked.
                        quants[i * self.columns + place] = (self.quant(row, column) - zero) as i8;
                    }
                }
            }
        }
        let in_order = places.iter().enumerate().all(|(place, &column)| place == column as usize);
        blocks.places = Some(places).filter(|_| !in_order);
        blocks
    }

    /// All values, row-major.
    fn values(&self) -> Vec<f32> {
        let columns = (0..self.columns).map(|column| self.column(column)).collect::<Vec<_>>();
        let mut values = vec![0.0; self.rows * self.columns];
        for (row, values) in values.chunks_exact_mut(self.columns.max(1)).enumerate() {
            let bits = self.row(row);
            for ((value, &column), &group) in values.iter_mut().zip(&columns).zip(&self.group_of) {
                let quant = self.quant(bits, column) - self.zero(group, row);
                *value = self.scales[group * self.rows + row] * quant as f32;
            }
        }
        values
    }

    fn groups(&self) -> usize {
        self.scales.len() / self.rows.max(1)
    }

    /// A row's part of where its quants stand.
    fn row(&self, row: usize) -> Bits {
        match self.how.method {
            Method::Gptq { .. } => Bits { word: row, shift: 0 },
            Method::Awq => Bits { word: row / 8, shift: AWQ_PLACES[row % 8] * 4 },
        }
    }

    /// A column's part.
    fn column(&self, column: usize) -> Bits {
        let per_word = 32 / self.how.bits;
        match self.how.method {
            Method::Gptq { .. } => Bits {
                word: column / per_word * self.rows,
                shift: (column % per_word * self.how.bits) as u32,
            },
            Method::Awq => Bits { word: column * (self.rows / per_word), shift: 0 },
        }
    }

    fn quant(&self, row: Bits, column: Bits) -> i32 {
        let word = u32::from_le_bytes(self.quants[row.word + column.word]);
        (word >> (row.shift + column.shift) & self.mask()) as i32
    }

    /// The quant that stands for 0.
    fn zero(&self, group: usize, row: usize) -> i32 {
        let per_word = 32 / self.how.bits;
        let word = u32::from_le_bytes(self.zeros[group * (self.rows / per_word) + row / per_word]);
        let (place, zero_below) = match self.how.method {
            Method::Gptq { zero_below, .. } => ((row % per_word * self.how.bits) as u32, zero_below),
            Method::Awq => (AWQ_PLACES[row % per_word] * 4, 0),
        };
        // What is one too few may be so below 0.
        (((word >> place & self.mask()) + zero_below) & self.mask()) as i32
    }

    fn mask(&self) -> u32 {
        (1 << self.how.bits) - 1
    }
}
