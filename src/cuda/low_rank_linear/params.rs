//! What the low-rank layer's kernels get, whichever family has them.

use crate::cuda::noise_source::NoiseSource;
use crate::cuda::pointer::{Input, Output, TensorMapSlot, Void};
use bytemuck::{Pod, Zeroable};

/// Parameters of the kernels `low_rank_linear*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LowRankLinearParams {
    pub(super) noise: NoiseSource,
    pub(super) x: Input<Void>,
    pub(super) weight: Input<Void>,
    pub(super) lora_a: Input<Void>,
    pub(super) lora_b: Input<Void>,
    /// May be null.
    pub(super) base_bias: Input<Void>,
    /// May be null.
    pub(super) delta_bias: Input<Void>,
    pub(super) s: Output<Void>,
    pub(super) y: Output<Void>,
    /// Rows of y start at multiples of 16 bytes and hold whole vectors.
    pub(super) aligned: u64,
    /// Token rows `M`.
    pub(super) rows: u32,
    /// Tokens per sample `T`.
    pub(super) tokens: u32,
    /// Out-features `N`.
    pub(super) channels: u32,
    /// In-features `K`.
    pub(super) inner: u32,
    /// Rank `r`.
    pub(super) rank: u32,
    /// Rows of x; those of y continue with row 0 after the last.
    pub(super) wrap: u32,
    /// Tiles along the columns of y.
    pub(super) tile_columns: u32,
    /// Rows of x, W0 and A start at multiples of 16 bytes and hold whole vectors.
    pub(super) x_aligned: u32,
    /// Rows of B start at multiples of 16 bytes and hold whole vectors.
    pub(super) b_aligned: u32,
    /// Factor on `B @ A`.
    pub(super) scale: f32,
}

/// Parameters of the kernels `low_rank_factors*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LowRankFactorsParams {
    pub(super) noise: NoiseSource,
    pub(super) g: Input<Void>,
    pub(super) s: Input<Void>,
    pub(super) lora_b: Input<Void>,
    /// Partial sums `[chunks, M, r]`, or null.
    pub(super) ds: Output<f32>,
    /// Partial sums of `grad_B`, `[parts, N, r]`, or null.
    pub(super) b_sums: Output<f32>,
    /// Partial sums of `grad_bd`, `[parts, N]`, or null.
    pub(super) delta_bias: Output<f32>,
    /// Token rows `M`.
    pub(super) rows: u32,
    /// Tokens per sample `T`.
    pub(super) tokens: u32,
    /// Out-features `N`.
    pub(super) channels: u32,
    /// Rank `r`.
    pub(super) rank: u32,
    /// Rows of s; those of g continue with row 0 after the last.
    pub(super) wrap: u32,
    /// Chunks of channels.
    pub(super) chunks: u32,
    /// Token rows of a block, a multiple of 32.
    pub(super) part: u32,
    /// Rows of g start at multiples of 16 bytes and hold whole vectors.
    pub(super) aligned: u32,
    /// Rows of s and B start at multiples of 16 bytes and hold whole vectors.
    pub(super) rank_aligned: u32,
    /// Factor on `B @ A`.
    pub(super) scale: f32,
}

/// Parameters of the kernels `sm90_low_rank_factors*` and `sm90_low_rank_product*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct Sm90LowRankGradientsParams {
    /// `g [samples, tokens, N]` or `x [1, rows, K]`, boxes of 64 tokens and channels.
    pub(super) tile: TensorMapSlot,
    /// `s [wrap, tokens, r]` or `ds [copies, tokens, r]`.
    pub(super) low: Input<Void>,
    /// `B [N, r]`, or null for the product.
    pub(super) factor: Input<Void>,
    /// `z [samples, N]`, or null where it is 1.
    pub(super) z: Input<f32>,
    /// Partial sums `[chunks, samples, tokens, r]`, or null.
    pub(super) ds: Output<f32>,
    /// Partial sums of `grad_B`, `[groups, N, r]`, or of `grad_A`, `[groups, r, K]`, or null.
    pub(super) sums: Output<f32>,
    /// Partial sums of `grad_bd`, `[groups, N]`, or null.
    pub(super) delta_bias: Output<f32>,
    /// N or K.
    pub(super) columns: u32,
    pub(super) samples: u32,
    /// Tokens per sample.
    pub(super) tokens: u32,
    /// Rank `r`.
    pub(super) rank: u32,
    /// Samples of `s`; the next is the first again.
    pub(super) wrap: u32,
    /// Branches that share the tile, and samples of each in `ds`.
    pub(super) copies: u32,
    pub(super) copy_samples: u32,
    /// Chunks of the columns, and groups of tiles.
    pub(super) chunks: u32,
    pub(super) groups: u32,
    /// Factor on `ds`.
    pub(super) scale: f32,
}
