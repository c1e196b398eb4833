//! What the low-rank layer's kernels get, whichever family has them.

use crate::cuda::noise_source::NoiseSource;
use crate::cuda::pointer::{Input, Output, Void};
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
