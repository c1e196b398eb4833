//! Dense noisy linear layer; plans `kernels/sm80/noisy_linear.cu`.

use super::device::{Borrows, Device, Noise};
use super::kernel::table;
use super::launch::{
    Buffer, DType, Element, Launch, Plan, RawLaunch, address, check_disjoint, check_linear_shape, params,
};
use super::noise_source::{NoiseSource, Source};
use super::partial_sums::{PartialSumsParams, partial_sums};
use crate::error::{Error, Result};
use crate::noise::NoiseShape;
use crate::shape::LinearShape;
use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use std::mem::offset_of;

/// Rows and columns of a block's tile of outputs.
pub(super) const TILE: usize = 128;
pub(super) const THREADS: u32 = 256;
/// Bytes of an operand's tile in shared memory, 64 along the inner dimension.
const TILE_BYTES: usize = TILE * 64;
const FORWARD_STAGES: usize = 4;
const FOLDED_STAGES: usize = 3;
const BACKWARD_STAGES: usize = 3;
/// Blocks that keep a large device busy; weight gradients are split over token rows to have as many.
const BLOCKS: usize = 264;
/// Token rows of a partial sum are a multiple of this, and not fewer than `MIN_PART`.
const PART_STEP: usize = 32;
const MIN_PART: usize = 256;

/// The frozen layer under an adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Base<B> {
    /// `W0 [N, K]`.
    pub weight: B,
    /// `b0 [N]`.
    pub bias: Option<B>,
}

/// `y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)` and its gradients; paper equation 8.
///
/// `B` are the tensors, all of one type: [`Buffer`] for planning, or `cudarc`'s (see [`Device::noisy_linear`]); `N` is where
/// `z` comes from: [`Source`] or [`Noise`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoisyLinear<B, N> {
    /// Sizes.
    pub shape: LinearShape,
    /// Source of `z`.
    pub noise: N,
    /// The frozen layer; `None` is a zero base term (the noisy head).
    pub base: Option<Base<B>>,
    /// `ΔW [N, K]`; `None` is zero (VPT add).
    pub delta_weight: Option<B>,
    /// `Δb [N]`; `None` is zero.
    pub delta_bias: Option<B>,
    /// Whether the forward pass may take one product with `W0 + z⊙ΔW` instead of two, where a sample's tokens share `z` and
    /// fill the tiles (or the noise is off). The sum is rounded to the tensors' type: nothing is lost in `f32`; in the
    /// 16-bit types an adapter that is small against `W0` keeps fewer bits.
    pub fold: bool,
    /// Whether `f32` is multiplied as TF32 (10 fraction bits) instead of to `f32` accuracy.
    pub allow_tf32: bool,
}

/// Where gradients of a [`NoisyLinear`] go; each is overwritten, `None` is not computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoisyLinearGrads<B> {
    /// `dx`, of the shape of `x`.
    pub input: Option<B>,
    /// `dΔW [N, K]`.
    pub delta_weight: Option<B>,
    /// `dΔb [N]`.
    pub delta_bias: Option<B>,
}

impl<B> Default for NoisyLinearGrads<B> {
    fn default() -> Self {
        Self { input: None, delta_weight: None, delta_bias: None }
    }
}

/// `pace::Segment` of the kernels: one product of a sum of products.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct Segment {
    pub(super) left: u64,
    pub(super) right: u64,
    pub(super) inner: u32,
    pub(super) adapter: u32,
    pub(super) first_row: u32,
    pub(super) aligned: u32,
}

const _: () = assert!(
    size_of::<Segment>() == 32
        && offset_of!(Segment, right) == 8
        && offset_of!(Segment, inner) == 16
        && offset_of!(Segment, adapter) == 20
        && offset_of!(Segment, first_row) == 24
        && offset_of!(Segment, aligned) == 28
);

params! {
    /// `pace::NoisyLinearParams` of the kernels.
    NoisyLinearParams, 176 bytes {
        0 noise: NoiseSource,
        48 segments: [Segment; 2],
        112 base_bias: u64,
        120 delta_bias: u64,
        128 y: u64,
        136 rows: u32,
        140 tokens: u32,
        144 channels: u32,
        148 wrap: u32,
        152 count: u32,
        156 tile_columns: u32,
        160 aligned: u32,
        164 z_aligned: u32,
        168 scale: f32,
        172 reserved: u32,
    }
}

params! {
    /// `pace::NoisyLinearInputParams` of the kernels.
    NoisyLinearInputParams, 224 bytes {
        0 noise: NoiseSource,
        48 segments: [Segment; 4],
        176 dx: u64,
        184 rows: u32,
        188 tokens: u32,
        192 channels: u32,
        196 columns: u32,
        200 count: u32,
        204 tile_columns: u32,
        208 aligned: u32,
        212 z_aligned: u32,
        216 scale: f32,
        220 reserved: u32,
    }
}

params! {
    /// `pace::NoisyLinearWeightParams` of the kernels.
    NoisyLinearWeightParams, 136 bytes {
        0 noise: NoiseSource,
        48 g: u64,
        56 x: u64,
        64 weight: u64,
        72 bias: u64,
        80 rows: u32,
        84 tokens: u32,
        88 channels: u32,
        92 columns: u32,
        96 wrap: u32,
        100 tile_columns: u32,
        104 tile_rows: u32,
        108 part: u32,
        112 partial: u32,
        116 left_aligned: u32,
        120 right_aligned: u32,
        124 aligned: u32,
        128 z_aligned: u32,
        132 reserved: u32,
    }
}

/// Whether rows of `columns` elements hold whole 16-byte vectors, in tensors that start at multiples of 16 bytes.
pub(super) fn aligned(dtype: DType, columns: usize, tensors: &[u64]) -> bool {
    (columns * dtype.bytes()).is_multiple_of(16) && tensors.iter().all(|address| address.is_multiple_of(16))
}

/// A grid of so many blocks along x.
pub(super) fn blocks(argument: &'static str, sizes: &[usize]) -> Result<[u32; 3]> {
    let count = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    match count.and_then(|count| i32::try_from(count).ok()) {
        Some(count) => Ok([count as u32, 1, 1]),
        None => Err(Error::Overflow { argument, shape: "[M, N] in tiles of 128" }),
    }
}

/// How a layer's products run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) dtype: DType,
    pub(super) allow_tf32: bool,
}

/// Operands of a forward product `y = Σ left·rightᵀ`, checked before; adapter segments come last.
pub(super) struct Forward<'a> {
    pub(super) run: Run,
    pub(super) shape: LinearShape,
    pub(super) noise: NoiseSource,
    pub(super) z_aligned: bool,
    /// Left and right operand, inner size, and whether it belongs under the noise.
    pub(super) segments: &'a [(Buffer, Buffer, usize, bool)],
    pub(super) base_bias: Option<Buffer>,
    pub(super) delta_bias: Option<Buffer>,
    pub(super) y: Buffer,
    pub(super) fold: bool,
    /// Factor on the adapter's product.
    pub(super) scale: f32,
}

impl Forward<'_> {
    pub(super) fn plan(&self) -> Result<Launch<NoisyLinearParams>> {
        let dtype = self.run.dtype;
        let (m, n) = (self.shape.out_rows(), self.shape.out_features);
        let mut segments = [Segment::zeroed(); 2];
        for (segment, &(left, right, inner, adapter)) in segments.iter_mut().zip(self.segments) {
            *segment = Segment {
                left: left.address,
                right: right.address,
                inner: inner as u32,
                adapter: u32::from(adapter),
                first_row: 0,
                aligned: u32::from(aligned(dtype, inner, &[left.address, right.address])),
            };
        }
        let two = self.segments.len() == 2;
        let off = self.noise == NoiseSource::OFF;
        // Without noise all rows share their z.
        let tokens = if self.fold && off { m } else { self.shape.tokens };
        let columns = n.div_ceil(TILE);
        let (kernels, stages, tiles, rows) = match (two, self.fold) {
            (true, true) => {
                (table::NOISY_LINEAR_FOLDED, FOLDED_STAGES, 3, (m / tokens) * tokens.div_ceil(TILE))
            }
            (true, false) => (table::NOISY_LINEAR_TWO, FORWARD_STAGES, 2, m.div_ceil(TILE)),
            (false, _) => (table::NOISY_LINEAR_ONE, FORWARD_STAGES, 2, m.div_ceil(TILE)),
        };
        let z_bytes = if two && self.fold { TILE * 4 } else { 0 };
        Ok(Launch {
            kernel: kernels.choose(self.run.dtype, self.run.allow_tf32),
            grid: blocks("y", &[columns, rows])?,
            block: [THREADS, 1, 1],
            shared_bytes: (stages * tiles * TILE_BYTES + z_bytes) as u32,
            params: NoisyLinearParams {
                noise: self.noise,
                segments,
                base_bias: address(self.base_bias),
                delta_bias: address(self.delta_bias),
                y: self.y.address,
                rows: m as u32,
                tokens: tokens as u32,
                channels: n as u32,
                wrap: self.shape.in_rows() as u32,
                count: self.segments.len() as u32,
                tile_columns: columns as u32,
                aligned: u32::from(aligned(dtype, n, &[self.y.address])),
                z_aligned: u32::from(self.z_aligned),
                scale: self.scale,
                reserved: 0,
            },
        })
    }
}

/// Operands of an input gradient `dx = Σ left·right`, checked before.
pub(super) struct Input<'a> {
    pub(super) run: Run,
    pub(super) shape: LinearShape,
    pub(super) noise: NoiseSource,
    pub(super) z_aligned: bool,
    /// `[M, inner]`, `[inner, K]`, the inner size, and whether the left one is multiplied with `z` first.
    pub(super) segments: &'a [(Buffer, Buffer, usize, bool)],
    pub(super) dx: Buffer,
    /// Factor on the sum.
    pub(super) scale: f32,
}

impl Input<'_> {
    pub(super) fn plan(&self) -> Result<Launch<NoisyLinearInputParams>> {
        let dtype = self.run.dtype;
        let LinearShape { in_features: k, out_features: n, tokens, .. } = self.shape;
        let rows = self.shape.in_rows();
        let mut segments = [Segment::zeroed(); 4];
        let mut count = 0;
        // A shared input gets the sum over its branches.
        for branch in 0..self.shape.fan_out() {
            for &(left, right, inner, adapter) in self.segments {
                let left = left.address + (branch * rows * inner * dtype.bytes()) as u64;
                let both = aligned(dtype, inner, &[left]) && aligned(dtype, k, &[right.address]);
                segments[count] = Segment {
                    left,
                    right: right.address,
                    inner: inner as u32,
                    adapter: u32::from(adapter),
                    first_row: (branch * rows) as u32,
                    aligned: u32::from(both),
                };
                count += 1;
            }
        }
        let inner = 64 / dtype.bytes();
        let z_bytes = 2 * TILE * (inner + 8) * 4;
        let columns = k.div_ceil(TILE);
        Ok(Launch {
            kernel: table::NOISY_LINEAR_INPUT.choose(self.run.dtype, self.run.allow_tf32),
            grid: blocks("dx", &[columns, rows.div_ceil(TILE)])?,
            block: [THREADS, 1, 1],
            shared_bytes: (BACKWARD_STAGES * 2 * TILE_BYTES + z_bytes) as u32,
            params: NoisyLinearInputParams {
                noise: self.noise,
                segments,
                dx: self.dx.address,
                rows: rows as u32,
                tokens: tokens as u32,
                channels: n as u32,
                columns: k as u32,
                count: count as u32,
                tile_columns: columns as u32,
                aligned: u32::from(aligned(dtype, k, &[self.dx.address])),
                z_aligned: u32::from(self.z_aligned),
                scale: self.scale,
                reserved: 0,
            },
        })
    }
}

/// Operands of a weight gradient `eᵀ·x`, checked before.
pub(super) struct Weight {
    pub(super) run: Run,
    /// `in_features` are the columns of `x`.
    pub(super) shape: LinearShape,
    pub(super) noise: NoiseSource,
    pub(super) z_aligned: bool,
    /// `[M, N]`.
    pub(super) g: Buffer,
    /// `[M, K]`, or fewer rows if the branches share them.
    pub(super) x: Buffer,
    /// `[N, K]`; `None` is not computed.
    pub(super) weight: Option<Buffer>,
    /// `[N]`, the sum of `e` over the rows; `None` is not computed.
    pub(super) bias: Option<Buffer>,
    /// Address of [`Weight::workspace_len`] elements.
    pub(super) workspace: u64,
}

/// A weight gradient: partial sums and their sums.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightPlan {
    pub(super) products: Launch<NoisyLinearWeightParams>,
    pub(super) sums: [Option<Launch<PartialSumsParams>>; 2],
}

impl Plan for WeightPlan {
    fn for_each(&self, run: &mut dyn FnMut(RawLaunch<'_>) -> Result<()>) -> Result<()> {
        self.products.for_each(run)?;
        self.sums.for_each(run)
    }
}

impl Weight {
    /// Partial sums, and the token rows of each.
    fn parts(shape: &LinearShape) -> (usize, usize) {
        let m = shape.out_rows();
        let tiles = shape.out_features.div_ceil(TILE) * shape.in_features.div_ceil(TILE);
        let parts = (BLOCKS / tiles).clamp(1, m.div_ceil(MIN_PART));
        let part = m.div_ceil(parts).next_multiple_of(PART_STEP);
        (m.div_ceil(part), part)
    }

    /// `f32` elements of workspace for the gradients of a weight `[out_features, in_features]` and of its bias.
    pub(super) fn workspace_len(shape: &LinearShape) -> usize {
        match Self::parts(shape) {
            (1, _) => 0,
            (parts, _) => {
                let (n, k) = (shape.out_features, shape.in_features);
                parts.saturating_mul(n).saturating_mul(k.saturating_add(1))
            }
        }
    }

    pub(super) fn plan(&self) -> Result<WeightPlan> {
        let dtype = self.run.dtype;
        let LinearShape { in_features: k, out_features: n, tokens, .. } = self.shape;
        let m = self.shape.out_rows();
        let (parts, part) = Self::parts(&self.shape);
        let partial = parts > 1;
        // Without a weight gradient there are no columns, and x is not read.
        let k = if self.weight.is_some() { k } else { 0 };
        let (columns, rows) = (k.div_ceil(TILE).max(1), n.div_ceil(TILE));
        let workspace = [self.workspace, self.workspace + (parts * n * k * 4) as u64];
        let targets = [self.weight, self.bias];
        let target = |i: usize| match targets[i] {
            Some(_) if partial => workspace[i],
            Some(out) => out.address,
            None => 0,
        };
        let out_type = if partial { DType::F32 } else { dtype };
        let inner = 64 / dtype.bytes();
        // The z of two tiles, and where its rows are; or the tile of outputs in f32 on its way out.
        let ring = BACKWARD_STAGES * 2 * TILE_BYTES;
        let shared = (ring + 2 * inner * TILE * 4 + 2 * inner * 4).max(TILE * TILE * 4);
        let sums = |i: usize| {
            targets[i].filter(|_| partial).map(|out| partial_sums(workspace[i], parts, out, dtype))
        };
        Ok(WeightPlan {
            products: Launch {
                kernel: table::NOISY_LINEAR_WEIGHT.choose(self.run.dtype, self.run.allow_tf32),
                grid: blocks("delta_weight", &[columns, rows, parts])?,
                block: [THREADS, 1, 1],
                shared_bytes: shared as u32,
                params: NoisyLinearWeightParams {
                    noise: self.noise,
                    g: self.g.address,
                    x: self.x.address,
                    weight: target(0),
                    bias: target(1),
                    rows: m as u32,
                    tokens: tokens as u32,
                    channels: n as u32,
                    columns: k as u32,
                    wrap: self.shape.in_rows() as u32,
                    tile_columns: columns as u32,
                    tile_rows: rows as u32,
                    part: part as u32,
                    partial: u32::from(partial),
                    left_aligned: u32::from(aligned(dtype, n, &[self.g.address])),
                    right_aligned: u32::from(aligned(dtype, k, &[self.x.address])),
                    aligned: u32::from(aligned(out_type, k, &[target(0)])),
                    z_aligned: u32::from(self.z_aligned),
                    reserved: 0,
                },
            },
            sums: [sums(0), sums(1)],
        })
    }
}

/// What a backward pass launches.
#[derive(Debug, Clone, PartialEq)]
pub struct NoisyLinearBackward {
    input: Option<Launch<NoisyLinearInputParams>>,
    weight: Option<WeightPlan>,
}

impl Plan for NoisyLinearBackward {
    fn for_each(&self, run: &mut dyn FnMut(RawLaunch<'_>) -> Result<()>) -> Result<()> {
        self.input.for_each(run)?;
        self.weight.for_each(run)
    }
}

/// Checks `x` (or its gradient) against the sizes of its layer.
pub(super) fn check_input(
    argument: &'static str,
    buffer: &Buffer,
    shape: &LinearShape,
    dtype: DType,
) -> Result<()> {
    let name = if shape.shared_input { "[B·T, K]" } else { "[M, K]" };
    buffer.check(argument, name, shape.in_rows() * shape.in_features, dtype.bytes())
}

/// Checks a base term against the sizes of its layer.
pub(super) fn check_base(base: Option<Base<Buffer>>, shape: &LinearShape, dtype: DType) -> Result<()> {
    let Some(base) = base else { return Ok(()) };
    let (k, n) = (shape.in_features, shape.out_features);
    base.weight.check("base.weight", "[N, K]", n * k, dtype.bytes())?;
    base.bias.map_or(Ok(()), |bias| bias.check("base.bias", "[N]", n, dtype.bytes()))
}

/// Whether 16-byte loads of a row of a given `z` work.
pub(super) fn is_z_aligned(noise: &Source, shape: &LinearShape) -> bool {
    shape.out_features.is_multiple_of(4) && noise.is_vector_aligned()
}

impl<B, N> NoisyLinear<B, N> {
    /// The `f32` elements of workspace that a backward pass needs, whichever gradients are asked for.
    pub fn workspace_len(&self) -> usize {
        match check_linear_shape(&self.shape) {
            Ok(()) => Weight::workspace_len(&self.shape),
            Err(_) => 0,
        }
    }
}

impl NoisyLinear<Buffer, Source> {
    fn check(&self, dtype: DType) -> Result<NoiseSource> {
        let shape = &self.shape;
        check_linear_shape(shape)?;
        let noise = self.noise.plan(shape)?;
        check_base(self.base, shape, dtype)?;
        let (k, n) = (shape.in_features, shape.out_features);
        if let Some(weight) = self.delta_weight {
            weight.check("delta_weight", "[N, K]", n * k, dtype.bytes())?;
        }
        if let Some(bias) = self.delta_bias {
            bias.check("delta_bias", "[N]", n, dtype.bytes())?;
        }
        if self.base.is_none() && self.delta_weight.is_none() {
            return Err(Error::Argument {
                argument: "delta_weight",
                problem: "is required when there is no base term",
            });
        }
        Ok(noise)
    }

    /// Everything that is read besides `x` and `dy`.
    fn inputs(&self) -> Vec<(&'static str, Buffer)> {
        let base = self.base.map(|base| ("base.weight", base.weight));
        let base_bias = self.base.and_then(|base| base.bias).map(|bias| ("base.bias", bias));
        let delta = self.delta_weight.map(|weight| ("delta_weight", weight));
        let delta_bias = self.delta_bias.map(|bias| ("delta_bias", bias));
        [base, base_bias, delta, delta_bias].into_iter().flatten().collect()
    }

    /// Whether folding is allowed, possible, and cheaper than two products.
    fn folds(&self) -> bool {
        let tokens = self.shape.tokens;
        let pays = match self.noise.shape() {
            None => true,
            // The last tile of each sample is padded.
            Some(NoiseShape::PerSample) => 2 * tokens.next_multiple_of(TILE) <= 3 * tokens,
            Some(NoiseShape::PerToken) => false,
        };
        self.fold && pays && self.base.is_some() && self.delta_weight.is_some() && self.shape.fan_out() == 1
    }

    /// The launch that computes `y [M, N]` from `x` (`[M, K]`, or `[B·T, K]` if the input is shared).
    ///
    /// # Errors
    /// If a size is zero or too large, the samples reach 2⁵⁶, or a buffer has the wrong length, is not aligned to its
    /// element or overlaps the output.
    pub fn forward(&self, dtype: DType, x: Buffer, y: Buffer) -> Result<Launch<NoisyLinearParams>> {
        let noise = self.check(dtype)?;
        let (shape, bytes) = (self.shape, dtype.bytes());
        check_input("x", &x, &shape, dtype)?;
        y.check("y", "[M, N]", shape.out_rows() * shape.out_features, bytes)?;
        let inputs = [self.inputs(), vec![("x", x)]].concat();
        check_disjoint(&inputs, &[("y", y)], bytes, Some(&self.noise))?;
        let k = shape.in_features;
        let base = self.base.map(|base| (x, base.weight, k, false));
        let delta = self.delta_weight.map(|weight| (x, weight, k, true));
        let segments: Vec<_> = [base, delta].into_iter().flatten().collect();
        Forward {
            run: Run { dtype, allow_tf32: self.allow_tf32 },
            shape,
            noise,
            z_aligned: is_z_aligned(&self.noise, &shape),
            segments: &segments,
            base_bias: self.base.and_then(|base| base.bias),
            delta_bias: self.delta_bias,
            y,
            fold: self.folds(),
            scale: 1.0,
        }
        .plan()
    }

    /// The launches that compute gradients from `x` and `dy = ∂L/∂y [M, N]`, with the noise of the forward pass made again.
    ///
    /// `dx = g·W0 + e·ΔW`, `dΔW = eᵀ·x`, `dΔb = Σ_rows e`, where `g = dy` and `e = z⊙g`; with a shared input, sums over
    /// the branches.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); also if the gradient of ΔW is asked for and the layer has none, or the workspace is
    /// too small.
    pub fn backward(
        &self,
        dtype: DType,
        x: Buffer,
        dy: Buffer,
        grads: NoisyLinearGrads<Buffer>,
        workspace: Buffer,
    ) -> Result<NoisyLinearBackward> {
        let noise = self.check(dtype)?;
        let (shape, bytes) = (self.shape, dtype.bytes());
        let (k, n) = (shape.in_features, shape.out_features);
        check_input("x", &x, &shape, dtype)?;
        dy.check("dy", "[M, N]", shape.out_rows() * n, bytes)?;
        let mut outputs = Vec::new();
        if let Some(dx) = grads.input {
            check_input("grads.input", &dx, &shape, dtype)?;
            outputs.push(("grads.input", dx));
        }
        if let Some(weight) = grads.delta_weight {
            weight.check("grads.delta_weight", "[N, K]", n * k, bytes)?;
            if self.delta_weight.is_none() {
                return Err(Error::Argument {
                    argument: "grads.delta_weight",
                    problem: "is asked for, but the layer has no `delta_weight`",
                });
            }
            outputs.push(("grads.delta_weight", weight));
        }
        if let Some(bias) = grads.delta_bias {
            bias.check("grads.delta_bias", "[N]", n, bytes)?;
            outputs.push(("grads.delta_bias", bias));
        }
        let workspace = workspace.check_workspace(self.workspace_len())?;
        let inputs = [self.inputs(), vec![("x", x), ("dy", dy)]].concat();
        let scratch = workspace.in_elements_of(bytes);
        check_disjoint(
            &inputs,
            &[&outputs[..], &[("workspace", scratch)]].concat(),
            bytes,
            Some(&self.noise),
        )?;

        let run = Run { dtype, allow_tf32: self.allow_tf32 };
        let z_aligned = is_z_aligned(&self.noise, &shape);
        let base = self.base.map(|base| (dy, base.weight, n, false));
        let delta = self.delta_weight.map(|weight| (dy, weight, n, true));
        let segments: Vec<_> = [base, delta].into_iter().flatten().collect();
        let input = grads
            .input
            .map(|dx| Input { run, shape, noise, z_aligned, segments: &segments, dx, scale: 1.0 }.plan());
        let (weight, bias) = (grads.delta_weight, grads.delta_bias);
        let weight = (weight.is_some() || bias.is_some()).then(|| {
            Weight { run, shape, noise, z_aligned, g: dy, x, weight, bias, workspace: workspace.address }
                .plan()
        });
        Ok(NoisyLinearBackward { input: input.transpose()?, weight: weight.transpose()? })
    }
}

impl<'a, T> NoisyLinear<&'a dyn DevicePtr<T>, Noise<'a>> {
    fn borrow(&self, borrows: &mut Borrows<'a>) -> Result<NoisyLinear<Buffer, Source>> {
        let NoisyLinear { shape, fold, allow_tf32, .. } = *self;
        Ok(NoisyLinear {
            shape,
            noise: borrows.source(&self.noise)?,
            base: borrows.base(self.base)?,
            delta_weight: borrows.optional("delta_weight", self.delta_weight)?,
            delta_bias: borrows.optional("delta_bias", self.delta_bias)?,
            fold,
            allow_tf32,
        })
    }
}

impl Device {
    /// Computes `y [M, N]` from `x` (`[M, K]`, or `[B·T, K]` if the input is shared).
    ///
    /// # Errors
    /// As [`NoisyLinear::forward`]; also if an argument belongs to another device, or the launch fails.
    pub fn noisy_linear<'a, T: Element>(
        &'a self,
        layer: &NoisyLinear<&'a dyn DevicePtr<T>, Noise<'a>>,
        x: &'a dyn DevicePtr<T>,
        y: &'a mut dyn DevicePtrMut<T>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = self.borrows(stream);
        let layer = layer.borrow(&mut borrows)?;
        let (x, y) = (borrows.input("x", x)?, borrows.output("y", y)?);
        let plan = layer.forward(T::DTYPE, x, y)?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernels touch.
        unsafe { self.launch(&plan, stream) }
    }

    /// Computes gradients from `x` and `dy = ∂L/∂y [M, N]`, with the noise of the forward pass made again. `workspace` has
    /// at least [`NoisyLinear::workspace_len`] elements; what it holds does not matter.
    ///
    /// # Errors
    /// As [`NoisyLinear::backward`]; also if an argument belongs to another device, or a launch fails.
    pub fn noisy_linear_backward<'a, T: Element>(
        &'a self,
        layer: &NoisyLinear<&'a dyn DevicePtr<T>, Noise<'a>>,
        x: &'a dyn DevicePtr<T>,
        dy: &'a dyn DevicePtr<T>,
        grads: NoisyLinearGrads<&'a mut dyn DevicePtrMut<T>>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = self.borrows(stream);
        let layer = layer.borrow(&mut borrows)?;
        let (x, dy) = (borrows.input("x", x)?, borrows.input("dy", dy)?);
        let grads = NoisyLinearGrads {
            input: borrows.optional_output("grads.input", grads.input)?,
            delta_weight: borrows.optional_output("grads.delta_weight", grads.delta_weight)?,
            delta_bias: borrows.optional_output("grads.delta_bias", grads.delta_bias)?,
        };
        let workspace = borrows.output("workspace", workspace)?;
        let plan = layer.backward(T::DTYPE, x, dy, grads, workspace)?;
        // SAFETY: as in `noisy_linear`.
        unsafe { self.launch(&plan, stream) }
    }
}
