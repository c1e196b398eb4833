//! The noisy layer with the paper's main adapter: LoRA mul, VPT add, or both.

#[cfg(feature = "candle-cuda")]
use super::device::{self, CudaSlice, CudaView, DevicePtr, Gpu, output};
use super::{Element, Grads, Joined, Kernel, Layer, apply2, wrap};
use crate::cpu::{self, Lora, LoraMulLinearGrads, Prompt};
#[cfg(feature = "candle-cuda")]
use crate::cuda;
use crate::noise::Noise;
#[cfg(feature = "candle-cuda")]
use candle_core::cuda_backend::gemm_reduced_precision_f32;
use candle_core::{Error, Result, Shape, Tensor};

/// The layer of LoRA mul, VPT add or both, differentiable in `x` and the tensors of the adapter; `δb [N]` is zero if absent.
pub(in crate::candle) fn lora_mul_linear(
    layer: Layer,
    x: &Tensor,
    lora: Option<Lora<&Tensor, f64>>,
    prompt: Option<Prompt<&Tensor>>,
    delta_bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (parts, parameters) = Joined::new([
        lora.map(|lora| lora.lora_b),
        lora.map(|lora| lora.lora_a),
        delta_bias,
        prompt.map(|prompt| prompt.down),
        prompt.map(|prompt| prompt.up),
    ])?;
    let kernel = LoraMulKernel {
        layer,
        parts,
        rank: lora.map_or(0, |lora| lora.rank),
        prompt_rank: prompt.map_or(0, |prompt| prompt.rank),
        scale: lora.map_or(1.0, |lora| lora.scale),
    };
    apply2(kernel, x, &parameters)
}

/// `(x, [B, A, δb, Pd, Pu])`, see [`cpu::LoraMulLinear`].
struct LoraMulKernel {
    layer: Layer,
    parts: Joined<5>,
    rank: usize,
    prompt_rank: usize,
    scale: f64,
}

impl LoraMulKernel {
    fn linear<'a, T: Element>(
        &self,
        noise: Noise<&'a [T]>,
        base: Option<cpu::Base<&'a [T]>>,
        parameters: &'a [T],
    ) -> Result<cpu::LoraMulLinear<'a, T>> {
        let [lora_b, lora_a, delta_bias, down, up] = self.parts.parts(parameters);
        let (rank, prompt_rank, scale) = (self.rank, self.prompt_rank, Element::from_f64(self.scale));
        Ok(cpu::LoraMulLinear {
            shape: self.layer.shape,
            noise,
            base: base.ok_or_else(Self::no_base)?,
            lora: (rank > 0).then_some(Lora { rank, lora_a, lora_b, scale }),
            prompt: (prompt_rank > 0).then_some(Prompt { rank: prompt_rank, down, up }),
            delta_bias: (!delta_bias.is_empty()).then_some(delta_bias),
            fold: true,
        })
    }

    fn no_base() -> Error {
        Error::Msg("lora_mul_linear: there is no frozen layer".into())
    }
}

#[cfg(feature = "candle-cuda")]
impl LoraMulKernel {
    fn on_device<'a, T: device::Element>(
        &self,
        noise: cuda::Noise<'a>,
        base: Option<cuda::Base<&'a dyn DevicePtr<T>>>,
        [lora_b, lora_a, delta_bias, down, up]: &'a [CudaView<'_, T>; 5],
    ) -> Result<cuda::LoraMulLinear<&'a dyn DevicePtr<T>, cuda::Noise<'a>>> {
        let (rank, prompt_rank, scale) = (self.rank, self.prompt_rank, self.scale as f32);
        Ok(cuda::LoraMulLinear {
            shape: self.layer.shape,
            noise,
            base: base.ok_or_else(Self::no_base)?,
            lora: (rank > 0).then_some(Lora { rank, lora_a, lora_b, scale }),
            prompt: (prompt_rank > 0).then_some(Prompt { rank: prompt_rank, down, up }),
            delta_bias: (!delta_bias.is_empty()).then_some(delta_bias),
            fold: self.layer.folds::<T>(&noise),
            allow_tf32: gemm_reduced_precision_f32(),
        })
    }
}

impl Kernel<2> for LoraMulKernel {
    const NAME: &'static str = "lora_mul_linear";

    fn shape(&self, [x, _]: [&Shape; 2]) -> Result<Shape> {
        self.layer.out_shape(x)
    }

    fn forward<T: Element>(&self, [x, parameters]: [&[T]; 2], out: &mut [T]) -> Result<()> {
        self.layer.with(|noise, base| wrap(self.linear(noise, base, parameters)?.forward(x, out)))
    }

    fn backward<T: Element>(
        &self,
        [x, parameters]: [&[T]; 2],
        grad: &[T],
        [input, joined]: Grads<'_, T, 2>,
    ) -> Result<()> {
        let [lora_b, lora_a, delta_bias, prompt_down, prompt_up] = self.parts.places(joined);
        let grads = LoraMulLinearGrads { input, lora_a, lora_b, prompt_down, prompt_up, delta_bias };
        self.layer
            .with(|noise, base| wrap(self.linear(noise, base, parameters)?.backward(Some(x), grad, grads)))
    }

    #[cfg(feature = "candle-cuda")]
    fn forward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        [x, parameters]: &[CudaView<'_, T>; 2],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        let parameters = self.parts.views(parameters);
        self.layer.on_device(|noise, base| {
            let layer = self.on_device(noise, base, &parameters)?;
            let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
            wrap(gpu.operators.lora_mul_linear(&layer, x, out, &mut workspace, &gpu.stream))
        })
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
        self.parts.with_places(joined.as_mut(), |mut places| {
            self.layer.on_device(|noise, base| {
                let layer = self.on_device(noise, base, &parameters)?;
                let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
                let input = output(input);
                let [lora_b, lora_a, delta_bias, prompt_down, prompt_up] = places.each_mut().map(output);
                let grads = LoraMulLinearGrads { input, lora_a, lora_b, prompt_down, prompt_up, delta_bias };
                let (operators, stream) = (&gpu.operators, &gpu.stream);
                wrap(operators.lora_mul_linear_backward(&layer, Some(x), grad, grads, &mut workspace, stream))
            })
        })
    }
}
