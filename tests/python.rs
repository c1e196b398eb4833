//! The PyTorch package: `pytest` over `python/tests`, one trial for each file.
//!
//! It takes a Python with torch, timm and pytest: `PACE_PYTHON`, or `python3` if it has them. The package itself need not be
//! installed.

#[path = "common/installed.rs"]
mod installed;
#[path = "common/python.rs"]
mod python;

use installed::{prefix, root, run, say};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::process::Command;
use std::sync::LazyLock;

/// The Python to use, or why there is none.
static PYTHON: LazyLock<Result<String, String>> = LazyLock::new(|| {
    let python = python::with(&["torch", "timm", "pytest", "safetensors"]);
    // One that was named is meant to be used.
    assert!(python.is_ok() || std::env::var_os("PACE_PYTHON").is_none(), "PACE_PYTHON={python:?}");
    python
});

fn test(file: &str) -> Result<Completion, Failed> {
    let python = match &*PYTHON {
        Ok(python) => python,
        Err(why) => return Ok(Completion::ignored_with(why)),
    };
    let library = format!("libpace_kernels{}", std::env::consts::DLL_SUFFIX);
    let mut pytest = Command::new(python);
    pytest
        // `-rs` tells why tests were skipped.
        .args(["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"])
        .arg(root().join("python/tests").join(file))
        .env("PYTHONPATH", root().join("python/src"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("PACE_KERNELS_LIBRARY", prefix().join("lib").join(library))
        .current_dir(env!("CARGO_TARGET_TMPDIR"));
    say(&format!("pytest {file}"));
    println!("{}", run(&mut pytest));
    Ok(Completion::Completed)
}

fn main() {
    let arguments = Arguments::from_args();
    let entries = std::fs::read_dir(root().join("python/tests")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<_> = names.filter(|name| name.starts_with("test_") && name.ends_with(".py")).collect();
    // The longest, which are at the end of the alphabet, come first.
    files.sort();
    files.reverse();
    assert!(!files.is_empty());
    let trials = files.into_iter().map(|file| Trial::ignorable_test(file.clone(), move || test(&file)));
    libtest_mimic::run(&arguments, trials.collect()).exit();
}
