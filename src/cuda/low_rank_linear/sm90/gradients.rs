//! The gradients to A, B and δb, and what is under the noise for that to the input; plans `kernels/sm90/low_rank_gradients.cu`.

use super::super::params::Sm90LowRankGradientsParams;
use super::{Layer, REFUSED};
use crate::cuda::buffer::{Address, Buffer};
use crate::cuda::gemm::Arena;
use crate::cuda::gpu::Gpu;
use crate::cuda::kernel::{Kernels16, table};
use crate::cuda::layer::{Pass, blocks};
use crate::cuda::partial_sums::partial_sums;
use crate::cuda::plan::{Launch, Plan, TensorMap};
use crate::cuda::sm90::{SM90_THREADS, SM90_TILE_K, z_in_memory};
use crate::error::Result;
use crate::noise::NoiseShape;
use crate::shape::LinearShape;
use bytemuck::Zeroable;
use std::mem::offset_of;

/// Channels of a block up to rank 16, and up to 32: as many as a consumer has accumulators for. 768, 2304 and 3072 are multiples
/// of both.
pub const SM90_GRADIENTS_CHANNELS_16: usize = 384;
pub const SM90_GRADIENTS_CHANNELS_32: usize = 256;
pub const SM90_GRADIENTS_STAGES: usize = 3;

/// Up to which rank, channels of a block, and the kernels.
const KERNELS: [(usize, usize, Kernels16, Kernels16); 2] = [
    (16, SM90_GRADIENTS_CHANNELS_16, table::SM90_LOW_RANK_FACTORS_16, table::SM90_LOW_RANK_PRODUCT_16),
    (32, SM90_GRADIENTS_CHANNELS_32, table::SM90_LOW_RANK_FACTORS_32, table::SM90_LOW_RANK_PRODUCT_32),
];
/// Tokens of a sample that are worth a tile of 64 rows.
const MIN_TOKENS: usize = 32;

/// A matrix of tokens as it is walked: a sample's tokens in tiles of 64.
#[derive(Clone, Copy)]
struct Walk {
    samples: usize,
    tokens: usize,
    columns: usize,
}

impl Walk {
    /// What is read with noise, or without: then samples do not matter.
    fn of_gradient(shape: &LinearShape, noise: Option<NoiseShape>) -> Self {
        let [samples, tokens] = match noise {
            Some(_) => [shape.samples(), shape.tokens],
            None => [shape.out_rows() / shape.in_rows(), shape.in_rows()],
        };
        Self { samples, tokens, columns: shape.out_features }
    }

    fn of_input(shape: &LinearShape) -> Self {
        Self { samples: 1, tokens: shape.in_rows(), columns: shape.in_features }
    }

    /// Chunks of the columns and groups of tiles: together a block on each multiprocessor, if there are tiles enough.
    fn parts(&self, gpu: &Gpu, rank: usize) -> [usize; 2] {
        let channels = KERNELS.iter().find(|&&(columns, ..)| rank <= columns).map_or(1, |kernel| kernel.1);
        let chunks = self.columns.div_ceil(channels);
        let tiles = self.samples.saturating_mul(self.tokens.div_ceil(SM90_TILE_K));
        [chunks, (gpu.multiprocessors as usize / chunks).clamp(1, tiles.max(1))]
    }
}

/// Places in the workspace, all in `f32`.
pub(super) struct Places {
    /// `z [R, N]`, where it is not given.
    z: Buffer,
    /// Partial sums of ds, dB and dδb.
    sums: [Buffer; 3],
    /// Of dA.
    product: Buffer,
}

impl Places {
    pub(super) fn new(arena: &mut Arena, gpu: &Gpu, shape: &LinearShape, rank: usize) -> Self {
        let mut take = |sizes: [usize; 3]| {
            let len = sizes.into_iter().fold(1, usize::saturating_mul);
            Buffer { address: arena.take(len.saturating_mul(4)).0, len }
        };
        // With noise or without: whichever needs more.
        let walks =
            [Some(NoiseShape::PerSample), None].map(|noise| Walk::of_gradient(shape, noise).parts(gpu, rank));
        let [chunks, groups] = [0, 1].map(|i| walks[0][i].max(walks[1][i]));
        let (m, n) = (shape.out_rows(), shape.out_features);
        let [_, product] = Walk::of_input(shape).parts(gpu, rank);
        Self {
            z: take([shape.samples(), n, 1]),
            sums: [take([chunks, m, rank]), take([groups, n, rank]), take([groups, n, 1])],
            product: take([product, rank, shape.in_features]),
        }
    }
}

/// Whether these kernels take the noise.
pub(super) fn takes(shape: &LinearShape, noise: Option<NoiseShape>) -> bool {
    match noise {
        None => true,
        Some(NoiseShape::PerSample) => shape.tokens >= MIN_TOKENS,
        Some(NoiseShape::PerToken) => false,
    }
}

/// `ds`, `dB` and `dδb`, those that have a target.
pub(super) fn factors(
    layer: &Layer,
    pass: &Pass,
    places: &Places,
    [s, dy]: [Buffer; 2],
    targets: [Option<Buffer>; 3],
) -> Result<Plan> {
    let mut plan = Plan::default();
    let (shape, noise) = (&layer.shape, layer.noise.shape());
    let z = noise.map(|_| z_in_memory(&mut plan, layer.noise, shape, pass, places.z));
    let walk = Walk::of_gradient(shape, noise);
    let sums = |i: usize| targets[i].map_or(Address::NONE, |_| places.sums[i].into());
    let params = Sm90LowRankGradientsParams {
        low: s.into(),
        factor: layer.lora_b.into(),
        z: z.map_or(Address::NONE, Address::from).into(),
        ds: sums(0).into(),
        sums: sums(1).into(),
        delta_bias: sums(2).into(),
        wrap: (shape.in_rows() / walk.tokens) as u32,
        copies: 1,
        scale: layer.scale,
        ..Zeroable::zeroed()
    };
    let [chunks, groups] = walk.parts(&pass.gpu, layer.rank);
    plan.push(launch(layer, pass, walk, dy, params, true)?);
    for (i, target) in targets.into_iter().enumerate() {
        if let Some(out) = target {
            let parts = if i == 0 { chunks } else { groups };
            plan.push(partial_sums(places.sums[i].into(), parts, out, pass.arithmetic.dtype));
        }
    }
    Ok(plan)
}

/// `dA = dsᵀ·x`, summed over the branches that share `x`.
pub(super) fn product(
    layer: &Layer,
    pass: &Pass,
    places: &Places,
    [ds, x]: [Buffer; 2],
    lora_a: Buffer,
) -> Result<Plan> {
    let walk = Walk::of_input(&layer.shape);
    let params = Sm90LowRankGradientsParams {
        low: ds.into(),
        sums: Address::from(places.product).into(),
        wrap: 1,
        copies: (layer.shape.out_rows() / layer.shape.in_rows()) as u32,
        copy_samples: 1,
        ..Zeroable::zeroed()
    };
    let mut plan = Plan::from(launch(layer, pass, walk, x, params, false)?);
    let [_, groups] = walk.parts(&pass.gpu, layer.rank);
    plan.push(partial_sums(places.product.into(), groups, lora_a, pass.arithmetic.dtype));
    Ok(plan)
}

fn launch(
    layer: &Layer,
    pass: &Pass,
    walk: Walk,
    tensor: Buffer,
    params: Sm90LowRankGradientsParams,
    has_factors: bool,
) -> Result<Launch> {
    let (dtype, rank) = (pass.arithmetic.dtype, layer.rank);
    let mut kernels = KERNELS.into_iter();
    let (columns, channels, factors, product) =
        kernels.find(|&(columns, ..)| rank <= columns).ok_or(REFUSED)?;
    let [chunks, groups] = walk.parts(&pass.gpu, rank);
    let params = Sm90LowRankGradientsParams {
        columns: walk.columns as u32,
        samples: walk.samples as u32,
        tokens: walk.tokens as u32,
        rank: rank as u32,
        chunks: chunks as u32,
        groups: groups as u32,
        ..params
    };
    // As the kernels lay it out: stages of a tile and low-rank rows, z * B twice, B, barriers.
    let row_bytes = 2 * SM90_TILE_K;
    let low = if has_factors { columns + 8 } else { 2 * columns };
    let stages = SM90_GRADIENTS_STAGES * (channels + low) * row_bytes;
    let factor = if has_factors { 3 * channels * columns * 2 } else { 0 };
    let shared = stages + factor + 8 * (2 * SM90_GRADIENTS_STAGES + 4);
    let kernel = (if has_factors { factors } else { product }).choose(dtype).ok_or(REFUSED)?;
    let [grid, ..] = blocks("dy", &[chunks, groups])?;
    let tile = TensorMap::of_rows(
        tensor,
        dtype,
        [walk.columns, walk.tokens, walk.samples],
        [SM90_TILE_K, SM90_TILE_K, 1],
    );
    let launch = Launch::new(kernel, [grid, 1, 1], [SM90_THREADS, 1, 1], shared, &params);
    Ok(launch.with_maps(&[(offset_of!(Sm90LowRankGradientsParams, tile), tile)]))
}
