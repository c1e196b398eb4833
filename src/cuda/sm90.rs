//! What the plans for `kernels/sm90` share: the forward GEMM with tokens as rows.

use super::buffer::{Address, Buffer, DType};
use super::kernel::Kernel;
use super::layer::{Pass, blocks};
use super::noise_fill;
use super::noise_source::{NoiseSource, Source};
use super::plan::{Launch, Plan, TensorMap};
use super::pointer::{Input, Output, TensorMapSlot, Void};
use super::select::Problem;
use crate::error::Result;
use crate::noise::NoiseShape;
use crate::shape::LinearShape;
use bytemuck::{Pod, Zeroable};
use std::mem::offset_of;

/// Threads of a block: two consumer warpgroups and the producer.
pub const SM90_THREADS: u32 = 384;
/// Token rows of a block's tile.
pub const SM90_TILE_ROWS: usize = 128;
/// Of these, rows of a warp, which it writes by itself.
const SM90_WARP_ROWS: usize = 16;
/// Elements of a tile along the reduction, and channels of an output chunk: rows of 128 bytes, the widest swizzle.
pub const SM90_TILE_K: usize = 64;
/// Samples whose tokens a tile may have where they share `z`; with 49 tokens per sample there are 4.
pub const SM90_TILE_SAMPLES: usize = 4;
/// Shared memory of a block.
const MAX_SHARED_BYTES: usize = 227 << 10;

/// Parameters of the kernels `sm90_low_rank_linear*`, `sm90_low_rank_input*` and `sm90_noisy_linear_exact*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct Sm90LinearParams {
    /// `x [rows, K]` or `g [copies, rows, N]`, boxes of 128 rows.
    pub(super) x: TensorMapSlot,
    /// `W0 [N, K]`, boxes of the part of a tile that a block of the cluster fetches.
    pub(super) weight: TensorMapSlot,
    /// The adapter's `[r, K]` or `[N, K]`, boxes of a block's part of its rows in a tile; not for the gradient.
    pub(super) extra: TensorMapSlot,
    /// `y [copies, rows, N]` or `grad_x [rows, K]`, boxes of 16 rows.
    pub(super) y: TensorMapSlot,
    pub(super) noise: NoiseSource,
    /// May be null.
    pub(super) base_bias: Input<Void>,
    /// May be null.
    pub(super) delta_bias: Input<Void>,
    /// LoRA's `B [N, r]`, for the gradient its `A [r, K]`, or null.
    pub(super) factor: Input<Void>,
    /// `s [rows, r]`, for the gradient `ds [copies, rows, r]`, or null.
    pub(super) s: Output<Void>,
    /// Whether the adapter's rows are those of the tile's channels, or the same for all.
    pub(super) extra_by_column: u64,
    /// Token rows of x.
    pub(super) rows: u32,
    /// Branches that share them.
    pub(super) copies: u32,
    /// Samples of a copy.
    pub(super) samples: u32,
    /// Tokens per sample; all rows where they share `z`.
    pub(super) tokens: u32,
    /// Columns of the output: N or K.
    pub(super) channels: u32,
    /// Length of the reduction: K or N.
    pub(super) inner: u32,
    /// Rank `r`.
    pub(super) rank: u32,
    /// Tiles along the rows, those of a cluster as one.
    pub(super) tile_rows: u32,
    /// Tiles along the columns.
    pub(super) tile_columns: u32,
    /// Factor on `s`.
    pub(super) scale: f32,
}

/// A kernel's tile and what it asks for.
pub(super) struct Tiling {
    pub(super) kernel: Kernel,
    /// Channels of a tile.
    pub(super) channels: usize,
    /// Rows of the adapter's matrix in the tile.
    pub(super) extra: usize,
    pub(super) extra_by_column: bool,
    pub(super) stages: usize,
    pub(super) cluster: usize,
    /// Buffers of a consumer for outputs on their way.
    pub(super) staging: usize,
    /// Whether there is a noise table.
    pub(super) has_table: bool,
    /// Bytes of LoRA's factor in shared memory.
    pub(super) factor_bytes: usize,
}

/// Operands of the GEMM `y = x·W0ᵀ` with its adapter, or of `dx = g·W0`, checked before.
pub(super) struct LinearGemm {
    /// x, or the gradient to the output.
    pub(super) x: Buffer,
    pub(super) weight: Buffer,
    /// The adapter's matrix and its rows; none for the gradient.
    pub(super) extra: Option<(Buffer, usize)>,
    pub(super) base_bias: Option<Buffer>,
    pub(super) delta_bias: Option<Buffer>,
    pub(super) factor: Option<Buffer>,
    pub(super) s: Option<Buffer>,
    /// y, or the gradient to the input.
    pub(super) y: Buffer,
    pub(super) rank: usize,
    pub(super) scale: f32,
}

impl LinearGemm {
    pub(super) fn plan(self, shape: &LinearShape, pass: &Pass, tiling: &Tiling) -> Result<Launch> {
        let &Tiling { kernel, channels, cluster, .. } = tiling;
        let (dtype, features) = (pass.arithmetic.dtype, [shape.in_features, shape.out_features]);
        let rows = shape.in_rows();
        let copies = shape.out_rows() / rows;
        // The gradient is the sum of the branches' that share x.
        let is_gradient = self.extra.is_none();
        let [[k, n], [x_copies, y_copies]] = match is_gradient {
            false => [features, [1, copies]],
            true => [[features[1], features[0]], [copies, 1]],
        };
        let noisy = pass.noise != NoiseSource::OFF;
        let tile_rows = rows.div_ceil(SM90_TILE_ROWS * cluster);
        let tile_columns = n.div_ceil(channels);
        let [tiles, ..] = blocks("y", &[tile_rows, tile_columns])?;
        let params = Sm90LinearParams {
            noise: pass.noise,
            base_bias: self.base_bias.into(),
            delta_bias: self.delta_bias.into(),
            factor: self.factor.into(),
            s: self.s.map_or(Address::NONE, Address::from).into(),
            rows: rows as u32,
            copies: copies as u32,
            samples: (shape.samples() / copies) as u32,
            tokens: if noisy { shape.tokens } else { rows } as u32,
            channels: n as u32,
            inner: k as u32,
            rank: self.rank as u32,
            tile_rows: tile_rows as u32,
            tile_columns: tile_columns as u32,
            extra_by_column: u64::from(tiling.extra_by_column),
            scale: self.scale,
            ..Zeroable::zeroed()
        };
        let tokens = |tensor: Buffer, columns: usize, copies: usize, box_rows: usize| {
            TensorMap::of_rows(tensor, dtype, [columns, rows, copies], [SM90_TILE_K, box_rows, 1])
        };
        let weight = |matrix: Buffer, [columns, rows]: [usize; 2], box_rows: usize| {
            TensorMap::of_rows(matrix, dtype, [columns, rows, 1], [SM90_TILE_K, box_rows, 1])
        };
        let weight_rows = if is_gradient { SM90_TILE_K } else { channels };
        let mut maps = vec![
            (offset_of!(Sm90LinearParams, x), tokens(self.x, k, x_copies, SM90_TILE_ROWS)),
            (offset_of!(Sm90LinearParams, weight), weight(self.weight, features, weight_rows / cluster)),
            (offset_of!(Sm90LinearParams, y), tokens(self.y, n, y_copies, SM90_WARP_ROWS)),
        ];
        if let Some((extra, rows)) = self.extra {
            let boxes = tiling.extra / cluster;
            maps.push((offset_of!(Sm90LinearParams, extra), weight(extra, [k, rows], boxes)));
        }
        let clusters = (pass.gpu.multiprocessors / cluster as u32).clamp(1, tiles);
        let grid = [clusters * cluster as u32, 1, 1];
        let launch = Launch::new(kernel, grid, [SM90_THREADS, 1, 1], tiling.shared_bytes(), &params);
        Ok(launch.in_clusters(cluster).with_maps(&maps))
    }
}

impl Tiling {
    /// As the kernels lay it out: stages, staging, the noise table, the factor, barriers.
    fn shared_bytes(&self) -> usize {
        let row_bytes = 2 * SM90_TILE_K;
        let stages = self.stages * (SM90_TILE_ROWS + self.channels + self.extra) * row_bytes;
        let staging = self.staging * SM90_TILE_ROWS * 2 * SM90_TILE_K;
        let table = if self.has_table { 2 * 2 * SM90_TILE_SAMPLES * self.channels * 4 + 16 } else { 0 };
        let barriers = 2 * 8 * (self.stages + 1);
        let bytes = stages + staging + table + self.factor_bytes + barriers;
        debug_assert!(bytes <= MAX_SHARED_BYTES);
        bytes
    }
}

/// `z [R, N]` in memory: that of the caller, or written to `place` by the plan. Without noise it is all 1.
pub(super) fn z_in_memory(
    plan: &mut Plan,
    noise: Source,
    shape: &LinearShape,
    pass: &Pass,
    place: Buffer,
) -> Buffer {
    if let Source::Given { z, .. } = noise {
        return z;
    }
    plan.push(noise_fill::fill(pass.noise, [shape.samples(), 1, shape.out_features], place));
    place
}

/// Whether TMA can walk the tensors of a layer: 16-bit elements, rows that start at multiples of 16 bytes, coordinates that fit.
pub(super) fn takes_tensors(problem: &Problem) -> bool {
    let LinearShape { in_features: k, out_features: n, .. } = problem.shape;
    let largest = i32::MAX as usize - 1024;
    problem.aligned
        && problem.dtype != DType::F32
        && k.is_multiple_of(8)
        && n.is_multiple_of(8)
        && [problem.shape.out_rows(), k, n].into_iter().all(|size| size <= largest)
}

/// Whether the noise of any tile of token rows fits its table.
pub(super) fn takes_noise(shape: &LinearShape, noise: Option<NoiseShape>) -> bool {
    match noise {
        None => true,
        Some(NoiseShape::PerToken) => false,
        Some(NoiseShape::PerSample) => {
            let tokens = shape.tokens.max(1);
            let spanned = (SM90_TILE_ROWS - 2) / tokens + 2;
            spanned.min(shape.in_rows() / tokens) <= SM90_TILE_SAMPLES
        }
    }
}
