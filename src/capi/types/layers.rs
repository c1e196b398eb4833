//! Structs of layers, their weights and their noise.

use super::{PaceNoise, PaceShape, PaceTensor};

/// Arguments of `pace_noise_fill`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PaceNoiseFill {
    /// `sizeof(PaceNoiseFill)`.
    pub size: u64,
    /// Type of `z`: `PACE_F32`, on the CPU also `PACE_F64`.
    pub dtype: u32,
    /// Zero.
    pub flags: u32,
    /// Sizes; `in_features` and `shared_input` do not matter.
    pub shape: PaceShape,
    /// Generated noise.
    pub noise: PaceNoise,
    /// Output: `[R, N]` per sample, `[R, T, N]` per token.
    pub z: PaceTensor,
}

/// Arguments of `pace_noisy_linear_*`: `y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)` (paper equation 8).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PaceNoisyLinear {
    /// `sizeof(PaceNoisyLinear)`.
    pub size: u64,
    /// Type of all tensors but `z` and the workspace.
    pub dtype: u32,
    /// `PACE_EXACT`, `PACE_ALLOW_TF32`.
    pub flags: u32,
    /// Sizes.
    pub shape: PaceShape,
    /// Source of `z`.
    pub noise: PaceNoise,
    /// `W0 [N, K]`; absent for a zero base term (the noisy head).
    pub base_weight: PaceTensor,
    /// `b0 [N]`, or absent.
    pub base_bias: PaceTensor,
    /// `ΔW [N, K]`; absent for zero (VPT add).
    pub delta_weight: PaceTensor,
    /// `Δb [N]`; absent for zero.
    pub delta_bias: PaceTensor,
    /// `[M, K]`, or `[B·T, K]` if the input is shared. The backward pass needs it for `grad_delta_weight` only, and without that it
    /// may be absent.
    pub x: PaceTensor,
    /// Output of the forward pass, `[M, N]`.
    pub y: PaceTensor,
    /// Backward: `∂L/∂y [M, N]`.
    pub dy: PaceTensor,
    /// Output of the backward pass, of the shape of `x`; absent if not wanted, as the next two.
    pub grad_input: PaceTensor,
    /// Output of the backward pass, `[N, K]`.
    pub grad_delta_weight: PaceTensor,
    /// Output of the backward pass, `[N]`.
    pub grad_delta_bias: PaceTensor,
    /// At least `pace_noisy_linear_workspace` bytes; contents are ignored.
    pub workspace: PaceTensor,
}

/// Arguments of `pace_low_rank_linear_*`: `y = x·W0ᵀ + b0 + z ⊙ (scale·(x·Aᵀ)·Bᵀ + δb)`, LoRA add under noise.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PaceLowRankLinear {
    /// `sizeof(PaceLowRankLinear)`.
    pub size: u64,
    /// Type of all tensors but `z` and the workspace.
    pub dtype: u32,
    /// `PACE_ALLOW_TF32`.
    pub flags: u32,
    /// Sizes.
    pub shape: PaceShape,
    /// Source of `z`.
    pub noise: PaceNoise,
    /// Rank `r`.
    pub rank: u64,
    /// Factor on `B·A` (the α/r of common LoRA code); 1 in the paper. Not 0.
    pub scale: f64,
    /// `W0 [N, K]`; absent for a zero base term.
    pub base_weight: PaceTensor,
    /// `b0 [N]`, or absent.
    pub base_bias: PaceTensor,
    /// `A [r, K]`.
    pub lora_a: PaceTensor,
    /// `B [N, r]`.
    pub lora_b: PaceTensor,
    /// `δb [N]`, or absent.
    pub delta_bias: PaceTensor,
    /// `[M, K]`, or `[B·T, K]` if the input is shared.
    pub x: PaceTensor,
    /// CUDA: `scale·x·Aᵀ`, a row of `r` elements for each of `x`. The forward pass writes it, the backward pass reads it. The
    /// CPU does not use it.
    pub s: PaceTensor,
    /// Output of the forward pass, `[M, N]`.
    pub y: PaceTensor,
    /// Backward: `∂L/∂y [M, N]`.
    pub dy: PaceTensor,
    /// Output of the backward pass, of the shape of `x`; absent if not wanted, as the next three.
    pub grad_input: PaceTensor,
    /// Output of the backward pass, `[r, K]`.
    pub grad_lora_a: PaceTensor,
    /// Output of the backward pass, `[N, r]`.
    pub grad_lora_b: PaceTensor,
    /// Output of the backward pass, `[N]`.
    pub grad_delta_bias: PaceTensor,
    /// At least `pace_low_rank_linear_workspace` bytes; contents are ignored.
    pub workspace: PaceTensor,
}

/// Arguments of `pace_lora_mul_linear_*`, a layer with the paper's main adapter: `y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)` with
/// `ΔW = W0 ⊙ (scale·B·A)` and `Δb = W0·(Pd·Pu) + b0⊙δb` (paper equation 8). Both are built for each pass.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PaceLoraMulLinear {
    /// `sizeof(PaceLoraMulLinear)`.
    pub size: u64,
    /// Type of all tensors but `z` and the workspace.
    pub dtype: u32,
    /// `PACE_EXACT`, `PACE_ALLOW_TF32`.
    pub flags: u32,
    /// Sizes.
    pub shape: PaceShape,
    /// Source of `z`.
    pub noise: PaceNoise,
    /// Rank `r`, if there is a `lora_a`.
    pub rank: u64,
    /// Rank `p`, if there is a `prompt_down`.
    pub prompt_rank: u64,
    /// Factor on `B·A`, if there is a `lora_a`; 1 in the paper. Not 0.
    pub scale: f64,
    /// `W0 [N, K]`.
    pub base_weight: PaceTensor,
    /// `b0 [N]`, or absent.
    pub base_bias: PaceTensor,
    /// `A [r, K]`; absent, with `lora_b`, for no ΔW (VPT add).
    pub lora_a: PaceTensor,
    /// `B [N, r]`.
    pub lora_b: PaceTensor,
    /// `Pd [K, p]`; absent, with `prompt_up`, for `Δb = δb`.
    pub prompt_down: PaceTensor,
    /// `Pu [p]`.
    pub prompt_up: PaceTensor,
    /// `δb [N]`, or absent.
    pub delta_bias: PaceTensor,
    /// `[M, K]`, or `[B·T, K]` if the input is shared. The backward pass needs it for the gradients to `lora_a` and `lora_b` only,
    /// and without them it may be absent.
    pub x: PaceTensor,
    /// Output of the forward pass, `[M, N]`.
    pub y: PaceTensor,
    /// Backward: `∂L/∂y [M, N]`.
    pub dy: PaceTensor,
    /// Output of the backward pass, of the shape of `x`; absent if not wanted, as the next five.
    pub grad_input: PaceTensor,
    /// Output of the backward pass, `[r, K]`.
    pub grad_lora_a: PaceTensor,
    /// Output of the backward pass, `[N, r]`.
    pub grad_lora_b: PaceTensor,
    /// Output of the backward pass, `[K, p]`.
    pub grad_prompt_down: PaceTensor,
    /// Output of the backward pass, `[p]`.
    pub grad_prompt_up: PaceTensor,
    /// Output of the backward pass, `[N]`.
    pub grad_delta_bias: PaceTensor,
    /// At least `pace_lora_mul_linear_workspace` bytes; contents are ignored.
    pub workspace: PaceTensor,
}

/// Arguments of `pace_noisy_epilogue_*`, for trainers with a GEMM of their own: `y += z ⊙ a` in place.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PaceNoisyEpilogue {
    /// `sizeof(PaceNoisyEpilogue)`.
    pub size: u64,
    /// Type of all tensors but `z`.
    pub dtype: u32,
    /// Zero.
    pub flags: u32,
    /// Sizes; `in_features` and `shared_input` do not matter.
    pub shape: PaceShape,
    /// Source of `z`.
    pub noise: PaceNoise,
    /// Forward: what the adapter adds, `[M, N]`.
    pub a: PaceTensor,
    /// Forward: the base output `[M, N]`, to which `z ⊙ a` is added.
    pub y: PaceTensor,
    /// Backward: `∂L/∂y [M, N]`.
    pub dy: PaceTensor,
    /// Output of the backward pass: `z ⊙ dy`, the gradient to `a`. That to the base output is `dy` itself.
    pub da: PaceTensor,
}

/// Arguments of `pace_low_rank_weight_*`: `ΔW = scale·B·A`, or `W0 ⊙ (scale·B·A)` (LoRA mul) if there is a `base_weight`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PaceLowRankWeight {
    /// `sizeof(PaceLowRankWeight)`.
    pub size: u64,
    /// Type of all tensors but the workspace.
    pub dtype: u32,
    /// Zero.
    pub flags: u32,
    /// `N`.
    pub out_features: u64,
    /// `K`.
    pub in_features: u64,
    /// Rank `r`.
    pub rank: u64,
    /// Factor on `B·A`; 1 in the paper. Not 0.
    pub scale: f64,
    /// `A [r, K]`.
    pub lora_a: PaceTensor,
    /// `B [N, r]`.
    pub lora_b: PaceTensor,
    /// `W0 [N, K]` for LoRA mul, or absent.
    pub base_weight: PaceTensor,
    /// Output of the forward pass: `ΔW [N, K]`.
    pub out: PaceTensor,
    /// Backward: `∂L/∂ΔW [N, K]`.
    pub dout: PaceTensor,
    /// Output of the backward pass, `[r, K]`.
    pub grad_lora_a: PaceTensor,
    /// Output of the backward pass, `[N, r]`.
    pub grad_lora_b: PaceTensor,
    /// Backward: at least `pace_low_rank_weight_workspace` bytes.
    pub workspace: PaceTensor,
}

/// Arguments of `pace_prompt_bias_*`: `Δb = W0·(Pd·Pu) + b0⊙δb` (VPT add).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PacePromptBias {
    /// `sizeof(PacePromptBias)`.
    pub size: u64,
    /// Type of all tensors but the workspace.
    pub dtype: u32,
    /// Zero.
    pub flags: u32,
    /// `N`.
    pub out_features: u64,
    /// `K`.
    pub in_features: u64,
    /// Rank `r`.
    pub rank: u64,
    /// `W0 [N, K]`.
    pub base_weight: PaceTensor,
    /// `b0 [N]`, or absent.
    pub base_bias: PaceTensor,
    /// `Pd [K, r]`.
    pub prompt_down: PaceTensor,
    /// `Pu [r]`.
    pub prompt_up: PaceTensor,
    /// `δb [N]`, or absent. Without a `base_bias` it plays no part.
    pub delta_bias: PaceTensor,
    /// Output of the forward pass: `Δb [N]`.
    pub out: PaceTensor,
    /// Backward: `∂L/∂Δb [N]`.
    pub dout: PaceTensor,
    /// Output of the backward pass, `[K, r]`.
    pub grad_prompt_down: PaceTensor,
    /// Output of the backward pass, `[r]`.
    pub grad_prompt_up: PaceTensor,
    /// Output of the backward pass, `[N]`, or absent.
    pub grad_delta_bias: PaceTensor,
    /// Both passes: at least `pace_prompt_bias_workspace` bytes.
    pub workspace: PaceTensor,
}

/// Arguments of `pace_merge` (`target += delta`) and `pace_unmerge` (`target -= delta`).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PaceMerge {
    /// `sizeof(PaceMerge)`.
    pub size: u64,
    /// Type of both tensors.
    pub dtype: u32,
    /// Zero.
    pub flags: u32,
    /// A weight or bias, changed in place.
    pub target: PaceTensor,
    /// As many elements.
    pub delta: PaceTensor,
}
