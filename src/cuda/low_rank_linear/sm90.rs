//! The low-rank layer by this crate's kernels for Hopper; plans `kernels/sm90/low_rank_linear.cu`.

use super::{Layer, Passes, sm80};
use crate::cuda::buffer::{Buffer, DType};
use crate::cuda::gpu::Gpu;
use crate::cuda::kernel::{Kernels16, table};
use crate::cuda::layer::Pass;
use crate::cuda::plan::Plan;
use crate::cuda::select::Problem;
use crate::cuda::sm90::{Forward, Tiling, takes_noise, takes_tensors};
use crate::error::{Error, Result};
use crate::shape::LinearShape;

pub(super) const PASSES: Passes = Passes { workspace_len, forward, backward: sm80::PASSES.backward };

/// The kernels, by the columns that they have for the rank.
const FORWARD: [(usize, Kernels16); 2] =
    [(16, table::SM90_LOW_RANK_LINEAR_16), (32, table::SM90_LOW_RANK_LINEAR_32)];
/// Channels of a tile: 197 tiles of 768, 2304 or 3072 channels come out even on 132 multiprocessors.
pub const SM90_LOW_RANK_CHANNELS: usize = 192;
pub const SM90_LOW_RANK_STAGES: usize = 4;
/// Blocks that share W0's tiles.
pub const SM90_LOW_RANK_CLUSTER: usize = 2;
/// Buffers of a consumer for outputs, up to rank 16; then there is room for one.
pub const SM90_LOW_RANK_STAGING: usize = 2;

/// What the family takes.
pub(in crate::cuda) fn takes(problem: &Problem, rank: usize) -> bool {
    let known = FORWARD.iter().any(|&(columns, _)| rank <= columns);
    let noise = takes_noise(&problem.shape, problem.noise);
    known && noise && problem.has_base && !problem.backward && takes_tensors(problem)
}

fn workspace_len(_: &Gpu, _: &LinearShape, _: usize, _: DType) -> usize {
    0
}

fn forward(layer: &Layer, pass: &Pass, x: Buffer, s: Buffer, y: Buffer) -> Result<Plan> {
    let refused = Error::Argument { argument: "rank", problem: "is not one that this family takes" };
    let Some(base) = layer.base else { return Err(refused) };
    let Some((columns, kernels)) = FORWARD.into_iter().find(|&(columns, _)| layer.rank <= columns) else {
        return Err(refused);
    };
    let Some(kernel) = kernels.choose(pass.arithmetic.dtype) else { return Err(refused) };
    let tiling = Tiling {
        kernel,
        channels: SM90_LOW_RANK_CHANNELS,
        extra: columns,
        extra_by_column: false,
        stages: SM90_LOW_RANK_STAGES,
        cluster: SM90_LOW_RANK_CLUSTER,
        staging: if columns == 16 { SM90_LOW_RANK_STAGING } else { 1 },
        // B, its rows padded.
        shared: SM90_LOW_RANK_CHANNELS * (2 * columns + 16),
    };
    let gemm = Forward {
        x,
        weight: base.weight,
        extra: (layer.lora_a, layer.rank),
        base_bias: base.bias,
        delta_bias: layer.delta_bias,
        lora_b: Some(layer.lora_b),
        s: Some(s),
        y,
        rank: layer.rank,
        scale: layer.scale,
    };
    Ok(gemm.plan(&layer.shape, pass, &tiling)?.into())
}
