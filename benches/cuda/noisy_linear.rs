//! Dense noisy layer by each family: forward with two GEMMs, forward with both folded into one (of `sm80` and `sm90`), and backward with
//! all gradients (of `sm90` folded).

use crate::gpu::{Gpu, Value};
use crate::{Case, Fallible, Launch, common, layer};
use half::bf16;
use pace_kernels::LinearShape;
use pace_kernels::cuda::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use pace_kernels::cuda::{Base, Device, Family, Noise, NoisyLinear, NoisyLinearGrads};
use pace_kernels::noise::NoiseShape;

/// For the family that `device` is set to.
pub fn cases(device: &Device, layers: &[LinearShape]) -> Vec<Case> {
    let mut cases = Vec::new();
    for &layer in layers {
        cases.extend(passes::<bf16>(device, layer));
    }
    if device.gpu().family != Some(Family::Sm90) {
        cases.extend(passes::<f32>(device, layer(common::VIT_B[0])));
    }
    cases
}

fn passes<T: Value>(device: &Device, shape: LinearShape) -> Vec<Case> {
    let family = device.gpu().family;
    // What a family cannot fold another one would compute.
    let mut cases =
        vec![forward::<T>(device, shape, false), backward::<T>(device, shape, family == Some(Family::Sm90))];
    if matches!(family, Some(Family::Sm80 | Family::Sm90)) {
        cases.push(forward::<T>(device, shape, true));
    }
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
            noise: Noise::Generated(common::generator(NoiseShape::PerSample)),
            base: Some(Base { weight: &self.weight, bias: Some(&self.bias) }),
            delta_weight: Some(&self.delta_weight),
            delta_bias: Some(&self.delta_bias),
            fold,
            allow_tf32: false,
        }
    }
}

fn forward<T: Value>(device: &Device, shape: LinearShape, fold: bool) -> Case {
    let device = device.clone();
    let (m, k, n) = (shape.out_rows(), shape.in_features, shape.out_features);
    Case {
        operator: if fold { "noisy_linear folded forward" } else { "noisy_linear exact forward" },
        family: crate::family(&device),
        dtype: T::NAME,
        shape: common::name(&shape),
        bytes: size_of::<T>() * (m * k + 2 * n * k + 2 * n + m * n),
        flop: 2 * m * k * n,
        against_product: true,
        set: Box::new(move |gpu| {
            let (device, tensors) = (device.clone(), Tensors::<T>::new(gpu, shape)?);
            let len = tensors.layer(shape, fold).workspace_len(device.gpu(), T::DTYPE).max(1);
            let (mut y, mut workspace) = (gpu.zeros::<T>(m * n)?, gpu.zeros::<f32>(len)?);
            let launch: Launch = Box::new(move |gpu: &Gpu| {
                let layer = tensors.layer(shape, fold);
                Ok(device.noisy_linear(&layer, &tensors.x, &mut y, &mut workspace, &gpu.stream)?)
            });
            Ok(launch)
        }),
    }
}

fn backward<T: Value>(device: &Device, shape: LinearShape, fold: bool) -> Case {
    let device = device.clone();
    let (m, k, n) = (shape.out_rows(), shape.in_features, shape.out_features);
    Case {
        operator: if fold { "noisy_linear folded backward" } else { "noisy_linear backward" },
        family: crate::family(&device),
        dtype: T::NAME,
        shape: common::name(&shape),
        // x, dy, both weights; dx, dΔW, dΔb.
        bytes: size_of::<T>() * (2 * m * k + m * n + 3 * n * k + n),
        // dx and dΔW.
        flop: 4 * m * k * n,
        against_product: false,
        set: Box::new(move |gpu| {
            let (device, tensors) = (device.clone(), Tensors::<T>::new(gpu, shape)?);
            let dy = gpu.values::<T>(m * n)?;
            let (mut dx, mut dw, mut db) =
                (gpu.zeros::<T>(m * k)?, gpu.zeros::<T>(n * k)?, gpu.zeros::<T>(n)?);
            // An allocation has one element at least.
            let workspace_len = tensors.layer(shape, fold).workspace_len(device.gpu(), T::DTYPE).max(1);
            let mut workspace = gpu.zeros::<f32>(workspace_len)?;
            let launch: Launch = Box::new(move |gpu: &Gpu| {
                let layer = tensors.layer(shape, fold);
                let grads = NoisyLinearGrads {
                    input: Some(&mut dx as &mut dyn DevicePtrMut<T>),
                    delta_weight: Some(&mut dw),
                    delta_bias: Some(&mut db),
                };
                let (x, stream) = (&tensors.x, &gpu.stream);
                Ok(device.noisy_linear_backward(&layer, x, &dy, grads, &mut workspace, stream)?)
            });
            Ok(launch)
        }),
    }
}
