//! Compiles `kernels/*.cu` with nvcc and embeds them (feature `cuda`).
//!
//! Writes `kernels.rs` to `OUT_DIR`: the compiled files, or why there are none. Without nvcc the crate still builds, with
//! a warning; `PACE_REQUIRE_NVCC=1` makes that an error.

#[path = "build/nvcc.rs"]
mod nvcc;

use nvcc::{Nvcc, Unusable, VARIABLES};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(error) = kernels() {
        // Cargo shows what a failing build script wrote to stderr.
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn kernels() -> Result<(), String> {
    for variable in VARIABLES.into_iter().chain(["DOCS_RS"]) {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=kernels");
    let variable = |name: &str| std::env::var_os(name);
    let folder = PathBuf::from(variable("OUT_DIR").ok_or("OUT_DIR is not set")?);
    if variable("DOCS_RS").is_some() {
        return write_table(&folder, &[], "the documentation is built without them");
    }
    let nvcc = match Nvcc::from_environment(&variable) {
        Ok(nvcc) => nvcc,
        Err(Unusable::Missing(why)) if variable("PACE_REQUIRE_NVCC").is_none_or(|value| value != "1") => {
            println!(
                "cargo:warning=the CUDA kernels are not built: {}; set CUDA_HOME to a CUDA toolkit",
                why.lines().next().unwrap_or_default()
            );
            return write_table(&folder, &[], &why);
        }
        Err(Unusable::Missing(why)) => {
            return Err(format!("{why}; set CUDA_HOME to a CUDA toolkit, or do without PACE_REQUIRE_NVCC"));
        }
        Err(Unusable::Wrong(why)) => return Err(why),
    };
    println!("cargo:rerun-if-changed={}", nvcc.path().display());

    let kernels = std::env::current_dir().map_err(|error| error.to_string())?.join("kernels");
    let files = std::fs::read_dir(&kernels).map_err(|error| format!("{}: {error}", kernels.display()))?;
    let mut sources: Vec<PathBuf> = files.filter_map(|file| Some(file.ok()?.path())).collect();
    sources.retain(|file| file.extension().is_some_and(|extension| extension == "cu"));
    sources.sort();
    let jobs = variable("NUM_JOBS").and_then(|jobs| jobs.to_str()?.parse().ok()).unwrap_or(1);
    nvcc.compile(&sources, &folder, jobs)?;
    write_table(&folder, &sources, "")
}

/// `kernels.rs`: each file's name and contents, and why there are none.
fn write_table(folder: &Path, sources: &[PathBuf], why_not: &str) -> Result<(), String> {
    let mut table = String::from("pub(super) const FATBINS: &[(&str, &[u8])] = &[\n");
    for source in sources {
        let name = source.file_stem().unwrap_or_default().to_string_lossy();
        let _ = writeln!(table, "    ({name:?}, include_bytes!({:?})),", format!("{name}.fatbin"));
    }
    let _ = writeln!(table, "];\npub(super) const WHY_NOT_BUILT: &str = {why_not:?};");
    let path = folder.join("kernels.rs");
    std::fs::write(&path, table).map_err(|error| format!("cannot write {}: {error}", path.display()))
}
