//! The header of a GGUF file: metadata, and where each tensor lies.
//!
//! Written here and not taken from candle, whose reader divides by whatever alignment the file states, zero included, and
//! keeps 32 bytes for each value, of which a file may have one in every byte.

use super::ArtifactError;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: HashMap<String, Value>,
    /// The keys in the file's order, each with where its value lies in the file, its type included.
    pub(super) places: Vec<(String, Range<usize>)>,
    pub(super) tensors: HashMap<String, TensorInfo>,
    /// Where the tensors' bytes begin.
    pub(super) data: u64,
}

/// Where a tensor lies; nothing here has been checked against the file's length.
#[derive(Debug)]
pub(super) struct TensorInfo {
    /// Outermost first: the file has it the other way round.
    pub(super) shape: Vec<u64>,
    /// ggml's number of the number format.
    pub(super) format: u32,
    /// From [`Header::data`].
    pub(super) offset: u64,
}

/// A metadata value; what its width in the file was does not matter.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i128),
    Float(f64),
    Flag(bool),
    Text(String),
    List(Vec<Value>),
}

/// Values in one header: a vocabulary of a quarter of a million tokens with its merges has about a million and a half.
const MAX_VALUES: usize = 1 << 22;
/// Lists within lists; no key that we read nests at all.
const MAX_DEPTH: usize = 4;
/// ggml's own.
const MAX_DIMENSIONS: u32 = 4;
const DEFAULT_ALIGNMENT: i128 = 32;

impl Header {
    pub(super) fn parse(path: &Path, file: &[u8]) -> Result<Self, ArtifactError> {
        let mut reader = Reader { path, rest: file, values: 0 };
        if reader.take(4)? != b"GGUF" {
            return Err(reader.wrong("it does not begin with GGUF"));
        }
        let version = reader.u32()?;
        if !(2..=3).contains(&version) {
            return Err(reader.wrong(format!("version {version} is not supported; supported: 2 and 3")));
        }
        let (tensor_count, value_count) = (reader.u64()?, reader.u64()?);
        let mut metadata = HashMap::new();
        let mut places = Vec::new();
        for _ in 0..value_count {
            let key = reader.text()?;
            let start = file.len() - reader.rest.len();
            let kind = reader.u32()?;
            let value = reader.value(kind, 0)?;
            places.push((key.clone(), start..file.len() - reader.rest.len()));
            if metadata.insert(key.clone(), value).is_some() {
                return Err(reader.wrong(format!("key `{}` stands there twice", shortened(&key))));
            }
        }
        let mut tensors = HashMap::new();
        for _ in 0..tensor_count {
            let (name, info) = reader.tensor()?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(reader.wrong(format!("tensor `{}` stands there twice", shortened(&name))));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Integer(n)) if (1..=1 << 20).contains(n) => *n,
            Some(other) => {
                let reason = format!("expected a number from 1 to 2^20, got {}", other.shown());
                return Err(ArtifactError::field(path, "general.alignment", reason));
            }
        } as u64;
        let end = (file.len() - reader.rest.len()) as u64;
        Ok(Self { metadata, places, tensors, data: end.next_multiple_of(alignment) })
    }
}

impl Value {
    /// For an error message: short, whatever the file has.
    pub(super) fn shown(&self) -> String {
        match self {
            Self::Integer(n) => n.to_string(),
            Self::Float(f) => f.to_string(),
            Self::Flag(b) => b.to_string(),
            Self::Text(text) => format!("`{}`", shortened(text)),
            Self::List(values) => format!("a list of {}", values.len()),
        }
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

struct Reader<'a> {
    path: &'a Path,
    rest: &'a [u8],
    /// Values read so far.
    values: usize,
}

impl<'a> Reader<'a> {
    fn wrong(&self, reason: impl std::fmt::Display) -> ArtifactError {
        ArtifactError::wrong(self.path, format!("not a GGUF file: {reason}"))
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], ArtifactError> {
        let split = usize::try_from(count).ok().and_then(|n| self.rest.split_at_checked(n));
        let Some((taken, rest)) = split else {
            let left = self.rest.len();
            return Err(self.wrong(format!("the header wants {count} more bytes, {left} are left")));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ArtifactError> {
        let bytes = self.take(N as u64)?;
        Ok(std::array::from_fn(|i| bytes[i]))
    }

    fn u32(&mut self) -> Result<u32, ArtifactError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, ArtifactError> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, ArtifactError> {
        let length = self.u64()?;
        let bytes = self.take(length)?;
        // The format has no terminators, but files with them exist.
        Ok(String::from_utf8_lossy(bytes).trim_end_matches('\0').to_string())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value, ArtifactError> {
        self.values += 1;
        if self.values > MAX_VALUES {
            return Err(self.wrong(format!("the header has more than {MAX_VALUES} values")));
        }
        Ok(match kind {
            0 => Value::Integer(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Integer(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Flag(self.array::<1>()? != [0]),
            8 => Value::Text(self.text()?),
            9 => Value::List(self.list(depth + 1)?),
            10 => Value::Integer(self.u64()?.into()),
            11 => Value::Integer(i64::from_le_bytes(self.array()?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(self.wrong(format!("there is no value type {other}"))),
        })
    }

    /// Grows as values are found, so that a length that lies allocates nothing.
    fn list(&mut self, depth: usize) -> Result<Vec<Value>, ArtifactError> {
        if depth > MAX_DEPTH {
            return Err(self.wrong(format!("its lists nest more than {MAX_DEPTH} deep")));
        }
        let (kind, length) = (self.u32()?, self.u64()?);
        let mut values = Vec::new();
        for _ in 0..length {
            values.push(self.value(kind, depth)?);
        }
        Ok(values)
    }

    fn tensor(&mut self) -> Result<(String, TensorInfo), ArtifactError> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        if dimensions > MAX_DIMENSIONS {
            let name = shortened(&name);
            return Err(self.wrong(format!("tensor `{name}` has {dimensions} dimensions")));
        }
        let mut shape = (0..dimensions).map(|_| self.u64()).collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        Ok((name, TensorInfo { shape, format: self.u32()?, offset: self.u64()? }))
    }
}
