//! The Δb of a visual prompt.

#[cfg(feature = "candle-cuda")]
use super::device::{self, CudaSlice, CudaView, DevicePtr, DevicePtrMut, Gpu, Gradients};
use super::{Element, FrozenLinear, Grads, Kernel, apply3, places, wrap};
use crate::cpu;
#[cfg(feature = "candle-cuda")]
use crate::cuda;
use candle_core::{Result, Shape, Tensor};

/// `Δb = W0·(Pd·Pu) + b0⊙δb`, differentiable in `Pd [K, r]`, `Pu [r, 1]` and `δb [N]` (zero if absent).
pub(in crate::candle) fn prompt_bias(
    base: &FrozenLinear,
    prompt_down: &Tensor,
    prompt_up: &Tensor,
    delta_bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (out_features, in_features) = base.weight.dims2()?;
    let sizes = [out_features, in_features, prompt_down.dim(1)?];
    let kernel = PromptKernel { base: base.clone(), sizes };
    match delta_bias {
        Some(delta_bias) => apply3(kernel, prompt_down, prompt_up, delta_bias),
        None => apply3(
            kernel,
            prompt_down,
            prompt_up,
            &Tensor::zeros(out_features, prompt_down.dtype(), prompt_down.device())?,
        ),
    }
}

/// `(Pd, Pu, δb)` to `W0·(Pd·Pu) + b0⊙δb`, see [`cpu::PromptBias`].
struct PromptKernel {
    base: FrozenLinear,
    sizes: [usize; 3],
}

impl PromptKernel {
    fn prompt<'a, T: Element>(
        &self,
        base: cpu::Base<&'a [T]>,
        arguments: &[&'a [T]],
    ) -> cpu::PromptBias<&'a [T]> {
        let [out_features, in_features, rank] = self.sizes;
        cpu::PromptBias {
            out_features,
            in_features,
            rank,
            base_weight: base.weight,
            base_bias: base.bias,
            prompt_down: arguments[0],
            prompt_up: arguments[1],
            delta_bias: Some(arguments[2]),
        }
    }
}

#[cfg(feature = "candle-cuda")]
impl PromptKernel {
    fn on_device<'a, T: device::Element>(
        &self,
        base: cuda::Base<&'a dyn DevicePtr<T>>,
        arguments: &'a [CudaView<'_, T>],
    ) -> cuda::PromptBias<&'a dyn DevicePtr<T>> {
        let [out_features, in_features, rank] = self.sizes;
        cuda::PromptBias {
            out_features,
            in_features,
            rank,
            base_weight: base.weight,
            base_bias: base.bias,
            prompt_down: &arguments[0],
            prompt_up: &arguments[1],
            delta_bias: Some(&arguments[2]),
        }
    }
}

impl Kernel for PromptKernel {
    const NAME: &'static str = "prompt_bias";

    fn shape(&self, _: &[&Shape]) -> Result<Shape> {
        Ok(Shape::from(self.sizes[0]))
    }

    fn forward<T: Element>(&self, arguments: &[&[T]], out: &mut [T]) -> Result<()> {
        self.base.with(|base| wrap(self.prompt(base, arguments).forward(out)))
    }

    fn backward<T: Element>(&self, arguments: &[&[T]], grad: &[T], mut out: Grads<'_, T>) -> Result<()> {
        let mut spare = [vec![], vec![], vec![]];
        let lengths = [arguments[0].len(), arguments[1].len(), arguments[2].len()];
        let [prompt_down, prompt_up, delta_bias] = places(&mut out, &mut spare, lengths);
        let grads = cpu::PromptGrads { prompt_down, prompt_up, delta_bias: Some(delta_bias) };
        self.base.with(|base| wrap(self.prompt(base, arguments).backward(grad, grads)))
    }

    #[cfg(feature = "candle-cuda")]
    fn forward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        self.base.on_device(|base| {
            let prompt = self.on_device(base, arguments);
            let mut workspace = gpu.alloc(prompt.workspace_len(T::DTYPE))?;
            wrap(gpu.operators.prompt_bias(&prompt, out, &mut workspace, &gpu.stream))
        })
    }

    #[cfg(feature = "candle-cuda")]
    fn backward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        grad: &CudaView<'_, T>,
        _: &[bool],
    ) -> Result<Gradients<T>> {
        let place = |i: usize| gpu.alloc(arguments[i].len());
        let (mut prompt_down, mut prompt_up, mut delta_bias) = (place(0)?, place(1)?, place(2)?);
        self.base.on_device(|base| {
            let prompt = self.on_device(base, arguments);
            let mut workspace = gpu.alloc(prompt.workspace_len(T::DTYPE))?;
            let grads = cuda::PromptGrads::<&mut dyn DevicePtrMut<T>> {
                prompt_down: &mut prompt_down,
                prompt_up: &mut prompt_up,
                delta_bias: Some(&mut delta_bias),
            };
            wrap(gpu.operators.prompt_bias_backward(&prompt, grad, grads, &mut workspace, &gpu.stream))
        })?;
        Ok(vec![Some(prompt_down), Some(prompt_up), Some(delta_bias)])
    }
}
