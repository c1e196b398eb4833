//! Dense noisy linear layer.

mod cublaslt;
mod params;
pub(super) mod sm80;
mod sm90;

use super::borrows::{Borrows, Noise};
use super::buffer::{Buffer, DType, Element, Named, check_disjoint, check_linear_shape};
use super::device::Device;
use super::gpu::{Family, Gpu};
use super::layer::{Arithmetic, EVERY_PASS, Pass, check_base, check_input, named_base};
use super::noise_source::Source;
use super::plan::Plan;
use super::select::{Problem, select};
use crate::cpu::{Base, NEEDS_INPUT, NoisyLinearGrads};
use crate::error::{Error, Result};
use crate::noise;
use crate::shape::LinearShape;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

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
    /// Whether one GEMM with `W0 + z⊙ΔW` may do the work of two, where a sample's tokens share `z` and fill the tiles, or the
    /// noise is off. [`Family::Sm80`] folds in the forward pass, [`Family::Sm90`] in the gradient to the input too,
    /// [`Family::CublasLt`] never. Both passes take the same value; [`folds_by_default`] is what suits most.
    ///
    /// The sum is made in `f32` and rounded to nearest, once, to the type that is multiplied. That loses nothing in `f32`. In the
    /// 16-bit types (and with `allow_tf32`, as in `f16`) an element of ΔW below about 2⁻⁹ (`bf16`) or 2⁻¹² (`f16`) of that of W0
    /// vanishes from the sum, though not from the gradient to ΔW. See [`LoraMulLinear::fold`](super::LoraMulLinear::fold) for when
    /// that matters.
    pub fold: bool,
    /// Whether `f32` is multiplied as TF32 (10 fraction bits) instead of to `f32` accuracy.
    pub allow_tf32: bool,
}

/// The layer as plans have it.
type Layer = NoisyLinear<Buffer, Source>;

/// What a family makes of the layer; the arguments of the passes are checked.
struct Passes {
    /// `f32` elements of workspace for either pass.
    workspace_len: fn(&Gpu, &LinearShape, DType) -> usize,
    /// From `x` to `y`.
    forward: fn(&Layer, &Pass, Buffer, Buffer) -> Result<Plan>,
    /// From `x` and `dy`.
    backward: fn(&Layer, &Pass, [Buffer; 2], NoisyLinearGrads<Buffer>) -> Result<Plan>,
}

impl<B, Z, K> NoisyLinear<B, noise::Noise<Z, K>> {
    fn passes(&self, gpu: &Gpu, dtype: DType, aligned: bool, backward: bool) -> Passes {
        let (shape, noise, rank) = (self.shape, self.noise.shape(), None);
        let (has_base, has_delta, fold) = (self.base.is_some(), self.delta_weight.is_some(), self.fold);
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
        if check_linear_shape(&self.shape).is_err() {
            return 0;
        }
        let needed = |(aligned, backward)| {
            (self.passes(gpu, dtype, aligned, backward).workspace_len)(gpu, &self.shape, dtype)
        };
        EVERY_PASS.map(needed).into_iter().fold(0, usize::max)
    }
}

/// Whether a layer had better fold ([`NoisyLinear::fold`]): what the bindings do unless they are told to be exact.
///
/// In training, yes: what rounding takes from small elements of ΔW it does not take from their gradients, and they grow on. Without
/// noise, as in evaluation, nothing makes up for it, so that only `f32` folds then.
///
/// ```
/// use pace_kernels::cuda::{DType, Source, folds_by_default};
/// assert!(folds_by_default(DType::F32, &Source::Off));
/// assert!(!folds_by_default(DType::BF16, &Source::Off));
/// ```
pub fn folds_by_default<Z, K>(dtype: DType, noise: &noise::Noise<Z, K>) -> bool {
    match noise {
        _ if dtype == DType::F32 => true,
        noise::Noise::Off => false,
        noise::Noise::Generated(generator) | noise::Noise::Keyed { generator, .. } => generator.sigma() > 0.0,
        noise::Noise::Given { .. } => true,
    }
}

/// Whether [`Family::Sm90`] is the fastest that was measured, in this pass, if it takes the layer.
pub(super) fn pays_sm90(gpu: &Gpu, problem: &Problem) -> bool {
    sm90::pays(gpu, problem)
}

/// Whether a layer may be computed by [`Family::Sm90`], in this pass.
pub(super) fn takes_sm90(problem: &Problem) -> bool {
    sm90::takes(problem)
}

impl Layer {
    /// Whether these tensors and the layer's own matrices start at multiples of 16 bytes.
    fn is_aligned(&self, tensors: &[Buffer]) -> bool {
        let own = self.base.map(|base| base.weight).into_iter().chain(self.delta_weight);
        let tensors = own.chain(tensors.iter().copied());
        self.noise.is_vector_aligned() && tensors.into_iter().all(|tensor| tensor.is_vector_aligned())
    }

    /// Checks all but the tensors of one pass.
    fn check(&self, gpu: &Gpu, dtype: DType, workspace: Buffer) -> Result<Pass> {
        let shape = &self.shape;
        check_linear_shape(shape)?;
        let workspace = workspace.check_workspace(self.workspace_len(gpu, dtype))?;
        let arithmetic = Arithmetic { dtype, allow_tf32: self.allow_tf32 };
        let pass = Pass::new(gpu, arithmetic, shape, &self.noise, workspace)?;
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
        Ok(pass)
    }

    /// Checks that the outputs, the workspace among them, share no memory with each other or with what is read: `inputs` and the
    /// layer itself.
    fn check_disjoint(&self, inputs: &[Named], outputs: Vec<Named>, pass: &Pass) -> Result<()> {
        let bytes = pass.arithmetic.dtype.bytes();
        let delta = self.delta_weight.map(|weight| ("delta_weight", weight));
        let delta_bias = self.delta_bias.map(|bias| ("delta_bias", bias));
        let own = named_base(self.base).chain(delta).chain(delta_bias);
        let inputs: Vec<Named> = own.chain(inputs.iter().copied()).collect();
        let outputs = [outputs, vec![("workspace", pass.workspace.in_elements_of(bytes))]].concat();
        check_disjoint(&inputs, &outputs, bytes)?;
        self.noise.check_disjoint(&outputs, bytes)
    }

    /// The plan that computes `y [M, N]` from `x` (`[M, K]`, or `[B·T, K]` if the input is shared). `workspace` has at least
    /// [`workspace_len`](Self::workspace_len) elements of `f32`; contents are ignored.
    ///
    /// # Errors
    /// If there is neither a base nor ΔW, a size is zero or too large, the samples reach 2⁵⁶, or a buffer has the wrong length,
    /// is not aligned to its element or overlaps an output.
    pub fn forward(&self, gpu: &Gpu, dtype: DType, x: Buffer, y: Buffer, workspace: Buffer) -> Result<Plan> {
        let pass = self.check(gpu, dtype, workspace)?;
        check_input("x", &x, &self.shape, dtype)?;
        y.check("y", "[M, N]", self.shape.out_rows() * self.shape.out_features, dtype.bytes())?;
        self.check_disjoint(&[("x", x)], vec![("y", y)], &pass)?;
        let passes = self.passes(gpu, dtype, self.is_aligned(&[x, y]), false);
        (passes.forward)(self, &pass, x, y)
    }

    /// The plan that computes gradients from `x` and `dy = ∂L/∂y [M, N]`, with the noise of the forward pass recomputed.
    /// `workspace` as in [`forward`](Self::forward).
    ///
    /// `dx = g·W0 + e·ΔW`, `dΔW = eᵀ·x`, `dΔb = Σ_rows e`, where `g = dy` and `e = z⊙g`; with a shared input, sums over
    /// the branches.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); also if the gradient of ΔW is asked for and the layer has none.
    pub fn backward(
        &self,
        gpu: &Gpu,
        dtype: DType,
        x: Buffer,
        dy: Buffer,
        grads: NoisyLinearGrads<Buffer>,
        workspace: Buffer,
    ) -> Result<Plan> {
        self.backward_from(gpu, dtype, Some(x), dy, grads, workspace)
    }

    /// The same without `x`, which only the gradient to ΔW needs.
    pub(crate) fn backward_from(
        &self,
        gpu: &Gpu,
        dtype: DType,
        x: Option<Buffer>,
        dy: Buffer,
        grads: NoisyLinearGrads<Buffer>,
        workspace: Buffer,
    ) -> Result<Plan> {
        let pass = self.check(gpu, dtype, workspace)?;
        let (shape, bytes) = (self.shape, dtype.bytes());
        let (k, n) = (shape.in_features, shape.out_features);
        if let Some(x) = x {
            check_input("x", &x, &shape, dtype)?;
        }
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
            if x.is_none() {
                return Err(NEEDS_INPUT);
            }
            outputs.push(("grads.delta_weight", weight));
        }
        if let Some(bias) = grads.delta_bias {
            bias.check("grads.delta_bias", "[N]", n, bytes)?;
            outputs.push(("grads.delta_bias", bias));
        }
        let inputs: Vec<Named> = x.map(|x| ("x", x)).into_iter().chain([("dy", dy)]).collect();
        self.check_disjoint(&inputs, outputs, &pass)?;
        let x = x.unwrap_or(Buffer::ABSENT);
        let grads_of = [grads.input, grads.delta_weight, grads.delta_bias];
        let tensors: Vec<Buffer> = [x, dy].into_iter().chain(grads_of.into_iter().flatten()).collect();
        let passes = self.passes(gpu, dtype, self.is_aligned(&tensors), true);
        (passes.backward)(self, &pass, [x, dy], grads)
    }
}

impl<'a, T> NoisyLinear<&'a dyn DevicePtr<T>, Noise<'a>> {
    fn borrow(&self, borrows: &mut Borrows<'a>) -> Result<NoisyLinear<Buffer, Source>> {
        let NoisyLinear { shape, fold, allow_tf32, .. } = *self;
        Ok(NoisyLinear {
            shape,
            noise: borrows.noise(&self.noise)?,
            base: borrows.base(self.base)?,
            delta_weight: borrows.optional("delta_weight", self.delta_weight)?,
            delta_bias: borrows.optional("delta_bias", self.delta_bias)?,
            fold,
            allow_tf32,
        })
    }
}

impl Device {
    /// Computes `y [M, N]` from `x` (`[M, K]`, or `[B·T, K]` if the input is shared). `workspace` has at least
    /// [`NoisyLinear::workspace_len`] elements; contents are ignored.
    ///
    /// # Errors
    /// As [`NoisyLinear::forward`]; also if an argument belongs to another device, or a launch fails.
    pub fn noisy_linear<'a, T: Element>(
        &'a self,
        layer: &NoisyLinear<&'a dyn DevicePtr<T>, Noise<'a>>,
        x: &'a dyn DevicePtr<T>,
        y: &'a mut dyn DevicePtrMut<T>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let layer = layer.borrow(&mut borrows)?;
        let (x, y) = (borrows.input("x", x)?, borrows.output("y", y)?);
        let plan = layer.forward(self.gpu(), T::DTYPE, x, y, borrows.output("workspace", workspace)?)?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernels touch.
        unsafe { self.launch(&plan, stream) }
    }

    /// Computes gradients from `x` and `dy = ∂L/∂y [M, N]`, with the noise of the forward pass recomputed. `workspace` as
    /// in [`noisy_linear`](Self::noisy_linear).
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
        let mut borrows = Borrows::new(self, stream);
        let layer = layer.borrow(&mut borrows)?;
        let (x, dy) = (borrows.input("x", x)?, borrows.input("dy", dy)?);
        let grads = NoisyLinearGrads {
            input: borrows.optional_output("grads.input", grads.input)?,
            delta_weight: borrows.optional_output("grads.delta_weight", grads.delta_weight)?,
            delta_bias: borrows.optional_output("grads.delta_bias", grads.delta_bias)?,
        };
        let workspace = borrows.output("workspace", workspace)?;
        let plan = layer.backward(self.gpu(), T::DTYPE, x, dy, grads, workspace)?;
        // SAFETY: as in `noisy_linear`.
        unsafe { self.launch(&plan, stream) }
    }
}
