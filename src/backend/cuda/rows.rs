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
    room: Room,
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
        Ok(Self { length, width, stride, form, room })
    }

    pub(super) fn address(&self) -> u64 {
        self.room.address()
    }

    pub(super) fn argument(&self) -> Argument<'static> {
        Argument::Address(self.address())
    }

    /// Numbers with what lies between rows.
    pub(super) fn numbers(&self) -> usize {
        self.length * self.stride
    }

    /// What a kernel is told that has a thread for each of [`Self::numbers`].
    pub(super) fn each(&self) -> [Argument<'static>; 3] {
        [Argument::Size(self.numbers()), int(self.width), int(self.stride)]
    }

    /// The same numbers in another form.
    pub(super) fn converted(&self, device: &Arc<Device>, form: Form) -> Result<Self, BackendError> {
        let to = Self::new(device, self.length, self.width, form)?;
        let kernel = match form {
            Form::F32 => Kernel::ToF32,
            Form::Bf16 => Kernel::ToBf16,
        };
        let [count, width, stride] = self.each();
        let arguments = [self.argument(), to.argument(), count, width, stride];
        // SAFETY: the arguments of both kernels; rows of one length and stride.
        unsafe { device.push(kernel, Grid::each(self.numbers()), &arguments) };
        Ok(to)
    }

    /// As they are where they are in this form, else converted: for those that only read.
    pub(super) fn read_as(&self, device: &Arc<Device>, form: Form) -> Result<Read<'_>, BackendError> {
        if self.form == form {
            Ok(Read::Same(self))
        } else {
            self.converted(device, form).map(Read::Converted)
        }
    }

    /// In this form.
    pub(super) fn into_form(self, device: &Arc<Device>, form: Form) -> Result<Self, BackendError> {
        if self.form == form { Ok(self) } else { self.converted(device, form) }
    }

    /// Runs the step, and fetches the rows as row-major f32.
    pub(super) fn fetch(&self, device: &Device) -> Result<Vec<f32>, BackendError> {
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
