//! Low-rank noisy linear layer (LoRA add): `y = x·W0ᵀ + b0 + z ⊙ (c·(x·Uᵀ)·Dᵀ + δb)`, `c` the scale.
//!
//! ΔW = c·D·U is never formed: `s = c·x·Uᵀ` has r columns, and the rank-r product joins each tile of the base product
//! in its epilogue. The backward pass does the same with `ds = e·D`.

use super::Base;
use super::matmul::{
    Accum, MatMut, Par, add_up, all_threads, gemm, gemm_scaled, mat, mat_mut, mat_mut_t, mat_t, transpose,
};
use super::noisy_linear::{check_base, check_io};
use super::rows::{self, CHANNEL_BLOCK, Z, blocks};
use crate::error::{Error, Result};
use crate::noise::Noise;
use crate::real::Real;
use crate::shape::{LinearShape, length, nonzero, product};
use rayon::prelude::*;
use std::ops::Range;

/// `y = x·W0ᵀ + b0 + z ⊙ (scale·(x·Uᵀ)·Dᵀ + δb)` and its gradients: the paper's LoRA add with noise.
#[derive(Debug, Clone, Copy)]
pub struct LowRankLinear<'a, T> {
    /// Sizes.
    pub shape: LinearShape,
    /// Source of `z`.
    pub noise: Noise<&'a [T]>,
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

    /// Computes `y [M, N]` from `x` (`[M, K]`, or `[B·T, K]` if the input is shared).
    ///
    /// # Errors
    /// If a size is zero or overflows, a slice does not have the length that the sizes ask for, or `scale` is not finite.
    pub fn forward(&self, x: &[T], y: &mut [T]) -> Result<()> {
        let z = self.check()?;
        check_io(&self.shape, ("x", x), ("y", y))?;
        let (m, k, r) = (self.shape.in_rows(), self.shape.in_features, self.rank);
        // sᵀ [r, M]
        let mut s = vec![T::zero(); r * m];
        let up = mat(self.up, r, k).transpose();
        gemm_scaled(mat_mut_t(&mut s, m, r), Accum::Replace, self.scale, mat(x, m, k), up, all_threads());
        let s = mat_t(&s, m, r);
        let adapter = |rows: Range<usize>, channels: Range<usize>, tile: MatMut<'_, T>, par: Par| {
            let down = mat(&self.down[channels.start * r..channels.end * r], channels.len(), r);
            gemm(tile, Accum::Replace, s.subrows(rows.start, rows.len()), down.transpose(), par);
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
        let r = self.rank;
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

        let LowRankGrads { mut input, down, up, delta_bias } = grads;
        if let Some(dx) = &mut input {
            rows::base_gradient(&self.shape, self.base, dy, dx);
        }
        if input.is_some() || down.is_some() || up.is_some() {
            self.backward_factors(&z, x, dy, input, down, up);
        }
        if let Some(db) = delta_bias {
            rows::delta_bias(&z, dy, db);
        }
        Ok(())
    }

    /// `dx += ds·U`, `dD = eᵀ·s`, `dU = dsᵀ·x` in one pass over `g`: each tile of `e` serves `ds` and `dD`.
    ///
    /// A task is some rows and has sums of its own for `dD` and `dU`; these are added up in the order of the rows.
    fn backward_factors(
        &self,
        z: &Z<'_, T>,
        x: &[T],
        dy: &[T],
        dx: Option<&mut [T]>,
        down: Option<&mut [T]>,
        up: Option<&mut [T]>,
    ) {
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        let (m, r) = (self.shape.in_rows(), self.rank);
        let u = mat(self.up, r, k);
        let size = m.div_ceil(MAX_SUMS).max(ROWS);
        let dx: Vec<_> = match dx {
            Some(dx) => dx.chunks_mut(size * k).map(Some).collect(),
            None => x.chunks(size * k).map(|_| None).collect(),
        };
        let task = |scratch: &mut Scratch<T>, (i, mut dx): (usize, Option<&mut [T]>)| {
            let mut sums = Sums {
                down: down.as_ref().map(|_| vec![T::zero(); n * r]),
                up: up.as_ref().map(|_| vec![T::zero(); r * k]),
            };
            let part = i * size..m.min((i + 1) * size);
            for rows in blocks(part.len(), ROWS) {
                let (first, count) = (part.start + rows.start, rows.len());
                let x = mat(&x[first * k..][..count * k], count, k);
                let Scratch { s, ds, tile, z_row } = scratch;
                s.resize(count * r, T::zero());
                ds.resize(count * r, T::zero());
                if sums.down.is_some() {
                    let s = mat_mut_t(s, count, r);
                    gemm_scaled(s, Accum::Replace, self.scale, x, u.transpose(), Par::Seq);
                }
                for channels in blocks(n, CHANNEL_BLOCK) {
                    let (at, width) = (channels.start, channels.len());
                    tile.resize(count * width, T::zero());
                    z.gradient_tile(dy, first..first + count, channels, z_row, tile);
                    let e = mat(tile, count, width);
                    let d = mat(self.down, n, r).subrows(at, width);
                    let accum = if at == 0 { Accum::Replace } else { Accum::Add };
                    gemm_scaled(mat_mut_t(ds, count, r), accum, self.scale, e, d, Par::Seq);
                    if let Some(sum) = &mut sums.down {
                        let sum = mat_mut_t(sum, n, r).subrows_mut(at, width);
                        gemm(sum, Accum::Add, e.transpose(), mat_t(s, count, r), Par::Seq);
                    }
                }
                let ds = mat_t(ds, count, r);
                if let Some(dx) = &mut dx {
                    let dx = &mut dx[rows.start * k..rows.end * k];
                    gemm(mat_mut(dx, count, k), Accum::Add, ds, u, Par::Seq);
                }
                if let Some(sum) = &mut sums.up {
                    gemm(mat_mut(sum, r, k), Accum::Add, ds.transpose(), x, Par::Seq);
                }
            }
            sums
        };
        let parts: Vec<_> = dx.into_par_iter().enumerate().map_init(Scratch::default, task).collect();
        if let Some(down) = down {
            let total = add_up(parts.iter().filter_map(|part| part.down.as_deref()));
            transpose(&total, down, r);
        }
        if let Some(up) = up {
            up.copy_from_slice(&add_up(parts.iter().filter_map(|part| part.up.as_deref())));
        }
    }
}

/// Rows of a tile of `e`; with [`CHANNEL_BLOCK`] channels it stays in the L2 cache.
const ROWS: usize = 128;
/// Most partial sums of the factors' gradients.
const MAX_SUMS: usize = 64;

/// Partial sums of one task: `dDᵀ [r, N]` and `dU [r, K]`.
struct Sums<T> {
    down: Option<Vec<T>>,
    up: Option<Vec<T>>,
}

/// Buffers of one thread: `sᵀ` and `dsᵀ [r, rows]`, a tile of `e`, and `z` of its channels.
struct Scratch<T> {
    s: Vec<T>,
    ds: Vec<T>,
    tile: Vec<T>,
    z_row: Vec<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self { s: Vec::new(), ds: Vec::new(), tile: Vec::new(), z_row: Vec::new() }
    }
}

/// The scale of a low-rank product must be finite.
pub(crate) fn check_scale<T: Real>(scale: T) -> Result<()> {
    if scale.to_f64().is_finite() {
        Ok(())
    } else {
        Err(Error::Value { argument: "scale", expected: "finite", got: scale.to_f64() })
    }
}
