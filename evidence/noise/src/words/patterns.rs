//! Frequencies of bits and of patterns of 16 bits.

use super::{CHUNK, Test};
use crate::finding::Finding;

/// Numbers of the 2¹⁶ patterns.
struct Table(Vec<u32>);

impl Table {
    fn new() -> Self {
        Self(vec![0; 1 << 16])
    }

    fn total(&self) -> f64 {
        self.0.iter().map(|&n| f64::from(n)).sum()
    }

    fn finding(&self, test: &str) -> Finding {
        let expected = self.total() / 65536.0;
        Finding::chi_squared(test, self.0.iter().map(|&n| (f64::from(n), expected)))
    }
}

/// Both halves of each word (a poker test of 16 bits), and from their tables every bit.
pub struct Patterns {
    low: Table,
    high: Table,
}

impl Patterns {
    pub fn new() -> Self {
        Self { low: Table::new(), high: Table::new() }
    }
}

impl Test for Patterns {
    fn feed(&mut self, words: &[u32; CHUNK]) {
        for &word in words {
            self.low.0[word as usize & 0xFFFF] += 1;
            self.high.0[word as usize >> 16] += 1;
        }
    }

    fn findings(&self) -> Vec<Finding> {
        let words = self.low.total();
        let mut sum = 0.0;
        for table in [&self.low, &self.high] {
            for bit in 0..16 {
                let ones: u64 =
                    (0..1 << 16).filter(|p| p >> bit & 1 == 1).map(|p| u64::from(table.0[p])).sum();
                sum += (2.0 * ones as f64 - words).powi(2) / words;
            }
        }
        vec![
            Finding::chi_squared_sum("bits", sum, 32.0),
            self.low.finding("16 low bits"),
            self.high.finding("16 high bits"),
        ]
    }
}

/// Serial tests: bytes of two words, next to each other or at the same place in neighbouring calls.
pub struct Neighbours {
    tables: [Table; 4],
}

impl Neighbours {
    pub fn new() -> Self {
        Self { tables: std::array::from_fn(|_| Table::new()) }
    }
}

impl Test for Neighbours {
    fn feed(&mut self, words: &[u32; CHUNK]) {
        let [high, low, call_high, call_low] = &mut self.tables;
        // A byte is in one pair only: pairs are independent.
        for eight in words.as_chunks::<8>().0 {
            for i in [0, 2, 4, 6] {
                let (a, b) = (eight[i], eight[i + 1]);
                high.0[(a >> 24 << 8 | b >> 24) as usize] += 1;
                low.0[((a & 255) << 8 | b & 255) as usize] += 1;
            }
            for i in 0..4 {
                let (a, b) = (eight[i], eight[i + 4]);
                call_high.0[(a >> 24 << 8 | b >> 24) as usize] += 1;
                call_low.0[((a & 255) << 8 | b & 255) as usize] += 1;
            }
        }
    }

    fn findings(&self) -> Vec<Finding> {
        let names =
            ["pairs, high byte", "pairs, low byte", "pairs of calls, high byte", "pairs of calls, low byte"];
        self.tables.iter().zip(names).map(|(table, name)| table.finding(name)).collect()
    }
}
