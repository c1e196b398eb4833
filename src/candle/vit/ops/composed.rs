//! The transformer's operators, composed of candle's own: for any device, in a dozen passes over memory each.
//!
//! The 16-bit types get their sums and exponentials in `F32`.

use candle_core::{D, DType, Result, Tensor};
use std::f64::consts::FRAC_1_SQRT_2;

/// `x` in a type that sums can be taken in.
fn wide(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32),
        _ => Ok(x.clone()),
    }
}

pub(super) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    let wide = wide(x)?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + epsilon)?.sqrt()?;
    let normal = centred.broadcast_div(&deviation)?.to_dtype(x.dtype())?;
    normal.broadcast_mul(weight)?.broadcast_add(bias)
}

pub(super) fn attention(qkv: &Tensor, heads: usize, head_dim: usize) -> Result<Tensor> {
    let (rows, tokens, _) = qkv.dims3()?;
    // [3, rows, heads, T, d]
    let parts = qkv.reshape((rows, tokens, 3, heads, head_dim))?.permute((2, 0, 3, 1, 4))?.contiguous()?;
    let part = |i: usize| parts.narrow(0, i, 1)?.squeeze(0);
    let q = (part(0)? * (head_dim as f64).powf(-0.5))?;
    let scores = wide(&q.matmul(&part(1)?.transpose(2, 3)?)?)?;
    // The softmax does not depend on what is subtracted: no gradient has to go through it.
    let powers = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let weights = powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)?.to_dtype(qkv.dtype())?;
    weights.matmul(&part(2)?)?.transpose(1, 2)?.reshape((rows, tokens, heads * head_dim))
}

pub(super) fn gelu(x: &Tensor) -> Result<Tensor> {
    let wide = wide(x)?;
    // candle's own gelu_erf rounds a constant of its gradient to six digits.
    let cdf = (((&wide * FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
    (wide * cdf)?.to_dtype(x.dtype())
}
