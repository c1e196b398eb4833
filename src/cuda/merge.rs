//! Merging an adapter into its frozen layer; plans `kernels/weights.cu`.

use super::borrows::Borrows;
use super::buffer::{Buffer, DType, Element, check_disjoint};
use super::device::Device;
use super::kernel::table;
use super::plan::{Launch, Plan};
use super::pointer::{Input, Output, Void};
use crate::error::Result;
use crate::shape::product;
use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

/// Threads of a block.
pub const MERGE_THREADS: usize = 256;
/// Vectors of one thread, and the blocks that are enough for every device.
const VECTORS: usize = 4;
const MAX_BLOCKS: usize = 2048;

/// Which way a difference goes into a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MergeSign {
    /// `target += delta`.
    Merge,
    /// `target −= delta`.
    Unmerge,
}

/// Arguments of a merge over tensors of any shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Merge {
    /// Which way.
    pub sign: MergeSign,
    /// Type of both tensors.
    pub dtype: DType,
    /// `W0` or `b0`, changed in place.
    pub target: Buffer,
    /// `ΔW` or `Δb`.
    pub delta: Buffer,
}

/// Parameters of the kernels `merge*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct MergeParams {
    target: Output<Void>,
    delta: Input<Void>,
    length: u64,
    sign: f32,
    /// Both start at multiples of 16 bytes.
    aligned: u32,
}

impl Merge {
    /// The plan that changes the target; an empty one for empty tensors.
    ///
    /// # Errors
    /// If the tensors differ in length, overlap, or are not aligned to their elements.
    pub fn plan(&self) -> Result<Plan> {
        let &Self { sign, dtype, target, delta } = self;
        let (length, bytes) = (product("target", "any", &[target.len])?, dtype.bytes());
        if delta.len == 0 && length == 0 {
            return Ok(Plan::default());
        }
        delta.check("delta", "[target.len()]", length, bytes)?;
        target.check("target", "any", length, bytes)?;
        check_disjoint(&[("delta", delta)], &[("target", target)], bytes)?;
        let blocks = length.div_ceil(MERGE_THREADS * VECTORS * 16 / bytes).min(MAX_BLOCKS);
        let params = MergeParams {
            target: target.into(),
            delta: delta.into(),
            length: length as u64,
            sign: match sign {
                MergeSign::Merge => 1.0,
                MergeSign::Unmerge => -1.0,
            },
            aligned: u32::from(target.is_vector_aligned() && delta.is_vector_aligned()),
        };
        let kernel = table::MERGE.choose(dtype);
        Ok(Launch::new(kernel, [blocks as u32, 1, 1], [MERGE_THREADS as u32, 1, 1], 0, &params).into())
    }
}

impl Device {
    /// `target += delta`: folds an adapter into its frozen layer for inference. For `W0 += ΔW` and `b0 += Δb` alike.
    ///
    /// # Errors
    /// As [`Merge::plan`]; also if an argument belongs to another device, or the launch fails.
    pub fn merge<T: Element>(
        &self,
        target: &mut dyn DevicePtrMut<T>,
        delta: &dyn DevicePtr<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        self.merged(MergeSign::Merge, target, delta, stream)
    }

    /// `target −= delta`: takes a [`merge`](Self::merge)d adapter out again, up to rounding.
    ///
    /// # Errors
    /// As [`Device::merge`].
    pub fn unmerge<T: Element>(
        &self,
        target: &mut dyn DevicePtrMut<T>,
        delta: &dyn DevicePtr<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        self.merged(MergeSign::Unmerge, target, delta, stream)
    }

    fn merged<T: Element>(
        &self,
        sign: MergeSign,
        target: &mut dyn DevicePtrMut<T>,
        delta: &dyn DevicePtr<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let (target, delta) = (borrows.output("target", target)?, borrows.input("delta", delta)?);
        let plan = Merge { sign, dtype: T::DTYPE, target, delta }.plan()?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernel touches.
        unsafe { self.launch(&plan, stream) }
    }
}
