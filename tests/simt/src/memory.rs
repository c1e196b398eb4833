//! Global memory: tensors with guarded ends, and a record of what was written.

use crate::fault::{Access, Fault, Thread};
use bytemuck::Pod;
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::Cell;

/// Alignment of a tensor's memory, that of `cudaMalloc`.
const ALIGNMENT: usize = 256;
/// Bytes before and behind a tensor that nobody may touch.
const RED_ZONE: usize = 256;
/// What lies there.
const GUARD: u8 = 0xA5;
/// What lies in outputs and in shared memory beforehand: NaN in every floating-point type.
pub(crate) const POISON: u8 = 0xFF;

#[cfg(feature = "sanitize")]
unsafe extern "C" {
    /// Makes instrumented code stop when it touches this memory.
    fn __asan_poison_memory_region(address: *const std::ffi::c_void, bytes: usize);
}

/// A block of memory with red zones around the part in use.
pub(crate) struct Region {
    start: *mut u8,
    layout: Layout,
    /// The part in use.
    first: usize,
    bytes: usize,
}

// SAFETY: a region is the only owner of its block, as a `Box` is.
unsafe impl Send for Region {}

impl Region {
    /// `bytes` bytes of poison, `shift` bytes past a multiple of `alignment`, which is 256 or a larger power of two.
    pub(crate) fn new(alignment: usize, shift: usize, bytes: usize) -> Self {
        let first = RED_ZONE.max(alignment) + shift;
        let layout =
            Layout::from_size_align(first + bytes + RED_ZONE, alignment).expect("a size that fits memory");
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: the block was just allocated with this size.
        unsafe { start.write_bytes(GUARD, layout.size()) };
        let region = Self { start, layout, first, bytes };
        region.poison();
        #[cfg(feature = "sanitize")]
        for (at, bytes) in [(0, first), (first + bytes, RED_ZONE)] {
            // SAFETY: both red zones lie in the block. The sanitizer takes notice of kernels only, not of this crate.
            unsafe { __asan_poison_memory_region(start.add(at).cast(), bytes) };
        }
        region
    }

    pub(crate) fn poison(&self) {
        // SAFETY: the part in use lies in the block.
        unsafe { self.data().write_bytes(POISON, self.bytes) };
    }

    /// Start of the part in use.
    pub(crate) fn data(&self) -> *mut u8 {
        // SAFETY: `first` lies in the block.
        unsafe { self.start.add(self.first) }
    }

    fn copy(&self) -> Vec<u8> {
        // SAFETY: all bytes of the part in use are initialised, and nobody writes during this call.
        unsafe { std::slice::from_raw_parts(self.data(), self.bytes) }.to_vec()
    }

    /// Where the part in use first differs from `bytes`, of which there are as many.
    fn differs_from(&self, bytes: &[u8]) -> Option<usize> {
        // SAFETY: as in `copy`.
        let now = unsafe { std::slice::from_raw_parts(self.data(), self.bytes) };
        // Nearly always equal, and compared as a whole far faster.
        (now != bytes).then(|| now.iter().zip(bytes).position(|(now, byte)| now != byte))?
    }

    /// Checks both red zones.
    pub(crate) fn check(&self, name: &str) -> Result<(), Fault> {
        // SAFETY: all bytes of the block are initialised, and nobody writes during this call.
        let block = unsafe { std::slice::from_raw_parts(self.start, self.layout.size()) };
        let mut outside = (0..self.first).chain(self.first + self.bytes..block.len());
        match outside.find(|&at| block[at] != GUARD) {
            Some(at) => Err(Fault::Corrupted { tensor: name.into(), offset: at as i64 - self.first as i64 }),
            None => Ok(()),
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start, self.layout) };
    }
}

/// Who accesses memory when no kernel runs.
const LIBRARY: Thread = Thread { block: [0; 3], thread: [0; 3] };

struct Allocation {
    name: String,
    region: Region,
    /// What an input holds; `None` if kernels may write here.
    input: Option<Vec<u8>>,
    /// Which bytes hold something.
    written: Vec<Cell<bool>>,
}

impl Allocation {
    fn start(&self) -> usize {
        self.region.data() as usize
    }

    /// Whether all of these bytes lie in it.
    fn holds(&self, address: usize, bytes: usize) -> bool {
        let offset = address.wrapping_sub(self.start());
        offset <= self.region.bytes && bytes <= self.region.bytes - offset
    }

    /// How many bytes they miss it by.
    fn distance(&self, address: usize, bytes: usize) -> usize {
        let (start, end) = (self.start(), self.start() + self.region.bytes);
        start.saturating_sub(address).max(address.saturating_add(bytes).saturating_sub(end))
    }
}

/// Calls `body` with the flags, and as many as the compiler knows of: one load or store instead of a loop, for every access.
fn counted<R>(flags: &[Cell<bool>], body: impl Fn(&[Cell<bool>]) -> R) -> R {
    match flags.len() {
        2 => body(&flags[..2]),
        4 => body(&flags[..4]),
        8 => body(&flags[..8]),
        16 => body(&flags[..16]),
        _ => body(flags),
    }
}

/// A tensor in simulated device memory.
#[derive(Debug, Clone, Copy)]
pub struct Tensor {
    index: usize,
    address: u64,
    len: usize,
}

impl Tensor {
    /// Address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Simulated device memory.
pub struct Memory {
    shift: usize,
    allocations: Vec<Allocation>,
    /// Where they start, in order, and which they are.
    starts: Vec<(usize, usize)>,
    /// Which of them was accessed last: the next access is often to the same.
    last: Cell<usize>,
}

impl Memory {
    /// Empty memory whose tensors will start `shift` elements past a multiple of 256 bytes.
    pub fn new(shift: usize) -> Self {
        Self { shift, allocations: Vec::new(), starts: Vec::new(), last: Cell::new(0) }
    }

    /// A tensor that kernels may read.
    pub fn input<T: Pod>(&mut self, name: &str, values: &[T]) -> Tensor {
        let tensor = self.in_out(name, values);
        let allocation = &mut self.allocations[tensor.index];
        allocation.input = Some(allocation.region.copy());
        tensor
    }

    /// A tensor that kernels may read and write.
    pub fn in_out<T: Pod>(&mut self, name: &str, values: &[T]) -> Tensor {
        let tensor = self.output::<T>(name, values.len());
        self.write(&tensor, values);
        tensor
    }

    /// A tensor that kernels have to write before anybody reads it.
    pub fn output<T: Pod>(&mut self, name: &str, len: usize) -> Tensor {
        let bytes = len * size_of::<T>();
        let region = Region::new(ALIGNMENT, self.shift * size_of::<T>(), bytes);
        let tensor = Tensor { index: self.allocations.len(), address: region.data() as u64, len };
        let written = vec![Cell::new(false); bytes];
        let start = region.data() as usize;
        let place = self.starts.partition_point(|&(other, _)| other < start);
        self.starts.insert(place, (start, tensor.index));
        self.allocations.push(Allocation { name: name.into(), region, input: None, written });
        tensor
    }

    /// Overwrites a tensor that is not an input, as a copy from the host would.
    pub fn write<T: Pod>(&mut self, tensor: &Tensor, values: &[T]) {
        let allocation = &self.allocations[tensor.index];
        let bytes: &[u8] = bytemuck::cast_slice(values);
        assert!(allocation.input.is_none() && bytes.len() == allocation.region.bytes);
        // SAFETY: the allocation has just these many bytes, and they are not the slice's.
        unsafe { allocation.region.data().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        allocation.written.iter().for_each(|written| written.set(true));
    }

    /// The values of a tensor, all of which must have been written.
    ///
    /// # Errors
    /// [`Fault::Unwritten`].
    pub fn read<T: Pod>(&self, tensor: &Tensor) -> Result<Vec<T>, Fault> {
        let allocation = &self.allocations[tensor.index];
        if let Some(byte) = allocation.written.iter().position(|written| !written.get()) {
            return Err(Fault::Unwritten { tensor: allocation.name.clone(), element: byte / size_of::<T>() });
        }
        Ok(bytemuck::pod_collect_to_vec(&allocation.region.copy()))
    }

    /// Checks an access of a kernel to an address that has to be a multiple of its size, and notes what it writes.
    pub(crate) fn access(
        &self,
        thread: Thread,
        address: usize,
        bytes: usize,
        is_write: bool,
    ) -> Result<(), Fault> {
        self.access_aligned(thread, address, bytes, bytes, is_write)
    }

    /// The same for an access whose address only has to be a multiple of `alignment`.
    pub(crate) fn access_aligned(
        &self,
        thread: Thread,
        address: usize,
        bytes: usize,
        alignment: usize,
        is_write: bool,
    ) -> Result<(), Fault> {
        let is_holder = |&i: &usize| self.allocations.get(i).is_some_and(|it| it.holds(address, bytes));
        let searched = || {
            let place = self.starts.partition_point(|&(start, _)| start <= address);
            place.checked_sub(1).map(|place| self.starts[place].1)
        };
        let holder = Some(self.last.get()).filter(is_holder).or_else(|| searched().filter(is_holder));
        // Whose bounds were missed is worth a longer search.
        let nearest =
            || (0..self.allocations.len()).min_by_key(|&i| self.allocations[i].distance(address, bytes));
        let Some(nearest) = holder.or_else(nearest).map(|i| {
            self.last.set(i);
            &self.allocations[i]
        }) else {
            let access = Access { offset: address as i64, bytes, is_write };
            return Err(Fault::OutOfBounds { thread, access, tensor: "nothing".into() });
        };
        let access = Access { offset: address as i64 - nearest.start() as i64, bytes, is_write };
        let tensor = || nearest.name.clone();
        if holder.is_none() {
            return Err(Fault::OutOfBounds { thread, access, tensor: tensor() });
        }
        if !address.is_multiple_of(alignment) {
            return Err(Fault::Misaligned { thread, access, tensor: tensor() });
        }
        let written = &nearest.written[access.offset as usize..][..bytes];
        if !is_write {
            return match counted(written, |flags| flags.iter().fold(true, |all, flag| all & flag.get())) {
                true => Ok(()),
                false => Err(Fault::ReadBeforeWrite { thread, access, tensor: tensor() }),
            };
        }
        if nearest.input.is_some() {
            return Err(Fault::WriteToInput { thread, access, tensor: tensor() });
        }
        counted(written, |flags| flags.iter().for_each(|flag| flag.set(true)));
        Ok(())
    }

    /// What a library reads that runs between kernels: `len` elements from `address` on.
    ///
    /// # Errors
    /// As a kernel's access: [`Fault::OutOfBounds`], [`Fault::Misaligned`], [`Fault::ReadBeforeWrite`].
    pub fn library_read<T: Pod>(&self, address: u64, len: usize) -> Result<Vec<T>, Fault> {
        let (start, size) = (address as usize, size_of::<T>());
        if len > 0 {
            self.access_aligned(LIBRARY, start, len * size, size, false)?;
        }
        // SAFETY: all elements were just found to lie in an allocation, aligned to their size.
        Ok((0..len).map(|i| unsafe { ((start + i * size) as *const T).read_unaligned() }).collect())
    }

    /// What a library writes that runs between kernels.
    ///
    /// # Errors
    /// As a kernel's access: [`Fault::OutOfBounds`], [`Fault::Misaligned`], [`Fault::WriteToInput`].
    pub fn library_write<T: Pod>(&mut self, address: u64, values: &[T]) -> Result<(), Fault> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if !bytes.is_empty() {
            self.access_aligned(LIBRARY, address as usize, bytes.len(), size_of::<T>(), true)?;
            // SAFETY: all elements were just found to lie in an allocation that is no input; it is not the slice's.
            unsafe { (address as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
        Ok(())
    }

    /// Checks for writes that [`Memory::access`] did not see.
    pub(crate) fn check(&self) -> Result<(), Fault> {
        for Allocation { name, region, input, .. } in &self.allocations {
            region.check(name)?;
            if let Some(at) = input.as_ref().and_then(|input| region.differs_from(input)) {
                return Err(Fault::Corrupted { tensor: name.clone(), offset: at as i64 });
            }
        }
        Ok(())
    }
}
