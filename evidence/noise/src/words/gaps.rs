//! How many words lie between two whose four high (or low) bits are zero.

use super::{CHUNK, Test};
use crate::finding::Finding;

/// Longer gaps count as this one.
const LONGEST: usize = 80;

struct Count {
    name: &'static str,
    mask: u32,
    gaps: [u64; LONGEST + 1],
    /// Words since the last hit, through all chunks: if words are independent, it does not matter what lies between
    /// chunks.
    since: usize,
}

pub struct Gaps([Count; 2]);

impl Gaps {
    pub fn new() -> Self {
        let count = |name, mask| Count { name, mask, gaps: [0; LONGEST + 1], since: 0 };
        Self([count("gaps, high bits", 0xF000_0000), count("gaps, low bits", 0xF)])
    }
}

impl Test for Gaps {
    fn feed(&mut self, words: &[u32; CHUNK]) {
        for Count { mask, gaps, since, .. } in &mut self.0 {
            for word in words {
                if word & *mask == 0 {
                    gaps[(*since).min(LONGEST)] += 1;
                    *since = 0;
                } else {
                    *since += 1;
                }
            }
        }
    }

    fn findings(&self) -> Vec<Finding> {
        let beyond = |gap: usize| (15.0f64 / 16.0).powi(gap as i32);
        let finding = |count: &Count| {
            let total = count.gaps.iter().sum::<u64>() as f64;
            let cells = count.gaps.iter().enumerate().map(|(gap, &n)| {
                let p = if gap == LONGEST { beyond(gap) } else { beyond(gap) / 16.0 };
                (n as f64, total * p)
            });
            Finding::chi_squared(count.name, cells)
        };
        self.0.iter().map(finding).collect()
    }
}
