//! From what tensors are stored in to what is computed in, and back.

use super::bf16;
use super::matmul::{Accum, MatMut, MatRef, Par, gemm_of_reals, mat_mut, row_chunks_mut};
use super::scratch::{Scratch, Scratched};
use crate::parallel;
use crate::real::{Element, Real};
use crate::vector::zip1;
use std::ops::Range;

/// What an [`Element`] with this `Real` has besides, for the operators only.
pub trait Store<R: Real>: Scratched {
    /// Whether it has less precision than what is computed in.
    const ROUNDS: bool;
    /// `c = scale·a·b` or `c += scale·a·b`.
    fn gemm(c: MatMut<'_, R>, accum: Accum, scale: R, a: MatRef<'_, Self>, b: MatRef<'_, Self>, par: Par);
    /// Whether packing an operand once for several GEMMs pays.
    fn packs() -> bool {
        false
    }
    /// The left operand of several GEMMs, prepared for them once.
    type Left<'a>: Copy + Sync;
    /// The right operand of several GEMMs, prepared for them once.
    type Right<'a>: Copy + Sync;
    /// What operands are prepared in.
    type Memory: Default;
    /// Prepares a left operand, whose rows or columns are contiguous.
    fn left<'a>(a: MatRef<'a, Self>, memory: &'a mut Self::Memory) -> Self::Left<'a>;
    /// Prepares a right operand, whose rows or columns are contiguous.
    fn right<'a>(b: MatRef<'a, Self>, memory: &'a mut Self::Memory, par: Par) -> Self::Right<'a>;
    /// `c = left·right[:, columns]`, or `c += …`; rows of `c` are contiguous, and columns begin at a multiple of 32.
    fn product(
        c: MatMut<'_, R>,
        accum: Accum,
        left: Self::Left<'_>,
        right: Self::Right<'_>,
        columns: Range<usize>,
        par: Par,
    );
    /// The same numbers, in their own memory or in this.
    fn reals<'a>(values: &'a [Self], memory: &'a mut Vec<R>) -> &'a [R];
    /// Overwrites a row-major matrix with what `body` writes: all of it, into memory of any contents.
    fn write(out: MatMut<'_, Self>, par: Par, body: impl FnOnce(MatMut<'_, R>));
}

macro_rules! stored_as_it_is {
    ($($type:ty),*) => {$(
        impl Store<$type> for $type {
            const ROUNDS: bool = false;

            fn gemm(
                c: MatMut<'_, $type>,
                accum: Accum,
                scale: $type,
                a: MatRef<'_, $type>,
                b: MatRef<'_, $type>,
                par: Par,
            ) {
                gemm_of_reals(c, accum, scale, a, b, par);
            }

            type Left<'a> = MatRef<'a, $type>;
            type Right<'a> = MatRef<'a, $type>;
            type Memory = ();

            fn left<'a>(a: MatRef<'a, $type>, (): &'a mut ()) -> MatRef<'a, $type> {
                a
            }

            fn right<'a>(b: MatRef<'a, $type>, (): &'a mut (), _: Par) -> MatRef<'a, $type> {
                b
            }

            fn product(
                c: MatMut<'_, $type>,
                accum: Accum,
                left: MatRef<'_, $type>,
                right: MatRef<'_, $type>,
                columns: Range<usize>,
                par: Par,
            ) {
                gemm_of_reals(c, accum, 1.0, left, right.subcols(columns.start, columns.len()), par);
            }

            fn reals<'a>(values: &'a [$type], _: &'a mut Vec<$type>) -> &'a [$type] {
                values
            }

            fn write(out: MatMut<'_, $type>, _: Par, body: impl FnOnce(MatMut<'_, $type>)) {
                body(out);
            }
        }
    )*};
}

// Not for all `Real`s at once: what is generic is compiled again in every program that uses it, and GEMMs are large.
stored_as_it_is!(f32, f64);

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

    fn packs() -> bool {
        bf16::has_tiles()
    }

    type Left<'a> = bf16::Left<'a>;
    type Right<'a> = bf16::Right<'a>;
    type Memory = bf16::Memory;

    fn left<'a>(a: MatRef<'a, Self>, memory: &'a mut bf16::Memory) -> bf16::Left<'a> {
        bf16::left(a, memory)
    }

    fn right<'a>(b: MatRef<'a, Self>, memory: &'a mut bf16::Memory, par: Par) -> bf16::Right<'a> {
        bf16::right(b, memory, par)
    }

    fn product(
        c: MatMut<'_, f32>,
        accum: Accum,
        left: bf16::Left<'_>,
        right: bf16::Right<'_>,
        columns: Range<usize>,
        par: Par,
    ) {
        bf16::product(c, accum, left, right, columns, par);
    }

    fn reals<'a>(values: &'a [Self], memory: &'a mut Vec<f32>) -> &'a [f32] {
        memory.resize(values.len(), 0.0);
        zip1(memory, values, |real, value| *real = value.to_real());
        memory
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
            _ => parallel::for_each(row_chunks_mut(out, ROWS).zip(reals.chunks_mut(ROWS * columns)), round),
        }
    }
}
