//! `include/pace_kernels.h` is what the source says. `PACE_UPDATE_DOCS=1 cargo test --test capi` writes it.

use std::fs;
use std::path::Path;

const ABOUT: &str = "/* pace-kernels: fused operators for PACE, parameter-efficient fine-tuning with multiplicative noise and two-branch
 * consistency (Ni, Zhang, Koniusz, NeurIPS 2024), on the CPU and on CUDA. MIT or Apache-2.0.
 *
 * An operator takes a device (NULL for the CPU), a stream (a CUstream as a void pointer; NULL for the default one, and on the
 * CPU) and a struct of arguments. Zero the struct, set `size` to its sizeof, fill in what you need: what stays zero is absent
 * or off. Every function gives a status, PACE_OK or a PACE_ERROR; pace_last_error() tells the last one of this thread in words.
 * On CUDA nothing waits and nothing is allocated; the device's primary context is used, and the current one is left alone.
 * A lack of host memory ends the process. A process that is forked after a CPU operator has run cannot use them.
 *
 * Generated from src/capi by `PACE_UPDATE_DOCS=1 cargo test --test capi`. */";

fn generate() -> String {
    // It follows the modules.
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/capi/mod.rs");
    let config = cbindgen::Config {
        language: cbindgen::Language::C,
        cpp_compat: true,
        header: Some(ABOUT.into()),
        include_guard: Some("PACE_KERNELS_H".into()),
        no_includes: true,
        sys_includes: vec!["stdint.h".into()],
        line_length: 120,
        usize_is_size_t: true,
        documentation_style: cbindgen::DocumentationStyle::C99,
        ..Default::default()
    };
    let builder = cbindgen::Builder::new().with_src(source);
    let mut header = Vec::new();
    builder.with_config(config).generate().expect("the source is understood").write(&mut header);
    String::from_utf8(header).unwrap()
}

#[test]
fn the_committed_header_is_that_of_the_source() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/pace_kernels.h");
    let header = generate();
    if std::env::var_os("PACE_UPDATE_DOCS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &header).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == header,
        "{} is out of date: PACE_UPDATE_DOCS=1 cargo test --test capi",
        path.display()
    );
}
