//! Operands as vectors and tiles take them, and sums where they belong.
//!
//! Operands are words of two neighbours along the reduction.

use super::super::matmul::{MatMut, MatRef};
use half::bf16;
use std::arch::x86_64::*;
use std::array::from_fn;

/// 32-bit words in a vector.
pub(super) const LANES: usize = 16;
/// Columns of a panel of B, and of a tile of C: two vectors.
pub(super) const PANEL: usize = 32;

/// The mask of the first `count` of 16 or 32 numbers.
pub(super) fn first(count: usize) -> u32 {
    if count >= 32 { u32::MAX } else { (1 << count) - 1 }
}

/// Packs `[depth, columns]` of B in panels of `stride` words: word by word of the reduction, [`PANEL`] columns of each, zeros where there
/// are none, up to a multiple of [`LANES`] words.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn pack_panels(b: MatRef<'_, bf16>, out: &mut [u32], stride: usize) {
    let (depth, columns) = (b.nrows(), b.ncols());
    let words = depth.div_ceil(2).next_multiple_of(LANES);
    assert!(words <= stride && columns.div_ceil(PANEL) * PANEL * stride <= out.len());
    if b.col_stride() == 1 {
        /// Words ahead of which rows are fetched, which lie far apart: no processor guesses where the next one is.
        const AHEAD: usize = 8;
        // Numbers 0…31 are those of the even row, 32…63 of the odd one.
        let order: [i16; 4 * LANES] = from_fn(|i| (i / 2 + i % 2 * 32) as i16);
        // SAFETY: an array of two vectors.
        let (low, high) = unsafe {
            (
                _mm512_loadu_si512(order.as_ptr().cast()),
                _mm512_loadu_si512(order[2 * LANES..].as_ptr().cast()),
            )
        };
        // All panels of a row, whose numbers are neighbours, before the next row.
        for word in 0..words {
            for (panel, out) in (0..columns).step_by(PANEL).zip(out.chunks_exact_mut(PANEL * stride)) {
                let mask = first(columns - panel);
                let row = |row: usize| match row < depth {
                    // SAFETY: only the numbers of this row are loaded; nothing is read of what is fetched.
                    true => unsafe {
                        let from = b.submatrix(row, panel, 1, 1).as_ptr();
                        let ahead = from.wrapping_offset(2 * AHEAD as isize * b.row_stride());
                        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                        _mm512_maskz_loadu_epi16(mask, from.cast())
                    },
                    false => _mm512_setzero_si512(),
                };
                let (even, odd) = (row(2 * word), row(2 * word + 1));
                let out = &mut out[word * PANEL..][..PANEL];
                // SAFETY: `out` has room for two vectors.
                unsafe {
                    _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutex2var_epi16(even, low, odd));
                    _mm512_storeu_si512(
                        out[LANES..].as_mut_ptr().cast(),
                        _mm512_permutex2var_epi16(even, high, odd),
                    );
                }
            }
        }
        return;
    }
    assert!(b.row_stride() == 1, "rows or columns are contiguous");
    for (panel, out) in (0..columns).step_by(PANEL).zip(out.chunks_exact_mut(PANEL * stride)) {
        for half in 0..PANEL / LANES {
            for word in (0..words).step_by(LANES) {
                let mask = first(depth - 2 * word);
                let mut block = [_mm512_setzero_si512(); LANES];
                for (column, words) in (panel + half * LANES..columns).zip(&mut block) {
                    let from = b.submatrix(2 * word, column, 1, 1).as_ptr();
                    // SAFETY: only the numbers of this column are loaded.
                    *words = unsafe { _mm512_maskz_loadu_epi16(mask, from.cast()) };
                }
                transpose(&mut block);
                let rows = out[word * PANEL..].chunks_exact_mut(PANEL).take(words - word);
                for (out, words) in rows.zip(block) {
                    let out: &mut [u32] = &mut out[half * LANES..][..LANES];
                    // SAFETY: room for a vector.
                    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), words) };
                }
            }
        }
    }
}

/// Packs rows `[rows, depth]` of A: `stride` words each, of which those up to a multiple of [`LANES`] are zeros where there are none.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn pack_rows(a: MatRef<'_, bf16>, out: &mut [u32], stride: usize) {
    let (rows, depth) = (a.nrows(), a.ncols());
    let words = depth.div_ceil(2);
    assert!(words <= stride && rows.next_multiple_of(LANES) * stride <= out.len());
    if a.col_stride() == 1 {
        for (row, out) in out.chunks_exact_mut(stride).take(rows).enumerate() {
            for (word, out) in (0..words).step_by(LANES).zip(out.chunks_exact_mut(LANES)) {
                let from = a.submatrix(row, 2 * word, 1, 1).as_ptr();
                // SAFETY: only the numbers of this row are loaded; room for a vector.
                unsafe {
                    let words = _mm512_maskz_loadu_epi16(first(depth - 2 * word), from.cast());
                    _mm512_storeu_si512(out.as_mut_ptr().cast(), words);
                }
            }
        }
        return;
    }
    assert!(a.row_stride() == 1, "rows or columns are contiguous");
    for (row, out) in (0..rows).step_by(LANES).zip(out.chunks_exact_mut(LANES * stride)) {
        let mask = first((rows - row).min(LANES)) as u16;
        let column = |column: usize| match column < depth {
            // SAFETY: only the numbers of this column are loaded.
            true => unsafe {
                let from = a.submatrix(row, column, 1, 1).as_ptr();
                _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from.cast()))
            },
            false => _mm512_setzero_si512(),
        };
        for word in (0..words).step_by(LANES) {
            let mut block = [_mm512_setzero_si512(); LANES];
            for (word, words) in (word..).zip(&mut block) {
                *words = _mm512_or_si512(column(2 * word), _mm512_slli_epi32::<16>(column(2 * word + 1)));
            }
            transpose(&mut block);
            for (out, words) in out.chunks_exact_mut(stride).zip(block) {
                let out: &mut [u32] = &mut out[word..][..LANES];
                // SAFETY: room for a vector.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), words) };
            }
        }
    }
}

/// Transposes 16 × 16 words.
// Loops instead of `from_fn`, whose own code is compiled without the instructions.
#[target_feature(enable = "avx512f")]
fn transpose(rows: &mut [__m512i; LANES]) {
    // Neighbouring rows' words alternate in each quarter of a vector, of words 0 and 1 or 2 and 3.
    for rows in rows.chunks_exact_mut(2) {
        let (a, b) = (rows[0], rows[1]);
        (rows[0], rows[1]) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
    // Vector 4·g + w has word w of each quarter, of rows 4·g to 4·g + 3.
    for rows in rows.chunks_exact_mut(4) {
        let [a, b, c, d] = [rows[0], rows[1], rows[2], rows[3]];
        (rows[0], rows[1]) = (_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c));
        (rows[2], rows[3]) = (_mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d));
    }
    // Vector 8·h + 4·o + w has quarters o and o + 2 of vectors 8·h + w and 8·h + 4 + w.
    for rows in rows.chunks_exact_mut(8) {
        for w in 0..4 {
            let (a, b) = (rows[w], rows[w + 4]);
            (rows[w], rows[w + 4]) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xDD>(a, b));
        }
    }
    // Vector 4·q + w has quarter q of the vectors of word w.
    for w in 0..8 {
        let (a, b) = (rows[w], rows[w + 8]);
        (rows[w], rows[w + 8]) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xDD>(a, b));
    }
}

/// `c = scale·sums` or `c += scale·sums`, as far as `c` has rows and columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn store(c: MatMut<'_, f32>, add: bool, scale: f32, sums: &[[__m512; 2]]) {
    let (rows, columns, c_stride) = (c.nrows(), c.ncols(), c.row_stride());
    let (scale, c) = (_mm512_set1_ps(scale), c.as_ptr_mut());
    for (row, sums) in sums.iter().take(rows).enumerate() {
        for (half, &sum) in sums.iter().enumerate() {
            let mask = (first(columns) >> (half * LANES)) as u16;
            // SAFETY: only elements of this row of `c` are read and written.
            unsafe {
                let at = c.offset(row as isize * c_stride).wrapping_add(half * LANES);
                let before = if add { _mm512_maskz_loadu_ps(mask, at) } else { _mm512_setzero_ps() };
                _mm512_mask_storeu_ps(at, mask, _mm512_fmadd_ps(sum, scale, before));
            }
        }
    }
}
