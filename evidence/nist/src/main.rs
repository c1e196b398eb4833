//! The NIST statistical test suite (SP 800-22 rev. 1a, by the crate `nistrs`) on the bytes of its input.
//!
//!     cargo run --release -p pace-noise-evidence words Channel | cargo run --release --manifest-path evidence/nist/Cargo.toml
//!
//! 100 sequences of 10⁶ bits. As in §4.2 of the standard, a test fails if too few sequences pass it, or if its p-values are not
//! uniform (χ² of ten bins): both at 0.0001, the first by the binomial law, since three standard deviations are one test in 60 with so
//! few sequences.

use nistrs::prelude::*;
use statrs::distribution::{Binomial, ChiSquared, ContinuousCDF, DiscreteCDF};
use std::collections::BTreeMap;
use std::io::Read;
use std::process::ExitCode;

const SEQUENCES: usize = 100;
const BYTES: usize = 1_000_000 / 8;

/// The p-values of a sequence, by test. Some tests do not take every sequence.
fn run(data: &BitsData) -> Vec<(String, f64)> {
    let mut found = Vec::new();
    let mut add = |test: &str, results: &[(bool, f64)]| {
        let name = |i: usize| if results.len() == 1 { test.to_owned() } else { format!("{test} {}", i + 1) };
        found.extend(results.iter().enumerate().map(|(i, result)| (name(i), result.1)));
    };
    add("frequency", &[frequency_test(data)]);
    add("block frequency", &[block_frequency_test(data, 128).unwrap()]);
    add("cumulative sums", &cumulative_sums_test(data));
    add("runs", &[runs_test(data)]);
    add("longest run", &[longest_run_of_ones_test(data).unwrap()]);
    add("rank", &[rank_test(data).unwrap()]);
    add("spectrum", &[fft_test(data)]);
    add("template without overlaps", &non_overlapping_template_test(data, 9).unwrap());
    add("template with overlaps", &[overlapping_template_test(data, 9)]);
    add("universal", &[universal_test(data)]);
    add("approximate entropy", &[approximate_entropy_test(data, 10)]);
    add("serial", &serial_test(data, 16));
    add("linear complexity", &[linear_complexity_test(data, 500)]);
    if let Ok(results) = random_excursions_test(data) {
        add("random excursions", &results);
    }
    if let Ok(results) = random_excursions_variant_test(data) {
        add("random excursions, variant", &results);
    }
    found
}

/// How probable it is that uniform values fill ten bins as unevenly.
fn uniformity(p: &[f64]) -> f64 {
    let mut bins = [0f64; 10];
    p.iter().for_each(|p| bins[((p * 10.0) as usize).min(9)] += 1.0);
    let expected = p.len() as f64 / 10.0;
    ChiSquared::new(9.0)
        .expect("a distribution")
        .sf(bins.iter().map(|n| (n - expected).powi(2) / expected).sum())
}

fn main() -> ExitCode {
    let mut all = BTreeMap::<String, Vec<f64>>::new();
    for _ in 0..SEQUENCES {
        let mut bytes = vec![0; BYTES];
        std::io::stdin().read_exact(&mut bytes).expect("enough input");
        for (test, p) in run(&BitsData::from_binary(bytes)) {
            all.entry(test).or_default().push(p);
        }
    }
    let (mut failed, mut least) = (0, 1f64);
    for (test, p) in &all {
        let count = p.len() as u64;
        let passed = p.iter().filter(|&&p| p >= TEST_THRESHOLD).count() as u64;
        // That no more of them pass.
        let few = Binomial::new(1.0 - TEST_THRESHOLD, count).expect("a distribution").cdf(passed);
        let uniform = uniformity(p);
        least = least.min(few).min(uniform);
        let fails = few.min(uniform) < 1e-4;
        failed += u32::from(fails);
        if fails || !test.starts_with("template without") {
            println!("{test:<32} {passed:>3} of {count:>3}: {few:.4}  uniform: {uniform:.4}");
        }
        if fails {
            println!("    FAILS");
        }
    }
    println!(
        "{} tests, {failed} fail; the least of {} probabilities is {least:.1e}",
        all.len(),
        2 * all.len()
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
