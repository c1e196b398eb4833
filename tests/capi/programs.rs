//! Programs in C and C++ against the header and the library, installed as for a user.

use crate::installed::{prefix, root, run};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

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
        .args(["-Wall", "-Wextra", "-Wpedantic", "-Wredundant-decls", "-Werror"])
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

/// Loaded and closed again and again beside threads that have used it; forked, before and after operators have run; and given threads.
#[cfg(target_os = "linux")]
#[test]
fn processes_that_load_and_fork() {
    let own = flags(&["--cflags"]).into_iter().chain(["-pthread".into(), "-ldl".into()]);
    let program = compile("cc", &["-std=gnu11"], &root().join("tests/capi/processes.c"), own);
    let library = prefix().join("lib/libpace_kernels.so");
    for what in ["reload", "fork", "register"] {
        assert_eq!(run(Command::new(&program).arg(&library).arg(what)), "done\n", "{what}");
    }
}

#[test]
fn the_guide_shows_what_the_programs_do() {
    let guide = std::fs::read_to_string(root().join("docs/embedding.md")).unwrap();
    let read = |path: &str| std::fs::read_to_string(root().join(path)).unwrap();
    let sources = [("c", read("examples/c/pace_step.c")), ("cpp", read("examples/cpp/noisy_linear.cpp"))];
    for (language, source) in sources {
        let start = format!("```{language}\n");
        let blocks = guide.split(&start).skip(1).map(|rest| rest.split("```").next().unwrap());
        let blocks: Vec<&str> = blocks.collect();
        assert!(!blocks.is_empty());
        for block in blocks {
            assert!(source.contains(block), "not in the {language} program:\n{block}");
        }
    }
}
