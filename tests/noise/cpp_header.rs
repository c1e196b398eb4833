//! The C++ and CUDA header `kernels/noise.cuh` computes what the Rust code computes.

use crate::support::*;
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::noise::{drop_path_mask, normals};
use std::path::Path;
use std::process::Command;

/// The C++ compiler: `$CXX`, or the first of the usual names that runs.
fn cxx() -> Option<String> {
    if let Some(cxx) = std::env::var("CXX").ok().filter(|cxx| !cxx.is_empty()) {
        return Some(cxx);
    }
    let runs = |name: &str| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
    ["c++", "g++", "clang++"].into_iter().find(|name| runs(name)).map(String::from)
}

/// Runs a command to its end; panics with what it printed if it fails.
fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{stderr}", output.status);
}

/// `kernels/noise.cuh` computes the same bits: 2²⁰ calls and 2²⁰ addresses, by several compilations of it.
#[test]
fn the_cpp_header_computes_the_same_bits() {
    if std::env::var("PACE_NO_CXX").is_ok_and(|v| v == "1") {
        println!("skipped, because PACE_NO_CXX=1: kernels/noise.cuh was not compared with the Rust code");
        return;
    }
    let cxx = cxx().expect(
        "this test compiles kernels/noise.cuh and found no C++ compiler: install c++, g++ or clang++, name one in \
         CXX, or set PACE_NO_CXX=1 to skip the comparison",
    );

    let (mut records, mut expected) = (Vec::new(), Vec::new());
    let mut random = Words(4);
    let calls = calls();
    for &words in &calls {
        records.extend(words);
        expected.extend(bits(normals(words)));
    }
    let addresses = 1usize << 20;
    for i in 0..addresses {
        let wide = |random: &mut Words| u64::from(random.next()) << 32 | u64::from(random.next());
        let small = i % 2 == 0;
        let address = Address {
            seed: if small { i as u64 % 5 } else { wide(&mut random) },
            step: if small { i as u64 } else { wide(&mut random) },
            layer: if small { i as u32 % 24 } else { random.next() },
            shape: [PerSample, PerToken][i / 2 % 2],
            branch: if small { i as u8 / 4 % 2 } else { random.next() as u8 },
            sample: if small { i as u64 % 1024 } else { wide(&mut random) >> 8 },
            token: if small { i as u32 % 197 } else { random.next() },
        };
        let sigma = [1.0, 0.1, 0.0, 1e-40, f32::from_bits(random.next() >> 2)][i % 5];
        let group = if small { i as u32 % 1024 } else { random.next() >> 2 };
        let probability = [0.0, 0.1, 0.5, 0.9][i / 4 % 4];
        let threshold = ((1.0 - probability) * 4294967296.0f64).round() as u64;

        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        records.extend(halves(address.seed));
        records.extend(halves(address.step));
        records.extend([address.layer, sigma.to_bits(), u32::from(address.shape == PerToken)]);
        records.push(address.branch.into());
        records.extend(halves(address.sample));
        records.extend([address.token, group]);
        records.extend(halves(threshold));

        let key = address.key();
        expected.extend(key.0);
        expected.extend(address.z(sigma, 4 * group, 4).into_iter().map(f32::to_bits));
        let mut keep = [0f32];
        drop_path_mask(key, probability, address.sample, &mut keep).unwrap();
        expected.push(keep[0] as u32);
    }

    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/noise/noise_twin.cpp");
    let input = directory.join("noise_twin.in");
    let mut bytes = Vec::with_capacity(4 * records.len() + 8);
    bytes.extend((calls.len() as u32).to_ne_bytes());
    bytes.extend((addresses as u32).to_ne_bytes());
    bytes.extend(records.iter().flat_map(|word| word.to_ne_bytes()));
    std::fs::write(&input, bytes).unwrap();

    let mut variants = vec![
        ("plain", vec!["-O2"]),
        ("unoptimised", vec!["-O0"]),
        // The device branches, on the intrinsics in plain C++.
        ("device", vec!["-O2", "-DEMULATE_DEVICE"]),
    ];
    // A target with fused multiply-adds, where the compiler may contract whatever it can.
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("fma") {
        variants.push(("contracting", vec!["-O3", "-mfma", "-ffp-contract=fast"]));
    }
    #[cfg(target_arch = "aarch64")]
    variants.push(("contracting", vec!["-O3", "-ffp-contract=fast"]));

    for (name, flags) in &variants {
        let program = directory.join(format!("noise_twin_{name}{}", std::env::consts::EXE_SUFFIX));
        let output = directory.join(format!("noise_twin_{name}.out"));
        run(Command::new(&cxx).arg("-std=c++17").args(flags).arg("-o").arg(&program).arg(&source));
        run(Command::new(&program).arg(&input).arg(&output));
        let got = std::fs::read(&output).unwrap();
        assert_eq!(got.len(), 4 * expected.len(), "{name}: length of the output");
        let got = got.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap()));
        for (i, (got, &expected)) in got.zip(&expected).enumerate() {
            let at = || match i.checked_sub(4 * calls.len()) {
                None => format!("words {:x?}, normal {}", calls[i / 4], i % 4),
                Some(i) => format!("address {}, word {} of its answer", i / 7, i % 7),
            };
            assert!(got == expected, "{name}: {}: {got:#x}, in Rust {expected:#x}", at());
        }
    }
    println!(
        "{} words compared by {cxx}: {:?}",
        expected.len(),
        variants.iter().map(|v| v.0).collect::<Vec<_>>()
    );
}
