//! The pickle in a torch file, as far as a dictionary of tensors needs it: a machine without the means to call anything.
//!
//! Pickle is a language of its own whose programs may import and call any function. This machine knows the opcodes that
//! `torch.save` writes (protocol 2), the few names that tensors are made of, and nothing else; whatever is not among them
//! ends the reading with its name. Objects lie in one list and refer to each other by number, so what a pickle shares is
//! shared, nothing is copied or nested, and memory stays in proportion to the pickle's own bytes.

use std::collections::HashMap;

/// Why a pickle is not a dictionary of tensors; `at` is the byte where the opcode stands.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub(super) enum PickleError {
    #[error("data.pkl ends at byte {at}, in the middle of something")]
    Truncated { at: usize },
    #[error("data.pkl: byte {at}: pickle protocol {got}, expected 2, which torch.save writes")]
    Protocol { at: usize, got: u8 },
    #[error("data.pkl: byte {at}: opcode {opcode:#04x} is not among those of a dictionary of tensors")]
    Opcode { at: usize, opcode: u8 },
    #[error("data.pkl: byte {at}: it asks for `{name}`; only tensors are read, and nothing is ever called")]
    Global { at: usize, name: String },
    #[error("data.pkl: byte {at}: {reason}")]
    Wrong { at: usize, reason: &'static str },
    #[error("data.pkl: expected a dictionary of tensors by name, got {got}")]
    NotTensors { got: String },
}

/// The numbers of a storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    F32,
    F16,
    Bf16,
    /// Known to torch, not to this program.
    Other(&'static str),
}

impl Number {
    pub(super) fn bytes(self) -> Option<usize> {
        match self {
            Self::F32 => Some(4),
            Self::F16 | Self::Bf16 => Some(2),
            Self::Other(_) => None,
        }
    }
}

/// A tensor as the pickle describes it: where its elements lie in which storage. Nothing of it is checked yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PickledTensor {
    pub(super) number: Number,
    /// The storage's file is `data/KEY`.
    pub(super) key: String,
    /// Of the first element.
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    /// In elements, by axis.
    pub(super) strides: Vec<u64>,
}

/// Reads the whole pickle: tensors by name, in the pickle's order.
pub(super) fn tensors(bytes: &[u8]) -> Result<Vec<(String, PickledTensor)>, PickleError> {
    let mut machine = Machine { bytes, at: 0, objects: Vec::new(), stack: Vec::new(), memo: HashMap::new() };
    let root = machine.run()?;
    machine.named_tensors(root)
}

/// An object's place in [`Machine::objects`].
type Id = usize;

#[derive(Debug, Clone)]
enum Object {
    Mark,
    None,
    Bool,
    Int(i64),
    Float,
    Text(String),
    Tuple(Vec<Id>),
    List,
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage { number: Number, key: String },
    Tensor(PickledTensor),
}

/// What a pickle may name.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Number),
}

impl Global {
    fn named(module: &str, name: &str) -> Option<Self> {
        let storage = |number| Some(Self::Storage(number));
        match (module, name) {
            ("collections", "OrderedDict") => Some(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Self::RebuildParameter),
            ("torch", "FloatStorage") => storage(Number::F32),
            ("torch", "HalfStorage") => storage(Number::F16),
            ("torch", "BFloat16Storage") => storage(Number::Bf16),
            ("torch", "DoubleStorage") => storage(Number::Other("f64")),
            ("torch", "LongStorage") => storage(Number::Other("i64")),
            ("torch", "IntStorage") => storage(Number::Other("i32")),
            ("torch", "ShortStorage") => storage(Number::Other("i16")),
            ("torch", "CharStorage") => storage(Number::Other("i8")),
            ("torch", "ByteStorage") => storage(Number::Other("u8")),
            ("torch", "BoolStorage") => storage(Number::Other("bool")),
            _ => None,
        }
    }
}

/// Longer texts are no names of tensors; a message quotes them.
const MAX_NAME: usize = 200;

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    objects: Vec<Object>,
    stack: Vec<Id>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    /// Runs to STOP; the object on top of the stack.
    fn run(&mut self) -> Result<Id, PickleError> {
        loop {
            let at = self.at;
            let opcode = self.take(1)?[0];
            match opcode {
                0x80 => match self.take(1)?[0] {
                    2 => {}
                    got => return Err(PickleError::Protocol { at, got }),
                },
                b'.' => return self.pop(at),
                b'(' => self.push(Object::Mark),
                b'N' => self.push(Object::None),
                0x88 | 0x89 => self.push(Object::Bool),
                b'K' | b'M' | b'J' | 0x8a => {
                    let number = self.integer(at, opcode)?;
                    self.push(Object::Int(number));
                }
                b'G' => {
                    self.take(8)?;
                    self.push(Object::Float);
                }
                b'X' => {
                    let length = self.number::<4>()? as usize;
                    let text = self.text(at, length)?;
                    self.push(Object::Text(text));
                }
                b'c' => self.global(at)?,
                b'}' => self.push(Object::Dict(Vec::new())),
                b']' => self.push(Object::List),
                b')' => self.push(Object::Tuple(Vec::new())),
                0x85..=0x87 => {
                    let from = self.stack.len().checked_sub(usize::from(opcode - 0x84));
                    let items = self.stack.split_off(from.ok_or(empty(at))?);
                    self.push(Object::Tuple(items));
                }
                b't' => {
                    let items = self.pop_to_mark(at)?;
                    self.push(Object::Tuple(items));
                }
                b's' => {
                    let (value, key) = (self.pop(at)?, self.pop(at)?);
                    self.insert(at, &[key, value])?;
                }
                b'u' => {
                    let items = self.pop_to_mark(at)?;
                    self.insert(at, &items)?;
                }
                b'a' | b'e' => self.append(at, opcode)?,
                b'q' | b'r' | b'h' | b'j' => self.memo(at, opcode)?,
                b'Q' => self.storage(at)?,
                b'R' => self.reduce(at)?,
                b'b' => self.build(at)?,
                opcode => return Err(PickleError::Opcode { at, opcode }),
            }
        }
    }

    fn take(&mut self, count: usize) -> Result<&[u8], PickleError> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or(PickleError::Truncated { at: self.bytes.len() })?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// A little-endian number of `N` bytes without a sign.
    fn number<const N: usize>(&mut self) -> Result<u64, PickleError> {
        Ok(self.take(N)?.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn integer(&mut self, at: usize, opcode: u8) -> Result<i64, PickleError> {
        Ok(match opcode {
            b'K' => self.number::<1>()? as i64,
            b'M' => self.number::<2>()? as i64,
            b'J' => i64::from(self.number::<4>()? as u32 as i32),
            _ => {
                // LONG1: as many bytes as it says, the last one's highest bit is the sign.
                let length = usize::from(self.take(1)?[0]);
                if length > 8 {
                    return Err(PickleError::Wrong { at, reason: "a number of more than 64 bits" });
                }
                let bytes = self.take(length)?;
                let fill = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
                let mut all = [fill; 8];
                all[..length].copy_from_slice(bytes);
                i64::from_le_bytes(all)
            }
        })
    }

    fn text(&mut self, at: usize, length: usize) -> Result<String, PickleError> {
        let text = std::str::from_utf8(self.take(length)?).map(String::from);
        text.map_err(|_| PickleError::Wrong { at, reason: "a text that is not UTF-8" })
    }

    fn push(&mut self, object: Object) {
        self.objects.push(object);
        self.stack.push(self.objects.len() - 1);
    }

    fn pop(&mut self, at: usize) -> Result<Id, PickleError> {
        self.stack.pop().ok_or(empty(at))
    }

    fn pop_to_mark(&mut self, at: usize) -> Result<Vec<Id>, PickleError> {
        let is_mark = |id: &Id| matches!(self.objects[*id], Object::Mark);
        let mark = self.stack.iter().rposition(is_mark);
        let mark =
            mark.ok_or(PickleError::Wrong { at, reason: "it goes back to a mark that is not there" })?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn global(&mut self, at: usize) -> Result<(), PickleError> {
        let rest = &self.bytes[self.at..];
        let mut lines = rest.split(|&b| b == b'\n');
        let (Some(module), Some(name), Some(_)) = (lines.next(), lines.next(), lines.next()) else {
            return Err(PickleError::Truncated { at: self.bytes.len() });
        };
        self.at += module.len() + name.len() + 2;
        let [module, name] = [module, name].map(String::from_utf8_lossy);
        let global = Global::named(&module, &name).ok_or_else(|| {
            let name = format!("{module}.{name}").chars().take(MAX_NAME).collect();
            PickleError::Global { at, name }
        })?;
        self.push(Object::Global(global));
        Ok(())
    }

    fn insert(&mut self, at: usize, items: &[Id]) -> Result<(), PickleError> {
        let top = self.stack.last().map(|&id| &mut self.objects[id]);
        let (Some(Object::Dict(entries)), true) = (top, items.len().is_multiple_of(2)) else {
            return Err(PickleError::Wrong { at, reason: "items that go into no dictionary" });
        };
        entries.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        Ok(())
    }

    /// Lists stand beside tensors only, in what torch remembers of versions; what is in them does not matter.
    fn append(&mut self, at: usize, opcode: u8) -> Result<(), PickleError> {
        if opcode == b'a' {
            self.pop(at)?;
        } else {
            self.pop_to_mark(at)?;
        }
        match self.stack.last().map(|&id| &self.objects[id]) {
            Some(Object::List) => Ok(()),
            _ => Err(PickleError::Wrong { at, reason: "items that go into no list" }),
        }
    }

    fn memo(&mut self, at: usize, opcode: u8) -> Result<(), PickleError> {
        let short = matches!(opcode, b'q' | b'h');
        let key = if short { self.number::<1>()? } else { self.number::<4>()? } as u32;
        if matches!(opcode, b'q' | b'r') {
            let top = *self.stack.last().ok_or(empty(at))?;
            self.memo.insert(key, top);
        } else {
            let known = self.memo.get(&key).copied();
            let id = known.ok_or(PickleError::Wrong { at, reason: "it recalls what it never remembered" })?;
            self.stack.push(id);
        }
        Ok(())
    }

    /// BINPERSID: `("storage", type, key, device, length)`.
    fn storage(&mut self, at: usize) -> Result<(), PickleError> {
        let id = self.pop(at)?;
        let wrong = PickleError::Wrong { at, reason: "a reference that is not to a storage" };
        let Object::Tuple(parts) = &self.objects[id] else { return Err(wrong) };
        let &[kind, class, key, _device, _length] = parts.as_slice() else { return Err(wrong) };
        let parts = (&self.objects[kind], &self.objects[class], &self.objects[key]);
        let (Object::Text(kind), Object::Global(Global::Storage(number)), Object::Text(key)) = parts else {
            return Err(wrong);
        };
        // What is long could be repeated by a byte or two each time.
        if kind != "storage" || key.len() > MAX_NAME {
            return Err(wrong);
        }
        let storage = Object::Storage { number: *number, key: key.clone() };
        self.push(storage);
        Ok(())
    }

    /// The three calls that tensors are made with; none of them is one here.
    fn reduce(&mut self, at: usize) -> Result<(), PickleError> {
        let (arguments, function) = (self.pop(at)?, self.pop(at)?);
        let wrong = |reason| PickleError::Wrong { at, reason };
        let Object::Tuple(arguments) = &self.objects[arguments] else {
            return Err(wrong("a call without arguments"));
        };
        let made = match self.objects[function] {
            Object::Global(Global::OrderedDict) if arguments.is_empty() => Object::Dict(Vec::new()),
            Object::Global(Global::RebuildTensor) => {
                let tensor = self.tensor(arguments).ok_or(wrong("a tensor without its storage and sizes"))?;
                Object::Tensor(tensor)
            }
            Object::Global(Global::RebuildParameter) => {
                match arguments.first().map(|&id| &self.objects[id]) {
                    Some(Object::Tensor(tensor)) => Object::Tensor(tensor.clone()),
                    _ => return Err(wrong("a parameter that is no tensor")),
                }
            }
            _ => return Err(wrong("it calls what is not to be called")),
        };
        self.push(made);
        Ok(())
    }

    /// `(storage, offset, shape, strides, requires_grad, hooks)`
    fn tensor(&self, arguments: &[Id]) -> Option<PickledTensor> {
        let &[storage, offset, shape, strides, ..] = arguments else { return None };
        let size = |id: Id| match self.objects[id] {
            Object::Int(number) => u64::try_from(number).ok(),
            _ => None,
        };
        let sizes = |id: Id| match &self.objects[id] {
            // A tensor has a handful of axes, and what is long could be repeated.
            Object::Tuple(items) if items.len() <= 8 => {
                items.iter().map(|&id| size(id)).collect::<Option<Vec<_>>>()
            }
            _ => None,
        };
        let Object::Storage { number, key } = &self.objects[storage] else { return None };
        let (shape, strides) = (sizes(shape)?, sizes(strides)?);
        let offset = size(offset)?;
        (shape.len() == strides.len()).then(|| PickledTensor {
            number: *number,
            key: key.clone(),
            offset,
            shape,
            strides,
        })
    }

    /// A state dictionary remembers versions of its modules as an attribute, which matters to no tensor.
    fn build(&mut self, at: usize) -> Result<(), PickleError> {
        let state = self.pop(at)?;
        let top = self.stack.last().map(|&id| &self.objects[id]);
        match (top, &self.objects[state]) {
            (Some(Object::Dict(_)), Object::Dict(_)) => Ok(()),
            _ => Err(PickleError::Wrong { at, reason: "it sets attributes of something that has none" }),
        }
    }

    fn named_tensors(&self, root: Id) -> Result<Vec<(String, PickledTensor)>, PickleError> {
        let not = |got: String| PickleError::NotTensors { got };
        let Object::Dict(entries) = &self.objects[root] else {
            return Err(not("something else".into()));
        };
        let named = |&(key, value): &(Id, Id)| match (&self.objects[key], &self.objects[value]) {
            (Object::Text(name), Object::Tensor(tensor)) if name.len() <= MAX_NAME => {
                Ok((name.clone(), tensor.clone()))
            }
            (Object::Text(name), _) => {
                let name = name.chars().take(MAX_NAME).collect::<String>();
                Err(not(format!("`{name}`, which names no tensor")))
            }
            _ => Err(not("a key that is no name".into())),
        };
        entries.iter().map(named).collect()
    }
}

fn empty(at: usize) -> PickleError {
    PickleError::Wrong { at, reason: "it takes from an empty stack" }
}
