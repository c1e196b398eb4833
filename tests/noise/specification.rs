//! `specification.py`, which was written from the text of `docs/noise.md` alone and in exact arithmetic, gives the same bits.

#[path = "../common/python.rs"]
mod python;

use crate::support::*;
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::noise::{drop_path_mask, normals, philox4x32_10};
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

/// What the Python program is asked, and what it is to answer.
type Question = (String, String);

/// A field of an address from 0 to `largest`: each length of number as often as any other, and both ends of the range.
fn field(random: &mut Words, largest: u64) -> u64 {
    let number = u64::from(random.next()) << 32 | u64::from(random.next());
    match random.next() % 8 {
        0 => number % 3,
        1 => largest - number % 3,
        2 => largest & 1 << (number % 64),
        3 => largest & number >> (random.next() % 64),
        _ => largest & number,
    }
}

fn address(random: &mut Words) -> Address {
    let shape = [PerSample, PerToken][random.next() as usize % 2];
    Address {
        seed: field(random, u64::MAX),
        step: field(random, u64::MAX),
        layer: field(random, u32::MAX.into()) as u32,
        shape,
        branch: field(random, u8::MAX.into()) as u8,
        sample: field(random, (1 << 56) - 1),
        // The two largest are reserved; noise per sample does not look at the token.
        token: (field(random, u32::MAX.into()) as u32).min(if shape == PerToken {
            u32::MAX - 2
        } else {
            u32::MAX
        }),
    }
}

fn z(random: &mut Words) -> Question {
    let address = address(random);
    let Address { seed, step, layer, branch, sample, token, .. } = address;
    let kind = if address.shape == PerToken { "BTC" } else { "BC" };
    let channel = field(random, u32::MAX.into()) as u32;
    let sigma = f32::from_bits(match random.next() % 4 {
        // Any that is finite: subnormal, or so large that z overflows.
        0 => (field(random, i32::MAX as u64) as u32).min(f32::MAX.to_bits()),
        // 2⁶⁴, under which z has all bits of the normal.
        1 => 191 << 23,
        // 2⁻⁸ to 2⁸.
        _ => (119 << 23) + random.next() % (16 << 23),
    });
    let question = format!(
        "z {seed:x} {step:x} {layer:x} {kind} {branch:x} {sample:x} {token:x} {channel:x} {:x}",
        sigma.to_bits()
    );
    let mut z = address.z(sigma, channel, 1);
    (question, format!("{:08x}", z.remove(0).to_bits()))
}

fn mask(random: &mut Words) -> Question {
    let address = address(random);
    let Address { seed, step, layer, sample, .. } = address;
    let word = philox4x32_10([0, u32::MAX - 1, sample as u32, (sample >> 32) as u32], address.key().0)[0];
    let p = match random.next() % 4 {
        // Any, also so small that 1 − p is rounded.
        0 => f64::from_bits(field(random, 1f64.to_bits() - 1).min(1f64.to_bits() - 1)),
        // The threshold just above and just below this sample's word, and half-way to the next one.
        _ => 1.0 - (f64::from(word) + f64::from(random.next() % 9) / 4.0 - 1.0).max(1.0) / 2f64.powi(32),
    };
    let mut keep = [f32::NAN];
    drop_path_mask(address.key(), p, sample, &mut keep).unwrap();
    (format!("mask {seed:x} {step:x} {layer:x} {sample:x} {:x}", p.to_bits()), keep[0].to_string())
}

fn transform(words: [u32; 4]) -> Question {
    let hex = |words: [u32; 4]| words.map(|word| format!("{word:08x}")).join(" ");
    // A zero has a sign here, which no z shows.
    (format!("normals {}", hex(words)), hex(bits(normals(words).map(|normal| normal + 0.0))))
}

fn compare(name: &str, questions: &[Question]) {
    let python = match python::with(&[]) {
        Ok(python) => python,
        Err(why) => {
            // Not `println!`: the test harness keeps that to itself.
            let _ = writeln!(std::io::stderr(), "... skipped the comparison with specification.py: {why}");
            return;
        }
    };
    let input = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let text: String = questions.iter().map(|(question, _)| format!("{question}\n")).collect();
    std::fs::write(&input, text).unwrap();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/noise/specification.py");
    let output = Command::new(python).arg(program).stdin(File::open(input).unwrap()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answers = String::from_utf8(output.stdout).unwrap();
    assert_eq!(answers.lines().count(), questions.len(), "number of answers");
    for (answer, (question, expected)) in answers.lines().zip(questions) {
        assert_eq!(answer, expected, "{question}");
    }
    println!("{} answers of specification.py are those of the library", questions.len());
}

/// `n` times a z and a mask, and for every eighth the transform of edge words, which no address reaches.
fn questions(seed: u64, n: usize) -> impl Iterator<Item = Question> {
    let mut random = Words(seed);
    let edges = edge_words();
    (0..n).flat_map(move |i| {
        let mut edge = || edges[random.next() as usize % edges.len()];
        let words = [edge(), edge(), edge(), edge()];
        let last = (i % 8 == 0).then(|| transform(words));
        [z(&mut random), mask(&mut random)].into_iter().chain(last)
    })
}

#[test]
fn a_second_implementation_agrees() {
    compare("specification.in", &questions(11, 16_000).collect::<Vec<_>>());
}

/// A million addresses and masks, and the transform of every pair of edge words.
#[test]
#[ignore = "takes minutes"]
fn a_second_implementation_agrees_on_a_million_addresses() {
    let edges = edge_words();
    let pairs = edges.iter().flat_map(|&u| edges.iter().map(move |&v| transform([u, v, v, u])));
    compare("specification_long.in", &questions(12, 1_000_000).chain(pairs).collect::<Vec<_>>());
}
