//! The dense layer by this crate's kernels for Hopper; plans `kernels/sm90/noisy_linear.cu`, and in its modules the other kernels.

mod folded;
mod weight;

use super::{Layer, Passes, sm80};
use crate::cpu::NoisyLinearGrads;
use crate::cuda::buffer::{Buffer, DType};
use crate::cuda::gemm::Arena;
use crate::cuda::gpu::{Family, Gpu};
use crate::cuda::kernel::table;
use crate::cuda::layer::Pass;
use crate::cuda::plan::Plan;
use crate::cuda::select::Problem;
use crate::cuda::sm90::{LinearGemm, Tiling, takes_noise, takes_tensors, z_in_memory};
use crate::error::{Error, Result};
use crate::shape::LinearShape;
use folded::{Folded, Units};
use weight::WeightGradient;

pub(super) const PASSES: Passes = Passes { workspace_len, forward, backward };

/// Channels of a tile; with those of the adapter they are the 256 columns that an instruction has at most.
pub const SM90_EXACT_CHANNELS: usize = 128;
pub const SM90_EXACT_STAGES: usize = 4;
/// Blocks that share the weights' tiles.
pub const SM90_EXACT_CLUSTER: usize = 2;
/// Buffers of a consumer for outputs.
pub const SM90_EXACT_STAGING: usize = 1;

/// What the family takes.
pub(super) fn takes(problem: &Problem) -> bool {
    let folds = problem.fold && Units::of(problem.shape.tokens, problem.noise).is_some();
    problem.has_base && problem.has_delta && takes_tensors(problem) && (folds || !problem.backward)
}

/// Whether it was measured to be faster than the library, where it takes the problem.
///
/// H200, 2026-11-27, bf16: the forward pass everywhere (128 × 1 of 768 → 3072 in 25 µs against 42, 4 × 1024 of 4096 → 4096 in 273
/// against 442). The backward pass not where samples are short (128 × 49 of 1024 → 4096: 419 µs against 295), and not below GEMMs of
/// 24 GFLOP (32 × 197 of 768 → 3072, 30 GFLOP: 132 against 174; 16 × 577 of 1024 → 1024, 19 GFLOP: 138 against 115).
pub(super) fn pays(gpu: &Gpu, problem: &Problem) -> bool {
    let LinearShape { tokens, in_features, out_features, .. } = problem.shape;
    let work = [in_features, out_features].into_iter().fold(problem.shape.out_rows(), usize::saturating_mul);
    let is_large = work / gpu.multiprocessors.max(1) as usize >= 90_000_000;
    let is_long = Units::of(tokens, problem.noise).is_some_and(|units| !units.are_short());
    !problem.backward || is_large && is_long
}

const REFUSED: Error = Error::Argument { argument: "base", problem: "is not one that this family takes" };

/// Places in the workspace.
struct Places {
    /// `z [R, N]`, where it is not given.
    z: Buffer,
    /// Sums of tiles that blocks share.
    partial: [Buffer; 2],
    /// Of the portable kernels, for the gradient to Δb alone.
    sm80: Buffer,
}

impl Places {
    fn new(arena: &mut Arena, gpu: &Gpu, shape: &LinearShape, dtype: DType) -> Self {
        let mut take = |len: usize| Buffer { address: arena.take(len.saturating_mul(4)).0, len };
        let z = take(shape.samples().saturating_mul(shape.out_features));
        let partial = WeightGradient::partial_len(gpu, shape).map(&mut take);
        Self { z, partial, sm80: take((sm80::PASSES.workspace_len)(gpu, shape, dtype)) }
    }

    fn of(layer: &Layer, pass: &Pass) -> Self {
        let mut arena = Arena::new(pass.workspace.into());
        Self::new(&mut arena, &pass.gpu, &layer.shape, pass.arithmetic.dtype)
    }
}

fn workspace_len(gpu: &Gpu, shape: &LinearShape, dtype: DType) -> usize {
    Arena::len_of(|arena| {
        Places::new(arena, gpu, shape, dtype);
    })
}

fn forward(layer: &Layer, pass: &Pass, x: Buffer, y: Buffer) -> Result<Plan> {
    let (Some(base), Some(delta)) = (layer.base, layer.delta_weight) else { return Err(REFUSED) };
    // With few tiles most multiprocessors have nothing to do in the folded kernel: 8 × 197 of 768 → 768 in 18 µs against 12.
    let forced = pass.gpu.family == Some(Family::Sm90);
    let pays = |units: &&Units| forced || units.fill(&pass.gpu, &layer.shape);
    let units = Units::of(layer.shape.tokens, layer.noise.shape()).filter(pays);
    let Some(units) = units.filter(|_| layer.fold) else {
        return exact_forward(layer, pass, [x, base.weight, delta, y], base.bias);
    };
    let mut plan = Plan::default();
    let z = z_in_memory(&mut plan, layer.noise, &layer.shape, pass, Places::of(layer, pass).z);
    let LinearShape { in_features: k, out_features: n, .. } = layer.shape;
    let (weights, biases) = ([base.weight, delta], [base.bias, layer.delta_bias]);
    let gemm = Folded { weights, biases, x, y, z, rows: n, inner: k };
    plan.push(gemm.plan(&layer.shape, pass, units, false)?);
    Ok(plan)
}

fn exact_forward(
    layer: &Layer,
    pass: &Pass,
    [x, weight, delta, y]: [Buffer; 4],
    base_bias: Option<Buffer>,
) -> Result<Plan> {
    let kernels = match takes_noise(&layer.shape, layer.noise.shape()) {
        true => table::SM90_NOISY_LINEAR_EXACT,
        false => table::SM90_NOISY_LINEAR_EXACT_ANY,
    };
    let tiling = Tiling {
        kernel: kernels.choose(pass.arithmetic.dtype).ok_or(REFUSED)?,
        channels: SM90_EXACT_CHANNELS,
        extra: SM90_EXACT_CHANNELS,
        extra_by_column: true,
        stages: SM90_EXACT_STAGES,
        cluster: SM90_EXACT_CLUSTER,
        staging: SM90_EXACT_STAGING,
        has_table: true,
        factor_bytes: 0,
    };
    let gemm = LinearGemm {
        x,
        weight,
        extra: Some((delta, layer.shape.out_features)),
        base_bias,
        delta_bias: layer.delta_bias,
        factor: None,
        s: None,
        y,
        rank: 0,
        scale: 1.0,
    };
    Ok(gemm.plan(&layer.shape, pass, &tiling)?.into())
}

/// dx by a folded GEMM, dΔW and dΔb by one over the tokens.
fn backward(
    layer: &Layer,
    pass: &Pass,
    [x, dy]: [Buffer; 2],
    grads: NoisyLinearGrads<Buffer>,
) -> Result<Plan> {
    let (Some(base), Some(delta)) = (layer.base, layer.delta_weight) else { return Err(REFUSED) };
    let (places, shape) = (Places::of(layer, pass), &layer.shape);
    let mut plan = Plan::default();
    let mut z = places.z;
    if grads.input.is_some() || grads.delta_weight.is_some() {
        z = z_in_memory(&mut plan, layer.noise, shape, pass, places.z);
    }
    if let Some(dx) = grads.input {
        let units = Units::of(shape.tokens, layer.noise.shape()).ok_or(REFUSED)?;
        let (k, n, weights) = (shape.in_features, shape.out_features, [base.weight, delta]);
        let gemm = Folded { weights, biases: [None; 2], x: dy, y: dx, z, rows: k, inner: n };
        plan.push(gemm.plan(shape, pass, units, true)?);
    }
    if let Some(weight) = grads.delta_weight {
        let (bias, partial) = (grads.delta_bias, places.partial);
        plan.append(WeightGradient { x, g: dy, z, weight, bias, partial }.plan(shape, pass)?);
    } else if grads.delta_bias.is_some() {
        // Bound by memory.
        let rest = NoisyLinearGrads { input: None, ..grads };
        let portable = Pass { workspace: places.sm80, ..*pass };
        plan.append((sm80::PASSES.backward)(layer, &portable, [x, dy], rest)?);
    }
    Ok(plan)
}
