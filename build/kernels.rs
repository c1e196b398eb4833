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
