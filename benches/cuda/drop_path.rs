//! Shared DropPath. Nothing is dropped, so that all that is counted is moved; a dropped sample is cheaper.

use crate::gpu::{Gpu, Value};
use crate::{Case, Launch};
use half::bf16;
use pace_kernels::cuda::Mask;
use pace_kernels::noise::Key;

const BRANCHES: usize = 2;
const BATCH: usize = 64;
const TOKENS: usize = 197;
const CHANNELS: usize = 768;

pub fn cases() -> Vec<Case> {
    vec![case::<bf16>(), case::<f32>()]
}

/// Forward; backward is the same launch.
fn case<T: Value>() -> Case {
    let features = TOKENS * CHANNELS;
    let len = BRANCHES * BATCH * features;
    Case {
        operator: "shared_drop_path",
        family: "–",
        dtype: T::NAME,
        shape: format!("{}x{TOKENS} {CHANNELS}", BRANCHES * BATCH),
        bytes: 2 * len * size_of::<T>(),
        flop: 0,
        against_product: false,
        set: Box::new(move |gpu| {
            let (x, mut y) = (gpu.values::<T>(len)?, gpu.zeros::<T>(len)?);
            let launch: Launch = Box::new(move |gpu: &Gpu| {
                let mask = Mask::Generated {
                    key: Key::derive(1, 0, 0),
                    key_address: None,
                    drop_probability: 0.0,
                    first_sample: 0,
                };
                let (device, stream) = (&gpu.device, &gpu.stream);
                Ok(device.shared_drop_path(BRANCHES, BATCH, features, mask, &x, &mut y, stream)?)
            });
            Ok(launch)
        }),
    }
}
