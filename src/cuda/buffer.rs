//! Tensors in device memory as planning sees them, and the checks that all plans share.

use crate::error::{Error, Result};
use crate::shape::LinearShape;
use bytemuck::{Pod, Zeroable};

/// A tensor in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Address of its first element.
    pub address: u64,
    /// Number of elements.
    pub len: usize,
}

impl Buffer {
    /// A tensor that nothing reads.
    pub(super) const ABSENT: Self = Self { address: 0, len: 0 };

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

    /// Checks that it has at least `needed` elements of `bytes` bytes each; what is not needed may be anything, and is absent.
    pub(super) fn check_workspace_of(&self, needed: usize, bytes: usize) -> Result<Buffer> {
        if needed == 0 {
            return Ok(Buffer::ABSENT);
        }
        let workspace = Buffer { len: self.len.min(needed), ..*self };
        workspace.check("workspace", "[workspace_len()]", needed, bytes)?;
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
        // Of any length: it may not have been checked yet.
        let end =
            |buffer: &Buffer, bytes: usize| u128::from(buffer.address) + buffer.len as u128 * bytes as u128;
        // An empty tensor shares none, wherever it is.
        u128::from(self.address.max(other.address)) < end(self, bytes).min(end(other, other_bytes))
    }
}

/// The address of a tensor as kernels take it; 0 for one that is absent.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Address(pub u64);

impl Address {
    /// Of a tensor that is absent.
    pub(super) const NONE: Self = Self(0);

    /// The address so many bytes further.
    pub(super) fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }

    pub(super) fn is_vector_aligned(self) -> bool {
        self.0.is_multiple_of(16)
    }
}

impl From<Buffer> for Address {
    fn from(buffer: Buffer) -> Self {
        Self(buffer.address)
    }
}

impl From<Option<Buffer>> for Address {
    fn from(buffer: Option<Buffer>) -> Self {
        buffer.map_or(Self::NONE, Self::from)
    }
}

/// Whether rows of `columns` elements hold whole 16-byte vectors, in tensors that start at multiples of 16 bytes.
pub(super) fn rows_are_aligned(dtype: DType, columns: usize, tensors: &[Address]) -> bool {
    (columns * dtype.bytes()).is_multiple_of(16) && tensors.iter().all(|address| address.is_vector_aligned())
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

/// The pass of an operator whose passes have the same arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From `x` to `y`, or of the epilogue `y += z ⊙ a`.
    Forward,
    /// From `dy` to `dx`, or of the epilogue `da = z ⊙ dy`.
    Backward,
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// `f32`, `f16` or `bf16`.
pub trait Element: sealed::Sealed + 'static {
    /// This type as a value.
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

/// A tensor and its name for `check_disjoint`, in bytes: elements differ in size.
pub(super) fn in_bytes(argument: &'static str, buffer: Buffer, bytes: usize) -> Named {
    (argument, Buffer { len: buffer.len * bytes, ..buffer })
}

/// Checks that no output shares memory with an input or with another output; elements have `bytes` bytes.
pub(super) fn check_disjoint(inputs: &[Named], outputs: &[Named], bytes: usize) -> Result<()> {
    for (i, (name, output)) in outputs.iter().enumerate() {
        for &(argument, input) in inputs {
            if input.overlaps(bytes, output, bytes) {
                return Err(Error::Argument { argument, problem: "overlaps an output" });
            }
        }
        if outputs[..i].iter().any(|(_, other)| other.overlaps(bytes, output, bytes)) {
            return Err(Error::Argument { argument: name, problem: "overlaps another output" });
        }
    }
    Ok(())
}

/// Largest y dimension of a grid; kernels stride over what is left.
const MAX_GRID_Y: usize = 65535;

/// The grid of `columns` blocks by as many as `rows` needs and the device allows.
pub(super) fn grid(columns: usize, rows: usize) -> [u32; 3] {
    // Columns are at most 2^30 by `check_output_shape`.
    [columns as u32, rows.min(MAX_GRID_Y) as u32, 1]
}
