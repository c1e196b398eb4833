//! GEMMs of `bf16` operands with `f32` results, by the processor's AMX or `AVX512_BF16` where it has one, otherwise through `f32`.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod pack;

use super::matmul::{Accum, MatMut, MatRef, Par, gemm_of_reals, in_parts};
use crate::real::Element;
use crate::vector::zip1;
use half::bf16;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

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
    // Rows of `c` are written: a column-major result is the transpose of one.
    let (c, a, b) =
        if c.col_stride() == 1 { (c, a, b) } else { (c.transpose_mut(), b.transpose(), a.transpose()) };
    let parts = par.degree().min(c.nrows().max(c.ncols()));
    let add = matches!(accum, Accum::Add);
    in_parts((c, a, b), parts, |(c, a, b)| match unit {
        Unit::Tiles(unit) => unit.gemm(c, add, scale, a, b),
        Unit::Vectors(unit) => unit.gemm(c, add, scale, a, b),
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
    let mut memory = [const { Vec::new() }; 2];
    let [a_memory, b_memory] = &mut memory;
    gemm_of_reals(c, accum, scale, reals(a, a_memory), reals(b, b_memory), par);
}

/// The same matrix in `f32`, rows or columns of which are contiguous.
fn reals<'m>(matrix: MatRef<'_, bf16>, memory: &'m mut Vec<f32>) -> MatRef<'m, f32> {
    if matrix.col_stride() != 1 {
        return reals(matrix.transpose(), memory).transpose();
    }
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    memory.resize(rows * columns, 0.0);
    for (i, out) in memory.chunks_exact_mut(columns).enumerate() {
        let row = matrix.row(i).try_as_row_major().expect("rows are contiguous");
        zip1(out, row.as_slice(), |out, value| *out = value.to_real());
    }
    MatRef::from_row_major_slice(memory, rows, columns)
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
            // More of the reduction, and in each of three parts more rows, than are packed at a time.
            (5, 70, 2100),
            (3200, 2, 2048),
        ];
        for (m, n, k) in sizes {
            let (a_memory, b_memory) = (values((m + 3) * (k + 3), 1), values((k + 3) * (n + 3), 2));
            for (a, b) in
                layouts(&a_memory, m, k).into_iter().flat_map(|a| layouts(&b_memory, k, n).map(|b| (a, b)))
            {
                for (gemm, accum, c_by_rows) in [gemm as Gemm, BY_VECTORS, through_f32]
                    .into_iter()
                    .flat_map(|gemm| [(gemm, Accum::Replace, true), (gemm, Accum::Add, false)])
                {
                    check(gemm, accum, c_by_rows, a, b);
                }
            }
        }
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
