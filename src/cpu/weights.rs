//! Weight builders: the ΔW and Δb of the paper's adapters from their trained factors, and the way back.
//!
//! | adapter | ΔW | Δb |
//! |---|---|---|
//! | LoRA add | `c·B·A` | `δb` |
//! | LoRA mul + VPT add | `W0 ⊙ (c·B·A)` | `W0·(Pd·Pu) + b0⊙δb` |
//! | VPT add | 0 | `W0·(Pd·Pu)` |

use super::low_rank_linear::check_scale;
use super::matmul::{
    Accum, MatRef, Par, add_up, all_threads, gemm, gemm_scaled, mat, mat_mut, mat_mut_t, transpose,
};
use crate::error::{Error, Result};
use crate::parallel::{self, TASK};
use crate::real::{Element, Real};
use crate::shape::{length, nonzero, product};
use crate::vector::{zip1, zip2};
use num_traits::Zero;

/// Channels of a block of ΔW that stays in the cache while it is used twice.
const CHANNELS: usize = 192;
/// Most partial sums of dA.
const MAX_SUMS: usize = 64;

/// The trained factors of a low-rank weight `[N, K]`: `B [N, r]`, `A [r, K]`, and a scale of type `S` on `B·A`. `B` are the
/// tensors: slices here, and on NVIDIA devices what the operators in `cuda` take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraFactors<B, S = f32> {
    /// Out-features `N`.
    pub out_features: usize,
    /// In-features `K`.
    pub in_features: usize,
    /// Rank `r`.
    pub rank: usize,
    /// `B [N, r]`.
    pub lora_b: B,
    /// `A [r, K]`.
    pub lora_a: B,
    /// Factor on `B·A`; 1 in the paper.
    pub scale: S,
}

/// Where the gradients of [`LoraFactors`] go; both are overwritten.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraGrads<B> {
    /// `dB [N, r]`.
    pub lora_b: B,
    /// `dA [r, K]`.
    pub lora_a: B,
}

impl<T: Element> LoraFactors<&[T], T::Real> {
    pub(super) fn check(&self) -> Result<()> {
        nonzero("out_features", self.out_features)?;
        nonzero("in_features", self.in_features)?;
        nonzero("rank", self.rank)?;
        product("weight", "[N, K]", &[self.out_features, self.in_features])?;
        length(
            "lora_b",
            "[N, r]",
            self.lora_b,
            product("lora_b", "[N, r]", &[self.out_features, self.rank])?,
        )?;
        length(
            "lora_a",
            "[r, K]",
            self.lora_a,
            product("lora_a", "[r, K]", &[self.rank, self.in_features])?,
        )?;
        check_scale(self.scale)
    }

    fn check_weight(&self, argument: &'static str, weight: &[T]) -> Result<()> {
        length(argument, "[N, K]", weight, self.out_features * self.in_features)
    }

    /// Checks the places for the gradients of factors that were checked.
    pub(super) fn check_grads(&self, grads: &LoraGrads<&mut [T]>) -> Result<()> {
        length("grads.lora_b", "[N, r]", grads.lora_b, self.out_features * self.rank)?;
        length("grads.lora_a", "[r, K]", grads.lora_a, self.rank * self.in_features)
    }

    /// `out = scale·B·A`, or `base ⊙ (scale·B·A)`, block by block of channels.
    fn product(&self, base: Option<&[T]>, out: &mut [T]) {
        let Self { in_features: k, rank: r, .. } = *self;
        let lora_a = mat(self.lora_a, r, k);
        let blocks = out.chunks_mut(CHANNELS * k).zip(self.lora_b.chunks(CHANNELS * r));
        parallel::for_each(blocks.enumerate(), |(i, (out, lora_b))| {
            let count = lora_b.len() / r;
            T::write(mat_mut(out, count, k), Par::Seq, |mut out| {
                let lora_b = mat(lora_b, count, r);
                gemm_scaled(out.as_mut(), Accum::Replace, self.scale, lora_b, lora_a, Par::Seq);
                let Some(base) = base else { return };
                for (channel, base) in base[i * CHANNELS * k..].chunks_exact(k).take(count).enumerate() {
                    let row =
                        out.as_mut().row_mut(channel).try_as_row_major_mut().expect("rows are contiguous");
                    zip1(row.as_slice_mut(), base, |w, base| *w *= base.to_real());
                }
            });
        });
    }

    /// `dB = scale·q·Aᵀ`, `dA = scale·Bᵀ·q` for `q = ∂L/∂(scale·B·A)`, given as `grad`, or `grad ⊙ base`.
    ///
    /// Block by block of channels, so that `q` is never held as a whole; the blocks' shares of dA are added in order.
    fn backward(&self, grad: &[T], base: Option<&[T]>, grads: LoraGrads<&mut [T]>) -> Result<()> {
        let Self { out_features: n, in_features: k, rank: r, .. } = *self;
        self.check_grads(&grads)?;
        let lora_a = mat(self.lora_a, r, k).transpose();
        let block = n.div_ceil(MAX_SUMS).max(CHANNELS);
        let blocks = grads.lora_b.chunks_mut(block * r).zip(self.lora_b.chunks(block * r));
        let parts: Vec<Vec<T::Real>> = parallel::map_init(
            blocks.enumerate(),
            || (Vec::new(), Vec::new()),
            |(product, dd_t), (i, (dd, d))| {
                let count = dd.len() / r;
                let grad = &grad[i * block * k..][..count * k];
                let q = match base {
                    None => grad,
                    Some(base) => {
                        product.resize(count * k, T::default());
                        zip2(product, grad, &base[i * block * k..], |q: &mut T, grad, base| {
                            *q = T::from_real(grad.to_real() * base.to_real());
                        });
                        &product[..]
                    }
                };
                let (q, d) = (mat(q, count, k), mat(d, count, r));
                dd_t.resize(count * r, T::Real::zero());
                gemm_scaled(mat_mut_t(dd_t, count, r), Accum::Replace, self.scale, q, lora_a, Par::Seq);
                transpose(dd_t, dd, r);
                let mut share = vec![T::Real::zero(); r * k];
                gemm_scaled(
                    mat_mut(&mut share, r, k),
                    Accum::Replace,
                    self.scale,
                    d.transpose(),
                    q,
                    Par::Seq,
                );
                share
            },
        );
        zip1(grads.lora_a, &add_up(parts.iter().map(Vec::as_slice)), |out, sum| *out = T::from_real(sum));
        Ok(())
    }
}

/// `ΔW [N, K] = scale·B·A`: LoRA add.
///
/// # Errors
/// If a size is zero, a slice has another length than its shape, or `scale` is not finite.
#[inline(never)]
pub fn low_rank_weight<T: Element>(lora: LoraFactors<&[T], T::Real>, out: &mut [T]) -> Result<()> {
    lora.check()?;
    lora.check_weight("out", out)?;
    lora.product(None, out);
    Ok(())
}

/// `dB = scale·dΔW·Aᵀ`, `dA = scale·Bᵀ·dΔW`: gradients of [`low_rank_weight`].
///
/// # Errors
/// As [`low_rank_weight`].
#[inline(never)]
pub fn low_rank_weight_backward<T: Element>(
    lora: LoraFactors<&[T], T::Real>,
    delta_weight_grad: &[T],
    grads: LoraGrads<&mut [T]>,
) -> Result<()> {
    lora.check()?;
    lora.check_weight("delta_weight_grad", delta_weight_grad)?;
    lora.backward(delta_weight_grad, None, grads)
}

/// `ΔW [N, K] = W0 ⊙ (scale·B·A)`: LoRA mul, the paper's main adapter.
///
/// # Errors
/// As [`low_rank_weight`].
#[inline(never)]
pub fn lora_mul_weight<T: Element>(
    lora: LoraFactors<&[T], T::Real>,
    base_weight: &[T],
    out: &mut [T],
) -> Result<()> {
    lora.check()?;
    lora.check_weight("base_weight", base_weight)?;
    lora.check_weight("out", out)?;
    lora.product(Some(base_weight), out);
    Ok(())
}

/// `dB = scale·Q·Aᵀ`, `dA = scale·Bᵀ·Q` with `Q = dΔW ⊙ W0`: gradients of [`lora_mul_weight`].
///
/// # Errors
/// As [`low_rank_weight`].
#[inline(never)]
pub fn lora_mul_weight_backward<T: Element>(
    lora: LoraFactors<&[T], T::Real>,
    base_weight: &[T],
    delta_weight_grad: &[T],
    grads: LoraGrads<&mut [T]>,
) -> Result<()> {
    lora.check()?;
    lora.check_weight("base_weight", base_weight)?;
    lora.check_weight("delta_weight_grad", delta_weight_grad)?;
    lora.backward(delta_weight_grad, Some(base_weight), grads)
}

/// The prompt adapter's bias `Δb [N] = W0·(Pd·Pu) + b0⊙δb` (VPT add; the second term belongs to LoRA mul). `B` are the
/// tensors, as in [`LoraFactors`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PromptBias<B> {
    /// Out-features `N`.
    pub out_features: usize,
    /// In-features `K`.
    pub in_features: usize,
    /// Rank `r`.
    pub rank: usize,
    /// `W0 [N, K]`.
    pub base_weight: B,
    /// `b0 [N]`; without it the second term is zero.
    pub base_bias: Option<B>,
    /// `Pd [K, r]`.
    pub prompt_down: B,
    /// `Pu [r]`.
    pub prompt_up: B,
    /// `δb [N]`; without it the second term is zero.
    pub delta_bias: Option<B>,
}

/// Where the gradients of [`PromptBias`] go; each is overwritten.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PromptGrads<B> {
    /// `dPd [K, r] = q·Puᵀ` with `q = W0ᵀ·dΔb`.
    pub prompt_down: B,
    /// `dPu [r] = Pdᵀ·q`.
    pub prompt_up: B,
    /// `dδb [N] = b0 ⊙ dΔb` (zero without `b0`); `None` is not computed.
    pub delta_bias: Option<B>,
}

impl<T: Element> PromptBias<&[T]> {
    pub(super) fn check(&self) -> Result<()> {
        let Self { out_features: n, in_features: k, rank: r, .. } = *self;
        nonzero("out_features", n)?;
        nonzero("in_features", k)?;
        nonzero("rank", r)?;
        length("base_weight", "[N, K]", self.base_weight, product("base_weight", "[N, K]", &[n, k])?)?;
        length("prompt_down", "[K, r]", self.prompt_down, product("prompt_down", "[K, r]", &[k, r])?)?;
        length("prompt_up", "[r]", self.prompt_up, r)?;
        for (argument, slice) in [("base_bias", self.base_bias), ("delta_bias", self.delta_bias)] {
            slice.map_or(Ok(()), |slice| length(argument, "[N]", slice, n))?;
        }
        Ok(())
    }

    /// Checks the places for the gradients of factors that were checked.
    pub(super) fn check_grads(&self, grads: &PromptGrads<&mut [T]>) -> Result<()> {
        length("grads.prompt_down", "[K, r]", grads.prompt_down, self.in_features * self.rank)?;
        length("grads.prompt_up", "[r]", grads.prompt_up, self.rank)?;
        grads
            .delta_bias
            .as_ref()
            .map_or(Ok(()), |out| length("grads.delta_bias", "[N]", out, self.out_features))
    }

    /// Computes `Δb [N]`.
    ///
    /// # Errors
    /// If a size is zero or a slice has another length than its shape.
    #[inline(never)]
    pub fn forward(&self, out: &mut [T]) -> Result<()> {
        self.check()?;
        let Self { out_features: n, in_features: k, rank: r, .. } = *self;
        length("out", "[N]", out, n)?;
        let mut prompt = vec![T::default(); k];
        write_product(&mut prompt, (k, 1), mat(self.prompt_down, k, r), mat(self.prompt_up, r, 1));
        T::write(mat_mut(out, n, 1), Par::Seq, |mut out| {
            let prompt = mat(&prompt, k, 1);
            gemm(out.as_mut(), Accum::Replace, mat(self.base_weight, n, k), prompt, all_threads());
            if let (Some(base), Some(delta)) = (self.base_bias, self.delta_bias) {
                for (i, (&base, &delta)) in base.iter().zip(delta).enumerate() {
                    out[(i, 0)] += base.to_real() * delta.to_real();
                }
            }
        });
        Ok(())
    }

    /// Computes the gradients from `dΔb [N]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    #[inline(never)]
    pub fn backward(&self, delta_bias_grad: &[T], grads: PromptGrads<&mut [T]>) -> Result<()> {
        self.check()?;
        let Self { out_features: n, in_features: k, rank: r, .. } = *self;
        length("delta_bias_grad", "[N]", delta_bias_grad, n)?;
        self.check_grads(&grads)?;
        let mut q = vec![T::default(); k];
        write_product(&mut q, (1, k), mat(delta_bias_grad, 1, n), mat(self.base_weight, n, k));
        write_product(grads.prompt_down, (k, r), mat(&q, k, 1), mat(self.prompt_up, 1, r));
        write_product(grads.prompt_up, (1, r), mat(&q, 1, k), mat(self.prompt_down, k, r));
        if let Some(out) = grads.delta_bias {
            match self.base_bias {
                Some(base) => {
                    for ((out, &base), &grad) in out.iter_mut().zip(base).zip(delta_bias_grad) {
                        *out = T::from_real(base.to_real() * grad.to_real());
                    }
                }
                None => out.fill(T::default()),
            }
        }
        Ok(())
    }
}

/// `out = a·b`, of so many rows and columns, by all threads.
fn write_product<T: Element>(
    out: &mut [T],
    (rows, columns): (usize, usize),
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
) {
    T::write(mat_mut(out, rows, columns), Par::Seq, |out| gemm(out, Accum::Replace, a, b, all_threads()));
}

/// `target += delta`: folds an adapter into its frozen layer for inference. For `W0 += ΔW` and `b0 += Δb` alike.
///
/// # Errors
/// If the slices differ in length.
#[inline(never)]
pub fn merge<T: Real>(target: &mut [T], delta: &[T]) -> Result<()> {
    same_length(target, delta)?;
    combine(target, delta, |w, d| *w += d);
    Ok(())
}

/// `target −= delta`: takes a [`merge`]d adapter out again, up to rounding.
///
/// # Errors
/// If the slices differ in length.
#[inline(never)]
pub fn unmerge<T: Real>(target: &mut [T], delta: &[T]) -> Result<()> {
    same_length(target, delta)?;
    combine(target, delta, |w, d| *w -= d);
    Ok(())
}

fn combine<T: Real>(target: &mut [T], delta: &[T], op: impl Fn(&mut T, T) + Sync) {
    let tasks = target.chunks_mut(TASK).zip(delta.chunks(TASK));
    parallel::for_each(tasks, |(target, delta)| zip1(target, delta, &op));
}

fn same_length<T>(target: &[T], delta: &[T]) -> Result<(), Error> {
    length("delta", "[target.len()]", delta, target.len())
}
