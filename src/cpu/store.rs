//! From what tensors are stored in to what is computed in, and back.

use super::bf16;
use super::matmul::{Accum, MatMut, MatRef, Par, gemm_of_reals, mat_mut};
use super::scratch::{Scratch, Scratched};
use crate::real::{Element, Real};
use crate::vector::zip1;
use rayon::prelude::*;
use std::borrow::Cow;

/// What an [`Element`] with this `Real` has besides, for the operators only.
pub trait Store<R: Real>: Scratched {
    /// Whether it has less precision than what is computed in.
    const ROUNDS: bool;
    /// `c = scale·a·b` or `c += scale·a·b`.
    fn gemm(c: MatMut<'_, R>, accum: Accum, scale: R, a: MatRef<'_, Self>, b: MatRef<'_, Self>, par: Par);
    /// The same numbers.
    fn reals(values: &[Self]) -> Cow<'_, [R]>;
    /// Overwrites a row-major matrix with what `body` writes: all of it, into memory of any contents.
    fn write(out: MatMut<'_, Self>, par: Par, body: impl FnOnce(MatMut<'_, R>));
}

impl<T: Real> Store<T> for T {
    const ROUNDS: bool = false;

    fn gemm(c: MatMut<'_, T>, accum: Accum, scale: T, a: MatRef<'_, T>, b: MatRef<'_, T>, par: Par) {
        gemm_of_reals(c, accum, scale, a, b, par);
    }

    fn reals(values: &[T]) -> Cow<'_, [T]> {
        Cow::Borrowed(values)
    }

    fn write(out: MatMut<'_, T>, _: Par, body: impl FnOnce(MatMut<'_, T>)) {
        body(out);
    }
}

impl Store<f32> for half::bf16 {
    const ROUNDS: bool = true;

    fn gemm(
        c: MatMut<'_, f32>,
        accum: Accum,
        scale: f32,
        a: MatRef<'_, Self>,
        b: MatRef<'_, Self>,
        par: Par,
    ) {
        bf16::gemm(c, accum, scale, a, b, par);
    }

    fn reals(values: &[Self]) -> Cow<'_, [f32]> {
        let mut reals = vec![0.0; values.len()];
        zip1(&mut reals, values, |real, value| *real = value.to_real());
        Cow::Owned(reals)
    }

    fn write(out: MatMut<'_, Self>, par: Par, body: impl FnOnce(MatMut<'_, f32>)) {
        /// Rows that a thread rounds at a time.
        const ROWS: usize = 32;
        let (rows, columns) = (out.nrows(), out.ncols());
        let mut scratch = Scratch::take();
        let reals = scratch.get(rows * columns);
        body(mat_mut(reals, rows, columns));
        let round = |(mut out, reals): (MatMut<'_, Self>, &mut [f32])| {
            for (i, reals) in reals.chunks_exact(columns).enumerate() {
                let out = out.as_mut().row_mut(i).try_as_row_major_mut().expect("rows are contiguous");
                zip1(out.as_slice_mut(), reals, |out, real| *out = Self::from_real(real));
            }
        };
        match par {
            Par::Seq => round((out, reals)),
            _ => out.par_row_chunks_mut(ROWS).zip(reals.par_chunks_mut(ROWS * columns)).for_each(round),
        }
    }
}
