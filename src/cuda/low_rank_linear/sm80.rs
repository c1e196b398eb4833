//! The low-rank layer by this crate's portable kernels; plans `kernels/sm80/low_rank_linear.cu`, and `kernels/sm80/noisy_linear.cu` for what
//! is a plain GEMM.

use super::params::{LowRankFactorsParams, LowRankLinearParams};
use super::{Layer, Passes};
use crate::cpu::LowRankGrads;
use crate::cuda::buffer::{Address, Buffer, DType, rows_are_aligned};
use crate::cuda::gpu::Gpu;
use crate::cuda::kernel::{GemmKernels, table};
use crate::cuda::layer::{Pass, blocks};
use crate::cuda::noise_source::NoiseSource;
use crate::cuda::noisy_linear::sm80::{
    ForwardGemm, InputGradient, SM80_THREADS, SM80_TILE, SM80_TILE_K_BYTES, WeightGradient,
};
use crate::cuda::partial_sums::{SPLIT_BLOCKS, partial_sums};
use crate::cuda::plan::{Launch, Plan};
use crate::error::Result;
use crate::shape::LinearShape;

pub(super) const PASSES: Passes = Passes { workspace_len, forward, backward };

/// Forward pass, up to rank 16 and 32.
const FORWARD: [GemmKernels; 2] = [table::LOW_RANK_LINEAR_16, table::LOW_RANK_LINEAR_32];
/// The adapter's part of the backward pass, up to rank 16 and 32.
const FACTORS: [GemmKernels; 2] = [table::LOW_RANK_FACTORS_16, table::LOW_RANK_FACTORS_32];

/// Columns that kernels have for the rank.
const RANKS: [usize; 2] = [16, 32];
pub const SM80_LOW_RANK_STAGES: usize = 3;
/// Token rows of a tile of `factors`, and bytes of its rows.
pub const SM80_FACTORS_ROWS: usize = 32;
pub const SM80_FACTORS_ROW_BYTES: usize = 1024;
/// Token rows that a block of `factors` has at least.
const MIN_PART: usize = 64;

/// Sizes of a layer, and the plans that depend on them alone.
#[derive(Clone, Copy)]
struct Sizes {
    shape: LinearShape,
    rank: usize,
    dtype: DType,
}

/// Places in the workspace, as offsets in `f32` elements.
struct Workspace {
    /// `ds [M, r]` in the tensors' type.
    ds: usize,
    /// Partial sums of `ds`, `dB` and `dδb`.
    sums: [usize; 3],
    /// Partial sums of a GEMM's weight gradient: of `dB`, where it is one, and later of `dA`.
    products: usize,
    len: usize,
}

impl Sizes {
    /// Which of [`RANKS`] suits.
    fn columns(&self) -> Option<usize> {
        RANKS.iter().position(|&columns| self.rank <= columns)
    }

    /// Chunks of channels, parts of the token rows and the rows of each, in `factors`.
    fn parts(&self) -> (usize, usize, usize) {
        let m = self.shape.out_rows();
        let chunks = (self.shape.out_features * self.dtype.bytes()).div_ceil(SM80_FACTORS_ROW_BYTES);
        let parts = (SPLIT_BLOCKS / chunks).clamp(1, m.div_ceil(MIN_PART));
        let part = m.div_ceil(parts).next_multiple_of(SM80_FACTORS_ROWS);
        (chunks, m.div_ceil(part), part)
    }

    /// The shape of `x·Aᵀ`, whose weight gradient is `dA`.
    fn a_shape(&self) -> LinearShape {
        LinearShape { out_features: self.rank, ..self.shape }
    }

    /// The shape of `s·Bᵀ`, whose weight gradient is `dB`.
    fn b_shape(&self) -> LinearShape {
        LinearShape { in_features: self.rank, ..self.shape }
    }

    fn workspace(&self) -> Workspace {
        let (m, n, r) = (self.shape.out_rows(), self.shape.out_features, self.rank);
        let mut len = 0usize;
        let mut take = |elements: usize| {
            let start = len;
            // Every place is aligned as the workspace is.
            len = len.saturating_add(elements.checked_next_multiple_of(4).unwrap_or(usize::MAX));
            start
        };
        let times = |a: usize, b: usize, c: usize| a.saturating_mul(b).saturating_mul(c);
        let ds = take(times(m, r, self.dtype.bytes()).div_ceil(4));
        let (sums, products) = match self.columns() {
            Some(_) => {
                let (chunks, parts, _) = self.parts();
                ([take(times(chunks, m, r)), take(times(parts, n, r)), take(times(parts, n, 1))], 0)
            }
            None => ([0; 3], WeightGradient::workspace_len(&self.b_shape())),
        };
        let products = take(products.max(WeightGradient::workspace_len(&self.a_shape())));
        Workspace { ds, sums, products, len }
    }
}

fn workspace_len(_: &Gpu, shape: &LinearShape, rank: usize, dtype: DType) -> usize {
    Sizes { shape: *shape, rank, dtype }.workspace().len
}

fn sizes(layer: &Layer, pass: &Pass) -> Sizes {
    Sizes { shape: layer.shape, rank: layer.rank, dtype: pass.arithmetic.dtype }
}

/// The forward pass: one kernel up to rank 32, otherwise two GEMMs.
fn forward(layer: &Layer, pass: &Pass, x: Buffer, s: Buffer, y: Buffer) -> Result<Plan> {
    match (layer.base, sizes(layer, pass).columns()) {
        (Some(base), Some(columns)) => {
            let tensors = [x, base.weight, layer.lora_a, layer.lora_b, s, y];
            fused_forward(layer, pass, tensors, base.bias, columns)
        }
        _ => composed_forward(layer, pass, x, s, y),
    }
}

fn fused_forward(
    layer: &Layer,
    pass: &Pass,
    tensors: [Buffer; 6],
    base_bias: Option<Buffer>,
    columns: usize,
) -> Result<Plan> {
    let (shape, dtype, bytes) = (layer.shape, pass.arithmetic.dtype, pass.arithmetic.dtype.bytes());
    let (m, k, n, r) = (shape.out_rows(), shape.in_features, shape.out_features, layer.rank);
    let rank = RANKS[columns];
    let slices = rank.div_ceil(SM80_TILE_K_BYTES / bytes);
    let ring =
        (SM80_LOW_RANK_STAGES * (2 * SM80_TILE + rank) * SM80_TILE_K_BYTES).max(SM80_TILE * SM80_TILE * 4);
    let tile_columns = n.div_ceil(SM80_TILE);
    let [x, weight, lora_a, lora_b, s, y] = tensors.map(Address::from);
    let params = LowRankLinearParams {
        noise: pass.noise,
        x: x.into(),
        weight: weight.into(),
        lora_a: lora_a.into(),
        lora_b: lora_b.into(),
        base_bias: base_bias.into(),
        delta_bias: layer.delta_bias.into(),
        s: s.into(),
        y: y.into(),
        rows: m as u32,
        tokens: shape.tokens as u32,
        channels: n as u32,
        inner: k as u32,
        rank: r as u32,
        wrap: shape.in_rows() as u32,
        tile_columns: tile_columns as u32,
        aligned: u64::from(rows_are_aligned(dtype, n, &[y])),
        x_aligned: u32::from(rows_are_aligned(dtype, k, &[x, weight, lora_a])),
        b_aligned: u32::from(rows_are_aligned(dtype, r, &[lora_b])),
        scale: layer.scale,
    };
    let grid = blocks("y", &[tile_columns, m.div_ceil(SM80_TILE)])?;
    let shared = ring + 2 * slices * SM80_TILE * SM80_TILE_K_BYTES;
    let kernel = pass.arithmetic.choose(FORWARD[columns]);
    Ok(Launch::new(kernel, grid, [SM80_THREADS, 1, 1], shared, &params).into())
}

fn composed_forward(layer: &Layer, pass: &Pass, x: Buffer, s: Buffer, y: Buffer) -> Result<Plan> {
    let (shape, k, r) = (layer.shape, layer.shape.in_features, layer.rank);
    let low = ForwardGemm {
        run: pass.arithmetic,
        shape: LinearShape {
            branches: if shape.shared_input { 1 } else { shape.branches },
            shared_input: false,
            ..sizes(layer, pass).a_shape()
        },
        noise: NoiseSource::OFF,
        segments: &[(x, layer.lora_a, k, true)],
        base_bias: None,
        delta_bias: None,
        y: s,
        fold: false,
        scale: layer.scale,
    };
    let base = layer.base.map(|base| (x, base.weight, k, false));
    let segments: Vec<_> = base.into_iter().chain([(s, layer.lora_b, r, true)]).collect();
    let high = ForwardGemm {
        run: pass.arithmetic,
        shape,
        noise: pass.noise,
        segments: &segments,
        base_bias: layer.base.and_then(|base| base.bias),
        delta_bias: layer.delta_bias,
        y,
        fold: false,
        scale: 1.0,
    };
    let mut plan = Plan::from(low.plan()?);
    plan.push(high.plan()?);
    Ok(plan)
}

/// The backward pass: the adapter's part, one kernel up to rank 32, then dx and dA as GEMMs.
fn backward(
    layer: &Layer,
    pass: &Pass,
    [x, s, dy]: [Buffer; 3],
    grads: LowRankGrads<Buffer>,
) -> Result<Plan> {
    let (shape, r, run) = (layer.shape, layer.rank, pass.arithmetic);
    let n = shape.out_features;
    let places = sizes(layer, pass).workspace();
    let at = |offset: usize| Address::from(pass.workspace).offset(4 * offset);
    let ds = Buffer { address: at(places.ds).0, len: shape.out_rows() * r };
    let needs_ds = grads.input.is_some() || grads.lora_a.is_some();
    let targets = [needs_ds.then_some(ds), grads.lora_b, grads.delta_bias];
    let mut plan = factors(layer, pass, [s, dy], targets)?;
    let noise = NoiseSource::OFF;
    if let Some(dx) = grads.input {
        let base = layer.base.map(|base| (dy, base.weight, n, false));
        let segments: Vec<_> = base.into_iter().chain([(ds, layer.lora_a, r, false)]).collect();
        plan.push(InputGradient { run, shape, noise, segments: &segments, dx, scale: 1.0 }.plan()?);
    }
    if let Some(lora_a) = grads.lora_a {
        plan.append(lora_a_gradient(layer, pass, [ds, x], lora_a)?);
    }
    Ok(plan)
}

/// `dA = dsᵀ·x`.
fn lora_a_gradient(layer: &Layer, pass: &Pass, [ds, x]: [Buffer; 2], lora_a: Buffer) -> Result<Plan> {
    let (sizes, run, noise) = (sizes(layer, pass), pass.arithmetic, NoiseSource::OFF);
    let workspace = Address::from(pass.workspace).offset(4 * sizes.workspace().products);
    let (weight, bias) = (Some(lora_a), None);
    WeightGradient { run, shape: sizes.a_shape(), noise, g: ds, x, weight, bias, workspace }.plan()
}

/// `ds`, `dB` and `dδb`, those that have a target: what needs `e = z⊙g`.
pub(super) fn factors(
    layer: &Layer,
    pass: &Pass,
    [s, dy]: [Buffer; 2],
    targets: [Option<Buffer>; 3],
) -> Result<Plan> {
    match sizes(layer, pass).columns() {
        _ if targets == [None; 3] => Ok(Plan::default()),
        Some(columns) => fused_factors(layer, pass, [s, dy], targets, columns),
        None => composed_factors(layer, pass, [s, dy], targets),
    }
}

/// `ds`, `dB` and `dδb`, those that have a target, in one pass over `dy`.
fn fused_factors(
    layer: &Layer,
    pass: &Pass,
    [s, dy]: [Buffer; 2],
    targets: [Option<Buffer>; 3],
    columns: usize,
) -> Result<Plan> {
    let (shape, r, dtype) = (layer.shape, layer.rank, pass.arithmetic.dtype);
    let (bytes, n) = (dtype.bytes(), shape.out_features);
    let places = sizes(layer, pass).workspace();
    let (chunks, parts, part) = sizes(layer, pass).parts();
    let sums = places.sums.map(|offset| Address::from(pass.workspace).offset(4 * offset));
    let target = |i: usize| targets[i].map_or(Address::NONE, |_| sums[i]);
    let stride = RANKS[columns] * bytes + 16;
    let shared = SM80_FACTORS_ROWS * SM80_FACTORS_ROW_BYTES
        + (SM80_FACTORS_ROW_BYTES / bytes + SM80_FACTORS_ROWS) * stride
        + 4 * SM80_FACTORS_ROWS * RANKS[columns] * 4;
    let params = LowRankFactorsParams {
        noise: pass.noise,
        g: dy.into(),
        s: s.into(),
        lora_b: layer.lora_b.into(),
        ds: target(0).into(),
        b_sums: target(1).into(),
        delta_bias: target(2).into(),
        rows: shape.out_rows() as u32,
        tokens: shape.tokens as u32,
        channels: n as u32,
        rank: r as u32,
        wrap: shape.in_rows() as u32,
        chunks: chunks as u32,
        part: part as u32,
        aligned: u32::from(rows_are_aligned(dtype, n, &[dy.into()])),
        rank_aligned: u32::from(rows_are_aligned(dtype, r, &[s.into(), layer.lora_b.into()])),
        scale: layer.scale,
    };
    let kernel = pass.arithmetic.choose(FACTORS[columns]);
    let grid = blocks("dy", &[chunks, parts])?;
    let mut plan = Plan::from(Launch::new(kernel, grid, [SM80_THREADS, 1, 1], shared, &params));
    for (i, target) in targets.into_iter().enumerate() {
        if let Some(out) = target {
            plan.push(partial_sums(sums[i], if i == 0 { chunks } else { parts }, out, dtype));
        }
    }
    Ok(plan)
}

/// The same as GEMMs, for larger ranks.
fn composed_factors(
    layer: &Layer,
    pass: &Pass,
    [s, dy]: [Buffer; 2],
    [ds, lora_b, delta_bias]: [Option<Buffer>; 3],
) -> Result<Plan> {
    let &Pass { arithmetic: run, noise, .. } = pass;
    let (sizes, n) = (sizes(layer, pass), layer.shape.out_features);
    let mut plan = Plan::default();
    if let Some(dx) = ds {
        let shape = LinearShape { shared_input: false, ..sizes.b_shape() };
        let (segments, scale) = (&[(dy, layer.lora_b, n, true)], layer.scale);
        plan.push(InputGradient { run, shape, noise, segments, dx, scale }.plan()?);
    }
    if lora_b.is_some() || delta_bias.is_some() {
        let workspace = Address::from(pass.workspace).offset(4 * sizes.workspace().products);
        let (shape, weight, bias) = (sizes.b_shape(), lora_b, delta_bias);
        plan.append(WeightGradient { run, shape, noise, g: dy, x: s, weight, bias, workspace }.plan()?);
    }
    Ok(plan)
}
