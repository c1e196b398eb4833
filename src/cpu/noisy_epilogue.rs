//! Noisy epilogue for trainers that keep their own GEMM: `y += z⊙a` in place.

use super::rows::Z;
use crate::error::Result;
use crate::noise::Noise;
use crate::parallel;
use crate::real::Real;
use crate::shape::{LinearShape, length};
use crate::vector::zip2;

/// Elements in one parallel task.
const TASK: usize = 1 << 15;

/// `y [M, N] += z ⊙ a [M, N]`: adds the perturbed adapter output to the base output that lies in `y`.
///
/// Of `shape`, `in_features` does not matter and `shared_input` neither: `a` has all `M` rows.
///
/// # Errors
/// If a size is zero or overflows, or a slice is not of `M·N` elements.
#[inline(never)]
pub fn noisy_epilogue<T: Real>(
    shape: LinearShape,
    noise: Noise<&'_ [T]>,
    a: &[T],
    y: &mut [T],
) -> Result<()> {
    apply(shape, noise, ("a", a), ("y", y), |y, a, z| *y += z * a)
}

/// `da [M, N] = z ⊙ dy [M, N]`: the gradient of [`noisy_epilogue`] to `a`. That to `y` is `dy` itself.
///
/// # Errors
/// As [`noisy_epilogue`].
#[inline(never)]
pub fn noisy_epilogue_backward<T: Real>(
    shape: LinearShape,
    noise: Noise<&'_ [T]>,
    dy: &[T],
    da: &mut [T],
) -> Result<()> {
    apply(shape, noise, ("dy", dy), ("da", da), |da, g, z| *da = z * g)
}

fn apply<T: Real>(
    shape: LinearShape,
    noise: Noise<&'_ [T]>,
    input: (&'static str, &[T]),
    output: (&'static str, &mut [T]),
    op: impl Fn(&mut T, T, T) + Sync,
) -> Result<()> {
    let shape = LinearShape { in_features: 1, shared_input: false, ..shape };
    let z = Z::new(noise, shape)?;
    let (m, n) = (shape.out_rows(), shape.out_features);
    length(input.0, "[M, N]", input.1, m * n)?;
    length(output.0, "[M, N]", output.1, m * n)?;
    let rows = (TASK / n).max(1);
    let tasks = output.1.chunks_mut(rows * n).zip(input.1.chunks(rows * n));
    parallel::for_each_init(tasks.enumerate(), Vec::new, |scratch, (i, (out, input))| {
        let first = i * rows;
        z.for_runs(first..first + out.len() / n, 0..n, scratch, |run, z| {
            for row in run {
                let at = (row - first) * n..(row - first + 1) * n;
                zip2(&mut out[at.clone()], &input[at], z, &op);
            }
        });
    });
    Ok(())
}
