//! Compiles the kernels, and those of the simulator's own tests, with the host's C++ compiler.
//!
//! Writes `kernels.rs` to `OUT_DIR`: a table of every kernel by name.

// The crate's build script uses the rest.
#[allow(dead_code)]
#[path = "../../build/kernels.rs"]
mod kernels;

use kernels::{Group, Source, all_groups, sources};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn main() {
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let include = here.join("include");
    let kernels = here.join("../../kernels");
    let mut build = cc::Build::new();
    // Contraction stays off: an operation is fused where the kernel says so and nowhere else.
    build
        .cpp(true)
        .std("c++17")
        .flag("-ffp-contract=off")
        .flag("-Wno-unknown-pragmas")
        // GCC takes guards that are equal for different ones.
        .flag_if_supported("-Wno-maybe-uninitialized")
        .warnings_into_errors(true)
        // Lines, as in the Rust part: the names of all variables take a quarter of the time.
        .debug(false)
        .flag("-g1");
    build.flag("-include").flag(include.join("simt.h")).include(&include).include(&kernels);

    if std::env::var_os("CARGO_FEATURE_SANITIZE").is_some() {
        // The address sanitizer's library has to be the first of all.
        for sanitizer in ["asan", "ubsan"] {
            println!("cargo:rustc-link-lib=dylib={sanitizer}");
        }
        build.flag("-fsanitize=address,undefined,float-cast-overflow").flag("-fno-sanitize-recover=all");
        build.force_frame_pointer(true);
        // It takes a third of the time to compile, and runs nearly as fast.
        build.opt_level(1);
    }

    let mut declarations = String::from("unsafe extern \"C\" {\n");
    let mut table = String::from("const KERNELS: &[Kernel] = &[\n");
    println!("cargo:rerun-if-changed={}", include.display());
    println!("cargo:rerun-if-changed={}", here.join("../../build/kernels.rs").display());
    for folder in [&kernels, &here.join("kernels")] {
        println!("cargo:rerun-if-changed={}", folder.display());
        let files = sources(folder).expect("a folder of kernels");
        for file in &files {
            // The extension would make the compiler look for CUDA.
            build.file(as_cpp(file, &out));
        }
        for (_, groups) in all_groups(&files).expect("kernels with names of their own") {
            for name in groups.iter().flat_map(Group::kernels) {
                let _ = writeln!(declarations, "    fn pace_simt_run_{name}(params: *const u8);");
                let _ = writeln!(declarations, "    safe fn pace_simt_bytes_{name}() -> usize;");
                let _ = writeln!(declarations, "    safe fn pace_simt_cluster_{name}() -> u32;");
                let _ = writeln!(
                    table,
                    "    Kernel {{ name: {name:?}, run: pace_simt_run_{name}, bytes: pace_simt_bytes_{name}, \
                     cluster: pace_simt_cluster_{name} }},"
                );
            }
        }
    }
    std::fs::write(out.join("kernels.rs"), format!("{declarations}}}\n{table}];\n"))
        .expect("a writable OUT_DIR");
    // Lints link nothing, and keep products of their own: minutes for nothing.
    let wrapper = std::env::var_os("RUSTC_WORKSPACE_WRAPPER").unwrap_or_default();
    if Path::new(&wrapper).file_stem().is_none_or(|name| name != "clippy-driver") {
        build.compile("pace_simt_kernels");
    }
}

/// A C++ file that includes `file`.
fn as_cpp(file: &Source, out: &Path) -> PathBuf {
    let path = file.path.canonicalize().expect("the file was just listed");
    let cpp = out.join(file.flat_name()).with_extension("cpp");
    std::fs::write(&cpp, format!("#include {:?}\n", path.to_string_lossy())).expect("a writable OUT_DIR");
    cpp
}
