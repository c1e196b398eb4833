//! GEMMs of `bf16` by `VDPBF16PS`, on one thread: it multiplies pairs of neighbours along the reduction and adds both products to an
//! `f32`, twice the operations of an FMA.
//!
//! * *B* is packed in panels of [`PANEL`] columns, word by word, for [`DEPTH`] of the reduction; a panel stays in the L1 cache.
//! * *A* is read where it lies if its rows are contiguous, otherwise it is packed by rows; a word is broadcast to a vector.
//! * *C* is computed in tiles of [`ROWS`] rows and [`PANEL`] columns, which take 24 of 32 registers.

use super::super::matmul::{MatMut, MatRef};
use super::super::rows::blocks;
use super::super::scratch::Scratch;
use super::pack::{LANES, PANEL, pack_panels, pack_rows, store};
use half::bf16;
use std::arch::x86_64::*;

/// Rows of a tile.
const ROWS: usize = 12;
/// Words of the reduction for which operands are packed: a panel has 16 KiB.
const WORDS: usize = 128;
/// The same in numbers.
const DEPTH: usize = 2 * WORDS;
/// Columns of B that are packed at a time.
const COLUMNS: usize = 256;
/// The reduction for which B is packed at a time: 512 KiB, half of an L2 cache.
const PACKED: usize = 4 * DEPTH;
/// Rows of A that are used, or packed, at a time: 60 KiB.
const BLOCK: usize = 10 * ROWS;

/// That the processor has the instructions.
#[derive(Clone, Copy)]
pub(super) struct Unit(());

impl Unit {
    pub(super) fn detect() -> Option<Self> {
        let has_all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        has_all.then_some(Self(()))
    }

    /// `c = scale·a·b`, or `c += scale·a·b`; rows of `c` are contiguous, of `a` and `b` rows or columns.
    pub(super) fn gemm(
        self,
        c: MatMut<'_, f32>,
        add: bool,
        scale: f32,
        a: MatRef<'_, bf16>,
        b: MatRef<'_, bf16>,
    ) {
        // SAFETY: the processor has every feature that `gemm` enables, or there would be no `self`.
        unsafe { gemm(c, add, scale, a, b) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn gemm(mut c: MatMut<'_, f32>, add: bool, scale: f32, a: MatRef<'_, bf16>, b: MatRef<'_, bf16>) {
    let (m, n, k) = (c.nrows(), c.ncols(), a.ncols());
    assert!(a.nrows() == m && b.nrows() == k && b.ncols() == n, "shapes agree");
    assert!(c.col_stride() == 1, "rows of c are contiguous");
    let of_b = n.min(COLUMNS).next_multiple_of(PANEL) * k.min(PACKED).next_multiple_of(DEPTH) / 2;
    let of_a = m.min(BLOCK).next_multiple_of(LANES) * WORDS;
    let mut scratch = Scratch::<u32>::take();
    let (packed_b, packed_a) = scratch.get(of_b + of_a).split_at_mut(of_b);
    for columns in blocks(n, COLUMNS) {
        let of_depth = columns.len().next_multiple_of(PANEL) * WORDS;
        for part in blocks(k, PACKED) {
            for (depth, packed) in blocks(part.len(), DEPTH).zip(packed_b.chunks_exact_mut(of_depth)) {
                let b = b.submatrix(part.start + depth.start, columns.start, depth.len(), columns.len());
                pack_panels(b, packed, WORDS);
            }
            for rows in blocks(m, BLOCK) {
                for (depth, packed_b) in blocks(part.len(), DEPTH).zip(packed_b.chunks_exact(of_depth)) {
                    let words = depth.len().div_ceil(2);
                    let add = add || part.start + depth.start > 0;
                    let a = a.submatrix(rows.start, part.start + depth.start, rows.len(), depth.len());
                    let (a, stride) = if a.col_stride() == 1 && depth.len() == 2 * words {
                        (a.as_ptr(), a.row_stride())
                    } else {
                        pack_rows(a, packed_a, WORDS);
                        (packed_a.as_ptr().cast(), DEPTH as isize)
                    };
                    for (panel, b) in blocks(columns.len(), PANEL).zip(packed_b.chunks_exact(PANEL * WORDS)) {
                        for tile in blocks(rows.len(), ROWS) {
                            let first = (rows.start + tile.start, columns.start + panel.start);
                            let c = c.as_mut().submatrix_mut(first.0, first.1, tile.len(), panel.len());
                            // SAFETY: A has these rows of `words` words, `stride` numbers apart, in its own memory or packed.
                            unsafe {
                                compute(
                                    c,
                                    add,
                                    scale,
                                    words,
                                    a.offset(tile.start as isize * stride),
                                    stride,
                                    b,
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A tile of C.
///
/// # Safety
/// `a` has as many rows as `c`, of `words` words, `stride` numbers apart.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn compute(
    c: MatMut<'_, f32>,
    add: bool,
    scale: f32,
    words: usize,
    a: *const bf16,
    stride: isize,
    b: &[u32],
) {
    assert!(words * PANEL <= b.len() && c.ncols() <= PANEL);
    macro_rules! of_rows {
        ($($rows:literal),*) => {
            match c.nrows() {
                // SAFETY: the caller's promise, and the assertion above.
                $($rows => unsafe { tile::<$rows>(c, add, scale, words, a, stride, b.as_ptr()) },)*
                _ => unreachable!("a tile has at most {ROWS} rows"),
            }
        };
    }
    of_rows!(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12);
}

/// [`compute`] for so many rows.
///
/// # Safety
/// As [`compute`]; `c` has `R` rows and at most [`PANEL`] columns, and `b` is a panel of as many words.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn tile<const R: usize>(
    c: MatMut<'_, f32>,
    add: bool,
    scale: f32,
    words: usize,
    a: *const bf16,
    stride: isize,
    b: *const u32,
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for word in 0..words {
        // SAFETY: the caller's promise.
        unsafe {
            let b = b.add(word * PANEL);
            let b = [_mm512_loadu_si512(b.cast()), _mm512_loadu_si512(b.add(LANES).cast())];
            let b = std::mem::transmute::<[__m512i; 2], [__m512bh; 2]>(b);
            for (row, sums) in sums.iter_mut().enumerate() {
                let a = a.offset(row as isize * stride).add(2 * word).cast::<i32>().read_unaligned();
                let a = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a));
                *sums = [_mm512_dpbf16_ps(sums[0], a, b[0]), _mm512_dpbf16_ps(sums[1], a, b[1])];
            }
        }
    }
    store(c, add, scale, &sums);
}
