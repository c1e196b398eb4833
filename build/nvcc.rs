//! Finding nvcc and compiling the kernels with it; used by `build.rs` and tested by `tests/build_script.rs`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What `PACE_CUDA_ARCHS` is if it is not set: Ampere and up, with Hopper's own instructions.
pub const DEFAULT_ARCHS: &str = "80;90a";
/// PTX for every device that has no image of its own.
const PTX_FLOOR: &str = "80";
/// The first release that knows `sm_90a`.
const OLDEST: (u32, u32) = (12, 0);

/// Environment variables that decide how the kernels are built.
pub const VARIABLES: [&str; 6] =
    ["NVCC", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "PACE_CUDA_ARCHS", "PACE_REQUIRE_NVCC"];

/// Looks for nvcc: `NVCC` (must exist if set), `CUDA_HOME`, `CUDA_PATH`, `PATH`, `/usr/local/cuda`.
pub fn find(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Option<PathBuf>, String> {
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let name = format!("nvcc{}", std::env::consts::EXE_SUFFIX);
    if let Some(nvcc) = variable("NVCC").map(PathBuf::from) {
        return match nvcc.is_file() {
            true => Ok(Some(nvcc)),
            false => Err(format!("NVCC is set to {}, which is not a file", nvcc.display())),
        };
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable);
    let mut folders: Vec<PathBuf> = homes.map(|home| Path::new(&home).join("bin")).collect();
    folders.extend(variable("PATH").iter().flat_map(std::env::split_paths));
    folders.push("/usr/local/cuda/bin".into());
    Ok(folders.into_iter().map(|folder| folder.join(&name)).find(|nvcc| nvcc.is_file()))
}

/// The release in the output of `nvcc --version`.
pub fn release(version: &str) -> Option<(u32, u32)> {
    let (_, rest) = version.split_once("release ")?;
    let (major, rest) = rest.split_once('.')?;
    let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Some((major.trim().parse().ok()?, minor.parse().ok()?))
}

/// The architectures in `PACE_CUDA_ARCHS`: numbers with an optional suffix `a` or `f`, separated by `;`, `,` or spaces.
pub fn archs(list: &str) -> Result<Vec<String>, String> {
    let mut archs: Vec<String> = Vec::new();
    for arch in list.split([';', ',', ' ']).filter(|arch| !arch.is_empty()) {
        let number = arch.strip_suffix(['a', 'f']).unwrap_or(arch);
        match number.parse::<u32>() {
            Ok(number) if number >= 80 => {}
            Ok(_) => {
                return Err(format!(
                    "PACE_CUDA_ARCHS asks for {arch}; the kernels need 80 (Ampere) or newer"
                ));
            }
            Err(_) => {
                return Err(format!(
                    "PACE_CUDA_ARCHS has `{arch}`, expected numbers such as `{DEFAULT_ARCHS}`"
                ));
            }
        }
        if !archs.iter().any(|known| known == arch) {
            archs.push(arch.to_owned());
        }
    }
    if archs.is_empty() {
        return Err(format!("PACE_CUDA_ARCHS is empty, expected numbers such as `{DEFAULT_ARCHS}`"));
    }
    Ok(archs)
}

/// Checks that nvcc knows every architecture; `known` is the output of `nvcc --list-gpu-arch`.
pub fn check_archs(archs: &[String], known: &str) -> Result<(), String> {
    let known: Vec<&str> =
        known.split_whitespace().filter_map(|line| line.strip_prefix("compute_")).collect();
    for arch in archs.iter().map(String::as_str).chain([PTX_FLOOR]) {
        // The list does not name the variants with a suffix.
        if !known.contains(&arch.trim_end_matches(['a', 'f'])) {
            return Err(format!(
                "this nvcc does not know architecture {arch} (it knows {}); change PACE_CUDA_ARCHS or nvcc",
                known.join(", ")
            ));
        }
    }
    Ok(())
}

/// The prerequisites in a Makefile rule as compilers write it.
pub fn prerequisites(depfile: &str) -> Vec<PathBuf> {
    let joined = depfile.replace("\\\r\n", " ").replace("\\\n", " ");
    // A colon without a space behind it is part of a Windows path.
    let Some((_, list)) = joined.split_once(": ") else { return Vec::new() };
    let list = list.split('\n').next().unwrap_or_default().replace("\\ ", "\0");
    list.split_whitespace().map(|path| path.replace('\0', " ").into()).collect()
}

/// A usable nvcc.
pub struct Nvcc {
    path: PathBuf,
    version: String,
    archs: Vec<String>,
    host_compiler: Option<OsString>,
}

/// Why there is no usable nvcc.
pub enum Unusable {
    /// The crate can be built without kernels.
    Missing(String),
    /// Something that was asked for cannot be done.
    Wrong(String),
}

impl Nvcc {
    /// The nvcc that the environment names, if it is new enough and knows the architectures.
    pub fn from_environment(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, Unusable> {
        let archs = match variable("PACE_CUDA_ARCHS") {
            Some(list) => archs(&list.to_string_lossy()),
            None => archs(DEFAULT_ARCHS),
        };
        let archs = archs.map_err(Unusable::Wrong)?;
        let path = find(variable).map_err(Unusable::Wrong)?.ok_or_else(|| {
            Unusable::Missing(
                "nvcc was not found in NVCC, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda".into(),
            )
        })?;
        let version = run(Command::new(&path).arg("--version")).map_err(Unusable::Missing)?;
        match release(&version) {
            Some(found) if found >= OLDEST => {}
            found => {
                let found =
                    found.map_or("of an unknown release".into(), |(major, minor)| format!("{major}.{minor}"));
                return Err(Unusable::Missing(format!(
                    "{} is {found}, but the kernels need {}.{} or newer",
                    path.display(),
                    OLDEST.0,
                    OLDEST.1
                )));
            }
        }
        let known = run(Command::new(&path).arg("--list-gpu-arch")).map_err(Unusable::Missing)?;
        check_archs(&archs, &known).map_err(Unusable::Wrong)?;
        Ok(Self { path, version, archs, host_compiler: variable("NVCC_CCBIN") })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Compiles `sources` to `folder/NAME.fatbin`, at most `jobs` at a time, and leaves alone what is up to date.
    pub fn compile(&self, sources: &[PathBuf], folder: &Path, jobs: usize) -> Result<(), String> {
        let next = AtomicUsize::new(0);
        let errors = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..jobs.clamp(1, sources.len().max(1)) {
                scope.spawn(|| {
                    while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(error) = self.compile_one(source, folder) {
                            errors.lock().expect("no thread panics while it holds this").push(error);
                        }
                    }
                });
            }
        });
        let errors = errors.into_inner().expect("no thread panicked");
        if errors.is_empty() { Ok(()) } else { Err(errors.join("\n")) }
    }

    fn compile_one(&self, source: &Path, folder: &Path) -> Result<(), String> {
        let output = |extension: &str| {
            folder.join(Path::new(source.file_name().unwrap_or_default()).with_extension(extension))
        };
        let (fatbin, depfile, recipe) = (output("fatbin"), output("d"), output("recipe"));
        let mut command = Command::new(&self.path);
        command.args(["-fatbin", "-std=c++17", "-O3", "-MD", "-MF"]).arg(&depfile);
        for arch in &self.archs {
            command.args(["-gencode", &format!("arch=compute_{arch},code=sm_{arch}")]);
        }
        command.args(["-gencode", &format!("arch=compute_{PTX_FLOOR},code=compute_{PTX_FLOOR}")]);
        if let Some(host_compiler) = &self.host_compiler {
            command.arg("-ccbin").arg(host_compiler);
        }
        command.arg("-o").arg(&fatbin).arg(source);
        let this_recipe = format!("{command:?}\n{}", self.version);
        let unchanged = std::fs::read_to_string(&recipe).is_ok_and(|last| last == this_recipe);
        if unchanged && is_newer(&fatbin, &depfile) {
            return Ok(());
        }
        run(&mut command)?;
        std::fs::write(&recipe, this_recipe).map_err(|error| format!("{}: {error}", recipe.display()))
    }
}

/// Whether `output` is newer than everything that it was made of, according to the depfile.
pub fn is_newer(output: &Path, depfile: &Path) -> bool {
    let modified = |path: &Path| std::fs::metadata(path).and_then(|file| file.modified()).ok();
    let Some(made) = modified(output) else { return false };
    let Ok(rule) = std::fs::read_to_string(depfile) else { return false };
    prerequisites(&rule).iter().all(|path| modified(path).is_some_and(|changed| changed < made))
}

/// What the command printed; if it failed, an error that holds everything it printed.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("cannot run {command:?}: {error}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.success() {
        true => Ok(stdout),
        false => {
            let stderr = String::from_utf8_lossy(&output.stderr);
            Err(format!("{command:?} failed ({}):\n{stdout}{stderr}", output.status))
        }
    }
}
