//! The CUDA kernels against the CPU operators, by one table of cases per operator: in the simulator (`simt::…`), which
//! needs no GPU, and on device 0 (`device::…`), which is reported as ignored, with the reason, where there is none.

mod device;
mod noise_fill;
mod noisy_epilogue;
mod simt;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use pace_kernels::LinearShape;
use pace_kernels::noise::philox4x32_10;

fn main() {
    let arguments = Arguments::from_args();
    let simt: [(&str, fn()); 5] = [
        ("noise_fill", noise_fill::simt),
        ("noise_fill_key_in_memory", noise_fill::simt_key_in_memory),
        ("noisy_epilogue", noisy_epilogue::simt),
        ("any_grid", noisy_epilogue::simt_any_grid),
        ("every_kernel_is_listed", simt::every_kernel_is_listed),
    ];
    let on_device: [(&str, fn(&device::Opened)); 3] = [
        ("noise_fill", noise_fill::device),
        ("noise_fill_in_a_graph", noise_fill::device_graph),
        ("noisy_epilogue", noisy_epilogue::device),
    ];
    let mut trials: Vec<Trial> = Vec::new();
    for (name, test) in simt {
        trials.push(Trial::test(format!("simt::{name}"), move || {
            test();
            Ok::<(), Failed>(())
        }));
    }
    for (name, test) in on_device {
        trials.push(Trial::ignorable_test(format!("device::{name}"), move || match device::open() {
            Ok(opened) => {
                test(&opened);
                Ok(Completion::Completed)
            }
            Err(why) => Ok(Completion::ignored_with(format!("no CUDA device: {why}"))),
        }));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

/// A layer's output; operators without a product have no in-features.
fn output_shape(branches: usize, batch: usize, tokens: usize, out_features: usize) -> LinearShape {
    LinearShape { branches, batch, tokens, in_features: 1, out_features, shared_input: false }
}

/// `len` numbers in `[-1, 1)`.
fn uniform(seed: u32, len: usize) -> Vec<f32> {
    let word = |i: usize| philox4x32_10([i as u32, 0, 0, 0], [seed, 1])[0];
    (0..len).map(|i| (word(i) as i32 >> 8) as f32 / (1 << 23) as f32).collect()
}
