//! What a step is to do, written down before any of it is done: kernels on a tape, and the tables that they read.
//!
//! Operations only write. When somebody wants a result, what the tables have gained goes to the device in one upload, and the tape runs: as a
//! CUDA graph where the same tape has run before, which decoding the same number of rows makes it do. Nothing in a tape of
//! few rows depends on which sub-networks the rows use, nor, up to the next power of two, on how long their contexts are.
//!
//! A long step does not wait for its end: when some kernels have been written down they start, so that the device works while the
//! rest is written, which takes a microsecond or more a kernel.

use super::arena::{Arena, Place};
use super::device::{Device, Graph};
use super::kernel::{Argument, Grid, Kernel, Tape};
use crate::backend::BackendError;
use cudarc::driver::CudaSlice;
use std::collections::VecDeque;
use std::ops::Range;

/// Graphs that are kept, those that ran last: more than there are batch sizes at which a graph pays, of a few parts each.
const MOST_GRAPHS: usize = 256;
/// Tapes that are remembered, to know one that comes again.
const REMEMBERED: usize = 32;
/// Kernels from which on a graph pays.
const LEAST_LAUNCHES: usize = 8;
/// Kernels of a step's first part, and by how much each part is longer than the one before: a small model's kernels of one part take
/// as long as writing the next one.
const FIRST_PART: usize = 8;
const GROWTH: usize = 3;
/// Bytes of the first table, and what parts of it are aligned to.
const FIRST_TABLE: usize = 256 << 10;
const ALIGNMENT: usize = 16;

/// What has been asked of the driver so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Kernels that were started one by one.
    pub launches: u64,
    /// Graphs that were started, and those that were made.
    pub graph_launches: u64,
    pub graphs: u64,
    /// Copies to the device.
    pub uploads: u64,
    /// Device memory that was asked for.
    pub allocations: u64,
}

/// A step that is being written, and what steps have in common.
pub(super) struct Step {
    tape: Tape,
    tables: Vec<Table>,
    shared: Vec<Shared>,
    pub(super) arena: Arena,
    /// Memory that was given up while kernels on the tape may still read it.
    retired: Vec<CudaSlice<u8>>,
    /// Kernels at which the tape's part starts; none where the whole step is to start at once.
    part: Option<usize>,
    /// Why a part did not start: whoever runs the step is told.
    failed: Option<BackendError>,
    graphs: VecDeque<(Tape, Graph)>,
    remembered: VecDeque<Tape>,
    pub(super) counts: Counts,
}

/// A part of a table that several operations of a step read: whose it is, where it will be, where it is.
struct Shared {
    owner: u64,
    address: u64,
    table: usize,
    place: Range<usize>,
}

/// Host bytes, how many of them are on the device, and where they will be there.
struct Table {
    bytes: Vec<u8>,
    uploaded: usize,
    buffer: CudaSlice<u8>,
    address: u64,
}

impl Default for Step {
    fn default() -> Self {
        Self {
            tape: Tape::default(),
            tables: Vec::new(),
            shared: Vec::new(),
            arena: Arena::default(),
            retired: Vec::new(),
            part: Some(FIRST_PART),
            failed: None,
            graphs: VecDeque::new(),
            remembered: VecDeque::new(),
            counts: Counts::default(),
        }
    }
}

impl Step {
    pub(super) fn push(&mut self, device: &Device, kernel: Kernel, grid: Grid, arguments: &[Argument<'_>]) {
        if grid.blocks.contains(&0) {
            return;
        }
        self.tape.push(kernel, grid, arguments);
        if let Some(part) = self.part.filter(|&part| self.tape.launches() >= part && self.failed.is_none()) {
            self.failed = self.run_part(device).err();
            self.part = Some(part * GROWTH);
        }
    }

    /// Keeps all kernels of this step until it runs, for who measures them.
    pub(super) fn hold(&mut self) {
        self.part = None;
    }

    pub(super) fn take(&mut self, device: &Device, bytes: usize) -> Result<Place, BackendError> {
        let before = self.arena.bytes();
        let place = self.arena.take(device, bytes);
        self.counts.allocations += u64::from(self.arena.bytes() > before);
        place
    }

    /// Puts bytes into the step's table; where they will be.
    pub(super) fn stage(&mut self, device: &Device, bytes: &[u8]) -> Result<u64, BackendError> {
        let fits =
            |table: &Table| table.bytes.len().next_multiple_of(ALIGNMENT) + bytes.len() <= table.buffer.len();
        if !self.tables.last().is_some_and(fits) {
            let so_far = self.tables.iter().map(|table| table.buffer.len()).sum::<usize>();
            self.add_table(device, so_far.max(FIRST_TABLE).max(bytes.len()))?;
        }
        let Some(table) = self.tables.last_mut() else { unreachable!("one was just added") };
        table.bytes.resize(table.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let at = table.address + table.bytes.len() as u64;
        table.bytes.extend_from_slice(bytes);
        Ok(at)
    }

    /// As [`Self::stage`], once in a step for the same owner, whose bytes stay the same.
    pub(super) fn stage_once(
        &mut self,
        device: &Device,
        owner: u64,
        bytes: &[u8],
    ) -> Result<u64, BackendError> {
        if let Some(known) = self.shared.iter().find(|known| known.owner == owner) {
            return Ok(known.address);
        }
        let address = self.stage(device, bytes)?;
        self.note(owner, address, bytes.len());
        Ok(address)
    }

    /// As [`Self::stage`], unless the owner's last bytes of this step were the same.
    pub(super) fn stage_changed(
        &mut self,
        device: &Device,
        owner: u64,
        bytes: &[u8],
    ) -> Result<u64, BackendError> {
        let same = |known: &&Shared| {
            known.owner == owner && self.tables[known.table].bytes[known.place.clone()] == *bytes
        };
        if let Some(known) = self.shared.iter().find(same) {
            return Ok(known.address);
        }
        let address = self.stage(device, bytes)?;
        self.shared.retain(|known| known.owner != owner);
        self.note(owner, address, bytes.len());
        Ok(address)
    }

    /// Whose the last bytes of the last table are.
    fn note(&mut self, owner: u64, address: u64, length: usize) {
        let table = self.tables.len() - 1;
        let end = self.tables[table].bytes.len();
        self.shared.push(Shared { owner, address, table, place: end - length..end });
    }

    fn add_table(&mut self, device: &Device, bytes: usize) -> Result<(), BackendError> {
        let buffer = device.room("a step's tables", bytes.next_multiple_of(ALIGNMENT))?;
        self.counts.allocations += 1;
        self.tables.push(Table { bytes: Vec::new(), uploaded: 0, address: device.address(&buffer), buffer });
        Ok(())
    }

    /// Keeps memory until the tape has run.
    pub(super) fn retire(&mut self, memory: CudaSlice<u8>) {
        if self.tape.launches() > 0 {
            self.retired.push(memory);
        }
    }

    /// Starts all that was written down.
    pub(super) fn run(&mut self, device: &Device) -> Result<(), BackendError> {
        let has_begun = self.part.is_some_and(|part| part > FIRST_PART) || self.failed.is_some();
        if self.tape.launches() == 0 && !has_begun {
            return Ok(());
        }
        let ran = self.failed.take().map_or_else(|| self.run_part(device), Err);
        // What it retired is freed in the stream's order, after what was just started.
        self.forget();
        if self.tables.len() > 1 {
            // One that is large enough, from the next step on.
            let bytes = self.tables.iter().map(|table| table.buffer.len()).sum();
            self.tables.clear();
            self.add_table(device, bytes)?;
        }
        ran
    }

    /// Starts what is on the tape; tables stay, for what comes after it.
    fn run_part(&mut self, device: &Device) -> Result<(), BackendError> {
        if self.tape.launches() == 0 {
            return Ok(());
        }
        self.upload(device)?;
        self.start(device)?;
        let next = Tape::as_long_as(&self.tape);
        let tape = std::mem::replace(&mut self.tape, next);
        self.remember(tape);
        Ok(())
    }

    /// Begins anew, whatever was written down.
    pub(super) fn forget(&mut self) {
        self.tape = Tape::as_long_as(&self.tape);
        self.part = Some(FIRST_PART);
        self.failed = None;
        self.shared.clear();
        self.retired.clear();
        for table in &mut self.tables {
            table.bytes.clear();
            table.uploaded = 0;
        }
    }

    fn upload(&mut self, device: &Device) -> Result<(), BackendError> {
        for table in self.tables.iter_mut().filter(|table| table.bytes.len() > table.uploaded) {
            device.upload_to(table.address + table.uploaded as u64, &table.bytes[table.uploaded..])?;
            table.uploaded = table.bytes.len();
            self.counts.uploads += 1;
        }
        Ok(())
    }

    fn start(&mut self, device: &Device) -> Result<(), BackendError> {
        if let Some(known) = self.graphs.iter().position(|(tape, _)| *tape == self.tape) {
            if let Some(graph) = self.graphs.remove(known) {
                self.graphs.push_front(graph);
            }
        } else if self.remembered.contains(&self.tape) {
            self.remembered.retain(|tape| *tape != self.tape);
            // It takes memory, which may be short: what a graph would do, launches do as well.
            let Ok(graph) = device.graph(&self.tape) else { return self.start_tape(device) };
            self.counts.graphs += 1;
            self.graphs.truncate(MOST_GRAPHS - 1);
            self.graphs.push_front((self.tape.clone(), graph));
        } else {
            return self.start_tape(device);
        }
        let Some((_, graph)) = self.graphs.front() else { return Ok(()) };
        if device.start_graph(graph).is_err() {
            self.graphs.pop_front();
            return self.start_tape(device);
        }
        self.counts.graph_launches += 1;
        Ok(())
    }

    fn start_tape(&mut self, device: &Device) -> Result<(), BackendError> {
        self.counts.launches += self.tape.launches() as u64;
        device.start(&self.tape)
    }

    fn remember(&mut self, tape: Tape) {
        let is_graph = self.graphs.front().is_some_and(|(known, _)| *known == tape);
        let is_first_part = self.part.is_none_or(|part| part == FIRST_PART);
        if !is_graph && (tape.launches() >= LEAST_LAUNCHES || !is_first_part) {
            self.remembered.truncate(REMEMBERED - 1);
            self.remembered.push_front(tape);
        }
    }
}
