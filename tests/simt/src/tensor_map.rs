//! Tensor maps, and the boxes that copies move: where each row of one lies in global and in shared memory.

use bytemuck::{Pod, Zeroable};

/// What a kernel's parameters hold in the place of a `CUtensorMap`: the same as a plan's description.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct TensorMap {
    /// Address of the tensor.
    pub address: u64,
    /// Sizes in elements, innermost first.
    pub dims: [u64; 5],
    /// Distances in bytes between neighbours along each dimension but the innermost.
    pub strides: [u64; 4],
    /// Sizes of the box that one copy moves, innermost first.
    pub box_dims: [u32; 5],
    /// Bytes of the swizzle's span: 0 (none), 32, 64 or 128.
    pub swizzle: u32,
    /// Number of dimensions.
    pub rank: u32,
    /// Bytes of an element.
    pub element_bytes: u32,
    /// Zeros.
    pub reserved: [u32; 4],
}

/// Bytes that swizzling keeps together.
pub const CHUNK: usize = 16;

/// The address where the async proxy finds what lies at `address` without a swizzle of `span` bytes.
pub fn swizzled(address: u32, span: u32) -> u32 {
    // Of 128 bytes: bits 4 to 6 change with bits 7 to 9, and so on.
    let mask = (span / CHUNK as u32).saturating_sub(1);
    address ^ ((address >> 7 & mask) << 4)
}

/// What a swizzled tile's address has to be a multiple of.
pub fn tile_alignment(span: u32) -> u32 {
    (8 * span).max(128)
}

impl TensorMap {
    /// What the driver, or the instructions that take three coordinates, would not accept.
    pub fn check(&self) -> Result<(), String> {
        let Self { address, dims, strides, box_dims, swizzle, rank, element_bytes, reserved } = *self;
        if rank != 3 {
            return Err(format!("a tensor map of rank {rank}; the copies take three coordinates"));
        }
        if !matches!(element_bytes, 2 | 4) || !matches!(swizzle, 0 | 32 | 64 | 128) || reserved != [0; 4] {
            return Err(format!("no tensor map: {self:?}"));
        }
        if address == 0 || !address.is_multiple_of(16) {
            return Err(format!("a tensor map's address {address:#x} is no multiple of 16"));
        }
        if let Some(dim) = dims[..3].iter().find(|&&dim| dim == 0 || dim > 1 << 32) {
            return Err(format!("a tensor map's dimension of {dim} elements"));
        }
        if let Some(stride) = strides[..2].iter().find(|&&stride| stride % 16 != 0 || stride >= 1 << 40) {
            return Err(format!("a tensor map's stride of {stride} bytes"));
        }
        if let Some(size) = box_dims[..3].iter().find(|&size| !(1..=256).contains(size)) {
            return Err(format!("a box of {size} elements along one dimension"));
        }
        let inner = box_dims[0] * element_bytes;
        if inner % 16 != 0 || swizzle != 0 && inner > swizzle {
            return Err(format!("rows of {inner} bytes in a box with a swizzle of {swizzle}"));
        }
        Ok(())
    }

    /// Bytes of a row of the box.
    pub fn row_bytes(&self) -> usize {
        (self.box_dims[0] * self.element_bytes) as usize
    }

    /// Rows of the box.
    pub fn rows(&self) -> usize {
        (self.box_dims[1] * self.box_dims[2]) as usize
    }

    /// Bytes of the box.
    pub fn box_bytes(&self) -> usize {
        self.row_bytes() * self.rows()
    }

    /// What of row `row` of the box with this lowest corner lies in the tensor.
    pub fn row(&self, corner: [i32; 3], row: usize) -> Option<RowPart> {
        let (row, box_rows) = (row as u32, self.box_dims[1]);
        let [x, y, z] = corner.map(i64::from);
        let (y, z) = (y + i64::from(row % box_rows), z + i64::from(row / box_rows));
        let end = (x + i64::from(self.box_dims[0])).min(self.dims[0] as i64);
        let start = x.max(0);
        let is_inside = |at: i64, dim: u64| at >= 0 && at < dim as i64;
        if start >= end || !is_inside(y, self.dims[1]) || !is_inside(z, self.dims[2]) {
            return None;
        }
        let element = u64::from(self.element_bytes);
        // Where a map reaches past the end of the address space, no tensor is.
        let (row, plane) =
            ((y as u64).wrapping_mul(self.strides[0]), (z as u64).wrapping_mul(self.strides[1]));
        let within = (start as u64 * element).wrapping_add(row).wrapping_add(plane);
        Some(RowPart {
            address: self.address.wrapping_add(within) as usize,
            skipped: (start - x) as usize * element as usize,
            bytes: (end - start) as usize * element as usize,
        })
    }
}

/// A part of a box's row in global memory.
pub struct RowPart {
    pub address: usize,
    /// Bytes of the row before it.
    pub skipped: usize,
    pub bytes: usize,
}
