//! Which family of kernels computes a layer, and what else is decided by device: the only place for it.

use super::buffer::DType;
use super::gpu::{Family, Gpu};
use super::{low_rank_linear, noisy_linear};
use crate::noise::NoiseShape;
use crate::shape::LinearShape;

/// A linear layer as far as the choice depends on it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem {
    /// Sizes.
    pub shape: LinearShape,
    /// Type of the tensors.
    pub dtype: DType,
    /// Which elements share a `z`; `None` without noise.
    pub noise: Option<NoiseShape>,
    /// The rank of a low-rank adapter; `None` for a dense one.
    pub rank: Option<usize>,
    /// Whether there is a frozen layer under the adapter.
    pub has_base: bool,
    /// Whether the adapter has a weight.
    pub has_delta: bool,
    /// Whether the weights of base and adapter may be added before they are rounded ([`NoisyLinear::fold`](super::NoisyLinear)).
    pub fold: bool,
    /// Whether every tensor starts at a multiple of 16 bytes.
    pub aligned: bool,
    /// Whether it is the backward pass.
    pub backward: bool,
}

/// The family that computes a pass of a layer on a device: the forced one where it takes the problem, or else the fastest that was
/// measured.
///
/// ```
/// use pace_kernels::LinearShape;
/// use pace_kernels::cuda::{DType, Family, Gpu, Problem, select};
/// use pace_kernels::noise::NoiseShape;
///
/// let shape = LinearShape {
///     branches: 2,
///     batch: 64,
///     tokens: 197,
///     in_features: 768,
///     out_features: 3072,
///     shared_input: false,
/// };
/// let problem = Problem {
///     shape,
///     dtype: DType::BF16,
///     noise: Some(NoiseShape::PerSample),
///     rank: None,
///     has_base: true,
///     has_delta: true,
///     fold: false,
///     aligned: true,
///     backward: false,
/// };
/// assert_eq!(select(&Gpu::H100, &problem), Family::Sm90);
/// assert_eq!(select(&Gpu::A100, &problem), Family::CublasLt);
/// assert_eq!(select(&Gpu { has_cublaslt: false, ..Gpu::A100 }, &problem), Family::Sm80);
/// ```
pub fn select(gpu: &Gpu, problem: &Problem) -> Family {
    // H200, 2026-11-27, bf16, ViT-B shapes, times over cuBLASLt's bare GEMM: `sm90` 1.2 to 2.1, `cublaslt` 1.5 to 2.9, `sm80` 2.9 to 8.6
    // (`docs/performance.md`). Noise per token was not measured for `sm90`.
    let pays = match problem.rank {
        Some(_) => low_rank_linear::pays_sm90(problem),
        None => noisy_linear::pays_sm90(gpu, problem),
    };
    let measured = problem.noise != Some(NoiseShape::PerToken) && pays;
    let sm90 = Family::Sm90.is_available(gpu) && measured;
    let fastest_first = [sm90.then_some(Family::Sm90), gpu.has_cublaslt.then_some(Family::CublasLt)];
    let candidates = [gpu.family].into_iter().chain(fastest_first).flatten();
    candidates.into_iter().find(|family| family.takes(problem)).unwrap_or(Family::Sm80)
}

impl Family {
    /// Whether it computes a layer of this kind, on a device where it is available. [`Family::Sm80`] takes all.
    fn takes(self, problem: &Problem) -> bool {
        match self {
            Self::Sm80 => true,
            Self::Sm90 => match problem.rank {
                Some(rank) => low_rank_linear::takes_sm90(problem, rank),
                None => noisy_linear::takes_sm90(problem),
            },
            Self::CublasLt => {
                let LinearShape { in_features, out_features, .. } = problem.shape;
                let sizes = [problem.shape.out_rows(), in_features, out_features, problem.rank.unwrap_or(0)];
                // The library's kernels index with 32 bits.
                sizes.into_iter().all(|size| size <= i32::MAX as usize)
            }
        }
    }
}

/// Most bytes of memory for a GEMM of cuBLASLt: what NVIDIA's manual recommends, 32 MiB for Hopper and later, 4 MiB before.
pub(super) fn library_workspace(gpu: &Gpu) -> usize {
    if gpu.capability.0 >= 9 { 32 << 20 } else { 4 << 20 }
}
