//! Linear layers under noise, and the epilogue for GEMMs of the caller's own.

use super::call::*;
use super::types::*;
use super::{PaceDevice, PaceStatus, Result};
use crate::cuda::{
    self, Buffer, DType, Direction, Gpu, LowRankGrads, NoisyLinearGrads, Plan, Source, folds_by_default,
};
use crate::shape::nonzero;
use crate::{Element, LinearShape, Real, cpu};
use half::bf16;
use std::ffi::c_void;

enum Forward {}
enum Backward {}

fn noisy_linear<M: Memory>(
    memory: &mut M,
    args: &PaceNoisyLinear,
) -> Result<cuda::NoisyLinear<M::Tensor, M::Noise>> {
    check_flags(args.flags, PACE_EXACT | PACE_ALLOW_TF32)?;
    Ok(cuda::NoisyLinear {
        shape: linear_shape(&args.shape)?,
        noise: memory.noise(&args.noise)?,
        base: memory.base(args.base_weight, args.base_bias)?,
        delta_weight: memory.optional("delta_weight", args.delta_weight)?,
        delta_bias: memory.optional("delta_bias", args.delta_bias)?,
        fold: args.flags & PACE_EXACT == 0,
        allow_tf32: args.flags & PACE_ALLOW_TF32 != 0,
    })
}

fn noisy_linear_grads<M: Memory>(
    memory: &mut M,
    args: &PaceNoisyLinear,
) -> Result<NoisyLinearGrads<M::TensorMut>> {
    Ok(NoisyLinearGrads {
        input: memory.optional_output("grad_input", args.grad_input)?,
        delta_weight: memory.optional_output("grad_delta_weight", args.grad_delta_weight)?,
        delta_bias: memory.optional_output("grad_delta_bias", args.grad_delta_bias)?,
    })
}

/// The same layer on a device, where it folds only if that is the default.
fn noisy_linear_on_device(args: &PaceNoisyLinear, dtype: DType) -> Result<cuda::NoisyLinear<Buffer, Source>> {
    let layer = noisy_linear(&mut OnDevice, args)?;
    Ok(cuda::NoisyLinear { fold: layer.fold && folds_by_default(dtype, &layer.noise), ..layer })
}

/// The same layer on the CPU.
fn noisy_linear_on_cpu<'a, T: Element>(
    host: &mut Host<'a, T>,
    args: &PaceNoisyLinear,
) -> Result<cpu::NoisyLinear<'a, T>> {
    let layer = noisy_linear(host, args)?;
    let cuda::NoisyLinear { shape, noise, base, delta_weight, delta_bias, fold, .. } = layer;
    Ok(cpu::NoisyLinear { shape, noise, base, delta_weight, delta_bias, fold })
}

fn noisy_linear_forward_on_cpu<T: Element>(args: &PaceNoisyLinear, host: &mut Host<'_, T>) -> Result<()> {
    let layer = noisy_linear_on_cpu(host, args)?;
    Ok(layer.forward(host.input("x", args.x)?, host.output("y", args.y)?)?)
}

impl Operator<PaceNoisyLinear> for Forward {
    fn on_cpu<T: Real>(args: &PaceNoisyLinear, host: &mut Host<'_, T>) -> Result<()> {
        noisy_linear_forward_on_cpu(args, host)
    }

    fn on_cpu_in_bf16(args: &PaceNoisyLinear, host: &mut Host<'_, bf16>) -> Result<()> {
        noisy_linear_forward_on_cpu(args, host)
    }

    fn plan(args: &PaceNoisyLinear, gpu: &Gpu, dtype: DType) -> Result<Plan> {
        let layer = noisy_linear_on_device(args, dtype)?;
        let workspace = workspace_buffer(args.workspace, 4, layer.workspace_len(gpu, dtype))?;
        Ok(layer.forward(gpu, dtype, buffer(args.x), buffer(args.y), workspace)?)
    }
}

fn noisy_linear_backward_on_cpu<T: Element>(args: &PaceNoisyLinear, host: &mut Host<'_, T>) -> Result<()> {
    let layer = noisy_linear_on_cpu(host, args)?;
    let (x, dy) = (host.optional("x", args.x)?, host.input("dy", args.dy)?);
    Ok(layer.backward_from(x, dy, noisy_linear_grads(host, args)?)?)
}

impl Operator<PaceNoisyLinear> for Backward {
    fn on_cpu<T: Real>(args: &PaceNoisyLinear, host: &mut Host<'_, T>) -> Result<()> {
        noisy_linear_backward_on_cpu(args, host)
    }

    fn on_cpu_in_bf16(args: &PaceNoisyLinear, host: &mut Host<'_, bf16>) -> Result<()> {
        noisy_linear_backward_on_cpu(args, host)
    }

    fn plan(args: &PaceNoisyLinear, gpu: &Gpu, dtype: DType) -> Result<Plan> {
        let layer = noisy_linear_on_device(args, dtype)?;
        let grads = noisy_linear_grads(&mut OnDevice, args)?;
        let workspace = workspace_buffer(args.workspace, 4, layer.workspace_len(gpu, dtype))?;
        let (x, dy) = (optional_buffer(args.x), buffer(args.dy));
        Ok(layer.backward_from(gpu, dtype, x, dy, grads, workspace)?)
    }
}

/// Computes `y` from `x`.
///
/// # Safety
/// `device` is NULL or open; `stream` is NULL or a live stream of its primary context. `args` is NULL or points to as many bytes
/// as its `size` says. Every present tensor is memory of its length there, an input initialised, that nothing else touches in
/// conflict until the operator has run.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_noisy_linear_forward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceNoisyLinear,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Forward, _>(device, stream, args) }
}

/// Computes gradients from `x` and `dy`, with the noise of the forward pass recomputed: `dx = g·W0 + e·ΔW`, `dΔW = eᵀ·x`,
/// `dΔb = Σ_rows e`, where `g = dy` and `e = z⊙g`; with a shared input, sums over the branches.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_noisy_linear_backward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceNoisyLinear,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Backward, _>(device, stream, args) }
}

/// A frozen layer for a query, which no one reads.
const BASE: cuda::Base<Buffer> = cuda::Base { weight: Buffer { address: 0, len: 0 }, bias: None };

/// The bytes of workspace that suffice for either pass; the tensors of `args` are ignored.
///
/// # Safety
/// `args` is NULL or points to as many bytes as its `size` says, `bytes` is NULL or a place for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_noisy_linear_workspace(
    device: *const PaceDevice,
    args: *const PaceNoisyLinear,
    bytes: *mut u64,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe {
        workspace(device, args, bytes, |args, gpu, dtype| {
            let layer = noisy_linear_on_device(args, dtype)?;
            layer.shape.check()?;
            // Which tensors there will be decides the family, and a query may have none.
            let full = cuda::NoisyLinear { base: Some(BASE), delta_weight: Some(BASE.weight), ..layer };
            let none = cuda::NoisyLinear { base: None, delta_weight: None, ..layer };
            let lens = [full, none].map(|layer| layer.workspace_len(gpu, dtype));
            Ok(lens[0].max(lens[1]).saturating_mul(4))
        })
    }
}

fn low_rank_linear<M: Memory>(
    memory: &mut M,
    args: &PaceLowRankLinear,
) -> Result<cuda::LowRankLinear<M::Tensor, M::Noise>> {
    check_flags(args.flags, PACE_ALLOW_TF32)?;
    Ok(cuda::LowRankLinear {
        shape: linear_shape(&args.shape)?,
        noise: memory.noise(&args.noise)?,
        base: memory.base(args.base_weight, args.base_bias)?,
        rank: size("rank", args.rank)?,
        lora_b: memory.input("lora_b", args.lora_b)?,
        lora_a: memory.input("lora_a", args.lora_a)?,
        delta_bias: memory.optional("delta_bias", args.delta_bias)?,
        scale: check_scale(args.scale)? as f32,
        allow_tf32: args.flags & PACE_ALLOW_TF32 != 0,
    })
}

fn low_rank_grads<M: Memory>(memory: &mut M, args: &PaceLowRankLinear) -> Result<LowRankGrads<M::TensorMut>> {
    Ok(LowRankGrads {
        input: memory.optional_output("grad_input", args.grad_input)?,
        lora_b: memory.optional_output("grad_lora_b", args.grad_lora_b)?,
        lora_a: memory.optional_output("grad_lora_a", args.grad_lora_a)?,
        delta_bias: memory.optional_output("grad_delta_bias", args.grad_delta_bias)?,
    })
}

/// The same layer on the CPU, whose scale has the tensors' precision.
fn low_rank_linear_on_cpu<'a, T: Element>(
    host: &mut Host<'a, T>,
    args: &PaceLowRankLinear,
) -> Result<cpu::LowRankLinear<'a, T>> {
    let layer = low_rank_linear(host, args)?;
    let cuda::LowRankLinear { shape, noise, base, rank, lora_b, lora_a, delta_bias, .. } = layer;
    let scale = T::Real::from_f64(args.scale);
    Ok(cpu::LowRankLinear { shape, noise, base, rank, lora_b, lora_a, delta_bias, scale })
}

fn low_rank_linear_forward_on_cpu<T: Element>(
    args: &PaceLowRankLinear,
    host: &mut Host<'_, T>,
) -> Result<()> {
    let layer = low_rank_linear_on_cpu(host, args)?;
    Ok(layer.forward(host.input("x", args.x)?, host.output("y", args.y)?)?)
}

impl Operator<PaceLowRankLinear> for Forward {
    fn on_cpu<T: Real>(args: &PaceLowRankLinear, host: &mut Host<'_, T>) -> Result<()> {
        low_rank_linear_forward_on_cpu(args, host)
    }

    fn on_cpu_in_bf16(args: &PaceLowRankLinear, host: &mut Host<'_, bf16>) -> Result<()> {
        low_rank_linear_forward_on_cpu(args, host)
    }

    fn plan(args: &PaceLowRankLinear, gpu: &Gpu, dtype: DType) -> Result<Plan> {
        let (x, s, y) = (buffer(args.x), buffer(args.s), buffer(args.y));
        let layer = low_rank_linear(&mut OnDevice, args)?;
        let workspace = workspace_buffer(args.workspace, 4, layer.workspace_len(gpu, dtype))?;
        Ok(layer.forward(gpu, dtype, x, s, y, workspace)?)
    }
}

fn low_rank_linear_backward_on_cpu<T: Element>(
    args: &PaceLowRankLinear,
    host: &mut Host<'_, T>,
) -> Result<()> {
    let layer = low_rank_linear_on_cpu(host, args)?;
    let (x, dy) = (host.input("x", args.x)?, host.input("dy", args.dy)?);
    Ok(layer.backward(x, dy, low_rank_grads(host, args)?)?)
}

impl Operator<PaceLowRankLinear> for Backward {
    fn on_cpu<T: Real>(args: &PaceLowRankLinear, host: &mut Host<'_, T>) -> Result<()> {
        low_rank_linear_backward_on_cpu(args, host)
    }

    fn on_cpu_in_bf16(args: &PaceLowRankLinear, host: &mut Host<'_, bf16>) -> Result<()> {
        low_rank_linear_backward_on_cpu(args, host)
    }

    fn plan(args: &PaceLowRankLinear, gpu: &Gpu, dtype: DType) -> Result<Plan> {
        let layer = low_rank_linear(&mut OnDevice, args)?;
        let grads = low_rank_grads(&mut OnDevice, args)?;
        let workspace = workspace_buffer(args.workspace, 4, layer.workspace_len(gpu, dtype))?;
        let (x, s, dy) = (buffer(args.x), buffer(args.s), buffer(args.dy));
        Ok(layer.backward(gpu, dtype, x, s, dy, grads, workspace)?)
    }
}

/// Computes `y` from `x`, and on CUDA `s`.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_low_rank_linear_forward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceLowRankLinear,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Forward, _>(device, stream, args) }
}

/// Computes gradients from `x`, `dy` and on CUDA `s`, with the noise of the forward pass recomputed. With `g = dy`, `e = z⊙g`,
/// `ds = scale·e·B`: `dx = g·W0 + ds·A`, `dB = eᵀ·s`, `dA = dsᵀ·x`, `dδb = Σ_rows e`; with a shared input, sums over the
/// branches.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_low_rank_linear_backward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceLowRankLinear,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Backward, _>(device, stream, args) }
}

/// The bytes of workspace that suffice for either pass; the tensors of `args` are ignored.
///
/// # Safety
/// As `pace_noisy_linear_workspace`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_low_rank_linear_workspace(
    device: *const PaceDevice,
    args: *const PaceLowRankLinear,
    bytes: *mut u64,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe {
        workspace(device, args, bytes, |args, gpu, dtype| {
            let layer = low_rank_linear(&mut OnDevice, &PaceLowRankLinear { scale: 1.0, ..*args })?;
            layer.shape.check()?;
            nonzero("rank", layer.rank)?;
            let lens = [Some(BASE), None]
                .map(|base| cuda::LowRankLinear { base, ..layer }.workspace_len(gpu, dtype));
            Ok(lens[0].max(lens[1]).saturating_mul(4))
        })
    }
}

fn epilogue(
    args: &PaceNoisyEpilogue,
    direction: Direction,
    (input, output): (PaceTensor, PaceTensor),
    dtype: DType,
) -> Result<Plan> {
    check_flags(args.flags, 0)?;
    let (shape, noise) = (epilogue_shape(args)?, OnDevice.noise(&args.noise)?);
    let (input, output) = (buffer(input), buffer(output));
    Ok(cuda::NoisyEpilogue { shape, noise, direction, dtype, input, output }.plan()?)
}

fn epilogue_shape(args: &PaceNoisyEpilogue) -> Result<LinearShape> {
    linear_shape(&PaceShape { in_features: 1, shared_input: 0, ..args.shape })
}

impl Operator<PaceNoisyEpilogue> for Forward {
    fn on_cpu<T: Real>(args: &PaceNoisyEpilogue, host: &mut Host<'_, T>) -> Result<()> {
        check_flags(args.flags, 0)?;
        let (noise, a) = (host.noise(&args.noise)?, host.input("a", args.a)?);
        Ok(cpu::noisy_epilogue(epilogue_shape(args)?, noise, a, host.output("y", args.y)?)?)
    }

    fn plan(args: &PaceNoisyEpilogue, _: &Gpu, dtype: DType) -> Result<Plan> {
        epilogue(args, Direction::Forward, (args.a, args.y), dtype)
    }
}

impl Operator<PaceNoisyEpilogue> for Backward {
    fn on_cpu<T: Real>(args: &PaceNoisyEpilogue, host: &mut Host<'_, T>) -> Result<()> {
        check_flags(args.flags, 0)?;
        let (noise, dy) = (host.noise(&args.noise)?, host.input("dy", args.dy)?);
        Ok(cpu::noisy_epilogue_backward(epilogue_shape(args)?, noise, dy, host.output("da", args.da)?)?)
    }

    fn plan(args: &PaceNoisyEpilogue, _: &Gpu, dtype: DType) -> Result<Plan> {
        epilogue(args, Direction::Backward, (args.dy, args.da), dtype)
    }
}

/// Adds `z ⊙ a` to `y`.
///
/// # Safety
/// As `pace_noisy_linear_forward`; `y` is an input as well.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_noisy_epilogue_forward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceNoisyEpilogue,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Forward, _>(device, stream, args) }
}

/// Computes `da = z ⊙ dy`, with the noise of the forward pass recomputed.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_noisy_epilogue_backward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceNoisyEpilogue,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Backward, _>(device, stream, args) }
}
