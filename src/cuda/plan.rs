//! Plans: what an operator does on a device, as plain values.
//!
//! A plan is a list of steps on one stream. Operators make it from checked arguments and a [`Gpu`](super::Gpu), without a
//! device. [`Device`](super::Device) carries it out; so does the simulator of the tests, which has no device either.

use super::buffer::{Buffer, DType};
use super::gemm::Gemm;
use super::kernel::Kernel;
use bytemuck::Pod;

/// What an operator does: steps, one after the other on the same stream.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    steps: Vec<Step>,
}

/// One step of a [`Plan`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Step {
    /// Launches a kernel of this crate.
    Launch(Launch),
    /// Multiplies matrices by cuBLASLt.
    Gemm(Gemm),
}

/// One launch of a kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// The kernel.
    pub kernel: Kernel,
    /// Blocks along x, y, z; a multiple of `cluster`.
    pub grid: [u32; 3],
    /// Blocks of a cluster along x, y, z, as the kernel declares it; 1 without clusters.
    pub cluster: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// The kernel's only argument, passed by value.
    pub params: Params,
}

/// A kernel's parameter struct as bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    bytes: Box<[u8]>,
    align: usize,
    maps: Box<[(usize, TensorMap)]>,
}

impl Params {
    pub(super) fn new<P: Pod>(params: &P) -> Self {
        Self { bytes: bytemuck::bytes_of(params).into(), align: align_of::<P>(), maps: Box::default() }
    }

    /// Adds tensor maps, at these offsets.
    fn with_maps(self, maps: &[(usize, TensorMap)]) -> Self {
        debug_assert!(maps.iter().all(|&(offset, _)| offset.is_multiple_of(Self::MAP_ALIGN)));
        // As long as the kernel's struct, which is aligned.
        let mut bytes = self.bytes.into_vec();
        bytes.resize(bytes.len().next_multiple_of(Self::MAP_ALIGN), 0);
        Self { bytes: bytes.into(), align: Self::MAP_ALIGN, maps: maps.into() }
    }

    /// What the driver asks of a tensor map among a kernel's parameters.
    const MAP_ALIGN: usize = 64;

    /// The bytes; zeros where a tensor map belongs.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The struct's alignment.
    pub fn align(&self) -> usize {
        self.align
    }

    /// Tensor maps, and the offsets of the 128 bytes where the device puts them.
    pub fn maps(&self) -> &[(usize, TensorMap)] {
        &self.maps
    }
}

/// A tiled tensor map (`CUtensorMap`) as a description: the device encodes it when it launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap {
    /// Address of the tensor, a multiple of 16.
    pub address: u64,
    /// Type of its elements.
    pub dtype: DType,
    /// Number of dimensions, 1 to 5.
    pub rank: u32,
    /// Sizes in elements, innermost first.
    pub dims: [u64; 5],
    /// Distances in bytes between neighbours along each dimension but the innermost; multiples of 16.
    pub strides: [u64; 4],
    /// Sizes of the box that one copy moves, innermost first, each at most 256.
    pub box_dims: [u32; 5],
    /// Bytes of the swizzle's span: 0 (none), 32, 64 or 128.
    pub swizzle: u32,
}

impl TensorMap {
    /// Of a contiguous tensor, its innermost size first, in boxes whose rows are as long as the swizzle's span.
    pub(super) fn of_rows(tensor: Buffer, dtype: DType, dims: [usize; 3], boxes: [usize; 3]) -> Self {
        let row = dims[0] * dtype.bytes();
        let [x, y, z] = dims.map(|size| size as u64);
        let [box_x, box_y, box_z] = boxes.map(|size| size as u32);
        Self {
            address: tensor.address,
            dtype,
            rank: 3,
            dims: [x, y, z, 1, 1],
            strides: [row as u64, (row * dims[1]) as u64, 0, 0],
            box_dims: [box_x, box_y, box_z, 1, 1],
            swizzle: box_x * dtype.bytes() as u32,
        }
    }

    /// The same, rows of a box one behind the other.
    pub(super) fn without_swizzle(self) -> Self {
        Self { swizzle: 0, ..self }
    }
}

impl Plan {
    /// The steps in their order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The launches, to try another geometry in tests. A plan that was changed is no longer one that an operator made.
    #[doc(hidden)]
    pub fn launches_mut(&mut self) -> impl Iterator<Item = &mut Launch> {
        self.steps.iter_mut().filter_map(|step| match step {
            Step::Launch(launch) => Some(launch),
            Step::Gemm(_) => None,
        })
    }

    /// The launches among the steps, in their order.
    pub fn launches(&self) -> impl Iterator<Item = &Launch> {
        self.steps.iter().filter_map(|step| match step {
            Step::Launch(launch) => Some(launch),
            Step::Gemm(_) => None,
        })
    }

    pub(super) fn push(&mut self, step: impl Into<Step>) {
        self.steps.push(step.into());
    }

    /// Appends the steps of another plan.
    pub(super) fn append(&mut self, other: Self) {
        self.steps.extend(other.steps);
    }
}

impl<S: Into<Step>> From<S> for Plan {
    fn from(step: S) -> Self {
        Self { steps: vec![step.into()] }
    }
}

impl From<Launch> for Step {
    fn from(launch: Launch) -> Self {
        Self::Launch(launch)
    }
}

impl From<Gemm> for Step {
    fn from(gemm: Gemm) -> Self {
        Self::Gemm(gemm)
    }
}

impl Launch {
    /// A launch without clusters.
    pub(super) fn new(
        kernel: Kernel,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: usize,
        params: &impl Pod,
    ) -> Self {
        Self {
            kernel,
            grid,
            cluster: [1; 3],
            block,
            shared_bytes: shared_bytes as u32,
            params: Params::new(params),
        }
    }

    /// The same with clusters of so many blocks along x, as the kernel declares them.
    pub(super) fn in_clusters(self, blocks: usize) -> Self {
        Self { cluster: [blocks as u32, 1, 1], ..self }
    }

    /// The same with tensor maps at these offsets of the parameters.
    pub(super) fn with_maps(self, maps: &[(usize, TensorMap)]) -> Self {
        Self { params: self.params.with_maps(maps), ..self }
    }
}
