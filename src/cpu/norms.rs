//! The two quantities that the paper plots: gradient norm and FP-distance.

use crate::error::Result;
use crate::real::Real;
use crate::shape::{length, nonzero, product};

/// Elements that are summed before their sum is added to the rest: keeps rounding small and the order fixed.
const CHUNK: usize = 4096;

fn sum_of_squares<T: Real>(values: impl Iterator<Item = T>) -> f64 {
    values.map(|v| v.to_f64() * v.to_f64()).sum()
}

/// Euclidean norm of all gradients together, `√(Σ g²)`, accumulated in `f64`.
///
/// ```
/// assert_eq!(pace_kernels::cpu::grad_norm(&[&[3.0f32], &[0.0, 4.0]]), 5.0);
/// ```
#[inline(never)]
pub fn grad_norm<T: Real>(gradients: &[&[T]]) -> f64 {
    let chunks = gradients.iter().flat_map(|gradient| gradient.chunks(CHUNK));
    chunks.map(|chunk| sum_of_squares(chunk.iter().copied())).sum::<f64>().sqrt()
}

/// FP-distance of a fine-tuned model to its pre-trained self, `mean_i ‖f(θ; x_i) − f(θ0; x_i)‖²` (paper section 3.2),
/// from both models' outputs `[samples, features]`.
///
/// # Errors
/// If a size is zero or a slice has another length than its shape.
#[inline(never)]
pub fn fp_distance<T: Real>(
    samples: usize,
    features: usize,
    fine_tuned: &[T],
    pre_trained: &[T],
) -> Result<f64> {
    nonzero("samples", samples)?;
    nonzero("features", features)?;
    let total = product("fine_tuned", "[samples, features]", &[samples, features])?;
    length("fine_tuned", "[samples, features]", fine_tuned, total)?;
    length("pre_trained", "[samples, features]", pre_trained, total)?;
    let rows = fine_tuned.chunks(features).zip(pre_trained.chunks(features));
    let sum: f64 = rows.map(|(a, b)| sum_of_squares(a.iter().zip(b).map(|(&a, &b)| a - b))).sum();
    Ok(sum / samples as f64)
}
