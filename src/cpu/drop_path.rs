//! Shared DropPath: both branches of a sample live or die together, and the mask is divided by its own mean.

use crate::error::{Error, Result};
use crate::parallel;
use crate::real::Real;
use crate::shape::{length, nonzero, product};

/// Keeps the division defined when every sample is dropped.
const EPSILON: f64 = 1e-12;

/// `y = x ⊙ mask / (mean(mask) + 1e-12)`, with one mask element per sample, the same for every branch.
///
/// `x` and `y` are `[branches·B, features]` where `B = mask.len()` and `features` is everything a sample holds. A mask
/// is drawn by [`drop_path_mask`](crate::noise::drop_path_mask), or given (any scale: it is divided out).
///
/// # Errors
/// If `branches` is not 1 or 2, a size is zero, or a slice has another length than its shape.
#[inline(never)]
pub fn shared_drop_path<T: Real>(
    branches: usize,
    features: usize,
    mask: &[T],
    x: &[T],
    y: &mut [T],
) -> Result<()> {
    apply(branches, features, mask, ("x", x), ("y", y))
}

/// `dx = dy ⊙ mask / (mean(mask) + 1e-12)`: the gradient of [`shared_drop_path`], which is linear in `x`.
///
/// # Errors
/// As [`shared_drop_path`].
#[inline(never)]
pub fn shared_drop_path_backward<T: Real>(
    branches: usize,
    features: usize,
    mask: &[T],
    dy: &[T],
    dx: &mut [T],
) -> Result<()> {
    apply(branches, features, mask, ("dy", dy), ("dx", dx))
}

fn apply<T: Real>(
    branches: usize,
    features: usize,
    mask: &[T],
    input: (&'static str, &[T]),
    output: (&'static str, &mut [T]),
) -> Result<()> {
    if !(1..=2).contains(&branches) {
        return Err(Error::Size { argument: "branches", expected: "1 or 2", got: branches });
    }
    nonzero("features", features)?;
    nonzero("mask.len()", mask.len())?;
    let total = product(input.0, "[branches·B, features]", &[branches, mask.len(), features])?;
    length(input.0, "[branches·B, features]", input.1, total)?;
    length(output.0, "[branches·B, features]", output.1, total)?;
    let mean = mask.iter().map(|m| m.to_f64()).sum::<f64>() / mask.len() as f64;
    let scale = T::from_f64(1.0 / (mean + EPSILON));
    let rows = parallel::rows(features);
    let tasks = output.1.chunks_mut(rows * features).zip(input.1.chunks(rows * features));
    parallel::for_each(tasks.enumerate(), |(i, (out, input))| {
        let both = out.chunks_mut(features).zip(input.chunks(features));
        for (row, (out, input)) in (i * rows..).zip(both) {
            let factor = mask[row % mask.len()] * scale;
            for (out, &input) in out.iter_mut().zip(input) {
                *out = input * factor;
            }
        }
    });
    Ok(())
}
