//! Programs in C and C++ against the header and the library, as a user gets them.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Where `scripts/install_c.sh` has put the library.
fn prefix() -> &'static Path {
    static PREFIX: OnceLock<PathBuf> = OnceLock::new();
    PREFIX.get_or_init(|| {
        let prefix = Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi");
        let mut install = Command::new(root().join("scripts/install_c.sh"));
        install.arg(&prefix).env("PROFILE", "dev");
        // These programs use the CPU, and kernels take minutes to compile.
        for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PACE_REQUIRE_NVCC"] {
            install.env_remove(variable);
        }
        run(&mut install);
        prefix
    })
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a command that must succeed, and gives what it printed.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (printed, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{printed}\n{errors}", output.status);
    printed
}

/// The compiler's and linker's options by pkg-config.
fn flags(options: &[&str]) -> Vec<String> {
    let mut command = Command::new("pkg-config");
    command.args(options).arg("pace-kernels").env("PKG_CONFIG_PATH", prefix().join("lib/pkgconfig"));
    run(&mut command).split_whitespace().map(str::to_owned).collect()
}

fn compile(
    compiler: &str,
    options: &[&str],
    source: &Path,
    libraries: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> PathBuf {
    let program = prefix().join(format!("{}-{}", source.file_stem().unwrap().display(), options[0].len()));
    let mut command = Command::new(compiler);
    command
        .args(options)
        .args(["-Wall", "-Wextra", "-Wpedantic", "-Werror"])
        .arg("-o")
        .arg(&program)
        .arg(source);
    run(command.args(libraries));
    program
}

fn linked_to_the_shared_library(compiler: &str, options: &[&str], source: &str) -> String {
    let flags = flags(&["--cflags", "--libs"]);
    let own = ["-pthread".into(), "-lm".into(), format!("-Wl,-rpath,{}", prefix().join("lib").display())];
    let program = compile(compiler, options, &root().join(source), flags.into_iter().chain(own));
    run(&mut Command::new(program))
}

#[test]
fn c_program() {
    let printed = linked_to_the_shared_library("cc", &["-std=c99"], "examples/c/pace_step.c");
    assert!(printed.contains("refused: `x` has 383 elements, but its shape [B·T, K] needs 384"), "{printed}");
}

#[test]
fn c_program_with_the_static_library() {
    let libraries = flags(&["--cflags", "--libs", "--static"]);
    let archive = prefix().join("lib/libpace_kernels.a").display().to_string();
    let libraries =
        libraries.into_iter().map(|flag| if flag == "-lpace_kernels" { archive.clone() } else { flag });
    let program = compile("cc", &["-std=gnu11"], &root().join("examples/c/pace_step.c"), libraries);
    run(&mut Command::new(program));
}

#[test]
fn cpp_program() {
    let printed = linked_to_the_shared_library("c++", &["-std=c++17"], "examples/cpp/noisy_linear.cpp");
    assert!(printed.contains("finite differences"), "{printed}");
}
