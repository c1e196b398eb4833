//! What nvcc made of the kernels: the files that the crate embeds, taken apart by `cuobjdump` (with `nvdisasm`, both part
//! of a CUDA toolkit). Reported as ignored, with the reason, where the kernels are not built or a tool is missing;
//! `PACE_REQUIRE_NVCC=1` makes that a failure.
//!
//! Hopper's kernels are also searched for registers that are touched while a wgmma uses them (`hazards.rs`); `planted.rs` has
//! faults that this must find.
//!
//! `docs/kernels.md` is made here: `PACE_UPDATE_DOCS=1 cargo test --test compiled` writes it.

#[allow(dead_code)]
#[path = "../../build/kernels.rs"]
mod kernels;
#[allow(dead_code)]
#[path = "../../build/nvcc.rs"]
mod nvcc;

mod hazards;
mod planted;
mod sass;

// `FATBINS` and `WHY_NOT_BUILT`, by build.rs.
mod built {
    include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
}

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use pace_kernels::cuda::{KERNELS, Kernel};
use rayon::prelude::*;
use sass::Instruction;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// 16 bytes at a time from global memory, through registers or past them.
const LOADS: &[&str] = &["LDG.128|LDGSTS.128"];
/// The same, and back.
const VECTORS: &[&str] = &["LDG.128|LDGSTS.128", "STG.128"];
/// Tensor cores, fed by matrix loads from shared memory, which asynchronous copies fill.
const PRODUCT: &[&str] = &["HMMA", "LDSM", "LDGSTS.128"];
/// The same where operands of 32 bits have to be transposed, which matrix loads cannot.
const TRANSPOSED: &[&str] = &["HMMA", "LDGSTS.128"];

/// Tensor cores whose left operand comes through registers, where it is multiplied by the noise.
const FACTORS: &[&str] = &["HMMA", "LDSM", "LDG.128"];

/// Warpgroup MMAs, which tensor copies feed, by one of them for several blocks, and whose outputs they take away.
const WARPGROUP: &[&str] = &["HGMMA", "UTMALDG.MULTICAST", "UTMASTG", "STSM"];
/// The same with a small GEMM of fragments in the epilogue.
const RANK: &[&str] = &["HGMMA", "UTMALDG.MULTICAST", "UTMASTG", "STSM", "HMMA", "LDSM"];
/// The same with a left operand that is made in registers.
const FOLDED: &[&str] = &["HGMMA", "UTMALDG.MULTICAST", "UTMASTG", "STSM", "LDSM"];

/// File, how a kernel's name begins, and the instructions that its machine code must have on every architecture: an opcode
/// and some of its modifiers, `|` between alternatives. A kernel takes the first line that fits it.
const INSTRUCTIONS: &[(&str, &str, &[&str])] = &[
    ("drop_path", "drop_path_", VECTORS),
    ("layer_epilogue", "layer_epilogue_", VECTORS),
    ("lm_head", "lm_head_bias_", LOADS),
    // Reads labels only.
    ("lm_head", "lm_head_weight", &[]),
    ("lm_head", "lm_head_", VECTORS),
    ("loss", "loss_scan_", LOADS),
    ("loss", "loss_", VECTORS),
    ("loss_general", "loss_general_scan_", LOADS),
    ("loss_general", "loss_general_sums_", LOADS),
    // Read what others have found of slices.
    ("loss_general", "loss_general_rows", &[]),
    ("loss_general", "loss_general_divergence", &[]),
    ("loss_general", "loss_general_", VECTORS),
    ("sm80/low_rank_linear", "low_rank_factors_", FACTORS),
    ("sm80/low_rank_linear", "low_rank_linear_", PRODUCT),
    ("noise_fill", "noise_fill", &["STG.128"]),
    ("noisy_epilogue", "noisy_epilogue_", VECTORS),
    ("sm80/noisy_linear", "noisy_linear_weight_f32", TRANSPOSED),
    ("sm80/noisy_linear", "noisy_linear_weight_tf32", TRANSPOSED),
    ("sm80/noisy_linear", "noisy_linear_", PRODUCT),
    ("sm90/folded_linear", "sm90_folded_", FOLDED),
    ("sm90/low_rank_gradients", "sm90_low_rank_", &["HGMMA", "UTMALDG"]),
    ("sm90/low_rank_linear", "sm90_low_rank_", RANK),
    ("sm90/noisy_linear", "sm90_noisy_linear_", WARPGROUP),
    ("sm90/weight_gradient", "sm90_weight_gradient_", &["HGMMA", "UTMALDG", "LDSM"]),
    ("sm90/weight_gradient", "sm90_weight_sums_", LOADS),
    ("norms", "grad_norm_", LOADS),
    ("norms", "fp_distance_", LOADS),
    // Reads partial sums only.
    ("norms", "norm_total", &[]),
    ("partial_sums", "partial_sums_", LOADS),
    ("weights", "adapter_weights_", &["HMMA", "LDG.128", "STG.128"]),
    ("weights", "merge_", VECTORS),
    ("weight_gradients", "weight_gradients_", &["HMMA", "LDG.128", "STG.128"]),
    ("weight_gradients", "weight_gradient_sums_", LOADS),
];

const DOCS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/kernels.md");

type Test = fn(&Compiled) -> Result<Completion, Failed>;

fn main() {
    let tests: [(&str, Test); 7] = [
        ("every_kernel_is_there", every_kernel_is_there),
        ("nothing_is_spilled", nothing_is_spilled),
        ("instructions", instructions),
        ("wgmmas", wgmmas),
        ("vectors_stay_whole", vectors_stay_whole),
        ("planted_faults", |compiled| planted::compiled(&compiled.tools)),
        ("docs_are_up_to_date", docs_are_up_to_date),
    ];
    static COMPILED: OnceLock<Result<Compiled, String>> = OnceLock::new();
    let trial = |(name, test): (&str, Test)| {
        Trial::ignorable_test(name, move || match COMPILED.get_or_init(Compiled::open) {
            Ok(compiled) => test(compiled),
            Err(why) if std::env::var_os("PACE_REQUIRE_NVCC").is_some_and(|value| value == "1") => {
                Err(why.into())
            }
            Err(why) => Ok(Completion::ignored_with(why.as_str())),
        })
    };
    let trials = tests.into_iter().map(trial).chain(planted::trials()).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// One kernel for one architecture.
#[derive(Default, Debug)]
struct Code {
    registers: u32,
    /// Bytes of a thread in local memory, where spilled registers and arrays with a variable index go.
    stack: u32,
    /// Static shared memory in bytes.
    shared: u32,
    /// The largest block.
    threads: u32,
    opcodes: BTreeSet<String>,
    instructions: Vec<Instruction>,
}

impl Code {
    /// Whether it has an instruction: `LDG.128` asks for an opcode `LDG` with `128` among its modifiers.
    fn has(&self, instruction: &str) -> bool {
        let fits = |opcode: &String, one: &str| {
            let (mut parts, mut wanted) = (opcode.split('.'), one.split('.'));
            parts.next() == wanted.next() && wanted.all(|modifier| parts.clone().any(|part| part == modifier))
        };
        instruction.split('|').any(|one| self.opcodes.iter().any(|opcode| fits(opcode, one)))
    }
}

/// A kernel by its file, name and architecture.
type Name = (String, String, String);

struct Compiled {
    tools: Tools,
    /// Those asked for, `90a`.
    archs: Vec<String>,
    kernels: BTreeMap<Name, Code>,
}

impl Compiled {
    fn open() -> Result<Self, String> {
        if built::FATBINS.is_empty() {
            return Err(format!("the kernels are not built: {}", built::WHY_NOT_BUILT));
        }
        let tools = Tools::find()?;
        let list = std::env::var_os("PACE_CUDA_ARCHS").unwrap_or(nvcc::DEFAULT_ARCHS.into());
        let archs = nvcc::archs(&list.to_string_lossy())?;
        let take_apart = |&(file, ..): &built::Fatbin| {
            let fatbin = Path::new(env!("OUT_DIR")).join(format!("{}.fatbin", file.replace('/', "_")));
            let kernels = tools.take_apart(&fatbin)?;
            Ok(kernels.into_iter().map(move |((arch, kernel), code)| ((file.to_owned(), kernel, arch), code)))
        };
        let files = built::FATBINS.par_iter().map(take_apart).collect::<Result<Vec<_>, String>>()?;
        let kernels = files.into_iter().flatten().collect();
        Ok(Self { tools, archs, kernels })
    }
}

/// Programs of a CUDA toolkit.
struct Tools {
    /// Release of nvcc, `13.0.88`.
    nvcc: String,
    /// Release of what assembles Hopper's kernels.
    ptxas: String,
    cuobjdump: PathBuf,
    /// A `PATH` in which cuobjdump finds nvdisasm.
    path: OsString,
}

impl Tools {
    fn find() -> Result<Self, String> {
        let variable = |name: &str| std::env::var_os(name);
        let nvcc = nvcc::find(&variable)?.ok_or("nvcc is gone since the kernels were built")?;
        let release = |program: &Path| {
            let version = run(Command::new(program).arg("--version"))?;
            let release = version.split_once(", V").and_then(|(_, rest)| rest.split_whitespace().next());
            release.map(str::to_owned).ok_or(version.clone())
        };
        let ptxas = nvcc::Ptxas::from_environment(&variable)?;
        // nvcc's own is of the same release.
        let ptxas = release(ptxas.as_ref().map_or(&nvcc, |ptxas| ptxas.path()))?;

        let path = variable("PATH").unwrap_or_default();
        let mut folders: Vec<PathBuf> = nvcc.parent().map(Path::to_owned).into_iter().collect();
        folders.extend(std::env::split_paths(&path));
        let tool = |name: &str| {
            let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
            let mut places = folders.iter().map(|folder| folder.join(&file));
            places.find(|place| place.is_file()).ok_or(format!("{name} is neither beside nvcc nor in PATH"))
        };
        let cuobjdump = tool("cuobjdump")?;
        tool("nvdisasm")?;
        let path = std::env::join_paths(&folders).map_err(|error| error.to_string())?;
        Ok(Self { nvcc: release(&nvcc)?, ptxas, cuobjdump, path })
    }

    /// The kernels in a file by architecture and name.
    fn take_apart(&self, file: &Path) -> Result<BTreeMap<(String, String), Code>, String> {
        let mut command = Command::new(&self.cuobjdump);
        read(&run(command.args(["-elf", "-res-usage", "-sass"]).arg(file).env("PATH", &self.path))?)
    }
}

/// The architectures that a file has an image for, `sm_90a`.
fn images(file: &str, archs: &[String]) -> Result<Vec<String>, String> {
    let family = file.split_once('/').map_or("", |(family, _)| family);
    let images = nvcc::targets(family, archs)?.images;
    Ok(images.iter().map(|arch| format!("sm_{arch}")).collect())
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("cannot run {command:?}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// Kernels by architecture and name in what cuobjdump prints: for each architecture the sections of the file, then what
/// each kernel uses, then its instructions.
fn read(dump: &str) -> Result<BTreeMap<(String, String), Code>, String> {
    let mut kernels: BTreeMap<(String, String), Code> = BTreeMap::new();
    // A file with one image only may be that image, for which there is no line `arch = `.
    let mut arch = dump.lines().find_map(|line| line.trim().strip_prefix("code for ")).unwrap_or_default();
    let (mut kernel, mut attribute) = ("", "");
    for line in dump.lines() {
        let text = line.trim();
        let number = |text: &str| {
            let (digits, radix) = text.strip_prefix("0x").map_or((text, 10), |digits| (digits, 16));
            u32::from_str_radix(digits, radix).map_err(|_| format!("cuobjdump printed `{line}`"))
        };
        let key = || (arch.to_owned(), kernel.to_owned());
        if let Some(name) = text.strip_prefix("arch = ") {
            arch = name;
        } else if let Some(name) = line.strip_prefix(".nv.info.") {
            kernel = name;
        } else if let Some(name) = text.strip_prefix("Function : ") {
            kernel = name;
        } else if let Some(name) = text.strip_prefix("Function ").and_then(|rest| rest.strip_suffix(':')) {
            kernel = name;
        } else if let Some(name) = text.strip_prefix("Attribute:") {
            attribute = name.trim();
        } else if let Some(value) = text.strip_prefix("Value:")
            && attribute == "EIATTR_MAX_THREADS"
        {
            kernels.entry(key()).or_default().threads =
                value.split_whitespace().map(number).product::<Result<u32, String>>()?;
        } else if text.starts_with("REG:") {
            let code = kernels.entry(key()).or_default();
            for (name, value) in text.split_whitespace().filter_map(|field| field.split_once(':')) {
                match name {
                    "REG" => code.registers = number(value)?,
                    "STACK" | "LOCAL" => code.stack += number(value)?,
                    "SHARED" => code.shared = number(value)?,
                    _ => {}
                }
            }
        } else if let Some(instruction) = Instruction::read(text) {
            let code = kernels.entry(key()).or_default();
            code.opcodes.insert(instruction.opcode.clone());
            code.instructions.push(instruction);
        }
    }
    Ok(kernels)
}

/// All problems at once.
fn verdict(problems: &[String]) -> Result<Completion, Failed> {
    if problems.is_empty() { Ok(Completion::Completed) } else { Err(problems.join("\n").into()) }
}

/// The crate's list of kernels and the machine code agree, for every architecture.
fn every_kernel_is_there(compiled: &Compiled) -> Result<Completion, Failed> {
    let mut listed: BTreeSet<Name> = BTreeSet::new();
    for &Kernel { file, name } in KERNELS {
        let images = images(file, &compiled.archs)?;
        listed.extend(images.into_iter().map(|arch| (file.to_owned(), name.to_owned(), arch)));
    }
    let compiled: BTreeSet<Name> = compiled.kernels.keys().cloned().collect();
    let missing = listed.difference(&compiled).map(|name| format!("{name:?} is not in the machine code"));
    let unknown = compiled.difference(&listed).map(|name| format!("{name:?} is not in KERNELS"));
    verdict(&missing.chain(unknown).collect::<Vec<_>>())
}

/// All that a thread holds is in registers.
fn nothing_is_spilled(compiled: &Compiled) -> Result<Completion, Failed> {
    let mut problems = Vec::new();
    for (name, code) in &compiled.kernels {
        let Code { registers, threads, .. } = *code;
        if registers == 0 || threads == 0 || code.instructions.is_empty() {
            problems.push(format!("{name:?} is not read right: {registers} registers, {threads} threads"));
        }
        if code.stack > 0 || code.has("LDL|STL") {
            problems.push(format!("{name:?} has a stack of {} bytes, or spills", code.stack));
        }
    }
    verdict(&problems)
}

/// The machine code has what `INSTRUCTIONS` asks for.
fn instructions(compiled: &Compiled) -> Result<Completion, Failed> {
    let mut problems = Vec::new();
    let mut used = BTreeSet::new();
    for (name, code) in &compiled.kernels {
        let (file, kernel, _) = name;
        let fits = |&(of, prefix, _): &(&str, &str, _)| of == file && kernel.starts_with(prefix);
        let Some(line) = INSTRUCTIONS.iter().position(fits) else {
            problems.push(format!("{name:?} has no line in INSTRUCTIONS"));
            continue;
        };
        used.insert(line);
        let must = INSTRUCTIONS[line].2.iter();
        for &instruction in must.filter(|instruction| !code.has(instruction)) {
            let opcode = instruction.split(['.', '|']).next().unwrap_or_default();
            let alike: Vec<&String> = code.opcodes.iter().filter(|other| other.starts_with(opcode)).collect();
            problems.push(format!("{name:?} has no {instruction}, only {alike:?}"));
        }
    }
    let unused = (0..INSTRUCTIONS.len()).filter(|line| !used.contains(line));
    problems.extend(unused.map(|line| format!("no kernel takes {:?}", INSTRUCTIONS[line])));
    verdict(&problems)
}

/// No vector of 16-bit elements is taken apart as soon as it is loaded: that waits for it before the next load is issued, and needs
/// a register per element.
fn vectors_stay_whole(compiled: &Compiled) -> Result<Completion, Failed> {
    let leaves = |instruction: &Instruction| matches!(instruction.base(), "BRA" | "BSYNC" | "EXIT" | "RET");
    let mut problems = Vec::new();
    for (name, code) in &compiled.kernels {
        for (index, load) in code.instructions.iter().enumerate() {
            if load.base() != "LDG" || !load.has("128") {
                continue;
            }
            let (vector, _) = load.registers();
            for next in code.instructions[index + 1..].iter().take_while(|next| !leaves(next)) {
                let (written, touched) = next.registers();
                if next.base() == "PRMT" && touched.meets(&vector) {
                    problems.push(format!(
                        "{name:?}: {} takes apart what {} loads",
                        next.text(),
                        load.text()
                    ));
                }
                if written.meets(&vector) {
                    break;
                }
            }
        }
    }
    verdict(&problems)
}

/// No register is touched while a wgmma in flight uses it, wgmmas overlap, and no barrier of the whole device's memory is between them:
/// the first barrier of a cluster is one, and an arrival in another block that releases to the cluster would be.
fn wgmmas(compiled: &Compiled) -> Result<Completion, Failed> {
    let mut problems = Vec::new();
    for (name, code) in &compiled.kernels {
        let found = hazards::check(&code.instructions).map_err(|why| format!("{name:?}: {why}"))?;
        problems.extend(found.hazards.iter().map(|hazard| format!("{name:?}: {hazard}")));
        if found.is_serialised() {
            problems.push(format!("{name:?}: each of {} wgmmas waits for the one before", found.wgmmas));
        }
        let device_wide = |instruction: &&Instruction| instruction.opcode == "MEMBAR.ALL.GPU";
        let barriers = code.instructions.iter().filter(device_wide).count();
        if found.wgmmas > 0 && barriers > 1 {
            problems.push(format!("{name:?}: {barriers} memory barriers of the whole device"));
        }
    }
    verdict(&problems)
}

fn docs_are_up_to_date(compiled: &Compiled) -> Result<Completion, Failed> {
    if compiled.archs != nvcc::archs(nvcc::DEFAULT_ARCHS)? {
        return Ok(Completion::ignored_with("PACE_CUDA_ARCHS asks for other architectures"));
    }
    let now = docs(compiled)?;
    if std::env::var_os("PACE_UPDATE_DOCS").is_some_and(|value| value == "1") {
        std::fs::write(DOCS, now)?;
        return Ok(Completion::Completed);
    }
    let committed = std::fs::read_to_string(DOCS).unwrap_or_default().replace("\r\n", "\n");
    let Tools { nvcc, ptxas, .. } = &compiled.tools;
    // A document without Hopper's kernels names no ptxas.
    for (tool, here) in [("nvcc", nvcc), ("ptxas", ptxas)] {
        let named =
            committed.split_once(&format!("{tool} ")).and_then(|(_, rest)| rest.split_whitespace().next());
        if let Some(named) = named.filter(|named| named != here) {
            return Ok(Completion::ignored_with(format!("{DOCS} is by {tool} {named}, this is {here}")));
        }
    }
    if committed == now {
        return Ok(Completion::Completed);
    }
    let (committed, now) = (committed.lines().collect::<BTreeSet<_>>(), now.lines().collect::<BTreeSet<_>>());
    let lines = |a: &BTreeSet<&str>, b, sign| {
        a.difference(b).map(|line| format!("{sign} {line}\n")).collect::<String>()
    };
    let [old, new] = [lines(&committed, &now, '-'), lines(&now, &committed, '+')];
    Err(format!("{DOCS} is out of date:\n{old}{new}PACE_UPDATE_DOCS=1 cargo test --test compiled writes it")
        .into())
}

/// What `docs/kernels.md` has to be.
fn docs(compiled: &Compiled) -> Result<String, Failed> {
    let Tools { nvcc, ptxas, .. } = &compiled.tools;
    let is_bound =
        |file: &str| file.split_once('/').is_some_and(|(family, _)| nvcc::only_capability(family).is_some());
    let assembled = match built::FATBINS.iter().any(|&(file, ..)| is_bound(file)) {
        true => format!("ptxas {ptxas} assembles the files for one architecture alone.\n"),
        false => String::new(),
    };
    let mut text = format!(
        "# Kernels\n\n\
         As nvcc {nvcc} compiles them: the largest block that a kernel can be launched with, registers per thread, and bytes of\n\
         static shared memory, of which 1024 are the system's on architectures from 9.0 on where a kernel uses any. What a\n\
         launch asks for beyond it is the plan's choice. No kernel has a stack or spills.\n{assembled}\n\
         This file is written by `PACE_UPDATE_DOCS=1 cargo test --test compiled` and checked by `tests/compiled`.\n"
    );
    for (file, ..) in built::FATBINS {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels");
        let source = std::fs::read_to_string(Path::new(source).join(format!("{file}.cu")))?;
        // The first paragraph of the comment at its head.
        let head = source.lines().map_while(|line| line.strip_prefix("// ")).collect::<Vec<_>>().join(" ");
        let _ = write!(text, "\n## {file}\n\n{head}\n\n| kernel | threads |");
        let archs = images(file, &compiled.archs)?;
        archs.iter().for_each(|arch| text += &format!(" registers, {arch} | shared, {arch} |"));
        let _ = writeln!(text, "\n|---|---|{}", "---|---|".repeat(archs.len()));
        for kernel in KERNELS.iter().filter(|kernel| kernel.file == *file) {
            let codes = archs.iter().map(|arch| {
                let name = (kernel.file.to_owned(), kernel.name.to_owned(), arch.clone());
                compiled.kernels.get(&name).ok_or(format!("{name:?} is not in the machine code"))
            });
            let codes = codes.collect::<Result<Vec<&Code>, String>>()?;
            let _ = write!(text, "| `{}` | {} |", kernel.name, codes[0].threads);
            codes.iter().for_each(|code| text += &format!(" {} | {} |", code.registers, code.shared));
            text.push('\n');
        }
    }
    Ok(text)
}
