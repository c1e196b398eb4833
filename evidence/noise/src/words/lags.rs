//! Correlation of words with later ones, bit by bit.

use super::{CHUNK, Test};
use crate::finding::Finding;
use crate::wide::{Loop, widest};

/// Neighbours, neighbouring calls, powers of two, and rows of 768 channels and of 197 tokens.
const LAGS: [usize; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 64, 256, 768, 788, 1024];

pub struct Lags {
    /// Bits in which a word and the one `LAGS[i]` words later differ.
    differ: [u64; LAGS.len()],
    chunks: u64,
}

impl Lags {
    pub fn new() -> Self {
        Self { differ: [0; LAGS.len()], chunks: 0 }
    }
}

struct Differ<'a>(&'a mut [u64; LAGS.len()], &'a [u32; CHUNK]);

impl Loop for Differ<'_> {
    #[inline(always)]
    fn run(self) {
        for (differ, lag) in self.0.iter_mut().zip(LAGS) {
            let bits: u32 = self.1.iter().zip(&self.1[lag..]).map(|(a, b)| (a ^ b).count_ones()).sum();
            *differ += u64::from(bits);
        }
    }
}

impl Test for Lags {
    fn feed(&mut self, words: &[u32; CHUNK]) {
        widest(Differ(&mut self.differ, words));
        self.chunks += 1;
    }

    fn findings(&self) -> Vec<Finding> {
        // The exclusive ors of pairs are independent fair bits: a pair is either disjoint from another or shares one
        // word with it.
        let z = self.differ.iter().zip(LAGS).map(|(&differ, lag)| {
            let bits = 32.0 * (CHUNK - lag) as f64 * self.chunks as f64;
            (2.0 * differ as f64 - bits) / bits.sqrt()
        });
        let (sum, largest) = z.fold((0.0, 0f64), |(sum, largest), z| (sum + z * z, largest.max(z.abs())));
        vec![
            Finding::chi_squared_sum("lags", sum, LAGS.len() as f64),
            Finding::largest("largest lag", largest, LAGS.len()),
        ]
    }
}
