//! Ranks of binary matrices.

use super::{CHUNK, Test};
use crate::finding::Finding;

/// Square matrices over GF(2) of `64·W` rows.
pub struct Rank<const W: usize> {
    /// Matrices of full rank, one less, two less, and three or more.
    missing: [u64; 4],
}

impl<const W: usize> Rank<W> {
    pub fn new() -> Self {
        Self { missing: [0; 4] }
    }
}

fn rank<const W: usize>(rows: &mut [[u64; W]]) -> usize {
    let mut rank = 0;
    for column in 0..64 * W {
        let bit = |row: &[u64; W]| row[column / 64] >> (column % 64) & 1;
        let Some(pivot) = (rank..rows.len()).find(|&i| bit(&rows[i]) == 1) else { continue };
        rows.swap(rank, pivot);
        let pivot = rows[rank];
        for row in &mut rows[rank + 1..] {
            // Without a branch: it would go either way half of the time.
            let keep = bit(row).wrapping_neg();
            for (word, pivot) in row.iter_mut().zip(&pivot) {
                *word ^= pivot & keep;
            }
        }
        rank += 1;
    }
    rank
}

/// Probability that a random `n`×`n` matrix over GF(2) has rank `n − missing`.
fn probability(n: i32, missing: i32) -> f64 {
    let half = |k: i32| 0.5f64.powi(k);
    let r = n - missing;
    let factors = (0..r).map(|i| (1.0 - half(n - i)).powi(2) / (1.0 - half(r - i)));
    half(missing * missing) * factors.product::<f64>()
}

impl<const W: usize> Test for Rank<W> {
    fn feed(&mut self, words: &[u32; CHUNK]) {
        let rows: Vec<[u64; W]> = words
            .chunks_exact(2 * W)
            .map(|row| std::array::from_fn(|i| u64::from(row[2 * i]) | u64::from(row[2 * i + 1]) << 32))
            .collect();
        for matrix in rows.chunks_exact(64 * W) {
            let missing = 64 * W - rank(&mut matrix.to_vec());
            self.missing[missing.min(3)] += 1;
        }
    }

    fn findings(&self) -> Vec<Finding> {
        let total = self.missing.iter().sum::<u64>() as f64;
        let mut p: Vec<_> = (0..3).map(|missing| probability(64 * W as i32, missing)).collect();
        p.push(1.0 - p.iter().sum::<f64>());
        let mut cells: Vec<_> = self.missing.iter().zip(p).map(|(&n, p)| (n as f64, total * p)).collect();
        // Three or more are missing in one of 190.
        if cells[3].1 < 10.0 {
            let (observed, expected) = cells.remove(3);
            cells[2] = (cells[2].0 + observed, cells[2].1 + expected);
        }
        vec![Finding::chi_squared(format!("rank of {0}x{0}", 64 * W), cells)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_right() {
        // Of the 16 2×2 matrices 6 have rank 2, 9 rank 1 and 1 rank 0.
        for (missing, matrices) in [(0, 6.0), (1, 9.0), (2, 1.0)] {
            assert!((probability(2, missing) - matrices / 16.0).abs() < 1e-15);
        }
        let mut rows: Vec<[u64; 1]> = (0..64).map(|i| [1 << i | 1 << 5]).collect();
        assert_eq!(rank(&mut rows), 64);
        let mut rows: Vec<[u64; 1]> = (0..64).map(|i| [1 << (i / 2)]).collect();
        assert_eq!(rank(&mut rows), 32);
    }
}
