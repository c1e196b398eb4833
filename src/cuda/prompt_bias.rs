//! The prompt adapter's bias (VPT add) and its gradients.

use super::adapter_weights::{
    AdapterWeight, AdapterWeightGrads, Partial, PromptWeight, PromptWeightGrads, build, gradients,
};
use super::borrows::Borrows;
use super::buffer::{Buffer, DType, Element, Named, check_disjoint};
use super::device::Device;
use super::low_rank_weight::{check_sizes, check_workspace, factor};
use super::plan::Plan;
use crate::cpu::{PromptBias, PromptGrads};
use crate::error::Result;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

impl<B> PromptBias<B> {
    /// The `f32` elements of workspace that [`backward`](Self::backward) needs; saturates for sizes that are refused.
    pub fn workspace_len(&self, dtype: DType) -> usize {
        let &Self { out_features: n, in_features: k, rank: r, .. } = self;
        Partial::new(n, k, 0, r, dtype).len()
    }
}

impl PromptBias<Buffer> {
    pub(super) fn check(&self, dtype: DType) -> Result<Vec<Named>> {
        let &Self { out_features: n, in_features: k, rank: r, .. } = self;
        check_sizes(n, k, r)?;
        let prompt = factor("prompt_down", "[K, r]", [k, r])?;
        let needed = [
            ("base_weight", "[N, K]", Some(self.base_weight), n * k),
            ("prompt_down", "[K, r]", Some(self.prompt_down), prompt),
            ("prompt_up", "[r]", Some(self.prompt_up), r),
            ("base_bias", "[N]", self.base_bias, n),
            ("delta_bias", "[N]", self.delta_bias, n),
        ];
        let mut inputs = Vec::new();
        for (argument, shape, buffer, len) in needed {
            if let Some(buffer) = buffer {
                buffer.check(argument, shape, len, dtype.bytes())?;
                inputs.push((argument, buffer));
            }
        }
        Ok(inputs)
    }

    /// The plan that computes `Δb [N]`.
    ///
    /// # Errors
    /// If a size is zero or too large, or a buffer has the wrong length, is not aligned to its element or overlaps an output.
    pub fn forward(&self, dtype: DType, out: Buffer) -> Result<Plan> {
        let inputs = self.check(dtype)?;
        out.check("out", "[N]", self.out_features, dtype.bytes())?;
        check_disjoint(&inputs, &[("out", out)], dtype.bytes())?;
        let prompt = Some(PromptWeight { prompt: *self, out });
        Ok(build(dtype, &[AdapterWeight { lora: None, prompt }]))
    }

    /// The plan that computes gradients from `dΔb [N]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); also if the workspace is too small.
    pub fn backward(
        &self,
        dtype: DType,
        delta_bias_grad: Buffer,
        grads: PromptGrads<Buffer>,
        workspace: Buffer,
    ) -> Result<Plan> {
        let (mut inputs, bytes) = (self.check(dtype)?, dtype.bytes());
        delta_bias_grad.check("delta_bias_grad", "[N]", self.out_features, bytes)?;
        inputs.push(("delta_bias_grad", delta_bias_grad));
        let prompt = PromptWeightGrads {
            prompt: *self,
            delta_bias_grad,
            prompt_down: Some(grads.prompt_down),
            prompt_up: Some(grads.prompt_up),
            delta_bias: grads.delta_bias,
        };
        let mut outputs = prompt.check_outputs(dtype)?;
        let workspace = check_workspace(workspace, self.workspace_len(dtype))?;
        outputs.push(("workspace", workspace.in_elements_of(bytes)));
        check_disjoint(&inputs, &outputs, bytes)?;
        Ok(gradients(dtype, &[AdapterWeightGrads { lora: None, prompt: Some(prompt) }], workspace.into()))
    }
}

impl<'a, T> PromptBias<&'a dyn DevicePtr<T>> {
    pub(super) fn borrow(&self, borrows: &mut Borrows<'a>) -> Result<PromptBias<Buffer>> {
        let PromptBias { out_features, in_features, rank, .. } = *self;
        Ok(PromptBias {
            out_features,
            in_features,
            rank,
            base_weight: borrows.input("base_weight", self.base_weight)?,
            base_bias: borrows.optional("base_bias", self.base_bias)?,
            prompt_down: borrows.input("prompt_down", self.prompt_down)?,
            prompt_up: borrows.input("prompt_up", self.prompt_up)?,
            delta_bias: borrows.optional("delta_bias", self.delta_bias)?,
        })
    }
}

impl Device {
    /// `out [N] = W0·(Pd·Pu) + b0⊙δb`.
    ///
    /// # Errors
    /// As [`PromptBias::forward`]; also if an argument belongs to another device, or a launch fails.
    pub fn prompt_bias<'a, T: Element>(
        &'a self,
        prompt: &PromptBias<&'a dyn DevicePtr<T>>,
        out: &'a mut dyn DevicePtrMut<T>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let prompt = prompt.borrow(&mut borrows)?;
        let plan = prompt.forward(T::DTYPE, borrows.output("out", out)?)?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernels touch.
        unsafe { self.launch(&plan, stream) }
    }

    /// Gradients of [`Device::prompt_bias`] from `delta_bias_grad`, `dΔb [N]`. `workspace` has at least
    /// [`PromptBias::workspace_len`] elements; contents are ignored.
    ///
    /// # Errors
    /// As [`PromptBias::backward`]; also if an argument belongs to another device, or a launch fails.
    pub fn prompt_bias_backward<'a, T: Element>(
        &'a self,
        prompt: &PromptBias<&'a dyn DevicePtr<T>>,
        delta_bias_grad: &'a dyn DevicePtr<T>,
        grads: PromptGrads<&'a mut dyn DevicePtrMut<T>>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let prompt = prompt.borrow(&mut borrows)?;
        let delta_bias_grad = borrows.input("delta_bias_grad", delta_bias_grad)?;
        let grads = PromptGrads {
            prompt_down: borrows.output("grads.prompt_down", grads.prompt_down)?,
            prompt_up: borrows.output("grads.prompt_up", grads.prompt_up)?,
            delta_bias: borrows.optional_output("grads.delta_bias", grads.delta_bias)?,
        };
        let workspace = borrows.output("workspace", workspace)?;
        let plan = prompt.backward(T::DTYPE, delta_bias_grad, grads, workspace)?;
        // SAFETY: as in `prompt_bias`.
        unsafe { self.launch(&plan, stream) }
    }
}
