//! Memory for a step's activations, taken and given back without asking the driver. The same steps take the same places.

use super::device::Device;
use crate::backend::BackendError;
use cudarc::driver::CudaSlice;
use std::collections::BTreeMap;

/// What places are multiples of, so that each can be read in 16 bytes, and a warp's reads lie in whole lines.
const ALIGNMENT: usize = 256;
/// The smallest region that is asked for.
const REGION: usize = 16 << 20;

/// Regions of device memory, in each of which places are taken first fit.
#[derive(Default)]
pub(super) struct Arena {
    regions: Vec<Region>,
}

struct Region {
    buffer: CudaSlice<u8>,
    address: u64,
    /// By where they begin: how many bytes.
    free: BTreeMap<usize, usize>,
}

/// A place in an [`Arena`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    region: usize,
    start: usize,
    bytes: usize,
    pub(super) address: u64,
}

impl Arena {
    /// A place of so many bytes; asks for another region where none has room.
    pub(super) fn take(&mut self, device: &Device, bytes: usize) -> Result<Place, BackendError> {
        let bytes = bytes.max(1).next_multiple_of(ALIGNMENT);
        let found =
            self.regions.iter_mut().enumerate().find_map(|(i, region)| Some((i, region.take(bytes)?)));
        let (region, start) = match found {
            Some(found) => found,
            None => {
                let buffer = device.room("activations", bytes.max(REGION))?;
                let mut region = Region {
                    address: device.address(&buffer),
                    free: BTreeMap::from([(0, buffer.len())]),
                    buffer,
                };
                let start = region.take(bytes).unwrap_or_default();
                self.regions.push(region);
                (self.regions.len() - 1, start)
            }
        };
        Ok(Place { region, start, bytes, address: self.regions[region].address + start as u64 })
    }

    pub(super) fn give_back(&mut self, place: Place) {
        let free = &mut self.regions[place.region].free;
        let (mut start, mut bytes) = (place.start, place.bytes);
        if let Some((&before, &length)) = free.range(..start).next_back()
            && before + length == start
        {
            free.remove(&before);
            (start, bytes) = (before, bytes + length);
        }
        if let Some(after) = free.remove(&(start + bytes)) {
            bytes += after;
        }
        free.insert(start, bytes);
    }

    /// Bytes that the driver has given.
    pub(super) fn bytes(&self) -> usize {
        self.regions.iter().map(|region| region.buffer.len()).sum()
    }
}

impl Region {
    fn take(&mut self, bytes: usize) -> Option<usize> {
        let (&start, &length) = self.free.iter().find(|(_, length)| **length >= bytes)?;
        self.free.remove(&start);
        if length > bytes {
            self.free.insert(start + bytes, length - bytes);
        }
        Some(start)
    }
}
