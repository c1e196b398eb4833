//! Which layers the C interface folds.

use crate::capi::{check, zeroed};
use pace_kernels::capi::*;
use pace_kernels::cuda::{Family, Gpu, Plan};
use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex};

/// Notes the kernels of plans, and launches nothing.
struct Recorder {
    gpu: Gpu,
    kernels: Arc<Mutex<Vec<&'static str>>>,
}

impl Launcher for Recorder {
    fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    unsafe fn launch(&self, plan: &Plan, _: *mut c_void) -> pace_kernels::Result<()> {
        *self.kernels.lock().unwrap() = plan.launches().map(|launch| launch.kernel.name).collect();
        Ok(())
    }
}

/// What is asked of a layer besides its sizes.
#[derive(Debug, Clone, Copy)]
struct Asked {
    dtype: u32,
    flags: u32,
    noise: PaceNoise,
}

/// Whether a dense layer and one of LoRA mul fold on a device, forward and in the gradient to the input.
fn folds(gpu: Gpu, asked: Asked) -> [[bool; 2]; 2] {
    let Asked { dtype, flags, noise } = asked;
    let (k, n, m, rank) = (64, 128, 4 * 197, 8);
    let shape = PaceShape {
        branches: 2,
        batch: 2,
        tokens: 197,
        in_features: k as u64,
        out_features: n as u64,
        shared_input: 0,
    };
    let tensor = |i: usize, len: usize| PaceTensor { data: (i << 28) as *mut c_void, len: len as u64 };
    let kernels = Arc::new(Mutex::new(Vec::new()));
    let device = PaceDevice::new(Recorder { gpu, kernels: kernels.clone() });
    let is_folded = || kernels.lock().unwrap().iter().any(|name| name.contains("folded"));
    let mut dense = PaceNoisyLinear {
        dtype,
        flags,
        shape,
        noise,
        base_weight: tensor(1, n * k),
        delta_weight: tensor(2, n * k),
        x: tensor(3, m * k),
        y: tensor(4, m * n),
        dy: tensor(5, m * n),
        grad_input: tensor(6, m * k),
        ..zeroed()
    };
    let mut lora_mul = PaceLoraMulLinear {
        dtype,
        flags,
        shape,
        noise,
        rank: rank as u64,
        scale: 1.0,
        base_weight: tensor(1, n * k),
        lora_a: tensor(2, rank * k),
        lora_b: tensor(7, n * rank),
        x: tensor(3, m * k),
        y: tensor(4, m * n),
        dy: tensor(5, m * n),
        grad_input: tensor(6, m * k),
        ..zeroed()
    };
    dense.workspace = tensor(8, 0);
    lora_mul.workspace = tensor(8, 0);
    let mut results = [[false; 2]; 2];
    // SAFETY: the structs and the places for numbers are live; no plan is carried out, so that no tensor is touched.
    unsafe {
        // A query has no tensors.
        let none = tensor(0, 0);
        let sizes =
            PaceNoisyLinear { base_weight: none, delta_weight: none, x: none, y: none, dy: none, ..dense };
        check(pace_noisy_linear_workspace(&device, &sizes, &mut dense.workspace.len));
        check(pace_lora_mul_linear_workspace(&device, &lora_mul, &mut lora_mul.workspace.len));
        for (i, operator) in [pace_noisy_linear_forward, pace_noisy_linear_backward].into_iter().enumerate() {
            check(operator(&device, null_mut(), &dense));
            results[0][i] = is_folded();
        }
        let operators = [pace_lora_mul_linear_forward, pace_lora_mul_linear_backward];
        for (i, operator) in operators.into_iter().enumerate() {
            check(operator(&device, null_mut(), &lora_mul));
            results[1][i] = is_folded();
        }
    }
    results
}

/// A query has no tensors, though which there are decides the family: at this size that for Hopper needs most.
fn a_query_needs_no_tensors(noise: PaceNoise) {
    let features = 768;
    let shape = PaceShape {
        branches: 2,
        batch: 4,
        tokens: 197,
        in_features: features,
        out_features: features,
        shared_input: 0,
    };
    let device = PaceDevice::new(Recorder { gpu: Gpu::H100, kernels: Arc::default() });
    let none = PaceNoisyLinear { dtype: PACE_BF16, shape, noise, ..zeroed() };
    let weight = PaceTensor { data: (1 << 28) as *mut c_void, len: features * features };
    let full = PaceNoisyLinear { base_weight: weight, delta_weight: weight, ..none };
    let bytes = [none, full].map(|args| {
        let mut bytes = 0;
        // SAFETY: the struct and the place for the number are live.
        check(unsafe { pace_noisy_linear_workspace(&device, &args, &mut bytes) });
        bytes
    });
    assert_eq!(bytes[0], bytes[1]);
}

/// Under noise a layer folds in both passes unless it is to be exact; without noise in `PACE_F32` alone.
pub fn folding() {
    let off = PaceNoise {
        kind: PACE_NOISE_OFF,
        shape: PACE_PER_SAMPLE,
        key: 0,
        key_address: null(),
        first_sample: 0,
        sigma: 0.0,
        reserved: 0,
        z: PaceTensor { data: null_mut(), len: 0 },
    };
    let generated = PaceNoise { kind: PACE_NOISE_GENERATED, sigma: 0.5, ..off };
    let given = PaceNoise {
        kind: PACE_NOISE_GIVEN,
        z: PaceTensor { data: (9 << 28) as *mut c_void, len: 4 * 128 },
        ..off
    };
    let still = PaceNoise { sigma: 0.0, ..generated };
    a_query_needs_no_tensors(generated);
    for (noise, dtype, by_default) in [
        (generated, PACE_BF16, true),
        (generated, PACE_F16, true),
        (generated, PACE_F32, true),
        (given, PACE_BF16, true),
        (off, PACE_BF16, false),
        (still, PACE_F16, false),
        (off, PACE_F32, true),
        (PaceNoise { shape: PACE_PER_TOKEN, ..generated }, PACE_BF16, false),
    ] {
        for (flags, want) in [(0, by_default), (PACE_EXACT, false)] {
            let asked = Asked { dtype, flags, noise };
            // The gradient to the input is folded in one family only, which does not take PACE_F32.
            let portable = folds(Gpu::A100.with_family(Family::Sm80), asked);
            assert_eq!(portable, [[want, false]; 2], "{asked:?}");
            let hopper = folds(Gpu::H100.with_family(Family::Sm90), asked);
            assert_eq!(hopper, [[want && dtype != PACE_F32; 2]; 2], "{asked:?}");
        }
    }
}
