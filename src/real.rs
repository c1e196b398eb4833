//! The floating-point types that the CPU operators work in.

mod sealed {
    pub trait Sealed: faer::traits::ComplexField + crate::cpu::BlasReal + crate::cpu::Scratched {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// `f32` or `f64`.
pub trait Real:
    sealed::Sealed + num_traits::NumAssign + Copy + Send + Sync + std::fmt::Debug + 'static
{
    /// Exact for `f64`, the identity for `f32`.
    fn from_f32(value: f32) -> Self;
    /// Rounded to the nearest.
    fn from_f64(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
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
