//! Dense noisy linear layer, any ΔW: `y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)`.
//!
//! Two ways to the same numbers:
//!
//! * *general*: both GEMMs, tile by tile, joined in the epilogue. Any noise, any sizes.
//! * *folded*: when the tokens of a sample share `z` and there are enough of them to pay for it, each sample gets
//!   its effective weight `W0 + z⊙ΔW`, built block by block in the cache, and one GEMM does the work of two.
//!   With the noise off there is one effective weight for all samples.
//!
//! The weight gradient is the same in both: each row of dΔW is summed over all token rows in a fixed order.

use super::matmul::{Accum, MatMut, Par, all_threads, gemm, inner_threads, mat, mat_mut};
use super::rows::{self, CHANNEL_BLOCK, Term, Z, blocks};
use super::scratch::Scratch;
use super::{Base, blas};
use crate::error::{Error, Result};
use crate::noise::Noise;
use crate::parallel;
use crate::real::Element;
use crate::shape::{LinearShape, length};
use crate::vector::zip2;
use num_traits::{One, Zero};
use std::ops::Range;

/// Tokens per sample from which building an effective weight per sample is cheaper than a second GEMM, and where that takes weights
/// which are packed once.
const FOLD_TOKENS: [usize; 2] = [32, 64];
/// Elements of an effective weight in `bf16` that are made at once in the forward pass: 384 KiB.
const FOLDED: usize = 3 << 16;
/// Fewest channels of it.
const MIN_FOLDED: usize = 64;

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
///     fold: true,
/// };
/// let mut y = [0.0; 6]; // two branches of three channels
/// layer.forward(&[1.0, 2.0], &mut y)?;
/// assert_ne!(y[..3], y[3..]);
/// # Ok::<(), pace_kernels::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct NoisyLinear<'a, T: Element> {
    /// Sizes.
    pub shape: LinearShape,
    /// Source of `z`.
    pub noise: Noise<&'a [T::Real]>,
    /// The frozen layer; `None` is a zero base term (the noisy head).
    pub base: Option<Base<&'a [T]>>,
    /// `ΔW [N, K]`; `None` is zero (VPT add).
    pub delta_weight: Option<&'a [T]>,
    /// `Δb [N]`; `None` is zero.
    pub delta_bias: Option<&'a [T]>,
    /// In `bf16`, whether one GEMM with `W0 + z⊙ΔW`, rounded once, may take the place of two: faster, but an element of ΔW that is
    /// small against that of W0 is lost. Without noise it does not. `f32` and `f64` do what is faster.
    pub fold: bool,
}

/// Where the gradients of a [`NoisyLinear`] go; each is overwritten, `None` is not computed. `B` are the tensors: slices here.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoisyLinearGrads<B> {
    /// `dx`, of the shape of `x`.
    pub input: Option<B>,
    /// `dΔW [N, K]`.
    pub delta_weight: Option<B>,
    /// `dΔb [N]`.
    pub delta_bias: Option<B>,
}

impl<B> Default for NoisyLinearGrads<B> {
    fn default() -> Self {
        Self { input: None, delta_weight: None, delta_bias: None }
    }
}

/// What a backward pass says that lacks `x`.
pub(crate) const NEEDS_INPUT: Error =
    Error::Argument { argument: "x", problem: "is required for the gradient to a weight" };

/// Checks a base term against the sizes of its layer.
pub(super) fn check_base<T>(base: Option<Base<&[T]>>, shape: &LinearShape) -> Result<()> {
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

impl<T: Element> NoisyLinear<'_, T> {
    fn check(&self) -> Result<Z<'_, T::Real>> {
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
    fn fold(&self, z: &Z<'_, T::Real>) -> Option<Fold<'_, T>> {
        let (Some(base), Some(delta)) = (self.base, self.delta_weight) else { return None };
        if T::ROUNDS && (z.is_off() || !self.fold) {
            return None;
        }
        let one_z = z.is_off();
        let pays = z.per_sample()
            && self.shape.tokens >= FOLD_TOKENS[usize::from(T::packs())]
            && self.shape.fan_out() == 1;
        (one_z || pays).then_some(Fold { base: base.weight, delta, k: self.shape.in_features })
    }

    /// Computes `y [M, N]` from `x` (`[M, K]`, or `[B·T, K]` if the input is shared).
    ///
    /// # Errors
    /// If there is neither a base nor ΔW, a size is zero or overflows, or a slice does not have the length that the sizes ask
    /// for.
    #[inline(never)]
    pub fn forward(&self, x: &[T], y: &mut [T]) -> Result<()> {
        let z = self.check()?;
        check_io(&self.shape, ("x", x), ("y", y))?;
        let (k, n) = (self.shape.in_features, self.shape.out_features);
        match self.fold(&z) {
            Some(fold) if z.is_off() => {
                let merged = fold.merged(n);
                let base = Base { weight: &merged[..], bias: self.base.and_then(|base| base.bias) };
                rows::forward(&z, Some(base), None, self.delta_bias, x, y);
            }
            Some(fold) => self.forward_folded(&z, &fold, x, y),
            None => {
                let adapter = self.delta_weight.map(|weight| mat(weight, n, k).transpose());
                let adapter = adapter.map(|right| Term { left: None, right });
                rows::forward(&z, self.base, adapter, self.delta_bias, x, y);
            }
        }
        Ok(())
    }

    /// One effective weight per sample; a task is some channels of one sample.
    fn forward_folded(&self, z: &Z<'_, T::Real>, fold: &Fold<'_, T>, x: &[T], y: &mut [T]) {
        let LinearShape { tokens: t, in_features: k, out_features: n, .. } = self.shape;
        let mut memory = [const { Vec::new() }; 2];
        let [base_memory, delta_memory] = &mut memory;
        let base_bias = self.base.and_then(|base| base.bias).map(|bias| T::reals(bias, base_memory));
        let delta_bias = self.delta_bias.map(|bias| T::reals(bias, delta_memory));
        let cached = if T::ROUNDS { (FOLDED / k).clamp(MIN_FOLDED, CHANNEL_BLOCK) } else { CHANNEL_BLOCK };
        let tasks = column_tasks(y, t, n, fold_part::<T>(n, cached.next_multiple_of(MIN_FOLDED)));
        let par = inner_threads(tasks.len());
        parallel::for_each_init(
            tasks.into_iter(),
            || (Scratch::take(), Vec::new()),
            |(weight, z_row), (sample, channels, y)| {
                let width = channels.len();
                z_row.resize(width, T::Real::one());
                z.fill(sample * t, channels.clone(), z_row);
                let weight = weight.get(width * k);
                fold.block(channels.clone(), 0..k, z_row, weight, par);
                // z becomes the effective bias b0 + z⊙Δb, which the GEMM is added to.
                for (z, c) in z_row.iter_mut().zip(channels) {
                    let delta = delta_bias.as_ref().map_or(T::Real::zero(), |bias| *z * bias[c]);
                    *z = base_bias.as_ref().map_or(delta, |bias| bias[c] + delta);
                }
                T::write(y, par, |mut y| {
                    for row in 0..t {
                        let row =
                            y.as_mut().row_mut(row).try_as_row_major_mut().expect("rows are contiguous");
                        row.as_slice_mut().copy_from_slice(z_row);
                    }
                    let x = mat(&x[sample * t * k..][..t * k], t, k);
                    gemm(y, Accum::Add, x, mat(weight, width, k).transpose(), par);
                });
            },
        );
    }

    /// Computes gradients from `x` and `dy = ∂L/∂y [M, N]`, with the noise of the forward pass recomputed.
    ///
    /// `dx = g·W0 + e·ΔW`, `dΔW = eᵀ·x`, `dΔb = Σ_rows e`, where `g = dy` and `e = z⊙g`; with a shared input, sums over
    /// the branches.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); also if the gradient of ΔW is asked for and the layer has none.
    #[inline(never)]
    pub fn backward(&self, x: &[T], dy: &[T], grads: NoisyLinearGrads<&mut [T]>) -> Result<()> {
        self.backward_from(Some(x), dy, grads)
    }

    /// The same without `x`, if the gradient of ΔW is not asked for.
    #[inline(never)]
    pub(crate) fn backward_from(
        &self,
        x: Option<&[T]>,
        dy: &[T],
        grads: NoisyLinearGrads<&mut [T]>,
    ) -> Result<()> {
        let z = self.check()?;
        let (k, n) = (self.shape.in_features, self.shape.out_features);
        length("dy", "[M, N]", dy, self.shape.out_rows() * n)?;
        if let Some(x) = x {
            check_io(&self.shape, ("x", x), ("dy", dy))?;
        }
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
            if x.is_none() {
                return Err(NEEDS_INPUT);
            }
        }
        if let Some(db) = &grads.delta_bias {
            length("grads.delta_bias", "[N]", db, n)?;
        }
        if let Some(dx) = grads.input {
            self.backward_input(&z, dy, dx);
        }
        if let Some(dw) = grads.delta_weight {
            let x = x.unwrap_or_default();
            rows::for_channel_blocks(&z, dy, k, dw, |rows, channels, e, sum, first, par| {
                let e = mat(e, rows.len(), channels.len()).transpose();
                let x = mat(&x[rows.start * k..rows.end * k], rows.len(), k);
                let accum = if first { Accum::Replace } else { Accum::Add };
                gemm(sum, accum, e, x, par);
            });
        }
        if let Some(db) = grads.delta_bias {
            rows::delta_bias(&z, dy, db);
        }
        Ok(())
    }

    fn backward_input(&self, z: &Z<'_, T::Real>, dy: &[T], dx: &mut [T]) {
        let LinearShape { tokens: t, in_features: k, out_features: n, .. } = self.shape;
        match self.fold(z) {
            Some(fold) if z.is_off() => {
                let merged = fold.merged(n);
                let base = Base { weight: &merged[..], bias: None };
                rows::input_gradient(z, Some(base), None, dy, dx);
            }
            Some(fold) => {
                let tasks =
                    column_tasks(dx, t, k, fold_part::<T>(k, if T::ROUNDS { 2 * CHANNEL_BLOCK } else { k }));
                let par = inner_threads(tasks.len());
                let block = if blas::is_registered() && !T::ROUNDS { n } else { CHANNEL_BLOCK };
                parallel::for_each_init(
                    tasks.into_iter(),
                    || (Scratch::take(), Vec::new()),
                    |(weight, z_row), (sample, columns, dx)| {
                        let dy = mat(&dy[sample * t * n..][..t * n], t, n);
                        T::write(dx, par, |mut dx| {
                            for channels in blocks(n, block) {
                                let (height, width) = (channels.len(), columns.len());
                                z_row.resize(height, T::Real::one());
                                z.fill(sample * t, channels.clone(), z_row);
                                let weight = weight.get(height * width);
                                fold.block(channels.clone(), columns.clone(), z_row, weight, par);
                                let accum = if channels.start == 0 { Accum::Replace } else { Accum::Add };
                                let g = dy.subcols(channels.start, height);
                                gemm(dx.as_mut(), accum, g, mat(weight, height, width), par);
                            }
                        });
                    },
                );
            }
            None => {
                let adapter = self.delta_weight.map(|weight| Term { left: None, right: mat(weight, n, k) });
                rows::input_gradient(z, self.base, adapter, dy, dx);
            }
        }
    }
}

/// How many columns of a sample's output a task computes: `cached`, what keeps its part of the effective weight in the L2 cache,
/// or half of them for a BLAS, which loses more by starting on the same input again than by reading the weight from further
/// away.
fn fold_part<T: Element>(columns: usize, cached: usize) -> usize {
    const WORTH_SPLITTING: usize = 1024;
    match blas::is_registered() && !T::ROUNDS {
        true if columns >= WORTH_SPLITTING => columns.div_ceil(2).next_multiple_of(16),
        true => columns,
        false => cached,
    }
}

/// A sample, some of its columns, and where they are written.
type ColumnTask<'a, T> = (usize, Range<usize>, MatMut<'a, T>);

/// The columns of every sample of `out [samples·rows, columns]` in parts of at most `part`.
fn column_tasks<T>(out: &mut [T], rows: usize, columns: usize, part: usize) -> Vec<ColumnTask<'_, T>> {
    let mut tasks = Vec::new();
    for (sample, out) in out.chunks_exact_mut(rows * columns).enumerate() {
        let mut rest = mat_mut(out, rows, columns);
        for columns in blocks(columns, part) {
            let (now, later) = rest.split_at_col_mut(columns.len());
            tasks.push((sample, columns, now));
            rest = later;
        }
    }
    tasks
}

/// Two weights `[N, K]` to be joined as `W0 + z⊙ΔW`, `z` by row.
struct Fold<'a, T> {
    base: &'a [T],
    delta: &'a [T],
    k: usize,
}

impl<T: Element> Fold<'_, T> {
    /// Writes `[channels, columns]` of the effective weight.
    fn block(&self, channels: Range<usize>, columns: Range<usize>, z: &[T::Real], out: &mut [T], par: Par) {
        let width = columns.len();
        let write = |first: usize, out: &mut [T]| {
            for (row, out) in (first..).zip(out.chunks_exact_mut(width)) {
                let (z, start) = (z[row], (channels.start + row) * self.k);
                let at = start + columns.start..start + columns.end;
                zip2(out, &self.base[at.clone()], &self.delta[at], |out, w, d| {
                    *out = T::from_real(w.to_real() + z * d.to_real());
                });
            }
        };
        match par {
            Par::Seq => write(0, out),
            _ => {
                let rows = parallel::rows(width);
                parallel::for_each(out.chunks_mut(rows * width).enumerate(), |(i, out)| write(i * rows, out));
            }
        }
    }

    /// `W0 + ΔW`.
    fn merged(&self, n: usize) -> Vec<T> {
        let mut out = vec![T::default(); n * self.k];
        self.block(0..n, 0..self.k, &vec![T::Real::one(); n], &mut out, all_threads());
        out
    }
}
