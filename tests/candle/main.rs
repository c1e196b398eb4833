//! The candle binding: gradients, branches, variants, weight files, and errors instead of panics. What depends on the
//! device runs on the CPU and on CUDA device 0, and is reported as ignored, with the reason, where there is none.

mod files;
mod layers;
#[path = "../common/on.rs"]
mod on;
mod peft;
#[path = "../common/python.rs"]
mod python;
mod support;
mod training;
mod weights;
mod wrong_use;

use candle_core::{DType, Result};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use on::On;

type Test = fn(&On) -> Result<()>;
type CpuTest = fn() -> Result<()>;

/// Tests of what a device computes.
const TESTS: &[(&str, Test)] = &[
    ("layers_are_those_of_the_cpu", layers::layers_are_those_of_the_cpu),
    ("gradients_do_not_depend_on_each_other", layers::gradients_do_not_depend_on_each_other),
    ("training_steps_are_those_of_the_cpu", training::training_steps_are_those_of_the_cpu),
    ("noise_is_new_every_step", layers::noise_is_new_every_step_and_the_same_for_split_batches),
    ("parting_late_equals_a_doubled_batch", training::parting_late_equals_a_doubled_batch),
    ("drop_path_is_shared_by_the_branches", layers::drop_path_is_shared_by_the_branches),
    ("other_losses_are_those_of_the_cpu", training::other_losses_are_those_of_the_cpu),
    ("variants_use_the_rows_they_should", training::variants_use_the_rows_they_should),
    ("noisy_add_is_the_layers_epilogue", layers::noisy_add_is_the_layers_epilogue),
    ("recorded_peft_adapters_compute_the_same", peft::recorded_adapters_compute_the_same),
    (
        "layers_that_a_peft_adapter_lacks_stay_as_they_are",
        peft::layers_that_an_adapter_lacks_stay_as_they_are,
    ),
    ("wrong_use_is_an_error", wrong_use::wrong_use_is_an_error),
];

/// Tests that need double precision, or are about files.
const CPU_TESTS: &[(&str, CpuTest)] = &[
    ("layer_gradients_match_finite_differences", layers::layer_gradients_match_finite_differences),
    ("weights_round_trip_through_a_file", weights::weights_round_trip_through_a_file),
    ("bad_weight_files_are_errors", weights::bad_weight_files_are_errors_that_say_what_is_missing),
    ("peft_adapters_round_trip_through_a_folder", peft::adapters_round_trip_through_a_folder),
    ("peft_adapters_of_layers_are_those_layers", peft::adapters_of_layers_are_those_layers),
    ("patterns_of_a_peft_adapter_are_pefts", peft::patterns_are_those_of_peft),
    ("bad_peft_configurations_are_errors", peft::bad_configurations_are_errors_that_name_the_setting),
    ("bad_peft_tensors_are_errors", peft::bad_tensors_are_errors_that_name_the_tensor),
    ("damaged_peft_files_are_errors", peft::damaged_files_are_errors),
    ("damaged_files_are_read_whole_or_refused", files::files_with_anything_in_them_are_read_whole_or_refused),
    ("what_peft_cannot_hold_is_an_error", peft::what_peft_cannot_hold_is_an_error),
    ("wrong_sizes_are_errors", wrong_use::wrong_sizes_are_errors),
];

fn main() {
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = Vec::new();
    for &(name, test) in CPU_TESTS {
        trials.push(Trial::test(name, move || Ok(test()?)));
    }
    for &(name, test) in TESTS {
        trials.push(Trial::test(format!("cpu_f64::{name}"), move || Ok(test(&On::CPU)?)));
        trials.push(Trial::test(format!("cpu_f32::{name}"), move || Ok(test(&On::CPU_F32)?)));
        trials.push(on_cuda(format!("cuda_f32::{name}"), DType::F32, test));
    }
    for (dtype, name) in [(DType::F16, "f16"), (DType::BF16, "bf16")] {
        let name = format!("cuda_{name}::layers_are_those_of_the_cpu");
        trials.push(on_cuda(name, dtype, layers::layers_are_those_of_the_cpu));
    }
    trials.push(Trial::ignorable_test("peft_loads_what_is_written", || {
        match python::with(&["torch", "timm", "peft", "safetensors"]) {
            Ok(python) => Ok(peft::peft_loads_what_is_written(&python).map(|()| Completion::Completed)?),
            Err(why) => Ok(Completion::ignored_with(why)),
        }
    }));
    libtest_mimic::run(&arguments, trials).exit();
}

fn on_cuda(name: String, dtype: DType, test: Test) -> Trial {
    Trial::ignorable_test(name, move || match On::cuda(dtype) {
        Ok(on) => test(&on).map(|()| Completion::Completed).map_err(Failed::from),
        Err(why) => Ok(Completion::ignored_with(why)),
    })
}
