//! Birthday spacings (Marsaglia): among the sorted spacings of sorted random days, few come twice.

use super::{CHUNK, Test};
use crate::finding::Finding;

/// `2^log2_n` days in a year of `2^bits`.
///
/// The number of spacings that equal another is nearly Poisson's with mean λ = n³/(4·2^bits). Over all `tries` the error
/// of that mean is below its standard deviation while n³·tries ≤ 2^(5/4·bits) (L'Ecuyer and Simard 2001).
pub struct Birthdays {
    bits: u32,
    log2_n: u32,
    tries: u64,
    tried: u64,
    days: Vec<u64>,
    coincidences: u64,
}

impl Birthdays {
    /// Looks at no words after so many tries.
    pub fn new(bits: u32, log2_n: u32, tries: u64) -> Self {
        assert!(3 * log2_n + tries.ilog2() <= 5 * bits / 4);
        Self { bits, log2_n, tries, tried: 0, days: Vec::new(), coincidences: 0 }
    }

    fn finish_year(&mut self) {
        self.days.sort_unstable();
        let mut before = 0;
        for day in &mut self.days {
            (*day, before) = (*day - before, *day);
        }
        self.days.sort_unstable();
        self.coincidences += self.days.windows(2).filter(|pair| pair[0] == pair[1]).count() as u64;
        self.days.clear();
        self.tried += 1;
    }
}

impl Test for Birthdays {
    fn feed(&mut self, words: &[u32; CHUNK]) {
        // Days are the upper bits of one word or of two.
        for pair in words.as_chunks::<2>().0 {
            let long = u64::from(pair[0]) << 32 | u64::from(pair[1]);
            let (days, n) = if self.bits <= 32 {
                (pair.map(|word| u64::from(word) >> (32 - self.bits)), 2)
            } else {
                ([long >> (64 - self.bits), 0], 1)
            };
            for &day in &days[..n] {
                if self.tried == self.tries {
                    return;
                }
                self.days.push(day);
                if self.days.len() == 1 << self.log2_n {
                    self.finish_year();
                }
            }
        }
    }

    fn findings(&self) -> Vec<Finding> {
        let mean = f64::from(3 * self.log2_n as i32 - self.bits as i32 - 2).exp2() * self.tried as f64;
        vec![Finding::poisson(format!("birthdays of {} bits", self.bits), self.coincidences, mean)]
    }
}
