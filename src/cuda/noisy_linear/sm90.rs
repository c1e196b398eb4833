//! The dense layer by this crate's kernels for Hopper; plans `kernels/sm90/noisy_linear.cu` and `kernels/sm90/folded_linear.cu`.

use super::params::Sm90FoldedParams;
use super::{Layer, Passes, cublaslt, sm80};
use crate::cpu::NoisyLinearGrads;
use crate::cuda::buffer::{Buffer, DType};
use crate::cuda::gemm::Arena;
use crate::cuda::gpu::Gpu;
use crate::cuda::kernel::{Kernels16, table};
use crate::cuda::layer::{Pass, blocks};
use crate::cuda::noise_fill;
use crate::cuda::noise_source::Source;
use crate::cuda::plan::{Launch, Plan, TensorMap};
use crate::cuda::select::Problem;
use crate::cuda::sm90::{LinearGemm, SM90_THREADS, SM90_TILE_K, Tiling, takes_noise, takes_tensors};
use crate::error::{Error, Result};
use crate::noise::NoiseShape;
use crate::shape::LinearShape;
use bytemuck::Zeroable;
use std::mem::offset_of;

pub(super) const PASSES: Passes = Passes { workspace_len, forward, backward };

/// Channels of a tile; with those of the adapter they are the 256 columns that an instruction has at most.
pub const SM90_EXACT_CHANNELS: usize = 128;
pub const SM90_EXACT_STAGES: usize = 4;
/// Blocks that share the weights' tiles.
pub const SM90_EXACT_CLUSTER: usize = 2;
/// Buffers of a consumer for outputs.
pub const SM90_EXACT_STAGING: usize = 1;

/// Rows of a block's tile of the output transposed.
pub const SM90_FOLDED_ROWS: usize = 128;
pub const SM90_FOLDED_STAGES: usize = 4;
/// Elements of a tile along the reduction.
pub const SM90_FOLDED_DEPTH: usize = 32;
/// Blocks of a cluster.
const FOLDED_CLUSTER: usize = 2;

/// How the tokens of a sample are cut: the kernels for it.
struct Units {
    /// Tokens of a unit.
    tokens: usize,
    /// Units of a tile.
    count: usize,
    /// What shared memory, or the folding of short units, leaves of the tensor cores' speed, in percent: arithmetic, not measured.
    speed: usize,
    forward: Kernels16,
    input: Kernels16,
}

const UNITS: [Units; 3] = [
    Units {
        tokens: 200,
        count: 2,
        speed: 93,
        forward: table::SM90_FOLDED_LINEAR_200,
        input: table::SM90_FOLDED_INPUT_200,
    },
    Units {
        tokens: 136,
        count: 2,
        speed: 82,
        forward: table::SM90_FOLDED_LINEAR_136,
        input: table::SM90_FOLDED_INPUT_136,
    },
    Units {
        tokens: 64,
        count: 4,
        speed: 60,
        forward: table::SM90_FOLDED_LINEAR_64,
        input: table::SM90_FOLDED_INPUT_64,
    },
];

impl Units {
    /// Units of a sample.
    fn parts(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.tokens)
    }

    /// What a sample costs, tokens that do not exist among it.
    fn cost(&self, tokens: usize) -> usize {
        self.parts(tokens).saturating_mul(self.tokens * 100 / self.speed)
    }

    /// The units that suit samples best, if they do not waste more than they do.
    fn of(tokens: usize, noise: Option<NoiseShape>) -> Option<&'static Self> {
        let best = UNITS.iter().min_by_key(|units| units.cost(tokens))?;
        let wasted = best.parts(tokens).saturating_mul(best.tokens) - tokens;
        (noise != Some(NoiseShape::PerToken) && wasted <= tokens).then_some(best)
    }

    /// Bytes of shared memory, as the kernels lay it out: stages, z, staging, barriers.
    fn shared_bytes(&self) -> usize {
        let row = 2 * SM90_FOLDED_DEPTH;
        let stages = SM90_FOLDED_STAGES * (2 * SM90_FOLDED_ROWS + self.count * self.tokens) * row;
        let z = (SM90_FOLDED_STAGES * self.count * SM90_FOLDED_DEPTH * 4).next_multiple_of(1024);
        stages + z + 2 * self.tokens * 2 * SM90_TILE_K + 16 * SM90_FOLDED_STAGES
    }
}

/// What the family takes.
pub(super) fn takes(problem: &Problem) -> bool {
    let folds = problem.fold && Units::of(problem.shape.tokens, problem.noise).is_some();
    problem.has_base && problem.has_delta && takes_tensors(problem) && (folds || !problem.backward)
}

/// Who computes the gradients to the adapter.
fn others(gpu: &Gpu) -> Passes {
    if gpu.has_cublaslt { cublaslt::PASSES } else { sm80::PASSES }
}

/// `z [R, N]`, where it is generated, and the place of the gradients to the adapter.
fn carve(arena: &mut Arena, gpu: &Gpu, shape: &LinearShape, dtype: DType) -> [Buffer; 2] {
    let mut take = |len: usize| Buffer { address: arena.take(len.saturating_mul(4)).0, len };
    let z = take(shape.samples().saturating_mul(shape.out_features));
    [z, take((others(gpu).workspace_len)(gpu, shape, dtype))]
}

fn workspace_len(gpu: &Gpu, shape: &LinearShape, dtype: DType) -> usize {
    Arena::len_of(|arena| {
        carve(arena, gpu, shape, dtype);
    })
}

const REFUSED: Error = Error::Argument { argument: "base", problem: "is not one that this family takes" };

fn forward(layer: &Layer, pass: &Pass, x: Buffer, y: Buffer) -> Result<Plan> {
    let (Some(base), Some(delta)) = (layer.base, layer.delta_weight) else { return Err(REFUSED) };
    match Units::of(layer.shape.tokens, layer.noise.shape()).filter(|_| layer.fold) {
        Some(units) => {
            let LinearShape { in_features: k, out_features: n, .. } = layer.shape;
            let biases = [base.bias, layer.delta_bias];
            let folded = Folded { weights: [base.weight, delta], biases, x, y, rows: n, inner: k };
            folded.plan(layer, pass, units, false)
        }
        None => exact_forward(layer, pass, [x, base.weight, delta, y], base.bias),
    }
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

/// dx by a folded GEMM; the gradients to the adapter by another family.
fn backward(
    layer: &Layer,
    pass: &Pass,
    [x, dy]: [Buffer; 2],
    grads: NoisyLinearGrads<Buffer>,
) -> Result<Plan> {
    let mut plan = Plan::default();
    if let Some(dx) = grads.input {
        let (Some(base), Some(delta)) = (layer.base, layer.delta_weight) else { return Err(REFUSED) };
        let units = Units::of(layer.shape.tokens, layer.noise.shape()).ok_or(REFUSED)?;
        let LinearShape { in_features: k, out_features: n, .. } = layer.shape;
        let weights = [base.weight, delta];
        let folded = Folded { weights, biases: [None; 2], x: dy, y: dx, rows: k, inner: n };
        plan.append(folded.plan(layer, pass, units, true)?);
    }
    if grads.delta_weight.is_some() || grads.delta_bias.is_some() {
        let dtype = pass.arithmetic.dtype;
        let [_, workspace] = carve(&mut Arena::new(pass.workspace.into()), &pass.gpu, &layer.shape, dtype);
        let rest = NoisyLinearGrads { input: None, ..grads };
        plan.append((others(&pass.gpu).backward)(layer, &Pass { workspace, ..*pass }, [x, dy], rest)?);
    }
    Ok(plan)
}

/// Operands of a folded GEMM, checked before.
struct Folded {
    /// `W0` and `ΔW`, `[N, K]`.
    weights: [Buffer; 2],
    /// Of the base and the adapter.
    biases: [Option<Buffer>; 2],
    /// `[samples, T, inner]`: x, or the gradient to the output.
    x: Buffer,
    /// `[samples, T, rows]`: y, or the gradient to x.
    y: Buffer,
    rows: usize,
    inner: usize,
}

impl Folded {
    /// The GEMM, and before it the noise where it is not given. `is_input`: it is the gradient to the input.
    fn plan(self, layer: &Layer, pass: &Pass, units: &Units, is_input: bool) -> Result<Plan> {
        let (shape, dtype) = (&layer.shape, pass.arithmetic.dtype);
        let (samples, n, k) = (shape.samples(), shape.out_features, shape.in_features);
        let mut plan = Plan::default();
        let z = match layer.noise {
            Source::Given { z, .. } => z,
            _ => {
                let [z, _] = carve(&mut Arena::new(pass.workspace.into()), &pass.gpu, shape, dtype);
                plan.push(noise_fill::fill(pass.noise, [samples, 1, n], z));
                z
            }
        };
        // A shared input has the samples of one branch, and its gradient those of all.
        let in_samples = shape.in_rows() / shape.tokens;
        let (from, to) = if is_input { (samples, in_samples) } else { (in_samples, samples) };
        let parts = units.parts(shape.tokens);
        let tile_rows = (to * parts).div_ceil(units.count);
        let tile_columns = self.rows.div_ceil(SM90_FOLDED_ROWS * FOLDED_CLUSTER);
        let [tiles, ..] = blocks("y", &[tile_rows, tile_columns])?;
        let [base_bias, delta_bias] = self.biases;
        let params = Sm90FoldedParams {
            z: z.into(),
            base_bias: base_bias.into(),
            delta_bias: delta_bias.into(),
            rows: self.rows as u32,
            inner: self.inner as u32,
            samples: to as u32,
            wrap: from as u32,
            copies: if is_input { samples / in_samples } else { 1 } as u32,
            parts: parts as u32,
            tile_rows: tile_rows as u32,
            tile_columns: tile_columns as u32,
            ..Zeroable::zeroed()
        };
        // The reduction is along the rows of the weights, or down their columns in panels of a consumer's features.
        let weight_boxes = match is_input {
            false => [SM90_FOLDED_DEPTH, SM90_FOLDED_ROWS, 1],
            true => [SM90_FOLDED_ROWS / 2, SM90_FOLDED_DEPTH, 1],
        };
        let weight = |weight: Buffer| TensorMap::of_rows(weight, dtype, [k, n, 1], weight_boxes);
        let tokens = |tensor: Buffer, features: usize, samples: usize, width: usize| {
            let (dims, boxes) = ([features, shape.tokens, samples], [width, units.tokens, 1]);
            TensorMap::of_rows(tensor, dtype, dims, boxes)
        };
        let z_map = TensorMap::of_rows(z, DType::F32, [n, samples, 1], [SM90_FOLDED_DEPTH, 1, 1]);
        let maps = [
            (offset_of!(Sm90FoldedParams, weight), weight(self.weights[0])),
            (offset_of!(Sm90FoldedParams, delta), weight(self.weights[1])),
            (offset_of!(Sm90FoldedParams, x), tokens(self.x, self.inner, from, SM90_FOLDED_DEPTH)),
            (offset_of!(Sm90FoldedParams, z_map), z_map.without_swizzle()),
            (offset_of!(Sm90FoldedParams, y), tokens(self.y, self.rows, to, SM90_TILE_K)),
        ];
        let kernels = if is_input { units.input } else { units.forward };
        let kernel = kernels.choose(dtype).ok_or(REFUSED)?;
        let clusters = (pass.gpu.multiprocessors / FOLDED_CLUSTER as u32).clamp(1, tiles);
        let grid = [clusters * FOLDED_CLUSTER as u32, 1, 1];
        let launch = Launch::new(kernel, grid, [SM90_THREADS, 1, 1], units.shared_bytes(), &params);
        plan.push(launch.in_clusters(FOLDED_CLUSTER).with_maps(&maps));
        Ok(plan)
    }
}
