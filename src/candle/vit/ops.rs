//! The transformer's own operators, with backward passes: layer norm, attention and GELU.
//!
//! candle's fused layer norm and softmax have no backward pass, and its composed ones take a dozen passes over
//! memory each; around noisy layers that cost nearly nothing they would be most of a training step. Off the CPU they are
//! composed all the same ([`composed`]).

mod composed;

use crate::candle::ops::{Element, Grads, Kernel, apply1, apply3};
use crate::parallel::{self, TASK};
use crate::vector::{Loop, widest, zip1, zip2};
use candle_core::{Result, Shape, Tensor};
use faer::linalg::matmul::matmul;
use faer::prelude::ReborrowMut;
use faer::{Accum, MatMut, MatRef, Par};

/// Folds a row in sixteen lanes, in a fixed order, so that the loop becomes vector code.
#[inline(always)]
fn reduce<T: Element>(row: &[T], start: T, join: impl Fn(T, T) -> T) -> T {
    const LANES: usize = 16;
    let mut lanes = [start; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = join(*lane, v);
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(start, join)
}

/// `(x − mean)/√(var + ε)·weight + bias` over the last dimension; arguments `(x, weight, bias)`.
struct LayerNormKernel {
    epsilon: f64,
}

/// Mean and `1/√(var + ε)` of a row.
fn moments<T: Element>(row: &[T], epsilon: f64) -> (T, T) {
    let count = T::from_usize(row.len());
    let mean = row.iter().fold(T::zero(), |sum, &v| sum + v) / count;
    let variance = row.iter().fold(T::zero(), |sum, &v| sum + (v - mean) * (v - mean)) / count;
    let epsilon: T = Element::from_f64(epsilon);
    (mean, T::one() / (variance + epsilon).sqrt())
}

impl Kernel<3> for LayerNormKernel {
    const NAME: &'static str = "layer_norm";

    fn shape(&self, [x, weight, bias]: [&Shape; 3]) -> Result<Shape> {
        match x.dims().last() {
            Some(&width) if width > 0 && weight.dims() == [width] && bias.dims() == [width] => Ok(x.clone()),
            _ => candle_core::bail!("layer_norm: weight {weight:?} and bias {bias:?} do not fit {x:?}"),
        }
    }

    fn forward<T: Element>(&self, [x, weight, bias]: [&[T]; 3], out: &mut [T]) -> Result<()> {
        let width = weight.len();
        let task = parallel::rows(width) * width;
        parallel::for_each(out.chunks_mut(task).zip(x.chunks(task)), |(out, x)| {
            for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                let (mean, scale) = moments(x, self.epsilon);
                for (((out, &x), &w), &b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                    *out = (x - mean) * scale * w + b;
                }
            }
        });
        Ok(())
    }

    fn backward<T: Element>(
        &self,
        [x, weight, _]: [&[T]; 3],
        grad: &[T],
        [dx, grads @ ..]: Grads<'_, T, 3>,
    ) -> Result<()> {
        let width = weight.len();
        let count = T::from_usize(width);
        if let Some(dx) = dx {
            let task = parallel::rows(width) * width;
            let tasks = dx.chunks_mut(task).zip(x.chunks(task)).zip(grad.chunks(task));
            parallel::for_each(tasks, |((dx, x), grad)| {
                let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width));
                for ((dx, x), grad) in rows.zip(grad.chunks_exact(width)) {
                    let (mean, scale) = moments(x, self.epsilon);
                    let (mut sum, mut dot) = (T::zero(), T::zero());
                    for ((&g, &w), &x) in grad.iter().zip(weight).zip(x) {
                        sum += g * w;
                        dot += g * w * (x - mean);
                    }
                    let (sum, dot) = (sum / count, dot * scale * scale / count);
                    for (((dx, &g), &w), &x) in dx.iter_mut().zip(grad).zip(weight).zip(x) {
                        *dx = scale * (g * w - sum - (x - mean) * dot);
                    }
                }
            });
        }
        if grads.iter().any(Option::is_some) {
            // Only pre-training asks for these; one thread keeps the order of the sums fixed.
            let (mut dw, mut db) = (vec![T::zero(); width], vec![T::zero(); width]);
            for (x, grad) in x.chunks_exact(width).zip(grad.chunks_exact(width)) {
                let (mean, scale) = moments(x, self.epsilon);
                for (((dw, db), &g), &x) in dw.iter_mut().zip(&mut db).zip(grad).zip(x) {
                    *dw += g * (x - mean) * scale;
                    *db += g;
                }
            }
            for (place, values) in grads.into_iter().zip([dw, db]) {
                if let Some(place) = place {
                    place.copy_from_slice(&values);
                }
            }
        }
        Ok(())
    }
}

/// `softmax(q·kᵀ/√d)·v` of every head; argument `qkv [rows, T, 3·C]`, result `[rows, T, C]`.
///
/// The weights are not kept: the backward pass computes them again from `qkv`.
struct AttentionKernel {
    tokens: usize,
    heads: usize,
    head_dim: usize,
}

/// The query, key and value of one head, as strided views of one sample's `qkv`.
fn views<'a, T: Element>(
    qkv: &'a [T],
    tokens: usize,
    width: usize,
    at: usize,
    dim: usize,
) -> [MatRef<'a, T>; 3] {
    let qkv = MatRef::from_row_major_slice(qkv, tokens, 3 * width);
    [0, 1, 2].map(|part| qkv.subcols(part * width + at, dim))
}

/// The softmax of every row, in place.
struct Softmax<'a, T> {
    rows: &'a mut [T],
    width: usize,
}

impl<T: Element> Loop for Softmax<'_, T> {
    #[inline(always)]
    fn run(self) {
        for row in self.rows.chunks_exact_mut(self.width) {
            let max = reduce(row, row[0], |a, b| if b > a { b } else { a });
            for v in row.iter_mut() {
                *v = (*v - max).exp();
            }
            let norm = T::one() / reduce(row, T::zero(), |a, b| a + b);
            for v in row.iter_mut() {
                *v *= norm;
            }
        }
    }
}

/// The gradient through the softmax, in place: `dS = P ⊙ (dP − Σ P⊙dP)` for every row of `dP`.
struct SoftmaxGradient<'a, T> {
    rows: &'a mut [T],
    weights: &'a [T],
    width: usize,
}

impl<T: Element> Loop for SoftmaxGradient<'_, T> {
    #[inline(always)]
    fn run(self) {
        for (grad, weights) in
            self.rows.chunks_exact_mut(self.width).zip(self.weights.chunks_exact(self.width))
        {
            let mut dot = T::zero();
            for (&g, &w) in grad.iter().zip(weights) {
                dot += g * w;
            }
            for (g, &w) in grad.iter_mut().zip(weights) {
                *g = w * (*g - dot);
            }
        }
    }
}

impl AttentionKernel {
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// `softmax(q·kᵀ/√d)`, row-major `[T, T]`.
    fn weights<T: Element>(&self, q: MatRef<'_, T>, k: MatRef<'_, T>, weights: &mut [T]) {
        let scale: T = Element::from_f64((self.head_dim as f64).powf(-0.5));
        let t = self.tokens;
        let out = MatMut::from_row_major_slice_mut(weights, t, t);
        matmul(out, Accum::Replace, q, k.transpose(), scale, Par::Seq);
        widest(Softmax { rows: weights, width: t });
    }
}

impl Kernel<1> for AttentionKernel {
    const NAME: &'static str = "attention";

    fn shape(&self, [shape]: [&Shape; 1]) -> Result<Shape> {
        let (rows, tokens, _) = shape.dims3()?;
        Ok(Shape::from((rows, tokens, self.width())))
    }

    fn forward<T: Element>(&self, [qkv]: [&[T]; 1], out: &mut [T]) -> Result<()> {
        let (t, width, dim) = (self.tokens, self.width(), self.head_dim);
        parallel::for_each_init(
            out.chunks_mut(t * width).zip(qkv.chunks(3 * t * width)),
            || vec![T::zero(); t * t],
            |weights, (out, qkv)| {
                let mut out = MatMut::from_row_major_slice_mut(out, t, width);
                for head in 0..self.heads {
                    let [q, k, v] = views(qkv, t, width, head * dim, dim);
                    self.weights(q, k, weights);
                    let weights = MatRef::from_row_major_slice(weights, t, t);
                    let out = out.rb_mut().subcols_mut(head * dim, dim);
                    matmul(out, Accum::Replace, weights, v, T::one(), Par::Seq);
                }
            },
        );
        Ok(())
    }

    fn backward<T: Element>(&self, [qkv]: [&[T]; 1], grad: &[T], [dqkv]: Grads<'_, T, 1>) -> Result<()> {
        let Some(dqkv) = dqkv else { return Ok(()) };
        let (t, width, dim) = (self.tokens, self.width(), self.head_dim);
        let scale: T = Element::from_f64((dim as f64).powf(-0.5));
        let samples = dqkv.chunks_mut(3 * t * width).zip(qkv.chunks(3 * t * width));
        parallel::for_each_init(
            samples.zip(grad.chunks(t * width)),
            || (vec![T::zero(); t * t], vec![T::zero(); t * t]),
            |(weights, scores), ((dqkv, qkv), grad)| {
                let grad = MatRef::from_row_major_slice(grad, t, width);
                let mut dqkv = MatMut::from_row_major_slice_mut(dqkv, t, 3 * width);
                let mut part = |index: usize, at: usize, a: MatRef<'_, T>, b: MatRef<'_, T>, factor: T| {
                    let out = dqkv.rb_mut().subcols_mut(index * width + at, dim);
                    matmul(out, Accum::Replace, a, b, factor, Par::Seq);
                };
                for head in 0..self.heads {
                    let at = head * dim;
                    let [q, k, v] = views(qkv, t, width, at, dim);
                    self.weights(q, k, weights);
                    let g = grad.subcols(at, dim);
                    let to_scores = MatMut::from_row_major_slice_mut(scores, t, t);
                    matmul(to_scores, Accum::Replace, g, v.transpose(), T::one(), Par::Seq);
                    part(2, at, MatRef::from_row_major_slice(weights, t, t).transpose(), g, T::one());
                    widest(SoftmaxGradient { rows: scores, weights, width: t });
                    let scores = MatRef::from_row_major_slice(scores, t, t);
                    part(0, at, scores, k, scale);
                    part(1, at, scores.transpose(), q, scale);
                }
            },
        );
        Ok(())
    }
}

/// `x·Φ(x)` with the exact normal distribution function, as timm's GELU.
struct GeluKernel;

/// `Φ(x)`.
#[inline(always)]
fn normal_cdf<T: Element>(x: T) -> T {
    let (half, scale): (T, T) = (Element::from_f64(0.5), Element::from_f64(std::f64::consts::FRAC_1_SQRT_2));
    half * (T::one() + (x * scale).erf())
}

impl Kernel<1> for GeluKernel {
    const NAME: &'static str = "gelu";

    fn shape(&self, [shape]: [&Shape; 1]) -> Result<Shape> {
        Ok(shape.clone())
    }

    fn forward<T: Element>(&self, [x]: [&[T]; 1], out: &mut [T]) -> Result<()> {
        parallel::for_each(out.chunks_mut(TASK).zip(x.chunks(TASK)), |(out, x)| {
            zip1(out, x, |out, x| *out = x * normal_cdf(x));
        });
        Ok(())
    }

    fn backward<T: Element>(&self, [x]: [&[T]; 1], grad: &[T], [dx]: Grads<'_, T, 1>) -> Result<()> {
        let Some(dx) = dx else { return Ok(()) };
        let (half, norm): (T, T) =
            (Element::from_f64(-0.5), Element::from_f64((2.0 * std::f64::consts::PI).sqrt().recip()));
        let tasks = dx.chunks_mut(TASK).zip(x.chunks(TASK)).zip(grad.chunks(TASK));
        parallel::for_each(tasks, |((dx, x), grad)| {
            zip2(dx, x, grad, |dx, x, g| *dx = g * (normal_cdf(x) + x * norm * (half * x * x).exp()));
        });
        Ok(())
    }
}

/// Layer norm over the last dimension of `x`, differentiable in all three.
pub(super) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    let kernel = LayerNormKernel { epsilon };
    if x.device().is_cpu() {
        return apply3(kernel, x, weight, bias);
    }
    kernel.shape([x.shape(), weight.shape(), bias.shape()])?;
    composed::layer_norm(x, weight, bias, epsilon)
}

/// Multi-head self-attention from `qkv [rows, T, 3·C]` to `[rows, T, C]`, differentiable.
pub(super) fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let (_, tokens, width) = qkv.dims3()?;
    if heads == 0 || width == 0 || tokens == 0 || width % (3 * heads) != 0 {
        candle_core::bail!("attention: qkv is {:?}, which does not divide into {heads} heads", qkv.dims());
    }
    let head_dim = width / 3 / heads;
    if qkv.device().is_cpu() {
        apply1(AttentionKernel { tokens, heads, head_dim }, qkv)
    } else {
        composed::attention(qkv, heads, head_dim)
    }
}

/// GELU with the exact normal distribution function, differentiable.
pub(super) fn gelu(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() { apply1(GeluKernel, x) } else { composed::gelu(x) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Var};

    /// Central differences against the backward pass, in f64, for every element.
    fn check_gradients(arguments: &[Tensor], op: impl Fn(&[Var]) -> Result<Tensor>) -> Result<()> {
        let vars = arguments.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let out = op(&vars)?;
        let weights = Tensor::randn(0f64, 1.0, out.shape(), &Device::Cpu)?;
        let value = |vars: &[Var]| (op(vars)? * &weights)?.sum_all()?.to_scalar::<f64>();
        let grads = (out * &weights)?.sum_all()?.backward()?;
        for (at, var) in vars.iter().enumerate() {
            let got = grads.get(var).expect("gradient").flatten_all()?.to_vec1::<f64>()?;
            let start = var.flatten_all()?.to_vec1::<f64>()?;
            for i in 0..start.len() {
                let moved = |step: f64| {
                    let mut values = start.clone();
                    values[i] += step;
                    let mut vars = vars.clone();
                    vars[at] = Var::from_vec(values, var.shape(), &Device::Cpu)?;
                    value(&vars)
                };
                let expected = (moved(1e-5)? - moved(-1e-5)?) / 2e-5;
                assert!(
                    (got[i] - expected).abs() < 1e-8 * (1.0 + expected.abs()),
                    "{at}[{i}]: {} {expected}",
                    got[i]
                );
            }
        }
        Ok(())
    }

    fn random(shape: impl Into<Shape>) -> Result<Tensor> {
        Tensor::randn(0f64, 1.0, shape, &Device::Cpu)
    }

    #[test]
    fn gradients_match_finite_differences() -> Result<()> {
        check_gradients(&[random((3, 2, 5))?, random(5)?, random(5)?], |v| {
            layer_norm(&v[0], &v[1], &v[2], 1e-6)
        })?;
        check_gradients(&[random((2, 4, 12))?], |v| attention(&v[0], 2))?;
        check_gradients(&[random((2, 9))?], |v| gelu(&v[0]))
    }

    #[test]
    fn composed_operators_are_the_same() -> Result<()> {
        let vars: Vec<Var> = [random((3, 5, 12))?, random(12)?, random(12)?]
            .iter()
            .map(Var::from_tensor)
            .collect::<Result<_>>()?;
        let [x, weight, bias] = &vars[..] else { unreachable!("three were made") };
        let difference = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.max_all()?.to_scalar::<f64>();
        for (fused, composed) in [
            (layer_norm(x, weight, bias, 1e-3)?, composed::layer_norm(x, weight, bias, 1e-3)?),
            (attention(x, 2)?, composed::attention(x, 2, 2)?),
            (gelu(x)?, composed::gelu(x)?),
        ] {
            assert!(difference(&fused, &composed)? < 1e-12);
            let scale = random(fused.shape())?;
            let grads = [fused, composed].map(|out| (out * &scale)?.sum_all()?.backward());
            let [fused, composed] = grads;
            let (fused, composed) = (fused?, composed?);
            for var in &vars {
                match (fused.get(var), composed.get(var)) {
                    (Some(fused), Some(composed)) => assert!(difference(fused, composed)? < 1e-12),
                    (fused, composed) => assert_eq!(fused.is_some(), composed.is_some()),
                }
            }
        }
        Ok(())
    }

    #[test]
    fn single_precision_is_near_double() -> Result<()> {
        let x = random((8, 33, 24))?;
        let (weight, bias) = (random(24)?, random(24)?);
        let f32 = |t: &Tensor| t.to_dtype(DType::F32);
        for (double, single) in [
            (
                layer_norm(&x, &weight, &bias, 1e-6)?,
                layer_norm(&f32(&x)?, &f32(&weight)?, &f32(&bias)?, 1e-6)?,
            ),
            (attention(&x, 4)?, attention(&f32(&x)?, 4)?),
            (gelu(&(&x * 3.0)?)?, gelu(&(f32(&x)? * 3.0)?)?),
        ] {
            let error = (double - single.to_dtype(DType::F64)?)?.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(error < 1e-5, "{error}");
        }
        Ok(())
    }
}
