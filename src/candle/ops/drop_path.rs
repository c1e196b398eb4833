//! DropPath that drops the same samples in both branches.

#[cfg(feature = "candle-cuda")]
use super::device::{self, CudaSlice, CudaView, Gpu};
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

impl Kernel<1> for DropPathKernel {
    const NAME: &'static str = "shared_drop_path";

    fn shape(&self, [x]: [&Shape; 1]) -> Result<Shape> {
        Ok(x.clone())
    }

    fn forward<T: Element>(&self, [x]: [&[T]; 1], out: &mut [T]) -> Result<()> {
        let mask = self.mask::<T>()?;
        wrap(cpu::shared_drop_path(self.branches, self.features, &mask, x, out))
    }

    fn backward<T: Element>(&self, _: [&[T]; 1], grad: &[T], [dx]: Grads<'_, T, 1>) -> Result<()> {
        let Some(dx) = dx else { return Ok(()) };
        let mask = self.mask::<T>()?;
        wrap(cpu::shared_drop_path_backward(self.branches, self.features, &mask, grad, dx))
    }

    #[cfg(feature = "candle-cuda")]
    fn forward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        [x]: &[CudaView<'_, T>; 1],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        let Self { branches, batch, features, .. } = *self;
        let (mask, stream) = (self.on_device(), &gpu.stream);
        wrap(gpu.operators.shared_drop_path(branches, batch, features, mask, x, out, stream))
    }

    #[cfg(feature = "candle-cuda")]
    fn backward_cuda<T: device::Element>(
        &self,
        gpu: &Gpu,
        _: &[CudaView<'_, T>; 1],
        grad: &CudaView<'_, T>,
        [dx]: &mut [Option<CudaSlice<T>>; 1],
    ) -> Result<()> {
        let Some(dx) = dx else { return Ok(()) };
        let Self { branches, batch, features, .. } = *self;
        let (mask, stream) = (self.on_device(), &gpu.stream);
        let operators = &gpu.operators;
        wrap(operators.shared_drop_path_backward(branches, batch, features, mask, grad, dx, stream))
    }
}
