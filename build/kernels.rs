//! The kernels' source files and the kernels that they define; used by `build.rs`, by the simulator's build script and by
//! tests.

use std::path::{Path, PathBuf};

/// A file `kernels/NAME.cu` or `kernels/FAMILY/NAME.cu`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    /// `NAME` or `FAMILY/NAME`.
    pub file: String,
    /// Where it is.
    pub path: PathBuf,
}

impl Source {
    /// The folder that it is in, empty for files of no family.
    pub fn family(&self) -> &str {
        self.file.split_once('/').map_or("", |(family, _)| family)
    }

    /// A name for products of it, all of which lie in one folder: `FAMILY_NAME`.
    pub fn flat_name(&self) -> String {
        self.file.replace('/', "_")
    }
}

/// The `.cu` files of a folder and of the folders in it, in the order of their names.
pub fn sources(folder: &Path) -> Result<Vec<Source>, String> {
    let mut sources = Vec::new();
    list(folder, "", &mut sources)?;
    sources.sort();
    Ok(sources)
}

fn list(folder: &Path, prefix: &str, sources: &mut Vec<Source>) -> Result<(), String> {
    let error = |error: std::io::Error| format!("{}: {error}", folder.display());
    for entry in std::fs::read_dir(folder).map_err(error)? {
        let path = entry.map_err(error)?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            list(&path, &format!("{prefix}{name}/"), sources)?;
        } else if path.extension().is_some_and(|extension| extension == "cu") {
            sources.push(Source { file: format!("{prefix}{name}"), path });
        }
    }
    Ok(())
}

/// Macros that define kernels, and the ends of the kernels' names: one per type.
const MACROS: [(&str, &[&str]); 7] = [
    ("PACE_KERNEL", &[""]),
    ("PACE_CLUSTER_KERNEL", &[""]),
    ("PACE_CLUSTER_KERNELS_16", &["_f16", "_bf16"]),
    ("PACE_KERNELS", &["_f32", "_f16", "_bf16"]),
    ("PACE_KERNELS_F32", &["_f32"]),
    ("PACE_KERNELS_16", &["_f16", "_bf16"]),
    ("PACE_GEMM_KERNELS", &["_f32", "_tf32", "_f16", "_bf16"]),
];

/// Kernels with one body and name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// What their names begin with.
    pub name: String,
    /// And end with.
    pub suffixes: Vec<&'static str>,
}

impl Group {
    /// The kernels' names.
    pub fn kernels(&self) -> impl Iterator<Item = String> {
        self.suffixes.iter().map(|suffix| format!("{}{suffix}", self.name))
    }
}

/// The kernels that a source file defines: lines that begin with one of the macros, `PACE_KERNELS(name, …`.
pub fn groups(text: &str) -> Result<Vec<Group>, String> {
    let mut groups: Vec<Group> = Vec::new();
    for line in text.lines() {
        let Some((word, rest)) = line.split_once('(') else { continue };
        if !(word.starts_with("PACE_") && word.contains("KERNEL")) {
            continue;
        }
        let Some((_, suffixes)) = MACROS.into_iter().find(|&(name, _)| name == word) else {
            return Err(format!("{word} is not one of the macros in build/kernels.rs: `{line}`"));
        };
        let Some((name, _)) = rest.split_once(',') else {
            return Err(format!("a kernel's name and parameters have to stand on one line: `{line}`"));
        };
        match groups.iter_mut().find(|group| group.name == name) {
            Some(group) => group.suffixes.extend(suffixes),
            None => groups.push(Group { name: name.to_owned(), suffixes: suffixes.to_vec() }),
        }
    }
    Ok(groups)
}

/// The groups of each source file. Names are unique, as one program has all of the kernels.
pub fn all_groups(sources: &[Source]) -> Result<Vec<(&Source, Vec<Group>)>, String> {
    let mut known: Vec<String> = Vec::new();
    let mut all = Vec::new();
    for source in sources {
        let error = |error: String| format!("{}: {error}", source.path.display());
        let text = std::fs::read_to_string(&source.path).map_err(|why| error(why.to_string()))?;
        let groups = groups(&text).map_err(error)?;
        for kernel in groups.iter().flat_map(Group::kernels) {
            if known.contains(&kernel) {
                return Err(error(format!("there is another kernel {kernel}")));
            }
            known.push(kernel);
        }
        all.push((source, groups));
    }
    Ok(all)
}

/// The table of kernels as Rust: `KERNELS`, and for each group a constant by its name in capitals, for operators to choose
/// from by type. A group that no operator uses is dead code, a name that does not exist an error of the compiler.
pub fn table(sources: &[Source]) -> Result<String, String> {
    let (mut list, mut constants) = (String::new(), String::new());
    for (source, groups) in all_groups(sources)? {
        let literal = |kernel: &str| format!("Kernel {{ file: {:?}, name: {kernel:?} }}", source.file);
        for group in groups {
            for kernel in group.kernels() {
                list += &format!("    {},\n", literal(&kernel));
            }
            let kind = match group.suffixes[..] {
                [""] => "Kernel",
                ["_f16", "_bf16"] => "Kernels16",
                ["_f32", "_f16", "_bf16"] => "Kernels",
                ["_f32", "_tf32", "_f16", "_bf16"] => "GemmKernels",
                _ => {
                    let path = source.path.display();
                    return Err(format!(
                        "{path}: no struct in src/cuda/kernel.rs has the types of {group:?}; add it there and here"
                    ));
                }
            };
            let value = match group.suffixes[..] {
                [""] => literal(&group.name),
                _ => {
                    let field = |suffix: &&str| {
                        let kernel = format!("{}{suffix}", group.name);
                        format!("    {}: {},\n", suffix.trim_start_matches('_'), literal(&kernel))
                    };
                    format!("{kind} {{\n{}}}", group.suffixes.iter().map(field).collect::<String>())
                }
            };
            constants += &format!("pub(crate) const {}: {kind} = {value};\n", group.name.to_uppercase());
        }
    }
    Ok(format!("/// Every kernel.\npub const KERNELS: &[Kernel] = &[\n{list}];\n{constants}"))
}
