//! Layers with the paper's main adapter.

use super::call::*;
use super::types::*;
use super::{PaceDevice, PaceStatus, Result};
use crate::cuda::{
    self, Base, Buffer, DType, Gpu, Lora, LoraMulLinearGrads, Plan, Prompt, Source, folds_by_default,
};
use crate::shape::nonzero;
use crate::{Element, Real, cpu};
use half::bf16;
use std::ffi::c_void;

enum Forward {}
enum Backward {}

/// A rank, which a present factor needs.
fn rank(name: &'static str, value: u64) -> Result<usize> {
    let rank = size(name, value)?;
    nonzero(name, rank)?;
    Ok(rank)
}

fn layer<M: Memory>(
    memory: &mut M,
    args: &PaceLoraMulLinear,
) -> Result<cuda::LoraMulLinear<M::Tensor, M::Noise>> {
    check_flags(args.flags, PACE_EXACT | PACE_ALLOW_TF32)?;
    // The ranks before the tensors that have them, which come last.
    let lora = match present(args.lora_a).or(present(args.lora_b)) {
        Some(_) => Some((rank("rank", args.rank)?, check_scale(args.scale)? as f32)),
        None => None,
    };
    let prompt = match present(args.prompt_down).or(present(args.prompt_up)) {
        Some(_) => Some(rank("prompt_rank", args.prompt_rank)?),
        None => None,
    };
    Ok(cuda::LoraMulLinear {
        shape: linear_shape(&args.shape)?,
        noise: memory.noise(&args.noise)?,
        base: Base {
            weight: memory.input("base_weight", args.base_weight)?,
            bias: memory.optional("base_bias", args.base_bias)?,
        },
        lora: match lora {
            Some((rank, scale)) => Some(Lora {
                rank,
                lora_a: memory.input("lora_a", args.lora_a)?,
                lora_b: memory.input("lora_b", args.lora_b)?,
                scale,
            }),
            None => None,
        },
        prompt: match prompt {
            Some(rank) => Some(Prompt {
                rank,
                down: memory.input("prompt_down", args.prompt_down)?,
                up: memory.input("prompt_up", args.prompt_up)?,
            }),
            None => None,
        },
        delta_bias: memory.optional("delta_bias", args.delta_bias)?,
        fold: args.flags & PACE_EXACT == 0,
        allow_tf32: args.flags & PACE_ALLOW_TF32 != 0,
    })
}

fn grads<M: Memory>(memory: &mut M, args: &PaceLoraMulLinear) -> Result<LoraMulLinearGrads<M::TensorMut>> {
    Ok(LoraMulLinearGrads {
        input: memory.optional_output("grad_input", args.grad_input)?,
        lora_a: memory.optional_output("grad_lora_a", args.grad_lora_a)?,
        lora_b: memory.optional_output("grad_lora_b", args.grad_lora_b)?,
        prompt_down: memory.optional_output("grad_prompt_down", args.grad_prompt_down)?,
        prompt_up: memory.optional_output("grad_prompt_up", args.grad_prompt_up)?,
        delta_bias: memory.optional_output("grad_delta_bias", args.grad_delta_bias)?,
    })
}

/// The same layer on a device, where it folds only if that is the default.
fn layer_on_device(args: &PaceLoraMulLinear, dtype: DType) -> Result<cuda::LoraMulLinear<Buffer, Source>> {
    let layer = layer(&mut OnDevice, args)?;
    Ok(cuda::LoraMulLinear { fold: layer.fold && folds_by_default(dtype, &layer.noise), ..layer })
}

/// The same layer on the CPU, whose scale has the tensors' precision.
fn layer_on_cpu<'a, T: Element>(
    host: &mut Host<'a, T>,
    args: &PaceLoraMulLinear,
) -> Result<cpu::LoraMulLinear<'a, T>> {
    let cuda::LoraMulLinear { shape, noise, base, lora, prompt, delta_bias, fold, .. } = layer(host, args)?;
    let scale = T::Real::from_f64(args.scale);
    let lora = lora.map(|Lora { rank, lora_a, lora_b, .. }| Lora { rank, lora_a, lora_b, scale });
    Ok(cpu::LoraMulLinear { shape, noise, base, lora, prompt, delta_bias, fold })
}

fn lora_mul_linear_forward_on_cpu<T: Element>(
    args: &PaceLoraMulLinear,
    host: &mut Host<'_, T>,
) -> Result<()> {
    let layer = layer_on_cpu(host, args)?;
    Ok(layer.forward(host.input("x", args.x)?, host.output("y", args.y)?)?)
}

impl Operator<PaceLoraMulLinear> for Forward {
    fn on_cpu<T: Real>(args: &PaceLoraMulLinear, host: &mut Host<'_, T>) -> Result<()> {
        lora_mul_linear_forward_on_cpu(args, host)
    }

    fn on_cpu_in_bf16(args: &PaceLoraMulLinear, host: &mut Host<'_, bf16>) -> Result<()> {
        lora_mul_linear_forward_on_cpu(args, host)
    }

    fn plan(args: &PaceLoraMulLinear, gpu: &Gpu, dtype: DType) -> Result<Plan> {
        let layer = layer_on_device(args, dtype)?;
        let workspace = workspace_buffer(args.workspace, 4, layer.workspace_len(gpu, dtype))?;
        Ok(layer.forward(gpu, dtype, buffer(args.x), buffer(args.y), workspace)?)
    }
}

fn lora_mul_linear_backward_on_cpu<T: Element>(
    args: &PaceLoraMulLinear,
    host: &mut Host<'_, T>,
) -> Result<()> {
    let layer = layer_on_cpu(host, args)?;
    let (x, dy) = (host.optional("x", args.x)?, host.input("dy", args.dy)?);
    Ok(layer.backward(x, dy, grads(host, args)?)?)
}

impl Operator<PaceLoraMulLinear> for Backward {
    fn on_cpu<T: Real>(args: &PaceLoraMulLinear, host: &mut Host<'_, T>) -> Result<()> {
        lora_mul_linear_backward_on_cpu(args, host)
    }

    fn on_cpu_in_bf16(args: &PaceLoraMulLinear, host: &mut Host<'_, bf16>) -> Result<()> {
        lora_mul_linear_backward_on_cpu(args, host)
    }

    fn plan(args: &PaceLoraMulLinear, gpu: &Gpu, dtype: DType) -> Result<Plan> {
        let (layer, grads) = (layer_on_device(args, dtype)?, grads(&mut OnDevice, args)?);
        let workspace = workspace_buffer(args.workspace, 4, layer.workspace_len(gpu, dtype))?;
        Ok(layer.backward(gpu, dtype, optional_buffer(args.x), buffer(args.dy), grads, workspace)?)
    }
}

/// Computes `y` from `x`.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_lora_mul_linear_forward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceLoraMulLinear,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Forward, _>(device, stream, args) }
}

/// Computes gradients from `x` and `dy`, with the noise of the forward pass recomputed: those of `pace_noisy_linear_backward`,
/// `pace_low_rank_weight_backward` and `pace_prompt_bias_backward`.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_lora_mul_linear_backward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceLoraMulLinear,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Backward, _>(device, stream, args) }
}

/// The bytes of workspace that suffice for either pass. Of the tensors of `args` only whether there are factors counts.
///
/// # Safety
/// As `pace_noisy_linear_workspace`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_lora_mul_linear_workspace(
    device: *const PaceDevice,
    args: *const PaceLoraMulLinear,
    bytes: *mut u64,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe {
        workspace(device, args, bytes, |args, gpu, dtype| {
            let layer = layer_on_device(&PaceLoraMulLinear { scale: 1.0, ..*args }, dtype)?;
            layer.shape.check()?;
            Ok(layer.workspace_len(gpu, dtype).saturating_mul(4))
        })
    }
}
