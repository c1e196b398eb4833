//! The noisy layer with a low-rank adapter.

#[cfg(feature = "candle-cuda")]
use super::device::{self, CudaSlice, CudaView, DevicePtr, Gpu, output};
use super::{Element, Grads, Joined, Kernel, Layer, apply2, wrap};
use crate::cpu;
#[cfg(feature = "candle-cuda")]
use crate::cuda;
use crate::noise::Noise;
#[cfg(feature = "candle-cuda")]
use crate::shape::product;
#[cfg(feature = "candle-cuda")]
use candle_core::cuda_backend::gemm_reduced_precision_f32;
#[cfg(feature = "candle-cuda")]
use candle_core::{CudaStorage, Error};
use candle_core::{Result, Shape, Tensor};
#[cfg(feature = "candle-cuda")]
use std::sync::OnceLock;

/// The low-rank layer, differentiable in `x`, `B [N, r]`, `A [r, K]` and `δb [N]`.
pub(in crate::candle) fn low_rank_linear(
    layer: Layer,
    x: &Tensor,
    lora_b: &Tensor,
    lora_a: &Tensor,
    delta_bias: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    let (parts, parameters) = Joined::new([Some(lora_b), Some(lora_a), Some(delta_bias)])?;
    let kernel = LowRankKernel {
        layer,
        parts,
        rank: lora_a.dim(0)?,
        scale,
        #[cfg(feature = "candle-cuda")]
        s: OnceLock::new(),
    };
    apply2(kernel, x, &parameters)
}

/// `(x, [B, A, δb])`, see [`cpu::LowRankLinear`].
struct LowRankKernel {
    layer: Layer,
    parts: Joined<3>,
    rank: usize,
    scale: f64,
    /// `scale·x·Aᵀ` of the forward pass on a device; the CPU computes it again.
    #[cfg(feature = "candle-cuda")]
    s: OnceLock<CudaStorage>,
}

impl LowRankKernel {
    fn linear<'a, T: Element>(
        &self,
        noise: Noise<&'a [T]>,
        base: Option<cpu::Base<&'a [T]>>,
        parameters: &'a [T],
    ) -> cpu::LowRankLinear<'a, T> {
        let [lora_b, lora_a, delta_bias] = self.parts.parts(parameters);
        cpu::LowRankLinear {
            shape: self.layer.shape,
            noise,
            base,
            rank: self.rank,
            lora_b,
            lora_a,
            delta_bias: Some(delta_bias),
            scale: Element::from_f64(self.scale),
        }
    }
}

#[cfg(feature = "candle-cuda")]
impl LowRankKernel {
    fn on_device<'a, T: device::Element>(
        &self,
        noise: cuda::Noise<'a>,
        base: Option<cuda::Base<&'a dyn DevicePtr<T>>>,
        [lora_b, lora_a, delta_bias]: &'a [CudaView<'_, T>; 3],
    ) -> cuda::LowRankLinear<&'a dyn DevicePtr<T>, cuda::Noise<'a>> {
        cuda::LowRankLinear {
            shape: self.layer.shape,
            noise,
            base,
            rank: self.rank,
            lora_b,
            lora_a,
            delta_bias: Some(delta_bias),
            scale: self.scale as f32,
            allow_tf32: gemm_reduced_precision_f32(),
        }
    }
}

impl Kernel<2> for LowRankKernel {
    const NAME: &'static str = "low_rank_linear";

    fn shape(&self, [x, _]: [&Shape; 2]) -> Result<Shape> {
        self.layer.out_shape(x)
    }

    fn forward<T: Element>(&self, [x, parameters]: [&[T]; 2], out: &mut [T]) -> Result<()> {
        self.layer.with(|noise, base| wrap(self.linear(noise, base, parameters).forward(x, out)))
    }

    fn backward<T: Element>(
        &self,
        [x, parameters]: [&[T]; 2],
        grad: &[T],
        [input, joined]: Grads<'_, T, 2>,
    ) -> Result<()> {
        let [lora_b, lora_a, delta_bias] = self.parts.places(joined);
        let grads = cpu::LowRankGrads { input, lora_b, lora_a, delta_bias };
        self.layer.with(|noise, base| wrap(self.linear(noise, base, parameters).backward(x, grad, grads)))
    }

    #[cfg(feature = "candle-cuda")]
    fn forward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        [x, parameters]: &[CudaView<'_, T>; 2],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        let parameters = self.parts.views(parameters);
        let mut s = gpu.alloc(wrap(product("s", "[M, r]", &[self.layer.shape.in_rows(), self.rank]))?)?;
        self.layer.on_device(|noise, base| {
            let layer = self.on_device(noise, base, &parameters);
            let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
            wrap(gpu.operators.low_rank_linear(&layer, x, &mut s, out, &mut workspace, &gpu.stream))
        })?;
        // An operation runs forward once.
        self.s.get_or_init(|| CudaStorage::wrap_cuda_slice(s, gpu.candle.clone()));
        Ok(())
    }

    #[cfg(feature = "candle-cuda")]
    fn backward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        [x, parameters]: &[CudaView<'_, T>; 2],
        grad: &CudaView<'_, T>,
        [input, joined]: &mut [Option<CudaSlice<T>>; 2],
    ) -> Result<()> {
        let parameters = self.parts.views(parameters);
        let s = self.s.get().ok_or_else(|| Error::Msg("low_rank_linear: backward before forward".into()))?;
        let s = s.as_cuda_slice::<T>()?;
        self.parts.with_places(joined.as_mut(), |mut places| {
            self.layer.on_device(|noise, base| {
                let layer = self.on_device(noise, base, &parameters);
                let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
                let [lora_b, lora_a, delta_bias] = places.each_mut().map(output);
                let grads = cuda::LowRankGrads { input: output(input), lora_b, lora_a, delta_bias };
                let (operators, stream) = (&gpu.operators, &gpu.stream);
                wrap(operators.low_rank_linear_backward(&layer, x, s, grad, grads, &mut workspace, stream))
            })
        })
    }
}
