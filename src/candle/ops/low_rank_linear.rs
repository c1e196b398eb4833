//! The noisy layer with a low-rank adapter.

#[cfg(feature = "candle-cuda")]
use super::device::{self, CudaSlice, CudaView, DevicePtr, DevicePtrMut, Gpu, Gradients, output, places};
use super::{Element, Grads, Kernel, Layer, apply3, wrap};
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
    let joined = Tensor::cat(&[&lora_b.flatten_all()?, delta_bias], 0)?;
    let kernel = LowRankKernel {
        layer,
        rank: lora_a.dim(0)?,
        scale,
        #[cfg(feature = "candle-cuda")]
        s: OnceLock::new(),
    };
    apply3(kernel, x, &joined, lora_a)
}

/// `(x, [B, δb] [N·r + N], A)`, see [`cpu::LowRankLinear`]: candle's operations take three tensors at most.
struct LowRankKernel {
    layer: Layer,
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
        joined: &'a [T],
        lora_a: &'a [T],
    ) -> cpu::LowRankLinear<'a, T> {
        let (lora_b, bias) = joined.split_at(self.b_len());
        cpu::LowRankLinear {
            shape: self.layer.shape,
            noise,
            base,
            rank: self.rank,
            lora_b,
            lora_a,
            delta_bias: Some(bias),
            scale: Element::from_f64(self.scale),
        }
    }

    /// Where `δb` begins behind `B`.
    fn b_len(&self) -> usize {
        self.layer.shape.out_features * self.rank
    }
}

#[cfg(feature = "candle-cuda")]
impl LowRankKernel {
    fn on_device<'a, T: device::Element>(
        &self,
        noise: cuda::Noise<'a>,
        base: Option<cuda::Base<&'a dyn DevicePtr<T>>>,
        joined: &'a (CudaView<'_, T>, CudaView<'_, T>),
        lora_a: &'a CudaView<'_, T>,
    ) -> cuda::LowRankLinear<&'a dyn DevicePtr<T>, cuda::Noise<'a>> {
        cuda::LowRankLinear {
            shape: self.layer.shape,
            noise,
            base,
            rank: self.rank,
            lora_b: &joined.0,
            lora_a,
            delta_bias: Some(&joined.1),
            scale: self.scale as f32,
            allow_tf32: gemm_reduced_precision_f32(),
        }
    }

    fn too_short() -> Error {
        Error::Msg("low_rank_linear: there is no δb behind B".into())
    }
}

impl Kernel for LowRankKernel {
    const NAME: &'static str = "low_rank_linear";

    fn shape(&self, arguments: &[&Shape]) -> Result<Shape> {
        self.layer.out_shape(arguments[0])
    }

    fn forward<T: Element>(&self, arguments: &[&[T]], out: &mut [T]) -> Result<()> {
        self.layer.with(|noise, base| {
            let layer = self.linear(noise, base, arguments[1], arguments[2]);
            wrap(layer.forward(arguments[0], out))
        })
    }

    fn backward<T: Element>(&self, arguments: &[&[T]], grad: &[T], mut out: Grads<'_, T>) -> Result<()> {
        let (lora_b, delta_bias) = out[1].take().map(|joined| joined.split_at_mut(self.b_len())).unzip();
        let grads = cpu::LowRankGrads { input: out[0].take(), lora_b, lora_a: out[2].take(), delta_bias };
        self.layer.with(|noise, base| {
            let layer = self.linear(noise, base, arguments[1], arguments[2]);
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
        let joined = arguments[1].try_split_at(self.b_len()).ok_or_else(Self::too_short)?;
        let mut s = gpu.alloc(wrap(product("s", "[M, r]", &[self.layer.shape.in_rows(), self.rank]))?)?;
        self.layer.on_device(|noise, base| {
            let layer = self.on_device(noise, base, &joined, &arguments[2]);
            let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
            let (x, stream) = (&arguments[0], &gpu.stream);
            wrap(gpu.operators.low_rank_linear(&layer, x, &mut s, out, &mut workspace, stream))
        })?;
        // An operation runs forward once.
        self.s.get_or_init(|| CudaStorage::wrap_cuda_slice(s, gpu.candle.clone()));
        Ok(())
    }

    #[cfg(feature = "candle-cuda")]
    fn backward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        grad: &CudaView<'_, T>,
        wanted: &[bool],
    ) -> Result<Gradients<T>> {
        let joined = arguments[1].try_split_at(self.b_len()).ok_or_else(Self::too_short)?;
        let s = self.s.get().ok_or_else(|| Error::Msg("low_rank_linear: backward before forward".into()))?;
        let s = s.as_cuda_slice::<T>()?;
        let mut out = places(gpu, arguments, wanted)?;
        let [input, joined_grad, lora_a] = &mut out[..] else {
            candle_core::bail!("low_rank_linear takes three arguments");
        };
        let mut halves = match joined_grad {
            Some(place) => Some(place.try_split_at_mut(self.b_len()).ok_or_else(Self::too_short)?),
            None => None,
        };
        self.layer.on_device(|noise, base| {
            let layer = self.on_device(noise, base, &joined, &arguments[2]);
            let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
            let (lora_b, delta_bias) = match &mut halves {
                Some((lora_b, bias)) => (Some(lora_b as &mut dyn DevicePtrMut<T>), Some(bias as _)),
                None => (None, None),
            };
            let grads =
                cuda::LowRankGrads { input: output(input), lora_b, lora_a: output(lora_a), delta_bias };
            let (x, stream) = (&arguments[0], &gpu.stream);
            wrap(gpu.operators.low_rank_linear_backward(&layer, x, s, grad, grads, &mut workspace, stream))
        })?;
        Ok(out)
    }
}
