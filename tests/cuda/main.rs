//! The CUDA kernels against the CPU operators, by one table of cases per operator: in the simulator (`simt::…`), which
//! needs no GPU, and on device 0 (`device::…`), which is reported as ignored, with the reason, where there is none.

mod capi;
mod capi_folding;
mod device;
mod drop_path;
mod lm_head;
mod lora_mul_linear;
mod loss;
mod loss_cases;
mod loss_data;
mod loss_general;
mod low_rank_linear;
mod machine;
mod noise_fill;
mod noisy_epilogue;
mod noisy_linear;
mod norms;
mod numerics;
mod schedules;
mod simulate;
mod support;
mod weights;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use machine::Target;
use pace_kernels::LinearShape;
use pace_kernels::cuda::{Family, Gpu, KERNELS};
use pace_kernels::noise::philox4x32_10;
use std::collections::BTreeSet;

type Test = fn(&Target<'_>);
type DeviceTest = fn(&device::Opened);

/// Tests of the operators that have families, which run for each of them.
const LAYER_TESTS: &[(&str, Test)] = &[
    ("lora_mul_linear::f32", lora_mul_linear::f32),
    ("lora_mul_linear::bf16", lora_mul_linear::bf16),
    ("low_rank_linear::f32", low_rank_linear::f32),
    ("low_rank_linear::tf32", low_rank_linear::tf32),
    ("low_rank_linear::f16", low_rank_linear::f16),
    ("low_rank_linear::bf16", low_rank_linear::bf16),
    ("low_rank_linear::batch_split", low_rank_linear::batch_split),
    ("low_rank_linear::tokens", low_rank_linear::tokens),
    ("low_rank_linear::one_gradient", low_rank_linear::one_gradient),
    ("low_rank_linear::unaligned_vectors", low_rank_linear::unaligned_vectors),
    ("noisy_linear::f32", noisy_linear::f32),
    ("noisy_linear::tf32", noisy_linear::tf32),
    ("noisy_linear::f16", noisy_linear::f16),
    ("noisy_linear::bf16", noisy_linear::bf16),
    ("noisy_linear::long_sums", noisy_linear::long_sums),
    ("noisy_linear::batch_split", noisy_linear::batch_split),
    ("noisy_linear::tokens", noisy_linear::tokens),
    ("noisy_linear::one_gradient", noisy_linear::one_gradient),
];

/// Tests of the other plans, which run in the simulator and on a device.
const TESTS: &[(&str, Test)] = &[
    ("loss", loss::test),
    ("loss::streamed", loss::streamed),
    ("loss::any_grid", loss::any_grid),
    ("loss::again", loss::again),
    ("loss::wrong_data", loss::wrong_data),
    ("loss::not_a_number", loss::not_a_number),
    ("loss_general", loss_general::test),
    ("loss_general::extremes", loss_general::extremes),
    ("loss_general::streamed", loss_general::streamed),
    ("loss_general::any_grid", loss_general::any_grid),
    ("loss_general::parts", loss_general::parts),
    ("loss_general::wrong_data", loss_general::wrong_data),
    ("loss_general::not_a_number", loss_general::not_a_number),
    ("lm_head::by_gram", lm_head::by_gram),
    ("lm_head::by_logits", lm_head::by_logits),
    ("lm_head::streamed", lm_head::streamed),
    ("lm_head::any_grid", lm_head::any_grid),
    ("lm_head::close_branches", lm_head::close_branches),
    ("lm_head::low_directions", lm_head::low_directions),
    ("lm_head::wrong_labels", lm_head::wrong_labels),
    ("lm_head::no_labels", lm_head::no_labels),
    ("lm_head::loss_scale", lm_head::loss_scale),
    ("lm_head::products", lm_head::products),
    ("drop_path", drop_path::test),
    ("noise_fill", noise_fill::test),
    ("noise_fill::key_in_memory", noise_fill::key_in_memory),
    ("noisy_epilogue", noisy_epilogue::test),
    ("noisy_epilogue::any_grid", noisy_epilogue::any_grid),
    ("norms::fp_distance", norms::fp_distance),
    ("norms::grad_norm", norms::grad_norm),
    ("weights::low_rank", weights::low_rank),
    ("weights::prompt", weights::prompt),
    ("weights::grouped", weights::grouped),
    ("weights::merge", weights::merge),
];

/// Tests of what only a device has: the safe methods over `cudarc`'s tensors, and graphs.
const DEVICE_TESTS: &[(&str, DeviceTest)] = &[
    ("loss::safe_method", loss::safe_method),
    ("loss::in_a_graph", loss::in_a_graph),
    ("lm_head::safe_methods", lm_head::safe_methods),
    ("low_rank_linear::safe_methods", low_rank_linear::safe_methods),
    ("low_rank_linear::in_a_graph", low_rank_linear::in_a_graph),
    ("noise_fill::safe_method", noise_fill::safe_method),
    ("noise_fill::in_a_graph", noise_fill::in_a_graph),
    ("noise_fill::foreign_memory", noise_fill::foreign_memory),
    ("noisy_epilogue::safe_methods", noisy_epilogue::safe_methods),
    ("noisy_linear::safe_methods", noisy_linear::safe_methods),
    ("noisy_linear::in_a_graph", noisy_linear::in_a_graph),
    ("drop_path::safe_methods", drop_path::safe_methods),
    ("norms::safe_methods", norms::safe_methods),
    ("weights::safe_methods", weights::safe_methods),
];

/// The C interface; its device is the simulator.
const C_TESTS: &[(&str, fn())] = &[
    ("capi::noisy_linear", capi::noisy_linear),
    ("capi::lora_mul_linear", capi::lora_mul_linear),
    ("capi::folding", capi_folding::folding),
    ("capi::low_rank_linear", capi::low_rank_linear),
    ("capi::noise_and_epilogue", capi::noise_and_epilogue),
    ("capi::weights", capi::weights),
    ("capi::loss", capi::loss),
    ("capi::lm_head", capi::lm_head),
    ("capi::drop_path", capi::drop_path),
    ("capi::norms", capi::norms),
    ("capi::errors", capi::errors),
];

fn main() {
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = Vec::new();
    let mut simulated = |name: &str, test: Box<dyn FnOnce() + Send>| {
        let name = format!("simt::{name}");
        trials.push(Trial::test(name.clone(), move || {
            numerics::begin(&name);
            test();
            Ok::<(), Failed>(())
        }));
    };
    simulated("every_kernel_is_listed", Box::new(every_kernel_is_listed));
    for &(name, test) in C_TESTS {
        simulated(name, Box::new(test));
    }
    for &(name, test) in TESTS {
        simulated(name, Box::new(move || test(&Target { gpu: simulate::GPU, device: None })));
    }
    for (family, name, test) in layer_tests() {
        let gpu = simulated_gpu(family);
        simulated(&name, Box::new(move || test(&Target { gpu, device: None })));
    }
    let mut on_device = |name: &str, test: Box<dyn FnOnce(&device::Opened) + Send>| {
        let name = format!("device::{name}");
        trials.push(Trial::ignorable_test(name.clone(), move || match device::open() {
            Ok(opened) => {
                numerics::begin(&name);
                test(&opened);
                Ok(Completion::Completed)
            }
            Err(why) => Ok(Completion::ignored_with(format!("no CUDA device: {why}"))),
        }));
    };
    for &(name, test) in TESTS {
        on_device(name, Box::new(move |opened| test(&opened.target())));
    }
    for &(name, test) in DEVICE_TESTS {
        on_device(name, Box::new(test));
    }
    for (family, name, test) in layer_tests() {
        let name = format!("device::{name}");
        trials.push(Trial::ignorable_test(name.clone(), move || {
            numerics::begin(&name);
            on_family(family, &name, test)
        }));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    conclusion.exit_if_failed();
    numerics::write();
    // All of them have run, rather than some that were asked for by name.
    if !arguments.list && arguments.filter.is_none_or(|filter| filter == "simt::") {
        schedules::report();
    }
}

/// What layer tests of a family are simulated for. Hopper with few multiprocessors: blocks stay for many tiles, and shall get more than
/// one.
fn simulated_gpu(family: Family) -> Gpu {
    let gpu = match family {
        Family::Sm90 => Gpu { multiprocessors: 4, ..Gpu::H100 },
        _ => simulate::GPU,
    };
    gpu.with_family(family)
}

/// A layer test on device 0, where it has the family.
fn on_family(family: Family, name: &str, test: Test) -> Result<Completion, Failed> {
    let opened = match device::open() {
        Ok(opened) => opened,
        Err(why) => return Ok(Completion::ignored_with(format!("no CUDA device: {why}"))),
    };
    if family == Family::CublasLt && name.ends_with("::batch_split") {
        return Ok(Completion::ignored_with("a library may compute other batches by other kernels"));
    }
    match opened.device.with_family(family) {
        Ok(device) => {
            test(&Target { gpu: *device.gpu(), device: Some(&opened) });
            // So few samples are less than a tile for each multiprocessor: once more for blocks that have many.
            if family == Family::Sm90 {
                test(&Target { gpu: Gpu { multiprocessors: 2, ..*device.gpu() }, device: Some(&opened) });
            }
            Ok(Completion::Completed)
        }
        Err(why) => Ok(Completion::ignored_with(why.to_string())),
    }
}

/// The layer tests of each family, as `FAMILY::TEST`.
fn layer_tests() -> impl Iterator<Item = (Family, String, Test)> {
    Family::ALL.into_iter().flat_map(|family| {
        // A family of 16-bit types has nothing to do in others.
        let other = |name: &str| ["::f32", "::tf32", "::long_sums"].iter().any(|end| name.ends_with(end));
        let tests = LAYER_TESTS.iter().filter(move |(name, _)| family != Family::Sm90 || !other(name));
        tests.map(move |&(name, test)| (family, format!("{}::{name}", family.name()), test))
    })
}

/// The table names every kernel once, and the simulator has all of them.
fn every_kernel_is_listed() {
    let listed: BTreeSet<&str> = KERNELS.iter().map(|kernel| kernel.name).collect();
    assert_eq!(listed.len(), KERNELS.len());
    let simulated: BTreeSet<&str> = pace_simt::kernels().collect();
    let missing: Vec<_> = listed.difference(&simulated).collect();
    assert!(missing.is_empty(), "the simulator lacks {missing:?}");
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
