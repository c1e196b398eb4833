//! The dense layer by this crate's portable kernels; plans `kernels/sm80/noisy_linear.cu`.
//!
//! Its GEMMs serve the low-rank layer as well.

use super::params::{NoisyLinearInputParams, NoisyLinearParams, NoisyLinearWeightParams, Segment};
use super::{Layer, Passes};
use crate::cpu::NoisyLinearGrads;
use crate::cuda::buffer::{Address, Buffer, DType, rows_are_aligned};
use crate::cuda::gpu::Gpu;
use crate::cuda::kernel::table;
use crate::cuda::layer::{Arithmetic, Pass, blocks};
use crate::cuda::noise_source::NoiseSource;
use crate::cuda::partial_sums::{SPLIT_BLOCKS, partial_sums};
use crate::cuda::plan::{Launch, Plan};
use crate::error::Result;
use crate::noise::NoiseShape;
use crate::shape::LinearShape;
use bytemuck::Zeroable;

pub(super) const PASSES: Passes = Passes { workspace_len, forward, backward };

/// Rows and columns of a block's tile of outputs.
pub const SM80_TILE: usize = 128;
pub const SM80_THREADS: u32 = 256;
/// Bytes of an operand's tile along the inner dimension.
pub const SM80_TILE_K_BYTES: usize = 64;
/// Bytes of an operand's tile in shared memory.
const TILE_BYTES: usize = SM80_TILE * SM80_TILE_K_BYTES;
pub const SM80_FORWARD_STAGES: usize = 4;
pub const SM80_FOLDED_STAGES: usize = 3;
pub const SM80_BACKWARD_STAGES: usize = 3;
/// Token rows of a partial sum are a multiple of this, and not fewer than `MIN_PART`.
const PART_STEP: usize = 32;
const MIN_PART: usize = 256;

/// Operands of a forward GEMM `y = Σ left·rightᵀ`, checked before; adapter segments come last.
pub(in crate::cuda) struct ForwardGemm<'a> {
    pub(in crate::cuda) run: Arithmetic,
    pub(in crate::cuda) shape: LinearShape,
    pub(in crate::cuda) noise: NoiseSource,
    /// Left and right operand, inner size, and whether it belongs under the noise.
    pub(in crate::cuda) segments: &'a [(Buffer, Buffer, usize, bool)],
    pub(in crate::cuda) base_bias: Option<Buffer>,
    pub(in crate::cuda) delta_bias: Option<Buffer>,
    pub(in crate::cuda) y: Buffer,
    pub(in crate::cuda) fold: bool,
    /// Factor on the adapter's term.
    pub(in crate::cuda) scale: f32,
}

impl ForwardGemm<'_> {
    pub(in crate::cuda) fn plan(&self) -> Result<Launch> {
        let dtype = self.run.dtype;
        let (m, n) = (self.shape.out_rows(), self.shape.out_features);
        let mut segments = [Segment::zeroed(); 2];
        for (segment, &(left, right, inner, adapter)) in segments.iter_mut().zip(self.segments) {
            let (left, right) = (Address::from(left), Address::from(right));
            *segment = Segment {
                left: left.into(),
                right: right.into(),
                inner: inner as u32,
                adapter: u32::from(adapter),
                first_row: 0,
                aligned: u32::from(rows_are_aligned(dtype, inner, &[left, right])),
            };
        }
        let two = self.segments.len() == 2;
        let off = self.noise == NoiseSource::OFF;
        // Without noise all rows share their z.
        let tokens = if self.fold && off { m } else { self.shape.tokens };
        let columns = n.div_ceil(SM80_TILE);
        let (kernels, stages, tiles, rows) = match (two, self.fold) {
            (true, true) => {
                (table::NOISY_LINEAR_FOLDED, SM80_FOLDED_STAGES, 3, (m / tokens) * tokens.div_ceil(SM80_TILE))
            }
            (true, false) => (table::NOISY_LINEAR_TWO, SM80_FORWARD_STAGES, 2, m.div_ceil(SM80_TILE)),
            (false, _) => (table::NOISY_LINEAR_ONE, SM80_FORWARD_STAGES, 2, m.div_ceil(SM80_TILE)),
        };
        let z_bytes = if two && self.fold { SM80_TILE * 4 } else { 0 };
        let params = NoisyLinearParams {
            noise: self.noise,
            segments,
            base_bias: self.base_bias.into(),
            delta_bias: self.delta_bias.into(),
            y: self.y.into(),
            rows: m as u32,
            tokens: tokens as u32,
            channels: n as u32,
            wrap: self.shape.in_rows() as u32,
            count: self.segments.len() as u32,
            tile_columns: columns as u32,
            aligned: u32::from(rows_are_aligned(dtype, n, &[self.y.into()])),
            scale: self.scale,
        };
        let shared = stages * tiles * TILE_BYTES + z_bytes;
        let grid = blocks("y", &[columns, rows])?;
        Ok(Launch::new(self.run.choose(kernels), grid, [SM80_THREADS, 1, 1], shared, &params))
    }
}

/// Operands of an input gradient `dx = Σ left·right`, checked before.
pub(in crate::cuda) struct InputGradient<'a> {
    pub(in crate::cuda) run: Arithmetic,
    pub(in crate::cuda) shape: LinearShape,
    pub(in crate::cuda) noise: NoiseSource,
    /// `[M, inner]`, `[inner, K]`, the inner size, and whether the left one is multiplied with `z` first.
    pub(in crate::cuda) segments: &'a [(Buffer, Buffer, usize, bool)],
    pub(in crate::cuda) dx: Buffer,
    /// Factor on the sum.
    pub(in crate::cuda) scale: f32,
}

impl InputGradient<'_> {
    pub(in crate::cuda) fn plan(&self) -> Result<Launch> {
        let dtype = self.run.dtype;
        let LinearShape { in_features: k, out_features: n, tokens, .. } = self.shape;
        let rows = self.shape.in_rows();
        let mut segments = [Segment::zeroed(); 4];
        let mut count = 0;
        // A shared input gets the sum over its branches.
        for branch in 0..self.shape.fan_out() {
            for &(left, right, inner, adapter) in self.segments {
                let left = Address::from(left).offset(branch * rows * inner * dtype.bytes());
                let right = Address::from(right);
                let both = rows_are_aligned(dtype, inner, &[left]) && rows_are_aligned(dtype, k, &[right]);
                segments[count] = Segment {
                    left: left.into(),
                    right: right.into(),
                    inner: inner as u32,
                    adapter: u32::from(adapter),
                    first_row: (branch * rows) as u32,
                    aligned: u32::from(both),
                };
                count += 1;
            }
        }
        let inner = SM80_TILE_K_BYTES / dtype.bytes();
        let z_bytes = 2 * SM80_TILE * (inner + 8) * 4;
        let columns = k.div_ceil(SM80_TILE);
        let params = NoisyLinearInputParams {
            noise: self.noise,
            segments,
            dx: self.dx.into(),
            rows: rows as u32,
            tokens: tokens as u32,
            channels: n as u32,
            columns: k as u32,
            count: count as u32,
            tile_columns: columns as u32,
            aligned: u32::from(rows_are_aligned(dtype, k, &[self.dx.into()])),
            scale: self.scale,
        };
        let shared = SM80_BACKWARD_STAGES * 2 * TILE_BYTES + z_bytes;
        let grid = blocks("dx", &[columns, rows.div_ceil(SM80_TILE)])?;
        Ok(Launch::new(
            self.run.choose(table::NOISY_LINEAR_INPUT),
            grid,
            [SM80_THREADS, 1, 1],
            shared,
            &params,
        ))
    }
}

/// Operands of a weight gradient `eᵀ·x`, checked before.
pub(in crate::cuda) struct WeightGradient {
    pub(in crate::cuda) run: Arithmetic,
    /// `in_features` are the columns of `x`.
    pub(in crate::cuda) shape: LinearShape,
    pub(in crate::cuda) noise: NoiseSource,
    /// `[M, N]`.
    pub(in crate::cuda) g: Buffer,
    /// `[M, K]`, or fewer rows if the branches share them.
    pub(in crate::cuda) x: Buffer,
    /// `[N, K]`; `None` is not computed.
    pub(in crate::cuda) weight: Option<Buffer>,
    /// `[N]`, the sum of `e` over the rows; `None` is not computed.
    pub(in crate::cuda) bias: Option<Buffer>,
    /// Of [`WeightGradient::workspace_len`] elements.
    pub(in crate::cuda) workspace: Address,
}

impl WeightGradient {
    /// Partial sums, and the token rows of each.
    fn parts(shape: &LinearShape) -> (usize, usize) {
        let m = shape.out_rows();
        let tiles = shape.out_features.div_ceil(SM80_TILE) * shape.in_features.div_ceil(SM80_TILE);
        let parts = (SPLIT_BLOCKS / tiles).clamp(1, m.div_ceil(MIN_PART));
        let part = m.div_ceil(parts).next_multiple_of(PART_STEP);
        (m.div_ceil(part), part)
    }

    /// `f32` elements of workspace for the gradients of a weight `[out_features, in_features]` and of its bias.
    pub(in crate::cuda) fn workspace_len(shape: &LinearShape) -> usize {
        match Self::parts(shape) {
            (1, _) => 0,
            (parts, _) => {
                let (n, k) = (shape.out_features, shape.in_features);
                parts.saturating_mul(n).saturating_mul(k.saturating_add(1))
            }
        }
    }

    pub(in crate::cuda) fn plan(&self) -> Result<Plan> {
        let dtype = self.run.dtype;
        let LinearShape { in_features: k, out_features: n, tokens, .. } = self.shape;
        let m = self.shape.out_rows();
        let (parts, part) = Self::parts(&self.shape);
        let partial = parts > 1;
        // Without a weight gradient there are no columns, and x is not read.
        let k = if self.weight.is_some() { k } else { 0 };
        let (columns, rows) = (k.div_ceil(SM80_TILE).max(1), n.div_ceil(SM80_TILE));
        let sums_of_weight = if partial { parts * n * k * 4 } else { 0 };
        let workspace = [self.workspace, self.workspace.offset(sums_of_weight)];
        let targets = [self.weight, self.bias];
        let target = |i: usize| match targets[i] {
            Some(_) if partial => workspace[i],
            out => out.into(),
        };
        let out_type = if partial { DType::F32 } else { dtype };
        let inner = SM80_TILE_K_BYTES / dtype.bytes();
        // The z of two tiles, and where its rows are; or the tile of outputs in f32 on its way out.
        let ring = SM80_BACKWARD_STAGES * 2 * TILE_BYTES;
        let shared = (ring + 2 * inner * SM80_TILE * 4 + 2 * inner * 4).max(SM80_TILE * SM80_TILE * 4);
        let params = NoisyLinearWeightParams {
            noise: self.noise,
            g: self.g.into(),
            x: self.x.into(),
            weight: target(0).into(),
            bias: target(1).into(),
            rows: m as u32,
            tokens: tokens as u32,
            channels: n as u32,
            columns: k as u32,
            wrap: self.shape.in_rows() as u32,
            tile_columns: columns as u32,
            tile_rows: rows as u32,
            part: part as u32,
            partial: u32::from(partial),
            left_aligned: u32::from(rows_are_aligned(dtype, n, &[self.g.into()])),
            right_aligned: u32::from(rows_are_aligned(dtype, k, &[self.x.into()])),
            aligned: u32::from(rows_are_aligned(out_type, k, &[target(0)])),
        };
        let grid = blocks("delta_weight", &[columns, rows, parts])?;
        let mut plan = Plan::from(Launch::new(
            self.run.choose(table::NOISY_LINEAR_WEIGHT),
            grid,
            [SM80_THREADS, 1, 1],
            shared,
            &params,
        ));
        for (target, sums) in targets.into_iter().zip(workspace) {
            if let Some(out) = target.filter(|_| partial) {
                plan.push(partial_sums(sums, parts, out, dtype));
            }
        }
        Ok(plan)
    }
}

/// Whether folding is allowed, possible, and cheaper than two GEMMs.
fn folds(layer: &Layer) -> bool {
    let tokens = layer.shape.tokens;
    let pays = match layer.noise.shape() {
        None => true,
        // The last tile of each sample is padded.
        Some(NoiseShape::PerSample) => 2 * tokens.next_multiple_of(SM80_TILE) <= 3 * tokens,
        Some(NoiseShape::PerToken) => false,
    };
    layer.fold && pays && layer.base.is_some() && layer.delta_weight.is_some() && layer.shape.fan_out() == 1
}

/// The forward pass: one kernel.
fn forward(layer: &Layer, pass: &Pass, x: Buffer, y: Buffer) -> Result<Plan> {
    let k = layer.shape.in_features;
    let base = layer.base.map(|base| (x, base.weight, k, false));
    let delta = layer.delta_weight.map(|weight| (x, weight, k, true));
    let segments: Vec<_> = [base, delta].into_iter().flatten().collect();
    let forward = ForwardGemm {
        run: pass.arithmetic,
        shape: layer.shape,
        noise: pass.noise,
        segments: &segments,
        base_bias: layer.base.and_then(|base| base.bias),
        delta_bias: layer.delta_bias,
        y,
        fold: folds(layer),
        scale: 1.0,
    };
    Ok(forward.plan()?.into())
}

/// The backward pass: a kernel for dx, and one for dΔW and dΔb with the sums of their parts.
fn backward(
    layer: &Layer,
    pass: &Pass,
    [x, dy]: [Buffer; 2],
    grads: NoisyLinearGrads<Buffer>,
) -> Result<Plan> {
    let &Pass { arithmetic: run, noise, workspace, .. } = pass;
    let (shape, n) = (layer.shape, layer.shape.out_features);
    let base = layer.base.map(|base| (dy, base.weight, n, false));
    let delta = layer.delta_weight.map(|weight| (dy, weight, n, true));
    let segments: Vec<_> = [base, delta].into_iter().flatten().collect();
    let mut plan = Plan::default();
    if let Some(dx) = grads.input {
        plan.push(InputGradient { run, shape, noise, segments: &segments, dx, scale: 1.0 }.plan()?);
    }
    let (weight, bias) = (grads.delta_weight, grads.delta_bias);
    if weight.is_some() || bias.is_some() {
        let workspace = workspace.into();
        plan.append(WeightGradient { run, shape, noise, g: dy, x, weight, bias, workspace }.plan()?);
    }
    Ok(plan)
}

fn workspace_len(_: &Gpu, shape: &LinearShape, _: DType) -> usize {
    WeightGradient::workspace_len(shape)
}
