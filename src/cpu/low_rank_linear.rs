//! Low-rank noisy linear layer (LoRA add): `y = x·W0ᵀ + b0 + z ⊙ (c·(x·Uᵀ)·Dᵀ + δb)`, `c` the scale.
//!
//! ΔW = c·D·U is never formed: `s = c·x·Uᵀ` has r columns, and the rank-r product joins each tile of the base product
//! in its epilogue. The backward pass does the same with `ds = e·D`.

use super::Base;
use super::matmul::{Accum, MatMut, Par, all_threads, gemm, mat, mat_mut};
use super::noisy_linear::{check_base, check_io};
use super::rows::{self, Z};
use crate::error::{Error, Result};
use crate::noise::Noise;
use crate::real::Real;
use crate::shape::{LinearShape, length, nonzero, product};
use std::ops::Range;

/// `y = x·W0ᵀ + b0 + z ⊙ (scale·(x·Uᵀ)·Dᵀ + δb)` and its gradients: the paper's LoRA add with noise.
#[derive(Debug, Clone, Copy)]
pub struct LowRankLinear<'a, T> {
    /// Sizes.
    pub shape: LinearShape,
    /// Source of `z`.
    pub noise: Noise<'a, T>,
    /// The frozen layer; `None` is a zero base term.
    pub base: Option<Base<'a, T>>,
    /// Rank `r`.
    pub rank: usize,
    /// `D [N, r]`.
    pub down: &'a [T],
    /// `U [r, K]`.
    pub up: &'a [T],
    /// `δb [N]`; `None` is zero.
    pub delta_bias: Option<&'a [T]>,
    /// Factor on `D·U` (the α/r of common LoRA code); 1 in the paper.
    pub scale: T,
}

/// Where the gradients of a [`LowRankLinear`] go; each is overwritten, `None` is not computed.
#[derive(Debug)]
pub struct LowRankGrads<'a, T> {
    /// `dx`, of the shape of `x`.
    pub input: Option<&'a mut [T]>,
    /// `dD [N, r]`.
    pub down: Option<&'a mut [T]>,
    /// `dU [r, K]`.
    pub up: Option<&'a mut [T]>,
    /// `dδb [N]`.
    pub delta_bias: Option<&'a mut [T]>,
}

impl<T> Default for LowRankGrads<'_, T> {
    fn default() -> Self {
        Self { input: None, down: None, up: None, delta_bias: None }
    }
}

impl<T: Real> LowRankLinear<'_, T> {
    fn check(&self) -> Result<Z<'_, T>> {
        let z = Z::new(self.noise, self.shape)?;
        check_base(self.base, &self.shape)?;
        nonzero("rank", self.rank)?;
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        length("down", "[N, r]", self.down, product("down", "[N, r]", &[n, self.rank])?)?;
        length("up", "[r, K]", self.up, product("up", "[r, K]", &[self.rank, k])?)?;
        product("x·Uᵀ", "[M, r]", &[self.shape.in_rows(), self.rank])?;
        if let Some(bias) = self.delta_bias {
            length("delta_bias", "[N]", bias, n)?;
        }
        check_scale(self.scale)?;
        Ok(z)
    }

    /// `s = scale·x·Uᵀ [M, r]`.
    fn down_projection(&self, x: &[T]) -> Vec<T> {
        let (m, k, r) = (self.shape.in_rows(), self.shape.in_features, self.rank);
        let mut s = vec![T::zero(); m * r];
        gemm(
            mat_mut(&mut s, m, r),
            Accum::Replace,
            mat(x, m, k),
            mat(self.up, r, k).transpose(),
            all_threads(),
        );
        self.scale_by(&mut s);
        s
    }

    fn scale_by(&self, values: &mut [T]) {
        if self.scale != T::one() {
            values.iter_mut().for_each(|v| *v *= self.scale);
        }
    }

    /// Computes `y [M, N]` from `x` (`[M, K]`, or `[B·T, K]` if the input is shared).
    ///
    /// # Errors
    /// If a size is zero or overflows, a slice does not have the length that the sizes ask for, or `scale` is not finite.
    pub fn forward(&self, x: &[T], y: &mut [T]) -> Result<()> {
        let z = self.check()?;
        check_io(&self.shape, ("x", x), ("y", y))?;
        let r = self.rank;
        let s = self.down_projection(x);
        let adapter = |rows: Range<usize>, channels: Range<usize>, tile: MatMut<'_, T>, par: Par| {
            let s = mat(&s[rows.start * r..rows.end * r], rows.len(), r);
            let down = mat(&self.down[channels.start * r..channels.end * r], channels.len(), r);
            gemm(tile, Accum::Replace, s, down.transpose(), par);
        };
        rows::forward(&z, self.base, Some(&adapter), self.delta_bias, x, y);
        Ok(())
    }

    /// Computes gradients from `x` and `dy = ∂L/∂y [M, N]`, with the noise of the forward pass made again.
    ///
    /// With `g = dy`, `e = z⊙g`, `s = scale·x·Uᵀ` and `ds = scale·e·D`: `dx = g·W0 + ds·U`, `dD = eᵀ·s`, `dU = dsᵀ·x`,
    /// `dδb = Σ_rows e`; with a shared input, sums over the branches.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward(&self, x: &[T], dy: &[T], grads: LowRankGrads<'_, T>) -> Result<()> {
        let z = self.check()?;
        check_io(&self.shape, ("x", x), ("dy", dy))?;
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        let (m, r) = (self.shape.in_rows(), self.rank);
        if let Some(dx) = &grads.input {
            check_io(&self.shape, ("grads.input", dx), ("dy", dy))?;
        }
        for (argument, shape, grad, expected) in [
            ("grads.down", "[N, r]", &grads.down, n * r),
            ("grads.up", "[r, K]", &grads.up, r * k),
            ("grads.delta_bias", "[N]", &grads.delta_bias, n),
        ] {
            grad.as_ref().map_or(Ok(()), |grad| length(argument, shape, grad, expected))?;
        }

        if grads.input.is_some() || grads.up.is_some() {
            let mut ds = vec![T::zero(); m * r];
            rows::project_gradient(&z, dy, mat(self.down, n, r), Accum::Replace, &mut ds);
            self.scale_by(&mut ds);
            let ds = mat(&ds, m, r);
            if let Some(dx) = grads.input {
                rows::base_gradient(&self.shape, self.base, dy, dx);
                gemm(mat_mut(dx, m, k), Accum::Add, ds, mat(self.up, r, k), all_threads());
            }
            if let Some(du) = grads.up {
                gemm(mat_mut(du, r, k), Accum::Replace, ds.transpose(), mat(x, m, k), all_threads());
            }
        }
        if let Some(dd) = grads.down {
            let s = self.down_projection(x);
            rows::for_channel_blocks(&z, dy, r, dd, |rows, channels, e, dd, first, par| {
                let e = mat(e, rows.len(), channels.len()).transpose();
                let s = mat(&s[rows.start * r..rows.end * r], rows.len(), r);
                let accum = if first { Accum::Replace } else { Accum::Add };
                gemm(mat_mut(dd, channels.len(), r), accum, e, s, par);
            });
        }
        if let Some(db) = grads.delta_bias {
            rows::delta_bias(&z, dy, db);
        }
        Ok(())
    }
}

/// The scale of a low-rank product must be finite.
pub(super) fn check_scale<T: Real>(scale: T) -> Result<()> {
    if scale.to_f64().is_finite() {
        Ok(())
    } else {
        Err(Error::Value { argument: "scale", expected: "finite", got: scale.to_f64() })
    }
}
