//! The noisy layer with the paper's main adapter: LoRA mul, VPT add, or both.

#[cfg(feature = "candle-cuda")]
use super::device::{self, CudaSlice, CudaView, DevicePtr, Gpu, Gradients, output, places};
#[cfg(feature = "candle-cuda")]
use super::joined::inputs;
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
        base: Option<cpu::Base<'a, T>>,
        parameters: &'a [T],
    ) -> Result<cpu::LoraMulLinear<'a, T>> {
        let [lora_b, lora_a, delta_bias, down, up] = self.parts.parts(parameters);
        let (rank, prompt_rank, scale) = (self.rank, self.prompt_rank, Element::from_f64(self.scale));
        Ok(cpu::LoraMulLinear {
            shape: self.layer.shape,
            noise,
            base: base.ok_or_else(Self::no_base)?,
            lora: lora_a.zip(lora_b).map(|(lora_a, lora_b)| Lora { rank, lora_a, lora_b, scale }),
            prompt: down.zip(up).map(|(down, up)| Prompt { rank: prompt_rank, down, up }),
            delta_bias,
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
        parameters: &'a [Option<CudaView<'_, T>>; 5],
    ) -> Result<cuda::LoraMulLinear<&'a dyn DevicePtr<T>, cuda::Noise<'a>>> {
        let [lora_b, lora_a, delta_bias, down, up] = inputs(parameters);
        let (rank, prompt_rank, scale) = (self.rank, self.prompt_rank, self.scale as f32);
        Ok(cuda::LoraMulLinear {
            shape: self.layer.shape,
            noise,
            base: base.ok_or_else(Self::no_base)?,
            lora: lora_a.zip(lora_b).map(|(lora_a, lora_b)| Lora { rank, lora_a, lora_b, scale }),
            prompt: down.zip(up).map(|(down, up)| Prompt { rank: prompt_rank, down, up }),
            delta_bias,
            allow_tf32: gemm_reduced_precision_f32(),
        })
    }
}

impl Kernel for LoraMulKernel {
    const NAME: &'static str = "lora_mul_linear";

    fn shape(&self, arguments: &[&Shape]) -> Result<Shape> {
        self.layer.out_shape(arguments[0])
    }

    fn forward<T: Element>(&self, arguments: &[&[T]], out: &mut [T]) -> Result<()> {
        self.layer.with(|noise, base| {
            let layer = self.linear(noise, base, arguments[1])?;
            wrap(layer.forward(arguments[0], out))
        })
    }

    fn backward<T: Element>(&self, arguments: &[&[T]], grad: &[T], mut out: Grads<'_, T>) -> Result<()> {
        let [lora_b, lora_a, delta_bias, prompt_down, prompt_up] = self.parts.places(out[1].take());
        let input = out[0].take();
        let grads = LoraMulLinearGrads { input, lora_a, lora_b, prompt_down, prompt_up, delta_bias };
        self.layer.with(|noise, base| {
            let layer = self.linear(noise, base, arguments[1])?;
            wrap(layer.backward(Some(arguments[0]), grad, grads))
        })
    }

    #[cfg(feature = "candle-cuda")]
    fn forward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        let parameters = self.parts.views(&arguments[1]);
        self.layer.on_device(|noise, base| {
            let layer = self.on_device(noise, base, &parameters)?;
            let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
            wrap(gpu.operators.lora_mul_linear(&layer, &arguments[0], out, &mut workspace, &gpu.stream))
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
        let parameters = self.parts.views(&arguments[1]);
        let mut out = places(gpu, arguments, wanted)?;
        let [input, joined] = &mut out[..] else { candle_core::bail!("lora_mul_linear takes two arguments") };
        self.parts.with_places(joined.as_mut(), |mut places| {
            self.layer.on_device(|noise, base| {
                let layer = self.on_device(noise, base, &parameters)?;
                let [lora_b, lora_a, delta_bias, prompt_down, prompt_up] = places.each_mut().map(output);
                let input = output(input);
                let grads = LoraMulLinearGrads { input, lora_a, lora_b, prompt_down, prompt_up, delta_bias };
                let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
                let (x, stream, operators) = (&arguments[0], &gpu.stream, &gpu.operators);
                wrap(operators.lora_mul_linear_backward(&layer, Some(x), grad, grads, &mut workspace, stream))
            })
        })?;
        Ok(out)
    }
}
