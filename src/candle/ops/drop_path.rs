//! DropPath that drops the same samples in both branches.

#[cfg(feature = "candle-cuda")]
use super::device::{self, CudaSlice, CudaView, Gpu, Gradients};
use super::{Element, Grads, Kernel, wrap};
use crate::cpu;
#[cfg(feature = "candle-cuda")]
use crate::cuda::Mask;
use crate::noise::{Key, drop_path_mask};
use candle_core::{Result, Shape};

/// Shared DropPath, see [`cpu::shared_drop_path`]; both passes draw the same mask.
pub(in crate::candle) struct DropPathKernel {
    pub(in crate::candle) branches: usize,
    pub(in crate::candle) batch: usize,
    pub(in crate::candle) features: usize,
    pub(in crate::candle) key: Key,
    pub(in crate::candle) probability: f64,
    pub(in crate::candle) first_sample: u64,
}

impl DropPathKernel {
    fn mask<T: Element>(&self) -> Result<Vec<T>> {
        let mut mask = vec![T::zero(); self.batch];
        wrap(drop_path_mask(self.key, self.probability, self.first_sample, &mut mask))?;
        Ok(mask)
    }
}

#[cfg(feature = "candle-cuda")]
impl DropPathKernel {
    /// Bitwise the mask of the CPU.
    fn on_device(&self) -> Mask<'static> {
        let Self { key, probability: drop_probability, first_sample, .. } = *self;
        Mask::Generated { key, key_address: None, drop_probability, first_sample }
    }
}

impl Kernel for DropPathKernel {
    const NAME: &'static str = "shared_drop_path";

    fn shape(&self, arguments: &[&Shape]) -> Result<Shape> {
        Ok(arguments[0].clone())
    }

    fn forward<T: Element>(&self, arguments: &[&[T]], out: &mut [T]) -> Result<()> {
        let mask = self.mask::<T>()?;
        wrap(cpu::shared_drop_path(self.branches, self.features, &mask, arguments[0], out))
    }

    fn backward<T: Element>(&self, _: &[&[T]], grad: &[T], mut out: Grads<'_, T>) -> Result<()> {
        let Some(dx) = &mut out[0] else { return Ok(()) };
        let mask = self.mask::<T>()?;
        wrap(cpu::shared_drop_path_backward(self.branches, self.features, &mask, grad, dx))
    }

    #[cfg(feature = "candle-cuda")]
    fn forward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        let Self { branches, batch, features, .. } = *self;
        let (mask, x, stream) = (self.on_device(), &arguments[0], &gpu.stream);
        wrap(gpu.operators.shared_drop_path(branches, batch, features, mask, x, out, stream))
    }

    #[cfg(feature = "candle-cuda")]
    fn backward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        _: &[CudaView<'_, T>],
        grad: &CudaView<'_, T>,
        _: &[bool],
    ) -> Result<Gradients<T>> {
        let Self { branches, batch, features, .. } = *self;
        let (mask, stream) = (self.on_device(), &gpu.stream);
        let mut dx = gpu.alloc(grad.len())?;
        let operators = &gpu.operators;
        wrap(operators.shared_drop_path_backward(branches, batch, features, mask, grad, &mut dx, stream))?;
        Ok(vec![Some(dx)])
    }
}
