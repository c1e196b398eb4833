//! The gradients to ΔW and Δb; plans `kernels/sm90/weight_gradient.cu`.

use super::super::params::Sm90WeightParams;
use super::REFUSED;
use crate::cuda::buffer::{Address, Buffer};
use crate::cuda::gpu::Gpu;
use crate::cuda::kernel::{Kernels16, table};
use crate::cuda::layer::{Pass, blocks};
use crate::cuda::plan::{Launch, Plan, TensorMap};
use crate::cuda::sm90::{SM90_THREADS, SM90_TILE_K};
use crate::error::Result;
use crate::shape::LinearShape;
use bytemuck::Zeroable;
use std::mem::offset_of;

/// Channels and features of a block's tile, and tokens of a stage.
pub const SM90_WEIGHT_ROWS: usize = 128;
pub const SM90_WEIGHT_COLUMNS: usize = 256;
pub const SM90_WEIGHT_DEPTH: usize = 64;
pub const SM90_WEIGHT_STAGES: usize = 4;
/// Blocks of a cluster, whose channels lie beside each other.
pub const SM90_WEIGHT_CLUSTER: usize = 2;
/// Channels of a tile that a block adds up, and its threads.
pub const SM90_WEIGHT_SUM_ROWS: usize = 16;
pub const SM90_WEIGHT_SUM_THREADS: usize = 256;

/// Operands, checked before.
pub(super) struct WeightGradient {
    pub(super) x: Buffer,
    /// The gradient to the output.
    pub(super) g: Buffer,
    /// `[R, N]`.
    pub(super) z: Buffer,
    pub(super) weight: Buffer,
    pub(super) bias: Option<Buffer>,
    /// As long as [`partial_len`](Self::partial_len) says.
    pub(super) partial: [Buffer; 2],
}

impl WeightGradient {
    /// Tiles of clusters along the channels and the features.
    fn tiles(shape: &LinearShape) -> [usize; 2] {
        let rows = SM90_WEIGHT_ROWS * SM90_WEIGHT_CLUSTER;
        [shape.out_features.div_ceil(rows), shape.in_features.div_ceil(SM90_WEIGHT_COLUMNS)]
    }

    /// Clusters that share the work: a block on each multiprocessor.
    fn clusters(gpu: &Gpu, shape: &LinearShape) -> usize {
        let [rows, columns] = Self::tiles(shape);
        let units = rows.saturating_mul(columns).saturating_mul(shape.samples());
        (gpu.multiprocessors as usize / SM90_WEIGHT_CLUSTER).clamp(1, units.max(1))
    }

    /// Elements for the sums of tiles that clusters share, its first and its last each: of the gradients to ΔW and Δb.
    pub(super) fn partial_len(gpu: &Gpu, shape: &LinearShape) -> [usize; 2] {
        let rows = 2 * Self::clusters(gpu, shape) * SM90_WEIGHT_CLUSTER * SM90_WEIGHT_ROWS;
        [rows * SM90_WEIGHT_COLUMNS, rows]
    }

    pub(super) fn plan(self, shape: &LinearShape, pass: &Pass) -> Result<Plan> {
        let (dtype, samples) = (pass.arithmetic.dtype, shape.samples());
        let (k, n) = (shape.in_features, shape.out_features);
        let [tile_rows, tile_columns] = Self::tiles(shape);
        // Units of work are counted in 32 bits.
        blocks("grads.delta_weight", &[tile_rows, tile_columns, samples])?;
        let tiles = tile_rows * tile_columns;
        let clusters = Self::clusters(&pass.gpu, shape);
        let in_samples = shape.in_rows() / shape.tokens;
        let [partial, bias_partial] = self.partial;
        let params = Sm90WeightParams {
            z: self.z.into(),
            weight: self.weight.into(),
            bias: self.bias.map_or(Address::NONE, Address::from).into(),
            partial: partial.into(),
            bias_partial: self.bias.map_or(Address::NONE, |_| bias_partial.into()).into(),
            rows: n as u32,
            columns: k as u32,
            samples: samples as u32,
            wrap: in_samples as u32,
            tokens: shape.tokens as u32,
            tiles: tiles as u32,
            tile_columns: tile_columns as u32,
            clusters: clusters as u32,
            ..Zeroable::zeroed()
        };
        let tokens = |tensor: Buffer, features: usize, samples: usize| {
            let boxes = [SM90_TILE_K, SM90_WEIGHT_DEPTH, 1];
            TensorMap::of_rows(tensor, dtype, [features, shape.tokens, samples], boxes)
        };
        let maps = [
            (offset_of!(Sm90WeightParams, g), tokens(self.g, n, samples)),
            (offset_of!(Sm90WeightParams, x), tokens(self.x, k, in_samples)),
        ];
        let row_bytes = (SM90_WEIGHT_ROWS + SM90_WEIGHT_COLUMNS) * dtype.bytes();
        let shared = SM90_WEIGHT_STAGES * (SM90_WEIGHT_DEPTH * row_bytes + 16);
        let kernel = |kernels: Kernels16| kernels.choose(dtype).ok_or(REFUSED);
        let (gemm, sums) = (kernel(table::SM90_WEIGHT_GRADIENT)?, kernel(table::SM90_WEIGHT_SUMS)?);
        let grid = [(clusters * SM90_WEIGHT_CLUSTER) as u32, 1, 1];
        let gemm =
            Launch::new(gemm, grid, [SM90_THREADS, 1, 1], shared, &params).in_clusters(SM90_WEIGHT_CLUSTER);
        let parts = SM90_WEIGHT_CLUSTER * SM90_WEIGHT_ROWS / SM90_WEIGHT_SUM_ROWS;
        let grid = blocks("grads.delta_weight", &[tiles, parts])?;
        let sums = Launch::new(sums, grid, [SM90_WEIGHT_SUM_THREADS as u32, 1, 1], 0, &params);
        let mut plan = Plan::from(gemm.with_maps(&maps));
        plan.push(sums.with_maps(&maps));
        Ok(plan)
    }
}
