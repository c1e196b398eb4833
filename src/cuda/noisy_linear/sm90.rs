//! The dense layer by this crate's kernels for Hopper; plans `kernels/sm90/noisy_linear.cu`.

use super::{Layer, Passes, sm80};
use crate::cuda::buffer::{Buffer, DType};
use crate::cuda::gpu::Gpu;
use crate::cuda::kernel::table;
use crate::cuda::layer::Pass;
use crate::cuda::plan::Plan;
use crate::cuda::select::Problem;
use crate::cuda::sm90::{Forward, Tiling, takes_noise, takes_tensors};
use crate::error::{Error, Result};
use crate::shape::LinearShape;

pub(super) const PASSES: Passes = Passes { workspace_len, forward, backward: sm80::PASSES.backward };

/// Channels of a tile; with those of the adapter they are the 256 columns that an instruction has at most.
pub const SM90_EXACT_CHANNELS: usize = 128;
pub const SM90_EXACT_STAGES: usize = 4;
/// Blocks that share the weights' tiles.
pub const SM90_EXACT_CLUSTER: usize = 2;
/// Buffers of a consumer for outputs.
pub const SM90_EXACT_STAGING: usize = 1;

/// What the family takes.
pub(super) fn takes(problem: &Problem) -> bool {
    problem.has_base && problem.has_delta && !problem.backward && takes_tensors(problem)
}

fn workspace_len(_: &Gpu, _: &LinearShape, _: DType) -> usize {
    0
}

fn forward(layer: &Layer, pass: &Pass, x: Buffer, y: Buffer) -> Result<Plan> {
    let refused = Error::Argument { argument: "base", problem: "is not one that this family takes" };
    let (Some(base), Some(delta)) = (layer.base, layer.delta_weight) else { return Err(refused) };
    let kernels = match takes_noise(&layer.shape, layer.noise.shape()) {
        true => table::SM90_NOISY_LINEAR_EXACT,
        false => table::SM90_NOISY_LINEAR_EXACT_ANY,
    };
    let Some(kernel) = kernels.choose(pass.arithmetic.dtype) else { return Err(refused) };
    let tiling = Tiling {
        kernel,
        channels: SM90_EXACT_CHANNELS,
        extra: SM90_EXACT_CHANNELS,
        extra_by_column: true,
        stages: SM90_EXACT_STAGES,
        cluster: SM90_EXACT_CLUSTER,
        staging: SM90_EXACT_STAGING,
        shared: 0,
    };
    let gemm = Forward {
        x,
        weight: base.weight,
        extra: (delta, layer.shape.out_features),
        base_bias: base.bias,
        delta_bias: layer.delta_bias,
        lora_b: None,
        s: None,
        y,
        rank: 0,
        scale: 1.0,
    };
    Ok(gemm.plan(&layer.shape, pass, &tiling)?.into())
}
