//! Activations in device memory.
#![allow(unsafe_code)]

use super::device::{Device, Room, Shared};
use super::kernel::{Argument, Grid, Kernel, int};
use super::weights::LOAD;
use crate::backend::BackendError;
use half::bf16;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The form of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Sums, and what is added to.
    F32,
    /// What products take.
    Bf16,
}

impl Form {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::Bf16 => size_of::<bf16>(),
        }
    }
}

/// Activations `(T, n)`.
pub struct Rows {
    pub(super) length: usize,
    pub(super) width: usize,
    /// From one row to the next. What lies between a row's end and the next one has no meaning.
    pub(super) stride: usize,
    pub(super) form: Form,
    /// Where they are columns of wider rows: how many stand before them.
    part_from: Option<usize>,
    room: Arc<Room>,
    /// The same in bf16, where the kernel that wrote them wrote both.
    rounded: Option<Box<Rows>>,
}

impl Rows {
    /// Without values yet.
    pub(super) fn new(
        device: &Arc<Device>,
        length: usize,
        width: usize,
        form: Form,
    ) -> Result<Self, BackendError> {
        let stride = width.next_multiple_of(LOAD);
        let room = device.activations(length * stride * form.bytes())?;
        Ok(Self { length, width, stride, form, part_from: None, room: Arc::new(room), rounded: None })
    }

    /// With what is going to be the same in bf16.
    pub(super) fn with_rounded(self, rounded: Self) -> Self {
        Self { rounded: Some(Box::new(rounded)), ..self }
    }

    /// The columns `from..from + width` where they stand. Only attention takes them so, others a copy, and nobody writes to them:
    /// the whole shares their memory.
    pub(super) fn part(&self, from: usize, width: usize) -> Self {
        let part_from = Some(self.part_from.unwrap_or(0) + from);
        Self { width, part_from, room: Arc::clone(&self.room), rounded: None, ..*self }
    }

    pub(super) fn is_part(&self) -> bool {
        self.part_from.is_some()
    }

    pub(super) fn address(&self) -> u64 {
        self.room.address() + (self.part_from.unwrap_or(0) * self.form.bytes()) as u64
    }

    pub(super) fn argument(&self) -> Argument<'static> {
        Argument::Address(self.address())
    }

    /// Numbers with what lies between rows, of rows that are no part.
    pub(super) fn numbers(&self) -> usize {
        self.length * self.stride
    }

    /// What a kernel is told that has a thread for each of [`Self::numbers`].
    pub(super) fn each(&self) -> [Argument<'static>; 3] {
        [Argument::Size(self.numbers()), int(self.width), int(self.stride)]
    }

    /// The same numbers in memory of their own, in this form.
    pub(super) fn converted(&self, device: &Arc<Device>, form: Form) -> Result<Self, BackendError> {
        let to = Self::new(device, self.length, self.width, form)?;
        let kernel = match (self.form, form) {
            (Form::F32, Form::F32) => Kernel::CopyF32,
            (Form::F32, Form::Bf16) => Kernel::ToBf16,
            (Form::Bf16, Form::F32) => Kernel::ToF32,
            (Form::Bf16, Form::Bf16) => {
                return self.converted(device, Form::F32)?.converted(device, Form::Bf16);
            }
        };
        let [count, width, stride] = to.each();
        let arguments = [self.argument(), int(self.stride), to.argument(), count, width, stride];
        // SAFETY: the arguments of all three kernels; rows of one length and width.
        unsafe { device.push(kernel, Grid::each(to.numbers()), &arguments) };
        Ok(to)
    }

    /// As they are where they are in this form and no part, else converted: for those that only read.
    pub(super) fn read_as(&self, device: &Arc<Device>, form: Form) -> Result<Read<'_>, BackendError> {
        match &self.rounded {
            Some(rounded) if form == Form::Bf16 => Ok(Read::Same(rounded)),
            _ if self.form == form && !self.is_part() => Ok(Read::Same(self)),
            _ => self.converted(device, form).map(Read::Converted),
        }
    }

    /// In this form, in memory that nobody else has: for those that write to them.
    pub(super) fn into_form(self, device: &Arc<Device>, form: Form) -> Result<Self, BackendError> {
        if self.form == form && !self.is_part() {
            return Ok(Self { rounded: None, ..self });
        }
        self.converted(device, form)
    }

    /// Runs the step, and fetches the rows as row-major f32.
    pub(super) fn fetch(&self, device: &Arc<Device>) -> Result<Vec<f32>, BackendError> {
        if self.is_part() {
            return self.converted(device, Form::F32)?.fetch(device);
        }
        let all = match self.form {
            Form::F32 => device.download::<f32>(self.address(), self.numbers())?,
            Form::Bf16 => {
                let halves = device.download::<bf16>(self.address(), self.numbers())?;
                halves.into_iter().map(bf16::to_f32).collect()
            }
        };
        if self.stride == self.width {
            return Ok(all);
        }
        Ok(all.chunks_exact(self.stride.max(1)).flat_map(|row| &row[..self.width]).copied().collect())
    }
}

/// [`Rows`] that are read.
pub(super) enum Read<'a> {
    Same(&'a Rows),
    Converted(Rows),
}

impl std::ops::Deref for Read<'_> {
    type Target = Rows;

    fn deref(&self) -> &Rows {
        match self {
            Self::Same(rows) => rows,
            Self::Converted(rows) => rows,
        }
    }
}

/// Cosines, then sines, of each row's angles: `(T, D)`. On the host: each step that uses them takes them along.
pub struct Angles {
    /// Unlike that of any other angles.
    id: u64,
    pub(super) rows: usize,
    /// Angles of a row: half of a head.
    pub(super) half: usize,
    values: Vec<f32>,
}

impl Angles {
    pub(super) fn new(positions: &[u32], inverse_frequencies: &[f32]) -> Self {
        let (rows, half) = (positions.len(), inverse_frequencies.len());
        let mut values = Vec::with_capacity(rows * 2 * half);
        for &position in positions {
            let angle = |frequency: &f32| position as f32 * frequency;
            values.extend(inverse_frequencies.iter().map(|frequency| angle(frequency).cos()));
            values.extend(inverse_frequencies.iter().map(|frequency| angle(frequency).sin()));
        }
        static MADE: AtomicU64 = AtomicU64::new(0);
        Self { id: MADE.fetch_add(1, Ordering::Relaxed), rows, half, values }
    }

    /// In the step's table.
    pub(super) fn staged(&self, device: &Device) -> Result<Argument<'static>, BackendError> {
        // Odd, unlike the addresses that own other tables.
        device.stage_once(2 * self.id + 1, &self.values).map(Argument::Address)
    }
}
