//! Low-rank noisy layer (LoRA add), rank 16, by each family: forward, and backward with all gradients.

use crate::gpu::{Gpu, Value};
use crate::{Case, Fallible, Launch, common, layer};
use half::bf16;
use pace_kernels::LinearShape;
use pace_kernels::cuda::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use pace_kernels::cuda::{Base, Device, Family, LowRankGrads, LowRankLinear, Noise};
use pace_kernels::noise::NoiseShape;

const RANK: usize = 16;

/// For the family that `device` is set to.
pub fn cases(device: &Device, layers: &[LinearShape]) -> Vec<Case> {
    let mut cases = Vec::new();
    for &layer in layers {
        cases.extend([forward::<bf16>(device, layer), backward::<bf16>(device, layer)]);
    }
    // A family of 16-bit types would leave it to another one.
    if device.gpu().family != Some(Family::Sm90) {
        let layer = layer(common::VIT_B[0]);
        cases.extend([forward::<f32>(device, layer), backward::<f32>(device, layer)]);
    }
    cases
}

/// What both passes read.
struct Tensors<T> {
    x: CudaSlice<T>,
    weight: CudaSlice<T>,
    bias: CudaSlice<T>,
    lora_b: CudaSlice<T>,
    lora_a: CudaSlice<T>,
    delta_bias: CudaSlice<T>,
}

impl<T: Value> Tensors<T> {
    fn new(gpu: &Gpu, shape: LinearShape) -> Fallible<Self> {
        let (k, n) = (shape.in_features, shape.out_features);
        Ok(Self {
            x: gpu.values(shape.in_rows() * k)?,
            weight: gpu.values(n * k)?,
            bias: gpu.values(n)?,
            lora_b: gpu.values(n * RANK)?,
            lora_a: gpu.values(RANK * k)?,
            delta_bias: gpu.values(n)?,
        })
    }

    fn layer(&self, shape: LinearShape) -> LowRankLinear<&dyn DevicePtr<T>, Noise<'_>> {
        LowRankLinear {
            shape,
            noise: Noise::Generated(common::generator(NoiseShape::PerSample)),
            base: Some(Base { weight: &self.weight, bias: Some(&self.bias) }),
            rank: RANK,
            lora_b: &self.lora_b,
            lora_a: &self.lora_a,
            delta_bias: Some(&self.delta_bias),
            scale: 1.0,
            allow_tf32: false,
        }
    }
}

fn forward<T: Value>(device: &Device, shape: LinearShape) -> Case {
    let device = device.clone();
    let (m, k, n) = (shape.out_rows(), shape.in_features, shape.out_features);
    Case {
        operator: "low_rank_linear forward",
        family: crate::family(&device),
        dtype: T::NAME,
        shape: common::name(&shape),
        bytes: size_of::<T>() * (m * k + n * k + 2 * n + RANK * (n + k) + m * RANK + m * n),
        flop: 2 * m * k * n,
        against_product: true,
        set: Box::new(move |gpu| {
            let (device, tensors) = (device.clone(), Tensors::<T>::new(gpu, shape)?);
            let len = tensors.layer(shape).workspace_len(device.gpu(), T::DTYPE).max(1);
            let mut workspace = gpu.zeros::<f32>(len)?;
            let (mut s, mut y) = (gpu.zeros::<T>(m * RANK)?, gpu.zeros::<T>(m * n)?);
            let launch: Launch = Box::new(move |gpu: &Gpu| {
                let layer = tensors.layer(shape);
                let (x, stream) = (&tensors.x, &gpu.stream);
                Ok(device.low_rank_linear(&layer, x, &mut s, &mut y, &mut workspace, stream)?)
            });
            Ok(launch)
        }),
    }
}

fn backward<T: Value>(device: &Device, shape: LinearShape) -> Case {
    let device = device.clone();
    let (m, k, n) = (shape.out_rows(), shape.in_features, shape.out_features);
    Case {
        operator: "low_rank_linear backward",
        family: crate::family(&device),
        dtype: T::NAME,
        shape: common::name(&shape),
        // x, s, dy, W0, B, A; dx, dB, dA, dδb.
        bytes: size_of::<T>() * (2 * m * k + m * RANK + m * n + n * k + 2 * RANK * (n + k) + n),
        // dx.
        flop: 2 * m * k * n,
        against_product: false,
        set: Box::new(move |gpu| {
            let (device, tensors) = (device.clone(), Tensors::<T>::new(gpu, shape)?);
            let (s, dy) = (gpu.values::<T>(m * RANK)?, gpu.values::<T>(m * n)?);
            let mut dx = gpu.zeros::<T>(m * k)?;
            let (mut dd, mut du) = (gpu.zeros::<T>(n * RANK)?, gpu.zeros::<T>(RANK * k)?);
            let mut db = gpu.zeros::<T>(n)?;
            let len = tensors.layer(shape).workspace_len(device.gpu(), T::DTYPE).max(1);
            let mut workspace = gpu.zeros::<f32>(len)?;
            let launch: Launch = Box::new(move |gpu: &Gpu| {
                let layer = tensors.layer(shape);
                let grads = LowRankGrads {
                    input: Some(&mut dx as &mut dyn DevicePtrMut<T>),
                    lora_b: Some(&mut dd),
                    lora_a: Some(&mut du),
                    delta_bias: Some(&mut db),
                };
                let (x, stream) = (&tensors.x, &gpu.stream);
                Ok(device.low_rank_linear_backward(&layer, x, &s, &dy, grads, &mut workspace, stream)?)
            });
            Ok(launch)
        }),
    }
}
