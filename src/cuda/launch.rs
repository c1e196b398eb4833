//! Plans: what to launch, as plain values, and the checks that all plans share.

use super::kernel::Kernel;
use super::noise_source::Source;
use crate::error::{Error, Result};
use crate::shape::LinearShape;
use bytemuck::Pod;

/// One launch of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Launch<P> {
    /// The kernel, whose parameter struct is `P`.
    pub kernel: Kernel,
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// The kernel's only argument, passed by value.
    pub params: P,
}

/// The parameter struct of a kernel, with the kernel's own layout.
pub trait Params: Pod + PartialEq + std::fmt::Debug {}

/// Declares the parameter struct of a kernel, and asserts the size and the offsets that the kernel asserts as well.
macro_rules! params {
    ($(#[$doc:meta])* $name:ident, $bytes:literal bytes { $($offset:literal $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
        pub struct $name {
            $(pub(super) $field: $type,)*
        }

        const _: () = assert!(
            size_of::<$name>() == $bytes
                && align_of::<$name>() == 8
                $(&& std::mem::offset_of!($name, $field) == $offset)*
        );

        impl $crate::cuda::Params for $name {}
    };
}
pub(super) use params;

/// One launch with its parameters as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawLaunch<'a> {
    /// The kernel.
    pub kernel: Kernel,
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// The bytes of the parameter struct, aligned as it is.
    pub params: &'a [u8],
}

/// What an operator does on a device: launches, one after the other on the same stream.
pub trait Plan {
    /// Calls `run` with each launch in order, until one fails.
    ///
    /// # Errors
    /// The first error of `run`.
    fn for_each(&self, run: &mut dyn FnMut(RawLaunch<'_>) -> Result<()>) -> Result<()>;
}

impl<P: Params> Plan for Launch<P> {
    fn for_each(&self, run: &mut dyn FnMut(RawLaunch<'_>) -> Result<()>) -> Result<()> {
        let Launch { kernel, grid, block, shared_bytes, ref params } = *self;
        run(RawLaunch { kernel, grid, block, shared_bytes, params: bytemuck::bytes_of(params) })
    }
}

impl<P: Plan> Plan for Option<P> {
    fn for_each(&self, run: &mut dyn FnMut(RawLaunch<'_>) -> Result<()>) -> Result<()> {
        self.as_ref().map_or(Ok(()), |plan| plan.for_each(run))
    }
}

impl<P: Plan> Plan for Vec<P> {
    fn for_each(&self, run: &mut dyn FnMut(RawLaunch<'_>) -> Result<()>) -> Result<()> {
        self.iter().try_for_each(|plan| plan.for_each(run))
    }
}

impl<P: Plan, const N: usize> Plan for [P; N] {
    fn for_each(&self, run: &mut dyn FnMut(RawLaunch<'_>) -> Result<()>) -> Result<()> {
        self.iter().try_for_each(|plan| plan.for_each(run))
    }
}

impl<A: Plan, B: Plan> Plan for (A, B) {
    fn for_each(&self, run: &mut dyn FnMut(RawLaunch<'_>) -> Result<()>) -> Result<()> {
        self.0.for_each(run)?;
        self.1.for_each(run)
    }
}

/// A tensor in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Address of its first element.
    pub address: u64,
    /// Number of elements.
    pub len: usize,
}

impl Buffer {
    /// Checks that there are `expected` elements of `bytes` bytes each, properly aligned and inside the address space.
    pub(super) fn check(
        &self,
        argument: &'static str,
        shape: &'static str,
        expected: usize,
        bytes: usize,
    ) -> Result<()> {
        if self.len != expected {
            return Err(Error::Length { argument, shape, expected, got: self.len });
        }
        if self.address == 0 {
            return Err(Error::Argument { argument, problem: "is a null pointer" });
        }
        if !self.address.is_multiple_of(bytes as u64) {
            return Err(Error::Argument {
                argument,
                problem: "does not start at a multiple of its element size",
            });
        }
        if (expected as u64)
            .checked_mul(bytes as u64)
            .and_then(|size| size.checked_add(self.address))
            .is_none()
        {
            return Err(Error::Argument { argument, problem: "reaches past the end of the address space" });
        }
        Ok(())
    }

    /// Checks that it has at least `needed` elements of 4 bytes.
    pub(super) fn check_workspace(&self, needed: usize) -> Result<Buffer> {
        self.check_workspace_of(needed, 4)
    }

    /// Checks that it has at least `needed` elements of `bytes` bytes each.
    pub(super) fn check_workspace_of(&self, needed: usize, bytes: usize) -> Result<Buffer> {
        let workspace = Buffer { len: self.len.min(needed), ..*self };
        if needed > 0 {
            workspace.check("workspace", "[workspace_len()]", needed, bytes)?;
        }
        Ok(workspace)
    }

    /// The same memory, of `f32`, as elements of `bytes` bytes.
    pub(super) fn in_elements_of(&self, bytes: usize) -> Buffer {
        Buffer { len: (self.len * 4).div_ceil(bytes), ..*self }
    }

    /// Whether vectors of 16 bytes can be loaded from its start.
    pub(super) fn is_vector_aligned(&self) -> bool {
        self.address.is_multiple_of(16)
    }

    /// Whether it shares memory with another tensor, given the bytes of an element of each.
    pub(super) fn overlaps(&self, bytes: usize, other: &Buffer, other_bytes: usize) -> bool {
        let end = |buffer: &Buffer, bytes: usize| u128::from(buffer.address) + (buffer.len * bytes) as u128;
        u128::from(self.address) < end(other, other_bytes) && u128::from(other.address) < end(self, bytes)
    }
}

/// The address of a tensor for a kernel, which takes 0 for one that is absent.
pub(super) fn address(buffer: Option<Buffer>) -> u64 {
    buffer.map_or(0, |buffer| buffer.address)
}

/// Element types of tensors in device memory; arithmetic is in `f32` for all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of binary32.
    BF16,
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// `f32`, `f16` or `bf16`.
pub trait Element: sealed::Sealed + 'static {
    /// The same as a value.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}

impl Element for half::f16 {
    const DTYPE: DType = DType::F16;
}

impl Element for half::bf16 {
    const DTYPE: DType = DType::BF16;
}

/// Most token rows of an operator, so that a kernel can count them in 32 bits and step over the end.
pub(super) const MAX_ROWS: usize = 1 << 31;

/// Checks the sizes of an operator on `[M, N]` tensors; `in_features` does not matter.
pub(super) fn check_output_shape(shape: LinearShape) -> Result<LinearShape> {
    let shape = LinearShape { in_features: 1, shared_input: false, ..shape };
    shape.check()?;
    if shape.out_rows() > MAX_ROWS {
        let expected = "at most 2^31";
        return Err(Error::Size { argument: "branches * batch * tokens", expected, got: shape.out_rows() });
    }
    Ok(shape)
}

/// Checks the sizes of an operator on `x` and `y` of a linear layer.
pub(super) fn check_linear_shape(shape: &LinearShape) -> Result<()> {
    shape.check()?;
    check_output_shape(*shape)?;
    for (argument, size) in [("in_features", shape.in_features), ("out_features", shape.out_features)] {
        if size > MAX_ROWS {
            return Err(Error::Size { argument, expected: "at most 2^31", got: size });
        }
    }
    Ok(())
}

/// A tensor and what an operator calls it.
pub(super) type Named = (&'static str, Buffer);

/// Checks that no output shares memory with an input, with `z` or its key, or with another output; elements have `bytes`
/// bytes.
pub(super) fn check_disjoint(
    inputs: &[Named],
    outputs: &[Named],
    bytes: usize,
    noise: Option<&Source>,
) -> Result<()> {
    for (i, (name, output)) in outputs.iter().enumerate() {
        for &(argument, input) in inputs {
            if input.overlaps(bytes, output, bytes) {
                return Err(Error::Argument { argument, problem: "overlaps an output" });
            }
        }
        if outputs[..i].iter().any(|(_, other)| other.overlaps(bytes, output, bytes)) {
            return Err(Error::Argument { argument: name, problem: "overlaps another output" });
        }
        noise.map_or(Ok(()), |noise| noise.check_overlap(output, bytes))?;
    }
    Ok(())
}

/// Dynamic shared memory that a block may ask for on every device since compute capability 8.0.
pub(super) const MAX_SHARED_BYTES: u32 = 99 << 10;

/// Largest y dimension of a grid; kernels stride over what is left.
const MAX_GRID_Y: usize = 65535;

/// The grid of `columns` blocks by as many as `rows` needs and the device allows.
pub(super) fn grid(columns: usize, rows: usize) -> [u32; 3] {
    // Columns are at most 2^30 by `check_output_shape`.
    [columns as u32, rows.min(MAX_GRID_Y) as u32, 1]
}
