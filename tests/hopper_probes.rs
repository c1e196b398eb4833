//! The probes in `benches/hopper` compile without a warning, and ptxas neither serialises their wgmmas nor spills. Reported
//! as ignored where there is no nvcc.

#[allow(dead_code)]
#[path = "../build/kernels.rs"]
mod kernels;
#[allow(dead_code)]
#[path = "../build/nvcc.rs"]
mod nvcc;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Compiles one probe for Hopper; everything that the compiler says but its statistics is wrong.
fn compile(nvcc: &Path, probe: &str) -> Result<Completion, Failed> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/hopper").join(format!("{probe}.cu"));
    let output = Command::new(nvcc)
        .args(["-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v"])
        .args(["-Xcompiler", "-Wall,-Wextra", "-cubin", "-o"])
        .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{probe}.cubin")))
        .arg(source)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(said.into_owned().into());
    }
    let mistakes: Vec<&str> = said
        .lines()
        .filter(|line| {
            let spills = line.contains("spill stores") && !line.contains(" 0 bytes spill stores");
            spills || line.contains("warning") || line.contains("Potential Performance Loss")
        })
        .collect();
    match mistakes.is_empty() {
        true => Ok(Completion::Completed),
        false => Err(mistakes.join("\n").into()),
    }
}

fn main() {
    let arguments = Arguments::from_args();
    let nvcc: Result<Option<PathBuf>, String> = nvcc::find(&|name| std::env::var_os(name));
    let trials = ["conversion", "descriptors", "mainloop", "multicast", "rates", "tma"]
        .map(|probe| {
            let nvcc = nvcc.clone();
            Trial::ignorable_test(probe, move || match nvcc? {
                Some(nvcc) => compile(&nvcc, probe),
                None => Ok(Completion::ignored_with("no nvcc")),
            })
        })
        .into();
    libtest_mimic::run(&arguments, trials).exit();
}
