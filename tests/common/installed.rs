//! The C library as `scripts/install_c.sh` installs it.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The folder with `include` and `lib`.
pub fn prefix() -> &'static Path {
    static PREFIX: OnceLock<PathBuf> = OnceLock::new();
    PREFIX.get_or_init(|| {
        let prefix = Path::new(env!("CARGO_TARGET_TMPDIR")).join("installed");
        let mut install = Command::new(root().join("scripts/install_c.sh"));
        install.arg(&prefix).env("PROFILE", "dev");
        // Who uses it here computes on the CPU, and kernels take minutes to compile.
        for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PACE_REQUIRE_NVCC"] {
            install.env_remove(variable);
        }
        say("building the C library, which may take minutes");
        run(&mut install);
        prefix
    })
}

/// Says what is going on while nothing else is printed. Not by `eprintln!`: the test harness keeps that until a test fails.
pub fn say(what: &str) {
    // It does not matter if nobody listens.
    let _ = writeln!(std::io::stderr(), "... {what}");
}

/// Runs a command that must succeed, and gives what it printed.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (printed, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{printed}\n{errors}", output.status);
    printed
}
