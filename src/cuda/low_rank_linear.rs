//! Low-rank noisy linear layer; plans `kernels/sm80/low_rank_linear.cu`, and `kernels/sm80/noisy_linear.cu` for what is a plain
//! product.

use super::device::{Borrows, Device, Noise};
use super::kernel::{GemmKernels, table};
use super::launch::{
    Buffer, DType, Element, Launch, MAX_ROWS, Plan, RawLaunch, address, check_disjoint, check_linear_shape,
    params,
};
use super::noise_source::{NoiseSource, Source};
use super::noisy_linear::{
    Base, Forward, Input, NoisyLinearInputParams, NoisyLinearParams, Run, THREADS, TILE, Weight, WeightPlan,
    aligned, blocks, check_base, check_input, is_z_aligned,
};
use super::partial_sums::{PartialSumsParams, partial_sums};
use crate::cpu::check_scale;
use crate::error::{Error, Result};
use crate::shape::{LinearShape, nonzero, product};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

/// Forward pass, up to rank 16 and 32.
const FORWARD: [GemmKernels; 2] = [table::LOW_RANK_LINEAR_16, table::LOW_RANK_LINEAR_32];
/// The adapter's part of the backward pass, up to rank 16 and 32.
const FACTORS: [GemmKernels; 2] = [table::LOW_RANK_FACTORS_16, table::LOW_RANK_FACTORS_32];

/// Columns that kernels have for the rank.
const RANKS: [usize; 2] = [16, 32];
const STAGES: usize = 3;
/// Token rows of a tile of `factors`, and bytes of its rows.
const ROWS: usize = 32;
const ROW_BYTES: usize = 1024;
/// Blocks of `factors` that keep a large device busy, and the token rows that a block has at least.
const BLOCKS: usize = 264;
const MIN_PART: usize = 64;

/// `y = x·W0ᵀ + b0 + z ⊙ (scale·(x·Uᵀ)·Dᵀ + δb)` and its gradients: the paper's LoRA add with noise.
///
/// `B` are the tensors, all of one type: [`Buffer`] for planning, or `cudarc`'s (see [`Device::low_rank_linear`]); `N` is
/// where `z` comes from: [`Source`] or [`Noise`].
///
/// Ranks up to 32 have kernels of their own: `s = scale·x·Uᵀ` costs no pass over `x`, and the backward pass reads `dy` once
/// for all gradients of the adapter. Larger ranks, and layers without a base, are products one after the other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowRankLinear<B, N> {
    /// Sizes.
    pub shape: LinearShape,
    /// Source of `z`.
    pub noise: N,
    /// The frozen layer; `None` is a zero base term.
    pub base: Option<Base<B>>,
    /// Rank `r`.
    pub rank: usize,
    /// `D [N, r]`.
    pub down: B,
    /// `U [r, K]`.
    pub up: B,
    /// `δb [N]`; `None` is zero.
    pub delta_bias: Option<B>,
    /// Factor on `D·U` (the α/r of common LoRA code); 1 in the paper.
    pub scale: f32,
    /// Whether `f32` is multiplied as TF32 (10 fraction bits) instead of to `f32` accuracy.
    pub allow_tf32: bool,
}

/// Where gradients of a [`LowRankLinear`] go; each is overwritten, `None` is not computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowRankGrads<B> {
    /// `dx`, of the shape of `x`.
    pub input: Option<B>,
    /// `dD [N, r]`.
    pub down: Option<B>,
    /// `dU [r, K]`.
    pub up: Option<B>,
    /// `dδb [N]`.
    pub delta_bias: Option<B>,
}

impl<B> Default for LowRankGrads<B> {
    fn default() -> Self {
        Self { input: None, down: None, up: None, delta_bias: None }
    }
}

params! {
    /// `pace::LowRankLinearParams` of the kernels.
    LowRankLinearParams, 160 bytes {
        0 noise: NoiseSource,
        48 x: u64,
        56 weight: u64,
        64 up: u64,
        72 down: u64,
        80 base_bias: u64,
        88 delta_bias: u64,
        96 s: u64,
        104 y: u64,
        112 rows: u32,
        116 tokens: u32,
        120 channels: u32,
        124 inner: u32,
        128 rank: u32,
        132 wrap: u32,
        136 tile_columns: u32,
        140 aligned: u32,
        144 z_aligned: u32,
        148 x_aligned: u32,
        152 down_aligned: u32,
        156 scale: f32,
    }
}

params! {
    /// `pace::LowRankFactorsParams` of the kernels.
    LowRankFactorsParams, 144 bytes {
        0 noise: NoiseSource,
        48 g: u64,
        56 s: u64,
        64 down: u64,
        72 ds: u64,
        80 down_sums: u64,
        88 delta_bias: u64,
        96 rows: u32,
        100 tokens: u32,
        104 channels: u32,
        108 rank: u32,
        112 wrap: u32,
        116 chunks: u32,
        120 part: u32,
        124 aligned: u32,
        128 z_aligned: u32,
        132 rank_aligned: u32,
        136 scale: f32,
        140 reserved: u32,
    }
}

/// What a forward pass launches.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRankForward(ForwardSteps);

#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant)] // plans live on the stack, briefly
enum ForwardSteps {
    Fused(Launch<LowRankLinearParams>),
    Products([Launch<NoisyLinearParams>; 2]),
}

impl Plan for LowRankForward {
    fn for_each(&self, run: &mut dyn FnMut(RawLaunch<'_>) -> Result<()>) -> Result<()> {
        match &self.0 {
            ForwardSteps::Fused(launch) => launch.for_each(run),
            ForwardSteps::Products(launches) => launches.for_each(run),
        }
    }
}

/// What a backward pass launches.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRankBackward {
    factors: Option<Factors>,
    input: Option<Launch<NoisyLinearInputParams>>,
    up: Option<WeightPlan>,
}

/// `ds`, `dD` and `dδb`.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant)] // plans live on the stack, briefly
enum Factors {
    Fused(Launch<LowRankFactorsParams>, [Option<Launch<PartialSumsParams>>; 3]),
    Products(Option<Launch<NoisyLinearInputParams>>, Option<WeightPlan>),
}

impl Plan for LowRankBackward {
    fn for_each(&self, run: &mut dyn FnMut(RawLaunch<'_>) -> Result<()>) -> Result<()> {
        match &self.factors {
            Some(Factors::Fused(factors, sums)) => {
                factors.for_each(run)?;
                sums.for_each(run)?;
            }
            Some(Factors::Products(ds, down)) => {
                ds.for_each(run)?;
                down.for_each(run)?;
            }
            None => {}
        }
        self.input.for_each(run)?;
        self.up.for_each(run)
    }
}

/// Places in the workspace, as offsets in `f32` elements.
struct Workspace {
    /// `ds [M, r]` in the tensors' type.
    ds: usize,
    /// Partial sums of `ds`, `dD` and `dδb`.
    sums: [usize; 3],
    /// Partial sums of a product's weight gradient: of `dD`, where it is one, and later of `dU`.
    products: usize,
    len: usize,
}

impl<B, N> LowRankLinear<B, N> {
    /// Which of [`RANKS`] suits.
    fn columns(&self) -> Option<usize> {
        RANKS.iter().position(|&columns| self.rank <= columns)
    }

    /// Chunks of channels, parts of the token rows and the rows of each, in `factors`.
    fn parts(&self, dtype: DType) -> (usize, usize, usize) {
        let m = self.shape.out_rows();
        let chunks = (self.shape.out_features * dtype.bytes()).div_ceil(ROW_BYTES);
        let parts = (BLOCKS / chunks).clamp(1, m.div_ceil(MIN_PART));
        let part = m.div_ceil(parts).next_multiple_of(ROWS);
        (chunks, m.div_ceil(part), part)
    }

    /// The shape of `x·Uᵀ`, whose weight gradient is `dU`.
    fn up_shape(&self) -> LinearShape {
        LinearShape { out_features: self.rank, ..self.shape }
    }

    /// The shape of `s·Dᵀ`, whose weight gradient is `dD`.
    fn down_shape(&self) -> LinearShape {
        LinearShape { in_features: self.rank, ..self.shape }
    }

    fn workspace(&self, dtype: DType) -> Workspace {
        let (m, n, r) = (self.shape.out_rows(), self.shape.out_features, self.rank);
        let mut len = 0usize;
        let mut take = |elements: usize| {
            let start = len;
            // Every place is aligned as the workspace is.
            len = len.saturating_add(elements.checked_next_multiple_of(4).unwrap_or(usize::MAX));
            start
        };
        let times = |a: usize, b: usize, c: usize| a.saturating_mul(b).saturating_mul(c);
        let ds = take(times(m, r, dtype.bytes()).div_ceil(4));
        let (sums, products) = match self.columns() {
            Some(_) => {
                let (chunks, parts, _) = self.parts(dtype);
                ([take(times(chunks, m, r)), take(times(parts, n, r)), take(times(parts, n, 1))], 0)
            }
            None => ([0; 3], Weight::workspace_len(&self.down_shape())),
        };
        let products = take(products.max(Weight::workspace_len(&self.up_shape())));
        Workspace { ds, sums, products, len }
    }

    /// The `f32` elements of workspace that a backward pass needs, whichever gradients are asked for; 0 for sizes that are
    /// refused.
    pub fn workspace_len(&self, dtype: DType) -> usize {
        match check_linear_shape(&self.shape) {
            Ok(()) if (1..=MAX_ROWS).contains(&self.rank) => self.workspace(dtype).len,
            _ => 0,
        }
    }
}

impl LowRankLinear<Buffer, Source> {
    fn check(&self, dtype: DType, s: &Buffer) -> Result<NoiseSource> {
        let (shape, r, bytes) = (&self.shape, self.rank, dtype.bytes());
        check_linear_shape(shape)?;
        let noise = self.noise.plan(shape)?;
        check_base(self.base, shape, dtype)?;
        nonzero("rank", r)?;
        if r > MAX_ROWS {
            return Err(Error::Size { argument: "rank", expected: "at most 2^31", got: r });
        }
        let (k, n) = (shape.in_features, shape.out_features);
        self.down.check("down", "[N, r]", product("down", "[N, r]", &[n, r])?, bytes)?;
        self.up.check("up", "[r, K]", product("up", "[r, K]", &[r, k])?, bytes)?;
        let name = if shape.shared_input { "[B·T, r]" } else { "[M, r]" };
        s.check("s", name, product("s", name, &[shape.in_rows(), r])?, bytes)?;
        if let Some(bias) = self.delta_bias {
            bias.check("delta_bias", "[N]", n, bytes)?;
        }
        check_scale(self.scale)?;
        // As many as ds has.
        product("s", "[M, r]", &[shape.out_rows(), r, 4])?;
        Ok(noise)
    }

    /// Everything that is read besides `x`, `s` and `dy`.
    fn inputs(&self) -> Vec<(&'static str, Buffer)> {
        let base = self.base.map(|base| ("base.weight", base.weight));
        let base_bias = self.base.and_then(|base| base.bias).map(|bias| ("base.bias", bias));
        let delta_bias = self.delta_bias.map(|bias| ("delta_bias", bias));
        let factors = [Some(("down", self.down)), Some(("up", self.up))];
        factors.into_iter().chain([base, base_bias, delta_bias]).flatten().collect()
    }

    /// The launches that compute `y [M, N]`, and `s = scale·x·Uᵀ` for the backward pass, from `x`. `x` and `s` are `[M, K]` and
    /// `[M, r]`, or `[B·T, K]` and `[B·T, r]` if the input is shared.
    ///
    /// # Errors
    /// If a size is zero or too large, the samples reach 2⁵⁶, `scale` is not finite, or a buffer has the wrong length, is not
    /// aligned to its element or overlaps an output.
    pub fn forward(&self, dtype: DType, x: Buffer, s: Buffer, y: Buffer) -> Result<LowRankForward> {
        let noise = self.check(dtype, &s)?;
        let (shape, r, bytes) = (self.shape, self.rank, dtype.bytes());
        let (m, k, n) = (shape.out_rows(), shape.in_features, shape.out_features);
        check_input("x", &x, &shape, dtype)?;
        y.check("y", "[M, N]", m * n, bytes)?;
        let inputs = [self.inputs(), vec![("x", x)]].concat();
        check_disjoint(&inputs, &[("s", s), ("y", y)], bytes, Some(&self.noise))?;
        let run = Run { dtype, allow_tf32: self.allow_tf32 };
        let z_aligned = is_z_aligned(&self.noise, &shape);

        if let (Some(base), Some(columns)) = (self.base, self.columns()) {
            let rank = RANKS[columns];
            let slices = rank.div_ceil(64 / bytes);
            let ring = (STAGES * (2 * TILE + rank) * 64).max(TILE * TILE * 4);
            let tile_columns = n.div_ceil(TILE);
            return Ok(LowRankForward(ForwardSteps::Fused(Launch {
                kernel: FORWARD[columns].choose(run.dtype, run.allow_tf32),
                grid: blocks("y", &[tile_columns, m.div_ceil(TILE)])?,
                block: [THREADS, 1, 1],
                shared_bytes: (ring + 2 * slices * TILE * 64) as u32,
                params: LowRankLinearParams {
                    noise,
                    x: x.address,
                    weight: base.weight.address,
                    up: self.up.address,
                    down: self.down.address,
                    base_bias: address(base.bias),
                    delta_bias: address(self.delta_bias),
                    s: s.address,
                    y: y.address,
                    rows: m as u32,
                    tokens: shape.tokens as u32,
                    channels: n as u32,
                    inner: k as u32,
                    rank: r as u32,
                    wrap: shape.in_rows() as u32,
                    tile_columns: tile_columns as u32,
                    aligned: u32::from(aligned(dtype, n, &[y.address])),
                    z_aligned: u32::from(z_aligned),
                    x_aligned: u32::from(aligned(
                        dtype,
                        k,
                        &[x.address, base.weight.address, self.up.address],
                    )),
                    down_aligned: u32::from(aligned(dtype, r, &[self.down.address])),
                    scale: self.scale,
                },
            })));
        }

        let low = Forward {
            run,
            shape: LinearShape {
                branches: if shape.shared_input { 1 } else { shape.branches },
                shared_input: false,
                ..self.up_shape()
            },
            noise: NoiseSource::OFF,
            z_aligned: false,
            segments: &[(x, self.up, k, true)],
            base_bias: None,
            delta_bias: None,
            y: s,
            fold: false,
            scale: self.scale,
        };
        let base = self.base.map(|base| (x, base.weight, k, false));
        let segments: Vec<_> = base.into_iter().chain([(s, self.down, r, true)]).collect();
        let high = Forward {
            run,
            shape,
            noise,
            z_aligned,
            segments: &segments,
            base_bias: self.base.and_then(|base| base.bias),
            delta_bias: self.delta_bias,
            y,
            fold: false,
            scale: 1.0,
        };
        Ok(LowRankForward(ForwardSteps::Products([low.plan()?, high.plan()?])))
    }

    /// The launches that compute gradients from `x`, the `s` of the forward pass and `dy = ∂L/∂y [M, N]`, with the noise of
    /// the forward pass made again.
    ///
    /// With `g = dy`, `e = z⊙g` and `ds = scale·e·D`: `dx = g·W0 + ds·U`, `dD = eᵀ·s`, `dU = dsᵀ·x`, `dδb = Σ_rows e`; with a
    /// shared input, sums over the branches.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); also if the workspace is too small.
    pub fn backward(
        &self,
        dtype: DType,
        x: Buffer,
        s: Buffer,
        dy: Buffer,
        grads: LowRankGrads<Buffer>,
        workspace: Buffer,
    ) -> Result<LowRankBackward> {
        let noise = self.check(dtype, &s)?;
        let (shape, r, bytes) = (self.shape, self.rank, dtype.bytes());
        let (m, k, n) = (shape.out_rows(), shape.in_features, shape.out_features);
        check_input("x", &x, &shape, dtype)?;
        dy.check("dy", "[M, N]", m * n, bytes)?;
        if let Some(dx) = grads.input {
            check_input("grads.input", &dx, &shape, dtype)?;
        }
        let mut outputs: Vec<_> = grads.input.map(|dx| ("grads.input", dx)).into_iter().collect();
        for (argument, name, grad, len) in [
            ("grads.down", "[N, r]", grads.down, n * r),
            ("grads.up", "[r, K]", grads.up, r * k),
            ("grads.delta_bias", "[N]", grads.delta_bias, n),
        ] {
            if let Some(grad) = grad {
                grad.check(argument, name, len, bytes)?;
                outputs.push((argument, grad));
            }
        }
        let places = self.workspace(dtype);
        let workspace = workspace.check_workspace(places.len)?;
        let inputs = [self.inputs(), vec![("x", x), ("s", s), ("dy", dy)]].concat();
        outputs.push(("workspace", workspace.in_elements_of(bytes)));
        check_disjoint(&inputs, &outputs, bytes, Some(&self.noise))?;

        let run = Run { dtype, allow_tf32: self.allow_tf32 };
        let z_aligned = is_z_aligned(&self.noise, &shape);
        let at = |offset: usize| workspace.address + 4 * offset as u64;
        let ds = Buffer { address: at(places.ds), len: m * r };
        let needs_ds = grads.input.is_some() || grads.up.is_some();
        let factors = if !needs_ds && grads.down.is_none() && grads.delta_bias.is_none() {
            None
        } else if let Some(columns) = self.columns() {
            let (chunks, parts, part) = self.parts(dtype);
            let targets = [needs_ds.then_some(ds), grads.down, grads.delta_bias];
            let sums = |i: usize| {
                let parts = if i == 0 { chunks } else { parts };
                targets[i].map(|out| partial_sums(at(places.sums[i]), parts, out, dtype))
            };
            let target = |i: usize| targets[i].map_or(0, |_| at(places.sums[i]));
            let stride = RANKS[columns] * bytes + 16;
            let shared =
                ROWS * ROW_BYTES + (ROW_BYTES / bytes + ROWS) * stride + 4 * ROWS * RANKS[columns] * 4;
            let launch = Launch {
                kernel: FACTORS[columns].choose(run.dtype, run.allow_tf32),
                grid: blocks("dy", &[chunks, parts])?,
                block: [THREADS, 1, 1],
                shared_bytes: shared as u32,
                params: LowRankFactorsParams {
                    noise,
                    g: dy.address,
                    s: s.address,
                    down: self.down.address,
                    ds: target(0),
                    down_sums: target(1),
                    delta_bias: target(2),
                    rows: m as u32,
                    tokens: shape.tokens as u32,
                    channels: n as u32,
                    rank: r as u32,
                    wrap: shape.in_rows() as u32,
                    chunks: chunks as u32,
                    part: part as u32,
                    aligned: u32::from(aligned(dtype, n, &[dy.address])),
                    z_aligned: u32::from(z_aligned),
                    rank_aligned: u32::from(aligned(dtype, r, &[s.address, self.down.address])),
                    scale: self.scale,
                    reserved: 0,
                },
            };
            Some(Factors::Fused(launch, [sums(0), sums(1), sums(2)]))
        } else {
            let gradient = Input {
                run,
                shape: LinearShape { shared_input: false, ..self.down_shape() },
                noise,
                z_aligned,
                segments: &[(dy, self.down, n, true)],
                dx: ds,
                scale: self.scale,
            };
            let weight = Weight {
                run,
                shape: self.down_shape(),
                noise,
                z_aligned,
                g: dy,
                x: s,
                weight: grads.down,
                bias: grads.delta_bias,
                workspace: at(places.products),
            };
            let wanted = grads.down.is_some() || grads.delta_bias.is_some();
            Some(Factors::Products(
                needs_ds.then(|| gradient.plan()).transpose()?,
                wanted.then(|| weight.plan()).transpose()?,
            ))
        };

        let base = self.base.map(|base| (dy, base.weight, n, false));
        let segments: Vec<_> = base.into_iter().chain([(ds, self.up, r, false)]).collect();
        let input = grads.input.map(|dx| {
            Input {
                run,
                shape,
                noise: NoiseSource::OFF,
                z_aligned: false,
                segments: &segments,
                dx,
                scale: 1.0,
            }
            .plan()
        });
        let up = grads.up.map(|up| {
            Weight {
                run,
                shape: self.up_shape(),
                noise: NoiseSource::OFF,
                z_aligned: false,
                g: ds,
                x,
                weight: Some(up),
                bias: None,
                workspace: at(places.products),
            }
            .plan()
        });
        Ok(LowRankBackward { factors, input: input.transpose()?, up: up.transpose()? })
    }
}

impl<'a, T> LowRankLinear<&'a dyn DevicePtr<T>, Noise<'a>> {
    fn borrow(&self, borrows: &mut Borrows<'a>) -> Result<LowRankLinear<Buffer, Source>> {
        let LowRankLinear { shape, rank, scale, allow_tf32, .. } = *self;
        Ok(LowRankLinear {
            shape,
            noise: borrows.source(&self.noise)?,
            base: borrows.base(self.base)?,
            rank,
            down: borrows.input("down", self.down)?,
            up: borrows.input("up", self.up)?,
            delta_bias: borrows.optional("delta_bias", self.delta_bias)?,
            scale,
            allow_tf32,
        })
    }
}

impl Device {
    /// Computes `y [M, N]`, and `s = scale·x·Uᵀ` for the backward pass, from `x`. `x` and `s` are `[M, K]` and `[M, r]`, or
    /// `[B·T, K]` and `[B·T, r]` if the input is shared.
    ///
    /// # Errors
    /// As [`LowRankLinear::forward`]; also if an argument belongs to another device, or a launch fails.
    pub fn low_rank_linear<'a, T: Element>(
        &'a self,
        layer: &LowRankLinear<&'a dyn DevicePtr<T>, Noise<'a>>,
        x: &'a dyn DevicePtr<T>,
        s: &'a mut dyn DevicePtrMut<T>,
        y: &'a mut dyn DevicePtrMut<T>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = self.borrows(stream);
        let layer = layer.borrow(&mut borrows)?;
        let (x, s, y) = (borrows.input("x", x)?, borrows.output("s", s)?, borrows.output("y", y)?);
        let plan = layer.forward(T::DTYPE, x, s, y)?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernels touch.
        unsafe { self.launch(&plan, stream) }
    }

    /// Computes gradients from `x`, the `s` of the forward pass and `dy = ∂L/∂y [M, N]`, with the noise of the forward pass
    /// made again. `workspace` has at least [`LowRankLinear::workspace_len`] elements; what it holds does not matter.
    ///
    /// # Errors
    /// As [`LowRankLinear::backward`]; also if an argument belongs to another device, or a launch fails.
    #[allow(clippy::too_many_arguments)] // what the formulas have, and where to compute
    pub fn low_rank_linear_backward<'a, T: Element>(
        &'a self,
        layer: &LowRankLinear<&'a dyn DevicePtr<T>, Noise<'a>>,
        x: &'a dyn DevicePtr<T>,
        s: &'a dyn DevicePtr<T>,
        dy: &'a dyn DevicePtr<T>,
        grads: LowRankGrads<&'a mut dyn DevicePtrMut<T>>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = self.borrows(stream);
        let layer = layer.borrow(&mut borrows)?;
        let (x, s, dy) = (borrows.input("x", x)?, borrows.input("s", s)?, borrows.input("dy", dy)?);
        let grads = LowRankGrads {
            input: borrows.optional_output("grads.input", grads.input)?,
            down: borrows.optional_output("grads.down", grads.down)?,
            up: borrows.optional_output("grads.up", grads.up)?,
            delta_bias: borrows.optional_output("grads.delta_bias", grads.delta_bias)?,
        };
        let workspace = borrows.output("workspace", workspace)?;
        let plan = layer.backward(T::DTYPE, x, s, dy, grads, workspace)?;
        // SAFETY: as in `low_rank_linear`.
        unsafe { self.launch(&plan, stream) }
    }
}
