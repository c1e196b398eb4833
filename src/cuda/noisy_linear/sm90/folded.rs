//! GEMMs with `W0 + z⊙ΔW`; plans `kernels/sm90/folded_linear.cu`.

use super::super::params::Sm90FoldedParams;
use super::REFUSED;
use crate::cuda::buffer::{Buffer, DType};
use crate::cuda::gpu::Gpu;
use crate::cuda::kernel::{Kernels16, table};
use crate::cuda::layer::{Pass, blocks};
use crate::cuda::plan::{Launch, TensorMap};
use crate::cuda::sm90::{SM90_THREADS, SM90_TILE_K};
use crate::error::Result;
use crate::noise::NoiseShape;
use crate::shape::LinearShape;
use bytemuck::Zeroable;
use std::mem::offset_of;

/// Rows of a block's tile of the output transposed.
pub const SM90_FOLDED_ROWS: usize = 128;
/// Stages of the units' tiles, and as many entries of a consumer's tiles of both matrices.
pub const SM90_FOLDED_STAGES: usize = 3;
/// Blocks of a cluster.
pub const SM90_FOLDED_CLUSTER: usize = 2;

/// How the tokens of a sample are cut: the kernels for it.
pub(super) struct Units {
    /// Tokens of a unit.
    tokens: usize,
    /// Units of a tile.
    count: usize,
    /// Tokens that go out at once, by one of a consumer's two buffers.
    chunk: usize,
    /// What shared memory, or the folding of short units, leaves of the tensor cores' speed, in percent: arithmetic, not measured.
    speed: usize,
    forward: Kernels16,
    input: Kernels16,
}

const UNITS: [Units; 3] = [
    Units {
        tokens: 200,
        count: 2,
        chunk: 40,
        speed: 93,
        forward: table::SM90_FOLDED_LINEAR_200,
        input: table::SM90_FOLDED_INPUT_200,
    },
    Units {
        tokens: 136,
        count: 2,
        chunk: 136,
        speed: 82,
        forward: table::SM90_FOLDED_LINEAR_136,
        input: table::SM90_FOLDED_INPUT_136,
    },
    Units {
        tokens: 64,
        count: 4,
        chunk: 64,
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
    pub(super) fn of(tokens: usize, noise: Option<NoiseShape>) -> Option<&'static Self> {
        let best = UNITS.iter().min_by_key(|units| units.cost(tokens))?;
        let wasted = best.parts(tokens).saturating_mul(best.tokens) - tokens;
        (noise != Some(NoiseShape::PerToken) && wasted <= tokens).then_some(best)
    }

    /// Whether the forward pass has a tile for every cluster.
    pub(super) fn fill(&self, gpu: &Gpu, shape: &LinearShape) -> bool {
        let tile_rows = shape.samples().saturating_mul(self.parts(shape.tokens)).div_ceil(self.count);
        let tile_columns = shape.out_features.div_ceil(SM90_FOLDED_ROWS * SM90_FOLDED_CLUSTER);
        tile_rows.saturating_mul(tile_columns) >= gpu.multiprocessors as usize / SM90_FOLDED_CLUSTER
    }

    /// Whether samples are so short that their padding is dear.
    pub(super) fn are_short(&self) -> bool {
        self.count > 2
    }

    /// Bytes of shared memory, as the kernels lay it out: stages, entries, outputs of both consumers, z, barriers.
    fn shared_bytes(&self) -> usize {
        let row = 2 * SM90_TILE_K;
        let stages = SM90_FOLDED_STAGES * (self.count * self.tokens * row + self.count * SM90_TILE_K * 4);
        let entries = SM90_FOLDED_STAGES * SM90_FOLDED_ROWS * row;
        stages + entries + 2 * 2 * self.chunk * row + 8 * 5 * SM90_FOLDED_STAGES
    }
}

/// Operands of a folded GEMM, checked before.
pub(super) struct Folded {
    /// `W0` and `ΔW`, `[N, K]`.
    pub(super) weights: [Buffer; 2],
    /// Of the base and the adapter.
    pub(super) biases: [Option<Buffer>; 2],
    /// `[samples, T, inner]`: x, or the gradient to the output.
    pub(super) x: Buffer,
    /// `[samples, T, rows]`: y, or the gradient to x.
    pub(super) y: Buffer,
    /// `[R, N]`.
    pub(super) z: Buffer,
    pub(super) rows: usize,
    pub(super) inner: usize,
}

impl Folded {
    /// `is_input`: it is the gradient to the input.
    pub(super) fn plan(
        self,
        shape: &LinearShape,
        pass: &Pass,
        units: &Units,
        is_input: bool,
    ) -> Result<Launch> {
        let dtype = pass.arithmetic.dtype;
        let (samples, n, k) = (shape.samples(), shape.out_features, shape.in_features);
        // A shared input has the samples of one branch, and its gradient those of all.
        let in_samples = shape.in_rows() / shape.tokens;
        let (from, to) = if is_input { (samples, in_samples) } else { (in_samples, samples) };
        let parts = units.parts(shape.tokens);
        let tile_rows = (to * parts).div_ceil(units.count);
        let tile_columns = self.rows.div_ceil(SM90_FOLDED_ROWS * SM90_FOLDED_CLUSTER);
        let [tiles, ..] = blocks("y", &[tile_rows, tile_columns])?;
        let [base_bias, delta_bias] = self.biases;
        let params = Sm90FoldedParams {
            z: self.z.into(),
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
        // A consumer's rows by a step of the reduction, or the other way round.
        let weight =
            |weight: Buffer| TensorMap::of_rows(weight, dtype, [k, n, 1], [SM90_TILE_K, SM90_TILE_K, 1]);
        let tokens = |tensor: Buffer, features: usize, samples: usize, tokens: usize| {
            let (dims, boxes) = ([features, shape.tokens, samples], [SM90_TILE_K, tokens, 1]);
            TensorMap::of_rows(tensor, dtype, dims, boxes)
        };
        let z_map = TensorMap::of_rows(self.z, DType::F32, [n, samples, 1], [SM90_TILE_K, 1, 1]);
        let maps = [
            (offset_of!(Sm90FoldedParams, weight), weight(self.weights[0])),
            (offset_of!(Sm90FoldedParams, delta), weight(self.weights[1])),
            (offset_of!(Sm90FoldedParams, x), tokens(self.x, self.inner, from, units.tokens)),
            (offset_of!(Sm90FoldedParams, z_map), z_map.without_swizzle()),
            (offset_of!(Sm90FoldedParams, y), tokens(self.y, self.rows, to, units.chunk)),
        ];
        let kernels = if is_input { units.input } else { units.forward };
        let kernel = kernels.choose(dtype).ok_or(REFUSED)?;
        let clusters = (pass.gpu.multiprocessors / SM90_FOLDED_CLUSTER as u32).clamp(1, tiles);
        let grid = [clusters * SM90_FOLDED_CLUSTER as u32, 1, 1];
        let launch = Launch::new(kernel, grid, [SM90_THREADS, 1, 1], units.shared_bytes(), &params);
        Ok(launch.in_clusters(SM90_FOLDED_CLUSTER).with_maps(&maps))
    }
}
