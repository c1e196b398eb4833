//! The noisy layer whose adapter is a dense ΔW.

#[cfg(feature = "candle-cuda")]
use super::device::{self, CudaSlice, CudaView, DevicePtr, Gpu, output};
use super::{Element, Grads, Kernel, Layer, apply3, wrap};
use crate::cpu;
#[cfg(feature = "candle-cuda")]
use crate::cuda;
use crate::noise::Noise;
#[cfg(feature = "candle-cuda")]
use candle_core::cuda_backend::gemm_reduced_precision_f32;
use candle_core::{Result, Shape, Tensor};

/// `y = base + ΔW and Δb under noise`, differentiable in `x`, `ΔW` and `Δb`; `Δb` is zero if absent.
pub(in crate::candle) fn noisy_linear(
    layer: Layer,
    x: &Tensor,
    delta_weight: &Tensor,
    delta_bias: Option<&Tensor>,
) -> Result<Tensor> {
    let zeros = || Tensor::zeros(layer.shape.out_features, x.dtype(), x.device());
    let delta_bias = delta_bias.cloned().map_or_else(zeros, Ok)?;
    apply3(DenseKernel(layer), x, delta_weight, &delta_bias)
}

/// `(x, ΔW, Δb)`, see [`cpu::NoisyLinear`].
struct DenseKernel(Layer);

impl DenseKernel {
    fn linear<'a, T: Element>(
        &self,
        noise: Noise<&'a [T]>,
        base: Option<cpu::Base<&'a [T]>>,
        [delta_weight, delta_bias]: [&'a [T]; 2],
    ) -> cpu::NoisyLinear<'a, T> {
        let (delta_weight, delta_bias) = (Some(delta_weight), Some(delta_bias));
        cpu::NoisyLinear { shape: self.0.shape, noise, base, delta_weight, delta_bias, fold: true }
    }
}

#[cfg(feature = "candle-cuda")]
impl DenseKernel {
    fn on_device<'a, T: device::Element>(
        &self,
        noise: cuda::Noise<'a>,
        base: Option<cuda::Base<&'a dyn DevicePtr<T>>>,
        [delta_weight, delta_bias]: &'a [CudaView<'_, T>; 2],
    ) -> cuda::NoisyLinear<&'a dyn DevicePtr<T>, cuda::Noise<'a>> {
        cuda::NoisyLinear {
            shape: self.0.shape,
            noise,
            base,
            delta_weight: Some(delta_weight),
            delta_bias: Some(delta_bias),
            fold: self.0.folds::<T>(&noise),
            allow_tf32: gemm_reduced_precision_f32(),
        }
    }
}

impl Kernel<3> for DenseKernel {
    const NAME: &'static str = "noisy_linear";

    fn shape(&self, [x, ..]: [&Shape; 3]) -> Result<Shape> {
        self.0.out_shape(x)
    }

    fn forward<T: Element>(&self, [x, delta @ ..]: [&[T]; 3], out: &mut [T]) -> Result<()> {
        self.0.with(|noise, base| wrap(self.linear(noise, base, delta).forward(x, out)))
    }

    fn backward<T: Element>(
        &self,
        [x, delta @ ..]: [&[T]; 3],
        grad: &[T],
        [input, delta_weight, delta_bias]: Grads<'_, T, 3>,
    ) -> Result<()> {
        let grads = cpu::NoisyLinearGrads { input, delta_weight, delta_bias };
        self.0.with(|noise, base| wrap(self.linear(noise, base, delta).backward(x, grad, grads)))
    }

    #[cfg(feature = "candle-cuda")]
    fn forward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        [x, delta @ ..]: &[CudaView<'_, T>; 3],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        self.0.on_device(|noise, base| {
            let layer = self.on_device(noise, base, delta);
            let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
            wrap(gpu.operators.noisy_linear(&layer, x, out, &mut workspace, &gpu.stream))
        })
    }

    #[cfg(feature = "candle-cuda")]
    fn backward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        [x, delta @ ..]: &[CudaView<'_, T>; 3],
        grad: &CudaView<'_, T>,
        out: &mut [Option<CudaSlice<T>>; 3],
    ) -> Result<()> {
        self.0.on_device(|noise, base| {
            let layer = self.on_device(noise, base, delta);
            let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
            let [input, delta_weight, delta_bias] = out.each_mut().map(output);
            let grads = cuda::NoisyLinearGrads { input, delta_weight, delta_bias };
            let operators = &gpu.operators;
            wrap(operators.noisy_linear_backward(&layer, x, grad, grads, &mut workspace, &gpu.stream))
        })
    }
}
