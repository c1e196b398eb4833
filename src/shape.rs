//! Sizes of a noisy linear layer, checked once, and the checks that operators share.

use crate::error::{Error, Result};

/// Sizes of one call of a noisy linear layer.
///
/// Rows are ordered branch-major: all samples of branch 0, then all of branch 1; inside a sample, its tokens. With
/// `R = branches·batch` and `M = R·tokens`, the input is `x [M, K]` and the output `y [M, N]`, row-major. With
/// `shared_input` the branches have not parted yet: `x` and `dx` are `[batch·tokens, K]`, `y` and `dy` still
/// `[M, N]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// Differently perturbed copies of the batch: 1 or 2.
    pub branches: usize,
    /// Samples per branch, `B`.
    pub batch: usize,
    /// Tokens per sample, `T`; 1 for two-dimensional inputs.
    pub tokens: usize,
    /// In-features `K`.
    pub in_features: usize,
    /// Out-features `N`.
    pub out_features: usize,
    /// Whether all branches read the same input rows.
    pub shared_input: bool,
}

impl LinearShape {
    /// Sample rows `R` of the output. This and the other counts saturate for sizes that no operator accepts.
    pub fn samples(&self) -> usize {
        self.branches.saturating_mul(self.batch)
    }

    /// Token rows `M` of the output.
    pub fn out_rows(&self) -> usize {
        self.samples().saturating_mul(self.tokens)
    }

    /// Token rows of the input: `M`, or `batch·tokens` when it is shared.
    pub fn in_rows(&self) -> usize {
        if self.shared_input { self.batch.saturating_mul(self.tokens) } else { self.out_rows() }
    }

    /// Output rows that are computed from one input row: `branches` when the input is shared, else 1.
    pub(crate) fn fan_out(&self) -> usize {
        if self.shared_input { self.branches } else { 1 }
    }

    /// Checks every size, and that no tensor of the layer overflows the address space.
    pub(crate) fn check(&self) -> Result<()> {
        if !(1..=2).contains(&self.branches) {
            return Err(Error::Size { argument: "branches", expected: "1 or 2", got: self.branches });
        }
        nonzero("batch", self.batch)?;
        nonzero("tokens", self.tokens)?;
        nonzero("in_features", self.in_features)?;
        nonzero("out_features", self.out_features)?;
        // Counter fields of the noise: 32 bits of token (two values reserved) and of channel.
        if self.tokens as u64 >= u64::from(u32::MAX) - 1 {
            return Err(Error::Size { argument: "tokens", expected: "less than 2^32 - 2", got: self.tokens });
        }
        if self.out_features as u64 > u64::from(u32::MAX) {
            return Err(Error::Size {
                argument: "out_features",
                expected: "less than 2^32",
                got: self.out_features,
            });
        }
        let rows = [self.branches, self.batch, self.tokens];
        product("x", "[M, K]", &[rows[0], rows[1], rows[2], self.in_features])?;
        product("y", "[M, N]", &[rows[0], rows[1], rows[2], self.out_features])?;
        product("weight", "[N, K]", &[self.out_features, self.in_features])?;
        Ok(())
    }
}

/// Product of `sizes`, if a tensor of that many 8-byte elements can be addressed.
pub(crate) fn product(argument: &'static str, shape: &'static str, sizes: &[usize]) -> Result<usize> {
    sizes
        .iter()
        .try_fold(1usize, |product, &size| product.checked_mul(size))
        .filter(|&product| product <= isize::MAX as usize / 8)
        .ok_or(Error::Overflow { argument, shape })
}

pub(crate) fn nonzero(argument: &'static str, got: usize) -> Result<()> {
    if got == 0 { Err(Error::Size { argument, expected: "at least 1", got }) } else { Ok(()) }
}

pub(crate) fn length<T>(
    argument: &'static str,
    shape: &'static str,
    slice: &[T],
    expected: usize,
) -> Result<()> {
    if slice.len() == expected {
        Ok(())
    } else {
        Err(Error::Length { argument, shape, expected, got: slice.len() })
    }
}
