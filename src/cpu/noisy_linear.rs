//! Dense noisy linear layer, any ΔW: `y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)`.
//!
//! Two ways to the same numbers:
//!
//! * *general*: both products, tile by tile, joined in the epilogue. Any noise, any sizes.
//! * *folded*: when the tokens of a sample share `z` and there are enough of them to pay for it, each sample gets
//!   its effective weight `W0 + z⊙ΔW`, built block by block in the cache, and one product does the work of two.
//!   With the noise off there is one effective weight for all samples.
//!
//! The weight gradient is the same in both: `ΔW` rows are summed over all token rows in a fixed order.

use super::Base;
use super::matmul::{Accum, MatMut, Par, all_threads, gemm, inner_threads, mat, mat_mut};
use super::rows::{self, CHANNEL_BLOCK, Z, blocks};
use crate::error::{Error, Result};
use crate::noise::Noise;
use crate::real::Real;
use crate::shape::{LinearShape, length};
use crate::vector::zip2;
use rayon::prelude::*;
use std::ops::Range;

/// Tokens per sample from which building an effective weight per sample is cheaper than a second product.
const FOLD_TOKENS: usize = 32;

/// `y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)` and its gradients; paper equation 8.
///
/// Serves LoRA mul (ΔW built by [`lora_mul_weight`](super::lora_mul_weight)), VPT add (no ΔW, a Δb), the noisy head
/// (no base) and any caller-given ΔW.
///
/// ```
/// use pace_kernels::{LinearShape, cpu::{Base, NoisyLinear}};
/// use pace_kernels::noise::{Generator, Key, Noise, NoiseShape};
///
/// let shape = LinearShape { branches: 2, batch: 1, tokens: 1, in_features: 2, out_features: 3, shared_input: true };
/// let layer = NoisyLinear {
///     shape,
///     noise: Noise::Generated(Generator::new(Key::derive(7, 0, 0), 0.5, NoiseShape::PerSample, 0)?),
///     base: Some(Base { weight: &[1.0f32, 0.0, 0.0, 1.0, 1.0, 1.0], bias: None }),
///     delta_weight: Some(&[0.1; 6]),
///     delta_bias: None,
/// };
/// let mut y = [0.0; 6]; // two branches of three channels
/// layer.forward(&[1.0, 2.0], &mut y)?;
/// assert_ne!(y[..3], y[3..]);
/// # Ok::<(), pace_kernels::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct NoisyLinear<'a, T> {
    /// Sizes.
    pub shape: LinearShape,
    /// Source of `z`.
    pub noise: Noise<'a, T>,
    /// The frozen layer; `None` is a zero base term (the noisy head).
    pub base: Option<Base<'a, T>>,
    /// `ΔW [N, K]`; `None` is zero (VPT add).
    pub delta_weight: Option<&'a [T]>,
    /// `Δb [N]`; `None` is zero.
    pub delta_bias: Option<&'a [T]>,
}

/// Where the gradients of a [`NoisyLinear`] go; each is overwritten, `None` is not computed.
#[derive(Debug)]
pub struct NoisyLinearGrads<'a, T> {
    /// `dx`, of the shape of `x`.
    pub input: Option<&'a mut [T]>,
    /// `dΔW [N, K]`.
    pub delta_weight: Option<&'a mut [T]>,
    /// `dΔb [N]`.
    pub delta_bias: Option<&'a mut [T]>,
}

impl<T> Default for NoisyLinearGrads<'_, T> {
    fn default() -> Self {
        Self { input: None, delta_weight: None, delta_bias: None }
    }
}

/// Checks a base term against the sizes of its layer.
pub(super) fn check_base<T>(base: Option<Base<'_, T>>, shape: &LinearShape) -> Result<()> {
    let Some(base) = base else { return Ok(()) };
    length("base.weight", "[N, K]", base.weight, shape.out_features * shape.in_features)?;
    base.bias.map_or(Ok(()), |bias| length("base.bias", "[N]", bias, shape.out_features))
}

/// Checks `x` and `y` (or their gradients) against the sizes of their layer.
pub(super) fn check_io<T>(
    shape: &LinearShape,
    x: (&'static str, &[T]),
    y: (&'static str, &[T]),
) -> Result<()> {
    let in_shape = if shape.shared_input { "[B·T, K]" } else { "[M, K]" };
    length(x.0, in_shape, x.1, shape.in_rows() * shape.in_features)?;
    length(y.0, "[M, N]", y.1, shape.out_rows() * shape.out_features)
}

impl<T: Real> NoisyLinear<'_, T> {
    fn check(&self) -> Result<Z<'_, T>> {
        let z = Z::new(self.noise, self.shape)?;
        check_base(self.base, &self.shape)?;
        let (k, n) = (self.shape.in_features, self.shape.out_features);
        if let Some(weight) = self.delta_weight {
            length("delta_weight", "[N, K]", weight, n * k)?;
        }
        if let Some(bias) = self.delta_bias {
            length("delta_bias", "[N]", bias, n)?;
        }
        if self.base.is_none() && self.delta_weight.is_none() {
            return Err(Error::Argument {
                argument: "delta_weight",
                problem: "is required when there is no base term",
            });
        }
        Ok(z)
    }

    /// How to compute: the two weights that fold into one, if folding pays.
    fn fold(&self, z: &Z<'_, T>) -> Option<Fold<'_, T>> {
        let (Some(base), Some(delta)) = (self.base, self.delta_weight) else { return None };
        let one_z = z.is_off();
        let pays = z.per_sample() && self.shape.tokens >= FOLD_TOKENS && self.shape.fan_out() == 1;
        (one_z || pays).then_some(Fold { base: base.weight, delta, k: self.shape.in_features })
    }

    /// Computes `y [M, N]` from `x` (`[M, K]`, or `[B·T, K]` if the input is shared).
    ///
    /// # Errors
    /// If a size is zero or overflows, or a slice does not have the length that the sizes ask for.
    pub fn forward(&self, x: &[T], y: &mut [T]) -> Result<()> {
        let z = self.check()?;
        check_io(&self.shape, ("x", x), ("y", y))?;
        let (k, n) = (self.shape.in_features, self.shape.out_features);
        match self.fold(&z) {
            Some(fold) if z.is_off() => {
                let merged = fold.merged(n);
                let base = Base { weight: &merged, bias: self.base.and_then(|base| base.bias) };
                rows::forward(&z, Some(base), None, self.delta_bias, x, y);
            }
            Some(fold) => self.forward_folded(&z, &fold, x, y),
            None => {
                let adapter = |rows: Range<usize>, channels: Range<usize>, tile: MatMut<'_, T>, par: Par| {
                    let weight = self.delta_weight.expect("called only with a delta weight");
                    let weight = mat(&weight[channels.start * k..channels.end * k], channels.len(), k);
                    let x = mat(&x[rows.start * k..rows.end * k], rows.len(), k);
                    gemm(tile, Accum::Replace, x, weight.transpose(), par);
                };
                let adapter = self.delta_weight.map(|_| &adapter as _);
                rows::forward(&z, self.base, adapter, self.delta_bias, x, y);
            }
        }
        Ok(())
    }

    /// One effective weight per sample; a task is one sample.
    fn forward_folded(&self, z: &Z<'_, T>, fold: &Fold<'_, T>, x: &[T], y: &mut [T]) {
        let LinearShape { tokens: t, in_features: k, out_features: n, .. } = self.shape;
        let par = inner_threads(self.shape.samples());
        y.par_chunks_mut(t * n).zip(x.par_chunks(t * k)).enumerate().for_each_init(
            || (Vec::new(), Vec::new()),
            |(weight, z_row), (sample, (y, x))| {
                let x = mat(x, t, k);
                for channels in blocks(n, CHANNEL_BLOCK) {
                    let width = channels.len();
                    z_row.resize(width, T::one());
                    z.fill(sample * t, channels.clone(), z_row);
                    fold.block(channels.clone(), z_row, weight, par);
                    let weight = mat(&weight[..width * k], width, k).transpose();
                    // z becomes the effective bias b0 + z⊙Δb, laid under the product.
                    for (z, c) in z_row.iter_mut().zip(channels.clone()) {
                        let delta = self.delta_bias.map_or(T::zero(), |bias| *z * bias[c]);
                        *z = self.base.and_then(|base| base.bias).map_or(delta, |bias| bias[c] + delta);
                    }
                    for row in y.chunks_exact_mut(n) {
                        row[channels.clone()].copy_from_slice(z_row);
                    }
                    let y = mat_mut(y, t, n).subcols_mut(channels.start, width);
                    gemm(y, Accum::Add, x, weight, par);
                }
            },
        );
    }

    /// Computes gradients from `x` and `dy = ∂L/∂y [M, N]`, with the noise of the forward pass made again.
    ///
    /// `dx = g·W0 + e·ΔW`, `dΔW = eᵀ·x`, `dΔb = Σ_rows e`, where `g = dy` and `e = z⊙g`; with a shared input, sums over
    /// the branches.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); also if the gradient of ΔW is asked for and the layer has none.
    pub fn backward(&self, x: &[T], dy: &[T], grads: NoisyLinearGrads<'_, T>) -> Result<()> {
        let z = self.check()?;
        check_io(&self.shape, ("x", x), ("dy", dy))?;
        let (k, n) = (self.shape.in_features, self.shape.out_features);
        if let Some(dx) = &grads.input {
            check_io(&self.shape, ("grads.input", dx), ("dy", dy))?;
        }
        if let Some(dw) = &grads.delta_weight {
            length("grads.delta_weight", "[N, K]", dw, n * k)?;
            if self.delta_weight.is_none() {
                return Err(Error::Argument {
                    argument: "grads.delta_weight",
                    problem: "is asked for, but the layer has no `delta_weight`",
                });
            }
        }
        if let Some(db) = &grads.delta_bias {
            length("grads.delta_bias", "[N]", db, n)?;
        }
        if let Some(dx) = grads.input {
            self.backward_input(&z, dy, dx);
        }
        if let Some(dw) = grads.delta_weight {
            rows::for_channel_blocks(&z, dy, k, dw, |rows, channels, e, dw, first, par| {
                let e = mat(e, rows.len(), channels.len()).transpose();
                let x = mat(&x[rows.start * k..rows.end * k], rows.len(), k);
                let accum = if first { Accum::Replace } else { Accum::Add };
                gemm(mat_mut(dw, channels.len(), k), accum, e, x, par);
            });
        }
        if let Some(db) = grads.delta_bias {
            rows::delta_bias(&z, dy, db);
        }
        Ok(())
    }

    fn backward_input(&self, z: &Z<'_, T>, dy: &[T], dx: &mut [T]) {
        let LinearShape { tokens: t, in_features: k, out_features: n, .. } = self.shape;
        match self.fold(z) {
            Some(fold) if z.is_off() => {
                let merged = fold.merged(n);
                rows::base_gradient(&self.shape, Some(Base { weight: &merged, bias: None }), dy, dx);
            }
            Some(fold) => {
                let par = inner_threads(self.shape.samples());
                dx.par_chunks_mut(t * k).zip(dy.par_chunks(t * n)).enumerate().for_each_init(
                    || (Vec::new(), Vec::new()),
                    |(weight, z_row), (sample, (dx, dy))| {
                        let dy = mat(dy, t, n);
                        for channels in blocks(n, CHANNEL_BLOCK) {
                            let width = channels.len();
                            z_row.resize(width, T::one());
                            z.fill(sample * t, channels.clone(), z_row);
                            fold.block(channels.clone(), z_row, weight, par);
                            let accum = if channels.start == 0 { Accum::Replace } else { Accum::Add };
                            let g = dy.subcols(channels.start, width);
                            gemm(mat_mut(dx, t, k), accum, g, mat(&weight[..width * k], width, k), par);
                        }
                    },
                );
            }
            None => {
                rows::base_gradient(&self.shape, self.base, dy, dx);
                if let Some(weight) = self.delta_weight {
                    rows::project_gradient(z, dy, mat(weight, n, k), Accum::Add, dx);
                }
            }
        }
    }
}

/// Two weights `[N, K]` to be joined as `W0 + z⊙ΔW`, `z` by row.
struct Fold<'a, T> {
    base: &'a [T],
    delta: &'a [T],
    k: usize,
}

impl<T: Real> Fold<'_, T> {
    /// Writes the rows of some channels to the front of `out`.
    fn block(&self, channels: Range<usize>, z: &[T], out: &mut Vec<T>, par: Par) {
        let k = self.k;
        if out.len() < z.len() * k {
            out.resize(z.len() * k, T::zero());
        }
        let range = channels.start * k..channels.end * k;
        let row = |out: &mut [T], w: &[T], d: &[T], z: T| {
            zip2(out, w, d, |out, w, d| *out = w + z * d);
        };
        let (w, d) = (&self.base[range.clone()], &self.delta[range]);
        if matches!(par, Par::Seq) {
            let rows = w.chunks_exact(k).zip(d.chunks_exact(k));
            for ((out, (w, d)), &z) in out.chunks_exact_mut(k).zip(rows).zip(z) {
                row(out, w, d, z);
            }
        } else {
            let rows = w.par_chunks_exact(k).zip(d.par_chunks_exact(k));
            out.par_chunks_exact_mut(k).zip(rows).zip(z).for_each(|((out, (w, d)), &z)| row(out, w, d, z));
        }
    }

    /// `W0 + ΔW`.
    fn merged(&self, n: usize) -> Vec<T> {
        let mut out = Vec::new();
        self.block(0..n, &vec![T::one(); n], &mut out, all_threads());
        out
    }
}
