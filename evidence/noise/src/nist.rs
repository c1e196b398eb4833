//! The tests of NIST SP 800-22, by the crate `nistrs`.

use crate::finding::Finding;
use crate::generator::Generator;
use crate::stream::{Axis, Stream};
use nistrs::prelude::*;

/// Bits of a sequence; the block lengths below are the ones recommended for it.
const BITS: usize = 1_000_000;

/// Every p-value of one sequence, with the name of its test.
fn sequence(data: &BitsData) -> Vec<(&'static str, f64)> {
    let mut p = vec![
        ("frequency", frequency_test(data).1),
        ("runs", runs_test(data).1),
        ("spectral", fft_test(data).1),
        ("universal", universal_test(data).1),
        ("linear complexity", linear_complexity_test(data, 500).1),
        ("overlapping template", overlapping_template_test(data, 9).1),
        ("approximate entropy", approximate_entropy_test(data, 10).1),
    ];
    let checked = [
        ("block frequency", block_frequency_test(data, 128)),
        ("longest run", longest_run_of_ones_test(data)),
        ("rank", rank_test(data)),
    ];
    p.extend(checked.into_iter().map(|(name, result)| (name, result.expect("a million bits are enough").1)));
    p.extend(cumulative_sums_test(data).map(|result| ("cumulative sums", result.1)));
    p.extend(serial_test(data, 16).map(|result| ("serial", result.1)));
    let templates = non_overlapping_template_test(data, 9).expect("templates of nine bits");
    p.extend(templates.iter().map(|result| ("template", result.1)));
    // These two apply only to sequences whose walk returns to zero often enough.
    if let Ok(results) = random_excursions_test(data) {
        p.extend(results.map(|result| ("excursions", result.1)));
    }
    if let Ok(results) = random_excursions_variant_test(data) {
        p.extend(results.map(|result| ("excursions variant", result.1)));
    }
    p
}

/// The suite on so many sequences of a walk, one after another.
///
/// A test counts once per sequence: its least p-value times their number (Bonferroni), which falls below 0.01 in at most
/// one sequence of 100. How many do is the finding.
pub fn run<G: Generator>(axis: Axis, sequences: u64) -> Vec<Finding> {
    let mut stream = Stream::<G>::new(axis);
    let mut below: Vec<(&'static str, u64)> = Vec::new();
    for _ in 0..sequences {
        let mut words = vec![0; BITS.div_ceil(32)];
        stream.read(&mut words);
        let p = sequence(&BitsData::from_binary(words.iter().flat_map(|word| word.to_le_bytes()).collect()));
        for tests in p.chunk_by(|a, b| a.0 == b.0) {
            let least = tests.iter().map(|test| test.1).fold(1.0, f64::min) * tests.len() as f64;
            let at = below.iter().position(|test| test.0 == tests[0].0).unwrap_or_else(|| {
                below.push((tests[0].0, 0));
                below.len() - 1
            });
            below[at].1 += u64::from(least < 0.01);
        }
    }
    below.iter().map(|&(name, count)| Finding::poisson(name, count, 0.01 * sequences as f64)).collect()
}
