//! Compiles the kernels with nvcc and embeds them (feature `cuda`).
//!
//! Writes to `OUT_DIR`: `kernels.rs`, the table of kernels (`src/cuda/kernel.rs`), and `fatbins.rs`, the compiled files, or why
//! there are none. Without nvcc the crate still builds, with a warning; `PACE_REQUIRE_NVCC=1` makes that an error.
//!
//! Compiling takes minutes. Cargo shows a build script's lines only with `-vv`; its warnings come when the script has ended,
//! and again with every later build, so that a warning is no place for progress.

#[path = "build/kernels.rs"]
mod kernels;
#[path = "build/nvcc.rs"]
mod nvcc;

use kernels::{Source, sources, table};
use nvcc::{Nvcc, Unusable, VARIABLES, only_capability};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(error) = build() {
        // Cargo shows what a failing build script wrote to stderr.
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    for variable in VARIABLES.into_iter().chain(["DOCS_RS"]) {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=kernels");
    let variable = |name: &str| std::env::var_os(name);
    let folder = PathBuf::from(variable("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let kernels = std::env::current_dir().map_err(|error| error.to_string())?.join("kernels");
    let sources = sources(&kernels)?;
    write(&folder.join("kernels.rs"), &table(&sources)?)?;
    if variable("DOCS_RS").is_some() {
        return write_fatbins(&folder, &[], "the documentation is built without them");
    }
    let nvcc = match Nvcc::from_environment(&variable) {
        Ok(nvcc) => nvcc,
        Err(Unusable::Missing(why)) if variable("PACE_REQUIRE_NVCC").is_none_or(|value| value != "1") => {
            println!(
                "cargo:warning=the CUDA kernels are not built: {}; set CUDA_HOME to a CUDA toolkit",
                why.lines().next().unwrap_or_default()
            );
            return write_fatbins(&folder, &[], &why);
        }
        Err(Unusable::Missing(why)) => {
            return Err(format!("{why}; set CUDA_HOME to a CUDA toolkit, or do without PACE_REQUIRE_NVCC"));
        }
        Err(Unusable::Wrong(why)) => return Err(why),
    };
    for path in nvcc.paths() {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    let jobs = variable("NUM_JOBS").and_then(|jobs| jobs.to_str()?.parse().ok()).unwrap_or(1);
    let compiled = nvcc.compile(&sources, &folder, jobs, &|line| println!("{line}"))?;
    if let Some(warning) = nvcc.warning(&compiled) {
        println!("cargo:warning={warning}");
    }
    write_fatbins(&folder, &compiled, "")
}

/// `fatbins.rs`: each compiled file's name, the only compute capability that can run it if there is only one, and its
/// contents; and why there are none.
fn write_fatbins(folder: &Path, sources: &[Source], why_not: &str) -> Result<(), String> {
    let mut table =
        String::from("pub(super) type Fatbin = (&'static str, Option<(u32, u32)>, &'static [u8]);\n");
    table += "pub(super) const FATBINS: &[Fatbin] = &[\n";
    for source in sources {
        let (file, only) = (&source.file, only_capability(source.family()));
        let _ =
            writeln!(table, "    ({file:?}, {only:?}, include_bytes!(\"{}.fatbin\")),", source.flat_name());
    }
    let _ = writeln!(table, "];\npub(super) const WHY_NOT_BUILT: &str = {why_not:?};");
    write(&folder.join("fatbins.rs"), &table)
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))
}
