//! GEMMs by a BLAS that the host program registers, in place of `faer`'s.
//!
//! Trainers often bring one that is made for the processor at hand (PyTorch has MKL in it on x86). It is called for one tile
//! at a time, from the threads that the operators run on, and computes each on the calling thread alone.

use crate::error::{Error, Result};
use faer::{MatMut, MatRef};
use std::ffi::{c_char, c_int};
use std::sync::OnceLock;

/// `sgemm` or `dgemm` as Fortran declares it, with 32-bit integers.
pub type Gemm<T> = unsafe extern "C" fn(
    transa: *const c_char,
    transb: *const c_char,
    m: *const c_int,
    n: *const c_int,
    k: *const c_int,
    alpha: *const T,
    a: *const T,
    lda: *const c_int,
    b: *const T,
    ldb: *const c_int,
    beta: *const T,
    c: *mut T,
    ldc: *const c_int,
);

/// A BLAS library in this process.
#[derive(Debug, Clone, Copy)]
pub struct Blas {
    /// Single precision.
    pub sgemm: Gemm<f32>,
    /// Double precision.
    pub dgemm: Gemm<f64>,
    /// `MKL_Set_Num_Threads_Local`, for a library that has threads of its own: sets how many the calling thread's GEMMs use,
    /// and gives the number before. `None` if GEMMs run on the calling thread anyway.
    pub set_num_threads_local: Option<unsafe extern "C" fn(c_int) -> c_int>,
}

static BLAS: OnceLock<Blas> = OnceLock::new();

/// Below so many multiplications `faer`, which the compiler can see through, is at least as fast.
const MIN_WORK: usize = 1 << 20;

/// Registers a BLAS for large GEMMs on the CPU, from now until the process ends.
///
/// # Errors
/// [`Error::Argument`] if one has been set already.
///
/// # Safety
/// The functions must be what their names say, callable from any thread at any time, for as long as the process runs.
pub unsafe fn set_blas(blas: Blas) -> Result<()> {
    let set = BLAS.set(blas);
    set.map_err(|_| Error::Argument { argument: "blas", problem: "has been set before" })
}

/// Whether a BLAS computes large GEMMs.
pub(super) fn is_registered() -> bool {
    BLAS.get().is_some()
}

/// A type that BLAS has GEMMs for.
pub trait BlasReal: Copy {
    /// The function of this type.
    fn gemm(blas: &Blas) -> Gemm<Self>;
}

impl BlasReal for f32 {
    fn gemm(blas: &Blas) -> Gemm<f32> {
        blas.sgemm
    }
}

impl BlasReal for f64 {
    fn gemm(blas: &Blas) -> Gemm<f64> {
        blas.dgemm
    }
}

/// How BLAS names a matrix of column-major or row-major layout: transposed or not, and the distance of its columns.
fn layout<T>(a: MatRef<'_, T>) -> Option<(c_char, c_int)> {
    let (letter, stride, rows) = match (a.row_stride(), a.col_stride()) {
        (1, stride) => (b'N', stride, a.nrows()),
        (stride, 1) => (b'T', stride, a.ncols()),
        _ => return None,
    };
    let stride = c_int::try_from(stride).ok().filter(|&stride| stride as usize >= rows)?;
    Some((letter as c_char, stride))
}

/// Whether there is a BLAS that suits a GEMM and each of its `parts`.
pub(super) fn suits<T>(c: MatRef<'_, T>, a: MatRef<'_, T>, b: MatRef<'_, T>, parts: usize) -> bool {
    let (m, n, k) = (c.nrows(), c.ncols(), a.ncols());
    is_registered()
        && m.saturating_mul(n).saturating_mul(k) / parts >= MIN_WORK
        // So that every part has two rows and columns, and strides mean what they say.
        && m.min(n) >= 2 * parts
        && k >= 2
        && [m, n, k].iter().all(|&size| c_int::try_from(size).is_ok())
        && [c, a, b].into_iter().all(|matrix| layout(matrix).is_some())
}

/// `c = scale·a·b + beta·c` on this thread, for a GEMM (or a part of one) that [`suits`].
pub(super) fn gemm<T: BlasReal>(c: MatMut<'_, T>, beta: T, scale: T, a: MatRef<'_, T>, b: MatRef<'_, T>) {
    // BLAS writes columns: a row-major result is the transpose of one.
    let (c, a, b) =
        if c.row_stride() == 1 { (c, a, b) } else { (c.transpose_mut(), b.transpose(), a.transpose()) };
    assert!(c.nrows() == a.nrows() && c.ncols() == b.ncols() && a.ncols() == b.nrows(), "shapes agree");
    let (Some(blas), Some((transa, lda)), Some((transb, ldb)), Some((_, ldc))) =
        (BLAS.get(), layout(a), layout(b), layout(c.as_ref()))
    else {
        unreachable!("`suits` has looked");
    };
    // `suits` has seen that they fit.
    let [m, n, k] = [c.nrows(), c.ncols(), a.ncols()].map(|size| size as c_int);
    // SAFETY: by the promise of `set_blas`. Shapes agree, and every matrix has its elements at the strides that `layout` gives.
    unsafe {
        let threads = blas.set_num_threads_local.map(|set| (set, set(1)));
        let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_ptr_mut());
        T::gemm(blas)(&transa, &transb, &m, &n, &k, &scale, a, &lda, b, &ldb, &beta, c, &ldc);
        if let Some((set, before)) = threads {
            set(before);
        }
    }
}
