//! The weight of a low-rank adapter and its gradients.
//!
//! LoRA add is [`LoraFactors::weight`] without a base weight, LoRA mul with one.

use super::adapter_weights::{
    AdapterWeight, AdapterWeightGrads, LoraWeight, LoraWeightGrads, Partial, build, gradients,
};
use super::borrows::Borrows;
use super::buffer::{Buffer, DType, Element, MAX_ROWS, Named, check_disjoint};
use super::device::Device;
use super::plan::Plan;
use crate::cpu::{LoraFactors, LoraGrads, check_scale};
use crate::error::{Error, Result};
use crate::shape::{nonzero, product};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

/// Most elements of a weight, whose tiles a grid can count.
const MAX_WEIGHT: usize = 1 << 40;
/// Most elements of a factor.
const MAX_FACTOR: usize = 1 << 36;

/// Checks the sizes of a weight `[N, K]` and a rank.
pub(super) fn check_sizes(n: usize, k: usize, r: usize) -> Result<()> {
    for (argument, got) in [("out_features", n), ("in_features", k), ("rank", r)] {
        nonzero(argument, got)?;
        if got > MAX_ROWS {
            return Err(Error::Size { argument, expected: "at most 2^31", got });
        }
    }
    if product("weight", "[N, K]", &[n, k])? > MAX_WEIGHT {
        return Err(Error::Overflow { argument: "weight", shape: "[N, K]" });
    }
    Ok(())
}

/// Product of the sizes of a factor, few enough for a grid.
pub(super) fn factor(argument: &'static str, shape: &'static str, sizes: [usize; 2]) -> Result<usize> {
    let len = product(argument, shape, &sizes)?;
    if len > MAX_FACTOR {
        return Err(Error::Overflow { argument, shape });
    }
    Ok(len)
}

/// Checks a workspace of `needed` elements, a number that saturates.
pub(super) fn check_workspace(workspace: Buffer, needed: usize) -> Result<Buffer> {
    workspace.check_workspace(product("workspace", "[workspace_len()]", &[needed])?)
}

impl<B> LoraFactors<B> {
    /// The `f32` elements of workspace that the backward pass on CUDA needs; saturates for sizes that are refused.
    pub fn workspace_len(&self, dtype: DType) -> usize {
        let &Self { out_features: n, in_features: k, rank: r, .. } = self;
        Partial::new(n, k, r, 0, dtype).len()
    }
}

impl LoraFactors<Buffer> {
    pub(super) fn check(&self, dtype: DType, base_weight: Option<Buffer>) -> Result<Vec<Named>> {
        let &Self { out_features: n, in_features: k, rank: r, lora_b, lora_a, scale } = self;
        check_sizes(n, k, r)?;
        lora_b.check("lora_b", "[N, r]", factor("lora_b", "[N, r]", [n, r])?, dtype.bytes())?;
        lora_a.check("lora_a", "[r, K]", factor("lora_a", "[r, K]", [r, k])?, dtype.bytes())?;
        check_scale(scale)?;
        let mut inputs = vec![("lora_b", lora_b), ("lora_a", lora_a)];
        if let Some(base) = base_weight {
            base.check("base_weight", "[N, K]", n * k, dtype.bytes())?;
            inputs.push(("base_weight", base));
        }
        Ok(inputs)
    }

    /// The plan that computes `out [N, K] = scale·B·A` (LoRA add), or `W0 ⊙ (scale·B·A)` with a `base_weight`
    /// `W0 [N, K]` (LoRA mul).
    ///
    /// # Errors
    /// If a size is zero or too large, `scale` is not finite, or a buffer has the wrong length, is not aligned to its
    /// element or overlaps the output.
    pub fn weight(&self, dtype: DType, base_weight: Option<Buffer>, out: Buffer) -> Result<Plan> {
        let inputs = self.check(dtype, base_weight)?;
        out.check("out", "[N, K]", self.out_features * self.in_features, dtype.bytes())?;
        check_disjoint(&inputs, &[("out", out)], dtype.bytes())?;
        let lora = Some(LoraWeight { factors: *self, base_weight, out });
        Ok(build(dtype, &[AdapterWeight { lora, prompt: None }]))
    }

    /// The plan that computes `dB = scale·Q·Aᵀ` and `dA = scale·Bᵀ·Q` from the gradient of [`weight`](Self::weight)'s
    /// output, `delta_weight_grad [N, K]`: `Q` is that, or with a `base_weight` times `W0`, element by element.
    ///
    /// # Errors
    /// As [`weight`](Self::weight); also if the workspace is too small.
    pub fn backward(
        &self,
        dtype: DType,
        base_weight: Option<Buffer>,
        delta_weight_grad: Buffer,
        grads: LoraGrads<Buffer>,
        workspace: Buffer,
    ) -> Result<Plan> {
        let mut inputs = self.check(dtype, base_weight)?;
        let bytes = dtype.bytes();
        delta_weight_grad.check(
            "delta_weight_grad",
            "[N, K]",
            self.out_features * self.in_features,
            bytes,
        )?;
        inputs.push(("delta_weight_grad", delta_weight_grad));
        let lora = LoraWeightGrads {
            factors: *self,
            base_weight,
            delta_weight_grad,
            lora_b: Some(grads.lora_b),
            lora_a: Some(grads.lora_a),
        };
        let mut outputs = lora.check_outputs(dtype)?;
        let workspace = check_workspace(workspace, self.workspace_len(dtype))?;
        outputs.push(("workspace", workspace.in_elements_of(bytes)));
        check_disjoint(&inputs, &outputs, bytes)?;
        Ok(gradients(dtype, &[AdapterWeightGrads { lora: Some(lora), prompt: None }], workspace.into()))
    }
}

impl<'a, T> LoraFactors<&'a dyn DevicePtr<T>> {
    pub(super) fn borrow(&self, borrows: &mut Borrows<'a>) -> Result<LoraFactors<Buffer>> {
        let LoraFactors { out_features, in_features, rank, lora_b, lora_a, scale } = *self;
        let (lora_b, lora_a) = (borrows.input("lora_b", lora_b)?, borrows.input("lora_a", lora_a)?);
        Ok(LoraFactors { out_features, in_features, rank, lora_b, lora_a, scale })
    }
}

impl Device {
    /// `out [N, K] = scale·B·A`: LoRA add.
    ///
    /// # Errors
    /// As [`LoraFactors::weight`]; also if an argument belongs to another device, or the launch fails.
    pub fn low_rank_weight<'a, T: Element>(
        &'a self,
        lora: LoraFactors<&'a dyn DevicePtr<T>>,
        out: &'a mut dyn DevicePtrMut<T>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        self.lora_weight(lora, None, out, stream)
    }

    /// `dB = scale·dΔW·Aᵀ`, `dA = scale·Bᵀ·dΔW`: gradients of [`Device::low_rank_weight`]. `workspace` has at least
    /// [`LoraFactors::workspace_len`] elements; contents are ignored.
    ///
    /// # Errors
    /// As `LoraFactors::backward`; also if an argument belongs to another device, or a launch fails.
    pub fn low_rank_weight_backward<'a, T: Element>(
        &'a self,
        lora: LoraFactors<&'a dyn DevicePtr<T>>,
        delta_weight_grad: &'a dyn DevicePtr<T>,
        grads: LoraGrads<&'a mut dyn DevicePtrMut<T>>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        self.lora_backward(lora, None, delta_weight_grad, grads, workspace, stream)
    }

    /// `out [N, K] = W0 ⊙ (scale·B·A)`: LoRA mul, the paper's main adapter. `base_weight` is `W0 [N, K]`.
    ///
    /// # Errors
    /// As [`Device::low_rank_weight`].
    pub fn lora_mul_weight<'a, T: Element>(
        &'a self,
        lora: LoraFactors<&'a dyn DevicePtr<T>>,
        base_weight: &'a dyn DevicePtr<T>,
        out: &'a mut dyn DevicePtrMut<T>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        self.lora_weight(lora, Some(base_weight), out, stream)
    }

    /// `dB = scale·Q·Aᵀ`, `dA = scale·Bᵀ·Q` with `Q = dΔW ⊙ W0`: gradients of [`Device::lora_mul_weight`].
    ///
    /// # Errors
    /// As [`Device::low_rank_weight_backward`].
    pub fn lora_mul_weight_backward<'a, T: Element>(
        &'a self,
        lora: LoraFactors<&'a dyn DevicePtr<T>>,
        base_weight: &'a dyn DevicePtr<T>,
        delta_weight_grad: &'a dyn DevicePtr<T>,
        grads: LoraGrads<&'a mut dyn DevicePtrMut<T>>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        self.lora_backward(lora, Some(base_weight), delta_weight_grad, grads, workspace, stream)
    }

    fn lora_weight<'a, T: Element>(
        &'a self,
        lora: LoraFactors<&'a dyn DevicePtr<T>>,
        base_weight: Option<&'a dyn DevicePtr<T>>,
        out: &'a mut dyn DevicePtrMut<T>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let lora = lora.borrow(&mut borrows)?;
        let base_weight = borrows.optional("base_weight", base_weight)?;
        let plan = lora.weight(T::DTYPE, base_weight, borrows.output("out", out)?)?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernels touch.
        unsafe { self.launch(&plan, stream) }
    }

    fn lora_backward<'a, T: Element>(
        &'a self,
        lora: LoraFactors<&'a dyn DevicePtr<T>>,
        base_weight: Option<&'a dyn DevicePtr<T>>,
        delta_weight_grad: &'a dyn DevicePtr<T>,
        grads: LoraGrads<&'a mut dyn DevicePtrMut<T>>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let lora = lora.borrow(&mut borrows)?;
        let base_weight = borrows.optional("base_weight", base_weight)?;
        let delta_weight_grad = borrows.input("delta_weight_grad", delta_weight_grad)?;
        let grads = LoraGrads {
            lora_b: borrows.output("grads.lora_b", grads.lora_b)?,
            lora_a: borrows.output("grads.lora_a", grads.lora_a)?,
        };
        let workspace = borrows.output("workspace", workspace)?;
        let plan = lora.backward(T::DTYPE, base_weight, delta_weight_grad, grads, workspace)?;
        // SAFETY: as in `lora_weight`.
        unsafe { self.launch(&plan, stream) }
    }
}
