//! Base and perturbed adapter output, for layers that compute both themselves.

#[cfg(feature = "candle-cuda")]
use super::device::{self, CudaSlice, CudaView, Gpu};
use super::{Element, Grads, Kernel, LayerNoise, apply2, wrap};
use crate::cpu;
use crate::noise::Generator;
use crate::shape::LinearShape;
use candle_core::{Result, Shape, Tensor};

/// `base + z⊙a` for layers that compute both terms themselves, differentiable in both; `[rows, …, features]`.
///
/// `generator` is the noise and `branches` says how many branches the rows hold; `None` is plain addition.
///
/// # Errors
/// If the shapes differ or do not fit the branches, or the tensors are on a device that has no such operator.
pub fn noisy_add(base: &Tensor, a: &Tensor, generator: Option<Generator>, branches: usize) -> Result<Tensor> {
    let dims = a.dims();
    let Some(rows) = dims.first().filter(|&&rows| branches > 0 && rows % branches == 0 && dims.len() >= 2)
    else {
        candle_core::bail!("`a` needs [rows, …, features] with rows divisible by {branches}, got {dims:?}");
    };
    let features = dims[dims.len() - 1];
    let shape = LinearShape {
        branches,
        batch: rows / branches,
        tokens: dims[1..dims.len() - 1].iter().product(),
        in_features: features,
        out_features: features,
        shared_input: false,
    };
    let noise = generator.map_or(LayerNoise::Off, LayerNoise::Generated);
    apply2(NoisyAddKernel { shape, noise }, base, a)
}

/// `(base, a)` to `base + z⊙a`, see [`cpu::noisy_epilogue`].
struct NoisyAddKernel {
    shape: LinearShape,
    noise: LayerNoise,
}

impl Kernel<2> for NoisyAddKernel {
    const NAME: &'static str = "noisy_epilogue";

    fn shape(&self, [base, a]: [&Shape; 2]) -> Result<Shape> {
        if base != a {
            candle_core::bail!("shapes {base:?} and {a:?} differ");
        }
        Ok(a.clone())
    }

    fn forward<T: Element>(&self, [base, a]: [&[T]; 2], out: &mut [T]) -> Result<()> {
        out.copy_from_slice(base);
        self.noise.with(|noise| wrap(cpu::noisy_epilogue(self.shape, noise, a, out)))
    }

    fn backward<T: Element>(&self, _: [&[T]; 2], grad: &[T], [base, a]: Grads<'_, T, 2>) -> Result<()> {
        if let Some(base) = base {
            base.copy_from_slice(grad);
        }
        match a {
            Some(a) => {
                self.noise.with(|noise| wrap(cpu::noisy_epilogue_backward(self.shape, noise, grad, a)))
            }
            None => Ok(()),
        }
    }

    #[cfg(feature = "candle-cuda")]
    fn forward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        [base, a]: &[CudaView<'_, T>; 2],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        gpu.candle.memcpy_dtod(base, out)?;
        let (shape, stream) = (self.shape, &gpu.stream);
        self.noise.on_device(|noise| wrap(gpu.operators.noisy_epilogue(shape, noise, a, out, stream)))
    }

    #[cfg(feature = "candle-cuda")]
    fn backward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        _: &[CudaView<'_, T>; 2],
        grad: &CudaView<'_, T>,
        [base, a]: &mut [Option<CudaSlice<T>>; 2],
    ) -> Result<()> {
        if let Some(base) = base {
            gpu.candle.memcpy_dtod(grad, base)?;
        }
        if let Some(a) = a {
            let (shape, stream) = (self.shape, &gpu.stream);
            self.noise.on_device(|noise| {
                wrap(gpu.operators.noisy_epilogue_backward(shape, noise, grad, a, stream))
            })?;
        }
        Ok(())
    }
}
