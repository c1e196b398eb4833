//! What the noisy layers share: their noise and their frozen base.

use super::Element;
#[cfg(feature = "candle-cuda")]
use super::device::{self, DevicePtr, input, with_views};
use super::with_slices;
use crate::cpu;
#[cfg(feature = "candle-cuda")]
use crate::cuda;
use crate::noise::{Generator, Noise, NoiseShape};
use crate::shape::LinearShape;
use candle_core::{Result, Shape, Tensor};

/// Where one layer's `z` comes from.
#[derive(Debug, Clone)]
pub(in crate::candle) enum LayerNoise {
    Off,
    Generated(Generator),
    /// Contiguous; `[R, N]` or `[R, T, N]`.
    Given(Tensor, NoiseShape),
}

impl LayerNoise {
    /// Calls `body` with the elements.
    pub(super) fn with<T: Element, R>(&self, body: impl FnOnce(Noise<&[T]>) -> Result<R>) -> Result<R> {
        match self {
            Self::Off => body(Noise::Off),
            Self::Generated(generator) => body(Noise::Generated(*generator)),
            Self::Given(z, shape) => {
                with_slices("z", &[z], |slices| body(Noise::Given { z: slices[0], shape: *shape }))
            }
        }
    }

    /// The same on a device.
    #[cfg(feature = "candle-cuda")]
    pub(super) fn on_device<R>(&self, body: impl FnOnce(cuda::Noise<'_>) -> Result<R>) -> Result<R> {
        match self {
            Self::Off => body(cuda::Noise::Off),
            Self::Generated(generator) => body(cuda::Noise::Generated(*generator)),
            Self::Given(z, shape) => {
                // The kernels take z in f32 only.
                let z = z.to_dtype(candle_core::DType::F32)?;
                with_views("z", &[&z], |views| body(cuda::Noise::Given { z: &views[0], shape: *shape }))
            }
        }
    }
}

/// The frozen layer of an operation: contiguous tensors that take no gradient.
#[derive(Debug, Clone)]
pub(in crate::candle) struct FrozenLinear {
    pub(in crate::candle) weight: Tensor,
    pub(in crate::candle) bias: Option<Tensor>,
}

impl FrozenLinear {
    /// Calls `body` with the elements.
    pub(super) fn with<T: Element, R>(&self, body: impl FnOnce(cpu::Base<&[T]>) -> Result<R>) -> Result<R> {
        let tensors: Vec<&Tensor> = std::iter::once(&self.weight).chain(&self.bias).collect();
        with_slices("base", &tensors, |slices| {
            body(cpu::Base { weight: slices[0], bias: slices.get(1).copied() })
        })
    }

    /// The same on a device.
    #[cfg(feature = "candle-cuda")]
    pub(super) fn on_device<T: device::Element, R>(
        &self,
        body: impl FnOnce(cuda::Base<&dyn DevicePtr<T>>) -> Result<R>,
    ) -> Result<R> {
        let tensors: Vec<&Tensor> = std::iter::once(&self.weight).chain(&self.bias).collect();
        with_views("base", &tensors, |views| {
            body(cuda::Base { weight: input(&views[0]), bias: views.get(1).map(input) })
        })
    }
}

/// A noisy linear layer's fixed part, shared by the operators on it.
pub(in crate::candle) struct Layer {
    pub(in crate::candle) shape: LinearShape,
    pub(in crate::candle) noise: LayerNoise,
    pub(in crate::candle) base: Option<FrozenLinear>,
    /// Whether weights are never added before they are rounded; the CPU does not round.
    #[cfg_attr(not(feature = "candle-cuda"), expect(dead_code, reason = "devices only"))]
    pub(in crate::candle) exact: bool,
}

impl Layer {
    /// Calls `body` with the elements.
    pub(super) fn with<T: Element, R>(
        &self,
        body: impl FnOnce(Noise<&[T]>, Option<cpu::Base<&[T]>>) -> Result<R>,
    ) -> Result<R> {
        self.noise.with(|noise| match &self.base {
            Some(base) => base.with(|base| body(noise, Some(base))),
            None => body(noise, None),
        })
    }

    /// The same on a device.
    #[cfg(feature = "candle-cuda")]
    pub(super) fn on_device<T: device::Element, R>(
        &self,
        body: impl FnOnce(cuda::Noise<'_>, Option<cuda::Base<&dyn DevicePtr<T>>>) -> Result<R>,
    ) -> Result<R> {
        self.noise.on_device(|noise| match &self.base {
            Some(base) => base.on_device(|base| body(noise, Some(base))),
            None => body(noise, None),
        })
    }

    /// Whether a device may fold ([`cuda::NoisyLinear::fold`]).
    #[cfg(feature = "candle-cuda")]
    pub(super) fn folds<T: device::Element>(&self, noise: &cuda::Noise<'_>) -> bool {
        !self.exact && cuda::folds_by_default(T::DTYPE, noise)
    }

    /// The input's shape with the features, and if the branches part here the rows, replaced.
    pub(super) fn out_shape(&self, x: &Shape) -> Result<Shape> {
        let mut dims = x.dims().to_vec();
        let (Some(last), true) = (dims.len().checked_sub(1), dims.len() >= 2) else {
            candle_core::bail!("a linear layer needs [rows, …, features], got {x:?}");
        };
        dims[0] = self.shape.samples();
        dims[last] = self.shape.out_features;
        Ok(Shape::from(dims))
    }
}
