//! The noisy layer whose adapter is a dense ΔW.

#[cfg(feature = "candle-cuda")]
use super::device::{self, CudaSlice, CudaView, DevicePtr, Gpu, Gradients, input, output, places};
use super::{Element, Grads, Kernel, Layer, apply2, apply3, wrap};
use crate::cpu;
#[cfg(feature = "candle-cuda")]
use crate::cuda;
#[cfg(feature = "candle-cuda")]
use candle_core::cuda_backend::gemm_reduced_precision_f32;
use candle_core::{Result, Shape, Tensor};

/// `y = base + ΔW and Δb under noise`, differentiable in `x`, `ΔW` and `Δb`.
pub(in crate::candle) fn noisy_linear(
    layer: Layer,
    x: &Tensor,
    delta_weight: Option<&Tensor>,
    delta_bias: &Tensor,
) -> Result<Tensor> {
    match delta_weight {
        Some(delta_weight) => apply3(DenseKernel(layer), x, delta_weight, delta_bias),
        None => apply2(DenseKernel(layer), x, delta_bias),
    }
}

/// `(x, ΔW, Δb)`, see [`cpu::NoisyLinear`]; `(x, Δb)` where there is no ΔW.
struct DenseKernel(Layer);

#[cfg(feature = "candle-cuda")]
impl DenseKernel {
    fn on_device<'a, T: device::Element>(
        &self,
        noise: cuda::Noise<'a>,
        base: Option<cuda::Base<&'a dyn DevicePtr<T>>>,
        arguments: &'a [CudaView<'_, T>],
    ) -> cuda::NoisyLinear<&'a dyn DevicePtr<T>, cuda::Noise<'a>> {
        let (delta_weight, delta_bias) = dense_arguments(arguments);
        cuda::NoisyLinear {
            shape: self.0.shape,
            noise,
            base,
            delta_weight: delta_weight.map(input),
            delta_bias: delta_bias.map(input),
            // A folded weight is rounded to the tensors' type: in 16 bits it would lose an adapter that is small against W0.
            fold: T::DTYPE == cuda::DType::F32,
            allow_tf32: gemm_reduced_precision_f32(),
        }
    }
}

impl Kernel for DenseKernel {
    const NAME: &'static str = "noisy_linear";

    fn shape(&self, arguments: &[&Shape]) -> Result<Shape> {
        self.0.out_shape(arguments[0])
    }

    fn forward<T: Element>(&self, arguments: &[&[T]], out: &mut [T]) -> Result<()> {
        let (delta_weight, delta_bias) = dense_arguments(arguments);
        let (delta_weight, delta_bias) = (delta_weight.copied(), delta_bias.copied());
        self.0.with(|noise, base| {
            let layer = cpu::NoisyLinear { shape: self.0.shape, noise, base, delta_weight, delta_bias };
            wrap(layer.forward(arguments[0], out))
        })
    }

    fn backward<T: Element>(&self, arguments: &[&[T]], grad: &[T], out: Grads<'_, T>) -> Result<()> {
        let (delta_weight, delta_bias) = dense_arguments(arguments);
        let (delta_weight, delta_bias) = (delta_weight.copied(), delta_bias.copied());
        let mut out = out.into_iter();
        let mut next = || out.next().flatten();
        let input = next();
        let grads = cpu::NoisyLinearGrads {
            input,
            delta_weight: if delta_weight.is_some() { next() } else { None },
            delta_bias: next(),
        };
        self.0.with(|noise, base| {
            let layer = cpu::NoisyLinear { shape: self.0.shape, noise, base, delta_weight, delta_bias };
            wrap(layer.backward(arguments[0], grad, grads))
        })
    }

    #[cfg(feature = "candle-cuda")]
    fn forward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        self.0.on_device(|noise, base| {
            let layer = self.on_device(noise, base, arguments);
            let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
            wrap(gpu.operators.noisy_linear(&layer, &arguments[0], out, &mut workspace, &gpu.stream))
        })
    }

    #[cfg(feature = "candle-cuda")]
    fn backward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        grad: &CudaView<'_, T>,
        wanted: &[bool],
    ) -> Result<Gradients<T>> {
        let mut out = places(gpu, arguments, wanted)?;
        self.0.on_device(|noise, base| {
            let layer = self.on_device(noise, base, arguments);
            let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
            let mut places = out.iter_mut().map(output);
            let mut next = || places.next().flatten();
            let grads = cuda::NoisyLinearGrads {
                input: next(),
                delta_weight: if layer.delta_weight.is_some() { next() } else { None },
                delta_bias: next(),
            };
            let (x, stream) = (&arguments[0], &gpu.stream);
            wrap(gpu.operators.noisy_linear_backward(&layer, x, grad, grads, &mut workspace, stream))
        })?;
        Ok(out)
    }
}

/// ΔW and Δb among the arguments of a [`DenseKernel`].
fn dense_arguments<A>(arguments: &[A]) -> (Option<&A>, Option<&A>) {
    match arguments {
        [_, weight, bias] => (Some(weight), Some(bias)),
        [_, bias] => (None, Some(bias)),
        _ => (None, None),
    }
}
