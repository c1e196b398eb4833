//! Where a test of the candle door runs, and in which precision.

use candle_core::{DType, Device, Result, Tensor};

pub struct On {
    pub device: Device,
    pub dtype: DType,
}

impl On {
    pub const CPU: Self = Self { device: Device::Cpu, dtype: DType::F64 };
    pub const CPU_F32: Self = Self { device: Device::Cpu, dtype: DType::F32 };

    /// CUDA device 0, or why there is none.
    pub fn cuda() -> std::result::Result<Self, String> {
        #[cfg(not(feature = "candle-cuda"))]
        return Err("built without the feature `candle-cuda`".into());
        #[cfg(feature = "candle-cuda")]
        {
            // Asked first: candle panics where there is no driver.
            pace_kernels::cuda::Device::open(0).map_err(|error| format!("no CUDA device: {error}"))?;
            let device = Device::new_cuda(0).map_err(|error| format!("no CUDA device: {error}"))?;
            Ok(Self { device, dtype: DType::F32 })
        }
    }

    /// A tensor, there.
    pub fn place(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.to_dtype(self.dtype)?.to_device(&self.device)
    }

    /// The one of two tolerances that suits the precision.
    pub fn tolerance(&self, double: f64, single: f64) -> f64 {
        if self.dtype == DType::F64 { double } else { single }
    }
}

/// The elements of a tensor from anywhere.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}
