//! The noisy layer whose adapter is a dense ΔW.

#[cfg(feature = "candle-cuda")]
use super::device::{self, CudaSlice, CudaView, DevicePtr, Gpu, Gradients, output, places};
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
        base: Option<cpu::Base<'a, T>>,
        arguments: &[&'a [T]],
    ) -> cpu::NoisyLinear<'a, T> {
        let (delta_weight, delta_bias) = (Some(arguments[1]), Some(arguments[2]));
        cpu::NoisyLinear { shape: self.0.shape, noise, base, delta_weight, delta_bias }
    }
}

#[cfg(feature = "candle-cuda")]
impl DenseKernel {
    fn on_device<'a, T: device::Element>(
        &self,
        noise: cuda::Noise<'a>,
        base: Option<cuda::Base<&'a dyn DevicePtr<T>>>,
        arguments: &'a [CudaView<'_, T>],
    ) -> cuda::NoisyLinear<&'a dyn DevicePtr<T>, cuda::Noise<'a>> {
        cuda::NoisyLinear {
            shape: self.0.shape,
            noise,
            base,
            delta_weight: Some(&arguments[1]),
            delta_bias: Some(&arguments[2]),
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
        self.0.with(|noise, base| wrap(self.linear(noise, base, arguments).forward(arguments[0], out)))
    }

    fn backward<T: Element>(&self, arguments: &[&[T]], grad: &[T], mut out: Grads<'_, T>) -> Result<()> {
        let [input, delta_weight, delta_bias] = [0, 1, 2].map(|i| out[i].take());
        let grads = cpu::NoisyLinearGrads { input, delta_weight, delta_bias };
        self.0
            .with(|noise, base| wrap(self.linear(noise, base, arguments).backward(arguments[0], grad, grads)))
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
            let [input, delta_weight, delta_bias] = [0; 3].map(|_| places.next().flatten());
            let grads = cuda::NoisyLinearGrads { input, delta_weight, delta_bias };
            let (x, stream) = (&arguments[0], &gpu.stream);
            wrap(gpu.operators.noisy_linear_backward(&layer, x, grad, grads, &mut workspace, stream))
        })?;
        Ok(out)
    }
}
