//! The low-rank layer by this crate's kernels for Hopper; plans `kernels/sm90/low_rank_linear.cu`, and in its module the other
//! kernels.

mod gradients;

use super::{Layer, Passes, sm80};
use crate::cpu::LowRankGrads;
use crate::cuda::buffer::{Buffer, DType};
use crate::cuda::gemm::Arena;
use crate::cuda::gpu::Gpu;
use crate::cuda::kernel::{Kernels16, table};
use crate::cuda::layer::Pass;
use crate::cuda::plan::Plan;
use crate::cuda::select::Problem;
use crate::cuda::sm90::{LinearGemm, Tiling, takes_noise, takes_tensors};
use crate::error::{Error, Result};
use crate::shape::LinearShape;

pub(super) const PASSES: Passes = Passes { workspace_len, forward, backward };

/// The kernels by the columns that they have for the rank: forward, and the gradient to the input.
const KERNELS: [(usize, Kernels16, Kernels16); 2] = [
    (16, table::SM90_LOW_RANK_LINEAR_16, table::SM90_LOW_RANK_INPUT_16),
    (32, table::SM90_LOW_RANK_LINEAR_32, table::SM90_LOW_RANK_INPUT_32),
];
/// Channels of a tile: 197 tiles of 768, 2304 or 3072 channels come out even on 132 multiprocessors.
pub const SM90_LOW_RANK_CHANNELS: usize = 192;
pub const SM90_LOW_RANK_STAGES: usize = 4;
/// Blocks that share W0's tiles.
pub const SM90_LOW_RANK_CLUSTER: usize = 2;
/// Buffers of a consumer for outputs; where there is no room for them, one.
pub const SM90_LOW_RANK_STAGING: usize = 2;

/// What the family takes.
pub(in crate::cuda) fn takes(problem: &Problem, rank: usize) -> bool {
    let known = KERNELS.iter().any(|&(columns, ..)| rank <= columns);
    let noise = problem.backward || takes_noise(&problem.shape, problem.noise);
    known && noise && problem.has_base && takes_tensors(problem)
}

/// Whether it was measured to be faster than the library, where it takes the problem.
///
/// H200, 2026-11-27, bf16: everywhere (128 × 197 of 768 → 3072: forward 236 µs against 415, backward 300 against 414; 8 × 197 of 768 →
/// 768: 11 against 29, 40 against 41) but the backward pass by the portable kernel (128 × 1 of 768 → 3072: 69 against 51).
pub(in crate::cuda) fn pays(problem: &Problem) -> bool {
    !problem.backward || gradients::takes(&problem.shape, problem.noise)
}

/// Places in the workspace of the backward pass.
struct Places {
    ds: Buffer,
    gradients: gradients::Places,
    /// Of the portable kernels.
    sm80: Buffer,
}

impl Places {
    fn new(arena: &mut Arena, gpu: &Gpu, shape: &LinearShape, rank: usize, dtype: DType) -> Self {
        let mut take =
            |len: usize, bytes: usize| Buffer { address: arena.take(len.saturating_mul(bytes)).0, len };
        let ds = take(shape.out_rows().saturating_mul(rank), dtype.bytes());
        let sm80 = take((sm80::PASSES.workspace_len)(gpu, shape, rank, dtype), 4);
        let gradients = gradients::Places::new(arena, gpu, shape, rank);
        Self { ds, gradients, sm80 }
    }
}

fn workspace_len(gpu: &Gpu, shape: &LinearShape, rank: usize, dtype: DType) -> usize {
    Arena::len_of(|arena| {
        Places::new(arena, gpu, shape, rank, dtype);
    })
}

const REFUSED: Error = Error::Argument { argument: "rank", problem: "is not one that this family takes" };

fn tiling(layer: &Layer, pass: &Pass, is_gradient: bool) -> Result<Tiling> {
    let mut kernels = KERNELS.into_iter();
    let (columns, forward, input) = kernels.find(|&(columns, ..)| layer.rank <= columns).ok_or(REFUSED)?;
    let kernels = if is_gradient { input } else { forward };
    let factor =
        if is_gradient { [columns, SM90_LOW_RANK_CHANNELS] } else { [SM90_LOW_RANK_CHANNELS, columns] };
    Ok(Tiling {
        kernel: kernels.choose(pass.arithmetic.dtype).ok_or(REFUSED)?,
        channels: SM90_LOW_RANK_CHANNELS,
        extra: if is_gradient { 0 } else { columns },
        extra_by_column: false,
        stages: SM90_LOW_RANK_STAGES,
        cluster: SM90_LOW_RANK_CLUSTER,
        staging: if is_gradient || columns == 16 { SM90_LOW_RANK_STAGING } else { 1 },
        has_table: !is_gradient,
        // Rows are padded by 16 bytes.
        factor_bytes: factor[0] * (2 * factor[1] + 16),
    })
}

fn forward(layer: &Layer, pass: &Pass, x: Buffer, s: Buffer, y: Buffer) -> Result<Plan> {
    let base = layer.base.ok_or(REFUSED)?;
    let gemm = LinearGemm {
        x,
        weight: base.weight,
        extra: Some((layer.lora_a, layer.rank)),
        base_bias: base.bias,
        delta_bias: layer.delta_bias,
        factor: Some(layer.lora_b),
        s: Some(s),
        y,
        rank: layer.rank,
        scale: layer.scale,
    };
    Ok(gemm.plan(&layer.shape, pass, &tiling(layer, pass, false)?)?.into())
}

fn backward(
    layer: &Layer,
    pass: &Pass,
    [x, s, dy]: [Buffer; 3],
    grads: LowRankGrads<Buffer>,
) -> Result<Plan> {
    let (shape, r, dtype) = (&layer.shape, layer.rank, pass.arithmetic.dtype);
    let mut arena = Arena::new(pass.workspace.into());
    let places = Places::new(&mut arena, &pass.gpu, shape, r, dtype);
    let portable = Pass { workspace: places.sm80, ..*pass };
    let needs_ds = grads.input.is_some() || grads.lora_a.is_some();
    let targets = [needs_ds.then_some(places.ds), grads.lora_b, grads.delta_bias];
    let mut plan = match gradients::takes(shape, layer.noise.shape()) {
        _ if targets == [None; 3] => Plan::default(),
        true => gradients::factors(layer, pass, &places.gradients, [s, dy], targets)?,
        // One z per token, or few tokens.
        false => sm80::factors(layer, &portable, [s, dy], targets)?,
    };
    if let Some(dx) = grads.input {
        let gemm = LinearGemm {
            x: dy,
            weight: layer.base.ok_or(REFUSED)?.weight,
            extra: None,
            base_bias: None,
            delta_bias: None,
            factor: Some(layer.lora_a),
            s: Some(places.ds),
            y: dx,
            rank: r,
            scale: 1.0,
        };
        plan.push(gemm.plan(shape, pass, &tiling(layer, pass, true)?)?);
    }
    if let Some(lora_a) = grads.lora_a {
        plan.append(gradients::product(layer, pass, &places.gradients, [places.ds, x], lora_a)?);
    }
    Ok(plan)
}
