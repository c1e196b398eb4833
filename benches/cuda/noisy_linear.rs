//! Dense noisy layer: forward with two products, forward with both folded into one, and backward with all gradients.

use crate::gpu::{Gpu, Value};
use crate::{Case, Fallible, Launch, common, layer};
use half::bf16;
use pace_kernels::LinearShape;
use pace_kernels::cuda::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use pace_kernels::cuda::{Base, Noise, NoisyLinear, NoisyLinearGrads};
use pace_kernels::noise::NoiseShape;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for layer in common::VIT_B.map(layer) {
        cases.extend([forward::<bf16>(layer, false), forward::<bf16>(layer, true), backward::<bf16>(layer)]);
    }
    let layer = layer(common::VIT_B[0]);
    cases.extend([forward::<f32>(layer, false), forward::<f32>(layer, true), backward::<f32>(layer)]);
    cases
}

/// What both passes read.
struct Tensors<T> {
    x: CudaSlice<T>,
    weight: CudaSlice<T>,
    bias: CudaSlice<T>,
    delta_weight: CudaSlice<T>,
    delta_bias: CudaSlice<T>,
}

impl<T: Value> Tensors<T> {
    fn new(gpu: &Gpu, shape: LinearShape) -> Fallible<Self> {
        let (k, n) = (shape.in_features, shape.out_features);
        Ok(Self {
            x: gpu.values(shape.in_rows() * k)?,
            weight: gpu.values(n * k)?,
            bias: gpu.values(n)?,
            delta_weight: gpu.values(n * k)?,
            delta_bias: gpu.values(n)?,
        })
    }

    fn layer(&self, shape: LinearShape, fold: bool) -> NoisyLinear<&dyn DevicePtr<T>, Noise<'_>> {
        NoisyLinear {
            shape,
            noise: Noise::Generated { generator: common::generator(NoiseShape::PerSample), key: None },
            base: Some(Base { weight: &self.weight, bias: Some(&self.bias) }),
            delta_weight: Some(&self.delta_weight),
            delta_bias: Some(&self.delta_bias),
            fold,
            allow_tf32: false,
        }
    }
}

fn forward<T: Value>(shape: LinearShape, fold: bool) -> Case {
    let (m, k, n) = (shape.out_rows(), shape.in_features, shape.out_features);
    Case {
        operator: if fold { "noisy_linear folded forward" } else { "noisy_linear exact forward" },
        dtype: T::NAME,
        shape: common::name(&shape),
        bytes: size_of::<T>() * (m * k + 2 * n * k + 2 * n + m * n),
        flop: 2 * m * k * n,
        against_product: true,
        set: Box::new(move |gpu| {
            let (tensors, mut y) = (Tensors::<T>::new(gpu, shape)?, gpu.zeros::<T>(m * n)?);
            let launch: Launch = Box::new(move |gpu: &Gpu| {
                let layer = tensors.layer(shape, fold);
                Ok(gpu.device.noisy_linear(&layer, &tensors.x, &mut y, &gpu.stream)?)
            });
            Ok(launch)
        }),
    }
}

fn backward<T: Value>(shape: LinearShape) -> Case {
    let (m, k, n) = (shape.out_rows(), shape.in_features, shape.out_features);
    Case {
        operator: "noisy_linear backward",
        dtype: T::NAME,
        shape: common::name(&shape),
        // x, dy, both weights; dx, dΔW, dΔb.
        bytes: size_of::<T>() * (2 * m * k + m * n + 3 * n * k + n),
        // dx and dΔW.
        flop: 4 * m * k * n,
        against_product: false,
        set: Box::new(move |gpu| {
            let tensors = Tensors::<T>::new(gpu, shape)?;
            let dy = gpu.values::<T>(m * n)?;
            let (mut dx, mut dw, mut db) =
                (gpu.zeros::<T>(m * k)?, gpu.zeros::<T>(n * k)?, gpu.zeros::<T>(n)?);
            // An allocation has one element at least.
            let workspace_len = tensors.layer(shape, false).workspace_len().max(1);
            let mut workspace = gpu.zeros::<f32>(workspace_len)?;
            let launch: Launch = Box::new(move |gpu: &Gpu| {
                let layer = tensors.layer(shape, false);
                let grads = NoisyLinearGrads {
                    input: Some(&mut dx as &mut dyn DevicePtrMut<T>),
                    delta_weight: Some(&mut dw),
                    delta_bias: Some(&mut db),
                };
                let (x, stream) = (&tensors.x, &gpu.stream);
                Ok(gpu.device.noisy_linear_backward(&layer, x, &dy, grads, &mut workspace, stream)?)
            });
            Ok(launch)
        }),
    }
}
