//! Which family computes a layer.

use pace_kernels::LinearShape;
use pace_kernels::cuda::DType::{BF16, F16, F32};
use pace_kernels::cuda::Family::{self, CublasLt, Sm80, Sm90};
use pace_kernels::cuda::{DType, Gpu, Problem, select};
use pace_kernels::noise::NoiseShape::{self, PerSample, PerToken};

const fn shape(branches: usize, rows: usize, in_features: usize, out_features: usize) -> LinearShape {
    LinearShape { branches, batch: rows, tokens: 1, in_features, out_features, shared_input: false }
}

const VIT: LinearShape = LinearShape { tokens: 197, ..shape(2, 64, 768, 3072) };
const TINY: LinearShape = shape(1, 1, 1, 1);
/// The largest size that fits 32 bits signed, and the next.
const FITS: usize = (1 << 31) - 1;
const LARGE: usize = 1 << 31;

const OLD: Gpu = Gpu { capability: (7, 5), ..Gpu::A100 };
const NEW: Gpu = Gpu { capability: (12, 0), ..Gpu::H100 };

const fn without_library(gpu: Gpu) -> Gpu {
    Gpu { has_cublaslt: false, ..gpu }
}

#[test]
fn the_documented_family_is_selected() {
    type Row = (Gpu, DType, LinearShape, Option<NoiseShape>, Option<usize>, Family);
    let rows: &[Row] = &[
        // With a library, on every device, in every type, with and without noise and a low rank.
        (Gpu::A100, F32, VIT, Some(PerSample), None, CublasLt),
        (Gpu::RTX_4090, F16, VIT, Some(PerToken), Some(16), CublasLt),
        (Gpu::H100, BF16, VIT, None, Some(64), CublasLt),
        (Gpu::H100, BF16, TINY, None, None, CublasLt),
        (NEW, F16, TINY, Some(PerSample), Some(1), CublasLt),
        (OLD, F32, VIT, Some(PerSample), Some(16), CublasLt),
        (Gpu::A100, F32, LinearShape { shared_input: true, ..VIT }, Some(PerSample), None, CublasLt),
        // This crate's kernels for Hopper, of 16-bit types, but not for noise per token, which was not measured, and large ranks.
        (Gpu::H100, BF16, VIT, Some(PerSample), None, Sm90),
        (Gpu::H100, F16, VIT, None, None, Sm90),
        (Gpu::H100, BF16, VIT, Some(PerSample), Some(32), Sm90),
        (Gpu::H100, BF16, VIT, Some(PerSample), Some(33), CublasLt),
        (Gpu::H100, BF16, VIT, Some(PerToken), None, CublasLt),
        (Gpu::H100, BF16, LinearShape { in_features: 764, ..VIT }, Some(PerSample), None, CublasLt),
        (Gpu::H100, F32, VIT, Some(PerSample), None, CublasLt),
        (Gpu { has_sm90: false, ..Gpu::H100 }, BF16, VIT, Some(PerSample), None, CublasLt),
        (NEW, BF16, VIT, Some(PerSample), None, CublasLt),
        (without_library(Gpu::H100), BF16, VIT, Some(PerSample), Some(16), Sm90),
        // Without one.
        (without_library(Gpu::A100), F32, VIT, Some(PerSample), None, Sm80),
        (without_library(Gpu::RTX_4090), F16, VIT, Some(PerToken), Some(16), Sm80),
        (without_library(Gpu::H100), BF16, TINY, None, Some(64), Sm80),
        // A library takes sizes that fit 32 bits signed: of the output's rows, K and N.
        (Gpu::H100, BF16, shape(1, FITS, 1, 1), None, None, CublasLt),
        (Gpu::H100, BF16, shape(1, LARGE, 1, 1), None, None, Sm80),
        (Gpu::H100, BF16, shape(2, 1 << 30, 1, 1), Some(PerSample), None, Sm80),
        (Gpu::H100, BF16, shape(2, (1 << 30) - 1, 1, 1), Some(PerSample), None, CublasLt),
        (Gpu::H100, F32, shape(1, 1, FITS, 1), None, None, CublasLt),
        (Gpu::H100, F32, shape(1, 1, LARGE, 1), None, None, Sm80),
        (Gpu::A100, F16, shape(1, 1, 1, FITS), None, Some(8), CublasLt),
        (Gpu::A100, F16, shape(1, 1, 1, LARGE), None, Some(8), Sm80),
        (Gpu::A100, F16, shape(1, 1, 1, 1 << 40), None, Some(8), Sm80),
        (Gpu::A100, F16, shape(2, usize::MAX, usize::MAX, usize::MAX), None, Some(8), Sm80),
        (Gpu::A100, F32, shape(1, 1, 1, 1), None, Some(FITS), CublasLt),
        (Gpu::A100, F32, shape(1, 1, 1, 1), None, Some(LARGE), Sm80),
        // The number of elements may be larger.
        (Gpu::A100, BF16, shape(1, 1 << 20, 1 << 16, 1 << 16), None, None, CublasLt),
        // A forced family, whatever the rest but sizes that it cannot take.
        (Gpu::H100.with_family(CublasLt), BF16, shape(1, LARGE, 1, 1), None, None, Sm80),
        (Gpu::H100.with_family(Sm80), BF16, VIT, Some(PerSample), None, Sm80),
        (Gpu::H100.with_family(Sm80), F32, TINY, None, Some(16), Sm80),
        (Gpu::H100.with_family(CublasLt), BF16, VIT, Some(PerSample), None, CublasLt),
        (Gpu::H100.with_family(CublasLt), F16, VIT, Some(PerSample), None, CublasLt),
        (without_library(Gpu::H100).with_family(Sm80), BF16, VIT, None, None, Sm80),
        (without_library(Gpu::H100).with_family(CublasLt), BF16, VIT, None, None, CublasLt),
    ];
    for &(gpu, dtype, shape, noise, rank, want) in rows {
        let (has_base, has_delta, fold, aligned, backward) = (true, true, false, true, false);
        let problem = Problem { shape, dtype, noise, rank, has_base, has_delta, fold, aligned, backward };
        assert_eq!(select(&gpu, &problem), want, "{gpu:?} {problem:?}");
    }
}
