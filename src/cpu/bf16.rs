//! GEMMs of `bf16` operands with `f32` results, by the processor's AMX or `AVX512_BF16` where it has one, otherwise through `f32`.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod pack;

use super::matmul::{Accum, MatMut, MatRef, Par, gemm_of_reals, in_parts};
#[cfg(target_arch = "x86_64")]
use super::rows::blocks;
use super::scratch::Scratch;
use crate::parallel;
use crate::real::Element;
use crate::vector::zip1;
use half::bf16;
use std::ops::Range;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

/// Columns of a result that are few: for so many, its other operand is read where it lies.
#[cfg(target_arch = "x86_64")]
const NARROW: usize = 64;

/// `c = scale·a·b` or `c += scale·a·b`.
pub(super) fn gemm(
    c: MatMut<'_, f32>,
    accum: Accum,
    scale: f32,
    a: MatRef<'_, bf16>,
    b: MatRef<'_, bf16>,
    par: Par,
) {
    #[cfg(target_arch = "x86_64")]
    if let Some(unit) = Unit::detect() {
        return by(unit, c, accum, scale, a, b, par);
    }
    through_f32(c, accum, scale, a, b, par);
}

/// What the processor has for `bf16`.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
enum Unit {
    Tiles(amx::Unit),
    Vectors(avx512::Unit),
}

#[cfg(target_arch = "x86_64")]
impl Unit {
    fn detect() -> Option<Self> {
        static UNIT: OnceLock<Option<Unit>> = OnceLock::new();
        *UNIT.get_or_init(|| match amx::Unit::detect() {
            Some(unit) => Some(Self::Tiles(unit)),
            // Processors with AMX do `VDPBF16PS` at half of the rate of FMA in `f32`.
            None if amx::is_there() => None,
            None => avx512::Unit::detect().map(Self::Vectors),
        })
    }

    /// `c = scale·a·b` or `c += scale·a·b` on this thread; rows of `c` are contiguous.
    fn gemm(self, c: MatMut<'_, f32>, add: bool, scale: f32, a: MatRef<'_, bf16>, b: MatRef<'_, bf16>) {
        match self {
            Self::Tiles(unit) => unit.gemm(c, add, scale, a, b),
            Self::Vectors(unit) => unit.gemm(c, add, scale, a, b),
        }
    }
}

/// Whether GEMMs are by AMX, which makes them cheap beside all else.
pub(super) fn has_tiles() -> bool {
    #[cfg(target_arch = "x86_64")]
    return matches!(Unit::detect(), Some(Unit::Tiles(_)));
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The same by the processor's own instructions.
#[cfg(target_arch = "x86_64")]
fn by(
    unit: Unit,
    c: MatMut<'_, f32>,
    accum: Accum,
    scale: f32,
    a: MatRef<'_, bf16>,
    b: MatRef<'_, bf16>,
    par: Par,
) {
    let parts = par.degree().min(c.nrows().max(c.ncols()));
    let add = matches!(accum, Accum::Add);
    in_parts((c, a, b), parts, |(mut c, a, b)| {
        // Rows of `c` are written: a column-major result is the transpose of one.
        if c.col_stride() == 1 {
            unit.gemm(c, add, scale, a, b);
        } else if c.ncols() > NARROW || a.col_stride() != 1 {
            unit.gemm(c.transpose_mut(), add, scale, b.transpose(), a.transpose());
        } else {
            // Of few columns: it is cheaper to transpose it than to pack all of `a` as a right operand.
            let (rows, columns) = (c.nrows(), c.ncols());
            let mut scratch = Scratch::take();
            let sums = scratch.get(rows * columns);
            unit.gemm(MatMut::from_row_major_slice_mut(sums, rows, columns), false, scale, a, b);
            for (column, c) in c.as_mut().col_iter_mut().enumerate() {
                let c = c.try_as_col_major_mut().expect("columns are contiguous").as_slice_mut();
                for (c, row) in c.iter_mut().zip(sums.chunks_exact(columns)) {
                    *c = row[column] + if add { *c } else { 0.0 };
                }
            }
        }
    });
}

/// The same by a GEMM in `f32`.
fn through_f32(
    c: MatMut<'_, f32>,
    accum: Accum,
    scale: f32,
    a: MatRef<'_, bf16>,
    b: MatRef<'_, bf16>,
    par: Par,
) {
    let mut memory = <[Memory; 2]>::default();
    let [a_memory, b_memory] = &mut memory;
    gemm_of_reals(c, accum, scale, reals(a, a_memory, par), reals(b, b_memory, par), par);
}

/// The same matrix in `f32`, rows or columns of which are contiguous.
fn reals<'m>(matrix: MatRef<'_, bf16>, memory: &'m mut Memory, par: Par) -> MatRef<'m, f32> {
    if matrix.col_stride() != 1 {
        return reals(matrix.transpose(), memory, par).transpose();
    }
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    let memory = memory.reals.get(rows * columns);
    let size = if matches!(par, Par::Seq) { rows } else { parallel::rows(columns) };
    parallel::for_each(memory.chunks_mut(size * columns).enumerate(), |(i, out)| {
        for (row, out) in (i * size..).zip(out.chunks_exact_mut(columns)) {
            let row = matrix.row(row).try_as_row_major().expect("rows are contiguous");
            zip1(out, row.as_slice(), |out, value| *out = value.to_real());
        }
    });
    MatRef::from_row_major_slice(memory, rows, columns)
}

/// Memory of a prepared operand.
pub struct Memory {
    #[cfg(target_arch = "x86_64")]
    words: Scratch<u32>,
    reals: Scratch<f32>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            words: Scratch::take(),
            reals: Scratch::take(),
        }
    }
}

/// The left operand of several GEMMs, as they take it.
#[derive(Clone, Copy)]
pub enum Left<'a> {
    /// Where it lies: vectors have parts of it in their caches.
    Plain(MatRef<'a, bf16>),
    /// Of processors that have nothing for `bf16`.
    Reals(MatRef<'a, f32>),
    /// Packed for tiles.
    #[cfg(target_arch = "x86_64")]
    Tiles(amx::Unit, amx::Left<'a>),
}

/// The right operand of several GEMMs, as they take it.
#[derive(Clone, Copy)]
pub enum Right<'a> {
    /// As in [`Left`].
    Plain(MatRef<'a, bf16>),
    /// As in [`Left`].
    Reals(MatRef<'a, f32>),
    /// As in [`Left`].
    #[cfg(target_arch = "x86_64")]
    Tiles(amx::Right<'a>),
}

/// Prepares a left operand, whose rows or columns are contiguous.
pub(super) fn left<'a>(a: MatRef<'a, bf16>, memory: &'a mut Memory) -> Left<'a> {
    #[cfg(target_arch = "x86_64")]
    match Unit::detect() {
        Some(Unit::Tiles(unit)) => return Left::Tiles(unit, unit.left(a, &mut memory.words)),
        Some(Unit::Vectors(_)) => return Left::Plain(a),
        None => {}
    }
    Left::Reals(reals(a, memory, Par::Seq))
}

/// Prepares a right operand, whose rows or columns are contiguous.
pub(super) fn right<'a>(b: MatRef<'a, bf16>, memory: &'a mut Memory, par: Par) -> Right<'a> {
    #[cfg(target_arch = "x86_64")]
    match Unit::detect() {
        Some(Unit::Tiles(unit)) => return Right::Tiles(unit.right(b, &mut memory.words, par)),
        Some(Unit::Vectors(_)) => return Right::Plain(b),
        None => {}
    }
    Right::Reals(reals(b, memory, par))
}

/// `c = left·right[:, columns]`, or `c += …`; rows of `c` are contiguous, and columns begin at a multiple of 32.
pub(super) fn product(
    c: MatMut<'_, f32>,
    accum: Accum,
    left: Left<'_>,
    right: Right<'_>,
    columns: Range<usize>,
    par: Par,
) {
    match (left, right) {
        (Left::Plain(a), Right::Plain(b)) => {
            gemm(c, accum, 1.0, a, b.subcols(columns.start, columns.len()), par);
        }
        (Left::Reals(a), Right::Reals(b)) => {
            gemm_of_reals(c, accum, 1.0, a, b.subcols(columns.start, columns.len()), par);
        }
        #[cfg(target_arch = "x86_64")]
        (Left::Tiles(unit, a), Right::Tiles(b)) => {
            let add = matches!(accum, Accum::Add);
            let size = columns.len().div_ceil(par.degree()).next_multiple_of(pack::PANEL);
            let mut rest = Some(c);
            let parts = blocks(columns.len(), size).map(|part| {
                let (c, after) = rest.take().expect("put back").split_at_col_mut(part.len());
                rest = Some(after);
                (c, columns.start + part.start..columns.start + part.end)
            });
            parallel::for_each(parts, |(c, columns)| unit.multiply(c, add, a, b.columns(columns)));
        }
        _ => unreachable!("both are prepared for the same processor"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: usize) -> Vec<bf16> {
        (0..len).map(|i| bf16::from_f32(((i * 37 + seed * 101) % 211) as f32 / 105.0 - 1.0)).collect()
    }

    /// `[rows, columns]` inside a larger matrix, in both layouts.
    fn layouts(memory: &[bf16], rows: usize, columns: usize) -> [MatRef<'_, bf16>; 2] {
        let len = (rows + 3) * (columns + 3);
        let wide = MatRef::from_row_major_slice(&memory[..len], rows + 3, columns + 3);
        let tall = MatRef::from_column_major_slice(&memory[..len], rows + 3, columns + 3);
        [wide, tall].map(|matrix| matrix.submatrix(1, 2, rows, columns))
    }

    type Gemm = fn(MatMut<'_, f32>, Accum, f32, MatRef<'_, bf16>, MatRef<'_, bf16>, Par);

    /// By vectors alone, which AMX otherwise goes before.
    #[cfg(target_arch = "x86_64")]
    const BY_VECTORS: Gemm = |c, accum, scale, a, b, par| match avx512::Unit::detect() {
        Some(unit) => by(Unit::Vectors(unit), c, accum, scale, a, b, par),
        None => {
            println!("skipped: vectors alone, which this processor has not for bf16");
            through_f32(c, accum, scale, a, b, par);
        }
    };
    #[cfg(not(target_arch = "x86_64"))]
    const BY_VECTORS: Gemm = through_f32;

    /// By prepared operands, in two parts of the columns: the product twice, once into what is there, and half of it.
    const PREPARED: Gemm = |mut c, accum, scale, a, b, par| {
        let mut memory = <[Memory; 2]>::default();
        let [a_memory, b_memory] = &mut memory;
        let (a, b) = (left(a, a_memory), right(b, b_memory, par));
        let (rows, columns) = (c.nrows(), c.ncols());
        let middle = columns / 2 / 32 * 32;
        for part in [0..middle, middle..columns].into_iter().filter(|part| !part.is_empty()) {
            let mut scratch = Scratch::take();
            let sums = scratch.get(rows * part.len());
            for accum in [Accum::Replace, Accum::Add] {
                let sums = MatMut::from_row_major_slice_mut(sums, rows, part.len());
                product(sums, accum, a, b, part.clone(), par);
            }
            let sums = MatRef::from_row_major_slice(sums, rows, part.len());
            for (i, j) in part.enumerate().flat_map(|(at, j)| (0..rows).map(move |i| ((i, at), j))) {
                let before = if matches!(accum, Accum::Add) { c[(i.0, j)] } else { 0.0 };
                c[(i.0, j)] = before + 0.5 * scale * sums[i];
            }
        }
    };

    /// Every way to compute gives the sums of the definition, in all layouts, at sizes around those of tiles, panels and blocks.
    #[test]
    fn gemms_are_those_of_the_definition() {
        let sizes = [
            (1, 1, 1),
            (3, 33, 2),
            (12, 32, 16),
            (13, 31, 17),
            (25, 65, 31),
            (130, 40, 513),
            (2, 530, 259),
            (40, 1, 7),
            // Rows that begin as lines of a cache do, and end within a panel.
            (70, 48, 40),
            // Whole tiles that wait, for more of the reduction than goes through the caches at a time.
            (64, 96, 2100),
            // More of the reduction, and in each of three parts more rows, than are packed at a time.
            (5, 70, 2100),
            (3200, 2, 2048),
        ];
        for (m, n, k) in sizes {
            let (a_memory, b_memory) = (values((m + 3) * (k + 3), 1), values((k + 3) * (n + 3), 2));
            for (a, b) in
                layouts(&a_memory, m, k).into_iter().flat_map(|a| layouts(&b_memory, k, n).map(|b| (a, b)))
            {
                for (gemm, accum, c_by_rows) in [gemm as Gemm, BY_VECTORS, PREPARED, through_f32]
                    .into_iter()
                    .flat_map(|gemm| [(gemm, Accum::Replace, true), (gemm, Accum::Add, false)])
                {
                    check(gemm, accum, c_by_rows, a, b);
                }
            }
        }
    }

    /// Where a result lies, and how it is cut into parts, changes no bit of it.
    #[test]
    fn bits_are_the_same_wherever_they_lie() {
        let (m, n, k) = (70, 96, 2100);
        let (a, b) = (values(m * k, 1), values(k * n, 2));
        let (a, b) = (MatRef::from_row_major_slice(&a, m, k), MatRef::from_row_major_slice(&b, k, n));
        let mut memory = <[Memory; 2]>::default();
        let [a_memory, b_memory] = &mut memory;
        let (a, b) = (left(a, a_memory), right(b, b_memory, Par::rayon(3)));
        let mut scratch = Scratch::take();
        let mut sums = |offset: usize, middle: usize| {
            let mut all = vec![0.0; m * n];
            for columns in [0..middle, middle..n].into_iter().filter(|columns| !columns.is_empty()) {
                let tile = scratch.get(m * columns.len() + offset);
                for accum in [Accum::Replace, Accum::Add] {
                    let tile = MatMut::from_row_major_slice_mut(&mut tile[offset..], m, columns.len());
                    product(tile, accum, a, b, columns.clone(), Par::Seq);
                }
                for (all, tile) in all.chunks_exact_mut(n).zip(tile[offset..].chunks_exact(columns.len())) {
                    all[columns.clone()].copy_from_slice(tile);
                }
            }
            all
        };
        let want = sums(0, 0);
        assert_eq!(sums(1, 0), want);
        assert_eq!(sums(0, 32), want);
    }

    fn check(gemm: Gemm, accum: Accum, c_by_rows: bool, a: MatRef<'_, bf16>, b: MatRef<'_, bf16>) {
        let (m, n, k) = (a.nrows(), b.ncols(), a.ncols());
        // What lies around C stays what it is.
        let mut memory = vec![3.0; (m + 2) * (n + 2)];
        let c = match c_by_rows {
            true => MatMut::from_row_major_slice_mut(&mut memory, m + 2, n + 2),
            false => MatMut::from_column_major_slice_mut(&mut memory, m + 2, n + 2),
        };
        gemm(c.submatrix_mut(1, 1, m, n), accum, 0.5, a, b, Par::rayon(3));
        for (at, got) in memory.into_iter().enumerate() {
            let (i, j) = if c_by_rows { (at / (n + 2), at % (n + 2)) } else { (at % (m + 2), at / (m + 2)) };
            let mut want = 3.0;
            if (1..=m).contains(&i) && (1..=n).contains(&j) {
                let term = |l| a[(i - 1, l)].to_f64() * b[(l, j - 1)].to_f64();
                let sum = 0.5 * (0..k).map(term).sum::<f64>();
                want = if matches!(accum, Accum::Add) { want + sum } else { sum };
            }
            assert!(
                (f64::from(got) - want).abs() < 1e-6 * k as f64 + 1e-5,
                "{m} {n} {k} at {i}, {j}: {got}, not {want}"
            );
        }
    }

    /// As [`half`] rounds: to the nearest, of two the even one, and NaN stays NaN.
    #[test]
    fn numbers_are_rounded_to_the_nearest() {
        let numbers = (0..=u16::MAX).flat_map(|high| {
            [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF].map(|low| f32::from_bits(u32::from(high) << 16 | low))
        });
        for number in numbers {
            let (got, want) = (bf16::from_real(number), bf16::from_f32(number));
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{number:e}");
            assert_eq!(got.is_nan(), number.is_nan());
        }
    }
}
