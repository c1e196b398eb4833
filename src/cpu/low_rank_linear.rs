//! Low-rank noisy linear layer (LoRA add): `y = x·W0ᵀ + b0 + z ⊙ (c·(x·Aᵀ)·Bᵀ + δb)`, `c` the scale.
//!
//! ΔW = c·B·A is never formed: `s = c·x·Aᵀ` has r columns, and the rank-r GEMM joins each tile of the base GEMM
//! in its epilogue. The backward pass does the same with `ds = c·e·B`.

use super::Base;
use super::matmul::{Accum, Par, add_up, all_threads, gemm, gemm_scaled, mat, mat_mut, mat_mut_t, transpose};
use super::noisy_linear::{check_base, check_io};
use super::rows::{self, CHANNEL_BLOCK, Term, Z, blocks};
use crate::error::{Error, Result};
use crate::noise::Noise;
use crate::parallel;
use crate::real::{Element, Real};
use crate::shape::{LinearShape, length, nonzero, product};
use crate::vector::zip1;
use num_traits::Zero;

/// `y = x·W0ᵀ + b0 + z ⊙ (scale·(x·Aᵀ)·Bᵀ + δb)` and its gradients: the paper's LoRA add with noise.
#[derive(Debug, Clone, Copy)]
pub struct LowRankLinear<'a, T: Element> {
    /// Sizes.
    pub shape: LinearShape,
    /// Source of `z`.
    pub noise: Noise<&'a [T::Real]>,
    /// The frozen layer; `None` is a zero base term.
    pub base: Option<Base<&'a [T]>>,
    /// Rank `r`.
    pub rank: usize,
    /// `B [N, r]`.
    pub lora_b: &'a [T],
    /// `A [r, K]`.
    pub lora_a: &'a [T],
    /// `δb [N]`; `None` is zero.
    pub delta_bias: Option<&'a [T]>,
    /// Factor on `B·A` (the α/r of common LoRA code); 1 in the paper.
    pub scale: T::Real,
}

/// Where the gradients of a [`LowRankLinear`] go; each is overwritten, `None` is not computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowRankGrads<B> {
    /// `dx`, of the shape of `x`.
    pub input: Option<B>,
    /// `dB [N, r]`.
    pub lora_b: Option<B>,
    /// `dA [r, K]`.
    pub lora_a: Option<B>,
    /// `dδb [N]`.
    pub delta_bias: Option<B>,
}

impl<B> Default for LowRankGrads<B> {
    fn default() -> Self {
        Self { input: None, lora_b: None, lora_a: None, delta_bias: None }
    }
}

impl<T: Element> LowRankLinear<'_, T> {
    fn check(&self) -> Result<Z<'_, T::Real>> {
        let z = Z::new(self.noise, self.shape)?;
        check_base(self.base, &self.shape)?;
        nonzero("rank", self.rank)?;
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        length("lora_b", "[N, r]", self.lora_b, product("lora_b", "[N, r]", &[n, self.rank])?)?;
        length("lora_a", "[r, K]", self.lora_a, product("lora_a", "[r, K]", &[self.rank, k])?)?;
        product("x·Aᵀ", "[M, r]", &[self.shape.in_rows(), self.rank])?;
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
    #[inline(never)]
    pub fn forward(&self, x: &[T], y: &mut [T]) -> Result<()> {
        let z = self.check()?;
        check_io(&self.shape, ("x", x), ("y", y))?;
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        let (m, r) = (self.shape.in_rows(), self.rank);
        let mut s = vec![T::Real::zero(); r * m];
        let lora_a = mat(self.lora_a, r, k).transpose();
        gemm_scaled(mat_mut_t(&mut s, m, r), Accum::Replace, self.scale, mat(x, m, k), lora_a, all_threads());
        let mut left = vec![T::default(); m * r];
        transpose(&s, &mut left, r);
        let adapter = Term { left: Some(&left), right: mat(self.lora_b, n, r).transpose() };
        rows::forward(&z, self.base, Some(adapter), self.delta_bias, x, y);
        Ok(())
    }

    /// Computes gradients from `x` and `dy = ∂L/∂y [M, N]`, with the noise of the forward pass recomputed.
    ///
    /// With `g = dy`, `e = z⊙g`, `s = scale·x·Aᵀ` and `ds = scale·e·B`: `dx = g·W0 + ds·A`, `dB = eᵀ·s`, `dA = dsᵀ·x`,
    /// `dδb = Σ_rows e`; with a shared input, sums over the branches.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    #[inline(never)]
    pub fn backward(&self, x: &[T], dy: &[T], grads: LowRankGrads<&mut [T]>) -> Result<()> {
        let z = self.check()?;
        check_io(&self.shape, ("x", x), ("dy", dy))?;
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        let r = self.rank;
        if let Some(dx) = &grads.input {
            check_io(&self.shape, ("grads.input", dx), ("dy", dy))?;
        }
        for (argument, shape, grad, expected) in [
            ("grads.lora_b", "[N, r]", &grads.lora_b, n * r),
            ("grads.lora_a", "[r, K]", &grads.lora_a, r * k),
            ("grads.delta_bias", "[N]", &grads.delta_bias, n),
        ] {
            grad.as_ref().map_or(Ok(()), |grad| length(argument, shape, grad, expected))?;
        }

        let LowRankGrads { input, lora_b, lora_a, delta_bias } = grads;
        if input.is_some() || lora_b.is_some() || lora_a.is_some() {
            let ds = self.backward_factors(&z, x, dy, lora_b, lora_a);
            if let Some(dx) = input {
                let adapter = Term { left: Some(&ds), right: mat(self.lora_a, r, k) };
                rows::input_gradient(&z, self.base, Some(adapter), dy, dx);
            }
        }
        if let Some(db) = delta_bias {
            rows::delta_bias(&z, dy, db);
        }
        Ok(())
    }

    /// `ds [M, r]`, `dB = eᵀ·s` and `dA = dsᵀ·x` in one pass over `g`: each tile of `e` serves `ds` and `dB`.
    ///
    /// A task is some rows and has sums of its own for `dB` and `dA`; these are added up in the order of the rows.
    fn backward_factors(
        &self,
        z: &Z<'_, T::Real>,
        x: &[T],
        dy: &[T],
        lora_b: Option<&mut [T]>,
        lora_a: Option<&mut [T]>,
    ) -> Vec<T> {
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        let (m, r) = (self.shape.in_rows(), self.rank);
        let (d, u) = (mat(self.lora_b, n, r), mat(self.lora_a, r, k));
        let size = m.div_ceil(m.div_ceil(ROWS).next_multiple_of(2).min(MAX_SUMS)).max(MIN_ROWS);
        let mut all = vec![T::default(); m * r];
        let task = |scratch: &mut Scratch<T>, (i, all): (usize, &mut [T])| {
            let zeros = |len| vec![T::Real::zero(); len];
            let mut sums = Sums {
                lora_b: lora_b.as_ref().map(|_| zeros(n * r)),
                lora_a: lora_a.as_ref().map(|_| zeros(r * k)),
            };
            let part = i * size..m.min((i + 1) * size);
            for rows in blocks(part.len(), ROWS) {
                let (first, count) = (part.start + rows.start, rows.len());
                let Scratch { product, s, tile, z_row } = scratch;
                let x = mat(&x[first * k..][..count * k], count, k);
                product.resize(count * r, T::Real::zero());
                s.resize(count * r, T::default());
                if sums.lora_b.is_some() {
                    let s_t = mat_mut_t(product, count, r);
                    gemm_scaled(s_t, Accum::Replace, self.scale, x, u.transpose(), Par::Seq);
                    transpose(product, s, r);
                }
                for channels in blocks(n, CHANNEL_BLOCK) {
                    let (at, width) = (channels.start, channels.len());
                    tile.resize(count * width, T::default());
                    z.gradient_tile(dy, first..first + count, channels, z_row, tile);
                    let e = mat(tile, count, width);
                    let d = d.subrows(at, width);
                    let accum = if at == 0 { Accum::Replace } else { Accum::Add };
                    gemm_scaled(mat_mut_t(product, count, r), accum, self.scale, e, d, Par::Seq);
                    if let Some(sum) = &mut sums.lora_b {
                        let sum = mat_mut_t(sum, n, r).subrows_mut(at, width);
                        gemm(sum, Accum::Add, e.transpose(), mat(s, count, r), Par::Seq);
                    }
                }
                let ds = &mut all[rows.start * r..][..count * r];
                transpose(product, ds, r);
                if let Some(sum) = &mut sums.lora_a {
                    gemm(mat_mut(sum, r, k), Accum::Add, mat(ds, count, r).transpose(), x, Par::Seq);
                }
            }
            sums
        };
        let parts = parallel::map_init(all.chunks_mut(size * r).enumerate(), Scratch::default, task);
        if let Some(lora_b) = lora_b {
            let total = add_up(parts.iter().filter_map(|part| part.lora_b.as_deref()));
            transpose(&total, lora_b, r);
        }
        if let Some(lora_a) = lora_a {
            let total = add_up(parts.iter().filter_map(|part| part.lora_a.as_deref()));
            zip1(lora_a, &total, |out, total| *out = T::from_real(total));
        }
        all
    }
}

/// Rows of a tile of `e`; with [`CHANNEL_BLOCK`] channels it stays in the L2 cache.
const ROWS: usize = 128;
/// Fewest rows of a task.
const MIN_ROWS: usize = 64;
/// Most partial sums of the factors' gradients; an even number, since most machines have an even number of cores.
const MAX_SUMS: usize = 64;

/// Partial sums of one task: `dBᵀ [r, N]` and `dA [r, K]`.
struct Sums<T> {
    lora_b: Option<Vec<T>>,
    lora_a: Option<Vec<T>>,
}

/// Buffers of one thread: `sᵀ` or `dsᵀ [r, rows]` as it is summed, `s [rows, r]`, a tile of `e`, and `z` of its channels.
struct Scratch<T: Element> {
    product: Vec<T::Real>,
    s: Vec<T>,
    tile: Vec<T>,
    z_row: Vec<T::Real>,
}

impl<T: Element> Default for Scratch<T> {
    fn default() -> Self {
        Self { product: Vec::new(), s: Vec::new(), tile: Vec::new(), z_row: Vec::new() }
    }
}

/// The scale of a low-rank adapter must be finite.
pub(crate) fn check_scale<T: Real>(scale: T) -> Result<()> {
    if scale.to_f64().is_finite() {
        Ok(())
    } else {
        Err(Error::Value { argument: "scale", expected: "finite", got: scale.to_f64() })
    }
}
