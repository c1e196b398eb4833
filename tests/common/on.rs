//! Where a test of the candle binding runs, and in which precision.

use candle_core::{DType, Device, Result, Tensor};

pub struct On {
    pub device: Device,
    pub dtype: DType,
}

impl On {
    pub const CPU: Self = Self { device: Device::Cpu, dtype: DType::F64 };
    pub const CPU_F32: Self = Self { device: Device::Cpu, dtype: DType::F32 };

    /// CUDA device 0, or why there is none.
    #[cfg(feature = "candle-cuda")]
    pub fn cuda(dtype: DType) -> std::result::Result<Self, String> {
        // Asked first: it says what is missing, a device or the kernels.
        pace_kernels::cuda::Device::open(0).map_err(|error| format!("no CUDA device: {error}"))?;
        let device = Device::new_cuda(0).map_err(|error| format!("no CUDA device in candle: {error}"))?;
        Ok(Self { device, dtype })
    }

    #[cfg(not(feature = "candle-cuda"))]
    pub fn cuda(_: DType) -> std::result::Result<Self, String> {
        Err("built without the feature `candle-cuda`".into())
    }

    /// A tensor, there.
    pub fn place(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.to_dtype(self.dtype)?.to_device(&self.device)
    }

    /// The tolerance that suits the precision; in 16 bits every number is rounded to 2 or 3 digits.
    pub fn tolerance(&self, double: f64, single: f64) -> f64 {
        match self.dtype {
            DType::F64 => double,
            DType::F32 => single,
            _ => 5e-2,
        }
    }
}

/// The elements of a tensor from anywhere.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}
