//! A scalar whose value and gradient are known.

#[cfg(feature = "candle-cuda")]
use super::device;
use super::{Element, by_dtype};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};
#[cfg(feature = "candle-cuda")]
use candle_core::{CudaStorage, backend::BackendDevice};

/// A scalar whose value and gradient were computed together beforehand.
struct Scalar {
    value: f64,
    gradient: Tensor,
}

impl CustomOp1 for Scalar {
    fn name(&self) -> &'static str {
        "pace_loss"
    }
    fn cpu_fwd(&self, s: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(self.name(), s.dtype(), T => {
            let value: T = Element::from_f64(self.value);
            Ok((T::to_cpu_storage_owned(vec![value]), Shape::from(())))
        })
    }
    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        device::by_dtype!(self.name(), s.dtype(), T => {
            let value = <T as WithDType>::from_f64(self.value);
            Ok((s.device().storage_from_slice(&[value])?, Shape::from(())))
        })
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.gradient.broadcast_mul(grad)?))
    }
}

/// The scalar `value`, whose gradient to `x` is `gradient`.
pub(in crate::candle) fn scalar(x: &Tensor, value: f64, gradient: Tensor) -> Result<Tensor> {
    x.apply_op1(Scalar { value, gradient })
}
