//! An exponential and a logarithm that the compiler vectorises, with the same bits on every processor.

use std::f64::consts::{LN_2, LOG2_E, SQRT_2};

/// `e^r = 1 + r + r²·Q(r)` for `|r| ≤ ½·ln 2`; minimax, relative error below 1.9e-17 with these coefficients in exact
/// arithmetic.
const EXP_Q: [f64; 10] = [
    f64::from_bits(0x3fe0_0000_0000_000a),
    f64::from_bits(0x3fc5_5555_5555_5503),
    f64::from_bits(0x3fa5_5555_5555_0609),
    f64::from_bits(0x3f81_1111_1112_4f41),
    f64::from_bits(0x3f56_c16c_184b_2b48),
    f64::from_bits(0x3f2a_01a0_1382_00eb),
    f64::from_bits(0x3efa_0199_88da_9532),
    f64::from_bits(0x3ec7_1df1_ec34_e8dc),
    f64::from_bits(0x3e92_8af0_d26f_9c6e),
    f64::from_bits(0x3e5a_d51e_df75_f2d6),
];
/// ln 2 in two parts. The first has 42 bits, so that its multiples of up to 11 bits are exact.
const LN2_HI: f64 = f64::from_bits(0x3fe6_2e42_fefa_3800);
const LN2_LO: f64 = f64::from_bits(0x3d2e_f357_93c7_6730);
/// Added to a number below 2⁵¹ in magnitude, it leaves the nearest integer in the low bits of the sum.
const TO_INTEGER: f64 = 1.5 * (1u64 << 52) as f64;
/// From here down results may be subnormal: their powers of two take two steps.
const SMALL: f64 = -700.0;
/// 2⁻⁶⁴.
const TWO_M64: f64 = f64::from_bits(0x3bf0_0000_0000_0000);
/// From here down results are zero.
const LEAST: f64 = -746.0;

/// `e^x` for `x ≤ 0`, within one unit in the last place; NaN for NaN.
///
/// Without branches, and of operations that IEEE 754 rounds in exactly one way.
#[inline(always)]
pub(super) fn exp(x: f64) -> f64 {
    // In this form, NaN stays.
    let x = if x < LEAST { LEAST } else { x };
    // x = k·ln 2 + r.
    let shifted = x.mul_add(LOG2_E, TO_INTEGER);
    let k = shifted - TO_INTEGER;
    let r = k.mul_add(-LN2_LO, k.mul_add(-LN2_HI, x));
    let power = small_exp_m1(r) + 1.0;
    // 2ᵏ, or 2ᵏ⁺⁶⁴ and 2⁻⁶⁴.
    let (shifted, rest) = if x < SMALL { (shifted + 64.0, TWO_M64) } else { (shifted, 1.0) };
    let scale = f64::from_bits((shifted.to_bits() << 52).wrapping_add(1.0f64.to_bits()));
    power * scale * rest
}

/// `Q(x)`.
#[inline(always)]
fn exp_q(x: f64) -> f64 {
    let mut q = EXP_Q[EXP_Q.len() - 1];
    for &c in EXP_Q[..EXP_Q.len() - 1].iter().rev() {
        q = q.mul_add(x, c);
    }
    q
}

/// `e^x − 1` where `|x| ≤` [`SMALL_EXPONENT`]: no digits are lost near 0.
#[inline(always)]
pub(super) fn small_exp_m1(x: f64) -> f64 {
    (x * x).mul_add(exp_q(x), x)
}

/// `e^x − 1 − x` there.
#[inline(always)]
pub(super) fn small_exp_m1_m_x(x: f64) -> f64 {
    x * x * exp_q(x)
}

/// Where the polynomial needs no reduction: ½·ln 2, rounded down.
pub(super) const SMALL_EXPONENT: f64 = 0.3465;

/// `log((1 + z)/(1 − z)) = 2z + z·w·P(w)` with `w = z²`, for `|z| ≤ 3 − 2√2`; minimax, relative error below 1.9e-18 with these
/// coefficients in exact arithmetic.
const LOG_P: [f64; 7] = [
    f64::from_bits(0x3fe5_5555_5555_5592),
    f64::from_bits(0x3fd9_9999_9997_fdb4),
    f64::from_bits(0x3fd2_4924_941f_15c9),
    f64::from_bits(0x3fcc_71c5_2093_0c52),
    f64::from_bits(0x3fc7_4663_ef11_4069),
    f64::from_bits(0x3fc3_9a1b_9e4e_6d1e),
    f64::from_bits(0x3fc2_f056_b536_1721),
];

/// `log(1 + x)` for `0 ≤ x ≤ 1`, within two units in the last place; NaN for NaN. Like [`exp`] in all else.
#[inline(always)]
pub(super) fn ln_1p(x: f64) -> f64 {
    // 1 + x = 1 + f or 2·(1 + f), with 1 + f between ½·√2 and √2.
    let is_above = x > SQRT_2 - 1.0;
    let f = if is_above { 0.5 * (x - 1.0) } else { x };
    // log(1 + f) = 2z + z·w·P = f − z·(f − w·P), as 2z = f − z·f: what is rounded most is a small part of the sum.
    let z = f / (2.0 + f);
    let w = z * z;
    let mut p = LOG_P[LOG_P.len() - 1];
    for &c in LOG_P[..LOG_P.len() - 1].iter().rev() {
        p = p.mul_add(w, c);
    }
    let log = z.mul_add(w.mul_add(p, -f), f);
    if is_above { log + LN_2 } else { log }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The C library's exponential is within 0.51 units of the exact one where it is glibc's.
    #[test]
    fn within_a_unit_in_the_last_place() {
        let mut largest = 0;
        let dense = (0..2_000_000).map(|i| -1.5e-5 * f64::from(i));
        let wide = (0..2_000_000).map(|i| -3.74e-4 * f64::from(i));
        let tiny = (0..1100).map(|i| -2f64.powi(-i));
        for x in dense.chain(wide).chain(tiny) {
            let (got, want) = (exp(x), x.exp());
            let units = got.to_bits().abs_diff(want.to_bits());
            assert!(units <= 1, "exp({x:e}) = {got:e}, expected {want:e}");
            largest = largest.max(units);
        }
        assert_eq!(largest, 1, "the comparison sees a unit");
    }

    /// The C library's logarithm is within a unit of the exact one where it is glibc's.
    #[test]
    fn logarithms_are_within_two_units_in_the_last_place() {
        let dense = (0..=4_000_000).map(|i| f64::from(i) / 4e6);
        let tiny = (0..1075).map(|i| 1.9 * 2f64.powi(-i - 1));
        let mut largest = 0;
        for x in dense.chain(tiny) {
            let (got, want) = (ln_1p(x), x.ln_1p());
            let units = got.to_bits().abs_diff(want.to_bits());
            assert!(units <= 2, "log(1 + {x:e}) = {got:e}, expected {want:e}");
            largest = largest.max(units);
        }
        assert!(largest > 0, "the comparison sees a unit");
        assert_eq!((ln_1p(0.0), ln_1p(1.0)), (0.0, LN_2));
        assert!(ln_1p(f64::NAN).is_nan());
    }

    #[test]
    fn small_exponents_keep_their_digits() {
        for i in 0..=200_000 {
            let x = SMALL_EXPONENT * (f64::from(i) / 100_000.0 - 1.0);
            for x in [x, x * 1e-3, x * 1e-9] {
                let (got, want) = (small_exp_m1(x), x.exp_m1());
                assert!((got - want).abs() <= 4e-16 * want.abs(), "{x:e}: {got:e}, expected {want:e}");
            }
        }
    }

    #[test]
    fn ends_and_nan() {
        let cases = [(0.0, 1.0), (-0.0, 1.0), (f64::NEG_INFINITY, 0.0), (f64::MIN, 0.0), (-746.0, 0.0)];
        for (x, want) in cases {
            assert_eq!(exp(x).to_bits(), f64::to_bits(want), "{x}");
        }
        for bits in [f64::NAN.to_bits(), 0x7ff8_0000_0000_0fff, 0xfff0_0000_0000_0001] {
            assert!(exp(f64::from_bits(bits)).is_nan(), "{bits:x}");
        }
    }
}
