//! Noisy epilogue after a GEMM of the caller's own.

use crate::gpu::{Gpu, Value};
use crate::{Case, Launch, common, layer};
use half::bf16;
use pace_kernels::LinearShape;
use pace_kernels::cuda::Noise;
use pace_kernels::noise::{Generator, NoiseShape};

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for channels in [768, 2304, 3072] {
        let shape = layer((1, channels));
        cases.extend(passes::<bf16>(shape, common::generator(NoiseShape::PerSample)));
    }
    let shape = layer((1, 768));
    cases.extend(passes::<f32>(shape, common::generator(NoiseShape::PerSample)));
    cases.extend(passes::<bf16>(shape, common::generator(NoiseShape::PerToken)));
    cases
}

fn passes<T: Value>(shape: LinearShape, generator: Generator) -> [Case; 2] {
    let len = shape.out_rows() * shape.out_features;
    let noise = Noise::Generated(generator);
    let operators = match generator.shape() {
        NoiseShape::PerSample => ["noisy_epilogue BC forward", "noisy_epilogue BC backward"],
        NoiseShape::PerToken => ["noisy_epilogue BTC forward", "noisy_epilogue BTC backward"],
    };
    let case = |operator, tensors, set| Case {
        operator,
        family: "–",
        dtype: T::NAME,
        shape: format!("{}x{} {}", shape.samples(), shape.tokens, shape.out_features),
        bytes: tensors * len * size_of::<T>(),
        flop: 0,
        against_product: false,
        set,
    };
    [
        // y is read and written.
        case(
            operators[0],
            3,
            Box::new(move |gpu| {
                let (a, mut y) = (gpu.values::<T>(len)?, gpu.values::<T>(len)?);
                let launch: Launch = Box::new(move |gpu: &Gpu| {
                    Ok(gpu.device.noisy_epilogue(shape, noise, &a, &mut y, &gpu.stream)?)
                });
                Ok(launch)
            }),
        ),
        case(
            operators[1],
            2,
            Box::new(move |gpu| {
                let (dy, mut da) = (gpu.values::<T>(len)?, gpu.zeros::<T>(len)?);
                let launch: Launch = Box::new(move |gpu: &Gpu| {
                    Ok(gpu.device.noisy_epilogue_backward(shape, noise, &dy, &mut da, &gpu.stream)?)
                });
                Ok(launch)
            }),
        ),
    ]
}
