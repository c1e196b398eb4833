//! Which family of kernels computes a layer: the only place that decides by device.

use super::buffer::DType;
use super::gpu::{Family, Gpu};
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
}

/// The family that computes a layer on a device, in both passes. Sizes that a forced family does not take fall back to
/// `sm80`, which takes all.
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
/// let problem = Problem { shape, dtype: DType::BF16, noise: Some(NoiseShape::PerSample), rank: None };
/// assert_eq!(select(&Gpu::H100, &problem), Family::CublasLt);
/// assert_eq!(select(&Gpu { has_cublaslt: false, ..Gpu::H100 }, &problem), Family::Sm80);
/// ```
pub fn select(gpu: &Gpu, problem: &Problem) -> Family {
    let LinearShape { in_features, out_features, .. } = problem.shape;
    let (rows, rank) = (problem.shape.out_rows(), problem.rank.unwrap_or(0));
    // cuBLASLt's kernels index with 32 bits.
    if [rows, in_features, out_features, rank].iter().any(|&size| size > i32::MAX as usize) {
        return Family::Sm80;
    }
    if let Some(forced) = gpu.family {
        return forced;
    }
    if !gpu.has_cublaslt {
        return Family::Sm80;
    }
    // H200, 2026-11-26, ViT-B shapes: GEMMs of `sm80` reach 12 to 35 % of cuBLASLt's speed in bf16 and 33 % in f32, in every shape,
    // which no saved pass over memory makes up for (`docs/tuning.md`). Nothing else was measured.
    Family::CublasLt
}
