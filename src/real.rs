//! The types that the CPU operators compute in, and those that their tensors are stored in.

use crate::cpu::Store;
use half::bf16;

mod sealed {
    use crate::cpu::{BlasReal, Scratched};

    pub trait Sealed: faer::traits::ComplexField + BlasReal + Scratched {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// `f32` or `f64`.
pub trait Real: sealed::Sealed + Element<Real = Self> + num_traits::NumAssign {
    /// Exact for `f64`, the identity for `f32`.
    fn from_f32(value: f32) -> Self;
    /// Rounded to the nearest.
    fn from_f64(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
}

/// What tensors of a layer are stored in: `f32`, `f64` or `bf16`. With `bf16` GEMMs multiply numbers of that type and add up in
/// `f32`, in which all else is computed. What one GEMM gives to the next is rounded to `bf16`, as PyTorch does it: `z⊙g`, `x·Aᵀ`,
/// `(z⊙g)·B`, `Pd·Pu`, `W0ᵀ·g`, `dΔW⊙W0`. Subnormal numbers may count as zero.
pub trait Element:
    Store<<Self as Element>::Real> + Copy + Send + Sync + PartialEq + std::fmt::Debug + 'static
{
    /// What is computed in: the type itself, or `f32` for `bf16`.
    type Real: Real;
    /// Exact.
    fn to_real(self) -> Self::Real;
    /// Rounded to the nearest.
    fn from_real(value: Self::Real) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f64::from(value)
    }
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
}

macro_rules! stored_as_it_is {
    ($($type:ty),*) => {$(
        impl Element for $type {
            type Real = $type;
            #[inline(always)]
            fn to_real(self) -> $type {
                self
            }
            #[inline(always)]
            fn from_real(value: $type) -> Self {
                value
            }
        }
    )*};
}

stored_as_it_is!(f32, f64);

impl Element for bf16 {
    type Real = f32;
    #[inline(always)]
    fn to_real(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    /// Without branches, so that loops over it become vector instructions.
    #[inline(always)]
    fn from_real(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
        let quiet = bits | 1 << 22;
        Self::from_bits((if value.is_nan() { quiet } else { rounded } >> 16) as u16)
    }
}
