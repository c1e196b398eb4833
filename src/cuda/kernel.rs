//! Kernels by name.

use super::buffer::DType;

/// A kernel by the file `kernels/FILE.cu` that it is in and its name there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// File name without its extension.
    pub file: &'static str,
    /// Name of the function.
    pub name: &'static str,
}

impl DType {
    /// The kernel for this type among those for `[F32, F16, BF16]`.
    pub(super) fn choose(self, kernels: [Kernel; 3]) -> Kernel {
        kernels[self as usize]
    }
}
