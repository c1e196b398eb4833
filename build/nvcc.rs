//! Finding nvcc and compiling the kernels with it; used by `build.rs` and tested by `tests/build_script.rs`.

use super::kernels::Source;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// What `PACE_CUDA_ARCHS` is if it is not set: Ampere and up, with Hopper's own instructions.
pub const DEFAULT_ARCHS: &str = "80;90a";
/// What portable kernels are compiled to: PTX, which is assembled for each image, and kept for devices that have none. Compiled for
/// 9.0 they were the same instructions, but for a few registers, and that takes as long again.
const PTX_FLOOR: &str = "80";
/// The first release that knows `sm_90a`.
const OLDEST: (u32, u32) = (12, 0);
/// The first release whose ptxas has no known fault with wgmma: older ones may rewrite the registers of its left operand before it
/// has read them.
const WGMMA_PTXAS: (u32, u32) = (13, 3);
/// Folders of kernels, and the one architecture whose own instructions they need. `None`: they are portable. An image for
/// `90a` runs on devices of compute capability 9.0 only, and there is no PTX that could be compiled for others.
const FAMILIES: [(&str, Option<&str>); 3] = [("", None), ("sm80", None), ("sm90", Some("90a"))];
/// What ptxas says when it serialises asynchronous instructions, which makes them several times slower: an error in
/// families that are bound to one architecture.
const SERIALISED: &str = "Potential Performance Loss";

/// Environment variables that decide how the kernels are built.
pub const VARIABLES: [&str; 7] =
    ["NVCC", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "PACE_CUDA_ARCHS", "PACE_PTXAS", "PACE_REQUIRE_NVCC"];

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

/// The release in the output of `nvcc --version` or `ptxas --version`.
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

/// What a file is compiled for.
#[derive(Debug, PartialEq, Eq)]
pub struct Targets {
    /// Architectures with an image; without any the file is left out.
    pub images: Vec<String>,
    /// The architecture of the PTX for devices without an image.
    pub ptx: Option<&'static str>,
}

/// What the files of a family are compiled for, given the architectures in `PACE_CUDA_ARCHS`.
pub fn targets(family: &str, archs: &[String]) -> Result<Targets, String> {
    let number = |arch: &str| arch.trim_end_matches(['a', 'f']).to_owned();
    match FAMILIES.into_iter().find(|&(name, _)| name == family) {
        Some((_, None)) => {
            let mut images: Vec<String> = archs.iter().map(|arch| number(arch)).collect();
            images.sort_by_key(|arch| arch.parse::<u32>().ok());
            images.dedup();
            Ok(Targets { images, ptx: Some(PTX_FLOOR) })
        }
        Some((_, Some(only))) => {
            let wanted = archs.iter().any(|arch| number(arch) == number(only));
            Ok(Targets { images: wanted.then(|| only.to_owned()).into_iter().collect(), ptx: None })
        }
        None => Err(format!("kernels/{family} is not in the list of families in build/nvcc.rs")),
    }
}

/// The only compute capability that the images of a family run on, if there is only one.
pub fn only_capability(family: &str) -> Option<(u32, u32)> {
    let (_, only) = FAMILIES.into_iter().find(|&(name, _)| name == family)?;
    let number: u32 = only?.trim_end_matches(['a', 'f']).parse().ok()?;
    Some((number / 10, number % 10))
}

/// The prerequisites in a Makefile rule as compilers write it.
pub fn prerequisites(depfile: &str) -> Vec<PathBuf> {
    let joined = depfile.replace("\\\r\n", " ").replace("\\\n", " ");
    // A colon without a space behind it is part of a Windows path.
    let Some((_, list)) = joined.split_once(": ") else { return Vec::new() };
    let list = list.split('\n').next().unwrap_or_default().replace("\\ ", "\0");
    list.split_whitespace().map(|path| path.replace('\0', " ").into()).collect()
}

/// An assembler other than nvcc's own.
pub struct Ptxas {
    path: PathBuf,
    /// What it says about itself.
    version: String,
}

impl Ptxas {
    /// The ptxas that `PACE_PTXAS` names, which must be a usable one if it is set.
    pub fn from_environment(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Option<Self>, String> {
        let Some(path) = variable("PACE_PTXAS").filter(|value| !value.is_empty()).map(PathBuf::from) else {
            return Ok(None);
        };
        if !path.is_file() {
            return Err(format!("PACE_PTXAS is set to {}, which is not a file", path.display()));
        }
        let version = run(Command::new(&path).arg("--version"))?;
        match release(&version) {
            Some(found) if found >= WGMMA_PTXAS => Ok(Some(Self { path, version })),
            found => {
                let (major, minor) = WGMMA_PTXAS;
                let path = path.display();
                Err(format!(
                    "PACE_PTXAS is set to {path}, which is {}; {major}.{minor} or newer is needed",
                    said(found)
                ))
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn command(&self, arch: &str, ptx: &Path, to: &Path) -> Vec<OsString> {
        let arch = format!("-arch=sm_{arch}").into();
        vec![self.path.clone().into(), arch, "-m64".into(), "-O3".into(), "-o".into(), to.into(), ptx.into()]
    }
}

/// A release in words.
fn said(release: Option<(u32, u32)>) -> String {
    release.map_or("of an unknown release".into(), |(major, minor)| format!("{major}.{minor}"))
}

/// A usable nvcc.
pub struct Nvcc {
    path: PathBuf,
    release: (u32, u32),
    /// What it says about itself.
    version: String,
    archs: Vec<String>,
    host_compiler: Option<OsString>,
    /// Assembles the files of families that are bound to one architecture, if not nvcc does it.
    ptxas: Option<Ptxas>,
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
        let release = match release(&version) {
            Some(found) if found >= OLDEST => found,
            found => {
                return Err(Unusable::Missing(format!(
                    "{} is {}, but the kernels need {}.{} or newer",
                    path.display(),
                    said(found),
                    OLDEST.0,
                    OLDEST.1
                )));
            }
        };
        let known = run(Command::new(&path).arg("--list-gpu-arch")).map_err(Unusable::Missing)?;
        check_archs(&archs, &known).map_err(Unusable::Wrong)?;
        let ptxas = Ptxas::from_environment(variable).map_err(Unusable::Wrong)?;
        Ok(Self { path, release, version, archs, host_compiler: variable("NVCC_CCBIN"), ptxas })
    }

    /// Where it is, and where the other assembler is if there is one.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(&*self.path).chain(self.ptxas.as_ref().map(Ptxas::path))
    }

    /// What should be known about the files that were built, if anything. They are built nevertheless: no wrong code was seen in
    /// them, and `tests/compiled` looks for it.
    pub fn warning(&self, built: &[Source]) -> Option<String> {
        let assembled = built.iter().any(|source| only_capability(source.family()).is_some());
        let old = self.ptxas.is_none() && self.release < WGMMA_PTXAS;
        (assembled && old).then(|| {
            let (major, minor) = WGMMA_PTXAS;
            format!(
                "the kernels for Hopper are assembled by ptxas {}, which has a known fault with wgmma; set PACE_PTXAS to a \
                 ptxas of {major}.{minor} or newer",
                said(Some(self.release))
            )
        })
    }

    /// Compiles each source to `FLAT_NAME.fatbin` in `folder`, at most `jobs` at a time, and leaves alone what is up to date;
    /// `progress` gets a line before and after each. Returns the sources that have an image; the families of the others are
    /// for architectures that nobody asked for.
    pub fn compile(
        &self,
        sources: &[Source],
        folder: &Path,
        jobs: usize,
        progress: &(dyn Fn(&str) + Sync),
    ) -> Result<Vec<Source>, String> {
        let mut built = Vec::new();
        let mut outdated = Vec::new();
        for source in sources {
            let targets = targets(source.family(), &self.archs)?;
            if targets.images.is_empty() {
                continue;
            }
            let compilation = self.compilation(source, &targets, folder);
            if !compilation.is_up_to_date() {
                outdated.push(compilation);
            }
            built.push(source.clone());
        }
        let (major, minor) = self.release;
        let name = format!("nvcc {major}.{minor}");
        let next = AtomicUsize::new(0);
        let errors = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..jobs.clamp(1, outdated.len().max(1)) {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(compilation) = outdated.get(index) else { break };
                        let (file, count) = (&compilation.file, outdated.len());
                        progress(&format!("{name}: {file}.cu, {} of {count}", index + 1));
                        let start = Instant::now();
                        match compilation.run() {
                            Ok(()) => progress(&format!("{file}.cu took {:.0?}", start.elapsed())),
                            Err(error) => {
                                errors.lock().expect("no thread panics while it holds this").push(error)
                            }
                        }
                    }
                });
            }
        });
        let errors = errors.into_inner().expect("no thread panicked");
        if errors.is_empty() { Ok(built) } else { Err(errors.join("\n")) }
    }

    fn compilation(&self, source: &Source, targets: &Targets, folder: &Path) -> Compilation {
        let output = |extension: &str| folder.join(format!("{}.{extension}", source.flat_name()));
        let (fatbin, depfile) = (output("fatbin"), output("d"));
        let compile = |kind: &str, codes: &[OsString], to: &Path| {
            let mut command = vec![self.path.clone().into_os_string()];
            command.extend([kind, "-std=c++17", "-O3", "-MD", "-MF"].map(OsString::from));
            command.push(depfile.clone().into());
            command.extend(codes.iter().flat_map(|code| ["-gencode".into(), code.clone()]));
            if let Some(host_compiler) = &self.host_compiler {
                command.extend(["-ccbin".into(), host_compiler.clone()]);
            }
            command.extend(["-o".into(), to.into(), source.path.clone().into()]);
            command
        };
        let gencode =
            |ptx: &str, code: &str, arch: &str| format!("arch=compute_{ptx},code={code}_{arch}").into();
        // Bound to one architecture, there is one image, and the driver takes that as well as a file of many.
        let bound = targets.images.first().filter(|_| targets.ptx.is_none());
        let (commands, version) = match self.ptxas.as_ref().zip(bound) {
            Some((ptxas, arch)) => {
                let ptx = output("ptx");
                let commands = vec![
                    compile("-ptx", &[gencode(arch, "compute", arch)], &ptx),
                    ptxas.command(arch, &ptx, &fatbin),
                ];
                (commands, &*ptxas.version)
            }
            None => {
                let images =
                    targets.images.iter().map(|arch| gencode(targets.ptx.unwrap_or(arch), "sm", arch));
                let codes: Vec<OsString> =
                    images.chain(targets.ptx.map(|arch| gencode(arch, "compute", arch))).collect();
                (vec![compile("-fatbin", &codes, &fatbin)], "")
            }
        };
        Compilation {
            file: source.file.clone(),
            recipe: format!("{commands:?}\n{}{version}", self.version),
            recipe_file: output("recipe"),
            commands,
            fatbin,
            depfile,
            may_serialise: targets.ptx.is_some(),
        }
    }
}

/// How one file is compiled.
struct Compilation {
    file: String,
    /// One after the other.
    commands: Vec<Vec<OsString>>,
    /// Changes whenever the outcome might although no file did.
    recipe: String,
    /// Where the recipe of the last success is.
    recipe_file: PathBuf,
    fatbin: PathBuf,
    depfile: PathBuf,
    may_serialise: bool,
}

impl Compilation {
    fn is_up_to_date(&self) -> bool {
        std::fs::read_to_string(&self.recipe_file).is_ok_and(|last| last == self.recipe)
            && is_newer(&self.fatbin, &self.depfile)
    }

    fn run(&self) -> Result<(), String> {
        // nvcc may leave a new file although this fails.
        let _ = std::fs::remove_file(&self.recipe_file);
        for words in &self.commands {
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]);
            let said = run_for_all_output(&mut command)?;
            if !self.may_serialise && said.contains(SERIALISED) {
                return Err(format!("{command:?} made slow code:\n{said}"));
            }
        }
        std::fs::write(&self.recipe_file, &self.recipe)
            .map_err(|error| format!("{}: {error}", self.recipe_file.display()))
    }
}

/// Whether `output` is newer than everything that it was made of, according to the depfile.
pub fn is_newer(output: &Path, depfile: &Path) -> bool {
    let modified = |path: &Path| std::fs::metadata(path).and_then(|file| file.modified()).ok();
    let Some(made) = modified(output) else { return false };
    let Ok(rule) = std::fs::read_to_string(depfile) else { return false };
    prerequisites(&rule).iter().all(|path| modified(path).is_some_and(|changed| changed < made))
}

/// What the command printed to its standard output; if it failed, an error that holds everything it printed.
fn run(command: &mut Command) -> Result<String, String> {
    let output = output(command)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Everything the command printed.
fn run_for_all_output(command: &mut Command) -> Result<String, String> {
    output(command).map(|output| text_of(&output))
}

fn text_of(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text)).concat()
}

fn output(command: &mut Command) -> Result<Output, String> {
    let output = command.output().map_err(|error| format!("cannot run {command:?}: {error}"))?;
    if output.status.success() {
        Ok(output)
    } else {
        Err(format!("{command:?} failed ({}):\n{}", output.status, text_of(&output)))
    }
}
