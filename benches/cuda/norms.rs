//! Norms for the paper's plots.

use crate::gpu::Gpu;
use crate::{Case, Launch};
use pace_kernels::cuda::cudarc::driver::DevicePtr;
use pace_kernels::cuda::{FpDistance, GradNorm};

/// The factors of a rank-16 adapter on a ViT-B block's largest layer, 48 times.
const LAYERS: usize = 48;
const GRADIENT: usize = 16 * (768 + 3072);
const SAMPLES: usize = 64;
const FEATURES: usize = 768;

pub fn cases() -> Vec<Case> {
    vec![grad_norm(), fp_distance()]
}

fn grad_norm() -> Case {
    Case {
        operator: "grad_norm",
        family: "–",
        dtype: "f32",
        shape: format!("{LAYERS}x{GRADIENT}"),
        bytes: LAYERS * GRADIENT * 4,
        flop: 0,
        against_product: false,
        set: Box::new(|gpu| {
            let gradients =
                (0..LAYERS).map(|_| gpu.values::<f32>(GRADIENT)).collect::<Result<Vec<_>, _>>()?;
            let mut norm = gpu.zeros::<f64>(1)?;
            let mut workspace = gpu.zeros::<f64>(GradNorm::workspace_len([GRADIENT; LAYERS]))?;
            let launch: Launch = Box::new(move |gpu: &Gpu| {
                let gradients: Vec<&dyn DevicePtr<f32>> =
                    gradients.iter().map(|gradient| gradient as _).collect();
                Ok(gpu.device.grad_norm(&gradients, &mut norm, &mut workspace, &gpu.stream)?)
            });
            Ok(launch)
        }),
    }
}

fn fp_distance() -> Case {
    let len = SAMPLES * FEATURES;
    Case {
        operator: "fp_distance",
        family: "–",
        dtype: "f32",
        shape: format!("{SAMPLES}x{FEATURES}"),
        bytes: 2 * len * 4,
        flop: 0,
        against_product: false,
        set: Box::new(move |gpu| {
            let (a, b) = (gpu.values::<f32>(len)?, gpu.values::<f32>(len)?);
            let mut distance = gpu.zeros::<f64>(1)?;
            let mut workspace = gpu.zeros::<f64>(FpDistance::workspace_len(SAMPLES, FEATURES))?;
            let launch: Launch = Box::new(move |gpu: &Gpu| {
                let (device, stream) = (&gpu.device, &gpu.stream);
                Ok(device.fp_distance(SAMPLES, FEATURES, &a, &b, &mut distance, &mut workspace, stream)?)
            });
            Ok(launch)
        }),
    }
}
