//! A layer with the paper's main adapter (LoRA mul, VPT add, or both), from the adapter's own parameters: the plans of ΔW, Δb and
//! the dense layer one after the other.

use super::adapter_weights::{
    AdapterWeight, AdapterWeightGrads, LoraWeight, LoraWeightGrads, Partial, PromptWeight, PromptWeightGrads,
    build, gradients,
};
use super::borrows::{Borrows, Noise};
use super::buffer::{Buffer, DType, Element, Named, check_disjoint, check_linear_shape};
use super::device::Device;
use super::gemm::Arena;
use super::gpu::Gpu;
use super::layer::named_base;
use super::noise_source::Source;
use super::noisy_linear::NoisyLinear;
use super::plan::Plan;
use crate::cpu::{Base, Lora, LoraMulLinearGrads, NoisyLinearGrads, Prompt, check_adapter};
use crate::error::Result;
use crate::noise;
use crate::shape::LinearShape;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

/// `y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)` with `ΔW = W0 ⊙ (scale·B·A)` and `Δb = W0·(Pd·Pu) + b0⊙δb`; paper equation 8.
///
/// ΔW and Δb are built in the workspace for each pass. `B` are the tensors, all of one type: [`Buffer`] for planning, or
/// `cudarc`'s (see [`Device::lora_mul_linear`]); `N` is where `z` comes from: [`Source`] or [`Noise`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraMulLinear<B, N> {
    /// Sizes.
    pub shape: LinearShape,
    /// Source of `z`.
    pub noise: N,
    /// The frozen layer.
    pub base: Base<B>,
    /// LoRA mul; `None` is no ΔW.
    pub lora: Option<Lora<B, f32>>,
    /// VPT add; without it `Δb = δb`.
    pub prompt: Option<Prompt<B>>,
    /// `δb [N]`; `None` is zero.
    pub delta_bias: Option<B>,
    /// As in [`NoisyLinear::fold`]; without LoRA there is nothing to fold.
    ///
    /// ΔW is a multiple of W0 here, element by element, and starts at zero. In `bf16`, where rms(ΔW/W0) stays below about 1e-3 over
    /// a whole training (a learning rate of 1e-4 or less, and few steps), folding attenuates the adapter in the forward pass of
    /// training: give `false` then. `f16` keeps three bits more. Larger adapters leave that range within a few steps.
    pub fold: bool,
    /// Whether `f32` is multiplied as TF32 (10 fraction bits) instead of to `f32` accuracy.
    pub allow_tf32: bool,
}

/// Where things lie in the workspace.
struct Places {
    /// ΔW and Δb.
    weight: Buffer,
    bias: Buffer,
    /// Their gradients.
    weight_grad: Buffer,
    bias_grad: Buffer,
    /// For the operators, one after the other.
    operators: Buffer,
}

impl<B: Copy, Z: Copy, K: Copy> LoraMulLinear<B, noise::Noise<Z, K>> {
    /// The layer with this ΔW and Δb.
    fn dense(&self, delta_weight: Option<B>, delta_bias: Option<B>) -> NoisyLinear<B, noise::Noise<Z, K>> {
        NoisyLinear {
            shape: self.shape,
            noise: self.noise,
            base: Some(self.base),
            delta_weight,
            delta_bias,
            fold: self.fold,
            allow_tf32: self.allow_tf32,
        }
    }

    fn places(&self, arena: &mut Arena, gpu: &Gpu, dtype: DType) -> Places {
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        let bytes = dtype.bytes();
        let mut take =
            |len: usize, bytes: usize| Buffer { address: arena.take(len.saturating_mul(bytes)).0, len };
        let weight_len = if self.lora.is_some() { n.saturating_mul(k) } else { 0 };
        let [weight, weight_grad] = [weight_len; 2].map(|len| take(len, bytes));
        let [bias, bias_grad] = [n; 2].map(|len| take(len, bytes));
        // Of ΔW only whether there is one counts here.
        let stand_in = self.lora.map(|lora| lora.lora_b);
        let dense = self.dense(stand_in, None).workspace_len(gpu, dtype);
        let ranks = (self.lora.map_or(0, |lora| lora.rank), self.prompt.map_or(0, |prompt| prompt.rank));
        let gradients = Partial::new(n, k, ranks.0, ranks.1, dtype).len();
        let operators = take(dense.max(gradients), 4);
        Places { weight, bias, weight_grad, bias_grad, operators }
    }

    /// The `f32` elements of workspace that either pass needs on a device, whichever gradients are asked for; 0 for sizes that are
    /// refused.
    pub fn workspace_len(&self, gpu: &Gpu, dtype: DType) -> usize {
        if check_linear_shape(&self.shape).is_err() {
            return 0;
        }
        Arena::len_of(|arena| {
            self.places(arena, gpu, dtype);
        })
    }
}

impl LoraMulLinear<Buffer, Source> {
    /// Checks what the operators in the plan cannot see of each other: outputs against every input, and the workspace.
    fn check(
        &self,
        gpu: &Gpu,
        dtype: DType,
        inputs: &[Named],
        outputs: &[Named],
        workspace: Buffer,
    ) -> Result<Places> {
        check_linear_shape(&self.shape)?;
        check_adapter(self.lora.is_some(), self.prompt.is_some())?;
        let workspace = workspace.check_workspace(self.workspace_len(gpu, dtype))?;
        let lora = self.lora.map(|lora| [("lora_a", lora.lora_a), ("lora_b", lora.lora_b)]);
        let prompt = self.prompt.map(|prompt| [("prompt_down", prompt.down), ("prompt_up", prompt.up)]);
        let delta_bias = self.delta_bias.map(|bias| ("delta_bias", bias));
        let own =
            lora.into_iter().chain(prompt).flatten().chain(named_base(Some(self.base))).chain(delta_bias);
        let inputs: Vec<Named> = own.chain(inputs.iter().copied()).collect();
        let outputs = [outputs, &[("workspace", workspace.in_elements_of(dtype.bytes()))]].concat();
        check_disjoint(&inputs, &outputs, dtype.bytes())?;
        self.noise.check_disjoint(&outputs, dtype.bytes())?;
        Ok(self.places(&mut Arena::new(workspace.into()), gpu, dtype))
    }

    /// Builds ΔW and Δb as far as they are needed; gives the layer that has them.
    fn build(
        &self,
        plan: &mut Plan,
        dtype: DType,
        (needs_weight, needs_bias): (bool, bool),
        places: &Places,
    ) -> Result<NoisyLinear<Buffer, Source>> {
        let lora = match self.lora {
            Some(lora) => {
                let (factors, base_weight) = (lora.factors(&self.shape), Some(self.base.weight));
                factors.check(dtype, base_weight)?;
                needs_weight.then_some(LoraWeight { factors, base_weight, out: places.weight })
            }
            None => None,
        };
        let prompt = match self.prompt {
            Some(prompt) => {
                let prompt = prompt.bias(&self.shape, self.base, self.delta_bias);
                prompt.check(dtype)?;
                needs_bias.then_some(PromptWeight { prompt, out: places.bias })
            }
            None => None,
        };
        if lora.is_some() || prompt.is_some() {
            plan.append(build(dtype, &[AdapterWeight { lora, prompt }]));
        }
        let bias = if needs_bias && self.prompt.is_some() { Some(places.bias) } else { self.delta_bias };
        Ok(self.dense(self.lora.map(|_| places.weight), bias))
    }

    /// The plan that computes `y [M, N]` from `x` (`[M, K]`, or `[B·T, K]` if the input is shared). `workspace` has at least
    /// [`workspace_len`](Self::workspace_len) elements of `f32`; contents are ignored.
    ///
    /// # Errors
    /// If there is neither LoRA nor a prompt, a size is zero or too large, the samples reach 2⁵⁶, `scale` is not finite, or a
    /// buffer has the wrong length, is not aligned to its element or overlaps an output.
    pub fn forward(&self, gpu: &Gpu, dtype: DType, x: Buffer, y: Buffer, workspace: Buffer) -> Result<Plan> {
        let places = self.check(gpu, dtype, &[("x", x)], &[("y", y)], workspace)?;
        let mut plan = Plan::default();
        let layer = self.build(&mut plan, dtype, (true, true), &places)?;
        plan.append(layer.forward(gpu, dtype, x, y, places.operators)?);
        Ok(plan)
    }

    /// The plan that computes gradients from `x` and `dy = ∂L/∂y [M, N]`, with the noise of the forward pass recomputed.
    /// `workspace` as in [`forward`](Self::forward). Only the gradients to A and B need `x`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); also if a gradient is asked for whose factor the layer does not have.
    pub fn backward(
        &self,
        gpu: &Gpu,
        dtype: DType,
        x: Option<Buffer>,
        dy: Buffer,
        grads: LoraMulLinearGrads<Buffer>,
        workspace: Buffer,
    ) -> Result<Plan> {
        grads.check(self.lora.is_some(), self.prompt.is_some())?;
        let LoraMulLinearGrads { input, lora_a, lora_b, prompt_down, prompt_up, delta_bias } = grads;
        let outputs = [
            ("grads.input", input),
            ("grads.lora_a", lora_a),
            ("grads.lora_b", lora_b),
            ("grads.prompt_down", prompt_down),
            ("grads.prompt_up", prompt_up),
            ("grads.delta_bias", delta_bias),
        ];
        let outputs: Vec<Named> =
            outputs.into_iter().filter_map(|(name, grad)| Some((name, grad?))).collect();
        let inputs: Vec<Named> = x.map(|x| ("x", x)).into_iter().chain([("dy", dy)]).collect();
        let places = self.check(gpu, dtype, &inputs, &outputs, workspace)?;
        let with_lora = lora_a.is_some() || lora_b.is_some();
        let with_prompt =
            self.prompt.is_some() && (prompt_down.is_some() || prompt_up.is_some() || delta_bias.is_some());

        let mut plan = Plan::default();
        // Δb has no part in any gradient.
        let layer = self.build(&mut plan, dtype, (input.is_some(), false), &places)?;
        let dense = NoisyLinearGrads {
            input,
            delta_weight: with_lora.then_some(places.weight_grad),
            delta_bias: if with_prompt { Some(places.bias_grad) } else { delta_bias },
        };
        plan.append(layer.backward_from(gpu, dtype, x, dy, dense, places.operators)?);
        let lora = self.lora.filter(|_| with_lora).map(|lora| LoraWeightGrads {
            factors: lora.factors(&self.shape),
            base_weight: Some(self.base.weight),
            delta_weight_grad: places.weight_grad,
            lora_b,
            lora_a,
        });
        let prompt = self.prompt.filter(|_| with_prompt).map(|prompt| PromptWeightGrads {
            prompt: prompt.bias(&self.shape, self.base, self.delta_bias),
            delta_bias_grad: places.bias_grad,
            prompt_down,
            prompt_up,
            delta_bias,
        });
        lora.map_or(Ok(Vec::new()), |lora| lora.check_outputs(dtype))?;
        prompt.map_or(Ok(Vec::new()), |prompt| prompt.check_outputs(dtype))?;
        if lora.is_some() || prompt.is_some() {
            let layers = [AdapterWeightGrads { lora, prompt }];
            plan.append(gradients(dtype, &layers, places.operators.into()));
        }
        Ok(plan)
    }
}

impl<'a, T> LoraMulLinear<&'a dyn DevicePtr<T>, Noise<'a>> {
    fn borrow(&self, borrows: &mut Borrows<'a>) -> Result<LoraMulLinear<Buffer, Source>> {
        let lora = match self.lora {
            Some(Lora { rank, lora_a, lora_b, scale }) => {
                let (lora_a, lora_b) = (borrows.input("lora_a", lora_a)?, borrows.input("lora_b", lora_b)?);
                Some(Lora { rank, lora_a, lora_b, scale })
            }
            None => None,
        };
        let prompt = match self.prompt {
            Some(Prompt { rank, down, up }) => {
                let (down, up) = (borrows.input("prompt_down", down)?, borrows.input("prompt_up", up)?);
                Some(Prompt { rank, down, up })
            }
            None => None,
        };
        Ok(LoraMulLinear {
            shape: self.shape,
            noise: borrows.noise(&self.noise)?,
            base: Base {
                weight: borrows.input("base.weight", self.base.weight)?,
                bias: borrows.optional("base.bias", self.base.bias)?,
            },
            lora,
            prompt,
            delta_bias: borrows.optional("delta_bias", self.delta_bias)?,
            fold: self.fold,
            allow_tf32: self.allow_tf32,
        })
    }
}

impl Device {
    /// Computes `y [M, N]` from `x` (`[M, K]`, or `[B·T, K]` if the input is shared). `workspace` has at least
    /// [`LoraMulLinear::workspace_len`] elements; contents are ignored.
    ///
    /// # Errors
    /// As [`LoraMulLinear::forward`]; also if an argument belongs to another device, or a launch fails.
    pub fn lora_mul_linear<'a, T: Element>(
        &'a self,
        layer: &LoraMulLinear<&'a dyn DevicePtr<T>, Noise<'a>>,
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
    /// in [`lora_mul_linear`](Self::lora_mul_linear).
    ///
    /// # Errors
    /// As [`LoraMulLinear::backward`]; also if an argument belongs to another device, or a launch fails.
    pub fn lora_mul_linear_backward<'a, T: Element>(
        &'a self,
        layer: &LoraMulLinear<&'a dyn DevicePtr<T>, Noise<'a>>,
        x: Option<&'a dyn DevicePtr<T>>,
        dy: &'a dyn DevicePtr<T>,
        grads: LoraMulLinearGrads<&'a mut dyn DevicePtrMut<T>>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let layer = layer.borrow(&mut borrows)?;
        let (x, dy) = (borrows.optional("x", x)?, borrows.input("dy", dy)?);
        let grads = LoraMulLinearGrads {
            input: borrows.optional_output("grads.input", grads.input)?,
            lora_a: borrows.optional_output("grads.lora_a", grads.lora_a)?,
            lora_b: borrows.optional_output("grads.lora_b", grads.lora_b)?,
            prompt_down: borrows.optional_output("grads.prompt_down", grads.prompt_down)?,
            prompt_up: borrows.optional_output("grads.prompt_up", grads.prompt_up)?,
            delta_bias: borrows.optional_output("grads.delta_bias", grads.delta_bias)?,
        };
        let workspace = borrows.output("workspace", workspace)?;
        let plan = layer.backward(self.gpu(), T::DTYPE, x, dy, grads, workspace)?;
        // SAFETY: as in `lora_mul_linear`.
        unsafe { self.launch(&plan, stream) }
    }
}
