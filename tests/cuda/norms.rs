//! Gradient norm and FP-distance against the CPU operators in f64.

use crate::device::Opened;
use crate::machine::Target;
use crate::support::{Type, rounded, wide};
use half::{bf16, f16};
use pace_kernels::cpu;
use pace_kernels::cuda::cudarc::driver::{CudaView, DevicePtr};
use pace_kernels::cuda::{Buffer, FpDistance, GradNorm};
use std::cell::OnceCell;

/// Lengths of tensors: around vectors of 4 and 8 elements, what a block's threads load at once (1024 and 2048), and chunks of
/// 4096.
fn lists() -> Vec<Vec<usize>> {
    vec![
        vec![],
        vec![0],
        vec![1],
        vec![3, 4, 5, 0, 7, 8, 9],
        vec![1023, 1025, 2047, 2049],
        vec![0, 4095, 4096, 4097, 2, 8193],
        // Launches of 128 tensors, and one more tensor.
        (0..128).map(|i| i % 5 + 1).collect(),
        (0..257).map(|i| i % 3).collect(),
        (0..260).map(|i| i % 3 + 1).collect(),
        // More parts than there are threads that add them up.
        vec![1; 1027],
    ]
}

/// Gradients, large and small from tensor to tensor.
fn gradients<T: Type>(lengths: &[usize]) -> Vec<Vec<T>> {
    let scale = |i: usize| [1.0, 1e-4, 30.0][i % 3];
    let scaled = |(i, &length): (usize, &usize)| {
        rounded::<f32>(i as u32, length).into_iter().map(|g| T::round(f64::from(g) * scale(i))).collect()
    };
    lengths.iter().enumerate().map(scaled).collect()
}

fn exact_norm<T: Type>(gradients: &[Vec<T>]) -> f64 {
    let values: Vec<Vec<f64>> = gradients.iter().map(|gradient| wide(gradient)).collect();
    cpu::grad_norm(&values.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

/// Sums are in f64: all that can differ is their order. Differences are rounded to f32.
fn assert_near(what: &str, got: f64, exact: f64, tolerance: f64) {
    assert!((got - exact).abs() <= tolerance * exact, "{what}: {got:e} instead of {exact:e}");
}

fn grad_norm_typed<T: Type>(target: &Target<'_>) {
    for lengths in lists() {
        let gradients = gradients::<T>(&lengths);
        let exact = exact_norm(&gradients);
        for shift in [0, 1] {
            let first = OnceCell::new();
            target.run(shift, |machine| {
                let gradients: Vec<Buffer> =
                    gradients.iter().map(|gradient| machine.input("gradient", gradient)).collect();
                let norm = machine.output::<f64>("norm", 1);
                let len = GradNorm::workspace_len(lengths.iter().copied());
                let workspace = machine.output::<f64>("workspace", len);
                let plan =
                    GradNorm { dtype: T::DTYPE, gradients: &gradients, norm, workspace }.plan().unwrap();
                let full = lengths.iter().filter(|&&length| length > 0).count();
                assert_eq!(plan.steps().len(), full.div_ceil(128) + 1);
                machine.launch(&plan);
                let norm = machine.read::<f64>(norm)[0];
                assert_near(&format!("{:?} {lengths:?}", T::DTYPE), norm, exact, 1e-13);
                // The same bits in whatever order threads run.
                assert_eq!(first.get_or_init(|| norm).to_bits(), norm.to_bits(), "{lengths:?}");
            });
        }
    }
}

pub fn grad_norm(target: &Target<'_>) {
    grad_norm_typed::<f32>(target);
    grad_norm_typed::<f16>(target);
    grad_norm_typed::<bf16>(target);
    // Squares that f32 has no room for.
    for value in [1e30f32, 1e-30] {
        target.run(0, |machine| {
            let gradients = [machine.input("gradient", &[value; 9])];
            let (norm, workspace) = (machine.output::<f64>("norm", 1), machine.output::<f64>("workspace", 1));
            let dtype = pace_kernels::cuda::DType::F32;
            machine.launch(&GradNorm { dtype, gradients: &gradients, norm, workspace }.plan().unwrap());
            assert_near("extremes", machine.read::<f64>(norm)[0], 3.0 * f64::from(value), 1e-13);
        });
    }
}

/// Samples and features.
const SIZES: [(usize, usize); 8] =
    [(1, 1), (2, 3), (3, 5), (1, 8), (5, 409), (2, 4097), (16, 1024), (3, 5462)];

/// Both models' outputs, and their distance.
fn outputs<T: Type>(samples: usize, features: usize) -> (Vec<T>, Vec<T>, f64) {
    let (tuned, before) = (rounded::<T>(1, samples * features), rounded::<T>(2, samples * features));
    let exact = cpu::fp_distance(samples, features, &wide(&tuned), &wide(&before)).unwrap();
    (tuned, before, exact)
}

fn fp_distance_typed<T: Type>(target: &Target<'_>) {
    for (samples, features) in SIZES {
        let (tuned, before, exact) = outputs::<T>(samples, features);
        for shift in [0, 1] {
            let first = OnceCell::new();
            target.run(shift, |machine| {
                let (fine_tuned, pre_trained) =
                    (machine.input("fine-tuned", &tuned), machine.input("pre-trained", &before));
                let distance = machine.output::<f64>("distance", 1);
                let workspace =
                    machine.output::<f64>("workspace", FpDistance::workspace_len(samples, features));
                let dtype = T::DTYPE;
                let operator =
                    FpDistance { samples, features, dtype, fine_tuned, pre_trained, distance, workspace };
                machine.launch(&operator.plan().unwrap());
                let distance = machine.read::<f64>(distance)[0];
                assert_near(&format!("{dtype:?} [{samples}, {features}]"), distance, exact, 1e-6);
                assert_eq!(first.get_or_init(|| distance).to_bits(), distance.to_bits());
            });
        }
    }
}

pub fn fp_distance(target: &Target<'_>) {
    fp_distance_typed::<f32>(target);
    fp_distance_typed::<f16>(target);
    fp_distance_typed::<bf16>(target);
}

/// The safe methods, on half-open views of larger tensors.
pub fn safe_methods(opened: &Opened) {
    let Opened { device, stream } = opened;
    for lengths in lists() {
        // No view is empty.
        let lengths: Vec<usize> = lengths.into_iter().filter(|&length| length > 0).collect();
        let gradients = gradients::<f16>(&lengths);
        let tensors: Vec<_> = gradients.iter().map(|gradient| opened.upload(1, gradient)).collect();
        let views: Vec<CudaView<'_, f16>> = tensors.iter().map(|tensor| tensor.slice(1..)).collect();
        let views: Vec<&dyn DevicePtr<f16>> = views.iter().map(|view| view as _).collect();
        let mut norm = opened.upload(0, &[f64::NAN]);
        let len = GradNorm::workspace_len(lengths.iter().copied());
        let mut workspace = opened.upload(0, &vec![f64::NAN; len.max(1)]);
        device.grad_norm(&views, &mut norm, &mut workspace, stream).unwrap();
        assert_near(&format!("{lengths:?}"), opened.download(0, &norm)[0], exact_norm(&gradients), 1e-13);
    }
    for (samples, features) in SIZES {
        let (tuned, before, exact) = outputs::<f16>(samples, features);
        let (tuned, before) = (opened.upload(1, &tuned), opened.upload(1, &before));
        let (tuned, before) = (tuned.slice(1..), before.slice(1..));
        let mut distance = opened.upload(0, &[f64::NAN]);
        let len = FpDistance::workspace_len(samples, features);
        let mut workspace = opened.upload(0, &vec![f64::NAN; len]);
        device
            .fp_distance::<f16>(samples, features, &tuned, &before, &mut distance, &mut workspace, stream)
            .unwrap();
        assert_near(&format!("[{samples}, {features}]"), opened.download(0, &distance)[0], exact, 1e-6);
    }
}
