//! The dense ΔW of a multiplicative LoRA.

#[cfg(feature = "candle-cuda")]
use super::device::{self, CudaSlice, CudaView, DevicePtr, DevicePtrMut, Gpu, Gradients, input, with_views};
use super::{Element, Grads, Kernel, apply2, places, with_slices, wrap};
use crate::cpu;
#[cfg(feature = "candle-cuda")]
use crate::cuda;
use candle_core::{Result, Shape, Tensor};

/// `ΔW = W0 ⊙ (scale·B·A)`, differentiable in `B [N, r]` and `A [r, K]`.
pub(in crate::candle) fn lora_mul_weight(
    base_weight: &Tensor,
    lora_b: &Tensor,
    lora_a: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    let (out_features, rank) = lora_b.dims2()?;
    let sizes = [out_features, lora_a.dim(1)?, rank];
    apply2(LoraMulKernel { base_weight: base_weight.clone(), sizes, scale }, lora_b, lora_a)
}

/// `(B, A)` to `W0 ⊙ (B·A)`, see [`cpu::lora_mul_weight`].
struct LoraMulKernel {
    base_weight: Tensor,
    sizes: [usize; 3],
    scale: f64,
}

impl LoraMulKernel {
    fn factors<'a, T: Element>(&self, arguments: &[&'a [T]]) -> cpu::LoraFactors<&'a [T], T> {
        let [out_features, in_features, rank] = self.sizes;
        cpu::LoraFactors {
            out_features,
            in_features,
            rank,
            lora_b: arguments[0],
            lora_a: arguments[1],
            scale: Element::from_f64(self.scale),
        }
    }
}

#[cfg(feature = "candle-cuda")]
impl LoraMulKernel {
    fn on_device<'a, T: device::Element>(
        &self,
        arguments: &'a [CudaView<'_, T>],
    ) -> cuda::LoraFactors<&'a dyn DevicePtr<T>> {
        let [out_features, in_features, rank] = self.sizes;
        let (lora_b, lora_a) = (input(&arguments[0]), input(&arguments[1]));
        cuda::LoraFactors { out_features, in_features, rank, lora_b, lora_a, scale: self.scale as f32 }
    }
}

impl Kernel for LoraMulKernel {
    const NAME: &'static str = "lora_mul_weight";

    fn shape(&self, _: &[&Shape]) -> Result<Shape> {
        Ok(Shape::from((self.sizes[0], self.sizes[1])))
    }

    fn forward<T: Element>(&self, arguments: &[&[T]], out: &mut [T]) -> Result<()> {
        with_slices(Self::NAME, &[&self.base_weight], |base| {
            wrap(cpu::lora_mul_weight(self.factors(arguments), base[0], out))
        })
    }

    fn backward<T: Element>(&self, arguments: &[&[T]], grad: &[T], mut out: Grads<'_, T>) -> Result<()> {
        let factors = self.factors(arguments);
        let mut spare = [vec![], vec![]];
        let [lora_b, lora_a] = places(&mut out, &mut spare, [factors.lora_b.len(), factors.lora_a.len()]);
        with_slices(Self::NAME, &[&self.base_weight], |base| {
            wrap(cpu::lora_mul_weight_backward(factors, base[0], grad, cpu::LoraGrads { lora_b, lora_a }))
        })
    }

    #[cfg(feature = "candle-cuda")]
    fn forward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        with_views(Self::NAME, &[&self.base_weight], |base| {
            wrap(gpu.operators.lora_mul_weight(self.on_device(arguments), &base[0], out, &gpu.stream))
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
        let lora = self.on_device(arguments);
        let (mut lora_b, mut lora_a) = (gpu.alloc(arguments[0].len())?, gpu.alloc(arguments[1].len())?);
        let mut workspace = gpu.alloc(lora.workspace_len(T::DTYPE))?;
        with_views(Self::NAME, &[&self.base_weight], |base| {
            let grads =
                cuda::LoraGrads::<&mut dyn DevicePtrMut<T>> { lora_b: &mut lora_b, lora_a: &mut lora_a };
            let (base, stream) = (&base[0], &gpu.stream);
            wrap(gpu.operators.lora_mul_weight_backward(lora, base, grad, grads, &mut workspace, stream))
        })?;
        Ok(vec![Some(lora_b), Some(lora_a)])
    }
}
