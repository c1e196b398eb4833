//! What the kernels of adapters' weights get, and the constants that they share with their plans.

use crate::cuda::pointer::{Input, Output, Void};
use bytemuck::{Pod, Zeroable};

/// Layers of a launch: as many as parameters have room for in 4 KiB.
pub const WEIGHT_LAYERS: usize = 32;
pub const WEIGHT_GRADIENT_LAYERS: usize = 16;
/// Threads of a block.
pub const WEIGHT_THREADS: usize = 256;
pub const WEIGHT_GRADIENT_THREADS: usize = 256;
pub const WEIGHT_SUM_THREADS: usize = 256;
/// Rows of ΔW of a block, 8 per warp.
pub const WEIGHT_ROWS: usize = 64;
/// Elements of Δb of a block, 2 per warp.
pub const BIAS_TILE_ROWS: usize = 16;
/// Columns for which a block makes `Pd·Pu` at a time, and the bytes of `Pd` that it has room for: all columns at once up to 1632 of
/// rank 10 in 16 bits, in 40 KiB of shared memory.
pub const PROMPT_COLUMNS: usize = 2048;
pub const PROMPT_BYTES: usize = 32 << 10;
/// Elements of a block that adds up partial sums; 8 threads share the parts of one.
pub const WEIGHT_SUM_LENGTH: usize = 128;
/// Parameters of `adapter_weights*` for one layer.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct WeightLayer {
    /// W0 `[N, K]`; null for LoRA add.
    pub(super) base: Input<Void>,
    pub(super) lora_b: Input<Void>,
    pub(super) lora_a: Input<Void>,
    /// Pd `[K, p]`.
    pub(super) prompt_down: Input<Void>,
    /// Pu `[p]`.
    pub(super) prompt_up: Input<Void>,
    /// b0 `[N]`, or null.
    pub(super) base_bias: Input<Void>,
    /// d `[N]`, or null.
    pub(super) delta_bias: Input<Void>,
    /// Wd `[N, K]`; null without LoRA.
    pub(super) weight: Output<Void>,
    /// bd `[N]`; null without a prompt.
    pub(super) bias: Output<Void>,
    /// Out-features `N`.
    pub(super) rows: u32,
    /// In-features `K`.
    pub(super) columns: u32,
    pub(super) rank: u32,
    pub(super) prompt_rank: u32,
    pub(super) scale: f32,
    /// Rows of W0, A and Wd start at multiples of 16 bytes and hold whole vectors.
    pub(super) aligned: u32,
}

/// Parameters of the kernels `adapter_weights*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct AdapterWeightsParams {
    pub(super) layers: [WeightLayer; WEIGHT_LAYERS],
    /// Of each layer.
    pub(super) first_block: [u32; WEIGHT_LAYERS],
    /// Layers that there are.
    pub(super) count: u64,
}

/// Parameters of `weight_gradient*` for one layer.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct WeightGradientLayer {
    /// `grad_Wd`; null without LoRA.
    pub(super) grad: Input<Void>,
    /// W0; null for LoRA add.
    pub(super) base: Input<Void>,
    pub(super) lora_b: Input<Void>,
    pub(super) lora_a: Input<Void>,
    /// `grad_bd`.
    pub(super) bias_grad: Input<Void>,
    pub(super) prompt_down: Input<Void>,
    pub(super) prompt_up: Input<Void>,
    /// b0; null is zero.
    pub(super) base_bias: Input<Void>,
    /// Partial sums: `[parts, r, K]`, `[strips, N, r]`, `[parts, K]` and `[parts * strips, p]`.
    pub(super) a_partial: Output<f32>,
    pub(super) b_partial: Output<f32>,
    pub(super) q_partial: Output<f32>,
    pub(super) up_partial: Output<f32>,
    /// Gradients; null are those that nobody asked for.
    pub(super) grad_lora_a: Output<Void>,
    pub(super) grad_lora_b: Output<Void>,
    pub(super) grad_prompt_down: Output<Void>,
    pub(super) grad_prompt_up: Output<Void>,
    pub(super) grad_delta_bias: Output<Void>,
    /// Out-features `N`.
    pub(super) rows: u32,
    /// In-features `K`.
    pub(super) columns: u32,
    /// 0 without LoRA.
    pub(super) rank: u32,
    /// 0 without a prompt.
    pub(super) prompt_rank: u32,
    /// Rows of a part.
    pub(super) part: u32,
    /// Rows of the gradient, W0, A and `a_partial` start at multiples of 16 bytes and hold whole vectors.
    pub(super) aligned: u32,
    pub(super) scale: f32,
    pub(super) reserved: u32,
}

/// Parameters of the kernels `weight_gradients*` and `weight_gradient_sums*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct WeightGradientsParams {
    pub(super) layers: [WeightGradientLayer; WEIGHT_GRADIENT_LAYERS],
    /// Of each layer.
    pub(super) first_block: [u32; WEIGHT_GRADIENT_LAYERS],
    /// Layers that there are.
    pub(super) count: u64,
}
