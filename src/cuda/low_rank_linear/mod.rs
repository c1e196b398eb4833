//! Low-rank noisy linear layer: LoRA add under noise.

mod cublaslt;
mod params;
mod sm80;
mod sm90;

use super::borrows::{Borrows, Noise};
use super::buffer::{Buffer, DType, Element, MAX_ROWS, Named, check_disjoint, check_linear_shape};
use super::device::Device;
use super::gpu::{Family, Gpu};
use super::layer::{Arithmetic, EVERY_PASS, Pass, check_base, check_input, named_base};
use super::noise_source::Source;
use super::plan::Plan;
use super::select::{Problem, select};
use crate::cpu::{Base, LowRankGrads, check_scale};
use crate::error::{Error, Result};
use crate::noise;
use crate::shape::{LinearShape, nonzero, product};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

/// `y = x·W0ᵀ + b0 + z ⊙ (scale·(x·Aᵀ)·Bᵀ + δb)` and its gradients: the paper's LoRA add with noise.
///
/// `B` are the tensors, all of one type: [`Buffer`] for planning, or `cudarc`'s (see [`Device::low_rank_linear`]); `N` is
/// where `z` comes from: [`Source`] or [`Noise`].
///
/// Ranks up to 32 have kernels of their own: `s = scale·x·Aᵀ` costs no pass over `x`, and the backward pass reads `dy` once
/// for all gradients of the adapter. Larger ranks, and layers without a base, are GEMMs one after the other.
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
    /// `B [N, r]`.
    pub lora_b: B,
    /// `A [r, K]`.
    pub lora_a: B,
    /// `δb [N]`; `None` is zero.
    pub delta_bias: Option<B>,
    /// Factor on `B·A` (the α/r of common LoRA code); 1 in the paper.
    pub scale: f32,
    /// Whether `f32` is multiplied as TF32 (10 fraction bits) instead of to `f32` accuracy.
    pub allow_tf32: bool,
}

/// The layer as plans have it.
type Layer = LowRankLinear<Buffer, Source>;

/// What a family makes of the layer; the arguments of the passes are checked.
struct Passes {
    /// `f32` elements of workspace for either pass, for a rank.
    workspace_len: fn(&Gpu, &LinearShape, usize, DType) -> usize,
    /// From `x` to `s` and `y`.
    forward: fn(&Layer, &Pass, Buffer, Buffer, Buffer) -> Result<Plan>,
    /// From `x`, `s` and `dy`.
    backward: fn(&Layer, &Pass, [Buffer; 3], LowRankGrads<Buffer>) -> Result<Plan>,
}

impl<B, Z, K> LowRankLinear<B, noise::Noise<Z, K>> {
    fn passes(&self, gpu: &Gpu, dtype: DType, aligned: bool, backward: bool) -> Passes {
        let (shape, noise, rank) = (self.shape, self.noise.shape(), Some(self.rank));
        let (has_base, has_delta, fold) = (self.base.is_some(), true, false);
        match select(
            gpu,
            &Problem { shape, dtype, noise, rank, has_base, has_delta, fold, aligned, backward },
        ) {
            Family::Sm80 => sm80::PASSES,
            Family::Sm90 => sm90::PASSES,
            Family::CublasLt => cublaslt::PASSES,
        }
    }

    /// The `f32` elements of workspace that either pass needs on a device, whichever gradients are asked for; 0 for sizes that are
    /// refused.
    pub fn workspace_len(&self, gpu: &Gpu, dtype: DType) -> usize {
        if check_linear_shape(&self.shape).is_err() || !(1..=MAX_ROWS).contains(&self.rank) {
            return 0;
        }
        let needed = |(aligned, backward)| {
            (self.passes(gpu, dtype, aligned, backward).workspace_len)(gpu, &self.shape, self.rank, dtype)
        };
        EVERY_PASS.map(needed).into_iter().fold(0, usize::max)
    }
}

/// Whether [`Family::Sm90`] is the fastest that was measured, in this pass, if it takes the layer.
pub(super) fn pays_sm90(problem: &Problem) -> bool {
    sm90::pays(problem)
}

/// Whether a layer may be computed by [`Family::Sm90`], in this pass.
pub(super) fn takes_sm90(problem: &Problem, rank: usize) -> bool {
    sm90::takes(problem, rank)
}

impl Layer {
    /// Whether these tensors and the layer's own matrices start at multiples of 16 bytes.
    fn is_aligned(&self, tensors: &[Buffer]) -> bool {
        let own = [self.lora_b, self.lora_a].into_iter().chain(self.base.map(|base| base.weight));
        own.chain(tensors.iter().copied()).all(|tensor| tensor.is_vector_aligned())
    }

    /// Checks all but the tensors of one pass.
    fn check(&self, gpu: &Gpu, dtype: DType, s: &Buffer, workspace: Buffer) -> Result<Pass> {
        let (shape, r, bytes) = (&self.shape, self.rank, dtype.bytes());
        check_linear_shape(shape)?;
        nonzero("rank", r)?;
        if r > MAX_ROWS {
            return Err(Error::Size { argument: "rank", expected: "at most 2^31", got: r });
        }
        // As many as ds has.
        product("s", "[M, r]", &[shape.out_rows(), r, 4])?;
        let (k, n) = (shape.in_features, shape.out_features);
        self.lora_b.check("lora_b", "[N, r]", product("lora_b", "[N, r]", &[n, r])?, bytes)?;
        self.lora_a.check("lora_a", "[r, K]", product("lora_a", "[r, K]", &[r, k])?, bytes)?;
        let name = if shape.shared_input { "[B·T, r]" } else { "[M, r]" };
        s.check("s", name, product("s", name, &[shape.in_rows(), r])?, bytes)?;
        if let Some(bias) = self.delta_bias {
            bias.check("delta_bias", "[N]", n, bytes)?;
        }
        check_scale(self.scale)?;
        check_base(self.base, shape, dtype)?;
        let workspace = workspace.check_workspace(self.workspace_len(gpu, dtype))?;
        let arithmetic = Arithmetic { dtype, allow_tf32: self.allow_tf32 };
        Pass::new(gpu, arithmetic, shape, &self.noise, workspace)
    }

    /// Checks that the outputs, the workspace among them, share no memory with each other or with what is read: `inputs` and the
    /// layer itself.
    fn check_disjoint(&self, inputs: &[Named], outputs: Vec<Named>, pass: &Pass) -> Result<()> {
        let bytes = pass.arithmetic.dtype.bytes();
        let delta_bias = self.delta_bias.map(|bias| ("delta_bias", bias));
        let own = [("lora_b", self.lora_b), ("lora_a", self.lora_a)].into_iter();
        let own = own.chain(named_base(self.base)).chain(delta_bias);
        let inputs: Vec<Named> = own.chain(inputs.iter().copied()).collect();
        let outputs = [outputs, vec![("workspace", pass.workspace.in_elements_of(bytes))]].concat();
        check_disjoint(&inputs, &outputs, bytes)?;
        self.noise.check_disjoint(&outputs, bytes)
    }

    /// The plan that computes `y [M, N]`, and `s = scale·x·Aᵀ` for the backward pass, from `x`. `x` and `s` are `[M, K]` and
    /// `[M, r]`, or `[B·T, K]` and `[B·T, r]` if the input is shared. `workspace` has at least
    /// [`workspace_len`](Self::workspace_len) elements of `f32`; contents are ignored.
    ///
    /// # Errors
    /// If a size is zero or too large, the samples reach 2⁵⁶, `scale` is not finite, or a buffer has the wrong length, is not
    /// aligned to its element or overlaps an output.
    pub fn forward(
        &self,
        gpu: &Gpu,
        dtype: DType,
        x: Buffer,
        s: Buffer,
        y: Buffer,
        workspace: Buffer,
    ) -> Result<Plan> {
        let pass = self.check(gpu, dtype, &s, workspace)?;
        check_input("x", &x, &self.shape, dtype)?;
        y.check("y", "[M, N]", self.shape.out_rows() * self.shape.out_features, dtype.bytes())?;
        self.check_disjoint(&[("x", x)], vec![("s", s), ("y", y)], &pass)?;
        let aligned = self.is_aligned(&[x, s, y]);
        (self.passes(gpu, dtype, aligned, false).forward)(self, &pass, x, s, y)
    }

    /// The plan that computes gradients from `x`, the `s` of the forward pass and `dy = ∂L/∂y [M, N]`, with the noise of
    /// the forward pass recomputed. `workspace` as in [`forward`](Self::forward).
    ///
    /// With `g = dy`, `e = z⊙g` and `ds = scale·e·B`: `dx = g·W0 + ds·A`, `dB = eᵀ·s`, `dA = dsᵀ·x`, `dδb = Σ_rows e`; with a
    /// shared input, sums over the branches.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    #[allow(clippy::too_many_arguments)] // what the formulas have, and where to compute
    pub fn backward(
        &self,
        gpu: &Gpu,
        dtype: DType,
        x: Buffer,
        s: Buffer,
        dy: Buffer,
        grads: LowRankGrads<Buffer>,
        workspace: Buffer,
    ) -> Result<Plan> {
        let pass = self.check(gpu, dtype, &s, workspace)?;
        let (shape, r, bytes) = (self.shape, self.rank, dtype.bytes());
        let (m, k, n) = (shape.out_rows(), shape.in_features, shape.out_features);
        check_input("x", &x, &shape, dtype)?;
        dy.check("dy", "[M, N]", m * n, bytes)?;
        if let Some(dx) = grads.input {
            check_input("grads.input", &dx, &shape, dtype)?;
        }
        let mut outputs: Vec<Named> = grads.input.map(|dx| ("grads.input", dx)).into_iter().collect();
        for (argument, name, grad, len) in [
            ("grads.lora_b", "[N, r]", grads.lora_b, n * r),
            ("grads.lora_a", "[r, K]", grads.lora_a, r * k),
            ("grads.delta_bias", "[N]", grads.delta_bias, n),
        ] {
            if let Some(grad) = grad {
                grad.check(argument, name, len, bytes)?;
                outputs.push((argument, grad));
            }
        }
        self.check_disjoint(&[("x", x), ("s", s), ("dy", dy)], outputs, &pass)?;
        let grads_of = [grads.input, grads.lora_b, grads.lora_a, grads.delta_bias];
        let tensors: Vec<Buffer> = [x, s, dy].into_iter().chain(grads_of.into_iter().flatten()).collect();
        let passes = self.passes(gpu, dtype, self.is_aligned(&tensors), true);
        (passes.backward)(self, &pass, [x, s, dy], grads)
    }
}

impl<'a, T> LowRankLinear<&'a dyn DevicePtr<T>, Noise<'a>> {
    fn borrow(&self, borrows: &mut Borrows<'a>) -> Result<LowRankLinear<Buffer, Source>> {
        let LowRankLinear { shape, rank, scale, allow_tf32, .. } = *self;
        Ok(LowRankLinear {
            shape,
            noise: borrows.noise(&self.noise)?,
            base: borrows.base(self.base)?,
            rank,
            lora_b: borrows.input("lora_b", self.lora_b)?,
            lora_a: borrows.input("lora_a", self.lora_a)?,
            delta_bias: borrows.optional("delta_bias", self.delta_bias)?,
            scale,
            allow_tf32,
        })
    }
}

impl Device {
    /// Computes `y [M, N]`, and `s = scale·x·Aᵀ` for the backward pass, from `x`. `x` and `s` are `[M, K]` and `[M, r]`, or
    /// `[B·T, K]` and `[B·T, r]` if the input is shared. `workspace` has at least [`LowRankLinear::workspace_len`] elements;
    /// contents are ignored.
    ///
    /// # Errors
    /// As [`LowRankLinear::forward`]; also if an argument belongs to another device, or a launch fails.
    pub fn low_rank_linear<'a, T: Element>(
        &'a self,
        layer: &LowRankLinear<&'a dyn DevicePtr<T>, Noise<'a>>,
        x: &'a dyn DevicePtr<T>,
        s: &'a mut dyn DevicePtrMut<T>,
        y: &'a mut dyn DevicePtrMut<T>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let layer = layer.borrow(&mut borrows)?;
        let (x, s, y) = (borrows.input("x", x)?, borrows.output("s", s)?, borrows.output("y", y)?);
        let workspace = borrows.output("workspace", workspace)?;
        let plan = layer.forward(self.gpu(), T::DTYPE, x, s, y, workspace)?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernels touch.
        unsafe { self.launch(&plan, stream) }
    }

    /// Computes gradients from `x`, the `s` of the forward pass and `dy = ∂L/∂y [M, N]`, with the noise of the forward pass
    /// recomputed. `workspace` as in [`low_rank_linear`](Self::low_rank_linear).
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
        let mut borrows = Borrows::new(self, stream);
        let layer = layer.borrow(&mut borrows)?;
        let (x, s, dy) = (borrows.input("x", x)?, borrows.input("s", s)?, borrows.input("dy", dy)?);
        let grads = LowRankGrads {
            input: borrows.optional_output("grads.input", grads.input)?,
            lora_b: borrows.optional_output("grads.lora_b", grads.lora_b)?,
            lora_a: borrows.optional_output("grads.lora_a", grads.lora_a)?,
            delta_bias: borrows.optional_output("grads.delta_bias", grads.delta_bias)?,
        };
        let workspace = borrows.output("workspace", workspace)?;
        let plan = layer.backward(self.gpu(), T::DTYPE, x, s, dy, grads, workspace)?;
        // SAFETY: as in `low_rank_linear`.
        unsafe { self.launch(&plan, stream) }
    }
}
