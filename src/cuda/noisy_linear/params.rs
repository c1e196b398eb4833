//! What the dense layer's kernels get, whichever family has them.

use crate::cuda::noise_source::NoiseSource;
use crate::cuda::pointer::{Input, Output, TensorMapSlot, Void};
use bytemuck::{Pod, Zeroable};

/// One GEMM of a sum of them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct Segment {
    pub(super) left: Input<Void>,
    pub(super) right: Input<Void>,
    pub(super) inner: u32,
    /// 1: under the noise.
    pub(super) adapter: u32,
    /// Token row of y or g that row 0 of the left operand stands for.
    pub(super) first_row: u32,
    /// Rows of both operands start at multiples of 16 bytes and hold whole vectors.
    pub(super) aligned: u32,
}

/// Parameters of the kernels `noisy_linear*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct NoisyLinearParams {
    pub(super) noise: NoiseSource,
    pub(super) segments: [Segment; 2],
    /// May be null.
    pub(super) base_bias: Input<Void>,
    /// May be null.
    pub(super) delta_bias: Input<Void>,
    pub(super) y: Output<Void>,
    /// Token rows `M`.
    pub(super) rows: u32,
    /// Tokens per sample `T`.
    pub(super) tokens: u32,
    /// Out-features `N`.
    pub(super) channels: u32,
    /// Rows of x; those of y continue with row 0 after the last.
    pub(super) wrap: u32,
    /// Number of segments.
    pub(super) count: u32,
    /// Tiles along the columns of the output.
    pub(super) tile_columns: u32,
    /// Rows of y start at multiples of 16 bytes and hold whole vectors.
    pub(super) aligned: u32,
    /// Factor on the segments under the noise.
    pub(super) scale: f32,
}

/// Parameters of the kernels `noisy_linear_input*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct NoisyLinearInputParams {
    pub(super) noise: NoiseSource,
    pub(super) segments: [Segment; 4],
    pub(super) dx: Output<Void>,
    /// Rows of dx.
    pub(super) rows: u32,
    /// Tokens per sample `T`.
    pub(super) tokens: u32,
    /// Out-features `N`.
    pub(super) channels: u32,
    /// In-features `K`.
    pub(super) columns: u32,
    /// Number of segments.
    pub(super) count: u32,
    /// Tiles along the columns of the output.
    pub(super) tile_columns: u32,
    /// Rows of dx start at multiples of 16 bytes and hold whole vectors.
    pub(super) aligned: u32,
    /// Factor on the sum.
    pub(super) scale: f32,
}

/// Parameters of the kernels `noisy_linear_weight*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct NoisyLinearWeightParams {
    pub(super) noise: NoiseSource,
    pub(super) g: Input<Void>,
    pub(super) x: Input<Void>,
    /// `grad_Wd`, or its partial sums; or null.
    pub(super) weight: Output<Void>,
    /// `grad_bd`, or its partial sums; or null.
    pub(super) bias: Output<Void>,
    /// Token rows `M`.
    pub(super) rows: u32,
    /// Tokens per sample `T`.
    pub(super) tokens: u32,
    /// Out-features `N`.
    pub(super) channels: u32,
    /// In-features `K`.
    pub(super) columns: u32,
    /// Rows of x; those of y continue with row 0 after the last.
    pub(super) wrap: u32,
    /// Tiles along the columns of the output.
    pub(super) tile_columns: u32,
    /// Tiles along its rows.
    pub(super) tile_rows: u32,
    /// Token rows of a partial sum.
    pub(super) part: u32,
    /// Split-K: write f32 partial sums, `[parts, N, K]`.
    pub(super) partial: u32,
    /// Rows of g start at multiples of 16 bytes and hold whole vectors.
    pub(super) left_aligned: u32,
    /// Rows of x start at multiples of 16 bytes and hold whole vectors.
    pub(super) right_aligned: u32,
    /// Rows of the weight gradient, or of its partial sums, start at multiples of 16 bytes and hold whole vectors.
    pub(super) aligned: u32,
}

/// Parameters of the kernels `sm90_folded_linear*` and `sm90_folded_input*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct Sm90FoldedParams {
    /// `W0 [N, K]`.
    pub(super) weight: TensorMapSlot,
    /// `Wd [N, K]`.
    pub(super) delta: TensorMapSlot,
    /// `x` or `g`, `[samples, T, .]`, boxes of a unit's tokens.
    pub(super) x: TensorMapSlot,
    /// `z [R, N]`, for the gradient.
    pub(super) z_map: TensorMapSlot,
    /// `y` or `grad_x`, `[samples, T, .]`, boxes of a unit's tokens.
    pub(super) y: TensorMapSlot,
    /// The same `z`.
    pub(super) z: Input<f32>,
    /// May be null.
    pub(super) base_bias: Input<Void>,
    /// May be null.
    pub(super) delta_bias: Input<Void>,
    /// Rows of the output transposed: N or K.
    pub(super) rows: u32,
    /// Length of the reduction: K or N.
    pub(super) inner: u32,
    /// Samples of the output.
    pub(super) samples: u32,
    /// Samples of x; the next is the first again.
    pub(super) wrap: u32,
    /// Branches of g that the gradient adds up.
    pub(super) copies: u32,
    /// Units of a sample.
    pub(super) parts: u32,
    /// Tiles along the units.
    pub(super) tile_rows: u32,
    /// Tiles along the rows, those of a cluster as one.
    pub(super) tile_columns: u32,
}

/// Parameters of the kernels `sm90_weight_gradient*` and `sm90_weight_sums*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct Sm90WeightParams {
    /// `g [R, T, N]`, boxes of 64 tokens and channels.
    pub(super) g: TensorMapSlot,
    /// `x [samples, T, K]`, boxes of 64 tokens and features.
    pub(super) x: TensorMapSlot,
    /// `z [R, N]`.
    pub(super) z: Input<f32>,
    /// `grad_Wd [N, K]`.
    pub(super) weight: Output<Void>,
    /// `grad_bd [N]`, or null.
    pub(super) bias: Output<Void>,
    /// Sums of tiles that clusters share, two for each block.
    pub(super) partial: Output<f32>,
    /// The same of `grad_bd`, or null.
    pub(super) bias_partial: Output<f32>,
    /// Channels `N`.
    pub(super) rows: u32,
    /// Features `K`.
    pub(super) columns: u32,
    /// Samples `R`.
    pub(super) samples: u32,
    /// Samples of x; the next is the first again.
    pub(super) wrap: u32,
    /// Tokens per sample `T`.
    pub(super) tokens: u32,
    /// Tiles of a cluster.
    pub(super) tiles: u32,
    /// Tiles along the features.
    pub(super) tile_columns: u32,
    /// Clusters that share the work.
    pub(super) clusters: u32,
}
