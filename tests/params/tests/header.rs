//! `kernels/params.h` is what `src/cuda` says: the kernels' parameter structs and the constants that both sides use.
//! `PACE_UPDATE_DOCS=1 cargo test -p pace-params` writes it.

use std::fs;
use std::path::{Path, PathBuf};

const ABOUT: &str = "// Parameter structs of the kernels, and constants that kernels and plans share.
//
// Generated from src/cuda by `PACE_UPDATE_DOCS=1 cargo test -p pace-params`: change it there.";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The types of the kernels, which `cbindgen` calls otherwise.
const TYPES: [(&str, &str); 7] = [
    ("constexpr static const uint32_t ", "constexpr u32 "),
    ("constexpr static const uintptr_t ", "constexpr u32 "),
    ("uint32_t", "u32"),
    ("uint64_t", "u64"),
    ("int64_t", "i64"),
    ("<Void>", "<void>"),
    ("TensorMapSlot", "TensorMap"),
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut sources = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources.extend(self::sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push(path);
        }
    }
    sources.sort();
    sources
}

/// The names of the parameter structs, and of those inside them.
fn structs(source: &str) -> impl Iterator<Item = String> + '_ {
    source.split("#[repr(C").skip(1).filter_map(|rest| {
        let (_, name) = rest.split_once("struct ")?;
        Some(name.split([' ', '<', '{']).next()?.to_owned())
    })
}

fn generate() -> String {
    let sources = sources(&root().join("src/cuda"));
    let texts: Vec<String> = sources.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    let include: Vec<String> = texts.iter().flat_map(|text| structs(text).collect::<Vec<_>>()).collect();
    let config = cbindgen::Config {
        language: cbindgen::Language::Cxx,
        header: Some(ABOUT.into()),
        include_guard: Some("PACE_PARAMS_H".into()),
        no_includes: true,
        includes: vec!["storage.cuh".into()],
        namespace: Some("pace".into()),
        line_length: 120,
        documentation_style: cbindgen::DocumentationStyle::Cxx,
        export: cbindgen::ExportConfig {
            include,
            // kernels/storage.cuh has them as pointers.
            exclude: ["Input", "Output", "TensorMapSlot", "Void"].map(Into::into).to_vec(),
            item_types: vec![cbindgen::ItemType::Constants, cbindgen::ItemType::Structs],
            ..Default::default()
        },
        constant: cbindgen::ConstantConfig {
            allow_static_const: true,
            allow_constexpr: true,
            ..Default::default()
        },
        ..Default::default()
    };
    let builder = sources.iter().fold(cbindgen::Builder::new(), cbindgen::Builder::with_src);
    let mut header = Vec::new();
    builder.with_config(config).generate().expect("the source is understood").write(&mut header);
    let header = String::from_utf8(header).unwrap();
    TYPES.iter().fold(header, |header, (from, to)| header.replace(from, to))
}

#[test]
fn the_committed_header_is_that_of_the_source() {
    let path = root().join("kernels/params.h");
    let header = generate();
    if std::env::var_os("PACE_UPDATE_DOCS").is_some() {
        fs::write(&path, &header).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == header,
        "{} is out of date: PACE_UPDATE_DOCS=1 cargo test -p pace-params",
        path.display()
    );
}
