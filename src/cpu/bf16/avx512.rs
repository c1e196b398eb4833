//! GEMMs of `bf16` by `VDPBF16PS`, or by AMX where there is that, on one thread.
//!
//! Both multiply pairs of neighbours along the reduction and add both products to an `f32`, `VDPBF16PS` with twice the operations
//! of an FMA. So operands are words of two neighbours.
//!
//! * *B* is packed in panels of [`PANEL`] columns, word by word, for [`DEPTH`] of the reduction; a panel stays in the L1 cache.
//! * *A* is read where it lies if its rows are contiguous (by AMX: and fill tiles), otherwise it is packed by rows; a word is broadcast
//!   to a vector.
//! * *C* is computed in tiles of [`ROWS`] rows and [`PANEL`] columns, which take 24 of 32 registers; by AMX in those of [`amx`].

use super::super::matmul::{MatMut, MatRef};
use super::super::rows::blocks;
use super::super::scratch::Scratch;
use super::amx::{self, Amx, Registers, Support};
use half::bf16;
use std::arch::x86_64::*;
use std::array::from_fn;

/// Rows of a tile.
const ROWS: usize = 12;
/// Columns of a tile and of a panel of B: two vectors.
pub(super) const PANEL: usize = 32;
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
/// The same by AMX: 64 KiB.
const AMX_BLOCK: usize = 4 * amx::ROWS;
/// 32-bit words in a vector.
pub(super) const LANES: usize = 16;

/// That the processor has the instructions.
#[derive(Clone, Copy)]
pub(super) struct Unit {
    pub(super) amx: Option<Amx>,
}

impl Unit {
    pub(super) fn detect() -> Option<Self> {
        let has_all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        let amx = match Support::detect() {
            Support::Absent => None,
            Support::Usable(amx) => Some(amx),
            // Processors with AMX do `VDPBF16PS` at half of the rate of FMA in `f32`.
            Support::Refused => return None,
        };
        has_all.then_some(Self { amx })
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
        unsafe { gemm(self.amx.map(Amx::registers), c, add, scale, a, b) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn gemm(
    registers: Option<Registers>,
    mut c: MatMut<'_, f32>,
    add: bool,
    scale: f32,
    a: MatRef<'_, bf16>,
    b: MatRef<'_, bf16>,
) {
    // Rows of a tile and of a block, and by how many words operands are read.
    let (tile_rows, block, step) = match registers {
        Some(_) => (amx::ROWS, AMX_BLOCK, LANES),
        None => (ROWS, BLOCK, 1),
    };
    let (m, n, k) = (c.nrows(), c.ncols(), a.ncols());
    assert!(a.nrows() == m && b.nrows() == k && b.ncols() == n, "shapes agree");
    assert!(c.col_stride() == 1, "rows of c are contiguous");
    let of_b = n.min(COLUMNS).next_multiple_of(PANEL) * k.min(PACKED).next_multiple_of(DEPTH) / 2;
    let of_a = m.min(block).next_multiple_of(amx::ROWS) * WORDS;
    let mut scratch = Scratch::<u32>::take();
    let memory = scratch.get(of_b + of_a + LANES);
    // A load that crosses a cache line takes twice as long.
    let aligned = memory.as_ptr().align_offset(align_of::<__m512i>()).min(LANES);
    let (packed_b, packed_a) = memory[aligned..].split_at_mut(of_b);
    for columns in blocks(n, COLUMNS) {
        let of_depth = columns.len().next_multiple_of(PANEL) * WORDS;
        for part in blocks(k, PACKED) {
            for (depth, packed) in blocks(part.len(), DEPTH).zip(packed_b.chunks_exact_mut(of_depth)) {
                let b = b.submatrix(part.start + depth.start, columns.start, depth.len(), columns.len());
                for (panel, packed) in
                    blocks(columns.len(), PANEL).zip(packed.chunks_exact_mut(PANEL * WORDS))
                {
                    pack_panel(b.subcols(panel.start, panel.len()), packed);
                }
            }
            for rows in blocks(m, block) {
                for (depth, packed_b) in blocks(part.len(), DEPTH).zip(packed_b.chunks_exact(of_depth)) {
                    let words = depth.len().div_ceil(2).next_multiple_of(step);
                    let add = add || part.start + depth.start > 0;
                    let a = a.submatrix(rows.start, part.start + depth.start, rows.len(), depth.len());
                    // AMX reads all rows of a tile.
                    let has_all = depth.len() == 2 * words
                        && (registers.is_none() || rows.len().is_multiple_of(tile_rows));
                    let (a, stride) = if a.col_stride() == 1 && has_all {
                        (a.as_ptr(), a.row_stride())
                    } else {
                        pack_rows(a, packed_a);
                        (packed_a.as_ptr().cast(), DEPTH as isize)
                    };
                    for (panel, b) in blocks(columns.len(), PANEL).zip(packed_b.chunks_exact(PANEL * WORDS)) {
                        for tile in blocks(rows.len(), tile_rows) {
                            let first = (rows.start + tile.start, columns.start + panel.start);
                            let c = c.as_mut().submatrix_mut(first.0, first.1, tile.len(), panel.len());
                            // SAFETY: A has these rows of `words` words, `stride` numbers apart, in its own memory or packed,
                            // where there is room for all rows of a tile.
                            unsafe {
                                let a = a.offset(tile.start as isize * stride);
                                match &registers {
                                    Some(registers) => {
                                        by_amx(registers, c, (add, scale), words, a, stride, b)
                                    }
                                    None => compute(c, add, scale, words, a, stride, b),
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The mask of the first `count` of 16 or 32 numbers.
fn first(count: usize) -> u32 {
    if count >= 32 { u32::MAX } else { (1 << count) - 1 }
}

/// Packs a panel `[depth, columns]` of B: word by word of the reduction, [`PANEL`] columns of each, zeros where there are none, up to
/// a multiple of [`LANES`] words.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn pack_panel(b: MatRef<'_, bf16>, out: &mut [u32]) {
    let (depth, columns) = (b.nrows(), b.ncols());
    let words = depth.div_ceil(2).next_multiple_of(LANES);
    assert!(columns <= PANEL && words * PANEL <= out.len());
    if b.col_stride() == 1 {
        // Numbers 0…31 are those of the even row, 32…63 of the odd one.
        let order: [i16; 4 * LANES] = from_fn(|i| (i / 2 + i % 2 * 32) as i16);
        // SAFETY: an array of two vectors.
        let (low, high) = unsafe {
            (
                _mm512_loadu_si512(order.as_ptr().cast()),
                _mm512_loadu_si512(order[2 * LANES..].as_ptr().cast()),
            )
        };
        let mask = first(columns);
        for (word, out) in out.chunks_exact_mut(PANEL).take(words).enumerate() {
            let row = |row: usize| match row < depth {
                // SAFETY: only the numbers of this row are loaded.
                true => unsafe { _mm512_maskz_loadu_epi16(mask, b.subrows(row, 1).as_ptr().cast()) },
                false => _mm512_setzero_si512(),
            };
            let (even, odd) = (row(2 * word), row(2 * word + 1));
            // SAFETY: `out` has room for two vectors.
            unsafe {
                _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutex2var_epi16(even, low, odd));
                _mm512_storeu_si512(
                    out[LANES..].as_mut_ptr().cast(),
                    _mm512_permutex2var_epi16(even, high, odd),
                );
            }
        }
        return;
    }
    assert!(b.row_stride() == 1, "rows or columns are contiguous");
    for half in 0..PANEL / LANES {
        for word in (0..words).step_by(LANES) {
            let mask = first(depth - 2 * word);
            let mut block = [_mm512_setzero_si512(); LANES];
            for (column, words) in (half * LANES..columns).zip(&mut block) {
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

/// Packs rows `[rows, depth]` of A: [`WORDS`] words each, of which those up to a multiple of [`LANES`] are zeros where there are none.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn pack_rows(a: MatRef<'_, bf16>, out: &mut [u32]) {
    let (rows, depth) = (a.nrows(), a.ncols());
    let words = depth.div_ceil(2);
    assert!(words <= WORDS && rows.next_multiple_of(LANES) * WORDS <= out.len());
    if a.col_stride() == 1 {
        for (row, out) in out.chunks_exact_mut(WORDS).take(rows).enumerate() {
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
    for (row, out) in (0..rows).step_by(LANES).zip(out.chunks_exact_mut(LANES * WORDS)) {
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
            for (out, words) in out.chunks_exact_mut(WORDS).zip(block) {
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

/// A tile of C by AMX, as [`compute`]; `add` and `scale` are a pair.
///
/// # Safety
/// `a` has [`amx::ROWS`] rows of `words` words, `stride` numbers apart; `words` is a multiple of [`LANES`] and not 0.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn by_amx(
    registers: &Registers,
    c: MatMut<'_, f32>,
    (add, scale): (bool, f32),
    words: usize,
    a: *const bf16,
    stride: isize,
    b: &[u32],
) {
    assert!(words * PANEL <= b.len() && c.nrows() <= amx::ROWS && c.ncols() <= PANEL);
    let mut tile = amx::Tile([[0.0; PANEL]; amx::ROWS]);
    // SAFETY: the caller's promise, and the assertion.
    unsafe { registers.multiply(&mut tile, words / LANES, a, stride, b.as_ptr()) };
    // SAFETY: two vectors are as many numbers as a row, and any bits are some; a tile is aligned to vectors.
    let sums = unsafe { &*(&raw const tile.0).cast::<[[__m512; 2]; amx::ROWS]>() };
    store(c, add, scale, sums);
}

/// `c = scale·sums` or `c += scale·sums`, as far as `c` has rows and columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn store(c: MatMut<'_, f32>, add: bool, scale: f32, sums: &[[__m512; 2]]) {
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
