//! Tests of raw words.

mod birthdays;
mod gaps;
mod lags;
mod patterns;
mod rank;
mod weights;

use crate::finding::Finding;
use crate::generator::Generator;
use crate::stream::{Axis, Stream};
use birthdays::Birthdays;
use gaps::Gaps;
use lags::Lags;
use patterns::{Neighbours, Patterns};
use rank::Rank;
use weights::Weights;

/// Words that tests are given at a time: half of a 512 KiB cache.
pub const CHUNK: usize = 1 << 16;

/// A test of chunks of words; chunks need not follow each other.
pub trait Test {
    fn feed(&mut self, words: &[u32; CHUNK]);
    fn findings(&self) -> Vec<Finding>;
}

/// A test that sees one of `every` chunks.
struct Sampled {
    every: u64,
    test: Box<dyn Test>,
}

/// How much of the words the tests that take time see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One chunk in some, of gigabytes.
    Long,
    /// Most of them, of megabytes.
    Short,
}

/// The tests, each with the number of chunks of which it sees one.
fn battery(form: Form) -> Vec<Sampled> {
    let sampled = |long, short, test: Box<dyn Test>| Sampled {
        every: if form == Form::Long { long } else { short },
        test,
    };
    vec![
        sampled(1, 1, Box::new(Patterns::new())),
        sampled(1, 1, Box::new(Weights::new())),
        sampled(4, 1, Box::new(Neighbours::new())),
        sampled(4, 1, Box::new(Gaps::new())),
        sampled(4, 1, Box::new(Lags::new())),
        sampled(64, 4, Box::new(Rank::<1>::new())),
        sampled(256, 8, Box::new(Rank::<8>::new())),
        sampled(1, 1, Box::new(Birthdays::new(32, 10, 1 << 10))),
        sampled(16, 2, Box::new(Birthdays::new(48, 17, 1 << 8))),
    ]
}

/// All tests on the first `1 << log2_bytes` bytes of a stream.
pub fn run<G: Generator>(axis: Axis, log2_bytes: u32, form: Form) -> Vec<Finding> {
    let mut stream = Stream::<G>::new(axis);
    let mut tests = battery(form);
    let mut words = Box::new([0; CHUNK]);
    for chunk in 0..(1u64 << log2_bytes) / size_of_val(&*words) as u64 {
        stream.read(&mut *words);
        for Sampled { every, test } in &mut tests {
            if chunk % *every == 0 {
                test.feed(&words);
            }
        }
    }
    tests.iter().flat_map(|t| t.test.findings()).collect()
}
