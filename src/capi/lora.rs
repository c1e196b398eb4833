//! Layers with the paper's main adapter.

use super::call::*;
use super::types::*;
use super::{Failure, PaceDevice, PaceStatus, Result};
use crate::cuda::{self, Base, Buffer, DType, Gpu, Lora, LoraMulLinearGrads, Plan, Prompt, Source};
use crate::shape::nonzero;
use crate::{Real, cpu};
use std::ffi::c_void;

enum Forward {}
enum Backward {}

/// What there is besides the frozen layer.
struct Factors {
    /// Rank and scale of `lora_a` and `lora_b`.
    lora: Option<(usize, f64)>,
    /// Rank of the prompt.
    prompt: Option<usize>,
}

fn factors(args: &PaceLoraMulLinear) -> Result<Factors> {
    check_flags(args.flags, PACE_ALLOW_TF32)?;
    let rank = |name: &'static str, rank: u64| {
        let rank = size(name, rank)?;
        nonzero(name, rank)?;
        Ok::<_, Failure>(rank)
    };
    let lora = match present(args.lora_a).or(present(args.lora_b)) {
        Some(_) => Some((rank("rank", args.rank)?, check_scale(args.scale)?)),
        None => None,
    };
    let prompt = match present(args.prompt_down).or(present(args.prompt_up)) {
        Some(_) => Some(rank("prompt_rank", args.prompt_rank)?),
        None => None,
    };
    Ok(Factors { lora, prompt })
}

fn layer(args: &PaceLoraMulLinear) -> Result<cuda::LoraMulLinear<Buffer, Source>> {
    let Factors { lora, prompt } = factors(args)?;
    Ok(cuda::LoraMulLinear {
        shape: linear_shape(&args.shape)?,
        noise: source(&args.noise)?,
        base: Base { weight: buffer(args.base_weight), bias: optional_buffer(args.base_bias) },
        lora: lora.map(|(rank, scale)| Lora {
            rank,
            lora_a: buffer(args.lora_a),
            lora_b: buffer(args.lora_b),
            scale: scale as f32,
        }),
        prompt: prompt.map(|rank| Prompt {
            rank,
            down: buffer(args.prompt_down),
            up: buffer(args.prompt_up),
        }),
        delta_bias: optional_buffer(args.delta_bias),
        allow_tf32: args.flags & PACE_ALLOW_TF32 != 0,
    })
}

unsafe fn layer_on_cpu<'a, T: Real>(
    host: &mut Host,
    args: &PaceLoraMulLinear,
) -> Result<cpu::LoraMulLinear<'a, T>> {
    let Factors { lora, prompt } = factors(args)?;
    // SAFETY: the caller's promise.
    unsafe {
        Ok(cpu::LoraMulLinear {
            shape: linear_shape(&args.shape)?,
            noise: host.noise(&args.noise)?,
            base: cpu::Base {
                weight: host.input("base_weight", args.base_weight)?,
                bias: host.optional("base_bias", args.base_bias)?,
            },
            lora: match lora {
                Some((rank, scale)) => Some(Lora {
                    rank,
                    lora_a: host.input("lora_a", args.lora_a)?,
                    lora_b: host.input("lora_b", args.lora_b)?,
                    scale: T::from_f64(scale),
                }),
                None => None,
            },
            prompt: match prompt {
                Some(rank) => Some(Prompt {
                    rank,
                    down: host.input("prompt_down", args.prompt_down)?,
                    up: host.input("prompt_up", args.prompt_up)?,
                }),
                None => None,
            },
            delta_bias: host.optional("delta_bias", args.delta_bias)?,
        })
    }
}

impl Operator<PaceLoraMulLinear> for Forward {
    unsafe fn on_cpu<T: Real>(args: &PaceLoraMulLinear) -> Result<()> {
        let mut host = Host::default();
        // SAFETY: the caller's promise.
        unsafe {
            let layer = layer_on_cpu::<T>(&mut host, args)?;
            let x = host.input("x", args.x)?;
            Ok(layer.forward(x, host.output("y", args.y)?)?)
        }
    }

    fn plan(args: &PaceLoraMulLinear, gpu: &Gpu, dtype: DType) -> Result<Plan> {
        let layer = layer(args)?;
        let workspace = workspace_buffer(args.workspace, 4, layer.workspace_len(gpu, dtype))?;
        Ok(layer.forward(gpu, dtype, buffer(args.x), buffer(args.y), workspace)?)
    }
}

impl Operator<PaceLoraMulLinear> for Backward {
    unsafe fn on_cpu<T: Real>(args: &PaceLoraMulLinear) -> Result<()> {
        let mut host = Host::default();
        // SAFETY: the caller's promise.
        unsafe {
            let layer = layer_on_cpu::<T>(&mut host, args)?;
            let (x, dy) = (host.optional("x", args.x)?, host.input("dy", args.dy)?);
            let grads = LoraMulLinearGrads {
                input: host.optional_output("grad_input", args.grad_input)?,
                lora_a: host.optional_output("grad_lora_a", args.grad_lora_a)?,
                lora_b: host.optional_output("grad_lora_b", args.grad_lora_b)?,
                prompt_down: host.optional_output("grad_prompt_down", args.grad_prompt_down)?,
                prompt_up: host.optional_output("grad_prompt_up", args.grad_prompt_up)?,
                delta_bias: host.optional_output("grad_delta_bias", args.grad_delta_bias)?,
            };
            Ok(layer.backward(x, dy, grads)?)
        }
    }

    fn plan(args: &PaceLoraMulLinear, gpu: &Gpu, dtype: DType) -> Result<Plan> {
        let grads = LoraMulLinearGrads {
            input: optional_buffer(args.grad_input),
            lora_a: optional_buffer(args.grad_lora_a),
            lora_b: optional_buffer(args.grad_lora_b),
            prompt_down: optional_buffer(args.grad_prompt_down),
            prompt_up: optional_buffer(args.grad_prompt_up),
            delta_bias: optional_buffer(args.grad_delta_bias),
        };
        let layer = layer(args)?;
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
            let layer = layer(args)?;
            layer.shape.check()?;
            Ok(layer.workspace_len(gpu, dtype).saturating_mul(4))
        })
    }
}
