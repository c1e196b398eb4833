//! Matrix products, by `faer`, over slices that were checked before.

use crate::real::Real;
use faer::linalg::matmul::matmul;
pub(super) use faer::{Accum, MatMut, MatRef, Par};

/// A row-major slice as a matrix.
pub(super) fn mat<T>(slice: &[T], rows: usize, cols: usize) -> MatRef<'_, T> {
    MatRef::from_row_major_slice(slice, rows, cols)
}

/// A row-major slice as a mutable matrix.
pub(super) fn mat_mut<T>(slice: &mut [T], rows: usize, cols: usize) -> MatMut<'_, T> {
    MatMut::from_row_major_slice_mut(slice, rows, cols)
}

/// `c = a·b` or `c += a·b`.
pub(super) fn gemm<T: Real>(c: MatMut<'_, T>, accum: Accum, a: MatRef<'_, T>, b: MatRef<'_, T>, par: Par) {
    matmul(c, accum, a, b, T::one(), par);
}

/// All threads of the current pool.
pub(super) fn all_threads() -> Par {
    let threads = rayon::current_num_threads();
    if threads > 1 { Par::rayon(threads) } else { Par::Seq }
}

/// How one product inside `tasks` parallel tasks should run: alone when the tasks keep every thread busy.
pub(super) fn inner_threads(tasks: usize) -> Par {
    if tasks >= rayon::current_num_threads() { Par::Seq } else { all_threads() }
}
