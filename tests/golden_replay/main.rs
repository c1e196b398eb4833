//! Replays recorded behaviour of the official PyTorch operators.
//!
//! Every `*.safetensors` file in the folder that `PACE_GOLDEN_DIR` names (default `tests/golden`) is one case; the
//! `kind` in its header chooses the check. Anyone can add cases without touching code. A file that cannot be read, of
//! an unknown kind, or with a tensor that no check looked at fails, and so does a folder without cases.

mod case;
// The tests of kernels have it too, and more to do with it.
#[path = "../cuda/device.rs"]
#[allow(dead_code)]
mod device;
mod kernels;
#[path = "../cuda/machine.rs"]
#[allow(dead_code)]
mod machine;
#[path = "../common/on.rs"]
mod on;
mod operators;
mod plain;
#[path = "../cuda/schedules.rs"]
#[allow(dead_code)]
mod schedules;
#[path = "../cuda/simulate.rs"]
mod simulate;
mod training;
mod vit;

use candle_core::DType;
use case::Case;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use machine::Target;
use on::On;
use pace_kernels::cuda::Family;
use std::path::{Path, PathBuf};

type Check = fn(&Case) -> Result<(), Failed>;
type KernelCheck = fn(&Case, &Target<'_>) -> Result<(), Failed>;
type CandleCheck = fn(&Case, &On) -> Result<(), Failed>;

/// The checks of each kind of case, by the precision they run in.
const CHECKS: &[(&str, &str, Check)] = &[
    ("adapter", "cpu_f64", operators::adapter::<f64>),
    ("adapter", "cpu_f32", operators::adapter::<f32>),
    ("adapter", "candle_f64", |case| vit::adapter(case, &On::CPU)),
    ("adapter", "candle_f32", |case| vit::adapter(case, &On::CPU_F32)),
    ("loss", "cpu_f64", operators::loss::<f64>),
    ("loss", "cpu_f32", operators::loss::<f32>),
    ("drop_path", "cpu_f64", operators::drop_path::<f64>),
    ("drop_path", "cpu_f32", operators::drop_path::<f32>),
    ("vit_training", "plain_f64", plain::check),
    ("vit_training", "candle_f64", |case| vit::training(case, &On::CPU)),
    ("vit_training", "candle_f32", |case| vit::training(case, &On::CPU_F32)),
];

/// The families that compute in f32, as recorded runs do.
const F32_FAMILIES: &[Family] = &[Family::Sm80, Family::CublasLt];

/// The checks of the CUDA kernels, which run in the simulator, for each of these families, and on device 0.
const KERNEL_CHECKS: &[(&str, &[Family], KernelCheck)] = &[
    ("adapter", F32_FAMILIES, kernels::adapter),
    ("loss", &[Family::Sm80], kernels::loss),
    ("drop_path", &[Family::Sm80], kernels::drop_path),
    ("vit_training", F32_FAMILIES, training::training),
];

/// The checks of candle's CUDA tensors, on device 0.
const CANDLE_CHECKS: &[(&str, CandleCheck)] = &[("adapter", vit::adapter), ("vit_training", vit::training)];

fn main() {
    let arguments = Arguments::from_args();
    let folder = std::env::var_os("PACE_GOLDEN_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), PathBuf::from);
    libtest_mimic::run(&arguments, trials(&folder)).exit();
}

/// One trial per file and check; what is wrong with the folder or a file is a failing trial.
fn trials(folder: &Path) -> Vec<Trial> {
    let failing = |name: String, why: String| Trial::test(name, move || Err(why.into()));
    let mut files: Vec<PathBuf> = match std::fs::read_dir(folder) {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(error) => return vec![failing("folder".into(), format!("{}: {error}", folder.display()))],
    };
    files.retain(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    if files.is_empty() {
        return vec![failing("folder".into(), format!("no *.safetensors in {}", folder.display()))];
    }
    let mut trials = Vec::new();
    for file in files {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let kind = match Case::read(&file).and_then(|case| Ok(case.text("kind")?.to_owned())) {
            Ok(kind) => kind,
            Err(error) => {
                trials.push(failing(stem, error.message().unwrap_or("cannot be read").to_owned()));
                continue;
            }
        };
        let checks: Vec<_> = CHECKS.iter().filter(|check| check.0 == kind).collect();
        if checks.is_empty() {
            trials.push(failing(stem, format!("unknown kind `{kind}`")));
            continue;
        }
        for &(_, precision, check) in checks {
            let file = file.clone();
            trials.push(Trial::test(format!("{stem}::{precision}"), move || {
                let case = Case::read(&file)?;
                check(&case)?;
                case.all_tensors_used()
            }));
        }
        for &(_, families, check) in KERNEL_CHECKS.iter().filter(|check| check.0 == kind) {
            for &family in families {
                let simulated = file.clone();
                trials.push(Trial::test(format!("{stem}::simt_{}_f32", family.name()), move || {
                    let case = Case::read(&simulated)?;
                    check(&case, &Target { gpu: simulate::GPU.with_family(family), device: None })?;
                    case.all_tensors_used()
                }));
            }
            let file = file.clone();
            trials.push(Trial::ignorable_test(format!("{stem}::cuda_f32"), move || match device::open() {
                Ok(opened) => {
                    let case = Case::read(&file)?;
                    check(&case, &opened.target())?;
                    case.all_tensors_used()?;
                    Ok(Completion::Completed)
                }
                Err(why) => Ok(Completion::ignored_with(format!("no CUDA device: {why}"))),
            }));
        }
        for &(_, check) in CANDLE_CHECKS.iter().filter(|check| check.0 == kind) {
            let file = file.clone();
            trials.push(Trial::ignorable_test(format!("{stem}::candle_cuda_f32"), move || {
                match On::cuda(DType::F32) {
                    Ok(on) => {
                        let case = Case::read(&file)?;
                        check(&case, &on)?;
                        case.all_tensors_used()?;
                        Ok(Completion::Completed)
                    }
                    Err(why) => Ok(Completion::ignored_with(why)),
                }
            }));
        }
    }
    trials
}
