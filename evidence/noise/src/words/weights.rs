//! Hamming weights of words, and whether those of eight words depend on each other.

use super::{CHUNK, Test};
use crate::finding::Finding;
use crate::wide::{Loop, widest};
use statrs::distribution::{Binomial, Discrete, DiscreteCDF};

/// Weights are light, middling or heavy; eight in a row make one of 3⁸ signatures.
const SIGNATURES: usize = 6561;
/// The least middling and the least heavy weight.
const MIDDLING: u32 = 15;
const HEAVY: u32 = 18;
/// Expected numbers below this are put together.
const LEAST_EXPECTED: f64 = 10.0;

pub struct Weights {
    weights: [u64; 33],
    /// Signatures of eight words in order, and of the words at one place of eight calls.
    words: Vec<u32>,
    calls: Vec<u32>,
}

impl Weights {
    pub fn new() -> Self {
        Self { weights: [0; 33], words: vec![0; SIGNATURES], calls: vec![0; SIGNATURES] }
    }
}

fn signature_finding(name: &str, counts: &[u32]) -> Finding {
    let law = Binomial::new(0.5, 32).expect("a probability");
    let light = law.cdf(u64::from(MIDDLING) - 1);
    let class = [light, 1.0 - 2.0 * light, light];
    let total: f64 = counts.iter().map(|&n| f64::from(n)).sum();
    let cells = counts.iter().enumerate().map(|(mut signature, &n)| {
        let mut expected = total;
        for _ in 0..8 {
            expected *= class[signature % 3];
            signature /= 3;
        }
        (f64::from(n), expected)
    });
    Finding::chi_squared(name, together(cells))
}

/// Cells with few expected as one, next to the others.
fn together(cells: impl Iterator<Item = (f64, f64)>) -> Vec<(f64, f64)> {
    let (mut kept, mut rest) = (Vec::new(), (0.0, 0.0));
    for (observed, expected) in cells {
        if expected < LEAST_EXPECTED {
            rest = (rest.0 + observed, rest.1 + expected);
        } else {
            kept.push((observed, expected));
        }
    }
    if rest.1 >= LEAST_EXPECTED {
        kept.push(rest);
    }
    kept
}

struct Feed<'a>(&'a mut Weights, &'a [u32; CHUNK]);

impl Loop for Feed<'_> {
    #[inline(always)]
    fn run(self) {
        let Self(Weights { weights, words, calls }, chunk) = self;
        for block in chunk.as_chunks::<32>().0 {
            let mut classes = [0; 32];
            for (class, word) in classes.iter_mut().zip(block) {
                let weight = word.count_ones();
                *class = usize::from(weight >= MIDDLING) + usize::from(weight >= HEAVY);
                weights[weight as usize] += 1;
            }
            for k in 0..4 {
                words[(0..8).fold(0, |signature, i| 3 * signature + classes[8 * k + i])] += 1;
                calls[(0..8).fold(0, |signature, i| 3 * signature + classes[4 * i + k])] += 1;
            }
        }
    }
}

impl Test for Weights {
    fn feed(&mut self, words: &[u32; CHUNK]) {
        widest(Feed(self, words));
    }

    fn findings(&self) -> Vec<Finding> {
        let law = Binomial::new(0.5, 32).expect("a probability");
        let total = self.weights.iter().sum::<u64>() as f64;
        let cells = self.weights.iter().zip(0..).map(|(&n, weight)| (n as f64, total * law.pmf(weight)));
        vec![
            Finding::chi_squared("weights", together(cells)),
            signature_finding("weights of 8 words", &self.words),
            signature_finding("weights of 8 calls", &self.calls),
        ]
    }
}
