//! Noise written out.

use crate::gpu::Gpu;
use crate::{Case, Launch, common, layer};
use pace_kernels::noise::NoiseShape;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for channels in [768, 3072] {
        cases.push(case("noise_fill BC", NoiseShape::PerSample, channels));
        cases.push(case("noise_fill BTC", NoiseShape::PerToken, channels));
    }
    cases
}

fn case(operator: &'static str, noise: NoiseShape, channels: usize) -> Case {
    let shape = layer((1, channels));
    let (rows, name) = match noise {
        NoiseShape::PerSample => (shape.samples(), shape.samples().to_string()),
        NoiseShape::PerToken => (shape.out_rows(), format!("{}x{}", shape.samples(), shape.tokens)),
    };
    let len = rows * channels;
    let generator = common::generator(noise);
    Case {
        operator,
        family: "–",
        dtype: "f32",
        shape: format!("{name} {channels}"),
        bytes: 4 * len,
        flop: 0,
        against_product: false,
        set: Box::new(move |gpu| {
            let mut z = gpu.zeros::<f32>(len)?;
            let launch: Launch = Box::new(move |gpu: &Gpu| {
                Ok(gpu.device.noise_fill(shape, generator, None, &mut z, &gpu.stream)?)
            });
            Ok(launch)
        }),
    }
}
