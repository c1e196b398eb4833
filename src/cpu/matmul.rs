//! GEMMs over slices that were checked before, by `faer`, a registered BLAS, or in `bf16` ([`bf16`](super::bf16)); and sums of
//! partial ones.

use super::blas;
use crate::parallel;
use crate::real::{Element, Real};
use crate::vector::zip1;
use faer::linalg::matmul::matmul;
pub(super) use faer::{Accum, MatMut, MatRef, Par};
use num_traits::One;

/// A row-major slice as a matrix.
pub(super) fn mat<T>(slice: &[T], rows: usize, cols: usize) -> MatRef<'_, T> {
    MatRef::from_row_major_slice(slice, rows, cols)
}

/// A row-major slice as a mutable matrix.
pub(super) fn mat_mut<T>(slice: &mut [T], rows: usize, cols: usize) -> MatMut<'_, T> {
    MatMut::from_row_major_slice_mut(slice, rows, cols)
}

/// A column-major slice as a mutable matrix. GEMMs with few columns run several times faster into this layout.
pub(super) fn mat_mut_t<T>(slice: &mut [T], rows: usize, cols: usize) -> MatMut<'_, T> {
    MatMut::from_column_major_slice_mut(slice, rows, cols)
}

/// `c = a·b` or `c += a·b`.
pub(super) fn gemm<T: Element>(
    c: MatMut<'_, T::Real>,
    accum: Accum,
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
    par: Par,
) {
    gemm_scaled(c, accum, T::Real::one(), a, b, par);
}

/// `c = scale·a·b` or `c += scale·a·b`.
pub(super) fn gemm_scaled<T: Element>(
    c: MatMut<'_, T::Real>,
    accum: Accum,
    scale: T::Real,
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
    par: Par,
) {
    T::gemm(c, accum, scale, a, b, par);
}

/// [`gemm_scaled`] of types that are computed in.
pub(super) fn gemm_of_reals<T: Real>(
    c: MatMut<'_, T>,
    accum: Accum,
    scale: T,
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
    par: Par,
) {
    let par = if parallel::in_openmp() { Par::Seq } else { par };
    let parts = par.degree();
    if blas::suits(c.as_ref(), a, b, parts) {
        let beta = if matches!(accum, Accum::Add) { T::one() } else { T::zero() };
        in_parts((c, a, b), parts, |(c, a, b)| blas::gemm(c, beta, scale, a, b));
    } else {
        matmul(c, accum, a, b, scale, par);
    }
}

/// `c`, `a` and `b` of a GEMM.
type Operands<'a, C, T> = (MatMut<'a, C>, MatRef<'a, T>, MatRef<'a, T>);

/// A GEMM in parts that run in parallel, each by `gemm`.
pub(super) fn in_parts<C: Send, T: Sync>(
    operands: Operands<'_, C, T>,
    parts: usize,
    gemm: impl Fn(Operands<'_, C, T>) + Sync,
) {
    let mut tasks = Vec::with_capacity(parts);
    split(operands, parts, &mut tasks);
    parallel::for_each(tasks.into_iter(), gemm);
}

/// Parts of a GEMM, halved along the longer side.
fn split<'a, C, T>((c, a, b): Operands<'a, C, T>, parts: usize, out: &mut Vec<Operands<'a, C, T>>) {
    if parts <= 1 {
        return out.push((c, a, b));
    }
    let half = parts / 2;
    let halves = if c.nrows() >= c.ncols() {
        let at = c.nrows() * half / parts;
        let ((c0, c1), (a0, a1)) = (c.split_at_row_mut(at), a.split_at_row(at));
        [(c0, a0, b), (c1, a1, b)]
    } else {
        let at = c.ncols() * half / parts;
        let ((c0, c1), (b0, b1)) = (c.split_at_col_mut(at), b.split_at_col(at));
        [(c0, a, b0), (c1, a, b1)]
    };
    for (operands, parts) in halves.into_iter().zip([half, parts - half]) {
        split(operands, parts, out);
    }
}

/// Blocks of `size` rows.
pub(super) fn row_chunks_mut<T>(all: MatMut<'_, T>, size: usize) -> impl Iterator<Item = MatMut<'_, T>> {
    let count = all.nrows().div_ceil(size);
    let mut rest = Some(all);
    (0..count).map(move |_| {
        let all = rest.take().expect("put back below");
        let at = size.min(all.nrows());
        let (chunk, later) = all.split_at_row_mut(at);
        rest = Some(later);
        chunk
    })
}

/// The sum of partial results, in their order.
pub(super) fn add_up<'a, T: Real>(mut parts: impl Iterator<Item = &'a [T]>) -> Vec<T> {
    let mut total = parts.next().expect("no product is split into nothing").to_vec();
    parts.for_each(|part| zip1(&mut total, part, |total, part| *total += part));
    total
}

/// Writes the transpose of `from [columns, rows]` to `to [rows, columns]`.
pub(super) fn transpose<T: Element>(from: &[T::Real], to: &mut [T], columns: usize) {
    let rows = to.len() / columns;
    for (i, row) in to.chunks_exact_mut(columns).enumerate() {
        for (j, to) in row.iter_mut().enumerate() {
            *to = T::from_real(from[j * rows + i]);
        }
    }
}

/// All threads of the current pool.
pub(super) fn all_threads() -> Par {
    let threads = rayon::current_num_threads();
    if threads > 1 { Par::rayon(threads) } else { Par::Seq }
}

/// How one GEMM inside `tasks` parallel tasks should run: alone when the tasks keep every thread busy.
pub(super) fn inner_threads(tasks: usize) -> Par {
    if tasks >= rayon::current_num_threads() { Par::Seq } else { all_threads() }
}
