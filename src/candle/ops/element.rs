//! The element types of the operators on CPU tensors.

use crate::real::Real;
use candle_core::WithDType;

/// The element types of the operators, to candle, and the functions that the transformer needs of them.
pub(in crate::candle) trait Element: Real + WithDType {
    fn from_f64(value: f64) -> Self {
        <Self as Real>::from_f64(value)
    }
    fn from_usize(value: usize) -> Self {
        <Self as Real>::from_f64(value as f64)
    }
    fn sqrt(self) -> Self;
    fn exp(self) -> Self;
    fn erf(self) -> Self;
}

impl Element for f32 {
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }

    /// Branch-free, so that loops over it become vector code; relative error 2e-7. Saturates at e^±87.
    #[inline(always)]
    fn exp(self) -> Self {
        // eˣ = 2ⁿ·2ᶠ with |f| ≤ ½; 1.5·2²³ as a summand rounds to an integer and leaves it in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let x = if self < -87.0 { -87.0 } else { self };
        let x = if x > 87.0 { 87.0 } else { x };
        let t = x * std::f32::consts::LOG2_E;
        let shifted = t + ROUND;
        let n = shifted - ROUND;
        // ln 2 in two parts, so that the remainder is exact enough.
        let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
        let tail = 1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0));
        let p = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * tail))));
        let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
        p * f32::from_bits(power)
    }

    /// The rational approximation of Eigen and XLA (odd polynomial over even), error 3e-7; saturates at ±4.
    #[inline(always)]
    fn erf(self) -> Self {
        const P: [f32; 7] = [
            -1.609_603_3e-2,
            -2.954_6e-3,
            -7.349_906_3e-4,
            -5.692_506_4e-5,
            -2.101_024e-6,
            2.770_681_4e-8,
            -2.726_142_3e-10,
        ];
        const Q: [f32; 5] = [-1.426_473_9e-2, -7.373_329e-3, -1.682_827e-3, -2.133_740_6e-4, -1.456_607_2e-5];
        let x = if self > 4.0 { 4.0 } else { self };
        let x = if x < -4.0 { -4.0 } else { x };
        let t = x * x;
        let horner = |c: &[f32]| c.iter().rev().fold(0.0, |sum, &c| sum * t + c);
        x * horner(&P) / horner(&Q)
    }
}

impl Element for f64 {
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    fn exp(self) -> Self {
        f64::exp(self)
    }
    fn erf(self) -> Self {
        libm::erf(self)
    }
}
