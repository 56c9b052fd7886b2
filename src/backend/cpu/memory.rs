//! Where packed weights and the key-value pool lie: few large regions in 2 MiB pages, so that a step that reads all of them is
//! not slowed down by address translation.
#![allow(unsafe_code)]

use super::super::BackendError;
use bytemuck::Pod;
use memmap2::{Advice, MmapMut};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of one region, unless a single weight is larger. What is not written costs no memory.
const REGION: usize = 64 << 20;
/// A cache line; what is handed out begins on one.
const ALIGNMENT: usize = 64;

/// Hands out memory for weights; never takes any back before all of a region is dropped.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// The region that is being filled, and how much of it is taken.
    current: Mutex<Option<(Arc<Region>, usize)>>,
}

#[derive(Debug)]
struct Region {
    start: *mut u8,
    /// Keeps the region mapped.
    _map: MmapMut,
}

// SAFETY: a region's bytes are written only by `Memory::take`, each once, before anybody else can name them; afterwards
// they are only read.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// Some bytes of a region, read only; they begin on a cache line.
#[derive(Debug, Clone)]
pub(super) struct Packed {
    region: Arc<Region>,
    range: Range<usize>,
}

impl Memory {
    /// `length` zeroed bytes, filled by `fill`.
    pub(super) fn take(
        &self,
        what: &str,
        length: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<Packed, BackendError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let region_size = |(region, taken): &(Arc<Region>, usize)| (region._map.len(), *taken);
        let fits = |held: &(Arc<Region>, usize)| {
            let (size, taken) = region_size(held);
            taken.checked_add(length).is_some_and(|end| end <= size)
        };
        let (region, start) = match current.take().filter(fits) {
            Some(held) => held,
            None => (Arc::new(Region::new(what, length.max(REGION))?), 0),
        };
        let end = start + length;
        // SAFETY: within the map, as just checked; `start` only grows, so nobody else has these bytes.
        fill(unsafe { std::slice::from_raw_parts_mut(region.start.add(start), length) });
        *current = Some((Arc::clone(&region), end.next_multiple_of(ALIGNMENT)));
        Ok(Packed { region, range: start..end })
    }
}

impl Region {
    fn new(what: &str, bytes: usize) -> Result<Self, BackendError> {
        let mut map = map(what, bytes)?;
        Ok(Self { start: map.as_mut_ptr(), _map: map })
    }
}

/// Zeros, which cost memory where they are written.
fn map(what: &str, bytes: usize) -> Result<MmapMut, BackendError> {
    let memory = |_| BackendError::Memory { what: what.into(), bytes };
    let map = MmapMut::map_anon(bytes).map_err(memory)?;
    // Smaller pages are slower, not wrong.
    #[cfg(target_os = "linux")]
    let _ = map.advise(Advice::HugePage);
    Ok(map)
}

/// So many numbers, zero at first; what is not written costs no memory.
pub(super) struct Zeroed<T> {
    map: MmapMut,
    length: usize,
    numbers: PhantomData<T>,
}

impl<T: Pod> Zeroed<T> {
    pub(super) fn new(what: &str, length: usize) -> Result<Self, BackendError> {
        let bytes = length.checked_mul(size_of::<T>());
        let too_many = || BackendError::Memory { what: what.into(), bytes: usize::MAX };
        // A map of nothing is refused.
        let map = map(what, bytes.ok_or_else(too_many)?.max(1))?;
        Ok(Self { map, length, numbers: PhantomData })
    }
}

impl<T: Pod> Deref for Zeroed<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.map[..self.length * size_of::<T>()])
    }
}

impl<T: Pod> DerefMut for Zeroed<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.map[..self.length * size_of::<T>()])
    }
}

impl Packed {
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: within the region, written before this value was made, and never again.
        unsafe { std::slice::from_raw_parts(self.region.start.add(self.range.start), self.range.len()) }
    }
}
