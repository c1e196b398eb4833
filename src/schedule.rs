//! What changes over depth and over time: σ by block, and the lazy variant's alternation.

use crate::error::{Error, Result};
use crate::noise::check_sigma;
use crate::shape::nonzero;

/// Far beyond any network, and small enough that the list of their σ can be held.
pub(crate) const MAX_BLOCKS: usize = 1 << 20;

/// The σ of every block, as in the official code: zero before `first_noisy`, then a linear fall from `sigma`.
///
/// With `n` blocks (the classification head is the last one), block `k ≥ first_noisy` gets
/// `sigma·(n − k)/(n − first_noisy)`. A plain ViT uses `first_noisy` = 1, a Swin 0.
///
/// ```
/// assert_eq!(pace_kernels::schedule::sigma_by_block(4, 1.2, 1)?, [0.0, 1.2, 1.2 * 2.0 / 3.0, 1.2 / 3.0]);
/// # Ok::<(), pace_kernels::Error>(())
/// ```
///
/// # Errors
/// If `blocks` is zero or more than 2²⁰, `first_noisy` is not below `blocks`, or `sigma` is negative or not finite.
pub fn sigma_by_block(blocks: usize, sigma: f64, first_noisy: usize) -> Result<Vec<f64>> {
    if !(1..=MAX_BLOCKS).contains(&blocks) {
        return Err(Error::Size { argument: "blocks", expected: "1 to 2^20", got: blocks });
    }
    check_sigma(sigma)?;
    if first_noisy >= blocks {
        return Err(Error::Size {
            argument: "first_noisy",
            expected: "less than `blocks`",
            got: first_noisy,
        });
    }
    let noisy = (blocks - first_noisy) as f64;
    Ok((0..blocks)
        .map(|k| if k < first_noisy { 0.0 } else { sigma * ((blocks - k) as f64 / noisy) })
        .collect())
}

/// PACE-lazy: which iterations use half the batch with the consistency term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LazySchedule {
    interval: usize,
}

impl LazySchedule {
    /// Consistency at iterations 0, `interval`, 2·`interval`, …
    ///
    /// # Errors
    /// If `interval` is zero.
    pub fn new(interval: usize) -> Result<Self> {
        nonzero("interval", interval)?;
        Ok(Self { interval })
    }

    /// The samples of a batch of `batch` that iteration `iteration` uses with two branches; `None` if it uses the
    /// whole batch with one branch and no consistency term.
    ///
    /// # Errors
    /// If the half of the batch that is needed is empty.
    pub fn two_branch_samples(self, iteration: usize, batch: usize) -> Result<Option<usize>> {
        if !iteration.is_multiple_of(self.interval) {
            nonzero("batch", batch)?;
            return Ok(None);
        }
        match batch / 2 {
            0 => Err(Error::Size {
                argument: "batch",
                expected: "at least 2 (the lazy variant halves it)",
                got: batch,
            }),
            half => Ok(Some(half)),
        }
    }
}
