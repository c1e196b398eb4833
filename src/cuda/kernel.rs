//! The kernels by name: a table that the build script makes of what the files in `kernels/` define.

use super::buffer::DType;

/// Threads of a warp.
pub const WARP: usize = 32;

/// A kernel by the file `kernels/FILE.cu` that it is in and its name there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Path of the file in `kernels/`, without its extension: `loss`, `sm80/noisy_linear`.
    pub file: &'static str,
    /// Name of the function.
    pub name: &'static str,
}

/// A kernel by storage type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kernels {
    f32: Kernel,
    f16: Kernel,
    bf16: Kernel,
}

impl Kernels {
    /// The one for a type.
    pub(crate) fn choose(self, dtype: DType) -> Kernel {
        match dtype {
            DType::F32 => self.f32,
            DType::F16 => self.f16,
            DType::BF16 => self.bf16,
        }
    }
}

/// A kernel by storage type, for those of 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kernels16 {
    f16: Kernel,
    bf16: Kernel,
}

impl Kernels16 {
    /// The one for a type; `None` for `f32`.
    pub(crate) fn choose(self, dtype: DType) -> Option<Kernel> {
        match dtype {
            DType::F32 => None,
            DType::F16 => Some(self.f16),
            DType::BF16 => Some(self.bf16),
        }
    }
}

/// A kernel that multiplies matrices, by how a storage type is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GemmKernels {
    f32: Kernel,
    tf32: Kernel,
    f16: Kernel,
    bf16: Kernel,
}

impl GemmKernels {
    /// The one for a type; `allow_tf32`: `f32` may be rounded to TF32.
    pub(crate) fn choose(self, dtype: DType, allow_tf32: bool) -> Kernel {
        match dtype {
            DType::F32 if allow_tf32 => self.tf32,
            DType::F32 => self.f32,
            DType::F16 => self.f16,
            DType::BF16 => self.bf16,
        }
    }
}

/// `KERNELS` and a constant for each kernel, by build.rs.
pub(crate) mod table {
    use super::*;
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

pub use table::KERNELS;
