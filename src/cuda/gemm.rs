//! GEMMs as steps of a plan, for a library to compute.

use super::buffer::{Address, DType};
use super::gpu::Gpu;
use super::layer::Arithmetic;
use super::select::library_workspace;

/// `D [m, n] = alpha·A @ B + beta·D + bias`, all row-major, accumulated in `f32` and rounded once.
///
/// Plans have checked the sizes and what overlaps: each fits 32 bits signed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gemm {
    /// Type of `A` and `B`.
    pub dtype: DType,
    /// Type of `D`: that of the others, or `f32`.
    pub output: DType,
    /// Whether `f32` may be multiplied as TF32 (10 fraction bits).
    pub allow_tf32: bool,
    /// Rows of `D`.
    pub m: usize,
    /// Columns of `D`.
    pub n: usize,
    /// The inner size.
    pub k: usize,
    /// `A [m, k]`.
    pub a: Matrix,
    /// `B [k, n]`.
    pub b: Matrix,
    /// `D`.
    pub d: Address,
    /// Factor on `A @ B`.
    pub alpha: f32,
    /// Factor on what is in `D` before: 0 (contents are ignored) or 1.
    pub beta: f32,
    /// A vector `[n]` of the type of `D` that is added to each row before rounding; it starts at a multiple of 16 bytes.
    pub bias: Option<Address>,
    /// Memory for the library; contents are ignored.
    pub workspace: Workspace,
}

/// An operand of a [`Gemm`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matrix {
    /// Its first element.
    pub address: Address,
    /// Whether memory holds the transpose, row-major.
    pub is_transposed: bool,
}

/// Device memory for a library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workspace {
    /// Where it starts, at a multiple of 256 bytes.
    pub address: Address,
    /// Its size.
    pub bytes: usize,
}

/// Makes the GEMMs of one pass.
pub(super) struct Gemms {
    arithmetic: Arithmetic,
    workspace: Workspace,
}

impl Gemms {
    pub(super) fn new(arithmetic: Arithmetic, workspace: Workspace) -> Self {
        Self { arithmetic, workspace }
    }

    fn gemm(&self, [m, n, k]: [usize; 3], a: Matrix, b: Matrix, d: Address) -> Gemm {
        let Arithmetic { dtype, allow_tf32 } = self.arithmetic;
        let workspace = self.workspace;
        let (output, alpha, beta, bias) = (dtype, 1.0, 0.0, None);
        Gemm { dtype, output, allow_tf32, m, n, k, a, b, d, alpha, beta, bias, workspace }
    }

    /// `d [m, n] = left [m, k] @ right [n, k]ᵀ`: a layer's forward pass.
    pub(super) fn times_transposed(
        &self,
        sizes: [usize; 3],
        left: Address,
        right: Address,
        d: Address,
    ) -> Gemm {
        self.gemm(sizes, Matrix::plain(left), Matrix::transposed(right), d)
    }

    /// `d [m, n] = left [m, k] @ right [k, n]`: the gradient to a layer's input.
    pub(super) fn times(&self, sizes: [usize; 3], left: Address, right: Address, d: Address) -> Gemm {
        self.gemm(sizes, Matrix::plain(left), Matrix::plain(right), d)
    }

    /// `d [m, n] = left [k, m]ᵀ @ right [k, n]`: the gradient to a layer's weight.
    pub(super) fn transposed_times(
        &self,
        sizes: [usize; 3],
        left: Address,
        right: Address,
        d: Address,
    ) -> Gemm {
        self.gemm(sizes, Matrix::transposed(left), Matrix::plain(right), d)
    }
}

impl Gemm {
    /// The same, added to what is in `D`.
    pub(super) fn accumulated(self) -> Self {
        Self { beta: 1.0, ..self }
    }

    /// The same with an output in `f32`.
    pub(super) fn in_f32(self) -> Self {
        Self { output: DType::F32, ..self }
    }

    /// The same with a factor.
    pub(super) fn scaled(self, alpha: f32) -> Self {
        Self { alpha, ..self }
    }

    /// The same with a bias, if there is one.
    pub(super) fn with_bias(self, bias: Option<Address>) -> Self {
        Self { bias, ..self }
    }
}

impl Matrix {
    fn plain(address: Address) -> Self {
        Self { address, is_transposed: false }
    }

    fn transposed(address: Address) -> Self {
        Self { address, is_transposed: true }
    }
}

/// Allocates from a workspace, each time at a multiple of 256 bytes: what `cudaMalloc` gives, and the library's kernels like best.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arena {
    next: u64,
}

impl Arena {
    const ALIGNMENT: usize = 256;

    /// From this address on.
    pub(super) fn new(start: Address) -> Self {
        Self { next: start.0.saturating_add(Self::ALIGNMENT as u64 - 1) & !(Self::ALIGNMENT as u64 - 1) }
    }

    pub(super) fn take(&mut self, bytes: usize) -> Address {
        let address = Address(self.next);
        let step = bytes.checked_next_multiple_of(Self::ALIGNMENT).unwrap_or(usize::MAX) as u64;
        self.next = self.next.saturating_add(step);
        address
    }

    /// What comes after both: they share memory.
    pub(super) fn after_both(self, other: Self) -> Self {
        Self { next: self.next.max(other.next) }
    }

    /// Takes the library's part for GEMMs whose largest output has that many elements.
    pub(super) fn take_workspace(&mut self, gpu: &Gpu, elements: usize) -> Workspace {
        // The library wants it for the partial sums of split-K, in f32; for small outputs 16 parts and some counters are enough.
        let bytes = elements.saturating_mul(16 * 4).saturating_add(64 << 10).min(library_workspace(gpu));
        Workspace { address: self.take(bytes), bytes }
    }

    /// The `f32` elements that a workspace needs, wherever it starts, for what `carve` takes.
    pub(super) fn len_of(carve: impl FnOnce(&mut Self)) -> usize {
        let mut arena = Self { next: 0 };
        carve(&mut arena);
        // A start that is not aligned costs less than one step.
        usize::try_from(arena.next).unwrap_or(usize::MAX).saturating_add(Self::ALIGNMENT).div_ceil(4)
    }
}
